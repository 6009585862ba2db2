"""Rules: how each layer is quantized, and which decision it follows."""

from __future__ import annotations

import dataclasses
import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from fliqs_tf.layers import composite
from fliqs_tf.numerics.space import Space, SpaceLike
from fliqs_tf.quantize.recipe import TENSORS

_LOG = logging.getLogger("fliqs_tf")
UNCHANGED = ...


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""What holds for the layers whose path a pattern matches.

    Rules apply in order; where several match, the later one has the last word.

    Args:
      pattern: Regular expression, searched (not anchored) in the layer path.
      formats: The formats of these layers, or None to leave them in float. Default: they stay as they are.
      tie: Name of one decision for all of them; may refer to groups of the pattern. Rule(r"^(stage\d)_", tie=r"\1")
        makes one decision per stage.
    """

    pattern: str
    formats: Any = UNCHANGED
    tie: str | None = None

    def __post_init__(self) -> None:
        try:
            re.search(self.pattern, "")
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"Rule pattern {reprlib.repr(self.pattern)} is not a regular expression: {error}."
            ) from None
        if self.formats is not UNCHANGED and self.formats is not None:
            object.__setattr__(self, "formats", Space(self.formats))


RuleLike: TypeAlias = Rule | tuple[str, SpaceLike | None] | tuple[str, SpaceLike | None, str | None]
"""A rule, or its arguments in a tuple."""


@dataclasses.dataclass(frozen=True)
class LayerQuantization:
    """How one layer is quantized: spaces of its weights and of its input (None: stays in float), and the decisions."""

    space: Space
    input_space: Space | None
    weight_decision: str
    activation_decision: str

    def arguments(self) -> dict[str, Any]:
        """Arguments of `Quantized`, without the layer."""
        inputs = None if self.input_space is None else list(self.input_space.names)
        values = (list(self.space.names), inputs, self.weight_decision, self.activation_decision)
        return dict(zip(composite.ARGUMENTS, values))


def layer_quantizations(
    paths: Sequence[str],
    annotations: Mapping[str, Any],
    spaces: tuple[Space, Space],
    rules: Sequence[RuleLike],
    granularity: str,
    tensors: str,
) -> dict[str, LayerQuantization]:
    """How each layer is quantized: layer path -> its quantization, without those that stay in float.

    Args:
      paths: The layers that can be quantized.
      annotations: {layer path: `QuantizeConfig` or None} of a model annotated with TensorFlow Model Optimization: only
        these layers are quantized, and a config overrides the rules for its layer. {}: no annotations, all layers.
      spaces: That of weights and that of inputs.
      rules, granularity, tensors: As for `fliqs_tf.wrap`.
    """
    rules = as_rules(rules)
    if annotations:
        parts = [p for p in paths if p not in annotations and any(p.startswith(f"{a}/") for a in annotations)]
        if parts:
            _LOG.warning(
                "Left in float, because an annotation covers a layer but not the layers inside it: %s. fliqs_tf.wrap "
                "quantizes them in a model without annotations.",
                ", ".join(parts),
            )
        paths = [path for path in paths if path in annotations]
        if not paths:
            raise ValueError(f"None of the annotated layers can be quantized: {', '.join(annotations)}.")
        rules += [_annotated_rule(path, config, tensors) for path, config in annotations.items() if config is not None]
    return _by_path(paths, spaces, rules, granularity, tensors)


def decision_names(base: str, tensors: str) -> tuple[str, str]:
    """Names of the decisions on a layer's weights and on its input."""
    return (f"{base}/weights", f"{base}/activations") if tensors == "separate" else (base, base)


def as_rules(rules: Sequence[RuleLike]) -> list[Rule]:
    """Rules as `fliqs_tf.wrap` takes them, as `Rule` objects."""
    if isinstance(rules, (str, Rule)):
        raise ValueError(f"rules must be a list of rules, got {rules!r}.")
    rules = list(rules)
    for rule in rules:
        if not isinstance(rule, Rule) and not (isinstance(rule, (tuple, list)) and 1 <= len(rule) <= 3):
            raise ValueError(
                f"A rule is (pattern, formats), (pattern, None) to leave layers in float, or a fliqs_tf.Rule, "
                f"got {rule!r}."
            )
    return [rule if isinstance(rule, Rule) else Rule(*rule) for rule in rules]


def _annotated_rule(path: str, config: Any, tensors: str) -> Rule:
    """The config of an annotation, as a rule for its layer."""
    if not hasattr(config, "as_rule"):
        raise ValueError(
            f"Layer {path!r} is annotated with {type(config).__name__}, whose formats cannot be searched. Annotate it "
            f"with a fliqs_tf.tfmot.FliqsQuantizeConfig or without a config; to keep it in float, do not annotate it."
        )
    if config.tensors not in (None, tensors):
        raise ValueError(
            f"Layer {path!r} is annotated with tensors={config.tensors!r}, but the search has {tensors!r}; it must "
            f"be the same for all layers."
        )
    return config.as_rule(path)


def _tied(rule: Rule, match: re.Match, path: str) -> str:
    """Name of the decision that a rule gives a layer."""
    try:
        name = match.expand(rule.tie)
    except re.error as error:
        raise ValueError(f"Rule {rule.pattern!r}: tie {rule.tie!r} does not fit the pattern: {error}.") from None
    if not name:
        raise ValueError(f"Rule {rule.pattern!r}: tie {rule.tie!r} gives no name for layer {path!r}.")
    return name


def _by_path(
    paths: Sequence[str], spaces: tuple[Space, Space], rules: Sequence[Rule], granularity: str, tensors: str
) -> dict[str, LayerQuantization]:
    """Layer path -> its quantization, without the layers that stay in float. spaces: of weights and of inputs."""
    if granularity not in ("layer", "model"):
        raise ValueError(
            f"granularity must be 'layer' (a decision per layer) or 'model' (one for all), got {granularity!r}. "
            f"For blocks use rules: fliqs_tf.Rule(r'^(stage\\d)_', tie=r'\\1')."
        )
    if tensors not in TENSORS:
        raise ValueError(f"tensors must be one of {', '.join(TENSORS)}, got {tensors!r}.")
    for rule in rules:
        if not any(re.search(rule.pattern, path) for path in paths):
            raise ValueError(f"Rule {rule.pattern!r} matches no layer. Layers: {', '.join(paths)}.")
    found = {}
    for path in paths:
        own, decision = spaces, None
        for rule in rules:
            if match := re.search(rule.pattern, path):
                own = own if rule.formats is UNCHANGED else (rule.formats, rule.formats)
                decision = _tied(rule, match, path) if rule.tie else decision
        if own[0] is None:
            continue
        if decision is None:  # a space of its own is a decision of its own
            decision = "model" if granularity == "model" and own == spaces else path
        inputs = None if tensors == "weights" else own[1]
        found[path] = LayerQuantization(own[0], inputs, *decision_names(decision, tensors))
    _check_spaces(found)
    return found


def _check_spaces(found: dict[str, LayerQuantization]) -> None:
    first: dict[str, str] = {}
    for path, quantization in found.items():
        other = first.setdefault(quantization.weight_decision, path)
        for one, other_space in (
            (found[other].space, quantization.space),
            (found[other].input_space, quantization.input_space),
        ):
            if one != other_space:
                first_formats, formats = (space and list(space.names) for space in (one, other_space))
                raise ValueError(
                    f"Layers {other!r} and {path!r} are tied into the decision {quantization.weight_decision!r} "
                    f"but have different formats, {first_formats} and {formats}."
                )
    if all(len(space) == 1 for q in found.values() for space in (q.space, q.input_space or q.space)):
        raise ValueError(
            "There is nothing to search: no layer has more than one format to choose from. Give two formats or "
            "more, or use fliqs_tf.apply(model, format) for fixed formats."
        )
