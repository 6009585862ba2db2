"""Whether a file computes what the Keras model does."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import check_model, keras
from fliqs_tf.io import batches

KERNELS = ("XNNPACK", "built-in")
_BATCH = 32  # examples of arrays that are computed at a time
_STEPS = 127  # a float output has no codes: a 127th of its largest magnitude counts as a step


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How close one output of a file is to that of the Keras model.

    Attributes:
      output: Name of the output.
      kernels: "XNNPACK" (LiteRT's default) or "built-in".
      step: What one code of the int8 tensor in front of the output is worth.
      largest: Largest difference, in steps.
      most: 999 of 1,000 values differ by no more than this, in steps. Where a float32 sum in Keras lands next to the
        midpoint between two codes of an INT4 layer, file and model may take different codes: rarely, but then the
        values are up to 18 INT8 steps apart.
      equal: Share of values that round to the same code.
      top1: Share of examples with the same largest entry.
      accuracy, accuracy_keras: Of the file and of the Keras model; None without labels.
      examples: Number of examples compared.
    """

    output: str
    kernels: str
    step: float
    largest: float
    most: float
    equal: float
    top1: float
    accuracy: float | None
    accuracy_keras: float | None
    examples: int

    def __str__(self) -> str:
        accuracy = ""
        if self.accuracy is not None and self.accuracy_keras is not None:
            accuracy = f", accuracy {100 * self.accuracy:.2f} % (Keras {100 * self.accuracy_keras:.2f} %)"
        return (
            f"{self.output} ({self.kernels}): {100 * self.equal:.2f} % of values equal, 99.9 % of them at most "
            f"{self.most:.2f} steps apart, all {self.largest:.2f}, top-1 agreement {100 * self.top1:.2f} %{accuracy}, "
            f"{self.examples} examples"
        )

    def within(self, steps: float, top1: float) -> bool:
        """True if 99.9 % of the values are at most `steps` apart and at least `top1` of the examples agree."""
        return self.most <= steps + 0.01 and self.top1 >= top1  # the comparison itself is in float32


def check(final: keras.Model, path: str | os.PathLike, data: tf.data.Dataset | Iterable[Any]) -> list[Agreement]:
    """Runs a file and the Keras model that it was made from on the same inputs.

    Args:
      final: The Keras model.
      path: What `fliqs_tf.export.tflite` wrote.
      data: Examples x, or (x, y) with class labels y: arrays, or batches as a `tf.data.Dataset`, list or generator;
        see `fliqs_tf.io.batches`. x of a model with several inputs is a list of arrays, or a dict by their names.

    Returns:
      One `Agreement` per output and per set of kernels.

    Raises:
      TypeError: The data are none of these.
      ValueError: The file is damaged, or the file or the data do not fit the model.
      FileNotFoundError: There is no such file.
      ImportError: ai-edge-litert is not installed.
    """
    return check_all([final], path, data)[0]


def check_all(
    models: list[keras.Model], path: str | os.PathLike, data: tf.data.Dataset | Iterable[Any]
) -> list[list[Agreement]]:
    """`check` of several Keras models against one file, which runs once for all of them.

    Returns:
      For each model what `check` returns.

    Raises:
      TypeError, ValueError, FileNotFoundError, ImportError: As for `check`.
    """
    programs = {kernels: Program(path, kernels, os.cpu_count() or 1) for kernels in KERNELS}
    for model in models:
        check_model(model)
        programs[KERNELS[0]].check_fits(model)
    expected: list[list[list[np.ndarray]]] = [[] for _ in models]  # of each model, batch and output
    got: dict[str, list[list[np.ndarray]]] = {kernels: [] for kernels in KERNELS}
    labels: list[np.ndarray] = []
    for x, y, _ in batches.read(data, models[0], "data").in_order(_BATCH):
        for model, outputs in zip(models, expected):
            outputs.append([np.asarray(output) for output in tf.nest.flatten(model(x, training=False))])
        labels += [] if y is None else [np.asarray(y).reshape(len(np.asarray(y)), -1)]
        for kernels, program in programs.items():
            got[kernels].append(program([np.asarray(part) for part in _in_order(x, models[0])]))
    if not expected[0]:
        raise ValueError("data has no batch to compare.")
    truth = np.concatenate(labels) if labels else None
    return [
        [
            _agreement(name, kernels, step, values, reference, truth)
            for kernels, program in programs.items()
            for name, step, values, reference in zip(
                program.output_names, program.steps(), _joined(got[kernels]), _joined(outputs)
            )
        ]
        for outputs in expected
    ]


def _joined(batches: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Each output over all batches."""
    return [np.concatenate(parts) for parts in zip(*batches)]


def _agreement(
    name: str, kernels: str, step: float | None, values: np.ndarray, reference: np.ndarray, labels: np.ndarray | None
) -> Agreement:
    if step is None:
        step = float(np.abs(reference).max()) / _STEPS or 1.0
        apart = np.abs(values - reference) / step
        equal = np.mean(apart < 0.5)
    else:
        # The Keras output is rounded to the codes of the file (where it already lies if it was trained for them).
        codes, wanted = (np.clip(np.rint(v / step), -128, 127) for v in (values, reference))
        apart = np.abs(codes - wanted)
        equal = np.mean(apart == 0)
    guesses, reference_guesses = (v.reshape(len(v), -1).argmax(-1) for v in (values, reference))
    classes = labels[:, 0] if labels is not None and labels.shape[1] == 1 else None
    return Agreement(
        name,
        kernels,
        float(step),
        float(apart.max()),
        float(np.quantile(apart, 0.999, method="higher")),
        float(equal),
        float(np.mean(guesses == reference_guesses)),
        None if classes is None else float(np.mean(guesses == classes)),
        None if classes is None else float(np.mean(reference_guesses == classes)),
        len(values),
    )


def _in_order(x: Any, model: keras.Model) -> list[Any]:
    """One array per input, in the order of the model's inputs, which that of a dict need not be."""
    names = [tensor.name.partition(":")[0] for tensor in tf.nest.flatten(model.inputs)]
    return [x[name] for name in names] if isinstance(x, dict) and set(names) <= set(x) else tf.nest.flatten(x)


class Program:
    """A `.tflite` file in LiteRT's interpreter.

    Args:
      path: The file.
      kernels: "XNNPACK" or "built-in".
      threads: How many it may use.

    Raises:
      ValueError: The file is damaged.
      FileNotFoundError: There is no such file.
      ImportError: ai-edge-litert is not installed.
    """

    def __init__(self, path: str | os.PathLike, kernels: str = KERNELS[0], threads: int = 1):
        from ai_edge_litert import interpreter

        path = pathlib.Path(path)
        content = path.read_bytes()
        if content[4:8] != b"TFL3" or not _is_whole(content):
            raise ValueError(f"{path} is not a .tflite file, or it is damaged: export it again.")
        resolvers = interpreter.OpResolverType
        resolver = resolvers.AUTO if kernels == KERNELS[0] else resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            self._interpreter = interpreter.Interpreter(
                model_content=content, num_threads=threads, experimental_op_resolver_type=resolver
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"LiteRT cannot load {path}: {error}") from None
        self._path = path

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in the model's order."""
        return [detail["name"] for detail in self._interpreter.get_output_details()]

    def check_fits(self, model: keras.Model) -> None:
        """Raises unless a model has inputs and outputs of the file's shapes.

        Raises:
          ValueError: Gives the shapes of both.
        """
        for what, details, tensors in (
            ("inputs", self._interpreter.get_input_details(), tf.nest.flatten(model.inputs)),
            ("outputs", self._interpreter.get_output_details(), tf.nest.flatten(model.outputs)),
        ):
            has = [tuple(int(n) for n in d["shape"][1:]) for d in details]
            wanted = [tuple(t.shape[1:]) for t in tensors]
            if not _fit(has, wanted):
                raise ValueError(
                    f"{self._path} has {what} of shapes {has}, the model {model.name!r} {wanted}: "
                    f"this file was not made from it."
                )

    def steps(self) -> list[float | None]:
        """Per output: the scale of the int8 tensor that it is dequantized from; None if it is computed in float."""
        names = self.output_names
        scales = {}
        for operation in self._interpreter._get_ops_details():
            if operation["op_name"] == "DEQUANTIZE":
                source = self._interpreter._get_tensor_details(int(operation["inputs"][0]), 0)
                scales[int(operation["outputs"][0])] = float(source["quantization"][0])
        return [scales.get(d["index"]) for d, _ in zip(self._interpreter.get_output_details(), names)]

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Runs a batch. Args: an array [batch, ...] per input. Returns: an array [batch, ...] per output."""
        details = self._interpreter.get_input_details()
        if [tuple(d["shape"]) for d in details] != [x.shape for x in inputs]:
            for detail, x in zip(details, inputs):
                self._interpreter.resize_tensor_input(detail["index"], x.shape)
            self._interpreter.allocate_tensors()
        for detail, x in zip(details, inputs):
            self._interpreter.set_tensor(detail["index"], np.asarray(x, np.float32))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(d["index"]) for d in self._interpreter.get_output_details()]

    def invoke(self) -> None:
        """Runs again on the same inputs, for timing."""
        self._interpreter.invoke()


def _fit(shapes: list[tuple], wanted: list[tuple]) -> bool:
    """True if the shapes are the wanted ones, in which None is a size that Keras leaves open."""
    return list(map(len, shapes)) == list(map(len, wanted)) and all(
        n == m or m is None for shape, sizes in zip(shapes, wanted) for n, m in zip(shape, sizes)
    )


def _is_whole(content: bytes) -> bool:
    """True if every buffer and table lies within the file."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        return bool(model.subgraphs) and bool(model.subgraphs[0].outputs is not None) and bool(model.buffers)
    except Exception:  # whatever a reader stumbles over in damaged bytes
        return False
