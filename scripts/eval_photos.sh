#!/usr/bin/env bash
# The kit's own heads on real photos in one report: classification (CIFAR-10), retrieval (Flickr8k dev), segmentation (CamVid); docs/LOG.md.
#   bash scripts/eval_photos.sh DATA_FOLDER [OUTPUT_FOLDER] [NAME=MODEL ...]
# DATA_FOLDER holds cifar10/ (a folder of photos a class), flickr8k/dev.jsonl (key, image, captions), camvid/ (images, labels, classes.txt).
# Default models: the linear and glu heads of scripts/flickr8k.sh, and the quickstart's.
set -euo pipefail
data=$(cd "${1:?give the folder with cifar10/, flickr8k/ and camvid/}" && pwd)
cd "$(dirname "$0")/.."
out=${2:-runs/eval-photos}
models=("${@:3}")
[ ${#models[@]} -gt 0 ] || models=(flickr8k-linear=runs/flickr8k/train/linear/0 flickr8k-glu=runs/flickr8k/train/glu/0 quickstart=runs/quickstart/train)
mkdir -p "$out/tasks"
cat > "$out/tasks/cifar10.yaml" <<YAML
id: cifar10-folders
kind: classification
layout: folder
path: cifar10
templates: clip:cifar10
note: 100 photos of each class; the published protocol has 1,000.
YAML
cat > "$out/tasks/flickr8k.yaml" <<YAML
id: flickr8k-dev
kind: retrieval
layout: jsonl
path: flickr8k
data: dev.jsonl
YAML
cat > "$out/tasks/camvid.yaml" <<YAML
id: camvid
kind: segmentation
layout: folder
path: camvid
data: images
labels: labels
classes: classes.txt
ignore: 11
templates: imagenet80
YAML
python eval/run.py --model "${models[@]}" --tasks "$out"/tasks/{cifar10,flickr8k,camvid}.yaml --data-root "$data" --output "$out"
