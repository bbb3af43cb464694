#!/usr/bin/env bash
# `finetune evaluate --tasks` with lm-evaluation-harness itself, which it installs: 35 packages, 370 MB, 35 s on two
# cores, and therefore not part of scripts/test.sh. Needs no network once installed. Arguments go to pytest:
# scripts/test_harness.sh -k chat
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
ensure_venv

if ! .venv/bin/python -c 'from importlib.util import find_spec; exit(find_spec("lm_eval") is None)'; then
  .venv/bin/python -m pip install --quiet -e '.[harness]' -c constraints.txt
fi

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec .venv/bin/python -m pytest -o addopts="-q --strict-markers" tests/harness "$@"
