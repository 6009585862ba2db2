"""Batch statistics against Keras' own training=True, re-estimation against plain means."""

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf import normalization
from fliqs_tf._keras import keras
from fliqs_tf.normalization import batch_statistics, reestimate

L = keras.layers


def data(shape, seed=0, batch=8):
    return (3 + 2 * np.random.default_rng(seed).standard_normal((batch, *shape))).astype(np.float32)


def model_of(layer, *shape):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    rng = np.random.default_rng(1)
    model.set_weights([rng.uniform(0.5, 2, w.shape).astype(np.float32) for w in model.get_weights()])
    return model


LAYERS = {
    "4 axes": (lambda: L.BatchNormalization(), (5, 6, 3)),
    "2 axes": (lambda: L.BatchNormalization(), (4,)),
    "3 axes": (lambda: L.BatchNormalization(epsilon=0.1), (5, 4)),
    "first axis": (lambda: L.BatchNormalization(axis=1), (3, 5, 6)),
    "no scale": (lambda: L.BatchNormalization(scale=False), (5, 6, 3)),
    "no center": (lambda: L.BatchNormalization(center=False), (5, 6, 3)),
    "neither": (lambda: L.BatchNormalization(scale=False, center=False), (5, 6, 3)),
}


@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_the_output_is_that_of_training_and_nothing_is_stored(make, shape):
    model, x = model_of(make(), *shape), data(shape)
    before = model.get_weights()
    with batch_statistics(model):
        y = model(x, training=False)
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(y, model(x, training=True), rtol=1e-4, atol=1e-4)


def test_after_it_the_stored_averages_are_used_again():
    model, x = model_of(L.BatchNormalization(), 4), data((4,))
    before = model(x, training=False).numpy()
    with batch_statistics(model):
        assert not np.allclose(model(x, training=False), before)
    np.testing.assert_array_equal(model(x, training=False), before)


def test_also_after_an_error():
    model, x = model_of(L.BatchNormalization(), 4), data((4,))
    before = model(x, training=False).numpy()
    with pytest.raises(RuntimeError), batch_statistics(model):
        raise RuntimeError
    np.testing.assert_array_equal(model(x, training=False), before)


def test_gradients_pass_through_the_statistics():
    model, x = model_of(L.BatchNormalization(), 4), tf.constant(data((4,)))

    def gradient(training):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(model(x, training=training) ** 3)
        return tape.gradient(loss, x)

    with batch_statistics(model):
        ours = gradient(False)
    np.testing.assert_allclose(ours, gradient(True), rtol=1e-3, atol=1e-3)


def test_mixed_precision_computes_in_float32():
    policy = keras.mixed_precision.Policy("mixed_bfloat16")
    model, x = model_of(L.BatchNormalization(dtype=policy), 4), data((4,))
    with batch_statistics(model):
        y = model(x, training=False)
    assert y.dtype == tf.bfloat16
    low = tf.cast(tf.cast(x, tf.bfloat16), tf.float32).numpy()
    gamma, beta, _, _ = model.get_weights()
    by_hand = (low - low.mean(0)) / np.sqrt(low.var(0) + 1e-3) * gamma + beta
    np.testing.assert_allclose(tf.cast(y, tf.float32), by_hand, rtol=2**-7, atol=2**-7)


def nested():
    inner = keras.Sequential([keras.Input((4,)), L.BatchNormalization(name="inner_bn")], name="inner")
    inputs = keras.Input((4,))
    x = L.BatchNormalization(name="bn")(L.LayerNormalization()(inputs))
    return keras.Model(inputs, inner(x))


def test_nested_models_count():
    assert [layer.name for layer in normalization.batch_norms(nested())] == ["bn", "inner_bn"]


def test_reestimation_gives_plain_means():
    model = model_of(L.BatchNormalization(), 5, 6, 3)
    batches = [data((5, 6, 3), seed=i) + i for i in range(4)]
    assert reestimate(model, batches) == 4
    _, _, mean, variance = model.get_weights()
    np.testing.assert_allclose(mean, np.mean([b.mean((0, 1, 2)) for b in batches], axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance, np.mean([b.var((0, 1, 2)) for b in batches], axis=0), rtol=1e-4)


def test_reestimation_changes_nothing_else():
    model = model_of(L.BatchNormalization(), 4)
    gamma, beta, *_ = model.get_weights()
    reestimate(model, [data((4,))])
    np.testing.assert_array_equal(model.get_weights()[0], gamma)
    np.testing.assert_array_equal(model.get_weights()[1], beta)


def test_a_later_layer_sees_what_the_earlier_one_makes_of_the_batch():
    inputs = keras.Input((4,))
    x = L.BatchNormalization(center=False, scale=False, name="first")(inputs)
    model = keras.Model(inputs, L.BatchNormalization(name="second")(x))
    reestimate(model, [data((4,), seed=i) for i in range(3)])
    np.testing.assert_allclose(model.get_layer("second").moving_mean, np.zeros(4), atol=1e-5)
    np.testing.assert_allclose(model.get_layer("second").moving_variance, np.ones(4), rtol=1e-2)


def test_batches_of_different_sizes():
    model = model_of(L.BatchNormalization(), 4)
    batches = [data((4,), 0, batch=8), data((4,), 1, batch=3)]
    assert reestimate(model, batches) == 2
    np.testing.assert_allclose(model.get_weights()[2], np.mean([b.mean(0) for b in batches], axis=0), rtol=1e-5)


def test_a_dataset_will_do():
    model = model_of(L.BatchNormalization(), 4)
    x = data((4,))
    assert reestimate(model, tf.data.Dataset.from_tensor_slices(x).batch(4)) == 2
    np.testing.assert_allclose(model.get_weights()[2], x.mean(0), rtol=1e-5)


def test_no_batches_leave_the_averages():
    model = model_of(L.BatchNormalization(), 4)
    before = model.get_weights()
    assert reestimate(model, []) == 0
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)


def test_a_model_without_batch_normalization_runs_nothing():
    def never():
        raise AssertionError
        yield

    assert reestimate(model_of(L.Dense(2), 4), never()) == 0


def test_frozen_layers_keep_their_averages_and_use_them():
    """Keras runs a frozen batch normalization in inference mode in training too."""
    model, x = model_of(L.BatchNormalization(trainable=False), 4), data((4,))
    before = model.get_weights()
    in_training = model(x, training=True)
    with batch_statistics(model):
        np.testing.assert_allclose(model(x, training=False), in_training, rtol=1e-6)
    assert reestimate(model, [x]) == 0
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_averages_of_other_dtypes_are_estimated(dtype):
    layers = [keras.layers.Conv2D(2, 1, dtype=dtype), keras.layers.BatchNormalization(dtype=dtype)]
    model = keras.Sequential([keras.Input((4, 4, 3)), *layers])
    x = np.random.default_rng(0).standard_normal((8, 4, 4, 3)).astype(np.float32)
    expected = tf.reduce_mean(tf.cast(model.layers[0](x), tf.float32), [0, 1, 2])
    assert normalization.reestimate(model, [x, x]) == 2
    average = tf.cast(tf.convert_to_tensor(model.layers[1].moving_mean), tf.float32)
    np.testing.assert_allclose(average, expected, atol=1e-2)
