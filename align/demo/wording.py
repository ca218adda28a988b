"""True sentences about boxes: sizes, places and relations in words, and captions made of them.

A word is used only where it is clearly true, so that two people would agree. Boxes are (left, top, right, bottom) in pixels of a square
picture whose side is `size`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[int, int, int, int]
_SOUNDS_LIKE_A = ("one", "uni", "ewe", "eu")
_SOUNDS_LIKE_AN = ("hour", "x-ray")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SAYINGS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_PLACES = {
    ("left", "top"): "in the top left",
    ("left", "middle"): "on the left",
    ("left", "bottom"): "in the bottom left",
    ("middle", "top"): "at the top",
    ("middle", "middle"): "in the center",
    ("middle", "bottom"): "at the bottom",
    ("right", "top"): "in the top right",
    ("right", "middle"): "on the right",
    ("right", "bottom"): "in the bottom right",
}


@dataclass(frozen=True)
class Thing:
    """A named box."""

    name: str
    box: Box


def article(name: str) -> str:
    """Return `name` with its indefinite article."""
    vowel = name[0] in "aeiou" and not name.startswith(_SOUNDS_LIKE_A)
    return f"an {name}" if vowel or name.startswith(_SOUNDS_LIKE_AN) else f"a {name}"


def relation(one: Box, other: Box) -> str | None:
    """Return "left of", "right of", "above" or "below" if `one` is clearly that to `other`, else None.

    Clearly: along that axis, boxes overlap by at most a tenth of the smaller, and centers are 1.5 times as far apart as across it.
    """
    dx = (other[0] + other[2] - one[0] - one[2]) / 2
    dy = (other[1] + other[3] - one[1] - one[3]) / 2
    gap_x = max(one[0], other[0]) - min(one[2], other[2])
    gap_y = max(one[1], other[1]) - min(one[3], other[3])
    least_width, least_height = min(one[2] - one[0], other[2] - other[0]), min(one[3] - one[1], other[3] - other[1])
    if gap_x >= -0.1 * least_width and abs(dx) >= 1.5 * abs(dy) and dx != 0:
        return "left of" if dx > 0 else "right of"
    if gap_y >= -0.1 * least_height and abs(dy) >= 1.5 * abs(dx) and dy != 0:
        return "above" if dy > 0 else "below"
    return None


def where(box: Box, size: int) -> str | None:
    """Return the place of the center of `box`, for example "in the top left", or None if it lies between places."""
    return _PLACES.get((_third(box[0] + box[2], size, "left", "right"), _third(box[1] + box[3], size, "top", "bottom")))


def size_word(box: Box, size: int) -> str:
    """Return "small ", "large " or "" by the longer side of `box` relative to the picture."""
    share = max(box[2] - box[0], box[3] - box[1]) / size
    return "small " if share < 0.25 else "large " if share > 0.5 else ""


def background_sentence(texture: str, first: str, second: str) -> str:
    """Return a background as a phrase, for example "a red and white checkered background"."""
    return {
        "plain": f"a plain {first} background",
        "gradient": f"a background that fades from {first} to {second}",
        "grain": f"a grainy {first} background",
        "mottled": f"a mottled {first} and {second} background",
        "stripes": f"a background with {first} and {second} stripes",
        "checks": f"a {first} and {second} checkered background",
        "dots": f"{article(first)} background with {second} dots",
    }[texture]


def short_caption(rng: np.random.Generator, things: Sequence[Thing], size: int, background: str) -> str:
    """Return a phrase that names the things, sometimes with a true relation, a size or the background."""
    named = [article((size_word(thing.box, size) if rng.random() < 0.25 else "") + thing.name) for thing in things]
    style = rng.random()
    if len(things) == 2 and style < 0.65:
        said = _related(rng, things, named)
        if said is not None:
            return said
    if len(things) > 2 and style < 0.4:
        for start in range(len(things) - 1):
            said = _related(rng, things[start : start + 2], named[start : start + 2])
            if said is not None:
                return f"{said}, and {_listed(named[:start] + named[start + 2 :])}"
    phrase = _listed(named)
    return _one_of(rng, (phrase, phrase, phrase, f"a picture of {phrase}", f"an image of {phrase}", f"{phrase} on {background}"))


def long_caption(rng: np.random.Generator, things: Sequence[Thing], size: int, background: str) -> str:
    """Return one to three sentences with all things, their sizes, places and relations, and the background."""
    named = [article(size_word(thing.box, size) + thing.name) for thing in things]
    places = [where(thing.box, size) for thing in things]
    placed = [f"{name} {place}" if place is not None else name for name, place in zip(named, places, strict=True)]
    style = int(rng.integers(4))
    if style == 0:
        sentences = [f"{_one_of(rng, ('This picture shows', 'The image shows', 'We see'))} {_listed(placed)} on {background}."]
    elif style == 1:
        sentences = [f"On {background} there {'is' if len(things) == 1 else 'are'} {_listed(placed)}."]
    elif style == 2:
        sentences = [f"{_capital(_listed(placed))}.", f"{_one_of(rng, ('The picture has', 'Behind, there is'))} {background}."]
    else:
        sentences = [f"A picture of {_listed(named)} on {background}."]
        sentences += [f"The {thing.name} is {place}." for thing, place in zip(things, places, strict=True) if place is not None]
    if len(things) > 1 and rng.random() < 0.75:
        start = int(rng.integers(len(things) - 1))
        two = things[start : start + 2]
        said = _related(rng, two, [f"the {thing.name}" for thing in two], verb=" is")
        if said is not None:
            sentences.append(f"{_capital(said)}.")
    return " ".join(sentences)


def _third(doubled: int, size: int, low: str, high: str) -> str:
    share = doubled / 2 / size
    if share <= 0.37:
        return low
    if share >= 0.63:
        return high
    return "middle" if 0.43 <= share <= 0.57 else "between"


def _related(rng: np.random.Generator, two: Sequence[Thing], named: Sequence[str], verb: str = "") -> str | None:
    words = relation(two[0].box, two[1].box)
    if words is None:
        return None
    if rng.random() < 0.5:
        words, named = _OPPOSITE[words], named[::-1]
    return f"{named[0]}{verb} {_one_of(rng, _SAYINGS[words])} {named[1]}"


def _one_of(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
