"""Words: the tokens of texts that tell something, and which text has which."""

import pytest
import torch

from align.common.errors import DataError
from align.model.words import Words


class Spaces:
    """A tokenizer whose tokens are whole numbers between spaces; 0 is special."""

    all_special_ids = [0]

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [list(map(int, text.split())) for text in texts]}


def test_words_are_the_most_frequent_tokens_that_some_texts_lack():
    words = Words(Spaces(), 6)
    texts = [torch.tensor([1, 2, 4]), torch.tensor([1, 3]), torch.tensor([1, 2, 5])]
    words.count(texts)
    words.choose(2)
    assert words.chosen.tolist() == [2, 3] and words.shares.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert words.presence(texts).tolist() == [[True, False], [False, True], [True, False]]
    words.choose(100)
    assert words.chosen.tolist() == [2, 3, 4, 5], "token 1 is in every text, token 0 in none"


def test_words_are_cut_by_the_tokenizer_without_special_tokens():
    assert [ids.tolist() for ids in Words(Spaces(), 6).ids(["1 2 1", "0 5"])] == [[1, 2], [5]]


def test_texts_of_the_same_words_are_refused():
    words = Words(Spaces(), 6)
    words.count([torch.tensor([1, 2])] * 3)
    with pytest.raises(DataError, match="all use the same words"):
        words.choose(10)
