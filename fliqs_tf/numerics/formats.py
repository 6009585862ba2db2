"""Number formats: what values a weight or an activation may take.

A `Format` is data. Every format of the package is described by three numbers that the one rounding
function (`fliqs_tf.numerics.rounding`) looks up at run time:

* `mantissa_bits` y: fraction bits kept for a normal value,
* `min_exponent` e0: exponent of the lowest binade; below it the step no longer shrinks,
* `max`: largest finite value; larger magnitudes saturate to it.

The values are 0 and +-k * 2^(e - y) for k < 2^(y + 1), e >= e0, up to `max`. A symmetric integer of b
bits is the case in which every value lies in the lowest binade: y = e0 = b - 2, max = 2^(b-1) - 1.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2), OCP Microscaling Formats 1.0 (E2M1, E2M3,
E3M2), IEEE 754 (E5M10), arXiv 2308.03290 (the formats that FLIQS searches).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib

import numpy as np

_INT_BITS = (2, 16)
_EXPONENT_BITS = (1, 5)
_MANTISSA_BITS = (0, 10)
_NUMBER = "0|[1-9][0-9]{0,3}"  # no leading zeros: a format has one name
_HELP = "known formats: INT2..INT16, ExMy with x in 1..5 and y in 0..10 (for example E4M3), BF16, FP32"


@dataclasses.dataclass(frozen=True, init=False)
class Format:
    """A number format, made from its name.

    >>> Format("E4M3").bits, Format("E4M3").max
    (8, 448.0)
    >>> Format("INT4").values().tolist()
    [-7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]

    Args:
      name: "INT2".."INT16", "ExMy" (x = 1..5 exponent bits, y = 0..10 mantissa bits, one sign bit), "BF16" or
        "FP32"; or a format. Case does not matter; the stored name is upper case.

    Raises:
      ValueError: "Unknown format 'E9M9': exponent bits must be 1..5 (got 9); known formats: ...".
    """

    name: str
    bits: int = dataclasses.field(init=False, compare=False, repr=False)
    mantissa_bits: int = dataclasses.field(init=False, compare=False, repr=False)
    min_exponent: int = dataclasses.field(init=False, compare=False, repr=False)
    max: float = dataclasses.field(init=False, compare=False, repr=False)

    def __init__(self, name: Format | str) -> None:
        name = name.name if isinstance(name, Format) else name
        if not isinstance(name, str):
            raise ValueError(f"A format is given by its name, got {reprlib.repr(name)}; {_HELP}.")
        name = name.strip().upper()
        for field, value in zip(("name", "bits", "mantissa_bits", "min_exponent", "max"), (name, *_properties(name))):
            object.__setattr__(self, field, value)

    def __str__(self) -> str:
        return self.name

    @property
    def is_integer(self) -> bool:
        """True for INT2..INT16."""
        return self.name.startswith("INT")

    @property
    def is_scaled(self) -> bool:
        """True if real value = scale * format value; BF16 and FP32 are casts without a scale."""
        return self.name not in ("BF16", "FP32")

    def values(self) -> np.ndarray:
        """All finite values, ascending, zero once.

        Returns:
          float64 array; 2^bits - 1 or fewer entries.

        Raises:
          ValueError: For FP32, whose 2^32 values nobody wants in one array.
        """
        if self.name == "FP32":
            raise ValueError("FP32 has too many values to list; use numpy.finfo(numpy.float32).")
        y, e0 = self.mantissa_bits, self.min_exponent
        top = math.floor(math.log2(self.max))
        lowest = np.arange(1, 2 ** (y + 1)) * 2.0 ** (e0 - y)  # subnormals and the binade of e0
        normal = (2**y + np.arange(2**y)) * 2.0 ** (np.arange(e0 + 1, top + 1)[:, None] - y)
        positive = np.concatenate([lowest, normal.ravel()])
        positive = positive[positive <= self.max]
        return np.concatenate([-positive[::-1], [0.0], positive])

    def noise(self) -> float:
        """Expected relative quantization noise power E[(q(x) - x)^2] / E[x^2] of Gaussian data.

        The data is cut at 4 standard deviations, near where a few thousand Gaussian values end, and the scale maps
        that to `max`: nothing is clipped, as with amax taken from the data. This is what a format costs in precision
        before anything is known of a network: the search starts from it.
        """
        return _gaussian_noise(self.name)


def _properties(name: str) -> tuple[int, int, int, float]:
    """(bits, mantissa_bits, min_exponent, max) of a format name."""
    if name == "FP32":
        return 32, 23, -126, float(np.finfo(np.float32).max)
    if name == "BF16":
        return 16, 7, -126, float((2 - 2.0**-7) * 2.0**127)
    if match := re.fullmatch(rf"INT({_NUMBER})", name):
        bits = int(match[1])
        _check_range(name, "integer bits", bits, _INT_BITS)
        return bits, bits - 2, bits - 2, float(2 ** (bits - 1) - 1)
    if match := re.fullmatch(rf"E({_NUMBER})M({_NUMBER})", name):
        x, y = int(match[1]), int(match[2])
        _check_range(name, "exponent bits", x, _EXPONENT_BITS)
        _check_range(name, "mantissa bits", y, _MANTISSA_BITS)
        return 1 + x + y, y, _lowest_exponent(x), _float_max(x, y)
    raise ValueError(f"Unknown format {reprlib.repr(name)}; {_HELP}.")


def _check_range(name: str, what: str, value: int, allowed: tuple[int, int]) -> None:
    if not allowed[0] <= value <= allowed[1]:
        raise ValueError(f"Unknown format {name!r}: {what} must be {allowed[0]}..{allowed[1]} (got {value}); {_HELP}.")


def _lowest_exponent(x: int) -> int:
    """Exponent of the subnormals and of the first normal binade: 1 - bias, bias = 2^(x-1) - 1."""
    return 1 - (2 ** (x - 1) - 1)


def _float_max(x: int, y: int) -> float:
    """Largest finite value. E4M3 gives its last code to NaN, E5M2 and E5M10 their last exponent to Inf and NaN."""
    bias = 2 ** (x - 1) - 1
    if (x, y) == (4, 3):
        return 448.0
    if (x, y) in ((5, 2), (5, 10)):
        return (2 - 2.0**-y) * 2.0 ** (2**x - 2 - bias)
    return (2 - 2.0**-y) * 2.0 ** (2**x - 1 - bias)


@functools.cache
def _gaussian_noise(name: str) -> float:
    fmt = Format(name)
    if name == "FP32":
        return 2.0**-48 / 3  # relative step 2^-23, uniform error: far below anything that matters
    # The midpoints of equally likely slices of a Gaussian would need an inverse error function; a grid weighted with
    # the density needs nothing. It is finer than the steps of the 16-bit formats and shares no period with them.
    x = np.linspace(-4.0, 4.0, 100_003)
    density = np.exp(-(x**2) / 2)
    scale = 4.0 / fmt.max if fmt.is_scaled else 1.0
    t = x / scale
    exponent = np.maximum(np.floor(np.log2(np.abs(t) + 1e-300)), fmt.min_exponent)
    step = 2.0 ** (exponent - fmt.mantissa_bits)
    q = np.clip(np.round(t / step) * step, -fmt.max, fmt.max) * scale
    return float(np.sum(density * (q - x) ** 2) / np.sum(density * x**2))
