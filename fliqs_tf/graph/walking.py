"""The layers of a model, by path: through nested networks, composite layers and wrappers. `ModelGraph` holds them."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator

import tensorflow as tf

from fliqs_tf._keras import attributes, keras, weights_of_attributes
from fliqs_tf.graph import layer_types

_LAYERS = keras.layers
# Their layers run in loops, or with weights that are not their own: what they compute cannot be read off their calls.
_CLOSED = (_LAYERS.RNN, _LAYERS.TimeDistributed, _LAYERS.SpectralNormalization)


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
    layer = unwrapped(layer)
    if layer_types.kernels(layer) or layer_types.is_product(layer) or isinstance(layer, (_LAYERS.InputLayer, *_CLOSED)):
        return []
    graph = [unwrapped_tfmot(child) for child in layer.layers] if is_graph(layer) else []
    found: dict[int, tuple[str, keras.layers.Layer]] = {}
    for place, child in () if is_network(layer) else _held("", attributes(layer)):
        found.setdefault(id(child), (place, child))
    in_graph = {id(child): found.get(id(child), (str(index), child)) for index, child in enumerate(graph)}
    return list({**in_graph, **found}.values())


def is_annotation(layer: keras.layers.Layer) -> bool:
    """True for what TensorFlow Model Optimization puts around a layer that is to be quantized (known by its name:
    that package is large, and need not be there)."""
    return type(layer).__name__ == "QuantizeAnnotate"


def unwrapped_tfmot(layer: keras.layers.Layer) -> keras.layers.Layer:
    """What a wrapper of TensorFlow Model Optimization stands for: the layer that it annotates, or the `Quantized` that
    computes in it. Any other layer stands for itself."""
    if is_annotation(layer):
        return layer.layer
    return getattr(getattr(layer, "quantize_config", None), "quantized", None) or layer


def annotated(network: keras.Model, prefix: str = "") -> dict[str, object]:
    """Layer path -> its `QuantizeConfig` or None, of the layers that TensorFlow Model Optimization annotated."""
    found = {}
    for layer in network.layers:
        if is_annotation(layer):
            found[f"{prefix}{layer.layer.name}"] = layer.quantize_config
        elif is_network(layer):
            found |= annotated(layer, f"{prefix}{layer.name}/")
    return found


def _held(place: str, value: object) -> Iterator[tuple[str, keras.layers.Layer]]:
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
        return unwrapped(layers[0])
    return None


def _is_automatic(layer: keras.layers.Layer) -> bool:
    """True if the name is one that Keras gives: the class and a number that depends on what was made before."""
    layer = unwrapped(layer)
    stem = re.sub(r"_\d+$", "", layer.name).replace("_", "").removeprefix("private")
    classes = ("functional", "model") if is_network(layer) else ()
    return stem in (type(layer).__name__.replace("_", "").lower(), *classes)


def walk(model: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    """(path, layer) of all that a model or layer is made of, each once, in the model's order.

    Nested networks and composite layers come before what they are made of; the model itself does not come out. A path
    is made of names: "encoder/block_3/attention/query". In a composite layer the place of a layer stands for a name
    that Keras gave, which depends on what was made before, or that another layer there has too: "blocks/3". A network
    that is nothing but one composite layer of its own name adds nothing: "dense", not "net/dense".
    """
    seen = set()

    def visit(layer: keras.layers.Layer, prefix: str, in_composite: bool) -> Iterator[tuple[str, keras.layers.Layer]]:
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
                yield path, child
                yield from visit(child, f"{path}/", in_composite)

    return visit(model, "", False)


def unwrapped(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The layer inside one of this package's wrappers; others (TimeDistributed) stay what they are."""
    return getattr(layer, "quantized_layer", getattr(layer, "composite_layer", layer))


def own_weights(layer: keras.layers.Layer) -> list[tf.Variable]:
    """The weights of a layer without those of its `children`."""
    layer = getattr(layer, "composite_layer", layer)
    weights = weights_of_attributes(layer) if children(layer) else layer.weights
    return [weight for weight in weights if hasattr(weight, "shape")]  # a vocabulary of tf_keras has none
