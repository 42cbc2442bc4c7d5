"""The chain against closed form: its kernels, its bound, its samples, and the path that it tends to."""

import itertools
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import rotated_mixture, rotation

from dgm_jax import ddpm, densities, parameterizations, schedules
from dgm_jax.types import Chain

CHAINS = {
    "linear": ddpm.linear(40, 0.002, 0.4),
    "cosine": ddpm.cosine(40),
    "uneven": ddpm.chain(np.random.default_rng(0).uniform(0.01, 0.6, 40)),
}
STACKED = jax.tree.map(lambda *rows: jnp.stack(rows), *CHAINS.values())
POINTS = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))


def normal_grid(num, dims):
    """Nodes [num^dims, dims] and weights of Gauss-Hermite quadrature against N(0, I): exact to degree 2 num - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    grid = jnp.asarray(list(itertools.product(nodes, repeat=dims)))
    return grid, jnp.asarray(np.prod(list(itertools.product(weights / weights.sum(), repeat=dims)), axis=-1))


def gaussian_data(isotropic=False):
    """In the plane, turned away from the axes unless isotropic."""
    q = rotation(2, 5)
    covariance = 0.4 * np.eye(2) if isotropic else q @ np.diag([0.2, 1.5]) @ q.T
    return densities.gaussian(jnp.asarray([-0.6, 0.9]), jnp.asarray(covariance))


def exact_noise(density, chain):
    return ddpm.at_steps(densities.noise(density, ddpm.as_schedule(chain)), chain)


def padded(chain, num):
    """Longer than it is, so that chains of many lengths are one compiled program; what is added is never visited."""
    return ddpm.chain(np.append(chain.betas, np.full(num - len(chain.betas), 1e-6)))


def backwards(model, chain, moments, v, first, last=0):
    """Mean and covariance of x_(last-1) by ``p_step`` of a model that is affine in x, from those of x_first."""
    with_v = lambda n, x, args: (model(n, x, args), jnp.full_like(x, v))  # noqa: E731

    def step(i, moments):
        mean, covariance = moments
        one = lambda x, z: ddpm.p_step(with_v, chain, first - i, x, z, variance="learned")  # noqa: E731
        jacobian, root = jax.jacobian(one, (0, 1))(mean, jnp.zeros_like(mean))
        return one(mean, jnp.zeros_like(mean)), jacobian @ covariance @ jacobian.T + root @ root.T

    return jax.lax.fori_loop(0, first - last + 1, step, moments)


# ------------------------------------------------------------------------------------------------- chain, posterior


def test_one_step_kernels_compose_to_the_closed_form():
    """40 steps by ``q_step``, differentiated: d x_n / d x_0 is the mean's factor, and the squares of d x_n / d eps_k
    sum to the variance. Both equal those of ``q_sample`` after every step, to 1e-12."""

    @jax.jit
    @jax.vmap
    def both(chain):
        def states(start, noises):
            step = lambda x, row: (ddpm.q_step(chain, row[0], x, row[1]),) * 2  # noqa: E731
            return jax.lax.scan(step, start, (jnp.arange(40), noises))[1]

        zero, zeros = jnp.zeros(()), jnp.zeros(40)
        scale, noise = jax.jacobian(states, (0, 1))(zero, zeros)
        at_once = lambda n: jax.grad(partial(ddpm.q_sample, chain, n), (0, 1))(zero, zero)  # noqa: E731
        return scale, jnp.sum(noise**2, axis=1), jax.vmap(at_once)(jnp.arange(40))

    scale, variance, (scale_at_once, sigma) = both(STACKED)
    np.testing.assert_allclose(scale, scale_at_once, rtol=1e-12)
    np.testing.assert_allclose(variance, sigma**2, rtol=1e-12)
    np.testing.assert_allclose(scale**2, STACKED.alpha_bars, rtol=1e-12)
    np.testing.assert_allclose(scale**2 + variance, 1.0, rtol=1e-12)  # N(0, I) stays what it is
    assert np.all(np.asarray(scale[:, -1]) < 0.1)  # and the data is forgotten


def test_posterior_is_bayes_rule():
    """Gaussian conditioning of the joint law of (x_(n-1), x_n) given the data, a 2 x 2 covariance."""
    x_n, x0 = np.asarray(POINTS[0]), np.asarray(POINTS[1])
    rows = jax.jit(jax.vmap(jax.vmap(lambda c, n: ddpm.posterior(c, n, POINTS[0], POINTS[1]), (None, 0)), (0, None)))
    means, variances = rows(STACKED, jnp.arange(40))
    for i, chain in enumerate(CHAINS.values()):
        betas = np.asarray(chain.betas)
        kept = np.cumprod(1 - betas)
        for n in (1, 7, 39):
            cross = math.sqrt(1 - betas[n]) * (1 - kept[n - 1])
            joint = np.array([[1 - kept[n - 1], cross], [cross, 1 - kept[n]]])
            mean = math.sqrt(kept[n - 1]) * x0 + cross / joint[1, 1] * (x_n - math.sqrt(kept[n]) * x0)
            np.testing.assert_allclose(means[i, n], mean, rtol=1e-12)
            np.testing.assert_allclose(variances[i, n], np.linalg.det(joint) / joint[1, 1], rtol=1e-11)
        np.testing.assert_allclose(means[i, 0], x0, rtol=1e-12)
        assert variances[i, 0] == 0


def test_chains_are_those_of_the_papers():
    chain = ddpm.linear(1000)
    np.testing.assert_allclose(chain.betas[jnp.asarray([0, 500, 999])], [1e-4, 1e-4 + 0.0199 * 500 / 999, 0.02])
    assert 4.0e-5 < chain.alpha_bars[-1] < 4.1e-5
    np.testing.assert_allclose(chain.alpha_bars[-1], math.prod(1 - b for b in np.asarray(chain.betas)), rtol=1e-12)

    chain = ddpm.cosine(1000)
    f = lambda t: math.cos(math.pi / 2 * (t + 0.008) / 1.008) ** 2  # noqa: E731
    at = jnp.asarray([0, 499, 998])
    np.testing.assert_allclose(chain.alpha_bars[at], [f(t) / f(0) for t in (0.001, 0.5, 0.999)], rtol=1e-9)
    assert chain.betas[-1] == 0.999
    np.testing.assert_allclose(chain.alpha_bars[-1], 0.001 * chain.alpha_bars[-2], rtol=1e-12)

    for path in (schedules.vp(), schedules.cosine()):
        chain = ddpm.discretize(path, 50)
        ends = jnp.arange(1, 50) / 50
        np.testing.assert_allclose(chain.alpha_bars[:-1], jnp.exp(2 * path.log_alpha(ends)), rtol=1e-12)
    np.testing.assert_allclose(chain.betas[-1], 0.999)  # cosine(): alpha(1) = 0


@pytest.mark.slow
def test_a_chain_is_a_path_and_the_path_a_chain():
    """Its schedule passes through it: so a field of continuous time becomes a model of its steps."""
    chain, x = CHAINS["uneven"], jnp.asarray([0.3, -0.8])
    path = ddpm.as_schedule(chain)
    ends = jnp.arange(1, 41) / 40
    np.testing.assert_allclose(jax.vmap(path.variance)(ends), 1 - np.cumprod(1 - np.asarray(chain.betas)), rtol=1e-12)
    np.testing.assert_allclose(ddpm.discretize(path, 40).betas, chain.betas, rtol=1e-11)

    density = rotated_mixture(2)
    diffused = densities.Mixture(  # of x_7, written out
        density.weights,
        jnp.sqrt(chain.alpha_bars[7]) * density.means,
        chain.alpha_bars[7] * density.covariances + (1 - chain.alpha_bars[7]) * jnp.eye(2)[None],
    )
    v = densities.velocity(density, path)  # any other field of the path serves as well
    converted = ddpm.at_steps(parameterizations.convert(v, path, source="velocity", target="noise"), chain)

    @jax.jit
    def both(n, x):
        noise = exact_noise(density, chain)
        truth = jax.grad(lambda x: densities.log_prob(diffused, x))(x)
        return ddpm.score(noise, chain)(n, x), truth, noise(n, x), converted(n, x)

    score, truth, noise, other = both(7, x)
    np.testing.assert_allclose(score, truth, rtol=1e-11)
    np.testing.assert_allclose(noise, other, rtol=1e-9)


# ------------------------------------------------------------------------------------------------- objective, bound


def wrong_noise(n, x, args):
    """Some model, bent and without symmetry, with a v beside it."""
    return jnp.sin(x[::-1] + 0.1 * n.astype(x.dtype)) + 0.3 * x**2, 0.5 + 0.7 * jnp.tanh(x)


@pytest.mark.parametrize("variance", ["beta", "posterior", "learned"])
def test_terms_are_divergences_and_their_coefficient_is_that_of_the_course(variance):
    """KL(q || p) = E_q[log q - log p], by quadrature over x_(n-1), p drawn from by ``p_step``: for every n > 0.

    With the posterior variance it is (1 - alpha_n)^2 / (2 posterior_n alpha_n) |s - grad log q|^2 and nothing else.
    """
    chain, (x0, noise) = CHAINS["linear"], POINTS[:2, :2]
    nodes, mass = normal_grid(3, 2)
    model = wrong_noise if variance == "learned" else lambda n, x, args: wrong_noise(n, x, args)[0]

    @jax.jit
    @jax.vmap
    def both(n):
        x = ddpm.q_sample(chain, n, x0, noise)
        mean_q, variance_q = ddpm.posterior(chain, n, x, x0)
        step = lambda z: ddpm.p_step(model, chain, n, x, z, variance=variance)  # noqa: E731
        mean_p, std_p = step(jnp.zeros(2)), jnp.diagonal(jax.jacobian(step)(jnp.zeros(2)))
        log_normal = lambda x, mean, std: jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, std))  # noqa: E731

        def log_ratio(z):
            x = mean_q + jnp.sqrt(variance_q) * z
            return log_normal(x, mean_q, jnp.sqrt(variance_q)) - log_normal(x, mean_p, std_p)

        s = ddpm.score(lambda n, x, args: wrong_noise(n, x, args)[0], chain)(n, x)
        s_true = -noise / jnp.sqrt(1 - chain.alpha_bars[n])
        alpha = 1 - chain.betas[n]
        course = (1 - alpha) ** 2 / (2 * variance_q * alpha) * jnp.sum((s - s_true) ** 2)
        return mass @ jax.vmap(log_ratio)(nodes), ddpm.bound_term(model, chain, n, x0, noise, variance=variance), course

    divergence, term, course = both(jnp.arange(1, 40))
    np.testing.assert_allclose(term, divergence, rtol=1e-9, atol=1e-11)
    if variance == "posterior":
        np.testing.assert_allclose(term, course, rtol=1e-9)
    else:
        assert np.max(np.abs(term - course)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_the_weighted_loss_is_the_bound_but_for_a_constant(variance):
    """Over two models the difference of ``bound_term`` is that of the loss with ``weights``, at every step; and the
    loss of the score with its weights is the same loss."""
    chain, (x0, noise) = CHAINS["cosine"], POINTS[2:, :2]
    weight, of_score = (ddpm.weights(chain, variance=variance, of=of) for of in ("noise", "score"))
    first = lambda n, x, args: wrong_noise(n, x, args)[0]  # noqa: E731
    zero = lambda n, x, args: jnp.zeros_like(x)  # noqa: E731

    def losses(model, n):
        term = ddpm.bound_term(model, chain, n, x0, noise, variance=variance)
        by_noise = ddpm.loss(model, chain, n, x0, noise, weight=weight)
        x = ddpm.q_sample(chain, n, x0, noise)
        gap = ddpm.score(model, chain)(n, x) + noise / jnp.sqrt(1 - chain.alpha_bars[n])
        return term, by_noise, of_score[n] * jnp.sum(gap**2)

    ns = jnp.arange(40)
    one, other = jax.jit(jax.vmap(lambda n: (losses(first, n), losses(zero, n))))(ns)
    np.testing.assert_allclose(one[1] - other[1], one[0] - other[0], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(one[2], one[1], rtol=1e-10)
    simple = ddpm.loss(first, chain, 11, x0, noise)
    np.testing.assert_allclose(simple * weight[11], one[1][11], rtol=1e-12)


def test_loss_by_hand_and_zero_where_the_noise_is_known():
    chain = ddpm.chain([0.36, 0.75])  # abar = 0.64, 0.16
    x0, noise = jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 1.0])
    assert ddpm.loss(lambda n, x, args: noise, chain, 1, x0, noise) == 0
    value = ddpm.loss(lambda n, x, args: args * x, chain, 0, x0, noise, 2.0)  # x = 0.8 x0 + 0.6 eps = 1.1, -1.0
    np.testing.assert_allclose(value, (0.5 - 2.2) ** 2 + (1.0 + 2.0) ** 2, rtol=1e-13)
    np.testing.assert_allclose(ddpm.weights(chain)[1], 0.75**2 / (2 * (0.75 * 0.36 / 0.84) * 0.25 * 0.84), rtol=1e-13)


def test_the_loss_has_zero_gradient_at_the_true_noise():
    """The expectation over the data and the noise, by quadrature, as a function of a change of the true model."""
    chain, density = CHAINS["linear"], rotated_mixture(2)
    true = exact_noise(density, chain)
    nodes, mass = normal_grid(14, 4)
    roots = jnp.linalg.cholesky(density.covariances)

    def model(n, x, args):
        bent = jnp.stack([jnp.sin(x[0]) + x[1], x[0] * x[1]])
        return true(n, x) + args["shift"] + args["matrix"] @ x + args["bend"] * bent

    @jax.jit
    @jax.grad
    def gradient(params):
        def of_component(mean, root):
            x0 = mean[None] + nodes[:, :2] @ root.T
            return mass @ jax.vmap(lambda x, e: ddpm.loss(model, chain, 12, x, e, params))(x0, nodes[:, 2:])

        return density.weights @ jax.vmap(of_component)(density.means, roots)

    at_zero = {"shift": jnp.zeros(2), "matrix": jnp.zeros((2, 2)), "bend": jnp.zeros(())}
    assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradient(at_zero))) < 1e-6
    assert float(gradient({**at_zero, "bend": jnp.asarray(0.1)})["bend"]) > 0.01


def optimal_v(chain, spread):
    """For data of covariance ``spread`` I: the v with which beta^v posterior^(1 - v) is the variance of x_(n-1) given
    x_n, that of the posterior and what x_n leaves unknown of the data. ``[T]``"""
    betas = np.asarray(chain.betas)
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    posterior = betas * (1 - before) / (1 - kept)
    unknown = spread * (1 - kept) / (kept * spread + 1 - kept)
    optimal = posterior + before * (betas / (1 - kept)) ** 2 * unknown
    lower = np.log(np.append(posterior[1], posterior[1:]))
    return jnp.asarray((np.log(optimal) - lower) / (np.log(betas) - lower))


@pytest.mark.parametrize("name", CHAINS)
def test_the_bound_is_tight_where_the_reverse_process_is_exact(name):
    """Isotropic Gaussian data, exact noise, exact variances as "learned": the mean of the sum of all terms is the
    entropy of the data and KL(q(x_(T-1)) || N(0, I)), to 1e-10. All terms are quadratic, and so is the quadrature."""
    chain, density = CHAINS[name], gaussian_data(isotropic=True)
    noise, v = exact_noise(density, chain), optimal_v(chain, 0.4)
    model = lambda n, x, args: (noise(n, x), jnp.full_like(x, v[n]))  # noqa: E731
    nodes, mass = normal_grid(3, 4)
    x0 = density.means[0][None] + math.sqrt(0.4) * nodes[:, :2]

    @jax.jit
    def terms(n):
        each = lambda x, e: ddpm.bound_term(model, chain, n, x, e, variance="learned")  # noqa: E731
        return mass @ jax.vmap(each)(x0, nodes[:, 2:])

    total = jnp.sum(jax.lax.map(terms, jnp.arange(40))) + mass @ jax.vmap(partial(ddpm.prior_term, chain))(x0)
    entropy = math.log(2 * math.pi * math.e * 0.4)
    kept = float(chain.alpha_bars[-1])
    variance = kept * 0.4 + 1 - kept
    mean_squared = kept * float(jnp.sum(density.means**2))
    prior = variance - 1 - math.log(variance) + 0.5 * mean_squared
    np.testing.assert_allclose(total, entropy + prior, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_the_bound_lies_below_the_density_of_the_model_and_closes_as_the_chain_grows():
    """Rotated Gaussian data with the exact noise: the model is Gaussian, and its log-density known.

    At every point the bound is below it. Its distance to the density of the data, on average, falls in proportion to
    1 / T for s^2 = beta: the ratios of T = 30, 60, 120, 240 tend to 2. With the posterior variance the first few steps
    leave a distance that stays: v = 0 and 1 are "posterior" and "beta".
    """
    density = gaussian_data()
    nodes, mass = normal_grid(3, 2)
    points = density.means[0][None] + nodes @ jnp.linalg.cholesky(density.covariances[0]).T

    @jax.jit
    def bounds(chain, num, v):
        noise = exact_noise(density, chain)
        model = lambda n, x, args: (noise(n, x, args), jnp.full_like(x, v))  # noqa: E731
        one = lambda n, x, e: ddpm.bound_term(model, chain, n, x, e, variance="learned")  # noqa: E731
        term = lambda n: jax.vmap(lambda x: mass @ jax.vmap(partial(one, n, x))(nodes))(points)  # noqa: E731
        total = jax.lax.fori_loop(0, num, lambda n, total: total + term(n), jnp.zeros(len(points)))
        return -total, backwards(noise, chain, (jnp.zeros(2), jnp.eye(2)), v, num - 1)

    log_probs = jax.jit(lambda density: jax.vmap(partial(densities.log_prob, density))(points))
    gaps = {0.0: [], 1.0: []}
    for num in (30, 60, 120, 240):
        chain = ddpm.linear(num, 0.1 / num, 20 / num)
        prior = jax.vmap(partial(ddpm.prior_term, chain))(points)
        for v, values in gaps.items():
            lower, (mean, covariance) = bounds(padded(chain, 240), num, v)
            decoder = chain.betas[0] if v else ddpm.posterior(chain, 1, nodes[0], nodes[0])[1]
            own = densities.gaussian(mean, covariance + decoder * jnp.eye(2))
            assert np.all(np.asarray(lower - prior) < log_probs(own))
            truth = log_probs(density)
            values.append(float(mass @ (truth - lower + prior)))
    ratios = np.asarray(gaps[1.0][:-1]) / gaps[1.0][1:]
    assert np.all(np.abs(ratios[-2:] - 2) < 0.25), gaps
    assert gaps[0.0][-1] > 0.1, gaps


@pytest.mark.slow
def test_the_estimated_bound_is_the_exact_one_within_its_error():
    """2,000 draws a step. 13 comparisons at 4.5 standard errors: one false alarm in 11,000, and keys are fixed."""
    chain, density = ddpm.linear(12, 0.01, 0.6), gaussian_data()
    x0, model = density.means[0] + 0.5, lambda n, x, args: wrong_noise(n, args * x, None)[0]
    found = jax.jit(lambda key, x, args: ddpm.bound(key, model, chain, x, args, num_draws=2000))(
        jax.random.key(2), x0, jnp.asarray(0.7)
    )
    nodes, mass = normal_grid(12, 2)
    each = lambda n, e: ddpm.bound_term(model, chain, n, x0, e, jnp.asarray(0.7))  # noqa: E731
    terms = jax.jit(jax.vmap(lambda n: mass @ jax.vmap(partial(each, n))(nodes)))(jnp.arange(12))
    exact = np.append(terms, ddpm.prior_term(chain, x0))
    assert found.terms.shape == (13,)
    assert found.terms_stderr[-1] == 0
    assert np.all(np.abs(found.terms - exact)[:-1] < 4.5 * found.terms_stderr[:-1])
    assert abs(float(found.log_prob) + exact.sum()) < 4.5 * float(found.stderr)
    np.testing.assert_allclose(found.stderr, np.linalg.norm(found.terms_stderr), rtol=1e-12)
    np.testing.assert_allclose(found.log_prob, -jnp.sum(found.terms), rtol=1e-12)


@pytest.mark.slow
def test_data_outside_the_bins_have_no_probability_to_report():
    """L_0 with bins is NaN for x0 beyond them, at either end, and a number at the ends themselves and for n > 0."""
    chain, at = ddpm.linear(20, 0.01, 0.5), jnp.asarray([-200.0, -1.01, -1.0, 0.3, 1.0, 1.01])
    term = lambda n, x: ddpm.bound_term(lambda n, x, args: x, chain, n, x[None], jnp.ones(1), bins=(256, -1.0, 1.0))  # noqa: E731
    found = jax.jit(jax.vmap(jax.vmap(term, (None, 0)), (0, None)))(jnp.arange(2), at)
    np.testing.assert_array_equal(np.isnan(found[0]), [True, True, False, False, False, True])
    assert np.isfinite(found[1]).all()


@pytest.mark.slow
def test_a_first_step_that_is_tiny_keeps_its_digits_in_float32():
    """Weights and a term of the bound of a chain whose first step is 1e-9 of the second: as in float64, to 1e-5."""
    betas, x, noise = [1e-9, 0.5, 0.5], jnp.asarray([0.3]), jnp.asarray([1.2])

    def both(dtype):
        chain = ddpm.chain(betas, dtype=dtype)
        term = ddpm.bound_term(lambda n, x, args: 0.5 * x, chain, 1, x.astype(dtype), noise.astype(dtype))
        return np.append(ddpm.weights(chain), term)

    np.testing.assert_allclose(both(jnp.float32), both(jnp.float64), rtol=1e-5)


@pytest.mark.slow
def test_the_decoder_with_levels_is_a_distribution_and_the_bound_holds():
    """In one dimension, data at the middles of 5 bins. Masses sum to one for any x_0, also far outside; and for a model
    that is affine, the mass of every level, by a fine quadrature over the Gaussian x_0, is above the bound."""
    bins, levels = (5, -1.0, 1.0), jnp.linspace(-0.8, 0.8, 5)
    chain = ddpm.linear(12, 0.05, 0.6)
    model = lambda n, x, args: 0.8 * x + 0.1  # noqa: E731

    def decoder(x, level):  # noise such that x_0 = x whatever the level
        noise = (x - jnp.sqrt(chain.alpha_bars[0]) * level) / jnp.sqrt(1 - chain.alpha_bars[0])
        return -ddpm.bound_term(model, chain, 0, level[None], noise[None], variance="beta", bins=bins)

    xs = jnp.asarray([-300.0, -3.0, -0.4, 0.0, 0.11, 1.0, 20.0])
    masses = jax.jit(jax.vmap(jax.vmap(decoder, (None, 0)), (0, None)))
    np.testing.assert_allclose(jnp.sum(jnp.exp(masses(xs, levels)), axis=1), 1.0, rtol=1e-12)
    assert np.all(np.isfinite(masses(xs, levels)))

    mean, covariance = backwards(model, chain, (jnp.zeros(1), jnp.eye(1)), 1.0, 11, 1)  # of x_0, before the decoder
    fine = jnp.linspace(-8.0, 8.0, 4001)
    weight = jax.scipy.stats.norm.pdf(fine) * (fine[1] - fine[0])
    exact = jnp.log(weight @ jnp.exp(masses(mean[0] + jnp.sqrt(covariance[0, 0]) * fine, levels)))
    nodes, mass = normal_grid(30, 1)
    each = lambda n, x, e: ddpm.bound_term(model, chain, n, x[None], e, variance="beta", bins=bins)  # noqa: E731
    term = lambda n, x: mass @ jax.vmap(partial(each, n, x))(nodes)  # noqa: E731
    total = jax.jit(jax.vmap(lambda x: jnp.sum(jax.vmap(lambda n: term(n, x))(jnp.arange(12)))))(levels)
    lower = -total - jax.vmap(lambda x: ddpm.prior_term(chain, x[None]))(levels)
    np.testing.assert_allclose(jnp.sum(jnp.exp(exact)), 1.0, rtol=1e-9)
    assert np.all(np.asarray(lower) < exact)


def test_hybrid_loss_trains_the_mean_by_the_simple_loss_and_the_variance_by_the_bound():
    """Two gradients by finite differences of the two losses that they come from; and none is NaN with bins."""
    chain, (x0, noise) = CHAINS["linear"], jnp.asarray([[-0.8, 0.4], [0.9, -1.1]])
    model = lambda n, x, p: tuple(o * s for o, s in zip(wrong_noise(n, x, None), p, strict=True))  # noqa: E731
    at = (jnp.asarray(1.2), jnp.asarray(0.8))

    @jax.jit
    def gradients(n):
        hybrid = jax.grad(lambda p: ddpm.hybrid_loss(model, chain, n, x0, noise, p, bins=(5, -1.0, 1.0)))(at)
        simple = lambda a: ddpm.loss(lambda n, x, p: model(n, x, (a, p))[0], chain, n, x0, noise, at[1])  # noqa: E731
        term = lambda b: ddpm.bound_term(  # noqa: E731
            model, chain, n, x0, noise, (at[0], b), variance="learned", bins=(5, -1.0, 1.0)
        )
        h = 1e-5
        return hybrid, [(f(p + h) - f(p - h)) / (2 * h) for f, p in zip((simple, term), at, strict=True)]

    for n in (0, 1, 39):
        hybrid, (of_simple, of_term) = gradients(n)
        np.testing.assert_allclose(hybrid[0], of_simple, rtol=1e-7)
        np.testing.assert_allclose(hybrid[1], 1e-3 * 40 * of_term, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- sampling


def test_ancestral_is_the_step_of_the_course_in_noise_and_in_score():
    """x / sqrt(1 - beta) + beta / sqrt(1 - beta) grad log p_n(x) + sigma z, with the score of the mixture by autodiff
    of its log-density, and z from ``fold_in``: the whole path."""
    chain, density, key = ddpm.linear(6, 0.05, 0.6), rotated_mixture(2), jax.random.key(3)
    x = jnp.asarray([1.1, -0.7])
    noise = exact_noise(density, chain)

    @jax.jit
    def score_at(kept, x):
        eye = jnp.eye(2)[None]
        diffused = density._replace(
            means=jnp.sqrt(kept) * density.means, covariances=kept * density.covariances + (1 - kept) * eye
        )
        return jax.grad(lambda x: densities.log_prob(diffused, x))(x)

    names = ("beta", "posterior")
    paths = jax.jit(lambda x: [ddpm.ancestral(key, noise, chain, x, variance=v, path=True) for v in names])(x)
    for variance, path in zip(names, paths, strict=True):
        assert path.shape == (7, 2)
        np.testing.assert_array_equal(path[0], x)
        for i, n in enumerate(range(5, -1, -1)):
            kept, beta = chain.alpha_bars[n], chain.betas[n]
            score = score_at(kept, path[i])
            before = chain.alpha_bars[n - 1] if n else 1.0
            sigma = jnp.sqrt(beta if variance == "beta" else beta * (1 - before) / (1 - kept)) if n else 0.0
            z = jax.random.normal(jax.random.fold_in(key, n), (2,))
            step = path[i] / jnp.sqrt(1 - beta) + beta / jnp.sqrt(1 - beta) * score + sigma * z
            np.testing.assert_allclose(path[i + 1], step, rtol=1e-10)


def test_clipping_acts_on_the_data_that_the_noise_implies():
    """A range that nothing reaches changes nothing; a narrow one holds the sample, which is that data itself."""
    chain, density, key = ddpm.linear(6, 0.05, 0.6), rotated_mixture(2), jax.random.key(4)
    noise = exact_noise(density, chain)
    ranges = (None, (-1e6, 1e6), (-0.3, 0.2))
    draw = jax.jit(lambda x: [ddpm.ancestral(key, noise, chain, x, clip=clip) for clip in ranges])
    free, wide, narrow = draw(jnp.asarray([1.1, -0.7]))
    np.testing.assert_allclose(wide, free, rtol=1e-9)
    assert np.max(np.abs(free)) > 0.5
    assert np.all((np.asarray(narrow) >= -0.3 - 1e-12) & (np.asarray(narrow) <= 0.2 + 1e-12))


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_samples_with_the_exact_noise_have_the_moments_and_proportions_of_the_mixture(variance):
    """20,000 samples in 400 steps from N(0, I): mean, covariance, and the share of each component, soft, so that its
    mean is the weight. The chain's own bias falls as 1 / T and is at most one standard error here (seen with 100,000
    samples at T = 50, 100, 200); 5 standard errors for all leave 4 to chance, one false alarm in 16,000 for each of 8.
    """
    num, density = 20_000, rotated_mixture(2)
    chain = ddpm.linear(400, 0.1 / 400, 20 / 400)
    model = exact_noise(density, chain)
    draw = jax.jit(jax.vmap(lambda key, x: ddpm.ancestral(key, model, chain, x, variance=variance)))
    x = draw(jax.random.split(jax.random.key(5), num), jax.random.normal(jax.random.key(6), (num, 2)))
    shares = jax.vmap(lambda x: jax.nn.softmax(jnp.log(density.weights) + component_log_probs(density, x)))(x)

    centred = np.asarray(x - densities.mean(density)[None])
    products = (centred[:, :, None] * centred[:, None, :]).reshape(num, 4)[:, [0, 1, 3]]
    values = np.concatenate([centred, products, np.asarray(shares)], axis=1)
    exact = np.concatenate([[0, 0], densities.covariance(density).reshape(4)[jnp.asarray([0, 1, 3])], density.weights])
    z = (values.mean(0) - exact) / (values.std(0) / math.sqrt(num))
    assert np.all(np.abs(z) < 5), z


def component_log_probs(density, x):
    """log N(x; mean_k, covariance_k) for each k."""
    return jax.vmap(lambda m, c: jax.scipy.stats.multivariate_normal.logpdf(x, m, c))(
        density.means, density.covariances
    )


@pytest.mark.slow
def test_the_chain_tends_to_the_vp_path_with_order_one():
    """betas_n = beta(t_n) / T for T = 100 .. 800. Errors fall in proportion to 1 / T, fitted orders within 0.1 of 1:
    of abar_n from the VP path's alpha^2; and of mean and covariance of ancestral samples of rotated Gaussian data,
    which are those of the data for the exact reverse SDE, started like it from the exact last marginal."""
    vp, density = schedules.vp(), gaussian_data()
    last = densities.diffuse(density, vp, jnp.asarray(1.0))
    noise = densities.noise(density, vp)  # of the path, as a model trained on the SDE has it

    @jax.jit
    @partial(jax.vmap, in_axes=(None, None, 0))
    def sampled(chain, num, v):
        model = lambda n, x, args: noise((n + 1).astype(x.dtype) / num.astype(x.dtype), x)  # noqa: E731
        return backwards(model, chain, (last.means[0], last.covariances[0]), v, num - 1)

    nums = [100, 200, 400, 800]
    errors = {"alpha_bar": [], "mean": [], "posterior": [], "beta": []}
    for num in nums:
        chain = ddpm.linear(num, 0.1 / num, 20.0 / num)
        exact = jnp.exp(2 * vp.log_alpha(jnp.arange(1, num + 1) / num))
        errors["alpha_bar"].append(float(jnp.max(jnp.abs(chain.alpha_bars - exact))))
        means, covariances = sampled(padded(chain, 800), jnp.asarray(num), jnp.asarray([0.0, 1.0]))
        errors["mean"].append(float(jnp.max(jnp.abs(means[0] - density.means[0]))))
        for name, covariance in zip(("posterior", "beta"), covariances, strict=True):
            errors[name].append(float(jnp.max(jnp.abs(covariance - density.covariances[0]))))
    for name, values in errors.items():
        order = -np.polyfit(np.log(nums), np.log(values), 1)[0]
        assert abs(order - 1) < 0.1, (name, order, values)


# ------------------------------------------------------------------------------------------------ dtypes, bad input


@pytest.mark.slow
def test_float32_keeps_its_digits_and_its_dtype():
    """Coefficients of a float32 chain of 1,000 steps to 2e-5, also where 1 - abar is 1e-4: and no float64 appears."""
    exact, chain = ddpm.linear(1000), ddpm.linear(1000, dtype=jnp.float32)
    assert chain.betas.dtype == chain.alpha_bars.dtype == jnp.float32
    x, z = jnp.asarray([0.5, -1.5]), jnp.asarray([1.0, 0.3])
    x32, z32 = x.astype(jnp.float32), z.astype(jnp.float32)
    model = lambda n, x, args: 0.1 * x + 1.0  # noqa: E731

    @jax.jit
    @partial(jax.vmap, in_axes=(None, None, None, 0))
    def values(chain, x, z, n):
        mean, variance = ddpm.posterior(chain, n, x, z)
        others = (ddpm.q_sample(chain, n, x, z), ddpm.bound_term(model, chain, n, x, z, variance="beta"))
        return mean, variance, *others, ddpm.p_step(model, chain, n, x, z), ddpm.weights(chain)[n]

    ns = jnp.asarray([0, 1, 10, 999])
    for one, other in zip(values(chain, x32, z32, ns), values(exact, x, z, ns), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    mixed = ddpm.q_sample(exact, 5, x32, z32)  # a float64 chain serves float32 data
    assert mixed.dtype == jnp.float32
    key, few = jax.random.key(0), ddpm.linear(20, 0.01, 0.5)
    both = lambda x: (ddpm.ancestral(key, model, few, x), ddpm.bound(key, model, few, x, bins=(5, -2.0, 2.0)))  # noqa: E731
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(both, x32))} == {jnp.dtype(jnp.float32)}


def test_other_betas_do_not_compile_again():
    draw = jax.jit(chex.assert_max_traces(lambda k, c, x: ddpm.ancestral(k, lambda n, x, a: x, c, x), n=1))
    for chain in (CHAINS["linear"], CHAINS["cosine"]):
        assert np.all(np.isfinite(draw(jax.random.key(0), chain, jnp.ones(2))))


def test_bad_arguments():
    x, chain, key = jnp.zeros((2, 3)), CHAINS["linear"], jax.random.key(0)
    same = lambda n, x, args: x  # noqa: E731
    for betas in ([0.1, 0.0], [0.1, 1.0], [0.1, -0.2], [0.1, math.nan]):
        with pytest.raises(ValueError, match=r"betas must be in \(0, 1\), got .* at index 1"):
            ddpm.chain(betas)
    with pytest.raises(ValueError, match=r"beta_max must be in \(0, 1\), got 1.5"):
        ddpm.linear(10, 0.1, 1.5)
    with pytest.raises(ValueError, match="num_steps must be a positive integer, got 0"):
        ddpm.cosine(0)
    with pytest.raises(ValueError, match="offset must be finite and at least 0, got -1"):
        ddpm.cosine(10, -1.0)
    with pytest.raises(ValueError, match=r"betas must have shape \[T\]"):
        ddpm.chain([[0.1]])
    with pytest.raises(TypeError, match="dtype must be of floats, got int32"):
        ddpm.chain([0.1], dtype=jnp.int32)
    with pytest.raises(ValueError, match="schedule must preserve variance"):
        ddpm.discretize(schedules.ve(), 10)
    with pytest.raises(ValueError, match=r"n must be in 0 .. 39, a step of the chain, got 40"):
        ddpm.q_sample(chain, 40, x, x)
    with pytest.raises(ValueError, match="a step of the chain, got -1"):
        ddpm.posterior(chain, -1, x, x)
    with pytest.raises(TypeError, match="n must be an integer, the number of a step, got dtype float64"):
        ddpm.loss(same, chain, jnp.asarray(1.0), x, x)
    with pytest.raises(ValueError, match=r"n must be one step of shape \(\), got shape \(2,\): use jax.vmap"):
        ddpm.q_step(chain, jnp.arange(2), x, x)
    for n in (-1, 40):  # where it cannot raise it is NaN, not the last step
        assert np.all(np.isnan(jax.jit(lambda n: ddpm.q_sample(chain, n, x, x))(n)))
        assert np.isnan(jax.jit(lambda n: ddpm.at_steps(lambda t, x, args: t, chain)(n, x))(n))
    with pytest.raises(ValueError, match=r"noise has shape \(3,\) and x0 \(2, 3\)"):
        ddpm.q_sample(chain, 0, x, x[0])
    with pytest.raises(TypeError, match="x0 has dtype float32 and x_n float64"):
        ddpm.posterior(chain, 0, x, x.astype(jnp.float32))
    with pytest.raises(TypeError, match="x must be an array of floats, got dtype int64"):
        ddpm.q_step(chain, 0, x.astype(int), x)
    with pytest.raises(ValueError, match=r"noise_model returned shape \(3,\): .*one example, \(2, 3\).*jax\.vmap"):
        ddpm.loss(lambda n, x, args: x[0], chain, 0, x, x)
    with pytest.raises(TypeError, match="noise_model returned dtype float32 for x of float64"):
        ddpm.ancestral(key, lambda n, x, args: x.astype(jnp.float32), chain, x)
    with pytest.raises(TypeError, match="key must be a typed key"):
        ddpm.ancestral(jax.random.PRNGKey(0), same, chain, x)
    with pytest.raises(TypeError, match="must return a pair"):
        ddpm.ancestral(key, same, chain, x, variance="learned")
    with pytest.raises(TypeError, match="expected the noise alone"):
        ddpm.bound(key, lambda n, x, args: (x, x), chain, x)
    with pytest.raises(ValueError, match='variance must be "beta", "posterior" or "learned", got \'small\''):
        ddpm.p_step(same, chain, 0, x, x, variance="small")
    with pytest.raises(ValueError, match="which has no weights"):
        ddpm.weights(chain, variance="learned")
    with pytest.raises(ValueError, match='of must be "noise" or "score"'):
        ddpm.weights(chain, of="x0")
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), but a chain of 40 steps"):
        ddpm.loss(same, chain, 0, x, x, weight=jnp.ones(3))
    with pytest.raises(ValueError, match="clip must be"):
        ddpm.ancestral(key, same, chain, x, clip=(1.0, -1.0))
    with pytest.raises(ValueError, match="bins must be"):
        ddpm.bound(key, same, chain, x, bins=(5, 1.0, -1.0))
    with pytest.raises(ValueError, match="num_draws must be at least 2"):
        ddpm.bound(key, same, chain, x, num_draws=1)
    with pytest.raises(ValueError, match="chain must have betas"):
        ddpm.q_step(Chain(chain.betas, chain.alpha_bars[1:]), 0, x, x)
    with pytest.raises(ValueError, match="not the product of 1 - betas"):
        ddpm.q_step(Chain(chain.betas, chain.betas), 0, x, x)
