"""The values of a network as tensors of a `.tflite` file: in float32, and as int8 codes at every scale that is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from fliqs_tf.export import tflite_codes
from fliqs_tf.export.steps import ActivationScale
from fliqs_tf.export.tflite_file import QuantizationParameters, TfliteFile


@dataclasses.dataclass(frozen=True)
class Codes:
    """An int8 tensor and what its codes mean."""

    tensor: int
    parameters: QuantizationParameters


class Tensors:
    """The tensors of each value; one that is missing is made from another tensor of the same value.

    Attributes:
      file: The file that gets the tensors and the operations between them.
    """

    def __init__(self, file: TfliteFile) -> None:
        self.file = file
        self._shapes: dict[int, tuple] = {}
        self._names: dict[int, str] = {}
        self._floats: dict[int, int] = {}
        self._codes: dict[int, dict[ActivationScale, int]] = {}
        self._made_in_float: set[int] = set()

    def name(self, value: int, name: str, shape: tuple) -> None:
        """Registers a value, before it has any tensor: the layer that makes it, and the shape of one example."""
        self._names[value], self._shapes[value] = name, shape

    # ---- float32

    def new_float(self, value: int, name: str) -> int:
        """A float32 tensor for a kernel to write a value to."""
        self._made_in_float.add(value)
        self._floats[value] = self.file.tensor(name, (-1, *self._shapes[value]), np.float32)
        return self._floats[value]

    def as_float(self, value: int) -> int:
        """The float32 tensor of a value."""
        if value not in self._floats:
            codes = next(iter(self._codes[value].values()))
            tensor = self.file.tensor(self._names[value], (-1, *self._shapes[value]), np.float32)
            self.file.operation("DEQUANTIZE", [codes], [tensor])
            self._floats[value] = tensor
        return self._floats[value]

    # ---- int8

    def given(self, value: int) -> ActivationScale | None:
        """The scale of a value that is made as codes; None for one that is made in float, whatever its readers do."""
        return None if value in self._made_in_float else next(iter(self._codes.get(value, ())), None)

    def new_codes(self, value: int, parameters: QuantizationParameters) -> Codes:
        """An int8 tensor for a kernel to write a value to; `record` then says at what scale the value is."""
        return Codes(self.file.tensor(f"codes_{value}", (-1, *self._shapes[value]), np.int8, parameters), parameters)

    def record(
        self, value: int, scale: ActivationScale, written: Codes, following: Iterable[QuantizationParameters] = ()
    ) -> None:
        """Makes a written tensor the codes of a value at a scale, by way of the stages that follow it."""
        for parameters in following:
            next_one = self.new_codes(value, parameters)
            self.file.operation("QUANTIZE", [written.tensor], [next_one.tensor])
            written = next_one
        self._codes.setdefault(value, {})[scale] = written.tensor

    def as_codes(self, value: int, scale: ActivationScale) -> Codes:
        """The int8 tensor of a value at a scale."""
        if scale not in self._codes.setdefault(value, {}):
            # From another scale through float: LiteRT's own step between two int8 scales is off in 3 % of the values.
            before = self.given(value)
            is_within = before is not None and tflite_codes.lies_within(before, scale)
            first, *following = tflite_codes.stages(scale, "clipped" if is_within else "linear")
            written = self.new_codes(value, first)
            self.file.operation("QUANTIZE", [self.as_float(value)], [written.tensor])
            self.record(value, scale, written, following)
        return Codes(self._codes[value][scale], tflite_codes.parameters(scale))

    # ---- a value that stands for another one

    def round_to(self, value: int, scale: ActivationScale, result: int) -> None:
        """Makes `result` the value at a scale of an integer format."""
        self._codes[result] = {scale: self.as_codes(value, scale).tensor}

    def pass_on(self, value: int, result: int) -> None:
        """Makes `result` the value as it is."""
        if value in self._floats or not self._codes.get(value):
            self._floats[result] = self.as_float(value)
        else:
            self._codes[result] = dict(self._codes[value])
