"""Arguments of a search model's `compile`: checks of them, and what of them a file holds."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf import costs
from fliqs_tf._keras import keras
from fliqs_tf.costs.profile import Profile
from fliqs_tf.search import rewards
from fliqs_tf.search.quality import quality_function

_LOG = logging.getLogger("fliqs_tf")
TRAIN_WITH = ("widest", "sample")
_MOST_INT32 = 2**31 - 1
# What a file does not hold.
_CODE = object()


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What a search model was compiled with, checked.

    Keras tracks the layers and metrics that it finds in the lists and dicts of a model; this object it leaves alone.

    Attributes:
      target: Target cost in the cost's unit, or None.
      cost: What is counted.
      table: Cost of samples.
      reward: An object of `rewards`.
      quality: See `quality.quality_function`.
      quality_every, quality_samples, search_steps, seed, sample_per_replica, train_with, pretrained: As for
        `SearchModel.compile`.
      given: {argument: what `compile` was given}, for a file.
    """

    target: float | None
    cost: costs.Cost
    table: costs.CostTable
    reward: rewards.Reward
    quality: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
    quality_every: int | None
    quality_samples: int
    search_steps: int | None
    seed: int
    sample_per_replica: bool
    train_with: str | None
    pretrained: bool | None
    given: Mapping[str, Any]

    @property
    def decides_on(self) -> tuple[str, str, rewards.Reward]:
        """What a decision depends on, beside the target."""
        return self.cost.name, self.cost.unit, self.reward


def checked(
    model: keras.Model,
    *,
    estimator: str,
    target_cost: float | str | None,
    cost: costs.Cost | Profile | str | None,
    reward: str | rewards.Reward | Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    quality: Any,
    quality_every: int | None,
    quality_samples: int,
    search_steps: int | None,
    seed: int,
    sample_per_replica: bool,
    train_with: str | None,
    pretrained: bool | None,
) -> CompileConfig:
    """What `SearchModel.compile` was given, checked.

    Args:
      model: The search model.
      estimator: That of its controller, see `Controller`.
      **: See `SearchModel.compile`.

    Raises:
      ValueError: What `SearchModel.compile` raises.
    """
    if train_with not in (None, *TRAIN_WITH):
        raise ValueError(f"train_with must be 'widest', 'sample' or None, got {train_with!r}.")
    if pretrained not in (None, False, True):
        raise ValueError(f"pretrained must be True, False or None, got {pretrained!r}.")
    if pretrained and (train_with == "sample" or estimator != "critic"):
        raise ValueError(
            "pretrained=True decides from readings before the first step, by the critic: it goes with neither "
            "train_with='sample' nor estimator='reinforce'. Leave one of them out."
        )
    numbers: dict[str, Any] = {
        "quality_every": None if quality_every is None else whole("quality_every", quality_every, 1),
        "quality_samples": whole("quality_samples", quality_samples, 2),
        "search_steps": None if search_steps is None else whole("search_steps", search_steps, 1),
        "seed": whole("seed", seed, -(2**31)),
        "sample_per_replica": bool(sample_per_replica),
        "train_with": train_with,
        "pretrained": None if pretrained is None else bool(pretrained),
    }
    cost_object, reward_object = cost_of(cost, model.profile), rewards.get(reward)
    if quality == "loss" and getattr(reward_object, "needs_positive_quality", False):
        raise ValueError(
            f"The reward {reward!r} multiplies quality, which must be positive; minus the loss is not. Use "
            f"quality='accuracy', or reward='one_sided'."
        )
    table = costs.CostTable(cost_object, model.sites, [(d.name, d.options) for d in model.decisions])
    target = None
    if target_cost is not None:
        target = costs.parse_target_cost(
            target_cost, lambda fmt: cost_object(model, fmt), cost_object.unit, table.reachable()
        )
        target_cost = target_cost if isinstance(target_cost, str) else target
    with model.distribute_strategy.scope():
        quality_of = quality_function(quality, getattr(model.network, "output_names", None) or ["output"])
    return CompileConfig(
        target=target,
        cost=cost_object,
        table=table,
        reward=reward_object,
        quality=quality_of,
        **numbers,
        given={"target_cost": target_cost, "cost": cost, "reward": reward, "quality": quality, **numbers},
    )


def whole(name: str, value: int | np.integer, least: int) -> int:
    """A number that steps are counted with, or that draws begin with, as Python's own int: files hold nothing else."""
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= _MOST_INT32:
        raise ValueError(f"{name} must be a whole number from {least} to {_MOST_INT32}, got {value!r}.")
    return number


def cost_of(cost: str | costs.Cost | Profile | None, profile: Profile | None) -> costs.Cost:
    """The cost that `compile` was asked for: a name, a `Cost` or a `Profile`; None: that of the profile, or BOPs.

    Raises:
      ValueError: None of these.
    """
    cost = (profile or "bops") if cost is None else cost
    if isinstance(cost, str) and cost in costs.NAMES:
        return costs.NAMES[cost]
    cost = cost.cost if isinstance(cost, Profile) else cost
    if not isinstance(cost, costs.Cost):
        raise ValueError(
            f"Unknown cost {cost!r}; known: {', '.join(costs.NAMES)}, or give a fliqs_tf.Profile or a "
            f"fliqs_tf.costs.Cost."
        )
    return cost


def _as_data(value: Any) -> Any:
    """An argument of `compile` as data of a file, which `from_config` reads; `_CODE` for what is code."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Profile) or (isinstance(value, keras.metrics.Metric) and _is_of_keras(value)):
        return keras.saving.serialize_keras_object(value)
    for name, reward in rewards.NAMES.items():
        if type(value) is reward:
            return {"reward": name, "beta": value.beta}
    if isinstance(value, costs.Cost):
        for name, cost in costs.NAMES.items():
            if value is cost:
                return name
        profile = getattr(value.layer, "__self__", None)  # its costs are methods of a profile
        if isinstance(profile, Profile) and value in (profile.cost, profile.memory):
            data = keras.saving.serialize_keras_object(profile)
            return data if value == profile.cost else {"memory_on": data}
    return _CODE


def _is_of_keras(value: object) -> bool:
    return type(value).__module__.split(".")[0] == keras.__name__


def to_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds of the arguments: all of them as data, or under "code" the names of those that are none."""
    data = {name: _as_data(value) for name, value in given.items()}
    code = [name for name, value in data.items() if value is _CODE]
    if not code:
        return data
    _LOG.warning(
        "A file does not hold Python code, such as this %s of compile: a model loaded from it will not be compiled, "
        "and has to be compiled anew. What can be saved: names, numbers, objects of fliqs_tf.rewards, profiles and "
        "their costs, metrics of Keras.",
        ", ".join(code),
    )
    return {"code": code}


def holds_all(config: Mapping[str, Any], model_name: str) -> bool:
    """False, and a warning, for a file of a model that was compiled with code."""
    if code := config.get("code"):
        _LOG.warning(
            "Model %r is not compiled: it was with a %s of Python code, which the file does not hold. Call compile "
            "with all of its arguments.",
            model_name,
            ", ".join(code),
        )
    return not code


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `compile` again, from what Keras has deserialized."""
    config = dict(config)
    if isinstance(config.get("reward"), dict):
        config["reward"] = rewards.get(**config["reward"])
    if isinstance(config.get("cost"), dict):
        config["cost"] = config["cost"]["memory_on"].memory
    return config
