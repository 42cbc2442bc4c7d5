"""Noise conditional score networks: the objective by quadrature, the sampler by the exact law of its chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import rotation

from dgm_jax import densities, langevin, ncsn, schedules, score_matching

# Data in the plane: two Gaussians, neither of them along the axes
ROOTS = np.array([[[0.8, 0.0], [0.5, 0.4]], [[0.5, 0.0], [-0.3, 0.6]]])  # of the covariances: C = L L^T
MEANS = np.array([[0.6, -0.4], [-0.5, 0.3]])
DATA = densities.Mixture(jnp.asarray([0.3, 0.7]), jnp.asarray(MEANS), jnp.asarray(ROOTS @ ROOTS.transpose(0, 2, 1)))
SIGMA_MAX = 4.0
SIGMAS = ncsn.levels(SIGMA_MAX, 0.6, 4)


def by_sigma(field, sigma_max):
    """An oracle of ``densities`` for the schedule edm(sigma_max), called by sigma instead of time."""
    return lambda sigma, x, args: field(sigma / sigma_max, x, args)


TRUE = by_sigma(densities.score(DATA, schedules.edm(SIGMA_MAX)), SIGMA_MAX)


def normal_grid(num, dims):
    """Nodes [num^dims, dims] and weights of Gauss-Hermite quadrature against N(0, I)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    grid = np.stack(np.meshgrid(*[nodes] * dims, indexing="ij"), -1).reshape(-1, dims)
    weight = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * dims, indexing="ij"), -1), -1)
    return grid, weight.reshape(-1)


def rough(sigma, x, args):
    """A model that is wrong: a polynomial in x, bent and without symmetry."""
    return (args["a"] * x + args["b"] * jnp.stack([x[1] * x[0], x[0] - x[1] ** 2])) / sigma + args["c"]


PARAMS = [
    {"a": jnp.asarray(-0.7), "b": jnp.asarray(0.3), "c": jnp.asarray([0.2, -0.5])},
    {"a": jnp.asarray(0.4), "b": jnp.asarray(-0.1), "c": jnp.asarray([1.0, 0.1])},
    {"a": jnp.asarray(-1.3), "b": jnp.asarray(0.0), "c": jnp.asarray([0.0, 0.0])},
]


def test_loss_less_the_explicit_one_is_a_known_number_at_every_level():
    """The denoising loss less sigma^2/2 E |s - grad log p|^2 is (2 - sigma^2 E |grad log p|^2) / 2 for every model.

    Exact quadrature for the first (x_0 and eps, a polynomial of degree 4), 150 x 150 nodes a component for the second:
    1e-8 at every level.
    """
    four, weight4 = normal_grid(5, 4)
    x0 = jnp.asarray(np.concatenate([m[None] + four[:, :2] @ r.T for m, r in zip(MEANS, ROOTS, strict=True)]))
    eps, weight0 = jnp.asarray(np.tile(four[:, 2:], (2, 1))), np.concatenate([w * weight4 for w in DATA.weights])
    two, weight2 = normal_grid(150, 2)
    weight_x = np.concatenate([w * weight2 for w in DATA.weights])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *PARAMS)

    @jax.jit
    def at(level):
        sigma = SIGMAS[level]
        roots = jnp.linalg.cholesky(DATA.covariances + sigma**2 * jnp.eye(2)[None])
        x = jnp.concatenate([DATA.means[k][None] + jnp.asarray(two) @ roots[k].T for k in range(2)])

        def losses(params):
            left = jax.vmap(lambda x, e: ncsn.loss(rough, SIGMAS, level, x, e, params))(x0, eps)
            right = jax.vmap(lambda x: score_matching.explicit(rough, TRUE, sigma, x, params))(x)
            return weight0 @ left, sigma**2 * (weight_x @ right)

        squares = jax.vmap(lambda x: jnp.sum(TRUE(sigma, x, None) ** 2))(x)
        return jax.vmap(losses)(stacked), 0.5 * (2 - sigma**2 * (weight_x @ squares))

    for level in range(len(SIGMAS)):
        (left, right), number = at(level)
        np.testing.assert_allclose(left - right, number, rtol=0, atol=1e-8)
        assert np.ptp(right) > 0.1  # while the models do differ


def test_the_true_score_has_gradient_zero_at_every_level():
    """At s = true score + args each level's expected loss has gradient 0 in args, to 1e-7, for a push and for a bend.

    By quadrature over x_0 and eps with 24 nodes a dimension. With the weight sigma^2 all levels count alike: in a push
    of size args / sigma the gradient is args at each.
    """
    nodes, weight = normal_grid(24, 4)
    x0 = [jnp.asarray(m[None] + nodes[:, :2] @ r.T) for m, r in zip(MEANS, ROOTS, strict=True)]
    eps = jnp.asarray(nodes[:, 2:])

    def pushed(sigma, x, args):
        return TRUE(sigma, x, None) + (args[:2] + args[2] * jnp.sin(x) + args[3] * x[::-1]) / sigma

    @jax.jit
    @jax.grad
    def gradient(args, level):
        one = jax.vmap(lambda x, e: ncsn.loss(pushed, SIGMAS, level, x, e, args))
        return sum(w * (weight @ one(x, eps)) for w, x in zip(DATA.weights, x0, strict=True))

    for level in range(len(SIGMAS)):
        np.testing.assert_allclose(gradient(jnp.zeros(4), level), 0, atol=1e-7)
        np.testing.assert_allclose(gradient(jnp.asarray([0.5, 0.0, 0.0, 0.0]), level)[:2], [0.5, 0.0], atol=1e-7)


# Far, unequal modes: 0.2 and 0.8 of the data in two long Gaussians, 8 apart along a direction u off the axes. Their
# covariances have u as an axis, so that the projection on u is a chain of its own, whose law is computed exactly below.
SHARE, HALF, WIDTHS = 0.2, 4.0, np.array([0.5, 1.2])
TURN = rotation(2, 8)
FAR = densities.Mixture(
    jnp.asarray([SHARE, 1 - SHARE]),
    jnp.asarray(HALF * np.stack([-TURN[:, 0], TURN[:, 0]])),
    jnp.asarray(np.stack([TURN @ np.diag(WIDTHS**2) @ TURN.T] * 2)),
)
GRID = np.linspace(-40, 40, 1601)


def law_on_the_line(start, steps):
    """The density of the projection after the steps (sigma, alpha) [num], from N(0, start^2), by repeated quadrature.

    One step moves y by alpha/2 times the score of 0.2 N(-4, v) + 0.8 N(4, v), v = 0.25 + sigma^2, written out here, and
    adds N(0, alpha). Trapezoidal sums on a grid finer than a third of the noise.
    """
    law = np.exp(-0.5 * (GRID / start) ** 2)
    law /= law.sum()
    last, kernel = None, None
    for sigma, alpha in steps:
        if (sigma, alpha) != last:
            v = WIDTHS[0] ** 2 + sigma**2
            lean = np.tanh(HALF * GRID / v + 0.5 * np.log((1 - SHARE) / SHARE))  # p(+ | y) - p(- | y)
            to = GRID + 0.5 * alpha * (HALF * lean - GRID) / v
            kernel = np.exp(-0.5 * (GRID[None] - to[:, None]) ** 2 / alpha)
            kernel /= kernel.sum(1, keepdims=True)
            last = sigma, alpha
        law = law @ kernel
    return law


@pytest.mark.slow
def test_annealed_gets_far_unequal_modes_right_and_plain_langevin_does_not():
    """With the exact score, from N(0, 8^2 I), 1,000 evaluations for each of 4,000 samples; 0.2 is in the smaller mode.

    Both chains have a law known exactly (above), and the shares found agree with it within 4 standard errors (0.0064
    and 0.0079): a false alarm in 8,000. That law has 0.2088 for the annealed chain, 0.0088 of it the bias of 50 steps a
    level, and 0.4978 for the plain one: noise falls to either side of the valley alike.
    """
    sigma_max, num, num_steps, step_size = 8.0, 4_000, 50, 0.03
    sigmas = np.geomspace(sigma_max, 0.3, 20)
    score = by_sigma(densities.score(FAR, schedules.edm(sigma_max)), sigma_max)

    @jax.jit
    @jax.vmap
    def ends(key, x):
        key_plain, key_annealed = jax.random.split(key)
        plain = langevin.unadjusted(key_plain, score, x, step_size=step_size, num_steps=20 * num_steps)
        options = {"step_size": step_size, "num_steps": num_steps, "denoise": False}
        return plain, langevin.annealed(key_annealed, score, jnp.asarray(sigmas), x, **options)

    def share(law):
        return law[GRID < 0].sum() + 0.5 * law[GRID == 0].sum()

    x0 = sigma_max * jax.random.normal(jax.random.key(0), (num, 2))
    plain, annealed = ends(jax.random.split(jax.random.key(1), num), x0)
    ladder = np.repeat(np.stack([sigmas, step_size * (sigmas / sigmas[-1]) ** 2], 1), num_steps, axis=0)
    laws = {"plain": [(0.0, step_size)] * 200, "annealed": ladder.tolist()}
    exact = {name: share(law_on_the_line(sigma_max, steps)) for name, steps in laws.items()}
    for name, x in (("plain", plain), ("annealed", annealed)):
        found = np.mean(np.asarray(x) @ TURN[:, 0] < 0)
        stderr = np.sqrt(exact[name] * (1 - exact[name]) / num)
        assert abs(found - exact[name]) < 4 * stderr, (name, found, exact[name], stderr)
    np.testing.assert_allclose(exact["annealed"], SHARE + 0.0088, atol=1e-4)
    np.testing.assert_allclose(exact["plain"], 0.4978, atol=1e-4)


def test_levels_are_geometric_and_end_exactly():
    sigmas = ncsn.levels(50.0, 0.01, 232)
    assert sigmas[0] == 50.0
    assert sigmas[-1] == 0.01
    np.testing.assert_allclose(sigmas[:-1] / sigmas[1:], 5000 ** (1 / 231), rtol=1e-12)
    np.testing.assert_allclose(ncsn.levels(2, 0.5, 3), [2, 1, 0.5], rtol=1e-15)
    assert ncsn.levels(2.0, 0.5, 3, dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("sigma_max", "num", "num_steps", "published"),
    [(50, 232, 5, 6.2e-6), (90, 500, 5, 3.3e-6), (190, 1086, 3, 1.8e-6), (348, 2311, 3, 0.9e-6)],
)
def test_step_size_is_that_of_the_paper(sigma_max, num, num_steps, published):
    """What Song & Ermon (2020) give for CIFAR-10, CelebA, LSUN bedroom and FFHQ, to their two digits (half of ours)."""
    found = ncsn.step_size(ncsn.levels(sigma_max, 0.01, num), num_steps)
    assert float(f"{found / 2:.1e}") == pytest.approx(published, abs=0.5e-7)


def test_step_size_keeps_the_variance_of_a_point():
    """Data at a point, levels 36 per cent apart: the variance after each level is its sigma^2 within 25 per cent.

    Measured on 20,000 chains; half the step and twice the step leave a good deal more.
    """
    sigmas, point = ncsn.levels(3.0, 0.1, 12), jnp.asarray([1.0, -2.0])
    score = lambda sigma, x, args: (point - x) / sigma**2  # noqa: E731
    best = ncsn.step_size(sigmas, 5)

    @jax.jit
    def excess(step_size):
        def run(key):
            key_start, key = jax.random.split(key)
            x0 = point + 3.0 * jax.random.normal(key_start, (2,))
            return langevin.annealed(key, score, sigmas, x0, step_size=step_size, num_steps=5, thin=5)[1]

        states = jax.vmap(run)(jax.random.split(jax.random.key(0), 20_000))
        return jnp.mean((states - point[None, None]) ** 2, axis=(0, 2)) / sigmas**2 - 1

    chosen, smaller, larger = (np.asarray(excess(c * best)) for c in (1.0, 0.5, 2.0))
    assert np.abs(chosen).max() < 0.25
    assert smaller[-1] > 1.3 * chosen[-1], (smaller, chosen)
    assert larger[-1] > 1.3 * chosen[-1], (larger, chosen)


def test_float32_and_a_level_that_is_traced():
    x0, noise = jnp.ones(2, jnp.float32), jnp.asarray([0.5, -1.0], jnp.float32)
    score = lambda sigma, x, args: -x / (1 + sigma**2)  # noqa: E731

    @jax.jit
    def at(level):
        return ncsn.loss(score, jnp.asarray([4.0, 2.0, 1.0, 0.5]), level, x0, noise)

    value = at(3)  # sigma = 0.5: 1/2 |0.5 s + noise|^2 at x = (1.25, 0.5), s = -x / 1.25
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 0.5 * (0.0**2 + 1.2**2), rtol=1e-6)
    assert np.isnan(at(4))
    assert np.isnan(at(-1))
    rising = jax.jit(lambda sigmas: loss(sigmas=sigmas))
    assert np.isnan(rising(SIGMAS[::-1]))
    assert np.isfinite(rising(SIGMAS))


def loss(**changes):
    options = {"score": lambda s, x, args: -x, "sigmas": SIGMAS, "level": 0, "x0": jnp.ones(2), "noise": jnp.ones(2)}
    return ncsn.loss(**{**options, **changes})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ncsn.levels(1.0, 2.0, 4), ValueError, "levels need sigma_max > sigma_min > 0.*got sigma_max=1.0"),
        (lambda: ncsn.levels(1.0, 0.0, 4), ValueError, "levels need sigma_max > sigma_min > 0"),
        (lambda: ncsn.levels(float("inf"), 1.0, 4), ValueError, "both finite"),
        (lambda: ncsn.levels(2.0, 1.0, 1), ValueError, "num must be an integer of at least 2, got 1"),
        (lambda: ncsn.levels(2.0, 1.0, 4, dtype=int), TypeError, "dtype must be of floats, got int"),
        (lambda: ncsn.levels(1.0, 0.9999, 4, dtype=jnp.float16), ValueError, "sigmas must fall from the largest"),
        (lambda: loss(sigmas=SIGMAS[::-1]), ValueError, "sigmas must fall from the largest"),
        (lambda: loss(sigmas=jnp.zeros(1)), ValueError, "sigmas must be positive and finite"),
        (lambda: loss(level=4), ValueError, "level must be from 0 to 3, an index into the 4 levels, got 4"),
        (lambda: loss(level=-1), ValueError, "level must be from 0 to 3"),
        (lambda: loss(level=0.5), TypeError, "level must be an integer"),
        (lambda: loss(level=jnp.arange(2)), ValueError, "level must be one index.*jax.vmap over levels"),
        (lambda: loss(noise=jnp.ones(3)), ValueError, r"noise has shape \(3,\) and x0 \(2,\)"),
        (lambda: loss(noise=jnp.ones(2, jnp.float32)), TypeError, "noise has dtype float32 and x0 float64"),
        (lambda: loss(x0=jnp.arange(2)), TypeError, "x0 must be an array of floats"),
        (lambda: loss(score=lambda s, x, args: x[:1]), ValueError, r"score returned shape \(1,\)"),
        (lambda: loss(score=lambda s, x, args: x.astype(jnp.float32)), TypeError, "score returned dtype float32"),
        (lambda: ncsn.step_size(SIGMAS[:1], 5), ValueError, "sigmas must hold at least 2 levels"),
        (lambda: ncsn.step_size(SIGMAS, 0), ValueError, "num_steps must be a positive integer, got 0"),
        (lambda: jax.jit(lambda s: ncsn.step_size(s, 5))(SIGMAS), TypeError, "sigmas must be known"),
    ],
)
def test_bad_input_is_named_with_a_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()
