"""The search: a Keras model that trains one set of weights while a controller learns which formats it needs.

A training step:

1. the controller draws a sample: an option for every decision;
2. a weight step on the training batch, computed with those formats;
3. quality: from the training batch, or, every few steps, of several samples on one held-out batch;
4. the controller learns from quality and cost;
5. every decision goes back to its most likely option, so that between steps the model is the network of `recipe()`.

Source of the method: FLIQS, arXiv 2308.03290. What differs from it by default, and why, is in docs/method.md.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from fliqs_tf import costs, replicas
from fliqs_tf._keras import IS_KERAS_3, add_state, build_optimizer, check_strategy, keras, map_shapes, replace_layer
from fliqs_tf.costs.profile import Profile
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import batch_norm, shared_ranges
from fliqs_tf.layers.quantizers import training_step
from fliqs_tf.numerics.formats import Format
from fliqs_tf.quantize import decisions as decisions_lib
from fliqs_tf.quantize.decisions import Decision
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.search import averages, compile_config, deciding, deployment, fitting, rewards
from fliqs_tf.search.controller import Controller, present_names
from fliqs_tf.search.quality import quality_function

_LOG = logging.getLogger("fliqs_tf")


@keras.saving.register_keras_serializable("fliqs_tf")
class SearchModel(keras.Model):
    """A quantized network and the controller that searches its formats. `fliqs_tf.wrap` makes it.

    Args:
      network: Model with `Quantized` layers, or what TensorFlow Model Optimization's `quantize_apply` made with a
        `fliqs_tf.tfmot.FliqsQuantizeScheme`, or the `ModelGraph` of one; it is trained in place.
      controller: Options of `Controller`, as a dict.
      input_shape: Shape of one example, where the network leaves it open.
      profile: The platform that is searched for, a `Profile` or None.
    """

    def __init__(
        self,
        network: keras.Model | ModelGraph,
        controller: Mapping[str, Any] | None = None,
        input_shape: Any = None,
        profile: Profile | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.graph = graph = ModelGraph.of(network)
        self.network = network = graph.model
        self._trainable = network.trainable  # past the setter, which would unfreeze what is frozen inside
        if shared_ranges.has_boundary_quantizers(graph):
            shared_ranges.link(graph)
        self.profile = profile
        self._example_shape = input_shape and map_shapes(
            lambda s: list(s.shape if hasattr(s, "shape") else s), input_shape
        )
        if names := getattr(network, "output_names", None):
            # Losses and metrics are given by these names, and reported under them.
            self.output_names = list(names)
        self._compiled_for: compile_config.CompileConfig | None = None
        self._is_fitting = False
        # Whether quality comes from held-out batches: the training step is traced for the one or the other.
        self._held_out = False
        # What a step returns is the same on all replicas; tf_keras would add it up.
        self.distribute_reduction_method = "first"
        # What Keras keeps to itself of the batch at work. The replicas of a strategy are threads.
        self._batch = threading.local()
        self.controller = self._new_controller(controller or {})
        # What the progress bar shows between two updates of the controller, and which step first went wrong.
        self.readout = add_state(self, "readout", (4,), "float32")
        self.previous_sample = add_state(self, "previous_sample", (len(self.decisions),), "int32")
        self.bad_step = add_state(self, "bad_step", (), "int32", initial=-1)
        self.built = True
        self._assign(self.controller.most_likely())

    def _new_controller(self, options: Mapping[str, Any]) -> Controller:
        if not self.decisions:
            raise ValueError(
                f"Model {self.network.name!r} has no formats to choose from: give what fliqs_tf.wrap or quantize_apply "
                f"with fliqs_tf.tfmot.FliqsQuantizeScheme made."
            )
        noise = [[Format(f).noise() for f in d.options] for d in self.decisions]
        return Controller([len(d.options) for d in self.decisions], **{"prior": noise, "name": "controller", **options})

    # cached_property keeps these out of Keras' attribute tracking: the layers in them belong to the network.
    @functools.cached_property
    def decisions(self) -> list[Decision]:
        """What the search decides, in network order."""
        return decisions_lib.open_decisions(self.graph)

    @functools.cached_property
    def sites(self) -> list[costs.Site]:
        """The layers that costs count."""
        return costs.sites(self.graph, self._example_shape)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return self.network(inputs, training=training)

    def build(self, input_shape: Any = None) -> None:
        self.built = True

    # ---- configuration

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "rmsprop",
        loss: Any = None,
        metrics: Any = None,
        *,
        target_cost: float | str | None = None,
        cost: str | costs.Cost | Profile | None = None,
        reward: str | rewards.Reward | Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = "absolute",
        quality: str | keras.metrics.Metric | Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = "loss",
        quality_every: int = 5,
        quality_samples: int = 4,
        search_steps: int | None = None,
        seed: int = 0,
        sample_per_replica: bool = False,
        controller: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keras' `compile`, and what the search needs.

        Compiled for another target, cost or reward after the search has decided, the model searches anew in the next
        `fit`, beginning with the weights as they are. A `.keras` file holds what was compiled, but no functions of
        your own: a model loaded from a file without them is not compiled.

        Args:
          optimizer, loss, metrics, **kwargs: As for any Keras model. `jit_compile` is off by default on a CPU, where
            compiling convolutions makes them slower; the rounding function is compiled all the same.
          target_cost: Number in the cost's unit, or relative to a uniform format: "0.25x INT8". `fit` needs it.
          cost: "bops", "memory", a `costs.Cost` or a `Profile`. None: that of the profile of `wrap`, or else "bops".
          reward: "absolute", "one_sided", "soft_exponential", "hard_exponential", an object of
            `fliqs_tf.rewards`, or a function (quality, cost / target) -> reward.
          quality: "loss" (its negative), "accuracy", a Keras metric, or a function (y_true, y_pred) -> what to
            maximize, a number or one per example.
          quality_every: With `fit(quality_data=...)`: training steps between two readings (our choice: 5;
            8 finds formats a little less good, and takes less time).
          quality_samples: Samples compared on the same held-out batch at a reading (our choice: 4).
          search_steps: Length of the search; in the last part of it formats are decided and stay (`frozen` of
            `Controller`). None: all steps of the first `fit`.
          seed: Of the draws.
          sample_per_replica: Under a distribution strategy: False: replicas compute with the same sample, and quality
            is that of the whole batch. True: each draws its own, reads its share of the batch, and all readings
            count: more samples, noisier each.
          controller: Options of `Controller`, a dict. Where they differ from those of the present controller, a new one
            begins and what was learned is forgotten; None keeps it.

        Raises:
          ValueError: A target out of reach (prints the reachable range), unknown names, numbers of steps or samples
            that are not whole, a reward that needs positive quality with quality="loss".
        """
        check_strategy(self.distribute_strategy)
        quality_every = compile_config.whole("quality_every", quality_every, 1)
        quality_samples = compile_config.whole("quality_samples", quality_samples, 2)
        search_steps = None if search_steps is None else compile_config.whole("search_steps", search_steps, 1)
        seed = compile_config.whole("seed", seed, -(2**31))
        if IS_KERAS_3 and not tf.config.list_physical_devices("GPU") and not tf.config.list_physical_devices("TPU"):
            kwargs.setdefault("jit_compile", False)
        cost_object = compile_config.cost_of(cost, self.profile)
        reward_object = rewards.get(reward)
        if quality == "loss" and getattr(reward_object, "needs_positive_quality", False):
            raise ValueError(
                f"The reward {reward!r} multiplies quality, which must be positive; minus the loss is not. Use "
                f"quality='accuracy', or reward='absolute'."
            )
        table = costs.CostTable(cost_object, self.sites, [(d.name, d.options) for d in self.decisions])
        target = None
        if target_cost is not None:
            target = costs.parse_target_cost(
                target_cost, lambda fmt: cost_object(self, fmt), cost_object.unit, table.reachable()
            )
            target_cost = target_cost if isinstance(target_cost, str) else target
        if controller is not None:
            self._set_controller(self._new_controller(controller))
        numbers: dict[str, Any] = {
            "quality_every": quality_every,
            "quality_samples": quality_samples,
            "search_steps": search_steps,
            "seed": seed,
            "sample_per_replica": bool(sample_per_replica),
        }
        with self.distribute_strategy.scope():
            quality_of = quality_function(quality, getattr(self.network, "output_names", None) or ["output"])
        self._compiled_for = compile_config.CompileConfig(
            target=target,
            cost=cost_object,
            table=table,
            reward=reward_object,
            quality=quality_of,
            **numbers,
            given={"target_cost": target_cost, "cost": cost, "reward": reward, "quality": quality, **numbers},
        )
        self._reading_functions = None
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def _set_controller(self, controller: Controller) -> None:
        """Takes a new controller, if its options differ from those of the present one."""
        if controller.options() == self.controller.options():
            return
        if step := int(tf.convert_to_tensor(self.controller.step)):
            _LOG.warning("New options of the controller: what the search has learned in %d steps is forgotten.", step)
        replace_layer(self, "controller", controller)
        self.use_sample()

    def restart(self) -> None:
        """Forgets what the search has learned and decided. The weights stay; the next `fit` searches anew."""
        fresh = self._new_controller(self.controller.options())
        for variable, value in zip(self.controller.variables, fresh.variables):
            variable.assign(np.array(tf.convert_to_tensor(value)))
        self.use_sample()

    @property
    def target_cost(self) -> float | None:
        """The target in the cost's unit, None before `compile` or without one."""
        return None if self._compiled_for is None else self._compiled_for.target

    @property
    def cost(self) -> costs.Cost:
        """What is counted, as compiled."""
        return self._configuration.cost

    @property
    def cost_table(self) -> costs.CostTable:
        """Cost of samples of this model, as compiled."""
        return self._configuration.table

    @property
    def _configuration(self) -> compile_config.CompileConfig:
        if self._compiled_for is None:
            raise RuntimeError("Call compile(optimizer, loss, target_cost=...) first.")
        return self._compiled_for

    # ---- training

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        *args: Any,
        quality_data: tf.data.Dataset | Iterable[Any] | None = None,
        calibration_data: tf.data.Dataset | Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Keras' `fit`: trains the weights and searches the formats.

        The search is as long as `compile(search_steps=...)` says, or else as the first `fit`. In its last part
        (`frozen` of `Controller`) the formats stay as they were decided. A later `fit` goes on with an unfinished
        search, trains the weights for formats that are decided, or, compiled for another target, cost or reward,
        searches anew.

        Args:
          x, y, *args, **kwargs: As for any Keras model.
          quality_data: Examples that the weights never see, from which quality is read. A `tf.data.Dataset` of batches
            (x, y) or (x, y, sample_weight), a tuple of such arrays, which are shuffled, or a list or generator of such
            batches. None: quality is that of the training batch, which costs nothing but says less, see the README.
          calibration_data: Examples from which batch normalization is re-estimated at the end of the search, in any of
            these forms; labels are not needed. None: the first batches of a training data set, or as many examples from
            everywhere in the training part of arrays. A generator that was trained on cannot be read again: then the
            averages stay as they are, and a warning says so.

        Returns:
          Keras' History. Its logs hold, per epoch and beside loss and metrics:

          * reward: mean over the samples of the last reading, in units of quality;
          * cost: expected cost of a sample, in the cost's unit;
          * entropy: of the decisions, as a share of its maximum: 1 = all options alike, 0 = decided;
          * switch_rate: share of the decisions in which a step's sample differs from the step before.

        Raises:
          RuntimeError: `compile` was not called.
          TypeError: quality_data or calibration_data has none of these forms.
          ValueError: No `target_cost`; a number of steps that cannot be known; data that do not fit the model, or
            quality_data without labels.
          FloatingPointError: The loss, a weight or a moving average became NaN or infinite; names the step.

        Source: FLIQS, arXiv 2308.03290; docs/method.md says what differs.
        """
        if self._compiled_for is None:
            raise RuntimeError("Call compile(optimizer, loss, target_cost=...) before fit.")
        if self.target_cost is None:
            raise ValueError(
                "compile was called without target_cost; fit needs it, for example target_cost='0.25x INT8'."
            )
        return fitting.fit(self, super().fit, x, y, args, kwargs, quality_data, calibration_data)

    def configure_controller(self, total_steps: int, held_out: bool = False) -> None:
        """Tells the controller what it optimizes. `fit` calls it; a loop of your own must, once, and end with `finish`:

            qmodel.configure_controller(total_steps=len(batches))
            for x, y in batches:
                qmodel.train_on_batch(x, y)
            qmodel.finish(calibration_data=batches)

        Args:
          total_steps: Training steps of the search. `train_on_batch` takes the decision when it is due.
          held_out: True if readings come from `read_quality` and `learn`; else each training batch is a reading.
        """
        if held_out != self._held_out:
            self._held_out = held_out
            self.train_function = None
        target = self._configuration.target
        if target is None:
            raise ValueError(
                "compile was called without target_cost; a search needs it, for example target_cost='0.25x INT8'."
            )
        self.controller.configure(
            expected_cost=self.cost_table.expected,
            cost=self.cost_table.of_samples,
            target=target,
            reward=self._configuration.reward,
            total_steps=total_steps,
        )

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Keras' `train_on_batch`; takes the decision when it is due, see `configure_controller`."""
        logs = super().train_on_batch(*args, **kwargs)
        deciding.decide_if_due(self)
        return logs

    def finish(self, calibration_data: tf.data.Dataset | Iterable[Any] | None = None) -> Recipe:
        """Ends the search in a loop of your own, as `fit` does by itself: takes the decision if it is still open, sets
        the formats, and estimates the moving averages of batch normalization for them.

        Args:
          calibration_data: Examples to estimate from, see `fit`. None leaves the averages as training left them.

        Returns:
          The recipe that was decided.
        """
        deciding.decide(self)
        averages.recalibrate(self, calibration_data)
        return self.recipe()

    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        sample = self._draw(1)[0]
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
        """Samples to compare on one batch, int32 [quality_samples, decisions]. The first one is that of the training
        step, for the last step at least: an earlier one is drawn again, which XLA-compiled steps do otherwise.

        Args:
          step: The training step that the reading follows; None: the last one.
        """
        last = tf.convert_to_tensor(self.controller.step) - 1
        step = last if step is None else step
        samples = self._draw(self._configuration.quality_samples, step)
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

    # ---- results

    def recipe(self) -> Recipe:
        """The most likely format of every decision; fixed layers are in it too.

        Weights that were saved before the formats were decided hold a controller that has not decided: loaded after
        the search they replace its decision, and a warning says so. To go on with such weights take `recipe()` before
        `load_weights`, and give it to `deploy`.
        """
        if not self._is_fitting:
            self._warn_if_open()
        return self._most_likely_recipe()

    def _warn_if_open(self) -> None:
        step = int(tf.convert_to_tensor(self.controller.step))
        if step and not bool(tf.convert_to_tensor(self.controller.decided)):
            _LOG.warning(
                "The formats of %r are not decided: its controller is at step %d of a search that decides them at "
                "step %d. The most likely ones so far need not cost what was asked for. finish() decides now, fit goes "
                "on. If these are weights saved before the decision: take recipe() before load_weights, and give it to "
                "deploy(recipe).",
                self.name,
                step,
                self.controller.decided_at(),
            )

    def _most_likely_recipe(self) -> Recipe:
        chosen = np.asarray(self.controller.most_likely())
        formats = {d.name: d.options[i] for d, i in zip(self.decisions, chosen.tolist())}
        return costs.recipe_of(self.sites, formats)

    def deploy(
        self, recipe: Recipe | None = None, calibration_data: tf.data.Dataset | Iterable[Any] | None = None
    ) -> keras.Model:
        """A plain Keras model with fixed formats: no controller, no sampling.

        With the search's own recipe it computes what this model computes, to the bit. Another recipe changes what
        batch normalization sees: the moving averages are estimated anew. Of a search with `target="tflite"` the model
        is the one that the file computes, with biases as int32 holds them.

        Args:
          recipe: None: that of `recipe()`, with a warning if it is not decided yet.
          calibration_data: Examples to re-estimate the moving averages from, see `fit`. None: the training data of
            the last `fit`, if the recipe is not the search's own.

        Returns:
          A model of the same inputs and outputs, not compiled.

        Raises:
          ValueError: The recipe is not one for this model.
        """
        own = self._most_likely_recipe()
        if recipe is None:
            self._warn_if_open()
            recipe = own
        if calibration_data is None and dict(recipe.formats) != dict(own.formats):
            calibration_data = self.__dict__.get("_training_source")
        return deployment.deployed(self, own, recipe, calibration_data)

    # ---- saving

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "network": keras.saving.serialize_keras_object(self.network),
            "controller": {k: v for k, v in self.controller.get_config().items() if k not in ("n_options", "name")},
            "input_shape": self._example_shape,
            "profile": self.profile and self.profile.data,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> SearchModel:
        config = dict(config)
        config["controller"] = present_names(config.get("controller") or {})
        config["network"] = keras.saving.deserialize_keras_object(config["network"], custom_objects=custom_objects)
        if config.get("profile") is not None:
            config["profile"] = Profile(config["profile"])
        return cls(**config)

    def get_compile_config(self) -> dict[str, Any]:
        config = super().get_compile_config()
        if not config:
            return config
        return {**config, **compile_config.to_config(self._configuration.given)}

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        if not compile_config.holds_all(config, self.name):
            return
        self.compile(**compile_config.from_config(keras.saving.deserialize_keras_object(config)))
        if getattr(self, "optimizer", None) is not None:
            build_optimizer(self.optimizer, self.trainable_variables)
