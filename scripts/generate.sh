#!/usr/bin/env bash
# Sample K answers per prompt with the current policy, and publish them as rollouts.
#
#   scripts/generate.sh policy=models/sft prompts=runs/demo/prompts output=runs/demo/rollouts k=4 max_new_tokens=256
#   scripts/generate.sh --config generation.yaml replicas=4
#   scripts/generate.sh --help        every key and its default
#
# PYTHON names the interpreter of the generation environment; by default the one on the PATH.
set -euo pipefail

exec "${PYTHON:-python}" -m generation "$@"
