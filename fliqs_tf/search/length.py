"""How many steps a search has, and where it begins."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.search import averages

_LOG = logging.getLogger("fliqs_tf")


def restart_if_compiled_anew(model: keras.Model, arguments: Mapping[str, Any]) -> None:
    """Begins a new search, if the formats were decided for something else than what is compiled now."""
    controller, target = model.controller, model.target_cost
    if not bool(tf.convert_to_tensor(controller.decided)):
        return
    decided_for = float(tf.convert_to_tensor(controller.target))
    # What a file does not say, of a search that was loaded, counts as unchanged.
    same = model.__dict__.get("_decided_for") in (None, model._compiled_for.decides_on)
    if same and math.isclose(target, decided_for, rel_tol=1e-6):
        return
    if arguments.get("initial_epoch"):
        _LOG.warning(
            "The formats were decided for another target (%.6g), cost or reward than what is compiled now (%.6g %s). "
            "As this fit goes on with a run (initial_epoch) they stay. For a new search fit without initial_epoch.",
            decided_for,
            target,
            model.cost.unit,
        )
        return
    _LOG.warning(
        "The formats were decided for another target (%.6g), cost or reward than what is compiled now (%.6g %s): this "
        "fit is a new search, with the weights as they are. To train weights for the formats as they were decided, "
        "compile what they were decided for, or fit deploy().",
        decided_for,
        target,
        model.cost.unit,
    )
    model.restart()


def total_steps(model: keras.Model, arguments: Mapping[str, Any], start: int) -> int:
    """Training steps of the search that `fit` begins or goes on with, all of them.

    Args:
      model: The search model, compiled.
      arguments: {name: value} of Keras' `fit`.
      start: Steps that are done.

    Raises:
      ValueError: The length of the training data is not known.
    """
    if model._compiled_for.search_steps:
        return model._compiled_for.search_steps
    known = int(tf.convert_to_tensor(model.controller.total_steps))
    first_epoch = arguments.get("initial_epoch") or 0
    if start and start >= known > 0 and not first_epoch:
        _LOG.info("The search ended at step %d: this fit trains the weights, the formats stay.", known)
        return known
    per_epoch = _steps_per_epoch(arguments)
    if per_epoch is None:
        raise ValueError(
            "The length of the training data is not known, so neither is that of the search. Give fit steps_per_epoch, "
            "or compile search_steps."
        )
    epochs = arguments.get("epochs", 1)
    return per_epoch * epochs if first_epoch or not start else start + per_epoch * epochs


def _steps_per_epoch(arguments: Mapping[str, Any]) -> int | None:
    if arguments.get("steps_per_epoch"):
        return int(arguments["steps_per_epoch"])
    x = arguments["x"]
    if isinstance(x, tf.data.Dataset):
        size = int(x.cardinality())
        return size if size >= 0 else None
    arrays = [a for a in tf.nest.flatten(x) if hasattr(a, "shape")]
    if arrays:
        examples = arrays[0].shape[0] * (1 - (arguments.get("validation_split") or 0))
        return math.ceil(int(examples) / (arguments.get("batch_size") or averages.BATCH_SIZE))
    return len(x) if hasattr(x, "__len__") else None
