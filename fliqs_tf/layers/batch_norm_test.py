"""Batch statistics against Keras' own training=True, re-estimation against plain means and variances."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import batch_norm
from fliqs_tf.layers.batch_norm import batch_statistics, recalibrate

L = keras.layers
only_tf_keras = pytest.mark.skipif(IS_KERAS_3, reason="of tf_keras")


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
    with batch_statistics(ModelGraph(model)):
        y = model(x, training=True)
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(y, model(x, training=True), rtol=1e-4, atol=1e-4)


def test_after_it_the_stored_averages_are_used_again():
    model, x = model_of(L.BatchNormalization(), 4), data((4,))
    before = model(x, training=False).numpy()
    with batch_statistics(ModelGraph(model)):
        assert not np.allclose(model(x, training=True), before)
    np.testing.assert_array_equal(model(x, training=False), before)


def test_also_after_an_error():
    model, x = model_of(L.BatchNormalization(), 4), data((4,))
    before = model(x, training=False).numpy()
    with pytest.raises(RuntimeError), batch_statistics(ModelGraph(model)):
        raise RuntimeError
    np.testing.assert_array_equal(model(x, training=False), before)


def test_gradients_pass_through_the_statistics():
    model, x = model_of(L.BatchNormalization(), 4), tf.constant(data((4,)))

    def gradient(training):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(model(x, training=training) ** 3)
        return tape.gradient(loss, x)

    with batch_statistics(ModelGraph(model)):
        ours = gradient(True)
    np.testing.assert_allclose(ours, gradient(True), rtol=1e-3, atol=1e-3)


def test_mixed_precision_computes_in_float32():
    policy = keras.mixed_precision.Policy("mixed_bfloat16")
    model, x = model_of(L.BatchNormalization(dtype=policy), 4), data((4,))
    with batch_statistics(ModelGraph(model)):
        y = model(x, training=True)
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
    assert [layer.name for layer in batch_norm.batch_norms(ModelGraph(nested()))] == ["bn", "inner_bn"]


@pytest.mark.parametrize("sizes", [(8, 8, 8), (20, 4), (23, 1), (1, 1, 22)], ids=str)
@pytest.mark.parametrize("shape", [(4,), (3, 2, 4)], ids=["dense", "images"])
def test_reestimation_gives_mean_and_variance_of_all_examples_however_they_are_cut(sizes, shape):
    x = data(shape, batch=24) + np.arange(24, dtype=np.float32).reshape(24, *[1] * len(shape))
    batches = np.split(x, np.cumsum(sizes)[:-1])
    model = model_of(L.BatchNormalization(), *shape)
    assert recalibrate(ModelGraph(model), batches) == len(sizes)
    _, _, mean, variance = model.get_weights()
    axes = tuple(range(len(shape)))
    np.testing.assert_allclose(mean, x.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(variance, x.var(axes), rtol=1e-4)


def test_a_last_batch_of_one_example_by_hand():
    """Of -1, 1 and then 3: mean 1, variance (4 + 0 + 4) / 3. The mean of the batches' variances would be 0.5."""
    model = model_of(L.BatchNormalization(), 1)
    recalibrate(ModelGraph(model), [np.array([[-1.0], [1.0]], np.float32), np.array([[3.0]], np.float32)])
    assert [float(v[0]) for v in model.get_weights()[2:]] == pytest.approx([1, 8 / 3])


def test_a_layer_that_is_called_twice_counts_every_value():
    layer, first, second = L.BatchNormalization(), keras.Input((1,)), keras.Input((3, 1))
    model = keras.Model([first, second], [layer(L.Reshape((1, 1))(first)), layer(second)])
    recalibrate(
        ModelGraph(model), [[np.array([[1.0], [2.0]], np.float32), np.arange(6, dtype=np.float32).reshape(2, 3, 1)]]
    )
    values = [1, 2, 0, 1, 2, 3, 4, 5]
    assert [float(v[0]) for v in model.get_weights()[2:]] == pytest.approx([np.mean(values), np.var(values)], rel=1e-5)


def test_averages_that_are_not_finite_are_mended():
    model = model_of(L.BatchNormalization(), 4)
    model.set_weights([*model.get_weights()[:2], np.full(4, np.nan, np.float32), np.full(4, np.inf, np.float32)])
    x = data((4,))
    recalibrate(ModelGraph(model), [x])
    np.testing.assert_allclose(model.get_weights()[2:], [x.mean(0), x.var(0)], rtol=1e-5)


def test_reestimation_changes_nothing_else():
    model = model_of(L.BatchNormalization(), 4)
    gamma, beta, *_ = model.get_weights()
    recalibrate(ModelGraph(model), [data((4,))])
    np.testing.assert_array_equal(model.get_weights()[0], gamma)
    np.testing.assert_array_equal(model.get_weights()[1], beta)


def test_a_later_layer_sees_what_the_earlier_one_makes_of_the_batch():
    inputs = keras.Input((4,))
    x = L.BatchNormalization(center=False, scale=False, name="first")(inputs)
    model = keras.Model(inputs, L.BatchNormalization(name="second")(x))
    recalibrate(ModelGraph(model), [data((4,), seed=i) for i in range(3)])
    np.testing.assert_allclose(model.get_layer("second").moving_mean, np.zeros(4), atol=1e-5)
    np.testing.assert_allclose(model.get_layer("second").moving_variance, np.ones(4), rtol=1e-2)


def test_a_dataset_will_do():
    model = model_of(L.BatchNormalization(), 4)
    x = data((4,))
    assert recalibrate(ModelGraph(model), tf.data.Dataset.from_tensor_slices(x).batch(4)) == 2
    np.testing.assert_allclose(model.get_weights()[2], x.mean(0), rtol=1e-5)


def test_no_batches_leave_the_averages():
    model = model_of(L.BatchNormalization(), 4)
    before = model.get_weights()
    assert recalibrate(ModelGraph(model), []) == 0
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)


def test_a_model_without_batch_normalization_runs_nothing():
    def never():
        raise AssertionError
        yield

    assert recalibrate(ModelGraph(model_of(L.Dense(2), 4)), never()) == 0


def test_frozen_layers_keep_their_averages_and_use_them():
    """Keras runs a frozen batch normalization in inference mode in training too."""
    model, x = model_of(L.BatchNormalization(trainable=False), 4), data((4,))
    before = model.get_weights()
    in_training = model(x, training=True)
    with batch_statistics(ModelGraph(model)):
        np.testing.assert_allclose(model(x, training=True), in_training, rtol=1e-6)
    assert recalibrate(ModelGraph(model), [x]) == 0
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_averages_of_other_dtypes_are_estimated(dtype):
    layers = [keras.layers.Conv2D(2, 1, dtype=dtype), keras.layers.BatchNormalization(dtype=dtype)]
    model = keras.Sequential([keras.Input((4, 4, 3)), *layers])
    x = np.random.default_rng(0).standard_normal((8, 4, 4, 3)).astype(np.float32)
    expected = tf.reduce_mean(tf.cast(model.layers[0](x), tf.float32), [0, 1, 2])
    assert batch_norm.recalibrate(ModelGraph(model), [x, x]) == 2
    average = tf.cast(tf.convert_to_tensor(model.layers[1].moving_mean), tf.float32)
    np.testing.assert_allclose(average, expected, atol=1e-2)


# ---- what Keras itself does in training


def of_keras(model, x):
    """(output, moving statistics) of a training call of a copy in which one call replaces the averages."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for layer in batch_norm.batch_norms(ModelGraph(copy)):
        layer.momentum = 0.0
    y = copy(x, training=True)
    return y, [
        [np.array(v) for v in (n.moving_mean, n.moving_variance)] for n in batch_norm.batch_norms(ModelGraph(copy))
    ]


def check_as_keras(model, x, rtol=1e-4):
    """Readings give Keras' output in training and store nothing, estimation its statistics."""
    before = [np.array(w) for w in model.get_weights()]
    y, expected = of_keras(model, x)
    with batch_statistics(ModelGraph(model)):
        np.testing.assert_allclose(model(x, training=True), y, rtol=rtol, atol=1e-4)
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)
    recalibrate(ModelGraph(model), [x])
    for layer, (mean, variance) in zip(batch_norm.batch_norms(ModelGraph(model)), expected):
        np.testing.assert_allclose(layer.moving_mean, mean, rtol=rtol, atol=1e-5)
        np.testing.assert_allclose(layer.moving_variance, variance, rtol=rtol, atol=1e-5)


TOKENS = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0], [6, 1, 2, 3, 0], [0, 0, 0, 0, 0]])


def masked(**options):
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            L.Embedding(7, 4, mask_zero=True, embeddings_initializer=keras.initializers.RandomUniform(-3, 9, seed=1)),
            L.Dense(3, kernel_initializer=keras.initializers.RandomUniform(seed=2)),
            L.BatchNormalization(**options),
        ]
    )


def test_masked_positions_do_not_count():
    check_as_keras(masked(), TOKENS)
    model = masked()
    batches = [TOKENS[:1], TOKENS[1:3], TOKENS[3:]]  # the last one has nothing but masked positions
    recalibrate(ModelGraph(model), batches)
    values = model.layers[1](model.layers[0](TOKENS)).numpy()[TOKENS > 0]
    norm = model.layers[2]
    np.testing.assert_allclose(norm.moving_mean, values.mean(0), rtol=1e-3)
    np.testing.assert_allclose(norm.moving_variance, values.var(0), rtol=1e-3)


@pytest.mark.parametrize(
    "options", [{"renorm": True}, {"synchronized": True}, {"scale": False, "center": False}], ids=str
)
def test_masks_and_other_options(options):
    if "renorm" in options:  # training would normalize with moving averages of other formats; a reading does not
        model = masked(**options)
        with batch_statistics(ModelGraph(model)):
            y = model(TOKENS, training=True).numpy()[TOKENS > 0]
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-3)
    else:
        check_as_keras(masked(**options), TOKENS)


def test_renorm_keeps_what_it_makes_the_variance_from():
    model, x = keras.Sequential([keras.Input((4,)), L.BatchNormalization(renorm=True)]), data((4,), batch=64)
    recalibrate(ModelGraph(model), [x])
    layer = model.layers[0]
    np.testing.assert_allclose(layer.moving_variance, x.var(0), rtol=1e-4)
    np.testing.assert_allclose(layer.moving_stddev, np.sqrt(x.var(0) + 1e-3), rtol=1e-4)
    model(x, training=True)  # an average with the same again
    np.testing.assert_allclose(layer.moving_variance, x.var(0), rtol=1e-3)


def test_mixed_float16():
    policy = keras.mixed_precision.Policy("mixed_float16")
    for shape in ((4,), (5, 6, 3)):
        check_as_keras(model_of(L.BatchNormalization(dtype=policy), *shape), data(shape), rtol=5e-3)


@only_tf_keras
def test_statistics_over_several_axes():
    check_as_keras(keras.Sequential([keras.Input((6, 4)), L.BatchNormalization(axis=[1, 2])]), data((6, 4)))


@only_tf_keras
def test_the_synchronized_class_of_tf_keras_is_one_too():
    model, x = keras.Sequential([keras.Input((4,)), L.experimental.SyncBatchNormalization()]), data((4,))
    recalibrate(ModelGraph(model), [x])
    np.testing.assert_allclose(model.get_weights()[2:], [x.mean(0), x.var(0)], rtol=1e-4)


class Shifted(L.BatchNormalization):
    """One of the user's own."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs + 1, training=training, mask=mask)


def test_a_subclass_computes_as_it_does():
    model, x = model_of(Shifted(), 3, 3, 4), data((3, 3, 4))
    recalibrate(ModelGraph(model), [x])
    np.testing.assert_allclose(model.get_weights()[2], x.mean((0, 1, 2)) + 1, rtol=1e-4)


def calls_for_inference(**options):
    """A network whose batch normalization is called with training=False, behind one that is not."""
    inputs = keras.Input((4,))
    base = keras.Sequential([keras.Input((4,)), L.BatchNormalization(**options, name="in_base")], name="base")

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.base = L.BatchNormalization(name="norm"), base

        def call(self, x, training=None):
            return self.base(self.norm(x, training=training), training=False)

    model = Model()
    model(tf.zeros((1, 4)))
    return model, keras.Model(inputs, base(inputs, training=False))


def test_a_layer_that_is_called_for_inference_keeps_its_averages():
    model, _ = calls_for_inference(moving_mean_initializer="ones")
    x = data((4,))
    check_as_keras_trains(model, x)
    assert recalibrate(ModelGraph(model), [x]) == 1
    np.testing.assert_allclose(model.norm.moving_mean, x.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(model.base.layers[-1].moving_mean, np.ones(4))


def check_as_keras_trains(model, x):
    before = [np.array(w) for w in model.get_weights()]
    expected = model(x, training=True)
    model.set_weights(before)
    with batch_statistics(ModelGraph(model)):
        np.testing.assert_allclose(model(x, training=True), expected, rtol=1e-4, atol=1e-4)


def test_in_a_network_as_the_running_keras_trains_it():
    """Keras 3 overrules the training=False of a nested network, tf_keras does not."""
    _, model = calls_for_inference()
    x, before = data((4,)), np.zeros(4)
    moves = keras.models.clone_model(model)
    moves(x, training=True)
    moves = not np.array_equal(moves.get_layer("base").layers[-1].moving_mean, before)
    check_as_keras_trains(model, x)
    recalibrate(ModelGraph(model), [x])
    expected = x.mean(0) if moves else before
    np.testing.assert_allclose(model.get_layer("base").layers[-1].moving_mean, expected, rtol=1e-5)


def test_the_rest_computes_as_at_inference():
    inputs = keras.Input((4,))
    x = L.BatchNormalization()(L.Dropout(0.5)(inputs))
    held = keras.Sequential([keras.Input((4,)), L.GaussianNoise(0.9), L.Dropout(0.5)], name="held")
    model = keras.Model(inputs, held(x))
    batch = data((4,), batch=64)
    with batch_statistics(ModelGraph(model)):
        y = model(batch, training=True)
    np.testing.assert_allclose(y, (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-3), rtol=1e-3, atol=1e-3)
    assert "call" not in vars(held.layers[-1])


@only_tf_keras
def test_what_no_copy_has_is_refused():
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.BatchNormalization(name="ghost", virtual_batch_size=2)])
    for make in (lambda: fliqs_tf.wrap(model, "FLIQS-S-INT"), lambda: fliqs_tf.apply(model, "INT8")):
        with pytest.raises(ValueError, match="Layer 'ghost' has virtual_batch_size=2.* Make the layer without"):
            make()
    adjusted = L.BatchNormalization(name="adjusted", adjustment=lambda shape: (1.0, 0.0))
    with pytest.raises(ValueError, match="Layer 'adjusted' has adjustment="):
        fliqs_tf.wrap(keras.Sequential([keras.Input((4,)), L.Dense(3), adjusted]), "FLIQS-S-INT")


def test_masks_reach_it_behind_quantized_layers():
    check_as_keras(fliqs_tf.apply(masked(), "FP32"), TOKENS)


def test_what_cannot_be_reached_is_named(caplog):
    inputs = keras.Input((3, 4))
    x = L.TimeDistributed(L.BatchNormalization(), name="per_step")(L.Dense(4, name="dense")(inputs))
    model = keras.Model(inputs, L.BatchNormalization()(x))
    qmodel = fliqs_tf.wrap(model, "FLIQS-S-INT")
    assert [r.getMessage()[:53] for r in caplog.records] == ["The batch normalization inside 'per_step' (TimeDistri"]
    inner = qmodel.network.get_layer("per_step").layer
    assert recalibrate(ModelGraph(qmodel.network), [data((3, 4))]) == 1
    np.testing.assert_array_equal(inner.moving_mean, np.zeros(4))
