"""Files that run elsewhere, made from a deployed model: the public functions, each in a module of its own.

Nothing of this is loaded before it is called: an exporter's libraries are needed only by those who use it.
"""

from __future__ import annotations


def packed(final, path):
    """Writes a deployed model as one safetensors file: weights as codes at their true width, scales, recipe, network.

    See `fliqs_tf.export_packed.packed`: arguments, errors, and what is where in the file.
    """
    from fliqs_tf import export_packed

    export_packed.packed(final, path)


def load_packed(path, *, custom_objects=None):
    """Restores the deployed model that `packed` wrote: the same outputs, to the bit.

    See `fliqs_tf.export_packed.load_packed` for arguments and errors.
    """
    from fliqs_tf import export_packed

    return export_packed.load_packed(path, custom_objects=custom_objects)


def tflite(final, path, representative=None, **options):
    """Writes a deployed model to a `.tflite` file with integer kernels; see `export_tflite.tflite`."""
    from fliqs_tf import export_tflite

    return export_tflite.tflite(final, path, representative, **options)


def check(final, path, data):
    """Compares a `.tflite` file with the Keras model on data; see `export_check.check`."""
    from fliqs_tf import export_check

    return export_check.check(final, path, data)


def onnx(final, path):
    """Writes a deployed model as an ONNX file with QuantizeLinear and DequantizeLinear.

    See `fliqs_tf.export_onnx.onnx` for arguments and errors, and `fliqs_tf.onnx_formats` for what each format becomes.
    """
    from fliqs_tf import export_onnx

    export_onnx.onnx(final, path)


def plan(recipe_or_model, target):
    """A table of what a target ("tflite", "onnx", "packed" or a hardware profile) will do with every layer, and why.

    See `fliqs_tf.export_plan.plan` for arguments and errors.
    """
    from fliqs_tf import export_plan

    return export_plan.plan(recipe_or_model, target)


def aeq_recipe(recipe, path):
    """Writes a recipe as JSON for ai-edge-quantizer, for those who quantize a float `.tflite` file with that tool.

    See `fliqs_tf.export_aeq.aeq_recipe` for arguments and errors, and its module for how its weights compare with ours.
    """
    from fliqs_tf import export_aeq

    export_aeq.aeq_recipe(recipe, path)
