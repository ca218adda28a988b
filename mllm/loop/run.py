"""One run of stage two: from the newest checkpoint or the start model to the exported model."""

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from align.common.checkpoints import clean_checkpoints, newest_committed
from align.common.errors import Preempted
from align.common.files import hash_file, read_json
from align.common.fingerprints import compare_inputs
from align.common.folders import commit_folder, folder_digest, replaced_folder
from align.common.preemption import noted, reason
from align.common.recipes_yaml import write_recipe
from align.common.runs import RunLog, add_launch
from mllm.conversations.batches import ConversationDataset
from mllm.loop.config import FinetuneConfig, Lora
from mllm.loop.flops import Collate, peak_tflops
from mllm.loop.log import TrainingLog
from mllm.loop.parameter_groups import load_trained, merged, set_trainable, trained_tensors
from mllm.loop.settings import make_optimizer
from mllm.loop.trainer import INPUTS, MicroBatches, SailTrainer
from mllm.model.saving import load_mllm, save_mllm


def train(
    config: FinetuneConfig, model: nn.Module, dataset: ConversationDataset, collate: Collate, micro_batches: MicroBatches,
    settings: TrainingArguments, console: Console,
) -> None:  # fmt: skip
    """Resume from the newest checkpoint that verifies, train, and write model/ (with LoRA also adapter/) to the run's folder.

    Raises Preempted after SIGTERM, NonFiniteError, DamagedError if no checkpoint verifies.
    """
    folder, steps, writing = Path(config.output), settings.max_steps, settings.process_index == 0
    inputs = inputs_of(config, dataset, settings) if writing else {}  # the first process compares and saves
    checkpoint, first, problems = newest_committed(folder)
    for problem in problems:
        console.print(f"passed over a checkpoint: {problem}")
    if checkpoint is not None:
        if writing:
            known = (checkpoint / INPUTS).is_file()  # older versions wrote none
            compare_inputs(inputs, read_json(checkpoint / INPUTS) if known else None, str(checkpoint))
        console.print(f"going on from {checkpoint}")
    if writing:
        folder.mkdir(parents=True, exist_ok=True)
        clean_checkpoints(folder, uncommitted=True)
        facts = {"rows": len(dataset), "inputs": inputs, "processes": settings.world_size}
        precision = "bf16" if settings.bf16 else "fp32"
        add_launch(folder, {"config": write_recipe(config, folder, config.stage), **facts, "precision": precision})
    if first >= steps and (folder / "model" / "config.json").is_file():
        console.print(f"{folder}/model is complete; nothing to do")
        return
    peak = config.peak_tflops or peak_tflops(settings.device)
    run_log = RunLog(folder, first or None, config.report_to, writing)
    fused = settings.device.type == "cuda" and config.deepspeed is None
    with closing(run_log), noted() as stopping:
        trainer = SailTrainer(
            model=model, args=settings, data_collator=collate, train_dataset=dataset, micro_batches=micro_batches,
            rates=config.learning_rates(), make_optimizer=partial(make_optimizer, name=config.optimizer, betas=config.betas, fused=fused),
            log=TrainingLog(run_log, console, peak and peak * settings.world_size), log_every=config.log_every,
            save_every=config.save_every, max_nonfinite=config.max_nonfinite, keep=config.keep, stopping=stopping, inputs=inputs,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)  # also loads the weights if no step is left
    if trainer.stopped and trainer.state.global_step < steps:
        raise Preempted(f"stopped by {reason()} at step {trainer.state.global_step}, state saved; run the same command to go on")
    assert trainer.model is not None
    tensors = trained_tensors(trainer.model)
    if config.deepspeed:
        unset_hf_deepspeed_config()  # else the exported model would be partitioned again
    if writing:
        export(Path(config.model), tensors, config.learning_rates(), config.lora(), folder)
    trainer.accelerator.wait_for_everyone()
    console.print(f"done: {folder}/model")


def inputs_of(config: FinetuneConfig, dataset: ConversationDataset, settings: TrainingArguments) -> dict[str, Any]:
    """Return hashes of what the config's files hold, by field; under DeepSpeed also the number of processes, which its files depend on."""
    inputs: dict[str, Any] = {
        "model": folder_digest(Path(config.model)), "data": dataset.conversations.fingerprint, "template": dataset.chat.fingerprint,
        "images": dataset.conversations.images_digest(),
    }  # fmt: skip
    if settings.deepspeed:
        inputs |= {"deepspeed": hash_file(Path(str(settings.deepspeed))), "processes": settings.world_size}
    return inputs


def export(start: Path, tensors: Mapping[str, Tensor], rates: Mapping[str, float], lora: Lora | None, folder: Path) -> None:
    """Write `folder/model`: the model in `start` with the trained `tensors` (float32). With LoRA also write `folder/adapter` for peft."""
    model, processor = load_mllm(start)
    prepared = set_trainable(model, rates, lora, seed=0)
    load_trained(prepared, tensors, f"the run in {folder}")
    if hasattr(prepared, "merge_and_unload"):
        with replaced_folder(folder / "adapter", "adapter") as temporary:
            prepared.save_pretrained(str(temporary))  # type: ignore[operator]
            commit_folder(temporary, {})
    plain = merged(prepared)
    plain.config.text_config.use_cache = True
    save_mllm(plain, processor, folder / "model")
