"""Layers for sequences of tokens that Keras does not have. Models with them load after `import models`."""

import tensorflow as tf

from fliqs_tf._keras import keras


@keras.saving.register_keras_serializable("fliqs_tf_models")
class Positions(keras.layers.Layer):
    """Adds a learned vector for every position: [batch, length, width] -> the same shape.

    Source: "learned positional embedding" of Vaswani et al., arXiv 1706.03762, section 3.5.
    """

    def build(self, input_shape):
        length, width = input_shape[1:]
        start = keras.initializers.TruncatedNormal(stddev=0.02)
        self.vectors = self.add_weight(name="vectors", shape=(length, width), initializer=start)
        super().build(input_shape)

    def call(self, inputs):
        return inputs + tf.cast(tf.convert_to_tensor(self.vectors), inputs.dtype)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)


@keras.saving.register_keras_serializable("fliqs_tf_models")
class ClassToken(keras.layers.Layer):
    """Puts a learned vector before the others: [batch, length, width] -> [batch, 1 + length, width].

    Source: Dosovitskiy et al., arXiv 2010.11929, section 3.1.
    """

    def build(self, input_shape):
        start = keras.initializers.TruncatedNormal(stddev=0.02)
        self.vector = self.add_weight(name="vector", shape=(1, 1, input_shape[-1]), initializer=start)
        super().build(input_shape)

    def call(self, inputs):
        vector = tf.cast(tf.convert_to_tensor(self.vector), inputs.dtype)
        vectors = tf.repeat(vector, tf.shape(inputs)[0], axis=0)
        return tf.concat([vectors, inputs], axis=1)

    def compute_output_shape(self, input_shape):
        batch, length, width = input_shape
        return (batch, None if length is None else length + 1, width)
