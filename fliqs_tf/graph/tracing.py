"""One symbolic call of a model: the shapes that reach its layers, and their MACs and weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import keras, map_shapes, only_shapes, recorded_input_specs
from fliqs_tf.graph import layer_types, walking
from fliqs_tf.graph.model_graph import ModelGraph


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


def trace(graph: ModelGraph, input_shape: Any = None, named: Collection[str] = ()) -> list[TracedLayer]:
    """Every layer with a kernel, in the model's order, with its MACs and weights. Quantized embeddings and
    products of activations too.

    The model is called once, symbolically, on one example, and each layer is counted with the shapes that reach it, at
    every call: also where a model folds parts of an example into the batch axis.

    Args:
      graph: Of a built model.
      input_shape: See `input_specs`. Needed only if the model leaves a size open.
      named: Paths of embeddings in float that count too.

    Raises:
      ValueError: The model is not built, or leaves a size open and no `input_shape` is given.
    """
    model = graph.model
    found = [
        (path, layer)
        for path, layer in graph.layers
        if walking.unwrapped(layer).built and _counts(layer, path in named)
    ]
    example = _one_example(model, input_shape)
    with _recording([layer for _, layer in found]) as calls:

        def call(inputs: Any) -> list[tf.Tensor]:
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
            sum(layer_types.macs(layer, i, o) for i, o in shapes[id(called)]),
            sum(math.prod(getattr(layer, k.attribute).shape) for k in layer_types.kernels_or_table(layer)),
            bool(layer_types.table(layer)),
        )
        for path, called in found
        for layer in (walking.unwrapped(called),)
    ]


def _counts(layer: keras.layers.Layer, named: bool) -> bool:
    is_quantized = walking.unwrapped(layer) is not layer
    return bool(
        layer_types.is_product(layer)
        or layer_types.kernels(walking.unwrapped(layer))
        or (layer_types.table(walking.unwrapped(layer)) and (is_quantized or named))
    )


@contextlib.contextmanager
def _recording(layers: Iterable[keras.layers.Layer]) -> Iterator[dict[int, list[tuple[Any, Any]]]]:
    """Within it each call of a layer appends its (input, output) shapes."""
    calls: dict[int, list[tuple[Any, Any]]] = {id(layer): [] for layer in layers}

    def recorder(layer: keras.layers.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # Shapes are those of the layer inside; tracing its quantizers would take most of the time.
            outputs = (
                call(inputs, *args, **kwargs)
                if walking.unwrapped(layer) is layer
                else walking.unwrapped(layer).call(inputs)
            )
            # A Sequential model of tf_keras may make its graph anew, symbolically, while it is called.
            if not only_shapes():
                calls[id(layer)].append((_shape(inputs), _shape(outputs)))
            return outputs

        return recorded

    with overridden_calls({layer: recorder(layer, layer.call) for layer in layers}):
        yield calls


def _shape(tensor: tf.Tensor) -> tuple[int, ...] | tf.Tensor:
    """Sizes as integers, as a tensor if some are not known yet."""
    return tuple(tensor.shape) if None not in tuple(tensor.shape) else tf.shape(tensor)


@contextlib.contextmanager
def overridden_calls(overrides: Mapping[keras.layers.Layer, Callable[..., Any]]) -> Iterator[None]:
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


def input_specs(model: keras.Model, input_shape: Any = None) -> Any:
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
        (spec.shape if walking.is_graph(model) else tf.TensorShape([None] * spec.shape.rank)).is_compatible_with(
            s.shape
        )
        for s, spec in zip(specs, wanted)
    ):
        expected = ", ".join(f"{tuple(spec.shape)} ({spec.name})" for spec in wanted)
        raise ValueError(f"input_shape {input_shape} does not fit model {model.name!r}, which takes {expected}.")
    return tf.nest.pack_sequence_as(known, specs)


def _as_spec(shape: tf.TensorShape | tf.TensorSpec, known: tf.TensorSpec) -> tf.TensorSpec:
    return shape if isinstance(shape, tf.TensorSpec) else tf.TensorSpec(shape, known.dtype, known.name)


def _one_example(model: keras.Model, input_shape: Any) -> Any:
    """The model's input with a batch axis of 1."""
    for spec in tf.nest.flatten(specs := input_specs(model, input_shape)):
        if None in tuple(spec.shape):
            raise ValueError(
                f"The input {spec.name!r} of model {model.name!r} has the open shape {tuple(spec.shape)}: MACs depend "
                f"on it. Give the shape of one example: input_shape=(224, 224, 3), for instance."
            )
    return tf.nest.map_structure(lambda spec: tf.TensorSpec((1, *spec.shape), spec.dtype), specs)
