"""Models that others have saved are data: files with code of their own are refused before Keras sees them."""

import json
import sys
import zipfile

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.io import loadable, loading

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


def test_indexing_of_tensors_loads(tmp_path):
    inputs = keras.Input((3, 2))
    model = keras.Model(inputs, inputs[:, 0])
    model.save(tmp_path / "m.keras")  # SlicingOpLambda in tf_keras
    x = np.arange(6, dtype="f").reshape(1, 3, 2)
    np.testing.assert_array_equal(loading.load_model(tmp_path / "m.keras")(x), x[:, 0])


def test_a_lambda_layer_is_refused(tmp_path):
    inputs = keras.Input((3,))
    keras.Model(inputs, L.Lambda(lambda x: x + 1)(inputs)).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"m.keras cannot be loaded: it asks for '(Lambda|__lambda__)'"):
        loading.load_model(tmp_path / "m.keras")


OPEN = {"module": "builtins", "class_name": "function", "config": "open", "registered_name": "function"}


def layer(name, module="keras.layers", registered_name=None, **config):
    return {"module": module, "class_name": name, "config": config, "registered_name": registered_name}


CODE = {
    "a module": (layer("Popen", "subprocess"), "asks for 'Popen' of the module 'subprocess'"),
    "a function": (OPEN, "asks for 'open' of the module 'builtins'"),
    "a function of Keras": (
        {**OPEN, "module": "keras.src.utils.file_utils", "config": "get_file"},
        "asks for 'get_file' of the module 'keras.src.utils.file_utils'",
    ),
    "a function that looks for others": ({**OPEN, "module": "keras.layers", "config": "deserialize"}, "'deserialize'"),
    "a function as a class": (layer("get_file", "keras.utils", origin="file:///etc/passwd"), "asks for 'get_file'"),
    "a function without a module": ({"class_name": "function", "config": "open"}, "asks for 'open'"),
    "a function that is no text": ({"class_name": "function", "config": ["open"]}, r"asks for \['open'\]"),
    "a lambda": ({"class_name": "__lambda__", "config": {"value": "x"}}, "asks for '__lambda__'"),
    "a type": (
        {"class_name": "__typespec__", "spec_name": "x", "module": "keras.planted", "config": []},
        "__typespec__",
    ),
    "a call of TensorFlow": (layer("TFOpLambda", function="io.write_file"), "(has|asks for).*TFOpLambda"),
    "an index of TensorFlow": (layer("SlicingOpLambda", function="io.write_file"), "(has|asks for).*SlicingOpLambda"),
    "a module that is a list": ({"module": [], "class_name": "x"}, r"asks for 'x' of the module \[\]"),
    "a class that is a list": ({"module": "keras.layers", "class_name": ["Dense"]}, r"asks for \['Dense'\]"),
    "a SavedModel": (layer("TFSMLayer", filepath="/planted"), "asks for 'TFSMLayer'"),
    "a SavedModel without a module": (
        {"class_name": "TFSMLayer", "config": {"filepath": "/x"}},
        "asks for 'TFSMLayer'",
    ),
    "a SavedModel, exported": (
        layer("ReloadedLayer", "tf_keras.src.export.export_lib", filepath="/planted"),
        "asks for 'ReloadedLayer' of the module 'tf_keras.src",
    ),
    "a SavedModel, exported, as Keras'": (layer("ReloadedLayer", "keras.src.export.export_lib"), "'ReloadedLayer'"),
    "a class in a class": (layer("Dense.__init__", "keras.src.layers.core.dense"), "asks for 'Dense.__init__'"),
    "a pickle": (layer("TorchModuleWrapper", module_="x"), "asks for 'TorchModuleWrapper'"),
    "features with files": (layer("DenseFeatures", feature_columns=[]), "asks for 'DenseFeatures'"),
    "a tokenizer": (
        layer("BytePairTokenizer", "keras_hub.tokenizers", "keras_hub>BytePairTokenizer", vocabulary="/etc/passwd"),
        "asks for 'BytePairTokenizer'",
    ),
    "a registered name beside": (layer("Popen", "subprocess", "fliqs_tf>Nothing"), "asks for 'Popen'"),
    "a vocabulary": (
        layer("StringLookup", vocabulary="/etc/passwd"),
        "StringLookup layer reads the file '/etc/passwd'",
    ),
    "numbers as a vocabulary": (layer("IntegerLookup", vocabulary="/x"), "IntegerLookup layer reads the file '/x'"),
    "a text's vocabulary": (layer("TextVectorization", vocabulary="/x"), "TextVectorization layer reads the file '/x'"),
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

    with pytest.raises(ValueError, match=f"m.keras cannot be loaded: its? .*{why}"):
        loading.load_model(rewritten(saved, change))


def test_a_vocabulary_in_the_file_loads(tmp_path):
    words = keras.Sequential([keras.Input((), dtype="string"), L.StringLookup(vocabulary=["a", "b"], name="words")])
    words.save(tmp_path / "m.keras")
    assert np.asarray(loading.load_model(tmp_path / "m.keras")(tf.constant(["b", "c", "a"]))).tolist() == [2, 0, 1]


@pytest.mark.skipif(IS_KERAS_3, reason="a layer of tf_keras")
def test_a_saved_model_is_not_read(saved, tmp_path):
    """tf_keras reads it: were this to fail, there would be another reason for the refusal."""
    keras.Sequential([L.Dense(2, input_shape=(3,))]).export(tmp_path / "planted")
    planted = layer("ReloadedLayer", "tf_keras.src.export.export_lib", filepath=str(tmp_path / "planted"))
    planted["config"]["call_endpoint"] = "serve"
    rewritten(saved, lambda config: planted)
    with pytest.raises(ValueError, match="asks for 'ReloadedLayer'"):
        loading.load_model(saved)
    with pytest.raises(
        ValueError, match="'reloaded_layer' expected 2 variables"
    ):  # it has run, the weights are missing
        keras.models.load_model(saved, compile=False, safe_mode=True)


def loss_of_mine(y, prediction):
    return keras.losses.mean_squared_error(y, prediction)


def test_what_a_model_was_compiled_with_does_not_matter(tmp_path):
    model = network()
    model.compile("sgd", loss_of_mine)
    model.save(tmp_path / "m.keras")
    assert loading.load_model(tmp_path / "m.keras").name == "net"


@keras.saving.register_keras_serializable("loading_test")
class Mine(L.Layer):
    def call(self, x):
        return 2 * x


def test_a_file_of_the_other_keras_says_how_to_switch(saved):
    other = "tf_keras.src.engine.functional" if IS_KERAS_3 else "keras.src.models.functional"
    rewritten(saved, lambda config: {**config, "module": other})
    with pytest.raises(ValueError, match=r"it was not saved under (tf_k|K)eras .*TF_USE_LEGACY_KERAS.* before Python"):
        loading.load_model(saved)


def test_layers_of_the_users_own_load_when_the_user_says_so(tmp_path):
    inputs = keras.Input((3,))
    keras.Model(inputs, Mine()(inputs)).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="asks for 'Mine' of the module"):
        loading.load_model(tmp_path / "m.keras")
    for custom_objects in ({}, {"Mine": Mine}):
        assert np.asarray(loading.load_model(tmp_path / "m.keras", custom_objects)(np.ones((1, 3)))).tolist() == [
            [2] * 3
        ]


@pytest.mark.skipif(not IS_KERAS_3, reason="keras_hub is of Keras 3")
def test_layers_of_keras_hub_load(tmp_path):
    hub = pytest.importorskip("keras_hub")
    inputs = keras.Input((4, 8))
    gelu = keras.saving.get_registered_object("keras_hub>gelu_approximate")
    encoder = hub.layers.TransformerEncoder(8, 2, activation=gelu)
    model = keras.Model(inputs, encoder(inputs))
    model.save(tmp_path / "m.keras")
    x = np.random.default_rng(0).normal(size=(1, 4, 8)).astype("f")
    np.testing.assert_array_equal(loading.load_model(tmp_path / "m.keras")(x), model(x))


@pytest.mark.parametrize("namespace", ["layers", "initializers", "regularizers", "losses", "metrics", "optimizers"])
def test_what_keras_writes_of_its_own_objects_is_known(namespace):
    """Whatever can be made without arguments: its config is taken, under the names that Keras gives it."""
    written = 0
    for name, cls in vars(getattr(keras, namespace)).items():
        if not isinstance(cls, type) or not loadable.has_class(f"keras.{namespace}", name):
            continue
        try:
            config = keras.saving.serialize_keras_object(cls())
        except Exception:
            continue  # it needs arguments, or is abstract
        loading.check_config(config)
        written += 1
    assert written >= 3


@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 refuses by itself")
def test_what_the_check_is_for(saved, tmp_path):
    """tf_keras imports any module in safe mode: were this to fail, the check could go."""
    (tmp_path / "planted.py").write_text("import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n")
    rewritten(saved, lambda config: {**config, "module": "planted", "class_name": "Planted", "registered_name": None})
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ValueError, match="asks for 'Planted' of the module 'planted'"):
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
