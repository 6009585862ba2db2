"""Products of two activations, as attention has them, with both operands quantized."""

from __future__ import annotations

import functools
import math

import tensorflow as tf

from fliqs_tf._keras import add_layer, keras, only_shapes
from fliqs_tf.graph import layer_types
from fliqs_tf.layers.quantized import quantized_activation
from fliqs_tf.layers.quantizers import ActivationQuantizer
from fliqs_tf.numerics.space import Space


@keras.saving.register_keras_serializable("fliqs_tf")
class Product(keras.layers.Layer):
    """einsum(equation) of two quantized activations.

    One operand, `held`, has the part that weights have elsewhere: keys and values, which a decoder keeps from token to
    token. The other one, `streamed`, is what an input is elsewhere: queries and probabilities.

    Args:
      equation: Of the einsum.
      held_first: True if the operand that is held comes first in the equation.
      weight_formats, activation_formats: Menus of what is held and what is streamed, anything that `Space` takes.
      weight_decision, activation_decision: Names of the decisions that choose from the menus.
      clips: `ActivationQuantizer.clip` of what is held and of what is streamed.

    Raises:
      ValueError: One of the operands has no formats.
    """

    is_product = True

    def __init__(
        self,
        equation,
        held_first,
        weight_formats,
        activation_formats,
        weight_decision=None,
        activation_decision=None,
        clips=(1.0, 1.0),
        **kwargs,
    ):
        super().__init__(**kwargs)
        if activation_formats is None:
            raise ValueError(
                f"The product {self.name!r} has two activations, so that tensors='weights' says nothing of it: leave "
                f"attention_scores=False, or take tensors='together' or 'separate'."
            )
        self.equation, self.held_first = equation.replace(" ", ""), held_first
        self.weight_decision = weight_decision or self.name
        self.activation_decision = activation_decision or self.name
        held = ActivationQuantizer(weight_formats, name="held_quantizer")
        activation_formats = Space(activation_formats)
        is_same = (self.weight_decision, held.space) == (self.activation_decision, activation_formats)
        self.weight_quantizers = [held]
        self.activation_quantizer = ActivationQuantizer(
            activation_formats, choice=held.choice if is_same else None, name="streamed_quantizer"
        )
        held.clip, self.activation_quantizer.clip = clips
        self.supports_masking = True
        self.built = True

    @property
    def activation_quantizers(self) -> list[ActivationQuantizer]:
        """The quantizer of what is streamed, as `Quantized` has one of its input."""
        return [self.activation_quantizer]

    def call(self, held, streamed, training=None):
        if not only_shapes():
            held = quantized_activation(self.weight_quantizers[0], held, training=bool(training))
            streamed = quantized_activation(self.activation_quantizer, streamed, training=bool(training))
        return tf.einsum(self.equation, *((held, streamed) if self.held_first else (streamed, held)))

    def macs(self, held: tuple[int, ...], outputs: tuple[int, ...]) -> int:
        """MACs of one call, from the shapes of what is held and of the result."""
        operands, output = self.equation.split("->")
        labels = operands.split(",")[0 if self.held_first else 1]
        return math.prod(outputs) * math.prod(size for label, size in zip(labels, held) if label not in output)

    def compute_mask(self, inputs, mask=None):
        return None  # a softmax would take a mask on its input for its own

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "equation": self.equation,
            "held_first": self.held_first,
            "weight_formats": list(self.weight_quantizers[0].space.names),
            "activation_formats": list(self.activation_quantizer.space.names),
            "weight_decision": self.weight_decision,
            "activation_decision": self.activation_decision,
            "clips": [self.weight_quantizers[0].clip, self.activation_quantizer.clip],
        }


def install(attention, arguments: dict[str, dict]) -> None:
    """Has an attention layer compute its products quantized.

    Args:
      attention: A built layer that `layer_types.products` knows; it is changed.
      arguments: {name of the product: arguments of `Product` behind `held_first`}; a product that is not there stays in
        float.
    """
    for name, equation, held_first in layer_types.products(attention):
        if name in arguments:
            product = Product(equation, held_first, **arguments[name], name=name, dtype=attention.dtype_policy)
            add_layer(attention, f"{name}_product", product)
    # Past the attribute tracking. Keras 3 then does not take the fused kernels, which leave no place for rounding.
    object.__setattr__(attention, "_compute_attention", functools.partial(_attend, attention))


def _attend(
    attention,
    query,
    key,
    value,
    attention_mask=None,
    training=None,
    return_attention_scores=False,
    use_causal_mask=False,
):
    """(result, probabilities), as the `_compute_attention` of both Kerases without fused kernels."""
    if use_causal_mask:  # the only mask, left to a kernel that is not taken here
        causal = attention._compute_causal_mask(query, value)
        attention_mask = causal if attention_mask is None else tf.logical_and(tf.cast(attention_mask, tf.bool), causal)
    multiply = {}
    for name, equation, held_first in layer_types.products(attention):
        product = getattr(attention, f"{name}_product", None)
        if product is not None:
            multiply[name] = functools.partial(product, training=training)
        else:
            multiply[name] = functools.partial(_float_product, equation, held_first)
    query = query * tf.cast(1.0 / math.sqrt(float(query.shape[-1])), query.dtype)
    probabilities = attention._masked_softmax(multiply["scores"](key, query), attention_mask)
    kept = probabilities
    if getattr(attention, "_dropout_layer", None) is not None:
        kept = attention._dropout_layer(probabilities, training=training)
    return multiply["context"](value, kept), probabilities


def _float_product(equation, held_first, held, streamed):
    return tf.einsum(equation, *((held, streamed) if held_first else (streamed, held)))
