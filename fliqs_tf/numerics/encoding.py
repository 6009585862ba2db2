"""Values of a format to codes, the bits that a file holds, and back. Exact both ways; nothing is rounded here.

* INTb: two's complement in b bits.
* ExMy: sign, exponent field, mantissa, from the highest bit down: `s << (x + y) | e << y | m`. Field 0 holds the
  subnormals; otherwise the value is (1 + m / 2^y) * 2^(e - bias). For E4M3, E5M2 and E5M10 these are the bits
  of `float8_e4m3fn`, `float8_e5m2` and `float16`.
* BF16: the upper half of a float32.

A dense stream of codes holds code i in the bits [i * b, (i + 1) * b), counted from the lowest bit of the first byte:
the first of two 4-bit codes is in the low half of its byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fliqs_tf.numerics.formats import Format

_CHUNK = 2**20  # codes per pass: a multiple of 8, so that every pass begins at a whole byte


def encode(values: ArrayLike, fmt: Format | str) -> np.ndarray:
    """Codes of values that a format has.

    >>> [hex(c) for c in encode([1.0, -7.0], "INT4").tolist()]
    ['0x1', '0x9']
    >>> [bin(c) for c in encode([0.5, -6.0], "E2M1").tolist()]
    ['0b1', '0b1111']

    Args:
      values: Array of any shape, without a scale: codes of INT4 are -7..7.
      fmt: Format or its name; not FP32.

    Returns:
      uint16 array of the same shape. Of the two zeros INTb has one; the other formats keep the sign.

    Raises:
      ValueError: A value that the format does not have, or FP32.
    """
    fmt = _coded(fmt)
    values = np.asarray(values, np.float64)
    magnitude = np.abs(values)
    with np.errstate(invalid="ignore"):
        exponent = np.maximum(np.frexp(magnitude)[1] - 1, fmt.min_exponent)
        exponent = np.where(magnitude == 0, fmt.min_exponent, exponent)
        steps = np.ldexp(magnitude, fmt.mantissa_bits - exponent)
        whole = (steps == np.floor(steps)) & (magnitude <= fmt.max)
    if not whole.all():
        raise ValueError(f"{fmt} does not have the value {values[~whole].flat[0]:g}.")
    steps = steps.astype(np.int64)
    if fmt.is_integer:
        return (np.where(values < 0, -steps, steps) & (2**fmt.bits - 1)).astype(np.uint16)
    code = ((exponent - fmt.min_exponent).astype(np.int64) << fmt.mantissa_bits) + steps
    return (code | (np.signbit(values).astype(np.int64) << (fmt.bits - 1))).astype(np.uint16)


def decode(codes: ArrayLike, fmt: Format | str) -> np.ndarray:
    """Values of codes: the inverse of `encode`.

    >>> decode([1, 9], "INT4").tolist()
    [1.0, -7.0]

    Args:
      codes: Whole numbers in [0, 2^bits), any shape.
      fmt: Format or its name; not FP32.

    Returns:
      float32 array of the same shape.

    Raises:
      ValueError: A code that stands for no value of the format (NaN, infinity, INTb's -2^(b-1)), or FP32.
    """
    fmt = _coded(fmt)
    codes = np.asarray(codes).astype(np.int64)
    if codes.size and not 0 <= codes.min() <= codes.max() < 2**fmt.bits:
        raise ValueError(f"Codes of {fmt} are 0..{2**fmt.bits - 1}, got {codes.min()}..{codes.max()}.")
    sign = codes >> (fmt.bits - 1)
    if fmt.is_integer:
        values = (codes - (sign << fmt.bits)).astype(np.float64)
    else:
        magnitude = codes & (2 ** (fmt.bits - 1) - 1)
        field = magnitude >> fmt.mantissa_bits
        binade = np.maximum(field - 1, 0)
        steps = magnitude - (binade << fmt.mantissa_bits)
        values = np.ldexp(steps.astype(np.float64), binade + (fmt.min_exponent - fmt.mantissa_bits))
        values = np.where(sign == 1, -values, values)
    if codes.size and np.abs(values).max() > fmt.max:
        bad = codes[np.abs(values) > fmt.max].flat[0]
        raise ValueError(f"The code {bad:#x} stands for no value of {fmt}.")
    return values.astype(np.float32)


def _coded(fmt: Format | str) -> Format:
    fmt = Format(fmt)
    if fmt.bits > 16:
        raise ValueError("FP32 has no codes of its own: store the values.")
    return fmt


def pack(codes: ArrayLike, bits: int) -> np.ndarray:
    """A dense stream of codes.

    >>> pack([1, 2, 3], 4).tolist()
    [33, 3]

    Args:
      codes: Whole numbers in [0, 2^bits); taken in C order.
      bits: 1..16.

    Returns:
      uint8 array of ceil(codes * bits / 8) bytes; unused bits at the end are 0.
    """
    codes = np.asarray(codes, np.uint16).ravel()
    shifts = np.arange(bits, dtype=np.uint16)
    parts = [
        np.packbits(((codes[i : i + _CHUNK, None] >> shifts) & 1).astype(np.uint8), bitorder="little")
        for i in range(0, len(codes), _CHUNK)
    ]
    return np.concatenate([np.zeros(0, np.uint8), *parts])


def unpack(stream: ArrayLike, bits: int, count: int) -> np.ndarray:
    """Codes of a dense stream: the inverse of `pack`.

    Args:
      stream: uint8 array.
      bits: 1..16.
      count: Number of codes.

    Returns:
      uint16 array [count].

    Raises:
      ValueError: The stream has another length, or unused bits that are not 0.
    """
    stream = np.asarray(stream, np.uint8).ravel()
    expected = -(-count * bits // 8)
    if len(stream) != expected:
        raise ValueError(f"{count} codes of {bits} bits take {expected} bytes, got {len(stream)}.")
    unused = 8 * expected - count * bits
    if unused and stream[-1] >> (8 - unused):
        raise ValueError(f"The last {unused} bits of {count} codes of {bits} bits must be 0.")
    weights = (1 << np.arange(bits)).astype(np.uint16)
    step = _CHUNK * bits // 8
    codes = np.zeros(count, np.uint16)
    for n, i in enumerate(range(0, len(stream), step)):
        part = codes[n * _CHUNK : (n + 1) * _CHUNK]
        each = np.unpackbits(stream[i : i + step], count=len(part) * bits, bitorder="little").reshape(-1, bits)
        part[:] = each @ weights
    return codes
