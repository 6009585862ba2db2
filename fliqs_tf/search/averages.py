"""Moving averages of batch normalization, estimated anew for the formats that a network has."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.io import batches
from fliqs_tf.layers import batch_norm

_LOG = logging.getLogger("fliqs_tf")
# Batches from which moving averages are estimated: 32 batches of 64 give their means to about 2 % of a deviation.
ESTIMATION_BATCHES = 32
# Share of old averages in new ones that no longer matters: 459 steps at Keras' momentum of 0.99.
_LEFT = 0.01
# Examples per batch where nothing says how many: Keras' default.
BATCH_SIZE = 32


def are_behind(model: keras.Model) -> bool:
    """Whether the moving averages of a search model may belong to other formats than it has.

    They do not where they were estimated for these formats, and training has kept them since; or where training had the
    steps to follow: what is left of the averages before the decision is below `_LEFT`.
    """
    layers = batch_norm.batch_norms(model.graph)
    if not layers or model.__dict__.get("_averages_of") == _formats(model):
        return False
    decided = model.__dict__.get("_decided_step", model.controller.decided_at())
    steps = int(tf.convert_to_tensor(model.controller.step)) - decided
    return max(layer.momentum for layer in layers) ** max(steps, 0) > _LEFT


def _formats(model: keras.Model) -> tuple[int, ...]:
    return tuple(np.array(model.controller.most_likely()).tolist())


def recalibrate(model: keras.Model, data: Iterable[Any] | batches.Source | None) -> None:
    """Estimates the moving averages of a search model for its formats; a warning where there is nothing to do it from.

    Args:
      model: The search model.
      data: Examples or their `batches.Source`, or None.
    """
    if not estimate(model.graph, data) and batch_norm.batch_norms(model.graph):
        _LOG.warning(
            "The moving averages of batch normalization stay as training left them, those of the formats that it "
            "computed with: there is no batch to estimate them anew from (a generator is read once). Give "
            "calibration_data, a data set or arrays."
        )
    model.__dict__["_averages_of"] = _formats(model)


def estimate(graph: ModelGraph, data: Iterable[Any] | batches.Source | None) -> int:
    """Estimates the moving averages of a network from a few batches.

    Args:
      graph: Of a network whose formats are set.
      data: Examples or their `batches.Source`, or None.

    Returns:
      The number of batches that were used.
    """
    if data is None or not batch_norm.batch_norms(graph):
        return 0
    source = data if isinstance(data, batches.Source) else batches.read(data, graph.model, "calibration_data")
    size = source.batch_size or BATCH_SIZE
    inputs = (batch.x for batch in source.some(ESTIMATION_BATCHES, size))
    return batch_norm.recalibrate(graph, inputs, shared=source.is_distributed)
