"""Keras callbacks for a search: what it did, as TensorBoard events and as lines of JSON, and its checkpoints."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from fliqs_tf import replicas
from fliqs_tf._keras import keras
from fliqs_tf.io import checkpoints
from fliqs_tf.io.files import local

_LOG = logging.getLogger("fliqs_tf")


class SearchLog(keras.callbacks.Callback):
    """Writes the course of a search.

    Every `every` steps a line of `metrics.jsonl`: step, loss, metrics, reward, baseline, quality, expected_cost,
    target_cost, entropy, beta_h, switch_rate, and probabilities {decision: [one per option]}. The same goes to
    TensorBoard, if that is installed, probabilities as scalars `probabilities/<decision>/<format>`. Validation
    metrics make a line of their own at the end of an epoch.

    Args:
      directory: Where `metrics.jsonl` and the event files go.
      every: Steps between two lines. None: a 200th of the search.
    """

    def __init__(self, directory: str | os.PathLike, every: int | None = None):
        super().__init__()
        self.directory, self.every = local(directory), every
        self.writer: tf.summary.SummaryWriter | None = None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.file = open(self.directory / "metrics.jsonl", "a")  # noqa: SIM115 - until on_train_end
        if importlib.util.find_spec("tensorboard"):
            self.writer = tf.summary.create_file_writer(str(self.directory / "events"))
        else:
            _LOG.warning("No TensorBoard events: pip install tensorboard. metrics.jsonl has the same figures.")
        self.begun, self.step = False, 0
        total = int(tf.convert_to_tensor(self.model.controller.total_steps))
        self.interval = self.every or max(1, total // 200)
        self.start = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.last_batch = -1
        if not self.begun:  # now, and not before: a callback may have restored a run that was interrupted
            self.begun = True
            self.step = int(tf.convert_to_tensor(self.model.controller.step))
            self._write(self.step, {})

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        before, self.step = self.step, self.step + batch - self.last_batch
        self.last_batch = batch
        if self.step // self.interval > before // self.interval:
            self._write(self.step, logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        validation = {k: float(v) for k, v in (logs or {}).items() if k.startswith("val_")}
        if validation:
            self._line({"step": self.step, "epoch": epoch + 1, **validation})
            self._scalars(self.step, validation)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        if self.begun:
            self._write(self.step, {})
        self.file.close()
        if self.writer:
            self.writer.close()

    def _write(self, step: int, logs: Mapping[str, float]) -> None:
        model = self.model
        probabilities = np.asarray(model.controller.probabilities(), np.float64)
        reward, baseline, quality, beta = (float(v) for v in np.array(tf.convert_to_tensor(model.readout)))
        values = {
            **{k: float(v) for k, v in logs.items() if k not in ("reward", "cost", "entropy")},
            # Before the first reading there is nothing to say of these.
            **({"reward": reward, "baseline": baseline, "quality": quality} if reward or baseline else {}),
            "beta_h": beta,
            "expected_cost": float(model.cost_table.expected(tf.constant(probabilities, tf.float32))),
            "target_cost": model.target_cost,
            "entropy": float(model.controller.entropy()),
        }
        rows = {d.name: probabilities[i, : len(d.options)].tolist() for i, d in enumerate(model.decisions)}
        self._line(
            {
                "step": step,
                "seconds": round(time.monotonic() - self.start, 3),
                **values,
                "probabilities": {name: [round(p, 5) for p in row] for name, row in rows.items()},
            }
        )
        probability = {
            f"probabilities/{d.name}/{option}": p for d in model.decisions for option, p in zip(d.options, rows[d.name])
        }
        self._scalars(step, values | probability)

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer:
            with self.writer.as_default(step=step):
                for name, value in values.items():
                    tf.summary.scalar(name, value)

    def _line(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


class Preempted(Exception):
    """The process was asked to go away; a checkpoint of `step` has been written."""

    def __init__(self, step: int):
        super().__init__(f"Stopped on request at step {step}, with a checkpoint of it.")
        self.step = step


# Several workers must save at the same step. They agree on it as often as this, by a few bytes.
_AGREE_EVERY = 16


class SearchCheckpoint(keras.callbacks.Callback):
    """Saves the whole state of a search, or of any training, every few steps or minutes, see `checkpoints.save`.

    A state that is not finite is not saved: it would push out good ones.

    Args:
      directory: Where the files go.
      every_steps: Steps between two checkpoints. None: no such limit.
      keep: How many stay.
      every_minutes: Minutes between two. None: no such limit.
      preempted: Whether the process should go away; when it says so, a checkpoint is written and `Preempted` raised.
      write: False for the workers of a strategy that do not write. All of them need this callback.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        every_steps: int | None,
        keep: int = 3,
        *,
        every_minutes: float | None = None,
        preempted: Callable[[], bool] = lambda: False,
        write: bool = True,
    ):
        super().__init__()
        if (every_steps is not None and every_steps < 1) or keep < 1:
            raise ValueError(f"every_steps and keep must be 1 or more, got {every_steps} and {keep}.")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"every_minutes must be above 0, got {every_minutes}.")
        self.directory, self.every_steps, self.keep = local(directory), every_steps, keep
        self.every_minutes, self.preempted, self.write = every_minutes, preempted, write

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self.begun, self.step = False, 0
        self.workers = replicas.Workers(self.model.distribute_strategy)
        self.saved_at = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.last_batch = -1
        if not self.begun:  # now, and not before: a callback may have restored a run that was interrupted
            self.begun = True
            controller = getattr(self.model, "controller", None)
            done = self.model.optimizer.iterations if controller is None else controller.step
            self.step = self.saved = int(tf.convert_to_tensor(done))

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        before, self.step = self.step, self.step + batch - self.last_batch
        self.last_batch = batch
        overdue, leave = False, False
        if not self.workers.several or self.step // _AGREE_EVERY > before // _AGREE_EVERY:
            minutes = (time.monotonic() - self.saved_at) / 60
            late = self.write and self.every_minutes is not None and minutes >= self.every_minutes
            overdue, leave = self.workers.any(late, self.preempted())
        due = self.every_steps is not None and self.step // self.every_steps > before // self.every_steps
        if due or overdue or leave:
            self._save()
        if leave:
            raise Preempted(self.step)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        if self.begun and self.step > self.saved:
            self._save()

    def _save(self) -> None:
        finite = (np.isfinite(np.array(tf.convert_to_tensor(v))).all() for v in self.model.trainable_variables)
        bad_step = getattr(self.model, "bad_step", -1)
        if int(tf.convert_to_tensor(bad_step)) >= 0 or not all(finite):
            return
        checkpoints.save(self.directory, self.model, self.step, keep=self.keep, write=self.write)
        self.saved, self.saved_at = self.step, time.monotonic()
