"""What a model file of others may ask for: the classes and functions of Keras, by list.

The list is that of the public namespaces, without what calls code or reads files of the configuration's choosing. What
is not on it is refused, so that a class which nobody has thought of is refused too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable

from fliqs_tf._keras import IS_KERAS_3, keras

DATA = ("__tensor__", "__numpy__", "__bytes__", "__slice__", "__ellipsis__", "__keras_tensor__", "__tuple__")
"""Class names of plain values, which Keras rebuilds without a class."""

_NAMESPACES = (
    "layers",
    "layers.experimental",
    "layers.experimental.preprocessing",
    "models",
    "initializers",
    "regularizers",
    "constraints",
    "losses",
    "metrics",
    "optimizers",
    "optimizers.legacy",
    "optimizers.schedules",
    "mixed_precision",
    "dtype_policies",
    "quantizers",
    "random",
)
_WITH_FUNCTIONS = ("activations", "losses", "metrics")
_NOT_PURE = frozenset(
    {
        # These call code that the configuration names or holds.
        *("Lambda", "TFSMLayer", "JaxLayer", "FlaxLayer", "TorchModuleWrapper"),
        # These read files.
        *("DenseFeatures", "SequenceFeatures", "DynamicEmbedding", "DynamicLookup", "AWQConfig", "GPTQConfig"),
        # These find other objects by name.
        *("get", "serialize", "deserialize"),
    }
)
# Operations on tensors that are layers of a graph: public functions make them, the classes themselves are not public.
_OPERATIONS = ("numpy", "nn", "math", "core", "linalg", "image")
_CALLING = frozenset(
    {"Map", "VectorizedMap", "Scan", "AssociativeScan", "Switch", "Cond", "WhileLoop", "ForiLoop", "JVP"}
)
TENSORFLOW_CALLS = ("TFOpLambda", "SlicingOpLambda")
"""Layers of tf_keras that call a function of TensorFlow: which one has to be looked at."""


def has_class(module: object, name: object) -> bool:
    """True if a file may ask for a class.

    Args:
      module, name: As a file gives them: ("keras.layers", "Dense"). A layer of an older file has no module: None.
    """
    package = module.partition(".")[0] if isinstance(module, str) else None
    return isinstance(name, str) and isinstance(module, str | None) and (module, name) in _class_names(package)


def has_function(module: object, name: object) -> bool:
    """True if a file may ask for a function, by the names it gives."""
    return isinstance(name, str) and isinstance(module, str | None) and (module, name) in _function_names()


def has_registered(found: type | Callable) -> bool:
    """True if a file may ask for what Keras has registered, by its registered name.

    Args:
      found: The class or function.
    """
    package = found.__module__.partition(".")[0]
    if package == "keras_hub" and inspect.isfunction(found):
        return True  # its activations
    return keras.saving.get_registered_name(found).startswith("fliqs_tf>") or found in _classes(package)


def is_of_keras(found: type | Callable) -> bool:
    """True if a registered class or function is Keras' and not the user's."""
    return found.__module__.partition(".")[0] in ("keras", "tf_keras", "keras_hub")


@functools.cache
def _classes(package: str) -> frozenset[type]:
    if package == keras.__name__:
        return frozenset(cls for _, _, cls in _of_keras())
    if package == "keras_hub" and IS_KERAS_3:
        return frozenset(_of_keras_hub())
    return frozenset()


@functools.cache
def _class_names(package: str | None) -> frozenset[tuple[str | None, str]]:
    """(module, name) as both Keras' public names and the places of definition have them."""
    if package == "keras_hub":
        return frozenset((cls.__module__, cls.__name__) for cls in _classes(package))
    names = set()
    for namespace, name, cls in _of_keras():
        names |= {(None, name), (None, cls.__name__), (cls.__module__, cls.__name__)}
        if namespace is not None:  # tf_keras writes its public names as those of "keras"
            names |= {(f"{root}.{namespace}".rstrip("."), name) for root in ("keras", keras.__name__)}
    return frozenset(names)


@functools.cache
def _function_names() -> frozenset[tuple[str | None, str]]:
    names = set()
    for namespace in _WITH_FUNCTIONS:
        for name, function in vars(getattr(keras, namespace)).items():
            if inspect.isfunction(function) and name not in _NOT_PURE:
                modules = (None, "builtins", f"keras.{namespace}", f"{keras.__name__}.{namespace}")
                names |= {(module, name) for module in modules} | {(function.__module__, function.__name__)}
    return frozenset(names)


@functools.cache
def _of_keras() -> tuple[tuple[str | None, str, type], ...]:
    """(public namespace or None, name there, class)."""
    found: list[tuple[str | None, str, type]] = []
    for namespace in _NAMESPACES:
        found += [(namespace, name, cls) for name, cls in _public_classes(keras, namespace)]
    public = {cls for _, _, cls in found}
    found += [("", name, cls) for name, cls in vars(keras).items() if inspect.isclass(cls) and cls in public]
    graph = importlib.import_module(keras.Model.__module__.rpartition(".")[0] + ".functional").Functional
    found.append((None, "Functional", graph))
    if IS_KERAS_3:
        modules = [importlib.import_module(f"keras.src.ops.{name}") for name in _OPERATIONS]
        defined = {name: cls for module in modules for name, cls in vars(module).items() if name not in _CALLING}
        found += [(None, n, c) for n, c in defined.items() if inspect.isclass(c) and issubclass(c, keras.Operation)]
    else:
        calls = importlib.import_module("tf_keras.src.layers.core.tf_op_layer")
        found += [(None, name, getattr(calls, name)) for name in TENSORFLOW_CALLS]
        base = importlib.import_module("tf_keras.src.engine.base_layer")
        found += [(None, name, getattr(base, name)) for name in ("AddLoss", "AddMetric")]
    return tuple(found)


def _of_keras_hub() -> list[type]:
    """Layers and models that compute. Those that prepare data read vocabularies and configurations from files."""
    try:
        hub = importlib.import_module("keras_hub")
        preparing = importlib.import_module("keras_hub.src.layers.preprocessing.preprocessing_layer").PreprocessingLayer
    except ImportError:
        return []
    public = [cls for namespace in ("layers", "models") for _, cls in _public_classes(hub, namespace)]
    registered = [c for c in keras.saving.get_custom_objects().values() if inspect.isclass(c)]
    inside = [c for c in registered if c.__module__.startswith(("keras_hub.src.layers.", "keras_hub.src.models."))]
    return [c for c in (*public, *inside) if issubclass(c, keras.layers.Layer) and not issubclass(c, preparing)]


def _public_classes(package: types.ModuleType, namespace: str) -> list[tuple[str, type]]:
    module: types.ModuleType | None = package
    for part in namespace.split("."):
        module = getattr(module, part, None)
    if module is None:
        return []
    return [(name, cls) for name, cls in vars(module).items() if inspect.isclass(cls) and name not in _NOT_PURE]
