"""Loading models that others have saved: data only, no code of their own."""

from __future__ import annotations

import os
import pathlib
import reprlib
import zipfile

from fliqs_tf._keras import keras
from fliqs_tf.files import MOST_BYTES, parse_json

_PACKAGES = ("keras", "tf_keras", "keras_hub", "fliqs_tf")
_FUNCTIONS = ("keras.activations", "keras.losses", "keras.metrics")
# Layers of tf_keras that call what their config names: any function of TensorFlow, also those that write files.
_CALLS = ("ClassMethod", "InstanceMethod", "InstanceProperty", "Lambda", "SlicingOpLambda", "TFOpLambda", "__lambda__")
_PURE = ("__operators__", "math", "nn", "linalg")
_PURE_NAMES = (
    "cast",
    "concat",
    "expand_dims",
    "identity",
    "reshape",
    "shape",
    "split",
    "squeeze",
    "stack",
    "transpose",
)


def load_model(path: str | os.PathLike) -> keras.Model:
    """Loads a `.keras` file, not compiled, if it is data only.

    Keras' safe mode is on, and before Keras sees the file its config is read: every object in it must be one of Keras
    or of this package, and none may call functions that the file names. (tf_keras imports whatever module a file asks
    for, safe mode or not.)

    Args:
      path: What `model.save("model.keras")` wrote.

    Returns:
      The model, not compiled.

    Raises:
      ValueError: The file is damaged, not a `.keras` file, or holds what could be code; names the file.
      OSError: It cannot be read.
    """
    path = pathlib.Path(path)
    with open(path, "rb"):
        pass  # a file that is not there is an error of its own
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a .keras file: save models with model.save('NAME.keras').")
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("config.json").file_size
            if size > MOST_BYTES:
                raise ValueError(f"its config has {size} bytes, at most {MOST_BYTES} are allowed.")
            config = parse_json(archive.read("config.json"))
        check_config(config)
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        # Keras reports a damaged file by whatever fails first, be it a KeyError or an OSError of HDF5.
        raise ValueError(f"{path} cannot be loaded: {_first_line(error)}") from error


def check_config(node, custom_objects: dict | None = None) -> None:
    """Raises for objects whose making could run code that is not Keras' or ours.

    Args:
      node: The config of a model, as JSON data.
      custom_objects: {name: class or function}; with it, even if empty, what is in it or registered with
        `keras.saving.register_keras_serializable` may be asked for too.

    Raises:
      ValueError: Names the object.
    """
    if isinstance(node, list):
        for entry in node:
            check_config(entry, custom_objects)
    if not isinstance(node, dict):
        return
    kind, module = node.get("class_name"), node.get("module")
    if custom_objects is None or not _is_known(node, custom_objects):
        if module is not None and (not isinstance(module, str) or module.split(".")[0] not in _PACKAGES):
            raise ValueError(f"it asks for the module {reprlib.repr(module)}; known: {', '.join(_PACKAGES)}.")
        if kind == "function" and module not in _FUNCTIONS:
            raise ValueError(f"it asks for the function {reprlib.repr(node.get('config'))}.")
    if kind in _CALLS and not (kind == "TFOpLambda" and _is_pure(node.get("config"))):
        raise ValueError(
            f"it has a {kind} layer, which calls code of the file's choosing. If you trust the file, load it with "
            f"tf.keras.models.load_model."
        )
    for entry in node.values():
        check_config(entry, custom_objects)


def _is_known(node: dict, custom_objects: dict) -> bool:
    names = [node.get(key) for key in ("registered_name", "class_name", "config")]
    found = [keras.saving.get_registered_object(n, custom_objects) for n in names if isinstance(n, str)]
    return any(entry is not None for entry in found)


def _is_pure(config) -> bool:
    name = config.get("function") if isinstance(config, dict) else None
    return isinstance(name, str) and (name in _PURE_NAMES or name.split(".")[0] in _PURE)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
