import itertools

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf.search.model_test import IMAGES, LABELS, compiled


@pytest.fixture(scope="module")
def searched():
    qmodel = compiled(space=("INT4", "INT6", "INT8"), quality_every=1)
    qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=20, verbose=0, quality_data=(IMAGES, LABELS))
    return qmodel


def test_the_recipe_of_another_budget_costs_no_more_than_it(searched):
    reference = fliqs_tf.costs.bops(searched, "INT8")
    for share in (0.25, 0.3, 0.5, 0.9):
        recipe = searched.recipe(f"{share}x INT8")
        assert fliqs_tf.costs.bops(searched, recipe) <= share * reference * (1 + 1e-6)
        assert searched.recipe(share * reference) == recipe
    assert set(searched.recipe("0.25x INT8").formats.values()) == {"INT4"}
    assert searched.recipe("0.625x INT8") == searched.recipe()


def test_a_larger_budget_is_expected_to_lose_no_more(searched):
    rows = searched.pareto()
    assert len(rows) == 12
    losses = [row.loss for row in rows]
    span = max(losses) - min(losses)
    # What is given back where it buys nothing is up to 1 % of what the narrowest formats lose.
    assert all(b <= a + 0.011 * span for a, b in itertools.pairwise(losses))
    assert losses[0] > 0 and rows[0].deviation > 0
    for row in rows:
        assert row.cost <= row.target_cost * (1 + 1e-6)
        assert row.cost == pytest.approx(float(fliqs_tf.costs.bops(searched, row.recipe)))


def test_uniform_formats_are_expected_to_lose_what_their_effects_say(searched):
    rows = searched.uniform_budgets()
    assert list(rows) == ["INT4", "INT6", "INT8"]
    assert rows["INT8"].loss == rows["INT8"].deviation == 0
    mean = searched.controller.beliefs().mean
    assert rows["INT4"].loss == pytest.approx((mean[:, 2] - mean[:, 0]).sum())
    assert rows["INT4"].cost == pytest.approx(float(fliqs_tf.costs.bops(searched, "INT4")))
    data = rows["INT4"].to_dict()
    assert data["recipe"] == dict.fromkeys(["conv", "hidden", "logits"], "INT4") and data["loss"] == rows["INT4"].loss


def test_budgets_out_of_reach(searched):
    for target in ("0.2x INT8", "1.1x INT8"):
        with pytest.raises(ValueError, match="out of reach: the formats of this search cost from"):
            searched.recipe(target)
        with pytest.raises(ValueError, match="out of reach"):
            searched.pareto([target])


def test_without_a_reading_nothing_is_known():
    with pytest.raises(RuntimeError, match="quality was never read"):
        compiled().recipe("0.5x INT8")
    with pytest.raises(RuntimeError, match="Only estimator='critic' knows effects"):
        compiled(controller={"estimator": "reinforce"}).pareto()


def test_another_budget_is_known_of_a_saved_search(searched, tmp_path):
    from fliqs_tf.io import loading

    searched.save(tmp_path / "search.keras")
    again = loading.load_model(tmp_path / "search.keras")
    again.compile("sgd", "mse", target_cost="0.625x INT8")
    assert again.recipe("0.4x INT8") == searched.recipe("0.4x INT8")
    np.testing.assert_allclose([r.loss for r in again.pareto()], [r.loss for r in searched.pareto()])
