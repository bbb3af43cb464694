#!/usr/bin/env bash
# The pages in a real browser: Debian's chromium, driven by playwright from .venv, and gradio for the chat page. Installs
# what is missing, chromium by apt-get (as root, or by sudo). Arguments go to pytest:
# scripts/test_browser.sh --screenshots outputs/pages
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
ensure_venv

if ! command -v chromium >/dev/null; then
  if ! command -v apt-get >/dev/null; then
    echo "error: there is no chromium, and no apt-get to install it; put a chromium on the path" >&2
    exit 2
  fi
  as_root=()
  if [[ $(id -u) != 0 ]]; then as_root=(sudo); fi
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    chromium fonts-noto-color-emoji
fi
if ! .venv/bin/python -c 'from importlib.util import find_spec as f; exit(not (f("playwright") and f("gradio")))'; then
  .venv/bin/python -m pip install --quiet -e '.[browser,ui]' -c constraints.txt
fi

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest -n 0 -o addopts="-q --strict-markers" tests/browser "$@"
