import itertools

import numpy as np
import pytest

from fliqs_tf.search import choosing, integer_program, policy, rewards
from fliqs_tf.search.model_test import compiled

pytest.importorskip("scipy")


def table_and_mask(**options):
    import fliqs_tf
    from fliqs_tf import costs
    from fliqs_tf.search.model_test import convnet

    qmodel = fliqs_tf.wrap(convnet(), ["INT4", "INT6", "INT8"], **options)
    decisions = [(d.name, d.options) for d in qmodel.decisions]
    return costs.CostTable(costs.bops, qmodel.sites, decisions), np.ones((len(decisions), 3), bool)


@pytest.mark.parametrize("tensors", ["together", "separate"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0])
def test_as_good_as_looking_at_every_sample(tensors, share):
    table, mask = table_and_mask(tensors=tensors)
    effects = np.sort(np.random.default_rng(1).normal(size=mask.shape), axis=1)
    low, high = table.reachable()
    target = low + share * (high - low)
    every = np.array(list(itertools.product(range(3), repeat=len(mask))))
    allowed = every[table.of_samples(every) <= target * (1 + 1e-9)]
    best = effects[np.arange(len(mask)), allowed].sum(axis=1).max()
    found = integer_program.solve(effects, mask, table, target)
    assert effects[np.arange(len(mask)), found].sum() == pytest.approx(best)
    assert table.of_samples(found)[0] <= target * (1 + 1e-6)


def test_the_local_search_of_the_controller_is_as_good():
    """40 decisions of 6 options: too many to look at, for which `policy.best_sample` searches locally."""
    rng = np.random.default_rng(0)
    mask = np.ones((40, 6), bool)
    effects = -rng.lognormal(size=(40, 1)) * 4.0 ** -np.arange(6)
    prices = rng.lognormal(size=(40, 1)) * np.arange(4, 10) ** 2

    class Table:
        tables, pairs, constant, per_unit, unit = prices, {}, 0.0, 1.0, "BOPs"

    def cost(samples):
        return prices[np.arange(40), samples].sum(axis=-1)

    target = 1.5 * prices[:, 0].sum()
    known = choosing.Beliefs(effects, np.zeros((240, 1)), 0.0)
    score = choosing._score(rewards.OneSided(), known, mask)
    found = policy.best_sample(effects, mask, cost, score, target, np.zeros(40, int))
    exact = integer_program.solve(effects, mask, Table, target)
    losses = [effects[np.arange(40), sample].sum() for sample in (found, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[0] <= losses[1] + 1e-9


def test_a_target_below_every_sample():
    table, mask = table_and_mask()
    with pytest.raises(ValueError, match="No choice of formats costs"):
        integer_program.solve(np.zeros(mask.shape), mask, table, 0.5 * table.reachable()[0])


def test_it_fits_what_a_search_model_holds():
    qmodel = compiled()
    found = integer_program.solve(np.zeros((3, 2)), np.ones((3, 2), bool), qmodel.cost_table, qmodel.target_cost)
    assert qmodel.cost_table.of_samples(found)[0] <= qmodel.target_cost
