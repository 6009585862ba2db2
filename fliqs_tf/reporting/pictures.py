"""Pictures of formats: per layer, and their probabilities during a search.

Every `*_figure` turns plain data into a matplotlib `Figure`; `fliqs_tf.reporting.report` saves them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fliqs_tf.reporting import canvas, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOAT = "FP32"  # shown for what the search left in float


def formats_figure(layers: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """One bar per layer: its height is the layer's share of the cost, its colour the format.

    A strip of equal tiles under the bars names the formats, so that a layer of next to no cost can be read too.
    If weights and activations differ anywhere, the strip has a row for each, and the left half of such a bar has
    the colour of the weights, the right half that of the activations.

    Args:
      layers: dicts in network order with `name`, `cost` (any unit, 0 or more), `weight_format` and
        `activation_format` (the name of a format; None for float).
      title: of the picture.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is missing; says what to install.
      ValueError: no layers.
    """
    if not layers:
        raise ValueError("There are no layers to draw: give one dict per layer.")
    weights = [layer["weight_format"] or _FLOAT for layer in layers]
    activations = [layer["activation_format"] or _FLOAT for layer in layers]
    rows = {"format": weights} if weights == activations else {"weights": weights, "activations": activations}
    present = sorted({*weights, *activations}, key=palette.order)

    # 60 layers need a wide picture; a name that is wider than its tile is written upwards.
    width = max(7.5, 1.2 + 0.235 * len(layers))
    tile_width = (width - 1.2) / len(layers)
    longest = max(canvas.inches(name) for name in present)
    upright = longest > 0.92 * tile_width
    tile_height = longest + 0.12 if upright else 0.26

    # Many layer names are written upwards, few slanted. Given all the room that text takes, tiles come out as high
    # as meant.
    names = [layer["name"] for layer in layers]
    angle = 90 if len(layers) > 12 else 35
    name_height = max(map(canvas.inches, names)) * math.sin(math.radians(angle))

    figure = canvas.new_figure(width, 3.6 + tile_height * len(rows) + name_height + 0.16 * math.ceil(len(present) / 8))
    ratios = {"height_ratios": [2.6, tile_height * len(rows)]}
    bars, strip = figure.subplots(2, 1, sharex=True, gridspec_kw=ratios)
    _draw_bars(bars, layers, weights, activations, numbers=tile_width > 0.3)
    _draw_strip(strip, rows, upright)
    strip.set_xticks(
        range(len(layers)),
        names,
        rotation=angle,
        ha="center" if angle == 90 else "right",
        rotation_mode="default" if angle == 90 else "anchor",
        fontsize=canvas.SMALL,
    )
    canvas.legend(figure, present)
    canvas.title(figure, title)
    return figure


def probabilities_figure(
    steps: ArrayLike,
    probabilities: Sequence[ArrayLike],
    decisions: Sequence[str],
    options: Sequence[Sequence[str]],
    title: str = "Format probabilities during the search",
) -> Figure:
    """A heat map with one strip per decision: the probabilities of its options, stacked, at every step.

    Few bits lie at the bottom of a strip, many at the top. A strip begins as a stack of all options and becomes one
    colour as the search makes up its mind. What won, and how surely, is written at its right end.

    Args:
      steps: [T] ascending.
      probabilities: per decision an array [T, options of that decision].
      decisions: the names of the decisions.
      options: per decision the names of its options.
      title: of the picture.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is missing; says what to install.
      ValueError: nothing to draw, or shapes that do not belong together.
    """
    times = np.asarray(steps, float)
    shares = [np.asarray(p, float) for p in probabilities]
    _check_probabilities(times, shares, decisions, options)
    count = len(decisions)
    end = times[-1] if times[-1] > times[0] else times[0] + 1
    figure = canvas.new_figure(8.5, 1.4 + (0.3 if count <= 25 else 0.2) * count)
    axes = figure.subplots()
    for i, (p, names) in enumerate(zip(shares, options, strict=True)):
        axes.imshow(
            _stack(times, p, names),
            extent=(times[0], end, i + 0.43, i - 0.43),
            aspect="auto",
            interpolation="nearest",
        )
        best = int(p[-1].argmax())
        axes.annotate(
            f"{names[best]}  {p[-1, best]:.0%}",
            (1, i),
            xytext=(5, 0),
            textcoords="offset points",
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=canvas.SMALL,
        )
    axes.set(xlim=(times[0], end), ylim=(count - 0.5, -0.5))
    axes.set_yticks(range(count), decisions)
    axes.set_xlabel("step", fontsize=canvas.NORMAL)
    canvas.plain(axes)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    canvas.legend(figure, sorted({name for names in options for name in names}, key=palette.order), hatched=False)
    canvas.title(figure, title)
    return figure


def _draw_bars(
    axes: Axes, layers: Sequence[Mapping[str, Any]], weights: Sequence[str], activations: Sequence[str], numbers: bool
) -> None:
    costs = np.array([layer["cost"] for layer in layers], float)
    shares = 100 * costs / (costs.sum() or 1)
    for i, share in enumerate(shares):
        if weights[i] == activations[i]:
            axes.bar(i, share, 0.8, **palette.fill(weights[i]))
        else:
            axes.bar(i - 0.2, share, 0.4, **palette.fill(weights[i]))
            axes.bar(i + 0.2, share, 0.4, **palette.fill(activations[i]))
        if numbers:
            text = f"{share:.1f}" if share >= 0.05 else "<0.1"
            _note(axes, text, i, share)
    axes.set_ylabel("share of the total cost (%)", fontsize=canvas.NORMAL)
    axes.set_ylim(0, 1.1 * shares.max() or 1)
    canvas.plain(axes, grid=True)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)


def _note(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(
        text,
        (x, y),
        (0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=canvas.SMALL,
        color=canvas.GREY,
    )


def _draw_strip(axes: Axes, rows: Mapping[str, Sequence[str]], upright: bool) -> None:
    """A tile per layer and row, in the colour of its format and with its name."""
    from matplotlib.patches import Rectangle

    for y, names in enumerate(rows.values()):
        for x, name in enumerate(names):
            axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=palette.color(name), edgecolor="none"))
            axes.text(
                x,
                y,
                name,
                rotation=90 if upright else 0,
                ha="center",
                va="center",
                fontsize=canvas.SMALL,
                color=palette.ink(name),
            )
    axes.set(xlim=(-0.6, x + 0.6), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows), fontsize=canvas.SMALL)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _check_probabilities(
    steps: np.ndarray, probabilities: Sequence[np.ndarray], decisions: Sequence[str], options: Sequence[Sequence[str]]
) -> None:
    if not len(decisions) or not len(steps):
        raise ValueError(f"There is nothing to draw: {len(decisions)} decisions at {len(steps)} steps.")
    if not len(decisions) == len(probabilities) == len(options):
        raise ValueError(
            f"decisions, probabilities and options must be equally many (got {len(decisions)}, {len(probabilities)} "
            f"and {len(options)})."
        )
    for name, p, names in zip(decisions, probabilities, options, strict=True):
        if p.shape != (len(steps), len(names)):
            raise ValueError(
                f"The probabilities of {name!r} must have shape [steps, options] = "
                f"{[len(steps), len(names)]} (got {list(p.shape)})."
            )


def _stack(
    steps: np.ndarray, probabilities: np.ndarray, names: Sequence[str], height: int = 40, columns: int = 700
) -> np.ndarray:
    """RGB image [height, columns, 3] of the options' probabilities stacked, fewest bits at the bottom."""
    order = sorted(range(len(names)), key=lambda i: palette.order(names[i]))
    grid = np.linspace(steps[0], steps[-1], columns)
    at = np.searchsorted(steps, grid, side="right") - 1  # the last reading before each column
    upper = np.cumsum(probabilities[:, order], axis=1)[at]
    level = (np.arange(height, 0, -1) - 0.5) / height
    chosen = (level[:, None, None] > upper[None] / upper[None, :, -1:]).sum(-1)
    return np.array([palette.color(names[i]) for i in order])[chosen]
