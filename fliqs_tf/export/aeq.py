"""Recipes for ai-edge-quantizer, which quantizes a float `.tflite` file.

Its weights are rounded as ours are: symmetric, scale = amax / (largest code) per output channel, to nearest with ties
to even. So where it supports the format of a layer, it arrives at the integer weights that the layer computes with,
except in channels whose amax is below 1e-9, for which it takes 1e-9. Where batch normalization was folded into the
weights of the file, the last bit of a weight may differ, and with it the code of a weight midway between two codes.

It supports weights of 4 and 8 bits (4 only in CONV_2D and FULLY_CONNECTED; other layers stay in float) and inputs of 8
bits. The scales of inputs are not ours: it takes them from calibration data.
"""

from __future__ import annotations

import os
import re
from typing import Any

from fliqs_tf.io import files
from fliqs_tf.quantize.recipe import Recipe

_BITS = {"INT4": 4, "INT8": 8}
_FLOAT = ("BF16", "FP32")


def aeq_recipe(recipe: Recipe, path: str | os.PathLike) -> None:
    """Writes a recipe as JSON for ai-edge-quantizer, one entry per layer.

        fliqs_tf.export.tflite(fliqs_tf.apply(model, "FP32"), "float.tflite")
        fliqs_tf.export.aeq_recipe(recipe, "aeq.json")
        quantizer = ai_edge_quantizer.Quantizer("float.tflite", "aeq.json")
        calibration = quantizer.calibrate({"serving_default": [{"image": batch}, ...]})
        quantizer.quantize(calibration).export_model("quantized.tflite")

    An entry finds its layer by the name of a tensor: `conv1`, or a part between slashes, as in `net/conv1/Conv2D`.
    The float files of `fliqs_tf.export.tflite` have exactly these names. TensorFlow's converter renames the last layer,
    and Keras 3 appends numbers (`conv1_1`): check the names in files made that way.

    Args:
      recipe: The recipe. Weights in INT4 or INT8 with inputs in any INT of 8 bits or fewer, which become INT8, or in
        float. Layers of BF16 or FP32 stay in float.
      path: The file to write. It is written whole or not at all.

    Raises:
      ValueError: ai-edge-quantizer does not support a format; names the layer, and the exporter that does.
      OSError: The file cannot be written.
    """
    entries = []
    for layer, decisions in recipe.of_layers().items():
        weights = recipe.formats[decisions["weights"]] if "weights" in decisions else "FP32"
        inputs = recipe.formats[decisions["activations"]] if "activations" in decisions else "FP32"
        if weights in _FLOAT and inputs in _FLOAT:
            continue
        has_inputs = inputs in _FLOAT or inputs in tuple(f"INT{bits}" for bits in range(2, 9))
        if weights not in _BITS or not has_inputs:
            raise ValueError(
                f"Layer {layer!r} has {weights} weights and {inputs} inputs, but ai-edge-quantizer supports "
                f"only INT4 and INT8 weights, and inputs that fit into INT8. fliqs_tf.export.tflite writes INT2 to "
                f"INT8, fliqs_tf.export.packed any format."
            )
        entries.append(_entry(layer, _BITS[weights], inputs not in _FLOAT))
    files.write_json(path, entries)


def _entry(layer: str, bits: int, has_integer_inputs: bool) -> dict[str, Any]:
    config = {
        "weight_tensor_config": {"num_bits": bits, "symmetric": True, "granularity": "CHANNELWISE", "dtype": "INT"},
        "compute_precision": "INTEGER" if has_integer_inputs else "FLOAT",
        "explicit_dequantize": not has_integer_inputs,
        "skip_checks": False,
        "min_weight_elements": 0,
    }
    if has_integer_inputs:
        config["activation_tensor_config"] = {
            "num_bits": 8,
            "symmetric": True,
            "granularity": "TENSORWISE",
            "dtype": "INT",
        }
    return {
        "regex": f"(^|[/;]){re.escape(layer)}([/;]|$)",
        "operation": "*",
        "algorithm_key": "min_max_uniform_quantize",
        "op_config": config,
    }
