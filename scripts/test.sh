#!/usr/bin/env bash
# Sets up everything and runs the linter, the types and the tests, each test in the environment of what it tests.
#
#   bash scripts/test.sh                              everything
#   bash scripts/test.sh tests/training -k dpo        the tests below some paths, with pytest's options
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A environment=(
  [contracts]=driver [pipelines]=driver [environments]=driver [docs]=driver
  [embedded]=training [training]=training [annotation]=annotation [generation]=generation
)
order=(contracts environments docs annotation training embedded generation pipelines)

paths=()
while [ $# -gt 0 ] && [[ $1 == tests/* ]]; do
  paths+=("$1")
  shift
done

bash scripts/setup.sh --test
pipeline=.venv/bin/pipeline
$pipeline env sync

# pytest for the stages' environments, which stay as they are: a folder of its own, put last on the path.
tools=${RATCHET_HOME:-$HOME/.cache/ratchet}/test-tools-$(cksum < configs/environments/test.txt | tr ' ' -)
if [ ! -d "$tools" ]; then
  rm -rf "$tools.part"
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --target "$tools.part" \
    -r configs/environments/test.txt
  mv "$tools.part" "$tools"
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
export VLLM_NO_USAGE_STATS=1 PYTHONPATH=$PWD

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
failed=()

check() { # check NAME COMMAND ...
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}

run_tests() { # run_tests NAME PATH ... [-- OPTION ...]
  local name=$1 area=${environment[$1]} python
  shift
  if [ "$area" = driver ]; then
    python=.venv/bin/python
  else
    python=$($pipeline env python "$area")
  fi
  check "tests/$name ($area)" "$python" -c '
import sys
sys.path.append(sys.argv.pop(1))
import pytest
sys.exit(pytest.main(sys.argv[1:]))' "$tools" --junit-xml="$reports/$name.xml" "$@"
}

if [ ${#paths[@]} = 0 ]; then
  check "ruff check" .venv/bin/ruff check .
  check "ruff format" .venv/bin/ruff format --check .
  check "mypy" .venv/bin/mypy
  for name in "${order[@]}"; do
    if [ -d "tests/$name" ]; then
      run_tests "$name" "tests/$name" "$@"
    else
      echo "== tests/$name DOES NOT EXIST: SKIPPED"
    fi
  done
  for directory in tests/*/; do
    name=$(basename "$directory")
    if [ "$name" != __pycache__ ] && [ -z "${environment[$name]:-}" ]; then
      echo "error: scripts/test.sh does not say in which environment $directory runs" >&2
      failed+=("$directory")
    fi
  done
else
  for name in "${order[@]}"; do
    chosen=()
    for path in "${paths[@]}"; do
      if [[ $path/ == tests/$name/* ]]; then
        chosen+=("$path")
      fi
    done
    if [ ${#chosen[@]} -gt 0 ]; then
      run_tests "$name" "${chosen[@]}" "$@"
    fi
  done
fi

# One line for everything: pytest writes the counts of each run into its report.
.venv/bin/python - "$reports" "${failed[@]}" <<'PY'
import sys
from pathlib import Path
from xml.etree import ElementTree

count = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
for report in Path(sys.argv[1]).glob("*.xml"):
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in count:
            count[name] += int(suite.get(name, 0))
bad = count["failures"] + count["errors"]
passed = count["tests"] - bad - count["skipped"]
for name in sys.argv[2:]:
    print(f"FAILED: {name}")
print(f"{passed} passed, {bad} failed, {count['skipped']} skipped")
PY
[ ${#failed[@]} = 0 ]
