"""Pictures of a search: formats per layer, format probabilities over time, curves.

Every `*_figure` turns plain data into a matplotlib `Figure`; `fliqs_tf.reporting.report` saves them. Colours
mean the same in all of them: light is few bits, dark is many (viridis, which colour-blind
people can read), and a format has its colour whatever else is in the picture. Integers are
plain, floats hatched, the denser the more exponent bits, BF16 and FP32 crossed.

Only matplotlib's object interface is used: no pyplot, no global state.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fliqs_tf.numerics import formats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY, _BLUE, _RED = "#666666", "#33608c", "#c8553d"
_SMALL, _NORMAL, _LARGE = 7.5, 9, 11  # font sizes in points
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
    present = sorted({*weights, *activations}, key=_order)

    # 60 layers need a wide picture; a name that is wider than its tile is written upwards.
    width = max(7.5, 1.2 + 0.235 * len(layers))
    tile_width = (width - 1.2) / len(layers)
    longest = max(_inches(name) for name in present)
    upright = longest > 0.92 * tile_width
    tile_height = longest + 0.12 if upright else 0.26

    # Many layer names are written upwards, few slanted. Given all the room that text takes, tiles come out as high
    # as meant.
    names = [layer["name"] for layer in layers]
    angle = 90 if len(layers) > 12 else 35
    name_height = max(map(_inches, names)) * math.sin(math.radians(angle))

    figure = _figure(width, 3.6 + tile_height * len(rows) + name_height + 0.16 * math.ceil(len(present) / 8))
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
        fontsize=_SMALL,
    )
    _legend(figure, present)
    _title(figure, title)
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
    figure = _figure(8.5, 1.4 + (0.3 if count <= 25 else 0.2) * count)
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
            fontsize=_SMALL,
        )
    axes.set(xlim=(times[0], end), ylim=(count - 0.5, -0.5))
    axes.set_yticks(range(count), decisions)
    axes.set_xlabel("step", fontsize=_NORMAL)
    _plain(axes)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    _legend(figure, sorted({name for names in options for name in names}, key=_order), hatched=False)
    _title(figure, title)
    return figure


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
        if any(len(steps) for steps, _ in series.values()):
            panels.append((name, f"{label} ({cost_unit})" if label == "cost" and cost_unit else label, series))
    if not panels:
        raise ValueError(
            "There are no curves to draw: no row has a reward, cost, entropy, loss, accuracy or switch rate of a step."
        )
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = _figure(3.4 * columns, 0.5 + 2.3 * lines)
    places = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    for unused in places[len(panels) :]:
        unused.remove()
    for i, (axes, (name, label, series)) in enumerate(zip(places, panels, strict=False)):
        axes.set_title(name, fontsize=_NORMAL, loc="left")
        axes.set_ylabel(label, fontsize=_SMALL)
        _plain(axes, grid=True)
        _draw_curves(axes, series)
        if i + columns >= len(panels):  # the lowest panel of its column
            axes.set_xlabel("step", fontsize=_SMALL)
            axes.tick_params(labelbottom=True)
    figure.align_ylabels()
    _title(figure, title)
    return figure


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
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    _plain(axes, grid=True)
    costs, losses, deviations = (np.array([row[key] for row in budgets]) for key in ("cost", "loss", "deviation"))
    axes.fill_between(costs, losses - deviations, losses + deviations, color=_BLUE, alpha=0.18, linewidth=0)
    axes.plot(costs, losses, color=_BLUE, marker=".", linewidth=1.2, label="best recipe, and its standard deviation")
    points = dict(sorted(uniform.items(), key=lambda item: item[1]["cost"]))
    for name, row in points.items():
        axes.errorbar(row["cost"], row["loss"], row["deviation"], fmt="o", markersize=6, color=color(name), label=name)
    if trained is not None:
        axes.scatter(
            trained["cost"], trained["loss"], s=170, color=_RED, marker="*", zorder=3, label="what the weights are for"
        )
    axes.set_xscale("log")
    axes.tick_params(which="both", labelsize=_SMALL)
    axes.set_xlabel(f"cost ({cost_unit})" if cost_unit else "cost", fontsize=_NORMAL)
    axes.set_ylabel("expected loss of quality", fontsize=_NORMAL)
    axes.legend(fontsize=_SMALL, frameon=False)
    _title(figure, title)
    return figure


def has_curve(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics holds anything that `curves_figure` draws."""
    return any(len(_series([row], key)[0]) for _, _, keys in _PANELS for key in keys)


def _draw_bars(
    axes: Axes, layers: Sequence[Mapping[str, Any]], weights: Sequence[str], activations: Sequence[str], numbers: bool
) -> None:
    costs = np.array([layer["cost"] for layer in layers], float)
    shares = 100 * costs / (costs.sum() or 1)
    for i, share in enumerate(shares):
        if weights[i] == activations[i]:
            axes.bar(i, share, 0.8, **_fill(weights[i]))
        else:
            axes.bar(i - 0.2, share, 0.4, **_fill(weights[i]))
            axes.bar(i + 0.2, share, 0.4, **_fill(activations[i]))
        if numbers:
            text = f"{share:.1f}" if share >= 0.05 else "<0.1"
            _note(axes, text, i, share)
    axes.set_ylabel("share of the total cost (%)", fontsize=_NORMAL)
    axes.set_ylim(0, 1.1 * shares.max() or 1)
    _plain(axes, grid=True)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)


def _note(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(
        text, (x, y), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=_SMALL, color=_GREY
    )


def _draw_strip(axes: Axes, rows: Mapping[str, Sequence[str]], upright: bool) -> None:
    """A tile per layer and row, in the colour of its format and with its name."""
    from matplotlib.patches import Rectangle

    for y, names in enumerate(rows.values()):
        for x, name in enumerate(names):
            axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=color(name), edgecolor="none"))
            axes.text(
                x,
                y,
                name,
                rotation=90 if upright else 0,
                ha="center",
                va="center",
                fontsize=_SMALL,
                color=_ink(name),
            )
    axes.set(xlim=(-0.6, x + 0.6), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows), fontsize=_SMALL)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_curves(axes: Axes, series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Readings pale, what matters strong: their baseline or running mean; target and weight of the entropy dashed."""
    for key, (steps, values) in series.items():
        if not len(steps):
            continue
        if key == "target_cost":
            axes.plot(steps, values, color=_RED, linewidth=1.2, linestyle="--", label=f"target {values[-1]:.4g}")
        elif key == "beta_h":
            other = axes.twinx()
            other.plot(steps, values, color=_RED, linewidth=1.2, linestyle="--")
            other.set_ylabel(r"its weight $\beta_H$", fontsize=_SMALL, color=_RED)
            other.tick_params(labelsize=_SMALL, colors=_RED)
            other.locator_params(axis="y", nbins=4)
            other.set_ylim(bottom=0)
            other.spines[["top", "left", "bottom", "right"]].set_visible(False)
        elif key == "baseline":
            axes.plot(steps, values, color=_BLUE, linewidth=1.5, label="baseline")
        elif key == "reward" and len(series["baseline"][0]):
            axes.plot(steps, values, color=_BLUE, linewidth=0.8, alpha=0.3, label="reading")
        elif len(steps) < 60 or key in ("entropy", "expected_cost"):
            axes.plot(steps, values, color=_BLUE, linewidth=1.5)
        else:
            # Said once is enough: the other panels do the same.
            labels = ("reading", "running mean") if key == "loss" else (None, None)
            axes.plot(steps, values, color=_BLUE, linewidth=0.8, alpha=0.3, label=labels[0])
            axes.plot(steps, _running_mean(values), color=_BLUE, linewidth=1.5, label=labels[1])
    if "switch_rate" in series or "entropy" in series:
        axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=_SMALL, frameon=False)


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
    order = sorted(range(len(names)), key=lambda i: _order(names[i]))
    grid = np.linspace(steps[0], steps[-1], columns)
    at = np.searchsorted(steps, grid, side="right") - 1  # the last reading before each column
    upper = np.cumsum(probabilities[:, order], axis=1)[at]
    level = (np.arange(height, 0, -1) - 0.5) / height
    chosen = (level[:, None, None] > upper[None] / upper[None, :, -1:]).sum(-1)
    return np.array([color(names[i]) for i in order])[chosen]


def _order(name: str) -> tuple[float, bool, int, str]:
    """Sorts by bits, integers first, then by exponent bits; what is no format comes last, by name."""
    try:
        fmt = formats.Format(name)
    except ValueError:
        return (math.inf, False, 0, name)
    return (fmt.bits, not fmt.is_integer, _exponent_bits(fmt), name)


def _exponent_bits(fmt: formats.Format) -> int:
    return 0 if fmt.is_integer else fmt.bits - 1 - fmt.mantissa_bits


def color(name: str) -> tuple[float, float, float]:
    """The colour of a format, RGB: the same in every picture; grey for an option that is no format.

    The darker, the more bits. Formats of equal bits differ in tint: the paler, the more exponent bits.
    """
    try:
        fmt = formats.Format(name)
    except ValueError:
        return (0.6, 0.6, 0.6)
    # Most spaces lie in 4..8 bits, so these get most of the scale.
    place = np.interp(fmt.bits, [2, 4, 8, 16, 32], [1.0, 0.87, 0.28, 0.08, 0.0])
    pale = 0.04 + 0.08 * _exponent_bits(fmt) if fmt.is_scaled and not fmt.is_integer else 0.0
    red, green, blue = (float(c + (1 - c) * pale) for c in _matplotlib().colormaps["viridis"](place)[:3])
    return red, green, blue


def _ink(name: str) -> str:
    """Black or white, whichever is read better on the format's colour."""
    red, green, blue = color(name)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _fill(name: str, hatched: bool = True) -> dict[str, Any]:
    hatch = None
    if hatched and _order(name)[0] < math.inf:
        fmt = formats.Format(name)
        if not fmt.is_scaled:
            hatch = "xxx"
        elif not fmt.is_integer:
            hatch = "/" * _exponent_bits(fmt)
    return {"facecolor": color(name), "hatch": hatch, "edgecolor": "white" if hatch else color(name), "linewidth": 0}


def _legend(figure: Figure, names: Sequence[str], hatched: bool = True) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(label=name, **_fill(name, hatched)) for name in names]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(names), 8),
        fontsize=_SMALL,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.4,
    )


def _title(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=_LARGE, x=0.01, ha="left")


def _plain(axes: Axes, grid: bool = False) -> None:
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)


def _inches(text: str) -> float:
    """About how wide a text in the small font is."""
    return len(text) * 0.64 * _SMALL / 72


def _figure(width: float, height: float) -> Figure:
    _matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))


def _matplotlib() -> types.ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Pictures need matplotlib. Run `pip install fliqs-tf[plots]`.") from error
    return matplotlib
