"""The critic: what each option of each decision does to quality, learned from noisy readings of whole samples.

Model: quality of sample a read on batch t is

    y = level_t + sum_d effect[d, a_d] + noise
    effect[d, o] = scale * (-(10 z_mean + z_d) * profile[d, o] + residual[d, o] * z_do)

with all z standard normal a priori. `profile` comes from the noise power of the formats, known before anything is
learned, so z_d is the sensitivity of decision d, z_mean what all decisions share, and z_do how option o departs from
the profile. Level_t takes up the noise of the batch and the progress of training: readings on one batch are centred,
a single reading is compared with a running mean.

The posterior mean is the solution of (I + kappa A'GA) z = (scale / noise) A'b with the Gram matrix G = sum w x x',
b = sum w x y of centred one-hot features x. It is kept up to date by a few conjugate gradient steps per update,
started from the last solution. scale and noise are estimated by expectation-maximization with a diagonal
approximation of the posterior variance, so that multiplying quality by a constant multiplies the effects by it and
changes nothing else. Weights grow in proportion to time (w_i ~ i): effects that drift while the network trains are
followed, and in a still landscape it costs a quarter of the data's information.

Everything here is a pure function of tensors with static shapes. D decisions, N options (padded), k readings.
Source: ours; method.md section 4 has the first simulation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

# Prior standard deviation of what all decisions share, in units of what tells them apart.
_MEAN_SD = 10.0
# Residuals have prior standard deviation 0.3 * sqrt(profile): the 4-bit options are known to a third of their effect,
# while the noise of 8-bit options may be many times what the profile says before the data are not believed.
_RESIDUAL = 0.3
# Single readings: momentum of the running mean that stands for the level.
_LEVEL_MOMENTUM = 0.9
# Features of samples that are alike differ by rounding alone: such readings tell nothing apart.
_ALIKE = 1e-4
# Readings further off than 3 running deviations are weighted down (a batch that blew up is no Gaussian noise).
_OUTLIER = 9.0


class State(NamedTuple):
    """What the critic has learned; float32 tensors.

    Attributes:
      gram: [D*N, D*N]; sum of w x x'.
      moment: [D*N]; sum of w x y.
      information: [1 + D + D*N]; diagonal of A'GA, for the preconditioner and the posterior variance.
      square, count: []; sums of w y^2 and w.
      updates: []; number of updates.
      level, features: [], [D*N]; running means of quality and of one-hot samples (biased towards 0).
      surprise: []; running mean square of what the critic did not predict.
      z: [1 + D + D*N]; posterior mean in units of the prior.
      scale, noise: []; squared: prior variance of the effects, variance of a centred reading. 0 = not known yet.
      effects: [D, N]; posterior mean in units of quality, padding 0.
    """

    gram: tf.Tensor
    moment: tf.Tensor
    information: tf.Tensor
    square: tf.Tensor
    count: tf.Tensor
    updates: tf.Tensor
    level: tf.Tensor
    features: tf.Tensor
    surprise: tf.Tensor
    z: tf.Tensor
    scale: tf.Tensor
    noise: tf.Tensor
    effects: tf.Tensor


def state_shapes(decisions: int, options: int) -> State:
    """Shapes of a `State`; all entries start at 0."""
    p = decisions * options
    z = 1 + decisions + p
    return State((p, p), (p,), (z,), (), (), (), (), (p,), (), (z,), (), (), (decisions, options))


class Prior(NamedTuple):
    """What is believed before the first reading.

    Attributes:
      profile: float32 [D, N]; expected loss of an option as a share of the worst option's, 0 = unknown.
      residual: float32 [D, N]; prior standard deviation of the rest, 0 for padding.
    """

    profile: np.ndarray
    residual: np.ndarray


def make_prior(noise_power: np.ndarray | None, mask: np.ndarray) -> Prior:
    """The prior from the noise power of the formats.

    Args:
      noise_power: [D, N], relative noise power per option (noise over signal), None = nothing is known.
      mask: bool [D, N], False for padding.
    """
    if noise_power is None or not (noise_power * mask).any():
        return Prior(np.zeros(mask.shape, np.float32), mask.astype(np.float32))
    # The share of noise in the quantized tensor's power: INT2 cannot do ten times the damage of INT3.
    profile = np.where(mask, noise_power / (1.0 + np.where(mask, noise_power, 0.0)), 0.0)
    profile /= profile.max()
    return Prior(profile.astype(np.float32), (_RESIDUAL * np.sqrt(profile)).astype(np.float32))


def _to_effects(z: tf.Tensor, prior: Prior) -> tf.Tensor:
    """A z: [Z] -> [D, N], without the scale."""
    decisions, options = prior.profile.shape
    sensitivity = _MEAN_SD * z[0] + z[1 : decisions + 1]
    rest = tf.reshape(z[decisions + 1 :], [decisions, options])
    return prior.residual * rest - sensitivity[:, None] * prior.profile


def _to_z(effects: tf.Tensor, prior: Prior) -> tf.Tensor:
    """A' e: [k, D, N] -> [k, Z]."""
    decisions, options = prior.profile.shape
    by_decision = -tf.reduce_sum(effects * prior.profile, axis=2)
    rest = tf.reshape(effects * prior.residual, [-1, decisions * options])
    return tf.concat([_MEAN_SD * tf.reduce_sum(by_decision, axis=1, keepdims=True), by_decision, rest], axis=1)


def observe(state: State, samples: tf.Tensor, quality: tf.Tensor, prior: Prior) -> State:
    """Adds readings to the sums: of one batch, or of several. Those that are not finite are left out, with their batch.

    Args:
      state: What was learned before.
      samples: int32 [k, D], or [batches, k, D].
      quality: float32 [k], read on one batch, or [batches, k]. Readings are compared within their batch.
      prior: See `Prior`.
    """
    decisions, options = prior.profile.shape
    readings = samples.shape[-2]
    size = decisions * options
    quality = tf.reshape(quality, [-1, readings])
    finite = tf.reduce_all(tf.math.is_finite(quality), axis=1)
    quality = tf.where(finite[:, None], quality, tf.zeros_like(quality))
    x = tf.reshape(tf.one_hot(samples, options), [-1, readings, size])
    mean_quality, mean_x = tf.reduce_mean(quality, axis=1, keepdims=True), tf.reduce_mean(x, axis=1, keepdims=True)
    seen = 1.0 - _LEVEL_MOMENTUM**state.updates  # takes the bias of the zero start out of the running means
    if readings > 1:
        centred_x, centred_y, usable = x - mean_x, quality - mean_quality, finite
    else:
        usable = tf.logical_and(finite, state.updates > 0)
        centred_x = x - tf.math.divide_no_nan(state.features, seen)
        centred_x = tf.where(tf.abs(centred_x) < _ALIKE, 0.0, centred_x)
        centred_y = quality - tf.math.divide_no_nan(state.level, seen)
    degrees = tf.cast(max(readings - 1, 1), tf.float32)
    missed = centred_y - tf.reduce_sum(centred_x * tf.reshape(state.effects, [size]), axis=2)
    surprise = tf.reduce_sum(missed**2, axis=1) / degrees
    known = tf.math.divide_no_nan(state.surprise, seen)
    limit = tf.where(state.updates > 4, _OUTLIER * known, surprise)
    weight = tf.where(usable, tf.math.divide_no_nan(limit, tf.maximum(surprise, limit)), 0.0)
    counted = tf.reduce_sum(tf.cast(usable, tf.float32))
    keep = tf.where(counted > 0, tf.math.divide_no_nan(state.updates, state.updates + counted), 1.0)

    rows, targets = tf.reshape(centred_x, [-1, size]), tf.reshape(centred_y, [-1])
    weights = tf.repeat(weight, readings)
    weighted = weights[:, None] * rows
    in_z = _to_z(tf.reshape(rows, [-1, decisions, options]), prior)
    new = tf.reduce_sum(tf.cast(finite, tf.float32))

    def average(old: tf.Tensor, each: tf.Tensor) -> tf.Tensor:
        """`old`, moved towards the mean over the batches as far as they would have moved it one by one."""
        ours = tf.where(tf.reshape(finite, [-1] + [1] * (each.shape.rank - 1)), each, tf.zeros_like(each))
        there = tf.math.divide_no_nan(tf.reduce_sum(ours, axis=0), new)
        return old + (1.0 - _LEVEL_MOMENTUM**new) * (there - old)

    return state._replace(
        gram=keep * state.gram + tf.matmul(weighted, rows, transpose_a=True),
        moment=keep * state.moment + tf.linalg.matvec(weighted, targets, transpose_a=True),
        information=keep * state.information + tf.reduce_sum(weights[:, None] * in_z**2, axis=0),
        square=keep * state.square + tf.reduce_sum(weights * targets**2),
        count=keep * state.count + tf.reduce_sum(weight) * degrees,
        updates=state.updates + new,
        level=average(state.level, mean_quality[:, 0]),
        features=average(state.features, mean_x[:, 0]),
        surprise=average(state.surprise, tf.minimum(surprise, limit)),
    )


def level(state: State) -> tf.Tensor:
    """Running mean of quality, a scalar."""
    return tf.math.divide_no_nan(state.level, 1.0 - _LEVEL_MOMENTUM**state.updates)


def _variances(state: State, prior: Prior) -> tuple[tf.Tensor, tf.Tensor]:
    """(scale, noise), or a first guess: half of the variance of the readings is signal."""
    variance = tf.math.divide_no_nan(state.square, state.count)
    each = tf.reduce_sum(_own(state.information, prior)) / tf.maximum(state.count, 1e-30)
    guess = tf.math.divide_no_nan(0.5 * variance, each)
    # The floor keeps the system solvable when readings have no noise at all.
    floor = 1e-4 * variance + 1e-30
    noise = tf.where(state.noise > 0, state.noise, variance)
    return tf.where(state.scale > 0, state.scale, guess) + 1e-30, tf.maximum(noise, floor)


def _own(vector: tf.Tensor, prior: Prior) -> tf.Tensor:
    """The entries of a [Z] vector that tell the scale: sensitivities, or residuals if there is no profile."""
    decisions = prior.profile.shape[0]
    if prior.profile.any():
        return vector[1 : decisions + 1]
    return tf.boolean_mask(vector[decisions + 1 :], (prior.residual > 0).ravel())


def solve(state: State, prior: Prior, iterations: int = 6) -> State:
    """Brings effects, scale and noise up to date with the sums.

    Args:
      state: From `observe`.
      prior: See `Prior`.
      iterations: Conjugate gradient steps; they start from the last solution.
    """
    decisions, options = prior.profile.shape
    size = decisions * options
    scale, noise = _variances(state, prior)
    kappa = scale / noise
    preconditioner = 1.0 / (1.0 + kappa * state.information)

    def adjoint(effects: tf.Tensor) -> tf.Tensor:
        return _to_z(tf.reshape(effects, [1, decisions, options]), prior)[0]

    def image_of(z: tf.Tensor) -> tf.Tensor:
        """G A z."""
        return tf.linalg.matvec(state.gram, tf.reshape(_to_effects(z, prior), [size]))

    image = image_of(state.z)
    r = tf.sqrt(scale) / noise * adjoint(state.moment) - state.z - kappa * adjoint(image)
    direction = preconditioner * r

    def step(
        i: tf.Tensor, z: tf.Tensor, image: tf.Tensor, r: tf.Tensor, direction: tf.Tensor, rho: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        moved = image_of(direction)
        change = direction + kappa * adjoint(moved)
        alpha = tf.math.divide_no_nan(rho, tf.reduce_sum(direction * change))
        r -= alpha * change
        smoothed = preconditioner * r
        new_rho = tf.reduce_sum(r * smoothed)
        direction_next = smoothed + tf.math.divide_no_nan(new_rho, rho) * direction
        return i + 1, z + alpha * direction, image + alpha * moved, r, direction_next, new_rho

    start = (tf.constant(0), state.z, image, r, direction, tf.reduce_sum(r * direction))
    _, z, image, *_ = tf.while_loop(
        lambda i, *_: i < iterations, step, start, maximum_iterations=iterations, parallel_iterations=1
    )
    effects = tf.sqrt(scale) * _to_effects(z, prior)
    flat = tf.reshape(effects, [size])
    predicted = tf.sqrt(scale) * image
    # Expectation-maximization. Entries that the data say nothing of have z = 0, variance 1, and do not move the scale.
    new_scale = scale * tf.reduce_mean(_own(z**2 + preconditioner, prior))
    error = state.square + tf.reduce_sum(flat * (predicted - 2.0 * state.moment))
    # Degrees of freedom used up; the diagonal approximation may count one twice, hence the bound.
    used = tf.minimum(tf.reduce_sum(1.0 - preconditioner), 0.5 * state.count)
    new_noise = tf.math.divide_no_nan(tf.maximum(error, 0.0) + noise * used, state.count)
    # Samples that were all alike say nothing of the effects.
    learned = (state.count > 0) & (tf.reduce_sum(state.information) > 0)
    return state._replace(
        z=tf.where(learned, z * tf.sqrt(scale / (new_scale + 1e-30)), z),
        scale=tf.where(learned, new_scale, 0.0),
        noise=tf.where(learned, new_noise, 0.0),
        effects=tf.where(learned, effects, tf.zeros_like(effects)),
    )


def posterior(state: State, prior: Prior) -> tuple[np.ndarray, np.ndarray]:
    """Effects, and how uncertain they are, by a direct solution in float64, on the host.

    Args:
      state: NumPy arrays.
      prior: See `Prior`.

    Returns:
      (mean [D, N], root [D * N, Z]), float64: the covariance of the effects is root @ root.T. Before the first reading
      that tells options apart: minus the profile, and what the prior leaves open.
    """
    decisions, options = prior.profile.shape
    # effects = A z with z standard normal: what all decisions share, each decision's sensitivity, each option's rest.
    # In z the system is the identity and something that is not negative, so it can be solved for any number of options.
    profile = prior.profile.astype(np.float64)
    shared = _MEAN_SD * profile.reshape(-1, 1)
    each = (np.eye(decisions)[:, None] * profile[..., None]).reshape(-1, decisions)
    a = np.hstack([shared, each, np.diag(prior.residual.astype(np.float64).ravel())])
    if not (state.count > 0 and state.scale > 0):
        return -profile, a
    state = State(*(np.asarray(x, np.float64) for x in state))
    scale = max(float(state.scale), 1e-30)
    noise = max(float(state.noise), 1e-4 * float(state.square / state.count), 1e-30)
    a *= np.sqrt(scale)
    factor = np.linalg.cholesky(np.eye(a.shape[1]) + a.T @ state.gram @ a / noise)
    root = np.linalg.solve(factor, a.T).T
    mean = root @ np.linalg.solve(factor, a.T @ state.moment / noise)
    return mean.reshape(decisions, options), root
