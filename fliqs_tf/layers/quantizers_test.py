"""Quantizers: the format that is chosen, ranges of weights and of activations by hand."""

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.layers.quantizers import ActivationQuantizer, WeightQuantizer
from fliqs_tf.numerics import rounding
from fliqs_tf.numerics.rounding import fake_quant

FORMATS = ["INT4", "E4M3", "INT8", "BF16"]
WEIGHT = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)


def steps(quantizer, *amax):
    """Training steps on batches with these largest magnitudes."""
    for a in amax:
        quantizer(tf.constant([0.1, -a]), training=True)


def range_of(quantizer):
    """The amax that the quantizer uses now: where a huge value ends."""
    return float(quantizer(tf.constant([1e30]))[0])


# ---- the chosen format


def test_until_a_search_says_otherwise_the_widest_format():
    quantizer = WeightQuantizer(["BF16", "INT4", "INT8"])
    assert quantizer.space.names[int(quantizer.choice.numpy())] == "BF16"


@pytest.mark.parametrize("make", [WeightQuantizer, ActivationQuantizer])
def test_the_choice_is_an_index_into_the_space(make):
    quantizer = make(FORMATS)
    for i, name in enumerate(quantizer.space.names):
        quantizer.choice.assign(i)
        np.testing.assert_array_equal(quantizer.format_row(), rounding.row(name))


@pytest.mark.parametrize("make", [WeightQuantizer, ActivationQuantizer])
def test_one_format_is_fixed_and_has_nothing_to_choose(make):
    quantizer = make(["INT4"])
    assert quantizer.choice is None
    np.testing.assert_array_equal(quantizer.format_row(), rounding.row("INT4"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_chosen_and_a_fixed_format_give_the_same_bits(name):
    chosen, fixed = WeightQuantizer(FORMATS), WeightQuantizer([name])
    chosen.choice.assign(chosen.space.names.index(name))
    np.testing.assert_array_equal(chosen(WEIGHT), fixed(WEIGHT))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_fixed_format_gives_the_same_bits_in_a_graph(name, jit_compile):
    """What a deployed model runs, against what the search ran."""
    chosen, fixed = WeightQuantizer(FORMATS), WeightQuantizer([name])
    chosen.choice.assign(chosen.space.names.index(name))
    weight = tf.constant(WEIGHT)
    searched = tf.function(lambda w: chosen(w), jit_compile=jit_compile)(weight)
    np.testing.assert_array_equal(tf.function(lambda w: fixed(w), jit_compile=jit_compile)(weight), searched)
    np.testing.assert_array_equal(searched, fake_quant(WEIGHT, name, axis=-1))


def test_formats_change_without_a_new_trace():
    quantizer, traces = WeightQuantizer(FORMATS), []

    @tf.function
    def quantize(x):
        traces.append(1)
        return quantizer(x)

    for i, name in enumerate(quantizer.space.names):
        quantizer.choice.assign(i)
        np.testing.assert_array_equal(quantize(WEIGHT), fake_quant(WEIGHT, name, axis=-1))
    assert len(traces) == 1


def test_nothing_of_a_quantizer_is_trained():
    quantizer = ActivationQuantizer(FORMATS)
    assert quantizer.trainable_variables == []
    assert {v.name.split("/")[-1].split(":")[0] for v in quantizer.variables} >= {"choice", "range"}


# ---- weights


@pytest.mark.parametrize("axes", [(-1,), (-2, -1), (0,), (1,)])
@pytest.mark.parametrize("name", ["INT4", "E2M1", "BF16"])
def test_weights_have_a_scale_per_output_channel(name, axes):
    np.testing.assert_array_equal(WeightQuantizer([name], axes)(WEIGHT), fake_quant(WEIGHT, name, axis=axes))


def test_weights_pass_every_gradient():
    weight = tf.constant(WEIGHT)
    with tf.GradientTape() as tape:
        tape.watch(weight)
        y = WeightQuantizer(["INT4"])(weight)
    assert (tape.gradient(y, weight).numpy() == 1).all()


# ---- the range of activations


def test_the_range_is_the_zero_debiased_moving_average():
    quantizer = ActivationQuantizer(["INT4"], momentum=0.5)
    steps(quantizer, 4.0)
    assert range_of(quantizer) == pytest.approx(4)
    steps(quantizer, 2.0)  # (4 * 0.25 + 2 * 0.5) / 0.75
    assert range_of(quantizer) == pytest.approx(8 / 3)
    steps(quantizer, 8.0)  # (4 * 0.125 + 2 * 0.25 + 8 * 0.5) / 0.875
    assert range_of(quantizer) == pytest.approx(40 / 7)


def test_the_default_momentum():
    quantizer = ActivationQuantizer(["INT4"])
    steps(quantizer, 4.0, 2.0, 8.0)
    w = np.array([0.99**2, 0.99, 1.0])
    assert range_of(quantizer) == pytest.approx(np.average([4, 2, 8], weights=w), rel=1e-5)


def test_training_uses_the_range_that_holds_the_batch():
    quantizer = ActivationQuantizer(["INT4"], momentum=0.5)
    steps(quantizer, 4.0)
    x = tf.constant([0.7, 1.9, -2.0])  # amax: (4 * 0.25 + 2 * 0.5) / 0.75
    np.testing.assert_allclose(quantizer(x, training=True), fake_quant(x, "INT4", amax=2 / 0.75), rtol=1e-6)


def test_inference_uses_the_range_and_moves_nothing():
    quantizer = ActivationQuantizer(["INT4"], momentum=0.5)
    steps(quantizer, 7.0)
    before = quantizer.range.numpy().tolist()
    assert quantizer(tf.constant([0.4, 2.6, -100.0])).numpy().tolist() == [0, 3, -7]
    assert quantizer.range.numpy().tolist() == before


def test_before_any_training_the_range_is_the_batchs_own():
    quantizer = ActivationQuantizer(["INT4"])
    x = tf.constant([0.4, 2.6, -14.0])
    np.testing.assert_array_equal(quantizer(x), fake_quant(x, "INT4"))
    assert quantizer.range.numpy().tolist() == [0, 0]


def test_a_batch_of_zeros_is_a_batch():
    quantizer = ActivationQuantizer(["INT4"], momentum=0.5)
    assert quantizer(tf.zeros(3), training=True).numpy().tolist() == [0, 0, 0]
    steps(quantizer, 6.0)  # (0 * 0.25 + 6 * 0.5) / 0.75
    assert range_of(quantizer) == pytest.approx(4)


def test_a_frozen_quantizer_keeps_a_range_that_has_settled():
    quantizer = ActivationQuantizer(["INT4"], momentum=0.5)
    steps(quantizer, 4.0)
    quantizer.trainable = False
    steps(quantizer, 8.0)
    assert range_of(quantizer) == pytest.approx(4)


def test_all_formats_share_the_range():
    quantizer = ActivationQuantizer(FORMATS, momentum=0.5)
    for i, amax in enumerate([4.0, 2.0, 8.0]):
        quantizer.choice.assign(i)
        steps(quantizer, amax)
    assert range_of(quantizer) == pytest.approx(40 / 7)


def test_momentum_0_is_the_last_batch():
    quantizer = ActivationQuantizer(["INT4"], momentum=0.0)
    steps(quantizer, 4.0, 3.0)
    assert range_of(quantizer) == pytest.approx(3)


def test_clip_cuts_the_largest_values_and_their_gradient():
    quantizer = ActivationQuantizer(["INT4"], momentum=0.0, clip=0.5)
    x = tf.constant([0.4, 2.6, -14.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = quantizer(x, training=True)
    assert y.numpy().tolist() == [0, 3, -7]
    assert tape.gradient(y, x).numpy().tolist() == [1, 1, 0]


def test_the_largest_value_of_the_first_batch_is_not_clipped():
    """Its range is its own amax, to the bit, whatever the momentum."""
    for momentum in (0.99, 0.9, 0.7):
        for amax in np.random.default_rng(0).uniform(0.1, 9, 20).astype(np.float32):
            quantizer = ActivationQuantizer(["INT4"], momentum=momentum)
            x = tf.constant([0.1, -amax])
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = quantizer(x, training=True)
            assert tape.gradient(y, x).numpy().tolist() == [1, 1]


@pytest.mark.parametrize(
    "options, why",
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0.1"),
        ({"momentum": float("nan")}, r"momentum must be in \[0, 1\), got nan"),
        ({"clip": 0.0}, r"clip must be in \(0, 1\], got 0.0"),
        ({"clip": 1.5}, r"clip must be in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_options_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        ActivationQuantizer(["INT4"], **options)


# ---- saving


@pytest.mark.parametrize(
    "quantizer",
    [
        WeightQuantizer(FORMATS, (-2, -1), name="of_weights"),
        WeightQuantizer(["INT8"]),
        ActivationQuantizer(FORMATS, momentum=0.9, clip=0.75, name="of_input"),
    ],
)
def test_configuration_round_trips(quantizer):
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(quantizer))
    assert type(copy) is type(quantizer)
    assert copy.get_config() == quantizer.get_config()
    assert copy.space == quantizer.space


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("rectified", [False, True])
def test_the_gradient_is_masked_in_the_batches_that_exceed_the_range_and_only_there(graph, rectified):
    quantizer = ActivationQuantizer(["INT8"], momentum=0.5)
    scale = tf.constant([1.0, 2.0, 3.0, 4.0])

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.nn.relu(x) if rectified else x
            loss = tf.reduce_sum(quantizer.call(y, training=True) * scale)
        return tape.gradient(loss, x)

    gradient = tf.function(gradient) if graph else gradient
    # Ranges after the batches: 2; (0.25 * 2 + 0.5 * 5) / 0.75 = 4; (0.125 * 2 + 0.25 * 5 + 0.5 * 1) / 0.875 = 2.29.
    for batch, passes in ([0.5, 1, 1.5, 2], [1, 1, 1, 1]), ([5, 3.9, 4.1, 1], [0, 1, 0, 1]), ([1, 1, 1, 1], [1] * 4):
        x = tf.constant(batch, tf.float32)
        np.testing.assert_array_equal(gradient(x), scale * tf.constant(passes, tf.float32))


def test_values_below_zero_count_unless_a_relu_cut_them_off():
    quantizers = [ActivationQuantizer(["INT8"]) for _ in range(2)]

    @tf.function
    def call(x):
        quantizers[0].call(tf.nn.relu(x), training=True)
        quantizers[1].call(x, training=True)

    call(tf.constant([-7.0, 1.0, 3.0]))
    np.testing.assert_allclose([q.range[0] for q in quantizers], [3.0, 7.0], rtol=1e-6)
