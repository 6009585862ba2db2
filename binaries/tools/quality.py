"""Does a search find better formats than one can set in a line, and lose nothing by searching? Trains to find out.

    python binaries/tools/quality.py --runs=runs/quality --seeds=3 --targets=0.39,0.5625 -- \
        --dataset=cifar10 --model=resnet8 --batch_size=128 --epochs=8 --learning_rate=0.2 --data_dir=DIR

For each target (a share of uniform INT8's cost) and each seed it trains, one after the other:

* uniform INT8, and the widest uniform INT format that costs no more than the target;
* a search;
* from scratch: the recipe of the search; --random random recipes of the same cost; the recipe of a post-training
  search of float weights (with --post_training).

What follows -- goes to search.py and train.py. Runs that are finished are not repeated, so that it can be stopped and
started again. Prints a table of accuracies on the test split, mean and spread over seeds; writes --runs/quality.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fliqs_tf.io.files import read_json, write_json
from fliqs_tf.numerics.formats import Format


class Runs:
    """Trainings in directories of their own, each made once.

    Args:
      directory: Where they are.
      flags: Of all of them.
    """

    def __init__(self, directory: pathlib.Path, flags: list[str]) -> None:
        self.directory, self.flags = directory, flags

    def result(self, name: str, program: str, *flags: str) -> dict:
        """What a run has come to: result.json of train.py, recipe.json of search.py."""
        path = self.directory / name
        file = path / ("result.json" if program == "train" else "recipe.json")
        if not file.exists():
            print(f"{name} ...", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(ROOT / f"binaries/{program}.py"), *self.flags, *flags, f"--run_dir={path}"]
            with (self.directory / f"{name}.log").open("w") as log:
                subprocess.run([*command, "--overwrite"], check=True, stdout=log, stderr=subprocess.STDOUT)
        return read_json(file, "result of a run")

    def trained(self, name: str, seed: int, *flags: str) -> float:
        """Accuracy of a training of that seed."""
        return self.result(f"{name}_{seed}", "train", f"--seed={seed}", *flags)["accuracy"]


def random_recipe(layers: list[dict], options: dict[str, list[str]], limit: float, seed: int) -> dict[str, str]:
    """A recipe of random formats that costs no more than another one, and nearly as much.

    Args:
      layers: `layers_table` of a recipe: "decision" and "macs" of each layer.
      options: {decision: formats}.
      limit: The greatest cost, in MACs * bits^2.
      seed: Of the draws.

    Returns:
      {decision: format}; nothing of it can be a step wider within the limit.
    """
    rng = np.random.default_rng(seed)
    macs = {name: sum(layer["macs"] for layer in layers if layer["decision"] == name) for name in options}
    chosen = {name: int(rng.integers(len(formats))) for name, formats in options.items()}

    def cost() -> float:
        return sum(macs[name] * Format(options[name][i]).bits ** 2 for name, i in chosen.items())

    while cost() > limit:
        chosen[rng.choice([name for name, i in chosen.items() if i > 0])] -= 1
    names = [name for name in options if chosen[name] + 1 < len(options[name])]
    while names:
        name = rng.choice(names)
        chosen[name] += 1
        if cost() > limit:
            chosen[name] -= 1
        if cost() > limit or chosen[name] + 1 == len(options[name]) or _wider(chosen, name, options, macs) > limit:
            names.remove(name)
    return {name: options[name][i] for name, i in chosen.items()}


def _wider(chosen: dict[str, int], name: str, options: dict[str, list[str]], macs: dict[str, int]) -> float:
    """The cost with one decision a step wider."""
    wider = {**chosen, name: chosen[name] + 1}
    return sum(macs[n] * Format(options[n][i]).bits ** 2 for n, i in wider.items())


def rows_of_target(runs: Runs, target: float, seeds: int, random: int, post_training: bool, space: str) -> list[dict]:
    """Rows of the table for a target: name, cost relative to INT8, accuracies by seed."""
    uniform = max(bits for bits in range(2, 9) if bits**2 <= 64 * target * 1.01)
    rows: dict[str, tuple[float, list[float]]] = {}

    def add(name: str, cost: float, accuracy: float) -> None:
        rows.setdefault(name, (cost, []))[1].append(accuracy)

    for seed in range(seeds):
        add("uniform INT8", 1.0, runs.trained("INT8", seed, "--format=INT8"))
        add(f"uniform INT{uniform}", uniform**2 / 64, runs.trained(f"INT{uniform}", seed, f"--format=INT{uniform}"))
        search_flags = [f"--space={space}", f"--target_cost={target}x INT8", f"--seed={seed}"]
        found = runs.result(f"search_{target}_{seed}", "search", *search_flags)
        int8 = found["target_cost"] / target
        share = found["cost"] / int8
        add("searched", share, found["accuracy"])
        path = runs.directory / f"search_{target}_{seed}"
        scratch = runs.trained(f"search_{target}_scratch", seed, f"--recipe={path / 'recipe.json'}")
        add("its recipe from scratch", share, scratch)
        options = {d["name"]: d["options"] for d in json.loads((path / "decisions.json").read_text())}
        layers = found["layers_table"]
        limit = sum(layer["macs"] * Format(layer["weight_format"]).bits ** 2 for layer in layers)
        for i in range(random):
            recipe = runs.directory / f"random_{target}_{seed}_{i}.json"
            write_json(recipe, {"formats": random_recipe(layers, options, limit, 1000 * seed + i)})
            add("random recipes from scratch", share, runs.trained(f"random_{target}_{i}", seed, f"--recipe={recipe}"))
        if post_training:
            runs.trained("float", seed, "--format=float")
            init = [f"--init={runs.directory / f'float_{seed}'}", "--method=post_training"]
            name = f"post_training_{target}_{seed}"
            post = runs.result(name, "search", *search_flags, *init)
            recipe = runs.directory / name / "recipe.json"
            accuracy = runs.trained(f"post_training_{target}_scratch", seed, f"--recipe={recipe}")
            add("post-training search, not trained", post["cost"] / int8, post["accuracy"])
            add("its recipe, from scratch", post["cost"] / int8, accuracy)
    return [{"name": name, "cost": cost, "accuracies": values} for name, (cost, values) in rows.items()]


def show(target: float, rows: list[dict]) -> None:
    """Prints the rows of a target."""
    print(f"\ntarget {target} x INT8{'':22}{'cost':>8}{'mean':>9}{'spread':>9}   by seed")
    for row in rows:
        values = 100 * np.array(row["accuracies"])
        each = " ".join(f"{value:.2f}" for value in values)
        print(f"{row['name']:<38}{row['cost']:>8.3f}{values.mean():>9.2f}{np.ptp(values):>9.2f}   {each}")


def main() -> None:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/quality", type=pathlib.Path)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--targets", default="0.39,0.5625")
    parser.add_argument("--random", default=1, type=int, help="random recipes per seed")
    parser.add_argument("--post_training", action="store_true")
    parser.add_argument("--space", default="FLIQS-L-INT")
    arguments, flags = parser.parse_known_args()
    runs = Runs(arguments.runs.resolve(), [flag for flag in flags if flag != "--"])
    runs.directory.mkdir(parents=True, exist_ok=True)
    tables = {}
    for target in map(float, arguments.targets.split(",")):
        rows = rows_of_target(runs, target, arguments.seeds, arguments.random, arguments.post_training, arguments.space)
        tables[str(target)] = rows
        show(target, rows)
    write_json(runs.directory / "quality.json", tables)


if __name__ == "__main__":
    main()
