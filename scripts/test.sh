#!/usr/bin/env bash
# The tests: lint, format, types, then pytest, whose closing line comes last. Needs no GPU and no network once installed.
# Arguments go to pytest: scripts/test.sh tests/test_train.py -n 0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
ensure_venv

# One thread a process: the tiny models gain nothing from more, and two workers share the cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline

echo "== ruff check"
.venv/bin/ruff check
echo "== ruff format --check"
.venv/bin/ruff format --check
echo "== mypy"
.venv/bin/mypy
echo "== pytest"
# A file stays on one worker, so what its tests share is made once.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
