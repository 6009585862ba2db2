import doctest
import math

import pytest
import tensorflow as tf

from fliqs_tf.search import schedules


@pytest.mark.parametrize(
    "name, values",
    [
        # At steps 0, 20 (end of the warmup), 40, 60, 100 and 200 of a run of 100.
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0, 0.25, 0.5, 1, 1]),
        ("cosine", [0, 0, (1 - math.cos(math.pi / 4)) / 2, 0.5, 1, 1]),
        ("heaviside", [0, 0, 0, 1, 1, 1]),
    ],
)
def test_shape(name, values):
    for step, value in zip([0, 20, 40, 60, 100, 200], values):
        assert float(schedules.fraction(name, step, 100, 20)) == pytest.approx(value, abs=1e-6)


def test_heaviside_steps_at_half_of_the_run():
    assert [float(schedules.fraction("heaviside", step, 100, 20)) for step in (49, 50)] == [0, 1]


def test_a_warmup_as_long_as_the_run_divides_by_nothing():
    assert float(schedules.fraction("cosine", 10, 10, 10)) == 0


def test_entropy_is_beta_max_times_shape():
    assert float(schedules.Entropy("cosine", 100, 20, beta_max=0.3)(60)) == pytest.approx(0.15)
    assert float(schedules.Entropy("cosine", 100, beta_max=0)(60)) == 0


def test_growing_is_constant_in_the_warmup_then_exponential():
    rate = schedules.Growing(3e-4, 100, 20)
    assert [float(rate(s)) for s in (0, 20, 60, 100)] == pytest.approx([3e-4, 3e-4, 3e-4 * math.sqrt(10), 3e-3])


def test_one_trace_serves_all_steps_and_lengths():
    traces = []

    @tf.function
    def shape(step, total):
        traces.append(1)
        return schedules.fraction("cosine", step, total, total / 4)

    for step in (1, 50, 99):
        shape(tf.constant(step), tf.constant(100 + step))
    assert len(traces) == 1


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="Unknown schedule 'cosin'; known: constant, linear, cosine, heaviside"):
        schedules.Entropy("cosin", 100)


def test_doctests():
    assert doctest.testmod(schedules).failed == 0
