"""What happens between training steps: readings of quality, the decision, and a look whether all is finite."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from fliqs_tf import replicas
from fliqs_tf._keras import keras
from fliqs_tf.io import batches
from fliqs_tf.search import deciding

_LOG = logging.getLogger("fliqs_tf")
# Weights that are not finite are noticed within so many steps; looking more often would be felt.
_CHECK_EVERY = 16
# Quality lost in the warm-up that is told: this share of what it was, and this much.
_LOST, _LOST_AT_LEAST = 0.25, 0.05


class _Reading(NamedTuple):
    """The quality of the first of some samples on a batch."""

    data: Any
    samples: tf.Tensor
    quality: float


class SearchLoop(keras.callbacks.Callback):
    """Between training steps: readings of quality, the decision, and a look whether all is finite.

    Args:
      search_model: A `SearchModel`.
      source: What readings are from, or None.
      size: Examples per reading, of arrays.
    """

    def __init__(self, search_model: keras.Model, source: batches.Source | None, size: int) -> None:
        super().__init__()
        self.search_model = search_model
        self.strategy = search_model.distribute_strategy
        self.workers = replicas.Workers(self.strategy)
        self.source = source
        self.batches: Iterator[Any] = iter(())  # as `read_quality` takes them
        if source is not None:
            endless, dealt_out = source.endless(size, search_model._compiled_for.seed), source.is_distributed
            self.batches = (batch if dealt_out else _shared(batch, self.strategy) for batch in endless)
        self.draw, self.read, self.learn = _functions(search_model)
        self.begun = False
        self.step = 0
        self.at_first: _Reading | None = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.last_batch = -1
        if not self.begun:  # now, and not before: a callback may have restored a run that was interrupted
            self.begun = True
            self.step = self._controller_step()
            self._note_decision()
            if self.step == 0 and self.source is not None and not self.decided:
                self._read_before_training()
        self.keep_decision()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        before, self.step = self.step, self.step + batch - self.last_batch
        self.last_batch = batch
        if self.step // _CHECK_EVERY > before // _CHECK_EVERY:
            self._check_finite()
        if self.decided:
            return
        if self.at_first is not None and self.step >= self.search_model.controller.warmup_steps():
            self._compare_with(self.at_first)
        if self.step >= self.search_model.controller.decided_at():
            self.decide()
        elif self.source is not None:
            # With steps_per_execution several may be due.
            every = self.search_model._compiled_for.quality_every
            for reading in range(before // every + 1, self.step // every + 1):
                self._read(reading * every - 1)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._check_finite()

    def decide(self) -> None:
        """Takes the decision, once."""
        if self.decided:
            return
        every = self.search_model._compiled_for.quality_every
        if self.source is not None and self.step < every:
            _LOG.warning(
                "The formats are decided after %d steps without one reading of quality_data, which happens every %d "
                "steps (quality_every): only their cost was known.",
                self.step,
                every,
            )
        deciding.decide(self.search_model)
        self._note_decision()

    def keep_decision(self) -> None:
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

    def _note_decision(self) -> None:
        controller = self.search_model.controller
        self.decided = bool(tf.convert_to_tensor(controller.decided))
        self.logits = np.array(tf.convert_to_tensor(controller.logits))

    def _read(self, step: int) -> None:
        data = next(self.batches)
        samples = self.draw(tf.constant(step))
        k = self.search_model._compiled_for.quality_samples
        self.learn(samples, [self.read(data, samples, tf.constant(i)) for i in range(k)])

    def _read_before_training(self) -> None:
        """Reads the network as it came, in its widest formats: what the warm-up must not destroy."""
        data = next(self.batches)
        self.batches = itertools.chain([data], self.batches)
        widest = [len(decision.options) - 1 for decision in self.search_model.decisions]
        samples = tf.constant([widest] * self.search_model._compiled_for.quality_samples)
        self.at_first = _Reading(data, samples, self._quality(data, samples))
        self.search_model.use_sample()

    def _compare_with(self, reading: _Reading) -> None:
        before, now = reading.quality, self._quality(reading.data, reading.samples)
        self.at_first = None
        self.search_model.use_sample()
        if now < before - _LOST * abs(before) - _LOST_AT_LEAST:
            _LOG.warning(
                "The warm-up has made the network worse: with its widest formats the quality of a held-out batch was "
                "%.4g before the training and is %.4g after %d steps. If it came with trained weights, lower the "
                "learning rate, or shorten the warm-up: compile(controller={'warmup': 0.05}).",
                before,
                now,
                self.step,
            )

    def _quality(self, data: Any, samples: tf.Tensor) -> float:
        """Mean over replicas of the quality of the first sample."""
        read = self.read(data, samples, tf.constant(0))
        return float(np.mean([np.array(q) for q in self.strategy.experimental_local_results(read)]))

    def _check_finite(self) -> None:
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


def _functions(model: keras.Model) -> tuple[Callable, Callable, Callable]:
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


def _read_one(model: keras.Model) -> Callable:
    return lambda data, samples, i: model.read_quality(data, samples[i])


def _learn(model: keras.Model) -> Callable:
    return lambda samples, qualities: model.learn(samples, tf.stack(qualities))


def _all_finite(network: keras.Model) -> bool:
    """Whether all variables are: in one pass, because a sum is not finite if one term is not."""
    # A vocabulary of tf_keras is among the variables, but is none.
    values = (tf.convert_to_tensor(v) for v in network.variables if hasattr(v, "assign"))
    sums = [tf.reduce_sum(tf.cast(v, tf.float32)) for v in values if v.dtype.is_floating]
    return bool(tf.math.is_finite(tf.add_n(sums)))


def _shared(batch: batches.Batch, strategy: tf.distribute.Strategy) -> Any:
    """A batch as `read_quality` takes it: on one replica, or dealt out to all of them."""
    data = tuple(batch) if batch.sample_weight is not None else (batch.x, batch.y)
    count = strategy.num_replicas_in_sync
    if count == 1:
        return tf.nest.map_structure(tf.convert_to_tensor, data)
    size = batches.example_count(batch) // count * count  # shares of one size
    if not size:
        raise ValueError(f"A batch of quality_data has {batches.example_count(batch)} examples for {count} replicas.")

    def share(context: tf.distribute.ReplicaContext) -> Any:
        first = context.replica_id_in_sync_group
        return tf.nest.map_structure(lambda t: tf.convert_to_tensor(t)[first:size:count], data)

    return strategy.experimental_distribute_values_from_function(share)
