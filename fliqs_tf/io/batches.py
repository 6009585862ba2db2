"""Data as users give them, read as batches: the one reader behind every argument that takes examples.

It understands

* a `tf.data.Dataset` of batches, or a `tf.distribute.DistributedDataset`;
* arrays: x, or a tuple (x, y) or (x, y, sample_weight), where x may be a list or dict of arrays, one per model input;
* a list of batches, a Sequence or PyDataset of Keras, or a generator of batches.

A batch is x, (x, y) or (x, y, sample_weight). A tuple never holds two inputs, and a list of arrays is x only if the
model has as many inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import keras, recorded_input_specs

_KINDS = (
    "a tf.data.Dataset of batches, arrays (x, or a tuple (x, y) or (x, y, sample_weight)), a list of batches, or a "
    "generator of batches"
)
# A generator is read once. What is needed again comes from the first batches of it.
_KEPT = 64


class Batch(NamedTuple):
    """Inputs, labels and weights of examples; None for what was not given."""

    x: Any
    y: Any = None
    sample_weight: Any = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Data that were understood, see `read`: `arrays`, or else `batches`.

    Attributes:
      name: The argument that they were given as, for errors.
      inputs: What the model takes: one `tf.TensorSpec` per input, without the batch axis.
      arrays: All examples at once.
      batches: What gives batches: a dataset, list, Sequence or iterator.
      batch_size: Examples per batch that arrays are trained in, if that is known.
      has_labels: Whether the first batch has; None if that cannot be known.
    """

    name: str
    inputs: tuple[tf.TensorSpec, ...]
    arrays: Batch | None = None
    batches: Iterable[Any] = ()
    batch_size: int | None = None
    has_labels: bool | None = None

    @property
    def is_read_once(self) -> bool:
        """True for a generator: what was read from it is gone."""
        return isinstance(self.batches, Iterator)

    @property
    def is_distributed(self) -> bool:
        """True if each batch is what the replicas of this process share already."""
        return isinstance(self.batches, tf.distribute.DistributedDataset)

    def first(self, count: int, batch_size: int) -> Source:
        """The first examples of arrays alone."""
        arrays = tf.nest.map_structure(lambda a: None if a is None else a[:count], self.arrays)
        return dataclasses.replace(self, arrays=arrays, batch_size=batch_size)

    def in_order(self, size: int) -> Iterator[Batch]:
        """All batches once; arrays in batches of `size`."""
        if self.arrays is None:
            # A Sequence of Keras need not end when it is iterated.
            batches = self.batches
            given = (batches[i] for i in range(len(batches))) if _is_indexed(batches) else batches
            return (self._as_batch(batch) for batch in given)
        return (_rows(self.arrays, slice(i, i + size)) for i in range(0, _length(self.arrays), size))

    def some(self, count: int, size: int) -> Iterator[Batch]:
        """A few batches, the same in every run: the first ones of a dataset, list or generator; of arrays and of a
        Sequence some from everywhere, because these may lie in an order, by class for example.

        Args:
          count: At most so many.
          size: Examples per batch, of arrays. The batches are of nearly one size and hold no example twice.
        """
        if self.arrays is not None:
            rows = _shuffled(_length(self.arrays))[: count * size]
            parts = math.ceil(len(rows) / size)
            return (_rows(self.arrays, rows[first::parts]) for first in range(parts))
        if _is_indexed(self.batches):
            chosen = _shuffled(len(self.batches))[:count].tolist()
            return (self._as_batch(self.batches[i]) for i in chosen)
        return itertools.islice(self.in_order(size), count)

    def endless(self, size: int, seed: int) -> Iterator[Batch]:
        """Whole batches, over and over. Arrays are shuffled: batches sorted by class would not compare with each other.

        All are as large as the first one. Another size would mean another trace, and other noise.

        Raises:
          ValueError: There is no batch.
        """
        if self.arrays is not None:
            length = _length(self.arrays)
            size = min(size, length)
            for epoch in itertools.count():
                rows = np.random.default_rng((seed % 2**32, epoch)).permutation(length)
                yield from (_rows(self.arrays, rows[i : i + size]) for i in range(0, length - size + 1, size))
        kept: list[Batch] = []
        whole = None
        for batch in self.in_order(size):
            whole = example_count(batch) if whole is None else whole
            if example_count(batch) == whole:
                if len(kept) < _KEPT:
                    kept.append(batch)
                yield batch
        if not kept:
            raise ValueError(f"{self.name} has no batch.")
        while True:
            again = kept if self.is_read_once else self.in_order(size)
            yield from (batch for batch in again if example_count(batch) == whole)

    def _as_batch(self, given: Any) -> Batch:
        batch = _as_batch(given, len(self.inputs), self.name)
        _check_fits(batch, self.inputs, self.name)
        return batch


def read(data: tf.data.Dataset | Iterable[Any], model: keras.Model, name: str) -> Source:
    """Understands what a user gave as examples for a model.

    The first batch is looked at, of a generator too, so that data that do not fit are refused before they are needed.

    Args:
      data: See the module.
      model: A model with inputs: Functional or Sequential.
      name: The argument that the data were given as, for errors.

    Raises:
      TypeError: Something else; says what is taken.
      ValueError: The inputs do not fit the model, or there is no batch axis, no example, or no batch.
    """
    inputs = tuple(tf.nest.flatten(recorded_input_specs(model)))
    if isinstance(data, tf.distribute.DistributedDataset):
        return Source(name, inputs, batches=data)
    if isinstance(data, tf.data.Dataset):
        spec = _as_batch(data.element_spec, len(inputs), name)
        _check_fits(spec, inputs, name)
        return Source(name, inputs, batches=data, has_labels=spec.y is not None)
    if _is_array(data) or isinstance(data, (tuple, dict)) or _is_list_of_inputs(data, inputs):
        arrays = Batch(*map(_as_arrays, _as_batch(data, len(inputs), name)))
        _check_fits(arrays, inputs, name)
        lengths = {len(a) for a in tf.nest.flatten(tuple(arrays)) if a is not None}
        if len(lengths) != 1:
            raise ValueError(f"{name} has arrays of {sorted(lengths)} examples: they must be of one length.")
        if lengths == {0}:
            raise ValueError(f"{name} has no example.")
        return Source(name, inputs, arrays, has_labels=arrays.y is not None)
    if isinstance(data, (str, bytes)) or not (isinstance(data, Iterable) or _is_indexed(data)):
        raise TypeError(f"{name} must be {_KINDS}; got {type(data).__name__}.")
    if isinstance(data, Iterator):
        first = next(data, None)
        source = Source(name, inputs, batches=itertools.chain([] if first is None else [first], data))
    else:
        first = data[0] if _is_indexed(data) and len(data) else next(iter(data), None)
        source = Source(name, inputs, batches=data)
    if first is None:
        raise ValueError(f"{name} has no batch.")
    return dataclasses.replace(source, has_labels=source._as_batch(first).y is not None)


def example_count(batch: Batch) -> int:
    """Number of examples in a batch."""
    return int(tf.nest.flatten(batch.x)[0].shape[0])


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and not hasattr(value, "element_spec")


def _is_indexed(data: object) -> TypeGuard[Sequence[Any]]:
    """True for a list, or a Sequence or PyDataset of Keras."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, tf.data.Dataset)


def _is_list_of_inputs(data: object, inputs: Sequence[tf.TensorSpec]) -> bool:
    """True for a list that holds one array per input, all examples at once."""
    return isinstance(data, list) and len(data) == len(inputs) > 1 and all(map(_is_array, data))


def _as_batch(given: Any, inputs: int, name: str) -> Batch:
    """(x, y, sample_weight) of a batch, or of a dataset's element spec."""
    parts = given if isinstance(given, tuple) else (given,)
    if not 1 <= len(parts) <= 3:
        raise ValueError(f"{name}: a tuple is (x, y) or (x, y, sample_weight); got one of {len(parts)} parts.")
    batch = Batch(*parts)
    if isinstance(batch.x, (list, tuple)):
        if len(batch.x) != inputs:
            raise ValueError(
                f"{name}: got a list of {len(batch.x)} in place of x, but the model has {inputs} "
                f"input{'s' * (inputs > 1)}. Labels go into a tuple: (x, y)."
            )
        if inputs == 1:
            batch = batch._replace(x=batch.x[0])
    return batch


def _as_arrays(part: Any) -> Any:
    if isinstance(part, list) and all(np.ndim(entry) == 0 for entry in part):
        part = np.array(part)  # labels as Python numbers

    return tf.nest.map_structure(lambda a: a if a is None or tf.is_tensor(a) else np.asarray(a), part)


def _check_fits(batch: Batch, inputs: tuple[tf.TensorSpec, ...], name: str) -> None:
    """Raises unless x may be a batch for inputs of these shapes."""
    given = tf.nest.flatten(batch.x, expand_composites=False)
    if not all(_is_array(part) or isinstance(part, tf.TensorSpec) for part in given):
        kinds = ", ".join(sorted({type(part).__name__ for part in given if not _is_array(part)}))
        raise TypeError(f"{name} must be {_KINDS}; its batches hold {kinds} in place of arrays.")
    if len(given) != len(inputs):
        raise ValueError(f"{name} has {len(given)} inputs, the model {len(inputs)}.")
    if isinstance(batch.x, dict) and all(spec.name in batch.x for spec in inputs):
        given = [batch.x[spec.name] for spec in inputs]
    for part, spec in zip(given, inputs):
        got, wanted = tf.TensorShape(_shape(part)), tf.TensorShape([None, *spec.shape])
        if got.rank is None or wanted.rank is None or got.is_compatible_with(wanted):
            continue
        # Keras itself gives a lone feature an axis of its own.
        if spec.shape.rank and spec.shape[-1] == 1 and got.is_compatible_with(wanted[:-1]):
            continue
        hint = " There must be an axis of examples first: batches, not single ones." * (got.rank < wanted.rank)
        raise ValueError(f"{name} has inputs of shape {got}, but the network takes batches {wanted}.{hint}")
    for part in tf.nest.flatten((batch.y, batch.sample_weight)):
        if part is not None and _shape(part) == ():
            raise ValueError(f"{name} has labels without an axis of examples: give batches, not single examples.")


def _shape(part: Any) -> tuple[int | None, ...] | None:
    """Sizes; None where even their number is open."""
    shape = part.shape
    return None if isinstance(shape, tf.TensorShape) and shape.rank is None else tuple(shape)


def _length(batch: Batch) -> int:
    return len(tf.nest.flatten(batch.x)[0])


def _rows(arrays: Batch, which: slice | np.ndarray) -> Batch:
    def rows(a: Any) -> Any:
        if a is None:
            return None
        part = tf.gather(a, which) if tf.is_tensor(a) and not isinstance(which, slice) else a[which]
        return part.astype(np.float32) if part.dtype == np.float64 else part  # as Keras does

    return tf.nest.map_structure(rows, arrays)


def _shuffled(count: int) -> np.ndarray:
    """0 .. count - 1 in an order that is the same in every run."""
    return np.random.default_rng(0).permutation(count)
