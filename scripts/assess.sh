#!/usr/bin/env bash
# The experiments on choosing encoder pair and layer of docs/LOG.md, with the embedded encoders: does alignment follow weighted k-NN
# more than the linear probe (SAIL), and does a cheap score predict the ranking after full training?
#   bash scripts/assess.sh PHOTOS LABELLED [OUTPUT]
# PHOTOS: folder with train.jsonl (key, image, captions) and its images; LABELLED: photos in one folder a class (CIFAR-10).
# Sprite scenes come from `make quickstart` (SPRITES, runs/quickstart/data), their labelled pictures are rendered, ten of each of 150
# sprites. LIMIT: pairs of each experiment; CLASSES: labelled photos; STEPS: of a full training. About 40 minutes on one core. Features
# and scores are kept; interrupted, the same command resumes.
# OUTPUT/{photos,sprites}/ get table.csv, assessment.json, heat-*.png and scatter-*.png; docs/assess/ holds those of docs/LOG.md.
set -euo pipefail
photos=$(cd "${1:?give the folder with train.jsonl}" && pwd)
classes=$(cd "${2:?give a folder of labelled photos, one folder a class}" && pwd)
cd "$(dirname "$0")/.."
out=${3:-runs/assess}
sprites=${SPRITES:-runs/quickstart/data}
limit=${LIMIT:-1500}
mkdir -p "$out"

# two captions a photo, so that the slower text encoder takes minutes
python - "$photos/train.jsonl" "$out/photos.jsonl" <<'PY'
import json, sys
from pathlib import Path
rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
Path(sys.argv[2]).write_text("".join(json.dumps({**row, "captions": row["captions"][:2]}) + "\n" for row in rows))
PY

assess() { # name, then flags
  local name=$1; shift
  python align/assess.py --config align/recipes/assess.yaml --output "$out/$name" --rows "$limit" --workers "${WORKERS:-1}" "$@"
}

train() { # name, caption columns: glu heads of a spread of candidates, as in scripts/flickr8k.sh
  local name=$1 pairs="$out/$1/pairs" slots=(); shift
  for column in "$@"; do slots+=("$pairs/minilm/captions-$column"); done
  for candidate in efficientnet-lite0/layer-0{3,5,6} efficientnet-lite1/layer-06 efficientnet-lite2/layer-0{5,6} vit-s14-focus/layer-{01,03,06,08,10,12}; do
    local run="$out/$name/trained/${candidate/\//-}"
    [ -d "$run/last" ] && continue
    python align/train.py --images "$pairs/$candidate" --captions "${slots[@]}" --output "$run" --val-rows $((limit / 4)) --head glu \
      --expansion 2 --width 512 --batch-size 256 --steps "${STEPS:-120}" --val-every 20 --optimizer adamw --reduction sum_over_batch \
      --lr 1e-3 --betas 0.9 0.99 --weight-decay 0.01 | tail -n 1
  done
}

on_photos=(photos --data "$out/photos.jsonl" --image-root "$photos" --captions captions --labelled "$classes" --label-column label --labelled-rows "${CLASSES:-500}")
[ -d "$out/labelled" ] || python align/prepare.py --output "$out/labelled" --train 1 --val 1 --retrieval 1 --per-class 10 --swapped 0 --segmentation 0
on_sprites=(sprites --data "$sprites/train/*.tar" --labelled "$out/labelled/tasks/sprites-seen/test/*.tar" --label-column cls --labelled-rows 1500)
assess "${on_photos[@]}"
train photos captions
assess "${on_photos[@]}" --trained "$out"/photos/trained/* | tee "$out/photos/report.txt"
assess "${on_sprites[@]}"
train sprites short long
assess "${on_sprites[@]}" --trained "$out"/sprites/trained/* | tee "$out/sprites/report.txt"
