"""Recipes: JSON both ways, and every way in which a file can be wrong."""

import json
import os

import pytest

from fliqs_tf.numerics.formats import Format
from fliqs_tf.quantize.recipe import Recipe

RECIPES = {
    "plain": Recipe({"conv1": "INT8", "block/conv2": "INT4"}),
    "weights": Recipe({"conv1": "INT8"}, tensors="weights"),
    "separate": Recipe({"conv1/weights": "INT4", "conv1/activations": "E4M3"}, tensors="separate"),
    "tied": Recipe({"stage1": "INT4", "head": "BF16"}, layers={"stage1": ("conv1", "conv2")}),
    "with info": Recipe({"conv1": "INT8"}, info={"cost": 1.25, "flags": {"seed": 3}, "note": "Größe"}),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_round_trips(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    recipe.save(path)
    for copy in (Recipe.load(path), Recipe.load(str(path)), Recipe.from_dict(recipe.to_dict())):
        assert copy == recipe
        assert copy.info == recipe.info
        assert list(copy.formats) == list(recipe.formats)


def test_the_file_says_what_the_recipe_says(tmp_path):
    path = tmp_path / "recipe.json"
    RECIPES["tied"].save(path)
    assert json.loads(path.read_text()) == {
        "formats": {"stage1": "INT4", "head": "BF16"},
        "tensors": "together",
        "layers": {"stage1": ["conv1", "conv2"]},
    }
    assert path.read_text().endswith("}\n")


def test_only_formats_are_needed_and_unknown_keys_are_kept():
    recipe = Recipe.from_dict({"formats": {"a": "int4"}, "accuracy": 0.5})
    assert recipe == Recipe({"a": "INT4"})
    assert recipe.info == {"accuracy": 0.5}
    assert recipe.to_dict()["accuracy"] == 0.5


def test_info_does_not_count_as_the_recipe():
    assert Recipe({"a": "INT4"}, info={"seed": 1}) == Recipe({"a": "INT4"})


def test_info_cannot_stand_in_for_the_formats():
    data = Recipe({"a": "INT4"}, info={"formats": {"a": "INT8"}, "tensors": "weights"}).to_dict()
    assert data["formats"] == {"a": "INT4"}
    assert data["tensors"] == "together"


def test_formats_are_made_canonical():
    assert Recipe({"a": "e4m3", "b": Format("INT4")}).formats == {"a": "E4M3", "b": "INT4"}


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ("weights", {"conv1": {"weights": "conv1"}}),
        ("separate", {"conv1": {"weights": "conv1/weights", "activations": "conv1/activations"}}),
        (
            "tied",
            {
                "conv1": {"weights": "stage1", "activations": "stage1"},
                "conv2": {"weights": "stage1", "activations": "stage1"},
                "head": {"weights": "head", "activations": "head"},
            },
        ),
    ],
)
def test_which_decisions_hold_for_a_layer(recipe, expected):
    assert RECIPES[recipe].of_layers() == expected


def test_a_recipe_does_not_follow_the_dict_it_was_made_from():
    formats = {"a": "INT4"}
    recipe = Recipe(formats)
    formats["a"] = "INT8"
    assert recipe.formats == {"a": "INT4"}


# ---- writing


def test_saving_over_a_recipe_replaces_it(tmp_path):
    path = tmp_path / "recipe.json"
    RECIPES["plain"].save(path)
    RECIPES["tied"].save(path)
    assert Recipe.load(path) == RECIPES["tied"]
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_others_may_read_the_file(tmp_path):
    RECIPES["plain"].save(tmp_path / "recipe.json")
    assert (tmp_path / "recipe.json").stat().st_mode & 0o777 == 0o644


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        RECIPES["plain"].save(tmp_path / "nowhere" / "recipe.json")


# ---- reading what is damaged or foreign

FORMATS = '"formats": {"conv1": "INT8"}'
DAMAGED = {
    "empty": (b"", "Expecting value"),
    "cut short": (b'{"formats": {"conv1": "IN', "Unterminated string"),
    "not JSON": (b"formats: conv1", "Expecting value"),
    "two documents": (b"{%s} {}" % FORMATS.encode(), "Extra data"),
    "not UTF-8": (b'{"formats": {"conv\xff": "INT8"}}', "UTF-8"),
    "binary": (bytes(range(256)), "is not a recipe"),
    "a list": (b"[]", 'an object with the key "formats"|JSON object with the key "formats"'),
    "null": (b"null", "JSON object with the key"),
    "a number": (b"3", "JSON object with the key"),
    "no formats": (b'{"tensors": "weights"}', "JSON object with the key"),
    "formats is a list": (b'{"formats": ["INT8"]}', r"needs \"formats\": .* got \['INT8'\]"),
    "formats is null": (b'{"formats": null}', "got None"),
    "formats is empty": (b'{"formats": {}}', "got {}"),
    "format is a number": (b'{"formats": {"conv1": 8}}', "Decision 'conv1': A format is given by its name, got 8"),
    "format is null": (b'{"formats": {"conv1": null}}', "Decision 'conv1': .* got None"),
    "format is a list": (b'{"formats": {"conv1": ["INT8"]}}', "Decision 'conv1'"),
    "format is NaN": (b'{"formats": {"conv1": NaN}}', "NaN is not a number of JSON"),
    "format is infinite": (b'{"formats": {"conv1": 1e999}}', "'1e999' is too large a number"),
    "unknown format": (b'{"formats": {"conv1": "INT99"}}', "Decision 'conv1': Unknown format 'INT99'"),
    "a huge number": (b'{"formats": {"conv1": %s}}' % (b"9" * 5000), "limit"),
    "unknown tensors": (b'{%s, "tensors": "some"}' % FORMATS.encode(), '"tensors" must be one of together'),
    "tensors is a list": (b'{%s, "tensors": []}' % FORMATS.encode(), '"tensors" must be one of together'),
    "tensors is null": (b'{%s, "tensors": null}' % FORMATS.encode(), '"tensors" must be one of together'),
    "layers is a list": (b'{%s, "layers": ["a"]}' % FORMATS.encode(), '"layers" must be'),
    "layers is null": (b'{%s, "layers": null}' % FORMATS.encode(), '"layers" must be'),
    "layers of an unknown decision": (b'{%s, "layers": {"x": ["a"]}}' % FORMATS.encode(), "names the decision 'x'"),
    "layers are a text": (b'{%s, "layers": {"conv1": "a"}}' % FORMATS.encode(), "must be a list of layer names"),
    "layers are numbers": (b'{%s, "layers": {"conv1": [1]}}' % FORMATS.encode(), "must be a list of layer names"),
    "layers are none": (b'{%s, "layers": {"conv1": []}}' % FORMATS.encode(), "must be a list of layer names"),
    "float layers are a number": (b'{%s, "float_layers": 3}' % FORMATS.encode(), '"float_layers" must be a list'),
    "float layers are numbers": (b'{%s, "float_layers": [3]}' % FORMATS.encode(), '"float_layers" must be a list'),
    "a decision twice": (b'{"formats": {"conv1": "INT8", "conv1": "INT4"}}', "'conv1' is there twice"),
    "a key twice": (b"{%s, %s}" % (FORMATS.encode(), FORMATS.encode()), "'formats' is there twice"),
    "nested too deeply": (b'{"formats":' + b"[" * 200_000, "nested too deeply: more than 64"),
    "a layer twice": (b'{%s, "layers": {"conv1": ["x", "x"]}}' % FORMATS.encode(), "Layer 'x' is in 'conv1' twice"),
    "a layer in two decisions": (
        b'{"formats": {"a": "INT8", "b": "INT4"}, "layers": {"a": ["x"], "b": ["x"]}}',
        "Layer 'x' is in the decisions 'a' and 'b'",
    ),
    "a layer of another decision": (
        b'{"formats": {"a": "INT8", "b": "INT4"}, "layers": {"a": ["a", "b"]}}',
        "Layer 'b' is in the decisions 'a' and 'b'",
    ),
    "separate without parts": (
        b'{%s, "tensors": "separate"}' % FORMATS.encode(),
        'named "LAYER/weights" and "LAYER/activations", got \'conv1\'',
    ),
    "separate without activations": (
        b'{"formats": {"conv1/weights": "INT8"}, "tensors": "separate"}',
        "has 'conv1/weights' but not \"conv1/activations\"",
    ),
}


@pytest.mark.parametrize("content, cause", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_names_itself_and_the_cause(tmp_path, content, cause):
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=cause) as error:
        Recipe.load(path)
    assert str(error.value).startswith(f"{path} is not a recipe: ")
    assert len(str(error.value)) < 1000


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "recipe.json"
    with open(path, "wb") as file:
        file.truncate(16 * 2**20 + 1)
    with pytest.raises(ValueError, match="has 16777217 bytes; a recipe has at most 16777216") as error:
        Recipe.load(path)
    assert str(path) in str(error.value)


def test_a_long_wrong_value_does_not_flood_the_message(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"formats": {"conv1": "X" * 10**6}}))
    with pytest.raises(ValueError, match="Decision 'conv1': Unknown format") as error:
        Recipe.load(path)
    assert len(str(error.value)) < 1000


def test_a_recipe_of_many_layers_loads(tmp_path):
    recipe = Recipe({f"layer{i}": "INT8" for i in range(20_000)})
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe


def test_tied_layers_may_have_their_parts_apart():
    layers = {"stage/weights": ("conv1", "conv2"), "stage/activations": ("conv1", "conv2")}
    recipe = Recipe({"stage/weights": "INT4", "stage/activations": "INT8"}, "separate", layers)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("path, error", [("nowhere.json", FileNotFoundError), (".", IsADirectoryError)])
def test_a_file_that_cannot_be_read(tmp_path, path, error):
    with pytest.raises(error):
        Recipe.load(tmp_path / path)


# ---- fitting a model


def test_check_accepts_the_same_decisions_in_any_order():
    RECIPES["plain"].check(["block/conv2", "conv1"], "net")


@pytest.mark.parametrize(
    "decisions, why",
    [
        (["conv1"], "unknown 'block/conv2'\\."),
        (["conv1", "block/conv2", "x"], "no format for 'x'\\."),
        (["y"], "no format for 'y'; unknown 'conv1', 'block/conv2'\\. The model's decisions are 'y'"),
        ([f"d{i}" for i in range(10)], "no format for 'd0', .*'d7' and 2 more"),
    ],
)
def test_check_lists_what_does_not_fit(decisions, why):
    with pytest.raises(ValueError, match=f"does not fit model 'net': .*{why}"):
        RECIPES["plain"].check(decisions, "net")
