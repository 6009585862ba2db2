"""Ranges: who follows the data when, and what data sets without training; amax by hand."""

import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf import export
from fliqs_tf._keras import keras
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import quantizers, ranges
from fliqs_tf.layers.quantizers import ActivationQuantizer

L = keras.layers


def rows(*largest):
    """An example for each number, of which that is the largest magnitude."""
    return np.stack([np.linspace(-a, a / 2, 4) for a in largest]).astype(np.float32)


def network():
    model = keras.Sequential([L.Input((4,)), L.Dense(5, activation="relu", name="a"), L.Dense(2, name="b")])
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(-1, 1, w.shape) for w in model.get_weights()])
    return model


class Whole(keras.Model):
    """A base that is called for inference, whatever is trained, under both Kerases."""

    def __init__(self, name=None):
        super().__init__(name=name)
        self.base = network()
        self.head = L.Dense(1, name="head")

    def call(self, x, training=None):
        return self.head(self.base(x, training=False))

    def get_config(self):
        return {"name": self.name}


def whole():
    keras.utils.set_random_seed(3)
    model = Whole()
    model(tf.zeros((1, 4)))
    return model


def amax(model, path="a"):
    """(amax, weight) of the input of a layer."""
    quantized = dict(ModelGraph(getattr(model, "network", model)).layers)[path]
    return np.asarray(quantized.activation_quantizer.range).tolist()


def is_independent(model):
    """True if what becomes of an example does not depend on its batch."""
    x = rows(1, 2, 70)
    return np.array_equal(model(x)[:1], model(x[:1]))


def searched(qmodel, steps=3):
    x = rows(*range(1, 1 + 2 * steps))
    qmodel.compile(keras.optimizers.SGD(1e-3), "mse", target_cost="0.6x INT8", controller={"jit_compile": False})
    qmodel.fit(x, np.zeros((len(x), 1)), batch_size=2, shuffle=False, verbose=0)
    return qmodel


# ---- in training


@pytest.fixture(scope="module")
def qmodel():
    return searched(fliqs_tf.wrap(whole(), ["INT4", "INT8"]))


def test_layers_called_for_inference_learn_in_a_step_of_a_search(qmodel):
    # Batches of amax 2, 4 and 6 with the weights 0.99^2, 0.99, 1.
    weights = np.array([0.99**2, 0.99, 1])
    path = next(path for path, _ in ModelGraph(qmodel.network).layers if path.endswith("a"))
    assert amax(qmodel, path) == pytest.approx([np.average([2, 4, 6], weights=weights), 0.01 * weights.sum()], rel=1e-4)
    assert ranges.unseen(qmodel.network) == {}
    assert is_independent(qmodel) and is_independent(qmodel.deploy())


def test_outside_of_a_step_inference_moves_nothing():
    quantizer = ActivationQuantizer(["INT4"])
    x = tf.constant([0.1, -3.0])
    quantizer(x, training=False)
    assert quantizer.range.numpy().tolist() == [0, 0]
    with quantizers.training_step():
        quantizer(x, training=False)
    assert quantizer.range.numpy() == pytest.approx([3, 0.01], rel=1e-5)
    quantizer(2 * x, training=False)
    assert quantizer.range.numpy() == pytest.approx([3, 0.01], rel=1e-5)


def test_a_step_is_over_after_an_error():
    quantizer = ActivationQuantizer(["INT4"])
    with pytest.raises(RuntimeError), quantizers.training_step():
        raise RuntimeError
    quantizer(tf.constant([3.0]), training=False)
    assert quantizer.range.numpy().tolist() == [0, 0]


def test_a_reading_of_quality_moves_no_range(qmodel):
    before = [np.array(q.range) for _, q in ranges.activation_quantizers(qmodel.network)]
    qmodel.read_quality((rows(90), np.zeros((1, 1), np.float32)), np.zeros(len(qmodel.decisions), np.int32))
    for (_, quantizer), value in zip(ranges.activation_quantizers(qmodel.network), before):
        np.testing.assert_array_equal(quantizer.range, value)


@pytest.mark.parametrize("momentum, steps", [(0.5, 1), (0.8, 4), (0.99, 69)])
def test_a_frozen_quantizer_learns_until_its_range_has_settled(momentum, steps):
    """Its weight is 1 - momentum^steps: half of what there is after so many."""
    quantizer = ActivationQuantizer(["INT4"], momentum=momentum)
    quantizer.trainable = False
    learn = tf.function(lambda x: quantizer(x, training=True))
    for _ in range(steps):
        learn(tf.constant([2.0, -4.0]))
    assert quantizer.range.numpy() == pytest.approx([4, 1 - momentum**steps], rel=1e-4)
    before = quantizer.range.numpy().tolist()
    np.testing.assert_allclose(learn(tf.constant([8.0, 1.0]))[0], 4, rtol=1e-5)  # saturates at the range that it keeps
    assert quantizer.range.numpy().tolist() == before


def frozen_after_wrap():
    qmodel = fliqs_tf.wrap(keras.Sequential([L.Input((4,)), network(), L.Dense(1, name="head")]), ["INT4", "INT8"])
    for path, layer in ModelGraph(qmodel.network).layers:
        layer.trainable = path == "head"
    return qmodel


def test_layers_frozen_after_wrap_learn_their_ranges():
    qmodel = frozen_after_wrap()
    kernel = np.array(qmodel.network.get_weights()[0])
    searched(qmodel)
    np.testing.assert_array_equal(qmodel.network.get_weights()[0], kernel)
    assert ranges.unseen(qmodel.network) == {}
    assert is_independent(qmodel) and is_independent(qmodel.deploy())


def test_and_in_a_fit_of_keras():
    fixed = fliqs_tf.apply(network(), "INT4")
    fixed.trainable = False
    fixed.compile("sgd", "mse")
    fixed.fit(rows(1, 2, 3, 4), np.zeros((4, 2)), batch_size=2, shuffle=False, verbose=0)
    assert amax(fixed) == pytest.approx([(0.99 * 2 + 4) / 1.99, 0.0199], rel=1e-4)
    assert is_independent(fixed)


def test_a_range_follows_where_only_the_layer_inside_is_frozen():
    fixed = fliqs_tf.apply(network(), "INT4")
    layer = fixed.get_layer("a")
    layer.activation_quantizer.range.assign([4.0, 1.0])
    layer.quantized_layer.trainable = False
    fixed(rows(8), training=True)
    assert amax(fixed)[0] == pytest.approx(4 * 0.99 + 8 * 0.01)
    layer.trainable = False
    fixed(rows(100), training=True)
    assert amax(fixed)[0] == pytest.approx(4 * 0.99 + 8 * 0.01)


# ---- without training


def test_calibration_is_the_average_of_the_batches_in_float():
    fixed = fliqs_tf.apply(network(), "INT2")
    batches = [rows(1, 3), rows(6)]
    assert not is_independent(fixed)
    assert ranges.calibrate(fixed, batches) == 2
    assert amax(fixed, "a") == pytest.approx([(0.99 * 3 + 6) / 1.99, 0.0199], rel=1e-5)
    # The input of "a" passes unrounded, its weights are those of the format.
    layer = fixed.get_layer("a")
    kernel = fliqs_tf.fake_quant(np.array(layer.quantized_layer.kernel), "INT2", axis=-1).numpy()
    hidden = [np.maximum(x @ kernel + np.array(layer.quantized_layer.bias), 0).max() for x in batches]
    assert amax(fixed, "b")[0] == pytest.approx((0.99 * hidden[0] + hidden[1]) / 1.99, rel=1e-5)
    assert is_independent(fixed)


def test_only_what_no_data_has_set_unless_asked():
    fixed = fliqs_tf.apply(network(), "INT4")
    fixed.get_layer("a").activation_quantizer.range.assign([5.0, 1.0])
    ranges.calibrate(fixed, [rows(9)])
    assert amax(fixed) == [5, 1] and amax(fixed, "b")[1] > 0
    ranges.calibrate(fixed, [rows(9)], only_unseen=False)
    assert amax(fixed)[0] == pytest.approx(5 * 0.99 + 9 * 0.01)

    def never():
        raise AssertionError
        yield

    assert ranges.calibrate(fixed, never()) == 0


def test_open_formats_do_not_round_meanwhile():
    qmodel = fliqs_tf.wrap(network(), ["INT2", "INT8"])
    qmodel.use_sample([0, 0])
    ranges.calibrate(qmodel.network, [rows(3)])
    hidden = network().layers[0](rows(3))
    assert amax(qmodel, "b")[0] == pytest.approx(float(tf.reduce_max(hidden)), rel=1e-5)
    assert is_independent(qmodel)
    for _, quantizer in ranges.activation_quantizers(qmodel.network):
        assert "call" not in vars(quantizer)


def attention():
    inputs = keras.Input((3, 4))
    return keras.Model(inputs, L.MultiHeadAttention(1, 4, name="mha")(inputs, inputs))


def test_every_kind_of_quantizer():
    fixed = fliqs_tf.apply(attention(), "INT8", attention_scores=True)
    names = list(ranges.unseen(fixed))
    assert "the stationary operand of 'mha/scores'" in names and "the moving operand of 'mha/context'" in names
    ranges.calibrate(fixed, [np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)])
    assert ranges.unseen(fixed) == {}
    separable = keras.Sequential([L.Input((4, 4, 1)), L.SeparableConv2D(2, 3, name="conv")])
    fixed = fliqs_tf.apply(separable, "INT8")
    assert list(ranges.unseen(fixed)) == ["the input of 'conv'", "the one inside 'conv'"]
    ranges.calibrate(fixed, [np.ones((1, 4, 4, 1), np.float32)])
    assert ranges.unseen(fixed) == {}
    assert ranges.unseen(fliqs_tf.apply(network(), "BF16")) == {}  # casts need none


@pytest.mark.parametrize("target", [None, "tflite"])
def test_apply_takes_data_for_it(target):
    data = tf.data.Dataset.from_tensor_slices((rows(1, 2, 3, 4), np.zeros((4, 2)))).batch(2)
    fixed = fliqs_tf.apply(network(), "INT8", target=target, calibration_data=data)
    assert amax(fixed) == pytest.approx([(0.99 * 2 + 4) / 1.99, 0.0199], rel=1e-5)
    assert ranges.unseen(fixed) == {} and is_independent(fixed)
    endless = data.repeat()
    assert amax(fliqs_tf.apply(network(), "INT8", calibration_data=endless))[1] == pytest.approx(1 - 0.99**32, rel=1e-4)


@pytest.mark.parametrize("data, why", [(rows(1, 2)[:, :3], r"has inputs of shape \(2, 3\)"), ([], "has no batch")])
def test_what_is_no_calibration_data(data, why):
    with pytest.raises(ValueError, match=f"calibration_data {why}"):
        fliqs_tf.apply(network(), "INT8", calibration_data=data)


def test_a_base_called_for_inference_needs_data_before_a_fit_of_keras(tmp_path):
    def fitted(**options):
        fixed = fliqs_tf.apply(whole(), "INT8", **options)
        fixed.compile("sgd", "mse")
        fixed.fit(rows(1, 2, 3, 4), np.zeros((4, 1)), verbose=0)
        return fixed

    assert not is_independent(fitted())
    fixed = fitted(calibration_data=[rows(1, 2), rows(3, 4)])
    assert is_independent(fixed)
    with pytest.raises(ValueError, match="has seen no data: train .* or give fliqs_tf.apply calibration_data="):
        export.onnx(fliqs_tf.apply(network(), "INT8"), tmp_path / "file.onnx")
    export.onnx(fliqs_tf.apply(network(), "INT8", calibration_data=[rows(1, 2)]), tmp_path / "file.onnx")
