#!/usr/bin/env bash
# Runs the toy task with several seeds and compares gold reward and well-formed answers by iteration, for one or several
# algorithms.
#
#   bash scripts/seeds.sh [NUMBER OF SEEDS [ITERATIONS [ALGORITHM ...]]]     by default 5 3 dpo; also ppo, grpo, raft
#
# The runs are runs/ALGORITHM-seed-N. Runs with the same seed share the toy task, fine-tuning and reward model: dpo is
# configs/quickstart.yaml, and the others are forks of it.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/pipeline env sync
seeds=${1:-5}
iterations=${2:-3}
algorithms=("${@:3}")
[ ${#algorithms[@]} -gt 0 ] || algorithms=(dpo)

samples=(training.nll_coefficient=0 training.global_batch=64)
declare -A changes=(
  [ppo]="generation.k=2 evaluation.k=4 training.epochs=4 training.learning_rate=4e-4
    experience.kl_target=2 critic.epochs=4 critic.global_batch=64 critic.learning_rate=1e-3 critic.clip=5"
  [grpo]="training.learning_rate=8e-4"
  [raft]="training.learning_rate=4e-4"
)
for algorithm in "${algorithms[@]}"; do
  if [ "$algorithm" != dpo ] && [ -z "${changes[$algorithm]:-}" ]; then
    echo "error: $algorithm is none of dpo ${!changes[*]}" >&2
    exit 2
  fi
done

for seed in $(seq 0 $((seeds - 1))); do
  .venv/bin/pipeline run configs/quickstart.yaml --iters "$iterations" seed="$seed" name="dpo-seed-$seed"
  for algorithm in "${algorithms[@]}"; do
    [ "$algorithm" != dpo ] || continue
    name=$algorithm-seed-$seed
    if [ ! -d "runs/$name" ]; then
      # shellcheck disable=SC2086  # expands to several words
      .venv/bin/pipeline fork "runs/dpo-seed-$seed" --from-iteration 1 --name "$name" \
        training.algorithm="$algorithm" "${samples[@]}" ${changes[$algorithm]}
    fi
    .venv/bin/pipeline run "runs/$name/config.yaml" --iters "$iterations"
  done
done

for algorithm in "${algorithms[@]}"; do
  runs=()
  for seed in $(seq 0 $((seeds - 1))); do runs+=("runs/$algorithm-seed-$seed"); done
  .venv/bin/pipeline compare "${runs[@]}"
  .venv/bin/pipeline compare "${runs[@]}" --metric well_formed_mean
  .venv/bin/pipeline compare "${runs[@]}" --metric kl
done
