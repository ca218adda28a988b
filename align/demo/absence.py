"""Which sprites can be said to be absent from a picture without anyone finding them in it after all."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from align.demo.scenes import Sprite, name_words

# Which kinds of sprites can be said to be absent from a picture that shows a kind; what a person may wear, hold or ride is not
# among them, nor what may stand in a view. Shapes are in too many pictures to be absent from any.
_ANYWHERE = frozenset({"food", "music"})
_THINGS = _ANYWHERE | {"animal", "vehicle", "nature", "clothing", "object"}
ABSENT_WITH = {
    "animal": _THINGS | {"person", "place"},
    "food": _THINGS | {"person", "place", "face", "body"},
    "vehicle": _THINGS | {"person", "face", "body"},
    "music": _THINGS | {"person", "place", "face", "body"},
    "nature": _THINGS | {"person", "face", "body"},
    "clothing": _THINGS | {"person", "place", "face", "body"},
    "object": _THINGS | {"body"},
    "body": _THINGS - {"clothing"},
    "shape": _THINGS | {"person", "place"},
    "face": _THINGS - {"clothing"} | {"place"},
    "person": _THINGS - {"clothing", "object"},
    "place": _ANYWHERE | {"animal", "clothing", "body"},
}
LIKE_THEMSELVES = frozenset({"face", "person", "place", "body", "shape"})  # kinds whose sprites are hard to tell apart
SEEN_INSIDE_OTHERS = (  # parts of names
    *("egg", "fish", "cheese", "horse", "donkey", "cherr", "pumpkin", "corn", "drum", "bird", "tangerine"),
    *("olive branch", "chestnut", "trumpet", "microbe"),  # with the dove, the chipmunk; like the postal horn, the petri dish
)
PARTS = {  # whole names
    *("basket", "battery", "bell", "bone", "brick", "bucket", "cardboard box", "chain link", "cloud", "coin", "door", "ear"),
    *("eye", "feather", "flame", "foot", "framed picture", "gear", "glowing star", "group of bubbles", "group of sparkles"),
    *("hand", "hole", "hook", "jar", "key", "knot", "ladder", "leaf fluttering in the wind", "leg", "light bulb"),
    *("maple leaf", "mouth", "nose", "ocean wave", "puff of smoke", "ribbon", "ring", "rock", "seat", "seedling"),
    *("sheet of paper", "siren light", "star", "tongue", "tooth", "water droplet", "wheel", "window", "wing"),
}
# Of the sprites with a word of the same line, none is said to be absent where another one is.
LOOKALIKES = tuple(line.split() for line in Path(__file__).with_name("lookalikes.txt").read_text().splitlines())
_FAMILIES = {word: frozenset(number for number, line in enumerate(LOOKALIKES) if word in line) for line in LOOKALIKES for word in line}


def surely_absent(sprite: Sprite, sprites: Iterable[Sprite]) -> bool:
    """Return whether nobody could find `sprite` in a picture of `sprites`.

    Of a sprite's own kind, too, others can be absent, or a glance at the kind would be enough to answer: all that share no word with
    it, are no look-alikes (LOOKALIKES) and are not of a kind whose sprites are hard to tell apart. A name that is often drawn into
    other sprites (SEEN_INSIDE_OTHERS, PARTS) is never said to be absent. Of other kinds, ABSENT_WITH tells which can be absent.
    """
    return can_be_absent(sprite) and all(_clearly_other(sprite, other) for other in sprites)


def can_be_absent(sprite: Sprite) -> bool:
    """Return whether `sprite` can be said to be absent from any picture at all."""
    return (
        sprite.group not in ("shape", "group") and sprite.name not in PARTS and not any(part in sprite.name for part in SEEN_INSIDE_OTHERS)
    )


@lru_cache(maxsize=1 << 20)
def _clearly_other(sprite: Sprite, shown: Sprite) -> bool:
    """Return whether `sprite` is neither what `shown` shows nor part of it, nor could be taken for it."""
    if sprite.group not in ABSENT_WITH.get(shown.group, _ANYWHERE) or (sprite.group == shown.group and sprite.group in LIKE_THEMSELVES):
        return False
    words, others = name_words(sprite.name), name_words(shown.name)
    families = frozenset().union(*(_FAMILIES.get(word, frozenset()) for word in words))
    return words.isdisjoint(others) and families.isdisjoint(frozenset().union(*(_FAMILIES.get(word, frozenset()) for word in others)))
