"""Sprite scenes: small pictures with exact captions, boxes and masks, each a pure function of (seed, index).

One to four sprites (named graphics) stand on a colored or textured background. Positions and sizes are known, so every word of a
caption is true. The same index gives the same picture in any process. Boxes are (left, top, right, bottom) in pixels, right and bottom
exclusive; `H` and `W` are the picture's height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from align.common.errors import DataError, UsageError
from align.common.files import hash_bytes, read_json
from align.demo.wording import Box, Thing, article, background_sentence, long_caption, relation, short_caption

COLORS = {
    "white": (242, 242, 242),
    "light gray": (190, 192, 196),
    "dark gray": (74, 78, 86),
    "red": (214, 62, 62),
    "orange": (240, 148, 54),
    "yellow": (248, 216, 88),
    "green": (86, 170, 92),
    "light blue": (158, 206, 242),
    "blue": (62, 112, 208),
    "purple": (142, 92, 184),
    "pink": (246, 172, 196),
    "brown": (146, 100, 70),
    "beige": (232, 216, 182),
}
TEXTURES = ("plain", "plain", "plain", "gradient", "gradient", "grain", "mottled", "stripes", "checks", "dots")
OBJECT_COUNTS = (0.30, 0.70, 0.88, 1.0)  # cumulative share of scenes with 1, 2, 3 and 4 objects
_FILLER = {"a", "an", "the", "of", "with", "and", "its", "in", "on", "over", "pair", "at", "to"}


@dataclass(frozen=True)
class Sprite:
    """A named graphic: its code point as id, the PNG's path in the folder, its kind and its English name without article."""

    id: str
    file: str
    group: str
    name: str


@dataclass(frozen=True)
class Placed:
    """A sprite in a scene. `box` is tight around its visible pixels; `shape` (box height, box width) is True on them."""

    sprite: Sprite
    box: Box
    mirrored: bool
    shape: np.ndarray = field(repr=False, compare=False)  # visible: alpha above one half, also behind other objects


@dataclass(frozen=True)
class Scene:
    """A picture (RGB, H = W = size), its objects from back to front, its background in words, and two true captions."""

    image: Image.Image
    objects: tuple[Placed, ...]
    background: str
    short: str
    long: str

    def mask(self) -> np.ndarray:
        """Return (H, W) uint8: 0 for the background, k for pixels where object k (from 1, back to front) is in front."""
        mask = np.zeros((self.image.height, self.image.width), dtype=np.uint8)
        for number, placed in enumerate(self.objects, 1):
            left, top, right, bottom = placed.box
            mask[top:bottom, left:right][placed.shape] = number
        return mask


@dataclass(frozen=True)
class _Plan:
    """What is drawn at random before rendering: sprites, slots (center x, center y, side), mirroring and background."""

    sprites: tuple[Sprite, ...]
    slots: tuple[tuple[float, float, float], ...]
    mirrored: tuple[bool, ...]
    texture: str
    colors: tuple[str, str]
    shades: np.ndarray  # (2, 3) int16: the two colors with a little variation
    numbers: tuple[int, ...]  # the texture's own: direction, width, phase, noise


def read_sprites(folder: Path) -> list[Sprite]:
    """Return the sprites listed in `sprites.json` of a folder. Raise DataError if the list is missing or empty."""
    path = Path(folder) / "sprites.json"
    if not path.is_file():
        raise DataError(f"no {path}; fetch the graphics first (align.embedded.assets.fetch('embedded:twemoji')) or write one by hand")
    sprites = [Sprite(**row) for row in read_json(path)]
    if not sprites:
        raise DataError(f"{path} lists no sprites")
    return sprites


def name_words(name: str) -> set[str]:
    """Return the words of a name that tell what it is."""
    return set(name.replace("-", " ").split()) - _FILLER


def split_sprites(sprites: Sequence[Sprite], seed: int, held_out: int = 150) -> tuple[list[Sprite], list[Sprite]]:
    """Return (seen, unseen) sprites. The first `held_out` names by hash of (seed, name) are unseen, so new sprites move few others."""
    names = sorted({sprite.name for sprite in sprites}, key=lambda name: hash_bytes(f"{seed}:{name}".encode()))
    if not 0 <= held_out < len(names):
        raise UsageError(f"held_out is {held_out}, but there are {len(names)} sprite names; hold out fewer")
    unseen = set(names[:held_out])
    return [s for s in sprites if s.name not in unseen], [s for s in sprites if s.name in unseen]


class SpriteScenes:
    """Generator of scenes from the sprites of a folder. It keeps decoded sprites, about 20 KB each."""

    def __init__(self, folder: Path, seed: int, size: int = 224, sprites: Sequence[Sprite] | None = None, max_objects: int = 4) -> None:
        if size < 64:
            raise UsageError(f"size is {size} pixels; sprites are only told apart from 64 on")
        if not 1 <= max_objects <= len(OBJECT_COUNTS):
            raise UsageError(f"max_objects is {max_objects}; allowed: 1 to {len(OBJECT_COUNTS)}")
        self.folder, self.seed, self.size, self.max_objects = Path(folder), seed, size, max_objects
        self.sprites = list(read_sprites(self.folder) if sprites is None else sprites)
        if len(self.sprites) < 2 * max_objects:
            raise UsageError(f"{len(self.sprites)} sprites are too few for scenes of up to {max_objects} objects")
        self._words = {sprite.id: name_words(sprite.name) for sprite in self.sprites}
        self._decoded: dict[str, tuple[Image.Image, np.ndarray]] = {}
        self._y, self._x = np.indices((size, size), dtype=np.int32)
        noise = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, 9]))
        self._noise = noise.integers(-22, 23, (2 * size, 2 * size, 1), dtype=np.int16)

    def scene(self, index: int, sprite: Sprite | None = None) -> Scene:
        """Return scene number `index` (from 0). With `sprite`, the scene shows only that one."""
        rng = self._rng(index, stream=0)
        sprites = self._choose(rng, 1 + int(np.searchsorted(OBJECT_COUNTS, rng.random()))) if sprite is None else (sprite,)
        return self._render(self._plan(rng, sprites), rng)

    def swapped(self, index: int) -> tuple[Scene, Scene]:
        """Return two scenes whose two objects have exchanged places and sizes. Both `short` state the same relation, as in Winoground."""
        rng = self._rng(index, stream=1)
        pair = self._choose(rng, 2)
        while True:  # nearly always once: slots are side by side, but a thin sprite may leave the relation unclear
            plan = self._plan(rng, pair)
            exchanged = replace(plan, sprites=pair[::-1], mirrored=plan.mirrored[::-1])
            first, second = self._render(plan, rng), self._render(exchanged, rng)
            words = [relation(scene.objects[0].box, scene.objects[1].box) for scene in (first, second)]
            if words[0] == words[1] and words[0] is not None:
                break
        one, other = article(pair[0].name), article(pair[1].name)
        return replace(first, short=f"{one} {words[0]} {other}"), replace(second, short=f"{other} {words[0]} {one}")

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        if index < 0:
            raise UsageError(f"scene index is {index}; it starts at 0")
        return np.random.Generator(np.random.Philox(key=[self.seed, index], counter=[0, 0, 0, stream]))

    def _choose(self, rng: np.random.Generator, count: int) -> tuple[Sprite, ...]:
        """Return up to `count` sprites whose names share no word, so that "the heart" is only one of them."""
        chosen: list[Sprite] = []
        words: set[str] = set()
        while len(chosen) < min(count, self.max_objects):
            sprite = self.sprites[int(rng.integers(len(self.sprites)))]
            if words.isdisjoint(self._words[sprite.id]):
                chosen.append(sprite)
                words |= self._words[sprite.id]
        return tuple(chosen)

    def _plan(self, rng: np.random.Generator, sprites: tuple[Sprite, ...]) -> _Plan:
        slots = []
        for left, top, right, bottom in _cells(rng, len(sprites), self.size):
            room = min(right - left, bottom - top)
            side = max(0.16 * self.size, room * (0.55 + 0.5 * rng.random()))  # may stick out of its cell a little
            if len(sprites) == 1:
                side *= 0.8
            slack_x, slack_y = max(0.0, right - left - side), max(0.0, bottom - top - side)
            middle = (left + right) / 2, (top + bottom) / 2
            slots.append((middle[0] + slack_x * (rng.random() - 0.5), middle[1] + slack_y * (rng.random() - 0.5), side))
        mirrored = tuple(bool(rng.integers(2)) for _ in sprites)
        texture = TEXTURES[int(rng.integers(len(TEXTURES)))]
        numbers = tuple(int(number) for number in rng.integers(0, 1 << 20, 4))
        tints = np.stack([self._decode(sprite)[1] for sprite in sprites])  # (objects, 3)
        best, colors = -1.0, ("white", "light gray")
        for _ in range(6):  # the pair of colors in which the objects stand out best, or the first that is good enough
            two = rng.choice(len(COLORS), 2, replace=False)
            names = tuple(list(COLORS)[int(number)] for number in two)
            used = np.array([COLORS[name] for name in (names[:1] if texture in ("plain", "grain") else names)])
            contrast = float(np.abs(tints[:, None] - used[None]).sum(axis=2).min())
            if contrast > best:
                best, colors = contrast, (names[0], names[1])
            if best > 150:
                break
        shades = np.array([COLORS[name] for name in colors], dtype=np.int16) + rng.integers(-8, 9, (2, 3), dtype=np.int16)
        return _Plan(sprites, tuple(slots), mirrored, texture, colors, shades.clip(0, 255), numbers)

    def _render(self, plan: _Plan, rng: np.random.Generator) -> Scene:
        image = self._background(plan)
        objects = []
        for sprite, (x, y, side), mirrored in zip(plan.sprites, plan.slots, plan.mirrored, strict=True):
            source = self._decode(sprite)[0]
            scale = side / max(source.size)
            width, height = (max(1, round(length * scale)) for length in source.size)
            drawn = source.resize((width, height), Image.Resampling.BICUBIC)
            if mirrored:
                drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left = min(max(round(x - width / 2), 0), self.size - width)
            top = min(max(round(y - height / 2), 0), self.size - height)
            image.paste(drawn, (left, top), drawn)
            visible = np.asarray(drawn.getchannel("A")) > 127  # (height, width)
            rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
            inner = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            box = (left + inner[0], top + inner[1], left + inner[2], top + inner[3])
            objects.append(Placed(sprite, box, mirrored, visible[inner[1] : inner[3], inner[0] : inner[2]]))
        things = [Thing(placed.sprite.name, placed.box) for placed in objects]
        background = background_sentence(plan.texture, *plan.colors)
        short, long = short_caption(rng, things, self.size, background), long_caption(rng, things, self.size, background)
        return Scene(image, tuple(objects), background, short, long)

    def _decode(self, sprite: Sprite) -> tuple[Image.Image, np.ndarray]:
        """Return a sprite cut to its visible pixels (RGBA) and its mean color (3,)."""
        if sprite.id not in self._decoded:
            with Image.open(self.folder / sprite.file) as file:
                picture = file.convert("RGBA")
            box = picture.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0).getbbox()
            if box is None:
                raise DataError(f"sprite {self.folder / sprite.file} has no visible pixel; take it off the list")
            picture = picture.crop(box)
            pixels = np.asarray(picture, dtype=np.float64)
            mean = np.average(pixels[..., :3], axis=(0, 1), weights=np.broadcast_to(pixels[..., 3:], pixels[..., :3].shape))
            self._decoded[sprite.id] = picture, mean
        return self._decoded[sprite.id]

    def _background(self, plan: _Plan) -> Image.Image:
        direction, width, phase, noise = plan.numbers
        first, second = plan.shades  # (3,) each
        side = self.size
        if plan.texture == "plain":
            return Image.new("RGB", (side, side), tuple(int(value) for value in first))
        if plan.texture == "gradient":
            ramp = np.arange(side)[:, None]
            colors = ((first * (side - 1 - ramp) + second * ramp) // (side - 1)).astype(np.uint8)  # (side, 3)
            line = Image.fromarray(colors[:, None, :]) if direction % 2 else Image.fromarray(colors[None, :, :])
            return line.resize((side, side), Image.Resampling.NEAREST)
        top, left = phase % side, noise % side
        if plan.texture == "grain":
            return Image.fromarray((first + self._noise[top : top + side, left : left + side]).clip(0, 255).astype(np.uint8))
        if plan.texture == "mottled":
            blots = self._noise[top : top + 12, left : left + 12] > 0  # (12, 12, 1)
            return Image.fromarray(np.where(blots, second, first).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        if plan.texture == "stripes":
            across = (self._x, self._y, self._x + self._y, self._x - self._y + side)[direction % 4]
            pattern = (across + phase % 64) // (side // 24 + width % (side // 9)) % 2
        elif plan.texture == "checks":
            step = side // 16 + width % (side // 8)
            pattern = (self._x // step + self._y // step) % 2
        else:
            step = side // 10 + width % (side // 8)
            pattern = ((self._x % step - step // 2) ** 2 + (self._y % step - step // 2) ** 2 < (step // 4) ** 2).astype(np.int32)
        return Image.fromarray(plan.shades.astype(np.uint8)[pattern])


def _cells(rng: np.random.Generator, count: int, size: int) -> list[tuple[float, float, float, float]]:
    """Return `count` rectangles that divide the picture. The largest one is cut in two until there are enough."""
    cells = [(0.0, 0.0, float(size), float(size))]
    while len(cells) < count:
        cells.sort(key=lambda cell: (cell[2] - cell[0]) * (cell[3] - cell[1]))
        left, top, right, bottom = cells.pop()
        part = 0.36 + 0.28 * rng.random()
        upright = right - left > bottom - top if len(cells) else rng.random() < 0.6
        if upright:
            cut = left + part * (right - left)
            cells += [(left, top, cut, bottom), (cut, top, right, bottom)]
        else:
            cut = top + part * (bottom - top)
            cells += [(left, top, right, cut), (left, cut, right, bottom)]
    return [cells[int(number)] for number in rng.permutation(count)]
