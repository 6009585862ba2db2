"""Residual networks for small images: ResNet-8 and ResNet-20.

The CIFAR networks of He et al. (2015), section 4.2: a 3x3 convolution, three stages of
residual blocks with 16, 32 and 64 filters (times `width`), the second and third stage
entered with stride 2, global average pooling and one dense layer. A stage has three blocks
in ResNet-20 and one in ResNet-8. Where a block changes the shape, its shortcut is a 1x1
convolution with batch normalization (option B of the paper).

Quantizable layers: 22 in ResNet-20 (19 3x3 convolutions, 2 shortcuts, 1 dense), 10 in
ResNet-8 (7, 2, 1).

The models give **logits**: train them with a loss that has `from_logits=True`. They hold no
L2 penalty; the optimizers' `weight_decay` argument is the place for it.

Source: He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. arXiv 1512.03385.
"""

import tensorflow as tf

from models.arguments import check_count, check_input_shape, scaled

BASE_FILTERS = (16, 32, 64)
# Two stages halve the image; below 4x4 the last stage would see nothing but padding.
SMALLEST_SIDE = 4


def resnet8(input_shape=(32, 32, 3), classes=10, width=1.0):
    """ResNet-8: one block per stage. 78,042 parameters at 32x32x3 and width 1.

    See `resnet20` for the arguments, the result and the errors.
    """
    return _resnet("resnet8", 1, input_shape, classes, width)


def resnet20(input_shape=(32, 32, 3), classes=10, width=1.0):
    """ResNet-20: three blocks per stage. 272,474 trainable parameters at 32x32x3 and width 1.

    Args:
      input_shape: (height, width, channels) of one image; sides of 4 or more.
      classes: number of classes, the length of a row of logits.
      width: multiplier of the filters of every layer. Multiples of 1/16 give whole
        numbers of filters.

    Returns:
      A functional `tf.keras.Model`: float32 images [batch, *input_shape] -> logits
      [batch, classes]. Layer names: `conv1`, `stage1_block1_conv1`, `stage1_block1_conv2`,
      `stage2_block1_shortcut`, ..., `predictions`.

    Raises:
      ValueError: for an `input_shape`, `classes` or `width` that cannot be built, e.g.
        "width=0.3 gives 4.8 filters in the first stage ... Take a multiple of 1/16 ...".
    """
    return _resnet("resnet20", 3, input_shape, classes, width)


def _resnet(name, blocks_per_stage, input_shape, classes, width):
    check_input_shape(input_shape, SMALLEST_SIDE, (32, 32, 3))
    check_count("classes", classes, 2)
    filters = scaled(BASE_FILTERS, width, "filters in the first stage")
    layers = tf.keras.layers

    image = layers.Input(input_shape, name="image")
    x = conv_norm(image, filters[0], 3, 1, "conv1")
    x = layers.ReLU(name="conv1_relu")(x)
    for stage, stage_filters in enumerate(filters, start=1):
        for block in range(1, blocks_per_stage + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = _block(x, stage_filters, strides, f"stage{stage}_block{block}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    logits = layers.Dense(classes, kernel_initializer="he_normal", name="predictions")(x)
    return tf.keras.Model(image, logits, name=name)


def _block(x, filters, strides, name):
    """relu(conv2(relu(conv1(x))) + shortcut(x))."""
    layers = tf.keras.layers
    y = conv_norm(x, filters, 3, strides, f"{name}_conv1")
    y = layers.ReLU(name=f"{name}_conv1_relu")(y)
    y = conv_norm(y, filters, 3, 1, f"{name}_conv2")
    # The filters change exactly where the stride does, so the stride alone decides.
    if strides != 1:
        x = conv_norm(x, filters, 1, strides, f"{name}_shortcut")
    x = layers.Add(name=f"{name}_add")([x, y])
    return layers.ReLU(name=f"{name}_relu")(x)


def conv_norm(x, filters, kernel_size, strides, name):
    """A convolution without bias, and batch normalization."""
    layers = tf.keras.layers
    x = layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)
    # Keras's own momentum, 0.99, needs many hundred steps to forget its start; short runs
    # would be evaluated with averages that are still far off. These are the usual values
    # for CIFAR ResNets.
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)
