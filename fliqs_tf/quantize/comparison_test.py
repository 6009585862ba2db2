"""A copy is compared with its original before anything is trained: what differs is refused, what cannot be compared
is not."""

import logging

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf import wrapping
from fliqs_tf._keras import keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.quantize import comparison

L = keras.layers
FORMATS = ["INT4", "INT8"]  # nothing of it computes what floats do


class Scale(L.Layer):
    """Its config leaves out what it computes with."""

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.dense = L.Dense(3)

    def call(self, x):
        return self.dense(x) * self.factor

    def get_config(self):
        return {"name": self.name}


def scaled(factor):
    layers = [L.Dense(3), L.Dense(3), Scale(factor, name="scale"), L.Dense(2)]
    return keras.Sequential([keras.Input((3,)), *layers], name="net")


@pytest.mark.parametrize(
    "convert",
    [lambda m: fliqs_tf.wrap(m, FORMATS), lambda m: fliqs_tf.apply(m, "INT8"), lambda m: fliqs_tf.apply(m, "FP32")],
)
def test_a_layer_whose_config_does_not_describe_it_is_named(convert):
    with pytest.raises(
        ValueError, match="copy of model 'net' .* first in layer 'scale' of class Scale.*Let get_config"
    ):
        convert(scaled(2.0))
    convert(scaled(1.0))


def test_a_deployed_model_is_compared_with_the_searched_one():
    wrapped = fliqs_tf.wrap(scaled(1.0), FORMATS)
    wrapped.network.get_layer("scale").composite_layer.factor = 2.0
    with pytest.raises(ValueError, match="first in layer 'scale'"):
        wrapped.deploy(fliqs_tf.Recipe({d.name: "INT8" for d in wrapped.decisions}))


def test_a_model_whose_layers_are_alike_but_not_what_is_between_them():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, L.Dense(3)(inputs) * 2.0, name="net")
    other = keras.Model(inputs, L.Dense(3)(inputs) * 3.0, name="net")
    other.set_weights(model.get_weights())
    with pytest.raises(ValueError, match="computes something other than the model"):
        comparison.check(ModelGraph(model), ModelGraph(other))
    comparison.check(ModelGraph(model), ModelGraph(model))


def dense_of(x):
    return L.Dense(2)(x)


INPUTS = {
    "tokens": lambda: ((i := keras.Input((4,), dtype="int32")), dense_of(L.Flatten()(L.Embedding(5, 3)(i)))),
    "tokens as floats": lambda: ((i := keras.Input((4,))), dense_of(L.Flatten()(L.Embedding(5, 3)(i)))),
    "strings": lambda: ((i := keras.Input((1,), dtype="string")), dense_of(L.Hashing(4, output_mode="one_hot")(i))),
    "booleans": lambda: (
        (i := keras.Input((4,), dtype="bool")),
        dense_of(L.Lambda(lambda b: tf.cast(b, "float32"))(i)),
    ),
    "open images": lambda: (
        (i := keras.Input((None, None, 3))),
        dense_of(L.GlobalAveragePooling2D()(L.Conv2D(2, 3)(i))),
    ),
    "large images": lambda: ((i := keras.Input((70, 70, 3))), dense_of(L.Flatten()(L.Conv2D(2, 3, 20)(i)))),
    "a fixed batch": lambda: (
        (i := keras.Input((3,), batch_size=4)),
        dense_of(L.Lambda(lambda x: tf.ensure_shape(x, (4, 3)))(i)),
    ),
    "a list": lambda: ((i := [keras.Input((3,)), keras.Input((2,))]), dense_of(L.Concatenate()(i))),
    "a dict": lambda: (
        (i := {"b": keras.Input((3,), name="b"), "a": keras.Input((2,), dtype="int32", name="a")}),
        dense_of(L.Concatenate()([i["b"], L.Flatten()(L.Embedding(2, 3)(i["a"]))])),
    ),
    "masked": lambda: (
        (i := keras.Input((4,), dtype="int32")),
        dense_of(L.LSTM(2)(L.Embedding(5, 3, mask_zero=True)(i))),
    ),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_inputs_of_every_kind_are_compared(make, caplog):
    inputs, outputs = make()
    model = keras.Model(inputs, outputs)
    copy = fliqs_tf.apply(model, "FP32")
    copy.layers[-1].quantized_layer.bias.assign([1.0, -1.0])
    with pytest.raises(ValueError, match=f"first in layer '{model.layers[-1].name}' of class Dense"):
        comparison.check(ModelGraph(model), ModelGraph(copy))


class Draws(L.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def test_a_model_that_draws_is_not_compared_and_that_is_told(caplog):
    model = keras.Sequential([keras.Input((3,)), L.Dense(3), Draws()], name="net")
    with caplog.at_level(logging.INFO, "fliqs_tf"):
        fliqs_tf.apply(model, "INT8")
    assert "'net' is random at inference: its copy was not compared" in caplog.text


class Picky(L.Layer):
    def call(self, x):
        tf.debugging.assert_greater(x, 100.0)
        return x


def test_a_model_that_takes_no_made_up_input_is_not_compared(caplog):
    model = keras.Sequential([keras.Input((3,)), Picky(), L.Dense(3)], name="net")
    with caplog.at_level(logging.DEBUG, "fliqs_tf"):
        fliqs_tf.apply(model, "INT8")
    assert "'net' cannot be called on a made-up example: its copy was not compared" in caplog.text


def test_the_comparison_leaves_states_and_losses_as_they_were():
    layers = [L.LSTM(3, stateful=True), L.Dropout(0.5), L.Dense(2, activity_regularizer="l2")]
    model = keras.Sequential([keras.Input((4, 3), batch_size=2), *layers])
    before = [np.array(tf.convert_to_tensor(v)) for v in model.variables]
    losses = len(model.losses)  # tf_keras has those of placeholders
    copy = fliqs_tf.apply(model, "INT8")
    for a, b in zip(model.variables, before):
        np.testing.assert_array_equal(tf.convert_to_tensor(a), b)
    for m in (model, copy):
        assert not any(np.any(tf.convert_to_tensor(state)) for state in m.layers[-3].states)
    assert len(model.losses) == len(copy.losses) == losses


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_other_dtypes_are_compared(dtype):
    layers = [L.Dense(8, dtype=dtype, activation="relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((3,)), *layers, L.Dense(2)])
    copy = wrapping.apply(model, "FP32")
    copy.layers[-1].quantized_layer.bias.assign([1.0, -1.0])
    with pytest.raises(ValueError, match="computes something other than the model"):
        comparison.check(ModelGraph(model), ModelGraph(copy))
