"""What a deployed model holds: its quantized layers, their formats, and their weights as values and scales.

An exporter writes values (or their codes, `fliqs_tf.numerics.encoding`) and scales; `weights_of` gives weights that a
Keras layer quantizes to exactly these values and scales.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import check_model, float_value
from fliqs_tf.graph import layer_types, walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.attention import Product
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from fliqs_tf.numerics import rounding
from fliqs_tf.numerics.formats import Format
from fliqs_tf.quantize.recipe import Recipe, add_float_inputs

HOW_TO_CALIBRATE = (
    "train the model, or give fliqs_tf.apply calibration_data=batches of inputs (layers that are called with "
    "training=False need them in any case); fliqs_tf.ranges.calibrate(model, batches) does so for an existing model"
)


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight: weight = values * scale, in float32.

    Attributes:
      format: Its format.
      values: float32 array of the weight's shape: values of the format, without the scale.
      scale: float32 array that broadcasts to it, one per output channel; None for BF16 and FP32, which have no scale.
    """

    format: Format
    values: np.ndarray
    scale: np.ndarray | None


def quantized_layers(graph: ModelGraph) -> list[tuple[str, Quantized]]:
    """(path, layer) of the quantized layers of a deployed model, in its order.

    Raises:
      TypeError: Not a model of this process's `tf.keras`.
      ValueError: Formats are still to be decided, or no layer is quantized.
    """
    return [(path, layer) for path, layer in _decided(graph) if isinstance(layer, Quantized)]


def _decided(graph: ModelGraph) -> tuple[tuple[str, Quantized | Product], ...]:
    """(path, layer) of quantized layers and products; raises as `quantized_layers`."""
    model = graph.model
    if hasattr(model, "deploy"):
        raise ValueError(f"Model {model.name!r} is still being searched: give what its deploy() returns.")
    check_model(model)
    layers = graph.of_type(Quantized, Product)
    if not layers:
        raise ValueError(
            f"Model {model.name!r} has no quantized layer: give what deploy() of a searched model or fliqs_tf.apply "
            f"returns."
        )
    for path, layer in layers:
        for quantizer in (*layer.weight_quantizers, *layer.activation_quantizers):
            if quantizer.choice is not None:
                raise ValueError(
                    f"Layer {path!r} may still take {', '.join(quantizer.space.names)}: its format is not decided. "
                    f"Give what deploy() of the searched model returns."
                )
    return layers


def format_of(quantizer: Quantizer) -> Format:
    """The format of a fixed quantizer."""
    (fmt,) = quantizer.space.formats
    return fmt


def recipe(graph: ModelGraph) -> Recipe:
    """The recipe that a deployed model follows.

    Raises:
      ValueError: As `quantized_layers`.
    """
    layers = _decided(graph)
    in_float = [path for path, _ in graph.with_kernels]
    info = {"float_layers": in_float} if in_float else {}
    # Tables do not tell the kind of recipe: they have no input to quantize.
    kinds = {_kind(layer) for _, layer in layers if not layer_types.table(walking.unwrapped(layer))} or {"weights"}
    formats: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    if len(kinds) > 1:  # layers quantized one by one, which a recipe of one kind cannot express
        for path, layer in layers:
            inputs = layer.activation_quantizer
            formats[f"{path}/weights"] = format_of(layer.weight_quantizers[0]).name
            formats[f"{path}/activations"] = format_of(inputs).name if inputs is not None else "FP32"
        return Recipe(formats, "separate", info=info)
    (kind,) = kinds
    for path, layer in layers:
        reads = [(layer.weight_decision, layer.weight_quantizers[0])]
        reads += [(layer.activation_decision, q) for q in layer.activation_quantizers[:1]]
        for decision, quantizer in reads:
            formats[decision] = format_of(quantizer).name
            if path not in members.setdefault(decision, []):
                members[decision].append(path)
    if kind == "separate":
        add_float_inputs(formats, members)
    alone = {d: [d.rpartition("/")[0] if kind == "separate" else d] for d in members}
    return Recipe(formats, kind, {d: paths for d, paths in members.items() if paths != alone[d]}, info)


def _kind(layer: Quantized | Product) -> str:
    if layer.activation_quantizer is None:
        return "weights"
    return "together" if layer.activation_decision == layer.weight_decision else "separate"


def quantized_weights(path: str, layer: Quantized) -> dict[str, QuantizedWeight]:
    """{attribute of the layer inside: its quantized weight}, as the layer computes with it.

    Args:
      path: Path of the layer, for errors.
      layer: A quantized layer whose formats are fixed.

    Raises:
      ValueError: A weight is NaN or infinite.
    """
    kernels = layer_types.kernels_or_table(layer.quantized_layer)
    return {
        kernel.attribute: quantized_weight(
            f"{path}/{kernel.attribute}", quantizer, float_value(getattr(layer.quantized_layer, kernel.attribute))
        )
        for kernel, quantizer in zip(kernels, layer.weight_quantizers)
    }


def quantized_weight(name: str, quantizer: WeightQuantizer, weight: tf.Tensor) -> QuantizedWeight:
    """A weight as a fixed quantizer quantizes it.

    Args:
      name: Name of the weight, for errors.
      quantizer: Its quantizer.
      weight: The weight in float.

    Raises:
      ValueError: The quantized weight has NaN or infinite entries.
    """
    weight = tf.cast(weight, tf.float32)
    fmt = format_of(quantizer)
    computed = quantizer.call(weight).numpy()
    if not np.isfinite(computed).all():  # rounding may overflow, too, near the end of float32's range
        raise ValueError(f"The weight {name!r} has NaN or infinite entries in {fmt}; it cannot be exported.")
    if not fmt.is_scaled:
        return QuantizedWeight(fmt, computed, None)
    scale = scale_of(rounding.absolute_max(weight, quantizer.channel_axes).numpy(), fmt)
    # Dividing by the scale restores the value up to its last bit, which rounding puts right.
    values = rounding.fake_quant(computed / scale, fmt, amax=fmt.max).numpy()
    if not np.array_equal(values * scale, computed):  # a fault of the rounding function, not of the caller
        raise AssertionError(f"{name}: values * scale are not what the layer computes with.")
    return QuantizedWeight(fmt, values, scale)


def scale_of(amax: np.ndarray | np.floating, fmt: Format) -> np.ndarray:
    """The scale that the rounding function computes: float32 amax / (largest value), never 0."""
    return np.maximum(np.asarray(amax, np.float32) / np.float32(fmt.max), np.finfo(np.float32).tiny)


def weights_of(weight: QuantizedWeight) -> np.ndarray:
    """float32 weights that a layer quantizes to the values and the scale of `weight`, to the bit: values * scale.

    This holds because float32 scale * (largest value), taken as amax, gives the same scale again, for every scale that
    an amax can give; the tests go through all of them.
    """
    return weight.values if weight.scale is None else weight.values * weight.scale


def input_scale(quantizer: ActivationQuantizer) -> np.ndarray | None:
    """Scale of an activation quantizer, a float32 number; None for a cast, which has none.

    Raises:
      ValueError: No data has set the range, so that every batch would have a scale of its own.
    """
    fmt = format_of(quantizer)
    if not fmt.is_scaled:
        return None
    amax, seen = np.asarray(quantizer.range, np.float32)
    if not seen > 0:
        raise ValueError(f"its input range has seen no data: {HOW_TO_CALIBRATE}")
    return scale_of(amax * np.float32(quantizer.clip), fmt)
