"""Trains a network in float, in one format, or with a recipe.

python binaries/train.py --format=float
python binaries/train.py --format=INT8
python binaries/train.py --recipe=runs/digits_resnet8_search/recipe.json

Writes to --run_dir, by default runs/<dataset>_<model>_<what>: `model.keras`; `result.json` with the share of right
guesses on the test split (and bits per character, for text), cost per example with its unit, steps, seed, versions and
flags; `flags.json`; `checkpoints/`. Prints the result as a table.

Exit status: 0; 1 for wrong flags or files, a run directory that cannot be used, or a loss that is not finite, with one
message; 75 after SIGTERM, with a checkpoint: start again with --resume.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tensorflow as tf
from absl import app, flags

import fliqs_tf
from binaries import data as datasets
from binaries import loop, settings, tables
from binaries.run_dir import RunDir, versions
from fliqs_tf import replicas
from fliqs_tf._keras import keras
from fliqs_tf.io.files import replacing, write_json

FLAGS = flags.FLAGS
settings.define_training_flags()
flags.DEFINE_string("format", "float", "'float', or a format for every layer.")
flags.DEFINE_string("recipe", None, "recipe.json; takes the place of --format.")
flags.DEFINE_enum("cost", "bops", sorted(fliqs_tf.costs.NAMES), "What is counted.")


def main(argv: list[str]) -> None:
    """Trains as the flags say. Args: what is left of the command line, the program's name alone.

    Raises:
      SystemExit: See the module.
    """
    preemption, strategy, data, steps_per_epoch = loop.start(argv)
    total = steps_per_epoch * FLAGS.epochs
    with strategy.scope():
        name, model = formatted(settings.build_network(data))
        model.compile(
            settings.optimizer(total),
            settings.loss(),
            metrics=["accuracy"],
            jit_compile=False,
            steps_per_execution=FLAGS.steps_per_execution,
        )
    path = FLAGS.run_dir or f"runs/{FLAGS.dataset}_{FLAGS.model}_{name.replace('uniform ', '')}"
    # Of several workers the first one alone writes.
    run = RunDir(path, resume=FLAGS.resume, overwrite=FLAGS.overwrite) if replicas.Workers(strategy).is_first else None
    with run.explained() if run else contextlib.nullcontext():
        if run:
            run.keep_flags(settings.flag_values(), settings.HARMLESS)
        directory = pathlib.Path(path) / "checkpoints"
        loop.train(model, data, run, directory, preemption, steps_per_epoch, total, [_Finite()])
        model = _plain(model)
        if run:
            finish(name, model, data, run, total)
    replicas.Workers(strategy).any(False)


def finish(name: str, model: keras.Model, data: datasets.Data | datasets.text.Text, run: RunDir, total: int) -> None:
    """Writes `model.keras` and `result.json`, and prints the table.

    Args:
      name: What was trained: "float", "recipe" or "uniform INT8".
      model: The trained model, of no distribution strategy.
      data: What `settings.load_data` returned.
      run: The run directory.
      total: Training steps.
    """
    cost = fliqs_tf.costs.NAMES[FLAGS.cost]
    result = {
        "name": name,
        **settings.test_scores(model, data),
        "cost": cost(model, None if name != "float" else "FP32"),
        "cost_unit": cost.unit,
        "steps": total,
        "seed": FLAGS.seed,
        "versions": versions(),
        "flags": settings.flag_values(),
    }
    with replacing(run / "model.keras") as temporary:
        model.save(temporary)
    write_json(run / "result.json", result)
    tables.print_tables(tables.results_table([result], cost_unit=cost.unit))


def formatted(network: keras.Model) -> tuple[str, keras.Model]:
    """The model that --format or --recipe asks for, not compiled, and its name.

    Args:
      network: The float network.

    Returns:
      ("float", the network itself), ("uniform INT8", a quantized copy) or ("recipe", a quantized copy).

    Raises:
      SystemExit: The format is unknown, or the recipe cannot be read or does not fit the network.
    """
    try:
        if FLAGS.recipe:
            return "recipe", fliqs_tf.apply(network, fliqs_tf.Recipe.load(FLAGS.recipe))
        if FLAGS.format.lower() == "float":
            return "float", network
        return f"uniform {fliqs_tf.Format(FLAGS.format)}", fliqs_tf.apply(
            network, FLAGS.format, **settings.options_of_layers()
        )
    except (ValueError, OSError) as error:
        sys.exit(str(error))


class _Finite(keras.callbacks.Callback):
    """Stops at the first loss that is not finite."""

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            step = int(tf.convert_to_tensor(self.model.optimizer.iterations)) - 1  # counted from 0
            raise FloatingPointError(
                f"The loss became NaN or infinite at step {step}. Lower --learning_rate, or look at the data."
            )


def _plain(model: keras.Model) -> keras.Model:
    """The model itself or, if it is mirrored by a distribution strategy, a copy that is not."""
    if model.distribute_strategy.num_replicas_in_sync == 1:
        return model
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


if __name__ == "__main__":
    app.run(main)
