"""A deployed Keras model as a list of steps, for exporters of integer networks to write.

`lowering_kernels` and `lowering_layers` say what the layers are, `folding` what becomes of batch normalization.
"""

from __future__ import annotations

from collections.abc import Iterator

from fliqs_tf._keras import keras
from fliqs_tf.export import folding, lowering_kernels, lowering_layers
from fliqs_tf.export.lowering_layers import Shape
from fliqs_tf.export.steps import IntegerNetwork, Step
from fliqs_tf.graph import dataflow, layer_types, walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import ActivationQuantizer

_LAYERS = keras.layers


def steps(graph: ModelGraph) -> IntegerNetwork:
    """The steps of a deployed model.

    Args:
      graph: Of a Functional or Sequential model, with every format fixed.

    Returns:
      Its steps in an order in which they can run, without identities, and with batch normalization and ReLU merged into
      the steps before them where one kernel does both.

    Raises:
      ValueError: A layer has no counterpart in a TFLite file, several formats, or no range; names the layer.
    """
    flow = graph.dataflow
    found: list[Step] = []
    fresh = iter(range(1 + max([call.output for call in flow.calls], default=0), 10**9))
    for call, inputs, output in _shaped(flow):
        made = _read(call, inputs, output, fresh)
        made[-1].last = (call.path, call.index)
        found += made
    _check_inputs(flow)
    found = folding.without_identities(found, flow.outputs)
    return IntegerNetwork(flow.inputs, folding.merged(found, flow.outputs), flow.outputs, flow.output_names)


def check_layers(graph: ModelGraph) -> None:
    """Raises, before anything is trained, if a layer or an input of a network has no counterpart in a TFLite file.

    Raises:
      ValueError: Names the layer or the input.
    """
    for call, inputs, output in _shaped(graph.dataflow):
        if isinstance(call.layer, Quantized):
            lowering_kernels.check(call.layer.quantized_layer, call.path)
        elif not isinstance(call.layer, ActivationQuantizer):
            _read(call, inputs, output, iter(range(10**9)))
    _check_inputs(graph.dataflow)


def _check_inputs(flow: dataflow.Dataflow) -> None:
    for _, name, shape, dtype in flow.inputs:
        if dtype != "float32":
            raise ValueError(
                f"The input {name!r} is {dtype}; TFLite export takes float32 inputs: make it float32, or use "
                f"fliqs_tf.export.packed."
            )
        if None in shape:
            raise ValueError(
                f"The input {name!r} has the open shape {shape}; TFLite needs fixed sizes: give the Input all of them, "
                f"or use fliqs_tf.export.onnx or fliqs_tf.export.packed."
            )


def _shaped(flow: dataflow.Dataflow) -> Iterator[tuple[dataflow.Call, list[Shape], Shape]]:
    """(call, shapes of its inputs, shape of its output), of one example; raises for a layer without a counterpart."""
    shapes = {value: shape for value, _, shape, _ in flow.inputs}
    for call in flow.calls:
        inputs = [shapes[value] for value in call.inputs]
        shapes[call.output] = _output_shape(call, [(None, *shape) for shape in inputs])
        yield call, inputs, shapes[call.output]


def _output_shape(call: dataflow.Call, inputs: list[Shape]) -> Shape:
    if reason := why_not(call.path, call.layer):  # first, because a composite layer does not know its shape
        raise ValueError(reason)
    if len(inputs) > 1 or isinstance(call.layer, (_LAYERS.Add, _LAYERS.Multiply, _LAYERS.Concatenate)):
        shape = call.layer.compute_output_shape(inputs)
    else:
        shape = call.layer.compute_output_shape(inputs[0])
    if isinstance(walking.unwrapped(call.layer), _LAYERS.EinsumDense):  # it may leave open what its input knows
        shape = (*inputs[0][:-1], shape[-1])
    return tuple(shape)[1:]


def why_not(path: str, layer: keras.layers.Layer) -> str:
    """Why a layer has no counterpart in the file, whatever its formats and shapes; "" if it may have one."""
    inner = walking.unwrapped(layer)
    kernels = layer_types.kernels(inner)
    is_nothing = isinstance(inner, (ActivationQuantizer, _LAYERS.InputLayer))
    try:
        if len(kernels) == 1:
            lowering_kernels.operation_of(path, inner)
        if not kernels and not is_nothing and not lowering_layers.knows(type(inner)):
            raise lowering_layers.unsupported(path, inner)
    except ValueError as error:
        return str(error)
    return ""


def _read(call: dataflow.Call, inputs: list[Shape], output: Shape, fresh: Iterator[int]) -> list[Step]:
    """The steps of one call."""
    layer, base = call.layer, (call.path, call.inputs, call.output, (*inputs, output))
    if isinstance(layer, Quantized):
        return lowering_kernels.quantized_steps(call, inputs, output, fresh)
    if isinstance(layer, ActivationQuantizer):
        return [Step("quantize", *base, options={"scale": lowering_kernels.activation_scale_of(layer, call.path)})]
    if layer_types.kernels(layer):
        return lowering_kernels.linear_steps(call, layer, call.inputs[0], inputs[0], output, None, fresh)
    kind, options = lowering_layers.read(layer, call.path, inputs)
    if kind in ("add", "multiply"):
        return _merging_steps(call, kind, inputs, output, fresh)
    shift = getattr(layer, "beta", None) if kind == "affine" else None
    return [Step(kind, *base, options=options, shift=shift)]


def _merging_steps(
    call: dataflow.Call, kind: str, inputs: list[Shape], output: Shape, fresh: Iterator[int]
) -> list[Step]:
    """An operation on several values. As in Keras, values of lower rank first get axes right after the batch axis."""
    rank = max(len(shape) for shape in inputs)
    made, values, shapes = [], list(call.inputs), [(*[1] * (rank - len(shape)), *shape) for shape in inputs]
    for i, (narrow, wide) in enumerate(zip(inputs, shapes)):
        if narrow != wide:
            values[i] = next(fresh)
            made.append(Step("reshape", call.path, (call.inputs[i],), values[i], (narrow, wide)))
    return [*made, Step(kind, call.path, tuple(values), call.output, (*shapes, output))]
