"""Latency, size and accuracy in LiteRT: float32, uniform INT8 (TFMOT's way and ours), uniform INT4, searched models.

    python binaries/tools/benchmark_export.py --runs=runs/float,runs/INT8,runs/INT4,runs/search
    python binaries/tools/benchmark_export.py --mobilenet       # MobileNetV2, 224 x 224, random weights: no accuracy

A run directory is one of search.py or train.py. A float run gives the float32 file and two INT8 files made without
more training, ranges being those of a few training batches: ours and, under TF_USE_LEGACY_KERAS=1, that of TFMOT's
quantize_apply and the converter. Latency: the median over rounds of one example, files in turn, so that a change of
the machine's speed meets all of them. The machine must have nothing else to do.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import tensorflow as tf
from absl import app, flags

import fliqs_tf
from binaries import data as datasets
from binaries import settings
from binaries.run_dir import versions
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.export import agreement
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.io.files import write_json

FLAGS = flags.FLAGS
flags.DEFINE_list("runs", [], "Run directories, all of one data set.")
flags.DEFINE_bool("mobilenet", False, "MobileNetV2 at 224 x 224 instead.")
flags.DEFINE_integer("rounds", 50, "Rounds of each file and number of threads.", lower_bound=1)
flags.DEFINE_string("json", "benchmark_export.json", "Where the figures go.")

THREADS = (1, 2)


def main(argv):
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}; flags start with --. See --help.")
    if bool(FLAGS.runs) == FLAGS.mobilenet:
        sys.exit("Give --runs=DIR,DIR,... or --mobilenet.")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        files, test = mobilenet_files(folder) if FLAGS.mobilenet else run_files(folder)
        rows = measure(files, test)
    write_json(FLAGS.json, {"versions": versions(), "cores": os.cpu_count(), "files": rows})
    show(rows)


# ---- files: {name: path}


def run_files(folder: pathlib.Path):
    """What the runs give, and the test batches."""
    data, files = None, {}
    for run in map(pathlib.Path, FLAGS.runs):
        model = settings.load_run(run)
        if data is None:
            data = settings.load_data()
        batches = [x for x, _ in training_batches(data)]
        if is_quantized(model):
            files[run.name] = ours(model, folder / f"{run.name}.tflite", batches)
            if any(fmt.bits <= 4 for fmt in formats(model)):
                files[f"{run.name}, int4 as int8"] = ours(model, folder / f"{run.name}_8.tflite", batches, int4=False)
        else:
            files |= from_float(model, folder, batches, run.name)
    return files, list(datasets.eval_batches(data, "test", 1))


def mobilenet_files(folder: pathlib.Path):
    """Files of MobileNetV2 with random weights and ranges of random images: sizes and times, no accuracy."""
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2(weights=None, classifier_activation=None)
    batches = [np.random.default_rng(i).normal(size=(8, 224, 224, 3)).astype(np.float32) for i in range(2)]
    files = from_float(model, folder, batches, "mobilenet_v2")
    for fmt in ("INT8", "INT4"):
        final = fliqs_tf.apply(model, fmt)
        files[f"uniform {fmt}"] = ours(final, folder / f"{fmt}.tflite", batches)
    files["uniform INT4, int4 as int8"] = ours(final, folder / "INT4_8.tflite", batches, int4=False)
    return files, [(batches[0][:1], None)]


def training_batches(data):
    """A few, as they are."""
    return datasets.train_batches(data, batch_size=64, seed=0, start_step=0, total_steps=8, augment=False)


def is_quantized(model) -> bool:
    """True for what apply() or deploy() gave."""
    return bool(ModelGraph(model).of_type(fliqs_tf.Quantized))


def formats(model) -> list[fliqs_tf.Format]:
    """Weight formats of the layers."""
    layers = [layer for _, layer in ModelGraph(model).of_type(fliqs_tf.Quantized)]
    return [fmt for layer in layers for fmt in layer.weight_quantizers[0].space.formats]


def ours(model, path, batches, int4=True) -> pathlib.Path:
    """Our file of a quantized model."""
    fliqs_tf.export.tflite(model, path, batches, int4=int4)
    return path


def from_float(model, folder, batches, name) -> dict[str, pathlib.Path]:
    """The float32 file, and TFMOT's INT8 file under tf_keras, in TFMOT's idiom."""
    files = {f"{name}, float32": folder / "float.tflite"}
    files[f"{name}, float32"].write_bytes(converted(model))
    final = fliqs_tf.apply(model, "INT8")
    files[f"{name}, INT8 without training (ours)"] = ours(final, folder / "ours.tflite", batches)
    if not IS_KERAS_3:
        from tensorflow_model_optimization.python.core.quantization.keras import quantize

        annotated = quantize.quantize_apply(quantize.quantize_annotate_model(model))
        norms = [layer for _, layer in ModelGraph(annotated).layers if "BatchNormalization" in type(layer).__name__]
        for layer in norms:
            layer.trainable = False
        for x in batches:  # ranges only: no optimizer
            annotated(x, training=True)
        path = folder / "tfmot.tflite"
        path.write_bytes(converted(annotated, quantized=True))
        files[f"{name}, INT8 without training (TFMOT)"] = path
    return files


def converted(model, quantized=False) -> bytes:
    """The converter's file."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if quantized:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    return converter.convert()


# ---- figures


def measure(files: dict[str, pathlib.Path], test) -> list[dict]:
    """Size, accuracy and times of each file."""
    rows = {name: {"name": name, "bytes": path.stat().st_size} for name, path in files.items()}
    if test[0][1] is not None:
        for name, path in files.items():
            rows[name]["accuracy"] = accuracy(path, test)
    programs = {}
    for name, path in files.items():
        for threads in THREADS:
            programs[name, threads] = agreement.Program(path, threads=threads)
            for _ in range(3):
                programs[name, threads]([np.asarray(test[0][0])])
    times = {key: [] for key in programs}
    for _ in range(FLAGS.rounds):
        for key, program in programs.items():
            start = time.perf_counter()
            program.invoke()
            times[key].append(time.perf_counter() - start)
    for (name, threads), seconds in times.items():
        rows[name][f"ms_{threads}"] = 1000 * float(np.median(seconds))
    return list(rows.values())


def accuracy(path, test) -> float:
    """Share of right guesses, in batches of 250 where the file takes them."""
    program, right = agreement.Program(path, threads=2), []
    for x, y in test:
        (logits, *_) = program([np.asarray(x)])
        right.append(np.mean(logits.argmax(-1) == np.asarray(y).ravel()))
    return float(np.mean(right))


def show(rows: list[dict]) -> None:
    """The table of docs/deploy.md."""
    print("| file | accuracy | bytes | ms, 1 thread | ms, 2 threads |\n|---|---|---|---|---|")
    for row in rows:
        score = f"{100 * row['accuracy']:.2f} %" if "accuracy" in row else "-"
        print(f"| {row['name']} | {score} | {row['bytes']:,} | {row['ms_1']:.3f} | {row['ms_2']:.3f} |")


if __name__ == "__main__":
    app.run(main)
