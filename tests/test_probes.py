"""Probes have identity covariance, their estimates the variance of theory, and bad arguments a remedy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import divergence, probes

DRAWS = [probes.rademacher, probes.gaussian, probes.sphere, probes.orthogonal]
NUM = 100_000


@pytest.fixture(scope="module")
def matrix():
    """Not symmetric, and far from diagonal."""
    return jax.random.normal(jax.random.key(3), (5, 5))


@pytest.mark.parametrize("draw", DRAWS)
def test_mean_zero_and_identity_covariance(draw):
    """10 covariance entries and 4 means within 4.5 standard errors: false alarm below 14 x 7e-6 = 1e-4 a sampler."""
    x = jnp.zeros((2, 2))
    keys = jax.random.split(jax.random.key(0), NUM)
    e = np.asarray(jax.jit(jax.vmap(lambda key: draw(key, x, 1)[0]))(keys)).reshape(NUM, 4)
    products = e[:, :, None] * e[:, None, :]
    for values, mean in ((e, np.zeros(4)), (products, np.eye(4))):
        error = np.abs(values.mean(0) - mean)
        stderr = values.std(0) / np.sqrt(NUM)
        assert np.all(error <= 4.5 * stderr + 1e-12), error / np.maximum(stderr, 1e-300)


@pytest.mark.parametrize("draw", DRAWS)
def test_variance_of_one_probe(draw, matrix):
    """Each family's variance of e^T A e, from the symmetric part S.

    The empirical variance lies within 4.5 of its standard errors, from the fourth moment: false alarm 7e-6
    each, 3e-5 for the four.
    """
    s = np.asarray(matrix + matrix.T) / 2
    norm2, m = np.sum(s**2), 5
    expected = {
        probes.rademacher: 2 * (norm2 - np.sum(np.diag(s) ** 2)),
        probes.gaussian: 2 * norm2,
        probes.sphere: 2 * m / (m + 2) * (norm2 - np.trace(s) ** 2 / m),
        probes.orthogonal: 2 * m / (m + 2) * (norm2 - np.trace(s) ** 2 / m),
    }[draw]

    def one(key):
        return divergence.hutchinson(lambda x: matrix @ x, jnp.ones(m), draw(key, jnp.ones(m)))[1]

    estimates = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), NUM)))
    centred = estimates - estimates.mean()
    stderr = np.std(centred**2) / np.sqrt(NUM)
    assert abs(np.mean(centred**2) - expected) < 4.5 * stderr
    assert 4.5 * stderr < 0.05 * expected  # the interval is narrow enough to tell the families apart
    assert abs(estimates.mean() - np.trace(s)) < 4.5 * np.sqrt(expected / NUM)


def test_rademacher_is_exact_on_a_diagonal_and_sphere_on_the_identity():
    x = jnp.asarray([0.3, -1.0, 2.0])
    key = jax.random.key(2)
    _, on_diagonal = divergence.quadratic_forms(lambda x: jnp.sin(x), x, probes.rademacher(key, x, 8))
    np.testing.assert_allclose(on_diagonal, np.cos(np.asarray(x)).sum(), rtol=1e-14)
    _, on_identity = divergence.quadratic_forms(lambda x: 2.5 * x, x, probes.sphere(key, x, 8))
    np.testing.assert_allclose(on_identity, 7.5, rtol=1e-14)


def test_rademacher_draws_every_sign_vector():
    """2^3 vectors, 100,000 draws, chi-square with 7 degrees of freedom below 36: false alarm 7e-6."""
    e = np.asarray(probes.rademacher(jax.random.key(4), jnp.zeros(3), NUM))
    counts = [int(np.sum(np.all(e == np.asarray(v), axis=1))) for v in itertools.product((-1, 1), repeat=3)]
    assert sum(counts) == NUM
    assert sum((c - NUM / 8) ** 2 / (NUM / 8) for c in counts) < 36


def test_sphere_has_its_radius():
    e = probes.sphere(jax.random.key(5), jnp.zeros((4, 3)), 50)
    np.testing.assert_allclose(jnp.sum(e**2, axis=(1, 2)), 12.0, rtol=1e-13)
    np.testing.assert_array_equal(jnp.abs(probes.sphere(jax.random.key(5), jnp.zeros(()), 50)), 1.0)


def test_orthogonal_probes_do_not_overlap_and_all_of_them_are_exact(matrix):
    x = jnp.asarray([0.1, -0.4, 0.8, 1.3, -2.0])
    e = probes.orthogonal(jax.random.key(6), x, 3)
    np.testing.assert_allclose(e @ e.T, 5 * np.eye(3), atol=1e-13)

    def f(x):
        return jnp.tanh(matrix @ x) * jnp.roll(x, 1)

    trace = np.trace(jax.jit(jax.jacfwd(f))(x))
    for seed in range(3):
        _, estimate = divergence.hutchinson(f, x, probes.orthogonal(jax.random.key(seed), x, 5))
        assert abs(estimate - trace) < 1e-12


@pytest.mark.parametrize("draw", DRAWS)
def test_dtype_and_shape_follow_x_and_keys_decide(draw):
    x = jnp.zeros((2, 3, 1), jnp.float32)
    e = draw(jax.random.key(0), x, 4)
    assert (e.shape, e.dtype) == ((4, 2, 3, 1), jnp.float32)
    np.testing.assert_array_equal(e, draw(jax.random.key(0), x, 4))
    assert not np.array_equal(e, draw(jax.random.key(1), x, 4))


@pytest.mark.parametrize("draw", DRAWS)
def test_bad_arguments(draw):
    x, key = jnp.zeros(3), jax.random.key(0)
    with pytest.raises(TypeError, match=r"typed key.*jax\.random\.key\(seed\)"):
        draw(jax.random.PRNGKey(0), x)
    with pytest.raises(ValueError, match=r"single key.*jax\.vmap"):
        draw(jax.random.split(key, 2), x)
    with pytest.raises(TypeError, match=r"x must be an array of floats, got dtype int32: .*astype"):
        draw(key, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        draw(key, x, 0)
    with pytest.raises(TypeError, match="num must be a Python int, known before tracing, got float"):
        draw(key, x, 2.0)
    with pytest.raises(ValueError, match="no entries"):
        draw(key, jnp.zeros((0, 2)))


def test_more_orthogonal_probes_than_dimensions():
    with pytest.raises(ValueError, match=r"num is 4, but x of shape \(3,\) has room for 3 .* pass num=3"):
        probes.orthogonal(jax.random.key(0), jnp.zeros(3), 4)
