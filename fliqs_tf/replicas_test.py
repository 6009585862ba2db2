"""Searches under a distribution strategy: two replicas on two logical devices of the CPU (see conftest.py)."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf import replicas
from fliqs_tf._keras import IS_KERAS_3, check_strategy, keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.io import checkpoints
from fliqs_tf.layers import batch_norm

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(64, 6, 6, 1)).astype(np.float32)
LABELS = (IMAGES[:, :3].sum(axis=(1, 2, 3)) > IMAGES[:, 3:].sum(axis=(1, 2, 3))).astype(np.int64)
# Compiling the controller takes longer than running it for these few steps.
PLAIN = {"jit_compile": False, "warmup": 0.0, "frozen": 0.0, "noise_aware_start": False}
# At the end of the schedule effects count 10^4 fold, and only the target cost keeps one decision open: a float32 price
# sets its odds to 1 %. Sums in another order then show, on one processor more than on another.
ODDS = 5e-3
QUALITY = (IMAGES[48:], LABELS[48:])


@pytest.fixture(scope="module")
def strategy():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def network():
    # Without batch normalization, whose statistics are those of a replica's share.
    return keras.Sequential(
        [
            keras.layers.Input((6, 6, 1)),
            keras.layers.Conv2D(3, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(2, name="logits"),
        ]
    )


def compiled(**options):
    keras.utils.set_random_seed(1)
    qmodel = fliqs_tf.wrap(network(), ["INT4", "INT8"])
    qmodel.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **{"target_cost": "0.625x INT8", "controller": PLAIN, **options},
    )
    return qmodel


def batches(*arrays):
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread keeps an iterator from ending for seconds
    return tf.data.Dataset.from_tensor_slices(arrays).batch(16).with_options(options)


class EveryReplica(keras.callbacks.Callback):
    """Keeps what each replica holds after every step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        strategy, controller = self.model.distribute_strategy, self.model.controller
        held = [controller.logits, self.model.readout, controller.reward_moments]  # readout: reward, baseline, ...
        held += [q.range for d in self.model.decisions for q in d.quantizers if hasattr(q, "range")]
        held += [c for d in self.model.decisions for c in d.choices]
        values = [getattr(v, "_value", v) if IS_KERAS_3 else v for v in held]
        self.steps.append([[v.numpy() for v in strategy.experimental_local_results(value)] for value in values])


def searched(strategy, held_out, epochs=2, **options):
    with strategy.scope():
        qmodel = compiled(quality_every=1, quality_samples=2, **options)
    seen = EveryReplica()
    qmodel.fit(
        batches(IMAGES[:48], LABELS[:48]),
        epochs=epochs,
        verbose=0,
        callbacks=[seen],
        quality_data=batches(*QUALITY) if held_out else None,
    )
    return qmodel, seen.steps


def weights(qmodel):
    return np.concatenate([np.ravel(w) for w in qmodel.network.get_weights()])


@pytest.mark.parametrize(("held_out", "estimator"), [(True, "critic"), (False, "reinforce")])
def test_two_replicas_with_half_the_batch_end_as_one_with_all_of_it(strategy, held_out, estimator):
    controller = {**PLAIN, "estimator": estimator}
    two, steps = searched(strategy, held_out, controller=controller)
    one, alone = searched(tf.distribute.get_strategy(), held_out, controller=controller)
    assert len(steps) == len(alone) == 6
    for (logits, *step), ((expected_logits,), *expected) in zip(steps, alone):
        np.testing.assert_allclose(tf.nn.softmax(logits[0]), tf.nn.softmax(expected_logits), atol=ODDS)
        for (first, second), (whole,) in zip([logits, *step], [[logits[0]], *expected]):
            np.testing.assert_array_equal(first, second)
            # Sums in another order. One rounding that falls the other way would show as 1e-2.
            np.testing.assert_allclose(first, whole, rtol=1e-4, atol=1e-5)
    assert np.ptp(steps[-2][0][0]) > 0  # something was learned
    np.testing.assert_allclose(weights(two), weights(one), rtol=1e-4, atol=1e-5)
    assert two.recipe() == one.recipe()
    for name in ("loss", "accuracy", "switch_rate"):
        np.testing.assert_allclose(two.history.history[name], one.history.history[name], rtol=1e-4)
    deployed = two.deploy()  # outside of the strategy: a plain model
    np.testing.assert_allclose(deployed(IMAGES[:8]), one.deploy()(IMAGES[:8]), rtol=1e-3, atol=1e-4)


def worker(path):
    """What one of two processes does."""
    qmodel, steps = searched(tf.distribute.MultiWorkerMirroredStrategy(), True)
    logs = qmodel.history.history
    results = {"weights": weights(qmodel), "logits": [step[0][0] for step in steps]}
    strategy = qmodel.distribute_strategy
    workers = replicas.Workers(strategy)
    with strategy.scope():
        saved, restored = (normalized(seed) for seed in (1, 2))
    # The other one sees no file.
    directory = f"{path}.checkpoints"
    checkpoints.save(directory, saved, 7, write=workers.is_first)
    step = checkpoints.restore_newest(directory, restored, workers)
    results |= {"saved": np.concatenate([np.ravel(w) for w in saved.get_weights()]), "step": step}
    results |= {"restored": np.concatenate([np.ravel(w) for w in restored.get_weights()])}
    np.savez(path, cost=logs["cost"], loss=logs["loss"], **results)


def normalized(seed):
    """A network with statistics that each worker keeps for itself."""
    rng = np.random.default_rng(seed)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    model.set_weights([rng.uniform(1, 2, w.shape) for w in model.get_weights()])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    return model


@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 does not train under MultiWorkerMirroredStrategy")
def test_two_processes_end_as_one(tmp_path):
    with socket.socket() as one, socket.socket() as two:
        for s in (one, two):
            s.bind(("localhost", 0))
        hosts = [f"localhost:{s.getsockname()[1]}" for s in (one, two)]
    processes = []
    for i in range(2):
        config = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": i}}
        code = f"from fliqs_tf import replicas_test; replicas_test.worker({str(tmp_path / f'{i}.npz')!r})"
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=pathlib.Path(__file__).parents[1],
                env={**os.environ, "TF_CONFIG": json.dumps(config)},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    one, steps = searched(tf.distribute.get_strategy(), True)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert first["step"] == 7 and len(first["saved"]) == 27
    np.testing.assert_array_equal(first["restored"], first["saved"])
    for logits, (expected, *_) in zip(first["logits"], steps, strict=True):
        np.testing.assert_allclose(tf.nn.softmax(logits), tf.nn.softmax(expected[0]), atol=ODDS)
    np.testing.assert_allclose(first["weights"], weights(one), rtol=1e-4, atol=1e-5)
    logs = one.history.history
    np.testing.assert_allclose(first["loss"], logs["loss"], rtol=1e-4)
    np.testing.assert_allclose(first["cost"], logs["cost"], rtol=1e-2)


def test_replicas_with_samples_of_their_own(strategy):
    qmodel, steps = searched(strategy, True, sample_per_replica=True)
    for step in steps:
        for first, second in step:
            np.testing.assert_array_equal(first, second)

    def draws():
        draw = tf.function(lambda: strategy.run(lambda: qmodel.draw_for_reading(3)))
        return [sample.numpy().tolist() for sample in strategy.experimental_local_results(draw())]

    qmodel.controller.logits.assign(tf.zeros((2, 2)))
    first, second = draws()
    assert first != second
    assert first == qmodel.draw_for_reading(3).numpy().tolist()
    qmodel.compile(loss="mse", target_cost="0.625x INT8", quality_samples=2)
    first, second = draws()
    assert first == second
    # Readings on each of 2 shares of the batch, after 5 of the 6 steps: the decision was taken at the last.
    updates = qmodel.controller._state[fliqs_tf.search.critic.State._fields.index("updates")]
    assert float(tf.convert_to_tensor(updates)) == 10


def test_pooled_policy_gradient_is_that_of_all_samples(strategy):
    samples = np.array([[[0, 1, 1], [1, 0, 1]], [[1, 1, 0], [0, 0, 0]]], np.int32)
    quality = np.array([[-0.3, -0.5], [-0.2, -0.9]], np.float32)

    def controller():
        made = fliqs_tf.Controller([2, 2, 2], estimator="reinforce", jit_compile=False, warmup=0.0)
        price = np.array([[4.0, 8.0]] * 3, np.float32)
        made.configure(
            expected_cost=lambda p: tf.reduce_sum(p * price), cost=None, target=15.0, reward="absolute", total_steps=9
        )
        made.advance()
        return made

    with strategy.scope():
        two = controller()

    @tf.function
    def step():
        return strategy.run(
            lambda: two.update(
                tf.gather(samples, replicas.index()), tf.gather(quality, replicas.index()), per_replica=True
            )["reward"]
        )

    reward = strategy.experimental_local_results(step())
    one = controller()
    expected = one.update(samples.reshape(4, 3), quality.reshape(4))["reward"]
    # Costs 20, 20, 20 and 12 at a target of 15.
    np.testing.assert_allclose(expected, (quality.sum() - 3 * 5 / 15 - 3 / 15) / 4, rtol=1e-6)
    np.testing.assert_array_equal(reward, [expected, expected])
    logits = tf.convert_to_tensor(two.logits)
    assert np.ptp(logits) > 0.01
    np.testing.assert_allclose(logits, tf.convert_to_tensor(one.logits), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"synchronized": True}], ids=str)
def test_averages_are_those_of_all_replicas_by_hand(strategy, options):
    """Of -1 and 3 here, 1 there, and then 5 and 7: mean 3, variance (16 + 0 + 4 + 4 + 16) / 5."""
    with strategy.scope():
        model = keras.Sequential([keras.layers.Input((1,)), keras.layers.BatchNormalization(**options)])
        model.compile()
    batches = [np.array(batch, np.float32)[:, None] for batch in ([-1, 1, 3], [5, 7])]
    assert batch_norm.recalibrate(ModelGraph(model), batches) == 2
    mean, variance = model.get_weights()[2:]
    assert (float(mean[0]), float(variance[0])) == pytest.approx((3, 8))


def test_what_replicas_tell_each_other(strategy):
    values = np.array([[1.0, -np.inf, 3.0], [2.0, -7.0, -np.inf]], np.float32)

    @tf.function
    def exchange():
        def step():
            own = tf.gather(values, replicas.index())
            return replicas.gathered(own), replicas.maximum(own), replicas.of_first(own), replicas.mean(own[0])

        return strategy.run(step)

    for local in zip(*(strategy.experimental_local_results(v) for v in exchange())):
        for found, expected in zip(local, (values, [2.0, -7.0, 3.0], values[0], 1.5)):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(replicas.gathered(tf.constant([1.0])), [[1.0]])
    workers = replicas.Workers(strategy)  # one process
    np.testing.assert_array_equal(workers.first(np.array([3, 0])), [3, 0])
    assert workers.any(True, False) == [True, False]


def test_the_whole_step_compiles_once(monkeypatch):
    traces = []
    original = fliqs_tf.SearchModel.train_step
    monkeypatch.setattr(fliqs_tf.SearchModel, "train_step", lambda self, data: traces.append(1) or original(self, data))
    qmodel = compiled(jit_compile=True, controller={"warmup": 0.0}, steps_per_execution=2)
    data = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(16, drop_remainder=True)
    logs = qmodel.fit(data, epochs=2, verbose=0).history
    first = len(traces)
    before = np.array(tf.convert_to_tensor(qmodel.controller.step))
    logs = qmodel.fit(data, epochs=4, verbose=0).history
    assert len(traces) == first <= 2 and before == 8
    assert np.isfinite(logs["loss"]).all() and np.isfinite(logs["reward"]).all()


def test_keras_3_names_the_way_out_for_other_strategies():
    class TPUStrategyV2:
        """Stands for TPUStrategy, which cannot be made without a TPU."""

    if not IS_KERAS_3:
        check_strategy(TPUStrategyV2())
        return
    with pytest.raises(ValueError, match="TPUStrategyV2 does not work with Keras 3.*Set TF_USE_LEGACY_KERAS=1 before"):
        check_strategy(TPUStrategyV2())
