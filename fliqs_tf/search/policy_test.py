import itertools

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf.search import policy, rewards

MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
COSTS = np.array([[1, 4, 16], [2, 8, 0], [0.1, 0.4, 1.6], [3, 12, 48]], np.float32)
EFFECTS = np.array([[-3, -1, 0], [-2, 0, 0], [-1, -0.5, 0], [-4, -0.5, 0]], np.float32)
UNIFORM = (MASK / MASK.sum(axis=1, keepdims=True)).astype(np.float32)
TARGET = 20.0
HARD = rewards.Absolute()


def solve(effects=EFFECTS, entropy=0.5, reward=HARD, target=TARGET, jit=False, cost=None, rounds=1):
    cost = cost or (lambda p: tf.reduce_sum(p * COSTS))

    def step(probabilities):
        logits = policy.boltzmann(
            tf.constant(effects),
            tf.zeros_like(effects),
            MASK,
            probabilities,
            lambda p: cost(p) / target,
            lambda ratio: reward.slope(0.0, ratio),
            tf.constant(entropy),
        )
        return policy.softmax(logits, MASK)

    step = tf.function(step, jit_compile=jit)
    probabilities = tf.constant(UNIFORM)
    for _ in range(rounds):
        probabilities = step(probabilities)
    return probabilities.numpy()


def highest_entropy():
    """Of all policies with an expected cost of TARGET: logits are -price * cost, whatever the effects."""
    low, high = -10.0, 10.0
    for _ in range(60):
        price = (low + high) / 2
        odds = np.where(MASK, np.exp(-price * COSTS.astype(np.float64)), 0.0)
        p = odds / odds.sum(axis=1, keepdims=True)
        low, high = (price, high) if (p * COSTS).sum() > TARGET else (low, price)
    p = np.maximum(p, 1e-300)
    return -(p * np.log(p)).sum() / np.log(MASK.sum(axis=1)).sum()


def test_softmax_and_entropy_of_equal_logits():
    p = policy.softmax(tf.zeros([4, 3]), MASK)
    np.testing.assert_allclose(p, UNIFORM, rtol=1e-6)
    assert float(policy.entropy(p, MASK)) == pytest.approx(1.0)


def test_entropy_by_hand():
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    p = np.array([[0.5, 0.5, 0, 0], [1, 0, 0, 0]], np.float32)
    # log 2 of log 4 + log 2
    assert float(policy.entropy(tf.constant(p), mask)) == pytest.approx(1 / 3)


def test_entropy_of_a_space_of_one_is_zero():
    assert float(policy.entropy(tf.ones([2, 1]), np.ones((2, 1), bool))) == 0


def test_draw_has_the_right_marginals_in_every_row():
    p = tf.constant([[0.1, 0.2, 0.7], [0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0]])
    draw = tf.function(policy.draw)
    draws = np.stack([draw(p, tf.constant([1, i]), 4) for i in range(1500)])
    for row in range(4):
        counts = (draws[:, row, :, None] == np.arange(3)).mean(axis=0)
        np.testing.assert_allclose(counts, p, atol=0.05)  # 4 standard deviations
    assert not (draws == 2)[..., [1, 3]].any() and not (draws[..., 2] == 0).any()
    # Decisions are drawn independently of each other.
    assert abs(np.corrcoef(draws[:, 0, 0] == 2, draws[:, 0, 1] == 0)[0, 1]) < 0.1


def test_the_first_sample_is_the_one_that_is_drawn_alone():
    """So a reading begins with the sample that the weights were just trained with."""
    p = tf.constant(np.tile([[0.2, 0.5, 0.3]], [50, 1]), tf.float32)
    for seed in ([0, 1], [7, 3]):
        alone = policy.draw(p, tf.constant(seed), 1)
        for k in (2, 4, 5):
            np.testing.assert_array_equal(policy.draw(p, tf.constant(seed), k)[0], alone[0])


def test_draw_spreads_the_samples():
    """An option of probability p is drawn floor(k p) or ceil(k p) times."""
    p = tf.constant([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    for i in range(50):
        draws = policy.draw(p, tf.constant([0, i]), 4).numpy()
        assert (draws[:, 0] == 0).sum() == 1 and (draws[:, 1] == 0).sum() == 2
        assert all((draws[:, 2] == o).sum() in (1, 2) for o in range(3))


@pytest.mark.parametrize("k", [1, 3])
def test_draw_depends_on_the_seed_alone(k):
    one, same, other = (policy.draw(tf.constant(UNIFORM), tf.constant(s), k).numpy() for s in ([3, 4], [3, 4], [3, 5]))
    compiled = [tf.function(policy.draw, jit_compile=True)(tf.constant(UNIFORM), tf.constant([3, 4]), k) for _ in "ab"]
    assert one.shape == (k, 4) and one.dtype == np.int32
    assert (one == same).all() and (one != other).any()
    np.testing.assert_array_equal(*compiled)


@pytest.mark.parametrize("entropy", [0.9, 0.5, 0.2, 0.05])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_cost_is_at_the_target_whatever_the_scale_and_entropy(entropy, scale):
    p = solve(scale * EFFECTS, entropy)
    assert (p * COSTS).sum() == pytest.approx(TARGET, rel=1e-3)
    reached = float(policy.entropy(tf.constant(p), MASK))
    assert reached == pytest.approx(entropy * highest_entropy(), abs=0.02)
    assert np.all(p[~MASK] == 0)


def test_boltzmann_is_the_maximum():
    """No policy of the same cost and entropy has a higher expected quality: the gradient of quality is in the span
    of those of cost and entropy."""
    p = solve(entropy=0.5).astype(np.float64)
    inner = MASK & (p > 1e-6)

    # Along the simplex: centre each row with its probabilities.
    def centre(g):
        return (g - (p * g).sum(1, keepdims=True))[inner]

    columns = np.stack([centre(COSTS), centre(-np.log(np.maximum(p, 1e-30)))], axis=1)
    quality = centre(EFFECTS.astype(np.float64))
    fit, *_ = np.linalg.lstsq(columns, quality, rcond=None)
    # 1e-3 of a spread breaks ties.
    np.testing.assert_allclose(columns @ fit, quality, atol=0.02)
    assert fit[0] > 0


def test_cold_policy_is_the_best_sample():
    p = solve(entropy=0.0, target=19.1)  # 4 + 2 + 0.1 (or more) + 12
    assert p.argmax(axis=1).tolist()[3] == 1


def test_one_sided_stays_below_only_if_it_must():
    # Everything free: the best options cost 73.6, far below a target of 100.
    p = solve(entropy=0.02, reward=rewards.OneSided(), target=100.0)
    assert p.argmax(axis=1).tolist()[:1] == [2] and (p * COSTS).sum() < 100.0
    p = solve(entropy=0.3, reward=rewards.OneSided())
    assert (p * COSTS).sum() == pytest.approx(TARGET, rel=1e-3)


def test_a_soft_price_is_not_exceeded():
    """Absolute with beta: logits are effects less price times cost, with the price at its bound while cost is off."""
    p = solve(entropy=0.3, reward=rewards.Absolute(-0.01), target=1.0)
    assert (p * COSTS).sum() > 1.1
    ratio = np.log(p[0, 2] / p[0, 1]) / np.log(p[3, 2] / p[3, 1])
    worth = EFFECTS - 0.01 * COSTS
    assert ratio == pytest.approx((worth[0, 2] - worth[0, 1]) / (worth[3, 2] - worth[3, 1]), rel=0.03)


def test_bilinear_cost():
    bits = np.array([4.0, 8.0, 16.0], np.float32)

    def cost(p):
        return tf.reduce_sum(p[0] * bits) * tf.reduce_sum(p[2] * bits) + tf.reduce_sum(p[3] * bits) ** 1 * 8

    p = solve(entropy=0.3, target=150.0, cost=cost, rounds=20)
    assert float(cost(p)) == pytest.approx(150.0, rel=1e-3)
    again = solve(entropy=0.3, target=150.0, cost=cost, rounds=21)
    np.testing.assert_allclose(again, p, atol=0.02)


def test_a_target_at_the_edge_is_reached():
    low = float(COSTS[:, 0].sum())
    p = solve(entropy=0.5, target=low)
    assert (p * COSTS).sum() == pytest.approx(low, rel=1e-3)
    assert p.argmax(axis=1).tolist() == [0, 0, 0, 0]


def test_flat_quality_still_converges_to_the_later_options():
    p = solve(np.zeros_like(EFFECTS), entropy=0.0, reward=rewards.OneSided(), target=100.0)
    assert p.argmax(axis=1).tolist() == [2, 1, 2, 2]
    assert float(policy.entropy(tf.constant(p), MASK)) < 0.3


def test_compiled_or_not():
    np.testing.assert_allclose(solve(jit=True), solve(jit=False), atol=1e-4)


def _additive(costs):
    return lambda samples: costs[np.arange(costs.shape[0]), samples].sum(axis=-1)


@pytest.mark.parametrize("seed", range(12))
def test_best_sample_equals_brute_force(seed, monkeypatch):
    """Few decisions of uneven costs, both additive costs and such where decisions multiply."""
    rng = np.random.default_rng(seed)
    if seed >= 6:  # as if the space were too big to be searched through
        monkeypatch.setattr(policy, "_ENUMERABLE", 0)
    decisions, options = (8, 3) if seed < 6 else (9, 3)
    mask = np.ones((decisions, options), bool)
    mask[2, 2] = False
    effects = -np.exp(rng.normal(size=(decisions, 1))) * 4.0 ** -np.arange(options)
    costs = np.exp((1.5 if seed < 6 else 0.5) * rng.normal(size=(decisions, 1))) * 4.0 ** np.arange(options)
    cost = _additive(costs)
    if seed % 3 == 2:
        bits, macs = 2.0 ** np.arange(options), costs[:4, 0]

        def cost(s):
            return (macs * bits[s[:, :4]] * bits[s[:, 4:8]]).sum(axis=1) + bits[s[:, -1]]

    everything = np.array([s for s in itertools.product(range(options), repeat=decisions) if s[2] < 2])
    target = float(np.median(cost(everything)))
    price = 1e4 * np.ptp(effects, axis=1).sum()

    def score(quality, ratio):
        return quality - price * rewards.Absolute().violation(ratio, 0.01)

    quality = effects[np.arange(decisions), everything].sum(axis=1)
    best = score(quality, cost(everything) / target).max()
    found = policy.best_sample(effects, mask, cost, score, target, np.zeros(decisions, int))
    assert found.dtype == np.int32 and mask[np.arange(decisions), found].all()
    reached = score(effects[np.arange(decisions), found].sum()[None], cost(found[None]) / target)[0]
    assert abs(cost(found[None])[0] / target - 1) <= 0.01
    assert best - reached <= (1e-9 if seed < 6 else 0.05) * np.ptp(quality)


def test_best_sample_of_a_soft_reward():
    def score(quality, ratio):
        return quality - 0.1 * ratio

    everything = np.array(list(itertools.product(range(3), range(2), range(3), range(3))))
    values = score(EFFECTS[np.arange(4), everything].sum(axis=1), _additive(COSTS)(everything) / 5.0)
    found = policy.best_sample(EFFECTS, MASK, _additive(COSTS), score, 5.0, np.zeros(4, int))
    assert found.tolist() == everything[values.argmax()].tolist()


def test_best_sample_of_one_decision_is_the_nearest():
    costs = np.array([[16.0, 64.0, 256.0]])

    def score(quality, ratio):
        return quality - 1e4 * rewards.Absolute().violation(ratio, 0.01)

    found = policy.best_sample(
        np.array([[-1.0, 0, 0]]), np.ones((1, 3), bool), _additive(costs), score, 50.0, np.array([2])
    )
    assert found.tolist() == [1]
