"""Parameters, MACs, names and shapes of the ResNets, counted by hand."""

import numpy as np
import pytest
import tensorflow as tf

import models
from models.resnet import resnet8, resnet20

# 3x3 convolutions, 1x1 shortcuts, dense with bias, and 2 trainable numbers per
# batch-normalized channel.
RESNET20_KERNELS = (
    3 * 3 * 3 * 16  # conv1
    + 6 * (3 * 3 * 16 * 16)
    + (3 * 3 * 16 * 32 + 5 * (3 * 3 * 32 * 32) + 16 * 32)
    + (3 * 3 * 32 * 64 + 5 * (3 * 3 * 64 * 64) + 32 * 64)
    + 64 * 10
)
RESNET20_TRAINABLE = RESNET20_KERNELS + 10 + 2 * (7 * 16 + 7 * 32 + 7 * 64)
RESNET8_KERNELS = (
    3 * 3 * 3 * 16
    + 2 * (3 * 3 * 16 * 16)
    + (3 * 3 * 16 * 32 + 3 * 3 * 32 * 32 + 16 * 32)
    + (3 * 3 * 32 * 64 + 3 * 3 * 64 * 64 + 32 * 64)
    + 64 * 10
)
RESNET8_TRAINABLE = RESNET8_KERNELS + 10 + 2 * (3 * 16 + 3 * 32 + 3 * 64)


def quantizable(model):
    """The layers that hold a kernel."""
    kinds = (tf.keras.layers.Conv2D, tf.keras.layers.Dense)
    return {layer.name: layer for layer in model.layers if isinstance(layer, kinds)}


def macs(layer):
    """Multiply-adds of a layer: the kernel is applied once per output position."""
    positions = int(np.prod(layer.output.shape[1:-1]))
    return positions * int(np.prod(layer.kernel.shape))


def trainable(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def test_resnet20_parameters():
    model = resnet20()
    assert RESNET20_TRAINABLE == 272_474
    assert trainable(model) == 272_474
    assert model.count_params() == 272_474 + 2 * (7 * 16 + 7 * 32 + 7 * 64)
    assert sum(int(np.prod(x.kernel.shape)) for x in quantizable(model).values()) == 270_896


def test_resnet8_parameters():
    model = resnet8()
    assert RESNET8_TRAINABLE == 78_042
    assert trainable(model) == 78_042


def test_resnet20_macs():
    found = {name: macs(layer) for name, layer in quantizable(resnet20()).items()}
    assert found["conv1"] == 32 * 32 * 9 * 3 * 16 == 442_368
    assert found["stage1_block1_conv1"] == 32 * 32 * 9 * 16 * 16 == 2_359_296
    assert found["stage2_block1_conv1"] == 16 * 16 * 9 * 16 * 32 == 1_179_648
    assert found["stage2_block1_shortcut"] == 16 * 16 * 16 * 32 == 131_072
    assert found["stage3_block3_conv2"] == 8 * 8 * 9 * 64 * 64 == 2_359_296
    assert found["predictions"] == 640
    # conv1 + 16 full 3x3 convolutions + 2 that change the width + 2 shortcuts + dense
    assert sum(found.values()) == 442_368 + 16 * 2_359_296 + 2 * 1_179_648 + 2 * 131_072 + 640
    assert sum(found.values()) == 40_813_184


def test_resnet8_macs():
    found = {name: macs(layer) for name, layer in quantizable(resnet8()).items()}
    # conv1, 4 full 3x3 convolutions, 2 that change the width, 2 shortcuts, dense
    assert sum(found.values()) == 442_368 + 4 * 2_359_296 + 2 * 1_179_648 + 2 * 131_072 + 640
    assert sum(found.values()) == 12_501_632


def test_layer_names():
    expected = {"conv1", "predictions", "stage2_block1_shortcut", "stage3_block1_shortcut"}
    for stage in (1, 2, 3):
        for block in (1, 2, 3):
            expected |= {f"stage{stage}_block{block}_conv{i}" for i in (1, 2)}
    assert len(expected) == 22
    assert set(quantizable(resnet20())) == expected
    small = {name for name in expected if "block2" not in name and "block3" not in name}
    assert set(quantizable(resnet8())) == small
    assert len(small) == 10


def test_names_do_not_change_when_built_again():
    assert [x.name for x in resnet20().layers] == [x.name for x in resnet20().layers]


def test_width_scales_every_layer_but_the_classes():
    half = {name: x.kernel.shape for name, x in quantizable(resnet8(width=0.5)).items()}
    assert tuple(half["conv1"]) == (3, 3, 3, 8)
    assert tuple(half["stage2_block1_shortcut"]) == (1, 1, 8, 16)
    assert tuple(half["stage3_block1_conv2"]) == (3, 3, 32, 32)
    assert tuple(half["predictions"]) == (32, 10)
    assert tuple(quantizable(resnet8(width=2))["predictions"].kernel.shape) == (128, 10)


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (8, 8, 1), (9, 5, 2)])
def test_output_is_logits_of_the_classes(shape):
    model = resnet8(input_shape=shape, classes=7)
    images = np.random.default_rng(0).normal(size=(5, *shape)).astype("float32")
    logits = model(images).numpy()
    assert logits.shape == (5, 7)
    assert model.count_params() > 0
    # Softmax outputs would be in 0..1 and sum to 1.
    assert logits.min() < 0
    assert np.abs(logits.sum(-1) - 1).max() > 1e-3


def test_block_is_relu_of_sum_of_two_convolutions_and_shortcut():
    """A forward pass by hand through the first block of the second stage."""
    model = resnet8(input_shape=(8, 8, 1))
    # Otherwise normalization would be near the identity and a missing one not be seen.
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    inner = tf.keras.Model(
        model.input,
        [
            model.get_layer("stage1_block1_relu").output,
            model.get_layer("stage2_block1_relu").output,
        ],
    )
    x, out = inner(rng.normal(size=(2, 8, 8, 1)).astype("float32"))

    def conv_norm(x, name, strides):
        y = tf.nn.conv2d(x, model.get_layer(name).kernel, strides, "SAME")
        gamma, beta, mean, variance = model.get_layer(f"{name}_bn").get_weights()
        return (y - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    y = tf.nn.relu(conv_norm(x, "stage2_block1_conv1", 2))
    y = conv_norm(y, "stage2_block1_conv2", 1)
    expected = tf.nn.relu(y + conv_norm(x, "stage2_block1_shortcut", 2))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_it_learns():
    """A few steps on one batch bring the loss down: gradients reach the layers."""
    tf.keras.utils.set_random_seed(0)
    model = resnet8(input_shape=(8, 8, 1), classes=3, width=0.25)
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(32, 8, 8, 1)).astype("float32"), rng.integers(0, 3, 32)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.Adam(1e-2), loss)
    history = model.fit(images, labels, batch_size=32, epochs=15, verbose=0)
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]


def test_width_that_gives_no_whole_number_of_filters():
    with pytest.raises(ValueError) as error:
        resnet20(width=0.3)
    message = str(error.value)
    assert "width=0.3 gives 4.8 filters" in message
    assert "multiple of 1/16, such as 0.25 or 0.3125" in message


@pytest.mark.parametrize("width", [0, -1.0, "wide", None, float("nan"), float("inf"), True])
def test_width_that_is_no_positive_number(width):
    with pytest.raises(ValueError, match="width must be a number above 0"):
        resnet8(width=width)


def test_tiny_width_names_the_smallest_that_works():
    with pytest.raises(ValueError, match=r"such as 0\.0625\."):
        resnet8(width=0.01)


@pytest.mark.parametrize(
    "shape", [(32, 32), (None, 32, 32, 3), (32, 32, 0), (3, 32, 3), (None, None, 3), 32, (8.0, 8, 1)]
)
def test_wrong_input_shape(shape):
    with pytest.raises(ValueError, match=r"input_shape must be \(height, width, channels\)"):
        resnet8(input_shape=shape)


@pytest.mark.parametrize("classes", [1, 0, 2.5, "ten", True])
def test_wrong_classes(classes):
    with pytest.raises(ValueError, match="classes must be"):
        resnet8(classes=classes)


def test_get_builds_by_name():
    model = models.get("resnet20", input_shape=(28, 28, 1), classes=4, width=0.25)
    assert model.name == "resnet20"
    assert tuple(model.output.shape) == (None, 4)


def test_get_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"Unknown model 'resnet9'\. Known models: .*resnet8.*resnet20"):
        models.get("resnet9")
