"""Policies: independent categorical distributions over the options of D decisions.

Pure functions. `mask` is a bool [D, N] array, False for padding, which has probability exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

# Of the greatest inverse temperature, in units of the effects' spread: gaps of 1e-3 of it are then settled, and
# float32 still resolves the exponents well enough to hold the cost to 1e-3.
_COLDEST = 1e4
_HOTTEST = 1e-3
# Options of equal worth are told apart by this share of the spread: later options win.
_TIE = 1e-3
# Prices reach +-1e8 spreads; asinh(1e3 * price) runs in +-_PRICE_RANGE.
_PRICE_RANGE = float(np.arcsinh(1e11))
# Search effort: rounds of a grid of prices, within halvings of the temperature.
_GRID, _ROUNDS, _HALVINGS = 8, 6, 12
# Spaces up to this size are searched through: few decisions of uneven cost meet a target only in odd combinations.
_ENUMERABLE = 200_000


def softmax(logits: tf.Tensor, mask: np.ndarray) -> tf.Tensor:
    """Probabilities [..., D, N] of logits of the same shape; 0 for padding."""
    logits = tf.where(mask, logits, float("-inf"))
    return tf.nn.softmax(logits, axis=-1)


def entropy(probabilities: tf.Tensor, mask: np.ndarray) -> tf.Tensor:
    """Entropy summed over decisions as a share of its greatest value. [..., D, N] -> [...], in [0, 1]."""
    greatest = float(np.log(mask.sum(axis=1)).sum())
    terms = tf.math.multiply_no_nan(tf.math.log(tf.maximum(probabilities, 1e-30)), probabilities)
    return -tf.reduce_sum(terms, axis=[-2, -1]) / max(greatest, 1e-30)


def draw(probabilities: tf.Tensor, seed: tf.Tensor, k: int = 1) -> tf.Tensor:
    """Draws k samples that differ as much as they can, each of them an ordinary draw on its own.

    Decision d takes the option at u = frac(offset_d + rank_d / k) of its cumulative probabilities, with a random
    offset and, per decision, ranks 0..k-1 of which the first sample has 0 and the others the rest in random order: an
    option of probability p is drawn floor(k p) or ceil(k p) times among the k (a Latin hypercube). The first sample is
    the one that the same seed gives for k = 1.

    Args:
      probabilities: float32 [D, N].
      seed: int32 [2]. The same seed gives the same samples, but others inside XLA-compiled code than outside it, where
        TensorFlow's generators differ.
      k: Number of samples.

    Returns:
      int32 [k, D].
    """
    decisions, options = probabilities.shape
    offset = tf.random.stateless_uniform([decisions], seed)
    order = tf.random.stateless_uniform([k, decisions], tf.random.experimental.stateless_fold_in(seed, 1))
    # Rank by counting: k is small, and it compiles everywhere.
    rank = tf.reduce_sum(tf.cast(order[:, None] > order[None], tf.float32), axis=1)
    u = tf.math.floormod(offset + tf.math.floormod(rank - rank[:1], float(k)) / k, 1.0)
    cumulative = tf.cumsum(probabilities, axis=1)
    # Times the last sum, which rounding leaves a little off 1: u stays below it.
    below = u[..., None] * cumulative[:, -1:] >= cumulative
    return tf.minimum(tf.reduce_sum(tf.cast(below, tf.int32), axis=-1), options - 1)


def boltzmann(
    effects: tf.Tensor,
    log_base: tf.Tensor,
    mask: np.ndarray,
    probabilities: tf.Tensor,
    expected_ratio: Callable[[tf.Tensor], tf.Tensor],
    slope: Callable[[tf.Tensor], tf.Tensor],
    entropy_share: tf.Tensor,
) -> tf.Tensor:
    """Logits of the policy that maximizes expected quality at the right cost, with a given entropy.

    The maximum of E[quality] - price * E[cost ratio] + tau * H has the closed form

        logits[d, o] = log_base[d, o] + (effects[d, o] - price * d ratio / d p[d, o]) / tau

    tau is found by bisection so that the entropy is the given share of the greatest one at that cost, and within it
    the price so that price = slope(ratio): for a hard target the ratio is then 1. Nothing has a unit or a rate.

    Args:
      effects: float32 [D, N], in any unit of quality.
      log_base: float32 [D, N]; what the policy is when nothing matters.
      mask: bool [D, N].
      probabilities: float32 [D, N]; where the gradient of a cost that is not additive is taken: the last policy.
      expected_ratio: [D, N] probabilities -> scalar expected cost over target; multilinear in the rows.
      slope: ratios [m] -> prices [m] in quality per ratio, see `rewards`.
      entropy_share: Scalar in [0, 1]. Not a share of the entropy of free decisions: a target far from the mean cost
        allows much less of that, and a schedule would have no effect for as long as it asks for more.
    """
    with tf.GradientTape() as tape:
        tape.watch(probabilities)
        ratio = expected_ratio(probabilities)
    gradient = tape.gradient(ratio, probabilities)
    constant = ratio - tf.reduce_sum(gradient * probabilities)
    # The worth of options in units of their spread; where they are alike, the later one is a little better.
    decisions, options = mask.shape
    count = mask.sum(axis=1, keepdims=True)
    centred = tf.where(mask, effects - tf.reduce_sum(effects * mask, axis=1, keepdims=True) / count, 0.0)
    spread = tf.sqrt(tf.reduce_sum(centred**2) / mask.sum()) + 1e-30
    tie = (1.0 + np.arange(decisions)[:, None] / decisions) * np.arange(options) / options
    worth = centred / spread + _TIE * tie.astype(np.float32)

    # Options come first from here on: sums over them then run over whole rows, which compiles to faster code.
    worth, rise, base = tf.transpose(worth), tf.transpose(gradient), tf.transpose(log_base)
    base = tf.where(mask.T, base, float("-inf"))

    def logits_at(inverse_temperature: tf.Tensor, price: tf.Tensor) -> tf.Tensor:
        return base + inverse_temperature * (worth - price * rise)

    def too_cheap(price: tf.Tensor, ratio: tf.Tensor) -> tf.Tensor:
        return slope(ratio) > price * spread

    def find_price(inverse_temperature: tf.Tensor) -> tf.Tensor:
        def refine(i: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, ...]:
            # A grid in place of halving: as many prices at once, a third of the passes.
            cell = (high - low) / (_GRID + 1)
            price = _price(low + cell * np.arange(1.0, _GRID + 1, dtype=np.float32))
            logits = base[:, None] + inverse_temperature * (worth[:, None] - price[:, None] * rise[:, None])
            odds = tf.exp(logits - tf.reduce_max(logits, axis=0))
            each = tf.reduce_sum(odds * rise[:, None], axis=0) / tf.reduce_sum(odds, axis=0)
            cheap = too_cheap(price, constant + tf.reduce_sum(each, axis=1))
            index = tf.reduce_sum(tf.cast(cheap, tf.float32))
            return i + 1, low + index * cell, low + (index + 1.0) * cell

        _, low, high = _repeat(_ROUNDS, refine, tf.constant(-_PRICE_RANGE), tf.constant(_PRICE_RANGE))
        return _price((low + high) / 2.0)

    def halve(i: tf.Tensor, low: tf.Tensor, high: tf.Tensor, greatest: tf.Tensor) -> tuple[tf.Tensor, ...]:
        # The first round is at the hottest, for the greatest entropy. (In the loop, it is compiled only once.)
        middle = tf.where(i == 0, low, (low + high) / 2.0)
        inverse_temperature = tf.exp(middle)
        logits = logits_at(inverse_temperature, find_price(inverse_temperature))
        found = entropy(softmax(tf.transpose(logits), mask), mask)
        greatest = tf.where(i == 0, found, greatest)
        hot = found > entropy_share * greatest
        return i + 1, tf.where(hot, middle, low), tf.where(hot, high, middle), greatest

    hottest, coldest = (tf.constant(np.log(x), tf.float32) for x in (_HOTTEST, _COLDEST))
    _, low, high, _ = _repeat(1 + _HALVINGS, halve, hottest, coldest, tf.constant(0.0))
    inverse_temperature = tf.exp((low + high) / 2.0)

    def exact(i: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The price once more, by the cost itself and not its gradient."""
        middle = (low + high) / 2.0
        price = _price(middle)
        probabilities = softmax(tf.transpose(logits_at(inverse_temperature, price)), mask)
        up = too_cheap(price[None], expected_ratio(probabilities)[None])[0]
        return i + 1, tf.where(up, middle, low), tf.where(up, high, middle)

    _, _, high = _repeat(28, exact, tf.constant(-_PRICE_RANGE), tf.constant(_PRICE_RANGE))
    # Of the two ends of the last bracket the upper price: where a target is a bound, on its right side.
    logits = tf.transpose(logits_at(inverse_temperature, _price(high)))
    logits -= tf.reduce_max(logits, axis=1, keepdims=True)
    return tf.where(mask, logits, 0.0)


def _price(u: tf.Tensor) -> tf.Tensor:
    return 1e-3 * tf.sinh(u)


def _repeat(times: int, body: Callable[..., tuple[tf.Tensor, ...]], *state: tf.Tensor) -> tuple[tf.Tensor, ...]:
    return tf.while_loop(
        lambda i, *_: i < times, body, (tf.constant(0), *state), maximum_iterations=times, parallel_iterations=1
    )


def best_sample(
    effects: np.ndarray,
    mask: np.ndarray,
    cost: Callable[[np.ndarray], np.ndarray],
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    target: float,
    start: np.ndarray,
) -> np.ndarray:
    """The sample with the highest score. On the host, NumPy.

    Small spaces are searched through, others by local search from several starts. Moves are changes of one decision
    and of two at once. The starts are samples that weigh effects against cost at prices from nothing to very much,
    and `start`.

    Args:
      effects: [D, N], effect on quality.
      mask: bool [D, N], options of a decision first, padding last.
      cost: int samples [m, D] -> costs [m]. Any function; moves of two decisions are ranked as if their
        costs added, and the best ones then priced exactly.
      score: (sum of effects [m], cost ratios [m]) -> scores [m].
      target: Target cost.
      start: int [D], a sample to start from besides.

    Returns:
      int32 [D].
    """
    decisions, options = np.nonzero(mask)
    rows = np.arange(len(mask))
    effects = np.where(mask, effects, -np.inf).astype(np.float64)

    def ratios(samples: np.ndarray) -> np.ndarray:
        return np.asarray(cost(np.asarray(samples, np.int32)), np.float64) / target

    def total(samples: np.ndarray) -> np.ndarray:
        return effects[rows, samples].sum(axis=-1)

    def changed(sample: np.ndarray, *moves: np.ndarray) -> np.ndarray:
        samples = np.repeat(sample[None], len(moves[0]), axis=0)
        for move in moves:
            samples[np.arange(len(move)), decisions[move]] = options[move]
        return samples

    sizes = mask.sum(axis=1)
    if np.prod(sizes.astype(float)) <= _ENUMERABLE:
        samples = np.stack(np.unravel_index(np.arange(sizes.prod()), sizes), axis=1)
        return samples[score(total(samples), ratios(samples)).argmax()].astype(np.int32)

    def improve(sample: np.ndarray) -> tuple[float, np.ndarray]:
        everything = np.arange(len(decisions))
        quality, ratio = total(sample), ratios(sample[None])[0]
        now = score(quality[None], ratio[None])[0]
        for _ in range(20 * len(rows)):
            gain = effects[decisions, options] - effects[decisions, sample[decisions]]
            rise = ratios(changed(sample, everything)) - ratio
            scores = score(quality + gain, ratio + rise)
            best = scores.argmax()
            candidates = changed(sample, everything[best : best + 1])
            if not scores[best] > now:
                candidates = _best_pairs(sample)
            scores = score(total(candidates), ratios(candidates))
            best = scores.argmax()
            if not scores[best] > now + 1e-12 * abs(now):
                break
            sample, now = candidates[best], scores[best]
            quality, ratio = total(sample), ratios(sample[None])[0]
        return now, sample

    def _best_pairs(sample: np.ndarray, keep: int = 256) -> np.ndarray:
        everything = np.arange(len(decisions))
        moving = everything[options != sample[decisions]]
        gain = (effects[decisions, options] - effects[decisions, sample[decisions]])[moving]
        rise = (ratios(changed(sample, everything)) - ratios(sample[None]))[moving]
        first, second = np.triu_indices(len(moving), 1)
        apart = decisions[moving[first]] != decisions[moving[second]]
        first, second = first[apart], second[apart]
        if not len(first):
            return sample[None]
        scores = score(total(sample) + gain[first] + gain[second], ratios(sample[None])[0] + rise[first] + rise[second])
        top = np.argpartition(-scores, min(keep, len(scores) - 1))[:keep]
        return changed(sample, moving[first[top]], moving[second[top]])

    base = np.asarray(start, np.int64)
    prices = np.zeros(mask.shape)
    prices[decisions, options] = ratios(changed(base, np.arange(len(decisions)))) - ratios(base[None])
    spread = max(np.ptp(effects[decisions, options]), 1e-30)
    steps = np.concatenate([[0.0], np.geomspace(1e-5, 1e5, 200)]) * spread
    starts = np.stack([base, *(np.argmax(effects - p * prices, axis=1) for p in np.concatenate([steps, -steps[1:]]))])
    starts = np.unique(starts, axis=0)
    order = np.argsort(-score(total(starts), ratios(starts)), kind="stable")[:4]
    return max((improve(starts[i]) for i in order), key=lambda result: result[0])[1].astype(np.int32)
