"""On which devices a program trains: flags to a distribution strategy, and which share of the data a worker reads."""

from __future__ import annotations

import dataclasses
import os
import sys

import tensorflow as tf
from absl import flags

from fliqs_tf._keras import IS_KERAS_3, NAME

FLAGS = flags.FLAGS
STRATEGIES = ("none", "mirrored", "multiworker", "tpu")


def define_flags() -> None:
    """Flags of the programs that train."""
    flags.DEFINE_enum(
        "strategy",
        "none",
        STRATEGIES,
        "none: one device. mirrored: the GPUs of this machine. multiworker: all machines of TF_CONFIG. tpu: --tpu.",
    )
    flags.DEFINE_string("tpu", "", "Name or grpc:// address of the TPU; empty: the one of this machine.")
    flags.DEFINE_integer(
        "devices", 0, "mirrored: so many logical devices on the CPU, for trials without a GPU.", lower_bound=0
    )
    flags.DEFINE_integer("steps_per_execution", 1, "Steps between returns to Python; a TPU wants 100.", lower_bound=1)
    flags.DEFINE_bool("sample_per_replica", False, "Each replica draws formats of its own.")


def strategy() -> tf.distribute.Strategy:
    """The strategy of the flags. Before anything else of TensorFlow: it sets devices up.

    Raises:
      SystemExit: Keras 3 with several machines or a TPU; no TF_CONFIG; no such TPU. The message says what to do.
    """
    kind = FLAGS.strategy
    tf.get_logger().setLevel("WARNING")  # or every kind of message between replicas is announced
    if kind in ("multiworker", "tpu") and IS_KERAS_3:
        sys.exit(
            f"--strategy={kind} does not work with {NAME}. Set TF_USE_LEGACY_KERAS=1 before the program starts: then "
            f"tf.keras is tf_keras (pip install tf-keras)."
        )
    if FLAGS.devices and kind != "mirrored":
        sys.exit("--devices is for --strategy=mirrored.")
    if kind == "mirrored":
        if not FLAGS.devices:
            return tf.distribute.MirroredStrategy()
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * FLAGS.devices)
        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(FLAGS.devices)])
    if kind == "multiworker":
        if "TF_CONFIG" not in os.environ:
            sys.exit(
                "--strategy=multiworker needs TF_CONFIG, different on each machine, such as "
                '\'{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}\'.'
            )
        try:
            # A worker that is gone stops the others by its heartbeats. No timeout_seconds besides: every collective
            # operation would leave a thread behind that sleeps for so long, 40 a step, until no more can be made.
            return tf.distribute.MultiWorkerMirroredStrategy()
        except (ValueError, KeyError, tf.errors.OpError) as error:
            sys.exit(f"The cluster of TF_CONFIG does not come together: {error}")
    if kind == "tpu":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=FLAGS.tpu)
            tf.config.experimental_connect_to_cluster(resolver)
            tf.tpu.experimental.initialize_tpu_system(resolver)
        except (ValueError, tf.errors.OpError) as error:
            sys.exit(f"--tpu={FLAGS.tpu!r} cannot be used: {error}\nGive its name or address, or --strategy=none.")
        return tf.distribute.TPUStrategy(resolver)
    return tf.distribute.get_strategy()


@dataclasses.dataclass(frozen=True)
class Share:
    """Which rows of every global batch a pipeline makes.

    Attributes:
      first: The first replica that it feeds.
      local: How many it feeds, one after the other.
      total: Replicas in all.
    """

    first: int = 0
    local: int = 1
    total: int = 1

    def rows(self, batch_size: int) -> int:
        """Examples of one replica."""
        return batch_size // self.total


WHOLE = Share()


def check_batch_size(strategy: tf.distribute.Strategy, batch_size: int) -> None:
    """Ends the program if replicas would get shares of different sizes."""
    replicas = strategy.num_replicas_in_sync
    if batch_size % replicas:
        sys.exit(f"--batch_size={batch_size} must be a multiple of the {replicas} replicas; it is the global one.")


def distributed(strategy: tf.distribute.Strategy, make):
    """The data set of a worker: `make(share)`, a `tf.data.Dataset` of batches of `share.rows(batch size)` examples.

    Each worker makes only what its own replicas need. Together they are the batches that one process would make.
    """
    if strategy.num_replicas_in_sync == 1:
        return make(WHOLE)

    def of_pipeline(context):
        local = context.num_replicas_in_sync // context.num_input_pipelines
        return make(Share(context.input_pipeline_id * local, local, context.num_replicas_in_sync))

    return strategy.distribute_datasets_from_function(of_pipeline)
