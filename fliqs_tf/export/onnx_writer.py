"""Writes a deployed model as an ONNX file; `onnx_formats` says what each format becomes.

The file is made from the layers, not from a graph of TensorFlow operations: a converter of such a graph sees the
arithmetic of the rounding function, but not that it is a QuantizeLinear.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from fliqs_tf._keras import keras
from fliqs_tf.export import deployed
from fliqs_tf.export.onnx_formats import Weight, quantized_input
from fliqs_tf.export.onnx_graph import OnnxBuilder, Value, import_onnx
from fliqs_tf.export.onnx_layers import CONVERTERS, FUNCTIONS, activation
from fliqs_tf.graph import dataflow, layer_types, walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.io import files
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import ActivationQuantizer

_LAYERS = keras.layers


def onnx(final: keras.Model, path: str | os.PathLike) -> None:
    """Writes a deployed model as an ONNX file.

    Args:
      final: What `deploy()` or `fliqs_tf.apply` returned; Functional or Sequential, float32, channels last.
      path: The file to write. It is written whole or not at all.

    Raises:
      ImportError: onnx is not installed.
      ValueError: Not a deployed model; or this exporter does not support a layer, or ONNX has no type for a format:
        names the layer, and an exporter that supports it.
      OSError: The file cannot be written.
    """
    graph = ModelGraph(final)
    deployed.quantized_layers(graph)
    model = _model(graph)
    with files.replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def check_layers(graph: ModelGraph) -> None:
    """Raises, before any training, if a layer or an input of a quantized network has no ONNX form.

    Args:
      graph: Of a network whose formats may still be open: all is converted as if it were in float, and thrown away.

    Raises:
      ImportError: onnx is not installed.
      ValueError: Names the layer or the input, and what takes it.
    """
    _convert(OnnxBuilder(), graph, in_float=True)


def takes(layer: keras.layers.Layer) -> bool:
    """True if the ONNX exporter supports layers of this class; how they are configured may still rule them out."""
    inner = layer.quantized_layer if isinstance(layer, Quantized) else layer
    return isinstance(inner, (ActivationQuantizer, _LAYERS.InputLayer)) or type(inner) in CONVERTERS


def _model(graph: ModelGraph) -> Any:
    helper, proto = import_onnx().helper, import_onnx().TensorProto
    final, network, builder = graph.model, graph.dataflow, OnnxBuilder()
    values = _convert(builder, graph)
    inputs = [
        helper.make_tensor_value_info(values[value].last, proto.FLOAT, ["batch", *shape])
        for value, _, shape, _ in network.inputs
    ]
    outputs = []
    for value, name in zip(network.outputs, network.output_names):
        builder.path = ""
        # Under a name of its own, even if it is an input, or if two outputs are one tensor.
        made = builder.last(values[value])
        name = builder.name(name)
        builder.nodes.append(helper.make_node("Identity", [made], [name], name=f"{name}/Identity"))
        outputs.append(helper.make_tensor_value_info(name, proto.FLOAT, [None] * values[value].rank))
    made = helper.make_graph(builder.nodes, final.name, inputs, outputs, list(builder.constants.values()))
    model = helper.make_model(made, producer_name="fliqs_tf", opset_imports=[helper.make_opsetid("", builder.opset)])
    model.ir_version = builder.ir_version
    helper.set_model_props(model, {"fliqs_tf.recipe": json.dumps(deployed.recipe(graph).to_dict())})
    import_onnx().checker.check_model(model)
    return model


def _convert(builder: OnnxBuilder, graph: ModelGraph, in_float: bool = False) -> dict[int, Value]:
    """Converts every call; gives the values of the network as tensors of the file."""
    values = {}
    for value, name, shape, dtype in graph.dataflow.inputs:
        if dtype != "float32":
            raise ValueError(
                f"Model {graph.model.name!r} has the input {name!r} of {dtype}; ONNX files take float32: make it "
                f"float32, or take fliqs_tf.export.packed."
            )
        values[value] = Value(1 + len(shape), last=builder.name(name))
    for call in graph.dataflow.calls:
        builder.path = call.path
        layer = walking.unwrapped(call.layer) if in_float else call.layer
        values[call.output] = _converted(builder, call, layer, [values[v] for v in call.inputs])
    return values


def _converted(builder: OnnxBuilder, call: dataflow.Call, layer: keras.layers.Layer, inputs: list[Value]) -> Value:
    inner = layer.quantized_layer if isinstance(layer, Quantized) else layer
    convert = CONVERTERS.get(type(inner))
    if convert is None and call.constants == () and not isinstance(inner, _LAYERS.Layer):
        convert = FUNCTIONS.get(type(inner).__name__)  # x + y under Keras 3
    if isinstance(layer, ActivationQuantizer):
        return quantized_input(builder, inputs[0], layer)
    if convert is None or call.constants:
        known = sorted({kind.__name__ for kind in CONVERTERS})
        raise ValueError(
            f"Layer {call.path!r} of class {type(walking.unwrapped(layer)).__name__} is not supported by the ONNX "
            f"exporter. Supported: {', '.join(known)}. fliqs_tf.export.packed takes any layer."
        )
    if getattr(inner, "compute_dtype", "float32") != "float32":
        raise ValueError(
            f"Layer {call.path!r} computes in {inner.compute_dtype}; the ONNX exporter supports only float32."
        )
    if getattr(inner, "data_format", "channels_last") == "channels_first":
        raise ValueError(f"Layer {call.path!r} has channels first; the ONNX exporter supports only channels last.")
    if not layer_types.kernels(inner):
        return convert(builder, inner, *inputs)
    weights: dict[str, Weight] = {}
    (x,) = inputs
    middle = None
    if isinstance(layer, Quantized):
        weights.update(deployed.quantized_weights(call.path, layer))
        if layer.activation_quantizer is not None:
            x = quantized_input(builder, x, layer.activation_quantizer)
        middle = layer.middle_quantizer
    else:
        for kernel in layer_types.kernels(inner):
            weights[kernel.attribute] = np.asarray(getattr(inner, kernel.attribute), np.float32)
    result = convert(builder, inner, x, weights, middle)
    return activation(builder, inner.activation, result)
