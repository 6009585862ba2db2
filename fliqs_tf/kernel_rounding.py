"""Roundings of integer kernels, as Keras layers behind the layers that they belong to.

XNNPACK's int8 kernels sum codes in int32 and round accumulator * multiplier, a product in float32, halves to even. A
layer in float32 ends up to 1e-6 beside that, on either side: the nearer to the middle between two codes, the more often
it rounds otherwise, and the mean of 64 codes lies in the middle one time in 64.

LiteRT's int4 convolutions turn an accumulator into an output code in two steps: to multiples of 2^-n of a code, then to
codes, halves up. n depends on the scales of the channel. Up to a few values in a hundred end one code off the nearest.
XNNPACK has none for int4 convolutions, nor for int4 matrices with an odd number of rows.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import add_state, keras


@keras.saving.register_keras_serializable("fliqs_tf")
class KernelRounding(keras.layers.Layer):
    """Rounds to multiples of a unit per channel and leaves halves of an output code for the quantizer to round up.

    Args:
      channels: Number of channels, the last axis.

    Attributes:
      unit: [channels]; what one more in the accumulator is worth.
      grain: [channels]; what the first step rounds to multiples of.
    """

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.unit = add_state(self, "unit", (channels,), "float32", initial=1)
        self.grain = add_state(self, "grain", (channels,), "float32", initial=1)
        self.built = True

    def call(self, x):
        unit, grain = tf.convert_to_tensor(self.unit), tf.convert_to_tensor(self.grain)
        # A quarter of a grain breaks the tie and is too small to do anything else.
        return (tf.round(tf.round(x / unit) * (unit / grain)) + 0.25) * grain

    def compute_output_shape(self, shape):
        return shape

    def get_config(self) -> dict:
        return {**super().get_config(), "channels": self.channels}


@keras.saving.register_keras_serializable("fliqs_tf")
class AccumulatorRounding(keras.layers.Layer):
    """Finds the accumulator behind a value and rounds as XNNPACK does: accumulator * multiplier, halves to even.

    Args:
      channels: Number of channels, the last axis; 1 if all are alike.

    Attributes:
      unit: [channels]; what one more in the accumulator is worth.
      multiplier: [channels]; accumulator -> output code.
      scale: What an output code is worth.
    """

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.unit = add_state(self, "unit", (channels,), "float32", initial=1)
        self.multiplier = add_state(self, "multiplier", (channels,), "float32", initial=1)
        self.scale = add_state(self, "scale", (), "float32", initial=1)
        self.built = True

    def call(self, x):
        unit, multiplier, scale = (tf.convert_to_tensor(v) for v in (self.unit, self.multiplier, self.scale))
        return tf.round(tf.round(x / unit) * multiplier) * scale

    def compute_output_shape(self, shape):
        return shape

    def get_config(self) -> dict:
        return {**super().get_config(), "channels": self.channels}


ROUNDINGS = (KernelRounding, AccumulatorRounding)


def grains(multipliers: np.ndarray, scale: float) -> np.ndarray:
    """The grain of each channel.

    Args:
      multipliers: input scale * weight scale / output scale of each channel.
      scale: Output scale.

    Returns:
      float32 array: scale * 2^-n, where 2^-n is the power of two at or above the multiplier, at most 1.
    """
    _, exponents = np.frexp(multipliers)
    return (scale * np.exp2(np.minimum(exponents, 0))).astype(np.float32)
