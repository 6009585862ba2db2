import numpy as np
import pytest

from fliqs_tf.export import tflite_network
from fliqs_tf.export.steps import ActivationScale, IntegerNetwork, Step
from fliqs_tf.numerics.formats import Format

VECTOR = (4,)
ONE = ActivationScale(Format("INT8"), np.float32(127))
TWO = ActivationScale(Format("INT8"), np.float32(254))
FLOAT = ActivationScale(Format("BF16"), np.float32(1))


def quantize(value, result, scale=ONE):
    return Step("quantize", f"q{result}", (value,), result, (VECTOR, VECTOR), options={"scale": scale})


def relu(value, result):
    return Step("activation", f"relu{result}", (value,), result, (VECTOR, VECTOR), options={"function": "relu"})


def softmax(value, result):
    return Step("activation", f"softmax{result}", (value,), result, (VECTOR, VECTOR), options={"function": "softmax"})


def add(left, right, result):
    return Step("add", f"add{result}", (left, right), result, (VECTOR,) * 3, last=(f"add{result}", 0))


def network(*steps, outputs, inputs=((0, "x", VECTOR, "float32"),)):
    return IntegerNetwork(inputs, list(steps), outputs, tuple(f"y{i}" for i in outputs))


@pytest.mark.parametrize(
    ("steps", "scale"),
    [
        ([quantize(1, 2)], ONE),
        ([quantize(1, 2), quantize(1, 3)], ONE),
        ([quantize(1, 2), quantize(1, 3, TWO)], None),  # two scales
        ([relu(1, 2), quantize(2, 3)], ONE),  # what moves codes wants those of its readers
        ([relu(1, 2), quantize(2, 3), quantize(1, 4)], ONE),
        ([relu(1, 2), quantize(2, 3, TWO), quantize(1, 4)], None),
        ([softmax(1, 2), quantize(1, 3)], None),  # it reads floats
        ([softmax(1, 2), quantize(2, 3)], None),
        ([quantize(1, 2, FLOAT)], None),
        ([], None),
    ],
)
def test_the_scale_that_all_readers_want(steps, scale):
    assert tflite_network.wanted(network(*steps, outputs=(99,)), 1) == scale


def test_an_output_is_wanted_in_float():
    assert tflite_network.wanted(network(quantize(1, 2), outputs=(1, 2)), 1) is None


def operations(built):
    name = [tensor[0] for tensor in built.file.tensors]
    return [
        f"{operation}({', '.join(name[i] for i in ins)} -> {name[out]})"
        for operation, ins, (out,), _ in built.file.operations
    ]


def test_from_float_to_codes_and_back():
    built = tflite_network.build(
        network(quantize(0, 1), quantize(0, 2, TWO), add(1, 2, 3), quantize(3, 4), softmax(4, 5), outputs=(5,)), True
    )
    assert operations(built) == [
        "QUANTIZE(x -> codes_0)",
        "QUANTIZE(x -> codes_0_1)",
        "ADD(codes_0, codes_0_1 -> codes_3)",
        "DEQUANTIZE(codes_3 -> q4)",
        "SOFTMAX(q4 -> softmax5)",
    ]
    assert [built.file.tensors[i][0] for i in (*built.inputs, *built.outputs)] == ["x", "softmax5"]


def test_a_sum_that_nobody_wants_in_codes_is_computed_in_float():
    built = tflite_network.build(network(quantize(0, 1), add(1, 1, 2), outputs=(2,)), True)
    assert operations(built) == ["QUANTIZE(x -> codes_0)", "DEQUANTIZE(codes_0 -> q1)", "ADD(q1, q1 -> add2)"]


def test_and_one_of_floats_too():
    built = tflite_network.build(network(softmax(0, 1), add(1, 1, 2), quantize(2, 3), outputs=(3,)), True)
    assert operations(built)[:3] == [
        "SOFTMAX(x -> softmax1)",
        "ADD(softmax1, softmax1 -> add2)",
        "QUANTIZE(add2 -> codes_2)",
    ]


def test_what_moves_stays_in_codes_if_it_gets_them():
    built = tflite_network.build(network(quantize(0, 1), relu(1, 2), outputs=(2,)), True)
    assert operations(built) == [
        "QUANTIZE(x -> codes_0)",
        "RELU(codes_0 -> codes_2)",
        "DEQUANTIZE(codes_2 -> relu2)",
    ]


def test_inputs_of_a_float_format_are_not_rounded():
    built = tflite_network.build(network(quantize(0, 1, FLOAT), softmax(1, 2), outputs=(2,)), True)
    assert operations(built) == ["SOFTMAX(x -> softmax2)"]


def test_roundings_belong_to_the_call_that_gives_the_value():
    product = Step("multiply", "product", (1, 1), 2, (VECTOR,) * 3, last=("product", 0))
    built = tflite_network.build(network(quantize(0, 1), product, quantize(2, 3, TWO), outputs=(3,)), True)
    (((place, _),), (rounding,)) = built.roundings.keys(), built.roundings.values()
    assert place == "product"
    np.testing.assert_array_equal(rounding[0][1]["multiplier"], [0.5])  # 1 * 1 / 2
    assert not tflite_network.build(network(quantize(0, 1), add(1, 1, 2), quantize(2, 3), outputs=(3,)), True).roundings


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((4,), "int32", "'x' is int32; TFLite export takes float32"), ((None,), "float32", "'x' has the open shape")],
)
def test_inputs_that_a_file_cannot_have(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        tflite_network.build(network(outputs=(0,), inputs=((0, "x", shape, dtype),)), True)
