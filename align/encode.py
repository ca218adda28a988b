"""Encode images and captions once with frozen encoders; the features go into stores that training reads.

    accelerate launch align/encode.py --config align/recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 align/encode.py --data 'cc3m/*.tar' --output features/cc3m \
        --vision facebook/dinov2-large --text Alibaba-NLP/gte-large-en-v1.5 --captions raw long
    python align/encode.py --config recipe.yaml --dry-run          # rows, disk and settings, nothing encoded
    python align/encode.py --config recipe.yaml --verify           # compare every byte with its committed hash

Interrupted runs resume with the same command: only shards that are not committed are encoded. SLURM array tasks or several hosts
share the work if they are given the same `--job` name and see the same `--output`.
"""

import os
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from align.common.commandline import run
from align.common.console import Progress, plain_console
from align.common.errors import UsageError
from align.common.files import human_bytes, remove_temporaries, require_free
from align.common.fingerprints import compare_fingerprints
from align.common.hardware import resolve_precision, reuse_freed_memory, use_cores
from align.common.locks import Lease
from align.encoders.spec import TextFeature, TextSpec, VisionSpec
from align.encoders.text import TextEncoder, load_text_encoder
from align.encoders.vision import VisionEncoder, load_vision_encoder
from align.features.config import EncodeConfig
from align.features.extract import Extraction, Stopping
from align.features.store import FeatureStore
from align.sources.gate import Limits
from align.sources.plan import Plan, Source, plan

MAX_SHARD_BYTES = 2 << 30  # of a shard of tokens while it is gathered


def load_encoders(config: EncodeConfig, device: torch.device) -> tuple[VisionEncoder | None, TextEncoder | None]:
    """Return both encoders, None where not asked for."""
    asked: Any = {"precision": resolve_precision(config.precision, device), "trust_remote_code": config.trust_remote_code}
    vision, text = None, None
    if config.vision:
        asked_vision = {"feature": config.feature, "layer": config.layer, "image_size": config.image_size, **asked}
        vision = load_vision_encoder(VisionSpec(config.vision, config.vision_revision, **asked_vision), device)
    if config.text:
        feature: TextFeature = "tokens" if config.feature == "tokens" else "pooled"
        asked_text = {"prompt": config.prompt, "max_length": config.max_length, "feature": feature, "layer": config.text_layer, **asked}
        text = load_text_encoder(TextSpec(config.text, config.text_revision, **asked_text), device)
    return vision, text


def shared_plan(config: EncodeConfig, source: Source, state: PartialState) -> Plan:
    """Return the plan of the job, made by the first process and saved in the output folder for all others."""
    folder = Path(config.output)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        made = plan(source, config.shard_rows, config.captions)
        if (folder / "plan.parquet").exists():
            compare_fingerprints({"data": made.digest}, {"data": Plan.load(folder).digest}, f"{folder} (files, columns or --shard-rows)")
        else:
            made.save(folder)
    state.wait_for_everyone()
    return Plan.load(folder)


def main(config: EncodeConfig) -> None:
    """Plan, load the encoders, encode what is missing, report what was rejected."""
    reuse_freed_memory()
    state = PartialState(cpu=not torch.cuda.is_available())
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    console = plain_console(quiet=not state.is_main_process)
    source = Source(config.data, config.layout, config.image_column, config.key_column, config.image_root)
    chosen = shared_plan(config, source, state)
    vision, text = load_encoders(config, state.device)
    job = Extraction(
        source, chosen, Path(config.output), vision=vision, text=text, columns=config.captions,
        batch_size=config.batch_size, text_batch_size=config.text_batch_size, workers=config.workers,
        limits=Limits(max_pixels=config.max_pixels), stopping=Stopping(config.max_reject_fraction, config.max_rejects_in_a_row),
    )  # fmt: skip
    size = job.predicted_bytes()
    console.print(
        f"{chosen.rows} samples in {len(chosen.shards)} shards, {len(job.pending())} to encode ({human_bytes(size)}) "
        f"into {config.output}, on {state.num_processes} process(es)"
    )
    if config.verify:
        for writer in job.writers:
            FeatureStore(writer.folder).verify()
            console.print(f"{writer.folder}: every byte as committed")
        return
    require_free(Path(config.output), size)  # all stores together
    widest = 4 * config.shard_rows * max(writer.header.width for writer in job.writers)
    if config.feature == "tokens" and widest > MAX_SHARD_BYTES:
        raise UsageError(
            f"--shard-rows {config.shard_rows}: a shard of tokens would take {human_bytes(widest)} of memory, at most "
            f"{human_bytes(MAX_SHARD_BYTES)} is allowed; give --shard-rows {config.shard_rows * MAX_SHARD_BYTES // widest} or less"
        )
    if config.dry_run:
        return
    names = [config.job or f"run-{uuid.uuid4().hex[:8]}"]
    broadcast_object_list(names)
    with Lease(Path(config.output), str(names[0])) as lease:
        if state.is_main_process and not config.job:
            remove_temporaries(Path(config.output))
            for writer in job.writers:
                writer.clean()
        state.wait_for_everyone()
        rows = sum(chosen.lengths[shard] for shard in job.pending())
        job.run(lease, Progress(console, "encoded samples", rows, workers=state.num_processes))
        state.wait_for_everyone()
    if not state.is_main_process:
        return
    if job.pending():
        if config.job is None:
            raise UsageError(f"{config.output}: some shards are not committed; run the same command again")
        console.print("this worker is done; other workers of the job still have shards")
        return
    rejects = job.finish()
    counts = Counter(rejects["code"].to_pylist())
    summary = ", ".join(f"{code} {count}" for code, count in counts.most_common()) or "none"
    console.print(f"rejected: {summary} (each in rejects.parquet)")
    for writer in job.writers:
        store = FeatureStore(writer.folder)
        console.print(f"{writer.folder}: {len(store)} x {store.width} features, {human_bytes(store.nbytes)}")


if __name__ == "__main__":
    run(main, EncodeConfig, "encode")
