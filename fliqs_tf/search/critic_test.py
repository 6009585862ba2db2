import functools

import numpy as np
import pytest
import tensorflow as tf

from fliqs_tf.search import critic, policy

MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
EFFECTS = np.array([[-0.3, -0.1, 0.0], [-0.2, 0.0, 0.0], [-0.1, -0.05, 0.0]], np.float32)
NOISE_POWER = np.array([[0.03, 0.01, 0.0001]] * 3)


@functools.cache  # tracing is what takes time
def updater(with_prior):
    prior = critic.make_prior(NOISE_POWER * MASK if with_prior else None, MASK)
    return prior, traced_update(prior)


def traced_update(prior):
    return tf.function(lambda state, a, y: critic.solve(critic.observe(state, a, y, prior), prior))


@tf.function
def draw(seed, k):
    return policy.draw(tf.constant(MASK / MASK.sum(axis=1, keepdims=True), tf.float32), seed, k)


def learn(
    updates, k=4, noise=0.0, seed=0, effects=EFFECTS, noise_power=None, scale=1.0, level=lambda i: 0.0, spoil=None
):
    """State after readings of an additive quality, drawn uniformly."""
    rng = np.random.default_rng(seed)
    prior, update = updater(noise_power is not None)
    state = critic.State(*[tf.zeros(s) for s in critic.state_shapes(*MASK.shape)])
    for i in range(updates):
        samples = draw(tf.constant([seed, i]), k)
        quality = effects[np.arange(3), samples.numpy()].sum(axis=1) + level(i) + noise * rng.normal(size=k)
        if spoil is not None:
            quality = spoil(i, quality)
        state = update(state, samples, tf.constant(scale * quality, tf.float32))
    return state, prior


def centred(effects):
    return np.where(MASK, effects - np.where(MASK, effects, 0).sum(1, keepdims=True) / MASK.sum(1, keepdims=True), 0)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("noise_power", [None, NOISE_POWER], ids=["no prior", "prior"])
def test_recovers_additive_effects(k, noise_power):
    state, _ = learn(600 // k, k, noise_power=noise_power)
    np.testing.assert_allclose(centred(state.effects), centred(EFFECTS), atol=0.02)


def test_the_last_solution_is_the_direct_one():
    state, prior = learn(100, noise=0.05, noise_power=NOISE_POWER)
    exact, _ = critic.posterior(critic.State(*[x.numpy() for x in state]), prior)
    np.testing.assert_allclose(state.effects, exact, atol=2e-3)


def test_noise_and_scale_are_estimated():
    state, _ = learn(400, noise=0.05, noise_power=NOISE_POWER)
    assert np.sqrt(float(state.noise)) == pytest.approx(0.05, rel=0.1)
    # The profile's worst option loses 0.3, 0.2 and 0.1; their mean is what all decisions share.
    assert 0.02 < np.sqrt(float(state.scale)) < 0.3


def test_a_level_shared_by_the_readings_of_a_batch_does_not_matter():
    plain, _ = learn(100, noise=0.02)
    shifted, _ = learn(100, noise=0.02, level=lambda i: 5.0 * np.sin(i))
    np.testing.assert_allclose(plain.effects, shifted.effects, atol=1e-4)


def test_single_readings_follow_a_level_that_drifts():
    state, _ = learn(1000, k=1, noise=0.02, level=lambda i: -2.0 * 0.997**i)
    np.testing.assert_allclose(centred(state.effects), centred(EFFECTS), atol=0.03)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e6])
def test_the_unit_of_quality_does_not_matter(scale):
    plain, _ = learn(60, noise=0.02, noise_power=NOISE_POWER)
    scaled, _ = learn(60, noise=0.02, noise_power=NOISE_POWER, scale=scale)
    np.testing.assert_allclose(scaled.effects / scale, plain.effects, atol=1e-4)


def test_readings_that_are_not_finite_are_left_out():
    def spoil(i, quality):
        return np.where(i % 3 == 1, np.nan if i % 2 else -np.inf, quality)

    state, _ = learn(150, spoil=spoil)
    np.testing.assert_allclose(centred(state.effects), centred(EFFECTS), atol=0.02)
    assert float(state.updates) == 100


def test_batches_that_blow_up_weigh_little():
    rng = np.random.default_rng(1)

    def spoil(i, quality):
        return quality - (50.0 * rng.random(len(quality)) if i % 20 == 19 else 0.0)

    state, _ = learn(300, noise=0.02, spoil=spoil)
    np.testing.assert_allclose(centred(state.effects), centred(EFFECTS), atol=0.05)


def test_effects_that_move_are_followed():
    moved = EFFECTS[::-1] * MASK
    state = critic.State(*[tf.zeros(s) for s in critic.state_shapes(*MASK.shape)])
    prior = critic.make_prior(None, MASK)
    observe = tf.function(lambda state, samples, quality: critic.observe(state, samples, quality, prior))
    for i in range(300):
        samples = draw(tf.constant([0, i]), 4)
        now = EFFECTS + (moved - EFFECTS) * min(i / 150, 1)
        quality = tf.constant(now[np.arange(3), samples.numpy()].sum(axis=1), tf.float32)
        state = observe(state, samples, quality)
    state = critic.solve(state, prior, iterations=50)
    # Without growing weights the estimate would be 3/4 of the way.
    assert (
        np.abs(centred(state.effects) - centred(moved)).max() < 0.15 * np.abs(centred(moved) - centred(EFFECTS)).max()
    )


def test_the_prior_lets_one_option_tell_of_the_others():
    """What is known of formats makes many options as easy to learn as two."""
    profile = 4.0 ** -np.arange(2, 16)
    mask = np.ones((8, 14), bool)
    truth = -np.exp(np.random.default_rng(0).normal(size=8))[:, None] * profile / profile[0]
    errors = []
    for noise_power in (None, np.tile(profile, (8, 1))):
        rng = np.random.default_rng(0)
        prior = critic.make_prior(noise_power, mask)
        state = critic.State(*[tf.zeros(s) for s in critic.state_shapes(8, 14)])
        update = traced_update(prior)
        for i in range(40):
            samples = policy.draw(tf.fill([8, 14], 1 / 14), tf.constant([0, i]), 4)
            quality = truth[np.arange(8), samples.numpy()].sum(axis=1) + 0.5 * rng.normal(size=4)
            state = update(state, samples, tf.constant(quality, tf.float32))
        effects, _ = critic.posterior(critic.State(*[x.numpy() for x in state]), prior)
        errors.append(np.abs(effects - effects.mean(1, keepdims=True) - truth + truth.mean(1, keepdims=True)).mean())
    assert errors[1] < 0.6 * errors[0]


def test_nothing_is_believed_before_the_first_reading():
    prior = critic.make_prior(NOISE_POWER, MASK)
    state = critic.State(*[np.zeros(s, np.float32) for s in critic.state_shapes(*MASK.shape)])
    np.testing.assert_array_equal(critic.posterior(state, prior)[0], -prior.profile)
    solved = critic.solve(critic.State(*map(tf.constant, state)), prior)
    assert not np.any(solved.effects)


def test_constant_quality_has_no_effects():
    state, _ = learn(20, effects=np.zeros((3, 3), np.float32), noise_power=NOISE_POWER)
    assert np.abs(state.effects).max() == 0 and all(np.isfinite(x).all() for x in state)


def test_samples_that_are_all_alike_teach_nothing():
    prior, update = updater(True)
    state = critic.State(*[tf.zeros(s) for s in critic.state_shapes(*MASK.shape)])
    for i in range(12):  # running means of one sample differ from it by rounding
        state = update(state, tf.constant([[2, 1, 2]]), tf.constant([np.sin(i)], tf.float32))
    assert float(state.scale) == 0
    np.testing.assert_array_equal(state.effects, np.zeros((3, 3)))
    exact, _ = critic.posterior(critic.State(*[x.numpy() for x in state]), prior)
    np.testing.assert_array_equal(exact, -prior.profile.astype(np.float64))


def test_padding_has_no_effect():
    state, _ = learn(50, noise=0.1, noise_power=NOISE_POWER * MASK)
    assert np.all(np.array(state.effects)[~MASK] == 0)


def test_the_same_compiled_or_not():
    prior = critic.make_prior(NOISE_POWER, MASK)
    start = critic.State(*[tf.zeros(s) for s in critic.state_shapes(*MASK.shape)])
    samples, quality = tf.constant([[0, 0, 1], [1, 1, 2], [2, 0, 0]]), tf.constant([0.1, 0.5, -0.2])

    def update():
        return critic.solve(critic.observe(start, samples, quality, prior), prior)

    for one, other in zip(update(), tf.function(update, jit_compile=True)()):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_readings_on_several_batches_are_compared_within_their_batch(k):
    prior = critic.make_prior(None, MASK)
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 2, (4, k, 3)).astype(np.int32)
    quality = rng.normal(size=(4, k)).astype(np.float32)
    start = critic.State(*[tf.zeros(s) for s in critic.state_shapes(*MASK.shape)])
    # So that single readings have a level to be compared with.
    start = critic.observe(start, samples[3], quality[3], prior)

    def observe(batches, shift=0.0):
        return critic.observe(start, samples[batches], quality[batches] + shift, prior)

    # What was known before weighs 1 / (1 + 2) then, and each batch as it would alone, where it weighs 1 / (1 + 1).
    both, first, second = observe([0, 1]), observe(0), observe(1)
    for name in ("gram", "moment", "square"):
        old = getattr(start, name)
        expected = old / 3 + (getattr(first, name) - old / 2) + (getattr(second, name) - old / 2)
        np.testing.assert_allclose(getattr(both, name), expected, rtol=1e-5, atol=1e-5)
    assert float(both.updates) == 3
    # Two batches move the running level as far as one after the other, give or take their order.
    weights = np.array([0.9**2 * (1 - 0.9), (1 - 0.9**2) / 2, (1 - 0.9**2) / 2])
    np.testing.assert_allclose(both.level, weights @ quality[[3, 0, 1]].mean(axis=1), rtol=1e-4)
    if k > 1:
        shifted = observe([0, 1], np.array([[5.0], [-3.0]], np.float32))
        np.testing.assert_allclose(shifted.moment, both.moment, rtol=1e-4, atol=1e-4)
    # A batch that is not finite is as if it were not there.
    quality[1, 0] = np.nan
    for name, spoiled, alone in zip(both._fields, observe([0, 1]), observe(0)):
        np.testing.assert_allclose(spoiled, alone, rtol=1e-5, atol=1e-6, err_msg=name)
