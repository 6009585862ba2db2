"""What the builders of networks ask of their arguments; every error says what to give instead."""

from __future__ import annotations

import math


def check_input_shape(shape, smallest_side: int, example: tuple[int, int, int]) -> None:
    """Raises unless `shape` is (height, width, channels) with sides of `smallest_side` or more.

    Raises:
      ValueError: "input_shape must be (height, width, channels) without the batch, ... (got (32, 32))."
    """
    right = (
        isinstance(shape, (tuple, list))
        and len(shape) == 3
        and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
        and min(shape[:2]) >= smallest_side
        and shape[2] >= 1
    )
    if not right:
        raise ValueError(
            "input_shape must be (height, width, channels) without the batch, three whole numbers "
            f"with height and width of {smallest_side} or more, such as {example} (got {shape!r})."
        )


def check_sequence_shape(shape) -> None:
    """Raises unless `shape` is (length,), a whole number of 1 or more.

    Raises:
      ValueError: "input_shape must be (length,), the number of tokens, such as (128,) (got 128)."
    """
    right = isinstance(shape, (tuple, list)) and len(shape) == 1 and type(shape[0]) is int and shape[0] >= 1
    if not right:
        raise ValueError(f"input_shape must be (length,), the number of tokens, such as (128,) (got {shape!r}).")


def check_count(name: str, value, at_least: int) -> None:
    """Raises unless `value` is a whole number of `at_least` or more.

    Raises:
      ValueError: "classes must be a whole number of 2 or more (got 1)."
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be a whole number of {at_least} or more (got {value!r}).")


def check_width(width) -> None:
    """Raises unless `width` is a finite number above 0.

    Raises:
      ValueError: "width must be a number above 0 (got -1.0)."
    """
    try:
        right = not isinstance(width, bool) and 0 < width < math.inf
    except TypeError:
        right = False
    if not right:
        raise ValueError(f"width must be a number above 0 (got {width!r}).")


def scaled(bases: tuple[int, ...], width, what: str) -> tuple[int, ...]:
    """`bases` times `width`, as whole numbers.

    >>> scaled((16, 32, 64), 0.25, "filters in the first stage")
    (4, 8, 16)
    >>> scaled((6,), 1 / 3, "heads")
    (2,)

    Args:
      bases: Sizes at width 1; the message speaks of the first.
      width: Multiplier.
      what: What the first size counts, for the message.

    Raises:
      ValueError: "width=0.3 gives 4.8 filters in the first stage, which is not a whole number. Take a multiple of
        1/16, such as 0.25 or 0.3125."
    """
    check_width(width)
    step = math.gcd(*bases)
    steps = float(width * step)
    # Thirds have no exact floating-point number.
    if abs(steps - round(steps)) > 1e-6 or round(steps) < 1:
        near = [n / step for n in (int(steps), int(steps) + 1) if n > 0]
        raise ValueError(
            f"width={width} gives {float(width * bases[0]):g} {what}, which is not a whole number. Take a multiple of "
            f"1/{step}, such as {' or '.join(f'{w:g}' for w in near)}."
        )
    return tuple(base // step * round(steps) for base in bases)
