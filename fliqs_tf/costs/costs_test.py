"""Costs by hand, and tables of costs against sums over every sample."""

import itertools
import warnings

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf import costs, wrapping
from fliqs_tf._keras import keras
from fliqs_tf.costs import Cost, CostTable, Site
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.quantize.decisions import open_decisions
from fliqs_tf.quantize.network import quantized_network
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.quantize.rules import Rule

L = keras.layers
GIGA, MEBIBYTE = 10**9, 8 * 2**20


def network():
    """conv: 36 * 27 * 4 = 3888 MACs, 108 weights; fc: 144 * 5 = 720 MACs, 720 weights."""
    inputs = keras.Input((8, 8, 3))
    x = L.Flatten()(L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3, name="conv")(inputs))))
    return keras.Model(inputs, L.Dense(5, name="fc")(x), name="net")


CONV, FC = (3888, 108), (720, 720)


def wrapped(space=("INT4", "INT8"), rules=(), granularity="layer", tensors="together"):
    return quantized_network(ModelGraph(network()), space, rules, granularity, tensors).model


# ---- a model and formats


@pytest.mark.parametrize("make", [network, wrapped])
@pytest.mark.parametrize("fmt, bits", [("INT4", 4), ("INT8", 8), ("E2M3", 6), ("BF16", 16), ("FP32", 32)])
def test_one_format_for_all(make, fmt, bits):
    assert costs.bops(make(), fmt) == (CONV[0] + FC[0]) * bits**2 / GIGA
    assert costs.memory(make(), fmt) == (CONV[1] + FC[1]) * bits / MEBIBYTE


@pytest.mark.parametrize("make", [network, wrapped])
def test_a_recipe(make):
    recipe = Recipe({"conv": "INT8", "fc": "INT4"})
    assert costs.bops(make(), recipe) == (CONV[0] * 64 + FC[0] * 16) / GIGA
    assert costs.memory(make(), recipe) == (CONV[1] * 8 + FC[1] * 4) / MEBIBYTE


def test_float_layers_count_as_fp32():
    model = wrapped(rules=[("conv", None)])
    assert costs.bops(model, "INT4") == (CONV[0] * 32 * 32 + FC[0] * 16) / GIGA
    assert costs.memory(model, "INT4") == (CONV[1] * 32 + FC[1] * 4) / MEBIBYTE


def test_a_plain_model_without_formats_is_fp32():
    assert costs.bops(network()) == (CONV[0] + FC[0]) * 1024 / GIGA


def test_a_model_with_fixed_formats_knows_its_own():
    recipe = Recipe({"conv": "INT8", "fc": "INT4"})
    model = wrapping.apply(network(), recipe)
    assert costs.bops(model) == costs.bops(network(), recipe)
    assert costs.bops(model, recipe) == costs.bops(network(), recipe)


# Recipes of every kind, the wrapping that makes such decisions, and bits of (conv weights, input, fc weights, input).
KINDS = {
    "together": (Recipe({"conv": "INT8", "fc": "INT4"}), {}, (8, 8, 4, 4)),
    "weights": (Recipe({"conv": "INT8", "fc": "INT4"}, "weights"), {"tensors": "weights"}, (8, 32, 4, 32)),
    "separate": (
        Recipe(
            {"conv/weights": "INT4", "conv/activations": "INT8", "fc/weights": "INT8", "fc/activations": "INT4"},
            "separate",
        ),
        {"tensors": "separate"},
        (4, 8, 8, 4),
    ),
    "tied": (
        Recipe({"all": "INT8"}, layers={"all": ("conv", "fc")}),
        {"rules": [Rule("", tie="all")]},
        (8, 8, 8, 8),
    ),
    "one for the model": (
        Recipe({"model": "INT4"}, layers={"model": ("conv", "fc")}),
        {"granularity": "model"},
        (4, 4, 4, 4),
    ),
    "tied and separate": (
        Recipe(
            {"all/weights": "INT4", "all/activations": "INT8"},
            "separate",
            {"all/weights": ("conv", "fc"), "all/activations": ("conv", "fc")},
        ),
        {"rules": [Rule("", tie="all")], "tensors": "separate"},
        (4, 8, 4, 8),
    ),
    "a layer in float": (
        Recipe({"fc": "INT4"}, info={"float_layers": ["conv"]}),
        {"rules": [("conv", None)]},
        (32, 32, 4, 4),
    ),
}


@pytest.mark.parametrize("recipe, options, bits", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["plain", "wrapped", "applied"])
def test_recipes_of_every_kind_on_models_of_every_kind(recipe, options, bits, kind):
    model = {
        "plain": network,
        "wrapped": lambda: wrapped(**options),
        "applied": lambda: wrapping.apply(network(), recipe),
    }[kind]()
    assert costs.bops(model, recipe) == (CONV[0] * bits[0] * bits[1] + FC[0] * bits[2] * bits[3]) / GIGA
    assert costs.memory(model, recipe) == (CONV[1] * bits[0] + FC[1] * bits[2]) / MEBIBYTE


@pytest.mark.parametrize("make", [network, wrapped])
def test_a_recipe_that_lacks_a_layer(make):
    with pytest.raises(ValueError, match="no format for 'fc' of model 'net'"):
        costs.bops(make(), Recipe({"conv": "INT8"}))


def test_an_unknown_format():
    with pytest.raises(ValueError, match="Unknown format 'INT99'"):
        costs.bops(network(), "INT99")


def test_the_input_shape_of_an_open_model():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, L.Conv2D(4, 3, name="conv")(inputs))
    assert [s.macs for s in costs.sites(model, (8, 8, 3))] == [CONV[0]]


def test_sites():
    model = wrapped(rules=[("conv", None), ("fc", ["INT4", "BF16"])], tensors="separate")
    assert costs.sites(model) == [
        Site("conv", *CONV),
        Site("fc", *FC, ("INT4", "BF16"), ("INT4", "BF16"), "fc/weights", "fc/activations"),
    ]
    assert costs.sites(network()) == [
        Site("conv", *CONV, weight_decision="conv", activation_decision="conv"),
        Site("fc", *FC, weight_decision="fc", activation_decision="fc"),
    ]


# A profile of a chip: cost per MAC by the pair of formats; INT8 weights with INT4 inputs are slower than either alone.
PROFILE = {("INT4", "INT4"): 1.5, ("INT4", "INT8"): 2.25, ("INT8", "INT4"): 9.5, ("INT8", "INT8"): 4.0}
CHIP = Cost("time", "us", 1000, lambda site, w, a: site.macs * PROFILE[w.name, a.name])


def test_a_cost_of_your_own():
    assert CHIP(network(), "INT8") == (CONV[0] + FC[0]) * 4.0 / 1000
    recipe = KINDS["separate"][0]
    assert CHIP(network(), recipe) == (CONV[0] * 2.25 + FC[0] * 9.5) / 1000


# ---- tables


SPACES = {
    "together": [("a", ["INT4", "INT8", "BF16"]), ("b", ["INT4", "INT8"])],
    "separate": [
        ("a/weights", ["INT4", "INT8"]),
        ("a/activations", ["INT4", "INT8", "BF16"]),
        ("b/weights", ["INT4", "INT8"]),
        ("b/activations", ["INT4", "INT8"]),
    ],
}
M2, M3 = ("INT4", "INT8"), ("INT4", "INT8", "BF16")
SITES = {
    "together": [
        Site("a", 1000, 10, M3, M3, "a", "a"),
        Site("a2", 500, 20, M3, M3, "a", "a"),  # tied to a
        Site("b", 700, 30, M2, M2, "b", "b"),
        Site("only weights", 300, 40, M2, ("FP32",), "b", None),
        Site("only input", 90, 45, ("INT8",), M3, "fixed", "a"),
        Site("fixed", 200, 50, ("INT8",), ("INT8",), "fixed", "fixed"),
        Site("float", 100, 60),
    ],
    "separate": [
        Site("a", 1000, 10, M2, M3, "a/weights", "a/activations"),
        Site("a2", 500, 20, M2, M3, "a/weights", "a/activations"),
        Site("b", 700, 30, M2, M2, "b/weights", "b/activations"),
        Site("mixed", 300, 40, M2, M3, "b/weights", "a/activations"),
        Site("float", 100, 60),
    ],
}
BITS = {"INT4": 4, "INT8": 8, "BF16": 16, "FP32": 32}


def by_hand(kind, sample, price):
    """Sum of price(site, weight bits, activation bits)."""
    chosen = {name: formats[i] for (name, formats), i in zip(SPACES[kind], sample)}
    return sum(
        price(
            site,
            BITS[chosen.get(site.weight_decision, site.weight_formats[0])],
            BITS[chosen.get(site.activation_decision, site.activation_formats[0])],
        )
        for site in SITES[kind]
    )


def every_sample(kind):
    return np.array(list(itertools.product(*(range(len(formats)) for _, formats in SPACES[kind]))))


PRICES = {
    "bops": (costs.bops, GIGA, lambda site, w, a: site.macs * w * a),
    "memory": (costs.memory, MEBIBYTE, lambda site, w, a: site.weights * w),
}


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("cost, per_unit, price", PRICES.values(), ids=PRICES)
def test_the_cost_of_every_sample(kind, cost, per_unit, price):
    table = CostTable(cost, SITES[kind], SPACES[kind])
    samples = every_sample(kind)
    expected = np.array([by_hand(kind, sample, price) for sample in samples]) / per_unit
    np.testing.assert_array_equal(table.of_samples(samples), expected)
    assert table.of_samples(samples[3]).tolist() == [expected[3]]
    assert table.reachable() == (expected.min(), expected.max())


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("cost", [costs.bops, costs.memory])
def test_expected_cost_is_the_mean_over_all_samples(kind, cost):
    table = CostTable(cost, SITES[kind], SPACES[kind])
    rng = np.random.default_rng(0)
    width = max(len(formats) for _, formats in SPACES[kind])
    probabilities = np.zeros((len(SPACES[kind]), width))
    for row, (_, formats) in zip(probabilities, SPACES[kind]):
        row[: len(formats)] = rng.dirichlet(np.ones(len(formats)))
    samples = every_sample(kind)
    weights = np.prod(probabilities[np.arange(len(probabilities)), samples], axis=1)
    assert weights.sum() == pytest.approx(1)
    expected = float(table.expected(tf.constant(probabilities, tf.float32)))
    assert expected == pytest.approx(float(weights @ table.of_samples(samples)), rel=1e-5)


def test_expected_cost_of_a_certain_choice_and_its_gradient():
    table = CostTable(Cost("macs", "", 1, costs.bops.layer), [Site("a", 3, 1, M2, M2, "a", "a")], [("a", M2)])
    probabilities = tf.constant([[0.0, 1.0]])
    with tf.GradientTape() as tape:
        tape.watch(probabilities)
        expected = table.expected(probabilities)
    assert float(expected) == 3 * 64
    assert tape.gradient(expected, probabilities).numpy().tolist() == [[3 * 16, 3 * 64]]


def test_prices_need_not_be_whole_nor_rise_with_the_bits():
    sites = [Site("a", 10, 1, M2, M2, "a/weights", "a/activations")]
    table = CostTable(CHIP, sites, [("a/weights", M2), ("a/activations", M2)])
    assert table.of_samples([[0, 0], [0, 1], [1, 0], [1, 1]]).tolist() == [0.015, 0.0225, 0.095, 0.04]
    assert table.reachable() == (0.015, 0.095)
    assert CostTable(Cost("BOPs", "", 1, CHIP.layer), sites[:1], [("a/weights", M2), ("a/activations", M2)])


def test_totals_of_large_networks_are_exact():
    macs = 10**12 + 1
    table = CostTable(Cost("BOPs", "", 1, costs.bops.layer), [Site("a", macs, 1, M2, M2, "a", "a")], [("a", M2)])
    assert table.of_samples([[1]]).tolist() == [macs * 64]


def test_a_table_agrees_with_the_cost_of_a_recipe():
    model = wrapped(tensors="separate")
    found = open_decisions(ModelGraph(model))
    table = CostTable(costs.bops, costs.sites(model), [(d.name, d.options) for d in found])
    for sample in itertools.product(range(2), repeat=4):
        recipe = Recipe({d.name: d.options[i] for d, i in zip(found, sample)}, "separate")
        assert table.of_samples([sample])[0] == costs.bops(model, recipe)


# ---- targets


def read(text, reachable=(1.0, 100.0)):
    return costs.parse_target_cost(text, lambda fmt: {"INT8": 40.0, "INT4": 10.0}[fmt], "GBOPs", reachable)


@pytest.mark.parametrize(
    "text, value",
    [
        (20, 20.0),
        (20.5, 20.5),
        (np.float32(20.5), 20.5),
        (np.int64(20), 20.0),
        ("20", 20.0),
        (" 2e1 ", 20.0),
        ("0.25x INT8", 10.0),
        ("0.25 x int8", 10.0),
        ("0.25*INT8", 10.0),
        ("0.25xINT8", 10.0),
        ("1.5x INT4", 15.0),
        (1.0, 1.0),
        (100.0, 100.0),
    ],
)
def test_targets(text, value):
    assert read(text) == value
    assert type(read(text)) is float


def test_a_small_float_of_numpy_is_compared_without_overflow():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(np.float32(20.5)) == 20.5


@pytest.mark.parametrize(
    "text",
    ["inf", "nan", "1e999", "1e999x INT8", "", "x INT8", "INT8", "0.25x", "1.2.3", "20 GBOPs", "--1", "0.25x INT8 INT4"]
    + [float("inf"), float("nan"), 10**400, True, np.True_, [20], {"a": 1}, b"20", 1 + 2j],
)
def test_what_is_not_a_target(text):
    with pytest.raises(ValueError, match="target_cost must be a number in GBOPs or .*'0.25x INT8'.*got"):
        read(text)


@pytest.mark.parametrize("text", [0.99, 101, "-1", -1, 0, "0", "3x INT8", "1e308", 10**300])
def test_a_target_out_of_reach_prints_the_range(text):
    with pytest.raises(ValueError, match=r"is out of reach: the formats of this search cost from 1 to 100 GBOPs\."):
        read(text)


def test_the_ends_of_the_range_can_be_reached_in_spite_of_rounding():
    assert read(100.00001) == 100.00001
    assert read(0.99999) == 0.99999


def test_a_target_relative_to_an_unknown_format():
    with pytest.raises(ValueError, match="Unknown format 'INT99'"):
        read("0.25x INT99")
