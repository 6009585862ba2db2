"""A search model to a plain Keras model with fixed formats."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from fliqs_tf._keras import keras
from fliqs_tf.costs import counting
from fliqs_tf.export import tflite_writer
from fliqs_tf.io import batches
from fliqs_tf.layers import batch_norm, ranges, shared_ranges
from fliqs_tf.quantize import copying
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.search import averages

_LOG = logging.getLogger("fliqs_tf")


def deployed(
    model: keras.Model, own: Recipe, recipe: Recipe, calibration_data: Iterable[Any] | batches.Source | None
) -> keras.Model:
    """See `SearchModel.deploy`.

    Args:
      model: The search model.
      own: Its own recipe, whose formats its averages belong to.
      recipe: The recipe to follow.
      calibration_data: Examples, see `averages.estimate`; None if there are none.

    Raises:
      ValueError: The recipe is not one for this model.
    """
    recipe.check(own.formats, model.name)
    if recipe.tensors != own.tensors or (recipe.layers and recipe.layers != own.layers):
        raise ValueError(
            f"The recipe decides on other tensors than model {model.name!r}: tensors={recipe.tensors!r}, layers "
            f"{dict(recipe.layers)}; the model has tensors={own.tensors!r}, layers {dict(own.layers)}."
        )
    formats = counting.formats_of(model.sites, recipe)
    for decision in model.decisions:
        if formats[decision.name] not in decision.options:
            _LOG.info("%s: %s was not among the formats of the search.", decision.name, formats[decision.name])
    fixed = copying.fixed(model.graph, formats)
    used = averages.estimate(fixed, calibration_data)
    is_other = dict(recipe.formats) != dict(own.formats)
    if is_other and not used and batch_norm.batch_norms(fixed):
        _LOG.warning("The moving averages of batch normalization belong to other formats: give calibration_data.")
    if shared_ranges.has_boundary_quantizers(fixed) and not ranges.unseen(fixed):
        return tflite_writer.as_shipped(fixed).model
    return fixed.model
