"""What export.py and search.py do with a trained model: write a file, compare it, say how it went."""

from __future__ import annotations

import pathlib

import fliqs_tf
from binaries import data as datasets

REPRESENTATIVE_BATCHES = 8


def tflite(
    final, path: pathlib.Path, data, *, seed: int = 0, int4: bool = True, tolerance: float = 1, top1: float = 0.995
):
    """Writes a `.tflite` file and prints how it compares with the Keras model on the test split.

    Args:
      final: A deployed model.
      path: The file to write.
      data: What `settings.load_data` gave.
      seed: Of the training batches that missing ranges are taken from.
      int4: See `fliqs_tf.export.tflite`.
      tolerance: Most output steps that a value may be off the Keras model that the file stands for.
      top1: Least share of examples with the same guess. Both in LiteRT's default kernels.

    Returns:
      Sentences that say what is beyond the tolerance; [] if nothing is.
    """
    batches = datasets.train_batches(
        data, batch_size=64, seed=seed, start_step=0, total_steps=REPRESENTATIVE_BATCHES, augment=False
    )
    shipped = fliqs_tf.export.tflite(final, path, [x for x, _ in batches], int4=int4)
    test = list(datasets.eval_batches(data, "test", 250))
    exact = fliqs_tf.export.check(shipped, path, test)
    trained = fliqs_tf.export.check(final, path, test)
    print(f"TFLite: {path}, {path.stat().st_size:,} bytes. Against the Keras model with the file's int8 tensors:")
    for agreement in exact:
        print(f"  {agreement}")
    if [a.equal for a in exact] != [a.equal for a in trained]:
        print("Against the Keras model as it was trained (target='tflite' trains for these tensors):")
        for agreement in trained:
            print(f"  {agreement}")
    return [str(a) for a in exact if a.kernels == "XNNPACK" and not a.within(tolerance, top1)]


def has_integer_kernels(recipe: fliqs_tf.Recipe) -> bool:
    """True if a recipe has nothing but formats that TFLite computes with, and integers among them."""
    formats = [fliqs_tf.Format(name) for name in recipe.formats.values()]
    integer = [fmt.is_integer and fmt.bits <= 8 for fmt in formats]
    return any(integer) and all(ok or not fmt.is_scaled for ok, fmt in zip(integer, formats))
