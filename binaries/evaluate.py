"""Accuracy and cost of a saved model, and what a recipe costs.

python binaries/evaluate.py --model_file=runs/digits_resnet8_search/model.keras
python binaries/evaluate.py --recipe=runs/digits_resnet8_search/recipe.json
python binaries/evaluate.py --recipe=runs/digits_resnet8_search/recipe.json --profile=nvidia_h100_sxm,my_chip.json

Prints the share of right guesses on the test split, the cost in GBOPs per example and the size of the weights in MiB.
With --profile the network is also priced on each platform, in the profile's unit per example, and layers that a
platform cannot run are listed with the reason.

Exit status: 0; 1 for wrong flags or files, with one message; 3 if a platform cannot run the network.
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
from fliqs_tf.numerics.formats import Format

FLAGS = flags.FLAGS
flags.DEFINE_string("model_file", None, "A .keras file: accuracy on the test split, and cost.")
flags.DEFINE_string("recipe", None, "A recipe.json: cost on the network of --model.")
flags.DEFINE_list(
    "profile",
    [],
    f"Platforms to price on: JSON files, or names of shipped ones: {', '.join(fliqs_tf.Profile.shipped())}.",
)
CANNOT_RUN = 3


def main(argv: list[str]) -> int:
    """Evaluates as the flags say. Args: what is left of the command line, the program's name alone.

    Returns:
      The exit status, 0 or `CANNOT_RUN`.

    Raises:
      SystemExit: Wrong flags or files.
    """
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}; flags start with --. See --help.")
    if not FLAGS.model_file and not FLAGS.recipe:
        sys.exit("Give --model_file, --recipe, or both.")
    rows, priced = [], []
    try:
        profiles = [fliqs_tf.Profile.load(name) for name in FLAGS.profile]
        recipe = fliqs_tf.Recipe.load(FLAGS.recipe) if FLAGS.recipe else None
        data = settings.load_data()
        if FLAGS.model_file:
            model = settings.load_model(FLAGS.model_file)
            rows.append({"name": FLAGS.model_file, **settings.test_scores(model, data), **_costs(model)})
            priced.append((FLAGS.model_file, fliqs_tf.costs.site_formats(model)))
        if recipe is not None:
            model = fliqs_tf.apply(settings.build_network(data), recipe)
            rows.append({"name": FLAGS.recipe, **_scores(recipe.info), **_costs(model)})
            priced.append((FLAGS.recipe, fliqs_tf.costs.site_formats(model)))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    tables.print_tables(
        tables.results_table(rows, cost_unit=fliqs_tf.costs.bops.unit),
        *[f"{row['name']}: {row['memory']:.4f} {fliqs_tf.costs.memory.unit} of weights" for row in rows],
    )
    return price(profiles, priced) if profiles else 0


def price(
    profiles: list[fliqs_tf.Profile], priced: list[tuple[str, list[tuple[fliqs_tf.costs.Site, Format, Format]]]]
) -> int:
    """Prints what networks cost on platforms, and the layers that a platform cannot run.

    Args:
      profiles: The platforms.
      priced: (name of a network, what `fliqs_tf.costs.site_formats` gives for it).

    Returns:
      The exit status: 0, or `CANNOT_RUN` if a platform cannot run one of the networks.
    """
    rows, tables_of_unsupported = [], []
    for name, formats in priced:
        for profile in profiles:
            unsupported = profile.unsupported_layers(formats)
            cost = None if unsupported else profile.cost(formats)
            memory = profile.memory(formats)
            rows.append(
                {"name": name, "platform": profile.name, "cost": cost, "unit": profile.unit, "memory": memory}
                | {"unsupported": len(unsupported), "layers": len(formats)}
            )
            if unsupported:
                tables_of_unsupported.append(tables.unsupported_table(name, profile.name, unsupported))
    tables.print_tables(tables.platforms_table(rows), *tables_of_unsupported)
    return CANNOT_RUN if tables_of_unsupported else 0


def _scores(info) -> dict:
    """What a recipe file says about quality. It is free text of the user: whatever is no number is left out."""
    keys = ("accuracy", "bits_per_character")
    return {key: info[key] for key in keys if isinstance(info.get(key), (int, float))}


def _costs(model) -> dict:
    return {"cost": fliqs_tf.costs.bops(model), "memory": fliqs_tf.costs.memory(model)}


if __name__ == "__main__":
    app.run(main)
