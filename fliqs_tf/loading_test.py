"""Models that others have saved are data: files with code of their own are refused before Keras sees them."""

import json
import sys
import zipfile

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf import loading
from fliqs_tf._keras import IS_KERAS_3, keras

L = keras.layers


def network():
    inputs = keras.Input((3,), name="in")
    return keras.Model(inputs, L.Dense(2, activation="relu", name="fc")(inputs), name="net")


def rewritten(path, change):
    """The file with its config changed: change(dict) -> dict."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["config.json"] = json.dumps(change(json.loads(parts["config.json"]))).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def saved(tmp_path):
    network().save(tmp_path / "m.keras")
    return tmp_path / "m.keras"


@pytest.mark.parametrize("kind", ["plain", "searched", "deployed"])
def test_our_own_models_load(tmp_path, kind):
    model = network()
    if kind != "plain":
        model = fliqs_tf.wrap(model, ["INT4", "INT8"])
        model = model.deploy() if kind == "deployed" else model
    model.save(tmp_path / "m.keras")
    loaded = loading.load_model(tmp_path / "m.keras")
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("f")
    np.testing.assert_array_equal(np.asarray(loaded(x)), np.asarray(model(x)))


def test_arithmetic_of_tensors_loads(tmp_path):
    inputs = keras.Input((3,))
    keras.Model(inputs, L.Dense(2)(inputs) * 2.0 + 1.0).save(tmp_path / "m.keras")  # TFOpLambda in tf_keras
    assert np.asarray(loading.load_model(tmp_path / "m.keras")(np.zeros((1, 3), "f"))).tolist() == [[1.0, 1.0]]


def test_a_lambda_layer_is_refused(tmp_path):
    inputs = keras.Input((3,))
    keras.Model(inputs, L.Lambda(lambda x: x + 1)(inputs)).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"m.keras cannot be loaded: it has a (Lambda layer|__lambda__)"):
        loading.load_model(tmp_path / "m.keras")


OPEN = {"module": "builtins", "class_name": "function", "config": "open", "registered_name": "function"}
CODE = {
    "a module": ({"module": "subprocess", "class_name": "Popen", "config": {}}, "asks for the module 'subprocess'"),
    "a function": (OPEN, "asks for the module 'builtins'"),
    "a function of Keras": (
        {**OPEN, "module": "keras.src.utils.file_utils", "config": "get_file"},
        "function 'get_file'",
    ),
    "a function without a module": ({"class_name": "function", "config": "open"}, "the function 'open'"),
    "a lambda": ({"class_name": "__lambda__", "config": {"value": "x"}}, "has a __lambda__ layer"),
    "a call of TensorFlow": (
        {"module": "keras.layers", "class_name": "TFOpLambda", "config": {"function": "io.write_file"}},
        "has a TFOpLambda layer",
    ),
    "a module that is a list": ({"module": [], "class_name": "x"}, r"asks for the module \[\]"),
}


@pytest.mark.parametrize("node, why", CODE.values(), ids=CODE)
@pytest.mark.parametrize("place", ["a layer", "an argument", "a list"])
def test_code_anywhere_in_the_config_is_refused(saved, node, why, place):
    def change(config):
        layers = config["config"]["layers"]
        if place == "a layer":
            layers.append(node)
        elif place == "an argument":
            layers[1]["config"]["activation"] = node
        else:
            layers[1]["config"]["extra"] = [[{"deep": [node]}]]
        return config

    with pytest.raises(ValueError, match=f"m.keras cannot be loaded: it .*{why}"):
        loading.load_model(rewritten(saved, change))


@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 refuses by itself")
def test_what_the_check_is_for(saved, tmp_path):
    """tf_keras imports any module in safe mode: were this to fail, the check could go."""
    (tmp_path / "planted.py").write_text("import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n")
    rewritten(saved, lambda config: {**config, "module": "planted", "class_name": "Planted", "registered_name": None})
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ValueError, match="asks for the module 'planted'"):
            loading.load_model(saved)
        assert not (tmp_path / "planted.ran").exists()
        with pytest.raises(TypeError, match="Could not locate class"):  # too late
            keras.models.load_model(saved, safe_mode=True)
        assert (tmp_path / "planted.ran").exists()
    finally:
        sys.path.remove(str(tmp_path))


def test_files_that_are_no_models(saved, tmp_path):
    with pytest.raises(FileNotFoundError):
        loading.load_model(tmp_path / "nowhere.keras")
    with pytest.raises(IsADirectoryError):
        loading.load_model(tmp_path)
    (tmp_path / "text.keras").write_text("not a zip file")
    with pytest.raises(ValueError, match="text.keras is not a .keras file: save models with"):
        loading.load_model(tmp_path / "text.keras")
    saved.rename(tmp_path / "m.h5")
    with pytest.raises(ValueError, match="m.h5 is not a .keras file"):
        loading.load_model(tmp_path / "m.h5")


@pytest.mark.parametrize(
    "what", ["no config", "config is no JSON", "no weights", "other weights", "cut short", "a list"]
)
def test_a_damaged_model_file_names_itself(saved, what):
    with zipfile.ZipFile(saved) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    if what == "no config":
        del parts["config.json"]
    elif what == "config is no JSON":
        parts["config.json"] = b"{" * 1000
    elif what == "no weights":
        del parts["model.weights.h5"]
    elif what == "a list":
        parts["config.json"] = b"[]"
    elif what == "other weights":
        parts["model.weights.h5"] = b"\0" * 100
    with zipfile.ZipFile(saved, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    if what == "cut short":
        saved.write_bytes(saved.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"m\.keras (cannot be loaded: |is not a \.keras file)"):
        loading.load_model(saved)
