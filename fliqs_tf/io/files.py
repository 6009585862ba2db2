"""Files: JSON that is read with suspicion, and files that are written whole or not at all.

Everything that the package reads from a user (recipes, profiles, results of runs) is JSON and comes through
`read_json`. It holds data only: nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import reprlib
import stat
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

MOST_BYTES = 16 * 2**20
MOST_DEPTH = 64
_MOST_DIGITS = 40
# A string, or a bracket outside of strings. Possessive: linear in time and without a stack, whatever the file holds.
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|([\[{])|([\]}])', re.DOTALL)


def read_json(path: str | os.PathLike, what: str, most_bytes: int = MOST_BYTES) -> Any:
    """Reads a JSON file that may be damaged, foreign or hostile.

    Strict: UTF-8 (with or without a byte order mark), no key twice in an object, no NaN or Infinity, no number that
    float64 cannot hold, no half of a surrogate pair, at most `MOST_DEPTH` brackets deep.

    Args:
      path: A regular file.
      what: What the file should be, for messages: "recipe".
      most_bytes: Larger files are refused unread.

    Raises:
      ValueError: "PATH is not a WHAT: ..." or "PATH has N bytes; a WHAT has at most M."
      OSError: It is not there, is a directory, or cannot be read.
    """
    path = pathlib.Path(path)
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a {what}: it is a device or a pipe, not a file.")
        content = file.read(most_bytes + 1) if status.st_size <= most_bytes else b""
    size = max(status.st_size, len(content))
    if size > most_bytes:
        raise ValueError(f"{path} has {size} bytes; a {what} has at most {most_bytes}.")
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a {what}: {error}") from None


def parse_json(content: bytes) -> Any:
    """What `read_json` accepts, from bytes.

    Raises:
      ValueError: Says what is wrong.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"It is not UTF-8 text (byte {error.start}).") from None
    _check_depth(text)
    data = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_float, parse_int=_int)
    if "\\u" in text:
        _check_strings(data)
    return data


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Writes JSON to `path`, whole or not at all. NaN and infinities, which JSON does not have, become null.

    Raises:
      TypeError: The data is not JSON.
      OSError: No space or no permission; what was there before is untouched.
    """
    write_text(path, json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file (UTF-8), whole or not at all.

    Raises:
      OSError: No space or no permission; what was there before is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def local(path: str | os.PathLike) -> pathlib.Path:
    """A path on this machine's disks.

    Raises:
      ValueError: It is an address such as gs://bucket/run, of which a folder "gs:" would be made.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)):
        raise ValueError(
            f"{os.fspath(path)!r} is an address, not a path on this machine: give a local path, or the one where that "
            f"storage is mounted, and copy what is there afterwards."
        )
    return pathlib.Path(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives the path of a temporary file beside `path`, which takes its place at the end.

    If the body raises, the temporary file is removed and what was at `path` stays. A power cut leaves one or the
    other: the content reaches the disk before the name does.

        with replacing("model.keras") as temporary:
            model.save(temporary)

    Raises:
      OSError: No space or no permission.
      ValueError: The path is an address, see `local`.
    """
    path = local(path)
    # The same suffix: writers such as Keras look at it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _without_waiting(path: str | os.PathLike, flags: int) -> int:
    """Opens a pipe that nobody writes to without waiting for one who does."""
    return os.open(path, flags | os.O_NONBLOCK)


def _check_strings(value: object) -> None:
    """Refuses what could not be written again."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{reprlib.repr(value)} holds half of a surrogate pair.") from None
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_strings(key)
            _check_strings(entry)
    elif isinstance(value, list):
        for entry in value:
            _check_strings(entry)


def _check_depth(text: str) -> None:
    """Before parsing: the parser recurses, and how deep it may depends on what other libraries have set."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += bool(match[1]) - bool(match[2])
        if depth > MOST_DEPTH:
            raise ValueError(f"It is nested too deeply: more than {MOST_DEPTH} brackets.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError(f"{reprlib.repr(first_repeated(key for key, _ in pairs))} is there twice.")
    return data


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON.")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{reprlib.repr(text)} is too large a number.")
    return value


def _int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"A number has {len(text)} digits; the limit is {_MOST_DIGITS}.")
    return int(text)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
