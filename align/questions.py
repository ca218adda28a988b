"""Questions about sprite scenes with exact answers, chosen so that no answer follows from words alone.

Kinds: exists and relation (yes or no), what, where and count (a few words), caption. What would let a model answer without looking
is taken out: every name is asked about as often when it is there as when it is not, every relation as often when it is true as when
it is not, no place or number is the answer more often than the median one, and in a conversation no turn gives a later one away.
All functions take the scenes of a whole part at once and depend on them and a seed only.
"""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from align.scenes import Scene, Sprite, name_words
from align.wording import Box, article, relation, where

# A sprite is said to be absent only if no sprite that is there could be taken for it or show it: other kinds, no shared word.
ABSENT_GROUPS = {"person": ("food", "music"), "place": ("food", "music"), "face": ("animal", "food", "vehicle", "music")}
ABSENT_ANY = ("animal", "food", "vehicle", "music")
SEEN_INSIDE_OTHERS = (
    *("egg", "fish", "cheese", "horse", "donkey", "cherr", "pumpkin", "corn", "drum", "bird", "tangerine"),
    *("olive branch", "chestnut", "trumpet", "microbe"),  # with the dove, the chipmunk; like the postal horn, the petri dish
)
_SEVERAL = {"of", "and", "with", "couple", "family", "on", "in", "behind"}
DESCRIBE = "Describe the picture."
MOST_EXISTS = 3  # existence questions in one conversation
Pair = tuple[str, str, str]  # name, relation, name


@dataclass(frozen=True)
class Shown:
    """What a scene shows, without its pixels: sprites from back to front, their boxes, the picture's side, and the short caption."""

    sprites: tuple[Sprite, ...]
    boxes: tuple[Box, ...]
    size: int
    caption: str

    @classmethod
    def of(cls, scene: Scene) -> "Shown":
        """Return what `scene` shows."""
        sprites, boxes = zip(*((placed.sprite, placed.box) for placed in scene.objects), strict=True)
        return cls(sprites, boxes, scene.image.width, scene.short)


@dataclass(frozen=True)
class Question:
    """A question about a scene with its exact answer; `names` are the sprites that question and answer show to be there."""

    kind: str  # exists | relation | what | where | count | caption
    question: str
    answer: str
    names: frozenset[str] = frozenset()


def surely_absent(sprite: Sprite, sprites: Iterable[Sprite]) -> bool:
    """Return whether nobody could find `sprite` in a picture of `sprites`."""
    groups, words = set(ABSENT_ANY), set()
    for other in sprites:
        groups &= set(ABSENT_GROUPS.get(other.group, ABSENT_ANY)) - {other.group}
        words |= name_words(other.name)
    return sprite.group in groups and words.isdisjoint(name_words(sprite.name)) and _can_be_absent(sprite)


def is_one_thing(sprite: Sprite) -> bool:
    """Return whether anyone would count the sprite as one object: no pair, group, couple, person with something or view."""
    return not _SEVERAL & set(sprite.name.split()) and sprite.group not in ("person", "place")


def conversations(scenes: Sequence[Shown], seed: int) -> list[list[Question]]:
    """Return for each scene the turns of a conversation, the last of them its caption.

    The order is drawn, but a turn that would tell the answer of another comes after it: existence before what names the sprite,
    count before what makes sense with one or two only. Of relation, what and where, which tell of each other, a scene gets one kind.
    Existence questions go on until the answer is yes or there are three, each yes or no with the same chance whatever came before.
    """
    rng = _generator(seed, 1)
    own = [_own(scene, rng) for scene in scenes]
    turns = _existence_until_yes(scenes, own, rng)
    related: list[tuple[int, Pair]] = []
    open_ended: list[tuple[int, Question]] = []
    for number, scene in enumerate(scenes):
        open_ended += [(number, question) for question in _count(scene)]
        affirmed = frozenset().union(*(turn.names for turn in turns[number]))
        pair, places, chance = _pair(scene, affirmed, rng), _places(scene, rng), rng.random()
        if pair is not None and chance < 0.4:
            related.append((number, pair))
        elif pair is not None and len(scene.sprites) == 2 and (chance < 0.8 or not places):
            turns[number].append(_what(*pair))
        else:
            if len(scene.sprites) == 1 and not affirmed:
                turns[number].append(_what(scene.sprites[0].name))
            open_ended += [(number, question) for question in places[: 2 if len(scene.sprites) > 2 else 1]]
    for number, question in [*_relations(related), *_capped(open_ended)]:
        turns[number].append(question)
    rows = []
    for number, asked in enumerate(turns):
        rows.append([*_ordered(asked, own[number], rng), Question("caption", DESCRIBE, scenes[number].caption)])
    return rows


def single_questions(scenes: Sequence[Shown], seed: int) -> list[list[Question]]:
    """Return for each scene questions to be asked one by one (a test set), the last of them its caption.

    Scenes are paired for existence: each of two is asked about its own sprite and about the other's.
    """
    rng = _generator(seed, 2)
    own = [_own(scene, rng) for scene in scenes]
    asked: list[list[Question]] = [[] for _ in scenes]
    waiting: list[int] = []
    for one, mine in enumerate(own):
        if mine is None:
            continue
        for other in waiting:
            theirs = own[other]
            assert theirs is not None
            if surely_absent(mine, scenes[other].sprites) and surely_absent(theirs, scenes[one].sprites):
                for number, there, absent in ((one, mine, theirs), (other, theirs, mine)):
                    asked[number] += [_exists(there, "yes"), _exists(absent, "no")]
                waiting.remove(other)
                break
        else:
            waiting.append(one)
    related: list[tuple[int, Pair]] = []
    open_ended: list[tuple[int, Question]] = []
    for number, scene in enumerate(scenes):
        pair, places = _pair(scene, frozenset(), rng), _places(scene, rng)
        if pair is not None:
            related.append((number, pair))
        if pair is not None and len(scene.sprites) == 2:
            asked[number].append(_what(*pair))
        elif len(scene.sprites) == 1:
            asked[number].append(_what(scene.sprites[0].name))
        open_ended += [(number, question) for question in [*places[:1], *_count(scene)]]
    for number, question in [*_relations(related), *_capped(open_ended)]:
        asked[number].append(question)
    return [[*questions, Question("caption", DESCRIBE, scene.caption)] for questions, scene in zip(asked, scenes, strict=True)]


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, stream, 9]))


def _can_be_absent(sprite: Sprite) -> bool:
    return sprite.group in ABSENT_ANY and not any(part in sprite.name for part in SEEN_INSIDE_OTHERS)


def _own(scene: Shown, rng: np.random.Generator) -> Sprite | None:
    """Return a sprite of the scene that could be said to be absent elsewhere, if there is one."""
    choices = [sprite for sprite in scene.sprites if _can_be_absent(sprite)]
    return choices[int(rng.integers(len(choices)))] if choices else None


def _exists(sprite: Sprite, answer: str) -> Question:
    names = frozenset([sprite.name]) if answer == "yes" else frozenset()
    return Question("exists", f"Is there {article(sprite.name)} in the picture?", answer, names)


def _related(pair: Pair, answer: str) -> Question:
    first, said, second = pair
    one, other = (first, second) if answer == "yes" else (second, first)
    return Question("relation", f"Is the {one} {said} the {other}?", answer, frozenset([first, second]))


def _what(first: str, said: str = "", second: str = "") -> Question:
    question = f"What is {said} the {second}?" if second else "What is in the picture?"
    return Question("what", question, first, frozenset([first, second] if second else [first]))


def _places(scene: Shown, rng: np.random.Generator) -> list[Question]:
    """Return where each sprite is that has a clear place, in a drawn order."""
    drawn = [int(number) for number in rng.permutation(len(scene.sprites))]
    named = [(scene.sprites[number].name, where(scene.boxes[number], scene.size)) for number in drawn]
    return [Question("where", f"Where is the {name}?", place, frozenset([name])) for name, place in named if place is not None]


def _count(scene: Shown) -> list[Question]:
    if not all(is_one_thing(sprite) for sprite in scene.sprites):
        return []
    return [Question("count", "How many objects are in the picture?", str(len(scene.sprites)))]


def _pair(scene: Shown, affirmed: frozenset[str], rng: np.random.Generator) -> Pair | None:
    """Return two sprites, drawn among those with a clear relation: one of the `affirmed` comes second, where a question names it."""
    drawn = [int(number) for number in rng.permutation(len(scene.sprites))]
    for one, other in itertools.combinations(drawn, 2):
        if scene.sprites[one].name in affirmed:
            one, other = other, one
        said = relation(scene.boxes[one], scene.boxes[other])
        if said is not None:
            return scene.sprites[one].name, said, scene.sprites[other].name
    return None


def _existence_until_yes(scenes: Sequence[Shown], own: Sequence[Sprite | None], rng: np.random.Generator) -> list[list[Question]]:
    """Return the existence questions of each scene: a name that is asked about and there in one is asked about and absent in another."""
    asked: list[list[Question]] = [[] for _ in scenes]
    positive, free = [], []  # scenes whose own sprite is asked about; places for questions that are answered no
    for number, sprite in enumerate(own):
        draws = rng.random(MOST_EXISTS) < 0.5
        if sprite is None:
            continue
        refusals = int(draws.argmax()) if draws.any() else MOST_EXISTS
        free += [number] * refusals
        if refusals < MOST_EXISTS:
            positive.append(number)
    affirmed = []
    for number in positive:
        sprite = own[number]
        assert sprite is not None
        question = _exists(sprite, "no")
        fits = (k for k, other in enumerate(free) if question not in asked[other] and surely_absent(sprite, scenes[other].sprites))
        place = next(fits, None)
        if place is not None:
            asked[free.pop(place)].append(question)
            affirmed.append((number, _exists(sprite, "yes")))
    for number, question in affirmed:
        asked[number].append(question)
    return asked


def _relations(found: Sequence[tuple[int, Pair]]) -> Iterable[tuple[int, Question]]:
    """Yield a question for each (scene, pair): of each relation as many that are true as are not."""
    by_word: dict[str, list[tuple[int, Pair]]] = defaultdict(list)
    for number, pair in found:
        by_word[pair[1]].append((number, pair))
    for items in by_word.values():
        for order, (number, pair) in enumerate(items[: len(items) // 2 * 2]):
            yield number, _related(pair, "no" if order % 2 else "yes")


def _capped(questions: Sequence[tuple[int, Question]]) -> Iterable[tuple[int, Question]]:
    """Yield the (scene, question) pairs, of each kind no answer more often than the median one of that kind (the lower of two)."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in questions:
        counts[question.kind][question.answer] += 1
    most = {kind: statistics.median_low(answers.values()) for kind, answers in counts.items()}
    given: Counter[tuple[str, str]] = Counter()
    for number, question in questions:
        given[question.kind, question.answer] += 1
        if given[question.kind, question.answer] <= most[question.kind]:
            yield number, question


def _ordered(turns: Sequence[Question], own: Sprite | None, rng: np.random.Generator) -> list[Question]:
    """Return the turns in a drawn order in which none tells the answer of one that follows."""
    left, ordered = list(turns), []
    while left:
        ready = [k for k, turn in enumerate(left) if not any(_tells(turn, other, own) for other in left if other is not turn)]
        exists = [k for k in ready if left[k].kind == "exists"]
        ready = [k for k in ready if k not in exists[1:]]  # these keep their order: they end with yes
        ordered.append(left.pop(ready[int(rng.integers(len(ready)))]))
    return ordered


def _tells(earlier: Question, later: Question, own: Sprite | None) -> bool:
    """Return whether `earlier`, with its answer, gives away the answer of `later` in a scene whose own sprite is `own`."""
    if later.kind == "exists":  # whatever its answer, or the order would tell it
        return earlier.kind != "exists" and own is not None and own.name in earlier.names
    if later.kind == "count":
        return earlier.kind in ("relation", "what")
    return later.kind == "what" and later.answer in earlier.names and earlier.kind == "where"
