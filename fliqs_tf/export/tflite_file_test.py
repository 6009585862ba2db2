"""What the writer of `.tflite` files puts into them, read back with the classes of the schema."""

import numpy as np
import pytest
from ai_edge_litert import interpreter
from ai_edge_litert import schema_py_generated as schema

from fliqs_tf.export import tflite_file


def read(content):
    assert content[4:8] == b"TFL3"
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))


def buffer(model, tensor):
    data = model.buffers[tensor.buffer].data
    return None if data is None else bytes(np.asarray(data, np.uint8))


@pytest.fixture(scope="module")
def dense():
    """x -> codes -> a product with int4 weights -> y."""
    file = tflite_file.TfliteFile()
    x = file.tensor("x", (-1, 2), np.float32)
    codes = file.tensor("codes", (-1, 2), np.int8, tflite_file.QuantizationParameters(0.5, 3))
    grid = tflite_file.QuantizationParameters(np.array([0.25, 0.5, 1.0]), 0, 0)
    weights = file.tensor("w", (3, 2), "int4", grid, np.array([[1, -1], [7, -7], [0, 2]]))
    bias = file.tensor(
        "b", (3,), np.int32, tflite_file.QuantizationParameters(np.array([0.125, 0.25, 0.5])), np.array([1, -2, 300])
    )
    sums = file.tensor("codes", (-1, 3), np.int8, tflite_file.QuantizationParameters(2.0))
    y = file.tensor("y", (-1, 3), np.float32)
    file.operation("QUANTIZE", [x], [codes])
    file.operation("FULLY_CONNECTED", [codes, weights, bias], [sums], fusedActivationFunction=1, keepNumDims=True)
    file.operation("DEQUANTIZE", [sums], [y])
    return file.to_bytes([x], [y], "an example")


def test_tensors(dense):
    model = read(dense)
    (graph,) = model.subgraphs
    types = schema.TensorType
    assert [(t.name.decode(), t.type, list(t.shape)) for t in graph.tensors] == [
        ("x", types.FLOAT32, [1, 2]),
        ("codes", types.INT8, [1, 2]),
        ("w", types.INT4, [3, 2]),
        ("b", types.INT32, [3]),
        ("codes_1", types.INT8, [1, 3]),  # a name stands once
        ("y", types.FLOAT32, [1, 3]),
    ]
    assert [None if t.shapeSignature is None else list(t.shapeSignature) for t in graph.tensors] == [
        [-1, 2], [-1, 2], None, None, [-1, 3], [-1, 3]
    ]  # fmt: skip
    assert (list(graph.inputs), list(graph.outputs), model.version) == ([0], [5], 3)
    assert model.description == b"an example"


def test_quantization_parameters(dense):
    tensors = read(dense).subgraphs[0].tensors
    found = [t.quantization for t in tensors]
    assert found[0] is None and found[5] is None
    said = [(list(q.scale), list(q.zeroPoint), q.quantizedDimension) for q in found[1:5]]
    assert said == [
        ([0.5], [3], 0),
        ([0.25, 0.5, 1.0], [0, 0, 0], 0),
        ([0.125, 0.25, 0.5], [0, 0, 0], 0),
        ([2.0], [0], 0),
    ]


def test_buffers(dense):
    model = read(dense)
    tensors = model.subgraphs[0].tensors
    assert [t.buffer for t in tensors] == [0, 0, 1, 2, 0, 0]
    assert not buffer(model, tensors[0])  # buffer 0 is the empty one
    # Two codes to a byte, the first one low: 1 and -1 (15), 7 and -7 (9), 0 and 2.
    assert buffer(model, tensors[2]) == bytes([0xF1, 0x97, 0x20])
    assert buffer(model, tensors[3]) == np.array([1, -2, 300], "<i4").tobytes()


def test_operations_and_their_versions(dense):
    model = read(dense)
    operators = schema.BuiltinOperator
    codes = [(c.builtinCode, c.deprecatedBuiltinCode, c.version) for c in model.operatorCodes]
    assert codes == [
        (operators.QUANTIZE, operators.QUANTIZE, 2),
        (operators.FULLY_CONNECTED, operators.FULLY_CONNECTED, 10),  # for int4 weights
        (operators.DEQUANTIZE, operators.DEQUANTIZE, 2),
    ]
    found = model.subgraphs[0].operators
    said = [(o.opcodeIndex, list(o.inputs), list(o.outputs)) for o in found]
    assert said == [(0, [0], [1]), (1, [1, 2, 3], [4]), (2, [4], [5])]
    assert found[1].builtinOptionsType == schema.BuiltinOptions.FullyConnectedOptions
    assert found[1].builtinOptions.fusedActivationFunction == 1 and found[1].builtinOptions.keepNumDims


def test_an_int8_matrix_has_an_older_version_and_operations_share_their_code():
    file = tflite_file.TfliteFile()
    x = file.tensor("x", (1, 2), np.float32)
    w = file.tensor("w", (2, 2), np.int8, tflite_file.QuantizationParameters(1.0), np.eye(2))
    for _ in range(2):
        y = file.tensor("y", (1, 2), np.float32)
        file.operation("FULLY_CONNECTED", [x, w, -1], [y])
        x = y
    model = read(file.to_bytes([0], [x], ""))
    assert [c.version for c in model.operatorCodes] == [4]
    assert [o.opcodeIndex for o in model.subgraphs[0].operators] == [0, 0]
    assert model.subgraphs[0].tensors[0].shapeSignature is None  # a batch of one, and no other


def test_names_of_inputs_and_outputs(dense):
    (signature,) = read(dense).signatureDefs
    assert signature.signatureKey == b"serving_default"
    assert [(e.name, e.tensorIndex) for e in (*signature.inputs, *signature.outputs)] == [(b"x", 0), (b"y", 5)]
    file = tflite_file.TfliteFile()
    x = file.tensor("x", (1, 2), np.float32)
    (signature,) = read(file.to_bytes([x], [x, x], "")).signatureDefs
    assert [e.name for e in signature.outputs] == [b"x_0", b"x_1"]


def test_a_field_that_the_options_do_not_have_is_refused():
    file = tflite_file.TfliteFile()
    x = file.tensor("x", (1, 2), np.float32)
    file.operation("ADD", [x, x], [file.tensor("y", (1, 2), np.float32)], fused=1)
    with pytest.raises(AttributeError, match="AddOptions has no field fused"):
        file.to_bytes([x], [x], "")


def test_it_computes(dense):
    """x = (1, 3) in steps of 0.5 is (2, 6). Row 0: 0.5 * 0.25 * (2 - 6 + 1) < 0, and ReLU. Row 1: 0.25 * (14 - 42 - 2)
    is too. Row 2: 0.5 * (12 + 300) = 156, 78 output codes."""
    program = interpreter.Interpreter(model_content=dense)
    assert program.get_signature_list() == {"serving_default": {"inputs": ["x"], "outputs": ["y"]}}
    runner = program.get_signature_runner()
    np.testing.assert_array_equal(runner(x=np.float32([[1, 3]]))["y"], [[0, 0, 156]])
