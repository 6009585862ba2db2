"""The steps of an integer network as the tensors and operations of a `.tflite` file.

Every tensor between integer kernels is int8; `tflite_codes` says what a code means. Layers in float formats compute in
float32 between DEQUANTIZE and QUANTIZE, on inputs that are not rounded.
"""

from __future__ import annotations

import dataclasses

from fliqs_tf.export import boundaries, tflite_codes, tflite_float, tflite_integer, tflite_moves
from fliqs_tf.export.steps import ActivationScale, IntegerNetwork, Step
from fliqs_tf.export.tflite_file import TfliteFile
from fliqs_tf.export.tflite_tensors import Tensors


@dataclasses.dataclass(frozen=True)
class TfliteNetwork:
    """A network as a file holds it.

    Attributes:
      file: Its tensors and operations.
      inputs, outputs: The tensors that a caller sets and reads.
      roundings: Last call of a step -> class and state of what rounds behind it: several, if its network is called
        several times. Of the two kernels of a separable convolution only the second one's: there is no place between
        them.
    """

    file: TfliteFile
    inputs: list[int]
    outputs: list[int]
    roundings: dict[tuple[str, int], list[tflite_integer.Rounding]]

    def to_bytes(self, description: str) -> bytes:
        """The content of the file; `description` is a line about it, which it holds."""
        return self.file.to_bytes(self.inputs, self.outputs, description)


def build(network: IntegerNetwork, int4: bool) -> TfliteNetwork:
    """Writes every step of a network.

    Args:
      network: What `lowering.steps` returned.
      int4: Store weights of 4 bits or fewer as int4, where there are kernels.

    Raises:
      ValueError: Weights or biases that are not finite.
    """
    file = TfliteFile()
    tensors = Tensors(file)
    roundings: dict[tuple[str, int], list[tflite_integer.Rounding]] = {}
    inputs = []
    for value, name, shape, _ in network.inputs:
        tensors.name(value, name, shape)
        inputs.append(tensors.new_float(value, name))
    for step in network.steps:
        tensors.name(step.output, step.path.removesuffix(boundaries.SUFFIX), step.shapes[-1])
        if step.kind == "quantize":
            _quantize(tensors, step)
        elif tflite_moves.takes(step):
            _move(tensors, step, wanted(network, step.output))
        else:
            rounding = _compute(tensors, step, wanted(network, step.output), int4)
            if rounding is not None and step.last is not None:
                roundings.setdefault(step.last, []).append(rounding)
    return TfliteNetwork(file, inputs, [tensors.as_float(value) for value in network.outputs], roundings)


def wanted(network: IntegerNetwork, value: int) -> ActivationScale | None:
    """The scale of an integer format at which all readers of a value want its codes; None if there is no such one."""
    if value in network.outputs:
        return None
    scales: set[ActivationScale | None] = set()
    for reader in network.readers.get(value, ()):
        if reader.kind == "quantize":
            scales.add(reader.options["scale"])
        else:
            scales.add(wanted(network, reader.output) if tflite_moves.takes(reader) else None)
    (scale,) = scales if len(scales) == 1 else (None,)
    return scale if scale is not None and boundaries.is_integer(scale.format) else None


def _quantize(tensors: Tensors, step: Step) -> None:
    """Gives a value a scale. In a float format nothing is rounded: the next layer reads the value as it is."""
    scale = step.options["scale"]
    if boundaries.is_integer(scale.format):
        tensors.round_to(step.inputs[0], scale, step.output)
    else:
        tensors.pass_on(step.inputs[0], step.output)


def _move(tensors: Tensors, step: Step, scale: ActivationScale | None) -> None:
    """An operation that only moves or picks values: on codes if it can, at the scale of its readers or inputs."""
    if scale is None:
        given = {tensors.given(value) for value in step.inputs}
        (scale,) = given if len(given) == 1 else (None,)
    if scale is None:
        inputs = [tensors.as_float(value) for value in step.inputs]
        tflite_moves.write(tensors.file, step, inputs, tensors.new_float(step.output, step.path))
    else:
        inputs = [tensors.as_codes(value, scale).tensor for value in step.inputs]
        output = tensors.new_codes(step.output, tflite_codes.parameters(scale))
        tensors.record(step.output, scale, output)
        tflite_moves.write(tensors.file, step, inputs, output.tensor)


def _compute(
    tensors: Tensors, step: Step, target: ActivationScale | None, int4: bool
) -> tflite_integer.Rounding | None:
    """An operation that computes: from codes to codes with an integer kernel, or else in float."""
    given = [scale for value in step.inputs if (scale := tensors.given(value)) is not None]
    if target is None or len(given) < len(step.inputs) or not tflite_integer.takes(step):
        tflite_float.write(tensors, step, tensors.new_float(step.output, step.path))
        return None
    first, *following = tflite_codes.stages(target, step.activation)
    written = tensors.new_codes(step.output, first)
    sources = [tensors.as_codes(value, scale) for value, scale in zip(step.inputs, given)]
    rounding = tflite_integer.write(tensors.file, step, sources, written, int4)
    tensors.record(step.output, target, written, following)
    return rounding
