"""Files that run elsewhere, made from a deployed model: the public functions.

Each is in a module of its own, which is loaded when it is called: an exporter's libraries are needed only by those who
use it. A deployed model is what `SearchModel.deploy()` or `fliqs_tf.apply` returned. Files are written whole or not at
all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf

    from fliqs_tf._keras import keras
    from fliqs_tf.costs.profile import Profile
    from fliqs_tf.export.agreement import Agreement
    from fliqs_tf.export.planning import SupportTable
    from fliqs_tf.quantize.recipe import Recipe


def packed(final: keras.Model, path: str | os.PathLike) -> None:
    """Writes a deployed model as one safetensors file: weights as codes at their true width, scales, recipe, network.

    Args:
      final: A deployed model, in any formats.
      path: The file to write; by convention it ends in .safetensors.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: Not a deployed model, weights that are not finite, or a network that Keras cannot restore from its
        configuration.
      OSError: The file cannot be written.

    Source: what is where in the file is described in `fliqs_tf.export.packed_file`.
    """
    from fliqs_tf.export import packed_file

    packed_file.packed(final, path)


def load_packed(path: str | os.PathLike, *, custom_objects: dict[str, Any] | None = None) -> keras.Model:
    """Restores the deployed model that `packed` wrote: the same outputs, to the bit.

    Args:
      path: The file.
      custom_objects: {name: class or function} of layers that are not Keras' own and not registered with
        `keras.saving.register_keras_serializable`.

    Returns:
      A Keras model, not compiled.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: The file is damaged, or `packed` did not write it, or wrote it under the other Keras.
      OSError: It cannot be read.
    """
    from fliqs_tf.export import packed_file

    return packed_file.load_packed(path, custom_objects=custom_objects)


def tflite(
    final: keras.Model,
    path: str | os.PathLike,
    representative: tf.data.Dataset | Iterable[Any] | None = None,
    *,
    int4: bool = True,
) -> keras.Model:
    """Writes a deployed model as a `.tflite` file with integer kernels.

    Args:
      final: A deployed model with integer formats of 8 bits or fewer; layers in float formats run in float32.
      path: The file to write.
      representative: Examples that set the ranges of int8 tensors which training did not set; a few hundred.
      int4: Store weights of 4 bits or fewer as int4 where there are kernels. False: as int8.

    Returns:
      The Keras model that the file computes, for `check`.

    Raises:
      ImportError: ai-edge-litert is not installed.
      TypeError: The model is of the other Keras, or `representative` does not hold examples.
      ValueError: TFLite does not support a layer or a format, or ranges are missing; names the layer.
      OSError: The file cannot be written.

    Source: what the codes of the file mean is described in `fliqs_tf.export.tflite_writer`.
    """
    from fliqs_tf.export import tflite_writer

    return tflite_writer.tflite(final, path, representative, int4=int4)


def check(final: keras.Model, path: str | os.PathLike, data: tf.data.Dataset | Iterable[Any]) -> list[Agreement]:
    """Compares a `.tflite` file with a Keras model on data.

    Args:
      final: What `tflite` returned, to see whether the file is right; or the deployed model, to see what the conversion
        costs.
      path: The file.
      data: Examples x, or (x, y) with class labels y: arrays, or batches as a `tf.data.Dataset`, list or generator.

    Returns:
      An `agreement.Agreement` per output and per set of kernels (XNNPACK and LiteRT's built-in ones): differences in
      steps of the output's int8 tensor, shares of equal values and guesses, accuracies. Print them, or ask `within`.

    Raises:
      ImportError: ai-edge-litert is not installed.
      TypeError: `data` does not hold examples.
      ValueError: The file is damaged, or the file or the data do not fit the model.
      FileNotFoundError: There is no such file.
    """
    from fliqs_tf.export import agreement

    return agreement.check(final, path, data)


def onnx(final: keras.Model, path: str | os.PathLike) -> None:
    """Writes a deployed model as an ONNX file with QuantizeLinear and DequantizeLinear.

    Args:
      final: A deployed Functional or Sequential model, float32, channels last.
      path: The file to write.

    Raises:
      ImportError: onnx is not installed.
      ValueError: Not a deployed model; or the exporter does not support a layer, or ONNX has no type for a format:
        names the layer, and an exporter that supports it.
      OSError: The file cannot be written.

    Source: what each format becomes is described in `fliqs_tf.export.onnx_formats`.
    """
    from fliqs_tf.export import onnx_writer

    onnx_writer.onnx(final, path)


def plan(recipe_or_model: Recipe | keras.Model, target: str | os.PathLike | Profile) -> SupportTable:
    """A table of what a target will do with every layer, and why: before anything is trained or written.

    Args:
      recipe_or_model: A recipe, or a wrapped, deployed or plain model.
      target: "tflite", "onnx", "packed"; or a hardware profile: a `Profile`, the name of a shipped one, or a path.

    Returns:
      A `planning.SupportTable`: print it, or look at its `rows` and `unsupported`.

    Raises:
      TypeError: Neither a recipe nor a model.
      ValueError: Unknown target.
    """
    from fliqs_tf.export import planning

    return planning.plan(recipe_or_model, target)


def aeq_recipe(recipe: Recipe, path: str | os.PathLike) -> None:
    """Writes a recipe as JSON for ai-edge-quantizer, for those who quantize a float `.tflite` file with that tool.

    Args:
      recipe: Weights in INT4 or INT8, with inputs in float or in an INT format of 8 bits or fewer.
      path: The file to write.

    Raises:
      ValueError: ai-edge-quantizer does not support a format; names the layer, and the exporter that does.
      OSError: The file cannot be written.

    Source: how its weights compare with ours is described in `fliqs_tf.export.aeq`.
    """
    from fliqs_tf.export import aeq

    aeq.aeq_recipe(recipe, path)
