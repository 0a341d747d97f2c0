#!/usr/bin/env bash
# Sample K answers per prompt with the current policy, and publish them as rollouts.
#
#   bash scripts/generate.sh policy=models/sft prompts=out/prompts output=out/rollouts k=4 max_new_tokens=256
#   bash scripts/generate.sh --config generation.yaml replicas=4
#   bash scripts/generate.sh --help        every key and its default
#
# Runs in the locked environment; PYTHON names another interpreter.
set -euo pipefail
source "$(dirname "$0")/stage.sh"
run_stage generation generation "$@"
