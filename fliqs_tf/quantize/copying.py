"""Copies of models, with their weights, in which layers are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import tensorflow as tf

from fliqs_tf._keras import clone, keras
from fliqs_tf.graph import copies, layer_types, tracing, walking
from fliqs_tf.graph.copies import of_layer
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import composite, shared_ranges
from fliqs_tf.layers.attention import Product
from fliqs_tf.layers.composite import Composite
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.quantize import comparison

Key: TypeAlias = int | tuple[int, str]
"""id of a layer; of a product of attention that is still in float: (id of the attention layer, name of the product)."""
Arguments: TypeAlias = Mapping[Key, Mapping[str, Any]]
"""{key of a layer or product that is to be quantized: arguments of `Quantized` or of `attention.install`}."""


def replacement(layer: keras.layers.Layer, original: keras.layers.Layer, arguments: Arguments) -> keras.layers.Layer:
    """What takes the place of a layer in a copy of a network.

    Args:
      layer: Copy of the layer, not quantized.
      original: The layer itself, quantized or not.
      arguments: What is to be quantized, and how.

    Returns:
      A `Quantized`, a `Composite`, or the copy itself.
    """
    if id(original) in arguments:
        return composite.quantized(layer, arguments[id(original)])
    graph = ModelGraph(original)
    keys: list[tuple[str, Key]] = [*((path, id(part)) for path, part in graph.layers), *graph.attention_products]
    parts = {path: arguments[key] for path, key in keys if key in arguments}
    return Composite(layer, parts) if parts else layer


def network_copy(network: keras.Model, arguments: Arguments, copies: dict[int, keras.layers.Layer]) -> keras.Model:
    """A copy of a Functional or Sequential model, nested ones too, without the weights.

    Args:
      network: The original.
      arguments: What is to be quantized, and how.
      copies: {id of a layer: its copy} so far; a layer that is there already is not copied again.
    """

    def copy_of(layer: keras.layers.Layer) -> keras.layers.Layer:
        layer = walking.unwrapped_tfmot(layer)
        if id(layer) not in copies:
            if walking.is_network(layer):
                copies[id(layer)] = network_copy(layer, arguments, copies)
            else:
                copies[id(layer)] = replacement(of_layer(layer), layer, arguments)
        return copies[id(layer)]

    return clone(network, copy_of)


def fixed(graph: ModelGraph, formats: Mapping[str, str]) -> ModelGraph:
    """A copy of a quantized network in which each decision has taken the given format."""
    arguments: dict[Key, dict[str, Any]] = {}
    for _, layer in graph.of_type(Quantized, Product):
        config = layer.get_config()
        config["weight_formats"] = [formats.get(layer.weight_decision, config["weight_formats"][0])]
        if config["activation_formats"]:
            config["activation_formats"] = [formats.get(layer.activation_decision, config["activation_formats"][0])]
        arguments[id(layer)] = {key: config[key] for key in composite.ARGUMENTS}
    return quantized_copy(graph, arguments)


def quantized_copy(graph: ModelGraph, arguments: Arguments, input_shape: Any = None) -> ModelGraph:
    """A copy of a model with its weights.

    Args:
      graph: Of the original, quantized or not.
      arguments: What is to be quantized, and how.
      input_shape: See `tracing.input_specs`; for a model that is not a network.

    Returns:
      A network; of a composite model one whose only layer has the model's name.

    Raises:
      ValueError: The model cannot be copied from its config, or cannot be called on its input.
    """
    model = graph.model
    if walking.is_network(model):
        copy = network_copy(model, arguments, {})
    else:
        layer = replacement(copies.of_layer(model), model, arguments)
        # A graph knows its own input, open sizes included; `input_shape` is for counting MACs.
        copy = _network_of(layer, tracing.input_specs(model, None if walking.is_graph(model) else input_shape))
    copy_graph = ModelGraph(copy)
    originals, made = _layers_of(graph), _layers_of(copy_graph)
    made = {path: layer for path, layer in made.items() if path in originals or not layer_types.is_product(layer)}
    if originals.keys() != made.keys():
        differ = sorted(originals.keys() ^ made.keys())
        raise ValueError(
            f"A copy of model {model.name!r} from its config is not made of the same layers; they differ in "
            f"{', '.join(differ)}. Let get_config return the arguments of __init__, and do not share a layer between "
            f"composite layers."
        )
    for path, layer in originals.items():
        _copy_state(layer, made[path])
        copies.keep_trainable(layer, made[path])
    copies.keep_trainable(model, copy)
    for wrapper in copy._flatten_layers():
        wrapper._trainable = walking.unwrapped(wrapper).trainable
    if shared_ranges.has_boundary_quantizers(copy_graph):
        shared_ranges.link(copy_graph)
    comparison.check(graph, copy_graph, input_shape)
    return copy_graph


def _network_of(layer: keras.layers.Layer, specs: Any) -> keras.Model:
    """A network of one layer and its inputs."""
    flat = tf.nest.flatten(specs)
    names = sorted(specs) if isinstance(specs, dict) else [spec.name for spec in flat]
    inputs = tf.nest.pack_sequence_as(
        specs, [keras.Input(tuple(spec.shape), dtype=spec.dtype.name, name=name) for spec, name in zip(flat, names)]
    )
    try:
        outputs = layer(inputs)
    except Exception as error:
        shapes = tf.nest.map_structure(lambda spec: (tuple(spec.shape), spec.dtype.name), specs)
        raise ValueError(
            f"Model {layer.name!r} cannot be called on examples of {shapes}: {type(error).__name__}: {error} "
            f"Give input_shape; a tf.TensorSpec in place of a shape gives the dtype too."
        ) from error
    return keras.Model(inputs, outputs, name=layer.name)


def _layers_of(graph: ModelGraph) -> dict[str, keras.layers.Layer]:
    """{path: layer}, a model that is not a network under ""; without input layers, whose names are not copied."""
    model = graph.model
    found = {path: layer for path, layer in graph.parts if not isinstance(layer, keras.layers.InputLayer)}
    root = model if not walking.is_network(model) else walking.composite_root(model)
    return found if root is None else {"": root, **found}


def _copy_state(layer: keras.layers.Layer, copy: keras.layers.Layer) -> None:
    """Functions, weights and ranges, without those of the layers that a composite layer holds."""
    if isinstance(layer, (Quantized, Product)):
        for old, new in zip(layer.activation_quantizers, copy.activation_quantizers):
            new.range.assign(old.range)
            new.clip = old.clip
    if isinstance(layer, Product):
        copy.weight_quantizers[0].range.assign(layer.weight_quantizers[0].range)
        copy.weight_quantizers[0].clip = layer.weight_quantizers[0].clip
        return
    copies.keep_functions(walking.unwrapped(layer), walking.unwrapped(copy))
    copies.keep_weights(walking.unwrapped(layer), walking.unwrapped(copy))
