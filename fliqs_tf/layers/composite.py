"""Layers that are made of layers, some of them quantized: attention, transformer blocks, subclassed models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import keras, replace_layers
from fliqs_tf.graph import layer_types, walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.attention import install
from fliqs_tf.layers.quantized import Quantized

ARGUMENTS = ("weight_formats", "activation_formats", "weight_decision", "activation_decision")


@keras.saving.register_keras_serializable("fliqs_tf")
class Composite(keras.layers.Layer):
    """Wraps a layer made of layers, and replaces some of these by `Quantized` ones where they are held.

    It is called as the layer inside is. Its config holds the layer as it was and what to replace, so that a saved
    model loads again with its quantized parts.

    Args:
      layer: A layer or subclassed model that holds layers in attributes, or in lists, tuples and dicts there. It
        belongs to the wrapper from then on.
      parts: {path of a layer inside, as `ModelGraph` gives it: arguments of `Quantized` without the layer}. The path
        of an attention layer and "/scores" or "/context" stand for its products: arguments of `attention.install`.

    Raises:
      ValueError: At its first call, if the layer has no part of such a path.
    """

    def __init__(self, layer: keras.layers.Layer, parts: Mapping[str, Mapping[str, Any]], **kwargs: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.layer(*args, **kwargs)

        # Keras sees from the signature what to pass: masks, training, shapes.
        vars(call)["__signature__"] = inspect.signature(layer.call)
        config = keras.saving.serialize_keras_object(layer)  # before its parts are replaced
        config.pop("build_config", None)
        parts = {path: dict(arguments) for path, arguments in parts.items()}
        for name, value in (("call", call), ("_layer_config", config), ("_parts", parts)):
            object.__setattr__(self, name, value)  # past the attribute tracking
        autocast = getattr(layer, "autocast", getattr(layer, "_autocast", True))
        super().__init__(**{"name": layer.name, "dtype": layer.dtype_policy, "autocast": autocast, **kwargs})
        self.layer = layer
        self.supports_masking = getattr(layer, "supports_masking", False)
        self._compute_output_and_mask_jointly = True  # tf_keras would take the masks off the outputs
        self._replaced = False

    @property
    def composite_layer(self) -> keras.layers.Layer:
        """The layer inside."""
        return self.layer

    @property
    def layer_config(self) -> dict[str, Any]:
        """Config of the layer inside, from before its parts were replaced."""
        return self._layer_config["config"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._replaced:
            self._build_inside(args, kwargs)
            self._replace()
            self._replaced = True
        return super().__call__(*args, **kwargs)

    def _build_inside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Many layers make their parts when they are first called."""
        if not self.layer.built:
            args, kwargs = tf.nest.map_structure(_placeholder, (args, kwargs))
            with tf.init_scope():
                self.layer(*args, **kwargs)

    def _replace(self) -> None:
        graph = ModelGraph(self.layer)
        there, parts = graph.by_path, {"": self.layer, **dict(graph.parts)}
        of_attention = {
            layer: {name: self._parts[path] for path, name in _product_paths(path, layer) if path in self._parts}
            for path, layer in parts.items()
            if layer_types.products(layer)
        }
        known = {path for path, layer in parts.items() for path, _ in _product_paths(path, layer)}
        missing = [path for path in self._parts if path not in there and path not in known]
        if missing:
            raise ValueError(f"Layer {self.name!r} has no part {missing[0]!r}. Its parts: {', '.join(there)}.")
        new = {id(there[path]): quantized(there[path], part) for path, part in self._parts.items() if path in there}
        for owner in [self.layer, *(layer for _, layer in graph.parts if walking.children(layer))]:
            replace_layers(owner, new)
        for layer, arguments in of_attention.items():
            if arguments:
                install(layer, arguments)

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        return None  # the layer inside has put masks on its outputs

    def get_build_config(self) -> None:
        return None  # its first call builds it

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "layer": self._layer_config, "parts": self._parts}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Composite:
        layer = keras.saving.deserialize_keras_object(config["layer"], custom_objects=custom_objects)
        return cls(**{**config, "layer": layer})


def _product_paths(path: str, layer: keras.layers.Layer) -> list[tuple[str, str]]:
    """(path, name) of the products of a layer of that path."""
    return [(f"{path}/{name}" if path else name, name) for name, _, _ in layer_types.products(layer)]


def _placeholder(value: Any) -> Any:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return keras.Input(batch_shape=tuple(value.shape), dtype=value.dtype)
    return value


def quantized(layer: keras.layers.Layer, arguments: Mapping[str, Any]) -> Quantized:
    """A layer with quantized kernels and input. Args: the layer, and the arguments of `Quantized` besides."""
    return Quantized(layer, **arguments, name=layer.name, dtype=layer.dtype_policy)
