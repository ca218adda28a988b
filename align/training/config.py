"""Settings of align/train.py. Every field is a flag; values are checked when the object is created."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from align.common.checks import check, check_least, check_share
from align.common.hardware import Precision
from align.encoders.config import EncoderFlags
from align.sources.config import SourceFlags

Positives = Literal["diagonal", "same_key", "same_caption"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EncoderFlags, SourceFlags):
    """Train alignment heads on feature stores (--images), or with encoders in the loop (--data, with encoder and source flags)."""

    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {
        **EncoderFlags.REPLACES,
        "epochs": ("steps",),
        "steps": ("epochs",),
        "images": ("data", "vision", "vision_revision", "text", "text_revision", "augment", "val_data"),
        "data": ("images", "val_images", "val_captions", "start"),
        "val_rows": ("val_images", "val_captions", "val_data"),
        "val_images": ("val_rows", "val_data"),
        "val_data": ("val_rows", "val_images", "val_captions"),
    }

    captions: tuple[str, ...]
    """Caption slots: each gives every image one positive. A slot is one caption store per data set, joined by '+', or a caption
    column of --data. If a store has several captions per image, one is sampled at each step; list it twice to sample two."""
    output: str
    """Run folder."""
    images: tuple[str, ...] = ()
    """Image stores, one per data set."""
    data: str | None = None
    """Images and captions instead of stores: a folder, a file or a quoted glob. They are encoded anew in every step."""
    augment: bool = False
    """With --data: random crop of 20 to 100% of the image, flip and RandAugment(2, 7), drawn anew in each epoch."""
    image_size: int | None = None
    """With --data: input side in pixels. None: the encoder's own."""
    encoder_batch_size: int = 64
    """With --data: images and captions per forward pass of the encoders."""
    max_reject_fraction: float = 0.05
    """With --data: stop if a larger share of samples is rejected."""
    val_data: str | None = None
    """With --data: validation data with the same columns. Its features are kept in memory."""
    keys: str | None = None
    """Parquet file with the samples to train on, as align/curate.py writes it (chosen.parquet). Other pairs are skipped."""
    val_images: str | None = None
    """Image store for validation retrieval."""
    val_captions: tuple[str, ...] = ()
    """Caption stores for validation retrieval. All captions are used."""
    val_rows: int = 0
    """Without --val-images: images to hold out for validation, with all their pairs, chosen by the seed."""
    val_apart: float | None = None
    """With stores: leave out training pairs whose image features have at least this cosine with those of a held-out image. They are
    near-duplicates, such as frames of one video. What is near depends on the encoder: try 0.95."""
    val_limit: int = 5000
    """Maximum number of validation images."""
    head: Literal["linear", "mlp", "glu", "sharelock", "token"] = "glu"
    """Type of both heads. sharelock: vision identity, text MLP. token: freeze-align's, for --data or stores of --feature tokens."""
    expansion: int | None = None
    """Hidden width divided by input width, for mlp and glu heads. None: the head's default (mlp 4, glu 8)."""
    dropout: float | None = None
    """Dropout of heads that have one. None: the head's default."""
    width: int = 1024
    """Aligned width E. With sharelock: the vision feature width."""
    start: Literal["random", "cca"] = "random"
    """Initial weights. random: Xavier. cca: for linear heads on stores, in closed form from canonical correlations of the training
    pairs. It takes seconds, and with few pairs the trained heads are better."""
    loss: Literal["sigmoid", "infonce"] = "sigmoid"
    """Contrastive loss over all pairs of the global batch."""
    reduction: Literal["mean", "sum_over_batch"] = "mean"
    """Divide the sigmoid loss by B^2 (mean, SAIL) or by B (sum_over_batch, SigLIP). This matters with AdamW, not with Lion."""
    positives: Positives = "diagonal"
    """Rows of a batch that are positives of each other. diagonal: none. same_key: rows with the same sample key, in any data set.
    same_caption: also rows whose captions in a slot have the same words."""
    feature_dropout: float = 0.0
    """Share of the frozen feature values set to 0 before the heads, drawn anew in each step; for every type of head."""
    log_scale: float = 2.995732273553991
    """Initial ln t (ln 20)."""
    log_scale_range: tuple[float, float] = (0.0, 4.605170185988092)
    """Bounds of ln t after each step (0 to ln 100). Temperature is 1 / t."""
    bias: float = -10.0
    """Initial b of the sigmoid loss; InfoNCE has none."""
    batch_size: int = 32768
    """Pairs in the global batch, over all processes."""
    accumulate: int = 1
    """Pieces in which each process computes its share. The result equals the whole batch; embeddings are computed twice."""
    epochs: float | None = None
    """Length of the run in passes over the data. Give this or --steps."""
    steps: int | None = None
    """Length of the run in batches. Give this or --epochs."""
    optimizer: Literal["lion", "adamw"] = "lion"
    """Lion (lion-pytorch) or AdamW."""
    lr: float = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Momentum factors."""
    weight_decay: float = 1e-7
    """Decoupled weight decay, on matrices only."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly."""
    min_lr: float = 0.0
    """Final learning rate of the cosine schedule."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm to this."""
    precision: Precision = "auto"
    """Autocast of the heads' matrix products (auto: bf16 if the hardware has it). Weights, loss and optimizer stay fp32."""
    tile: int = 1024
    """Side of the loss tiles; memory is O(tile^2 + B E). 1024 is fastest on a CPU; on a GPU try 4096."""
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
    """Stop after this many non-finite steps in a row."""
    report_to: tuple[Literal["trackio", "wandb"], ...] = ()
    """Trackers beside TensorBoard and JSON lines."""
    embed_encoders: bool = False
    """Copy the encoders into the saved model folder, so that it can be moved anywhere."""
    dry_run: bool = False
    """Check data, sizes and settings, and estimate memory; train nothing."""

    def __post_init__(self) -> None:
        check((self.epochs is None) != (self.steps is None), f"--epochs {self.epochs} --steps {self.steps}", "give exactly one")
        check((self.epochs or self.steps or 0) > 0, f"--epochs {self.epochs} --steps {self.steps}", "must be above 0")
        check(bool(self.captions), "no --captions", "name caption stores, or caption columns of --data")
        check(bool(self.images) != bool(self.data), f"--images {self.images} --data {self.data}", "give stores or data, exactly one")
        self._check_online()
        linear = self.head == "linear" and not self.data
        check(self.start == "random" or linear, f"--start {self.start} --head {self.head}", "cca needs --head linear and --images")
        check(0 <= self.feature_dropout < 1, f"--feature-dropout {self.feature_dropout}", "must lie in [0, 1)")
        check(self.batch_size >= 2, f"--batch-size {self.batch_size}", "a contrastive loss needs at least 2 pairs")
        check_least(self, accumulate=1, tile=1, val_rows=0, val_limit=1, log_every=1, val_every=1, save_every=1)
        check(0 <= self.warmup < 1, f"--warmup {self.warmup}", "is a share of the steps in [0, 1)")
        low, high = self.log_scale_range
        check(low <= self.log_scale <= high, f"--log-scale {self.log_scale}", f"must lie in --log-scale-range {low} {high}")
        check(self.lr > 0 and 0 <= self.min_lr <= self.lr, f"--lr {self.lr} --min-lr {self.min_lr}", "need 0 <= min-lr <= lr, lr > 0")
        check(bool(self.val_images) == bool(self.val_captions), "--val-images and --val-captions", "give both or neither")
        given = [bool(self.val_rows), bool(self.val_images), bool(self.val_data)]
        if self.val_apart is not None:
            check(0 < self.val_apart <= 1, f"--val-apart {self.val_apart}", "is a cosine above 0, at most 1")
            allowed = "needs --images, and --val-rows or --val-images"
            check(not self.data and any(given), f"--val-apart {self.val_apart}", allowed)
        check(sum(given) <= 1, "--val-rows, --val-images and --val-data", "give at most one of them")
        check(self.keep >= 1, f"--keep {self.keep}", "must be at least 1: the run must be able to resume")

    def _check_online(self) -> None:
        """With --data, require both encoders. Without it, refuse the flags that need it."""
        if self.data:
            check(bool(self.vision and self.text), f"--data with --vision {self.vision} --text {self.text}", "name both encoders")
            check(not self.val_images, "--data with --val-images", "validate on --val-rows or --val-data")
            check_least(self, encoder_batch_size=1, workers=0)
            check_share("max-reject-fraction", self.max_reject_fraction)
            return
        foreign = [f"--{name.replace('_', '-')}" for name in ("vision", "text", "augment", "val_data") if getattr(self, name)]
        check(not foreign, f"{', '.join(foreign)} without --data", "stores hold features of encoders that ran before: leave it out")
