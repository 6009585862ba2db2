"""Compares a copy of a network with its original: both compute the same as long as nothing is rounded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.graph import tracing, walking
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers.quantizers import Quantizer

_LOG = logging.getLogger("fliqs_tf")
_LARGEST = 32  # of the sides of an image; a network that takes no smaller ones is called on its own size
_OPEN = (32, 8)  # what open sizes are set to
# Shares of the largest value. The copy computes some layers in another order, which shows more in 16 bits.
_TOLERANCE, _TOLERANCE_16 = 1e-3, 5e-2
Maker: TypeAlias = Callable[[np.random.Generator, Sequence[int]], np.ndarray]
_HOLD = ("weight_quantizers", "activation_quantizers")


def check(original: ModelGraph, copy: ModelGraph, input_shape: Any = None) -> None:
    """Calls a model and its copy on one made-up example, with all quantizers passing values through.

    A model that cannot be called on such an example (because not just any tensor of the right shape will do), or whose
    output differs from call to call, is not compared; the log says so.

    Args:
      original: A model, quantized or not. Its state is left as it was.
      copy: A network made of it.
      input_shape: See `tracing.input_specs`.

    Raises:
      ValueError: They differ; names the first layer that does.
    """
    name = original.model.name
    with _unchanged(original), _unchanged(copy), _passing(original), _passing(copy):
        example, expected = _called(original.model, input_shape)
        if example is None:
            return
        try:
            found = _outputs(copy.model, example)
        except Exception as error:
            raise ValueError(
                f"A copy of model {name!r} cannot be called as the model is: {type(error).__name__}: {error}"
            ) from error
        tolerance = _tolerance(original)
        if _agree(expected, found, tolerance):
            return
        if not _agree(expected, _outputs(original.model, example), tolerance):
            _LOG.info("Model %r is random at inference: its copy was not compared with it.", name)
            return
        where = _first_difference(original, copy, example, tolerance)
    raise ValueError(
        f"A copy of model {name!r} from its config computes something other than the model, first in {where}. "
        f"Let get_config return all that the layer computes with, and give functions of your own names that Keras does "
        f"not have."
    )


def _called(model: keras.Model, input_shape: Any) -> tuple[Any, list[np.ndarray]]:
    """(example, outputs) of the first made-up example that a model accepts; (None, []) if it accepts none."""
    problem = None
    try:
        specs = tracing.input_specs(model, input_shape)
        for shapes in _shapes(model, specs):
            for make in (_normal, _zeros_and_ones):
                try:
                    example = _example(specs, shapes, make)
                    return example, _outputs(model, example)
                except Exception as error:
                    problem = problem or error
    except ValueError as error:  # it does not say what its input is
        problem = error
    _LOG.debug("Model %r cannot be called on a made-up example: its copy was not compared. %s", model.name, problem)
    return None, []


def _shapes(model: keras.Model, specs: Any) -> list[list[list[int]]]:
    """Shapes of the inputs to try, one after the other."""
    flat = [spec.shape.as_list() for spec in tf.nest.flatten(specs)]
    batch = next((t.shape[0] for t in getattr(model, "inputs", None) or () if t.shape[0]), 1)
    filled = [[[batch, *(size if d is None else d for d in shape)] for shape in flat] for size in _OPEN]
    if walking.is_network(model):
        filled.insert(0, [_smaller(shape) for shape in filled[0]])
    return [shapes for i, shapes in enumerate(filled) if shapes not in filled[:i]]


def _smaller(shape: list[int]) -> list[int]:
    return [shape[0], *(min(d, _LARGEST) for d in shape[1:3]), shape[3]] if len(shape) == 4 else shape


def _example(specs: Any, shapes: Iterable[list[int]], make: Maker) -> Any:
    rng, shapes = np.random.default_rng(0), iter(shapes)

    def tensor(spec: tf.TensorSpec) -> tf.Tensor:
        shape = next(shapes)
        if spec.dtype == tf.string:
            return tf.fill(shape, "a")
        return tf.cast((make if spec.dtype.is_floating else _zeros_and_ones)(rng, shape), spec.dtype)

    return tf.nest.map_structure(tensor, specs)


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _zeros_and_ones(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    return rng.integers(0, 2, shape).astype(np.float32)


def _outputs(model: keras.Model, example: Any) -> list[np.ndarray]:
    # A network as a layer insists on its own size.
    call = model.call if walking.is_network(model) else model
    return _arrays(call(example, training=False))


def _arrays(outputs: Any) -> list[np.ndarray]:
    return [
        np.array(t if t.dtype.is_integer or t.dtype in (tf.bool, tf.string) else tf.cast(t, tf.float64))
        for t in tf.nest.flatten(outputs, expand_composites=True)
        if tf.is_tensor(t)
    ]


def _tolerance(graph: ModelGraph) -> float:
    dtypes = {str(getattr(layer, "compute_dtype", "float32")) for _, layer in graph.layers}
    return _TOLERANCE_16 if dtypes & {"float16", "bfloat16"} else _TOLERANCE


def _agree(expected: Sequence[np.ndarray], found: Sequence[np.ndarray], tolerance: float) -> bool:
    return len(expected) == len(found) and all(_difference(a, b) <= tolerance for a, b in zip(expected, found))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    if a.shape != b.shape:
        return np.inf
    if a.dtype != np.float64:
        return 0.0 if np.array_equal(a, b) else np.inf
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return np.inf
    largest = max(np.abs(a[finite]).max(initial=0.0), np.finfo(np.float32).tiny)
    return float((np.abs(a - b, where=finite, out=np.zeros_like(a)) / largest).max(initial=0.0))


def _first_difference(original: ModelGraph, copy: ModelGraph, example: Any, tolerance: float) -> str:
    recorded = []
    for graph in (original, copy):
        calls: dict[str, list] = {}
        overrides = {layer: _recorder(layer.call, calls.setdefault(path, [])) for path, layer in graph.layers}
        with tracing.overridden_calls(overrides):
            _outputs(graph.model, example)
        recorded.append(calls)
    expected, found = recorded
    for path, outputs in expected.items():
        if outputs and path in found and not _agree(outputs, found[path], tolerance):
            layer = walking.unwrapped(original.by_path[path])
            return f"layer {path!r} of class {type(layer).__name__}"
    return "what is between its layers"


def _recorder(call: Callable[..., Any], outputs: list[np.ndarray]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        outputs.extend(_arrays(result))
        return result

    return recorded


@contextlib.contextmanager
def _passing(graph: ModelGraph) -> Iterator[None]:
    """Inside it the quantizers of a model return what they are given."""
    with tracing.overridden_calls(dict.fromkeys(_quantizers(graph), _identity)):
        yield


def _quantizers(graph: ModelGraph) -> list[Quantizer]:
    """The quantizers in a model, and those that its layers hold: inside the wrapper of another package the model does
    not know them."""
    held = [q for _, layer in graph.layers for name in _HOLD for q in getattr(layer, name, ())]
    return list(dict.fromkeys([*held, *(q for q in graph.model._flatten_layers() if isinstance(q, Quantizer))]))


def _identity(x: Any, **_: Any) -> Any:
    return x


@contextlib.contextmanager
def _unchanged(graph: ModelGraph) -> Iterator[None]:
    """Restores at its end what calls change: states of recurrent layers and of random generators, losses."""
    before = {id(v): tf.identity(tf.convert_to_tensor(v)) for v in _states(graph)}
    try:
        yield
    finally:
        for variable in _states(graph):
            value = before.get(id(variable), tf.zeros_like(tf.convert_to_tensor(variable)))
            if not np.array_equal(variable, value):
                variable.assign(value)
        graph.model._clear_losses()


def _states(graph: ModelGraph) -> list[tf.Variable]:
    """Variables that a call may change, though it is not in training."""
    layers = list(graph.model._flatten_layers())
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    known = {id(v) for layer in (*_quantizers(graph), *norms) for v in layer.variables}
    # tf_keras has the states of recurrent layers elsewhere, and makes them in the first call.
    recurrent = [getattr(layer, "states", None) for layer in layers if getattr(layer, "stateful", False)]
    found = [*graph.model.non_trainable_variables, *tf.nest.flatten(recurrent)]
    return list({id(v): v for v in found if hasattr(v, "assign") and id(v) not in known}.values())
