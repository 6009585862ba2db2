"""Costs: what a network with given formats costs. Exact integers per layer, summed.

A `Cost` prices one layer from its MACs, its weights and its two formats; the cost of a network is the sum. Called
with a model and formats it gives the total in its unit:

    fliqs_tf.costs.bops(model, "INT4")         # a format for every quantized layer
    fliqs_tf.costs.bops(qmodel, recipe)        # a recipe
    fliqs_tf.costs.bops(qmodel.deploy())       # a model whose formats are fixed

Layers of known classes that stay in float count as FP32. What the log lists as not known (an LSTM, a class of one's
own) and tables that were not asked for are not counted, whatever the formats.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf import trace
from fliqs_tf.formats import Format
from fliqs_tf.products import Product
from fliqs_tf.quantized import Quantized
from fliqs_tf.recipe import Recipe, add_float_inputs

FLOAT = Format("FP32")
_LARGEST = sys.float_info.max


@dataclasses.dataclass(frozen=True)
class Site:
    """One layer with a kernel, or a quantized product of two activations, as a cost sees it.

    Attributes:
      path: Layer path, "encoder/conv1".
      macs: Multiply-adds per example, over all calls.
      weights: Kernel entries.
      weight_formats, activation_formats: Menus as names; ("FP32",) for what stays in float.
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


def sites(model, input_shape=None, named=()) -> list[Site]:
    """The layers of a model that a cost counts, in network order.

    Args:
      model: A wrapped, deployed or plain Keras model. In a plain one every quantizable layer is a site that
        may take any format; in a quantized one layers that are not quantized stay in FP32.
      input_shape, named: See `trace.trace`.
    """
    if hasattr(model, "sites"):
        return model.sites
    kinds = (Quantized, Product)
    owners = {id(trace.inside(layer)): layer for _, layer in trace.walk(model) if isinstance(layer, kinds)}
    traced = trace.trace(model, input_shape, named)
    return [_site(layer, owners.get(id(layer.layer)), plain=not owners) for layer in traced]


def _site(traced: trace.TracedLayer, quantized: Quantized | Product | None, plain: bool) -> Site:
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


@dataclasses.dataclass(frozen=True)
class Cost:
    """A price per layer and a unit.

    Attributes:
      name: What is counted.
      unit: Unit of the total.
      per_unit: Layer prices are divided by this for the total.
      layer: (site, weight format, activation format) -> price of the layer; a whole number or a `Fraction` if it is
        to be exact. ValueError where the layer cannot run so.
    """

    name: str
    unit: str
    per_unit: int
    layer: Callable[[Site, Format, Format], int]

    def __call__(self, model, formats: Recipe | Format | str | None = None) -> float:
        """Total cost of a model in `unit`.

        Args:
          model: A wrapped, deployed or plain Keras model, or what `site_formats` gave.
          formats: A recipe, or one format for every quantized layer. None: the formats of a deployed model, or the
            most likely ones of a wrapped model.

        Raises:
          ValueError: The recipe does not fit the model.
        """
        priced = site_formats(model, formats)
        return float(sum(self.layer(site, w, a) for site, w, a in priced) / self.per_unit)


def site_formats(model, formats: Recipe | Format | str | None = None) -> list[tuple[Site, Format, Format]]:
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
    found = sites(model, named=named)
    in_float = {path for path, _ in trace.attention_products(model)} if named and not hasattr(model, "sites") else set()
    if uncounted := (in_float & set(named)) - {site.path for site in found}:
        raise ValueError(
            f"The recipe has a format for {min(uncounted)!r}, a product of activations that model {name!r} has in "
            f"float and does not count. Give the wrapped model, or that of fliqs_tf.apply(model, recipe)."
        )
    return [(site, *_formats_of(site, formats, name)) for site in found]


def _formats_of(site: Site, formats, model_name: str) -> tuple[Format, Format]:
    is_recipe = isinstance(formats, Recipe)
    of_layer = formats.of_layers().get(site.path) if is_recipe else None

    def pick(tensor, decision, menu):
        if decision is None:
            return FLOAT
        if formats is None:
            return Format(menu[0])
        if not is_recipe:
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


def recipe_of(sites: Sequence[Site], formats: dict[str, str]) -> Recipe:
    """The recipe of a wrapped network's sites.

    Where layers are quantized in different ways, which `wrap` does not do, but a `Quantized` of one's own or a
    configuration of TFMOT does, it is a "separate" one that names every layer's weights and input by themselves.

    Args:
      sites: See `sites`.
      formats: {decision: format}; a decision that is not in it has the first format of its menu.
    """
    in_float = [s.path for s in sites if s.weight_decision is None]
    info = {"float_layers": in_float} if in_float else {}
    kinds = {_tensors(site) for site in sites if not site.is_table} - {None}
    if len(kinds) > 1:
        ordered = {name: formats.get(end, menu[0]) if end else menu[0] for name, end, menu in _ends_by_layer(sites)}
        return Recipe(ordered, "separate", info=info)
    (kind,) = kinds or {"weights"}
    ordered, layers = {}, {}
    for site in sites:
        ends = ((site.weight_decision, site.weight_formats), (site.activation_decision, site.activation_formats))
        for decision, menu in ends:
            if decision is not None:
                ordered[decision] = formats.get(decision, menu[0])
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
    """(name in a recipe that names layers one by one, decision, menu) of weights and inputs."""
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


bops = Cost("BOPs", "GBOPs", 10**9, lambda site, w, a: site.macs * w.bits * a.bits)
"""Bit operations: sum of MACs * weight bits * activation bits, in GBOPs per example (arXiv 2308.03290)."""

memory = Cost("memory", "MiB", 8 * 2**20, lambda site, w, a: site.weights * w.bits)
"""Size of the kernels: sum of weights * weight bits, in MiB."""

NAMES = {"bops": bops, "memory": memory}


class CostTable:
    """A cost over samples: every price that a search can meet, computed once.

    The total is a constant (fixed layers), plus a table per decision (layers whose weights and input follow the
    same decision, or of which one is fixed), plus a matrix per pair of decisions (weights and input apart).

    Args:
      cost: What to count.
      sites: Layers, see `sites`.
      decisions: [(name, menu names)], in the order of a sample's entries.
    """

    def __init__(self, cost: Cost, sites: Sequence[Site], decisions: Sequence[tuple[str, Sequence[str]]]):
        index = {name: i for i, (name, _) in enumerate(decisions)}
        menus = [[Format(f) for f in menu] for _, menu in decisions]
        self.unit, self.names = cost.unit, list(index)
        self.per_unit = cost.per_unit
        width = max(len(menu) for menu in menus)
        self.constant = 0
        # float64 holds whole numbers up to 2^53 exactly, 9 million GBOPs; float32 would lose digits.
        self.tables = np.zeros((len(menus), width))
        self.pairs: dict[tuple[int, int], np.ndarray] = {}
        for site in sites:
            w, a = index.get(site.weight_decision), index.get(site.activation_decision)
            weight_menu = menus[w] if w is not None else [Format(f) for f in site.weight_formats]
            input_menu = menus[a] if a is not None else [Format(f) for f in site.activation_formats]
            if w is not None and w == a:  # formats that never meet need not have a price
                self.tables[w, : len(weight_menu)] += [float(cost.layer(site, f, f)) for f in weight_menu]
                continue
            prices = np.array([[cost.layer(site, f, g) for g in input_menu] for f in weight_menu], np.float64)
            if w is None and a is None:
                self.constant += prices[0, 0]
            elif a is None:
                self.tables[w, : len(weight_menu)] += prices[:, 0]
            elif w is None:
                self.tables[a, : len(input_menu)] += prices[0]
            else:
                matrix = self.pairs.setdefault((w, a), np.zeros((width, width)))
                matrix[: len(weight_menu), : len(input_menu)] += prices
        self.sizes = [len(menu) for menu in menus]

    def of_samples(self, samples) -> np.ndarray:
        """Exact cost of samples. Args: int array [m, decisions]. Returns: float64 [m], in the unit."""
        samples = np.atleast_2d(np.asarray(samples))
        total = self.constant + self.tables[np.arange(len(self.sizes)), samples].sum(axis=1)
        for (w, a), matrix in self.pairs.items():
            total = total + matrix[samples[:, w], samples[:, a]]
        return total / self.per_unit

    def expected(self, probabilities: tf.Tensor) -> tf.Tensor:
        """Expected cost of independent decisions. Args: float32 [decisions, options]. Returns: scalar, in the unit."""
        total = self.constant / self.per_unit + tf.reduce_sum(
            probabilities * tf.constant(self.tables / self.per_unit, tf.float32)
        )
        if self.pairs:
            rows, columns = (list(side) for side in zip(*self.pairs))
            matrices = tf.constant(np.stack(list(self.pairs.values())) / self.per_unit, tf.float32)
            total += tf.einsum(
                "pi,pij,pj->", tf.gather(probabilities, rows), matrices, tf.gather(probabilities, columns)
            )
        return total

    def reachable(self) -> tuple[float, float]:
        """Least and greatest cost of any sample, in the unit."""
        return self._extreme(np.argmin), self._extreme(np.argmax)

    def _extreme(self, best) -> float:
        """Decision by decision until nothing changes: exact when decisions price layers of their own, and for any
        cost that rises with each format on its own, as BOPs and memory do."""
        sample = np.array([best(self.tables[d, :n]) for d, n in enumerate(self.sizes)])
        for _ in range(2 + len(self.sizes)):
            before = sample.copy()
            for d, n in enumerate(self.sizes):
                options = np.repeat(sample[None], n, axis=0)
                options[:, d] = np.arange(n)
                sample[d] = best(self.of_samples(options))
            if (sample == before).all():
                break
        return float(self.of_samples(sample)[0])


def target(text: str | float, model_cost: Callable[[str], float], unit: str, reachable: tuple[float, float]) -> float:
    """A target cost in the cost's unit.

    Args:
      text: A number in the unit, or "0.25x INT8": relative to every quantized layer in one format.
      model_cost: format name -> cost of that uniform network.
      unit: For messages.
      reachable: Least and greatest cost of the search space.

    Raises:
      ValueError: Not a number, or out of reach; prints the reachable range.
    """
    value: Any = text
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(?:[x*]\s*([A-Za-z0-9]+))?\s*", text)
        try:
            value = float(match[1])
        except (TypeError, ValueError):
            raise ValueError(
                f"target_cost must be a number in {unit} or relative to a uniform format, such as '0.25x INT8'; "
                f"got {text!r}."
            ) from None
        if match[2]:
            value *= model_cost(Format(match[2]).name)
    low, high = reachable
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(value) <= _LARGEST:
        raise ValueError(
            f"target_cost must be a number in {unit} or a text such as '0.25x INT8', got {reprlib.repr(text)}."
        )
    slack = 1e-6 * high
    if not low - slack <= value <= high + slack:
        given = f" ({text!r})" if isinstance(text, str) else ""
        raise ValueError(
            f"target_cost {value:.6g} {unit}{given} is out of reach: the formats of this search cost from {low:.6g} to "
            f"{high:.6g} {unit}."
        )
    return float(value)
