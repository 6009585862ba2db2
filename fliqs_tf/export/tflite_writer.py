"""Writes a deployed model as a `.tflite` file with integer kernels.

Every tensor between integer kernels is int8. What a code means:

* INT8: value = scale * code, scale = amax / 127.
* INT2 .. INT7 with largest code m: the kernel before writes value = scale * (code - z), scale = amax / m, with the zero
  point z for which int8 ends where the format ends: z = 127 - m cuts off above m; where values can be negative, a
  second tensor with z = m - 128 cuts off below -m. Then the codes are spread by k = 127 // m (scale / k, code * k),
  which changes no value, but gives the accumulators and biases of the next kernel k times finer steps: LiteRT
  rounds them, and coarse steps would show in its outputs.

Weights of 4 bits or fewer are int4 where there are kernels (CONV_2D, FULLY_CONNECTED), all others int8. Layers in float
formats compute in float32 between DEQUANTIZE and QUANTIZE, on inputs that are not rounded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, DTypeLike

from fliqs_tf._keras import check_model, keras
from fliqs_tf.export import boundaries, lowering, tflite_kernels
from fliqs_tf.export.steps import ActivationScale, IntegerNetwork, Linear, Step, ones
from fliqs_tf.export.tflite_file import QuantizationParameters, TfliteFile
from fliqs_tf.graph import rewriting
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.io import batches, files
from fliqs_tf.layers import requantize

_ACTIVATION = {"linear": 0, "relu": 1, "relu6": 3}  # ActivationFunctionType of the schema
_PADDING = {"same": 0, "valid": 1}
_LARGEST = 127
_BATCH = 32  # examples of arrays that are computed at a time


def tflite(
    final: keras.Model,
    path: str | os.PathLike,
    representative: tf.data.Dataset | Iterable[Any] | None = None,
    *,
    int4: bool = True,
) -> keras.Model:
    """Writes a deployed model to a `.tflite` file.

    Args:
      final: What `qmodel.deploy()` or `fliqs_tf.apply` returned, trained. It is not changed.
      path: The file to write. It is written whole or not at all.
      representative: Examples, for the ranges of int8 tensors that a model trained without `target="tflite"` lacks:
        arrays, or batches as a `tf.data.Dataset`, list or generator, with labels or without; see `fliqs_tf.io.batches`.
        A few hundred, so that typical extremes are among them.
      int4: Store weights of 4 bits or fewer as int4, two to a byte, where there are kernels. XNNPACK has none for
        convolutions: LiteRT's own are slower and round twice. False: one to a byte, faster and exact, twice the size.

    Returns:
      The Keras model that the file computes: `final` with boundary quantizers (`fliqs_tf.export.boundaries`), with
        biases that int32 can hold, and with the roundings of kernels that round in ways of their own. `check` with it
        shows whether the file is right; `check` with `final` shows what the conversion costs.

    Raises:
      ImportError: ai-edge-litert is not installed.
      TypeError: The model is of the other Keras, or `representative` does not hold examples.
      ValueError: TFLite has no kernel for a layer or a format, or a range is missing: names the layer. Or the examples
        do not fit the model.
      OSError: The file cannot be written.
    """
    check_model(final)
    try:
        import ai_edge_litert  # noqa: F401
    except ImportError as error:
        raise ImportError("Writing .tflite files needs ai-edge-litert: pip install 'fliqs-tf[export]'.") from error
    graph = ModelGraph(final)
    lowering.check_layers(graph)  # before it is copied: some of the layers that TFLite lacks cannot be copied
    graph = boundaries.with_boundary_quantizers(rewriting.without(graph, *requantize.ROUNDINGS))
    examples = None if representative is None else batches.read(representative, graph.model, "representative")
    boundaries.calibrate(graph, None if examples is None else (batch.x for batch in examples.in_order(_BATCH)))
    lowering.round_biases(graph)
    writer = _Writer(lowering.steps(graph), int4)
    content = writer.to_bytes(f"{final.name}, written by fliqs_tf")
    with files.replacing(path) as temporary:
        temporary.write_bytes(content)
    return requantize.insert(graph, writer.roundings).model


def as_shipped(graph: ModelGraph) -> ModelGraph:
    """A copy of a trained model that computes what its file will, as `tflite` returns it, without writing the file."""
    graph = boundaries.with_boundary_quantizers(graph)
    lowering.round_biases(graph)
    writer = _Writer(lowering.steps(graph), int4=True)
    writer.run()
    return requantize.insert(graph, writer.roundings)


class _Raw(NamedTuple):
    """A tensor for a kernel to write codes to, which may not be the codes yet that all readers take.

    Attributes:
      tensor: Its index.
      parameters: What its codes mean.
      zero_points: Those of further tensors that the codes go through, in this order: int8 cuts them off on the way.
    """

    tensor: int
    parameters: QuantizationParameters
    zero_points: list[int]


class _Writer:
    """Turns steps into tensors and operations."""

    def __init__(self, network: IntegerNetwork, int4: bool) -> None:
        self.network, self.int4 = network, int4
        # Last call of a step -> class and state of what rounds behind it: several, if its network is called several
        # times. Of the two kernels of a separable convolution only the second one's: there is no place between them.
        self.roundings: dict[tuple[str, int], list[tuple[type, dict]]] = {}
        self.file = TfliteFile()
        self.readers = network.readers()
        self.floats: dict[int, int] = {}  # value -> float32 tensor
        self.in_float: set[int] = set()  # values that are made in float32
        self.codes: dict[int, dict[ActivationScale, int]] = {}  # value -> int8 tensor by scale
        self.shapes: dict[int, tuple] = {}
        self.names: dict[int, str] = {}  # value -> the layer that makes it
        self.constants: dict[tuple, int] = {}

    def to_bytes(self, description: str) -> bytes:
        """The file."""
        return self.file.to_bytes(*self.run(), description)

    def run(self) -> tuple[list[int], list[int]]:
        """Writes every step; returns the tensors of inputs and outputs."""
        inputs = []
        for value, name, shape, dtype in self.network.inputs:
            if dtype != "float32":
                raise ValueError(f"The input {name!r} is {dtype}; TFLite export takes float32 inputs.")
            if None in shape:
                raise ValueError(f"The input {name!r} has the open shape {shape}; TFLite needs fixed sizes.")
            self.shapes[value], self.names[value] = shape, name
            inputs.append(self.new_float(value, name))
        for step in self.network.steps:
            self.shapes[step.output] = step.shapes[-1]
            self.names[step.output] = step.path.removesuffix(boundaries.SUFFIX)
            self.write(step)
        return inputs, [self.as_float(value) for value in self.network.outputs]

    # ---- values as tensors

    def as_float(self, value: int) -> int:
        """The float32 tensor of a value."""
        if value not in self.floats:
            (activation_scale,) = list(self.codes[value])[:1]
            tensor = self.file.tensor(self.names[value], (-1, *self.shapes[value]), np.float32)
            self.file.operation("DEQUANTIZE", [self.codes[value][activation_scale]], [tensor])
            self.floats[value] = tensor
        return self.floats[value]

    def new_float(self, value: int, name: str) -> int:
        """A float32 tensor for a kernel to write a value to."""
        self.in_float.add(value)
        self.floats[value] = self.file.tensor(name, (-1, *self.shapes[value]), np.float32)
        return self.floats[value]

    def as_codes(self, value: int, activation_scale: ActivationScale) -> int:
        """The int8 tensor of a value at a scale."""
        if activation_scale not in self.codes.setdefault(value, {}):
            # From another scale through float: LiteRT's own step between two int8 scales is off in 3 % of the values.
            before = self.given(value)
            fits = before is not None and before.amax * np.float32(_LARGEST + 1) / before.largest < (
                (activation_scale.largest + 0.49) * activation_scale.scale
            )
            raw = self._raw(value, activation_scale, "clipped" if fits else "float")
            self.file.operation("QUANTIZE", [self.as_float(value)], [raw.tensor])
            self._finish(value, activation_scale, raw)
        return self.codes[value][activation_scale]

    def _raw(self, value: int, activation_scale: ActivationScale, activation: str) -> _Raw:
        """A tensor for a kernel with this activation to write a value's codes to; `_finish` goes on from it."""
        m = activation_scale.largest
        if m == _LARGEST or activation == "clipped":
            zero_points = [0]
        elif activation in ("relu", "relu6"):
            zero_points = [_LARGEST - m]
        else:
            zero_points = [_LARGEST - m, m - _LARGEST - 1]
        parameters = QuantizationParameters(activation_scale.scale, zero_points[0])
        return _Raw(self._int8(value, parameters), parameters, zero_points[1:])

    def _finish(self, value: int, activation_scale: ActivationScale, raw: _Raw) -> None:
        """Takes what the kernel wrote to the codes that all readers read."""
        tensor = raw.tensor
        last = [QuantizationParameters(activation_scale.scale, z) for z in raw.zero_points]
        if activation_scale.spread > 1:
            last.append(self.parameters(activation_scale))
        for parameters in last:
            following = self._int8(value, parameters)
            self.file.operation("QUANTIZE", [tensor], [following])
            tensor = following
        self.codes.setdefault(value, {})[activation_scale] = tensor

    def _int8(self, value: int, parameters: QuantizationParameters) -> int:
        return self.file.tensor(f"codes_{value}", (-1, *self.shapes[value]), np.int8, parameters)

    @staticmethod
    def parameters(activation_scale: ActivationScale) -> QuantizationParameters:
        """What the codes of `as_codes` mean."""
        return QuantizationParameters(activation_scale.int8_scale)

    def wanted(self, value: int) -> ActivationScale | None:
        """The scale that all readers of a value want its codes at; None if there is not exactly one."""
        if value in self.network.outputs:
            return None
        activation_scales: set[ActivationScale | None] = set()
        for reader in self.readers.get(value, ()):
            if reader.kind == "quantize":
                activation_scales.add(reader.options["scale"])
            elif _is_quantization_invariant(reader):
                activation_scales.add(self.wanted(reader.output))
            else:
                return None
        (activation_scale,) = activation_scales if len(activation_scales) == 1 else (None,)
        return (
            activation_scale
            if activation_scale is not None and boundaries.is_integer(activation_scale.format)
            else None
        )

    def given(self, value: int) -> ActivationScale | None:
        """The scale of a value that is made as codes; None for one that is made in float, whatever its readers do."""
        return None if value in self.in_float else next(iter(self.codes.get(value, ())), None)

    def constant(
        self, name: str, data: ArrayLike, dtype: DTypeLike, parameters: QuantizationParameters | None = None
    ) -> int:
        data = np.asarray(data)
        return self.file.tensor(name, data.shape, dtype, parameters, data)

    # ---- steps

    def write(self, step: Step) -> None:
        """Appends the operations of a step."""
        if step.kind == "quantize":
            self.quantize(step)
        elif _is_quantization_invariant(step):
            self.move(step)
        else:
            activation_scales = [self.given(value) for value in step.inputs]
            target = self.wanted(step.output)
            writer = getattr(self, f"integer_{step.kind}", None)
            if writer is not None and None not in activation_scales and target is not None and self.has_integer(step):
                raw = self._raw(step.output, target, step.activation)
                writer(step, activation_scales, raw.tensor, raw.parameters)
                self._finish(step.output, target, raw)
            else:
                getattr(self, f"float_{step.kind}")(step, self.new_float(step.output, step.path))

    @staticmethod
    def has_integer(step: Step) -> bool:
        """True if the step's weights, window and number of inputs have an integer kernel."""
        if step.kind == "linear":
            return step.kernel.codes is not None
        if step.kind == "affine":
            return len(step.shapes[0]) == 3
        if step.kind == "average_pool":
            return step.options["padding"] == "valid"
        if step.kind == "mean":
            return len(step.shapes[0]) == 3
        if step.kind in ("add", "multiply"):
            return len(step.inputs) == 2
        return True

    def rounds(self, step: Step, rounding: tuple[type, dict]) -> None:
        """Notes what rounds behind a step."""
        if step.last is not None:
            self.roundings.setdefault(step.last, []).append(rounding)

    def quantize(self, step: Step) -> None:
        """Gives a value a scale."""
        (value,), activation_scale = step.inputs, step.options["scale"]
        if boundaries.is_integer(activation_scale.format):
            self.codes[step.output] = {activation_scale: self.as_codes(value, activation_scale)}
        elif value in self.floats or not self.codes.get(value):
            self.floats[step.output] = self.as_float(value)
        else:  # a float format: nothing is rounded, the next layer reads the value as it is
            self.codes[step.output] = dict(self.codes[value])

    def move(self, step: Step) -> None:
        """An operation that only moves or picks values, on codes if it can."""
        activation_scale = self.wanted(step.output)
        given = {self.given(value) for value in step.inputs}
        if activation_scale is None and len(given) == 1:
            (activation_scale,) = given
        if activation_scale is None:
            inputs = [self.as_float(value) for value in step.inputs]
            output = self.new_float(step.output, step.path)
        else:
            inputs = [self.as_codes(value, activation_scale) for value in step.inputs]
            output = self._int8(step.output, self.parameters(activation_scale))
            self.codes[step.output] = {activation_scale: output}
        getattr(self, f"move_{step.kind}")(step, inputs, output)

    def move_max_pool(self, step: Step, inputs: list[int], output: int) -> None:
        self.file.operation("MAX_POOL_2D", inputs, [output], **_pool(step))

    def move_max(self, step: Step, inputs: list[int], output: int) -> None:
        axes = self.constant("axes", [1, 2], np.int32)
        self.file.operation("REDUCE_MAX", [*inputs, axes], [output], keepDims=step.options["keepdims"])

    def move_reshape(self, step: Step, inputs: list[int], output: int) -> None:
        shape = self.constant("shape", [-1, *step.shapes[-1]], np.int32)
        self.file.operation("RESHAPE", [*inputs, shape], [output], newShape=[-1, *step.shapes[-1]])

    def move_pad(self, step: Step, inputs: list[int], output: int) -> None:
        padding = self.constant("padding", [(0, 0), *step.options["padding"], (0, 0)], np.int32)
        self.file.operation("PAD", [*inputs, padding], [output])

    def move_upsample(self, step: Step, inputs: list[int], output: int) -> None:
        size = self.constant("size", step.shapes[-1][:2], np.int32)
        self.file.operation(
            "RESIZE_NEAREST_NEIGHBOR", [*inputs, size], [output], alignCorners=False, halfPixelCenters=False
        )

    def move_concatenate(self, step: Step, inputs: list[int], output: int) -> None:
        self.file.operation("CONCATENATION", inputs, [output], axis=step.options["axis"], fusedActivationFunction=0)

    def move_activation(self, step: Step, inputs: list[int], output: int) -> None:
        self.file.operation(step.options["function"].upper(), inputs, [output])

    # ---- integer kernels

    def integer_linear(
        self, step: Step, activation_scales: list[ActivationScale], tensor: int, parameters: QuantizationParameters
    ) -> None:
        value, linear = step.inputs[0], step.kernel
        source = self.as_codes(value, activation_scales[0])
        scale, codes, bias = tflite_kernels.with_int32_biases(
            step.path, linear, float(self.parameters(activation_scales[0]).scale), float(parameters.scale)
        )
        self.kernel(step, linear, source, self.parameters(activation_scales[0]), codes, scale, bias, tensor, parameters)

    def kernel(
        self,
        step: Step,
        linear: Linear,
        source: int,
        parameters: QuantizationParameters,
        codes: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray,
        tensor: int,
        target: QuantizationParameters,
    ) -> None:
        """The operation of integer weights."""
        axis = 3 if linear.operation == "depthwise" else 0
        narrow = self.int4 and linear.format.bits <= 4 and linear.operation in ("conv", "dense")
        is_litert = narrow and (linear.operation == "conv" or codes.shape[0] % 2)  # XNNPACK has no such kernel
        rounding = requantize.double_rounding if is_litert else requantize.single_rounding
        self.rounds(step, rounding(float(parameters.scale), scale, float(target.scale)))
        weights = self.constant(
            f"{step.path}/weights",
            tflite_kernels.arranged(linear.operation, codes),
            "int4" if narrow else np.int8,
            QuantizationParameters(scale.astype(np.float32), 0, axis),
        )
        biases = self.constant(
            f"{step.path}/bias",
            bias,
            np.int32,
            QuantizationParameters(np.float32(parameters.scale) * scale.astype(np.float32)),
        )
        self.linear_operation(step, linear.operation, [source, weights, biases], tensor)

    def linear_operation(self, step: Step, operation: str, inputs: list[int], tensor: int) -> None:
        activation = {"fusedActivationFunction": _ACTIVATION[step.activation]}
        if operation == "dense":
            keep = {"keepNumDims": True} if len(step.shapes[0]) > 1 else {}
            self.file.operation("FULLY_CONNECTED", inputs, [tensor], **activation, **keep)
        else:
            window = _window(step)
            depthwise = {"depthMultiplier": step.shapes[-1][-1] // step.shapes[0][-1]} if operation != "conv" else {}
            name = "CONV_2D" if operation == "conv" else "DEPTHWISE_CONV_2D"
            self.file.operation(name, inputs, [tensor], **window, **depthwise, **activation)

    def integer_affine(
        self, step: Step, activation_scales: list[ActivationScale], tensor: int, parameters: QuantizationParameters
    ) -> None:
        """Gain and offset per channel: a 1x1 depthwise kernel whose scales are the gains."""
        gain = step.options["gain"]
        linear = ones((1, 1), len(gain)).then(gain, step.options["offset"])
        window = {"strides": (1, 1), "padding": "valid", "dilation": (1, 1)}
        step = dataclasses.replace(step, kind="linear", linear=linear, options=window)
        self.integer_linear(step, activation_scales, tensor, parameters)

    def integer_average_pool(
        self, step: Step, activation_scales: list[ActivationScale], tensor: int, parameters: QuantizationParameters
    ) -> None:
        """A depthwise kernel of ones: AVERAGE_POOL_2D would round to the steps of its input."""
        size = step.options["size"]
        linear = ones(size, step.shapes[0][-1])
        linear = linear.then(np.full(step.shapes[0][-1], 1 / (size[0] * size[1])), 0.0)
        window = {"strides": step.options["strides"], "padding": "valid", "dilation": (1, 1)}
        step = dataclasses.replace(step, kind="linear", linear=linear, options=window)
        self.integer_linear(step, activation_scales, tensor, parameters)

    def integer_mean(
        self, step: Step, activation_scales: list[ActivationScale], tensor: int, parameters: QuantizationParameters
    ) -> None:
        axes = self.constant("axes", [1, 2], np.int32)
        source = self.as_codes(step.inputs[0], activation_scales[0])
        self.file.operation("MEAN", [source, axes], [tensor], keepDims=step.options["keepdims"])
        height, width, _ = step.shapes[0]
        rounding = requantize.single_rounding(
            float(activation_scales[0].int8_scale), np.full(1, 1 / (height * width)), float(parameters.scale)
        )
        self.rounds(step, rounding)

    def integer_add(
        self, step: Step, activation_scales: list[ActivationScale], tensor: int, parameters: QuantizationParameters
    ) -> None:
        self._binary("ADD", step, activation_scales, tensor)

    def integer_multiply(
        self, step: Step, activation_scales: list[ActivationScale], tensor: int, parameters: QuantizationParameters
    ) -> None:
        self._binary("MUL", step, activation_scales, tensor)
        left, right = (activation_scale.int8_scale for activation_scale in activation_scales)
        self.rounds(step, requantize.single_rounding(float(left), np.full(1, right), float(parameters.scale)))

    def _binary(self, name: str, step: Step, activation_scales: list[ActivationScale], tensor: int) -> None:
        left, right = (
            self.as_codes(value, activation_scale) for value, activation_scale in zip(step.inputs, activation_scales)
        )
        options = {"fusedActivationFunction": _ACTIVATION[step.activation]}
        self.file.operation(name, [left, right], [tensor], **options)

    # ---- float kernels

    def float_linear(self, step: Step, tensor: int) -> None:
        linear = step.kernel
        name = f"{step.path}/weights"
        if linear.codes is None:
            weights = self.constant(name, tflite_kernels.arranged(linear.operation, linear.values), np.float32)
        else:
            axis = 3 if linear.operation == "depthwise" else 0
            codes = tflite_kernels.arranged(linear.operation, linear.codes)
            parameters = QuantizationParameters(
                np.maximum(linear.scale.astype(np.float32), np.finfo(np.float32).tiny), 0, axis
            )
            stored = self.constant(name, codes, np.int8, parameters)
            weights = self.file.tensor(name, codes.shape, np.float32)
            self.file.operation("DEQUANTIZE", [stored], [weights])
        bias = self.constant(f"{step.path}/bias", linear.bias, np.float32)
        self.linear_operation(step, linear.operation, [self.as_float(step.inputs[0]), weights, bias], tensor)

    def float_affine(self, step: Step, tensor: int) -> None:
        gain, offset = (self.constant(f"{step.path}/{n}", step.options[n], np.float32) for n in ("gain", "offset"))
        product = self.file.tensor(step.path, (-1, *step.shapes[-1]), np.float32)
        self.file.operation("MUL", [self.as_float(step.inputs[0]), gain], [product], fusedActivationFunction=0)
        self.file.operation("ADD", [product, offset], [tensor], fusedActivationFunction=_ACTIVATION[step.activation])

    def float_activation(self, step: Step, tensor: int) -> None:
        function, source = step.options["function"], self.as_float(step.inputs[0])
        if function == "softmax":
            self.file.operation("SOFTMAX", [source], [tensor], beta=1.0)
        elif function == "sigmoid":
            self.file.operation("LOGISTIC", [source], [tensor])
        elif function == "tanh":
            self.file.operation("TANH", [source], [tensor])
        elif function == "silu":
            gate = self.file.tensor(step.path, (-1, *step.shapes[-1]), np.float32)
            self.file.operation("LOGISTIC", [source], [gate])
            self.file.operation("MUL", [source, gate], [tensor], fusedActivationFunction=0)
        else:  # "linear": a layer that does nothing, but makes an output
            shape = self.constant("shape", [-1, *step.shapes[-1]], np.int32)
            self.file.operation("RESHAPE", [source, shape], [tensor], newShape=[-1, *step.shapes[-1]])

    def float_identity(self, step: Step, tensor: int) -> None:
        self.float_activation(dataclasses.replace(step, options={"function": "linear"}), tensor)

    def float_average_pool(self, step: Step, tensor: int) -> None:
        self.file.operation("AVERAGE_POOL_2D", [self.as_float(step.inputs[0])], [tensor], **_pool(step))

    def float_mean(self, step: Step, tensor: int) -> None:
        axes = self.constant("axes", [1, 2], np.int32)
        source = self.as_float(step.inputs[0])
        self.file.operation("MEAN", [source, axes], [tensor], keepDims=step.options["keepdims"])

    def float_add(self, step: Step, tensor: int) -> None:
        self._float_binary("ADD", step, tensor)

    def float_multiply(self, step: Step, tensor: int) -> None:
        self._float_binary("MUL", step, tensor)

    def _float_binary(self, name: str, step: Step, tensor: int) -> None:
        left, *rest = (self.as_float(value) for value in step.inputs)
        for i, right in enumerate(rest, 1):
            last = i == len(rest)
            result = tensor if last else self.file.tensor(step.path, (-1, *step.shapes[-1]), np.float32)
            activation = _ACTIVATION[step.activation] if last else 0
            self.file.operation(name, [left, right], [result], fusedActivationFunction=activation)
            left = result


def _is_quantization_invariant(step: Step) -> bool:
    if step.kind == "activation":
        return step.options["function"] in ("relu", "relu6")
    return step.kind in ("max_pool", "max", "reshape", "pad", "upsample", "concatenate")


def _window(step: Step) -> dict[str, int]:
    (h, w), (dh, dw) = step.options["strides"], step.options["dilation"]
    return {
        "padding": _PADDING[step.options["padding"]],
        "strideH": h,
        "strideW": w,
        "dilationHFactor": dh,
        "dilationWFactor": dw,
    }


def _pool(step: Step) -> dict[str, int]:
    (h, w), (sh, sw) = step.options["size"], step.options["strides"]
    padding = _PADDING[step.options["padding"]]
    return {"padding": padding, "strideH": sh, "strideW": sw, "filterHeight": h, "filterWidth": w}
