"""MACs and weight counts of every layer class, by hand."""

import pytest
import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.graph import layer_types, tracing
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.quantize import network

L = keras.layers


def model_of(layer, *input_shape):
    inputs = keras.Input(input_shape)
    return keras.Model(inputs, layer(inputs))


def counted(model, input_shape=None):
    return {t.path: (t.macs, t.weights) for t in tracing.trace(ModelGraph(model), input_shape)}


LAYERS = {
    "Dense": (lambda: L.Dense(5), (4,), 4 * 5, 4 * 5),
    "Dense on a sequence": (lambda: L.Dense(5), (7, 4), 7 * 4 * 5, 4 * 5),
    "Dense on a grid": (lambda: L.Dense(5), (2, 3, 4), 2 * 3 * 4 * 5, 4 * 5),
    "Conv1D": (lambda: L.Conv1D(5, 3), (10, 4), 8 * 3 * 4 * 5, 3 * 4 * 5),
    "Conv1D causal": (lambda: L.Conv1D(5, 3, padding="causal"), (10, 4), 10 * 3 * 4 * 5, 3 * 4 * 5),
    "Conv1D strided": (lambda: L.Conv1D(5, 3, strides=2, padding="same"), (9, 4), 5 * 3 * 4 * 5, 3 * 4 * 5),
    "Conv2D valid": (lambda: L.Conv2D(5, 3), (8, 10, 4), 6 * 8 * 9 * 4 * 5, 9 * 4 * 5),
    "Conv2D same": (lambda: L.Conv2D(5, (3, 2), padding="same"), (8, 10, 4), 8 * 10 * 6 * 4 * 5, 6 * 4 * 5),
    "Conv2D strided": (lambda: L.Conv2D(5, 3, strides=2, padding="same"), (9, 8, 4), 5 * 4 * 9 * 4 * 5, 9 * 4 * 5),
    "Conv2D in groups": (lambda: L.Conv2D(6, 3, groups=2), (8, 8, 4), 36 * 9 * 2 * 6, 9 * 2 * 6),
    "Conv2D dilated": (lambda: L.Conv2D(5, 3, dilation_rate=2), (8, 8, 4), 16 * 9 * 4 * 5, 9 * 4 * 5),
    "Conv2D channels first": (
        lambda: L.Conv2D(5, 3, data_format="channels_first"),
        (4, 8, 10),
        6 * 8 * 9 * 4 * 5,
        9 * 4 * 5,
    ),
    "DepthwiseConv2D": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 4), 36 * 9 * 4 * 2, 9 * 4 * 2),
    "SeparableConv2D": (
        lambda: L.SeparableConv2D(5, 3, depth_multiplier=2, padding="same"),
        (8, 8, 4),
        64 * 8 * 9 + 64 * 8 * 5,
        9 * 8 + 8 * 5,
    ),
    "SeparableConv2D strided": (
        lambda: L.SeparableConv2D(5, 3, strides=2, padding="same"),
        (8, 8, 4),
        16 * 4 * 9 + 16 * 4 * 5,
        9 * 4 + 4 * 5,
    ),
    # Every input entry meets the whole window of every filter.
    "Conv2DTranspose": (
        lambda: L.Conv2DTranspose(5, 3, strides=2, padding="same"),
        (4, 6, 2),
        4 * 6 * 2 * 9 * 5,
        9 * 2 * 5,
    ),
    "EinsumDense as Dense": (lambda: L.EinsumDense("ab,bc->ac", 5), (4,), 4 * 5, 4 * 5),
    "EinsumDense per position": (
        lambda: L.EinsumDense("...x,xy->...y", output_shape=5),
        (7, 4),
        7 * 4 * 5,
        4 * 5,
    ),
    "EinsumDense into heads": (
        lambda: L.EinsumDense("abc,cde->abde", output_shape=(7, 2, 3)),
        (7, 4),
        7 * 4 * 2 * 3,
        4 * 2 * 3,
    ),
    "EinsumDense out of heads": (
        lambda: L.EinsumDense("abcd,cde->abe", output_shape=(7, 5)),
        (7, 2, 3),
        7 * 2 * 3 * 5,
        2 * 3 * 5,
    ),
    "EinsumDense with a weight per position": (
        lambda: L.EinsumDense("abc,bcd->abd", output_shape=(7, 5)),
        (7, 4),
        7 * 4 * 5,
        7 * 4 * 5,
    ),
}


@pytest.mark.parametrize("make, input_shape, macs, weights", LAYERS.values(), ids=LAYERS)
def test_a_layer_by_hand_also_when_it_is_quantized(make, input_shape, macs, weights):
    model = model_of(make(), *input_shape)
    assert list(counted(model).values()) == [(macs, weights)]
    assert counted(network.quantized_network(ModelGraph(model), ["INT4", "INT8"]).model) == counted(model)


@pytest.mark.parametrize(
    "make, axes",
    [
        (lambda: L.Dense(5), [("kernel", (-1,))]),
        (lambda: L.Conv2D(5, 3), [("kernel", (-1,))]),
        (lambda: L.Conv2DTranspose(5, 3), [("kernel", (-2,))]),
        (lambda: L.EinsumDense("abc,cde->abde", output_shape=(7, 2, 3)), [("kernel", (1, 2))]),
        (lambda: L.EinsumDense("abcd,cde->abe", output_shape=(7, 5)), [("kernel", (2,))]),
        (lambda: L.EinsumDense("...x,xy->...y", output_shape=5), [("kernel", (1,))]),
        (lambda: L.SeparableConv2D(5, 3), [("depthwise_kernel", (-2, -1)), ("pointwise_kernel", (-1,))]),
        (lambda: L.LSTM(3), []),
        (lambda: L.ReLU(), []),
    ],
)
def test_kernels_and_their_output_channels(make, axes):
    assert [(k.attribute, k.channel_axes) for k in layer_types.kernels(make())] == axes


def test_a_subclass_of_a_known_layer_is_not_known():
    class Twice(L.Dense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    model = model_of(Twice(3, name="twice"), 4)
    assert counted(model) == {}
    assert [path for path, _ in network.left_in_float(ModelGraph(model))] == ["twice"]


def test_a_shared_layer_counts_every_call_and_its_weights_once():
    shared = L.Conv2D(4, 3, padding="same", name="shared")
    inputs = keras.Input((8, 8, 4))
    small = shared(L.MaxPooling2D()(shared(inputs)))
    assert counted(keras.Model(inputs, small)) == {"shared": ((64 + 16) * 9 * 4 * 4, 9 * 4 * 4)}


def nested():
    shared = L.Dense(3, name="shared")
    inner_inputs = keras.Input((3,))
    inner = keras.Model(inner_inputs, L.Dense(3, name="fc")(shared(inner_inputs)), name="inner")
    middle = keras.Sequential([keras.Input((3,)), inner, L.Dense(3, name="fc")], name="middle")
    inputs = keras.Input((3,))
    return keras.Model(inputs, L.Dense(2, name="fc")(shared(middle(middle(inputs)))))


def test_nested_models_have_paths_and_every_call_counts():
    assert counted(nested()) == {
        "middle/inner/shared": (3 * 9, 9),
        "middle/inner/fc": (2 * 9, 9),
        "middle/fc": (2 * 9, 9),
        "fc": (6, 6),
    }


class Held(keras.Model):
    """Layers in every kind of place, one of them in two."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = L.Dense(3)
        self.second = L.Dense(3, name="given")
        self.listed = [L.Dense(3), [L.Dense(3, name="twice"), L.Dense(3, name="twice")]]
        self.named = {"left": (L.Dense(3), L.ReLU()), "right": self.first}
        self.inner = keras.Sequential([L.Dense(3, name="fc")], name="inner")

    def call(self, x):
        for layer in (self.first, self.second, self.listed[0], *self.listed[1], *self.named["left"], self.inner):
            x = layer(x)
        return self.named["right"](x)


HELD = ["first", "given", "listed/0", "listed/1/0", "listed/1/1", "named/left/0", "inner/fc"]


def test_layers_that_a_layer_holds_go_by_given_names_or_by_where_they_are():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, L.Dense(2, name="out")(Held(name="block")(inputs)), name="net")
    calls = {path: 2 if path == "first" else 1 for path in HELD}
    assert counted(model) == {**{f"block/{path}": (9 * n, 9) for path, n in calls.items()}, "out": (6, 6)}


def test_a_network_that_is_nothing_but_one_layer_adds_nothing_to_paths():
    inputs = keras.Input((3,))
    alone = keras.Model(inputs, Held(name="net")(inputs), name="net")
    assert list(counted(alone)) == HELD
    assert [path for path, layer in ModelGraph(Held()).layers if layer_types.kernels(layer)] == HELD
    assert ModelGraph(Held()).with_kernels == ()  # nothing is built yet


def attention(**options):
    inputs, memory = keras.Input((197, 6)), keras.Input((50, 4))
    return keras.Model([inputs, memory], L.MultiHeadAttention(2, 3, name="attention", **options)(inputs, memory))


def test_attention_counts_its_projections_at_every_token():
    assert counted(attention(value_dim=5, output_shape=7)) == {
        "attention/query": (197 * 6 * 2 * 3, 6 * 2 * 3),
        "attention/key": (50 * 4 * 2 * 3, 4 * 2 * 3),
        "attention/value": (50 * 4 * 2 * 5, 4 * 2 * 5),
        "attention/attention_output": (197 * 2 * 5 * 7, 2 * 5 * 7),
    }


def test_sizes_that_are_known_only_when_the_model_runs():
    inputs = keras.Input((8, 6))
    pairs = L.Lambda(lambda x: tf.boolean_mask(x, tf.ones(tf.shape(x)[:2], tf.bool)), output_shape=(6,))(inputs)
    model = keras.Model(inputs, L.Dense(5, name="fc")(pairs))
    assert counted(model) == {"fc": (8 * 6 * 5, 6 * 5)}


@pytest.mark.parametrize(
    "input_shape, why",
    [
        ((9, 9), r"input_shape \(9, 9\) does not fit model 'net', which takes \(8, 8, 3\)"),
        ((9, 9, 3), "does not fit model 'net'"),
        ([(8, 8, 3), (2,)], "does not fit model 'net'"),
        ("large", "A shape is a list of sizes.*Got 'large'"),
    ],
)
def test_input_shapes_that_do_not_fit(input_shape, why):
    inputs = keras.Input((8, 8, 3), name="image")
    model = keras.Model(inputs, L.Conv2D(2, 3)(inputs), name="net")
    with pytest.raises(ValueError, match=why):
        tracing.trace(ModelGraph(model), input_shape)


def test_examples_that_became_rows_count_as_parts_of_an_example():
    """A window attention folds its windows into the batch axis."""
    inputs = keras.Input((8, 6))
    windows = L.Lambda(lambda x: tf.reshape(x, (-1, 2, 6)))(inputs)
    model = keras.Model(inputs, L.Dense(5, name="fc")(windows))
    assert counted(model) == {"fc": (8 * 6 * 5, 6 * 5)}


def test_sequential_models():
    model = keras.Sequential([keras.Input((4,)), L.Dense(5, name="a"), L.ReLU(), L.Dense(2, name="b")])
    assert counted(model) == {"a": (20, 20), "b": (10, 10)}
    unbuilt = keras.Sequential([L.Dense(5, name="a")])
    unbuilt.build((None, 4))
    assert counted(unbuilt) == {"a": (20, 20)}


@pytest.mark.parametrize("pack", [list, dict])
def test_several_inputs(pack):
    late, early = keras.Input((4,), name="z"), keras.Input((5,), name="a")
    outputs = L.Add()([L.Dense(2, name="of_z")(late), L.Dense(2, name="of_a")(early)])
    inputs = {"z": late, "a": early} if pack is dict else [late, early]
    assert counted(keras.Model(inputs, outputs)) == {"of_z": (8, 8), "of_a": (10, 10)}


def test_integer_inputs():
    inputs = keras.Input((7,), dtype="int32")
    model = keras.Model(inputs, L.Dense(2, name="fc")(L.Embedding(10, 3, name="emb")(inputs)))
    assert counted(model) == {"fc": (7 * 6, 6)}


def test_an_open_size_needs_the_input_shape():
    model = model_of(L.Conv2D(5, 3, padding="same", name="conv"), None, None, 4)
    with pytest.raises(ValueError, match=r"open shape \(None, None, 4\).*input_shape=\(224, 224, 3\)"):
        tracing.trace(ModelGraph(model))
    assert counted(model, (8, 10, 4)) == {"conv": (80 * 9 * 4 * 5, 9 * 4 * 5)}
    assert counted(model, [2, 2, 4]) == {"conv": (4 * 9 * 4 * 5, 9 * 4 * 5)}


def test_open_sizes_of_several_inputs():
    inputs = [keras.Input((None, 4), name="a"), keras.Input((None, 3), name="b")]
    model = keras.Model(inputs, [L.Dense(2, name="of_a")(inputs[0]), L.Dense(2, name="of_b")(inputs[1])])
    assert counted(model, [(5, 4), (6, 3)]) == {"of_a": (5 * 8, 8), "of_b": (6 * 6, 6)}


def test_layers_that_multiply_but_are_not_known_are_listed():
    inputs = keras.Input((7,), dtype="int32")
    x = L.Embedding(10, 4, name="embedding")(inputs)
    x = L.LSTM(4, return_sequences=True, name="lstm", trainable=False)(x)
    x = L.LayerNormalization(name="norm")(x)
    x = L.TimeDistributed(L.Dense(4), name="distributed")(x)
    x = L.BatchNormalization(name="bn")(L.Dropout(0.1)(L.ReLU()(x)))
    model = keras.Model(inputs, L.Dense(2, name="fc")(x))
    in_float = ["embedding", "lstm", "distributed"]
    assert [path for path, _ in network.left_in_float(ModelGraph(model))] == in_float
    assert [path for path, _ in ModelGraph(model).with_kernels] == ["fc"]
    assert [
        path for path, _ in network.left_in_float(network.quantized_network(ModelGraph(model), ["INT4", "INT8"]))
    ] == in_float


def test_tracing_leaves_the_model_as_it_was():
    model = model_of(L.Dense(5, name="fc"), 4)
    layer = model.get_layer("fc")
    before = model(tf.ones((2, 4))).numpy()
    tracing.trace(ModelGraph(model))
    assert "call" not in vars(layer)
    assert (model(tf.ones((2, 4))).numpy() == before).all()


def test_calls_are_put_back_when_the_model_fails():
    layer = L.Dense(5)
    with pytest.raises(RuntimeError, match="stop"), tracing.overridden_calls({layer: lambda x: x}):
        assert layer.call(3) == 3
        raise RuntimeError("stop")
    assert "call" not in vars(layer)
