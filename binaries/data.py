"""Small data sets in memory, deterministic to the step and cheap to resume.

    data = load("cifar10", seed=0)            # train, quality (held back) and test splits
    train = train_batches(data, batch_size=128, seed=0, start_step=0, total_steps=10_000)

The batch of a step is a pure function of (seed, step): a permutation of the training examples
per epoch and an augmentation per step, both by stateless random numbers. A run that resumes at
step s asks for `start_step=s` and gets bit-identical batches; nothing is skipped over, nothing
is stored in a checkpoint.

Images come out as float32 with zero mean and unit variance per channel. The constants are those
of the whole stored training split, before the quality split is taken out of it, so they depend
neither on the seed nor on `holdout`. Augmentation works on raw pixels: what a shift uncovers is
black. Characters of a text come out as int32, see `text.py`. The test split is for the final
evaluation only; rewards come from the quality split.
"""

import dataclasses
import pathlib
import sys

import numpy as np
import tensorflow as tf

from binaries import imagenet, prepared, text
from binaries.devices import WHOLE

# Image data sets; name -> augmentation: the largest shift in pixels, and whether images may be mirrored
# (a mirrored digit is another character, a mirrored shoe points the other way than all others).
AUGMENTATION = {"digits": (1, False), "fashion_mnist": (2, False), "cifar10": (4, True)}
NAMES = (*AUGMENTATION, "shakespeare", *imagenet.NAMES)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Data:
    """A data set in memory: uint8 images [n, height, width, channels], int64 labels [n].

    Attributes:
      name: "digits", "fashion_mnist" or "cifar10".
      classes: number of classes; labels are 0..classes-1.
      train_images, train_labels: the examples that the weights learn from.
      quality_images, quality_labels: the examples held back for the search's rewards.
      test_images, test_labels: the test split.
      train_index, quality_index: where those examples stood in the stored training split.
      mean, std: float32 [channels], in raw pixel units, of the whole stored training split.
      shift: largest shift of the augmentation in pixels, in each direction.
      flip: whether the augmentation mirrors images left to right.
    """

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    quality_images: np.ndarray
    quality_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    train_index: np.ndarray
    quality_index: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    shift: int
    flip: bool

    @property
    def input_shape(self):
        """(height, width, channels)."""
        return self.train_images.shape[1:]

    def split(self, name):
        """(images, labels) of "train", "quality" or "test"."""
        if name not in ("train", "quality", "test"):
            raise ValueError(f"Unknown split {name!r}. Known splits: train, quality, test.")
        return getattr(self, f"{name}_images"), getattr(self, f"{name}_labels")

    def examples(self, split):
        """Number of examples in "train", "quality" or "test"."""
        return len(self.split(split)[1])

    def reader(self, split, augment):
        """(index [batch], seed [2], rows) -> (images float32 [batch, *input_shape], labels int64 [batch]).

        `rows` is (first, whole): the examples are rows first, first + 1, ... of a batch of so many.
        """
        images, labels = self.split(split)
        height, width, channels = self.input_shape
        with tf.device("CPU"):
            stored, labels = tf.constant(images), tf.constant(labels)
        if not augment:
            return lambda index, seed, rows: (self.normalize(tf.gather(stored, index)), tf.gather(labels, index))
        pixels = _pixel_table(images)

        def augmented(index, seed, rows):
            batch_size, (first, whole) = index.shape[0], rows
            draws = tf.random.stateless_uniform([3, whole], seed)
            draws = tf.gather(draws, first + tf.range(batch_size, dtype=tf.int64), axis=1)
            span = 2 * self.shift + 1
            down, right = tf.unstack(tf.cast(draws[:2] * span, tf.int32) - self.shift)
            mirrored = (draws[2] < 0.5) if self.flip else tf.zeros([batch_size], tf.bool)
            batch = shifted_images(pixels, index, down, right, mirrored, (height, width))
            batch = tf.ensure_shape(batch, [batch_size, height, width, channels])
            return self.normalize(batch), tf.gather(labels, index)

        return augmented

    def normalize(self, images):
        """uint8 [batch, height, width, channels] -> float32, zero mean and unit variance per channel."""
        # On a CPU, broadcasting along an inner dimension of 3 takes five times as long as along a row of pixels.
        width = self.input_shape[1]
        rows = tf.cast(tf.reshape(images, [tf.shape(images)[0], self.input_shape[0], -1]), tf.float32)
        rows = (rows - np.tile(self.mean, width)) * np.tile(1 / self.std, width)
        return tf.reshape(rows, [tf.shape(images)[0], *self.input_shape])


def load(name, data_dir=None, seed=0, holdout=0.1, image_size=224):
    """Reads a data set and holds a part of its training split back for quality.

    Args:
      name: "digits" (scikit-learn's 1,797 images of 8x8, split 80/20 into train and test, the
        same way for every seed), "fashion_mnist" or "cifar10" (TFDS), "shakespeare" (characters).
      data_dir: where TFDS keeps its data, None for its default, ~/tensorflow_datasets; for shakespeare where
        the archive is. Not used for digits.
      seed: chooses which examples are held back.
      holdout: the share of each class of the training split to hold back, at least 0 and below 1; 0 for none.
      image_size: height and width of the images of imagenet2012; the others have one of their own.

    Returns:
      A `Data`, or a `text.Text`.

    Raises:
      ValueError: unknown name, or a holdout that leaves a split empty.
      FileNotFoundError: the data set is not in `data_dir`; says how to prepare it.
      ImportError: the package that reads the data set is missing; says how to install it.
    """
    if name not in NAMES:
        raise ValueError(f"Unknown data set {name!r}. Known data sets: {', '.join(NAMES)}.")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be at least 0 and below 1 (got {holdout}).")
    if name in imagenet.NAMES:
        return imagenet.load(name, data_dir, holdout, image_size)
    if name == "shakespeare":
        return text.Text(
            name=name,
            **text.windows(
                text.read_shakespeare(data_dir),
                text.CONTEXT,
                lambda count: _held_back(np.zeros(count, int), holdout, seed, name),
            ),
        )
    read = _read_digits if name == "digits" else _read_tfds
    (images, labels), (test_images, test_labels) = read(name, data_dir)
    kept, held = _held_back(labels, holdout, seed, name)
    mean, std = _mean_and_std(images)
    shift, flip = AUGMENTATION[name]
    return Data(
        name=name,
        classes=int(labels.max()) + 1,
        train_images=images[kept],
        train_labels=labels[kept],
        quality_images=images[held],
        quality_labels=labels[held],
        test_images=test_images,
        test_labels=test_labels,
        train_index=kept,
        quality_index=held,
        mean=mean,
        std=std,
        shift=shift,
        flip=flip,
    )


def _held_back(labels, holdout, seed, name):
    kept, held = stratified_split(labels, holdout, seed)
    if not len(kept) or (holdout and not len(held)):
        raise ValueError(
            f"holdout={holdout} of the {len(labels)} training examples of {name} leaves {len(kept)} for "
            f"training and {len(held)} for quality; both need some."
        )
    return kept, held


def stratified_split(labels, share, seed):
    """Two ascending index arrays without overlap: the rest, and `share` of every class.

    Depends on nothing but its arguments: `RandomState`'s stream is frozen across numpy versions.
    """
    random = np.random.RandomState(seed)
    taken = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        taken.append(members[: round(share * len(members))])
    taken = np.sort(np.concatenate(taken))
    return np.setdiff1d(np.arange(len(labels)), taken), taken


def train_batches(data, *, batch_size, seed, start_step, total_steps, augment=True, share=WHOLE):
    """Training batches of steps `start_step` .. `total_steps - 1`.

    Epochs are of len(train) // batch_size steps; the examples that fill no whole batch (other
    ones in every epoch) are left out.

    Args:
      data: a `Data` or a `text.Text`.
      batch_size: examples per batch.
      seed: of the order and the augmentation.
      start_step: the first step to give, 0 at the start of a run.
      total_steps: the number of steps of the whole run.
      augment: whether to shift, and for CIFAR-10 mirror, images at random.
      share: of several workers, which rows of each batch to give: `share.local` data set elements per step, of
        `share.rows(batch_size)` examples each.

    Returns:
      A finite `tf.data.Dataset` of (images float32 [batch_size, height, width, channels],
      labels int64 [batch_size]), or of characters, see `text.Text.reader`.

    Raises:
      ValueError: more examples per batch than there are, or steps in the wrong order.
    """
    examples = data.examples("train")
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size must be 1 to {examples}, the training examples of {data.name} (got {batch_size})."
        )
    if not 0 <= start_step <= total_steps:
        raise ValueError(f"start_step must be 0 to total_steps={total_steps} (got {start_step}).")
    steps_per_epoch = examples // batch_size
    if isinstance(data, imagenet.Stream):
        return data.train_batches(
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            total_steps=total_steps,
            augment=augment,
            share=share,
        )
    seed = tf.constant(seed, tf.int64)
    read = data.reader("train", augment)

    def batch(element):
        step, rows = _step_and_rows(element, share, batch_size)
        epoch, position = step // steps_per_epoch, step % steps_per_epoch
        index = _shuffled(position * batch_size + rows, tf.stack([seed, epoch]), examples)
        return read(index, tf.stack([seed, step]), (rows[0], batch_size))

    return _pipeline(tf.data.Dataset.range(start_step * share.local, total_steps * share.local), batch)


def _step_and_rows(element, share, batch_size):
    """The step that an element of a worker's data set belongs to, and which rows of the step's batch it is."""
    replica = share.first + element % share.local
    count = share.rows(batch_size)
    return element // share.local, replica * count + tf.range(count, dtype=tf.int64)


def quality_batches(data, batch_size, seed, start_batch=0, share=WHOLE):
    """Endless batches over the held-back split, not augmented.

    The split is gone through in one random order after the other, without a gap: batch k is a
    pure function of (seed, k), of the same size for every k, also when the split is smaller
    than a batch.

    Returns:
      An infinite `tf.data.Dataset` of (images, labels) as `train_batches` gives them, beginning
      with batch `start_batch`.
    """
    if batch_size < 1 or start_batch < 0:
        raise ValueError(
            f"batch_size must be 1 or more and start_batch 0 or more (got {batch_size} and {start_batch})."
        )
    examples = data.examples("quality")
    if not examples:
        raise ValueError("Nothing is held back for quality: load the data with a holdout above 0, such as 0.1.")
    if isinstance(data, imagenet.Stream):
        return data.quality_batches(batch_size, seed, start_batch, share)
    seed = tf.constant(seed, tf.int64)
    read = data.reader("quality", augment=False)

    def batch(element):
        k, rows = _step_and_rows(element, share, batch_size)
        slots = k * batch_size + rows
        # A batch may end one pass and begin the next: each example has its own pass's seed.
        seeds = tf.stack([tf.fill([share.rows(batch_size)], seed), slots // examples], axis=1)
        return read(_shuffled(slots % examples, seeds, examples), None, None)

    return _pipeline(tf.data.Dataset.counter(start_batch * share.local), batch)


def eval_batches(data, split, batch_size):
    """Every example of a split once, in stored order, not augmented.

    A last batch of another size would be compiled a second time by XLA. So the batch size is
    lowered to the largest one that divides the split, unless that would more than halve it
    (a split of a prime number of examples): only then the last batch is smaller.

    Args:
      data: a `Data`.
      split: "quality", "test" or "train".
      batch_size: the most examples per batch.

    Returns:
      A finite `tf.data.Dataset` of (images, labels) as `train_batches` gives them.
    """
    examples = data.examples(split)
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more (got {batch_size}).")
    if isinstance(data, imagenet.Stream):
        return data.eval_batches(split, batch_size)
    batch_size = even_batch_size(examples, batch_size)
    read = data.reader(split, augment=False)
    # As many examples as fill whole batches give static shapes only if nothing is left over.
    batches = tf.data.Dataset.range(examples).batch(batch_size, drop_remainder=examples % batch_size == 0)
    return _pipeline(batches, lambda index: read(index, None, None))


def even_batch_size(examples, batch_size):
    """The largest divisor of `examples` in batch_size/2 .. batch_size, or `batch_size`.

    >>> even_batch_size(10_000, 128), even_batch_size(360, 64), even_batch_size(359, 64)
    (125, 60, 64)
    """
    for size in range(batch_size, (batch_size - 1) // 2, -1):
        if examples % size == 0:
            return size
    return batch_size


def shifted_images(pixels, index, down, right, mirrored, size):
    """Gathers images, each mirrored or not and then moved by (down, right) pixels.

    One gather of pixels does the lookup, the mirroring and the move: on a CPU faster than
    cropping padded images one by one.

    Args:
      pixels: uint8 [n * height * width + 1, channels]; the last row is what a move uncovers.
      index: [batch], which images.
      down, right: int32 [batch], the move in pixels.
      mirrored: bool [batch], whether to swap left and right before the move.
      size: (height, width).

    Returns:
      uint8 [batch, height, width, channels].
    """
    height, width = size
    y = tf.range(height) - down[:, None]
    x = tf.range(width) - right[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    x = tf.where(mirrored[:, None], width - 1 - x, x)
    rows = tf.cast(index, tf.int32)[:, None] * height + y
    where = rows[:, :, None] * width + x[:, None, :]
    return tf.gather(pixels, tf.where(inside, where, tf.shape(pixels)[0] - 1))


def _pixel_table(images):
    black = np.zeros((1, images.shape[-1]), images.dtype)
    with tf.device("CPU"):
        return tf.constant(np.concatenate([images.reshape(-1, images.shape[-1]), black]))


def _shuffled(slots, seed, examples):
    """What stands at `slots` of the permutation of 0..examples-1 that belongs to `seed`, [2] or [batch, 2]."""
    return tf.raw_ops.RandomIndexShuffle(
        index=slots,
        # The op wants three numbers per seed.
        seed=tf.concat([seed, tf.zeros_like(seed[..., :1])], axis=-1),
        max_index=tf.constant(examples - 1, tf.int64),
        # tf.random.experimental.index_shuffle stops at 4 rounds of its cipher: there the orders of successive
        # epochs of 45,000 examples correlate with 0.69. With 8 no correlation is left.
        rounds=8,
    )


def _pipeline(dataset, function):
    options = tf.data.Options()
    options.deterministic = True
    # TF 2.21's autotuning rounds every epoch of `fit` up to 2.56, 5.12, 10.24 s.
    options.autotune.enabled = False
    return dataset.map(function).prefetch(2).with_options(options)


def _mean_and_std(images):
    """Per channel, exactly and without a float copy of the images: from counts of pixel values."""
    values = np.arange(256)
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    return mean.astype(np.float32), np.sqrt(share @ values**2 - mean**2).astype(np.float32)


def _read_digits(name, data_dir):
    del name, data_dir
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is not installed. Run `pip install scikit-learn`."
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = labels.astype(np.int64)
    train, test = stratified_split(labels, 0.2, seed=0)
    return (images[train], labels[train]), (images[test], labels[test])


def _read_tfds(name, data_dir):
    argument = "" if data_dir is None else f", data_dir={str(data_dir)!r}"
    builder = prepared.builder(
        name,
        data_dir,
        "Give the directory that holds it as data_dir, or "
        f'prepare it with\n  {pathlib.Path(sys.executable).name} -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}'{argument}).download_and_prepare()\"\n"
        "The README says how to do so without access to the data set's own site.",
    )
    return tuple(_read_split(builder, split) for split in ("train", "test"))


def _read_split(builder, split):
    import tensorflow_datasets as tfds

    if builder.info.file_format.value == "array_record":
        # TFDS reads this format example by example only.
        examples = list(builder.as_data_source(split))
        images = np.stack([example["image"] for example in examples])
        labels = np.stack([example["label"] for example in examples])
    else:
        examples = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
        images, labels = examples["image"], examples["label"]
    return images, labels.astype(np.int64)
