"""Data sets that TensorFlow Datasets has prepared."""

from __future__ import annotations

import os


def builder(name: str, data_dir: str | None, how: str):
    """Opens a prepared data set.

    Args:
      name: Of TensorFlow Datasets.
      data_dir: Where it keeps the data: a directory or a gs:// address; None: its default.
      how: Sentences that say how to prepare this one.

    Returns:
      A `tfds.core.DatasetBuilder`.

    Raises:
      ImportError: TensorFlow Datasets is missing.
      FileNotFoundError: The data set is not there; says how to prepare it.
    """
    try:
        # Here and not above: it takes seconds, and digits do without it.
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{name} is read by TensorFlow Datasets, which cannot be imported ({error}). "
            "Run `pip install tensorflow-datasets importlib_resources`."
        ) from error
    found = tfds.builder(name, data_dir=None if data_dir is None else os.path.expanduser(data_dir))
    if not found.is_prepared():
        raise FileNotFoundError(f"{name} is not prepared in {found.data_dir}. {how}")
    return found
