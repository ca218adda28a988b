"""A text encoder that brings its own code, as GTE-large of SAIL-L does: refused until asked for, then the whole line works."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from align.assessment.candidates import folder_name
from align.assessment.config import AssessConfig
from align.common.errors import UsageError
from align.curation.pool import CandidatePool
from align.curation.scoring import ConceptSpace
from align.encoders.spec import TextSpec
from align.encoders.text import load_text_encoder
from align.encoders.trust import split_revision
from align.encoders.vision import load_vision_encoder
from align.features.config import EncodeConfig
from align.features.store import StoreHeader
from align.features.writer import StoreWriter
from align.model.config import ConvertConfig
from align.model.dual_encoder import SailConfig, SailModel
from align.model.saving import save_model
from eval.models.measured import load_models
from tests.support.tiny_encoders import save, save_bert

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from transformers import BertConfig, BertModel

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertModel):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A plain Hugging Face folder of a tiny BERT whose classes ship with it."""
    folder = Path(save_bert(tmp_path_factory.mktemp("own"))[1])
    (folder / "code.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.OwnConfig", "AutoModel": "code.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": auto}))
    return str(folder)


@pytest.fixture(scope="module")
def aligned(own, tmp_path_factory):
    """A model folder aligned with that encoder."""
    folder = tmp_path_factory.mktemp("aligned")
    image = load_vision_encoder(vision := str(save(folder / "vision", "dinov2")))
    text = load_text_encoder(TextSpec(own, trust_remote_code=True))
    settings = SailConfig(
        vision={"name": vision}, text={"name": own, "revision": None}, width=8, head="linear", vision_fingerprint=image.fingerprint,
        text_fingerprint=text.fingerprint, vision_width=image.feature_width, text_width=text.width,
    )  # fmt: skip
    text.tokenizer.save_pretrained(folder / "tokenizer")
    save_model(SailModel(settings).initialize(0), folder / "model", folder / "tokenizer")
    return folder / "model"


def test_its_code_runs_only_when_asked_for(own):
    with pytest.raises(UsageError, match="code of its own.*--trust-remote-code"):
        load_text_encoder(own)
    encoder = load_text_encoder(TextSpec(own, trust_remote_code=True))
    assert type(encoder.model[0].auto_model).__name__ == "OwnModel"
    assert encoder.encode(["a dog"], 1).shape == (1, encoder.width)


def test_a_model_aligned_with_it_is_measured_when_asked_for(aligned):
    with pytest.raises(UsageError, match="--trust-remote-code"):
        _ = load_models([str(aligned)], "cpu")[0].model.text_encoder
    trained, untrained = load_models([str(aligned)], "cpu", trust_remote_code=True)
    assert trained.model.text_encoder is untrained.model.text_encoder
    assert torch.isfinite(trained.model.project_text(trained.model.text_encoder.encode(["a dog"], 1))).all()


def test_the_pipeline_passes_the_wish_on(aligned):
    classify = pipeline("zero-shot-image-classification", model=str(aligned), trust_remote_code=True)
    assert classify.model.trust_remote_code


def test_a_commit_may_stand_behind_an_id(tmp_path):
    assert split_revision(f"owner/model@{COMMIT}") == ("owner/model", COMMIT)
    assert split_revision("owner/model@main") == ("owner/model@main", None)
    assert folder_name(f"owner/model@{COMMIT}") == folder_name("owner/model")
    folder = tmp_path / f"odd@{COMMIT}"
    folder.mkdir()
    assert split_revision(str(folder)) == (str(folder), None)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"auto_map": {"AutoModel": "some-owner/new-impl--modeling.NewModel"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "some-owner/new-impl--modeling.NewModel"]}}),
        ("modules.json", [{"type": "some-owner/new-impl--modeling.NewModel", "path": ""}]),
    ],
)
def test_code_of_another_repository_is_refused(own, tmp_path, file, content):
    folder = Path(shutil.copytree(own, tmp_path / "encoder"))
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(content if isinstance(content, list) else {**before, **content}))
    with pytest.raises(UsageError, match="code of another repository.*take 'some-owner/new-impl--' out of"):
        load_text_encoder(TextSpec(str(folder), trust_remote_code=True))


def test_copies_of_the_encoders_hold_their_code(aligned, tmp_path):
    model = SailModel.from_pretrained(aligned, trust_remote_code=True)
    save_model(model, tmp_path / "whole", embed_encoders=True)
    moved = (tmp_path / "whole").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="--trust-remote-code"):
        _ = SailModel.from_pretrained(moved).text_encoder
    text = SailModel.from_pretrained(moved, trust_remote_code=True).text_encoder
    torch.testing.assert_close(text.encode(["a dog"], 1), model.text_encoder.encode(["a dog"], 1))


def test_curation_in_the_space_of_a_model_passes_the_wish_on(aligned, tmp_path):
    header = StoreHeader("image", SailModel.from_pretrained(aligned).config.vision_fingerprint, {}, 64, "plan", 1, 2)
    writer = StoreWriter(tmp_path / "images", header)
    writer.write(0, torch.ones(2, 64).numpy(), ["a", "b"], [0, 0], [])
    writer.finish()
    candidates = CandidatePool.open(str(tmp_path / "images"))
    for trusted in (False, True):
        model = SailModel.from_pretrained(aligned, trust_remote_code=trusted)
        space = ConceptSpace(candidates, model, torch.device("cpu"), texts=True)
        if trusted:
            assert space.encode_texts(["a dog"], 8, trusted).shape == (1, 8)
        else:
            with pytest.raises(UsageError, match="--trust-remote-code"):
                space.encode_texts(["a dog"], 8, trusted)


def test_assessing_refuses_an_unpinned_encoder_before_anything_is_encoded(own):
    settings = {"data": "d", "output": "o", "vision": ("v",), "captions": ("c",), "trust_remote_code": True}
    with pytest.raises(UsageError, match="pinned to a commit"):
        AssessConfig(**settings, text=("owner/model",))
    for name in (f"owner/model@{COMMIT}", own):
        assert AssessConfig(**settings, text=(name,)).trust_remote_code


@pytest.mark.parametrize("config", [EncodeConfig, ConvertConfig])
def test_asking_for_code_of_an_unpinned_encoder_is_refused(config, own):
    settings = {"output": "o", "text": "owner/model", "trust_remote_code": True}
    settings |= {"data": "d", "captions": ("txt",)} if config is EncodeConfig else {"heads": "h.pt"}
    with pytest.raises(UsageError, match="pinned to a commit .*, or one in a local folder"):
        config(**settings)
    assert config(**{**settings, "text": own}).trust_remote_code
    assert config(**settings, text_revision=COMMIT).trust_remote_code
