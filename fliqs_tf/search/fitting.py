"""What `fit` does around Keras' training loop: count the steps, read quality, take the decision, tidy up."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from fliqs_tf import replicas
from fliqs_tf._keras import IS_KERAS_3, build_optimizer, keras
from fliqs_tf.io import batches
from fliqs_tf.layers import batch_norm

_LOG = logging.getLogger("fliqs_tf")
# Batches from which moving averages are estimated: 32 batches of 64 give their means to about 2 % of a deviation.
ESTIMATION_BATCHES = 32
# Weights that are not finite are noticed within so many steps; looking more often would be felt.
_CHECK_EVERY = 16
_BATCH_SIZE = 32  # Keras' default


def fit(model, keras_fit, x, y, args, kwargs, quality_data, calibration_data):
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
    _restart_if_compiled_anew(model, arguments)
    model.bad_step.assign(-1)
    start = int(tf.convert_to_tensor(model.controller.step))
    total = _total_steps(model, arguments, start)
    model.configure_controller(total, held_out=quality_data is not None)
    _create_variables(model, arguments)
    size = int(arguments.get("batch_size") or _size_of_batches(x) or _BATCH_SIZE)
    loop = _SearchLoop(model, readings, size)
    arguments["callbacks"] = [loop, *_as_list(arguments.get("callbacks"))]
    model.__dict__["_training_source"] = training
    model._is_fitting = True
    try:
        history = keras_fit(**arguments)
    finally:
        model._is_fitting = False
    loop.keep_decision()
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
        loop.decide()  # the search has ended early
    model.use_sample()
    if model.stop_training or step >= total:
        # Moving averages of training belong to the formats of its last steps. A run that goes on keeps them.
        recalibrate(model, calibration)
    return history


def decide(model) -> None:
    """Takes the decision, if it is open."""
    if bool(tf.convert_to_tensor(model.controller.decided)):
        return
    model.controller.decide(replicas.Workers(model.distribute_strategy).first)
    model.__dict__["_decided_for"] = model._compiled_for.decides_on
    model.use_sample()


def decide_if_due(model) -> None:
    """Takes the decision at the step that it is planned for, or after it."""
    if int(tf.convert_to_tensor(model.controller.step)) >= model.controller.decided_at():
        decide(model)


def recalibrate(model, data) -> None:
    """Estimates the moving averages of a search model for its formats; a warning where there is nothing to do it from.

    Args:
      model: The search model.
      data: Examples or their `batches.Source`, or None.
    """
    if not estimate(model.network, data) and batch_norm.batch_norms(model.network):
        _LOG.warning(
            "The moving averages of batch normalization stay as training left them, those of the formats that it "
            "computed with: there is no batch to estimate them anew from (a generator is read once). Give "
            "calibration_data, a data set or arrays."
        )


def estimate(network, data) -> int:
    """Estimates the moving averages of a network from a few batches.

    Args:
      network: Its formats must be set.
      data: Examples or their `batches.Source`, or None.

    Returns:
      The number of batches that were used.
    """
    if data is None or not batch_norm.batch_norms(network):
        return 0
    source = data if isinstance(data, batches.Source) else batches.read(data, network, "calibration_data")
    size = source.batch_size or _BATCH_SIZE
    inputs = (batch.x for batch in source.some(ESTIMATION_BATCHES, size))
    return batch_norm.recalibrate(network, inputs, shared=source.is_distributed)


def _training_source(network, arguments) -> batches.Source | None:
    """The training data of `fit` without those at the end that Keras keeps for validation; None for a generator, which
    training uses up, and for what only Keras understands."""
    x = arguments["x"]
    if isinstance(x, Iterator):
        return None
    try:
        source = batches.read(x, network, "x")
    except (TypeError, ValueError):
        return None  # Keras says what is wrong with it
    if source.arrays is None:
        return source
    training = 1 - (arguments.get("validation_split") or 0)
    size = int(arguments.get("batch_size") or _BATCH_SIZE)
    return source.first(int(batches.example_count(source.arrays) * training), batch_size=size)


def _restart_if_compiled_anew(model, arguments) -> None:
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


def _total_steps(model, arguments, start: int) -> int:
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


def _steps_per_epoch(arguments) -> int | None:
    if arguments.get("steps_per_epoch"):
        return int(arguments["steps_per_epoch"])
    x = arguments["x"]
    if isinstance(x, tf.data.Dataset):
        size = int(x.cardinality())
        return size if size >= 0 else None
    arrays = [a for a in tf.nest.flatten(x) if hasattr(a, "shape")]
    if arrays:
        examples = arrays[0].shape[0] * (1 - (arguments.get("validation_split") or 0))
        return math.ceil(int(examples) / (arguments.get("batch_size") or _BATCH_SIZE))
    return len(x) if hasattr(x, "__len__") else None


def _create_variables(model, arguments) -> None:
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


def _labels(arguments):
    """The labels of `fit`, or their specs."""
    x = arguments["x"]
    spec = getattr(x, "element_spec", None)
    return arguments.get("y") if spec is None else keras.utils.unpack_x_y_sample_weight(spec)[1]


class _SearchLoop(keras.callbacks.Callback):
    """Between training steps: readings of quality, the decision, and a look whether all is finite.

    Args:
      search_model: A `SearchModel`.
      source: What readings are from, or None.
      size: Examples per reading, of arrays.
    """

    def __init__(self, search_model, source, size):
        super().__init__()
        self.search_model = search_model
        self.strategy = search_model.distribute_strategy
        self.workers = replicas.Workers(self.strategy)
        self.source = source
        self.batches = None if source is None else source.endless(size, search_model._compiled_for.seed)
        self.draw, self.read, self.learn = _functions(search_model)
        self.step = None

    def on_epoch_begin(self, epoch, logs=None):
        self.last_batch = -1
        if self.step is None:  # now, and not before: a callback may have restored a run that was interrupted
            self.step = self._controller_step()
            self._note_decision()
        self.keep_decision()

    def on_train_batch_end(self, batch, logs=None):
        before, self.step = self.step, self.step + batch - self.last_batch
        self.last_batch = batch
        if self.step // _CHECK_EVERY > before // _CHECK_EVERY:
            self._check_finite()
        if self.decided:
            return
        if self.step >= self.search_model.controller.decided_at():
            self.decide()
        elif self.batches is not None:
            # With steps_per_execution several may be due.
            every = self.search_model._compiled_for.quality_every
            for reading in range(before // every + 1, self.step // every + 1):
                self._read(reading * every - 1)

    def on_epoch_end(self, epoch, logs=None):
        self._check_finite()

    def decide(self):
        """Takes the decision, once."""
        if self.decided:
            return
        every = self.search_model._compiled_for.quality_every
        if self.batches is not None and self.step < every:
            _LOG.warning(
                "The formats are decided after %d steps without one reading of quality_data, which happens every %d "
                "steps (quality_every): only their cost was known.",
                self.step,
                every,
            )
        decide(self.search_model)
        self._note_decision()

    def keep_decision(self):
        """Puts the decision back where a callback has restored weights from before it, the controller's among them."""
        controller = self.search_model.controller
        if not self.decided:
            return
        restored = self._controller_step()
        if not bool(tf.convert_to_tensor(controller.decided)):
            _LOG.warning(
                "A callback restored the weights of step %d, when the formats were still open. The decision stays, "
                "but these weights were trained with formats that changed. To restore weights of the decided formats "
                "compare only epochs after step %d: EarlyStopping(start_from_epoch=...).",
                restored,
                controller.decided_at(),
            )
            controller.logits.assign(self.logits)
            controller.decided.assign(True)
        controller.step.assign(max(restored, self.step))

    def _controller_step(self) -> int:
        return int(tf.convert_to_tensor(self.search_model.controller.step))

    def _note_decision(self):
        controller = self.search_model.controller
        self.decided = bool(tf.convert_to_tensor(controller.decided))
        self.logits = np.array(tf.convert_to_tensor(controller.logits))

    def _read(self, step: int):
        batch = next(self.batches)
        data = batch if self.source.is_distributed else _shared(batch, self.strategy)
        samples = self.draw(tf.constant(step))
        k = self.search_model._compiled_for.quality_samples
        self.learn(samples, [self.read(data, samples, tf.constant(i)) for i in range(k)])

    def _check_finite(self):
        bad = int(tf.convert_to_tensor(self.search_model.bad_step))
        if bad >= 0:
            what = f"The loss was not finite at step {bad}"
        elif not _all_finite(self.search_model.network):
            # The loss can stay finite: on a CPU a ReLU gives 0 for NaN.
            what = f"Weights or moving averages are not finite at step {self.step}, or since a few steps before it"
        else:
            return
        raise FloatingPointError(
            f"{what}. Stopped: look for NaN or infinities in the data; go back to a checkpoint from before it, and "
            f"lower the learning rate or leave the narrowest formats out of the space."
        )


def _functions(model) -> tuple:
    """(draw, read, learn) as graphs, made once per `compile`: a second `fit` traces nothing again."""
    run = model.distribute_strategy.run
    if model._reading_functions is None:
        made = (
            tf.function(lambda step: run(model.draw_for_reading, (step,))),
            # A replica's samples stay where they were drawn.
            tf.function(lambda data, samples, i: run(_read_one(model), (data, samples, i))),
            tf.function(lambda samples, qualities: run(_learn(model), (samples, qualities))),
        )
        model._reading_functions = made
    return model._reading_functions


def _read_one(model):
    return lambda data, samples, i: model.read_quality(data, samples[i])


def _learn(model):
    return lambda samples, qualities: model.learn(samples, tf.stack(qualities))


def _all_finite(network) -> bool:
    """Whether all variables are: in one pass, because a sum is not finite if one term is not."""
    values = (tf.convert_to_tensor(v) for v in network.variables)
    sums = [tf.reduce_sum(tf.cast(v, tf.float32)) for v in values if v.dtype.is_floating]
    return bool(tf.math.is_finite(tf.add_n(sums)))


def _shared(batch: batches.Batch, strategy: tf.distribute.Strategy):
    """A batch as `read_quality` takes it: on one replica, or dealt out to all of them."""
    data = tuple(batch) if batch.sample_weight is not None else (batch.x, batch.y)
    count = strategy.num_replicas_in_sync
    if count == 1:
        return tf.nest.map_structure(tf.convert_to_tensor, data)
    size = batches.example_count(batch) // count * count  # shares of one size
    if not size:
        raise ValueError(f"A batch of quality_data has {batches.example_count(batch)} examples for {count} replicas.")

    def share(context):
        first = context.replica_id_in_sync_group
        return tf.nest.map_structure(lambda t: tf.convert_to_tensor(t)[first:size:count], data)

    return strategy.experimental_distribute_values_from_function(share)


def _size_of_batches(x) -> int | None:
    """Examples per batch of a data set, if it says so."""
    specs = tf.nest.flatten(getattr(x, "element_spec", None), expand_composites=True)
    shapes = [spec.shape for spec in specs if hasattr(spec, "shape")]
    return shapes[0][0] if shapes and shapes[0].rank else None


def _check_labels(source: batches.Source, model) -> None:
    if source.has_labels is False and getattr(model, "loss", None) is not None:
        raise ValueError("quality_data has no labels: give batches (x, y), or a tuple (x, y) of arrays.")


def _as_list(callbacks) -> list:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
