"""No flag lies: of every field of every config, `tests/flags.yaml` names a test that fails if the code reads the default instead.

Whether that test does fail is tried for two fields by default, and for others on request:
`SAIL_TRY_FLAGS=TrainConfig pytest tests/test_flags.py -k tried` (a config, a field, or `Config` for all 306: over an hour).
The tests of this file are for flags that are only handed on: they stop a command where the library is called and look at what it is
given; what the library makes of it has tests of its own.
"""

import ast
import dataclasses
import importlib
import inspect
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from PIL import Image

from align.runtime.commandline import parse
from align.runtime.recipes_yaml import load_yaml
from eval.harness.launch import AskedModel
from tests.test_house_rules import CONFIGS, ENTRIES, ROOT

OBSERVED = load_yaml(ROOT / "tests/flags.yaml")
KINDS = {kind.__name__: kind for kind in CONFIGS.values()}
TRIED = os.environ.get("SAIL_TRY_FLAGS", "TrainConfig.weight_decay ReportConfig.theme").split()

BASE = {
    "prepare": "--output OUT",
    "encode": "--data DATA --output OUT --vision v --text t --captions short",
    "assess": "--data DATA --output OUT --vision v --text t --captions short",
    "curate": "--candidates c --output OUT --concepts c.txt",
    "train": "--data DATA --captions short --output OUT --vision v --text t --steps 1 --batch-size 2",
    "convert": "--heads h.pt --output OUT/model --vision v --text t",
    "package": "--run r --output OUT/model",
    "eval": "--model m --tasks t --output OUT",
    "report": "--results OUT",
    "lmms": "--mllm m --tasks t --output OUT",
    "upgrade": "--llm l --sail s --output OUT/mllm",
    "check": "--data d.jsonl --output OUT",
    "instruct": "--data d.jsonl --output OUT --batch-size 2 --micro-batch-size 1 --steps 1",
    "chat": "--model m --prompt hello",
}
FILES = {section: f"{section}.py" for section in BASE} | {"eval": "run.py", "instruct": "finetune.py", "chat": "chat_cli.py"}

VISION, TEXT = "load_vision_encoder", "load_text_encoder"
ENCODERS = {f"align.encoders.vision.{VISION}": None, f"align.encoders.text.{TEXT}": None}
SOURCE = [("layout", "csv"), ("image-column", "picture"), ("key-column", "name"), ("image-root", "OUT")]
SOURCE += [("group", "key"), ("key-prefix", "file"), ("gray-bits", "12")]
PLACES = {"layout": "layout", "image-column": "image", "key-column": "key", "image-root": "image_root"}
PLACES |= {"group": "group", "key-prefix": "key_prefix", "gray-bits": "gray_bits"}
LOADED = {f"align.training.data.{name}": None for name in (VISION, TEXT, "plan", "Plan", "try_samples")}
HEADS = {"align.model.published_heads.read_weights": None, "align.model.published_heads.heads_from": None, **ENCODERS}
SCORING = {f"align.assessment.encoding.{name}": [] for name in ("encode_visions", "encode_texts")}
SCORING |= {"align.assessment.encoding.draw_samples": None, "align.runtime.runs.add_launch": None}
ENCODING = {f"align.assessment.encoding.{name}": [] for name in ("chosen_layers", "chosen_features")}
ENCODING |= {f"align.assessment.encoding.{name}": None for name in (VISION, "LayerFeatures", "sampled_plan")}
PAIRS = {"align.assessment.encoding.draw_samples": {"pairs": MagicMock()}, "align.assessment.encoding.encode_visions": []}
PAIRS |= {f"align.assessment.encoding.{TEXT}": MagicMock(layers=0)}
MEASURED = {f"eval.measures.measurement.{name}": None for name in ("read_task", "Measurement")}
MEASURED |= {"eval.tasks.registry.find_task": None, "eval.models.measured.load_models": [], "eval.results.records.generated_half": None}
REPORTED = {**MEASURED, "eval.results.records.merge_results": None, "eval.results.records.save_results": None}
REPORTED |= {"eval.results.tables.results_table": "", "eval.run.replace": None}
ASKED = {"eval.harness.launch.check_ready": None, "eval.harness.launch.asked_models": [], "eval.harness.local.local_tasks": {}}
ANSWERED = {**ASKED, "eval.harness.launch.ask": ([1], []), "eval.harness.local.write_wrappers": None}
COLLECTED = {**ANSWERED, "eval.harness.output.collect": MagicMock(models=()), "eval.harness.output.write_examples": None}
COLLECTED |= {"eval.results.records.save_results": None, "eval.results.tables.results_table": "", "eval.lmms.replace": None}
CURATED = {f"align.curation.{name}": None for name in ("pool.CandidatePool", "scoring.ConceptSpace")}
CURATED |= {"align.curation.concepts.inputs_of": {}, "align.curation.concepts.concept_names": ("a", "b")}
CURATED["align.curation.pool.CandidatePool.open"] = MagicMock(__len__=lambda self: 10**9)
PROMPTED = {name: result for name, result in CURATED.items() if "Space" not in name} | {"align.curation.scoring.ConceptSpace.work": ""}
JOINED = {"mllm.upgrade.assembled": (MagicMock(), MagicMock(), [])}
CHECKED = {"mllm.model.saving.require_mllm": Path("m"), "mllm.model.processing.SailLlavaProcessor.from_pretrained": None}
CHECKED |= {"mllm.conversations.tokens.Chat.of_processor": None, "mllm.conversations.table.open_conversations": None}
CHECKED |= {"mllm.conversations.index.build_index": None, "mllm.conversations.checking.conversation_problems": []}
CHECKED |= {"mllm.model.saving.fitting_length": 9}
MLLM = {"mllm.model.saving.require_mllm": Path("m"), "mllm.model.modeling.SailLlavaConfig.from_pretrained": None}
MLLM |= {"mllm.loop.flops.image_flops": 0.0, "mllm.loop.parameter_groups.load_trainable": (MagicMock(), MagicMock())}
TRACKERS = "align.runtime.runs.require_trackers"
READ = {**MLLM, "mllm.conversations.tokens.Chat.of_processor": None, "mllm.conversations.table.open_conversations": None}
READY = {**MLLM, "mllm.finetune.read_data": None, "mllm.conversations.packing.EpochPlan": None}
READY |= {
    "mllm.loop.trainer.MicroBatches": None,
    "mllm.loop.flops.Collate": None,
    "mllm.loop.flops.step_cost": None,
    "mllm.loop.parameter_groups.group_table": "",
    "mllm.loop.parameter_groups.trained_rows": None,
}
READY |= {TRACKERS: None, "mllm.loop.settings.fit_batch": (2, 2), "mllm.loop.run.add_launch": None, "mllm.loop.run.RunLog": None}

PLANNED = {f"align.encode.{name}": None for name in ("planned", "require_free", "human_bytes")}
SPACED = {**CURATED, "align.curation.concepts.kept_prototypes": None}
SCORED = {**SPACED, "align.curation.scoring.score_shards": (MagicMock(), MagicMock())}
STEPPED = {"align.training.step.Stepper": None, "align.train.write_manifest": None}
BUILT = {"align.train.open_data": None, "align.training.data.build_model": None, "align.training.step.build_optimizer": None}
IMPORTED = {"align.features.imported.find_files": None, "align.features.imported.Embeddings": MagicMock(lengths=[1], width=1)}
LANGUAGE = {"mllm.assembly.language.load_llm": None}
ENCODED = {**ENCODING, "align.assessment.encoding.LayerExtraction": None, "align.assessment.encoding._fill": None}
ASSESSED = {**SCORING, "align.assessment.assessment.Assessment": None}
LAYERED = {**PAIRS, f"align.assessment.encoding.{TEXT}": MagicMock(layers=3)}
TALKING = {"mllm.model.saving.load_mllm": (MagicMock(), MagicMock()), "mllm.model.answering.Answerer": None}
TALKING |= {"transformers.TextStreamer": None}
OPENED = {**JOINED, "mllm.conversations.table.open_conversations": None}
INDEXED = {**READ, "mllm.conversations.index.build_index": None}
INDEXED |= {"mllm.conversations.table.open_conversations": MagicMock(any_described=False)}

# command, flag and value, where to stop it (`:2` at the second call), which argument to look at, what stands in for calls before that
ARRIVALS = [
    ("prepare", "cache", "c", "align.embedded.assets.fetch", "cache", {}),
    ("prepare", "assets-only", True, "align.embedded.assets.fetch:6", "asset_id", {}, "embedded:smollm2-135m"),
    *[("encode", flag, value, "align.sources.plan.Source", PLACES[flag], {}) for flag, value in SOURCE],
    ("encode", "image-size", 98, f"align.encoders.vision.{VISION}", "spec.image_size", {}),
    ("encode", "vision-revision", "abc", f"align.encoders.vision.{VISION}", "spec.revision", {}),
    ("encode", "trust-remote-code", True, f"align.encoders.vision.{VISION}", "spec.trust_remote_code", {}),
    ("encode", "max-length", 9, f"align.encoders.text.{TEXT}", "spec.max_length", ENCODERS),
    ("encode", "text-revision", "abc", f"align.encoders.text.{TEXT}", "spec.revision", ENCODERS),
    ("encode", "max-pixels", 99, "align.sources.gate.Limits", "max_pixels", ENCODERS),
    ("encode", "job", "mine", "align.encode.encode", "lease.job", PLANNED),
    ("encode", "precision", "bf16", f"align.encoders.vision.{VISION}", "spec.precision", {}),
    *[
        ("encode", flag, 3, "align.features.extract.Extraction", flag.replace("-", "_"), ENCODERS)
        for flag in ("batch-size", "text-batch-size", "workers")
    ],
    ("curate", "trust-remote-code", True, "align.curation.scoring.ConceptSpace.encode_texts", "trust_remote_code", PROMPTED),
    ("curate", "top", 3000, "align.curation.scoring.score_shards", "top", SPACED),
    ("curate", "save-every", 3, "align.curation.scoring.score_shards", "every", SPACED),
    ("curate", "duplicate-cosine", 0.5, "align.curation.duplicates.picker_for", "cosine", SCORED),
    ("curate", "text-batch-size", 3, "align.curation.scoring.ConceptSpace.encode_texts", "batch_size", PROMPTED),
    *[("train", flag, value, "align.sources.plan.Source", PLACES[flag], LOADED) for flag, value in SOURCE],
    ("train", "val-data", "other.jsonl", "align.sources.plan.Source:2", "data", {**LOADED, "align.training.data.OnlinePairs": None}),
    ("train", "image-size", 98, f"align.training.data.{VISION}", "spec.image_size", {}),
    ("train", "vision-revision", "abc", f"align.training.data.{VISION}", "spec.revision", {}),
    ("train", "max-length", 9, f"align.training.data.{TEXT}", "spec.max_length", LOADED),
    ("train", "text-revision", "abc", f"align.training.data.{TEXT}", "spec.revision", LOADED),
    ("train", "augment", True, "align.training.data.OnlinePairs", "augment", LOADED),
    ("train", "encoder-batch-size", 3, "align.training.data.OnlinePairs", "batch_size", LOADED),
    ("train", "workers", 3, "align.training.data.OnlinePairs", "workers", LOADED),
    ("train", "accumulate", 3, "align.training.step.Stepper", "accumulate", BUILT),
    ("train", "report-to", "trackio", "align.training.run.Run", "trackers", {**BUILT, TRACKERS: None, **STEPPED}, ("trackio",)),
    ("train", "precision", "bf16", "align.training.step.Stepper", "precision", BUILT),
    ("train", "max-reject-fraction", 0.5, "align.training.data.OnlinePairs", "max_reject_fraction", LOADED),
    ("convert", "vision-revision", "abc", f"align.encoders.vision.{VISION}", "spec.revision", HEADS),
    ("convert", "feature", "cls", f"align.encoders.vision.{VISION}", "spec.feature", HEADS),
    ("convert", "precision", "bf16", f"align.encoders.vision.{VISION}", "spec.precision", HEADS),
    ("convert", "encoder-name", "e", "align.features.imported.import_embeddings", "fingerprint.encoder", IMPORTED),
    ("convert", "layer", 3, f"align.encoders.vision.{VISION}", "spec.layer", HEADS),
    ("convert", "embed-encoders", True, "align.model.saving.save_model", "embed_encoders", HEADS),
    *[("assess", flag, value, "align.sources.plan.Source", PLACES[flag], {}) for flag, value in SOURCE],
    ("assess", "data", "other", "align.sources.plan.Source", "data", {}),
    ("assess", "rows", 777, "align.assessment.encoding.sampled_plan", "rows", {}),
    ("assess", "captions", "long", "align.assessment.encoding.sampled_plan", "columns", {}, ("long",)),
    ("assess", "output", "OUT/more", "align.assessment.encoding.sampled_plan", "folder", {}, "OUT/more/pairs"),
    ("assess", "labelled", "l", "align.sources.plan.Source:2", "data", {"align.assessment.encoding.sampled_plan": None}),
    ("assess", "vision", "w", f"align.assessment.encoding.{VISION}", "spec.name", ENCODING),
    ("assess", "layers", "all", "align.assessment.encoding.chosen_layers", "wanted", ENCODING, ("all",)),
    ("assess", "features", "cls", "align.assessment.encoding.chosen_features", "wanted", ENCODING, ("cls",)),
    ("assess", "random-weights", "v", "align.assessment.encoding.random_copy", "name", ENCODED),
    ("assess", "patch-images", 777, "align.assessment.encoding.LayerExtraction", "patch_images", ENCODING),
    ("assess", "text", "w", f"align.assessment.encoding.{TEXT}", "spec.name", PAIRS),
    ("assess", "text-layers", "all", "align.assessment.encoding.chosen_layers", "wanted", LAYERED, ("all",)),
    ("assess", "trained", "r", "align.assessment.tables.trained_scores", "runs", ASSESSED, ("r",)),
    ("assess", "labelled-rows", 777, "align.assessment.encoding.sampled_plan:2", "rows", {}),
    ("assess", "label-column", "cls", "align.assessment.encoding.sampled_plan:2", "columns", {}, ("cls",)),
    ("assess", "trust-remote-code", True, f"align.assessment.encoding.{VISION}", "spec.trust_remote_code", ENCODING),
    ("assess", "batch-size", 3, "align.assessment.encoding.LayerExtraction", "options.batch_size", ENCODING),
    ("assess", "workers", 3, "align.assessment.encoding.LayerExtraction", "options.workers", ENCODING),
    ("assess", "precision", "bf16", f"align.assessment.encoding.{VISION}", "spec.precision", ENCODING),
    ("assess", "text-batch-size", 3, "align.assessment.encoding.Extraction", "text_batch_size", PAIRS),
    ("assess", "probe-patience", 7, "align.assessment.probing.Training", "patience", SCORING),
    ("assess", "probe-every", 7, "align.assessment.probing.Training", "every", SCORING),
    ("assess", "probe-steps", 777, "align.assessment.probing.Training", "steps", SCORING),
    ("assess", "probe-lr", 0.5, "align.assessment.probing.Training", "lr", SCORING),
    ("assess", "probe-batch", 77, "align.assessment.probing.Training", "batch_size", SCORING),
    ("assess", "probe-width", 77, "align.assessment.probing.Training", "width", SCORING),
    *[
        ("assess", flag, 777, "align.assessment.scores.Settings", flag.replace("-", "_"), SCORING)
        for flag in ("test-rows", "similarity-rows", "neighbors", "class-neighbors", "resamples", "seed")
    ],
    ("eval", "trust-remote-code", True, "eval.models.measured.load_models", "trust_remote_code", MEASURED),
    ("eval", "device", "cuda:1", "eval.models.measured.load_models", "device", MEASURED),
    ("eval", "seed", 5, "eval.models.measured.load_models", "seed", MEASURED),
    ("eval", "batch-size", 3, "eval.models.features.FeatureCache", "batch_size", MEASURED),
    ("eval", "workers", 3, "eval.models.features.FeatureCache", "workers", MEASURED),
    ("eval", "cache", "c", "eval.models.features.FeatureCache", "folder", MEASURED),
    ("eval", "text-batch-size", 3, "eval.models.features.FeatureCache", "text_batch_size", MEASURED),
    ("eval", "confidence", 0.5, "eval.measures.measurement.Measurement", "confidence", MEASURED),
    ("eval", "train-runs", "r", "eval.page.page.write_report", "train_runs", REPORTED, [Path("r")]),
    ("eval", "compare", "a b", "eval.results.compare.compare", "a", {}, "a"),
    ("report", "results", "r", "eval.page.page.write_report", "results_folder", {}),
    ("report", "output", "OUT/page", "eval.page.page.write_report", "output", {}),
    ("report", "train-runs", "r", "eval.page.page.write_report", "train_runs", {}, [Path("r")]),
    ("report", "title", "Ours", "eval.page.page.write_report", "title", {}),
    ("report", "theme", "light", "eval.page.page.write_report", "dark", {}, False),
    ("lmms", "include", "i", "eval.harness.local.local_tasks", "include", {}),
    ("lmms", "processes", 3, "eval.harness.launch._run", "command.4", {**ASKED, "eval.harness.local.write_wrappers": None}),
    ("lmms", "no-baseline", True, "eval.harness.output.collect", "baseline", ANSWERED, False),
    ("lmms", "confidence", 0.5, "eval.harness.output.collect", "confidence", ANSWERED),
    ("lmms", "train-runs", "r", "eval.page.page.write_report", "train_runs", COLLECTED, [Path("r")]),
    ("upgrade", "captions", "c.jsonl", "mllm.conversations.table.open_conversations", "specs", JOINED, ("c.jsonl",)),
    ("upgrade", "image-root", "r", "mllm.conversations.table.open_conversations", "image_root", JOINED),
    ("upgrade", "caption-rows", 7, "mllm.assembly.warmstart.fit_projector", "rows", OPENED),
    ("upgrade", "projector", "p", "mllm.assembly.join.load_projector", "path", JOINED),
    ("upgrade", "head", "mlp", "mllm.assembly.vision.load_aligned_encoder", "head", LANGUAGE),
    ("upgrade", "expansion", 3, "mllm.assembly.vision.load_aligned_encoder", "expansion", LANGUAGE),
    ("upgrade", "width", 77, "mllm.assembly.vision.load_aligned_encoder", "width", LANGUAGE),
    ("upgrade", "revision", "abc", "mllm.assembly.language.load_llm", "revision", {}),
    ("check", "image-root", "r", "mllm.conversations.table.open_conversations", "image_root", CHECKED),
    ("check", "ignore-keys", "a b", "mllm.conversations.table.open_conversations", "ignored", CHECKED, ("a", "b")),
    ("check", "max-pixels", 99, "align.sources.gate.Limits", "max_pixels", CHECKED),
    ("instruct", "template", "brief", "mllm.conversations.tokens.Chat.of_processor", "template", READ),
    ("instruct", "image-root", "r", "mllm.conversations.table.open_conversations", "image_root", READ),
    ("instruct", "ignore-keys", "a b", "mllm.conversations.table.open_conversations", "ignored", READ, ("a", "b")),
    ("instruct", "max-length", 77, "mllm.conversations.index.build_index", "max_length", READ),
    ("instruct", "workers", 3, "mllm.conversations.index.build_index", "workers", READ),
    ("instruct", "packing", True, "mllm.conversations.packing.EpochPlan", "packing", READY),
    ("instruct", "lr-head", 0.5, "mllm.loop.parameter_groups.load_trainable", "rates.head", MLLM),
    ("instruct", "lr-raw", 0.5, "mllm.loop.parameter_groups.load_trainable", "rates.raw", MLLM),
    ("instruct", "lr-vision", 0.5, "mllm.loop.parameter_groups.load_trainable", "rates.vision", MLLM),
    ("instruct", "lr-llm", 0.5, "mllm.loop.parameter_groups.load_trainable", "rates.llm", MLLM),
    ("instruct", "lr-projector", 0.5, "mllm.loop.parameter_groups.load_trainable", "rates.projector", MLLM),
    ("instruct", "precision", "bf16", "mllm.loop.parameter_groups.load_trainable", "bf16", MLLM, True),
    ("instruct", "max-reject-fraction", 0.5, "mllm.conversations.index.build_index", "max_reject_fraction", READ),
    ("instruct", "max-pixels", 99, "mllm.conversations.batches.ConversationDataset", "max_pixels", INDEXED),
    ("instruct", "lora-alpha", 3, "mllm.loop.parameter_groups.load_trainable", "lora.alpha", MLLM),
    ("instruct", "lora-targets", "q_proj", "mllm.loop.parameter_groups.load_trainable", "lora.targets", MLLM, ("q_proj",)),
    ("instruct", "lora-dropout", 0.5, "mllm.loop.parameter_groups.load_trainable", "lora.dropout", MLLM),
    ("instruct", "seed", 5, "mllm.loop.parameter_groups.load_trainable", "seed", MLLM),
    ("instruct", "optimizer", "lion", "mllm.loop.run.SailTrainer", "make_optimizer.keywords.name", READY),
    ("instruct", "betas", "0.5 0.6", "mllm.loop.run.SailTrainer", "make_optimizer.keywords.betas", READY, (0.5, 0.6)),
    ("instruct", "schedule", "linear", "mllm.loop.run.SailTrainer", "options.args.lr_scheduler_type.value", READY),
    ("instruct", "warmup", 0.5, "mllm.loop.run.SailTrainer", "options.args.warmup_steps", READY),
    ("instruct", "gradient-checkpointing", True, "mllm.loop.run.SailTrainer", "options.args.activation_checkpointing", READY),
    ("instruct", "weight-decay", 0.5, "mllm.loop.run.SailTrainer", "options.args.weight_decay", READY),
    ("instruct", "max-grad-norm", 0.5, "mllm.loop.run.SailTrainer", "options.args.max_grad_norm", READY),
    ("instruct", "max-nonfinite", 7, "mllm.loop.run.SailTrainer", "max_nonfinite", READY),
    ("instruct", "keep", 7, "mllm.loop.run.SailTrainer", "keep", READY),
    ("instruct", "peak-tflops", 7.0, "mllm.loop.run.TrainingLog", "peak", READY),
    ("instruct", "cache", "c", "mllm.conversations.index.build_index", "cache", READ),
    ("instruct", "log-every", 7, "mllm.loop.run.SailTrainer", "log_every", READY),
    ("instruct", "save-every", 7, "mllm.loop.run.SailTrainer", "save_every", READY),
    ("instruct", "report-to", "trackio", "mllm.loop.run.RunLog", "trackers", READY, ("trackio",)),
    ("instruct", "dry-run", True, "mllm.loop.estimate.estimate", "optimizer", READY, "adamw"),
    ("package", "trust-remote-code", True, "align.model.saving.package", "trust_remote_code", {"align.model.saving.model_folder": None}),
    ("chat", "model", "other", "mllm.model.saving.load_mllm", "folder", {}),
    ("chat", "device", "cuda:1", "mllm.model.saving.load_mllm", "device", {}),
    ("chat", "image", "i.png", "mllm.chat_cli.read_image", "path", {}),
    ("chat", "max-new-tokens", 7, "mllm.model.answering.Decoding", "max_new_tokens", {}),
    ("chat", "temperature", 0.5, "mllm.model.answering.Decoding", "temperature", {}),
    ("chat", "prompt", "what?", "mllm.model.answering.ChatSession.ask", "question", TALKING),
    ("chat", "precision", "bf16", "mllm.model.saving.load_mllm", "dtype", {}, "torch.bfloat16"),
    ("chat", "seed", 5, "torch.manual_seed", "seed", {}),
]  # fmt: skip
# what else a flag needs to be allowed
WITH = {"upgrade-image-root": "--captions c", "upgrade-caption-rows": "--captions c", "assess-labelled-rows": "--labelled l"}
WITH |= {f"instruct-lora-{name}": "--lora-rank 2" for name in ("alpha", "dropout", "targets")}
WITH |= {"assess-label-column": "--labelled l"}
WITH |= {f"upgrade-{flag}": "--sail --vision v --sail-head random" for flag in ("head", "expansion", "width")}
WITH |= {"convert-encoder-name": "--heads None --vision None --text None --embeddings e --kind image"}
WITH |= {"encode-trust-remote-code": "--vision OUT", "assess-trust-remote-code": "--vision OUT"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_flag_names_the_test_that_observes_it(kind):
    assert list(OBSERVED[kind]) == [field.name for field in dataclasses.fields(KINDS[kind])]
    for field, test in OBSERVED[kind].items():
        path, name = test.split("[")[0].split("::")
        functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{kind}.{field}: there is no test {test}"


FIELDS = [f"{kind}.{field}" for kind, fields in OBSERVED.items() for field in fields]


@pytest.mark.slow
@pytest.mark.parametrize("field", [field for field in FIELDS if any(word in field for word in TRIED)])
def test_a_tried_flag_that_is_ignored_makes_its_test_fail(field):
    kind, name = field.split(".")
    ignored = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/support/ignored_flag"), str(ROOT)]), "SAIL_IGNORED_FLAG": field}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", OBSERVED[kind][name]]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, **ignored}, capture_output=True, text=True)
    assert ran.returncode == 1, f"{field} is ignored and {OBSERVED[kind][name]} passes:\n{ran.stdout[-600:]}"


class Arrived(BaseException):
    """Ends a command where the call that is looked at was made; its arguments are the only argument."""


@pytest.fixture
def places(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(f'{{"key": "{key}", "image": "{key}.png", "short": "a dog"}}\n' for key in "ab"))
    for key in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{key}.png")
    (tmp_path / "out/lmms").mkdir(parents=True)
    return {"DATA": str(tmp_path / "data.jsonl"), "OUT": str(tmp_path / "out")}


def command(section, flags, places, stand_ins, monkeypatch):
    """Return a function that runs an entry with `flags` beside those it needs; `stand_ins` take the places of what it calls."""
    words = f"{BASE[section]} {flags}"
    for name, place in places.items():
        words = words.replace(name, place)
    config = parse(CONFIGS[section], section, words.split())
    package = next(entry.split("/")[0] for entry in ENTRIES if entry.endswith(f"/{FILES[section]}"))
    main = importlib.import_module(f"{package}.{FILES[section][:-3]}").main
    for name, result in stand_ins.items():
        monkeypatch.setattr(*found(name), MagicMock(return_value=MagicMock() if result is None else result))
    return lambda: main(config)


@pytest.mark.parametrize("row", ARRIVALS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_a_flag_arrives_where_it_is_needed(row, places, monkeypatch):
    section, flag, value, target, argument, stand_ins, *other = row
    (place, _, nth), calls = target.partition(":"), []
    owner, last = found(place)
    signature = inspect.signature(getattr(owner, last))
    run = command(section, f"{WITH.get(f'{section}-{flag}', '')} --{flag} {'' if value is True else value}", places, stand_ins, monkeypatch)

    def stop(*given, **named):
        calls.append(signature.bind(*given, **named).arguments)
        if len(calls) == int(nth or 1):
            raise Arrived(calls[-1])
        return MagicMock()

    monkeypatch.setattr(owner, last, stop)
    with pytest.raises(Arrived) as stopped:
        run()
    first, *rest = argument.split(".")
    seen = reduce(part_of, rest, stopped.value.args[0][first])
    expected = other[0] if other else value
    for name, place in places.items():
        expected = expected.replace(name, place) if isinstance(expected, str) else expected
    assert seen == expected or str(seen) == str(expected)


def part_of(value, name):
    """Return an item of a dictionary or list, or else an attribute."""
    if isinstance(value, list):
        return value[int(name)]
    return value[name] if isinstance(value, dict) else getattr(value, name)


@pytest.mark.parametrize(("section", "stand_ins"), [("eval", REPORTED), ("lmms", COLLECTED)])
def test_no_report_is_written_if_none_is_wanted(section, stand_ins, places, monkeypatch):
    written = {}
    for flag in ("--report", "--no-report"):
        command(section, flag, places, {**stand_ins, "eval.page.page.write_report": "page"}, monkeypatch)()
        written[flag] = importlib.import_module("eval.page.page").write_report.call_count
    assert written == {"--report": 1, "--no-report": 0}


def test_lmms_eval_is_told_how_long_answers_are_and_where_models_run(places, monkeypatch):
    model = AskedModel(SimpleNamespace(name="MLLM a"), Path("m"))
    stand_ins = {
        **COLLECTED,
        "eval.harness.launch.asked_models": [model],
        "eval.harness.launch._run": 0,
        "eval.harness.launch.read_run": None,
    }
    del stand_ins["eval.harness.launch.ask"]
    command("lmms", "--max-new-tokens 77 --device cuda --no-report", places, stand_ins, monkeypatch)()
    (job,) = load_yaml(Path(places["OUT"]) / "lmms/jobs.yaml")
    assert "max_new_tokens=77" in job["model_args"].split(",") and "device=cuda" in job["model_args"].split(",")


def found(name):
    """Return the module or class that holds the last part of a dotted name, and that part."""
    *owner, last = name.split(".")
    try:
        return importlib.import_module(".".join(owner)), last
    except ModuleNotFoundError:
        return getattr(importlib.import_module(".".join(owner[:-1])), owner[-1]), last
