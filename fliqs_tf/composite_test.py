"""Layers that hold layers: what is replaced, what it computes, how it is saved."""

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf import trace, wrapping
from fliqs_tf._keras import keras
from fliqs_tf.composite import Composite
from fliqs_tf.quantized import Quantized
from fliqs_tf.rounding import fake_quant

L = keras.layers
MENU = ["INT4", "FP32"]
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
    network = wrapping.quantized_network(model, MENU)
    assert [d.name for d in wrapping.decisions(network)] == [f"attention/{p}" for p in PROJECTIONS]
    np.testing.assert_array_equal(network(ATTENTION_DATA), model(ATTENTION_DATA))
    assert len(network.trainable_variables) == len(model.trainable_variables)
    assert not any(isinstance(layer, Quantized) for _, layer in trace.walk(model))


def test_quantized_attention_is_attention_with_quantized_kernels():
    model, by_hand = attention(), attention()
    layer = by_hand.get_layer("attention")
    for projection, axes in ((layer._query_dense, (1, 2)), (layer._key_dense, (1, 2)), (layer._value_dense, (1, 2))):
        projection.kernel.assign(fake_quant(tf.convert_to_tensor(projection.kernel), "INT4", axes))
    layer._output_dense.kernel.assign(fake_quant(tf.convert_to_tensor(layer._output_dense.kernel), "INT8", (2,)))
    recipe = {f"attention/{p}": "INT4" for p in PROJECTIONS} | {"attention/attention_output": "INT8"}
    fixed = wrapping.fixed(wrapping.quantized_network(model, MENU, tensors="weights"), recipe)
    np.testing.assert_array_equal(fixed(ATTENTION_DATA), by_hand(ATTENTION_DATA))


def test_inputs_of_projections_are_quantized_too():
    network = wrapping.apply(attention(), "INT8")
    network(ATTENTION_DATA, training=True)
    largest = [float(tf.reduce_max(tf.abs(x))) for x in ATTENTION_DATA]
    ranges = {
        path: float(layer.activation_quantizer.range[0])
        for path, layer in trace.walk(network)
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
    network = wrapping.quantized_network(model, MENU)
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
    network = wrapping.quantized_network(model, MENU)
    x = data(3, 5, 6)
    for a, b in zip(tf.nest.flatten(network(x)), tf.nest.flatten(model(x))):
        np.testing.assert_array_equal(a, b)


def test_dropout_inside_follows_training():
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, L.MultiHeadAttention(2, 3, dropout=0.5, name="attention")(inputs, inputs))
    network = wrapping.quantized_network(model, MENU)
    x = data(3, 5, 6)
    assert np.array_equal(network(x), network(x, training=False))
    assert not np.array_equal(network(x, training=True), network(x, training=False))


def test_a_saved_model_has_its_quantized_parts_again(tmp_path):
    fixed = wrapping.apply(attention(), "INT4")
    fixed(ATTENTION_DATA, training=True)
    loaded = saved_and_loaded(fixed, tmp_path)
    np.testing.assert_array_equal(loaded(ATTENTION_DATA), fixed(ATTENTION_DATA))
    found = [path for path, layer in trace.walk(loaded) if isinstance(layer, Quantized)]
    assert found == [f"attention/{p}" for p in PROJECTIONS]


def test_a_part_that_is_not_there():
    layer = Composite(L.MultiHeadAttention(2, 3, name="attention"), {"querry": {"weight_formats": ["INT4"]}})
    with pytest.raises(ValueError, match="Layer 'attention' has no part 'querry'. Its parts: query, key, value"):
        layer(ATTENTION_DATA[0], ATTENTION_DATA[0])
