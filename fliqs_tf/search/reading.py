"""Readings of quality: several samples compared on one batch, from which no weight learns."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf import replicas
from fliqs_tf._keras import keras
from fliqs_tf.io import batches
from fliqs_tf.layers import ranges
from fliqs_tf.search import deciding
from fliqs_tf.search.controller import READINGS

_LOG = logging.getLogger("fliqs_tf")
# Batches from which the ranges of activations are set before the first reading of a trained network.
_RANGE_BATCHES = 8
# Labels and inputs belong together in a trained network: moved apart, quality falls by at least this share, on average
# over this many batches. (The loss of a ResNet-8 is 2.3 and 2.3 before the first step, 1.3 and 3.2 after an epoch.)
_TRAINED, _TRAINED_BATCHES = 0.5, 4
# Without training, readings end when a better choice could gain no more than this share of what the narrowest formats
# lose, which is looked at after every so many of them.
SURE, _LOOK_EVERY = 0.005, 25
# Readings that take longer than the training would not be worth it; fewer say too little.
LEAST = 50


class Reader:
    """Reads quality for the controller of a search model.

    Args:
      search_model: A `SearchModel`, compiled, its controller configured.
      source: Where batches are from.
      size: Examples per reading, of arrays.
    """

    def __init__(self, search_model: keras.Model, source: batches.Source, size: int) -> None:
        self.model = search_model
        self.strategy = search_model.distribute_strategy
        self._source, self._size = source, size
        self._samples = search_model._compiled_for.quality_samples
        self._draw, self._read, self._learn = _functions(search_model)
        # As `read_quality` takes them.
        endless, dealt_out = source.endless(size, search_model._compiled_for.seed), source.is_distributed
        self._batches: Iterator[Any] = (batch if dealt_out else _shared(batch, self.strategy) for batch in endless)

    def read(self, step: int) -> None:
        """Draws samples, reads their quality on the next batch, and lets the controller learn from it.

        Args:
          step: Training step that the reading follows; samples are drawn with it as a seed.
        """
        data = next(self._batches)
        samples = self._draw(tf.constant(step))
        self._learn(samples, [self._read(data, samples, tf.constant(i)) for i in range(self._samples)])

    def is_trained(self) -> bool:
        """Whether the network has learned something: its quality is far better with the labels of the examples than
        with those of other examples. The batches are read again later."""
        if self._source.has_labels is False:
            return False
        seen = list(itertools.islice(self._batches, _TRAINED_BATCHES))
        self._batches = itertools.chain(seen, self._batches)
        is_alone = self.strategy.num_replicas_in_sync == 1
        if is_alone and not all(isinstance(y, tf.Tensor) for data in seen for y in tf.nest.flatten(data[1])):
            return False  # ragged labels cannot be moved to other examples
        if is_alone and _is_one_class([data[1] for data in seen]):
            _LOG.warning(
                "All examples in the first %d batches that quality is read from are of one class: what a format does "
                "to the others is not seen. Shuffle the data set, or give quality_data of all classes.",
                len(seen),
            )
        widest = tf.constant([self.model.training_choice().tolist()] * self._samples)
        own, others = (
            np.mean([self._quality(data, widest) for data in each])
            for each in (seen, [_with_other_labels(data, self.strategy) for data in seen])
        )
        self.model.use_sample()
        _LOG.debug("Quality %.4g, with the labels of other examples %.4g.", own, others)
        return bool(own - others > _TRAINED * max(abs(own), abs(others)))

    def decide_before_training(self, most: int | None = None, verbose: bool = False) -> int:
        """Reads until the critic is sure, and decides. The weights are as good as they were; activations get ranges.

        The readings go through the schedule of a search of that many, so that samples come closer to the target.

        Args:
          most: Readings at most; None: as many as a quarter of the training steps to come, but `LEAST` to `READINGS`.
          verbose: Print progress, with the time left at most.

        Returns:
          The number of readings.
        """
        model, controller = self.model, self.model.controller
        steps = int(tf.convert_to_tensor(controller.total_steps))
        most = min(READINGS, max(LEAST, steps // 4)) if most is None else most
        self._set_ranges()
        before = int(tf.convert_to_tensor(controller.total_steps)), int(tf.convert_to_tensor(controller.step))
        controller.total_steps.assign(controller.steps_to_decide_at(most))
        agreed = replicas.Workers(self.strategy).first
        start = time.monotonic()
        done = 0
        for done in range(1, most + 1):
            controller.step.assign(done - 1)
            self.read(done - 1)
            if done % _LOOK_EVERY == 0:
                regret = float(agreed(np.array(controller.regret())))
                if verbose:
                    left = (time.monotonic() - start) / done * (most - done)
                    print(
                        f"reading {done} of {most} at most, {left:.0f} s left at most; a better choice may gain "
                        f"{regret:.1%} (below {SURE:.1%}: done)",
                        flush=True,
                    )
                if regret < SURE:
                    break
        controller.total_steps.assign(before[0])
        controller.step.assign(before[1])
        deciding.decide(model)
        return done

    def sensitivities(self, most: int, verbose: bool = False) -> np.ndarray:
        """Effects of one option of one decision at a time, all others in their widest: the classical way.

        Each batch compares the widest formats with as many changes as a reading has samples beside them. The critic
        learns from the same readings.

        Args:
          most: Readings at most; at least one of each option is made.
          verbose: Print progress.

        Returns:
          float64 [D, N]; 0 for the widest options and for padding.
        """
        decisions = self.model.decisions
        widest = np.array([len(decision.options) - 1 for decision in decisions], np.int32)
        changes = [(d, o) for d in range(len(decisions)) for o in range(widest[d])]
        groups = [changes[i : i + self._samples - 1] for i in range(0, len(changes), self._samples - 1)]
        total = np.zeros(self.model.controller.mask.shape)
        passes = max(1, most // max(len(groups), 1))
        self._set_ranges()
        for done in range(passes):
            for group in groups:
                samples = np.repeat(widest[None], self._samples, axis=0)
                for row, (d, o) in enumerate(group, start=1):
                    samples[row, d] = o
                data, drawn = next(self._batches), tf.constant(samples)
                read = [self._read(data, drawn, tf.constant(i)) for i in range(self._samples)]
                self._learn(drawn, read)
                base, *others = (self._mean(quality) for quality in read)
                for (d, o), quality in zip(group, others, strict=False):
                    total[d, o] += quality - base
            if verbose:
                print(f"pass {done + 1} of {passes} over {len(changes)} formats of layers", flush=True)
        return total / passes

    def _set_ranges(self) -> None:
        """Gives activations ranges from a few batches, if these can be read twice, and here: not dealt out."""
        is_here = not self._source.is_distributed and self.strategy.num_replicas_in_sync == 1
        if is_here and not self._source.is_read_once:
            ranges.calibrate(self.model.graph, (batch.x for batch in self._source.some(_RANGE_BATCHES, self._size)))

    def _quality(self, data: Any, samples: tf.Tensor) -> float:
        """Quality of the first sample, its mean over replicas."""
        return self._mean(self._read(data, samples, tf.constant(0)))

    def _mean(self, quality: Any) -> float:
        return float(np.mean([np.array(q) for q in self.strategy.experimental_local_results(quality)]))


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


def _is_one_class(labels: Sequence[Any]) -> bool:
    """Whether labels of several batches are classes, and all of them the same one."""
    if not all(tf.is_tensor(y) and y.dtype.is_integer and y.shape.rank in (1, 2) for y in labels):
        return False
    values = np.concatenate([np.ravel(y) for y in labels])
    return len(values) > 1 and bool((values == values[0]).all())


def _with_other_labels(data: Any, strategy: tf.distribute.Strategy) -> Any:
    """A batch in which each example has the label of its neighbour."""
    return strategy.run(_move_labels, (data,))


@tf.function(reduce_retracing=True)
def _move_labels(data: Any) -> Any:
    x, y, *rest = data
    return (x, tf.nest.map_structure(lambda each: tf.roll(each, 1, axis=0), y), *rest)


def _shared(batch: batches.Batch, strategy: tf.distribute.Strategy) -> Any:
    """A batch as `read_quality` takes it: on one replica, or dealt out to all of them."""
    data = tuple(batch) if batch.sample_weight is not None else (batch.x, batch.y)
    count = strategy.num_replicas_in_sync
    if count == 1:
        return tf.nest.map_structure(tf.convert_to_tensor, data)
    size = batches.example_count(batch) // count * count  # shares of one size
    if not size:
        raise ValueError(
            f"A batch that quality is read from has {batches.example_count(batch)} examples for {count} replicas."
        )

    def share(context: tf.distribute.ReplicaContext) -> Any:
        first = context.replica_id_in_sync_group
        return tf.nest.map_structure(lambda t: tf.convert_to_tensor(t)[first:size:count], data)

    return strategy.experimental_distribute_values_from_function(share)
