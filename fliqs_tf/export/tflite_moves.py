"""Operations that move values or pick among them: the same on float32 and on codes."""

from __future__ import annotations

import numpy as np

from fliqs_tf.export import tflite_options
from fliqs_tf.export.steps import Step
from fliqs_tf.export.tflite_file import TfliteFile


def takes(step: Step) -> bool:
    """True for a step that only moves or picks values: rounding before it or after it gives the same."""
    if step.kind == "activation":
        return step.options["function"] in ("relu", "relu6")
    return step.kind in _MOVES


def write(file: TfliteFile, step: Step, inputs: list[int], output: int) -> None:
    """Appends the operation of a step; `inputs` and `output` are tensors of one type and scale."""
    _MOVES[step.kind](file, step, inputs, output)


def reshape(file: TfliteFile, step: Step, inputs: list[int], output: int) -> None:
    """Appends a RESHAPE to the shape of a step's output."""
    shape = file.constant("shape", [-1, *step.shapes[-1]], np.int32)
    file.operation("RESHAPE", [*inputs, shape], [output], newShape=[-1, *step.shapes[-1]])


def _max_pool(file: TfliteFile, step: Step, inputs: list[int], output: int) -> None:
    file.operation("MAX_POOL_2D", inputs, [output], **tflite_options.pool(step))


def _max(file: TfliteFile, step: Step, inputs: list[int], output: int) -> None:
    axes = file.constant("axes", [1, 2], np.int32)
    file.operation("REDUCE_MAX", [*inputs, axes], [output], keepDims=step.options["keepdims"])


def _pad(file: TfliteFile, step: Step, inputs: list[int], output: int) -> None:
    padding = file.constant("padding", [(0, 0), *step.options["padding"], (0, 0)], np.int32)
    file.operation("PAD", [*inputs, padding], [output])


def _upsample(file: TfliteFile, step: Step, inputs: list[int], output: int) -> None:
    size = file.constant("size", step.shapes[-1][:2], np.int32)
    file.operation("RESIZE_NEAREST_NEIGHBOR", [*inputs, size], [output], alignCorners=False, halfPixelCenters=False)


def _concatenate(file: TfliteFile, step: Step, inputs: list[int], output: int) -> None:
    file.operation("CONCATENATION", inputs, [output], axis=step.options["axis"], fusedActivationFunction=0)


def _activation(file: TfliteFile, step: Step, inputs: list[int], output: int) -> None:
    file.operation(step.options["function"].upper(), inputs, [output])


_MOVES = {
    "max_pool": _max_pool,
    "max": _max,
    "reshape": reshape,
    "pad": _pad,
    "upsample": _upsample,
    "concatenate": _concatenate,
    "activation": _activation,
}
