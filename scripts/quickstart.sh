#!/usr/bin/env bash
# From a fresh clone to an improved language model: sets up, then runs (or continues) runs/quickstart.
#
#   bash scripts/quickstart.sh [key=value ...]     for example seed=1 name=quickstart-1
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/pipeline env sync
exec .venv/bin/pipeline run configs/quickstart.yaml --iters 3 "$@"
