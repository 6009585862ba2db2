"""From a model to a quantized one: which layers, which tensors, which decision."""

import logging

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf import wrapping
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.numerics.rounding import fake_quant
from fliqs_tf.numerics.space import Space
from fliqs_tf.quantize import copying
from fliqs_tf.quantize.decisions import open_decisions
from fliqs_tf.quantize.network import quantized_network
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.quantize.rules import Rule

L = keras.layers
FORMATS = ["INT4", "INT8"]
OTHER = ["E2M1", "E4M3", "BF16"]


def dense_chain(*names, width=3):
    return keras.Sequential([keras.Input((width,)), *(L.Dense(width, name=name) for name in names)], name="net")


def stages():
    return dense_chain("stage1_a", "stage1_b", "stage2_a", "stage2_b", "head")


def convolutional():
    inputs = keras.Input((8, 8, 3), name="image")
    x = L.Conv2D(4, 3, name="conv")(inputs)
    x = L.ReLU(name="relu")(L.BatchNormalization(name="bn")(x))
    x = L.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, L.Dense(5, name="fc")(x), name="net")


def decided(model, space=FORMATS, **options):
    """{decision: (formats, layers)}"""
    network = quantized_network(ModelGraph(model), space, **options).model
    return {d.name: (d.options, d.layers) for d in open_decisions(ModelGraph(network))}


def randomized(model, seed=0):
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.1, 1, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def outputs(model, seed=0):
    rng = np.random.default_rng(seed)
    return model(tf.constant(rng.standard_normal((4, *model.inputs[0].shape[1:])), tf.float32)).numpy()


def choose(network, formats):
    for decision in open_decisions(ModelGraph(network)):
        for quantizer in decision.quantizers:
            quantizer.choice.assign(decision.options.index(formats[decision.name]))


# ---- decisions


def test_a_decision_per_layer():
    assert decided(dense_chain("a", "b")) == {"a": (("INT4", "INT8"), ["a"]), "b": (("INT4", "INT8"), ["b"])}


def test_one_decision_for_the_model():
    assert decided(dense_chain("a", "b"), granularity="model") == {"model": (("INT4", "INT8"), ["a", "b"])}


def test_weights_only():
    network = quantized_network(ModelGraph(dense_chain("a")), FORMATS, tensors="weights").model
    (decision,) = open_decisions(ModelGraph(network))
    assert (decision.name, len(decision.quantizers)) == ("a", 1)
    assert network.get_layer("a").activation_quantizers == []


def test_weights_and_activations_apart():
    assert decided(dense_chain("a"), tensors="separate") == {
        "a/weights": (("INT4", "INT8"), ["a"]),
        "a/activations": (("INT4", "INT8"), ["a"]),
    }
    assert decided(dense_chain("a", "b"), tensors="separate", granularity="model") == {
        "model/weights": (("INT4", "INT8"), ["a", "b"]),
        "model/activations": (("INT4", "INT8"), ["a", "b"]),
    }


def test_a_decision_sets_weights_and_input():
    network = quantized_network(ModelGraph(randomized(dense_chain("a"))), FORMATS).model
    choose(network, {"a": "INT4"})
    kernel, bias = network.get_layer("a").quantized_layer.get_weights()
    x = tf.constant([[0.3, -1.2, 0.7]])
    by_hand = fake_quant(x, "INT4") @ fake_quant(kernel, "INT4", -1) + bias
    np.testing.assert_array_equal(network(x), by_hand)


def test_a_separable_convolution_is_one_decision_of_four_tensors():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, L.SeparableConv2D(4, 3, name="conv")(inputs))
    (decision,) = open_decisions(quantized_network(ModelGraph(model), FORMATS))
    assert (decision.layers, len(decision.quantizers)) == (["conv"], 4)


# ---- rules


def test_a_rule_restricts():
    assert decided(dense_chain("a", "b"), rules=[("^a$", OTHER)]) == {
        "a": (("E2M1", "E4M3", "BF16"), ["a"]),
        "b": (("INT4", "INT8"), ["b"]),
    }


def test_a_rule_of_one_format_fixes():
    network = quantized_network(ModelGraph(dense_chain("a", "b")), FORMATS, rules=[("a", ["INT8"])]).model
    assert [d.name for d in open_decisions(ModelGraph(network))] == ["b"]
    assert network.get_layer("a").weight_quantizers[0].space == Space(["INT8"])


def test_a_rule_leaves_in_float():
    network = quantized_network(ModelGraph(dense_chain("a", "b")), FORMATS, rules=[("a", None)]).model
    assert [d.name for d in open_decisions(ModelGraph(network))] == ["b"]
    assert type(network.get_layer("a")) is L.Dense


def test_the_last_rule_that_matches_wins():
    rules = [("", None), ("a|b", OTHER), ("b", ["INT4", "BF16"])]
    assert decided(dense_chain("a", "b", "c"), rules=rules) == {
        "a": (("E2M1", "E4M3", "BF16"), ["a"]),
        "b": (("INT4", "BF16"), ["b"]),
    }
    assert decided(dense_chain("a", "b"), rules=[("b", OTHER), ("", None), ("a", FORMATS)]) == {
        "a": (("INT4", "INT8"), ["a"])
    }


def test_a_rule_ties():
    assert decided(stages(), rules=[Rule(r"^(stage\d)_", tie=r"\1")]) == {
        "stage1": (("INT4", "INT8"), ["stage1_a", "stage1_b"]),
        "stage2": (("INT4", "INT8"), ["stage2_a", "stage2_b"]),
        "head": (("INT4", "INT8"), ["head"]),
    }


def test_a_rule_ties_with_formats_of_its_own():
    assert decided(stages(), rules=[Rule("^stage1", OTHER, tie="first"), Rule("^stage2|head", None)]) == {
        "first": (("E2M1", "E4M3", "BF16"), ["stage1_a", "stage1_b"])
    }


def test_tied_layers_may_have_their_tensors_apart():
    assert decided(dense_chain("a", "b"), rules=[Rule("", tie="all")], tensors="separate") == {
        "all/weights": (("INT4", "INT8"), ["a", "b"]),
        "all/activations": (("INT4", "INT8"), ["a", "b"]),
    }


def test_one_decision_for_the_model_but_for_what_rules_say():
    rules = [("a", OTHER), Rule("b|c", ["INT4", "BF16"], tie="pair"), Rule("d", tie="alone")]
    assert decided(dense_chain("a", "b", "c", "d", "e", "f"), granularity="model", rules=rules) == {
        "a": (("E2M1", "E4M3", "BF16"), ["a"]),
        "pair": (("INT4", "BF16"), ["b", "c"]),
        "alone": (("INT4", "INT8"), ["d"]),
        "model": (("INT4", "INT8"), ["e", "f"]),
    }


def test_formats_and_rules_may_be_iterators():
    rules = (rule for rule in [("^a$", (name for name in OTHER)), Rule("b", iter(["INT4", "BF16"]))])
    assert decided(dense_chain("a", "b", "c"), iter(FORMATS), rules=rules) == {
        "a": (("E2M1", "E4M3", "BF16"), ["a"]),
        "b": (("INT4", "BF16"), ["b"]),
        "c": (("INT4", "INT8"), ["c"]),
    }
    wrapped = fliqs_tf.wrap(
        dense_chain("a", "b"), iter(FORMATS), (r for r in [("a", None)]), profile=None, target="onnx", tensors="weights"
    )
    assert [(d.name, d.options) for d in wrapped.decisions] == [("b", ("INT4", "INT8"))]


def test_patterns_search_in_paths():
    inner = dense_chain("a", "b")
    model = keras.Sequential([keras.Input((3,)), inner, L.Dense(3, name="a")])
    assert list(decided(model, rules=[("^net/a$", None)])) == ["net/b", "a"]
    assert list(decided(model, rules=[("^a", None)])) == ["net/a", "net/b"]


# ---- the copy


def test_a_wrapped_model_in_fp32_computes_what_the_model_does():
    model = randomized(convolutional())
    network = quantized_network(ModelGraph(model), ["INT4", "FP32"]).model
    np.testing.assert_array_equal(outputs(network), outputs(model))


def test_the_original_stays_as_it_was():
    model = randomized(convolutional())
    layers, weights, before = list(model.layers), model.get_weights(), outputs(model)
    network = quantized_network(ModelGraph(model), FORMATS).model
    network.compile("sgd", "mse")
    network.fit(np.ones((4, 8, 8, 3)), np.ones((4, 5)), verbose=0)
    assert all(a is b for a, b in zip(model.layers, layers))
    for a, b in zip(model.get_weights(), weights):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(outputs(model), before)
    assert not any(np.array_equal(a, b) for a, b in zip(network.trainable_variables[:1], weights[:1]))


def test_weights_statistics_names_and_what_is_frozen_are_copied():
    model = randomized(convolutional())
    model.get_layer("conv").trainable = False
    network = quantized_network(ModelGraph(model), FORMATS).model
    assert network.name == "net"
    assert [layer.name for layer in network.layers] == [layer.name for layer in model.layers]
    for name in ("bn", "conv", "fc"):
        copied = getattr(network.get_layer(name), "quantized_layer", network.get_layer(name))
        for a, b in zip(copied.get_weights(), model.get_layer(name).get_weights()):
            np.testing.assert_array_equal(a, b)
    assert len(network.trainable_variables) == 4  # gamma, beta, and those of fc


def test_nested_models_and_shared_layers():
    shared = L.Dense(3, name="shared")
    inner = keras.Sequential([keras.Input((3,)), L.Dense(3, name="fc"), shared], name="inner")
    inputs = keras.Input((3,))
    model = randomized(keras.Model(inputs, [shared(inner(inner(inputs))), L.Dense(3, name="fc")(inputs)]))
    network = quantized_network(ModelGraph(model), ["INT4", "FP32"]).model
    found = {d.name: d for d in open_decisions(ModelGraph(network))}
    assert {name: d.layers for name, d in found.items()} == {
        "inner/fc": ["inner/fc"],
        "inner/shared": ["inner/shared"],
        "fc": ["fc"],
    }
    assert all(len(d.quantizers) == 2 for d in found.values())
    assert len(network.trainable_variables) == len(model.trainable_variables)
    x = tf.ones((2, 3))
    for a, b in zip(network(x), model(x)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("pack", [list, dict])
def test_several_inputs_and_outputs(pack):
    late, early = keras.Input((4,), name="z"), keras.Input((5,), name="a")
    both = L.Add()([L.Dense(2, name="of_z")(late), L.Dense(2, name="of_a")(early)])
    inputs = {"z": late, "a": early} if pack is dict else [late, early]
    model = keras.Model(inputs, {"sum": both, "out": L.Dense(2, name="of_both")(both)})
    network = quantized_network(ModelGraph(randomized(model)), ["INT4", "FP32"]).model
    x = {"z": tf.ones((2, 4)), "a": tf.ones((2, 5))}
    x = x if pack is dict else list(x.values())
    for name in ("sum", "out"):
        np.testing.assert_array_equal(network(x)[name], model(x)[name])


def test_layers_of_unknown_classes_stay_in_float_and_are_listed_in_one_line(caplog):
    inputs = keras.Input((7,), dtype="int32")
    x = L.LSTM(4, name="lstm")(L.Embedding(10, 4, name="embedding")(inputs))
    model = randomized(keras.Model(inputs, L.Dense(2, name="fc")(x)))
    with caplog.at_level(logging.WARNING, "fliqs_tf"):
        network = quantized_network(ModelGraph(model), ["INT4", "FP32"]).model
    assert [r.getMessage() for r in caplog.records] == [
        "Left in float and not counted, because their class is not known or not asked for: "
        "embedding (Embedding), lstm (LSTM). embeddings=True quantizes the tables of Embedding layers."
    ]
    tokens = tf.constant([[1, 2, 3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(network(tokens), model(tokens))


def test_nothing_is_listed_if_all_is_known(caplog):
    with caplog.at_level(logging.WARNING, "fliqs_tf"):
        quantized_network(ModelGraph(convolutional()), FORMATS)
    assert caplog.records == []


# ---- what is refused


@pytest.mark.parametrize(
    "options, why",
    [
        ({"space": "FLIQS-XL"}, "Unknown space 'FLIQS-XL'; presets"),
        ({"space": ["INT99", "INT4"]}, "Unknown format 'INT99'"),
        ({"space": []}, "at least one format"),
        ({"space": ["INT4", "INT4"]}, "got INT4 more than once"),
        ({"space": ["INT4"]}, "nothing to search: .*use fliqs_tf.apply"),
        ({"rules": [("", None)]}, "nothing to search"),
        ({"rules": [("", ["INT8"])]}, "nothing to search"),
        ({"rules": [("conv9", None)]}, "Rule 'conv9' matches no layer. Layers: conv, fc"),
        ({"rules": [("relu", None)]}, "Rule 'relu' matches no layer"),
        ({"rules": [("(", None)]}, r"Rule pattern '\(' is not a regular expression"),
        ({"rules": [(None, None)]}, "Rule pattern None is not a regular expression"),
        ({"rules": [(b"fc", None)]}, "Rule pattern b'fc' is not a regular expression"),
        ({"rules": [("fc", ["INT99"])]}, "Unknown format 'INT99'"),
        ({"rules": [("fc", [])]}, "at least one format"),
        ({"rules": ["fc"]}, "A rule is .*got 'fc'"),
        ({"rules": ("fc", None)}, "A rule is .*got 'fc'"),
        ({"rules": "fc"}, "rules must be a list .*got 'fc'"),
        ({"rules": Rule("fc")}, "rules must be a list .*got Rule"),
        ({"rules": [{"pattern": "fc"}]}, "A rule is .*got {'pattern': 'fc'}"),
        ({"rules": [("fc", FORMATS, "tie", 4)]}, "A rule is .*got"),
        ({"rules": [Rule("fc", tie=r"\2")]}, r"Rule 'fc': tie '.*2' .*invalid group reference"),
        ({"rules": [Rule("(x)?fc", tie=r"\1")]}, r"Rule .*: tie '.*1' gives no name for layer 'fc'"),
        ({"rules": [Rule("fc", OTHER), Rule("", tie="all")]}, "'conv' and 'fc' are tied into the decision 'all' but"),
        ({"granularity": "block"}, "granularity must be 'layer' .*got 'block'.*For blocks use rules"),
        ({"tensors": "inputs"}, "tensors must be one of together, weights, separate, got 'inputs'"),
    ],
)
def test_wrong_arguments(options, why):
    with pytest.raises(ValueError, match=why):
        quantized_network(ModelGraph(convolutional()), **{"space": FORMATS, **options})


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.fc = L.Dense(2)

    def call(self, x):
        return self.fc(x)


@pytest.mark.parametrize(
    "convert", [lambda m: quantized_network(ModelGraph(m), FORMATS).model, lambda m: wrapping.apply(m, "INT4")]
)
def test_models_that_cannot_be_quantized(convert):
    with pytest.raises(ValueError, match="has nothing to quantize: none of its layers is a Dense, Conv1D"):
        convert(keras.Sequential([keras.Input((3,)), L.ReLU()], name="net"))
    with pytest.raises(ValueError, match="'net' is not built: give it an Input layer, call it on a batch, or call"):
        convert(keras.Sequential([L.Dense(3)], name="net"))
    with pytest.raises(ValueError, match="is not built"):
        convert(Subclassed())
    with pytest.raises(ValueError, match="'net' is quantized already; give the float model"):
        convert(quantized_network(ModelGraph(convolutional()), FORMATS).model)
    with pytest.raises(TypeError, match="Expected a tf.keras model, got list"):
        convert([1])


def test_a_model_of_the_other_keras():
    other = pytest.importorskip("tf_keras" if IS_KERAS_3 else "keras")
    model = other.Sequential([other.Input((3,)), other.layers.Dense(2)])
    switch = "set TF_USE_LEGACY_KERAS=1" if IS_KERAS_3 else "unset TF_USE_LEGACY_KERAS"
    with pytest.raises(TypeError, match=f"is a model of .*but tf.keras is .*{switch} before Python starts"):
        quantized_network(ModelGraph(model), FORMATS)


def test_a_rule_cannot_be_changed():
    with pytest.raises(AttributeError):
        Rule("fc").tie = "all"


# ---- fixed formats


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


def test_one_format_for_every_layer():
    model = randomized(dense_chain("a", "b"))
    assert formats_of(wrapping.apply(model, "int4")) == {"a": ("INT4", "INT4"), "b": ("INT4", "INT4")}
    np.testing.assert_array_equal(outputs(wrapping.apply(model, "FP32")), outputs(model))


def test_apply_leaves_the_model_and_trains_on_its_own():
    model = randomized(convolutional())
    before = model.get_weights()
    network = wrapping.apply(model, "INT8")
    network.compile("sgd", "mse")
    network.fit(np.ones((4, 8, 8, 3)), np.ones((4, 5)), verbose=0)
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "recipe, why",
    [
        (Recipe({"a": "INT4"}), "does not fit model 'net': no format for 'b'"),
        (Recipe({"a": "INT4", "b": "INT4", "c": "INT4"}), "unknown 'c'"),
        (Recipe({"all": "INT4"}, layers={"all": ("a", "x")}), "no format for 'b'; unknown 'x'"),
        (Recipe({"a": "INT4", "b": "INT4"}, info={"float_layers": ["b"]}), "unknown 'b'"),
        ("INT99", "Unknown format 'INT99'"),
        (None, "given by its name, got None"),
    ],
)
def test_recipes_that_do_not_fit(recipe, why):
    with pytest.raises(ValueError, match=why):
        wrapping.apply(dense_chain("a", "b"), recipe)


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


class TrainsItself(keras.Model):
    def train_step(self, data):
        return super().train_step(data)

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(
    "quantize", [lambda m: quantized_network(ModelGraph(m), FORMATS).model, lambda m: wrapping.apply(m, "INT8")]
)
def test_a_training_step_of_its_own_is_not_taken_over_and_that_is_told(quantize, caplog):
    inputs = keras.Input((4,))
    outputs = L.Dense(2)(inputs)
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        quantize(keras.Model(inputs, outputs))
        assert not caplog.text
        quantize(TrainsItself(inputs, outputs))
    assert "TrainsItself has a train_step and a compute_loss of its own" in caplog.text
