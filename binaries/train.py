"""Trains a network in float, in one format, or with a recipe.

python binaries/train.py --format=float
python binaries/train.py --format=INT8
python binaries/train.py --recipe=runs/digits_resnet8_search/recipe.json
"""

from __future__ import annotations

import math
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

import fliqs_tf
from binaries import data as datasets
from binaries import settings, tables
from binaries.run_dir import RunDir, versions
from fliqs_tf import checkpoints
from fliqs_tf._keras import keras
from fliqs_tf.files import replacing, write_json

FLAGS = flags.FLAGS
settings.define_training_flags()
flags.DEFINE_string("format", "float", "'float', or a format for every layer.")
flags.DEFINE_string("recipe", None, "recipe.json; takes the place of --format.")
flags.DEFINE_enum("cost", "bops", sorted(fliqs_tf.costs.NAMES), "What is counted.")


def main(argv):
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}; flags start with --. See --help.")
    settings.set_up_process()
    data = settings.load_data()
    network = settings.build_network(data)
    name, model = formatted(network)
    examples = data.examples("train")
    steps_per_epoch = examples // FLAGS.batch_size
    if steps_per_epoch == 0:
        sys.exit(f"--batch_size={FLAGS.batch_size} exceeds the {examples} training examples.")
    total = steps_per_epoch * FLAGS.epochs
    run = RunDir(
        FLAGS.run_dir or f"runs/{FLAGS.dataset}_{FLAGS.model}_{name.replace('uniform ', '')}",
        resume=FLAGS.resume,
        overwrite=FLAGS.overwrite,
    )
    with run.explained():
        write_json(run / "flags.json", settings.flag_values())
        model.compile(settings.optimizer(total), settings.loss(), metrics=["accuracy"], jit_compile=False)
        fit(model, data, run, steps_per_epoch, total)
        finish(name, model, data, run, total)


def finish(name: str, model, data, run: RunDir, total: int) -> None:
    """Writes what the run leaves behind, and prints its table."""
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


def formatted(network) -> tuple[str, keras.Model]:
    """(name, model) that the flags ask for."""
    try:
        if FLAGS.recipe:
            return "recipe", fliqs_tf.apply(network, fliqs_tf.Recipe.load(FLAGS.recipe))
        if FLAGS.format.lower() == "float":
            return "float", network
        return f"uniform {fliqs_tf.Format(FLAGS.format)}", fliqs_tf.apply(network, FLAGS.format)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def fit(model, data, run: RunDir, steps_per_epoch: int, total: int) -> None:
    """Fits to the end; training that is not a search resumes at epochs."""
    done = 0
    if FLAGS.resume:
        try:
            done = (checkpoints.restore_newest(run / "checkpoints", model) or 0) // steps_per_epoch
        except ValueError as error:
            sys.exit(str(error))
        print(f"Going on after epoch {done} of {FLAGS.epochs}.")
    if done == FLAGS.epochs:
        return
    every = max(1, FLAGS.checkpoint_every_steps // steps_per_epoch)

    def save(epoch, logs):
        whole = math.isfinite(logs["loss"])  # not over a good one
        if whole and ((epoch + 1) % every == 0 or epoch + 1 == FLAGS.epochs):
            checkpoints.save(run / "checkpoints", model, (epoch + 1) * steps_per_epoch)

    history = model.fit(
        datasets.train_batches(
            data,
            batch_size=FLAGS.batch_size,
            seed=FLAGS.seed,
            start_step=done * steps_per_epoch,
            total_steps=total,
        ),
        epochs=FLAGS.epochs,
        initial_epoch=done,
        steps_per_epoch=steps_per_epoch,
        callbacks=[
            keras.callbacks.LambdaCallback(on_epoch_end=save),
            keras.callbacks.TerminateOnNaN(),
            tables.ProgressBar(total, done * steps_per_epoch),
        ],
        shuffle=False,
        verbose=0,
    )
    if not math.isfinite(history.history["loss"][-1]):
        step = int(model.optimizer.iterations) - 1  # counted from 0
        sys.exit(
            f"The loss became NaN or infinite at step {step}. Lower --learning_rate, or look at the data. The last "
            f"good checkpoint is in {run / 'checkpoints'}."
        )


if __name__ == "__main__":
    app.run(main)
