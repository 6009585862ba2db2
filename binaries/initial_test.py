import numpy as np
import pytest

from binaries import initial
from fliqs_tf._keras import keras


def network(units=4, name="net", extra=False):
    layers = [keras.layers.Input((3,)), keras.layers.Dense(units, name="hidden"), keras.layers.ReLU(name="relu")]
    layers += [keras.layers.Dense(2, name="more")] if extra else []
    return keras.Sequential([*layers, keras.layers.Dense(2, name="logits")], name=name)


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_takes_the_weights(name, tmp_path):
    given, model = network(), network()
    (given.save if name.endswith("keras") else given.save_weights)(tmp_path / name)
    initial.load(model, tmp_path / name)
    for ours, theirs in zip(model.get_weights(), given.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_directory_holds_a_model(tmp_path):
    given, model = network(), network()
    given.save(tmp_path / "model.keras")
    initial.load(model, tmp_path)
    np.testing.assert_array_equal(model.get_weights()[0], given.get_weights()[0])


def test_another_network_says_which_layers_differ_and_changes_nothing(tmp_path):
    network(units=5, extra=True).save(tmp_path / "model.keras")
    model = network()
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"than 'net': layer 'hidden' has weights \[\(3, 5\), \(5,\)\], not"):
        initial.load(model, tmp_path)
    with pytest.raises(ValueError, match="layer 'more' is only there"):
        initial.load(model, tmp_path)
    for value, was in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, was)


def test_weights_of_another_network(tmp_path):
    network(units=5).save_weights(tmp_path / "model.weights.h5")
    model = network()
    before = model.get_weights()
    with pytest.raises(ValueError, match="of another network than 'net'"):
        initial.load(model, tmp_path / "model.weights.h5")
    for value, was in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, was)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no"):
        initial.load(network(), tmp_path / "model.keras")
