"""Residual networks for large images: ResNet-18 and ResNet-50.

A 7x7 convolution of stride 2, max pooling, four stages with 64, 128, 256 and 512 filters (times `width`), the last
three entered with stride 2, global average pooling and one dense layer. A block of ResNet-18 is two 3x3 convolutions;
one of ResNet-50 is 1x1, 3x3, 1x1 with four times the filters at its end, and the stride is on the 3x3 ("v1.5"). The
first block of every stage has a projection shortcut, a 1x1 convolution with batch normalization: that of ResNet-18's
first stage too, which other versions of that network do without.

Made for 224x224 images, any side of 32 or more will do. The models give **logits**.

| | quantizable layers | parameters, 1000 classes | MACs at 224x224 |
|---|---|---|---|
| ResNet-18 | 22 | 11,693,736 | 1,826,918,400 |
| ResNet-50 | 54 | 25,557,032 | 4,089,184,256 |

(Parameters without the moving averages of batch normalization.)

Sources: He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. arXiv 1512.03385. The stride on the 3x3:
Goyal et al. Accurate, Large Minibatch SGD. arXiv 1706.02677, section 5.1.
"""

import tensorflow as tf

from models.arguments import check_count, check_input_shape, scaled
from models.resnet import conv_norm

BASE_FILTERS = (64, 128, 256, 512)
# Five halvings: below 32x32 the last stage would see nothing but padding.
SMALLEST_SIDE = 32


def resnet18(input_shape=(224, 224, 3), classes=1000, width=1.0):
    """ResNet-18: two blocks of two 3x3 convolutions per stage.

    Args:
      input_shape: (height, width, channels) of one image; sides of 32 or more.
      classes: Number of classes, the length of a row of logits.
      width: Multiplier of the filters of every layer. Multiples of 1/64 give whole numbers of filters.

    Returns:
      A functional `tf.keras.Model`: float32 images [batch, *input_shape] -> logits [batch, classes]. Layer names:
      `conv1`, `stage1_block1_conv1`, `stage1_block1_conv2`, `stage1_block1_shortcut`, ..., `predictions`.

    Raises:
      ValueError: For an `input_shape`, `classes` or `width` that cannot be built.
    """
    return _resnet("resnet18", (2, 2, 2, 2), _basic, input_shape, classes, width)


def resnet50(input_shape=(224, 224, 3), classes=1000, width=1.0):
    """ResNet-50: 3, 4, 6 and 3 bottleneck blocks; arguments and errors as for `resnet18`."""
    return _resnet("resnet50", (3, 4, 6, 3), _bottleneck, input_shape, classes, width)


def _resnet(name, blocks, block, input_shape, classes, width):
    check_input_shape(input_shape, SMALLEST_SIDE, (224, 224, 3))
    check_count("classes", classes, 2)
    filters = scaled(BASE_FILTERS, width, "filters in the first stage")
    layers = tf.keras.layers

    image = layers.Input(input_shape, name="image")
    x = conv_norm(image, filters[0], 7, 2, "conv1")
    x = layers.ReLU(name="conv1_relu")(x)
    x = layers.MaxPooling2D(3, 2, padding="same", name="conv1_pool")(x)
    for stage, (stage_filters, stage_blocks) in enumerate(zip(filters, blocks), start=1):
        for number in range(1, stage_blocks + 1):
            strides = 2 if stage > 1 and number == 1 else 1
            name_of_block = f"stage{stage}_block{number}"
            y = block(x, stage_filters, strides, name_of_block)
            if number == 1:
                x = conv_norm(x, y.shape[-1], 1, strides, f"{name_of_block}_shortcut")
            x = layers.Add(name=f"{name_of_block}_add")([x, y])
            x = layers.ReLU(name=f"{name_of_block}_relu")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    logits = layers.Dense(classes, name="predictions")(x)
    return tf.keras.Model(image, logits, name=name)


def _basic(x, filters, strides, name):
    x = conv_norm(x, filters, 3, strides, f"{name}_conv1")
    x = tf.keras.layers.ReLU(name=f"{name}_conv1_relu")(x)
    return conv_norm(x, filters, 3, 1, f"{name}_conv2")


def _bottleneck(x, filters, strides, name):
    x = conv_norm(x, filters, 1, 1, f"{name}_conv1")
    x = tf.keras.layers.ReLU(name=f"{name}_conv1_relu")(x)
    x = conv_norm(x, filters, 3, strides, f"{name}_conv2")
    x = tf.keras.layers.ReLU(name=f"{name}_conv2_relu")(x)
    return conv_norm(x, 4 * filters, 1, 1, f"{name}_conv3")
