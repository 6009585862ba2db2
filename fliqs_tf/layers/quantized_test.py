"""Quantized layers against the float layer, computed by hand with fake_quant."""

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.graph import layer_types
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.numerics.rounding import fake_quant

L = keras.layers

# name: (layer, input shape, [(kernel attribute, axes with a scale each)])
LAYERS = {
    "Dense": (lambda **k: L.Dense(5, activation="relu", **k), (4,), -1),
    "Dense on a sequence": (lambda **k: L.Dense(5, **k), (7, 4), -1),
    "Conv1D": (lambda **k: L.Conv1D(5, 3, padding="causal", **k), (7, 4), -1),
    "Conv2D": (lambda **k: L.Conv2D(6, 3, strides=2, groups=2, padding="same", **k), (8, 8, 4), -1),
    "Conv2D dilated": (lambda **k: L.Conv2D(6, 3, dilation_rate=2, use_bias=False, **k), (8, 8, 4), -1),
    "DepthwiseConv2D": (lambda **k: L.DepthwiseConv2D(3, depth_multiplier=2, **k), (8, 8, 4), (-2, -1)),
    "Conv2DTranspose": (lambda **k: L.Conv2DTranspose(5, 3, strides=2, **k), (4, 4, 3), -2),
    "EinsumDense": (lambda **k: L.EinsumDense("abc,cde->abde", (7, 2, 3), bias_axes="de", **k), (7, 4), (1, 2)),
    "EinsumDense of heads": (lambda **k: L.EinsumDense("abcd,cde->abe", (7, 5), bias_axes="e", **k), (7, 2, 3), 2),
}
SEPARABLE = {
    "same": lambda **k: L.SeparableConv2D(6, 3, padding="same", depth_multiplier=2, **k),
    "strided": lambda **k: L.SeparableConv2D(6, 3, strides=2, activation="relu", use_bias=False, **k),
    "dilated": lambda **k: L.SeparableConv2D(6, 3, dilation_rate=2, **k),
}


def data(shape, seed=0, batch=3):
    return tf.constant(np.random.default_rng(seed).standard_normal((batch, *shape)), tf.float32)


def built(make, shape, **options):
    layer = make(**options)
    layer(data(shape))
    rng = np.random.default_rng(1)
    layer.set_weights([rng.standard_normal(w.shape).astype(w.dtype) for w in layer.get_weights()])
    return layer


def twin(make, layer, shape, **options):
    """Another layer of the same weights."""
    copy = built(make, shape, **options)
    copy.set_weights(layer.get_weights())
    return copy


def quantize_kernel(layer, fmt, axis):
    (kernel,) = layer_types.kernels(layer)
    variable = getattr(layer, kernel.attribute)
    variable.assign(fake_quant(tf.convert_to_tensor(variable), fmt, axis))


# ---- outputs


@pytest.mark.parametrize("make, shape, axis", LAYERS.values(), ids=LAYERS)
def test_fp32_is_the_float_layer_to_the_bit(make, shape, axis):
    layer, x = built(make, shape), data(shape)
    float_output = layer(x).numpy()
    np.testing.assert_array_equal(Quantized(layer, ["FP32"], ["FP32"])(x), float_output)
    np.testing.assert_array_equal(Quantized(layer, ["FP32"], None)(x, training=True), float_output)


@pytest.mark.parametrize("fmt", ["INT4", "E2M1"])
@pytest.mark.parametrize("make, shape, axis", LAYERS.values(), ids=LAYERS)
def test_a_format_is_the_float_layer_of_quantized_kernel_and_input(make, shape, axis, fmt):
    layer, x = built(make, shape), data(shape)
    by_hand = twin(make, layer, shape)
    quantize_kernel(by_hand, fmt, axis)
    np.testing.assert_array_equal(Quantized(layer, [fmt], [fmt])(x), by_hand(fake_quant(x, fmt)))
    np.testing.assert_array_equal(Quantized(layer, [fmt], None)(x), by_hand(x))
    np.testing.assert_array_equal(Quantized(layer, [fmt], ["INT8"])(x), by_hand(fake_quant(x, "INT8")))


@pytest.mark.parametrize("make", SEPARABLE.values(), ids=SEPARABLE)
def test_fp32_is_the_separable_convolution_to_the_bit(make):
    shape = (8, 8, 3)
    layer, x = built(make, shape), data(shape)
    float_output = layer(x).numpy()
    np.testing.assert_array_equal(Quantized(layer, ["FP32"], ["FP32"])(x), float_output)
    np.testing.assert_array_equal(Quantized(layer, ["FP32"], None)(x), float_output)


def test_a_separable_convolution_quantizes_its_input_both_kernels_and_what_is_between():
    shape = (8, 8, 3)
    layer, x = built(SEPARABLE["same"], shape), data(shape)
    depthwise, pointwise, bias = (tf.constant(w) for w in layer.get_weights())
    middle = tf.nn.depthwise_conv2d(
        fake_quant(x, "INT4"), fake_quant(depthwise, "INT4", (-2, -1)), (1, 1, 1, 1), "SAME"
    )
    by_hand = tf.nn.conv2d(fake_quant(middle, "INT4"), fake_quant(pointwise, "INT4", -1), 1, "VALID") + bias
    np.testing.assert_array_equal(Quantized(layer, ["INT4"], ["INT4"])(x), by_hand)


def test_the_weights_of_the_layer_stay_in_float():
    make, shape, _ = LAYERS["Dense"]
    layer = built(make, shape)
    before = layer.get_weights()
    quantized = Quantized(layer, ["INT2"], ["INT2"])
    quantized(data(shape), training=True)
    for a, b in zip(layer.get_weights(), before):
        np.testing.assert_array_equal(a, b)
    assert [v.shape for v in quantized.trainable_variables] == [w.shape for w in before]


def test_the_space_is_read_at_every_call():
    make, shape, axis = LAYERS["Dense"]
    layer, x = built(make, shape), data(shape)
    quantized = Quantized(layer, ["INT2", "INT4"], ["INT4", "INT8"], "of weights", "of input")
    for i, fmt in enumerate(["INT2", "INT4"]):
        quantized.weight_quantizers[0].choice.assign(i)
        by_hand = twin(make, layer, shape)
        quantize_kernel(by_hand, fmt, axis)
        np.testing.assert_array_equal(quantized(x), by_hand(fake_quant(x, "INT8")))


@pytest.mark.parametrize("spaces", [(["INT4", "INT8"], ["INT8"]), (["INT4"], ["INT4", "INT8"]), (["INT4"], ["INT8"])])
def test_one_side_may_be_fixed(spaces):
    make, shape, _ = LAYERS["Dense"]
    layer, x = built(make, shape), data(shape)
    widest = [[space[-1]] for space in spaces]
    np.testing.assert_array_equal(Quantized(layer, *spaces)(x), Quantized(layer, *widest)(x))


# ---- training


def test_gradients_are_those_of_the_quantized_product():
    layer = built(lambda **k: L.Dense(2, use_bias=False, **k), (3,))
    x = data((3,))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = Quantized(layer, ["INT4"], ["INT8"])(x, training=True)
    kernel = tf.convert_to_tensor(layer.kernel)
    of_x, of_kernel = tape.gradient(y, [x, layer.trainable_weights[0]])
    ones = tf.ones((3, 2))
    np.testing.assert_allclose(of_x, ones @ tf.transpose(fake_quant(kernel, "INT4", -1)), rtol=1e-6)
    np.testing.assert_allclose(of_kernel, tf.transpose(fake_quant(x, "INT8")) @ ones, rtol=1e-5)


def test_ranges_move_in_training_only():
    layer = built(SEPARABLE["same"], (8, 8, 3))
    quantized = Quantized(layer, ["INT4"], ["INT4"])
    quantized(data((8, 8, 3)))
    assert [q.range.numpy().tolist() for q in quantized.activation_quantizers] == [[0, 0], [0, 0]]
    x = data((8, 8, 3))
    quantized(x, training=True)
    of_input, of_middle = (float(q(tf.constant([1e30]))[0]) for q in quantized.activation_quantizers)
    assert of_input == pytest.approx(np.abs(x).max())
    middle = tf.nn.depthwise_conv2d(
        fake_quant(x, "INT4"), fake_quant(layer.depthwise_kernel, "INT4", (-2, -1)), (1, 1, 1, 1), "SAME"
    )
    assert of_middle == pytest.approx(np.abs(middle).max())


@pytest.mark.parametrize("training", [None, False])
def test_without_training_nothing_moves(training):
    quantized = Quantized(built(LAYERS["Dense"][0], (4,)), ["INT4"], ["INT4"])
    quantized(data((4,)), training=training)
    assert quantized.activation_quantizer.range.numpy().tolist() == [0, 0]


def test_regularizers_keep_their_part():
    """Of the kernel as it is trained, in float, and of the output."""
    options = {"kernel_regularizer": keras.regularizers.L2(0.5), "activity_regularizer": keras.regularizers.L1(0.25)}
    layer, x = built(LAYERS["Dense"][0], (4,), **options), data((4,))
    quantized = Quantized(layer, ["INT4"], ["INT4"])
    y = quantized(x)
    of_kernel = 0.5 * np.sum(layer.get_weights()[0] ** 2)
    of_output = 0.25 * np.sum(np.abs(y)) / 3  # Keras means over the batch
    assert sorted(float(loss) for loss in quantized.losses) == pytest.approx(sorted([of_kernel, of_output]), rel=1e-5)


# ---- mixed precision, masks, shapes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["Dense", "Conv2D"])
def test_mixed_precision(name, dtype):
    make, shape, axis = LAYERS[name]
    policy = keras.mixed_precision.Policy(f"mixed_{dtype}")
    layer, x = built(make, shape, dtype=policy), data(shape)
    quantized = Quantized(layer, ["INT4"], ["INT8"], dtype=policy)
    y = quantized(x, training=True)
    assert y.dtype == dtype
    by_hand = twin(make, layer, shape, dtype=policy)
    kernel = tf.cast(tf.convert_to_tensor(by_hand.trainable_weights[0]), tf.float32)
    by_hand.trainable_weights[0].assign(fake_quant(kernel, "INT4", axis))
    low = tf.cast(x, dtype)
    of_inputs = fake_quant(tf.cast(low, tf.float32), "INT8")
    precision = 2.0 ** (-7 if dtype == "bfloat16" else -10)
    np.testing.assert_allclose(
        tf.cast(y, tf.float32), tf.cast(by_hand(of_inputs), tf.float32), rtol=4 * precision, atol=20 * precision
    )
    assert all(v.dtype in ("float32", "int32", tf.float32) for v in quantized.variables)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_rounds_the_float32_weight_not_a_cast_of_it(dtype):
    """1.499 is nearer to 1; float16 leaves it so, bfloat16 makes it 1.5, which would go to the even 2."""
    policy = keras.mixed_precision.Policy(f"mixed_{dtype}")
    layer = built(lambda **k: L.Dense(1, use_bias=False, **k), (2,), dtype=policy)
    layer.set_weights([np.array([[7.0], [1.499]], np.float32)])
    quantized = Quantized(layer, ["INT4"], None, dtype=policy)
    assert float(quantized(tf.constant([[0.0, 1.0]]))[0, 0]) == 1


def test_masks_pass():
    inputs = keras.Input((5,), dtype="int32")
    x = L.Embedding(10, 4, mask_zero=True)(inputs)
    layer = L.Dense(3)
    layer.build((None, 5, 4))
    x = Quantized(layer, ["INT4", "INT8"], ["INT4", "INT8"], name="fc")(x)
    pooled = L.GlobalAveragePooling1D()
    model = keras.Model(inputs, [x, pooled(x)])
    every, mean = model(tf.constant([[1, 2, 3, 0, 0]]))
    np.testing.assert_allclose(mean[0], tf.reduce_mean(every[0, :3], axis=0), rtol=1e-5)


@pytest.mark.parametrize("make, shape, axis", LAYERS.values(), ids=LAYERS)
def test_output_shape(make, shape, axis):
    layer = built(make, shape)
    expected = tuple(layer(data(shape)).shape)
    assert tuple(Quantized(layer, ["INT4"], ["INT4"]).compute_output_shape((3, *shape))) == expected


# ---- what is refused, saving


@pytest.mark.parametrize("make", [lambda: L.LSTM(3, name="rnn"), lambda: L.ReLU(name="rnn")])
def test_an_unknown_class_is_refused(make):
    layer = make()
    layer.build((None, 3, 4))
    with pytest.raises(ValueError, match=f"Layer 'rnn' of class {type(layer).__name__} cannot be .*Conv2DTranspose"):
        Quantized(layer, ["INT4"], ["INT4"])


@pytest.mark.parametrize("name", ["Dense", "Conv2D", "EinsumDense"])
@pytest.mark.parametrize("spaces", [(["INT4", "INT8"], ["INT4", "INT8"]), (["INT4"], ["E4M3"]), (["INT4"], None)])
def test_a_model_of_it_is_the_same_after_saving(tmp_path, name, spaces):
    make, shape, _ = LAYERS[name]
    inputs = keras.Input(shape)
    quantized = Quantized(make(name="inside"), *spaces, "of weights", "of input", name="outside")
    model = keras.Model(inputs, quantized(inputs))
    x = data(shape)
    model(x, training=True)
    if quantized.weight_quantizers[0].choice is not None:
        quantized.weight_quantizers[0].choice.assign(0)
    model.save(tmp_path / "model.keras")
    copy = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(copy(x), model(x))
    inner = copy.get_layer("outside")
    assert (inner.weight_decision, inner.activation_decision) == ("of weights", "of input")


# ---- inputs and layers of other dtypes


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "bool"])
def test_integers_are_quantized_as_the_floats_that_they_are(dtype):
    """Values of a format lie between integers: what is quantized is no integer any more."""
    layer = keras.layers.Dense(3)
    quantized = Quantized(layer, ["FP32"], ["INT4"])
    x = tf.cast([[1, 50, 100], [0, 77, 3]], dtype)
    result = quantized(x)
    expected = fake_quant(tf.cast(x, tf.float32), "INT4") @ tf.convert_to_tensor(layer.kernel)
    np.testing.assert_allclose(result, expected + tf.convert_to_tensor(layer.bias), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "make", [lambda d: keras.layers.Dense(3, dtype=d), lambda d: keras.layers.Embedding(4, 3, dtype=d)]
)
def test_layers_whose_weights_are_not_float32(dtype, make):
    layer = make(dtype)
    quantized = Quantized(layer, ["INT4"], ["FP32"], dtype=layer.dtype_policy)
    is_table = hasattr(layer, "input_dim")
    x = tf.constant([[1, 2, 3]]) if is_table else tf.cast([[0.5, -1.0, 2.0]], dtype)
    result = quantized(x)
    assert result.dtype == dtype
    weight = tf.cast(tf.convert_to_tensor(layer.weights[0]), tf.float32)
    rounded = tf.cast(fake_quant(weight, "INT4", 0 if is_table else -1), dtype)
    expected = tf.gather(rounded, x) if is_table else x @ rounded
    np.testing.assert_allclose(tf.cast(result, tf.float32), tf.cast(expected, tf.float32), rtol=1e-2, atol=1e-2)


def test_formats_may_be_iterators():
    layer = keras.layers.SeparableConv2D(2, 3)
    layer = Quantized(layer, (f for f in ["INT4", "INT8"]), iter(["INT8", "BF16"]))
    assert [q.space.names for q in layer.weight_quantizers] == [("INT4", "INT8")] * 2
    assert [q.space.names for q in layer.activation_quantizers] == [("INT8", "BF16")] * 2


@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_inputs_that_are_not_dense(kind):
    x = tf.sparse.eye(3) if kind == "sparse" else tf.ragged.constant([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    quantized = Quantized(keras.layers.Dense(2, name="fc"), ["INT4"], ["INT8"])
    quantized.build((None, 3))
    with pytest.raises(ValueError, match=f"'fc' has a {kind} input.*make it dense.*in float with the rule .'fc', None"):
        quantized.call(x)
