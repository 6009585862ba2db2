"""The steps of an integer network as data: operations on values, scales of codes, kernels with their biases."""

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
      inputs, output: The values that it reads and the one that it makes.
      shapes: Shape of every input and then of the output, of one example.
      activation: The activation that it ends with: "linear", "relu", "relu6".
      options: What the kind needs, see `lowering`.
      linear: The weights of a "linear" step.
      shift: The Keras variable to which an offset of the output, per channel, can be added; None if there is none.
      last: The last of the calls that the step stands for, whose output it makes: path of the layer, and
        `dataflow.Call.index`. None if its output lies inside a call.
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

    @property
    def kernel(self) -> Linear:
        """`linear`, where there must be one.

        Raises:
          ValueError: The step is no "linear" one.
        """
        if self.linear is None:
            raise ValueError(f"The step {self.kind!r} of layer {self.path!r} has no weights.")
        return self.linear


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
        # A tensor that is always 0 has no range, and LiteRT needs 6 / scale to fit into int32.
        return np.float32(np.maximum(deployed.scale_of(self.amax, self.format), 2.0**-27))

    @property
    def spread(self) -> int:
        """How many int8 codes there are to one code of the format, see `tflite_writer`."""
        return 127 // self.largest

    @property
    def int8_scale(self) -> np.float32:
        """The value of one int8 code."""
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

    @property
    def integer_codes(self) -> np.ndarray:
        """`codes`, where there must be some.

        Raises:
          ValueError: The weights are of a float format.
        """
        if self.codes is None:
            raise ValueError(f"Weights in {self.format} have no integer codes.")
        return self.codes

    def then(self, gain: np.ndarray, offset: np.ndarray | float) -> Linear:
        """This kernel followed by gain * y + offset, per channel: float64 [channels]."""
        return dataclasses.replace(
            self,
            codes=None if self.codes is None else np.where(gain < 0, -self.codes, self.codes) * (gain != 0),
            scale=np.where(gain == 0, self.scale, self.scale * np.abs(gain)),
            values=self.values * gain,
            bias=self.bias * gain + offset,
        )


@dataclasses.dataclass(frozen=True)
class IntegerNetwork:
    """Steps in the order of execution, with inputs and outputs as in `dataflow.Dataflow`."""

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
    """A depthwise kernel of ones, [*size, channels]. Its codes are the largest, so that biases have fine steps."""
    shape = (*size, channels)
    codes, scale = np.full(shape, 127, np.int8), np.full(channels, 1 / 127)
    return Linear("depthwise", Format("INT8"), codes, scale, np.ones(shape), np.zeros(channels))
