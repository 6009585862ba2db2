import doctest
import math

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf.search import rewards

RATIOS = np.array([0.5, 0.8, 1.25, 2.0], np.float32)
ALL = [
    rewards.Absolute(-0.5),
    rewards.OneSided(-0.5),
    rewards.SoftExponential(-0.5),
    rewards.HardExponential(-0.5),
]


@pytest.mark.parametrize(
    "reward, values",
    [
        (rewards.Absolute(-0.5), [0.55, 0.7, 0.675, 0.3]),
        (rewards.OneSided(-0.5), [0.8, 0.8, 0.675, 0.3]),
        (rewards.SoftExponential(-0.5), [0.8 / math.sqrt(r) for r in RATIOS]),
        (rewards.HardExponential(-0.5), [0.8, 0.8, 0.8 / math.sqrt(1.25), 0.8 / math.sqrt(2)]),
        (rewards.Absolute(), [0.3, 0.6, 0.55, -0.2]),
    ],
)
def test_values(reward, values):
    np.testing.assert_allclose(reward(np.full(4, 0.8, np.float32), RATIOS), values, rtol=1e-6)


@pytest.mark.parametrize("reward", ALL)
def test_slope_is_that_of_automatic_differentiation(reward):
    quality = np.full(4, 0.8, np.float32)
    np.testing.assert_allclose(reward.slope(quality, RATIOS), rewards.Custom(reward).slope(quality, RATIOS), rtol=1e-5)


def test_slopes_by_hand():
    def slope(reward):
        return reward.slope(0.8, RATIOS).numpy().tolist()

    assert slope(rewards.Absolute(-0.5)) == [-0.5, -0.5, 0.5, 0.5]
    assert slope(rewards.OneSided(-0.5)) == [0, 0, 0.5, 0.5]
    assert slope(rewards.SoftExponential(-0.5)) == pytest.approx([0.8, 0.5, 0.32, 0.2])
    assert slope(rewards.HardExponential(-0.5)) == pytest.approx([0, 0, 0.32, 0.2])
    assert slope(rewards.Absolute()) == [-math.inf, -math.inf, math.inf, math.inf]
    assert slope(rewards.OneSided()) == [0, 0, math.inf, math.inf]


@pytest.mark.parametrize("reward", [rewards.Absolute(), rewards.OneSided(), *ALL])
def test_at_the_target_the_reward_is_the_quality(reward):
    assert float(reward(0.8, 1.0)) == pytest.approx(0.8)
    assert math.isfinite(float(reward.slope(0.8, 1.0)))


def test_violation_of_a_hard_target():
    ratios = np.array([0.5, 0.995, 1.005, 1.5])
    np.testing.assert_allclose(rewards.Absolute().violation(ratios, 0.01), [0.49, 0, 0, 0.49])
    np.testing.assert_allclose(rewards.OneSided().violation(ratios, 0.01), [0, 0, 0.005, 0.5], atol=2e-6)


def test_get():
    assert rewards.get("absolute") == rewards.Absolute()
    assert rewards.get("hard_exponential", -0.2) == rewards.HardExponential(-0.2)
    assert rewards.get(rewards.OneSided(-1.0)) == rewards.OneSided(-1.0)
    assert float(rewards.get(lambda q, r: q - 0.1 * r**2).slope(0.8, 2.0)) == pytest.approx(0.4)
    assert float(rewards.get(lambda q, r: q).slope(0.8, 2.0)) == 0
    assert [rewards.get(name).needs_positive_quality for name in rewards.NAMES] == [False, False, True, True]


def test_in_a_compiled_function():
    for function in [f for reward in ALL for f in (reward, reward.slope)]:
        compiled = tf.function(function, jit_compile=True)(tf.constant(0.8), tf.constant(RATIOS))
        np.testing.assert_allclose(compiled, function(0.8, RATIOS), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, math.nan])
def test_beta_must_be_negative(beta):
    for cls in rewards.NAMES.values():
        with pytest.raises(ValueError, match="beta must be negative"):
            cls(beta)


class Sloped:
    """A reward of one's own."""

    def __call__(self, quality, cost_ratio):
        return quality - cost_ratio

    def slope(self, quality, cost_ratio):
        return tf.ones_like(cost_ratio)


def test_a_reward_with_a_slope_says_whether_it_is_hard():
    reward = Sloped()
    with pytest.raises(ValueError, match=r"says in `hard` whether the target must be held.*a function of"):
        rewards.get(reward)
    reward.hard = True
    with pytest.raises(ValueError, match=r"has a method violation\(cost_ratio, tolerance\)"):
        rewards.get(reward)
    reward.violation = rewards.OneSided().violation
    assert rewards.get(reward) is reward
    reward.hard, reward.violation = False, None
    assert rewards.get(reward) is reward


def test_unknown_reward():
    with pytest.raises(ValueError, match="Unknown reward 'abs'; known: absolute, one_sided"):
        rewards.get("abs")
    with pytest.raises(ValueError, match="got 3"):
        rewards.get(3)
    with pytest.raises(ValueError, match="beta is for a reward given by name"):
        rewards.get(rewards.Absolute(), -0.1)


def test_doctests():
    assert doctest.testmod(rewards).failed == 0
