#!/usr/bin/env bash
# Does a merged 16-bit folder load in transformers 4, whose Mixtral still has one module an expert, and give the same
# logits? Merges an adapter on the bundled tiny Mixtral, and reads it with transformers 4.57 in an environment of its
# own (outputs/check-transformers4, about 1 GB, made once). Needs the package index the first time. Not in CI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
ensure_venv

out=outputs/check-transformers4
mkdir -p "$out"
if ! "$out/venv/bin/python" -c 'import torch, transformers' 2>/dev/null; then
  python3 -m venv "$out/venv"
  "$out/venv/bin/pip" install --quiet 'transformers==4.57.*' "$(grep '^torch==' constraints.txt)" jinja2
fi

.venv/bin/python scripts/reader_fixture.py "$out/input"
rm -rf "$out/merged"
.venv/bin/finetune merge "$out/input/adapter" --output "$out/merged" --format bf16 --shard-size 4MB
.venv/bin/python scripts/read_merged.py "$out/merged" "$out/transformers5.json"
HF_HUB_OFFLINE=1 "$out/venv/bin/python" scripts/read_merged.py "$out/merged" "$out/transformers4.json"
.venv/bin/python - "$out/transformers5.json" "$out/transformers4.json" <<'PYTHON'
import json, sys

new, old = (json.load(open(path)) for path in sys.argv[1:])
assert old["experts"] == "MixtralSparseMoeBlock" or old["version"].startswith("4."), old["version"]
assert new["prompts"] == old["prompts"], "the tokenizers differ"
worst = max(abs(a - b) for x, y in zip(new["logits"], old["logits"]) for a, b in zip(x, y))
print(f"transformers {new['version']} and {old['version']} ({old['experts']}): same ids, largest difference of a logit {worst:.1e}")
assert worst < 1e-3, worst
PYTHON
