"""What export.py says of packed and ONNX files, on the digits."""

import numpy as np
import pytest

import fliqs_tf
from binaries import data as datasets
from binaries import exporting
from fliqs_tf._keras import keras

L = keras.layers


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", None, 0, 0.1)


def final(fmt):
    inputs = keras.Input((8, 8, 1))
    x = L.Flatten()(L.Conv2D(4, 3, activation="relu", name="conv")(inputs))
    model = fliqs_tf.apply(keras.Model(inputs, L.Dense(10, name="fc")(x), name="net"), fmt)
    model(np.random.default_rng(0).uniform(0, 1, (9, 8, 8, 1)).astype(np.float32), training=True)
    return model


def test_packed(tmp_path, digits, capsys):
    assert exporting.packed(final("E3M2"), tmp_path / "m.safetensors", digits) == []
    said = capsys.readouterr().out
    assert "to the bit" in said and f"{(4 * 9 + 10 * 144) * 6 // 8:,} of them weights" in said


def test_onnx(tmp_path, digits, capsys):
    assert exporting.onnx(final("INT8"), tmp_path / "m.onnx", digits) == []
    assert "top-1 agreement 100.00 %" in capsys.readouterr().out
    (problem,) = exporting.onnx(final("INT8"), tmp_path / "m.onnx", digits, top1=1.01)
    assert "top-1 agreement" in problem


def test_onnx_that_onnxruntime_does_not_run(tmp_path, digits):
    (problem,) = exporting.onnx(final("E2M1"), tmp_path / "m.onnx", digits)
    assert "does not run the file on a CPU" in problem
