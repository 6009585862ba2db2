"""Which layers rounding may change places with."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.graph import commuting
from fliqs_tf.numerics.rounding import fake_quant

L = keras.layers


def relu(x):
    """A function of one's own under the name of one of Keras'."""
    return tf.nn.relu(x)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: L.Dense(2), "linear"),
        (lambda: L.Dense(2, activation="relu"), "relu"),
        (lambda: fliqs_tf.Quantized(L.Dense(2, activation="tanh"), ["INT8"], ["INT8"]), "tanh"),
        (lambda: L.Flatten(), "linear"),
        (lambda: L.Activation("softmax"), "softmax"),
        (lambda: L.Activation(relu), "relu_of_its_user"),
        (lambda: L.ReLU(), "relu"),
        (lambda: L.ReLU(6), "relu6"),
        (lambda: L.ReLU(np.float32(6)), "relu6"),
        (lambda: L.ReLU(5.0), "ReLU(5.0, 0.0, 0.0)"),
        (lambda: L.ReLU(negative_slope=0.5), "ReLU(None, 0.5, 0.0)"),
        (lambda: L.ReLU(6.0, threshold=1.0), "ReLU(6.0, 0.0, 1.0)"),
    ],
    ids=range(12),
)
def test_names_of_activations(layer, name):
    assert commuting.activation(layer()) == name


@pytest.mark.parametrize(
    ("layer", "is_one"),
    [
        (lambda: L.ReLU(), True),
        (lambda: L.ReLU(6.0), True),
        (lambda: L.ReLU(5.0), False),
        (lambda: L.Activation("relu6" if hasattr(keras.activations, "relu6") else "relu"), True),
        (lambda: L.Activation("tanh"), False),
        (lambda: L.Dense(2, activation="relu"), False),  # it is more than that
    ],
    ids=range(6),
)
def test_layers_that_are_nothing_but_a_relu(layer, is_one):
    assert commuting.is_activation(layer()) is is_one
    assert commuting.is_quantization_invariant(layer()) is is_one


MOVING = {
    "max": lambda: L.MaxPooling2D(2, padding="same"),
    "global max": lambda: L.GlobalMaxPooling2D(),
    "flatten": lambda: L.Flatten(),
    "reshape": lambda: L.Reshape((25, 3)),
    "padding": lambda: L.ZeroPadding2D(1),
    "up": lambda: L.UpSampling2D(2),
    "relu": lambda: L.ReLU(),
    "dropout": lambda: L.Dropout(0.5),
    "noise": lambda: L.GaussianNoise(0.5),
}


@pytest.mark.parametrize("make", MOVING.values(), ids=MOVING)
def test_rounding_before_and_after_is_the_same(make):
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
    layer = make()
    assert commuting.is_quantization_invariant(layer)
    before, after = layer(fake_quant(x, "INT4", amax=2.0)), fake_quant(layer(x), "INT4", amax=2.0)
    np.testing.assert_array_equal(before, after)


def test_and_of_concatenation():
    assert commuting.is_quantization_invariant(L.Concatenate())


@pytest.mark.parametrize(
    "make", [lambda: L.AveragePooling2D(2), lambda: L.Activation("tanh"), lambda: L.Rescaling(0.3)]
)
def test_rounding_before_and_after_a_layer_that_computes_is_not(make):
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
    layer = make()
    assert not commuting.is_quantization_invariant(layer)
    before, after = layer(fake_quant(x, "INT4", amax=2.0)), fake_quant(layer(x), "INT4", amax=2.0)
    assert np.any(before != after)


@pytest.mark.parametrize("make", [lambda: L.Add(), lambda: L.BatchNormalization(), lambda: L.Dense(2)])
def test_what_else_computes(make):
    assert not commuting.is_quantization_invariant(make())
