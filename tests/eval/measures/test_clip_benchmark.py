"""Metrics against CLIP_benchmark's."""

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification as their_classification
from clip_benchmark.metrics import zeroshot_retrieval as their_retrieval
from torch.nn.functional import normalize

from eval.measures.retrieval import retrieval_entries, retrieve
from eval.measures.zeroshot import class_weights, zero_shot_classification
from eval.results.metrics import mean_per_class


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_classification_is_as_clip_benchmark_defines_it(monkeypatch):
    # numpy no longer turns an array of one element into a float, which clip_benchmark 1.6 asks of it
    monkeypatch.setattr(their_classification, "float", lambda array: array.item(), raising=False)
    torch.manual_seed(0)
    images, sentences, labels = normalize(torch.randn(200, 16), dim=-1), torch.randn(7 * 3, 16), torch.randint(0, 7, (200,))

    class Model:
        def encode_text(self, numbers):
            return sentences[numbers]

    classes = {f"class {c}": [3 * c, 3 * c + 1, 3 * c + 2] for c in range(7)}
    theirs = their_classification.zero_shot_classifier(Model(), torch.tensor, list(classes), classes, "cpu", amp=False)
    ours = class_weights(normalize(sentences, dim=-1), [3] * 7)
    close(ours.T, theirs)
    answers = zero_shot_classification(images, ours, labels)
    expected = their_classification.accuracy(images @ theirs, labels, topk=(1, 5))
    assert [float(np.mean(answers.ranks <= k)) for k in (1, 5)] == pytest.approx(expected)
    balanced = their_classification.balanced_accuracy_score(labels, (images @ theirs).argmax(1))
    assert mean_per_class(answers.ranks == 1, labels.numpy(), 7) == pytest.approx(balanced)


def test_retrieval_is_as_clip_benchmark_defines_it():
    torch.manual_seed(0)
    owner = torch.repeat_interleave(torch.arange(40), 5)
    images = normalize(torch.randn(40, 12), dim=-1)
    captions = normalize(images[owner] + 1.5 * torch.randn(200, 12), dim=-1)
    answers = retrieve(images, captions, owner)
    found = {entry.metric: entry.value for entry in retrieval_entries(answers, "t", "m", np.random.default_rng(0), 0.95)}
    scores = captions @ images.T
    positive = owner[:, None] == torch.arange(40)
    for k in (1, 5, 10):
        t2i = (their_retrieval.recall_at_k(scores, positive, k) > 0).float().mean().item()
        i2t = (their_retrieval.recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
        assert (found[f"t2i_r@{k}"], found[f"i2t_r@{k}"]) == pytest.approx((t2i, i2t)) and 0 < t2i < 1
