#!/usr/bin/env bash
# Sets up everything and runs the linters, the type checker and the tests, each test in the environment of the code that
# it tests.
#
#   bash scripts/test.sh                              everything: about 20 minutes on two cores
#   bash scripts/test.sh --fast                       without tests marked slow, cluster or chaos: about three minutes
#   bash scripts/test.sh tests/training -k dpo        the tests under some paths, with pytest's options
#   bash scripts/test.sh --store-durations            everything, and store how long it took in tests/durations.json
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh --test
.venv/bin/pipeline env sync generation annotation training tracking
exec .venv/bin/python scripts/run_tests.py "$@"
