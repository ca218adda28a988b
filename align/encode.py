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

from align.common.errors import UsageError
from align.common.files import human_bytes, require_free
from align.common.hardware import choose_device, resolve_precision
from align.common.locks import Lease, new_job
from align.features.config import EncodeConfig
from align.runtime.commandline import run, set_up
from align.runtime.console import Progress

if TYPE_CHECKING:
    from accelerate import PartialState
    from rich.console import Console

    from align.features.extract import Extraction

MAX_SHARD_BYTES = 2 << 30  # memory of one shard of tokens while it is collected


def main(config: EncodeConfig) -> None:
    """Verify, or take the folder of the stores and encode what is missing."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from align.features.verification import verify_stores
    from align.runtime.runs import run_folder

    state = PartialState(cpu=choose_device().type == "cpu")
    console = set_up(quiet=not state.is_main_process)
    if config.verify:
        if state.is_main_process:
            verify_stores(Path(config.output), console.print)
        return
    if config.dry_run:
        announced(config, state, console)
        return
    names = [config.job or new_job()]
    broadcast_object_list(names)  # the processes of this launch share the work, and so do launches with one --job
    folder, name = Path(config.output), str(names[0])
    shared = run_folder(folder, waiting=console.print, job=name) if state.is_main_process else Lease(folder, name)
    with shared as lease:
        assert lease is not None
        encode(announced(config, state, console), config, lease, state, console)


def announced(config: EncodeConfig, state: "PartialState", console: "Console") -> "Extraction":
    """Return the job and print what it has to do. Raises DiskFullError or UsageError if it cannot be done."""
    job = planned(config, state, console)
    size = job.predicted_bytes()
    for note in job.plan.notes:
        console.print(note)
    console.print(
        f"{job.plan.counted()} in {len(job.plan.shards)} shards, {len(job.pending())} to encode ({human_bytes(size)}) "
        f"into {config.output}, on {state.num_processes} process(es)"
    )
    require_free(job.output, size)  # all stores together
    if config.feature == "tokens":
        require_small_shards(config.shard_rows, max(writer.header.width for writer in job.writers))
    return job


def planned(config: EncodeConfig, state: "PartialState", console: "Console") -> "Extraction":
    """Return the job: the plan, of which samples are tried, and the encoders. The first process saves the plan, a dry run nothing."""
    from align.encoders.text import load_text_encoder
    from align.encoders.vision import load_vision_encoder
    from align.features.extract import Extraction, Stopping
    from align.sources.gate import Limits
    from align.sources.plan import Plan, plan
    from align.sources.trial import try_samples

    limits = Limits(max_pixels=config.max_pixels, gray_bits=config.gray_bits)
    source, folder = config.source(config.data), Path(config.output)
    if state.is_main_process or config.dry_run:
        made = plan(source, config.shard_rows, config.captions)
        if begun := (folder / "plan.parquet").exists():
            made.keep(folder, "files, columns or --shard-rows")  # refuses another one
        for note in try_samples(source, made, config.captions, bool(config.vision), limits, config.max_reject_fraction):
            console.print(note)
        if not begun and not config.dry_run:
            made.keep(folder, "files, columns or --shard-rows")
    state.wait_for_everyone()
    vision, text = config.encoders(resolve_precision(config.precision, state.device))
    return Extraction(
        source, made if config.dry_run else Plan.load(folder), folder, vision=load_vision_encoder(vision, state.device) if vision else None,
        text=load_text_encoder(text, state.device) if text else None, columns=config.captions, batch_size=config.batch_size,
        text_batch_size=config.text_batch_size, workers=config.workers, limits=limits,
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


def encode(job: "Extraction", config: EncodeConfig, lease: Lease, state: "PartialState", console: "Console") -> None:
    """Encode and commit what is missing, and report if nothing is missing any more."""
    if state.is_main_process:
        job.clean(lease)
        job.keep_content()
    state.wait_for_everyone()
    rows = sum(job.plan.lengths[shard] for shard in job.pending())
    job.run(lease, Progress(console, "encoded samples", rows, workers=state.num_processes))
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    if not job.pending():
        report(job, console)
    elif config.job:
        console.print("this worker is done; other workers of the job still have shards")
    else:
        raise UsageError(f"{config.output}: some shards are not committed; run the same command again")


def report(job: "Extraction", console: "Console") -> None:
    """Write and count the rejects; print the size of each store."""
    from align.features.store import FeatureStore

    counts = Counter(job.finish()["code"].to_pylist())
    summary = ", ".join(f"{code} {count}" for code, count in counts.most_common()) or "none"
    console.print(f"rejected: {summary} (each in rejects.parquet)")
    if note := job.gray.note(job.limits.gray_bits):
        console.print(note)
    for writer in job.writers:
        store = FeatureStore(writer.folder)
        console.print(f"{writer.folder}: {len(store)} x {store.width} features, {human_bytes(store.nbytes)}")


if __name__ == "__main__":
    run(main, EncodeConfig, "encode")
