"""The controller: a distribution over samples that learns which formats are worth their cost.

Two estimators of what to prefer:

* "critic" (default, ours): quality is modelled as a sum of one effect per decision and option
  (`fliqs_tf.search.critic`); the policy is the closed form `fliqs_tf.search.policy.boltzmann`, whose entropy follows
  the schedule and whose expected cost is at the target by construction. No learning rate, no unit of quality.
* "reinforce": the paper's plain form, Adam on the logits with loss -(R - baseline) log pi + beta_H H.

It can be driven without a network:

    controller = Controller([3, 3], prior=[[0.02, 6e-5, 3e-6]] * 2)
    controller.configure(expected_cost=..., cost=..., target=1.0, reward=rewards.Absolute(), total_steps=500)
    for step in range(500):
        if step % 4 == 0:
            samples = controller.sample(tf.constant([seed, step]), k=4)
            controller.update(samples, read_quality(samples))
        controller.advance()
        if step == controller.decided_at():
            best = controller.decide()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from fliqs_tf import replicas
from fliqs_tf._keras import add_state, keras
from fliqs_tf.search import choosing, critic, estimators, policy, rewards, schedules

ESTIMATORS = ("critic", "reinforce")
# Default lengths of the search, as shares of a run: where weights train with formats of their own, and where they train
# with what the estimator draws.
WARMUP = {"apart": 0.1, "critic": 0.25, "reinforce": 0.25}
FROZEN = {"apart": 0.75, "critic": 0.4, "reinforce": 0.1}
# Readings of a search, in all and per decision (landscapes of 60 decisions reach 93 % of the way to the optimum with
# 300 readings, and 97 % with 1,200).
READINGS, READINGS_PER_DECISION = 300, 20
# Relative noise power that halves an option's odds in the noise-aware start: INT4 has 0.01 to 0.02, INT3 0.1, INT2 0.9.
START_NOISE = 0.05
# Arguments under the names of version 0.1.0, which files hold.
_FORMER_NAMES = {"delay": "warmup", "settle": "frozen", "gentle": "noise_aware_start"}
# Logit of the option that `decide` took, above the others': probability 1 to 5 digits with 15 options.
_DECIDED = 15.0


@keras.saving.register_keras_serializable("fliqs_tf")
class Controller(keras.layers.Layer):
    """A distribution over samples: D independent categorical decisions.

    All state is in non-trainable variables, so a model that owns a controller saves it, and its optimizer leaves it
    alone. `configure` comes before `update` and `decide`; what it is given is not saved.

    Args:
      n_options: Number of options of each decision.
      prior: Per decision the noise power of each option (`Format.noise`, summed over what the decision sets); None
        = nothing is known beforehand. Used by the critic, and by the noise-aware start.
      estimator: "critic" or "reinforce".
      entropy_schedule: "constant", "linear", "cosine" (the paper's), "heaviside", or a callable step -> beta_H in
        [0, beta_max]. With the critic (1 - shape) of the greatest entropy that the target cost allows is what the
        policy has; the weight that keeps it there is solved for.
      beta_max: Greatest beta_H. None = 1 with the critic, where only the shape counts; 0.02 with REINFORCE and a
        normalized advantage, 0.1 (the reference code's) without.
      warmup: How long formats are drawn without learning a policy: a share of the run (float) or steps (int). None =
        `WARMUP`: 0.1; where weights train with the samples 0.25.
      frozen: Last share of the run, in which the decision has been taken and formats stay; the entropy schedule ends
        where it begins, see `decided_at`. 0 = never by itself. None = `FROZEN`, our choice: 0.75, because weights
        want most of the run with the formats that they end with (docs/method.md). Where weights train with the
        samples, each step tells less: 0.4 with the critic, 0.1 with REINFORCE.
      noise_aware_start: In the warmup the odds of an option are 1 / (1 + (noise / 0.05)^2), our choice: INT2 drawn as
        often as INT8 destroys the training. Needs `prior`. With the critic the exponent of the odds falls from 1 to 0
        with the entropy that the schedule allows, with REINFORCE linearly in the warmup.
      learning_rate, beta_1: REINFORCE: Adam's; the rate may be a callable of the step, such as `schedules.Growing`.
        0.03 is our choice for runs from 500 steps up; the reference code has 0.05.
      baseline_momentum: REINFORCE: of the (zero-debiased) running reward; reference code 0.99, TuNAS 0.95. It is
        updated before the advantage is taken, as in TuNAS.
      normalize_advantage: REINFORCE: divide by the running deviation of the reward. Our choice: plain rates do not
        fit every unit of quality. False = the paper's form.
      sum_over_decisions: REINFORCE: log pi and H are sums over decisions (TuNAS), not means (reference code).
      jit_compile: Compile what an update spends its time in by XLA. It may be part of a compiled function in any case.

    Raises:
      ValueError: An argument out of range; says what is allowed.
    """

    def __init__(
        self,
        n_options: Sequence[int],
        *,
        prior: Sequence[Sequence[float]] | None = None,
        estimator: str = "critic",
        entropy_schedule: str | Callable[[tf.Tensor], tf.Tensor] = "cosine",
        beta_max: float | None = None,
        warmup: float | int | None = None,
        frozen: float | None = None,
        noise_aware_start: bool = True,
        learning_rate: float | Callable[[tf.Tensor], tf.Tensor] = 0.03,
        beta_1: float = 0.9,
        baseline_momentum: float = 0.99,
        normalize_advantage: bool = True,
        sum_over_decisions: bool = False,
        jit_compile: bool = True,
        name: str = "controller",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, trainable=False, **{**kwargs, "dtype": "float32"})
        self.n_options = [int(n) for n in n_options]
        if not self.n_options or min(self.n_options) < 1:
            raise ValueError(f"n_options needs one entry of at least 1 per decision, got {list(n_options)}.")
        if estimator not in ESTIMATORS:
            raise ValueError(f"Unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}.")
        if not callable(entropy_schedule):
            schedules.check_name(entropy_schedule)
        elif beta_max is None:
            raise ValueError("A custom entropy_schedule needs beta_max, the value that it ends at.")
        if warmup is not None and (
            isinstance(warmup, bool) or not (warmup >= 0 if isinstance(warmup, int) else 0 <= warmup < 1)
        ):
            raise ValueError(f"warmup is a share of the run in [0, 1) or an int of steps, 0 or more; got {warmup!r}.")
        if frozen is not None and not 0 <= frozen < 1:
            raise ValueError(f"frozen is a share of the run in [0, 1), got {frozen!r}.")
        if beta_max is None:
            beta_max = 1.0 if estimator == "critic" else (0.02 if normalize_advantage else 0.1)
        self.estimator, self.entropy_schedule, self.beta_max = estimator, entropy_schedule, float(beta_max)
        self._given = {"warmup": warmup, "frozen": frozen}
        self._set_lengths(trains_with_samples=estimator == "reinforce")
        self.noise_aware_start = noise_aware_start
        self.learning_rate, self.beta_1, self.baseline_momentum = learning_rate, beta_1, baseline_momentum
        self.normalize_advantage, self.sum_over_decisions = normalize_advantage, sum_over_decisions
        self.jit_compile = jit_compile

        shape = (len(self.n_options), max(self.n_options))
        self.mask = np.arange(shape[1]) < np.array(self.n_options)[:, None]
        self.prior = None if prior is None else [[float(p) for p in row] for row in prior]
        noise = _padded(self.prior, self.mask)
        self._odds = np.log1p((noise / START_NOISE) ** 2).astype(np.float32) * -float(noise_aware_start)
        made: estimators.Critic | estimators.Reinforce
        if estimator == "critic":
            made = estimators.Critic(self.mask, noise, self._odds, jit_compile)
        else:
            options = (learning_rate, beta_1, normalize_advantage, sum_over_decisions, jit_compile)
            made = estimators.Reinforce(self.mask, self.beta_max, *options)
        self._estimator = made

        self.logits = add_state(self, "logits", shape, "float32")
        self.logits.assign(made.first_logits)
        self.step = add_state(self, "step", (), "int32")
        self.total_steps = add_state(self, "total_steps", (), "int32", initial=1)
        self.target = add_state(self, "target", (), "float32", initial=1)
        self.decided = add_state(self, "decided", (), "bool")
        # Running mean and mean square of the reward, and how many updates they hold.
        self.reward_moments = add_state(self, "reward_moments", (3,), "float32")
        self._state = [add_state(self, n, s, "float32") for n, s in made.state_shapes().items()]
        self._objective: estimators.Objective | None = None
        self.built = True

    def _set_lengths(self, trains_with_samples: bool) -> None:
        """Sets `warmup` and `frozen`, those that were given and the defaults for the others."""
        kind = self.estimator if trains_with_samples else "apart"
        warmup, frozen = self._given["warmup"], self._given["frozen"]
        # Where only one is given, the other's default gives way to it: half of what is left is there to decide in.
        left = 1.0 if isinstance(warmup, int) else (1.0 - (warmup or 0.0)) / 2.0
        if warmup is None:
            warmup = WARMUP[kind] if frozen is None else min(WARMUP[kind], (1.0 - frozen) / 2.0)
            left = 1.0
        if frozen is None:
            frozen = min(FROZEN[kind], left)
        if not isinstance(warmup, int) and warmup + frozen >= 1:
            raise ValueError(
                f"warmup and frozen leave nothing of the run to decide in: {warmup} + {frozen}, not below 1. Lower one."
            )
        self.warmup, self.frozen = warmup, frozen

    def configure(
        self,
        *,
        expected_cost: Callable[[tf.Tensor], tf.Tensor],
        cost: Callable[[np.ndarray], np.ndarray],
        target: float,
        reward: str | rewards.Reward | Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        total_steps: int,
        trains_with_samples: bool | None = None,
    ) -> None:
        """Says what samples cost, what the target is, and how long the run is.

        Args:
          expected_cost: float32 probabilities [D, N] -> scalar tensor, multilinear in the rows: the expected cost of
            independent decisions. A one-hot row is a choice.
          cost: int samples [m, D] -> NumPy costs [m], the same unit.
          target: Target cost, > 0.
          reward: See `rewards.get`.
          total_steps: Training steps of the whole run.
          trains_with_samples: Whether weights train with what is drawn, as in the paper; the defaults of `warmup` and
            `frozen` depend on it. None: with REINFORCE.

        Raises:
          ValueError: Target or number of steps not positive, or a warmup in steps that ends after the decision.
        """
        if not target > 0:
            raise ValueError(f"The target cost must be positive, got {target!r}.")
        if not total_steps >= 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps!r}.")
        self._set_lengths(self.estimator == "reinforce" if trains_with_samples is None else trains_with_samples)
        if isinstance(self.warmup, int) and self.warmup and self.warmup >= (1.0 - self.frozen) * total_steps:
            raise ValueError(
                f"A warmup of {self.warmup} steps leaves nothing of the run to decide in: {total_steps} steps, of "
                f"which the last {self.frozen:.0%} keep what was decided. Lower one, or search for longer."
            )
        self._objective = estimators.Objective(expected_cost, cost, rewards.get(reward))
        self.target.assign(float(target))
        self.total_steps.assign(int(total_steps))
        # They read no variable and assign none: that is done outside, where a replica of a strategy may do it.
        self._rewards_of = tf.function(self._rewards, autograph=False)
        self._estimator.prepare(self._objective)

    # The schedule

    def _warmup_steps(self) -> tf.Tensor:
        if isinstance(self.warmup, int):
            return tf.constant(float(self.warmup))
        return self.warmup * tf.cast(tf.convert_to_tensor(self.total_steps), tf.float32)

    def _in_warmup(self) -> tf.Tensor:
        return tf.cast(tf.convert_to_tensor(self.step), tf.float32) < self._warmup_steps()

    def beta(self) -> tf.Tensor:
        """Current beta_H, a scalar."""
        if callable(self.entropy_schedule):
            return tf.cast(self.entropy_schedule(tf.convert_to_tensor(self.step)), tf.float32)
        step, total = tf.convert_to_tensor(self.step), tf.convert_to_tensor(self.total_steps)
        search = (1.0 - self.frozen) * tf.cast(total, tf.float32)
        return self.beta_max * schedules.fraction(self.entropy_schedule, step, search, self._warmup_steps())

    def _shape(self) -> tf.Tensor:
        """Height of the schedule in [0, 1], 0 in the warmup."""
        shape = tf.clip_by_value(tf.math.divide_no_nan(self.beta(), self.beta_max), 0.0, 1.0)
        return tf.where(self._in_warmup(), 0.0, shape)

    def advance(self, steps: int = 1) -> None:
        """Counts training steps; to be called once per step."""
        self.step.assign_add(steps)

    def warmup_steps(self) -> int:
        """Steps in which formats are drawn without learning."""
        return int(np.ceil(float(self._warmup_steps())))

    def decided_at(self) -> int:
        """Step at which the search loop calls `decide`: the first one of the last `frozen` share of the run."""
        return int(np.ceil((1.0 - self.frozen) * int(tf.convert_to_tensor(self.total_steps))))

    def steps_to_decide_at(self, step: int) -> int:
        """Length of the run of which `decided_at` is this step, or the next one."""
        return int(np.ceil(step / (1.0 - self.frozen)))

    def reading_interval(self) -> int:
        """Training steps between two readings with samples of their own, so that a search makes about `READINGS` of
        them, or `READINGS_PER_DECISION`: more tell little more, and each takes as long as a training step."""
        planned = max(READINGS, READINGS_PER_DECISION * len(self.n_options))
        return max(2, round(self.decided_at() / planned))

    # The distribution

    def probabilities(self) -> tf.Tensor:
        """What `sample` draws from: float32 [D, N], 0 for padding. In the warmup: all alike, or by their noise."""
        start = self._in_warmup()
        if self.estimator == "reinforce":
            share = 1.0 - tf.cast(tf.convert_to_tensor(self.step), tf.float32) / tf.maximum(self._warmup_steps(), 1.0)
        else:
            share = 1.0
        start = tf.logical_and(start, tf.logical_not(tf.convert_to_tensor(self.decided)))
        return policy.softmax(tf.where(start, share * self._odds, tf.convert_to_tensor(self.logits)), self.mask)

    def entropy(self) -> tf.Tensor:
        """Entropy of the decisions over its greatest value: a scalar in [0, 1]."""
        return policy.entropy(self.probabilities(), self.mask)

    def expected_cost(self) -> tf.Tensor:
        """Expected cost of a sample, in the cost's unit."""
        return self._configured().expected_cost(self.probabilities())

    def sample(self, seed: tf.Tensor | ArrayLike, k: int = 1) -> tf.Tensor:
        """Draws k samples: int32 [k, D]. See `policy.draw`.

        Args:
          seed: int32 [2]; the same seed and policy give the same samples.
          k: Number of samples. They differ as much as they can, to be read on one batch; each of them, the first
            one too, is an ordinary draw on its own.
        """
        return policy.draw(self.probabilities(), tf.convert_to_tensor(seed), k)

    def most_likely(self) -> tf.Tensor:
        """Most likely option of each decision: int32 [D]. Of equal ones the last: spaces go from narrow to wide."""
        logits = tf.where(self.mask, tf.convert_to_tensor(self.logits), float("-inf"))
        options = self.mask.shape[1]
        return options - 1 - tf.argmax(tf.reverse(logits, [1]), axis=1, output_type=tf.int32)

    # Learning

    def update(
        self, samples: tf.Tensor | ArrayLike, quality: tf.Tensor | ArrayLike, *, per_replica: bool = False
    ) -> dict[str, tf.Tensor]:
        """Learns from readings of quality that share a batch.

        Under a distribution strategy all replicas call it together, each with the quality on its share of the batch,
        and all hold the same policy afterwards, to the bit.

        Args:
          samples: int32 [k, D], from `sample`.
          quality: float32 [k], higher is better. Readings that are not finite teach nothing.
          per_replica: False: replicas read the same samples, and the mean of their qualities counts. True: each has
            samples of its own, and the readings of all count, compared within a replica's share.

        Returns:
          Scalars: reward (mean of the samples), baseline, expected_cost (of the policy, in the cost's unit), entropy
          (share of the greatest).

        Raises:
          RuntimeError: `configure` was not called.
        """
        objective = self._configured()
        samples, quality = tf.convert_to_tensor(samples, tf.int32), tf.convert_to_tensor(quality, tf.float32)
        if per_replica and replicas.count() > 1:
            # Option indices are exact in float32: one message for both.
            readings = replicas.gathered(tf.concat([tf.cast(samples, tf.float32), quality[:, None]], axis=1))
            samples, quality = tf.cast(readings[..., :-1], tf.int32), readings[..., -1]
        else:
            quality = replicas.mean(quality)
        frozen = tf.logical_or(self._in_warmup(), tf.convert_to_tensor(self.decided))
        target, probabilities = tf.convert_to_tensor(self.target), self.probabilities()
        before = tf.convert_to_tensor(self.reward_moments)
        reward, new_moments, baseline, variance = self._rewards_of(samples, quality, target, before)
        new_state, new_logits = self._estimator.learn(
            [tf.convert_to_tensor(v) for v in self._state],
            tf.convert_to_tensor(self.logits),
            estimators.Readings(samples, quality, reward, baseline, variance),
            estimators.Moment(
                frozen, tf.cast(tf.convert_to_tensor(self.step), tf.float32), self._shape(), probabilities, target
            ),
        )
        if replicas.count() > 1:
            # Machines that compute the same may differ in a last bit; what is drawn from must not.
            agreed = replicas.of_first(tf.concat([tf.reshape(new_logits, [-1]), new_moments], axis=0))
            new_logits, new_moments = tf.reshape(agreed[:-3], new_logits.shape), agreed[-3:]
        for variable, value in zip(self._state, new_state):
            variable.assign(value)
        self.logits.assign(new_logits)
        self.reward_moments.assign(new_moments)
        return {
            "reward": tf.reduce_mean(reward),
            "baseline": baseline,
            "expected_cost": objective.expected_cost(self.probabilities()),
            "entropy": self.entropy(),
        }

    def _rewards(
        self, samples: tf.Tensor, quality: tf.Tensor, target: tf.Tensor, moments: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Rewards [k] of the samples, the moments updated by them, and from these the baseline and the variance."""
        objective = self._configured()
        choices = tf.one_hot(tf.reshape(samples, [-1, samples.shape[-1]]), self.mask.shape[1])
        if samples.shape.rank == 2:
            costs = tf.stack([objective.expected_cost(choices[i]) for i in range(samples.shape[0])])
        else:  # of many replicas
            costs = tf.map_fn(objective.expected_cost, choices)
        reward = objective.reward(tf.reshape(quality, [-1]), costs / target)
        momentum = self.baseline_momentum
        now = tf.stack([tf.reduce_mean(reward), tf.reduce_mean(reward**2), 1.0])
        finite = tf.reduce_all(tf.math.is_finite(reward))
        moments = tf.where(finite, momentum * moments + (1.0 - momentum) * now, moments)
        # The third moment is the running mean of 1, which is what a start at zero takes away from the others.
        baseline, square = (tf.math.divide_no_nan(moment, moments[2]) for moment in tf.unstack(moments)[:2])
        return reward, moments, baseline, square - baseline**2

    # The decision

    def effects(self) -> np.ndarray:
        """What the critic makes of each option: float32 [D, N] in units of quality, padding 0."""
        self._critic()
        return np.array(tf.convert_to_tensor(self._state[critic.State._fields.index("effects")]))

    def decide(self, agree: Callable[[np.ndarray], np.ndarray] = lambda choice: choice) -> np.ndarray:
        """Takes the decision: from now on one sample has (almost) all probability. On the host.

        Which one: see `estimators.Critic.choose` and `estimators.Reinforce.choose`.

        Args:
          agree: Where several workers decide: what makes one choice of theirs, see `replicas.Workers.first`.

        Returns:
          int32 [D].
        """
        choice = agree(self.choose())
        rest = np.where(self.mask, -_DECIDED, 0.0)
        rest[np.arange(len(choice)), choice] = 0.0
        self.logits.assign(rest.astype(np.float32))
        self.decided.assign(True)
        return choice

    def choose(self, target: float | None = None) -> np.ndarray:
        """The sample that would be decided on now, int32 [D]. On the host.

        Args:
          target: Another target cost; None: the one of `configure`. REINFORCE knows but one.
        """
        self._configured()
        if target is not None:
            self._critic()
        target = float(tf.convert_to_tensor(self.target)) if target is None else target
        return self._estimator.choose(self._host_state(), np.array(self.most_likely()), target)

    def beliefs(self) -> choosing.Beliefs:
        """What the critic has learned of quality. On the host."""
        return self._critic().beliefs(self._host_state())

    def regret(self) -> float:
        """How much quality a better decision could still gain, see `choosing.regret`. On the host."""
        objective, target = self._configured(), float(tf.convert_to_tensor(self.target))
        arguments = (self.beliefs(), self.mask, objective.cost, objective.reward, target)
        return choosing.regret(self.choose(), *arguments)

    def readings(self) -> int:
        """How many batches quality was read on."""
        self._critic()
        return int(self._host_state()[critic.State._fields.index("updates")])

    def _host_state(self) -> list[np.ndarray]:
        return [np.array(tf.convert_to_tensor(v)) for v in self._state]

    def _configured(self) -> estimators.Objective:
        """What `configure` was given. Raises RuntimeError before that."""
        if self._objective is None:
            raise RuntimeError(
                "The controller knows no cost and no target yet. fit() of a search model tells it. Before "
                "train_on_batch call the model's configure_controller(total_steps), without a network configure()."
            )
        return self._objective

    def _critic(self) -> estimators.Critic:
        """The critic. Raises RuntimeError for another estimator."""
        if not isinstance(self._estimator, estimators.Critic):
            raise RuntimeError(f"Only estimator='critic' knows effects; this controller has {self.estimator!r}.")
        return self._estimator

    def options(self) -> dict[str, Any]:
        """Its arguments, with what the defaults stand for; without `n_options` and `name`."""
        names = ["estimator", "entropy_schedule", "beta_max", "noise_aware_start", "learning_rate"]
        names += ["beta_1", "baseline_momentum", "normalize_advantage", "sum_over_decisions", "jit_compile"]
        prior = None if self.prior is None else [[float(p) for p in row] for row in self.prior]
        return {**self._given, **{name: getattr(self, name) for name in names}, "prior": prior}

    def get_config(self) -> dict[str, Any]:
        for argument in ("entropy_schedule", "learning_rate"):
            if callable(getattr(self, argument)):
                raise ValueError(f"A controller with a callable {argument} cannot be saved; use a name or a number.")
        return {"name": self.name, "n_options": [int(n) for n in self.n_options], **self.options()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Controller:
        return cls(**present_names(config))


def present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a controller as files hold them, under the names that they have now."""
    return {_FORMER_NAMES.get(name, name): value for name, value in config.items()}


def _padded(prior: Sequence[Sequence[float]] | None, mask: np.ndarray) -> np.ndarray:
    """Noise powers [D, N], 0 for padding and for no prior."""
    noise = np.zeros(mask.shape)
    if prior is None:
        return noise
    sizes = mask.sum(axis=1).tolist()
    if [len(row) for row in prior] != sizes:
        raise ValueError(f"prior needs a number per option, {sizes} by decision; got {[len(row) for row in prior]}.")
    for d, row in enumerate(prior):
        noise[d, : len(row)] = row
    if not (np.isfinite(noise).all() and (noise >= 0).all()):
        raise ValueError("prior is a noise power per option: finite numbers of at least 0.")
    return noise
