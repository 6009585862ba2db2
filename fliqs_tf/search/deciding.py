"""Taking the decision, once."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from fliqs_tf import replicas
from fliqs_tf._keras import keras


def decide_on(model: keras.Model, sample: np.ndarray) -> None:
    """Takes a decision that was found by other means, if it is open."""
    if not bool(tf.convert_to_tensor(model.controller.decided)):
        model.controller.decide(lambda _: replicas.Workers(model.distribute_strategy).first(sample))
        model.__dict__["_decided_for"] = model._compiled_for.decides_on
        model.use_sample()


def decide(model: keras.Model) -> None:
    """Takes the decision, if it is open."""
    if bool(tf.convert_to_tensor(model.controller.decided)):
        return
    model.controller.decide(replicas.Workers(model.distribute_strategy).first)
    model.__dict__["_decided_for"] = model._compiled_for.decides_on
    model.use_sample()


def decide_if_due(model: keras.Model) -> None:
    """Takes the decision at the step that it is planned for, or after it."""
    if int(tf.convert_to_tensor(model.controller.step)) >= model.controller.decided_at():
        decide(model)
