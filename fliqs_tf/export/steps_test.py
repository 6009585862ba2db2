"""Steps as data, against numbers worked out by hand."""

import numpy as np
import pytest

from fliqs_tf.export import steps
from fliqs_tf.numerics.formats import Format


@pytest.mark.parametrize(
    ("fmt", "amax", "largest", "scale", "spread", "int8_scale"),
    [
        ("INT8", 127, 127, 1.0, 1, 1.0),
        ("INT8", 1, 127, np.float32(1) / np.float32(127), 1, np.float32(1) / np.float32(127)),
        ("INT4", 7, 7, 1.0, 18, np.float32(1 / 18)),  # 18 * 7 = 126 is the last multiple in int8
        ("INT3", 6, 3, 2.0, 42, np.float32(2 / 42)),
        ("INT2", 1, 1, 1.0, 127, np.float32(1 / 127)),
        ("INT7", 63, 63, 1.0, 2, 0.5),
        ("INT8", 0, 127, np.float32(2.0**-27), 1, np.float32(2.0**-27)),  # of a tensor that is always 0
    ],
)
def test_grids(fmt, amax, largest, scale, spread, int8_scale):
    grid = steps.ActivationScale(Format(fmt), np.float32(amax))
    assert (grid.largest, grid.scale, grid.spread, grid.int8_scale) == (largest, scale, spread, int8_scale)
    assert grid.scale.dtype == grid.int8_scale.dtype == np.float32
    assert grid.spread * grid.largest <= 127 < (grid.spread + 1) * grid.largest


def test_a_kernel_followed_by_gain_and_offset():
    """Gains 2, -0.5 and 0: scales take the magnitude, codes the sign, and a channel of gain 0 has codes of 0."""
    codes = np.array([[1, 2, 3], [-4, 5, -6]], np.int8)
    scale = np.array([0.5, 0.25, 0.125])
    linear = steps.Linear("dense", Format("INT8"), codes, scale, codes * scale, np.array([1.0, 2, 3]))
    then = linear.then(np.array([2, -0.5, 0]), np.array([10.0, 20, 30]))
    np.testing.assert_array_equal(then.codes, [[1, -2, 0], [-4, -5, 0]])
    np.testing.assert_array_equal(then.scale, [1, 0.125, 0.125])
    np.testing.assert_array_equal(then.values, [[1, -0.25, 0], [-4, -0.625, 0]])
    np.testing.assert_array_equal(then.bias, [12, 19, 30])
    np.testing.assert_array_equal(then.codes * then.scale, then.values)
    np.testing.assert_array_equal(linear.codes, codes)  # as it was


def test_a_float_kernel_has_no_codes_before_nor_after():
    linear = steps.Linear("dense", Format("FP32"), None, np.ones(1), np.array([[3.0]]), np.array([1.0]))
    then = linear.then(np.array([-2.0]), np.array([0.5]))
    assert then.codes is None
    assert (then.values, then.bias) == (-6, -1.5)


def test_a_kernel_of_ones():
    ones = steps.ones((2, 3), 4)
    assert ones.codes.shape == (2, 3, 4) and ones.operation == "depthwise"
    np.testing.assert_array_equal(ones.codes, 127)
    np.testing.assert_allclose(ones.codes * ones.scale, 1, rtol=1e-15)
    np.testing.assert_array_equal(ones.values, 1)
    np.testing.assert_array_equal(ones.bias, 0)


def test_readers_stand_once_each():
    twice = steps.Step("add", "a", (0, 0), 1, ((2,), (2,), (2,)))
    both = steps.Step("add", "b", (0, 1), 2, ((2,), (2,), (2,)))
    graph = steps.IntegerNetwork(((0, "x", (2,), "float32"),), [twice, both], (2,), ("y",))
    assert {value: [step.path for step in found] for value, found in graph.readers.items()} == {
        0: ["a", "b"],
        1: ["b"],
    }
