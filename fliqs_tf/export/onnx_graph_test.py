"""The graph of an ONNX file while it is written: names, types, layouts."""

import numpy as np
import onnx
import pytest

from fliqs_tf.export import onnx_graph

PROTO = onnx.TensorProto


@pytest.fixture
def graph():
    made = onnx_graph.OnnxBuilder()
    made.path = "conv"
    return made


def listed(graph):
    """operation(inputs) -> output, and attributes, of every node."""
    return [
        (n.op_type, list(n.input), list(n.output), {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute})
        for n in graph.nodes
    ]


def test_names_stand_once(graph):
    assert [graph.name("a"), graph.name("a"), graph.name("b"), graph.name("a")] == ["a", "a_2", "b", "a_3"]


def test_nodes_and_constants_are_named_by_their_layer(graph):
    constant = graph.constant(np.float32([1, 2]), "bias")
    assert constant == "conv/bias"
    assert graph.node("Add", ["x", constant]) == "conv/Add"
    assert graph.node("Add", ["conv/Add", "x"], axis=3) == "conv/Add_2"
    assert listed(graph) == [
        ("Add", ["x", "conv/bias"], ["conv/Add"], {}),
        ("Add", ["conv/Add", "x"], ["conv/Add_2"], {"axis": 3}),
    ]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(graph.constants["conv/bias"]), [1, 2])


@pytest.mark.parametrize(
    ("storage", "kind", "values", "raw"),
    [
        ("INT4", PROTO.INT4, [1, -1, 7], [0xF1, 0x07]),  # two to a byte, the first one low
        ("INT8", PROTO.INT8, [1, -1, 127], [1, 255, 127]),
        ("INT16", PROTO.INT16, [1, -2], [1, 0, 0xFE, 0xFF]),
        ("E4M3", PROTO.FLOAT8E4M3FN, [1, -448], [0x38, 0xFE]),
        ("E5M2", PROTO.FLOAT8E5M2, [1, -57344], [0x3C, 0xFB]),
        ("E2M1", PROTO.FLOAT4E2M1, [1, -6], [0xF2]),
        ("BF16", PROTO.BFLOAT16, [1], [0x80, 0x3F]),
    ],
)
def test_codes_of_every_type(graph, storage, kind, values, raw):
    made = graph.constants[graph.codes(np.float32(values), storage, "kernel")]
    assert (made.data_type, list(made.dims), list(made.raw_data)) == (kind, [len(values)], raw)
    # Each in the oldest opset that has it.
    assert (graph.opset, graph.ir_version) == ((23, 11) if storage == "E2M1" else (21, 10))


def test_float32_values_are_a_plain_constant(graph):
    made = graph.constants[graph.codes(np.array([0.1]), "FP32", "kernel")]
    assert made.data_type == PROTO.FLOAT
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(made), np.float32([0.1]))


def test_the_other_layout_is_made_once(graph):
    value = onnx_graph.Value(4, last="x")
    assert graph.first(value) == graph.first(value) == "conv/Transpose"
    assert graph.last(value) == "x"
    assert listed(graph) == [("Transpose", ["x"], ["conv/Transpose"], {"perm": [0, 3, 1, 2]})]
    back = onnx_graph.Value(4, first="y")
    assert graph.last(back) == "conv/Transpose_2"
    assert listed(graph)[1:] == [("Transpose", ["y"], ["conv/Transpose_2"], {"perm": [0, 2, 3, 1]})]


def test_the_two_permutations_are_each_others_inverse(graph):
    for rank in (3, 4, 5):
        graph.first(onnx_graph.Value(rank, last="x"))
        graph.last(onnx_graph.Value(rank, first="x"))
        first, last = (attributes["perm"] for *_, attributes in listed(graph)[-2:])
        x = np.empty(range(2, 2 + rank))
        assert x.transpose(first).transpose(last).shape == x.shape
        assert x.transpose(first).shape[1] == x.shape[-1]


def test_matrices_have_one_layout(graph):
    assert graph.first(onnx_graph.Value(2, last="x")) == "x"
    assert graph.nodes == []


def test_elementwise_operations_take_the_layout_that_all_values_have(graph):
    def add(values):
        return graph.each(values, lambda a, b: graph.node("Add", [a, b]))

    both = add([onnx_graph.Value(4, last="x", first="x'"), onnx_graph.Value(4, first="y'")])
    assert (both.first, both.last) == ("conv/Add", "")
    one = add([onnx_graph.Value(4, last="x", first="x'"), onnx_graph.Value(4, last="y")])
    assert (one.first, one.last) == ("", "conv/Add_2")
    flat = add([onnx_graph.Value(2, last="x"), onnx_graph.Value(2, last="y")])
    assert flat.last == "conv/Add_3"
    assert [n[:2] for n in listed(graph)] == [("Add", ["x'", "y'"]), ("Add", ["x", "y"]), ("Add", ["x", "y"])]
    assert not flat.is_nonnegative


def test_operations_in_either_layout(graph):
    x = onnx_graph.Value(4, last="x")
    moved = graph.moved(x, "MaxPool", ["k"], strides=[2, 2])
    assert (moved.rank, moved.last, moved.first) == (4, "", "conv/MaxPool")
    plain = graph.plain(x, "Reshape", ["shape"], rank=2)
    assert (plain.rank, plain.last, plain.first) == (2, "conv/Reshape", "")
    assert [n[:2] for n in listed(graph)] == [
        ("Transpose", ["x"]),
        ("MaxPool", ["conv/Transpose", "k"]),
        ("Reshape", ["x", "shape"]),
    ]
