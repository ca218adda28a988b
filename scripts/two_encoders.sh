#!/usr/bin/env bash
# Two encoders in one MLLM: the quickstart's aligned EfficientNet-Lite0, and a ViT-S/14 (layer 9, no head) beside it, joined by channel and
# in sequence, next to the aligned one alone; same captions, conversations and steps. Each model is exported, asked in a fresh process, and
# measured through lmms-eval. Needs `make quickstart` to have run, or its data and stage-one run in DATA and SAIL. About 8 minutes a model
# on two CPU cores.   Usage: bash scripts/two_encoders.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-runs/two-encoders}"
data="${DATA:-runs/quickstart/data}"
sail="${SAIL:-runs/quickstart/train}"
texts="${TEXTS:-$data/train/*.tar}"
recipe=mllm/recipes/quickstart.yaml
export TOKENIZERS_PARALLELISM=false

mkdir -p "$out"
python - "$data/mllm/open.parquet" "$out/test.png" <<'PY'
import sys

import pyarrow.parquet as pq

image = pq.read_table(sys.argv[1], columns=["image"])["image"][0].as_py()
open(sys.argv[2], "wb").write(image["bytes"] if isinstance(image, dict) else image)
PY

models=()
for way in ${WAYS:-alone channel sequence}; do
  beside=(--vision embedded:vit-s14-focus --layer 9 --join "$way")
  [ "$way" != alone ] || beside=()
  python mllm/upgrade.py --config "$recipe" --sail "$sail" "${beside[@]}" --captions "$data/mllm/pretrain.json" --texts "$texts" \
    --images "$texts" --described --output "$out/$way-init"
  python mllm/finetune.py --config "$recipe" --stage instruct --model "$out/$way-init" --data "$data/mllm/instruct.json" \
    --steps "${STEPS:-105}" --output "$out/$way"
  for prompt in "what is in the picture?" "how many things are in the picture?"; do
    python mllm/chat_cli.py --model "$out/$way/model" --image "$out/test.png" --prompt "$prompt" --max-new-tokens 24
  done
  models+=("$way=$out/$way")
done
python eval/lmms.py --config "$recipe" --mllm "${models[@]}" --data "$data/mllm" --limit "${LIMIT:-200}" --output "$out/eval" \
  --tasks sprites_yesno sprites_what sprites_where sprites_count
lmms-eval --model sail_llava --model_args "pretrained=$out/sequence/model" --include_path "$out/eval/lmms/tasks" --tasks sprites_yesno \
  --batch_size 16 --limit 16 --output_path "$out/lmms-eval" --log_samples
