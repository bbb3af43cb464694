#!/usr/bin/env bash
# Does llama.cpp read a GGUF merge as transformers reads the 16-bit one? Builds llama-cpp-python from the package index
# (cmake comes with the build; 8 minutes on two cores) in an environment of its own (outputs/check-gguf, made once),
# merges an adapter on the bundled tiny Mixtral to fp16 and to GGUF in f16, q8_0 and q4_k_m, and compares ids and greedy
# tokens; f16 must agree in all of them. Not in CI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
ensure_venv

out=outputs/check-gguf
mkdir -p "$out"
if ! "$out/venv/bin/python" -c 'import llama_cpp' 2>/dev/null; then
  python3 -m venv "$out/venv"
  CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF" "$out/venv/bin/pip" install --quiet 'llama-cpp-python==0.3.36'
fi

.venv/bin/python scripts/reader_fixture.py "$out/input"
rm -rf "$out/fp16"
.venv/bin/finetune merge "$out/input/adapter" --output "$out/fp16" --format fp16
.venv/bin/python scripts/read_merged.py "$out/fp16" "$out/transformers.json"
packages=$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for type in f16 q8_0 q4_k_m; do
  rm -rf "$out/$type"
  # The quantizer for small types is llama_cpp's, which this toolkit's own environment does not have.
  .venv/bin/python -c 'import sys; sys.path.append(sys.argv.pop(1)); from finetune.cli import main; main()' "$packages" \
    merge "$out/input/adapter" --output "$out/$type" --format gguf --gguf-type "$type"
  "$out/venv/bin/python" scripts/read_gguf.py "$out/$type/$type-$type.gguf" "$out/transformers.json"
done
