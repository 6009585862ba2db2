"""A `.tflite` file as tensors and operations: only what this package writes of the format.

    graph = TfliteFile()
    x = graph.tensor("x", (1, 8), np.float32)
    y = graph.tensor("y", (1, 8), np.int8, QuantizationParameters(0.1))
    graph.operation("QUANTIZE", [x], [y])
    data = graph.to_bytes([x], [y], "an example")

Source of the format: TensorFlow Lite's schema.fbs, through the classes that ai-edge-litert generates from it.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fliqs_tf.numerics import encoding

# Operation -> the lowest version of it that has int8 (and, where it matters here, int4) kernels, and the name of its
# options. Source: tensorflow/compiler/mlir/lite/tools/versioning/op_version.cc. These versions run float kernels too.
_OPERATIONS = {
    "ADD": (2, "AddOptions"),
    "AVERAGE_POOL_2D": (2, "Pool2DOptions"),
    "CONCATENATION": (2, "ConcatenationOptions"),
    "CONV_2D": (3, "Conv2DOptions"),
    "DEPTHWISE_CONV_2D": (3, "DepthwiseConv2DOptions"),
    "DEQUANTIZE": (2, "DequantizeOptions"),
    "FULLY_CONNECTED": (4, "FullyConnectedOptions"),
    "LOGISTIC": (1, None),
    "MAX_POOL_2D": (2, "Pool2DOptions"),
    "MEAN": (2, "ReducerOptions"),
    "MUL": (2, "MulOptions"),
    "PAD": (2, "PadOptions"),
    "QUANTIZE": (2, "QuantizeOptions"),
    "REDUCE_MAX": (2, "ReducerOptions"),
    "RELU": (2, None),
    "RELU6": (2, None),
    "RESHAPE": (1, "ReshapeOptions"),
    "RESIZE_NEAREST_NEIGHBOR": (2, "ResizeNearestNeighborOptions"),
    "SOFTMAX": (1, "SoftmaxOptions"),
    "TANH": (1, None),
}
_INT4_VERSION = {"CONV_2D": 7, "FULLY_CONNECTED": 10}
_TYPES: dict[np.dtype | str, str] = {
    np.dtype(np.float32): "FLOAT32",
    np.dtype(np.int8): "INT8",
    np.dtype(np.int32): "INT32",
    "int4": "INT4",
}
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class QuantizationParameters:
    """What the codes of an integer tensor mean: value = scale * (code - zero_point).

    Attributes:
      scale: A number, or one per channel.
      zero_point: The code of 0, in all channels.
      axis: The axis of the channels, if there are several scales.
    """

    scale: float | np.floating | np.ndarray
    zero_point: int = 0
    axis: int = 0


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype | str
    parameters: QuantizationParameters | None
    data: np.ndarray | None


class _Operation(NamedTuple):
    name: str
    inputs: list[int]
    outputs: list[int]
    options: dict[str, Any]


class TfliteFile:
    """Tensors and operations in the order of execution, and the bytes of the file."""

    def __init__(self) -> None:
        self.tensors: list[_Tensor] = []
        self.operations: list[_Operation] = []
        self._names: set[str] = set()

    def tensor(
        self,
        name: str,
        shape: Sequence[int | None],
        dtype: DTypeLike,
        parameters: QuantizationParameters | None = None,
        data: np.ndarray | None = None,
    ) -> int:
        """Adds a tensor.

        Args:
          name: A name for people to read; made unique.
          shape: Shape with the batch axis; -1 or None in front leaves the batch size open.
          dtype: A NumPy dtype, or "int4" (data: codes in -7..7).
          parameters: What its codes mean; None for float32.
          data: Values of a constant; None for a tensor that is computed.

        Returns:
          Its index.
        """
        unique, count = name, 1
        while unique in self._names:
            unique, count = f"{name}_{count}", count + 1
        self._names.add(unique)
        stored = "int4" if dtype == "int4" else np.dtype(dtype)
        self.tensors.append(_Tensor(unique, tuple(shape), stored, parameters, data))
        return len(self.tensors) - 1

    def constant(
        self, name: str, data: ArrayLike, dtype: DTypeLike, parameters: QuantizationParameters | None = None
    ) -> int:
        """Adds a tensor whose values stay; arguments as for `tensor`."""
        data = np.asarray(data)
        return self.tensor(name, data.shape, dtype, parameters, data)

    def operation(self, name: str, inputs: Sequence[int], outputs: Sequence[int], **options: Any) -> None:
        """Adds an operation.

        Args:
          name: Its name in the schema, one of those in `_OPERATIONS`.
          inputs, outputs: Tensors, by index.
          **options: Fields of its options in the schema, enumerations by number.
        """
        self.operations.append(_Operation(name, list(inputs), list(outputs), options))

    def to_bytes(self, inputs: Sequence[int], outputs: Sequence[int], description: str) -> bytes:
        """The content of the file.

        Args:
          inputs, outputs: The tensors that a caller sets and reads.
          description: One line about the file, which it holds.

        Raises:
          AttributeError: An operation was given an option that the schema does not have.
        """
        import flatbuffers
        from ai_edge_litert import schema_py_generated as schema

        graph = schema.SubGraphT()
        graph.name, graph.inputs, graph.outputs = b"main", inputs, outputs
        graph.tensors, graph.operators = [], []
        model = schema.ModelT()
        model.version, model.description, model.subgraphs = 3, description, [graph]
        model.buffers, model.operatorCodes = [schema.BufferT()], []  # buffer 0 is the empty one
        for tensor in self.tensors:
            graph.tensors.append(_schema_tensor(schema, model, tensor))
        operator_codes: dict[tuple, int] = {}
        for name, ins, outs, options in self.operations:
            version, options_class = _OPERATIONS[name]
            if name in _INT4_VERSION and self.tensors[ins[1]].dtype == "int4":
                version = _INT4_VERSION[name]
            if (name, version) not in operator_codes:
                operator_codes[name, version] = len(operator_codes)
                model.operatorCodes.append(_operator_code(schema, name, version))
            operator = schema.OperatorT()
            operator.opcodeIndex, operator.inputs, operator.outputs = operator_codes[name, version], ins, outs
            if options_class:
                operator.builtinOptionsType = getattr(schema.BuiltinOptions, options_class)
                operator.builtinOptions = getattr(schema, options_class + "T")()
                for field, value in options.items():
                    if not hasattr(operator.builtinOptions, field):
                        raise AttributeError(f"{options_class} has no field {field}.")
                    setattr(operator.builtinOptions, field, value)
            graph.operators.append(operator)
        model.signatureDefs = [self._signature(schema, inputs, outputs)]
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _signature(self, schema: types.ModuleType, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        """The names that `get_signature_runner` knows inputs and outputs by: those of the tensors."""
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = (self._named(schema, tensors) for tensors in (inputs, outputs))
        return signature

    def _named(self, schema: types.ModuleType, tensors: Sequence[int]) -> list[Any]:
        found, names = [], [self.tensors[tensor].name for tensor in tensors]
        for i, tensor in enumerate(tensors):
            entry = schema.TensorMapT()
            entry.name = names[i] if names.count(names[i]) == 1 else f"{names[i]}_{i}"
            entry.tensorIndex = tensor
            found.append(entry)
        return found


def _schema_tensor(schema: types.ModuleType, model: Any, tensor: _Tensor) -> Any:
    """A tensor as the schema has it; its data become a buffer of the model."""
    made = schema.TensorT()
    made.name, made.type = tensor.name, getattr(schema.TensorType, _TYPES[tensor.dtype])
    made.shape = [1 if n is None or n == -1 else int(n) for n in tensor.shape]
    if tensor.shape and tensor.shape[0] in (None, -1):
        made.shapeSignature = [-1, *made.shape[1:]]
    if tensor.parameters is not None:
        quantization = schema.QuantizationParametersT()
        scales = np.atleast_1d(np.asarray(tensor.parameters.scale, np.float32))
        quantization.scale = scales
        quantization.zeroPoint = np.full(scales.shape, tensor.parameters.zero_point, np.int64)
        quantization.quantizedDimension = tensor.parameters.axis if scales.size > 1 else 0
        made.quantization = quantization
    made.buffer = 0
    if tensor.data is not None:
        buffer = schema.BufferT()
        raw = (
            encoding.pack(encoding.encode(tensor.data, "INT4"), 4)
            if tensor.dtype == "int4"
            else np.ascontiguousarray(tensor.data, tensor.dtype)
        )
        buffer.data = np.frombuffer(raw.tobytes(), np.uint8)
        made.buffer = len(model.buffers)
        model.buffers.append(buffer)
    return made


def _operator_code(schema: types.ModuleType, name: str, version: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, name)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = version
    return code
