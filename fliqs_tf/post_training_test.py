import numpy as np
import pytest

import fliqs_tf
from fliqs_tf.search.reading_test import CROSSENTROPY, X, Y, network


def search(model, **options):
    defaults = {"data": (X, Y), "target_cost": "0.6x INT8", "loss": CROSSENTROPY, "readings": 25, "verbose": False}
    return fliqs_tf.post_training_search(model, ["INT2", "INT4", "INT8"], **{**defaults, **options})


def test_decides_without_changing_a_weight():
    model = network()
    qmodel = search(model)
    np.testing.assert_array_equal(qmodel.network.get_layer("hidden").get_weights()[0], np.eye(8))
    np.testing.assert_array_equal(model.get_layer("hidden").get_weights()[0], np.eye(8))
    recipe = qmodel.recipe()
    assert fliqs_tf.costs.bops(qmodel, recipe) <= qmodel.target_cost
    predicted = qmodel.deploy().predict(X, verbose=0).argmax(axis=1)
    assert np.mean(predicted == Y) > 0.9
    assert fliqs_tf.costs.bops(qmodel, qmodel.recipe("0.3x INT8")) <= 0.3 * fliqs_tf.costs.bops(qmodel, "INT8")


def test_the_loss_is_that_of_the_model_and_rules_hold():
    model = network()
    model.compile("sgd", CROSSENTROPY)
    qmodel = search(model, loss=None, rules=[("hidden", ["INT8"])], target_cost="0.9x INT8")
    assert qmodel.recipe().formats["hidden"] == "INT8" and len(qmodel.decisions) == 1


def test_its_fit_trains_with_the_decision():
    qmodel = search(network())
    recipe = qmodel.recipe()
    qmodel.compile("sgd", CROSSENTROPY, target_cost="0.6x INT8")
    qmodel.fit(X, Y, batch_size=64, verbose=0)
    assert qmodel.recipe() == recipe


def test_a_model_that_was_never_trained_is_told(caplog):
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        search(network(trained=False))
    assert "Model 'sign' does not seem to be trained" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": None}, "is not compiled with a loss"),
        ({"data": None}, "needs labelled examples"),
        ({"data": X}, "data has no labels"),
        ({"target_cost": None}, "and target_cost='0.5x INT8'"),
        ({"target_cost": "0.01x INT8"}, "out of reach"),
        ({"batch_size": 2.5}, "batch_size must be a whole number from 1 to 2147483647, got 2.5"),
        ({"readings": 0}, "readings must be a whole number from 1 to 2147483647, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        search(network(), **options)


def test_sensitivities_find_what_the_critic_finds():
    pytest.importorskip("scipy")
    recipes = [search(network(), method=method, readings=50).recipe() for method in ("critic", "sensitivities")]
    # Inputs of 2 bits lose the sign of small numbers, in either layer.
    assert all("INT2" not in recipe.formats.values() for recipe in recipes)
    with pytest.raises(ValueError, match="method must be 'critic' or 'sensitivities', got 'milp'"):
        search(network(), method="milp")
