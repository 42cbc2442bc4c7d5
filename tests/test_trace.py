"""Trace estimators against closed forms, naive references, and each other; their errors, gradients and products."""

import functools
import itertools
import math

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import probes, trace

M = 6
ESTIMATORS = {  # on independent probes: (estimator, probes wanted, products made, positive maps only)
    "hutchinson": (trace.hutchinson, 4, 4, False),
    "grouped": (lambda f, e: trace.grouped(f, in_groups(e)), 4, 16, False),
    "deflated": (lambda f, e: trace.deflated(f, jax.tree.map(lambda leaf: axis(leaf, 2), e), e), 4, 6, False),
    "control_variate": (lambda f, e: trace.control_variate(f, rolled, 0.5 * entries(e), e), 4, 4, False),
    "hutch_pp": (trace.hutch_pp, 4, 6, False),
    "na_hutch_pp": (functools.partial(trace.na_hutch_pp, sketch=(2, 8)), 14, 14, False),
    "xtrace": (trace.xtrace, 3, 6, False),
    "xtrace normalized": (functools.partial(trace.xtrace, normalize=True), 3, 6, False),
    "xnystrace": (trace.xnystrace, 4, 4, True),
    "xnystrace normalized": (functools.partial(trace.xnystrace, normalize=True), 4, 4, True),
}


def axis(leaf, r):
    """r of the unit vectors of an array of probes; in a tree, rows of a leaf's own that are orthonormal in the tree."""
    flat = jnp.eye(r, leaf[0].size, dtype=leaf.dtype)
    return flat.reshape(r, *leaf.shape[1:])


def in_groups(e):
    """The same probes, one of four groups of coordinates at a time: each fourth one, counted over all leaves."""
    leaves, treedef = jax.tree.flatten(e)
    sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]
    parts = []
    for leaf, size, start in zip(leaves, sizes, itertools.accumulate([0, *sizes]), strict=False):
        members = (start + np.arange(size)) % 4 == np.arange(4)[:, None]
        parts.append(2 * leaf[:, None] * members.reshape(4, *leaf.shape[1:]).astype(leaf.dtype)[None])
    return treedef.unflatten(parts)


def rolled(e):
    """A map of trace m / 2, not symmetric."""
    flat, unravel = jax.flatten_util.ravel_pytree(e)
    return unravel(flat / 2 + jnp.roll(flat, 1))


def entries(e):
    return sum(leaf[0].size for leaf in jax.tree.leaves(e))


def matrix(m=M, seed=3, dtype=jnp.float64):
    """Dense and not symmetric."""
    return jax.random.normal(jax.random.key(seed), (m, m), dtype)


def spectral(values, seed=0):
    """Symmetric, with these eigenvalues in a random orthogonal basis."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return jnp.asarray((q * np.asarray(values)) @ q.T)


def keys(num, seed=0):
    return jax.random.split(jax.random.key(seed), num)


def draw_for(name):
    return probes.sphere if "normalized" in name else probes.rademacher


def signs(d):
    return jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=d)))


def symmetric_noise(a):
    """Hutchinson's variance of one Rademacher probe."""
    s = np.asarray(a + a.T) / 2
    return 2 * (np.sum(s**2) - np.sum(np.diag(s) ** 2))


def test_exact_in_every_block_size_and_shape():
    a = matrix(12)
    for size in (None, 1, 5, 12, 100):
        x = jnp.zeros((3, 4))
        value, stderr = jax.jit(lambda a, x=x, size=size: trace.exact(mapped(a), x, size=size))(a)
        np.testing.assert_allclose([value, stderr], [np.trace(a), 0], atol=1e-13)
    gradient = jax.jit(
        jax.grad(lambda a: trace.exact(mapped(a), {"a": jnp.zeros(8), "b": jnp.zeros((2, 2))}, size=5)[0])
    )
    np.testing.assert_allclose(gradient(a), np.eye(12))


def mapped(a):
    """The map of a matrix, for examples of any structure of its size."""

    def matvec(e):
        flat, unravel = jax.flatten_util.ravel_pytree(e)
        return unravel(a @ flat)

    return matvec


def test_all_sign_vectors_give_the_trace_and_the_variance():
    """All 2^4 of them: the mean is the trace, the variance of one is that of theory, and the error bar says so."""
    a, e = matrix(4), signs(4)
    value, stderr = jax.jit(lambda a: trace.hutchinson(mapped(a), e))(a)
    np.testing.assert_allclose(value, np.trace(a), rtol=1e-13)
    np.testing.assert_allclose(stderr**2 * 16 * 15 / 16, symmetric_noise(a), rtol=1e-12)
    c = jax.random.normal(jax.random.key(1), (4, 4))
    value, stderr = jax.jit(lambda a: trace.control_variate(mapped(a), mapped(c), jnp.trace(c), e, coefficient=0.7))(a)
    np.testing.assert_allclose(value, np.trace(a), rtol=1e-13)
    np.testing.assert_allclose(stderr**2 * 15, symmetric_noise(a - 0.7 * c), rtol=1e-12)


@pytest.mark.parametrize("name", ["hutch_pp", "na_hutch_pp", "deflated"])
def test_given_the_sketch_all_sign_vectors_give_the_trace(name):
    """What the sketch leaves is estimated without bias: over all signs, exactly."""
    a, sketch = matrix(4), probes.gaussian(jax.random.key(5), jnp.zeros(4), 3)
    e = jnp.concatenate([sketch, signs(4)])
    value, stderr = jax.jit(
        {
            "hutch_pp": lambda a: trace.hutch_pp(mapped(a), e, sketch=2 + 1),
            "na_hutch_pp": lambda a: trace.na_hutch_pp(mapped(a), e, sketch=(1, 2)),
            "deflated": lambda a: trace.deflated(mapped(a), jnp.linalg.qr(sketch.T)[0].T[:2], signs(4)),
        }[name]
    )(a)
    np.testing.assert_allclose(value, np.trace(a), rtol=1e-12)
    assert stderr > 0


def test_finite_population_error():
    """The error bar of probes without replacement, on average over draws, is the true variance: within 4.5 errors."""
    a, num = matrix(), 3000

    def one(key, draw, population, k):
        return trace.hutchinson(mapped(a), draw(key, jnp.zeros(M), k), population=population)

    def rows(key, x, k):  # of a Hadamard matrix, round and round
        return probes.hadamard_rows(probes.hadamard_matrix(key, x.size, x.dtype), jnp.arange(k))

    for case in ((probes.orthogonal, M, 4), (probes.hadamard, 8, 5), (rows, 8, 11)):
        value, stderr = map(np.asarray, jax.jit(jax.vmap(lambda key, case=case: one(key, *case)))(keys(num)))
        square = (value - np.trace(a)) ** 2
        difference = square - stderr**2
        assert abs(difference.mean()) < 4.5 * difference.std() / np.sqrt(num)
        assert square.std() / np.sqrt(num) < 0.06 * square.mean()
    whole = [(probes.orthogonal, M), *((probes.hadamard, k) for k in (M, 7, 8, 11, 16))]
    for draw, k in whole:
        value, stderr = jax.jit(one, static_argnums=(1, 2, 3))(jax.random.key(1), draw, k, k)
        np.testing.assert_allclose([value, stderr], [np.trace(a), 0], atol=1e-12)
    assert trace.hutchinson(mapped(a), jnp.ones((1, M)), population=M).stderr == np.inf


def test_hadamard_variance_of_theory():
    """2 (|S|^2 - sum S_ii^2) / k (P - k) / (P - 1), within 4.5 errors."""
    a, num, k = matrix(), 20_000, 3
    values = np.asarray(
        jax.jit(jax.vmap(lambda key: trace.hutchinson(mapped(a), probes.hadamard(key, jnp.zeros(M), k)).value))(
            keys(num)
        )
    )
    square = (values - np.trace(a)) ** 2
    assert abs(square.mean() - symmetric_noise(a) / k * 5 / 7) < 4.5 * square.std() / np.sqrt(num)


def test_groups_leave_the_noise_within_them():
    """Variance 2 sum within groups of S_ij^2; none where A couples between groups alone."""
    a, groups, num = matrix(), np.asarray([[0, 1, 2], [0, 1, 1]]), 4000

    def one(key, a):
        return trace.grouped(mapped(a), probes.grouped(key, jnp.zeros((2, 3)), groups, 2))

    value, stderr = map(np.asarray, jax.jit(jax.vmap(one, (0, None)))(keys(num), a))
    s = np.asarray(a + a.T) / 2
    labels = groups.reshape(-1)
    within = (labels[:, None] == labels[None]) & ~np.eye(M, dtype=bool)
    square = (value - np.trace(a)) ** 2
    expected = 2 * np.sum(s[within] ** 2) / 2
    for each in (square, stderr**2):
        assert abs(each.mean() - expected) < 4.5 * each.std() / np.sqrt(num)
    between = jnp.where(jnp.asarray(within), 0, a)
    estimate = jax.jit(one)(jax.random.key(2), between)
    np.testing.assert_allclose(estimate, [np.trace(a), 0], atol=1e-12)
    assert trace.grouped(mapped(a), probes.grouped(jax.random.key(2), jnp.zeros(M), labels)).stderr == np.inf


@pytest.mark.parametrize("name", ESTIMATORS)
def test_value_and_gradient_are_unbiased(name):
    """E[estimate] = tr A and E[d estimate / d theta] = d tr A / d theta: two z below 4.5, false alarm 1.4e-5 each.

    The map is a dense one, not symmetric except where that is asked for, and depends on theta beyond a factor.
    """
    estimator, n, _, positive = ESTIMATORS[name]
    b, c = matrix() + jnp.eye(M), matrix(seed=4)

    def a(theta):
        dense = b + jnp.sin(theta) * c + theta**2 * b @ c / 3
        return dense @ dense.T if positive else dense

    def one(key, theta):
        e = draw_for(name)(key, jnp.zeros(M), n)
        return jax.value_and_grad(lambda theta: estimator(mapped(a(theta)), e).value)(theta)

    theta, num = jnp.asarray(0.4), 4000
    values, slopes = map(np.asarray, jax.jit(jax.vmap(one, (0, None)))(keys(num, 7), theta))
    trace_and_slope = jax.value_and_grad(lambda theta: jnp.trace(a(theta)))(theta)
    for got, wanted in zip((values, slopes), trace_and_slope, strict=True):
        assert np.all(np.isfinite(got))
        assert abs(got.mean() - wanted) < 4.5 * got.std() / np.sqrt(num), name
        assert 4.5 * got.std() / np.sqrt(num) < 0.35 * abs(wanted), (name, got.std(), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hutchinson", "grouped", "deflated", "control_variate", "hutch_pp", "na_hutch_pp"])
def test_two_standard_errors_cover(name):
    """16 terms of independent probes: Student's t with 15 degrees of freedom has 93.6 per cent within 2."""
    estimator, (n, options) = {
        "hutch_pp": (trace.hutch_pp, (20, {"sketch": 4})),
        "na_hutch_pp": (trace.na_hutch_pp, (20, {"sketch": (1, 3)})),
    }.get(name, (ESTIMATORS[name][0], (16, {})))
    a = spectral(0.8 ** np.arange(12))

    def one(key):
        return estimator(mapped(a), probes.rademacher(key, jnp.zeros(12), n), **options)

    value, stderr = map(np.asarray, jax.jit(jax.vmap(one))(keys(2000, 3)))
    covered = np.mean(np.abs(value - np.trace(a)) <= 2 * stderr)
    assert 0.90 < covered < 0.99, covered


@pytest.mark.parametrize(
    "name", ["hutch_pp", "na_hutch_pp", "xtrace", "xtrace normalized", "xnystrace", "xnystrace normalized"]
)
def test_exact_and_differentiable_where_the_map_has_low_rank(name):
    """Ranks 0 to 3 of 12, n large enough for the sketch: the trace to rounding, and a finite gradient."""
    estimator = trace.na_hutch_pp if name == "na_hutch_pp" else ESTIMATORS[name][0]
    positive = ESTIMATORS[name][3]
    u = jax.random.normal(jax.random.key(1), (2, 12, 3))
    e = draw_for(name)(jax.random.key(2), jnp.zeros(12), {"hutch_pp": 8, "na_hutch_pp": 16}.get(name, 7))
    symmetric = positive or name == "na_hutch_pp"

    def value(u, scale):
        a = (u[0] * scale[None]) @ (u[0] if symmetric else u[1]).T
        estimate = estimator(mapped(a), e)
        return estimate.value, (jnp.trace(a), estimate.stderr)

    scales = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 1e-3, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    (values, (wanted, stderr)), gradient = jax.jit(jax.vmap(jax.value_and_grad(value, has_aux=True), (None, 0)))(
        u, scales
    )
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-10)
    assert np.all(np.asarray(stderr) < 1e-10)
    assert np.all(np.isfinite(gradient))


def test_gradient_of_a_low_rank_map_is_near_the_truth_where_the_approximation_moves_with_it():
    """xnystrace and na_hutch_pp on theta B, B of low rank: d/dtheta tr = tr B, without noise."""
    u = jax.random.normal(jax.random.key(1), (12, 3))
    b = u @ u.T
    for estimator, n in ((trace.xnystrace, 7), (trace.na_hutch_pp, 16)):
        e = probes.rademacher(jax.random.key(2), jnp.zeros(12), n)
        slope = jax.jit(jax.grad(lambda t, f=estimator, e=e: f(mapped(t * b), e).value))(1.3)
        np.testing.assert_allclose(slope, np.trace(b), rtol=1e-9)


def xtrace_term(a, e, i, others, normalize):
    """tr(Q^T A Q) + u^T A u with the basis Q from the QR decomposition of A's images of the others."""
    rest = np.linalg.qr(a @ e[others].T)[0]
    u = e[i] - rest @ (rest.T @ e[i])
    if normalize:
        u *= np.sqrt((e.shape[1] - len(others)) / (u @ u))
    return np.trace(rest.T @ a @ rest) + u @ a @ u


def xnystrace_term(a, e, i, others, normalize):
    """Nystrom's approximation from the others, and the length of what they do not span."""
    rest = e[others].T
    n = a @ rest @ np.linalg.inv(rest.T @ a @ rest) @ rest.T @ a
    q = np.linalg.qr(rest)[0]
    p = e[i] - q @ (q.T @ e[i])
    scale = (e.shape[1] - len(others)) / (p @ p) if normalize else 1
    return np.trace(n) + scale * e[i] @ (a - n) @ e[i]


def leave_one_out(term, a, e, normalize):
    """The mean over the probes left out, and the root of s^2 / n + mean of D_ij D_ji, D_ij the change without j too."""
    n = len(e)
    without = [[k for k in range(n) if k != i] for i in range(n)]
    terms = np.asarray([term(a, e, i, without[i], normalize) for i in range(n)])
    changes = [
        [terms[i] - term(a, e, i, [k for k in without[i] if k != j], normalize) if i != j else 0.0 for j in range(n)]
        for i in range(n)
    ]
    common = np.sum(np.asarray(changes) * np.transpose(changes)) / (n * (n - 1))
    return np.mean(terms), np.sqrt(np.var(terms, ddof=1) / n + max(common, 0.0)), common


@pytest.mark.parametrize("normalize", [False, True])
def test_leave_one_out_formulas_against_loops(normalize):
    general, positive = matrix(10), spectral(0.5 ** np.arange(10))
    seen = []
    for estimator, term, a in (
        (trace.xtrace, xtrace_term, general),
        (trace.xtrace, xtrace_term, positive),
        (trace.xnystrace, xnystrace_term, positive),
    ):
        run = jax.jit(lambda a, e, f=estimator: f(mapped(a), e, normalize=normalize))
        for n, seed in ((2, 8), (5, 8), (5, 9)):
            e = probes.gaussian(jax.random.key(seed), jnp.zeros(10), n)
            value, stderr, common = leave_one_out(term, np.asarray(a), np.asarray(e), normalize)
            np.testing.assert_allclose(run(a, e), (value, stderr), rtol=1e-8)
            seen.append(common > 0)
    assert any(seen)


@pytest.mark.parametrize("name", ["xtrace", "xtrace normalized", "xnystrace", "xnystrace normalized"])
def test_the_variance_of_leave_one_out_means_is_unbiased(name):
    """Mean of stderr^2 against the mean square error, z below 4 (one failure in 16,000), where it matters.

    Nine probes in 20 dimensions: without what two terms have in common, the standard error would cover too little.
    """
    estimator, draw = ESTIMATORS[name][0], draw_for(name)
    a = spectral(np.linspace(1.0, 0.05, 20))

    def one(key):
        return estimator(mapped(a), draw(key, jnp.zeros(20), 9))

    # one after the other: batches of decompositions that run at once can wait for each other for ever
    value, stderr = map(np.asarray, jax.jit(lambda keys: jax.lax.map(one, keys))(keys(3000, 5)))
    squares = (value - np.trace(a)) ** 2
    differences = squares - stderr**2
    assert abs(differences.mean()) < 4 * differences.std() / np.sqrt(len(value))
    assert 4 * differences.std() / np.sqrt(len(value)) < 0.2 * squares.mean()
    covered = np.mean(np.abs(value - np.trace(a)) <= 2 * stderr)
    assert 0.90 < covered < 0.99, covered


def test_repeated_probes_and_all_of_them():
    """Two equal probes leave nothing to each other; n = m is the most."""
    a = spectral([3.0, 1.0, 0.5, 0.2])
    e = jnp.asarray([[1.0, 1, 1, 1], [1, 1, 1, 1], [1, -1, 1, 1], [-1, -1, 1, 1]])
    z = probes.gaussian(jax.random.key(0), jnp.zeros(4), 4)
    estimators = (trace.xtrace, trace.xnystrace)
    repeated, all_of_them = jax.jit(
        lambda a: ([f(mapped(a), e) for f in estimators], [f(mapped(a), z, normalize=True) for f in estimators])
    )(a)
    assert np.isfinite([*repeated, *all_of_them]).all()
    assert np.all(np.abs(np.asarray(repeated)[:, 0] - 4.7) < 4.7)


def test_xnystrace_refuses_what_is_not_positive_or_symmetric():
    e = probes.gaussian(jax.random.key(0), jnp.zeros(M), 4)
    maps = jnp.stack([spectral([1.0, -1, 2, -2, 1, 1]), matrix() @ matrix().T + jnp.triu(matrix())])
    assert np.isnan(jax.jit(jax.vmap(lambda a: trace.xnystrace(mapped(a), e).value))(maps)).all()


@pytest.mark.parametrize("name", ["xtrace", "xnystrace"])
def test_one_probe_is_hutchinsons(name):
    a, e = matrix() @ matrix().T, jnp.ones((1, M))
    estimator = ESTIMATORS[name][0]
    both = jax.jit(lambda a: (estimator(mapped(a), e), estimator(mapped(a), 3 * e, normalize=True)))(a)
    for value, stderr in both:
        np.testing.assert_allclose(value, np.sum(a), rtol=1e-12)
        assert stderr == np.inf


@pytest.mark.parametrize("name", ESTIMATORS)
def test_products_are_as_documented(name):
    """Every batch of examples that reaches the map, counted by its size while tracing."""
    estimator, n, products, _ = ESTIMATORS[name]
    matvec, seen = counted(matrix())
    jax.eval_shape(lambda e: estimator(matvec, e), jnp.zeros((n, M)))
    assert sum(seen) == products


def counted(a):
    seen = []
    matvec = jax.custom_batching.custom_vmap(lambda e: a @ e)

    @matvec.def_vmap
    def batched(axis_size, _, e):
        seen.append(axis_size)
        return e @ a.T, True

    return matvec, seen


def test_products_of_the_others():
    a, key, x = matrix(), jax.random.key(0), jnp.zeros(M)
    matvec, seen = counted(a)
    pilots = probes.rademacher(key, x, 4)
    for run, arguments, products in (
        (trace.exact, (x,), M),
        (trace.grouped, (jnp.zeros((3, 2, M)),), 6),
        (trace.xtrace, (jnp.ones((1, M)),), 1),
        (lambda f, e: trace.control_variate(lambda e: e, f, 6.0, e), (pilots,), 4),
    ):
        seen.clear()
        jax.eval_shape(functools.partial(run, matvec), *arguments)
        assert sum(seen) == products
    seen.clear()
    choice = trace.choose(matvec, pilots, 5)
    assert sum(seen) == 4
    seen.clear()
    choice.estimator(matvec, getattr(probes, choice.draw)(key, x, choice.num))
    assert sum(seen) <= 5

    calls = []

    def called(e):
        jax.debug.callback(lambda e: calls.append(e), e)
        return a @ e

    jax.jit(lambda: trace.exact(called, x, size=4))()  # blocks of 4 and 2
    jax.effects_barrier()
    assert len(calls) == M


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if "normalized" not in name])
def test_shapes_trees_batches_and_float32(name):
    """Events of shape (2, 3) and trees give what flat ones do, under jit and vmap over maps, in either precision."""
    estimator, n, _, positive = ESTIMATORS[name]
    maps = jnp.stack([matrix(), matrix(seed=9)])
    maps = maps @ maps.swapaxes(1, 2) if positive else maps
    flat = probes.gaussian(jax.random.key(4), jnp.zeros(M), n)
    tree = {"a": flat[:, :2], "b": flat[:, 2:].reshape(n, 2, 2)}
    events = [flat, flat.reshape(n, 2, 3)] + ([] if name == "deflated" else [tree])
    both = jax.jit(jax.vmap(lambda a, events: [estimator(mapped(a), e) for e in events], (0, None)))
    wanted, *others = both(maps, events)
    for other in others:
        np.testing.assert_allclose(other, wanted, rtol=1e-12)
    (low,) = both(maps.astype(jnp.float32), [flat.astype(jnp.float32)])
    assert low.value.dtype == low.stderr.dtype == jnp.float32
    np.testing.assert_allclose(low, wanted, rtol=1e-3, atol=1e-3)


def test_the_value_is_a_mean_and_the_error_of_one_probe_is_infinite():
    e = jnp.ones((7, M))
    np.testing.assert_allclose(trace.hutchinson(lambda e: 2 * e, e).value, 2 * M)
    assert trace.hutchinson(lambda e: 2 * e, e[:1]).stderr == np.inf
    pair = jnp.ones((2, M)).at[1, 3].set(-1)
    least = trace.hutch_pp(lambda e: 2 * e, pair)  # 2 along the first, and 2 |P e|^2 of the other across it
    assert least.stderr == np.inf
    np.testing.assert_allclose(least.value, 2 + 2 * (M - (M - 2) ** 2 / M))


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if "normalized" not in name])
def test_bad_probes_and_maps(name):
    estimator, n, _, _ = ESTIMATORS[name]
    e = draw_for(name)(jax.random.key(0), jnp.zeros(M), n)
    with pytest.raises(TypeError, match="probes must be an array of floats, got dtype int"):
        estimator(lambda e: e, jnp.ones((n, M), int))
    with pytest.raises(TypeError, match=r"matvec returned dtype float32 for x of float64"):
        estimator(lambda e: e.astype(jnp.float32), e)
    with pytest.raises(ValueError, match=r"matvec returned shape \(5,\): it must return the shape of one example"):
        estimator(lambda e: e[:5], e)
    with pytest.raises(TypeError, match="must return what it takes"):
        estimator(lambda e: (e, e), e)
    if name not in ("deflated", "control_variate"):
        with pytest.raises(ValueError, match="no entries"):
            estimator(lambda e: e, e[:0])
        with pytest.raises(TypeError, match="leaves of float32, float64: cast"):
            estimator(lambda e: e, {"a": e, "b": e.astype(jnp.float32)})
        with pytest.raises(ValueError, match=r"probes must be \[num, (groups, )?\*event\]"):
            estimator(lambda e: e, {"a": e, "b": e[1:]})


def test_bad_counts_and_options():
    e, f = jnp.ones((3, M)), lambda e: e
    with pytest.raises(ValueError, match=r"hutch_pp needs at least 2.*draw num=2"):
        trace.hutch_pp(f, e[:1])
    for n in (1, 2):
        with pytest.raises(ValueError, match=r"na_hutch_pp needs at least 3.*draw num=3"):
            trace.na_hutch_pp(f, e[:n])
    with pytest.raises(ValueError, match="sketch is 3, but with 3 probes of 6 entries it must be from 1 to 2"):
        trace.hutch_pp(f, e, sketch=3)
    with pytest.raises(ValueError, match=r"sketch is \(1, 2\), but 3 probes"):
        trace.na_hutch_pp(f, e, sketch=(1, 2))
    for estimator in (trace.xtrace, trace.xnystrace):
        with pytest.raises(ValueError, match=r"probes has 7 rows of 6 entries.*trace\.exact"):
            estimator(f, jnp.ones((7, M)))
    with pytest.raises(ValueError, match="basis must have orthonormal rows"):
        trace.deflated(f, e, e)
    assert np.isnan(jax.jit(lambda b: trace.deflated(f, b, e).value)(e))
    with pytest.raises(ValueError, match="basis has vectors of shape"):
        trace.deflated(f, jnp.eye(5), e)
    with pytest.raises(TypeError, match="basis has dtype float32"):
        trace.deflated(f, jnp.eye(M, dtype=jnp.float32), e)
    with pytest.raises(TypeError, match=r"surrogate_trace has dtype float32"):
        trace.control_variate(f, f, jnp.float32(6), e)
    with pytest.raises(ValueError, match="coefficient must be one number"):
        trace.control_variate(f, f, 6, e, coefficient=jnp.ones(2))
    with pytest.raises(ValueError, match="population must be a positive integer"):
        trace.hutchinson(f, e, population=0)
    with pytest.raises(ValueError, match=r"\[num, groups, \*event\]"):
        trace.grouped(f, jnp.ones(M))
    with pytest.raises(ValueError, match="holds no arrays"):
        trace.hutchinson(f, None)
    with pytest.raises(ValueError, match="at least 2 pilots"):
        trace.choose(f, e[:1], 6)
    for groups, message in (
        (np.zeros(5, int), r"groups has shape \(5,\)"),
        (np.asarray([0, 2, 2, 0, 0, 2]), "groups must use every number from 0 to G - 1"),
        (np.asarray([0, -1, -1, 0, 0, -1]), "groups must use every number from 0 to G - 1"),
        ({"a": np.zeros(M, int)}, "groups must be of the structure of x"),
    ):
        with pytest.raises(ValueError, match=message):
            trace.choose(f, e, 4, groups=groups)
    with pytest.raises(TypeError, match="groups must be integers, got dtype float"):
        trace.choose(f, e, 4, groups=np.zeros(M))
    with pytest.raises(ValueError, match=r"basis has shape \(5, 5\).*need \(6, 6\)"):
        trace.choose(f, e, 4, basis=jnp.eye(5))
    with pytest.raises(TypeError, match="basis has dtype float32 and probes float64"):
        trace.choose(f, e, 4, basis=jnp.eye(M, dtype=jnp.float32))
    with pytest.raises(ValueError, match="basis must be orthogonal"):
        trace.choose(f, e, 4, basis=2 * jnp.eye(M))
    with pytest.raises(TypeError, match="on the host"):
        jax.jit(lambda e: trace.choose(f, e, 6))(e)


def test_choice_of_the_obvious():
    """Exact where the products suffice; Hutchinson's where it has no noise; a sketch where the map has low rank."""
    x = jnp.zeros(64)
    e = probes.rademacher(jax.random.key(0), x, 6)
    low = spectral(np.r_[np.ones(2), np.zeros(62)])
    choice = trace.choose(mapped(low), e, 64)
    assert (choice.name, choice.num, choice.draw) == ("hutchinson", 64, "hadamard")
    for a in (jnp.eye(64), jnp.diag(jnp.arange(64.0))):
        assert trace.choose(mapped(a), e, 12).name == "hutchinson"
    for products, name in ((12, "xtrace"), (2, "hutchinson")):
        choice = trace.choose(mapped(low), e, products)
        assert choice.name == name
    choice = trace.choose(mapped(low), e, 12)
    own = getattr(probes, choice.draw)(jax.random.key(1), x, choice.num)
    np.testing.assert_allclose(choice.estimator(mapped(low), own).value, 2, rtol=1e-10)
    assert trace.choose(lambda e: jnp.zeros_like(e), e, 6).name == "hutchinson"


def test_what_pilots_say_of_groups_and_bases_is_unbiased():
    """Over all 16 x 16 pairs of sign vectors, exactly: the squares within groups, of one group, and of none."""
    a, e = np.asarray(matrix(4)), np.asarray(signs(4))
    s = (a + a.T) / 2
    for labels in ([0, 1, 1, 0], [0, 0, 0, 0], [3, 1, 0, 2], [1, 0, 0, 0]):
        same = np.equal.outer(labels, labels) & ~np.eye(4, dtype=bool)
        pairs = trace._within(e, e @ a.T, np.asarray(labels))
        np.testing.assert_allclose(pairs, pairs.T, atol=1e-12)
        np.testing.assert_allclose(np.mean(pairs), np.sum(s[same] ** 2), atol=1e-12)


def test_choice_with_what_is_known():
    """Groups without couplings, a basis of eigenvectors: no noise. Groups that hold all couplings are left alone."""
    x, m = jnp.zeros((8, 8)), 64
    key, e = jax.random.key(1), probes.rademacher(jax.random.key(0), x, 8)
    labels = np.arange(m) % 4
    between = jnp.where(jnp.asarray(labels[:, None] == labels[None]), jnp.eye(m), matrix(m))
    within = jnp.where(jnp.asarray(labels[:, None] == labels[None]), matrix(m), jnp.eye(m))
    dense = matrix(m) + matrix(m).T
    basis = jnp.linalg.eigh(dense)[1]
    groups = labels.reshape(8, 8)
    for a, known, name in (
        (between, {"groups": groups}, "grouped"),
        (dense, {"basis": basis}, "rotated"),
        (dense, {"groups": groups, "basis": basis}, "rotated"),
        (within, {"groups": groups}, "hutchinson"),
    ):
        choice = trace.choose(mapped(a), e, 9, **known)
        assert choice.name == name
        assert choice.options == ({"groups": groups} if name == "grouped" else {})
        own = getattr(probes, choice.draw)(key, x, num=choice.num, **choice.options)
        assert jax.eval_shape(lambda own=own: own).shape == {"grouped": (2, 4, 8, 8)}.get(name, (9, 8, 8))
        estimate = jax.jit(lambda a, own, choice=choice: choice.estimator(mapped(a), own))(a, own)
        if name != "hutchinson":
            np.testing.assert_allclose(estimate, [np.trace(a), 0], atol=1e-10)
    assert trace.choose(mapped(between), e, 3, groups=groups).name != "grouped"  # more groups than products
    assert trace.choose(mapped(between), e, m, groups=groups).name == "hutchinson"  # exact
    assert trace.choose(mapped(between), e[:2], 4, groups=groups).name == "grouped"  # two pilots: on trust
    tree = {"a": e[:, :2], "b": e[:, 2:].reshape(8, 3, 16)}
    choice = trace.choose(mapped(between), tree, 9, groups={"a": groups[:2], "b": groups[2:].reshape(3, 16)})
    own = probes.grouped(key, jax.tree.map(lambda leaf: leaf[0], tree), num=choice.num, **choice.options)
    np.testing.assert_allclose(choice.estimator(mapped(between), own).value, np.trace(between), atol=1e-10)
    choice = trace.choose(mapped(dense), tree, 9, basis=basis)
    own = probes.hadamard(key, jax.tree.map(lambda leaf: leaf[0], tree), choice.num)
    np.testing.assert_allclose(choice.estimator(mapped(dense), own).value, np.trace(dense), atol=1e-10)


@pytest.mark.slow
def test_choice_with_groups_and_a_basis_of_other_maps():
    """Maps of one kind: the same dense symmetric matrix plus noise of its own, and couplings that are mostly between
    groups. At most 1.3 times the root mean square error of the best, by closed form, over 24 sets of pilots."""
    m, x, generator = 32, jnp.zeros(32), np.random.default_rng(0)
    common = np.asarray(spectral(np.linspace(1, -1, m)))
    local = np.exp(-np.abs(np.subtract.outer(np.arange(m), np.arange(m))))
    for base, noise, products in ((common, 0.05, 4), (common, 0.05, 16), (local, 0.02, 8), (local, 0.05, 16)):
        kind = base + noise * generator.normal(size=(40, m, m))
        symmetric = (kind + kind.swapaxes(1, 2)) / 2
        labels = probes.learn_groups(symmetric[24:], products)
        basis = np.linalg.eigh(symmetric[24:].mean(0))[1]
        same = np.equal.outer(labels, labels) & ~np.eye(m, dtype=bool)
        few = 2 * (m - products) / (products * (m - 1))
        turned = basis.T @ symmetric[:24] @ basis
        variances = {
            "hutchinson": few * np.mean([symmetric_noise(a) / 2 for a in kind[:24]]),
            "grouped": 2 * np.mean(np.sum(symmetric[:24][:, same] ** 2, axis=1)),
            "rotated": few * np.mean([symmetric_noise(a) / 2 for a in turned]),
        }
        chosen = [
            trace.choose(
                mapped(jnp.asarray(a)), probes.rademacher(key, x, 8), products, groups=labels, basis=jnp.asarray(basis)
            )
            for a, key in zip(kind[:24], keys(24), strict=True)
        ]
        error = np.mean([variances[choice.name] for choice in chosen])
        assert error <= 1.3**2 * min(variances.values()), (variances, [choice.name for choice in chosen])


SPECTRA = {
    "flat": lambda m: np.ones(m),
    "linear": lambda m: 1 - np.arange(m) / m,
    "polynomial": lambda m: 1 / np.arange(1, m + 1) ** 2.0,
    "exponential": lambda m: 0.7 ** np.arange(m),
    "step": lambda m: np.where(np.arange(m) < 10, 1, 1e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize(("m", "products"), [(64, 6), (64, 30), (200, 16)])
def test_choice_is_nearly_the_best(m, products):
    """At most 1.3 times the root mean square error of the best, over pilots, plus 15 per cent for Monte Carlo noise.

    Errors come from 200 draws, 5 to 7 per cent noise; 6 sets of max(4, products / 2) pilots; each spectrum with all
    signs equal, for ``positive`` maps too, and with alternating signs.
    """
    x, draws, sets = jnp.zeros(m), 200, 6
    alternating = np.where(np.arange(m) % 2, -1, 1)
    values = [(f(m) * sign, np.all(sign > 0)) for f in SPECTRA.values() for sign in (np.ones(m), alternating)]
    maps = jnp.stack([spectral(value, seed=m) for value, _ in values])
    noise = np.asarray([symmetric_noise(a) for a in maps])
    order = 1 << (m - 1).bit_length()
    sketch = (products - 1) // 3
    options = {
        "hutch_pp": (functools.partial(trace.hutch_pp, sketch=sketch), probes.rademacher, products - sketch),
        "xtrace": (functools.partial(trace.xtrace, normalize=True), probes.sphere, products // 2),
        "xnystrace": (functools.partial(trace.xnystrace, normalize=True), probes.sphere, products),
    }
    errors = {"hutchinson": np.sqrt(np.maximum(noise, 0) * (order - products) / (products * (order - 1)))}
    for name, (estimator, draw, num) in options.items():

        def one(a, key, estimator=estimator, draw=draw, num=num):
            return estimator(mapped(a), draw(key, x, num)).value - jnp.trace(a)

        batch = jax.jit(
            lambda maps, one=one: jax.lax.map(lambda a: jax.vmap(lambda key: one(a, key))(keys(draws)), maps)
        )
        errors[name] = np.sqrt(np.mean(np.asarray(batch(maps)) ** 2, axis=1))
    pilots = jax.vmap(lambda key: probes.rademacher(key, x, max(4, products // 2)))(keys(sets, 5))
    for i, (_, positive) in enumerate(values):
        for allowed in {False, positive}:
            best = min(errors[name][i] for name in errors if allowed or name != "xnystrace")
            chosen = [trace.choose(mapped(maps[i]), e, products, positive=allowed).name for e in pilots]
            error = np.sqrt(np.mean([errors[name][i] ** 2 for name in chosen]))
            # 1e-7: what rounding leaves of a difference of squares, for maps without noise
            assert error <= 1.3 * 1.15 * best + 1e-7, (i, allowed, chosen, {name: e[i] for name, e in errors.items()})
