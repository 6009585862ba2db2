"""Layers with kernels as steps: codes of the input, a kernel or two, an activation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from fliqs_tf._keras import float_value, keras
from fliqs_tf.export import boundaries, deployed, lowering_layers
from fliqs_tf.export.lowering_layers import Shape
from fliqs_tf.export.steps import ActivationScale, Linear, Step
from fliqs_tf.graph import commuting, dataflow, layer_types
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from fliqs_tf.numerics.formats import Format

_LAYERS = keras.layers
Fresh: TypeAlias = Iterator[int]
"""Values that no call gives yet."""


def check(layer: keras.layers.Layer, path: str) -> None:
    """Raises, whatever the formats, if a layer has no counterpart in the file."""
    if len(layer_types.kernels(layer)) == 2 or operation_of(path, layer) != "dense":
        lowering_layers.window(layer, path)
    lowering_layers.activation(layer, path)


def quantized_steps(call: dataflow.Call, inputs: list[Shape], output: Shape, fresh: Fresh) -> list[Step]:
    """A quantized layer: the rounding of its input, and the steps of the layer inside.

    Args:
      call: Its call.
      inputs, output: Shapes of one example.
      fresh: Numbers for values in between.
    """
    layer, value, made = call.layer, call.inputs[0], []
    if layer.activation_quantizer is not None:
        activation_scale = activation_scale_of(layer.activation_quantizer, call.path)
        quantized = next(fresh)
        made.append(
            Step(
                "quantize", call.path, (value,), quantized, (inputs[0], inputs[0]), options={"scale": activation_scale}
            )
        )
        value = quantized
    return made + linear_steps(call, layer.layer, value, inputs[0], output, layer, fresh)


def linear_steps(
    call: dataflow.Call,
    layer: keras.layers.Layer,
    value: int,
    shape: Shape,
    output: Shape,
    quantized: Quantized | None,
    fresh: Fresh,
) -> list[Step]:
    """A layer with one kernel, or the two of a separable convolution, and its activation.

    Args:
      call: Its call.
      layer: The layer, without its quantizers.
      value, shape: Its input.
      output: Shape of its output.
      quantized: The `Quantized` around it; None for a layer in float.
      fresh: Numbers for values in between.
    """
    name = commuting.activation(layer)
    kernels = layer_types.kernels(layer)
    quantizers = quantized.weight_quantizers if quantized is not None else [None] * len(kernels)
    made = []
    if len(kernels) == 2:
        middle_shape = (*output[:-1], shape[-1] * layer.depth_multiplier)
        middle = next(fresh)
        first = _linear(call.path, layer, kernels[0], quantizers[0], "depthwise", with_bias=False)
        options = lowering_layers.window(layer, call.path)
        made.append(Step("linear", call.path, (value,), middle, (shape, middle_shape), options=options, linear=first))
        value, shape = middle, middle_shape
        if quantized is not None and quantized.middle_quantizer is not None:
            activation_scale, rounded = activation_scale_of(quantized.middle_quantizer, call.path), next(fresh)
            made.append(
                Step("quantize", call.path, (value,), rounded, (shape, shape), options={"scale": activation_scale})
            )
            value = rounded
        second = _linear(call.path, layer, kernels[1], quantizers[1], "conv", with_bias=True)
        options = {"strides": (1, 1), "padding": "valid", "dilation": (1, 1)}
    else:
        operation = operation_of(call.path, layer)
        second = _linear(call.path, layer, kernels[0], quantizers[0], operation, with_bias=True)
        options = {} if operation == "dense" else lowering_layers.window(layer, call.path)
    fused = name if name in ("linear", "relu", "relu6") else "linear"
    result = call.output if fused == name else next(fresh)
    shift = getattr(layer, "bias", None)
    base = (call.path, (value,), result, (shape, output))
    made.append(Step("linear", *base, activation=fused, options=options, linear=second, shift=shift))
    if fused != name:
        kind, options = lowering_layers.activation(layer, call.path)
        made.append(Step(kind, call.path, (result,), call.output, (output, output), options=options))
    return made


def operation_of(path: str, layer: keras.layers.Layer) -> str:
    """What a layer with one kernel computes: "dense", "conv" or "depthwise".

    Raises:
      ValueError: It has no counterpart in a TFLite file; names the layer.
    """
    if isinstance(layer, _LAYERS.Dense):
        return "dense"
    if isinstance(layer, _LAYERS.EinsumDense):
        left, result = layer.equation.replace(" ", "").split("->")
        left, kernel = left.split(",")
        if len(kernel) == 2 and left[:-1] + kernel[1] == result and left[-1] == kernel[0] and kernel[1] not in left:
            return "dense"
        raise lowering_layers.unsupported(
            path, layer, f"the equation {layer.equation!r} is no matrix product over the last axis"
        )
    if isinstance(layer, _LAYERS.DepthwiseConv2D):
        return "depthwise"
    if type(layer) is _LAYERS.Conv2D:
        if layer.groups > 1:
            raise lowering_layers.unsupported(path, layer, "grouped convolutions have no fast integer kernels")
        return "conv"
    raise lowering_layers.unsupported(path, layer)


def _linear(
    path: str,
    layer: keras.layers.Layer,
    kernel: layer_types.Kernel,
    quantizer: WeightQuantizer | None,
    operation: str,
    with_bias: bool,
) -> Linear:
    weight = float_value(getattr(layer, kernel.attribute))
    channels = math.prod(weight.shape[a] for a in kernel.channel_axes)
    codes, scale = None, np.ones(channels)
    if quantizer is None:
        fmt, values = Format("FP32"), weight.numpy().astype(np.float64)
    else:
        (fmt,) = _fixed(quantizer, path)
        quantized = deployed.quantized_weight(f"{path}/{kernel.attribute}", quantizer, weight)
        values = quantized.values.astype(np.float64)
        if quantized.scale is not None:
            values = values * quantized.scale
            if boundaries.is_integer(fmt):
                codes, scale = quantized.values.astype(np.int8), quantized.scale.astype(np.float64).reshape(channels)
    if operation == "depthwise":  # [height, width, in, multiplier]: in * multiplier output channels
        values = values.reshape(*values.shape[:2], channels)
        codes = None if codes is None else codes.reshape(values.shape)
    bias = np.zeros(channels)
    if with_bias and getattr(layer, "bias", None) is not None:
        bias = np.asarray(float_value(layer.bias), np.float64).reshape(channels)
    return Linear(operation, fmt, codes, scale, values, bias)


# ---- formats


def activation_scale_of(quantizer: ActivationQuantizer, path: str) -> ActivationScale:
    """The format and the range that a fixed quantizer rounds to.

    Args:
      quantizer: The quantizer.
      path: Path of its layer, for errors.

    Raises:
      ValueError: It has several formats, one that TFLite has no kernels for, or no range.
    """
    (fmt,) = _fixed(quantizer, path)
    amax, seen = np.float32(quantizer.range[0]), float(quantizer.range[1])
    if fmt.is_scaled and not seen:
        raise ValueError(
            f"The input of layer {path!r} has no range yet: give representative=batches of inputs, or train."
        )
    return ActivationScale(fmt, amax * np.float32(quantizer.clip))


def _fixed(quantizer: Quantizer, path: str) -> tuple[Format, ...]:
    if len(quantizer.space) > 1:
        raise ValueError(
            f"Layer {path!r} may still take {len(quantizer.space)} formats: export what qmodel.deploy() returns."
        )
    for fmt in quantizer.space.formats:
        if not fmt.is_integer and fmt.is_scaled:
            raise ValueError(
                f"Layer {path!r} has the format {fmt}, for which TFLite has no kernels. fliqs_tf.export.packed "
                f"writes any format, fliqs_tf.export.onnx E4M3, E5M2 and E2M1."
            )
    return quantizer.space.formats
