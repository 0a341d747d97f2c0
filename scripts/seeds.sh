#!/usr/bin/env bash
# The quickstart on several seeds, and the gold reward and the well-formed answers of each by iteration.
#
#   bash scripts/seeds.sh [NUMBER OF SEEDS]      5 by default; seed 0 is runs/quickstart-seed-0
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/pipeline env sync
runs=()
for seed in $(seq 0 $((${1:-5} - 1))); do
  .venv/bin/pipeline run configs/quickstart.yaml --iters 3 seed="$seed" name="quickstart-seed-$seed"
  runs+=("runs/quickstart-seed-$seed")
done
.venv/bin/pipeline compare "${runs[@]}"
.venv/bin/pipeline compare "${runs[@]}" --metric well_formed_mean
