#!/usr/bin/env bash
# Kills a small run again and again, at every point of its work, and compares what it publishes with a run that nothing
# touched. Ends with a table, and with 0 only if no id was lost or repeated and every byte is the same.
#
#   bash scripts/chaos.sh [--kills N] [--seed S] [--keep] [key=value ...]
#
# 200 kills by default, about half an hour on two cores. key=value is set in the runs that are killed: placement.streaming=true,
# or whatever else must not change what is published; what does, like lag=1, is set in the one compared with as well.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/pipeline env sync
exec .venv/bin/python tests/pipelines/chaos.py "$@"
