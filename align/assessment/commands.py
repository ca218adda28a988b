"""The commands that follow from an assessment: encode all pairs with the best candidate, train heads on them."""

import shlex
from dataclasses import fields
from pathlib import Path

from align.assessment.candidates import Candidate, folder_name
from align.assessment.config import AssessConfig
from align.encoders.trust import split_revision
from align.sources.config import SourceFlags

FEW_PAIRS = 20_000  # below, a linear head that starts in closed form; docs/LOG.md compares them on 3,500


def next_commands(config: AssessConfig, best: Candidate, pairs: int) -> list[str]:
    """Return shell commands that encode the data with the candidate and train on it.

    `pairs` are those drawn for the assessment: all that the data has, if these are fewer than --rows.
    """
    folder, few = Path(config.output) / "best", pairs < min(config.rows, FEW_PAIRS)
    encode = ["python", "align/encode.py", "--data", config.data, "--captions", *config.captions, *_encoders(config, best)]
    for field in fields(SourceFlags):
        if (value := getattr(config, field.name)) not in (field.default, None):
            encode += [f"--{field.name.replace('_', '-')}", str(value)]
    encode += [*(["--trust-remote-code"] if config.trust_remote_code else []), "--output", str(folder)]
    train = ["python", "align/train.py", *(["--config", "align/recipes/few_photos.yaml"] if few else [])]
    train += ["--images", str(folder / "images"), "--captions", *(str(folder / f"captions-{column}") for column in config.captions)]
    train += ["--val-rows", str(max(1, pairs // 10)), *([] if few else ["--batch-size", "4096", "--epochs", "50"])]
    return [shlex.join(encode), shlex.join([*train, "--output", str(folder / "run")])]


def _encoders(config: AssessConfig, best: Candidate) -> list[str]:
    """Return the flags that name both encoders as they were given, with layer and feature."""
    names = {folder_name(name): name for name in (*config.vision, *config.text)}
    text, _, layer = (best.text, "", "") if best.text in names else best.text.rpartition("-layer-")
    flags = []
    for kind, name in (("vision", best.vision), ("text", text)):
        given, revision = split_revision(names[name])
        flags += [f"--{kind}", given, *([f"--{kind}-revision", revision] if revision else [])]
    return [*flags, "--layer", str(best.layer), "--feature", best.feature, *(["--text-layer", str(int(layer))] if layer else [])]
