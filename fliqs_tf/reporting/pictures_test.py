"""What the pictures show, read back from their figures."""

import itertools
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from fliqs_tf.reporting import curves, palette, pictures

S_INT = ["INT4", "INT8", "BF16"]
L_FLOAT = ["E2M1", "E2M2", "E3M1", "E2M3", "E3M2", "E4M1", "E2M4", "E3M3", "E4M2", "E5M1"]
L_FLOAT += ["E2M5", "E3M4", "E4M3", "E5M2", "BF16"]


def layer(name, cost, weight, activation="same"):
    activation = weight if activation == "same" else activation
    return {"name": name, "cost": cost, "weight_format": weight, "activation_format": activation}


def many_layers(count, formats, split=False):
    return [
        layer(
            f"stage{i // 7}_block{i % 7}_convolution",
            cost=10.0 ** (i % 4),
            weight=formats[i % len(formats)],
            activation=formats[(i * 3 + 1) % len(formats)] if split else "same",
        )
        for i in range(count)
    ]


def texts(figure):
    """Every text that can be seen, with its box in pixels."""
    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            # Ticks beyond the limits have labels that are not drawn.
            hidden |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
            hidden |= {tick.label2 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible() and artist not in hidden)
    return [(text.get_text(), text.get_window_extent()) for text in found if text.get_text().strip()]


def overlapping(figure):
    """Pairs of texts that cover each other by more than a pixel, and texts that leave the picture."""
    boxes = texts(figure)
    size = figure.bbox
    outside = [t for t, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > size.x1 + 1 or b.y1 > size.y1 + 1]
    pairs = [
        (a, b)
        for (a, p), (b, q) in itertools.combinations(boxes, 2)
        if min(p.x1, q.x1) - max(p.x0, q.x0) > 1
        and min(p.y1, q.y1) - max(p.y0, q.y0) > 1
        # Texts at an angle have boxes far larger than themselves.
        and not ("_" in a and "_" in b)
    ]
    return outside, pairs


# Formats per layer.


def test_bar_heights_are_shares_of_the_cost_and_colours_the_formats():
    layers = [layer("a", 1.0, "INT4"), layer("b", 6.0, "INT8"), layer("c", 3.0, "E4M3"), layer("d", 0.0, None)]
    bars = pictures.formats_figure(layers).axes[0]
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([10, 60, 30, 0])
    for bar, name in zip(bars.patches, ["INT4", "INT8", "E4M3", "FP32"], strict=True):
        assert to_rgb(bar.get_facecolor()) == pytest.approx(palette.color(name))
    assert [bar.get_hatch() for bar in bars.patches] == [None, None, "////", "xxx"]
    assert bars.get_ylabel() == "share of the total cost (%)"


def test_differing_weights_and_activations_are_both_shown():
    layers = [layer("a", 1.0, "INT4", "INT8"), layer("b", 3.0, "INT8")]
    bars, strip = pictures.formats_figure(layers).axes
    left, right, both = bars.patches
    assert (left.get_height(), right.get_height(), both.get_height()) == pytest.approx((25, 25, 75))
    assert left.get_x() + left.get_width() == pytest.approx(0) == pytest.approx(right.get_x())
    assert to_rgb(left.get_facecolor()) == pytest.approx(palette.color("INT4"))
    assert to_rgb(right.get_facecolor()) == pytest.approx(palette.color("INT8"))
    assert both.get_width() == pytest.approx(0.8)
    assert [label.get_text() for label in strip.get_yticklabels()] == ["weights", "activations"]
    assert [text.get_text() for text in strip.texts] == ["INT4", "INT8", "INT8", "INT8"]


def test_tiles_name_the_format_of_every_layer_in_its_colour():
    layers = [layer("first", 5.0, "INT4"), layer("free", 0.0, "E5M2"), layer("float", 1.0, None)]
    _, strip = pictures.formats_figure(layers).axes
    assert [text.get_text() for text in strip.texts] == ["INT4", "E5M2", "FP32"]
    assert [to_rgb(tile.get_facecolor()) for tile in strip.patches] == [
        pytest.approx(palette.color(name)) for name in ("INT4", "E5M2", "FP32")
    ]
    assert [label.get_text() for label in strip.get_xticklabels()] == ["first", "free", "float"]
    assert [label.get_text() for label in strip.get_yticklabels()] == ["format"]


def test_legend_has_the_formats_present_ordered_by_bits():
    layers = [layer(str(i), 1.0, name) for i, name in enumerate(["BF16", "E4M3", "INT4", "INT8", "INT4", "E2M1"])]
    (legend,) = pictures.formats_figure(layers).legends
    assert [text.get_text() for text in legend.get_texts()] == ["INT4", "E2M1", "INT8", "E4M3", "BF16"]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("count, formats", [(1, S_INT), (9, S_INT), (13, S_INT), (22, S_INT), (60, L_FLOAT)])
def test_no_text_covers_another_and_tiles_hold_their_names(count, formats, split):
    figure = pictures.formats_figure(many_layers(count, formats, split), "Formats of the layers")
    assert overlapping(figure) == ([], [])
    _, strip = figure.axes
    for tile, text in zip(strip.patches, strip.texts, strict=True):
        outer, inner = tile.get_window_extent(), text.get_window_extent()
        assert outer.x0 <= inner.x0 and inner.x1 <= outer.x1, text.get_text()
        assert outer.y0 <= inner.y0 and inner.y1 <= outer.y1, text.get_text()


def test_layers_without_cost_are_drawn():
    bars = pictures.formats_figure([layer("a", 0.0, "INT4")]).axes[0]
    assert bars.patches[0].get_height() == 0


def test_no_layers():
    with pytest.raises(ValueError, match="no layers to draw"):
        pictures.formats_figure([])


# Probabilities.


def test_strips_show_the_probabilities_stacked_from_few_bits_to_many():
    steps = [0, 10, 20]
    # In the formats BF16 stands first: the stack is by bits all the same.
    formats = ["BF16", "INT4", "INT8"]
    p = np.array([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]])
    axes = pictures.probabilities_figure(steps, [p], ["conv"], [formats]).axes[0]
    image = axes.images[0].get_array()
    names = ["INT4", "INT8", "BF16"]

    def shares(column):
        nearest = [np.abs(image[:, column] - palette.color(name)).sum(-1) < 1e-6 for name in names]
        assert np.all(np.sum(nearest, axis=0) == 1)
        return [float(hit.mean()) for hit in nearest]

    columns = image.shape[1]
    assert shares(0) == pytest.approx([0.3, 0.5, 0.2], abs=0.03)
    # A reading holds until the next one.
    assert shares(int(0.45 * columns)) == pytest.approx([0.3, 0.5, 0.2], abs=0.03)
    assert shares(int(0.55 * columns)) == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert shares(columns - 1) == pytest.approx([0, 1, 0], abs=0.03)
    # Row 0 of an image is its top.
    assert tuple(image[-1, 0]) == pytest.approx(palette.color("INT4"))
    assert tuple(image[0, 0]) == pytest.approx(palette.color("BF16"))
    assert [text.get_text() for text in axes.texts] == ["INT8  100%"]


def test_decisions_from_top_to_bottom_each_with_its_own_menu():
    p = [np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.2, 0.2, 0.6], [0.1, 0.7, 0.2]])]
    spaces = [["INT4", "INT8"], ["E2M1", "E4M3", "BF16"]]
    figure = pictures.probabilities_figure([5, 6], p, ["first", "second"], spaces)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    assert [text.get_text() for text in axes.texts] == ["INT4  90%", "E4M3  70%"]
    tops = [image.get_extent()[3] for image in axes.images]
    assert tops == pytest.approx([-0.43, 0.57])
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert axes.get_xlim() == (5, 6)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["INT4", "E2M1", "INT8", "E4M3", "BF16"]


@pytest.mark.parametrize("count, formats", [(1, S_INT), (9, S_INT[:2]), (22, S_INT), (60, L_FLOAT)])
def test_no_text_of_the_strips_covers_another(count, formats):
    random = np.random.default_rng(0)
    p = [random.dirichlet(np.ones(len(formats)), size=30) for _ in range(count)]
    names = [layer["name"] for layer in many_layers(count, formats)]
    figure = pictures.probabilities_figure(np.arange(30) * 1000, p, names, [formats] * count)
    outside, pairs = overlapping(figure)
    assert (outside, pairs) == ([], [])
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(a.y0 > b.y1 - 1 for a, b in itertools.pairwise(boxes))


def test_one_reading_is_enough():
    axes = pictures.probabilities_figure([7], [np.array([[0.25, 0.75]])], ["a"], [["INT4", "INT8"]]).axes[0]
    assert axes.texts[0].get_text() == "INT8  75%"


def test_probabilities_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"probabilities of 'a' must have shape .*\[2, 3\] \(got \[2, 2\]\)"):
        pictures.probabilities_figure([0, 1], [np.ones((2, 2))], ["a"], [S_INT])
    with pytest.raises(ValueError, match=r"equally many \(got 2, 1 and 1\)"):
        pictures.probabilities_figure([0], [np.ones((1, 3))], ["a", "b"], [S_INT])
    with pytest.raises(ValueError, match="nothing to draw"):
        pictures.probabilities_figure([], [], [], [])


# Curves.


def rows(steps=100, **more):
    return [
        {"step": i, "reward": 0.1 * i, "baseline": 0.1 * i - 1, "expected_cost": 3.0, "target_cost": 2.5}
        | {"entropy": 1 - i / steps, "beta_h": 0.01, "loss": 2.0, "accuracy": 0.5, "switch_rate": 0.3}
        | more
        for i in range(steps)
    ]


def panel(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


def test_curves_have_a_panel_per_reading_with_units():
    figure = curves.curves_figure(rows(), "GBOPs")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == [
        "Reward",
        "Expected cost",
        "Entropy of the controller",
        "Training loss",
        "Training accuracy",
        "Layers that switched",
    ]
    assert panel(figure, "Expected cost").get_ylabel() == "cost (GBOPs)"
    assert panel(figure, "Entropy of the controller").get_ylabel() == "share of its maximum"
    reward, baseline = panel(figure, "Reward").lines
    assert reward.get_ydata() == pytest.approx([0.1 * i for i in range(100)])
    assert baseline.get_ydata() == pytest.approx([0.1 * i - 1 for i in range(100)])
    cost, target = panel(figure, "Expected cost").lines
    assert set(target.get_ydata()) == {2.5}
    assert target.get_label() == "target 2.5"
    assert set(cost.get_ydata()) == {3.0}


def test_curves_draw_only_what_there_is():
    figure = curves.curves_figure([{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}, {"step": 2}])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Training loss"]
    assert figure.axes[0].get_xlabel() == "step"
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 1], [1, 0.5]]


def test_what_is_no_finite_number_is_left_out():
    data = [{"step": i, "loss": value} for i, value in enumerate([3.0, float("nan"), None, float("inf"), "high", 1.0])]
    assert curves.curves_figure(data).axes[0].lines[0].get_xydata().tolist() == [[0, 3], [5, 1]]
    assert not curves.has_curve({"step": 1, "loss": float("nan"), "lr": 3.0})
    assert curves.has_curve({"step": 1, "baseline": 0.0})


def test_running_mean_keeps_constants_and_follows_a_step():
    assert curves._running_mean(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    step = np.repeat([0.0, 1.0], 100)
    mean = curves._running_mean(step)
    assert mean[:90] == pytest.approx(0) and mean[110:] == pytest.approx(1)
    assert 0.3 < mean[100] < 0.7
    # Windows of 2 * 5 + 1 readings inside, narrower at the ends.
    assert mean[98] == pytest.approx(4 / 11)


@pytest.mark.parametrize("keys", [("loss",), ("loss", "reward"), ("loss", "reward", "entropy", "accuracy"), None])
def test_no_text_of_the_curves_covers_another(keys):
    data = [row if keys is None else {"step": row["step"], **{k: row[k] for k in keys}} for row in rows(2000)]
    assert overlapping(curves.curves_figure(data, "GBOPs")) == ([], [])


def test_no_curves():
    with pytest.raises(ValueError, match="no curves to draw"):
        curves.curves_figure([{"step": 3, "probabilities": {}}])


# All of them.

DRAW = {
    "formats": lambda: pictures.formats_figure([layer("a", 1.0, "INT4")]),
    "probabilities": lambda: pictures.probabilities_figure([0], [np.ones((1, 1))], ["a"], [["INT4"]]),
    "curves": lambda: curves.curves_figure([{"step": 0, "loss": 1.0}]),
}


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_missing_matplotlib_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install fliqs-tf\[plots\]"):
        draw()


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_pyplot_is_not_needed(draw, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    draw().savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_zero_all_the_time_has_no_panel():
    still = [{**row, "switch_rate": 0.0} for row in rows()]
    titles = [axes.get_title(loc="left") for axes in curves.curves_figure(still).axes]
    assert "Layers that switched" not in titles and "Training loss" in titles
    assert not curves.has_curve({"step": 1, "switch_rate": 0.0}) and curves.has_curve({"step": 1, "loss": 0.5})
