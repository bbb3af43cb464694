#!/usr/bin/env bash
# Every test that needs a CUDA device, then ten full-shape training steps a recipe; a short table last. About 6 minutes on
# one 80 GB GPU. RESULTS=FILE keeps the raw JSON lines; STEPS_ONLY=1 leaves the tests out. Uses the python3 on the path
# (PYTHON=... for another), since GPU machines bring their own torch.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

tests=0
if [[ -z ${STEPS_ONLY:-} ]]; then
  "$python" -m pytest tests/gpu -o addopts="-q --strict-markers" -p no:cacheprovider
  tests=$?
fi
for method in qlora-attention freeze-experts; do
  "$python" scripts/full_shape_steps.py "recipes/mixtral-8x7b/$method-80gb.yaml" --batch 2 --length 1024 --steps 10 \
    >"$work/$method.json" || echo "{}" >"$work/$method.json"
done
if [[ -n ${RESULTS:-} ]]; then cat "$work"/*.json >"$RESULTS"; fi
"$python" - "$work" <<'END'
import json, pathlib, sys
import torch
print(torch.cuda.get_device_name(), "torch", torch.__version__)
print(f"{'recipe, 2x1024':<20}{'tokens/s':>10}{'peak GiB':>10}{'census GiB':>12}  losses")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    run = json.loads(path.read_text() or "{}")
    if not run:
        print(f"{path.stem:<20}  failed")
        continue
    losses = " ".join(f"{loss:.3f}" for loss in run["losses"])
    print(f"{path.stem:<20}{run['tokens_per_second']:>10,.0f}{run['peak_device_bytes'] / 2**30:>10.1f}"
          f"{run['census_bytes'] / 2**30:>12.2f}  {losses}")
    print("   " + ", ".join(f"{r['role']} {r['dtype']} {r['bytes'] / 2**30:.2f}" for r in run["census"]))
END
exit $tests
