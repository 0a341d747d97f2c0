#!/usr/bin/env bash
# Sample K answers per prompt with the current policy, and publish them as rollouts.
#
#   bash scripts/generate.sh policy=models/sft prompts=out/prompts output=out/rollouts k=4 max_new_tokens=256
#   bash scripts/generate.sh --config generation.yaml replicas=4
#   bash scripts/generate.sh --help        every key and its default
#
# Runs in the locked environment; PYTHON names another interpreter.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-$("$root/.venv/bin/pipeline" env python generation)}" -m generation "$@"
