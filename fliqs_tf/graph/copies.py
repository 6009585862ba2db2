"""A new layer from a layer's config, with what a config does not hold: functions, what `adapt` learned, what trains."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import IS_KERAS_3, attributes, keras
from fliqs_tf.graph import walking

_LAYERS = keras.layers
_COMPILED = type(tf.function(lambda: None))
_SERIALIZED = (str, dict, list, tuple)


def of_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A new layer of the class and config of a layer, or of what is inside if it is quantized.

    Functions that the layer was given are the same objects in the copy: a config holds their names alone, and Keras
    has functions of its own under some of them.

    Raises:
      ValueError: The config does not make such a layer.
    """
    wrapper, layer = layer, walking.unwrapped(layer)
    try:
        if isinstance(layer, _LAYERS.Lambda):
            return _of_lambda(layer)
        # The config of a composite layer is that of its parts in float.
        config = getattr(wrapper, "layer_config", None) or layer.get_config()
        with scope(layer):
            try:
                copy = type(layer).from_config(_with_functions(config, layer))
            except Exception:  # a from_config that takes names alone; see `keep_functions`
                copy = type(layer).from_config(config)
    except Exception as error:
        raise ValueError(
            f"Layer {layer.name!r} of class {type(layer).__name__} cannot be copied: its get_config or from_config "
            f"failed ({type(error).__name__}: {error}). Let get_config return the arguments of __init__."
        ) from error
    for old, new in _pairs(layer, copy):
        _keep_learned(old, new)
    return copy


def scope(model: keras.layers.Layer) -> contextlib.AbstractContextManager:
    """Within it Keras finds the classes and functions of its user that are in a model, registered or not."""
    layers = _all_in(walking.unwrapped(model))
    found: dict[str, type | Callable] = {type(layer).__name__: type(layer) for layer in layers}
    found |= {_name(function): function for layer in layers for function in _functions(layer).values()}
    return keras.utils.custom_object_scope({name: thing for name, thing in found.items() if not _is_of_keras(thing)})


def keep_functions(layer: keras.layers.Layer, copy: keras.layers.Layer) -> None:
    """Gives a copy the functions of its user that a layer computes with, where its config made others of them."""
    for old, new in _own_pairs(layer, copy):
        others = _functions(new)
        for name, function in _functions(old).items():
            if name in others and not _is_of_keras(function) and not _is_same(function, others[name]):
                setattr(new, name, function)


def keep_weights(layer: keras.layers.Layer, copy: keras.layers.Layer) -> None:
    """Assigns a copy the weights of a layer, but not those of its parts.

    Raises:
      ValueError: The copy has other weights.
    """
    if isinstance(layer, _LAYERS.Discretization) or hasattr(layer, "get_vocabulary"):
        return  # the copy was given what they compute with; weights of theirs in tf_keras are for going on with `adapt`
    old_weights, new_weights = walking.own_weights(layer), walking.own_weights(copy)
    if [w.shape for w in old_weights] != [w.shape for w in new_weights]:
        raise ValueError(
            f"A copy of layer {layer.name!r} of class {type(layer).__name__} from its config has other weights. Let "
            f"get_config return the arguments of __init__."
        )
    for old, new in zip(old_weights, new_weights):
        new.assign(old)
    if isinstance(layer, _LAYERS.Normalization):
        copy.finalize_state()  # it computes with what it derives from its weights


def keep_trainable(layer: keras.layers.Layer, copy: keras.layers.Layer) -> None:
    """Freezes in a copy what is frozen in a layer, and no more: what is unfrozen later is the same in both, too.

    The parts of a layer and of a network have to be given one by one.
    """
    source, target = walking.unwrapped(layer), walking.unwrapped(copy)
    for old, new in _own_pairs(source, target):
        _set_trainable(new, old.trainable)
    for part in (copy, *_quantizers(copy)):
        _set_trainable(part, target.trainable)
    if IS_KERAS_3:  # there each variable is frozen or not
        for old, new in zip(walking.own_weights(source), walking.own_weights(target)):
            new.trainable = old.trainable


def function_name(function: Callable | None) -> str:
    """Name of an activation function: that of Keras' own only if it is Keras' own (or TensorFlow's)."""
    if function is None:
        return "linear"
    return f"{_name(function)}_of_its_user" if _is_mistakable(function) else _name(function)


def is_of_its_user(function: object) -> bool:
    """True for a function that is neither Keras' own nor TensorFlow's."""
    return _is_function(function) and not _is_of_keras(function)


def mistakable_functions(layer: keras.layers.Layer) -> dict[str, str]:
    """{attribute: name} of the functions of a layer in whose place a file would have Keras' own of that name."""
    return {name: _name(function) for name, function in _functions(layer).items() if _is_mistakable(function)}


def give_functions(
    layer: keras.layers.Layer, functions: Mapping[str, str], custom_objects: dict[str, Any] | None
) -> None:
    """Gives a layer from a file the functions that the file names.

    Args:
      layer: The layer.
      functions: What `mistakable_functions` said when it was saved.
      custom_objects: As for `load_model`.

    Raises:
      ValueError: There is no such function; says how to give it.
    """
    for attribute, name in functions.items():
        function = keras.saving.get_registered_object(name, custom_objects)
        if function is None:
            raise ValueError(
                f"Layer {layer.name!r} computes with a function {name!r} of its user's, not with the one of Keras: "
                f"load the model with custom_objects={{{name!r}: the function}}."
            )
        setattr(layer, attribute, function)


def _of_lambda(layer: keras.layers.Lambda) -> keras.layers.Lambda:
    made = type(layer)(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=layer.get_config()["dtype"],
    )
    made.supports_masking = layer.supports_masking
    return made


def _with_functions(config: Mapping[str, Any], layer: keras.layers.Layer) -> dict[str, Any]:
    """A config with the functions of a layer, and of layers in its config, in place of what names them."""
    found = dict(config)
    for key, value in config.items():
        held = getattr(layer, key, None)
        if isinstance(held, _LAYERS.Layer) and isinstance(value, dict) and isinstance(value.get("config"), dict):
            found[key] = {**value, "config": _with_functions(value["config"], held)}
        elif isinstance(value, _SERIALIZED) and _is_function(held) and not _is_method(layer, key):
            found[key] = held
    return found


def _is_method(layer: keras.layers.Layer, name: str) -> bool:
    static = inspect.getattr_static(type(layer), name, None)
    return static is not None and not isinstance(static, property)


def _is_function(value: object) -> bool:
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, functools.partial, _COMPILED))


def _functions(layer: keras.layers.Layer) -> dict[str, Callable]:
    """{attribute: function} of those that a layer holds, but not of its parts. Objects made of functions (partial,
    tf.function) are not among them: what a layer makes for itself is bound to its own weights."""
    plain = (types.FunctionType, types.BuiltinFunctionType)
    return {name: value for name, value in attributes(layer).items() if isinstance(value, plain)}


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _is_of_keras(thing: Any) -> bool:
    module = getattr(inspect.unwrap(thing), "__module__", None) or ""
    return module.split(".")[0] in ("keras", "tf_keras", "keras_hub", "tensorflow")


def _is_mistakable(function: Callable) -> bool:
    return not _is_of_keras(function) and hasattr(keras.activations, _name(function))


def _is_same(function: Callable, other: Callable) -> bool:
    """True for one function, and for one that is made anew, from the same code, for each layer."""
    codes = [getattr(inspect.unwrap(f), "__code__", f) for f in (function, other)]
    return function is other or codes[0] is codes[1]


def _all_in(layer: Any) -> list[Any]:
    """A layer and all that it holds; an operation in a graph of Keras 3 holds nothing."""
    return list(layer._flatten_layers()) if isinstance(layer, _LAYERS.Layer) else [layer]


def _pairs(layer: keras.layers.Layer, copy: keras.layers.Layer) -> list[tuple[keras.layers.Layer, keras.layers.Layer]]:
    """(layer, copy) of a layer and of all that is in it, if both are made of the same classes."""
    old, new = _all_in(layer), _all_in(copy)
    same = [type(each) for each in old] == [type(each) for each in new]
    return list(zip(old, new)) if same else [(layer, copy)]


def _own_pairs(
    layer: keras.layers.Layer, copy: keras.layers.Layer
) -> list[tuple[keras.layers.Layer, keras.layers.Layer]]:
    """(layer, copy) of a layer and of what is in it, without those that `ModelGraph.layers` has, too."""
    return [(layer, copy)] if walking.children(layer) else _pairs(layer, copy)


def _quantizers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    return [q for name in ("weight_quantizers", "activation_quantizers") for q in getattr(layer, name, ())]


def _set_trainable(layer: keras.layers.Layer, value: bool) -> None:
    layer._trainable = value  # the setter would set that of the layers inside, too


def _keep_learned(layer: keras.layers.Layer, copy: keras.layers.Layer) -> None:
    """What `adapt` learned, before the copy is called: what a layer gives out may depend on it in size."""
    if isinstance(layer, _LAYERS.Discretization):
        if not np.array_equal(layer.bin_boundaries, copy.bin_boundaries):
            copy.bin_boundaries = copy.input_bin_boundaries = list(layer.bin_boundaries)
            copy.num_bins = None  # or tf_keras would look for boundaries in the weights of a file
    elif hasattr(layer, "get_vocabulary") and hasattr(copy, "set_vocabulary"):
        words, (old, new) = layer.get_vocabulary(), (getattr(each, "_lookup_layer", each) for each in (layer, copy))
        if words == copy.get_vocabulary():
            return
        weights = getattr(old, "idf_weights", None)
        weights = () if weights is None else (np.array(tf.convert_to_tensor(weights)),)
        copy.set_vocabulary(words, *weights)
        # In its config, so that a model from a file computes with it before Keras reads the rest of the file.
        new.input_vocabulary = np.array(words).tolist()
        new.input_idf_weights = weights[0].tolist() if weights else None
