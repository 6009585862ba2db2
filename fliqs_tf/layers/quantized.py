"""A Keras layer that computes with quantized weights and quantized input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tensorflow as tf

from fliqs_tf._keras import float_value, keras, only_shapes, substituted
from fliqs_tf.graph import copies, layer_types
from fliqs_tf.layers.quantizers import ActivationQuantizer, WeightQuantizer
from fliqs_tf.numerics.space import Space, SpaceLike

_Made = TypeVar("_Made", WeightQuantizer, ActivationQuantizer)


@keras.saving.register_keras_serializable("fliqs_tf")
class Quantized(keras.layers.Wrapper):
    """Wraps a layer: its kernels and its input are quantized; the bias and the rest stay in float.

    Of an Embedding the table is quantized, with a scale per row. Its inputs are indices, so formats of the input are
    not used. A step quantizes only the rows that it looks up, which gives the same bits.

    Args:
      layer: A layer that `layer_types.kernels` knows: Dense, Conv1D, Conv2D, DepthwiseConv2D, SeparableConv2D,
        Conv2DTranspose or EinsumDense; or an Embedding.
      weight_formats: Formats of the kernels, as `Space` takes them; a single one is fixed.
      activation_formats: Formats of the input, likewise; None leaves it in float.
      weight_decision, activation_decision: Names of the decisions that choose from them.
      clips: `ActivationQuantizer.clip` of its activation quantizers; None: 1.

    Raises:
      ValueError: The class of the layer is not known.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        weight_formats: SpaceLike,
        activation_formats: SpaceLike | None,
        weight_decision: str | None = None,
        activation_decision: str | None = None,
        clips: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        # The layer inside is never called as a layer, so that its regularizer of activations would not be applied.
        is_table = bool(layer_types.table(layer))
        options = {"autocast": False} if is_table else {}  # 16-bit floats do not hold every index
        super().__init__(layer, **{"activity_regularizer": layer.activity_regularizer, **options, **kwargs})
        kernels = layer_types.kernels_or_table(layer)
        if not kernels:
            raise ValueError(
                f"Layer {layer.name!r} of class {type(layer).__name__} cannot be quantized; known classes: "
                f"Dense, Conv1D, Conv2D, DepthwiseConv2D, SeparableConv2D, Conv2DTranspose, EinsumDense, Embedding."
            )
        if getattr(layer, "lora_rank", None):
            raise ValueError(
                f"Layer {layer.name!r} is trained by LoRA, which adds to its kernel and cannot be quantized: leave it "
                f"in float with the rule ({layer.name!r}, None), or give a model without LoRA."
            )
        self.weight_decision = weight_decision or layer.name
        self.activation_decision = activation_decision or layer.name
        weight_formats = Space(weight_formats)
        activation_formats = None if activation_formats is None else Space(activation_formats)
        choices: dict[tuple[str, Space], tf.Variable | None] = {}

        def quantizer(cls: Callable[..., _Made], formats: Space, decision: str, **options: Any) -> _Made:
            made = cls(formats, choice=choices.get((decision, formats)), **options)
            choices[decision, made.space] = made.choice
            return made

        self.weight_quantizers: list[WeightQuantizer] = [
            quantizer(
                WeightQuantizer,
                weight_formats,
                self.weight_decision,
                channel_axes=k.channel_axes,
                name=f"{k.attribute}_quantizer",
            )
            for k in kernels
        ]
        self.activation_quantizer: ActivationQuantizer | None = None
        self.middle_quantizer: ActivationQuantizer | None = None
        if activation_formats is not None and not is_table:
            follow = (ActivationQuantizer, activation_formats, self.activation_decision)
            self.activation_quantizer = quantizer(*follow, name="input_quantizer")
            if len(kernels) == 2:  # the tensor between the two convolutions of a separable one
                self.middle_quantizer = quantizer(*follow, name="middle_quantizer")
        for made, clip in zip(self.activation_quantizers, clips or ()):
            made.clip = clip
        self.supports_masking = getattr(layer, "supports_masking", False)

    @property
    def quantized_layer(self) -> keras.layers.Layer:
        """The layer inside."""
        return self.layer

    @property
    def activation_quantizers(self) -> list[ActivationQuantizer]:
        """Quantizers of the input and, with two kernels, of the tensor between them; [] if the input stays in float."""
        return [q for q in (self.activation_quantizer, self.middle_quantizer) if q is not None]

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if isinstance(inputs, (tf.SparseTensor, tf.RaggedTensor)):
            kind = "sparse" if isinstance(inputs, tf.SparseTensor) else "ragged"
            raise ValueError(
                f"Layer {self.layer.name!r} has a {kind} input, which cannot be quantized: make it dense before the "
                f"layer, or leave the layer in float with the rule ({self.layer.name!r}, None)."
            )
        return self._call(inputs, training)

    # Nothing here branches on tensors; converting it would double the time that tf_keras takes to trace a network.
    @tf.autograph.experimental.do_not_convert
    def _call(self, inputs: tf.Tensor, training: bool | None) -> tf.Tensor:
        if only_shapes():
            return self.layer.call(inputs)
        if layer_types.table(self.layer):
            return _looked_up(self.layer, self.weight_quantizers[0], inputs)
        weights = [
            quantizer.call(tf.cast(float_value(getattr(self.layer, kernel.attribute)), tf.float32))
            for kernel, quantizer in zip(layer_types.kernels(self.layer), self.weight_quantizers)
        ]
        activations = [
            functools.partial(
                quantized_activation, quantizer, training=bool(training), integers=self.layer.compute_dtype
            )
            for quantizer in self.activation_quantizers
        ]
        return self.compute(inputs, weights, activations)

    def compute(
        self, inputs: tf.Tensor, weights: Sequence[tf.Tensor], activations: Sequence[Callable[[tf.Tensor], tf.Tensor]]
    ) -> tf.Tensor:
        """The layer's output, from quantized weights.

        Args:
          inputs: The layer's input, not quantized.
          weights: One tensor per kernel.
          activations: Functions tensor -> quantized tensor, one for each of `activation_quantizers`.
        """
        x = activations[0](inputs) if activations else inputs
        if len(weights) == 2:
            return _separable(self.layer, x, weights[0], weights[1], activations[1] if activations else tf.identity)
        with substituted(self.layer, layer_types.kernels(self.layer)[0].attribute, weights[0]):
            return self.layer.call(x)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return self.layer.compute_mask(inputs, mask)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        weights = list(self.weight_quantizers[0].space.names)
        activations = self.activation_quantizer and list(self.activation_quantizer.space.names)
        functions = copies.mistakable_functions(self.layer)
        return {
            **super().get_config(),
            **({"functions": functions} if functions else {}),
            "weight_formats": weights,
            "activation_formats": activations,
            "weight_decision": self.weight_decision,
            "activation_decision": self.activation_decision,
            "clips": [q.clip for q in self.activation_quantizers],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: dict[str, Any] | None = None) -> Quantized:
        config = dict(config)
        functions = config.pop("functions", {})
        made = super().from_config(config, custom_objects=custom_objects)
        copies.give_functions(made.layer, functions, custom_objects)
        return made


def quantized_activation(
    quantizer: ActivationQuantizer,
    x: tf.Tensor,
    training: bool,
    trainable: bool | None = None,
    integers: str = "float32",
) -> tf.Tensor:
    """Quantizes an activation in float32.

    Args:
      quantizer: The quantizer.
      x: The activation, of any dtype.
      training: Whether the range of the quantizer moves.
      trainable: See `ActivationQuantizer.call`.
      integers: dtype of the result if x holds integers, which could not hold the values of most formats.

    Returns:
      A tensor of x's shape and, if that is a floating one, of its dtype.
    """
    quantized = quantizer.call(tf.cast(x, tf.float32), training=training, trainable=trainable)
    return tf.cast(quantized, x.dtype if x.dtype.is_floating else integers)


def _looked_up(layer: keras.layers.Embedding, quantizer: WeightQuantizer, indices: tf.Tensor) -> tf.Tensor:
    """Quantized rows of an embedding's table."""
    indices = tf.cast(indices, tf.int32)
    rows = tf.gather(float_value(layer.embeddings), tf.reshape(indices, [-1]))
    rows = quantizer.call(tf.cast(rows, tf.float32))
    rows = tf.reshape(rows, tf.concat([tf.shape(indices), [layer.output_dim]], axis=0))
    rows.set_shape((*indices.shape, layer.output_dim))
    return tf.cast(rows, layer.compute_dtype)


def _separable(
    layer: keras.layers.SeparableConv2D,
    x: tf.Tensor,
    depthwise: tf.Tensor,
    pointwise: tf.Tensor,
    middle: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """A SeparableConv2D in its two steps, so that the tensor between them can be quantized like any input."""
    strides = layer.strides if isinstance(layer.strides, (tuple, list)) else (layer.strides,) * 2
    channels_first = layer.data_format == "channels_first"
    kernel, pointwise = tf.cast(depthwise, x.dtype), tf.cast(pointwise, x.dtype)
    data_format = "NCHW" if channels_first else "NHWC"
    steps = (1, 1, *strides) if channels_first else (1, *strides, 1)
    x = tf.nn.depthwise_conv2d(
        x, kernel, steps, layer.padding.upper(), data_format=data_format, dilations=layer.dilation_rate
    )
    x = tf.nn.conv2d(middle(x), pointwise, 1, "VALID", data_format=data_format)
    if layer.use_bias:
        x = tf.nn.bias_add(x, tf.cast(tf.convert_to_tensor(layer.bias), x.dtype), data_format=data_format)
    return layer.activation(x) if layer.activation is not None else x
