#!/usr/bin/env bash
# Inputs that once went wrong, given to the kit as it is now: writes the table (case, before, now) of docs/cases.md.
#   bash scripts/cases.sh [CASES_FOLDER] [PAGE]
# CASES_FOLDER (../shared/cases) holds stage1/NN and stage2/NN-name, each with a README that says what it is; it is copied, not changed.
# Needs no network: the models are the random ones of tests/support. About four minutes on an idle core.
# KEEP=FOLDER keeps what was made, and a run that was stopped goes on there. ONLY='stage1/0[23]' runs some cases and prints them without a
# page. SKIP='torchrun|lmms' leaves out commands that take long on a busy machine; the page says "not run" for them.
# "Before" is what was seen when the case was found, at commit 294cbaa or earlier; "now" is what the commands print and their exit codes.
set -euo pipefail
cd "$(dirname "$0")/.."
cases=$(cd "${1:-../shared/cases}" && pwd)
page=$(realpath "${2:-docs/cases.md}")
work=${KEEP:-$(mktemp -d)}
mkdir -p "$work"
[ -n "${KEEP:-}" ] || trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export KIT_ROOT=$PWD PYTHONPATH=$PWD TORCH_EXTENSIONS_DIR=$work/extensions LMMS_EVAL_DATASETS_CACHE=$work/cache COLUMNS=150

python - "$cases" "$page" "$work" <<'PY'
import functools, json, os, re, runpy, shlex, shutil, subprocess, sys
from pathlib import Path

ROOT, (CASES, PAGE, WORK), SKIP = Path(os.environ["KIT_ROOT"]), map(Path, sys.argv[1:]), os.environ.get("SKIP", "$^")
ONLY = os.environ.get("ONLY", "")
NOISE = r"loading libraries|^Loading weights|^Writing model shards|\d+/s, |W(ARNING|arning)|^\s*$|[┏┃┡└]|percent, with|^stopped by SIGTERM"
SECRET = re.compile(rf"{re.escape(str(WORK))}/?")
os.chdir(WORK)
if not Path("stage1").exists():
    shutil.copytree(CASES, WORK, dirs_exist_ok=True)
    subprocess.run(["chmod", "-R", "u+w", "."], check=True)


@functools.cache
def forking():
    """Return what runs functions in forked children, after loading once what all entries need."""
    import datasets, deepspeed
    from align.encoders import text, vision
    from align.features import extract
    from eval.measures import measurement
    from mllm.loop import run
    from tests.support import forking

    return forking


# --- running -------------------------------------------------------------------------------------------------------------------------
def in_child(words, environment):
    os.environ.update(environment)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path.insert(0, str(ROOT / words[0]))
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run(command):
    """Run a command line and return its exit code and its lines. Entries run in a fork of this process: importing takes longest."""
    words = shlex.split(command)
    environment = {}
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        environment[name] = value.replace("WORK", str(WORK))
    if words[0] == "python":
        code = forking().exit_codes([forking().fork(in_child, words[1:], environment)])[0]
    elif words[0] == "torchrun":
        place = [str(ROOT / word) if re.match(r"(align|mllm|eval)/\w+\.py", word) else word for word in words]
        with open("log", "wb") as log:
            code = subprocess.run(place, env={**os.environ, **environment}, stdout=log, stderr=log).returncode
    else:
        return subprocess.run(command, shell=True, check=True).returncode, []
    lines = Path("log").read_text(errors="replace").replace("\r", "\n").splitlines()
    return code, [SECRET.sub("", line).strip() for line in lines if not re.search(NOISE, line)]


def outcome(steps):
    """Return exit code and lines of the steps to show: those marked with "> ", else the last. Kept, so that a run can go on."""
    place, marked = Path("results.json"), [step for step in steps if step.startswith("> ")] or steps[-1:]
    kept, name = json.loads(place.read_text()) if place.exists() else {}, " && ".join(steps)
    if name not in kept and re.search(SKIP, name):
        return []
    if name not in kept:
        ran = [run(step.removeprefix("> ")) for step in steps]
        kept[name] = [one for one, step in zip(ran, steps, strict=True) if step in marked]
        place.write_text(json.dumps(kept))
    return kept[name]


def now(steps, show):
    """Return what a case prints today and its exit codes, as a cell of the table."""
    said = []
    for code, lines in outcome(steps):
        chosen = [line for line in lines if line.startswith("error: ") or (show and re.search(show, line))] or lines[-1:]
        said += [*dict.fromkeys(map(cell, chosen)), f"exit {code}"]
    return "<br>".join(said) or "not run"


def cell(text):
    """Return a line as text of a Markdown table."""
    text = " ".join(text.replace("│", " ").split())
    text = text if len(text) < 400 else f"{text[:400]} ..."
    return re.sub(r"([|*_<>`{}\[\]\\])", r"\\\1", text)


# --- the models and pictures that the commands below name ----------------------------------------------------------------------------
def photo(place, number):
    import numpy as np
    from PIL import Image

    random, color = np.random.default_rng(number), [(220, 40, 30), (40, 200, 60), (30, 60, 220)][number % 3]
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.normal(color, 25, (36, 48, 3)).clip(0, 255).astype(np.uint8)).save(place)


def prepare():
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import save_file
    from tests.support.tiny_encoders import save, save_bert
    from tests.support.tiny_mllm import tiny_llm, tiny_sail, tiny_tokenizer

    save(Path("vision"), "dinov2")
    save_bert(Path("bert"))
    Path("bert/st").rename("text")
    tiny_sail(Path("sail/best"), Path("vision"))
    tiny_llm(Path("llm"))
    tiny_llm(Path("llm-other"), rows=420)
    for name in ("12-always-generation-prompt", "17-mistral-system"):
        tiny_llm(Path(f"llm-{name[:2]}"), template=Path(f"stage2/{name}/chat_template.jinja").read_text())
    for number in range(24):
        for name in ("01-lora-new-end-token", "04-resume-other-data", "17-mistral-system", "09-one-task-without-number/photos"):
            photo(f"stage2/{name.removesuffix('/photos')}/photos/{number}.png", number)
    pair = [{"user": "what is there?", "assistant": "a red dog"}]
    images = [[{"bytes": Path(f"stage2/17-mistral-system/photos/{n}.png").read_bytes(), "path": None}] for n in range(3)]
    pq.write_table(pa.table({"images": images, "texts": [pair] * 3}), "stage2/15-cauldron-parquet/rows.parquet")
    weights = {f"model.mm_projector.{n}.weight": torch.zeros(32, 32) for n in (0, 2)}
    save_file(weights, "stage2/11-original-llava-layout/model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained("stage2/11-original-llava-layout")
    Path("stage1/06/tiny.yaml").write_text("id: my-tiny\nkind: classification\nlayout: folder\npath: tiny\n")
    Path("home/bugs1enc").mkdir(parents=True, exist_ok=True)
    shutil.copytree("vision", "home/bugs1enc/dinov2")
    Path("home/bugs1data").mkdir()
    shutil.copy("stage1/11/00000.tar", "home/bugs1data")
    stores = "--images pairs/images --captions pairs/captions-captions"
    for step in ("python mllm/upgrade.py --llm llm --sail sail --template vicuna_v1 --output init",
                 encode("stage1/03/sprites/grouped.jsonl", "pairs", "captions"),
                 f"python align/train.py {stores} --output tiny --steps 2 --batch-size 8 --width 16 --head linear"):
        code, lines = run(step)
        assert code == 0, (step, lines)


# --- the cases -----------------------------------------------------------------------------------------------------------------------
def encode(data, output, column="txt", more=""):
    return f"python align/encode.py --data '{data}' --vision vision --text text --captions {column} --workers 0 --output {output} {more}".strip()


def measure(task, output):
    flags = f"--data-root {Path(task).parent} --no-baseline --no-report --workers 0 --cache cache"
    return f"python eval/run.py --model tiny --tasks {task} {flags} --output {output}"


def check(data, output, model="init", more=""):
    return f"python mllm/check.py --data stage2/{data} --model {model} --workers 0 --output {output} {more}".strip()


def finetune(output, more="--epochs 1", launcher="python", model="init"):
    base = "--max-length 128 --workers 0 --precision fp32 --batch-size 4 --micro-batch-size 2 --log-every 1 --save-every 3"
    data = "--data d.json --image-root stage2/04-resume-other-data"
    return f"{launcher} mllm/finetune.py --stage pretrain --model {model} {data} {base} {more} --output {output}"


def upgrade(llm, output, template="vicuna_v1"):
    return f"python mllm/upgrade.py --vision vision --sail-head none --llm {llm} --template {template} --output {output}"


TWO, ONE = ("torchrun --standalone --nproc_per_node 2", "torchrun --standalone --nproc_per_node 1")
KILLED = "SAIL_FAILPOINT=mllm-committed:1 "
ROWS, OTHER_ROWS = (f"cp stage2/04-resume-other-data/{name}.json d.json" for name in ("d", "d2"))
LORA = (
    "python mllm/finetune.py --stage instruct --model 01/init --data stage2/01-lora-new-end-token/instruct.json --lora-rank 8 --epochs 20 "
    "--batch-size 6 --micro-batch-size 6 --max-length 128 --lr-llm 1e-2 --lr-projector 1e-2 --lr-vision 0 --workers 0 --precision fp32"
)
ASK = "--image stage2/01-lora-new-end-token/photos/0.png --prompt 'what is on the image?' --max-new-tokens 24 --precision fp32"
HARNESS = "python eval/lmms.py --mllm mine=init --include stage2/09-one-task-without-number --batch-size 4 --no-report"
JSON7, JSON8 = "--deepspeed stage2/07-deepspeed-json-scheduler", "--deepspeed stage2/08-dry-run-own-zero3/my_zero3.json"
NO_TXT = "no column 'txt', exit 3"
COUNTS = "samples|rejected"

# (case, what it is, before, commands, lines to show). The last command is shown, or those that begin with ">". Errors are always shown.
TABLE = [
    ("stage1/01", "tar: all images first, all captions after them; 40 samples",
     "80 rows, all rejected (duplicate_key 80, missing_column 40), exit 3", [encode("stage1/01/00000.tar", "01a")], COUNTS),
    ("stage1/01", "the same with 150 samples", NO_TXT, [encode("stage1/01/150.tar", "01b")], COUNTS),
    ("stage1/02", "two tars whose keys both count from 0, as one data set",
     "120 samples encoded, exit 0; then no image has a caption with its key", [encode("stage1/02/*/*.tar", "02")], COUNTS),
    ("stage1/02", "the same with keys prefixed by file", "no such flag, exit 2",
     [encode("stage1/02/*/*.tar", "02p", more="--key-prefix file")], COUNTS),
    ("stage1/03", "CSV with one row a caption, five rows an image", "200 samples encoded for 40 files, exit 0",
     [encode("stage1/03/captions.csv", "03", "caption")], COUNTS),
    ("stage1/03", "the same as a retrieval task", "each image five times without a word, exit 0; its copies count as wrong answers",
     [measure("stage1/03/task.yaml", "03e")], "rows name"),
    ("stage1/03", "the same, the image column is the key", "160 of 200 rows rejected (duplicate_key), exit 3",
     [measure("stage1/03/task_key.yaml", "03k")], "rows name"),
    ("stage1/03", "captions of 60 images, one a row; then the same grouped", "text-to-image R@1 0.0; grouped 2.5 (of a trained model 0.0; 100.0), exit 0",
     ["> " + measure("stage1/03/sprites/perrow.yaml", "03r"), "> " + measure("stage1/03/sprites/grouped.yaml", "03g")], "rows name|R@1 "),
    ("stage1/04", "TSV with a stray double quote", "20 of 60 rows read, none rejected, exit 0",
     [encode("stage1/04/pairs.tsv", "04", "caption")], COUNTS),
    ("stage1/06", "class folders with an inner folder (tiny-imagenet)", "one class, accuracy 100.0%, exit 0",
     [measure("stage1/06/tiny.yaml", "06t")], ""),
    ("stage1/06", "class folders named by synset ids", "prompts 'a photo of a n01440764' without a word",
     [measure("stage1/06/synset.yaml", "06s")], "classes|class names"),
    ("stage1/07", "class numbers with a file of names", "label '0' is not in names.txt", [measure("stage1/07/with.yaml", "07w")], "classes"),
    ("stage1/07", "class numbers without names", "prompts '0', '1', ... without a word", [measure("stage1/07/without.yaml", "07o")], ""),
    ("stage1/11", "NaN in a column of .json that nobody asks for", "6 of 60 samples rejected, exit 3",
     [encode("stage1/11/00000.tar", "11")], COUNTS),
    ("stage1/13", "16-bit gray PNGs that hold 12-bit values", "12 encoded, nearly black, without a word", [encode("stage1/13", "13")], f"{COUNTS}|16-bit"),
    ("stage1/13", "the same with their bits", "no such flag", [encode("stage1/13", "13b", more="--gray-bits 12")], f"{COUNTS}|16-bit"),
    ("stage1/15", "tar members 22.05.jpg", NO_TXT, [encode("stage1/15/dots.tar", "15d")], COUNTS),
    ("stage1/15", "tar members img_v1.00.jpg", NO_TXT, [encode("stage1/15/same.tar", "15s")], COUNTS),
    ("stage1/15", "tar members input.jpg and outputs.txt", NO_TXT, [encode("stage1/15/compound.tar", "15p")], COUNTS),
    ("stage1/15", "the same with the suffix of the captions", NO_TXT, [encode("stage1/15/compound.tar", "15q", "outputs.txt")], COUNTS),
    ("stage1/15", "tar members .caption beside .jpg", NO_TXT, [encode("stage1/15/caption.tar", "15c", "caption")], COUNTS),
    ("stage1/16", "a recipe with ~ in its paths", "not run",
     ["HOME=WORK/home python align/encode.py --config stage1/16/recipe.yaml"], COUNTS),
    ("stage2/01", "LoRA on an LLM that lacks the tokens of chatml", "their rows are equal and frozen; answers do not stop",
     [upgrade("llm", "01/init", "chatml"), f"> {LORA} --output 01/run", f"> python mllm/chat_cli.py --model 01/run/model {ASK}"],
     "answers end|^a "),
    ("stage2/02", "rows with video and audios", "no problems; trained as text", [check("02-media-keys-ignored/rows.json", "02")], ""),
    ("stage2/03", "rows with system, system_prompt, loss, weight, tools", "no problems; all of them dropped",
     [check("03-row-keys-ignored/rows.json", "03c")], "an epoch|row_key"),
    ("stage2/04", "other rows under the same name; the run was killed after a checkpoint", "goes on, steps 6 to 12, exit 0",
     [ROWS, KILLED + finetune("04"), OTHER_ROWS, "> " + finetune("04")], ""),
    ("stage2/04", "the same, the run was finished", "nothing to do, exit 0", [ROWS, finetune("04f"), OTHER_ROWS, "> " + finetune("04f")], ""),
    ("stage2/05", "another start model under the same name; the run was killed", "goes on with the projector of the other model",
     [ROWS, upgrade("llm", "05/init"), KILLED + finetune("05/run", model="05/init"), "rm -r 05/init", upgrade("llm-other", "05/init"),
      "> " + finetune("05/run", model="05/init")], ""),
    ("stage2/07", "DeepSpeed JSON with a scheduler", "all rates 5e-5; the printed table says otherwise",
     [finetune("07", f"--lr-projector 5e-3 {JSON7}/ds_sched.json")], ""),
    ("stage2/07", "DeepSpeed JSON with scheduler and optimizer", "the same, and no rates in metrics.jsonl",
     [finetune("07", f"--lr-projector 5e-3 {JSON7}/ds_opt.json")], ""),
    ("stage2/08", "ZeRO-3 JSON of the user's, dry run of two processes", "traceback (Padding_idx must be within num_embeddings)",
     [ROWS, "> " + finetune("08", f"--steps 4 --dry-run {JSON8}", TWO)], "memory|min in all|Padding"),
    ("stage2/08", "the same with --deepspeed zero3", "an estimate, exit 0",
     [ROWS, "> " + finetune("08z", "--steps 4 --dry-run --deepspeed zero3", TWO)], "memory|min in all"),
    ("stage2/09", "two lmms-eval tasks, one without a number", "exit 3, no results.json; the number of the other is dropped",
     ["sed -i s/eval.lmms_docs/eval.harness.docs/ stage2/09-one-task-without-number/*.yaml", "mkdir -p photos",
      "cp -r stage2/09-one-task-without-number/photos photos/",
      f"> {HARNESS} --tasks t_good t_submit --output 09"], "t_good|t_submit"),
    ("stage2/11", "--llava with the layout of the original repository", "no hint at a converted checkpoint; killed for memory",
     ["python mllm/upgrade.py --llava stage2/11-original-llava-layout --sail sail --output llava"], ""),
    ("stage2/12", "a template that always ends with the assistant's header", "'Add the token or use vicuna_v1', though no token is missing",
     [upgrade("llm-12", "12", "own")], ""),
    ("stage2/15", "parquet with images and texts (The Cauldron)", "'Rename the right one', which does not help",
     [check("15-cauldron-parquet/rows.parquet", "15")], "an epoch"),
    ("stage2/17", "a template that puts the system text into the last question", "rows with system text and two turns rejected (template)",
     [upgrade("llm-17", "17/init", "own"),
      "> " + check("17-mistral-system/rows.json", "17/check", "17/init", "--image-root stage2/17-mistral-system")],
     "an epoch|template"),
    ("stage2/18", "checkpoint of two DeepSpeed processes, resumed by one", "traceback (ZeRORuntimeException)",
     [ROWS, KILLED + finetune("18", "--steps 4 --deepspeed zero2", TWO), "> " + finetune("18", "--steps 4 --deepspeed zero2", ONE)], ""),
]  # fmt: skip


# --- the page ------------------------------------------------------------------------------------------------------------------------
HEAD = """# Cases

Inputs that once went wrong, given to the kit as it is: written by `bash scripts/cases.sh`, which takes the cases' folder. "Before" is what
was seen when a case was found, at commit 294cbaa or earlier. The commands of stage1/01 to stage1/04 and of tiny-imagenet were run again at
294cbaa, and those cells say what they printed; the others are notes of the day. "Now" is what the commands below print, shortened, and
their exit codes. The models are tiny and random, so a number says only whether two are equal. "Not run" is what SKIP left out of the run
that wrote this page.
"""
if not Path("tiny/last").exists():
    forking().exit_codes([forking().fork(prepare)])[0] and sys.exit("the models could not be made")
rows = []
for case, what, before, steps, show in TABLE:
    if re.search(ONLY, case):
        rows.append((case, what, before, now(steps, show), steps))
        print("==", *rows[-1][:4], sep="\n   ", flush=True)
if not ONLY:
    lines = [HEAD, "| case | what it is | before | now |", "|---|---|---|---|"]
    lines += [f"| {case} | {cell(what)} | {cell(before)} | {said} |" for case, what, before, said, _ in rows]
    lines += ["", "## Commands", "", "In a copy of the cases' folder, beside models that the script makes.", ""]
    for case, what, _, _, steps in rows:
        lines += [f"{case}, {what}:", "", "```bash", *(step.removeprefix("> ") for step in steps), "```", ""]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
PY
