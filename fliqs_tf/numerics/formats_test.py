"""Formats against two independent libraries: every code of ml_dtypes' and of gfloat's."""

import dataclasses
import doctest

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest

from fliqs_tf.numerics import formats
from fliqs_tf.numerics.formats import Format

INTS = [f"INT{b}" for b in range(2, 17)]
FLOATS = [f"E{x}M{y}" for x in range(1, 6) for y in range(11)]
ALL = [*INTS, *FLOATS, "BF16", "FP32"]

ML_DTYPES = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E5M10": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
# (x, y) whose codes are not all finite numbers: (NaN codes per sign, has Inf).
NOT_ALL_FINITE = {(4, 3): (1, False), (5, 2): (3, True), (5, 10): (2**10 - 1, True)}


def gfloat_info(name):
    """gfloat's description of an ExMy."""
    x, y = (int(part) for part in name[1:].split("M"))
    nans, has_inf = NOT_ALL_FINITE.get((x, y), (0, False))
    return gfloat.FormatInfo(
        name,
        k=1 + x + y,
        precision=y + 1,
        bias=2 ** (x - 1) - 1,
        is_signed=True,
        domain=gfloat.Domain.Extended if has_inf else gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=nans,
        has_subnormals=True,
        is_twos_complement=False,
    )


def finite_values(decoded):
    """Distinct finite numbers, ascending; -0 and 0 are one."""
    decoded = np.asarray(decoded, np.float64)
    return np.unique(decoded[np.isfinite(decoded)] + 0.0)


def test_doctests():
    assert doctest.testmod(formats).failed == 0


@pytest.mark.parametrize("name", ML_DTYPES)
def test_values_are_every_code_of_ml_dtypes(name):
    dtype = np.dtype(ML_DTYPES[name])
    if dtype.itemsize == 1:
        codes = np.arange(2 ** Format(name).bits, dtype=np.uint8)
    else:
        codes = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # NaN codes
        decoded = codes.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(Format(name).values(), finite_values(decoded))


@pytest.mark.parametrize("name", FLOATS)
def test_values_are_every_code_of_gfloat(name):
    info = gfloat_info(name)
    fmt = Format(name)
    decoded = gfloat.decode_ndarray(info, np.arange(2**info.k))
    np.testing.assert_array_equal(fmt.values(), finite_values(decoded))
    assert (fmt.bits, fmt.max) == (info.k, info.max)


@pytest.mark.parametrize(
    "name, info",
    [
        ("E2M1", gfloat.formats.format_info_ocp_e2m1),
        ("E2M3", gfloat.formats.format_info_ocp_e2m3),
        ("E3M2", gfloat.formats.format_info_ocp_e3m2),
        ("E4M3", gfloat.formats.format_info_ocp_e4m3),
        ("E5M2", gfloat.formats.format_info_ocp_e5m2),
        ("E5M10", gfloat.formats.format_info_binary16),
    ],
)
def test_values_are_those_of_the_published_standards(name, info):
    """gfloat's own descriptions of OCP and IEEE formats, not built from our reading of ExMy."""
    decoded = gfloat.decode_ndarray(info, np.arange(2**info.k))
    np.testing.assert_array_equal(Format(name).values(), finite_values(decoded))


@pytest.mark.parametrize("bits", range(2, 17))
def test_integers_are_symmetric(bits):
    top = 2 ** (bits - 1) - 1
    fmt = Format(f"INT{bits}")
    assert (fmt.bits, fmt.max, fmt.is_integer, fmt.is_scaled) == (bits, top, True, True)
    np.testing.assert_array_equal(fmt.values(), np.arange(-top, top + 1))


@pytest.mark.parametrize("dtype", [ml_dtypes.int2, ml_dtypes.int4, np.int8, np.int16])
def test_integers_are_those_of_ml_dtypes_without_the_lowest(dtype):
    info = ml_dtypes.iinfo(dtype)
    np.testing.assert_array_equal(Format(f"INT{info.bits}").values(), np.arange(int(info.min) + 1, int(info.max) + 1))


@pytest.mark.parametrize(
    "name, bits, largest",
    [
        ("INT2", 2, 1.0),
        ("INT8", 8, 127.0),
        ("E1M0", 2, 2.0),
        ("E2M0", 3, 4.0),
        ("E2M1", 4, 6.0),
        ("E2M3", 6, 7.5),
        ("E3M2", 6, 28.0),
        ("E3M4", 8, 31.0),
        ("E4M3", 8, 448.0),
        ("E5M2", 8, 57344.0),
        ("E5M3", 9, 122880.0),
        ("E5M10", 16, 65504.0),
        ("BF16", 16, 3.3895313892515355e38),
        ("FP32", 32, 3.4028234663852886e38),
    ],
)
def test_bits_and_max(name, bits, largest):
    assert (Format(name).bits, Format(name).max) == (bits, largest)


def test_values_by_hand():
    assert Format("E2M1").values().tolist() == [
        -6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6,
    ]  # fmt: skip
    assert Format("E1M0").values().tolist() == [-2, 0, 2]
    assert Format("E3M0").values().tolist() == [-16, -8, -4, -2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 4, 8, 16]


@pytest.mark.parametrize("name", [n for n in ALL if n != "FP32"])
def test_values_are_symmetric_and_strictly_ascending(name):
    values = Format(name).values()
    assert values.dtype == np.float64
    assert (np.diff(values) > 0).all()
    assert values.tolist() == (-values[::-1] + 0.0).tolist()
    assert values[-1] == Format(name).max
    assert len(values) <= 2 ** Format(name).bits - 1


def test_fp32_has_too_many_values():
    with pytest.raises(ValueError, match="FP32 has too many values to list"):
        Format("FP32").values()


@pytest.mark.parametrize("name, scaled", [("INT4", True), ("E5M10", True), ("BF16", False), ("FP32", False)])
def test_only_casts_have_no_scale(name, scaled):
    assert Format(name).is_scaled is scaled


def test_a_name_in_any_spelling_is_one_format():
    assert Format(" e4m3 ") == Format("E4M3") == Format(Format("E4M3"))
    assert hash(Format("bf16")) == hash(Format("BF16"))
    assert Format("INT4") != Format("INT5")
    assert str(Format("int4")) == "INT4"
    assert repr(Format("int4")) == "Format(name='INT4')"


def test_a_format_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Format("INT4").bits = 3


@pytest.mark.parametrize(
    "name, why",
    [
        ("INT1", r"'INT1': integer bits must be 2\.\.16 \(got 1\)"),
        ("INT0", r"integer bits must be 2\.\.16 \(got 0\)"),
        ("INT17", r"integer bits must be 2\.\.16 \(got 17\)"),
        ("INT999999999", "Unknown format 'INT999999999'"),
        ("E0M3", r"'E0M3': exponent bits must be 1\.\.5 \(got 0\)"),
        ("E9M9", r"'E9M9': exponent bits must be 1\.\.5 \(got 9\)"),
        ("E5M11", r"mantissa bits must be 0\.\.10 \(got 11\)"),
        ("INT04", "Unknown format 'INT04'"),  # would be a second name of INT4
        ("E04M3", "Unknown format 'E04M3'"),
        ("INT\N{ARABIC-INDIC DIGIT FOUR}", "Unknown format"),
        ("INT-4", "Unknown format"),
        ("INT4.0", "Unknown format"),
        ("E4M3FN", "Unknown format"),
        ("FP16", "Unknown format"),
        ("", "Unknown format ''"),
        (None, "given by its name, got None"),
        (8, "given by its name, got 8"),
        (["INT4"], r"given by its name, got \['INT4'\]"),
    ],
)
def test_a_wrong_name_is_refused_with_what_is_allowed(name, why):
    with pytest.raises(ValueError, match=why) as error:
        Format(name)
    assert "INT2..INT16, ExMy" in str(error.value)


def nearest(values, x):
    """The value next to each x, by search in the sorted values."""
    return values[np.searchsorted((values[1:] + values[:-1]) / 2, x)]


@pytest.mark.parametrize("name", ["INT2", "INT4", "INT8", "INT16", "E1M0", "E2M1", "E4M3", "E5M2", "E5M10", "BF16"])
def test_noise_against_a_monte_carlo_estimate(name):
    x = np.random.default_rng(0).standard_normal(1_000_000)
    x = x[np.abs(x) <= 4]
    fmt = Format(name)
    scale = 4 / fmt.max if fmt.is_scaled else 1.0
    error = nearest(fmt.values() * scale, x) - x
    assert fmt.noise() == pytest.approx(np.mean(error**2) / np.mean(x**2), rel=0.01)


def test_noise_of_a_fine_integer_is_a_twelfth_of_its_step_squared():
    assert Format("INT12").noise() == pytest.approx((4 / 2047) ** 2 / 12, rel=0.01)


def test_noise_falls_with_every_bit():
    for family in (INTS, [f"E4M{y}" for y in range(11)]):
        noise = [Format(name).noise() for name in family]
        assert noise == sorted(noise, reverse=True)
    assert 0 < Format("FP32").noise() < Format("E5M10").noise()
