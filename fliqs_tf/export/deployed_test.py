"""Weights to values and scales and back, to the bit; recipes of deployed models."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.export import deployed
from fliqs_tf.graph import layer_types
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantizers import WeightQuantizer
from fliqs_tf.numerics import rounding
from fliqs_tf.numerics.formats import Format

L = keras.layers
SCALED = [f"INT{b}" for b in range(2, 17)] + [f"E{x}M{y}" for x in range(1, 6) for y in range(11)]
FORMATS = [*SCALED, "BF16", "FP32"]
TINY = np.finfo(np.float32).tiny


@functools.cache
def quantizer_of(fmt):
    return WeightQuantizer([fmt], (-1,))


def quantize(weight, fmt):
    """(quantizer, what it makes of the weight)"""
    quantizer = quantizer_of(fmt)
    return quantizer, quantizer.call(tf.constant(weight)).numpy()


def channels(seed=0):
    """Weights of hard channels: tiny, huge, all zero, one entry, denormal, and some whose amax * max rounds."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((50, 40)).astype(np.float32)
    weight *= np.exp2(rng.uniform(-12, 12, 40)).astype(np.float32)
    weight[:, 0] = 0
    for channel, amax in ((1, 1e-37), (2, 3e-38), (4, 3e38)):
        weight[:, channel] *= 1 / np.abs(weight[:, channel]).max()
        weight[:, channel] *= np.float32(amax)
    weight[:, 3] = np.float32(1e-40)
    weight[1:, 5] = 0
    weight[:, 6] = -0.0
    weight[:, 7] = TINY
    weight[:, 8] = np.linspace(-4, 4, 50) * TINY
    return weight


@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_are_values_times_scale_and_come_back_to_the_bit(fmt):
    weight = channels()
    quantizer, expected = quantize(weight, fmt)
    found = deployed.quantized_weight("w", quantizer, tf.constant(weight))
    scale = np.ones((1, 40), np.float32) if found.scale is None else found.scale
    assert scale.shape == (1, 40) and found.values.dtype == scale.dtype == np.float32
    np.testing.assert_array_equal(found.values * scale, expected)
    if fmt != "FP32":
        assert set(np.unique(found.values[:, 9:])) <= set(Format(fmt).values())
    restored = deployed.weights_of(found)
    assert restored.dtype == np.float32
    _, again = quantize(restored, fmt)
    np.testing.assert_array_equal(again.view(np.int32), expected.view(np.int32))
    np.testing.assert_array_equal(deployed.quantized_weight("w", quantizer, tf.constant(restored)).values, found.values)


@given(st.sampled_from(SCALED), st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8))
@settings(deadline=None, max_examples=100)
def test_any_weights_come_back_to_the_bit(fmt, weight):
    weight = np.array(weight, np.float32)[:, None]
    quantizer, expected = quantize(weight, fmt)
    restored = deployed.weights_of(deployed.quantized_weight("w", quantizer, tf.constant(weight)))
    np.testing.assert_array_equal(quantize(restored, fmt)[1], expected)


@pytest.mark.parametrize("fmt", [f"INT{b}" for b in range(2, 17)])
def test_values_times_scale_have_the_scale_again(fmt):
    """Every mantissa of amax. The largest value of any format is a power of two times 2^k - 1, k < 16, as that of an
    INT is; powers of two change exponents only."""
    fmt = Format(fmt)
    one = np.float32(1).view(np.int32)
    for part in range(8):
        amax = (np.arange(part * 2**20, (part + 1) * 2**20, dtype=np.int32) | one).view(np.float32)
        scale = deployed.scale_of(amax, fmt)
        np.testing.assert_array_equal(deployed.scale_of(scale * np.float32(fmt.max), fmt), scale)


def test_scales_that_no_amax_has_would_not():
    """Why the test above asks only about scales that occur."""
    scale = np.random.default_rng(0).uniform(1, 2, 10_000).astype(np.float32)
    assert (deployed.scale_of(scale * np.float32(127), Format("INT8")) != scale).any()


@pytest.mark.parametrize("fmt", SCALED)
def test_the_largest_value_is_a_power_of_two_times_one_less_than_one(fmt):
    odd = int(Format(fmt).max * 2**10)
    while odd % 2 == 0:
        odd //= 2
    assert odd & (odd + 1) == 0 and odd < 2**16


def test_the_scale_is_the_kernels():
    weight = channels()
    for fmt in SCALED:
        amax = rounding.absolute_max(tf.constant(weight), -1).numpy()
        scale = deployed.scale_of(amax, Format(fmt))
        ones = rounding.fake_quant(tf.constant(scale * np.float32(1.0)), "FP32").numpy()
        np.testing.assert_array_equal(ones, scale)
        # The largest value of a channel with an ordinary amax is that of the format.
        top = rounding.fake_quant(tf.constant(amax), fmt, amax=tf.constant(amax)).numpy()
        np.testing.assert_array_equal(top[:, 9:], (scale * np.float32(Format(fmt).max))[:, 9:])


def test_not_finite_weights_are_refused():
    quantizer = WeightQuantizer(["INT8"])
    with pytest.raises(ValueError, match="'fc/kernel' has NaN or infinite entries in INT8"):
        deployed.quantized_weight("fc/kernel", quantizer, tf.constant([[1.0, np.inf]]))


# ---- models


def network(**options):
    inputs = keras.Input((8, 8, 2), name="image")
    x = L.SeparableConv2D(4, 3, name="separable")(inputs)
    x = L.ReLU()(L.Conv2D(4, 3, name="conv")(x))
    x = L.Flatten()(x)
    return keras.Model(inputs, L.Dense(3, name="fc")(x), name="net")


def test_layers_and_weights():
    final = fliqs_tf.apply(network(), "INT4")
    layers = dict(deployed.quantized_layers(ModelGraph(final)))
    assert list(layers) == ["separable", "conv", "fc"]
    weights = deployed.quantized_weights("separable", layers["separable"])
    assert {k: (w.scale.shape, w.format.name) for k, w in weights.items()} == {
        "depthwise_kernel": ((1, 1, 2, 1), "INT4"),
        "pointwise_kernel": ((1, 1, 1, 4), "INT4"),
    }


@pytest.mark.parametrize("tensors", ["together", "weights", "separate"])
def test_the_recipe_is_that_of_the_search(tensors):
    rules = [("^fc", None), fliqs_tf.Rule("conv|separable", tie="tied")]
    searched = fliqs_tf.wrap(network(), ["INT4", "INT8"], rules, tensors=tensors)
    assert deployed.recipe(ModelGraph(searched.deploy())) == searched.recipe()
    assert deployed.recipe(ModelGraph(searched.deploy())).float_layers == ("fc",)


def test_the_recipe_of_a_model_quantized_layer_by_layer():
    inputs = keras.Input((4,))
    x = fliqs_tf.Quantized(L.Dense(4, name="a"), ["INT4"], None, name="a")(inputs)
    model = keras.Model(inputs, fliqs_tf.Quantized(L.Dense(4, name="b"), ["INT8"], ["E4M3"], "b", "b", name="b")(x))
    assert deployed.recipe(ModelGraph(model)) == fliqs_tf.Recipe(
        {"a/weights": "INT4", "a/activations": "FP32", "b/weights": "INT8", "b/activations": "E4M3"}, "separate"
    )


def mixed_search():
    """Layers whose input stays in float, shares the decision of the weights, or has one of its own."""
    inputs, space = keras.Input((4,)), ["INT4", "INT8"]
    x = fliqs_tf.Quantized(L.Dense(4, name="a"), space, None, "first", name="a")(inputs)
    x = fliqs_tf.Quantized(L.Dense(4, name="b"), space, space, "tied", "tied", name="b")(x)
    x = fliqs_tf.Quantized(L.Dense(4, name="c"), space, space, "tied", "tied", name="c")(x)
    x = fliqs_tf.Quantized(L.Dense(4, name="d"), space, ["E4M3", "E5M2"], "d/weights", "d/activations", name="d")(x)
    return fliqs_tf.SearchModel(keras.Model(inputs, x, name="net"))


LOW = {"a/weights": "INT4", "a/activations": "FP32", "b/weights": "INT4", "b/activations": "INT4"}
LOW |= {"c/weights": "INT4", "c/activations": "INT4", "d/weights": "INT4", "d/activations": "E4M3"}
HIGH = {name: {"INT4": "INT8", "E4M3": "E5M2"}.get(fmt, fmt) for name, fmt in LOW.items()}


def test_a_search_of_layers_quantized_one_by_one():
    searched = mixed_search()
    recipe = searched.recipe()
    assert list(recipe.formats) == list(LOW) and recipe.formats["a/activations"] == "FP32"
    assert deployed.recipe(ModelGraph(searched.deploy())) == recipe
    assert fliqs_tf.costs.bops(searched) == fliqs_tf.costs.bops(searched.deploy())
    plain = keras.Sequential([keras.Input((4,)), *(L.Dense(4, name=name) for name in "abcd")])
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f")
    for formats, bits in ((LOW, 4 * 32 + 16 + 16 + 4 * 8), (HIGH, 8 * 32 + 64 + 64 + 8 * 8)):
        given = fliqs_tf.Recipe(formats, "separate")
        final = searched.deploy(given)
        assert deployed.recipe(ModelGraph(final)) == given
        assert fliqs_tf.costs.bops(final) == fliqs_tf.costs.bops(searched, given) == 16 * bits / 1e9
        plain.set_weights([w for layer in final.layers[1:] for w in layer.quantized_layer.get_weights()])
        np.testing.assert_array_equal(fliqs_tf.apply(plain, given)(x), final(x))
    uniform = fliqs_tf.Recipe.uniform(searched, "INT8")
    assert uniform.formats == {**HIGH, "d/activations": "INT8"}
    assert deployed.recipe(ModelGraph(searched.deploy(uniform))) == uniform


@pytest.mark.parametrize(
    "change, message",
    [
        ({"b/weights": "INT8"}, "'b/weights' INT8 and 'b/activations' INT4, but they are one decision, 'tied'"),
        ({"c/weights": "INT8", "c/activations": "INT8"}, "'b/weights' INT4 and 'c/weights' INT8.*one decision, 'tied'"),
        ({"a/activations": "INT8"}, "'a/activations' INT8, but the input of 'a' stays in float"),
    ],
)
def test_a_recipe_that_the_decisions_do_not_allow_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mixed_search().deploy(fliqs_tf.Recipe({**LOW, **change}, "separate"))


def test_a_model_that_is_not_deployed_is_refused():
    searched = fliqs_tf.wrap(network(), ["INT4", "INT8"])
    with pytest.raises(ValueError, match=r"'net' is still being searched: give what its deploy\(\) returns"):
        deployed.quantized_layers(ModelGraph(searched))
    with pytest.raises(ValueError, match=r"Layer 'separable' may still take INT4, INT8: its format is not decided"):
        deployed.quantized_layers(ModelGraph(searched.network))
    with pytest.raises(ValueError, match="'net' has no quantized layer"):
        deployed.quantized_layers(ModelGraph(network()))
    with pytest.raises(TypeError, match="Expected a tf.keras model, got int"):
        deployed.quantized_layers(ModelGraph(3))


def test_input_scales():
    model = fliqs_tf.apply(network(), "INT8")
    quantizer = dict(deployed.quantized_layers(ModelGraph(model)))["fc"].activation_quantizer
    with pytest.raises(ValueError, match="has seen no data"):
        deployed.input_scale(quantizer)
    quantizer.range.assign([12.7, 1.0])
    assert deployed.input_scale(quantizer) == np.float32(12.7) / np.float32(127)
    assert [k.attribute for k in layer_types.kernels(model.get_layer("fc").quantized_layer)] == ["kernel"]
