"""Quality of a batch: the number that the search maximizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from fliqs_tf._keras import keras


def quality_function(
    quality: str | keras.metrics.Metric | Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    output_names: Sequence[str] = ("output",),
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
    """(loss, y_true, y_pred) -> scalar, larger is better. Under a distribution strategy: of a replica's share.

    Args:
      quality: "loss" (its negative), "accuracy", a Keras metric, or a function (y_true, y_pred) -> number or one
        number per example. A metric is copied, so that it may be one of the model's metrics too.
      output_names: Of the model. With several outputs a function gets labels and predictions as the loss does.

    Raises:
      ValueError: None of these, or one that reads a single output of a model with several.
    """
    if quality == "loss":
        return lambda loss, y, y_pred: -tf.cast(loss, tf.float32)
    if len(output_names) > 1 and (isinstance(quality, keras.metrics.Metric) or quality == "accuracy"):
        raise ValueError(
            f"quality={getattr(quality, 'name', quality)!r} reads one output, but the model has "
            f"{len(output_names)}: {', '.join(output_names)}. Use quality='loss', or a function (y_true, y_pred) -> "
            f"number, which gets all of them."
        )
    if quality == "accuracy":
        return lambda loss, y, y_pred: accuracy(y, y_pred)
    if isinstance(quality, keras.metrics.Metric):
        own = type(quality).from_config(quality.get_config())
        return lambda loss, y, y_pred: _fresh_result(own, y, y_pred)
    if callable(quality):
        return lambda loss, y, y_pred: tf.reduce_mean(tf.cast(quality(y, y_pred), tf.float32))
    raise ValueError(
        f"quality must be 'loss', 'accuracy', a Keras metric or a function (y_true, y_pred) -> number, got {quality!r}."
    )


def accuracy(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """Share of right classes in a batch, float32 scalar.

    Args:
      y_true: Class indices [batch] or [batch, 1], or one-hot like y_pred; for one output 0 or 1.
      y_pred: Scores [batch, classes] (probabilities or logits), or one probability [batch, 1].
    """
    y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
    if y_pred.shape[-1] == 1:
        right = keras.metrics.binary_accuracy(tf.cast(tf.reshape(y_true, tf.shape(y_pred)), y_pred.dtype), y_pred)
    elif y_true.shape.rank == y_pred.shape.rank and y_true.shape[-1] == y_pred.shape[-1]:
        right = keras.metrics.categorical_accuracy(y_true, y_pred)
    else:
        right = keras.metrics.sparse_categorical_accuracy(y_true, y_pred)
    return tf.reduce_mean(tf.cast(right, tf.float32))


def _fresh_result(metric: keras.metrics.Metric, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    for variable in metric.variables:
        variable.assign(tf.zeros_like(variable))
    metric.update_state(y_true, y_pred)
    return tf.cast(metric.result(), tf.float32)
