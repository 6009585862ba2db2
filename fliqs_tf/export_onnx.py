"""ONNX files: weights as codes in ONNX's own types, inputs through QuantizeLinear and DequantizeLinear.

What a format becomes:

| format | weights | inputs |
|---|---|---|
| INT8, INT16, E4M3, E5M2 | INT8, INT16, FLOAT8E4M3FN, FLOAT8E5M2 | the same |
| INT4 | INT4 | INT4 |
| INT2, INT3; INT5..INT7; INT9..INT15 | INT4; INT8; INT16: the same values | the same, clipped to the range |
| E2M1 | FLOAT4E2M1 (opset 23) | FLOAT4E2M1 |
| other ExMy whose values E4M3 or E5M2 has | FLOAT8E4M3FN, FLOAT8E5M2: the values are the same | none |
| BF16 | BFLOAT16 and a cast | casts |
| FP32 | FLOAT | as they are |

onnxruntime's CPU provider (1.31) executes all of these but FLOAT4E2M1, which ONNX's reference evaluator does.
DequantizeLinear gives scale * code in float32, which is what a Keras layer computes with: weights are equal to the bit.
The operations between are float32 in both, in another order: outputs differ by rounding, and where a value lies next to
the middle between two codes, by one step of an input.

The file is made from the layers, not from a graph of TensorFlow operations: converters of those see the arithmetic of
the rounding kernel, and not that it means QuantizeLinear.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable

import numpy as np

from fliqs_tf import codes, deployed, files, targets, topology, trace
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.formats import Format
from fliqs_tf.quantized import Quantized
from fliqs_tf.quantizers import ActivationQuantizer

_LAYERS = keras.layers
_OPSET, _OPSET_OF_E2M1 = 21, 23
_IR_VERSION = {21: 10, 23: 11}


def onnx(final, path: str | os.PathLike) -> None:
    """Writes a deployed model as an ONNX file.

    Args:
      final: What `deploy()` or `fliqs_tf.apply` returned; Functional or Sequential, float32, channels last.
      path: Of the file. Whole or not there.

    Raises:
      ImportError: onnx is not installed.
      ValueError: Not a deployed model; a layer without an ONNX form here, or a format that ONNX has no type for: names
        the layer and what takes it.
      OSError: The file cannot be written.
    """
    deployed.quantized_layers(final)
    model = _model(final)
    with files.replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def takes(layer) -> bool:
    """True if layers of this class have an ONNX form here."""
    inner = layer.quantized_layer if isinstance(layer, Quantized) else layer
    return isinstance(inner, (ActivationQuantizer, _LAYERS.InputLayer)) or type(inner) in _LAYERS_TO_ONNX


# ---- the graph


@dataclasses.dataclass
class _Value:
    """A tensor: its names with channels last, as in Keras, and first, as in ONNX; the other is made when needed."""

    rank: int
    last: str | None = None
    first: str | None = None
    is_nonnegative: bool = False


class _Graph:
    """Nodes and constants of the file, and where we are: the path of the layer."""

    def __init__(self):
        self.nodes, self.constants, self.path = [], {}, ""
        self.opset = _OPSET
        self._names: set[str] = set()

    def name(self, wanted: str) -> str:
        name, n = wanted, 1
        while name in self._names:
            n += 1
            name = f"{wanted}_{n}"
        self._names.add(name)
        return name

    def node(self, operation: str, inputs, **attributes) -> str:
        name = self.name(f"{self.path}/{operation}")
        self.nodes.append(_onnx().helper.make_node(operation, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array, what: str = "constant") -> str:
        name = self.name(f"{self.path}/{what}")
        self.constants[name] = _onnx().numpy_helper.from_array(np.asarray(array), name)
        return name

    def codes(self, values: np.ndarray, carrier: str, what: str) -> str:
        """A constant of an ONNX type for a format, from the format's values."""
        if carrier == "FP32":
            return self.constant(values.astype(np.float32), what)
        if carrier == "E2M1":
            self.opset = _OPSET_OF_E2M1
        name = self.name(f"{self.path}/{what}")
        kind = getattr(_onnx().TensorProto, "BFLOAT16" if carrier == "BF16" else targets.ONNX_TYPES[carrier])
        bits = codes.pack(codes.encode(values, carrier), Format(carrier).bits)
        self.constants[name] = _onnx().helper.make_tensor(name, kind, values.shape, bits.tobytes(), raw=True)
        return name

    # ---- layouts

    def last(self, value: _Value) -> str:
        if value.last is None:
            value.last = self.node("Transpose", [value.first], perm=[0, *range(2, value.rank), 1])
        return value.last

    def first(self, value: _Value) -> str:
        if value.rank < 3:
            return self.last(value)
        if value.first is None:
            value.first = self.node("Transpose", [value.last], perm=[0, value.rank - 1, *range(1, value.rank - 1)])
        return value.first

    def each(self, values: list[_Value], make: Callable[..., str], is_nonnegative: bool = False) -> _Value:
        """An elementwise operation, in the layout that the values have."""
        rank = max(v.rank for v in values)
        moved = rank > 2 and all(v.rank == rank and v.first is not None for v in values)
        name = make(*(self.first(v) if moved else self.last(v) for v in values))
        return _Value(rank, **{"first" if moved else "last": name}, is_nonnegative=is_nonnegative)

    def moved(self, value: _Value, operation: str, inputs=(), rank: int | None = None, **attributes) -> _Value:
        """An operation that ONNX defines for channels first."""
        name = self.node(operation, [self.first(value), *inputs], **attributes)
        rank = rank or value.rank
        return _Value(rank, **{"first" if rank > 2 else "last": name})

    def plain(self, value: _Value, operation: str, inputs=(), rank: int | None = None, **attributes) -> _Value:
        """An operation on the tensor as Keras has it."""
        name = self.node(operation, [self.last(value), *inputs], **attributes)
        return _Value(rank or value.rank, last=name)


def _onnx():
    try:
        import onnx

        return onnx
    except ImportError as error:
        raise ImportError("ONNX files need onnx: pip install 'fliqs-tf[onnx]'.") from error


def _model(final):
    helper, proto = _onnx().helper, _onnx().TensorProto
    network = topology.read(final)
    graph = _Graph()
    types = {"float32": proto.FLOAT, "float16": proto.FLOAT16, "int32": proto.INT32, "int64": proto.INT64}
    values, inputs = {}, []
    for value, name, shape, dtype in network.inputs:
        if dtype != "float32":
            raise ValueError(f"Model {final.name!r} has the input {name!r} of {dtype}; ONNX files take float32.")
        name = graph.name(name)
        inputs.append(helper.make_tensor_value_info(name, types[dtype], ["batch", *shape]))
        values[value] = _Value(1 + len(shape), last=name)
    for call in network.calls:
        graph.path = call.path
        values[call.output] = _converted(graph, call, [values[v] for v in call.inputs])
    outputs = []
    for value, name in zip(network.outputs, network.output_names):
        graph.path = ""
        # Under its own name, also where an input or one tensor twice is given out.
        made = graph.last(values[value])
        name = graph.name(name)
        graph.nodes.append(helper.make_node("Identity", [made], [name], name=f"{name}/Identity"))
        outputs.append(helper.make_tensor_value_info(name, proto.FLOAT, [None] * values[value].rank))
    made = helper.make_graph(graph.nodes, final.name, inputs, outputs, list(graph.constants.values()))
    model = helper.make_model(made, producer_name="fliqs_tf", opset_imports=[helper.make_opsetid("", graph.opset)])
    model.ir_version = _IR_VERSION[graph.opset]
    helper.set_model_props(model, {"fliqs_tf.recipe": json.dumps(deployed.recipe(final).to_dict())})
    _onnx().checker.check_model(model)
    return model


def _converted(graph: _Graph, call: topology.Call, inputs: list[_Value]) -> _Value:
    layer = call.layer
    inner = layer.quantized_layer if isinstance(layer, Quantized) else layer
    convert = _LAYERS_TO_ONNX.get(type(inner))
    if convert is None and call.constants == () and not isinstance(inner, _LAYERS.Layer):
        convert = _FUNCTIONS.get(type(inner).__name__)  # x + y under Keras 3
    if isinstance(layer, ActivationQuantizer):
        return _quantized_input(graph, inputs[0], layer)
    if convert is None or call.constants:
        known = sorted({kind.__name__ for kind in _LAYERS_TO_ONNX})
        raise ValueError(
            f"Layer {call.path!r} of class {type(inner).__name__} has no ONNX form here. Known: {', '.join(known)}. "
            f"fliqs_tf.export.packed takes any layer."
        )
    if getattr(inner, "compute_dtype", "float32") != "float32":
        raise ValueError(f"Layer {call.path!r} computes in {inner.compute_dtype}; ONNX files are float32.")
    if getattr(inner, "data_format", "channels_last") == "channels_first":
        raise ValueError(f"Layer {call.path!r} has channels first; give a model with channels last.")
    if not trace.kernels(inner):
        return convert(graph, inner, *inputs)
    weights = {k.attribute: np.asarray(getattr(inner, k.attribute), np.float32) for k in trace.kernels(inner)}
    (x,) = inputs
    middle = None
    if isinstance(layer, Quantized):
        weights = deployed.quantized_weights(call.path, layer)
        if layer.activation_quantizer is not None:
            x = _quantized_input(graph, x, layer.activation_quantizer)
        middle = layer.middle_quantizer
    result = convert(graph, inner, x, weights, middle)
    return _activation(graph, inner.activation, result)


# ---- formats


def _quantized_input(graph: _Graph, x: _Value, quantizer) -> _Value:
    fmt = deployed.format_of(quantizer)
    carrier = targets.onnx_inputs(fmt)
    if carrier is None:
        raise ValueError(
            f"Layer {graph.path!r} has its input in {fmt}, which ONNX has no type for; fliqs_tf.export.packed has."
        )
    if carrier == "FP32":
        return x
    if carrier == "BF16":
        proto = _onnx().TensorProto
        return graph.each(
            [x],
            lambda name: graph.node("Cast", [graph.node("Cast", [name], to=proto.BFLOAT16)], to=proto.FLOAT),
            x.is_nonnegative,
        )
    try:
        scale = deployed.input_scale(quantizer)
    except ValueError as error:
        raise ValueError(f"Layer {graph.path!r} cannot be written: {error}.") from None
    scale_name = graph.constant(scale, "input.scale")
    if carrier == "E2M1":
        graph.opset = _OPSET_OF_E2M1
    # Not by a zero point of that type, which is 0 anyway: onnxruntime 1.31 then breaks its own graph where a Transpose
    # follows.
    kind = getattr(_onnx().TensorProto, targets.ONNX_TYPES[carrier])

    def make(name):
        if _needs_clip(fmt, carrier, x):
            bound = np.float32(fmt.max) * scale
            name = graph.node("Clip", [name, graph.constant(-bound, "least"), graph.constant(bound, "most")])
        made = graph.node("QuantizeLinear", [name, scale_name], output_dtype=kind)
        return graph.node("DequantizeLinear", [made, scale_name])

    return graph.each([x], make, x.is_nonnegative)


def _needs_clip(fmt: Format, carrier: str, x: _Value) -> bool:
    """Integers of ONNX have one more code at the lower end, and one that carries another has more at both."""
    return fmt.is_integer and (fmt.name != carrier or not x.is_nonnegative)


def _weight(graph: _Graph, weight, what: str, move=lambda k: k) -> str:
    """A weight as a float32 tensor of the graph, `move` taking it to ONNX's order of axes."""
    if isinstance(weight, np.ndarray):
        return graph.constant(move(weight), what)
    fmt, values = weight.format, move(weight.values)
    carrier = targets.onnx_weights(fmt)
    if carrier is None:
        raise ValueError(
            f"Layer {graph.path!r} has its weights in {fmt}, which ONNX has no type for; fliqs_tf.export.packed has."
        )
    if weight.scale is None:
        made = graph.codes(values, carrier, what)
        return made if carrier == "FP32" else graph.node("Cast", [made], to=_onnx().TensorProto.FLOAT)
    scale = move(weight.scale)
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    if len(axes) <= 1:
        axis = axes[0] if axes else 0
        if not axes:  # one channel, or one scale for all
            scale = np.broadcast_to(scale.reshape(()), (values.shape[0],))
        inputs = [graph.codes(values, carrier, what), graph.constant(scale.ravel(), f"{what}.scale")]
        return graph.node("DequantizeLinear", inputs, axis=axis)
    # Channels along several axes, which DequantizeLinear does not have: as a matrix, and back.
    order = [axis for axis in range(values.ndim) if axis not in axes] + axes
    ordered = values.transpose(order)
    matrix = ordered.reshape(-1, scale.size)
    inputs = [graph.codes(matrix, carrier, what), graph.constant(scale.transpose(order).ravel(), f"{what}.scale")]
    made = graph.node("DequantizeLinear", inputs, axis=1)
    made = graph.node("Reshape", [made, graph.constant(np.array(ordered.shape, np.int64))])
    return graph.node("Transpose", [made], perm=np.argsort(order).tolist())


# ---- activations


def _hard_sigmoid(graph, name):
    return graph.node("HardSigmoid", [name], alpha=1 / 6 if IS_KERAS_3 else 0.2, beta=0.5)


def _unary(operation, **attributes):
    return lambda graph, name: graph.node(operation, [name], **attributes)


_ACTIVATIONS = {
    "relu": _unary("Relu"),
    "relu6": lambda graph, name: graph.node(
        "Clip", [name, graph.constant(np.float32(0)), graph.constant(np.float32(6))]
    ),
    "sigmoid": _unary("Sigmoid"),
    "tanh": _unary("Tanh"),
    "elu": _unary("Elu"),
    "selu": _unary("Selu", alpha=1.6732632423543772, gamma=1.0507009873554805),
    "gelu": _unary("Gelu"),
    "softplus": _unary("Softplus"),
    "softsign": _unary("Softsign"),
    "exponential": _unary("Exp"),
    "hard_sigmoid": _hard_sigmoid,
    "leaky_relu": _unary("LeakyRelu", alpha=0.2),
    "silu": lambda graph, name: graph.node("Mul", [name, graph.node("Sigmoid", [name])]),
    "hard_silu": lambda graph, name: graph.node("Mul", [name, _hard_sigmoid(graph, name)]),
}
_ACTIVATIONS["swish"], _ACTIVATIONS["hard_swish"] = _ACTIVATIONS["silu"], _ACTIVATIONS["hard_silu"]
_NONNEGATIVE = ("relu", "relu6", "sigmoid", "hard_sigmoid", "softplus", "exponential")


def _activation(graph: _Graph, function, x: _Value) -> _Value:
    name = "linear" if function is None else getattr(function, "__name__", type(function).__name__)
    if name == "linear":
        return x
    if name in ("softmax", "log_softmax"):
        return dataclasses.replace(
            graph.plain(x, "Softmax" if name == "softmax" else "LogSoftmax", axis=-1), is_nonnegative=name == "softmax"
        )
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"Layer {graph.path!r} has the activation {name!r}, which has no ONNX form here. Known: "
            f"{', '.join(sorted([*_ACTIVATIONS, 'linear', 'softmax', 'log_softmax']))}."
        )
    return graph.each([x], lambda tensor: _ACTIVATIONS[name](graph, tensor), name in _NONNEGATIVE)


def _relu(graph, layer, x):
    most, slope, threshold = layer.max_value, float(layer.negative_slope), float(layer.threshold)
    if threshold:
        raise ValueError(f"Layer {graph.path!r} is a ReLU with a threshold, which has no ONNX form here.")

    def make(name):
        if slope:
            name = graph.node("LeakyRelu", [name], alpha=slope)
        if most is not None:
            bounds = ["" if slope else graph.constant(np.float32(0)), graph.constant(np.float32(most))]
            return graph.node("Clip", [name, *bounds])
        return name if slope else graph.node("Relu", [name])

    return graph.each([x], make, not slope)


# ---- layers with kernels: (graph, layer, x, weights, quantizer between two kernels) -> value without activation


def _bias(graph, layer) -> list[str]:
    return [graph.constant(np.asarray(layer.bias), "bias")] if layer.use_bias else []


def _padding(layer, sizes) -> dict:
    over = [(size - 1) * d for size, d in zip(sizes, _per_axis(getattr(layer, "dilation_rate", 1), len(sizes)))]
    if layer.padding == "causal":
        return {"pads": [over[0], 0]}
    if layer.padding == "same" and over != [size - 1 for size in sizes]:  # strides are 1; ONNX's SAME has no dilation
        return {"pads": [o // 2 for o in over] + [o - o // 2 for o in over]}
    return {"auto_pad": "SAME_UPPER" if layer.padding == "same" else "VALID"}


def _per_axis(number, axes: int) -> list[int]:
    return list(number) if isinstance(number, (tuple, list)) else [number] * axes


def _conv(graph, layer, x, weights, _):
    (kernel,) = weights.values()
    move = lambda k: k.transpose(k.ndim - 1, k.ndim - 2, *range(k.ndim - 2))  # noqa: E731
    inputs = [_weight(graph, kernel, "kernel", move), *_bias(graph, layer)]
    return graph.moved(
        x, "Conv", inputs, group=layer.groups, strides=list(layer.strides), dilations=list(layer.dilation_rate),
        **_padding(layer, layer.kernel_size),
    )  # fmt: skip


def _depthwise_move(k):
    return k.transpose(2, 3, 0, 1).reshape(-1, 1, *k.shape[:2])


def _depthwise(graph, layer, x, weights, _):
    (kernel,) = weights.values()
    shape = (kernel if isinstance(kernel, np.ndarray) else kernel.values).shape
    inputs = [_weight(graph, kernel, "kernel", _depthwise_move), *_bias(graph, layer)]
    return graph.moved(
        x, "Conv", inputs, group=shape[2], strides=_per_axis(layer.strides, 2),
        dilations=_per_axis(layer.dilation_rate, 2), **_padding(layer, layer.kernel_size),
    )  # fmt: skip


def _separable(graph, layer, x, weights, middle):
    kernel = weights["depthwise_kernel"]
    shape = (kernel if isinstance(kernel, np.ndarray) else kernel.values).shape
    inputs = [_weight(graph, kernel, "depthwise_kernel", _depthwise_move)]
    x = graph.moved(
        x, "Conv", inputs, group=shape[2], strides=_per_axis(layer.strides, 2),
        dilations=_per_axis(layer.dilation_rate, 2), **_padding(layer, layer.kernel_size),
    )  # fmt: skip
    if middle is not None:
        x = _quantized_input(graph, x, middle)
    pointwise = _weight(graph, weights["pointwise_kernel"], "pointwise_kernel", lambda k: k.transpose(3, 2, 0, 1))
    return graph.moved(x, "Conv", [pointwise, *_bias(graph, layer)])


def _conv_transpose(graph, layer, x, weights, _):
    if layer.output_padding is not None or _per_axis(layer.dilation_rate, 2) != [1, 1]:
        raise ValueError(f"Layer {graph.path!r} has output_padding or dilation, which has no ONNX form here.")
    (kernel,) = weights.values()
    inputs = [_weight(graph, kernel, "kernel", lambda k: k.transpose(3, 2, 0, 1)), *_bias(graph, layer)]
    strides = _per_axis(layer.strides, 2)
    # The output is as large as the input of the convolution that it is the gradient of.
    over = [k - s for k, s in zip(layer.kernel_size, strides)]
    before = [max(o, 0) // 2 if layer.padding == "same" else 0 for o in over]
    after = [max(o, 0) - b if layer.padding == "same" else 0 for o, b in zip(over, before)]
    return graph.moved(
        x, "ConvTranspose", inputs, strides=strides, pads=[*before, *after], output_padding=[max(-o, 0) for o in over]
    )


def _dense(graph, layer, x, weights, _):
    # Not MatMul, and not Gemm of the kernel as it is: onnxruntime makes MatMulNBits of them, which by default rounds
    # the inputs of INT4 weights to eight bits.
    if x.rank == 2:
        kernel = _weight(graph, weights["kernel"], "kernel", np.transpose)
        return graph.plain(x, "Gemm", [kernel, *_bias(graph, layer)], transB=1)
    kernel = _weight(graph, weights["kernel"], "kernel")
    axes = "abcdefgh"[: x.rank - 1]
    return _product(graph, layer, x, kernel, f"{axes}y,yz->{axes}z")


def _einsum(graph, layer, x, weights, _):
    equation = layer.equation.replace(" ", "")
    if "." in equation:
        raise ValueError(f"Layer {graph.path!r} has the equation {equation!r}; write it without '...'.")
    return _product(graph, layer, x, _weight(graph, weights["kernel"], "kernel"), equation)


def _product(graph, layer, x, kernel: str, equation: str):
    name = graph.node("Einsum", [graph.last(x), kernel], equation=equation)
    result = _Value(len(equation.split("->")[1]), last=name)
    bias = getattr(layer, "bias", None)
    if bias is None:
        return result
    return _Value(result.rank, last=graph.node("Add", [name, graph.constant(np.asarray(bias), "bias")]))


# ---- layers without: (graph, layer, *inputs) -> value


def _norm(graph, layer, x):
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis
    if axis not in (-1, x.rank - 1):
        raise ValueError(f"Layer {graph.path!r} normalizes axis {axis}; ONNX files take the last.")
    mean, variance = np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
    gamma = np.asarray(layer.gamma) if layer.scale else np.ones_like(mean)
    beta = np.asarray(layer.beta) if layer.center else np.zeros_like(mean)
    named = {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance}
    inputs = [graph.constant(array, what) for what, array in named.items()]
    return graph.moved(x, "BatchNormalization", inputs, epsilon=float(layer.epsilon))


def _layer_norm(graph, layer, x):
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) and len(layer.axis) == 1 else layer.axis
    if axis not in (-1, x.rank - 1) or getattr(layer, "rms_scaling", False):
        raise ValueError(f"Layer {graph.path!r} does not normalize the last axis only; it has no ONNX form here.")
    size = int((layer.gamma if layer.scale else layer.beta).shape[0]) if layer.scale or layer.center else None
    if size is None:
        raise ValueError(f"Layer {graph.path!r} has neither scale nor center; it has no ONNX form here.")
    gamma = np.asarray(layer.gamma) if layer.scale else np.ones(size, np.float32)
    inputs = [graph.constant(gamma, "gamma"), *([graph.constant(np.asarray(layer.beta), "beta")] * bool(layer.center))]
    return graph.plain(x, "LayerNormalization", inputs, axis=-1, epsilon=float(layer.epsilon))


def _merge(operation, keeps_sign=True):
    def convert(graph, layer, *inputs):
        def make(name, *others):
            for other in others:
                name = graph.node(operation, [name, other])
            return name

        return graph.each(list(inputs), make, keeps_sign and all(v.is_nonnegative for v in inputs))

    return convert


def _average(graph, layer, *inputs):
    return graph.each(
        list(inputs), lambda *names: graph.node("Mean", names), all(v.is_nonnegative for v in inputs)
    )  # fmt: skip


def _concatenate(graph, layer, *inputs):
    rank = inputs[0].rank
    axis = layer.axis % rank
    moved = rank > 2 and all(v.first is not None for v in inputs)
    if moved:
        axis = {0: 0, rank - 1: 1}.get(axis, axis + 1)
    names = [graph.first(v) if moved else graph.last(v) for v in inputs]
    made = {"first" if moved else "last": graph.node("Concat", names, axis=axis)}
    return _Value(rank, **made, is_nonnegative=all(v.is_nonnegative for v in inputs))


def _pool(operation, **attributes):
    def convert(graph, layer, x):
        sizes = _per_axis(layer.pool_size, x.rank - 2)
        made = graph.moved(
            x, operation, kernel_shape=sizes, strides=_per_axis(layer.strides, x.rank - 2), **_padding(layer, sizes),
            **attributes,
        )  # fmt: skip
        return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)

    return convert


def _global_pool(operation):
    def convert(graph, layer, x):
        axes = graph.constant(np.arange(1, x.rank - 1))
        rank = x.rank if layer.keepdims else 2
        made = graph.plain(x, operation, [axes], rank=rank, keepdims=int(layer.keepdims))
        return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)

    return convert


def _same(graph, layer, x):
    return x


def _reshape(graph, layer, x):
    sizes = np.array([0, *layer.target_shape], np.int64)  # 0: as in the input
    made = graph.plain(x, "Reshape", [graph.constant(sizes)], rank=len(sizes))
    return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)


def _flatten(graph, layer, x):
    made = graph.plain(x, "Flatten", rank=2, axis=1)
    return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)


def _permute(graph, layer, x):
    return graph.plain(x, "Transpose", perm=[0, *layer.dims])


def _zero_padding(graph, layer, x):
    pads = layer.padding if isinstance(layer.padding[0], (tuple, list)) else [layer.padding]
    before, after = zip(*pads)
    sizes = np.array([0, *before, 0, 0, *after, 0], np.int64)
    made = graph.plain(x, "Pad", [graph.constant(sizes)])
    return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)


def _cropping(graph, layer, x):
    crops = layer.cropping if isinstance(layer.cropping[0], (tuple, list)) else [layer.cropping]
    starts = np.array([before for before, _ in crops], np.int64)
    ends = np.array([-after if after else np.iinfo(np.int64).max for _, after in crops], np.int64)
    axes = np.arange(1, 1 + len(crops))
    return graph.plain(x, "Slice", [graph.constant(array) for array in (starts, ends, axes)])


def _up_sampling(graph, layer, x):
    if layer.interpolation != "nearest":
        raise ValueError(f"Layer {graph.path!r} interpolates {layer.interpolation!r}; ONNX files take 'nearest'.")
    scales = graph.constant(np.array([1, 1, *layer.size], np.float32))
    made = graph.moved(
        x, "Resize", ["", scales], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    return dataclasses.replace(made, is_nonnegative=x.is_nonnegative)


def _rescaling(graph, layer, x):
    scale, offset = (graph.constant(np.asarray(v, np.float32)) for v in (layer.scale, layer.offset))
    return _Value(x.rank, last=graph.node("Add", [graph.node("Mul", [graph.last(x), scale]), offset]))


def _leaky(graph, layer, x):
    slope = layer.negative_slope if hasattr(layer, "negative_slope") else layer.alpha
    return graph.each([x], lambda name: graph.node("LeakyRelu", [name], alpha=float(slope)))


def _prelu(graph, layer, x):
    slope = graph.constant(np.asarray(layer.alpha), "alpha")
    return _Value(x.rank, last=graph.node("PRelu", [graph.last(x), slope]))


def _softmax(graph, layer, x):
    if not isinstance(layer.axis, int):
        raise ValueError(f"Layer {graph.path!r} is a softmax over several axes, which has no ONNX form here.")
    return dataclasses.replace(graph.plain(x, "Softmax", axis=layer.axis), is_nonnegative=True)


_FUNCTIONS = {
    "Add": _merge("Add"),
    "Subtract": _merge("Sub", keeps_sign=False),
    "Multiply": _merge("Mul"),
    "Maximum": _merge("Max"),
    "Minimum": _merge("Min"),
}
_LAYERS_TO_ONNX = {
    _LAYERS.Dense: _dense,
    _LAYERS.EinsumDense: _einsum,
    _LAYERS.Conv1D: _conv,
    _LAYERS.Conv2D: _conv,
    _LAYERS.DepthwiseConv2D: _depthwise,
    _LAYERS.SeparableConv2D: _separable,
    _LAYERS.Conv2DTranspose: _conv_transpose,
    _LAYERS.BatchNormalization: _norm,
    _LAYERS.LayerNormalization: _layer_norm,
    **{getattr(_LAYERS, name): convert for name, convert in _FUNCTIONS.items()},
    _LAYERS.Average: _average,
    _LAYERS.Concatenate: _concatenate,
    _LAYERS.MaxPooling1D: _pool("MaxPool"),
    _LAYERS.MaxPooling2D: _pool("MaxPool"),
    _LAYERS.AveragePooling1D: _pool("AveragePool"),
    _LAYERS.AveragePooling2D: _pool("AveragePool"),
    _LAYERS.GlobalMaxPooling1D: _global_pool("ReduceMax"),
    _LAYERS.GlobalMaxPooling2D: _global_pool("ReduceMax"),
    _LAYERS.GlobalAveragePooling1D: _global_pool("ReduceMean"),
    _LAYERS.GlobalAveragePooling2D: _global_pool("ReduceMean"),
    _LAYERS.ReLU: _relu,
    _LAYERS.Activation: lambda graph, layer, x: _activation(graph, layer.activation, x),
    _LAYERS.LeakyReLU: _leaky,
    _LAYERS.PReLU: _prelu,
    _LAYERS.ELU: lambda graph, layer, x: graph.each(
        [x], lambda name: graph.node("Elu", [name], alpha=float(layer.alpha))
    ),
    _LAYERS.Softmax: _softmax,
    _LAYERS.Flatten: _flatten,
    _LAYERS.Reshape: _reshape,
    _LAYERS.Permute: _permute,
    _LAYERS.ZeroPadding1D: _zero_padding,
    _LAYERS.ZeroPadding2D: _zero_padding,
    _LAYERS.Cropping1D: _cropping,
    _LAYERS.Cropping2D: _cropping,
    _LAYERS.UpSampling2D: _up_sampling,
    _LAYERS.Rescaling: _rescaling,
    **dict.fromkeys((_LAYERS.Dropout, _LAYERS.SpatialDropout1D, _LAYERS.SpatialDropout2D), _same),
    **dict.fromkeys((_LAYERS.GaussianNoise, _LAYERS.GaussianDropout, _LAYERS.ActivityRegularization), _same),
}
