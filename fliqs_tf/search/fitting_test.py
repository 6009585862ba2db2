"""What `fit` does around Keras' training loop."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.search import averages
from fliqs_tf.search.model_test import IMAGES, LABELS, compiled

# Decides after more than half of the run: of few steps a quarter is next to nothing.
LATE = {"jit_compile": False, "warmup": 0.25, "frozen": 0.4}


class Curve(keras.callbacks.Callback):
    """Logs given figures as "figure", and notes kernels and recipe of each epoch."""

    def __init__(self, figures):
        super().__init__()
        self.figures, self.kernels, self.recipes = figures, [], []

    def on_epoch_end(self, epoch, logs=None):
        logs["figure"] = self.figures[epoch]
        self.kernels.append(kernel(self.model))
        self.recipes.append(self.model.recipe())


def kernel(qmodel):
    return np.array(next(v for v in qmodel.trainable_variables if "kernel" in v.name))


def is_decided(qmodel):
    return bool(tf.convert_to_tensor(qmodel.controller.decided))


def told(caplog):
    """What fliqs_tf has logged; TensorFlow tells of its own, such as how many models a process has traced."""
    return [record.getMessage() for record in caplog.records if record.name == "fliqs_tf"]


def test_best_weights_from_before_the_decision_keep_the_decision(caplog):
    # 4 steps an epoch, 40 in all: decided at step 24, in the last step of epoch 5. The best epoch is 1; 7 epochs later,
    # after 9 epochs, training stops.
    curve = Curve([3, 1, *[2] * 8])
    best = keras.callbacks.EarlyStopping("figure", patience=7, mode="min", restore_best_weights=True)
    qmodel = compiled(controller=LATE)
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=10, verbose=0, callbacks=[curve, best])
    assert len(curve.kernels) == 9
    np.testing.assert_array_equal(kernel(qmodel), curve.kernels[1])
    assert is_decided(qmodel)
    assert qmodel.recipe() == curve.recipes[6] != curve.recipes[1]
    assert int(tf.convert_to_tensor(qmodel.controller.step)) == 36
    assert caplog.text.count("restored the weights of step 8, when the formats were still open") == 1
    for decision in qmodel.decisions:
        for choice in decision.choices:
            assert decision.options[int(tf.convert_to_tensor(choice))] == curve.recipes[6].formats[decision.name]


def test_best_weights_from_after_the_decision_do_not_set_the_run_back(caplog):
    curve = Curve([3, 3, 3, 3, 3, 3, 3, 1, 2, 2])
    best = keras.callbacks.EarlyStopping(
        "figure", patience=2, mode="min", restore_best_weights=True, start_from_epoch=6
    )
    qmodel = compiled()
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=10, verbose=0, callbacks=[curve, best])
    np.testing.assert_array_equal(kernel(qmodel), curve.kernels[7])
    assert int(tf.convert_to_tensor(qmodel.controller.step)) == 40
    assert not told(caplog)


def test_loading_weights_from_before_the_decision_is_told(caplog, tmp_path):
    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                self.model.save_weights(tmp_path / "best.weights.h5")

    qmodel = compiled(controller=LATE)
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=10, verbose=0, callbacks=[Save()])
        recipe = qmodel.recipe()
        qmodel.deploy()
        qmodel.load_weights(tmp_path / "best.weights.h5")
        final = qmodel.deploy(recipe)
        assert not told(caplog)
        assert fliqs_tf.costs.bops(final) == fliqs_tf.costs.bops(qmodel, recipe)
        assert qmodel.recipe() != recipe
    assert "not decided: its controller is at step 8 of a search that decides them at step 24" in caplog.text
    caplog.clear()
    qmodel.deploy()
    assert "are not decided" in caplog.text


# ---- compiled again

SETTINGS = {"frozen": 0.3, "jit_compile": False}


def recompile(qmodel, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    qmodel.compile("sgd", loss, **{"target_cost": "0.625x INT8", **options})


def fit(qmodel, epochs, **options):
    qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=epochs, verbose=0, **options)


def step(qmodel):
    return int(tf.convert_to_tensor(qmodel.controller.step))


def test_compiled_for_the_same_the_formats_stay(caplog):
    qmodel = compiled()
    fit(qmodel, 10)
    recipe = qmodel.recipe()
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        recompile(qmodel, controller={"jit_compile": False})
        fit(qmodel, 1)
    assert qmodel.recipe() == recipe
    assert step(qmodel) == 44
    assert not told(caplog)


@pytest.mark.parametrize("options", [{"target_cost": "1x INT8"}, {"reward": "absolute"}, {"cost": "memory"}])
def test_compiled_for_something_else_the_search_begins_anew(options, caplog):
    qmodel = compiled()
    fit(qmodel, 10)
    recipe = qmodel.recipe()
    assert set(recipe.formats.values()) == {"INT4", "INT8"}
    recompile(qmodel, **options)
    assert qmodel.recipe() == recipe
    before = kernel(qmodel)
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        fit(qmodel, 1)
    assert "is a new search, with the weights as they are" in caplog.text
    assert is_decided(qmodel) and step(qmodel) == 4
    assert np.abs(kernel(qmodel) - before).max() < 0.1  # after 4 steps from where it was
    # Of 644 MACs the smallest layer has 32: in INT4 it would cost 3.7 % less than 1x INT8.
    if options == {"target_cost": "1x INT8"}:
        assert set(qmodel.recipe().formats.values()) == {"INT8"}


def test_a_run_that_goes_on_keeps_its_formats(caplog):
    qmodel = compiled()
    fit(qmodel, 10)
    recipe = qmodel.recipe()
    recompile(qmodel, target_cost="1x INT8")
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        fit(qmodel, 11, initial_epoch=10)
    assert qmodel.recipe() == recipe and step(qmodel) == 44
    assert "they stay. For a new search fit without initial_epoch" in caplog.text


def test_a_loaded_search_begins_anew_for_another_target(tmp_path):
    qmodel = compiled()
    fit(qmodel, 1)
    qmodel.save(tmp_path / "search.keras")
    loaded = keras.models.load_model(tmp_path / "search.keras")
    recompile(loaded, target_cost="1x INT8")
    fit(loaded, 1)
    assert step(loaded) == 4 and set(loaded.recipe().formats.values()) == {"INT8"}


def test_the_same_options_keep_what_was_learned_others_do_not(caplog, tmp_path):
    qmodel = compiled(controller=SETTINGS, search_steps=40)
    fit(qmodel, 1)
    qmodel.save(tmp_path / "search.keras")
    loaded = keras.models.load_model(tmp_path / "search.keras")
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        for model in (qmodel, loaded):
            recompile(model, controller=dict(SETTINGS), search_steps=40)
            assert step(model) == 4
        assert not told(caplog)
        recompile(qmodel, controller={**SETTINGS, "frozen": 0.2}, search_steps=40)
    assert step(qmodel) == 0 and qmodel.controller.frozen == 0.2
    assert "what the search has learned in 4 steps is forgotten" in caplog.text
    assert len(qmodel.variables) == len(loaded.variables)  # those of the controller before are gone


def test_a_rate_that_is_a_function_can_be_compiled_twice():
    rate = fliqs_tf.schedules.Growing(0.01, total_steps=40)
    settings = {"estimator": "reinforce", "learning_rate": rate, "jit_compile": False}
    qmodel = compiled(controller=settings, search_steps=40)
    fit(qmodel, 1)
    recompile(qmodel, controller=dict(settings), search_steps=40)
    assert step(qmodel) == 4


# ---- moving averages at the end


def line(count):
    """Inputs 0, 1, 2, ... in order, and one class."""
    return np.arange(count, dtype=np.float32)[:, None], np.zeros(count, np.int64)


def normed(**options):
    layers = [
        keras.layers.Input((1,)),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dense(4, name="logits"),
    ]
    return compiled(model=keras.Sequential(layers), target_cost="1x INT8", **options)


def moving_mean(qmodel):
    return float(np.array(qmodel.network.get_layer("norm").moving_mean)[0])


def test_moving_averages_come_from_everywhere_in_arrays():
    qmodel = normed()
    qmodel.fit(*line(1280), batch_size=4, verbose=0)
    # 32 batches of 4 of the 1280 examples: their mean is 639.5 +- 369 / sqrt(128) = 33. The first 128 have 63.5.
    assert abs(moving_mean(qmodel) - 639.5) < 3 * 33


def test_moving_averages_come_from_the_training_part_alone():
    qmodel = normed()
    qmodel.fit(*line(64), batch_size=4, validation_split=0.5, verbose=0)
    assert moving_mean(qmodel) == pytest.approx(15.5)  # of 0 .. 31
    other = qmodel.deploy(fliqs_tf.Recipe.uniform(qmodel, "INT4"))
    assert float(np.array(other.get_layer("norm").moving_mean)[0]) == pytest.approx(15.5)


@pytest.mark.parametrize("make, warned", [(normed, True), (lambda: compiled(model=dense()), False)])
def test_a_generator_leaves_the_moving_averages_and_says_so(make, warned, caplog):
    x, y = line(32)
    qmodel = make()
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        qmodel.fit(((x, y) for _ in range(2)), steps_per_epoch=2, verbose=0)
    assert ("there is no batch to estimate them anew from" in caplog.text) == warned
    caplog.clear()
    qmodel.deploy(fliqs_tf.Recipe.uniform(qmodel, "INT4"))
    assert ("give calibration_data" in caplog.text) == warned


@pytest.fixture
def estimations(monkeypatch):
    """Notes how many batches each estimation of moving averages was made from."""
    made, original = [], averages.estimate

    def estimate(graph, data):
        made.append(original(graph, data))
        return made[-1]

    monkeypatch.setattr(averages, "estimate", estimate)
    return made


def test_averages_are_estimated_once_for_the_formats(estimations):
    qmodel = normed(space=("INT4", "INT8"))
    data = line(64)
    qmodel.fit(*data, batch_size=4, verbose=0)
    assert estimations == [16]
    qmodel.fit(*data, batch_size=4, verbose=0)  # trains on, with the same formats
    assert estimations == [16]
    qmodel.fit(*data, batch_size=4, verbose=0, calibration_data=data[0][:32])  # asked for
    assert estimations == [16, 1]
    qmodel.restart()
    qmodel.fit(*data, batch_size=4, verbose=0)
    assert estimations == [16, 1, 16]


@pytest.mark.parametrize(("momentum", "estimated"), [(0.5, []), (0.99, [16])])
def test_averages_that_have_followed_since_the_decision_stay(momentum, estimated, estimations):
    # 16 steps, decided after 4: of the averages before it 0.5^12 or 0.99^12 are left.
    layers = [
        keras.layers.Input((1,)),
        keras.layers.BatchNormalization(momentum=momentum, name="norm"),
        keras.layers.Dense(4, name="logits"),
    ]
    qmodel = compiled(model=keras.Sequential(layers), target_cost="1x INT8")
    qmodel.fit(*line(64), batch_size=4, verbose=0)
    assert estimations == estimated


def dense():
    return keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(8), keras.layers.Dense(4)])
