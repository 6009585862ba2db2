"""Layer classes: kernels, tables, products, and the MACs of a call. The only module that knows them.

A MAC is one multiply-add. Counts are per example. Biases and normalization do not count, products of two activations
only where they are quantized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from fliqs_tf._keras import keras

_LAYERS = keras.layers
_ATTENTION = {_LAYERS.MultiHeadAttention, getattr(_LAYERS, "GroupQueryAttention", _LAYERS.MultiHeadAttention)}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight that is quantized: attribute of its layer, and the axes that hold output channels."""

    attribute: str
    channel_axes: tuple[int, ...]


def kernels(layer: keras.layers.Layer) -> tuple[Kernel, ...]:
    """The kernels of a layer; () for a class that is not known, or that has none.

    Subclasses of the known classes do not count as known: their `call` may do anything.
    """
    found = _KERNELS.get(type(layer))
    return () if found is None else found(layer)


def table(layer: keras.layers.Layer) -> tuple[Kernel, ...]:
    """The table of an embedding, whose rows have a scale each; () for any other layer."""
    return (Kernel("embeddings", (0,)),) if type(layer) is _LAYERS.Embedding else ()


def products(layer: keras.layers.Layer) -> tuple[tuple[str, str, bool], ...]:
    """The products of activations in an attention layer that was called; () for any other layer.

    Returns:
      (name, einsum equation, True if the operand made of keys or values comes first in it). "scores" are query x key,
      "context" is probabilities x value.
    """
    if type(layer) not in _ATTENTION or not hasattr(layer, "_combine_equation"):
        return ()
    scores, context = layer._dot_product_equation, layer._combine_equation
    return ("scores", scores, type(layer) is _LAYERS.MultiHeadAttention), ("context", context, False)


def is_product(layer: keras.layers.Layer) -> bool:
    """True for a product of activations that has a layer of its own, since it is quantized."""
    return getattr(layer, "is_product", False)


def kernels_or_table(layer: keras.layers.Layer) -> tuple[Kernel, ...]:
    """What `Quantized` quantizes of a layer."""
    return kernels(layer) or table(layer)


def _einsum_channel_axes(layer: keras.layers.EinsumDense) -> tuple[int, ...]:
    kernel, output = layer.equation.replace(" ", "").split(",")[1].split("->")
    return tuple(i for i, label in enumerate(kernel) if label in output)


_KERNELS: dict[type, Callable[[keras.layers.Layer], tuple[Kernel, ...]]] = {
    _LAYERS.Dense: lambda layer: (Kernel("kernel", (-1,)),),
    _LAYERS.EinsumDense: lambda layer: (Kernel("kernel", _einsum_channel_axes(layer)),),
    _LAYERS.Conv1D: lambda layer: (Kernel("kernel", (-1,)),),
    _LAYERS.Conv2D: lambda layer: (Kernel("kernel", (-1,)),),
    _LAYERS.Conv2DTranspose: lambda layer: (Kernel("kernel", (-2,)),),
    _LAYERS.DepthwiseConv2D: lambda layer: (
        # tf_keras names the attribute after the operation.
        Kernel("kernel" if hasattr(layer, "kernel") else "depthwise_kernel", (-2, -1)),
    ),
    _LAYERS.SeparableConv2D: lambda layer: (Kernel("depthwise_kernel", (-2, -1)), Kernel("pointwise_kernel", (-1,))),
}


def macs(layer: keras.layers.Layer, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    """MACs of one call, from the shapes of its input and output."""
    if is_product(layer):
        return layer.macs(inputs, outputs)
    if table(layer):
        return 0
    if isinstance(layer, _LAYERS.EinsumDense):
        kernel, output = layer.equation.replace(" ", "").split(",")[1].split("->")
        contracted = [size for label, size in zip(kernel, layer.kernel.shape) if label not in output]
        return math.prod(outputs) * math.prod(contracted)
    if isinstance(layer, _LAYERS.Dense):
        return math.prod(outputs) * inputs[-1]
    in_channels = inputs[1] if layer.data_format == "channels_first" else inputs[-1]
    window = math.prod(layer.kernel_size)
    if isinstance(layer, _LAYERS.Conv2DTranspose):
        return math.prod(inputs) * window * layer.filters
    if isinstance(layer, _LAYERS.DepthwiseConv2D):
        return math.prod(outputs) * window
    if isinstance(layer, _LAYERS.SeparableConv2D):
        middle = in_channels * layer.depth_multiplier * math.prod(outputs) // layer.filters
        return middle * (window + layer.filters)
    return math.prod(outputs) * window * (in_channels // layer.groups)
