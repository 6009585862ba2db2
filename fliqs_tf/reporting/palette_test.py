import itertools

import numpy as np

from fliqs_tf.reporting import palette

L_FLOAT = ["E2M1", "E2M2", "E3M1", "E2M3", "E3M2", "E4M1", "E2M4", "E3M3", "E4M2", "E5M1"]
L_FLOAT += ["E2M5", "E3M4", "E4M3", "E5M2", "BF16"]


def test_more_bits_are_darker():
    def lightness(name):
        return np.dot(palette.color(name), [0.299, 0.587, 0.114])

    values = [lightness(name) for name in ("INT2", "INT3", "INT4", "INT5", "INT6", "INT7", "INT8", "BF16", "FP32")]
    assert values == sorted(values, reverse=True)
    assert all(a - b > 0.02 for a, b in itertools.pairwise(values))


def test_formats_that_stand_in_one_menu_have_colours_apart():
    for formats in (L_FLOAT, ["INT4", "INT8", "E2M1", "E4M3", "BF16"], ["INT4", "INT5", "INT6", "INT7", "INT8"]):
        for a, b in itertools.combinations(formats, 2):
            distance = np.abs(np.subtract(palette.color(a), palette.color(b))).max()
            assert distance > 0.03, (a, b)


def test_names_that_are_no_format_are_grey():
    assert len(set(palette.color("kernel 3x3"))) == 1


def test_the_order_is_by_bits_then_integers_first_then_by_exponent_bits():
    names = ["other", "E4M3", "FP32", "INT8", "E5M2", "INT4", "E2M1"]
    assert sorted(names, key=palette.order) == ["INT4", "E2M1", "INT8", "E4M3", "E5M2", "FP32", "other"]


def test_integers_are_plain_and_floats_hatched_the_denser_the_more_exponent_bits():
    hatches = {name: palette.fill(name)["hatch"] for name in ("INT8", "E2M1", "E5M2", "BF16", "other")}
    assert hatches == {"INT8": None, "E2M1": "//", "E5M2": "/////", "BF16": "xxx", "other": None}
    assert palette.fill("E5M2", hatched=False)["hatch"] is None


def test_ink_is_black_on_light_and_white_on_dark():
    assert (palette.ink("INT2"), palette.ink("FP32")) == ("black", "white")
