#!/usr/bin/env bash
# Train a model: supervised fine-tuning, a reward model, or direct preference optimisation.
#
#   scripts/train.sh dpo model=models/sft pairs=[out/pairs] reference=[out/reference] output=out/policy
#   scripts/train.sh sft --config sft.yaml processes=2 accelerate_config=configs/accelerate/zero3.yaml
#   scripts/train.sh --help
#
# PYTHON names the interpreter of the training environment (default: python).
set -euo pipefail
exec "${PYTHON:-python}" -m training "$@"
