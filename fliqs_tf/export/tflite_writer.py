"""Writes a deployed model as a `.tflite` file with integer kernels.

`boundaries` puts int8 tensors between the layers, `lowering` turns the layers into steps, and `tflite_network` turns
these into the tensors and operations of a `tflite_file`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from fliqs_tf._keras import check_model, keras
from fliqs_tf.export import biases, boundaries, lowering, tflite_network
from fliqs_tf.graph import rewriting
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.io import batches, files
from fliqs_tf.layers import requantize

_BATCH = 32  # examples of arrays that are computed at a time


def tflite(
    final: keras.Model,
    path: str | os.PathLike,
    representative: tf.data.Dataset | Iterable[Any] | None = None,
    *,
    int4: bool = True,
) -> keras.Model:
    """Writes a deployed model to a `.tflite` file.

    Args:
      final: What `qmodel.deploy()` or `fliqs_tf.apply` returned, trained. It is not changed.
      path: The file to write. It is written whole or not at all.
      representative: Examples, for the ranges of int8 tensors that a model trained without `target="tflite"` lacks:
        arrays, or batches as a `tf.data.Dataset`, list or generator, with labels or without; see `fliqs_tf.io.batches`.
        A few hundred, so that typical extremes are among them.
      int4: Store weights of 4 bits or fewer as int4, two to a byte, where there are kernels. XNNPACK has none for
        convolutions: LiteRT's own are slower and round twice. False: one to a byte, faster and exact, twice the size.

    Returns:
      The Keras model that the file computes: `final` with boundary quantizers (`fliqs_tf.export.boundaries`), with
        biases that int32 can hold, and with the roundings of kernels that round in ways of their own. `check` with it
        shows whether the file is right; `check` with `final` shows what the conversion costs.

    Raises:
      ImportError: ai-edge-litert is not installed.
      TypeError: The model is of the other Keras, or `representative` does not hold examples.
      ValueError: TFLite has no kernel for a layer or a format, or a range is missing: names the layer. Or the examples
        do not fit the model.
      OSError: The file cannot be written.
    """
    check_model(final)
    try:
        import ai_edge_litert  # noqa: F401
    except ImportError as error:
        raise ImportError("Writing .tflite files needs ai-edge-litert: pip install 'fliqs-tf[export]'.") from error
    graph = ModelGraph(final)
    lowering.check_layers(graph)  # before it is copied: some of the layers that TFLite lacks cannot be copied
    graph = boundaries.with_boundary_quantizers(rewriting.without(graph, *requantize.ROUNDINGS))
    examples = None if representative is None else batches.read(representative, graph.model, "representative")
    boundaries.calibrate(graph, None if examples is None else (batch.x for batch in examples.in_order(_BATCH)))
    biases.round_to_int32(graph)
    network = tflite_network.build(lowering.steps(graph), int4)
    content = network.to_bytes(f"{final.name}, written by fliqs_tf")
    with files.replacing(path) as temporary:
        temporary.write_bytes(content)
    return requantize.insert(graph, network.roundings).model


def as_shipped(graph: ModelGraph) -> ModelGraph:
    """A copy of a trained model that computes what its file will, as `tflite` returns it, without writing the file."""
    graph = boundaries.with_boundary_quantizers(graph)
    biases.round_to_int32(graph)
    network = tflite_network.build(lowering.steps(graph), int4=True)
    return requantize.insert(graph, network.roundings)
