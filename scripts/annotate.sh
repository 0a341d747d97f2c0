#!/usr/bin/env bash
# Run one stage of `python -m annotation`: scores, pairs, evaluations, or data exchange with RLHFlow.
#
#   bash scripts/annotate.sh score rollouts=DIR kind=reward_model model=DIR output=DIR
#   bash scripts/annotate.sh pairs rollouts=DIR scores=DIR output=DIR
#   bash scripts/annotate.sh evaluate rollouts=DIR scores.reward=DIR output=DIR
#   bash scripts/annotate.sh --help
#
# Runs in the locked environment; PYTHON names another interpreter.
set -euo pipefail
source "$(dirname "$0")/stage.sh"
run_stage annotation annotation "$@"
