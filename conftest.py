"""Two logical devices on the one CPU, for the tests of distribution strategies; what is there for one Keras only."""

import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
# Its import says that it needs tf_keras; pytest imports every module for its examples.
collect_ignore = ["fliqs_tf/tfmot.py"] if tf.keras.Model.__module__.startswith("keras.") else []
