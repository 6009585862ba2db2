"""Roundings of integer kernels that a float computation followed by a quantizer does not do, as Keras layers.

LiteRT's int4 convolutions turn an accumulator into an output code in two steps: to multiples of 2^-n of a code, then to
codes, halves up. n depends on the scales of the channel. Up to a few values in a hundred end one code off the nearest.
XNNPACK's int8 kernels round once; it has none for int4 convolutions, nor for int4 matrices with an odd number of rows.

A mean of 64 codes lies in the middle between two codes one time in 64. XNNPACK rounds sum * multiplier, in float32 and
halves to even; a mean in float32 ends a little beside the middle, on either side.
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
    """

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.unit = add_state(self, "unit", (channels,), "float32", initial=1)
        self.built = True

    def call(self, x):
        unit = tf.convert_to_tensor(self.unit)
        # A quarter of a unit breaks the tie and is too small to do anything else.
        return (tf.round(x / unit) + 0.25) * unit

    def compute_output_shape(self, shape):
        return shape

    def get_config(self) -> dict:
        return {**super().get_config(), "channels": self.channels}


@keras.saving.register_keras_serializable("fliqs_tf")
class MeanRounding(keras.layers.Layer):
    """Rounds means of codes as XNNPACK does.

    Args:
      unit: What one code more in the sum adds to the mean.
      multiplier: Sum of codes -> output code, a float32.
      scale: What an output code is worth.
    """

    def __init__(self, unit: float, multiplier: float, scale: float, **kwargs):
        super().__init__(**kwargs)
        self.unit, self.multiplier, self.scale = float(unit), float(multiplier), float(scale)
        self.built = True

    def call(self, x):
        return tf.round(tf.round(x / self.unit) * self.multiplier) * self.scale

    def compute_output_shape(self, shape):
        return shape

    def get_config(self) -> dict:
        return {**super().get_config(), "unit": self.unit, "multiplier": self.multiplier, "scale": self.scale}


ROUNDINGS = (KernelRounding, MeanRounding)


def units(multipliers: np.ndarray, scale: float) -> np.ndarray:
    """The unit of each channel.

    Args:
      multipliers: input scale * weight scale / output scale of each channel.
      scale: Output scale.

    Returns:
      float32 array: scale * 2^-n, where 2^-n is the power of two at or above the multiplier, at most 1.
    """
    _, exponents = np.frexp(multipliers)
    return (scale * np.exp2(np.minimum(exponents, 0))).astype(np.float32)
