"""Recipes: which format each decision has, the result of a search. JSON both ways."""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fliqs_tf._keras import keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.io.files import first_repeated, read_json, write_json
from fliqs_tf.numerics.formats import Format

TENSORS = ("together", "weights", "separate")
_KEYS = ("formats", "tensors", "layers")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Decision name -> format name.

    Attributes:
      formats: {"conv1": "INT8", ...}, in network order.
      tensors: "together" (a decision sets weights and input of its layers), "weights" (only the weights are
        quantized) or "separate" (decisions "conv1/weights" and "conv1/activations").
      layers: {decision: [layer paths]} for decisions that do not stand for the one layer of their name.
      info: What else the file says (cost, target, accuracy, versions, seed, flags); free-form.
    """

    formats: Mapping[str, str]
    tensors: str = "together"
    layers: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.formats, Mapping) or not self.formats:
            raise ValueError(f'A recipe needs "formats": {{decision: format}}, got {reprlib.repr(self.formats)}.')
        if self.tensors not in TENSORS:
            raise ValueError(f'"tensors" must be one of {", ".join(TENSORS)}, got {reprlib.repr(self.tensors)}.')
        object.__setattr__(self, "formats", {str(k): _format_name(k, v) for k, v in self.formats.items()})
        object.__setattr__(self, "layers", _layer_lists(self.layers, self.formats))
        if self.tensors == "separate":
            _check_pairs(self.formats)
        self.of_layers()
        in_float = self.info.get("float_layers", ())
        if not isinstance(in_float, (list, tuple)) or not all(isinstance(p, str) for p in in_float):
            raise ValueError(f'"float_layers" must be a list of layer names, got {reprlib.repr(in_float)}.')

    @classmethod
    def uniform(cls, model: keras.Model, fmt: Format | str) -> Recipe:
        """One format for every decision of a wrapped (or every quantizable layer of a plain) model.

        Args:
          model: What `fliqs_tf.wrap` returned, or a Keras model.
          fmt: Format or its name.

        Raises:
          ValueError: A model whose formats are fixed, or one without a layer to quantize.
        """
        name = Format(fmt).name
        if hasattr(model, "recipe"):
            recipe = model.recipe()
            info = {"float_layers": list(recipe.float_layers)} if recipe.float_layers else {}
            in_float = {f"{site.path}/activations" for site in model.sites if site.activation_decision is None}
            formats = {d: "FP32" if d in in_float else name for d in recipe.formats}
            return dataclasses.replace(recipe, formats=formats, info=info)
        graph = ModelGraph(model)
        if any(hasattr(layer, "quantized_layer") for _, layer in graph.layers):
            raise ValueError(
                f"Model {model.name!r} has fixed formats already. Give the search model that it was deployed from, or "
                "the float model."
            )
        return cls({path: name for path, _ in graph.with_kernels})

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Layers that the search left in float, from `info`."""
        return tuple(self.info.get("float_layers", ()))

    def of_layers(self) -> dict[str, dict[str, str]]:
        """{layer path: {"weights": decision, "activations": decision}}, without activations that stay in float.

        Raises:
          ValueError: A layer is in two decisions.
        """
        found: dict[str, dict[str, str]] = {}
        both = {"together": ("weights", "activations"), "weights": ("weights",)}
        for decision in self.formats:
            name, reads = decision, both.get(self.tensors)
            if reads is None:
                name, _, read = decision.rpartition("/")
                reads = (read,)
            for path in self.layers.get(decision, (name,)):
                for read in reads:
                    other = found.setdefault(path, {}).setdefault(read, decision)
                    if other != decision:
                        raise ValueError(f"Layer {path!r} is in the decisions {other!r} and {decision!r}.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` of it is an equal recipe."""
        layers = {"layers": {k: list(v) for k, v in self.layers.items()}} if self.layers else {}
        own = {"formats": dict(self.formats), "tensors": self.tensors, **layers}
        return {**own, **{k: v for k, v in self.info.items() if k not in _KEYS}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Reads what `to_dict` gives; keys it does not know are kept as `info`.

        Raises:
          ValueError: Says which entry is wrong and what is allowed.
        """
        if not isinstance(data, Mapping) or "formats" not in data:
            raise ValueError('A recipe is a JSON object with the key "formats": {decision: format}.')
        info = {k: v for k, v in data.items() if k not in _KEYS}
        return cls(data["formats"], data.get("tensors", "together"), data.get("layers", {}), info)

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, whole or not at all: the file is written beside its place and then renamed."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """Reads what `save` wrote.

        Raises:
          ValueError: The file is not a recipe; the message names the file and what is wrong.
          OSError: It cannot be read.
        """
        data = read_json(path, "recipe")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path} is not a recipe: {error}") from None

    def check(self, decisions: Iterable[str], model_name: str) -> None:
        """Raises unless the recipe has exactly these decisions.

        Raises:
          ValueError: Lists what is missing and what is unknown.
        """
        decisions = dict.fromkeys(decisions)
        missing = [d for d in decisions if d not in self.formats]
        unknown = [d for d in self.formats if d not in decisions]
        problems = [
            f"{what} {_listed(names)}" for what, names in (("no format for", missing), ("unknown", unknown)) if names
        ]
        if problems:
            raise ValueError(
                f"The recipe does not fit model {model_name!r}: {'; '.join(problems)}. The model's decisions are "
                f"{_listed(list(decisions))}."
            )


def add_float_inputs(formats: dict[str, str], layers: dict[str, list[str]]) -> None:
    """Adds FP32 inputs for decisions on weights alone, as "separate" requires; changes both arguments.

    Args:
      formats: {decision: format}.
      layers: {decision: [paths of all its layers]}.
    """
    for decision in [d for d in formats if d.endswith("/weights")]:
        other = decision.removesuffix("weights") + "activations"
        if other not in formats:
            formats[other], layers[other] = "FP32", layers[decision]


def _check_pairs(formats: Collection[str]) -> None:
    """Weights and activations chosen apart: both must be there."""
    for decision in formats:
        layer, _, tensor = decision.rpartition("/")
        other = {"weights": "activations", "activations": "weights"}.get(tensor)
        if not layer or not other:
            raise ValueError(
                f'With "tensors": "separate" decisions are named "LAYER/weights" and "LAYER/activations", '
                f"got {decision!r}."
            )
        if f"{layer}/{other}" not in formats:
            raise ValueError(f'"formats" has {decision!r} but not "{layer}/{other}".')


def _format_name(decision: str, fmt: Format | str) -> str:
    try:
        return Format(fmt).name
    except ValueError as error:
        raise ValueError(f"Decision {decision!r}: {error}") from None


def _layer_lists(layers: Mapping[str, Sequence[str]], formats: Collection[str]) -> dict[str, tuple[str, ...]]:
    if not isinstance(layers, Mapping):
        raise ValueError(f'"layers" must be {{decision: [layer names]}}, got {reprlib.repr(layers)}.')
    for decision, paths in layers.items():
        if decision not in formats:
            raise ValueError(f'"layers" names the decision {decision!r}, which "formats" does not have.')
        if not isinstance(paths, (list, tuple)) or not paths or not all(isinstance(p, str) for p in paths):
            raise ValueError(
                f'"layers" of decision {decision!r} must be a list of layer names, got {reprlib.repr(paths)}.'
            )
        if len(set(paths)) < len(paths):
            raise ValueError(f"Layer {first_repeated(paths)!r} is in {decision!r} twice.")
    return {k: tuple(v) for k, v in layers.items()}


def _listed(names: list[str], most: int = 8) -> str:
    shown = ", ".join(repr(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
