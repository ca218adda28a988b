#!/usr/bin/env bash
# The real-photo trial of docs/LOG.md: Flickr8k-style photos (train.jsonl, dev.jsonl with five captions each), embedded encoders.
#   bash scripts/flickr8k.sh DATA_FOLDER [OUTPUT_FOLDER]
# 1. ablation of head, loss and positives on all photos (EfficientNet-Lite0 + MiniLM), three seeds each
# 2. encoder pairs and layers on the first 1,500 photos and two captions each (SMALL_SEEDS, one by default)
# Finished runs are skipped. The tables are printed at the end and kept in OUTPUT_FOLDER/table.txt.
set -euo pipefail
data=$(cd "${1:?give the folder with train.jsonl and dev.jsonl}" && pwd)
cd "$(dirname "$0")/.."
out=${2:-runs/flickr8k}
recipe=align/recipes/flickr8k.yaml
mkdir -p "$out"
seeds="0 1 2"

encode() { # split output vision|- layer text|-
  local flags=(--config "$recipe" --data "$1" --output "$2" --image-root "$data" --batch-size 16)
  if [ "$3" = - ]; then flags+=(--vision None); else flags+=(--vision "$3" --layer "$4"); fi
  if [ "$5" = - ]; then flags+=(--text None --captions); else flags+=(--text "$5"); fi
  python align/encode.py "${flags[@]}"
}
train() { # name images captions... then flags after --
  local name=$1 images=$2 texts=$3; shift 3
  for seed in $seeds; do
    [ -d "$out/train/$name/$seed/last" ] && continue
    python align/train.py --config "$recipe" --images "$out/features/$images/train/images" --val-images "$out/features/$images/dev/images" \
      --captions "$out/features/$texts/train/captions-captions" "$out/features/$texts/train/captions-captions" \
      --val-captions "$out/features/$texts/dev/captions-captions" --output "$out/train/$name/$seed" --seed "$seed" "$@" | tail -n 2
  done
}

for split in train dev; do
  encode "$data/$split.jsonl" "$out/features/lite0-minilm/$split" embedded:efficientnet-lite0 -1 embedded:minilm
done
one=("--captions" "$out/features/lite0-minilm/train/captions-captions")
train linear lite0-minilm lite0-minilm --head linear --expansion None
train mlp lite0-minilm lite0-minilm --head mlp
train glu lite0-minilm lite0-minilm
train glu-infonce lite0-minilm lite0-minilm --loss infonce
train glu-one-positive lite0-minilm lite0-minilm "${one[@]}"

# the small set: fewer photos and captions, so that the slow encoders take minutes
python - "$data" "$out" <<'PY'
import json, sys
from pathlib import Path
for split, count in (("train", 1500), ("dev", 500)):
    rows = [json.loads(line) for line in Path(sys.argv[1], f"{split}.jsonl").read_text().splitlines()[:count]]
    text = "".join(json.dumps({**row, "captions": row["captions"][:2]}) + "\n" for row in rows)
    Path(sys.argv[2], f"small-{split}.jsonl").write_text(text)
PY
for split in train dev; do
  encode "$out/small-$split.jsonl" "$out/features/small-lite0/$split" embedded:efficientnet-lite0 -1 embedded:minilm
  encode "$out/small-$split.jsonl" "$out/features/small-vit9/$split" embedded:vit-s14-focus 9 -
  encode "$out/small-$split.jsonl" "$out/features/small-vit12/$split" embedded:vit-s14-focus 12 -
  encode "$out/small-$split.jsonl" "$out/features/small-mpnet/$split" - -1 embedded:mpnet
done
seeds=${SMALL_SEEDS:-0}
for images in lite0 vit9 vit12; do
  for texts in lite0 mpnet; do
    train "small-$images-${texts/lite0/minilm}" "small-$images" "small-$texts"
  done
done

python - "$out" <<'PY' | tee "$out/table.txt"
import json, statistics, sys
from pathlib import Path
print("best validation step of each run, mean of seeds (standard deviation), percent")
print(f"{'run':22} {'I2T R@1':>12} {'I2T R@10':>12} {'T2I R@1':>12} {'T2I R@10':>12} {'mean recall':>12}  seeds")
for run in sorted(Path(sys.argv[1], "train").iterdir()):
    best = []
    for metrics in sorted(run.glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        best.append(max((row for row in rows if "val_mean_recall" in row), key=lambda row: row["val_mean_recall"]))
    cells = []
    for name in ("val_i2t_r1", "val_i2t_r10", "val_t2i_r1", "val_t2i_r10", "val_mean_recall"):
        values = [100 * row[name] for row in best]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):6.1f} ({spread:.1f})")
    print(f"{run.name:22} " + " ".join(f"{cell:>12}" for cell in cells) + f"  {len(best)}")
PY
