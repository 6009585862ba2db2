"""What a target will do with every layer, before anything is searched or exported."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator

from fliqs_tf import costs
from fliqs_tf._keras import keras
from fliqs_tf.costs.profile import Profile
from fliqs_tf.export import lowering, onnx_writer, targets
from fliqs_tf.export.targets import CANNOT, NATIVE, TARGETS, Run
from fliqs_tf.graph import layer_types, walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.quantize.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Row:
    """How a target runs a layer.

    Attributes:
      layer: Path of the layer.
      kind: Name of its class; "" if only a recipe is known.
      weights, inputs: Names of its formats; "FP32" for what stays in float, "" for a layer without a kernel.
      run: How the target runs it.
    """

    layer: str
    kind: str
    weights: str
    inputs: str
    run: Run


@dataclasses.dataclass(frozen=True)
class SupportTable:
    """What a target does with every layer.

    Attributes:
      target: Name of the target.
      rows: One per layer, in network order; for a model that is to be searched, one per layer and pair of formats that
        the search may choose.
    """

    target: str
    rows: tuple[Row, ...]

    @property
    def unsupported(self) -> tuple[Row, ...]:
        """The rows that the target cannot run."""
        return tuple(row for row in self.rows if row.run.how == CANNOT)

    def __str__(self) -> str:
        table = [("layer", "class", "weights", "inputs", f"on {self.target}", "how")]
        table += [(r.layer, r.kind, r.weights, r.inputs, r.run.how, r.run.why) for r in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
        return "\n".join([lines[0], "-" * sum(widths, 2 * len(widths) - 2), *lines[1:]])


def plan(recipe_or_model: Recipe | keras.layers.Layer, target: str | os.PathLike | Profile) -> SupportTable:
    """What a target will do with every layer: native, emulated and how, or cannot and why.

    Args:
      recipe_or_model: A recipe; a wrapped model (every choice that its search has); a deployed model; or a plain one,
        whose layers are in float. A recipe alone does not know the classes of its layers.
      target: "tflite", "onnx", "packed"; or a hardware profile: a `Profile`, the name of a shipped one, or a path.

    Returns:
      A `SupportTable`: print it, or look at its `rows` and `unsupported`.

    Raises:
      TypeError: Neither a recipe nor a model.
      ValueError: Unknown target.
    """
    file = target if isinstance(target, str) and target in TARGETS else ""
    try:
        profile = None if file else Profile.load(target)
    except ValueError as error:
        raise ValueError(f"Targets are {', '.join(TARGETS)} and hardware profiles. {error}") from None

    def run(weights: str, inputs: str, kind: str = "") -> Run:
        if profile is None:
            return targets.runs(weights, inputs, file, kind or None)
        reason = profile.why_not(weights, inputs)
        return Run(CANNOT, reason) if reason else Run(NATIVE)

    name = file if profile is None else profile.name
    if isinstance(recipe_or_model, Recipe):
        return SupportTable(name, tuple(_rows_of_recipe(recipe_or_model, run)))
    if not isinstance(recipe_or_model, keras.layers.Layer):
        raise TypeError(f"A plan is made for a recipe or a tf.keras model, got {type(recipe_or_model).__name__}.")
    return SupportTable(name, tuple(_rows_of_model(_graph_of(recipe_or_model), run, file)))


def _rows_of_recipe(recipe: Recipe, run: Callable[..., Run]) -> Iterator[Row]:
    for path, decisions in recipe.of_layers().items():
        weights, inputs = (
            recipe.formats[decisions[tensor]] if tensor in decisions else costs.FLOAT.name
            for tensor in ("weights", "activations")
        )
        yield Row(path, "", weights, inputs, run(weights, inputs))
    for path in recipe.float_layers:
        yield Row(path, "", costs.FLOAT.name, costs.FLOAT.name, run(costs.FLOAT.name, costs.FLOAT.name))


def _graph_of(model: keras.layers.Layer) -> ModelGraph:
    """The graph of a model, or of the network inside it if its formats are still being searched."""
    graph = getattr(model, "graph", None)
    return graph if isinstance(graph, ModelGraph) else ModelGraph(model)


def _rows_of_model(graph: ModelGraph, run: Callable[..., Run], target: str) -> Iterator[Row]:
    for path, layer in graph.layers:
        inner = walking.unwrapped(layer)
        kind = type(inner).__name__
        reason = _why_no_file(path, layer, target)
        if not layer_types.kernels(inner):
            if reason:
                yield Row(path, kind, "", "", Run(CANNOT, reason))
            continue
        for weights, inputs in _choices(layer):
            yield Row(path, kind, weights, inputs, Run(CANNOT, reason) if reason else run(weights, inputs, kind))


def _choices(layer: keras.layers.Layer) -> list[tuple[str, str]]:
    """(weight format, input format) pairs that a layer has or that its search may choose."""
    if not isinstance(layer, Quantized):
        return [(costs.FLOAT.name, costs.FLOAT.name)]
    weights = layer.weight_quantizers[0].space.names
    if layer.activation_quantizer is None:
        return [(w, costs.FLOAT.name) for w in weights]
    inputs = layer.activation_quantizer.space.names
    if len(weights) > 1 and layer.activation_decision == layer.weight_decision:
        return [(w, w) for w in weights]
    return [(w, a) for w in weights for a in inputs]


def _why_no_file(path: str, layer: keras.layers.Layer, target: str) -> str:
    """Why a file target cannot hold a layer, whatever its formats; "" if it can."""
    if target == "onnx" and not onnx_writer.takes(layer):
        kind = type(walking.unwrapped(layer)).__name__
        return f"the ONNX exporter does not support {kind}; fliqs_tf.export.packed takes any layer"
    if target == "tflite":
        return lowering.why_not(path, layer)
    return ""
