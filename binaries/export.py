"""Exports a trained run to a file that runs elsewhere, and compares it with the Keras model on the test split.

    python binaries/export.py --run_dir=runs/digits_resnet8_search --format=tflite
    python binaries/export.py --run_dir=runs/digits_resnet8_search --format=onnx --plan    # only says what runs

Writes --output: by default model.tflite, model.onnx or model.safetensors in the run directory. Prints its size in bytes
and how closely it agrees with the model. With --plan it writes nothing and prints a row per layer.

Exit status: 0; 1 for wrong flags or files, if the file differs from the model by more than --tolerance and --top1
allow, or if --plan finds a layer that the format cannot hold.
"""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

import fliqs_tf
from binaries import exporting, settings

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "Run of search.py or train.py: its model.keras is exported, its data compared on.")
flags.DEFINE_enum("format", "tflite", ["tflite", "onnx", "packed"], "What to write.")
flags.DEFINE_bool("plan", False, "Write nothing; print what --format does with every layer.")
flags.DEFINE_string("output", None, "The file. Default: model.tflite, model.onnx or model.safetensors in --run_dir.")
flags.DEFINE_float("tolerance", 1, "tflite: how many output steps 99.9 % of the values may be off.", lower_bound=0)
flags.DEFINE_float("top1", 0.995, "tflite, onnx: least share of examples with the same guess.", 0, 1)
flags.DEFINE_bool(
    "int4", True, "tflite: int4 convolutions: half the size, slower. --noint4: as int8, exact and faster."
)

_SUFFIX = {"tflite": "tflite", "onnx": "onnx", "packed": "safetensors"}


def main(argv: list[str]) -> None:
    """Exports as the flags say. Args: what is left of the command line, the program's name alone.

    Raises:
      SystemExit: See the module.
    """
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}; flags start with --. See --help.")
    if not FLAGS.run_dir:
        sys.exit("Give --run_dir, the directory of a run of search.py or train.py.")
    run = pathlib.Path(FLAGS.run_dir)
    final = settings.load_run(run)
    if FLAGS.plan:
        plan = fliqs_tf.export.plan(final, FLAGS.format)
        print(plan)
        sys.exit(1 if plan.unsupported else 0)
    data = settings.load_data()
    path = pathlib.Path(FLAGS.output or run / f"model.{_SUFFIX[FLAGS.format]}")
    try:
        if FLAGS.format == "packed":
            problems = exporting.packed(final, path, data)
        elif FLAGS.format == "onnx":
            problems = exporting.onnx(final, path, data, top1=FLAGS.top1)
        else:
            problems = exporting.tflite(
                final,
                path,
                data,
                seed=FLAGS.seed,
                int4=FLAGS.int4,
                tolerance=FLAGS.tolerance,
                top1=FLAGS.top1,
            )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))
    if problems:
        sys.exit("The file is beyond the tolerance:\n" + "\n".join(problems))


if __name__ == "__main__":
    app.run(main)
