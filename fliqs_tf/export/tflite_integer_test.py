import numpy as np
import pytest

from fliqs_tf.export import tflite_integer
from fliqs_tf.export.steps import Linear, Step
from fliqs_tf.export.tflite_file import QuantizationParameters, TfliteFile
from fliqs_tf.export.tflite_tensors import Codes
from fliqs_tf.layers import requantize
from fliqs_tf.numerics.formats import Format

SOURCE, TARGET = np.float32(0.5), np.float32(0.25)
WINDOW = {"strides": (1, 1), "padding": "valid", "dilation": (1, 1)}
IMAGE = (4, 4, 2)


def linear(operation, codes, scale, bias, fmt="INT8"):
    codes = np.asarray(codes, np.int8)
    return Linear(operation, Format(fmt), codes, np.asarray(scale, float), codes * scale, np.asarray(bias, float))


def step(kind, shapes, *, kernel=None, **options):
    return Step(kind, "layer", tuple(range(len(shapes) - 1)), 9, shapes, options=options, linear=kernel)


def written(step, int4=True):
    """(operation names, {constant: (values, type, scales)}, rounding)."""
    file = TfliteFile()
    sources = [
        Codes(file.tensor(f"x{i}", shape, np.int8), QuantizationParameters(SOURCE))
        for i, shape in enumerate(step.shapes[:-1])
    ]
    target = Codes(file.tensor("y", step.shapes[-1], np.int8), QuantizationParameters(TARGET))
    rounding = tflite_integer.write(file, step, sources, target, int4)
    assert file.operations[-1][2] == [target.tensor]
    assert file.operations[0][1][: len(sources)] == [source.tensor for source in sources]
    constants = {
        name: (np.asarray(data).tolist(), kind if kind == "int4" else kind.name, parameters)
        for name, _, kind, parameters, data in file.tensors
        if data is not None
    }
    return [operation[0] for operation in file.operations], constants, rounding


@pytest.mark.parametrize(
    ("step", "takes"),
    [
        (step("linear", ((2,), (1,)), kernel=linear("dense", [[1], [2]], [1.0], [0])), True),
        (step("linear", ((2,), (1,)), kernel=Linear("dense", Format("BF16"), None, *[np.ones(1)] * 3)), False),
        (step("affine", (IMAGE, IMAGE)), True),
        (step("affine", ((4, 2), (4, 2))), False),  # a depthwise kernel wants images
        (step("mean", (IMAGE, (2,))), True),
        (step("average_pool", (IMAGE, IMAGE), padding="valid"), True),
        (step("average_pool", (IMAGE, IMAGE), padding="same"), False),  # each place counts what there is
        (step("add", (IMAGE, IMAGE, IMAGE)), True),
        (step("multiply", (IMAGE, IMAGE, IMAGE)), True),
        (step("add", (IMAGE, IMAGE, IMAGE, IMAGE)), False),
        (step("activation", (IMAGE, IMAGE), function="softmax"), False),
    ],
)
def test_what_has_an_integer_kernel(step, takes):
    assert tflite_integer.takes(step) is takes


def test_a_matrix():
    kernel = linear("dense", [[1, -2, 3], [100, 50, 25]], [1.0, 0.5, 0.25], [3.0, -1.0, 0.25])
    names, constants, (kind, state) = written(step("linear", ((2,), (3,)), kernel=kernel))
    assert names == ["FULLY_CONNECTED"]
    weights, dtype, parameters = constants["layer/weights"]
    assert (weights, dtype, parameters.axis) == ([[1, 100], [-2, 50], [3, 25]], "int8", 0)  # [out, in]
    np.testing.assert_array_equal(parameters.scale, [1, 0.5, 0.25])
    biases, dtype, parameters = constants["layer/bias"]  # in steps of 0.5 * scale
    assert (biases, dtype) == ([6, -4, 2], "int32")
    np.testing.assert_array_equal(parameters.scale, [0.5, 0.25, 0.125])
    assert kind is requantize.AccumulatorRounding
    np.testing.assert_array_equal(state["multiplier"], [2, 1, 0.5])  # 0.5 * scale / 0.25


@pytest.mark.parametrize(
    ("operation", "rows", "int4", "dtype", "rounding"),
    [
        ("dense", 4, True, "int4", requantize.AccumulatorRounding),
        ("dense", 3, True, "int4", requantize.KernelRounding),  # XNNPACK has no int4 matrix of an odd number of rows
        ("conv", 4, True, "int4", requantize.KernelRounding),
        ("conv", 4, False, "int8", requantize.AccumulatorRounding),
        ("depthwise", 4, True, "int8", requantize.AccumulatorRounding),
    ],
)
def test_int4_weights_and_who_computes_with_them(operation, rows, int4, dtype, rounding):
    shape = {"dense": (rows, 2), "conv": (1, 1, rows, 2), "depthwise": (1, 1, 2)}[operation]
    kernel = linear(operation, np.ones(shape), [1.0, 1.0], [0, 0], "INT4")
    _, constants, (kind, _) = written(step("linear", (IMAGE, IMAGE), kernel=kernel, **WINDOW), int4)
    assert constants["layer/weights"][1] == dtype
    assert kind is rounding


def test_a_gain_and_an_offset_are_a_depthwise_kernel():
    gains = {"gain": np.array([2.0, -0.5]), "offset": np.array([1.0, 0.0])}
    names, constants, _ = written(step("affine", (IMAGE, IMAGE), **gains))
    assert names == ["DEPTHWISE_CONV_2D"]
    weights, _, parameters = constants["layer/weights"]
    assert weights == [[[[127, -127]]]] and parameters.axis == 3
    np.testing.assert_allclose(parameters.scale, [2 / 127, 0.5 / 127], rtol=1e-6)
    assert constants["layer/bias"][0] == [127, 0]  # 1 / (0.5 * 2 / 127)


def test_an_average_is_a_depthwise_kernel_of_ones():
    options = {"size": (2, 2), "strides": (2, 2), "padding": "valid", "dilation": (1, 1)}
    names, constants, _ = written(step("average_pool", (IMAGE, (2, 2, 2)), **options))
    assert names == ["DEPTHWISE_CONV_2D"]
    weights, _, parameters = constants["layer/weights"]
    assert np.asarray(weights).shape == (1, 2, 2, 2) and set(np.ravel(weights)) == {127}
    np.testing.assert_allclose(parameters.scale, [1 / 127 / 4] * 2, rtol=1e-6)


def test_a_mean_of_an_image():
    names, constants, (kind, state) = written(step("mean", (IMAGE, (2,)), keepdims=False))
    assert names == ["MEAN"] and constants["axes"][0] == [1, 2]
    assert kind is requantize.AccumulatorRounding
    np.testing.assert_array_equal(state["multiplier"], [0.5 / 16 / 0.25])


def test_sums_round_as_a_quantizer_does_and_products_as_accumulators():
    names, constants, rounding = written(step("add", (IMAGE, IMAGE, IMAGE)))
    assert (names, constants, rounding) == (["ADD"], {}, None)
    names, constants, (_, state) = written(step("multiply", (IMAGE, IMAGE, IMAGE)))
    assert (names, constants) == (["MUL"], {})
    np.testing.assert_array_equal(state["multiplier"], [0.5 * 0.5 / 0.25])
