"""Small conversations with pictures: files of them, the chat that encodes them, and an image processor."""

from functools import lru_cache

import numpy as np

from mllm.conversations.tokens import Chat
from mllm.model.processing import SailLlavaImageProcessor
from tests.support.tiny_mllm import tiny_tokenizer

PROCESSOR = SailLlavaImageProcessor({"height": 8, "width": 8}, image_mean=(0.5, 0.25, 0.75), image_std=(0.5, 0.5, 0.5))


@lru_cache
def chat(image_tokens=4, template="vicuna_v1"):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return Chat(tokenizer, template, image_tokens=image_tokens)


def conversation(number, turns=1, images=0, words=3):
    marks = "<image>\n" * images
    said = []
    for turn in range(turns):
        said += [{"from": "human", "value": (marks if turn == 0 else "") + "what is there? " + "red " * words}]
        said += [{"from": "gpt", "value": f"a dog {number}" + " and a cat" * words}]
    return {"id": number, **({"image": [f"{number % 5}.png"] * images} if images else {}), "conversations": said}


def varied(count, seed=0):
    random = np.random.default_rng(seed)
    return [conversation(n, *map(int, (random.integers(1, 4), random.integers(0, 3), random.integers(0, 9)))) for n in range(count)]
