"""What align/curate.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass
from typing import Literal

from align.common.checks import check, check_least


@dataclass(frozen=True)
class CurateConfig:
    """Choose training pairs so that many concepts are covered evenly, from more candidates than one wants to train on."""

    candidates: tuple[str, ...]
    """Feature stores to choose from, all of captions or all of images, made by one encoder."""
    output: str
    """Folder for chosen.parquet, the coverage report and the lists that scoring leaves."""
    concepts: str | None = None
    """Text file with one concept name a line; give this or --concept-store."""
    templates: tuple[str, ...] = ("a photo of a {c}.",)
    """Texts in which `{c}` stands for a concept's name; several are averaged."""
    concept_store: str | None = None
    """Feature store of labelled samples (a few shots a concept): a concept is the mean of its rows."""
    concept_labels: str | None = None
    """A .parquet or .csv with the columns key and label, for --concept-store."""
    concepts_from_evaluation: str | None = None
    """Name of the evaluation set whose classes the concepts are. It is written wherever the result goes; known sets are noticed anyway."""
    model: str | None = None
    """Aligned model folder that takes features to the shared space, so that text concepts can score images (or shots captions)."""
    top: int = 50000
    """Best candidates kept a concept (M): 12 bytes each, and an eighth more."""
    per_concept: int = 2000
    """Samples a concept gets at most."""
    duplicates: Literal["keep", "identical", "near"] = "keep"
    """Leave out samples whose features are identical to a chosen one's, or those and near ones within a concept."""
    duplicate_cosine: float = 0.95
    """Cosine from which two samples are near-duplicates."""
    images: tuple[str, ...] = ()
    """Image stores in which duplicates and excluded samples are looked for, one for each of --candidates. None: in the candidates."""
    exclude: tuple[str, ...] = ()
    """Stores of an evaluation set (same encoder as --images, or as the candidates): what is close to one of their rows is left out."""
    exclude_cosine: float = 0.95
    """Cosine from which a sample is close to an excluded one."""
    parts: int = 1
    """Split scoring into so many parts, each with lists of its own; without --part, those that are missing are scored and all joined."""
    part: int | None = None
    """Score only this part (from 0), then stop. One process a part, on any host that sees --output."""
    save_every: int = 64
    """Shards of a part between commits of its lists; an interrupted run repeats at most so many."""
    text_batch_size: int = 64
    """Concept prompts a forward pass."""
    trust_remote_code: bool = False
    """Run code that ships with the text encoder of the candidates or of --model: a local folder, or pinned to a commit when it encoded."""
    dry_run: bool = False
    """Check stores and concepts, state memory and work, score nothing."""

    def __post_init__(self) -> None:
        check(bool(self.candidates), "no --candidates", "name at least one feature store")
        check((self.concepts is None) != (self.concept_store is None), "--concepts and --concept-store", "give exactly one of them")
        check((self.concept_store is None) == (self.concept_labels is None), "--concept-store, --concept-labels", "give both or neither")
        wrong = [template for template in self.templates if "{c}" not in template]
        check(bool(self.templates) and not wrong, f"--templates {wrong or 'without a text'}", "each must hold {c}")
        check(1 <= self.per_concept <= self.top, f"--per-concept {self.per_concept} --top {self.top}", "need 1 <= per-concept <= top")
        check_least(self, save_every=1, text_batch_size=1, parts=1)
        check(self.part is None or 0 <= self.part < self.parts, f"--part {self.part} --parts {self.parts}", "parts count from 0")
        for name, value in (("duplicate", self.duplicate_cosine), ("exclude", self.exclude_cosine)):
            check(0 < value <= 1, f"--{name}-cosine {value}", "must lie in (0, 1]")
        check(len(self.images) in (0, len(self.candidates)), f"{len(self.images)} --images", f"give none or {len(self.candidates)}")
