"""What each entry of `align` can be told: frozen dataclasses, checked when they are made. Every field is a flag."""

from dataclasses import dataclass
from typing import Literal

from align.errors import UsageError
from align.hardware import Precision


def _check(condition: bool, given: str, allowed: str) -> None:
    if not condition:
        raise UsageError(f"{given}: {allowed}")


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
            ("mllm_pretrain", 0),
            ("mllm_instruct", 0),
            ("mllm_test", 0),
            ("workers", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        few = "is 0 (all) or at least 16: scenes need sprites whose names share no word"
        _check(self.mllm_sprites == 0 or self.mllm_sprites >= 16, f"--mllm-sprites {self.mllm_sprites}", few)


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
    feature: Literal["auto", "cls_mean", "cls", "mean"] = "auto"
    """What is pooled: [cls ; mean of patches], one of them, or whichever of cls_mean and mean the encoder has."""
    layer: int = -1
    """Layer to take features from; -1 is the last, k the output of block k (final norm applied)."""
    image_size: int | None = None
    """Input side in pixels, if not the encoder's own."""
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
    """Run code that ships with a hub model, of those encoders whose revision is pinned."""
    vision_revision: str | None = None
    """Commit of the vision encoder on the hub."""
    text_revision: str | None = None
    """Commit of the text encoder on the hub."""

    def __post_init__(self) -> None:
        _check(bool(self.vision or self.text), "neither --vision nor --text", "name at least one encoder")
        _check(bool(self.text) == bool(self.captions), f"--text {self.text} with --captions {self.captions}", "give both or neither")
        _check(len(set(self.captions)) == len(self.captions), f"--captions {self.captions}", "name each column once")
        _check(min(self.batch_size, self.text_batch_size, self.shard_rows) >= 1, "batch and shard sizes", "must be at least 1")
        _check(self.workers >= 0, f"--workers {self.workers}", "must be 0 or more")
        _check(0 <= self.max_reject_fraction <= 1, f"--max-reject-fraction {self.max_reject_fraction}", "must lie in 0..1")
        pinned = self.vision_revision or self.text_revision
        _check(not self.trust_remote_code or bool(pinned), "--trust-remote-code", "needs --vision-revision or --text-revision pinned")


@dataclass(frozen=True)
class TrainConfig:
    """Train alignment heads on feature stores."""

    images: tuple[str, ...]
    """Image stores, one per data set."""
    captions: tuple[str, ...]
    """Caption slots: each is one caption store per data set, joined by '+'. Each slot gives every image one positive; a
    store with several captions a key gives another one each step, and listed twice it gives two different ones."""
    output: str
    """Run folder."""
    val_images: str | None = None
    """Image store for validation retrieval."""
    val_captions: tuple[str, ...] = ()
    """Caption stores for validation retrieval; all their captions count."""
    val_rows: int = 0
    """Without --val-images: hold this many pairs of the training stores out for validation, chosen by the seed."""
    val_limit: int = 5000
    """Validate on at most so many images."""
    head: Literal["linear", "mlp", "glu", "sharelock"] = "glu"
    """Kind of both heads (`sharelock`: vision identity, text MLP)."""
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
    log_scale: float = 2.995732273553991
    """Initial ln t (ln 20); clamped to [0, ln 100]."""
    bias: float = -10.0
    """Initial b of the sigmoid loss."""
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
        _check((self.epochs is None) != (self.steps is None), f"--epochs {self.epochs} --steps {self.steps}", "give exactly one")
        _check((self.epochs or self.steps or 0) > 0, f"--epochs {self.epochs} --steps {self.steps}", "must be above 0")
        _check(bool(self.images) and bool(self.captions), "no --images or no --captions", "both are needed")
        _check(self.batch_size >= 2, f"--batch-size {self.batch_size}", "a contrastive loss needs at least 2 pairs")
        _check(self.accumulate >= 1 and self.tile >= 1, f"--accumulate {self.accumulate} --tile {self.tile}", "must be at least 1")
        _check(0 <= self.warmup < 1, f"--warmup {self.warmup}", "is a share of the steps in [0, 1)")
        _check(self.lr > 0 and 0 <= self.min_lr <= self.lr, f"--lr {self.lr} --min-lr {self.min_lr}", "need 0 <= min-lr <= lr, lr > 0")
        _check(bool(self.val_images) == bool(self.val_captions), "--val-images and --val-captions", "give both or neither")
        _check(self.val_rows >= 0, f"--val-rows {self.val_rows}", "must be at least 0")
        _check(not (self.val_rows and self.val_images), "--val-rows and --val-images", "give at most one of them")
        _check(self.keep >= 1, f"--keep {self.keep}", "must be at least 1: the run must be able to resume")
        _check(min(self.log_every, self.val_every, self.save_every) >= 1, "--log-every, --val-every, --save-every", "must be at least 1")
