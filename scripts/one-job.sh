#!/usr/bin/env bash
# A whole run in one Slurm job on one node, in which stages stay loaded between iterations (docs/cluster.md):
#
#   sbatch --partition=gpu --gpus-per-node=8 --time=1-0 scripts/one-job.sh CONFIG [--iters N] [KEY=VALUE ...]
#
# Two minutes before its time limit, and when it is preempted, the job requeues itself; the run continues after that.
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
pipeline=$(command -v pipeline || echo .venv/bin/pipeline) # the job's working directory is that of sbatch

"$pipeline" run "$@" executor=local &
run=$!
stop() {
    kill -"$1" "$run" 2>/dev/null || true
    wait "$run" || true # finished work is kept
}
requeue() {
    stop USR1
    trap '' TERM # Slurm sends it to all processes of a requeued job, even to scontrol before scontrol has its answer
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1
trap 'stop TERM; exit 143' TERM
wait "$run"
