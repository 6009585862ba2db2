"""Which input quantizers take the range of which boundary quantizer."""

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import shared_ranges
from fliqs_tf.layers.quantizers import ActivationQuantizer

L = keras.layers


def dense(name, activations=("INT8",)):
    return fliqs_tf.Quantized(L.Dense(4), ["INT8"], activations, name=name)


def boundary(name="boundary"):
    return ActivationQuantizer(["INT8"], name=name)


def network(*between, reader=None):
    """A boundary quantizer, layers, and a quantized layer that reads what they give."""
    inputs = x = L.Input((4,))
    for layer in (boundary(), *between, reader or dense("reader")):
        x = layer(x)
    return keras.Model(inputs, x)


def names(model):
    return [(leader.name, quantizer.name) for leader, quantizer in shared_ranges.followers(ModelGraph(model))]


PAIR = [("boundary", "input_quantizer")]


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ([], PAIR),
        ([L.ReLU()], PAIR),
        ([L.Dropout(0.5), L.Reshape((2, 2)), L.Flatten()], PAIR),
        ([L.Activation("tanh")], []),  # what comes out has another range
        ([L.BatchNormalization()], []),
        ([L.Dense(4)], []),
        ([dense("first"), L.ReLU()], PAIR),  # the first alone
        ([boundary("second")], [("second", "input_quantizer")]),  # of two the nearer one
    ],
    ids=range(8),
)
def test_who_follows(between, found):
    model = network(*between)
    assert names(model) == found
    if any(layer.name == "first" for layer in between):
        ((_, quantizer),) = shared_ranges.followers(ModelGraph(model))
        assert quantizer is model.get_layer("first").activation_quantizer


def test_a_layer_of_a_float_input_follows_nothing():
    assert names(network(reader=dense("reader", None))) == []


def test_several_readers_follow_one_carrier_and_what_merges_follows_none():
    inputs = L.Input((4,))
    x = boundary("both")(inputs)
    left, right = dense("left")(x), dense("right")(L.ReLU()(x))
    joined = dense("behind")(L.Concatenate()([boundary("a")(left), boundary("b")(right)]))
    model = keras.Model(inputs, joined)
    found = shared_ranges.followers(ModelGraph(model))
    assert [leader.name for leader, _ in found] == ["both", "both"]
    assert [q for _, q in found] == [model.get_layer(name).activation_quantizer for name in ("left", "right")]


def test_linked_quantizers_move_together_and_once():
    model = network(L.ReLU())
    leader, reader = model.get_layer("boundary"), model.get_layer("reader").activation_quantizer
    leader.range.assign([3.0, 1.0])
    for _ in range(2):  # linking again changes nothing
        shared_ranges.link(ModelGraph(model))
    np.testing.assert_array_equal(reader.range, [3, 1])
    assert reader.follows and not leader.follows and len(leader._followers) == 1
    # One step: the average of weight 1 gets 1 % of an amax of 13 and is 3.1.
    model(np.float32([[-13, 1, 2, 3]]), training=True)
    np.testing.assert_allclose(leader.range, [3.1, 1], rtol=1e-6)
    np.testing.assert_array_equal(reader.range, leader.range)


@pytest.mark.parametrize("kind", shared_ranges.KINDS)
def test_networks_from_a_config_are_linked(kind):
    plain = (
        network() if kind is shared_ranges.BoundaryModel else keras.Sequential([L.Input((4,)), boundary(), dense("r")])
    )
    assert shared_ranges.has_boundary_quantizers(ModelGraph(plain))
    assert not shared_ranges.followers(ModelGraph(plain))[0][1].follows
    made = kind.from_config(plain.get_config())
    assert type(made) is kind
    assert shared_ranges.followers(ModelGraph(made))[0][1].follows


def test_a_network_without_carriers():
    model = keras.Sequential([L.Input((4,)), dense("only")])
    assert not shared_ranges.has_boundary_quantizers(ModelGraph(model))
    assert shared_ranges.followers(ModelGraph(model)) == []
