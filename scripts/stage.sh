# Sourced by the scripts that run stages. `python -m STAGE` finds Ratchet's code first and your own modules last, even
# if the working directory or PYTHONPATH has modules of the same names. Also sets variables that make stages faster,
# unless you have set them yourself.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export RATCHET_PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}${RATCHET_PYTHONPATH:+:$RATCHET_PYTHONPATH}
export PYTHONPATH=$root PYTHONSAFEPATH=1 PYTHONUTF8=1
unset PYTHONHOME PYTHONOPTIMIZE

run_stage() { # run_stage ENVIRONMENT PACKAGE ARGUMENTS ...
  local environment=$1 package=$2 python=${PYTHON:-}
  shift 2
  if [ "$environment" = annotation ] && ! env | grep -qE '^(MALLOC|GLIBC)_'; then # as pipelines/environments/launch.py does
    export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864
  fi
  [ -n "$python" ] || python=$("$root/.venv/bin/pipeline" env python "$environment") || exit
  exec "$python" -m "$package" "$@"
}
