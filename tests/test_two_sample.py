"""The classifier two-sample test: the level of its p-value, its standard error, what it finds, against closed forms."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import fisher_exact, norm
from targets import rotated_mixture, rotation

from dgm_jax import datasets, densities, networks, training, two_sample

slow = pytest.mark.slow


def repeat(one, num, seed=0, batch_size=20):
    keys = jax.random.split(jax.random.key(seed), num)
    return jax.tree.map(np.asarray, jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=batch_size))(keys))


def pair(key, n, m, of_x, of_y):
    """Samples of two distributions, each ``(key, num) -> [num, d]``."""
    key_x, key_y, key = jax.random.split(key, 3)
    return key, of_x(key_x, n), of_y(key_y, m)


def first_coordinate(threshold):
    """A classifier that was there before: y is where the first coordinate is above the threshold."""
    return lambda key, z, labels: lambda z: z[:, 0] - threshold


@pytest.mark.parametrize(("n", "m", "threshold"), [(31, 60, -1.0), (60, 24, 0.5), (40, 30, 9.0)])
def test_p_value_and_accuracy_are_those_of_the_table(n, m, threshold):
    """Against SciPy's exact test of the table that the classifier saw; who was who is in the second coordinate."""
    rng = np.random.default_rng(n)
    x = jnp.asarray(np.stack([rng.normal(size=n), np.zeros(n)], axis=1))
    y = jnp.asarray(np.stack([rng.normal(size=m) + 0.6, np.ones(m)], axis=1))

    @jax.jit
    def look(x, y):
        seen = {}

        def fit(key, z, labels):
            seen["train"], seen["labels"] = z, labels

            def predict(z):
                seen["test"] = z
                return z[:, 0] - threshold

            return predict

        return two_sample.classifier_test(jax.random.key(1), x, y, fit=fit, train_share=0.3), seen

    ((accuracy, _), p_value), seen = look(x, y)
    np.testing.assert_array_equal(seen["labels"], seen["train"][:, 1])  # each with its own label, and in no order
    assert len(set(np.flatnonzero(seen["labels"]) - np.arange(np.sum(seen["labels"])))) > 2
    both = np.concatenate([seen["train"], seen["test"]])
    np.testing.assert_array_equal(np.sort(both[:, 0]), np.sort(np.concatenate([x, y])[:, 0]))
    assert len(seen["test"]) == n + m - int(0.3 * n) - int(0.3 * m)
    told, real = np.asarray(seen["test"][:, 0]) > threshold, np.asarray(seen["test"][:, 1]) == 1
    table = [[np.sum(told & real), np.sum(told & ~real)], [np.sum(~told & real), np.sum(~told & ~real)]]
    np.testing.assert_allclose(p_value, fisher_exact(table, alternative="greater").pvalue, rtol=1e-10)
    np.testing.assert_allclose(accuracy, (np.mean(told[real]) + np.mean(~told[~real])) / 2, rtol=1e-12)


def test_p_values_keep_their_digits_in_float32():
    """Of 20,000 samples, where factorials would have lost theirs: from 1 to 1e-30."""
    rng = np.random.default_rng(0)
    test = jax.jit(partial(two_sample.classifier_test, jax.random.key(0), fit=first_coordinate(0.0)))
    for shift in (-0.05, 0.0, 0.05, 0.12):
        x, y = rng.normal(size=(10_000, 1)), rng.normal(size=(10_000, 1)) + shift
        double, single = (test(jnp.asarray(x, dtype), jnp.asarray(y, dtype)) for dtype in (jnp.float64, jnp.float32))
        assert single.p_value.dtype == single.accuracy[0].dtype == jnp.float32
        np.testing.assert_allclose(single.p_value, double.p_value, rtol=2e-3)


def test_level_of_a_fixed_and_biased_classifier():
    """20,000 draws of 30 against 50 from one normal, three in four of which the classifier takes for y.

    P(p <= a) is at most a: within 4 standard errors above, false alarm 3e-5; and no less than half, since the test is
    not idle. The accuracy is 1/2 on average, whatever the bias and n and m.
    """
    normal = lambda key, num: jax.random.normal(key, (num, 1))  # noqa: E731

    def one(key):
        key, x, y = pair(key, 30, 50, normal, normal)
        return two_sample.classifier_test(key, x, y, fit=first_coordinate(norm.ppf(0.25)))

    (accuracy, _), p_values = repeat(one, 20_000, batch_size=500)
    assert abs(accuracy.mean() - 0.5) < 4 * accuracy.std() / math.sqrt(20_000)
    for level in (0.01, 0.05, 0.1, 0.5):
        share = np.mean(p_values <= level)
        assert level / 3 < share < level + 4 * math.sqrt(level * (1 - level) / 20_000)


@slow
def test_level_of_the_classifier_that_is_trained():
    """400 draws of 40 against 60 from a rotated mixture: at level 0.1 at most 0.1 + 4 standard errors, 3e-5.

    No less than 0.03: the classifier does not take all for the larger class, which would find nothing ever.
    """
    of_mixture = lambda key, num: densities.sample(key, rotated_mixture(3), num)  # noqa: E731

    def one(key):
        return two_sample.classifier_test(
            *pair(key, 40, 60, of_mixture, of_mixture), fit=partial(two_sample.random_features, num=16)
        )

    (accuracy, _), p_values = repeat(one, 400)
    assert abs(accuracy.mean() - 0.5) < 4 * accuracy.std() / math.sqrt(400)
    assert 0.03 < np.mean(p_values <= 0.1) < 0.1 + 4 * 0.3 / math.sqrt(400)


def test_standard_error_of_the_best_classifier():
    """5,000 draws of 80 against 120: N(0, 1) and N(2, 1) are told apart at 1 with accuracy Phi(1) = 0.84.

    Errors within 10 per cent of the spread (1 per cent is one standard error),
    intervals of two cover 92 to 98 times in 100.
    """

    def one(key):
        key, x, y = pair(
            key, 80, 120, *[lambda key, num, s=s: s + jax.random.normal(key, (num, 1)) for s in (0.0, 2.0)]
        )
        return two_sample.classifier_test(key, x, y, fit=first_coordinate(1.0)).accuracy

    accuracy, errors = repeat(one, 5000, batch_size=500)
    assert abs(accuracy.mean() - norm.cdf(1.0)) < 4 * accuracy.std() / math.sqrt(5000)
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), accuracy.std(), rtol=0.1)
    assert 0.92 < np.mean(np.abs(accuracy - norm.cdf(1.0)) < 2 * errors) < 0.98


def test_random_features_know_no_larger_class():
    """Of 60 examples a quarter is of class 1: least squares with a free level, whose mean is then taken off, is 0."""
    z = normal(jax.random.key(0), 60, shift=3.0) + 5.0
    labels = (jnp.arange(60) % 4 == 0).astype(int)
    values = jax.jit(lambda z: two_sample.random_features(jax.random.key(1), z, labels, num=16)(z))(z)
    assert abs(jnp.mean(values)) < 1e-10 < jnp.std(values)


def eight(key, num, present=8, scale=1.0):
    """Eight turned modes, or the first of them, and so wide."""
    mixture = datasets.eight_gaussians_density()
    weights = jnp.where(jnp.arange(8) < present, 1.0, 0.0)
    means = mixture.means @ rotation(2, 8).T
    turned = densities.Mixture(weights / jnp.sum(weights), means, scale**2 * mixture.covariances)
    return densities.sample(key, turned, num)


def normal(key, num, shift=0.0, scale=1.0):
    return scale * jax.random.normal(key, (num, 8)) + shift * jnp.asarray(rotation(8, 9)[0])[None]


@slow
@pytest.mark.parametrize(
    ("family", "alternatives"),
    [(eight, [(6, 1.0), (8, 0.4)]), (normal, [(0.8, 1.0), (0.0, 0.75)])],
    ids=["modes dropped or too narrow", "mean or variance off"],
)
def test_power(family, alternatives):
    """25 draws of 400 against 400, level 0.05: nine of ten are found."""

    @jax.jit
    def p_values(change):
        def one(key):
            x, y, key = jax.random.split(key, 3)
            fit = partial(two_sample.random_features, num=64)
            return two_sample.classifier_test(key, family(x, 400), family(y, 400, *change), fit=fit).p_value

        return jax.lax.map(one, jax.random.split(jax.random.key(0), 25))

    for change in alternatives:
        assert np.mean(p_values(change) <= 0.05) > 0.9, change


@slow
def test_accuracy_comes_near_the_best_there_is():
    """N(0, I) against N(s, I) in eight dimensions, |s| = 2, 800 each, 20 draws: Phi(1) less at most 0.02."""

    def one(key):
        return two_sample.classifier_test(*pair(key, 800, 800, normal, partial(normal, shift=2.0))).accuracy

    accuracy, _ = repeat(one, 20, batch_size=1)
    assert norm.cdf(1.0) - 0.02 < accuracy.mean() < norm.cdf(1.0) + 4 * accuracy.std() / math.sqrt(20)


@slow
def test_a_network_for_a_classifier():
    """A network, trained inside with the library's own step, finds rings among moons' noise: XOR in the plane.

    x at two opposite corners, y at the two others: accuracy 0.97 by the axes, Phi(2)^2 + (1 - Phi(2))^2 = 0.955.
    """
    net = networks.MLP((32,), jax.nn.silu, out_features=1, param_dtype=float)
    zero = jnp.zeros(())

    def fit(key, z, labels):
        params = net.init(key, zero, z[0])
        optimizer = training.adam(1e-2, 200)
        sign = jnp.where(labels > 0, 1.0, -1.0)

        def loss(params, key, batch):
            logits = jax.vmap(lambda z: net.apply(params, zero, z)[0])(z)
            return jnp.mean(jax.nn.softplus(-sign * logits))

        update = training.step(loss, optimizer)
        state = training.init(params, optimizer)
        state, _ = jax.lax.scan(lambda state, _: (update(state, key, None)[0], None), state, None, length=200)
        return lambda z: jax.vmap(lambda z: net.apply(state.params, zero, z)[0])(z)

    def corners(key, num, sign):
        key_corner, key_noise = jax.random.split(key)
        side = jax.random.rademacher(key_corner, (num,), float)
        z = 2.0 * jnp.stack([side, sign * side], axis=1) + jax.random.normal(key_noise, (num, 2))
        return z @ rotation(2, 4).T

    key, x, y = pair(jax.random.key(0), 500, 400, partial(corners, sign=1.0), partial(corners, sign=-1.0))
    (accuracy, error), p_value = jax.jit(partial(two_sample.classifier_test, fit=fit))(key, x, y)
    best = norm.cdf(2.0) ** 2 + norm.cdf(-2.0) ** 2
    assert best - 0.02 - 4 * error < accuracy < best + 4 * error
    assert p_value < 1e-20


def test_bad_samples():
    x, key = jnp.asarray(np.random.default_rng(0).normal(size=(30, 2))), jax.random.key(0)
    with pytest.raises(ValueError, match=r"y has 19 samples, but a classifier .* needs at least 20"):
        two_sample.classifier_test(key, x, x[:19])
    with pytest.raises(ValueError, match="x has NaN or infinity in 1 of 30 samples"):
        two_sample.classifier_test(key, x.at[3, 1].set(jnp.nan), x)
    with pytest.raises(TypeError, match="x has dtype float64 and y float32"):
        two_sample.classifier_test(key, x, x.astype(jnp.float32))
    with pytest.raises(TypeError, match="key must be a typed key"):
        two_sample.classifier_test(jax.random.PRNGKey(0), x, x)
    with pytest.raises(ValueError, match=r"train_share is 0\.9, by which 27 of 30 and 27 of 30 samples train"):
        two_sample.classifier_test(key, x, x, train_share=0.9)
    for share in (0.0, 1.0, -0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="train_share must be between 0 and 1, got"):
            two_sample.classifier_test(key, x, x, train_share=share)
    with pytest.raises(ValueError, match=r"predict, from fit, returned shape \(30, 1\) for 30 samples"):
        jax.jit(partial(two_sample.classifier_test, fit=lambda key, z, labels: lambda z: z[:, :1]))(key, x, x)
    under_jit = jax.jit(partial(two_sample.classifier_test, fit=first_coordinate(0.0)))
    for found in (
        under_jit(key, x.at[0, 0].set(jnp.nan), x),
        jax.jit(partial(two_sample.classifier_test, fit=first_coordinate(jnp.nan)))(key, x, x),
    ):
        assert all(np.isnan(leaf) for leaf in jax.tree.leaves(found))


def test_bad_examples_of_the_classifier():
    x, y, key = jnp.asarray(np.random.default_rng(0).normal(size=(30, 2))), jnp.arange(30) % 2, jax.random.key(0)
    with pytest.raises(ValueError, match="z has 1 samples, but a classifier needs at least 2"):
        two_sample.random_features(key, x[:1], y[:1])
    with pytest.raises(ValueError, match="z has NaN or infinity in 1 of 30 samples"):
        two_sample.random_features(key, x.at[3, 1].set(jnp.nan), y)
    with pytest.raises(ValueError, match=r"z must be samples \[n, d\], got shape \(30,\)"):
        two_sample.random_features(key, x[:, 0], y)
    with pytest.raises(ValueError, match=r"labels has shape \(20,\), but z has 30 examples"):
        two_sample.random_features(key, x, y[:20])


def test_constant_samples_are_chance():
    """Nothing to tell them by, and no division by zero."""
    x = jnp.ones((25, 3))
    (accuracy, error), p_value = jax.jit(two_sample.classifier_test)(jax.random.key(0), x, x)
    assert (accuracy, p_value) == (0.5, 1.0)
    assert 0 < error < 0.1


def test_samples_of_which_most_are_equal():
    """Their median distance is zero; what tells them apart is in the few."""
    x = jnp.concatenate([jnp.zeros((60, 1)), jnp.ones((12, 1))])
    (accuracy, error), p_value = jax.jit(two_sample.classifier_test)(jax.random.key(0), x, x)
    assert abs(float(accuracy) - 0.5) < 4 * float(error) < 0.4
    assert float(p_value) > 1e-3
    y = jnp.concatenate([jnp.zeros((60, 1)), -jnp.ones((12, 1))])
    (accuracy, error), _ = jax.jit(two_sample.classifier_test)(jax.random.key(0), x, y)
    assert float(accuracy) > 0.5 + float(error)
