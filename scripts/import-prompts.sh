#!/usr/bin/env bash
# Import prompts from a Hub dataset, a save_to_disk directory, JSONL or Parquet, and publish them.
#
#   bash scripts/import-prompts.sh source=hf:ORG/NAME split=train output=out/prompts
#   bash scripts/import-prompts.sh source=prompts.jsonl output=out/prompts
#   bash scripts/import-prompts.sh --help
#
# Runs in the locked environment; PYTHON names another interpreter.
set -euo pipefail
source "$(dirname "$0")/stage.sh"
run_stage annotation contracts prompts "$@"
