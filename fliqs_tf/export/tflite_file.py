"""A `.tflite` file as tensors and operations: what LiteRT reads, and no more than this package writes.

    graph = TfliteFile()
    x = graph.tensor("x", (1, 8), np.float32)
    y = graph.tensor("y", (1, 8), np.int8, QuantizationParameters(0.1))
    graph.operation("QUANTIZE", [x], [y])
    data = graph.to_bytes([x], [y], "an example")

Source of the format: TensorFlow Lite's schema.fbs, through the classes that ai-edge-litert generates from it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fliqs_tf.numerics import encoding

# Operation -> the lowest version of it that has int8 (and, where it matters here, int4) kernels, and the name of its
# options. Source: tensorflow/compiler/mlir/lite/tools/versioning/op_version.cc. Float forms run under these as well.
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
_TYPES = {np.dtype(np.float32): "FLOAT32", np.dtype(np.int8): "INT8", np.dtype(np.int32): "INT32", "int4": "INT4"}
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class QuantizationParameters:
    """What the codes of an integer tensor mean: value = scale * (code - zero_point).

    Attributes:
      scale: A number, or one per channel.
      zero_point: Of all channels.
      axis: That of the channels, if there are several scales.
    """

    scale: float | np.ndarray
    zero_point: int = 0
    axis: int = 0


class TfliteFile:
    """Tensors and operations in the order of execution, and the bytes of the file."""

    def __init__(self):
        self.tensors: list[tuple] = []
        self.operations: list[tuple] = []
        self._names: set[str] = set()

    def tensor(
        self, name: str, shape, dtype, parameters: QuantizationParameters | None = None, data: np.ndarray | None = None
    ) -> int:
        """Adds a tensor.

        Args:
          name: For people; made unique.
          shape: Of an example batch; -1 or None in front for an open batch size.
          dtype: numpy type, or "int4" (data: codes of -7..7).
          parameters: Meaning of the codes.
          data: Values of a constant.

        Returns:
          Its index.
        """
        unique, count = name, 1
        while unique in self._names:
            unique, count = f"{name}_{count}", count + 1
        self._names.add(unique)
        key = dtype if dtype == "int4" else np.dtype(dtype)
        self.tensors.append((unique, tuple(shape), key, parameters, data))
        return len(self.tensors) - 1

    def constant(self, name: str, data: ArrayLike, dtype: Any, parameters: QuantizationParameters | None = None) -> int:
        """Adds a tensor whose values stay; arguments as for `tensor`."""
        data = np.asarray(data)
        return self.tensor(name, data.shape, dtype, parameters, data)

    def operation(self, name: str, inputs: list[int], outputs: list[int], **options) -> None:
        """Adds an operation; `options` are the fields of its options in the schema, constants by number."""
        self.operations.append((name, list(inputs), list(outputs), options))

    def to_bytes(self, inputs: list[int], outputs: list[int], description: str) -> bytes:
        """The file.

        Args:
          inputs, outputs: Tensors that the caller of the network sets and reads.
          description: One line about the file, kept in it.
        """
        import flatbuffers
        from ai_edge_litert import schema_py_generated as schema

        graph = schema.SubGraphT()
        graph.name, graph.inputs, graph.outputs = b"main", inputs, outputs
        graph.tensors, graph.operators = [], []
        model = schema.ModelT()
        model.version, model.description, model.subgraphs = 3, description, [graph]
        model.buffers, model.operatorCodes = [schema.BufferT()], []  # buffer 0 is the empty one
        for name, shape, dtype, parameters, data in self.tensors:
            graph.tensors.append(self._tensor(schema, model, name, shape, dtype, parameters, data))
        operator_codes: dict[tuple, int] = {}
        for name, ins, outs, options in self.operations:
            version, options_class = _OPERATIONS[name]
            if name in _INT4_VERSION and self.tensors[ins[1]][2] == "int4":
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

    def _signature(self, schema, inputs: list[int], outputs: list[int]):
        """The names by which `get_signature_runner` takes inputs and gives outputs: those of the tensors."""
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = (self._named(schema, tensors) for tensors in (inputs, outputs))
        return signature

    def _named(self, schema, tensors: list[int]) -> list:
        found, names = [], [self.tensors[tensor][0] for tensor in tensors]
        for i, tensor in enumerate(tensors):
            entry = schema.TensorMapT()
            entry.name = names[i] if names.count(names[i]) == 1 else f"{names[i]}_{i}"
            entry.tensorIndex = tensor
            found.append(entry)
        return found

    def _tensor(self, schema, model, name, shape, dtype, parameters, data):
        tensor = schema.TensorT()
        tensor.name, tensor.type = name, getattr(schema.TensorType, _TYPES[dtype])
        tensor.shape = [1 if n in (None, -1) else int(n) for n in shape]
        if shape and shape[0] in (None, -1):
            tensor.shapeSignature = [-1, *tensor.shape[1:]]
        if parameters is not None:
            quantization = schema.QuantizationParametersT()
            scales = np.atleast_1d(np.asarray(parameters.scale, np.float32))
            quantization.scale = scales
            quantization.zeroPoint = np.full(scales.shape, parameters.zero_point, np.int64)
            quantization.quantizedDimension = parameters.axis if scales.size > 1 else 0
            tensor.quantization = quantization
        tensor.buffer = 0
        if data is not None:
            buffer = schema.BufferT()
            raw = (
                encoding.pack(encoding.encode(data, "INT4"), 4)
                if dtype == "int4"
                else np.ascontiguousarray(data, dtype)
            )
            buffer.data = np.frombuffer(raw.tobytes(), np.uint8)
            tensor.buffer = len(model.buffers)
            model.buffers.append(buffer)
        return tensor


def _operator_code(schema, name: str, version: int):
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, name)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = version
    return code
