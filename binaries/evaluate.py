"""Accuracy and cost of a saved model, and what a recipe costs.

python binaries/evaluate.py --model_file=runs/digits_resnet8_search/model.keras
python binaries/evaluate.py --recipe=runs/digits_resnet8_search/recipe.json
"""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

import fliqs_tf
from binaries import settings, tables
from fliqs_tf._keras import keras

FLAGS = flags.FLAGS
flags.DEFINE_string("model_file", None, "A .keras file: accuracy on the test split, and cost.")
flags.DEFINE_string("recipe", None, "A recipe.json: cost on the network of --model.")


def main(argv):
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}; flags start with --. See --help.")
    if not FLAGS.model_file and not FLAGS.recipe:
        sys.exit("Give --model_file, --recipe, or both.")
    data = settings.load_data()
    rows = []
    try:
        recipe = fliqs_tf.Recipe.load(FLAGS.recipe) if FLAGS.recipe else None
        if FLAGS.model_file:
            model = keras.models.load_model(FLAGS.model_file, compile=False)
            rows.append({"name": FLAGS.model_file, **settings.test_scores(model, data), **_costs(model)})
        if recipe is not None:
            model = fliqs_tf.apply(settings.build_network(data), recipe)
            scores = {key: recipe.info.get(key) for key in ("accuracy", "bits_per_character")}
            rows.append({"name": FLAGS.recipe, **scores, **_costs(model)})
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    tables.print_tables(
        tables.results_table(rows, cost_unit=fliqs_tf.costs.bops.unit),
        *[f"{row['name']}: {row['memory']:.4f} {fliqs_tf.costs.memory.unit} of weights" for row in rows],
    )


def _costs(model) -> dict:
    is_quantized = any(isinstance(layer, fliqs_tf.Quantized) for layer in model.layers)
    formats = None if is_quantized else "FP32"
    return {"cost": fliqs_tf.costs.bops(model, formats), "memory": fliqs_tf.costs.memory(model, formats)}


if __name__ == "__main__":
    app.run(main)
