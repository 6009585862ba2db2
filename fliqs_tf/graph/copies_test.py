"""What a copy of a model has that no config holds: functions, what `adapt` learned, what is frozen, layers inside."""

import functools
import logging

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph import copies

L = keras.layers
FORMATS = ["INT8", "FP32"]  # wrapped models begin with the widest
register = keras.saving.register_keras_serializable("fliqs_tf_tests_copies")


def data(*shape, seed=0):
    return tf.constant(3 * np.random.default_rng(seed).standard_normal(shape), tf.float32)


def saved_and_loaded(model, tmp_path, **options):
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras", **options)


def deployed_and_saved(model, x, tmp_path, trains=False):
    """Wrapped, trained for one step at learning rate 0, deployed in FP32, saved: all compute what the model does."""
    wrapped = fliqs_tf.wrap(model, FORMATS)
    recipe = fliqs_tf.Recipe({d.name: "FP32" for d in wrapped.decisions})
    if trains:
        wrapped.compile(keras.optimizers.SGD(0.0), "mse", target_cost="1x INT8", search_steps=1)
        wrapped.fit(x, tf.zeros((len(x), *model.outputs[0].shape[1:])), batch_size=len(x), verbose=0)
    deployed = wrapped.deploy(recipe)
    expected = model(x)
    np.testing.assert_allclose(deployed(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(saved_and_loaded(deployed, tmp_path)(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(saved_and_loaded(wrapped, tmp_path)(x), wrapped(x))


# ---- functions


def relu(v):
    return tf.clip_by_value(v, 0.0, 1.0)


def linear(v):
    return tf.sin(v)


def swish(v):
    return tf.tanh(v)


def steep(v):
    return tf.tanh(4 * v)


FUNCTIONS = [relu, linear, swish, steep, lambda v: v * v, tf.function(lambda v: v - 1), tf.nn.relu6]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("convert", [lambda m: fliqs_tf.wrap(m, FORMATS), lambda m: fliqs_tf.apply(m, "FP32")])
def test_functions_are_those_of_the_model_whatever_their_names(function, convert):
    model = keras.Sequential([keras.Input((3,)), L.Dense(4, activation=function), L.Activation(function), L.Dense(2)])
    x = data(4, 3)
    np.testing.assert_array_equal(convert(model)(x), model(x))


def test_functions_named_alike_stay_apart():
    other = lambda v: -v  # noqa: E731
    other.__name__ = "relu"
    layers = [L.Dense(4, activation=f) for f in (relu, other, "relu", "linear")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    x = data(4, 3)
    np.testing.assert_array_equal(fliqs_tf.apply(model, "FP32")(x), model(x))


def test_functions_of_recurrent_layers_and_of_lambdas():
    inputs = keras.Input((5, 3))
    x = L.Bidirectional(L.LSTM(2, activation=relu))(L.GRU(3, activation=steep, return_sequences=True)(inputs))
    threshold = 0.25
    x = L.Lambda(lambda v: tf.nn.relu(v - threshold))(L.Dense(6)(x))
    model = keras.Model(inputs, L.TimeDistributed(L.Dense(2, activation=linear))(L.Reshape((2, 3))(x)))
    np.testing.assert_allclose(fliqs_tf.apply(model, "FP32")(data(4, 5, 3)), model(data(4, 5, 3)), rtol=1e-5)


@register
class Given(L.Layer):
    """Is given its function by name, as layers often are."""

    def __init__(self, activation="relu", **kwargs):
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        self.dense = L.Dense(3, activation=self.activation)

    def call(self, x):
        return self.activation(self.dense(x) - 1)

    def get_config(self):
        return {**super().get_config(), "activation": "relu"}


def test_functions_inside_layers_of_ones_own_and_in_deployed_models():
    model = keras.Sequential([keras.Input((3,)), Given(relu), L.Dense(2)])
    x = data(4, 3)
    wrapped = fliqs_tf.wrap(model, FORMATS)
    np.testing.assert_array_equal(wrapped(x), model(x))
    recipe = fliqs_tf.Recipe({d.name: "FP32" for d in wrapped.decisions})
    np.testing.assert_array_equal(wrapped.deploy(recipe)(x), model(x))


@register
class Bound(L.Layer):
    """Has functions that are bound to itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = L.Dense(3)
        self.compiled = tf.function(lambda x: self.dense(x))
        self.partial = functools.partial(Bound.twice, self)

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x):
        return self.compiled(x) + self.partial(x)

    def twice(self, x):
        return 2 * self.dense(x)


def test_functions_that_are_bound_to_their_layer_are_not_handed_on():
    model = keras.Sequential([keras.Input((3,)), Bound(name="bound"), L.Dense(2)])
    fixed, x = fliqs_tf.apply(model, "FP32"), data(4, 3)
    before = fixed(x)
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    np.testing.assert_array_equal(fixed(x), before)
    assert np.any(before)


def test_a_file_never_has_the_function_of_keras_for_a_quantized_layer(tmp_path, caplog):
    model = keras.Sequential([keras.Input((3,)), L.Dense(4, activation=relu, name="first"), L.Dense(2)])
    with caplog.at_level(logging.WARNING, "fliqs_tf"):
        fixed = fliqs_tf.apply(model, "INT8")
    assert "first (relu)" in caplog.text and "rename yours before you save" in caplog.text
    x = data(4, 3)
    fixed(x, training=True)
    np.testing.assert_array_equal(saved_and_loaded(fixed, tmp_path, custom_objects={"relu": relu})(x), fixed(x))
    with pytest.raises(ValueError, match="'first' computes with a function 'relu' of its user's.*custom_objects="):
        saved_and_loaded(fixed, tmp_path)


def test_nothing_is_told_of_functions_of_keras(caplog):
    layers = [L.Dense(4, activation=f) for f in ("relu", tf.nn.relu, steep)]
    with caplog.at_level(logging.WARNING, "fliqs_tf"):
        fliqs_tf.apply(keras.Sequential([keras.Input((3,)), *layers]), "INT8")
    assert not caplog.text


def test_an_activation_has_the_name_of_keras_only_if_it_is_that_of_keras():
    assert [copies.function_name(f) for f in (None, keras.activations.relu, tf.nn.relu6, relu, steep)] == [
        "linear",
        "relu",
        "relu6",
        "relu_of_its_user",
        "steep",
    ]


# ---- what `adapt` learned


def string_lookup(mode):
    layer = L.StringLookup(output_mode=mode)
    layer.adapt(np.array([["a"], ["b"], ["b"], ["c"]]))
    return layer, tf.constant([["a"], ["b"], ["z"], ["c"]])


def integer_lookup(mode):
    layer = L.IntegerLookup(output_mode=mode)
    layer.adapt(np.array([[10], [20], [30]]))
    return layer, tf.constant([[10], [20], [7], [30]], tf.int64)


def text(mode):
    layer = L.TextVectorization(output_mode=mode, **({"output_sequence_length": 3} if mode == "int" else {}))
    layer.adapt(np.array(["a b", "c d b"]))
    return layer, tf.constant([["a b"], ["d c b"], ["z"], ["c"]])


def discretization(mode):
    layer = L.Discretization(num_bins=4, output_mode=mode)
    layer.adapt(np.linspace(0, 1, 100))
    return layer, tf.constant([[0.1], [0.3], [0.6], [0.9]])


def normalization(mode):
    layer = L.Normalization()
    layer.adapt(np.array([[1.0, 20.0], [3.0, 60.0]], np.float32))
    return layer, data(4, 2)


ADAPTED = [
    *((string_lookup, mode) for mode in ("int", "one_hot", "tf_idf")),
    *((integer_lookup, mode) for mode in ("one_hot",)),
    *((text, mode) for mode in ("int", "multi_hot", "tf_idf")),
    *((discretization, mode) for mode in ("int", "one_hot")),
    (normalization, None),
]


def adapted(make, mode):
    layer, x = make(mode)
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    y = layer(inputs)
    y = L.Flatten()(L.Embedding(9, 3)(y)) if mode == "int" else y
    return keras.Model(inputs, L.Dense(2)(y)), x


@pytest.mark.parametrize("make, mode", ADAPTED)
def test_what_adapt_learned_is_in_every_copy_and_file(make, mode, tmp_path):
    model, x = adapted(make, mode)
    before = model(x)
    fixed = fliqs_tf.apply(model, "FP32")
    for copy in (fixed, saved_and_loaded(fixed, tmp_path), model):
        np.testing.assert_allclose(copy(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make, mode, trains", [(string_lookup, "tf_idf", False), (text, "int", True)])
def test_models_with_adapted_layers_are_searched_deployed_and_saved(make, mode, trains, tmp_path):
    deployed_and_saved(*adapted(make, mode), tmp_path, trains)


@register
class Lookup(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lookup, self.dense = (
            L.StringLookup(output_mode="one_hot", max_tokens=6, pad_to_max_tokens=True),
            L.Dense(2),
        )

    def call(self, x):
        return self.dense(self.lookup(x))


def test_what_adapt_learned_inside_a_layer_of_ones_own():
    layer = Lookup()
    layer.lookup.adapt(np.array([["a"], ["b"]]))
    inputs = keras.Input((1,), dtype="string")
    model = keras.Model(inputs, layer(inputs))
    x = tf.constant([["a"], ["b"], ["z"]])
    np.testing.assert_array_equal(fliqs_tf.apply(model, "FP32")(x), model(x))


# ---- what is frozen


def nested():
    base = keras.Sequential([keras.Input((3,)), L.Dense(3, name="a"), L.BatchNormalization(name="bn")], name="base")
    base.add(L.Dense(3, name="b"))
    inputs = keras.Input((3,))
    return keras.Model(inputs, L.Dense(2, name="head")(base(inputs)), name="net")


def base_of(model):
    return getattr(model, "network", model).get_layer("base")


def freeze_base(model):
    base_of(model).trainable = False


def unfreeze_base(model):
    base_of(model).trainable = True


def reopen_last(model):
    freeze_base(model)
    base_of(model).get_layer("b").trainable = True


def freeze_first(model):
    base_of(model).get_layer("a").trainable = False


def unfreeze_first(model):
    base_of(model).get_layer("a").trainable = True


def freeze_all(model):
    model.trainable = False


def unfreeze_all(model):
    model.trainable = True


PHASES = [
    (freeze_base, unfreeze_base),
    (freeze_base, reopen_last),
    (reopen_last, unfreeze_base),
    (freeze_first, unfreeze_first),
    (freeze_first, freeze_all),
    (freeze_all, unfreeze_all),
    (freeze_all, unfreeze_base),
    (lambda model: None, freeze_base),
]


def trained(model):
    return [(v.name.split("/")[-1].removesuffix(":0"), tuple(v.shape)) for v in model.trainable_variables]


@pytest.mark.parametrize("first, second", PHASES)
def test_a_copy_trains_what_the_model_trains_now_and_after_more_is_frozen_or_unfrozen(first, second):
    model = nested()
    first(model)
    wrapped, fixed = fliqs_tf.wrap(model, FORMATS), fliqs_tf.apply(model, "INT8")
    deployed = wrapped.deploy(fliqs_tf.Recipe({d.name: "INT8" for d in wrapped.decisions}))
    everything = (model, wrapped, fixed, deployed)
    assert [trained(m) for m in everything] == [trained(model)] * 4
    for m in everything:
        second(m)
    assert [trained(m) for m in everything] == [trained(model)] * 4


@register
class Block(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up, self.down = L.Dense(6, name="up"), L.Dense(3, name="down")

    def call(self, x):
        return x + self.down(self.up(x))


def test_layers_inside_layers_are_frozen_and_unfrozen_alike():
    model = keras.Sequential([keras.Input((3,)), Block(name="block"), L.Dense(2)])
    model.get_layer("block").trainable = False
    model.get_layer("block").down.trainable = True
    wrapped, fixed = fliqs_tf.wrap(model, FORMATS), fliqs_tf.apply(model, "INT8")
    assert trained(wrapped) == trained(fixed) == trained(model)
    for m in (model, wrapped.network, fixed):
        m.get_layer("block").trainable = True
    assert trained(wrapped) == trained(fixed) == trained(model)
    assert len(trained(model)) == 6


# ---- layers that are given layers


@register
class Residual(L.Layer):
    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def call(self, x):
        return x + self.layer(x)

    def get_config(self):
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "layer": keras.saving.deserialize_keras_object(config["layer"])})


@register
class Twice(L.Wrapper):
    def call(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize("make", [Residual, Twice])
def test_layers_that_are_given_layers_are_deployed_and_saved(make, tmp_path):
    model = keras.Sequential([keras.Input((6,)), make(L.Dense(6)), L.Dense(2)])
    deployed_and_saved(model, data(4, 6), tmp_path, trains=make is Residual)


class Unregistered(Residual):
    pass


def test_classes_need_not_be_registered_to_be_copied():
    class Own(L.Dense):
        pass

    model = keras.Sequential([keras.Input((6,)), Unregistered(Own(6)), L.Dense(2)])
    wrapped = fliqs_tf.wrap(model, FORMATS)
    np.testing.assert_array_equal(wrapped(data(4, 6)), model(data(4, 6)))
    deployed = wrapped.deploy(fliqs_tf.Recipe({d.name: "FP32" for d in wrapped.decisions}))
    np.testing.assert_array_equal(deployed(data(4, 6)), model(data(4, 6)))


def test_a_compiled_model_need_not_be_compiled_from_a_config():
    def loss(y_true, y_pred):
        return tf.reduce_mean((y_true - y_pred) ** 2)

    inner = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    model = keras.Sequential([keras.Input((3,)), inner])
    for each in (inner, model):
        each.compile("sgd", loss, metrics=[lambda y_true, y_pred: 0.0])
    fliqs_tf.wrap(model, FORMATS)
    model.evaluate(np.ones((2, 3)), np.ones((2, 2)), verbose=0)  # still compiled


# ---- what cannot be copied


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras has no LoRA")
def test_lora():
    model = keras.Sequential([keras.Input((3,)), L.Dense(3, name="tuned"), L.Dense(2, name="fc")])
    model.get_layer("tuned").enable_lora(2)
    with pytest.raises(ValueError, match="'tuned' is trained by LoRA.*leave it in float with the rule .'tuned', None"):
        fliqs_tf.wrap(model, FORMATS)
    wrapped = fliqs_tf.wrap(model, FORMATS, rules=[("tuned", None)])
    np.testing.assert_array_equal(wrapped(data(4, 3)), model(data(4, 3)))
    assert trained(wrapped) == trained(model)


def test_functions_that_no_integer_kernel_computes():
    model = keras.Sequential([keras.Input((4, 4, 3)), L.Conv2D(2, 3, activation=relu, name="conv")])
    for convert in (
        lambda: fliqs_tf.wrap(model, ["INT4", "INT8"], target="tflite"),
        lambda: fliqs_tf.apply(model, "INT8", target="tflite"),
    ):
        with pytest.raises(ValueError, match="'conv'.* activation 'relu_of_its_user'"):
            convert()


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras has no model.quantize")
def test_a_model_that_keras_quantized():
    model = keras.Sequential([keras.Input((3,)), L.Dense(2, name="fc")])
    model.quantize("int8")
    for convert in (lambda: fliqs_tf.wrap(model, FORMATS), lambda: fliqs_tf.apply(model, "INT8")):
        with pytest.raises(ValueError, match="Layer 'fc' is quantized already, by Keras' own model.quantize: give the"):
            convert()
