"""What a search model computes: training steps with the formats of a sample, and readings of quality."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from fliqs_tf import costs, replicas
from fliqs_tf._keras import keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import batch_norm
from fliqs_tf.layers.quantizers import training_step
from fliqs_tf.numerics.formats import Format
from fliqs_tf.quantize import decisions as decisions_lib
from fliqs_tf.quantize.decisions import Decision
from fliqs_tf.search import compile_config
from fliqs_tf.search.controller import Controller


class SampledModel(keras.Model):
    """A network whose formats follow samples of a controller.

    `SearchModel` adds what users call, and makes what is declared here.

    Attributes:
      graph: The quantized network as a graph.
      network: The quantized network.
      controller: Draws samples, and learns from their quality.
      readout: Variable [4]: reward, baseline, quality and beta_H of the last reading, for logs.
      previous_sample: Variable int32 [decisions]; what the last training step computed with.
      bad_step: Variable; the first step whose loss was not finite, or -1.
    """

    graph: ModelGraph
    network: keras.Model
    controller: Controller
    readout: tf.Variable
    previous_sample: tf.Variable
    bad_step: tf.Variable
    _compiled_for: compile_config.CompileConfig | None
    # Whether readings have batches of their own: the training step is traced for the one or the other.
    _held_out: bool
    # What Keras keeps to itself of the batch at work. The replicas of a strategy are threads.
    _batch: threading.local
    _example_shape: Any

    # cached_property keeps these out of Keras' attribute tracking: the layers in them belong to the network.
    @functools.cached_property
    def decisions(self) -> list[Decision]:
        """What the search decides, in network order."""
        return decisions_lib.open_decisions(self.graph)

    @functools.cached_property
    def sites(self) -> list[costs.Site]:
        """The layers that costs count."""
        return costs.sites(self.graph, self._example_shape)

    @property
    def cost_table(self) -> costs.CostTable:
        """Cost of samples of this model, as compiled."""
        return self._configuration.table

    @property
    def _configuration(self) -> compile_config.CompileConfig:
        if self._compiled_for is None:
            raise RuntimeError("Call compile(optimizer, loss, target_cost=...) first.")
        return self._compiled_for

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return self.network(inputs, training=training)

    def build(self, input_shape: Any = None) -> None:
        self.built = True

    @property
    def reads_training_data(self) -> bool:
        """Whether readings without `quality_data` want batches of their own, from the training data."""
        train_with = self._configuration.train_with
        return train_with == "widest" or (train_with is None and self.controller.estimator == "critic")

    @property
    def trains_with_samples(self) -> bool:
        """Whether weights train with what the controller draws, see `compile`."""
        train_with = self._configuration.train_with
        if train_with is not None:
            return train_with == "sample"
        return self.controller.estimator == "reinforce" or not self._held_out

    def reading_interval(self) -> int:
        """Training steps between two readings, see `quality_every`."""
        return self._configuration.quality_every or self.controller.reading_interval()

    def training_choice(self) -> np.ndarray:
        """What weights train with until the formats are decided: int32 [decisions], of each decision the widest option
        of 8 bits or fewer, or the narrowest one."""
        narrow = ([i for i, name in enumerate(d.options) if Format(name).bits <= 8] for d in self.decisions)
        return np.array([max(options, default=0) for options in narrow], np.int32)

    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        sample = self._sample_to_train_with()
        self._assign(sample)
        with training_step():
            logs = super().train_step(data)
        quality, loss = self._quality_of_batch()
        step = tf.convert_to_tensor(self.controller.step)
        first_bad = (self.bad_step < 0) & ~tf.math.is_finite(loss)
        self.bad_step.assign(tf.where(first_bad, step, self.bad_step))
        if not self._held_out:
            self._learn(sample[None], quality[None])
        switched = tf.reduce_mean(tf.cast(sample != tf.convert_to_tensor(self.previous_sample), tf.float32))
        self.previous_sample.assign(sample)
        self.controller.advance()
        self._assign(self.controller.most_likely())
        return {
            **logs,
            "reward": tf.convert_to_tensor(self.readout)[0],
            "cost": self.cost_table.expected(self.controller.probabilities()),
            "entropy": self.controller.entropy(),
            "switch_rate": switched,
        }

    def _sample_to_train_with(self) -> tf.Tensor:
        if self.trains_with_samples:
            return self._draw(1)[0]
        decided = tf.convert_to_tensor(self.controller.decided)
        return tf.where(decided, self.controller.most_likely(), tf.constant(self.training_choice()))

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, **kwargs: Any
    ) -> tf.Tensor:
        loss = super().compute_loss(x, y, y_pred, sample_weight, **kwargs)
        self._batch.values = (loss, y, y_pred)
        return loss

    def _quality_of_batch(self) -> tuple[tf.Tensor, tf.Tensor]:
        """(quality, loss) of the batch whose loss was computed last: over all replicas, or, of quality, over this one's
        share if each has its own sample."""
        loss, y, y_pred = self._batch.values
        del self._batch.values
        # Keras divides the loss of a replica's share by the number of replicas.
        loss = tf.cast(loss, tf.float32) * replicas.count()
        quality = self._configuration.quality(loss, y, y_pred)
        both = replicas.mean(tf.stack([quality, loss]))
        return quality if self._configuration.sample_per_replica else both[0], both[1]

    def draw_for_reading(self, step: tf.Tensor | int | None = None) -> tf.Tensor:
        """Samples to compare on one batch, int32 [quality_samples, decisions]. Where weights train with samples the
        first one is that of the training step, for the last step at least: an earlier one is drawn again, which
        XLA-compiled steps do otherwise.

        Args:
          step: The training step that the reading follows; None: the last one.
        """
        last = tf.convert_to_tensor(self.controller.step) - 1
        step = last if step is None else step
        samples = self._draw(self._configuration.quality_samples, step)
        if not self.trains_with_samples:
            return samples
        trained_with = tf.where((step == last) & (last >= 0), tf.convert_to_tensor(self.previous_sample), samples[0])
        return tf.concat([trained_with[None], samples[1:]], axis=0)

    def _draw(self, k: int, step: tf.Tensor | int | None = None) -> tf.Tensor:
        step = tf.convert_to_tensor(self.controller.step if step is None else step)
        seed = tf.constant(self._configuration.seed, tf.int32)
        if self._configuration.sample_per_replica:
            # Far from the seeds that people take; the first replica draws what it would draw alone.
            seed = tf.bitwise.bitwise_xor(seed, replicas.index() * 0x3C6EF35F)
        return self.controller.sample(tf.stack([seed, step]), k)

    def read_quality(self, data: tuple[Any, ...], sample: tf.Tensor | ArrayLike) -> tf.Tensor:
        """Quality of a sample on a batch, which changes no weight, no stored statistic and no metric.

        Under a distribution strategy: the mean over replicas, or with `sample_per_replica` that of the replica's share.

        Args:
          data: (x, y) or (x, y, sample_weight).
          sample: int32 [decisions].

        Returns:
          float32 scalar.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(tf.nest.map_structure(tf.convert_to_tensor, data))
        self._assign(sample)
        states = [v for metric in self.metrics for v in metric.variables]
        before = [tf.identity(tf.convert_to_tensor(v)) for v in states]
        with batch_norm.batch_statistics(self.graph):
            y_pred = self(x, training=True)
        self.compute_loss(x, y, y_pred, sample_weight)
        quality, _ = self._quality_of_batch()
        for variable, value in zip(states, before):  # tf_keras counts the loss as it computes it
            variable.assign(value)
        return quality

    def learn(self, samples: tf.Tensor | ArrayLike, quality: tf.Tensor | ArrayLike) -> None:
        """Updates the controller from readings on one batch: int32 [k, decisions], float32 [k]."""
        self._learn(samples, quality)
        self._assign(self.controller.most_likely())

    def _learn(self, samples: tf.Tensor | ArrayLike, quality: tf.Tensor | ArrayLike) -> None:
        result = self.controller.update(samples, quality, per_replica=self._configuration.sample_per_replica)
        mean_quality = replicas.mean(tf.reduce_mean(quality))
        self.readout.assign(tf.stack([result["reward"], result["baseline"], mean_quality, self.controller.beta()]))

    def use_sample(self, sample: tf.Tensor | ArrayLike | None = None) -> None:
        """Sets the formats that the model computes with: int32 [decisions]; None: the most likely ones.

        The next training step goes back to the most likely ones.
        """
        self._assign(tf.convert_to_tensor(self.controller.most_likely() if sample is None else sample, tf.int32))

    def _assign(self, sample: tf.Tensor) -> None:
        for option, decision in zip(tf.unstack(sample), self.decisions):
            for choice in decision.choices:
                choice.assign(option)
