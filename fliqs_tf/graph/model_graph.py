"""A Keras model as a graph: its layers by path, and which call reads what which other call makes."""

from __future__ import annotations

import dataclasses
import functools

from fliqs_tf._keras import keras
from fliqs_tf.graph import dataflow, layer_types, walking

Layers = tuple[tuple[str, keras.layers.Layer], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelGraph:
    """What a model is made of, each part found when it is first asked for and then kept.

    Functions of this package hand a model on in this form. A graph is of a model whose layers stay: what puts layers in
    or takes them out makes a new model, which has a graph of its own. What layers hold may change (weights, formats,
    what trains).

    Attributes:
      model: A built model, or a layer that holds layers.
    """

    model: keras.layers.Layer

    @classmethod
    def of(cls, model: keras.layers.Layer | ModelGraph) -> ModelGraph:
        """The graph of a model; a graph as it is, so that public functions can be called with either."""
        return model if isinstance(model, cls) else cls(model)

    @functools.cached_property
    def parts(self) -> Layers:
        """(path, layer) of all that the model is made of, in its order: see `walking.walk`.

        Nested networks and composite layers come before what they are made of.
        """
        return tuple(walking.walk(self.model))

    @functools.cached_property
    def layers(self) -> Layers:
        """`parts` without nested networks, which are no more than their layers."""
        return tuple((path, layer) for path, layer in self.parts if not walking.is_network(layer))

    @functools.cached_property
    def by_path(self) -> dict[str, keras.layers.Layer]:
        """Path -> layer, of `layers`."""
        return dict(self.layers)

    def of_type(self, *classes: type) -> Layers:
        """(path, layer) of the layers of some classes."""
        return tuple((path, layer) for path, layer in self.layers if isinstance(layer, classes))

    @functools.cached_property
    def with_kernels(self) -> Layers:
        """(path, layer) of the layers in float that have kernels. A layer that was never called has none yet."""
        return tuple((path, layer) for path, layer in self.layers if layer.built and layer_types.kernels(layer))

    @functools.cached_property
    def attention_products(self) -> tuple[tuple[str, tuple[int, str]], ...]:
        """(path, (id of the attention layer, name)) of the products in the attention layers."""
        root = walking.composite_root(self.model) if walking.is_network(self.model) else walking.unwrapped(self.model)
        found = [("", root)] * (root is not None)
        found += [(f"{path}/", walking.unwrapped(layer)) for path, layer in self.layers]
        return tuple(
            (prefix + name, (id(layer), name)) for prefix, layer in found for name, _, _ in layer_types.products(layer)
        )

    @functools.cached_property
    def dataflow(self) -> dataflow.Dataflow:
        """The calls of a Functional or Sequential model; raises as `dataflow.read`."""
        return dataflow.read(self.model)
