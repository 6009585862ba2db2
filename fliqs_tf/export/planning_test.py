"""Plans, by hand; and that a search for a target takes only what runs there."""

import pytest

import fliqs_tf
from fliqs_tf import export
from fliqs_tf._keras import keras

L = keras.layers


def network():
    inputs = keras.Input((8, 8, 4), name="image")
    x = L.Conv2D(4, 3, name="conv")(inputs)
    x = L.DepthwiseConv2D(3, name="depthwise")(x)
    x = L.Conv2D(4, 1, groups=2, name="groups")(x)
    x = L.LSTM(5, name="memory")(L.Reshape((-1, 4), name="rows")(x))
    return keras.Model(inputs, L.Dense(3, name="fc")(x), name="net")


def table(plan):
    return {(row.layer, row.weights, row.inputs): row.run.how for row in plan.rows}


def test_of_a_recipe():
    recipe = fliqs_tf.Recipe({"a": "INT8", "b": "INT5", "c": "E4M3"}, info={"float_layers": ["d"]})
    assert table(export.plan(recipe, "tflite")) == {
        ("a", "INT8", "INT8"): "native",
        ("b", "INT5", "INT5"): "emulated",
        ("c", "E4M3", "E4M3"): "cannot",
        ("d", "FP32", "FP32"): "native",
    }
    assert [row.layer for row in export.plan(recipe, "tflite").unsupported] == ["c"]
    assert export.plan(recipe, "packed").unsupported == ()
    weights = fliqs_tf.Recipe({"a": "INT4"}, "weights")
    assert table(export.plan(weights, "tflite")) == {("a", "INT4", "FP32"): "emulated"}
    apart = fliqs_tf.Recipe({"a/weights": "E3M2", "a/activations": "E4M3"}, "separate")
    assert table(export.plan(apart, "onnx")) == {("a", "E3M2", "E4M3"): "emulated"}


def test_of_a_model_that_is_to_be_searched():
    """Every choice that its search has."""
    searched = fliqs_tf.wrap(network(), ["INT4", "INT8", "E4M3"], [("fc", None)])
    assert table(export.plan(searched, "tflite")) == {
        ("conv", "INT4", "INT4"): "emulated",
        ("conv", "INT8", "INT8"): "native",
        ("conv", "E4M3", "E4M3"): "cannot",
        ("depthwise", "INT4", "INT4"): "emulated",
        ("depthwise", "INT8", "INT8"): "native",
        ("depthwise", "E4M3", "E4M3"): "cannot",
        ("groups", "INT4", "INT4"): "cannot",
        ("groups", "INT8", "INT8"): "cannot",
        ("groups", "E4M3", "E4M3"): "cannot",
        ("memory", "", ""): "cannot",
        ("fc", "FP32", "FP32"): "native",
    }
    apart = fliqs_tf.wrap(network(), ["INT4", "INT8"], [("groups|conv|depth", None)], tensors="separate")
    rows = export.plan(apart, "onnx").rows
    assert [(r.weights, r.inputs) for r in rows if r.layer == "fc"] == [
        ("INT4", "INT4"),
        ("INT4", "INT8"),
        ("INT8", "INT4"),
        ("INT8", "INT8"),
    ]


def test_of_a_deployed_model():
    plan = export.plan(fliqs_tf.apply(network(), "INT4"), "tflite")
    by_layer = {row.layer: row for row in plan.rows}
    assert list(by_layer) == ["conv", "depthwise", "groups", "memory", "fc"]
    assert by_layer["depthwise"].run.why.startswith("weights stored in int8: DepthwiseConv2D has no int4 kernel")
    assert "'groups' of class Conv2D cannot be exported to TFLite: grouped convolutions" in by_layer["groups"].run.why
    assert "'memory' of class LSTM" in by_layer["memory"].run.why
    onnx = {row.layer: row.run for row in export.plan(fliqs_tf.apply(network(), "INT4"), "onnx").rows}
    assert onnx["groups"].how == "native"
    assert onnx["memory"].why == "the ONNX exporter does not support LSTM; fliqs_tf.export.packed takes any layer"
    assert {row.run.how for row in export.plan(fliqs_tf.apply(network(), "E3M6"), "packed").rows} == {"native"}


def test_of_a_hardware_profile():
    recipe = fliqs_tf.Recipe({"a": "E4M3", "b": "E3M2"})
    plan = export.plan(recipe, "nvidia_h100_sxm")
    assert table(plan) == {("a", "E4M3", "E4M3"): "native", ("b", "E3M2", "E3M2"): "cannot"}
    assert plan.target == fliqs_tf.Profile.load("nvidia_h100_sxm").name
    assert plan.unsupported[0].run.why.startswith("It has no E3M2 weights, only")
    assert export.plan(recipe, fliqs_tf.Profile.load("nvidia_h100_sxm")) == plan


def test_it_prints_as_a_table():
    text = str(export.plan(fliqs_tf.Recipe({"conv": "INT8", "fc": "INT5"}), "onnx"))
    assert text.splitlines()[0].split() == ["layer", "class", "weights", "inputs", "on", "onnx", "how"]
    assert text.splitlines()[2].split() == ["conv", "INT8", "INT8", "native"]
    assert "weights in INT8; inputs in INT8, cut off where INT5 ends" in text.splitlines()[3]


def test_what_is_refused():
    with pytest.raises(
        ValueError, match=r"Targets are tflite, onnx, packed and hardware profiles\. Unknown profile 'x'"
    ):
        export.plan(fliqs_tf.Recipe({"a": "INT8"}), "x")
    with pytest.raises(TypeError, match="for a recipe or a tf.keras model, got str"):
        export.plan("INT8", "onnx")


# ---- searching for a target


def dense():
    inputs = keras.Input((4,))
    return keras.Model(inputs, L.Dense(3, name="b")(L.Dense(4, name="a")(inputs)), name="net")


def test_a_search_for_a_target_leaves_out_what_does_not_run_there():
    assert fliqs_tf.wrap(dense(), "MIXED", target="tflite").decisions[0].options == ("INT4", "INT8")
    assert fliqs_tf.wrap(dense(), ["E3M2", "E4M3", "INT8"], target="onnx").decisions[0].options == ("E4M3", "INT8")
    with pytest.raises(ValueError, match="None of the formats E3M2, E2M3 runs on onnx"):
        fliqs_tf.wrap(dense(), ["E3M2", "E2M3"], target="onnx")
    with pytest.raises(ValueError, match="None of E2M1, E4M3 has integer kernels"):
        fliqs_tf.wrap(dense(), ["E2M1", "E4M3"], target="tflite")
    with pytest.raises(ValueError, match="Layer 'b' cannot have E3M2 weights and E3M2 inputs: ONNX has no type"):
        fliqs_tf.wrap(dense(), ["INT4", "INT8"], [("b", ["INT8", "E3M2"])], target="onnx")
    with pytest.raises(ValueError, match="Unknown target 'coreml'"):
        fliqs_tf.wrap(dense(), ["INT4", "INT8"], target="coreml")


def test_a_search_for_onnx_refuses_layers_without_a_form_before_training():
    inputs = keras.Input((8, 3))
    model = keras.Model(inputs, L.LSTM(4, name="cell")(L.Dense(3)(inputs)))
    with pytest.raises(
        ValueError, match="Layer 'cell' cannot be exported to 'onnx': the ONNX exporter does not support LSTM; .*packed"
    ):
        fliqs_tf.wrap(model, ["INT4", "INT8"], target="onnx")
    assert fliqs_tf.wrap(model, ["INT4", "INT8"], target="packed").decisions
