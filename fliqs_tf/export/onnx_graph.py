"""The graph of an ONNX file under construction: nodes, constants, and tensors in either layout."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fliqs_tf.export import targets
from fliqs_tf.numerics import encoding
from fliqs_tf.numerics.formats import Format

_OPSET, _OPSET_OF_E2M1 = 21, 23
_IR_VERSION = {21: 10, 23: 11}


def import_onnx() -> types.ModuleType:
    """The package onnx, loaded when it is first needed.

    Raises:
      ImportError: It is not installed; says how to install it.
    """
    try:
        import onnx

        return onnx
    except ImportError as error:
        raise ImportError("ONNX files need onnx: pip install 'fliqs-tf[onnx]'.") from error


@dataclasses.dataclass
class Value:
    """A tensor, which has a name in each layout that it is in.

    Attributes:
      rank: Number of axes, that of examples among them.
      last, first: Its names with channels last, as in Keras, and first, as in ONNX; "" until that layout is needed.
      is_nonnegative: True if no value is below 0.
    """

    rank: int
    last: str = ""
    first: str = ""
    is_nonnegative: bool = False


class OnnxBuilder:
    """Nodes and constants of a file under construction.

    Attributes:
      nodes: NodeProtos in the order of execution.
      constants: {name: TensorProto}.
      path: The layer that is being written: the names of its nodes begin with it.
      opset: The lowest opset, 21 or above, that has every type used so far.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []  # NodeProto
        self.constants: dict[str, Any] = {}  # TensorProto
        self.path = ""
        self.opset = _OPSET
        self._names: set[str] = set()

    @property
    def ir_version(self) -> int:
        """The version of the file format that came with the opset."""
        return _IR_VERSION[self.opset]

    def name(self, wanted: str) -> str:
        """A name that nothing in the file has yet: the wanted one, or that with a number behind it."""
        name, n = wanted, 1
        while name in self._names:
            n += 1
            name = f"{wanted}_{n}"
        self._names.add(name)
        return name

    def node(self, operation: str, inputs: Iterable[str], **attributes: Any) -> str:
        """Adds a node with one output under the layer's path; returns the name of that output."""
        name = self.name(f"{self.path}/{operation}")
        self.nodes.append(import_onnx().helper.make_node(operation, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: ArrayLike, what: str = "constant") -> str:
        """Adds an array under the layer's path; returns its name."""
        name = self.name(f"{self.path}/{what}")
        self.constants[name] = import_onnx().numpy_helper.from_array(np.asarray(array), name)
        return name

    def kind(self, storage: str) -> int:
        """The ONNX type that stores a format; raises `opset` if the type needs it."""
        if storage == "E2M1":
            self.opset = _OPSET_OF_E2M1
        return getattr(import_onnx().TensorProto, "BFLOAT16" if storage == "BF16" else targets.ONNX_TYPES[storage])

    def codes(self, values: np.ndarray, storage: str, what: str) -> str:
        """Adds values of a format as a constant of its ONNX type.

        Args:
          values: Values of the format, without a scale.
          storage: Name of a format that has an ONNX type; FP32 is stored as it is.
          what: Name of the constant, after the layer's path.

        Returns:
          Its full name.
        """
        if storage == "FP32":
            return self.constant(values.astype(np.float32), what)
        name, kind = self.name(f"{self.path}/{what}"), self.kind(storage)
        bits = encoding.pack(encoding.encode(values, storage), Format(storage).bits)
        self.constants[name] = import_onnx().helper.make_tensor(name, kind, values.shape, bits.tobytes(), raw=True)
        return name

    # ---- layouts

    def last(self, value: Value) -> str:
        """Name of the tensor with channels last; adds a Transpose if it has only the other layout."""
        if not value.last:
            value.last = self.node("Transpose", [value.first], perm=[0, *range(2, value.rank), 1])
        return value.last

    def first(self, value: Value) -> str:
        """Name of the tensor with channels first; without an axis between examples and channels both are the same."""
        if value.rank < 3:
            return self.last(value)
        if not value.first:
            value.first = self.node("Transpose", [value.last], perm=[0, value.rank - 1, *range(1, value.rank - 1)])
        return value.first

    def each(self, values: list[Value], make: Callable[..., str], is_nonnegative: bool = False) -> Value:
        """An elementwise operation, in whatever layout all values have.

        Args:
          values: Its inputs.
          make: Names of the inputs -> name of the output, with the nodes in between added.
          is_nonnegative: Whether the result is.
        """
        rank = max(v.rank for v in values)
        moved = rank > 2 and all(v.rank == rank and v.first for v in values)
        name = make(*(self.first(v) if moved else self.last(v) for v in values))
        if moved:
            return Value(rank, first=name, is_nonnegative=is_nonnegative)
        return Value(rank, last=name, is_nonnegative=is_nonnegative)

    def moved(
        self, value: Value, operation: str, inputs: Iterable[str] = (), rank: int | None = None, **attributes: Any
    ) -> Value:
        """An operation that ONNX defines for channels first.

        Args:
          value: Its first input.
          operation: Name of the ONNX operator.
          inputs: Names of its other inputs.
          rank: Rank of the result; None: that of `value`.
          **attributes: Attributes of the operator.
        """
        name = self.node(operation, [self.first(value), *inputs], **attributes)
        rank = rank or value.rank
        return Value(rank, first=name) if rank > 2 else Value(rank, last=name)

    def plain(
        self, value: Value, operation: str, inputs: Iterable[str] = (), rank: int | None = None, **attributes: Any
    ) -> Value:
        """An operation on the tensor as Keras has it, channels last; arguments as for `moved`."""
        name = self.node(operation, [self.last(value), *inputs], **attributes)
        return Value(rank or value.rank, last=name)
