"""What export.py and search.py do with a trained model: write a file, compare it, say how it went."""

from __future__ import annotations

import pathlib

import numpy as np

import fliqs_tf
from binaries import data as datasets
from fliqs_tf._keras import keras
from fliqs_tf.export.agreement import check_all

REPRESENTATIVE_BATCHES = 8


def tflite(
    final: keras.Model,
    path: pathlib.Path,
    data: datasets.Data | datasets.text.Text,
    *,
    seed: int = 0,
    int4: bool = True,
    tolerance: float = 1,
    top1: float = 0.995,
) -> list[str]:
    """Writes a `.tflite` file and prints how it compares with the Keras model on the test split.

    Args:
      final: A deployed model.
      path: The file to write.
      data: What `settings.load_data` returned.
      seed: Seed of the training batches that missing ranges are taken from.
      int4: See `fliqs_tf.export.tflite`.
      tolerance: How many output steps 99.9 % of the values may be off the Keras model that the file stands for.
      top1: Least share of examples with the same guess. Both limits are for LiteRT's default kernels.

    Returns:
      A sentence for each limit that is exceeded; [] if none is.

    Raises:
      ValueError, ImportError, OSError: As `fliqs_tf.export.tflite`.
    """
    batches = datasets.train_batches(
        data, batch_size=64, seed=seed, start_step=0, total_steps=REPRESENTATIVE_BATCHES, augment=False
    )
    shipped = fliqs_tf.export.tflite(final, path, [x for x, _ in batches], int4=int4)
    test = list(datasets.eval_batches(data, "test", 250))
    exact, trained = check_all([shipped, final], path, test)
    print(f"TFLite: {path}, {path.stat().st_size:,} bytes. Against the Keras model with the file's int8 tensors:")
    for agreement in exact:
        print(f"  {agreement}")
    if [a.equal for a in exact] != [a.equal for a in trained]:
        print("Against the Keras model as it was trained (target='tflite' trains for these tensors):")
        for agreement in trained:
            print(f"  {agreement}")
    return [str(a) for a in exact if a.kernels == "XNNPACK" and not a.within(tolerance, top1)]


def packed(final: keras.Model, path: pathlib.Path, data: datasets.Data | datasets.text.Text) -> list[str]:
    """Writes a packed file, and compares the restored model with the model on the test split, to the bit.

    Args:
      final, path, data: As for `tflite`.

    Returns:
      A sentence if outputs differ; else [].

    Raises:
      ValueError, ImportError, OSError: As `fliqs_tf.export.packed`.
    """
    fliqs_tf.export.packed(final, path)
    again = fliqs_tf.export.load_packed(path)
    test = list(datasets.eval_batches(data, "test", 250))
    equal = all(np.array_equal(final(x, training=False), again(x, training=False)) for x, _ in test)
    print(
        f"Packed: {path}, {path.stat().st_size:,} bytes; {fliqs_tf.costs.memory(final) * 2**20:,.0f} of them weights."
    )
    print(f"The restored model gives {'the same outputs, to the bit.' if equal else 'different outputs.'}")
    return [] if equal else ["The restored model gives different outputs."]


def onnx(
    final: keras.Model, path: pathlib.Path, data: datasets.Data | datasets.text.Text, *, top1: float = 0.995
) -> list[str]:
    """Writes an ONNX file, and compares onnxruntime's outputs with the model's on the test split.

    Args:
      final, path, data: As for `tflite`.
      top1: Least share of examples with the same guess.

    Returns:
      A sentence if fewer agree, or if onnxruntime cannot run the file; else [].

    Raises:
      ValueError, ImportError, OSError: As `fliqs_tf.export.onnx`; ImportError also without onnxruntime.
    """
    fliqs_tf.export.onnx(final, path)
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("Running ONNX files needs onnxruntime: pip install 'fliqs-tf[onnx]'.") from error
    print(f"ONNX: {path}, {path.stat().st_size:,} bytes.")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no class of their own
        reason = " ".join(str(error).split())[:200]
        return [f"onnxruntime {onnxruntime.__version__} does not run the file on a CPU: {reason}"]
    test = list(datasets.eval_batches(data, "test", 250))
    name = session.get_inputs()[0].name
    expected = np.concatenate([np.asarray(final(x, training=False)) for x, _ in test])
    found = np.concatenate([session.run(None, {name: np.asarray(x)})[0] for x, _ in test])
    labels = np.concatenate([np.asarray(y) for _, y in test]).ravel()
    guesses, theirs = expected.argmax(axis=-1), found.argmax(axis=-1)
    agreement = float((guesses == theirs).mean())
    off = float(np.abs(found - expected).max() / np.abs(expected).max())
    line = (
        f"outputs at most {100 * off:.3g} % of the largest apart, top-1 agreement {100 * agreement:.2f} %, accuracy "
        f"{100 * (theirs == labels).mean():.2f} % (Keras {100 * (guesses == labels).mean():.2f} %), "
        f"{len(labels)} examples"
    )
    print(f"  onnxruntime {onnxruntime.__version__}: {line}")
    return [] if agreement >= top1 else [line]


def has_integer_kernels(recipe: fliqs_tf.Recipe) -> bool:
    """True if TFLite runs every format of a recipe, at least one of them by integer kernels."""
    formats = [fliqs_tf.Format(name) for name in recipe.formats.values()]
    integer = [fmt.is_integer and fmt.bits <= 8 for fmt in formats]
    return any(integer) and all(ok or not fmt.is_scaled for ok, fmt in zip(integer, formats))
