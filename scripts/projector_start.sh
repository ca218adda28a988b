#!/usr/bin/env bash
# The table of docs/LOG.md, "A projector from texts alone, captions, or both": naming by the nearest words, before any LLM training.
# Stage one on 6,000 scenes, then the closed-form projector into SmolLM2's word space from 0 to 3,000 captioned images, for no head, the
# trained head, and both side by side. About 12 minutes on two CPU cores.   Usage: bash scripts/projector_start.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/projector-start}
recipe=align/recipes/quickstart.yaml
export TOKENIZERS_PARALLELISM=false

python align/prepare.py --output "$out/data" --train 6000 --val 300 --retrieval 100 --per-class 2 --swapped 0 --segmentation 0 \
  --mllm-pretrain 3000
python align/encode.py --config "$recipe" --data "$out/data/train/*.tar" --output "$out/features"
python align/train.py --config "$recipe" --images "$out/features/images" --steps 180 --val-every 60 --output "$out/train" \
  --captions "$out/features/captions-short" "$out/features/captions-long"

SEEDS="${SEEDS:-0 1}" python - "$out" <<'PY'
import io, json, os, sys, tarfile
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d, layer_norm, normalize

from align.runtime.commandline import set_up
from align.model.dual_encoder import SailModel
from align.model.saving import model_folder
from mllm.assembly.language import load_llm
from align.model.word_map import Fitting, Moments
from align.model.words import Words
from mllm.assembly.texts import Texts, TextSide
from mllm.assembly.warmstart import SHARPNESS

set_up()
out = Path(sys.argv[1])
sail = SailModel.from_pretrained(model_folder(out / "train")).eval()
language = load_llm("embedded:smollm2-135m", None, None)
table = language.base.get_input_embeddings().weight.detach()
normed = lambda x: layer_norm(x, x.shape[-1:])


@torch.inference_mode()
def blocks(images):
    """Return [head (n, 16, E), raw (n, 16, D)]: the 4 x 4 visual tokens as the projector's two blocks are given them."""
    found = [[], []]
    for start in range(0, len(images), 32):
        patches = sail.vision_encoder.dense(torch.stack([sail.vision_encoder.transform(image) for image in images[start : start + 32]]))
        for place, tokens in enumerate((sail.vision_head(patches), patches)):
            pooled = adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(2, sail.vision_encoder.patch_grid), (4, 4))
            found[place].append(normed(pooled.flatten(2).transpose(1, 2)))
    return [torch.cat(each).clone() for each in found]


def pictures(part):
    """Return (images, class numbers, names) of a classification task."""
    folder = out / "data/tasks" / f"sprites-{part}"
    with tarfile.open(folder / "test/0.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    keys = sorted(name[:-4] for name in files if name.endswith(".cls"))
    images = [Image.open(io.BytesIO(next(files[n] for n in files if n.startswith(f"{key}.") and not n.endswith(".cls")))) for key in keys]
    names = (folder / "classnames.txt").read_text().splitlines()
    return [image.convert("RGB") for image in images], torch.tensor([int(files[f"{key}.cls"]) for key in keys]), names


rows = json.loads((out / "data/mllm/pretrain.json").read_text())
scenes = blocks([Image.open(out / "data/mllm" / row["image"]).convert("RGB") for row in rows])
reader = Words(language.tokenizer, len(table))
captions = reader.ids([row["conversations"][1]["value"] for row in rows])
texts, side = list(Texts((str(out / "data/train/*.tar"),), ("short",)).batches()), TextSide(str(out / "train"), torch.device("cpu"))
aligned = [(normed(side.embed(batch, range(len(batch.texts)))), reader.ids(batch.texts)) for batch in texts]
tests = {part: pictures(part) for part in ("seen", "unseen")}
tests = {part: (blocks(images), labels, reader.ids(names)) for part, (images, labels, names) in tests.items()}
said = [ids for _, batch in aligned for ids in batch]


def spoken(ids, rarity):
    """Return what names are in the LLM's word space: the mean embedding of their tokens, weighted by rarity (n, H)."""
    shares = [rarity[one] + 1e-9 for one in ids]
    return torch.stack([(table[one] * share[:, None]).sum(0) / share.sum() for one, share in zip(ids, shares, strict=True)]).double()


def words_of(*sources):
    words = Words(language.tokenizer, len(table))
    for ids in sources:
        words.count(ids)
    words.choose(4096)
    return words


every = words_of(said, captions)
rarity = (every.texts / every.counts.clamp(min=1)).log() * (every.counts > 0)
center = spoken(said, rarity).mean(0)
names = {part: normalize(spoken(ids, rarity) - center, dim=1).T for part, (_, _, ids) in tests.items()}


def named(solved, words, chosen, sharpness):
    """Return per part the share named right by the mean of an image's tokens, and by the best single token."""
    found = []
    for part, (features, labels, _) in tests.items():
        scores = solved([features[block] for block in chosen])
        tokens = (scores * sharpness).softmax(-1) @ table[words.chosen].double() - center
        for near in (normalize(tokens.mean(1), dim=1) @ names[part], (normalize(tokens, dim=2) @ names[part]).amax(1)):
            found.append(f"{float((near.argmax(1) == labels).double().mean()):.1%}")
    return "seen {} ({}), never seen {} ({})".format(*found)


for seed in map(int, os.environ["SEEDS"].split()):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    for count in (0, 50, 200, 500, 1000, len(rows)):
        used, beside = order[:count], order[-1000:]
        for arm, chosen in {"no head": [1], "trained head": [0], "both": [0, 1]}.items():
            if not count and 1 in chosen:
                continue
            given = torch.cat([scenes[block].mean(1) for block in chosen], 1)
            own = [captions[place] for place in used.tolist()]
            words, beside_texts = words_of(own, said if 0 in chosen else []), {}
            if 0 in chosen:
                moments = Moments(sail.config.width, len(words.chosen))
                for embedded, ids in aligned:
                    moments.add(embedded, words.presence(ids))
                beside_texts = {"unlabelled": given[beside], "texts": moments}
            widths = [scenes[block].shape[2] for block in chosen]
            solved = Fitting(widths, given[used], words.presence(own), words.shares, seed=seed, **beside_texts).solve()
            sample = solved([scenes[block][beside[:256]] for block in chosen])
            choice, sharpness = solved.choice, SHARPNESS / float(sample.std())
            found = named(solved, words, chosen, sharpness)
            print(f"seed {seed}, {count} captions, {arm}: {found}; texts {choice.text_weight:g}, ridges {choice.ridges}", flush=True)
PY
