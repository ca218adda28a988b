#!/usr/bin/env bash
# Encode, train, evaluate and report on the embedded default, then the same encoder in an MLLM, beside a control whose encoder is not
# aligned (the same captions, conversations and steps). `make quickstart` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=align/recipes/quickstart.yaml

export TOKENIZERS_PARALLELISM=false

python align/prepare.py --config "$recipe"
python align/encode.py --config "$recipe"
python align/train.py --config "$recipe"
python eval/run.py --config "$recipe"

mllm=mllm/recipes/quickstart.yaml
control=runs/quickstart/mllm/no-head
pictures=runs/quickstart/data/mllm/instruct.json
python mllm/upgrade.py --config "$mllm"
python mllm/finetune.py --config "$mllm" --stage instruct
python mllm/upgrade.py --config "$mllm" --sail-head none --texts --text-columns caption --images None --described --output "$control-init"
python mllm/finetune.py --config "$mllm" --stage instruct --data "$pictures" --model "$control-init" --output "$control-instruct"
python eval/lmms.py --config "$mllm"

cat <<TEXT

Next:
  your encoder   accelerate launch align/encode.py --vision facebook/dinov2-base --text sentence-transformers/all-MiniLM-L6-v2 \\
                   --data 'my/shards/*.tar' --captions txt --output features/mine
  your data      a folder, webdataset tars, parquet, CSV or JSONL: docs/data.md
  8 GPUs         accelerate launch --multi_gpu --num_processes 8 align/train.py --config align/recipes/sail_l_gte.yaml
TEXT
