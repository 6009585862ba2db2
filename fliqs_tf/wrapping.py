"""A Keras model to a quantized one: which layers, which tensors, which decision."""

from __future__ import annotations

import dataclasses
import logging
import re
import reprlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from fliqs_tf import batches, carriers, comparison, composite, copies, normalization, ranges, trace
from fliqs_tf._keras import check_model, keras
from fliqs_tf.formats import Format
from fliqs_tf.products import Product
from fliqs_tf.quantized import Quantized
from fliqs_tf.quantizers import Quantizer
from fliqs_tf.recipe import TENSORS, Recipe
from fliqs_tf.space import Space

_LOG = logging.getLogger("fliqs_tf")
UNCHANGED = ...
_KERAS = ("keras", "tf_keras", "keras_hub")


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""What holds for the layers whose path a pattern matches.

    Rules apply in order; where several match, the later one has the last word.

    Args:
      pattern: Regular expression, searched (not anchored) in the layer path.
      formats: A menu for these layers, or None to leave them in float. Default: the menu stays.
      tie: Name of one decision for all of them; may refer to groups of the pattern. Rule(r"^(stage\d)_", tie=r"\1")
        makes one decision per stage.
    """

    pattern: str
    formats: Any = UNCHANGED
    tie: str | None = None

    def __post_init__(self):
        try:
            re.search(self.pattern, "")
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"Rule pattern {reprlib.repr(self.pattern)} is not a regular expression: {error}."
            ) from None
        if self.formats is not UNCHANGED and self.formats is not None:
            object.__setattr__(self, "formats", Space(self.formats))


@dataclasses.dataclass
class Decision:
    """One thing that the controller chooses; the quantizers that read it hold the choice in a variable each.

    Attributes:
      name: "conv1", or "conv1/weights" and "conv1/activations" if these are chosen apart.
      space: The menu.
      quantizers: Those that follow the decision.
      layers: Paths of their layers.
    """

    name: str
    space: Space
    quantizers: list[Quantizer] = dataclasses.field(default_factory=list)
    layers: list[str] = dataclasses.field(default_factory=list)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the formats, in the order of option indices."""
        return self.space.names

    @property
    def choices(self) -> list:
        """The int32 variables that the quantizers read."""
        return list({id(q.choice): q.choice for q in self.quantizers}.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one layer is quantized: menus of its weights and of its input (None: stays in float), and the decisions."""

    space: Space
    input_space: Space | None
    weight_decision: str
    activation_decision: str

    def arguments(self) -> dict:
        """Of `Quantized`, without the layer."""
        inputs = None if self.input_space is None else list(self.input_space.names)
        values = (list(self.space.names), inputs, self.weight_decision, self.activation_decision)
        return dict(zip(composite.ARGUMENTS, values))


def quantized_network(
    model,
    space,
    rules=(),
    granularity="layer",
    tensors="together",
    input_space=None,
    *,
    input_shape=None,
    embeddings=False,
    attention_scores=False,
) -> keras.Model:
    """A copy of a model whose layers read decisions.

    Args:
      model, space, rules, granularity, tensors, input_shape, embeddings, attention_scores: As for `fliqs_tf.wrap`.
      input_space: With tensors="separate": menu of the inputs, where it is not that of the weights.
    """
    spaces = (space := Space(space), space if input_space is None else Space(input_space))
    layers = layers_to_quantize(model, embeddings, attention_scores)
    _warn_of_own_training(model)
    _warn_of_names_of_keras(model)
    normalization.warn_of_closed(model)
    if attention_scores and tensors == "weights":
        raise ValueError(
            "attention_scores=True quantizes products of two activations, which stay in float with tensors='weights': "
            "take tensors='together' or 'separate'."
        )
    plans = plan([path for path, _ in layers], trace.annotations(model), spaces, rules, granularity, tensors)
    _log_left_in_float(model, plans)
    return _copy(model, {key: plans[path].arguments() for path, key in layers if path in plans}, input_shape)


def plan(paths, annotations, spaces, rules, granularity, tensors) -> dict[str, Plan]:
    """How each layer is quantized: layer path -> plan, without those that stay in float.

    Args:
      paths: The layers that can be quantized.
      annotations: Layer path -> `QuantizeConfig` or None, of a model annotated with TensorFlow Model Optimization: only
        these layers are quantized, and what a config says of its layer has the last word. {}: all are.
      spaces: Menus of weights and of inputs.
      rules, granularity, tensors: As for `fliqs_tf.wrap`.
    """
    rules = as_rules(rules)
    if annotations:
        parts = [p for p in paths if p not in annotations and any(p.startswith(f"{a}/") for a in annotations)]
        if parts:
            _LOG.warning(
                "Left in float, because an annotation is of a whole layer and not of its parts: %s. fliqs_tf.wrap "
                "quantizes them in a model without annotations.",
                ", ".join(parts),
            )
        paths = [path for path in paths if path in annotations]
        if not paths:
            raise ValueError(f"None of the annotated layers can be quantized: {', '.join(annotations)}.")
        rules += [_annotated_rule(path, config, tensors) for path, config in annotations.items() if config is not None]
    return _plans(paths, spaces, rules, granularity, tensors)


def decision_names(base: str, tensors: str) -> tuple[str, str]:
    """Names of the decisions on a layer's weights and on its input."""
    return (f"{base}/weights", f"{base}/activations") if tensors == "separate" else (base, base)


def apply(
    model: keras.Model,
    recipe: Recipe | Format | str,
    *,
    target: str | None = None,
    input_shape=None,
    embeddings: bool = False,
    attention_scores: bool = False,
    calibration_data=None,
) -> keras.Model:
    """A copy of a model with fixed formats, for quantization-aware training with a given recipe.

    Args:
      model: A built Keras model; stays as it is, its weights are copied.
      recipe: A recipe for this model, or one format for every layer. Layers that the recipe does not name stay
        in float if the recipe came from a search that left them so.
      target: "tflite": int8 tensors between the layers are quantized too, as in the file that
        `fliqs_tf.export.tflite` writes.
      input_shape: See `fliqs_tf.wrap`.
      embeddings, attention_scores: With one format for every layer: for the tables of embeddings and the products of
        attention too. A recipe says it itself.
      calibration_data: Examples, in any form that `fit` takes them in; some batches set the ranges of activations.
        Training sets them too, but not in layers that are called with `training=False`. Without either a quantized
        activation has the range of its batch, and what the model makes of an example depends on the others.

    Returns:
      A plain Keras model of the same inputs and outputs, not compiled. Train it as any other.

    Raises:
      ValueError: The recipe names layers that the model does not have, or the model has nothing to quantize;
        calibration_data does not fit the model.
    """
    named = recipe.of_layers() if isinstance(recipe, Recipe) else ()
    layers = layers_to_quantize(model, embeddings, attention_scores, named)
    _warn_of_own_training(model)
    _warn_of_names_of_keras(model)
    paths = [path for path, _ in layers]
    if not isinstance(recipe, Recipe):
        recipe = Recipe({path: Format(recipe).name for path in paths})
    decided = recipe.of_layers()
    Recipe(dict.fromkeys(decided, "FP32")).check([p for p in paths if p not in recipe.float_layers], model.name)
    arguments = {}
    for path, key in layers:
        if path in decided:
            weights, activations = decided[path]["weights"], decided[path].get("activations")
            menus = ([recipe.formats[weights]], [recipe.formats[activations]] if activations else None)
            arguments[key] = dict(zip(composite.ARGUMENTS, (*menus, weights, activations)))
    copy = _copy(model, arguments, input_shape)
    if is_for_tflite(target):
        copy = carriers.with_carriers(copy)
    if calibration_data is not None:
        source = batches.read(calibration_data, copy, "calibration_data")
        ranges.calibrate(copy, (batch.x for batch in source.some(ranges.BATCHES, 32)))
    return copy


def _warn_of_own_training(model) -> None:
    """Methods with which a class trains its models as it likes; a copy trains as every model of Keras does."""
    methods = ("train_step", "compute_loss", "compute_metrics", "test_step")
    own = [m for m in methods if getattr(type(model), m).__module__.split(".")[0] not in _KERAS]
    if own:
        _LOG.warning(
            "%s has a %s of its own, which the quantized model does not call: it trains as a plain Keras model. Put "
            "what it does into the loss, the metrics or a layer (add_loss).",
            type(model).__name__,
            " and a ".join(own),
        )


def _warn_of_names_of_keras(model) -> None:
    """A copy has the functions themselves, a file their names."""
    found = [
        f"{path} ({', '.join(names)})"
        for path, layer in trace.walk(model)
        if (names := copies.mistakable_functions(layer).values())
    ]
    if found:
        _LOG.warning(
            "Functions of your own that bear names of Keras': %s. The model computes with them, but a file holds names "
            "alone, for which Keras has its own functions: rename yours before you save the model.",
            ", ".join(found),
        )


def is_for_tflite(target: str | None) -> bool:
    """Raises for a target other than None and "tflite"."""
    if target not in (None, "tflite"):
        raise ValueError(f"target must be None or 'tflite', got {target!r}.")
    return target is not None


def fixed(network: keras.Model, formats: dict[str, str]) -> keras.Model:
    """A copy of a quantized network in which each decision has taken the given format."""
    arguments = {}
    for _, layer in trace.walk(network):
        if isinstance(layer, (Quantized, Product)):
            config = layer.get_config()
            config["weight_formats"] = [formats.get(layer.weight_decision, config["weight_formats"][0])]
            if config["activation_formats"]:
                config["activation_formats"] = [formats.get(layer.activation_decision, config["activation_formats"][0])]
            arguments[id(layer)] = {key: config[key] for key in composite.ARGUMENTS}
    return _copy(network, arguments)


def decisions(network: keras.Model) -> list[Decision]:
    """What is left to decide in a quantized network, in network order. Menus of one format decide nothing."""
    found: dict[str, Decision] = {}
    for path, layer in trace.walk(network):
        if isinstance(layer, (Quantized, Product)):
            reads = [(layer.weight_decision, q) for q in layer.weight_quantizers]
            reads += [(layer.activation_decision, q) for q in layer.activation_quantizers]
            for name, quantizer in reads:
                if quantizer.choice is not None:
                    decision = found.setdefault(name, Decision(name, quantizer.space))
                    decision.quantizers.append(quantizer)
                    if path not in decision.layers:
                        decision.layers.append(path)
    return list(found.values())


def layers_to_quantize(model, embeddings=False, attention_scores=False, named=()) -> list[tuple[str, Any]]:
    """(path, id) of the layers of a float model that are to be quantized; raises if there are none.

    A product of attention has the id of the attention layer and its own name, see `trace.attention_products`.

    Args:
      model: A float model.
      embeddings, attention_scores: All embeddings, all products of attention are among them.
      named: Paths of embeddings and products that are.
    """
    check_model(model)
    normalization.check(model)
    if not model.built or (trace.is_graph(model) and not getattr(model, "inputs", None)):
        raise ValueError(
            f"Model {model.name!r} is not built: give it an Input layer, call it on a batch, or call "
            f"model.build(input_shape) first."
        )
    if any(isinstance(layer, Quantized) for _, layer in trace.walk(model)):
        raise ValueError(
            f"Model {model.name!r} is quantized already; give the float model, or search what quantize_apply made with "
            f"fliqs_tf.SearchModel(model)."
        )
    of_keras = [p for p, layer in trace.walk(model) if getattr(layer, "quantization_mode", None)]
    if of_keras:
        raise ValueError(
            f"Layer {of_keras[0]!r} is quantized already, by Keras' own model.quantize: give the float model, as it "
            f"was before."
        )
    tables = [(path, layer) for path, layer in trace.embeddings(model) if embeddings or path in named]
    among = {id(layer) for _, layer in (*trace.quantizable(model), *tables)}
    products = [(path, key) for path, key in trace.attention_products(model) if attention_scores or path in named]
    layers = [(path, id(layer)) for path, layer in trace.walk(model) if id(layer) in among] + products
    for asked, found, what in ((embeddings, tables, "Embedding"), (attention_scores, products, "MultiHeadAttention")):
        if asked and not found:
            option = "embeddings" if found is tables else "attention_scores"
            raise ValueError(f"{option}=True, but model {model.name!r} has no {what} layer.")
    if not layers:
        raise ValueError(
            f"Model {model.name!r} has nothing to quantize: none of its layers is a Dense, Conv1D, Conv2D, "
            f"DepthwiseConv2D, SeparableConv2D, Conv2DTranspose or EinsumDense."
        )
    return layers


def as_rules(rules) -> list[Rule]:
    """Rules as `fliqs_tf.wrap` takes them, as `Rule` objects."""
    if isinstance(rules, (str, Rule)):
        raise ValueError(f"rules must be a list of rules, got {rules!r}.")
    rules = list(rules)
    for rule in rules:
        if not isinstance(rule, Rule) and not (isinstance(rule, (tuple, list)) and 1 <= len(rule) <= 3):
            raise ValueError(
                f"A rule is (pattern, menu), (pattern, None) to leave layers in float, or a fliqs_tf.Rule, "
                f"got {rule!r}."
            )
    return [rule if isinstance(rule, Rule) else Rule(*rule) for rule in rules]


def _annotated_rule(path: str, config, tensors: str) -> Rule:
    """What the config of an annotation says of its layer."""
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


def _plans(paths, spaces, rules: Sequence[Rule], granularity: str, tensors: str) -> dict[str, Plan]:
    """Layer path -> plan, without the layers that stay in float. spaces: menus of weights and of inputs."""
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
    plans = {}
    for path in paths:
        menus, decision = spaces, None
        for rule in rules:
            if match := re.search(rule.pattern, path):
                menus = menus if rule.formats is UNCHANGED else (rule.formats, rule.formats)
                decision = _tied(rule, match, path) if rule.tie else decision
        if menus[0] is None:
            continue
        if decision is None:  # a menu of its own is a decision of its own
            decision = "model" if granularity == "model" and menus == spaces else path
        inputs = None if tensors == "weights" else menus[1]
        plans[path] = Plan(menus[0], inputs, *decision_names(decision, tensors))
    _check_menus(plans)
    return plans


def _check_menus(plans: dict[str, Plan]) -> None:
    first: dict[str, str] = {}
    for path, plan in plans.items():
        other = first.setdefault(plan.weight_decision, path)
        for one, menu in ((plans[other].space, plan.space), (plans[other].input_space, plan.input_space)):
            if one != menu:
                raise ValueError(
                    f"Layers {other!r} and {path!r} are tied into the decision {plan.weight_decision!r} but have "
                    f"different menus, {list(one.names)} and {list(menu.names)}."
                )
    if all(len(plan.space) == 1 and len(plan.input_space or plan.space) == 1 for plan in plans.values()):
        raise ValueError(
            "There is nothing to search: no layer has more than one format to choose from. Give a menu of two or "
            "more, or use fliqs_tf.apply(model, format) for fixed formats."
        )


def _log_left_in_float(model, quantized) -> None:
    left = [(path, layer) for path, layer in trace.left_in_float(model) if path not in quantized]
    if left:
        named = ", ".join(f"{path} ({type(layer).__name__})" for path, layer in left)
        tables = any(trace.table(layer) for _, layer in left)
        hint = " embeddings=True quantizes the tables of Embedding layers." if tables else ""
        _LOG.warning(
            "Left in float and not counted, because their class is not known or not asked for: %s.%s", named, hint
        )


def _copy(model: keras.Model, arguments: dict, input_shape=None) -> keras.Model:
    """A copy of a model with its weights.

    Args:
      model: The original, quantized or not.
      arguments: See `composite.placed`.
      input_shape: See `trace.input_specs`; for a model that is not a network.

    Returns:
      A network. That of a composite model is nothing but a layer of its name.
    """
    if trace.is_network(model):
        copy = composite.network_copy(model, arguments, {})
    else:
        layer = composite.placed(copies.of_layer(model), model, arguments)
        # A graph knows what it leaves open; the shape of an example is for counting.
        copy = _network_of(layer, trace.input_specs(model, None if trace.is_graph(model) else input_shape))
    originals, made = _layers_of(model), _layers_of(copy)
    made = {path: layer for path, layer in made.items() if path in originals or not trace.is_product(layer)}
    if originals.keys() != made.keys():
        differ = sorted(originals.keys() ^ made.keys())
        raise ValueError(
            f"A copy of model {model.name!r} from its config is not made of the same layers; they differ in "
            f"{', '.join(differ)}. Let get_config return the arguments of __init__, and do not share a layer between "
            f"composite layers."
        )
    for path, layer in originals.items():
        _copy_state(layer, made[path])
        copies.keep_trainable(layer, made[path])
    copies.keep_trainable(model, copy)
    for wrapper in copy._flatten_layers():
        wrapper._trainable = trace.inside(wrapper).trainable
    if carriers.has_carriers(copy):
        carriers.link(copy)
    comparison.check(model, copy, input_shape)
    return copy


def _network_of(layer, specs) -> keras.Model:
    """A network that is nothing but a layer and its inputs."""
    flat = tf.nest.flatten(specs)
    names = sorted(specs) if isinstance(specs, dict) else [spec.name for spec in flat]
    inputs = tf.nest.pack_sequence_as(
        specs, [keras.Input(tuple(spec.shape), dtype=spec.dtype.name, name=name) for spec, name in zip(flat, names)]
    )
    try:
        outputs = layer(inputs)
    except Exception as error:
        shapes = tf.nest.map_structure(lambda spec: (tuple(spec.shape), spec.dtype.name), specs)
        raise ValueError(
            f"Model {layer.name!r} cannot be called on examples of {shapes}: {type(error).__name__}: {error} "
            f"Give input_shape; a tf.TensorSpec in place of a shape gives the dtype too."
        ) from error
    return keras.Model(inputs, outputs, name=layer.name)


def _layers_of(model) -> dict:
    """{path: layer}, a model that is not a network under ""; without input layers, whose names are not copied."""
    found = trace.walk(model, networks=True)
    found = {path: layer for path, layer in found if not isinstance(layer, keras.layers.InputLayer)}
    root = model if not trace.is_network(model) else trace.composite_root(model)
    return found if root is None else {"": root, **found}


def _copy_state(layer, copy) -> None:
    """Functions, weights and ranges, without those of the layers that a composite layer holds."""
    if isinstance(layer, (Quantized, Product)):
        for old, new in zip(layer.activation_quantizers, copy.activation_quantizers):
            new.range.assign(old.range)
            new.clip = old.clip
    if isinstance(layer, Product):
        copy.weight_quantizers[0].range.assign(layer.weight_quantizers[0].range)
        copy.weight_quantizers[0].clip = layer.weight_quantizers[0].clip
        return
    copies.keep_functions(trace.inside(layer), trace.inside(copy))
    copies.keep_weights(trace.inside(layer), trace.inside(copy))
