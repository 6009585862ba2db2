"""Layers to shapes, MACs and weight counts: the only module that knows layer classes.

A MAC is one multiply-add. Counts are per example. Biases, normalization and products of two activations do not count.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import tensorflow as tf

from fliqs_tf._keras import keras, weights_of_attributes

_LAYERS = keras.layers
# Their layers run in loops, or with weights that are not their own: what they compute cannot be read off their calls.
_CLOSED = (_LAYERS.RNN, _LAYERS.TimeDistributed, _LAYERS.SpectralNormalization)


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
    """MACs of one call, from the shapes of its input and output."""
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


def is_network(layer: keras.layers.Layer) -> bool:
    """True for a Functional or Sequential model: a graph of layers. Other layers that hold layers are composite."""
    return isinstance(layer, keras.Sequential) or (
        isinstance(layer, keras.Model) and bool(getattr(layer, "inputs", None))
    )


def children(layer: keras.layers.Layer) -> list[tuple[str, keras.layers.Layer]]:
    """(name, layer) of the layers that a layer is directly made of, [] for one that stands for itself.

    The layers of a network go by their names. A composite layer holds its layers in attributes, or in lists, tuples and
    dicts there; they go by their names if these were given and are unique, else by where they are held: "blocks/3".
    """
    layer = inside(layer)
    if is_network(layer):
        root = composite_root(layer)
        if root is not None:
            return children(root)
        return [(child.name, child) for child in map(content, layer.layers)]
    if hasattr(layer, "quantized_layer") or kernels(layer) or isinstance(layer, _CLOSED):
        return []
    found = [pair for attribute, value in holders(layer) for pair in held(attribute, value)]
    given = collections.Counter(child.name for child in {id(child): child for _, child in found}.values())
    return [(place if given[child.name] > 1 or _is_automatic(child) else child.name, child) for place, child in found]


def is_annotation(layer: keras.layers.Layer) -> bool:
    """True for what TensorFlow Model Optimization puts around a layer that is to be quantized (known by its name:
    that package is large, and need not be there)."""
    return type(layer).__name__ == "QuantizeAnnotate"


def content(layer: keras.layers.Layer) -> keras.layers.Layer:
    """What a wrapper of TensorFlow Model Optimization stands for: the layer that it annotates, or the `Quantized` that
    computes in it. Any other layer stands for itself."""
    if is_annotation(layer):
        return layer.layer
    return getattr(getattr(layer, "quantize_config", None), "quantized", None) or layer


def annotations(network: keras.Model, prefix: str = "") -> dict[str, object]:
    """Layer path -> its `QuantizeConfig` or None, of the layers that TensorFlow Model Optimization annotated."""
    found = {}
    for layer in network.layers:
        if is_annotation(layer):
            found[f"{prefix}{layer.layer.name}"] = layer.quantize_config
        elif is_network(layer):
            found |= annotations(layer, f"{prefix}{layer.name}/")
    return found


def holders(layer: keras.layers.Layer) -> list[tuple[str, object]]:
    """(name, value) of the attributes of a composite layer that may hold layers."""
    names = [name for name in vars(layer) if name not in _keras_attributes() and not name.startswith("_self_")]
    return [(name, getattr(layer, name)) for name in names]


def composite_root(network: keras.Model) -> keras.layers.Layer | None:
    """The composite layer of the network's own name that is all there is to it, None for another network."""
    layers = [layer for layer in network.layers if not isinstance(layer, _LAYERS.InputLayer)]
    if len(layers) == 1 and layers[0].name == network.name and not is_network(layers[0]) and children(layers[0]):
        return inside(layers[0])
    return None


def held(place: str, value) -> Iterator[tuple[str, keras.layers.Layer]]:
    """(place, layer) of the layers in the value of an attribute."""
    if isinstance(value, keras.layers.Layer):
        if not isinstance(value, keras.metrics.Metric):  # a layer in tf_keras
            yield place, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from held(f"{place}/{key}", entry)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from held(f"{place}/{index}", entry)


@functools.cache
def _keras_attributes() -> frozenset[str]:
    """Names of the attributes that every layer or model has."""
    return frozenset({*vars(keras.layers.Layer()), *vars(keras.Model())})


def _is_automatic(layer) -> bool:
    """True if the name is one that Keras gives: the class and a number that depends on what was made before."""
    layer = inside(layer)
    stem = re.sub(r"_\d+$", "", layer.name).replace("_", "").removeprefix("private")
    classes = ("functional", "model") if is_network(layer) else ()
    return stem in (type(layer).__name__.replace("_", "").lower(), *classes)


def walk(model: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    """(path, layer) of every layer of a model or layer but networks, each once, in the model's order.

    Goes into nested networks and composite layers; a composite layer comes before what it is made of. A network that is
    nothing but one composite layer of its own name adds nothing to the paths: "dense", not "net/dense".
    """
    seen = set()

    def visit(layer, prefix):
        for name, child in children(layer):
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = f"{prefix}{name}"
            if not is_network(child):
                yield path, child
            yield from visit(child, f"{path}/")

    return visit(model, "")


def trace(model: keras.Model, input_shape=None) -> list[TracedLayer]:
    """Every layer with a kernel, in the model's order, with its MACs and weights.

    The model is called once, symbolically, on one example, and each layer is counted with the shapes that reach it, at
    every call: also where a model folds parts of an example into the batch axis.

    Args:
      model: A built model.
      input_shape: Shape of one example, without the batch axis (a list of shapes for several inputs). Needed only if
        the model leaves a size open.

    Raises:
      ValueError: The model is not built, or leaves a size open and no `input_shape` is given.
    """
    found = [(path, layer) for path, layer in walk(model) if kernels(inside(layer))]
    with _recording([layer for _, layer in found]) as calls:
        specs = _input_specs(model, input_shape)
        tf.function(lambda *inputs: model(_like_inputs(model, inputs), training=False)).get_concrete_function(*specs)
    model._clear_losses()  # of activity regularizers: tensors of that function
    return [
        TracedLayer(
            path,
            layer,
            sum(_macs(layer, i, o) for i, o in calls[id(called)]),
            sum(math.prod(getattr(layer, k.attribute).shape) for k in kernels(layer)),
        )
        for path, called in found
        for layer in (inside(called),)
    ]


def inside(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The layer inside one of this package's wrappers; others (TimeDistributed) stay what they are."""
    return getattr(layer, "quantized_layer", getattr(layer, "composite_layer", layer))


@contextlib.contextmanager
def _recording(layers):
    """Within it each call of a layer appends its (input, output) shapes."""
    calls = {id(layer): [] for layer in layers}

    def recorder(layer, call):
        def recorded(inputs, *args, **kwargs):
            # Shapes are those of the layer inside; tracing its quantizers would take most of the time.
            outputs = call(inputs, *args, **kwargs) if inside(layer) is layer else inside(layer).call(inputs)
            calls[id(layer)].append((tuple(inputs.shape), tuple(outputs.shape)))
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
        if not kernels(layer)
        and not hasattr(layer, "quantized_layer")
        and any(len(w.shape) > 1 for w in own_weights(inside(layer)))
    ]


def own_weights(layer: keras.layers.Layer) -> list:
    """The weights of a layer without those of its `children`."""
    layer = getattr(layer, "composite_layer", layer)
    return weights_of_attributes(layer) if children(layer) else layer.weights
