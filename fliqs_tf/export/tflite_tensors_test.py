import numpy as np
import pytest

from fliqs_tf.export import tflite_codes
from fliqs_tf.export.steps import ActivationScale
from fliqs_tf.export.tflite_file import TfliteFile
from fliqs_tf.export.tflite_tensors import Tensors
from fliqs_tf.numerics.formats import Format

ONE = ActivationScale(Format("INT8"), np.float32(127))
TWO = ActivationScale(Format("INT8"), np.float32(254))
NARROW = ActivationScale(Format("INT4"), np.float32(7))


@pytest.fixture
def tensors():
    """Value 0 is an input of shape [3], value 1 has codes in steps of 1."""
    tensors = Tensors(TfliteFile())
    tensors.name(0, "x", (3,))
    tensors.new_float(0, "x")
    tensors.name(1, "made", (2,))
    tensors.record(1, ONE, tensors.new_codes(1, tflite_codes.parameters(ONE)))
    return tensors


def operations(tensors):
    """[NAME(input names -> output names)] of the file."""
    name = [tensor[0] for tensor in tensors.file.tensors]
    return [
        f"{operation}({', '.join(name[i] for i in inputs)} -> {', '.join(name[i] for i in outputs)})"
        for operation, inputs, outputs, _ in tensors.file.operations
    ]


def test_codes_are_dequantized_once(tensors):
    tensor = tensors.as_float(1)
    assert tensors.as_float(1) == tensor
    assert operations(tensors) == ["DEQUANTIZE(codes_1 -> made)"]
    assert tensors.file.tensors[tensor][:3] == ("made", (-1, 2), np.dtype(np.float32))


def test_floats_are_quantized_once_per_scale(tensors):
    first = tensors.as_codes(0, ONE)
    assert (float(first.parameters.scale), first.parameters.zero_point) == (1, 0)
    assert tensors.as_codes(0, ONE) == first
    assert tensors.as_codes(0, TWO).tensor != first.tensor
    assert operations(tensors) == ["QUANTIZE(x -> codes_0)", "QUANTIZE(x -> codes_0_1)"]


def test_a_narrow_format_takes_three_stages(tensors):
    codes = tensors.as_codes(0, NARROW)
    assert operations(tensors) == [
        "QUANTIZE(x -> codes_0)",
        "QUANTIZE(codes_0 -> codes_0_1)",
        "QUANTIZE(codes_0_1 -> codes_0_2)",
    ]
    stages = [tensor[3] for tensor in tensors.file.tensors if tensor[0].startswith("codes_0")]
    assert [stage.zero_point for stage in stages] == [120, -121, 0]
    assert stages[-1] == codes.parameters


def test_from_one_scale_to_another_by_way_of_float(tensors):
    tensors.as_codes(1, TWO)
    assert operations(tensors) == ["DEQUANTIZE(codes_1 -> made)", "QUANTIZE(made -> codes_1_1)"]


def test_what_is_within_the_range_is_not_cut_off(tensors):
    wide = ActivationScale(Format("INT4"), np.float32(7 * 127))  # codes of ONE reach 128, 1 step of INT4 is 127
    tensors.as_codes(1, wide)
    assert operations(tensors)[1:] == ["QUANTIZE(made -> codes_1_1)", "QUANTIZE(codes_1_1 -> codes_1_2)"]


def test_the_scale_of_a_value_is_that_of_what_makes_it(tensors):
    assert tensors.given(1) == ONE
    assert tensors.given(0) is None
    tensors.as_codes(0, TWO)
    assert tensors.given(0) is None  # rounded by a reader, but made in float
    tensors.as_float(1)
    assert tensors.given(1) == ONE


def test_a_value_at_a_scale_is_a_value_of_its_own(tensors):
    tensors.name(2, "rounded", (3,))
    tensors.round_to(0, TWO, 2)
    assert tensors.given(2) == TWO
    assert tensors.as_codes(2, TWO) == tensors.as_codes(0, TWO)
    assert operations(tensors) == ["QUANTIZE(x -> codes_0)"]


def test_a_value_that_is_another_one(tensors):
    for value in (2, 3):
        tensors.name(value, f"same{value}", (3,))
    tensors.pass_on(0, 2)
    assert tensors.as_float(2) == tensors.as_float(0)
    tensors.pass_on(1, 3)
    assert tensors.given(3) == ONE and tensors.as_codes(3, ONE) == tensors.as_codes(1, ONE)
    assert operations(tensors) == []
