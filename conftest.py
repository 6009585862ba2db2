"""What all tests run under: two logical devices on the one CPU, for distribution strategies, and no autotuning of
tf.data, whose thread keeps an iterator from ending for as long as it lived. What is there for one Keras only."""

import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

_iterator = tf.data.Dataset.__iter__


def _iterator_that_ends(dataset):
    options = tf.data.Options()
    options.autotune.enabled = False
    return _iterator(dataset.with_options(options))


tf.data.Dataset.__iter__ = _iterator_that_ends

# Its import says that it needs tf_keras; pytest imports every module for its examples.
collect_ignore = ["fliqs_tf/tfmot.py"] if tf.keras.Model.__module__.startswith("keras.") else []
