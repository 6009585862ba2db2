"""TFLite files against the Keras models that they are made from."""

import numpy as np
import tensorflow as tf

import fliqs_tf
from fliqs_tf import carriers, export_graph
from fliqs_tf._keras import keras

L = keras.layers


def examples(n, *shape, seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def test_int8_chain_end_to_end(tmp_path):
    keras.utils.set_random_seed(1)
    image = L.Input((8, 8, 3), name="image")
    x = L.Conv2D(8, 3, padding="same", use_bias=False, name="conv1")(image)
    x = L.ReLU(name="relu")(L.BatchNormalization(name="norm")(x))
    x = L.Conv2D(8, 3, strides=2, activation="relu", name="conv2")(x)
    network = keras.Model(image, L.Dense(5, name="logits")(L.Flatten(name="flat")(x)))
    final = fliqs_tf.apply(network, "INT8")
    data = examples(64, 8, 8, 3)
    final(data, training=True)  # ranges
    exported = fliqs_tf.export.tflite(final, tmp_path / "chain.tflite", representative=[data])
    for agreement in fliqs_tf.export.check(exported, tmp_path / "chain.tflite", data):
        # The built-in kernels round twice; see docs/deploy.md.
        assert agreement.largest <= (1 if agreement.kernels == "XNNPACK" else 2) and agreement.equal > 0.9, agreement
    assert not list(tmp_path.glob(".*"))


def test_folding_batch_normalization_keeps_codes():
    # Gains of both signs and one of zero: only scales and signs of codes may change.
    image = L.Input((6, 6, 2))
    network = keras.Model(image, L.BatchNormalization(name="norm")(L.Conv2D(3, 3, name="conv")(image)))
    gamma = np.array([0.5, -2.0, 0.0], np.float32)
    network.get_layer("norm").set_weights(
        [gamma, *(np.array(v, np.float32) for v in ([1, 2, 3], [0.1, 0.2, 0.3], [4, 0.25, 1]))]
    )
    final = fliqs_tf.apply(network, "INT4")
    final(examples(4, 6, 6, 2), training=True)
    (before,) = [s for s in export_graph.steps(final).steps if s.kind == "linear"]
    weight = np.asarray(network.get_layer("conv").kernel)
    codes = np.rint(weight / (np.abs(weight).max(axis=(0, 1, 2)) / 7)).astype(int)
    np.testing.assert_array_equal(before.linear.codes, codes * np.array([1, -1, 0]))
    norm = final.get_layer("norm")
    gain = gamma / np.sqrt(np.asarray(norm.moving_variance, np.float64) + norm.epsilon)
    np.testing.assert_allclose(before.linear.values, (codes * np.abs(weight).max(axis=(0, 1, 2)) / 7) * gain, rtol=1e-6)
    # And the folded kernel computes what the two layers do.
    x = examples(2, 6, 6, 2, seed=1)
    quantized = final.get_layer("conv").activation_quantizer(tf.constant(x)).numpy()
    folded = tf.nn.conv2d(quantized.astype(np.float64), before.linear.values, 1, "VALID") + before.linear.bias
    np.testing.assert_allclose(folded, final(x), atol=1e-5)


def test_places_of_carriers_in_a_residual_block():
    image = L.Input((6, 6, 4))
    x = L.ReLU(name="relu1")(L.Conv2D(4, 3, padding="same", name="conv1")(image))
    y = L.BatchNormalization(name="norm")(L.Conv2D(4, 3, padding="same", name="conv2")(x))
    y = L.ReLU(name="relu2")(L.Add(name="add")([x, y]))
    y = L.Dense(2, name="logits")(L.GlobalAveragePooling2D(name="pool")(y))
    final = fliqs_tf.apply(keras.Model(image, y), "INT8")
    # relu1 has two readers, norm and relu2 an operation, logits the caller; add goes into relu2, pool into logits.
    assert carriers.places(final) == ["relu1", "norm", "relu2", "logits"]
