import importlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph import walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.quantize.decisions import open_decisions
from fliqs_tf.quantize.rules import layer_quantizations

L = tf.keras.layers

if not IS_KERAS_3:
    import tensorflow_model_optimization

    tfmot = tensorflow_model_optimization.quantization.keras

only_tf_keras = pytest.mark.skipif(IS_KERAS_3, reason="TensorFlow Model Optimization needs tf_keras")


def network():
    """Every kind of layer that is quantized, one of them called twice, and two that read one tensor."""
    tf.keras.utils.set_random_seed(7)
    image = L.Input((6, 6, 3))
    x = L.Conv2D(4, 3, padding="same", use_bias=False, kernel_regularizer="l2", name="conv")(image)
    x = L.ReLU(name="relu")(L.BatchNormalization(name="bn")(x))
    left = L.SeparableConv2D(6, 3, activation="relu", name="separable")(x)
    right = L.Conv2D(6, 1, name="pointwise")(L.DepthwiseConv2D(3, name="depthwise")(x))
    x = L.Conv2DTranspose(2, 2, name="transpose")(L.Add(name="add")([left, right]))
    twice = L.EinsumDense("ab,bc->ac", 5, bias_axes="c", name="twice")
    x = twice(twice(L.Dense(5, name="dense")(L.Flatten(name="flatten")(x))))
    return tf.keras.Model(image, L.Dense(3, activation="softmax", name="predictions")(x), name="net")


def small(**options):
    tf.keras.utils.set_random_seed(7)
    return tf.keras.Sequential(
        [L.Input((4,)), L.Dense(5, name="a", **options), L.ReLU(name="relu"), L.Dense(3, name="b")], name="small"
    )


def tiny():
    tf.keras.utils.set_random_seed(7)
    image = L.Input((6, 6, 3))
    x = L.ReLU(name="relu")(L.BatchNormalization(name="bn")(L.Conv2D(4, 3, name="conv")(image)))
    return tf.keras.Model(image, L.Dense(3, activation="softmax", name="dense")(L.Flatten()(x)), name="tiny")


def annotated(model, configs):
    """The model with these layers annotated: {name: config or None}."""

    def annotate(layer):
        if layer.name not in configs:
            return layer
        copy = type(layer).from_config(layer.get_config())
        return tfmot.quantize_annotate_layer(copy, configs[layer.name])

    copy = tf.keras.models.clone_model(model, clone_function=annotate)
    for ours, theirs in zip(copy.layers, model.layers):
        ours.set_weights(theirs.get_weights())
    return copy


def applied(model, *args, **kwargs):
    """What quantize_apply makes of a model that is annotated throughout."""
    return tfmot.quantize_apply(
        tfmot.quantize_annotate_model(model), fliqs_tf.tfmot.FliqsQuantizeScheme(*args, **kwargs)
    )


def names(network):
    return [(d.name, d.options, d.layers) for d in open_decisions(ModelGraph(network))]


def numbers(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def assert_same(wrapped, search, x, recipes, training=False):
    """Same decisions, costs and outputs to the bit, for random recipes."""
    assert names(wrapped.network) == names(search.network)
    assert wrapped.sites == search.sites
    generator = np.random.default_rng(1)
    for _ in range(recipes):
        sample = [generator.integers(len(d.options)) for d in wrapped.decisions]
        recipe = fliqs_tf.costs.recipe_of(
            wrapped.sites, {d.name: d.options[i] for d, i in zip(wrapped.decisions, sample)}
        )
        for cost in (fliqs_tf.costs.bops, fliqs_tf.costs.memory):
            assert cost(search, recipe) == cost(wrapped, recipe) > 0
        wrapped.use_sample(sample)
        search.use_sample(sample)
        np.testing.assert_array_equal(wrapped.network(x, training), search.network(x, training))


@pytest.mark.skipif(not IS_KERAS_3, reason="with tf_keras it is there")
def test_under_keras_3_one_sentence_says_how_to_switch():
    sentence = "^fliqs_tf.tfmot needs tf_keras, but tf.keras is Keras 3.*: set TF_USE_LEGACY_KERAS=1 before Python"
    with pytest.raises(ImportError, match=sentence):
        importlib.import_module("fliqs_tf.tfmot")
    with pytest.raises(ImportError, match=sentence):
        _ = fliqs_tf.tfmot
    assert "tensorflow_model_optimization" not in sys.modules


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'tfmod'"):
        _ = fliqs_tf.tfmod


@only_tf_keras
def test_without_tfmot_the_error_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "fliqs_tf.tfmot", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_model_optimization", None)
    with pytest.raises(ImportError, match=r"pip install 'fliqs-tf\[legacy\]'"):
        importlib.import_module("fliqs_tf.tfmot")


@only_tf_keras
def test_the_package_does_not_load_tfmot_until_it_is_used():
    code = """
import sys, fliqs_tf
assert "tensorflow_model_optimization" not in sys.modules
fliqs_tf.tfmot.FliqsQuantizeScheme
assert "tensorflow_model_optimization" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@only_tf_keras
@pytest.mark.parametrize("tensors", ["together", "weights", "separate"])
def test_every_kind_of_layer_and_of_decision(tensors):
    model = network()
    options = {"rules": [("predictions", None), ("^twice", ["INT8"]), fliqs_tf.Rule("^conv|dense", tie="ends")]}
    options["tensors"] = tensors
    wrapped = fliqs_tf.wrap(model, "MIXED", **options)
    search = fliqs_tf.SearchModel(applied(model, "MIXED", **options))
    assert "predictions" in [layer.name for layer in search.network.layers]  # not quantized, so not wrapped
    assert_same(wrapped, search, numbers((3, 6, 6, 3)), recipes=3, training=True)
    assert_same(wrapped, search, numbers((3, 6, 6, 3), seed=1), recipes=1)  # with the ranges that were learned


@only_tf_keras
def test_searches_of_both_are_one_search(tmp_path):
    model = tiny()
    x, y = numbers((48, 6, 6, 3)), np.arange(48) % 3
    by_tfmot = applied(model, "FLIQS-S-INT")
    results = []
    for search in (fliqs_tf.wrap(model, "FLIQS-S-INT"), fliqs_tf.SearchModel(by_tfmot)):
        search.compile(tf.keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", target_cost="0.6x INT8")
        history = search.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0, quality_data=(x, y))
        results.append((search, search.recipe(), history.history, search.deploy()))
    (wrapped, recipe, logs, final), (search, tfmot_recipe, tfmot_logs, tfmot_final) = results
    assert tfmot_recipe.to_dict() == recipe.to_dict() and tfmot_logs == logs
    assert recipe.formats["dense"] != recipe.formats["conv"]
    outputs = final(x).numpy()
    for model in (tfmot_final, search, by_tfmot, wrapped):
        np.testing.assert_array_equal(model(x), outputs)
    # What is deployed has nothing of TFMOT in it.
    assert [(type(a), a.name) for a in tfmot_final.layers] == [(type(a), a.name) for a in final.layers]
    tfmot_final.save(tmp_path / "final.keras")
    np.testing.assert_array_equal(tf.keras.models.load_model(tmp_path / "final.keras")(x), outputs)
    # The search goes on where its file was written.
    search.save(tmp_path / "search.keras")
    with tfmot.quantize_scope():
        loaded = tf.keras.models.load_model(tmp_path / "search.keras")
    assert loaded.recipe() == recipe and int(loaded.controller.step) == 6
    np.testing.assert_array_equal(loaded(x), outputs)
    path = fliqs_tf.io.checkpoints.save(tmp_path, search, 6)
    restored = fliqs_tf.SearchModel(applied(tiny(), "FLIQS-S-INT"))
    restored.compile(tf.keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", target_cost="0.6x INT8")
    assert path.exists() and fliqs_tf.io.checkpoints.restore_newest(tmp_path, restored) == 6
    restored.use_sample()
    np.testing.assert_array_equal(restored(x), outputs)
    # A recipe of the search fits the annotated model as it does the float one.
    again = fliqs_tf.apply(tfmot.quantize_annotate_model(tiny()), recipe)
    assert names(again) == [] and fliqs_tf.costs.bops(again) == fliqs_tf.costs.bops(final)


@only_tf_keras
def test_annotated_layers_are_quantized_as_their_configs_say():
    config = fliqs_tf.tfmot.FliqsQuantizeConfig
    model = annotated(
        network(),
        {
            "conv": config(["INT8"]),
            "relu": None,
            "depthwise": config(["INT2", "INT4"], tie="slim"),
            "pointwise": config(["INT4", "INT2"], tie="slim"),
            "dense": config(),
            "predictions": None,
        },
    )
    wrapped = fliqs_tf.wrap(model, "FLIQS-S-FLOAT", rules=[("conv", ["E4M3"]), ("predictions", ["E2M1", "E4M3"])])
    assert names(wrapped.network) == [
        ("slim", ("INT2", "INT4"), ["depthwise", "pointwise"]),
        ("dense", ("E2M1", "E4M3", "BF16"), ["dense"]),
        ("predictions", ("E2M1", "E4M3"), ["predictions"]),
    ]
    assert wrapped.recipe().formats["conv"] == "INT8"  # the config has the last word
    assert wrapped.recipe().float_layers == ("separable", "transpose", "twice")
    rules = [("conv", ["E4M3"]), ("predictions", ["E2M1", "E4M3"])]
    by_tfmot = tfmot.quantize_apply(model, fliqs_tf.tfmot.FliqsQuantizeScheme("FLIQS-S-FLOAT", rules))
    assert_same(wrapped, fliqs_tf.SearchModel(by_tfmot), numbers((2, 6, 6, 3)), recipes=2)
    wrappers = {layer.name for layer in by_tfmot.layers if isinstance(layer, tfmot.QuantizeWrapper)}
    assert wrappers == {"quant_conv", "quant_depthwise", "quant_pointwise", "quant_dense", "quant_predictions"}


@only_tf_keras
def test_parts_of_an_annotated_layer_are_named_and_stay_in_float(caplog):
    x = L.Input((4, 6))
    attention = L.MultiHeadAttention(2, 3, name="attention")
    model = tf.keras.Model(x, L.Dense(2, name="dense")(attention(x, x)))
    assert len(names(fliqs_tf.wrap(model).network)) == 5
    annotations = dict.fromkeys(["attention", "dense"])
    paths = [path for path, _ in ModelGraph(model).with_kernels]
    spaces = (fliqs_tf.Space("FLIQS-S-INT"),) * 2
    assert list(layer_quantizations(paths, annotations, spaces, (), "layer", "together")) == ["dense"]
    assert "an annotation covers a layer but not the layers inside it: attention/query, attention/key" in caplog.text


@only_tf_keras
def test_layers_of_which_only_weights_are_quantized_beside_others():
    of_weights = fliqs_tf.tfmot.FliqsQuantizeConfig(["INT4", "INT8"], tensors="weights")
    both = fliqs_tf.tfmot.FliqsQuantizeConfig(["INT4", "INT8"])
    model = annotated(small(), {"a": of_weights, "b": both})
    search = fliqs_tf.SearchModel(tfmot.quantize_apply(model))  # by TFMOT's own scheme; ours refuses it
    recipe = search.recipe()
    assert list(recipe.formats) == ["a/weights", "a/activations", "b/weights", "b/activations"]
    assert recipe.formats["a/activations"] == "FP32"
    bits = {path: int(fliqs_tf.Format(fmt).bits) for path, fmt in recipe.formats.items()}
    macs = 20 * bits["a/weights"] * 32 + 15 * bits["b/weights"] * bits["b/activations"]
    assert fliqs_tf.costs.bops(search) == macs / 1e9


@only_tf_keras
def test_tfmots_own_scheme_adds_its_own_quantization():
    model = annotated(small(), {"b": fliqs_tf.tfmot.FliqsQuantizeConfig(["INT4", "INT8"])})
    by_default = tfmot.quantize_apply(model)
    assert names(by_default) == [("b", ("INT4", "INT8"), ["b"])]
    assert [layer.name for layer in by_default.layers] == ["a", "quant_relu", "quant_b"]  # ReLU: 8 bits of TFMOT
    by_scheme = tfmot.quantize_apply(model, fliqs_tf.tfmot.FliqsQuantizeScheme())
    assert [layer.name for layer in by_scheme.layers] == ["a", "relu", "quant_b"]
    x = numbers((4, 4))
    np.testing.assert_array_equal(by_scheme(x), fliqs_tf.wrap(model).network(x))
    assert not np.array_equal(by_default(x), by_scheme(x))


@only_tf_keras
def test_what_cannot_be_searched_is_refused():
    config = fliqs_tf.tfmot.FliqsQuantizeConfig
    scheme = fliqs_tf.tfmot.FliqsQuantizeScheme("FLIQS-S-INT")
    other = tensorflow_model_optimization.quantization.keras.default_8bit.Default8BitQuantizeRegistry()
    theirs = annotated(small(), {"a": other.get_quantize_config(L.Dense(1)), "b": None})
    relu = annotated(small(), {"relu": config(["INT4"]), "b": None})
    weights = annotated(small(), {"a": config(tensors="weights"), "b": None})
    nothing = annotated(small(), {"relu": None})
    for model, message in [
        (
            theirs,
            "'a' is annotated with Default8BitQuantizeConfig.*Annotate it with a fliqs_tf.tfmot.FliqsQuantizeConfig",
        ),
        (relu, r"'\^relu\$' matches no layer. Layers: b"),
        (weights, "'a' is annotated with tensors='weights', but the search has 'together'"),
        (nothing, "None of the annotated layers can be quantized: relu"),
    ]:
        with pytest.raises(ValueError, match=message):
            fliqs_tf.wrap(model, "FLIQS-S-INT")
        with tfmot.quantize_scope(), pytest.raises(ValueError, match=message):
            tfmot.quantize_apply(model, scheme)
    with pytest.raises(ValueError, match="'b' is annotated with a FliqsQuantizeConfig without formats"):
        tfmot.quantize_apply(annotated(small(), {"b": config()}))
    with pytest.raises(ValueError, match=r"quantized already; .* search what quantize_apply made with .*SearchModel"):
        fliqs_tf.wrap(applied(small()), "FLIQS-S-INT")
    with pytest.raises(ValueError, match="tensors must be None or one of together, weights, separate, got 'both'"):
        config(tensors="both")
    with pytest.raises(
        ValueError, match="'small' has no formats to choose from: give what fliqs_tf.wrap or quantize_a"
    ):
        fliqs_tf.SearchModel(small())
    with pytest.raises(ValueError, match="Unknown space 'FLIQS-XS'"):
        fliqs_tf.tfmot.FliqsQuantizeScheme("FLIQS-XS")
    shared = config(["INT4"])
    tfmot.QuantizeWrapperV2(L.Dense(2, name="one"), shared).build((None, 2))
    with pytest.raises(ValueError, match="Layers 'one' and 'two' have the same FliqsQuantizeConfig object"):
        tfmot.QuantizeWrapperV2(L.Dense(2, name="two"), shared).build((None, 2))


@only_tf_keras
@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_files(tmp_path, suffix):
    x = numbers((5, 6, 6, 3))
    model = annotated(
        network(), {"separable": fliqs_tf.tfmot.FliqsQuantizeConfig(["INT4", "INT8"], "s"), "dense": None}
    )
    model.save(tmp_path / f"annotated.{suffix}")
    with tfmot.quantize_scope():
        loaded = tf.keras.models.load_model(tmp_path / f"annotated.{suffix}")
    assert walking.annotated(loaded) == walking.annotated(model)
    assert walking.annotated(loaded)["separable"].get_config() == {
        "formats": ["INT4", "INT8"],
        "tie": "s",
        "tensors": None,
    }
    made = applied(network(), "FLIQS-S-INT", tensors="separate")
    made(x, training=True)
    search = fliqs_tf.SearchModel(made)
    search.use_sample([0, 1] * 8)
    made.save(tmp_path / f"applied.{suffix}")
    with tfmot.quantize_scope():
        loaded = tf.keras.models.load_model(tmp_path / f"applied.{suffix}")
    assert names(loaded) == names(made)
    np.testing.assert_array_equal(loaded(x), made(x))
    made.save_weights(tmp_path / f"weights.{suffix}" if suffix == "h5" else tmp_path / "checkpoint")
    fresh = applied(network(), "FLIQS-S-INT", tensors="separate")
    fresh.load_weights(tmp_path / f"weights.{suffix}" if suffix == "h5" else tmp_path / "checkpoint")
    np.testing.assert_array_equal(fresh(x), made(x))


@only_tf_keras
def test_configs_are_equal_by_what_they_say():
    config = fliqs_tf.tfmot.FliqsQuantizeConfig
    one = config(["INT8", "INT4"], tie="x", tensors="separate")
    assert one == config(("INT4", "INT8"), "x", "separate") and hash(one) == hash(
        config(("INT4", "INT8"), "x", "separate")
    )
    assert one != config(["INT4"], "x", "separate") and one != config(["INT4", "INT8"], "y", "separate")
    assert config.from_config(one.get_config()) == one != fliqs_tf.tfmot.FliqsQuantizer(["INT4", "INT8"])
    assert config.from_config(config().get_config()) == config()
    weights = fliqs_tf.tfmot.FliqsQuantizer("FLIQS-S-INT", channel_axes=[-1])
    assert weights == fliqs_tf.tfmot.FliqsQuantizer.from_config(weights.get_config())
    assert weights != fliqs_tf.tfmot.FliqsQuantizer("FLIQS-S-INT")
    registry = fliqs_tf.tfmot.FliqsQuantizeScheme("FLIQS-S-INT", tensors="weights").get_quantize_registry()
    assert registry.supports(L.Dense(2)) and not registry.supports(L.ReLU())
    assert registry.get_quantize_config(L.Dense(2)) == config("FLIQS-S-INT", tensors="weights")
    with pytest.raises(ValueError, match="'r' of class ReLU is not one to quantize"):
        registry.get_quantize_config(L.ReLU(name="r"))


@only_tf_keras
def test_quantizer_on_its_own():
    import tensorflow_model_optimization.python.core.quantization.keras.quantize_layer as quantize_layer

    x = numbers((4, 3))
    layer = quantize_layer.QuantizeLayer(fliqs_tf.tfmot.FliqsQuantizer(["E4M3"]))
    np.testing.assert_array_equal(layer(x, training=False), fliqs_tf.fake_quant(x, "E4M3"))
    layer(2 * x, training=True)
    np.testing.assert_array_equal(layer(x, training=False), fliqs_tf.fake_quant(x, "E4M3", amax=2 * np.abs(x).max()))
    face = fliqs_tf.tfmot.FliqsQuantizer(["INT4"], channel_axes=(-1,))
    owner = L.Dense(1)
    state = face.build((4, 3), "kernel", owner)
    np.testing.assert_array_equal(face(x, True, state), fliqs_tf.fake_quant(x, "INT4", axis=-1))
    assert [v.name for v in owner.non_trainable_weights] == ["kernel_quantizer/row:0"]


@only_tf_keras
def test_frozen_layers_stay():
    model = small()
    model.get_layer("a").trainable = False
    search = fliqs_tf.SearchModel(applied(model))
    assert [v.shape.as_list() for v in search.trainable_weights] == [[5, 3], [3]]
    ranges = [q.range for d in search.decisions for q in d.quantizers if hasattr(q, "range")]
    wrapped = fliqs_tf.wrap(model)
    for each in (search, wrapped):
        each(numbers((4, 4)), training=True)
    assert all(float(r[1]) > 0 for r in ranges)  # also that of the frozen layer, which had seen no data
    np.testing.assert_array_equal(wrapped(numbers((4, 4), 1)), search(numbers((4, 4), 1)))
    ranges[0].assign([9.0, 1.0])  # settled
    search(numbers((4, 4)), training=True)
    assert [float(r[0]) == 9 for r in ranges] == [True, False]


@only_tf_keras
def test_what_a_layer_does_beside_its_call_is_kept():
    x, y = numbers((4, 4)), numbers((4, 3))
    losses = []
    model = small(activity_regularizer="l2", kernel_regularizer="l1")
    for search in (fliqs_tf.wrap(model), fliqs_tf.SearchModel(applied(model))):
        search.compile("sgd", "mse", target_cost="0.6x INT8")
        losses.append(search.evaluate(x, y, verbose=0))
        assert len(search.network.losses) == 2
    assert losses[0] == losses[1]


@only_tf_keras
def test_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = small()
        wrapped, search = fliqs_tf.wrap(model), fliqs_tf.SearchModel(applied(model))
        x = numbers((4, 4))
        assert search(x).dtype == tf.bfloat16
        np.testing.assert_array_equal(tf.cast(wrapped(x), tf.float32), tf.cast(search(x), tf.float32))
    finally:
        keras.mixed_precision.set_global_policy("float32")


@only_tf_keras
def test_in_a_graph_too():
    model = small()
    wrapped, search = fliqs_tf.wrap(model), fliqs_tf.SearchModel(applied(model))
    x = tf.constant(numbers((4, 4)))
    for compiled in (None, True):
        ours, theirs = (tf.function(m.network, jit_compile=compiled) for m in (wrapped, search))
        np.testing.assert_array_equal(ours(x), theirs(x))
        np.testing.assert_array_equal(ours(x, training=True), theirs(x, training=True))
