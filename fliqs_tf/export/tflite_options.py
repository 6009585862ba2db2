"""Options of steps as TensorFlow Lite's schema names and numbers them."""

from __future__ import annotations

from typing import TypeAlias

from fliqs_tf.export.steps import Step
from fliqs_tf.export.tflite_file import TfliteFile

ACTIVATIONS = {"linear": 0, "relu": 1, "relu6": 3}  # ActivationFunctionType
_PADDING = {"same": 0, "valid": 1}
Options: TypeAlias = dict[str, int | bool]


def activation(step: Step) -> Options:
    """The activation that a kernel includes."""
    return {"fusedActivationFunction": ACTIVATIONS[step.activation]}


def window(step: Step) -> Options:
    """Strides, padding and dilation of a convolution."""
    (h, w), (dh, dw) = step.options["strides"], step.options["dilation"]
    return {
        "padding": _PADDING[step.options["padding"]],
        "strideH": h,
        "strideW": w,
        "dilationHFactor": dh,
        "dilationWFactor": dw,
    }


def pool(step: Step) -> Options:
    """Size, strides and padding of a pooling."""
    (h, w), (sh, sw) = step.options["size"], step.options["strides"]
    padding = _PADDING[step.options["padding"]]
    return {"padding": padding, "strideH": sh, "strideW": sw, "filterHeight": h, "filterWidth": w}


def linear_operation(file: TfliteFile, step: Step, operation: str, inputs: list[int], output: int) -> None:
    """Appends a convolution or a matrix product.

    Args:
      file: The file under construction.
      step: Its shapes, window and activation count.
      operation: "conv", "depthwise" or "dense".
      inputs: Tensors of the input, the weights and the biases.
      output: The tensor to write to.
    """
    if operation == "dense":
        keep = {"keepNumDims": True} if len(step.shapes[0]) > 1 else {}
        file.operation("FULLY_CONNECTED", inputs, [output], **activation(step), **keep)
    elif operation == "depthwise":
        multiplier = step.shapes[-1][-1] // step.shapes[0][-1]
        file.operation(
            "DEPTHWISE_CONV_2D", inputs, [output], **window(step), depthMultiplier=multiplier, **activation(step)
        )
    else:
        file.operation("CONV_2D", inputs, [output], **window(step), **activation(step))
