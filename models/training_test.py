"""Every network trains two steps of a search, with a decision for each of its layers.

pytest models/training_test.py                  # a small one
pytest -m slow models/training_test.py          # all of them, narrow, on small images
pytest -m full models/training_test.py          # all of them at full size: minutes each, gigabytes of memory
"""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
import models
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.graph.model_graph import ModelGraph

# Arguments that make a network small, and its number of layers with kernels. EfficientNets: stem, head, dense, and per
# block 5, of which the first of all have 4 (no expansion); InceptionV3: 94 convolutions and a dense one.
SMALL = {
    "bert": ({"input_shape": (8,), "width": 0.125, "depth": 2, "vocabulary": 50}, 2 * 6 + 2),
    "deit_tiny": ({"input_shape": (32, 32, 3), "classes": 5, "width": 1 / 3, "depth": 1}, 6 + 2),
    "deit_small": ({"input_shape": (32, 48, 3), "classes": 5, "width": 1 / 6, "depth": 1}, 6 + 2),
    "deit_base": ({"input_shape": (32, 32, 1), "classes": 5, "width": 1 / 12, "depth": 1}, 6 + 2),
    "efficientnet_b0": ({"input_shape": (32, 32, 3), "classes": 5}, 3 + 16 * 5 - 1),
    "efficientnet_b1": ({"input_shape": (32, 32, 3), "classes": 5}, 3 + 23 * 5 - 2),
    "efficientnet_b2": ({"input_shape": (32, 32, 3), "classes": 5}, 3 + 23 * 5 - 2),
    "efficientnet_b3": ({"input_shape": (32, 32, 3), "classes": 5}, 3 + 26 * 5 - 2),
    "efficientnet_b4": ({"input_shape": (32, 32, 3), "classes": 5}, 3 + 32 * 5 - 2),
    "gpt": ({"input_shape": (8,), "classes": 20, "width": 0.25, "depth": 2}, 2 * 6 + 1),
    "inception_v3": ({"input_shape": (75, 75, 3), "classes": 5}, 95),
    "mobilenet_v2": ({"input_shape": (32, 32, 3), "classes": 5, "width": 0.25}, 53),
    "resnet8": ({"input_shape": (8, 8, 1), "classes": 5, "width": 0.25}, 10),
    "resnet18": ({"input_shape": (32, 32, 3), "classes": 5, "width": 0.125}, 22),
    "resnet20": ({"input_shape": (8, 8, 1), "classes": 5, "width": 0.25}, 22),
    "resnet50": ({"input_shape": (32, 32, 3), "classes": 5, "width": 0.125}, 54),
}
QUICK = ("deit_tiny",)
NEEDS_KERAS_3 = pytest.mark.skipif(not IS_KERAS_3, reason="keras_hub is for Keras 3")


def marked(name, mark):
    marks = [pytest.mark.slow] * (name not in QUICK) if mark is None else [mark]
    return pytest.param(name, marks=[*marks, *([NEEDS_KERAS_3] if name == "bert" else [])])


def examples(model, count):
    """Inputs and labels that the model takes."""
    rng = np.random.default_rng(0)
    classes = model.output.shape[-1]

    def values(tensor):
        shape = (count, *tensor.shape[1:])
        if str(getattr(tensor.dtype, "name", tensor.dtype)).startswith("int"):
            return rng.integers(0, 2, shape).astype("int32")
        return rng.normal(size=shape).astype("float32")

    return tf.nest.map_structure(values, model.input), rng.integers(0, classes, (count, *model.output.shape[1:-1]))


def two_steps(model):
    keras.utils.set_random_seed(0)
    wrapped = fliqs_tf.wrap(model, "FLIQS-S-INT")
    wrapped.compile(
        keras.optimizers.SGD(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        target_cost="0.625x INT8",
    )
    before = {site.path: site for site in wrapped.sites}
    kernels = {path: layer for path, layer in ModelGraph(wrapped.network).layers if path in before}
    start = {path: [w.copy() for w in layer.get_weights()] for path, layer in kernels.items()}
    x, y = examples(model, 4)
    history = wrapped.fit(x, y, batch_size=2, epochs=1, verbose=0).history
    assert int(wrapped.controller.step) == 2
    assert np.isfinite(history["loss"][0]) and np.isfinite(history["cost"][0])
    unchanged = [
        path
        for path, layer in kernels.items()
        if all(np.array_equal(a, b) for a, b in zip(start[path], layer.get_weights()))
    ]
    assert len(kernels) == len(before) and not unchanged
    return wrapped


@pytest.mark.parametrize("name", [marked(name, None) for name in SMALL])
def test_two_steps_of_a_search(name):
    arguments, layers = SMALL[name]
    wrapped = two_steps(models.get(name, **arguments))
    assert len(wrapped.decisions) == layers
    assert set(wrapped.recipe().formats.values()) <= {"INT4", "INT8", "BF16"}


def test_every_model_is_among_them():
    assert set(SMALL) == set(models.MODELS)


@pytest.mark.parametrize("name", [marked(name, pytest.mark.full) for name in SMALL])
def test_two_steps_at_full_size(name):
    assert len(two_steps(models.get(name)).decisions) > 0
