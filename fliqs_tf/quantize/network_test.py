"""From a model to a quantized one: which layers, which tensors, which decision."""

import logging

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf import wrapping
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.numerics.rounding import fake_quant
from fliqs_tf.quantize.decisions import open_decisions
from fliqs_tf.quantize.network import quantized_network
from fliqs_tf.quantize.rules import Rule

L = keras.layers
FORMATS = ["INT4", "INT8"]
OTHER = ["E2M1", "E4M3", "BF16"]


def dense_chain(*names, width=3):
    return keras.Sequential([keras.Input((width,)), *(L.Dense(width, name=name) for name in names)], name="net")


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
