"""When a search saves its state, and when it does not."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.io import checkpoints, files
from fliqs_tf.reporting import callbacks

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
Y = np.arange(40) % 2


def fit(callback, optimizer="sgd", epochs=1):
    """10 steps an epoch."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2, name="logits")])
    qmodel = fliqs_tf.wrap(model, ["INT4", "INT8"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    controller = {"estimator": "reinforce", "jit_compile": False}
    qmodel.compile(optimizer, loss, target_cost="1x INT8", controller=controller)
    qmodel.fit(X, Y, batch_size=4, epochs=epochs, verbose=0, shuffle=False, callbacks=[callback])
    return qmodel


def saved(path):
    return [int(p.name[5:13]) for p in checkpoints.files(path)]


def test_every_few_steps_and_at_the_end(tmp_path):
    fit(fliqs_tf.SearchCheckpoint(tmp_path, 4, keep=2), epochs=1)
    assert saved(tmp_path) == [8, 10]


def test_every_few_minutes(tmp_path, monkeypatch):
    seconds = iter(range(0, 10_000, 25))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(seconds))
    # One look at the clock per step, one more at the start and after saving: 25 s, 50 s, 75 s.
    fit(fliqs_tf.SearchCheckpoint(tmp_path, None, keep=9, every_minutes=1))
    assert saved(tmp_path) == [3, 6, 9, 10]


def test_asked_to_go_away_it_saves_and_stops(tmp_path):
    steps = iter([False, False, True])
    with pytest.raises(fliqs_tf.Preempted, match="Stopped on request at step 3, with a checkpoint of it") as stop:
        fit(fliqs_tf.SearchCheckpoint(tmp_path, None, preempted=lambda: next(steps)))
    assert stop.value.step == 3 and saved(tmp_path) == [3]


def test_a_worker_that_does_not_write(tmp_path):
    fit(fliqs_tf.SearchCheckpoint(tmp_path, 4, write=False))
    assert saved(tmp_path) == []


def test_gradients_that_are_not_finite_reach_no_checkpoint(tmp_path):
    optimizer = keras.optimizers.SGD(0.1)
    apply = optimizer.apply_gradients

    def spoiled(pairs, **kwargs):
        bad = tf.equal(tf.cast(tf.convert_to_tensor(optimizer.iterations), tf.int32), 5)
        return apply([(g + tf.where(bad, np.nan, 0.0), v) for g, v in pairs], **kwargs)

    optimizer.apply_gradients = spoiled
    # Step 5 has a finite loss and leaves NaN in the weights; step 6 is the first to see it.
    with pytest.raises(FloatingPointError, match=r"not finite at step 6\."):
        fit(fliqs_tf.SearchCheckpoint(tmp_path, 2, keep=9), optimizer)
    assert saved(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "every_steps and keep must be 1 or more, got 0 and 3"),
        ({"every_steps": 1, "keep": 0}, "got 1 and 0"),
        ({"every_steps": None, "every_minutes": 0}, "every_minutes must be above 0, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        fliqs_tf.SearchCheckpoint("somewhere", **options)


@pytest.mark.parametrize(
    "place",
    [
        fliqs_tf.SearchLog,
        lambda path: fliqs_tf.SearchCheckpoint(path, 5),
        lambda path: checkpoints.save(path, keras.Sequential(), 1),
        lambda path: files.write_text(f"{path}/recipe.json", "{}"),
    ],
    ids=["log", "checkpoint", "save", "file"],
)
def test_an_address_is_refused_and_no_folder_made(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'gs://bucket/run.*' is an address, not a path on this machine: give a local"):
        place("gs://bucket/run")
    assert not list(tmp_path.iterdir())
