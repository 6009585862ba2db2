"""The comparison of files with models, and files that are none."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.export.agreement import Program

L = keras.layers


def network():
    keras.utils.set_random_seed(0)
    inputs = L.Input((4,), name="features")
    hidden = L.Dense(6, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, L.Dense(3, name="logits")(hidden), name="net")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    final = fliqs_tf.apply(network(), "INT8")
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    path = tmp_path_factory.mktemp("file") / "model.tflite"
    return fliqs_tf.export.tflite(final, path, [x]), path, x


def test_agreement_in_steps(exported):
    model, path, x = exported
    y = np.asarray(model(x)).argmax(-1)
    first, second = fliqs_tf.export.check(model, path, [(x[:30], y[:30]), (x[30:], y[30:])])
    assert (first.kernels, second.kernels) == ("XNNPACK", "built-in")
    assert first.largest == 0 and first.equal == 1 and first.examples == 40
    assert first.accuracy == first.accuracy_keras == 1.0
    assert first.within(1, 0.995)
    # Two steps added to one of three outputs, by the bias of the Keras model.
    step = first.step
    layer = model.get_layer("logits").layer
    bias = np.asarray(layer.bias).copy()
    layer.bias.assign(bias + np.array([0, 2 * step, 0], np.float32))
    moved, _ = fliqs_tf.export.check(model, path, x)
    layer.bias.assign(bias)
    assert moved.largest == 2 and moved.equal == pytest.approx(2 / 3, abs=0.02) and moved.accuracy is None
    assert not moved.within(1, 0)


def test_a_size_that_keras_leaves_open_fits(tmp_path):
    keras.utils.set_random_seed(0)
    image = L.Input((3, 5, 4))
    y = L.EinsumDense("abcd,de->abce", output_shape=(None, None, 2))(image)
    x = np.random.default_rng(0).normal(size=(8, 3, 5, 4)).astype(np.float32)
    final = fliqs_tf.apply(keras.Model(image, [y, L.GlobalAveragePooling2D()(y)]), "INT8")
    exact = fliqs_tf.export.tflite(final, tmp_path / "model.tflite", [x])
    for agreement in fliqs_tf.export.check(exact, tmp_path / "model.tflite", x)[:2]:
        assert agreement.equal == 1, agreement
    other = keras.Sequential([L.Input((3, 5, 4)), L.Dense(6)])
    with pytest.raises(ValueError, match=r"outputs of shapes \[\(3, 5, 2\), \(2,\)\], the model .* \[\(3, 5, 6\)\]"):
        fliqs_tf.export.check(other, tmp_path / "model.tflite", x)


def test_a_wrong_or_damaged_file_is_refused(exported, tmp_path):
    _, path, _ = exported
    content = path.read_bytes()
    other = keras.Sequential([L.Input((5,)), L.Dense(3)])
    with pytest.raises(ValueError, match="this file was not made from it"):
        fliqs_tf.export.check(other, path, np.zeros((1, 5), np.float32))
    with pytest.raises(FileNotFoundError):
        Program(tmp_path / "none.tflite")
    for cut in (0, 3, 50, len(content) // 2, len(content) - 200):
        (tmp_path / "cut.tflite").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"cut.tflite"):
            Program(tmp_path / "cut.tflite")
    (tmp_path / "noise.tflite").write_bytes(np.random.default_rng(0).bytes(3000))
    with pytest.raises(ValueError, match="is not a .tflite file, or it is damaged"):
        Program(tmp_path / "noise.tflite")


def forms_of(x, y):
    """Everything that holds these 40 examples: {name: (function that gives it, are there labels)}.

    Batches are of 32 and 8, as those of arrays are.
    """
    dataset = tf.data.Dataset.from_tensor_slices
    return {
        "array": (lambda: x, False),
        "tensor": (lambda: tf.constant(x), False),
        "float64": (lambda: x.astype(np.float64), False),
        "pair": (lambda: (x, y), True),
        "triple": (lambda: (x, y, np.ones(40)), True),
        "list of batches": (lambda: [x[:32], x[32:]], False),
        "list of pairs": (lambda: [(x[:32], y[:32]), (x[32:], y[32:])], True),
        "generator": (lambda: (x[i : i + 32] for i in (0, 32)), False),
        "dataset": (lambda: dataset(x).batch(32), False),
        "dataset of pairs": (lambda: dataset((x, y)).batch(32), True),
        "dict": (lambda: {"features": x}, False),
    }


FORMS = list(forms_of(None, None))


@pytest.fixture(scope="module")
def calibrated(exported, tmp_path_factory):
    """The file for two batches, which have ranges of their own."""
    _, _, x = exported
    path = tmp_path_factory.mktemp("file") / "model.tflite"
    fliqs_tf.export.tflite(fliqs_tf.apply(network(), "INT8"), path, [x[:32], x[32:]])
    return path.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_data_in_every_form(exported, calibrated, form, tmp_path):
    model, path, x = exported
    make, has_labels = forms_of(x, np.asarray(model(x)).argmax(-1))[form]
    first, *_ = fliqs_tf.export.check(model, path, make())
    assert first.examples == 40 and first.equal == 1 and first.accuracy == (1.0 if has_labels else None)
    final = fliqs_tf.apply(network(), "INT8")
    fliqs_tf.export.tflite(final, tmp_path / "model.tflite", make())
    assert (tmp_path / "model.tflite").read_bytes() == calibrated


@pytest.mark.parametrize(
    "data, error, message",
    [
        (3, TypeError, "must be a tf.data.Dataset of batches, arrays .* got int"),
        ("x", TypeError, "must be a tf.data.Dataset of batches, arrays .* got str"),
        ([], ValueError, "has no batch"),
        (np.zeros((0, 4), "f"), ValueError, "has no example"),
        (np.zeros((2, 5), "f"), ValueError, r"has inputs of shape \(2, 5\), but the network takes batches \(None, 4\)"),
        (tf.data.Dataset.from_tensor_slices(np.zeros((2, 4))), ValueError, ".*There must be an axis of examples first"),
    ],
)
def test_data_that_are_none(exported, tmp_path, data, error, message):
    model, path, _ = exported
    with pytest.raises(error, match=f"data {message}"):
        fliqs_tf.export.check(model, path, data)
    with pytest.raises(error, match=f"representative {message}"):
        fliqs_tf.export.tflite(fliqs_tf.apply(network(), "INT8"), tmp_path / "model.tflite", data)
    assert not list(tmp_path.iterdir())


def test_inputs_by_name(tmp_path):
    """Of equal shapes, and not in the order of their names."""
    keras.utils.set_random_seed(0)
    second, first = L.Input((4,), name="second"), L.Input((4,), name="first")
    y = L.Concatenate()([L.Dense(3, activation="relu")(second), L.Dense(3, activation="relu")(first)])
    final = fliqs_tf.apply(keras.Model([second, first], L.Dense(2)(y)), "INT8")
    x = {name: np.random.default_rng(i).normal(size=(20, 4)).astype("f") for i, name in enumerate(("first", "second"))}
    by_name = fliqs_tf.export.tflite(final, tmp_path / "by_name.tflite", x)
    in_order = [x["second"], x["first"]]
    fliqs_tf.export.tflite(final, tmp_path / "in_order.tflite", in_order)
    assert (tmp_path / "by_name.tflite").read_bytes() == (tmp_path / "in_order.tflite").read_bytes()
    for data in (x, in_order, [x], [in_order], tf.data.Dataset.from_tensor_slices(x).batch(7)):
        agreement, *_ = fliqs_tf.export.check(by_name, tmp_path / "by_name.tflite", data)
        assert agreement.largest <= 1 and agreement.equal > 0.95 and agreement.examples == 20, agreement
