"""Checkpoints of a search: every variable, whole or not there, newest few kept, damage noticed.

A file holds the magic word, the SHA-256 of the rest, a JSON header (step, shapes, dtypes) and the raw values of the
model's and its optimizer's variables in their order. Nothing in it is code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf import replicas
from fliqs_tf._keras import IS_KERAS_3, build_optimizer, keras
from fliqs_tf.io.files import local

_LOG = logging.getLogger("fliqs_tf")
_MAGIC = b"FLIQSCK1"
_DIGEST_BYTES = hashlib.sha256().digest_size
_NAME = re.compile(r"step-([0-9]{8,})\.ckpt")
_LENGTH = struct.Struct("<Q")


def save(
    directory: str | os.PathLike, model: keras.Model, step: int, *, keep: int = 3, write: bool = True
) -> pathlib.Path | None:
    """Writes `directory/step-00001200.ckpt` and removes all but the newest `keep`.

    Args:
      directory: Made if it is not there.
      model: A compiled model; its optimizer's variables are saved too.
      step: Training steps done.
      keep: How many files stay, 1 or more.
      write: False for the workers of a strategy that do not write: to read a variable may need all of them.

    Raises:
      ValueError: keep is less than 1, or the directory is an address such as gs://bucket/run.
      OSError: No space or no permission; the files that were there are untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, got {keep}.")
    directory = local(directory)
    arrays = [np.array(tf.convert_to_tensor(v)) for v in _variables(model)]
    if not write:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"step": step, "arrays": [[list(a.shape), a.dtype.name] for a in arrays]}).encode()
    chunks = [_LENGTH.pack(len(header)), header, *(a.tobytes() for a in arrays)]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    path = directory / f"step-{step:08d}.ckpt"
    temporary = directory / f".{path.name}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.writelines([_MAGIC, digest.digest(), *chunks])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # What a process left that was killed while it wrote.
    for old in [*files(directory)[:-keep], *directory.glob(".step-*.ckpt.tmp")]:
        old.unlink(missing_ok=True)
    return path


def files(directory: str | os.PathLike) -> list[pathlib.Path]:
    """The checkpoints of a directory, oldest first. Files of other names are not ours to read or to remove."""
    steps = {}
    for path in pathlib.Path(directory).glob("step-*.ckpt"):
        if match := _NAME.fullmatch(path.name):
            steps[path] = int(match[1])
    return sorted(steps, key=steps.__getitem__)


def restore_newest(
    directory: str | os.PathLike, model: keras.Model, workers: replicas.Workers | None = None
) -> int | None:
    """Restores the newest checkpoint that is whole; damaged ones are passed over with a warning.

    Args:
      directory: Of the checkpoints. Of several workers only the first one's is looked at.
      model: A compiled model.
      workers: `replicas.Workers`, where several restore together: the others are given what the first one reads.
        None: this process alone.

    Returns:
      Its step, or None if there is no whole checkpoint.

    Raises:
      ValueError: A whole checkpoint is of another model.
    """
    workers = workers or replicas.Workers(tf.distribute.get_strategy())
    # All workers must make variables, and assign them, together: that may need all of them.
    variables = _variables(model)
    header, data = _newest(directory, variables) if workers.is_first else (None, None)
    step = int(workers.first(np.array(-1 if header is None else int(header["step"]))))
    if step < 0:
        return None
    offset = 0
    for variable in variables:
        dtype, count = tf.as_dtype(variable.dtype).as_numpy_dtype, math.prod(variable.shape)
        # The others bring something of the same size.
        array = np.zeros(count, dtype) if data is None else np.frombuffer(data, dtype, count, offset)
        offset += array.nbytes
        variable.assign(workers.first(array).reshape(variable.shape))
    return step


def _newest(
    directory: str | os.PathLike, variables: Sequence[tf.Variable]
) -> tuple[dict[str, Any] | None, memoryview | None]:
    """What the newest whole checkpoint holds."""
    for path in reversed(files(directory)):
        try:
            header, data = _read(path)
        except ValueError as error:
            _LOG.warning("%s; taking the one before.", error)
            continue
        _check(path, header, variables)
        return header, data
    return None, None


def _read(path: pathlib.Path) -> tuple[dict[str, Any], memoryview]:
    content = path.read_bytes()
    start = len(_MAGIC) + _DIGEST_BYTES
    if content[: len(_MAGIC)] != _MAGIC or hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
        raise ValueError(f"Checkpoint {path} is damaged")
    (length,) = _LENGTH.unpack_from(content, start)
    start += _LENGTH.size
    return json.loads(content[start : start + length]), memoryview(content)[start + length :]


def _check(path: pathlib.Path, header: Mapping[str, Any], variables: Sequence[tf.Variable]) -> None:
    found = [(tuple(shape), dtype) for shape, dtype in header["arrays"]]
    expected = [(tuple(v.shape), tf.as_dtype(v.dtype).name) for v in variables]
    if found != expected:
        raise ValueError(
            f"Checkpoint {path} is of another model, optimizer or space: it holds {len(found)} variables, "
            f"{len(expected)} are expected, or their shapes differ. Use the flags of the run that wrote it."
        )


def _variables(model: keras.Model) -> list[tf.Variable]:
    # A vocabulary of tf_keras is among the variables, but is none, and does not change.
    state = [v for v in model.variables if hasattr(v, "assign")] + _random_states(model)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return state
    with optimizer_scope(model):
        build_optimizer(optimizer, model.trainable_variables)
    own = optimizer.variables
    return [*state, *(own() if callable(own) else own)]


def optimizer_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """Where the variables of the optimizer are made: those of a strategy belong to its scope."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def _random_states(model: keras.Model) -> list[tf.Variable]:
    """Of layers that draw, such as Dropout, in tf_keras; Keras 3 has them among the variables of the model."""
    if IS_KERAS_3:
        return []
    # Replicas share a state, and make it differ by their number where they draw.
    generators = (getattr(layer, "_random_generator", None) for layer in model.submodules)
    found = {id(g): getattr(g, "_generator", None) for g in generators if g is not None}
    return [generator.state for generator in found.values() if generator is not None]
