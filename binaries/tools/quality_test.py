import numpy as np

from binaries.tools import quality
from fliqs_tf.numerics.formats import Format

LAYERS = [{"decision": "a", "macs": 100}, {"decision": "b", "macs": 10}, {"decision": "b", "macs": 10}]
OPTIONS = {"a": ["INT4", "INT6", "INT8"], "b": ["INT4", "INT6", "INT8", "BF16"]}


def cost(recipe):
    macs = {"a": 100, "b": 20}
    return sum(macs[name] * Format(fmt).bits ** 2 for name, fmt in recipe.items())


def test_random_recipes_cost_no_more_than_the_limit_and_have_no_room_for_a_step():
    limit = 100 * 36 + 20 * 256
    found = [quality.random_recipe(LAYERS, OPTIONS, limit, seed) for seed in range(20)]
    for recipe in found:
        assert cost(recipe) <= limit
        for name, formats in OPTIONS.items():
            place = formats.index(recipe[name])
            assert place + 1 == len(formats) or cost({**recipe, name: formats[place + 1]}) > limit
    assert {tuple(recipe.values()) for recipe in found} == {("INT6", "BF16"), ("INT8", "INT8")}


def test_a_run_that_is_finished_is_not_repeated(tmp_path):
    (tmp_path / "INT8_0").mkdir()
    (tmp_path / "INT8_0/result.json").write_text('{"accuracy": 0.5}')
    assert quality.Runs(tmp_path, []).trained("INT8", 0, "--format=INT8") == 0.5


def test_the_table_has_mean_and_spread_in_points(capsys):
    quality.show(0.39, [{"name": "searched", "cost": 0.389, "accuracies": [0.75, 0.77]}])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split() == ["searched", "0.389", "76.00", "2.00", "75.00", "77.00"]
    assert np.isclose(float(line.split()[2]), 76)
