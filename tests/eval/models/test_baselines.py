"""Baselines against the stock models they wrap, on tiny random weights, and metrics against CLIP_benchmark's."""

import json

import numpy as np
import open_clip
import pytest
import torch
import transformers
from clip_benchmark.metrics import zeroshot_classification as their_classification
from clip_benchmark.metrics import zeroshot_retrieval as their_retrieval
from open_clip import pretrained
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import gelu, layer_norm, normalize

from align.common.errors import DamagedError, OfflineError, UsageError
from align.encoders.vision import pixel_normalizer
from eval.measures.config import EvalConfig
from eval.measures.retrieval import retrieval_entries, retrieve
from eval.measures.zeroshot import class_weights, zero_shot_classification
from eval.models import baselines
from eval.models.baselines import HUGGING_FACE_FAMILIES, open_baseline
from eval.results.metrics import mean_per_class
from eval.results.records import load_results
from eval.run import main
from tests.support.tiny_clip import TEXTS, save_hugging_face, shake


@pytest.fixture(scope="module", params=HUGGING_FACE_FAMILIES)
def hugging_face(request, tmp_path_factory):
    """(family, folder, stock model, stock tokenizer, what this kit opens)"""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *save_hugging_face(folder, request.param), open_baseline("hf", str(folder))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_images_are_those_of_the_stock_model(hugging_face):
    _, folder, model, _, baseline = hugging_face
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(baseline.vision_encoder.transform(picture), pixels[0])
    expected = model.get_image_features(pixel_values=pixels).pooler_output
    features = baseline.vision_encoder(pixels)
    close(features, expected)
    assert features.shape == (1, baseline.vision_encoder.feature_width) and features.norm() != pytest.approx(1, abs=1e-3)
    close(baseline.project_image(features), normalize(expected, dim=-1))


@torch.no_grad()
def test_texts_are_those_of_the_stock_model_one_by_one(hugging_face):
    family, _, model, tokenizer, baseline = hugging_face
    features = baseline.text_encoder.encode(TEXTS, 2)
    for text, feature in zip(TEXTS, features, strict=True):
        if family == "siglip":  # trained on padded texts, without a mask
            ids = tokenizer(text, padding="max_length", max_length=12, truncation=True, return_tensors="pt")["input_ids"]
            assert ids.shape == (1, 12)
            expected = model.get_text_features(input_ids=ids).pooler_output
        else:
            tokens = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
            expected = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        close(feature[None], expected)
    close(features[0], features[4])
    assert baseline.text_encoder.encode([], 2).shape == (0, baseline.width)


@torch.no_grad()
def test_cosines_are_the_logits_of_the_stock_model(hugging_face):
    family, _, model, tokenizer, baseline = hugging_face
    pixels, texts = torch.randn(3, 3, 32, 32), TEXTS[:3]
    tokens = tokenizer(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    mask = {} if family == "siglip" else {"attention_mask": tokens["attention_mask"]}
    logits = model(input_ids=tokens["input_ids"], pixel_values=pixels, **mask).logits_per_image
    images = baseline.project_image(baseline.vision_encoder(pixels))
    found = baseline.scale * images @ baseline.project_text(baseline.text_encoder.encode(texts, 8)).T
    close(found + (model.logit_bias if family == "siglip" else 0), logits, 1e-4)


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
@torch.no_grad()
def test_dense_embeddings_are_each_patch_through_the_projection(hugging_face, size):
    family, _, model, _, baseline = hugging_face
    pixels = torch.randn(2, 3, *size)
    tokens = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    if family == "siglip":  # attention to a single token is its value: v = Wv x, then Wo v, then the MLP
        head = model.vision_model.head
        width = tokens.shape[-1]
        value = tokens @ head.attention.in_proj_weight[2 * width :].T + head.attention.in_proj_bias[2 * width :]
        out = value @ head.attention.out_proj.weight.T + head.attention.out_proj.bias
        normed = layer_norm(out, (width,), head.layernorm.weight, head.layernorm.bias, head.layernorm.eps)
        hidden = gelu(normed @ head.mlp.fc1.weight.T + head.mlp.fc1.bias, approximate="tanh")
        expected = out + hidden @ head.mlp.fc2.weight.T + head.mlp.fc2.bias
    else:
        norm = model.vision_model.post_layernorm
        tokens = layer_norm(tokens[:, 1:], (tokens.shape[-1],), norm.weight, norm.bias, norm.eps)
        expected = tokens @ model.visual_projection.weight.T
    dense = baseline.project_patches(baseline.encode_patches(pixels))
    assert dense.shape == (2, size[0] // 8 * size[1] // 8, baseline.width) and baseline.patch_size == 8
    close(dense, normalize(expected, dim=-1))


def test_fingerprints_follow_weights_and_architecture_of_their_own_side(hugging_face, tmp_path):
    family, folder, model, _, baseline = hugging_face
    again = open_baseline("hf", str(folder))
    assert again.vision_fingerprint == baseline.vision_fingerprint and again.text_fingerprint == baseline.text_fingerprint
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with torch.no_grad():
        changed = type(model).from_pretrained(folder)
        changed.text_model.final_layer_norm.bias.add_(1)
        changed.save_pretrained(tmp_path)
    other = open_baseline("hf", str(tmp_path))
    assert other.vision_fingerprint == {**baseline.vision_fingerprint, "encoder": tmp_path.name}
    assert other.text_fingerprint["weights"] != baseline.text_fingerprint["weights"]
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = open_baseline("hf", str(tmp_path))
    assert other.vision_fingerprint["weights"] == baseline.vision_fingerprint["weights"]
    assert other.vision_fingerprint["architecture"] != baseline.vision_fingerprint["architecture"]


def test_folders_of_other_models_are_refused(tmp_path):
    save_hugging_face(tmp_path, "clip")
    config = json.loads((tmp_path / "config.json").read_text())
    for model_type, message in (("siglip2", "fixed-size"), ("bert", "known: clip, metaclip_2, siglip")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        with pytest.raises(UsageError, match=message):
            open_baseline("hf", str(tmp_path))
    with pytest.raises(UsageError, match="not a folder"):
        open_baseline("hf", str(tmp_path / "nothing"))


# open_clip


ARCHITECTURES = {
    "kit-tiny": {"image_size": 32, "quick_gelu": False},
    "kit-tiny-quickgelu": {"image_size": 32, "quick_gelu": True},
    "kit-tiny-48": {"image_size": 48, "quick_gelu": False},
}


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """A folder with weights of kit-tiny; the architectures are registered for this module only."""
    folder = tmp_path_factory.mktemp("openclip")
    before = dict(open_clip.factory._MODEL_CONFIGS), list(open_clip.factory._MODEL_CONFIG_PATHS)
    for name, values in ARCHITECTURES.items():
        config = {
            "embed_dim": 20,
            "quick_gelu": values["quick_gelu"],
            "vision_cfg": {"image_size": values["image_size"], "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
        }
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = shake(open_clip.create_model("kit-tiny"))
    save_file(model.state_dict(), folder / "model.safetensors")
    yield folder
    open_clip.factory._MODEL_CONFIGS, open_clip.factory._MODEL_CONFIG_PATHS = before


def stock(folder, architecture="kit-tiny"):
    model = open_clip.create_model(architecture, pretrained=str(folder / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def test_an_open_clip_model_is_the_stock_one(clip_files):
    model, baseline = stock(clip_files), open_baseline("openclip", f"kit-tiny/{clip_files}/model.safetensors")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    transform = open_clip.image_transform(32, is_train=False, mean=model.visual.image_mean, std=model.visual.image_std)
    pixels = transform(picture)[None]
    assert torch.equal(baseline.vision_encoder.transform(picture), pixels[0])
    close(baseline.vision_encoder(pixels), model.encode_image(pixels))
    expected = model.encode_text(open_clip.get_tokenizer("kit-tiny")(TEXTS))  # the fourth is longer than the context
    close(baseline.text_encoder.encode(TEXTS, 2), expected)
    assert baseline.width == 20 and baseline.scale == pytest.approx(float(model.logit_scale.exp()))
    assert not any(parameter.requires_grad for parameter in baseline.parameters()) and not baseline.train().training
    assert pixel_normalizer(baseline.transform).mean == pytest.approx(model.visual.image_mean)


@torch.no_grad()
def test_dense_open_clip_embeddings_at_its_own_and_at_another_size(clip_files):
    baseline = open_baseline("openclip", f"kit-tiny{clip_files}/model.safetensors")  # a path from the root after the architecture
    for size, architecture in ((32, "kit-tiny"), (48, "kit-tiny-48")):
        model = stock(clip_files, architecture)  # open_clip's own loader interpolates the position embeddings
        pixels = torch.randn(2, 3, size, size)
        given = model.visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
        expected = normalize(given["image_intermediates"][-1] @ model.visual.proj, dim=-1)
        close(baseline.project_patches(baseline.encode_patches(pixels)), expected)
    assert baseline.encode_patches(torch.randn(1, 3, 16, 40)).shape == (1, 10, 20) and baseline.patch_size == 8
    pixels = torch.randn(2, 3, 32, 32)
    close(baseline.vision_encoder(pixels), stock(clip_files).encode_image(pixels))  # its own positions are as they were


def test_files_that_are_not_safe_or_do_not_fit_are_refused(clip_files, tmp_path):
    where = f"{clip_files}/model.safetensors"
    torch.save({}, tmp_path / "model.pt")
    weights = stock(clip_files).state_dict()
    save_file({name: value for name, value in weights.items() if "ln_post" not in name}, tmp_path / "less.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((clip_files / "model.safetensors").read_bytes()[:999])
    for source, message in (
        (f"kit-tiny/{tmp_path}/model.pt", "safetensors"),
        (f"kit-tiny/{tmp_path}/none.safetensors", "neither a file nor a pretrained tag"),
        (f"kit-tiny-48/{where}", "another image size"),
        (f"kit-tinny/{where}", "did you mean 'kit-tiny'"),
        ("kit-tiny", "ARCH/TAG"),
        (f"kit-tiny/{tmp_path}/less.safetensors", "needed are weights of this architecture"),
        (f"ViT-L-14/{where}", "open_clip_config.json"),
    ):
        with pytest.raises(UsageError, match=message):
            open_baseline("openclip", source)
    with pytest.raises(DamagedError, match="cannot be read"):
        open_baseline("openclip", f"kit-tiny/{tmp_path}/cut.safetensors")


def test_a_config_beside_the_weights_is_followed(clip_files, tmp_path):
    config = json.loads((clip_files / "kit-tiny-quickgelu.json").read_text())
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    (tmp_path / "w.safetensors").write_bytes((clip_files / "model.safetensors").read_bytes())
    beside = open_baseline("openclip", f"kit-tiny/{tmp_path}/w.safetensors")
    plain = open_baseline("openclip", f"kit-tiny/{clip_files}/model.safetensors")
    assert json.loads(beside.vision_fingerprint["preprocessing"])["mean"] == [0.1, 0.2, 0.3]
    assert beside.vision_fingerprint["architecture"] != plain.vision_fingerprint["architecture"]
    assert beside.vision_fingerprint["weights"] == plain.vision_fingerprint["weights"]
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        close(beside.vision_encoder(pixels), stock(clip_files, "kit-tiny-quickgelu").encode_image(pixels))


def test_a_tag_says_itself_how_it_was_trained(clip_files, monkeypatch):
    tag = {
        "file": str(clip_files / "model.safetensors"),
        "quick_gelu": True,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "interpolation": "bicubic",
    }
    monkeypatch.setitem(pretrained._PRETRAINED, "kit-tiny", {"mine": tag})
    baseline = open_baseline("openclip", "kit-tiny/mine")
    assert json.loads(baseline.vision_fingerprint["preprocessing"])["std"] == [0.25] * 3
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        close(baseline.vision_encoder(pixels), stock(clip_files, "kit-tiny-quickgelu").encode_image(pixels))
    own = open_baseline("openclip", f"kit-tiny/{clip_files}/model.safetensors")  # a file is prepared as the tags are
    assert json.loads(own.vision_fingerprint["preprocessing"])["std"] == [0.25] * 3


def test_a_tag_that_cannot_be_fetched_says_what_to_do(clip_files, monkeypatch):
    monkeypatch.setitem(pretrained._PRETRAINED, "kit-tiny", {"far": {"hf_hub": "nobody/nothing/"}})

    def unreachable(*_, **__):
        raise FileNotFoundError("no network here")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(OfflineError, match=r"openclip:kit-tiny/PATH/open_clip_model.safetensors"):
        open_baseline("openclip", "kit-tiny/far")


# side by side


def test_a_baseline_is_measured_and_a_second_run_runs_no_encoder(tmp_path, monkeypatch):
    model, tokenizer = save_hugging_face(tmp_path / "model", "clip")
    colors = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    rng = np.random.default_rng(0)
    for name, color in colors.items():
        (tmp_path / "data" / "colors" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.clip(np.full((32, 32, 3), color) + rng.integers(-40, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "colors" / name / f"{number}.png")
    (tmp_path / "colors.yaml").write_text("id: colors\nkind: classification\nlayout: folder\npath: colors\ntemplates: plain\n")
    config = EvalConfig(
        model=(f"tiny=hf:{tmp_path / 'model'}",), tasks=(str(tmp_path / "colors.yaml"),), data_root=str(tmp_path / "data"),
        output=str(tmp_path / "out"), workers=0, device="cpu", batch_size=5,
    )  # fmt: skip
    main(config)
    results = load_results(tmp_path / "out")
    assert [(one.name, one.kind) for one in results.models] == [("tiny", "clip"), ("majority", "majority"), ("chance", "chance")]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    right = 0
    with torch.no_grad():
        texts = [tokenizer(name, truncation=True, max_length=12, return_tensors="pt") for name in sorted(colors)]
        weights = torch.cat([model.get_text_features(input_ids=t["input_ids"]).pooler_output for t in texts])
        for path in (tmp_path / "data" / "colors").rglob("*.png"):
            pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
            cosines = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1) @ normalize(weights, dim=-1).T
            right += sorted(colors)[int(cosines.argmax())] == path.parent.name
    assert results.value("colors", "acc@1", "tiny").value == pytest.approx(right / 12)
    assert (tmp_path / "out" / "report.html").is_file()

    def touched(*_):
        raise AssertionError("an encoder was run")

    monkeypatch.setattr(baselines.Images, "__call__", touched)
    monkeypatch.setattr(baselines.Sentences, "encode", touched)
    main(config)
    assert load_results(tmp_path / "out").entries == results.entries


def test_classification_is_as_clip_benchmark_defines_it(monkeypatch):
    # numpy no longer turns an array of one element into a float, which clip_benchmark 1.6 asks of it
    monkeypatch.setattr(their_classification, "float", lambda array: array.item(), raising=False)
    torch.manual_seed(0)
    images, sentences, labels = normalize(torch.randn(200, 16), dim=-1), torch.randn(7 * 3, 16), torch.randint(0, 7, (200,))

    class Model:
        def encode_text(self, numbers):
            return sentences[numbers]

    classes = {f"class {c}": [3 * c, 3 * c + 1, 3 * c + 2] for c in range(7)}
    theirs = their_classification.zero_shot_classifier(Model(), torch.tensor, list(classes), classes, "cpu", amp=False)
    ours = class_weights(normalize(sentences, dim=-1), [3] * 7)
    close(ours.T, theirs)
    answers = zero_shot_classification(images, ours, labels)
    expected = their_classification.accuracy(images @ theirs, labels, topk=(1, 5))
    assert [float(np.mean(answers.ranks <= k)) for k in (1, 5)] == pytest.approx(expected)
    balanced = their_classification.balanced_accuracy_score(labels, (images @ theirs).argmax(1))
    assert mean_per_class(answers.ranks == 1, labels.numpy(), 7) == pytest.approx(balanced)


def test_retrieval_is_as_clip_benchmark_defines_it():
    torch.manual_seed(0)
    owner = torch.repeat_interleave(torch.arange(40), 5)
    images = normalize(torch.randn(40, 12), dim=-1)
    captions = normalize(images[owner] + 1.5 * torch.randn(200, 12), dim=-1)
    answers = retrieve(images, captions, owner)
    found = {entry.metric: entry.value for entry in retrieval_entries(answers, "t", "m", np.random.default_rng(0), 0.95)}
    scores = captions @ images.T
    positive = owner[:, None] == torch.arange(40)
    for k in (1, 5, 10):
        t2i = (their_retrieval.recall_at_k(scores, positive, k) > 0).float().mean().item()
        i2t = (their_retrieval.recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
        assert (found[f"t2i_r@{k}"], found[f"i2t_r@{k}"]) == pytest.approx((t2i, i2t)) and 0 < t2i < 1
