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
def batch_statistics(model: keras.Model, found: dict | None = None):
    """Within it, batch normalization uses the statistics of the batch, whatever `training` says, and stores nothing.

    Args:
      model: All its batch normalization layers are meant, but frozen ones, which use their averages in training too.
      found: Gets layer -> [(mean, variance) of each call].
    """
    layers = batch_norms(model)

    def normalizer(layer):
        return lambda x, training=None, mask=None: _normalize(layer, x, found)

    with trace.overridden_calls({layer: normalizer(layer) for layer in layers}):
        yield


def _normalize(layer, x, found):
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis
    axis %= x.shape.rank
    channels = x.shape[axis]
    gamma = tf.ones(channels) if layer.gamma is None else tf.cast(tf.convert_to_tensor(layer.gamma), tf.float32)
    beta = tf.zeros(channels) if layer.beta is None else tf.cast(tf.convert_to_tensor(layer.beta), tf.float32)
    if x.shape.rank == 4 and axis == 3 and x.dtype != tf.float64:
        # One fused operation, as in training; the same from parts takes a forward pass twice as long.
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, epsilon=layer.epsilon)
        # It gives the unbiased estimate of the variance, but normalizes with the biased one.
        count = tf.cast(tf.size(x) // channels, tf.float32)
        variance *= (count - 1) / count
    else:
        mean, variance = tf.nn.moments(tf.cast(x, tf.float32), [a for a in range(x.shape.rank) if a != axis])
        shape = [channels if a == axis else 1 for a in range(x.shape.rank)]
        scale = gamma * tf.math.rsqrt(variance + layer.epsilon)
        y = tf.cast(x, tf.float32) * tf.reshape(scale, shape) + tf.reshape(beta - mean * scale, shape)
    if found is not None:
        found.setdefault(layer, []).append((mean, variance))
    return tf.cast(y, x.dtype)


def reestimate(model: keras.Model, batches, *, shared: bool = False) -> int:
    """Replaces the moving averages by the mean of the batches' statistics. Forward passes only.

    Under a distribution strategy every replica takes its share of each batch, as if it were a batch of its own. All
    workers must call it together, with as many batches.

    Args:
      model: Its formats must be set.
      batches: Iterable of model inputs.
      shared: The batches are already what the replicas of this process share.

    Returns:
      The number of batches used; 0 leaves the averages as they are.
    """
    layers, strategy = batch_norms(model), model.distribute_strategy
    if not layers:
        return 0

    def statistics(x):
        found = {}
        with batch_statistics(model, found):
            model(x, training=False)
        # Of a layer that is called several times, the mean over its calls.
        return [[tf.reduce_mean(tf.stack(kind), axis=0) for kind in zip(*found[layer])] for layer in layers]

    @tf.function(reduce_retracing=True)
    def step(x, rate):
        for layer, values in zip(layers, strategy.run(statistics, (x,))):
            for stored, value in zip((layer.moving_mean, layer.moving_variance), values):
                value = strategy.reduce("MEAN", value, axis=None)
                before = tf.cast(tf.convert_to_tensor(stored), tf.float32)
                stored.assign(tf.cast(before + rate * (tf.cast(value, tf.float32) - before), stored.dtype))

    replicas, count = strategy.num_replicas_in_sync, 0
    for x in batches:
        if replicas > 1 and not shared:
            if tf.nest.flatten(x)[0].shape[0] < replicas:
                continue
            x = strategy.experimental_distribute_values_from_function(_share_of(x, replicas))
        count += 1
        step(x, tf.constant(1 / count, tf.float32))
    return count


def _share_of(x, replicas: int):
    return lambda context: tf.nest.map_structure(
        lambda t: tf.convert_to_tensor(t)[context.replica_id_in_sync_group :: replicas], x
    )
