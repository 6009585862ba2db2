"""Biases that the int32 of a file can hold, in the Keras model, before the file is written."""

from __future__ import annotations

import numpy as np

from fliqs_tf._keras import float_value
from fliqs_tf.export import boundaries, deployed, lowering
from fliqs_tf.export.steps import ones
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized


def round_to_int32(graph: ModelGraph) -> None:
    """Moves biases to multiples of (input scale * weight scale), which is what int32 biases are.

    Each moves by at most half a multiple. That is far less than quantization changes an output by; but if only the file
    rounded its biases, its outputs would differ. Changes the biases of layers and the betas of batch normalization in
    place. Inputs of layers in float formats are no longer rounded: the file computes these layers in float32.

    Args:
      graph: Of a deployed model with boundary quantizers.
    """
    for _, layer in graph.of_type(Quantized):
        for quantizer in layer.activation_quantizers:
            if not boundaries.is_integer(deployed.format_of(quantizer)):
                quantizer.pass_through()
    network = lowering.steps(graph)
    activation_scales = {step.output: step.options["scale"] for step in network.steps if step.kind == "quantize"}
    moves: dict[int, tuple] = {}  # id of a variable -> it, and how far each call of its layer would move it
    for step in network.steps:
        if step.shift is None or not all(
            v in activation_scales and boundaries.is_integer(activation_scales[v].format) for v in step.inputs
        ):
            continue
        linear = ones((1, 1), len(step.options["gain"])).then(**step.options) if step.kind == "affine" else step.kernel
        if linear.codes is not None:
            unit = float(activation_scales[step.inputs[0]].int8_scale) * linear.scale
            moved = np.rint(linear.bias / unit) * unit - linear.bias
            moves.setdefault(id(step.shift), (step.shift, []))[1].append(moved)
    for shift, wanted in moves.values():
        if all(np.array_equal(moved, wanted[0]) for moved in wanted):  # else a shared layer at several scales
            shift.assign(
                np.asarray(np.asarray(float_value(shift), np.float64) + wanted[0].reshape(shift.shape), np.float32)
            )
