"""Networks as lists of calls: what is read from the two Kerases' configurations, by hand."""

import pytest

from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph import dataflow

L = keras.layers


def said(model):
    graph = dataflow.read(model)
    return [(call.path, call.inputs, call.output, call.index) for call in graph.calls], graph.outputs


def test_a_chain():
    inputs = L.Input((4, 3), name="given")
    model = keras.Model(inputs, L.Dense(2, name="b")(L.ReLU(name="a")(inputs)))
    assert said(model) == ([("a", (0,), 1, 0), ("b", (1,), 2, 0)], (2,))
    graph = dataflow.read(model)
    assert graph.inputs == ((0, "given", (4, 3), "float32"),)
    assert [call.layer for call in graph.calls] == [model.get_layer("a"), model.get_layer("b")]
    assert len(graph.output_names) == 1


def test_a_sequential_network():
    model = keras.Sequential([L.Input((3,), dtype="float32"), L.Dense(2, name="a"), L.Dense(2, name="b")])
    assert said(model) == ([("a", (0,), 1, 0), ("b", (1,), 2, 0)], (2,))


def test_merging_and_several_ends():
    x, y = L.Input((3,), name="x"), L.Input((3,), name="y")
    both = L.Concatenate(name="both")([y, x])
    model = keras.Model([x, y], [L.Dense(1, name="end")(both), both, x])
    calls, outputs = said(model)
    assert calls == [("both", (1, 0), 2, 0), ("end", (2,), 3, 0)]
    assert outputs == (3, 2, 0)


def test_each_call_of_a_shared_layer():
    x, layer = L.Input((3,)), L.Dense(3, name="twice")
    y = layer(x)
    model = keras.Model(x, L.Add(name="sum")([layer(y), y]))
    calls, _ = said(model)
    assert calls == [("twice", (0,), 1, 0), ("twice", (1,), 2, 1), ("sum", (2, 1), 3, 0)]
    assert dataflow.read(model).calls[0].layer is dataflow.read(model).calls[1].layer


def test_nested_networks_are_opened_at_each_of_their_calls():
    inside = L.Input((3,))
    net = keras.Model(inside, L.Dense(3, name="fc")(L.ReLU(name="act")(inside)), name="net")
    x = L.Input((3,))
    outer = keras.Sequential([L.Input((3,)), net], name="outer")
    calls, outputs = said(keras.Model(x, outer(net(x))))
    assert calls == [
        ("net/act", (0,), 1, 0),
        ("net/fc", (1,), 2, 0),
        ("outer/net/act", (2,), 3, 0),
        ("outer/net/fc", (3,), 4, 0),
    ]
    assert outputs == (4,)


def test_readers_stand_once_each():
    x = L.Input((3,))
    model = keras.Model(x, L.Add(name="more")([L.Add(name="double")([x, x]), x]))
    found = dataflow.read(model).readers
    assert {value: [call.path for call in calls] for value, calls in found.items()} == {
        0: ["double", "more"],
        1: ["more"],
    }


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras makes layers of its own of them")
def test_operators_with_their_numbers():
    x = L.Input((3,))
    calls = dataflow.read(keras.Model(x, (x + 2.5) * x)).calls
    assert [(type(c.layer).__name__, c.inputs, c.constants) for c in calls] == [
        ("Add", (0,), (2.5,)),
        ("Multiply", (1, 0), ()),
    ]


def test_what_is_a_reference():
    names = {"a", "b"}
    assert dataflow.is_reference(["a", 0, 0], names)
    assert dataflow.is_reference(("b", 1, 2, {}), names)
    assert not dataflow.is_reference(["c", 0, 0], names)  # no layer
    assert not dataflow.is_reference(["a", 0], names)
    assert not dataflow.is_reference(["a", True, 0], names)
    assert not dataflow.is_reference("a00", names)


def test_references_in_the_order_in_which_they_stand():
    """That of tf_keras: a call's other arguments hold values, too."""
    node = [["a", 0, 0, {"other": ["b", 1, 0], "axis": 2}], ["b", 0, 0, {}]]
    assert dataflow.references(node, {"a", "b"}) == [["a", 0, 0], ["b", 1, 0], ["b", 0, 0]]
    tensor = {"class_name": "__keras_tensor__", "config": {"shape": [None, 3], "keras_history": ["a", 0, 0]}}
    assert dataflow.references({"args": [tensor, 1.5], "kwargs": {}}, {"a"}) == [["a", 0, 0]]
