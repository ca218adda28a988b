"""Label maps as pictures: colors that differ, classes over the photo, hatches where nothing counts."""

import numpy as np
from PIL import Image

from eval.results.overlays import SIDE, overlay, palette


def test_colors_are_fixed_and_differ():
    colors = palette(171)
    assert (palette(20) == colors[:20]).all() and len(np.unique(colors, axis=0)) == 171
    far = np.linalg.norm(colors[:20, None].astype(float) - colors[None, :20], axis=-1) + 1000 * np.eye(20)
    assert far.min() > 50 and (np.ptp(colors.astype(int), axis=1) > 40).all()  # none is gray


def test_an_overlay_shows_classes_and_hatches_what_does_not_count():
    photo = Image.new("RGB", (2 * SIDE, SIDE), (100, 100, 100))
    classes = np.zeros((SIDE, 2 * SIDE), dtype=np.uint8)
    classes[:, SIDE:] = 1
    ignored = np.zeros(classes.shape, dtype=bool)
    ignored[: SIDE // 2] = True
    picture = np.asarray(overlay(photo, classes, np.array([[255, 0, 0], [0, 0, 255]]), ignored)).astype(int)
    assert picture.shape == (SIDE // 2, SIDE, 3)
    assert picture[-1, 10].tolist() == [193, 40, 40] and picture[-1, -10].tolist() == [40, 40, 193]
    void = picture[: SIDE // 4 - 1]
    assert (void.max(axis=2) == void.min(axis=2)).all() and len(np.unique(void)) == 2  # gray, in stripes
    assert picture[-1, SIDE // 2].tolist() == [16, 16, 77]  # the border is dark
