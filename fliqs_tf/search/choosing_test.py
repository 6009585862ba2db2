import itertools

import numpy as np
import pytest

from fliqs_tf.search import choosing, rewards

MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
MEAN = np.array([[-0.3, -0.1, 0.0], [-0.2, 0.0, 0.0], [-0.1, -0.05, 0.0]])
COSTS = np.array([[1, 4, 16], [1, 4, 0], [1, 4, 16]], float)
START = np.zeros(3, int)


def cost(samples):
    return COSTS[np.arange(3), samples].sum(axis=1)


def beliefs(mean=MEAN, deviation=0.0):
    """Effects that are independent of each other."""
    return choosing.Beliefs(np.asarray(mean), np.diag(np.broadcast_to(deviation, np.shape(mean)).ravel()), level=0.5)


LIMIT = rewards.OneSided()


def choose(known, target, reward=LIMIT):
    return choosing.choose(known, MASK, cost, reward, target, START).tolist()


def test_gain_has_the_deviation_of_what_differs():
    known = beliefs(deviation=[[3.0, 4.0, 0], [0, 0, 0], [1.0, 0, 2.0]])
    gain, deviation = known.gain(np.array([[1, 0, 0], [0, 0, 0], [1, 1, 2]]), np.array([0, 0, 0]))
    np.testing.assert_allclose(gain, [0.2, 0.0, 0.2 + 0.2 + 0.1])
    np.testing.assert_allclose(deviation, [5.0, 0.0, np.sqrt(9 + 16 + 1 + 4)])


@pytest.mark.parametrize("target", [3, 6, 9, 12, 21, 36])
def test_the_best_that_costs_no_more_than_the_target(target):
    every = np.array(list(itertools.product(range(3), range(2), range(3))))
    allowed = every[cost(every) <= target]
    best = allowed[MEAN[np.arange(3), allowed].sum(axis=1).argmax()]
    found = choose(beliefs(), target)
    assert MEAN[np.arange(3), found].sum() == pytest.approx(MEAN[np.arange(3), best].sum())
    assert cost(np.array([found]))[0] <= target


def test_the_symmetric_reward_spends_what_it_may_and_the_limit_does_not():
    # The third decision does not matter, as far as is known: 0.1 % of what all of them do.
    mean = np.array([[-0.3, -0.1, 0.0], [-0.2, 0.0, 0.0], [-0.0006, -0.0003, 0.0]])
    known = beliefs(mean, deviation=0.001)
    assert choose(known, 36, rewards.Absolute()) == [2, 1, 2]
    assert choose(known, 36) == [2, 1, 0]
    assert choose(beliefs(mean, deviation=0.0), 36) == [2, 1, 2]  # it is certain


def test_what_is_given_back_is_immaterial_in_all():
    # Each decision loses 0.4 % of what the narrowest formats lose: two of them may.
    mean = np.array([[-1.0, -0.004, 0.0]] * 3)
    known = choosing.Beliefs(mean, np.diag(np.full(9, 0.1)), 0.0)
    mask, costs = np.ones((3, 3), bool), np.array([[1, 4, 16]] * 3)
    of_samples = lambda samples: costs[np.arange(3), samples].sum(axis=1)  # noqa: E731
    spared = choosing.spared(np.array([2, 2, 2]), known, mask, of_samples)
    assert sorted(spared.tolist()) == [1, 1, 1]  # 3 * 0.004 < 0.01 * 3
    mean = np.array([[-1.0, -0.011, 0.0]] * 3)
    spared = choosing.spared(np.array([2, 2, 2]), known._replace(mean=mean), mask, of_samples)
    assert sorted(spared.tolist()) == [1, 1, 2]


def test_nothing_to_regret_of_what_is_certain():
    arguments = (MASK, cost, rewards.OneSided(), 12)
    best = choosing.choose(beliefs(), *arguments, START)
    assert choosing.regret(best, beliefs(), *arguments) == 0.0
    assert choosing.regret(START, beliefs(), *arguments) == pytest.approx((MEAN[np.arange(3), best].sum() + 0.6) / 0.6)


def test_regret_grows_with_what_is_not_known_and_has_no_unit():
    arguments = (MASK, cost, rewards.OneSided(), 12)
    best = choosing.choose(beliefs(), *arguments, START)
    little, much = (choosing.regret(best, beliefs(deviation=d), *arguments) for d in (0.01, 0.3))
    assert 0 <= little < 0.05 < much
    scaled = choosing.Beliefs(1000 * MEAN, 1000 * beliefs(deviation=0.3).root, 0.5)
    assert choosing.regret(best, scaled, *arguments) == pytest.approx(much)
