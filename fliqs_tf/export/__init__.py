"""Files that run elsewhere, made from a deployed model: the public functions, each in a module of its own.

Nothing of this is loaded before it is called: an exporter's libraries are needed only by those who use it.
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

    See `fliqs_tf.export.packed_file.packed`: arguments, errors, and what is where in the file.
    """
    from fliqs_tf.export import packed_file

    packed_file.packed(final, path)


def load_packed(path: str | os.PathLike, *, custom_objects: dict[str, Any] | None = None) -> keras.Model:
    """Restores the deployed model that `packed` wrote: the same outputs, to the bit.

    See `fliqs_tf.export.packed_file.load_packed` for arguments and errors.
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
    """Writes a deployed model to a `.tflite` file with integer kernels; see `tflite_writer.tflite`."""
    from fliqs_tf.export import tflite_writer

    return tflite_writer.tflite(final, path, representative, int4=int4)


def check(final: keras.Model, path: str | os.PathLike, data: tf.data.Dataset | Iterable[Any]) -> list[Agreement]:
    """Compares a `.tflite` file with the Keras model on data; see `agreement.check`."""
    from fliqs_tf.export import agreement

    return agreement.check(final, path, data)


def onnx(final: keras.Model, path: str | os.PathLike) -> None:
    """Writes a deployed model as an ONNX file with QuantizeLinear and DequantizeLinear.

    See `fliqs_tf.export.onnx_writer.onnx` for arguments and errors, and `fliqs_tf.export.onnx_formats` for what each
    format becomes.
    """
    from fliqs_tf.export import onnx_writer

    onnx_writer.onnx(final, path)


def plan(recipe_or_model: Recipe | keras.Model, target: str | os.PathLike | Profile) -> SupportTable:
    """A table of what a target ("tflite", "onnx", "packed" or a hardware profile) will do with every layer, and why.

    See `fliqs_tf.export.planning.plan` for arguments and errors.
    """
    from fliqs_tf.export import planning

    return planning.plan(recipe_or_model, target)


def aeq_recipe(recipe: Recipe, path: str | os.PathLike) -> None:
    """Writes a recipe as JSON for ai-edge-quantizer, for those who quantize a float `.tflite` file with that tool.

    See `fliqs_tf.export.aeq.aeq_recipe` for arguments and errors, and its module for how its weights compare with ours.
    """
    from fliqs_tf.export import aeq

    aeq.aeq_recipe(recipe, path)
