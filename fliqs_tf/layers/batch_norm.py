"""Batch normalization while formats change.

The stored moving averages belong to the mixture of formats that training drew. To read the quality of one sample the
batch's own statistics are used and nothing is stored; before a recipe is used, the averages are estimated anew for it.
Either is done where Keras normalizes with the batch in training, and as it does there, masks included. A layer that is
frozen or called with `training=False` normalizes with its averages in training too, and keeps them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import tensorflow as tf

from fliqs_tf import replicas
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph import tracing, walking
from fliqs_tf.graph.model_graph import ModelGraph

_LOG = logging.getLogger("fliqs_tf")
# With SyncBatchNormalization of tf_keras, which is no subclass of the other.
_CLASS = next(cls for cls in reversed(keras.layers.BatchNormalization.__mro__) if "BatchNorm" in cls.__name__)

Moments: TypeAlias = tuple[tf.Tensor, tf.Tensor, tf.Tensor]
"""(count, mean, variance) of some values."""
Found: TypeAlias = dict[keras.layers.BatchNormalization, list[Moments]]


def batch_norms(graph: ModelGraph) -> list[keras.layers.BatchNormalization]:
    """The batch normalization layers of a model that follow the data; a frozen one is a constant scale and offset."""
    return [layer for _, layer in graph.of_type(_CLASS) if layer.trainable]


def check(graph: ModelGraph) -> None:
    """Raises for batch normalization that a copy of the model would not have.

    Raises:
      ValueError: Names the layer.
    """
    for path, layer in graph.of_type(_CLASS):
        for option in ("virtual_batch_size", "adjustment"):
            if getattr(layer, option, None) is not None:
                raise ValueError(
                    f"Layer {path!r} has {option}={getattr(layer, option)!r}, which its get_config does not write in a "
                    f"form that can be read: no copy of the model has it. Make the layer without {option}."
                )


def warn_of_closed(graph: ModelGraph) -> None:
    """Warns of layers that run their parts in loops of their own (TimeDistributed), batch normalization among them:
    neither readings nor estimation reach it."""
    reached = {id(layer) for layer in batch_norms(graph)}
    for path, layer in graph.layers:
        inside = [part for part in layer._flatten_layers() if isinstance(part, _CLASS) and id(part) not in reached]
        if not walking.children(layer) and layer not in inside and any(part.trainable for part in inside):
            _LOG.warning(
                "The batch normalization inside %r (%s) uses its moving averages when quality is read, and these stay "
                "as training leaves them: averages over all formats that were drawn.",
                path,
                type(layer).__name__,
            )


@contextlib.contextmanager
def batch_statistics(graph: ModelGraph, found: Found | None = None) -> Iterator[None]:
    """Inside it a model called with `training=True` runs batch normalization as in training and everything else as at
    inference; nothing is stored.

    Only a call with `training=True` shows which layers Keras would normalize with the batch. The others are given
    `training=False` from here, except layers of your own that hold batch normalization.

    Args:
      graph: Without batch normalization that follows the data everything in it computes as at inference.
      found: Filled with layer -> [(count, mean, variance) of each call]; `count` is that of examples or positions
        that are not masked.
    """
    layers = batch_norms(graph)
    around = {id(layer) for layer in layers}
    everything = list(graph.model._flatten_layers())
    holders = [each for each in everything if any(id(part) in around for part in each._flatten_layers())]
    around |= {id(layer) for layer in holders}
    overrides = {layer: _normalizer(layer, found) for layer in layers}
    overrides |= {layer: _at_rest(layer) for layer in everything if id(layer) not in around and _has_modes(layer)}
    with tracing.overridden_calls(overrides):
        yield


def _has_modes(layer: keras.layers.Layer) -> bool:
    parameters = inspect.signature(layer.call).parameters
    return "training" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _at_rest(layer: keras.layers.Layer) -> Callable[..., Any]:
    """The call of a layer as at inference."""
    call = layer.call
    names = list(inspect.signature(call).parameters)
    is_named = "training" in names
    place = names.index("training") if is_named else len(names)

    def at_rest(*args: Any, **kwargs: Any) -> Any:
        if is_named and len(args) > place:
            args = (*args[:place], False, *args[place + 1 :])
        elif is_named or "training" in kwargs:
            kwargs = {**kwargs, "training": False}
        return call(*args, **kwargs)

    return at_rest


def _normalizer(layer: keras.layers.BatchNormalization, found: Found | None) -> Callable[..., tf.Tensor]:
    """The call of a batch normalization as in training, except that what it would store goes to `found`."""
    call = layer.call
    is_plain = IS_KERAS_3 and type(layer).call is keras.layers.BatchNormalization.call

    def normalize(x: tf.Tensor, training: bool | None = None, **kwargs: Any) -> tf.Tensor:
        if not training:
            return call(x, training=False, **kwargs)
        mask = kwargs.get("mask")
        is_single = x.dtype != tf.float64
        if is_plain and is_single and mask is None and x.shape.rank == 4 and layer.axis in (-1, 3):
            y, mean, variance = _fused(layer, x)
        else:
            y, mean, variance = _unstored(layer, call, x, kwargs)
        if found is not None and mean is not None:
            mean, variance = tf.cast(mean, tf.float32), tf.cast(variance, tf.float32)
            found.setdefault(layer, []).append((_count(layer, x, mask, mean), mean, variance))
        return y

    return normalize


def _fused(layer: keras.layers.BatchNormalization, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """One operation, where the call of Keras 3 takes a forward pass twice as long."""
    channels = x.shape[-1]
    gamma = tf.ones(channels) if layer.gamma is None else tf.cast(tf.convert_to_tensor(layer.gamma), tf.float32)
    beta = tf.zeros(channels) if layer.beta is None else tf.cast(tf.convert_to_tensor(layer.beta), tf.float32)
    y, mean, variance = tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, epsilon=layer.epsilon)
    return tf.cast(y, x.dtype), mean, _biased(variance, x)


def _biased(variance: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Fused batch normalization gives the unbiased estimate of the variance, but normalizes with the biased one."""
    count = tf.cast(tf.size(x) // tf.size(variance), variance.dtype)
    return variance * (count - 1) / count


def _unstored(
    layer: keras.layers.BatchNormalization, call: Callable[..., tf.Tensor], x: tf.Tensor, kwargs: Mapping[str, Any]
) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor | None]:
    """(output, mean, variance) of Keras' own call in training; None, None if it would store nothing.

    Statistics are those of this replica, because replicas cannot send messages while calls are overridden; renorm,
    which takes the output back to what the averages say, is off.
    """
    options = {"momentum": 0.0, "renorm": False, "synchronized": False}
    options = {name: value for name, value in options.items() if hasattr(layer, name)}
    if IS_KERAS_3:
        averages = layer.moving_mean, layer.moving_variance
        nothing = [(v, tf.zeros(v.shape, v.dtype)) for v in averages]  # what counts with the momentum, be it NaN
        with _changed(layer, options), keras.StatelessScope(state_mapping=nothing) as scope:
            y = call(x, training=True, **kwargs)
        return (y, *(scope.get_current_value(v) for v in averages))
    stored = {}

    def store(variable: tf.Variable, value: tf.Tensor, *_: Any) -> tf.Tensor:
        stored[id(variable)] = tf.convert_to_tensor(value)
        return stored[id(variable)]

    with _changed(layer, {**options, "_assign_moving_average": store, "_assign_new_value": store}):
        y = call(x, training=True, **kwargs)
    mean, variance = (stored.get(id(v)) for v in (layer.moving_mean, layer.moving_variance))
    return y, mean, _biased(variance, x) if layer.fused and variance is not None else variance


@contextlib.contextmanager
def _changed(layer: keras.layers.Layer, values: Mapping[str, Any]) -> Iterator[None]:
    """Inside it attributes have other values, past the attribute tracking."""
    before = {name: vars(layer)[name] for name in values if name in vars(layer)}
    for name, value in values.items():
        object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                object.__setattr__(layer, name, before[name])
            else:
                object.__delattr__(layer, name)


def _count(layer: keras.layers.BatchNormalization, x: tf.Tensor, mask: tf.Tensor | None, mean: tf.Tensor) -> tf.Tensor:
    """How many values each entry of `mean` is the mean of, float32 of its shape."""
    if mask is None or getattr(layer, "fused", False):  # which ignores masks
        return tf.fill(tf.shape(mean), tf.cast(tf.size(x) / tf.size(mean), tf.float32))
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    kept = {axis % x.shape.rank for axis in axes}
    weights = tf.broadcast_to(tf.cast(mask, tf.float32)[..., None], tf.shape(x))
    return tf.reshape(tf.reduce_sum(weights, [a for a in range(x.shape.rank) if a not in kept]), tf.shape(mean))


def pooled(a: Moments, b: Moments) -> Moments:
    """(count, mean, variance) of two lots of values as one: exact, however the values were divided.

    variance = E[variance of a lot] + Var[mean of a lot], each lot weighing what it counts.
    """
    (seen, mean, variance), (count, new_mean, new_variance) = a, b
    share, step = tf.math.divide_no_nan(count, seen + count), new_mean - mean
    both = (mean + share * step, variance + share * (new_variance - variance) + share * (1 - share) * step**2)
    mean, variance = (
        # An empty lot has no mean: it may be NaN.
        tf.where(count == 0, old, tf.where(seen == 0, new, value))
        for old, new, value in zip((mean, variance), (new_mean, new_variance), both)
    )
    return seen + count, mean, variance


def _over_replicas(count: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> Moments:
    """The same of what all replicas hold, with a mean count."""
    if replicas.count() == 1:
        return count, mean, variance
    share = tf.math.divide_no_nan(count, replicas.mean(count))
    whole = replicas.mean(tf.math.multiply_no_nan(mean, share))
    variance = replicas.mean(tf.math.multiply_no_nan(variance + (mean - whole) ** 2, share))
    return replicas.mean(count), whole, variance


def recalibrate(graph: ModelGraph, batches: Iterable[Any], *, shared: bool = False) -> int:
    """Replaces the moving averages by mean and variance over all examples of the batches. Forward passes only.

    Each layer is normalized with the statistics of its batch meanwhile, as in training, but how examples are cut into
    batches does not count: the variance is that of all of them, about their common mean. Layers that Keras would not
    update in training keep their averages.

    Under a distribution strategy every replica takes its share of each batch, as if it were a batch of its own. All
    workers must call it together, with as many batches.

    Args:
      graph: Of a model whose formats are set.
      batches: Iterable of model inputs.
      shared: True if each batch is already shared out among the replicas of this process.

    Returns:
      The number of batches used; 0 leaves the averages as they are.
    """
    model, layers = graph.model, batch_norms(graph)
    strategy = model.distribute_strategy
    if not layers:
        return 0

    def statistics(x: Any) -> list[Moments]:
        found: Found = {}
        with batch_statistics(graph, found):
            model(x, training=True)
        merged = []
        for layer in layers:
            calls = [tuple(tf.cast(t, tf.float32) for t in call) for call in found.get(layer, ())]
            nothing = (tf.zeros(layer.moving_mean.shape),) * 3
            for call in calls[1:]:
                calls[0] = pooled(calls[0], call)
            merged.append(_over_replicas(*(calls or [nothing])[0]))
        return merged

    @tf.function(reduce_retracing=True)
    def step(x: Any, counts: list[tf.Tensor]) -> list[tf.Tensor]:
        after = []
        for layer, count, values in zip(layers, counts, strategy.run(statistics, (x,))):
            values = tuple(strategy.reduce("MEAN", value, axis=None) for value in values)
            stored = layer.moving_mean, layer.moving_variance
            before = (count, *(tf.cast(tf.convert_to_tensor(v), tf.float32) for v in stored))
            count, *values = pooled(before, values)
            for variable, value in zip(stored, values):
                variable.assign(tf.cast(value, variable.dtype))
            after.append(count)
        return after

    used, counts = 0, [tf.zeros(layer.moving_mean.shape) for layer in layers]
    for x in batches:
        if strategy.num_replicas_in_sync > 1 and not shared:
            if tf.nest.flatten(x)[0].shape[0] < strategy.num_replicas_in_sync:
                continue
            x = strategy.experimental_distribute_values_from_function(_share_of(x, strategy.num_replicas_in_sync))
        used += 1
        counts = step(x, counts)
    for layer in layers:
        if used and hasattr(layer, "moving_stddev"):  # of renorm: training makes the moving variance from it
            variance = tf.convert_to_tensor(layer.moving_variance)
            layer.moving_stddev.assign(tf.sqrt(variance + layer.epsilon))
    return used


def _share_of(x: Any, count: int) -> Callable[[tf.distribute.ReplicaContext], Any]:
    return lambda context: tf.nest.map_structure(
        lambda t: tf.convert_to_tensor(t)[context.replica_id_in_sync_group :: count], x
    )
