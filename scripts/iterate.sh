#!/usr/bin/env bash
# One iteration of online DPO by hand: each stage separately, from files to files. `pipeline run` does this and more.
#
#   bash scripts/iterate.sh PROMPTS POLICY REWARD_MODEL OUTPUT [generation keys ...]
#
# PROMPTS is a JSONL or Parquet file, a dataset directory, or hf:ORG/NAME; OUTPUT/policy is the next policy. After an
# interruption run it again; published artifacts are reused.
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
prompts=$1 policy=$2 reward_model=$3 out=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)

bash "$here/import-prompts.sh" source="$prompts" output="$out/prompts"
bash "$here/generate.sh" policy="$policy" prompts="$out/prompts" output="$out/rollouts" "$@"
bash "$here/annotate.sh" score kind=reward_model model="$reward_model" rollouts="$out/rollouts" output="$out/reward"
bash "$here/annotate.sh" pairs rollouts="$out/rollouts" scores="$out/reward" output="$out/pairs"
bash "$here/annotate.sh" score kind=logprobs name=reference model="$policy" rollouts="$out/rollouts" \
  pairs="$out/pairs" output="$out/reference"
bash "$here/train.sh" policy algorithm=dpo model="$policy" pairs="[$out/pairs]" reference="[$out/reference]" output="$out/policy"
