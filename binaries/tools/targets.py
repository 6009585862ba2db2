r"""Does a search with default settings decide, and at the cost that was asked for? Three networks, three targets.

    python -m binaries.tools.targets                # 500 steps each on the digits, about 5 minutes

Prints a line per search: the entropy as a share of its maximum, and the controller's expected cost over the target,
both at the last step before the formats are decided; the cost of the recipe over the target; and the formats.
"""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl import app, flags

import fliqs_tf
import models
from binaries import data as datasets
from fliqs_tf._keras import keras

FLAGS = flags.FLAGS
SHAPE, CLASSES, BATCH = (8, 8, 1), 10, 64
TARGETS = ("0.4x INT8", "0.625x INT8", "0.85x INT8")
HEADER = f"{'network':<12} {'target':<12} {'entropy':>8} {'expected':>9} {'recipe':>7}   formats"


def dense() -> keras.Model:
    """Four dense layers."""
    layers = [keras.layers.Dense(width, activation="relu", name=f"fc{i}") for i, width in enumerate((128, 128, 64))]
    last = keras.layers.Dense(CLASSES, name="predictions")
    return keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), *layers, last])


NETWORKS = {
    "resnet8": lambda: models.get("resnet8", input_shape=SHAPE, classes=CLASSES),
    "resnet20": lambda: models.get("resnet20", input_shape=SHAPE, classes=CLASSES, width=0.5),
    "dense": dense,
}


def search(network: keras.Model, target: str, steps: int, seed: int = 0) -> dict:
    """One search on the digits: entropy, expected and recipe (costs over target), formats."""
    keras.utils.set_random_seed(seed)
    data = datasets.load("digits", seed=seed)
    model = fliqs_tf.wrap(network, "FLIQS-S-INT")
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        target_cost=target,
        search_steps=steps,
        seed=seed,
        jit_compile=False,
    )
    before = {}

    class Before(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if logs["entropy"] > 1e-3:  # the decision leaves no more
                before.update(entropy=float(logs["entropy"]), expected=float(logs["cost"]))

    batches = datasets.train_batches(data, batch_size=BATCH, seed=seed, start_step=0, total_steps=steps)
    held_out = datasets.quality_batches(data, BATCH, seed)
    model.fit(batches, steps_per_epoch=steps, epochs=1, verbose=0, quality_data=held_out, callbacks=[Before()])
    recipe = model.recipe()
    goal = float(target.partition("x")[0]) * fliqs_tf.costs.bops(model, "INT8")
    return {
        "entropy": before["entropy"],
        "expected": before["expected"] / goal,
        "recipe": fliqs_tf.costs.bops(model, recipe) / goal,
        "formats": " ".join(recipe.formats.values()),
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    print(HEADER)
    for name, make in NETWORKS.items():
        for target in TARGETS:
            found = search(make(), target, FLAGS.steps)
            print(
                f"{name:<12} {target:<12} {found['entropy']:>8.1%} {found['expected']:>9.3f} {found['recipe']:>7.3f}"
                f"   {found['formats']}",
                flush=True,
            )


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 500, "Training steps of a search.", lower_bound=20)
    app.run(main)
