"""Parameters, shapes, causality, errors of the transformers."""

import sys

import numpy as np
import pytest
import tensorflow as tf

import models
from fliqs_tf import costs
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph.model_graph import ModelGraph

needs_keras_3 = pytest.mark.skipif(not IS_KERAS_3, reason="keras_hub is for Keras 3")


def block_parameters(width):
    """Four projections and two layers of 4 x width, with biases; two normalizations."""
    return 4 * (width * width + width) + 2 * 4 * width * width + 5 * width + 2 * 2 * width


def deit_parameters(width, depth, patches, classes, channels=3):
    embedding = 16 * 16 * channels * width + width + width + (patches + 1) * width
    return embedding + depth * block_parameters(width) + 2 * width + width * classes + classes


@pytest.mark.parametrize(
    ("name", "width", "published"), [("tiny", 192, 5_717_416), ("small", 384, 22_050_664), ("base", 768, 86_567_656)]
)
def test_deit_parameters_are_the_published_ones(name, width, published):
    # The published counts: timm. Depth does not show in an image, so one block of the network tells them all.
    assert deit_parameters(width, 12, 196, 1000) == published
    model = models.get(f"deit_{name}", input_shape=(32, 32, 3), classes=10, depth=1)
    assert model.count_params() == deit_parameters(width, 1, 4, 10)


def test_deit_counts_projections_for_every_token():
    sites = costs.sites(models.get("deit_tiny", input_shape=(32, 48, 3), classes=10, width=1 / 3, depth=1))
    tokens, width = 2 * 3 + 1, 64
    names = ["query", "key", "value", "attention_output"]
    expected = {"patches": 6 * 16 * 16 * 3 * width, "predictions": width * 10}
    expected |= {f"block1_attention/{name}": tokens * width * width for name in names}
    expected |= {"block1_mlp1": tokens * width * 4 * width, "block1_mlp2": tokens * 4 * width * width}
    assert {site.path: site.macs for site in sites} == expected


def test_deit_reads_the_class_token():
    """What the head sees is the first vector: changing the class token changes every logit, and alike for all images
    where nothing else reaches it."""
    model = models.get("deit_tiny", input_shape=(16, 16, 3), classes=4, width=1 / 3, depth=1)
    first = tf.keras.Model(model.input, [model.get_layer("norm").output, model.get_layer("flatten").output])
    tokens, head_input = first(np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype("float32"))
    assert tokens.shape == (3, 2, 64)
    np.testing.assert_array_equal(tokens[:, 0], head_input)


def test_positions_and_class_token_by_hand():
    from models.tokens import ClassToken, Positions

    x = np.arange(12, dtype="float32").reshape(2, 3, 2)
    token, positions = ClassToken(), Positions()
    assert tuple(token.compute_output_shape((None, 3, 2))) == (None, 4, 2)
    y = token(x)
    token.set_weights([np.array([[[7.0, 8.0]]])])
    positions(y)
    positions.set_weights([np.arange(8.0).reshape(4, 2)])
    expected = [[[7, 9], [2, 4], [6, 8], [10, 12]], [[7, 9], [8, 10], [12, 14], [16, 18]]]
    assert np.array(positions(token(x))).tolist() == expected


def test_gpt_looks_at_nothing_that_follows():
    model = models.get("gpt", input_shape=(8,), classes=11, width=0.25, depth=2)
    # Attention that does not tell positions apart would hide a look ahead.
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    text = rng.integers(0, 11, (3, 8)).astype("int32")
    other = text.copy()
    other[:, 5] = (other[:, 5] + 1) % 11
    difference = np.abs(np.array(model(text)) - np.array(model(other))).max(axis=(0, 2))
    assert difference[:5].max() == 0 and difference[5:].min() > 1e-3


def test_gpt_parameters_and_macs():
    model = models.get("gpt", input_shape=(16,), classes=84)
    assert model.count_params() == 84 * 128 + 16 * 128 + 4 * block_parameters(128) + 2 * 128 + 128 * 84
    assert sum(site.macs for site in costs.sites(model)) == 16 * (4 * 12 * 128**2 + 128 * 84)


@pytest.mark.parametrize("name", ["deit_tiny", "gpt"])
def test_save_and_load(name, tmp_path):
    small = {"deit_tiny": ((32, 32, 3), "float32", 1 / 3), "gpt": ((8,), "int32", 0.25)}
    shape, dtype, width = small[name]
    model = models.get(name, input_shape=shape, width=width, classes=4, depth=1)
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).integers(0, 4, (2, *shape)).astype(dtype)
    np.testing.assert_array_equal(model(x), keras.models.load_model(tmp_path / "model.keras")(x))


def test_names_do_not_change_when_built_again():
    paths = [
        [p for p, _ in ModelGraph(models.get("gpt", input_shape=(8,), width=0.25, depth=2)).with_kernels]
        for _ in range(2)
    ]
    assert paths[0] == paths[1] and len(paths[0]) == 13


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("deit_small", {"input_shape": (224, 200, 3)}, "multiples of 16, the side of a patch"),
        ("deit_small", {"input_shape": (8, 8, 3)}, "height and width of 16 or more"),
        ("deit_small", {"width": 0.25}, r"gives 1\.5 heads, .* multiple of 1/6, such as 0\.166667 or 0\.333333"),
        ("deit_small", {"depth": 0}, "depth must be a whole number of 1 or more"),
        ("deit_small", {"classes": 1}, "classes must be a whole number of 2 or more"),
        ("gpt", {"input_shape": 128}, r"input_shape must be \(length,\), the number of tokens"),
        ("gpt", {"input_shape": (0,)}, r"input_shape must be \(length,\), the number of tokens"),
        ("gpt", {"width": 0.3}, "gives 1.2 heads"),
        ("gpt", {"classes": 1}, "classes must be a whole number of 2 or more"),
        ("bert", {"input_shape": (8, 8)}, r"input_shape must be \(length,\), the number of tokens"),
        ("bert", {"width": 0.3}, "gives 2.4 heads"),
        ("bert", {"vocabulary": 1}, "vocabulary must be a whole number of 2 or more"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        models.get(name, **arguments)


@needs_keras_3
def test_bert_parameters():
    model = models.get("bert", input_shape=(8,), classes=3, width=0.125, depth=2, vocabulary=50)
    width, embeddings = 64, (50 + 8 + 2) * 64 + 2 * 64
    pooled_and_predictions = width * width + width + width * 3 + 3
    assert model.count_params() == embeddings + 2 * block_parameters(width) + pooled_and_predictions
    assert tuple(model.output.shape) == (None, 3)


@needs_keras_3
def test_bert_without_keras_hub_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ImportError, match=r"keras_hub, which cannot be imported .*pip install -e '\.\[hub\]'"):
        models.get("bert")


@pytest.mark.skipif(IS_KERAS_3, reason="what tf_keras says")
def test_bert_under_tf_keras_says_how_to_switch():
    with pytest.raises(ImportError, match="needs Keras 3; tf.keras is tf_keras .* Unset TF_USE_LEGACY_KERAS"):
        models.get("bert")
