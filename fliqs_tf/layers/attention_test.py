"""Products of attention: what is rounded, what it costs, what a search and its files make of it."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf import costs, export
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.export import deployed
from fliqs_tf.graph import walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.attention import Product
from fliqs_tf.numerics.rounding import fake_quant
from fliqs_tf.quantize import copying
from fliqs_tf.quantize.decisions import open_decisions
from fliqs_tf.quantize.network import quantized_network

L = keras.layers
FORMATS = ["INT4", "INT8"]
PRODUCTS = ["attention/scores", "attention/context"]
IN_FLOAT = [("attention/(query|key|value|attention_output)", None)]


def data(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).standard_normal(shape), tf.float32)


def net(attention=None, features=4, **call):
    """2 heads of 3 features; 5 queries, 7 keys."""
    inputs, memory = keras.Input((5, 6), name="x"), keras.Input((7, features), name="memory")
    attention = attention or L.MultiHeadAttention(2, 3, name="attention")
    model = keras.Model([inputs, memory], attention(inputs, memory, **call), name="net")
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(-1, 1, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


DATA = [data(3, 5, 6), data(3, 7, 4, seed=1)]


def by_hand(model, x, memory, formats=("FP32",) * 4, mask=None):
    """Attention as its equations say, with formats of key, query, value and probabilities."""

    def project(x, dense, equation="btd,dnh->btnh"):
        return tf.einsum(equation, x, tf.convert_to_tensor(dense.kernel)) + tf.convert_to_tensor(dense.bias)

    def rounded(x, fmt):
        return fake_quant(x, fmt)

    layer = walking.unwrapped(model.get_layer("attention"))
    key, query, value, probabilities = formats
    q, k = project(x, layer._query_dense) / np.float32(3**0.5), project(memory, layer._key_dense)
    scores = tf.einsum("btnh,bsnh->bnts", rounded(q, query), rounded(k, key))
    scores = scores if mask is None else scores + tf.where(mask, 0.0, -1e9)
    p = rounded(tf.nn.softmax(scores), probabilities)
    context = tf.einsum("bnts,bsnh->btnh", p, rounded(project(memory, layer._value_dense), value))
    return project(context, layer._output_dense, "btnh,nhd->btd")


def products(model):
    return dict(ModelGraph(model).of_type(Product))


def search(**options):
    qmodel = fliqs_tf.wrap(net(), FORMATS, attention_scores=True, **options)
    qmodel.compile("sgd", "mse", target_cost="0.75x INT8")
    return qmodel


def test_products_stay_in_float_by_default_and_do_not_count():
    qmodel = fliqs_tf.wrap(net(), FORMATS)
    assert not set(PRODUCTS) & {d.name for d in qmodel.decisions}
    assert [s.macs for s in qmodel.sites] == [5 * 6 * 6, 7 * 4 * 6, 7 * 4 * 6, 5 * 6 * 6]


def test_all_operands_of_both_products_are_quantized():
    model = net()
    formats = dict(zip(("scores/weights", "scores/activations", "context/weights", "context/activations"),
                       ("INT4", "INT8", "E4M3", "INT3")))  # fmt: skip
    recipe = fliqs_tf.Recipe({f"attention/{k}": f for k, f in formats.items()}, "separate", info={
        "float_layers": [f"attention/{p}" for p in ("query", "key", "value", "attention_output")]})  # fmt: skip
    fixed = fliqs_tf.apply(model, recipe)
    np.testing.assert_allclose(fixed(DATA), by_hand(model, *DATA, formats.values()), rtol=1e-4, atol=1e-4)
    for position in range(4):  # each of them matters
        others = [f if i != position else "FP32" for i, f in enumerate(formats.values())]
        assert np.abs(fixed(DATA) - by_hand(model, *DATA, others)).max() > 1e-3


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}, {"return_attention_scores": True}])
def test_in_fp32_attention_is_as_it_was(call):
    model = net(**call)
    fixed = fliqs_tf.apply(model, "FP32", attention_scores=True)
    for a, b in zip(tf.nest.flatten(fixed(DATA)), tf.nest.flatten(model(DATA))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_causal_masks_hold_with_quantized_products():
    model = net(use_causal_mask=True)
    fixed = fliqs_tf.apply(model, "INT8", attention_scores=True)
    fixed(DATA, training=True)  # ranges, so that what is masked cannot show in them
    changed = tf.concat([DATA[1][:, :5], 0.5 * DATA[1][:, 5:]], axis=1)
    np.testing.assert_array_equal(fixed([DATA[0], changed]), fixed(DATA))
    assert not np.array_equal(fixed([DATA[0], 0.5 * DATA[1]]), fixed(DATA))


def test_macs_bops_and_ranges():
    qmodel = search()
    sites = {s.path: s for s in qmodel.sites}
    assert [(sites[p].macs, sites[p].weights) for p in PRODUCTS] == [(2 * 5 * 7 * 3, 0)] * 2
    projections = 5 * 6 * 6 + 7 * 4 * 6 + 7 * 4 * 6 + 5 * 6 * 6
    formats = dict.fromkeys(qmodel.recipe().formats, "INT8") | {PRODUCTS[0]: "INT4"}
    recipe = fliqs_tf.Recipe(formats)
    bops = (projections + 210) * 64 + 210 * 16
    assert costs.bops(qmodel, recipe) * 10**9 == pytest.approx(bops, rel=1e-12)
    assert costs.bops(fliqs_tf.apply(net(), recipe)) * 10**9 == pytest.approx(bops, rel=1e-12)
    with pytest.raises(ValueError, match="'attention/context', a product .* does not count"):
        costs.bops(net(), recipe)
    qmodel.network(DATA, training=True)
    context = products(qmodel.network)["attention/context"]
    assert 1 / 7 < float(context.activation_quantizer.range[0]) <= 1  # probabilities of 7 keys


@pytest.mark.parametrize("tensors", ["together", "separate"])
def test_search_recipe_deploy_and_files(tensors, tmp_path):
    qmodel = search(tensors=tensors)
    names = PRODUCTS if tensors == "together" else [f"{p}/{t}" for p in PRODUCTS for t in ("weights", "activations")]
    assert set(names) < {d.name for d in qmodel.decisions}
    if tensors == "together":
        assert all(len(d.choices) == 1 and len(d.quantizers) == 2 for d in qmodel.decisions)
    if tensors == "separate":
        qmodel.fit(tf.data.Dataset.from_tensors((tuple(DATA), tf.ones((3, 5, 6)))).repeat(4), verbose=0)
    final, expected = qmodel.deploy(), np.array(qmodel(DATA))
    assert deployed.recipe(ModelGraph(final)) == qmodel.recipe()
    np.testing.assert_array_equal(final(DATA), expected)
    final.save(tmp_path / "final.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "final.keras")(DATA), expected)
    qmodel.save(tmp_path / "search.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "search.keras")(DATA), expected)
    export.packed(final, tmp_path / "final.safetensors")
    np.testing.assert_array_equal(export.load_packed(tmp_path / "final.safetensors")(DATA), expected)


@keras.saving.register_keras_serializable("products_test")
class Block(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = L.MultiHeadAttention(2, 3, name="attention")

    def call(self, x):
        return x + self.attention(x, x)


def test_attention_inside_of_a_layer(tmp_path):
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, Block(name="block")(inputs), name="net")
    network = quantized_network(ModelGraph(model), FORMATS, IN_FLOAT, attention_scores=True).model
    assert [d.name for d in open_decisions(ModelGraph(network))] == [f"block/{p}" for p in PRODUCTS]
    assert [s.macs for s in costs.sites(network) if s.weight_decision] == [2 * 5 * 5 * 3] * 2
    fixed = copying.fixed(ModelGraph(network), {"block/attention/scores": "INT8"}).model
    assert [products(fixed)[f"block/{p}"].get_config()["weight_formats"] for p in PRODUCTS] == [["INT8"], ["INT4"]]
    expected = DATA[0] + by_hand_block(model, DATA[0])
    np.testing.assert_allclose(fixed(DATA[0]), expected, rtol=1e-4, atol=1e-4)


def by_hand_block(model, x):
    inner = keras.Model(inputs := keras.Input((5, 6)), model.get_layer("block").attention(inputs, inputs))
    return by_hand(inner, x, x, ("INT8", "INT8", "INT4", "INT4"))


@pytest.mark.skipif(not IS_KERAS_3, reason="Keras 3 has it")
def test_grouped_queries():
    model = net(L.GroupQueryAttention(8, 4, 2, name="attention"), features=6)  # 4 heads of 8 features
    fixed = fliqs_tf.apply(model, "FP32", attention_scores=True)
    x = [DATA[0], data(3, 7, 6)]
    np.testing.assert_allclose(fixed(x), model(x), rtol=1e-5, atol=1e-5)
    assert [s.macs for s in costs.sites(fixed) if s.path in PRODUCTS] == [4 * 5 * 7 * 8] * 2


def test_a_product_hands_on_no_mask():
    x = L.Masking()(data(1, 2, 3))
    assert getattr(x, "_keras_mask", None) is not None
    product = Product("bsh,bth->bts", True, ["INT8"], ["INT8"])
    assert getattr(product(x, x), "_keras_mask", None) is None


def test_a_product_in_float_beside_a_quantized_one():
    model = net()
    rules = [*IN_FLOAT, ("attention/scores", None)]
    network = copying.fixed(quantized_network(ModelGraph(model), FORMATS, rules, attention_scores=True), {}).model
    assert list(products(network)) == ["attention/context"]
    expected = by_hand(model, *DATA, ("FP32", "FP32", "INT4", "INT4"))
    np.testing.assert_allclose(network(DATA), expected, rtol=1e-4, atol=1e-4)


def test_bad_options():
    with pytest.raises(ValueError, match="use tensors='together' or 'separate'"):
        fliqs_tf.wrap(net(), FORMATS, attention_scores=True, tensors="weights")
    with pytest.raises(ValueError, match="attention_scores=True, but model 'plain' has no MultiHeadAttention"):
        inputs = keras.Input((3,))
        fliqs_tf.wrap(keras.Model(inputs, L.Dense(2)(inputs), name="plain"), FORMATS, attention_scores=True)
    with pytest.raises(ValueError, match="leave attention_scores=False"):
        fliqs_tf.wrap(net(), FORMATS, attention_scores=True, target="onnx")
