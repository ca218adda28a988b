#!/usr/bin/env bash
# The quickstart's MLLM with its controls: trained, random and no head, three seeds each, in one table (about 10 minutes a run on
# two CPU cores). Needs `make quickstart` to have run.   Usage: bash scripts/mllm_controls.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=mllm/recipes/quickstart.yaml
out="${1:-runs/controls}"

export TOKENIZERS_PARALLELISM=false

models=()
for seed in ${SEEDS:-0 1 2}; do
  for head in ${HEADS:-trained random none}; do
    run="$out/$head-$seed"
    texts=()
    data=(runs/quickstart/data/mllm/{instruct,described}.json)
    if [ "$head" != trained ]; then # texts reach images only through a trained head
      texts=(--texts --text-columns caption --images None --described)
      data=(runs/quickstart/data/mllm/instruct.json)
    fi
    python mllm/upgrade.py --config "$recipe" --sail-head "$head" "${texts[@]}" --seed "$seed" --output "$run/init"
    python mllm/finetune.py --config "$recipe" --stage instruct --data "${data[@]}" --seed "$seed" --model "$run/init" --output "$run/instruct"
    models+=("$head-$seed=$run/instruct")
  done
done
python eval/lmms.py --config "$recipe" --mllm "${models[@]}" --output "$out"
