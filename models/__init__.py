"""Networks to search, by name.

`MODELS` is a plain dict from a name to a function that builds a `tf.keras` model;
`get` looks a name up and calls it.

    model = models.get("resnet8", input_shape=(8, 8, 1), classes=10)
"""

from models.resnet import resnet8, resnet20

MODELS = {
    "resnet8": resnet8,
    "resnet20": resnet20,
}


def get(name, **arguments):
    """Builds the model called `name`.

    Args:
      name: one of `MODELS`.
      **arguments: passed to the builder, e.g. `input_shape`, `classes`, `width`.

    Returns:
      A built, uncompiled functional `tf.keras.Model` that gives logits.

    Raises:
      ValueError: "Unknown model 'resnet9'. Known models: resnet20, resnet8."
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}. Known models: {', '.join(sorted(MODELS))}.")
    return MODELS[name](**arguments)


__all__ = ["MODELS", "get", "resnet8", "resnet20"]
