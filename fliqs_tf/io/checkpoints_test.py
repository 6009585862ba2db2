"""Checkpoints: round trips, damage, and what is not lost."""

import logging
import os

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.io import checkpoints

L = keras.layers
X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 2, 8)


def compiled(width=4, optimizer="adam"):
    model = keras.Sequential(
        [keras.Input((3,)), L.Dense(width), L.BatchNormalization(), L.Dropout(0.5), L.Dense(2, activation="softmax")]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def trained(**options):
    model = compiled(**options)
    model.fit(X, Y, epochs=2, batch_size=4, verbose=0)
    return model


@pytest.fixture(scope="module")
def model():
    return trained()


def small():
    """A model of few bytes: nothing but two variables."""
    return keras.Sequential([keras.Input((1,)), L.Dense(1)])


def assert_same(a, b):
    for left, right in zip(checkpoints._variables(a), checkpoints._variables(b), strict=True):
        np.testing.assert_array_equal(np.array(left), np.array(right))


# ---- round trips


def test_a_new_model_gets_every_variable_back(tmp_path, model):
    path = checkpoints.save(tmp_path, model, 1200)
    assert path == tmp_path / "step-00001200.ckpt"
    fresh = compiled()
    assert checkpoints.restore_newest(tmp_path, fresh) == 1200
    assert_same(fresh, model)
    iterations = fresh.optimizer.iterations
    assert int(iterations.numpy()) == 4  # 2 epochs of 2 steps


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    def two_steps(model):
        for i in range(2):
            model.train_on_batch(X[i * 4 : i * 4 + 4], Y[i * 4 : i * 4 + 4])
        return model.get_weights()

    def without_dropout():
        model = keras.Sequential([keras.Input((3,)), L.Dense(4), L.BatchNormalization(), L.Dense(2)])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    first = without_dropout()
    two_steps(first)
    checkpoints.save(tmp_path, first, 2)
    resumed = without_dropout()
    checkpoints.restore_newest(tmp_path, resumed)
    for a, b in zip(two_steps(resumed), two_steps(first)):
        np.testing.assert_array_equal(a, b)


def test_a_model_that_is_not_compiled(tmp_path):
    model = small()
    checkpoints.save(tmp_path, model, 1)
    copy = small()
    assert checkpoints.restore_newest(tmp_path, copy) == 1
    assert_same(copy, model)


def test_a_trained_model_goes_back(tmp_path, model):
    checkpoints.save(tmp_path, model, 1)
    before = [np.array(w) for w in model.get_weights()]
    other = trained()
    checkpoints.restore_newest(tmp_path, other)
    for a, b in zip(other.get_weights(), before):
        np.testing.assert_array_equal(a, b)


def test_variables_of_every_dtype(tmp_path):
    class Box(tf.Module):
        def __init__(self, values):
            self.kept = [tf.Variable(v) for v in values]

    values = [
        tf.constant([1.5, -0.0, np.nan], tf.bfloat16),
        tf.constant([[1, 2]], tf.int32),
        tf.constant(2**63 - 1, tf.int64),
        tf.constant([True, False]),
        tf.constant(0.1, tf.float64),
        tf.zeros((0, 3)),
        tf.constant(2**32 - 1, tf.uint32),
    ]
    box, copy = Box(values), Box([tf.zeros_like(v) for v in values])
    checkpoints.save(tmp_path, box, 7)
    assert checkpoints.restore_newest(tmp_path, copy) == 7
    for a, b in zip(copy.kept, values):
        assert a.dtype == b.dtype
        assert a.numpy().tobytes() == b.numpy().tobytes()


# ---- which file


def test_the_newest_is_restored_and_the_newest_few_are_kept(tmp_path):
    model = small()
    for step in (5, 900, 40, 1000, 100_000_000, 99_999_999):
        model.set_weights([np.full((1, 1), step), np.zeros(1)])
        checkpoints.save(tmp_path, model, step, keep=3)
    assert [p.name for p in checkpoints.files(tmp_path)] == [
        "step-00001000.ckpt",
        "step-99999999.ckpt",
        "step-100000000.ckpt",
    ]
    assert sorted(os.listdir(tmp_path)) == sorted(p.name for p in checkpoints.files(tmp_path))
    assert checkpoints.restore_newest(tmp_path, model) == 100_000_000
    assert model.get_weights()[0] == 100_000_000


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "step-notes.ckpt").write_text("mine")
    (tmp_path / "step-1.txt").write_text("mine")
    model = small()
    for step in range(3):
        checkpoints.save(tmp_path, model, step, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002.ckpt", "step-1.txt", "step-notes.ckpt"]
    assert checkpoints.restore_newest(tmp_path, model) == 2


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_is_kept(tmp_path, keep):
    with pytest.raises(ValueError, match=f"keep must be 1 or more, got {keep}"):
        checkpoints.save(tmp_path, small(), 1, keep=keep)


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p / "nowhere"])
def test_no_checkpoint(tmp_path, make):
    assert checkpoints.restore_newest(make(tmp_path), small()) is None


def test_the_directory_is_made(tmp_path):
    assert checkpoints.save(tmp_path / "a" / "b", small(), 1).exists()


# ---- damage


def test_a_change_of_any_byte_is_noticed_and_the_one_before_is_taken(tmp_path, caplog):
    model = small()
    checkpoints.save(tmp_path, model, 1)
    path = checkpoints.save(tmp_path, model, 2)
    whole = path.read_bytes()
    assert len(whole) < 300
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << (i % 8)
        path.write_bytes(damaged)
        assert checkpoints.restore_newest(tmp_path, model) == 1, f"byte {i}"
    path.write_bytes(whole)
    assert checkpoints.restore_newest(tmp_path, model) == 2


@pytest.mark.parametrize("length", [0, 1, 8, 39, 40, 48, -1])
def test_a_file_cut_short_is_noticed(tmp_path, length, caplog):
    model = small()
    checkpoints.save(tmp_path, model, 1)
    path = checkpoints.save(tmp_path, model, 2)
    path.write_bytes(path.read_bytes()[:length])
    with caplog.at_level(logging.WARNING, "fliqs_tf"):
        assert checkpoints.restore_newest(tmp_path, model) == 1
    assert [r.getMessage() for r in caplog.records] == [f"Checkpoint {path} is damaged; taking the one before."]


def test_nothing_whole(tmp_path):
    (tmp_path / "step-00000001.ckpt").write_bytes(b"FLIQSCK1")
    assert checkpoints.restore_newest(tmp_path, small()) is None


@pytest.mark.parametrize(
    "make",
    [lambda: compiled(width=5), lambda: compiled(optimizer="sgd"), lambda: small()],
    ids=["width", "sgd", "small"],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path, model, make):
    path = checkpoints.save(tmp_path, model, 1)
    other = make()
    before = [np.array(w) for w in other.get_weights()]
    with pytest.raises(ValueError, match=f"Checkpoint {path} is of another model, optimizer or space: it holds"):
        checkpoints.restore_newest(tmp_path, other)
    for a, b in zip(other.get_weights(), before):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    model = small()
    checkpoints.save(tmp_path, model, 1)
    checkpoints.save(tmp_path, model, 2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, step, no_space)
    for n in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(tmp_path, model, n, keep=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_place_that_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        checkpoints.save(tmp_path / "file", small(), 1)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(IS_KERAS_3, reason="of tf_keras only")
def test_optimizers_of_before(tmp_path):
    def compiled():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        model.compile(keras.optimizers.legacy.Adam(0.1), "mse")
        return model

    model, restored = compiled(), compiled()
    model.fit(np.ones((4, 3)), np.zeros((4, 2)), verbose=0)
    checkpoints.save(tmp_path, model, 1)
    assert checkpoints.restore_newest(tmp_path, restored) == 1
    for a, b in zip(model.optimizer.variables(), restored.optimizer.variables()):
        np.testing.assert_array_equal(a, b)
    assert len(restored.optimizer.variables()) == 5  # the step, and two averages of each weight


def test_vocabularies_are_not_variables(tmp_path):
    lookup = keras.layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    inputs = keras.Input((1,), dtype="string")
    model = keras.Model(inputs, keras.layers.Dense(2)(lookup(inputs)))
    checkpoints.save(tmp_path, model, 3)
    kernel = model.layers[-1].get_weights()
    model.layers[-1].set_weights([w + 1 for w in kernel])
    assert checkpoints.restore_newest(tmp_path, model) == 3
    np.testing.assert_array_equal(model.layers[-1].get_weights()[0], kernel[0])
