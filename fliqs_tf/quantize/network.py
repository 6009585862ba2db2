"""A Keras model to a quantized one: which layers, which tensors, which decision."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Sequence
from typing import Any

from fliqs_tf._keras import check_model, keras
from fliqs_tf.graph import copies, layer_types, walking
from fliqs_tf.graph.model_graph import Layers, ModelGraph
from fliqs_tf.layers import batch_norm
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.numerics.space import Space, SpaceLike
from fliqs_tf.quantize import copying
from fliqs_tf.quantize import rules as rules_lib

_LOG = logging.getLogger("fliqs_tf")
_KERAS = ("keras", "tf_keras", "keras_hub")


def quantized_network(
    graph: ModelGraph,
    space: SpaceLike,
    rules: Sequence[rules_lib.RuleLike] = (),
    granularity: str = "layer",
    tensors: str = "together",
    input_space: SpaceLike | None = None,
    *,
    input_shape: Any = None,
    embeddings: bool = False,
    attention_scores: bool = False,
) -> ModelGraph:
    """A copy of a model whose layers read decisions.

    Args:
      graph: Of the model.
      space, rules, granularity, tensors, input_shape, embeddings, attention_scores: As for `fliqs_tf.wrap`.
      input_space: With tensors="separate": space of the inputs, where it is not that of the weights.
    """
    spaces = (space := Space(space), space if input_space is None else Space(input_space))
    layers = layers_to_quantize(graph, embeddings, attention_scores)
    warn_of_own_training(graph.model)
    warn_of_names_of_keras(graph)
    batch_norm.warn_of_closed(graph)
    if attention_scores and tensors == "weights":
        raise ValueError(
            "attention_scores=True quantizes products of two activations, which stay in float with tensors='weights': "
            "use tensors='together' or 'separate'."
        )
    quantizations = rules_lib.layer_quantizations(
        [path for path, _ in layers], walking.annotated(graph.model), spaces, rules, granularity, tensors
    )
    _log_left_in_float(graph, quantizations)
    return copying.quantized_copy(
        graph, {key: quantizations[path].arguments() for path, key in layers if path in quantizations}, input_shape
    )


def warn_of_own_training(model: keras.Model) -> None:
    """Warns of a class with training methods of its own: a copy trains as any Keras model does."""
    methods = ("train_step", "compute_loss", "compute_metrics", "test_step")
    own = [m for m in methods if getattr(type(model), m).__module__.split(".")[0] not in _KERAS]
    if own:
        _LOG.warning(
            "%s has a %s of its own, which the quantized model does not call: it trains as a plain Keras model. Move "
            "what it does into the loss, the metrics or a layer (add_loss).",
            type(model).__name__,
            " and a ".join(own),
        )


def warn_of_names_of_keras(graph: ModelGraph) -> None:
    """Warns of functions that a file would confuse with Keras' own: it holds names, a copy the functions themselves."""
    found = [
        f"{path} ({', '.join(names)})"
        for path, layer in graph.layers
        if (names := copies.mistakable_functions(layer).values())
    ]
    if found:
        _LOG.warning(
            "Functions of your own have names of functions of Keras: %s. The model computes with yours, but a file "
            "holds only names, for which Keras would take its own: rename yours before you save the model.",
            ", ".join(found),
        )


def layers_to_quantize(
    graph: ModelGraph, embeddings: bool = False, attention_scores: bool = False, named: Collection[str] = ()
) -> list[tuple[str, copying.Key]]:
    """(path, key) of the layers and products of a float model that are to be quantized, see `copying.Key`.

    Args:
      graph: Of a float model.
      embeddings, attention_scores: True takes all embeddings, all products of attention.
      named: Paths of embeddings and products to take in any case.

    Raises:
      TypeError: The model is of the other Keras.
      ValueError: The model is not built, is quantized already, or has nothing to quantize.
    """
    model = graph.model
    check_model(model)
    batch_norm.check(graph)
    if not model.built or (walking.is_graph(model) and not getattr(model, "inputs", None)):
        raise ValueError(
            f"Model {model.name!r} is not built: give it an Input layer, call it on a batch, or call "
            f"model.build(input_shape) first."
        )
    if graph.of_type(Quantized):
        raise ValueError(
            f"Model {model.name!r} is quantized already; give the float model, or search what quantize_apply made with "
            f"fliqs_tf.SearchModel(model)."
        )
    of_keras = [path for path, layer in graph.layers if getattr(layer, "quantization_mode", None)]
    if of_keras:
        raise ValueError(
            f"Layer {of_keras[0]!r} is quantized already, by Keras' own model.quantize: give the float model from "
            f"before that."
        )
    tables = [
        (path, layer)
        for path, layer in graph.layers
        if layer.built and layer_types.table(layer) and (embeddings or path in named)
    ]
    among = {id(layer) for _, layer in (*graph.with_kernels, *tables)}
    products = [(path, key) for path, key in graph.attention_products if attention_scores or path in named]
    layers: list[tuple[str, copying.Key]] = [(path, id(layer)) for path, layer in graph.layers if id(layer) in among]
    layers += products
    for asked, found, what in ((embeddings, tables, "Embedding"), (attention_scores, products, "MultiHeadAttention")):
        if asked and not found:
            option = "embeddings" if found is tables else "attention_scores"
            raise ValueError(f"{option}=True, but model {model.name!r} has no {what} layer.")
    if not layers:
        raise ValueError(
            f"Model {model.name!r} has nothing to quantize: none of its layers is a Dense, Conv1D, Conv2D, "
            f"DepthwiseConv2D, SeparableConv2D, Conv2DTranspose or EinsumDense."
        )
    return layers


def left_in_float(graph: ModelGraph) -> Layers:
    """(path, layer) of layers that multiply by weights but whose class is not known, such as LSTM or Embedding."""
    return tuple(
        (path, layer)
        for path, layer in graph.layers
        if not layer_types.kernels(layer)
        and not hasattr(layer, "quantized_layer")
        and any(len(w.shape) > 1 for w in walking.own_weights(walking.unwrapped(layer)))
    )


def _log_left_in_float(graph: ModelGraph, quantized: Container[str]) -> None:
    left = [(path, layer) for path, layer in left_in_float(graph) if path not in quantized]
    if left:
        named = ", ".join(f"{path} ({type(layer).__name__})" for path, layer in left)
        tables = any(layer_types.table(layer) for _, layer in left)
        hint = " embeddings=True quantizes the tables of Embedding layers." if tables else ""
        _LOG.warning(
            "Left in float and not counted, because their class is not known or not asked for: %s.%s", named, hint
        )
