"""TFLite files against the Keras models that they are made from."""

import functools

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.export import deployed, tflite_writer
from fliqs_tf.graph.model_graph import ModelGraph
from fliqs_tf.layers import shared_ranges
from fliqs_tf.layers.quantizers import ActivationQuantizer
from fliqs_tf.layers.requantize import AccumulatorRounding

L = keras.layers


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    keras.utils.set_random_seed(0)


def examples(n, *shape, seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def conv(filters, size=3, **options):
    return L.Conv2D(filters, size, **options)


def normalized(x):
    return L.BatchNormalization()(x)


# ---- small networks, one idea each: {name: (input shapes, function of the inputs)}


def chain(x):
    x = L.ReLU()(normalized(conv(6, padding="same", use_bias=False)(x)))
    return L.Dense(5)(L.Flatten()(conv(4, strides=2, activation="relu")(x)))


def depthwise(x):
    x = L.ReLU(6.0)(normalized(L.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)(x)))
    return conv(4, 1)(x)


def separable(x):
    return L.SeparableConv2D(5, 3, padding="same", activation="relu")(x)


def residual(x):
    y = L.ReLU()(conv(4, padding="same")(x))
    z = normalized(conv(4, padding="same")(y))
    return L.Dense(3)(L.GlobalAveragePooling2D()(L.ReLU()(L.Add()([y, z]))))


def linear_bottleneck(x):
    y = normalized(conv(4, 1)(x))
    z = normalized(conv(4, 1)(L.ReLU(6.0)(normalized(conv(8, 1)(y)))))
    return conv(3, 1)(L.Add()([y, z]))


def concatenated(x):
    y, z = L.ReLU()(conv(3, padding="same")(x)), conv(2, 1)(x)
    y = L.Concatenate()([y, z])
    return L.Concatenate()([conv(3, 1)(y), conv(2, padding="same")(y)])


def pooled(x):
    x = L.MaxPooling2D(2, padding="same")(conv(4, dilation_rate=2)(x))
    x = L.AveragePooling2D(2)(conv(4, padding="same", activation="relu")(x))
    return L.Dense(3, activation="relu")(L.GlobalMaxPooling2D()(conv(4, 1)(x)))


def before_convolution(x):
    x = conv(4)(L.ReLU()(normalized(conv(4, padding="same")(x))))
    return conv(3, 1)(L.ReLU()(normalized(L.MaxPooling2D(2)(x))))


def two_inputs(x, y):
    x, y = L.ReLU()(conv(4)(x)), L.Dense(4)(y)
    x = L.Multiply()([L.GlobalAveragePooling2D()(x), y])
    return L.Dense(3)(x), L.Dense(2)(L.Dropout(0.5)(y))


def nested(x):
    inside = keras.Sequential([L.Input((8, 8, 4)), conv(4, padding="same"), L.ReLU(), L.ZeroPadding2D(1)])
    image = L.Input((10, 10, 4))
    outside = keras.Model(image, L.Dense(3)(L.Flatten()(conv(2, 1, activation="relu")(image))))
    return outside(inside(conv(4, padding="same")(x)))


def with_softmax(x):
    return L.Dense(4, activation="softmax")(L.Flatten()(L.UpSampling2D(2)(conv(2, 5, activation="relu6")(x))))


def float_between(x):
    x = L.Activation("sigmoid")(conv(3)(x))
    return L.Dense(4)(L.Reshape((36, 3))(L.AveragePooling2D(3, strides=1, padding="same")(x)))


def merging(x):
    y, z = conv(4, padding="same", activation="relu")(x), conv(4, padding="same")(x)
    of_three = L.Multiply()([y, z, L.ReLU()(L.Add()([z, y, z]))])
    squeezed = L.GlobalAveragePooling2D()(y)
    by_codes = L.Multiply()([L.Dense(4)(squeezed), z])
    by_floats = L.Multiply()([y, L.Dense(4, activation="sigmoid")(squeezed)])
    return conv(3, 1)(of_three), conv(2, 1)(by_codes), conv(2, 1)(by_floats)


def shared(x):
    twice, norm, pool = conv(3, padding="same", activation="relu"), L.BatchNormalization(), L.GlobalAveragePooling2D()
    y = pool(norm(conv(4)(twice(twice(x)))))
    z = pool(conv(4, activation="relu")(L.Rescaling(5.0)(x)))
    return L.Dense(3)(y), L.Dense(2)(z), conv(2, 1)(norm(conv(4)(x)))


IMAGE = (8, 8, 3)
NETWORKS = {
    "chain": ([IMAGE], chain),
    "depthwise": ([IMAGE], depthwise),
    "separable": ([IMAGE], separable),
    "residual": ([IMAGE], residual),
    "linear bottleneck": ([IMAGE], linear_bottleneck),
    "concatenated": ([IMAGE], concatenated),
    "pooled": ([IMAGE], pooled),
    "before convolution": ([IMAGE], before_convolution),
    "two inputs": ([IMAGE, (5,)], two_inputs),
    "nested": ([IMAGE], nested),
    "softmax": ([IMAGE], with_softmax),
    "float between": ([IMAGE], float_between),
    "merging": ([IMAGE], merging),
    "shared": ([IMAGE], shared),
}


@functools.cache
def network(name):
    keras.utils.set_random_seed(list(NETWORKS).index(name))
    shapes, function = NETWORKS[name]
    inputs = [L.Input(shape) for shape in shapes]
    model = keras.Model(inputs, function(*inputs))
    # Batch normalization as after training: every sign of gain, offsets, averages.
    random = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            n = layer.gamma.shape[0]
            layer.set_weights(
                [random.normal(size=n), random.normal(size=n), random.normal(size=n) / 4, random.uniform(0.5, 2, n)]
            )
    return model


def quantized(name, formats):
    """Every format of the list in turn, layer by layer; ranges from data, averages left as they are."""
    model = network(name)
    paths = list(fliqs_tf.Recipe.uniform(model, "INT8").formats)
    final = fliqs_tf.apply(model, fliqs_tf.Recipe({p: formats[i % len(formats)] for i, p in enumerate(paths)}))
    for _, layer in ModelGraph(final).layers:
        if isinstance(layer, L.BatchNormalization):
            layer.trainable = False
    return final


FORMATS = {
    "INT8": ["INT8"],
    "INT4": ["INT4"],
    "mixed": ["INT4", "INT8", "INT6", "BF16", "INT3", "INT2", "INT5", "INT7"],
}


CASES = [(name, formats) for name in NETWORKS for formats in ("INT8", "mixed")]


@pytest.mark.parametrize(
    ("name", "formats"), [*CASES, *((name, "INT4") for name in ("depthwise", "residual", "two inputs", "softmax"))]
)
def test_file_computes_what_keras_does(name, formats, tmp_path):
    final = quantized(name, FORMATS[formats])
    data = [examples(24, *shape, seed=i) for i, shape in enumerate(NETWORKS[name][0])]
    batch = data[0] if len(data) == 1 else data
    exact = fliqs_tf.export.tflite(final, tmp_path / "file.tflite", representative=[batch])
    found = fliqs_tf.export.check(exact, tmp_path / "file.tflite", [batch])
    assert len(found) == 2 * len(final.outputs)
    for agreement, output in zip(found, [*final.outputs, *final.outputs]):
        if agreement.kernels == "XNNPACK":
            # The ranges come from these examples, so one value of a tensor is at the end of its range. Rounding before
            # it may take it to -128 in the file; the format ends at -127. A float layer behind it spreads the step.
            values = 24 * np.prod(output.shape[1:])
            assert round((1 - agreement.equal) * values) <= 3, agreement
            assert agreement.largest <= (1.3 if formats == "mixed" else 1.01), agreement


def test_weights_ship_as_the_codes_that_were_trained(tmp_path):
    from ai_edge_litert import interpreter

    final = quantized("chain", ["INT4"])
    fliqs_tf.export.tflite(final, tmp_path / "file.tflite", representative=[examples(8, *IMAGE)])
    program = interpreter.Interpreter(str(tmp_path / "file.tflite"))
    assert [t["name"] for t in program.get_output_details()] == [final.layers[-1].name]
    tensors = {t["name"]: t for t in program.get_tensor_details()}
    first = next(layer for layer in final.layers if isinstance(layer, fliqs_tf.Quantized))
    weight = deployed.quantized_weights("", first)["kernel"]
    stored = tensors[f"{first.name}/weights"]
    norm = next(layer for layer in final.layers if isinstance(layer, L.BatchNormalization))
    gain = np.asarray(norm.gamma) / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
    np.testing.assert_allclose(
        stored["quantization_parameters"]["scales"], weight.scale.ravel() * np.abs(gain), rtol=1e-6
    )
    content = (tmp_path / "file.tflite").read_bytes()
    codes = (weight.values * np.sign(gain)).transpose(3, 0, 1, 2).astype(np.int8).ravel()
    packed = ((codes[::2] & 15) | (codes[1::2] & 15) << 4).astype(np.uint8).tobytes()
    assert packed in content


def test_file_is_as_large_as_its_codes_biases_and_graph(tmp_path):
    keras.utils.set_random_seed(0)
    image = L.Input((8, 8, 16))
    x = conv(64, activation="relu")(conv(64, padding="same", activation="relu")(image))
    final = fliqs_tf.apply(keras.Model(image, L.Dense(10)(L.Flatten()(x))), "INT4")
    path = tmp_path / "file.tflite"
    fliqs_tf.export.tflite(final, path, representative=[examples(4, 8, 8, 16)])
    codes = fliqs_tf.costs.memory(final) * 2**20
    channels = 64 + 64 + 10
    per_channel = channels * (4 + 4 + 8)  # bias, scale, zero point
    assert codes < path.stat().st_size < 1.05 * (codes + per_channel) + 8 * 1024
    fliqs_tf.export.tflite(final, tmp_path / "wide.tflite", representative=[examples(4, 8, 8, 16)], int4=False)
    assert abs((tmp_path / "wide.tflite").stat().st_size - path.stat().st_size - codes) < 1024


def test_search_for_tflite_ships_what_was_trained(tmp_path):
    keras.utils.set_random_seed(0)
    image = L.Input(IMAGE)
    model = keras.Model(image, L.Dense(3)(L.GlobalAveragePooling2D()(conv(4, activation="relu")(image))))
    searched = fliqs_tf.wrap(model, "FLIQS-S-INT", target="tflite")
    assert {option for d in searched.decisions for option in d.options} == {"INT4", "INT8"}  # no BF16
    searched.compile("sgd", "mse", target_cost="0.6x INT8")
    searched.fit(examples(64, *IMAGE), np.zeros((64, 3), np.float32), batch_size=8, verbose=0)
    final = searched.deploy()
    final.save(tmp_path / "final.keras")
    loaded = keras.models.load_model(tmp_path / "final.keras")
    fliqs_tf.export.tflite(loaded, tmp_path / "file.tflite")  # no representative data
    # Small ones: LiteRT's kernels end at -128, the format at -127.
    first, *_ = fliqs_tf.export.check(final, tmp_path / "file.tflite", 0.5 * examples(512, *IMAGE, seed=5))
    assert first.largest <= 1 and first.equal >= 0.999, first


def test_means_half_way_between_two_codes(tmp_path):
    """Of 2 x 2 whole codes one mean in four is; the output has the scale of the input."""
    image = L.Input((2, 2, 16))
    same = L.DepthwiseConv2D(1, depthwise_initializer="ones")(image)
    model = keras.Model(image, L.Dense(2)(L.GlobalAveragePooling2D()(same)))
    final = fliqs_tf.apply(model, "INT8", target="tflite")
    x = np.random.default_rng(0).integers(-63, 64, (500, 2, 2, 16)).astype(np.float32)
    for _, layer in ModelGraph(final).layers:
        for quantizer in [layer, getattr(layer, "activation_quantizer", None)]:
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.range.assign([127 * np.float32(0.05), 1])
    x *= np.float32(0.05)
    exact = fliqs_tf.export.tflite(final, tmp_path / "file.tflite")
    _, rounding, _ = (layer for layer in exact.layers if isinstance(layer, AccumulatorRounding))
    codes = np.rint(x / np.float32(0.05))
    means = np.rint(codes.sum((1, 2)) / 4)  # halves to even
    np.testing.assert_allclose(keras.Model(exact.inputs, rounding.output)(x), means * np.float32(0.05), rtol=1e-6)
    first, *_ = fliqs_tf.export.check(exact, tmp_path / "file.tflite", x)
    assert first.largest == 0 and first.equal == 1, first
    trained, *_ = fliqs_tf.export.check(final, tmp_path / "file.tflite", x)
    assert trained.equal < 0.9, trained  # what the layer is for


def test_calls_of_a_shared_layer_round_each_in_its_way():
    image = L.Input(IMAGE)
    nested, twice = keras.Sequential([L.Input(IMAGE), conv(3, 1, name="inner")]), conv(3, 1, name="twice")
    trained = fliqs_tf.apply(keras.Model(image, twice(twice(nested(nested(image))))), "INT8", target="tflite")
    layer = trained.get_layer("twice")
    layer.layer.bias.assign([0.1, -0.2, 0.3])
    trained(examples(8, *IMAGE), training=True)
    shipped = tflite_writer.as_shipped(ModelGraph(trained)).model
    # The two calls of the nested network write to different scales, and its layers are there once.
    found = [layer.name for _, layer in ModelGraph(shipped).of_type(AccumulatorRounding)]
    assert found == ["twice_kernel", "twice_kernel_1"]
    # Both calls want the bias at the next multiple; it goes there once.
    kernel, amax = np.asarray(layer.layer.kernel, np.float64), float(layer.activation_quantizer.range[0])
    unit = np.abs(kernel).max((0, 1, 2)) / 127 * amax / 127
    moved = np.rint(np.array([0.1, -0.2, 0.3]) / unit) * unit
    np.testing.assert_allclose(shipped.get_layer("twice").layer.bias, moved, rtol=1e-5)


GAINS = [1, 1e-3, 1e-4, 1e-5, -1e-5, 3e-6, 1e-6, 1e-7, 1e-8, 1e-20, 0]


@pytest.mark.parametrize("fmt", ["INT8", "INT4"])
@pytest.mark.parametrize("place", ["behind a convolution", "alone"])
def test_channels_that_are_nearly_switched_off_keep_their_biases(fmt, place, tmp_path):
    """Their weights would be too small for an int32 bias to reach 3 in multiples of them."""
    keras.utils.set_random_seed(0)
    image, norm = L.Input(IMAGE), L.BatchNormalization(name="norm")
    x = conv(len(GAINS), padding="same", name="conv")(image)
    if place == "alone":
        x = L.MaxPooling2D(2)(L.Activation("relu")(x))
    final = fliqs_tf.apply(keras.Model(image, conv(4, 1, name="last")(norm(x))), fmt, target="tflite")
    (norm,) = (layer for layer in final.layers if layer.name == "norm")
    n = len(GAINS)
    norm.set_weights([np.array(GAINS), np.full(n, 3.0), np.full(n, 0.5), np.full(n, 0.25)])
    norm.trainable = False
    x = examples(16, *IMAGE)
    final(x, training=True)
    exact = fliqs_tf.export.tflite(final, tmp_path / "file.tflite")
    for model, equal in ((exact, 0.995), (final, 0.9)):  # a bias that is not there would be seen in all values
        for agreement in fliqs_tf.export.check(model, tmp_path / "file.tflite", x):
            if agreement.kernels == "XNNPACK":
                assert agreement.largest <= 1.01 and agreement.equal > equal, agreement


def test_what_cannot_be_a_bias_is_named(tmp_path):
    image = L.Input(IMAGE)
    final = fliqs_tf.apply(keras.Model(image, L.BatchNormalization()(conv(2, name="conv")(image))), "INT8")
    final.layers[-1].trainable = False
    final.layers[-1].set_weights([np.ones(2), np.array([0, np.inf]), np.zeros(2), np.ones(2)])
    x = examples(2, *IMAGE)
    with pytest.raises(ValueError, match="Layer 'conv': channel 1 has the bias inf"):
        fliqs_tf.export.tflite(final, tmp_path / "file.tflite", [x])
    assert not list(tmp_path.iterdir())


def test_also_in_what_is_made_of_it(tmp_path):
    """Copies, what is loaded, and what is around one."""
    trained = fliqs_tf.apply(network("residual"), "INT8", target="tflite", calibration_data=[examples(8, *IMAGE)])
    trained.save(tmp_path / "trained.keras")
    around = keras.Sequential([L.Input(IMAGE), trained])
    around.save(tmp_path / "around.keras")
    qmodel = fliqs_tf.wrap(network("residual"), "FLIQS-S-INT", target="tflite")
    qmodel.save(tmp_path / "qmodel.keras")
    models = [
        keras.models.load_model(tmp_path / "trained.keras"),
        fliqs_tf.loading.load_model(tmp_path / "trained.keras"),
        keras.models.load_model(tmp_path / "around.keras"),
        keras.models.load_model(tmp_path / "qmodel.keras").network,
        qmodel.deploy(),
        tflite_writer.as_shipped(ModelGraph(trained)).model,
    ]
    for model in models:
        model(3 * examples(8, *IMAGE, seed=1), training=True)
        model(9 * examples(8, *IMAGE, seed=2), training=True)
        ((boundary, reader),) = shared_ranges.followers(ModelGraph(model))
        assert boundary.range[0] > 0
        np.testing.assert_array_equal(boundary.range, reader.range)
        assert len(boundary._followers) == 1


def test_sequential_models_around_a_network_too(tmp_path):
    model = keras.Sequential([L.Input(IMAGE), network("residual")])
    fliqs_tf.apply(model, "INT8", target="tflite").save(tmp_path / "fixed.keras")
    loaded = keras.models.load_model(tmp_path / "fixed.keras")
    assert isinstance(loaded, keras.Sequential)
    loaded(examples(8, *IMAGE), training=True)
    ((boundary, reader),) = shared_ranges.followers(ModelGraph(loaded))
    assert boundary.range[0] > 0
    np.testing.assert_array_equal(boundary.range, reader.range)


# ---- what cannot be exported


def test_missing_ranges_are_named(tmp_path):
    final = fliqs_tf.apply(network("residual"), "INT8")
    with pytest.raises(ValueError, match=r"int8 tensors have no range: .*Give representative=batches"):
        fliqs_tf.export.tflite(final, tmp_path / "file.tflite")
    assert not list(tmp_path.iterdir())


def test_search_for_tflite_refuses_before_training():
    image = L.Input((8, 3))
    model = keras.Model(image, L.Dense(2, name="out")(L.LSTM(4, name="cell")(L.Dense(3)(image))))
    with pytest.raises(ValueError, match="Layer 'cell' of class LSTM cannot be exported"):
        fliqs_tf.wrap(model, "FLIQS-S-INT", target="tflite")
    with pytest.raises(ValueError, match="Layer 'cell' of class LSTM cannot be exported"):
        fliqs_tf.apply(model, "INT8", target="tflite")
    with pytest.raises(ValueError, match="target must be None or 'tflite', got 'onnx'"):
        fliqs_tf.apply(model, "INT8", target="onnx")
    with pytest.raises(ValueError, match="None of E2M1, E4M3, BF16 has integer kernels"):
        fliqs_tf.wrap(model, "FLIQS-S-FLOAT", target="tflite")
