#!/usr/bin/env bash
# The real-photo trial of stage two in docs/LOG.md: captions of Flickr8k-style photos, questions of DAQUAR, SmolLM2-135M-Instruct.
#   bash scripts/mllm_photos.sh DATA_FOLDER [OUTPUT_FOLDER]
# DATA_FOLDER holds flickr8k/{train,dev}.jsonl (key, image, captions) and daquar/qa.jsonl (image, question, answer). The aligned encoder
# is SAIL (default: the linear head of scripts/flickr8k.sh). STEPS instruct steps (default 300), LIMIT questions of each test.
# First data below OUTPUT_FOLDER/data; image paths in the rows are relative to DATA_FOLDER (--image-root):
#   pretrain.jsonl    each training photo with one of its captions
#   instruct.jsonl    Flickr8k: is there a ...?, describe; DAQUAR: the questions of four photos in five
#   yesno.parquet     dev photos; per word as many yes as no. Yes: at least three captions say it; no: none does, which is nearly
#                     but not always true of the photo (people do not say all they see)
#   open.parquet      DAQUAR's questions about the other fifth of its photos, those with one answer
#   caption.parquet   dev photos with all their captions
# The same data give the same bytes. Then upgrade, both stages and lmms-eval, trained beside untrained.
set -euo pipefail
data=$(cd "${1:?give the folder with flickr8k/ and daquar/}" && pwd)
cd "$(dirname "$0")/.."
out=${2:-runs/mllm-photos}

python - "$data" "$out/data" <<'PY'
import json, random, re, sys
from collections import Counter, defaultdict
from pathlib import Path

from align.demo.writing import conversation_row, question_row, write_conversations, write_questions

data, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
rng = random.Random(0)
# what is asked about: things people name when they see them, and the words that say so or might
WORDS = {
    "a dog": r"dogs?|pupp(y|ies)|\w*terriers?|greyhounds?|poodles?|\w*retrievers?|collies?|shepherds?|canines?|hounds?",
    "a horse": r"horse\w*|pony|ponies|rodeo|jockeys?|bronco|equestrian",
    "a bicycle": r"\w*bik\w*|\w*cycl\w*",
    "a skateboard": r"\w*skat\w*",
    "a snowboard": r"\w*board\w*",
    "a surfboard": r"\w*surf\w*|\w*board\w*",
    "a boat": r"\w*boat\w*|canoe\w*|kayak\w*|rafts?|rafting|ships?|row\w*",
    "a swimming pool": r"\w*pools?|swim\w*|div(e|es|ing)|water|slide",
    "a swing": r"sw[iu]ng\w*",
    "a guitar": r"guitar\w*|music\w*|instruments?|band",
}
SURE = {  # and the words that say so without doubt, where they are fewer
    "a bicycle": r"(bicycle|bike)s?(?! helmet)",
    "a horse": r"horses?|pony|ponies",
    "a skateboard": r"skateboard\w*",
    "a snowboard": r"snowboard\w*",
    "a surfboard": r"surfboard\w*|surfer|surfing|surfs",
    "a boat": r"\w*boats?|canoe|kayak|raft",
    "a swimming pool": r"pool",
    "a swing": r"swings?",
    "a guitar": r"guitars?",
}
MOTOR = r"motor\w*|dirt ?bik\w*|bmx|atv|quad"  # a bike, but is it a bicycle?


def read(path):
    return [json.loads(line) for line in (data / path).read_text().splitlines()]


def said(pattern, captions):
    return sum(bool(re.search(rf"\b({pattern})\b", caption.lower())) for caption in captions)


def existence(rows, most):
    """Return [(photo, thing, answer)]: for every thing as many yes as no, at most `most` of each; no photo is asked twice the same."""
    asked, often = [], Counter()
    for thing, words in WORDS.items():
        there = [k for k, row in enumerate(rows) if said(SURE.get(thing, words), row["captions"]) >= 3]
        if thing == "a bicycle":
            there = [k for k in there if not said(MOTOR, rows[k]["captions"])]
        absent = [k for k, row in enumerate(rows) if not said(words, row["captions"])]
        rng.shuffle(there)
        rng.shuffle(absent)
        absent.sort(key=lambda k: often[k])  # spread the questions over the photos
        count = min(most, len(there), len(absent))
        for answer, chosen in (("yes", there[:count]), ("no", absent[:count])):
            often.update(chosen)
            asked += [(k, thing, answer) for k in chosen]
    rng.shuffle(asked)
    return asked


def sentence(caption):
    return " ".join(caption.split()).rstrip(" .").lower()


def by_photo(asked):
    found = defaultdict(list)
    for k, thing, answer in asked:
        found[k].append((f"Is there {thing}?", answer))
    return found


train, dev = read("flickr8k/train.jsonl"), read("flickr8k/dev.jsonl")
rooms = defaultdict(list)
for row in read("daquar/qa.jsonl"):
    question = " ".join(row["question"].split()).strip(" ?")
    answer = ", ".join(part.strip() for part in row["answer"].replace("_", " ").lower().split(",") if part.strip())
    if question and answer:
        rooms[row["image"]].append((question[0].upper() + question[1:] + "?", answer))
held_out = sorted(rooms)[::5]

pretrain = [conversation_row(row["key"], f"flickr8k/{row['image']}", [("", sentence(rng.choice(row["captions"])))]) for row in train]
questions = by_photo(existence(train, 150))
instruct = []
for k, row in enumerate(train):
    turns = [*questions[k], ("Describe the picture.", sentence(rng.choice(row["captions"])))]
    instruct.append(conversation_row(row["key"], f"flickr8k/{row['image']}", turns))
for image in sorted(set(rooms) - set(held_out)):
    turns = rng.sample(rooms[image], len(rooms[image]))
    for start in range(0, len(turns), 6):
        instruct.append(conversation_row(f"{Path(image).stem}-{start}", f"daquar/{image}", turns[start : start + 6]))
rng.shuffle(instruct)
write_conversations(out / "pretrain.jsonl", pretrain)
write_conversations(out / "instruct.jsonl", instruct)

tables = {"yesno": [], "open": [], "caption": []}
for k, found in sorted(by_photo(existence(dev, 50)).items()):
    picture = Path(dev[k]["image"]).name, (data / "flickr8k" / dev[k]["image"]).read_bytes()
    for number, (question, answer) in enumerate(found):
        tables["yesno"].append(question_row(f"{dev[k]['key']}-{number}", picture, question, answer, "exists"))
for row in dev:
    picture = Path(row["image"]).name, (data / "flickr8k" / row["image"]).read_bytes()
    tables["caption"].append(question_row(row["key"], picture, "Describe the picture.", list(map(sentence, row["captions"])), "caption"))
for image in held_out:
    picture = Path(image).name, (data / "daquar" / image).read_bytes()
    for number, (question, answer) in enumerate(rooms[image]):
        kind = "count" if question.lower().startswith("how many") else "what"
        if "," not in answer:
            tables["open"].append(question_row(f"{Path(image).stem}-{number}", picture, question, answer, kind))
for name, rows in tables.items():
    write_questions(out / f"{name}.parquet", rows)
turns = sum(len(row["conversations"]) // 2 for row in instruct)
print(f"{out}: {len(pretrain)} captions, {len(instruct)} conversations with {turns} turns, test questions:",
      ", ".join(f"{name} {len(rows)}" for name, rows in tables.items()))
PY

recipe=mllm/recipes/quickstart.yaml
tasks=$PWD/eval/harness/tasks
sail=${SAIL:-runs/flickr8k/train/linear/0}
export TOKENIZERS_PARALLELISM=false
python mllm/upgrade.py --config "$recipe" --sail "$sail" --captions "$out/data/pretrain.jsonl" --image-root "$data" \
  --texts "$data/flickr8k/train.jsonl" --text-columns captions --output "$out/init"
train() { python mllm/finetune.py --config "$recipe" --image-root "$data" "$@"; }
train --stage instruct --model "$out/init" --data "$out/data/instruct.jsonl" --output "$out/instruct" --steps "${STEPS:-300}"

mkdir -p "$out/tasks"
for kind in yesno open caption; do
  like=${kind/open/what}
  cat > "$out/tasks/photos_$kind.yaml" <<YAML
include: $tasks/sprites_$like.yaml
task: photos_$kind
dataset_kwargs:
  data_files:
    test: ../data/$kind.parquet
YAML
done
python eval/lmms.py --mllm "trained=$out/instruct" "untrained=$out/init" --tasks photos_yesno photos_open photos_caption \
    --include "$out/tasks" --batch-size 16 --max-new-tokens 24 --limit "${LIMIT:-300}" --output "$out"
