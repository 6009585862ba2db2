"""Quality of a batch, by hand."""

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.search.quality import accuracy, quality_function

SCORES = tf.constant([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
CLASSES = np.array([1, 0, 1, 0])  # three of four are right


@pytest.mark.parametrize(
    "y_true, y_pred, share",
    [
        (CLASSES, SCORES, 0.75),
        (CLASSES[:, None], SCORES, 0.75),
        (CLASSES.astype(np.float32), SCORES, 0.75),
        (np.eye(3, dtype=np.float32)[CLASSES], SCORES, 0.75),
        (CLASSES, tf.math.log(SCORES + 1e-9), 0.75),
        (CLASSES.reshape(2, 2), tf.reshape(SCORES, (2, 2, 3)), 0.75),
        (np.array([1, 0, 0, 1]), tf.constant([[0.9], [0.2], [0.7], [0.6]]), 0.75),
        (np.array([[1], [0], [0], [1]]), tf.constant([[0.9], [0.2], [0.7], [0.6]]), 0.75),
        (CLASSES, tf.cast(SCORES, tf.bfloat16), 0.75),
    ],
)
def test_accuracy(y_true, y_pred, share):
    value = accuracy(tf.constant(y_true), y_pred)
    assert value.dtype == tf.float32
    assert float(value) == share
    assert float(quality_function("accuracy")(tf.constant(9.0), tf.constant(y_true), y_pred)) == share


def test_minus_loss():
    quality = quality_function("loss")
    assert float(quality(tf.constant(2.5), None, None)) == -2.5
    assert quality(tf.constant(2.5, tf.bfloat16), None, None).dtype == tf.float32


def test_a_keras_metric_is_that_of_the_batch_alone():
    quality = quality_function(keras.metrics.SparseTopKCategoricalAccuracy(k=2))
    # class 1 of the third example is second; the fourth class is the least likely
    y = tf.constant([1, 0, 1, 2])
    for _ in range(2):
        assert float(quality(tf.constant(0.0), y, SCORES)) == 0.75
    assert float(quality(tf.constant(0.0), y[3:], SCORES[3:])) == 0


def test_a_keras_metric_in_a_graph():
    quality = tf.function(quality_function(keras.metrics.SparseCategoricalAccuracy()))
    for _ in range(2):
        assert float(quality(tf.constant(0.0), tf.constant(CLASSES), SCORES)) == 0.75


@pytest.mark.parametrize(
    "function",
    [
        lambda y, y_pred: tf.constant(3.5),
        lambda y, y_pred: tf.constant([3.0, 4.0]),
        lambda y, y_pred: tf.constant([3, 4, 3, 4]) + tf.constant(0),
        lambda y, y_pred: 3.5,
    ],
)
def test_a_function_gives_a_number_or_one_per_example(function):
    value = quality_function(function)(tf.constant(0.0), tf.constant(CLASSES), SCORES)
    assert value.dtype == tf.float32
    assert float(value) == 3.5


def test_a_function_gets_labels_and_predictions():
    quality = quality_function(lambda y, y_pred: -tf.abs(tf.cast(y, tf.float32) - y_pred))
    assert float(quality(tf.constant(0.0), tf.constant([1, 2]), tf.constant([1.5, 1.0]))) == -0.75


@pytest.mark.parametrize("quality", ["f1", None, 3, ["accuracy"]])
def test_what_is_not_a_quality(quality):
    with pytest.raises(ValueError, match="quality must be 'loss', 'accuracy', a Keras metric or a function"):
        quality_function(quality)
