"""One reader for all data that users give."""

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.io import batches

X = np.arange(12, dtype=np.float32).reshape(6, 2)
Y = np.arange(6)
W = np.linspace(0, 1, 6)


def one_input():
    return keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])


def two_inputs():
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    return keras.Model({"a": a, "b": b}, keras.layers.Dense(1)(keras.layers.Add()([a, b])))


def in_order(data, model=None, size=4):
    source = batches.read(data, model or one_input(), "data")
    return [batches.Batch(*(None if p is None else tf.nest.map_structure(np.asarray, p) for p in b))
            for b in source.in_order(size)]  # fmt: skip


class Sequence:
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[2 * i : 2 * i + 2], Y[2 * i : 2 * i + 2]


def dataset(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0]).batch(4)


@pytest.mark.parametrize(
    "make, sizes, with_labels",
    [
        (lambda: X, [4, 2], False),
        (lambda: tf.constant(X), [4, 2], False),
        (lambda: (X,), [4, 2], False),
        (lambda: (X, Y), [4, 2], True),
        (lambda: (X, Y.tolist()), [4, 2], True),
        (lambda: (X, Y, W), [4, 2], True),
        (lambda: dataset(X), [4, 2], False),
        (lambda: dataset(X, Y), [4, 2], True),
        (lambda: [X[:3], X[3:]], [3, 3], False),
        (lambda: [[X[:3]], [X[3:]]], [3, 3], False),  # as the converter of TFLite takes them
        (lambda: [(X[:3], Y[:3]), (X[3:], Y[3:])], [3, 3], True),
        (lambda: (b for b in [(X[:1], Y[:1]), (X[1:], Y[1:])]), [1, 5], True),
        (lambda: Sequence(), [2, 2, 2], True),
    ],
)
def test_what_is_understood(make, sizes, with_labels):
    read = in_order(make())
    assert [len(b.x) for b in read] == sizes
    np.testing.assert_array_equal(np.concatenate([b.x for b in read]), X)
    assert batches.read(make(), one_input(), "data").has_labels == with_labels
    if with_labels:
        np.testing.assert_array_equal(np.concatenate([b.y for b in read]), Y)
    else:
        assert all(b.y is None for b in read)


def test_weights_and_doubles():
    (first, _) = in_order((X.astype(np.float64), Y, W))
    assert first.x.dtype == np.float32  # as Keras does
    np.testing.assert_array_equal(first.sample_weight, W[:4].astype(np.float32))


@pytest.mark.parametrize(
    "data",
    [
        {"a": X, "b": 2 * X},
        [X, 2 * X],
        ({"a": X, "b": 2 * X}, Y),
        [({"a": X, "b": 2 * X}, Y)],
        [{"b": 2 * X, "a": X}],
        [[X, 2 * X]],
        ([X, 2 * X], [Y, Y]),
    ],
)
def test_several_inputs(data):
    (batch,) = in_order(data, two_inputs(), size=8)
    a, b = tf.nest.flatten(batch.x)
    np.testing.assert_array_equal(a, X)
    np.testing.assert_array_equal(b, 2 * X)


def test_a_list_of_as_many_arrays_as_a_model_of_one_input_has_batches_is_batches():
    assert [len(b.x) for b in in_order([X, X[:1]])] == [6, 1]


def test_some_of_arrays_come_from_everywhere_in_nearly_one_size_and_hold_every_row_once():
    x = np.arange(66, dtype=np.float32).reshape(33, 2)
    chosen = list(batches.read(({"a": x, "b": tf.constant(x)}), two_inputs(), "data").some(5, 32))
    assert [len(b.x["a"]) for b in chosen] == [17, 16]
    np.testing.assert_array_equal(np.sort(np.concatenate([b.x["b"][:, 0] for b in chosen])), x[:, 0])
    np.testing.assert_array_equal(chosen[1].x["a"], chosen[1].x["b"])
    assert len(list(batches.read(x, one_input(), "data").some(2, 4))) == 2


def test_some_of_a_sequence_come_from_everywhere():
    class Long(Sequence):
        def __len__(self):
            return 320

        def __getitem__(self, i):
            return np.full((1, 2), i, np.float32)

    chosen = [float(b.x[0, 0]) for b in batches.read(Long(), one_input(), "data").some(32, 1)]
    assert len(set(chosen)) == 32 and max(chosen) > 160


def taken(source, count, size=2, seed=0):
    endless = source.endless(size, seed)
    return [next(endless) for _ in range(count)]


def test_endless_batches_of_arrays_are_shuffled_anew_and_whole():
    source = batches.read((X, Y), one_input(), "data")
    labels = np.array([b.y for b in taken(source, 6)])
    assert labels.shape == (6, 2)
    for epoch in (labels[:3], labels[3:]):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), Y)
    assert not np.array_equal(labels[:3], labels[3:])
    np.testing.assert_array_equal(labels, np.array([b.y for b in taken(source, 6)]))
    assert not np.array_equal(labels, np.array([b.y for b in taken(source, 6, seed=-1)]))
    assert [len(b.x) for b in taken(source, 3, size=4)] == [4, 4, 4]
    assert [len(b.x) for b in taken(source, 2, size=100)] == [6, 6]


@pytest.mark.parametrize("make", [lambda b: b, iter, lambda b: tf.data.Dataset.from_generator(
    lambda: iter(b), output_signature=tf.TensorSpec([None, 2], tf.float32))])  # fmt: skip
def test_endless_batches_go_round_without_those_of_another_size(make):
    source = batches.read(make([X[:2], X[2:4], X[4:5]]), one_input(), "data")
    np.testing.assert_array_equal([np.asarray(b.x)[0, 0] for b in taken(source, 5)], [0, 4, 0, 4, 0])


@pytest.mark.parametrize(
    "data, error, message",
    [
        ("digits", TypeError, "data must be a tf.data.Dataset of batches, .* got str"),
        (7, TypeError, "data must be a tf.data.Dataset of batches, .* got int"),
        (["a"], TypeError, "its batches hold str in place of arrays"),
        (X[0], ValueError, r"inputs of shape \(2,\), but the network takes batches \(None, 2\). There must be an axis"),
        (np.ones((6, 3)), ValueError, r"inputs of shape \(6, 3\), but the network takes batches \(None, 2\)\.$"),
        ([X[0]], ValueError, r"inputs of shape \(2,\), but"),
        (dataset(X[0]), ValueError, r"inputs of shape \(None,\), but"),
        ([X, Y], None, ""),
        ([[X, Y]], ValueError, r"got a list of 2 in place of x, but the model has 1 input. Labels go into a tuple"),
        ((X, Y, W, W), ValueError, r"a tuple is \(x, y\) or \(x, y, sample_weight\); got one of 4"),
        ((X, Y[:3]), ValueError, r"data has arrays of \[3, 6\] examples"),
        ((X, 1), ValueError, "labels without an axis of examples"),
        (X[:0], ValueError, "data has no example"),
        ([], ValueError, "data has no batch"),
        (iter(()), ValueError, "data has no batch"),
        ({"a": X, "b": X}, ValueError, "data has 2 inputs, the model 1"),
    ],
)
def test_what_is_refused(data, error, message):
    if error is None:  # the second batch of this list is none, which is seen when it is read
        error, message = ValueError, r"inputs of shape \(6,\)"
        data, source = None, batches.read(data, one_input(), "data")
        with pytest.raises(error, match=message):
            list(source.in_order(4))
        return
    with pytest.raises(error, match=message):
        batches.read(data, one_input(), "data")
