"""Flags of align/prepare.py, checked when the config is made."""

from dataclasses import dataclass
from typing import Literal, get_args

from align.common.checks import check, check_least

Kind = Literal["exists", "relation", "what", "where", "count", "caption"]  # of questions
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class PrepareConfig:
    """Fetch the embedded default and write the sprite-scene data sets."""

    output: str = "runs/quickstart/data"
    """Folder to create; a finished one is verified and kept."""
    train: int = 6000
    """Training scenes."""
    val: int = 500
    """Validation scenes (same sprites, other scenes)."""
    retrieval: int = 300
    """Scenes of the retrieval task; no two show the same objects."""
    held_out: int = 150
    """Sprites that training never shows: the classes of sprites-unseen. Sprites-seen gets as many classes."""
    per_class: int = 4
    """Pictures per class in sprites-seen and sprites-unseen."""
    swapped: int = 150
    """Pairs of scenes with exchanged objects: the task sprites-swapped. 0: none."""
    segmentation: int = 40
    """Scenes with the class of every pixel, of at most 24 sprites: the task sprites-segmentation. 0: none."""
    mllm_pretrain: int = 0
    """Scenes with one caption each, to start or train an MLLM's projector. 0: none."""
    mllm_instruct: int = 0
    """Scenes with questions, answers and a caption, to tune an MLLM. 0: none."""
    mllm_described: int = 0
    """Scenes of all training sprites with questions, answers and a caption, that are described by names and boxes: no pictures are
    written. They tune an MLLM whose encoder is aligned. 0: none."""
    mllm_kinds: tuple[Kind, ...] = ()
    """Kinds of turns in conversations that tune an MLLM. None given: all."""
    mllm_test: int = 0
    """Scenes with questions that test an MLLM, and as many of sprites that stage two never shows (aligned: training scenes do;
    unseen: none does). 0: none."""
    mllm_sprites: int = 0
    """Number of training sprites in the MLLM's scenes, drawn by the seed; larger sets include smaller ones. 0: all."""
    image_size: int = 224
    """Side of the square pictures, in pixels."""
    seed: int = 0
    """Another seed gives other scenes and other held-out sprites."""
    workers: int = 0
    """Processes that render. 0: one per core. It does not change the result."""
    assets: tuple[str, ...] = ("embedded:efficientnet-lite0", "embedded:minilm")
    """Encoders to fetch too, so that later commands need no network."""
    assets_only: bool = False
    """Fetch and verify everything the tests need, render nothing."""
    cache: str | None = None
    """Folder of fetched assets; by default the user's cache."""

    def __post_init__(self) -> None:
        check_least(self, train=1, val=1, retrieval=1, held_out=1, per_class=1, swapped=0, segmentation=0, image_size=0)
        check_least(self, mllm_pretrain=0, mllm_instruct=0, mllm_described=0, mllm_test=0, mllm_sprites=0, seed=0, workers=0)
        few = "is 0 (all) or at least 16: scenes need sprites whose names share no word"
        check(self.mllm_sprites == 0 or self.mllm_sprites >= 16, f"--mllm-sprites {self.mllm_sprites}", few)
