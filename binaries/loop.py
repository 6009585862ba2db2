"""The training loop of search.py and train.py: from the newest checkpoint to the end, whatever happens in between."""

from __future__ import annotations

import itertools
import os
import pathlib
import sys
from collections.abc import Callable

from absl import flags

import fliqs_tf
from binaries import data as datasets
from binaries import devices, settings, tables
from binaries.preemption import STATUS, Preemption
from binaries.run_dir import RunDir
from fliqs_tf import replicas
from fliqs_tf.io import checkpoints

FLAGS = flags.FLAGS


def start(argv: list[str]) -> tuple:
    """What a training program does first.

    Args:
      argv: What is left of the command line: its name.

    Returns:
      (preemption, strategy, data, steps per epoch).

    Raises:
      SystemExit: Words beside the flags, a strategy or data that cannot be had, batches larger than the data.
    """
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}; flags start with --. See --help.")
    preemption = Preemption()
    strategy = devices.strategy()
    settings.set_up_process()
    data = settings.load_data()
    devices.check_batch_size(strategy, FLAGS.batch_size)
    examples = data.examples("train")
    if FLAGS.batch_size > examples:
        sys.exit(f"--batch_size={FLAGS.batch_size} exceeds the {examples} training examples.")
    return preemption, strategy, data, examples // FLAGS.batch_size


def batches(strategy, data, begin: int, end: int):
    """Training batches of steps `begin` .. `end - 1`, shared by the replicas of a strategy."""
    return devices.distributed(
        strategy,
        lambda share: datasets.train_batches(
            data, batch_size=FLAGS.batch_size, seed=FLAGS.seed, start_step=begin, total_steps=end, share=share
        ),
    )


def train(
    model,
    data,
    run: RunDir | None,
    directory: pathlib.Path,
    preemption: Preemption,
    steps_per_epoch: int,
    total: int,
    callbacks: list,
    options: Callable[[int], dict] = lambda begin: {},
) -> int:
    """Fits to the end.

    Args:
      model: Compiled, in the scope of its strategy.
      data: See `binaries.data`.
      run: The run directory, None on the workers that do not write.
      directory: Of the checkpoints.
      preemption: Says whether the process should go away.
      steps_per_epoch, total: Length of the run.
      callbacks: Besides those for checkpoints and progress.
      options: The first step of a `fit` -> more arguments of it.

    Returns:
      The step at which it began: 0, or that of the checkpoint.

    Raises:
      SystemExit: The loss is not finite, or the checkpoint is of another model. A process that is asked to go away ends
        at once, with `preemption.STATUS`.
    """
    start = _restored(model, run, directory, total) if FLAGS.resume else 0
    checkpoint = fliqs_tf.SearchCheckpoint(
        directory,
        FLAGS.checkpoint_every_steps,
        FLAGS.keep_checkpoints,
        every_minutes=FLAGS.checkpoint_every_minutes,
        preempted=preemption,
        write=run is not None,
    )
    callbacks = [checkpoint, *callbacks, *([] if run is None else [tables.ProgressBar(total, start)])]
    preemption.training()
    # The first epoch may be one that the run before left half done.
    boundaries = [start, -(-start // steps_per_epoch) * steps_per_epoch, total]
    for begin, end in itertools.pairwise(boundaries):
        if begin == end:
            continue
        epoch, steps = begin // steps_per_epoch, min(steps_per_epoch, end - begin)
        try:
            model.fit(
                batches(model.distribute_strategy, data, begin, end),
                epochs=epoch + (end - begin) // steps,
                initial_epoch=epoch,
                steps_per_epoch=steps,
                callbacks=callbacks,
                shuffle=False,
                verbose=0,
                **options(begin),
            )
        except FloatingPointError as error:
            sys.exit(f"{error}\nThe last good checkpoint is in {directory}.")
        except fliqs_tf.Preempted as stop:
            print(f"{stop} Go on by --resume.", flush=True)
            # At once: the machine is about to go, and other workers may be gone.
            os._exit(STATUS)
    preemption.done()
    return start


def _restored(model, run: RunDir | None, directory: pathlib.Path, total: int) -> int:
    """Restores the newest checkpoint, and returns its step, 0 without one. The workers have theirs from the first."""
    workers = replicas.Workers(model.distribute_strategy)
    try:
        start = checkpoints.restore_newest(directory, model, workers) or 0
    except ValueError as error:
        sys.exit(str(error))
    if start > total:
        sys.exit(
            f"--epochs={FLAGS.epochs} are {total} steps, and the run in {directory.parent} has done {start}. Give it "
            f"more epochs, or start another run: by --overwrite, or in another --run_dir."
        )
    if run is not None:
        run.keep_metrics_until(start)
        print(f"Going on from step {start} of {total}.", flush=True)
    return start
