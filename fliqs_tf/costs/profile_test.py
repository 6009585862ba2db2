"""Hardware profiles: prices by hand, spaces that run, and every way in which a file can be wrong."""

import copy
import fractions
import itertools
import json
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import fliqs_tf
from fliqs_tf import costs
from fliqs_tf._keras import keras
from fliqs_tf.costs.profile import Profile

L = keras.layers
F = fractions.Fraction
CONV, FC = 3888, 720  # MACs, see network()


def network():
    """conv: 36 * 27 * 4 = 3888 MACs, 108 weights; fc: 144 * 5 = 720 MACs, 720 weights."""
    inputs = keras.Input((8, 8, 3))
    x = L.Flatten()(L.ReLU()(L.Conv2D(4, 3, name="conv")(inputs)))
    return keras.Model(inputs, L.Dense(5, name="fc")(x), name="net")


class Sites:
    """What costs see of network(), without the time that it takes to trace it."""

    name = "net"
    sites = (
        costs.Site("conv", CONV, 108, weight_decision="conv", activation_decision="conv"),
        costs.Site("fc", FC, 720, weight_decision="fc", activation_decision="fc"),
    )


def test_the_network_is_as_counted():
    assert tuple(costs.sites(network())) == Sites.sites


def entry(weights, activations, cost):
    return {"weights": weights, "activations": activations, "cost": cost, "sources": ["sheet"]}


# Nanoseconds of a made-up chip; INT4 weights with INT8 inputs are faster than INT8 with INT8.
CHIP = {
    "name": "Chip",
    "unit": "us",
    "per_unit": 1000,
    "sources": {"sheet": {"title": "Chip datasheet", "url": "https://example.com", "says": "see the figures"}},
    "cost_per_mac": [
        entry(["INT4"], ["INT8"], "1/3"),
        entry(["INT8"], ["INT8"], 0.5),
        entry(["INT8"], ["INT16"], "1.5/2.5"),
        entry(["BF16"], ["BF16"], 2),
        entry(["FP32"], ["FP32"], 4),
    ],
    "bytes_per_weight": [{"formats": ["INT4"], "bytes": "17/32", "sources": ["sheet"]}],
}


def chip(**changes):
    return Profile({**copy.deepcopy(CHIP), **changes})


GPU = chip(float="BF16", cost_per_mac=[*CHIP["cost_per_mac"][:4], entry(["INT4", "INT8"], ["BF16"], 2)])


# ---- prices


def test_figures_are_exact():
    assert chip().pairs == {
        ("INT4", "INT8"): F(1, 3),
        ("INT8", "INT8"): F(1, 2),
        ("INT8", "INT16"): F(3, 5),
        ("BF16", "BF16"): F(2),
        ("FP32", "FP32"): F(4),
    }


def test_a_network_by_hand():
    assert chip().cost(Sites, "INT8") == (CONV + FC) / 2 / 1000
    recipe = fliqs_tf.Recipe(
        {"conv/weights": "INT4", "conv/activations": "INT8", "fc/weights": "INT8", "fc/activations": "INT16"},
        "separate",
    )
    assert chip().cost(Sites, recipe) == float((CONV * F(1, 3) + FC * F(3, 5)) / 1000)
    assert chip().memory(Sites, recipe) == (108 * 17 / 32 + 720) / 2**20
    assert chip().memory(Sites, "BF16") == (108 + 720) * 2 / 2**20
    assert chip().cost.unit == "us"


def test_an_exact_sum_is_rounded_once():
    third = chip(cost_per_mac=[entry(["INT8"], ["INT8"], "1/3")], per_unit=1)
    assert third.cost(Sites, "INT8") == (CONV + FC) / 3
    assert isinstance(third.cost(Sites, "INT8"), float)


def test_float_is_what_the_profile_says():
    recipe = fliqs_tf.Recipe({"fc": "INT8"}, info={"float_layers": ["conv"]})
    assert chip().cost(Sites, recipe) == (CONV * 4 + FC / 2) / 1000
    assert GPU.cost(Sites, recipe) == (CONV * 2 + FC / 2) / 1000
    weights_only = fliqs_tf.Recipe({"conv": "INT4", "fc": "INT8"}, "weights")
    assert GPU.cost(Sites, weights_only) == (CONV + FC) * 2 / 1000
    assert GPU.memory(Sites, recipe) == (108 * 2 + 720) / 2**20


def test_the_bops_profile_is_bops():
    profile = Profile.load("bops")
    for w, a in itertools.product(("INT2", "INT4", "E2M1", "E3M3", "E4M3", "INT8", "E5M10", "BF16", "FP32"), repeat=2):
        recipe = fliqs_tf.Recipe(
            {"conv/weights": w, "conv/activations": a, "fc/weights": a, "fc/activations": w}, "separate"
        )
        assert profile.cost(Sites, recipe) == costs.bops(Sites, recipe)


# ---- what cannot run


def test_unsupported_layers_name_the_layer_and_the_reason():
    recipe = fliqs_tf.Recipe({"conv": "INT4", "fc": "E4M3"})
    found = chip().unsupported_layers(Sites, recipe)
    assert [(o.path, o.weights, o.activations) for o in found] == [("conv", "INT4", "INT4"), ("fc", "E4M3", "E4M3")]
    assert found[0].reason == "It multiplies INT4 weights only by INT8 inputs."
    assert found[1].reason == "It has no E4M3 weights, only INT4, INT8, BF16, FP32."
    assert chip().unsupported_layers(Sites, "INT8") == []


def test_a_float_layer_may_be_unsupported():
    integer_only = chip(cost_per_mac=CHIP["cost_per_mac"][:2])
    (found,) = integer_only.unsupported_layers(Sites, fliqs_tf.Recipe({"fc": "INT8"}, info={"float_layers": ["conv"]}))
    assert found.path == "conv"
    assert found.reason == "It has no FP32 weights, only INT4, INT8. What stays in float runs in FP32 there."


def test_pricing_what_cannot_run_is_an_error():
    with pytest.raises(ValueError, match=r"Chip cannot run layer 'conv' with INT4 weights and INT4 inputs: It multi"):
        chip().cost(Sites, "INT4")


def test_a_recipe_of_another_model():
    with pytest.raises(ValueError, match="no format for 'fc' of model 'net'"):
        chip().unsupported_layers(Sites, fliqs_tf.Recipe({"conv": "INT8"}))


# ---- spaces


def names(spaces):
    return tuple(space.names for space in spaces)


def test_spaces_by_hand():
    assert names(chip().spaces("together")) == (("INT8", "BF16", "FP32"),) * 2
    assert names(GPU.spaces("together")) == (("INT8", "BF16"),) * 2
    assert names(GPU.spaces("weights"))[0] == ("INT4", "INT8", "BF16")
    # Candidates: INT4 INT8 x INT8 (range 1.5), INT8 x INT8 INT16 (1.2), INT4 INT8 BF16 x BF16 (1), and of these
    # INT4 INT8 x INT8 BF16: 1/3 to 2, the widest.
    assert names(GPU.spaces("separate")) == (("INT4", "INT8"), ("INT8", "BF16"))
    assert names(chip().spaces("separate")) == (("INT4", "INT8"), ("INT8",))


def test_a_given_space_takes_its_part():
    assert names(chip().spaces("together", ["BF16", "INT8"]))[0] == ("INT8", "BF16")
    assert names(GPU.spaces("separate", ["INT8", "INT16"])) == (("INT8",), ("INT8", "INT16"))
    assert names(Profile.load("bops").spaces("together", "FLIQS-S-INT"))[0] == ("INT4", "INT8", "BF16")


@pytest.mark.parametrize(
    "tensors, space, why",
    [
        (
            "together",
            ["INT4", "INT8"],
            "The space has INT4, which Chip does not have as weights and inputs of one layer",
        ),
        ("together", "FLIQS-S-FLOAT", "The space has E2M1, E4M3, which Chip .*; it has INT8, BF16, FP32"),
        ("weights", ["INT8", "FP32"], "The space has INT8, which Chip does not have as weights with FP32 inputs"),
        ("separate", ["INT8", "INT5"], "The space has INT5, which Chip does not have; it has INT4, INT8"),
        ("separate", ["INT4", "BF16"], None),  # BF16 x BF16 runs
        ("separate", ["INT4", "INT16"], "Chip multiplies none of INT4, INT16 by each other"),
        ("weights", None, "With tensors='weights' Chip leaves nothing to choose.*INT4 x INT8, INT8 x INT8"),
        ("sideways", None, "tensors must be one of together, weights, separate, got 'sideways'"),
    ],
)
def test_a_space_that_the_platform_does_not_have(tensors, space, why):
    if why is None:
        chip().spaces(tensors, space)
        return
    with pytest.raises(ValueError, match=why):
        chip().spaces(tensors, space)


@hypothesis.given(st.sets(st.tuples(st.integers(2, 5), st.integers(2, 5)), min_size=1), st.randoms())
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_widest_block_against_all_blocks(pairs, random):
    prices = {pair: random.choice([1, 2, 3, 5]) for pair in sorted(pairs)}
    profile = chip(cost_per_mac=[entry([f"INT{w}"], [f"INT{a}"], c) for (w, a), c in prices.items()])
    subsets = [s for n in range(1, 5) for s in itertools.combinations(range(2, 6), n)]
    best = max(
        (F(max(block), min(block)), len(block))
        for ws, its in itertools.product(subsets, subsets)
        if (block := [prices.get((w, a), 0) for w in ws for a in its]) and min(block) > 0
    )
    try:
        found = profile.spaces("separate")
    except ValueError:
        assert best == (1, 1)
        return
    block = [profile.pairs[w, a] for w in found[0].names for a in found[1].names]
    assert (max(block) / min(block), len(block)) == best


# ---- wrapping and compiling


def test_a_search_for_a_platform():
    model = fliqs_tf.wrap(network(), profile=chip())
    assert [d.options for d in model.decisions] == [("INT8", "BF16", "FP32")] * 2
    model.compile("sgd", "mse", target_cost="2x INT8")
    assert (model.cost.name, model.cost.unit) == ("Chip", "us")
    assert model.cost_table.reachable() == ((CONV + FC) / 2 / 1000, (CONV + FC) * 4 / 1000)
    assert model.target_cost == (CONV + FC) / 1000
    # Options 0, 1, 2 cost 1/2, 2, 4 per MAC.
    assert model.cost_table.of_samples([[0, 1], [2, 0]]).tolist() == [
        (CONV / 2 + FC * 2) / 1000,
        (CONV * 4 + FC / 2) / 1000,
    ]
    model.compile("sgd", "mse", target_cost="0.5x BF16", cost="bops")
    assert model.cost is costs.bops


def test_weights_and_inputs_apart_take_formats_that_run():
    model = fliqs_tf.wrap(network(), profile=GPU, tensors="separate")
    assert {d.name: d.options for d in model.decisions} == {
        "conv/weights": ("INT4", "INT8"),
        "conv/activations": ("INT8", "BF16"),
        "fc/weights": ("INT4", "INT8"),
        "fc/activations": ("INT8", "BF16"),
    }
    model.compile("sgd", "mse", target_cost=2.0)
    pairs = {(0, 0): F(1, 3), (0, 1): 2, (1, 0): F(1, 2), (1, 1): 2}
    for sample in itertools.product(range(2), repeat=4):
        by_hand = float((CONV * pairs[sample[:2]] + FC * pairs[sample[2:]]) / 1000)
        np.testing.assert_allclose(model.cost_table.of_samples([sample])[0], by_hand, rtol=1e-15)
    assert not GPU.unsupported_layers(model)


def test_a_fixed_input_format_leaves_the_weights_to_choose():
    model = fliqs_tf.wrap(network(), profile="amd_aie_ml", tensors="separate")
    assert [(d.name, d.options) for d in model.decisions] == [
        ("conv/weights", ("INT4", "INT8")),
        ("fc/weights", ("INT4", "INT8")),
    ]
    model.compile("sgd", "mse", target_cost=0.012)
    assert model.cost_table.reachable() == ((CONV + FC) / 512 / 1000, (CONV + FC) / 256 / 1000)
    recipe = model.recipe()
    assert {recipe.formats[f"{n}/activations"] for n in ("conv", "fc")} == {"INT8"}
    assert Profile.load("amd_aie_ml").cost(model.deploy()) == Profile.load("amd_aie_ml").cost(Sites, recipe)


def test_a_given_space_and_rules_must_run():
    with pytest.raises(ValueError, match="The space has INT5, which Chip does not have"):
        fliqs_tf.wrap(network(), ["INT5", "INT8"], profile=chip())
    with pytest.raises(ValueError, match="Chip cannot run layer 'conv' with INT4 weights and INT4 inputs"):
        fliqs_tf.wrap(network(), rules=[("conv", ["INT4", "INT8"])], profile=chip())
    with pytest.raises(ValueError, match="cannot run layer 'fc' with FP32 weights and FP32 inputs: It has no FP32"):
        fliqs_tf.wrap(network(), rules=[("fc", None)], profile=chip(cost_per_mac=CHIP["cost_per_mac"][:4]))
    assert fliqs_tf.wrap(network(), rules=[("fc", None)], profile=GPU).sites[1].weight_decision is None


def test_a_profile_as_the_cost_of_a_space_that_it_does_not_have():
    model = fliqs_tf.wrap(network(), ["INT4", "INT8"])
    with pytest.raises(ValueError, match="Chip cannot run layer 'conv' with INT4 .* Wrap with profile="):
        model.compile("sgd", "mse", target_cost=1.0, cost=chip())


@pytest.mark.parametrize("cost", ["time", 3, object()])
def test_an_unknown_cost(cost):
    with pytest.raises(ValueError, match="Unknown cost .*known: bops, memory, or give a fliqs_tf.Profile"):
        fliqs_tf.wrap(network(), ["INT4", "INT8"]).compile("sgd", "mse", target_cost=1.0, cost=cost)


@pytest.mark.parametrize("wrapped_with_it", [True, False])
def test_a_saved_search_keeps_its_platform(tmp_path, wrapped_with_it):
    if wrapped_with_it:
        model = fliqs_tf.wrap(network(), profile=chip())
        model.compile("sgd", "mse", target_cost=3.0)
    else:
        model = fliqs_tf.wrap(network(), ["INT8", "BF16"])
        model.compile("sgd", "mse", target_cost=3.0, cost=chip())
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.profile == (chip() if wrapped_with_it else None)
    assert loaded.cost.name == "Chip" and loaded.target_cost == 3.0
    assert loaded.cost_table.reachable() == model.cost_table.reachable()


# ---- the shipped ones


@pytest.mark.parametrize("name", Profile.shipped())
def test_a_shipped_profile_is_cited_and_runs_a_network(name):
    profile = Profile.load(name)
    for source in profile.sources.values():
        assert source["url"].startswith("https://") and len(source["says"]) > 20
    cited = {
        key for part in ("cost_per_mac", "bytes_per_weight") for e in profile.data.get(part, ()) for key in e["sources"]
    }
    assert cited == set(profile.sources), "each source is of some figure"
    tensors = "separate" if name == "amd_aie_ml" else "together"
    model = fliqs_tf.wrap(network(), profile=name, tensors=tensors)
    low, high = costs.CostTable(profile.cost, model.sites, [(d.name, d.options) for d in model.decisions]).reachable()
    assert 0 < low < high
    assert profile.unsupported_layers(model) == []


# Operations per second that the sources print, per format, halved where they are printed with sparsity.
RATES = {
    ("nvidia_h100_sxm", "BF16"): 1979e12 / 2,
    ("nvidia_h100_sxm", "E4M3"): 3958e12 / 2,
    ("nvidia_h100_sxm", "INT8"): 3958e12 / 2,
    ("nvidia_b200_hgx", "BF16"): 4.5e15 / 2,
    ("nvidia_b200_hgx", "E4M3"): 9e15 / 2,
    ("nvidia_b200_hgx", "E2M3"): 9e15 / 2,
    ("nvidia_b200_hgx", "INT8"): 9e15 / 2,
    ("nvidia_b200_hgx", "E2M1"): 18e15 / 2,
    ("google_tpu_v5e", "BF16"): 1.97e14,
    ("google_tpu_v5e", "INT8"): 3.94e14,
    ("google_tpu_v5e", "INT4"): 7.88e14,
    ("google_tpu_v6e", "INT4"): 3.68e15,
}


@pytest.mark.parametrize("platform, fmt", RATES)
def test_times_are_operations_over_the_printed_rate(platform, fmt):
    microseconds = 2 * (CONV + FC) / RATES[platform, fmt] * 1e6
    assert Profile.load(platform).cost(Sites, fmt) == pytest.approx(microseconds, rel=1e-12)


def test_mixed_formats_on_gpus():
    recipe = fliqs_tf.Recipe({"conv": "INT4", "fc": "INT8"}, "weights")
    for name in ("nvidia_h100_sxm", "nvidia_b200_hgx"):  # weights only: the rate of BF16
        profile = Profile.load(name)
        assert profile.cost(Sites, recipe) == profile.cost(Sites, "BF16")
    assert (
        Profile.load("nvidia_b200_hgx").pairs["E2M1", "E4M3"] == Profile.load("nvidia_b200_hgx").pairs["E4M3", "E4M3"]
    )
    assert [o.path for o in Profile.load("nvidia_h100_sxm").unsupported_layers(Sites, "E2M1")] == ["conv", "fc"]
    assert [o.path for o in Profile.load("google_tpu_v5e").unsupported_layers(Sites, recipe)] == ["conv", "fc"]


# ---- files


def test_loading(tmp_path):
    path = tmp_path / "chip.json"
    path.write_text(json.dumps(CHIP))
    assert Profile.load(path) == Profile.load(str(path)) == chip()
    assert Profile.load(chip()) == chip()
    assert "nvidia_h100_sxm" in Profile.shipped()
    with pytest.raises(ValueError, match="Unknown profile 'nvidia_h999'; shipped: amd_aie_ml, "):
        Profile.load("nvidia_h999")
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "nowhere.json")
    with pytest.raises(IsADirectoryError):
        Profile.load(tmp_path)
    for wrong in (None, 3, "", "a\0b", b"bops"):
        with pytest.raises(ValueError, match="A profile is given by its path or name"):
            Profile.load(wrong)


def changed(**changes):
    return {**CHIP, **changes}


def without(key):
    return {k: v for k, v in CHIP.items() if k != key}


def pair(**changes):
    return changed(cost_per_mac=[CHIP["cost_per_mac"][0], {**CHIP["cost_per_mac"][1], **changes}])


FIGURE = r'cost_per_mac\[1\]: "cost" must be a positive number \(1e-12 to 1e12\) or a text such as "2/989.4", got '
WRONG = {
    "a list": ([], "A hardware profile must be an object"),
    "no name": (without("name"), "A hardware profile has no name"),
    "no figures": (without("cost_per_mac"), "A hardware profile has no cost_per_mac"),
    "no sources": (without("sources"), "A hardware profile has no sources"),
    "an unknown key": (changed(speed=3), "has the unknown key 'speed'; known keys: about, bytes_per_weight"),
    "an empty list of figures": (changed(cost_per_mac=[]), '"cost_per_mac" must be a list of objects'),
    "figures as an object": (changed(cost_per_mac={}), '"cost_per_mac" must be a list of objects'),
    "an entry that is a number": (changed(cost_per_mac=[3]), r"cost_per_mac\[0\] must be an object, got 3"),
    "a missing figure": (
        changed(cost_per_mac=[{k: v for k, v in CHIP["cost_per_mac"][0].items() if k != "cost"}]),
        r"cost_per_mac\[0\] has no cost",
    ),
    "a null figure": (pair(cost=None), FIGURE + "None"),
    "a negative figure": (pair(cost=-1), FIGURE + "-1"),
    "zero": (pair(cost=0), FIGURE + "0"),
    "true": (pair(cost=True), FIGURE + "True"),
    "a negative text": (pair(cost="-1/2"), FIGURE + "'-1/2'"),
    "division by zero": (pair(cost="1/0"), FIGURE + "'1/0'"),
    "an exponent in a text": (pair(cost="1e9"), FIGURE + "'1e9'"),
    "digits of another script": (pair(cost="१"), FIGURE),
    "a huge figure": (pair(cost=1e300), FIGURE + r"1e\+300"),
    "a huge integer": (pair(cost=10**30), FIGURE),
    "a tiny figure": (pair(cost=1e-300), FIGURE + "1e-300"),
    "a text of many digits": (pair(cost="9" * 5000), FIGURE),
    "an unknown format": (pair(weights=["INT99"]), r"cost_per_mac\[1\]: \"weights\": Unknown format 'INT99'"),
    "a format that is a number": (pair(activations=[8]), r'"activations": A format is given by its name, got 8'),
    "a format that is no list": (pair(weights="INT8"), "\"weights\" must be a list of formats, got 'INT8'"),
    "no formats": (pair(weights=[]), '"weights" must be a list of formats'),
    "a format twice": (pair(weights=["INT8", "int8"]), '"weights" names a format twice: INT8, INT8'),
    "a pair twice": (pair(weights=["INT4"]), r"cost_per_mac\[1\]: INT4 weights with INT8 inputs have a cost already"),
    "a figure without a source": (pair(sources=[]), r'cost_per_mac\[1\] must name its "sources"'),
    "an unknown source": (pair(sources=["book"]), r"cost_per_mac\[1\] names the source 'book'; known: sheet"),
    "a source that is a list": (pair(sources=[[]]), r"cost_per_mac\[1\] names the source \[\]"),
    "sources without a title": (changed(sources={"sheet": {}}), "Source 'sheet' has no title"),
    "a source that is a text": (changed(sources={"sheet": "x"}), "Source 'sheet' must be an object"),
    "empty sources": (changed(sources={}), '"sources" must be'),
    "an empty name": (changed(name=""), "name must be a text of 1 to 1000 letters, got ''"),
    "a name with an escape": (changed(name="a\x1b[31m"), "name must be a text"),
    "a long name": (changed(name="a" * 1001), "name must be a text"),
    "a unit that is a number": (changed(unit=1), "unit must be a text"),
    "per_unit 0": (changed(per_unit=0), '"per_unit" must be a whole number, 1 to 10\\^18, got 0'),
    "per_unit 1.5": (changed(per_unit=1.5), '"per_unit" must be a whole number'),
    "per_unit true": (changed(per_unit=True), '"per_unit" must be a whole number'),
    "an unknown float": (changed(float="FP64"), "\"float\": Unknown format 'FP64'"),
    "FP32 that runs as something else": (changed(float="BF16"), '"float" is BF16: FP32 runs as that'),
    "bytes that are negative": (
        changed(bytes_per_weight=[{"formats": ["INT4"], "bytes": -1, "sources": ["sheet"]}]),
        r'bytes_per_weight\[0\]: "bytes" must be a positive number',
    ),
    "bytes twice": (
        changed(bytes_per_weight=[CHIP["bytes_per_weight"][0]] * 2),
        r"bytes_per_weight\[1\]: INT4 has a size already",
    ),
}


@pytest.mark.parametrize("data, why", WRONG.values(), ids=WRONG)
def test_a_wrong_file_names_itself_and_the_entry(tmp_path, data, why):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is not a hardware profile: .*{why}") as error:
        Profile.load(path)
    assert len(str(error.value)) < 1000


def test_a_file_that_is_too_large_or_no_json(tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(" " * (2**20 + 1))
    with pytest.raises(ValueError, match="has 1048577 bytes; a hardware profile has at most 1048576"):
        Profile.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="wrong.json is not a hardware profile: Expecting property name"):
        Profile.load(path)


# A value of the profile, anywhere in it, is replaced by any other: it loads or it is a ValueError.
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["INT8", "1/2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(data, path=()):
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@hypothesis.given(st.sampled_from(list(places(CHIP))), ANY)
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_change_of_any_value_loads_or_is_a_value_error(place, value):
    data = [copy.deepcopy(CHIP)]
    inner = data
    path = (0, *place)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        profile = Profile(data[0])
    except ValueError as error:
        assert len(str(error)) < 1000
        return
    for w, a in profile.pairs:
        assert profile.why_not(w, a) == ""
    assert Profile(profile.data) == profile
