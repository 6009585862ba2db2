"""Steps as float32 kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fliqs_tf.export import tflite_kernels, tflite_moves, tflite_options
from fliqs_tf.export.steps import Step
from fliqs_tf.export.tflite_file import QuantizationParameters
from fliqs_tf.export.tflite_tensors import Tensors


def write(tensors: Tensors, step: Step, output: int) -> None:
    """Appends the operations of a step.

    Args:
      tensors: Those of the file; its inputs are taken in float32.
      step: Any step that does more than move values or round them.
      output: The float32 tensor to write to.
    """
    _KERNELS[step.kind](tensors, step, output)


def _linear(tensors: Tensors, step: Step, output: int) -> None:
    file, linear, name = tensors.file, step.kernel, f"{step.path}/weights"
    if linear.codes is None:
        weights = file.constant(name, tflite_kernels.arranged(linear.operation, linear.values), np.float32)
    else:
        scale = np.maximum(linear.scale.astype(np.float32), np.finfo(np.float32).tiny)
        codes = tflite_kernels.arranged(linear.operation, linear.codes)
        parameters = QuantizationParameters(scale, 0, tflite_kernels.channel_axis(linear.operation))
        stored = file.constant(name, codes, np.int8, parameters)
        weights = file.tensor(name, codes.shape, np.float32)
        file.operation("DEQUANTIZE", [stored], [weights])
    bias = file.constant(f"{step.path}/bias", linear.bias, np.float32)
    inputs = [tensors.as_float(step.inputs[0]), weights, bias]
    tflite_options.linear_operation(file, step, linear.operation, inputs, output)


def _affine(tensors: Tensors, step: Step, output: int) -> None:
    file = tensors.file
    gain, offset = (file.constant(f"{step.path}/{name}", step.options[name], np.float32) for name in ("gain", "offset"))
    product = _between(tensors, step)
    file.operation("MUL", [tensors.as_float(step.inputs[0]), gain], [product], fusedActivationFunction=0)
    file.operation("ADD", [product, offset], [output], **tflite_options.activation(step))


def _activation(tensors: Tensors, step: Step, output: int) -> None:
    file, function, source = tensors.file, step.options["function"], tensors.as_float(step.inputs[0])
    if function == "softmax":
        file.operation("SOFTMAX", [source], [output], beta=1.0)
    elif function == "silu":
        gate = _between(tensors, step)
        file.operation("LOGISTIC", [source], [gate])
        file.operation("MUL", [source, gate], [output], fusedActivationFunction=0)
    elif function == "linear":
        _nothing(tensors, step, output)
    else:
        file.operation({"sigmoid": "LOGISTIC", "tanh": "TANH"}[function], [source], [output])


def _nothing(tensors: Tensors, step: Step, output: int) -> None:
    """A layer that does nothing, but makes an output of the network."""
    tflite_moves.reshape(tensors.file, step, [tensors.as_float(step.inputs[0])], output)


def _average_pool(tensors: Tensors, step: Step, output: int) -> None:
    source = tensors.as_float(step.inputs[0])
    tensors.file.operation("AVERAGE_POOL_2D", [source], [output], **tflite_options.pool(step))


def _mean(tensors: Tensors, step: Step, output: int) -> None:
    axes = tensors.file.constant("axes", [1, 2], np.int32)
    source = tensors.as_float(step.inputs[0])
    tensors.file.operation("MEAN", [source, axes], [output], keepDims=step.options["keepdims"])


def _merging(name: str) -> Callable[[Tensors, Step, int], None]:
    def write(tensors: Tensors, step: Step, output: int) -> None:
        left, *rest = (tensors.as_float(value) for value in step.inputs)
        for right in rest[:-1]:
            result = _between(tensors, step)
            tensors.file.operation(name, [left, right], [result], fusedActivationFunction=0)
            left = result
        tensors.file.operation(name, [left, rest[-1]], [output], **tflite_options.activation(step))

    return write


def _between(tensors: Tensors, step: Step) -> int:
    """A tensor of the shape of a step's output, for an intermediate result."""
    return tensors.file.tensor(step.path, (-1, *step.shapes[-1]), np.float32)


_KERNELS = {
    "linear": _linear,
    "affine": _affine,
    "activation": _activation,
    "identity": _nothing,
    "average_pool": _average_pool,
    "mean": _mean,
    "add": _merging("ADD"),
    "multiply": _merging("MUL"),
}
