"""Spaces: the formats that a decision may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeAlias

from fliqs_tf.numerics.formats import Format

# Source of -S: arXiv 2308.03290. The members of -L are our reading of it; MIXED is ours.
_L_FLOAT = [f"E{x}M{b - 1 - x}" for b in range(4, 9) for x in range(2, 6) if b - 1 - x >= 1]
PRESETS: dict[str, tuple[str, ...]] = {
    "FLIQS-S-INT": ("INT4", "INT8", "BF16"),
    "FLIQS-S-FLOAT": ("E2M1", "E4M3", "BF16"),
    "FLIQS-L-INT": ("INT4", "INT5", "INT6", "INT7", "INT8", "BF16"),
    "FLIQS-L-FLOAT": (*_L_FLOAT, "BF16"),
    "MIXED": ("INT4", "INT8", "E2M1", "E4M3", "BF16"),
}


@dataclasses.dataclass(frozen=True, init=False)
class Space:
    """The formats to choose from, ordered: narrow to wide, and within a width coarse to fine.

    >>> [str(f) for f in Space(["INT8", "INT4"]).formats]
    ['INT4', 'INT8']

    Args:
      formats: The name of a preset ("FLIQS-S-INT", "FLIQS-S-FLOAT", "FLIQS-L-INT", "FLIQS-L-FLOAT", "MIXED"), or
        formats and format names in any order. One format is a space too: of a layer that is fixed to it.

    Raises:
      ValueError: Unknown preset or format, no format, or a format given twice.
    """

    formats: tuple[Format, ...]

    def __init__(self, formats: SpaceLike) -> None:
        object.__setattr__(self, "formats", _ordered(formats))

    @property
    def names(self) -> tuple[str, ...]:
        """Format names in order."""
        return tuple(f.name for f in self.formats)

    def __len__(self) -> int:
        return len(self.formats)


SpaceLike: TypeAlias = Space | str | Iterable[Format | str]
"""What `Space` takes: a space, the name of a preset, or formats and format names."""


def _ordered(space: SpaceLike) -> tuple[Format, ...]:
    if isinstance(space, Space):
        return space.formats
    if isinstance(space, (str, Format)):
        key = str(space).strip().upper()
        if key not in PRESETS:
            raise ValueError(
                f"Unknown space {str(space)!r}; presets: {', '.join(PRESETS)}. For formats of your own give a list, "
                f"for example ['INT4', 'INT8']."
            )
        space = PRESETS[key]
    if not isinstance(space, Iterable):
        raise ValueError(f"A space is the name of a preset or a list of formats, got {space!r}.")
    formats = [Format(f) for f in space]
    if not formats:
        raise ValueError("A space needs at least one format, got none. To leave layers in float use a rule with None.")
    duplicates = sorted({f.name for f in formats if formats.count(f) > 1})
    if duplicates:
        raise ValueError(f"A space names each format once, got {', '.join(duplicates)} more than once.")
    return tuple(sorted(formats, key=lambda f: (f.bits, -f.noise())))
