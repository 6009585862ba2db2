"""Recipes for other budgets than the one that was searched for: effects on quality do not depend on the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fliqs_tf import costs
from fliqs_tf._keras import keras
from fliqs_tf.numerics.formats import Format
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.search import choosing, rewards

# Rows of a table of budgets where nothing says which.
_ROWS = 12


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a recipe costs, and what the critic expects of it.

    Attributes:
      target_cost: The most that it may cost, in the cost's unit; of a uniform format what it costs.
      cost: What it costs, in the same unit.
      loss: Quality that the critic expects it to lose against the widest formats of the search, in units of quality.
      deviation: Standard deviation of that expectation.
      recipe: The recipe.
    """

    target_cost: float
    cost: float
    loss: float
    deviation: float
    recipe: Recipe

    def to_dict(self) -> dict[str, float | dict[str, str]]:
        """Plain data for JSON, of the recipe its formats."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "recipe": dict(self.recipe.formats),
        }


def recipe(model: keras.Model, target_cost: float | str) -> Recipe:
    """See `SearchModel.recipe`."""
    beliefs = _beliefs(model)
    return recipe_of(model, _best(model, beliefs, _number(model, target_cost)))


def table(model: keras.Model, targets: Sequence[float | str] | None) -> list[Budget]:
    """See `SearchModel.pareto`."""
    beliefs = _beliefs(model)
    if targets is None:
        low, high = model.cost_table.reachable()
        numbers = np.geomspace(low, high, num=_ROWS).tolist()
    else:
        numbers = [_number(model, target) for target in targets]
    return [_budget(model, beliefs, target, _best(model, beliefs, target)) for target in numbers]


def uniform(model: keras.Model) -> dict[str, Budget]:
    """{format: what the critic expects of it everywhere}, for formats that all decisions may take."""
    beliefs = _beliefs(model)
    first, *others = (set(decision.options) for decision in model.decisions)
    shared = sorted(first.intersection(*others), key=lambda name: Format(name).bits)
    rows = {}
    for name in shared:
        sample = np.array([decision.options.index(name) for decision in model.decisions])
        rows[name] = _budget(model, beliefs, float(model.cost_table.of_samples(sample)[0]), sample)
    return rows


def _beliefs(model: keras.Model) -> choosing.Beliefs:
    beliefs = model.controller.beliefs()
    if not model.controller.readings():
        raise RuntimeError("Nothing is known of other budgets yet: quality was never read. Call fit first.")
    return beliefs


def _number(model: keras.Model, target_cost: float | str) -> float:
    cost = model.cost
    return costs.parse_target_cost(target_cost, lambda fmt: cost(model, fmt), cost.unit, model.cost_table.reachable())


def _best(model: keras.Model, beliefs: choosing.Beliefs, target: float) -> np.ndarray:
    start = np.array(model.controller.most_likely())
    return choosing.choose(
        beliefs, model.controller.mask, model.cost_table.of_samples, rewards.OneSided(), target, start
    )


def _budget(model: keras.Model, beliefs: choosing.Beliefs, target: float, sample: np.ndarray) -> Budget:
    widest = np.array([len(decision.options) - 1 for decision in model.decisions])
    gain, deviation = beliefs.gain(sample[None], widest)
    cost = float(model.cost_table.of_samples(sample)[0])
    return Budget(target, cost, -float(gain[0]), float(deviation[0]), recipe_of(model, sample))


def recipe_of(model: keras.Model, sample: np.ndarray) -> Recipe:
    """A sample of a search model, int [decisions], as a recipe."""
    formats = {d.name: d.options[i] for d, i in zip(model.decisions, sample.tolist())}
    return costs.recipe_of(model.sites, formats)
