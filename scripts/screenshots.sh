#!/usr/bin/env bash
# Takes the screenshots of docs/report.md from the report of a run, with a headless Chromium.
#
#   bash scripts/screenshots.sh runs/quickstart [FOLDER]     FOLDER: docs/images
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:?the directory of a run}
folder=${2:-docs/images}
mkdir -p "$folder"
page=$(mktemp -d)/report.html
trap 'rm -rf "$(dirname "$page")"' EXIT
.venv/bin/pipeline report "$run" --output "$page"
PYTHONPATH=tests/pipelines .venv/bin/python tests/pipelines/screenshots.py "$page" "$folder"
