"""Figures are drawn without a display, look alike and are the same bytes each time."""

import io
import subprocess
import sys
import warnings

from PIL import Image

from align.common.charts import new_figure, png, style_axes


def drawn(title):
    figure = new_figure(4, 2, dpi=100)
    axes = figure.add_subplot()
    style_axes(axes, title)
    axes.plot([0, 1], [0, 1])
    return axes, png(figure)


def test_a_figure_is_the_same_png_each_time_with_names_of_any_script():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes, content = drawn("of 2 $dogs and 1 $cat \u72ac")
    assert content == drawn("of 2 $dogs and 1 $cat \u72ac")[1] != drawn("other")[1]
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG" and image.size == (400, 200) and "Software" not in image.info
    assert axes.get_title(loc="left") == "of 2 $dogs and 1 $cat \u72ac"


def test_axes_have_no_box():
    axes, _ = drawn("")
    assert [side for side, spine in axes.spines.items() if spine.get_visible()] == ["left", "bottom"]


def test_matplotlib_is_loaded_with_the_first_figure():
    code = (
        "import sys; from align.common import charts; assert 'matplotlib' not in sys.modules\n"
        "charts.png(charts.new_figure(1, 1)); assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
