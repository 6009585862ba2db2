"""Biases and codes as integer kernels take them, against numbers worked out by hand."""

import numpy as np
import pytest

from fliqs_tf.export import steps, tflite_kernels
from fliqs_tf.numerics.formats import Format


def linear(codes, scale, bias, operation="dense"):
    codes, scale = np.array(codes, np.int8), np.array(scale, np.float64)
    return steps.Linear(operation, Format("INT8"), codes, scale, codes * scale, np.array(bias, np.float64))


def prepared(codes, scale, bias, source=0.5, target=1.0):
    return tflite_kernels.with_int32_biases("fc", linear(codes, scale, bias), source, target)


def test_a_bias_is_a_whole_number_of_products_of_two_steps():
    """Input steps of 0.5 and weight steps of 0.25 and 0.125 make 0.125 and 0.0625: 1 is 8 of these, -1 is -16."""
    scale, codes, bias = prepared([[100, -127], [3, 4]], [0.25, 0.125], [1.0, -1.04])
    np.testing.assert_array_equal(bias, [8, -17])  # -16.64
    assert bias.dtype == np.int32
    np.testing.assert_array_equal(scale, [0.25, 0.125])
    np.testing.assert_array_equal(codes, [[100, -127], [3, 4]])


def test_a_scale_too_small_for_its_bias_grows_and_codes_shrink():
    """A bias of 2**20 in units of 0.5 * 2**-12 = 2**-13 would be 2**33: the scale grows 8-fold, to 2**30 units."""
    scale, codes, bias = prepared([[80, 1]] * 4, [2.0**-12, 1.0], [2.0**20, 3.0])
    np.testing.assert_array_equal(scale, [2.0**-9, 1])
    np.testing.assert_array_equal(codes, [[10, 1]] * 4)
    np.testing.assert_array_equal(bias, [2**30, 6])


def test_a_channel_whose_products_are_below_a_thousandth_of_a_step_loses_its_codes():
    """Of one code, 127 * 0.5 * scale: 1e-3 output steps are reached at a scale of 1.575e-5."""
    scale, codes, bias = prepared([[1, 1, 1]], [1.5e-5, 1.6e-5, 0.0], [2.0, 0.0, 2.0])
    np.testing.assert_array_equal(codes, [[0, 1, 0]])
    np.testing.assert_array_equal(scale, [1 / 0.5 / 1024, 1.6e-5, 1 / 0.5 / 1024])
    np.testing.assert_array_equal(bias, [2048, 0, 2048])  # 2 in steps of 1 / 1024


def test_what_is_given_stays():
    given = linear([[1]], [1e-9], [5.0])
    tflite_kernels.with_int32_biases("fc", given, 0.5, 1.0)
    assert given.codes[0, 0] == 1 and given.scale[0] == 1e-9


@pytest.mark.parametrize(("scale", "bias"), [([1, 1], [0, np.nan]), ([1, np.inf], [0, 0])])
def test_what_is_not_finite_is_named(scale, bias):
    with pytest.raises(ValueError, match="Layer 'fc': channel 1 has the bias"):
        prepared([[1, 1]], scale, bias)


@pytest.mark.parametrize(
    ("operation", "shape", "arranged", "place"),
    [
        ("conv", (2, 3, 4, 5), (5, 2, 3, 4), (4, 1, 2, 3)),  # the last entry of [h, w, in, out] stands at ...
        ("depthwise", (2, 3, 5), (1, 2, 3, 5), (0, 1, 2, 4)),
        ("dense", (4, 5), (5, 4), (4, 3)),
    ],
)
def test_order_of_axes(operation, shape, arranged, place):
    kernel = np.arange(np.prod(shape)).reshape(shape)
    found = tflite_kernels.arranged(operation, kernel)
    assert found.shape == arranged
    assert found[place] == kernel.size - 1
    assert found[(0,) * len(arranged)] == 0
    second = tuple(1 if a == max(place) else 0 for a in place)  # one channel further
    assert found[second] == 1
