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

from align.common.errors import FingerprintError, Preempted
from align.common.files import hash_file, read_json, require_free
from align.common.fingerprints import compare_inputs
from align.common.folders import commit_folder, folder_digest, replaced_folder
from align.common.preemption import noted, reason
from align.runtime.checkpoints import checkpoints, clean_checkpoints, newest_committed
from align.runtime.recipes_yaml import write_recipe
from align.runtime.runs import RunLog, add_launch
from mllm.conversations.batches import ConversationDataset
from mllm.conversations.tokens import Chat
from mllm.loop.config import FinetuneConfig, Lora
from mllm.loop.flops import Collate, peak_tflops
from mllm.loop.log import TrainingLog
from mllm.loop.parameter_groups import load_trained, merged, set_trainable, size, trained_tensors
from mllm.loop.settings import make_optimizer
from mllm.loop.trainer import INPUTS, MicroBatches, SailTrainer
from mllm.model.answer_ends import end_ids
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
    checkpoint, first, universal = resume_point(folder, inputs, settings, console)
    if writing:
        folder.mkdir(parents=True, exist_ok=True)
        clean_checkpoints(folder, uncommitted=True)
        facts = {"rows": len(dataset), "inputs": inputs, "processes": settings.world_size}
        precision = "bf16" if settings.bf16 else "fp32"
        add_launch(folder, {"config": write_recipe(config, folder, config.stage), **facts, "precision": precision})
    if first >= steps and (folder / "model" / "config.json").is_file():
        console.print(f"{folder}/model is complete; nothing to do")
        return
    needed = checkpoint_bytes(model, config)
    if writing:
        missing = max(1, config.keep + 1 - len(checkpoints(folder, committed=True)))
        require_free(folder, missing * needed + 4 * sum(size(parameter) for parameter in model.parameters()))  # and model/, in float32
    peak = config.peak_tflops or peak_tflops(settings.device)
    run_log = RunLog(folder, first or None, config.report_to, writing)
    fused = settings.device.type == "cuda" and config.deepspeed is None
    with closing(run_log), noted() as stopping:
        trainer = SailTrainer(
            model=model, args=settings, data_collator=collate, train_dataset=dataset, micro_batches=micro_batches,
            rates=config.learning_rates(), make_optimizer=partial(make_optimizer, name=config.optimizer, betas=config.betas, fused=fused),
            log=TrainingLog(run_log, console, peak and peak * settings.world_size), log_every=config.log_every,
            save_every=config.save_every, max_nonfinite=config.max_nonfinite, keep=config.keep, stopping=stopping, inputs=inputs,
            checkpoint_bytes=needed,
        )  # fmt: skip
        if universal:
            trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)  # also loads the weights if no step is left
    if trainer.stopped and trainer.state.global_step < steps:
        raise Preempted(f"stopped by {reason()} at step {trainer.state.global_step}, state saved; run the same command to go on")
    assert trainer.model is not None
    tensors = trained_tensors(trainer.model)
    if config.deepspeed:
        unset_hf_deepspeed_config()  # else the exported model would be partitioned again
    if writing:
        asked = dataset.chat if config.stage == "instruct" and config.template else None
        export(Path(config.model), tensors, config.learning_rates(), config.lora(), folder, asked)
    trainer.accelerator.wait_for_everyone()
    console.print(f"done: {folder}/model")


def resume_point(folder: Path, inputs: dict[str, Any], settings: TrainingArguments, console: Console) -> tuple[Path | None, int, bool]:
    """Return (newest checkpoint that verifies, its step, whether DeepSpeed reads its universal form); (None, 0, False) without one.

    FingerprintError if it was trained on other `inputs`, which only the first process knows.
    """
    checkpoint, first, problems = newest_committed(folder)
    for problem in problems:
        console.print(f"passed over a checkpoint: {problem}")
    if checkpoint is None:
        return None, 0, False
    stored = read_json(checkpoint / INPUTS) if (checkpoint / INPUTS).is_file() else None  # older versions wrote none
    universal = settings.deepspeed is not None and converted(checkpoint, stored or {}, settings.world_size)
    if inputs:
        compare_inputs(inputs, stored and stored | ({"processes": settings.world_size} if universal else {}), str(checkpoint))
    console.print(f"going on from {checkpoint}")
    return checkpoint, first, universal


def converted(checkpoint: Path, stored: Mapping[str, Any], processes: int) -> bool:
    """Return whether a DeepSpeed checkpoint has to be read in its universal form: it is of another number of processes.

    FingerprintError, with the command that converts it, if it is and has no such form.
    """
    written = stored.get("processes", processes)
    if written == processes:
        return False
    if (checkpoint / "latest_universal").is_file():
        return True
    state = checkpoint / (checkpoint / "latest").read_text().strip() if (checkpoint / "latest").is_file() else checkpoint
    raise FingerprintError(
        f"{checkpoint} is of {written} DeepSpeed processes (processes: {written} there, {processes} now): start {written}, or convert it "
        f"with `python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {state} --output_folder "
        f"{state}_universal` and run the same command again"
    )


def checkpoint_bytes(model: nn.Module, config: FinetuneConfig) -> int:
    """Return the size of a checkpoint: trained weights and the optimizer's moments in float32, under DeepSpeed the bf16 weights, too."""
    trained = sum(size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return trained * ({"lion": 8, "adamw": 12}[config.optimizer] + (2 if config.deepspeed else 0))


def inputs_of(config: FinetuneConfig, dataset: ConversationDataset, settings: TrainingArguments) -> dict[str, Any]:
    """Return hashes of what the config's files hold, by field; under DeepSpeed also the number of processes, which its files depend on."""
    inputs: dict[str, Any] = {
        "model": folder_digest(Path(config.model)), "data": dataset.conversations.fingerprint, "template": dataset.chat.fingerprint,
        "images": dataset.conversations.images_digest(),
    }  # fmt: skip
    if dataset.described is not None:
        inputs["described"] = hash_file(dataset.described.path)
    if settings.deepspeed:
        inputs |= {"deepspeed": hash_file(Path(str(settings.deepspeed))), "processes": settings.world_size}
    return inputs


def export(
    start: Path, tensors: Mapping[str, Tensor], rates: Mapping[str, float], lora: Lora | None, folder: Path, chat: Chat | None = None
) -> None:
    """Write `folder/model`: the model in `start` with the trained `tensors` (float32). With LoRA also write `folder/adapter` for peft.

    With a `chat` the model is asked by its template from then on, and its answers end where that ends them.
    """
    model, processor = load_mllm(start)
    if chat is not None:
        processor.chat_template, settings = chat.template, model.generation_config
        settings.eos_token_id = list(dict.fromkeys([*end_ids(settings), *chat.stop_ids]))
    prepared = set_trainable(model, rates, lora, seed=0)
    load_trained(prepared, tensors, f"the run in {folder}")
    if hasattr(prepared, "merge_and_unload"):
        with replaced_folder(folder / "adapter", "adapter") as temporary:
            prepared.save_pretrained(str(temporary))  # type: ignore[operator]
            commit_folder(temporary, {})
    plain = merged(prepared)
    plain.config.text_config.use_cache = True
    save_mllm(plain, processor, folder / "model")
