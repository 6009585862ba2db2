"""Models that version 0.1.0 saved load, and compute what they computed then.

testdata/golden_models holds, for each Keras, what `python -m fliqs_tf.golden_models_test` wrote: `.keras` files and
what they give. Those that are there are never written anew: they stand for the files of users. New ones may join them.
"""

import json
import pathlib
import zipfile

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.io import loading

L = keras.layers
FOLDER = pathlib.Path(__file__).parents[1] / "testdata/golden_models" / ("keras3" if IS_KERAS_3 else "tf_keras")
# What each holds of the classes that only this package has. (Rounding is only in what TFLite's kernels compute.)
CLASSES = {
    "attention": {"SearchModel", "Composite", "Quantized"},
    "tflite": {"SearchModel", "Quantized", "ActivationQuantizer"},
    "deployed": {"Quantized", "ActivationQuantizer", "AccumulatorRounding", "KernelRounding"},
}
# Softmax differs in the last bit from processor to processor.
TOLERANCE = {"attention": 1e-6, "tflite": 0, "deployed": 0}


def inputs_of(name: str) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 4, 6) if name == "attention" else (2, 6, 6, 3)).astype("f")


def result_of(model) -> dict:
    return {"decided": bool(np.asarray(model.controller.decided)), "recipe": model.recipe().to_dict()}


@pytest.mark.parametrize("load", [loading.load_model, keras.models.load_model], ids=["loading", "keras"])
@pytest.mark.parametrize("name", CLASSES)
def test_files_of_version_0_1_0_compute_what_they_did(name, load):
    model = load(FOLDER / f"{name}.keras")
    expected = np.load(FOLDER / f"{name}.npz")
    outputs = np.asarray(model(inputs_of(name)))
    np.testing.assert_allclose(outputs, expected["outputs"], rtol=TOLERANCE[name], atol=TOLERANCE[name])
    weights = model.get_weights()
    assert len(weights) == len(expected.files) - 1
    for i, weight in enumerate(weights):
        np.testing.assert_array_equal(weight, expected[f"weight_{i}"])
    if isinstance(model, fliqs_tf.SearchModel):
        assert result_of(model) == json.loads((FOLDER / f"{name}.json").read_text())
        assert (model.target_cost is None) == (load is loading.load_model)  # ours does not compile


@pytest.mark.parametrize("name", CLASSES)
def test_the_files_hold_the_classes_of_this_package(name):
    with zipfile.ZipFile(FOLDER / f"{name}.keras") as archive:
        config = archive.read("config.json").decode()
    assert {kind for kind in CLASSES[name] if f'"registered_name": "fliqs_tf>{kind}"' not in config} == set()


# ---- writing them


def attention() -> keras.Model:
    inputs = keras.Input((4, 6), name="in")
    x = L.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    x = L.LayerNormalization(name="norm")(L.Add(name="add")([x, inputs]))
    outputs = L.Dense(3, name="fc")(L.GlobalAveragePooling1D(name="pool")(x))
    return fliqs_tf.wrap(keras.Model(inputs, outputs, name="net"), ["INT4", "E4M3", "INT8"], attention_scores=True)


def convolutions() -> keras.Model:
    inputs = keras.Input((6, 6, 3), name="in")
    x = L.Conv2D(4, 3, padding="same", use_bias=False, name="conv1")(inputs)
    x = L.ReLU(name="relu1")(L.BatchNormalization(name="norm1")(x))
    y = L.DepthwiseConv2D(3, padding="same", activation="relu", name="conv2")(x)
    x = L.GlobalAveragePooling2D(name="pool")(L.Add(name="add")([x, y]))
    return fliqs_tf.wrap(
        keras.Model(inputs, L.Dense(3, name="fc")(x), name="net"), ["INT4", "INT6", "INT8"], target="tflite"
    )


def searched(model, name: str) -> fliqs_tf.SearchModel:
    x = np.random.default_rng(2).normal(size=(32, *inputs_of(name).shape[1:])).astype("f")
    y = np.random.default_rng(3).integers(0, 3, 32)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), target_cost="0.625x INT8", search_steps=12
    )
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, shuffle=False)
    return model


def save(model, name: str) -> None:
    path = FOLDER / f"{name}.keras"
    if path.exists():
        raise SystemExit(f"{path} is there already: it stays as it is.")
    model.save(path)
    weights = {f"weight_{i}": weight for i, weight in enumerate(model.get_weights())}
    np.savez_compressed(path.with_suffix(".npz"), outputs=np.asarray(model(inputs_of(name))), **weights)
    if isinstance(model, fliqs_tf.SearchModel):
        path.with_suffix(".json").write_text(json.dumps(result_of(model), indent=2) + "\n")


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    save(searched(attention(), "attention"), "attention")
    for_tflite = searched(convolutions(), "tflite")
    save(for_tflite, "tflite")
    recipe = fliqs_tf.Recipe({"conv1": "INT4", "conv2": "INT8", "fc": "INT8"})
    save(for_tflite.deploy(recipe, [inputs_of("tflite")]), "deployed")
