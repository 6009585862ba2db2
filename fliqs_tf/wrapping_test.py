"""`apply`: a model in the formats of a recipe."""

import numpy as np
import pytest

from fliqs_tf import wrapping
from fliqs_tf._keras import keras
from fliqs_tf.quantize.copying_test import formats_of
from fliqs_tf.quantize.network_test import convolutional, dense_chain, outputs, randomized
from fliqs_tf.quantize.recipe import Recipe

L = keras.layers


def test_one_format_for_every_layer():
    model = randomized(dense_chain("a", "b"))
    assert formats_of(wrapping.apply(model, "int4")) == {"a": ("INT4", "INT4"), "b": ("INT4", "INT4")}
    np.testing.assert_array_equal(outputs(wrapping.apply(model, "FP32")), outputs(model))


def test_apply_leaves_the_model_and_trains_on_its_own():
    model = randomized(convolutional())
    before = model.get_weights()
    network = wrapping.apply(model, "INT8")
    network.compile("sgd", "mse")
    network.fit(np.ones((4, 8, 8, 3)), np.ones((4, 5)), verbose=0)
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "recipe, why",
    [
        (Recipe({"a": "INT4"}), "does not fit model 'net': no format for 'b'"),
        (Recipe({"a": "INT4", "b": "INT4", "c": "INT4"}), "unknown 'c'"),
        (Recipe({"all": "INT4"}, layers={"all": ("a", "x")}), "no format for 'b'; unknown 'x'"),
        (Recipe({"a": "INT4", "b": "INT4"}, info={"float_layers": ["b"]}), "unknown 'b'"),
        ("INT99", "Unknown format 'INT99'"),
        (None, "given by its name, got None"),
    ],
)
def test_recipes_that_do_not_fit(recipe, why):
    with pytest.raises(ValueError, match=why):
        wrapping.apply(dense_chain("a", "b"), recipe)
