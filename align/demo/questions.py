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
from functools import lru_cache

import numpy as np

from align.demo.scenes import Scene, Sprite, name_words
from align.demo.wording import Box, article, relation, where

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
LOOKALIKES = (
    *(
        "dog poodle wolf fox raccoon badger skunk bear",
        "cat tiger leopard lion",
        "bear panda koala teddy sloth",
        "monkey gorilla orangutan",
    ),
    *(
        "rabbit bunny",
        "mouse rat hamster rabbit chipmunk beaver hedgehog otter kangaroo",
        "horse donkey zebra unicorn moose deer llama camel giraffe",
    ),
    *("cow ox buffalo bison boar pig hippopotamus rhinoceros", "goat ewe ram llama deer", "elephant mammoth rhinoceros hippopotamus"),
    *(
        "bird duck swan goose dove eagle parrot owl turkey chicken rooster chick penguin flamingo peacock dodo",
        "crab lobster shrimp scorpion",
    ),
    *("fish blowfish shark dolphin whale orca seal carp", "octopus squid jellyfish", "snail shell oyster", "worm caterpillar snake"),
    *("ant honeybee beetle cockroach cricket ladybug mosquito housefly spider butterfly bat caterpillar", "bat bird eagle dragon"),
    *("crocodile lizard dragon sauropod tyrannosaurus turtle frog snake", "web spider", "nest bird eggs", "mouse trackball"),
    *(
        "apple peach tomato tangerine cherries mango pear lemon melon",
        "melon watermelon coconut kiwi avocado mango cucumber",
        "grapes blueberries",
    ),
    *("bread baguette croissant bagel flatbread pretzel doughnut cookie", "sandwich burrito taco hamburger hot flatbread falafel tamale"),
    *("cake cupcake shortcake pie custard pudding cream pancakes waffle butter", "cream ice candy lollipop dango oden skewer chocolate"),
    *("bowl pot pan plate salad noodles fondue spaghetti curry rice food bento beans", "meat steak bacon leg chicken shrimp"),
    *("cup glass glasses mug mugs bottle milk wine beer tea coffee cocktail drink champagne whiskey juice teapot amphora can mate shaker"),
    *(
        "broccoli vegetable cucumber pea pepper salad herbs",
        "carrot pepper potato eggplant root",
        "onion garlic ginger potato peanut beans",
    ),
    *("sushi rice dumpling falafel tamale cracker moon", "cup trophy urn alembic tube", "salt lotion bottle"),
    *("car taxi ambulance bus minibus truck van trolleybus police vehicle rickshaw tractor engine pickup racing",),
    *("train tram locomotive railway monorail metro rail cable trolleybus bus minibus", "ship boat ferry sailboat canoe speedboat raft"),
    *(
        "bicycle motorcycle scooter skateboard wheelchair cyclist biker",
        "airplane helicopter rocket satellite saucer",
        "rocket firecracker sparkler firework fireworks",
    ),
    *("guitar violin banjo harp", "trombone saxophone horn flute", "keyboard accordion piano computer", "score note notes musical"),
    *("tree plant herbs cactus shamrock clover palm", "blossom flower rose tulip hyacinth lotus hibiscus sunflower bouquet rosette"),
    *("moon planet sun globe earth comet", "cyclone tornado spiral", "rainbow ribbon", "lightning rain snow snowflake ice snowman"),
    *(
        "shoe boot sandal flip-flop flip flop shoes socks skate sneaker skis",
        "bag bags handbag purse backpack briefcase suitcase clutch money",
    ),
    *(
        "hat cap helmet crown graduation",
        "glasses sunglasses goggles mask masks",
        "blouse coat dress kimono sari t shirt vest swimsuit bikini uniform",
    ),
    *("jeans shorts briefs swimsuit bikini", "gemstone ice", "scarf necktie", "necklace beads string yarn thread"),
    *("book books notebook ledger notepad bookmark page newspaper scroll score receipt calendar clipboard placard document newspaper",),
    *(
        "envelope letter mailbox postbox mail tray ballot",
        "clock wristwatch stopwatch timer compass hourglass gauge",
        "map globe picture framed",
    ),
    *("telephone phone pager receiver radio calculator", "computer laptop television screen desktop monitor videocassette"),
    *(
        "disc dvd minidisc floppy film videocassette compact",
        "camera projector video film movie",
        "microphone megaphone loudspeaker speaker",
    ),
    *(
        "medal rosette coin sports trophy",
        "knife dagger sword swords axe saw razor kitchen fork spoon",
        "hammer axe wrench pick pickaxe screwdriver shovel",
    ),
    *(
        "pen pencil crayon paintbrush brush toothbrush needle pin safety wand chopsticks pushpin cigarette",
        "broom plunger mop shovel paintbrush",
    ),
    *(
        "candle lamp lantern lamp flashlight firecracker",
        "microscope telescope magnifying glass",
        "syringe thermometer pill stethoscope",
        "bed couch chair bathtub toilet",
    ),
    *(
        "umbrella parachute kite balloon lotus",
        "sled skateboard skis slide",
        "padlock purse handbag",
        "bomb balloon globe crystal disco yo-yo yo",
    ),
    *(
        "racket paddle bat lacrosse hockey cricket",
        "bow arrow boomerang",
        "ruler triangular level slider abacus",
        "dolls doll teddy snowman statue nesting hat kimono scarf carrot",
        "tree pine decoration picture palm mountain",
    ),
    *(
        "shield badge label emblem amulet",
        "cabinet file folder briefcase suitcase toolbox dividers chest",
        "soap sponge razor lotion butter",
    ),
    *(
        "balloon speech thought bubble",
        "explosion collision fight confetti popper party partying exploding",
        "anchor trident",
        "headstone coffin urn",
        "chart index ledger",
    ),
)
_FAMILIES: dict[str, frozenset[int]] = {
    word: frozenset(number for number, line in enumerate(LOOKALIKES) if word in line.split()) for word in " ".join(LOOKALIKES).split()
}
_SEVERAL = {"of", "and", "with", "couple", "family", "on", "in", "behind"}
DESCRIBE = "Describe the picture."
MOST_EXISTS = 6  # existence questions in one conversation
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
    """Return whether nobody could find `sprite` in a picture of `sprites`.

    Of a sprite's own kind, too, others can be absent, or a glance at the kind would be enough to answer: all that share no word with
    it, are no look-alikes (LOOKALIKES) and are not of a kind whose sprites are hard to tell apart. A name that is often drawn into
    other sprites (SEEN_INSIDE_OTHERS, PARTS) is never said to be absent. Of other kinds, ABSENT_WITH tells which can be absent.
    """
    return _can_be_absent(sprite) and all(_clearly_other(sprite, other) for other in sprites)


def is_one_thing(sprite: Sprite) -> bool:
    """Return whether anyone would count the sprite as one object: no pair, group, couple, person with something or view."""
    return not _SEVERAL & set(sprite.name.split()) and sprite.group not in ("person", "place")


def conversations(scenes: Sequence[Shown], seed: int) -> list[list[Question]]:
    """Return for each scene the turns of a conversation, the last of them its caption.

    Existence is asked about until every sprite of the scene that can be has been named, or six times; each answer is yes or no with
    the same chance whatever came before, and names that are said to be absent are drawn from the other scenes. Of relation, what and
    where, which tell of each other, a scene gets one kind (where with what if it shows one sprite only), and a sprite that is the
    answer of a what question is not asked about. The order is drawn, but what would tell the answer of another turn comes after it: the
    count first, as yes after yes would tell it, then existence, then what names the sprites. What remains: the count bounds how many
    answers can still be yes, a place rules itself out for the next sprite, and the caption comes last and is told of by all.
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
        if pair is not None and chance < 0.4:
            related.append((number, pair))
        elif pair is not None and len(scene.sprites) == 2 and (chance < 0.6 or not places):
            turns[number].append(_what(*pair))
            hidden = pair[0]
        else:
            if len(scene.sprites) == 1 and chance < 0.25:
                turns[number].append(_what(scene.sprites[0].name))
                hidden = scene.sprites[0].name
            open_ended += [(number, question) for question in places[: max(1, len(scene.sprites) - 1)]]
        named.append([scene.sprites[k] for k in rng.permutation(len(scene.sprites)) if scene.sprites[k].name != hidden])
    for asked, existence in zip(turns, _existence(scenes, named, rng), strict=True):
        asked += existence
    for number, question in [*_relations(related), *_capped(open_ended)]:
        turns[number].append(question)
    return [[*_ordered(asked, rng), Question("caption", DESCRIBE, scene.caption)] for asked, scene in zip(turns, scenes, strict=True)]


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


def _can_be_absent(sprite: Sprite) -> bool:
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


def _own(scene: Shown, rng: np.random.Generator) -> Sprite | None:
    """Return a sprite of the scene that could be said to be absent elsewhere, if there is one."""
    choices = [sprite for sprite in scene.sprites if _can_be_absent(sprite)]
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
    """Return where each sprite is that has a clear place, in a drawn order."""
    drawn = [int(number) for number in rng.permutation(len(scene.sprites))]
    named = [(scene.sprites[number].name, where(scene.boxes[number], scene.size)) for number in drawn]
    return [Question("where", f"Where is the {name}?", place, frozenset([name])) for name, place in named if place is not None]


def _count(scene: Shown) -> list[Question]:
    if not all(is_one_thing(sprite) for sprite in scene.sprites):
        return []
    return [Question("count", "How many objects are there?", str(len(scene.sprites)))]


def _pair(scene: Shown, rng: np.random.Generator) -> Pair | None:
    """Return two sprites, drawn among those with a clear relation."""
    drawn = [int(number) for number in rng.permutation(len(scene.sprites))]
    for one, other in itertools.combinations(drawn, 2):
        said = relation(scene.boxes[one], scene.boxes[other])
        if said is not None:
            return scene.sprites[one].name, said, scene.sprites[other].name
    return None


def _existence(scenes: Sequence[Shown], named: Sequence[Sequence[Sprite]], rng: np.random.Generator) -> list[list[Question]]:
    """Return existence questions about the `named` sprites of each scene, in their order, and as many about absent ones.

    A name that is asked about and there in one scene is asked about and absent in another; if no scene is left for that, it is not
    asked about at all.
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
    free = sorted((free[int(k)] for k in rng.permutation(len(free))), key=lambda slot: room[slot[0]])  # where few names fit come first
    used = [False] * len(free)
    begin = dict.fromkeys(often, 0)  # no place before it fits: none becomes free again
    for number, place, sprite in sorted(present, key=lambda item: often[item[2]]):  # those that fit in few places choose first
        question = _exists(sprite, "no")
        for k in range(begin[sprite], len(free)):
            other, gap = free[k]
            begin[sprite] = k + 1
            if not used[k] and question not in asked[other] and surely_absent(sprite, scenes[other].sprites):
                used[k], asked[other][gap], asked[number][place] = True, question, _exists(sprite, "yes")
                break
    return [[question for question in questions if question is not None] for questions in asked]


def _often_absent(sprite: Sprite, scenes: Sequence[Shown]) -> int:
    """Return in how many scenes (of the first few hundred, which are enough to tell) the sprite is surely absent."""
    return sum(surely_absent(sprite, scene.sprites) for scene in scenes[:300]) if _can_be_absent(sprite) else 0


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


def _ordered(turns: Sequence[Question], rng: np.random.Generator) -> list[Question]:
    """Return the turns in a drawn order in which none tells the answer of one that follows."""
    left, ordered = list(turns), []
    while left:
        ready = [k for k, turn in enumerate(left) if not any(_tells(turn, other) for other in left if other is not turn)]
        exists = [k for k in ready if left[k].kind == "exists"]
        ready = [k for k in ready if k not in exists[1:]]  # these keep their order: the last of the sprites ends them
        ordered.append(left.pop(ready[int(rng.integers(len(ready)))]))
    return ordered


def _tells(earlier: Question, later: Question) -> bool:
    """Return whether `earlier`, with its answer, may give away the answer of `later`."""
    if later.kind == "exists":  # whatever its answer, or the order would tell it
        return earlier.kind != "exists" and bool(earlier.names)
    if later.kind == "count":
        return earlier.kind in ("exists", "relation", "what")
    return later.kind == "what" and earlier.kind == "where"
