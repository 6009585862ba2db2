"""What costs count: the layers of a model with their MACs, weights and formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fliqs_tf._keras import keras
from fliqs_tf.graph import tracing, walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.attention import Product
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.numerics.formats import Format
from fliqs_tf.quantize.recipe import Recipe, add_float_inputs

FLOAT = Format("FP32")


@dataclasses.dataclass(frozen=True)
class Site:
    """One layer with a kernel, or a quantized product of two activations, as a cost sees it.

    Attributes:
      path: Layer path, "encoder/conv1".
      macs: Multiply-adds per example, over all calls.
      weights: Kernel entries.
      weight_formats, activation_formats: Names of the formats to choose from; ("FP32",) for what stays in float.
      weight_decision, activation_decision: Names of the decisions; None for what stays in float.
      is_table: True for an embedding, of which only the weights count.
    """

    path: str
    macs: int
    weights: int
    weight_formats: tuple[str, ...] = (FLOAT.name,)
    activation_formats: tuple[str, ...] = (FLOAT.name,)
    weight_decision: str | None = None
    activation_decision: str | None = None
    is_table: bool = False


def sites(model: keras.Model, input_shape: Any = None, named: Collection[str] = ()) -> list[Site]:
    """The layers of a model that a cost counts, in network order.

    Args:
      model: A wrapped, deployed or plain Keras model. In a plain one every quantizable layer is a site that
        may take any format; in a quantized one layers that are not quantized stay in FP32.
      input_shape, named: See `tracing.trace`.
    """
    if hasattr(model, "sites"):
        return model.sites
    graph = ModelGraph.of(model)
    owners = {id(walking.unwrapped(layer)): layer for _, layer in graph.of_type(Quantized, Product)}
    traced = tracing.trace(graph, input_shape, named)
    return [_site(layer, owners.get(id(layer.layer)), plain=not owners) for layer in traced]


def _site(traced: tracing.TracedLayer, quantized: Quantized | Product | None, plain: bool) -> Site:
    if quantized is None:
        name = traced.path if plain else None
        inputs = None if traced.is_table else name
        return Site(
            traced.path,
            traced.macs,
            traced.weights,
            weight_decision=name,
            activation_decision=inputs,
            is_table=traced.is_table,
        )
    activations = quantized.activation_quantizer
    return Site(
        traced.path,
        traced.macs,
        traced.weights,
        quantized.weight_quantizers[0].space.names,
        activations.space.names if activations is not None else (FLOAT.name,),
        quantized.weight_decision,
        quantized.activation_decision if activations is not None else None,
        traced.is_table,
    )


def site_formats(
    model: keras.Model | list[tuple[Site, Format, Format]], formats: Recipe | Format | str | None = None
) -> list[tuple[Site, Format, Format]]:
    """What a cost prices: (layer, weight format, input format) in network order.

    Costs and profiles take it in place of a model, which saves tracing the model for each of them.

    Args:
      model, formats: As for `Cost`.

    Raises:
      ValueError: The recipe does not fit the model.
    """
    if isinstance(model, list):
        return model
    if formats is None and hasattr(model, "recipe"):
        formats = model.recipe()
    name = getattr(model, "name", "")
    named = formats.of_layers() if isinstance(formats, Recipe) else ()
    if hasattr(model, "sites"):
        found, uncounted = model.sites, set()
    else:
        graph = ModelGraph.of(model)
        found = sites(graph, named=named)
        uncounted = {path for path, _ in graph.attention_products if path in named} - {site.path for site in found}
    if uncounted:
        raise ValueError(
            f"The recipe has a format for {min(uncounted)!r}, a product of activations that model {name!r} has in "
            f"float and does not count. Give the wrapped model, or that of fliqs_tf.apply(model, recipe)."
        )
    return [(site, *_formats_of(site, formats, name)) for site in found]


def _formats_of(site: Site, formats: Recipe | Format | str | None, model_name: str) -> tuple[Format, Format]:
    of_layer = formats.of_layers().get(site.path) if isinstance(formats, Recipe) else None

    def pick(tensor: str, decision: str | None, options: Sequence[str]) -> Format:
        if decision is None:
            return FLOAT
        if formats is None:
            return Format(options[0])
        if not isinstance(formats, Recipe):
            return Format(formats)
        if of_layer is not None:  # the decisions of a plain model are not yet those of the recipe
            decision = of_layer.get(tensor)
        elif site.path in formats.float_layers:
            decision = None
        if decision is None:
            return FLOAT
        if decision not in formats.formats:
            raise ValueError(f"The recipe has no format for {decision!r} of model {model_name!r}.")
        return Format(formats.formats[decision])

    return (
        pick("weights", site.weight_decision, site.weight_formats),
        pick("activations", site.activation_decision, site.activation_formats),
    )


def recipe_of(sites: Sequence[Site], formats: Mapping[str, str]) -> Recipe:
    """The recipe of a wrapped network's sites.

    Where layers are quantized in different ways, which `wrap` does not do, but a `Quantized` of one's own or a
    configuration of TFMOT does, it is a "separate" one that names every layer's weights and input by themselves.

    Args:
      sites: See `sites`.
      formats: {decision: format}; a decision that is not in it has the first of its formats.
    """
    in_float = [s.path for s in sites if s.weight_decision is None]
    info = {"float_layers": in_float} if in_float else {}
    kinds = {kind for site in sites if not site.is_table and (kind := _tensors(site)) is not None}
    if len(kinds) > 1:
        by_layer = {
            name: formats.get(end, options[0]) if end else options[0] for name, end, options in _ends_by_layer(sites)
        }
        return Recipe(by_layer, "separate", info=info)
    (kind,) = kinds or {"weights"}
    ordered: dict[str, str] = {}
    layers: dict[str, list[str]] = {}
    for site in sites:
        ends = ((site.weight_decision, site.weight_formats), (site.activation_decision, site.activation_formats))
        for decision, options in ends:
            if decision is not None:
                ordered[decision] = formats.get(decision, options[0])
                if site.path not in layers.setdefault(decision, []):
                    layers[decision].append(site.path)
    if kind == "separate":
        add_float_inputs(ordered, layers)
    named = {d: p for d, p in layers.items() if p != [d.rpartition("/")[0] if kind == "separate" else d]}
    return Recipe(ordered, kind, named, info)


def formats_of(sites: Sequence[Site], recipe: Recipe) -> dict[str, str]:
    """{decision of the sites: format}, the inverse of `recipe_of`.

    Raises:
      ValueError: The recipe gives a decision two formats, or a format to an input that stays in float.
    """
    decided = recipe.of_layers()
    found: dict[str, tuple[str, str]] = {}  # decision -> format and the entry of the recipe that says so
    for site in sites:
        names = decided.get(site.path, {})
        ends = ((site.weight_decision, names.get("weights")), (site.activation_decision, names.get("activations")))
        for decision, name in ends:
            if name is None or site.weight_decision is None:
                continue
            fmt = recipe.formats[name]
            if decision is None:
                if fmt != FLOAT.name and recipe.tensors == "separate":
                    raise ValueError(f"The recipe gives {name!r} {fmt}, but the input of {site.path!r} stays in float.")
                continue
            before = found.setdefault(decision, (fmt, name))
            if before[0] != fmt:
                raise ValueError(
                    f"The recipe gives {before[1]!r} {before[0]} and {name!r} {fmt}, but they are one decision, "
                    f"{decision!r}."
                )
    return {decision: fmt for decision, (fmt, _) in found.items()}


def _ends_by_layer(sites: Sequence[Site]) -> Iterator[tuple[str, str | None, tuple[str, ...]]]:
    """(name in a recipe that names layers one by one, decision, formats) of weights and inputs."""
    for site in sites:
        if site.weight_decision is not None:
            yield f"{site.path}/weights", site.weight_decision, site.weight_formats
            yield f"{site.path}/activations", site.activation_decision, site.activation_formats


def _tensors(site: Site) -> str | None:
    if site.weight_decision is None:
        return None
    if site.activation_decision is None:
        return "weights"
    return "together" if site.activation_decision == site.weight_decision else "separate"
