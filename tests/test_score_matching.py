"""Score matching losses on rotated mixtures: expectations by exact quadrature, and within their intervals."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import rotated_mixture

from dgm_jax import densities, divergence, networks, schedules
from dgm_jax import score_matching as sm
from dgm_jax.types import Schedule, StructuredField

# x_0 in the plane: two Gaussians, neither of them along the axes
WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[0.6, -0.4], [-0.5, 0.3]])
ROOTS = np.array([[[0.8, 0.0], [0.5, 0.4]], [[0.5, 0.0], [-0.3, 0.6]]])  # of the covariances: C = L L^T
COVARIANCES = ROOTS @ ROOTS.transpose(0, 2, 1)


def diffused_score(alpha, variance):
    """grad log p_t by autodiff of the log-density of alpha x_0 + sigma eps, written out here."""

    def log_density(x):
        covariances = alpha**2 * COVARIANCES + variance * np.eye(2)[None]
        z = x[None, :] - alpha * MEANS
        quadratic = jnp.einsum("ki,kij,kj->k", z, jnp.linalg.inv(covariances), z)
        log_normal = -0.5 * quadratic - 0.5 * jnp.log(jnp.linalg.det(2 * np.pi * covariances))
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


def with_gradients(losses, params, *names):
    """``losses(copies)`` is a dict, entry ``name`` at the parameters ``copies[name]``: it, and the gradient of each
    entry in the parameters, by one reverse pass for all."""

    def total(copies):
        values = losses(copies)
        return sum(values.values()), values

    gradients, values = jax.grad(total, has_aux=True)(dict.fromkeys(names, params))
    return values, gradients


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


def test_explicit_expectation_is_the_fisher_divergence_of_two_gaussians():
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


def test_denoising_minus_explicit_does_not_depend_on_the_model():
    """Vincent's identity with its constant, 1/2 E |grad log p(x_t | x_0)|^2 - 1/2 E |grad log p_t|^2 with the first
    d / (2 sigma^2), and that both have one gradient in the parameters: to 1e-8, by quadrature, for three schedules.

    x_0 and eps by component in four dimensions for the left side, x_t in two for the right.
    """
    t = jnp.asarray(0.35)
    four, weight4 = normal_grid(5, 4)  # exact up to degree 9 in each; the models are quadratic
    x0 = jnp.asarray(np.concatenate([mean + four[:, :2] @ root.T for mean, root in zip(MEANS, ROOTS, strict=True)]))
    eps, weight0 = jnp.asarray(np.tile(four[:, 2:], (2, 1))), np.concatenate([w * weight4 for w in WEIGHTS])
    two, weight2 = normal_grid(110, 2)  # the true score is not a polynomial
    weight_t = np.concatenate([w * weight2 for w in WEIGHTS])

    @jax.jit
    def sides(params, alpha, variance, x_t):
        path = Schedule(lambda t: jnp.log(alpha), lambda t: variance)
        true = diffused_score(alpha, variance)

        def means(p):
            denoising = jax.vmap(lambda x, e: sm.denoising(rough, path, t, x, e, p["denoising"]))(x0, eps)
            towards = lambda t, x, args: true(x)  # noqa: E731
            explicit = jax.vmap(lambda x: sm.explicit(rough, towards, t, x, p["explicit"]))(x_t)
            return {"denoising": weight0 @ denoising, "explicit": weight_t @ explicit}

        size = weight_t @ jax.vmap(lambda x: jnp.sum(true(x) ** 2))(x_t)
        return *with_gradients(means, params, "denoising", "explicit"), size

    for schedule in SCHEDULES.values():
        alpha, variance = float(jnp.exp(schedule.log_alpha(t))), float(schedule.variance(t))
        roots = [np.linalg.cholesky(alpha**2 * c + variance * np.eye(2)) for c in COVARIANCES]
        x_t = jnp.asarray(np.concatenate([alpha * m + two @ root.T for m, root in zip(MEANS, roots, strict=True)]))
        explicits = []
        for params in PARAMS:
            values, gradients, size = sides(params, alpha, variance, x_t)
            constant = 2 / (2 * variance) - 0.5 * size
            np.testing.assert_allclose(values["denoising"] - values["explicit"], constant, rtol=0, atol=1e-8)
            pairs = zip(*(jax.tree.leaves(gradients[name]) for name in ("denoising", "explicit")), strict=True)
            for left, right in pairs:
                np.testing.assert_allclose(left, right, rtol=0, atol=1e-8)
            explicits.append(float(values["explicit"]))
        assert np.ptp(explicits) > 0.1  # while the losses themselves differ


def test_denoising_has_zero_gradient_at_the_true_score():
    """The expected loss, as a function of a perturbation of the true score in many directions, is stationary there."""
    schedule, t = schedules.vp(), jnp.asarray(0.3)
    alpha, variance = float(jnp.exp(schedule.log_alpha(t))), float(schedule.variance(t))
    true = diffused_score(alpha, variance)
    four, weight4 = normal_grid(20, 4)
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
    with pytest.raises(ValueError, match=r"score returned shape \(3,\): .*one example, \(2, 3\).*jax\.vmap"):
        sm.denoising(lambda t, x, args: x[0], vp, t, x, x)
    with pytest.raises(ValueError, match=r"target returned shape \(\)"):
        sm.explicit(same, lambda t, x, args: jnp.sum(x), t, x)
    with pytest.raises(TypeError, match="score returned dtype float32 for x of float64"):
        sm.explicit(lambda t, x, args: x.astype(jnp.float32), same, t, x)
    with pytest.raises(TypeError, match="x must be an array of floats, got SimpleNamespace"):
        sm.explicit(same, same, t, SimpleNamespace())


# ----------------------------------------------------------------- implicit, sliced, scalar models, Fisher divergence

MIXTURE = rotated_mixture(2)
CLEAN = schedules.edm(1.0)  # alpha = 1 and sigma = t: the density at t = 0 is the mixture
TRUE = densities.score(MIXTURE, CLEAN)
LOG_TRUE = densities.log_density(MIXTURE, CLEAN)
SIGNS = jnp.asarray([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def bent(t, x, args):
    """The true score, and a perturbation that is no gradient, of any dimension."""
    return args["true"](t, x) + args["shift"] + args["matrix"] @ x + args["bend"] * jnp.sin(x + jnp.roll(x, 1))


def bent_density(t, x, args):
    """The true log-density, and a perturbation."""
    wave = jnp.sin(x[0] - 2 * x[1]) * args["wave"]
    return args["true"](t, x) + args["shift"] @ x + 0.5 * args["scale"] * x @ x + wave


def perturbed(*seeds):
    """Parameters of ``bent`` in two dimensions: without a seed, those of the true score."""
    size = 0.5 if seeds else 0.0
    rng = np.random.default_rng(seeds)
    shapes = {"shift": (2,), "matrix": (2, 2), "bend": ()}
    return {name: jnp.asarray(size * rng.normal(size=shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def plane():
    """Nodes of the trapezoidal rule, spectrally accurate for what falls off as a Gaussian, their weights times the
    density, and 1/2 E |grad log p|^2, which is the same to 1e-11 with two thirds of the step. Below 1e-20 of the peak
    a node counts for nothing and is left out."""
    step = 0.12
    line = np.arange(-11, 11, step)
    nodes = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    log_p, s = jax.jit(jax.vmap(lambda x: (LOG_TRUE(0.0, x), TRUE(0.0, x))))(nodes)
    weight = step**2 * np.exp(np.asarray(log_p))
    kept = weight > 1e-20 * weight.max()
    constant = 0.5 * weight @ np.sum(np.asarray(s) ** 2, axis=1)
    return jnp.asarray(nodes[kept]), jnp.asarray(weight[kept]), constant


def test_implicit_and_sliced_differ_from_explicit_by_the_known_constant_on_a_grid(plane):
    """E[loss] = E[explicit] - 1/2 E |grad log p|^2 for three models, to 1e-9, and one gradient in the parameters."""
    nodes, weight, constant = plane
    model = lambda t, x, args: bent(t, x, {**args, "true": TRUE})  # noqa: E731
    names = ("explicit", "implicit", "sliced", "plain")

    def losses(p, x):
        return {
            "explicit": sm.explicit(model, lambda t, x, args: TRUE(t, x), 0.0, x, p["explicit"]),
            "implicit": sm.implicit(model, 0.0, x, p["implicit"]),
            "sliced": sm.sliced(model, 0.0, x, SIGNS, p["sliced"]),
            "plain": sm.sliced(model, 0.0, x, SIGNS, p["plain"], variance_reduction=False),
        }

    @jax.jit
    def expected(params):
        means = lambda p: jax.tree.map(lambda a: weight @ a, jax.vmap(lambda x: losses(p, x))(nodes))  # noqa: E731
        return with_gradients(means, params, *names)

    np.testing.assert_allclose(weight.sum(), 1, atol=1e-12)
    found = []
    for keys in ((), (1,), (2,)):
        values, gradients = expected(perturbed(*keys))
        found.append(float(values["explicit"]))
        for name in names[1:]:
            np.testing.assert_allclose(values[name], found[-1] - constant, rtol=0, atol=1e-9, err_msg=name)
            for g, g_true in zip(*map(jax.tree.leaves, (gradients[name], gradients["explicit"])), strict=True):
                np.testing.assert_allclose(g, g_true, rtol=0, atol=1e-8, err_msg=name)
                assert keys or np.max(np.abs(g)) < 1e-9, name  # stationary at the true score
    assert found[0] == 0
    assert constant > 1
    assert abs(found[1] - found[2]) > 0.1  # while the losses themselves differ


@pytest.mark.slow
def test_scalar_models_on_a_grid(plane):
    """The same for the gradient of a scalar model; node by node its loss is that of a Hessian written out."""
    nodes, weight, constant = plane
    u = lambda t, x, args: bent_density(t, x, {**args, "true": LOG_TRUE})  # noqa: E731
    far = {"shift": jnp.asarray([0.2, -0.1]), "scale": jnp.asarray(0.3), "wave": jnp.asarray(-0.4)}
    score = sm.score_of(u)
    names = ("explicit", "implicit", "sliced", "plain")

    def losses(p, x):
        return {
            "explicit": sm.explicit(score, lambda t, x, args: TRUE(t, x), 0.0, x, p["explicit"]),
            "implicit": sm.implicit_log_density(u, 0.0, x, p["implicit"]),
            "sliced": sm.sliced(score, 0.0, x, SIGNS, p["sliced"]),
            "plain": sm.sliced(score, 0.0, x, SIGNS, p["plain"], variance_reduction=False),
        }

    @jax.jit
    def expected(params):
        def by_hand(x):
            of_x = lambda y: u(0.0, y, params)  # noqa: E731
            return 0.5 * jnp.sum(jax.grad(of_x)(x) ** 2) + jnp.trace(jax.hessian(of_x)(x))

        means = lambda p: jax.tree.map(lambda a: weight @ a, jax.vmap(lambda x: losses(p, x))(nodes))  # noqa: E731
        few = nodes[:: len(nodes) // 50]
        beside = jax.vmap(lambda x: losses(dict.fromkeys(names, params), x))(few), jax.vmap(by_hand)(few)
        return with_gradients(means, params, *names), beside

    for params in (far, jax.tree.map(jnp.zeros_like, far)):
        (values, gradients), (each, by_hand) = expected(params)
        for name in names[1:]:
            np.testing.assert_allclose(values[name], values["explicit"] - constant, rtol=0, atol=1e-9, err_msg=name)
            np.testing.assert_allclose(each[name], by_hand, rtol=1e-10, atol=1e-10, err_msg=name)
            if params is not far:
                assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradients[name])) < 1e-9, name
    assert float(values["explicit"]) < 1e-20  # the gradient of the oracle's log-density is the oracle's score


@pytest.mark.slow
def test_losses_agree_within_their_intervals_in_five_dimensions():
    """Paired differences on 2,000 points of a rotated mixture, whose means are the known constants.

    With d = 5 and e, eps drawn once a point: explicit - loss - 1/2 |grad log p|^2 has mean zero for implicit and the
    sliced losses; for denoising, about p_t, loss - explicit - 1/2 |eps / sigma|^2 + 1/2 |grad log p_t|^2. Four
    means and 4 x 31 entries of gradients at the true score within 4.5 standard errors: false alarms 128 x 7e-6 = 9e-4;
    the keys are fixed. Off the true score the gradients are not zero.
    """
    mixture, num, t = rotated_mixture(5), 2000, jnp.asarray(0.4)
    truth = densities.score(mixture, CLEAN)
    keys = jax.random.split(jax.random.key(7), 5)
    x0 = densities.sample(keys[0], mixture, num)
    noise = jax.random.normal(keys[1], x0.shape)
    names = ("implicit", "sliced", "plain", "denoising")
    signs, normals = jax.random.rademacher(keys[2], x0.shape, x0.dtype), jax.random.normal(keys[3], x0.shape)

    def model(t, x, args):
        return bent(t, x, {**args, "true": truth})

    def losses(p, x, eps, sign, normal):
        return {
            "implicit": sm.implicit(model, 0.0, x, p["implicit"]),
            "sliced": sm.sliced(model, 0.0, x, sign[None], p["sliced"]),
            "plain": sm.sliced(model, 0.0, x, normal[None], p["plain"], variance_reduction=False),
            "denoising": sm.denoising(model, CLEAN, t, x, eps, p["denoising"], weight=lambda t: 3 * t) / (3 * t),
        }

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, 0, 0, 0))
    def differences(params, x, eps, *directions):
        found, gradients = with_gradients(lambda p: losses(p, x, eps, *directions), params, *names)
        x_t = x + t * eps
        clean, noisy = (sm.explicit(model, lambda t, x, args: truth(t, x), *at, params) for at in ((0.0, x), (t, x_t)))
        constant = 0.5 * jnp.sum((eps / t) ** 2) - 0.5 * jnp.sum(truth(t, x_t) ** 2)
        for name in names:
            known = noisy + constant if name == "denoising" else clean - 0.5 * jnp.sum(truth(0.0, x) ** 2)
            found[name] -= known
        return found, gradients

    def z_score(each):
        return float(np.max(np.abs(np.mean(each, 0)) * num**0.5 / np.std(each, 0, ddof=1)))

    at_truth = {"shift": jnp.zeros(5), "matrix": jnp.zeros((5, 5)), "bend": jnp.zeros(())}
    away = {**at_truth, "matrix": 0.3 * jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)))}
    largest = []
    for params in (at_truth, away):
        gaps, gradients = differences(params, x0, noise, signs, normals)
        assert len(gaps) == 4
        assert max(z_score(gap) for gap in gaps.values()) < 4.5
        largest.append([max(map(z_score, jax.tree.leaves(gradients[name]))) for name in names])
    assert max(largest[0]) < 4.5, largest
    assert min(largest[1]) > 10, largest


def test_the_target_of_denoising_is_the_score_of_the_kernel():
    """Point by point the loss is the explicit one towards grad log N(x; x', sigma^2 I), by autodiff of that density."""
    x0, eps = jnp.asarray(MEANS), jnp.asarray([[0.4, -1.2], [2.0, 0.1]])
    kernel = lambda x, mean: jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, 0.6))  # noqa: E731

    @jax.jit
    @jax.vmap
    def sides(x, e):
        target = lambda t, y, args: jax.grad(kernel)(y, x)  # noqa: E731
        loss = sm.denoising(rough, CLEAN, 0.6, x, e, PARAMS[0])
        return loss, sm.explicit(rough, target, 0.6, x + 0.6 * e, PARAMS[0]), -0.6 * target(0.6, x + 0.6 * e, None)

    loss, towards, noise = sides(x0, eps)
    np.testing.assert_allclose(loss, towards, rtol=1e-12)
    np.testing.assert_allclose(noise, eps, rtol=1e-12)  # -(x - x') / sigma^2 = -eps / sigma


def test_the_proof_in_one_dimension():
    """E[s grad log p] = -E[s'], hence 1/2 E (s - grad log p)^2 = E[s^2 / 2 + s'] + 1/2 E (grad log p)^2.

    Half of s' would not do: 1/2 E[s^2 + s'] differs from the left side by a number that depends on s.
    """
    mixture = densities.Mixture(
        jnp.asarray([0.35, 0.65]), jnp.asarray([[-1.5], [1.0]]), jnp.asarray([[[0.3]], [[0.6]]])
    )
    log_p = densities.log_density(mixture, CLEAN)
    line, truth = jnp.linspace(-12.0, 12.0, 1201)[:, None], densities.score(mixture, CLEAN)

    @jax.jit
    def expected(a):
        model = lambda t, x, args: jnp.tanh(a * x) - x**3 * a**2  # noqa: E731

        def parts(x):
            s, slope = model(0.0, x, None)[0], jax.jacfwd(model, 1)(0.0, x, None)[0, 0]
            s_true = truth(0.0, x)[0]
            explicit = sm.explicit(model, lambda t, x, args: truth(t, x), 0.0, x)
            return s * s_true, slope, explicit, sm.implicit(model, 0.0, x), 0.5 * s_true**2, 0.5 * (s**2 + slope)

        weight = 0.02 * jnp.exp(jax.vmap(lambda x: log_p(0.0, x))(line))
        return jnp.stack([weight @ column for column in jax.vmap(parts)(line)])

    rows = np.asarray([expected(a) for a in (0.3, -0.7, 1.2)])
    cross, slope, explicit, implicit, constant, halved = rows.T
    np.testing.assert_allclose(cross, -slope, rtol=1e-10)
    np.testing.assert_allclose(explicit, implicit + constant, rtol=1e-10)
    assert np.ptp(explicit - halved) > 0.1


def test_variance_of_one_slice_is_as_the_docstring_has_it():
    """Over all signs, and over normals by exact quadrature: for a Jacobian J and a score s, both of one's choosing."""
    rng = np.random.default_rng(4)
    matrix, s = rng.normal(size=(3, 3)), rng.normal(size=3)
    field = lambda t, x, args: args[0] @ x + args[1]  # noqa: E731
    signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3, indexing="ij"), -1).reshape(-1, 3)
    normals, mass = normal_grid(5, 3)

    def moments(nodes, weight, args, reduce, x):
        one = lambda e: sm.sliced(field, 0.0, x, e[None], args, variance_reduction=reduce)  # noqa: E731
        each = np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(nodes)))
        return weight @ each, weight @ each**2 - (weight @ each) ** 2

    args, x = (jnp.asarray(matrix), jnp.asarray(s)), jnp.zeros(3)
    symmetric = (matrix + matrix.T) / 2
    for reduce, a in ((True, symmetric), (False, symmetric + np.outer(s, s) / 2)):
        for nodes, weight, variance in (
            (signs, np.full(8, 1 / 8), 2 * (np.sum(a**2) - np.sum(np.diag(a) ** 2))),
            (normals, mass, 2 * np.sum(a**2)),
        ):
            mean, found = moments(nodes, weight, args, reduce, x)
            np.testing.assert_allclose(mean, 0.5 * s @ s + np.trace(matrix), rtol=1e-12)
            np.testing.assert_allclose(found, variance, rtol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_variance_reduction_at_the_score_of_a_normal_density(dim):
    """At the true score of N(0, I), E over x: 2 d with Gaussian slices, against 2 E |x x^T / 2 - I|_F^2 without.

    The latter is 2 (d (d + 2) / 4 - d + d) = d (d + 2) / 2: more from d = 3 on, as much at 2, less at 1. With signs
    the loss has no variance but that of x, against d (d - 1) / 2.
    """
    nodes, weight = normal_grid(3, 2 * dim)  # of x and e: the square of the loss is of degree 4 in each
    signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * dim, indexing="ij"), -1).reshape(-1, dim)
    points, mass = normal_grid(3, dim)
    field = lambda t, x, args: -x  # noqa: E731

    @jax.jit
    def excess(x, e):
        """The loss less its mean over e, squared, both ways."""
        pair = [sm.sliced(field, 0.0, x, e[None], variance_reduction=reduce) for reduce in (True, False)]
        return [(loss - sm.implicit(field, 0.0, x)) ** 2 for loss in pair]

    normal = [
        weight @ np.asarray(z) for z in jax.vmap(excess)(jnp.asarray(nodes[:, :dim]), jnp.asarray(nodes[:, dim:]))
    ]
    np.testing.assert_allclose(normal, [2 * dim, dim * (dim + 2) / 2], rtol=1e-12)
    pairs = jnp.asarray(np.repeat(points, len(signs), 0)), jnp.asarray(np.tile(signs, (len(points), 1)))
    rademacher = [np.repeat(mass, len(signs)) @ np.asarray(z) / len(signs) for z in jax.vmap(excess)(*pairs)]
    np.testing.assert_allclose(rademacher, [0, dim * (dim - 1) / 2], rtol=1e-12, atol=1e-12)


def test_several_slices_average_and_any_event_shape():
    """s = -A x on [2, 3] arrays: 1/2 |A x|^2 - tr A, whichever way; and the mean over probes of single-probe losses."""
    rng = np.random.default_rng(5)
    matrix, x = jnp.asarray(rng.normal(size=(6, 6))), jnp.asarray(rng.normal(size=(2, 3)))
    field = lambda t, x, args: -(args @ x.reshape(-1)).reshape(x.shape)  # noqa: E731
    exact = 0.5 * float(jnp.sum((matrix @ x.reshape(-1)) ** 2)) - float(jnp.trace(matrix))
    whole = jnp.asarray(6**0.5 * np.eye(6).reshape(6, 2, 3))  # whose e e^T average to the identity
    e = jnp.asarray(rng.normal(size=(3, 2, 3)))

    @jax.jit
    def evaluate(a, x):
        plain = {"variance_reduction": False}
        found = [
            sm.implicit(field, 0.0, x, a),
            sm.implicit(field, 0.0, x, a, divergence=divergence.exact_in_chunks(4)),
            sm.implicit(field, 0.0, x, a, probes=whole),
            sm.sliced(field, 0.0, x, whole, a),
            sm.sliced(field, 0.0, x, whole, a, **plain),
        ]
        pairs = []
        for how in ({}, plain):
            several = partial(sm.sliced, field, 0.0, x, args=a, **how)
            pairs.append((several(probes=e), jnp.mean(jax.vmap(lambda v, f=several: f(probes=v[None]))(e))))
        return found, [*pairs, (sm.implicit(field, 0.0, x, a, probes=e), pairs[0][0])]

    found, pairs = evaluate(matrix, x)
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    for left, right in pairs:
        np.testing.assert_allclose(left, right, rtol=1e-12)


def of_random_numbers(net, d, seed=0):
    """Three examples, and parameters that are all random: the last layers start at zero."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(3, d)))
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.asarray(0.3), x[0])
    return x, jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), shapes)


KNOWING = {
    "two layers": networks.MLP(features=(4, 5), param_dtype=jnp.float64),
    "three layers": networks.MLP(features=(4, 5, 4), out_features=7, param_dtype=jnp.float64),
    "hollow": networks.HollowNet(features=(6,), channels=2, transformer=(4,), param_dtype=jnp.float64),
    "optimal transport": networks.OTFlow(width=4, param_dtype=jnp.float64),
    "energy": networks.MLP(features=(4, 5), out_features=1, param_dtype=jnp.float64),
}


@pytest.mark.parametrize("name", KNOWING)
def test_implicit_by_what_the_score_knows_is_that_by_the_jacobian(name):
    """Loss and its gradient in the parameters, of every kind of network that offers a divergence or a Laplacian."""
    net = KNOWING[name]
    x, params = of_random_numbers(net, 7)

    def both(params):
        if name == "energy":
            u = networks.energy(net)
            own = lambda x: sm.implicit_log_density(u, 0.3, x, params)  # noqa: E731
            plain = lambda x: sm.implicit_log_density(u.field, 0.3, x, params)  # noqa: E731
        else:
            s = networks.vector_field(net)
            own = lambda x: sm.implicit(s, 0.3, x, params)  # noqa: E731
            plain = lambda x: sm.implicit(s, 0.3, x, params, divergence=divergence.exact)  # noqa: E731
        return jnp.stack([jax.vmap(own)(x), jax.vmap(plain)(x)])

    losses = jax.jit(both)(params)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    assert np.std(losses[0]) > 0.1
    slopes = jax.jit(jax.jacrev(lambda params: jnp.sum(both(params), axis=1)))(params)
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf[0], leaf[1], rtol=1e-12, atol=1e-12), slopes)


@pytest.mark.parametrize("energy", [False, True])
def test_implicit_by_what_the_score_knows_takes_few_operations(energy):
    """256 dimensions, 8 units in two layers, 16 examples; of the plain way only one block of 16 counts."""
    net = networks.MLP(features=(8, 8), out_features=1 if energy else None, param_dtype=jnp.float64)
    x, params = jnp.ones((16, 256)), of_random_numbers(net, 256)[1]

    def operations(loss):
        return jax.jit(jax.vmap(loss, (0, None))).lower(x, params).compile().cost_analysis()["flops"]

    field = networks.energy(net) if energy else networks.vector_field(net)
    loss = sm.implicit_log_density if energy else sm.implicit
    own, plain = (operations(lambda x, p, f=f: loss(f, 0.3, x, p)) for f in (field, field.field))
    value = operations(lambda x, p: field.field(0.3, x, p))
    assert own < (3.5 if energy else 1.5) * value
    assert own < 0.75 * plain


def test_a_score_is_asked_for_its_divergence_unless_another_way_is_named():
    known = StructuredField(lambda t, x, a: a * x, lambda a: a + 1, lambda t, x, p: ((p - 1) * x, 100.0 + jnp.sum(p)))
    x, a = jnp.asarray([0.5, -1.5]), jnp.asarray([2.0, 3.0])
    square = 0.5 * (1 + 4.5**2)
    np.testing.assert_allclose(sm.implicit(known, 0.0, x, a), square + 107)
    np.testing.assert_allclose(sm.implicit(known, 0.0, x, a, divergence=divergence.exact), square + 5)
    np.testing.assert_allclose(sm.implicit(known, 0.0, x, a, probes=jnp.ones((1, 2))), square + 5)
    u = divergence.Energy(
        lambda t, x, a: x @ (a * x) / 2, lambda a: a, lambda t, x, p: (x @ (p * x) / 2, jnp.sum(p) + 50)
    )
    np.testing.assert_allclose(sm.implicit_log_density(u, 0.0, x, a), square + 55)
    np.testing.assert_allclose(sm.implicit_log_density(u.field, 0.0, x, a), square + 5)
    np.testing.assert_allclose(sm.score_of(u)(0.0, x, a), a * x)
    wrong = StructuredField(known.field, known.prepare, lambda t, x, p: (x[:1], jnp.sum(x)))
    with pytest.raises(ValueError, match=r"score returned shape \(1,\)"):
        sm.implicit(wrong, 0.0, x, a)


def test_fisher_divergence_and_its_error():
    """N(0, C) against N(mu, D): 1/2 |D^-1 mu|^2 + 1/2 tr((C^-1 - D^-1) C (C^-1 - D^-1)), within 4 standard errors
    (one false alarm in 16,000; the seed is fixed); the error itself is that of 500 repeats, to 15 per cent,
    which is known to 3 per cent.
    """
    c, d, mu = COVARIANCES[0], COVARIANCES[1], np.array([0.3, -0.2])
    p, q = jnp.asarray(np.linalg.inv(c)), jnp.asarray(np.linalg.inv(d))
    gap = np.asarray(p - q)
    exact = 0.5 * float(jnp.sum((q @ mu) ** 2)) + 0.5 * np.trace(gap @ c @ gap)
    own, other = (lambda t, x, args: -p @ x), (lambda t, x, args: -q @ (x - args))

    @jax.jit
    @jax.vmap
    def estimate(normal):
        samples = normal @ jnp.asarray(ROOTS[0].T)
        return sm.fisher_divergence(own, other, 0.0, samples, jnp.asarray(mu))

    values, errors = estimate(np.random.default_rng(11).normal(size=(500, 400, 2)))
    values, errors = np.asarray(values), np.asarray(errors)
    assert abs(values.mean() - exact) < 4 * values.std() / 500**0.5
    np.testing.assert_allclose(values.std(), np.sqrt(np.mean(errors**2)), rtol=0.15)
    zero = sm.fisher_divergence(own, own, 0.0, jnp.asarray(ROOTS[0]))
    assert zero == (0, 0)


def test_float32_stays_float32_and_is_close():
    mixture = rotated_mixture(2, jnp.float32)
    u, s = densities.log_density(mixture, CLEAN), densities.score(mixture, CLEAN)
    x, e = jnp.asarray([0.4, -1.3], jnp.float32), SIGNS.astype(jnp.float32)

    @jax.jit
    def all_of_them(x, e):
        found = [
            sm.implicit(s, 0.0, x),
            sm.sliced(s, 0.0, x, e),
            sm.sliced(sm.score_of(u), 0.0, x, e, variance_reduction=False),
            sm.implicit_log_density(u, 0.0, x),
        ]
        return sm.implicit(TRUE, 0.0, x.astype(float)), found, sm.fisher_divergence(s, s, 0.0, e)

    exact, found, divergence = all_of_them(x, e)
    assert {value.dtype for value in [*found, *divergence]} == {jnp.dtype("float32")}
    np.testing.assert_allclose(found, float(exact), rtol=1e-5)


def test_bad_arguments_of_the_tractable_losses():
    x, e = jnp.zeros(3), jnp.ones((2, 3))
    same, total = (lambda t, x, args: x), (lambda t, x, args: jnp.sum(x))
    with pytest.raises(ValueError, match=r"score returned shape \(\): .*one example, \(3,\)"):
        sm.implicit(total, 0.0, x)
    with pytest.raises(TypeError, match="score returned dtype float32 for x of float64"):
        sm.sliced(lambda t, x, args: x.astype(jnp.float32), 0.0, x, e)
    with pytest.raises(ValueError, match=r"t must be one time of shape \(\), got shape \(1,\)"):
        sm.sliced(same, jnp.zeros(1), x, e)
    with pytest.raises(ValueError, match=r"probes has shape \(3,\), but x of shape \(3,\) needs probes of shape"):
        sm.sliced(same, 0.0, x, e[0])
    with pytest.raises(ValueError, match="probes is None"):
        sm.implicit(same, 0.0, x, divergence=divergence.hutchinson)
    with pytest.raises(ValueError, match=r"log_density returned shape \(3,\): it must return one number"):
        sm.implicit_log_density(same, 0.0, x)
    with pytest.raises(TypeError, match="log_density returned dtype float32 for x of float64"):
        sm.score_of(lambda t, x, args: jnp.sum(x).astype(jnp.float32))(0.0, x, None)
    with pytest.raises(TypeError, match="x must be an array of floats, got dtype int64"):
        sm.implicit_log_density(total, 0.0, jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"samples has shape \(1, 3\), expected \[num, \*event\] with num at least 2"):
        sm.fisher_divergence(same, same, 0.0, x[None])
    for name, scores in (("score_p", (total, same)), ("score_q", (same, total))):
        with pytest.raises(ValueError, match=rf"{name} returned shape \(\)"):
            sm.fisher_divergence(*scores, 0.0, jnp.zeros((2, 3)))
