"""The search: a Keras model that trains one set of weights while a controller learns which formats it needs.

A search has two halves. Until the formats are decided

1. weights train in the widest formats of 8 bits or fewer;
2. every few steps the controller draws samples, an option for every decision each; their quality is read on one batch
   that trains no weight, and the controller learns from quality and cost.

After the decision, most of the run, weights train with what was decided. Weights that come trained are read first, and
every step trains with the decision. In the paper's form, train_with="sample", each training step computes with a sample
of its own, and may be the reading as well. Between steps the model is always the network of `recipe()`.

Source of the method: FLIQS, arXiv 2308.03290. What differs from it by default, and why, is in docs/method.md.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf import costs
from fliqs_tf._keras import IS_KERAS_3, add_state, build_optimizer, check_strategy, keras, map_shapes, replace_layer
from fliqs_tf.costs.profile import Profile
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import shared_ranges
from fliqs_tf.numerics.formats import Format
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.search import averages, budgets, compile_config, deciding, deployment, fitting, rewards
from fliqs_tf.search.controller import Controller, present_names
from fliqs_tf.search.sampled_model import SampledModel

_LOG = logging.getLogger("fliqs_tf")


@keras.saving.register_keras_serializable("fliqs_tf")
class SearchModel(SampledModel):
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
        self._held_out = False
        # What a step returns is the same on all replicas; tf_keras would add it up.
        self.distribute_reduction_method = "first"
        self._batch = threading.local()
        self.controller = self._new_controller(controller or {})
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

    # ---- configuration

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "rmsprop",
        loss: Any = None,
        metrics: Any = None,
        *,
        target_cost: float | str | None = None,
        cost: str | costs.Cost | Profile | None = None,
        reward: str | rewards.Reward | Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = "one_sided",
        quality: str | keras.metrics.Metric | Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = "loss",
        quality_every: int | None = None,
        quality_samples: int = 4,
        search_steps: int | None = None,
        seed: int = 0,
        sample_per_replica: bool = False,
        train_with: str | None = None,
        pretrained: bool | None = None,
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
          reward: "one_sided" (the target is a limit), "absolute" (the paper's: both sides count), "soft_exponential",
            "hard_exponential", an object of `fliqs_tf.rewards`, or a function (quality, cost / target) -> reward.
          quality: "loss" (its negative), "accuracy", a Keras metric, or a function (y_true, y_pred) -> what to
            maximize, a number or one per example.
          quality_every: Training steps between two readings. None: as many as make 300 readings, or 20 per decision if
            that is more (our choice), but not less than 2.
          quality_samples: Samples compared on the same batch at a reading (our choice: 4).
          search_steps: Length of the search; in the last part of it formats are decided and stay (`frozen` of
            `Controller`). None: all steps of the first `fit`.
          seed: Of the draws.
          sample_per_replica: Under a distribution strategy: False: replicas compute with the same sample, and quality
            is that of the whole batch. True: each draws its own, reads its share of the batch, and all readings
            count: more samples, noisier each.
          train_with: What weights train with until the formats are decided. "widest": the widest formats of 8 bits or
            fewer. "sample": what the controller draws, as in the paper; then a run without `quality_data` has its
            readings from the training step itself. None: "widest", but "sample" with estimator="reinforce", and where
            there are no batches to read from: a generator of training data without `quality_data`.
          pretrained: True: the weights come trained, so that the formats are decided before the first training step.
            False: they are decided while training. None: looks whether labels and inputs belong together for the
            network. Not with train_with="sample".
          controller: Options of `Controller`, a dict. Where they differ from those of the present controller, a new one
            begins and what was learned is forgotten; None keeps it.

        Raises:
          ValueError: A target out of reach (prints the reachable range), unknown names, numbers of steps or samples
            that are not whole, a reward that needs positive quality with quality="loss".
        """
        check_strategy(self.distribute_strategy)
        if IS_KERAS_3 and not tf.config.list_physical_devices("GPU") and not tf.config.list_physical_devices("TPU"):
            kwargs.setdefault("jit_compile", False)
        new_controller = None if controller is None else self._new_controller(controller)
        config = compile_config.checked(
            self,
            estimator=(new_controller or self.controller).estimator,
            target_cost=target_cost,
            cost=cost,
            reward=reward,
            quality=quality,
            quality_every=quality_every,
            quality_samples=quality_samples,
            search_steps=search_steps,
            seed=seed,
            sample_per_replica=sample_per_replica,
            train_with=train_with,
            pretrained=pretrained,
        )
        if new_controller is not None:
            self._set_controller(new_controller)
        self._compiled_for = config
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
        self.__dict__.pop("_averages_of", None)
        self.use_sample()

    @property
    def target_cost(self) -> float | None:
        """The target in the cost's unit, None before `compile` or without one."""
        return None if self._compiled_for is None else self._compiled_for.target

    @property
    def cost(self) -> costs.Cost:
        """What is counted, as compiled."""
        return self._configuration.cost

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
            batches. None: quality is read from the training data, which are iterated a second time for it; of a
            generator, and with train_with="sample", it is that of the training batch itself.
          calibration_data: Examples from which batch normalization is re-estimated at the end of the search, in any of
            these forms; labels are not needed. None: the first batches of a training data set, or as many examples from
            everywhere in the training part of arrays, and only if the averages may belong to other formats: training
            that has gone on for some hundred steps since the decision has moved them by itself. A generator that was
            trained on cannot be read again: then the averages stay as they are, and a warning says so.

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
        if not held_out and self._configuration.train_with == "widest":
            raise ValueError(
                "train_with='widest' needs readings on batches of their own: give fit(quality_data=...) or training "
                "data that can be iterated twice; in a loop of your own configure_controller(held_out=True), with "
                "read_quality and learn."
            )
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
            trains_with_samples=self.trains_with_samples,
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

    # ---- results

    def recipe(self, target_cost: float | str | None = None) -> Recipe:
        """The most likely format of every decision; fixed layers are in it too.

        Weights that were saved before the formats were decided hold a controller that has not decided: loaded after
        the search they replace its decision, and a warning says so. To go on with such weights take `recipe()` before
        `load_weights`, and give it to `deploy`.

        Args:
          target_cost: Another budget, as for `compile`: the best recipe for it by what the critic has learned, without
            another search. The weights were trained for the recipe of the search; docs/method.md has what it costs to
            deploy another one with them.

        Raises:
          ValueError: A budget out of reach.
          RuntimeError: Quality was never read, or estimator="reinforce", which knows no other budgets.
        """
        if target_cost is not None:
            return budgets.recipe(self, target_cost)
        if not self._is_fitting:
            self._warn_if_open()
        return self._most_likely_recipe()

    def pareto(self, targets: Sequence[float | str] | None = None) -> list[budgets.Budget]:
        """The best recipe for each of several budgets, and what the critic expects it to lose, from one search.

        Args:
          targets: Budgets, as `target_cost` of `compile`. None: 12 from the least to the greatest cost.

        Returns:
          A `Budget` for each, in order.

        Raises:
          ValueError: A budget out of reach.
          RuntimeError: See `recipe`.
        """
        return budgets.table(self, targets)

    def uniform_budgets(self) -> dict[str, budgets.Budget]:
        """{format: what the critic expects of it everywhere}, for formats that every decision may take."""
        return budgets.uniform(self)

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
        return budgets.recipe_of(self, np.asarray(self.controller.most_likely()))

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
