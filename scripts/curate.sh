#!/usr/bin/env bash
# Curated pairs against the same number of random ones, on sprite scenes whose sprites are long-tailed (Zipf).
#   bash scripts/curate.sh [OUTPUT_FOLDER]
# 3,000 candidate scenes of one or two of 60 sprites, the sprite of rank r drawn in proportion to 1/r. 600 of them are chosen by
# align/curate.py (10 a concept) or at random; `alike` is random with as many scenes of a single sprite as the curated ones have, since
# captions that name one thing score best and the test shows one sprite a picture; `all` takes as many steps on all 3,000 (linear heads only).
# Embedded encoders, two kinds of heads, three seeds.
# Measured: zero-shot accuracy among the 60 sprites, eight new pictures each, by how frequent the sprite is among the candidates.
# The concepts are the names of the sprites, that is, the classes of this test. The table is printed and kept in
# OUTPUT_FOLDER/table.txt; finished runs are skipped. About ten minutes on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/curate}
mkdir -p "$out"
export TOKENIZERS_PARALLELISM=false

[ -f "$out/test.jsonl" ] || python - "$out" <<'PY'
import json, sys
from pathlib import Path
from align.embedded.assets import fetch
from align.common.seeds import generator
from align.demo.scenes import SpriteScenes, read_sprites

out, folder = Path(sys.argv[1]), fetch("embedded:twemoji")
sprites, taken = [], set()
every = read_sprites(folder)
for place in generator(0, 1).permutation(len(every)):
    if every[place].name not in taken and len(sprites) < 60:
        sprites.append(every[place])
        taken.add(every[place].name)
tail = [sprite for rank, sprite in enumerate(sprites, 1) for _ in range(round(600 / rank))]  # drawn with equal chance: Zipf
train = SpriteScenes(folder, 0, 160, tail, max_objects=2)
test = SpriteScenes(folder, 1, 160, sprites, max_objects=1)
for name in ("train", "test"):
    (out / name).mkdir(exist_ok=True)
    rows = []
    for n in range(3000 if name == "train" else 8 * len(sprites)):
        scene = train.scene(n) if name == "train" else test.scene(n, sprites[n // 8])
        key = f"{name}{n:05d}"
        scene.image.save(out / name / f"{key}.jpg", quality=90)
        shown = [placed.sprite.name for placed in scene.objects]
        rows.append({"key": key, "image": f"{name}/{key}.jpg", "short": scene.short, "sprites": shown})
    (out / f"{name}.jsonl.new").write_text("".join(json.dumps(row) + "\n" for row in rows))
(out / "concepts.txt").write_text("".join(f"{sprite.name}\n" for sprite in sprites))  # from frequent to rare
for name in ("train", "test"):
    (out / f"{name}.jsonl.new").rename(out / f"{name}.jsonl")
PY

encode=(--vision embedded:efficientnet-lite0 --image-size 160 --batch-size 32 --workers 0 --shard-rows 500)
python align/encode.py --data "$out/train.jsonl" --output "$out/features" "${encode[@]}" --text embedded:minilm --captions short
python align/encode.py --data "$out/test.jsonl" --output "$out/features-test" "${encode[@]}"
python align/curate.py --candidates "$out/features/captions-short" --concepts "$out/concepts.txt" --templates "a {c}" \
  --top 200 --per-concept 10 --concepts-from-evaluation "the 60 sprites of scripts/curate.sh" --output "$out/curated"

python - "$out" <<'PY'
import json, sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
from align.common.seeds import generator
from align.features.store import FeatureStore

out = Path(sys.argv[1])
keys = FeatureStore(out / "features" / "images").keys.to_pylist()
shown = {row["key"]: len(row["sprites"]) for row in map(json.loads, (out / "train.jsonl").read_text().splitlines())}
curated = pq.read_table(out / "curated" / "chosen.parquet")["key"].to_pylist()
alone = sum(shown[key] == 1 for key in curated)
print(f"{alone} of {len(curated)} curated scenes show a single sprite, of all {sum(number == 1 for number in shown.values())}")
groups = [key for key in keys if shown[key] == 1], [key for key in keys if shown[key] > 1]
for seed in range(3):
    chosen = generator(seed, 2).choice(len(keys), len(curated), replace=False)
    pq.write_table(pa.table({"key": [keys[place] for place in chosen]}), out / f"random-{seed}.parquet")
    sizes = (alone, len(curated) - alone)
    parts = [generator(seed, 3).choice(group, size, replace=False) for group, size in zip(groups, sizes, strict=True)]
    pq.write_table(pa.table({"key": [str(key) for part in parts for key in part]}), out / f"alike-{seed}.parquet")
PY

for head in linear glu; do
  [ $head = glu ] && wide=(--expansion 2) || wide=()
  for seed in 0 1 2; do
    for choice in curated random alike all; do
      [ $head-$choice = glu-all ] && continue
      run="$out/runs/$head-$choice-$seed"
      [ -d "$run/last" ] && continue
      case $choice in
        curated) keys=(--keys "$out/curated/chosen.parquet") ;;
        random | alike) keys=(--keys "$out/$choice-$seed.parquet") ;;
        all) keys=() ;;
      esac
      python align/train.py --images "$out/features/images" --captions "$out/features/captions-short" --output "$run" "${keys[@]}" \
        --head $head "${wide[@]}" --width 256 --batch-size 200 --steps 60 --optimizer adamw --lr 1e-3 --weight-decay 0.01 \
        --reduction sum_over_batch --seed $seed --log-every 30 --save-every 60 | tail -n 1
    done
  done
done

python - "$out" <<'PY' | tee "$out/table.txt"
import json, statistics, sys
from collections import Counter
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq
import torch
from align.model.dual_encoder import SailModel
from align.features.store import FeatureStore

out = Path(sys.argv[1])
names = (out / "concepts.txt").read_text().splitlines()
number = {name: place for place, name in enumerate(names)}
shown = {row["key"]: row["sprites"] for row in map(json.loads, (out / "train.jsonl").read_text().splitlines())}
labels = {row["key"]: number[row["sprites"][0]] for row in map(json.loads, (out / "test.jsonl").read_text().splitlines())}
store = FeatureStore(out / "features-test" / "images")
truth = np.array([labels[key] for key in store.keys.to_pylist()])
features = torch.from_numpy(store.all_features()).float()
templates = ("a picture of a {c}", "an image of a {c}", "a {c}", "{c}")
groups = {"frequent": range(20), "medium": range(20, 40), "rare": range(40, 60), "all sprites": range(60)}
encoder, embedded = None, None


def cell(values):
    return f"{statistics.mean(values):.1f} ({statistics.stdev(values):.1f})"


print("| head | pairs | pictures a sprite: frequent, medium, rare | " + " | ".join(f"{group}, top-1 %" for group in groups) + " |")
print("|---|---|---|" + "---|" * len(groups))
for head in ("linear", "glu"):
    for choice in ("random", "alike", "curated", *(["all"] if head == "linear" else [])):
        accuracy, pictures = {group: [] for group in groups}, {group: [] for group in groups}
        for seed in range(3):
            model = SailModel.from_pretrained(out / "runs" / f"{head}-{choice}-{seed}" / "last")
            encoder = encoder or model.text_encoder
            with torch.no_grad():
                if embedded is None:
                    embedded = {template: encoder.encode([template.replace("{c}", name) for name in names], 64) for template in templates}
                aligned = torch.stack([model.project_text(embedded[template]) for template in templates]).mean(0)
                scores = model.project_image(features) @ torch.nn.functional.normalize(aligned, dim=1).T
            right = scores.argmax(1).numpy() == truth
            file = {"curated": "curated/chosen.parquet", "all": None}.get(choice, f"{choice}-{seed}.parquet")
            keys = pq.read_table(out / file)["key"].to_pylist() if file else list(shown)
            seen = Counter(name for key in keys for name in shown[key])
            for group, members in groups.items():
                accuracy[group].append(100 * right[np.isin(truth, list(members))].mean())
                pictures[group].append(statistics.mean(seen[names[member]] for member in members))
        counts = ", ".join(f"{statistics.mean(pictures[group]):.1f}" for group in list(groups)[:3])
        print(f"| {head} | {choice}, {len(keys):,} | {counts} | " + " | ".join(cell(accuracy[group]) for group in groups) + " |")
PY
