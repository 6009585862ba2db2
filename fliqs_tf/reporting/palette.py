"""How formats look in pictures: the same in all of them.

Light is few bits, dark is many (viridis, which colour-blind people can read), and a format has its colour whatever else
is in the picture. Integers are plain, floats hatched, the denser the more exponent bits, BF16 and FP32 crossed.
"""

from __future__ import annotations

import math
import types
from typing import Any

import numpy as np

from fliqs_tf.numerics import formats


def matplotlib() -> types.ModuleType:
    """The package, loaded when it is first needed.

    Raises:
      ImportError: It is missing; says what to install.
    """
    try:
        import matplotlib as package
    except ImportError as error:
        raise ImportError("Pictures need matplotlib. Run `pip install fliqs-tf[plots]`.") from error
    return package


def order(name: str) -> tuple[float, bool, int, str]:
    """Sorts by bits, integers first, then by exponent bits; what is no format comes last, by name."""
    try:
        fmt = formats.Format(name)
    except ValueError:
        return (math.inf, False, 0, name)
    return (fmt.bits, not fmt.is_integer, _exponent_bits(fmt), name)


def _exponent_bits(fmt: formats.Format) -> int:
    return 0 if fmt.is_integer else fmt.bits - 1 - fmt.mantissa_bits


def color(name: str) -> tuple[float, float, float]:
    """The colour of a format, RGB: the same in every picture; grey for an option that is no format.

    The darker, the more bits. Formats of equal bits differ in tint: the paler, the more exponent bits.
    """
    try:
        fmt = formats.Format(name)
    except ValueError:
        return (0.6, 0.6, 0.6)
    # Most spaces lie in 4..8 bits, so these get most of the scale.
    place = np.interp(fmt.bits, [2, 4, 8, 16, 32], [1.0, 0.87, 0.28, 0.08, 0.0])
    pale = 0.04 + 0.08 * _exponent_bits(fmt) if fmt.is_scaled and not fmt.is_integer else 0.0
    red, green, blue = (float(c + (1 - c) * pale) for c in matplotlib().colormaps["viridis"](place)[:3])
    return red, green, blue


def ink(name: str) -> str:
    """Black or white, whichever is read better on the format's colour."""
    red, green, blue = color(name)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def fill(name: str, hatched: bool = True) -> dict[str, Any]:
    """How an area of a format is filled, as arguments of a patch of matplotlib."""
    hatch = None
    if hatched and order(name)[0] < math.inf:
        fmt = formats.Format(name)
        if not fmt.is_scaled:
            hatch = "xxx"
        elif not fmt.is_integer:
            hatch = "/" * _exponent_bits(fmt)
    return {"facecolor": color(name), "hatch": hatch, "edgecolor": "white" if hatch else color(name), "linewidth": 0}
