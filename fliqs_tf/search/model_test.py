import numpy as np
import pytest
import tensorflow as tf

import fliqs_tf
from fliqs_tf._keras import keras
from fliqs_tf.search.model import SearchModel

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(128, 8, 8, 1)).astype(np.float32)
# Which quadrant is brightest: easy, but not for one pixel.
LABELS = (
    np.stack([IMAGES[:, :4, :4], IMAGES[:, :4, 4:], IMAGES[:, 4:, :4], IMAGES[:, 4:, 4:]], axis=1)
    .sum(axis=(2, 3, 4))
    .argmax(axis=1)
)


def convnet():
    return keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, strides=2, name="conv"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(8, activation="relu", name="hidden"),
            keras.layers.Dense(4, name="logits"),
        ],
        name="convnet",
    )


def compiled(space=("INT4", "INT8"), model=None, **options):
    keras.utils.set_random_seed(1)
    qmodel = fliqs_tf.wrap(model or convnet(), space)
    qmodel.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # Compiling the controller takes longer than running it for these few steps.
        **{"target_cost": "0.625x INT8", "controller": {"jit_compile": False}, **options},
    )
    return qmodel


@pytest.fixture(scope="module")
def searched():
    qmodel = compiled()
    history = qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=20, verbose=0, quality_data=(IMAGES[:64], LABELS[:64]))
    return qmodel, history.history


def test_logs_say_how_the_search_goes(searched):
    qmodel, logs = searched
    assert {"loss", "accuracy", "reward", "cost", "entropy", "switch_rate"} <= set(logs)
    # 2 of 20 epochs are drawn almost uniformly: the odds of INT4 to INT8 are 1 / (1 + (noise / 0.05)^2) to 1.
    narrow = 1 / (1 + (fliqs_tf.Format("INT4").noise() / 0.05) ** 2)
    share = narrow / (1 + narrow)
    uniform = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    np.testing.assert_allclose(logs["entropy"][:2], uniform, rtol=1e-4)
    assert logs["entropy"][-1] < 0.01
    assert logs["switch_rate"][-1] == 0
    exact = fliqs_tf.costs.bops(qmodel, qmodel.recipe())
    np.testing.assert_allclose(logs["cost"][-1], exact, rtol=1e-3)
    assert logs["loss"][-1] < logs["loss"][0]


def test_deployed_model_computes_what_the_search_model_does_to_the_bit(searched):
    qmodel, _ = searched
    final = qmodel.deploy()
    assert not isinstance(final, fliqs_tf.SearchModel)
    np.testing.assert_array_equal(final.predict(IMAGES, verbose=0), qmodel.predict(IMAGES, verbose=0))
    np.testing.assert_array_equal(np.asarray(final(IMAGES[:32])), np.asarray(qmodel(IMAGES[:32])))
    quantized = [layer for layer in final.layers if isinstance(layer, fliqs_tf.Quantized)]
    assert {layer.name: layer.weight_quantizers[0].space.names[0] for layer in quantized} == qmodel.recipe().formats


def test_saved_search_model_loads_with_recipe_target_and_outputs(searched, tmp_path):
    qmodel, _ = searched
    qmodel.save(tmp_path / "search.keras")
    loaded = keras.models.load_model(tmp_path / "search.keras")
    assert loaded.recipe() == qmodel.recipe()
    assert loaded.target_cost == qmodel.target_cost
    np.testing.assert_array_equal(loaded.predict(IMAGES, verbose=0), qmodel.predict(IMAGES, verbose=0))
    np.testing.assert_array_equal(loaded.controller.logits, qmodel.controller.logits)


def test_saved_deployed_model_loads_with_the_same_outputs(searched, tmp_path):
    final = searched[0].deploy()
    final.save(tmp_path / "final.keras")
    loaded = keras.models.load_model(tmp_path / "final.keras")
    np.testing.assert_array_equal(loaded.predict(IMAGES, verbose=0), final.predict(IMAGES, verbose=0))


def test_deploying_another_recipe_restates_batch_normalization_for_it(searched):
    qmodel, _ = searched
    other = qmodel.deploy(fliqs_tf.Recipe.uniform(qmodel, "INT4"))
    norm = next(layer for layer in other.layers if isinstance(layer, keras.layers.BatchNormalization))
    conv = next(layer for layer in other.layers if layer.name == "conv")
    # All 128 training images in batches of 32: the mean of the batch means is the mean of all.
    np.testing.assert_allclose(
        norm.moving_mean, np.mean(np.asarray(conv(IMAGES)), axis=(0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    assert fliqs_tf.costs.bops(other) == fliqs_tf.costs.bops(qmodel, "INT4")


def test_a_uniform_recipe_leaves_in_float_what_the_search_does():
    rules = [fliqs_tf.Rule("logits", None)]
    qmodel = fliqs_tf.wrap(convnet(), ["INT4", "INT8"], rules=rules)
    uniform = fliqs_tf.Recipe.uniform(qmodel, "INT4")
    assert dict(uniform.formats) == {"conv": "INT4", "hidden": "INT4"} and uniform.float_layers == ("logits",)
    final = fliqs_tf.apply(convnet(), uniform)
    # 3x3 positions of 9 * 4 products each; 36 inputs to 8; in float 8 to 4.
    assert fliqs_tf.costs.bops(final) == pytest.approx((16 * (9 * 36 + 36 * 8) + 32**2 * 8 * 4) / 1e9)
    with pytest.raises(ValueError, match="has fixed formats already"):
        fliqs_tf.Recipe.uniform(final, "INT8")


def test_a_recipe_that_decides_on_other_tensors_is_refused(searched):
    qmodel, _ = searched
    formats = qmodel.recipe().formats
    with pytest.raises(ValueError, match="tensors='weights', layers {}; the model has tensors='together'"):
        qmodel.deploy(fliqs_tf.Recipe(formats, tensors="weights"))
    with pytest.raises(ValueError, match="decides on other tensors"):
        qmodel.deploy(fliqs_tf.Recipe(formats, layers={"conv": ("conv", "other")}))


def test_formats_change_without_a_new_trace(monkeypatch):
    traces = []
    original = SearchModel.train_step
    monkeypatch.setattr(SearchModel, "train_step", lambda self, data: traces.append(0) or original(self, data))
    qmodel = compiled(space=["INT4", "INT8", "E4M3", "BF16"])
    qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=1, verbose=0)
    first = len(traces)
    qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=5, verbose=0)
    assert len(traces) == first <= 2


def test_weight_step_runs_with_the_drawn_formats():
    # With FP32 or INT2 to choose from, the outputs of a step must be those of the sample that was drawn.
    qmodel = compiled(space=["INT2", "FP32"], target_cost="1x INT8", search_steps=100)
    qmodel.configure_controller(100, held_out=False)
    seen = []
    qmodel.compute_loss = lambda x=None, y=None, y_pred=None, sample_weight=None, **kwargs: (
        seen.append(y_pred),
        SearchModel.compute_loss(qmodel, x, y, y_pred, sample_weight, **kwargs),
    )[1]
    qmodel.optimizer.build(qmodel.trainable_variables)
    sample = qmodel._draw(1)[0]
    qmodel.use_sample(sample)
    start = qmodel.network.get_weights()
    expected = np.asarray(qmodel.network(tf.constant(IMAGES[:32]), training=True))
    qmodel.network.set_weights(start)  # that call moved the ranges and the moving averages
    qmodel.use_sample()
    qmodel.train_step((tf.constant(IMAGES[:32]), tf.constant(LABELS[:32])))
    np.testing.assert_allclose(np.asarray(seen[0]), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(qmodel.previous_sample, sample)


def test_reading_quality_changes_nothing_and_ranks_formats():
    qmodel = compiled(space=["INT2", "INT8"], target_cost="0.5x INT8")
    qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=2, verbose=0)
    before = [np.array(v) for v in qmodel.network.variables if "choice" not in v.name]
    wide = qmodel.read_quality((IMAGES, LABELS), tf.constant([1, 1, 1]))
    narrow = qmodel.read_quality((IMAGES, LABELS), tf.constant([0, 0, 0]))
    assert float(wide) > float(narrow)
    after = [np.array(v) for v in qmodel.network.variables if "choice" not in v.name]
    for old, new in zip(before, after):
        np.testing.assert_array_equal(old, new)


def test_between_steps_the_model_is_that_of_its_recipe():
    qmodel = compiled(search_steps=40)
    qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=3, verbose=0)
    chosen = qmodel.recipe().formats
    for decision in qmodel.decisions:
        for quantizer in decision.quantizers:
            assert decision.options[int(np.asarray(quantizer.choice))] == chosen[decision.name]


def test_same_seed_same_run_and_another_seed_another():
    def run(seed):
        qmodel = compiled(seed=seed, train_with="sample")
        qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=3, verbose=0, shuffle=False)
        return np.concatenate([np.ravel(w) for w in qmodel.network.get_weights()])

    first, again, other = run(3), run(3), run(4)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("estimator", ["critic", "reinforce"])
@pytest.mark.parametrize("quality", ["loss", "accuracy"])
def test_estimators_and_qualities_on_the_training_batch(estimator, quality):
    qmodel = compiled(quality=quality, controller={"estimator": estimator, "jit_compile": False})
    logs = qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=4, verbose=0).history
    assert np.isfinite(logs["reward"]).all()
    assert int(np.asarray(qmodel.controller.step)) == 16


@pytest.mark.parametrize("tensors", ["together", "weights", "separate"])
def test_granularity_and_tensors(tensors):
    qmodel = fliqs_tf.wrap(convnet(), ["INT4", "INT8"], granularity="model", tensors=tensors)
    names = [d.name for d in qmodel.decisions]
    assert names == (["model/weights", "model/activations"] if tensors == "separate" else ["model"])
    recipe = qmodel.recipe()
    again = fliqs_tf.apply(convnet(), recipe)
    assert fliqs_tf.costs.bops(again) == fliqs_tf.costs.bops(qmodel, recipe)


def test_metric_object_and_function_as_quality():
    metric = keras.metrics.SparseTopKCategoricalAccuracy(k=2)
    qmodel = compiled(quality=metric)
    reading = float(qmodel.read_quality((IMAGES, LABELS), tf.constant([1, 1, 1])))
    assert reading in [n / 128 for n in range(129)]
    by_function = compiled(quality=lambda y, y_pred: -tf.reduce_mean(tf.abs(y_pred), axis=1))
    assert float(by_function.read_quality((IMAGES, LABELS), tf.constant([1, 1, 1]))) < 0


def test_search_goes_on_after_loading(searched, tmp_path):
    qmodel = compiled(search_steps=16)
    qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=2, verbose=0)
    qmodel.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    loaded.fit(IMAGES, LABELS, batch_size=32, epochs=4, initial_epoch=2, verbose=0)
    assert int(np.asarray(loaded.controller.step)) == 16
    assert bool(np.asarray(loaded.controller.decided))


# ---- what a file holds of compile


def reloaded(qmodel, path):
    qmodel.save(path / "search.keras")
    return keras.models.load_model(path / "search.keras")


def test_numbers_of_numpy_and_a_reward_object_are_saved(tmp_path):
    qmodel = compiled(
        target_cost=np.float32(2.5e-5),
        seed=np.int64(5),
        quality_every=np.int32(7),
        reward=fliqs_tf.rewards.OneSided(-0.5),
    )
    again = reloaded(qmodel, tmp_path)
    assert again.target_cost == qmodel.target_cost == float(np.float32(2.5e-5))
    assert again._compiled_for.seed == 5 and again._compiled_for.quality_every == 7
    assert again._compiled_for.reward == fliqs_tf.rewards.OneSided(-0.5)
    assert reloaded(again, tmp_path)._compiled_for.reward == fliqs_tf.rewards.OneSided(-0.5)


def test_the_memory_cost_of_a_profile_is_saved(tmp_path):
    profile = fliqs_tf.Profile.load("nvidia_h100_sxm")
    # 9 * 4 + 36 * 8 + 8 * 4 = 356 weights of one byte, half-way to two bytes each.
    qmodel = fliqs_tf.wrap(convnet(), profile=profile)
    qmodel.compile("adam", "mse", target_cost=1.5 * 356 / 2**20, cost=profile.memory)
    again = reloaded(qmodel, tmp_path)
    assert again.target_cost == 1.5 * 356 / 2**20
    assert (again.cost.name, again.cost.unit) == (profile.memory.name, "MiB")
    assert again.cost_table.reachable() == qmodel.cost_table.reachable() == (356 / 2**20, 2 * 356 / 2**20)


def test_a_cost_object_and_a_metric_are_saved(tmp_path):
    quality = keras.metrics.SparseTopKCategoricalAccuracy(k=2)
    again = reloaded(compiled(cost=fliqs_tf.costs.memory, quality=quality), tmp_path)
    assert again.cost is fliqs_tf.costs.memory
    assert again._compiled_for.given["quality"].get_config()["k"] == 2


@pytest.mark.parametrize(
    "option",
    [
        {"quality": lambda y, y_pred: -tf.reduce_mean(tf.abs(y_pred), axis=1)},
        {"reward": lambda quality, ratio: quality - ratio},
        {"cost": fliqs_tf.costs.Cost("MACs times bits", "k", 1000, lambda site, w, a: site.macs * w.bits)},
    ],
)
def test_code_is_not_saved_and_nothing_takes_its_place(option, tmp_path, caplog):
    qmodel, name = compiled(**option), next(iter(option))
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        again = reloaded(qmodel, tmp_path)
    assert f"such as this {name} of compile" in caplog.text
    assert f"Model 'convnet' is not compiled: it was with a {name} of Python code" in caplog.text
    assert again._compiled_for is None and again.target_cost is None
    np.testing.assert_array_equal(again.predict(IMAGES, verbose=0), qmodel.predict(IMAGES, verbose=0))
    with pytest.raises(RuntimeError, match="Call compile"):
        again.fit(IMAGES, LABELS, verbose=0)


# ---- bad input


def test_fit_before_compile():
    with pytest.raises(RuntimeError, match=r"Call compile\(optimizer, loss, target_cost"):
        fliqs_tf.wrap(convnet()).fit(IMAGES, LABELS)


@pytest.mark.parametrize("what", ["cost", "cost_table"])
def test_what_compile_says_is_not_known_before_it(what):
    with pytest.raises(RuntimeError, match=r"Call compile\(optimizer, loss, target_cost=...\) first"):
        getattr(fliqs_tf.wrap(convnet()), what)


def test_fit_without_target():
    qmodel = compiled(target_cost=None)
    with pytest.raises(ValueError, match=r"without target_cost; a search needs it, for example"):
        qmodel.configure_controller(8)
    with pytest.raises(ValueError, match=r"without target_cost; fit needs it, for example"):
        qmodel.fit(IMAGES, LABELS)


def test_target_out_of_reach_prints_the_range():
    low, high = (fliqs_tf.costs.bops(convnet(), f) for f in ("INT4", "INT8"))
    with pytest.raises(ValueError, match=rf"cost from {low:.6g} to {high:.6g} GBOPs"):
        compiled(target_cost="0.1x INT8")


def test_loss_that_is_not_finite_stops_and_names_the_step():
    images = IMAGES.copy()
    images[70] = np.nan  # third batch of 32
    # Without a ReLU, which may turn NaN into 0.
    layers = [keras.layers.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(4)]
    qmodel = compiled(model=keras.Sequential(layers))
    with pytest.raises(FloatingPointError, match=r"not finite at step 2\."):
        qmodel.fit(images, LABELS, batch_size=32, epochs=2, verbose=0, shuffle=False)


def test_length_that_cannot_be_known():
    data = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).filter(lambda x, y: True).batch(32)
    with pytest.raises(ValueError, match="Give fit steps_per_epoch, or compile search_steps"):
        compiled().fit(data)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cost": "joules"}, "Unknown cost 'joules'; known: bops, memory"),
        ({"quality": "f1"}, "quality must be 'loss', 'accuracy', a Keras metric"),
        ({"reward": "soft_exponential"}, "must be positive; minus the loss is not"),
        ({"quality_samples": 1}, "quality_samples must be a whole number from 2 to 2147483647, got 1"),
        ({"quality_every": 2.5}, "quality_every must be a whole number from 1 to 2147483647, got 2.5"),
        ({"search_steps": 0}, "search_steps must be a whole number from 1 to"),
        ({"seed": None}, "seed must be a whole number from -2147483648 to 2147483647, got None"),
        ({"seed": 2**31}, "seed must be a whole number"),
        ({"target_cost": "cheap"}, "got 'cheap'"),
    ],
)
def test_bad_compile_options(option, message):
    with pytest.raises(ValueError, match=message):
        compiled(**option)


def test_foreign_recipe():
    qmodel = compiled()
    with pytest.raises(ValueError, match=r"no format for 'conv', 'hidden', 'logits'; unknown 'conv7'"):
        qmodel.deploy(fliqs_tf.Recipe({"conv7": "INT4"}))


def test_a_callback_that_ends_the_search_early_ends_it_with_a_decision_at_the_target(caplog):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 0

    qmodel = compiled(search_steps=1000, target_cost="0.5x INT8", quality_every=5)
    with caplog.at_level("WARNING", logger="fliqs_tf"):
        qmodel.fit(
            IMAGES, LABELS, batch_size=32, epochs=3, verbose=0, callbacks=[Stop()], quality_data=(IMAGES, LABELS)
        )
    assert bool(tf.convert_to_tensor(qmodel.controller.decided))
    assert float(qmodel.controller.entropy()) < 1e-3
    assert "after 4 steps without one reading" in caplog.text


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (iter([]), ValueError, "quality_data has no batch"),
        ("digits", TypeError, "quality_data must be a tf.data.Dataset of batches, arrays .* got str"),
        (IMAGES, ValueError, r"quality_data has no labels: give batches \(x, y\)"),
    ],
)
def test_quality_data_of_a_kind_that_does_not_work(data, error, message):
    with pytest.raises(error, match=message):
        compiled().fit(IMAGES, LABELS, verbose=0, quality_data=data)


def test_training_on_batches_needs_to_know_how_many():
    with pytest.raises(RuntimeError, match="configure_controller"):
        compiled().train_on_batch(IMAGES[:8], LABELS[:8])
    qmodel = compiled()
    qmodel.configure_controller(10)
    qmodel.train_on_batch(IMAGES[:8], LABELS[:8])
    assert int(tf.convert_to_tensor(qmodel.controller.step)) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((IMAGES, LABELS), r"inputs of shape \(8, 8, 1\), but the network takes batches \(None, 8, 8, 1\). There must"),
        ((IMAGES[None, :32], LABELS[:1]), r"quality_data has labels without an axis of examples"),
    ],
)
def test_quality_data_without_batches(data, message):
    with pytest.raises(ValueError, match=message):
        compiled().fit(IMAGES, LABELS, verbose=0, quality_data=tf.data.Dataset.from_tensor_slices(data))


def test_quality_data_of_a_lone_feature_need_not_give_it_an_axis():
    x, y = IMAGES[:32, 0, 0, 0], LABELS[:32]
    layers = [keras.layers.Input((1,)), keras.layers.Dense(8), keras.layers.Dense(4)]
    compiled(model=keras.Sequential(layers)).fit(x[:, None], y, verbose=0, epochs=5, quality_data=(x, y))


def test_weights_train_in_the_widest_formats_of_8_bits_or_fewer_until_the_decision():
    class Samples(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            self.seen.append(np.array(self.model.previous_sample).tolist())

    samples = Samples()
    qmodel = compiled(space=("INT4", "INT8", "BF16"), target_cost="0.5x INT8")
    qmodel.fit(IMAGES, LABELS, batch_size=32, epochs=4, verbose=0, callbacks=[samples])
    assert samples.seen[:4] == [[1, 1, 1]] * 4  # 16 steps, decided after 4
    decided = [d.options.index(qmodel.recipe().formats[d.name]) for d in qmodel.decisions]
    assert samples.seen[4:] == [decided] * 12
    assert decided != [1, 1, 1]


@pytest.mark.parametrize(("space", "option"), [(["INT4", "INT8", "BF16"], 1), (["BF16", "FP32"], 0)])
def test_the_choice_to_train_with(space, option):
    cost = "1x INT8" if "INT8" in space else "1x BF16"
    assert compiled(space=space, target_cost=cost).training_choice().tolist() == [option] * 3


def test_a_generator_of_training_data_trains_with_samples():
    def batches():
        while True:
            yield IMAGES[:32], LABELS[:32]

    qmodel = compiled(search_steps=100)
    qmodel.fit(batches(), steps_per_epoch=4, verbose=0)
    assert qmodel.trains_with_samples and qmodel.controller.readings() == 4
    assert qmodel.controller.decided_at() == 60
    qmodel.fit(batches(), steps_per_epoch=4, verbose=0, quality_data=(IMAGES, LABELS))
    assert not qmodel.trains_with_samples and qmodel.controller.decided_at() == 25


def test_the_widest_formats_need_readings_of_their_own():
    qmodel = compiled(train_with="widest")
    with pytest.raises(ValueError, match="train_with='widest' needs readings on batches of their own"):
        qmodel.configure_controller(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_with": "narrowest"}, "train_with must be 'widest', 'sample' or None, got 'narrowest'"),
        ({"pretrained": True, "train_with": "sample"}, "pretrained=True decides from readings before the first step"),
        ({"pretrained": True, "controller": {"estimator": "reinforce"}}, "by the critic: it goes with neither"),
        ({"pretrained": "yes"}, "pretrained must be True, False or None, got 'yes'"),
    ],
)
def test_unknown_ways_to_train(options, message):
    with pytest.raises(ValueError, match=message):
        compiled(**options)
