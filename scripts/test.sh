#!/usr/bin/env bash
# Sets up everything and runs the linters, the types and the tests, each test in the environment of what it tests.
#
#   bash scripts/test.sh                              everything: half an hour on two cores
#   bash scripts/test.sh --fast                       without what is marked slow, cluster or chaos: about three minutes
#   bash scripts/test.sh tests/training -k dpo        the tests below some paths, with pytest's options
#   bash scripts/test.sh --store-durations            everything, and note in tests/durations.json how long it took
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh --test
.venv/bin/pipeline env sync generation annotation training tracking
exec .venv/bin/python scripts/run_tests.py "$@"
