"""Spaces: presets, order, and what is refused."""

import doctest

import pytest

from fliqs_tf.numerics import space
from fliqs_tf.numerics.formats import Format
from fliqs_tf.numerics.space import PRESETS, Space


def test_doctests():
    assert doctest.testmod(space).failed == 0


@pytest.mark.parametrize(
    "preset, names",
    [
        ("FLIQS-S-INT", {"INT4", "INT8", "BF16"}),
        ("FLIQS-S-FLOAT", {"E2M1", "E4M3", "BF16"}),
        ("FLIQS-L-INT", {"INT4", "INT5", "INT6", "INT7", "INT8", "BF16"}),
        (
            "FLIQS-L-FLOAT",
            {"E2M1"}
            | {"E2M2", "E3M1"}
            | {"E2M3", "E3M2", "E4M1"}
            | {"E2M4", "E3M3", "E4M2", "E5M1"}
            | {"E2M5", "E3M4", "E4M3", "E5M2"}
            | {"BF16"},
        ),
        ("MIXED", {"INT4", "INT8", "E2M1", "E4M3", "BF16"}),
    ],
)
def test_presets(preset, names):
    assert set(Space(preset).names) == names
    assert set(PRESETS[preset]) == names
    assert len(Space(preset)) == len(names)


def test_there_are_five_presets():
    assert len(PRESETS) == 5


def test_a_preset_in_any_spelling():
    assert Space(" fliqs-s-int ") == Space("FLIQS-S-INT") == Space(Space("FLIQS-S-INT"))


@pytest.mark.parametrize("preset", PRESETS)
def test_spaces_go_from_narrow_to_wide(preset):
    bits = [fmt.bits for fmt in Space(preset).formats]
    assert bits == sorted(bits)


def test_within_a_width_spaces_go_from_coarse_to_fine():
    """Gaussian data has no use for a wide range: mantissa bits are what it needs."""
    assert Space(["E2M5", "E5M2", "E4M3", "E3M4", "INT8"]).names == ("E5M2", "E4M3", "E3M4", "INT8", "E2M5")
    assert Space(["BF16", "INT16", "E5M10"]).names == ("BF16", "E5M10", "INT16")


def test_the_order_given_does_not_matter():
    assert Space(["INT8", "BF16", "INT4"]) == Space([Format("INT4"), "int8", "BF16"]) == Space("FLIQS-S-INT")
    assert hash(Space(["INT8", "INT4"])) == hash(Space(["INT4", "INT8"]))


def test_one_format_is_a_space():
    assert Space(["INT8"]).names == ("INT8",)


@pytest.mark.parametrize(
    "formats, why",
    [
        ("FLIQS-XL", "Unknown space 'FLIQS-XL'; presets: FLIQS-S-INT, .*give a list"),
        ("INT8", "Unknown space 'INT8'"),
        (Format("INT8"), "Unknown space 'INT8'"),
        ("", "Unknown space ''"),
        ([], "at least one format, got none"),
        (["INT4", "INT4"], "each format once, got INT4 more than once"),
        (["INT4", "int4", "E4M3", "E4M3", "BF16"], "got E4M3, INT4 more than once"),
        (["INT4", "INT99"], "Unknown format 'INT99'"),
        ([4, 8], "given by its name, got 4"),
        (None, "name of a preset or a list of formats, got None"),
        (8, "name of a preset or a list of formats, got 8"),
    ],
)
def test_a_wrong_space_is_refused(formats, why):
    with pytest.raises(ValueError, match=why):
        Space(formats)
