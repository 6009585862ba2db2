"""What all pictures are drawn on and with: sizes, colours, titles, legends.

Only matplotlib's object interface is used: no pyplot, no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fliqs_tf.reporting import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, BLUE, RED = "#666666", "#33608c", "#c8553d"
SMALL, NORMAL, LARGE = 7.5, 9, 11  # font sizes in points


def legend(figure: Figure, names: Sequence[str], hatched: bool = True) -> None:
    """What the colours mean, under the picture."""
    from matplotlib.patches import Patch

    handles = [Patch(label=name, **palette.fill(name, hatched)) for name in names]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(names), 8),
        fontsize=SMALL,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.4,
    )


def title(figure: Figure, title: str) -> None:
    """Writes a title, if there is one, over the left end of the picture."""
    if title:
        figure.suptitle(title, fontsize=LARGE, x=0.01, ha="left")


def plain(axes: Axes, grid: bool = False) -> None:
    """Takes off what a reader does not need; `grid`: lines at the numbers of the vertical axis."""
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)


def inches(text: str) -> float:
    """About how wide a text in the small font is."""
    return len(text) * 0.64 * SMALL / 72


def new_figure(width: float, height: float) -> Figure:
    """An empty picture, in inches.

    Raises:
      ImportError: matplotlib is missing; says what to install.
    """
    palette.matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
