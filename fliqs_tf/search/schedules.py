"""Schedules: step -> value. The weight of the policy's entropy, and a learning rate that grows.

A schedule is any callable that takes a step (a number or an integer tensor) and returns a scalar. Here they are
pure functions of the step and of the length of the run, so that both may be variables of one traced function.
"""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

NAMES = ("constant", "linear", "cosine", "heaviside")


def check_name(name: str) -> str:
    """Returns `name` if it names a schedule.

    Raises:
      ValueError: "Unknown schedule 'cosin'; known: constant, linear, cosine, heaviside. ..."
    """
    if name not in NAMES:
        raise ValueError(
            f"Unknown schedule {name!r}; known: {', '.join(NAMES)}. For one of your own pass a callable step -> value."
        )
    return name


def fraction(
    name: str, step: tf.Tensor | float, total_steps: tf.Tensor | float, warmup_steps: tf.Tensor | float = 0
) -> tf.Tensor:
    """Height of a schedule as a share of its maximum.

    With t = (step - warmup_steps) / (total_steps - warmup_steps), held in [0, 1]:

        constant    1
        linear      t
        cosine      (1 - cos(pi t)) / 2      (the paper's)
        heaviside   0 in the first half of the run, 1 after it

    >>> float(fraction("linear", 50, 100)), float(fraction("heaviside", 49, 100)), float(fraction("heaviside", 50, 100))
    (0.5, 0.0, 1.0)

    Args:
      name: One of `NAMES`.
      step: Steps done, a number or a scalar tensor.
      total_steps: Steps of the run; beyond them the last value holds.
      warmup_steps: Steps of the warmup, during which linear and cosine stay at 0.

    Returns:
      float32 scalar in [0, 1].

    Source: arXiv 2308.03290 (cosine), its reference code (the others).
    """
    check_name(name)
    step, total, warmup = (tf.cast(x, tf.float32) for x in (step, total_steps, warmup_steps))
    t = tf.clip_by_value((step - warmup) / tf.maximum(total - warmup, 1.0), 0.0, 1.0)
    if name == "linear":
        return t
    if name == "cosine":
        return (1.0 - tf.cos(math.pi * t)) / 2.0
    if name == "heaviside":
        return tf.cast(step >= total / 2.0, tf.float32)
    return tf.ones_like(t)


@dataclasses.dataclass(frozen=True)
class Entropy:
    """Weight of the entropy: beta_max * fraction(step).

    >>> float(Entropy("cosine", total_steps=100, beta_max=0.1)(100))
    0.10000000149011612

    Attributes:
      name: One of `NAMES`.
      total_steps, warmup_steps: See `fraction`.
      beta_max: Greatest value; 0 switches the term off.
    """

    name: str
    total_steps: int
    warmup_steps: int = 0
    beta_max: float = 0.1

    def __post_init__(self) -> None:
        check_name(self.name)

    def __call__(self, step: tf.Tensor | float) -> tf.Tensor:
        return self.beta_max * fraction(self.name, step, self.total_steps, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class Growing:
    """A rate that is constant during the warmup and then grows exponentially: rate * factor^t, t as in `fraction`.

    >>> growing = Growing(0.01, total_steps=100, warmup_steps=20)
    >>> round(float(growing(20)), 6), round(float(growing(60)), 6), round(float(growing(100)), 6)
    (0.01, 0.031623, 0.1)

    Source: google-research/tunas, whose controller's rate grows tenfold after its warm-up.
    """

    rate: float
    total_steps: int
    warmup_steps: int = 0
    factor: float = 10.0

    def __call__(self, step: tf.Tensor | float) -> tf.Tensor:
        return self.rate * self.factor ** fraction("linear", step, self.total_steps, self.warmup_steps)
