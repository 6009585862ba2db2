"""Which Keras this process has: the one place that looks.

`tf.keras` is Keras 3 unless TF_USE_LEGACY_KERAS=1 makes it tf_keras. Every module of the package takes `keras`
from here.
"""

from __future__ import annotations

import contextlib
import importlib

import numpy as np
import tensorflow as tf

# The package itself, not the `tf.keras` view of it, which leaves out parts (keras.saving, keras.StatelessScope).
keras = importlib.import_module(tf.keras.Model.__module__.split(".")[0])
IS_KERAS_3 = keras.__name__ == "keras"
NAME = f"Keras {keras.__version__}" if IS_KERAS_3 else f"tf_keras {keras.__version__}"


def check_model(model) -> None:
    """Raises unless `model` is a model of this process's `tf.keras`.

    Raises:
      TypeError: Says which Keras the model is of and how to switch.
    """
    if isinstance(model, keras.Model):
        return
    modules = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    if "keras" in modules or "tf_keras" in modules:
        other = "Keras 3 (`import keras`)" if "keras" in modules else "tf_keras (Keras 2)"
        switch = (
            "unset TF_USE_LEGACY_KERAS before Python starts"
            if not IS_KERAS_3
            else "set TF_USE_LEGACY_KERAS=1 before Python starts"
        )
        raise TypeError(
            f"The model {getattr(model, 'name', '')!r} is a model of {other}, but tf.keras is {NAME} here. "
            f"Build it with tf.keras, or {switch}."
        )
    raise TypeError(f"Expected a tf.keras model, got {type(model).__name__}.")


def check_strategy(strategy: tf.distribute.Strategy) -> None:
    """Raises unless this process's Keras can train under a distribution strategy.

    Raises:
      ValueError: Several machines or a TPU under Keras 3; says how to switch.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}
    found = names & {"CollectiveAllReduceStrategy", "TPUStrategyV2", "TPUStrategy", "ParameterServerStrategyV2"}
    if IS_KERAS_3 and found:
        raise ValueError(
            f"{type(strategy).__name__} does not work with {NAME}, which trains under MirroredStrategy only. Set "
            f"TF_USE_LEGACY_KERAS=1 before Python starts: tf.keras is then tf_keras (pip install tf-keras)."
        )


def add_state(layer, name: str, shape: tuple[int, ...], dtype: str, *, initial=0):
    """A variable that the optimizer leaves alone, the same number under both Kerases.

    Replicas of a distribution strategy have a copy each and assign their own value, without a word to the others.
    What has to be equal on all of them is made so before it is assigned, see `replicas`.

    Args:
      layer: The layer that owns it.
      name, shape, dtype: As for `add_weight`. Mixed precision does not change the dtype.
      initial: Value of every entry.
    """
    options = {"name": name, "shape": shape, "dtype": dtype, "trainable": False}
    options["initializer"] = keras.initializers.Constant(np.dtype(dtype).type(initial).item())
    if IS_KERAS_3:
        return layer.add_weight(**options, autocast=False, aggregation="none")
    options["name"] = f"{layer.name}/{name}"  # unique among the variables of the layer around it, as HDF5 files need
    return layer.add_weight(**options, experimental_autocast=False, aggregation=tf.VariableAggregation.NONE)


def only_shapes() -> bool:
    """True while tf_keras calls a layer only to learn the shape of its output, in a graph that it throws away.

    Keras 3 asks the layer's `compute_output_shape` instead.
    """
    return not IS_KERAS_3 and getattr(tf.compat.v1.get_default_graph(), "name", "").endswith("_scratch_graph")


def float_value(variable) -> tf.Tensor:
    """A variable as it is stored, float32 also where mixed precision would cast what a layer reads."""
    if IS_KERAS_3:
        return tf.convert_to_tensor(variable._value)
    return tf.convert_to_tensor(getattr(variable, "_variable", variable))


@contextlib.contextmanager
def substituted(layer, attribute: str, tensor):
    """Within it, `layer.call` sees `tensor` where it would read the variable `layer.<attribute>`."""
    variable = getattr(layer, attribute)
    if IS_KERAS_3:
        with keras.StatelessScope(state_mapping=[(variable, tensor)]):
            yield
    else:
        # tf_keras has no such scope: the attribute is set and put back, past the attribute tracking.
        object.__setattr__(layer, attribute, tf.cast(tensor, layer.compute_dtype))
        try:
            yield
        finally:
            object.__setattr__(layer, attribute, variable)


def weights_of_attributes(layer) -> list:
    """The weights of a layer without those of the layers that it holds."""
    if IS_KERAS_3:
        return [*layer._trainable_variables, *layer._non_trainable_variables]
    return [*layer._trainable_weights, *layer._non_trainable_weights]


def replace_held(owner, attribute: str, value, replaced) -> None:
    """Sets `owner.<attribute>` of a built layer, in its place among the attributes.

    Args:
      owner, attribute: The layer and the name of its attribute.
      value: What the attribute is to be: a layer, or a list, tuple or dict with layers.
      replaced: [(layer before, layer now)] of the layers that differ.
    """
    if IS_KERAS_3:
        tracker = owner._tracker
        locked = tracker.locked
        tracker.unlock()
        for before, now in replaced:
            if tracker.is_in_store("layers", before):
                tracker.replace_tracked_value("layers", before, now)
        setattr(owner, attribute, value)
        if locked:
            tracker.lock()
    else:
        order = list(vars(owner))
        setattr(owner, attribute, value)
        # It took the attribute away and put it at the end.
        for name in order:
            vars(owner)[name] = vars(owner).pop(name)
