"""What the codes of int8 tensors mean, from those that a kernel writes to those that its readers take.

* INT8: value = scale * code, scale = amax / 127.
* INT2 .. INT7 with largest code m: the kernel before writes value = scale * (code - z), scale = amax / m, with the zero
  point z for which int8 ends where the format ends: z = 127 - m cuts off above m; where values can be negative, a
  second tensor with z = m - 128 cuts off below -m. Then the codes are spread by k = 127 // m (scale / k, code * k),
  which changes no value, but gives the accumulators and biases of the next kernel k times finer steps: LiteRT
  rounds them, and coarse steps would show in its outputs.
"""

from __future__ import annotations

import numpy as np

from fliqs_tf.export.steps import ActivationScale
from fliqs_tf.export.tflite_file import QuantizationParameters

_LARGEST = 127


def parameters(scale: ActivationScale) -> QuantizationParameters:
    """What the codes of a value at a scale mean to everything that reads them."""
    return QuantizationParameters(scale.int8_scale)


def stages(scale: ActivationScale, activation: str) -> list[QuantizationParameters]:
    """The int8 tensors on the way to a scale: the one that a kernel writes, what that is turned into, and so on.

    Args:
      scale: The scale to arrive at; `parameters` says what the last stage means.
      activation: The activation that the kernel includes, "linear", "relu" or "relu6"; or "clipped" if all values lie
        within the range already and nothing needs cutting off.

    Returns:
      What the codes of each stage mean, one to three of them.
    """
    m = scale.largest
    if m == _LARGEST or activation == "clipped":
        zero_points = [0]
    elif activation in ("relu", "relu6"):
        zero_points = [_LARGEST - m]
    else:
        zero_points = [_LARGEST - m, m - _LARGEST - 1]
    cut = [QuantizationParameters(scale.scale, zero_point) for zero_point in zero_points]
    return [*cut, parameters(scale)] if scale.spread > 1 else cut


def lies_within(before: ActivationScale, after: ActivationScale) -> bool:
    """True if no int8 code at the first scale means a value that the second scale would cut off."""
    return bool(before.amax * np.float32(_LARGEST + 1) / before.largest < (after.largest + 0.49) * after.scale)
