#!/usr/bin/env bash
# Kills a small run again and again, at every point of its work, and compares its artifacts with those of an undisturbed
# run. Prints a table, and exits with 0 only if no id was lost or repeated and every byte is the same.
#
#   bash scripts/chaos.sh [--kills N] [--seed S] [--keep] [key=value ...]
#
# 200 kills by default, about half an hour on two cores. key=value is set in the runs that are killed, for example
# placement.streaming=true. Keys that change what is published, like lag=1, are also set in the undisturbed run.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/pipeline env sync
exec .venv/bin/python tests/pipelines/chaos.py "$@"
