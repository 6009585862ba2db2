import copy

import numpy as np
import pytest

from fliqs_tf.export import folding
from fliqs_tf.export.steps import Linear, Step
from fliqs_tf.numerics.formats import Format

SHAPE = (4, 4, 2)


def step(kind, path, inputs, output, **options):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return Step(kind, path, inputs, output, (SHAPE,) * (len(inputs) + 1), options=options, last=(path, 0))


def linear(path, value, output):
    made = step("linear", path, value, output)
    codes = np.array([[1, 2], [3, -4]], np.int8)
    made.linear = Linear("dense", Format("INT8"), codes, np.array([2.0, 0.5]), codes * [2.0, 0.5], np.array([1.0, 1.0]))
    return made


def affine(path, value, output, gain, offset):
    return step("affine", path, value, output, gain=np.array(gain), offset=np.array(offset))


def activation(path, value, output, function="relu"):
    return step("activation", path, value, output, function=function)


def said(steps):
    """(kind, path, activation, inputs, output)."""
    return [(s.kind, s.path, s.activation, s.inputs, s.output) for s in steps]


def test_what_does_nothing_is_left_out_and_its_readers_read_what_it_read():
    steps = [step("identity", "a", 0, 1), activation("b", 1, 2, "linear"), step("max_pool", "c", 2, 3)]
    assert said(folding.without_identities(steps, {3})) == [("max_pool", "c", "linear", (0,), 3)]


def test_but_not_where_it_makes_an_output():
    steps = [step("identity", "a", 0, 1), step("identity", "b", 1, 2)]
    assert said(folding.without_identities(steps, {2})) == [("identity", "b", "linear", (0,), 2)]


def test_a_gain_goes_into_scales_and_its_sign_into_codes():
    norm = affine("norm", 1, 2, [3.0, -2.0], [5.0, 7.0])
    norm.shift = "beta"
    (step,) = folding.merged([linear("fc", 0, 1), norm], {2})
    assert said([step]) == [("linear", "fc", "linear", (0,), 2)]
    assert step.last == ("norm", 0) and step.shift == "beta"
    np.testing.assert_array_equal(step.linear.codes, [[1, -2], [3, 4]])
    np.testing.assert_array_equal(step.linear.scale, [6, 1])
    np.testing.assert_array_equal(step.linear.bias, [1 * 3 + 5, 1 * -2 + 7])


def test_two_gains_are_one():
    """3 * (2 * x + 1) + 4."""
    (step,) = folding.merged([affine("a", 0, 1, [2.0], [1.0]), affine("b", 1, 2, [3.0], [4.0])], {2})
    assert (step.options["gain"], step.options["offset"]) == ([6], [7])


@pytest.mark.parametrize("function", ["relu", "relu6"])
@pytest.mark.parametrize(
    "before",
    [linear("a", 0, 1), affine("a", 0, 1, [2.0], [1.0]), step("add", "a", (0, 0), 1)],
    ids=lambda before: before.kind,
)
def test_a_relu_goes_into_what_kernels_do_it_after(before, function):
    (step,) = folding.merged([copy.deepcopy(before), activation("r", 1, 2, function)], {2})
    assert said([step]) == [(before.kind, "a", function, before.inputs, 2)]
    assert step.last == ("r", 0)


@pytest.mark.parametrize(
    "after",
    [activation("b", 1, 2, "softmax"), step("max_pool", "b", 1, 2), linear("b", 1, 2), step("add", "b", (1, 0), 2)],
    ids=lambda after: after.kind,
)
def test_nothing_else_goes_into_what_is_before(after):
    assert len(folding.merged([linear("a", 0, 1), after], {2})) == 2


def test_nothing_goes_into_a_product_or_a_pool():
    for kind in ("multiply", "max_pool", "mean", "quantize"):
        assert len(folding.merged([step(kind, "a", 0, 1), activation("r", 1, 2)], {2})) == 2


def test_nothing_is_folded_through_a_relu():
    steps = [linear("a", 0, 1), activation("r", 1, 2), affine("norm", 2, 3, [2.0, 2.0], [1.0, 1.0])]
    assert [(s.path, s.activation) for s in folding.merged(steps, {3})] == [("a", "relu"), ("norm", "linear")]


def test_what_others_read_too_stays():
    reader = step("max_pool", "b", 1, 3)
    assert len(folding.merged([linear("a", 0, 1), activation("r", 1, 2), reader], {2, 3})) == 3
    assert len(folding.merged([linear("a", 0, 1), activation("r", 1, 2)], {1, 2})) == 2  # the caller does
