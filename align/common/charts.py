"""Figures as PNG bytes in one style, without display or global state. matplotlib is loaded with the first figure."""

import io
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2430", "#667085", "#e4e7ec"
SERIES = ("#2460a7", "#c4652d", "#2f855a", "#7b4fa3", "#b08f45", "#a23b5e")


def new_figure(width: float, height: float, background: str = "white", dpi: int = 150) -> "Figure":
    """Return an empty figure of `width` x `height` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, facecolor=background, layout="constrained")


def style_axes(
    axes: "Axes", title: str = "", *, ink: str = INK, muted: str = MUTED, grid: str = GRID, lines: str = "y", size: float = 8.5
) -> None:
    """Style axes: no box, gray ticks of `size` points, a light grid along `lines` (x, y or both), a plain-text title on the left."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(grid)
    axes.tick_params(colors=muted, labelsize=size, length=0, pad=5)
    axes.grid(axis=lines, color=grid, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", fontsize=size + 2, color=ink, pad=10, fontweight="bold", parse_math=False)


def png(figure: "Figure") -> bytes:
    """Return the figure as PNG bytes, without time or software in the metadata."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names from data may be in any script
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
