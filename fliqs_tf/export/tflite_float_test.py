import numpy as np
import pytest

from fliqs_tf.export import tflite_float
from fliqs_tf.export.steps import Linear, Step
from fliqs_tf.export.tflite_file import TfliteFile
from fliqs_tf.export.tflite_tensors import Tensors
from fliqs_tf.numerics.formats import Format

IMAGE = (4, 4, 2)


def written(kind, *, inputs=1, shape=IMAGE, activation="linear", linear=None, **options):
    """([operation(inputs -> outputs) with its activation], {constant: values})."""
    tensors = Tensors(TfliteFile())
    for value in range(inputs):
        tensors.name(value, f"x{value}", shape)
        tensors.new_float(value, f"x{value}")
    step = Step(kind, "layer", tuple(range(inputs)), 9, (*[shape] * inputs, shape), activation, options, linear)
    tensors.name(9, "layer", shape)
    tflite_float.write(tensors, step, tensors.new_float(9, "y"))
    name = [tensor[0] for tensor in tensors.file.tensors]
    operations = [
        f"{operation}({', '.join(name[i] for i in ins)} -> {name[out]})"
        + {None: "", 0: "", 1: " relu"}[options.get("fusedActivationFunction")]
        for operation, ins, (out,), options in tensors.file.operations
    ]
    constants = {name: np.asarray(data).tolist() for name, _, _, _, data in tensors.file.tensors if data is not None}
    return operations, constants


def test_weights_of_a_float_format_are_floats():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    linear = Linear("dense", Format("BF16"), None, np.ones(2), values, np.array([7.0, 8.0]))
    assert written("linear", shape=(3,), linear=linear, activation="relu") == (
        ["FULLY_CONNECTED(x0, layer/weights, layer/bias -> y) relu"],
        {"layer/weights": [[1, 3, 5], [2, 4, 6]], "layer/bias": [7, 8]},
    )


def test_those_of_an_integer_format_are_codes_that_are_dequantized():
    codes = np.array([[1, 2], [3, 4], [5, 6]], np.int8)
    linear = Linear("dense", Format("INT4"), codes, np.array([0.5, 0.0]), codes * 0.5, np.zeros(2))
    assert written("linear", shape=(3,), linear=linear) == (
        [
            "DEQUANTIZE(layer/weights -> layer/weights_1)",
            "FULLY_CONNECTED(x0, layer/weights_1, layer/bias -> y)",
        ],
        {"layer/weights": [[1, 3, 5], [2, 4, 6]], "layer/bias": [0, 0]},
    )


def test_a_gain_and_an_offset():
    assert written("affine", gain=np.array([2.0, 3.0]), offset=np.array([4.0, 5.0]), activation="relu") == (
        ["MUL(x0, layer/gain -> layer)", "ADD(layer, layer/offset -> y) relu"],
        {"layer/gain": [2, 3], "layer/offset": [4, 5]},
    )


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        ("softmax", ["SOFTMAX(x0 -> y)"]),
        ("sigmoid", ["LOGISTIC(x0 -> y)"]),
        ("tanh", ["TANH(x0 -> y)"]),
        ("silu", ["LOGISTIC(x0 -> layer)", "MUL(x0, layer -> y)"]),
        ("linear", ["RESHAPE(x0, shape -> y)"]),
    ],
)
def test_activations(function, operations):
    assert written("activation", function=function)[0] == operations


def test_a_layer_that_does_nothing():
    assert written("identity") == (["RESHAPE(x0, shape -> y)"], {"shape": [-1, *IMAGE]})


def test_means():
    assert written("mean", keepdims=True) == (["MEAN(x0, axes -> y)"], {"axes": [1, 2]})
    window = {"size": (2, 2), "strides": (2, 2), "padding": "same"}
    assert written("average_pool", **window) == (["AVERAGE_POOL_2D(x0 -> y)"], {})


@pytest.mark.parametrize(("kind", "name"), [("add", "ADD"), ("multiply", "MUL")])
def test_several_inputs_one_after_the_other_and_the_activation_last(kind, name):
    assert written(kind, inputs=2, activation="relu")[0] == [f"{name}(x0, x1 -> y) relu"]
    assert written(kind, inputs=4, activation="relu")[0] == [
        f"{name}(x0, x1 -> layer)",
        f"{name}(layer, x2 -> layer_1)",
        f"{name}(layer_1, x3 -> y) relu",
    ]
