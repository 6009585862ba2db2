"""What targets do with formats: by hand, and held against the exporters themselves."""

import re

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf import export
from fliqs_tf._keras import keras
from fliqs_tf.export import targets
from fliqs_tf.numerics.formats import Format

L = keras.layers
FORMATS = ["INT2", "INT4", "INT5", "INT8", "INT12", "E2M1", "E3M2", "E4M3", "E5M2", "E3M6", "BF16", "FP32"]


@pytest.mark.parametrize(
    "weights, inputs, target, kind, how, why",
    [
        ("INT8", "INT8", "tflite", "DepthwiseConv2D", "native", ""),
        ("INT4", "INT8", "tflite", "Conv2D", "native", ""),
        ("INT4", "INT8", "tflite", "DepthwiseConv2D", "emulated", "weights stored in int8: Depthwise.* no int4 kernel"),
        ("INT2", "INT8", "tflite", "Dense", "emulated", "weights stored in int4"),
        ("INT5", "INT4", "tflite", None, "emulated", "weights stored in int8; inputs in int8, cut off where INT4 ends"),
        ("INT4", "FP32", "tflite", None, "emulated", "weights stored in int8, multiplied in float32"),
        ("BF16", "BF16", "tflite", None, "emulated", "BF16 weights stored in float32; .*not rounded to BF16"),
        ("FP32", "FP32", "tflite", None, "native", ""),
        ("E4M3", "E4M3", "tflite", None, "cannot", "TFLite has no kernels for E4M3; fliqs_tf.export.packed writes any"),
        ("E4M3", "E5M2", "onnx", None, "native", ""),
        ("INT5", "INT8", "onnx", None, "emulated", "weights in INT8"),
        ("E3M2", "E4M3", "onnx", None, "emulated", "weights in FLOAT8E4M3FN"),
        ("E2M1", "E2M1", "onnx", None, "native", "not by onnxruntime's CPU provider"),
        ("E4M3", "E3M2", "onnx", None, "cannot", "ONNX has no type for inputs in E3M2"),
        ("E3M2", "INT13", "packed", None, "native", ""),
    ],
)
def test_by_hand(weights, inputs, target, kind, how, why):
    run = targets.runs(weights, inputs, target, kind)
    assert run.how == how and re.fullmatch(why + (".*" if why else ""), run.why)


def one_layer(weights, inputs):
    x = keras.Input((4, 4, 2))
    layer = fliqs_tf.Quantized(L.Conv2D(3, 1, name="conv"), [weights], [inputs], name="conv")
    model = keras.Model(x, layer(x), name="net")
    layer.activation_quantizer.range.assign([1.0, 1.0])
    return model


@pytest.mark.parametrize("target", targets.TARGETS)
def test_an_exporter_refuses_what_the_table_says_it_cannot(tmp_path, target):
    """One form of truth for the plan and for the file."""
    pairs = [(fmt, fmt) for fmt in FORMATS]
    if target != "packed":
        pairs += [(fmt, "INT8") for fmt in FORMATS] + [("INT8", fmt) for fmt in FORMATS]
    for weights, inputs in pairs:
        model = one_layer(weights, inputs)
        options = {"representative": [np.zeros((1, 4, 4, 2), np.float32)]} if target == "tflite" else {}
        try:
            getattr(export, target)(model, tmp_path / "file", **options)
            refused = ""
        except ValueError as error:
            refused = str(error)
        run = targets.runs(weights, inputs, target, "Conv2D")
        assert (run.how == "cannot") == bool(refused), (weights, inputs, run, refused)
        assert "packed" in refused or not refused


@pytest.mark.parametrize("name", [f"E{x}M{y}" for x in range(1, 6) for y in range(11)])
def test_a_type_that_carries_weights_has_all_their_values(name):
    values = set(Format(name).values().tolist())
    has = [other for other in ("E4M3", "E5M2") if values <= set(Format(other).values().tolist())]
    assert targets.onnx_weights(Format(name)) == (name if name == "E2M1" else has[0] if has else None)


def test_supported_formats():
    assert targets.supported_formats("MIXED", "tflite").names == ("INT4", "INT8", "BF16")
    assert targets.supported_formats("MIXED", "onnx").names == fliqs_tf.Space("MIXED").names
    assert targets.supported_formats(["E3M2", "E4M3"], "onnx").names == ("E4M3",)
    assert targets.supported_formats(["E3M2", "E4M3"], "onnx", "weights").names == ("E3M2", "E4M3")
    with pytest.raises(
        ValueError, match="None of the formats E2M1, E4M3 runs on tflite: TFLite has no kernels for E2M1"
    ):
        targets.supported_formats(["E2M1", "E4M3"], "tflite")
    with pytest.raises(ValueError, match="Unknown target 'coreml'; known: tflite, onnx, packed"):
        targets.runs("INT8", "INT8", "coreml")
