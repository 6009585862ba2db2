"""Rewards: one number from quality and cost.

A reward is a callable `reward(quality, cost_ratio) -> tensor`, cost_ratio = C / C0 being cost over target cost. It is
elementwise: scalars or tensors of one shape. Its `slope` is the price of cost in units of quality:

    slope = -(dR / d ratio) / (dR / d Q)

| name | reward | slope |
|---|---|---|
| absolute (TuNAS, the paper's) | Q + beta * abs(ratio - 1) | -beta * sign(ratio - 1) |
| one_sided | Q + beta * max(ratio - 1, 0) | -beta above the target, else 0 |
| soft_exponential (MnasNet) | Q * ratio^beta | -beta * Q / ratio |
| hard_exponential | Q * min(ratio^beta, 1) | -beta * Q / ratio above the target, else 0 |

with beta < 0. The exponential ones need quality > 0, so they are for accuracy and the like (`needs_positive_quality`).
With a reward of which `is_limit` is True cost below the target has no price: the target is a limit.
A plain function of (quality, cost_ratio) is a reward too: `get` takes its slope by automatic differentiation.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

# What beta=None counts as where a number is needed: printed rewards and REINFORCE. Our choice: one point of cost
# (1 %) above the target weighs as much as one point of accuracy.
HARD_BETA = -1.0


@runtime_checkable
class Reward(Protocol):
    """What a search needs of a reward.

    Attributes:
      hard: True if the target must be held, not weighed against quality.
    """

    @property
    def hard(self) -> bool: ...

    def __call__(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor: ...

    def slope(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        """Price of cost in units of quality, see the module."""
        ...


@runtime_checkable
class HardReward(Reward, Protocol):
    """A reward that may be hard, and says what then counts as holding the target."""

    def violation(self, cost_ratio: np.ndarray, tolerance: float) -> np.ndarray:
        """How far a cost is from what a hard target allows. Args: array [m]. Returns: array [m], 0 = allowed."""
        ...


def _check_beta(beta: float | None) -> None:
    if beta is not None and not beta < 0:
        raise ValueError(f"beta must be negative, because cost lowers the reward; got {beta!r}. For example beta=-1.0.")


def _where_above(quality: tf.Tensor, ratio: tf.Tensor, above: tf.Tensor | float, below: tf.Tensor | float) -> tf.Tensor:
    """`above` where ratio > 1, `below` where it is less, 0 at 1; in the shape of both arguments together."""
    ratio = ratio + tf.zeros_like(quality)
    return tf.where(ratio > 1.0, above, tf.where(ratio < 1.0, below, 0.0))


def _tensors(quality: tf.Tensor | ArrayLike, ratio: tf.Tensor | ArrayLike) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.convert_to_tensor(quality, tf.float32), tf.convert_to_tensor(ratio, tf.float32)


@dataclasses.dataclass(frozen=True)
class _Additive(abc.ABC):
    """Quality, and a price for missing the target.

    Attributes:
      beta: Price of a miss; None = hard: the controller holds the target whatever it costs (slope is infinite) and
        the reward that is printed, or given to REINFORCE, uses -1.
    """

    beta: float | None = None
    needs_positive_quality: ClassVar[bool] = False
    is_limit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    @property
    def hard(self) -> bool:
        """True if the target must be held, not weighed against quality."""
        return self.beta is None

    @property
    def _price(self) -> float:
        return float("inf") if self.beta is None else -self.beta

    @abc.abstractmethod
    def _miss(self, ratio: tf.Tensor) -> tf.Tensor:
        """How far the target is missed."""

    def __call__(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        quality, ratio = _tensors(quality, cost_ratio)
        return quality + (HARD_BETA if self.beta is None else self.beta) * self._miss(ratio)


class Absolute(_Additive):
    """Q + beta * abs(ratio - 1), the paper's. beta < 0, or None: the target is held whatever it costs.

    >>> float(Absolute(-0.5)(0.75, 1.5)), float(Absolute(-0.5).slope(0.75, 1.5))
    (0.5, 0.5)
    """

    def _miss(self, ratio: tf.Tensor) -> tf.Tensor:
        return tf.abs(ratio - 1.0)

    def slope(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        """Price of cost in units of quality, see the module."""
        return _where_above(*_tensors(quality, cost_ratio), self._price, -self._price)

    def violation(self, cost_ratio: np.ndarray, tolerance: float) -> np.ndarray:
        """How far a cost is from what a hard target allows. Args: array [m]. Returns: array [m], 0 = allowed."""
        return (abs(cost_ratio - 1.0) - tolerance).clip(0.0)


class OneSided(_Additive):
    """Q + beta * max(ratio - 1, 0): only cost above the target counts. beta < 0, or None: an upper bound.

    >>> float(OneSided(-0.5)(0.75, 0.5)), float(OneSided(-0.5).slope(0.75, 0.5))
    (0.75, 0.0)
    """

    is_limit: ClassVar[bool] = True

    def _miss(self, ratio: tf.Tensor) -> tf.Tensor:
        return tf.maximum(ratio - 1.0, 0.0)

    def slope(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        """Price of cost in units of quality, see the module."""
        return _where_above(*_tensors(quality, cost_ratio), self._price, 0.0)

    def violation(self, cost_ratio: np.ndarray, tolerance: float) -> np.ndarray:
        """How far a cost is above the bound; there is no tolerance above a bound but rounding."""
        del tolerance
        return (cost_ratio - 1.0 - 1e-6).clip(0.0)


@dataclasses.dataclass(frozen=True)
class SoftExponential:
    """Q * ratio^beta, for quality > 0.

    >>> float(SoftExponential(-1.0)(0.5, 2.0)), float(SoftExponential(-1.0).slope(0.5, 2.0))
    (0.25, 0.25)

    Attributes:
      beta: Exponent; -0.07 is MnasNet's.
    """

    beta: float = -0.07
    needs_positive_quality: ClassVar[bool] = True
    hard: ClassVar[bool] = False
    is_limit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        quality, ratio = _tensors(quality, cost_ratio)
        return quality * ratio**self.beta

    def slope(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        """Price of cost in units of quality, see the module."""
        quality, ratio = _tensors(quality, cost_ratio)
        return -self.beta * quality / ratio


@dataclasses.dataclass(frozen=True)
class HardExponential:
    """Q * min(ratio^beta, 1), for quality > 0: only cost above the target counts.

    >>> float(HardExponential(-1.0)(0.5, 0.5)), float(HardExponential(-1.0)(0.5, 2.0))
    (0.5, 0.25)

    Attributes:
      beta: Exponent; -1 is our choice.
    """

    beta: float = -1.0
    needs_positive_quality: ClassVar[bool] = True
    hard: ClassVar[bool] = False
    is_limit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        quality, ratio = _tensors(quality, cost_ratio)
        return quality * tf.minimum(ratio**self.beta, 1.0)

    def slope(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        """Price of cost in units of quality, see the module."""
        quality, ratio = _tensors(quality, cost_ratio)
        return _where_above(quality, ratio, -self.beta * quality / ratio, 0.0)


@dataclasses.dataclass(frozen=True)
class Custom:
    """A user's function f(quality, cost_ratio) of TensorFlow operations, elementwise.

    >>> float(Custom(lambda quality, ratio: 2.0 * quality - ratio).slope(0.5, 1.0))
    0.5
    """

    function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor | ArrayLike]
    needs_positive_quality: ClassVar[bool] = False
    hard: ClassVar[bool] = False
    is_limit: ClassVar[bool] = False

    def __call__(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        return tf.convert_to_tensor(self.function(*_tensors(quality, cost_ratio)), tf.float32)

    def slope(self, quality: tf.Tensor | ArrayLike, cost_ratio: tf.Tensor | ArrayLike) -> tf.Tensor:
        """Price of cost in units of quality, by automatic differentiation; 0 where quality does not count."""
        quality, ratio = _tensors(quality, cost_ratio)
        # Both in one shape, so that the gradients are elementwise.
        quality, ratio = quality + tf.zeros_like(ratio), ratio + tf.zeros_like(quality)
        with tf.GradientTape() as tape:
            tape.watch([quality, ratio])
            reward = self(quality, ratio)
        by_quality, by_ratio = tape.gradient(reward, [quality, ratio], unconnected_gradients="zero")
        return -tf.math.divide_no_nan(by_ratio, by_quality)


NAMES: dict[str, type[Absolute | OneSided | SoftExponential | HardExponential]] = {
    "absolute": Absolute,
    "one_sided": OneSided,
    "soft_exponential": SoftExponential,
    "hard_exponential": HardExponential,
}


def get(
    reward: str | Reward | Callable[[tf.Tensor, tf.Tensor], tf.Tensor | ArrayLike], beta: float | None = None
) -> Reward:
    """A reward from its name, or from a plain function.

    Args:
      reward: One of "absolute", "one_sided", "soft_exponential", "hard_exponential"; a reward; or a function of
        (quality, cost_ratio).
      beta: For a name: its beta, None = its default.

    Raises:
      ValueError: "Unknown reward 'abs'; known: absolute, ..."
    """
    if isinstance(reward, str):
        if reward not in NAMES:
            raise ValueError(
                f"Unknown reward {reward!r}; known: {', '.join(NAMES)}. For one of your own pass a function of "
                f"(quality, cost_ratio)."
            )
        return NAMES[reward]() if beta is None else NAMES[reward](beta)
    if beta is not None:
        raise ValueError(f"beta is for a reward given by name, and the reward given is {reward!r}.")
    if hasattr(reward, "slope"):
        if not isinstance(reward, Reward) or (reward.hard and not isinstance(reward, HardReward)):
            raise ValueError(
                f"A reward with a slope says in `hard` whether the target must be held, and if so has a method "
                f"violation(cost_ratio, tolerance); {reward!r} does not. Or give a function of (quality, cost_ratio)."
            )
        return reward
    if callable(reward):
        return Custom(reward)
    raise ValueError(f"A reward is a name ({', '.join(NAMES)}) or a function of (quality, cost_ratio); got {reward!r}.")
