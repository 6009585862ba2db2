"""ONNX files against Keras: weights and inputs to the bit, networks but for the order of float32 sums."""

import json
import os

import numpy as np
import onnx as onnx_library
import onnxruntime
import pytest
import tensorflow as tf
from onnx.reference import ReferenceEvaluator

import fliqs_tf
from fliqs_tf import export
from fliqs_tf._keras import keras
from fliqs_tf.numerics.formats import Format
from fliqs_tf.numerics.rounding import fake_quant

L = keras.layers
LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
INPUT_FORMATS = [
    "INT2",
    "INT3",
    "INT4",
    "INT5",
    "INT6",
    "INT7",
    "INT8",
    "INT11",
    "INT16",
    "E4M3",
    "E5M2",
    "BF16",
    "FP32",
]
WEIGHT_FORMATS = [*INPUT_FORMATS, "E2M3", "E3M2", "E4M1"]


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    keras.utils.set_random_seed(0)


def run(path, *inputs, level=LEVELS[1]):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: np.asarray(x) for i, x in zip(session.get_inputs(), inputs)})


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomized(model):
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "row" not in weight.name and "range" not in weight.name:
            size = max(1, int(np.prod(weight.shape[:-1])))
            weight.assign(rng.uniform(0.5, 1.5, weight.shape) * rng.choice([-1, 1], weight.shape) / size**0.5)
    for weight in model.weights:
        if "variance" in weight.name:
            weight.assign(np.abs(weight) + 0.5)
    return model


def quantized_dense(weight_format, input_format, units=6):
    inputs = keras.Input((units,), name="x")
    layer = fliqs_tf.Quantized(L.Dense(units, name="fc"), [weight_format], input_format and [input_format], name="fc")
    return keras.Model(inputs, layer(inputs), name="net"), layer


# ---- formats, to the bit


def hard_inputs(fmt):
    """Values of the format, middles of two, what is next to these, what is beyond the range, noise, times 0.1."""
    values = np.concatenate([noise(60) * 2, [0.0]])
    if fmt.name not in ("FP32", "BF16"):
        grid = fmt.values()[:: max(1, len(fmt.values()) // 60)]
        middles = (grid[1:] + grid[:-1]) / 2
        values = np.concatenate(
            [grid, middles, middles * (1 + 1e-6), 1.5 * grid[-1:], -1.5 * grid[-1:], -1.01 * grid[-1:]]
        )
    values = (values * np.float32(0.1)).astype(np.float32)
    return np.resize(values, (-(-len(values) // 6), 6))


@pytest.mark.parametrize("fmt", INPUT_FORMATS)
@pytest.mark.parametrize("level", LEVELS, ids=["plain", "optimized"])
def test_inputs_are_rounded_to_the_bit(tmp_path, fmt, level):
    """An identity for weights: what comes out is the quantized input."""
    model, layer = quantized_dense("FP32", fmt)
    layer.quantized_layer.set_weights([np.eye(6), np.zeros(6)])
    amax = np.float32(0.1) * np.float32(Format(fmt).max if Format(fmt).is_scaled else 1)
    layer.activation_quantizer.range.assign([amax, 1.0])
    x = hard_inputs(Format(fmt))
    export.onnx(model, tmp_path / "m.onnx")
    (found,) = run(tmp_path / "m.onnx", x, level=level)
    np.testing.assert_array_equal(found, model(x))
    np.testing.assert_array_equal(found, fake_quant(x, fmt, amax=amax))


@pytest.mark.parametrize("fmt", ["INT7", "INT8"])
def test_inputs_behind_a_relu_are_rounded_to_the_bit(tmp_path, fmt):
    inputs = keras.Input((6,))
    layer = fliqs_tf.Quantized(L.Dense(6), ["FP32"], [fmt], name="fc")
    model = keras.Model(inputs, layer(L.ReLU()(inputs)))
    layer.quantized_layer.set_weights([np.eye(6), np.zeros(6)])
    layer.activation_quantizer.range.assign([1.0, 1.0])
    x = hard_inputs(Format(fmt))
    export.onnx(model, tmp_path / "m.onnx")
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", x)[0], model(x))
    clips = [node for node in onnx_library.load(tmp_path / "m.onnx").graph.node if node.op_type == "Clip"]
    assert len(clips) == (fmt == "INT7")  # INT8 ends where ONNX's does, from 0 up


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS)
def test_weights_are_those_of_the_layer_to_the_bit(tmp_path, fmt):
    """An identity for input: what comes out are the quantized weights."""
    model, layer = quantized_dense(fmt, None)
    kernel = noise(6, 6) * np.array([0, 1e-30, 1, 1, 3, 1e20], np.float32)
    layer.quantized_layer.set_weights([kernel, np.zeros(6)])
    export.onnx(model, tmp_path / "m.onnx")
    for level in LEVELS:
        (found,) = run(tmp_path / "m.onnx", np.eye(6, dtype=np.float32), level=level)
        np.testing.assert_array_equal(found, fake_quant(kernel, fmt, -1))


def test_e2m1_has_onnxs_own_type_and_is_right_by_its_reference(tmp_path):
    model, layer = quantized_dense("E2M1", "E2M1")
    layer.activation_quantizer.range.assign([0.6, 1.0])
    randomized(model)
    export.onnx(model, tmp_path / "m.onnx")
    x = hard_inputs(Format("E2M1"))
    made = onnx_library.load(tmp_path / "m.onnx")
    (stored,) = [t for t in made.graph.initializer if t.data_type == onnx_library.TensorProto.FLOAT4E2M1]
    scale = np.abs(layer.quantized_layer.kernel).max(axis=0) / np.float32(6)
    np.testing.assert_array_equal(
        onnx_library.numpy_helper.to_array(stored).astype(np.float32).T * scale,
        fake_quant(tf.convert_to_tensor(layer.quantized_layer.kernel), "E2M1", -1),
    )
    np.testing.assert_allclose(ReferenceEvaluator(made).run(None, {"x": x})[0], model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fmt, kind, bits",
    [("INT3", "INT4", 4), ("INT4", "INT4", 4), ("INT5", "INT8", 8), ("INT8", "INT8", 8), ("INT12", "INT16", 16)]
    + [("E4M3", "FLOAT8E4M3FN", 8), ("E5M2", "FLOAT8E5M2", 8), ("E2M1", "FLOAT4E2M1", 4), ("E3M2", "FLOAT8E4M3FN", 8)]
    + [("BF16", "BFLOAT16", 16)],
)
def test_weights_have_a_type_of_their_width(tmp_path, fmt, kind, bits):
    model, _ = quantized_dense(fmt, None, units=50)
    export.onnx(model, tmp_path / "m.onnx")
    made = onnx_library.load(tmp_path / "m.onnx")
    (kernel,) = [t for t in made.graph.initializer if t.name == "fc/kernel"]
    assert onnx_library.TensorProto.DataType.Name(kernel.data_type) == kind
    assert len(kernel.raw_data) == 2500 * bits // 8
    assert fliqs_tf.Recipe.from_dict(json.loads(made.metadata_props[0].value)).formats == {"fc": fmt}


# ---- layers


LAYERS = {
    "dense on a sequence": ((7, 5), lambda: L.Dense(4, use_bias=False)),
    "einsum": ((7, 5), lambda: L.EinsumDense("abc,cde->abde", (7, 2, 3), bias_axes="de")),
    "einsum of heads": ((7, 2, 3), lambda: L.EinsumDense("abcd,cde->abe", (7, 5), bias_axes="e")),
    "conv1d": ((9, 3), lambda: L.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="tanh")),
    "conv same": ((8, 7, 3), lambda: L.Conv2D(4, 3, padding="same", strides=2)),
    "conv valid": ((8, 7, 3), lambda: L.Conv2D(4, (3, 2), strides=(1, 2), use_bias=False)),
    "conv dilated": ((9, 9, 3), lambda: L.Conv2D(4, 3, padding="same", dilation_rate=2)),
    "conv of one channel": ((8, 8, 1), lambda: L.Conv2D(1, 3, activation="softmax")),
    "depthwise": ((8, 7, 3), lambda: L.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)),
    "depthwise dilated": ((8, 8, 3), lambda: L.DepthwiseConv2D(3, dilation_rate=2)),
    "separable": ((8, 8, 3), lambda: L.SeparableConv2D(5, 3, strides=2, padding="same", depth_multiplier=2)),
    "transposed same": ((5, 4, 3), lambda: L.Conv2DTranspose(4, 3, strides=2, padding="same")),
    "transposed valid": ((5, 4, 3), lambda: L.Conv2DTranspose(4, 3, strides=2)),
    "transposed wide": ((5, 4, 3), lambda: L.Conv2DTranspose(4, 2, strides=3, padding="same")),
    "transposed wide valid": ((5, 4, 3), lambda: L.Conv2DTranspose(4, 2, strides=3)),
    "transposed of 4": ((5, 4, 3), lambda: L.Conv2DTranspose(4, 4, strides=1, padding="same")),
}
# One of each class is in conformance_test.py.
AFTER = [
    lambda: L.BatchNormalization(scale=False, center=False, epsilon=0.1),
    lambda: L.LayerNormalization(center=False),
    lambda: L.GlobalAveragePooling2D(keepdims=True),
    lambda: L.MaxPooling2D(3, strides=2, padding="same"),
    lambda: L.UpSampling2D((2, 3)),
    lambda: L.Reshape((-1, 2)),
]


def agree(model, path, *x, tolerance=1e-5):
    export.onnx(model, path)
    expected = tf.nest.flatten(model(list(x) if len(x) > 1 else x[0]))
    found = run(path, *x)
    assert len(found) == len(expected)
    for a, b in zip(expected, found):
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * float(np.abs(a).max()))


@pytest.mark.parametrize("shape, make", LAYERS.values(), ids=LAYERS)
def test_layers_with_kernels(tmp_path, shape, make):
    """Weights in INT4, the input in INT8 with a power of two for a scale: few digits, so that sums are nearly exact."""
    inputs = keras.Input(shape)
    layer = fliqs_tf.Quantized(make(), ["INT4"], ["INT8"], name="layer")
    model = randomized(keras.Model(inputs, layer(inputs)))
    for quantizer in layer.activation_quantizers:
        quantizer.range.assign([127 / 32, 1.0])
    agree(model, tmp_path / "m.onnx", noise(3, *shape))


def test_layers_without(tmp_path):
    """Behind a convolution, which has channels first, and on the input, which has them last."""
    inputs = keras.Input((6, 8, 4))
    x = fliqs_tf.Quantized(L.Conv2D(4, 3, padding="same"), ["INT4"], None, name="conv")(inputs)
    model = randomized(keras.Model(inputs, [make()(tensor) for make in AFTER for tensor in (x, inputs)]))
    agree(model, tmp_path / "m.onnx", noise(2, 6, 8, 4))


# ---- networks


def block():
    """Two inputs and outputs, addition, concatenation, scaling by channel, a nested network, a shared layer."""
    image, vector = keras.Input((8, 8, 3), name="image"), keras.Input((5,), name="vector")
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 3, padding="same", use_bias=False, name="conv1")(image)))
    y = L.Conv2D(8, 3, padding="same", name="conv2")(L.ZeroPadding2D(1)(x))
    x = L.Add()([L.Cropping2D(1)(y), x])
    squeeze = L.GlobalAveragePooling2D(keepdims=True)(x)
    x = L.Multiply()([x, L.Conv2D(8, 1, activation="sigmoid", name="excite")(squeeze)])
    x = L.Concatenate()([x, L.MaxPooling2D(3, strides=1, padding="same")(x)])
    inner = keras.Input((8, 8, 16))
    nested = keras.Model(inner, L.DepthwiseConv2D(3, strides=2, name="depthwise")(inner), name="nested")
    x = L.Flatten()(nested(x))
    shared = L.Dense(5, name="shared")
    x = L.Average()([shared(L.Dense(5, name="fc")(x)), shared(vector)])
    return keras.Model(
        [image, vector], [L.Softmax(name="classes")(x), L.Subtract(name="rest")([x, vector])], name="block"
    )


@pytest.mark.parametrize("fmt", ["FP32", "INT4", "mixed"])
def test_a_network(tmp_path, fmt):
    layers = ("conv1", "conv2", "excite", "nested/depthwise", "fc", "shared")
    mixed = dict(zip(layers, ("INT8", "INT3", "BF16", "E4M3", "INT5", "E5M2")))
    model = randomized(fliqs_tf.apply(block(), fliqs_tf.Recipe(mixed) if fmt == "mixed" else fmt))
    x = [noise(4, 8, 8, 3), noise(4, 5)]
    model(x, training=True)
    agree(model, tmp_path / "m.onnx", *x, tolerance=1e-4)


def test_merging_layers_align_examples(tmp_path):
    """Examples and width are three each: axes that are aligned at the end would fit, too."""
    image, vector = keras.Input((5, 3, 4)), keras.Input((4,))
    x = fliqs_tf.Quantized(L.Conv2D(4, 1), ["INT4"], None, name="conv")(image)
    outputs = [make()([x, vector]) for make in (L.Multiply, L.Add, L.Average, L.Maximum)]
    model = randomized(keras.Model([image, vector], [*outputs, L.Subtract()([vector, x])]))
    agree(model, tmp_path / "m.onnx", noise(3, 5, 3, 4), noise(3, 4))


def test_a_sequential_network_of_any_batch(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="a"), L.Dropout(0.5), L.Dense(2, name="b")])
    model = fliqs_tf.apply(model, "INT4")
    # Not from data: multiples of the largest of few sums lie half-way between two codes too often.
    for layer in (model.get_layer("a"), model.get_layer("b")):
        layer.activation_quantizer.range.assign([1.7, 1.0])
    for batch in (1, 7):
        agree(model, tmp_path / "m.onnx", noise(batch, 4))


def test_an_input_that_is_an_output_too(tmp_path):
    inputs = keras.Input((4,))
    x = fliqs_tf.Quantized(L.Dense(4), ["INT4"], None, name="fc")(inputs)
    agree(keras.Model(inputs, [x, x]), tmp_path / "m.onnx", noise(3, 4))


# ---- what is refused


def refused(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        export.onnx(model, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_formats_without_a_type_name_the_layer_and_what_takes_it(tmp_path):
    model, _ = quantized_dense("INT4", "E3M2")
    refused(
        tmp_path,
        model,
        "Layer 'fc' has its input in E3M2, for which ONNX has no type; fliqs_tf.export.packed writes it",
    )
    model, _ = quantized_dense("E3M6", None)
    refused(
        tmp_path,
        model,
        "Layer 'fc' has its weights in E3M6, for which ONNX has no type; fliqs_tf.export.packed writes it",
    )


def test_a_range_that_saw_nothing_is_refused(tmp_path):
    model, _ = quantized_dense("INT4", "INT8")
    refused(tmp_path, model, "Layer 'fc' cannot be written: its input range has seen no data: train the model, or give")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: L.Conv1D(3, 2, data_format="channels_first", name="odd"), "Layer 'odd' has channels first"),
        (lambda: L.BatchNormalization(axis=1, name="odd"), "Layer 'odd' normalizes axis 1"),
        (lambda: L.Activation(tf.math.square, name="odd"), "Layer 'odd' has the activation 'square'"),
        (lambda: L.Dense(3, name="odd", dtype="float64"), "Layer 'odd' computes in float64"),
    ],
)
def test_layers_without_a_form_are_named(tmp_path, make, message):
    inputs = keras.Input((6, 4))
    x = fliqs_tf.Quantized(L.Dense(4, name="fc"), ["INT4"], None, name="fc")(inputs)
    refused(tmp_path, keras.Model(inputs, make()(x)), message)


def test_what_is_not_deployed_is_refused(tmp_path):
    inputs = keras.Input((6,))
    refused(tmp_path, keras.Model(inputs, L.Dense(4)(inputs)), "has no quantized layer")
