"""Bits per dimension by uniform and variational dequantisation, against masses of bins that are known.

The density is a rotated mixture on an 8 x 8 board of bins of width 0.8. Its masses P(k) come from 40 x 40
Gauss-Legendre nodes a bin, as do the means of log p over a bin, and so the gap of the uniform bound. Keys are fixed; a
statistical test says how often another key would fail it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from targets import rotated_mixture, rotation

from dgm_jax import densities, dequantization, metrics, networks, training

WIDTH = 0.8
BINS = metrics.uniform_dequantization(8, -3.2, 3.2)
MASKS = (np.array([True, False]), np.array([False, True]))
MIXTURE = rotated_mixture(2)
BOARD = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1).reshape(-1, 2)  # every bin [64, 2]
NORMAL = densities.gaussian(
    jnp.asarray([0.3, -0.2]), jnp.asarray(rotation(2, 1) @ np.diag([0.1, 2.0]) @ rotation(2, 1).T)
)


def log_p(x):
    return densities.log_prob(MIXTURE, x)


def moments(density, corners):
    """Of bins [num, 2]: log P(k), mean and variance of the uniform bound log p(x) + 2 log w, x uniform on the bin."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    nodes, weights = (nodes + 1) / 2, weights / 2
    u = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    w = np.outer(weights, weights).reshape(-1)
    points = corners[:, None, :] + WIDTH * u[None]
    values = jax.jit(jax.vmap(jax.vmap(lambda x: densities.log_prob(density, x))))(jnp.asarray(points))
    values = np.asarray(values) + 2 * math.log(WIDTH)
    mean = values @ w
    return np.log(np.exp(values) @ w), mean, (values - mean[:, None]) ** 2 @ w


@pytest.fixture(scope="module")
def known():
    """Those of every bin of the board."""
    return moments(MIXTURE, WIDTH * BOARD - 3.2)


def rectangle(corner):
    """P of a bin under ``NORMAL``, as one integral of differences of normal distribution functions."""
    m, c = np.asarray(NORMAL.means[0]), np.asarray(NORMAL.covariances[0])
    slope, scale = c[0, 1] / c[0, 0], math.sqrt(c[1, 1] - c[0, 1] ** 2 / c[0, 0])

    def integrand(x):
        centre = m[1] + slope * (x - m[0])
        strip = np.diff(stats.norm.cdf((corner[1] + WIDTH * np.arange(2) - centre) / scale))[0]
        return stats.norm.pdf(x, m[0], math.sqrt(c[0, 0])) * strip

    return integrate.quad(integrand, corner[0], corner[0] + WIDTH, epsabs=1e-14, epsrel=1e-13)[0]


def test_masses_are_those_of_another_integral_and_sum_to_one():
    corners = np.array([[-1.0, -1.0], [0.0, 0.0], [-1.0, 0.0], [1.0, -2.0]])
    np.testing.assert_allclose(np.exp(moments(NORMAL, corners)[0]), [rectangle(c) for c in corners], rtol=1e-11)
    wide = np.stack(np.meshgrid(np.arange(-12, 12), np.arange(-12, 12)), -1).reshape(-1, 2)
    np.testing.assert_allclose(np.exp(moments(MIXTURE, WIDTH * wide)[0]).sum(), 1, rtol=1e-10)


def net_and_params(key, scale, features=(16,), dtype=jnp.float64):
    """A network for couplings in two dimensions, and random params of two layers of that scale."""
    net = networks.MLP(features, out_features=4, param_dtype=dtype)

    def network(a, y, params):
        return jnp.split(net.apply(params, jnp.zeros((), dtype), jnp.concatenate([a, y])), 2)

    zeros = jnp.zeros((), dtype), jnp.zeros(4, dtype)
    params = [net.init(each, *zeros) for each in jax.random.split(key, 2)]
    leaves, tree = jax.tree.flatten(params)
    noise = [
        scale * jax.random.normal(each, leaf.shape, dtype)
        for each, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return network, jax.tree.unflatten(tree, [leaf + e for leaf, e in zip(leaves, noise, strict=True)])


def test_uniform_bound_falls_short_by_the_known_gap(known):
    """All 64 bins, 2,000 draws each. The mean within 5 standard errors (6e-7), the standard error over draws within 5
    per cent: 64 sample variances of 2,000, of kurtosis below 9, leave about 0.4 per cent."""
    log_mass, mean, variance = known
    report = dequantization.bits_per_dim(
        jax.random.key(0), dequantization.uniform(BINS), log_p, jnp.asarray(BOARD), repeats=2000, batch_size=30
    )
    to_bits = 1 / (2 * math.log(2))
    expected = math.sqrt(variance.mean() / (64 * 2000)) * to_bits
    np.testing.assert_allclose(report.stderr_draws, expected, rtol=0.05)
    assert abs(report.bits - -mean.mean() * to_bits) < 5 * expected
    gap = (log_mass - mean).mean() * to_bits
    assert gap > 0.3  # bits per dimension: what the name in the report is about
    assert abs(report.bits - -log_mass.mean() * to_bits - gap) < 5 * expected
    np.testing.assert_allclose(report.stderr, mean.std(ddof=1) / 8 * to_bits, rtol=0.05)
    assert report.dequantization == "uniform, 8 levels on [-3.2, 3.2], 1 draw"


def test_uniform_bits_are_those_of_metrics():
    bins = metrics.uniform_dequantization(17, -1.0, 2.0)
    k = jnp.arange(10).reshape(5, 2)
    report = dequantization.bits_per_dim(
        jax.random.key(0), dequantization.uniform(bins), lambda x: jnp.full((), -0.7), k
    )
    value, _ = metrics.bits_per_dim(jnp.full(5, -0.7), 2, bins)
    np.testing.assert_allclose(report.bits, value, rtol=1e-14)
    np.testing.assert_allclose(report.stderr, 0, atol=1e-15)
    assert report.stderr_draws is None


def test_the_exact_posterior_gives_the_mass_itself_at_every_draw():
    """q(x | k) = N(x_1) / P(k) times N(x_2 | x_1) cut to the bin, drawn by inverting both distribution functions."""
    m, c = np.asarray(NORMAL.means[0]), np.asarray(NORMAL.covariances[0])
    slope, scale, first = c[0, 1] / c[0, 0], math.sqrt(c[1, 1] - c[0, 1] ** 2 / c[0, 0]), math.sqrt(c[0, 0])
    nodes, weights = (jnp.asarray(each) for each in np.polynomial.legendre.leggauss(30))
    norm = jax.scipy.stats.norm

    def strip(x, corner):
        edges = (corner[1] + WIDTH * jnp.arange(2.0) - m[1] - slope * (x - m[0])) / scale
        return norm.cdf(edges)

    def density_1(x, corner):
        low, high = strip(x, corner)
        return norm.pdf(x, m[0], first) * (high - low)

    def mass_up_to(u, corner):
        xs = corner[0] + WIDTH * u * (nodes + 1) / 2
        return WIDTH * u / 2 * jnp.sum(weights * jax.vmap(lambda x: density_1(x, corner))(xs))

    def place(key, k, params):
        corner, (v, w) = WIDTH * k.astype(float) - 3.2, jax.random.uniform(key, (2,))
        mass = mass_up_to(1.0, corner)

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            below = mass_up_to(middle, corner) < v * mass
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        u_1 = jax.lax.fori_loop(0, 50, halve, (jnp.zeros(()), jnp.ones(())))[0]
        x_1 = corner[0] + WIDTH * u_1
        low, high = strip(x_1, corner)
        z = norm.ppf(low + w * (high - low))
        u_2 = (m[1] + slope * (x_1 - m[0]) + scale * z - corner[1]) / WIDTH
        log_q = jnp.log(density_1(x_1, corner) / mass) + norm.logpdf(z) - math.log(scale) - jnp.log(high - low)
        return jnp.stack([u_1, u_2]), log_q + 2 * math.log(WIDTH)

    q = dequantization.variational("posterior", BINS, place)
    k = jnp.asarray([[3, 3], [4, 4], [3, 4], [5, 2]])
    keys = jax.random.split(jax.random.key(1), (4, 50))
    values = jax.jit(
        jax.vmap(
            lambda k, keys: jax.vmap(
                lambda key: dequantization.bound(key, q, lambda x: densities.log_prob(NORMAL, x), k)
            )(keys)
        )
    )(k, keys)
    log_mass = moments(NORMAL, WIDTH * np.asarray(k) - 3.2)[0]
    np.testing.assert_allclose(values, np.broadcast_to(log_mass[:, None], values.shape), atol=1e-10, rtol=0)


def test_the_bound_is_tight_where_the_coupling_is_the_posterior():
    """The model P(k) q(x | k), with log q(x | k) of the coupling through its inverse."""
    network, params = net_and_params(jax.random.key(2), 0.15)
    q = dequantization.coupling(BINS, MASKS, network)
    margin = 2 * 8 * np.finfo(np.float64).eps

    def log_model(k):
        y = (k.astype(float) + 0.5) / 4 - 1

        def log_prob(x):
            a = jax.scipy.special.logit(((x + 3.2) / WIDTH - k.astype(float) - margin) / (1 - 2 * margin))
            log_q = -jnp.sum(jax.scipy.stats.logistic.logpdf(a)) - 2 * math.log1p(-2 * margin) - 2 * math.log(WIDTH)
            for mask, own in reversed(list(zip(MASKS, params, strict=True))):
                raw, shift = network(jnp.where(mask, a, 0.0), y, own)
                s = 2 * jnp.tanh(raw / 2)
                a, log_q = jnp.where(mask, a, (a - shift) * jnp.exp(-s)), log_q - jnp.sum(jnp.where(mask, 0.0, s))
            return math.log(0.2) + log_q + jnp.sum(jax.scipy.stats.logistic.logpdf(a))

        return log_prob

    @jax.jit
    @jax.vmap
    def bounds(key):
        return dequantization.bound(key, q, log_model(k), k, params, num_draws=3)

    k = jnp.asarray([1, 6])
    np.testing.assert_allclose(bounds(jax.random.split(jax.random.key(3), 400)), math.log(0.2), atol=1e-10)


def dequantizer(kind):
    if kind == "uniform":
        return dequantization.uniform(BINS), None
    network, params = net_and_params(jax.random.key(4), 0.08)
    return dequantization.coupling(BINS, MASKS, network), params


@pytest.mark.parametrize("num_draws", [1, 4])
@pytest.mark.parametrize("kind", ["uniform", "coupling"])
def test_the_exponential_of_the_bound_has_the_mass_as_its_mean(kind, num_draws, known):
    """E[exp(bound)] = P(k) for any q and any n: 12 bins, 5 standard errors of 4,000 draws each (7e-6 in all), which
    are at most 3 per cent."""
    q, params = dequantizer(kind)
    log_mass = known[0]
    likely = np.argsort(log_mass)[-12:]
    keys = jax.random.split(jax.random.key(5), (12, 4000))

    def one(key, k):
        return dequantization.bound(key, q, log_p, k, params, num_draws=num_draws)

    values = jax.jit(jax.vmap(jax.vmap(one, (0, None))))(keys, jnp.asarray(BOARD[likely]))
    ratios = np.exp(values - log_mass[likely][:, None])
    stderr = ratios.std(axis=1, ddof=1) / math.sqrt(4000)
    assert np.all(stderr < 0.03)
    assert np.all(np.abs(ratios.mean(axis=1) - 1) < 5 * stderr)


def test_more_draws_give_a_tighter_bound(known):
    """Means over 64 bins of 250 bounds each rise by at least 5 standard errors of the difference at every step from 1
    to 4 to 16 to 64 draws, and stay below log P (each 3e-7 if there were no difference)."""
    q = dequantization.uniform(BINS)
    keys = jax.random.split(jax.random.key(6), (64, 250))
    means, errors = [], []
    for num_draws in (1, 4, 16, 64):

        def one(key, k, num_draws=num_draws):
            return dequantization.bound(key, q, log_p, k, num_draws=num_draws)

        values = np.asarray(jax.jit(jax.vmap(jax.vmap(one, (0, None))))(keys, jnp.asarray(BOARD)))
        means.append(values.mean())
        errors.append(math.sqrt(values.var(axis=1, ddof=1).mean() / values.size))
    steps = np.hypot(errors[1:], errors[:-1])
    assert np.all(np.diff(means) > 5 * steps)
    gaps = known[0].mean() - np.asarray(means)
    assert np.all(gaps > -5 * np.asarray(errors))
    assert gaps[-1] < 0.1 * gaps[0]


def test_an_untrained_coupling_is_uniform():
    network, params = net_and_params(jax.random.key(7), 0.0)
    q = dequantization.coupling(metrics.uniform_dequantization(8, -1.0, 1.0), MASKS, network)
    k = jnp.asarray([1, 5])
    sample = jax.jit(jax.vmap(q.sample, (0, None, None)))
    x, log_q = sample(jax.random.split(jax.random.key(8), 2000), k, params)
    np.testing.assert_allclose(log_q, 2 * math.log(4), atol=1e-12)
    for i in range(2):  # Kolmogorov-Smirnov, at 1e-6
        assert stats.kstest(np.asarray(x[:, i] + 1) * 4 - int(k[i]), "uniform").pvalue > 1e-6


@pytest.mark.parametrize(("levels", "low", "high"), [(256, -1.0, 1.0), (17, 0.0, 17.0), (100, 7.0, 8.0)])
def test_float32_stays_in_its_bin_however_hard_the_flow_pushes(levels, low, high):
    bins = metrics.uniform_dequantization(levels, low, high)

    def push(a, y, params):
        return jnp.full_like(a, 2.0), jnp.full_like(a, params)

    q = dequantization.coupling(bins, MASKS, push, dtype=jnp.float32)
    k = jnp.stack([jnp.arange(levels), jnp.arange(levels)[::-1]], axis=1)
    sample = jax.jit(jax.vmap(q.sample, (0, 0, None)))
    for by in (-200.0, -10.0, 10.0, 200.0):
        x, log_q = sample(jax.random.split(jax.random.key(9), levels), k, [jnp.float32(by)] * 2)
        np.testing.assert_array_equal(metrics.quantize(x, bins), k)
        assert np.isfinite(log_q).all()


def test_gradients_pass_through_draws_and_densities():
    """By the params of both p and q, against central differences of the same draws."""
    network, params = net_and_params(jax.random.key(10), 0.3)
    q = dequantization.coupling(BINS, MASKS, network)
    k = jnp.asarray([3, 5])

    @jax.jit
    def mean_bound(scale, move):
        moved = jax.tree.map(lambda leaf: leaf + move * jnp.cos(leaf), params)
        keys = jax.random.split(jax.random.key(11), 20)
        return jnp.mean(
            jax.vmap(lambda key: dequantization.bound(key, q, lambda x: log_p(scale * x), k, moved, num_draws=2))(keys)
        )

    found = jax.jit(jax.grad(mean_bound, (0, 1)))(1.1, 0.2)
    h = 1e-5
    expected = [
        (mean_bound(1.1 + h, 0.2) - mean_bound(1.1 - h, 0.2)) / (2 * h),
        (mean_bound(1.1, 0.2 + h) - mean_bound(1.1, 0.2 - h)) / (2 * h),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert min(map(abs, expected)) > 0.05


@pytest.mark.slow
def test_training_the_coupling_closes_most_of_the_gap(known):
    """The mean gap over the bins, in nats and with the weights of P(k): 5 standard errors of 64 x 400 draws, and less
    than a fifth of the uniform one."""
    log_mass, mean, _ = known
    mass = np.exp(log_mass)
    mass /= mass.sum()
    network, params = net_and_params(jax.random.key(12), 0.0, (32, 32))
    q = dequantization.coupling(BINS, MASKS * 2, network)
    params = params + params
    board, weights = jnp.asarray(BOARD), jnp.asarray(mass)

    def loss(params, key, k):
        keys = jax.random.split(key, len(k))
        return -jnp.mean(jax.vmap(lambda key, k: dequantization.bound(key, q, log_p, k, params))(keys, k))

    optimizer = training.adam(1e-2, 1500)
    step = training.step(loss, optimizer, ema_decay=0.98)

    @jax.jit
    def train(state):
        def one(state, n):
            k = board[jax.random.choice(jax.random.fold_in(jax.random.key(13), n), 64, (128,), p=weights)]
            state, report = step(state, jax.random.key(14), k)
            return state, report["loss"]

        return jax.lax.scan(one, state, jnp.arange(1500))

    state, _ = train(training.init(params, optimizer))
    keys = jax.random.split(jax.random.key(15), (64, 400))

    @jax.jit
    def measure(params):
        def one(key, k):
            return dequantization.bound(key, q, log_p, k, params)

        return jax.vmap(jax.vmap(one, (0, None)))(keys, board)

    values = np.asarray(measure(state.ema))
    gap = mass @ (log_mass - values.mean(axis=1))
    stderr = math.sqrt(np.sum(mass**2 * values.var(axis=1, ddof=1) / 400))
    by_uniform = mass @ (log_mass - mean)
    assert gap > -5 * stderr
    assert gap < 0.2 * by_uniform, (gap, by_uniform)


def test_integers_that_are_none_are_refused():
    q, key, log_p = dequantization.uniform(BINS), jax.random.key(0), lambda x: -jnp.sum(x**2)
    with pytest.raises(ValueError, match="integers go from 0 to 8, but 8 levels are 0"):
        dequantization.bound(key, q, log_p, jnp.asarray([0, 8]))
    with pytest.raises(ValueError, match="integers go from -1 to 3"):
        dequantization.bits_per_dim(key, q, log_p, jnp.asarray([[-1, 3], [0, 0]]))
    with pytest.raises(TypeError, match="integers must be of an integer dtype, got float64"):
        dequantization.bound(key, q, log_p, jnp.asarray([0.0, jnp.nan]))
    assert np.isnan(jax.jit(lambda k: dequantization.bound(key, q, log_p, k))(jnp.asarray([0, 8])))
    assert np.isnan(jax.jit(lambda k: dequantization.bound(key, q, log_p, k))(jnp.asarray([-1, 3])))
    assert np.isfinite(dequantization.bound(key, q, log_p, jnp.asarray([0, 7], jnp.uint8)))


def test_nan_is_no_number_of_bits():
    k, key = jnp.asarray([[1, 2], [3, 4]]), jax.random.key(0)
    with pytest.raises(ValueError, match="1 of 2 bounds are NaN or plus infinity"):
        dequantization.bits_per_dim(key, dequantization.uniform(BINS), lambda x: jnp.log(x[0] + 1.5), k)
    outside = dequantization.variational("outside", BINS, lambda key, k, params: (jnp.full(2, 1.01), jnp.zeros(())))
    with pytest.raises(ValueError, match="2 of 2 bounds are NaN"):
        dequantization.bits_per_dim(key, outside, log_p, k)
    report = dequantization.bits_per_dim(key, dequantization.uniform(BINS), lambda x: jnp.full((), -jnp.inf), k)
    assert report.bits == jnp.inf  # a model that excludes the data


def test_errors_say_what_to_pass():
    q, key, k = dequantization.uniform(BINS), jax.random.key(0), jnp.asarray([[1, 2], [3, 4]])
    with pytest.raises(TypeError, match="typed key"):
        dequantization.bound(jax.random.PRNGKey(0), q, log_p, k[0])
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        dequantization.bound(key, q, log_p, k[0], num_draws=0)
    with pytest.raises(ValueError, match="log_prob returned shape"):
        dequantization.bound(key, q, lambda x: x, k[0])
    with pytest.raises(ValueError, match="num at least 2"):
        dequantization.bits_per_dim(key, q, log_p, k[:1])
    wrong = dequantization.variational("wrong", BINS, lambda key, k, params: (jnp.zeros(3), jnp.zeros(())))
    with pytest.raises(ValueError, match="place returned shape"):
        dequantization.bound(key, wrong, log_p, k[0])
    with pytest.raises(ValueError, match="masks is empty"):
        dequantization.coupling(BINS, (), lambda a, y, params: (a, a))
    with pytest.raises(ValueError, match="mask of shape"):
        dequantization.coupling(BINS, (np.ones(2, bool),), lambda a, y, params: (a, a))
    eight_bits = metrics.uniform_dequantization(256)
    with pytest.raises(TypeError, match="cannot hold numbers inside 256 bins"):
        dequantization.coupling(eight_bits, MASKS, lambda a, y, params: (a, a), dtype=jnp.float16)
    coupled, _ = dequantizer("coupling")
    with pytest.raises(ValueError, match="params must be a sequence"):
        dequantization.bound(key, coupled, log_p, k[0])
