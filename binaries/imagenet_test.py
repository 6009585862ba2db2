"""The ImageNet stream on a prepared data set of random images, as TensorFlow Datasets stores it."""

import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from binaries import data as datasets
from binaries import imagenet
from binaries.devices import Share

TRAIN, VALID = 40, 7


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    path = tmp_path_factory.mktemp("tfds")
    write(tfds, path)
    return str(path)


def write(tfds, path):
    """A data set of the name, version and features of the real one; the label is the number of the example."""

    def split(count):
        def examples():
            for k in range(count):
                blocks = np.random.default_rng(k).integers(0, 256, (4, 5, 3), np.uint8)
                image = np.kron(blocks, np.ones((16, 16, 1), np.uint8))
                yield {"image": image, "label": k, "file_name": f"{k}.JPEG"}

        signature = {
            "image": tf.TensorSpec((None, None, 3), tf.uint8),
            "label": tf.TensorSpec((), tf.int64),
            "file_name": tf.TensorSpec((), tf.string),
        }
        return tf.data.Dataset.from_generator(examples, output_signature=signature)

    tfds.dataset_builders.store_as_tfds_dataset(
        "imagenet2012",
        version="5.1.0",
        data_dir=str(path),
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=1000),
                "file_name": tfds.features.Text(),
            }
        ),
        split_datasets={"train": split(TRAIN), "validation": split(VALID)},
    )


@pytest.fixture(scope="module")
def stream(directory):
    return datasets.load("imagenet2012", directory, holdout=0.2, image_size=32)


def labels(batches):
    return [y.numpy().tolist() for _, y in batches]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def train(stream, **options):
    return datasets.train_batches(stream, **{"batch_size": 8, "seed": 1, "start_step": 0, "total_steps": 8, **options})


def test_sizes_and_shapes(stream):
    assert (stream.classes, stream.input_shape) == (1000, (32, 32, 3))
    assert [stream.examples(s) for s in ("train", "quality", "test")] == [32, 8, 7]
    images, y = next(iter(train(stream)))
    assert images.shape == (8, 32, 32, 3) and images.dtype == tf.float32 and y.dtype == tf.int64


def test_each_epoch_has_every_example_once_and_none_that_is_held_back(stream):
    batches = labels(train(stream))
    first, second = flat(batches[:4]), flat(batches[4:])
    held = labels(datasets.quality_batches(stream, 4, seed=1).take(4))
    assert sorted(first) == sorted(second) and first != second
    assert sorted(first + held[0] + held[1]) == list(range(TRAIN)) and held[2:] == held[:2]
    assert labels(datasets.quality_batches(stream, 4, seed=1, start_batch=3).take(1)) == [held[1]]
    test = labels(datasets.eval_batches(stream, "test", 5))
    assert [len(batch) for batch in test] == [5, 2] and sorted(flat(test)) == list(range(VALID))


def test_a_run_that_resumes_gets_the_same_bits(stream):
    whole, rest = list(train(stream)), list(train(stream, start_step=5))
    assert len(rest) == 3
    for (x, y), (other, z) in zip(whole[5:], rest):
        np.testing.assert_array_equal(x, other)
        np.testing.assert_array_equal(y, z)


def test_workers_share_the_examples(stream):
    shares = [labels(train(stream, share=Share(i, 1, 2), total_steps=4)) for i in range(2)]
    assert [len(batch) for batch in shares[0] + shares[1]] == [4] * 8
    assert sorted(flat(shares[0] + shares[1])) == sorted(flat(labels(train(stream, total_steps=4))))


def jpeg(image):
    return tf.io.encode_jpeg(image, quality=100)


def test_evaluation_takes_the_centre():
    # Red in the middle 224/256 of the shorter side, blue around it.
    image = np.zeros((64, 96, 3), np.uint8)
    image[..., 2] = 255
    image[4:60, 20:76] = (255, 0, 0)
    out = imagenet.central(jpeg(image), 28).numpy() * imagenet.STD + imagenet.MEAN
    np.testing.assert_allclose(out[2:-2, 2:-2], np.broadcast_to([255, 0, 0], (24, 24, 3)), atol=12)
    assert out.shape == (28, 28, 3)


def test_augmentation_is_a_function_of_its_seed():
    image = jpeg(
        np.kron(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    )
    crops = [imagenet.augmented(image, tf.constant([0, step], tf.int64), 16).numpy() for step in (0, 0, 1, 2)]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2]) and not np.array_equal(crops[2], crops[3])


def test_a_data_set_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="imagenet2012 is not prepared in .*image-net.org"):
        datasets.load("imagenet2012", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_flagfiles_run(directory, tmp_path, name):
    flags = [f"--flagfile=binaries/flags/imagenet_{name}.flags", f"--data_dir={directory}", f"--run_dir={tmp_path}/run"]
    small = ["--image_size=32", "--batch_size=8", "--holdout=0.2", "--epochs=1", "--quality_every=2"]
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, root / "binaries" / "search.py", *flags, *small]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["steps"] == 4 and recipe["flags"]["batch_size"] == 8
    assert abs(recipe["cost"] / recipe["target_cost"] - 1) < 0.05
