"""Densities and likelihoods of flows against closed form: a linear field, and the probability flow of mixtures."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close
from scipy.linalg import expm, expm_frechet
from scipy.stats import norm
from targets import SCHEDULES, rotated_mixture, switched

from dgm_jax import densities, divergence, flows, probes, solvers

slow = pytest.mark.slow

A = jnp.array([[-0.3, 0.9, 0.1], [-0.5, 0.2, 0.4], [0.3, -0.2, -0.6]])
X = jnp.array([0.3, -1.0, 0.7])
TIMES = {"t_data": 0.0, "t_base": 1.0}
TIGHT = {**TIMES, "rtol": 1e-10, "atol": 1e-10}


def linear(t, x, a):
    return a @ x


def exact_log_prob(a, x):
    """log p of the linear flow: the base at z = exp(A) x, and exp(tr A) by Jacobi's formula; by SciPy."""
    a, x = np.asarray(a), np.asarray(x)
    return norm.logpdf(expm(a) @ x).sum() + np.trace(a)


def exact_gradients(a, x):
    """Of that, in A and x: -L(A^T, z x^T) + I, L Frechet's derivative of exp, and -exp(A)^T z."""
    a, x = np.asarray(a), np.asarray(x)
    z = expm(a) @ x
    return np.eye(len(x)) - expm_frechet(a.T, np.outer(z, x), compute_expm=False), -expm(a).T @ z


ADJOINTS = {
    "recursive checkpoint": None,
    "direct": diffrax.DirectAdjoint(),
    "backsolve": diffrax.BacksolveAdjoint(),
}


@pytest.mark.parametrize(
    "adjoint", ["recursive checkpoint", *(pytest.param(name, marks=slow) for name in ("direct", "backsolve"))]
)
def test_log_prob_of_a_linear_flow_and_its_gradients(adjoint):
    def log_prob(a, x):
        return flows.log_prob(linear, x, a, adjoint=ADJOINTS[adjoint], **TIGHT)

    solved = jax.value_and_grad(log_prob, (0, 1))(A, X)
    assert_trees_all_close(solved, (exact_log_prob(A, X), exact_gradients(A, X)), atol=1e-8)


@pytest.mark.slow
def test_forward_mode_gradient_of_log_prob():
    forward = jax.jacfwd(lambda a: flows.log_prob(linear, X, a, adjoint=diffrax.ForwardMode(), **TIGHT))
    assert_trees_all_close(jax.jit(forward)(A), exact_gradients(A, X)[0], atol=1e-8)


@slow
@pytest.mark.parametrize("adjoint", ["recursive checkpoint", "backsolve"])
def test_a_batch_in_one_solve_and_its_gradient(adjoint):
    batch = jax.random.normal(jax.random.key(0), (5, 3))

    def solved(a):
        return jnp.mean(flows.log_prob_batch(linear, batch, a, adjoint=ADJOINTS[adjoint], **TIGHT))

    value = np.mean([exact_log_prob(A, x) for x in batch])
    gradient = np.mean([exact_gradients(A, x)[0] for x in batch], axis=0)
    assert_trees_all_close(jax.value_and_grad(solved)(A), (value, gradient), atol=1e-8)


@pytest.mark.slow
def test_a_batch_reports_its_evaluations():
    batch = jax.random.normal(jax.random.key(0), (5, 3))
    log_p, nfe = flows.log_prob_batch(linear, batch, A, with_nfe=True, **TIMES)
    assert_trees_all_close(log_p, np.stack([exact_log_prob(A, x) for x in batch]), atol=1e-4)
    steps = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1, "solver": diffrax.Euler()}
    assert int(flows.log_prob_batch(linear, batch, A, with_nfe=True, **steps, **TIMES)[1]) == 10
    assert (int(nfe) - 1) % 6 == 0  # Tsit5: six evaluations a step, and the first


@pytest.mark.slow
def test_probes_of_a_batch_are_each_examples_own():
    batch = jax.random.normal(jax.random.key(0), (4, 3))
    own = jax.vmap(lambda key: probes.rademacher(key, X, 2))(jax.random.split(jax.random.key(1), 4))
    together = flows.log_prob_batch(linear, batch, A, probes=own, **TIGHT)
    # for a linear field the estimate is known too: exp's trace by the two probes
    estimate = np.einsum("bki,ij,bkj->bk", own, A, own).mean(axis=1)
    base = norm.logpdf(np.asarray(batch) @ expm(np.asarray(A)).T).sum(axis=1)
    assert_trees_all_close(together, base + estimate, atol=1e-8)


def test_sampling_is_the_inverse_and_has_its_density():
    z = jnp.array([0.5, 0.1, -1.2])
    x, log_p = flows.sample_and_log_prob(linear, z, A, **TIGHT)
    assert_trees_all_close(x, expm(-np.asarray(A)) @ z, atol=1e-8)
    assert_trees_all_close(flows.sample(linear, z, A, **TIGHT), x, atol=1e-9)
    assert_trees_all_close(log_p, exact_log_prob(A, x), atol=1e-8)


@pytest.mark.slow
def test_a_generative_direction_is_the_same_function():
    """Base at 0 and data at 1, as in a continuous normalizing flow: the field of the other direction, turned."""
    value = flows.log_prob(lambda t, x, a: -a @ x, X, A, t_data=1.0, t_base=0.0, rtol=1e-10, atol=1e-10)
    assert_trees_all_close(value, exact_log_prob(A, X), atol=1e-8)


@pytest.mark.slow
def test_images_are_events_too():
    x = jax.random.normal(jax.random.key(0), (2, 3, 2))
    value = flows.log_prob(lambda t, x, a: a * x, x, jnp.asarray(0.4), **TIGHT)
    expected = norm.logpdf(np.asarray(x) * np.exp(0.4)).sum() + 0.4 * x.size
    assert_trees_all_close(value, expected, atol=1e-8)


@functools.cache
def exact_probability_flow(dim, dtype, tolerance):
    """The likelihood by probability flow, from the exact velocity to the exact p_1, at 16 draws of a mixture.

    Returns a compiled function of the schedule's index, and the oracle's own log p.
    """
    density = rotated_mixture(dim, dtype)
    x = densities.sample(jax.random.key(1), density, 16)

    @jax.jit
    def solve(index):
        schedule = switched(index)
        velocity = densities.velocity(density, schedule)
        last = densities.diffuse(density, schedule, jnp.ones((), dtype))
        options = {"rtol": tolerance, "atol": tolerance, "log_base": lambda z: densities.log_prob(last, z)}
        return jax.vmap(lambda x: flows.likelihood(velocity, x, **options, **TIMES))(x)

    return solve, jax.vmap(lambda x: densities.log_prob(density, x))(x)


@pytest.mark.parametrize("dim", [2, pytest.param(5, marks=slow)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_log_prob_by_probability_flow(name, dim):
    """float64: 1e-6 nat at tolerance 1e-9, and the reported solver error bounds the true one."""
    solve, truth = exact_probability_flow(dim, jnp.float64, 1e-9)
    found = solve(list(SCHEDULES).index(name))
    error = jnp.abs(found.log_prob - truth)
    assert float(error.max()) <= 1e-6
    assert jnp.all(error <= found.solver_error)
    assert jnp.all(found.stderr == 0)


@slow
@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_log_prob_in_float32_at_default_tolerances(name, dim):
    solve, truth = exact_probability_flow(dim, jnp.float32, 1e-5)
    found = solve(list(SCHEDULES).index(name))
    assert found.log_prob.dtype == jnp.float32
    error = jnp.abs(found.log_prob - truth)
    assert float(error.max()) <= 2e-3
    assert jnp.sum(error > found.solver_error) <= 1  # the estimate knows nothing of rounding


@slow
def test_two_sigma_intervals_cover_the_truth():
    """Of 400 points of a 5-D mixture, 90 to 99 per cent lie within two reported errors (16 probes each).

    With a true coverage of 95 per cent, that of Student's t with 15 degrees of freedom at 2 being 93.6, the
    chance of falling outside of 90 to 99 is below 2e-3.
    """
    density, schedule = rotated_mixture(5), SCHEDULES["vp"]
    velocity = densities.velocity(density, schedule)
    last = densities.diffuse(density, schedule, jnp.ones(()))
    x = densities.sample(jax.random.key(2), density, 400)
    own = jax.vmap(lambda key: probes.rademacher(key, x[0], 16))(jax.random.split(jax.random.key(3), 400))
    solve = jax.jit(
        jax.vmap(
            lambda x, e: flows.likelihood(
                velocity, x, probes=e, log_base=lambda z: densities.log_prob(last, z), **TIMES
            )
        )
    )
    found = solve(x, own)
    truth = jax.vmap(lambda x: densities.log_prob(density, x))(x)
    covered = jnp.mean(jnp.abs(found.log_prob - truth) <= 2 * found.error)
    assert 0.90 <= float(covered) <= 0.99
    assert float(jnp.median(found.stderr)) > 10 * float(jnp.median(found.solver_error))
    # unbiased: the mean error over all points within 4 of its own standard errors
    error = found.log_prob - truth
    assert abs(float(error.mean())) < 4 * float(error.std()) / 20


def test_solver_error_is_reported_for_equal_steps_too():
    steps = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1, "solver": diffrax.Heun()}
    found = flows.likelihood(linear, X, A, **steps, **TIMES)
    error = abs(float(found.log_prob - exact_log_prob(A, X)))
    assert error <= float(found.solver_error) <= 20 * error
    assert int(found.nfe) == 20


@slow
def test_log_prob_of_a_point_does_not_depend_on_its_batch():
    """Per example the same to rounding; inside one solve by about the tolerance, as documented."""
    density, schedule = rotated_mixture(2), SCHEDULES["vp"]
    velocity = densities.velocity(density, schedule)
    x = densities.sample(jax.random.key(2), density, 8)
    far = x.at[1:].multiply(5.0)
    options = {**TIMES, "rtol": 1e-3, "atol": 1e-3}
    per_example = jax.jit(jax.vmap(lambda x: flows.log_prob(velocity, x, **options)))
    alone = flows.log_prob(velocity, x[0], **options)
    assert_trees_all_close(per_example(x)[0], per_example(far)[0], rtol=1e-13)
    assert_trees_all_close(per_example(x)[0], alone, rtol=1e-12)
    shared = jax.jit(lambda x: flows.log_prob_batch(velocity, x, **options))
    assert abs(float(shared(x)[0] - shared(far)[0])) > 1e-6


def test_a_repeated_call_compiles_nothing(capfd):
    with jax.log_compiles():
        flows.log_prob(linear, X, A, rtol=1e-4, **TIMES)
        capfd.readouterr()
        flows.log_prob(linear, 2 * X, A, rtol=1e-5, **TIMES)
        assert "Compiling" not in capfd.readouterr().err


@slow
def test_chunked_and_stochastic_divergences_are_interchangeable():
    """With as many orthogonal probes as dimensions, Hutchinson's estimate is the trace itself."""
    basis = probes.orthogonal(jax.random.key(0), X, 3)
    exact = flows.log_prob(linear, X, A, **TIGHT)
    chunked = flows.log_prob(linear, X, A, divergence=divergence.exact_in_chunks(2), **TIGHT)
    stochastic = flows.log_prob(linear, X, A, probes=basis, **TIGHT)
    assert_trees_all_close((chunked, stochastic), (exact, exact), atol=1e-9)


# ---- bad input


@pytest.mark.parametrize("function", [flows.log_prob, flows.likelihood, flows.sample, flows.sample_and_log_prob])
def test_equal_times(function):
    with pytest.raises(ValueError, match=r"t_data and t_base are both 1\.0"):
        function(linear, X, A, t_data=1.0, t_base=1.0)


@pytest.mark.parametrize(
    ("function", "kwargs", "error", "message"),
    [
        (flows.log_prob, {"x": jnp.arange(3)}, TypeError, r"x must be an array of floats, got dtype int.*astype"),
        (flows.log_prob, {"probes": jnp.ones(3)}, ValueError, r"probes has shape \(3,\).*rademacher"),
        (flows.log_prob, {"probes": jnp.ones((4, 2))}, ValueError, r"probes has shape \(4, 2\)"),
        (flows.log_prob, {"probes": jnp.ones((4, 3), jnp.float32)}, TypeError, "probes has dtype float32"),
        (flows.log_prob, {"divergence": divergence.hutchinson}, ValueError, "probes is None"),
        (flows.log_prob_batch, {"x": X[None], "probes": jnp.ones((4, 3))}, ValueError, "one set for each example"),
        (flows.log_prob_batch, {"x": jnp.zeros((0, 3))}, ValueError, "at least one example"),
        (flows.likelihood, {"probes": jnp.ones((1, 3))}, ValueError, "no standard error.*num=2"),
        (flows.likelihood, {"stepsize_controller": diffrax.StepTo(jnp.linspace(0, 1, 5))}, ValueError, "loosening"),
        (flows.log_prob, {"x": X.at[0].set(jnp.nan)}, solvers.SolveError, "initial state is not finite"),
        (flows.log_prob, {"max_steps": 2}, solvers.SolveError, "max_steps"),
        (flows.log_prob, {"stepsize_controller": diffrax.ConstantStepSize()}, ValueError, "dt0 is None"),
        (flows.log_prob, {"log_base": lambda z: z}, ValueError, "log_base must return a scalar"),
    ],
)
def test_bad_input(function, kwargs, error, message):
    kwargs = {"x": X, "t_data": 0.0, "t_base": 1.0, **kwargs}
    with pytest.raises(error, match=message):
        function(linear, kwargs.pop("x"), A, **kwargs)


def test_a_batch_where_one_example_is_meant():
    density, schedule = rotated_mixture(2), SCHEDULES["vp"]
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        flows.log_prob(densities.velocity(density, schedule), jnp.zeros((7, 2)), **TIMES)


def test_without_throw_a_failure_is_nan():
    assert jnp.isnan(flows.log_prob(linear, X, A, max_steps=2, throw=False, **TIMES))
    found = flows.likelihood(linear, X, A, max_steps=2, throw=False, **TIMES)
    assert np.isnan(found.log_prob)
    assert int(found.status) == solvers.MAX_STEPS
