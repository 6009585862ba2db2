"""Ranges of activations from data, where training has set none.

Training sets every range as it goes. That leaves models that are not trained, and layers that Keras' own `fit` calls
with `training=False`: until data has set its range, a quantizer uses that of the batch, so that the result for one
example depends on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.graph import tracing
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.attention import Product
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import ActivationQuantizer, Quantizer

# Ends the name of a boundary quantizer, in files too: "add_carrier" stands behind "add".
SUFFIX = "_carrier"
# Batches to take from a data set of any length: 32 are worth 28 % of a range (momentum 0.99), the rest is training's.
BATCHES = 32


def activation_quantizers(model: keras.Model | ModelGraph) -> Iterator[tuple[str, ActivationQuantizer]]:
    """(what it quantizes, quantizer) of all activation quantizers of a model: ("the input of 'conv'", ...)."""
    for path, layer in ModelGraph.of(model).layers:
        if isinstance(layer, ActivationQuantizer):
            yield f"the one behind {path.removesuffix(SUFFIX)!r}", layer
        elif isinstance(layer, Quantized):
            for place, quantizer in zip(("the input of", "the one inside"), layer.activation_quantizers):
                yield f"{place} {path!r}", quantizer
        elif isinstance(layer, Product):
            yield f"the stationary operand of {path!r}", layer.weight_quantizers[0]
            yield f"the moving operand of {path!r}", layer.activation_quantizer


def unseen(model: keras.Model | ModelGraph) -> dict[str, ActivationQuantizer]:
    """What it quantizes -> quantizer, of those that need a range and whose range no data has set."""
    return {
        place: quantizer
        for place, quantizer in activation_quantizers(model)
        if any(fmt.is_scaled for fmt in quantizer.space.formats) and not quantizer.range[1] > 0
    }


def calibrate(model: keras.Model | ModelGraph, batches: Iterable[Any], *, only_unseen: bool = True) -> int:
    """Gives ranges to activation quantizers from data: each batch counts as one step of training.

    Runs forward passes as at inference, eagerly: nothing is traced. Meanwhile quantizers that learn a range do not
    round, nor do those whose format is still to be decided.

    Args:
      model: A quantized network.
      batches: Iterable of model inputs. All of them are used, or none if no range is to be set.
      only_unseen: False: all ranges move on, not only those that no data has set.

    Returns:
      The number of batches used.
    """
    graph = ModelGraph.of(model)
    learning = list(unseen(graph).values()) if only_unseen else [q for _, q in activation_quantizers(graph)]
    if not learning:
        return 0
    overrides = dict.fromkeys(_open_quantizers(graph), _float) | {q: _observer(q) for q in learning}
    used = 0
    with tracing.overridden_calls(overrides):
        for x in batches:
            graph.model(tf.nest.map_structure(tf.convert_to_tensor, x), training=False)
            used += 1
    return used


def _open_quantizers(graph: ModelGraph) -> list[Quantizer]:
    """The quantizers whose format is still to be decided."""
    layers = [layer for _, layer in graph.of_type(Quantized, Product)]
    found = [q for layer in layers for q in (*layer.weight_quantizers, *layer.activation_quantizers)]
    return [q for q in found if q.choice is not None]


def _float(x: tf.Tensor, **_: Any) -> tf.Tensor:
    return x


def _observer(quantizer: ActivationQuantizer) -> Callable[..., tf.Tensor]:
    def observe(x: tf.Tensor, **_: Any) -> tf.Tensor:
        if not quantizer.follows:
            quantizer.observe(tf.cast(x, tf.float32))
        return x

    return observe
