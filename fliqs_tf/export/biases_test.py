import numpy as np
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.export import biases, boundaries
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantizers import ActivationQuantizer

L = keras.layers


def quantized(layer, weights="INT8", activations="INT8", amax=127 / 4):
    """Its input has steps of 1 / 4."""
    made = fliqs_tf.Quantized(layer, [weights], [activations], name=layer.name)
    made.activation_quantizer.range.assign([amax, 1.0])
    return made


def conv(weights, bias):
    weights = np.float32(weights)
    layer = L.Conv2D(weights.shape[1], 1, name="conv")
    layer.build((None, 4, 4, 2))
    layer.set_weights([weights.reshape(1, 1, *weights.shape), np.float32(bias)])
    return layer


def network(*layers, shape=(4, 4, 2)):
    x = inputs = L.Input(shape)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def test_biases_are_moved_to_multiples_of_the_products_of_two_steps():
    """Input steps of 1 / 4, weight steps 1, 2, 1 / 2: products of 1/4, 1/2, 1/8."""
    layer = quantized(conv([[127, -254, 63.5], [10, 20, 7]], [0.3, 0.3, 0.3]))
    model = network(layer)
    biases.round_to_int32(ModelGraph(model))
    np.testing.assert_allclose(layer.layer.bias, [0.25, 0.5, 0.25], rtol=1e-6)
    biases.round_to_int32(ModelGraph(model))
    np.testing.assert_allclose(layer.layer.bias, [0.25, 0.5, 0.25], rtol=1e-6)


def test_behind_a_norm_its_beta_moves():
    """Gain 0.5 and -0.5: products of 1/8 and 1/4. The whole bias is 0.5 * b + beta."""
    layer, norm = conv([[127, -254], [10, 20]], [1, 1]), L.BatchNormalization(epsilon=0.0, name="norm")
    norm.build((None, 4, 4, 2))
    norm.set_weights([np.float32(v) for v in ([1.0, -1.0], [0.2, 0.2], [0.0, 0.0], [4.0, 4.0])])
    model = network(quantized(layer), norm)
    biases.round_to_int32(ModelGraph(model))
    np.testing.assert_array_equal(layer.bias, [1, 1])
    # 0.5 + 0.2 is 5.6 eighths: 6; -0.5 + 0.2 is -1.2 quarters: -1.
    np.testing.assert_allclose(norm.beta, [0.75 - 0.5, -0.25 + 0.5], rtol=1e-6)


def test_a_layer_at_two_scales_keeps_its_bias():
    x = L.Input((4,))
    first, second = ActivationQuantizer(["INT8"], name="first"), ActivationQuantizer(["INT8"], name="second")
    first.range.assign([127 / 4, 1])
    second.range.assign([127 / 8, 1])
    shared = fliqs_tf.Quantized(L.Dense(4), ["INT8"], None, name="shared")
    model = keras.Model(x, shared(second(shared(first(x)))))
    shared.layer.set_weights([127 * np.eye(4), np.full(4, 0.4)])
    biases.round_to_int32(ModelGraph(model))
    np.testing.assert_array_equal(shared.layer.bias, np.float32([0.4] * 4))
    second.range.assign([127 / 4, 1])
    biases.round_to_int32(ModelGraph(model))
    np.testing.assert_allclose(shared.layer.bias, [0.5] * 4)


def test_inputs_in_float_formats_are_rounded_no_more():
    layer = quantized(L.Dense(1, use_bias=False, name="fc"), "FP32", "BF16")
    model = network(layer, shape=(1,))
    layer.layer.set_weights([np.ones((1, 1))])
    x = tf.constant([[1 + 2.0**-12]])
    assert model(x) == 1
    biases.round_to_int32(ModelGraph(model))
    assert model(x) == x
    assert not boundaries.is_integer(layer.activation_quantizer.space.formats[0])
