"""What `fit` does around Keras' training loop."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import IS_KERAS_3, build_optimizer, keras
from fliqs_tf.io import batches
from fliqs_tf.search import averages, length, loop, reading

_LOG = logging.getLogger("fliqs_tf")


def fit(
    model: keras.Model,
    keras_fit: Callable[..., keras.callbacks.History],
    x: Any,
    y: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    quality_data: Iterable[Any] | None,
    calibration_data: Iterable[Any] | None,
) -> keras.callbacks.History:
    """See `SearchModel.fit`."""
    arguments = inspect.signature(keras_fit).bind(x, y, *args, **kwargs).arguments
    if isinstance(x, tf.data.Dataset):
        arguments.setdefault("shuffle", False)  # Keras 3 warns that a data set does not follow its default
    training = _training_source(model.network, arguments)
    calibration = training
    if calibration_data is not None:
        calibration = batches.read(calibration_data, model.network, "calibration_data")
    readings = None
    if quality_data is not None:
        readings = batches.read(quality_data, model.network, "quality_data")
        _check_labels(readings, model)
    elif model.reads_training_data and training is not None and training.has_labels is not False:
        readings = training
    length.restart_if_compiled_anew(model, arguments)
    if quality_data is not None and bool(tf.convert_to_tensor(model.controller.decided)):
        _LOG.warning("quality_data is not read: the formats are decided, and this fit trains the weights for them.")
    if readings is not None and arguments.get("class_weight"):
        _LOG.warning(
            "class_weight does not count where quality is read: give quality_data whose batches have weights, (x, y, "
            "sample_weight)."
        )
    model.bad_step.assign(-1)
    start = int(tf.convert_to_tensor(model.controller.step))
    total = length.total_steps(model, arguments, start)
    model.configure_controller(total, held_out=readings is not None)
    _create_variables(model, arguments)
    size = int(arguments.get("batch_size") or _size_of_batches(x) or averages.BATCH_SIZE)
    reader = None if readings is None else reading.Reader(model, readings, size)
    search_loop = loop.SearchLoop(model, reader)
    arguments["callbacks"] = [search_loop, *_as_list(arguments.get("callbacks"))]
    model.__dict__["_training_source"] = training
    model._is_fitting = True
    try:
        history = keras_fit(**arguments)
    finally:
        model._is_fitting = False
    search_loop.keep_decision()
    step = int(tf.convert_to_tensor(model.controller.step))
    if step < total and not model.stop_training and model._compiled_for.search_steps is None:
        _LOG.warning(
            "The training data ended at step %d of %d: the search ends there. For one that goes on in another fit "
            "compile search_steps.",
            step,
            total,
        )
        model.stop_training = True
    if model.stop_training:
        search_loop.decide()  # the search has ended early
    model.use_sample()
    if model.stop_training or step >= total:
        # A run that goes on keeps the averages that training has left.
        if calibration_data is not None or averages.are_behind(model):
            averages.recalibrate(model, calibration)
    elif calibration_data is not None:
        _LOG.warning("calibration_data is not used yet: the search goes on at step %d of %d.", step, total)
    return history


def _training_source(network: keras.Model, arguments: Mapping[str, Any]) -> batches.Source | None:
    """The training data of `fit` without those at the end that Keras keeps for validation; None for a generator, which
    training uses up, and for what only Keras understands."""
    x = arguments["x"]
    if isinstance(x, Iterator):
        return None
    labels = [arguments[name] for name in ("y", "sample_weight") if arguments.get(name) is not None]
    try:
        source = batches.read((x, *labels) if arguments.get("y") is not None else x, network, "x")
    except (TypeError, ValueError):
        return None  # Keras says what is wrong with it
    if source.arrays is None:
        return source
    training = 1 - (arguments.get("validation_split") or 0)
    size = int(arguments.get("batch_size") or averages.BATCH_SIZE)
    return source.first(int(batches.example_count(source.arrays) * training), batch_size=size)


def _create_variables(model: keras.Model, arguments: Mapping[str, Any]) -> None:
    """Creates the variables of optimizer and metrics, which tf_keras would create in the first training step: a step
    that creates variables is traced twice, and tracing a large network takes seconds. (Keras 3 does it by itself.)

    Nothing is computed: losses and metrics of the user may take nothing but real data.
    """
    if IS_KERAS_3:
        return
    with model.distribute_strategy.scope():
        build_optimizer(model.optimizer, model.trainable_variables)
        y_pred = model.network._nested_outputs
        try:
            if not model.compiled_loss.built:
                model.compiled_loss.build(y_pred)
            if not model.compiled_metrics.built:
                labels = model.compiled_metrics._conform_to_outputs(y_pred, _labels(arguments))
                model.compiled_metrics.build(y_pred, labels)
        except Exception as error:  # whatever it is, the step will say it, or create them
            _LOG.debug("Metrics are created in the first step, which is traced twice: %r", error)


def _labels(arguments: Mapping[str, Any]) -> Any:
    """The labels of `fit`, or their specs."""
    x = arguments["x"]
    spec = getattr(x, "element_spec", None)
    return arguments.get("y") if spec is None else keras.utils.unpack_x_y_sample_weight(spec)[1]


def _size_of_batches(x: Any) -> int | None:
    """Examples per batch of a data set, if it says so."""
    specs = tf.nest.flatten(getattr(x, "element_spec", None), expand_composites=True)
    shapes = [spec.shape for spec in specs if hasattr(spec, "shape")]
    return shapes[0][0] if shapes and shapes[0].rank else None


def _check_labels(source: batches.Source, model: keras.Model) -> None:
    if source.has_labels is False and getattr(model, "loss", None) is not None:
        raise ValueError("quality_data has no labels: give batches (x, y), or a tuple (x, y) of arrays.")


def _as_list(
    callbacks: keras.callbacks.Callback | Sequence[keras.callbacks.Callback] | None,
) -> list[keras.callbacks.Callback]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
