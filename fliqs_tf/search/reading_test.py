import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.io import batches
from fliqs_tf.search import reading

RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, 8)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(trained=True):
    """Says whether the first input is positive. "hidden" passes the inputs on, "logits" looks at the first alone."""
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(8, name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(hidden), name="sign")
    if trained:
        model.get_layer("hidden").set_weights([np.eye(8, dtype=np.float32), np.zeros(8)])
        model.get_layer("logits").set_weights([np.eye(8)[:, :1] * np.array([[-9.0, 9.0]]), np.zeros(2)])
    return model


def compiled(model, **options):
    qmodel = fliqs_tf.wrap(model, ["INT2", "INT4", "INT8"])
    options = {"target_cost": "0.6x INT8", "controller": {"jit_compile": False}, **options}
    qmodel.compile("sgd", CROSSENTROPY, **options)
    return qmodel


def reader(qmodel, labels=Y):
    qmodel.configure_controller(total_steps=100, held_out=True)
    return reading.Reader(qmodel, batches.read((X, labels), qmodel.network, "data"), 32)


def is_decided(qmodel):
    return bool(tf.convert_to_tensor(qmodel.controller.decided))


@pytest.mark.parametrize("quality", ["loss", "accuracy"])
def test_trained_is_where_labels_and_inputs_belong_together(quality):
    assert reader(compiled(network(), quality=quality)).is_trained()
    assert not reader(compiled(network(trained=False), quality=quality)).is_trained()
    assert not reader(compiled(network(), quality=quality), RNG.permutation(Y)).is_trained()


def test_looking_whether_it_is_trained_uses_up_no_batch(monkeypatch):
    qmodel = compiled(network())
    looked, fresh = reader(qmodel), reader(qmodel)
    looked.is_trained()
    np.testing.assert_array_equal(next(looked._batches)[0], next(fresh._batches)[0])


def test_deciding_before_training_changes_no_weight_and_finds_what_matters(capsys):
    qmodel = compiled(network())
    before = [np.array(v) for v in qmodel.trainable_variables]
    count = reader(qmodel).decide_before_training(most=100, verbose=True)
    for variable, value in zip(qmodel.trainable_variables, before):
        np.testing.assert_array_equal(variable, value)
    assert is_decided(qmodel) and count % 25 == 0
    controller = qmodel.controller
    assert int(tf.convert_to_tensor(controller.step)) == 0
    assert int(tf.convert_to_tensor(controller.total_steps)) == 100
    assert controller.readings() == count
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count // 25 and lines[0].startswith("reading 25 of 100 at most, ")
    # Inputs of 2 bits lose the sign of small numbers in either layer. What the weights hold, any format holds.
    recipe = qmodel.recipe()
    assert qmodel.cost(qmodel, recipe) <= qmodel.target_cost
    assert recipe.formats["hidden"] != "INT2"
    assert np.all(np.isfinite(controller.effects()))


@pytest.mark.parametrize(("options", "before_training"), [({}, True), ({"pretrained": False}, False)])
def test_fit_decides_for_trained_weights_before_its_first_step(options, before_training):
    class First(keras.callbacks.Callback):
        decided = None

        def on_train_batch_end(self, batch, logs=None):
            if self.decided is None:
                self.decided = is_decided(self.model)

    first = First()
    qmodel = compiled(network(), **options)
    qmodel.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[first])
    assert first.decided == before_training and is_decided(qmodel)


def test_said_to_be_trained_it_does_not_look():
    qmodel = compiled(network(trained=False), pretrained=True)
    qmodel.fit(X[:32], Y[:32], batch_size=16, verbose=0)
    assert qmodel.controller.readings() in (25, 50)  # with two steps of training to come, 50 at most


def test_ranges_of_activations_come_from_data_before_training():
    qmodel = compiled(network())
    reader(qmodel).decide_before_training(most=25)
    quantizer = qmodel.network.get_layer("hidden").activation_quantizers[0]
    amax, weight = np.array(quantizer.range)
    assert weight == pytest.approx(1 - 0.99**8, rel=1e-4)  # 8 batches
    assert amax == pytest.approx(np.abs(X).max(), rel=0.3)


def test_readings_of_one_class_are_told(caplog):
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        reader(compiled(network())).is_trained()
        assert "of one class" not in caplog.text
        reader(compiled(network()), np.ones_like(Y)).is_trained()
    assert "All examples in the first 4 batches that quality is read from are of one class" in caplog.text


def test_reinforce_with_the_widest_formats_decides_while_training():
    qmodel = compiled(network(), train_with="widest", controller={"estimator": "reinforce", "jit_compile": False})
    qmodel.fit(X, Y, batch_size=64, verbose=0)
    assert is_decided(qmodel)


def test_examples_without_labels_say_nothing_of_training():
    qmodel = compiled(network())
    qmodel.configure_controller(total_steps=100, held_out=True)
    bare = reading.Reader(qmodel, batches.read([(X[:32],)] * 4, qmodel.network, "data"), 32)
    assert not bare.is_trained()
