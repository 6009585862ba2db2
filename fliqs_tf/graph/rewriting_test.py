"""Layers put into a copy of a network and taken out: which calls there are then, and what they compute."""

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.graph import dataflow, rewriting
from fliqs_tf.graph.model_graph import ModelGraph

L = keras.layers


def flow(model):
    """`a(b, c)` for each call, in order; the model's inputs by name."""
    graph = dataflow.read(model)
    names = {value: name for value, name, _, _ in graph.inputs}
    found = []
    for call in graph.calls:
        names[call.output] = f"{call.path}.{call.index}" if call.index else call.path
        found.append(f"{names[call.output]}({', '.join(names[v] for v in call.inputs)})")
    return found, [names[v] for v in graph.outputs]


def chain():
    x = L.Input((2,), name="x")
    return keras.Model(x, L.Dense(2, name="b")(L.Dense(2, name="a")(x)))


def twice(name="double"):
    return L.Rescaling(2.0, name=name)


def test_last_names():
    assert rewriting.last_name("encoder/block/conv") == "conv"
    assert rewriting.last_name("conv") == "conv"


def test_layers_are_put_behind_one_another():
    model = chain()
    copy = rewriting.with_added(ModelGraph(model), {"a": [twice(), L.Rescaling(1.0, 1.0, name="plus")]}).model
    assert flow(copy) == (["a(x)", "double(a)", "plus(double)", "b(plus)"], ["b"])
    a, b = (layer.get_weights() for layer in model.layers[1:])
    x = np.float32([[1, 2], [3, -4]])
    np.testing.assert_allclose(copy(x), ((x @ a[0] + a[1]) * 2 + 1) @ b[0] + b[1], rtol=1e-5)
    assert flow(model) == (["a(x)", "b(a)"], ["b"])


def test_behind_an_output():
    copy = rewriting.with_added(ModelGraph(chain()), {"b": [twice()]}).model
    assert flow(copy) == (["a(x)", "b(a)", "double(b)"], ["double"])


def test_all_readers_read_what_was_put_in():
    x = L.Input((2,), name="x")
    y = L.ReLU(name="a")(x)
    model = keras.Model(x, [L.Add(name="sum")([y, L.Dense(2, name="b")(y)]), y])
    assert flow(rewriting.with_added(ModelGraph(model), {"a": [twice()]}).model) == (
        ["a(x)", "double(a)", "b(double)", "sum(double, b)"],
        ["sum", "double"],
    )


def shared():
    x, a = L.Input((2,), name="x"), L.Dense(2, name="a")
    return keras.Model(x, a(a(x)))


def test_behind_every_call_of_a_shared_layer_or_behind_one():
    assert flow(rewriting.with_added(ModelGraph(shared()), {"a": [twice()]}).model) == (
        ["a(x)", "double(a)", "a.1(double)", "double.1(a.1)"],
        ["double.1"],
    )
    assert flow(rewriting.with_added(ModelGraph(shared()), {("a", 1): [twice()]}).model) == (
        ["a(x)", "a.1(a)", "double(a.1)"],
        ["double"],
    )
    both = rewriting.with_added(ModelGraph(shared()), {("a", 0): [twice()], ("a", 1): [twice("other")]})
    assert flow(both.model) == (
        ["a(x)", "double(a)", "a.1(double)", "other(a.1)"],
        ["other"],
    )


def test_in_nested_networks():
    net = keras.Sequential([L.Input((2,)), L.Dense(2, name="inner"), L.ReLU(name="act")], name="net")
    x = L.Input((2,), name="x")
    model = keras.Model(x, L.Dense(1, name="end")(net(x)))
    copy = rewriting.with_added(ModelGraph(model), {"net/inner": [twice()]}, removed={"net/act"}).model
    assert flow(copy) == (["net/inner(x)", "net/double(net/inner)", "end(net/double)"], ["end"])
    data = np.float32([[1, -2]])
    (kernel, bias), (last, _) = net.layers[0].get_weights(), model.get_layer("end").get_weights()
    np.testing.assert_allclose(copy(data), (data @ kernel + bias) * 2 @ last, rtol=1e-5)


def test_layers_are_taken_out():
    x = L.Input((2,), name="x")
    y = L.Rescaling(3.0, name="c")(L.Rescaling(2.0, name="b")(L.ReLU(name="a")(x)))
    model = keras.Model(x, y)
    assert flow(rewriting.with_added(ModelGraph(model), {}, {"b", "c"}).model) == (["a(x)"], ["a"])
    without = rewriting.without(ModelGraph(model), L.Rescaling).model
    assert flow(without) == (["a(x)"], ["a"])
    np.testing.assert_array_equal(without(np.float32([[1, -2]])), [[1, 0]])
    assert rewriting.without(ModelGraph(model), L.Softmax).model is model


def test_sequential_networks_stay_so():
    model = keras.Sequential([L.Input((2,)), L.Dense(2, name="a"), L.ReLU(name="b")])
    copy = rewriting.with_added(ModelGraph(model), {"a": [twice()]}, {"b"}).model
    assert isinstance(copy, keras.Sequential)
    assert [layer.name for layer in copy.layers] == ["a", "double"]
    np.testing.assert_allclose(copy(np.ones((1, 2))), 2 * model.layers[0](np.ones((1, 2))), rtol=1e-6)


def test_an_activation_leaves_the_quantized_layer_that_it_is_put_behind():
    x = L.Input((2,), name="x")
    layer = fliqs_tf.Quantized(L.Dense(2, activation="softmax"), ["INT8"], ["INT8"], name="a")
    model = keras.Model(x, layer(x))
    copy = rewriting.with_added(ModelGraph(model), {"a": [L.Activation("softmax", name="apart")]}).model
    assert copy.get_layer("a").layer.activation is keras.activations.linear
    data = np.float32([[1, 2]])
    np.testing.assert_allclose(copy(data), model(data), rtol=1e-6)
    assert flow(copy) == (["a(x)", "apart(a)"], ["apart"])


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="has a layer 'b' already: give it another name"):
        rewriting.with_added(ModelGraph(chain()), {"a": [twice("b")]})
