#!/usr/bin/env bash
# Builds the documentation site from README.md and docs/ into build/docs/site. It can be read offline.
# Broken links, and pages missing from the navigation (docs/zensical.toml), are errors.
#
#   bash scripts/docs.sh [FOLDER]     FOLDER: build/docs; the site is in its folder `site`
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/../build/docs}")
cd "$(dirname "$0")/.."
bash scripts/setup.sh
lock=configs/environments/docs.txt
home=${RATCHET_HOME:-$HOME/.cache/ratchet}/docs-$(cksum < "$lock" | tr ' ' -)
if [ ! -e "$home/complete" ]; then
  echo "docs: installing into $home"
  .venv/bin/python -m venv --clear "$home"
  "$home/bin/python" -m pip install -qq --disable-pip-version-check --no-deps -r "$lock"
  touch "$home/complete"
fi
.venv/bin/python scripts/docs/references.py
.venv/bin/python scripts/docs/pages.py "$folder"
rm -rf "$folder/site"
"$home/bin/zensical" build --strict --config-file "$folder/zensical.toml"
echo "docs: open $folder/site/index.html"
