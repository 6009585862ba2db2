"""Steps as integer kernels, on int8 codes.

Weights of 4 bits or fewer are int4 where there are kernels (CONV_2D, FULLY_CONNECTED), all others int8.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np

from fliqs_tf.export import tflite_kernels, tflite_options
from fliqs_tf.export.steps import Linear, Step, ones
from fliqs_tf.export.tflite_file import QuantizationParameters, TfliteFile
from fliqs_tf.export.tflite_tensors import Codes
from fliqs_tf.layers import requantize

Rounding: TypeAlias = tuple[type, dict]


def takes(step: Step) -> bool:
    """True if there is an integer kernel for the step's weights, window and number of inputs."""
    if step.kind == "linear":
        return step.kernel.codes is not None
    if step.kind == "average_pool":
        return step.options["padding"] == "valid"
    if step.kind in ("affine", "mean"):
        return len(step.shapes[0]) == 3
    return step.kind in ("add", "multiply") and len(step.inputs) == 2


def write(file: TfliteFile, step: Step, sources: list[Codes], target: Codes, int4: bool) -> Rounding | None:
    """Appends the operations of a step.

    Args:
      file: The file under construction.
      step: A step that `takes` accepts.
      sources, target: Tensors of its inputs and of its output.
      int4: Whether weights may be stored as int4.

    Returns:
      How the kernel rounds, see `requantize`; None if it rounds as a quantizer does.

    Raises:
      ValueError: A weight or a bias is not finite; names the layer.
    """
    if step.kind in ("add", "multiply"):
        return _binary(file, step, sources, target)
    if step.kind == "mean":
        return _mean(file, step, sources[0], target)
    if step.kind != "linear":
        step = _as_linear(step)
    return _linear(file, step, step.kernel, sources[0], target, int4)


def _as_linear(step: Step) -> Step:
    """A gain and offset per channel, or a mean over windows, as a depthwise kernel."""
    if step.kind == "affine":  # of 1x1, whose scales are the gains
        gain = step.options["gain"]
        linear = ones((1, 1), len(gain)).then(gain, step.options["offset"])
        window = {"strides": (1, 1), "padding": "valid", "dilation": (1, 1)}
    else:  # of ones: AVERAGE_POOL_2D would round to the steps of its input
        size, channels = step.options["size"], step.shapes[0][-1]
        linear = ones(size, channels).then(np.full(channels, 1 / (size[0] * size[1])), 0.0)
        window = {"strides": step.options["strides"], "padding": "valid", "dilation": (1, 1)}
    return dataclasses.replace(step, kind="linear", linear=linear, options=window)


def _linear(file: TfliteFile, step: Step, linear: Linear, source: Codes, target: Codes, int4: bool) -> Rounding:
    source_scale, target_scale = float(source.parameters.scale), float(target.parameters.scale)
    scale, codes, bias = tflite_kernels.with_int32_biases(step.path, linear, source_scale, target_scale)
    is_narrow = int4 and linear.format.bits <= 4 and linear.operation in ("conv", "dense")
    weights = file.constant(
        f"{step.path}/weights",
        tflite_kernels.arranged(linear.operation, codes),
        "int4" if is_narrow else np.int8,
        QuantizationParameters(scale.astype(np.float32), 0, tflite_kernels.channel_axis(linear.operation)),
    )
    biases = file.constant(
        f"{step.path}/bias",
        bias,
        np.int32,
        QuantizationParameters(np.float32(source_scale) * scale.astype(np.float32)),
    )
    tflite_options.linear_operation(file, step, linear.operation, [source.tensor, weights, biases], target.tensor)
    is_litert = is_narrow and (linear.operation == "conv" or codes.shape[0] % 2)  # XNNPACK has no such kernel
    rounding = requantize.double_rounding if is_litert else requantize.single_rounding
    return rounding(float(source_scale), scale, float(target_scale))


def _mean(file: TfliteFile, step: Step, source: Codes, target: Codes) -> Rounding:
    axes = file.constant("axes", [1, 2], np.int32)
    file.operation("MEAN", [source.tensor, axes], [target.tensor], keepDims=step.options["keepdims"])
    height, width, _ = step.shapes[0]
    share = np.full(1, 1 / (height * width))
    return requantize.single_rounding(float(source.parameters.scale), share, float(target.parameters.scale))


def _binary(file: TfliteFile, step: Step, sources: list[Codes], target: Codes) -> Rounding | None:
    left, right = sources
    options = tflite_options.activation(step)
    name = {"add": "ADD", "multiply": "MUL"}[step.kind]
    file.operation(name, [left.tensor, right.tensor], [target.tensor], **options)
    if step.kind == "add":
        return None
    weights = np.full(1, right.parameters.scale)
    return requantize.single_rounding(float(left.parameters.scale), weights, float(target.parameters.scale))
