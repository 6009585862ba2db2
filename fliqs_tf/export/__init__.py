"""Files that run elsewhere, made from a deployed model: the public functions, each in a module of its own.

Nothing of this is loaded before it is called: an exporter's libraries are needed only by those who use it.
"""

from __future__ import annotations


def packed(final, path):
    """Writes a deployed model as one safetensors file: weights as codes at their true width, scales, recipe, network.

    See `fliqs_tf.export.packed_file.packed`: arguments, errors, and what is where in the file.
    """
    from fliqs_tf.export import packed_file

    packed_file.packed(final, path)


def load_packed(path, *, custom_objects=None):
    """Restores the deployed model that `packed` wrote: the same outputs, to the bit.

    See `fliqs_tf.export.packed_file.load_packed` for arguments and errors.
    """
    from fliqs_tf.export import packed_file

    return packed_file.load_packed(path, custom_objects=custom_objects)


def tflite(final, path, representative=None, **options):
    """Writes a deployed model to a `.tflite` file with integer kernels; see `tflite_writer.tflite`."""
    from fliqs_tf.export import tflite_writer

    return tflite_writer.tflite(final, path, representative, **options)


def check(final, path, data):
    """Compares a `.tflite` file with the Keras model on data; see `agreement.check`."""
    from fliqs_tf.export import agreement

    return agreement.check(final, path, data)


def onnx(final, path):
    """Writes a deployed model as an ONNX file with QuantizeLinear and DequantizeLinear.

    See `fliqs_tf.export.onnx_writer.onnx` for arguments and errors, and `fliqs_tf.export.onnx_formats` for what each
    format becomes.
    """
    from fliqs_tf.export import onnx_writer

    onnx_writer.onnx(final, path)


def plan(recipe_or_model, target):
    """A table of what a target ("tflite", "onnx", "packed" or a hardware profile) will do with every layer, and why.

    See `fliqs_tf.export.planning.plan` for arguments and errors.
    """
    from fliqs_tf.export import planning

    return planning.plan(recipe_or_model, target)


def aeq_recipe(recipe, path):
    """Writes a recipe as JSON for ai-edge-quantizer, for those who quantize a float `.tflite` file with that tool.

    See `fliqs_tf.export.aeq.aeq_recipe` for arguments and errors, and its module for how its weights compare with ours.
    """
    from fliqs_tf.export import aeq

    aeq.aeq_recipe(recipe, path)
