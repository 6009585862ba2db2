"""Recipes for ai-edge-quantizer, held against the tool itself."""

import json
import os

import ai_edge_litert.schema_py_generated as schema
import numpy as np
import pytest
from ai_edge_quantizer import quantizer as tool

import fliqs_tf
from fliqs_tf import export
from fliqs_tf._keras import keras
from fliqs_tf.export import deployed
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.numerics import encoding

L = keras.layers
FORMATS = {"conv": "INT4", "conv_1": "INT8", "dense": "INT4", "dense_1": "BF16", "dense_1_1": "INT8"}


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    keras.utils.set_random_seed(0)


def network(norm: bool):
    """Names that are parts of one another; a channel that is all zero, and hard weights."""
    inputs = keras.Input((8, 8, 16), name="image")
    x = L.Conv2D(24, 3, name="conv")(inputs)
    x = L.ReLU(name="relu")(L.BatchNormalization(name="norm")(x) if norm else x)
    x = L.Flatten(name="flatten")(L.DepthwiseConv2D(3, name="conv_1")(x))
    x = L.Dense(8, name="dense_1")(L.Dense(8, name="dense")(x))
    model = keras.Model(inputs, L.Dense(8, name="dense_1_1")(x), name="net")
    rng = np.random.default_rng(0)
    for weight in model.weights:
        value = rng.standard_normal(weight.shape).astype(np.float32)
        weight.assign(np.abs(value) + 0.1 if "variance" in weight.name else value)
    kernel = model.get_layer("conv").kernel
    kernel.assign(kernel * np.r_[0, np.ones(22), 1e4].astype(np.float32))
    return model


def integer_weights(content: bytes) -> dict:
    """{name: (values of the codes as ints, scales)} of the integer weights of a `.tflite` file."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    found = {}
    for tensor in model.subgraphs[0].tensors:
        name = tensor.name.decode()
        bits = {schema.TensorType.INT8: 8, schema.TensorType.INT4: 4}.get(tensor.type)
        if not name.endswith("/weights") or bits is None:
            continue
        raw = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
        found[name.removesuffix("/weights")] = (
            encoding.decode(encoding.unpack(raw, bits, int(np.prod(tensor.shape))), f"INT{bits}").reshape(tensor.shape),
            np.asarray(tensor.quantization.scale),
        )
    return found


def quantized_by_the_tool(tmp_path, model, recipe):
    export.tflite(fliqs_tf.apply(model, "FP32"), tmp_path / "float.tflite")
    export.aeq_recipe(recipe, tmp_path / "aeq.json")
    program = tool.Quantizer(str(tmp_path / "float.tflite"), str(tmp_path / "aeq.json"))
    calibration = None
    if program.need_calibration:
        images = np.random.default_rng(1).standard_normal((4, 8, 8, 16)).astype(np.float32)
        calibration = program.calibrate({"serving_default": [{"image": images}]})
    return integer_weights(bytes(program.quantize(calibration).quantized_model))


def ours(model, recipe) -> dict:
    """The same, of our layers, in TFLite's order of axes."""
    final = fliqs_tf.apply(model, recipe)
    order = {"conv": (3, 0, 1, 2), "conv_1": (3, 0, 1, 2), "dense": (1, 0), "dense_1_1": (1, 0)}
    found = {}
    for path, layer in deployed.quantized_layers(ModelGraph(final)):
        (weight,) = deployed.quantized_weights(path, layer).values()
        if weight.format.is_integer:
            found[path] = (weight.values.transpose(order[path]), weight.scale.ravel())
    return found


@pytest.mark.parametrize("tensors", ["together", "weights"])
def test_the_tool_finds_the_integer_weights_of_our_layers(tmp_path, tensors):
    model, recipe = network(norm=False), fliqs_tf.Recipe(FORMATS, tensors)
    found, expected = quantized_by_the_tool(tmp_path, model, recipe), ours(model, recipe)
    assert list(found) == list(expected) == ["conv", "conv_1", "dense", "dense_1_1"]
    for layer, (values, scale) in expected.items():
        np.testing.assert_array_equal(found[layer][0], values)
        largest = 7 if FORMATS[layer] == "INT4" else 127
        # Of a channel that is all zero it makes the amax 1e-9.
        np.testing.assert_array_equal(found[layer][1], np.maximum(scale, np.float32(1e-9) / np.float32(largest)))


def test_normalization_that_is_folded_may_move_a_code_next_to_a_middle(tmp_path):
    model = network(norm=True)
    recipe = fliqs_tf.Recipe(FORMATS, "weights")
    (found, _), (expected, _) = quantized_by_the_tool(tmp_path, model, recipe)["conv"], ours(model, recipe)["conv"]
    signs = np.sign(model.get_layer("norm").gamma).reshape(-1, 1, 1, 1)
    assert (signs < 0).any()
    difference = np.abs(found - signs * expected)
    assert difference.max() <= 1 and (difference == 0).mean() > 0.999


def test_entries_by_hand(tmp_path):
    recipe = fliqs_tf.Recipe({"net/conv.1": "INT4", "fc": "FP32"}, "weights")
    export.aeq_recipe(recipe, tmp_path / "aeq.json")
    assert json.loads((tmp_path / "aeq.json").read_text()) == [
        {
            "regex": r"(^|[/;])net/conv\.1([/;]|$)",
            "operation": "*",
            "algorithm_key": "min_max_uniform_quantize",
            "op_config": {
                "weight_tensor_config": {
                    "num_bits": 4,
                    "symmetric": True,
                    "granularity": "CHANNELWISE",
                    "dtype": "INT",
                },
                "compute_precision": "FLOAT",
                "explicit_dequantize": True,
                "skip_checks": False,
                "min_weight_elements": 0,
            },
        }
    ]
    export.aeq_recipe(
        fliqs_tf.Recipe({"fc/weights": "INT8", "fc/activations": "INT5"}, "separate"), tmp_path / "b.json"
    )
    (entry,) = json.loads((tmp_path / "b.json").read_text())
    config = {"num_bits": 8, "symmetric": True, "granularity": "TENSORWISE", "dtype": "INT"}
    assert entry["op_config"]["activation_tensor_config"] == config
    assert entry["op_config"]["compute_precision"] == "INTEGER"


@pytest.mark.parametrize("fmt", ["INT5", "E4M3", "INT16"])
def test_formats_that_the_tool_does_not_have_are_refused(tmp_path, fmt):
    with pytest.raises(
        ValueError, match=f"Layer 'b' has {fmt} weights and {fmt} inputs, but ai-edge-quantizer supports only INT4"
    ):
        export.aeq_recipe(fliqs_tf.Recipe({"a": "INT4", "b": fmt}), tmp_path / "aeq.json")
    assert os.listdir(tmp_path) == []
