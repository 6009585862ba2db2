"""Weight and activation quantizers: tensor -> fake-quantized tensor, in the format that a decision has chosen.

A quantizer holds a `Space`. With one format it is fixed; with several it reads its `choice`, an int32 variable that the
search assigns. Either way the same kernel runs, so a format gives the same bits during the search and after it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf import replicas
from fliqs_tf._keras import add_state, keras
from fliqs_tf.numerics import rounding
from fliqs_tf.numerics.space import Space, SpaceLike

RANGE_MOMENTUM = 0.99
# Share of the weight that an average over many batches has. From there on, 69 batches, a frozen quantizer keeps it.
SETTLED = 0.5
_in_step = contextvars.ContextVar("in_step", default=False)


@contextlib.contextmanager
def training_step() -> Iterator[None]:
    """Inside it, while a training step is traced, ranges follow the data even where `training` is False.

    A network inside another may be called that way, so that its batch normalization keeps what it has learned. If no
    data set its ranges, its output for an example would depend on the rest of the batch.
    """
    token = _in_step.set(True)
    try:
        yield
    finally:
        _in_step.reset(token)


class Quantizer(keras.layers.Layer):
    """What weight and activation quantizers share: a space, and the choice of a format from it.

    Args:
      formats: The formats to choose from, as `Space` takes them.
      choice: The variable that holds the choice, of a quantizer that follows the same decision. None: one of its own.
    """

    def __init__(self, formats: SpaceLike, choice: tf.Variable | None = None, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.space = Space(formats)
        self._rows = np.stack([rounding.row(f) for f in self.space.formats])
        self.choice = choice
        if choice is None and len(self.space) > 1:
            # Until a search says otherwise, the widest format.
            self.choice = add_state(self, "choice", (), "int32", initial=len(self.space) - 1)
        # A variable even for a fixed format: a graph optimizer computes ahead with constants, and the bits would not
        # be those of the search.
        self._row = add_state(self, "row", (rounding.ROW_SIZE,), "float32") if self.choice is None else None
        if self._row is not None:
            self._row.assign(self._rows[0])
        self.supports_masking = True
        self.built = True

    def format_row(self) -> tf.Tensor:
        """Kernel row of the chosen format: float32 [rounding.ROW_SIZE]."""
        if self._row is not None:
            return tf.convert_to_tensor(self._row)
        return tf.gather(tf.constant(self._rows), tf.convert_to_tensor(self.choice))

    def pass_through(self) -> None:
        """Stops rounding: for a fixed float format that a platform computes in float32.

        Raises:
          ValueError: There are several formats to choose from.
        """
        if self._row is None:
            raise ValueError(
                f"{self.name!r} has formats to choose from; only one of a fixed format can pass values on."
            )
        self._row.assign(rounding.row("FP32"))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("dtype", None)
        return {**config, "formats": list(self.space.names)}


@keras.saving.register_keras_serializable("fliqs_tf")
class WeightQuantizer(Quantizer):
    """Quantizes a weight with one scale per output channel, amax taken from the current weight at every step.

    Args:
      formats: The formats to choose from, as `Space` takes them.
      channel_axes: Axes of the weight that hold output channels.
    """

    def __init__(self, formats: SpaceLike, channel_axes: Sequence[int] = (-1,), **kwargs: Any) -> None:
        super().__init__(formats, **kwargs)
        self.channel_axes = tuple(channel_axes)

    def call(self, weight: tf.Tensor) -> tf.Tensor:
        amax = rounding.absolute_max(weight, self.channel_axes)
        return rounding.quantize(weight, amax, self.format_row(), saturates=False)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "channel_axes": list(self.channel_axes)}


@keras.saving.register_keras_serializable("fliqs_tf")
class ActivationQuantizer(Quantizer):
    """Quantizes an activation with one scale per tensor, amax from a moving average of the batches' amax.

    The average is zero-debiased: `range` holds the average and the decayed sum of weights. It moves in training only:
    where `training` is True, and everywhere in a training step of a `SearchModel`. A frozen quantizer (`trainable` is
    False on it, or on the layer around it) keeps its range once that has settled (`SETTLED`), and follows the data
    until then. If layers in front of a frozen one go on learning, freeze only what is inside, `layer.quantized_layer`.

    Before any training amax is that of the batch itself; `fliqs_tf.layers.ranges.calibrate` sets it without training.
    Under a distribution strategy the batch is that of all replicas together.

    Args:
      formats: The formats to choose from, as `Space` takes them. They share the range.
      momentum: Decay of the moving average, per training step (our choice: 0.99).
      clip: Factor on amax, in (0, 1]: below 1 it clips the largest values, which gives the others finer steps. It is an
        attribute too: set it on the quantizers of a wrapped model before training.

    Raises:
      ValueError: momentum outside [0, 1) or clip outside (0, 1].
    """

    def __init__(self, formats: SpaceLike, momentum: float = RANGE_MOMENTUM, clip: float = 1.0, **kwargs: Any) -> None:
        super().__init__(formats, **kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
        if not 0 < clip <= 1:
            raise ValueError(f"clip must be in (0, 1], got {clip}.")
        self.momentum, self.clip = momentum, clip
        self.range = add_state(self, "range", (2,), "float32")
        # Functions, not layers: a quantizer belongs to its own layer, whoever it follows.
        self.__dict__["_followers"], self.__dict__["_follows"] = [], False

    def follow(self, leader: ActivationQuantizer) -> None:
        """Takes over the range of a quantizer that rounds the same values earlier on, now and throughout training."""
        if leader.range[1] > 0:
            self.range.assign(leader.range)
        if not self._follows:
            leader._followers.append(self.range.assign)
            self.__dict__["_follows"] = True

    @property
    def follows(self) -> bool:
        """True if it takes the range of another quantizer."""
        return self._follows

    def call(self, x: tf.Tensor, training: bool | None = False, trainable: bool | None = None) -> tf.Tensor:
        """Rounds x. `trainable` is that of a layer around it that Keras does not know of; None: its own."""
        if (training or _in_step.get()) and not self._follows:
            largest, amax = self.observe(x, self.trainable if trainable is None else trainable)
            amax = amax * self.clip
            return rounding.quantize(x, amax, self.format_row(), saturates=largest > amax)
        return rounding.quantize(x, _amax(x, tf.convert_to_tensor(self.range)) * self.clip, self.format_row())

    def observe(self, x: tf.Tensor, trainable: bool = True) -> tuple[tf.Tensor, tf.Tensor]:
        """Updates the range, and those that follow it, by one batch; returns its largest magnitude and the new amax."""
        seen = tf.convert_to_tensor(self.range)
        largest = replicas.maximum(rounding.absolute_max(x))
        moved, amax = _moved_range(largest, seen, self.momentum)
        if not trainable:
            is_open = seen[1] < SETTLED
            moved, amax = tf.where(is_open, moved, seen), tf.where(is_open, amax, seen[0])
        for assign in (self.range.assign, *self._followers):
            assign(moved)
        return largest, amax

    def compute_output_shape(self, shape: Any) -> Any:
        return shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "momentum": self.momentum, "clip": self.clip}


# Traced once, whatever the shape of x: in the graph of a network each is one operation.
_ANY, _ONE, _RANGE = (tf.TensorSpec(shape, tf.float32) for shape in (None, [], [2]))


@tf.function(input_signature=[_ONE, _RANGE, _ONE], autograph=False)
def _moved_range(largest: tf.Tensor, seen: tf.Tensor, momentum: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(range after a tensor whose amax is `largest`, the amax that it stands for)."""
    average, weight = tf.unstack(seen)
    weight = momentum * weight + (1.0 - momentum)
    amax = average + (largest - average) * ((1.0 - momentum) / weight)
    return tf.stack([amax, weight]), amax


@tf.function(input_signature=[_ANY, _RANGE], autograph=False)
def _amax(x: tf.Tensor, seen: tf.Tensor) -> tf.Tensor:
    """The amax that a range stands for; that of x itself if no data has set the range."""
    return tf.cond(seen[1] > 0, lambda: seen[0], lambda: rounding.absolute_max(x))
