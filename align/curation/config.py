"""Flags of align/curate.py, checked when the config is made."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from align.common.checks import check, check_least

TOP, PER_CONCEPT = 50_000, 2_000  # scaled down where the data is small


@dataclass(frozen=True)
class CurateConfig:
    """Choose training pairs from more candidates than you need, so that many concepts are covered evenly."""

    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {"concepts": ("concept_store", "concept_labels"), "concept_store": ("concepts",)}

    candidates: tuple[str, ...]
    """Feature stores to choose from, made by one encoder: all of captions or all of images."""
    output: str
    """Folder for chosen.parquet, the coverage report and the scored lists."""
    concepts: str | None = None
    """Text file with one concept name per line. Give this or --concept-store."""
    templates: tuple[str, ...] = ("a photo of a {c}.",)
    """Texts in which `{c}` stands for a concept's name. Several are averaged."""
    concept_store: str | None = None
    """Feature store of labelled samples (a few shots per concept). A concept is the mean of its rows."""
    concept_labels: str | None = None
    """A .parquet or .csv with the columns key and label, for --concept-store."""
    concepts_from_evaluation: str | None = None
    """Evaluation set whose classes are the concepts. All results name it. Known sets are noticed without this flag."""
    model: str | None = None
    """Aligned model folder that projects features into the shared space, so that text concepts can score images (or shots captions)."""
    top: int = TOP
    """Best candidates kept per concept (M). Each takes 12 bytes, plus an eighth. The default is a quarter of fewer candidates."""
    per_concept: int = PER_CONCEPT
    """Maximum number of samples per concept. By default concepts share at most half of the candidates."""
    duplicates: Literal["keep", "identical", "near"] = "keep"
    """identical: skip samples with the same features as a chosen one. near: also skip near-duplicates within a concept."""
    duplicate_cosine: float = 0.95
    """Cosine from which two samples are near-duplicates."""
    images: tuple[str, ...] = ()
    """Image stores to find duplicates and excluded samples in, one for each of --candidates. Without them, the candidates are compared."""
    exclude: tuple[str, ...] = ()
    """Stores of an evaluation set, from the encoder of --images or the candidates. Samples close to one of their rows are skipped."""
    exclude_cosine: float = 0.95
    """Cosine from which a sample is close to an excluded one."""
    parts: int = 1
    """Split scoring into this many parts with their own lists. Without --part, missing parts are scored and all are joined."""
    part: int | None = None
    """Score only this part (from 0), then stop. Run one process per part, on any host that sees --output."""
    save_every: int = 64
    """Shards between commits of a part's lists. An interrupted run repeats at most this many."""
    text_batch_size: int = 64
    """Concept prompts per forward pass."""
    trust_remote_code: bool = False
    """Run code that ships with the text encoder of the candidates or --model: a local folder, or the commit pinned when it encoded."""
    dry_run: bool = False
    """Check stores and concepts, print memory and work, score nothing."""

    def __post_init__(self) -> None:
        check(bool(self.candidates), "no --candidates", "name at least one feature store")
        check((self.concepts is None) != (self.concept_store is None), "--concepts and --concept-store", "give exactly one of them")
        check((self.concept_store is None) == (self.concept_labels is None), "--concept-store, --concept-labels", "give both or neither")
        wrong = [template for template in self.templates if "{c}" not in template]
        check(bool(self.templates) and not wrong, f"--templates {wrong or 'without a text'}", "each must hold {c}")
        fits = self.per_concept <= self.top or self.per_concept == PER_CONCEPT
        check(
            fits and min(self.per_concept, self.top) >= 1,
            f"--per-concept {self.per_concept} --top {self.top}",
            "need 1 <= per-concept <= top",
        )
        check_least(self, save_every=1, text_batch_size=1, parts=1)
        check(self.part is None or 0 <= self.part < self.parts, f"--part {self.part} --parts {self.parts}", "parts count from 0")
        for name, value in (("duplicate", self.duplicate_cosine), ("exclude", self.exclude_cosine)):
            check(0 < value <= 1, f"--{name}-cosine {value}", "must lie in (0, 1]")
        check(len(self.images) in (0, len(self.candidates)), f"{len(self.images)} --images", f"give none or {len(self.candidates)}")
