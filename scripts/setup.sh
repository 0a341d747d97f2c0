#!/usr/bin/env bash
# Creates .venv: the driver's environment, from its lock, and the command .venv/bin/pipeline. Does nothing if it is up
# to date.
#
#   bash scripts/setup.sh [--test]     --test: with the tools of scripts/test.sh
#
# PYTHON names the base interpreter; by default the first usable one of python3.11, 3.12, 3.13, 3.14, python3.
set -euo pipefail
cd "$(dirname "$0")/.."

locks=(configs/environments/driver.txt)
if [ "${1:-}" = --test ]; then
  locks+=(configs/environments/test.txt)
fi
# Once installed, the tools of scripts/test.sh are kept up to date.
mark=.venv/.ratchet
if [ "${#locks[@]}" = 1 ] && grep -q test.txt "$mark" 2>/dev/null; then
  locks+=(configs/environments/test.txt)
fi
wanted="$(pwd) $(cksum pyproject.toml "${locks[@]}")"
if [ "$(cat "$mark" 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
  exit 0
fi

if ! .venv/bin/python -c '' 2>/dev/null; then
  python=
  without_venv=
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        python=$candidate
        break
      fi
      without_venv=$candidate
    fi
  done
  if [ -z "$python" ] && [ -n "$without_venv" ]; then
    echo "error: $without_venv has no venv module. Install it (Debian and Ubuntu: apt install python3-venv)," \
      "or name another Python: PYTHON=/path/to/python bash $0" >&2
    exit 2
  elif [ -z "$python" ]; then
    echo "error: no Python 3.11 or newer was found. Install one," \
      "or say where it is: PYTHON=/path/to/python bash $0" >&2
    exit 2
  fi
  echo "driver: creating .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi

echo "driver: installing into .venv"
rm -f "$mark"
for lock in "${locks[@]}"; do
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r "$lock"
done
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e .
echo "$wanted" > "$mark"
