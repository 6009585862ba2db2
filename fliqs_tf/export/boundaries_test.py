"""Where int8 tensors stand between layers, and where they get their ranges from."""

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.export import boundaries
from fliqs_tf.graph import dataflow
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import shared_ranges
from fliqs_tf.layers.quantizers import ActivationQuantizer
from fliqs_tf.numerics.formats import Format

L = keras.layers


def dense(name, weights=("INT8",), activations=("INT8",), **options):
    return fliqs_tf.Quantized(L.Dense(4, name=name, **options), weights, activations, name=name)


def conv(name, **options):
    return fliqs_tf.Quantized(L.Conv2D(4, 1, name=name, **options), ["INT8"], ["INT8"], name=name)


def chain(*layers, shape=(4,)):
    x = inputs = L.Input(shape)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def residual():
    x = L.Input((4, 4, 4))
    y = L.ReLU(name="relu1")(conv("conv1")(x))
    z = L.BatchNormalization(name="norm")(conv("conv2")(y))
    z = L.ReLU(name="relu2")(L.Add(name="add")([y, z]))
    return keras.Model(x, dense("logits")(L.GlobalAveragePooling2D(name="pool")(z)))


def fused(model):
    graph = dataflow.read(model)
    inside = boundaries.fused_values(graph)
    return [call.path for call in graph.calls if call.output in inside]


def test_what_a_residual_block_swallows():
    # conv1 goes into relu1, conv2 into norm, the sum into relu2; relu1 has two readers.
    assert fused(residual()) == ["conv1", "conv2", "add"]


def test_where_a_residual_block_has_boundary_quantizers():
    # relu1 has two readers, norm and relu2 an operation, logits the caller; pool goes into logits.
    assert boundaries.boundary_layers(ModelGraph(residual()).dataflow) == ["relu1", "norm", "relu2", "logits"]


@pytest.mark.parametrize(
    ("layers", "inside"),
    [
        ([dense("a"), L.ReLU()], ["a"]),
        ([dense("a", activation="relu"), L.ReLU()], []),  # it has done one
        ([dense("a"), L.Activation("tanh")], []),
        ([dense("a"), L.BatchNormalization(name="n"), L.ReLU(6.0)], ["a", "n"]),
        ([L.Dense(4, name="a"), L.ReLU()], ["a"]),  # in float, too
        ([L.MaxPooling2D(1, name="p"), L.ReLU()], []),
        ([dense("a"), dense("b")], []),
    ],
    ids=range(7),
)
def test_what_is_fused(layers, inside):
    assert fused(chain(*layers, shape=(4, 4, 4) if isinstance(layers[0], L.MaxPooling2D) else (4,))) == inside


def test_what_two_layers_read_is_not_fused():
    x = L.Input((4,))
    y = dense("a")(x)
    for readers in ([L.ReLU(), L.Activation("tanh")], [L.BatchNormalization(), L.ReLU()]):
        assert fused(keras.Model(x, [reader(y) for reader in readers])) == []
    assert fused(keras.Model(x, [L.ReLU()(y), y])) == []  # nor what the caller reads


@pytest.mark.parametrize(
    ("layers", "places"),
    [
        ([dense("a")], ["a"]),  # the caller reads it
        ([dense("a"), dense("b")], ["b"]),  # the first writes the second's codes
        ([dense("a"), L.ReLU(name="r"), dense("b")], ["b"]),
        ([dense("a"), L.Dropout(0.5), L.Reshape((2, 2)), dense("b")], ["b"]),  # what moves is in between
        ([dense("a"), L.Activation("tanh", name="t"), dense("b")], ["a", "b"]),  # float in between
        ([dense("a"), L.Dense(4, name="f"), dense("b")], ["a", "b"]),
        ([dense("a", activations=None), dense("b")], ["b"]),  # no codes come out of it
        ([dense("a", ["FP32"], ["FP32"]), dense("b")], ["b"]),
        ([dense("a"), dense("b", ["FP32"], ["FP32"])], ["a"]),
        ([dense("a"), dense("b", ["INT8", "FP32"], ["INT8", "FP32"])], ["a", "b"]),  # it may come to read a float
        ([L.Dense(4, name="f"), L.ReLU(name="r")], []),
        ([dense("a"), L.Flatten(name="flat")], ["flat"]),
    ],
    ids=range(12),
)
def test_where_boundary_quantizers_stand(layers, places):
    assert boundaries.boundary_layers(ModelGraph(chain(*layers)).dataflow) == places


def test_what_moves_the_codes_of_a_boundary_quantizer_needs_no_second_one():
    x = L.Input((4,))
    y = dense("a")(x)
    flat = L.Flatten(name="flat")(y)
    assert boundaries.boundary_layers(ModelGraph(keras.Model(x, [flat, L.Activation("tanh")(y)])).dataflow) == ["a"]


def test_sums_of_three_have_no_integer_kernel():
    x = L.Input((4,))
    parts = [dense(name)(x) for name in "abc"]
    ends = [L.Add(name="three")(parts), L.Add(name="two")(parts[:2])]
    model = keras.Model(x, [dense(f"end{i}")(end) for i, end in enumerate(ends)])
    assert boundaries.boundary_layers(ModelGraph(model).dataflow) == ["a", "b", "c", "end0", "end1"]
    assert boundaries.boundary_layers(ModelGraph(keras.Model(x, ends)).dataflow) == ["a", "b", "c", "two"]


@pytest.mark.parametrize(
    ("axis", "layer", "shape", "is_last"),
    [
        (-1, lambda: L.Dense(4), (4,), True),
        (1, lambda: L.Dense(4), (4,), True),
        (-1, lambda: L.Conv2D(4, 1), (4, 4, 4), True),
        (3, lambda: L.Conv2D(4, 1), (4, 4, 4), True),
        (1, lambda: L.Conv2D(4, 1), (4, 4, 4), False),
        (3, lambda: L.DepthwiseConv2D(1), (4, 4, 4), True),
        (1, lambda: L.DepthwiseConv2D(1), (4, 4, 4), False),
    ],
)
def test_norms_of_the_channels_of_the_layer_before(axis, layer, shape, is_last):
    norm, made = L.BatchNormalization(axis=axis), layer()
    norm(made(L.Input(shape)))
    assert boundaries.has_channels_last(norm, made) is is_last
    wrapped = fliqs_tf.Quantized(made, ["INT8"], None)
    assert boundaries.has_channels_last(norm, wrapped) is is_last


@pytest.mark.parametrize(("name", "is_one"), [("INT2", 1), ("INT8", 1), ("INT9", 0), ("E4M3", 0), ("FP32", 0)])
def test_formats_of_integer_kernels(name, is_one):
    assert boundaries.is_integer(Format(name)) == is_one


def test_menus():
    assert boundaries.integer_formats(["INT4", "INT8", "BF16"]).names == ("INT4", "INT8")
    with pytest.raises(ValueError, match="None of E4M3, BF16 has integer kernels"):
        boundaries.integer_formats(["E4M3", "BF16"])


def test_boundary_quantizers_are_put_in_and_computed_with():
    model = residual()
    copy = boundaries.with_boundary_quantizers(ModelGraph(model)).model
    found = [path for path, layer in ModelGraph(copy).of_type(ActivationQuantizer)]
    assert found == [name + boundaries.SUFFIX for name in ("relu1", "norm", "relu2", "logits")]
    assert isinstance(copy, shared_ranges.BoundaryModel)
    assert all(copy.get_layer(name).space.names == ("INT8",) for name in found)
    ((boundary, reader),) = shared_ranges.followers(ModelGraph(copy))
    assert (boundary.name, reader) == (found[0], copy.get_layer("conv2").activation_quantizer)
    assert reader.follows
    assert boundaries.boundary_layers(ModelGraph(copy).dataflow) == []  # once is enough


def test_an_activation_that_kernels_do_not_do_becomes_a_layer():
    copy = boundaries.with_boundary_quantizers(ModelGraph(chain(dense("a", activation="softmax")))).model
    names = [layer.name for layer in copy.layers[1:]]
    assert names == ["a", "a" + boundaries.SUFFIX, "a_softmax"]
    assert copy.get_layer("a").layer.activation is keras.activations.linear
    with pytest.raises(ValueError, match="Layer 'a' has the activation 'own', which no kernel of TFLite computes"):
        boundaries.with_boundary_quantizers(ModelGraph(chain(dense("a", activation=own))))


def own(x):
    return 2 * x


def test_ranges_come_from_readers_then_from_data():
    graph = boundaries.with_boundary_quantizers(ModelGraph(residual()))
    copy = graph.model
    for name in ("conv1", "conv2", "logits"):
        copy.get_layer(name).activation_quantizer.range.assign([5.0, 1.0])
    with pytest.raises(ValueError, match="3 int8 tensors have no range: the one behind 'norm', .*'relu2', .*'logits'"):
        boundaries.calibrate(graph, None)
    np.testing.assert_array_equal(copy.get_layer("relu1" + boundaries.SUFFIX).range, [5, 1])  # of conv2, its reader
    with pytest.raises(ValueError, match="representative holds no batch"):
        boundaries.calibrate(graph, [])
    boundaries.calibrate(graph, [np.ones((2, 4, 4, 4), np.float32)])
    assert all(copy.get_layer(name + boundaries.SUFFIX).range[1] > 0 for name in ("norm", "relu2", "logits"))
    np.testing.assert_array_equal(copy.get_layer("relu1" + boundaries.SUFFIX).range, [5, 1])
