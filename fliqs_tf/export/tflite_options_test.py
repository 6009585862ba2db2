import numpy as np
import pytest

from fliqs_tf.export import tflite_options
from fliqs_tf.export.steps import Step
from fliqs_tf.export.tflite_file import TfliteFile


def step(shapes, activation="linear", **options):
    return Step("linear", "layer", (0,), 1, shapes, activation, options)


CONV = {"strides": (2, 1), "padding": "same", "dilation": (1, 3)}
WINDOW = {"padding": 0, "strideH": 2, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 3}


def test_windows_and_pools():
    assert tflite_options.window(step((), **CONV)) == WINDOW
    pool = tflite_options.pool(step((), size=(3, 2), strides=(1, 2), padding="valid"))
    assert pool == {"padding": 1, "strideH": 1, "strideW": 2, "filterHeight": 3, "filterWidth": 2}


# ActivationFunctionType of the schema: NONE = 0, RELU = 1, RELU_N1_TO_1 = 2, RELU6 = 3.
@pytest.mark.parametrize(("activation", "number"), [("linear", 0), ("relu", 1), ("relu6", 3)])
def test_activations(activation, number):
    assert tflite_options.activation(step((), activation)) == {"fusedActivationFunction": number}


RELU = {"fusedActivationFunction": 1}


@pytest.mark.parametrize(
    ("operation", "shapes", "name", "options"),
    [
        ("dense", ((4,), (3,)), "FULLY_CONNECTED", RELU),
        ("dense", ((5, 4), (5, 3)), "FULLY_CONNECTED", {**RELU, "keepNumDims": True}),
        ("conv", ((8, 8, 2), (4, 8, 3)), "CONV_2D", {**WINDOW, **RELU}),
        ("depthwise", ((8, 8, 2), (4, 8, 6)), "DEPTHWISE_CONV_2D", {**WINDOW, **RELU, "depthMultiplier": 3}),
    ],
)
def test_linear_operations(operation, shapes, name, options):
    file = TfliteFile()
    tensors = [file.tensor("t", (1,), np.float32) for _ in range(4)]
    tflite_options.linear_operation(file, step(shapes, "relu", **CONV), operation, tensors[:3], tensors[3])
    assert file.operations == [(name, tensors[:3], tensors[3:], options)]
