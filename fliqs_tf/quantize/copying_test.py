"""Copies of a searched network in fixed formats."""

import numpy as np
import pytest

from fliqs_tf import wrapping
from fliqs_tf._keras import keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.quantize import copying
from fliqs_tf.quantize.decisions import open_decisions
from fliqs_tf.quantize.network import quantized_network
from fliqs_tf.quantize.network_test import FORMATS, choose, convolutional, dense_chain, outputs, randomized
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.quantize.rules import Rule

L = keras.layers


def formats_of(network):
    """{layer: (weights, input)}"""
    return {
        path: (
            *layer.weight_quantizers[0].space.names,
            *(layer.activation_quantizer.space.names if layer.activation_quantizer is not None else ("FP32",)),
        )
        for path, layer in ModelGraph(network).layers
        if isinstance(layer, Quantized)
    }


KINDS = {
    "together": (
        Recipe({"a": "INT8", "b": "INT4"}),
        {},
        {"a": ("INT8", "INT8"), "b": ("INT4", "INT4")},
    ),
    "weights": (
        Recipe({"a": "INT8", "b": "INT4"}, "weights"),
        {"tensors": "weights"},
        {"a": ("INT8", "FP32"), "b": ("INT4", "FP32")},
    ),
    "separate": (
        Recipe(
            {"a/weights": "INT4", "a/activations": "INT8", "b/weights": "INT8", "b/activations": "INT4"}, "separate"
        ),
        {"tensors": "separate"},
        {"a": ("INT4", "INT8"), "b": ("INT8", "INT4")},
    ),
    "tied": (
        Recipe({"all": "INT4"}, layers={"all": ("a", "b")}),
        {"rules": [Rule("", tie="all")]},
        {"a": ("INT4", "INT4"), "b": ("INT4", "INT4")},
    ),
    "tied and separate": (
        Recipe(
            {"all/weights": "INT4", "all/activations": "INT8"},
            "separate",
            {"all/weights": ("a", "b"), "all/activations": ("a", "b")},
        ),
        {"rules": [Rule("", tie="all")], "tensors": "separate"},
        {"a": ("INT4", "INT8"), "b": ("INT4", "INT8")},
    ),
    "a layer in float": (
        Recipe({"b": "INT4"}, info={"float_layers": ["a"]}),
        {"rules": [("a", None)]},
        {"b": ("INT4", "INT4")},
    ),
}


@pytest.mark.parametrize("recipe, options, expected", KINDS.values(), ids=KINDS)
def test_recipes_of_every_kind(recipe, options, expected):
    """Applied to the float model, and fixed in the searched one: the same formats, decisions and outputs."""
    model = randomized(dense_chain("a", "b"))
    applied = wrapping.apply(model, recipe)
    searched = quantized_network(ModelGraph(model), FORMATS, **options).model
    fixed = copying.fixed(ModelGraph(searched), recipe.formats).model
    choose(searched, recipe.formats)
    for network in (applied, fixed):
        assert formats_of(network) == expected
        assert open_decisions(ModelGraph(network)) == []
        np.testing.assert_array_equal(outputs(network), outputs(searched))
    for path in expected:
        a, b = applied.get_layer(path), fixed.get_layer(path)
        assert a.weight_decision == b.weight_decision
        if a.activation_quantizers:
            assert a.activation_decision == b.activation_decision


def test_fixing_keeps_weights_ranges_and_what_was_fixed_already():
    model = randomized(convolutional())
    network = quantized_network(ModelGraph(model), FORMATS, rules=[("conv", ["E4M3"])]).model
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    network(x, training=True)
    choose(network, {"fc": "INT4"})
    fixed = copying.fixed(ModelGraph(network), {"fc": "INT4"}).model
    assert formats_of(fixed) == {"conv": ("E4M3", "E4M3"), "fc": ("INT4", "INT4")}
    np.testing.assert_array_equal(fixed(x), network(x))
    for path in ("conv", "fc"):
        a = fixed.get_layer(path).activation_quantizer.range
        np.testing.assert_array_equal(a.numpy(), network.get_layer(path).activation_quantizer.range.numpy())


def test_copies_and_files_keep_what_is_set_on_the_quantizers(tmp_path):
    network = quantized_network(ModelGraph(convolutional()), ["INT4", "INT8"]).model
    quantizers = [q for _, layer in ModelGraph(network).layers for q in getattr(layer, "activation_quantizers", ())]
    for i, quantizer in enumerate(quantizers):
        quantizer.clip = 1 - i / 8
    fixed = copying.fixed(
        ModelGraph(network), {path: "INT4" for path, _ in ModelGraph(convolutional()).with_kernels}
    ).model
    fixed.save(tmp_path / "fixed.keras")
    for copy in (fixed, keras.models.load_model(tmp_path / "fixed.keras")):
        copies = [q for _, layer in ModelGraph(copy).layers for q in getattr(layer, "activation_quantizers", ())]
        assert [q.clip for q in copies] == [1 - i / 8 for i in range(len(quantizers))] and len(copies) > 1
