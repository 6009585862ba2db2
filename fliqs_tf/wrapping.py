"""`wrap` and `apply`: a Keras model to one whose formats are searched, or to one with the formats of a recipe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.costs.profile import Profile
from fliqs_tf.export import boundaries, lowering, onnx_writer, packed_file, planning, targets
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.io import batches
from fliqs_tf.layers import composite, ranges
from fliqs_tf.numerics.formats import Format
from fliqs_tf.numerics.space import SpaceLike
from fliqs_tf.quantize import copying
from fliqs_tf.quantize.network import (
    layers_to_quantize,
    quantized_network,
    warn_of_names_of_keras,
    warn_of_own_training,
)
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.quantize.rules import UNCHANGED, Rule, RuleLike, as_rules
from fliqs_tf.search.model import SearchModel


def wrap(
    model: keras.Model,
    space: SpaceLike | None = None,
    rules: Sequence[RuleLike] = (),
    *,
    profile: Profile | str | os.PathLike | None = None,
    target: str | None = None,
    granularity: str = "layer",
    tensors: str = "together",
    input_shape: Any = None,
    embeddings: bool = False,
    attention_scores: bool = False,
) -> SearchModel:
    r"""Makes a model whose number formats can be searched while it trains.

    Args:
      model: A built Keras model: Functional, Sequential, or of a class of its own, whose `get_config` returns the
        arguments of its `__init__`. It is not changed: its weights are copied. If it is annotated with TensorFlow Model
        Optimization only the annotated layers are quantized, see docs/tfmot.md.
      space: The formats that every layer may take: a preset ("FLIQS-S-INT", "FLIQS-S-FLOAT", "FLIQS-L-INT",
        "FLIQS-L-FLOAT", "MIXED") or a list of formats. None: "FLIQS-S-INT", or what the profile has.
      rules: What differs for some layers: (pattern, formats), (pattern, None) to leave them in float, or
        `Rule(pattern, formats, tie)`. Patterns are searched in layer paths; later rules win.
      profile: A platform to search for: a `Profile`, the name of a shipped one, or the path of its JSON file. Every
        choice of the search then runs on the platform, and `compile` counts the platform's cost unless told otherwise.
      target: What the result will be exported to: "tflite", "onnx" or "packed". Formats that the target does not run
        are left out; `fliqs_tf.export.plan` shows what it does with the others. With "tflite" INT2 to INT8 remain, and
        the int8 tensors between layers, as in the file that `fliqs_tf.export.tflite` writes, are quantized during
        training: what is trained is what ships.
      granularity: "layer": a decision per layer; "model": one for all layers. For blocks use rules that tie layers.
      tensors: "together": a decision sets the weights and the input of its layers; "weights": weights only;
        "separate": one decision each.
      input_shape: Shape of one example, for several inputs a list or dict of shapes; a `tf.TensorSpec` in place of a
        shape gives the dtype too. Needed only if the model leaves a size open, or does not say what its input is.
      embeddings: True quantizes the tables of Embedding layers, with a scale per row. They multiply nothing: only their
        memory costs.
      attention_scores: True quantizes both operands of the two products in MultiHeadAttention and GroupQueryAttention
        layers, "scores" (query x key) and "context" (probabilities x value), and counts their MACs. Keys and values
        play the part of weights: with tensors="separate" theirs are the decisions ".../weights".

    Returns:
      A `SearchModel` of the same inputs and outputs: compile it with a `target_cost`, then `fit`.

    Raises:
      TypeError: The model is of the other Keras.
      ValueError: The model is not built or has nothing to quantize; unknown space or format; a space that is empty, has
        duplicates, or leaves nothing to choose; a rule that matches no layer; formats that the profile or the
        target does not have; a layer or an input that files of the target cannot hold. The message says what to do.
      ImportError: target="onnx", and onnx is not installed.
      OSError: The file of the profile cannot be read.

    Source: arXiv 2308.03290 (the search, the spaces FLIQS-S); docs/method.md says what differs.
    """
    for option, asked in (("embeddings", embeddings), ("attention_scores", attention_scores)):
        if asked and target in ("onnx", "tflite"):
            raise ValueError(
                f"target={target!r} does not support {option}=True: leave {option}=False, or use target='packed' or "
                f"none."
            )
    spaces: Sequence[SpaceLike]
    if profile is None:
        spaces = ("FLIQS-S-INT" if space is None else space,)
    else:
        profile = Profile.load(profile)
        spaces = profile.spaces(tensors, space)
    if target == "tflite":
        spaces = [boundaries.integer_formats(each) for each in spaces]
        rules = [_for_integers(rule) for rule in as_rules(rules)]
    elif target is not None:
        spaces = [targets.supported_formats(each, target, tensors) for each in spaces]
    network = quantized_network(
        ModelGraph(model),
        spaces[0],
        rules,
        granularity,
        tensors,
        spaces[1] if len(spaces) > 1 else None,
        input_shape=input_shape,
        embeddings=embeddings,
        attention_scores=attention_scores,
    )
    if target == "tflite":
        lowering.check_layers(network)
        network = boundaries.with_boundary_quantizers(network)
    searched = SearchModel(network, input_shape=input_shape, profile=profile, name=model.name)
    if profile is not None:
        profile.check(searched.sites)
    if target is not None:
        _check_target(searched, target)
    return searched


def _for_integers(rule: Rule) -> Rule:
    has_formats = rule.formats is not None and rule.formats is not UNCHANGED
    return dataclasses.replace(rule, formats=boundaries.integer_formats(rule.formats)) if has_formats else rule


def _check_target(searched: SearchModel, target: str) -> None:
    """Raises if the target cannot hold a layer, or a rule gives a layer formats that the target does not run."""
    for row in planning.plan(searched, target).unsupported:
        formats = f" cannot have {row.weights} weights and {row.inputs} inputs" if row.weights else ""
        raise ValueError(f"Layer {row.layer!r}{formats or f' is not for target {target!r}'}: {row.run.why}.")
    # That of "tflite" comes before int8 tensors are put between the layers.
    if target == "onnx":
        onnx_writer.check_layers(searched.graph)
    elif target == "packed":
        packed_file.check_network(searched.graph)


def apply(
    model: keras.Model,
    recipe: Recipe | Format | str,
    *,
    target: str | None = None,
    input_shape: Any = None,
    embeddings: bool = False,
    attention_scores: bool = False,
    calibration_data: tf.data.Dataset | Iterable[Any] | None = None,
) -> keras.Model:
    """A copy of a model with fixed formats, for quantization-aware training with a given recipe.

    Args:
      model: A built Keras model. It is not changed: its weights are copied.
      recipe: A recipe for this model, or one format for every layer. Layers that the recipe does not name stay
        in float if the recipe came from a search that left them so.
      target: "tflite": int8 tensors between layers are quantized too, as in the file that `fliqs_tf.export.tflite`
        writes. None: they are not.
      input_shape: See `fliqs_tf.wrap`.
      embeddings, attention_scores: With one format for every layer: for the tables of embeddings and the products of
        attention too. A recipe says so itself.
      calibration_data: Examples, in any form that `fit` takes; the first 32 batches of a data set, or as many examples
        from everywhere in arrays, set the ranges of activations. Training sets them too, except in layers that are
        called with `training=False`. Without either a quantized activation has the range of its batch, and the result
        for one example depends on the others.

    Returns:
      A plain Keras model of the same inputs and outputs, not compiled. Train it as any other.

    Raises:
      TypeError: The model is of the other Keras, or calibration_data does not hold examples.
      ValueError: The recipe does not fit the model; the model is not built, cannot be copied, or has nothing to
        quantize; the target does not support a layer; or calibration_data does not fit the model.
    """
    named = recipe.of_layers() if isinstance(recipe, Recipe) else ()
    graph = ModelGraph(model)
    layers = layers_to_quantize(graph, embeddings, attention_scores, named)
    warn_of_own_training(model)
    warn_of_names_of_keras(graph)
    paths = [path for path, _ in layers]
    if not isinstance(recipe, Recipe):
        recipe = Recipe({path: Format(recipe).name for path in paths})
    decided = recipe.of_layers()
    Recipe(dict.fromkeys(decided, "FP32")).check([p for p in paths if p not in recipe.float_layers], model.name)
    arguments = {}
    for path, key in layers:
        if path in decided:
            weights, activations = decided[path]["weights"], decided[path].get("activations")
            spaces = ([recipe.formats[weights]], [recipe.formats[activations]] if activations else None)
            arguments[key] = dict(zip(composite.ARGUMENTS, (*spaces, weights, activations)))
    copy = copying.quantized_copy(graph, arguments, input_shape)
    if is_for_tflite(target):
        lowering.check_layers(copy)
        copy = boundaries.with_boundary_quantizers(copy)
    if calibration_data is not None:
        source = batches.read(calibration_data, copy.model, "calibration_data")
        ranges.calibrate(copy, (batch.x for batch in source.some(ranges.BATCHES, 32)))
    return copy.model


def is_for_tflite(target: str | None) -> bool:
    """Raises for a target other than None and "tflite"."""
    if target not in (None, "tflite"):
        raise ValueError(f"target must be None or 'tflite', got {target!r}.")
    return target is not None
