"""What the file of a profile holds, entry by entry: checked, with figures as exact fractions."""

from __future__ import annotations

import fractions
import functools
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fliqs_tf.numerics.formats import Format

_MOST_TEXT = 1000
_LEAST, _MOST = fractions.Fraction(1, 10**12), fractions.Fraction(10**12)
_FIGURE = re.compile(r"\d{1,15}(?:\.\d{1,15})?(?:/\d{1,15}(?:\.\d{1,15})?)?", re.ASCII)


def pairs(entries: object, sources: Mapping[str, Any]) -> dict[tuple[str, str], fractions.Fraction]:
    """(weight format, input format) -> cost per MAC."""
    pairs: dict[tuple[str, str], fractions.Fraction] = {}
    for where, entry in _entries(entries, "cost_per_mac", least=1):
        check_keys(entry, {"weights", "activations", "cost", "sources"}, ("weights", "activations", "cost"), where)
        _check_cited(entry, sources, where)
        cost = _figure(entry["cost"], f'{where}: "cost"')
        for w in formats(entry["weights"], f'{where}: "weights"'):
            for a in formats(entry["activations"], f'{where}: "activations"'):
                if (w, a) in pairs:
                    raise ValueError(f"{where}: {w} weights with {a} inputs have a cost already.")
                pairs[w, a] = cost
    return pairs


def weight_sizes(entries: object, sources: Mapping[str, Any]) -> dict[str, fractions.Fraction]:
    """Weight format -> bytes of a weight."""
    sizes: dict[str, fractions.Fraction] = {}
    for where, entry in _entries(entries, "bytes_per_weight", least=0):
        check_keys(entry, {"formats", "bytes", "sources"}, ("formats", "bytes"), where)
        _check_cited(entry, sources, where)
        size = _figure(entry["bytes"], f'{where}: "bytes"')
        for name in formats(entry["formats"], f'{where}: "formats"'):
            if name in sizes:
                raise ValueError(f"{where}: {name} has a size already.")
            sizes[name] = size
    return sizes


def sources(data: object) -> dict[str, dict[str, str]]:
    """{key: {title, url, says}}."""
    if not isinstance(data, Mapping) or not data:
        raise ValueError(f'"sources" must be {{key: {{"title", "url", "says"}}}}, got {reprlib.repr(data)}.')
    for key, source in data.items():
        where = f"Source {reprlib.repr(key)}"
        check_keys(source, {"title", "url", "says"}, ("title",), where)
        for part, text in source.items():
            checked_text(text, f"{where}: {part}")
    return dict(data)


def _entries(entries: object, key: str, least: int) -> list[tuple[str, Any]]:
    if not isinstance(entries, (list, tuple)) or len(entries) < least:
        raise ValueError(f'"{key}" must be a list of objects, got {reprlib.repr(entries)}.')
    return [(f"{key}[{i}]", entry) for i, entry in enumerate(entries)]


def check_keys(data: object, allowed: Collection[str], needed: Iterable[str], where: str) -> None:
    """Raises for a key that is missing, or that nobody knows."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be an object, got {reprlib.repr(data)}.")
    if missing := [key for key in needed if key not in data]:
        raise ValueError(f"{where} has no {listed(missing)}.")
    if unknown := [key for key in data if key not in allowed]:
        raise ValueError(
            f"{where} has the unknown key {reprlib.repr(unknown[0])}; known keys: {', '.join(sorted(allowed))}."
        )


def _check_cited(entry: Mapping[str, Any], sources: Mapping[str, Any], where: str) -> None:
    cited = entry.get("sources")
    if not isinstance(cited, (list, tuple)) or not cited:
        raise ValueError(f'{where} must name its "sources", a list of keys of the profile\'s sources.')
    for key in cited:
        if not isinstance(key, str) or key not in sources:
            raise ValueError(f"{where} names the source {reprlib.repr(key)}; known: {listed(list(sources))}.")


def checked_text(value: object, where: str, least: int = 1) -> str:
    """A text that can be shown."""
    if not isinstance(value, str) or not least <= len(value) <= _MOST_TEXT or not value.isprintable():
        raise ValueError(f"{where} must be a text of {least} to {_MOST_TEXT} letters, got {reprlib.repr(value)}.")
    return value


def formats(names: object, where: str) -> list[str]:
    """Names of formats, each once."""
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError(f"{where} must be a list of formats, got {reprlib.repr(names)}.")
    try:
        found = [Format(name).name for name in names]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"{where} names a format twice: {listed(found)}.")
    return found


def _figure(value: object, where: str) -> fractions.Fraction:
    """A positive figure, exactly: 0.25, 3, "2/989.4"."""
    parts: list[str] = []
    if isinstance(value, str) and _FIGURE.fullmatch(value):
        parts = value.split("/")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        parts = [repr(value)]
    try:
        figure = functools.reduce(lambda a, b: a / b, map(fractions.Fraction, parts)) if parts else None
    except (ValueError, ZeroDivisionError):  # NaN, infinity, "1/0"
        figure = None
    if figure is None or not _LEAST <= figure <= _MOST:
        raise ValueError(
            f'{where} must be a positive number (1e-12 to 1e12) or a text such as "2/989.4", got {reprlib.repr(value)}.'
        )
    return figure


def listed(names: list[str], most: int = 12) -> str:
    """The first few of many names."""
    shown = ", ".join(reprlib.repr(n)[1:-1] for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
