"""How our pictures look: the only place that sets up matplotlib. Importing this module does not import it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): distinguishable with every common form of colour blindness.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY, LIGHT = "#595959", "#dddddd"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION)


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches with `rows` x `columns` axes, drawn without a display and without pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def frame(figure: Figure, heading: str, caption: str) -> None:
    """A heading above and a caption below, with room between heading and axes for one line of legend."""
    width, height = figure.get_size_inches()
    text = textwrap.fill(caption, int(width * 13.5))
    bottom = (0.2 * len(text.splitlines()) + 0.15) / height
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, bottom, 1, 1 - bottom - 0.75 / height))
    figure.text(0.5, 1 - 0.12 / height, heading, ha="center", va="top", fontsize=14, fontweight="bold")
    figure.text(0.5, 0.1 / height, text, ha="center", va="bottom", fontsize=9, color=GREY, linespacing=1.35)


def tidy(axes: Axes, is_empty: bool = False) -> None:
    """Light grid behind the data, no box; an empty panel says so."""
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if is_empty:
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
