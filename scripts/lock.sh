#!/usr/bin/env bash
# Resolves configs/environments/*.in (and pyproject.toml for the driver) into lock files with exact versions.
# Versions that are already locked stay; delete a line of a lock, or the whole lock, to update.
#
#   bash scripts/lock.sh
#
# The locks are for Python 3.11 on Linux x86-64. The CPU locks need an index or a find-links folder with torch's CPU
# builds; the GPU locks use only the default index, whose torch is the CUDA build.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
locks=configs/environments
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

# torchvision, torchaudio and torchcodec of the public index are CUDA builds: with a CPU build of torch, importing vLLM
# fails with "operator torchvision::nms does not exist". triton (1 GB) is for GPUs only.
for name in torchvision torchaudio torchcodec triton; do
  echo "$name ; sys_platform == 'none'"
done > "$temporary/cpu-overrides.txt"

compile() { # compile LOCK COMMENT SOURCE [OPTION ...]
  local lock=$locks/$1 comment=$2
  shift 2
  .venv/bin/uv pip compile "$@" --python-version 3.11 --python-platform x86_64-manylinux_2_31 --no-annotate \
    --no-header --no-emit-index-url --quiet --output-file "$lock"
  { printf '# %s\n# Made by scripts/lock.sh; installed with --no-deps.\n' "$comment"
    sed -E '/^#/d; s/^([^ ]+==[^ +]+)\+cpu/\1/' "$lock"; } > "$temporary/lock"
  cp "$temporary/lock" "$lock"
  echo "$lock: $(grep -c == "$lock") packages"
}

gpu="GPU variant: resolved, but never installed by the project's own checks, which run on CPUs."
compile generation-gpu.txt "$gpu" $locks/generation-gpu.in
compile training-gpu.txt "$gpu" $locks/training-gpu.in
compile annotation-gpu.txt "$gpu" $locks/annotation-gpu.in --constraint $locks/training-gpu.txt

eval "$(.venv/bin/python -c '
import os, shlex
from pipelines.environments.package_index import pip_settings, uv_variables
for name, value in uv_variables(pip_settings(), os.environ, "cpu").items():
    print(f"export {name}={shlex.quote(value)}")')"
compile generation-cpu.txt "CPU variant." $locks/generation-cpu.in --override "$temporary/cpu-overrides.txt"
compile training-cpu.txt "CPU variant." $locks/training-cpu.in --override "$temporary/cpu-overrides.txt"
compile annotation-cpu.txt "CPU variant." $locks/annotation-cpu.in --override "$temporary/cpu-overrides.txt" \
  --constraint $locks/training-cpu.txt
compile tracking.txt "The processes that feed trackers." $locks/tracking.in
compile driver.txt "The driver." pyproject.toml
compile docs.txt "The generator of the documentation site (scripts/docs.sh)." $locks/docs.in
compile test.txt "The tools of scripts/test.sh." $locks/test.in --constraint $locks/driver.txt
