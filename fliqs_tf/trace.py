"""Layers to shapes, MACs and weight counts: the only module that knows layer classes.

A MAC is one multiply-add. Counts are per example. Biases and normalization do not count, products of two activations
only where they are quantized.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator

import tensorflow as tf

from fliqs_tf._keras import attributes, keras, map_shapes, only_shapes, recorded_input_specs, weights_of_attributes

_LAYERS = keras.layers
# Their layers run in loops, or with weights that are not their own: what they compute cannot be read off their calls.
_ATTENTION = {_LAYERS.MultiHeadAttention, getattr(_LAYERS, "GroupQueryAttention", _LAYERS.MultiHeadAttention)}
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
      weights: Number of kernel entries, or of table entries.
      is_table: True for an embedding: it multiplies nothing, and its input is not quantized.
    """

    path: str
    layer: keras.layers.Layer = dataclasses.field(compare=False)
    macs: int
    weights: int
    is_table: bool = False


def kernels(layer: keras.layers.Layer) -> tuple[Kernel, ...]:
    """The kernels of a layer; () for a class that is not known, or that has none.

    Subclasses of the known classes do not count as known: their `call` may do anything.
    """
    return _KERNELS.get(type(layer), lambda layer: ())(layer)


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


def attention_products(model: keras.Model) -> list[tuple[str, tuple[int, str]]]:
    """(path, (id of the attention layer, name)) of the products in the attention layers of a model."""
    root = composite_root(model) if is_network(model) else inside(model)
    found = [("", root)] * (root is not None) + [(f"{path}/", inside(layer)) for path, layer in walk(model)]
    return [(prefix + name, (id(layer), name)) for prefix, layer in found for name, _, _ in products(layer)]


def kernels_or_table(layer: keras.layers.Layer) -> tuple[Kernel, ...]:
    """What `Quantized` quantizes of a layer."""
    return kernels(layer) or table(layer)


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


def is_graph(layer: keras.layers.Layer) -> bool:
    """True for a model that is a graph of layers: Functional, Sequential, and classes made from these."""
    return isinstance(layer, keras.Sequential) or (
        isinstance(layer, keras.Model) and bool(getattr(layer, "inputs", None))
    )


def is_network(layer: keras.layers.Layer) -> bool:
    """True for a graph that is no more than its layers: it can be copied layer by layer.

    Any other layer that holds layers is composite: also a graph whose class has a `get_config` or `call` of its own, as
    the models of keras_hub do.
    """
    own = (getattr(type(layer), method).__module__.split(".")[0] for method in ("get_config", "call"))
    return is_graph(layer) and set(own) == {keras.__name__}


def children(layer: keras.layers.Layer) -> list[tuple[str, keras.layers.Layer]]:
    """(place, layer) of the layers that a layer is directly made of, [] for one that stands for itself.

    The place of a layer in a graph is its index, "3"; elsewhere the attribute that holds it, and the index or key in a
    list, tuple or dict there: "dense", "blocks/3".
    """
    layer = inside(layer)
    if kernels(layer) or is_product(layer) or isinstance(layer, (_LAYERS.InputLayer, *_CLOSED)):
        return []
    graph = [content(child) for child in layer.layers] if is_graph(layer) else []
    found: dict[int, tuple[str, keras.layers.Layer]] = {}
    for place, child in () if is_network(layer) else _held("", attributes(layer)):
        found.setdefault(id(child), (place, child))
    in_graph = {id(child): found.get(id(child), (str(index), child)) for index, child in enumerate(graph)}
    return list({**in_graph, **found}.values())


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


def _held(place: str, value) -> Iterator[tuple[str, keras.layers.Layer]]:
    """(place, layer) of the layers in the value of an attribute."""
    if isinstance(value, keras.layers.Layer):
        if not isinstance(value, keras.metrics.Metric):  # a layer in tf_keras
            yield place.strip("/_"), value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _held(f"{place}/{key}", entry)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _held(f"{place}/{index}", entry)


def composite_root(network: keras.Model) -> keras.layers.Layer | None:
    """The composite layer of the network's own name that is all there is to it, None for another network."""
    layers = [layer for layer in network.layers if not isinstance(layer, _LAYERS.InputLayer)]
    if len(layers) == 1 and layers[0].name == network.name and not is_network(layers[0]) and children(layers[0]):
        return inside(layers[0])
    return None


def _is_automatic(layer) -> bool:
    """True if the name is one that Keras gives: the class and a number that depends on what was made before."""
    layer = inside(layer)
    stem = re.sub(r"_\d+$", "", layer.name).replace("_", "").removeprefix("private")
    classes = ("functional", "model") if is_network(layer) else ()
    return stem in (type(layer).__name__.replace("_", "").lower(), *classes)


def walk(model: keras.layers.Layer, networks: bool = False) -> Iterator[tuple[str, keras.layers.Layer]]:
    """(path, layer) of every layer of a model or layer, each once, in the model's order.

    Goes into nested networks and composite layers. A path is made of names: "encoder/block_3/attention/query". In a
    composite layer the place of a layer stands for a name that Keras gave, which depends on what was made before, or
    that another layer there has too: "blocks/3". A network that is nothing but one composite layer of its own name adds
    nothing: "dense", not "net/dense".

    Args:
      model: Where to start; it does not come out itself.
      networks: Nested networks come out too, as composite layers do, before what they are made of.
    """
    seen = set()

    def visit(layer, prefix, in_composite):
        if is_network(layer) and (root := composite_root(layer)) is not None:
            layer = root
        in_composite = in_composite or not is_network(layer)
        parts = children(layer)
        names = collections.Counter(child.name for _, child in parts)
        for place, child in parts:
            if id(child) not in seen:
                seen.add(id(child))
                by_place = in_composite and (names[child.name] > 1 or _is_automatic(child))
                path = prefix + (place if by_place else child.name)
                if networks or not is_network(child):
                    yield path, child
                yield from visit(child, f"{path}/", in_composite)

    return visit(model, "", False)


def trace(model: keras.Model, input_shape=None, named=()) -> list[TracedLayer]:
    """Every layer with a kernel, in the model's order, with its MACs and weights. Quantized embeddings and
    products of activations too.

    The model is called once, symbolically, on one example, and each layer is counted with the shapes that reach it, at
    every call: also where a model folds parts of an example into the batch axis.

    Args:
      model: A built model.
      input_shape: See `input_specs`. Needed only if the model leaves a size open.
      named: Paths of embeddings in float that count too.

    Raises:
      ValueError: The model is not built, or leaves a size open and no `input_shape` is given.
    """
    found = [(path, layer) for path, layer in walk(model) if inside(layer).built and _counts(layer, path in named)]
    example = _one_example(model, input_shape)
    with _recording([layer for _, layer in found]) as calls:

        def call(inputs):
            model(inputs, training=False)
            return [shape for pairs in calls.values() for pair in pairs for shape in pair if tf.is_tensor(shape)]

        called = tf.function(call).get_concrete_function(example)
    model._clear_losses()  # of activity regularizers: tensors of that function
    # Sizes that are not known before the model runs.
    sizes = iter(called(tf.nest.map_structure(lambda s: tf.zeros(s.shape, s.dtype), example)) if called.outputs else ())
    shapes = {
        key: [[tuple(next(sizes).numpy().tolist()) if tf.is_tensor(s) else s for s in pair] for pair in pairs]
        for key, pairs in calls.items()
    }
    return [
        TracedLayer(
            path,
            layer,
            sum(_macs(layer, i, o) for i, o in shapes[id(called)]),
            sum(math.prod(getattr(layer, k.attribute).shape) for k in kernels_or_table(layer)),
            bool(table(layer)),
        )
        for path, called in found
        for layer in (inside(called),)
    ]


def _counts(layer, named: bool) -> bool:
    is_quantized = inside(layer) is not layer
    return bool(is_product(layer) or kernels(inside(layer)) or (table(inside(layer)) and (is_quantized or named)))


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
            # A Sequential model of tf_keras may make its graph anew, symbolically, while it is called.
            if not only_shapes():
                calls[id(layer)].append((_shape(inputs), _shape(outputs)))
            return outputs

        return recorded

    with overridden_calls({layer: recorder(layer, layer.call) for layer in layers}):
        yield calls


def _shape(tensor):
    """Sizes as integers, as a tensor if some are not known yet."""
    return tuple(tensor.shape) if None not in tuple(tensor.shape) else tf.shape(tensor)


@contextlib.contextmanager
def overridden_calls(overrides: dict):
    """Within it, each layer that is a key runs its value in place of its `call`."""
    own = {layer: vars(layer)["call"] for layer in overrides if "call" in vars(layer)}  # as a composite layer has
    for layer, call in overrides.items():
        object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        for layer in overrides:
            if layer in own:
                object.__setattr__(layer, "call", own[layer])
            else:
                object.__delattr__(layer, "call")


def input_specs(model: keras.Model, input_shape=None):
    """The input of a model: a `tf.TensorSpec` of one example, without the batch axis, or a list or dict of them.

    Args:
      model: A model that is a graph, or that has been called or built.
      input_shape: Shape of one example, or, for several inputs, a list or dict of shapes. A `tf.TensorSpec` in place
        of a shape gives the dtype too. None: what the model was made for, or what it was built with.

    Raises:
      ValueError: The model does not say what its input is, or `input_shape` does not fit it.
    """
    known = recorded_input_specs(model)
    if input_shape is None:
        if known is None:
            raise ValueError(
                f"Model {model.name!r} does not say what its input is. Give the shape of one example: "
                f"input_shape=(224, 224, 3), for instance; a list or dict of shapes if it has several inputs."
            )
        return known
    given = map_shapes(lambda s: s if isinstance(s, tf.TensorSpec) else tf.TensorShape(s), input_shape)
    if known is None:
        return tf.nest.map_structure(lambda s: _as_spec(s, tf.TensorSpec((), tf.float32)), given)
    wanted = tf.nest.flatten(known)
    if isinstance(given, dict) and not isinstance(known, dict):
        given = [given[spec.name] for spec in wanted if spec.name in given]
    given = tf.nest.flatten(given)
    specs = [_as_spec(shape, spec) for shape, spec in zip(given, wanted)]
    if len(given) != len(wanted) or not all(
        (spec.shape if is_graph(model) else tf.TensorShape([None] * spec.shape.rank)).is_compatible_with(s.shape)
        for s, spec in zip(specs, wanted)
    ):
        expected = ", ".join(f"{tuple(spec.shape)} ({spec.name})" for spec in wanted)
        raise ValueError(f"input_shape {input_shape} does not fit model {model.name!r}, which takes {expected}.")
    return tf.nest.pack_sequence_as(known, specs)


def _as_spec(shape, known: tf.TensorSpec) -> tf.TensorSpec:
    return shape if isinstance(shape, tf.TensorSpec) else tf.TensorSpec(shape, known.dtype, known.name)


def _one_example(model, input_shape):
    """The model's input with a batch axis of 1."""
    for spec in tf.nest.flatten(specs := input_specs(model, input_shape)):
        if None in tuple(spec.shape):
            raise ValueError(
                f"The input {spec.name!r} of model {model.name!r} has the open shape {tuple(spec.shape)}: MACs depend "
                f"on it. Give the shape of one example: input_shape=(224, 224, 3), for instance."
            )
    return tf.nest.map_structure(lambda spec: tf.TensorSpec((1, *spec.shape), spec.dtype), specs)


def quantizable(model: keras.Model) -> list[tuple[str, keras.layers.Layer]]:
    """(path, layer) of the layers that have kernels. A layer that was never called has none yet."""
    return [(path, layer) for path, layer in walk(model) if layer.built and kernels(layer)]


def embeddings(model: keras.Model) -> list[tuple[str, keras.layers.Layer]]:
    """(path, layer) of the embeddings whose tables can be quantized."""
    return [(path, layer) for path, layer in walk(model) if layer.built and table(layer)]


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
    weights = weights_of_attributes(layer) if children(layer) else layer.weights
    return [weight for weight in weights if hasattr(weight, "shape")]  # a vocabulary of tf_keras has none
