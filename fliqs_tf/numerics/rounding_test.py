"""The rounding function against ml_dtypes, gfloat and a search in the table of values."""

import doctest
import functools

import gfloat
import hypothesis
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fliqs_tf.numerics import rounding
from fliqs_tf.numerics.formats import Format
from fliqs_tf.numerics.rounding import fake_quant

INTS = [f"INT{b}" for b in range(2, 17)]
FLOATS = [f"E{x}M{y}" for x in range(1, 6) for y in range(11)]
SCALED = [*INTS, *FLOATS]
ALL = [*SCALED, "BF16", "FP32"]
FEW = ["INT2", "INT4", "INT8", "INT16", "E1M0", "E2M1", "E3M0", "E4M3", "E5M2", "E5M10", "BF16", "FP32"]
TINY = np.finfo(np.float32).tiny

# XLA compiles the function once per shape: every test uses one of a few sizes.
SIZES = (16, 4096, 2**17)


def padded(x):
    """x as float32, repeated up to the next of SIZES."""
    x = np.asarray(x, np.float32)
    return np.resize(x, next(size for size in SIZES if size >= len(x)))


def quantized(x, name, amax):
    return fake_quant(padded(x), name, amax=amax).numpy()[: len(x)]


@functools.lru_cache
def table(name):
    """Values of zero and above; their index is their code."""
    values = Format(name).values()
    return values[values >= 0]


def expected(t, name):
    """Nearest value, ties to the even code, saturating, by search in the table of values, in float64."""
    values = table(name)
    magnitude = np.minimum(np.abs(t.astype(np.float64)), values[-1])
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    up = np.where(magnitude - low == high - magnitude, above % 2 == 0, high - magnitude < magnitude - low)
    return np.copysign(np.where(up, high, low), t)


def spread(n, low, high, seed=0):
    """Numbers of both signs, their logarithms uniform between those of low and high."""
    rng = np.random.default_rng(seed)
    magnitude = np.exp(rng.uniform(np.log(low), np.log(high), n))
    return (magnitude * rng.choice([-1, 1], n)).astype(np.float32)


def same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a, np.float32).view(np.int32), np.asarray(b, np.float32).view(np.int32))


def test_doctests():
    assert doctest.testmod(rounding).failed == 0


# ---- every value, every halfway case


@pytest.mark.parametrize("name", SCALED)
def test_every_value_stays(name):
    values = Format(name).values()
    same_bits(quantized(values, name, amax=Format(name).max), values)


@pytest.mark.parametrize("name", SCALED)
def test_halfway_between_neighbours_goes_to_the_even_code(name):
    values = table(name)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    codes = np.arange(len(middle))
    even = values[codes + codes % 2]
    amax = Format(name).max
    np.testing.assert_array_equal(quantized(middle, name, amax), even)
    np.testing.assert_array_equal(quantized(-middle, name, amax), -even)
    np.testing.assert_array_equal(quantized(np.nextafter(middle, np.float32(0)), name, amax), values[:-1])
    np.testing.assert_array_equal(quantized(np.nextafter(middle, np.float32(np.inf)), name, amax), values[1:])


def test_halfway_by_hand():
    assert quantized([0.5, 1.5, 2.5, 6.5, -0.5, -3.5], "INT4", 7).tolist() == [0, 2, 2, 6, 0, -4]
    assert quantized([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], "E2M1", 6).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert quantized([0.125, 0.375, 1.5, 3.0, 12.0], "E3M0", 16).tolist() == [0, 0.5, 2, 2, 8]


# ---- independent libraries


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("E2M1", ml_dtypes.float4_e2m1fn),
        ("E2M3", ml_dtypes.float6_e2m3fn),
        ("E3M2", ml_dtypes.float6_e3m2fn),
        ("E4M3", ml_dtypes.float8_e4m3fn),
        ("E5M2", ml_dtypes.float8_e5m2),
        ("E5M10", np.float16),
    ],
)
def test_floats_are_ml_dtypes_casts(name, dtype):
    top = Format(name).max
    x = np.concatenate([spread(100_000, 1e-9, top), np.linspace(-top, top, 30_001, dtype=np.float32)])
    same_bits(quantized(x, name, amax=top), x.astype(dtype).astype(np.float32))


def test_bf16_is_the_cast():
    x = np.concatenate([spread(100_000, 1e-36, 3.4e38), np.linspace(-9, 9, 30_001, dtype=np.float32)])
    same_bits(quantized(x, "BF16", amax=1), x.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("name", ["BF16", "FP32"])
def test_every_bf16_value_stays(name):
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    values = values[~(np.abs(values) < TINY) & ~np.isnan(values)]
    same_bits(quantized(values, name, amax=1), values)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_those_of_gfloat(name):
    x, y = (int(part) for part in name[1:].split("M"))
    nans, domain = {
        (4, 3): (1, gfloat.Domain.Finite),
        (5, 2): (3, gfloat.Domain.Extended),
        (5, 10): (2**10 - 1, gfloat.Domain.Extended),
    }.get((x, y), (0, gfloat.Domain.Finite))
    info = gfloat.FormatInfo(
        name,
        k=1 + x + y,
        precision=y + 1,
        bias=2 ** (x - 1) - 1,
        is_signed=True,
        domain=domain,
        has_nz=True,
        num_high_nans=nans,
        has_subnormals=True,
        is_twos_complement=False,
    )
    t = np.concatenate([spread(3000, 2.0 ** (-16 - y), 2 * info.max), np.linspace(-1, 1, 1001, dtype=np.float32)])
    of_gfloat = gfloat.round_ndarray(info, t.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True)
    same_bits(quantized(t, name, amax=info.max), of_gfloat)


@pytest.mark.parametrize("name", INTS)
def test_integers_are_numpy_rint(name):
    top = Format(name).max
    x = np.concatenate([spread(3000, 0.01, 3 * top), np.linspace(-top, top, 1001, dtype=np.float32)])
    same_bits(quantized(x, name, amax=top), np.rint(np.clip(x, -top, top)))


def test_fp32_changes_nothing():
    x = np.concatenate([spread(4000, 1e-37, 3e38), [0.0, -0.0, np.inf, -np.inf, np.finfo(np.float32).max]])
    same_bits(quantized(x, "FP32", amax=1), x)


@pytest.mark.parametrize("amax", [0.37, 3.0, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("name", SCALED)
def test_any_scale_is_the_table_of_values_times_the_scale(name, amax):
    scale = np.float32(amax) / np.float32(Format(name).max)
    x = spread(4096, amax * 1e-4, amax * 1.1, seed=1)
    same_bits(quantized(x, name, amax), expected(x / scale, name).astype(np.float32) * scale)


# ---- edges


@pytest.mark.parametrize("name", SCALED)
def test_beyond_the_range_saturates(name):
    top = np.float32(Format(name).max)
    x = [top, np.nextafter(top, np.float32(np.inf)), 1.01 * top, 100 * top, 3.4e38, np.inf]
    assert quantized(x, name, amax=top).tolist() == [top] * 6
    assert quantized(np.negative(x), name, amax=top).tolist() == [-top] * 6


@pytest.mark.parametrize("name", ALL)
def test_nan_stays_and_zeros_keep_their_sign(name):
    y = quantized([np.nan, 0.0, -0.0, 1.0], name, amax=1.0)
    assert np.isnan(y[0])
    assert y[1:].tolist() == [0, 0, 1]
    assert np.signbit(y).tolist()[1:] == [False, True, False]


def test_bf16_overflows_as_the_cast_does():
    half_a_step_above = np.float32((2 - 2.0**-8) * 2.0**127)
    x = [half_a_step_above, np.nextafter(half_a_step_above, np.float32(0)), np.inf, -3.4e38]
    assert quantized(x, "BF16", amax=1).tolist() == [np.inf, Format("BF16").max, np.inf, -np.inf]


@pytest.mark.parametrize("name", ALL)
def test_float32_denormals_count_as_zero_and_keep_their_sign(name):
    y = quantized([1e-45, -1e-39, TINY / 2], name, amax=1.0)
    assert y.tolist() == [0, 0, 0]
    assert np.signbit(y).tolist() == [False, True, False]


@pytest.mark.parametrize("name", SCALED)
def test_a_range_of_zero_gives_zero(name):
    y = fake_quant(np.zeros(16, np.float32), name).numpy()
    assert y.tolist() == [0] * 16


@pytest.mark.parametrize("name", FEW)
def test_a_zero_channel_leaves_the_others_alone(name):
    x = np.zeros((4, 4), np.float32)
    x[:, 1] = [1.0, -0.3, 0.2, 0.0]
    y = fake_quant(x, name, axis=1).numpy()
    assert not y[:, [0, 2, 3]].any()
    same_bits(y[:, 1], fake_quant(np.tile(x[:, 1:2], 4), name).numpy()[:, 1])


def test_a_tiny_range_has_the_smallest_normal_number_as_its_scale():
    x = np.array([5.0, -3.0, 2.4, 1.0], np.float32) * TINY
    assert (quantized(x, "INT8", amax=5 * TINY) / TINY).tolist() == [5, -3, 2, 1]


@pytest.mark.parametrize("name", FEW)
def test_huge_values_do_not_overflow(name):
    x = np.array([3.3e38, -3.3e38, 1e38, 0], np.float32)
    y = fake_quant(np.resize(x, 16), name).numpy()
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[:2], x[:2], rtol=2**-7)


def test_nan_and_inf_spoil_a_range_taken_from_them():
    """Only their own channel's; with a given amax they do nothing to their neighbours."""
    x = np.ones((4, 4), np.float32)
    x[0, 1], x[0, 2] = np.nan, -np.inf
    y = fake_quant(x, "INT4", axis=1).numpy()
    assert np.isnan(y[:, 1:3]).all()
    assert (y[:, [0, 3]] == 1).all()
    y = fake_quant(x, "INT4", amax=1.0).numpy()
    assert (np.isnan(y) == np.isnan(x)).all()
    assert y[0].tolist()[2:] == [-1, 1]
    assert (y[1:] == 1).all()


@pytest.mark.parametrize("amax", [np.nan, np.inf])
def test_a_range_that_is_not_finite_gives_nan(amax):
    assert np.isnan(quantized([1.0, 2.0], "INT8", tf.constant(amax))).all()


@pytest.mark.parametrize("shape", [(), (0,), (0, 4)])
def test_scalars_and_empty_tensors(shape):
    y = fake_quant(tf.ones(shape), "INT4")
    assert y.shape == shape
    assert (y.numpy() == 1).all()


# ---- properties of every format


NUMBERS = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100, allow_subnormal=False)
ARRAYS = hnp.arrays(np.float32, 16, elements=NUMBERS)
RANGES = st.floats(width=32, min_value=2.0**-60, max_value=2.0**60)


def scale_of(name, amax):
    fmt = Format(name)
    return np.float32(amax) / np.float32(fmt.max) if fmt.is_scaled else np.float32(1)


@pytest.mark.parametrize("name", ALL)
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(x=ARRAYS, amax=RANGES)
def test_properties(name, x, amax):
    y = quantized(x, name, amax)
    scale = scale_of(name, amax)
    fmt = Format(name)

    same_bits(quantized(y, name, amax), y)  # idempotent
    same_bits(quantized(-x, name, amax), -y)  # odd
    order = np.argsort(x, kind="stable")
    assert (np.diff(y[order]) >= 0).all()  # monotone

    with np.errstate(over="ignore"):
        t = (x / scale).astype(np.float64)
    inside = np.abs(t) <= fmt.max
    binade = np.maximum(np.floor(np.log2(np.maximum(np.abs(t), 1e-300))), fmt.min_exponent)
    step = 2.0 ** (binade - fmt.mantissa_bits) * float(scale)
    slack = np.abs(x.astype(np.float64)) * 2.0**-23 + 2.0**-126  # of the division and the product in float32
    assert (np.abs(y.astype(np.float64) - x) <= step / 2 + slack)[inside].all()  # at most half a step
    if fmt.is_scaled:
        assert (np.abs(y) <= np.float32(fmt.max) * scale).all()
        assert np.isin(np.abs(y), table(name).astype(np.float32) * scale).all()  # a value
    else:
        assert np.isin(y, y.astype(ml_dtypes.bfloat16 if name == "BF16" else np.float32).astype(np.float32)).all()


@pytest.mark.parametrize("name", SCALED)
def test_with_its_own_range_the_largest_magnitude_stays(name):
    x = spread(4096, 1e-3, 10.0)
    y = fake_quant(x, name).numpy()
    largest = np.argmax(np.abs(x))
    assert y[largest] == pytest.approx(x[largest], rel=2**-22)


# ---- axes


@pytest.mark.parametrize(
    "axis, per_range",
    [(None, (0, 1, 2)), (0, (1, 2)), (-1, (0, 1)), (2, (0, 1)), ((0, 2), (1,)), ((-1, 0), (1,)), ((0, 1, 2), ())],
)
@pytest.mark.parametrize("name", ["INT4", "E2M1"])
def test_axes_have_a_range_each(name, axis, per_range):
    x = spread(4 * 2 * 3, 0.01, 9.0).reshape(4, 2, 3)
    amax = np.abs(x).max(axis=per_range, keepdims=True)
    same_bits(fake_quant(x, name, axis), fake_quant(x, name, amax=amax))
    kept = rounding.absolute_max(tf.constant(x), axis)
    np.testing.assert_array_equal(np.reshape(kept, -1), np.reshape(amax, -1))
    assert kept.shape == (() if axis is None else amax.shape)


def test_channels_by_hand():
    x = [[7.0, 0.7], [-3.4, 0.34], [0.4, -0.06]]
    np.testing.assert_allclose(fake_quant(x, "INT4", axis=-1), [[7, 0.7], [-3, 0.3], [0, -0.1]], rtol=1e-6)
    np.testing.assert_allclose(fake_quant(x, "INT4"), [[7, 1], [-3, 0], [0, 0]])


@pytest.mark.parametrize("axis", [2, -3, (0, 5), 1.5])
def test_an_axis_that_is_not_there_is_refused(axis):
    with pytest.raises(ValueError, match=r"axis must name axes of a tensor of rank 2 \(-2\.\.1\), got"):
        fake_quant(tf.ones((2, 2)), "INT4", axis)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="Unknown format 'INT1'"):
        fake_quant([1.0], "INT1")


# ---- dtypes


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float64])
@pytest.mark.parametrize("name", ["INT4", "E4M3", "BF16"])
def test_floating_dtypes_are_computed_in_float32_and_kept(name, dtype):
    x = tf.cast(spread(16, 0.01, 9.0), dtype)
    y = fake_quant(x, name)
    assert y.dtype == dtype
    in_float32 = fake_quant(tf.cast(x, tf.float32), name)
    np.testing.assert_array_equal(tf.cast(y, tf.float64), tf.cast(tf.cast(in_float32, dtype), tf.float64))


@pytest.mark.parametrize("x", [np.array([1, -3, 7], np.int32), np.array([1, -3, 7], np.int8), [1, -3, 7]])
def test_integers_become_float32(x):
    y = fake_quant(x, "INT4")
    assert y.dtype == tf.float32
    assert y.numpy().tolist() == [1, -3, 7]


# ---- gradient


def gradient(x, name, upstream=1.0, **kwargs):
    x = tf.constant(x, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = fake_quant(x, name, **kwargs) * upstream
    return tape.gradient(y, x).numpy().tolist()


@pytest.mark.parametrize("name", SCALED)
def test_gradient_is_1_inside_and_0_where_clipped(name):
    above = float(np.nextafter(np.float32(2), np.float32(3)))
    x = [0.0, 0.3, -1.9, 2.0, -2.0, above, -above, 1e30]
    assert gradient(x, name, amax=2.0) == [1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("name", ["BF16", "FP32"])
def test_casts_clip_nothing(name):
    assert gradient([0.0, -5.0, 1e38, np.inf], name, amax=2.0) == [1, 1, 1, 1]


@pytest.mark.parametrize("name", FEW)
def test_with_its_own_range_nothing_is_clipped(name):
    assert gradient([[1.0, -5.0], [3.0, 0.0]], name) == [[1, 1], [1, 1]]
    assert gradient([[1.0, -5.0], [3.0, 0.0]], name, axis=-1) == [[1, 1], [1, 1]]


def test_gradient_per_channel():
    assert gradient([[1.0, 1.0], [3.0, 3.0]], "INT4", amax=[[2.0, 4.0]]) == [[1, 1], [0, 1]]


def test_gradient_is_the_upstream_one_passed_on():
    upstream = [2.0, -3.0, 5.0]
    assert gradient([0.1, 0.2, 9.0], "INT4", amax=1.0, upstream=upstream) == [2, -3, 0]
    assert gradient([0.1, 0.2, 9.0], "INT4", upstream=upstream) == upstream


def test_amax_gets_no_gradient():
    x, amax = tf.constant([0.5, 3.0]), tf.constant(1.0)
    with tf.GradientTape() as tape:
        tape.watch(amax)
        y = fake_quant(x, "INT4", amax=amax)
    assert tape.gradient(y, amax) is None


def test_gradient_in_a_graph_is_the_same():
    def loss_gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(fake_quant(x, "INT4", amax=1.0) ** 2)
        return tape.gradient(y, x)

    x = tf.constant(spread(16, 0.01, 3.0))
    for jit_compile in (False, True):
        compiled = tf.function(loss_gradient, jit_compile=jit_compile)
        np.testing.assert_allclose(compiled(x), loss_gradient(x), rtol=2**-21)


# ---- one result, however it is run


@pytest.mark.parametrize("name", FEW)
def test_the_kernel_gives_the_same_bits_compiled_and_not(name):
    x = np.concatenate([spread(4000, 1e-6, 9.0), [0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38]])
    x, amax, row = tf.constant(padded(x)), tf.constant(2.3), tf.constant(rounding.row(name))
    same_bits(rounding._quantize_compiled(x, amax, row), rounding._quantize_plain(x, amax, row))


@pytest.mark.parametrize("size", [4096, 2**17])
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", ["INT4", "INT8", "E2M1", "E4M3", "BF16"])
def test_a_compiled_function_gives_the_same_bits(name, jit_compile, size):
    x, row = tf.constant(spread(size, 1e-3, 9.0)), tf.Variable(rounding.row(name))

    def quantize(x):
        return rounding.quantize(x, rounding.absolute_max(x), tf.convert_to_tensor(row), saturates=False)

    same_bits(tf.function(quantize, jit_compile=jit_compile)(x), fake_quant(x, name))


@pytest.mark.parametrize("size", [4096, 2**17])
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("amax", [None, 2.3])
@pytest.mark.parametrize("name", ["INT4", "INT8", "E2M1", "E4M3", "BF16"])
def test_optimizers_of_graphs_that_know_the_format_do_not_undo_the_rounding(name, amax, jit_compile, size):
    """A division by a constant may become a product with its reciprocal: the last bit may differ."""
    x = tf.constant(spread(size, 1e-3, 9.0))
    compiled = tf.function(lambda x: fake_quant(x, name, amax=amax), jit_compile=jit_compile)(x)
    np.testing.assert_allclose(compiled, fake_quant(x, name, amax=amax), rtol=2**-22)


def test_a_format_changes_without_a_new_trace():
    traces = []

    @tf.function
    def quantize(x, row):
        traces.append(1)
        return rounding.quantize(x, tf.constant(9.0), row)

    x = tf.constant(spread(16, 0.01, 9.0))
    for name in ALL:
        same_bits(quantize(x, tf.constant(rounding.row(name))), fake_quant(x, name, amax=9.0))
    assert len(traces) == 1


@pytest.mark.parametrize("amax", [-1, -1e-30, np.inf, -np.inf, np.nan, [1.0, -2.0], np.array([[np.nan], [1.0]])])
def test_an_amax_that_is_no_magnitude_is_refused(amax):
    with pytest.raises(ValueError, match=r"amax must be 0 or more and finite, got (-|inf|nan)"):
        fake_quant(np.ones((2, 2)), "INT8", amax=amax)


@pytest.mark.parametrize("amax", [0, 0.0, -0.0, np.zeros(2), tf.constant(0.0), tf.constant([-1.0, 0.0])])
@pytest.mark.parametrize("name", ["INT2", "INT16", "E4M3", "E5M10"])
def test_an_amax_of_zero_leaves_next_to_nothing(name, amax):
    values = fake_quant([[1.0, -1.0], [0.0, 9.0]], name, amax=amax).numpy()
    assert np.abs(values).max() < 1e-32 and values[1, 0] == 0
