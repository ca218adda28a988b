"""Sprite scenes: the same everywhere, captions true to the geometry, masks exact, held-out sprites held out."""

import hashlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from align.common.errors import DataError, UsageError
from align.demo.scenes import COLORS, Placed, Scene, Sprite, SpriteScenes, read_sprites, split_sprites
from align.demo.wording import article, background_sentence, relation, size_word, where
from tests.support.synthetic_sprites import make_sprites

ROOT = Path(__file__).resolve().parents[3]
SAID = {"left of": 0, "right of": 0, "above": 1, "over": 1, "below": 1, "under": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sprites(tmp_path_factory.mktemp("sprites") / "folder")


@pytest.fixture(scope="module")
def scenes(folder):
    return SpriteScenes(folder, seed=3)


def longer_side(placed):
    left, top, right, bottom = placed.box
    return max(right - left, bottom - top)


def digest(scene):
    words = repr((scene.short, scene.long, scene.background, [(p.sprite.id, p.box, p.mirrored) for p in scene.objects]))
    return hashlib.sha256(scene.image.tobytes() + words.encode()).hexdigest()


def center(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def is_true(said, one, other):
    """The meaning of a relation word, written down a second time: on the right side, and mostly along that axis."""
    axis = SAID[said]
    along = center(other)[axis] - center(one)[axis]
    across = abs(center(other)[1 - axis] - center(one)[1 - axis])
    first, second = (one, other) if said in ("left of", "above", "over") else (other, one)
    signed = along if first is one else -along
    narrow = min(one[2 + axis] - one[axis], other[2 + axis] - other[axis])
    return signed > across and first[2 + axis] - second[axis] <= 0.1 * narrow + 1e-9


def relations_in(text, names):
    """Yield (name, relation word, name) for every "A is left of the B" or "an A to the left of a B" in a caption."""
    named = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    words = "|".join(SAID)
    pattern = rf"({named})(?: is)? (?:to the |on the )?({words}) (?:a|an|the) (?:small |large )?({named})\b"
    yield from re.findall(pattern, text)


def test_a_scene_depends_on_seed_and_index_only(folder, scenes):
    again = SpriteScenes(folder, seed=3)
    order = [7, 2, 0, 5, 2]
    assert [digest(scenes.scene(i)) for i in order] == [digest(again.scene(i)) for i in reversed(order)][::-1]
    assert digest(scenes.scene(1)) != digest(scenes.scene(2))
    assert digest(scenes.scene(1)) != digest(SpriteScenes(folder, seed=4).scene(1))
    np.random.seed(0)
    before = np.random.get_state()[2]
    scenes.scene(9)
    assert np.random.get_state()[2] == before, "the global generator was used"


def test_another_process_draws_the_same_scenes(folder, scenes):
    code = (
        "from pathlib import Path; from tests.align.demo.test_scenes import digest; from align.demo.scenes import SpriteScenes\n"
        f"s = SpriteScenes(Path({str(folder)!r}), seed=3)\n"
        "print(*[digest(s.scene(i)) for i in (4, 1 << 35)], *[digest(x) for x in s.swapped(3)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    here = [digest(scenes.scene(4)), digest(scenes.scene(1 << 35)), *(digest(scene) for scene in scenes.swapped(3))]
    assert printed.split() == here


def test_pictures_are_rgb_with_one_to_four_objects_that_barely_overlap(scenes):
    counts = set()
    for index in range(150):
        scene = scenes.scene(index)
        counts.add(len(scene.objects))
        assert scene.image.size == (224, 224) and scene.image.mode == "RGB"
        for placed in scene.objects:
            left, top, right, bottom = placed.box
            assert 0 <= left < right <= 224 and 0 <= top < bottom <= 224
            assert 24 <= longer_side(placed) <= 200
        for one, other in itertools.combinations(scene.objects, 2):
            width = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
            height = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
            smaller = min((p.box[2] - p.box[0]) * (p.box[3] - p.box[1]) for p in (one, other))
            assert max(width, 0) * max(height, 0) <= 0.15 * smaller
    assert counts == {1, 2, 3, 4}


def test_masks_match_boxes_and_pixels(scenes):
    for index in range(60):
        scene = scenes.scene(index)
        mask = scene.mask()
        assert mask.shape == (224, 224) and mask.dtype == np.uint8 and mask.max() <= len(scene.objects)
        inside = np.zeros_like(mask, dtype=bool)
        for placed in scene.objects:
            left, top, right, bottom = placed.box
            inside[top:bottom, left:right] = True
            for edge in (placed.shape[0], placed.shape[-1], placed.shape[:, 0], placed.shape[:, -1]):
                assert edge.any(), "the box is not tight"
        assert not mask[~inside].any()
        front = scene.objects[-1]  # nothing hides the last one: its mask is its shape
        left, top, right, bottom = front.box
        np.testing.assert_array_equal(mask[top:bottom, left:right] == len(scene.objects), front.shape)


def test_the_mask_is_where_the_sprite_changed_the_picture(folder):
    scenes = SpriteScenes(folder, seed=3)
    square = next(sprite for sprite in scenes.sprites if sprite.name == "ant")  # a filled square: one color
    index = next(i for i in range(1000) if scenes.scene(i, square).background.startswith("a plain"))
    scene = scenes.scene(index, square)
    pixels = np.asarray(scene.image).astype(int)
    corner = pixels[0, 0] if not scene.mask()[0, 0] else pixels[-1, -1]
    changed = np.abs(pixels - corner).sum(axis=2) > 0
    assert (changed & (scene.mask() == 1)).sum() == (scene.mask() == 1).sum()
    assert changed.sum() <= 1.1 * (scene.mask() == 1).sum()


def test_a_hidden_pixel_belongs_to_the_object_in_front():
    from PIL import Image

    back = Placed(Sprite("a", "", "object", "anvil"), (0, 0, 4, 4), False, np.ones((4, 4), bool))
    front = Placed(Sprite("b", "", "object", "bell"), (2, 2, 6, 6), False, np.ones((4, 4), bool))
    mask = Scene(Image.new("RGB", (8, 8)), (back, front), "", "", "").mask()
    assert mask[1, 1] == 1 and mask[3, 3] == 2 and mask[5, 5] == 2 and mask[7, 7] == 0
    assert (mask == 1).sum() == 12 and (mask == 2).sum() == 16


def test_relations_in_captions_are_true(scenes):
    names = [sprite.name for sprite in scenes.sprites]
    heard = set()
    for index in range(600):
        scene = scenes.scene(index)
        boxes = {placed.sprite.name: placed.box for placed in scene.objects}
        for text in (scene.short, scene.long):
            for one, said, other in relations_in(text, names):
                assert is_true(said, boxes[one], boxes[other]), (index, text, boxes)
                heard.add(said)
    assert heard == set(SAID)


def test_captions_name_all_objects_and_no_other(scenes):
    names = [sprite.name for sprite in scenes.sprites]
    for index in range(200):
        scene = scenes.scene(index)
        shown = {placed.sprite.name for placed in scene.objects}
        for text in (scene.short, scene.long):
            said = {name for name in names if re.search(rf"\b{re.escape(name)}\b", text.lower())}
            assert said == shown, (index, text)
        assert scene.background in scene.long, "the long caption tells the background"


def test_sizes_and_places_in_captions_are_true(scenes):
    sizes = set()
    for index in range(300):
        scene = scenes.scene(index)
        for placed in scene.objects:
            name, share = placed.sprite.name, longer_side(placed) / 224
            if f"small {name}" in scene.short + scene.long:
                sizes.add("small")
                assert share < 0.25
            if f"large {name}" in scene.short + scene.long:
                sizes.add("large")
                assert share > 0.5
            x, y = center(placed.box)
            for said, ok in (("left", x < 0.4 * 224), ("right", x > 0.6 * 224), ("top", y < 0.4 * 224), ("bottom", y > 0.6 * 224)):
                if re.search(rf"{re.escape(name)}(?: is)? (?:in|on|at) the (?:\w+ )?{said}\b(?! of)", scene.long):
                    assert ok, (index, scene.long, placed.box)
    assert sizes == {"small", "large"}


def test_captions_vary_in_wording(scenes):
    shapes = set()
    for index in range(300):
        scene = scenes.scene(index)
        if len(scene.objects) == 2:
            text = scene.short
            for placed in scene.objects:
                text = text.replace(placed.sprite.name, "X")
            shapes.add(re.sub(r"\ban\b", "a", text))
    assert len(shapes) >= 15


def test_an_object_is_not_lost_on_a_background_of_its_color(tmp_path):
    from PIL import Image

    folder = make_sprites(tmp_path / "sprites")
    Image.new("RGBA", (72, 72), (*COLORS["yellow"], 255)).save(folder / "72x72" / "0.png")
    scenes = SpriteScenes(folder, 0)
    backgrounds = {scenes.scene(index, scenes.sprites[0]).background for index in range(300)}
    assert "a plain purple background" in backgrounds
    assert not backgrounds & {"a plain yellow background", "a grainy yellow background", "a plain beige background"}


def test_swapped_scenes_differ_only_by_the_exchange(scenes):
    for index in range(40):
        first, second = scenes.swapped(index)
        a, b = (placed.sprite for placed in first.objects)
        assert [placed.sprite for placed in second.objects] == [b, a]
        assert {p.sprite: p.mirrored for p in first.objects} == {p.sprite: p.mirrored for p in second.objects}
        assert first.background == second.background
        same = (first.mask() == 0) & (second.mask() == 0)
        for scene in (first, second):  # soft edges reach one or two pixels beyond the mask
            for placed in scene.objects:
                left, top, right, bottom = placed.box
                same[max(top - 3, 0) : bottom + 3, max(left - 3, 0) : right + 3] = False
        np.testing.assert_array_equal(np.asarray(first.image)[same], np.asarray(second.image)[same])
        said = relation(first.objects[0].box, first.objects[1].box)
        assert first.short == f"{article(a.name)} {said} {article(b.name)}"
        assert second.short == f"{article(b.name)} {said} {article(a.name)}"
        for scene in (first, second):
            assert is_true(said, scene.objects[0].box, scene.objects[1].box)
            longer = [max(box[2] - box[0], box[3] - box[1]) for box in (p.box for p in scene.objects)]
            assert all(abs(x - y) <= 3 for x, y in zip(longer, map(longer_side, first.objects), strict=True)), "slots keep their sizes"


def test_a_scene_of_one_given_sprite_shows_it_alone(scenes):
    for sprite in scenes.sprites[:5]:
        scene = scenes.scene(12, sprite)
        assert [placed.sprite for placed in scene.objects] == [sprite] and sprite.name in scene.short


def test_names_in_a_scene_share_no_word(folder):
    sprites = [Sprite(str(i), "72x72/0.png", "object", name) for i, name in enumerate(["red cup", "red hat", "cup lid", "pen"] * 2)]
    for index in range(50):
        names = [placed.sprite.name for placed in SpriteScenes(folder, 0, sprites=sprites, max_objects=2).scene(index).objects]
        words = [word for name in names for word in name.split()]
        assert len(words) == len(set(words))


def test_held_out_sprites_are_held_out_by_name(folder):
    sprites = read_sprites(folder)
    twin = Sprite("twin", sprites[0].file, "object", sprites[0].name)
    seen, unseen = split_sprites([*sprites, twin], seed=5, held_out=8)
    assert len({sprite.name for sprite in unseen}) == 8
    assert not {sprite.name for sprite in seen} & {sprite.name for sprite in unseen}
    assert len(seen) + len(unseen) == len(sprites) + 1
    again = split_sprites([*sprites[::-1], twin], seed=5, held_out=8)[1]
    assert {sprite.id for sprite in again} == {sprite.id for sprite in unseen}, "depends on names, not on their order"
    assert {sprite.name for sprite in split_sprites(sprites, seed=6, held_out=8)[1]} != {sprite.name for sprite in unseen}
    scenes = SpriteScenes(folder, seed=5, sprites=seen)
    hidden = {sprite.name for sprite in unseen}
    assert not any(placed.sprite.name in hidden for i in range(200) for placed in scenes.scene(i).objects)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 10, 10), (20, 0, 30, 10), "left of"),
        ((20, 0, 30, 10), (0, 0, 10, 10), "right of"),
        ((0, 0, 10, 10), (0, 20, 10, 30), "above"),
        ((0, 20, 10, 30), (0, 0, 10, 10), "below"),
        ((0, 0, 10, 10), (20, 20, 30, 30), None),  # diagonal: neither clearly
        ((0, 0, 10, 10), (9, 0, 19, 10), "left of"),  # touching by a tenth
        ((0, 0, 10, 10), (8, 0, 18, 10), None),  # overlapping by a fifth
        ((0, 0, 10, 10), (0, 0, 10, 10), None),
    ],
)
def test_relations_are_said_only_where_clear(one, other, expected):
    assert relation(one, other) == expected


def test_places_and_sizes_are_said_only_where_clear():
    assert where((0, 0, 20, 20), 100) == "in the top left"
    assert where((40, 40, 60, 60), 100) == "in the center"
    assert where((80, 40, 100, 60), 100) == "on the right"
    assert where((30, 40, 50, 60), 100) is None  # 0.40: between left and middle
    assert [size_word((0, 0, side, 5), 100) for side in (24, 25, 50, 51)] == ["small ", "", "", "large "]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apple", "an apple"),
        ("dog", "a dog"),
        ("hourglass", "an hourglass"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("one-hump camel", "a one-hump camel"),
        ("x-ray of bones", "an x-ray of bones"),
        ("ewe", "a ewe"),
        ("onion", "an onion"),
        ("house", "a house"),
    ],
)
def test_articles(name, expected):
    assert article(name) == expected


def test_backgrounds_read_naturally():
    assert background_sentence("dots", "orange", "white") == "an orange background with white dots"
    assert background_sentence("checks", "red", "white") == "a red and white checkered background"


def test_wrong_arguments_are_refused_with_what_to_do(folder, tmp_path):
    with pytest.raises(DataError, match="embedded:twemoji"):
        read_sprites(tmp_path)
    (tmp_path / "sprites.json").write_text("[]")
    with pytest.raises(DataError, match="no sprites"):
        read_sprites(tmp_path)
    with pytest.raises(UsageError, match="held_out is 28, but there are 28"):
        split_sprites(read_sprites(folder), 0, 28)
    with pytest.raises(UsageError, match="1 to 4"):
        SpriteScenes(folder, 0, max_objects=5)
    with pytest.raises(UsageError, match="64"):
        SpriteScenes(folder, 0, size=32)
    with pytest.raises(UsageError, match="too few"):
        SpriteScenes(folder, 0, sprites=read_sprites(folder)[:5])
    with pytest.raises(UsageError, match="starts at 0"):
        SpriteScenes(folder, 0).scene(-1)


def test_an_invisible_sprite_is_refused_by_name(tmp_path):
    from PIL import Image

    folder = make_sprites(tmp_path / "sprites")
    Image.new("RGBA", (72, 72)).save(folder / "72x72" / "0.png")
    scenes = SpriteScenes(folder, 0)
    with pytest.raises(DataError, match="72x72/0.png has no visible pixel"):
        scenes.scene(0, scenes.sprites[0])


@pytest.mark.assets
def test_real_sprites_make_scenes():
    from align.embedded.assets import fetch

    scenes = SpriteScenes(fetch("embedded:twemoji"), seed=0)
    assert len(scenes.sprites) > 1000
    names = [sprite.name for sprite in scenes.sprites]
    for index in range(100):
        scene = scenes.scene(index)
        boxes = {placed.sprite.name: placed.box for placed in scene.objects}
        for one, said, other in relations_in(scene.short, names):
            assert is_true(said, boxes[one], boxes[other])
        assert all(name in scene.short for name in boxes)
