"""Replicas of a distribution strategy: what they tell each other during a step.

Inside `strategy.run` each replica computes on its share of the batch. What all of them must agree on goes through the
functions below, all of them sums over replicas, which every strategy knows how to make. With one replica they return
what they are given, and add nothing to the graph.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def count() -> int:
    """Replicas that work in step here: 1 outside of `strategy.run`, and without a strategy."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def index() -> tf.Tensor:
    """Which of them this is: an int32 scalar in [0, count())."""
    if count() == 1:
        return tf.constant(0)
    return tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32)


def mean(value: tf.Tensor) -> tf.Tensor:
    """Mean over replicas of a float tensor of one shape."""
    return value if count() == 1 else _reduce(tf.distribute.ReduceOp.MEAN, value)


def gathered(value: tf.Tensor) -> tf.Tensor:
    """Every replica's value of a float tensor of one shape, stacked: [count(), ...]."""
    if count() == 1:
        return value[None]
    own = tf.reshape(tf.range(count()) == index(), [-1] + [1] * value.shape.rank)
    # A sum in which all but one term are 0 is exact, also for infinities, which a product with 0 would spoil.
    return _reduce(tf.distribute.ReduceOp.SUM, tf.where(own, value[None], tf.zeros_like(value)[None]))


def maximum(value: tf.Tensor) -> tf.Tensor:
    """Largest value over replicas, elementwise: exactly the maximum of the whole batch."""
    return value if count() == 1 else tf.reduce_max(gathered(value), axis=0)


def of_first(value: tf.Tensor) -> tf.Tensor:
    """The first replica's value, to the bit, on all of them."""
    if count() == 1:
        return value
    return _reduce(tf.distribute.ReduceOp.SUM, tf.where(index() == 0, value, tf.zeros_like(value)))


def agreed(array: np.ndarray, strategy: tf.distribute.Strategy) -> np.ndarray:
    """The first worker's array on all workers of a strategy, which all must call it. On the host, between steps."""
    if strategy.num_replicas_in_sync == 1:
        return array
    # As float32, which every device has: exact for the indices and flags that this is for.
    run = tf.function(lambda x: strategy.run(of_first, (x,)), autograph=False)
    result = strategy.experimental_local_results(run(tf.constant(array, tf.float32)))[0]
    return result.numpy().astype(array.dtype)


def _reduce(operation, value):
    return tf.distribute.get_replica_context().all_reduce(operation, value)
