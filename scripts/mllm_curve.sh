#!/usr/bin/env bash
# What alignment is worth in an MLLM: answers after stage two on 0 to 3,000 pictures, with an aligned head, a random one and none.
#   bash scripts/mllm_curve.sh [OUT]
# Needs `make quickstart` to have run: its stage one saw 6,000 scenes. Stage two sees n of 3,000 others of all 918 sprites, each with a
# caption (the projector's start) and a conversation, for the same number of steps. Arms:
#   both      aligned head beside the raw patch, stage one's texts, and 3,000 described scenes: names and boxes without pictures
#   trained   the same without the raw patch
#   pictures  as both, without the described scenes
#   random    a random head beside the raw patch
#   none      no head
# Without pictures (n = 0) only both and trained can start. ARMS, PICTURES, SEEDS (lists in quotes) and STEPS choose a part; finished runs
# are skipped. Prints a table, keeps it in OUT/table.md with OUT/curve.png. About 7 minutes a run on two free cores.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/mllm-curve}
two=mllm/recipes/quickstart.yaml
export TOKENIZERS_PARALLELISM=false
mkdir -p "$out"

python align/prepare.py --output "$out/data" --train 8 --val 8 --retrieval 8 --per-class 1 --swapped 0 --segmentation 0 \
  --mllm-pretrain 3000 --mllm-instruct 3000 --mllm-described 3000 --mllm-test 150

for n in ${PICTURES:-0 50 200 1000 3000}; do
  python - "$out/data/mllm/instruct.json" "$out/first-$n.json" "$n" <<'PY'
import json, sys
from pathlib import Path
Path(sys.argv[2]).write_text(json.dumps(json.loads(Path(sys.argv[1]).read_text())[: int(sys.argv[3])]))
PY
  for seed in ${SEEDS:-0 1 2}; do
    for arm in ${ARMS:-both none random trained pictures}; do
      run="$out/$arm-$n-$seed"
      [ -f "$run/done" ] && continue
      texts=()
      pictures=(--captions "$out/data/mllm/pretrain.json" --caption-rows "$n")
      data=("$out/first-$n.json")
      case $arm in
        both | trained)
          texts+=(--described "$out/data/mllm/described.json" --features "$([ "$arm" = both ] && echo both || echo head)")
          data+=("$out/data/mllm/described.json")
          ;;
        random) texts=(--texts --text-columns caption --images None --described --sail-head random) ;;
        none) texts=(--texts --text-columns caption --images None --described --sail-head none) ;;
        pictures) texts+=(--described) ;;
      esac
      if [ "$n" = 0 ]; then
        { [ "$arm" = both ] || [ "$arm" = trained ]; } || continue
        pictures=(--captions)
        data=("$out/data/mllm/described.json")
      fi
      python mllm/upgrade.py --config "$two" "${pictures[@]}" "${texts[@]}" --seed "$seed" --output "$run/init"
      python mllm/finetune.py --config "$two" --stage instruct --data "${data[@]}" --image-root "$out/data/mllm" --seed "$seed" \
        --steps "${STEPS:-130}" --model "$run/init" --output "$run/instruct"
      python eval/lmms.py --mllm "answers=$run/instruct" --tasks sprites_yesno sprites_what sprites_yesno_unseen --data "$out/data/mllm" \
        --batch-size 32 --max-new-tokens 12 --output "$run"
      rm -rf "$run/init" "$run/instruct"/checkpoint-* # what is measured stays in results.json
      touch "$run/done"
    done
  done
done

python - "$out" <<'PY'
import json, statistics, sys
from collections import defaultdict
from pathlib import Path

from align.common.charts import SERIES, new_figure, png, style_axes

METRICS = {"accuracy_exists": "is it there", "exact_match": "what"}
out = Path(sys.argv[1])
found = defaultdict(list)
for done in out.glob("*/done"):
    arm, n, _ = done.parent.name.rsplit("-", 2)
    for entry in json.loads((done.parent / "results.json").read_text())["entries"]:
        if entry["metric"] in METRICS and entry["model"].startswith("MLLM"):
            found[entry["task"], entry["metric"], arm, int(n)].append(100 * entry["value"])
arms = [arm for arm in ("both", "trained", "pictures", "random", "none") if any(key[2] == arm for key in found)]
counts = sorted({key[3] for key in found})
lines = []
panels = sorted({key[:2] for key in found})
figure = new_figure(4.2 * len(panels), 3.2)
for place, panel in enumerate(panels, 1):
    axes = figure.add_subplot(1, len(panels), place)
    style_axes(axes, " ".join(panel))
    lines += [f"| {' '.join(panel)} | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for color, arm in zip(SERIES, arms, strict=False):
        values = [found.get((*panel, arm, n), []) for n in counts]
        cells = [f"{statistics.mean(v):.1f} ({min(v):.0f} to {max(v):.0f}, {len(v)})" if v else "-" for v in values]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        drawn = [(place, v) for place, v in enumerate(values) if v]
        axes.plot([at for at, _ in drawn], [statistics.mean(v) for _, v in drawn], "o-", color=color, label=arm)
        axes.fill_between([at for at, _ in drawn], [min(v) for _, v in drawn], [max(v) for _, v in drawn], color=color, alpha=0.15)
    axes.set_xticks(range(len(counts)), [f"{n:,}" for n in counts])
    axes.set_xlabel("pictures in stage two")
    lines.append("")
axes.legend(frameon=False, fontsize=8)
(out / "table.md").write_text("\n".join(lines))
(out / "curve.png").write_bytes(png(figure))
print("\n".join(lines))
PY
