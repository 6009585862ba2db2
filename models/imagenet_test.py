"""Parameters, names, shapes and errors of the networks for ImageNet, against the literature."""

import numpy as np
import pytest
import tensorflow as tf

import models
from fliqs_tf._keras import keras


def trainable(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def kernels(model):
    """Name -> shape of the kernel."""
    kinds = (tf.keras.layers.Conv2D, tf.keras.layers.Dense)
    return {layer.name: tuple(layer.kernel.shape) for layer in model.layers if type(layer) in kinds}


def test_resnet18_has_a_projection_in_every_stage():
    found = kernels(models.get("resnet18", input_shape=(32, 32, 3)))
    expected = {f"stage{s}_block{b}_conv{c}" for s in (1, 2, 3, 4) for b in (1, 2) for c in (1, 2)}
    expected |= {f"stage{s}_block1_shortcut" for s in (1, 2, 3, 4)}
    assert set(found) == expected | {"conv1", "predictions"}
    assert found["conv1"] == (7, 7, 3, 64)
    assert found["stage1_block1_shortcut"] == (1, 1, 64, 64)
    assert found["stage4_block1_shortcut"] == (1, 1, 256, 512)
    assert found["stage4_block2_conv2"] == (3, 3, 512, 512)


def test_resnet50_strides_on_the_3x3():
    model = models.get("resnet50", input_shape=(64, 64, 3))
    shapes = {
        name: tuple(model.get_layer(f"stage3_block1_{name}").output.shape[1:])
        for name in ("conv1", "conv2", "conv3", "shortcut")
    }
    # 64 -> 32 (conv1) -> 16 (pool) -> 8 (stage 2) -> 4 (stage 3)
    assert shapes == {"conv1": (8, 8, 256), "conv2": (4, 4, 256), "conv3": (4, 4, 1024), "shortcut": (4, 4, 1024)}


@pytest.mark.parametrize(("name", "shape"), [("resnet18", (33, 47, 1)), ("resnet50", (32, 32, 3))])
def test_forward_pass_by_hand(name, shape):
    """The first block of the second stage, from the layers' own weights."""
    model = models.get(name, input_shape=shape, classes=5, width=0.125)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    last = {"resnet18": "stage1_block2_relu", "resnet50": "stage1_block3_relu"}[name]
    ends = [model.get_layer(last).output, model.get_layer("stage2_block1_relu").output, model.output]
    x, out, logits = tf.keras.Model(model.input, ends)(rng.normal(size=(2, *shape)).astype("float32"))

    def conv_norm(x, layer, strides):
        y = tf.nn.conv2d(x, model.get_layer(f"stage2_block1_{layer}").kernel, strides, "SAME")
        gamma, beta, mean, variance = model.get_layer(f"stage2_block1_{layer}_bn").get_weights()
        return (y - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    if name == "resnet18":
        y = conv_norm(tf.nn.relu(conv_norm(x, "conv1", 2)), "conv2", 1)
    else:
        y = tf.nn.relu(conv_norm(tf.nn.relu(conv_norm(x, "conv1", 1)), "conv2", 2))
        y = conv_norm(y, "conv3", 1)
    np.testing.assert_allclose(out, tf.nn.relu(y + conv_norm(x, "shortcut", 2)), rtol=1e-3, atol=1e-3)
    assert logits.shape == (2, 5)
    assert np.abs(np.sum(logits, -1) - 1).max() > 1e-3  # logits, not probabilities


def test_width_scales_every_layer_but_the_classes():
    half = kernels(models.get("resnet50", input_shape=(32, 32, 3), width=0.5))
    assert half["conv1"] == (7, 7, 3, 32)
    assert half["stage4_block3_conv3"] == (1, 1, 256, 1024)
    assert half["predictions"] == (1024, 1000)
    narrow = kernels(models.get("mobilenet_v2", input_shape=(32, 32, 3), width=0.35))
    # 32 * 0.35 = 11.2, to the next multiple of 8 that is not below 90 %: 16
    assert narrow["Conv1"] == (3, 3, 3, 16)


def test_inception_v3_has_the_same_names_whenever_it_is_built():
    layer = tf.keras.layers.Conv2D(1, 1)  # moves the counter that Keras numbers unnamed layers with
    assert layer.name.startswith("conv2d")
    model = models.get("inception_v3", input_shape=(75, 75, 3))
    assert trainable(model) == 23_817_352 and model.count_params() == 23_851_784  # 23.85 M
    found = kernels(model)
    assert set(found) == {f"conv{i}" for i in range(1, 95)} | {"predictions"}
    # The order of the paper: the stem's first and last, the last pooling branch.
    assert (found["conv1"], found["conv5"], found["conv94"]) == ((3, 3, 3, 32), (3, 3, 80, 192), (1, 1, 2048, 192))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "inception_v3", "efficientnet_b0"])
@pytest.mark.parametrize("shape", [(31, 64, 3), (224, 224), (None, None, 3)])
def test_wrong_input_shape(name, shape):
    with pytest.raises(ValueError, match=r"input_shape must be \(height, width, channels\).* such as \(\d+, \d+, 3\)"):
        models.get(name, input_shape=shape)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "inception_v3", "efficientnet_b0"])
def test_wrong_classes(name):
    with pytest.raises(ValueError, match="classes must be a whole number of 2 or more"):
        models.get(name, classes=1)


def test_wrong_width():
    with pytest.raises(ValueError, match=r"width=0\.3 gives 19\.2 filters .* multiple of 1/64, such as 0\.296875 or"):
        models.get("resnet18", width=0.3)
    with pytest.raises(ValueError, match="width must be a number above 0"):
        models.get("mobilenet_v2", width=0)


def test_argument_that_a_model_does_not_have():
    with pytest.raises(ValueError, match="'inception_v3' takes no argument 'width'. It takes: input_shape, classes"):
        models.get("inception_v3", width=0.5)


def test_save_and_load(tmp_path):
    model = models.get("resnet18", input_shape=(32, 32, 3), classes=4, width=0.125)
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(model(x), keras.models.load_model(tmp_path / "model.keras")(x))
