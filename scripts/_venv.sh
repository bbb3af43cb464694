# Sourced by the set-up commands: `ensure_venv` makes .venv beside this checkout and installs into it.
#
# Idempotent and quick the second time: pip runs only if pyproject.toml, constraints.txt or the interpreter changed
# since the last finished installation, which leaves their checksum in .venv/.installed. Nothing has to be activated.
# PYTHON=/path/to/python3 chooses the interpreter that makes the environment.

ensure_venv() {
  local root python version stamp wanted
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  python=${PYTHON:-python3}
  stamp=$root/.venv/.installed

  if [[ ! -x $root/.venv/bin/python || ! -x $root/.venv/bin/pip ]]; then
    if ! command -v "$python" >/dev/null; then
      echo "error: there is no $python; install Python 3.11 or newer, or set PYTHON=/path/to/python3" >&2
      return 2
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "error: $python is Python $version, and 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2
      return 2
    fi
    echo "making .venv with Python $version"
    if ! "$python" -m venv "$root/.venv"; then
      echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
      return 2
    fi
  fi

  wanted=$(cd "$root" && { "$root/.venv/bin/python" -VV; cat pyproject.toml constraints.txt; } | sha256sum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    echo "using .venv (installed, nothing changed)"
    return 0
  fi
  rm -f "$stamp"
  if ! "$root/.venv/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    echo "installing torch (the largest part; only the first time)"
    "$root/.venv/bin/python" -m pip install "$(grep '^torch==' "$root/constraints.txt")" \
      -c "$root/constraints.txt" || return
  fi
  echo "installing moe-qlora and what it needs, as pinned in constraints.txt"
  "$root/.venv/bin/python" -m pip install --quiet -e "$root[test]" -c "$root/constraints.txt" || return
  echo "$wanted" >"$stamp"
}
