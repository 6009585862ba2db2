"""Batch normalization while formats change.

The stored moving averages belong to the mixture of formats that training drew. To read the quality of one sample the
batch's own statistics are used and nothing is stored; before a recipe is used, the averages are estimated anew for it.
"""

from __future__ import annotations

import contextlib

import tensorflow as tf

from fliqs_tf import trace
from fliqs_tf._keras import keras


def batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The batch normalization layers of a model that follow the data; a frozen one is a constant scale and offset."""
    layers = [layer for _, layer in trace.walk(model) if isinstance(layer, keras.layers.BatchNormalization)]
    return [layer for layer in layers if layer.trainable]


@contextlib.contextmanager
def batch_statistics(model: keras.Model, store_rate: tf.Tensor | None = None):
    """Within it, batch normalization uses the statistics of the batch, whatever `training` says.

    Args:
      model: All its batch normalization layers are meant, but frozen ones, which use their averages in training too.
      store_rate: None: nothing is stored. A scalar r: moving averages move by r towards the batch's statistics;
        r = 1, 1/2, 1/3, ... over batches gives their plain mean.
    """
    layers = batch_norms(model)

    def normalizer(layer):
        return lambda x, training=None, mask=None: _normalize(layer, x, store_rate)

    with trace.overridden_calls({layer: normalizer(layer) for layer in layers}):
        yield


def _normalize(layer, x, store_rate):
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis
    axis %= x.shape.rank
    others = [a for a in range(x.shape.rank) if a != axis]
    mean, variance = tf.nn.moments(tf.cast(x, tf.float32), others)
    if store_rate is not None:
        for stored, batch in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            stored.assign(stored + store_rate * (tf.cast(batch, stored.dtype) - stored))
    shape = [1] * x.shape.rank
    shape[axis] = x.shape[axis]
    scale = tf.math.rsqrt(variance + layer.epsilon)
    if layer.gamma is not None:
        scale *= tf.cast(tf.convert_to_tensor(layer.gamma), tf.float32)
    offset = -mean * scale
    if layer.beta is not None:
        offset += tf.cast(tf.convert_to_tensor(layer.beta), tf.float32)
    return tf.cast(tf.cast(x, tf.float32) * tf.reshape(scale, shape) + tf.reshape(offset, shape), x.dtype)


def reestimate(model: keras.Model, batches) -> int:
    """Replaces the moving averages by the mean of the batches' statistics. Forward passes only.

    Args:
      model: Its formats must be set.
      batches: Iterable of model inputs.

    Returns:
      The number of batches used; 0 leaves the averages as they are.
    """
    if not batch_norms(model):
        return 0

    @tf.function(reduce_retracing=True)
    def step(x, rate):
        with batch_statistics(model, rate):
            model(x, training=False)

    count = 0
    for count, x in enumerate(batches, 1):
        step(x, tf.constant(1 / count, tf.float32))
    return count
