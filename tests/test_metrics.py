"""Metrics against closed forms: values without bias, standard errors that cover, tests that keep their level."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist, pdist
from scipy.special import gamma, hyp1f1
from scipy.stats import wasserstein_distance, wasserstein_distance_nd
from targets import rotation

from dgm_jax import metrics

slow = pytest.mark.slow

# x ~ N(0, C) and y ~ N(SHIFT, C) with C = R R^T not diagonal
ROOT = np.array([[1.0, 0.0], [0.6, 0.5]])
SHIFT = np.array([0.6, -0.5])
BANDWIDTH = 0.8


def mean_norm(shift, scale, d):
    """E|Z| for Z ~ N(shift, scale^2 I) in d dimensions: the mean of a noncentral chi."""
    central = scale * math.sqrt(2) * gamma((d + 1) / 2) / gamma(d / 2)
    return central * hyp1f1(-0.5, d / 2, -np.sum(shift**2) / (2 * scale**2))


def energy_of_gaussians(shift, d):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| for N(0, I) and N(shift, I)."""
    return 2 * mean_norm(shift, math.sqrt(2), d) - 2 * mean_norm(np.zeros(d), math.sqrt(2), d)


def mmd_of_gaussians(shift, covariance, bandwidth):
    """E k at a difference Z ~ N(m, 2 C): |I + 2 C / h^2|^-1/2 exp(-m^T (2 C + h^2 I)^-1 m / 2)."""
    d = len(shift)
    scale = np.linalg.det(np.eye(d) + 2 * covariance / bandwidth**2) ** -0.5
    exponent = shift @ np.linalg.solve(2 * covariance + bandwidth**2 * np.eye(d), shift) / 2
    return 2 * scale * (1 - math.exp(-exponent))


@partial(jax.jit, static_argnames=("n", "m", "d"))
def draw(key, n, m, d=2, root=None, shift=None):
    """x [n, d] and y [m, d]: normal, turned and scaled by ``root``, y moved by ``shift``."""
    x, y = jax.random.normal(key, (n + m, d))[:n], jax.random.normal(key, (n + m, d))[n:]
    root = np.eye(d) if root is None else root
    shift = np.zeros(d) if shift is None else shift
    return x @ root.T, y @ root.T + shift[None, :]


def repeat(one, num, seed=0):
    keys = jax.random.split(jax.random.key(seed), num)
    values, errors = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=25))(keys)
    return np.asarray(values), np.asarray(errors)


CASES = {
    "energy": (lambda x, y: metrics.energy_distance(x, y), np.eye(2), energy_of_gaussians(SHIFT, 2)),
    "mmd": (
        lambda x, y: metrics.mmd(x, y, BANDWIDTH),
        ROOT,
        mmd_of_gaussians(SHIFT, ROOT @ ROOT.T, BANDWIDTH),
    ),
    # E (theta . shift)^2 = |shift|^2 / d, whatever the covariance
    "sliced": (
        lambda x, y: metrics.sliced_wasserstein(jax.random.key(0), x, y, num_projections=64),
        ROOT,
        math.sqrt(np.sum(SHIFT**2) / 2),
    ),
}


@pytest.mark.parametrize("name", ["energy", pytest.param("mmd", marks=slow)])
def test_unbiased_and_its_standard_error_covers(name):
    """1,000 draws of 120 against 180 samples.

    The mean within 4 standard errors of the closed form: false alarm 6e-5. The reported errors are within 10
    per cent of the true spread (2.2 per cent is one standard error of a standard deviation: 4.5 of them,
    7e-6). Two-sigma intervals cover 91 to 98 times in 100: 4.5 sigma of a binomial about 95 is 3.1; the
    lower end allows for the skewness of 120 samples.
    """
    distance, root, truth = CASES[name]
    values, errors = repeat(lambda key: distance(*draw(key, 120, 180, root=root, shift=SHIFT)), 1000)
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(1000)
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), values.std(), rtol=0.1)
    assert 0.91 < np.mean(np.abs(values - truth) < 2 * errors) < 0.98


@slow
def test_sliced_wasserstein_of_shifted_gaussians():
    """500 draws of 200 against 300 samples, fresh directions each, against |shift| / sqrt(d).

    The bias of order 1 / n is below half a standard deviation here; the reported error is within 15 per cent of
    the true spread (3.2 per cent is one standard error: 4.5 of them, 7e-6); two-sigma intervals cover
    90 to 99 times in 100 (4.5 sigma of a binomial about 95 is 4.4).
    """

    def one(key):
        directions, data = jax.random.split(key)
        x, y = draw(data, 200, 300, root=ROOT, shift=SHIFT)
        return metrics.sliced_wasserstein(directions, x, y, num_projections=64)

    truth = CASES["sliced"][2]
    values, errors = repeat(one, 500)
    assert abs(values.mean() - truth) < 0.5 * values.std()
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), values.std(), rtol=0.15)
    assert 0.90 < np.mean(np.abs(values - truth) < 2 * errors) < 0.99


@slow
def test_sliced_wasserstein_of_gaussians_of_two_sizes():
    """N(0, a^2 I) and N(0, b^2 I): |a - b|; at 10,000 samples within 4 standard errors, false alarm 6e-5."""
    x, y = draw(jax.random.key(3), 10_000, 8_000, d=3)
    distance = jax.jit(partial(metrics.sliced_wasserstein, num_projections=48))
    value, error = distance(jax.random.key(1), x, 1.7 * y)
    assert abs(value - 0.7) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 9), (11, 4)])
def test_sliced_wasserstein_in_one_dimension_is_the_distance_of_order_two(n, m):
    """Against an optimal assignment of n m copies each, which costs nothing to write and much to run."""
    x, y = draw(jax.random.key(n), n, m, d=1)
    value, _ = jax.jit(partial(metrics.sliced_wasserstein, num_projections=3))(jax.random.key(0), x, y)
    a, b = np.sort(np.repeat(np.asarray(x[:, 0]), m)), np.sort(np.repeat(np.asarray(y[:, 0]), n))
    np.testing.assert_allclose(value, math.sqrt(np.mean((a - b) ** 2)), rtol=1e-12)
    assert value >= wasserstein_distance(x[:, 0], y[:, 0])  # the distance of order one, by SciPy


def test_sliced_wasserstein_is_at_most_the_wasserstein_distance():
    """SW_2 of a translation in the plane is |shift| / sqrt 2, the samples the same; SciPy gives W_1 = |shift|."""
    x, _ = draw(jax.random.key(5), 12, 1)
    shift = np.array([[1.5, 2.0]])
    distance = jax.jit(partial(metrics.sliced_wasserstein, num_projections=1600))
    value, error = distance(jax.random.key(0), x, x + shift)
    np.testing.assert_allclose(wasserstein_distance_nd(x, x + shift), 2.5, rtol=1e-6)
    assert abs(value - 2.5 / math.sqrt(2)) < 4 * error  # false alarm 6e-5


@pytest.mark.parametrize("name", ["energy", "mmd"])
def test_value_is_the_mean_over_pairs(name):
    """Against SciPy's distance matrix, for n and m that no chunk divides."""
    distance, root, _ = CASES[name]
    x, y = (np.asarray(z) for z in draw(jax.random.key(6), 67, 130, root=root, shift=SHIFT))
    kernel = (lambda r: -r) if name == "energy" else (lambda r: np.exp(-(r**2) / (2 * BANDWIDTH**2)))
    within = [(kernel(cdist(z, z)).sum() - kernel(0.0) * len(z)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    expected = sum(within) - 2 * kernel(cdist(x, y)).mean()
    np.testing.assert_allclose(jax.jit(distance)(jnp.asarray(x), jnp.asarray(y))[0], expected, rtol=1e-12)


@slow
@pytest.mark.parametrize("name", ["energy", "mmd"])
def test_no_bias_and_no_false_alarm_where_the_distributions_agree(name):
    """2,000 draws of 40 against 60: the mean within 4 of its standard errors, false alarm 6e-5.

    There value / stderr is skewed and its error too large on average, as documented: the ratio lies between 1
    and 1.36 (the jackknife, which counts the second order twice, has at least 1.41), and a value above two
    standard errors is no more frequent than the 2.3 per cent of a normal.
    """
    distance, root, _ = CASES[name]
    values, errors = repeat(lambda key: distance(*draw(key, 40, 60, root=root)), 2000, seed=1)
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(2000)
    assert 1.0 < np.sqrt(np.mean(errors**2)) / values.std() < 1.36
    assert np.mean(values > 2 * errors) < 0.023


# distances whose p-value is asked for, without their keys and bandwidths
TESTED = {
    "sliced": partial(metrics.sliced_wasserstein, jax.random.key(0), num_projections=8),
    "energy": metrics.energy_distance,
    "mmd": partial(metrics.mmd, bandwidth=BANDWIDTH),
    "frechet": metrics.frechet_distance,
}


@slow
@pytest.mark.parametrize("name", [*TESTED, "mmd at the median"])
def test_permutation_test_keeps_its_level_and_has_power(name):
    """Level 0.1 over 300 draws of 12 against 16 under the null; then the same draws with y moved by 2.

    Rejections are binomial(300, at most 0.1): more than 53 has probability 2e-5, as has fewer than 12 (the level is
    exact, 0.1, with 19 permutations and no ties). Moved by two standard deviations, at least 85 in 100 are found.
    """

    def p_values(key, shift):
        x, y = draw(key, 12, 16, root=np.eye(2), shift=np.zeros(2))
        y = y + shift
        distance = TESTED.get(name) or partial(metrics.mmd, bandwidth=metrics.median_distance(x, y))
        return metrics.permutation_test(jax.random.key(1), distance, x, y, num_permutations=19)

    keys = jax.random.split(jax.random.key(2), 300)
    run = jax.jit(lambda shift: jax.lax.map(lambda key: p_values(key, shift), keys, batch_size=25))
    null, moved = (np.asarray(run(jnp.asarray([[0.0, s]]))) for s in (0.0, 2.0))
    assert 12 <= np.sum(null < 0.1 + 1e-9) <= 53
    assert np.mean(moved < 0.1 + 1e-9) > 0.85
    assert np.min(moved) == pytest.approx(1 / 20)


@slow
def test_identical_samples():
    x, _ = draw(jax.random.key(8), 30, 1)
    everything = jax.jit(
        lambda key, x, y: (
            metrics.sliced_wasserstein(key, x, y),
            metrics.energy_distance(x, y),
            metrics.mmd(x, y, 1.0),
        )
    )
    same, *others = everything(jax.random.key(0), x, x)
    assert same == (0, 0)
    for value, error in others:
        assert value < 0  # the unbiased estimate leaves its diagonal out
        assert np.isfinite(error)


@slow
def test_far_from_the_origin_in_float32():
    """Two clouds of size 1 at 3e3: a distance by |a|^2 + |b|^2 - 2 a.b would be lost in rounding."""
    x, y = draw(jax.random.key(9), 300, 300, shift=SHIFT)
    distance = jax.jit(metrics.energy_distance)
    rounded = distance((x + 3e3).astype(jnp.float32), (y + 3e3).astype(jnp.float32))
    np.testing.assert_allclose(rounded, distance(x, y), rtol=5e-3)


@pytest.mark.parametrize("name", CASES)
def test_float32_in_float32_out(name):
    x = jax.ShapeDtypeStruct((20, 2), jnp.float32)
    assert {leaf.dtype for leaf in jax.eval_shape(CASES[name][0], x, x)} == {jnp.dtype(jnp.float32)}


# x ~ N(0, C) and y ~ N(OFFSET, D) in three dimensions, C and D turned against each other
C_ROOT = rotation(3, 4) @ np.diag([1.0, 0.6, 0.3])
D_ROOT = rotation(3, 5) @ np.diag([1.2, 0.5, 0.5])
OFFSET = np.array([0.3, -0.2, 0.4])


def frechet_of_gaussians(shift, c, d):
    """By SciPy's square root of a matrix that is not symmetric."""
    return shift @ shift + np.trace(c + d - 2 * sqrtm(c @ d).real)


def test_frechet_distance_of_the_fitted_gaussians():
    """The plug-in value against SciPy, in float64."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 3)) @ C_ROOT.T, rng.normal(size=(41, 3)) @ D_ROOT.T + OFFSET
    value, _ = jax.jit(partial(metrics.frechet_distance, unbiased=False))(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(value, frechet_of_gaussians(x.mean(0) - y.mean(0), np.cov(x.T), np.cov(y.T)), rtol=1e-11)


def frechet_draws(key, n, m, c, d, shift, law="normal"):
    """Features of mean zero and variance one, or far from normal: centred exponentials, turned and moved."""
    sample = {"normal": jax.random.normal, "exponential": lambda *a: jax.random.exponential(*a) - 1}[law]
    z = sample(key, (n + m, len(shift)))
    return z[:n] @ c.T, z[n:] @ d.T + shift[None]


@pytest.mark.parametrize("law", ["normal", pytest.param("exponential", marks=slow)])
def test_frechet_distance_is_unbiased_and_its_standard_error_covers(law):
    """1,000 draws of 150 against 200: the mean within 4 of its standard errors, false alarm 6e-5.

    The bias that is subtracted is more than twice that tolerance. Errors within 10 per cent of the spread (2.2
    per cent is one standard error of a standard deviation; exponentials have heavier tails: 20 per cent).
    Two-sigma intervals cover 91 to 98 times in 100, of exponentials 88 to 98: skewness.
    """
    truth = frechet_of_gaussians(OFFSET, C_ROOT @ C_ROOT.T, D_ROOT @ D_ROOT.T)

    def one(key):
        x, y = frechet_draws(key, 150, 200, C_ROOT, D_ROOT, OFFSET, law)
        return metrics.frechet_distance(x, y), metrics.frechet_distance(x, y, unbiased=False)[0]

    (values, errors), plug_in = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=50))(
        jax.random.split(jax.random.key(0), 1000)
    )
    values, errors, plug_in = map(np.asarray, (values, errors, plug_in))
    tolerance = 4 * values.std() / math.sqrt(1000)
    assert abs(values.mean() - truth) < tolerance
    assert plug_in.mean() - truth > 2 * tolerance
    loose = law == "exponential"
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), values.std(), rtol=0.2 if loose else 0.1)
    assert (0.88 if loose else 0.91) < np.mean(np.abs(values - truth) < 2 * errors) < 0.98


@slow
@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_frechet_distance_where_the_distributions_agree(law):
    """1,000 draws of 100 against 150, d = 4: of the bias (1/n + 1/m)(d + d (d + 1) / 4), for normal features, little is
    left: at most 6 per cent, or 14 for exponential ones, and 4 standard errors, false alarm 6e-5.

    The errors are too large by the root of two, as documented, and a value above two of them is no more frequent
    than the 2.3 per cent of a normal.
    """
    n, m, d = 100, 150, 4

    def one(key):
        x, y = frechet_draws(key, n, m, np.eye(d), np.eye(d), np.zeros(d), law)
        return metrics.frechet_distance(x, y), metrics.frechet_distance(x, y, unbiased=False)[0]

    (values, errors), plug_in = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=50))(
        jax.random.split(jax.random.key(1), 1000)
    )
    values, errors, plug_in = map(np.asarray, (values, errors, plug_in))
    left = {"normal": 0.06, "exponential": 0.14}[law] * plug_in.mean()
    assert abs(values.mean()) < left + 4 * values.std() / math.sqrt(1000)
    if law == "normal":
        np.testing.assert_allclose(plug_in.mean(), (1 / n + 1 / m) * (d + d * (d + 1) / 4), rtol=0.05)
    assert 1.1 < np.sqrt(np.mean(errors**2)) / values.std() < 1.6
    assert np.mean(values > 2 * errors) < 0.023


def test_frechet_distance_of_dependent_features():
    """A constant feature and sums of others: what is left when they are taken out again, R z of T z = Q R z.

    In float32 too, in which roots of zero eigenvalues would be off by 3e-4 of the largest each.
    """
    x, y = frechet_draws(jax.random.key(2), 60, 80, C_ROOT, D_ROOT, OFFSET)
    turn = np.stack([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, 0, 0], [0.6, 0.8, 0]])
    r = np.linalg.qr(turn)[1]
    narrow = [np.asarray(z) @ r.T for z in (x, y)]
    expected = frechet_of_gaussians(narrow[0].mean(0) - narrow[1].mean(0), *(np.cov(z.T) for z in narrow))
    wide = [(z @ turn.T).at[:, 4].set(7.0) for z in (x, y)]
    plug_in = jax.jit(partial(metrics.frechet_distance, unbiased=False))
    np.testing.assert_allclose(plug_in(*(z.astype(jnp.float32) for z in wide))[0], expected, rtol=1e-5)
    # nor do they change the bias and the error, in float64
    corrected = jax.jit(metrics.frechet_distance)
    np.testing.assert_allclose(corrected(*wide), corrected(*map(jnp.asarray, narrow)), rtol=1e-9)


def test_frechet_distance_has_finite_derivatives():
    """Against finite differences; where there is none, at x = y with a flat feature, finite, where roots give NaN."""
    x, y = frechet_draws(jax.random.key(3), 12, 15, C_ROOT, D_ROOT, OFFSET)
    plug_in = jax.jit(jax.value_and_grad(lambda x, y: metrics.frechet_distance(x, y, unbiased=False)[0], (0, 1)))
    step = jax.random.normal(jax.random.key(4), (27, 3))
    _, slopes = plug_in(x, y)
    slope = jnp.sum(slopes[0] * step[:12]) + jnp.sum(slopes[1] * step[12:])
    ends = [plug_in(x + h * step[:12], y + h * step[12:])[0] for h in (1e-6, -1e-6)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6)
    same = x.at[:, 1].set(0.0)
    value, slopes = plug_in(same, jnp.concatenate([same, same[:3]]))
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


def test_frechet_distance_needs_more_samples_than_features():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 8)))
    message = "y has 9 samples, but a covariance in 8 dimensions needs at least 10, and for a small bias 80"
    with pytest.raises(ValueError, match=message):
        metrics.frechet_distance(x, x[:9])


@pytest.mark.parametrize(("n", "m", "dtype"), [(40, 33, jnp.float64), (2, 2, jnp.float64), (100, 31, jnp.float32)])
def test_median_distance(n, m, dtype):
    """The lower median of SciPy's distances, for numbers that no chunk divides, with an outlier and far from 1."""
    x, y = draw(jax.random.key(n), n, m, root=ROOT, shift=SHIFT)
    for scale in (1.0, 1e-12, 1e12):
        z = np.concatenate([x, y]) * scale
        z[0] *= 1e5
        z = z.astype(dtype)
        distances = np.sort(pdist(z.astype(np.float64)))
        expected = distances[(len(distances) - 1) // 2]
        found = jax.jit(metrics.median_distance)(jnp.asarray(z[:n]), jnp.asarray(z[n:]))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=1e-6 if dtype == jnp.float32 else 1e-7)


def test_median_distance_of_equals():
    x = jnp.ones((5, 2))
    assert metrics.median_distance(x, x) == 0
    with pytest.raises(ValueError, match=r"bandwidth must be positive, got 0\.0: try median_distance"):
        metrics.mmd(x, x, metrics.median_distance(x, x))


@slow
def test_memory_of_ten_thousand_samples():
    """10,000 x 10,000 distances would be 400 MB; the metrics hold at most 32 MB, here in 64 dimensions."""
    x = jax.ShapeDtypeStruct((10_000, 64), jnp.float32)
    sliced = partial(metrics.sliced_wasserstein, jax.random.key(0))
    for distance in (metrics.energy_distance, sliced, metrics.median_distance, metrics.frechet_distance):
        compiled = jax.jit(distance).lower(x, x).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 32e6


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_quantize_undoes_dequantize(levels, dtype):
    """Every integer of two million, the rounding at the edges of bins included."""
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (-0.3, 7.1)):
        dequantization = metrics.uniform_dequantization(levels, low, high)
        k = jax.random.randint(jax.random.key(0), (700_000,), 0, levels)
        x = metrics.dequantize(jax.random.key(1), k.astype(jnp.uint8), dequantization, dtype=dtype)
        assert x.dtype == dtype
        assert low <= float(x.min())
        assert float(x.max()) <= high
        np.testing.assert_array_equal(metrics.quantize(x, dequantization), k)


def test_dequantization_is_uniform_inside_a_bin():
    """Bin 3 of 8 on [-1, 1) is [-0.25, 0): Kolmogorov's distance below 2.4 / sqrt(n), false alarm 2e-5."""
    n = 100_000
    x = metrics.dequantize(jax.random.key(2), jnp.full(n, 3), metrics.uniform_dequantization(8))
    u = np.sort((np.asarray(x) + 0.25) / 0.25)
    assert np.max(np.abs(u - (np.arange(n) + 0.5) / n)) + 0.5 / n < 2.4 / math.sqrt(n)


def test_quantize_outside_the_range_and_nan():
    dequantization = metrics.uniform_dequantization(4)
    x = jnp.asarray([-9.0, -1.0, -0.5, 0.99, 1.0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(metrics.quantize(x, dequantization), [0, 0, 1, 3, 3, 3, -1])


@pytest.mark.parametrize("levels", [17, 256])
def test_bits_of_a_uniform_density(levels):
    """A uniform density on [low, high]^D costs log2(levels) bits a dimension, whatever the range and D."""
    for low, high, d in ((-1.0, 1.0, 64), (0.0, 255.0, 3)):
        dequantization = metrics.uniform_dequantization(levels, low, high)
        log_prob = jnp.full(10, -d * math.log(high - low))
        value, error = metrics.bits_per_dim(log_prob, d, dequantization)
        np.testing.assert_allclose(value, math.log2(levels), rtol=1e-13)
        assert error < 1e-13


@slow
def test_bits_of_a_known_discrete_distribution():
    """Constant in each bin, log p costs the cross entropy of the integers exactly: here in two dimensions.

    The estimate from 4,000 examples is within 4 of its own standard errors, false alarm 6e-5, and that error is the
    standard deviation of -log2 P / 2 over the root of 4,000, to 10 per cent.
    """
    p, d, num = np.array([0.5, 0.25, 0.125, 0.125]), 2, 4000
    entropy = 1.75  # bits
    dequantization = metrics.uniform_dequantization(4, -2.0, 4.0)
    k = jax.random.choice(jax.random.key(3), 4, (num, d), p=jnp.asarray(p))
    x = metrics.dequantize(jax.random.key(4), k, dequantization)
    density = jnp.asarray(p / 1.5)  # a bin is 1.5 wide
    log_prob = jnp.sum(jnp.log(density[jnp.floor((x + 2.0) / 1.5).astype(int)]), axis=1)
    value, error = metrics.bits_per_dim(log_prob, d, dequantization)
    assert abs(value - entropy) < 4 * error
    np.testing.assert_allclose(
        error, math.sqrt(np.sum(p * np.log2(p) ** 2) - entropy**2) / math.sqrt(d * num), rtol=0.1
    )


@slow
def test_bits_of_a_density_that_bends_inside_its_bins_are_an_upper_bound():
    """Density 2 x on [0, 1], two levels, data always the upper one: P = 3/4, and -log2 P is below the cost.

    The cost is -E log2(2 x) + log2 2 for x uniform on [1/2, 1], that is 1 - integral by hand.
    """
    dequantization = metrics.uniform_dequantization(2, 0.0, 1.0)
    x = metrics.dequantize(jax.random.key(5), jnp.ones(20_000, int), dequantization)
    value, error = metrics.bits_per_dim(jnp.log(2 * x), 1, dequantization)
    mean_log = 2 * ((1 * math.log(2) - 1) - (0.5 * math.log(1) - 0.5))  # of log(2 x): x log(2 x) - x, from 1/2 to 1
    assert abs(value - (1 - mean_log / math.log(2))) < 4 * error  # false alarm 6e-5
    assert value > -math.log2(0.75)


def test_float32_bits():
    value, error = metrics.bits_per_dim(jnp.zeros(4, jnp.float32), 3, metrics.uniform_dequantization(256))
    assert value.dtype == error.dtype == jnp.float32
    np.testing.assert_allclose(value, 7.0, rtol=1e-6)


DISTANCES = {
    "sliced": (lambda x, y: metrics.sliced_wasserstein(jax.random.key(0), x, y), 2),
    "energy": (metrics.energy_distance, 4),
    "mmd": (lambda x, y: metrics.mmd(x, y, 1.0), 4),
    "frechet": (metrics.frechet_distance, 3),
    "median": (metrics.median_distance, 2),
    "permutation": (lambda x, y: metrics.permutation_test(jax.random.key(0), metrics.energy_distance, x, y), 2),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_bad_samples(name):
    distance, least = DISTANCES[name]
    x = jnp.ones((10, 2))
    with pytest.raises(ValueError, match=rf"y has {least - 1} samples, but .* needs at least {least}"):
        distance(x, x[: least - 1])
    with pytest.raises(ValueError, match=r"x must be samples \[n, d\], got shape \(10, 2, 1\): .*reshape"):
        distance(x[:, :, None], x)
    with pytest.raises(ValueError, match="y has NaN or infinity in 1 of 10 samples"):
        distance(x, x.at[3, 1].set(jnp.nan))
    with pytest.raises(ValueError, match=r"x has shape \(10, 2\) and y \(10, 1\): both must have the same d"):
        distance(x, x[:, :1])
    with pytest.raises(TypeError, match="y must be an array of floats, got dtype int64"):
        distance(x, x.astype(int))
    with pytest.raises(TypeError, match="x has dtype float64 and y float32"):
        distance(x, x.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"x has shape \(10, 0\): d must be at least 1"):
        distance(x[:, :0], x[:, :0])
    under_jit = jax.jit(distance)(x.at[0, 0].set(jnp.nan), x)  # values are not known while tracing
    assert np.all(np.isnan(np.asarray(under_jit)))


def test_bad_arguments():
    x, key = jnp.ones((10, 2)), jax.random.key(0)
    eight = metrics.uniform_dequantization(8)
    with pytest.raises(TypeError, match="key must be a typed key"):
        metrics.sliced_wasserstein(jax.random.PRNGKey(0), x, x)
    with pytest.raises(ValueError, match="num_projections must be at least 2, for a standard error, got 1"):
        metrics.sliced_wasserstein(key, x, x, num_projections=1)
    with pytest.raises(ValueError, match=r"num_permutations must be at least 19, for p = 0\.05, got 5"):
        metrics.permutation_test(key, metrics.energy_distance, x, x, num_permutations=5)
    with pytest.raises(ValueError, match=r"bandwidth must be positive, got -1\.0"):
        metrics.mmd(x, x, -1.0)
    assert np.all(np.isnan(np.asarray(jax.jit(metrics.mmd)(x, x + 1, -1.0))))  # its square would look as well
    with pytest.raises(ValueError, match="x has 3 samples, but a standard error needs at least 4"):
        metrics.permutation_test(key, metrics.energy_distance, x[:3], x)
    with pytest.raises(ValueError, match=r"bandwidth must be a scalar, got shape \(2,\)"):
        metrics.mmd(x, x, jnp.ones(2))
    with pytest.raises(ValueError, match="levels must be an integer of at least 2, got 1"):
        metrics.uniform_dequantization(1)
    with pytest.raises(ValueError, match=r"low must be below high and both finite, got low=1\.0 and high=0\.0"):
        metrics.uniform_dequantization(8, 1.0, 0.0)
    with pytest.raises(TypeError, match="key must be a typed key"):
        metrics.dequantize(jax.random.PRNGKey(0), jnp.zeros(3, int), eight)
    with pytest.raises(TypeError, match="integers must be of an integer dtype, got float64"):
        metrics.dequantize(key, jnp.zeros(3), eight)
    with pytest.raises(ValueError, match=r"integers go from 0 to 8, but 8 levels are 0 \.\. 7"):
        metrics.dequantize(key, jnp.arange(9), eight)
    with pytest.raises(TypeError, match="dtype bfloat16 cannot hold numbers inside 8 bins"):
        metrics.dequantize(key, jnp.arange(8), eight, dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match="x must be an array of floats, got dtype int64"):
        metrics.quantize(jnp.arange(3), eight)
    with pytest.raises(ValueError, match=r"log_prob must be \[num\] with num at least 2, .* got shape \(1,\)"):
        metrics.bits_per_dim(jnp.zeros(1), 2, eight)
    with pytest.raises(ValueError, match="log_prob has 2 of 3 values NaN or plus infinity"):
        metrics.bits_per_dim(jnp.asarray([jnp.nan, jnp.inf, 0.0]), 2, eight)
    with pytest.raises(ValueError, match="num_dims must be at least 1, got 0"):
        metrics.bits_per_dim(jnp.zeros(3), 0, eight)


def test_known_integers_are_dequantised_inside_jit():
    k, bins = jnp.asarray([0, 3, 7]), metrics.uniform_dequantization(8)
    x = jax.jit(lambda key: metrics.dequantize(key, k, bins))(jax.random.key(0))
    np.testing.assert_array_equal(metrics.quantize(x, bins), k)
    beyond = k + 1
    with pytest.raises(ValueError, match="integers go from 1 to 8"):
        jax.jit(lambda key: metrics.dequantize(key, beyond, bins))(jax.random.key(0))
