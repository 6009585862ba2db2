import numpy as np
import pytest

from fliqs_tf.export import tflite_codes
from fliqs_tf.export.steps import ActivationScale
from fliqs_tf.numerics.formats import Format


def scale(name, amax):
    return ActivationScale(Format(name), np.float32(amax))


def said(stages):
    return [(float(stage.scale), stage.zero_point) for stage in stages]


@pytest.mark.parametrize("activation", ["linear", "relu", "relu6", "clipped"])
def test_int8_is_written_as_it_is_read(activation):
    assert said(tflite_codes.stages(scale("INT8", 127), activation)) == [(1, 0)]
    assert said([tflite_codes.parameters(scale("INT8", 63.5))]) == [(0.5, 0)]


@pytest.mark.parametrize(
    ("activation", "zero_points"), [("linear", [120, -121]), ("relu", [120]), ("relu6", [120]), ("clipped", [0])]
)
def test_int4_is_cut_off_by_the_ends_of_int8_and_then_spread(activation, zero_points):
    *cut, last = tflite_codes.stages(scale("INT4", 7), activation)
    assert said(cut) == [(1, z) for z in zero_points]
    assert last == tflite_codes.parameters(scale("INT4", 7))
    assert float(last.scale) == pytest.approx(1 / 18) and last.zero_point == 0  # 7 * 18 = 126


@pytest.mark.parametrize(("name", "largest"), [("INT2", 1), ("INT3", 3), ("INT5", 15), ("INT7", 63)])
def test_the_ends_of_int8_are_the_ends_of_the_format(name, largest):
    above, below, last = tflite_codes.stages(scale(name, largest), "linear")
    assert above.scale * (127 - above.zero_point) == largest
    assert below.scale * (-128 - below.zero_point) == -largest
    # Every code of the format is one of the last stage, and the largest is still an int8.
    spread = 127 // largest
    np.testing.assert_allclose(last.scale * spread, 1, rtol=1e-6)
    assert spread * largest <= 127


def test_what_lies_within():
    # Codes of -128 .. 127 in steps of 1 reach 128; INT8 of amax a reaches a * 127.49 / 127 before it cuts off.
    assert not tflite_codes.lies_within(scale("INT8", 127), scale("INT8", 127))
    assert not tflite_codes.lies_within(scale("INT8", 127), scale("INT8", 127.5))
    assert tflite_codes.lies_within(scale("INT8", 127), scale("INT8", 127.6))
    # INT4 of amax a reaches a * 7.49 / 7.
    assert tflite_codes.lies_within(scale("INT8", 127), scale("INT4", 119.7))
    assert not tflite_codes.lies_within(scale("INT8", 127), scale("INT4", 119.6))
