"""The equation of Kolmogorov, Fokker and Planck: residuals of oracles, planted errors, and densities on a grid."""

import re
from functools import partial

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import points, sweep
from scipy.linalg import expm
from scipy.stats import chi2
from targets import SCHEDULES
from targets import rotated_mixture as mixture

from dgm_jax import densities, divergence, networks, sdes, solvers
from dgm_jax import fokker_planck as fp
from dgm_jax.types import SDE, StructuredField

TIMES = [0.02, 0.1, 0.35, 0.7, 0.97]
VP = SCHEDULES["vp"]


def everywhere(field, x):
    """A function of one point over the leading axes of x."""
    for _ in range(x.ndim - 1):
        field = jax.vmap(field)
    return field(x)


def over_points(field, t, xs):
    """A field at one time and many points, as one compiled program."""
    return np.asarray(jax.jit(jax.vmap(field, (None, 0, None)))(t, xs, None))


# ------------------------------------------------------------------------------------------------- at one point


def test_density_and_continuity_residuals_of_the_oracles():
    """At most 1e-8 nat per unit of time, absolute, under six schedules, forwards, backwards and as a flow.

    The rates of log p themselves are between 10 and 250.
    """
    density = mixture(3)

    def residuals(schedule):
        sde, log_p = sdes.diffusion_process(schedule), densities.log_density(density, schedule)
        score, velocity = densities.score(density, schedule), densities.velocity(density, schedule)
        fields = [
            fp.residual(sde, log_p),
            fp.residual(sdes.reverse(sde, score), log_p, backward=True),
            fp.continuity_residual(velocity, log_p),
            fp.continuity_residual(sdes.probability_flow(sde, score), log_p),
            fp.rhs_log(sde, log_p),
        ]
        return lambda t, x, args: jnp.stack([field(t, x, args) for field in fields])

    for name, values in sweep(residuals, TIMES, points(3)):
        assert np.max(np.abs(values[..., :-1])) < 1e-8, name
        assert np.max(np.abs(values[..., -1])) > 10, name  # not zero for want of motion


@pytest.mark.slow
def test_score_residuals_of_the_oracles():
    """At most 1e-8, absolute, where ds/dt itself is between 1 and 100 or so; of the reverse SDE too."""
    density = mixture(3)

    def residuals(schedule):
        sde, score = sdes.diffusion_process(schedule), densities.score(density, schedule)
        forward, backward = (
            fp.score_residual(sde, score),
            fp.score_residual(sdes.reverse(sde, score), score, backward=True),
        )
        return lambda t, x, args: jnp.stack([forward(t, x, args), backward(t, x, args), jax.jacfwd(score)(t, x, args)])

    for name, values in sweep(residuals, TIMES, points(3)):
        assert np.max(np.abs(values[:, :, :2])) < 1e-8, name
        assert np.max(np.abs(values[:, :, 2])) > 1, name


@pytest.mark.slow
def test_residuals_rise_in_proportion_to_a_planted_error():
    """With log p + e sin(t) c.x, s + e c and v + e M x for the oracle's: closed forms, e from 1e-6 to 1."""
    density, c = mixture(2), jnp.asarray([0.6, -1.1])
    matrix = jnp.asarray([[0.4, 1.0], [-0.2, 0.7]])
    sde, log_p = sdes.diffusion_process(VP), densities.log_density(density, VP)
    score, velocity = densities.score(density, VP), densities.velocity(density, VP)

    @jax.jit
    def found_and_expected(e, t, x):
        wrong_p = lambda t, x, args: log_p(t, x, args) + e * jnp.sin(t) * (c @ x)  # noqa: E731
        wrong_s = lambda t, x, args: score(t, x, args) + e * c  # noqa: E731
        wrong_v = lambda t, x, args: velocity(t, x, args) + e * (matrix @ x)  # noqa: E731
        found = [
            fp.residual(sde, wrong_p)(t, x)[None],
            fp.score_residual(sde, wrong_s)(t, x),
            fp.continuity_residual(wrong_v, log_p)(t, x)[None],
        ]
        f, s, g2 = sde.drift(t, x, None), score(t, x, None), sde.diffusion(t, x, None) ** 2
        hessian = jax.jacfwd(score, argnums=1)(t, x, None)
        linear = jnp.cos(t) * (c @ x) + jnp.sin(t) * (c @ f - g2 * (c @ s))
        expected = [
            (e * linear - 0.5 * g2 * (e * jnp.sin(t)) ** 2 * (c @ c))[None],
            -e * (g2 * hessian @ c - (f / x) * c),  # the drift is a multiple of x
            e * (jnp.trace(matrix) + (matrix @ x) @ s)[None],
        ]
        return jnp.concatenate(found), jnp.concatenate(expected)

    sizes = np.geomspace(1e-6, 1.0, 13)
    run = jax.vmap(jax.vmap(found_and_expected, (None, None, 0)), (0, None, None))
    found, expected = map(np.asarray, run(jnp.asarray(sizes), jnp.asarray(0.3), points(2)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-11)
    rms = np.sqrt(np.mean(found[:9] ** 2, axis=1))  # e up to 1e-2
    slopes = [np.polyfit(np.log(sizes[:9]), np.log(column), 1)[0] for column in rms.T]
    np.testing.assert_allclose(slopes, 1.0, atol=0.01)


NOISE = jnp.asarray([0.7, 1.3])
CURVED = SDE(
    lambda t, x, args: jnp.stack([jnp.sin(x[1]) - x[0], x[0] * x[1]]),
    lambda t, x, args: NOISE * (1 + 0.3 * jnp.sin(x + x[::-1] ** 2 + t)),
)
WAVY = SDE(CURVED.drift, lambda t, x, args: 1 + 0.3 * jnp.sin(x[0] + 2 * x[1]))
STRAIGHT = SDE(CURVED.drift, lambda t, x, args: 0.5 + t)


@pytest.mark.slow
def test_rhs_is_the_theorem_in_divergence_and_in_trace_form():
    """-div(f p) + 1/2 lap(g^2 p), and the trace of derivatives, both taken of p itself and not of log p.

    For g(t), for a diagonal g(t, x) and for a scalar g(t, x).
    """
    log_p, t = densities.log_density(mixture(2), VP), jnp.asarray(0.2)

    def three(sde, x):
        p = lambda x: jnp.exp(log_p(t, x, None))  # noqa: E731
        drifted = lambda x: sde.drift(t, x, None) * p(x)  # noqa: E731
        spread = lambda x: jnp.broadcast_to(sde.diffusion(t, x, None) ** 2, x.shape) * p(x)  # noqa: E731
        second = jax.jacfwd(jax.jacrev(spread))(x)  # [i, j, k]: d^2 (g_i^2 p) / dx_j dx_k
        by_trace = jnp.trace(-jax.jacfwd(drifted)(x) + 0.5 * jnp.einsum("iij->ij", second))
        by_divergence = -divergence.exact(drifted, x)[1]
        for i in range(2):  # the Laplacian as second differences along each axis would have it
            unit = jnp.eye(2)[i]
            along = lambda u, unit=unit, i=i: spread(x + u * unit)[i]  # noqa: E731
            by_divergence += 0.5 * jax.grad(jax.grad(along))(0.0)
        return jnp.stack([fp.rhs(sde, log_p)(t, x), by_divergence, by_trace])

    run = jax.jit(jax.vmap(lambda x: jnp.stack([three(sde, x) for sde in (STRAIGHT, CURVED, WAVY)])))
    values = np.asarray(run(points(2)))  # [points, sdes, forms]
    assert np.all(np.max(np.abs(values), axis=0) > 1e-3)
    np.testing.assert_allclose(values[..., 1:], values[..., :1] * np.ones(2), rtol=1e-11, atol=1e-15)


def test_rhs_is_the_rate_of_p():
    """dp/dt of the oracle by differentiation in time, and p d log p / dt."""
    sde, log_p, t = sdes.diffusion_process(VP), densities.log_density(mixture(2), VP), jnp.asarray(0.3)
    rate = over_points(jax.jacfwd(lambda t, x, args: jnp.exp(log_p(t, x, None))), t, points(2))
    np.testing.assert_allclose(over_points(fp.rhs(sde, log_p), t, points(2)), rate, rtol=1e-11)


def test_geometric_brownian_motion_has_a_lognormal_density():
    """dX = m X dt + s X dw: g depends on x, and the residual of the known density is zero."""
    m, s, start = jnp.asarray([0.3, -0.2]), jnp.asarray([0.5, 0.8]), jnp.asarray([1.0, 2.0])
    sde = SDE(lambda t, x, args: m * x, lambda t, x, args: s * x)

    def log_p(t, x, args):
        z = jnp.log(x / start) - (m - s**2 / 2) * t
        return jnp.sum(-(z**2) / (2 * s**2 * t) - jnp.log(s * jnp.sqrt(2 * jnp.pi * t) * x))

    t, xs = jnp.asarray(0.7), jnp.abs(points(2)) + 0.2
    assert np.max(np.abs(over_points(fp.residual(sde, log_p), t, xs))) < 1e-12
    score = lambda t, x, args: jax.grad(log_p, argnums=1)(t, x, args)  # noqa: E731
    assert np.max(np.abs(over_points(fp.score_residual(sde, score), t, xs))) < 1e-11


def test_langevin_leaves_the_density_constant():
    """The right side of the theorem is zero to rounding for dx = 1/2 grad log p dt + dw, of p and of log p."""
    log_p, score = densities.log_density(mixture(3), VP), densities.score(mixture(3), VP)
    t, xs = jnp.asarray(0.05), points(3)
    langevin = sdes.langevin(score)
    assert np.max(np.abs(over_points(fp.rhs(langevin, log_p), t, xs))) < 1e-15
    assert np.max(np.abs(over_points(fp.rhs_log(langevin, log_p), t, xs))) < 1e-12
    wrong = SDE(lambda t, x, args: 2 * langevin.drift(t, x, args), langevin.diffusion)
    assert np.max(np.abs(over_points(fp.rhs(wrong, log_p), t, xs))) > 1e-3


def test_probability_flow_moves_the_same_density():
    """Lecture 14: the SDE and the ODE with f - 1/2 g^2 grad log p have one right side; g may be a diagonal."""
    log_p, score, t = densities.log_density(mixture(2), VP), densities.score(mixture(2), VP), jnp.asarray(0.2)
    sde = SDE(CURVED.drift, lambda t, x, args: NOISE)
    flow = SDE(sdes.probability_flow(sde, score), lambda t, x, args: jnp.zeros((), x.dtype))
    by_sde, by_flow = (np.asarray(over_points(fp.rhs(one, log_p), t, points(2))) for one in (sde, flow))
    assert np.max(np.abs(by_sde)) > 1e-2
    np.testing.assert_allclose(by_sde, by_flow, rtol=1e-11)


@pytest.mark.slow
def test_what_networks_know_of_themselves_gives_what_products_give():
    """Drift, score, velocity and log-density by networks, on their own Jacobians: every right side and residual, with a
    scalar g, one that depends on x, and a diagonal one; the gradient of a loss on the residuals by all parameters."""
    widths = {"features": (3, 4), "param_dtype": jnp.float64}
    nets = {"field": networks.MLP(**widths), "energy": networks.MLP(**widths, out_features=1)}
    rng, x, t = np.random.default_rng(4), points(2)[:3], jnp.asarray(0.3)
    params = {
        name: jax.tree.map(
            lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)),
            jax.eval_shape(net.init, jax.random.key(0), t, x[0]),
        )
        for name, net in nets.items()
    }
    u, v = networks.energy(nets["energy"]), networks.vector_field(nets["field"])
    log_p = divergence.Energy(
        lambda t, x, p: u(t, x, p["energy"]),
        lambda p: u.prepare(p["energy"]),
        u.with_laplacian,
    )
    field = StructuredField(lambda t, x, p: v(t, x, p["field"]), lambda p: v.prepare(p["field"]), v.with_divergence)

    def values(params, **named):
        found = []
        for noise in (STRAIGHT.diffusion, WAVY.diffusion, CURVED.diffusion):
            sde = SDE(field, noise)
            found += [fp.rhs_log(sde, log_p, **named), fp.rhs(sde, log_p, backward=True, **named)]
            found += [fp.residual(sde, log_p, **named), fp.score_residual(sde, field, **named)]
        found.append(fp.continuity_residual(field, log_p, **named))
        return jax.vmap(lambda x: jnp.concatenate([jnp.atleast_1d(each(t, x, params)) for each in found]))(x)

    own, plain = jax.jit(lambda p: (values(p), values(p, divergence=divergence.exact)))(params)
    assert np.min(np.std(own, axis=0)) > 1e-3
    np.testing.assert_allclose(own, plain, rtol=1e-12, atol=1e-12)
    losses = jax.jit(lambda p: [jax.grad(lambda p, n=n: jnp.sum(values(p, **n)))(p) for n in ({}, EXACT)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), *losses(params))


EXACT = {"divergence": divergence.exact}


def test_a_field_is_asked_for_what_it_knows_unless_another_way_is_named():
    """Fields that are wrong about themselves by 100, 10 and 1: what is seen of it, and with which factor."""
    x, t, a = jnp.asarray([0.5, -1.5]), jnp.asarray(0.0), jnp.asarray([2.0, 3.0])

    def claims(by):
        return StructuredField(lambda t, x, a: a * x, lambda a: a, lambda t, x, p: (p * x, jnp.sum(p) + by))

    drift, score = claims(100.0), claims(10.0)
    u = divergence.Energy(
        lambda t, x, a: x @ (a * x) / 2, lambda a: a, lambda t, x, p: (x @ (p * x) / 2, jnp.sum(p) + 1)
    )
    for noise, share in ((lambda t, x, a: 2.0, 2.0), (lambda t, x, a: jnp.asarray([2.0, 1.0]), 0.0)):
        sde = SDE(drift, noise)
        rates = [fp.rhs_log(sde, u, **named)(t, x, a) for named in ({}, EXACT)]
        np.testing.assert_allclose(rates[0] - rates[1], -100 + share * 1)
        np.testing.assert_allclose(fp.residual(sde, u)(t, x, a) - fp.residual(sde, u, **EXACT)(t, x, a), 100 - share)
    found = [fp.continuity_residual(score, u, **named)(t, x, a) for named in ({}, EXACT)]
    np.testing.assert_allclose(found[0] - found[1], 10)
    bent = StructuredField(score.field, score.prepare, lambda t, x, p: (p * x, jnp.sum(p) + x @ x))
    found = [fp.score_residual(SDE(lambda t, x, a: -x, lambda t, x, a: 2.0), bent, **n)(t, x, a) for n in ({}, EXACT)]
    np.testing.assert_allclose(found[0] - found[1], -4 * x)  # the gradient of -1/2 g^2 |x|^2


@pytest.mark.slow
def test_cost_and_derivative_of_a_residual():
    """Evaluations of log p do not grow with the dimension; a loss on the residual has the gradient of differences."""
    calls = []

    def log_p(t, x, mean):
        calls.append(1)
        return -0.5 * jnp.sum((x - mean * jnp.exp(-t)) ** 2) - 0.1 * jnp.sum(jnp.cos(x - mean))

    sde = sdes.ornstein_uhlenbeck()
    counts = []
    for dim in (10, 100):
        calls.clear()
        fp.residual(sde, log_p)(jnp.asarray(0.1), jnp.ones(dim), jnp.ones(dim))
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 4

    t, x, mean, h = jnp.asarray(0.4), jnp.asarray([0.3, -0.8]), jnp.asarray([0.7, 0.2]), 1e-5
    score = lambda t, x, mean: jax.grad(log_p, argnums=1)(t, x, mean)  # noqa: E731
    in_chunks = fp.residual(sde, log_p, divergence=divergence.exact_in_chunks(1))

    @jax.jit
    def loss(mean):
        both = fp.residual(sde, log_p)(t, x, mean) ** 2 + in_chunks(t, x, mean) ** 2
        return both + jnp.sum(fp.score_residual(sde, score)(t, x, mean) ** 2)

    slopes = [(loss(mean + h * unit) - loss(mean - h * unit)) / (2 * h) for unit in jnp.eye(2)]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(mean), slopes, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("of_the_score", [False, True])
def test_single_precision_in_single_precision_out(of_the_score):
    """Values too: within 1e-4 of those in double precision, of the largest on the points."""

    @partial(jax.jit, static_argnums=0)
    def values(dtype, t, xs):
        density = mixture(2, dtype)
        sde, log_p = sdes.diffusion_process(VP), densities.log_density(density, VP)
        score, velocity = densities.score(density, VP), densities.velocity(density, VP)
        wrong_p = lambda t, x, args: log_p(t, x, args) + jnp.sum(x**3)  # noqa: E731
        wrong_s = lambda t, x, args: score(t, x, args) + x**2  # noqa: E731
        fields = [fp.rhs(sde, log_p), fp.residual(sde, wrong_p), fp.continuity_residual(velocity, wrong_p)]
        fields = [fp.score_residual(sde, wrong_s)] if of_the_score else fields
        return jax.vmap(lambda x: [field(t, x) for field in fields])(xs)

    single = values(jnp.float32, jnp.asarray(0.5), points(2).astype(jnp.float32))
    double = values(jnp.float64, jnp.asarray(0.5), points(2))
    for one, other in zip(single, double, strict=True):
        assert one.dtype == jnp.float32
        assert other.dtype == jnp.float64
        assert np.max(np.abs(other)) > 0.01
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.max(np.abs(other)))


# --------------------------------------------------------------------------------------------------- on a grid

LINE = fp.Grid((-4.0,), (4.0,), (80,))
BEFORE = jnp.asarray([1.0, 0.5, 0.8, 99.0])  # rate, mean, noise, and the time at which it breaks
OU = SDE(
    lambda t, x, args: args[0] * (args[1] - x) * jnp.where(t > args[3], jnp.nan, 1.0),
    lambda t, x, args: args[2],
)


@partial(jax.jit, static_argnames=("sde", "grid"))
def evolve(sde, grid, p0, args=BEFORE, times=(0.0, 0.25, 1.0)):
    """One compilation for each SDE and grid."""
    t0, t, t1 = times
    return fp.evolve(sde, p0, grid, args, t0=t0, t1=t1, ts=jnp.stack([jnp.asarray(t)]), throw=False)


def normal(x, mean, variance):
    return jnp.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * np.pi * variance) ** 0.5


def ou_density(x, t):
    """Of ``OU`` at the rates of ``BEFORE``, from N(-1, 0.1)."""
    return normal(x, 0.5 - 1.5 * np.exp(-t), 0.1 * np.exp(-2 * t) + 0.32 * -np.expm1(-2 * t))


PLANE = fp.Grid((-3.0, -2.0), (3.0, 3.0), (7, 6))
STILL = SDE(  # noise on one side only, of one axis only
    lambda t, x, args: jnp.stack([jnp.cos(x[1]), -x[1]]),
    lambda t, x, args: jnp.stack([jnp.maximum(x[0], 0.0), jnp.zeros_like(x[0])]),
)


def test_generator_is_that_of_a_jump_process():
    """Columns that sum to zero, nothing negative beside the diagonal: mass and positivity for every p.

    For a diagonal and a scalar g that depend on x, and for one that is zero in places. A Gaussian at rest stays so.
    """
    sdes, t = (CURVED, WAVY, STILL), jnp.asarray(0.2)

    @jax.jit
    def matrices(basis):
        return [jax.vmap(lambda p, sde=sde: fp.generator(sde, PLANE)(t, p))(basis) for sde in sdes]

    for matrix in matrices(jnp.eye(42).reshape(42, 7, 6)):
        matrix = np.asarray(matrix).reshape(42, 42).T
        assert np.max(np.abs(matrix.sum(axis=0))) < 1e-14 * np.max(np.abs(matrix))
        assert np.min(matrix - np.diag(np.diag(matrix))) >= 0
        assert np.max(matrix) > 0.1
    rest = normal(fp.cells(LINE)[:, 0], 0.5, 0.32)
    assert np.max(np.abs(jax.jit(fp.generator(OU, LINE))(t, rest, BEFORE))) < 1e-12


UNEVEN = [  # noises that change much within a cell, or vanish in one or at one of its faces
    lambda x: x - 0.05,
    lambda x: x - 0.01,
    lambda x: x - 0.001,
    lambda x: 0.5 * x,
    lambda x: jnp.sqrt(jnp.maximum(x, 0)),
    lambda x: 10 * jnp.sqrt(jnp.maximum(x, 0)),
    lambda x: jnp.where(x > 0.03, 3.0, 0.0),
    lambda x: jnp.where(x > 0.0, 3.0, 0.1),
    lambda x: jnp.ones_like(x),
]


def test_mean_and_spread_of_the_jumps_where_the_noise_changes_within_a_cell():
    """dE[x]/dt is the mean of f for every p within the walls: to rounding for a constant f, and between f's values at
    a cell's faces for another. The variance grows by g^2 at least, less the h^2 / 2 of a drift that draws together, and
    by h |f| more at most, which bounds the rates.
    """
    grid, cell = fp.Grid((-1.0,), (1.0,), (20,)), 0.1
    x, inner = np.asarray(fp.cells(grid))[:, 0], slice(1, -1)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None, None))
    @partial(jax.vmap, in_axes=(None, 0, None))
    def matrices(slope, index, basis):
        sde = SDE(lambda t, x, args: 1 - slope * x, lambda t, x, args: jnp.stack([g(x) for g in UNEVEN])[index])
        return jax.vmap(lambda p: fp.generator(sde, grid)(T, p))(basis)

    slopes = jnp.asarray([0.0, 2.0])
    for slope, found in zip(slopes.tolist(), matrices(slopes, jnp.arange(len(UNEVEN)), jnp.eye(20)), strict=True):
        above, below = 1 - slope * (x + cell / 2), 1 - slope * (x - cell / 2)
        for noise, rates in zip(UNEVEN, np.asarray(found), strict=True):  # rates[from, to]
            mean = rates @ x
            assert np.all(mean[inner] > (np.minimum(above, below) - 1e-11)[inner])
            assert np.all(mean[inner] < (np.maximum(above, below) + 1e-11)[inner])
            spread, g2 = np.sum(rates * (x - x[:, None]) ** 2, axis=1), np.asarray(noise(jnp.asarray(x))) ** 2
            assert np.all(spread[inner] > (g2 + cell * (above - below) / 2 - 1e-11)[inner])
            assert np.all(spread < g2 + cell * np.maximum(np.abs(above), np.abs(below)) + 1e-11)
        if slope == 0:  # of the last noise, which is 1 everywhere: the spread that Evolution.peclet tells
            z = cell / 0.5
            np.testing.assert_allclose(spread[inner], z / 2 / np.tanh(z / 2), rtol=1e-12)


@pytest.mark.slow
def test_evolution_where_the_noise_vanishes_at_a_face():
    """dx = (1/2 - x) dt + x/2 dw, whose mean is known: a drift that is multiplied by nothing, in a solve that ends."""
    grid = fp.Grid((-0.3,), (2.7,), (30,))
    x = fp.cells(grid)[:, 0]
    sde = SDE(lambda t, x, args: 0.5 - x, lambda t, x, args: 0.5 * x)
    found = evolve(sde, grid, normal(x, 1.2, 0.04), None)
    for t, p in ((0.25, found.ps[0]), (1.0, found.p)):
        mean = float(jnp.sum(x * p) / jnp.sum(p))
        np.testing.assert_allclose(mean, 0.5 + 0.7 * np.exp(-t), atol=2e-3)
    assert int(found.num_steps) < 50


@pytest.mark.slow
def test_generator_is_the_right_side_to_second_order():
    """Against ``rhs`` at the centres, drift and diagonal noise depending on x."""
    log_p, t, errors = densities.log_density(mixture(2), VP), jnp.asarray(0.3), []

    @partial(jax.jit, static_argnums=0)
    def difference(grid, x):
        p = everywhere(lambda x: jnp.exp(log_p(t, x, None)), x)
        exact = everywhere(lambda x: fp.rhs(CURVED, log_p)(t, x), x)
        return jnp.max(jnp.abs(fp.generator(CURVED, grid)(t, p) - exact)[1:-1, 1:-1])  # not at the walls

    for num in (60, 120):
        grid = fp.Grid((-2.0, -2.0), (2.0, 2.0), (num, num))
        errors.append(float(difference(grid, fp.cells(grid))))
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 2, atol=0.15)


@pytest.mark.slow
def test_evolution_keeps_mass_and_sign_or_fails_aloud():
    """Ornstein-Uhlenbeck near its closed form, mass to 1e-13, nowhere negative; NaN and a status where it breaks."""
    x = fp.cells(LINE)[:, 0]
    found = evolve(OU, LINE, ou_density(x, 0.0))
    for t, p in ((0.25, found.ps[0]), (1.0, found.p)):
        assert abs(float(fp.mass(LINE, p) - fp.mass(LINE, ou_density(x, 0.0)))) < 1e-13
        assert np.min(p) >= 0
        np.testing.assert_allclose(p, ou_density(x, t), atol=0.01)
    assert float(found.wall) < 1e-9
    assert int(found.status) == solvers.OK
    fp.raise_if_too_coarse(found, LINE)

    broken = evolve(OU, LINE, ou_density(x, 0.0), BEFORE.at[3].set(0.5))
    assert int(broken.status) != solvers.OK
    assert np.all(np.isfinite(broken.ps[0]))
    assert np.all(np.isnan(broken.p))
    np.testing.assert_allclose(broken.t, 0.5, atol=1e-3)
    with pytest.raises(solvers.SolveError, match=r"stopped at t = 0\.\d* after \d+ steps: the step shrank"):
        fp.raise_if_too_coarse(broken, LINE)

    # more jumps than there is time for: at once, with the rate, g^2 / h^2
    endless = evolve(OU, LINE, ou_density(x, 0.0), BEFORE.at[2].set(1e9))
    assert int(endless.status) == solvers.FAILED
    assert np.all(np.isnan(endless.p))
    assert int(endless.num_steps) < 200
    with pytest.raises(solvers.SolveError, match=r"t = 0 after .* at a rate of up to 1e\+20 there.* raise max_jumps"):
        fp.raise_if_too_coarse(endless, LINE)

    # times that are no way at all, and times that are none
    still = evolve(OU, LINE, ou_density(x, 0.0), BEFORE, (0.5, 0.5, 0.5))
    np.testing.assert_allclose(still.p, ou_density(x, 0.0), rtol=1e-14)
    for times in ((0.0, 0.9, 0.5), (0.5, 0.9, 0.5), (0.0, 0.5, np.nan), (np.nan, 0.5, 1.0)):
        wrong = evolve(OU, LINE, ou_density(x, 0.0), BEFORE, times)
        assert np.all(np.isnan(wrong.p))
        with pytest.raises(solvers.SolveError, match="state is not finite"):
            fp.raise_if_too_coarse(wrong, LINE)


@pytest.mark.slow
def test_evolution_of_ornstein_uhlenbeck():
    """The closed form to second order in the spacing, and the histogram of paths.

    20,000 paths by 200 steps of Euler-Maruyama: chi^2 below its quantile of 1 - 1e-4, against the grid and against the
    closed form, which is the false-alarm rate of each.
    """
    errors = []
    for num in (80, 160):
        grid = fp.Grid((-4.0,), (4.0,), (num,))
        x = fp.cells(grid)[:, 0]
        found = evolve(OU, grid, ou_density(x, 0.0))
        errors.append([np.max(np.abs(p - ou_density(x, t))) for t, p in ((0.25, found.ps[0]), (1.0, found.p))])
    np.testing.assert_allclose(np.log2(np.divide(*errors)), 2, atol=0.1)
    assert errors[-1][-1] < 1e-3

    keys = jax.random.split(jax.random.key(1), (2, 20_000))
    start = jax.vmap(lambda key: -1.0 + 0.1**0.5 * jax.random.normal(key, (1,)))(keys[0])
    run = jax.vmap(lambda key, x: solvers.euler_maruyama(key, OU, x, BEFORE, t0=0.0, t1=1.0, num_steps=200))
    counts = np.histogram(np.asarray(jax.jit(run)(keys[1], start)), np.linspace(-4, 4, 161))[0]
    for p in (found.p, ou_density(x, 1.0)):
        assert_same_counts(counts, np.asarray(p))


def assert_same_counts(counts, masses, false_alarm=1e-4):
    """Pearson's chi^2 of counts and masses in cells, neighbours merged until every bin expects 100 or more."""
    total = counts.sum()
    bins, seen, due = [], 0.0, 0.0
    for n, m in zip(counts.ravel(), total * masses.ravel() / masses.sum(), strict=True):
        seen, due = seen + n, due + m
        if due >= 100:
            bins.append((seen, due))
            seen, due = 0.0, 0.0
    bins[-1] = (bins[-1][0] + seen, bins[-1][1] + due)
    seen, due = np.transpose(bins)
    assert len(seen) > 10
    assert np.sum((seen - due) ** 2 / due) < chi2.isf(false_alarm, len(seen) - 1)


@pytest.mark.slow
def test_evolution_is_the_exponential_of_the_generator():
    """Where nothing depends on time there is no error in time: SciPy's matrix exponential."""
    grid = fp.Grid((-3.0, -2.0), (3.0, 3.0), (7, 6))
    sde = SDE(lambda t, x, args: -args * x, lambda t, x, args: NOISE)
    p0 = jax.random.uniform(jax.random.key(0), (7, 6))
    field, args = fp.generator(sde, grid), jnp.asarray([1.0, 0.3])
    flat = lambda p: field(jnp.asarray(0.0), p.reshape(7, 6), args).reshape(-1)  # noqa: E731
    matrix = jax.jit(jax.jacfwd(flat))(jnp.zeros(42))
    found = evolve(sde, grid, p0, args, (0.0, 0.5, 2.0))
    np.testing.assert_allclose(found.p.reshape(-1), expm(2.0 * np.asarray(matrix)) @ np.asarray(p0).ravel(), rtol=1e-12)
    np.testing.assert_allclose(fp.mass(grid, found.p), fp.mass(grid, p0), rtol=1e-13)


SWINGING = SDE(lambda t, x, args: 3 * jnp.cos(6 * t) - x, lambda t, x, args: 0.7 + 0.3 * jnp.sin(5 * t))


@pytest.mark.slow
def test_evolution_is_of_second_order_in_time():
    """Drift and noise that change in time: equal steps against tight tolerances on one grid; positive at every step."""
    p0 = normal(fp.cells(LINE)[:, 0], 0.0, 0.2)

    @jax.jit
    @chex.assert_max_traces(1)
    def steps(dt):
        options = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": dt}
        return fp.evolve(SWINGING, p0, LINE, t0=0.0, t1=1.0, throw=False, **options)

    @jax.jit
    def adaptive(rtol):
        return fp.evolve(SWINGING, p0, LINE, t0=0.0, t1=1.0, rtol=rtol, atol=0.1 * rtol, throw=False)

    tight, loose = adaptive(jnp.asarray(1e-8)), adaptive(jnp.asarray(1e-5))
    found = [steps(jnp.asarray(1.0 / n)) for n in (1, 10, 20, 40)]
    errors = [np.max(np.abs(one.p - tight.p)) for one in found]
    np.testing.assert_allclose(np.log2(np.divide(errors[1:-1], errors[2:])), 2, atol=0.1)
    for one in found:
        assert np.min(one.p) >= 0
        assert abs(float(fp.mass(LINE, one.p) - fp.mass(LINE, p0))) < 1e-13
        fp.raise_if_too_coarse(one, LINE)
    assert np.max(np.abs(loose.p - tight.p)) < 1e-3 * np.max(tight.p)


@pytest.mark.slow
def test_an_implicit_solver_agrees():
    """Kvaerno's of order 5 on the same grid, by Diffrax, to its tolerance; it too keeps mass."""
    p0 = normal(fp.cells(LINE)[:, 0], 0.0, 0.2)
    tight = fp.evolve(SWINGING, p0, LINE, t0=0.0, t1=1.0, rtol=1e-7, atol=1e-8)
    options = {"rtol": 1e-7, "atol": 1e-8, "solver": diffrax.Kvaerno5()}
    implicit = fp.evolve(SWINGING, p0, LINE, t0=0.0, t1=1.0, **options)
    np.testing.assert_allclose(implicit.p, tight.p, atol=1e-5)
    assert abs(float(fp.mass(LINE, implicit.p) - fp.mass(LINE, p0))) < 1e-9
    assert np.min(implicit.p) > -1e-8


@pytest.mark.slow
def test_evolution_in_single_precision():
    p0 = normal(fp.cells(LINE, dtype=jnp.float32)[:, 0], -1.0, 0.1)
    found = evolve(OU, LINE, p0, BEFORE.astype(jnp.float32))
    assert found.p.dtype == jnp.float32
    assert abs(float(fp.mass(LINE, found.p)) - float(fp.mass(LINE, p0))) < 2e-6
    assert np.min(found.p) >= 0
    np.testing.assert_allclose(found.p, ou_density(fp.cells(LINE)[:, 0], 1.0), atol=0.01)


def plane(num):
    return fp.Grid((-6.0, -6.0), (6.0, 6.0), (num, num))


def oracle_on(grid, t):
    log_p = densities.log_density(mixture(2), VP)
    return jax.jit(partial(everywhere, lambda x: jnp.exp(log_p(jnp.asarray(t), x, None))))(fp.cells(grid))


@pytest.mark.slow
def test_evolution_of_a_rotated_mixture_in_the_plane():
    """The closed form, mass, positivity in 2-D; the reverse SDE brings the density back to where it came from."""
    grid = plane(48)
    p0, p1 = oracle_on(grid, 0.02), oracle_on(grid, 0.3)
    sde, score = sdes.diffusion_process(VP), densities.score(mixture(2), VP)
    found = evolve(sde, grid, p0, None, (0.02, 0.1, 0.3))
    back = evolve(sdes.reverse(sde, score), grid, p1, None, (0.3, 0.1, 0.02))
    for p, start, exact in ((found.p, p0, p1), (back.p, p1, p0), (found.ps[0], p0, oracle_on(grid, 0.1))):
        assert np.max(np.abs(p - exact)) < 0.05 * np.max(exact)
        assert abs(float(fp.mass(grid, p) - fp.mass(grid, start))) < 1e-13
        assert np.min(p) >= 0
    np.testing.assert_allclose(found.t, 0.3, rtol=1e-12)
    np.testing.assert_allclose(back.t, 0.02, rtol=1e-12)
    assert np.all(np.asarray(found.width) > 1)
    assert np.all(np.asarray(found.peclet) < 2)
    assert 0 < float(found.wall) < 1e-3


@pytest.mark.slow
def test_grid_paths_flow_and_closed_form_agree_in_the_plane():
    """One p_t four ways at t = 0.3: the grid (order 2 in the spacing), 20,000 paths of the SDE, as many of the
    probability flow from the same start, and the closed form; chi^2 with a false-alarm rate of 1e-4 each.
    """
    sde, score = sdes.diffusion_process(VP), densities.score(mixture(2), VP)
    errors = []
    for num in (40, 80):
        grid = plane(num)
        found = evolve(sde, grid, oracle_on(grid, 0.0), None, (0.0, 0.1, 0.3))
        errors.append(np.max(np.abs(found.p - oracle_on(grid, 0.3))))
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 2, atol=0.1)

    flow = sdes.probability_flow(sde, score)
    keys = jax.random.split(jax.random.key(3), 20_000)
    start = densities.sample(jax.random.key(2), mixture(2), 20_000)
    run = jax.vmap(lambda key, x: solvers.euler_maruyama(key, sde, x, t0=0.0, t1=0.3, num_steps=200))
    carry = jax.vmap(lambda x: solvers.odeint(flow, x, t0=0.0, t1=0.3, rtol=1e-5, atol=1e-5, throw=False))
    edges = np.linspace(-6, 6, 81)
    for ends in (jax.jit(run)(keys, start), jax.jit(carry)(start)):
        counts = np.histogram2d(*np.asarray(ends).T, bins=(edges, edges))[0]
        for p in (found.p, oracle_on(grid, 0.3)):
            assert_same_counts(counts, np.asarray(p))


@pytest.mark.slow
def test_width_of_a_correlated_gaussian_is_that_with_the_rest_held():
    """1 / sqrt(precision_ii), here half of the marginal deviations; no time passes."""
    precision = jnp.asarray([[4.0, 3.0], [3.0, 3.0]])
    grid = fp.Grid((-7.0, -7.0), (7.0, 7.0), (140, 112))
    p = everywhere(lambda x: jnp.exp(-0.5 * x @ precision @ x), fp.cells(grid))
    found = evolve(SDE(lambda t, x, args: -x, lambda t, x, args: 1.0), grid, p, None, (0.5, 0.5, 0.5))
    width = np.asarray(found.width) * fp.spacing(grid)
    np.testing.assert_allclose(width, np.diagonal(precision) ** -0.5, rtol=0.01)
    assert np.all(width < 0.55 * np.diagonal(np.linalg.inv(precision)) ** 0.5)


@pytest.mark.slow
def test_walls_that_stand_in_the_way_are_seen():
    narrow = fp.Grid((-2.0,), (0.2,), (22,))  # the mean goes from -1 to -0.05
    p0 = ou_density(fp.cells(narrow)[:, 0], 0.0)
    found = evolve(OU, narrow, p0)
    assert float(found.wall) > 0.1
    np.testing.assert_allclose(fp.mass(narrow, found.p), fp.mass(narrow, p0), rtol=1e-13)


@pytest.mark.slow
def test_a_grid_too_coarse_says_which_spacing_is_needed():
    """For the start, for what becomes of it, and for the noise; with as many cells as it names all is well."""

    def attempt(num, start, rate, mean, noise):
        grid = fp.Grid((-4.0,), (4.0,), (num,))
        p0 = normal(fp.cells(grid)[:, 0], *start)
        found = evolve(OU, grid, p0, jnp.asarray([rate, mean, noise, 99.0]), (0.0, 0.1, 0.3))
        fp.raise_if_too_coarse(found, grid)
        return found

    cases = {
        "at t0, ts or t1: on axis 0 it has structure": ((0.0, 0.32), 20.0, 0.0, 0.7),
        "the cell Peclet number": ((-2.0, 0.2), 1.0, 0.5, 0.15),
    }
    needed = 0
    for message, case in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            attempt(32, *case)
        assert "too coarse for the" in str(error.value)
        needed = max(needed, int(re.search(r"(\d+) cells or more", str(error.value))[1]))
    for case in cases.values():
        attempt(needed, *case)
    with pytest.raises(ValueError, match="There is no noise on that axis"):
        attempt(32, (0.0, 0.32), 1.0, 0.5, 0.0)


@pytest.mark.slow
def test_a_solve_that_fails_outside_of_jit_is_an_error():
    with pytest.raises(solvers.SolveError, match=r"stopped at t = 0\.\d* after"):
        attempt_now(args=BEFORE.at[3].set(0.5))


def attempt_now(density=None, **options):
    """Not jitted, so that it can raise."""
    density = ou_density(fp.cells(LINE)[:, 0], 0.0) if density is None else density
    return fp.evolve(OU, density, LINE, **{"args": BEFORE, "t0": 0.0, "t1": 1.0, **options})


def told(width, peclet):
    """What is raised for a record with these numbers."""
    nothing, ok = jnp.zeros(()), jnp.int32(solvers.OK)
    numbers = jnp.asarray([width]), jnp.asarray([peclet])
    fp.raise_if_too_coarse(fp.Evolution(nothing, ok, nothing, ok, nothing, *numbers), LINE)


def failed(*statuses):
    """What is raised for a batch of records with these statuses."""
    status, zeros, ones = jnp.asarray(statuses, jnp.int32), jnp.zeros(len(statuses)), jnp.ones((len(statuses), 1))
    where = jnp.where(status == solvers.OK, 1.0, 0.25)
    record = fp.Evolution(
        zeros, status, where, jnp.full_like(status, 7), zeros, 3 * ones, ones, None, None, 5e3 + zeros
    )
    fp.raise_if_too_coarse(record, LINE)


NARROW = normal(fp.cells(LINE)[:, 0], 0.05, 0.001)


def constant(t, x, args):
    return jnp.zeros_like(x)


T, X = jnp.asarray(0.5), jnp.zeros(2)
MATRIX = SDE(constant, lambda t, x, args: jnp.eye(2))
SINGLE, ONES = X.astype(jnp.float32), jnp.ones(80, jnp.float32)


def wide(t, x, args):
    return jnp.zeros(x.shape, jnp.float64)


WIDE_DRIFT, WIDE_NOISE = SDE(wide, lambda t, x, args: 1.0), SDE(constant, lambda t, x, args: jnp.float64(1.0))


def test_numbers_without_a_dtype_take_that_of_x():
    """A diffusion may be a Python number, whole or not; in single precision as well."""
    for dtype in (jnp.float32, jnp.float64):
        x = jnp.asarray([0.3, -0.8], dtype)
        kinds = (2, 2.0, np.float64(2.0), jnp.asarray(2.0), jnp.asarray(2.0, dtype), jnp.full(2, 2.0, dtype))
        fields = [fp.rhs_log(SDE(constant, lambda t, x, args, g=g: g), quadratic) for g in kinds]
        values = jax.jit(lambda x, fields=fields: [field(T, x) for field in fields])(x)
        assert {value.dtype for value in values} == {jnp.dtype(dtype)}
        np.testing.assert_allclose(values, 2 * (-2 + 0.73), rtol=1e-6)  # 1/2 g^2 (lap log p + |s|^2)


def quadratic(t, x, args):
    return -0.5 * jnp.sum(x**2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attempt_now(NARROW), ValueError, "too coarse for the density at t0 = 0: on axis 0 it has structure"),
        (
            lambda: told(0.5, 1.0),
            ValueError,
            r"structure about 0\.05 wide and a spacing of 0\.1\. Use .* 320 cells or more",
        ),
        (lambda: told(3.0, 8.0), ValueError, r"for the noise: .* is 8 .* Use a spacing of at most 0\.025 .* 320 cells"),
        (lambda: fp.rhs(OU, constant)(T, X), ValueError, r"log_density must return a scalar \[\], got shape \(2,\)"),
        (lambda: fp.residual(OU, constant)(T, X), ValueError, r"use jax.vmap over a batch"),
        (lambda: fp.residual(OU, constant)(jnp.zeros(3), X), ValueError, r"t must be one time of shape \(\)"),
        (lambda: fp.residual(OU, constant)(T, jnp.arange(2)), TypeError, "x must be an array of floats"),
        (lambda: fp.score_residual(OU, lambda t, x, a: x[:1])(T, X), ValueError, r"score must return the shape of x"),
        (lambda: fp.score_residual(MATRIX, constant)(T, X), ValueError, "full matrices are not supported"),
        (lambda: fp.cells(fp.Grid((0.0,), (1.0,), (2,))), ValueError, "grid.num must be whole numbers of at least 3"),
        (lambda: fp.spacing(fp.Grid((1.0,), (1.0,), (9,))), ValueError, "grid.low must be below grid.high"),
        (lambda: fp.spacing(fp.Grid((0.0,), (1.0, 2.0), (9,))), ValueError, "one of each for every axis"),
        (lambda: fp.cells(fp.Grid(0.0, 1.0, 9)), TypeError, "tuples of Python numbers"),
        (lambda: fp.mass(LINE, jnp.zeros(3)), ValueError, r"p has shape \(3,\), but the grid has \(80,\) cells"),
        (lambda: fp.generator(OU, LINE)(T, jnp.zeros(3)), ValueError, r"p has shape \(3,\)"),
        (
            lambda: attempt_now(jnp.zeros((3, 3))),
            ValueError,
            r"density has shape \(3, 3\), but the grid has \(80,\) cells",
        ),
        (lambda: attempt_now(-jnp.ones(80)), ValueError, "density must be finite, nowhere negative"),
        (lambda: attempt_now(jnp.full(80, jnp.nan)), ValueError, "density must be finite"),
        (lambda: attempt_now(jnp.zeros(80)), ValueError, "not zero everywhere"),
        (lambda: attempt_now(jnp.ones(80, int)), TypeError, "density must be an array of floats"),
        (lambda: attempt_now(ts=jnp.asarray([0.5, 0.2])), ValueError, "ts must go from t0 = 0.0 to t1 = 1.0 in order"),
        (lambda: attempt_now(ts=jnp.asarray([0.5, 1.2])), ValueError, "in order"),
        (lambda: attempt_now(ts=jnp.asarray(0.5)), ValueError, "ts must be a list of times"),
        (lambda: attempt_now(t1=jnp.ones(2)), ValueError, "t1 must be one time"),
        (
            lambda: attempt_now(t0=0.5, t1=0.5, ts=jnp.asarray([0.9])),
            ValueError,
            "ts must go from t0 = 0.5 to t1 = 0.5",
        ),
        (lambda: attempt_now(t0=1.0, t1=0.0, ts=jnp.asarray([0.2, 0.5])), ValueError, "in order"),
        (lambda: attempt_now(ts=jnp.asarray([0.2, jnp.nan])), ValueError, r"ts must be finite, got \[0.2 nan\]"),
        (lambda: attempt_now(t0=jnp.nan), ValueError, "t0 must be finite, got nan"),
        (lambda: attempt_now(t1=jnp.inf), ValueError, "t1 must be finite, got inf"),
        (lambda: attempt_now(max_jumps=0), ValueError, "max_jumps must be positive, got 0"),
        (
            lambda: failed(solvers.OK, solvers.MAX_STEPS),
            solvers.SolveError,
            r"of element 1 stopped at t = 0\.25 after 7",
        ),
        (
            lambda: failed(solvers.OK, solvers.FAILED),
            solvers.SolveError,
            r"of element 1 stopped.* rate of up to 5e\+03",
        ),
        (lambda: failed(solvers.NONFINITE), solvers.SolveError, r"element 0 .* the state is not finite"),
        (
            lambda: fp.generator(WIDE_DRIFT, LINE)(T, ONES),
            TypeError,
            "sde.drift returned dtype float64 for x of float32",
        ),
        (lambda: fp.generator(WIDE_NOISE, LINE)(T, ONES), TypeError, "sde.diffusion returned dtype float64"),
        (lambda: fp.evolve(WIDE_DRIFT, ONES, LINE, t0=0.0, t1=1.0), TypeError, "sde.drift returned dtype float64"),
        (lambda: fp.rhs_log(WIDE_NOISE, lambda t, x, a: jnp.sum(x))(T, SINGLE), TypeError, "sde.diffusion returned"),
        (lambda: fp.rhs_log(OU, lambda t, x, a: jnp.float64(0))(T, SINGLE), TypeError, "log_density returned dtype"),
        (lambda: fp.score_residual(WIDE_NOISE, wide)(T, SINGLE), TypeError, "score returned dtype float64"),
        (
            lambda: fp.continuity_residual(wide, lambda t, x, a: jnp.sum(x))(T, SINGLE),
            TypeError,
            "velocity returned dtype float64",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
