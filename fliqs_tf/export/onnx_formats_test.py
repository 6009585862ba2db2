"""What each number format becomes in an ONNX file, node by node."""

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fliqs_tf.export import deployed, onnx_formats, onnx_graph
from fliqs_tf.layers.quantizers import ActivationQuantizer
from fliqs_tf.numerics.formats import Format

PROTO = onnx.TensorProto


@pytest.fixture
def graph():
    made = onnx_graph.OnnxBuilder()
    made.path = "fc"
    return made


def operations(graph):
    return [node.op_type for node in graph.nodes]


def quantizer(fmt, amax=2.0, seen=1.0):
    made = ActivationQuantizer([fmt])
    made.range.assign([amax, seen])
    return made


def constants(graph):
    return {name: onnx.numpy_helper.to_array(tensor) for name, tensor in graph.constants.items()}


@pytest.mark.parametrize(
    ("fmt", "is_nonnegative", "found"),
    [
        ("FP32", False, []),
        ("BF16", False, ["Cast", "Cast"]),
        ("INT8", False, ["Clip", "QuantizeLinear", "DequantizeLinear"]),  # ONNX has -128 as well
        ("INT8", True, ["QuantizeLinear", "DequantizeLinear"]),
        ("INT5", True, ["Clip", "QuantizeLinear", "DequantizeLinear"]),  # in INT8, which goes on
        ("INT4", False, ["Clip", "QuantizeLinear", "DequantizeLinear"]),
        ("E4M3", False, ["QuantizeLinear", "DequantizeLinear"]),
        ("E5M2", False, ["QuantizeLinear", "DequantizeLinear"]),
    ],
)
def test_nodes_of_an_input(graph, fmt, is_nonnegative, found):
    x = onnx_graph.Value(2, last="x", is_nonnegative=is_nonnegative)
    made = onnx_formats.quantized_input(graph, x, quantizer(fmt))
    assert operations(graph) == found
    assert made.is_nonnegative == is_nonnegative


@pytest.mark.parametrize(
    ("fmt", "kind", "scale", "bound"),
    [
        ("INT4", PROTO.INT4, np.float32(2) / np.float32(7), 2),
        ("INT5", PROTO.INT8, np.float32(2) / np.float32(15), 2),
        ("INT12", PROTO.INT16, np.float32(2) / np.float32(2047), 2),
        ("E4M3", PROTO.FLOAT8E4M3FN, np.float32(2) / np.float32(448), None),
    ],
)
def test_scales_types_and_bounds_of_an_input(graph, fmt, kind, scale, bound):
    onnx_formats.quantized_input(graph, onnx_graph.Value(2, last="x"), quantizer(fmt))
    found = constants(graph)
    assert found["fc/input.scale"] == scale
    if bound is not None:
        np.testing.assert_allclose([found["fc/least"], found["fc/most"]], [-bound, bound], rtol=1e-6)
    (node,) = (n for n in graph.nodes if n.op_type == "QuantizeLinear")
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {"output_dtype": kind}


def test_clip_counts(graph):
    half = quantizer("INT4", amax=7.0)
    half.clip = 0.5
    onnx_formats.quantized_input(graph, onnx_graph.Value(2, last="x"), half)
    assert constants(graph)["fc/input.scale"] == 0.5


def test_the_layout_of_an_input_stays(graph):
    x = onnx_graph.Value(4, first="x")
    assert onnx_formats.quantized_input(graph, x, quantizer("INT8")).last == ""
    assert "Transpose" not in operations(graph)


def test_inputs_that_have_no_form_are_refused(graph):
    x = onnx_graph.Value(2, last="x")
    with pytest.raises(ValueError, match="Layer 'fc' has its input in E3M2, for which ONNX has no type"):
        onnx_formats.quantized_input(graph, x, quantizer("E3M2"))
    with pytest.raises(ValueError, match="Layer 'fc' cannot be written: its input range has seen no data"):
        onnx_formats.quantized_input(graph, x, quantizer("INT8", seen=0.0))


# ---- weights


def weight(fmt, values, scale=None):
    return deployed.QuantizedWeight(Format(fmt), np.float32(values), None if scale is None else np.float32(scale))


def computed(graph, name, shape):
    """The weight as ONNX's reference evaluator has it."""
    outputs = [onnx.helper.make_tensor_value_info(name, PROTO.FLOAT, shape)]
    made = onnx.helper.make_graph(graph.nodes, "g", [], outputs, list(graph.constants.values()))
    opset = [onnx.helper.make_opsetid("", graph.opset)]
    return ReferenceEvaluator(onnx.helper.make_model(made, opset_imports=opset)).run(None, {})[0]


def test_a_scale_per_column(graph):
    given = weight("INT4", [[1, -7], [2, 3]], [[0.5, 2]])
    name = onnx_formats.float_weight(graph, given, "kernel")
    assert operations(graph) == ["DequantizeLinear"]
    assert graph.constants["fc/kernel"].data_type == PROTO.INT4
    np.testing.assert_array_equal(constants(graph)["fc/kernel.scale"], [0.5, 2])
    np.testing.assert_array_equal(computed(graph, name, (2, 2)), [[0.5, -14], [1, 6]])


def test_and_moved_per_row(graph):
    name = onnx_formats.float_weight(graph, weight("INT8", [[1, -7], [2, 3]], [[0.5, 2]]), "kernel", np.transpose)
    (axis,) = (a.i for a in graph.nodes[0].attribute if a.name == "axis")
    assert axis == 0
    np.testing.assert_array_equal(computed(graph, name, (2, 2)), [[0.5, 1], [-14, 6]])


def test_one_scale_for_all(graph):
    name = onnx_formats.float_weight(graph, weight("INT8", [[1], [2]], [[0.5]]), "kernel")
    np.testing.assert_array_equal(computed(graph, name, (2, 1)), [[0.5], [1]])


def test_channels_along_two_axes_are_a_matrix_and_back(graph):
    values, scale = np.arange(12).reshape(2, 3, 2), np.float32([[[1], [2], [4]], [[8], [16], [32]]])
    name = onnx_formats.float_weight(graph, weight("INT8", values, scale), "kernel")
    assert operations(graph) == ["DequantizeLinear", "Reshape", "Transpose"]
    np.testing.assert_array_equal(computed(graph, name, (2, 3, 2)), values * scale)


def test_weights_without_a_scale(graph):
    name = onnx_formats.float_weight(graph, weight("BF16", [1.5, -2]), "kernel")
    assert operations(graph) == ["Cast"]
    np.testing.assert_array_equal(computed(graph, name, (2,)), [1.5, -2])
    assert onnx_formats.float_weight(graph, weight("FP32", [0.1]), "other") == "fc/other"
    assert onnx_formats.float_weight(graph, np.float32([[0.1, 0.2]]), "plain", np.transpose) == "fc/plain"
    assert operations(graph) == ["Cast"]
    np.testing.assert_array_equal(constants(graph)["fc/plain"], np.float32([[0.1], [0.2]]))


def test_weights_without_a_type_are_refused(graph):
    with pytest.raises(ValueError, match="Layer 'fc' has its weights in E3M6, for which ONNX has no type"):
        onnx_formats.float_weight(graph, weight("E3M6", [1.0], [1.0]), "kernel")
