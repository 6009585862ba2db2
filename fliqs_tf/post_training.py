"""Formats for a trained network without training: readings alone, minutes on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from fliqs_tf import costs
from fliqs_tf._keras import keras
from fliqs_tf.costs.profile import Profile
from fliqs_tf.io import batches
from fliqs_tf.numerics.space import Space
from fliqs_tf.search import averages, compile_config, deciding, integer_program, reading
from fliqs_tf.search.controller import READINGS
from fliqs_tf.search.model import SearchModel
from fliqs_tf.wrapping import wrap

_LOG = logging.getLogger("fliqs_tf")
METHODS = ("critic", "sensitivities")


def post_training_search(
    model: keras.Model,
    space: Space | str | Iterable[str] | None = None,
    data: tf.data.Dataset | Iterable[Any] | None = None,
    target_cost: float | str | None = None,
    *,
    loss: Any = None,
    quality: Any = "loss",
    cost: costs.Cost | Profile | str | None = None,
    method: str = "critic",
    readings: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    verbose: bool = True,
    **wrap_options: Any,
) -> SearchModel:
    """Decides the formats of a trained network from readings alone: no weight changes.

        qmodel = fliqs_tf.post_training_search(model, "FLIQS-L-INT", (x, y), "0.5x INT8", loss="mse")
        qmodel.deploy()                     # the network in these formats
        qmodel.recipe("0.3x INT8")          # for another budget, at once
        qmodel.fit(...)                     # train it in these formats

    The critic of the search reads samples of formats on batches of data, closer and closer to the target, until a
    better choice could gain next to nothing, or for so many `readings`. Ranges of activations are set from the data
    first, and moving averages of batch normalization are estimated for the formats at the end.

    Args:
      model: A trained Keras model. It stays as it is.
      space: See `wrap`.
      data: Labelled examples, best such that the weights have never seen: some hundreds or thousands. In any form that
        `quality_data` of `SearchModel.fit` has.
      target_cost: The most that the network may cost, see `SearchModel.compile`.
      loss: As for `compile` of Keras. None: what the model is compiled with.
      quality: See `SearchModel.compile`.
      cost: See `SearchModel.compile`.
      method: "critic", or "sensitivities": the classical form, in which the effect of each format of each layer is
        measured with all others in their widest, and the choice is an integer program (needs SciPy).
      readings: At most so many, each of 4 samples on one batch. None: 300 (our choice).
      batch_size: Examples per reading, of arrays.
      seed: Of the draws.
      verbose: Show progress, with the time left at most.
      **wrap_options: rules, profile, target, granularity, tensors and so on, see `wrap`.

    Returns:
      A `SearchModel` whose formats are decided. Its `fit` trains with them; it needs a `compile` with your optimizer.

    Raises:
      ValueError: No data, no target or no loss; data without labels; a target out of reach; what `wrap` refuses.
    """
    if data is None or target_cost is None:
        raise ValueError("post_training_search needs labelled examples, data=(x, y), and target_cost='0.5x INT8'.")
    loss = loss if loss is not None else getattr(model, "loss", None)
    if loss is None:
        raise ValueError(f"Model {model.name!r} is not compiled with a loss: give post_training_search(loss=...).")
    searched = wrap(model, space, **wrap_options)
    searched.compile(
        optimizer="sgd", loss=loss, target_cost=target_cost, cost=cost, quality=quality, seed=seed, pretrained=True
    )
    decide_formats(searched, data, method=method, readings=readings, batch_size=batch_size, verbose=verbose)
    return searched


def decide_formats(
    searched: SearchModel,
    data: tf.data.Dataset | Iterable[Any],
    *,
    calibration_data: tf.data.Dataset | Iterable[Any] | None = None,
    method: str = "critic",
    readings: int | None = None,
    batch_size: int = 64,
    verbose: bool = True,
) -> int:
    """Decides the formats of a search model that is compiled, from readings alone.

    Args:
      searched: What `wrap` gave, of a trained network, after `compile`.
      data, method, readings, batch_size, verbose: See `post_training_search`.
      calibration_data: Examples from which batch normalization is re-estimated for the formats. None: data.

    Returns:
      The number of readings.

    Raises:
      ValueError: Data without labels, or of another shape than the network takes; an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be 'critic' or 'sensitivities', got {method!r}.")
    if searched.controller.estimator != "critic" or not searched.reads_training_data:
        raise ValueError(
            "Formats are decided from readings by the critic: compile with neither estimator='reinforce' nor "
            "train_with='sample'."
        )
    readings = None if readings is None else compile_config.whole("readings", readings, 1)
    batch_size = compile_config.whole("batch_size", batch_size, 1)
    source = batches.read(data, searched.network, "data")
    if source.has_labels is False:
        raise ValueError("data has no labels: give a tuple (x, y) of arrays, or batches (x, y).")
    searched.configure_controller(total_steps=1, held_out=True)
    reader = reading.Reader(searched, source, batch_size)
    if not reader.is_trained():
        _LOG.warning(
            "Model %r does not seem to be trained: its quality is no better with the labels of the examples than with "
            "those of other examples. Formats that are chosen now say nothing of the trained network.",
            searched.name,
        )
    if method == "sensitivities":
        effects = reader.sensitivities(readings or READINGS, verbose)
        target = searched.target_cost
        assert target is not None  # configure_controller has looked
        sample = integer_program.solve(effects, searched.controller.mask, searched.cost_table, target)
        deciding.decide_on(searched, sample)
    else:
        reader.decide_before_training(most=readings or READINGS, verbose=verbose)
    count = searched.controller.readings()
    if readings is None and count >= READINGS and method == "critic":
        _LOG.info("Not sure after %d readings: more (readings=...) or larger batches may find better formats.", count)
    calibration = source if calibration_data is None else calibration_data
    averages.recalibrate(searched, calibration)
    searched.__dict__["_training_source"] = calibration
    return count
