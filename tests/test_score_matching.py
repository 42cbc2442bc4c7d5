"""Score matching losses on a rotated mixture, with every expectation an exact quadrature."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import schedules
from dgm_jax import score_matching as sm

# x_0 in the plane: two Gaussians, neither of them along the axes
WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[0.6, -0.4], [-0.5, 0.3]])
ROOTS = np.array([[[0.8, 0.0], [0.5, 0.4]], [[0.5, 0.0], [-0.3, 0.6]]])  # of the covariances: C = L L^T
COVARIANCES = ROOTS @ ROOTS.transpose(0, 2, 1)


def diffused_score(alpha, variance):
    """grad log p_t by autodiff of the log-density of alpha x_0 + sigma eps, written out here."""

    def log_density(x):
        covariances = alpha**2 * COVARIANCES + variance * np.eye(2)
        z = x[None, :] - alpha * MEANS
        quadratic = jnp.einsum("ki,kij,kj->k", z, np.linalg.inv(covariances), z)
        log_normal = -0.5 * quadratic - 0.5 * np.log(np.linalg.det(2 * np.pi * covariances))
        return jax.nn.logsumexp(log_normal + np.log(WEIGHTS))

    return jax.grad(log_density)


def normal_grid(num, dims):
    """Nodes [num^dims, dims] and weights of Gauss-Hermite quadrature against N(0, I)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    grid = np.stack(np.meshgrid(*[nodes] * dims, indexing="ij"), -1).reshape(-1, dims)
    weight = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * dims, indexing="ij"), -1), -1)
    return grid, weight.reshape(-1)


def rough(t, x, args):
    """A polynomial model, bent and without symmetry, so that the quadrature below is exact."""
    return args["a"] * x + args["b"] * jnp.stack([x[1] * x[0], x[0] - x[1] ** 2]) + t * args["c"]


PARAMS = [
    {"a": jnp.asarray(-0.7), "b": jnp.asarray(0.3), "c": jnp.asarray([0.2, -0.5])},
    {"a": jnp.asarray(0.4), "b": jnp.asarray(-1.1), "c": jnp.asarray([1.0, 0.1])},
    {"a": jnp.asarray(-1.3), "b": jnp.asarray(0.0), "c": jnp.asarray([0.0, 0.0])},
]
SCHEDULES = {"vp": schedules.vp(), "sub_vp": schedules.sub_vp(), "linear": schedules.linear()}


def test_explicit_is_zero_at_the_target_and_half_the_squared_distance_elsewhere():
    target = diffused_score(1.0, 0.2)
    field = lambda t, x, args: target(x)  # noqa: E731
    x = jnp.asarray([0.3, -0.8])
    assert sm.explicit(field, field, 0.4, x) == 0
    shifted = lambda t, x, args: target(x) + args  # noqa: E731
    loss = sm.explicit(shifted, field, 0.4, x, jnp.asarray([3.0, 4.0]))
    np.testing.assert_allclose(loss, 12.5, rtol=1e-14)


def test_explicit_expectation_is_half_the_fisher_divergence_of_two_gaussians():
    """N(0, C) and N(mu, C): the scores differ by C^-1 mu everywhere. N(0, C) and N(0, D): tr((C^-1 - D^-1)^2 C)."""
    c, d, mu = COVARIANCES[0], COVARIANCES[1], np.array([0.3, -0.2])
    p, q = np.linalg.inv(c), np.linalg.inv(d)
    grid, weight = normal_grid(4, 2)
    samples = jnp.asarray(grid @ ROOTS[0].T)
    own = lambda t, x, args: -p @ x  # noqa: E731

    def expectation(score):
        return weight @ np.asarray(jax.vmap(lambda x: sm.explicit(score, own, 1.0, x))(samples))

    np.testing.assert_allclose(expectation(lambda t, x, args: -p @ (x - mu)), 0.5 * mu @ p @ p @ mu, rtol=1e-12)
    gap = p - q
    np.testing.assert_allclose(expectation(lambda t, x, args: -q @ x), 0.5 * np.trace(gap @ c @ gap), rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_denoising_minus_explicit_does_not_depend_on_the_model(name):
    """Vincent's identity, and that both have one gradient in the parameters: to 1e-8, by quadrature.

    x_0 and eps by component in four dimensions for the left side, x_t in two for the right.
    """
    schedule, t = SCHEDULES[name], jnp.asarray(0.35)
    alpha, variance = float(jnp.exp(schedule.log_alpha(t))), float(schedule.variance(t))
    four, weight4 = normal_grid(5, 4)  # exact up to degree 9 in each; the models are quadratic
    x0 = jnp.asarray(np.concatenate([mean + four[:, :2] @ root.T for mean, root in zip(MEANS, ROOTS, strict=True)]))
    eps, weight0 = jnp.asarray(np.tile(four[:, 2:], (2, 1))), np.concatenate([w * weight4 for w in WEIGHTS])
    two, weight2 = normal_grid(150, 2)  # the true score is not a polynomial
    roots = [np.linalg.cholesky(alpha**2 * c + variance * np.eye(2)) for c in COVARIANCES]
    x_t = jnp.asarray(np.concatenate([alpha * m + two @ root.T for m, root in zip(MEANS, roots, strict=True)]))
    weight_t = np.concatenate([w * weight2 for w in WEIGHTS])
    true = diffused_score(alpha, variance)

    @jax.jit
    @jax.value_and_grad
    def denoising(params):
        return weight0 @ jax.vmap(lambda x, e: sm.denoising(rough, schedule, t, x, e, params))(x0, eps)

    @jax.jit
    @jax.value_and_grad
    def explicit(params):
        return weight_t @ jax.vmap(lambda x: sm.explicit(rough, lambda t, x, args: true(x), t, x, params))(x_t)

    pairs = [(denoising(params), explicit(params)) for params in PARAMS]
    gaps = [float(d[0] - e[0]) for d, e in pairs]
    assert np.ptp(gaps) < 1e-8, gaps
    assert np.ptp([float(e[0]) for _, e in pairs]) > 0.1  # while the losses themselves differ
    for d, e in pairs:
        for left, right in zip(jax.tree.leaves(d[1]), jax.tree.leaves(e[1]), strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-8)


def test_denoising_has_zero_gradient_at_the_true_score():
    """The expected loss, as a function of a perturbation of the true score in many directions, is stationary there."""
    schedule, t = schedules.vp(), jnp.asarray(0.3)
    alpha, variance = float(jnp.exp(schedule.log_alpha(t))), float(schedule.variance(t))
    true = diffused_score(alpha, variance)
    four, weight4 = normal_grid(26, 4)
    eps = jnp.asarray(four[:, 2:])

    def model(t, x, args):
        bent = jnp.stack([jnp.sin(x[0]) + x[1], x[0] * x[1]])
        return true(x) + args["shift"] + args["matrix"] @ x + args["bend"] * bent

    @jax.jit
    def gradient(params, x0):
        losses = lambda p: jax.vmap(lambda x, e: sm.denoising(model, schedule, t, x, e, p))(x0, eps)  # noqa: E731
        return jax.grad(lambda p: jnp.asarray(weight4) @ losses(p))(params)

    def expected(params):
        parts = [gradient(params, jnp.asarray(m + four[:, :2] @ r.T)) for m, r in zip(MEANS, ROOTS, strict=True)]
        return jax.tree.map(lambda a, b: WEIGHTS[0] * a + WEIGHTS[1] * b, *parts)

    at_zero = {"shift": jnp.zeros(2), "matrix": jnp.zeros((2, 2)), "bend": jnp.zeros(())}
    assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(expected(at_zero))) < 1e-8
    elsewhere = {**at_zero, "bend": jnp.asarray(0.1)}
    assert float(expected(elsewhere)["bend"]) > 0.01


def test_denoising_of_a_model_that_knows_the_noise_is_zero_and_by_hand_elsewhere():
    schedule, t = schedules.vp(), jnp.asarray(0.5)
    sigma = float(jnp.sqrt(schedule.variance(t)))
    x0, noise = jnp.asarray([1.0, -2.0]), jnp.asarray([0.6, 0.8])
    assert sm.denoising(lambda t, x, args: -noise / sigma, schedule, t, x0, noise) < 1e-30
    zero = lambda t, x, args: jnp.zeros_like(x)  # noqa: E731
    np.testing.assert_allclose(sm.denoising(zero, schedule, t, x0, noise), 0.5 / sigma**2, rtol=1e-14)
    np.testing.assert_allclose(sm.denoising(zero, schedule, t, x0, noise, weight=schedule.variance), 0.5, rtol=1e-14)
    np.testing.assert_allclose(sm.denoising(zero, schedule, t, x0, noise, weight=lambda t: 6.0 * t), 1.5 / sigma**2)


def test_denoising_looks_at_x_t():
    """A model that ignores nothing: s = x, on x_t = alpha x_0 + sigma eps with alpha = 1 - t, sigma = t by hand."""
    loss = sm.denoising(
        lambda t, x, args: x * args, schedules.linear(), 0.25, jnp.asarray([2.0]), jnp.asarray([1.0]), jnp.asarray(2.0)
    )
    np.testing.assert_allclose(loss, 0.5 * (2 * (0.75 * 2 + 0.25) + 1 / 0.25) ** 2, rtol=1e-14)


@pytest.mark.parametrize("time", [1e-5, 1e-3])
def test_variance_weight_is_stable_near_the_data_in_float32(time):
    schedule, t = schedules.vp(), jnp.asarray(time, jnp.float32)
    x0, noise = jnp.asarray([0.3, 0.1], jnp.float32), jnp.asarray([0.6, -0.8], jnp.float32)

    def loss(scale):
        model = lambda t, x, args: -noise * args / jnp.sqrt(schedule.variance(t))  # noqa: E731
        return sm.denoising(model, schedule, t, x0, noise, scale, weight=schedule.variance)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(1.5, jnp.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose([value, gradient], [0.125, 0.5], rtol=1e-5)  # (1 - scale)^2 / 2 by hand


def test_bad_arguments():
    x, t, vp = jnp.zeros((2, 3)), jnp.asarray(0.5), schedules.vp()
    same = lambda t, x, args: x  # noqa: E731
    with pytest.raises(ValueError, match=r"t must be one time of shape \(\), got shape \(2,\).*jax\.vmap"):
        sm.denoising(same, vp, jnp.zeros(2), x, x)
    with pytest.raises(ValueError, match=r"noise has shape \(3,\) and x0 \(2, 3\)"):
        sm.denoising(same, vp, t, x, x[0])
    with pytest.raises(TypeError, match="noise has dtype float32 and x0 float64"):
        sm.denoising(same, vp, t, x, x.astype(jnp.float32))
    with pytest.raises(TypeError, match="x0 must be an array of floats, got dtype int64"):
        sm.denoising(same, vp, t, x.astype(int), x)
    with pytest.raises(ValueError, match=r"score returned shape \(3,\) for x of shape \(2, 3\).*jax\.vmap"):
        sm.denoising(lambda t, x, args: x[0], vp, t, x, x)
    with pytest.raises(ValueError, match=r"target returned shape \(\)"):
        sm.explicit(same, lambda t, x, args: jnp.sum(x), t, x)
    with pytest.raises(TypeError, match="score returned dtype float32 for x of float64"):
        sm.explicit(lambda t, x, args: x.astype(jnp.float32), same, t, x)
    with pytest.raises(TypeError, match="x must be an array of floats, got SimpleNamespace"):
        sm.explicit(same, same, t, SimpleNamespace())
