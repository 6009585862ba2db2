"""Products of two activations, as in attention, with both operands quantized."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import add_layer, keras, only_shapes
from fliqs_tf.graph import layer_types
from fliqs_tf.layers.quantized import quantized_activation
from fliqs_tf.layers.quantizers import ActivationQuantizer
from fliqs_tf.numerics.space import Space, SpaceLike


@keras.saving.register_keras_serializable("fliqs_tf")
class Product(keras.layers.Layer):
    """einsum(equation) of two quantized activations.

    One operand, `stationary`, plays the part of weights: keys and values, which a decoder keeps from token to token.
    The other one, `moving`, plays the part of the input: queries and probabilities.

    Args:
      equation: Equation of the einsum.
      stationary_first: True if the stationary operand comes first in the equation.
      weight_formats, activation_formats: Formats of the stationary and of the moving operand, as `Space` takes them.
      weight_decision, activation_decision: Names of the decisions that choose from them.
      clips: `ActivationQuantizer.clip` of the stationary and of the moving operand.

    Raises:
      ValueError: One of the operands has no formats.
    """

    is_product = True

    def __init__(
        self,
        equation: str,
        stationary_first: bool,
        weight_formats: SpaceLike,
        activation_formats: SpaceLike,
        weight_decision: str | None = None,
        activation_decision: str | None = None,
        clips: Sequence[float] = (1.0, 1.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if activation_formats is None:
            raise ValueError(
                f"The product {self.name!r} multiplies two activations, and tensors='weights' quantizes none: leave "
                f"attention_scores=False, or use tensors='together' or 'separate'."
            )
        self.equation, self.stationary_first = equation.replace(" ", ""), stationary_first
        self.weight_decision = weight_decision or self.name
        self.activation_decision = activation_decision or self.name
        stationary = ActivationQuantizer(weight_formats, name="held_quantizer")
        activation_formats = Space(activation_formats)
        is_same = (self.weight_decision, stationary.space) == (self.activation_decision, activation_formats)
        self.weight_quantizers = [stationary]
        self.activation_quantizer = ActivationQuantizer(
            activation_formats, choice=stationary.choice if is_same else None, name="streamed_quantizer"
        )
        stationary.clip, self.activation_quantizer.clip = clips
        self.supports_masking = True
        self.built = True

    @property
    def activation_quantizers(self) -> list[ActivationQuantizer]:
        """The quantizer of the moving operand, in a list, as `Quantized` has that of its input."""
        return [self.activation_quantizer]

    def call(self, stationary: tf.Tensor, moving: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if not only_shapes():
            stationary = quantized_activation(self.weight_quantizers[0], stationary, training=bool(training))
            moving = quantized_activation(self.activation_quantizer, moving, training=bool(training))
        return tf.einsum(self.equation, *((stationary, moving) if self.stationary_first else (moving, stationary)))

    def macs(self, stationary: tuple[int, ...], outputs: tuple[int, ...]) -> int:
        """MACs of one call, from the shapes of the stationary operand and of the result."""
        operands, output = self.equation.split("->")
        labels = operands.split(",")[0 if self.stationary_first else 1]
        return math.prod(outputs) * math.prod(size for label, size in zip(labels, stationary) if label not in output)

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        return None  # a softmax would apply a mask that it finds on its input

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Product:
        # The name of version 0.1.0, which files keep.
        return cls(**{"stationary_first" if name == "held_first" else name: value for name, value in config.items()})

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "equation": self.equation,
            "held_first": self.stationary_first,
            "weight_formats": list(self.weight_quantizers[0].space.names),
            "activation_formats": list(self.activation_quantizer.space.names),
            "weight_decision": self.weight_decision,
            "activation_decision": self.activation_decision,
            "clips": [self.weight_quantizers[0].clip, self.activation_quantizer.clip],
        }


def install(attention: keras.layers.Layer, arguments: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes an attention layer quantize the operands of its products.

    Args:
      attention: A built layer that `layer_types.products` knows; changed in place.
      arguments: {name of a product: arguments of `Product` after `stationary_first`}; other products stay in float.
    """
    for name, equation, stationary_first in layer_types.products(attention):
        if name in arguments:
            product = Product(equation, stationary_first, **arguments[name], name=name, dtype=attention.dtype_policy)
            add_layer(attention, f"{name}_product", product)
    # Past the attribute tracking. Keras 3 then does not use its fused kernels, which leave no place for rounding.
    object.__setattr__(attention, "_compute_attention", functools.partial(_attend, attention))


def _attend(
    attention: keras.layers.Layer,
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    attention_mask: tf.Tensor | None = None,
    training: bool | None = None,
    return_attention_scores: bool = False,
    use_causal_mask: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """(result, probabilities), as `_compute_attention` of both Kerases computes them without fused kernels."""
    if use_causal_mask:  # Keras leaves it to a fused kernel if it is the only mask
        causal = attention._compute_causal_mask(query, value)
        attention_mask = causal if attention_mask is None else tf.logical_and(tf.cast(attention_mask, tf.bool), causal)
    multiply = {}
    for name, equation, stationary_first in layer_types.products(attention):
        product = getattr(attention, f"{name}_product", None)
        if product is not None:
            multiply[name] = functools.partial(product, training=training)
        else:
            multiply[name] = functools.partial(_float_product, equation, stationary_first)
    query = query * tf.cast(1.0 / math.sqrt(float(query.shape[-1])), query.dtype)
    probabilities = attention._masked_softmax(multiply["scores"](key, query), attention_mask)
    kept = probabilities
    if getattr(attention, "_dropout_layer", None) is not None:
        kept = attention._dropout_layer(probabilities, training=training)
    return multiply["context"](value, kept), probabilities


def _float_product(equation: str, stationary_first: bool, stationary: tf.Tensor, moving: tf.Tensor) -> tf.Tensor:
    return tf.einsum(equation, *((stationary, moving) if stationary_first else (moving, stationary)))
