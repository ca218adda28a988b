"""The model against independent computations: stage one's features, stock LLaVA's loss, gradients with and without savings."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional
from transformers import Dinov2Model, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from align.common.errors import UsageError
from align.model.dual_encoder import SailModel
from mllm.assembly.vision import image_processor_of, load_aligned_encoder
from mllm.model.modeling import SailLlavaConfig, SailLlavaModel
from mllm.model.processing import SailLlavaImageProcessor
from tests.support.tiny_mllm import SIZE, tiny_model, tiny_sail, tiny_vision

CASES = {"cls": ("dinov2", {}), "registers": ("dinov2_with_registers", {}), "resnet": ("resnet", {}), "timm": ("timm_cnn", {}),
         "inner layer": ("dinov2", {"layer": 2}), "embeddings": ("dinov2", {"layer": 0}), "inner stage": ("timm_cnn", {"layer": 3}),
         "cls on patches": ("dinov2", {"feature": "mean"})}  # fmt: skip


def batch_of(model, processor, images=2, texts=0, seed=0):
    """Return a padded training batch: rows with an image, then rows without; labels on the last three tokens of each row."""
    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)) for _ in range(images)]
    prompts = [f"<image> what is there? a {word}" for word in ("dog", "red car", "cat")[:images]] + ["hello world and a dog"] * texts
    batch = dict(processor(text=prompts, images=photos or None, padding=True, return_tensors="pt"))
    labels = torch.full_like(batch["input_ids"], -100)
    for row, mask in enumerate(batch["attention_mask"]):
        places = mask.nonzero()[-3:, 0]
        labels[row, places] = batch["input_ids"][row, places]
    return {**batch, "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def built(aligned):
    """Return the image half as a SailLlavaModel holding the given encoder and head."""
    text, _ = tiny_model()
    config = SailLlavaConfig(vision_config=aligned.encoder.backbone.model.config, text_config=text.config.text_config, **aligned.fields)
    model = SailLlavaModel(config)
    model.vision_tower.load_state_dict(aligned.encoder.backbone.model.state_dict())
    model.sail_head.load_state_dict(aligned.head.state_dict())
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_patch_features_are_those_of_stage_one(tmp_path, case):
    kind, loader = CASES[case]
    folder = tiny_sail(tmp_path / "sail", tiny_vision(tmp_path / "vision", kind), **loader)
    aligned = load_aligned_encoder(sail=str(folder))
    model, stage_one = built(aligned), SailModel.from_pretrained(folder)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    ours = model.get_patch_features(pixels)
    encoder = stage_one.vision_encoder
    if case == "cls on patches":  # this head never saw a CLS token, so it is given none
        expected = stage_one.vision_head(encoder.encode(pixels)[1])
    else:
        expected = stage_one.vision_head(encoder.dense(pixels))
        torch.testing.assert_close(functional.normalize(ours, dim=-1), stage_one.get_patch_features(pixels), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours.norm(dim=-1), torch.ones(()), atol=0.1), "the projector gets features that are not normalized"
    rows, columns = model.config.sail_patch_grid
    assert ours.shape == (2, rows * columns, 24) and model.config.image_tokens() == rows * columns


@torch.no_grad()
def test_patch_features_are_the_formula_on_the_stock_encoder():
    model, _ = tiny_model("dinov2")
    stock = Dinov2Model(model.config.vision_config).eval()
    stock.load_state_dict(model.model.vision_tower.state_dict())
    pixels = torch.randn(2, 3, SIZE, SIZE)
    hidden = stock(pixels).last_hidden_state
    x = torch.stack([torch.cat([hidden[:, 0], hidden[:, 1 + i]], -1) for i in range(9)], 1)
    head, projector = model.model.sail_head, model.model.multi_modal_projector
    x = functional.layer_norm(x, x.shape[-1:], head.norm.weight, head.norm.bias, 1e-5)
    gate = (x @ head.gate.weight.T + head.gate.bias).clamp(0, 6)
    expected = (gate * (x @ head.value.weight.T + head.value.bias)) @ head.out.weight.T + head.out.bias
    torch.testing.assert_close(model.model.get_patch_features(pixels), expected, rtol=1e-4, atol=1e-5)
    inner = functional.gelu(expected @ projector.linear_1.weight.T + projector.linear_1.bias)
    visual = inner @ projector.linear_2.weight.T + projector.linear_2.bias
    found = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(torch.stack(list(found)), visual, rtol=1e-4, atol=1e-5)


def test_token_heads_are_refused_by_name(tmp_path, monkeypatch):
    folder = tiny_sail(tmp_path / "sail", tiny_vision(tmp_path / "vision"))
    stage_one = SailModel.from_pretrained(folder)
    stage_one.config.head = "token"
    monkeypatch.setattr(SailModel, "from_pretrained", lambda folder: stage_one)
    with pytest.raises(UsageError, match="has token heads, which make one vector of an image"):
        load_aligned_encoder(sail=str(folder))


@torch.no_grad()
def test_without_a_head_the_projector_gets_the_features_themselves(tmp_path):
    vision = tiny_vision(tmp_path / "vision", "dinov2_with_registers")
    aligned = load_aligned_encoder(vision=str(vision), sail_head="none")
    model = built(aligned)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(model.get_patch_features(pixels), aligned.encoder.dense(pixels))
    assert model.multi_modal_projector.linear_1.in_features == sum(aligned.widths) == 64 and not list(model.sail_head.parameters())


@torch.no_grad()
def test_a_grid_averages_the_heads_output():
    model, _ = tiny_model("dinov2", grid=[1, 3])
    pixels = torch.randn(2, 3, SIZE, SIZE)
    pooled = model.model.get_patch_features(pixels)
    model.config.sail_grid = None
    whole = model.model.get_patch_features(pixels).unflatten(1, (3, 3))  # (B, rows, columns, E)
    torch.testing.assert_close(pooled, whole.mean(1))  # one row of tokens: the mean of three rows of patches
    assert model.config.image_seq_length == 3


@torch.no_grad()
def test_another_image_size_interpolates_positions_and_a_wrong_one_is_refused(tmp_path):
    vision = tiny_vision(tmp_path / "vision", "dinov2")
    aligned = load_aligned_encoder(vision=str(vision), sail_head="random", head="linear", width=8, image_size=70)
    model = built(aligned)
    assert model.config.sail_image_size == [70, 70] and model.config.sail_patch_grid == [5, 5]
    pixels = torch.randn(1, 3, 70, 70)
    stock = Dinov2Model.from_pretrained(vision).eval()(pixels).last_hidden_state
    torch.testing.assert_close(model.towers[0].backbone(pixels, [3])[0], stock)
    with pytest.raises(UsageError, match="70, 70"):
        model.get_patch_features(torch.randn(1, 3, SIZE, SIZE))


@pytest.mark.parametrize("count", [None, 17, torch.tensor(5)])
@pytest.mark.parametrize("tie", [False, True])
def test_sparse_logits_give_stock_loss_and_gradients(count, tie):
    model, processor = tiny_model("dinov2", tie=tie)
    model.train()
    batch = batch_of(model, processor, texts=1)
    options = {} if count is None else {"num_items_in_batch": count}
    stock = LlavaForConditionalGeneration.forward(model, **batch, **options)
    assert stock.logits.shape[:2] == batch["input_ids"].shape
    expected = gradients(model, stock.loss)
    ours = model(**batch, **options)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, stock.loss, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, ours.loss), expected)
    model.eval()
    assert model(**batch).logits is not None


def test_a_batch_without_labels_costs_nothing_and_reaches_every_parameter():
    model, processor = tiny_model("dinov2")
    model.train()
    batch = batch_of(model, processor)
    batch["labels"][:] = -100
    loss = model(**batch, num_items_in_batch=torch.tensor(0)).loss
    found = gradients(model, loss)
    assert loss.item() == 0
    frozen = {f"model.vision_tower.{name}" for name in model.config.sail_unread}
    assert all(float(g.abs().max()) == 0 if g is not None else name in frozen for name, g in found.items())


@pytest.mark.parametrize("kind", ["dinov2", "resnet"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    model, processor = tiny_model(kind)
    model.train()
    batch = batch_of(model, processor)
    expected = gradients(model, model(**batch).loss)
    calls = []
    layer = model.model.vision_tower.encoder.layer[1].attention if kind == "dinov2" else model.model.language_model.layers[1].self_attn
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = gradients(model, model(**batch).loss)
    assert len(calls) == 2, "the layer is computed again in the backward pass"
    assert_same(found, expected)


def test_text_only_batches_train_as_without_images_but_reach_the_head():
    model, processor = tiny_model("dinov2")
    batch = batch_of(model, processor, images=0, texts=2)
    stock = model(**batch).loss  # eval mode: no blank image
    text = {name: gradient for name, gradient in gradients(model, stock).items() if "language_model" in name or "lm_head" in name}
    model.train()
    for extra in ({}, {"pixel_values": torch.zeros(0, 3, SIZE, SIZE)}):
        loss = model(**batch, **extra).loss
        torch.testing.assert_close(loss, stock)
        found = gradients(model, loss)
        assert_same({name: found[name] for name in text}, text)
        for part in ("vision_tower", "sail_head", "multi_modal_projector"):
            rest = {name: g for name, g in found.items() if f".{part}." in name}
            assert rest and all(g is None or not g.any() for g in rest.values())
            assert [name for name, g in rest.items() if g is None] == ["model.vision_tower.embeddings.mask_token"] * (
                part == "vision_tower"
            )


def test_a_frozen_tower_and_batch_statistics_stay_in_eval_mode():
    model, processor = tiny_model("resnet")
    before = copy.deepcopy(model.state_dict())
    model.train()
    assert model.model.vision_tower.training and model.model.sail_head.training
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    model(**batch_of(model, processor))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert not any(module.training for module in model.model.vision_tower.modules()) and model.training


def test_hugging_faces_initialization_overwrites_nothing():
    model, _ = tiny_model("dinov2")
    with torch.no_grad():
        for part in (model.model.sail_head, model.model.multi_modal_projector, model.lm_head):
            for parameter in part.parameters():
                parameter.fill_(0.5)
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    for part in (model.model.sail_head, model.model.multi_modal_projector, model.lm_head):
        assert all((parameter == 0.5).all() for parameter in part.parameters())


@torch.no_grad()
def test_bf16_works_and_is_close():
    model, processor = tiny_model("dinov2")
    batch = batch_of(model, processor)
    expected = model(**batch).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = half(**batch).logits  # the processor's pixels are float32
    assert found.dtype == torch.bfloat16 and (found.float() - expected).norm() < 0.1 * expected.norm()
    mixed = copy.deepcopy(model)
    mixed.model.language_model.to(torch.bfloat16), mixed.lm_head.to(torch.bfloat16)
    assert (mixed(**batch).logits.float() - expected).norm() < 0.1 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(**batch).logits.float() - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_generation_is_the_repeated_argmax():
    model, processor = tiny_model("dinov2")
    inputs = {name: value for name, value in batch_of(model, processor).items() if name != "labels"}
    model.generation_config.eos_token_id = None
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(4):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], position_ids=positions, use_cache=False
        ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("fields", [{"sail_head": "some"}, {"sail_feature": "cls"}])
def test_unknown_choices_are_refused(fields):
    with pytest.raises(UsageError, match="allowed"):
        SailLlavaConfig(**fields)


# the processor


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (36, 64, 3), dtype=np.uint8)).resize((200, 120))


@pytest.mark.parametrize("turned", [False, True])
def test_padding_is_llavas(photo, turned):
    image = photo.rotate(90, expand=True) if turned else photo
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    ours = SailLlavaImageProcessor({"height": SIZE, "width": SIZE}, mean, std, image_aspect_ratio="pad")(image)["pixel_values"]
    llava = LlavaImageProcessorPil(
        do_pad=True, size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=mean, image_std=std, resample=3
    )
    torch.testing.assert_close(ours, torch.from_numpy(np.stack(llava(image)["pixel_values"])).float(), rtol=1e-5, atol=1e-5)


def test_resizing_keeps_the_whole_image_and_normalizes(photo):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    processor = SailLlavaImageProcessor({"height": 20, "width": 30}, mean, std, resample=2, image_aspect_ratio="resize")
    expected = np.array(photo.resize((30, 20), Image.Resampling.BILINEAR)) / 255
    expected = ((expected - mean) / std).transpose(2, 0, 1)
    found = processor([photo, photo])["pixel_values"]
    assert found.shape == (2, 3, 20, 30)
    torch.testing.assert_close(found[1], torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-5)


def test_padding_to_a_shape_that_is_not_square(photo):
    processor = SailLlavaImageProcessor({"height": 20, "width": 40}, [0.0] * 3, [1.0] * 3, resample=0)
    white = Image.new("RGB", (50, 50), "white")
    pixels = processor(white)["pixel_values"][0]
    assert (pixels[:, :, 10:30] == 1).all() and not pixels[:, :, :10].any() and not pixels[:, :, 30:].any()


def test_pad_color_is_zero_after_normalization(photo):
    for mean in ([0.485, 0.456, 0.406], [127 / 255] * 3):
        processor = SailLlavaImageProcessor({"height": SIZE, "width": SIZE}, mean, [0.25] * 3)
        top = processor(photo)["pixel_values"][0][:, 0]
        assert float(top.abs().max()) < 1 / 255 / 0.25
    assert processor.pad_color == (127, 127, 127)


def test_every_kind_of_image_becomes_upright_rgb(photo):
    processor = SailLlavaImageProcessor({"height": SIZE, "width": SIZE})
    reference = processor(photo)["pixel_values"]
    clear = Image.new("RGBA", photo.size, (255, 0, 0, 0))
    assert torch.equal(processor(clear)["pixel_values"], processor(Image.new("RGB", photo.size, "white"))["pixel_values"])
    assert torch.equal(processor(np.array(photo))["pixel_values"], reference)
    assert processor(photo.convert("L"))["pixel_values"].shape == reference.shape
    turned = photo.rotate(90, expand=True)
    turned.getexif()[0x0112] = 6
    assert torch.equal(processor(turned)["pixel_values"], processor(ImageOps.exif_transpose(turned))["pixel_values"])
    with pytest.raises(UsageError, match="pad, resize"):
        SailLlavaImageProcessor(image_aspect_ratio="crop")


@pytest.mark.parametrize("kind", ["dinov2", "timm_cnn"])
def test_mean_filter_and_size_are_the_encoders_own(tmp_path, kind):
    """On a square image that is already as large as the encoder's input, resizing does nothing and both must agree."""
    aligned = load_aligned_encoder(vision=str(tiny_vision(tmp_path / "vision", kind)), sail_head="none")
    ours = image_processor_of(aligned.encoder.transform, aligned.fields["sail_image_size"], "resize")
    own = aligned.encoder.transform.processor
    assert ours.resample == 3 and (ours.image_mean == [0.5] * 3) == (kind == "timm_cnn")
    assert ours.size == {"height": SIZE, "width": SIZE}
    values = torch.arange(256).repeat(3, 1)
    if kind == "dinov2":
        expected = (values / 255 - torch.tensor(own.image_mean)[:, None]) / torch.tensor(own.image_std)[:, None]
    else:
        expected = (values / 255 - 0.5) / 0.5
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    ours.size = {"height": 256, "width": 256}
    torch.testing.assert_close(ours(ramp)["pixel_values"][0, :, 0], expected.float(), rtol=1e-4, atol=1e-5)


def test_texts_and_images_are_matched(photo):
    model, processor = tiny_model("dinov2")
    ids = processor(text="a <image> b", images=photo, return_tensors="pt")["input_ids"][0]
    assert int((ids == model.config.image_token_index).sum()) == processor.image_seq_length == 9
    for text, images in (("no placeholder", photo), ("<image> <image>", photo), ("<image>", None)):
        with pytest.raises(ValueError, match="image"):
            processor(text=text, images=images, return_tensors="pt")
