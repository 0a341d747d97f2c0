#!/usr/bin/env bash
# Train a model: supervised fine-tuning, a reward model, or the policy by any algorithm.
#
#   bash scripts/train.sh policy algorithm=dpo model=models/sft pairs=[out/pairs] reference=[out/reference] output=out/policy
#   bash scripts/train.sh sft --config sft.yaml parallel.dp=2 parallel.zero=3
#   bash scripts/train.sh --help
#
# Runs in the locked environment; PYTHON names another interpreter.
set -euo pipefail
source "$(dirname "$0")/stage.sh"
run_stage training training "$@"
