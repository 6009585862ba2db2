"""Boundary quantizers: the int8 tensors between the layers of an integer network, as layers.

The search gives a format to the input of every quantized layer. Integer kernels (LiteRT's) also pass int8 tensors to
additions, pooling and concatenation, to several layers at once, and out of the network. A boundary quantizer is an
`ActivationQuantizer` of fixed INT8 in such a place: nothing is decided about it, it has a range like any other
activation, and it makes the Keras model compute what the integer network will.

Where a value goes straight into one quantized layer there is none: the layer before writes that layer's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fliqs_tf._keras import keras
from fliqs_tf.graph import copies, dataflow, layer_types, rewriting
from fliqs_tf.graph.commuting import activation, is_activation, is_quantization_invariant
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import ranges, shared_ranges
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import ActivationQuantizer
from fliqs_tf.numerics.formats import Format
from fliqs_tf.numerics.space import Space, SpaceLike
from fliqs_tf.quantize import comparison

_LAYERS = keras.layers
FORMAT = "INT8"
SUFFIX = ranges.SUFFIX

# Layers that compute with integer kernels; additions and products only of two inputs, see `_computes`.
COMPUTING = (
    _LAYERS.BatchNormalization,
    _LAYERS.Add,
    _LAYERS.Multiply,
    _LAYERS.AveragePooling2D,
    _LAYERS.GlobalAveragePooling2D,
)


def fused_values(flow: dataflow.Dataflow) -> set[int]:
    """Values that never exist in an integer network, because the kernel that would make one also does what comes next.

    Layers with kernels absorb a batch normalization behind them; these, a normalization and an addition absorb a ReLU.
    """
    found = set()
    for value, reading in flow.readers.items():
        if value not in flow.makers or len(reading) > 1 or value in flow.outputs:
            continue
        maker, reader = flow.makers[value].layer, reading[0].layer
        linear = bool(layer_types.kernels(getattr(maker, "quantized_layer", maker))) and activation(maker) == "linear"
        if isinstance(reader, _LAYERS.BatchNormalization):
            if linear and has_channels_last(reader, maker):
                found.add(value)
        elif is_activation(reader) and (linear or isinstance(maker, (_LAYERS.BatchNormalization, _LAYERS.Add))):
            found.add(value)
    return found


def has_channels_last(norm: keras.layers.BatchNormalization, maker: keras.layers.Layer) -> bool:
    """True if a batch normalization scales the output channels of the layer before it."""
    axis = norm.axis[0] if isinstance(norm.axis, (list, tuple)) else norm.axis
    maker = getattr(maker, "quantized_layer", maker)
    channels = getattr(maker, "units", getattr(maker, "filters", None))
    if channels is None:  # a depthwise convolution, or EinsumDense
        return isinstance(maker, _LAYERS.DepthwiseConv2D) and axis in (-1, 3)
    return axis == -1 or (axis == 3 and hasattr(maker, "filters")) or (axis == 1 and hasattr(maker, "units"))


def boundary_layers(flow: dataflow.Dataflow) -> list[str]:
    """Paths of the layers behind which an integer network needs a boundary quantizer.

    A value needs one if a kernel with int8 output makes it, unless one quantizer reads it and nothing else does.
    """
    fused, integer = fused_values(flow), _integer_values(flow)
    quantized: dict[int, str] = {}
    ends: dict[int, set[tuple[str, int]]] = {}
    for call in reversed(flow.calls):
        value = call.output
        found = {("output", value)} if value in flow.outputs else set()
        for reader in flow.readers.get(value, ()):
            if isinstance(reader.layer, ActivationQuantizer) or _is_integer(reader.layer, all):
                found.add(("quantizer", reader.output))
            elif value in fused or is_quantization_invariant(reader.layer):
                found |= {("quantizer", reader.output)} if reader.output in quantized else ends[reader.output]
            else:
                found.add(("operation", reader.output))
        ends[value] = found
        is_direct = len(found) == 1 and next(iter(found))[0] == "quantizer"
        is_boundary = isinstance(call.layer, ActivationQuantizer)
        if found and value in integer and value not in fused and not is_direct and not is_boundary:
            quantized[value] = call.path
    # Behind a layer that only moves codes there is no need for a second one.
    for call in flow.calls:
        if (
            call.output in quantized
            and is_quantization_invariant(call.layer)
            and len(call.inputs) == 1
            and call.inputs[0] in quantized
        ):
            del quantized[call.output]
    return list(dict.fromkeys(quantized[call.output] for call in flow.calls if call.output in quantized))


def _integer_values(flow: dataflow.Dataflow) -> set[int]:
    """Values that a kernel with int8 output may make, given the spaces of the quantized layers."""
    found: set[int] = set()
    for call in flow.calls:
        known = [value in found for value in call.inputs]
        if (
            isinstance(call.layer, ActivationQuantizer)
            or _is_integer(call.layer, any)
            or (_computes(call) and all(known))
            or (is_quantization_invariant(call.layer) and any(known))
        ):
            found.add(call.output)
    return found


def _computes(call: dataflow.Call) -> bool:
    return isinstance(call.layer, COMPUTING) and len(call.inputs) <= 2  # there is no kernel for more than two


def is_integer(fmt: Format) -> bool:
    """True for a format that integer kernels compute with: INT2 to INT8."""
    return fmt.is_integer and fmt.bits <= 8


def _is_integer(layer: keras.layers.Layer, how: Callable[[Iterable[bool]], bool]) -> bool:
    """Whether `how` (any, all) of the formats of a quantized layer are integers of 8 bits or fewer."""
    if not isinstance(layer, Quantized) or layer.activation_quantizer is None:
        return False
    spaces = (layer.weight_quantizers[0].space.formats, layer.activation_quantizer.space.formats)
    return all(how(is_integer(fmt) for fmt in space) for space in spaces)


# ---- inserting them


def with_boundary_quantizers(graph: ModelGraph) -> ModelGraph:
    """A copy of a quantized network, with its weights, and with boundary quantizers.

    An activation that integer kernels do not include (softmax) is moved out of its quantized layer into a layer of its
    own, so that there is a place for a boundary quantizer in front of it.

    Args:
      graph: Of a Functional or Sequential model with `Quantized` layers.

    Raises:
      ValueError: A layer has an activation function of the user's own, or the model cannot be copied; names the layer.
    """
    activations = _activations_apart(graph)
    apart = rewriting.with_added(graph, activations) if activations else graph
    added: dict[rewriting.Place, list[keras.layers.Layer]] = {
        path: [ActivationQuantizer([FORMAT], name=rewriting.last_name(path) + SUFFIX)]
        for path in boundary_layers(apart.dataflow)
    }
    copy = rewriting.with_added(apart, added, kinds=shared_ranges.KINDS)
    shared_ranges.link(copy)
    comparison.check(graph, copy)
    return copy


def integer_formats(space: SpaceLike) -> Space:
    """The formats of a space for which there are integer kernels, INT2 to INT8; the others are dropped.

    Raises:
      ValueError: None is left.
    """
    space = Space(space)
    kept = [fmt for fmt in space.formats if is_integer(fmt)]
    if not kept:
        raise ValueError(
            f"None of {', '.join(space.names)} has integer kernels: target='tflite' takes INT2 to INT8. A rule "
            f"(pattern, None) leaves layers in float."
        )
    return Space(kept)


def _activations_apart(graph: ModelGraph) -> dict[rewriting.Place, list[keras.layers.Layer]]:
    found: dict[rewriting.Place, list[keras.layers.Layer]] = {}
    for path, layer in graph.of_type(Quantized):
        if activation(layer) not in ("linear", "relu", "relu6"):
            if copies.is_of_its_user(layer.layer.activation):
                raise ValueError(
                    f"Layer {path!r} has the activation {activation(layer)!r}, which no kernel of TFLite computes: "
                    f"use target=None, or leave the layer in float."
                )
            found[path] = [
                _LAYERS.Activation(layer.layer.activation, name=f"{rewriting.last_name(path)}_{activation(layer)}")
            ]
    return found


# ---- ranges


def calibrate(graph: ModelGraph, representative: Iterable[Any] | None) -> None:
    """Gives a range to the boundary quantizers that have none, from their readers or from data.

    Args:
      graph: What `with_boundary_quantizers` returned.
      representative: Batches of model inputs; None if there are none.

    Raises:
      ValueError: A range is missing and there is no data.
    """
    for boundary, quantizer in shared_ranges.followers(graph):
        if boundary.range[1] == 0 and quantizer.range[1] > 0:
            boundary.range.assign(quantizer.range)
    shared_ranges.link(graph)
    missing = list(ranges.unseen(graph))
    if not missing:
        return
    if representative is None:
        raise ValueError(
            f"{len(missing)} int8 tensors have no range: {', '.join(missing[:6])}{', ...' * (len(missing) > 6)}. "
            f"Give representative=batches of model inputs, or train with fliqs_tf.wrap(..., target='tflite')."
        )
    if not ranges.calibrate(graph, representative):
        raise ValueError("representative holds no batch.")
