"""Which layers share a decision, and what it may choose from."""

import pytest

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.numerics.space import Space
from fliqs_tf.quantize.decisions import open_decisions
from fliqs_tf.quantize.network import quantized_network
from fliqs_tf.quantize.rules import Rule

L = keras.layers
FORMATS = ["INT4", "INT8"]
OTHER = ["E2M1", "E4M3", "BF16"]


def dense_chain(*names, width=3):
    return keras.Sequential([keras.Input((width,)), *(L.Dense(width, name=name) for name in names)], name="net")


def stages():
    return dense_chain("stage1_a", "stage1_b", "stage2_a", "stage2_b", "head")


def decided(model, space=FORMATS, **options):
    """{decision: (formats, layers)}"""
    network = quantized_network(ModelGraph(model), space, **options).model
    return {d.name: (d.options, d.layers) for d in open_decisions(ModelGraph(network))}


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


def test_a_rule_cannot_be_changed():
    with pytest.raises(AttributeError):
        Rule("fc").tie = "all"
