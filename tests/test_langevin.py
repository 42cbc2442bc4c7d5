"""Langevin dynamics: what each chain settles at, against closed form and quadrature."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import rotated_mixture, rotation

from dgm_jax import densities, langevin, schedules, sdes, solvers

NUM = 20_000
MIXTURE = rotated_mixture(2)
LOG_DENSITY = densities.log_density(MIXTURE, schedules.vp())
SCORE = densities.score(MIXTURE, schedules.vp())


def many(run, seed, x0):
    """One chain for each row of x0, each with its own key."""
    keys = jax.random.split(jax.random.key(seed), len(x0))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(keys, x0))


def z_scores(values, exact):
    """The means of independent rows [num, ...] less what they should be, in standard errors."""
    values = np.asarray(values)
    return (values.mean(0) - exact) / (values.std(0, ddof=1) / np.sqrt(len(values)))


def with_products(x):
    """x1, x2 and their products about nothing, [num, 5]."""
    return np.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], 1)


def exact_products(density):
    mean, second = np.asarray(densities.mean(density)), np.asarray(densities.covariance(density))
    second = second + np.outer(mean, mean)
    return np.array([*mean, second[0, 0], second[0, 1], second[1, 1]])


def bent(t, x, args):
    """A score that is not linear, with an argument and a time."""
    return -args * x**3 + jnp.sin(x[::-1]) + t


def test_unadjusted_is_euler_maruyama_of_the_langevin_sde():
    """The same path for the same key, to rounding; thinned states are states of that path; one compilation."""
    num, x0, args = 40, jnp.asarray([0.4, -1.0, 2.0]), jnp.asarray(0.5)
    sde = sdes.langevin(lambda t, x, args: bent(0.3, x, args))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def chains(key, eta):
        ours = [
            langevin.unadjusted(key, bent, x0, args, step_size=eta, num_steps=num, thin=k, t=0.3) for k in (4, None)
        ]
        path = solvers.euler_maruyama(key, sde, x0, args, t0=0.0, t1=eta * num, num_steps=num, path=True)
        return *ours, path

    for seed, eta in ((0, 0.05), (1, 0.01)):
        (last, states), alone, (_, path) = chains(jax.random.key(seed), eta)
        np.testing.assert_allclose(states, path[4::4], rtol=1e-12)
        np.testing.assert_array_equal(last, states[-1])
        np.testing.assert_allclose(alone, last, rtol=1e-12)


def test_unadjusted_on_a_gaussian_settles_at_its_known_covariance():
    """Covariance with eigenvalues 1 / (l (1 - eta l / 4)), about the same axes.

    20,000 chains start there and take 25 steps, of which the slowest direction forgets 1 - (1 - eta l / 2)^25 = 88 per
    cent. Two means and three products within 4 standard errors, a false alarm in 3,100; p's own are more than 15 off.
    """
    precisions, turn, eta = np.array([0.4, 2.5]), rotation(2, 5), 0.4
    density = densities.gaussian(jnp.asarray([1.0, -2.0]), jnp.asarray(turn @ np.diag(1 / precisions) @ turn.T))
    score = densities.score(density, schedules.vp())
    settled = turn @ np.diag(1 / (precisions * (1 - eta * precisions / 4))) @ turn.T
    x0 = densities.sample(jax.random.key(0), density._replace(covariances=jnp.asarray(settled)[None]), NUM)
    x = many(lambda key, x: langevin.unadjusted(key, score, x, step_size=eta, num_steps=25), 1, x0)
    centred = x - np.array([1.0, -2.0])
    products = np.stack([centred[:, 0] ** 2, centred[:, 0] * centred[:, 1], centred[:, 1] ** 2], 1)
    assert np.abs(z_scores(x, [1.0, -2.0])).max() < 4
    assert np.abs(z_scores(products, settled[np.triu_indices(2)])).max() < 4
    own = np.asarray(density.covariances[0])[np.triu_indices(2)]
    assert np.abs(z_scores(products, own)).max() > 15


def test_unadjusted_bias_is_of_first_order_in_the_step():
    """On a density of two humps in one dimension, by quadrature of the chain's own kernel.

    The kernel is Gaussian about what the chain does with the noise taken away, and as wide as what it does with the
    score taken away. The stationary law is the eigenvector of its matrix on a grid (trapezoidal sums of a smooth
    function: exact to 1e-12); the error in E[x^2] halves with the step, its order within 0.02 of 1 by extrapolation.
    """
    density = densities.Mixture(
        jnp.asarray([0.35, 0.65]), jnp.asarray([[-1.0], [0.8]]), jnp.asarray([[[0.4]], [[0.3]]])
    )
    score, key = densities.score(density, schedules.vp()), jax.random.key(0)
    grid = np.linspace(-7, 7, 701)

    @jax.jit
    @jax.vmap
    def ends(eta, scale):
        def one(x):
            field = lambda t, x, args: scale * score(t, x, args)  # noqa: E731
            return langevin.unadjusted(key, field, x, step_size=eta, num_steps=1)

        return jax.vmap(one)(jnp.asarray(grid)[:, None])[:, 0]

    etas = np.array([0.2, 0.1, 0.05, 0.025])
    with_score, without = np.asarray(ends(etas, np.ones(4))), np.asarray(ends(etas, np.zeros(4)))
    unit = np.asarray(ends(np.ones(1), np.zeros(1)))[0] - grid  # the same draw at eta = 1
    errors = []
    for eta, far, noise in zip(etas, with_score, without, strict=True):
        centre, width = far - noise + grid, np.median((noise - grid) / unit)
        np.testing.assert_allclose(width, np.sqrt(eta), rtol=1e-12)
        kernel = np.exp(-0.5 * ((grid[None] - centre[:, None]) / width) ** 2)
        kernel /= kernel.sum(1, keepdims=True)
        law = np.full(len(grid), 1 / len(grid))
        for _ in range(14):  # 2^14 steps
            kernel = kernel @ kernel
        law = law @ kernel
        errors.append(law @ grid**2 - exact_second(density))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert min(errors) > 1e-3
    assert abs(errors[-1]) < 0.02
    assert np.all(np.diff(np.abs(orders - 1)) < 0)  # ever nearer to 1
    np.testing.assert_allclose(2 * orders[-1] - orders[-2], 1, atol=0.02)


def exact_second(density):
    return float(densities.covariance(density)[0, 0] + densities.mean(density)[0] ** 2)


@pytest.fixture(scope="module")
def chains_on_the_mixture():
    """40,000 exact draws of a rotated mixture, and 30 steps from each: adjusted, not adjusted; a step a coordinate."""
    options = {"step_size": jnp.asarray([0.9, 0.6]), "num_steps": 30, "thin": 1}

    def run(key, x):
        _, info = langevin.metropolis(key, LOG_DENSITY, x, **options)
        return info, langevin.unadjusted(key, SCORE, x, **options)[1]

    x0 = jax.jit(lambda key: densities.sample(key, MIXTURE, 2 * NUM))(jax.random.key(0))
    info, plain = many(run, 1, x0)
    return np.asarray(x0), info, plain


@pytest.mark.slow
def test_the_law_of_the_adjusted_chain_is_stationary(chains_on_the_mixture):
    """From exact draws of a rotated mixture: still exact draws after 30 steps.

    As the chains are independent so are the draws: five moments within 4 standard errors (a false alarm in 3,000), and
    the Kolmogorov-Smirnov statistic along a direction below 2.23, which it exceeds once in 10,000 times. Without the
    correction the same chain is far off in the same statistics.
    """
    x0, info, plain = chains_on_the_mixture
    x, wrong = info.states[:, -1], plain[:, -1]
    assert np.abs(z_scores(with_products(x), exact_products(MIXTURE))).max() < 4
    assert np.abs(z_scores(with_products(wrong), exact_products(MIXTURE))).max() > 10

    u = np.array([0.6, 0.8])
    centres, widths = np.asarray(MIXTURE.means) @ u, np.sqrt(u @ np.asarray(MIXTURE.covariances) @ u)

    def kolmogorov(x):
        s, num = np.sort(x @ u), len(x)
        normal = jax.scipy.special.ndtr((s[:, None] - centres[None]) / widths[None])
        cdf = np.asarray(normal) @ np.asarray(MIXTURE.weights)
        return np.sqrt(num) * max(np.abs(cdf - np.arange(k, num + k) / num).max() for k in (0, 1))

    assert kolmogorov(x) < 2.23 < 5 < kolmogorov(wrong)
    assert 0.3 < info.acceptance.mean() < 0.9
    assert info.nonfinite.sum() == 0
    assert np.mean(np.any(x != x0, axis=1)) > 0.99  # and the chains have moved


@pytest.mark.slow
def test_the_adjusted_kernel_is_in_detailed_balance(chains_on_the_mixture):
    """From x ~ p one step to y: (x, y) and (y, x) have one law, so antisymmetric functions average to zero.

    Four of them over 40,000 pairs within 4 standard errors (a false alarm in 4,000); without the correction the same
    ones are off by more than 8.
    """
    x0, info, plain = chains_on_the_mixture

    def asymmetry(y):
        x = x0
        f = [x[:, 0] ** 3 * y[:, 0], x[:, 0] ** 2 * y[:, 1], np.tanh(x[:, 1]) * y[:, 0] ** 2, (x[:, 0] < 0) * y[:, 1]]
        g = [y[:, 0] ** 3 * x[:, 0], y[:, 0] ** 2 * x[:, 1], np.tanh(y[:, 1]) * x[:, 0] ** 2, (y[:, 0] < 0) * x[:, 1]]
        return np.abs(z_scores(np.stack(f, 1) - np.stack(g, 1), 0.0))

    right, wrong = asymmetry(info.states[:, 0]), asymmetry(plain[:, 0])
    assert right.max() < 4 < 8 < wrong.max(), (right, wrong)


def test_acceptance_is_the_integral_of_metropolis_and_hastings():
    """On N(0, 1) from x the proposal is N(m x, eta), m = 1 - eta/2, and the ratio p(y) q(x | y) / (p(x) q(y | x)) is
    exp(-eta (y^2 - x^2) / 8). Its integral by a fine sum, against the mean over 4,000 keys: six x, with
    accepted steps counted from the chain itself as well, within 4 standard errors: a false alarm in 1,300.
    """
    eta, starts = 1.2, np.array([-3.0, -1.0, 0.0, 0.5, 1.5, 4.0])
    x0 = jnp.repeat(jnp.asarray(starts), 4000)[:, None]
    normal = lambda t, x, args: -0.5 * jnp.sum(x**2)  # noqa: E731
    x, info = many(lambda key, x: langevin.metropolis(key, normal, x, step_size=eta, num_steps=1), 4, x0)
    y = np.linspace(-12, 12, 40_001)
    for start, mean, moved in zip(starts, info.acceptance.reshape(6, -1), (x != x0).reshape(6, -1), strict=True):
        density = np.exp(-0.5 * (y - (1 - eta / 2) * start) ** 2 / eta) / np.sqrt(2 * np.pi * eta)
        exact = np.sum(density * np.minimum(1, np.exp(-eta * (y**2 - start**2) / 8))) * (y[1] - y[0])
        assert abs(z_scores(mean, exact)) < 4
        assert abs(z_scores(moved, exact)) < 4


def test_one_evaluation_of_the_log_density_a_step():
    calls = []

    def counted(t, x, args):
        jax.debug.callback(lambda: calls.append(1))
        return -0.5 * jnp.sum(x**2)

    run = jax.jit(lambda key: langevin.metropolis(key, counted, jnp.zeros(2), step_size=0.5, num_steps=10, thin=5)[0])
    jax.block_until_ready(run(jax.random.key(0)))
    jax.effects_barrier()
    assert len(calls) == 11


@pytest.mark.slow
def test_proposals_outside_the_support_are_rejected_and_counted():
    """The exponential density: -inf or NaN left of 0. From exact draws its mean and second moment, 1 and 2, stay.

    4 standard errors each: a false alarm in 4,000.
    """
    log_density = lambda t, x, outside: jnp.where(x[0] > 0, -x[0], outside)  # noqa: E731
    x0 = jax.random.exponential(jax.random.key(0), (NUM, 1))
    outside = jnp.where(jnp.arange(NUM) % 2 == 0, -jnp.inf, jnp.nan)

    def run(key, start):
        return langevin.metropolis(key, log_density, start[:1], start[1], step_size=1.0, num_steps=8)

    x, info = many(run, 5, jnp.concatenate([x0, outside[:, None]], axis=1))
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert np.abs(z_scores(np.concatenate([x, x**2], 1)[rows], [1.0, 2.0])).max() < 4
        assert x[rows].min() > 0
        assert 0.1 < info.nonfinite[rows].mean() / 8 < 0.5


def test_a_start_outside_the_support_is_an_error_or_nan():
    log_density = lambda t, x, args: jnp.sum(jnp.log(x))  # noqa: E731
    options = {"step_size": 0.1, "num_steps": 4, "thin": 2}
    with pytest.raises(ValueError, match=r"x0 is where the log-density is nan.*start inside the support"):
        langevin.metropolis(jax.random.key(0), log_density, -jnp.ones(1), **options)
    run = jax.jit(lambda key, x: langevin.metropolis(key, log_density, x, **options))
    x, info = run(jax.random.key(0), -jnp.ones(1))
    assert np.isnan(x).all()
    assert np.isnan(info.states).all()
    assert info.nonfinite == 4
    x, info = run(jax.random.key(0), jnp.ones(1))
    assert np.isfinite(x).all()
    assert np.isfinite(info.states).all()


def test_annealed_has_the_variance_of_its_recursion_and_denoising_shrinks_it():
    """On N(m, C), rotated, every step is linear: the exact variance in each eigendirection by iteration of one number.

    With c an eigenvalue of C the step at sigma multiplies by 1 - alpha / (2 (c + sigma^2)) and adds alpha to the
    variance; the last step multiplies x - m by c / (c + sigma_L^2). Mean and three products of 20,000 chains, before
    and after denoising, each within 4 standard errors (a false alarm in 1,500); the two differ by far more.
    """
    spectrum, turn, mean = np.array([0.02, 0.5]), rotation(2, 7), np.array([0.7, -0.4])
    density = densities.gaussian(jnp.asarray(mean), jnp.asarray(turn @ np.diag(spectrum) @ turn.T))
    sigma_max, sigmas = 2.0, np.array([2.0, 0.9, 0.3])
    field = densities.score(density, schedules.edm(sigma_max))
    score = lambda sigma, x, args: field(sigma / sigma_max, x, args)  # noqa: E731
    step_size, num_steps = 0.05, 12
    offset, variance = -turn.T @ mean, np.full(2, 4.0)
    for sigma in sigmas:
        alpha = step_size * (sigma / sigmas[-1]) ** 2
        for _ in range(num_steps):
            factor = 1 - alpha / (2 * (spectrum + sigma**2))
            offset, variance = factor * offset, factor**2 * variance + alpha
    shrink = spectrum / (spectrum + sigmas[-1] ** 2)

    def run(key, x):
        one = lambda denoise: langevin.annealed(  # noqa: E731
            key, score, jnp.asarray(sigmas), x, step_size=step_size, num_steps=num_steps, denoise=denoise, thin=18
        )
        return one(False), one(True)[0]

    x0 = 2.0 * jax.random.normal(jax.random.key(0), (NUM, 2))
    (noisy, states), clean = many(run, 1, x0)
    assert states.shape == (NUM, 2, 2)
    assert np.array_equal(states[:, 1], noisy)
    for x, factor in ((noisy, 1.0), (clean, shrink)):
        r = (x - mean) @ turn
        products = np.stack([r[:, 0], r[:, 1], r[:, 0] ** 2, r[:, 0] * r[:, 1], r[:, 1] ** 2], 1)
        mu, v = factor * offset, factor**2 * variance
        assert np.abs(z_scores(products, [*mu, v[0] + mu[0] ** 2, mu[0] * mu[1], v[1] + mu[1] ** 2])).max() < 4
    assert np.all(clean.var(0) < 0.9 * noisy.var(0))


@pytest.mark.slow
def test_effective_sample_size_of_autoregressions():
    """x_n = phi x_(n-1) + sqrt(1 - phi^2) eps has tau = (1 + phi) / (1 - phi); draws taken three times in a row have 3.

    Of 32 chains of 20,001 states, each alone (their mean) and all together, within 4 per cent, 8 for phi = 0.9. The
    relative variance of a sum over k lags is about (4 k + 2) / n (Madras & Sokal 1988): k = 40 gives 1.6 per cent.
    """
    phi = jnp.asarray([-0.4, 0.0, 0.5, 0.9])

    @jax.jit
    def found(key):
        eps = jax.random.normal(key, (20_001, 32, 4))

        def step(x, e):
            x = phi[None] * x + jnp.sqrt(1 - phi**2)[None] * e
            return x, x

        states = jnp.swapaxes(jax.lax.scan(step, eps[0], eps)[1], 0, 1)
        thrice = 1e6 * jnp.repeat(jnp.swapaxes(eps[:6667, :, :1], 0, 1), 3, axis=1)
        states = jnp.concatenate([states, thrice], axis=2)
        each = jax.vmap(langevin.effective_sample_size)(states)
        return jnp.mean(each, axis=0) / 20_001, langevin.effective_sample_size(states, chains=True) / (32 * 20_001)

    each, together = found(jax.random.key(0))
    exact = np.append((1 - phi) / (1 + phi), 1 / 3)
    for ratio in (each / exact, together / exact):
        assert np.all(np.abs(ratio - 1) < [0.04, 0.04, 0.04, 0.08, 0.04]), ratio


def test_effective_sample_size_sees_chains_that_disagree_and_states_that_do_not_move():
    find = jax.jit(langevin.effective_sample_size, static_argnames="chains")
    draws = np.random.default_rng(0).normal(size=(4, 1000))
    apart = draws + np.array([0.0, 0.0, 0.0, 8.0])[:, None]
    agree, disagree = find(jnp.asarray(np.stack([draws, apart], 2)), chains=True)
    assert agree > 3000
    assert disagree < 20
    stuck = np.stack([draws[0], np.full(1000, 0.1), np.where(np.arange(1000) == 7, np.nan, draws[1])], 1)
    found = find(jnp.asarray(stuck, jnp.float32))
    assert found.dtype == jnp.float32
    assert found[0] > 800
    assert np.isnan(found[1])
    assert np.isnan(found[2])


@pytest.mark.slow
def test_float32_stays_float32():
    """All three chains and the diagnostics; MALA's first two moments of N(1, 1) within 4 standard errors, a
    false alarm in 7,900."""
    x0 = 1 + jax.random.normal(jax.random.key(0), (4000, 1), jnp.float32)
    log_density = lambda t, x, args: -0.5 * jnp.sum((x - args) ** 2)  # noqa: E731
    score = lambda t, x, args: args - x  # noqa: E731
    levels = jnp.asarray([3.0, 1.0], jnp.float32)

    def run(key, x):
        args = jnp.ones((), jnp.float32)
        adjusted = langevin.metropolis(key, log_density, x, args, step_size=1.0, num_steps=20, thin=5)
        plain = langevin.unadjusted(key, score, x, args, step_size=1.0, num_steps=3, thin=1)
        return adjusted, plain, langevin.annealed(key, score, levels, x, args, step_size=0.1, num_steps=2)

    (x, info), plain, annealed = many(run, 1, x0)
    chex.assert_type([x, info.acceptance, info.states, *plain, annealed], jnp.float32)
    assert np.abs(z_scores(np.concatenate([x, (x - 1) ** 2], 1), 1.0)).max() < 4


@pytest.mark.slow
def test_what_a_tracer_hid_gives_no_number():
    """Step sizes that are not positive, and levels that do not fall, known only when the program runs: NaN."""
    bad = [jnp.nan, -1.0, 0.0, jnp.inf]
    for chain in (plain, lambda **changes: adjusted(**changes)[0], ladder):
        found = jax.jit(jax.vmap(lambda eta, chain=chain: chain(step_size=eta)))(jnp.asarray([*bad, 0.1]))
        assert np.isnan(found[:-1]).all()
        np.testing.assert_allclose(found[-1], chain(), rtol=1e-12)
    each = jnp.asarray([[0.1, -0.1], [0.1, 0.1]])
    x = jax.jit(jax.vmap(lambda eta: adjusted(step_size=eta)[0]))(each)
    assert np.isnan(x[0]).all()
    np.testing.assert_allclose(x[1], adjusted()[0], rtol=1e-12)
    x = jax.jit(jax.vmap(ladder))(jnp.asarray([[1.0, 2.0], [-1.0, -2.0], [2.0, 2.0], [2.0, 1.0]]))
    assert np.isnan(x[:3]).all()
    np.testing.assert_allclose(x[3], ladder(), rtol=1e-12)


KEY, ONE, DOWN = jax.random.key(0), jnp.ones(2), jnp.asarray([2.0, 1.0])


def plain(**changes):
    options = {"key": KEY, "score": lambda t, x, args: -x, "x0": ONE, "step_size": 0.1, "num_steps": 4, **changes}
    return langevin.unadjusted(options.pop("key"), options.pop("score"), options.pop("x0"), **options)


def adjusted(**changes):
    options = {"key": KEY, "u": lambda t, x, args: -x @ x, "x0": ONE, "step_size": 0.1, "num_steps": 4, **changes}
    return langevin.metropolis(options.pop("key"), options.pop("u"), options.pop("x0"), **options)


def ladder(sigmas=DOWN, **changes):
    options = {"step_size": 0.1, "num_steps": 4, **changes}
    return langevin.annealed(KEY, options.pop("score", lambda s, x, args: -x), sigmas, ONE, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plain(step_size=0.0), ValueError, "step_size must be positive and finite, got 0.0"),
        (lambda: adjusted(step_size=-1.0), ValueError, "step_size must be positive and finite, got -1.0"),
        (lambda: adjusted(step_size=float("inf")), ValueError, "step_size must be positive and finite, got inf"),
        (lambda: plain(step_size=float("nan")), ValueError, "step_size must be positive and finite, got nan"),
        (lambda: plain(step_size=jnp.ones(3)), ValueError, r"each coordinate of x, \(2,\), got shape \(3,\)"),
        (lambda: ladder(step_size=ONE), ValueError, r"step_size must be one number, got shape \(2,\)"),
        (lambda: ladder(step_size=4.0), ValueError, r"step_size must be less than 4 sigma_L\^2 = 4, got 4"),
        (lambda: plain(num_steps=0), ValueError, "num_steps must be a positive integer, got 0"),
        (lambda: adjusted(num_steps=2.0), ValueError, "num_steps must be a positive integer, got 2.0"),
        (lambda: ladder(num_steps=0), ValueError, "num_steps must be a positive integer, got 0"),
        (lambda: plain(thin=3), ValueError, "thin must divide the number of steps, 4, got 3: with 3 steps"),
        (lambda: adjusted(thin=5), ValueError, "thin must divide the number of steps, 4, got 5: with 5 steps"),
        (lambda: adjusted(thin=0), ValueError, "thin must be a positive integer, got 0"),
        (lambda: ladder(thin=3), ValueError, "thin must divide the number of steps, 8, got 3"),
        (lambda: ladder(DOWN[::-1]), ValueError, r"sigmas must fall .* got \[1.0, 2.0\].*ncsn.levels"),
        (lambda: ladder(jnp.asarray([1.0, 1.0])), ValueError, "sigmas must fall"),
        (lambda: ladder(jnp.asarray([1.0, -1.0])), ValueError, "sigmas must be positive and finite"),
        (lambda: ladder(jnp.ones(())), ValueError, r"sigmas must have shape \[L\]"),
        (lambda: ladder(jnp.asarray([2, 1])), TypeError, "sigmas must be an array of floats"),
        (lambda: plain(key=jax.random.PRNGKey(0)), TypeError, "key must be a typed key"),
        (lambda: plain(x0=jnp.asarray([1, 2])), TypeError, "x0 must be an array of floats"),
        (lambda: plain(t=ONE), ValueError, "t must be one time"),
        (
            lambda: plain(score=lambda t, x, args: x[None]),
            ValueError,
            r"score returned shape \(1, 2\): .*example, \(2,\)",
        ),
        (lambda: plain(score=lambda t, x, args: x.astype(jnp.float32)), TypeError, "score returned dtype float32"),
        (
            lambda: plain(score=lambda t, x, args: (x, x)),
            TypeError,
            r"score returned a tuple, expected an array of shape",
        ),
        (lambda: adjusted(u=lambda t, x, args: 0.0), TypeError, "log_density returned a float"),
        (lambda: adjusted(u=lambda t, x, args: x), ValueError, r"log_density returned shape \(2,\): .*one number"),
        (lambda: ladder(score=lambda s, x, args: s), ValueError, "score returned shape"),
        (
            lambda: langevin.effective_sample_size(jnp.ones(3)),
            ValueError,
            r"shape \[num, \*event\] with num at least 4",
        ),
        (lambda: langevin.effective_sample_size(jnp.ones(9), chains=True), ValueError, r"\[chains, num, \*event\]"),
        (lambda: langevin.effective_sample_size(jnp.arange(9)), TypeError, "states must be an array of floats"),
    ],
)
def test_bad_input_is_named_with_a_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()
