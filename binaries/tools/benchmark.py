"""Measures what quantization and search cost in time and memory, as ratios to float training.

    python binaries/tools/benchmark.py                      # ResNet-20, both Kerases: about 15 minutes
    python binaries/tools/benchmark.py --keras=legacy       # one of them
    python binaries/tools/benchmark.py --controller         # the controller alone, on landscapes with a known optimum
    python binaries/tools/benchmark.py --wrap               # seconds and memory of wrap() on large networks

Times are wall and CPU times in ms per step: configurations take turns in one process, round by round, so that a change
of the machine's speed affects all of them alike, and the median counts. Peak memory (MiB) and first steps (s) are
measured in a process each. Training batches are made once: no input pipeline is measured. The machine must have nothing
else to do.

Prints a table per Keras, and writes all figures to --json.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import tensorflow as tf
from absl import app, flags

import fliqs_tf
import models
from binaries.run_dir import versions
from binaries.tools import landscapes
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.io.files import write_json

FLAGS = flags.FLAGS
flags.DEFINE_bool("controller", False, "Benchmark the controller on synthetic landscapes instead.")
flags.DEFINE_bool("wrap", False, "Measure wrap() on large networks instead.")
flags.DEFINE_enum("keras", "both", ["both", "3", "legacy"], "Which Keras.")
flags.DEFINE_integer("rounds", 7, "Rounds of each configuration.", lower_bound=1)
flags.DEFINE_integer("steps", 20, "Steps of a round.", lower_bound=1)
flags.DEFINE_string("json", "benchmark.json", "Where the figures go.")
flags.DEFINE_string("worker", None, "Internal: what to measure in this process.")

BATCH = 64
# Of a search whose training steps compute with samples, and are readings themselves: the paper's form.
SPACES = {
    "search, 2 options": ["INT4", "INT8"],
    "search, 6 options": "FLIQS-L-INT",
    "search, 14 options": fliqs_tf.PRESETS["FLIQS-L-FLOAT"][:-1],
}
LARGE = {
    "resnet50": {},
    "efficientnet_b4": {},
    "deit_base": {},
    "bert": {"width": 1.5, "depth": 12},  # BERT-base
}
# The default, while formats are open: a quarter of a run. What follows takes as long as a fixed format.
HELD_OUT, READ_EVERY = "search, 3 options, held-out quality", 2


def main(argv: list[str]) -> None:
    """Measures what the flags ask for. Args: what is left of the command line, the program's name alone."""
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}; flags start with --. See --help.")
    if FLAGS.controller:
        print(landscapes.HEADER)
        for row in landscapes.run():
            print(landscapes.table_line(row), flush=True)
    elif FLAGS.wrap:
        show_wrap()
    elif FLAGS.worker:
        kind, _, name = FLAGS.worker.partition(":")
        workers = {"times": times, "memory": memory, "first": first_step, "wrap": wrap}
        print(json.dumps(workers[kind](*([name] if name else []))))
    else:
        results = {"versions": versions(), "cores": os.cpu_count(), "batch": BATCH, "steps": FLAGS.steps}
        for which in ("legacy", "3") if FLAGS.keras == "both" else (FLAGS.keras,):
            results[which] = measure(which)
            write_json(FLAGS.json, results)
            show(which, results[which])


def measure(which: str) -> dict:
    """All figures under one Keras, "legacy" or "3": {"times", "memory", "first"}, see the functions of these names."""
    names = list(configurations(which == "legacy"))
    return {
        "times": _worker(which, "times"),
        "memory": {name: _worker(which, f"memory:{name}") for name in names},
        "first": {name: _worker(which, f"first:{name}") for name in ("float", "search, 2 options")},
    }


def _worker(which: str, task: str):
    environment = dict(os.environ, TF_USE_LEGACY_KERAS="1" if which == "legacy" else "0")
    command = [sys.executable, __file__, f"--worker={task}", f"--rounds={FLAGS.rounds}", f"--steps={FLAGS.steps}"]
    print(f"{which}: {task}", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def configurations(legacy: bool) -> dict:
    """Name -> function that makes a compiled model from a float one."""
    made = {"float": _compiled, "fixed INT8": lambda model: _compiled(fliqs_tf.apply(model, "INT8"))}
    if legacy:
        made["TFMOT INT8"] = lambda model: _compiled(_tfmot(model))
    for name, space in SPACES.items():
        made[name] = lambda model, space=space: _search(model, space, train_with="sample")
    made[HELD_OUT] = lambda model: _search(model, "FLIQS-S-INT", quality_every=READ_EVERY)
    return made


def _tfmot(model):
    import tensorflow_model_optimization as tfmot

    return tfmot.quantization.keras.quantize_model(model)


def _compiled(model, **search):
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
        **search,
    )
    return model


def _search(model, space, **options):
    wrapped = fliqs_tf.wrap(model, space)
    options = {"search_steps": 1_000_000, "controller": {"warmup": 0}, **options}
    return _compiled(wrapped, target_cost="0.625x INT8", pretrained=False, **options)


def _data(shape, batch: int) -> tf.data.Dataset:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, *shape)).astype(np.float32)
    labels = rng.integers(0, 10, batch)
    options = tf.data.Options()
    options.autotune.enabled = False  # it rounds epochs up to 2.56 s and more
    return tf.data.Dataset.from_tensors((images, labels)).repeat().with_options(options)


def _fit(model, name: str, data, steps: int) -> None:
    held_out = {"quality_data": data} if name == HELD_OUT else {}
    model.fit(data, steps_per_epoch=steps, epochs=1, verbose=0, **held_out)


def times() -> dict:
    """ms per training step of every configuration, and of a float forward pass: {name: {"wall": ms, "cpu": ms}}."""
    data = _data((32, 32, 3), BATCH)
    made = {name: make(models.get("resnet20")) for name, make in configurations(not IS_KERAS_3).items()}
    runs = {name: (lambda name=name, model=model: _fit(model, name, data, FLAGS.steps)) for name, model in made.items()}
    forward = tf.function(lambda x: made["float"](x, training=False))
    batch = next(iter(data))[0]
    runs["float forward"] = lambda: [forward(batch) for _ in range(FLAGS.steps)]
    found = {name: {"wall": [], "cpu": []} for name in runs}
    for run in runs.values():
        run()
    for _ in range(FLAGS.rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            found[name]["wall"].append((time.perf_counter() - wall) / FLAGS.steps * 1e3)
            found[name]["cpu"].append((time.process_time() - cpu) / FLAGS.steps * 1e3)
    return {name: {kind: float(np.median(values)) for kind, values in by.items()} for name, by in found.items()}


def memory(name: str) -> float:
    """Peak memory of a process that trains one configuration, in MiB."""
    model = configurations(not IS_KERAS_3)[name](models.get("resnet20"))
    _fit(model, name, _data((32, 32, 3), BATCH), 10)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def first_step(name: str) -> float:
    """Seconds of wrap, compile and first training step of MobileNetV2 at 224 x 224, batch 32, from the float model."""
    model = keras.applications.MobileNetV2(weights=None, classes=10, classifier_activation=None)
    data = _data((224, 224, 3), 32)
    start = time.perf_counter()
    _fit(configurations(not IS_KERAS_3)[name](model), name, data, 1)
    return time.perf_counter() - start


def wrap(name: str) -> dict:
    """Seconds of wrap() and of counting MACs, and what the wrapped model holds, against the float model."""
    wrapped = fliqs_tf.wrap(models.get("resnet8"), "FLIQS-S-INT")  # what every first call of TensorFlow takes
    fliqs_tf.costs.bops(wrapped, "INT8")
    resident = [_resident()]
    model = models.get(name, **LARGE[name])
    resident.append(_resident())
    marks = [(time.perf_counter(), time.process_time())]
    wrapped = fliqs_tf.wrap(model, "FLIQS-S-INT")
    marks.append((time.perf_counter(), time.process_time()))
    resident.append(_resident())
    gbops = fliqs_tf.costs.bops(wrapped, "INT8")
    marks.append((time.perf_counter(), time.process_time()))
    seconds = np.diff(np.array(marks), axis=0)
    held = [sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in m.variables) for m in (model, wrapped)]
    return {
        "decisions": len(wrapped.decisions),
        "gbops": gbops,
        "wrap": {"wall": seconds[0, 0], "cpu": seconds[0, 1]},
        "count": {"wall": seconds[1, 0], "cpu": seconds[1, 1]},
        "variables": held[1] / held[0],
        "resident": dict(zip(("float", "wrapped"), np.diff(resident).tolist())),
    }


def _resident() -> float:
    """Memory of this process in MiB."""
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def show_wrap() -> None:
    """Measures and prints one table per Keras."""
    print(
        f"{'':20}{'Keras':>8}{'decisions':>10}{'wrap, s':>9}{'count, s':>9}{'variables':>11}{'MiB':>7}{'to float':>9}"
    )
    for which in ("legacy", "3") if FLAGS.keras == "both" else (FLAGS.keras,):
        for name in LARGE:
            if (which, name) != ("legacy", "bert"):  # keras_hub needs Keras 3
                found = _worker(which, f"wrap:{name}")
                wrap_s, count_s = found["wrap"]["wall"], found["count"]["wall"]
                mib, base = found["resident"]["wrapped"], found["resident"]["float"]
                print(
                    f"{name:20}{which:>8}{found['decisions']:10}{wrap_s:9.1f}{count_s:9.1f}"
                    f"{found['variables']:11.3f}{mib:7.0f}{mib / base:9.2f}",
                    flush=True,
                )


def show(which: str, result: dict) -> None:
    """Prints one table."""
    wall = {name: value["wall"] for name, value in result["times"].items()}
    print(f"\nResNet-20, 32 x 32, batch {BATCH}, Keras {which}")
    print(f"{'':40}{'ms per step':>12}{'to float':>10}{'peak MiB':>10}{'to fixed INT8':>15}")
    for name, value in wall.items():
        line = f"{name:40}{value:12.1f}{value / wall['float']:10.3f}"
        if name in result["memory"]:
            peak = result["memory"][name]
            line += f"{peak:10.0f}{peak / result['memory']['fixed INT8']:15.3f}"
        print(line)
    first = result["first"]
    defaults = inspect.signature(fliqs_tf.SearchModel.compile).parameters
    passes = defaults["quality_samples"].default / READ_EVERY
    fair = wall["float"] + passes * wall["float forward"]
    print(f"{HELD_OUT}: {wall[HELD_OUT] / fair:.3f} x (float step + {passes:g} float forward passes)")
    print(f"14 options to 2: {wall['search, 14 options'] / wall['search, 2 options']:.3f}")
    search, base = first["search, 2 options"], first["float"]
    print(f"MobileNetV2, wrap + compile + first step: {search:.1f} s, float {base:.1f} s, ratio {search / base:.2f}")


if __name__ == "__main__":
    app.run(main)
