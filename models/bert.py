"""A BERT-style classifier of text, built from keras_hub's encoder: Keras 3 only, and an extra (`.[hub]`)."""

import tensorflow as tf

from fliqs_tf._keras import IS_KERAS_3, NAME
from models.arguments import check_count, check_sequence_shape, scaled

HEAD_WIDTH = 64


def bert(input_shape=(128,), classes=2, width=1.0, depth=4, vocabulary=30522):
    """BERT-Small: 4 blocks of 8 heads, width 512, and a dense layer on the pooled output.

    `width=1.5, depth=12` is BERT-base.

    Args:
      input_shape: (length,): the number of tokens of an example.
      classes: Number of classes, the length of a row of logits.
      width: Multiplier of the width 512 (8 heads of 64); multiples of 1/8 give whole numbers of heads.
      depth: Number of blocks.
      vocabulary: Number of different tokens.

    Returns:
      A functional `tf.keras.Model`: {"token_ids", "segment_ids", "padding_mask"}, each int32 [batch, length], -> logits
      [batch, classes]. Random weights.

    Raises:
      ImportError: keras_hub is not installed, or tf.keras is tf_keras.
      ValueError: For an argument that cannot be built.

    Source: Devlin et al., arXiv 1810.04805; the size "Small": Turc et al., arXiv 1908.08962.
    """
    check_sequence_shape(input_shape)
    check_count("classes", classes, 2)
    check_count("depth", depth, 1)
    check_count("vocabulary", vocabulary, 2)
    (heads,) = scaled((8,), width, "heads")
    if not IS_KERAS_3:
        raise ImportError(
            f"The model 'bert' is built from keras_hub, which needs Keras 3; tf.keras is {NAME} here. Unset "
            f"TF_USE_LEGACY_KERAS before Python starts."
        )
    try:
        # Here and not above: it is an extra, and it takes seconds.
        import keras_hub
    except ImportError as error:
        raise ImportError(
            f"The model 'bert' is built from keras_hub, which cannot be imported ({error}). "
            f"Run `pip install -e '.[hub]'`."
        ) from error
    layers = tf.keras.layers
    names = ("token_ids", "segment_ids", "padding_mask")
    tokens = {name: layers.Input(tuple(input_shape), dtype="int32", name=name) for name in names}
    encoder = keras_hub.models.BertBackbone(
        vocabulary_size=vocabulary,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=HEAD_WIDTH * heads,
        intermediate_dim=4 * HEAD_WIDTH * heads,
        max_sequence_length=input_shape[0],
        name="encoder",
    )
    logits = layers.Dense(classes, name="predictions")(encoder(tokens)["pooled_output"])
    return tf.keras.Model(tokens, logits, name="bert")
