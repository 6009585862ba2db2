"""Embeddings: tables quantized by rows, on request."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf import costs, export
from fliqs_tf._keras import keras
from fliqs_tf.export import deployed
from fliqs_tf.graph import walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.numerics.rounding import fake_quant
from fliqs_tf.quantize.decisions import open_decisions
from fliqs_tf.quantize.network import quantized_network

L = keras.layers
FORMATS = ["INT4", "INT8"]
TOKENS = tf.constant([[1, 2, 0, 0], [3, 8, 5, 1]])


def net(mask_zero=False, dtype="int32"):
    """9 tokens of 6 features, 4 of them per example, and 6 x 2 weights."""
    tokens = keras.Input((4,), dtype=dtype)
    x = L.Embedding(9, 6, mask_zero=mask_zero, name="embedding")(tokens)
    model = keras.Model(tokens, L.Dense(2, name="head")(L.GlobalAveragePooling1D()(x)), name="net")
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(-1, 1, w.shape).astype("float32") for w in model.get_weights()])
    return model


def table(model):
    return tf.convert_to_tensor(walking.unwrapped(model.get_layer("embedding")).embeddings)


def search(**options):
    qmodel = fliqs_tf.wrap(net(), FORMATS, embeddings=True, **options)
    qmodel.compile("sgd", "mse", target_cost="0.75x INT8", cost="memory")
    return qmodel


def test_embeddings_stay_in_float_by_default(caplog):
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        qmodel = fliqs_tf.wrap(net(), FORMATS)
    assert [d.name for d in qmodel.decisions] == [s.path for s in qmodel.sites] == ["head"]
    assert "embedding (Embedding). embeddings=True" in caplog.text


def test_rows_are_quantized_with_a_scale_each():
    model = net()
    fixed = fliqs_tf.apply(model, "INT4", embeddings=True)
    rows = fixed.get_layer("embedding")(TOKENS)
    np.testing.assert_array_equal(rows, tf.gather(fake_quant(table(model), "INT4", (0,)), TOKENS))
    steps = np.asarray(rows[0, 0]) / (np.abs(table(model)[1]).max() / 7)  # INT4 goes to 7
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-5)
    assert np.abs(np.rint(steps)).max() == 7


def test_a_step_moves_the_rows_that_it_looked_up_and_no_others():
    fixed = fliqs_tf.apply(net(), "INT8", embeddings=True)
    before = np.array(table(fixed))
    fixed.compile("sgd", "mse", jit_compile=False)
    fixed.train_on_batch(TOKENS, np.ones((2, 2), np.float32))
    moved = np.any(np.array(table(fixed)) != before, axis=1)
    assert np.flatnonzero(moved).tolist() == [0, 1, 2, 3, 5, 8]


def test_masks_of_a_quantized_embedding():
    model = net(mask_zero=True)
    fixed = fliqs_tf.apply(model, "INT8", embeddings=True)
    np.testing.assert_array_equal(fixed.get_layer("embedding")(TOKENS)._keras_mask, TOKENS != 0)
    before = np.array(fixed(TOKENS))
    np.testing.assert_allclose(before, model(TOKENS), atol=0.05)
    variable = walking.unwrapped(fixed.get_layer("embedding")).embeddings
    variable.assign(tf.tensor_scatter_nd_update(table(fixed), [[0]], tf.fill((1, 6), 9.0)))
    np.testing.assert_array_equal(fixed(TOKENS), before)  # token 0 is masked


def test_costs_of_an_embedding_are_memory_alone():
    model, qmodel = net(), search()
    assert [(s.path, s.macs, s.weights) for s in qmodel.sites] == [("embedding", 0, 54), ("head", 12, 12)]
    recipe = fliqs_tf.Recipe({"embedding": "INT4", "head": "INT8"})
    for each in (qmodel, model, qmodel.deploy(recipe, calibration_data=[TOKENS])):
        given = None if each is not model and each is not qmodel else recipe
        assert costs.memory(each, given) * 8 * 2**20 == 54 * 4 + 12 * 8
        assert costs.bops(each, given) * 10**9 == 12 * 8 * 8
    # Not named, not counted.
    assert costs.memory(model, fliqs_tf.Recipe({"head": "INT8"})) * 8 * 2**20 == 12 * 8


@pytest.mark.parametrize(
    "tensors, formats",
    [
        ("together", ["embedding", "head"]),
        ("weights", ["embedding", "head"]),
        ("separate", ["embedding/weights", "head/weights", "head/activations", "embedding/activations"]),
    ],
)
def test_search_recipe_deploy_and_files(tensors, formats, tmp_path):
    qmodel = search(tensors=tensors)
    if tensors == "separate":
        qmodel.fit(TOKENS, np.ones((2, 2), np.float32), epochs=2, verbose=0)
    recipe = qmodel.recipe()
    assert list(recipe.formats) == formats and recipe.tensors == tensors
    assert recipe.formats.get("embedding/activations", "FP32") == "FP32"  # indices
    recipe.save(tmp_path / "recipe.json")
    assert fliqs_tf.Recipe.load(tmp_path / "recipe.json") == recipe
    final = qmodel.deploy()
    assert deployed.recipe(ModelGraph(final)) == recipe
    expected = np.array(qmodel(TOKENS))
    np.testing.assert_array_equal(final(TOKENS), expected)
    final.save(tmp_path / "final.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "final.keras")(TOKENS), expected)
    applied = fliqs_tf.apply(net(), recipe)
    assert isinstance(applied.get_layer("embedding"), Quantized)
    export.packed(final, tmp_path / "final.safetensors")
    np.testing.assert_array_equal(export.load_packed(tmp_path / "final.safetensors")(TOKENS), expected)


def test_rules_and_ties_reach_embeddings():
    rules = [fliqs_tf.Rule("embedding|head", tie="all")]
    network = quantized_network(ModelGraph(net()), FORMATS, rules, tensors="separate", embeddings=True).model
    assert [(d.name, d.layers) for d in open_decisions(ModelGraph(network))] == [
        ("all/weights", ["embedding", "head"]),
        ("all/activations", ["head"]),
    ]


def test_what_has_no_form_for_embeddings_says_so(tmp_path):
    fixed = fliqs_tf.apply(net(dtype="float32"), "INT8", embeddings=True)
    for write in (export.onnx, export.tflite):
        with pytest.raises(ValueError, match="'embedding'"):
            write(fixed, tmp_path / "file", **({"representative": [TOKENS]} if write is export.tflite else {}))
        assert not list(tmp_path.iterdir())
    for target in ("onnx", "tflite"):
        with pytest.raises(ValueError, match="leave embeddings=False"):
            fliqs_tf.wrap(net(), FORMATS, embeddings=True, target=target)


def test_a_platform_looks_rows_up_in_any_format():
    qmodel = fliqs_tf.wrap(net(), profile="google_tpu_v5e", embeddings=True)
    qmodel.compile("sgd", "mse")
    assert qmodel.sites[0].weight_formats == qmodel.sites[1].weight_formats
    int8 = fliqs_tf.Format("INT8")
    priced = {site.path: qmodel.cost.layer(site, int8, int8) for site in qmodel.sites}
    assert priced["embedding"] == 0 < priced["head"]
    assert fliqs_tf.Profile.load("google_tpu_v5e").unsupported_layers(qmodel, "INT8") == []
