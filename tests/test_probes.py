"""Probes have identity covariance, their estimates the variance of theory, and bad arguments a remedy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import divergence, probes

DRAWS = [probes.rademacher, probes.gaussian, probes.sphere, probes.orthogonal, probes.hadamard]
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
    each, 4e-5 for the five.
    """
    s = np.asarray(matrix + matrix.T) / 2
    norm2, m = np.sum(s**2), 5
    expected = {
        probes.rademacher: 2 * (norm2 - np.sum(np.diag(s) ** 2)),
        probes.hadamard: 2 * (norm2 - np.sum(np.diag(s) ** 2)),
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


@pytest.mark.parametrize("draw", DRAWS)
def test_trees_are_the_same_draw_in_pieces(draw):
    """One vector over all leaves: the same numbers as for one array of the size of the tree."""
    tree = {"a": jnp.zeros(3, jnp.float32), "b": (jnp.zeros((2, 2), jnp.float32), jnp.zeros((), jnp.float32))}
    e = draw(jax.random.key(1), tree, 4)
    flat = np.concatenate([np.asarray(leaf).reshape(4, -1) for leaf in jax.tree.leaves(e)], axis=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(e)} == {jnp.dtype("float32")}
    assert jax.tree.map(lambda leaf: leaf.shape[1:], e) == jax.tree.map(lambda leaf: leaf.shape, tree)
    np.testing.assert_array_equal(flat, draw(jax.random.key(1), jnp.zeros(8, jnp.float32), 4))
    with pytest.raises(TypeError, match="x has leaves of float32, float64: cast them to one dtype"):
        draw(jax.random.key(1), {"a": jnp.zeros(3), "b": jnp.zeros(3, jnp.float32)})


def test_streams_are_those_of_the_first_release():
    """Exact numbers that a user's seeds may rest on."""
    key, x = jax.random.key(7), jnp.zeros((2, 3))
    np.testing.assert_array_equal(probes.rademacher(key, x, 4), jax.random.rademacher(key, (4, 2, 3), x.dtype))
    np.testing.assert_array_equal(probes.gaussian(key, x, 4), jax.random.normal(key, (4, 2, 3), x.dtype))


@pytest.mark.parametrize(("shape", "order"), [((), 1), ((4,), 4), ((5,), 8), ((3, 4), 16)])
def test_hadamard_sets_are_exact(shape, order):
    """Signs of which P rows have orthogonal columns, in the same order again; the smaller set at num = m; and those of
    all other numbers above m."""
    x, key = jnp.zeros(shape), jax.random.key(11)
    m = x.size
    e = np.asarray(probes.hadamard(key, x, 2 * order)).reshape(-1, m)
    assert set(np.unique(e)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(e[:order].T @ e[:order], order * np.eye(m))
    np.testing.assert_array_equal(e[order:], e[:order])
    for part in {1, (m + 1) // 2} - {m}:
        np.testing.assert_array_equal(probes.hadamard(key, x, part).reshape(-1, m), e[:part])
    full = np.asarray(probes.hadamard(key, x, m)).reshape(m, m)
    np.testing.assert_allclose(full.T @ full, m * np.eye(m), rtol=1e-14)
    for num in {m + 1, order + 1, 2 * order - 1}:  # exact from m on, in either precision
        e = np.asarray(probes.hadamard(key, x, num)).reshape(num, m)
        np.testing.assert_allclose(e.T @ e, num * np.eye(m), atol=1e-12)
    low = probes.hadamard(key, jnp.zeros(shape, jnp.float32), order + 1)
    assert low.dtype == jnp.float32
    low = np.asarray(low, np.float64).reshape(-1, m)
    np.testing.assert_allclose(low.T @ low, (order + 1) * np.eye(m), atol=1e-4)


@pytest.mark.parametrize("num", [5, 6, 8, 11])
def test_hadamard_rows_are_centred_in_every_place(num):
    """Mean and covariance of each row of 5 coordinates, 20 z a place below 4.5, 30 places: false alarm below
    600 x 7e-6 = 4e-3, key fixed."""
    keys = jax.random.split(jax.random.key(12), 20_000)
    e = np.asarray(jax.jit(jax.vmap(lambda key: probes.hadamard(key, jnp.zeros(5), num)))(keys))
    products = e[:, :, :, None] * e[:, :, None, :]
    for values, mean in ((e, 0), (products, np.eye(5)[None])):
        error = np.abs(values.mean(0) - mean)
        assert np.all(error <= 4.5 * values.std(0) / np.sqrt(len(keys)) + 1e-12)


def test_grouped_probes_live_on_their_groups():
    x, groups = jnp.zeros((2, 3), jnp.float32), np.asarray([[0, 2, 1], [1, 0, 0]])
    e = np.asarray(probes.grouped(jax.random.key(0), x, groups, 50))
    assert (e.shape, e.dtype) == ((50, 3, 2, 3), np.float32)
    for g in range(3):
        np.testing.assert_allclose(np.abs(e[:, g]), np.broadcast_to(np.sqrt(3) * (groups == g), (50, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(np.mean(np.sum(e**2, axis=1) / 3, axis=0), 1, rtol=1e-6)  # the diagonal: always exact
    assert len(np.unique(np.sign(e[:, 0]), axis=0)) == 8
    tree = probes.grouped(jax.random.key(0), {"a": x, "b": x[0]}, {"a": groups, "b": groups[0]}, 2)
    assert jax.tree.map(jnp.shape, tree) == {"a": (2, 3, 2, 3), "b": (2, 3, 3)}


def test_bad_groups():
    key, x = jax.random.key(0), jnp.zeros(3)
    with pytest.raises(TypeError, match="groups must be integers, got dtype float64"):
        probes.grouped(key, x, np.zeros(3))
    with pytest.raises(ValueError, match=r"groups has shape \(2,\) and x \(3,\)"):
        probes.grouped(key, x, np.zeros(2, int))
    for groups in ([0, 2, 2], [0, 1, -1]):
        with pytest.raises(ValueError, match=r"every number from 0 to G - 1.*return_inverse"):
            probes.grouped(key, x, np.asarray(groups))
    with pytest.raises(TypeError, match="groups must be known before tracing"):
        jax.jit(lambda groups: probes.grouped(key, x, groups))(jnp.arange(3))
    with pytest.raises(ValueError, match="groups must be of the structure of x"):
        probes.grouped(key, {"a": x}, np.zeros(3, int))


def within(weights, labels):
    return np.sum(weights * (labels[:, None] == labels[None]))


def test_learned_groups():
    """A colourable pattern is coloured without loss; on a random one no assignment of 8 to 3 of 300 random ones is
    better; samples are averaged in their squares."""
    cycle = np.roll(np.eye(8), 1, axis=1)
    labels = probes.learn_groups(cycle + cycle.T + 3 * np.eye(8), 2)
    assert within(cycle, labels) == 0
    assert sorted(np.bincount(labels)) == [4, 4]
    samples = np.random.default_rng(0).normal(size=(5, 8, 8))
    samples = samples + samples.swapaxes(1, 2)
    weights = np.mean(samples**2, axis=0) * (1 - np.eye(8))
    labels = probes.learn_groups(samples, 3)
    random = [within(weights, np.random.default_rng(i).integers(0, 3, 8)) for i in range(300)]
    assert within(weights, labels) <= min(random)
    assert set(probes.learn_groups(np.zeros((4, 4)), 3)) == {0, 1, 2}
    np.testing.assert_array_equal(np.sort(probes.learn_groups(weights, 8)), np.arange(8))
    for bad in (np.ones((2, 3)), np.ones(4), np.triu(np.ones((3, 3))), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="symmetric must be"):
            probes.learn_groups(bad, 1)
    for bad in (0, 5, 2.0):
        with pytest.raises(ValueError, match="num_groups"):
            probes.learn_groups(np.eye(4), bad)


def test_rotated_probes_are_exact_in_the_eigenbasis(matrix):
    """e^T S e of rotated signs has no noise where the basis is that of the eigenvectors; covariance stays I."""
    values, vectors = jnp.linalg.eigh(matrix + matrix.T)
    e = probes.rotated(probes.rademacher(jax.random.key(3), jnp.zeros(5), 32), vectors)
    forms = jnp.einsum("ki,ij,kj->k", e, matrix + matrix.T, e)
    np.testing.assert_allclose(forms, np.sum(values), rtol=1e-12)
    every = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=5)))
    turned = probes.rotated(every, vectors)
    np.testing.assert_allclose(turned.T @ turned / 32, np.eye(5), atol=1e-13)
    np.testing.assert_allclose(turned[3], vectors @ every[3], rtol=1e-13)
    tree = {"a": every[:, :1], "b": every[:, 1:].reshape(32, 2, 2)}
    pieces = jax.tree.leaves(probes.rotated(tree, vectors))
    np.testing.assert_array_equal(np.concatenate([leaf.reshape(32, -1) for leaf in pieces], axis=1), turned)


def test_bad_bases():
    e = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"basis must be orthogonal.*jnp\.linalg\.qr"):
        probes.rotated(e, 2 * jnp.eye(3))
    assert np.isnan(jax.jit(lambda basis: probes.rotated(e, basis))(2 * jnp.eye(3))).all()
    with pytest.raises(ValueError, match=r"basis has shape \(2, 2\), but probes of 3 entries need \(3, 3\)"):
        probes.rotated(e, jnp.eye(2))
    with pytest.raises(TypeError, match="basis has dtype float32 and probes float64"):
        probes.rotated(e, jnp.eye(3, dtype=jnp.float32))
    with pytest.raises(ValueError, match=r"probes must be \[num, \*event\]"):
        probes.rotated({"a": e, "b": e[1:]}, jnp.eye(6))


def test_spread_probes_use_every_row_before_any_again():
    """6 nodes of 5 rows: 30 rows of 16 are each used once, and then 14 of them again, in the same order."""
    x = jnp.zeros((2, 5))
    own = probes.spread(jax.random.key(0), x, 6, 5)
    assert own.shape == (6, 5, 2, 5)
    rows = np.asarray(own.reshape(30, 10))
    np.testing.assert_allclose(rows[:16].T @ rows[:16], 16 * np.eye(10))
    np.testing.assert_array_equal(rows[16:], rows[:14])
    np.testing.assert_array_equal(rows[:5], probes.hadamard(jax.random.key(0), x, 5).reshape(5, 10))
