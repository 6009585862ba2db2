"""The search that `faults` disturbs: search.py with a small network, and a fault in it.

Forked by `faults`, or a process of its own: python -m binaries.tools.fault_worker none 0 --run_dir=runs/small
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

STEPS = 60  # 20 an epoch
# Moments of a checkpoint write.
MOMENTS = ("first_half", "written", "synced", "renamed")
_FLAGS = ["--epochs=3", "--deterministic", "--learning_rate=0.05", "--checkpoint_every_steps=5", "--quality_every=4"]


def run(fault: str, at: int, flags: list[str]) -> None:
    """Runs search.py in this process.

    Args:
      fault: "none", "data", "gradient", or one of `MOMENTS` to be killed at.
      at: Step, or number of the checkpoint write.
      flags: Of search.py; --run_dir at least.
    """
    from absl import app

    from binaries import search

    search.settings.build_network = _small_network
    # Only the search is of interest.
    search._uniform_formats = lambda model: []
    search.settings.test_scores = lambda model, data: {"accuracy": 0.0}
    search.exporting.has_integer_kernels = lambda recipe: False
    search.report.write_report = lambda path: None
    make = search.fliqs_tf.SearchModel._new_controller
    # Compiling it takes longer than the run.
    search.fliqs_tf.SearchModel._new_controller = lambda self, options: make(self, {**options, "jit_compile": False})
    if fault in MOMENTS:
        _kill_at_write(fault, at)
    elif fault == "data":
        _spoil_data(at)
    elif fault == "gradient":
        _spoil_gradient(at)
    app.run(search.main, argv=["search.py", *_FLAGS, *flags])


def _small_network(data):
    from fliqs_tf._keras import keras

    layers = [
        keras.layers.Input(data.input_shape),
        keras.layers.Conv2D(4, 3, strides=2, name="conv"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.1, seed=1),
        keras.layers.Dense(data.classes, name="predictions"),
    ]
    return keras.Sequential(layers, name="small")


def _kill_at_write(moment: str, number: int) -> None:
    from fliqs_tf.io import checkpoints

    writes = dict.fromkeys(MOMENTS, 0)

    def passes(name):
        writes[name] += 1
        if (name, writes[name]) == (moment, number):
            os.kill(os.getpid(), signal.SIGKILL)

    class Slowly:
        """A file that is killed half-way through its lines."""

        def __init__(self, file):
            self.file = file

        def writelines(self, chunks):
            content = b"".join(chunks)
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            passes("first_half")
            self.file.write(content[len(content) // 2 :])
            self.file.flush()
            passes("written")

        def __getattr__(self, name):
            return getattr(self.file, name)

    @contextlib.contextmanager
    def slowly(path, mode):
        with open(path, mode) as file:
            yield Slowly(file)

    class Os:
        def __getattr__(self, name):
            return getattr(os, name)

        def fsync(self, file):
            os.fsync(file)
            passes("synced")

        def replace(self, old, new):
            os.replace(old, new)
            passes("renamed")

    checkpoints.open, checkpoints.os = slowly, Os()


def _spoil_data(step: int) -> None:
    import tensorflow as tf

    from binaries import data

    whole = data.train_batches

    def spoiled(*args, start_step, **kwargs):
        def check(index, batch):
            with tf.control_dependencies([tf.debugging.assert_less(index, tf.constant(step, tf.int64), "bad record")]):
                return tf.nest.map_structure(tf.identity, batch)

        batches = whole(*args, start_step=start_step, **kwargs)
        return batches.enumerate(start_step).map(check) if start_step or kwargs["total_steps"] == STEPS else batches

    data.train_batches = spoiled


def _spoil_gradient(step: int) -> None:
    """What a NaN gradient does: after the step all weights are NaN, though its loss was finite.

    The gradient itself is left alone. To add to it changes the graph, and with it the last bits of the steps before.
    """
    from fliqs_tf.reporting import callbacks

    after_step = callbacks.SearchCheckpoint.on_train_batch_end

    def spoiled(self, batch, logs=None):
        if self.step + batch - self.last_batch == step + 1:
            for variable in self.model.trainable_variables:
                variable.assign(variable * float("nan"))
        after_step(self, batch, logs)

    callbacks.SearchCheckpoint.on_train_batch_end = spoiled


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
