"""Networks that Keras itself has: MobileNetV2, EfficientNet-B0..B4, InceptionV3; random weights, nothing is downloaded.

| | input | parameters | trainable | source |
|---|---|---|---|---|
| MobileNetV2 | 224 | 3,538,984 | 3,504,872 | arXiv 1801.04381 |
| EfficientNet-B0 | 224 | 5,330,571 | 5,288,548 | arXiv 1905.11946 |
| EfficientNet-B1 | 240 | 7,856,239 | 7,794,184 | |
| EfficientNet-B2 | 260 | 9,177,569 | 9,109,994 | |
| EfficientNet-B3 | 300 | 12,320,535 | 12,233,232 | |
| EfficientNet-B4 | 380 | 19,466,823 | 19,341,616 | |
| InceptionV3 | 299 | 23,851,784 | 23,817,352 | arXiv 1512.00567 |

All take larger and smaller images too, down to the sides that their builders name, and give **logits**. EfficientNets
divide their input by 255 themselves.
"""

import functools
import re

import tensorflow as tf

from models.arguments import check_count, check_input_shape, check_width


def mobilenet_v2(input_shape=(224, 224, 3), classes=1000, width=1.0):
    """MobileNetV2.

    Args:
      input_shape: (height, width, channels) of one image; sides of 32 or more.
      classes: Number of classes, the length of a row of logits.
      width: Multiplier of the filters, which are then rounded to multiples of 8 (the paper's alpha).

    Returns:
      A functional `tf.keras.Model`: float32 images [batch, *input_shape] -> logits [batch, classes].

    Raises:
      ValueError: For an `input_shape`, `classes` or `width` that cannot be built.
    """
    check_width(width)
    build = functools.partial(tf.keras.applications.MobileNetV2, alpha=float(width))
    return _application(build, 32, input_shape, classes)


def inception_v3(input_shape=(299, 299, 3), classes=1000):
    """InceptionV3 without its auxiliary classifier; sides of 75 or more. See `mobilenet_v2` for the rest.

    Layer names: `conv1` .. `conv94` and `bn1` .. `bn94` in the order of Keras' source, `mixed0` .., `predictions`.
    """
    model = _application(tf.keras.applications.InceptionV3, 75, input_shape, classes)
    # Keras numbers these layers through the whole process, so the names of a second network would be others.
    numbered = [
        layer.name for layer in model.layers if re.fullmatch(r"(conv2d|batch_normalization)(_\d+)?", layer.name)
    ]
    numbered.sort(key=lambda name: int("0" + re.sub(r"\D", "", name.removeprefix("conv2d"))))
    names, counts = {}, {"conv": 0, "bn": 0}
    for name in numbered:
        kind = "conv" if name.startswith("conv2d") else "bn"
        counts[kind] += 1
        names[name] = f"{kind}{counts[kind]}"

    def renamed(layer):
        config = layer.get_config()
        return type(layer).from_config({**config, "name": names.get(layer.name, layer.name)})

    return tf.keras.models.clone_model(model, clone_function=renamed)


def efficientnet_b0(input_shape=(224, 224, 3), classes=1000):
    """EfficientNet-B0; sides of 32 or more. See `mobilenet_v2` for the rest."""
    return _application(tf.keras.applications.EfficientNetB0, 32, input_shape, classes)


def efficientnet_b1(input_shape=(240, 240, 3), classes=1000):
    """EfficientNet-B1; as `efficientnet_b0`."""
    return _application(tf.keras.applications.EfficientNetB1, 32, input_shape, classes)


def efficientnet_b2(input_shape=(260, 260, 3), classes=1000):
    """EfficientNet-B2; as `efficientnet_b0`."""
    return _application(tf.keras.applications.EfficientNetB2, 32, input_shape, classes)


def efficientnet_b3(input_shape=(300, 300, 3), classes=1000):
    """EfficientNet-B3; as `efficientnet_b0`."""
    return _application(tf.keras.applications.EfficientNetB3, 32, input_shape, classes)


def efficientnet_b4(input_shape=(380, 380, 3), classes=1000):
    """EfficientNet-B4; as `efficientnet_b0`."""
    return _application(tf.keras.applications.EfficientNetB4, 32, input_shape, classes)


def _application(build, smallest_side, input_shape, classes):
    check_input_shape(input_shape, smallest_side, (224, 224, 3))
    check_count("classes", classes, 2)
    return build(weights=None, input_shape=tuple(input_shape), classes=classes, classifier_activation=None)
