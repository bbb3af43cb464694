#!/usr/bin/env bash
# From a recipe to an answer on the bundled input: fine-tunes a real (tiny) Mixtral with 4-bit experts, merges the
# adapter exactly, and lets base and tuned model answer the same three questions. Needs no GPU and, once installed, no
# network. Everything it makes lies in outputs/quickstart, which a second start replaces.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
ensure_venv

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
# glibc would map and zero every temporary above 32 MB anew: a training step on two cores takes 1.8 times as long.
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_TOP_PAD_=500000000
# Waiting threads sleep: a busy neighbour on the same cores costs its share and not ten times that.
export OMP_WAIT_POLICY=PASSIVE
recipe=recipes/tiny-mixtral/qlora-attention.yaml
base=recipes/tiny-mixtral/model
out=outputs/quickstart
finetune=.venv/bin/finetune

echo "== 1/3  fine-tune: $recipe"
"$finetune" train "$recipe" --set output.dir="$out/run" --overwrite

echo "== 2/3  merge: attention in bf16, experts keep their 4-bit bytes"
rm -rf "$out/merged"
"$finetune" merge "$out/run/adapter" --output "$out/merged"

echo "== 3/3  ask base and tuned model the same three questions"
"$finetune" generate "$out/merged" --against "$base" --max-new-tokens 32 \
  --prompt "What is AI?" --prompt "Who are you?" --prompt "Was ist die Hauptstadt von Deutschland?"

cat <<END

adapter       $out/run/adapter
merged model  $out/merged
metrics       $out/run/metrics.jsonl
figures       $out/run/figures/training.png, $out/run/figures/router_load.png
END
