#!/usr/bin/env bash
# Every test that needs a CUDA device, then the benches of the README's table; a short table last. Under 9 minutes on one
# 80 GB GPU. Uses the python3 on the path (PYTHON=... for another), since GPU machines bring their own torch.
#
#   PARTS="tests multi train peers kernels"   which parts; one that fails does not stop the others
#                                       (`multi`, two GPUs against one, says so where there is only one;
#                                       `router`, what watching it costs a step, is a further one, and
#                                       `recipes`, every recipe held to the memory of its card)
#   ROWS="8x1024 4x4096"                which rows of training; further ones: 8x1024-non-moe, 8x1024-grouped,
#                                       tiny-qlora-attention, tiny-freeze-experts
#   RESULTS=DIR                         keeps the raw JSON lines there
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
parts=${PARTS:-tests multi train peers kernels}
rows=${ROWS:-2x1024 8x1024 8x1024-34gib 4x4096}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
results=${RESULTS:-$work/results}
mkdir -p "$results"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
status=0

part() { [[ " $parts " == *" $1 "* ]]; }

# bench NAME ARGS...: one bench, its tables shown, its JSON line in NAME.json.
bench() {
  local name=$1 begun=$SECONDS
  shift
  echo "== $name"
  rm -f "$results/$name.json"
  if ! "$python" -m bench "$@" --out "$results/$name.json" 2>"$work/$name.log" | grep -v '^{'; then
    echo "$name failed:"
    tail -n 15 "$work/$name.log"
    status=1
  fi
  echo "$name took $((SECONDS - begun)) s"
}

# train NAME ARGS...: one row of training on the LoRA recipe, or on the one that METHOD names.
train() {
  local name=$1
  shift
  bench "train-$name" train "recipes/mixtral-8x7b/${METHOD:-qlora-attention}-80gb.yaml" --random-weights "$@"
}

# The files run beside each other, a process each: most of their time is the host's.
multi=tests/gpu/test_multi_cuda.py
if part tests; then
  begun=$SECONDS
  files=$(ls tests/gpu/test_*.py | grep -v "$multi")
  for file in $files; do
    {
      "$python" -m pytest "$file" -o addopts="-q --strict-markers --durations=3" -p no:cacheprovider
      echo $? >"$work/$(basename "$file").status"
    } >"$work/$(basename "$file").log" 2>&1 &
  done
  wait
  for file in $files; do
    name=$(basename "$file")
    if [[ $(cat "$work/$name.status") == 0 ]]; then
      echo "$name: $(tail -n 1 "$work/$name.log")"
    else
      tail -n 80 "$work/$name.log"
      status=1
    fi
    grep 's call' "$work/$name.log"
  done
  echo "tests took $((SECONDS - begun)) s"
fi
if part multi; then
  begun=$SECONDS
  # -rs: on a single GPU the reason why nothing ran is printed.
  "$python" -m pytest "$multi" -o addopts="-q --strict-markers -rsP" -p no:cacheprovider || status=1
  echo "multi took $((SECONDS - begun)) s"
fi
if part train; then
  for row in $rows; do
    case $row in
      8x1024-34gib) train "$row" --batch 8 --length 1024 --set memory.budget_gib=34 ;;
      8x1024-grouped) train "$row" --batch 8 --length 1024 --set model.experts_backend=grouped ;;
      8x1024-non-moe) METHOD=freeze-experts train "$row" --batch 8 --length 1024 ;;
      tiny-*) bench "train-$row" train "recipes/tiny-mixtral/${row#tiny-}.yaml" --batch 2 --length 256 --set model.device=cuda ;;
      # Steps of a third of a second vary with the host: more of them. Those of two seconds do not.
      2x1024) train "$row" --batch 2 --length 1024 --steps 32 ;;
      4x4096) train "$row" --batch 4 --length 4096 --steps 5 ;;
      *x*) train "$row" --batch "${row%x*}" --length "${row#*x}" ;;
    esac
  done
fi
if part peers; then bench peers peers --batch 8 --length 1024; fi
if part kernels; then bench kernels kernels; fi
if part router; then
  bench router router recipes/mixtral-8x7b/qlora-attention-80gb.yaml --random-weights --batch 8 --length 1024
fi

# What a card leaves a process of its 12, 24, 32, 40, 48 or 80 GB, in GiB; `memory.budget_gib` holds the run to it.
held() { bench "recipe-${1//\//-}-$2" train "recipes/$1.yaml" --random-weights --steps 8 --set "memory.budget_gib=$2" "${@:3}"; }
if part recipes; then
  held mixtral-8x7b/qlora-attention-32gb 31
  held mixtral-8x7b/qlora-attention-48gb 39.4
  held mixtral-8x7b/qlora-attention-48gb 44.4
  held mixtral-8x7b/instruct-80gb 79.2
  held mixtral-8x22b/qlora-attention-80gb 79.2
  held qwen3-30b-a3b/qlora-attention-24gb 23.5
  held qwen3-30b-a3b/qlora-attention-80gb 31
  held qwen3-30b-a3b/qlora-attention-80gb 39.4
  held qwen3-30b-a3b/qlora-attention-80gb 79.2
  held olmoe-1b-7b/qlora-attention-12gb 11.6
  held olmoe-1b-7b/qlora-attention-12gb 23.5
fi

"$python" - "$results" <<'END_OF_TABLE'
import json, pathlib, sys

runs = [json.loads(path.read_text()) | {"name": path.stem} for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"))]
train = [run for run in runs if run["bench"] == "train"]
for run in runs[:1]:
    print(run["device"], *(f"{name} {run['packages'][name]}" for name in ("torch", "transformers", "liger-kernel")))
if train:
    columns = ("tokens/s", "bare", "of bare", "roofline", "of it", "peak GiB", "reserved", "estimate")
    print(f"{'':<44}" + "".join(f"{column:>10}" for column in columns))
for run in train:
    peak = run["memory"]["peak"] or {"allocated": 0, "reserved": 0}
    print(
        f"{run['name']:<44}{run['trainer']['tokens_per_second']:>10,.0f}{run['bare']['tokens_per_second']:>10,.0f}"
        f"{run['trainer_over_bare']:>10.1%}{run['roofline_tokens_per_second'] or 0:>10,.0f}"
        f"{run['trainer_over_roofline'] or 0:>10.1%}{peak['allocated'] / 2**30:>10.1f}{peak['reserved'] / 2**30:>10.1f}"
        f"{run['memory']['estimate_error_percent'] or 0:>+9.1f}%"
    )
for run in (run for run in runs if run["bench"] == "peers"):
    for peer in run["peers"]:
        name = f"peer {peer['peer']}"
        if peer["status"] == "measured":
            print(f"{name:<22}{peer['tokens_per_second']:>10,.0f}{(peer['peak_allocated_bytes'] or 0) / 2**30:>60.1f}")
        else:
            print(f"{name:<22}  {peer['status']}")
for run in (run for run in runs if run["bench"] == "router"):
    print(f"watching the routers: {run['capture_share']:+.2%} of a step, {run['capture_peak_bytes'] / 2**20:+.1f} MiB")
for run in (run for run in runs if run["bench"] == "kernels"):
    print(", ".join(f"{k['kernel']} {k['share_of_copy'] or 0:.0%}" for k in run["kernels"]), "of the copy rate")
END_OF_TABLE
exit $status
