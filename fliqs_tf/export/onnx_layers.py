"""Keras layers as ONNX nodes: one function per kind of layer, and the table of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.export.onnx_formats import Weight, float_weight, quantized_input
from fliqs_tf.export.onnx_graph import OnnxBuilder, Value
from fliqs_tf.graph import copies
from fliqs_tf.layers.quantizers import ActivationQuantizer

_LAYERS = keras.layers


# ---- activations


def _hard_sigmoid(builder: OnnxBuilder, name: str) -> str:
    return builder.node("HardSigmoid", [name], alpha=1 / 6 if IS_KERAS_3 else 0.2, beta=0.5)


def _unary(operation: str, **attributes: float) -> Callable[[OnnxBuilder, str], str]:
    return lambda builder, name: builder.node(operation, [name], **attributes)


_ACTIVATIONS: dict[str, Callable[[OnnxBuilder, str], str]] = {
    "relu": _unary("Relu"),
    "relu6": lambda builder, name: builder.node(
        "Clip", [name, builder.constant(np.float32(0)), builder.constant(np.float32(6))]
    ),
    "sigmoid": _unary("Sigmoid"),
    "tanh": _unary("Tanh"),
    "elu": _unary("Elu"),
    "selu": _unary("Selu", alpha=1.6732632423543772, gamma=1.0507009873554805),
    "gelu": _unary("Gelu"),
    "softplus": _unary("Softplus"),
    "softsign": _unary("Softsign"),
    "exponential": _unary("Exp"),
    "hard_sigmoid": _hard_sigmoid,
    "leaky_relu": _unary("LeakyRelu", alpha=0.2),
    "silu": lambda builder, name: builder.node("Mul", [name, builder.node("Sigmoid", [name])]),
    "hard_silu": lambda builder, name: builder.node("Mul", [name, _hard_sigmoid(builder, name)]),
}
_ACTIVATIONS["swish"], _ACTIVATIONS["hard_swish"] = _ACTIVATIONS["silu"], _ACTIVATIONS["hard_silu"]
_NONNEGATIVE = ("relu", "relu6", "sigmoid", "hard_sigmoid", "softplus", "exponential")


def activation(builder: OnnxBuilder, function: Callable, x: Value) -> Value:
    """A value after an activation function of Keras.

    Args:
      builder: The file under construction; `builder.path` is the layer, for names and errors.
      function: `layer.activation`.
      x: The value before it.

    Returns:
      The value after it; `x` itself for "linear".

    Raises:
      ValueError: The exporter does not support the function; names the layer, and the functions that it supports.
    """
    name = copies.function_name(function)
    if name == "linear":
        return x
    if name in ("softmax", "log_softmax"):
        return dataclasses.replace(
            builder.plain(x, "Softmax" if name == "softmax" else "LogSoftmax", axis=-1),
            is_nonnegative=name == "softmax",
        )
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"Layer {builder.path!r} has the activation {name!r}, which the ONNX exporter does not support. Supported: "
            f"{', '.join(sorted([*_ACTIVATIONS, 'linear', 'softmax', 'log_softmax']))}."
        )
    return builder.each([x], lambda tensor: _ACTIVATIONS[name](builder, tensor), name in _NONNEGATIVE)


def _relu(builder: OnnxBuilder, layer: keras.layers.ReLU, x: Value) -> Value:
    most, slope, threshold = layer.max_value, float(layer.negative_slope), float(layer.threshold)
    if threshold:
        raise ValueError(
            f"Layer {builder.path!r} is a ReLU with a threshold, which the ONNX exporter does not support."
        )

    def make(name: str) -> str:
        if slope:
            name = builder.node("LeakyRelu", [name], alpha=slope)
        if most is not None:
            bounds = ["" if slope else builder.constant(np.float32(0)), builder.constant(np.float32(most))]
            return builder.node("Clip", [name, *bounds])
        return name if slope else builder.node("Relu", [name])

    return builder.each([x], make, not slope)


# ---- layers with kernels: (builder, layer, x, weights, quantizer between two kernels) -> value without activation


def _bias(builder: OnnxBuilder, layer: keras.layers.Layer) -> list[str]:
    return [builder.constant(np.asarray(layer.bias), "bias")] if layer.use_bias else []


def _padding(layer: keras.layers.Layer, sizes: Sequence[int]) -> dict[str, Any]:
    over = [(size - 1) * d for size, d in zip(sizes, _per_axis(getattr(layer, "dilation_rate", 1), len(sizes)))]
    if layer.padding == "causal":
        return {"pads": [over[0], 0]}
    if layer.padding == "same" and over != [size - 1 for size in sizes]:  # strides are 1; ONNX's SAME has no dilation
        return {"pads": [o // 2 for o in over] + [o - o // 2 for o in over]}
    return {"auto_pad": "SAME_UPPER" if layer.padding == "same" else "VALID"}


def _per_axis(number: int | tuple[int, ...] | list[int], axes: int) -> list[int]:
    return list(number) if isinstance(number, (tuple, list)) else [number] * axes


def _conv(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value, weights: Mapping[str, Weight], _: None) -> Value:
    (kernel,) = weights.values()
    move = lambda k: k.transpose(k.ndim - 1, k.ndim - 2, *range(k.ndim - 2))  # noqa: E731
    inputs = [float_weight(builder, kernel, "kernel", move), *_bias(builder, layer)]
    return builder.moved(
        x, "Conv", inputs, group=layer.groups, strides=list(layer.strides), dilations=list(layer.dilation_rate),
        **_padding(layer, layer.kernel_size),
    )  # fmt: skip


def _depthwise_move(k: np.ndarray) -> np.ndarray:
    return k.transpose(2, 3, 0, 1).reshape(-1, 1, *k.shape[:2])


def _depthwise(
    builder: OnnxBuilder, layer: keras.layers.Layer, x: Value, weights: Mapping[str, Weight], _: None
) -> Value:
    (kernel,) = weights.values()
    shape = (kernel if isinstance(kernel, np.ndarray) else kernel.values).shape
    inputs = [float_weight(builder, kernel, "kernel", _depthwise_move), *_bias(builder, layer)]
    return builder.moved(
        x, "Conv", inputs, group=shape[2], strides=_per_axis(layer.strides, 2),
        dilations=_per_axis(layer.dilation_rate, 2), **_padding(layer, layer.kernel_size),
    )  # fmt: skip


def _separable(
    builder: OnnxBuilder,
    layer: keras.layers.Layer,
    x: Value,
    weights: Mapping[str, Weight],
    middle: ActivationQuantizer | None,
) -> Value:
    kernel = weights["depthwise_kernel"]
    shape = (kernel if isinstance(kernel, np.ndarray) else kernel.values).shape
    inputs = [float_weight(builder, kernel, "depthwise_kernel", _depthwise_move)]
    x = builder.moved(
        x, "Conv", inputs, group=shape[2], strides=_per_axis(layer.strides, 2),
        dilations=_per_axis(layer.dilation_rate, 2), **_padding(layer, layer.kernel_size),
    )  # fmt: skip
    if middle is not None:
        x = quantized_input(builder, x, middle)
    pointwise = float_weight(
        builder, weights["pointwise_kernel"], "pointwise_kernel", lambda k: k.transpose(3, 2, 0, 1)
    )
    return builder.moved(x, "Conv", [pointwise, *_bias(builder, layer)])


def _conv_transpose(
    builder: OnnxBuilder, layer: keras.layers.Layer, x: Value, weights: Mapping[str, Weight], _: None
) -> Value:
    if layer.output_padding is not None or _per_axis(layer.dilation_rate, 2) != [1, 1]:
        raise ValueError(f"Layer {builder.path!r} has output_padding or dilation, unsupported by the ONNX exporter.")
    (kernel,) = weights.values()
    inputs = [float_weight(builder, kernel, "kernel", lambda k: k.transpose(3, 2, 0, 1)), *_bias(builder, layer)]
    strides = _per_axis(layer.strides, 2)
    # A transposed convolution is the gradient of a convolution: its output is as large as that one's input.
    over = [k - s for k, s in zip(layer.kernel_size, strides)]
    before = [max(o, 0) // 2 if layer.padding == "same" else 0 for o in over]
    after = [max(o, 0) - b if layer.padding == "same" else 0 for o, b in zip(over, before)]
    return builder.moved(
        x, "ConvTranspose", inputs, strides=strides, pads=[*before, *after], output_padding=[max(-o, 0) for o in over]
    )


def _dense(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value, weights: Mapping[str, Weight], _: None) -> Value:
    # Neither MatMul nor Gemm with the kernel as it is: onnxruntime turns both into MatMulNBits, which by default rounds
    # the inputs of INT4 weights to eight bits.
    if x.rank == 2:
        kernel = float_weight(builder, weights["kernel"], "kernel", np.transpose)
        return builder.plain(x, "Gemm", [kernel, *_bias(builder, layer)], transB=1)
    kernel = float_weight(builder, weights["kernel"], "kernel")
    axes = "abcdefgh"[: x.rank - 1]
    return _product(builder, layer, x, kernel, f"{axes}y,yz->{axes}z")


def _einsum(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value, weights: Mapping[str, Weight], _: None) -> Value:
    equation = layer.equation.replace(" ", "")
    if "." in equation:
        raise ValueError(f"Layer {builder.path!r} has the equation {equation!r}; write it without '...'.")
    return _product(builder, layer, x, float_weight(builder, weights["kernel"], "kernel"), equation)


def _product(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value, kernel: str, equation: str) -> Value:
    name = builder.node("Einsum", [builder.last(x), kernel], equation=equation)
    result = Value(len(equation.split("->")[1]), last=name)
    bias = getattr(layer, "bias", None)
    if bias is None:
        return result
    return Value(result.rank, last=builder.node("Add", [name, builder.constant(np.asarray(bias), "bias")]))


# ---- layers without kernels: (builder, layer, *inputs) -> value


def _norm(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis
    if axis not in (-1, x.rank - 1):
        raise ValueError(f"Layer {builder.path!r} normalizes axis {axis}; the ONNX exporter supports only the last.")
    mean, variance = np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
    gamma = np.asarray(layer.gamma) if layer.scale else np.ones_like(mean)
    beta = np.asarray(layer.beta) if layer.center else np.zeros_like(mean)
    named = {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance}
    inputs = [builder.constant(array, what) for what, array in named.items()]
    return builder.moved(x, "BatchNormalization", inputs, epsilon=float(layer.epsilon))


def _layer_norm(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) and len(layer.axis) == 1 else layer.axis
    if axis not in (-1, x.rank - 1) or getattr(layer, "rms_scaling", False):
        raise ValueError(
            f"Layer {builder.path!r} is no plain normalization of its last axis; the ONNX exporter supports no other."
        )
    size = int((layer.gamma if layer.scale else layer.beta).shape[0]) if layer.scale or layer.center else None
    if size is None:
        raise ValueError(
            f"Layer {builder.path!r} has neither scale nor center, which the ONNX exporter does not support."
        )
    gamma = np.asarray(layer.gamma) if layer.scale else np.ones(size, np.float32)
    inputs = [builder.constant(gamma, "gamma")]
    if layer.center:
        inputs.append(builder.constant(np.asarray(layer.beta), "beta"))
    return builder.plain(x, "LayerNormalization", inputs, axis=-1, epsilon=float(layer.epsilon))


def _of_one_rank(builder: OnnxBuilder, layer: keras.layers.Layer, inputs: Sequence[Value]) -> list[Value]:
    """The inputs of a merging layer, all of one rank: Keras puts missing axes right after the batch axis.

    Operators between tensors, such as x + y, need nothing: they align axes at the end, as ONNX does.
    """
    rank = max(x.rank for x in inputs)
    if not isinstance(layer, _LAYERS.Layer):
        return list(inputs)
    return [
        x
        if x.rank == rank
        else builder.plain(x, "Unsqueeze", [builder.constant(np.arange(1, 1 + rank - x.rank))], rank)
        for x in inputs
    ]


def _merge(operation: str, keeps_sign: bool = True) -> Callable[..., Value]:
    def convert(builder: OnnxBuilder, layer: keras.layers.Layer, *inputs: Value) -> Value:
        def make(name: str, *others: str) -> str:
            for other in others:
                name = builder.node(operation, [name, other])
            return name

        return builder.each(
            _of_one_rank(builder, layer, inputs), make, keeps_sign and all(v.is_nonnegative for v in inputs)
        )

    return convert


def _average(builder: OnnxBuilder, layer: keras.layers.Layer, *inputs: Value) -> Value:
    is_nonnegative = all(v.is_nonnegative for v in inputs)
    return builder.each(
        _of_one_rank(builder, layer, inputs), lambda *names: builder.node("Mean", names), is_nonnegative
    )


def _concatenate(builder: OnnxBuilder, layer: keras.layers.Layer, *inputs: Value) -> Value:
    rank = inputs[0].rank
    axis = layer.axis % rank
    moved = rank > 2 and all(v.first for v in inputs)
    if moved:
        axis = {0: 0, rank - 1: 1}.get(axis, axis + 1)
    names = [builder.first(v) if moved else builder.last(v) for v in inputs]
    made, is_nonnegative = builder.node("Concat", names, axis=axis), all(v.is_nonnegative for v in inputs)
    if moved:
        return Value(rank, first=made, is_nonnegative=is_nonnegative)
    return Value(rank, last=made, is_nonnegative=is_nonnegative)


def _pool(operation: str, **attributes: Any) -> Callable[..., Value]:
    def convert(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
        sizes = _per_axis(layer.pool_size, x.rank - 2)
        made = builder.moved(
            x, operation, kernel_shape=sizes, strides=_per_axis(layer.strides, x.rank - 2), **_padding(layer, sizes),
            **attributes,
        )  # fmt: skip
        return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)

    return convert


def _global_pool(operation: str) -> Callable[..., Value]:
    def convert(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
        axes = builder.constant(np.arange(1, x.rank - 1))
        rank = x.rank if layer.keepdims else 2
        made = builder.plain(x, operation, [axes], rank=rank, keepdims=int(layer.keepdims))
        return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)

    return convert


def _same(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    return x


def _reshape(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    sizes = np.array([0, *layer.target_shape], np.int64)  # 0: as in the input
    made = builder.plain(x, "Reshape", [builder.constant(sizes)], rank=len(sizes))
    return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)


def _flatten(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    made = builder.plain(x, "Flatten", rank=2, axis=1)
    return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)


def _permute(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    return builder.plain(x, "Transpose", perm=[0, *layer.dims])


def _zero_padding(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    pads = layer.padding if isinstance(layer.padding[0], (tuple, list)) else [layer.padding]
    before, after = zip(*pads)
    sizes = np.array([0, *before, 0, 0, *after, 0], np.int64)
    made = builder.plain(x, "Pad", [builder.constant(sizes)])
    return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)


def _cropping(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    crops = layer.cropping if isinstance(layer.cropping[0], (tuple, list)) else [layer.cropping]
    starts = np.array([before for before, _ in crops], np.int64)
    ends = np.array([-after if after else np.iinfo(np.int64).max for _, after in crops], np.int64)
    axes = np.arange(1, 1 + len(crops))
    return builder.plain(x, "Slice", [builder.constant(array) for array in (starts, ends, axes)])


def _up_sampling(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    if layer.interpolation != "nearest":
        raise ValueError(
            f"Layer {builder.path!r} interpolates {layer.interpolation!r}; the ONNX exporter supports only 'nearest'."
        )
    scales = builder.constant(np.array([1, 1, *layer.size], np.float32))
    made = builder.moved(
        x, "Resize", ["", scales], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)


def _rescaling(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    scale, offset = (builder.constant(np.asarray(v, np.float32)) for v in (layer.scale, layer.offset))
    return Value(x.rank, last=builder.node("Add", [builder.node("Mul", [builder.last(x), scale]), offset]))


def _leaky(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    slope = layer.negative_slope if hasattr(layer, "negative_slope") else layer.alpha
    return builder.each([x], lambda name: builder.node("LeakyRelu", [name], alpha=float(slope)))


def _prelu(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    slope = builder.constant(np.asarray(layer.alpha), "alpha")
    return Value(x.rank, last=builder.node("PRelu", [builder.last(x), slope]))


def _softmax(builder: OnnxBuilder, layer: keras.layers.Layer, x: Value) -> Value:
    if not isinstance(layer.axis, int):
        raise ValueError(
            f"Layer {builder.path!r} is a softmax over several axes, which the ONNX exporter does not support."
        )
    return dataclasses.replace(builder.plain(x, "Softmax", axis=layer.axis), is_nonnegative=True)


# Operators between tensors (x + y), which Keras 3 records in place of layers, by the name of their class.
FUNCTIONS = {
    "Add": _merge("Add"),
    "Subtract": _merge("Sub", keeps_sign=False),
    "Multiply": _merge("Mul"),
    "Maximum": _merge("Max"),
    "Minimum": _merge("Min"),
}
CONVERTERS: dict[type, Callable[..., Value]] = {
    _LAYERS.Dense: _dense,
    _LAYERS.EinsumDense: _einsum,
    _LAYERS.Conv1D: _conv,
    _LAYERS.Conv2D: _conv,
    _LAYERS.DepthwiseConv2D: _depthwise,
    _LAYERS.SeparableConv2D: _separable,
    _LAYERS.Conv2DTranspose: _conv_transpose,
    _LAYERS.BatchNormalization: _norm,
    _LAYERS.LayerNormalization: _layer_norm,
    **{getattr(_LAYERS, name): convert for name, convert in FUNCTIONS.items()},
    _LAYERS.Average: _average,
    _LAYERS.Concatenate: _concatenate,
    _LAYERS.MaxPooling1D: _pool("MaxPool"),
    _LAYERS.MaxPooling2D: _pool("MaxPool"),
    _LAYERS.AveragePooling1D: _pool("AveragePool"),
    _LAYERS.AveragePooling2D: _pool("AveragePool"),
    _LAYERS.GlobalMaxPooling1D: _global_pool("ReduceMax"),
    _LAYERS.GlobalMaxPooling2D: _global_pool("ReduceMax"),
    _LAYERS.GlobalAveragePooling1D: _global_pool("ReduceMean"),
    _LAYERS.GlobalAveragePooling2D: _global_pool("ReduceMean"),
    _LAYERS.ReLU: _relu,
    _LAYERS.Activation: lambda builder, layer, x: activation(builder, layer.activation, x),
    _LAYERS.LeakyReLU: _leaky,
    _LAYERS.PReLU: _prelu,
    _LAYERS.ELU: lambda builder, layer, x: builder.each(
        [x], lambda name: builder.node("Elu", [name], alpha=float(layer.alpha))
    ),
    _LAYERS.Softmax: _softmax,
    _LAYERS.Flatten: _flatten,
    _LAYERS.Reshape: _reshape,
    _LAYERS.Permute: _permute,
    _LAYERS.ZeroPadding1D: _zero_padding,
    _LAYERS.ZeroPadding2D: _zero_padding,
    _LAYERS.Cropping1D: _cropping,
    _LAYERS.Cropping2D: _cropping,
    _LAYERS.UpSampling2D: _up_sampling,
    _LAYERS.Rescaling: _rescaling,
    **dict.fromkeys((_LAYERS.Dropout, _LAYERS.SpatialDropout1D, _LAYERS.SpatialDropout2D), _same),
    **dict.fromkeys((_LAYERS.GaussianNoise, _LAYERS.GaussianDropout, _LAYERS.ActivityRegularization), _same),
}
