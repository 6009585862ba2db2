"""The steps of an integer network, as data: operations on values, scales of codes, kernels with their biases."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from fliqs_tf.export import deployed
from fliqs_tf.numerics.formats import Format


@dataclasses.dataclass
class Step:
    """One operation on values.

    Attributes:
      kind: "quantize", "linear", "affine", "activation", or the name of an operation without weights.
      path: The layer that it comes from.
      inputs, output: Values.
      shapes: Of one example: that of every input, then that of the output.
      activation: What follows at once: "linear", "relu", "relu6".
      options: What the kind needs, see `lowering`.
      linear: The weights of a "linear" step.
      shift: The Keras variable that an offset of the output, per channel, can be added to; None if there is none.
      last: The call whose output the step gives, the last one of those that it stands for: path of the layer, and
        `dataflow.Call.index`. None if the output is inside of a call.
    """

    kind: str
    path: str
    inputs: tuple[int, ...]
    output: int
    shapes: tuple[tuple, ...]
    activation: str = "linear"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    linear: Linear | None = None
    shift: Any = None
    last: tuple[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class ActivationScale:
    """The values of a quantized activation: scale * code, |code| <= largest.

    Attributes:
      format: Its format.
      amax: The magnitude of the largest code, float32.
    """

    format: Format
    amax: np.float32

    @property
    def largest(self) -> int:
        """The largest code."""
        return int(self.format.max)

    @property
    def scale(self) -> np.float32:
        """amax / largest, as the rounding function computes it."""
        # A tensor that is always 0 has no range; LiteRT wants 6 / scale to be an int32.
        return np.maximum(deployed.scale_of(self.amax, self.format), np.float32(2.0**-27))[()]

    @property
    def spread(self) -> int:
        """How many times finer than the format's the steps of the int8 codes are that hold it, see export_tflite."""
        return 127 // self.largest

    @property
    def int8_scale(self) -> np.float32:
        """What one int8 code is worth."""
        return self.scale / np.float32(self.spread)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A kernel with its bias, output channels last.

    Attributes:
      operation: "conv", "depthwise" or "dense".
      format: That of the weights.
      codes: int8 [..., channels]; None for a float format.
      scale: float64 [channels], of the codes; ones for a float format.
      values: float64 [..., channels], codes * scale.
      bias: float64 [channels].
    """

    operation: str
    format: Format
    codes: np.ndarray | None
    scale: np.ndarray
    values: np.ndarray
    bias: np.ndarray

    def then(self, gain: np.ndarray, offset: np.ndarray) -> Linear:
        """The same followed by gain * y + offset, per channel."""
        return dataclasses.replace(
            self,
            codes=None if self.codes is None else np.where(gain < 0, -self.codes, self.codes) * (gain != 0),
            scale=np.where(gain == 0, self.scale, self.scale * np.abs(gain)),
            values=self.values * gain,
            bias=self.bias * gain + offset,
        )


@dataclasses.dataclass(frozen=True)
class IntegerNetwork:
    """Steps in the order of execution; inputs and outputs as in `dataflow.Dataflow`."""

    inputs: tuple[tuple[int, str, tuple, str], ...]
    steps: list[Step]
    outputs: tuple[int, ...]
    output_names: tuple[str, ...]

    @functools.cached_property
    def readers(self) -> dict[int, list[Step]]:
        """Value -> the steps that read it."""
        found: dict[int, list[Step]] = {}
        for step in self.steps:
            for value in dict.fromkeys(step.inputs):
                found.setdefault(value, []).append(step)
        return found


def ones(size: tuple[int, int], channels: int) -> Linear:
    """A depthwise kernel of ones, with codes as large as they get: biases are then fine."""
    shape = (*size, channels)
    codes, scale = np.full(shape, 127, np.int8), np.full(channels, 1 / 127)
    return Linear("depthwise", Format("INT8"), codes, scale, np.ones(shape), np.zeros(channels))
