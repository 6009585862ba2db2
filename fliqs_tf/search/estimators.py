"""What a controller learns with: an additive critic, or REINFORCE.

An estimator holds no state of its own. The controller keeps what `state_shapes` asks for in variables, and hands it to
`learn` together with the readings; both run inside a graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from fliqs_tf.search import choosing, critic, policy, rewards

# Adam's other two.
_BETA_2, _EPSILON = 0.999, 1e-8


class Objective(NamedTuple):
    """What is optimized.

    Attributes:
      expected_cost: float32 probabilities [D, N] -> scalar, in the cost's unit; multilinear in the rows.
      cost: int samples [m, D] -> NumPy costs [m], the same unit.
      reward: See `rewards`.
    """

    expected_cost: Callable[[tf.Tensor], tf.Tensor]
    cost: Callable[[np.ndarray], np.ndarray]
    reward: rewards.Reward


class Readings(NamedTuple):
    """Samples whose quality was read, on one batch or on several.

    Attributes:
      samples: int32 [k, D], or [batches, k, D].
      quality: float32 [k], or [batches, k].
      reward: float32 [batches * k].
      baseline: []; running mean of the reward.
      variance: []; its running variance.
    """

    samples: tf.Tensor
    quality: tf.Tensor
    reward: tf.Tensor
    baseline: tf.Tensor
    variance: tf.Tensor


class Moment(NamedTuple):
    """Where in the search a reading falls.

    Attributes:
      frozen: bool []; True while the policy must not change.
      step: float32 []; the training step.
      shape: float32 []; height of the entropy schedule, in [0, 1].
      probabilities: float32 [D, N]; what is drawn from.
      target: float32 []; target cost.
    """

    frozen: tf.Tensor
    step: tf.Tensor
    shape: tf.Tensor
    probabilities: tf.Tensor
    target: tf.Tensor


class Critic:
    """Quality as a sum of one effect per decision and option; the policy follows from it in closed form.

    See `critic` for the effects and `policy.boltzmann` for the policy.

    Args:
      mask: bool [D, N], False for padding.
      noise: float [D, N]; noise power of each option.
      log_odds: float32 [D, N]; the policy when nothing matters.
      jit_compile: Compile the solver by XLA: loops of small operations are many times faster for it. The rest is not
        compiled, and starts sooner.
    """

    def __init__(self, mask: np.ndarray, noise: np.ndarray, log_odds: np.ndarray, jit_compile: bool):
        self.prior = critic.make_prior(noise, mask)
        self._mask, self._log_odds, self._jit_compile = mask, log_odds, jit_compile
        self.first_logits = log_odds  # what is drawn from until something was learned

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name of a float32 variable: its shape}."""
        shapes = critic.state_shapes(*self._mask.shape)
        return dict(zip(shapes._fields, shapes))

    def prepare(self, objective: Objective) -> None:
        """Makes the graphs anew for what is optimized."""
        self._objective = objective
        self._solve = tf.function(self._solve_effects, jit_compile=self._jit_compile, autograph=False)
        self.learn = tf.function(self._learn, autograph=False)

    def _learn(
        self, state: list[tf.Tensor], logits: tf.Tensor, readings: Readings, moment: Moment
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        before = critic.State(*state)
        after = critic.observe(before, readings.samples, readings.quality, self.prior)
        arguments = (list(after), logits, moment)
        if readings.samples.shape[-2] == 1:
            # Single readings come at every step and each tells little: the rest of the work is done for four at once.
            due = tf.floor(after.updates / 4.0) > tf.floor(before.updates / 4.0)
            return tf.cond(due, lambda: self._solve(*arguments), lambda: (list(after), logits))
        return self._solve(*arguments)

    def _solve_effects(
        self, state: list[tf.Tensor], logits: tf.Tensor, moment: Moment
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Effects from what was observed, and the policy from them."""
        solved = critic.solve(critic.State(*state), self.prior)
        level, reward = critic.level(solved), self._objective.reward

        def policy_of_effects() -> tf.Tensor:
            return policy.boltzmann(
                solved.effects,
                (1.0 - moment.shape) * self._log_odds,
                self._mask,
                moment.probabilities,
                lambda p: self._objective.expected_cost(p) / moment.target,
                lambda ratio: reward.slope(level, ratio),
                1.0 - moment.shape,
            )

        return list(solved), tf.cond(moment.frozen, lambda: logits, policy_of_effects)

    def beliefs(self, state: list[np.ndarray]) -> choosing.Beliefs:
        """What the readings so far say. On the host.

        Args:
          state: NumPy arrays.
        """
        learned = critic.State(*state)
        return choosing.Beliefs(*critic.posterior(learned, self.prior), float(critic.level(learned)))

    def choose(self, state: list[np.ndarray], most_likely: np.ndarray, target: float) -> np.ndarray:
        """See `choosing.choose`.

        Args:
          state: NumPy arrays.
          most_likely: int [D], a sample to start from.
          target: Target cost.
        """
        objective = self._objective
        beliefs = self.beliefs(state)
        return choosing.choose(beliefs, self._mask, objective.cost, objective.reward, target, most_likely)


@dataclasses.dataclass
class Reinforce:
    """The paper's plain form: Adam on the logits with loss -(R - baseline) log pi + beta_H H.

    Args:
      mask: bool [D, N], False for padding.
      beta_max: Greatest beta_H.
      learning_rate, beta_1, normalize_advantage, sum_over_decisions, jit_compile: As for `Controller`.
    """

    mask: np.ndarray
    beta_max: float
    learning_rate: float | Callable[[tf.Tensor], tf.Tensor]
    beta_1: float
    normalize_advantage: bool
    sum_over_decisions: bool
    jit_compile: bool

    @property
    def first_logits(self) -> np.ndarray:
        """All options alike."""
        return np.zeros(self.mask.shape, np.float32)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name of a float32 variable: its shape}."""
        return {"adam_mean": self.mask.shape, "adam_square": self.mask.shape, "adam_steps": ()}

    def prepare(self, objective: Objective) -> None:
        """Makes the graph anew."""
        del objective
        self.learn = tf.function(self._learn, jit_compile=self.jit_compile, autograph=False)

    def _learn(
        self, state: list[tf.Tensor], logits: tf.Tensor, readings: Readings, moment: Moment
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        samples = tf.reshape(readings.samples, [-1, readings.samples.shape[-1]])
        advantage = readings.reward - readings.baseline
        if self.normalize_advantage:
            advantage = tf.math.divide_no_nan(advantage, tf.sqrt(tf.maximum(readings.variance, 0.0)))
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = self.loss(logits, samples, advantage, self.beta_max * moment.shape)
        gradient = tape.gradient(loss, logits)
        mean, square, steps = state
        rate = self.learning_rate(moment.step) if callable(self.learning_rate) else self.learning_rate
        new_steps = steps + 1.0
        new_mean = self.beta_1 * mean + (1.0 - self.beta_1) * gradient
        new_square = _BETA_2 * square + (1.0 - _BETA_2) * gradient**2
        deviation = tf.sqrt(new_square / (1.0 - _BETA_2**new_steps))
        new_logits = logits - rate * new_mean / (1.0 - self.beta_1**new_steps) / (deviation + _EPSILON)
        learns = tf.logical_and(tf.logical_not(moment.frozen), tf.reduce_all(tf.math.is_finite(gradient)))

        def keep(new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
            return tf.where(learns, new, old)

        state = [keep(new_mean, mean), keep(new_square, square), keep(new_steps, steps)]
        return state, keep(new_logits, logits)

    def loss(self, logits: tf.Tensor, samples: tf.Tensor, advantage: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
        """-mean over samples of A * log pi + beta * H, both summed or averaged over decisions."""
        probabilities = policy.softmax(logits, self.mask)
        logs = tf.where(self.mask, tf.math.log(tf.maximum(probabilities, 1e-30)), 0.0)
        over = tf.reduce_sum if self.sum_over_decisions else tf.reduce_mean
        log_pi = over(tf.reduce_sum(tf.one_hot(samples, logits.shape[1]) * logs, axis=2), axis=1)
        entropy = over(-tf.reduce_sum(probabilities * logs, axis=1))
        return -tf.reduce_mean(tf.stop_gradient(advantage) * log_pi) + beta * entropy

    def choose(self, state: list[np.ndarray], most_likely: np.ndarray, target: float) -> np.ndarray:
        """The most likely sample, as in the paper."""
        del state, target
        return most_likely
