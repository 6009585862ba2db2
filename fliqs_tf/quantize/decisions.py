"""Decisions: what is left to choose in a quantized network."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.attention import Product
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import Quantizer
from fliqs_tf.numerics.space import Space


@dataclasses.dataclass
class Decision:
    """One thing that the controller chooses; the quantizers that read it hold the choice in a variable each.

    Attributes:
      name: "conv1", or "conv1/weights" and "conv1/activations" if these are chosen apart.
      space: The formats to choose from.
      quantizers: Those that follow the decision.
      layers: Paths of their layers.
    """

    name: str
    space: Space
    quantizers: list[Quantizer] = dataclasses.field(default_factory=list)
    layers: list[str] = dataclasses.field(default_factory=list)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the formats, in the order of option indices."""
        return self.space.names

    @property
    def choices(self) -> list[tf.Variable]:
        """The int32 variables that the quantizers read."""
        return list({id(q.choice): q.choice for q in self.quantizers}.values())


def open_decisions(graph: ModelGraph) -> list[Decision]:
    """What is left to decide in a quantized network, in network order. Spaces of one format decide nothing."""
    found: dict[str, Decision] = {}
    for path, layer in graph.of_type(Quantized, Product):
        reads = [(layer.weight_decision, q) for q in layer.weight_quantizers]
        reads += [(layer.activation_decision, q) for q in layer.activation_quantizers]
        for name, quantizer in reads:
            if quantizer.choice is not None:
                decision = found.setdefault(name, Decision(name, quantizer.space))
                decision.quantizers.append(quantizer)
                if path not in decision.layers:
                    decision.layers.append(path)
    return list(found.values())
