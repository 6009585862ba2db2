"""Weights that a network begins with, from a file of a network like it."""

from __future__ import annotations

import pathlib

from fliqs_tf._keras import keras
from fliqs_tf.io import loading


def load(network: keras.Model, path: pathlib.Path) -> None:
    """Gives a network the weights in a file.

    Args:
      network: A float network; nothing of it changes unless all of it fits.
      path: A `.keras` file, a `.weights.h5` file, or the directory of a run of train.py, which holds model.keras.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is of another network: says which layers differ.
    """
    if path.is_dir():
        path = path / "model.keras"
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    if path.name.endswith(".weights.h5"):
        before = network.get_weights()
        try:
            network.load_weights(path)
        except ValueError as error:
            network.set_weights(before)
            raise ValueError(f"These weights are of another network than {network.name!r}: {error}") from None
        return
    given = loading.load_model(path, custom_objects={})
    differences = _differences(given, network)
    if differences:
        shown = "; ".join(differences[:6]) + ("; ..." if len(differences) > 6 else "")
        raise ValueError(f"The model is another one than {network.name!r}: {shown}.")
    for layer in network.layers:
        if layer.weights:
            layer.set_weights(given.get_layer(layer.name).get_weights())


def _differences(given: keras.Model, network: keras.Model) -> list[str]:
    """What of two networks' layers is not alike, by name, in words."""
    theirs, ours = ({layer.name: _shapes(layer) for layer in model.layers} for model in (given, network))
    found = []
    for name, shapes in ours.items():
        if name not in theirs:
            if shapes:
                found.append(f"it has no layer {name!r}")
        elif theirs[name] != shapes:
            found.append(f"layer {name!r} has weights {theirs[name]}, not {shapes}")
    found += [f"layer {name!r} is only there" for name in theirs if theirs[name] and name not in ours]
    return found


def _shapes(layer: keras.layers.Layer) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for weight in layer.get_weights()]
