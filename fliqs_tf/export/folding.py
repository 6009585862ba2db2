"""Fewer steps: identities are dropped, batch normalization and ReLU are folded into the step before them.

With symmetric scales per output channel that leaves the codes exact: gain * (scale * code) = (|gain| * scale) *
(sign(gain) * code). Only the scales change, and the signs of codes in channels of negative gain: the codes that were
trained are the codes that ship.
"""

from __future__ import annotations

from collections.abc import Container

from fliqs_tf.export.steps import Step


def without_identities(found: list[Step], outputs: Container[int]) -> list[Step]:
    """Drops steps that return what they read, except those that make an output of the network.

    Args:
      found: Steps in an order in which they can run.
      outputs: Values that the network returns.
    """
    same: dict[int, int] = {}
    kept = []
    for step in found:
        step.inputs = tuple(same.get(v, v) for v in step.inputs)
        is_identity = step.kind == "identity" or (step.kind == "activation" and step.options["function"] == "linear")
        if is_identity and step.output not in outputs:
            same[step.output] = step.inputs[0]
        else:
            kept.append(step)
    return kept


def merged(found: list[Step], outputs: Container[int]) -> list[Step]:
    """Merges batch normalization into the linear step before it, and ReLU into the linear, affine or adding step.

    Args:
      found: Steps in an order in which they can run; some of them are changed.
      outputs: Values that the network returns; no step that makes one is merged with the next.
    """
    counts: dict[int, int] = {}
    for step in found:
        for value in step.inputs:
            counts[value] = counts.get(value, 0) + 1
    made_by: dict[int, Step] = {}
    kept = []
    for step in found:
        before = made_by.get(step.inputs[0])
        alone = counts[step.inputs[0]] == 1 and step.inputs[0] not in outputs
        if before is not None and alone and before.activation == "linear" and _takes(before, step):
            if step.kind == "affine":
                if before.kind == "linear":
                    before.linear = before.kernel.then(step.options["gain"], step.options["offset"])
                    before.shift = step.shift
                else:
                    gain, offset = before.options["gain"], before.options["offset"]
                    before.options = {
                        "gain": gain * step.options["gain"],
                        "offset": offset * step.options["gain"] + step.options["offset"],
                    }
            else:
                before.activation = step.options["function"]
            before.last = step.last
            del made_by[before.output]
            before.output = step.output
            before.shapes = (*before.shapes[:-1], step.shapes[-1])
            made_by[before.output] = before
            continue
        kept.append(step)
        made_by[step.output] = step
    return kept


def _takes(before: Step, step: Step) -> bool:
    if step.kind == "affine":
        return before.kind in ("linear", "affine")
    fusable = step.kind == "activation" and step.options["function"] in ("relu", "relu6")
    return fusable and before.kind in ("linear", "affine", "add")
