"""A picture of what a search expects of other budgets.

Plain data to a matplotlib `Figure`; `fliqs_tf.reporting.report` saves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fliqs_tf.reporting import canvas, palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def budgets_figure(
    budgets: Sequence[Mapping[str, float]],
    uniform: Mapping[str, Mapping[str, float]],
    trained: Mapping[str, float] | None = None,
    cost_unit: str = "",
    title: str = "What a search expects of other budgets",
) -> Figure:
    """Expected loss of quality over the cost: of the best recipes as a line, of uniform formats as points.

    Args:
      budgets: dicts in order of cost with "cost", "loss" and "deviation" of the loss, in units of quality.
      uniform: {format: such a dict}, drawn in the colour of the format.
      trained: That of the recipe that the weights were trained for, marked; None: no mark.
      cost_unit: such as "GBOPs".
      title: of the picture.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is missing; says what to install.
      ValueError: no budgets.
    """
    if not budgets:
        raise ValueError("There are no budgets to draw: give one dict per budget.")
    figure = canvas.new_figure(7.5, 4.2)
    axes = figure.subplots()
    canvas.plain(axes, grid=True)
    costs, losses, deviations = (np.array([row[key] for row in budgets]) for key in ("cost", "loss", "deviation"))
    axes.fill_between(costs, losses - deviations, losses + deviations, color=canvas.BLUE, alpha=0.18, linewidth=0)
    axes.plot(
        costs, losses, color=canvas.BLUE, marker=".", linewidth=1.2, label="best recipe, and its standard deviation"
    )
    points = dict(sorted(uniform.items(), key=lambda item: item[1]["cost"]))
    for name, row in points.items():
        axes.errorbar(
            row["cost"], row["loss"], row["deviation"], fmt="o", markersize=6, color=palette.color(name), label=name
        )
    if trained is not None:
        axes.scatter(
            trained["cost"],
            trained["loss"],
            s=170,
            color=canvas.RED,
            marker="*",
            zorder=3,
            label="what the weights are for",
        )
    axes.set_xscale("log")
    axes.tick_params(which="both", labelsize=canvas.SMALL)
    axes.set_xlabel(f"cost ({cost_unit})" if cost_unit else "cost", fontsize=canvas.NORMAL)
    axes.set_ylabel("expected loss of quality", fontsize=canvas.NORMAL)
    axes.legend(fontsize=canvas.SMALL, frameon=False)
    canvas.title(figure, title)
    return figure
