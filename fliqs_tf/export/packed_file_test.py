"""Packed files: the same model to the bit, codes that another library reads, every damage noticed."""

import base64
import json
import os
import zlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

import fliqs_tf
from fliqs_tf import export
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.export import deployed, tflite_writer
from fliqs_tf.export.packed_file import _digest, _read, _restore
from fliqs_tf.graph.model_graph import ModelGraph

L = keras.layers
FORMATS = [f"INT{b}" for b in (2, 3, 4, 5, 6, 7, 8, 12, 16)] + [
    "E2M1",
    "E3M2",
    "E2M3",
    "E4M3",
    "E5M2",
    "E5M10",
    "E1M0",
    "BF16",
    "FP32",
]
OF_MIXED = ("INT4", "INT5", "E2M1", "E3M2", "INT8")


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    keras.utils.set_random_seed(0)


def network():
    """Every kind of layer that is quantized, nested, with a shared layer and with layers of variables of their own."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = L.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0], name="norm")(inputs)
    x = L.Conv2D(6, 3, name="conv")(x)
    x = L.BatchNormalization(name="bn")(x)
    x = L.ReLU()(L.DepthwiseConv2D(3, name="depthwise")(x))
    inner_input = keras.Input((4, 4, 6))
    inner = keras.Model(inner_input, L.SeparableConv2D(4, 3, name="separable")(inner_input), name="inner")
    x = L.Flatten()(inner(x))
    shared = L.Dense(16, name="shared")
    x = shared(shared(x))
    x = L.PReLU(name="prelu")(x)
    return keras.Model(inputs, [L.Dense(3, name="fc")(x), L.Dense(2, name="other")(x)], name="net")


def data(seed=0):
    return tf.constant(np.random.default_rng(seed).standard_normal((5, 8, 8, 3)), tf.float32)


def trained(model, seed=0, x=None):
    """Weights and ranges of their own."""
    rng = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(rng.standard_normal(weight.shape).astype(np.float32))
    model(data() if x is None else x, training=True)
    return model


def mixed():
    """A format per layer."""
    chosen = dict(zip(("conv", "depthwise", "inner/separable", "shared", "fc"), OF_MIXED))
    return trained(fliqs_tf.apply(network(), fliqs_tf.Recipe({**chosen, "other": "E4M3"})))


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    model = mixed()
    export.packed(model, path)
    return model, path


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


# ---- what comes back


def test_a_mixed_model_comes_back_to_the_bit(packed_file):
    model, path = packed_file
    copy = export.load_packed(path)
    for ours, theirs in zip(model(data(1)), copy(data(1))):
        np.testing.assert_array_equal(ours, theirs)
    assert deployed.recipe(ModelGraph(copy)) == deployed.recipe(ModelGraph(model))
    assert [w.shape for w in copy.weights] == [w.shape for w in model.weights]


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_comes_back_to_the_bit(tmp_path, fmt):
    inputs = keras.Input((6,))
    model = fliqs_tf.apply(keras.Model(inputs, L.Dense(5, name="fc")(inputs), name="net"), fmt)
    x = tf.constant(np.random.default_rng(0).standard_normal((7, 6)), tf.float32)
    kernel = model.get_layer("fc").quantized_layer.kernel
    kernel.assign(kernel * [[0.0, 1e-38, 1.0, 1e30, 3.0]])
    model(x, training=True)
    export.packed(model, tmp_path / "m")
    copy = export.load_packed(tmp_path / "m")
    np.testing.assert_array_equal(copy(x), model(x))
    assert np.isfinite(copy(x)).all()
    export.packed(copy, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()


def test_a_searched_model_comes_back(tmp_path):
    searched = fliqs_tf.wrap(network(), ["INT4", "INT8"], tensors="weights")
    final = searched.deploy()
    export.packed(final, tmp_path / "m")
    copy = export.load_packed(tmp_path / "m")
    for ours, theirs in zip(final(data()), copy(data())):
        np.testing.assert_array_equal(ours, theirs)


def test_a_composite_layer_comes_back(tmp_path):
    inputs = keras.Input((5, 8))
    x = L.LayerNormalization(name="norm")(L.MultiHeadAttention(2, 4, name="attention")(inputs, inputs))
    model = trained(fliqs_tf.apply(keras.Model(inputs, L.Dense(3, name="fc")(x)), "E3M2"), x=tf.ones((2, 5, 8)))
    export.packed(model, tmp_path / "m")
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 5, 8)), tf.float32)
    np.testing.assert_array_equal(export.load_packed(tmp_path / "m")(x), model(x))
    assert {"attention/query/kernel", "attention/query/bias", "norm/gamma"} <= set(
        header_of((tmp_path / "m").read_bytes())
    )


def test_scalar_variables_come_back(tmp_path):
    """The count of an adapted Normalization, the scale of a rounding as integer kernels do it."""
    x = np.array([[1, 2], [3, 6]], np.float32)
    inputs, norm = keras.Input((2,)), L.Normalization(name="norm")
    norm.adapt(x)
    adapted = fliqs_tf.apply(keras.Model(inputs, L.Dense(2, name="fc")(norm(inputs))), "INT8")
    for_tflite = fliqs_tf.apply(keras.Model(inputs, L.Dense(2, name="fc")(inputs)), "INT8", target="tflite")
    for model in (adapted, for_tflite):
        model(x, training=True)
    for model, scalar in (
        (adapted, "norm/count"),
        (tflite_writer.as_shipped(ModelGraph(for_tflite)).model, "fc_kernel/scale"),
    ):
        export.packed(model, tmp_path / "m")
        assert header_of((tmp_path / "m").read_bytes())[scalar]["shape"] == []
        np.testing.assert_array_equal(export.load_packed(tmp_path / "m")(x), model(x))


def test_a_restored_model_saves_and_trains(whole, tmp_path):
    (tmp_path / "m").write_bytes(whole)
    copy = export.load_packed(tmp_path / "m")
    copy.save(tmp_path / "m.keras")
    x = np.ones((1, 2), np.float32)
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "m.keras")(x), copy(x))
    copy.compile("sgd", "mse")
    assert np.isfinite(copy.train_on_batch(x, x))


# ---- what another library reads


def test_tensors_of_the_file(packed_file):
    model, path = packed_file
    header = header_of(path.read_bytes())
    about = json.loads(header["__metadata__"]["fliqs_tf"])
    assert about["weights"]["conv/kernel"] == {"format": "INT4", "shape": [3, 3, 3, 6]}
    assert about["inputs"]["conv/input"] == {"format": "INT4", "clip": 1.0}
    assert fliqs_tf.Recipe.from_dict(about["recipe"]) == deployed.recipe(ModelGraph(model))
    with safe_open(path, "np") as file:
        # Two INT4 codes to a byte, the first one low; by hand.
        kernel = model.get_layer("conv").quantized_layer.kernel.numpy()
        amax = np.abs(kernel).max(axis=(0, 1, 2), keepdims=True)
        np.testing.assert_array_equal(file.get_tensor("conv/kernel.scale"), amax / np.float32(7))
        values = np.round(kernel / (amax / np.float32(7))).astype(int).ravel()
        stream = file.get_tensor("conv/kernel")
        np.testing.assert_array_equal(stream, [(a & 15) | (b & 15) << 4 for a, b in zip(values[::2], values[1::2])])
        np.testing.assert_array_equal(file.get_tensor("conv/bias"), model.get_layer("conv").quantized_layer.bias)
        np.testing.assert_array_equal(
            file.get_tensor("conv/input.range"), model.get_layer("conv").activation_quantizer.range
        )
        # INT8 as it is.
        fc = model.get_layer("fc").quantized_layer.kernel.numpy()
        np.testing.assert_array_equal(
            file.get_tensor("fc/kernel"), np.round(fc / (np.abs(fc).max(axis=0) / np.float32(127)))
        )
    assert header["fc/kernel"]["dtype"] == "I8"
    assert header["other/kernel"]["dtype"] == "F8_E4M3"


def test_float8_is_that_of_ml_dtypes(packed_file):
    import ml_dtypes

    model, path = packed_file
    kernel = model.get_layer("other").quantized_layer.kernel.numpy()
    start, end = header_of(path.read_bytes())["other/kernel"]["data_offsets"]
    stored = np.frombuffer(path.read_bytes()[-_data_bytes(path) :][start:end], ml_dtypes.float8_e4m3fn)
    expected = (kernel / (np.abs(kernel).max(axis=0) / np.float32(448))).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(stored.astype(np.float32), expected.astype(np.float32).ravel())


def _data_bytes(path) -> int:
    data = path.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_the_size_is_the_recipes_memory_and_scales_and_what_is_in_float(packed_file):
    model, path = packed_file
    expected = 0
    rest = sum(int(np.prod(w.shape)) for w in model.weights) * 4
    for path_of_layer, layer in deployed.quantized_layers(ModelGraph(model)):
        for weight in deployed.quantized_weights(path_of_layer, layer).values():
            expected += -(-weight.values.size * weight.format.bits // 8) + 4 * weight.scale.size
            rest -= 4 * weight.values.size
        rest -= 4 * 6 * (len(layer.weight_quantizers) + len(layer.activation_quantizers))  # rows follow from formats
    assert _data_bytes(path) == expected + rest
    assert path.stat().st_size - _data_bytes(path) < 150 * len(header_of(path.read_bytes())) + 3000


def test_the_file_of_a_larger_model_is_as_small_as_its_recipe(tmp_path):
    """Within 3 % of what `costs.memory` predicts, plus scales and what is in float."""
    inputs = keras.Input((300,))
    x = L.Dense(600, name="a")(inputs)
    model = fliqs_tf.apply(keras.Model(inputs, L.Dense(600, name="b")(x)), fliqs_tf.Recipe({"a": "INT3", "b": "E3M2"}))
    export.packed(model, tmp_path / "m")
    predicted = fliqs_tf.costs.memory(model) * 2**20
    assert predicted == 300 * 600 * 3 / 8 + 600 * 600 * 6 / 8
    scales_and_biases = 2 * 2 * 600 * 4
    assert predicted + scales_and_biases < (tmp_path / "m").stat().st_size < 1.03 * (predicted + scales_and_biases)


# ---- damaged and foreign files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    inputs = keras.Input((2,))
    path = tmp_path_factory.mktemp("whole") / "m"
    export.packed(fliqs_tf.apply(keras.Model(inputs, L.Dense(2, name="fc")(inputs)), "INT4"), path)
    return path.read_bytes()


def test_a_cut_file_is_refused(tmp_path, whole):
    for length in [*range(60), *range(60, len(whole), 97), len(whole) - 1]:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut is not a model that can be loaded: it is"):
            export.load_packed(tmp_path / "cut")


def test_a_changed_byte_is_noticed(tmp_path, whole):
    (tmp_path / "m").write_bytes(whole)
    kernel = export.load_packed(tmp_path / "m").get_layer("fc").quantized_layer.kernel.numpy()
    rng = np.random.default_rng(0)
    for position in [*range(24), *rng.integers(24, len(whole), 300), *range(len(whole) - 60, len(whole))]:
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.integers(8)
        (tmp_path / "changed").write_bytes(changed)
        try:
            copy = export.load_packed(tmp_path / "changed")
        except ValueError:
            continue
        # White space in the header may change without changing what it says.
        np.testing.assert_array_equal(copy.get_layer("fc").quantized_layer.kernel.numpy(), kernel)
        assert chr(whole[position]).isspace() and chr(changed[position]).isspace(), position


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_any_bytes_are_refused(data):
    with pytest.raises(ValueError):
        _restore(data, None)


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "m").write_bytes(save({"a": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match="m is not a model .*: it is a safetensors file that fliqs_tf did not write"):
        export.load_packed(tmp_path / "m")
    with pytest.raises(FileNotFoundError):
        export.load_packed(tmp_path / "nothing")


def rewritten(whole: bytes, change) -> bytes:
    """A file with a right digest, its header or tensors changed."""
    header, tensors = _read(whole)
    tensors = {k: np.array(v) for k, v in tensors.items()}
    change(header, tensors)
    header["sha256"] = _digest(header, {k: (v.shape, v.tobytes()) for k, v in tensors.items()})
    return save(tensors, {"fliqs_tf": json.dumps(header)})


def changed_network(old, new):
    def apply(header, tensors):
        text = zlib.decompress(base64.b64decode(header["network"])).decode()
        assert old in text
        header["network"] = base64.b64encode(zlib.compress(text.replace(old, new).encode())).decode()

    return apply


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, t: h.update(layout=2), "its layout is 2; this version of fliqs_tf reads 1"),
        (lambda h, t: t.pop("fc/bias"), "it has no tensor 'fc/bias', which its network needs"),
        (lambda h, t: t.pop("fc/kernel"), "it has no tensor 'fc/kernel'"),
        (lambda h, t: t.pop("fc/kernel.scale"), "it has no tensor 'fc/kernel.scale'"),
        (lambda h, t: t.update({"fc/bias": np.zeros(3, np.float32)}), r"'fc/bias' has the shape \[3\], .* needs \[2\]"),
        (lambda h, t: t.update({"fc/kernel": np.zeros(3, np.uint8)}), "4 codes of 4 bits take 2 bytes, got 3"),
        (lambda h, t: t.update({"fc/kernel": np.full(2, 8, np.uint8)}), "0x8 stands for no value of INT4"),
        (lambda h, t: h.update(network="no base 64"), "configuration cannot be read"),
        (lambda h, t: h.update(network="bm8="), "configuration cannot be read"),
        (lambda h, t: h.update(network=None), "header does not fit this layout"),
        (lambda h, t: h.pop("weights"), "header does not fit this layout"),
        (lambda h, t: h["weights"]["fc/kernel"].update(format="INT99"), "integer bits must be"),
        (lambda h, t: h["weights"]["fc/kernel"].update(shape=[4, 1]), "'fc/kernel' has the shape"),
        (lambda h, t: h["weights"]["fc/kernel"].update(shape="x"), "header does not fit"),
        (lambda h, t: h["weights"].update(other={}), "header does not fit"),
        (lambda h, t: h["versions"].update(keras="tf_keras 9" if IS_KERAS_3 else "Keras 9"), "before Python starts"),
        (changed_network('"Dense"', '"Dance"'), "it asks for 'Dance' of the module 'keras.layers'"),
        (changed_network('"units": 2', '"units": -2'), "Keras cannot rebuild its network"),
        (changed_network('"module": "keras.layers"', '"module": "os"'), "it asks for '.*' of the module 'os'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, whole, change, message):
    (tmp_path / "m").write_bytes(rewritten(whole, change))
    with pytest.raises(ValueError, match=f"m is not a model that can be loaded: .*(?:{message})"):
        export.load_packed(tmp_path / "m")


# ---- models that are refused


def refused(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        export.packed(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_models_that_cannot_be_packed_are_refused(tmp_path):
    inputs = keras.Input((2,))
    network = keras.Model(inputs, L.Dense(2, name="fc")(inputs), name="net")
    refused(tmp_path, network, "has no quantized layer")
    refused(tmp_path, fliqs_tf.wrap(network, ["INT4", "INT8"]), "still being searched")
    model = fliqs_tf.apply(network, "INT4")
    kernel = model.get_layer("fc").quantized_layer.kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    refused(tmp_path, model, "'fc/kernel' has NaN")


def test_a_lambda_layer_is_refused(tmp_path):
    inputs = keras.Input((2,))
    x = fliqs_tf.Quantized(L.Dense(2, name="fc"), ["INT4"], None, name="fc")(inputs)
    model = keras.Model(inputs, L.Lambda(lambda x: x + 1, name="code")(x), name="net")
    refused(tmp_path, model, "Model 'net' cannot be packed: Layer 'code' is a Lambda, whose code no file holds")


class Doubled(L.Layer):
    __module__ = "someones.layers"

    def call(self, x):
        return 2 * x


def test_classes_of_ones_own(tmp_path):
    inputs = keras.Input((2,))
    model = fliqs_tf.apply(keras.Model(inputs, Doubled(name="own")(L.Dense(2, name="fc")(inputs)), name="net"), "INT4")
    refused(tmp_path, model, "Model 'net' cannot be packed: .*(Doubled|someones)")
    with keras.utils.custom_object_scope({"Doubled": Doubled}):
        export.packed(model, tmp_path / "m")
    with pytest.raises(ValueError, match="m is not a model that can be loaded: .*(Doubled|someones)"):
        export.load_packed(tmp_path / "m")
    copy = export.load_packed(tmp_path / "m", custom_objects={"Doubled": Doubled})
    x = tf.constant([[1.0, 2.0]])
    np.testing.assert_array_equal(copy(x), model(x))


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "m").write_text("what was there")
    inputs = keras.Input((2,))
    model = fliqs_tf.apply(keras.Model(inputs, L.Dense(2, name="fc")(inputs)), "INT4")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        export.packed(model, tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"] and (tmp_path / "m").read_text() == "what was there"
