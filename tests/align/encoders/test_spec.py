"""What describes an encoder: the same object for flags, stores, models and loaders."""

import subprocess
import sys
from dataclasses import replace

import pytest

from align.common.errors import UsageError
from align.encoders.spec import EncoderSpec, TextSpec, VisionSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# what stores and models of earlier versions hold, fields in any number
VISION = {"name": "owner/vit", "revision": COMMIT, "feature": "cls", "layer": 3, "image_size": 70}
TEXT = {"name": "owner/bert", "revision": None, "prompt": "the ", "max_length": 9, "feature": "tokens", "layer": 2}


@pytest.mark.parametrize(("kind", "stored"), [(VisionSpec, VISION), (TextSpec, TEXT)])
def test_what_is_stored_opens_the_same_encoder_again(kind, stored):
    spec = kind(**stored, precision="bf16", trust_remote_code=True)
    assert spec.stored() == stored
    assert kind(**spec.stored(), precision="bf16", trust_remote_code=True) == spec
    assert kind(name="owner/old") == kind("owner/old") and kind("owner/old").revision is None


@pytest.mark.parametrize(
    ("name", "revision", "asked", "may"),
    [
        ("owner/model", None, True, False),
        ("owner/model", "main", True, False),
        ("owner/model", COMMIT, True, True),
        ("owner/model", COMMIT, False, False),
        ("{folder}", None, True, True),
        ("{folder}", None, False, False),
    ],
)
def test_transformers_is_told_to_run_code_only_of_a_pinned_commit_or_a_local_folder(tmp_path, name, revision, asked, may):
    spec = EncoderSpec(name.format(folder=tmp_path), revision, trust_remote_code=asked)
    assert spec.from_pretrained == {"revision": revision, "trust_remote_code": may}


def test_an_unknown_precision_is_refused_when_the_spec_is_made():
    with pytest.raises(UsageError, match="'fp16' is unknown: allowed: fp32, bf16"):
        replace(VisionSpec("v"), precision="fp16")


def test_settings_are_given_by_name():
    with pytest.raises(TypeError):
        VisionSpec("owner/vit", COMMIT, "bf16")  # type: ignore[misc]


def test_configs_can_describe_encoders_without_loading_torch():
    code = "import sys\nfrom align.encoders.spec import VisionSpec\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
