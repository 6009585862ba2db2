"""Biases as the int32 of a file can be: in the Keras model, before the file is written."""

from __future__ import annotations

import numpy as np

from fliqs_tf._keras import float_value
from fliqs_tf.export import boundaries, deployed, lowering
from fliqs_tf.export.steps import ones
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized


def settle(graph: ModelGraph) -> None:
    """Moves biases to the multiples of (input scale * weight scale) that int32 biases can be.

    By at most half of one, which is far less than quantization moves them about; but left as they are, rounding them in
    the file would show in outputs. Changes the biases of layers and the betas of batch normalization in place. Inputs
    of layers in float formats are rounded no more: the file computes these in float32.

    Args:
      graph: Of a deployed model with boundary quantizers.
    """
    for _, layer in graph.of_type(Quantized):
        for quantizer in layer.activation_quantizers:
            if not boundaries.is_integer(deployed.format_of(quantizer)):
                quantizer.pass_through()
    network = lowering.steps(graph)
    activation_scales = {step.output: step.options["scale"] for step in network.steps if step.kind == "quantize"}
    moves: dict[int, tuple] = {}  # variable by id -> it, and how far each call of its layer wants it moved
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
