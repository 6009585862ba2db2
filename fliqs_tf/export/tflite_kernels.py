"""Weights and biases as LiteRT's integer kernels take them."""

from __future__ import annotations

import numpy as np

from fliqs_tf.export.steps import Linear

_LARGEST = 127
# Biases are int32, and must leave room for a sum of a few thousand products.
_LARGEST_BIAS = 2**30


def with_int32_biases(
    path: str, linear: Linear, source_scale: float, target_scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, codes and biases within the limits of the kernels.

    Biases are multiples of (input scale * weight scale). Where batch normalization has nearly switched a channel off,
    that product is so small that the bias does not fit into int32: the weight scale then grows until it fits, and the
    codes shrink with it, which moves no sum by more than a few hundredths of an output step. In a channel whose
    products together stay below a thousandth of a step the codes become 0, so that its scale need not be that small.

    Args:
      path: Path of the layer, for errors.
      linear: Its kernel, in an integer format.
      source_scale, target_scale: Values of one code of the input and of the output.

    Returns:
      (scale float64 [channels], codes like `linear.codes`, bias int32 [channels]).

    Raises:
      ValueError: A weight or a bias is NaN or infinite; names the layer.
    """
    broken = ~np.isfinite(linear.bias) | ~np.isfinite(linear.scale)
    if broken.any():
        channel = int(np.argmax(broken))
        raise ValueError(
            f"Layer {path!r}: channel {channel} has the bias {linear.bias[channel]:.3g} and weights in steps of "
            f"{linear.scale[channel]:.3g}, batch normalization included. Train the model until they are finite."
        )
    codes, scale = linear.integer_codes.copy(), linear.scale.copy()
    reach = np.abs(codes.astype(np.int64)).sum(axis=tuple(range(codes.ndim - 1))) * _LARGEST
    dead = reach * source_scale * scale < 1e-3 * target_scale
    codes[..., dead] = 0
    scale[dead] = target_scale / source_scale / 1024
    least = np.abs(linear.bias) / (source_scale * _LARGEST_BIAS)
    short = scale < least
    codes[..., short] = np.rint(codes[..., short] * (scale[short] / least[short]))
    scale[short] = least[short]
    return scale, codes, np.rint(linear.bias / (source_scale * scale)).astype(np.int32)


def channel_axis(operation: str) -> int:
    """Where `arranged` has the output channels."""
    return 3 if operation == "depthwise" else 0


def arranged(operation: str, kernel: np.ndarray) -> np.ndarray:
    """A kernel in LiteRT's order: [out, height, width, in], [1, height, width, out] or [out, in]."""
    if operation == "conv":
        return kernel.transpose(3, 0, 1, 2)
    return kernel[None] if operation == "depthwise" else kernel.T
