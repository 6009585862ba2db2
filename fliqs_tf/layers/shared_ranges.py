"""Int8 tensors between layers, as layers: an `ActivationQuantizer` in a network, whose range its readers share.

Such a quantizer is a boundary quantizer; `fliqs_tf.export.boundaries` puts them in. A layer that reads its codes must
quantize its input with the same range, in training too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fliqs_tf._keras import keras
from fliqs_tf.graph import commuting
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import ActivationQuantizer


def has_boundary_quantizers(graph: ModelGraph) -> bool:
    """True if int8 tensors between layers are simulated."""
    return bool(graph.of_type(ActivationQuantizer))


def followers(graph: ModelGraph) -> list[tuple[ActivationQuantizer, ActivationQuantizer]]:
    """(boundary quantizer, input quantizer of a layer that reads its codes), which share a range."""
    source: dict[int, ActivationQuantizer] = {}
    found = []
    for call in graph.dataflow.calls:
        if isinstance(call.layer, ActivationQuantizer):
            source[call.output] = call.layer
        elif len(call.inputs) == 1 and call.inputs[0] in source:
            if commuting.is_quantization_invariant(call.layer):
                source[call.output] = source[call.inputs[0]]
            elif isinstance(call.layer, Quantized) and call.layer.activation_quantizer is not None:
                found.append((source[call.inputs[0]], call.layer.activation_quantizer))
    return found


def link(graph: ModelGraph) -> None:
    """Makes input quantizers take the range of the boundary quantizer that they read, during training too.

    Two ranges for the same codes would cost a rounding between them. Linking again changes nothing.
    """
    for boundary, quantizer in followers(graph):
        quantizer.follow(boundary)


@keras.saving.register_keras_serializable("fliqs_tf", name="CarrierModel")  # the name in files
class BoundaryModel(keras.Model):
    """A Functional model with boundary quantizers, whose ranges are shared again when it is made from its config."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> keras.Model:
        return _linked(super().from_config(config, custom_objects=custom_objects))


@keras.saving.register_keras_serializable("fliqs_tf", name="CarrierSequential")
class BoundarySequential(keras.Sequential):
    """A Sequential model with boundary quantizers, whose ranges are shared again when it is made from its config."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> keras.Model:
        return _linked(super().from_config(config, custom_objects=custom_objects))


def _linked(model: keras.Model) -> keras.Model:
    if getattr(model, "inputs", None):
        link(ModelGraph(model))
    return model


KINDS = (BoundaryModel, BoundarySequential)
"""The Functional and the Sequential form of a network with boundary quantizers."""
