#!/usr/bin/env bash
# A whole run within one Slurm job of one node, where its stages stay loaded between iterations (docs/cluster.md):
#
#   sbatch --partition=gpu --gpus-per-node=8 --time=1-0 scripts/one-job.sh CONFIG [--iters N] [KEY=VALUE ...]
#
# Two minutes before its time limit, and where it is preempted, the job goes back to the queue; it continues there.
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
pipeline=$(command -v pipeline || echo .venv/bin/pipeline) # the job starts in the directory that sbatch was called in

"$pipeline" run "$@" executor=local &
run=$!
stop() {
    kill -"$1" "$run" 2>/dev/null || true
    wait "$run" || true # what it has finished is kept
}
requeue() {
    stop USR1
    trap '' TERM # which Slurm sends to all of a requeued job, scontrol too, before scontrol has its answer
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1
trap 'stop TERM; exit 143' TERM
wait "$run"
