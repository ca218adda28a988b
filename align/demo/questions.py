"""Questions about sprite scenes with exact answers, balanced so that words alone give no answer.

Kinds: exists and relation (yes or no), what, where and count (a few words), caption. Each name is asked about as often when present as
when absent, and each relation as often when true as when false. No place or number is the answer more often than the median one. In a
conversation no turn gives a later answer away. Functions take all scenes of a part at once and depend only on them and a seed.
"""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from align.demo.absence import can_be_absent, surely_absent
from align.demo.config import KINDS
from align.demo.scenes import Scene, Sprite
from align.demo.wording import Box, article, relation, where

_SEVERAL = {"of", "and", "with", "couple", "family", "on", "in", "behind"}
DESCRIBE = "Describe the picture."
CAPTION_EVERY = 8  # scenes: more captions would be most of what is learned, as they are long
MOST_EXISTS = 4  # existence questions in one conversation; more would crowd out the other kinds
Pair = tuple[str, str, str]  # name, relation, name


@dataclass(frozen=True)
class Shown:
    """What a scene shows, without pixels: sprites from back to front, their boxes, the picture's side in pixels, the short caption."""

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
    """A question about a scene with its exact answer. `names`: the sprites that question and answer reveal to be there."""

    kind: str  # one of KINDS
    question: str
    answer: str
    names: frozenset[str] = frozenset()


def is_one_thing(sprite: Sprite) -> bool:
    """Return whether anyone would count the sprite as one object: no group, couple or view, and nobody who holds something."""
    return not _SEVERAL & set(sprite.name.split()) and sprite.group not in ("person", "place")


def conversations(scenes: Sequence[Shown], seed: int, kinds: Sequence[str] = KINDS) -> list[list[Question]]:
    """Return for each scene the turns of a conversation; every eighth ends with the caption.

    Turns of other kinds than `kinds` are left out; without any turn left a scene has its caption alone.

    Existence questions go on until every sprite that can be has been named, four at most. Each answer is yes or no with equal chance,
    independent of earlier ones. Absent names are drawn from the other scenes. Relation, what and where give each other away, so a scene
    gets one kind (or what and where, if it has one sprite). A sprite that is the answer of a what question is not asked about.

    The order is random, but a turn that would give away another answer comes after it: first the count (yes after yes would give it
    away), then existence, then questions that name sprites. Some hints remain: the count limits how many answers can still be yes, a
    place rules itself out for the next sprite, and every turn hints at the caption, which comes last.
    """
    rng = _generator(seed, 1)
    turns: list[list[Question]] = [[] for _ in scenes]
    related: list[tuple[int, Pair]] = []
    open_ended: list[tuple[int, Question]] = []
    named: list[list[Sprite]] = []  # the sprites of each scene whose existence is asked about
    for number, scene in enumerate(scenes):
        open_ended += [(number, question) for question in _count(scene)]
        pair, places, chance = _pair(scene, rng), _places(scene, rng), rng.random()
        hidden = None
        if pair is not None and chance < 0.2:
            related.append((number, pair))
        elif pair is not None and len(scene.sprites) == 2 and (chance < 0.65 or not places):
            turns[number].append(_what(*pair))
            hidden = pair[0]
        else:
            if len(scene.sprites) == 1 and chance < 0.6:
                turns[number].append(_what(scene.sprites[0].name))
                hidden = scene.sprites[0].name
            open_ended += [(number, question) for question in places[: max(1, len(scene.sprites) - 1)]]
        named.append([scene.sprites[k] for k in rng.permutation(len(scene.sprites)) if scene.sprites[k].name != hidden])
    for asked, existence in zip(turns, _existence(scenes, named, rng), strict=True):
        asked += existence
    for number, question in [*_relations(related), *_capped(open_ended)]:
        turns[number].append(question)
    found = []
    for number, (asked, scene) in enumerate(zip(turns, scenes, strict=True)):
        ordered = [turn for turn in _ordered(asked, rng) if turn.kind in kinds]
        if (number % CAPTION_EVERY == 0 and "caption" in kinds) or not ordered:
            ordered.append(Question("caption", DESCRIBE, scene.caption))
        found.append(ordered)
    return found


def single_questions(scenes: Sequence[Shown], seed: int) -> list[list[Question]]:
    """Return for each scene the questions of a test set, to ask one by one, its caption last."""
    rng = _generator(seed, 2)
    own = [_own(scene, rng) for scene in scenes]
    asked: list[list[Question]] = [[] for _ in scenes]
    waiting: list[int] = []  # scenes to pair: each of two is asked about its own sprite and the other's
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
        pair, places = _pair(scene, rng), _places(scene, rng)
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


def _own(scene: Shown, rng: np.random.Generator) -> Sprite | None:
    """Return a random sprite of the scene that could be absent elsewhere, or None."""
    choices = [sprite for sprite in scene.sprites if can_be_absent(sprite)]
    return choices[int(rng.integers(len(choices)))] if choices else None


def _exists(sprite: Sprite, answer: str) -> Question:
    names = frozenset([sprite.name]) if answer == "yes" else frozenset()
    return Question("exists", f"Is there {article(sprite.name)}?", answer, names)


def _related(pair: Pair, answer: str) -> Question:
    first, said, second = pair
    one, other = (first, second) if answer == "yes" else (second, first)
    return Question("relation", f"Is the {one} {said} the {other}?", answer, frozenset([first, second]))


def _what(first: str, said: str = "", second: str = "") -> Question:
    question = f"What is {said} the {second}?" if second else "What is it?"
    return Question("what", question, first, frozenset([first, second] if second else [first]))


def _places(scene: Shown, rng: np.random.Generator) -> list[Question]:
    """Return a where question for each sprite with a clear place, in random order."""
    drawn = [int(number) for number in rng.permutation(len(scene.sprites))]
    named = [(scene.sprites[number].name, where(scene.boxes[number], scene.size)) for number in drawn]
    return [Question("where", f"Where is the {name}?", place, frozenset([name])) for name, place in named if place is not None]


def _count(scene: Shown) -> list[Question]:
    if not all(is_one_thing(sprite) for sprite in scene.sprites):
        return []
    return [Question("count", "How many objects are there?", str(len(scene.sprites)))]


def _pair(scene: Shown, rng: np.random.Generator) -> Pair | None:
    """Return two sprites and their relation, drawn from the pairs with a clear one, or None."""
    drawn = [int(number) for number in rng.permutation(len(scene.sprites))]
    for one, other in itertools.combinations(drawn, 2):
        said = relation(scene.boxes[one], scene.boxes[other])
        if said is not None:
            return scene.sprites[one].name, said, scene.sprites[other].name
    return None


def _existence(scenes: Sequence[Shown], named: Sequence[Sequence[Sprite]], rng: np.random.Generator) -> list[list[Question]]:
    """Return existence questions about each scene's `named` sprites, in their order, and as many about absent ones.

    A name that is asked about where it is present is also asked about where it is absent, or else not at all.
    """
    asked: list[list[Question | None]] = [[] for _ in scenes]
    present: list[tuple[int, int, Sprite]] = []  # scene, place among its questions, sprite
    free: list[tuple[int, int]] = []  # scene and place of questions that are answered no
    often = {sprite: _often_absent(sprite, scenes) for sprite in dict.fromkeys(itertools.chain(*named))}
    for number, sprites in enumerate(named):
        left = [sprite for sprite in sprites if often[sprite]]
        while left and len(asked[number]) < MOST_EXISTS:
            if rng.random() < 0.5:
                present.append((number, len(asked[number]), left.pop()))
            else:
                free.append((number, len(asked[number])))
            asked[number].append(None)
    room = {number: sum(surely_absent(sprite, scenes[number].sprites) for sprite in often) for number in dict.fromkeys(n for n, _ in free)}
    free = sorted((free[int(k)] for k in rng.permutation(len(free))), key=lambda slot: room[slot[0]])  # slots that few names fit come first
    used = [False] * len(free)
    begin = dict.fromkeys(often, 0)  # no earlier slot fits, and none becomes free again
    for number, place, sprite in sorted(present, key=lambda item: often[item[2]]):  # names that fit few slots choose first
        question = _exists(sprite, "no")
        for k in range(begin[sprite], len(free)):
            other, gap = free[k]
            begin[sprite] = k + 1
            if not used[k] and question not in asked[other] and surely_absent(sprite, scenes[other].sprites):
                used[k], asked[other][gap], asked[number][place] = True, question, _exists(sprite, "yes")
                break
    return [[question for question in questions if question is not None] for questions in asked]


def _often_absent(sprite: Sprite, scenes: Sequence[Shown]) -> int:
    """Return in how many of the first 300 scenes (enough to compare) the sprite is surely absent."""
    return sum(surely_absent(sprite, scene.sprites) for scene in scenes[:300]) if can_be_absent(sprite) else 0


def _relations(found: Sequence[tuple[int, Pair]]) -> Iterable[tuple[int, Question]]:
    """Yield a question for each (scene, pair), for each relation as many true as false."""
    by_word: dict[str, list[tuple[int, Pair]]] = defaultdict(list)
    for number, pair in found:
        by_word[pair[1]].append((number, pair))
    for items in by_word.values():
        for order, (number, pair) in enumerate(items[: len(items) // 2 * 2]):
            yield number, _related(pair, "no" if order % 2 else "yes")


def _capped(questions: Sequence[tuple[int, Question]]) -> Iterable[tuple[int, Question]]:
    """Yield the (scene, question) pairs; per kind, no answer more often than the lower median count of its answers."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in questions:
        counts[question.kind][question.answer] += 1
    most = {kind: statistics.median_low(answers.values()) for kind, answers in counts.items()}
    given: Counter[tuple[str, str]] = Counter()
    for number, question in questions:
        given[question.kind, question.answer] += 1
        if given[question.kind, question.answer] <= most[question.kind]:
            yield number, question


def _ordered(turns: Sequence[Question], rng: np.random.Generator) -> list[Question]:
    """Return the turns in a random order in which none gives away the answer of a later one."""
    left, ordered = list(turns), []
    while left:
        ready = [k for k, turn in enumerate(left) if not any(_tells(turn, other) for other in left if other is not turn)]
        exists = [k for k in ready if left[k].kind == "exists"]
        ready = [k for k in ready if k not in exists[1:]]  # these keep their order: the last sprite ends them
        ordered.append(left.pop(ready[int(rng.integers(len(ready)))]))
    return ordered


def _tells(earlier: Question, later: Question) -> bool:
    """Return whether `earlier`, with its answer, may give away the answer of `later`."""
    if later.kind == "exists":  # whatever its answer, or the order would tell it
        return earlier.kind != "exists" and bool(earlier.names)
    if later.kind == "count":
        return earlier.kind in ("exists", "relation", "what")
    return later.kind == "what" and earlier.kind == "where"
