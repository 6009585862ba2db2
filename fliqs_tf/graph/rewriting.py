"""Layers put into a copy of a network, or taken out, by editing the network's configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph import copies, dataflow, walking
from fliqs_tf.graph.model_graph import ModelGraph

_LAYERS = keras.layers
Place: TypeAlias = str | tuple[str, int]
"""Path of a layer: behind each of its calls; with the index of a call: behind that one."""


def last_name(path: str) -> str:
    """The name of a layer, from its path."""
    return path.rpartition("/")[2]


def with_added(
    graph: ModelGraph,
    added: Mapping[Place, Sequence[keras.layers.Layer]],
    removed: Collection[str] = (),
    kinds: tuple[type[keras.Model], type[keras.Model]] = (keras.Model, keras.Sequential),
) -> ModelGraph:
    """A copy of a network with layers put behind some of its own, and others taken out.

    Args:
      graph: Of a Functional or Sequential model.
      added: Path of a layer -> layers to put behind each of its calls, one after the other; or (path, which of its
        calls) -> layers to put behind that one.
      removed: Paths of layers that read one value and change no shape.
      kinds: Class of the copy of a Functional and of a Sequential model.

    Raises:
      ValueError: The network has a layer of such a name.
    """
    model, used = graph.model, {last_name(path) for path, _ in graph.layers}
    clash = [layer.name for layers in added.values() for layer in layers if layer.name in used]
    if clash:
        raise ValueError(f"Model {model.name!r} has a layer {clash[0]!r} already: give it another name.")
    config = _edited(model.get_config(), "", added, removed)
    with copies.scope(model):
        copy = kinds[isinstance(model, keras.Sequential)].from_config(config)
    if not copy.built:
        copy.build((None, *model.inputs[0].shape[1:]))
    made = ModelGraph(copy)
    for path, layer in graph.layers:
        if path in made.by_path:
            copies.keep_functions(walking.unwrapped(layer), walking.unwrapped(made.by_path[path]))
            if layer.weights:
                made.by_path[path].set_weights(layer.get_weights())
    return made


def without(graph: ModelGraph, *classes: type) -> ModelGraph:
    """A copy of a network without the layers of some classes that read one value and change no shape; the network
    itself if it has none."""
    paths = {path for path, _ in graph.of_type(*classes)}
    return with_added(graph, {}, paths) if paths else graph


def _edited(
    config: dict[str, Any], prefix: str, added: Mapping[Place, Sequence[keras.layers.Layer]], removed: Collection[str]
) -> dict[str, Any]:
    """The configuration of a network with layers put in; what read the ones before reads them instead."""
    entries: list[dict] = []
    sources: dict[str, dict[int, tuple[str, int]]] = {}  # layer -> which of its calls -> whose call is read instead
    names = {entry.get("name") for entry in config["layers"]}
    for entry in config["layers"]:
        name = entry.get("name") or entry["config"]["name"]
        path = prefix + name
        if path in removed:
            for i, node in enumerate(entry.get("inbound_nodes", ())):
                ((source, call, _),) = dataflow.references(node, names)
                sources.setdefault(name, {})[i] = (source, call)
            continue
        entry = dict(entry)
        if "layers" in entry["config"]:
            entry["config"] = _edited(entry["config"], f"{path}/", added, removed)
        news = added.get(path, [])
        if news and entry["class_name"] == "Quantized" and isinstance(news[0], _LAYERS.Activation):
            layer = dict(entry["config"]["layer"])
            layer["config"] = {**layer["config"], "activation": "linear"}
            entry["config"] = {**entry["config"], "layer": layer, "functions": {}}
        entries.append(entry)
        calls = range(max(1, len(entry.get("inbound_nodes", ()))))
        for place, read in ((path, calls), *(((path, i), [i]) for i in calls)):
            before = [(name, i) for i in read]
            for new in added.get(place, ()):
                made = {**keras.saving.serialize_keras_object(new), "name": new.name}
                if "inbound_nodes" in entry:
                    made["inbound_nodes"] = [_reading(*call) for call in before]
                entries.append(made)
                before = [(new.name, i) for i in range(len(before))]
            if place in added:
                sources.setdefault(name, {}).update(zip(read, before))
    own = {layer.name for layers in added.values() for layer in layers}
    entries = [
        entry
        if "inbound_nodes" not in entry or entry["name"] in own
        else {**entry, "inbound_nodes": _rewired(entry["inbound_nodes"], sources)}
        for entry in entries
    ]
    ends = {"output_layers": _rewired(config["output_layers"], sources)} if "output_layers" in config else {}
    return {**config, "layers": entries, **ends}


def _reading(name: str, call: int) -> Any:
    """How the configuration of a call on one value looks."""
    if not IS_KERAS_3:
        return [[name, call, 0, {}]]
    history = {"shape": [None], "dtype": "float32", "keras_history": [name, call, 0]}
    return {"args": [{"class_name": "__keras_tensor__", "config": history}], "kwargs": {}}


def _rewired(config: Any, sources: Mapping[str, Mapping[int, tuple[str, int]]]) -> Any:
    if dataflow.is_reference(config, sources):
        name, call = config[:2]
        while call in sources.get(name, ()):
            name, call = sources[name][call]
        return [name, call, config[2], *(_rewired(item, sources) for item in config[3:])]
    if isinstance(config, dict):
        return {key: _rewired(item, sources) for key, item in config.items()}
    if isinstance(config, (list, tuple)):
        return [_rewired(item, sources) for item in config]
    return config
