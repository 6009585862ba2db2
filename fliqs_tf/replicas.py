"""Replicas of a distribution strategy: what they tell each other during a step.

Inside `strategy.run` each replica computes on its share of the batch. What all of them must agree on goes through the
functions below, all of them sums over replicas, which every strategy knows how to make. With one replica they return
what they are given, and add nothing to the graph.
"""

from __future__ import annotations

from collections.abc import Callable

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


class Workers:
    """What the processes of a strategy tell each other between steps, on the host. All of them must ask together.

    Args:
      strategy: With one process there is nothing to tell, and nothing is sent.

    Attributes:
      several: Whether there is more than one.
      is_first: Whether this is the first one, or the only one: it writes what is written once.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self.several = (
            isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and strategy.num_replicas_in_sync > 1
        )
        self.is_first = not self.several or _is_first(strategy.cluster_resolver)
        self._first, self._average = _from_host(strategy, of_first), _from_host(strategy, mean)

    def first(self, array: np.ndarray) -> np.ndarray:
        """The first worker's array, to the bit, whatever its dtype; the others bring one of the same shape."""
        if not self.several:
            return array
        content = np.ascontiguousarray(array).tobytes()
        # Every device adds float32; halves of words are exact in it.
        halves = np.frombuffer(content + b"\0" * (len(content) % 2), np.uint16).astype(np.float32)
        received = self._first(tf.constant(halves)).astype(np.uint16).tobytes()[: len(content)]
        return np.frombuffer(received, array.dtype).reshape(array.shape).copy()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set on any worker."""
        if not self.several:
            return list(flags)
        return (self._average(tf.constant(flags, tf.float32)) > 0).tolist()


def _from_host(
    strategy: tf.distribute.Strategy, function: Callable[[tf.Tensor], tf.Tensor]
) -> Callable[[tf.Tensor], np.ndarray]:
    """A function of replicas as one that the host calls: float32 [n] -> float32 [n], the same on all replicas."""
    signature = [tf.TensorSpec([None], tf.float32)]
    run = tf.function(lambda x: strategy.run(function, (x,)), signature, autograph=False)
    return lambda x: strategy.experimental_local_results(run(x))[0].numpy()


def _is_first(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> bool:
    if not resolver.task_type:  # several devices, but one process
        return True
    has_chief = "chief" in resolver.cluster_spec().as_dict()
    return resolver.task_type == "chief" if has_chief else resolver.task_id == 0


def _reduce(operation: tf.distribute.ReduceOp, value: tf.Tensor) -> tf.Tensor:
    # An argument of a traced function is on no device yet; where the result goes is read from the value.
    return tf.distribute.get_replica_context().all_reduce(operation, tf.identity(value))
