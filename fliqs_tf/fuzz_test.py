"""Whatever a user, a file or a flag says: it is understood, or it is a ValueError of one readable message."""

import contextlib
import copy
import json

import hypothesis
import hypothesis.strategies as st

from fliqs_tf import costs
from fliqs_tf.costs.profile import Profile
from fliqs_tf.numerics.formats import Format
from fliqs_tf.numerics.space import Space
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.quantize.rules import Rule
from fliqs_tf.reporting import report

LONGEST_MESSAGE = 2000
TEXT = st.text(max_size=30) | st.text(alphabet="INTEMBF0123456789.x*-+ ,/\u0664\x00", max_size=12)
NUMBER = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400)])
ANY = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT | st.binary(max_size=4) | st.sampled_from(["INT8", "INT4", "separate"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
many = hypothesis.settings(max_examples=150, deadline=None)


def understood(read, *arguments):
    """What `read` gives, or None after a ValueError."""
    try:
        return read(*arguments)
    except ValueError as error:
        length = len(str(error))  # outside of the assertion, which would print the message
        assert 0 < length < LONGEST_MESSAGE
        return None


@hypothesis.given(TEXT | ANY)
@many
def test_format_names(name):
    fmt = understood(Format, name)
    assert fmt is None or (Format(fmt.name) == fmt and 2 <= fmt.bits <= 32)


@hypothesis.given(TEXT | ANY | st.lists(TEXT | ANY, max_size=3))
@many
def test_spaces(formats):
    space = understood(Space, formats)
    assert space is None or (len(space) >= 1 and Space(space.names) == space)


@hypothesis.given(TEXT | ANY)
@many
def test_targets(text):
    target = understood(costs.parse_target_cost, text, lambda fmt: 40.0, "GBOPs", (1.0, 100.0))
    assert target is None or 0.999 <= target <= 100.001


@hypothesis.given(TEXT | st.sampled_from(["(" * 20_000, "a{99999999999}", "[", "(?P<a", "\\"]), ANY, TEXT | st.none())
@many
def test_rules(pattern, formats, tie):
    rule = understood(Rule, pattern, formats, tie)
    assert rule is None or rule.formats is None or isinstance(rule.formats, Space)


@hypothesis.given(TEXT | ANY)
@many
def test_profiles_by_name(name):
    with contextlib.suppress(OSError):  # a path that cannot be read
        assert understood(Profile.load, name) is None or name in Profile.shipped()


RECIPE = {
    "formats": {"a/weights": "INT4", "a/activations": "INT8", "b/weights": "E4M3", "b/activations": "BF16"},
    "tensors": "separate",
    "layers": {"a/weights": ["x", "y"], "a/activations": ["x", "y"]},
    "float_layers": ["c"],
    "cost": 1.5,
}
RUN = {
    "cost": 0.1,
    "cost_unit": "GBOPs",
    "target_cost": None,
    "accuracy": 0.9,
    "reference": [{"name": "float", "accuracy": 0.95, "cost": None}, {"name": "uniform INT8", "cost": 0.2}],
    "layers_table": [
        {"name": "a", "macs": 9, "weights": 3, "weight_format": "INT4", "activation_format": None, "cost": 0.1}
    ],
    "versions": {"keras": "3"},
    "seed": 1,
}


def places(data, path=()):
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def put(data, place, value):
    """A copy of the data with another value in one place."""
    holder = [copy.deepcopy(data)]
    inner, path = holder, (0, *place)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return holder[0]


@hypothesis.given(st.sampled_from(list(places(RECIPE))), ANY)
@many
def test_recipes_with_any_value_in_any_place(place, value):
    recipe = understood(Recipe.from_dict, put(RECIPE, place, value))
    if recipe is not None:
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        understood(recipe.check, ["a/weights"], "net")


@hypothesis.given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 30))
@many
def test_recipe_files_with_any_bytes_in_them(tmp_path_factory, noise, start, length):
    content = json.dumps(RECIPE).encode()
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content[:start] + noise[:length] + content[start + length :])
    understood(Recipe.load, path)


@hypothesis.given(st.sampled_from(list(places(RUN))), ANY)
@many
def test_reports_of_runs_with_any_value_in_any_place(place, value):
    def page(recipe):
        if not isinstance(recipe, dict):
            raise ValueError("refused before this")
        report._check_recipe(recipe)
        return report._page("run", recipe, recipe.get("layers_table", []), [], 0)

    text = understood(page, put(RUN, place, value))
    assert text is None or text.startswith("<!DOCTYPE html>")
