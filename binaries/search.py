"""Trains a network and searches its number formats in one run.

    python binaries/search.py                                              # digits, a few minutes
    python binaries/search.py --flagfile=binaries/flags/cifar10_resnet20.flags --data_dir=~/tensorflow_datasets
    python binaries/search.py --init=runs/digits_resnet8_float --epochs=2 --learning_rate=0.005   # of trained weights
    python binaries/search.py --init=runs/digits_resnet8_float --method=post_training             # no training at all

The run directory then holds recipe.json, model.keras, metrics.jsonl, TensorBoard events, checkpoints, pictures and
report.html.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

import fliqs_tf
from binaries import data as datasets
from binaries import devices, exporting, loop, settings, tables
from binaries.run_dir import RunDir, versions
from fliqs_tf import post_training, replicas
from fliqs_tf.export import targets
from fliqs_tf.io.files import read_json, replacing, write_json
from fliqs_tf.reporting import report
from fliqs_tf.search import averages

FLAGS = flags.FLAGS
settings.define_training_flags()
flags.DEFINE_list(
    "space", ["FLIQS-S-INT"], f"Formats: one of {', '.join(fliqs_tf.PRESETS)}, or formats separated by commas."
)
flags.DEFINE_string(
    "profile",
    None,
    "Platform to search for: formats, unless --space narrows them, and cost, unless --cost is given, are its own. A "
    f"JSON file, or one of {', '.join(fliqs_tf.Profile.shipped())}.",
)
flags.DEFINE_string(
    "target_cost",
    "0.625x INT8",
    "Number in the cost's unit, or relative: '0.25x INT8'. With --profile the default is half-way between the least "
    "and the greatest cost.",
)
flags.DEFINE_enum("cost", "bops", sorted(fliqs_tf.costs.NAMES), "What is counted.")
flags.DEFINE_string("reward", "one_sided", "one_sided, absolute, soft_exponential or hard_exponential.")
flags.DEFINE_enum("quality", "loss", ["loss", "accuracy"], "What the search maximizes: minus the loss, or accuracy.")
flags.DEFINE_enum("quality_data", "held_out", ["held_out", "train"], "Batches that quality is read from.")
flags.DEFINE_integer("quality_every", None, "Steps between readings; None: for 300 in all, but 2 at least.", 1)
flags.DEFINE_integer("quality_samples", 4, "Samples compared at a reading.", lower_bound=2)
flags.DEFINE_enum("estimator", "critic", ["critic", "reinforce"], "How the controller learns.")
flags.DEFINE_enum("entropy_schedule", "cosine", ["constant", "linear", "cosine", "heaviside"], "Growth of beta_H.")
flags.DEFINE_float("warmup", None, "Share of the steps in which formats are drawn without learning; None: 0.1.", 0, 0.9)
flags.DEFINE_float("frozen", None, "Last share of the steps, with formats decided; None: 0.75, samples 0.4.", 0, 0.99)
flags.DEFINE_enum(
    "train_with",
    None,
    ["widest", "sample"],
    "What weights train with before the decision. None: widest; REINFORCE: sample, the paper's form.",
)
flags.DEFINE_enum(
    "method",
    "search",
    ["search", "post_training"],
    "Decide while training, or from readings alone: with --init, and no training.",
)
flags.DEFINE_enum("post_training", "critic", post_training.METHODS, "How --method=post_training finds formats.")
flags.DEFINE_integer("readings", None, "Of post_training: at most so many; None: 300.", lower_bound=1)
flags.DEFINE_enum("granularity", "layer", ["layer", "model"], "What one decision stands for.")
flags.DEFINE_enum("tensors", "together", ["together", "weights", "separate"], "What one decision sets.")
flags.DEFINE_multi_string("rule", [], "PATTERN=FORMATS for the layers that match: '^conv1=INT8', 'predictions=float'.")
flags.DEFINE_enum("target", None, targets.TARGETS, "What to export to: formats that do not run there are left out.")
flags.DEFINE_list("references", [], "Run directories of train.py to compare with (float, uniform formats).")

# Of the name of a format that was tested with the weights of the search.
_SHARED = ", shared weights"


def main(argv):
    if FLAGS.quality_data == "held_out" and FLAGS.holdout == 0:
        sys.exit("--quality_data=held_out needs held-out data: set --holdout above 0, or take --quality_data=train.")
    if FLAGS.method == "post_training" and not FLAGS.init:
        sys.exit("--method=post_training needs trained weights: give --init=RUN, the run of train.py --format=float.")
    if FLAGS.method == "post_training" and (FLAGS.estimator != "critic" or FLAGS.train_with == "sample"):
        sys.exit("--method=post_training decides by the critic: not with --estimator=reinforce or --train_with=sample.")
    if FLAGS.method == "search" and (FLAGS["readings"].present or FLAGS["post_training"].present):
        sys.exit("--readings and --post_training are for --method=post_training; a search has --quality_every.")
    preemption, strategy, data, steps_per_epoch = loop.start(argv)
    total = steps_per_epoch * FLAGS.epochs
    with strategy.scope():
        model = build(data, total)  # before --overwrite removes anything
    path = FLAGS.run_dir or f"runs/{FLAGS.dataset}_{FLAGS.model}_search"
    # Of several workers the first one alone writes.
    run = RunDir(path, resume=FLAGS.resume, overwrite=FLAGS.overwrite) if replicas.Workers(strategy).is_first else None
    with run.explained() if run else contextlib.nullcontext():
        if run:
            run.keep_flags(settings.flag_values(), settings.HARMLESS)
            write_json(run / "decisions.json", [{"name": d.name, "options": list(d.options)} for d in model.decisions])
        if FLAGS.method == "post_training":
            decide(model, data, total)
            total = 0
        else:
            train(model, data, run, pathlib.Path(path) / "checkpoints", preemption, steps_per_epoch, total)
        # On all workers: to read a variable may need all of them.
        results = summarize(model, data, total)
        if run:
            finish(run, results, data)
    # A worker that is gone looks like one that was lost.
    replicas.Workers(strategy).any(False)


def build(data, total: int) -> fliqs_tf.SearchModel:
    """The wrapped and compiled model of the flags; what is wrong with them ends the program."""
    network = settings.build_network(data)
    try:
        space = FLAGS.space[0] if FLAGS.space and FLAGS.space[0].upper() in fliqs_tf.PRESETS else FLAGS.space
        if FLAGS.profile and not FLAGS["space"].present:
            space = None
        model = fliqs_tf.wrap(
            network,
            space,
            _rules(),
            profile=FLAGS.profile or None,
            target=FLAGS.target,
            granularity=FLAGS.granularity,
            tensors=FLAGS.tensors,
            **settings.options_of_layers(),
        )
        cost, target = _cost_and_target(model)
        model.compile(
            settings.optimizer(total),
            settings.loss(),
            metrics=["accuracy"],
            target_cost=target,
            cost=cost,
            reward=FLAGS.reward,
            quality=FLAGS.quality,
            quality_every=FLAGS.quality_every,
            quality_samples=FLAGS.quality_samples,
            search_steps=total,
            seed=FLAGS.seed,
            sample_per_replica=FLAGS.sample_per_replica,
            train_with=FLAGS.train_with,
            steps_per_execution=FLAGS.steps_per_execution,
            controller={
                "estimator": FLAGS.estimator,
                "entropy_schedule": FLAGS.entropy_schedule,
                "warmup": FLAGS.warmup,
                "frozen": FLAGS.frozen,
            },
        )
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    return model


def _cost_and_target(model):
    """What to count, and the target: those of the platform, where the flags do not say otherwise."""
    if model.profile is None or FLAGS["cost"].present:
        return FLAGS.cost, FLAGS.target_cost
    if FLAGS["target_cost"].present:
        return None, FLAGS.target_cost
    decisions = [(d.name, d.options) for d in model.decisions]
    return None, sum(fliqs_tf.costs.CostTable(model.profile.cost, model.sites, decisions).reachable()) / 2


def _rules() -> list[fliqs_tf.Rule]:
    rules = []
    for text in FLAGS.rule:
        pattern, separator, formats = text.rpartition("=")
        if not separator:
            raise ValueError(f"--rule must be PATTERN=FORMATS: '^conv1=INT8', 'predictions=float'; got {text!r}.")
        rules.append(fliqs_tf.Rule(pattern, None if formats.lower() == "float" else formats.split(",")))
    return rules


def train(model, data, run: RunDir | None, directory: pathlib.Path, preemption, steps_per_epoch: int, total: int):
    """Searches to the end, from the newest checkpoint in `directory` if there is one. `run`: None but on the chief."""
    # The first batches of the run, wherever this process took it up.
    first_batches = calibration_batches(model, data, total)

    def options(begin):
        # How many readings a search has, and with that where in the data the next one is, depends on its length.
        model.configure_controller(total, held_out=True)
        quality_data = quality_batches(model, data, begin // model.reading_interval())
        return {"quality_data": quality_data, "calibration_data": first_batches}

    callbacks = [] if run is None else [fliqs_tf.SearchLog(run.path)]
    start = loop.train(model, data, run, directory, preemption, steps_per_epoch, total, callbacks, options)
    if start == total:  # the run before ended between its last checkpoint and its results
        averages.recalibrate(model, first_batches)


def decide(model, data, total: int) -> None:
    """Decides the formats from readings alone."""
    try:
        post_training.decide_formats(
            model,
            quality_batches(model, data, 0),
            calibration_data=calibration_batches(model, data, total),
            method=FLAGS.post_training,
            readings=FLAGS.readings,
        )
    except (ImportError, ValueError) as error:
        sys.exit(str(error))


def calibration_batches(model, data, total: int):
    """The first batches of the run."""
    return loop.batches(model.distribute_strategy, data, 0, min(total, averages.ESTIMATION_BATCHES))


def quality_batches(model, data, first: int):
    """What quality is read from, beginning with one of the batches; None: from the training step itself."""
    if FLAGS.quality_data == "held_out":
        return devices.distributed(
            model.distribute_strategy,
            lambda share: datasets.quality_batches(data, FLAGS.batch_size, FLAGS.seed, start_batch=first, share=share),
        )
    if not model.reads_training_data:
        return None
    # Other batches than those that the weights train on at the same time.
    seed, endless = FLAGS.seed + 1, 2**31 - 1
    return devices.distributed(
        model.distribute_strategy,
        lambda share: datasets.train_batches(
            data, batch_size=FLAGS.batch_size, seed=seed, start_step=first, total_steps=endless, share=share
        ),
    )


def summarize(model, data, total: int) -> dict:
    """Accuracies on the test split and costs: of the recipe, and of uniform formats with the same weights."""
    cost = model.cost
    recipe = model.recipe()
    final = model.deploy()
    scores = settings.test_scores(final, data)
    reference = [_reference(pathlib.Path(path)) for path in FLAGS.references]
    size = min(250, data.examples("train"))
    examples = datasets.train_batches(data, batch_size=size, seed=FLAGS.seed, start_step=0, total_steps=32)
    for fmt in _uniform_formats(model):
        uniform = fliqs_tf.Recipe.uniform(model, fmt)
        reference.append(
            {
                "name": f"uniform {fmt}{_SHARED}",
                **settings.test_scores(model.deploy(uniform, calibration_data=examples), data),
                "cost": cost(model, uniform),
            }
        )
    layers = []
    for site in model.sites:
        weight = recipe.formats.get(site.weight_decision, "FP32")
        activation = recipe.formats.get(site.activation_decision, "FP32")
        price = float(cost.layer(site, fliqs_tf.Format(weight), fliqs_tf.Format(activation)) / cost.per_unit)
        layers.append(
            {
                "name": site.path,
                "decision": site.weight_decision,
                "macs": site.macs,
                "weights": site.weights,
                "weight_format": weight,
                "activation_format": activation,
                "cost": price,
            }
        )
    info = {
        "cost": cost(model, recipe),
        "cost_unit": cost.unit,
        "target_cost": model.target_cost,
        **scores,
        "reference": reference,
        "steps": total,
        "seed": FLAGS.seed,
        "space": FLAGS.space,
        "profile": model.profile and model.profile.name,
        "layers_table": layers,
        "versions": versions(),
        "flags": settings.flag_values(),
        **recipe.info,
    }
    return {
        "recipe": fliqs_tf.Recipe(recipe.formats, recipe.tensors, recipe.layers, info),
        "final": final,
        "budgets": _budgets(model),
    }


def _budgets(model) -> dict:
    """What the critic expects of other budgets, and of uniform formats; see `fliqs_tf.reporting.report`."""
    try:
        budgets, (trained,) = model.pareto(), model.pareto([model.target_cost])
    except RuntimeError:  # REINFORCE, which knows none, or a run that ended before the first reading
        return {}
    return {
        "quality": FLAGS.quality,
        "cost_unit": model.cost.unit,
        "budgets": [budget.to_dict() for budget in budgets],
        "uniform": {name: budget.to_dict() for name, budget in model.uniform_budgets().items()},
        "trained": trained.to_dict() if trained.recipe == model.recipe() else None,
    }


def _uniform_formats(model) -> list[str]:
    """The narrowest format of the search, the cheapest that costs no less than the recipe, and the most precise one of
    8 bits or fewer."""
    names = [fliqs_tf.Format(f).name for f in max((d.options for d in model.decisions), key=len)]
    if model.profile:
        names = [name for name in names if not model.profile.unsupported_layers(model, name)]
    costs = {name: model.cost(model, fliqs_tf.Recipe.uniform(model, name)) for name in names}
    own = model.cost(model, model.recipe())
    dearer = sorted((name for name in names if costs[name] >= own), key=costs.get)
    narrow = [name for name in names if fliqs_tf.Format(name).bits <= 8]
    return list(dict.fromkeys([*names[:1], *dearer[:1], *narrow[-1:]]))


def verdict(info: dict) -> str:
    """One line: whether the recipe beats the uniform formats that cost as much or more, on the same weights."""
    dearer = [
        row for row in info["reference"] if row["name"].endswith(_SHARED) and row["cost"] >= info["cost"] * (1 - 1e-9)
    ]
    if not dearer:
        return "No uniform format of the search costs as much as the recipe."
    best = max(dearer, key=lambda row: row["accuracy"])
    points = 100 * (info["accuracy"] - best["accuracy"])
    is_better = "better than" if points > 0 else "worse than" if points < 0 else "as good as"
    return (
        f"On the same weights the recipe is {is_better} uniform {best['name'].split()[1].rstrip(',')}, at "
        f"{best['cost'] / info['cost']:.2f} x its cost: {points:+.2f} points of accuracy."
    )


def _reference(path: pathlib.Path) -> dict:
    try:
        result = read_json(path / "result.json", "result of train.py")
    except (OSError, ValueError) as error:
        sys.exit(f"--references: {path} is not a finished run of train.py ({error}).")
    numbers = {
        key: result[key]
        for key in ("accuracy", "cost", "bits_per_character")
        if isinstance(result, dict) and isinstance(result.get(key), (int, float))
    }
    if not {"accuracy", "cost"} <= numbers.keys() or not isinstance(result.get("name"), str):
        sys.exit(f"--references: {path / 'result.json'} needs the text 'name' and the numbers 'accuracy' and 'cost'.")
    return {"name": result["name"], **numbers}


def finish(run: RunDir, results: dict, data) -> None:
    """Writes what the run leaves behind, and prints the tables."""
    recipe, final = results["recipe"], results["final"]
    recipe.save(run / "recipe.json")  # first: small, and what the search was for
    with replacing(run / "model.keras") as temporary:
        final.save(temporary)
    if results["budgets"]:
        write_json(run / "budgets.json", results["budgets"])
    info = recipe.info
    tables.print_tables(
        tables.layers_table(info["layers_table"], cost_unit=info["cost_unit"]),
        tables.results_table(
            [{**info, "name": "searched"}, *info["reference"]],
            cost_unit=info["cost_unit"],
            target=info["target_cost"],
        ),
        verdict(info),
    )
    try:
        report.write_report(run.path)
        print(f"Pictures and report: {run / 'report.html'}")
    except ImportError as error:
        print(error)
    print(f"Recipe: {run / 'recipe.json'}   model: {run / 'model.keras'}")
    if FLAGS.target in (None, "tflite") and exporting.has_integer_kernels(recipe):
        export_tflite(final, run, data)


def export_tflite(final, run: RunDir, data) -> None:
    """The file for LiteRT beside the recipe, and how it compares."""
    try:
        problems = exporting.tflite(final, run / "model.tflite", data, seed=FLAGS.seed)
    except (ValueError, ImportError) as error:  # the search is done; what it found stays
        print(f"No TFLite file: {error}")
    else:
        if problems:
            text = "The TFLite file is beyond the tolerance:\n" + "\n".join(problems)
            if FLAGS.target:
                sys.exit(text)
            print(f"{text}\n--target=tflite trains for it.")  # nobody asked for a file


if __name__ == "__main__":
    app.run(main)
