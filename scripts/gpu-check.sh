#!/usr/bin/env bash
# Checks the training core on one NVIDIA GPU in less than 8 minutes: its numbers in bf16 against fp32, the speed of DPO
# and PPO steps on the largest random Llama that fits (0.5 to 3 billion weights), and TRL's DPOTrainer if installed.
# Needs Python with torch, transformers and accelerate. The results go to benchmarks/results/NAME.json.
#
#   bash scripts/gpu-check.sh [--name NAME] [--model 0.5B|1B|3B] [--no-trl]
#   bash scripts/gpu-check.sh --self-test      on a CPU, with a tiny model
#
# PYTHON names the interpreter; by default that of Ratchet's training environment if it is set up, otherwise python3.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$( (.venv/bin/pipeline env python training || command -v python3) 2> /dev/null | tail -n 1)
fi
export TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m benchmarks.gpu_check "$@"
