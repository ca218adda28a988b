"""Encode images and captions once with frozen encoders, into feature stores that training reads.

    accelerate launch align/encode.py --config align/recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 align/encode.py --data 'cc3m/*.tar' --output features/cc3m \
        --vision facebook/dinov2-large --text Alibaba-NLP/gte-large-en-v1.5 --captions raw long
    python align/encode.py --config recipe.yaml --dry-run          # rows, disk and settings, nothing encoded
    python align/encode.py --config recipe.yaml --verify           # compare every byte with its committed hash

Interrupted runs resume with the same command: only missing shards are encoded. SLURM array tasks or several hosts share the work if
they have the same `--job` name and see the same `--output`.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from align.common.commandline import run, set_up
from align.common.console import Progress
from align.common.errors import UsageError
from align.common.files import human_bytes, remove_temporaries, require_free
from align.common.hardware import choose_device, resolve_precision
from align.common.locks import Lease, new_job
from align.features.config import EncodeConfig

if TYPE_CHECKING:
    from accelerate import PartialState
    from rich.console import Console

    from align.features.extract import Extraction

MAX_SHARD_BYTES = 2 << 30  # memory of one shard of tokens while it is collected


def main(config: EncodeConfig) -> None:
    """Plan, load the encoders, encode what is missing, report what was rejected."""
    from accelerate import PartialState

    state = PartialState(cpu=choose_device().type == "cpu")
    console = set_up(quiet=not state.is_main_process)
    job = planned(config, state)
    size = job.predicted_bytes()
    console.print(
        f"{job.plan.rows} samples in {len(job.plan.shards)} shards, {len(job.pending())} to encode ({human_bytes(size)}) "
        f"into {config.output}, on {state.num_processes} process(es)"
    )
    if config.verify:
        verify(job, console)
        return
    require_free(job.output, size)  # all stores together
    if config.feature == "tokens":
        require_small_shards(config.shard_rows, max(writer.header.width for writer in job.writers))
    if config.dry_run:
        return
    encode(job, config.job, state, console)
    if not state.is_main_process:
        return
    if not job.pending():
        report(job, console)
    elif config.job:
        console.print("this worker is done; other workers of the job still have shards")
    else:
        raise UsageError(f"{config.output}: some shards are not committed; run the same command again")


def planned(config: EncodeConfig, state: "PartialState") -> "Extraction":
    """Return the job: the plan, which the first process makes and saves for all, and the encoders, None if not requested."""
    from align.encoders.text import load_text_encoder
    from align.encoders.vision import load_vision_encoder
    from align.features.extract import Extraction, Stopping
    from align.sources.gate import Limits
    from align.sources.plan import Plan, plan

    source, folder = config.source(config.data), Path(config.output)
    if state.is_main_process:
        plan(source, config.shard_rows, config.captions).keep(folder, "files, columns or --shard-rows")
    state.wait_for_everyone()
    vision, text = config.encoders(resolve_precision(config.precision, state.device))
    return Extraction(
        source, Plan.load(folder), folder, vision=load_vision_encoder(vision, state.device) if vision else None,
        text=load_text_encoder(text, state.device) if text else None, columns=config.captions, batch_size=config.batch_size,
        text_batch_size=config.text_batch_size, workers=config.workers, limits=Limits(max_pixels=config.max_pixels),
        stopping=Stopping(config.max_reject_fraction, config.max_rejects_in_a_row),
    )  # fmt: skip


def require_small_shards(shard_rows: int, width: int) -> None:
    """Raise UsageError if a shard of tokens needs too much memory."""
    size = 4 * shard_rows * width
    if size > MAX_SHARD_BYTES:
        raise UsageError(
            f"--shard-rows {shard_rows}: a shard of tokens would take {human_bytes(size)} of memory, at most "
            f"{human_bytes(MAX_SHARD_BYTES)} is allowed; give --shard-rows {shard_rows * MAX_SHARD_BYTES // size} or less"
        )


def encode(job: "Extraction", name: str | None, state: "PartialState", console: "Console") -> None:
    """Encode and commit what is missing. Workers with the same `name` share the work; without a name this launch works alone."""
    from accelerate.utils import broadcast_object_list

    names = [name or new_job()]
    broadcast_object_list(names)
    with Lease(job.output, str(names[0])) as lease:
        if state.is_main_process and not name:
            remove_temporaries(job.output)
            for writer in job.writers:
                writer.clean()
        state.wait_for_everyone()
        rows = sum(job.plan.lengths[shard] for shard in job.pending())
        job.run(lease, Progress(console, "encoded samples", rows, workers=state.num_processes))
        state.wait_for_everyone()


def verify(job: "Extraction", console: "Console") -> None:
    """Compare every byte of the stores with its committed hash."""
    from align.features.store import FeatureStore

    for writer in job.writers:
        FeatureStore(writer.folder).verify()
        console.print(f"{writer.folder}: every byte as committed")


def report(job: "Extraction", console: "Console") -> None:
    """Write and count the rejects; print the size of each store."""
    from align.features.store import FeatureStore

    counts = Counter(job.finish()["code"].to_pylist())
    summary = ", ".join(f"{code} {count}" for code, count in counts.most_common()) or "none"
    console.print(f"rejected: {summary} (each in rejects.parquet)")
    for writer in job.writers:
        store = FeatureStore(writer.folder)
        console.print(f"{writer.folder}: {len(store)} x {store.width} features, {human_bytes(store.nbytes)}")


if __name__ == "__main__":
    run(main, EncodeConfig, "encode")
