"""Published heads and embeddings: strict in, the same out, and what they compute against a forward written from the formula."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from align.common.errors import DamagedError, DataError, UsageError
from align.convert import main
from align.features.imported import Embeddings, find_files, import_embeddings
from align.features.store import FeatureStore
from align.features.verification import verify_store
from align.features.writer import StoreWriter
from align.model.config import ConvertConfig
from align.model.dual_encoder import SailConfig, SailModel
from align.model.published_heads import heads_from, to_published
from tests.support.stores import all_features

F, D, E, W = 6, 4, 5, 3  # image features, caption features, aligned width, expansion


def published(vision=F, text=D, width=E, expansion=W, sides=("vision", "text")):
    """A checkpoint of the published layout with weights that use all of the formula: clamps and ReLU6 cut somewhere."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    weights = {"logit_scale": torch.tensor([3.1]), "logit_bias": torch.tensor([-9.0])}
    for side, feature in zip(("vision", "text"), (vision, text), strict=True):
        if side in sides:
            hidden = expansion * feature
            network = f"{side}_mapping_network"
            weights |= {f"{side}_layer_norm.weight": draw(feature), f"{side}_layer_norm.bias": draw(feature)}
            weights |= {f"{network}.f1.weight": 3 * draw(hidden, feature), f"{network}.f1.bias": draw(hidden)}
            weights |= {f"{network}.f2.weight": 600 * draw(hidden, feature), f"{network}.f2.bias": draw(hidden)}
            weights |= {f"{network}.g.weight": draw(width, hidden), f"{network}.g.bias": draw(width)}
    return weights


def expected(weights, side, features):
    """The published forward, written out: W3(ReLU6(clamp(W1 x + b1)) * clamp(W2 x + b2)) + b3 of x = LayerNorm(features), then L2."""
    part = {name.removeprefix(f"{side}_"): value.double() for name, value in weights.items() if name.startswith(f"{side}_")}
    rows = []
    for row in features.double():
        x = (row - row.mean()) / torch.sqrt(((row - row.mean()) ** 2).mean() + 1e-5)
        x = x * part["layer_norm.weight"] + part["layer_norm.bias"]
        one = part["mapping_network.f1.weight"] @ x + part["mapping_network.f1.bias"]
        two = part["mapping_network.f2.weight"] @ x + part["mapping_network.f2.bias"]
        assert side == "text" or (two.abs() > 1e3).any()
        hidden = one.clamp(-1e3, 1e3).clamp(0, 6) * two.clamp(-1e3, 1e3)
        out = part["mapping_network.g.weight"] @ hidden + part["mapping_network.g.bias"]
        rows.append(out / out.norm())
    return torch.stack(rows).float()


@pytest.mark.parametrize("form", ["plain.pt", "ddp.pt", "nested.pth", "both.bin", "plain.safetensors"])
def test_published_heads_compute_the_published_formula(tmp_path, form):
    weights = published()
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    content = {
        "plain.pt": weights,
        "ddp.pt": wrapped,
        "nested.pth": {"state_dict": weights, "epoch": 3, "optimizer": {"step": 1}},
        "both.bin": {"model": wrapped, "epoch": 3},
        "plain.safetensors": weights,
    }[form]
    save_file(weights, tmp_path / form) if form.endswith("safetensors") else torch.save(content, tmp_path / form)
    main(ConvertConfig(heads=str(tmp_path / form), output=str(tmp_path / "model")))
    model = SailModel.from_pretrained(tmp_path / "model")
    assert (model.config.vision_width, model.config.text_width, model.config.width, model.config.expansion) == (F, D, E, W)
    images, texts = torch.randn(7, F), torch.randn(9, D)
    with torch.no_grad():
        torch.testing.assert_close(model.project_image(images), expected(weights, "vision", images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.project_text(texts), expected(weights, "text", texts), rtol=1e-4, atol=1e-5)
    assert model.logit_scale.item() == pytest.approx(3.1) and model.logit_bias.item() == -9.0
    with pytest.raises(UsageError, match="already encoded"):
        _ = model.vision_encoder


@pytest.mark.parametrize("name", ["back.pt", "back.safetensors"])
def test_there_and_back_is_the_same(tmp_path, name):
    weights = published()
    torch.save(weights, tmp_path / "given.pt")
    main(ConvertConfig(heads=str(tmp_path / "given.pt"), output=str(tmp_path / "run" / "best")))
    main(ConvertConfig(model=str(tmp_path / "run"), to_published=str(tmp_path / "x" / name)))
    path = tmp_path / "x" / name
    back = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(back[key], value) and back[key].shape == value.shape, key


def test_own_models_go_out_and_come_back(tmp_path):
    model = SailModel(SailConfig(vision_width=F, text_width=D, width=E, head="glu", expansion=2)).initialize(1)
    again = heads_from(to_published(model), "memory")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    for head in ("linear", "mlp"):
        with pytest.raises(UsageError, match="glu"):
            to_published(SailModel(SailConfig(vision_width=F, text_width=D, width=E, head=head)))


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def changed(name, value):
    return lambda weights: {**weights, name: value}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("text_mapping_network.f2.bias"), "missing: text_mapping_network.f2.bias"),
        (changed("vision_mapping_network.f3.weight", torch.zeros(1)), "unknown: vision_mapping_network.f3.weight"),
        (changed("vision_mapping_network.f1.weight", torch.zeros(W * F, F + 1)), "vision head: gate.weight"),
        (changed("vision_layer_norm.weight", torch.zeros(F, 1)), "vision head: norm"),
        (changed("text_mapping_network.f1.bias", torch.tensor(0.0)), "text head: gate"),
        (changed("text_mapping_network.g.weight", torch.zeros(E + 1, W * D)), "text head: out.weight"),
        (changed("logit_scale", torch.zeros(2)), "logit_scale has the shape"),
        (changed("logit_bias", torch.tensor([float("nan")])), "not finite"),
        (lambda weights: published(sides=("vision",)), "--base"),
        (lambda weights: {**published(), **{k: v for k, v in published(expansion=2).items() if k.startswith("text")}}, "one expansion"),
        (lambda weights: {**published(), **{k: v for k, v in published(width=E + 1).items() if k.startswith("text")}}, "one aligned width"),
        (lambda weights: {"vision": [1, 2]}, "tensors by name"),
        (lambda weights: [torch.zeros(1)], "tensors by name"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, damage, message):
    torch.save(damage(published()), tmp_path / "h.pt")
    with pytest.raises(DamagedError, match=message):
        main(ConvertConfig(heads=str(tmp_path / "h.pt"), output=str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


class Encoder:
    def __init__(self, spec, width):
        self.spec, self.id, self.width, self.feature_width = spec, spec.name, width, width
        self.fingerprint = {"encoder": "e", "weights": str(width), "precision": "fp32"}
        self.tokenizer = self

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")


def test_encoders_are_opened_compared_and_recorded(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("align.encoders.vision.load_vision_encoder", lambda spec: asked.update(vision=spec) or Encoder(spec, F))
    monkeypatch.setattr("align.encoders.text.load_text_encoder", lambda spec: asked.update(text=spec) or Encoder(spec, D))
    torch.save(published(), tmp_path / "h.pt")
    named = {"heads": str(tmp_path / "h.pt"), "vision": "some/eye", "text": "some/ear", "precision": "fp32", "text_revision": "a" * 40}
    main(ConvertConfig(**named, output=str(tmp_path / "m"), trust_remote_code=True, max_length=9))
    config = SailModel.from_pretrained(tmp_path / "m").config
    assert config.vision == {"name": "some/eye", "revision": None, "feature": "auto", "layer": -1, "image_size": None}
    assert config.text == asked["text"].stored() and (config.text["name"], config.text["max_length"]) == ("some/ear", 9)
    assert config.vision_fingerprint["weights"] == str(F) and config.text_fingerprint["weights"] == str(D)
    assert not asked["vision"].from_pretrained["trust_remote_code"] and asked["text"].from_pretrained["trust_remote_code"]
    assert (tmp_path / "m" / "tokenizer.json").is_file() and (tmp_path / "m" / "preprocessor_config.json").is_file()
    monkeypatch.setattr("align.encoders.text.load_text_encoder", lambda spec: Encoder(spec, D + 1))
    with pytest.raises(UsageError, match=f"features of {D + 1}, but the published head takes {D}"):
        main(ConvertConfig(**named, output=str(tmp_path / "other")))
    with pytest.raises(UsageError, match="there already"):
        main(ConvertConfig(**named, output=str(tmp_path / "m")))


def test_an_image_head_of_a_tuned_mllm_goes_into_a_model(tmp_path):
    torch.save(published(), tmp_path / "h.pt")
    main(ConvertConfig(heads=str(tmp_path / "h.pt"), output=str(tmp_path / "base")))
    tuned = {name: value + 0.25 for name, value in published(sides=("vision",)).items()}
    torch.save(tuned, tmp_path / "vlhead.bin")
    main(ConvertConfig(heads=str(tmp_path / "vlhead.bin"), base=str(tmp_path / "base"), output=str(tmp_path / "tuned")))
    model, base = SailModel.from_pretrained(tmp_path / "tuned"), SailModel.from_pretrained(tmp_path / "base")
    assert torch.equal(model.vision_head.gate.weight, tuned["vision_mapping_network.f1.weight"])
    for name, value in base.state_dict().items():
        assert name.startswith("vision_head") or torch.equal(model.state_dict()[name], value)
    torch.save(published(expansion=2, sides=("vision",)), tmp_path / "small.bin")
    with pytest.raises(UsageError, match="expansion 2"):
        main(ConvertConfig(heads=str(tmp_path / "small.bin"), base=str(tmp_path / "base"), output=str(tmp_path / "x")))
    with pytest.raises(UsageError, match="neither an aligned model"):
        main(ConvertConfig(heads=str(tmp_path / "vlhead.bin"), base=str(tmp_path / "typo"), output=str(tmp_path / "x")))


def test_llavas_projector_gets_the_names_of_transformers(tmp_path):
    given = {"0.weight": torch.randn(7, 5), "0.bias": torch.randn(7), "2.weight": torch.randn(7, 7), "2.bias": torch.randn(7)}
    for prefix in ("model.mm_projector.", "mm_projector."):
        torch.save({f"{prefix}{name}": value.half() for name, value in given.items()}, tmp_path / "mm_projector.bin")
        main(ConvertConfig(projector=str(tmp_path / "mm_projector.bin"), output=str(tmp_path / "p.safetensors")))
        found = load_file(tmp_path / "p.safetensors")
        names = {"linear_1.weight": "0.weight", "linear_1.bias": "0.bias", "linear_2.weight": "2.weight", "linear_2.bias": "2.bias"}
        assert found.keys() == names.keys()
        assert all(torch.equal(found[ours], given[theirs].half().float()) for ours, theirs in names.items())
    torch.save({f"mm_projector.{name}": value.T for name, value in given.items() if value.ndim == 2}, tmp_path / "w.bin")
    with pytest.raises(DamagedError, match="missing: mm_projector.0.bias"):
        main(ConvertConfig(projector=str(tmp_path / "w.bin"), output=str(tmp_path / "q.safetensors")))
    torch.save({f"mm_projector.{name}": torch.zeros(3, 3) for name in given}, tmp_path / "w.bin")
    with pytest.raises(DamagedError, match="no two-layer projector"):
        main(ConvertConfig(projector=str(tmp_path / "w.bin"), output=str(tmp_path / "q.safetensors")))


# embeddings


def clip_retrieval(folder, sizes=(5, 3), width=6):
    """Write clip-retrieval's layout; return keys and embeddings of images and texts."""
    rng = np.random.default_rng(0)
    everything = {"keys": [], "img_emb": [], "text_emb": []}
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, size in enumerate(sizes):
        keys = [f"k{number}-{row}" for row in range(size)]
        pq.write_table(pa.table({"image_path": keys, "caption": ["c"] * size}), folder / "metadata" / f"metadata_{number}.parquet")
        everything["keys"] += keys
        for name in ("img_emb", "text_emb"):
            values = rng.normal(size=(size, width)).astype(np.float16)
            np.save(folder / name / f"{name}_{number}.npy", values)
            everything[name].append(values)
    return everything["keys"], np.concatenate(everything["img_emb"]), np.concatenate(everything["text_emb"])


def imported(**given):
    main(ConvertConfig(encoder_name="some/clip", **given))
    return FeatureStore(given["output"])


def test_clip_retrieval_folders_become_stores_by_key(tmp_path):
    keys, images, texts = clip_retrieval(tmp_path / "emb")
    for kind, values in (("image", images), ("caption", texts)):
        store = imported(embeddings=str(tmp_path / "emb"), kind=kind, output=str(tmp_path / kind), shard_rows=2, stated=("weights=abc",))
        assert store.keys.to_pylist() == keys and np.array_equal(all_features(store), values)
        assert store.header.kind == kind and store.header.shards == 5 and store.header.loader == {}
        assert store.fingerprint == {"encoder": "some/clip", "made": "imported", "weights": "abc"}
        verify_store(store.folder)


def test_more_than_nine_files_are_in_numerical_order(tmp_path):
    keys, images, _ = clip_retrieval(tmp_path / "emb", sizes=(1,) * 12)
    store = imported(embeddings=str(tmp_path / "emb"), kind="image", output=str(tmp_path / "out"))
    assert store.keys.to_pylist() == keys and np.array_equal(all_features(store), images)


def test_a_killed_import_goes_on(tmp_path, monkeypatch):
    keys, images, _ = clip_retrieval(tmp_path / "emb")
    embeddings = Embeddings(find_files(tmp_path / "emb", "image"), "image_path")
    settings = {"kind": "image", "fingerprint": {"encoder": "e"}, "shard_rows": 2}
    import_embeddings(embeddings, tmp_path / "whole", **settings)
    wrote = []
    real = StoreWriter.write

    def dies(self, shard, *rest):
        wrote.append(shard)
        if len(wrote) == 3:
            raise KeyboardInterrupt
        real(self, shard, *rest)

    monkeypatch.setattr(StoreWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        import_embeddings(embeddings, tmp_path / "out", **settings)
    store = import_embeddings(embeddings, tmp_path / "out", **settings)
    assert wrote == [0, 1, 2, 2, 3, 4]
    assert store.keys.to_pylist() == keys and np.array_equal(all_features(store), images)


def test_tensors_with_keys_and_tensors_with_a_file_of_keys(tmp_path):
    parts = [torch.randn(3, 4), torch.randn(2, 4).bfloat16()]
    keys = ["a", "a", "b", "b", "c"]
    for name, wrap in (("dicts", True), ("plain", False)):
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            content = {"embeddings": part, "keys": keys[3 * number : 3 * number + len(part)]} if wrap else part
            torch.save(content, tmp_path / name / f"{number}.pt")
    (tmp_path / "keys.txt").write_text("\n".join(keys) + "\n")
    values = torch.cat([part.float() for part in parts]).half().numpy()
    stores = [
        imported(embeddings=str(tmp_path / "dicts"), kind="caption", output=str(tmp_path / "o1"), shard_rows=2),
        imported(embeddings=str(tmp_path / "plain"), kind="caption", output=str(tmp_path / "o2"), keys=str(tmp_path / "keys.txt")),
    ]
    for store in stores:
        assert store.keys.to_pylist() == keys and np.array_equal(all_features(store), values)
        assert store.key_table["item"].to_pylist() == [0, 1, 0, 1, 0]  # the third and fourth are of one sample, over two files
    with pytest.raises(DataError, match="--keys"):
        imported(embeddings=str(tmp_path / "plain"), kind="caption", output=str(tmp_path / "o3"))
    for lines, message in ((4, "4 keys for 5"), (6, "6 keys for 5")):
        (tmp_path / "wrong.txt").write_text("k\n" * lines)
        with pytest.raises(DataError, match=message):
            imported(embeddings=str(tmp_path / "plain"), kind="image", output=str(tmp_path / f"o{lines}"), keys=str(tmp_path / "wrong.txt"))


def test_rows_without_key_or_finite_features_are_rejected(tmp_path):
    (tmp_path / "p").mkdir()
    rows = torch.tensor([[1.0, 2.0], [3.0, float("inf")], [5.0, 6.0], [0.0, 0.0]])
    torch.save({"embeddings": rows, "keys": ["a", "b", None, "d"]}, tmp_path / "p" / "0.pt")
    store = imported(embeddings=str(tmp_path / "p"), kind="image", output=str(tmp_path / "out"))
    assert store.keys.to_pylist() == ["a"]
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert {(r["key"], r["code"]) for r in rejects} == {("", "key_missing"), ("b", "nonfinite_feature"), ("d", "zero_feature")}


def test_folders_that_are_not_whole_are_refused(tmp_path):
    def refused(message, error=DataError, **given):
        with pytest.raises(error, match=message):
            imported(**{"embeddings": str(tmp_path / "emb"), "kind": "image", "output": str(tmp_path / "out"), **given})

    refused("has neither")
    clip_retrieval(tmp_path / "emb", sizes=(2, 2, 2))
    refused("no column 'url'", key_column="url")
    metadata = tmp_path / "emb" / "metadata" / "metadata_2.parquet"
    pq.write_table(pa.table({"image_path": ["a"]}), metadata)
    refused("1 rows for 2 embeddings")
    metadata.write_bytes(b"no parquet")
    refused("cannot be read", DamagedError)
    metadata.unlink()
    refused("metadata_2.parquet is not there")
    clip_retrieval(tmp_path / "gap", sizes=(2, 2, 2))
    (tmp_path / "gap" / "img_emb" / "img_emb_1.npy").unlink()
    refused("not number 1", embeddings=str(tmp_path / "gap"))
    np.save(tmp_path / "gap" / "img_emb" / "img_emb_1.npy", np.zeros((2, 7), dtype=np.float16))
    refused("expected \\(rows, 6\\)", embeddings=str(tmp_path / "gap"))
    np.save(tmp_path / "gap" / "img_emb" / "img_emb_1.npy", np.array([{"a": 1}], dtype=object))
    refused("not a plain .npy", DamagedError, embeddings=str(tmp_path / "gap"))
    (tmp_path / "odd").mkdir()
    torch.save({"vectors": torch.zeros(2, 2)}, tmp_path / "odd" / "0.pt")
    refused('a dict with "embeddings"', embeddings=str(tmp_path / "odd"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one"),
        ({"heads": "a", "projector": "b", "output": "c"}, "exactly one"),
        ({"heads": "a"}, "is needed"),
        ({"model": "a", "to_published": "b", "output": "c"}, "is needed"),
        ({"to_published": "b"}, "--model"),
        ({"embeddings": "a", "output": "b"}, "--encoder-name"),
        ({"heads": "a", "output": "b", "base": "c", "vision": "d"}, "leave them out"),
        ({"projector": "a", "output": "b", "vision": "d"}, "go with --heads"),
        ({"embeddings": "a", "output": "b", "kind": "image", "encoder_name": "e", "stated": ("x",)}, "FIELD=VALUE"),
        ({"heads": "a", "output": "b", "text": "c", "trust_remote_code": True}, "pinned"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        ConvertConfig(**given)


def test_imported_stores_train_a_model_without_encoders(tmp_path):
    """Images and captions imported from one folder pair up by key, and what is trained on them aligns such features."""
    from align.training.pairs import open_pairs

    keys, _, _ = clip_retrieval(tmp_path / "emb", sizes=(5, 4))
    for kind in ("image", "caption"):
        imported(embeddings=str(tmp_path / "emb"), kind=kind, output=str(tmp_path / kind), shard_rows=3)
    pairs = open_pairs((str(tmp_path / "image"),), (str(tmp_path / "caption"),))
    assert len(pairs) == len(keys) and pairs.unpaired == 0
    header = json.loads((tmp_path / "image" / "store.json").read_text())
    assert header["loader"] == {}
    model = SailModel(SailConfig(vision=header["loader"], vision_width=6, text_width=6, width=4, head="linear")).initialize(0)
    assert normalize(model.project_image(torch.randn(2, 6)), dim=-1).shape == (2, 4)
