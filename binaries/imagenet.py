"""ImageNet as a stream: too large for memory, read by TensorFlow Datasets from a disk or a gs:// bucket.

    data = load("imagenet2012", "gs://bucket/tensorflow_datasets", holdout=0.01)

Augmentation is the standard one: a random crop of 8 to 100 % of the area and 3/4 to 4/3 of the aspect, resized, and
mirrored at random; to evaluate, the centre of the image as large as 224/256 of its shorter side. Images come out as
float32, normalized per channel with the constants below.

The order of the examples is a function of (seed, epoch, share), and the augmentation of (seed, step, row): a run that
resumes at a step reads on where it stopped. It passes over the records that were read before, without decoding them:
that takes a small part of the time that the epoch took.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import tensorflow as tf

from binaries import prepared
from binaries.devices import WHOLE

NAMES = ("imagenet2012",)
# Of the RGB values of the training split, as everyone uses them.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_SHUFFLED = 16_384  # records, still encoded: 2 GB
_READERS = 16


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """A data set of encoded images on disk.

    Attributes:
      name: Of the data set.
      builder: Of TensorFlow Datasets.
      classes: Labels are 0..classes-1.
      held: Training examples held back for quality: the first ones, which are in random order.
      size: Height and width of the images.
    """

    name: str
    builder: Any
    classes: int
    held: int
    size: int = 224

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.size, self.size, 3

    def examples(self, split: str) -> int:
        """Number of examples in "train", "quality" or "test"."""
        sizes = self.builder.info.splits
        return {
            "train": sizes["train"].num_examples - self.held,
            "quality": self.held,
            "test": sizes["validation"].num_examples,
        }[split]

    def train_batches(self, *, batch_size, seed, start_step, total_steps, augment=True, share=WHOLE):
        """As `data.train_batches`."""
        per_epoch = self.examples("train") // batch_size
        rows = share.rows(batch_size)
        each = rows * share.local  # examples of this pipeline per step
        epochs = []
        for epoch in range(start_step // per_epoch, math.ceil(total_steps / per_epoch)):
            begin = max(start_step - epoch * per_epoch, 0)
            end = min(total_steps - epoch * per_epoch, per_epoch)
            # One worker's files may hold a little less than its share: it begins them anew.
            records = self._records("train", share, seed=(seed * 1_000_003 + epoch) % 2**31).repeat()
            epochs.append(records.skip(begin * each).take((end - begin) * each))
        records = _concatenated(epochs)
        numbers = tf.data.Dataset.range(start_step * each, total_steps * each)

        def decode(number, image, label):
            step, row = number // each, number % each + share.first * rows
            if not augment:
                return central(image, self.size), label
            return augmented(image, tf.stack([tf.constant(seed, tf.int64) * 65_536 + row, step]), self.size), label

        return _pipeline(
            tf.data.Dataset.zip(numbers, records).map(lambda n, r: (n, r["image"], r["label"])), decode, rows
        )

    def quality_batches(self, batch_size, seed, start_batch=0, share=WHOLE):
        """As `data.quality_batches`, but in the same order in every pass."""
        rows = share.rows(batch_size)
        each = rows * share.local
        records = self._records("quality", share, seed=seed).repeat()
        # Of the position only what is left of whole passes matters, so that a late start costs no more than a pass.
        skipped = start_batch * each % max(self.held // share.total * share.local, 1)
        return _pipeline(
            records.skip(skipped).map(lambda r: (r["image"], r["label"])), lambda i, y: (central(i, self.size), y), rows
        )

    def eval_batches(self, split, batch_size):
        """As `data.eval_batches`."""
        records = self._records(split, WHOLE, seed=None).map(lambda r: (r["image"], r["label"]))
        return _pipeline(records, lambda i, y: (central(i, self.size), y), batch_size, whole=False)

    def _records(self, split, share, seed):
        import tensorflow_datasets as tfds

        context = None
        if share.total > 1:
            context = tf.distribute.InputContext(
                num_input_pipelines=share.total // share.local,
                input_pipeline_id=share.first // share.local,
                num_replicas_in_sync=share.total,
            )
        options = tf.data.Options()
        options.deterministic = True
        if split != "test" and context is not None and self._files(split) < context.num_input_pipelines:
            # Fewer files than workers: each reads all and keeps its part.
            part, context = (context.num_input_pipelines, context.input_pipeline_id), None
        else:
            part = None
        dataset = self.builder.as_dataset(
            split={"train": f"train[{self.held}:]", "quality": f"train[:{self.held}]", "test": "validation"}[split],
            decoders={"image": tfds.decode.SkipDecoding()},
            shuffle_files=seed is not None,
            read_config=tfds.ReadConfig(
                options=options,
                shuffle_seed=seed,
                shuffle_reshuffle_each_iteration=False,
                interleave_cycle_length=_READERS,
                input_context=context,
                try_autocache=False,
            ),
        )
        if part is not None:
            dataset = dataset.shard(*part)
        if seed is not None:
            dataset = dataset.shuffle(
                min(_SHUFFLED, max(self.examples(split), 1)), seed=seed, reshuffle_each_iteration=False
            )
        return dataset

    def _files(self, split) -> int:
        name = "validation" if split == "test" else "train"
        return len(self.builder.info.splits[name].filenames)


def load(name: str, data_dir: str | None, holdout: float, size: int = 224) -> Stream:
    """Opens a prepared data set.

    Args:
      name: One of NAMES.
      data_dir: Where TensorFlow Datasets keeps it: a directory or a gs:// address; None: its default.
      holdout: Share of the training split to hold back for quality.
      size: Height and width to make the images.

    Raises:
      ImportError: TensorFlow Datasets is missing.
      FileNotFoundError: The data set is not there; says how to prepare it.
    """
    builder = prepared.builder(
        name,
        data_dir,
        f"Put the archives that image-net.org gives to those who ask into its downloads/manual and run "
        f"tfds.builder({name!r}, data_dir=...).download_and_prepare() once; the directory may then be copied to a "
        f"gs:// bucket. Give it as --data_dir.",
    )
    held = round(holdout * builder.info.splits["train"].num_examples)
    return Stream(name=name, builder=builder, classes=builder.info.features["label"].num_classes, held=held, size=size)


def augmented(image: tf.Tensor, seed: tf.Tensor, size: int) -> tf.Tensor:
    """A random crop of an encoded image, resized and perhaps mirrored: float32 [size, size, 3].

    Args:
      image: JPEG, a string scalar.
      seed: int64 [2].
      size: Height and width.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(image),
        bounding_boxes=tf.zeros([1, 0, 4]),
        seed=seed,
        min_object_covered=0.1,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    top, left, _ = tf.unstack(begin)
    height, width, _ = tf.unstack(extent)
    crop = tf.image.decode_and_crop_jpeg(image, tf.stack([top, left, height, width]), channels=3)
    return _normalized(tf.image.stateless_random_flip_left_right(_resized(crop, size), seed + 1))


def central(image: tf.Tensor, size: int) -> tf.Tensor:
    """The centre of an encoded image, 224/256 of its shorter side: float32 [size, size, 3]."""
    shape = tf.image.extract_jpeg_shape(image)
    side = tf.cast(tf.round(tf.cast(tf.minimum(shape[0], shape[1]), tf.float32) * (224 / 256)), tf.int32)
    begin = (shape[:2] - side) // 2
    crop = tf.image.decode_and_crop_jpeg(image, tf.concat([begin, [side, side]], 0), channels=3)
    return _normalized(_resized(crop, size))


def _resized(image, size):
    return tf.ensure_shape(tf.image.resize(image, [size, size], "bicubic"), [size, size, 3])


def _normalized(image):
    return (image - tf.constant(MEAN)) / tf.constant(STD)


def _concatenated(datasets):
    result = datasets[0]
    for dataset in datasets[1:]:
        result = result.concatenate(dataset)
    return result


def _pipeline(dataset, decode, batch_size, whole=True):
    options = tf.data.Options()
    options.deterministic = True
    dataset = dataset.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(batch_size, drop_remainder=whole).prefetch(tf.data.AUTOTUNE).with_options(options)
