"""Run directories: one run each, never two at once, never overwritten by accident."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Collection

import numpy as np
import tensorflow as tf

from fliqs_tf import __version__
from fliqs_tf._keras import NAME
from fliqs_tf.io.files import local, read_json, write_json, write_text

_LOCK = "lock"
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


class RunDir:
    """A directory that this process holds until it ends.

    Args:
      path: Made if it is not there.
      resume: Go on with the run in it.
      overwrite: Remove the run in it first.

    Raises:
      SystemExit: It holds a run and neither resume nor overwrite is set; another process is at work in it; it cannot
        be written to, or is not on this machine. The message says what to do.
    """

    def __init__(self, path: str | os.PathLike, *, resume: bool, overwrite: bool):
        try:
            self.path = local(path)
        except ValueError as error:
            raise SystemExit(f"--run_dir: {error}")
        if resume and overwrite:
            raise SystemExit("--resume and --overwrite exclude each other.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / _LOCK, "a")  # noqa: SIM115 - held as long as this object
        except OSError as error:
            raise SystemExit(
                f"Cannot write to the run directory {self.path}: {error.strerror}. Give another --run_dir."
            )
        try:
            # The system frees the lock when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"Another process is at work in {self.path}. Wait for it, or give another --run_dir.")
        present = [p for p in self.path.iterdir() if p.name != _LOCK]
        if present and overwrite:
            if not (self.path / "flags.json").exists():
                raise SystemExit(
                    f"{self.path} holds files but no run (no flags.json): --overwrite will not remove them."
                )
            for entry in present:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        elif present and not resume:
            raise SystemExit(
                f"{self.path} holds a run already. Go on with it by --resume, replace it by --overwrite, or give "
                f"another --run_dir."
            )

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    def keep_flags(self, flags: dict, harmless: Collection[str]) -> None:
        """Writes flags.json.

        Args:
          flags: {name: value}.
          harmless: Names of those that may be others when a run goes on.

        Raises:
          SystemExit: The run in the directory goes on and had others, which are listed; more "epochs" are fine.
        """
        path = self / "flags.json"
        try:
            before = read_json(path, "run's flags") if path.exists() else {}
        except ValueError as error:
            raise SystemExit(f"{error} Without the run's flags it cannot go on; start anew by --overwrite.")
        if changed := changed_flags(before, flags, harmless):
            raise SystemExit(
                f"--resume goes on with the run in {self.path}, which has other flags:\n"
                + "".join(f"  --{name}: was {was}, is {now}\n" for name, was, now in changed)
                + "Give them as they were, or start another run: by --overwrite, or in another --run_dir."
            )
        write_json(path, flags)

    def keep_metrics_until(self, step: int) -> None:
        """Drops the lines of metrics.jsonl that a resumed run will write again."""
        path = self / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                break  # the line that was being written when the run was killed
        write_text(path, "".join(line + "\n" for line in kept))

    @contextlib.contextmanager
    def explained(self):
        """Within it, a disk that is full or may not be written to ends the program with one clear message.

        Raises:
          SystemExit: With that message; other errors pass.
        """
        try:
            yield
        except Exception as error:
            cause = _why_unwritable(error)
            if cause is None:
                raise
            raise SystemExit(
                f"Cannot write to the run directory {self.path}: {cause}. The files that are there are whole. Mend it "
                f"and go on with --resume, or give another --run_dir."
            )


def changed_flags(before, flags: dict, harmless: Collection[str]) -> list[tuple[str, str, str]]:
    """Flags that would make another run of one: (name, value that it had, value given), as JSON.

    Args:
      before: What flags.json holds; flags that it does not have count as unchanged.
      flags: {name: value}.
      harmless: Names to pass over. A run may also have more "epochs" than it had, but not fewer.
    """
    if not isinstance(before, dict):
        return []
    found = []
    for name, value in flags.items():
        was, now = json.dumps(before.get(name)), json.dumps(value)
        longer = name == "epochs" and isinstance(before.get(name), int) and value >= before[name]
        if name in before and name not in harmless and was != now and not longer:
            found.append((name, was, now))
    return found


def _why_unwritable(error: Exception) -> str | None:
    """The system's words, also where TensorFlow or HDF5 passes them on in an error of its own."""
    words = [os.strerror(code) for code in _UNWRITABLE]
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return os.strerror(error.errno)
    return next((each for each in words if each in str(error)), None)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "fliqs_tf": __version__,
        "tensorflow": tf.__version__,
        "keras": NAME,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
