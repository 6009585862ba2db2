"""Layers that hold layers: what is replaced, what it computes, how it is saved."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf import costs, wrapping
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph import tracing
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import batch_norm
from fliqs_tf.layers.composite import Composite
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.numerics.rounding import fake_quant
from fliqs_tf.quantize import copying
from fliqs_tf.quantize.decisions import open_decisions
from fliqs_tf.quantize.network import quantized_network

L = keras.layers
FORMATS = ["INT4", "FP32"]
PROJECTIONS = ["query", "key", "value", "attention_output"]


def data(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).standard_normal(shape), tf.float32)


def randomized(model, seed=0):
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(-1, 1, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def attention(**options):
    inputs, memory = keras.Input((5, 6), name="x"), keras.Input((7, 4), name="memory")
    outputs = L.MultiHeadAttention(2, 3, name="attention", **options)(inputs, memory)
    return randomized(keras.Model([inputs, memory], outputs, name="net"))


ATTENTION_DATA = [data(3, 5, 6), data(3, 7, 4, seed=1)]


def saved_and_loaded(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras")


# ---- attention


def test_attention_has_a_decision_per_projection_and_computes_the_same_in_fp32():
    model = attention()
    network = quantized_network(ModelGraph(model), FORMATS).model
    assert [d.name for d in open_decisions(ModelGraph(network))] == [f"attention/{p}" for p in PROJECTIONS]
    np.testing.assert_array_equal(network(ATTENTION_DATA), model(ATTENTION_DATA))
    assert len(network.trainable_variables) == len(model.trainable_variables)
    assert not any(isinstance(layer, Quantized) for _, layer in ModelGraph(model).layers)


def test_quantized_attention_is_attention_with_quantized_kernels():
    model, by_hand = attention(), attention()
    layer = by_hand.get_layer("attention")
    for projection, axes in ((layer._query_dense, (1, 2)), (layer._key_dense, (1, 2)), (layer._value_dense, (1, 2))):
        projection.kernel.assign(fake_quant(tf.convert_to_tensor(projection.kernel), "INT4", axes))
    layer._output_dense.kernel.assign(fake_quant(tf.convert_to_tensor(layer._output_dense.kernel), "INT8", (2,)))
    recipe = {f"attention/{p}": "INT4" for p in PROJECTIONS} | {"attention/attention_output": "INT8"}
    fixed = copying.fixed(quantized_network(ModelGraph(model), FORMATS, tensors="weights"), recipe).model
    np.testing.assert_array_equal(fixed(ATTENTION_DATA), by_hand(ATTENTION_DATA))


def test_inputs_of_projections_are_quantized_too():
    network = wrapping.apply(attention(), "INT8")
    network(ATTENTION_DATA, training=True)
    largest = [float(tf.reduce_max(tf.abs(x))) for x in ATTENTION_DATA]
    ranges = {
        path: float(layer.activation_quantizer.range[0])
        for path, layer in ModelGraph(network).layers
        if isinstance(layer, Quantized)
    }
    # Zero-debiased: after one batch the range is that of the batch.
    expected = {"attention/query": largest[0], "attention/key": largest[1], "attention/value": largest[1]}
    assert {k: ranges[k] for k in expected} == pytest.approx(expected, rel=1e-6)


def test_masks_pass_through_as_without_the_wrapper():
    tokens = keras.Input((5,), dtype="int32")
    x = L.Embedding(9, 6, mask_zero=True, name="embedding")(tokens)
    x = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    model = randomized(keras.Model(tokens, L.GlobalAveragePooling1D()(x)))
    network = quantized_network(ModelGraph(model), FORMATS).model
    x = tf.constant([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0]])
    before = network(x)
    np.testing.assert_array_equal(before, model(x))
    table = network.get_layer("embedding").embeddings
    table.assign(tf.tensor_scatter_nd_update(tf.convert_to_tensor(table), [[0]], 9 * tf.ones((1, 6))))
    np.testing.assert_allclose(network(x), before, rtol=1e-6)  # nothing looks at what is masked


@pytest.mark.parametrize("options", [{"use_causal_mask": True}, {"return_attention_scores": True}])
def test_arguments_of_the_call_pass_through(options):
    inputs = keras.Input((5, 6))
    outputs = L.MultiHeadAttention(2, 3, name="attention")(inputs, inputs, **options)
    model = randomized(keras.Model(inputs, outputs))
    network = quantized_network(ModelGraph(model), FORMATS).model
    x = data(3, 5, 6)
    for a, b in zip(tf.nest.flatten(network(x)), tf.nest.flatten(model(x))):
        np.testing.assert_array_equal(a, b)


def test_dropout_inside_follows_training():
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, L.MultiHeadAttention(2, 3, dropout=0.5, name="attention")(inputs, inputs))
    network = quantized_network(ModelGraph(model), FORMATS).model
    x = data(3, 5, 6)
    assert np.array_equal(network(x), network(x, training=False))
    assert not np.array_equal(network(x, training=True), network(x, training=False))


def test_a_saved_model_has_its_quantized_parts_again(tmp_path):
    fixed = wrapping.apply(attention(), "INT4")
    fixed(ATTENTION_DATA, training=True)
    loaded = saved_and_loaded(fixed, tmp_path)
    np.testing.assert_array_equal(loaded(ATTENTION_DATA), fixed(ATTENTION_DATA))
    found = [path for path, layer in ModelGraph(loaded).of_type(Quantized)]
    assert found == [f"attention/{p}" for p in PROJECTIONS]


def test_a_part_that_is_not_there():
    layer = Composite(L.MultiHeadAttention(2, 3, name="attention"), {"querry": {"weight_formats": ["INT4"]}})
    with pytest.raises(ValueError, match="Layer 'attention' has no part 'querry'. Its parts: query, key, value"):
        layer(ATTENTION_DATA[0], ATTENTION_DATA[0])


# ---- layers and models of a class of their own

register = keras.saving.register_keras_serializable("composite_test")


@register
class Mlp(L.Layer):
    def __init__(self, width=6, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.layers_in_turn = (L.Dense(2 * width, activation="relu"), L.Dropout(0.1), L.Dense(width, name="down"))

    def call(self, x):
        for layer in self.layers_in_turn:
            x = layer(x)
        return x

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@register
class Encoder(keras.Model):
    """Layers in attributes, lists and dicts; networks inside, one of them not built with the others; a shared layer."""

    def __init__(self, width=6, depth=1, **kwargs):
        super().__init__(**kwargs)
        self.width, self.depth = width, depth
        self.stem = keras.Sequential([L.Conv2D(width, 2, 2), L.BatchNormalization()], name="stem")
        inputs = keras.Input((4, 4, width))
        self.backbone = keras.Model(inputs, L.Conv2D(width, 3, padding="same")(inputs))
        self.blocks = [
            {"attention": L.MultiHeadAttention(2, 3, name="attention"), "mlp": Mlp(width)} for _ in range(depth)
        ]
        self.shared = L.Dense(width, name="shared")
        self.head = L.Dense(3)

    def call(self, x, training=None):
        x = self.backbone(self.stem(x, training=training))
        x = self.shared(tf.reshape(x, (-1, 16, self.width)))
        for block in self.blocks:
            x = x + block["attention"](x, x)
            x = self.shared(x + block["mlp"](x))
        return self.head(tf.reduce_mean(x, axis=1))

    def get_config(self):
        return {"width": self.width, "depth": self.depth, "name": self.name}


PATHS = [
    "stem/0",
    "backbone/1",
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/attention_output",
    "blocks/0/mlp/layers_in_turn/0",
    "blocks/0/mlp/down",
    "shared",
    "head",
]
IMAGES = data(4, 8, 8, 3)


def encoder():
    model = Encoder(name="encoder")
    model(IMAGES)
    return randomized(model)


@pytest.fixture(scope="module")
def searched():
    model = encoder()
    weights, before = model.get_weights(), model(IMAGES)
    wrapped = fliqs_tf.wrap(model, ["INT4", "INT8", "FP32"])
    np.testing.assert_array_equal(wrapped(IMAGES), before)  # the widest format, until a search says otherwise
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wrapped.compile("sgd", loss, metrics=["accuracy"], target_cost="0.7x INT8")
    labels = np.array([0, 1, 2, 0])
    wrapped.fit(IMAGES, labels, batch_size=2, verbose=0, quality_data=(IMAGES, labels))
    for a, b in zip(model.get_weights(), weights):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(model(IMAGES), before)
    return model, wrapped


def test_a_subclassed_model_is_searched_in_a_copy(searched):
    model, wrapped = searched
    assert [d.name for d in wrapped.decisions] == PATHS
    assert [d.layers for d in wrapped.decisions] == [[path] for path in PATHS]
    assert len(wrapped.network.trainable_variables) == len(model.trainable_variables)
    assert [(s.path, s.macs, s.weights) for s in wrapped.sites] == [
        (t.path, t.macs, t.weights) for t in tracing.trace(ModelGraph(model))
    ]
    assert {s.path: s.macs for s in wrapped.sites}["shared"] == 2 * 16 * 36  # called twice on 16 places
    assert len(batch_norm.batch_norms(ModelGraph(wrapped.network))) == 1


def test_a_deployed_subclassed_model_is_that_of_the_search_also_when_it_was_saved(searched, tmp_path):
    _, wrapped = searched
    deployed = wrapped.deploy()
    np.testing.assert_array_equal(deployed(IMAGES), wrapped(IMAGES))
    loaded = saved_and_loaded(deployed, tmp_path)
    np.testing.assert_array_equal(loaded(IMAGES), deployed(IMAGES))
    assert [path for path, layer in ModelGraph(loaded).of_type(Quantized)] == PATHS
    assert costs.bops(loaded) == costs.bops(wrapped, wrapped.recipe())


def test_a_saved_search_of_a_subclassed_model_goes_on(searched, tmp_path):
    _, wrapped = searched
    loaded = saved_and_loaded(wrapped, tmp_path)
    np.testing.assert_array_equal(loaded(IMAGES), wrapped(IMAGES))
    assert loaded.recipe() == wrapped.recipe()
    assert [v.shape for v in loaded.variables] == [v.shape for v in wrapped.variables]


def test_a_recipe_of_a_subclassed_model_applies_to_it(searched):
    model, wrapped = searched
    applied = wrapping.apply(model, wrapped.recipe())
    assert [path for path, layer in ModelGraph(applied).of_type(Quantized)] == PATHS


@register
class Graph(keras.Model):
    """A graph of a class that is saved by its arguments; one of its layers is an attribute too."""

    def __init__(self, width=3, **kwargs):
        inputs = {"a": keras.Input((None, 2), name="a"), "b": keras.Input((4,), name="b")}
        dense = L.Dense(width)
        x = L.MultiHeadAttention(1, 2, name="attention")(dense(inputs["a"]), dense(inputs["a"]))
        super().__init__(inputs, L.Add()([L.GlobalAveragePooling1D()(x), L.Dense(width)(inputs["b"])]), **kwargs)
        self.width, self.dense = width, dense

    def get_config(self):
        return {"width": self.width, "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)


def test_a_graph_of_a_class_of_its_own_is_copied_as_its_class_says(tmp_path):
    model = randomized(Graph(name="net"))
    x = {"a": data(3, 5, 2), "b": data(3, 4)}
    fixed = wrapping.apply(model, "FP32")
    paths = [path for path, layer in ModelGraph(fixed).of_type(Quantized)]
    assert sorted(paths) == sorted(["dense", *(f"attention/{p}" for p in PROJECTIONS), paths[-1]])
    np.testing.assert_array_equal(fixed(x), model(x))
    fixed = wrapping.apply(model, "INT4")
    assert not np.array_equal(fixed(x), model(x))
    np.testing.assert_array_equal(saved_and_loaded(fixed, tmp_path)(x), fixed(x))
    sizes = {"a": (7, 2), "b": (4,)}
    assert {t.path: t.macs for t in tracing.trace(ModelGraph(fixed), sizes)}["dense"] == 2 * 7 * 2 * 3


# ---- what is refused


class Forgetful(Mlp):
    def get_config(self):
        return {"depth": 3}


class Wider(Mlp):
    def get_config(self):
        return {**super().get_config(), "width": 8}


@pytest.mark.parametrize(
    "layer, why",
    [
        (
            Forgetful,
            "(?s)Layer 'mlp' of class Forgetful cannot be copied: .*Let get_config return",
        ),
        (Wider, "A copy of layer .* has other weights. Let get_config"),
    ],
)
def test_a_layer_that_its_config_does_not_describe(layer, why):
    inputs = keras.Input((5, 6))
    with pytest.raises(ValueError, match=why):
        wrapping.apply(keras.Model(inputs, layer(name="mlp")(inputs)), "INT4")


@register
class Holder(L.Layer):
    """A layer that is given a layer."""

    def __init__(self, held, **kwargs):
        super().__init__(**kwargs)
        self.held = keras.saving.deserialize_keras_object(held) if isinstance(held, dict) else held

    def call(self, x):
        return self.held(x)

    def get_config(self):
        return {**super().get_config(), "held": keras.saving.serialize_keras_object(self.held)}


def test_a_layer_that_a_copy_would_untie():
    inputs, shared = keras.Input((6,)), L.Dense(6, name="shared")
    outputs = Holder(shared, name="second")(Holder(shared, name="first")(inputs))
    with pytest.raises(ValueError, match="not made of the same layers; they differ in second/shared.*do not share"):
        wrapping.apply(keras.Model(inputs, outputs), "INT4")


def test_input_shapes_of_subclassed_models():
    model = encoder()
    with pytest.raises(ValueError, match=r"input_shape \(9, 9\) does not fit model 'encoder', which takes"):
        wrapping.apply(model, "INT4", input_shape=(9, 9))
    with pytest.raises(ValueError, match=r"(?s)cannot be called on examples of \(\(20, 20, 3\), 'float32'\).*Give inp"):
        wrapping.apply(model, "INT4", input_shape=(20, 20, 3))
    with pytest.raises(ValueError, match="Model 'new' is not built: .*call it on a batch"):
        wrapping.apply(Encoder(name="new"), "INT4")


# ---- what Keras 3 alone has


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras has no grouped queries")
def test_grouped_queries():
    inputs = keras.Input((5, 8))
    outputs = L.GroupQueryAttention(4, 4, 2, name="attention")(inputs, inputs)
    model = randomized(keras.Model(inputs, outputs))
    network = quantized_network(ModelGraph(model), FORMATS).model
    # 4 heads of queries, 2 of keys and of values, each of width 4.
    macs = {t.path: t.macs for t in tracing.trace(ModelGraph(network))}
    assert macs == {
        f"attention/{p}": 5 * 8 * 4 * n for p, n in zip(["query", "key", "value", "attention_output"], [4, 2, 2, 4])
    }
    np.testing.assert_array_equal(network(data(3, 5, 8)), model(data(3, 5, 8)))


@pytest.mark.skipif(not IS_KERAS_3, reason="keras_hub needs Keras 3")
def test_a_backbone_of_keras_hub(tmp_path):
    hub = pytest.importorskip("keras_hub")
    backbone = hub.models.BertBackbone(20, 1, 2, 8, 16, max_sequence_length=6)
    model = hub.models.BertMaskedLM(backbone)  # its head holds the embedding that the backbone has too
    x = {name: tf.ones((2, 6), tf.int32) for name in ("token_ids", "segment_ids", "padding_mask")}
    x["mask_positions"] = tf.constant([[1, 2], [3, 4]])
    fixed = wrapping.apply(model, "FP32")
    np.testing.assert_array_equal(fixed(x), model(x))
    fixed = wrapping.apply(model, "INT8")
    np.testing.assert_array_equal(saved_and_loaded(fixed, tmp_path)(x), fixed(x))
    sizes = {name: tuple(value.shape[1:]) for name, value in x.items()}
    block = "backbone/transformer_layer_0"
    assert {t.path: t.macs for t in tracing.trace(ModelGraph(fixed), sizes)} == {
        **{f"{block}/self_attention_layer/{p}": 6 * 8 * 8 for p in PROJECTIONS},
        f"{block}/feedforward_intermediate_dense": 6 * 8 * 16,
        f"{block}/feedforward_output_dense": 6 * 16 * 8,
        "backbone/pooled_dense": 8 * 8,  # called, if for nothing
        "mlm_head/intermediate_dense": 2 * 8 * 8,
    }
