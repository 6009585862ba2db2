"""quantize_apply and wrap make the same of whole networks: decisions, costs, outputs to the bit."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
import models
from fliqs_tf._keras import IS_KERAS_3

if IS_KERAS_3:
    pytest.skip("TensorFlow Model Optimization needs tf_keras", allow_module_level=True)

import tensorflow_model_optimization

tfmot = tensorflow_model_optimization.quantization.keras


def mobilenet_v2():
    whole = tf.keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    # Its first five blocks: the other twelve repeat them, and take a minute.
    return tf.keras.Model(whole.input, whole.get_layer("block_5_add").output)


@pytest.mark.parametrize(
    ("make", "space", "layers", "norms"),
    [
        (lambda: models.get("resnet20", input_shape=(8, 8, 3)), "FLIQS-L-FLOAT", 22, 21),
        (mobilenet_v2, "FLIQS-S-INT", 18, 18),
    ],
    ids=["resnet20", "mobilenet_v2"],
)
def test_ten_random_recipes(make, space, layers, norms):
    model = make()
    wrapped = fliqs_tf.wrap(model, space)
    applied = tfmot.quantize_apply(
        tfmot.quantize_annotate_model(model), scheme=fliqs_tf.tfmot.FliqsQuantizeScheme(space)
    )
    kinds = [type(layer).__name__ for layer in applied.layers]
    assert (kinds.count("QuantizeWrapperV2"), kinds.count("BatchNormalization")) == (layers, norms)
    search = fliqs_tf.SearchModel(applied)
    ours, theirs = ([(d.name, d.options, d.layers) for d in m.decisions] for m in (wrapped, search))
    assert ours == theirs and len(ours) == layers
    assert wrapped.sites == search.sites
    generator = np.random.default_rng(1)
    x = generator.normal(size=(2, *model.input_shape[1:])).astype("float32")
    for _ in range(10):
        sample = [generator.integers(len(d.options)) for d in wrapped.decisions]
        recipe = fliqs_tf.Recipe({d.name: d.options[i] for d, i in zip(wrapped.decisions, sample)})
        for cost in (fliqs_tf.costs.bops, fliqs_tf.costs.memory):
            assert cost(search, recipe) == cost(wrapped, recipe) > 0
        wrapped.use_sample(sample)
        search.use_sample(sample)
        np.testing.assert_array_equal(wrapped.network(x), applied(x))
