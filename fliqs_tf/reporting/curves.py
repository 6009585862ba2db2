"""A picture of a search over its steps: reward, cost, entropy, loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fliqs_tf.reporting import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Title of the panel, label of its axis, what it draws.
_PANELS = (
    ("Reward", "reward", ("reward", "baseline")),
    ("Expected cost", "cost", ("expected_cost", "target_cost")),
    ("Entropy of the controller", "share of its maximum", ("entropy", "beta_h")),
    ("Training loss", "loss", ("loss",)),
    ("Training accuracy", "accuracy", ("accuracy",)),
    ("Layers that switched", "share of layers", ("switch_rate",)),
)


def curves_figure(
    rows: Sequence[Mapping[str, Any]], cost_unit: str = "", title: str = "The search over its steps"
) -> Figure:
    """Small panels over the steps: reward, cost, entropy, loss, accuracy, switch rate; only those that rows hold.

    Args:
      rows: dicts with "step" and any of "reward", "baseline", "expected_cost", "target_cost", "entropy" (over its
        maximum), "beta_h", "loss", "accuracy", "switch_rate".
      cost_unit: such as "GBOPs".
      title: of the picture.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is missing; says what to install.
      ValueError: the rows hold none of these.
    """
    panels = []
    for name, label, keys in _PANELS:
        series = {key: _series(rows, key) for key in keys}
        if any(_shows(key, values) for key, (_, values) in series.items()):
            panels.append((name, f"{label} ({cost_unit})" if label == "cost" and cost_unit else label, series))
    if not panels:
        raise ValueError(
            "There are no curves to draw: no row has a reward, cost, entropy, loss, accuracy or switch rate of a step."
        )
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = canvas.new_figure(3.4 * columns, 0.5 + 2.3 * lines)
    places = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    for unused in places[len(panels) :]:
        unused.remove()
    for i, (axes, (name, label, series)) in enumerate(zip(places, panels, strict=False)):
        axes.set_title(name, fontsize=canvas.NORMAL, loc="left")
        axes.set_ylabel(label, fontsize=canvas.SMALL)
        canvas.plain(axes, grid=True)
        _draw_curves(axes, series)
        if i + columns >= len(panels):  # the lowest panel of its column
            axes.set_xlabel("step", fontsize=canvas.SMALL)
            axes.tick_params(labelbottom=True)
    figure.align_ylabels()
    canvas.title(figure, title)
    return figure


def has_curve(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics holds anything that `curves_figure` draws."""
    return any(_shows(key, _series([row], key)[1]) for _, _, keys in _PANELS for key in keys)


def _shows(key: str, values: ArrayLike) -> bool:
    """False for no values, and where no layer switches all the time: weights that train with fixed formats."""
    return bool(np.size(values)) and (key != "switch_rate" or bool(np.any(values)))


def _draw_curves(axes: Axes, series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Readings pale, what matters strong: their baseline or running mean; target and weight of the entropy dashed."""
    for key, (steps, values) in series.items():
        if not len(steps):
            continue
        if key == "target_cost":
            axes.plot(steps, values, color=canvas.RED, linewidth=1.2, linestyle="--", label=f"target {values[-1]:.4g}")
        elif key == "beta_h":
            other = axes.twinx()
            other.plot(steps, values, color=canvas.RED, linewidth=1.2, linestyle="--")
            other.set_ylabel(r"its weight $\beta_H$", fontsize=canvas.SMALL, color=canvas.RED)
            other.tick_params(labelsize=canvas.SMALL, colors=canvas.RED)
            other.locator_params(axis="y", nbins=4)
            other.set_ylim(bottom=0)
            other.spines[["top", "left", "bottom", "right"]].set_visible(False)
        elif key == "baseline":
            axes.plot(steps, values, color=canvas.BLUE, linewidth=1.5, label="baseline")
        elif key == "reward" and len(series["baseline"][0]):
            axes.plot(steps, values, color=canvas.BLUE, linewidth=0.8, alpha=0.3, label="reading")
        elif len(steps) < 60 or key in ("entropy", "expected_cost"):
            axes.plot(steps, values, color=canvas.BLUE, linewidth=1.5)
        else:
            # Said once is enough: the other panels do the same.
            labels = ("reading", "running mean") if key == "loss" else (None, None)
            axes.plot(steps, values, color=canvas.BLUE, linewidth=0.8, alpha=0.3, label=labels[0])
            axes.plot(steps, _running_mean(values), color=canvas.BLUE, linewidth=1.5, label=labels[1])
    if "switch_rate" in series or "entropy" in series:
        axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=canvas.SMALL, frameon=False)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have a finite number under `key`."""
    pairs = [
        (row["step"], row[key])
        for row in rows
        if "step" in row and isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
    ]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the readings, narrower at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)
