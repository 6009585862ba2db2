"""Layers that move values or pick among them, so that rounding may come before or after; and what activations are."""

from __future__ import annotations

from fliqs_tf._keras import keras
from fliqs_tf.graph import copies

_LAYERS = keras.layers

# What is not there at inference.
IDENTITIES = tuple(
    getattr(_LAYERS, name)
    for name in ("Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianNoise", "GaussianDropout")
    + ("AlphaDropout", "ActivityRegularization")
    if hasattr(_LAYERS, name)
)
# They move values or pick among them: to quantize before or after is the same.
COMMUTING = (
    *IDENTITIES,
    _LAYERS.MaxPooling2D,
    _LAYERS.GlobalMaxPooling2D,
    _LAYERS.Flatten,
    _LAYERS.Reshape,
    _LAYERS.ZeroPadding2D,
    _LAYERS.UpSampling2D,
    _LAYERS.Concatenate,
)


def activation(layer: keras.layers.Layer) -> str:
    """Name of a layer's activation; integer kernels do "linear", "relu" and "relu6" by themselves.

    Args:
      layer: Any; "linear" for one that has no activation.
    """
    if isinstance(layer, _LAYERS.ReLU):
        plain = not layer.negative_slope and not layer.threshold
        largest = None if layer.max_value is None else float(layer.max_value)  # an array once tf_keras has copied it
        name = {None: "relu", 6.0: "relu6"}.get(largest) if plain else None
        return name or f"ReLU({layer.max_value}, {layer.negative_slope}, {layer.threshold})"
    return copies.function_name(getattr(getattr(layer, "quantized_layer", layer), "activation", None))


def is_activation(layer: keras.layers.Layer) -> bool:
    """True for a layer that is nothing but a ReLU or ReLU6."""
    return isinstance(layer, (_LAYERS.ReLU, _LAYERS.Activation)) and activation(layer) in ("relu", "relu6")


def is_quantization_invariant(layer: keras.layers.Layer) -> bool:
    """True if quantizing the layer's inputs is the same as quantizing its output."""
    return isinstance(layer, COMMUTING) or is_activation(layer)
