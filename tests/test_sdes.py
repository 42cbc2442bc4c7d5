"""Every SDE by the equation of Kolmogorov, Fokker and Planck that its density must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import SINGULAR, points, sweep
from scipy.integrate import solve_ivp
from targets import SCHEDULES
from targets import rotated_mixture as mixture

from dgm_jax import densities, sdes


def forward_residual(sde, log_p, sign=1.0):
    """d log p / dt + div f + f . s - sign g^2 / 2 (lap log p + |s|^2), and its scale.

    Zero for the density of dx = f dt + g dw; ``sign = -1`` where the SDE is run towards smaller t. The squared
    diffusion may be a diagonal.
    """

    def field(t, x, args):
        rate = jax.jvp(lambda t: log_p(t, x, args), (t,), (jnp.ones_like(t),))[1]
        s = jax.grad(log_p, argnums=1)(t, x, args)
        curvature = jnp.diagonal(jax.hessian(log_p, argnums=1)(t, x, args))
        f, jacobian = sde.drift(t, x, args), jax.jacfwd(sde.drift, argnums=1)(t, x, args)
        g2 = jnp.square(sde.diffusion(t, x, args))
        diffused = 0.5 * jnp.sum(g2 * (curvature + s**2))
        return rate + jnp.trace(jacobian) + f @ s - sign * diffused, jnp.abs(rate) + jnp.abs(diffused)

    return field


def assert_zero(error, size, name=""):
    assert np.max(np.abs(error) / (1 + size)) < 1e-9, name
    assert np.max(size) > 1e-2, name  # not zero for want of a density


def test_diffusion_process_and_its_reverse_have_the_oracle_as_density():
    density = mixture(2)

    def residuals(schedule):
        sde, log_p = sdes.diffusion_process(schedule), densities.log_density(density, schedule)
        backward = sdes.reverse(sde, densities.score(density, schedule))
        forward_error, backward_error = forward_residual(sde, log_p), forward_residual(backward, log_p, -1.0)
        return lambda t, x, args: (forward_error(t, x, args), backward_error(t, x, args))

    for name, (forward, backward) in sweep(residuals, [0.02, 0.3, 0.6, 0.97], points(2)):
        assert_zero(*forward, name)
        assert_zero(*backward, name)


def test_probability_flow_is_the_velocity():
    density = mixture(5)

    def both(schedule):
        flow = sdes.probability_flow(sdes.diffusion_process(schedule), densities.score(density, schedule))
        velocity = densities.velocity(density, schedule)
        return lambda t, x, args: (flow(t, x, args), velocity(t, x, args))

    def ts(name):
        return [0.0, 0.4, 0.999 if name in SINGULAR else 1.0]

    for name, (flow, velocity) in sweep(both, ts, points(5)):
        np.testing.assert_allclose(flow, velocity, rtol=1e-9, atol=1e-9, err_msg=name)


RATE, MEAN, NOISE = jnp.asarray([0.5, 2.0]), jnp.asarray([1.0, -1.0]), jnp.asarray([0.7, 1.3])


def test_ornstein_uhlenbeck_moments_against_the_moment_equations():
    """m' = E[f], V' = 2 Cov(f, x) + g^2, solved by SciPy with the drift's own Jacobian, against the closed form."""
    sde, t, x0 = sdes.ornstein_uhlenbeck(RATE, MEAN, NOISE), 0.8, np.array([3.0, 0.5])
    zero = jnp.zeros(())
    intercept = np.asarray(sde.drift(zero, jnp.zeros(2), None))
    slope = np.asarray(jax.jacfwd(sde.drift, argnums=1)(zero, jnp.zeros(2), None))
    g = np.diag(sde.diffusion(zero, jnp.zeros(2), None))

    def moments(_, state):
        m, v = state[:2], state[2:].reshape(2, 2)
        return np.concatenate([intercept + slope @ m, (slope @ v + v @ slope.T + g @ g.T).ravel()])

    end = solve_ivp(moments, (0, t), np.concatenate([x0, np.zeros(4)]), rtol=1e-11, atol=1e-12).y[:, -1]
    rate, mean, noise = (np.asarray(a) for a in (RATE, MEAN, NOISE))
    np.testing.assert_allclose(end[:2], mean + (x0 - mean) * np.exp(-rate * t), rtol=1e-9)
    variance = noise**2 * -np.expm1(-2 * rate * t) / (2 * rate)
    np.testing.assert_allclose(end[2:].reshape(2, 2), np.diag(variance), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_ornstein_uhlenbeck_and_its_reverse_by_kolmogorov_fokker_planck():
    """With a diagonal diffusion too, and started from a Gaussian that is not aligned with the axes."""
    start, rate = jnp.asarray([[1.0, 0.6], [0.6, 0.8]]), RATE
    sde = sdes.ornstein_uhlenbeck(RATE, MEAN, NOISE)

    def log_p(t, x, args):
        decay = jnp.exp(-rate * t)
        stationary = NOISE**2 * (1 - decay**2) / (2 * rate)
        return densities.log_prob(
            densities.Mixture(
                jnp.ones(1),
                (MEAN - decay * MEAN)[None],
                (decay[:, None] * start * decay[None] + jnp.diag(stationary))[None],
            ),
            x,
        )

    backward = sdes.reverse(sde, jax.grad(log_p, argnums=1))
    flow = sdes.probability_flow(sde, jax.grad(log_p, argnums=1))
    forward_error, backward_error = forward_residual(sde, log_p), forward_residual(backward, log_p, -1.0)
    flow_error = forward_residual(sdes.SDE(flow, lambda t, x, args: jnp.zeros(())), log_p)

    def everything(t, x, args):
        return forward_error(t, x, args), backward_error(t, x, args), flow_error(t, x, args)

    ts, xs = jnp.asarray([0.1, 0.7, 2.0]), points(2)
    for errors in jax.jit(jax.vmap(jax.vmap(everything, (None, 0, None)), (0, None, None)))(ts, xs, None):
        assert_zero(*errors)


def test_ornstein_uhlenbeck_settles_at_the_standard_normal_by_default():
    density = densities.gaussian(jnp.zeros(3), jnp.eye(3))
    sde = sdes.ornstein_uhlenbeck()
    field = forward_residual(sde, lambda t, x, args: densities.log_prob(density, x))
    assert_zero(*jax.jit(jax.vmap(field, (None, 0, None)))(jnp.zeros(()), points(3), None))


def test_langevin_leaves_its_density_as_it_is():
    density = mixture(5)

    def log_p(t, x, args):
        return densities.log_prob(density, x)

    field = forward_residual(sdes.langevin(jax.grad(log_p, argnums=1)), log_p)
    assert_zero(*jax.jit(jax.vmap(field, (None, 0, None)))(jnp.zeros(()), points(5), None))


def test_arguments_reach_every_part():
    sde = sdes.SDE(lambda t, x, args: args["a"] * x, lambda t, x, args: args["g"])

    def score(t, x, args):
        return -args["s"] * x

    args = {"a": jnp.asarray(2.0), "g": jnp.asarray(3.0), "s": jnp.asarray(5.0)}
    t, x = jnp.asarray(0.5), jnp.asarray([1.0, -2.0])
    np.testing.assert_allclose(sdes.reverse(sde, score).drift(t, x, args), (2 + 9 * 5) * x)
    np.testing.assert_allclose(sdes.reverse(sde, score).diffusion(t, x, args), 3.0)
    np.testing.assert_allclose(sdes.probability_flow(sde, score)(t, x, args), (2 + 9 * 5 / 2) * x)
    np.testing.assert_allclose(sdes.langevin(score).drift(t, x, args), -2.5 * x)


def test_single_precision_in_single_precision_out():
    x, t = points(2, dtype=jnp.float32)[0], jnp.asarray(0.5)  # t is brought to the dtype of x

    def score(t, x, args):
        return -x

    def everything():
        processes = (
            *(sdes.diffusion_process(schedule) for schedule in SCHEDULES.values()),
            sdes.ornstein_uhlenbeck(RATE, MEAN, NOISE),
            sdes.langevin(score),
            sdes.reverse(sdes.diffusion_process(SCHEDULES["vp"]), score),
        )
        parts = [part for sde in processes for part in sde]
        parts.append(sdes.probability_flow(sdes.ornstein_uhlenbeck(), score))
        return [part(t, x, None) for part in parts]

    assert {leaf.dtype for leaf in jax.eval_shape(everything)} == {jnp.dtype(jnp.float32)}


def zero_score(t, x, args):
    return jnp.zeros_like(x)


T, X = jnp.asarray(0.5), jnp.zeros(2)
VP = sdes.diffusion_process(SCHEDULES["vp"])
MATRIX = sdes.SDE(VP.drift, lambda t, x, args: jnp.eye(2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VP.drift(T, jnp.arange(2), None), TypeError, "x must be an array of floats, got dtype int64"),
        (
            lambda: VP.diffusion(jnp.zeros(3), X, None),
            ValueError,
            r"t must be one time of shape \(\), got shape \(3,\)",
        ),
        (lambda: sdes.ornstein_uhlenbeck(rate=0.0), ValueError, "rate must be positive, got 0.0"),
        (lambda: sdes.ornstein_uhlenbeck(rate=float("nan")), ValueError, "rate must be positive, got nan"),
        (lambda: sdes.ornstein_uhlenbeck(noise=-1.0), ValueError, "noise must be at least 0, got -1.0"),
        (
            lambda: sdes.ornstein_uhlenbeck(mean=jnp.zeros(3)).drift(T, X, None),
            ValueError,
            r"mean must be a scalar or have the shape of x, \(2,\), got shape \(3,\)",
        ),
        (
            lambda: sdes.reverse(MATRIX, zero_score).drift(T, X, None),
            ValueError,
            r"sde.diffusion must return a scalar or a diagonal of the shape of x, \(2,\), got \(2, 2\)",
        ),
        (
            lambda: sdes.probability_flow(VP, lambda t, x, args: jnp.sum(x))(T, jnp.zeros((4, 2)), None),
            ValueError,
            r"score must return the shape of x, \(4, 2\), got \(\): it takes one example; use jax.vmap over a batch",
        ),
        (
            lambda: sdes.langevin(lambda t, x, args: x[:1]).drift(T, X, None),
            ValueError,
            r"score must return the shape of x, \(2,\), got \(1,\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
