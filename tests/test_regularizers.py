"""Penalties on paths against closed form: linear fields, whose integrals are matrix exponentials, and given paths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from dgm_jax import flows, networks, quadrature, regularizers

A = np.asarray([[0.3, -0.9, 0.2], [0.7, -0.4, 0.5], [-0.1, 0.6, 0.8]])
X = jnp.asarray([0.4, -1.1, 0.7])
SIGNS = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=3)))
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def linear(t, x, a):
    return a @ x


def energy(a, x, time):
    """int_0^time |A e^(At) x|^2 dt, by Van Loan's block exponential."""
    d = len(a)
    block = np.block([[-a.T, a.T @ a], [np.zeros((d, d)), a]])
    e = scipy.linalg.expm(block * time)
    return x @ e[d:, d:].T @ e[:d, d:] @ x


@pytest.mark.parametrize("rule", [None, quadrature.gauss_legendre(10)], ids=["in the solve", "at nodes"])
@pytest.mark.parametrize(("t_data", "t_base"), [(1.5, 0.0), (0.0, 1.5)])
def test_penalized_log_likelihood_of_a_linear_field(t_data, t_base, rule):
    """Exactly, and with all sign vectors: their mean is exact for the trace and for the squared norm alike."""
    weights = {"kinetic": 0.3, "jacobian": 0.2}
    divergence = regularizers.penalized(**weights, t_data=t_data, t_base=t_base)
    times = {"t_data": t_data, "t_base": t_base}

    def both(a, x):
        plain = flows.log_prob(linear, x, a, **times, **TIGHT)
        exact, probed = (
            flows.log_prob(linear, x, a, divergence=divergence, probes=e, rule=rule, **times, **TIGHT)
            for e in (None, SIGNS)
        )
        return plain, exact, probed

    plain, exact, probed = jax.jit(both)(jnp.asarray(A), X)
    forwards = A if t_base > t_data else -A  # from the data on, in time counted forwards
    penalty = 0.3 * energy(forwards, np.asarray(X), 1.5) + 0.2 * np.sum(A**2) * 1.5
    assert penalty > 0.5
    np.testing.assert_allclose([exact, probed], plain - penalty, rtol=1e-7)


def test_penalties_have_gradients():
    """d/da of the penalty of v = a x: kinetic a^2 int x^2 e^(2at) = a x^2 (e^(2a) - 1) / 2, jacobian a^2."""
    divergence = regularizers.penalized(kinetic=1.0, jacobian=0.5, t_data=0.0, t_base=1.0)

    def penalty(a):
        f, x = lambda t, x, a: a * x, jnp.asarray([0.8])
        options = {"t_data": 0.0, "t_base": 1.0, **TIGHT}
        return flows.log_prob(f, x, a, **options) - flows.log_prob(f, x, a, divergence=divergence, **options)

    def closed(a):
        return a * 0.64 * (jnp.exp(2 * a) - 1) / 2 + 0.5 * a**2

    got, wanted = jax.jit(jax.value_and_grad(penalty))(jnp.asarray(0.7)), jax.value_and_grad(closed)(0.7)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_total_derivatives(order):
    """x' = A x: A^K x. x' = cos(t) x: derivatives of exp(sin t), to which x is proportional."""
    got = regularizers.total_derivative(linear, order)(jnp.asarray(0.3), X, jnp.asarray(A))
    np.testing.assert_allclose(got, np.linalg.matrix_power(A, order) @ X, rtol=1e-12)
    t, path = jnp.asarray(0.6), lambda t: jnp.exp(jnp.sin(t))
    wanted = path
    for _ in range(order):
        wanted = jax.grad(wanted)
    got = regularizers.total_derivative(lambda t, x, _: jnp.cos(t) * x, order)(t, path(t), None)
    np.testing.assert_allclose(got, wanted(t), rtol=1e-12)


def test_total_derivatives_of_a_network_cost_few_evaluations():
    """The same numbers as by Taylor series, and of the operations no more than the docstring says."""
    taylor = pytest.importorskip("jax.experimental.jet")
    net = networks.MLP((32, 32), jnp.tanh, last_init=jax.nn.initializers.lecun_normal(), param_dtype=float)
    t, x = jnp.asarray(0.3), jnp.asarray([0.4, -1.1, 0.7, 0.2, -0.5])
    params, velocity = net.init(jax.random.key(0), t, x), networks.vector_field(net)

    def by_series(t, x, params, order):
        derivatives = [velocity(t, x, params)]
        for k in range(1, order):
            clock = [jnp.ones_like(t)] + [jnp.zeros_like(t)] * (k - 1)
            first, rest = taylor.jet(lambda t, x: velocity(t, x, params), (t, x), (clock, derivatives))
            derivatives = [first, *rest]
        return derivatives[-1]

    def operations(field):
        return jax.jit(field).lower(t, x, params).compile().cost_analysis()["flops"]

    for order, most in ((2, 2.1), (3, 3.3), (4, 4.7)):
        derivative = regularizers.total_derivative(velocity, order)
        np.testing.assert_allclose(derivative(t, x, params), by_series(t, x, params, order), rtol=1e-10)
        assert operations(derivative) < most * operations(velocity)


def test_path_integral_of_energy_and_acceleration():
    d2 = regularizers.total_derivative(linear, 2)

    def both(a, x, t0, t1):
        return tuple(
            regularizers.path_integral(cost, linear, x, a, t0=t0, t1=t1, rule=quadrature.gauss_legendre(12), **TIGHT)
            for cost in (lambda t, x, a: jnp.sum(linear(t, x, a) ** 2), lambda t, x, a: jnp.sum(d2(t, x, a) ** 2))
        )

    run = jax.jit(both)
    for start, end, a in ((0.0, 1.2, A), (1.2, 0.0, -A)):
        got = run(jnp.asarray(A), X, start, end)
        x = np.asarray(X)
        np.testing.assert_allclose(got, (energy(a, x, 1.2), energy(a, a @ x, 1.2)), rtol=1e-7)
    with pytest.raises(ValueError, match="cost must return a scalar"):
        regularizers.path_integral(lambda t, x, a: x, linear, X, jnp.asarray(A), t0=0.0, t1=1.0)


def test_random_end_is_uniform_around_the_end():
    """Mean and variance of 20,000 draws, 4.5 sigma each: a false alarm in 7e-6 a side, the key fixed."""
    num, width = 20000, 0.4
    draws = np.asarray(
        jax.vmap(lambda key: regularizers.random_end(key, 0.0, 1.0, width, jnp.float64))(
            jax.random.split(jax.random.key(0), num)
        )
    )
    assert draws.min() >= 0.6
    assert draws.max() <= 1.4
    variance = width**2 / 3
    assert abs(draws.mean() - 1.0) < 4.5 * np.sqrt(variance / num)
    assert abs(draws.var() - variance) < 4.5 * np.sqrt((width**4 / 5 - variance**2) / num)


def test_bad_input():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"kinetic must not be negative, got -1\.0"):
        regularizers.penalized(kinetic=-1.0, t_data=0.0, t_base=1.0)
    with pytest.raises(ValueError, match="t_data and t_base are both"):
        regularizers.penalized(t_data=1.0, t_base=1.0)
    with pytest.raises(ValueError, match="order must be at least 1"):
        regularizers.total_derivative(linear, 0)
    for width in (-0.1, 1.0):
        with pytest.raises(ValueError, match="width must be at least 0 and less than"):
            regularizers.random_end(key, 0.0, 1.0, width)
