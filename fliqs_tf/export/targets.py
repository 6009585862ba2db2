"""What each target of `fliqs_tf.export` does with a format, as pure functions over formats.

* native: the target has the format.
* emulated: it computes the same, or what the reason given says, in a wider format.
* cannot: the exporter refuses.
"""

from __future__ import annotations

import dataclasses

from fliqs_tf.numerics.formats import Format
from fliqs_tf.numerics.space import Space, SpaceLike

NATIVE, EMULATED, CANNOT = "native", "emulated", "cannot"
TARGETS = ("tflite", "onnx", "packed")


@dataclasses.dataclass(frozen=True)
class Run:
    """How a target runs something.

    Attributes:
      how: "native", "emulated" or "cannot".
      why: How it is emulated, or why it cannot run; "" if there is nothing to say.
    """

    how: str
    why: str = ""


# ---- TFLite: LiteRT's kernels

_INT4_KINDS = ("Conv2D", "Dense", "EinsumDense")  # CONV_2D and FULLY_CONNECTED; all others have int8 weights only


def _tflite(weights: Format, inputs: Format, kind: str | None) -> Run:
    for fmt in (weights, inputs):
        if fmt.is_scaled and not fmt.is_integer:
            return Run(CANNOT, f"TFLite has no kernels for {fmt}; fliqs_tf.export.packed writes any format")
    said = []
    if not _is_int8(weights) or not _is_int8(inputs):
        if weights.name == inputs.name == "FP32":
            return Run(NATIVE)
        if _is_int8(weights):
            said.append("weights stored in int8, multiplied in float32")
        elif weights.name != "FP32":
            said.append(f"{weights} weights stored in float32")
        if inputs.name != "FP32":
            said.append(f"inputs in float32, not rounded to {inputs}")
        return Run(EMULATED, "; ".join(said))
    if weights.bits <= 4 and kind is not None and kind not in _INT4_KINDS:
        said.append(f"weights stored in int8: {kind} has no int4 kernel")
    elif weights.name not in ("INT4", "INT8"):
        said.append(f"weights stored in int{4 if weights.bits <= 4 else 8}")
    if inputs.bits < 8:
        said.append(f"inputs in int8, cut off where {inputs} ends")
    return Run(EMULATED, "; ".join(said)) if said else Run(NATIVE)


def _is_int8(fmt: Format) -> bool:
    return fmt.is_integer and fmt.bits <= 8


# ---- ONNX: types of QuantizeLinear and DequantizeLinear

ONNX_TYPES = {
    "INT4": "INT4",
    "INT8": "INT8",
    "INT16": "INT16",
    "E4M3": "FLOAT8E4M3FN",
    "E5M2": "FLOAT8E5M2",
    "E2M1": "FLOAT4E2M1",
}


def onnx_weights(fmt: Format) -> str | None:
    """The format whose ONNX type stores weights of a format, because it has all of its values; None if none has."""
    if fmt.name in ("BF16", "FP32") or fmt.name in ONNX_TYPES:
        return fmt.name
    if fmt.is_integer:
        return next(f"INT{bits}" for bits in (4, 8, 16) if fmt.bits <= bits)
    return next((name for name in ("E4M3", "E5M2") if _is_part_of(fmt, Format(name))), None)


def onnx_inputs(fmt: Format) -> str | None:
    """The format whose QuantizeLinear rounds inputs as a format does, clipping aside; None if none does."""
    return onnx_weights(fmt) if fmt.is_integer or fmt.name in ONNX_TYPES or not fmt.is_scaled else None


def _is_part_of(fmt: Format, other: Format) -> bool:
    lowest, others = fmt.min_exponent - fmt.mantissa_bits, other.min_exponent - other.mantissa_bits
    return fmt.mantissa_bits <= other.mantissa_bits and lowest >= others and fmt.max <= other.max


def _onnx(weights: Format, inputs: Format, kind: str | None) -> Run:
    said = []
    for fmt, storage, what in ((weights, onnx_weights(weights), "weights"), (inputs, onnx_inputs(inputs), "inputs")):
        if storage is None:
            return Run(CANNOT, f"ONNX has no type for {what} in {fmt}; fliqs_tf.export.packed writes any format")
        if storage != fmt.name:
            said.append(
                f"{what} in {ONNX_TYPES[storage]}" + (f", cut off where {fmt} ends" if what == "inputs" else "")
            )
    if said:
        return Run(EMULATED, "; ".join(said))
    return Run(NATIVE, "not by onnxruntime's CPU provider" if "E2M1" in (weights.name, inputs.name) else "")


# ---- any


def _packed(weights: Format, inputs: Format, kind: str | None) -> Run:
    return Run(NATIVE)


_TABLE = {"tflite": _tflite, "onnx": _onnx, "packed": _packed}


def runs(weights: Format | str, inputs: Format | str, target: str, kind: str | None = None) -> Run:
    """How a target runs a layer whose weights and inputs have given formats.

    >>> runs("INT8", "INT8", "tflite")
    Run(how='native', why='')
    >>> runs("INT5", "INT8", "tflite").why
    'weights stored in int8'

    Args:
      weights, inputs: Formats or their names; "FP32" for what stays in float.
      target: "tflite", "onnx" or "packed".
      kind: Name of the layer's class, "DepthwiseConv2D". None: any.

    Raises:
      ValueError: Unknown target or format.
    """
    if target not in _TABLE:
        raise ValueError(f"Unknown target {target!r}; known: {', '.join(TARGETS)}.")
    return _TABLE[target](Format(weights), Format(inputs), kind)


def supported_formats(space: SpaceLike, target: str, tensors: str = "together") -> Space:
    """The formats of a space that a target runs, natively or emulated.

    Args:
      space: Anything that `Space` takes.
      target: "tflite", "onnx" or "packed".
      tensors: As for `fliqs_tf.wrap`: with "weights" inputs are in float, otherwise in the same format.

    Raises:
      ValueError: Unknown target, or the target runs none of the formats.
    """
    formats = Space(space).formats
    kept = [f for f in formats if runs(f, "FP32" if tensors == "weights" else f, target).how != CANNOT]
    if not kept:
        reason = runs(formats[0], "FP32" if tensors == "weights" else formats[0], target).why
        raise ValueError(f"None of the formats {', '.join(f.name for f in formats)} runs on {target}: {reason}.")
    return Space(kept)
