"""A model trained as one, measured from the command line."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize

from eval.measures.config import EvalConfig
from eval.models import reference
from eval.results.records import load_results
from eval.run import main
from tests.support.tiny_clip import save_hugging_face


def test_a_reference_model_is_measured_and_a_second_run_runs_no_encoder(tmp_path, monkeypatch):
    model, tokenizer = save_hugging_face(tmp_path / "model", "clip")
    colors = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    rng = np.random.default_rng(0)
    for name, color in colors.items():
        (tmp_path / "data" / "colors" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.clip(np.full((32, 32, 3), color) + rng.integers(-40, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "colors" / name / f"{number}.png")
    (tmp_path / "colors.yaml").write_text("id: colors\nkind: classification\nlayout: folder\npath: colors\ntemplates: plain\n")
    config = EvalConfig(
        model=(f"tiny=hf:{tmp_path / 'model'}",), tasks=(str(tmp_path / "colors.yaml"),), data_root=str(tmp_path / "data"),
        output=str(tmp_path / "out"), workers=0, device="cpu", batch_size=5,
    )  # fmt: skip
    main(config)
    results = load_results(tmp_path / "out")
    assert [(one.name, one.kind) for one in results.models] == [("tiny", "clip"), ("majority", "majority"), ("chance", "chance")]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    right = 0
    with torch.no_grad():
        texts = [tokenizer(name, truncation=True, max_length=12, return_tensors="pt") for name in sorted(colors)]
        weights = torch.cat([model.get_text_features(input_ids=t["input_ids"]).pooler_output for t in texts])
        for path in (tmp_path / "data" / "colors").rglob("*.png"):
            pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
            cosines = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1) @ normalize(weights, dim=-1).T
            right += sorted(colors)[int(cosines.argmax())] == path.parent.name
    assert results.value("colors", "acc@1", "tiny").value == pytest.approx(right / 12)
    assert (tmp_path / "out" / "report.html").is_file()

    def touched(*_):
        raise AssertionError("an encoder was run")

    monkeypatch.setattr(reference.Images, "__call__", touched)
    monkeypatch.setattr(reference.Sentences, "encode", touched)
    main(config)
    assert load_results(tmp_path / "out").entries == results.entries
