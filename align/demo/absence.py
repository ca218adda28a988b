"""Which sprites are surely absent from a picture, so that nobody could find them in it."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from align.demo.scenes import Sprite, name_words

# For each kind in a picture, the kinds that can be absent. A person may wear, hold or ride things, a view may contain them, and shapes
# are in too many pictures: such kinds are left out.
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
    *("olive branch", "chestnut", "trumpet", "microbe"),  # drawn with the dove, the chipmunk; like the postal horn, the petri dish
)
PARTS = {  # whole names
    *("basket", "battery", "bell", "bone", "brick", "bucket", "cardboard box", "chain link", "cloud", "coin", "door", "ear"),
    *("eye", "feather", "flame", "foot", "framed picture", "gear", "glowing star", "group of bubbles", "group of sparkles"),
    *("hand", "hole", "hook", "jar", "key", "knot", "ladder", "leaf fluttering in the wind", "leg", "light bulb"),
    *("maple leaf", "mouth", "nose", "ocean wave", "puff of smoke", "ribbon", "ring", "rock", "seat", "seedling"),
    *("sheet of paper", "siren light", "star", "tongue", "tooth", "water droplet", "wheel", "window", "wing"),
}
# Words of look-alikes, one group per line. If a picture shows one of a group, no other one counts as absent.
LOOKALIKES = tuple(line.split() for line in Path(__file__).with_name("lookalikes.txt").read_text().splitlines())
_FAMILIES = {word: frozenset(number for number, line in enumerate(LOOKALIKES) if word in line) for line in LOOKALIKES for word in line}


def surely_absent(sprite: Sprite, sprites: Iterable[Sprite]) -> bool:
    """Return whether nobody could find `sprite` in a picture of `sprites`.

    A name that is often drawn into other sprites (SEEN_INSIDE_OTHERS, PARTS) never counts as absent. ABSENT_WITH lists the kinds that
    can be absent. Sprites of the same kind can be absent too, else the kind alone would give the answer. They must share no word, be no
    look-alikes (LOOKALIKES), and not be of a kind in LIKE_THEMSELVES.
    """
    return can_be_absent(sprite) and all(_clearly_other(sprite, other) for other in sprites)


def can_be_absent(sprite: Sprite) -> bool:
    """Return whether `sprite` can be called absent from any picture at all."""
    return (
        sprite.group not in ("shape", "group") and sprite.name not in PARTS and not any(part in sprite.name for part in SEEN_INSIDE_OTHERS)
    )


@lru_cache(maxsize=1 << 20)
def _clearly_other(sprite: Sprite, shown: Sprite) -> bool:
    """Return whether `sprite` is not in `shown`, not a part of it and not similar to it."""
    if sprite.group not in ABSENT_WITH.get(shown.group, _ANYWHERE) or (sprite.group == shown.group and sprite.group in LIKE_THEMSELVES):
        return False
    words, others = name_words(sprite.name), name_words(shown.name)
    families = frozenset().union(*(_FAMILIES.get(word, frozenset()) for word in words))
    return words.isdisjoint(others) and families.isdisjoint(frozenset().union(*(_FAMILIES.get(word, frozenset()) for word in others)))
