#!/usr/bin/env bash
# Regularizers with few photos: heads on 500, 1,000 and 3,500 Flickr8k photos, three draws of photos and seeds each.
#   bash scripts/low_data.sh FEATURES_FOLDER [OUTPUT_FOLDER]
# FEATURES_FOLDER holds train/ and dev/ as scripts/flickr8k.sh leaves them in runs/flickr8k/features/lite0-minilm. Settings are those of
# align/recipes/flickr8k.yaml. All variants of a seed see the same photos, batches and initial weights, so gains are paired.
# HEADS, PHOTOS, SEEDS and VARIANTS (lists in quotes, VARIANTS with ";" between) choose a part; STEPS, WIDTH, BATCH and LR
# another setting. Measured: the best validation (500 photos, every 20 steps) of each run, mean of R@1/5/10 both ways; dropout is
# --feature-dropout. Finished runs are skipped; the table is printed and kept in OUTPUT_FOLDER/table.txt.
# A linear run takes about 15 s of one free core, a glu run about ten times that.
# RECIPES="few_photos;few_photos --start random;sail_l_gte" compares recipes of align/recipes (with flags) instead, and gains are over the
# last of them. A recipe that counts epochs gets the steps that CPU_SECONDS (60) pay for, by one step that is timed first.
set -euo pipefail
features=$(cd "${1:?give the folder with train/ and dev/ feature stores}" && pwd)
cd "$(dirname "$0")/.."
out=${2:-runs/low_data}
mkdir -p "$out"

python - "$features" "$out" <<'PY'
import functools, json, os, sys, time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
import numpy as np
import pyarrow as pa
import torch
from align.runtime.commandline import parse
from align.training.config import TrainConfig
from align.runtime.runs import JsonLines
from align.common.seeds import generator
from align.training.data import build_model, from_stores
from align.training.pairs import BatchOrder
from align.training.step import Objective, Schedule, Stepper, build_optimizer, validate

VARIANTS = {
    "baseline": [],
    "one positive": ["--captions", "captions"],
    "five positives": ["--captions", *["captions"] * 5],
    "dropout 0.1": ["--feature-dropout", "0.1"],
    "dropout 0.3": ["--feature-dropout", "0.3"],
    "dropout 0.5": ["--feature-dropout", "0.5"],
}
features, out = Path(sys.argv[1]), Path(sys.argv[2])
chosen = lambda name, default: os.environ.get(name, default).split()
recipes = [recipe.strip() for recipe in os.environ.get("RECIPES", "").split(";") if recipe.strip()]
heads, photos = ["recipe"] if recipes else chosen("HEADS", "linear glu"), [int(n) for n in chosen("PHOTOS", "500 1000 3500")]
seeds = [int(n) for n in chosen("SEEDS", "0 1 2")]
defaults = {"cpu_seconds": 60.0} if recipes else {"steps": 120, "width": 512, "batch": 512, "lr": 1e-3}
setting = {name: type(default)(os.environ.get(name.upper(), default)) for name, default in defaults.items()}
variants = recipes or os.environ.get("VARIANTS", ";".join(VARIANTS)).split(";")
baseline = recipes[-1] if recipes else "baseline"
results = JsonLines(out / "results.jsonl")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))


def settings(head, count, variant):
    stores = ["--images", str(features / "train/images"), "--captions", "captions", "captions"]
    stores += ["--val-images", str(features / "dev/images"), "--val-captions", str(features / "dev/captions-captions")]
    if recipes:
        name, *more = variant.split()
        flags = ["--config", f"align/recipes/{name}.yaml", *stores, *more]
    else:
        flags = ["--config", "align/recipes/flickr8k.yaml", "--head", head, "--expansion", "2" if head == "glu" else "None", *stores]
        flags += ["--feature-dropout", "0", *VARIANTS[variant], "--steps", str(setting["steps"]), "--lr", str(setting["lr"])]
        flags += ["--batch-size", str(setting["batch"]), "--width", str(setting["width"])]
    flags = [str(features / "train/captions-captions") if flag == "captions" else flag for flag in flags]
    config = parse(TrainConfig, "train", flags)
    return config, min(count, config.batch_size)


def opened(config, count, seed):
    data = from_stores(config)
    drawn = generator(seed, 31).permutation(len(data.pairs))[:count]
    data.pairs.only(pa.table({"key": data.pairs.keys(np.sort(drawn))}))
    return data


def prepared(config, data, steps, seed):
    model = build_model(replace(config, seed=seed), data)
    optimizer = build_optimizer(model, config.optimizer, config.lr, config.betas, config.weight_decay)
    objective = Objective(config.loss, config.reduction, config.tile, config.feature_dropout)
    return Stepper(model, optimizer, Schedule(config.lr, steps, config.warmup), objective, seed=seed, precision="fp32")


@functools.cache
def paid_steps(count, variant):
    config, batch = settings("recipe", count, variant)
    data = opened(config, count, 0)
    stepper, begin = prepared(config, data, 1, 0), time.process_time()
    stepper.step(data.pairs.batch(np.arange(batch), 0, 0), 0)
    return max(1, round(setting["cpu_seconds"] / (time.process_time() - begin)))


def best(head, count, seed, variant):
    config, batch = settings(head, count, variant)
    steps = config.steps or paid_steps(count, variant)
    data, begin = opened(config, count, seed), time.process_time()
    stepper, order = prepared(config, data, steps, seed), BatchOrder(count, batch, seed)
    used, every, held_out = time.process_time() - begin, max(1, min(20, steps // 5)), data.held_out.everything(500)
    found = [{"at": 0, **validate(stepper.model, *held_out, "fp32")}]
    begin = time.process_time()
    for step, rows in enumerate(data.pairs.batches(order, range(steps), slice(None))):
        last = stepper.step(rows, step)
        if (step + 1) % every == 0 or step + 1 == steps:
            used += time.process_time() - begin  # of model and steps; validation is not counted
            found.append({"at": step + 1, **validate(stepper.model, *held_out, "fp32")})
            begin = time.process_time()
    facts = {"final_mean_recall": found[-1]["val_mean_recall"], "start_mean_recall": found[0]["val_mean_recall"], "loss": last.loss}
    return {**max(found, key=lambda row: row["val_mean_recall"]), **facts, "taken": steps, "cpu": round(used, 1)}


lines = (out / "results.jsonl").read_text().splitlines() if results.path.exists() else []
rows = [row for row in map(json.loads, lines) if all(row.get(name) == value for name, value in setting.items())]
done = {(row["head"], row["photos"], row["seed"], row["variant"]): row for row in rows}
for seed in seeds:  # a seed of everything first: what is stopped early still compares
    for head in heads:
        for count in photos:
            for variant in variants:
                if (head, count, seed, variant) in done:
                    continue
                begin = time.monotonic()
                row = {"head": head, "photos": count, "seed": seed, "variant": variant, **setting, **best(head, count, seed, variant)}
                results.append({**row, "seconds": round(time.monotonic() - begin, 1)})
                done[head, count, seed, variant] = row
                print(f"{head}, {count} photos, seed {seed}, {variant}: {row['val_mean_recall']:.1%} at step {row['at']} of {row['taken']}", flush=True)

table = ["| head | variant | " + " | ".join(f"{n} photos" for n in photos) + " |", "|---|---|" + "---|" * len(photos)]
recall = {key: 100 * row["val_mean_recall"] for key, row in done.items()}
spread = lambda values: f"({np.std(values, ddof=1):.1f})" if len(values) > 1 else "(one seed)"
for head in heads:
    for variant in recipes or VARIANTS:
        cells, runs = [], defaultdict(list)
        for (h, n, seed, v), value in recall.items():
            if (h, v) == (head, variant):
                runs[n].append((value, value - recall.get((head, n, seed, baseline), float("nan"))))
        for n in photos:
            values, gains = zip(*runs[n], strict=True) if runs[n] else ((), ())
            cells.append(f"{np.mean(values):.1f} {spread(values)}, {np.mean(gains):+.1f} {spread(gains)}" if values else "")
            cost = [(row["taken"], row["cpu"]) for (h, c, _, v), row in done.items() if recipes and (h, c, v) == (head, n, variant)]
            cells[-1] += f", {cost[0][0]} steps, {np.mean([cpu for _, cpu in cost]):.0f} CPU s" if cost else ""
        if any(cells):
            table.append(f"| {head} | {variant} | " + " | ".join(cells) + " |")
(out / "table.txt").write_text("\n".join(table) + "\n")
print("\n".join(table))
PY
