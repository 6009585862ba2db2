"""The face towards TensorFlow Model Optimization (TFMOT): its idiom, the same search.

    import tensorflow_model_optimization as tfmot

    annotated = tfmot.quantization.keras.quantize_annotate_model(model)
    applied = tfmot.quantization.keras.quantize_apply(annotated, fliqs_tf.tfmot.FliqsQuantizeScheme("FLIQS-S-INT"))
    qmodel = fliqs_tf.SearchModel(applied)  # decisions, costs and outputs are those of fliqs_tf.wrap(model)

TFMOT puts its own `QuantizeWrapperV2` around every layer and quantizes the weights and the input of the layer with
`FliqsQuantizer`s, which are the faces of the quantizers that `Quantized` has. TFMOT's idiom for activations is to
quantize the output of a layer, or to put a `QuantizeLayer` before the next one; here the input belongs to the layer
that reads it, because two readers of one tensor may have different formats. See docs/tfmot.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import IS_KERAS_3, NAME, float_value, keras
from fliqs_tf.graph import layer_types
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantized import Quantized, quantized_activation
from fliqs_tf.layers.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from fliqs_tf.numerics.space import Space, SpaceLike
from fliqs_tf.quantize import network
from fliqs_tf.quantize import rules as rules_lib
from fliqs_tf.quantize.recipe import TENSORS
from fliqs_tf.quantize.rules import UNCHANGED, Rule, RuleLike, decision_names

if IS_KERAS_3:
    raise ImportError(
        f"fliqs_tf.tfmot needs tf_keras, but tf.keras is {NAME} here: set TF_USE_LEGACY_KERAS=1 before Python starts."
    )
try:
    import tensorflow_model_optimization as tfmot
except ModuleNotFoundError as error:
    if error.name != "tensorflow_model_optimization":
        raise
    raise ImportError("fliqs_tf.tfmot needs TensorFlow Model Optimization: pip install 'fliqs-tf[legacy]'.") from None


@keras.saving.register_keras_serializable("fliqs_tf")
class FliqsQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """TFMOT's face of a weight or an activation quantizer.

    `FliqsQuantizeConfig` uses it; with one format it also serves in a `QuantizeConfig` or `QuantizeLayer` of your own.
    Only layers with a `FliqsQuantizeConfig` are searched: elsewhere a space stays at its widest format.

    Args:
      formats: To choose from, anything that `Space` takes.
      channel_axes: Axes of a weight that hold output channels, each with its own scale. None: for activations, one
        scale per tensor, from a moving average of the batches' largest values.
    """

    def __init__(self, formats: SpaceLike, channel_axes: Sequence[int] | None = None) -> None:
        self.space = Space(formats)
        self.channel_axes = None if channel_axes is None else tuple(channel_axes)
        self.owner: keras.layers.Layer | None = None
        self._quantizer: Quantizer | None = None

    @classmethod
    def face(cls, quantizer: Quantizer) -> FliqsQuantizer:
        """The face of a quantizer that is there already."""
        made = cls(quantizer.space, getattr(quantizer, "channel_axes", None))
        made._quantizer = quantizer
        return made

    def build(self, tensor_shape: Any, name: str, layer: keras.layers.Layer) -> dict[str, Any]:
        """Makes the quantizer's variables part of `layer`, which TFMOT saves; returns what `__call__` needs."""
        quantizer = self._quantizer
        if quantizer is None:
            name = f"{name}_quantizer"
            quantizer = (
                ActivationQuantizer(self.space, name=name)
                if self.channel_axes is None
                else WeightQuantizer(self.space, self.channel_axes, name=name)
            )
        layer._track_trackable(quantizer, quantizer.name)
        # The wrapper lists weights of the layer inside and of its own, none of further layers.
        known = {id(variable) for variable in layer._non_trainable_weights}
        layer._non_trainable_weights.extend(v for v in quantizer.variables if id(v) not in known)
        self.owner = layer
        return {"quantizer": quantizer, "owner": layer}

    def __call__(self, inputs: Any, training: Any, weights: dict[str, Any], **kwargs: Any) -> tf.Tensor:
        quantizer = weights["quantizer"]
        if isinstance(quantizer, WeightQuantizer):
            return quantizer.call(float_value(inputs))
        return quantized_activation(quantizer, inputs, bool(training), weights["owner"].trainable)

    def get_config(self) -> dict[str, Any]:
        return {"formats": list(self.space.names), "channel_axes": self.channel_axes and list(self.channel_axes)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FliqsQuantizer) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((self.space, self.channel_axes))


class _Applied(Quantized):
    """The `Quantized` inside a wrapper of TFMOT: the wrapper hands it the weights that it has quantized."""

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.compute(inputs, *self.__dict__.pop("given"))


@keras.saving.register_keras_serializable("fliqs_tf")
class FliqsQuantizeConfig(tfmot.quantization.keras.QuantizeConfig):
    """How TFMOT is to quantize one layer: weights and input, in a format that the search chooses.

    Args:
      formats: To choose from, anything that `Space` takes; one format is a fixed one. None: those of
        `FliqsQuantizeScheme` or `fliqs_tf.wrap`.
      tie: Name of a decision that layers share. None: the layer has its own.
      tensors: "together", "weights" or "separate", see `fliqs_tf.wrap`. None: as the scheme or `wrap` says.

    Raises:
      ValueError: An unknown format or kind.
    """

    def __init__(self, formats: SpaceLike | None = None, tie: str | None = None, tensors: str | None = None) -> None:
        if tensors not in (None, *TENSORS):
            raise ValueError(f"tensors must be None or one of {', '.join(TENSORS)}, got {tensors!r}.")
        self.formats = None if formats is None else Space(formats)
        self.tie, self.tensors = tie, tensors
        # Of the one layer that TFMOT makes with this config.
        self.quantized: _Applied | None = None
        self._faces: Sequence[FliqsQuantizer] = ()
        self._weights: Sequence[tf.Tensor] = ()

    def as_rule(self, path: str) -> Rule:
        """This config as a rule for the layer at `path`."""
        formats = UNCHANGED if self.formats is None else self.formats
        return Rule(f"^{re.escape(path)}$", formats, self.tie and self.tie.replace("\\", r"\\"))

    def get_weights_and_quantizers(self, layer: keras.layers.Layer) -> list[tuple[tf.Variable, FliqsQuantizer]]:
        quantized = self._quantized(layer)
        self._faces = [FliqsQuantizer.face(q) for q in quantized.weight_quantizers]
        return [(getattr(layer, k.attribute), face) for k, face in zip(layer_types.kernels(layer), self._faces)]

    def get_activations_and_quantizers(self, layer: keras.layers.Layer) -> list[tuple[Callable, FliqsQuantizer]]:
        if self._faces:
            _take_over(self._faces[0].owner, layer)
        # TFMOT quantizes what comes out of an activation; out of this one comes the layer's input.
        return [
            (keras.activations.linear, FliqsQuantizer.face(q)) for q in self._quantized(layer).activation_quantizers
        ]

    def get_output_quantizers(self, layer: keras.layers.Layer) -> list[FliqsQuantizer]:
        return []

    def set_quantize_weights(self, layer: keras.layers.Layer, quantize_weights: Sequence[tf.Tensor]) -> None:
        self._weights = quantize_weights

    def set_quantize_activations(self, layer: keras.layers.Layer, quantize_activations: Sequence[Callable]) -> None:
        """TFMOT calls this right before `layer.call`, which for that one time computes what `Quantized` does."""
        quantized = self._quantized(layer)
        # Past the attribute tracking of Keras, and not for longer than the call: these are tensors of a graph.
        quantized.__dict__["given"], self._weights = (self._weights, quantize_activations), ()
        before = layer.__dict__.get("call")

        @tf.autograph.experimental.do_not_convert
        def call(inputs: tf.Tensor) -> tf.Tensor:
            if before is None:
                object.__delattr__(layer, "call")
            else:
                object.__setattr__(layer, "call", before)
            return quantized.call(inputs)

        object.__setattr__(layer, "call", call)

    def _quantized(self, layer: keras.layers.Layer) -> Quantized:
        if self.formats is None:
            raise ValueError(
                f"Layer {layer.name!r} is annotated with a FliqsQuantizeConfig without formats: name them, or give "
                f"quantize_apply scheme=fliqs_tf.tfmot.FliqsQuantizeScheme(...), whose formats it then has."
            )
        if self.quantized is None:
            tensors = self.tensors or "together"
            names = decision_names(self.tie or layer.name, tensors)
            inputs = None if tensors == "weights" else self.formats
            self.quantized = _Applied(layer, self.formats, inputs, *names, name=layer.name, dtype=layer.dtype_policy)
        if self.quantized.layer is not layer:
            raise ValueError(
                f"Layers {self.quantized.layer.name!r} and {layer.name!r} have the same FliqsQuantizeConfig object: "
                f"give each its own, with tie='NAME' if they are to share a decision."
            )
        return self.quantized

    def get_config(self) -> dict[str, Any]:
        formats = None if self.formats is None else list(self.formats.names)
        return {"formats": formats, "tie": self.tie, "tensors": self.tensors}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FliqsQuantizeConfig) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((self.formats, self.tie, self.tensors))


def _take_over(wrapper: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """What a wrapper of TFMOT leaves behind in the layer inside, once it is built."""
    # It lists the kernels as its own, trainable though the layer is frozen, and more often before saving than after
    # loading, so that .keras files of TFMOT do not load. The layer lists them.
    wrapper._trainable_weights.clear()
    tracked = wrapper._self_tracked_trackables
    tracked[:] = [t for t in tracked if t is not wrapper._weight_vars]
    wrapper._activity_regularizer = layer.activity_regularizer
    layer._losses.clear()  # those of the model that TFMOT took it from


class FliqsQuantizeRegistry(tfmot.quantization.keras.QuantizeRegistry):
    """Which layers are quantized, and how if nothing else is said.

    Args:
      formats: Those of every layer.
      tensors: See `fliqs_tf.wrap`.
      only: Names of the layers that it supports. None: all of a known class.
    """

    def __init__(self, formats: SpaceLike, tensors: str = "together", only: Collection[str] | None = None) -> None:
        self.space, self.tensors, self.only = Space(formats), tensors, only

    def supports(self, layer: keras.layers.Layer) -> bool:
        """True for Dense, Conv1D, Conv2D, DepthwiseConv2D, SeparableConv2D, Conv2DTranspose and EinsumDense."""
        return bool(layer_types.kernels(layer)) and (self.only is None or layer.name in self.only)

    def get_quantize_config(self, layer: keras.layers.Layer) -> FliqsQuantizeConfig:
        """A new config for a layer.

        Raises:
          ValueError: The layer is not supported.
        """
        if not self.supports(layer):
            raise ValueError(f"Layer {layer.name!r} of class {type(layer).__name__} is not one to quantize.")
        return FliqsQuantizeConfig(self.space, tensors=self.tensors)


class FliqsQuantizeScheme(tfmot.quantization.keras.QuantizeScheme):
    """What `quantize_apply` needs to make of an annotated model one whose formats `fliqs_tf.SearchModel` can search.

    Layers annotated without a config have the formats of the scheme, those annotated with a `FliqsQuantizeConfig` those
    that it says; layers that are not annotated, or of a class that cannot be quantized, stay in float.

    Args:
      space, rules, granularity, tensors: As for `fliqs_tf.wrap`.

    Raises:
      ValueError: As `fliqs_tf.wrap`; also a layer that is annotated with a config of another kind.
    """

    def __init__(
        self,
        space: SpaceLike = "FLIQS-S-INT",
        rules: Sequence[RuleLike] = (),
        *,
        granularity: str = "layer",
        tensors: str = "together",
    ) -> None:
        self.space, self.rules, self.granularity, self.tensors = Space(space), rules, granularity, tensors
        self._registry = FliqsQuantizeRegistry(self.space, tensors)

    def get_layout_transformer(self) -> _Layout:
        return _Layout(self)

    def get_quantize_registry(self) -> FliqsQuantizeRegistry:
        return self._registry


class _Layout(tfmot.quantization.keras.QuantizeLayoutTransform):
    """Leaves the model as it is, batch normalization included, and gives each layer to be quantized its config."""

    def __init__(self, scheme: FliqsQuantizeScheme) -> None:
        self._scheme = scheme

    def apply(self, model: keras.Model, layer_quantize_map: dict[str, Any]) -> tuple[keras.Model, dict[str, Any]]:
        scheme = self._scheme
        annotations = {layer.name: layer_quantize_map.get(layer.name) for layer in model.layers}
        annotations = {name: found["quantize_config"] for name, found in annotations.items() if found}
        paths = [path for path, _ in network.layers_to_quantize(ModelGraph(model))]
        spaces = (scheme.space, scheme.space)
        quantizations = rules_lib.layer_quantizations(
            paths, annotations, spaces, scheme.rules, scheme.granularity, scheme.tensors
        )
        # TFMOT also asks the registry for layers before annotated ones, to quantize their output: nothing for these.
        scheme._registry = FliqsQuantizeRegistry(scheme.space, scheme.tensors, only=frozenset(quantizations))
        configs = {}
        for name, quantization in quantizations.items():
            tie = quantization.weight_decision
            tie = tie.removesuffix("/weights") if scheme.tensors == "separate" else tie
            configs[name] = {"quantize_config": FliqsQuantizeConfig(quantization.space, tie, scheme.tensors)}
        return model, configs
