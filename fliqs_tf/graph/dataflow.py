"""A Keras network as a list of calls: which layer reads which values and gives which. Nested networks are opened.

Read from the network's own configuration, which both Kerases write in nearly the same words.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Iterator
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.graph import walking


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
      path: Name of the layer, with the networks around it: "encoder/conv1".
      layer: The layer; a Keras 3 operation if a function of `keras.ops` was called on symbolic values.
      inputs: Values that it reads.
      output: The value that it gives.
      constants: Other arguments: whatever is no value of the network.
      index: Which of the calls of the layer it is, in the network that holds the layer.
    """

    path: str
    layer: Any = dataclasses.field(compare=False)
    inputs: tuple[int, ...]
    output: int
    constants: tuple = ()
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Dataflow:
    """The calls of a network, in an order in which they can run.

    Attributes:
      inputs: (value, name, shape of one example, dtype name) per input of the model.
      calls: What runs.
      outputs: The values that the model gives.
      output_names: Their names.
    """

    inputs: tuple[tuple[int, str, tuple, str], ...]
    calls: tuple[Call, ...]
    outputs: tuple[int, ...]
    output_names: tuple[str, ...]

    @functools.cached_property
    def makers(self) -> dict[int, Call]:
        """Value -> the call that gives it; inputs have none."""
        return {call.output: call for call in self.calls}

    @functools.cached_property
    def readers(self) -> dict[int, list[Call]]:
        """Value -> the calls that read it."""
        found: dict[int, list[Call]] = {}
        for call in self.calls:
            for value in dict.fromkeys(call.inputs):
                found.setdefault(value, []).append(call)
        return found


def is_reference(item: object, names: Container[str]) -> bool:
    """True for what both Kerases write for a value: [layer name, call, output, ...]."""
    return (
        isinstance(item, (list, tuple))
        and len(item) >= 3
        and isinstance(item[0], str)
        and item[0] in names
        and all(isinstance(n, int) and not isinstance(n, bool) for n in item[1:3])
    )


def read(model: keras.Model) -> Dataflow:
    """The calls of a Functional or Sequential model.

    Raises:
      ValueError: A layer gives several values, or is called in a way that the configuration does not say.
    """
    counter = iter(range(10**9))
    values = [next(counter) for _ in model.inputs]
    inputs = tuple(
        (value, tensor.name.partition(":")[0], tuple(tensor.shape[1:]), tf.as_dtype(tensor.dtype).name)
        for value, tensor in zip(values, tf.nest.flatten(model.inputs))
    )
    calls: list[Call] = []
    # A value that no call gives is one of several of a layer, which no exporter takes: it has a number for itself.
    outputs = [next(counter) if value is None else value for value in _open(model, values, "", counter, calls)]
    names = getattr(model, "output_names", None) or [f"output_{i}" for i in range(len(outputs))]
    return Dataflow(inputs, tuple(calls), tuple(outputs), tuple(names))


def _open(
    model: keras.Model, values: list[int], prefix: str, counter: Iterator[int], calls: list[Call]
) -> list[int | None]:
    """Appends the calls of `model` on `values`; returns the values of its outputs, None for one that no call gives."""
    if not _has_graph(model):
        given: list[int | None] = [*values]
        for layer in model.layers:
            if not isinstance(layer, keras.layers.InputLayer):
                (value,) = given
                if value is None:
                    raise _reads_nothing(prefix + layer.name)
                given = _called(layer, [value], (), 0, prefix, counter, calls)
        return given
    config = model.get_config()
    layers = {layer.name: layer for layer in getattr(model, "operations", None) or model.layers}
    known = dict(zip([name for name, _, _ in references(config["input_layers"], layers)], values))
    found = {(name, 0, 0): value for name, value in known.items()}
    first: dict[str, int] = {}  # tf_keras counts calls of nested networks from 1: it leaves out the one that built them
    nodes = [entry["inbound_nodes"] for entry in config["layers"]]
    for name, index, _ in references([nodes, config["output_layers"]], layers):
        first[name] = min(first.get(name, index), index)

    def key_of(reference: list) -> tuple[str, int, int]:
        name, index, i = reference
        return name, index - first[name], i

    pending = [
        (entry["name"], index, node)
        for entry in config["layers"]
        if entry["name"] not in known
        for index, node in enumerate(entry["inbound_nodes"])
    ]
    while pending:
        waiting = []
        for name, index, node in pending:
            wanted = [key_of(r) for r in references(node, layers)]
            if not found.keys() >= set(wanted):
                waiting.append((name, index, node))
                continue
            read_values, constants = [found[key] for key in wanted], _constants(node, layers)
            results = _called(layers[name], read_values, constants, index, prefix, counter, calls)
            found.update({(name, index, i): value for i, value in enumerate(results) if value is not None})
        if len(waiting) == len(pending):
            raise _reads_nothing(prefix + waiting[0][0])
        pending = waiting
    return [found.get(key_of(r)) for r in references(config["output_layers"], layers)]


def _reads_nothing(path: str) -> ValueError:
    return ValueError(f"Layer {path!r} reads a value that no layer of the network gives.")


def _called(
    layer: Any,
    values: list[int],
    constants: tuple,
    index: int,
    prefix: str,
    counter: Iterator[int],
    calls: list[Call],
) -> list[int | None]:
    if walking.is_network(layer):
        return _open(layer, values, f"{prefix}{layer.name}/", counter, calls)
    call = Call(f"{prefix}{layer.name}", layer, tuple(values), next(counter), constants, index)
    calls.append(call)
    return [call.output]


def _has_graph(model: keras.Model) -> bool:
    return "input_layers" in model.get_config()


def references(config: Any, names: Container[str]) -> list[list]:
    """Every value that a piece of configuration refers to, in its order."""
    if is_reference(config, names):
        # The fourth entry of tf_keras holds what else the call was given, values too.
        return [list(config[:3])] + [r for item in config[3:] for r in references(item, names)]
    if isinstance(config, dict):
        return [r for item in config.values() for r in references(item, names)]
    if isinstance(config, (list, tuple)):
        return [r for item in config for r in references(item, names)]
    return []


def _constants(node: Any, names: Container[str]) -> tuple:
    """Numbers among the arguments of a call."""
    if is_reference(node, names):
        return tuple(c for item in node[3:] for c in _constants(item, names))
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            return ()
        return tuple(c for item in node.values() for c in _constants(item, names))
    if isinstance(node, (list, tuple)):
        return tuple(c for item in node for c in _constants(item, names))
    return (node,) if isinstance(node, (int, float)) and not isinstance(node, bool) else ()
