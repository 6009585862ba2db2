"""Layers without kernels as steps: the kind and the options of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import float_value, keras
from fliqs_tf.graph import commuting
from fliqs_tf.layers.requantize import ROUNDINGS

_LAYERS = keras.layers
Shape: TypeAlias = tuple[int | None, ...]
Shapes: TypeAlias = Sequence[Shape]
Read: TypeAlias = tuple[str, dict[str, Any]]
"""(kind, options) of a `Step`."""
Reader: TypeAlias = Callable[[keras.layers.Layer, str, Shapes], Read]
"""(layer, path, shapes of its inputs) -> its step."""


def knows(cls: type) -> bool:
    """True for a class of layers without kernels that has a counterpart in a TFLite file, for some options at least."""
    return cls in _READERS


def read(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
    """Kind and options of the step that a layer is.

    Args:
      layer: A layer without kernels.
      path: Its path, for errors.
      inputs: Shapes of its inputs, of one example.

    Returns:
      (kind, options) of the `Step`.

    Raises:
      ValueError: It has no counterpart in a TFLite file; says why.
    """
    if not knows(type(layer)):
        raise unsupported(path, layer)
    return _READERS[type(layer)](layer, path, inputs)


def unsupported(path: str, layer: keras.layers.Layer, why: str = "") -> ValueError:
    """The error for a layer that has no counterpart in a TFLite file."""
    layer = getattr(layer, "quantized_layer", layer)
    return ValueError(
        f"Layer {path!r} of class {type(layer).__name__} cannot be exported to TFLite{': ' + why if why else ''}. "
        f"Use fliqs_tf.export.onnx or fliqs_tf.export.packed, or tf.lite.TFLiteConverter for a float file."
    )


def window(layer: keras.layers.Layer, path: str) -> dict[str, Any]:
    """Options of a convolution or pooling: strides, padding, dilation.

    Raises:
      ValueError: LiteRT has no kernel for them; names the layer.
    """
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise unsupported(path, layer, "data_format is 'channels_first'; LiteRT's kernels have channels last")
    strides = layer.strides if isinstance(layer.strides, (tuple, list)) else (layer.strides,) * 2
    dilation = getattr(layer, "dilation_rate", 1)
    dilation = dilation if isinstance(dilation, (tuple, list)) else (dilation,) * 2
    if layer.padding not in ("same", "valid"):
        raise unsupported(path, layer, f"padding {layer.padding!r}")
    return {"strides": tuple(strides), "padding": layer.padding, "dilation": tuple(dilation)}


def _batch_norm(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
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


def _rescaling(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
    channels = inputs[0][-1]
    if channels is None:
        raise unsupported(path, layer, "its number of channels is open")
    gain, offset = (np.broadcast_to(np.asarray(v, np.float64), (channels,)) for v in (layer.scale, layer.offset))
    return "affine", {"gain": gain, "offset": offset}


def activation(layer: keras.layers.Layer, path: str, inputs: Shapes = ()) -> Read:
    """The activation that a layer has, or is, as a step of its own; arguments, result and errors as for `read`."""
    name = commuting.activation(layer)
    known = ("linear", "relu", "relu6", "softmax", "sigmoid", "tanh", "silu", "swish")
    if name not in known:
        raise unsupported(path, layer, f"no kernel for the activation {name!r}")
    return "activation", {"function": {"swish": "silu"}.get(name, name)}


def _softmax(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
    if layer.axis not in (-1, len(inputs[0])):
        raise unsupported(path, layer, f"softmax over axis {layer.axis}, not the last one")
    return "activation", {"function": "softmax"}


def _pooling(kind: str) -> Reader:
    def read(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
        options = window(layer, path)
        return kind, {**options, "size": tuple(layer.pool_size)}

    return read


def _global_pooling(kind: str) -> Reader:
    def read(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            raise unsupported(path, layer, "data_format is 'channels_first'; LiteRT's kernels have channels last")
        return kind, {"keepdims": bool(layer.keepdims)}

    return read


def _padding(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
    return "pad", {"padding": tuple(tuple(side) for side in layer.padding)}


def _upsampling(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
    if layer.interpolation != "nearest":
        raise unsupported(path, layer, f"interpolation {layer.interpolation!r}")
    return "upsample", {}


def _concatenation(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
    rank = len(inputs[0]) + 1
    axis = layer.axis % rank
    if axis == 0:
        raise unsupported(path, layer, "it joins along the batch axis")
    return "concatenate", {"axis": axis}


def _merging(kind: str) -> Reader:
    def read(layer: keras.layers.Layer, path: str, inputs: Shapes) -> Read:
        if len(inputs) < 2:
            raise unsupported(path, layer, "it has one input")
        return kind, {}

    return read


_READERS: dict[type, Reader] = {
    _LAYERS.BatchNormalization: _batch_norm,
    _LAYERS.Rescaling: _rescaling,
    _LAYERS.ReLU: activation,
    _LAYERS.Activation: activation,
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
