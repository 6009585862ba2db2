"""Number formats in an ONNX file: weights are codes of an ONNX type, inputs pass through QuantizeLinear.

What a format becomes:

| format | weights | inputs |
|---|---|---|
| INT8, INT16, E4M3, E5M2 | INT8, INT16, FLOAT8E4M3FN, FLOAT8E5M2 | the same |
| INT4 | INT4 | INT4 |
| INT2, INT3; INT5..INT7; INT9..INT15 | INT4; INT8; INT16: the same values | the same, clipped to the range |
| E2M1 | FLOAT4E2M1 (opset 23) | FLOAT4E2M1 |
| other ExMy whose values are among those of E4M3 or E5M2 | FLOAT8E4M3FN, FLOAT8E5M2: the same values | not supported |
| BF16 | BFLOAT16 and a cast | casts |
| FP32 | FLOAT | as they are |

onnxruntime's CPU provider (1.31) runs all of these except FLOAT4E2M1, for which there is ONNX's reference evaluator.
DequantizeLinear gives scale * code in float32, which is what a Keras layer computes with: weights are equal to the bit.
The operations in between are float32 in both, summed in a different order: outputs differ by rounding, and, where a
value lies next to the midpoint between two codes, by one step of an input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from fliqs_tf.export import deployed, targets
from fliqs_tf.export.onnx_graph import OnnxBuilder, Value, import_onnx
from fliqs_tf.layers.quantizers import ActivationQuantizer
from fliqs_tf.numerics.formats import Format

Weight: TypeAlias = deployed.QuantizedWeight | np.ndarray
"""A weight, quantized or in float32."""


def quantized_input(builder: OnnxBuilder, x: Value, quantizer: ActivationQuantizer) -> Value:
    """A value, rounded as a quantizer of a fixed format rounds it.

    Args:
      builder: The file under construction; `builder.path` is the layer, for names and errors.
      x: The value to round.
      quantizer: Its format is fixed, and its range was set by data.

    Returns:
      The rounded value, in the layout of `x`; `x` itself for FP32.

    Raises:
      ValueError: ONNX has no type for the format, or no data has set the range; names the layer.
    """
    fmt = deployed.format_of(quantizer)
    storage = targets.onnx_inputs(fmt)
    if storage is None:
        raise ValueError(
            f"Layer {builder.path!r} has its input in {fmt}, for which ONNX has no type; "
            f"fliqs_tf.export.packed writes it."
        )
    try:
        scale = deployed.input_scale(quantizer)
    except ValueError as error:
        raise ValueError(f"Layer {builder.path!r} cannot be written: {error}.") from None
    if scale is None:  # a cast
        if storage == "FP32":
            return x
        proto = import_onnx().TensorProto
        return builder.each(
            [x],
            lambda name: builder.node("Cast", [builder.node("Cast", [name], to=proto.BFLOAT16)], to=proto.FLOAT),
            x.is_nonnegative,
        )
    scale_name = builder.constant(scale, "input.scale")
    # The type is given by output_dtype and not by a zero point of that type, which would be 0 anyway: with one,
    # onnxruntime 1.31 breaks its own graph where a Transpose follows.
    kind = builder.kind(storage)

    def make(name: str) -> str:
        if _needs_clip(fmt, storage, x):
            bound = np.float32(fmt.max) * scale
            name = builder.node("Clip", [name, builder.constant(-bound, "least"), builder.constant(bound, "most")])
        made = builder.node("QuantizeLinear", [name, scale_name], output_dtype=kind)
        return builder.node("DequantizeLinear", [made, scale_name])

    return builder.each([x], make, x.is_nonnegative)


def _needs_clip(fmt: Format, storage: str, x: Value) -> bool:
    """ONNX's integers reach one code lower than ours, and further still where a wider type stores a format."""
    return fmt.is_integer and (fmt.name != storage or not x.is_nonnegative)


def float_weight(
    builder: OnnxBuilder, weight: Weight, what: str, move: Callable[[np.ndarray], np.ndarray] = lambda k: k
) -> str:
    """A weight as a float32 tensor of the graph.

    Args:
      builder: The file under construction; `builder.path` is the layer, for names and errors.
      weight: The weight as Keras has it.
      what: Name of the weight in the file, after the layer's path: "kernel".
      move: Takes an array from Keras' order of axes to ONNX's; applied to values and scales alike.

    Returns:
      Name of the tensor: a constant, or the output of DequantizeLinear or Cast.

    Raises:
      ValueError: ONNX has no type for the format; names the layer.
    """
    if isinstance(weight, np.ndarray):
        return builder.constant(move(weight), what)
    fmt, values = weight.format, move(weight.values)
    storage = targets.onnx_weights(fmt)
    if storage is None:
        raise ValueError(
            f"Layer {builder.path!r} has its weights in {fmt}, for which ONNX has no type; "
            f"fliqs_tf.export.packed writes it."
        )
    if weight.scale is None:
        made = builder.codes(values, storage, what)
        return made if storage == "FP32" else builder.node("Cast", [made], to=import_onnx().TensorProto.FLOAT)
    scale = move(weight.scale)
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    if len(axes) <= 1:
        axis = axes[0] if axes else 0
        if not axes:  # one channel, or one scale for all
            scale = np.broadcast_to(scale.reshape(()), (values.shape[0],))
        inputs = [builder.codes(values, storage, what), builder.constant(scale.ravel(), f"{what}.scale")]
        return builder.node("DequantizeLinear", inputs, axis=axis)
    # DequantizeLinear takes channels along one axis only: dequantize as a matrix, then restore the shape.
    order = [axis for axis in range(values.ndim) if axis not in axes] + axes
    ordered = values.transpose(order)
    matrix = ordered.reshape(-1, scale.size)
    inputs = [builder.codes(matrix, storage, what), builder.constant(scale.transpose(order).ravel(), f"{what}.scale")]
    made = builder.node("DequantizeLinear", inputs, axis=1)
    made = builder.node("Reshape", [made, builder.constant(np.array(ordered.shape, np.int64))])
    return builder.node("Transpose", [made], perm=np.argsort(order).tolist())
