"""Situations that users bring to `fit`: labels and losses of every kind, interruptions, loops of their own."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.search import critic
from fliqs_tf.search.fitting_test import told

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 8)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
layers = keras.layers
# Decides after more than half of the run: of few steps a quarter is next to nothing.
LATE = {"jit_compile": False, "warmup": 0.25, "frozen": 0.4}


def network():
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(6, activation="relu", name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, name="logits"),
        ]
    )


def compiled(model=None, **options):
    qmodel = fliqs_tf.wrap(
        network() if model is None else model, ["INT4", "INT8"], input_shape=options.pop("shape", None)
    )
    defaults = {"loss": CROSSENTROPY, "target_cost": "0.625x INT8", "controller": {"jit_compile": False}}
    qmodel.compile("sgd", **{**defaults, **options})
    return qmodel


def fit(qmodel, x=X, y=Y, **options):
    return qmodel.fit(x, y, **{"batch_size": 16, "verbose": 0, **options}).history


def updates(qmodel):
    return float(tf.convert_to_tensor(qmodel.controller._state[critic.State._fields.index("updates")]))


def is_decided(qmodel):
    return bool(tf.convert_to_tensor(qmodel.controller.decided))


def step(qmodel):
    return int(tf.convert_to_tensor(qmodel.controller.step))


# ---- where quality comes from


def test_each_fit_reads_quality_where_it_was_told_to():
    qmodel = compiled(search_steps=100, quality_every=1)
    held_out = {"quality_data": (X, Y)}
    learned = []
    for options in ({}, held_out, {}, held_out):
        fit(qmodel, **options)
        learned.append(updates(qmodel))
    assert learned == [4, 8, 12, 16]  # four steps each, one update a step


def test_an_interrupted_fit_leaves_nothing_behind():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    qmodel = compiled(search_steps=100, quality_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(qmodel, quality_data=(X, Y), callbacks=[Interrupt()])
    before = updates(qmodel)
    fit(qmodel)
    assert updates(qmodel) == before + 4


def test_a_metric_may_be_quality_and_metric_at_once():
    metric = keras.metrics.SparseCategoricalAccuracy(name="acc")
    qmodel = compiled(quality=metric, metrics=[metric], quality_every=1)
    logs = fit(qmodel, validation_data=(X, Y), quality_data=(X, Y), epochs=2)
    assert min(logs["val_acc"]) > 0.2  # of two classes; 0 where the metric of readings took the place of the model's
    right = np.mean(np.argmax(qmodel.predict(X, verbose=0), axis=1) == Y)
    assert qmodel.evaluate(X, Y, verbose=0, return_dict=True)["acc"] == pytest.approx(right)


def test_readings_leave_the_metric_alone():
    metric = keras.metrics.SparseCategoricalAccuracy(name="acc")
    qmodel = compiled(quality=metric, metrics=[metric], quality_every=1, search_steps=100)
    fit(qmodel, quality_data=(X, Y))
    assert float(tf.convert_to_tensor(metric.count)) == 64  # all examples of the epoch, not those of the last reading


def test_quality_data_sorted_by_class_are_shuffled_and_follow_the_batches_of_training(monkeypatch):
    read = []
    original = fliqs_tf.SearchModel.read_quality
    monkeypatch.setattr(
        fliqs_tf.SearchModel,
        "read_quality",
        lambda self, data, s: (read.append(data[1].shape), original(self, data, s))[1],
    )
    order = np.argsort(Y, kind="stable")
    qmodel = compiled(
        quality=lambda y, y_pred: tf.cast(tf.reduce_min(y) < tf.reduce_max(y), tf.float32), quality_every=1
    )
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16, drop_remainder=True)
    qmodel.fit(data, verbose=0, epochs=4, quality_data=(X[order], Y[order]))
    assert read[0] == (16,)
    assert float(tf.convert_to_tensor(qmodel.readout)[2]) == 1  # both classes in the batch that was read last


def test_quality_of_one_output_of_a_model_with_several_is_refused():
    for quality in ("accuracy", keras.metrics.MeanSquaredError()):
        with pytest.raises(ValueError, match="reads one output, but the model has 2: left, right"):
            compiled(two_outputs(), loss=LOSSES, quality=quality)


@pytest.mark.parametrize(
    "make",
    [
        lambda: X,
        lambda: (X, Y),
        lambda: [X[:32], X[32:]],
        lambda: [(X[:32], Y[:32]), (X[32:], Y[32:])],
        lambda: (b for b in [X[:32], X[32:]]),
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(32),
    ],
)
def test_calibration_data_in_every_form(make):
    qmodel = compiled()
    batches = ((X[:16], Y[:16]) for _ in range(4))
    qmodel.fit(batches, steps_per_epoch=4, verbose=0, calibration_data=make())
    hidden = np.asarray(qmodel.network.get_layer("hidden")(X))
    np.testing.assert_allclose(np.array(qmodel.network.get_layer("norm").moving_mean), hidden.mean(axis=0), rtol=1e-5)


def test_calibration_data_that_do_not_fit_are_refused_before_the_training():
    qmodel = compiled()
    with pytest.raises(ValueError, match=r"calibration_data has inputs of shape \(64, 7\)"):
        fit(qmodel, calibration_data=X[:, :7])
    assert step(qmodel) == 0


# ---- losses and labels that take nothing but real data


def test_losses_and_metrics_see_no_made_up_data():
    def picky(y, y_pred):
        tf.debugging.assert_greater(tf.reduce_max(tf.abs(y)), 0.0)
        assert y.shape[1:3] == (8, 8)
        return tf.reduce_mean((y - y_pred) ** 2)

    images = RNG.normal(size=(32, 8, 8, 1)).astype(np.float32)
    inputs = keras.Input((8, 8, 1))
    qmodel = compiled(keras.Model(inputs, layers.Conv2D(1, 3, padding="same")(inputs)), loss=picky, metrics=[picky])
    assert np.isfinite(fit(qmodel, images, images)["picky"]).all()


def test_open_sizes():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(inputs))
    images = RNG.normal(size=(16, 8, 8, 3)).astype(np.float32)
    qmodel = compiled(model, loss="binary_crossentropy", metrics=["accuracy"], shape=(8, 8, 3))
    assert fit(qmodel, images, (images[..., :1] > 0).astype(np.float32))["loss"]


@pytest.mark.skipif(keras.__name__ == "keras", reason="Keras 3 itself refuses labels of unknown rank")
def test_labels_of_unknown_rank():
    data = tf.data.Dataset.from_generator(lambda: [(X[:16], Y[:16])] * 4, output_types=(tf.float32, tf.int64))
    qmodel = compiled()
    qmodel.fit(data.map(lambda x, y: (tf.ensure_shape(x, (None, 8)), y)), steps_per_epoch=4, verbose=0)
    assert is_decided(qmodel)


@keras.saving.register_keras_serializable("fitting_cases_test")
class SquareLoss(layers.Layer):
    def call(self, x):
        self.add_loss(tf.reduce_mean(x**2))
        return x


def test_no_loss_but_that_of_a_layer():
    inputs = keras.Input((8,))
    qmodel = compiled(keras.Model(inputs, SquareLoss()(layers.Dense(4)(layers.Dense(8)(inputs)))), loss=None)
    logs = qmodel.fit(X, batch_size=16, verbose=0, epochs=3).history["loss"]
    assert logs[0] > logs[-1] > 0
    with pytest.raises(ValueError, match="quality_data has no labels"):
        fit(compiled(), quality_data=X)


def test_activity_regularizers_in_every_order_of_calls():
    inputs = keras.Input((8,))
    hidden = layers.Dense(6, activity_regularizer=keras.regularizers.L2(0.1), name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(hidden))
    qmodel = compiled(model, quality_every=1)
    fit(qmodel, quality_data=(X, Y), epochs=2)
    qmodel.predict(X, verbose=0)
    loss = qmodel.evaluate(X, Y, verbose=0)
    loss = loss[0] if isinstance(loss, list) else loss
    fit(qmodel)
    final = qmodel.deploy()
    final.compile("sgd", CROSSENTROPY)
    fit(final)
    plain = float(tf.reduce_mean(CROSSENTROPY(Y, qmodel.predict(X, verbose=0))))
    assert 0 < plain < loss + 0.5


# ---- what is given and not used


def test_what_fit_does_not_use_is_told(caplog):
    qmodel = compiled(search_steps=8, controller=LATE)
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        fit(qmodel, calibration_data=X)
        assert "calibration_data is not used yet: the search goes on at step 4 of 8" in caplog.text
        fit(qmodel, quality_data=(X, Y), class_weight={0: 1.0, 1: 2.0})
        assert "class_weight does not count where quality is read" in caplog.text
        assert is_decided(qmodel) and "quality_data is not read" not in caplog.text
        fit(qmodel, quality_data=(X, Y))
        assert "quality_data is not read: the formats are decided" in caplog.text


# ---- several outputs

LOSSES = {"left": CROSSENTROPY, "right": "mse"}
METRICS = {"left": ["accuracy"], "right": ["mae"]}


def two_outputs(as_dict=False):
    inputs = keras.Input((8,))
    hidden = layers.Dense(6, activation="relu")(inputs)
    left, right = layers.Dense(2, name="left")(hidden), layers.Dense(1, name="right")(hidden)
    return keras.Model(inputs, {"left": left, "right": right} if as_dict else [left, right])


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("labels", [{"left": Y, "right": X[:, :1]}, [Y, X[:, :1]]])
def test_several_outputs_train_and_report_as_the_float_model_does(as_dict, labels):
    if as_dict and isinstance(labels, list):
        pytest.skip("Keras wants labels in a dict for outputs in a dict")
    model = two_outputs(as_dict)
    model.compile("sgd", loss=LOSSES, metrics=METRICS)
    expected = fit(model, X, labels, validation_data=(X, labels))
    qmodel = compiled(model, loss=LOSSES, metrics=METRICS, quality_every=1, controller=LATE)
    for _ in range(2):
        logs = fit(qmodel, X, labels, validation_data=(X, labels), quality_data=(X, labels))
        assert set(expected) == set(logs) - {"reward", "cost", "entropy", "switch_rate"}
    assert updates(qmodel) > 0


# ---- interruptions and ends


@pytest.mark.parametrize("epoch", [1, 2, 3, 5])
def test_backups_of_keras_keep_the_step_of_the_decision(epoch, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, at, logs=None):
            if at == epoch:
                raise KeyboardInterrupt

    class Watch(keras.callbacks.Callback):
        first = None

        def on_train_batch_begin(self, batch, logs=None):
            if self.first is None and is_decided(self.model):
                self.first = step(self.model)

    watch, options = Watch(), {"batch_size": 8, "epochs": 10}
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(), callbacks=[keras.callbacks.BackupAndRestore(str(tmp_path)), Stop()], **options)
    qmodel = compiled()
    fit(qmodel, callbacks=[keras.callbacks.BackupAndRestore(str(tmp_path)), watch], **options)
    # 8 steps an epoch, 80 in all, decided at a quarter of them.
    assert watch.first == max(20, 8 * epoch) and step(qmodel) == 80 and is_decided(qmodel)


def test_data_that_run_out_end_the_search(caplog):
    qmodel = compiled()
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        qmodel.fit(((X[:16], Y[:16]) for _ in range(5)), steps_per_epoch=5, epochs=4, verbose=0, calibration_data=X)
    assert is_decided(qmodel)
    assert "The training data ended at step" in caplog.text and "of 20: the search ends there" in caplog.text


def test_a_loop_of_ones_own_decides_when_it_is_due_and_finishes(caplog):
    qmodel = compiled()
    qmodel.configure_controller(20)
    decided = []
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        for _ in range(20):
            qmodel.train_on_batch(X[:16], Y[:16])
            decided.append(is_decided(qmodel))
        assert decided.index(True) == 11  # step 12 of 20
        assert not told(caplog)
        assert qmodel.finish(X) == qmodel.recipe()
    hidden = np.asarray(qmodel.network.get_layer("hidden")(X))
    np.testing.assert_allclose(np.array(qmodel.network.get_layer("norm").moving_mean), hidden.mean(axis=0), rtol=1e-5)


def test_an_open_search_says_so_until_it_is_finished(caplog):
    qmodel = compiled()
    qmodel.configure_controller(20)
    qmodel.train_on_batch(X[:16], Y[:16])
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        qmodel.recipe()
        assert "are not decided: its controller is at step 1" in caplog.text and "finish() decides now" in caplog.text
        caplog.clear()
        qmodel.finish()
        assert "stay as training left them" in caplog.text  # there are no data to estimate averages from
        caplog.clear()
        qmodel.recipe()
        assert not told(caplog)
    assert is_decided(qmodel)


# ---- what is not finite


def test_a_loss_that_stays_finite_does_not_hide_weights_that_are_not():
    images = X.copy()
    images[3, 2] = np.nan
    inputs = keras.Input((8,))

    def without_nan(x):
        return tf.where(tf.math.is_nan(x), tf.zeros_like(x), x)

    hidden = layers.Activation(without_nan)(layers.Dense(6)(inputs))
    qmodel = compiled(keras.Model(inputs, layers.Dense(2)(hidden)))
    with pytest.raises(FloatingPointError, match="Weights or moving averages are not finite at step 4"):
        fit(qmodel, images)


def test_a_mended_model_trains_on():
    images = X.copy()
    images[:, 0] = np.nan
    qmodel = compiled()
    good = qmodel.get_weights()
    with pytest.raises(FloatingPointError, match="The loss was not finite at step 0"):
        fit(qmodel, images)
    qmodel.set_weights(good)
    qmodel.compile("sgd", CROSSENTROPY, target_cost="0.625x INT8")  # K2's SGD keeps what it made of the gradients
    assert np.isfinite(fit(qmodel)["loss"]).all()


# ---- the start of the search


def test_what_is_drawn_after_the_warmup_follows_the_noise_until_something_is_learned():
    qmodel = fliqs_tf.wrap(network(), ["INT2", "INT8"])
    qmodel.compile("sgd", CROSSENTROPY, target_cost="0.625x INT8", controller={"jit_compile": False, "warmup": 1})
    qmodel.configure_controller(100, held_out=True)
    first = np.array(qmodel.controller.probabilities())
    qmodel.controller.advance(2)
    np.testing.assert_allclose(np.array(qmodel.controller.probabilities()), first)
    assert first[0, 0] < 0.01  # INT2; uniform would be a half


def test_the_first_sample_of_a_reading_is_that_of_the_training_step():
    qmodel = compiled(search_steps=100, train_with="sample")
    fit(qmodel)
    np.testing.assert_array_equal(qmodel.draw_for_reading()[0], qmodel.previous_sample)
    qmodel.previous_sample.assign(1 - tf.convert_to_tensor(qmodel.previous_sample))  # as a step that XLA compiled may
    np.testing.assert_array_equal(qmodel.draw_for_reading()[0], qmodel.previous_sample)


@pytest.mark.skipif(keras.__name__ == "keras", reason="Keras 3 has no optimizers from before 2.11")
def test_optimizers_from_before_2_11():
    qmodel = fliqs_tf.wrap(network(), ["INT4", "INT8"])
    optimizer = keras.optimizers.legacy.SGD(0.1)
    qmodel.compile(optimizer, CROSSENTROPY, target_cost="0.625x INT8", controller={"jit_compile": False})
    logs = fit(qmodel, epochs=4)
    assert logs["loss"][-1] < logs["loss"][0] and is_decided(qmodel)
