"""Which Keras this process has: the one place that looks.

`tf.keras` is Keras 3 unless TF_USE_LEGACY_KERAS=1 makes it tf_keras. Every module of the package takes `keras`
from here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

# The package itself, not the `tf.keras` view of it, which leaves out parts (keras.saving, keras.StatelessScope).
if TYPE_CHECKING:
    import keras as keras
else:
    keras = importlib.import_module(tf.keras.Model.__module__.split(".")[0])
IS_KERAS_3 = keras.__name__ == "keras"
NAME = f"Keras {keras.__version__}" if IS_KERAS_3 else f"tf_keras {keras.__version__}"


def check_model(model: object) -> None:
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


def add_state(
    layer: keras.layers.Layer, name: str, shape: tuple[int, ...], dtype: str, *, initial: float = 0
) -> tf.Variable:
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


def build_optimizer(optimizer: keras.optimizers.Optimizer, variables: Sequence[tf.Variable]) -> None:
    """Makes the variables of an optimizer, which Keras otherwise does in the first step."""
    if hasattr(optimizer, "build"):
        optimizer.build(variables)
    else:  # one of tf_keras.optimizers.legacy
        optimizer._create_all_weights(variables)


def clone(network: keras.Model, clone_function: Callable[[keras.layers.Layer], keras.layers.Layer]) -> keras.Model:
    """A copy of a network of layers that a function makes from its own, not compiled: Keras 3 would compile it from a
    config, which has no form for a loss or a metric of one's own."""
    compiled = network.__dict__.get("compiled")
    if compiled is not None:
        object.__setattr__(network, "compiled", False)
    try:
        return keras.models.clone_model(network, clone_function=clone_function)
    finally:
        if compiled is not None:
            object.__setattr__(network, "compiled", compiled)


def only_shapes() -> bool:
    """True while Keras calls a layer only to learn the shape of its output, in a graph that it throws away."""
    return "scratch_graph" in getattr(tf.compat.v1.get_default_graph(), "name", "")


def float_value(variable: tf.Variable) -> tf.Tensor:
    """A variable as it is stored, also where mixed precision would cast what a layer reads."""
    if IS_KERAS_3:
        return tf.convert_to_tensor(variable._value)
    return tf.convert_to_tensor(getattr(variable, "_variable", variable))


@contextlib.contextmanager
def substituted(layer: keras.layers.Layer, attribute: str, tensor: tf.Tensor) -> Iterator[None]:
    """Within it, `layer.call` sees `tensor` where it would read the variable `layer.<attribute>`."""
    variable = getattr(layer, attribute)
    if IS_KERAS_3:
        with keras.StatelessScope(state_mapping=[(variable, tf.cast(tensor, variable.dtype))]):
            yield
    else:
        # tf_keras has no such scope: the attribute is set and put back, past the attribute tracking.
        object.__setattr__(layer, attribute, tf.cast(tensor, layer.compute_dtype))
        try:
            yield
        finally:
            object.__setattr__(layer, attribute, variable)


def weights_of_attributes(layer: keras.layers.Layer) -> list[tf.Variable]:
    """The weights of a layer without those of the layers that it holds."""
    if IS_KERAS_3:
        return [*layer._trainable_variables, *layer._non_trainable_variables]
    return [*layer._trainable_weights, *layer._non_trainable_weights]


def map_shapes(function: Callable[[Any], Any], shapes: Any) -> Any:
    """A structure of shapes (lists and dicts of them) with the function applied to each.

    Raises:
      ValueError: Something in it is not a shape.
    """
    if isinstance(shapes, (tf.TensorSpec, tf.TensorShape)) or (
        isinstance(shapes, (list, tuple)) and all(d is None or isinstance(d, numbers.Integral) for d in shapes)
    ):
        return function(shapes)
    if isinstance(shapes, dict):
        return {name: map_shapes(function, shape) for name, shape in shapes.items()}
    if isinstance(shapes, (list, tuple)):
        return [map_shapes(function, shape) for shape in shapes]
    raise ValueError(f"A shape is a list of sizes (None: open); there may be a list or dict of shapes. Got {shapes!r}.")


def recorded_input_specs(model: keras.Model) -> Any:
    """What a model says that its input is: a structure of `tf.TensorSpec` without the batch axis; None if nothing.

    Raises:
      ValueError: It takes several arguments.
    """
    if getattr(model, "inputs", None):
        inputs = getattr(model, "input", model.inputs[0])  # a Sequential model of Keras 3 has no `input`
        return tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype, t.name), inputs)
    if IS_KERAS_3:
        built = model.get_build_config() or {}
        several = "shapes_dict" in built
    else:
        called = model.save_spec()
        if called is not None:
            (first, *others), named = called
            if not others and not named:
                return tf.nest.map_structure(lambda s: tf.TensorSpec(s.shape[1:], s.dtype, s.name), first)
        several, built = called is not None, model.get_build_config() or {}
    if several:
        raise ValueError(
            f"Model {model.name!r} takes several arguments; one that `fit` trains takes one, a list or dict of tensors."
        )
    if built.get("input_shape") is None:
        return None
    return map_shapes(lambda shape: tf.TensorSpec(shape[1:], tf.float32), built["input_shape"])


def attributes(layer: keras.layers.Layer) -> dict[str, Any]:
    """What a layer holds, {name: value}, but what Keras itself keeps in it."""
    return {name: value for name, value in vars(layer).items() if name not in _own_attributes()}


@functools.cache
def _own_attributes() -> frozenset[str]:
    layer, inputs = keras.layers.Layer(), keras.Input((1,))
    layer.held = keras.layers.Layer()  # TensorFlow's tracking makes its attributes when there is something to track
    graph = keras.Model(inputs, keras.layers.ReLU()(inputs))
    return frozenset({*vars(layer), *vars(keras.Model()), *vars(graph), *vars(keras.Sequential())} - {"held"})


def replace_layers(owner: keras.layers.Layer, new: Mapping[int, keras.layers.Layer]) -> None:
    """Replaces layers where a built layer holds them: in its graph, in attributes, in lists, tuples and dicts there.

    Args:
      owner: The layer that holds them; it is changed, the order of its layers and attributes is not.
      new: {id of a layer: the layer to put in its place}.
    """

    def swapped(layers: Iterable[keras.layers.Layer]) -> list[keras.layers.Layer]:
        return [new.get(id(layer), layer) for layer in layers]

    def swap(layers: list[keras.layers.Layer]) -> None:
        list.__setitem__(layers, slice(None), swapped(layers))

    for part in (owner, getattr(owner, "_functional", None)):  # a Sequential model of Keras 3 has its graph inside
        if part is None:
            continue
        if IS_KERAS_3:
            tracked = part._tracker.config["layers"][1]
            swap(tracked)
            swap(part._layers)
            part._tracker.stored_ids["layers"] = {id(layer) for layer in tracked}
            if hasattr(part, "_operations"):
                by_depth = {depth: swapped(layers) for depth, layers in part._operations_by_depth.items()}
                object.__setattr__(part, "_operations", swapped(part._operations))  # past the attribute tracking
                object.__setattr__(part, "_operations_by_depth", by_depth)
        else:
            swap(getattr(part, "_self_tracked_trackables", []))
        for nodes in getattr(part, "_nodes_by_depth", {}).values():
            for node in nodes:
                of_node = "operation" if IS_KERAS_3 else "layer"
                setattr(node, of_node, new.get(id(getattr(node, of_node)), getattr(node, of_node)))
    if hasattr(owner, "_layer_call_argspecs"):  # a graph of tf_keras
        for layer in owner.layers:
            owner._layer_call_argspecs.setdefault(layer, inspect.getfullargspec(layer.call))
    order = list(vars(owner))
    for name, value in attributes(owner).items():
        changed = _replaced(value, new)
        if changed is not value:
            setattr(owner, name, changed)
    if not IS_KERAS_3:  # there an attribute that is set anew goes to the end
        for name in order:
            vars(owner)[name] = vars(owner).pop(name)


def add_layer(owner: keras.layers.Layer, attribute: str, layer: keras.layers.Layer) -> None:
    """Sets a layer as an attribute of one that is built already."""
    if IS_KERAS_3:
        owner._tracker.unlock()
    try:
        setattr(owner, attribute, layer)
    finally:
        if IS_KERAS_3:
            owner._tracker.lock()


def replace_layer(owner: keras.layers.Layer, attribute: str, layer: keras.layers.Layer) -> None:
    """Sets another layer as an attribute. Keras 3 by itself would go on counting the variables of the old one."""
    if IS_KERAS_3:
        owner._tracker.untrack(getattr(owner, attribute))
    setattr(owner, attribute, layer)


def _replaced(value: Any, new: Mapping[int, keras.layers.Layer]) -> Any:
    """The value of an attribute with layers replaced; the value itself if there are none."""
    if id(value) in new:
        return new[id(value)]
    if isinstance(value, dict):
        by_key = {key: _replaced(entry, new) for key, entry in value.items()}
        return by_key if any(by_key[key] is not entry for key, entry in value.items()) else value
    if isinstance(value, (list, tuple)):
        items = [_replaced(entry, new) for entry in value]
        if all(a is b for a, b in zip(items, value)):
            return value
        return (
            type(value)(*items) if hasattr(value, "_fields") else (items if isinstance(value, list) else tuple(items))
        )
    return value
