"""The one rounding function and its gradient: the only place that rounds.

One elementwise function serves every format. What differs between formats is a row of six numbers, looked up at
run time, so that a format can change from step to step without a new trace, a branch or a copy of the weights.

With t = x / scale, the function gives sign(t) * r(min(|t|, limit)) * scale, where r rounds to nearest, ties to even:

* in the lowest binade, |t| < 2^(e0 + 1): to multiples of the step 2^(e0 - y);
* above it: to y fraction bits, on the bit pattern of t.

Both are exact, so the same scale and input give the same bits compiled or not. (Where a graph holds the format as a
constant, its optimizer may multiply by 1 / max instead of dividing by it, and the last bit of the scale may
differ. Quantizers keep formats in variables.) NaN stays NaN, -0 stays -0, denormals count as 0, and values beyond
the range saturate (the casts BF16 and FP32 have no scale, and overflow as a cast does). A NaN or an infinity in a
tensor whose own amax is the scale makes all of it NaN.

Gradient (straight through): 1 inside the range, 0 where the value was clipped; scale is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from fliqs_tf.numerics.formats import Format

# Columns of a row that describes a format to the rounding function.
_COLUMNS = ("max", "limit", "threshold", "step", "shift", "scaled")
ROW_SIZE = len(_COLUMNS)

# The smallest scale: an all-zero channel has amax 0, and 0 / 0 would be NaN.
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def row(fmt: Format | str) -> np.ndarray:
    """What the rounding function must know of a format.

    Args:
      fmt: A format or its name.

    Returns:
      float32 array [ROW_SIZE]: max (largest finite value), limit (where |t| saturates), threshold (below it the
      step is constant), step (that step), shift (low bits dropped above it), scaled
      (1 if the format has a scale).
    """
    fmt = Format(fmt)
    y, e0 = fmt.mantissa_bits, fmt.min_exponent
    if not fmt.is_scaled:
        # The casts are as float32 is: no binade needs a constant step, not even the lowest.
        return np.array([fmt.max, np.inf, 0.0, 1.0, 23 - y, 0], np.float32)
    return np.array([fmt.max, fmt.max, 2.0 ** (e0 + 1), 2.0 ** (e0 - y), 23 - y, 1], np.float32)


def _quantize(x: tf.Tensor, amax: tf.Tensor, format_row: tf.Tensor) -> tf.Tensor:
    """The rounding function: float32 x, amax broadcastable to x, format_row [ROW_SIZE] -> float32 like x."""
    largest, limit, threshold, step, shift, scaled = tf.unstack(format_row, num=ROW_SIZE)
    scale = tf.where(scaled > 0, tf.maximum(amax / largest, _SMALLEST_NORMAL), 1.0)
    t = x / scale
    bits = tf.bitcast(t, tf.int32)
    sign = tf.bitwise.bitwise_and(bits, np.int32(-(2**31)))
    magnitude = tf.minimum(tf.bitcast(tf.bitwise.bitwise_and(bits, np.int32(2**31 - 1)), tf.float32), limit)
    # Not by adding and subtracting 2^23 steps, which is as exact and a little faster: an optimizer of graphs that
    # knows the step cancels the two, and nothing is rounded.
    low = tf.round(magnitude / step) * step
    bits = tf.bitcast(magnitude, tf.int32)
    shift = tf.cast(shift, tf.int32)
    rounds = tf.cast(shift > 0, tf.int32)
    odd = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, shift), rounds)
    below_half = tf.bitwise.left_shift(rounds, tf.maximum(shift - 1, 0)) - rounds
    high = tf.bitwise.left_shift(tf.bitwise.right_shift(bits + (below_half + odd), shift), shift)
    rounded = tf.where(magnitude < threshold, low, tf.bitcast(high, tf.float32))
    rounded = tf.bitcast(tf.bitwise.bitwise_or(tf.bitcast(rounded, tf.int32), sign), tf.float32)
    return tf.where(tf.math.is_nan(t), t, rounded * scale)


# Both are traced once, with shapes left open, and are one operation in the graph of a network. Compiled, the
# function reads and writes memory once; but XLA compiles for every shape that it meets.
_SIGNATURE = [tf.TensorSpec(None, tf.float32), tf.TensorSpec(None, tf.float32), tf.TensorSpec([ROW_SIZE], tf.float32)]
_quantize_plain = tf.function(_quantize, input_signature=_SIGNATURE, autograph=False)
_quantize_compiled = tf.function(_quantize, input_signature=_SIGNATURE, autograph=False, jit_compile=True)

# On a CPU, compiling for one more shape takes 0.1 s. A tensor of this many elements wins that back in some 500 steps.
_WORTH_COMPILING = 2**14


def _on_cpu() -> bool:
    return all(device.device_type == "CPU" for device in tf.config.list_physical_devices())


def _kernel_for(x: tf.Tensor) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
    size = x.shape.num_elements()
    small = size is not None and size <= _WORTH_COMPILING
    return _quantize_plain if small and _on_cpu() else _quantize_compiled


@tf.function(input_signature=[tf.TensorSpec(None, tf.float32)] * 3, autograph=False, jit_compile=True)
def _pass_inside(dy: tf.Tensor, x: tf.Tensor, bound: tf.Tensor) -> tf.Tensor:
    """dy where |x| <= bound, else 0, in one pass over memory."""
    return tf.where(tf.abs(x) <= bound, dy, 0.0)


@tf.function(input_signature=[*[tf.TensorSpec(None, tf.float32)] * 3, tf.TensorSpec([], tf.bool)], autograph=False)
def _pass_inside_if(dy: tf.Tensor, x: tf.Tensor, bound: tf.Tensor, saturates: tf.Tensor) -> tf.Tensor:
    return tf.cond(saturates, lambda: _pass_inside(dy, x, bound), lambda: dy)


def _straight_through(x: tf.Tensor, amax: tf.Tensor, format_row: tf.Tensor, saturates: bool | tf.Tensor) -> tf.Tensor:
    @tf.custom_gradient
    def rounded(x: tf.Tensor, amax: tf.Tensor, format_row: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        q = tf.ensure_shape(_kernel_for(x)(x, amax, format_row), x.shape)

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, None, None]:
            if saturates is False:
                return dy, None, None
            bound = tf.where(format_row[_COLUMNS.index("scaled")] > 0, amax, np.inf)
            # A GPU would wait for the host to branch; there a pass over memory is the cheaper of the two.
            if saturates is True or not _on_cpu():
                dx = _pass_inside(dy, x, bound)
            else:
                dx = _pass_inside_if(dy, x, bound, saturates)
            return tf.ensure_shape(dx, x.shape), None, None

        return q, gradient

    return rounded(x, amax, format_row)


def quantize(x: tf.Tensor, amax: tf.Tensor, format_row: tf.Tensor, *, saturates: bool | tf.Tensor = True) -> tf.Tensor:
    """Rounds x to the format that `format_row` describes; gradient straight through.

    Args:
      x: float32 tensor of any shape.
      amax: float32, broadcastable to x: the magnitude that maps to the format's largest value. Not differentiated.
      format_row: float32 [ROW_SIZE], see `row`.
      saturates: False promises that |x| <= amax everywhere (amax was taken from x itself), which spares the
        gradient a pass over memory. A bool tensor [] says so at run time.

    Returns:
      float32 tensor like x.
    """
    return _straight_through(x, amax, format_row, saturates)


def absolute_max(x: tf.Tensor, axis: int | Sequence[int] | None = None) -> tf.Tensor:
    """Largest magnitude of x.

    Args:
      x: float32 tensor.
      axis: int or ints: axes that keep a value of their own (channels); None: one value for the whole tensor.

    Returns:
      float32: shape () for None, else shape of x with every other axis 1. A constant to the gradient.
    """
    if axis is None and tf.is_symbolic_tensor(x) and x.op.type in ("Relu", "Relu6"):
        return tf.reduce_max(tf.stop_gradient(x))  # known to have no minus sign: one pass less over memory
    x = tf.stop_gradient(x)
    if axis is None:
        # Two reductions read x twice and write nothing; |x| first would write a copy of it.
        return tf.maximum(tf.reduce_max(x), -tf.reduce_min(x))
    return tf.reduce_max(tf.abs(x), axis=_other_axes(x.shape.rank, axis), keepdims=True)


def _other_axes(rank: int, axis: int | Sequence[int]) -> list[int]:
    kept = {a % rank if -rank <= a < rank else a for a in np.atleast_1d(axis).tolist()}
    if not kept <= set(range(rank)):
        raise ValueError(f"axis must name axes of a tensor of rank {rank} (-{rank}..{rank - 1}), got {axis}.")
    return [a for a in range(rank) if a not in kept]


def fake_quant(
    x: tf.Tensor | ArrayLike,
    fmt: Format | str,
    axis: int | Sequence[int] | None = None,
    *,
    amax: tf.Tensor | ArrayLike | None = None,
) -> tf.Tensor:
    """Rounds x to the values of a number format: scale * (format value), scale = amax / (largest format value).

    >>> fake_quant([0.1, -0.6, 7.0], "INT4").numpy().tolist()
    [0.0, -1.0, 7.0]

    Args:
      x: Tensor or array-like of any shape; computed in float32, returned in the floating dtype of x.
      fmt: Format or its name.
      axis: int or tuple of ints: axes that get a scale each (per-channel); None: one scale per tensor.
      amax: Number, array or tensor broadcastable to x: magnitude that maps to the format's largest value; larger ones
        saturate, with 0 at values below 1e-32. Of a tensor the values are not looked at: negative ones count as 0,
        infinities and NaN give NaN. None: taken from x along `axis`. BF16 and FP32 have no scale and ignore it.

    Returns:
      Tensor of x's shape. Gradient: 1 where |x| <= amax, 0 where the value was clipped, none to amax.

    Raises:
      ValueError: Unknown format, an axis that x does not have, or an amax below 0, infinite or NaN.
    """
    fmt = Format(fmt)
    if amax is not None and not tf.is_tensor(amax):
        amax = np.asarray(amax, np.float32)
        wrong = amax[~((amax >= 0) & np.isfinite(amax))]
        if wrong.size:
            raise ValueError(
                f"amax must be 0 or more and finite, got {wrong.flat[0]:.6g}: it is where values saturate. "
                f"Leave it out to take it from x."
            )
    x = tf.convert_to_tensor(x)
    dtype = x.dtype if x.dtype.is_floating else tf.float32
    x = tf.cast(x, tf.float32)
    own_range = amax is None
    amax = absolute_max(x, axis) if own_range else tf.stop_gradient(tf.convert_to_tensor(amax, tf.float32))
    return tf.cast(quantize(x, amax, tf.constant(row(fmt)), saturates=not own_range), dtype)
