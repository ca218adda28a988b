"""What mllm/upgrade.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from align.common.checks import check, check_least


@dataclass(frozen=True)
class UpgradeConfig:
    """Put an aligned vision encoder into an LLM, or into an existing LLaVA: a model ready for mllm/finetune.py."""

    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {
        "llm": ("llava", "keep_tower", "gguf_file", "revision"),
        "llava": ("llm", "gguf_file", "revision"),
        "sail": ("vision", "layer"),
        "vision": ("sail",),
        "projector": ("captions", "caption_rows", "image_root", "texts", "text_columns", "text_rows", "images", "described"),
        "captions": ("projector",),
        "texts": ("projector",),
    }

    llm: str | None = None
    """Causal LLM: hub id, local folder or embedded: id. Give this or --llava."""
    llava: str | None = None
    """Hugging Face LLaVA checkpoint whose vision tower is replaced: hub id or local folder."""
    sail: tuple[str, ...] = ()
    """Stage-one run or model folder whose vision encoder and image head are used; two of them for two encoders at once."""
    vision: tuple[str, ...] = ()
    """Vision encoder without a stage-one run (only with --sail-head random or none); beside --sail it has no head."""
    keep_tower: bool = False
    """Keep the vision tower of --llava beside the new encoder; with --join sequence its projector, too."""
    join: Literal["channel", "sequence"] = "channel"
    """How two encoders join. channel: side by side on the first one's grid (or --grid), one projector sees both. sequence: the visual
    tokens of the second follow those of the first, each encoder has a projector."""
    output: str = "runs/mllm-init"
    """Folder of the assembled model."""
    sail_head: Literal["trained", "random", "none"] = "trained"
    """The head between encoder and projector: the run's, the same architecture with random weights, or none."""
    head: str = "glu"
    """Kind of a random head when there is no run to copy it from."""
    expansion: int | None = None
    """Expansion of a random head when there is no run."""
    width: int = 1024
    """Output width of a random head when there is no run."""
    layer: int = -1
    """Layer of --vision when there is no run."""
    image_aspect_ratio: Literal["pad", "resize"] = "pad"
    """Pad images to a square with the mean color (LLaVA's), or resize them without regard to their shape. Nothing is cropped."""
    image_size: tuple[int, ...] = ()
    """Side of the square input in pixels, one for all new encoders or one for each. None given: the encoder's own."""
    grid: tuple[int, int] | None = None
    """Average the patches onto this many rows and columns: fewer visual tokens. None: one token a patch."""
    place_words: bool = False
    """Write after each visual token where in the image it is ("in the top left"), which even small LLMs can read. Needs a --grid of at
    most 64 visual tokens: a place takes about four tokens itself."""
    template: Literal["auto", "plain", "vicuna_v1", "chatml", "brief", "own"] = "auto"
    """Chat template: auto keeps the tokenizer's own if it has one, else vicuna_v1; own fails if there is none. brief has no words
    for the roles, only lines of a question and its answer: for small LLMs and short answers."""
    features: Literal["head", "raw", "both"] | None = None
    """What the projector is given of each patch: the head's output, the encoder's own feature, or both side by side (two blocks, each
    normalized and with its own learning rate). None: raw with --sail-head none; both where --captions or --texts solve the projector;
    head, as in the paper, where it starts at random or from --projector."""
    captions: tuple[str, ...] = ()
    """Conversation files of captioned images: start the projector in closed form from them instead of at random: it
    then mixes each visual token of words that the LLM reads."""
    texts: tuple[str, ...] = ()
    """Text files (a text a line), tables or tars with captions that need no images, or caption stores of align/encode.py, whose features
    are then used: start the projector in closed form from them, alone or beside --captions. Only with the trained head of --sail."""
    text_columns: tuple[str, ...] = ("caption",)
    """Columns of --texts that hold texts (in a tar: suffixes, or names in its .json); .txt files have none, a store has its own."""
    text_rows: int = 1_000_000
    """How many texts of --texts are used."""
    images: str | None = None
    """Images without captions for --texts, as encode.py's --data: they show where images lie in the aligned space (1,000 are read)."""
    described: tuple[str, ...] = ()
    """Conversation files whose images are described by texts ({"text": ...} or {"regions": ...}), for mllm/finetune.py --data: texts that
    stand for images. Their vectors are written into the model's folder. Only with --texts."""
    words: int = 4_096
    """Most words that a projector solved from --captions or --texts mixes its visual tokens of: the most frequent ones."""
    projector: str | None = None
    """Safetensors file with the weights of a trained projector (align/convert.py --projector makes it from LLaVA's mm_projector.bin)."""
    image_root: str | None = None
    """Folder that the captions' image paths start from. None: the folder of each file."""
    caption_rows: int = 20_000
    """How many rows of --captions are used."""
    gguf_file: str | None = None
    """File name of GGUF weights inside --llm, converted once to plain safetensors."""
    revision: str | None = None
    """Commit of the hub repository of --llm or --llava."""
    seed: int = 0
    """Seed of the projector's and a random head's weights."""

    def __post_init__(self) -> None:
        check((self.llm is None) != (self.llava is None), f"--llm {self.llm} --llava {self.llava}", "give exactly one of them")
        self._check_encoders()
        self._read_only_with("--llm", self.llm, "gguf_file")
        self._read_only_with("--captions", self.captions or None, "image_root", "caption_rows")
        self._read_only_with("--texts", self.texts or None, "text_columns", "text_rows", "images", "described")
        check_least(self, caption_rows=1, text_rows=1, words=2)
        given = f"--projector {self.projector} --captions {' '.join(self.captions)} --texts {' '.join(self.texts)}"
        solved = bool(self.captions or self.texts)
        check(not (self.projector and solved), given, "give weights of a trained projector or data to solve it, not both")
        given = f"--texts {' '.join(self.texts)} --sail-head {self.sail_head} --features {self.features}"
        aligned = self.sail_head == "trained" and self.features != "raw"
        check(not self.texts or aligned, given, "texts reach images only through a trained head: a random one, or none, maps them nowhere")
        check(not self.texts or bool(self.captions or self.images), given, "give --images DATA or --captions, which show where images lie")
        given = f"--sail-head {self.sail_head} --features {self.features}"
        check(self.sail_head != "none" or self.features in (None, "raw"), given, "without a head the raw patch is all there is")
        check(self.features != "raw" or self.sail_head == "none", given, "raw features pass no head: give --sail-head none as well")

    def _check_encoders(self) -> None:
        """Raise UsageError if the flags do not say which one or two encoders are meant, or how they join."""
        count = len(self.sail) + len(self.vision)
        given = f"--sail {' '.join(self.sail)} --vision {' '.join(self.vision)}"
        check(count > 0, given, "give --sail RUN or --vision ENCODER")
        both, alone = f"{given}{' --keep-tower' * self.keep_tower}", count + self.keep_tower == 1
        check(count + self.keep_tower <= 2, both, "a model has one or two encoders, a tower that is kept included")
        given = f"--sail-head {self.sail_head} --vision {' '.join(self.vision)}"
        check(bool(self.sail) or self.sail_head != "trained", given, "only a run has a trained head: use random or none, or --sail RUN")
        self._read_only_with("--vision", self.vision or None, "layer")
        self._read_only_with("--vision alone", None if self.sail else self.vision, "head", "expansion", "width")
        self._read_only_with("--llava", self.llava, "keep_tower")
        self._read_only_with("two encoders (--sail A B, --sail A --vision B, --keep-tower)", None if alone else both, "join")
        given = f"--image-size {' '.join(map(str, self.image_size))} with {count} new encoder(s)"
        check(len(self.image_size) in (0, 1, count), given, "give one size for all or one for each")
        check(not self.projector or alone, f"--projector {self.projector}", "it was trained for one encoder, not two")
        bare = self.join == "sequence" and bool(self.sail and self.vision)
        given = f"--texts {' '.join(self.texts)} --join sequence --vision {' '.join(self.vision)}"
        check(not (self.texts and bare and not self.captions), given, "texts do not reach an encoder without a head: add --captions")
        given = f"--described {' '.join(self.described)} --join sequence"
        check(
            alone or self.join == "channel" or not self.described, given, "a described image has no tokens of a second encoder in sequence"
        )

    def encoders(self) -> list[dict[str, Any]]:
        """Return what to load: for each new encoder its own arguments of `load_aligned_encoder`."""
        bare = "none" if self.sail else self.sail_head
        found: list[dict[str, Any]] = [{"sail": run, "sail_head": self.sail_head} for run in self.sail]
        found += [{"vision": name, "sail_head": bare, "layer": self.layer} for name in self.vision]
        sizes = self.image_size if len(self.image_size) == len(found) else (self.image_size or (None,)) * len(found)
        return [{**one, "image_size": size} for one, size in zip(found, sizes, strict=True)]

    @property
    def raw_beside_head(self) -> bool:
        """Whether the projector is given raw patches beside the head's output."""
        solved = bool(self.captions or self.texts) and self.sail_head != "none"
        return self.features == "both" or (self.features is None and solved)

    def _read_only_with(self, flag: str, value: object, *names: str) -> None:
        """Raise UsageError if a field of `names` differs from its default while `flag`, without which nothing reads it, is not given."""
        for name in names:
            given = getattr(self, name)
            unread = value is None and given != type(self).__dataclass_fields__[name].default
            check(not unread, f"--{name.replace('_', '-')} {given}", f"has an effect only with {flag}; leave it out or give {flag}")
