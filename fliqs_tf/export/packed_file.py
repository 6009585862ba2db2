"""One safetensors file with the weights as codes at their true width, and a loader that restores the model to the bit.

Tensors, by the path of their layer:

* `conv1/kernel`: the quantized weight. INT8 and INT16 as I8 and I16, E4M3 as F8_E4M3, E5M2 as F8_E5M2, E5M10 as F16,
  BF16 and FP32 as they are: of the weight's shape, in units of the scale. Any other format: U8 [bytes], a dense stream
  of codes over the weight in C order, see `fliqs_tf.numerics.encoding`.
* `conv1/kernel.scale`: F32, one per output channel, of a shape that broadcasts to the weight's. weight = value * scale.
  BF16 and FP32 have no scale.
* `conv1/input.range`: F32 [2], (amax, weight of the data seen: 0 before any training, when a batch has its own range).
  A tensor between the two kernels of a separable convolution has `middle.range`. scale = amax * clip / (largest value).
* everything else (biases, normalization, layers in float) under its own name and in its own type.

Metadata: `fliqs_tf`, a JSON object: layout (version of what this text describes), versions, recipe, weights (format and
shape of each), inputs (format and clip of each), network (the Keras configuration as JSON, compressed with zlib, in
Base64) and sha256 (of everything else). Nothing in the file is code. The same model gives the same bytes.

The integer formats have one zero: a weight that rounds to -0 is restored as 0, which is equal to it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import os
import pathlib
import types
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import IS_KERAS_3, NAME, keras
from fliqs_tf.export import deployed
from fliqs_tf.graph import layer_types
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.io import files, loading
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.layers.quantizers import ActivationQuantizer
from fliqs_tf.numerics import encoding
from fliqs_tf.numerics.formats import Format

LAYOUT = 1
_MOST_CONFIG_BYTES = 256 * 2**20
# Formats whose codes are a type of safetensors.
_NATIVE: dict[str, np.dtype] = {
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "E4M3": np.dtype(tf.dtypes.experimental.float8_e4m3fn.as_numpy_dtype),
    "E5M2": np.dtype(tf.dtypes.experimental.float8_e5m2.as_numpy_dtype),
    "E5M10": np.dtype(np.float16),
    "BF16": np.dtype(tf.bfloat16.as_numpy_dtype),
    "FP32": np.dtype(np.float32),
}
_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "BF16": _NATIVE["BF16"],
    "F8_E4M3": _NATIVE["E4M3"],
    "F8_E5M2": _NATIVE["E5M2"],
}


def packed(final: keras.Model, path: str | os.PathLike) -> None:
    """Writes a deployed model as one safetensors file: weights as codes at their true width, scales, recipe, network.

    Before the file takes its place it is read back: what `load_packed` restores computes with the same weights.

    Args:
      final: What `deploy()` or `fliqs_tf.apply` returned.
      path: The file to write, whole or not at all; by convention it ends in .safetensors.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: Not a deployed model, weights that are not finite, or a network that Keras cannot restore from its
        configuration alone (a Lambda layer, a class that is not registered).
      OSError: The file cannot be written.
    """
    save = _safetensors().numpy.save
    graph = ModelGraph(final)
    layers = deployed.quantized_layers(graph)
    weights = {
        f"{path}/{attribute}": weight
        for path, layer in layers
        for attribute, weight in deployed.quantized_weights(path, layer).items()
    }
    inputs = {name: quantizer for path, layer in layers for name, quantizer in _inputs(path, layer).items()}
    tensors = {name: np.asarray(variable) for name, variable in _plain_variables(graph).items()}
    for name, weight in weights.items():
        tensors[name] = _stored(weight.values, weight.format)
        if weight.scale is not None:
            tensors[f"{name}.scale"] = weight.scale
    for name, quantizer in inputs.items():
        tensors[f"{name}.range"] = np.asarray(quantizer.range, np.float32)
    header = {
        "layout": LAYOUT,
        "versions": {"keras": NAME, "tensorflow": tf.__version__},
        "recipe": deployed.recipe(graph).to_dict(),
        "weights": {n: {"format": w.format.name, "shape": list(w.values.shape)} for n, w in weights.items()},
        "inputs": {n: {"format": deployed.format_of(q).name, "clip": q.clip} for n, q in inputs.items()},
        "network": _network_text(final),
    }
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}  # scalars stay scalars
    header["sha256"] = _digest(header, {n: (a.shape, a.tobytes()) for n, a in tensors.items()})
    data = save(tensors, {"fliqs_tf": json.dumps(header)})
    try:
        _check_same(weights, _restore(data, None))
    except ValueError as error:
        raise ValueError(f"Model {final.name!r} cannot be packed: {error}") from None
    with files.replacing(path) as temporary:
        temporary.write_bytes(data)


def check_network(graph: ModelGraph) -> None:
    """Raises, before any training, if a network cannot be restored from its configuration.

    Raises:
      ValueError: Says what stands in the way.
    """
    _plain_variables(graph)
    try:
        _rebuilt(_network_text(graph.model), {})
    except ValueError as error:
        raise ValueError(f"Model {graph.model.name!r} cannot be packed: {error}") from None


def load_packed(path: str | os.PathLike, *, custom_objects: dict[str, Any] | None = None) -> keras.Model:
    """Restores the deployed model that `packed` wrote: the same outputs, to the bit.

    Its weights are code * scale, which its layers quantize to the same codes and scales again.

    Args:
      path: The file.
      custom_objects: {name: class or function} of layers that are not Keras' own and not registered with
        `keras.saving.register_keras_serializable`. No module is imported because a file names it.

    Returns:
      A Keras model, not compiled.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: The file is damaged, or was not written by `packed`, or by a later version of it, or under the other
        Keras; the message names the file and says what is wrong.
      OSError: It cannot be read.
    """
    data = pathlib.Path(path).read_bytes()
    try:
        return _restore(data, custom_objects).model
    except ValueError as error:
        raise ValueError(f"{path} is not a model that can be loaded: {error}") from None


def _safetensors() -> types.ModuleType:
    try:
        import safetensors.numpy

        return safetensors
    except ImportError as error:
        raise ImportError("Packed files need safetensors: pip install 'fliqs-tf[safetensors]'.") from error


# ---- what is in a model


def _plain_variables(graph: ModelGraph) -> dict[str, tf.Variable]:
    """{name: variable} of everything that is stored as it is: all but quantized weights and what quantizers hold."""
    model = graph.model
    found: dict[str, tf.Variable] = {}
    seen: set[int] = set()
    for _, layer in graph.of_type(Quantized):
        seen |= {id(v) for v in _kernels("", layer).values()}
        seen |= {id(v) for q in (*layer.weight_quantizers, *layer.activation_quantizers) for v in q.weights}
    # In reverse the parts of a composite layer come before it: they name the variables that it has, too.
    for path, layer in reversed(graph.layers):
        if isinstance(layer, keras.layers.Lambda):
            raise ValueError(
                f"Model {model.name!r} cannot be packed: Layer {path!r} is a Lambda, whose code no file holds."
            )
        for variable in layer.weights:
            if id(variable) not in seen:
                seen.add(id(variable))
                name = f"{path}/{variable.name.split('/')[-1].split(':')[0]}"
                found[name if name not in found else f"{name}_{len(found)}"] = variable
    uncovered = [v.name for v in model.weights if id(v) not in seen]
    if uncovered:
        raise ValueError(f"Model {model.name!r} has variables outside of its layers: {', '.join(uncovered)}.")
    return found


def _kernels(path: str, layer: Quantized) -> dict[str, tf.Variable]:
    """{name: variable} of the weights that a layer quantizes."""
    inner = layer.quantized_layer
    return {
        f"{path}/{kernel.attribute}": getattr(inner, kernel.attribute) for kernel in layer_types.kernels_or_table(inner)
    }


def _inputs(path: str, layer: Quantized) -> dict[str, ActivationQuantizer]:
    """{name: activation quantizer} of a quantized layer."""
    return {f"{path}/{name}": q for name, q in zip(("input", "middle"), layer.activation_quantizers)}


def _network_text(model: keras.Model) -> str:
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)
    try:
        text = json.dumps(config)
    except TypeError as error:
        raise ValueError(f"The configuration of model {model.name!r} is not plain data: {error}.") from None
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _stored(values: np.ndarray, fmt: Format) -> np.ndarray:
    if fmt.name in _NATIVE:
        return values.astype(_NATIVE[fmt.name])  # exact: the values are those of the type
    return encoding.pack(encoding.encode(values, fmt), fmt.bits)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, tuple[Any, bytes]]) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps({k: v for k, v in header.items() if k != "sha256"}, sort_keys=True).encode())
    for name in sorted(tensors):
        shape, data = tensors[name]
        digest.update(f"\n{name}:{list(shape)}:{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


# ---- reading


def _read(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header, tensors) of a file whose digest is right."""
    safetensors = _safetensors()
    try:
        loaded = safetensors.deserialize(data)
        length = int.from_bytes(data[:8], "little")
        metadata = files.parse_json(data[8 : 8 + length]).get("__metadata__") or {}
        header = files.parse_json(metadata.get("fliqs_tf", "null").encode())
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"it is not a safetensors file, or it is damaged ({error}).") from None
    if not isinstance(header, dict) or "layout" not in header:
        raise ValueError("it is a safetensors file that fliqs_tf did not write.")
    if header["layout"] != LAYOUT:
        raise ValueError(f"its layout is {header['layout']!r}; this version of fliqs_tf reads {LAYOUT!r}.")
    if header.get("sha256") != _digest(header, {n: (t["shape"], t["data"]) for n, t in loaded}):
        raise ValueError("it is damaged: its SHA-256 does not match.")
    return header, {n: np.frombuffer(t["data"], _DTYPES[t["dtype"]]).reshape(t["shape"]) for n, t in loaded}


def _restore(data: bytes, custom_objects: dict[str, Any] | None) -> ModelGraph:
    header, tensors = _read(data)
    try:
        return _restored(header, tensors, custom_objects or {})
    except (KeyError, TypeError, AttributeError) as error:
        # The digest is right, so a program wrote it; which one is not for us to guess.
        raise ValueError(f"its header does not fit this layout ({error!r}).") from None


def _restored(header: dict[str, Any], tensors: dict[str, np.ndarray], custom_objects: dict[str, Any]) -> ModelGraph:
    written = header["versions"]["keras"]
    if written.startswith("tf_keras") == IS_KERAS_3:
        switch = "set TF_USE_LEGACY_KERAS=1" if IS_KERAS_3 else "unset TF_USE_LEGACY_KERAS"
        raise ValueError(f"it was written under {written}, and this is {NAME}: {switch} before Python starts.")
    graph = ModelGraph(_rebuilt(header["network"], custom_objects))
    variables, values = _plain_variables(graph), dict(tensors)
    for path, layer in deployed.quantized_layers(graph):
        variables.update(_kernels(path, layer))
        variables.update({f"{name}.range": q.range for name, q in _inputs(path, layer).items()})
    for name, about in header["weights"].items():
        scaled = Format(about["format"]).is_scaled
        for needed in (name, f"{name}.scale")[: 1 + scaled]:
            if needed not in tensors:
                raise ValueError(f"it has no tensor {needed!r}, which its network needs.")
        values[name] = _unpacked(about, tensors[name], tensors.get(f"{name}.scale"))
    for name, variable in variables.items():
        if name not in values:
            raise ValueError(f"it has no tensor {name!r}, which its network needs.")
        if tuple(values[name].shape) != tuple(variable.shape):
            raise ValueError(
                f"{name!r} has the shape {list(values[name].shape)}, its network needs {list(variable.shape)}."
            )
        variable.assign(values[name])
    for _, layer in graph.layers:
        if hasattr(layer, "finalize_state"):  # Normalization computes with what it derives from its variables
            layer.finalize_state()
    return graph


def _unpacked(about: Mapping[str, Any], stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    fmt, shape = Format(about["format"]), about["shape"]
    if fmt.name in _NATIVE:
        values = stored.astype(np.float32)
    else:
        values = encoding.decode(encoding.unpack(stored, fmt.bits, math.prod(shape)), fmt).reshape(shape)
    return deployed.weights_of(deployed.QuantizedWeight(fmt, values, scale))


def _rebuilt(network: str, custom_objects: dict[str, Any]) -> keras.Model:
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(base64.b64decode(network, validate=True), _MOST_CONFIG_BYTES)
        if not reader.eof:
            raise ValueError(f"its network's configuration has more than {_MOST_CONFIG_BYTES} bytes.")
        config = json.loads(text)
    except (binascii.Error, zlib.error, RecursionError) as error:
        raise ValueError(f"its network's configuration cannot be read ({error}).") from None
    loading.check_config(config, custom_objects)
    try:
        return keras.saving.deserialize_keras_object(config, custom_objects=custom_objects, safe_mode=True)
    except Exception as error:  # Keras may raise anything; its messages end with the cause
        cause = " ".join(str(error).split()).rpartition("Exception encountered: ")[2]
        raise ValueError(f"Keras cannot rebuild its network: {cause[:300]}") from None


def _check_same(weights: dict[str, deployed.QuantizedWeight], restored: ModelGraph) -> None:
    """Raises if a restored layer computes with a different weight, as one whose variables are float16 would."""
    for path, layer in deployed.quantized_layers(restored):
        for attribute, weight in deployed.quantized_weights(path, layer).items():
            expected = weights[f"{path}/{attribute}"]
            if not np.array_equal(deployed.weights_of(weight), deployed.weights_of(expected)):
                raise ValueError(f"the weight '{path}/{attribute}' would not be restored to the bit.")
