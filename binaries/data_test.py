"""Splits, resuming, augmentation and errors of the data pipelines."""

import dataclasses
import itertools
import sys

import numpy as np
import pytest
import tensorflow as tf

from binaries import data as data_lib


@pytest.fixture(scope="module")
def digits():
    return data_lib.load("digits", seed=0)


def marked(examples=40, quality=7, size=(1, 1), shift=0, flip=False):
    """A data set whose labels are the examples' own numbers."""

    def split(n):
        images = np.broadcast_to(np.arange(n).reshape(n, 1, 1, 1) % 256, (n, *size, 1))
        return images.astype(np.uint8), np.arange(n)

    return data_lib.Data(
        name="marked",
        classes=examples,
        train_images=split(examples)[0],
        train_labels=split(examples)[1],
        quality_images=split(quality)[0],
        quality_labels=split(quality)[1],
        test_images=split(10)[0],
        test_labels=split(10)[1],
        train_index=np.arange(examples),
        quality_index=np.arange(quality),
        mean=np.float32([0]),
        std=np.float32([1]),
        shift=shift,
        flip=flip,
    )


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        np.array_equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


# Splits.


def test_digits_sizes(digits):
    assert digits.input_shape == (8, 8, 1)
    assert digits.classes == 10
    train, quality, test = (len(digits.split(s)[1]) for s in ("train", "quality", "test"))
    assert train + quality + test == 1797
    assert test == pytest.approx(0.2 * 1797, abs=5)
    assert quality == pytest.approx(0.1 * (train + quality), abs=5)
    for split in ("train", "quality", "test"):
        images, labels = digits.split(split)
        assert images.shape == (len(labels), 8, 8, 1)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64


def test_train_and_quality_share_no_example_and_miss_none(digits):
    both = np.concatenate([digits.train_index, digits.quality_index])
    assert len(set(both)) == len(both) == len(digits.train_labels) + len(digits.quality_labels)
    assert set(both) == set(range(len(both)))


def test_digits_images_belong_to_their_labels(digits):
    """Every image of every split is found in scikit-learn's arrays under the same label."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    known = {(image.astype(np.uint8).tobytes(), label) for image, label in zip(images, labels, strict=True)}
    for split in ("train", "quality", "test"):
        for image, label in zip(*digits.split(split), strict=True):
            assert (image.tobytes(), label) in known


def test_test_split_does_not_depend_on_the_seed_and_quality_does(digits):
    other = data_lib.load("digits", seed=1)
    assert np.array_equal(other.test_images, digits.test_images)
    assert not np.array_equal(other.quality_index, digits.quality_index)
    again = data_lib.load("digits", seed=0)
    assert np.array_equal(again.quality_index, digits.quality_index)


def test_splits_are_those_that_recorded_results_were_measured_on(digits):
    """Golden values: accuracies of different versions must stay comparable."""
    assert digits.test_labels.sum() == 1613
    assert digits.test_images.sum(dtype=int) == 111461
    assert digits.quality_index[:5].tolist() == [13, 57, 63, 78, 82]


def test_classes_are_held_back_evenly():
    labels = np.repeat([0, 1, 2], [100, 50, 20])
    rest, held = data_lib.stratified_split(labels, 0.1, seed=3)
    assert np.bincount(labels[held]).tolist() == [10, 5, 2]
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(170))


def test_holdout_is_the_share_of_quality():
    half = data_lib.load("digits", holdout=0.5)
    assert len(half.quality_labels) == pytest.approx(len(half.train_labels), abs=10)


def test_mean_and_std_are_those_of_the_stored_training_split(digits):
    stored = np.concatenate([digits.train_images, digits.quality_images]).astype(np.float64)
    assert digits.mean == pytest.approx(stored.mean(), rel=1e-6)
    assert digits.std == pytest.approx(stored.std(), rel=1e-6)
    assert data_lib.load("digits", seed=5, holdout=0.3).mean == digits.mean


def test_normalize_by_hand():
    data = dataclasses.replace(marked(), mean=np.float32([10, 20]), std=np.float32([2, 4]))
    data = dataclasses.replace(data, train_images=np.zeros((1, 1, 3, 2), np.uint8))
    pixels = np.array([[[[10, 20], [12, 20], [4, 28]]]], np.uint8)
    found = data.normalize(pixels).numpy()
    assert found.tolist() == [[[[0, 0], [1, 0], [-3, 2]]]]


# Training batches.


def test_resumed_batches_are_the_same_to_the_bit(digits):
    arguments = {"batch_size": 100, "seed": 3, "total_steps": 30}
    whole = list(data_lib.train_batches(digits, start_step=0, **arguments))
    assert len(whole) == 30  # more than two epochs of 12
    for start in (0, 1, 11, 12, 29, 30):
        assert same(whole[start:], data_lib.train_batches(digits, start_step=start, **arguments))


def test_seed_changes_order_and_augmentation(digits):
    arguments = {"batch_size": 100, "start_step": 0, "total_steps": 3}
    first = data_lib.train_batches(digits, seed=3, **arguments)
    assert same(first, first)
    for other_seed in (4, -3, 2**40):
        other = data_lib.train_batches(digits, seed=other_seed, **arguments)
        assert not any(np.array_equal(a, b) for (_, a), (_, b) in zip(first, other, strict=True))


def test_batches_hold_the_right_images_with_their_labels():
    batches = data_lib.train_batches(marked(200), batch_size=32, seed=0, start_step=0, total_steps=12)
    for images, labels in batches:
        assert images.shape == (32, 1, 1, 1)
        assert np.array_equal(images[:, 0, 0, 0], labels)


def test_an_epoch_repeats_no_example_and_the_next_has_another_order():
    batches = data_lib.train_batches(marked(43), batch_size=10, seed=0, start_step=0, total_steps=12)
    labels = [labels.numpy() for _, labels in batches]
    epochs = [np.concatenate(labels[i : i + 4]) for i in (0, 4, 8)]
    for epoch in epochs:
        assert len(set(epoch)) == 40
    assert not np.array_equal(epochs[0], epochs[1])
    # The three left out are not always the same.
    assert len({frozenset(range(43)) - frozenset(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("examples", [1295, 45_000, 54_000])
def test_orders_of_epochs_do_not_correlate(examples):
    """TF's own index_shuffle fails here: 0.69 between epochs of 45,000 examples."""
    slots = tf.range(examples, dtype=tf.int64)
    orders = [data_lib._shuffled(slots, tf.constant([0, epoch], tf.int64), examples) for epoch in range(4)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(examples))
    for first, second in itertools.combinations([slots, *orders], 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(examples)


def test_without_augmentation_images_are_untouched(digits):
    batches = data_lib.train_batches(digits, batch_size=64, seed=0, start_step=0, total_steps=2, augment=False)
    known = {image.tobytes() for image in digits.normalize(digits.train_images).numpy()}
    for images, _ in batches:
        assert all(image.tobytes() in known for image in images.numpy())


def test_cardinality_is_the_steps_left(digits):
    batches = data_lib.train_batches(digits, batch_size=10, seed=0, start_step=3, total_steps=8)
    assert int(batches.cardinality()) == 5
    assert batches.element_spec[0].shape == (10, 8, 8, 1)
    assert batches.options().autotune.enabled is False


# Augmentation.


def test_shifted_images_by_hand():
    """Two 2x3 images of one channel: 1..6 and 11..16."""
    images = np.array([[[1, 2, 3], [4, 5, 6]], [[11, 12, 13], [14, 15, 16]]], np.uint8)[..., None]
    pixels = data_lib._pixel_table(images)

    def moved(index, down, right, mirrored):
        found = data_lib.shifted_images(
            pixels, tf.constant([index]), tf.constant([down]), tf.constant([right]), tf.constant([mirrored]), (2, 3)
        )
        return found.numpy()[0, :, :, 0].tolist()

    assert moved(0, 0, 0, False) == [[1, 2, 3], [4, 5, 6]]
    assert moved(1, 0, 0, False) == [[11, 12, 13], [14, 15, 16]]
    assert moved(0, 1, 0, False) == [[0, 0, 0], [1, 2, 3]]
    assert moved(0, -1, 0, False) == [[4, 5, 6], [0, 0, 0]]
    assert moved(1, 0, 2, False) == [[0, 0, 11], [0, 0, 14]]
    assert moved(1, 0, -1, False) == [[12, 13, 0], [15, 16, 0]]
    assert moved(0, 0, 0, True) == [[3, 2, 1], [6, 5, 4]]
    assert moved(0, 1, 1, True) == [[0, 0, 0], [0, 3, 2]]
    assert moved(0, 0, 3, False) == [[0, 0, 0], [0, 0, 0]]


def test_shifted_images_handles_each_image_of_a_batch_alone_and_keeps_channels():
    images = np.arange(2 * 2 * 2 * 3).reshape(2, 2, 2, 3).astype(np.uint8) + 1
    found = data_lib.shifted_images(
        data_lib._pixel_table(images),
        tf.constant([1, 0]),
        tf.constant([0, 1]),
        tf.constant([1, 0]),
        tf.constant([False, True]),
        (2, 2),
    ).numpy()
    assert found[0, :, 0].tolist() == [[0, 0, 0]] * 2
    assert np.array_equal(found[0, :, 1], images[1, :, 0])
    assert found[1, 0].tolist() == [[0, 0, 0]] * 2
    assert np.array_equal(found[1, 1], images[0, 0, ::-1])


def test_every_shift_and_both_directions_are_drawn():
    """One bright pixel off the middle of an 8x8 image tells what was done to it."""
    data = marked(500, size=(8, 8), shift=2, flip=True)
    images = np.zeros((500, 8, 8, 1), np.uint8)
    images[:, 4, 2] = 9
    data = dataclasses.replace(data, train_images=images)
    (found, _), *_ = data_lib.train_batches(data, batch_size=500, seed=1, start_step=0, total_steps=1)
    _, y, x, _ = np.nonzero(found.numpy() == 9)
    assert len(y) == 500
    assert sorted(set(y)) == [2, 3, 4, 5, 6]
    # Column 2 moves to 0..4, its mirror image, column 5, to 3..7.
    counts = np.bincount(x, minlength=8)
    assert np.all(counts[:8] > 500 / 10 / 2)
    assert counts[[3, 4]].sum() == pytest.approx(4 / 10 * 500, abs=60)
    assert np.all(np.bincount(y)[2:] > 500 / 5 / 2)


def test_augmentation_depends_on_seed_and_step_alone():
    """All images are the same, so batches differ by their augmentation only."""
    images = np.zeros((64, 8, 8, 1), np.uint8)
    images[:, 4, 2] = 9
    data = dataclasses.replace(marked(64, size=(8, 8), shift=2, flip=True), train_images=images)

    def batches(seed):
        found = data_lib.train_batches(data, batch_size=64, seed=seed, start_step=0, total_steps=3)
        return [images.numpy() for images, _ in found]

    first, other = batches(0), batches(1)
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations([*first, *other], 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, batches(0), strict=True))


def test_shift_without_flip():
    images = np.zeros((300, 8, 8, 1), np.uint8)
    images[:, 4, 2] = 9
    data = dataclasses.replace(marked(300, size=(8, 8), shift=1), train_images=images)
    (found, _), *_ = data_lib.train_batches(data, batch_size=300, seed=1, start_step=0, total_steps=1)
    _, y, x, _ = np.nonzero(found.numpy() == 9)
    assert sorted(set(y)) == [3, 4, 5]
    assert sorted(set(x)) == [1, 2, 3]


# Quality and evaluation.


def test_quality_batches_go_through_the_split_again_and_again():
    batches = data_lib.quality_batches(marked(quality=7), 3, seed=0)
    labels = np.concatenate([labels.numpy() for _, labels in itertools.islice(batches, 14)])
    passes = labels.reshape(6, 7)
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_quality_batches_resume_and_are_larger_than_the_split_if_asked():
    data = marked(quality=7)
    whole = list(itertools.islice(data_lib.quality_batches(data, 10, seed=2), 9))
    assert all(images.shape == (10, 1, 1, 1) for images, _ in whole)
    assert same(whole[4:], itertools.islice(data_lib.quality_batches(data, 10, seed=2, start_batch=4), 5))
    assert not same(whole, itertools.islice(data_lib.quality_batches(data, 10, seed=3), 9))


def test_quality_batches_hold_images_of_the_quality_split(digits):
    known = {image.tobytes() for image in digits.normalize(digits.quality_images).numpy()}
    (images, _), *_ = itertools.islice(data_lib.quality_batches(digits, 32, seed=0), 1)
    assert all(image.tobytes() in known for image in images.numpy())


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 64])
def test_eval_batches_give_every_example_once_in_order(batch_size):
    data = marked(examples=43)
    for split, expected in (("train", 43), ("quality", 7), ("test", 10)):
        batches = list(data_lib.eval_batches(data, split, batch_size))
        assert np.concatenate([labels for _, labels in batches]).tolist() == list(range(expected))
        assert all(len(labels) <= batch_size for _, labels in batches)
        assert all(np.array_equal(images[:, 0, 0, 0], labels) for images, labels in batches)


def test_eval_batches_have_one_size_where_a_divisor_allows():
    assert data_lib.even_batch_size(10_000, 128) == 125
    assert data_lib.even_batch_size(10_000, 100) == 100
    assert data_lib.even_batch_size(360, 64) == 60
    assert data_lib.even_batch_size(359, 64) == 64  # a prime
    assert data_lib.even_batch_size(10, 64) == 64
    spec, _ = data_lib.eval_batches(marked(), "test", 8).element_spec
    assert spec.shape == (5, 1, 1, 1)


# Errors.


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="Unknown data set 'mnist'. Known data sets: digits, fashion_mnist, cifar10"):
        data_lib.load("mnist")


@pytest.mark.parametrize("holdout", [1, -0.1, 2, float("nan")])
def test_holdout_out_of_range(holdout):
    with pytest.raises(ValueError, match="holdout must be at least 0 and below 1"):
        data_lib.load("digits", holdout=holdout)


def test_without_holdout_all_examples_are_for_training():
    data = data_lib.load("digits", holdout=0)
    assert (len(data.train_labels), len(data.quality_labels)) == (1797 - len(data.test_labels), 0)
    with pytest.raises(ValueError, match="Nothing is held back"):
        data_lib.quality_batches(data, 10, seed=0)


def test_holdout_that_leaves_nothing():
    with pytest.raises(ValueError, match="0 for quality"):
        data_lib.load("digits", holdout=0.001)


def test_batch_larger_than_the_split(digits):
    with pytest.raises(ValueError, match=r"batch_size must be 1 to \d+, .*got 2000"):
        data_lib.train_batches(digits, batch_size=2000, seed=0, start_step=0, total_steps=1)


def test_steps_in_the_wrong_order(digits):
    with pytest.raises(ValueError, match="start_step must be 0 to total_steps=5"):
        data_lib.train_batches(digits, batch_size=10, seed=0, start_step=6, total_steps=5)


def test_unknown_split(digits):
    with pytest.raises(ValueError, match="Unknown split 'valid'. Known splits: train, quality, test"):
        data_lib.eval_batches(digits, "valid", 10)


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        data_lib.load("digits")


def test_missing_tfds_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets importlib_resources"):
        data_lib.load("cifar10")


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_missing_data_set_says_how_to_prepare_it(name, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError) as error:
        data_lib.load(name, data_dir=tmp_path)
    message = str(error.value)
    assert f"{name} is not prepared in {tmp_path}" in message
    assert f"tfds.builder('{name}', data_dir='{tmp_path}').download_and_prepare()" in message


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_reads_what_tfds_prepared(file_format, tmp_path, monkeypatch):
    """TFDS's own builder of Fashion-MNIST, fed with 60 generated images."""
    tfds = pytest.importorskip("tensorflow_datasets")
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28, 1), np.uint8)

    def examples(first, last):
        for i in range(first, last):
            yield i, {"image": images[i], "label": i % 10}

    builder = tfds.builder("fashion_mnist", data_dir=str(tmp_path), file_format=file_format)
    splits = {"train": examples(0, 40), "test": examples(40, 60)}
    monkeypatch.setattr(type(builder), "_split_generators", lambda self, dl_manager: splits)
    builder.download_and_prepare()
    data = data_lib.load("fashion_mnist", data_dir=tmp_path, holdout=0.25)
    assert (len(data.train_labels), len(data.quality_labels), len(data.test_labels)) == (30, 10, 20)
    assert data.input_shape == (28, 28, 1)
    assert (data.shift, data.flip) == (2, False)
    label_of = {image.tobytes(): i % 10 for i, image in enumerate(images)}
    for split in ("train", "quality", "test"):
        for image, label in zip(*data.split(split), strict=True):
            assert label_of[image.tobytes()] == label
