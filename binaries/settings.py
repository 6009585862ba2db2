"""Flags and set-up that search.py, train.py and evaluate.py share. The defaults are the digits run."""

from __future__ import annotations

import math
import pathlib
import sys

import tensorflow as tf
from absl import flags

import models
from binaries import data as datasets
from binaries import devices, initial
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.io import loading
from fliqs_tf.io.files import read_json

FLAGS = flags.FLAGS
_OF_THE_DATA = ("dataset", "data_dir", "image_size", "holdout", "seed")
HARMLESS = (
    *("run_dir", "resume", "overwrite", "data_dir", "references"),
    *("checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints"),
    *("strategy", "tpu", "devices", "steps_per_execution"),
)
"""Flags that may change when a run goes on: where things are, how often it saves, what it computes on."""

flags.DEFINE_enum("dataset", "digits", sorted(datasets.NAMES), "Data set.")
flags.DEFINE_string(
    "data_dir", None, "Where TensorFlow Datasets keeps its data; for shakespeare the directory of its archive."
)
flags.DEFINE_string("model", "resnet8", "Network; an unknown name lists the known ones.")
flags.DEFINE_float("width", 1.0, "Multiplier of the network's filters.")
flags.DEFINE_integer("batch_size", 64, "Examples per training step, of all replicas together.", lower_bound=1)
flags.DEFINE_alias("global_batch_size", "batch_size")
flags.DEFINE_integer("image_size", 224, "Height and width of the images of imagenet2012.", lower_bound=32)
flags.DEFINE_float("holdout", 0.1, "Share of the training split that weights never see.", 0, 0.5)
flags.DEFINE_integer("seed", 0, "Seed of weights, data order, augmentation and draws.", 0, 2**31 - 1)


def define_training_flags() -> None:
    """Flags of the binaries that train."""
    flags.DEFINE_string("run_dir", None, "Where results go. Default: runs/<dataset>_<model>_<what>.")
    flags.DEFINE_bool("resume", False, "Go on from the newest checkpoint in --run_dir.")
    flags.DEFINE_bool("overwrite", False, "Replace the run in --run_dir.")
    flags.DEFINE_string(
        "init",
        None,
        "Weights to begin with: a run of train.py --format=float, a .keras file or a .weights.h5 file of the network.",
    )
    flags.DEFINE_bool("deterministic", False, "Same bits for the same seed, at some cost in speed.")
    flags.DEFINE_integer("checkpoint_every_steps", 1000, "Steps between checkpoints.", lower_bound=1)
    flags.DEFINE_float("checkpoint_every_minutes", None, "Minutes between checkpoints, besides.", lower_bound=0.01)
    flags.DEFINE_integer("keep_checkpoints", 3, "How many checkpoints stay.", lower_bound=1)
    devices.define_flags()
    flags.DEFINE_bool("embeddings", False, "Quantize embedding tables too.")
    flags.DEFINE_bool("attention_scores", False, "Quantize, and count, the two products of activations in attention.")
    flags.DEFINE_integer("epochs", 60, "Passes over the training data.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 0.1, "Peak rate; it falls to 0 by a cosine.", lower_bound=0)
    flags.DEFINE_enum("optimizer", "sgd", ["sgd", "adamw"], "Stochastic gradient descent with momentum, or AdamW.")
    flags.DEFINE_float("weight_decay", 5e-4, "Decoupled weight decay.", lower_bound=0)


def set_up_process() -> None:
    """Seeds, and determinism if asked for."""
    if not IS_KERAS_3:
        # What Dropout draws otherwise has no state that a checkpoint could keep.
        keras.backend.experimental.enable_tf_random_generator()
    keras.utils.set_random_seed(FLAGS.seed)
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()


def load_data() -> datasets.Data | datasets.text.Text:
    """The data set of the flags; a missing one ends the program with how to prepare it."""
    try:
        return datasets.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.seed, FLAGS.holdout, FLAGS.image_size)
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(str(error))


def options_of_layers() -> dict[str, bool]:
    """What is quantized besides kernels, by the flags; arguments of `fliqs_tf.wrap` and `fliqs_tf.apply`."""
    return {"embeddings": FLAGS.embeddings, "attention_scores": FLAGS.attention_scores}


def build_network(data) -> keras.Model:
    """The float network of the flags."""
    # Not every network has a width.
    width = {"width": FLAGS.width} if FLAGS.width != 1 else {}
    try:
        network = models.get(FLAGS.model, input_shape=data.input_shape, classes=data.classes, **width)
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    except (MemoryError, tf.errors.ResourceExhaustedError):
        sys.exit(f"--model={FLAGS.model} --width={FLAGS.width} does not fit into memory. Lower --width.")
    if "init" in FLAGS and FLAGS.init:  # evaluate.py has weights of its own
        try:
            initial.load(network, pathlib.Path(FLAGS.init))
        except (OSError, ValueError) as error:
            sys.exit(f"--init={FLAGS.init}: {error}")
    return network


def optimizer(total_steps: int) -> keras.optimizers.Optimizer:
    """That of --optimizer, its rate falling to 0 by a cosine after a warm-up."""
    warm_up = max(1, total_steps // 20)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, total_steps - warm_up, warmup_target=FLAGS.learning_rate, warmup_steps=warm_up
    )
    if FLAGS.optimizer == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=FLAGS.weight_decay, beta_2=0.99)
    return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=FLAGS.weight_decay or None)


def loss() -> keras.losses.Loss:
    """Cross entropy of logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_scores(model: keras.Model, data) -> dict[str, float]:
    """On the test split: "accuracy", and for text "bits_per_character", the cross entropy to base 2."""
    model.compile(loss=loss(), metrics=["accuracy"], jit_compile=False)
    logs = model.evaluate(datasets.eval_batches(data, "test", 250), verbose=0, return_dict=True)
    scores = {"accuracy": float(logs["accuracy"])}
    if isinstance(data, datasets.text.Text):
        scores["bits_per_character"] = float(logs["loss"]) / math.log(2)
    return scores


def load_model(path) -> keras.Model:
    """A saved model, which may have layers of `models`.

    Raises:
      ValueError, OSError: See `fliqs_tf.loading.load_model`.
    """
    return loading.load_model(path, custom_objects={})  # those of `models` are registered


def load_run(run: pathlib.Path) -> keras.Model:
    """The model of a finished run of search.py or train.py; its data set's flags hold where none are given."""
    try:
        saved = read_json(run / "flags.json", "run's flags")
        model = load_model(run / "model.keras")
    except (OSError, ValueError) as error:
        sys.exit(f"{run} holds no finished run: {error}")
    for name in _OF_THE_DATA:
        if name in saved and not FLAGS[name].present:
            FLAGS[name].value = saved[name]
    return model


def flag_values() -> dict:
    """The flags of this program as they are set."""
    own = {f.name for module in FLAGS.flags_by_module_dict() for f in _flags_of(module)}
    return {name: FLAGS[name].value for name in sorted(own)}


def _flags_of(module: str):
    ours = module in (sys.argv[0], "__main__") or module.startswith("binaries") or module.endswith("settings")
    return FLAGS.flags_by_module_dict()[module] if ours else []
