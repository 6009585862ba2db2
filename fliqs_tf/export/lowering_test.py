"""Deployed models as steps: what is folded and fused, by hand."""

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.export import lowering, lowering_kernels
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantizers import ActivationQuantizer

L = keras.layers


def quantized(layer, weights="INT8", activations="INT8", amax=1.0):
    made = fliqs_tf.Quantized(layer, [weights], activations and [activations], name=layer.name)
    for quantizer in made.activation_quantizers:
        quantizer.range.assign([amax, 1.0])
    return made


def network(*layers, shape=(4, 4, 2)):
    x = inputs = L.Input(shape, name="x")
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def steps(*layers, shape=(4, 4, 2)):
    return lowering.steps(ModelGraph(network(*layers, shape=shape))).steps


def said(found):
    return [(s.kind, s.path, s.activation) for s in found]


def norm(gamma, beta, mean, variance, name="norm"):
    made = L.BatchNormalization(epsilon=0.0, name=name)
    made.build((None, 4, 4, len(gamma)))
    made.set_weights([np.array(v, np.float32) for v in (gamma, beta, mean, variance)])
    return made


# ---- batch normalization by hand: gain = gamma / sqrt(variance), offset = beta - mean * gain

NORM = ([3.0, -4.0, 0.0], [1.0, 2.0, 3.0], [2.0, -1.0, 7.0], [9.0, 4.0, 1.0])
GAIN, OFFSET = [1, -2, 0], [-1, 0, 3]


def pointwise():
    """Largest magnitudes 127, 254 and 63.5: scales 1, 2 and 0.5."""
    layer = L.Conv2D(3, 1, name="conv")
    layer.build((None, 4, 4, 2))
    layer.set_weights([np.float32([[127, -254, 63.5], [10, 20.4, 7.2]]).reshape(1, 1, 2, 3), np.float32([5, 6, 7])])
    return layer


def test_a_norm_alone_is_gain_and_offset():
    # Epsilon 0 in tests only: Keras adds it to the variance.
    (step,) = steps(norm(*NORM), shape=(4, 4, 3))
    assert said([step]) == [("affine", "norm", "linear")]
    np.testing.assert_allclose(step.options["gain"], GAIN, rtol=1e-12)
    np.testing.assert_allclose(step.options["offset"], OFFSET, rtol=1e-12)


def test_epsilon_counts():
    layer = L.BatchNormalization(epsilon=3.0, scale=False, center=False, name="norm")
    layer.build((None, 4, 4, 2))
    layer.set_weights([np.float32([1, 2]), np.float32([1, 13])])
    (step,) = steps(layer)
    np.testing.assert_allclose(step.options["gain"], [0.5, 0.25])
    np.testing.assert_allclose(step.options["offset"], [-0.5, -0.5])


def test_a_norm_goes_into_scales_signs_and_biases():
    model = network(quantized(pointwise()), norm(*NORM))
    codes, linear = lowering.steps(ModelGraph(model)).steps
    assert said([codes, linear]) == [("quantize", "conv", "linear"), ("linear", "conv", "linear")]
    # 20.4 / 2 is 10.2, 7.2 / 0.5 is 14.4; the sign of channel 1 turns, channel 2 is off.
    np.testing.assert_array_equal(linear.linear.codes.reshape(2, 3), [[127, 127, 0], [10, -10, 0]])
    np.testing.assert_allclose(linear.linear.scale, [1 * 1, 2 * 2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(linear.linear.bias, [5 * 1 - 1, 6 * -2 + 0, 3], rtol=1e-6)
    assert linear.shift is model.get_layer("norm").beta  # what a bias is moved by
    assert linear.last == ("norm", 0)
    assert linear.output == lowering.steps(ModelGraph(model)).outputs[0]


def test_two_norms_become_one():
    """(x - 1) twice as large plus 4, in turn halved: x + 1."""
    first = norm([2.0, 2.0], [4.0, 4.0], [1.0, 1.0], [1.0, 1.0], "first")
    second = norm([1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [4.0, 4.0], "second")
    (step,) = steps(first, second)
    np.testing.assert_allclose(step.options["gain"], [1, 1])
    np.testing.assert_allclose(step.options["offset"], [1, 1])
    assert step.last == ("second", 0)


def test_a_norm_of_two_readers_stays_as_it_is():
    x = L.Input((4, 4, 2))
    y = quantized(pointwise())(x)
    model = keras.Model(x, [norm(*NORM)(y), L.ReLU(name="act")(y)])
    assert said(lowering.steps(ModelGraph(model)).steps) == [
        ("quantize", "conv", "linear"),
        ("linear", "conv", "linear"),
        ("affine", "norm", "linear"),
        ("activation", "act", "linear"),
    ]


def test_and_one_behind_an_output_too():
    x = L.Input((4, 4, 2))
    y = quantized(pointwise())(x)
    model = keras.Model(x, [y, norm(*NORM)(y)])
    assert said(lowering.steps(ModelGraph(model)).steps)[1:] == [
        ("linear", "conv", "linear"),
        ("affine", "norm", "linear"),
    ]


# ---- what is fused


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([L.ReLU(name="a")], [("linear", "conv", "relu")]),
        ([L.ReLU(6.0, name="a")], [("linear", "conv", "relu6")]),
        ([L.Dropout(0.5), L.ReLU(name="a")], [("linear", "conv", "relu")]),
        ([norm(*NORM), L.ReLU(name="a")], [("linear", "conv", "relu")]),
        # What follows a ReLU is not folded through it.
        ([L.ReLU(name="a"), norm(*NORM)], [("linear", "conv", "relu"), ("affine", "norm", "linear")]),
        ([L.ReLU(name="a"), L.ReLU(6.0, name="b")], [("linear", "conv", "relu"), ("activation", "b", "linear")]),
        ([L.Activation("tanh", name="a")], [("linear", "conv", "linear"), ("activation", "a", "linear")]),
        ([L.MaxPooling2D(2, name="a"), L.ReLU(name="b")],
         [("linear", "conv", "linear"), ("max_pool", "a", "linear"), ("activation", "b", "linear")]),
    ],
    ids=range(8),
)  # fmt: skip
def test_what_is_fused(layers, found):
    assert said(steps(quantized(pointwise()), *layers)) == [("quantize", "conv", "linear"), *found]


def test_a_relu_goes_into_an_addition_but_not_into_a_product():
    product = [("multiply", "a", "linear"), ("activation", "r", "linear")]
    for layer, found in ((L.Add(name="a"), [("add", "a", "relu")]), (L.Multiply(name="a"), product)):
        x = L.Input((4,))
        model = keras.Model(x, L.ReLU(name="r")(layer([x, x])))
        assert said(lowering.steps(ModelGraph(model)).steps) == found


def test_layers_that_do_nothing_are_steps_only_where_they_make_an_output():
    assert said(steps(L.Dropout(0.5, name="a"), L.ReLU(name="b"))) == [("activation", "b", "linear")]
    assert said(steps(L.ReLU(name="b"), L.Dropout(0.5, name="a"))) == [
        ("activation", "b", "linear"),
        ("identity", "a", "linear"),
    ]


def test_an_activation_that_kernels_do_not_do_is_a_step_of_its_own():
    dense = quantized(L.Dense(3, activation="softmax", name="fc"))
    _, linear, activation = steps(dense, shape=(4,))
    assert said([linear, activation]) == [("linear", "fc", "linear"), ("activation", "fc", "linear")]
    assert activation.options == {"function": "softmax"}
    assert activation.inputs == (linear.output,) and linear.last is None and activation.last == ("fc", 0)


def test_a_separable_convolution_is_two_kernels_with_codes_between():
    layer = quantized(L.SeparableConv2D(3, 2, strides=2, depth_multiplier=2, activation="relu", name="sep"))
    found = steps(layer)
    assert said(found) == [
        ("quantize", "sep", "linear"),
        ("linear", "sep", "linear"),
        ("quantize", "sep", "linear"),
        ("linear", "sep", "relu"),
    ]
    first, second = found[1], found[3]
    assert (first.linear.operation, second.linear.operation) == ("depthwise", "conv")
    assert (first.shapes, second.shapes) == (((4, 4, 2), (2, 2, 4)), ((2, 2, 4), (2, 2, 3)))
    assert first.options == {"strides": (2, 2), "padding": "valid", "dilation": (1, 1)}
    assert second.options == {"strides": (1, 1), "padding": "valid", "dilation": (1, 1)}
    assert first.linear.codes.shape == (2, 2, 4) and np.all(first.linear.bias == 0)
    assert [a.output for a in found[:3]] == [b.inputs[0] for b in found[1:]]


def test_values_of_a_lower_rank_get_axes_behind_that_of_examples():
    image, vector = L.Input((4, 4, 2)), L.Input((2,))
    model = keras.Model([image, vector], L.Multiply(name="a")([vector, image]))
    reshape, product = lowering.steps(ModelGraph(model)).steps
    assert (reshape.kind, reshape.inputs, reshape.shapes) == ("reshape", (1,), ((2,), (1, 1, 2)))
    assert product.inputs == (reshape.output, 0)
    assert product.shapes == ((1, 1, 2), (4, 4, 2), (4, 4, 2))


# ---- formats


def test_grids_of_inputs():
    layer = quantized(pointwise(), "INT4", "INT4", amax=14.0)
    layer.activation_quantizer.clip = 0.5
    grid = lowering_kernels.activation_scale_of(layer.activation_quantizer, "conv")
    assert (grid.format.name, grid.amax, grid.scale) == ("INT4", 7, 1)


def test_float_weights_have_values_and_no_codes():
    codes, linear = steps(quantized(pointwise(), "BF16", "BF16"))
    assert codes.options["scale"].format.name == linear.linear.format.name == "BF16"
    assert linear.linear.codes is None
    np.testing.assert_array_equal(linear.linear.values.reshape(2, 3)[0], [127, -254, 63.5])
    np.testing.assert_array_equal(linear.linear.values.reshape(2, 3)[1], [10, 20.375, 7.1875])  # of eight bits
    (plain,) = steps(pointwise())
    np.testing.assert_array_equal(plain.linear.values.reshape(2, 3)[1], np.float32([10, 20.4, 7.2]))


def test_a_range_that_saw_nothing_and_formats_without_kernels_are_refused():
    with pytest.raises(ValueError, match="The input of layer 'conv' has no range yet"):
        layer = quantized(pointwise())
        layer.activation_quantizer.range.assign([0, 0])
        steps(layer)
    with pytest.raises(ValueError, match="Layer 'conv' has the format E4M3, for which TFLite has no kernels"):
        steps(quantized(pointwise(), "E4M3"))
    with pytest.raises(ValueError, match="Layer 'conv' may still take 2 formats"):
        steps(fliqs_tf.Quantized(pointwise(), ["INT4", "INT8"], ["INT4", "INT8"], name="conv"))


# ---- layers that have no form


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: L.Conv2D(2, 1, name="odd"), ""),
        (lambda: L.Conv2D(2, 1, groups=2, name="odd"), "grouped convolutions"),
        (lambda: L.Conv2DTranspose(2, 1, name="odd"), "of class Conv2DTranspose cannot be exported"),
        (lambda: L.MaxPooling2D(name="odd"), ""),
        (lambda: L.Permute((2, 1, 3), name="odd"), "of class Permute cannot be exported"),
        (lambda: L.LSTM(3, name="odd"), "of class LSTM cannot be exported"),
        (lambda: ActivationQuantizer(["INT8"], name="odd"), ""),
        (lambda: L.EinsumDense("abc,cd->abd", (None, 2), name="odd"), ""),
        (lambda: L.EinsumDense("abc,bd->acd", (None, 2), name="odd"), "no matrix product over the last axis"),
        (lambda: L.EinsumDense("abc,dc->abd", (None, 2), name="odd"), "no matrix product over the last axis"),
    ],
    ids=range(10),
)
def test_why_a_class_has_no_form(layer, why):
    found = lowering.why_not("net/odd", layer())
    assert why in found and bool(why) == bool(found)
    assert not why or "Layer 'net/odd'" in found


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: L.BatchNormalization(axis=1, name="odd"), "it normalizes axis 1, not the last one"),
        (lambda: L.Softmax(axis=1, name="odd"), "softmax over axis 1, not the last one"),
        (lambda: L.Activation("gelu", name="odd"), "no kernel for the activation 'gelu'"),
        (lambda: L.Dense(2, activation="gelu", name="odd"), "no kernel for the activation 'gelu'"),
        (lambda: quantized(L.Dense(2, activation="gelu", name="odd")), "no kernel for the activation 'gelu'"),
        (lambda: L.MaxPooling2D(2, data_format="channels_first", name="odd"), "channels_first"),
        (lambda: L.UpSampling2D(2, interpolation="bilinear", name="odd"), "interpolation 'bilinear'"),
    ],
    ids=range(7),
)
def test_layers_are_checked_before_any_training(layer, message):
    with pytest.raises(ValueError, match=rf"Layer 'odd' of class \w+ cannot be exported to TFLite: .*{message}"):
        lowering.check_layers(ModelGraph(network(layer())))


def test_a_rescaling_needs_to_know_its_channels():
    x = L.Input((4, None))
    with pytest.raises(ValueError, match="Layer 'odd' of class Rescaling .*: its number of channels is open"):
        lowering.check_layers(ModelGraph(keras.Model(x, L.Rescaling(2.0, name="odd")(x))))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((4,), "int32", "'x' is int32; TFLite export takes float32"), ((None,), "float32", "'x' has the open shape")],
)
def test_inputs_are_checked_too(shape, dtype, message):
    graph = ModelGraph(keras.Model(x := L.Input(shape, dtype=dtype, name="x"), L.ReLU()(x)))
    for reads in (lowering.check_layers, lowering.steps):
        with pytest.raises(ValueError, match=message):
            reads(graph)


def test_and_layers_of_several_inputs():
    x = L.Input((4, 2))
    joined, attended = L.Concatenate(axis=0, name="odd")([x, x]), L.MultiHeadAttention(1, 2, name="odd")(x, x)
    for y, message in (
        (joined, "Concatenate .*: it joins along the batch axis"),
        (attended, "MultiHeadAttention cannot be"),
    ):
        with pytest.raises(ValueError, match=f"Layer 'odd' of class {message}"):
            lowering.check_layers(ModelGraph(keras.Model(x, y)))
