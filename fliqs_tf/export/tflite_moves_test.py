import numpy as np
import pytest

from fliqs_tf.export import tflite_moves
from fliqs_tf.export.steps import Step
from fliqs_tf.export.tflite_file import TfliteFile

IMAGE = (6, 4, 2)


def step(kind, output=IMAGE, **options):
    return Step(kind, "layer", (0,), 1, (IMAGE, output), options=options)


def written(step):
    """(operation, constant, options)."""
    file = TfliteFile()
    tensors = [file.tensor(name, (-1, *shape), np.int8) for name, shape in zip("xy", step.shapes)]
    tflite_moves.write(file, step, tensors[:1], tensors[1])
    ((name, inputs, outputs, options),) = file.operations
    assert inputs[0] == tensors[0] and outputs == tensors[1:]
    constants = [np.asarray(file.tensors[i][4]).tolist() for i in inputs[1:]]
    assert all(file.tensors[i][2] == np.int32 for i in inputs[1:])
    return name, constants, options


WINDOW = {"size": (2, 3), "strides": (1, 2), "padding": "valid", "dilation": (1, 1)}


@pytest.mark.parametrize(
    ("step", "name", "constants", "options"),
    [
        (
            step("max_pool", (5, 1, 2), **WINDOW),
            "MAX_POOL_2D",
            [],
            {"padding": 1, "strideH": 1, "strideW": 2, "filterHeight": 2, "filterWidth": 3},
        ),
        (step("max", (2,), keepdims=False), "REDUCE_MAX", [[1, 2]], {"keepDims": False}),
        (step("reshape", (12, 4)), "RESHAPE", [[-1, 12, 4]], {"newShape": [-1, 12, 4]}),
        (step("pad", (9, 7, 2), padding=((1, 2), (0, 3))), "PAD", [[[0, 0], [1, 2], [0, 3], [0, 0]]], {}),
        (
            step("upsample", (12, 8, 2)),
            "RESIZE_NEAREST_NEIGHBOR",
            [[12, 8]],
            {"alignCorners": False, "halfPixelCenters": False},
        ),
        (step("concatenate", axis=3), "CONCATENATION", [], {"axis": 3, "fusedActivationFunction": 0}),
        (step("activation", function="relu6"), "RELU6", [], {}),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_operations(step, name, constants, options):
    assert tflite_moves.takes(step)
    assert written(step) == (name, constants, options)


def test_what_computes_is_none():
    computing = [
        step("activation", function="softmax"),
        *map(step, ("linear", "affine", "add", "mean", "average_pool")),
    ]
    assert not any(map(tflite_moves.takes, computing))
