"""Layers as nodes of ONNX: which nodes, in which layout, with which attributes."""

import numpy as np
import onnx
import pytest

from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.export import onnx_graph, onnx_layers

L = keras.layers


def given(rank=4, first=False, is_nonnegative=False):
    return onnx_graph.Value(rank, **{"first" if first else "last": "x"}, is_nonnegative=is_nonnegative)


def built(layer, *shapes):
    tensors = [L.Input(shape) for shape in shapes]
    layer(tensors if len(tensors) > 1 else tensors[0])
    return layer


def converted(layer, *values, weights=None):
    """(operations, attributes of the last node, result, graph)."""
    graph = onnx_graph.OnnxBuilder()
    graph.path = layer.name
    convert = onnx_layers.CONVERTERS[type(layer)]
    result = convert(graph, layer, *values, *([] if weights is None else [weights, None]))
    last = graph.nodes[-1].attribute if graph.nodes else ()
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in last}
    return [node.op_type for node in graph.nodes], attributes, result, graph


def constant(graph, name):
    return onnx.numpy_helper.to_array(graph.constants[name])


# ---- activations


@pytest.mark.parametrize(
    ("name", "operations", "is_nonnegative"),
    [
        ("linear", [], False),
        ("relu", ["Relu"], True),
        ("relu6", ["Clip"], True),
        ("sigmoid", ["Sigmoid"], True),
        ("tanh", ["Tanh"], False),
        ("softmax", ["Softmax"], True),
        ("swish", ["Sigmoid", "Mul"], False),
        ("gelu", ["Gelu"], False),
        ("hard_sigmoid", ["HardSigmoid"], True),
    ],
)
def test_activations(name, operations, is_nonnegative):
    if name == "relu6" and not IS_KERAS_3:
        pytest.skip("tf_keras has it as a layer")
    graph = onnx_graph.OnnxBuilder()
    result = onnx_layers.activation(graph, getattr(keras.activations, name), given(2))
    assert [node.op_type for node in graph.nodes] == operations
    assert result.is_nonnegative == is_nonnegative


def test_an_activation_that_is_not_supported_names_those_that_are():
    graph = onnx_graph.OnnxBuilder()
    graph.path = "fc"
    with pytest.raises(ValueError, match="Layer 'fc' has the activation '<lambda>', .* Supported: elu, .*tanh"):
        onnx_layers.activation(graph, lambda x: x, given(2))


@pytest.mark.parametrize(
    ("layer", "operations", "is_nonnegative"),
    [
        (lambda: L.ReLU(), ["Relu"], True),
        (lambda: L.ReLU(6.0), ["Clip"], True),
        (lambda: L.ReLU(negative_slope=0.5), ["LeakyRelu"], False),
        (lambda: L.ReLU(1.0, negative_slope=0.5), ["LeakyRelu", "Clip"], False),
    ],
    ids=range(4),
)
def test_relus(layer, operations, is_nonnegative):
    found, _, result, _ = converted(layer(), given(2))
    assert (found, result.is_nonnegative) == (operations, is_nonnegative)


# ---- kernels


def kernel(*shape):
    return {"kernel": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}


def test_a_matrix():
    layer = built(L.Dense(2, name="fc"), (3,))
    found, attributes, result, graph = converted(layer, given(2), weights=kernel(3, 2))
    assert found == ["Gemm"] and attributes == {"transB": 1} and result.rank == 2
    assert list(graph.nodes[0].input) == ["x", "fc/kernel", "fc/bias"]
    np.testing.assert_array_equal(constant(graph, "fc/kernel"), [[0, 2, 4], [1, 3, 5]])


def test_a_matrix_on_a_sequence():
    layer = built(L.Dense(2, use_bias=False, name="fc"), (5, 3))
    found, attributes, result, _ = converted(layer, given(3), weights=kernel(3, 2))
    assert found == ["Einsum"] and attributes == {"equation": b"aby,yz->abz"} and result.rank == 3


def test_a_convolution_has_channels_first():
    layer = built(L.Conv2D(2, 3, strides=2, padding="same", name="conv"), (8, 8, 4))
    found, attributes, result, graph = converted(layer, given(), weights=kernel(3, 3, 4, 2))
    assert found == ["Transpose", "Conv"]
    assert attributes == {"auto_pad": b"SAME_UPPER", "dilations": [1, 1], "group": 1, "strides": [2, 2]}
    assert result.first and not result.last
    stored = constant(graph, "conv/kernel")
    assert stored.shape == (2, 4, 3, 3)
    assert stored[1, 2, 0, 1] == kernel(3, 3, 4, 2)["kernel"][0, 1, 2, 1]
    assert converted(layer, given(first=True), weights=kernel(3, 3, 4, 2))[0] == ["Conv"]


@pytest.mark.parametrize(
    ("options", "padding"),
    [
        ({"padding": "valid"}, {"auto_pad": b"VALID"}),
        ({"padding": "same"}, {"auto_pad": b"SAME_UPPER"}),
        # 2 * 2 more rows, split evenly; 1 * 3 more columns, one more behind.
        ({"padding": "same", "dilation_rate": (2, 3)}, {"pads": [2, 1, 2, 2]}),
    ],
)
def test_padding(options, padding):
    layer = built(L.Conv2D(1, (3, 2), name="conv", **options), (8, 8, 1))
    _, attributes, _, _ = converted(layer, given(), weights=kernel(3, 2, 1, 1))
    assert {name: attributes[name] for name in ("auto_pad", "pads") if name in attributes} == padding


def test_causal_padding_is_before():
    layer = built(L.Conv1D(1, 3, padding="causal", dilation_rate=2, name="conv"), (8, 1))
    assert converted(layer, given(3), weights=kernel(3, 1, 1))[1]["pads"] == [4, 0]


def test_a_depthwise_convolution_is_one_of_groups():
    layer = built(L.DepthwiseConv2D(3, depth_multiplier=2, name="conv"), (8, 8, 4))
    _, attributes, _, graph = converted(layer, given(), weights=kernel(3, 3, 4, 2))
    assert attributes["group"] == 4
    stored = constant(graph, "conv/kernel")
    assert stored.shape == (8, 1, 3, 3)
    assert stored[2 * 3 + 1, 0, 0, 2] == kernel(3, 3, 4, 2)["kernel"][0, 2, 3, 1]


@pytest.mark.parametrize(
    ("size", "stride", "padding", "pads", "output_padding"),
    [
        (3, 2, "same", [0, 0, 1, 1], [0, 0]),
        (4, 1, "same", [1, 1, 2, 2], [0, 0]),
        (2, 3, "same", [0, 0, 0, 0], [1, 1]),
        (3, 2, "valid", [0, 0, 0, 0], [0, 0]),
        (2, 3, "valid", [0, 0, 0, 0], [1, 1]),
    ],
)
def test_transposed_convolutions(size, stride, padding, pads, output_padding):
    """n values become n * stride, or (n - 1) * stride + size at least: ONNX takes pads from that, and adds the rest."""
    layer = built(L.Conv2DTranspose(2, size, strides=stride, padding=padding, name="up"), (5, 5, 3))
    found, attributes, _, _ = converted(layer, given(), weights=kernel(size, size, 2, 3))
    assert found[-1] == "ConvTranspose"
    assert attributes == {"strides": [stride] * 2, "pads": pads, "output_padding": output_padding}


# ---- layers without kernels


def test_batch_normalization():
    layer = built(L.BatchNormalization(scale=False, epsilon=0.25, name="norm"), (4, 4, 2))
    layer.set_weights([np.float32([1, 2]), np.float32([3, 4]), np.float32([5, 6])])
    found, attributes, _, graph = converted(layer, given(first=True))
    assert found == ["BatchNormalization"] and attributes == {"epsilon": 0.25}
    assert list(graph.nodes[0].input) == ["x", "norm/gamma", "norm/beta", "norm/mean", "norm/variance"]
    stored = [constant(graph, name).tolist() for name in graph.nodes[0].input[1:]]
    assert stored == [[1, 1], [1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("layer", "rank", "operation", "attributes", "result"),
    [
        (lambda: L.MaxPooling2D((2, 3), strides=1), 4, "MaxPool",
         {"kernel_shape": [2, 3], "strides": [1, 1], "auto_pad": b"VALID"}, 4),
        (lambda: L.AveragePooling1D(2, padding="same"), 3, "AveragePool",
         {"kernel_shape": [2], "strides": [2], "auto_pad": b"SAME_UPPER"}, 3),
        (lambda: L.GlobalMaxPooling2D(), 4, "ReduceMax", {"keepdims": 0}, 2),
        (lambda: L.GlobalAveragePooling2D(keepdims=True), 4, "ReduceMean", {"keepdims": 1}, 4),
        (lambda: L.Flatten(), 4, "Flatten", {"axis": 1}, 2),
        (lambda: L.Reshape((8, 4)), 4, "Reshape", {}, 3),
        (lambda: L.ZeroPadding2D(1), 4, "Pad", {}, 4),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_keeps_values_at_or_above_0(layer, rank, operation, attributes, result):
    for is_nonnegative in (True, False):
        operations, found, value, _ = converted(layer(), given(rank, is_nonnegative=is_nonnegative))
        assert operations[-1] == operation and found == attributes
        assert (value.rank, value.is_nonnegative) == (result, is_nonnegative)


def test_sizes_as_constants():
    _, _, _, graph = converted(L.ZeroPadding2D(((1, 2), (3, 4)), name="pad"), given())
    np.testing.assert_array_equal(constant(graph, "pad/constant"), [0, 1, 3, 0, 0, 2, 4, 0])
    _, _, _, graph = converted(L.Reshape((-1, 2), name="r"), given())
    np.testing.assert_array_equal(constant(graph, "r/constant"), [0, -1, 2])
    _, _, _, graph = converted(L.UpSampling2D((2, 3), name="up"), given(first=True))
    np.testing.assert_array_equal(constant(graph, "up/constant"), [1, 1, 2, 3])
    _, _, _, graph = converted(L.Cropping2D(((1, 0), (2, 3)), name="crop"), given())
    found = [constant(graph, name).tolist() for name in graph.nodes[-1].input[1:]]
    assert found == [[1, 2], [np.iinfo(np.int64).max, -3], [1, 2]]


def test_permutation():
    found, attributes, _, _ = converted(L.Permute((3, 1, 2)), given())
    assert found == ["Transpose"] and attributes == {"perm": [0, 3, 1, 2]}


@pytest.mark.parametrize(("axis", "last", "first"), [(-1, 3, 1), (3, 3, 1), (1, 1, 2), (2, 2, 3), (0, 0, 0)])
def test_concatenation_in_either_layout(axis, last, first):
    layer = L.Concatenate(axis=axis)
    assert converted(layer, given(), given())[1] == {"axis": last}
    assert converted(layer, given(first=True), given(first=True))[1] == {"axis": first}


def test_merging_layers():
    assert converted(L.Add(), given(), given(), given())[0] == ["Add", "Add"]
    assert converted(L.Average(), given(), given(), given())[0] == ["Mean"]
    plus, minus = (converted(layer, *[given(is_nonnegative=True)] * 2)[2] for layer in (L.Add(), L.Subtract()))
    assert plus.is_nonnegative and not minus.is_nonnegative
    assert not converted(L.Multiply(), given(is_nonnegative=True), given())[2].is_nonnegative


def test_values_of_a_lower_rank_get_axes_behind_that_of_examples():
    found, _, result, graph = converted(L.Multiply(name="m"), given(4), given(2))
    assert found == ["Unsqueeze", "Mul"] and result.rank == 4
    np.testing.assert_array_equal(constant(graph, "m/constant"), [1, 2])


def test_what_does_nothing_is_no_node():
    x = given()
    operations, _, result, _ = converted(L.Dropout(0.5), x)
    assert operations == [] and result is x
