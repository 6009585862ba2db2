"""The roundings of integer kernels against numbers worked out by hand."""

import numpy as np
import pytest

from fliqs_tf._keras import keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import requantize

L = keras.layers


def layer(kind_and_state):
    kind, state = kind_and_state
    made = kind(len(state["unit"]))
    for attribute, value in state.items():
        getattr(made, attribute).assign(value)
    return made


def test_once_rounds_halves_to_even():
    """Input codes are worth 0.5, weights 1: an accumulator of 3 is 1.5. An output code is worth 1."""
    kind, state = requantize.single_rounding(0.5, np.ones(1), 1.0)
    assert kind is requantize.AccumulatorRounding
    np.testing.assert_array_equal(state["unit"], [0.5])
    np.testing.assert_array_equal(state["multiplier"], [0.5])
    assert state["scale"] == 1
    x = np.array([[0.5], [1.5], [2.5], [-0.5], [-1.5], [1.0]], np.float32)
    np.testing.assert_array_equal(layer((kind, state))(x).numpy().ravel(), [0, 2, 2, 0, -2, 1])


def test_once_finds_the_accumulator_behind_a_sum_in_float32():
    """4.999 units are 5, and 5 * 0.25 is 1.25: one code. Of channels each has its own unit."""
    rounding = layer(requantize.single_rounding(0.5, np.array([0.5, 1.0]), 1.0))
    np.testing.assert_array_equal(rounding.accumulator(np.float32([[1.2499, 2.501]])), [[5, 5]])
    np.testing.assert_array_equal(rounding(np.float32([[1.2499, 2.501]])), [[1, 2]])  # of 1.25, and of 2.5


# multiplier -> the power of two at or above it, at most 1: what LiteRT's int4 kernels round to first
GRAINS = [(0.5, 1.0), (0.3, 0.5), (0.25, 0.5), (0.2, 0.25), (0.01, 1 / 64), (0.75, 1.0), (1.5, 1.0), (7.0, 1.0)]


@pytest.mark.parametrize(("multiplier", "grain"), GRAINS)
def test_the_grain_of_twice_is_a_power_of_two_of_the_output_scale(multiplier, grain):
    kind, state = requantize.double_rounding(multiplier, np.ones(1), 1.0)
    assert kind is requantize.KernelRounding
    np.testing.assert_array_equal(state["grain"], [grain])
    _, scaled = requantize.double_rounding(multiplier, np.ones(1) * 0.5, 0.5)
    np.testing.assert_array_equal(scaled["grain"], [grain * 0.5])


def test_twice_by_hand():
    """Multiplier 0.3, so grains are halves of a code.

    An accumulator of 4 is 1.2 codes: 1.0 to the half, code 1. Of 5 it is 1.5: code 2, halves go up. Of 11 it is 3.3:
    first 3.5, then 4, though 3 is nearer. Of -5 it is -1.5, and up is -1. Of -11 it is -3.3: -3.5, then -3.
    """
    rounding = layer(requantize.double_rounding(0.3, np.ones(1), 1.0))
    accumulators = np.array([[4], [5], [11], [-5], [-11], [0], [1]], np.float32)
    first = rounding(accumulators * np.float32(0.3)).numpy().ravel()
    np.testing.assert_array_equal(first, np.array([1, 1.5, 3.5, -1.5, -3.5, 0, 0.5]) + 0.125)
    np.testing.assert_array_equal(np.rint(first), [1, 2, 4, -1, -3, 0, 1])


def test_channels_of_twice_have_grains_of_their_own():
    """Multipliers 0.3 and 0.1: halves and eighths. 1.3 codes become 1.5 in the one and 1.25 in the other."""
    rounding = layer(requantize.double_rounding(1.0, np.array([0.325, 0.1]), 1.0))
    np.testing.assert_array_equal(rounding(np.float32([[1.3, 1.3]])), [[1.5 + 0.125, 1.25 + 0.03125]])


def network():
    inputs = L.Input((4,))
    twice, inner = L.Dense(4, name="twice"), keras.Sequential([L.Input((4,)), L.Dense(4, name="inner")], name="net")
    return keras.Model(inputs, twice(twice(inner(inner(inputs)))))


def state(unit):
    return requantize.single_rounding(unit, np.ones(4), 1.0)


def roundings_of(model):
    return {
        layer.name: float(layer.unit[0])
        for _, layer in ModelGraph(model).layers
        if isinstance(layer, requantize.ROUNDINGS)
    }


def test_each_call_of_a_layer_rounds_in_its_way():
    found = requantize.insert(ModelGraph(network()), {("twice", 0): [state(0.5)], ("twice", 1): [state(0.25)]}).model
    assert roundings_of(found) == {"twice_kernel": 0.5, "twice_kernel_1": 0.25}
    inputs = np.float32([[1, 2, 3, 4]])
    for layer in found.layers:
        if isinstance(layer, L.Dense):
            layer.set_weights([np.eye(4), np.full(4, 0.375)])
    for layer in found.get_layer("net").layers:
        layer.set_weights([np.eye(4), np.zeros(4)])
    # 1.375 is 2.75 units of 0.5: 3, and 1.5 codes are 2. Then 2.375 is 9.5 units of 0.25: 10, and 2.5 codes are 2.
    np.testing.assert_array_equal(found(inputs), [[2, 2, 4, 4]])


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([state(0.5), state(0.5)], {"net_inner_kernel": 0.5}),
        ([state(0.5), state(0.25)], {}),  # two ways at one place
        ([state(0.5)], {}),  # of two calls one does not round
        ([state(0.5), requantize.double_rounding(0.5, np.ones(4), 1.0)], {}),
    ],
)
def test_a_layer_in_a_network_that_is_called_twice_rounds_in_one_way_or_in_none(wanted, found):
    assert roundings_of(requantize.insert(ModelGraph(network()), {("net/inner", 0): wanted}).model) == found


def test_roundings_come_back_from_their_config():
    made = requantize.KernelRounding.from_config(requantize.KernelRounding(3, name="k").get_config())
    assert (made.name, tuple(made.grain.shape), tuple(made.unit.shape)) == ("k", (3,), (3,))
    assert tuple(made.compute_output_shape((None, 5, 3))) == (None, 5, 3)
