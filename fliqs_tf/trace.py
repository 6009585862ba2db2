"""Layers to shapes, MACs and weight counts: the only module that knows layer classes.

A MAC is one multiply-add. Counts are per example. Biases, normalization and products of two activations do not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import tensorflow as tf

from fliqs_tf._keras import keras

_LAYERS = keras.layers


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight that is quantized: attribute of its layer, and the axes that hold output channels."""

    attribute: str
    channel_axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TracedLayer:
    """A layer whose kernel multiplies its input.

    Attributes:
      path: Name of the layer, with the names of the models around it: "encoder/conv1".
      layer: The Keras layer.
      macs: MACs per example, over all calls of the layer.
      weights: Number of kernel entries.
    """

    path: str
    layer: keras.layers.Layer = dataclasses.field(compare=False)
    macs: int
    weights: int


def kernels(layer: keras.layers.Layer) -> tuple[Kernel, ...]:
    """The kernels of a layer; () for a class that is not known, or that has none.

    Subclasses of the known classes do not count as known: their `call` may do anything.
    """
    return _KERNELS.get(type(layer), lambda layer: ())(layer)


def _einsum_channel_axes(layer) -> tuple[int, ...]:
    kernel, output = layer.equation.replace(" ", "").split(",")[1].split("->")
    return tuple(i for i, label in enumerate(kernel) if label in output)


_KERNELS = {
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


def _macs(layer, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    """MACs of one call, from the shapes of its input and output without the batch axis."""
    if isinstance(layer, _LAYERS.EinsumDense):
        kernel, output = layer.equation.replace(" ", "").split(",")[1].split("->")
        contracted = [size for label, size in zip(kernel, layer.kernel.shape) if label not in output]
        return math.prod(outputs) * math.prod(contracted)
    if isinstance(layer, _LAYERS.Dense):
        return math.prod(outputs) * inputs[-1]
    channels_first = layer.data_format == "channels_first"
    in_channels = inputs[0] if channels_first else inputs[-1]
    window = math.prod(layer.kernel_size)
    if isinstance(layer, _LAYERS.Conv2DTranspose):
        return math.prod(inputs) * window * layer.filters
    if isinstance(layer, _LAYERS.DepthwiseConv2D):
        return math.prod(outputs) * window
    if isinstance(layer, _LAYERS.SeparableConv2D):
        middle = in_channels * layer.depth_multiplier * math.prod(outputs) // layer.filters
        return middle * (window + layer.filters)
    return math.prod(outputs) * window * (in_channels // layer.groups)


def is_network(layer: keras.layers.Layer) -> bool:
    """True for a Functional or Sequential model, whose layers can be replaced; a subclassed model is one layer."""
    return isinstance(layer, keras.Model) and bool(getattr(layer, "inputs", None))


def walk(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """(path, layer) of every layer of a model, into nested models, each layer once, in the model's order."""
    seen = set()

    def visit(model, prefix):
        for layer in model.layers:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            if is_network(layer):
                yield from visit(layer, f"{prefix}{layer.name}/")
            else:
                yield f"{prefix}{layer.name}", layer

    return visit(model, prefix)


def trace(model: keras.Model, input_shape=None) -> list[TracedLayer]:
    """Every layer with a kernel, in the model's order, with its MACs and weights.

    The model is called once, symbolically, and each layer is counted with the shapes that reach it, at every call.

    Args:
      model: A built model.
      input_shape: Shape of one example, without the batch axis (a list of shapes for several inputs). Needed only if
        the model leaves a size open.

    Raises:
      ValueError: The model is not built, or leaves a size open and no `input_shape` is given.
    """
    found = [(path, layer) for path, layer in walk(model) if kernels(_unwrapped(layer))]
    with _recording([layer for _, layer in found]) as calls:
        specs = _input_specs(model, input_shape)
        tf.function(lambda *inputs: model(_like_inputs(model, inputs), training=False)).get_concrete_function(*specs)
    return [
        TracedLayer(
            path,
            layer,
            sum(_macs(layer, i, o) for i, o in calls[id(called)]),
            sum(math.prod(getattr(layer, k.attribute).shape) for k in kernels(layer)),
        )
        for path, called in found
        for layer in (_unwrapped(called),)
    ]


def _unwrapped(layer):
    """The layer inside a quantized one; other wrappers (TimeDistributed) stay what they are."""
    return getattr(layer, "quantized_layer", layer)


@contextlib.contextmanager
def _recording(layers):
    """Within it each call of a layer appends its (input, output) shapes, without the batch axis."""
    calls = {id(layer): [] for layer in layers}

    def recorder(layer, call):
        def recorded(inputs, *args, **kwargs):
            outputs = call(inputs, *args, **kwargs)
            calls[id(layer)].append((tuple(inputs.shape[1:]), tuple(outputs.shape[1:])))
            return outputs

        return recorded

    with overridden_calls({layer: recorder(layer, layer.call) for layer in layers}):
        yield calls


@contextlib.contextmanager
def overridden_calls(overrides: dict):
    """Within it, each layer that is a key runs its value in place of its `call`."""
    for layer, call in overrides.items():
        object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        for layer in overrides:
            object.__delattr__(layer, "call")


def _like_inputs(model, tensors):
    # A Sequential model of Keras 3 has no `input`.
    return tf.nest.pack_sequence_as(getattr(model, "input", model.inputs[0]), tensors)


def _input_specs(model, input_shape) -> list[tf.TensorSpec]:
    inputs = tf.nest.flatten(model.inputs)
    shapes = [tuple(i.shape[1:]) for i in inputs]
    if input_shape is not None:
        shapes = [tuple(input_shape)] if len(inputs) == 1 else [tuple(s) for s in input_shape]
    for shape, tensor in zip(shapes, inputs):
        if None in shape:
            raise ValueError(
                f"The input {tensor.name!r} of model {model.name!r} has the open shape {shape}: MACs depend on it. "
                f"Give the shape of one example: input_shape=(224, 224, 3), for instance."
            )
    return [tf.TensorSpec((1, *shape), i.dtype) for shape, i in zip(shapes, inputs)]


def quantizable(model: keras.Model) -> list[tuple[str, keras.layers.Layer]]:
    """(path, layer) of the layers that have kernels."""
    return [(path, layer) for path, layer in walk(model) if kernels(layer)]


def left_in_float(model: keras.Model) -> list[tuple[str, keras.layers.Layer]]:
    """(path, layer) of layers that multiply by weights but whose class is not known, such as LSTM or Embedding."""
    return [
        (path, layer)
        for path, layer in walk(model)
        if not kernels(layer) and not hasattr(layer, "quantized_layer") and any(len(w.shape) > 1 for w in layer.weights)
    ]
