"""Codes against ml_dtypes and by hand; every code of every format of 8 bits or fewer."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fliqs_tf.numerics import encoding
from fliqs_tf.numerics.formats import Format

FORMATS = [f"INT{b}" for b in range(2, 17)] + [f"E{x}M{y}" for x in range(1, 6) for y in range(11)] + ["BF16"]
DTYPES = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E5M10": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT2": ml_dtypes.int2,
    "INT4": ml_dtypes.int4,
    "INT8": np.int8,
    "INT16": np.int16,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_has_a_code_of_its_own_and_comes_back(name):
    fmt = Format(name)
    values = fmt.values()
    found = encoding.encode(values, fmt)
    assert len(set(found.tolist())) == len(values)
    assert found.max() < 2**fmt.bits
    np.testing.assert_array_equal(encoding.decode(found, fmt), values)


@pytest.mark.parametrize("name", DTYPES)
def test_codes_are_the_bits_of_other_libraries(name):
    dtype = np.dtype(DTYPES[name])
    values = Format(name).values()
    bits = values.astype(dtype).view(np.uint8 if dtype.itemsize == 1 else np.uint16)
    np.testing.assert_array_equal(encoding.encode(values, name), bits & (2 ** Format(name).bits - 1))
    np.testing.assert_array_equal(
        encoding.decode(encoding.encode(values, name), name), values.astype(dtype).astype(float)
    )


def test_by_hand():
    assert encoding.encode([0.0625, -0.25, 28.0, -28.0], "E3M2").tolist() == [0b000001, 0b100100, 0b011111, 0b111111]
    assert encoding.encode([15.0, -15.0, -1.0], "INT5").tolist() == [0b01111, 0b10001, 0b11111]
    assert encoding.encode([-0.0], "INT5").tolist() == [0]
    assert encoding.encode([-0.0], "E2M1").tolist() == [0b1000]
    assert np.signbit(encoding.decode([0b1000], "E2M1")).tolist() == [True]


@pytest.mark.parametrize(
    "name, values",
    [("INT4", [8.0]), ("INT4", [0.5]), ("E2M1", [0.25]), ("E2M1", [5.0]), ("E4M3", [449.0]), ("E2M1", [np.nan])],
)
def test_a_value_that_the_format_does_not_have_is_refused(name, values):
    with pytest.raises(ValueError, match=f"{name} does not have the value"):
        encoding.encode([1.0, *values], name)


@pytest.mark.parametrize(
    "name, code", [("INT4", 8), ("INT8", 128), ("E4M3", 0x7F), ("E4M3", 0xFF), ("E5M2", 0x7C), ("E5M10", 0x7E00)]
)
def test_a_code_without_a_value_is_refused(name, code):
    with pytest.raises(ValueError, match=rf"code {code:#x} stands for no value of {name}"):
        encoding.decode([0, code], name)


def test_a_code_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match=r"Codes of INT4 are 0\.\.15, got 3\.\.16"):
        encoding.decode([3, 16], "INT4")


def test_fp32_is_refused():
    with pytest.raises(ValueError, match="store the values"):
        encoding.encode([1.0], "FP32")


# ---- streams


def test_two_of_four_bits_are_a_byte_the_first_one_low():
    assert encoding.pack([0x1, 0x2, 0xF], 4).tolist() == [0x21, 0x0F]


def test_five_bits_by_hand():
    # 00001, 00010, 11111: from the lowest bit up 10000 01000 11111 0.
    assert encoding.pack([1, 2, 31], 5).tolist() == [0b01000001, 0b01111100]


@given(st.integers(1, 16), st.lists(st.integers(0, 2**16 - 1), max_size=40))
@settings(deadline=None)
def test_streams_come_back(bits, numbers):
    numbers = np.array(numbers, np.uint16) & (2**bits - 1)
    stream = encoding.pack(numbers, bits)
    # The same stream, as one large whole number.
    whole = sum(int(n) << (i * bits) for i, n in enumerate(numbers))
    assert stream.tobytes() == whole.to_bytes(-(-len(numbers) * bits // 8), "little")
    np.testing.assert_array_equal(encoding.unpack(stream, bits, len(numbers)), numbers)


def test_long_streams_come_back(monkeypatch):
    monkeypatch.setattr(encoding, "_CHUNK", 16)
    numbers = np.arange(100, dtype=np.uint16) % 8
    whole = sum(int(n) << (3 * i) for i, n in enumerate(numbers))
    assert encoding.pack(numbers, 3).tobytes() == whole.to_bytes(38, "little")
    np.testing.assert_array_equal(encoding.unpack(encoding.pack(numbers, 3), 3, 100), numbers)


def test_a_stream_of_another_length_is_refused():
    with pytest.raises(ValueError, match="3 codes of 4 bits take 2 bytes, got 3"):
        encoding.unpack(np.zeros(3, np.uint8), 4, 3)
    with pytest.raises(ValueError, match="last 4 bits of 3 codes"):
        encoding.unpack(np.array([0, 0x10], np.uint8), 4, 3)
