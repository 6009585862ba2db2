"""The cost of samples, from prices computed once, and the target of a search."""

from __future__ import annotations

import math
import numbers
import re
import reprlib
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from fliqs_tf.costs.counting import Site
from fliqs_tf.costs.pricing import Cost
from fliqs_tf.numerics.formats import Format


class CostTable:
    """A cost over samples: every price that a search can meet, computed once.

    The total is a constant (fixed layers), plus a table per decision (layers whose weights and input follow the
    same decision, or of which one is fixed), plus a matrix per pair of decisions (weights and input apart).

    Args:
      cost: What to count.
      sites: Layers, see `sites`.
      decisions: [(name, names of its formats)], in the order of a sample's entries.
    """

    def __init__(self, cost: Cost, sites: Sequence[Site], decisions: Sequence[tuple[str, Sequence[str]]]):
        index: dict[str | None, int] = {name: i for i, (name, _) in enumerate(decisions)}
        options = [[Format(f) for f in names] for _, names in decisions]
        self.unit, self.per_unit = cost.unit, cost.per_unit
        width = max(len(formats) for formats in options)
        self.constant = 0
        # float64 holds whole numbers up to 2^53 exactly, 9 million GBOPs; float32 would lose digits.
        self.tables = np.zeros((len(options), width))
        self.pairs: dict[tuple[int, int], np.ndarray] = {}
        for site in sites:
            w, a = index.get(site.weight_decision), index.get(site.activation_decision)
            weight_formats = options[w] if w is not None else [Format(f) for f in site.weight_formats]
            input_formats = options[a] if a is not None else [Format(f) for f in site.activation_formats]
            if w is not None and w == a:  # formats that never meet need not have a price
                self.tables[w, : len(weight_formats)] += [float(cost.layer(site, f, f)) for f in weight_formats]
                continue
            prices = np.array([[cost.layer(site, f, g) for g in input_formats] for f in weight_formats], np.float64)
            if w is None and a is None:
                self.constant += prices[0, 0]
            elif a is None:
                self.tables[w, : len(weight_formats)] += prices[:, 0]
            elif w is None:
                self.tables[a, : len(input_formats)] += prices[0]
            else:
                matrix = self.pairs.setdefault((w, a), np.zeros((width, width)))
                matrix[: len(weight_formats), : len(input_formats)] += prices
        self.sizes = [len(formats) for formats in options]

    def of_samples(self, samples: ArrayLike) -> np.ndarray:
        """Exact cost of samples. Args: int array [m, decisions]. Returns: float64 [m], in the unit."""
        rows = np.atleast_2d(np.asarray(samples))
        total = self.constant + self.tables[np.arange(len(self.sizes)), rows].sum(axis=1)
        for (w, a), matrix in self.pairs.items():
            total = total + matrix[rows[:, w], rows[:, a]]
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

    def _extreme(self, best: Callable[[np.ndarray], np.intp]) -> float:
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


def parse_target_cost(
    text: str | float, model_cost: Callable[[str], float], unit: str, reachable: tuple[float, float]
) -> float:
    """A target cost in the cost's unit.

    Args:
      text: A number in the unit, or "0.25x INT8": relative to every quantized layer in one format.
      model_cost: format name -> cost of that uniform network.
      unit: For messages.
      reachable: Least and greatest cost of the search space.

    Raises:
      ValueError: Not a number, or out of reach; prints the reachable range.
    """
    value: object = text
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(?:[x*]\s*([A-Za-z0-9]+))?\s*", text)
        try:
            value = float(match[1] if match else "")
        except ValueError:
            raise ValueError(
                f"target_cost must be a number in {unit} or relative to a uniform format, such as '0.25x INT8'; "
                f"got {text!r}."
            ) from None
        if match and match[2]:
            value = value * model_cost(Format(match[2]).name)
    low, high = reachable
    target = _finite(value)
    if target is None:
        raise ValueError(
            f"target_cost must be a number in {unit} or a text such as '0.25x INT8', got {reprlib.repr(text)}."
        )
    slack = 1e-6 * high
    if not low - slack <= target <= high + slack:
        given = f" ({text!r})" if isinstance(text, str) else ""
        raise ValueError(
            f"target_cost {target:.6g} {unit}{given} is out of reach: the formats of this search cost from {low:.6g} "
            f"to {high:.6g} {unit}."
        )
    return target


def _finite(value: object) -> float | None:
    """A number that float64 can hold; None for anything else."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
