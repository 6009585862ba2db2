import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.search import rewards
from fliqs_tf.search.controller import Controller

COSTS = np.array([[1, 4, 16], [1, 4, 0], [0.25, 1, 4]], np.float32)
EFFECTS = np.array([[-0.3, -0.01, 0], [-0.1, 0, 0], [-0.5, -0.02, 0]], np.float32)
SIZES = [3, 2, 3]
PRIOR = [[0.02, 1e-4, 1e-6], [0.02, 1e-4], [0.02, 1e-4, 1e-6]]


def make(total_steps=100, target=6.0, reward="absolute", costs=COSTS, sizes=SIZES, **settings):
    # Compiling takes seconds; that it changes nothing has a test of its own.
    controller = Controller(sizes, **{"jit_compile": False, **settings})
    controller.configure(
        expected_cost=lambda p: tf.reduce_sum(p * costs),
        cost=lambda samples: costs.astype(float)[np.arange(len(costs)), samples].sum(axis=1),
        target=target,
        reward=reward,
        total_steps=total_steps,
    )
    return controller


def quality_of(samples, effects=EFFECTS):
    return tf.reduce_sum(tf.one_hot(samples, effects.shape[1]) * effects, axis=[1, 2])


def search(controller, steps, k=4, every=4, seed=0, noise=0.0, scale=1.0, jit=False):
    step = _step(controller, k, every, noise, scale, jit)
    seeds = tf.constant([[seed, i] for i in range(steps // every)])
    return [{key: float(v) for key, v in step(s).items()} for s in seeds]


@functools.lru_cache(maxsize=8)  # tracing is what takes time
def _step(controller, k, every, noise, scale, jit):
    @tf.function(jit_compile=jit)
    def step(seed):
        samples = controller.sample(seed, k)
        quality = quality_of(samples) + noise * tf.random.stateless_normal([k], seed + 1)
        logs = controller.update(samples, scale * quality)
        controller.advance(every)
        return logs

    return step


def test_at_the_start_all_options_are_alike():
    controller = make()
    p = controller.probabilities().numpy()
    np.testing.assert_allclose(p, [[1 / 3] * 3, [0.5, 0.5, 0], [1 / 3] * 3], rtol=1e-6)
    assert float(controller.entropy()) == pytest.approx(1.0)
    assert float(controller.expected_cost()) == pytest.approx(21 / 3 + 2.5 + 5.25 / 3)


def test_of_equal_options_the_last_is_most_likely():
    controller = make()
    assert controller.most_likely().numpy().tolist() == [2, 1, 2]
    controller.logits.assign([[0, 1, 1], [3, 3, 9], [2, 1, 0]])
    assert controller.most_likely().numpy().tolist() == [1 + 1, 1, 0]
    assert controller.most_likely().dtype == tf.int32


def test_noise_aware_start_tilts_away_from_noise_only():
    prior = [[0.9, 0.1, 0.02, 1e-4]]
    p = make(sizes=[4], costs=np.ones((1, 4)), target=1.0, prior=prior).probabilities().numpy()[0]
    np.testing.assert_allclose(p / p[3], [1 / 325, 1 / 5, 1 / 1.16, 1], rtol=1e-4)
    rough = make(sizes=[4], costs=np.ones((1, 4)), target=1.0, prior=prior, noise_aware_start=False)
    np.testing.assert_allclose(rough.probabilities(), [[0.25] * 4])


def test_warmup_learns_effects_but_no_policy():
    controller = make(total_steps=400, warmup=0.25)
    search(controller, 96)
    assert not np.any(tf.convert_to_tensor(controller.logits))
    assert float(controller.entropy()) == pytest.approx(1.0)
    assert np.abs(controller.effects()[0, 0] - controller.effects()[0, 2]) > 0.1
    search(controller, 8)
    assert float(controller.entropy()) < 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "heaviside"])
def test_after_the_warmup_cost_is_held_and_the_policy_converges(schedule):
    controller = make(total_steps=400, prior=PRIOR, entropy_schedule=schedule, target=8.0)
    logs = search(controller, 400, noise=0.02)
    late = [entry["expected_cost"] for entry in logs[26:]]
    # 1 % where a cold policy stands on a step between two samples.
    np.testing.assert_allclose(late, 8.0, rtol=1e-3 if schedule in ("cosine", "linear") else 1e-2)
    # One decision of three may be drawn between two options, to meet the cost.
    assert logs[-1]["entropy"] < 0.35
    controller.decide()
    assert float(controller.entropy()) < 1e-3


@pytest.mark.parametrize("settings", [{}, {"prior": PRIOR}], ids=["no prior", "prior"])
def test_finds_the_best_sample(settings):
    everything = np.array(list(itertools.product(range(3), range(2), range(3))))
    costs, quality = (t[np.arange(3), everything].sum(axis=1) for t in (COSTS, EFFECTS))
    for target in sorted(set(costs.tolist()))[1::6]:
        controller = make(total_steps=300, target=target, **settings)
        search(controller, 270)
        near = np.abs(costs / target - 1) <= 0.01
        best = everything[near][quality[near].argmax()]
        assert controller.decide().tolist() == best.tolist() == controller.most_likely().numpy().tolist()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_unit_of_quality_does_not_matter(scale):
    results = []
    for s in (1.0, scale):
        controller = make(total_steps=200, prior=PRIOR)
        search(controller, 160, noise=0.02, scale=s)
        results.append(controller.probabilities().numpy())
    np.testing.assert_allclose(*results, atol=0.02)


def test_nothing_moves_a_decision():
    controller = make(total_steps=100, prior=PRIOR)
    search(controller, 80)
    choice = controller.decide()
    before = controller.probabilities().numpy()
    assert before[np.arange(3), choice].min() > 0.9999
    search(controller, 20)
    np.testing.assert_array_equal(controller.probabilities(), before)
    assert controller.decided_at() == 25
    assert make(total_steps=100, estimator="reinforce").decided_at() == 90


def test_lengths_depend_on_what_weights_train_with_and_give_way_to_what_is_given():
    def lengths(trains_with_samples, **settings):
        controller = Controller(SIZES, **settings)
        configured = {"cost": None, "target": 1.0, "reward": "one_sided", "total_steps": 1000}
        controller.configure(expected_cost=None, trains_with_samples=trains_with_samples, **configured)
        return controller.warmup_steps(), controller.decided_at()

    assert lengths(False) == (100, 250)
    assert lengths(True) == (250, 600)
    assert lengths(True, estimator="reinforce") == (250, 900)
    assert lengths(False, frozen=0.9) == (50, 100)
    assert lengths(False, warmup=0.5) == (500, 750)
    assert lengths(False, warmup=0.2, frozen=0.1) == (200, 900)


def test_a_search_makes_at_most_300_readings_or_one_every_2_steps():
    assert make(total_steps=100).reading_interval() == 2
    long = make(total_steps=12_000)
    assert (long.decided_at(), long.reading_interval()) == (3000, 10)
    assert long.steps_to_decide_at(300) == 1200


def test_decides_without_a_reading():
    """Then only what is known of the formats counts."""
    assert make(prior=PRIOR, target=3.0).decide().tolist() == [0, 0, 1]


def test_in_a_function_compiled_inside_or_outside_or_eagerly():
    eager, inside, outside, graph = (
        make(prior=PRIOR),
        make(prior=PRIOR, jit_compile=True),
        make(prior=PRIOR),
        make(prior=PRIOR),
    )
    updates = {
        eager: eager.update,
        inside: tf.function(inside.update),
        graph: tf.function(graph.update),
        outside: tf.function(outside.update, jit_compile=True),
    }
    for i in range(20):
        samples = eager.sample(tf.constant([0, i]), 4)
        for controller, update in updates.items():
            update(samples, quality_of(samples))
            controller.advance(4)
    for other in (inside, outside, graph):
        np.testing.assert_allclose(other.probabilities(), eager.probabilities(), atol=0.02)


def test_one_trace_for_the_whole_run():
    controller, traces = make(total_steps=40), []

    @tf.function
    def step(i):
        traces.append(1)
        samples = controller.sample(tf.stack([0, i]), 2)
        controller.update(samples, quality_of(samples))
        controller.advance()

    for i in range(10):
        step(tf.constant(i))
    controller.total_steps.assign(80)
    controller.target.assign(5.0)
    step(tf.constant(10))
    assert len(traces) == 1


def test_logs_by_hand():
    controller = make(reward=rewards.Absolute(-0.5), target=4.0)
    # Costs 1 + 1 + 0.25 = 2.25 and 16 + 4 + 4 = 24; ratios 0.5625 and 6.
    logs = controller.update([[0, 0, 0], [2, 1, 2]], [0.5, 1.0])
    expected = (0.5 - 0.5 * 0.4375 + 1.0 - 0.5 * 5) / 2
    assert float(logs["reward"]) == pytest.approx(expected)
    assert float(logs["baseline"]) == pytest.approx(expected)  # zero-debiased: the first reward is the mean
    assert float(logs["expected_cost"]) == pytest.approx(11.25)
    assert float(logs["entropy"]) == pytest.approx(1.0)
    logs = controller.update([[0, 0, 0]], [0.5])
    second = 0.5 - 0.5 * 0.4375
    assert float(logs["baseline"]) == pytest.approx((0.99 * 0.01 * expected + 0.01 * second) / (1 - 0.99**2), rel=1e-4)


def test_not_finite_quality_leaves_everything_as_it_was():
    for settings in ({}, {"estimator": "reinforce", "warmup": 0}):
        controller = make(prior=PRIOR, total_steps=10**6, **{"warmup": 8, **settings})
        search(controller, 48)
        before = controller.probabilities().numpy()
        rewards_before = np.array(tf.convert_to_tensor(controller.reward_moments))
        controller.update(controller.sample([0, 99], 4), [0.1, np.nan, 0.2, np.inf])
        assert all(np.isfinite(w).all() for w in controller.get_weights())
        np.testing.assert_array_equal(controller.reward_moments, rewards_before)
        np.testing.assert_allclose(controller.probabilities(), before, atol=0.02)


def test_reinforce_gradient_is_the_analytic_one():
    """d loss / d logits = -A (onehot - pi) + beta dH / dl, with dH / dl_o = -pi_o (log pi_o + H), over decisions."""
    controller = make(estimator="reinforce")
    logits = tf.constant([[0.1, -0.3, 0.2], [0.5, 0.0, 7.0], [0.0, 0.0, 1.0]])
    samples, advantage, beta = tf.constant([[0, 1, 2], [1, 1, 0]]), tf.constant([0.7, -0.2]), 0.3
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = controller._estimator.loss(logits, samples, advantage, beta)
    gradient = tape.gradient(loss, logits).numpy()
    mask = np.arange(3) < np.array(SIZES)[:, None]
    p = np.where(mask, np.exp(logits), 0)
    p /= p.sum(axis=1, keepdims=True)
    log_p = np.log(np.maximum(p, 1e-30))
    entropy = -(p * log_p).sum(axis=1, keepdims=True)
    policy = [-a * (np.eye(3)[s] - p) for a, s in zip(advantage.numpy(), samples.numpy())]
    expected = (np.mean(policy, axis=0) - beta * p * (log_p + entropy)) / 3
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    controller._estimator.sum_over_decisions = True
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = controller._estimator.loss(logits, samples, advantage, beta)
    np.testing.assert_allclose(tape.gradient(loss, logits), 3 * expected, atol=1e-6)


def test_the_first_step_of_adam_is_the_rate():
    controller = make(
        estimator="reinforce",
        warmup=0,
        learning_rate=0.01,
        normalize_advantage=False,
        baseline_momentum=0.5,
        beta_max=0.0,
    )
    controller.update([[0, 0, 0]], [0.5])  # equal to its own baseline: no advantage, no step
    np.testing.assert_array_equal(controller.logits, np.zeros((3, 3)))
    controller.update([[1, 1, 1]], [9.0])
    # Second step of a moment estimate whose first gradient was 0.
    moved = 0.01 * (0.1 / (1 - 0.9**2)) / np.sqrt(0.001 / (1 - 0.999**2))
    logits = np.array(tf.convert_to_tensor(controller.logits))
    np.testing.assert_allclose(logits[0], [-moved, moved, -moved], rtol=1e-3)
    assert logits[1, 2] == 0


def test_reinforce_learns_and_waits_for_its_warmup():
    controller = make(total_steps=2000, target=8.0, reward=rewards.Absolute(-0.1), estimator="reinforce", warmup=100)
    search(controller, 100, k=1, every=1)
    np.testing.assert_array_equal(controller.logits, np.zeros((3, 3)))
    search(controller, 1900, k=1, every=1)
    assert float(controller.entropy()) < 0.2
    best = controller.decide()
    assert quality_of(tf.constant(best[None])).numpy()[0] > -0.05
    with pytest.raises(RuntimeError, match="Only estimator='critic'"):
        controller.effects()


def test_beta_follows_the_schedule():
    controller = make(beta_max=0.4, entropy_schedule="linear", warmup=20, frozen=0.2)
    assert float(controller.beta()) == 0
    controller.advance(50)  # half-way between the warmup and the decision
    assert float(controller.beta()) == pytest.approx(0.2)
    controller.advance(30)
    assert float(controller.beta()) == pytest.approx(0.4)
    own = make(beta_max=0.4, entropy_schedule=lambda step: 0.001 * tf.cast(step, tf.float32), warmup=20)
    own.advance(60)
    assert float(own.beta()) == pytest.approx(0.06)
    with pytest.raises(ValueError, match="callable entropy_schedule cannot be saved"):
        own.get_config()


def test_config_round_trip():
    controller = make(
        prior=PRIOR, entropy_schedule="linear", warmup=30, frozen=0.2, noise_aware_start=False, jit_compile=False
    )
    config = controller.get_config()
    again = Controller.from_config(config)
    assert again.get_config() == config and again.warmup == 30 and not again.noise_aware_start
    former = {"warmup": "delay", "frozen": "settle", "noise_aware_start": "gentle"}  # as version 0.1.0 wrote them
    old = Controller.from_config({former.get(name, name): value for name, value in config.items()})
    assert old.get_config() == config
    keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(controller))


def test_state_is_no_business_of_an_optimizer_nor_of_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        controller = make(prior=PRIOR)
        assert controller.trainable_weights == []
        assert {tf.as_dtype(w.dtype).name for w in controller.weights} <= {"float32", "int32", "bool"}
        search(controller, 40)
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_a_copy_of_the_weights_goes_on_alike():
    one = make(prior=PRIOR)
    search(one, 60, noise=0.01)
    other = make(prior=PRIOR)
    other.set_weights(one.get_weights())
    for controller in (one, other):
        search(controller, 20, seed=5)
    np.testing.assert_array_equal(one.probabilities(), other.probabilities())
    assert one.decide().tolist() == other.decide().tolist()


def test_replicas_learn_from_the_mean():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        controller = make(prior=PRIOR)
    step = tf.function(lambda s: strategy.run(lambda s: controller.update(s, quality_of(s)), (s,)))
    step(tf.constant([[0, 0, 0], [2, 1, 2]]))
    alone = make(prior=PRIOR)
    alone.update([[0, 0, 0], [2, 1, 2]], quality_of(tf.constant([[0, 0, 0], [2, 1, 2]])))
    np.testing.assert_allclose(controller.effects(), alone.effects(), rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_options": []}, "n_options needs one entry"),
        ({"n_options": [3, 0]}, "at least 1 per decision"),
        ({"estimator": "critics"}, "Unknown estimator 'critics'; known: critic, reinforce"),
        ({"entropy_schedule": "cos"}, "Unknown schedule 'cos'"),
        ({"entropy_schedule": lambda step: 0.0}, "needs beta_max"),
        ({"warmup": 1.5}, "warmup is a share"),
        ({"warmup": -7}, "an int of steps, 0 or more; got -7"),
        ({"warmup": True}, "an int of steps, 0 or more; got True"),
        ({"frozen": 1.0}, "frozen is a share"),
        ({"frozen": 0.5, "warmup": 0.5}, "nothing of the run to decide in: 0.5 \\+ 0.5"),
        ({"prior": [[0.1, 0.2]]}, "prior needs a number per option"),
        ({"prior": [[0.1, 0.2, -1.0], [0.1, 0.2], [0.1, 0.2, 0.3]]}, "finite numbers of at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Controller(**{"n_options": SIZES, **arguments})


def test_use_before_configure():
    controller = Controller(SIZES)
    assert controller.sample([0, 1]).shape == (1, 3)
    for call in (lambda: controller.update([[0, 0, 0]], [1.0]), controller.decide):
        with pytest.raises(RuntimeError, match="without a network configure"):
            call()
    with pytest.raises(ValueError, match="target cost must be positive"):
        make(target=0.0)
    with pytest.raises(ValueError, match="total_steps must be at least 1"):
        make(total_steps=0)


def test_a_warmup_in_steps_must_end_before_the_decision():
    with pytest.raises(ValueError, match="warmup of 25 steps leaves nothing of the run to decide in: 100 steps"):
        make(total_steps=100, warmup=25)
    make(total_steps=100, warmup=24)
    make(total_steps=1, warmup=0)
