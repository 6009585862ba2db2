"""A deployed Keras model as a list of steps, for exporters of integer networks to write.

Batch normalization is folded into the layer in front of it. With symmetric scales per output channel that leaves the
codes exact: gain * (scale * code) = (|gain| * scale) * (sign(gain) * code). Only the scales change, and the signs of
codes in channels of negative gain: the codes that were trained are the codes that ship.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import float_value, keras
from fliqs_tf.export import boundaries, deployed
from fliqs_tf.export.steps import ActivationScale, IntegerNetwork, Linear, Step, ones
from fliqs_tf.graph import commuting, dataflow, layer_types, walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from fliqs_tf.layers.requantize import ROUNDINGS
from fliqs_tf.numerics.formats import Format

_LAYERS = keras.layers
Shape: TypeAlias = tuple[int | None, ...]
Read: TypeAlias = tuple[str, dict[str, Any]]
"""(kind, options) of a `Step`."""
Reader: TypeAlias = Callable[[keras.layers.Layer, str, list[Shape]], Read]
"""(layer, path, shapes of its inputs) -> its step."""


def steps(graph: ModelGraph) -> IntegerNetwork:
    """The steps of a deployed model.

    Args:
      graph: Of a Functional or Sequential model, with every format fixed.

    Returns:
      Its steps in an order in which they can run, without identities, and with batch normalization and ReLU merged into
      the steps before them where kernels can do both.

    Raises:
      ValueError: A layer has no counterpart in an integer network, several formats, or no range; names the layer.
    """
    flow = graph.dataflow
    found: list[Step] = []
    fresh = iter(range(1 + max([call.output for call in flow.calls], default=0), 10**9))
    for call, inputs, output in _shaped(flow):
        made = _read(call, inputs, output, fresh)
        made[-1].last = (call.path, call.index)
        found += made
    found = _without_identities(found, flow.outputs)
    return IntegerNetwork(flow.inputs, _merged(found, flow.outputs), flow.outputs, flow.output_names)


def check_layers(graph: ModelGraph) -> None:
    """Raises, before anything is trained, if a layer of a network has no counterpart in a TFLite file.

    Raises:
      ValueError: Names the layer, and other exporters.
    """
    for call, inputs, output in _shaped(graph.dataflow):
        if isinstance(call.layer, Quantized):
            layer = call.layer.quantized_layer
            if len(layer_types.kernels(layer)) == 2 or _operation(call.path, layer, inputs[0]) != "dense":
                _window(layer, call.path)
            _activation(layer, call.path, [])
        elif not isinstance(call.layer, ActivationQuantizer):
            _read(call, inputs, output, iter(range(10**9)))


def _shaped(flow: dataflow.Dataflow) -> Iterator[tuple[dataflow.Call, list[Shape], Shape]]:
    """(call, shapes of its inputs, shape of its output), of one example; raises for a layer without a counterpart."""
    shapes = {value: shape for value, _, shape, _ in flow.inputs}
    for call in flow.calls:
        inputs = [shapes[value] for value in call.inputs]
        shapes[call.output] = _output_shape(call, [(None, *shape) for shape in inputs])
        yield call, inputs, shapes[call.output]


def _output_shape(call: dataflow.Call, inputs: list[Shape]) -> Shape:
    if reason := why_not(call.path, call.layer):  # before asking for its shape, which a composite layer does not know
        raise ValueError(reason)
    if len(inputs) > 1 or isinstance(call.layer, (_LAYERS.Add, _LAYERS.Multiply, _LAYERS.Concatenate)):
        shape = call.layer.compute_output_shape(inputs)
    else:
        shape = call.layer.compute_output_shape(inputs[0])
    if isinstance(walking.unwrapped(call.layer), _LAYERS.EinsumDense):  # it may leave open what its input knows
        shape = (*inputs[0][:-1], shape[-1])
    return tuple(shape)[1:]


def unsupported(path: str, layer: keras.layers.Layer, why: str = "") -> ValueError:
    """The error for a layer that has no counterpart in the file."""
    layer = getattr(layer, "quantized_layer", layer)
    return ValueError(
        f"Layer {path!r} of class {type(layer).__name__} cannot be exported to TFLite{': ' + why if why else ''}. "
        f"Use fliqs_tf.export.onnx or fliqs_tf.export.packed, or tf.lite.TFLiteConverter for a float file."
    )


def why_not(path: str, layer: keras.layers.Layer) -> str:
    """Why a layer has no counterpart in the file, whatever its formats and shapes; "" if it may have one."""
    inner = walking.unwrapped(layer)
    kernels = layer_types.kernels(inner)
    try:
        if len(kernels) == 1:
            _operation(path, inner, None)
        known = (*_READERS, ActivationQuantizer, _LAYERS.InputLayer)
        if not kernels and type(inner) not in known:
            raise unsupported(path, inner)
    except ValueError as error:
        return str(error)
    return ""


def _read(call: dataflow.Call, inputs: list[Shape], output: Shape, fresh: Iterator[int]) -> list[Step]:
    """The steps of one call."""
    layer, base = call.layer, (call.path, call.inputs, call.output, (*inputs, output))
    if isinstance(layer, Quantized):
        return _read_quantized(call, inputs, output, fresh)
    if isinstance(layer, ActivationQuantizer):
        return [Step("quantize", *base, options={"scale": activation_scale_of(layer, call.path)})]
    if layer_types.kernels(layer):
        return _linear_steps(call, layer, call.inputs[0], inputs[0], output, None, fresh)
    reader = _READERS.get(type(layer))
    if reader is None:
        raise unsupported(call.path, layer)
    kind, options = reader(layer, call.path, inputs)
    if kind in ("add", "multiply"):
        return _merging_steps(call, kind, inputs, output, fresh)
    shift = getattr(layer, "beta", None) if kind == "affine" else None
    return [Step(kind, *base, options=options, shift=shift)]


def _merging_steps(
    call: dataflow.Call, kind: str, inputs: list[Shape], output: Shape, fresh: Iterator[int]
) -> list[Step]:
    """An operation on several values. As in Keras, values of lower rank first get axes right after the batch axis."""
    rank = max(len(shape) for shape in inputs)
    made, values, shapes = [], list(call.inputs), [(*[1] * (rank - len(shape)), *shape) for shape in inputs]
    for i, (narrow, wide) in enumerate(zip(inputs, shapes)):
        if narrow != wide:
            values[i] = next(fresh)
            made.append(Step("reshape", call.path, (call.inputs[i],), values[i], (narrow, wide)))
    return [*made, Step(kind, call.path, tuple(values), call.output, (*shapes, output))]


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


def _read_quantized(call: dataflow.Call, inputs: list[Shape], output: Shape, fresh: Iterator[int]) -> list[Step]:
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
    return made + _linear_steps(call, layer.layer, value, inputs[0], output, layer, fresh)


def _linear_steps(
    call: dataflow.Call,
    layer: keras.layers.Layer,
    value: int,
    shape: Shape,
    output: Shape,
    quantized: Quantized | None,
    fresh: Iterator[int],
) -> list[Step]:
    """A layer with one kernel, or the two of a separable convolution, and its activation."""
    name = commuting.activation(layer)
    kernels = layer_types.kernels(layer)
    quantizers: Sequence[WeightQuantizer | None] = [None] * len(kernels)
    if quantized is not None:
        quantizers = quantized.weight_quantizers
    made = []
    if len(kernels) == 2:
        middle_shape = (*output[:-1], shape[-1] * layer.depth_multiplier)
        middle = next(fresh)
        first = _linear(call.path, layer, kernels[0], quantizers[0], "depthwise", with_bias=False)
        options = _window(layer, call.path)
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
        operation = _operation(call.path, layer, shape)
        second = _linear(call.path, layer, kernels[0], quantizers[0], operation, with_bias=True)
        options = {} if operation == "dense" else _window(layer, call.path)
    fused = name if name in ("linear", "relu", "relu6") else "linear"
    result = call.output if fused == name else next(fresh)
    shift = getattr(layer, "bias", None)
    base = (call.path, (value,), result, (shape, output))
    made.append(Step("linear", *base, activation=fused, options=options, linear=second, shift=shift))
    if fused != name:
        kind, options = _activation(layer, call.path, [])
        made.append(Step(kind, call.path, (result,), call.output, (output, output), options=options))
    return made


def _operation(path: str, layer: keras.layers.Layer, shape: Shape | None) -> str:
    if isinstance(layer, _LAYERS.Dense):
        return "dense"
    if isinstance(layer, _LAYERS.EinsumDense):
        left, result = layer.equation.replace(" ", "").split("->")
        left, kernel = left.split(",")
        if len(kernel) == 2 and left[:-1] + kernel[1] == result and left[-1] == kernel[0] and kernel[1] not in left:
            return "dense"
        raise unsupported(path, layer, f"the equation {layer.equation!r} is no matrix product over the last axis")
    if isinstance(layer, _LAYERS.DepthwiseConv2D):
        return "depthwise"
    if type(layer) is _LAYERS.Conv2D:
        if layer.groups > 1:
            raise unsupported(path, layer, "grouped convolutions have no fast integer kernels")
        return "conv"
    raise unsupported(path, layer)


def _window(layer: keras.layers.Layer, path: str) -> dict[str, Any]:
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise unsupported(path, layer, "it has data_format 'channels_first', and LiteRT's kernels have channels last")
    strides = layer.strides if isinstance(layer.strides, (tuple, list)) else (layer.strides,) * 2
    dilation = getattr(layer, "dilation_rate", 1)
    dilation = dilation if isinstance(dilation, (tuple, list)) else (dilation,) * 2
    if layer.padding not in ("same", "valid"):
        raise unsupported(path, layer, f"padding {layer.padding!r}")
    return {"strides": tuple(strides), "padding": layer.padding, "dilation": tuple(dilation)}


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
        bias = _array(layer.bias).reshape(channels)
    return Linear(operation, fmt, codes, scale, values, bias)


# ---- layers without kernels: layer, path, input shapes -> (kind, options)


def _batch_norm(layer: keras.layers.BatchNormalization, path: str, inputs: list[Shape]) -> Read:
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis
    if axis not in (-1, len(inputs[0])):
        raise unsupported(path, layer, f"it normalizes axis {axis}, not the last one")
    gain = 1 / np.sqrt(_array(layer.moving_variance) + layer.epsilon)
    if layer.gamma is not None:
        gain = gain * _array(layer.gamma)
    offset = -_array(layer.moving_mean) * gain
    if layer.beta is not None:
        offset = offset + _array(layer.beta)
    return "affine", {"gain": gain, "offset": offset}


def _array(variable: tf.Variable) -> np.ndarray:
    return np.asarray(float_value(variable), np.float64)


def _rescaling(layer: keras.layers.Rescaling, path: str, inputs: list[Shape]) -> Read:
    channels = inputs[0][-1]
    if channels is None:
        raise unsupported(path, layer, "its number of channels is open")
    gain, offset = (np.broadcast_to(np.asarray(v, np.float64), (channels,)) for v in (layer.scale, layer.offset))
    return "affine", {"gain": gain, "offset": offset}


def _activation(layer: keras.layers.Layer, path: str, inputs: list[Shape]) -> Read:
    name = commuting.activation(layer)
    known = ("linear", "relu", "relu6", "softmax", "sigmoid", "tanh", "silu", "swish")
    if name not in known:
        raise unsupported(path, layer, f"no kernel for the activation {name!r}")
    return "activation", {"function": {"swish": "silu"}.get(name, name)}


def _softmax(layer: keras.layers.Softmax, path: str, inputs: list[Shape]) -> Read:
    if layer.axis not in (-1, len(inputs[0])):
        raise unsupported(path, layer, f"softmax over axis {layer.axis}, not the last one")
    return "activation", {"function": "softmax"}


def _pooling(kind: str) -> Reader:
    def read(layer: keras.layers.Layer, path: str, inputs: list[Shape]) -> Read:
        options = _window(layer, path)
        return kind, {**options, "size": tuple(layer.pool_size)}

    return read


def _global_pooling(kind: str) -> Reader:
    def read(layer: keras.layers.Layer, path: str, inputs: list[Shape]) -> Read:
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            raise unsupported(
                path, layer, "it has data_format 'channels_first', and LiteRT's kernels have channels last"
            )
        return kind, {"keepdims": bool(layer.keepdims)}

    return read


def _padding(layer: keras.layers.ZeroPadding2D, path: str, inputs: list[Shape]) -> Read:
    return "pad", {"padding": tuple(tuple(side) for side in layer.padding)}


def _upsampling(layer: keras.layers.UpSampling2D, path: str, inputs: list[Shape]) -> Read:
    if layer.interpolation != "nearest":
        raise unsupported(path, layer, f"interpolation {layer.interpolation!r}")
    return "upsample", {}


def _concatenation(layer: keras.layers.Concatenate, path: str, inputs: list[Shape]) -> Read:
    rank = len(inputs[0]) + 1
    axis = layer.axis % rank
    if axis == 0:
        raise unsupported(path, layer, "it joins along the batch axis")
    return "concatenate", {"axis": axis}


def _merging(kind: str) -> Reader:
    def read(layer: keras.layers.Layer, path: str, inputs: list[Shape]) -> Read:
        if len(inputs) < 2:
            raise unsupported(path, layer, "it has one input")
        return kind, {}

    return read


_READERS: dict[type, Reader] = {
    _LAYERS.BatchNormalization: _batch_norm,
    _LAYERS.Rescaling: _rescaling,
    _LAYERS.ReLU: _activation,
    _LAYERS.Activation: _activation,
    _LAYERS.Softmax: _softmax,
    _LAYERS.Add: _merging("add"),
    _LAYERS.Multiply: _merging("multiply"),
    _LAYERS.Concatenate: _concatenation,
    _LAYERS.MaxPooling2D: _pooling("max_pool"),
    _LAYERS.AveragePooling2D: _pooling("average_pool"),
    _LAYERS.GlobalAveragePooling2D: _global_pooling("mean"),
    _LAYERS.GlobalMaxPooling2D: _global_pooling("max"),
    _LAYERS.Flatten: lambda layer, path, inputs: ("reshape", {}),
    _LAYERS.Reshape: lambda layer, path, inputs: ("reshape", {}),
    _LAYERS.ZeroPadding2D: _padding,
    _LAYERS.UpSampling2D: _upsampling,
    **dict.fromkeys(ROUNDINGS, lambda layer, path, inputs: ("identity", {})),
    **{layer: lambda layer, path, inputs: ("identity", {}) for layer in commuting.IDENTITIES},
}


# ---- fewer steps


def _without_identities(found: list[Step], outputs: Container[int]) -> list[Step]:
    """Drops steps that return what they read, except those that make an output of the network."""
    same: dict[int, int] = {}
    kept = []
    for step in found:
        step.inputs = tuple(same.get(v, v) for v in step.inputs)
        is_identity = step.kind == "identity" or (step.kind == "activation" and step.options["function"] == "linear")
        if is_identity and step.output not in outputs:
            same[step.output] = step.inputs[0]
        else:
            kept.append(step)
    return kept


def _merged(found: list[Step], outputs: Container[int]) -> list[Step]:
    """Merges batch normalization into the linear step before it, and ReLU into the linear, affine or adding step."""
    counts: dict[int, int] = {}
    for step in found:
        for value in step.inputs:
            counts[value] = counts.get(value, 0) + 1
    made_by: dict[int, Step] = {}
    kept = []
    for step in found:
        before = made_by.get(step.inputs[0])
        alone = counts[step.inputs[0]] == 1 and step.inputs[0] not in outputs
        if before is not None and alone and before.activation == "linear" and _takes(before, step):
            if step.kind == "affine":
                if before.kind == "linear":
                    before.linear = before.kernel.then(step.options["gain"], step.options["offset"])
                    before.shift = step.shift
                else:
                    gain, offset = before.options["gain"], before.options["offset"]
                    before.options = {
                        "gain": gain * step.options["gain"],
                        "offset": offset * step.options["gain"] + step.options["offset"],
                    }
            else:
                before.activation = step.options["function"]
            before.last = step.last
            del made_by[before.output]
            before.output = step.output
            before.shapes = (*before.shapes[:-1], step.shapes[-1])
            made_by[before.output] = before
            continue
        kept.append(step)
        made_by[step.output] = step
    return kept


def _takes(before: Step, step: Step) -> bool:
    if step.kind == "affine":
        return before.kind in ("linear", "affine")
    fusable = step.kind == "activation" and step.options["function"] in ("relu", "relu6")
    return fusable and before.kind in ("linear", "affine", "add")


# ---- biases


def round_biases(graph: ModelGraph) -> None:
    """Moves biases to multiples of (input scale * weight scale), which is what int32 biases are.

    Each moves by at most half a multiple. That is far less than quantization changes an output by; but if only the file
    rounded its biases, its outputs would differ. Changes the biases of layers and the betas of batch normalization in
    place. Inputs of layers in float formats are no longer rounded: the file computes these layers in float32.

    Args:
      graph: Of a deployed model with boundary quantizers.
    """
    for _, layer in graph.of_type(Quantized):
        for quantizer in layer.activation_quantizers:
            if not boundaries.is_integer(deployed.format_of(quantizer)):
                quantizer.pass_through()
    network = steps(graph)
    activation_scales = {step.output: step.options["scale"] for step in network.steps if step.kind == "quantize"}
    moves: dict[int, tuple] = {}  # id of a variable -> it, and how far each call of its layer would move it
    for step in network.steps:
        if step.shift is None or not all(
            v in activation_scales and boundaries.is_integer(activation_scales[v].format) for v in step.inputs
        ):
            continue
        linear = ones((1, 1), len(step.options["gain"])).then(**step.options) if step.kind == "affine" else step.kernel
        if linear.codes is not None:
            unit = float(activation_scales[step.inputs[0]].int8_scale) * linear.scale
            moved = np.rint(linear.bias / unit) * unit - linear.bias
            moves.setdefault(id(step.shift), (step.shift, []))[1].append(moved)
    for shift, wanted in moves.values():
        if all(np.array_equal(moved, wanted[0]) for moved in wanted):  # else a shared layer at several scales
            shift.assign(np.asarray(_array(shift) + wanted[0].reshape(shift.shape), np.float32))
