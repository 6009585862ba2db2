"""Taking the decision, once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from fliqs_tf import replicas
from fliqs_tf._keras import keras


def decide_on(model: keras.Model, sample: np.ndarray) -> None:
    """Takes a decision that was found by other means, if it is open."""
    if not bool(tf.convert_to_tensor(model.controller.decided)):
        _decide(model, lambda _: replicas.Workers(model.distribute_strategy).first(sample))


def decide(model: keras.Model) -> None:
    """Takes the decision, if it is open."""
    if not bool(tf.convert_to_tensor(model.controller.decided)):
        _decide(model, replicas.Workers(model.distribute_strategy).first)


def _decide(model: keras.Model, agree: Callable[[np.ndarray], np.ndarray]) -> None:
    model.controller.decide(agree)
    model.__dict__["_decided_for"] = model._compiled_for.decides_on
    model.__dict__["_decided_step"] = int(tf.convert_to_tensor(model.controller.step))
    model.use_sample()


def decide_if_due(model: keras.Model) -> None:
    """Takes the decision at the step that it is planned for, or after it."""
    if int(tf.convert_to_tensor(model.controller.step)) >= model.controller.decided_at():
        decide(model)
