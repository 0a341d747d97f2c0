#!/usr/bin/env bash
# Sets up everything and runs the linter, the types and the tests, each test in the environment of what it tests.
#
#   bash scripts/test.sh                              everything
#   bash scripts/test.sh tests/training -k dpo        the tests below some paths, with pytest's options
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A environment=(
  [contracts]=driver [pipelines]=driver [environments]=driver [docs]=driver
  [embedded]=training [training]=training [benchmarks]=training [annotation]=annotation [generation]=generation
)
order=(contracts environments docs annotation training embedded generation benchmarks pipelines)

paths=()
while [ $# -gt 0 ] && [[ $1 == tests/* ]]; do
  name=$(cut -d/ -f2 <<< "$1")
  if [ -z "${environment[$name]:-}" ]; then
    echo "error: $1 is in none of the folders $(printf 'tests/%s ' "${order[@]}")" >&2
    exit 2
  fi
  paths+=("$1")
  shift
done
choice=$([ $# = 0 ] && echo all || echo some)

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

run_tests() { # run_tests NAME PATH ... [OPTION ...]
  local name=$1 area=${environment[$1]} python
  shift
  if [ "$area" = driver ]; then
    python=.venv/bin/python
  else
    python=$($pipeline env python "$area")
  fi
  # With a choice of tests (-k), a folder may have none of them; without, it must have some.
  check "tests/$name ($area)" "$python" -c '
import sys
sys.path.append(sys.argv.pop(1))
import pytest
code = pytest.main(sys.argv[2:])
sys.exit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED and sys.argv[1] == "some" else code)
' "$tools" "$choice" --junit-xml="$reports/$name.xml" "$@"
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
  while read -r file; do
    name=$(cut -d/ -f2 <<< "$file")
    if [ -z "${environment[$name]:-}" ]; then
      echo "error: scripts/test.sh does not say in which environment $file runs" >&2
      failed+=("$file")
    fi
  done < <(find tests -name 'test_*.py')
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

# One line for everything: pytest writes the counts of each run into its report. What failed without a failed test
# (a linter, a run that could not start) counts as one.
.venv/bin/python - "$reports" "${failed[@]}" <<'PY'
import sys
from pathlib import Path
from xml.etree import ElementTree

failed = dict.fromkeys(sys.argv[2:], 1)
passed = skipped = 0
for report in Path(sys.argv[1]).glob("*.xml"):
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        tests, failures, errors, skips = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
        passed += tests - failures - errors - skips
        skipped += skips
        for name in failed:
            if name.startswith(f"tests/{report.stem} "):
                failed[name] = max(1, failures + errors)
for name in failed:
    print(f"FAILED: {name}")
print(f"{passed} passed, {sum(failed.values())} failed, {skipped} skipped")
PY
[ ${#failed[@]} = 0 ]
