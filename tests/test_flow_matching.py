"""Flow matching: losses by exact quadrature, oracles by their equations, couplings by brute force."""

import importlib.util
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp
from scipy.linalg import sqrtm
from targets import SCHEDULES, rotated_mixture, rotation, switched

from dgm_jax import densities, fokker_planck, schedules
from dgm_jax import flow_matching as fm

KEY = jax.random.key(0)


def needs_ott(test):
    """A test of what OTT-JAX does; it imports JAXopt, which says at once that nobody keeps it."""
    missing = pytest.mark.skipif(importlib.util.find_spec("ott") is None, reason="needs the extra ot")
    return missing(pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained")(test))


def normal_grid(num, dims):
    """Nodes [num^dims, dims] and weights of Gauss-Hermite quadrature against N(0, I)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    grid = np.stack(np.meshgrid(*[nodes] * dims, indexing="ij"), -1).reshape(-1, dims)
    weight = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * dims, indexing="ij"), -1), -1)
    return grid, weight.reshape(-1)


def by_component(density, grid, weight):
    """The same for a mixture, in the first two columns of the grid: [k * num, columns] and weights."""
    w, means, covariances = (np.asarray(leaf) for leaf in density)
    roots = np.linalg.cholesky(covariances)
    x = np.concatenate([mean + grid[:, :2] @ root.T for mean, root in zip(means, roots, strict=True)])
    rest = np.tile(grid[:, 2:], (len(w), 1))
    return np.concatenate([x, rest], axis=1), np.concatenate([one * weight for one in w])


def rough(t, x, args):
    """A polynomial model, bent and without symmetry, so that quadrature of low order is exact."""
    return args["a"] * x + args["b"] * jnp.stack([x[1] * x[0], x[0] - x[1] ** 2]) + t * args["c"]


PARAMS = [
    {"a": jnp.asarray(-0.7), "b": jnp.asarray(0.3), "c": jnp.asarray([0.2, -0.5])},
    {"a": jnp.asarray(0.4), "b": jnp.asarray(-1.1), "c": jnp.asarray([1.0, 0.1])},
]

# two mixtures in the plane, and two Gaussians, none of them along the axes
DATA = rotated_mixture(2)
SOURCE = densities.Mixture(
    jnp.asarray([0.6, 0.4]),
    jnp.asarray([[2.0, 1.0], [-1.0, 2.5]]),
    jnp.asarray([[[0.5, 0.3], [0.3, 0.6]], [[0.9, -0.4], [-0.4, 0.4]]]),
)
NORMAL = densities.gaussian(jnp.zeros(2), jnp.eye(2))
P = densities.gaussian(DATA.means[1], DATA.covariances[1])
Q = densities.gaussian(SOURCE.means[0], SOURCE.covariances[0])
CIRCULAR = fm.Interpolant(  # neither straight nor of unit length: every coefficient and its rate is seen
    lambda t: jnp.cos(0.5 * jnp.pi * t),
    lambda t: jnp.sin(0.5 * jnp.pi * t),
    lambda t: 0.6 * t * (1 - t) * (1 + t),
)
INTERPOLANTS = {"straight": fm.linear(), "bridge": fm.linear(0.8), "circular": CIRCULAR}
TIMES = jnp.asarray([0.0, 0.2, 0.7, 1.0])
POINTS = jnp.asarray(np.random.default_rng(5).normal(size=(5, 2)) * 1.5)


# ------------------------------------------------------------------------------------------------------- losses


def test_the_gradient_is_that_of_the_regression_on_the_marginal_velocity():
    """Exactly, by quadrature, on all six schedules: x_0 and eps in four dimensions on one side, on the other x_t in two
    with the oracle's velocity. And the losses differ by E|alpha' x_0 + sigma' eps|^2 - E|v|^2, whatever the model.
    """
    t = jnp.asarray(0.35)
    four, weight_pairs = by_component(DATA, *normal_grid(5, 4))
    two, weight2 = normal_grid(100, 2)
    options = list(SCHEDULES.values())

    @jax.jit
    def sides(params, index, x_t):
        schedule = switched(index)
        true = jax.vmap(lambda x: densities.velocity(DATA, schedule)(t, x, None))(x_t)

        def conditional(p):
            one = lambda x, e: fm.gaussian_loss(rough, schedule, t, x, e, p)  # noqa: E731
            return weight_pairs @ jax.vmap(one)(jnp.asarray(four[:, :2]), jnp.asarray(four[:, 2:]))

        def regression(p):
            model = jax.vmap(lambda x: rough(t, x, p))(x_t)
            return weight_t @ jnp.sum((model - true) ** 2, axis=1)

        size = weight_t @ jnp.sum(true**2, axis=1)
        return jax.value_and_grad(conditional)(params), jax.value_and_grad(regression)(params), size

    second = np.trace(np.asarray(densities.covariance(DATA))) + np.sum(np.asarray(densities.mean(DATA)) ** 2)
    for index, schedule in enumerate(options):
        x_t, weight_t = by_component(densities.diffuse(DATA, schedule, t), two, weight2)
        alpha_dot, sigma_dot = (jax.grad(partial(f, schedule))(t) for f in (schedules.alpha, schedules.sigma))
        for params in PARAMS:
            (left, left_grad), (right, right_grad), size = sides(params, index, jnp.asarray(x_t))
            constant = alpha_dot**2 * second + 2 * sigma_dot**2 - size
            scale = float(left)
            np.testing.assert_allclose(left - right, constant, rtol=0, atol=1e-7 * scale)
            for one, other in zip(jax.tree.leaves(left_grad), jax.tree.leaves(right_grad), strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-7 * scale)


def test_the_gradient_on_straight_paths_is_that_of_the_regression_within_its_interval():
    """Between two mixtures at random times: per pair the gradients differ by 2 (v - (x_1 - x_0)) . dv_theta, of mean
    zero. Four parameters, z below 5: false alarm 2e-6. The loss itself is larger by what cannot be learned.
    """
    n = 40_000
    keys = jax.random.split(jax.random.key(1), 3)
    x0, x1 = densities.sample(keys[0], DATA, n), densities.sample(keys[1], SOURCE, n)
    ts = jax.random.uniform(keys[2], (n,))
    true = fm.marginal(DATA, SOURCE, fm.linear()).velocity

    @jax.jit
    @jax.vmap
    def gradients(t, x0, x1):
        x_t = (1 - t) * x0 + t * x1
        v = true(t, x_t, None)
        pair = jax.grad(lambda p: fm.loss(rough, t, x0, x1, p))(PARAMS[0])
        regression = jax.grad(lambda p: jnp.sum((rough(t, x_t, p) - v) ** 2))(PARAMS[0])
        at_truth = fm.loss(true, t, x0, x1)
        return jax.tree.map(jnp.subtract, pair, regression), pair, at_truth

    difference, pair, at_truth = gradients(ts, x0, x1)
    flat = np.concatenate([np.asarray(leaf).reshape(n, -1) for leaf in jax.tree.leaves(difference)], axis=1)
    z = flat.mean(0) / (flat.std(0, ddof=1) / np.sqrt(n))
    assert flat.shape == (n, 4)
    assert np.abs(z).max() < 5
    whole = np.concatenate([np.asarray(leaf).reshape(n, -1) for leaf in jax.tree.leaves(pair)], axis=1)
    assert (np.abs(whole.mean(0)) > 20 * flat.std(0, ddof=1) / np.sqrt(n)).any()  # while the gradient is not zero
    assert at_truth.mean() > 1


def test_the_loss_by_hand():
    """Known numbers: x_t = 0.75 x_0 + 0.25 x_1, and on a Gaussian path of noise the same."""
    double = lambda t, x, args: args * x + t  # noqa: E731
    x0, x1 = jnp.asarray([2.0, 0.0]), jnp.asarray([-2.0, 4.0])
    value = fm.loss(double, 0.25, x0, x1, jnp.asarray(3.0))  # x_t = (1, 1), v = 3.25, target (-4, 4)
    np.testing.assert_allclose(value, 7.25**2 + 0.75**2, rtol=1e-14)
    again = fm.gaussian_loss(double, schedules.linear(), 0.25, x0, x1, jnp.asarray(3.0), weight=lambda t: 8 * t)
    np.testing.assert_allclose(again, 2 * (7.25**2 + 0.75**2), rtol=1e-12)
    assert fm.loss(lambda t, x, args: x1 - x0, 0.3, x0, x1) == 0


def test_where_sigma_has_no_derivative():
    """At t = 0 the loss is infinite on vp and ve, finite and the limit elsewhere; weighted by the variance, bounded."""
    still = lambda t, x, args: jnp.zeros_like(x)  # noqa: E731
    x0, noise = jnp.asarray([0.3, -0.2]), jnp.asarray([1.0, 2.0])
    for name, schedule in SCHEDULES.items():
        at = [float(fm.gaussian_loss(still, schedule, t, x0, noise)) for t in (0.0, 1e-7)]
        if name in ("vp", "ve"):
            assert at[0] == np.inf
            weighted = fm.gaussian_loss(still, schedule, 1e-12, x0, noise, weight=schedule.variance)
            half_rate = schedules.derivatives(schedule, jnp.zeros(()))[3]
            np.testing.assert_allclose(weighted, 5 * half_rate**2, rtol=1e-4)
        else:
            np.testing.assert_allclose(at[0], at[1], rtol=1e-4)
    low = [jnp.asarray(x, jnp.float32) for x in (x0, noise)]
    value = fm.gaussian_loss(still, schedules.linear(), jnp.float32(0), *low)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 0.7**2 + 2.2**2, rtol=1e-6)


# --------------------------------------------------------------------------------------- stochastic interpolants


def regression(x, y):
    """E[y | x] of jointly Gaussian vectors that are linear in one standard normal: the matrix cov(y, x) cov(x)^-1."""
    return y @ x.T @ np.linalg.inv(x @ x.T)


def affine(name, t):
    """Of the interpolant between P and Q in closed form: means of x and its rate, matrices of b and of eta."""
    interpolant = INTERPOLANTS[name]
    (a, da), (b, db), (v, dv) = (jax.value_and_grad(f)(jnp.asarray(t)) for f in interpolant)
    g = np.sqrt(float(v))
    dg = float(dv) / (2 * g) if g else 0.0
    root_p, root_q = (np.linalg.cholesky(np.asarray(d.covariances[0])) for d in (P, Q))
    mean_p, mean_q = np.asarray(P.means[0]), np.asarray(Q.means[0])
    eye, nothing = np.eye(2), np.zeros((2, 2))
    x = np.hstack([a * root_p, b * root_q, g * eye])
    rate = np.hstack([da * root_p, db * root_q, dg * eye])
    z = np.hstack([nothing, nothing, eye])
    mean, mean_dot = a * mean_p + b * mean_q, da * mean_p + db * mean_q
    return mean, mean_dot, regression(x, rate), regression(x, z), x @ x.T


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_velocity_score_and_density_between_gaussians(name):
    """Against the regression of one linear map of a standard normal on another."""
    found = fm.marginal(P, Q, INTERPOLANTS[name])
    for t in (0.2, 0.5, 0.9):
        mean, mean_dot, of_rate, of_noise, covariance = affine(name, t)
        x = POINTS[0]
        v, eta, log_p = jax.jit(lambda t, x: tuple(field(t, x, None) for field in found))(jnp.asarray(t), x)
        np.testing.assert_allclose(v, mean_dot + of_rate @ (x - mean), rtol=1e-10)
        np.testing.assert_allclose(eta, of_noise @ (x - mean), atol=1e-12)
        np.testing.assert_allclose(
            log_p, densities.log_prob(densities.gaussian(*map(jnp.asarray, (mean, covariance))), x)
        )
        if name != "straight":
            exact = -np.linalg.solve(covariance, x - mean)
            np.testing.assert_allclose(fm.score(found.denoiser, INTERPOLANTS[name])(t, x, None), exact, rtol=1e-10)


def test_with_noise_for_a_source_it_is_the_linear_schedule():
    found = fm.marginal(DATA, NORMAL, fm.linear())
    known = densities.velocity(DATA, schedules.linear())

    def both(t, x):
        return found.velocity(t, x, None), known(t, x, None)

    one, other = jax.jit(jax.vmap(jax.vmap(both, (None, 0)), (0, None)))(TIMES, POINTS)
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_mixtures_obey_the_equations_of_continuity_and_of_both_sdes(name):
    """Residuals are zero in float64, at points where every term is of order one; a wrong sign leaves order one."""
    interpolant = INTERPOLANTS[name]
    found = fm.marginal(DATA, SOURCE, interpolant)
    diffusion = lambda t: 0.7 + 0.5 * t  # noqa: E731

    def residuals(t, x):
        flow = fokker_planck.continuity_residual(found.velocity, found.log_density)(t, x, None)
        if name == "straight":
            return (flow,)
        arguments = found.velocity, found.denoiser, interpolant, diffusion
        there = fokker_planck.residual(fm.forward_sde(*arguments), found.log_density)(t, x, None)
        back = fokker_planck.residual(fm.reverse_sde(*arguments), found.log_density, backward=True)(t, x, None)
        return flow, there, back

    values = jax.jit(jax.vmap(jax.vmap(residuals, (None, 0)), (0, None)))(TIMES[1:3], POINTS)
    for value in values:
        assert np.abs(value).max() < 1e-8


@pytest.mark.parametrize("name", ["bridge", "circular"])
def test_both_sdes_have_the_moments_of_the_interpolant(name):
    """Affine drifts: mean and covariance by their ODEs, from one marginal to another, there and back."""
    interpolant = INTERPOLANTS[name]
    found = fm.marginal(P, Q, interpolant)
    diffusion = lambda t: jnp.sqrt(interpolant.variance(t)) + 0.3  # noqa: E731
    for make, start, end, sign in ((fm.forward_sde, 0.1, 0.8, 1), (fm.reverse_sde, 0.9, 0.15, -1)):
        sde = make(found.velocity, found.denoiser, interpolant, diffusion)

        @jax.jit
        def moments_dot(t, y, sde=sde, sign=sign):
            mean, covariance = y[:2], y[2:].reshape(2, 2)
            drift = lambda x: sde.drift(t, x, None)  # noqa: E731
            a, g = jax.jacfwd(drift)(mean), sde.diffusion(t, mean, None)
            rate = a @ covariance + covariance @ a.T + sign * g**2 * jnp.eye(2)
            return jnp.concatenate([drift(mean), rate.reshape(-1)])

        mean, *_, covariance = affine(name, start)
        first = np.concatenate([mean, covariance.reshape(-1)])
        last = solve_ivp(moments_dot, (start, end), first, rtol=1e-9, atol=1e-10).y[:, -1]
        mean, *_, covariance = affine(name, end)
        np.testing.assert_allclose(last, np.concatenate([mean, covariance.reshape(-1)]), rtol=1e-6, atol=1e-7)


def test_an_sde_whose_noise_ends_with_gamma_starts_at_the_ends():
    """Where gamma and g are 0 the drift is b, and where gamma alone is it is not a number."""
    interpolant = fm.linear(0.8)
    found = fm.marginal(DATA, SOURCE, interpolant)
    fading = lambda t: jnp.sqrt(t * (1 - t))  # noqa: E731
    for t in (0.0, 1.0):
        drift = fm.reverse_sde(found.velocity, found.denoiser, interpolant, fading).drift(t, POINTS[0], None)
        np.testing.assert_allclose(drift, found.velocity(t, POINTS[0], None), rtol=1e-12)
        steady = fm.reverse_sde(found.velocity, found.denoiser, interpolant, lambda t: 1.0)
        assert not np.isfinite(steady.drift(t, POINTS[0], None)).any()


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_interpolant_losses_are_least_at_the_truth_by_the_known_amount(name):
    """Affine models between Gaussians, by exact quadrature over x_0, x_1 and z: the loss of A (x - m) + c exceeds that
    of the truth by the mean square of the difference, tr((A - A*) S (A - A*)^T) + |c - c*|^2; there its gradient is 0.
    """
    interpolant, t = INTERPOLANTS[name], 0.3
    grid, weight = normal_grid(3, 6)
    root_p, root_q = (np.linalg.cholesky(np.asarray(d.covariances[0])) for d in (P, Q))
    x0, x1 = (
        jnp.asarray(grid[:, i : i + 2] @ r.T + np.asarray(d.means[0])) for i, r, d in ((0, root_p, P), (2, root_q, Q))
    )
    z = jnp.asarray(grid[:, 4:])
    mean, mean_dot, of_rate, of_noise, covariance = affine(name, t)
    model = lambda t, x, args: args["a"] @ (x - mean) + args["c"]  # noqa: E731
    cases = [(fm.interpolant_loss, of_rate, mean_dot), (fm.denoiser_loss, of_noise, np.zeros(2))]
    for function, matrix, shift in cases:
        expected = jax.jit(
            jax.value_and_grad(
                lambda p, f=function: (
                    jnp.asarray(weight) @ jax.vmap(lambda *xs: f(model, interpolant, t, *xs, p))(x0, x1, z)
                )
            )
        )
        truth = {"a": jnp.asarray(matrix), "c": jnp.asarray(shift)}
        least, gradient = expected(truth)
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-10
        off = {"a": np.array([[0.3, -0.2], [0.5, 0.1]]), "c": np.array([0.4, -0.7])}
        more, _ = expected({key: truth[key] + off[key] for key in off})
        extra = np.trace(off["a"] @ covariance @ off["a"].T) + off["c"] @ off["c"]
        np.testing.assert_allclose(more - least, extra, rtol=1e-10)


def test_the_velocity_loss_of_an_interpolant_stays_bounded_near_its_ends():
    """gamma' grows as 1 / sqrt(t), the loss does not: its limit at 0 is |b - I'|^2 - 2 gamma gamma' z . (db/dx z)."""
    x0, x1, z = jnp.asarray([0.5, -0.3]), jnp.asarray([1.0, 2.0]), jnp.asarray([0.7, -1.2])
    matrix = jnp.asarray([[0.3, 1.0], [-0.4, 0.8]])
    field = lambda t, x, args: matrix @ x  # noqa: E731
    limit = jnp.sum((matrix @ x0 - (x1 - x0)) ** 2) - 2 * 0.64 * z @ matrix @ z
    np.testing.assert_allclose(fm.interpolant_loss(field, fm.linear(0.8), 1e-9, x0, x1, z), limit, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------- couplings


def draws(seed, n, *event):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, *event)))


def cost(x0, x1):
    return float(jnp.sum((x0 - x1) ** 2))


def test_optimal_pairs_are_the_best_of_all_permutations():
    """All 720 of six points, for events of one and of two axes; under jit and vmap alike."""
    for seed, event in ((1, (2,)), (2, (2,)), (3, (3,)), (4, (2, 2))):
        x0, x1 = draws(seed, 6, *event), 0.5 + draws(seed + 10, 6, *event)
        best = min(cost(x0, x1[np.array(order)]) for order in itertools.permutations(range(6)))
        found = fm.optimal(KEY, x0, x1)
        assert found.dtype == jnp.int32
        assert sorted(found.tolist()) == list(range(6))
        np.testing.assert_allclose(cost(x0, x1[found]), best, rtol=1e-12)
        np.testing.assert_array_equal(jax.jit(fm.optimal)(KEY, x0, x1), found)
        both = jax.vmap(lambda a, b: fm.optimal(KEY, a, b))(jnp.stack([x0, x1]), jnp.stack([x1, x0]))
        np.testing.assert_array_equal(both[0], found)
        np.testing.assert_array_equal(both[1], np.argsort(found))


def test_the_order_of_rows_does_not_matter_to_optimal_pairs():
    x0, x1 = draws(5, 40, 2), draws(6, 40, 2)
    a, b = np.random.default_rng(7).permutation(40), np.random.default_rng(8).permutation(40)
    plain, shuffled = fm.optimal(KEY, x0, x1), fm.optimal(KEY, x0[a], x1[b])
    np.testing.assert_array_equal(b[np.asarray(shuffled)], np.asarray(plain)[a])


def test_in_one_dimension_optimal_pairs_are_sorted():
    x0, x1 = draws(9, 50, 1), 3 * draws(10, 50, 1) - 1
    pairs = x1[fm.optimal(KEY, x0, x1)]
    np.testing.assert_array_equal(pairs[jnp.argsort(x0[:, 0]), 0], jnp.sort(x1[:, 0]))


def test_independent_pairs_are_a_random_permutation():
    """Of a sorted batch with itself the correlation is 0: z = r sqrt(n - 1) below 5, false alarm 6e-7."""
    x = jnp.sort(draws(11, 2000))[:, None]
    found = fm.independent(jax.random.key(3), x, x)
    assert sorted(found.tolist()) == list(range(2000))
    assert abs(np.corrcoef(x[:, 0], x[found, 0])[0, 1]) * np.sqrt(1999) < 5
    assert (fm.independent(jax.random.key(4), x, x) != found).any()


def labelled(key, num):
    """Two classes in the plane, one up to the right and one down to the left, and noise."""
    key_y, key_x, key_z = jax.random.split(key, 3)
    y = jax.random.bernoulli(key_y, 0.5, (num,)).astype(jnp.int32)
    centre = jnp.asarray([1.2, 0.9])
    x0 = jnp.where(y[:, None] == 1, 1.0, -1.0) * centre[None] + 0.5 * jax.random.normal(key_x, (num, 2))
    return y, x0, jax.random.normal(key_z, (num, 2))


def test_conditional_pairs_leave_the_source_of_a_class_as_it_is_and_plain_ones_do_not():
    """100 batches of 64, seeds 0 to 99. Within classes the noise of class 1 has mean 0 and covariance I: five moments,
    z below 5 (false alarm 3e-6), for its points are 3,200 independent normal ones. By plain optimal transport its mean
    along the direction of the class is near 0.8 = E|z|: the model of a class would be sampled from noise it never saw.
    """
    direction = np.asarray([0.8, 0.6])
    plain, aware = [], []
    draw = jax.jit(labelled, static_argnums=1)
    for seed in range(100):
        y, x0, x1 = map(np.asarray, draw(jax.random.key(seed), 64))
        plain.append(x1[np.asarray(fm.optimal(KEY, x0, x1))][y == 1])
        paired = np.asarray(fm.conditional(KEY, x0, x1, y))
        assert (y[paired] == y).all()
        aware.append(x1[paired][y == 1])
    z = np.concatenate(aware)
    moments = np.stack([z[:, 0], z[:, 1], z[:, 0] ** 2 - 1, z[:, 1] ** 2 - 1, z[:, 0] * z[:, 1]], axis=1)
    assert np.abs(moments.mean(0) / (moments.std(0, ddof=1) / np.sqrt(len(z)))).max() < 5
    along = np.concatenate(plain) @ direction
    assert 0.65 < along.mean() < 0.8  # its standard error is 0.01


def test_conditional_pairs_are_the_best_within_each_condition():
    y, x0, x1 = labelled(jax.random.key(1), 40)
    found = fm.conditional(KEY, x0, x1, y)
    for one in (0, 1):
        rows = np.flatnonzero(np.asarray(y) == one)
        alone = rows[np.asarray(fm.optimal(KEY, x0[rows], x1[rows]))]
        np.testing.assert_array_equal(found[rows], alone)
    np.testing.assert_array_equal(jax.jit(fm.conditional)(KEY, x0, x1, y), found)
    # a large finite weight of unequal integers does the same, and none at all is plain transport
    np.testing.assert_array_equal(fm.conditional(KEY, x0, x1, y, weight=1e6), found)
    plain = fm.optimal(KEY, x0, x1)
    assert (plain != found).any()
    np.testing.assert_array_equal(fm.conditional(KEY, x0, x1, y, weight=0.0), plain)
    # floats by their distance: brute force over all permutations of six
    c = draws(20, 6, 2)
    best = min(
        itertools.permutations(range(6)),
        key=lambda order: cost(x0[:6], x1[np.array(order)]) + 0.7 * cost(c, c[np.array(order)]),
    )
    np.testing.assert_array_equal(fm.conditional(KEY, x0[:6], x1[:6], c, weight=0.7), best)
    np.testing.assert_array_equal(fm.conditional(KEY, x0[:6], x1[:6], c), range(6))  # no two are equal


@pytest.mark.slow
@needs_ott
def test_the_entropic_plan_of_two_points_and_its_limits():
    """Two points at distance 1 each from the other pair: P_11 = 1 / (2 (1 + exp(-1 / epsilon))) by hand, where staying
    costs 0 and crossing 1. Many points: rows and columns of equal sums, and the limits of no and of much entropy.
    """
    x = jnp.asarray([[0.0], [1.0]])
    plan = fm.sinkhorn_plan(x, x, epsilon=0.5, threshold=1e-9)
    np.testing.assert_allclose(plan[0, 0], 0.5 / (1 + np.exp(-2.0)), rtol=1e-7)
    np.testing.assert_allclose(plan[0, 1], 0.5 * np.exp(-2.0) / (1 + np.exp(-2.0)), rtol=1e-7)
    x0, x1 = draws(12, 30, 2), draws(13, 30, 2) + 0.5
    for epsilon in (0.2, 2.0):
        plan = fm.sinkhorn_plan(x0, x1, epsilon=epsilon, threshold=1e-8)
        np.testing.assert_allclose(plan.sum(0), 1 / 30, atol=1e-8)
        np.testing.assert_allclose(plan.sum(1), 1 / 30, atol=1e-8)
    np.testing.assert_allclose(fm.sinkhorn_plan(x0, x1, epsilon=1e6), 1 / 900, rtol=1e-4)
    sharp = fm.sinkhorn_plan(x0[:8], x1[:8], epsilon=0.02)
    np.testing.assert_array_equal(jnp.argmax(sharp, axis=1), fm.optimal(KEY, x0[:8], x1[:8]))


@needs_ott
def test_entropic_partners_are_drawn_from_the_rows_of_the_plan():
    """4 points, 4,000 keys: 16 frequencies, z below 5 (false alarm 1e-5)."""
    x0, x1 = draws(14, 4, 2), draws(15, 4, 2)
    rows = 4 * np.asarray(fm.sinkhorn_plan(x0, x1, epsilon=1.0))
    keys = jax.random.split(jax.random.key(5), 4000)
    found = jax.jit(jax.vmap(lambda key: fm.sinkhorn(key, x0, x1, epsilon=1.0)))(keys)
    assert found.dtype == jnp.int32
    share = np.stack([(found == j).mean(0) for j in range(4)], axis=1)
    assert (np.abs(share - rows) / np.sqrt(rows * (1 - rows) / 4000)).max() < 5
    assert rows.max() - rows.min() > 0.2


def gaussian_transport():
    """The optimal map of N(nu, D) to N(mu, C), x -> mu + A (x - nu), and W_2^2 by the formula of Bures."""
    mu, c, nu, d = (np.asarray(leaf) for leaf in (P.means[0], P.covariances[0], Q.means[0], Q.covariances[0]))
    root = sqrtm(d).real
    inverse = np.linalg.inv(root)
    a = inverse @ sqrtm(root @ c @ root).real @ inverse
    return mu, nu, a, np.sum((mu - nu) ** 2) + np.trace(c + d - 2 * sqrtm(root @ c @ root).real)


def test_the_wasserstein_distance_of_samples():
    """Sorted on the line; between a sample and its image by an optimal map the mean of the squares, whatever the order,
    and that is Bures' formula within z below 5 (false alarm 6e-7)."""
    x, y = draws(16, 31, 1), 2 * draws(17, 31, 1) + 1
    exact = np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2)
    np.testing.assert_allclose(fm.squared_wasserstein(x, y), exact, rtol=1e-12)
    mu, nu, a, bures = gaussian_transport()
    x = np.asarray(densities.sample(jax.random.key(6), Q, 600))
    y = mu + (x - nu) @ a.T
    squares = np.sum((x - y) ** 2, axis=1)
    found = jax.jit(fm.squared_wasserstein)(jnp.asarray(x), jnp.asarray(y[::-1]))
    np.testing.assert_allclose(found, squares.mean(), rtol=1e-12)
    assert abs(squares.mean() - bures) < 5 * squares.std(ddof=1) / np.sqrt(600)
    few, images = jnp.asarray(x[:9]), jnp.asarray(y[:9])
    gradient = jax.grad(fm.squared_wasserstein)(few, images[::-1])
    np.testing.assert_allclose(gradient, 2 * (few - images) / 9, rtol=1e-12)


# ------------------------------------------------------------------------------------------- paths of a velocity


def test_optimal_transport_of_gaussians_is_straight_and_no_longer_than_need_be():
    """v = (I - A) M^-1 (x - m_t) + nu - mu, M = (1 - t) A + t I: straightness 0, path energy W_2^2 in z below 5."""
    mu, nu, a, bures = gaussian_transport()

    def velocity(t, x, args):
        matrix = (1 - t) * a + t * np.eye(2)
        return nu - mu + (np.eye(2) - a) @ jnp.linalg.solve(matrix, x - ((1 - t) * mu + t * nu))

    z = densities.sample(jax.random.key(7), Q, 400)
    options = {"rtol": 1e-8, "atol": 1e-9}

    @jax.jit
    def measure(z):
        return (
            fm.straightness(velocity, z, num_nodes=5, **options),
            fm.normalised_path_energy(velocity, z, bures, num_nodes=5, **options),
            jax.vmap(lambda one: fm.reflow(velocity, one, **options))(z),
        )

    (curved, _), (energy, stderr), (x0, x1) = measure(z)
    assert abs(curved) < 1e-12
    assert abs(energy) < 5 * stderr
    assert stderr < 0.1
    np.testing.assert_array_equal(x1, z)
    np.testing.assert_allclose(x0, mu + (np.asarray(z) - nu) @ a.T, atol=1e-6)


def test_straightness_and_energy_of_the_independent_coupling():
    """From N(0, I) to a turned Gaussian the flow stretches each axis by s_t = sqrt((1 - t)^2 lambda_i + t^2): a path
    has the energy sum_i z_i^2 int s'^2 dt, and S is that less sum_i z_i^2 (1 - s_0)^2, by quadrature of s' alone.
    """
    turn, spectrum = rotation(2, 4), np.array([0.2, 2.5])
    data = densities.gaussian(jnp.zeros(2), jnp.asarray(turn @ np.diag(spectrum) @ turn.T))
    velocity = densities.velocity(data, schedules.linear())
    z = draws(18, 50, 2)

    def rate(t, v):
        return (t - (1 - t) * v) / np.sqrt((1 - t) ** 2 * v + t**2)

    energy = np.array([quad(lambda t, v=v: rate(t, v) ** 2, 0, 1)[0] for v in spectrum])
    squares = np.asarray(z @ turn) ** 2  # [num, axis]
    curved = squares @ (energy - (1 - np.sqrt(spectrum)) ** 2)

    @jax.jit
    def measure(z):
        options = {"num_nodes": 24, "rtol": 1e-8, "atol": 1e-8}
        return fm.straightness(velocity, z, **options), fm.normalised_path_energy(velocity, z, 0.7, **options)

    (value, stderr), (normalised, normalised_stderr) = measure(z)
    np.testing.assert_allclose(value, curved.mean(), rtol=1e-6)
    np.testing.assert_allclose(stderr, curved.std(ddof=1) / np.sqrt(50), rtol=1e-6)
    each = squares @ energy / 0.7 - 1
    np.testing.assert_allclose(normalised, each.mean(), rtol=1e-6)
    np.testing.assert_allclose(normalised_stderr, each.std(ddof=1) / np.sqrt(50), rtol=1e-6)


def test_a_failed_solve_is_not_a_number():
    stiff = lambda t, x, args: 1e6 * jnp.sin(1e6 * t) * x  # noqa: E731
    value, _ = jax.jit(lambda z: fm.straightness(stiff, z, max_steps=3, throw=False))(draws(19, 4, 2))
    assert np.isnan(value)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "coupling",
    [
        fm.independent,
        fm.optimal,
        partial(fm.conditional, conditions=jnp.zeros(6, jnp.int32)),
        partial(fm.sinkhorn, epsilon=1.0),
        lambda key, x0, x1: fm.sinkhorn_plan(x0, x1, epsilon=1.0),
    ],
    ids=["independent", "optimal", "conditional", "sinkhorn", "sinkhorn_plan"],
)
def test_batches_that_do_not_fit_are_named(coupling):
    good, bad = draws(1, 6, 2), draws(1, 6, 2).at[3, 1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"x0 has shape \(6, 2\) and x1 \(5, 2\)"):
        coupling(KEY, good, good[:5])
    with pytest.raises(ValueError, match=r"x0 has shape \(6, 2\) and x1 \(6, 1\)"):
        coupling(KEY, good, good[:, :1])
    with pytest.raises(ValueError, match="x1 has NaN or infinity in 1 of 6 rows, the first 3"):
        coupling(KEY, good, bad)
    with pytest.raises(TypeError, match="x0 must be an array of floats"):
        coupling(KEY, jnp.arange(6), good)
    with pytest.raises(TypeError, match="one dtype"):
        coupling(KEY, good, good.astype(jnp.float32))


def test_samples_that_do_not_fit_are_named_as_they_were_given():
    """The distance calls its arguments x and y, under jit too, where the host finds the NaN."""
    good, bad = draws(1, 6, 2), draws(1, 6, 2).at[3, 1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"x has shape \(6, 2\) and y \(5, 2\)"):
        fm.squared_wasserstein(good, good[:5])
    with pytest.raises(ValueError, match="at least 1"):
        fm.squared_wasserstein(good[:0], good[:0])
    with pytest.raises(ValueError, match="y has NaN or infinity in 1 of 6 rows, the first 3"):
        fm.squared_wasserstein(good, bad)
    for name, pair in (("x", (bad, good)), ("y", (good, bad))):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=f"ValueError: {name} has NaN or infinity"):
            jax.block_until_ready(jax.jit(fm.squared_wasserstein)(*pair))


def test_bad_conditions_are_named():
    x = draws(1, 6, 2)
    with pytest.raises(ValueError, match=r"conditions has shape \(5,\), but x0 and x1 have 6 rows"):
        fm.conditional(KEY, x, x, jnp.zeros(5, jnp.int32))
    with pytest.raises(ValueError, match="conditions has NaN or infinity in 1 of 6 rows"):
        fm.conditional(KEY, x, x, jnp.zeros(6).at[0].set(jnp.nan))
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        fm.conditional(KEY, x, x, jnp.zeros(6, jnp.int32), weight=-1.0)


def test_what_a_tracer_hides_fails_aloud_when_the_program_runs():
    bad = draws(1, 6, 2).at[3, 1].set(jnp.nan)
    for function in (fm.optimal, partial(fm.conditional, conditions=jnp.zeros(6, jnp.int32))):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="NaN or infinity in 1 of 6 rows"):
            jax.block_until_ready(jax.jit(function)(KEY, bad, bad))


@needs_ott
def test_a_plan_that_does_not_converge_is_told():
    x0, x1 = draws(12, 30, 2), draws(13, 30, 2)
    with pytest.raises(ValueError, match="did not converge to threshold=1e-08 in max_iterations=10"):
        fm.sinkhorn_plan(x0, x1, epsilon=1e-2, threshold=1e-8, max_iterations=10)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="did not converge"):
        jax.block_until_ready(jax.jit(partial(fm.sinkhorn_plan, epsilon=1.0))(x0.at[0].set(jnp.nan), x1))
    for epsilon in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="epsilon must be one positive number"):
            fm.sinkhorn_plan(x0, x1, epsilon=epsilon)


def test_bad_arguments_of_losses_and_paths():
    x, t = jnp.zeros(2), jnp.asarray(0.5)
    same = lambda t, x, args: x  # noqa: E731
    with pytest.raises(ValueError, match=r"x1 has shape \(3,\) and x0 \(2,\)"):
        fm.loss(same, t, x, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"velocity returned shape \(1,\)"):
        fm.loss(lambda t, x, args: x[:1], t, x, x)
    with pytest.raises(ValueError, match=r"noise has shape \(3,\)"):
        fm.interpolant_loss(same, fm.linear(1.0), t, x, x, jnp.zeros(3))
    with pytest.raises(TypeError, match="denoiser returned dtype float32"):
        fm.denoiser_loss(lambda t, x, args: x.astype(jnp.float32), fm.linear(1.0), t, x, x, x)
    with pytest.raises(ValueError, match=r"t must be one time of shape \(\)"):
        fm.gaussian_loss(same, schedules.vp(), jnp.zeros(2), x, x)
    with pytest.raises(ValueError, match="scale must be finite and at least 0, got -1"):
        fm.linear(-1.0)
    with pytest.raises(ValueError, match="data and source must have one dimension d"):
        fm.marginal(DATA, rotated_mixture(3), fm.linear())
    for measure in (fm.straightness, partial(fm.normalised_path_energy, squared_distance=1.0)):
        with pytest.raises(ValueError, match="num at least 2"):
            measure(same, jnp.zeros((1, 2)))
        with pytest.raises(ValueError, match="x1 has NaN or infinity in 1 of 4 rows, the first 2"):
            measure(same, jnp.zeros((4, 2)).at[2, 0].set(jnp.inf))
    with pytest.raises(ValueError, match="squared_distance must be one positive number, got 0"):
        fm.normalised_path_energy(same, jnp.zeros((4, 2)), 0.0)
    under_jit = jax.jit(lambda distance: fm.normalised_path_energy(same, jnp.ones((4, 2)), distance, throw=False))
    assert np.isnan(under_jit(-1.0)).all()
