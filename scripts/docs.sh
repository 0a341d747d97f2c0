#!/usr/bin/env bash
# Builds the documentation site into build/docs/site, out of README.md and docs/. It needs no network to be read.
# Broken links, and pages that the navigation (docs/zensical.toml) does not name, are errors.
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
