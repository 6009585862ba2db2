"""Loading models that others have saved: data only, no code of their own."""

from __future__ import annotations

import os
import pathlib
import reprlib
import zipfile
from typing import Any

from fliqs_tf._keras import IS_KERAS_3, NAME, keras
from fliqs_tf.io import loadable
from fliqs_tf.io.files import MOST_BYTES, parse_json

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


def load_model(path: str | os.PathLike, custom_objects: dict[str, Any] | None = None) -> keras.Model:
    """Loads a `.keras` file, not compiled, if it is data only.

    Keras' safe mode is on, and before Keras sees the file its config is read: every object in it must be on the list of
    `loadable`, which has the layers and other objects of Keras, keras_hub and this package, but for those that call
    functions or read files of the file's choosing. (tf_keras imports whatever module a file asks for, safe mode or
    not.) What the model was compiled with does not matter.

    Args:
      path: What `model.save("model.keras")` wrote.
      custom_objects: {name: class or function} of your own that the file may ask for besides; with it, even if empty,
        those that you have registered with `keras.saving.register_keras_serializable` too.

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
        if isinstance(config, dict):
            config.pop("compile_config", None)  # neither Keras looks at it without `compile`
        try:
            check_config(config, custom_objects)
        except ValueError as error:
            raise ValueError(f"{error} If you trust the file, load it with tf.keras.models.load_model.") from None
        return keras.models.load_model(path, custom_objects, compile=False, safe_mode=True)
    except Exception as error:
        # Keras reports a damaged file by whatever fails first, be it a KeyError or an OSError of HDF5.
        raise ValueError(f"{path} cannot be loaded: {_first_line(error)}") from error


def check_config(node: Any, custom_objects: dict[str, Any] | None = None) -> None:
    """Raises for objects whose making could run code that is not Keras' or ours, or read files.

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
    if "class_name" in node and node["class_name"] not in loadable.DATA:
        _check_object(node, custom_objects)
    for entry in node.values():
        check_config(entry, custom_objects)


def _check_object(node: dict[str, Any], custom_objects: dict[str, Any] | None) -> None:
    """Finds what Keras would find, in its order: what is registered first, then by module and name."""
    name, module, config = node["class_name"], node.get("module"), node.get("config")
    is_function = name == "function"
    registered = _registered(config if is_function else node.get("registered_name", name), custom_objects)
    if registered is None and module is None:
        registered = _registered(name, custom_objects)
    name = config if is_function else name
    if registered is not None:
        trusted = custom_objects is not None and (
            any(registered is given for given in custom_objects.values()) or not loadable.is_of_keras(registered)
        )
        known = trusted or loadable.has_registered(registered)
    elif is_function:
        known = loadable.has_function(module, name)
    else:
        known = loadable.has_class(module, name)
    if not known and name == "Functional" and isinstance(module, str):
        switch = "set TF_USE_LEGACY_KERAS=1" if IS_KERAS_3 else "unset TF_USE_LEGACY_KERAS"
        raise ValueError(f"it was not saved under {NAME}, but under another Keras: {switch} before Python starts.")
    if not known:
        of_module = "" if module is None else f" of the module {reprlib.repr(module)}"
        raise ValueError(
            f"it asks for {reprlib.repr(name)}{of_module}, which is not one of the layers and functions of Keras and "
            f"fliqs_tf that neither call code nor read files. Give classes and functions of your own in custom_objects."
        )
    if name in loadable.TENSORFLOW_CALLS and not _is_pure(config):
        raise ValueError(f"it has a {name} layer that calls more than arithmetic.")
    if isinstance(config, dict) and isinstance(config.get("vocabulary"), str):
        raise ValueError(f"its {name} layer reads the file {reprlib.repr(config['vocabulary'])}.")


def _registered(name: object, custom_objects: dict[str, Any] | None) -> Any:
    """What Keras has under a registered name, or None."""
    return keras.saving.get_registered_object(name, custom_objects) if isinstance(name, str) else None


def _is_pure(config: object) -> bool:
    name = config.get("function") if isinstance(config, dict) else None
    return isinstance(name, str) and (name in _PURE_NAMES or name.split(".")[0] in _PURE)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
