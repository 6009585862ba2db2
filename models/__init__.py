"""Networks to search, by name.

`MODELS` is a plain dict from a name to a function that builds a `tf.keras` model;
`get` looks a name up and calls it.

    model = models.get("resnet8", input_shape=(8, 8, 1), classes=10)
"""

import inspect

from models.applications import (
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    inception_v3,
    mobilenet_v2,
)
from models.bert import bert
from models.imagenet_resnet import resnet18, resnet50
from models.resnet import resnet8, resnet20
from models.transformers import deit_base, deit_small, deit_tiny, gpt

MODELS = {
    builder.__name__: builder
    for builder in (
        bert,
        deit_tiny,
        deit_small,
        deit_base,
        efficientnet_b0,
        efficientnet_b1,
        efficientnet_b2,
        efficientnet_b3,
        efficientnet_b4,
        gpt,
        inception_v3,
        mobilenet_v2,
        resnet8,
        resnet18,
        resnet20,
        resnet50,
    )
}


def get(name, **arguments):
    """Builds the model called `name`.

    Args:
      name: One of `MODELS`.
      **arguments: Passed to the builder, e.g. `input_shape`, `classes`, `width`.

    Returns:
      A built, uncompiled functional `tf.keras.Model` that gives logits, with random weights.

    Raises:
      ImportError: The network needs a package that is not there; says which extra has it.
      ValueError: "Unknown model 'resnet9'. Known models: ..."; an argument that the builder does not have ("Model
        'inception_v3' takes no argument 'width'. It takes: input_shape, classes."); or a value that it refuses.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}. Known models: {', '.join(MODELS)}.")
    known = inspect.signature(MODELS[name]).parameters
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"Model {name!r} takes no argument {argument!r}. It takes: {', '.join(known)}.")
    return MODELS[name](**arguments)


__all__ = ["MODELS", "get", *MODELS]
