"""Coverage and quality of samples against exact expectations: on circles, on mixtures, by combinatorics."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom, chi2
from targets import rotated_mixture, rotation

from dgm_jax import coverage, densities

slow = pytest.mark.slow

TURN = rotation(3, 7)[:, :2]


def circles(key, num, shares):
    """Points on circles of radius 1 in a tilted plane, far from each other, so many on each."""
    key_angle, key_circle = jax.random.split(key)
    angle = jax.random.uniform(key_angle, (num,), maxval=2 * math.pi)
    which = jax.random.categorical(key_circle, jnp.log(jnp.asarray(shares)), shape=(num,))
    flat = jnp.stack([jnp.cos(angle) + 1000.0 * which.astype(float), jnp.sin(angle)], axis=1)
    return flat @ TURN.T


def repeat(one, num, seed=0):
    """What ``one`` finds with ``num`` keys: for each of its pairs the values and the errors [num]."""
    keys = jax.random.split(jax.random.key(seed), num)
    found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=20))(keys)
    return [tuple(map(np.asarray, pair)) for pair in found]


def close_in_the_mean(values, truth):
    """Within four standard errors: false alarm 6e-5."""
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values))


def coverage_of_equals(n, m, k):
    """Naeem et al. (2020): the k nearest of a real sample are all real, by the chance of an order."""
    return 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))


@pytest.mark.parametrize(("n", "m", "k"), [(60, 90, 1), pytest.param(80, 70, 2, marks=slow)])
def test_precision_and_recall_of_equals_on_a_circle(n, m, k):
    """1 - 4^-k, exactly, whatever n and m: in 300 draws.

    A new point is in no ball if on each side its neighbour has k others nearer than the point: of a sum of k gaps
    to be less than one gap, all gaps exponential, the chance is 2^-k. Errors within 15 per cent of the spread (4 per
    cent is one standard error), intervals of two errors cover 90 to 99 times in 100.
    """

    def one(key):
        key_x, key_y, key = jax.random.split(key, 3)
        return coverage.precision_recall(key, circles(key_x, n, [1.0]), circles(key_y, m, [1.0]), k=k)

    for values, errors in repeat(one, 300):
        close_in_the_mean(values, 1 - 4.0**-k)
        np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), values.std(), rtol=0.15)
        assert 0.9 < np.mean(np.abs(values - 1 + 4.0**-k) < 2 * errors) < 0.99


@slow
def test_density_and_coverage_of_equals():
    """Density 1 and the closed form of coverage, whatever the distribution: a mixture in three dimensions.

    300 draws; errors within 15 per cent of the spread; intervals of two errors cover 90 to 99 times in 100, so that
    a test of whether two distributions agree by two errors has a level of at most 10 per cent.
    """
    mixture, (n, m, k) = rotated_mixture(3), (120, 90, 5)

    def one(key):
        key_x, key_y, key = jax.random.split(key, 3)
        real, fake = densities.sample(key_x, mixture, n), densities.sample(key_y, mixture, m)
        return coverage.density_coverage(key, real, fake, k=k)

    found = repeat(one, 300)
    for (values, errors), truth in zip(found, (1.0, coverage_of_equals(n, m, k)), strict=True):
        close_in_the_mean(values, truth)
        np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), values.std(), rtol=0.15)
        assert 0.9 < np.mean(np.abs(values - truth) < 2 * errors) < 0.99


@slow
def test_what_is_missing_and_what_is_invented():
    """Two circles of which the model knows one, or, data and model exchanged, one to which it invents another.

    60 draws; a share of 0.3 is on the second circle. Left out: precision 3/4 as before, recall 3/4 of 0.7, coverage
    that of the 70 per cent with all fakes. Invented: precision 3/4 of 0.7, recall 3/4, density 0.7. And the power:
    recall and coverage of what is left out, precision and density of what is invented fall by more than two of their
    standard errors below what equals have in 9 of 10 draws.
    """
    n, m = 150, 120

    def one(key):
        key_x, key_y, key = jax.random.split(key, 3)
        both, single = circles(key_x, n, [0.7, 0.3]), circles(key_y, m, [1.0])
        precision, recall = coverage.precision_recall(key, both, single, k=1)
        covered = coverage.density_coverage(key, both, single, k=5).coverage
        density = coverage.density_coverage(key, single, both, k=5).density
        return precision, recall, covered, density, *coverage.precision_recall(key, single, both, k=1)

    precision, recall, covered, density, invented, complete = repeat(one, 60)
    close_in_the_mean(precision[0], 0.75)
    close_in_the_mean(recall[0], 0.75 * 0.7)
    known = np.arange(6, n + 1)  # of so many real samples on the first circle; fewer have no chance at all
    expected = sum(binom.pmf(j, n, 0.7) * j / n * coverage_of_equals(j, m, 5) for j in known)
    close_in_the_mean(covered[0], expected)
    close_in_the_mean(density[0], 0.7)
    close_in_the_mean(invented[0], 0.75 * 0.7)
    close_in_the_mean(complete[0], 0.75)
    assert np.mean(recall[0] + 2 * recall[1] < 0.75) > 0.9
    assert np.mean(invented[0] + 2 * invented[1] < 0.75) > 0.9
    assert np.mean(covered[0] + 2 * covered[1] < coverage_of_equals(n, m, 5)) > 0.9
    assert np.mean(density[0] + 2 * density[1] < 1) > 0.9


precision_recall, density_coverage = (
    jax.jit(partial(measure, jax.random.key(0), k=1))
    for measure in (coverage.precision_recall, coverage.density_coverage)
)


def test_on_a_line_by_hand():
    """Pairs of real samples, each in the other's ball of radius 1, and fakes between pairs, in one, and far away."""
    real = jnp.asarray([0.0, 1.0, 3.0, 4.0, 6.0, 7.0, 9.0, 10.0])[:, None]
    fake = jnp.asarray([2.0, 5.0, 8.0, 20.0, 20.5, 30.0, 31.0, 0.0])[:, None]
    precision, recall = precision_recall(real, fake)
    assert precision[0] == 4 / 8
    # balls about the fakes: [0, 4], [2, 8], [5, 11], [-2, 2] and those from 19.5 on
    assert recall[0] == 1
    density, covered = density_coverage(real, fake)
    assert density[0] == (2 + 2 + 2 + 2) / 8
    assert covered[0] == 7 / 8  # not [9, 11]
    second = precision_recall(real[::-1] + 20.0, fake)
    # balls about 20, 21, 23, 24, 26, 27, 29, 30 of radius 1
    assert second.precision[0] == 4 / 8
    # [19.5, 20.5], [20, 21], [29, 31], [30, 32] and those below 11
    assert second.recall[0] == 4 / 8


def test_neighbours_at_one_distance():
    """Of 0, 1, ..., 15 each has two neighbours at 1, and the ends have their second one at 2.

    Fakes halfway: two in each of 14 balls, and in [-2, 2] and [13, 17] two and three.
    """
    real = jnp.arange(16.0)[:, None]
    density, covered = jax.jit(lambda x, y: coverage.density_coverage(jax.random.key(0), x, y, k=2))(real, real + 0.5)
    assert density[0] == (14 * 2 + 2 + 3) / (2 * 16)
    assert covered[0] == 1


def test_copies():
    """Samples learned by heart are in their own balls, though at no distance, and equal points are not themselves."""
    twice = jnp.tile(jnp.asarray([0.0, 1.0, 3.0, 7.0]), 2)[:, None]
    for value, _ in precision_recall(twice, twice):
        assert value == 1
    (density, _), (covered, _) = density_coverage(twice, twice)
    assert (density, covered) == (2, 1)
    # the nearest neighbour of each is its copy, nearer than all others
    (density, _), (covered, _) = density_coverage(twice, twice + 1e-9)
    assert (density, covered) == (0, 0)


GRID = np.array([[i, j] for i in range(3) for j in range(3)], float)
WEIGHTS = np.array([0.01, 0.01, 0.05, 0.08, 0.1, 0.15, 0.15, 0.2, 0.25])


def grid_mixture(dim=2, weights=WEIGHTS):
    """Nine modes far apart on a turned grid, each with its own full covariance."""
    turns = [rotation(dim, seed) for seed in range(9)]
    covariances = np.stack([q @ np.diag(np.geomspace(0.01, 0.0004, dim)) @ q.T for q in turns])
    return densities.Mixture(*map(jnp.asarray, (weights, 4 * GRID @ rotation(dim, 10)[:, :2].T, covariances)))


def expected_reverse_kl(num, shares):
    """By the binomial of each count: what so many samples give on average, the bias that is left included."""
    pairs = [(p, w) for p, w in zip(shares, WEIGHTS, strict=True) if p > 0]
    plug_in = sum(binom.pmf(c, num, p) * c / num * np.log(c / (num * w)) for p, w in pairs for c in range(1, num + 1))
    return plug_in - (sum(binom.sf(0, num, p) for p, _ in pairs) - 1) / (2 * num)


@pytest.mark.parametrize("dim", [2, pytest.param(5, marks=slow)])
def test_modes_of_exact_samples(dim):
    """1,000 draws of 300: the share near a mode is the chi-squared's, the modes hit as many as balls find boxes.

    The error of the share is within 12 per cent of the spread (half a hit and half a miss more add 7 in two
    dimensions), that of the count not below its spread, and what the jackknife must have on average, by the same
    combinatorics. The reverse KL has an eighth of the bias of the plug-in.
    """
    mixture, num, least = grid_mixture(dim), 300, 2
    q = chi2.cdf(9.0, dim)

    def one(key):
        return coverage.mode_coverage(densities.sample(key, mixture, num), mixture, least=least)[:3]

    modes, quality, reverse_kl = repeat(one, 1000)
    close_in_the_mean(quality[0], q)
    np.testing.assert_allclose(np.sqrt(np.mean(quality[1] ** 2)), quality[0].std(), rtol=0.12)
    assert 0.9 < np.mean(np.abs(quality[0] - q) < 2 * quality[1]) < 0.99
    close_in_the_mean(modes[0], np.sum(binom.sf(least - 1, num, q * WEIGHTS)))
    assert np.sqrt(np.mean(modes[1] ** 2)) > modes[0].std()
    np.testing.assert_allclose(np.mean(modes[1] ** 2), least * np.sum(binom.pmf(least, num, q * WEIGHTS)), rtol=0.15)
    close_in_the_mean(reverse_kl[0], expected_reverse_kl(num, WEIGHTS))
    assert abs(reverse_kl[0].mean()) < 8 / (2 * num) / 8 + 4 * reverse_kl[0].std() / math.sqrt(1000)
    # the delta method's first order alone would be the root of two too large here
    assert 0.95 < np.sqrt(np.mean(reverse_kl[1] ** 2)) / reverse_kl[0].std() < 1.3
    assert np.mean(reverse_kl[0] > 2 * reverse_kl[1]) < 0.06


@pytest.mark.parametrize(("num", "least"), [(600, 1), pytest.param(1000, 2, marks=slow)])
def test_level_and_power_of_the_number_of_modes(num, least):
    """1,000 draws, of the least modes 6 and 10 samples expected: that modes seem to be missing, by two errors, is no
    more frequent than a mode is short of samples by chance (0.005 and 0.001), and that is so exactly, by 4 standard
    errors and one draw (false alarm 1e-3 at most), never above 5 per cent. A model that drops the last mode, of weight
    a quarter, is found in 9 of 10 draws.
    """
    mixture, q = grid_mixture(), chi2.cdf(9.0, 2)
    dropped = mixture._replace(weights=jnp.asarray(np.append(WEIGHTS[:8], 0.0) / 0.75))

    def one(key):
        keys = jax.random.split(key)
        sets = (densities.sample(key, law, num) for key, law in zip(keys, (mixture, dropped), strict=True))
        return [coverage.mode_coverage(x, mixture, least=least).num_modes for x in sets]

    exact, few = repeat(one, 1000)
    chance = 1 - np.prod(binom.sf(least - 1, num, q * WEIGHTS))
    tolerance = 4 * math.sqrt(chance / 1000) + 0.001
    assert abs(np.mean(exact[0] < 9) - chance) < tolerance
    assert np.mean(exact[0] + 2 * exact[1] < 9) < min(chance + tolerance, 0.05)
    assert np.mean(few[0] + 2 * few[1] < 9) > 0.9


@slow
def test_modes_of_a_model_that_drops_two_and_blurs():
    """1,000 draws of 400 from a mixture without its last mode and with twice the deviations, against the full one.

    KL = -log 0.75, to 4 standard errors; errors within 10 per cent, intervals of two cover 92 to 98 times in 100.
    Quality is chi-squared at 3/2 deviations. All of the power: KL above 0 by two errors, quality and modes below.
    """
    mixture = grid_mixture()
    left = np.append(WEIGHTS[:8], 0.0) / 0.75
    model = densities.Mixture(jnp.asarray(left), mixture.means, 4.0 * mixture.covariances)
    skewed = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.0])
    num, q = 400, chi2.cdf(2.25, 2)

    def one(key):
        one_key, two_key = jax.random.split(key)
        found = coverage.mode_coverage(densities.sample(one_key, model, num), mixture)
        uneven = densities.sample(two_key, mixture._replace(weights=jnp.asarray(skewed)), num)
        return *found[:3], coverage.mode_coverage(uneven, mixture).reverse_kl

    modes, quality, dropped, uneven = repeat(one, 1000)
    close_in_the_mean(quality[0], q)
    assert modes[0].max() == 8
    assert np.mean(modes[0]) > 7.9
    close_in_the_mean(dropped[0], expected_reverse_kl(num, left))
    assert abs(dropped[0].mean() + math.log(0.75)) < 0.003
    truth = np.sum(skewed[:8] * np.log(skewed[:8] / WEIGHTS[:8]))
    close_in_the_mean(uneven[0], expected_reverse_kl(num, skewed))
    assert abs(uneven[0].mean() - truth) < 0.003
    np.testing.assert_allclose(np.sqrt(np.mean(uneven[1] ** 2)), uneven[0].std(), rtol=0.1)
    assert 0.92 < np.mean(np.abs(uneven[0] - truth) < 2 * uneven[1]) < 0.98
    assert np.all(dropped[0] > 2 * dropped[1])
    assert np.all(quality[0] + 2 * quality[1] < chi2.cdf(9.0, 2))


def test_modes_by_hand():
    """A long mode across and a small round one: near is by each covariance, not by the length of the way."""
    covariances = jnp.stack([jnp.diag(jnp.asarray([100.0, 1.0])), 0.01 * jnp.eye(2)])
    mixture = densities.Mixture(jnp.asarray([0.5, 0.5]), jnp.asarray([[0.0, 0.0], [20.0, 5.0]]), covariances)
    turn = rotation(2, 3)
    mixture = mixture._replace(
        means=mixture.means @ turn.T, covariances=jnp.einsum("ij,kjl,ml->kim", turn, covariances, turn)
    )
    # deviations from the long one: 2.9, 3.1, 0, 2, 5.4; the fourth is 5 away from the small one, or 50 deviations
    points = jnp.asarray([[0.0, 2.9], [31.0, 0.0], [0.0, 0.0], [20.0, 0.0], [20.0, 5.0]]) @ turn.T
    found = coverage.mode_coverage(points, mixture)
    assert found.high_quality[0] == 4 / 5
    assert found.num_modes[0] == 2
    np.testing.assert_array_equal(found.counts, [4, 1])
    np.testing.assert_allclose(found.reverse_kl[0], 0.8 * math.log(1.6) + 0.2 * math.log(0.4) - 1 / 10)
    assert coverage.mode_coverage(points, mixture, least=2).num_modes[0] == 1
    assert coverage.mode_coverage(points, mixture, radius=3.2).high_quality[0] == 1
    # a mode of weight 0 is none
    absent = coverage.mode_coverage(points, mixture._replace(weights=jnp.asarray([1.0, 0.0])))
    np.testing.assert_array_equal(absent.counts, [5, 0])
    assert absent.num_modes[0] == 1
    assert absent.high_quality[0] == 3 / 5
    np.testing.assert_allclose(absent.reverse_kl, (0, 0), atol=1e-15)
    # nor is anything certain where all are near
    assert 0 < coverage.mode_coverage(points[2:], mixture).high_quality[1] < 0.3


KEY = jax.random.key(0)
FOUND = {
    "precision_recall": partial(coverage.precision_recall, KEY),
    "density_coverage": partial(coverage.density_coverage, KEY, k=2),
}


@pytest.mark.parametrize(("name", "least"), [("precision_recall", 24), ("density_coverage", 16)])
def test_bad_samples(name, least):
    measure, x = FOUND[name], jnp.ones((30, 2))
    k = least // 8
    with pytest.raises(ValueError, match=rf"fake has {least - 1} samples, but .* with k = {k} needs at least {least}"):
        measure(x, x[: least - 1])
    with pytest.raises(ValueError, match="real has NaN or infinity in 1 of 30 samples"):
        measure(x.at[3, 1].set(jnp.inf), x)
    with pytest.raises(ValueError, match=r"real has shape \(30, 2\) and fake \(30, 1\): both must have the same d"):
        measure(x, x[:, :1])
    with pytest.raises(TypeError, match="real has dtype float64 and fake float32"):
        measure(x, x.astype(jnp.float32))
    assert np.all(np.isnan(np.asarray(jax.jit(measure)(x, x.at[0, 0].set(jnp.nan)))))


def test_bad_arguments():
    x = jnp.ones((30, 2))
    mixture = grid_mixture()
    with pytest.raises(TypeError, match="key must be a typed key"):
        coverage.precision_recall(jax.random.PRNGKey(0), x, x)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        coverage.density_coverage(KEY, x, x, k=0)
    with pytest.raises(ValueError, match="samples has 1 samples, but a standard error needs at least 2"):
        coverage.mode_coverage(x[:1], mixture)
    with pytest.raises(ValueError, match="samples has NaN or infinity in 1 of 30 samples"):
        coverage.mode_coverage(x.at[0, 0].set(jnp.nan), mixture)
    with pytest.raises(ValueError, match=r"samples has shape \(30, 3\), but density is in 2 dimensions"):
        coverage.mode_coverage(jnp.ones((30, 3)), mixture)
    with pytest.raises(TypeError, match="samples has dtype float32 and density float64"):
        coverage.mode_coverage(x.astype(jnp.float32), mixture)
    with pytest.raises(ValueError, match=r"radius must be positive, got 0\.0"):
        coverage.mode_coverage(x, mixture, radius=0.0)
    with pytest.raises(ValueError, match="least must be at least 1, got 0"):
        coverage.mode_coverage(x, mixture, least=0)
    with pytest.raises(ValueError, match=r"density\.weights must sum to one"):
        coverage.mode_coverage(x, mixture._replace(weights=2 * mixture.weights))
    found = jax.jit(coverage.mode_coverage)(x.at[0, 0].set(jnp.nan), mixture)
    assert all(np.all(np.isnan(np.asarray(pair))) for pair in found[:3])
    assert np.all(found.counts == -1)


def test_float32_in_float32_out():
    x = jax.ShapeDtypeStruct((50, 2), jnp.float32)
    mixture = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), grid_mixture())
    for found in (
        *(jax.eval_shape(measure, x, x) for measure in FOUND.values()),
        jax.eval_shape(coverage.mode_coverage, x, mixture)[:3],
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


@slow
def test_memory_of_ten_thousand_samples():
    """10,000 x 10,000 distances would be 400 MB, here in 16 dimensions."""
    x = jax.ShapeDtypeStruct((10_000, 16), jnp.float32)
    compiled = jax.jit(FOUND["precision_recall"]).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 48e6
