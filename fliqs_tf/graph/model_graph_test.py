import numpy as np
import pytest

import fliqs_tf
from fliqs_tf import export
from fliqs_tf._keras import keras
from fliqs_tf.graph import rewriting, walking
from fliqs_tf.graph.model_graph import ModelGraph

L = keras.layers


def nested():
    """x -> a -> net(inner) -> attention, twice."""
    inner = keras.Sequential([L.Input((5, 4)), L.Dense(4, name="inner")], name="net")
    x = L.Input((5, 4), name="x")
    y = inner(L.Dense(4, name="a")(x))
    return keras.Model(x, L.MultiHeadAttention(2, 3, name="attention")(y, y))


def image_network():
    return keras.Sequential(
        [
            L.Input((8, 8, 2), name="image"),
            L.Conv2D(3, 3, name="conv"),
            L.BatchNormalization(name="norm"),
            L.ReLU(name="relu"),
            L.Flatten(name="flat"),
            L.Dense(2, activation="softmax", name="fc"),
        ]
    )


@pytest.fixture
def walked(monkeypatch):
    """The models that are walked, in their order."""
    found, walk = [], walking.walk

    def counted(model):
        if isinstance(model, keras.Model):
            found.append(model)
        return walk(model)

    monkeypatch.setattr(walking, "walk", counted)
    return found


def times(models):
    return [sum(model is other for other in models) for model in models]


def test_layers_by_path_in_network_order():
    model = nested()
    graph = ModelGraph(model)
    paths = [path for path, layer in graph.layers if not isinstance(layer, L.InputLayer)]
    assert paths[:3] == ["a", "net/inner", "attention"]
    assert {"attention/query", "attention/key", "attention/value", "attention/attention_output"} <= set(paths[3:])
    assert graph.by_path["a"] is model.get_layer("a")
    assert graph.by_path["net/inner"] is model.get_layer("net").get_layer("inner")
    assert [path for path, _ in graph.of_type(L.Dense)] == ["a", "net/inner"]
    assert [path for path, _ in graph.of_type(L.Dense, L.MultiHeadAttention)] == ["a", "net/inner", "attention"]


def test_parts_have_nested_networks_too_before_what_they_are_made_of():
    graph = ModelGraph(nested())
    paths = [path for path, _ in graph.parts]
    assert paths.index("net") + 1 == paths.index("net/inner")
    assert [path for path, _ in graph.parts if path != "net"] == [path for path, _ in graph.layers]


def test_layers_with_kernels_and_products_of_attention():
    model = nested()
    graph = ModelGraph(model)
    projections = [f"attention/{name}" for name in ("query", "key", "value", "attention_output")]
    assert sorted(path for path, _ in graph.with_kernels) == sorted(["a", "net/inner", *projections])
    attention = model.get_layer("attention")
    assert graph.attention_products == (
        ("attention/scores", (id(attention), "scores")),
        ("attention/context", (id(attention), "context")),
    )


def test_a_layer_is_a_graph_too():
    layer = L.MultiHeadAttention(2, 3)
    layer(np.ones((1, 5, 4), np.float32), np.ones((1, 5, 4), np.float32))
    assert {path for path, _ in ModelGraph(layer).with_kernels} == {"query", "key", "value", "attention_output"}
    assert [path for path, _ in ModelGraph(layer).attention_products] == ["scores", "context"]


def test_everything_is_found_once_and_only_when_it_is_asked_for(walked):
    graph = ModelGraph(image_network())
    assert not walked
    assert graph.layers is graph.layers and graph.by_path is graph.by_path and graph.dataflow is graph.dataflow
    assert graph.with_kernels and graph.of_type(L.Dense) and len(graph.parts) == len(graph.layers)
    assert walked == [graph.model]


def test_a_graph_stands_for_its_model():
    model = image_network()
    graph = ModelGraph(model)
    assert ModelGraph.of(graph) is graph
    assert ModelGraph.of(model).model is model
    assert fliqs_tf.costs.sites(graph) == fliqs_tf.costs.sites(model)


def test_what_puts_layers_in_makes_a_new_graph():
    graph = ModelGraph(image_network())
    before = graph.layers, graph.dataflow
    made = rewriting.with_added(graph, {"norm": [L.Rescaling(2.0, name="twice")]})
    assert "twice" in made.by_path and "twice" in [call.path for call in made.dataflow.calls]
    assert made.by_path["conv"] is not graph.by_path["conv"]
    assert (graph.layers, graph.dataflow) == before and "twice" not in dict(ModelGraph(graph.model).layers)


@pytest.mark.parametrize("target", [None, "onnx", "tflite"])
def test_wrap_walks_each_model_once(walked, target):
    model = image_network()
    searched = fliqs_tf.wrap(model, ["INT4", "INT8"], target=target)
    assert searched.decisions and searched.sites
    assert any(each is model for each in walked) and any(each is searched.network for each in walked)
    assert max(times(walked)) == 1
    # The model and its copy; one with softmax apart, one with boundary quantizers.
    assert len(walked) == (4 if target == "tflite" else 2)


@pytest.mark.parametrize("target", ["onnx", "packed", "tflite"])
def test_exporters_walk_each_model_once(walked, target, tmp_path):
    pytest.importorskip({"onnx": "onnx", "packed": "safetensors", "tflite": "ai_edge_litert"}[target])
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype(np.float32)
    final = fliqs_tf.apply(image_network(), "INT8", calibration_data=x)
    walked.clear()
    options = {"representative": x} if target == "tflite" else {}
    getattr(export, target)(final, tmp_path / "file", **options)
    assert max(times(walked)) == 1
    # The model; what a packed file restores; those with softmax apart, with boundary quantizers, as shipped.
    assert len(walked) == {"onnx": 1, "packed": 2, "tflite": 4}[target]
