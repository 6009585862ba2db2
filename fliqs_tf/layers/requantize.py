"""Roundings of integer kernels, as Keras layers behind the layers that they belong to.

XNNPACK's int8 kernels sum codes in int32 and round accumulator * multiplier, a product in float32, halves to even. A
float32 layer ends within 1e-6 of that, on either side: next to the midpoint between two codes it may round the other
way, and the mean of 64 codes lies on a midpoint one time in 64.

LiteRT's int4 convolutions turn an accumulator into an output code in two steps: to multiples of 2^-n of a code, then to
codes, halves up. n depends on the scales of the channel. Up to a few values in a hundred end one code off the nearest.
XNNPACK has no kernels for int4 convolutions, nor for int4 matrices with an odd number of rows.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import add_state, keras
from fliqs_tf.graph import rewriting
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import shared_ranges


class _Rounding(keras.layers.Layer):
    """What the roundings share.

    Args:
      channels: Number of channels, the last axis; 1 if all are alike.

    Attributes:
      unit: [channels]; the value of 1 in the accumulator.
    """

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels
        self.unit = add_state(self, "unit", (channels,), "float32", initial=1)
        self.built = True

    def accumulator(self, x: tf.Tensor) -> tf.Tensor:
        """The sum of products behind a value: a whole number."""
        return tf.round(x / tf.convert_to_tensor(self.unit))

    def compute_output_shape(self, shape: Any) -> Any:
        return shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "channels": self.channels}


@keras.saving.register_keras_serializable("fliqs_tf")
class AccumulatorRounding(_Rounding):
    """Rounds as XNNPACK does: accumulator * multiplier, halves to even.

    Attributes:
      multiplier: [channels]; accumulator -> output code.
      scale: The value of one output code.
    """

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.multiplier = add_state(self, "multiplier", (channels,), "float32", initial=1)
        self.scale = add_state(self, "scale", (), "float32", initial=1)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        multiplier, scale = tf.convert_to_tensor(self.multiplier), tf.convert_to_tensor(self.scale)
        return tf.round(self.accumulator(x) * multiplier) * scale


@keras.saving.register_keras_serializable("fliqs_tf")
class KernelRounding(_Rounding):
    """Rounds to multiples of a grain and leaves halves of an output code for the quantizer to round up.

    Attributes:
      grain: [channels]; what the first step rounds to multiples of.
    """

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.grain = add_state(self, "grain", (channels,), "float32", initial=1)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        unit, grain = tf.convert_to_tensor(self.unit), tf.convert_to_tensor(self.grain)
        # A quarter of a grain breaks the tie and is too small to do anything else.
        return (tf.round(self.accumulator(x) * (unit / grain)) + 0.25) * grain


ROUNDINGS = (AccumulatorRounding, KernelRounding)


def single_rounding(source: float, weights: np.ndarray, target: float) -> tuple[type, dict]:
    """Class and state of the rounding of XNNPACK's int8 kernels.

    Args:
      source, target: Scales of input and output codes.
      weights: Scales of the weights' codes: [channels].
    """
    # In float32 and in this order, as the kernels compute it.
    unit, scale = np.float32(source) * weights.astype(np.float32), np.float32(target)
    return AccumulatorRounding, {"unit": unit, "multiplier": unit / scale, "scale": scale}


def double_rounding(source: float, weights: np.ndarray, target: float) -> tuple[type, dict]:
    """Class and state of the rounding of LiteRT's int4 kernels; arguments as for `single_rounding`."""
    weights = weights.astype(np.float32)
    # The power of two at or above the multiplier, at most 1.
    _, exponents = np.frexp(float(source) * weights.astype(np.float64) / float(target))
    grain = (float(target) * np.exp2(np.minimum(exponents, 0))).astype(np.float32)
    return KernelRounding, {"unit": np.float32(source) * weights, "grain": grain}


def insert(graph: ModelGraph, roundings: dict[tuple[str, int], list[tuple[type, dict]]]) -> ModelGraph:
    """A copy of a model that rounds behind the calls of its layers.

    A layer inside a network that is called several times can round in one way only: where those calls would need
    different roundings, nothing rounds behind it.

    Args:
      graph: Of a Functional or Sequential model.
      roundings: (path of a layer, which of its calls) -> what `single_rounding` or `double_rounding` gave, for each
        call of the network.
    """
    times = collections.Counter((call.path, call.index) for call in graph.dataflow.calls)
    added: dict[rewriting.Place, list[_Rounding]] = {}
    states: dict[str, dict] = {}
    for (path, index), found in roundings.items():
        kind, state = found[0]
        if len(found) == times[path, index] and all(_are_equal(found[0], other) for other in found):
            name = f"{path.replace('/', '_')}_kernel" + (f"_{index}" if index else "")
            added[path, index] = [kind(len(state["unit"]), name=name)]
            states[name] = state
    with_boundaries = shared_ranges.has_boundary_quantizers(graph)
    copy = rewriting.with_added(
        graph, added, kinds=shared_ranges.KINDS if with_boundaries else (keras.Model, keras.Sequential)
    )
    for _, layer in copy.of_type(*ROUNDINGS):
        for attribute, value in states.get(layer.name, {}).items():
            getattr(layer, attribute).assign(value)
    return copy


def _are_equal(one: tuple[type, dict], other: tuple[type, dict]) -> bool:
    return one[0] is other[0] and all(np.array_equal(value, other[1][name]) for name, value in one[1].items())
