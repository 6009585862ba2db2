"""Every layer class and activation against every export target: what a file computes, or why there is none.

One table. A row is a network of one layer, behind a stem if it has no kernels of its own, and what becomes of it
in INT8:

* "exact": the file gives what the Keras model gives. Of TFLite that is the model that the exporter returned, to the
  code, of ONNX files but for the order of float32 sums, of packed files to the bit.
* "one step": no value is further than one code of the output away.
* anything else are words of the refusal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import FunctionType

import numpy as np
import onnxruntime
import pytest

import fliqs_tf
from fliqs_tf import export
from fliqs_tf._keras import IS_KERAS_3, keras
from fliqs_tf.export import boundaries, lowering_layers, onnx_layers
from fliqs_tf.graph import commuting, layer_types
from fliqs_tf.layers import requantize

L = keras.layers
IMAGE, SEQUENCE, VECTOR = (6, 6, 4), (6, 4), (6,)
EXAMPLES = 16
EXACT, ONE_STEP = "exact", "one step"
NO_TFLITE, NO_ONNX = "cannot be exported to TFLite", "is not supported by the ONNX exporter"


@dataclasses.dataclass(frozen=True)
class Row:
    """A network and what becomes of it.

    Attributes:
      layer: Makes the layer.
      shape: Of its input, one example.
      tflite, onnx, packed: What becomes of it.
      inputs: How many tensors the layer takes.
      options: Of `fliqs_tf.apply`.
    """

    layer: Callable
    shape: tuple = IMAGE
    tflite: str = EXACT
    onnx: str = EXACT
    packed: str = EXACT
    inputs: int = 1
    options: dict = dataclasses.field(default_factory=dict)


def row(layer, shape=IMAGE, tflite=EXACT, onnx=EXACT, packed=EXACT, inputs=1, **options):
    return Row(layer, shape, tflite, onnx, packed, inputs, options)


KERNELS = {
    "Dense": row(lambda: L.Dense(5), VECTOR),
    "Dense of a sequence": row(lambda: L.Dense(5), SEQUENCE),
    "EinsumDense": row(lambda: L.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"), SEQUENCE),
    "EinsumDense of heads": row(
        lambda: L.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), SEQUENCE, "no matrix product"
    ),
    "Conv1D": row(lambda: L.Conv1D(5, 3), SEQUENCE, NO_TFLITE),
    "Conv2D": row(lambda: L.Conv2D(5, 3, strides=2, padding="same")),
    "Conv2D of groups": row(lambda: L.Conv2D(6, 3, groups=2), tflite="grouped convolutions have no fast"),
    "Conv2DTranspose": row(lambda: L.Conv2DTranspose(5, 3, strides=2, padding="same"), tflite=NO_TFLITE),
    "DepthwiseConv2D": row(lambda: L.DepthwiseConv2D(3, depth_multiplier=2, padding="same")),
    "SeparableConv2D": row(lambda: L.SeparableConv2D(5, 3)),
    "Embedding": row(lambda: L.Embedding(9, 4), VECTOR, NO_TFLITE, "supports only float32", embeddings=True),
    "MultiHeadAttention": row(
        lambda: L.MultiHeadAttention(2, 3), SEQUENCE, NO_TFLITE, NO_ONNX, inputs=2, attention_scores=True
    ),
}
if IS_KERAS_3:
    KERNELS["GroupQueryAttention"] = row(
        lambda: L.GroupQueryAttention(3, 2, 1), SEQUENCE, NO_TFLITE, NO_ONNX, inputs=2, attention_scores=True
    )

MERGING = {
    "Add": row(lambda: L.Add(), inputs=2),
    "Add of three": row(lambda: L.Add(), inputs=3),
    "Multiply": row(lambda: L.Multiply(), inputs=2),
    "Concatenate": row(lambda: L.Concatenate(), inputs=2),
    **{
        name: row(getattr(L, name), tflite=NO_TFLITE, inputs=2)
        for name in ("Subtract", "Average", "Maximum", "Minimum")
    },
    "Dot": row(lambda: L.Dot(1), VECTOR, NO_TFLITE, NO_ONNX, inputs=2),
}

MOVING = {
    "MaxPooling2D": row(lambda: L.MaxPooling2D(2, padding="same")),
    "GlobalMaxPooling2D": row(lambda: L.GlobalMaxPooling2D()),
    "Flatten": row(lambda: L.Flatten()),
    "Reshape": row(lambda: L.Reshape((9, 16))),
    "ZeroPadding2D": row(lambda: L.ZeroPadding2D(((1, 2), (0, 3)))),
    "UpSampling2D": row(lambda: L.UpSampling2D(2)),
    "UpSampling2D bilinear": row(
        lambda: L.UpSampling2D(2, interpolation="bilinear"), tflite="interpolation 'bilinear'", onnx="interpolates"
    ),
    "Permute": row(lambda: L.Permute((2, 1, 3)), tflite=NO_TFLITE),
    "Cropping2D": row(lambda: L.Cropping2D(((1, 0), (2, 1))), tflite=NO_TFLITE),
    "RepeatVector": row(lambda: L.RepeatVector(3), VECTOR, NO_TFLITE, NO_ONNX),
    **{
        name: row(make, SEQUENCE, NO_TFLITE)
        for name, make in {
            "MaxPooling1D": lambda: L.MaxPooling1D(2),
            "GlobalMaxPooling1D": lambda: L.GlobalMaxPooling1D(),
            "ZeroPadding1D": lambda: L.ZeroPadding1D((1, 2)),
            "Cropping1D": lambda: L.Cropping1D((1, 2)),
        }.items()
    },
    "Dropout": row(lambda: L.Dropout(0.5)),
    "SpatialDropout1D": row(lambda: L.SpatialDropout1D(0.5), SEQUENCE),
    "SpatialDropout2D": row(lambda: L.SpatialDropout2D(0.5)),
    "GaussianNoise": row(lambda: L.GaussianNoise(0.5)),
    "GaussianDropout": row(lambda: L.GaussianDropout(0.5)),
    "AlphaDropout": row(lambda: L.AlphaDropout(0.5), onnx=NO_ONNX),
    "ActivityRegularization": row(lambda: L.ActivityRegularization(l2=0.01)),
}

COMPUTING = {
    "AveragePooling2D": row(lambda: L.AveragePooling2D(2)),
    "AveragePooling2D same": row(lambda: L.AveragePooling2D(3, strides=2, padding="same")),
    "GlobalAveragePooling2D": row(lambda: L.GlobalAveragePooling2D()),
    "AveragePooling1D": row(lambda: L.AveragePooling1D(2), SEQUENCE, NO_TFLITE),
    "GlobalAveragePooling1D": row(lambda: L.GlobalAveragePooling1D(), SEQUENCE, NO_TFLITE),
    "BatchNormalization": row(lambda: L.BatchNormalization()),
    "LayerNormalization": row(lambda: L.LayerNormalization(), tflite=NO_TFLITE),
    "Rescaling": row(lambda: L.Rescaling(0.5, -1.0)),
    "Normalization": row(lambda: L.Normalization(mean=[1.0] * 4, variance=[2.0] * 4), IMAGE, NO_TFLITE, NO_ONNX),
    "ReLU": row(lambda: L.ReLU()),
    "ReLU to 6": row(lambda: L.ReLU(6.0)),
    "ReLU with a slope": row(lambda: L.ReLU(1.0, negative_slope=0.25), tflite="no kernel for the activation 'ReLU(1.0"),
    "ReLU with a threshold": row(
        lambda: L.ReLU(threshold=1.0), tflite="no kernel for the activation 'ReLU(None", onnx="a ReLU with a threshold"
    ),
    "LeakyReLU": row(lambda: L.LeakyReLU(0.125), tflite=NO_TFLITE),
    "PReLU": row(lambda: L.PReLU(shared_axes=[1, 2]), tflite=NO_TFLITE),
    "ELU": row(lambda: L.ELU(0.5), tflite=NO_TFLITE),
    "Softmax": row(lambda: L.Softmax()),
    "Softmax of rows": row(lambda: L.Softmax(axis=1), tflite="softmax over axis 1"),
    "Activation": row(lambda: L.Activation("relu")),
}

CLOSED = {
    name: row(make, SEQUENCE, NO_TFLITE, NO_ONNX)
    for name, make in {
        "SimpleRNN": lambda: L.SimpleRNN(3),
        "GRU": lambda: L.GRU(3),
        "LSTM": lambda: L.LSTM(3),
        "Bidirectional": lambda: L.Bidirectional(L.LSTM(3)),
        "TimeDistributed": lambda: L.TimeDistributed(L.Dense(3)),
        "SpectralNormalization": lambda: L.SpectralNormalization(L.Dense(3)),
    }.items()
}
CLOSED["Lambda"] = row(lambda: L.Lambda(lambda x: 2 * x), SEQUENCE, NO_TFLITE, NO_ONNX, "a Lambda, whose code no file")
if not IS_KERAS_3:  # tf_keras makes nothing of its own configuration of a model with one
    CLOSED["SpectralNormalization"] = dataclasses.replace(
        CLOSED["SpectralNormalization"], packed="Keras cannot rebuild its network"
    )
LAYERS = {**KERNELS, **MERGING, **MOVING, **COMPUTING, **CLOSED}


TFLITE_ACTIVATIONS = ("linear", "relu", "relu6", "sigmoid", "silu", "softmax", "swish", "tanh")
ONNX_ACTIVATIONS = (
    *("elu", "exponential", "gelu", "hard_sigmoid", "hard_silu", "hard_swish", "leaky_relu", "log_softmax", "selu"),
    *("softplus", "softsign"),
)
NO_ACTIVATIONS = ("celu", "glu", "hard_shrink", "hard_tanh", "log_sigmoid", "mish", "soft_shrink", "sparse_plus")
NO_ACTIVATIONS += ("sparse_sigmoid", "sparsemax", "squareplus", "tanh_shrink")


def activation_row(name, onnx):
    words = "hard_silu" if name == "hard_swish" else name
    tflite = EXACT if name in TFLITE_ACTIVATIONS else f"no kernel for the activation '{words}'"
    return row(lambda: L.Dense(4, activation=name), VECTOR, tflite, onnx)


ACTIVATIONS = {
    **{name: activation_row(name, EXACT) for name in TFLITE_ACTIVATIONS + ONNX_ACTIVATIONS},
    **{name: activation_row(name, f"has the activation '{name}', which the ONNX exporter") for name in NO_ACTIVATIONS},
}
ACTIVATIONS = {name: case for name, case in ACTIVATIONS.items() if hasattr(keras.activations, name)}
TABLE = {**LAYERS, **{f"activation {name}": case for name, case in ACTIVATIONS.items()}}


# ---- a network for a row, and examples


def has_own_kernels(layer) -> bool:
    return bool(layer_types.kernels_or_table(layer)) or isinstance(layer, ATTENTION)


ATTENTION = tuple(getattr(L, name) for name in ("MultiHeadAttention", "GroupQueryAttention") if hasattr(L, name))


def network(case: Row) -> keras.Model:
    """The layer, behind stems if it has no kernels; no weight is 0."""
    keras.utils.set_random_seed(0)
    layer = case.layer()
    inputs = L.Input(case.shape, dtype="int32" if layer_types.table(layer) else "float32", name="given")
    values = [inputs] * case.inputs
    if not has_own_kernels(layer):
        stem = functools.partial(L.Conv2D, kernel_size=1) if case.shape == IMAGE else L.Dense
        values = [stem(case.shape[-1], name=f"stem{i}")(inputs) for i in range(case.inputs)]
    outputs = layer(*values) if isinstance(layer, ATTENTION) else layer(values if case.inputs > 1 else values[0])
    model = keras.Model(inputs, outputs)
    random = np.random.default_rng(1)
    for weight in model.trainable_weights:
        if "kernel" not in weight.name and "embeddings" not in weight.name:
            weight.assign(random.normal(size=weight.shape) / 2)
    for weight in model.weights:
        if "variance" in weight.name:
            weight.assign(random.uniform(0.5, 2, weight.shape))
    return model


def examples(case: Row, is_table: bool) -> tuple[np.ndarray, np.ndarray]:
    """(for the ranges, to compare on).

    No value of the second is next to the middle between two INT8 codes, where a kernel that multiplies by 1 / scale may
    take another code than Keras, which divides; and none comes to the end of a range, where LiteRT has one code more.
    """
    random = np.random.default_rng(0)
    codes = random.integers(-100, 101, (EXAMPLES, *case.shape))
    if is_table:
        return np.abs(codes) % 9, np.abs(codes) % 9
    x = ((codes + random.uniform(-0.3, 0.3, codes.shape)) * STEP).astype(np.float32)
    wider = np.float32(1.1) * x
    wider.flat[0] = 127 * STEP
    return wider, x


STEP = 0.02
FORMATS = ["INT4", "INT8"]


@functools.lru_cache(1)
def applied(name: str):
    """(model in INT8, examples for ranges, examples to compare on)."""
    case = TABLE[name]
    model = network(case)
    ranges, x = examples(case, model.input.dtype == "int32")
    return fliqs_tf.apply(model, "INT8", calibration_data=ranges, **case.options), ranges, x


# ---- targets: (model, examples for ranges, examples, path) -> "exact", "one step", or how far off


def by_tflite(final, ranges, x, path) -> str:
    exact = export.tflite(final, path, representative=ranges)
    xnnpack = export.check(exact, path, x)[0]
    assert xnnpack.kernels == "XNNPACK" and xnnpack.examples == EXAMPLES
    return said(xnnpack.largest < 0.01, xnnpack.largest <= 1.01, xnnpack)


def by_onnx(final, ranges, x, path) -> str:
    export.onnx(final, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    expected = final(x).numpy()
    assert found.shape == expected.shape
    largest = np.abs(expected).max()
    apart = np.abs(found - expected).max()
    return said(apart <= 1e-6 * largest, apart <= largest / 127, apart / largest)


def by_packed(final, ranges, x, path) -> str:
    export.packed(final, path)
    return said(np.array_equal(export.load_packed(path)(x), final(x)), False, "not equal to the bit")


def said(is_exact, is_one_step, otherwise) -> str:
    return EXACT if is_exact else ONE_STEP if is_one_step else f"off: {otherwise}"


TARGETS = {"tflite": by_tflite, "onnx": by_onnx, "packed": by_packed}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TABLE)
def test_what_becomes_of_it(name, target, tmp_path):
    final, ranges, x = applied(name)
    assert np.abs(final(x)).max() > 0
    expected = getattr(TABLE[name], target)
    try:
        found = TARGETS[target](final, ranges, x, tmp_path / "file")
    except ValueError as refusal:
        found = str(refusal)
        assert not list(tmp_path.iterdir())
        assert expected not in (EXACT, ONE_STEP) and expected in found, found
        assert any(name in found for name in (f"Layer {final.layers[-1].name!r}", "input 'given'", repr(final.name)))
    else:
        assert found == expected
    # A plan knows classes and formats, not every option of a layer.
    unsupported = export.plan(final, target).unsupported
    assert not unsupported if expected in (EXACT, ONE_STEP) else unsupported or expected not in (NO_TFLITE, NO_ONNX)


REFUSED = [
    (name, target)
    for name, case in {**LAYERS, "activation mish": TABLE["activation mish"]}.items()
    for target in TARGETS
    if getattr(case, target) not in (EXACT, ONE_STEP)
]


@pytest.mark.parametrize(("name", "target"), REFUSED)
def test_what_a_file_does_not_take_is_refused_before_training(name, target):
    case = TABLE[name]
    model = network(case)
    with pytest.raises(ValueError) as refusal:
        fliqs_tf.wrap(model, FORMATS, target=target, **case.options)
    said = str(refusal.value)
    if case.options:  # embeddings, attention_scores
        assert f"target={target!r} does not support {next(iter(case.options))}=True" in said
    else:
        assert f"Layer {model.layers[-1].name!r}" in said or repr(model.name) in said
        assert getattr(case, target) in said or "the ONNX exporter does not support" in said


@pytest.mark.parametrize("target", ["tflite", "onnx"])
@pytest.mark.parametrize(
    ("dtype", "shape"), [("int32", VECTOR), ("uint8", IMAGE), ("float16", VECTOR), ("float32", (None, None, 4))]
)
def test_and_inputs_that_it_does_not_take_too(dtype, shape, target):
    x = L.Input(shape, dtype=dtype, name="given")
    y = L.Rescaling(0.5)(x)
    model = keras.Model(x, L.Conv2D(2, 3)(y) if len(shape) == 3 else L.Dense(2)(y))
    if (dtype, target) == ("float32", "onnx"):  # sizes may stay open
        assert fliqs_tf.wrap(model, FORMATS, target=target).decisions
    else:
        with pytest.raises(ValueError, match=f"input 'given' .*({dtype}|open shape)"):
            fliqs_tf.wrap(model, FORMATS, target=target)


@functools.lru_cache(1)
def searched(name: str):
    """(model that a search of two steps has decided, examples for ranges, examples to compare on)."""
    case = KERNELS[name]
    model = network(case)
    ranges, x = examples(case, model.input.dtype == "int32")
    qmodel = fliqs_tf.wrap(model, FORMATS, **case.options)
    qmodel.compile("sgd", "mse", target_cost="0.8x INT8", cost="memory")
    y = np.zeros(qmodel.network(ranges).shape, np.float32)
    qmodel.fit(ranges, y, batch_size=len(x) // 2, verbose=0)
    return qmodel.deploy(), ranges, x


@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name in KERNELS for target in TARGETS if (name, target) not in REFUSED]
)
def test_what_a_search_decides_is_what_the_file_computes(name, target, tmp_path):
    final, ranges, x = searched(name)
    assert np.abs(final(x)).max() > 0
    # Ranges follow the training data, so that some inputs lie next to the middle between two codes.
    assert TARGETS[target](final, ranges, x, tmp_path / "file") in (EXACT, ONE_STEP)


def test_all_that_the_exporters_and_the_graph_know_is_in_the_table():
    has = {type(case.layer()) for case in LAYERS.values()}
    known = {
        *layer_types._KERNELS,
        *layer_types._ATTENTION,
        L.Embedding,
        *onnx_layers.CONVERTERS,
        *lowering_layers._READERS,
    }
    known |= {*commuting.COMMUTING, *boundaries.COMPUTING}
    missing = {cls.__name__ for cls in known - has - set(requantize.ROUNDINGS)}
    assert not missing


def test_all_activations_of_keras_are_in_the_table():
    functions = {name for name in vars(keras.activations) if isinstance(getattr(keras.activations, name), FunctionType)}
    # Not activations that a layer can be given by name.
    assert functions - {"get", "serialize", "deserialize", "threshold"} == set(ACTIVATIONS)
