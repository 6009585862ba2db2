"""Transformers of plain Keras layers: DeiT for images, GPT for text. They run under both Kerases.

A block is x + attention(norm(x)), then x + mlp(norm(x)); attention is `keras.layers.MultiHeadAttention`, whose query,
key, value and output projections are four quantizable layers. The models give **logits**.

| | parameters, 1000 classes | MACs at 224x224 | quantizable layers |
|---|---|---|---|
| DeiT-Ti | 5,717,416 | 1,074,851,328 | 74 |
| DeiT-S | 22,050,664 | 4,241,218,560 | 74 |
| DeiT-B | 86,567,656 | 16,848,500,736 | 74 |

Sources: Touvron et al. Training data-efficient image transformers. arXiv 2012.12877 (the networks of Dosovitskiy et
al., arXiv 2010.11929). Radford et al. Language models are unsupervised multitask learners (GPT-2).
"""

import tensorflow as tf

from models.arguments import check_count, check_input_shape, check_sequence_shape, scaled
from models.tokens import ClassToken, Positions

PATCH = 16
HEAD_WIDTH = 64


def deit_tiny(input_shape=(224, 224, 3), classes=1000, width=1.0, depth=12):
    """DeiT-Ti: 3 heads; see `deit_small`."""
    return _deit("deit_tiny", 3, input_shape, classes, width, depth)


def deit_small(input_shape=(224, 224, 3), classes=1000, width=1.0, depth=12):
    """DeiT-S: patches of 16x16, a class token, 12 blocks of 6 heads of width 64. No distillation token.

    Args:
      input_shape: (height, width, channels) of one image; sides that are multiples of 16.
      classes: Number of classes, the length of a row of logits.
      width: Multiplier of the number of heads and of all widths. Multiples of 1/6 (1/3 for `deit_tiny`, 1/12 for
        `deit_base`) give whole numbers of heads.
      depth: Number of blocks.

    Returns:
      A functional `tf.keras.Model`: float32 images [batch, *input_shape] -> logits [batch, classes]. Layer names:
      `patches`, `block1_attention`, `block1_mlp1`, `block1_mlp2`, ..., `predictions`.

    Raises:
      ValueError: For an `input_shape`, `classes`, `width` or `depth` that cannot be built.
    """
    return _deit("deit_small", 6, input_shape, classes, width, depth)


def deit_base(input_shape=(224, 224, 3), classes=1000, width=1.0, depth=12):
    """DeiT-B: 12 heads; see `deit_small`."""
    return _deit("deit_base", 12, input_shape, classes, width, depth)


def _deit(name, base_heads, input_shape, classes, width, depth):
    check_input_shape(input_shape, PATCH, (224, 224, 3))
    if any(side % PATCH for side in input_shape[:2]):
        raise ValueError(
            f"input_shape must have a height and a width that are multiples of {PATCH}, the side of a patch "
            f"(got {tuple(input_shape)})."
        )
    check_count("classes", classes, 2)
    check_count("depth", depth, 1)
    (heads,) = scaled((base_heads,), width, "heads")
    units = heads * HEAD_WIDTH
    layers = tf.keras.layers

    image = layers.Input(input_shape, name="image")
    x = layers.Conv2D(units, PATCH, strides=PATCH, name="patches")(image)
    patches = (input_shape[0] // PATCH) * (input_shape[1] // PATCH)
    x = layers.Reshape((patches, units), name="sequence")(x)
    x = ClassToken(name="class_token")(x)
    x = Positions(name="positions")(x)
    for block in range(1, depth + 1):
        x = _block(x, heads, HEAD_WIDTH, f"block{block}", causal=False)
    x = layers.LayerNormalization(epsilon=1e-6, name="norm")(x)
    x = layers.Cropping1D((0, patches), name="first")(x)
    x = layers.Flatten(name="flatten")(x)
    logits = layers.Dense(classes, kernel_initializer=_normal(), name="predictions")(x)
    return tf.keras.Model(image, logits, name=name)


def gpt(input_shape=(128,), classes=256, width=1.0, depth=4):
    """A small GPT: what comes next, at every position of a sequence.

    Args:
      input_shape: (context,): the number of tokens of an example.
      classes: Size of the vocabulary.
      width: Multiplier of the width 128 (4 heads of 32); multiples of 1/4 give whole numbers of heads.
      depth: Number of blocks.

    Returns:
      A functional `tf.keras.Model`: int32 tokens [batch, context] -> logits [batch, context, classes]; the logits at a
      position depend on the tokens up to it. Layer names: `tokens`, `block1_attention`, ..., `predictions`. With the
      defaults 875,264 parameters.

    Raises:
      ValueError: For an `input_shape`, `classes`, `width` or `depth` that cannot be built.
    """
    check_sequence_shape(input_shape)
    check_count("classes", classes, 2)
    check_count("depth", depth, 1)
    (heads,) = scaled((4,), width, "heads")
    layers = tf.keras.layers

    tokens = layers.Input(tuple(input_shape), dtype="int32", name="text")
    x = layers.Embedding(classes, 32 * heads, embeddings_initializer=_normal(), name="tokens")(tokens)
    x = Positions(name="positions")(x)
    for block in range(1, depth + 1):
        x = _block(x, heads, 32, f"block{block}", causal=True)
    x = layers.LayerNormalization(epsilon=1e-6, name="norm")(x)
    logits = layers.Dense(classes, use_bias=False, kernel_initializer=_normal(), name="predictions")(x)
    return tf.keras.Model(tokens, logits, name="gpt")


def _block(x, heads, head_width, name, causal):
    layers = tf.keras.layers
    units = heads * head_width
    y = layers.LayerNormalization(epsilon=1e-6, name=f"{name}_norm1")(x)
    attention = layers.MultiHeadAttention(heads, head_width, kernel_initializer=_normal(), name=f"{name}_attention")
    y = attention(y, y, use_causal_mask=causal)
    x = layers.Add(name=f"{name}_add1")([x, y])
    y = layers.LayerNormalization(epsilon=1e-6, name=f"{name}_norm2")(x)
    y = layers.Dense(4 * units, activation="gelu", kernel_initializer=_normal(), name=f"{name}_mlp1")(y)
    y = layers.Dense(units, kernel_initializer=_normal(), name=f"{name}_mlp2")(y)
    return layers.Add(name=f"{name}_add2")([x, y])


def _normal():
    # A new one for each layer: layers that share one object start with the same numbers.
    return tf.keras.initializers.TruncatedNormal(stddev=0.02)
