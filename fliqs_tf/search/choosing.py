"""From what is believed of effects to one sample: which to take, and how much a better one could still gain.

Pure functions on the host, NumPy. `cost` is a function of int samples [m, D] -> costs [m].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fliqs_tf.search import policy, rewards

CostOf = Callable[[np.ndarray], np.ndarray]

# What may be given up in all for a cheaper recipe, as a share of what the narrowest formats lose.
_IMMATERIAL = 0.01
# A gain counts as certain beyond so many standard deviations.
_CERTAIN = 1.0
# For a hard target the symmetric reward allows costs this far from it: few samples cost exactly what was asked for.
_TOLERANCE = 0.01


class Beliefs(NamedTuple):
    """What readings say of quality.

    Attributes:
      mean: [D, N]; expected effect of each option, in units of quality.
      root: [D * N, Z]; the covariance of the effects is root @ root.T.
      level: Quality of the samples that are drawn.
    """

    mean: np.ndarray
    root: np.ndarray
    level: float

    def gain(self, samples: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quality of samples beyond that of another one: (expected [m], standard deviation [m]).

        Args:
          samples: int [m, D].
          other: int [D].
        """
        decisions, options = self.mean.shape
        change = np.eye(options)[samples] - np.eye(options)[other]
        change = change.reshape(len(samples), decisions * options)
        return change @ self.mean.ravel(), np.linalg.norm(change @ self.root, axis=1)


def choose(
    beliefs: Beliefs,
    mask: np.ndarray,
    cost: CostOf,
    reward: rewards.Reward,
    target: float,
    start: np.ndarray,
) -> np.ndarray:
    """The sample of highest expected reward.

    For a hard target: of highest expected quality among those that cost no more than the target, or, where the reward
    counts both sides, within 1 % of it; and where there is none, of the nearest cost. Where cost below the target is
    free of any price, what buys nothing is given back, see `spared`.

    Args:
      beliefs: See `Beliefs`.
      mask: bool [D, N], False for padding.
      cost: Samples -> costs.
      reward: See `rewards`.
      target: Target cost.
      start: int [D], a sample to start from.

    Returns:
      int32 [D].
    """
    best = policy.best_sample(beliefs.mean, mask, cost, _score(reward, beliefs, mask), target, start)
    return spared(best, beliefs, mask, cost) if getattr(reward, "is_limit", False) else best


def spared(sample: np.ndarray, beliefs: Beliefs, mask: np.ndarray, cost: CostOf) -> np.ndarray:
    """A sample without what buys nothing: options give way to cheaper ones where the loss is within what is uncertain
    (1 standard deviation), and all of these losses together are below 1 % of what the narrowest formats lose.

    Args:
      sample: int [D].
      beliefs, mask, cost: See `choose`.

    Returns:
      int32 [D], of at most the cost of `sample`.
    """
    sample = np.array(sample, np.int32)
    left = _IMMATERIAL * span(beliefs, mask)
    decisions, options = np.nonzero(mask)
    while True:
        others = np.repeat(sample[None], len(decisions), axis=0)
        others[np.arange(len(decisions)), decisions] = options
        saved = cost(sample[None])[0] - cost(others)
        gain, deviation = beliefs.gain(others, sample)
        lost = np.maximum(-gain, 0.0)
        fits = (saved > 0) & (lost <= _CERTAIN * deviation) & (lost <= left)
        if not fits.any():
            return sample
        best = np.argmax(np.where(fits, saved, -np.inf))
        sample, left = others[best], left - lost[best]


def span(beliefs: Beliefs, mask: np.ndarray) -> float:
    """Expected difference in quality between the best and the worst option of every decision."""
    high = np.where(mask, beliefs.mean, -np.inf).max(axis=1)
    low = np.where(mask, beliefs.mean, np.inf).min(axis=1)
    return float((high - low).sum())


def regret(
    chosen: np.ndarray,
    beliefs: Beliefs,
    mask: np.ndarray,
    cost: CostOf,
    reward: rewards.Reward,
    target: float,
    draws: int = 16,
) -> float:
    """How much quality a better choice could still gain, in expectation, as a share of `span`.

    Effects are drawn from what is believed of them; the best sample of each draw is compared with the chosen one.

    Args:
      chosen: int [D].
      beliefs, mask, cost, reward, target: See `choose`.
      draws: How many.
    """
    rng = np.random.default_rng(0)
    shape = beliefs.mean.shape
    drawn = [
        beliefs.mean + (beliefs.root @ rng.normal(size=beliefs.root.shape[1])).reshape(shape) for _ in range(draws)
    ]
    score = _score(reward, beliefs, mask)
    others = np.stack([policy.best_sample(effects, mask, cost, score, target, chosen) for effects in drawn])
    rows = np.arange(len(mask))
    gains = [max(0.0, (effects[rows, others].sum(axis=1) - effects[rows, chosen].sum()).max()) for effects in drawn]
    return float(np.mean(gains)) / max(span(beliefs, mask), 1e-30)


def _score(
    reward: rewards.Reward, beliefs: Beliefs, mask: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    if not (reward.hard and isinstance(reward, rewards.HardReward)):
        return lambda quality, ratio: reward(quality + beliefs.level, ratio).numpy()
    # Quality cannot outweigh a violation of 1e-4.
    price = 1e4 * (span(beliefs, mask) + 1e-30)
    return lambda quality, ratio: quality - price * reward.violation(ratio, _TOLERANCE)
