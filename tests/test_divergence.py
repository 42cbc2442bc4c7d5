"""Divergences against closed forms, against jacfwd, in every mode of use, and within their memory."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import divergence, probes

METHODS = {
    "exact": divergence.exact,
    "forward": partial(divergence.exact, mode="forward"),
    "reverse": partial(divergence.exact, mode="reverse"),
    "chunks of 4, reverse": divergence.exact_in_chunks(4, mode="reverse"),
    "chunks of 4, forward": divergence.exact_in_chunks(4, mode="forward"),
    **{f"chunks of {c}": divergence.exact_in_chunks(c) for c in (1, 5, 7, 1000)},
}


def field(shape, dtype=jnp.float64):
    """A nonlinear field on arrays of any shape, whose Jacobian is dense and not symmetric."""
    m = int(np.prod(shape, dtype=int))
    a, b = jax.random.normal(jax.random.key(m), (2, m, m), dtype)

    def f(x):
        z = x.reshape(-1)
        return (jnp.tanh(a @ z) * jnp.roll(z, 1) + b @ jnp.sin(z)).reshape(x.shape)

    return f


def spiral(x):
    """f(x, y) = (x^2 y - y, x + sin(x y) + y^3), divergence 2 x y + x cos(x y) + 3 y^2."""
    return jnp.stack([x[0] ** 2 * x[1] - x[1], x[0] + jnp.sin(x[0] * x[1]) + x[1] ** 3])


def spiral_divergence(x):
    return 2 * x[0] * x[1] + x[0] * np.cos(x[0] * x[1]) + 3 * x[1] ** 2


def spiral_divergence_gradient(x):
    c, s = np.cos(x[0] * x[1]), np.sin(x[0] * x[1])
    return np.array([2 * x[1] + c - x[0] * x[1] * s, 2 * x[0] - x[0] ** 2 * s + 6 * x[1]])


@pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 4, 2), (35,)])
def test_exact_methods_agree_with_jacfwd(shape):
    f = field(shape)
    x = jax.random.normal(jax.random.key(1), shape)
    expected = np.trace(np.asarray(jax.jit(jax.jacfwd(f))(x)).reshape(x.size, x.size))
    results, fx = jax.jit(lambda x: ({name: method(f, x, None) for name, method in METHODS.items()}, f(x)))(x)
    for name, (value, div) in results.items():
        np.testing.assert_array_equal(value, fx, err_msg=name)
        np.testing.assert_allclose(div, expected, rtol=0, atol=1e-12, err_msg=name)
        assert (value.shape, div.shape) == (shape, ()), name


@pytest.mark.parametrize("name", METHODS)
def test_closed_form_and_its_gradient(name):
    """The gradient of a divergence has second derivatives of f in it: what training a flow needs."""
    x = jnp.asarray([0.7, -1.2])

    def method(x):
        return METHODS[name](spiral, x, None)

    (value, div), gradient, itself = jax.jit(lambda x: (method(x), jax.grad(lambda x: method(x)[1])(x), spiral(x)))(x)
    x = np.asarray(x)
    np.testing.assert_array_equal(value, itself)
    np.testing.assert_allclose(div, spiral_divergence(x), rtol=1e-14)
    np.testing.assert_allclose(gradient, spiral_divergence_gradient(x), rtol=1e-13)


@pytest.mark.parametrize("d", [2, 6])
def test_hutchinson_over_all_sign_vectors_is_the_trace(d):
    """Exactly, for a dense field without symmetry: the off-diagonal terms cancel in pairs."""
    x = jax.random.normal(jax.random.key(2), (d,))
    signs = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=d)))
    for f in (field((d,)), lambda x: jnp.arange(1.0, d * d + 1).reshape(d, d) @ x):
        jacobian, (value, estimates), (_, mean), itself = jax.jit(
            lambda x, f=f: (
                jax.jacfwd(f)(x),
                divergence.quadratic_forms(f, x, signs),
                divergence.hutchinson(f, x, signs),
                f(x),
            )
        )(x)
        jacobian = np.asarray(jacobian)
        np.testing.assert_array_equal(value, itself)
        assert abs(mean - np.trace(jacobian)) < 1e-10
        symmetric = (jacobian + jacobian.T) / 2
        variance = 2 * (np.sum(symmetric**2) - np.sum(np.diag(symmetric) ** 2))
        np.testing.assert_allclose(np.var(estimates), variance, rtol=1e-10)  # all of them: exact too


def test_hutchinson_gradient_is_that_of_its_own_estimate():
    """e^T J e at e = (1, -1) on the spiral is div - (df1/dy + df2/dx), by hand."""
    x, e = jnp.asarray([0.7, -1.2]), jnp.asarray([[1.0, -1.0]])
    gradient = jax.jit(jax.grad(lambda x: divergence.hutchinson(spiral, x, e)[1]))(x)
    x = np.asarray(x)
    c, s = np.cos(x[0] * x[1]), np.sin(x[0] * x[1])
    crossed = np.array([2 * x[0] - x[1] ** 2 * s, c - x[0] * x[1] * s])
    np.testing.assert_allclose(gradient, spiral_divergence_gradient(x) - crossed, rtol=1e-13)


def test_linear_field_gradient_in_its_matrix():
    """d tr(A) / dA = I, and d (e^T A e) / dA = e e^T."""
    a, x = jax.random.normal(jax.random.key(3), (4, 4)), jnp.ones(4)
    for method in (divergence.exact, divergence.exact_in_chunks(3)):
        gradient = jax.jit(jax.grad(lambda a, method=method: method(lambda x: a @ x, x, None)[1]))(a)
        np.testing.assert_allclose(gradient, np.eye(4))
    e = probes.gaussian(jax.random.key(4), x)
    gradient = jax.jit(jax.grad(lambda a: divergence.hutchinson(lambda x: a @ x, x, e)[1]))(a)
    np.testing.assert_allclose(gradient, np.outer(e[0], e[0]), rtol=1e-14)


def test_probes_that_fill_more_than_a_block_follow_in_a_loop():
    """7 probes of 3,000 entries, which go two by two and one alone: e^T J e by hand, and its gradient."""
    m = 3000
    x, weight = jax.random.normal(jax.random.key(13), (2, m))
    e = probes.gaussian(jax.random.key(14), x, 7)

    def f(x, weight):
        return weight * jnp.roll(x, 1) ** 2 + jnp.sin(x)

    def by_hand(x, weight):  # dense but in its structure: J e = 2 w roll(x) roll(e) + cos(x) e
        return jnp.sum(e * (2 * (weight * jnp.roll(x, 1))[None] * jnp.roll(e, 1, axis=1) + jnp.cos(x)[None] * e), 1)

    def forms(x, weight, mode="reverse"):
        return divergence.quadratic_forms(lambda x: f(x, weight), x, e, mode=mode)[1]

    @jax.jit
    def both(x, weight):
        own = [jax.vjp(g, x, weight) for g in (forms, partial(forms, mode="forward"), by_hand)]
        return [(value, pull(jnp.arange(1.0, 8.0))) for value, pull in own]

    *got, wanted = both(x, weight)
    for each in got:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), each, wanted)


def test_a_field_without_reverse_mode_has_forward_mode():
    """x -> x^8 by a while loop: divergence 8 sum x^7."""

    def f(x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] ** 2), (0, x))[1]

    x = jnp.asarray([0.5, -1.1, 0.9])
    for method in (METHODS["forward"], METHODS["chunks of 4, forward"]):
        np.testing.assert_allclose(method(f, x)[1], 8 * np.sum(np.asarray(x) ** 7), rtol=1e-13)
    basis = 3**0.5 * jnp.eye(3)
    estimate = divergence.hutchinson(f, x, basis, mode="forward")[1]
    np.testing.assert_allclose(estimate, 8 * np.sum(np.asarray(x) ** 7), rtol=1e-13)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        divergence.exact(f, x)


MATRICES = jax.random.normal(jax.random.key(30), (3, 12, 12)) / 2


@jax.custom_vjp
def only_back(x):
    return jnp.sin(x)


only_back.defvjp(lambda x: (jnp.sin(x), x), lambda x, e: (jnp.cos(x) * e,))


def quarters(x):
    return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] ** 2), (0, x))[1]


def passed_by(x):
    """Skip connections around the last product, from x, from within, and to a part of the output; a jit inside."""
    h = jax.jit(jnp.tanh)(MATRICES[0] @ x)
    y = x + jnp.sin(h) * (MATRICES[1] @ (h * x)) + jnp.where(x > 0, h, -x)
    return jnp.concatenate([y[:8], jnp.cumsum(h)[:4] * x[:4]])


def convolved(x):
    image = x.reshape(1, 1, 3, 4)
    kernel = MATRICES[:1, :3, :3].reshape(1, 1, 3, 3)
    h = jnp.tanh(jax.lax.conv(image, kernel, (1, 1), "SAME"))
    return jax.lax.conv(h * image, kernel, (1, 1), "SAME").reshape(12) ** 2


FROM_BOTH_ENDS = {
    "skips": (passed_by, None),
    "convolutions": (convolved, None),
    "a product of two that move": (lambda x: (MATRICES[0] * x[None]) @ (MATRICES[1] @ x), None),
    "the product not used at last": (lambda x: (MATRICES[0] @ x, x**2)[1], None),
    "a product at the start only": (lambda x: jnp.tanh(MATRICES[0] @ x), None),
    "a loop before the last product": (lambda x: MATRICES[0] @ quarters(x), lambda x: MATRICES[0] @ x**4),
    "no forward mode": (lambda x: MATRICES[0] @ only_back(x), lambda x: MATRICES[0] @ jnp.sin(x)),
    "no forward mode within": (
        lambda x: jax.lax.scan(lambda c, _: (MATRICES[0] @ only_back(c), None), MATRICES[1] @ x, None, 2)[0],
        lambda x: MATRICES[0] @ jnp.sin(MATRICES[0] @ jnp.sin(MATRICES[1] @ x)),
    ),
    "no product": (lambda x: x**2 * x[::-1], None),
    "constant": (lambda x: MATRICES[0, 0] @ MATRICES[1], None),
}


@pytest.mark.parametrize("name", FROM_BOTH_ENDS)
def test_forms_from_both_ends_are_those_of_the_jacobian(name):
    """The trace, its gradient where there is one, and forms of given probes, one of them alone too."""
    f, smooth = FROM_BOTH_ENDS[name]
    smooth = smooth or f
    x, e = jax.random.normal(jax.random.key(31), (12,)), jax.random.normal(jax.random.key(32), (5, 12))

    @jax.jit
    def both(x):
        def div(x):
            return divergence.exact(f, x)[1]

        jacobian = jax.jacfwd(smooth)(x)
        trace = lambda x: jnp.trace(jax.jacfwd(smooth)(x))  # noqa: E731
        slopes = [jax.jvp(each, (x,), (e[0],))[1] for each in (div, trace) if f is smooth]
        return (
            (*divergence.exact(f, x), divergence.quadratic_forms(f, x, e)[1], divergence.hutchinson(f, x, e[:1])[1]),
            (f(x), jnp.trace(jacobian), jnp.sum(e * (e @ jacobian), axis=1), e[0] @ jacobian @ e[0]),
            slopes or [0.0, 0.0],
        )

    got, expected, slopes = both(x)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(*slopes, rtol=1e-12, atol=1e-12)


def test_unit_vectors_and_shared_probes_pass_the_ends_of_a_network_once():
    """Two hidden layers of 8, 256 dimensions, 64 examples: of all multiplications in the products with the Jacobian
    only those of 8 x 8 remain, and what a batch has in common. In a loop one block counts, on either side."""
    first, middle, last = (jnp.ones(shape) for shape in ((256, 8), (8, 8), (8, 256)))
    f = lambda x: jnp.tanh(jnp.tanh(x @ first) @ middle) @ last  # noqa: E731
    x, e = jnp.ones((64, 256)), jnp.ones((8, 256))

    def operations(method, **options):
        def run(x, e):
            return jax.vmap(lambda x: method(f, x, e, **options)[1])(x)

        return jax.jit(run).lower(x, e).compile().cost_analysis()["flops"]

    for method in (divergence.exact, divergence.hutchinson):
        assert operations(method) < operations(method, mode="reverse") / 4


@pytest.mark.parametrize("shape", [(6,), (5, 7)])
def test_divergences_can_be_differentiated_forward(shape):
    """The derivative of the trace along a direction, against a central difference (error 1e-9 of it)."""
    f = field(shape)
    x, direction = jax.random.normal(jax.random.key(15), (2, *shape))
    slope = jax.jit(lambda x: jax.jvp(lambda x: divergence.exact(f, x)[1], (x,), (direction,))[1])(x)
    value = jax.jit(lambda x: divergence.exact(f, x)[1])
    difference = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-7)


@pytest.mark.slow
def test_chunks_bound_the_memory():
    """m = 784, blocks of 16: measured 1/24 of the whole Jacobian or less, for value and gradient."""
    m = 784
    a = jax.random.normal(jax.random.key(5), (64, m)) / 28
    b = jax.random.normal(jax.random.key(6), (m, 64)) / 8

    def temporary(method, *, derivative):
        def div(x):
            return method(lambda x: jnp.tanh(b @ jnp.tanh(a @ x)), x, None)[1]

        compiled = jax.jit(jax.grad(div) if derivative else div).lower(jnp.ones(m)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for derivative in (False, True):
        whole = temporary(lambda f, x, _: (f(x), jnp.trace(jax.jacrev(f)(x))), derivative=derivative)
        assert whole > m * m * 8
        for method in (divergence.exact, divergence.exact_in_chunks(16)):
            blocked = temporary(method, derivative=derivative)
            assert blocked < whole / 20, (derivative, whole / blocked)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "chunks of 7", "hutchinson"])
def test_jit_vmap_while_loop_and_float32(name):
    x = jax.random.normal(jax.random.key(7), (3, 6), jnp.float32)
    f = field((6,), jnp.float32)
    e = probes.orthogonal(jax.random.key(8), x[0], 6)  # all of them: exact
    method = METHODS.get(name, divergence.hutchinson)
    values, divs = jax.jit(jax.vmap(lambda x: method(f, x, e)))(x)
    assert values.dtype == divs.dtype == jnp.float32
    jacobians = np.asarray(jax.jit(jax.vmap(jax.jacfwd(f)))(x))
    np.testing.assert_allclose(divs, np.trace(jacobians, axis1=1, axis2=2), rtol=2e-5, atol=2e-5)

    def step(carry):
        i, total = carry
        return i + 1, total + method(f, x[0], e)[1]

    _, total = jax.lax.while_loop(lambda carry: carry[0] < 3, step, (0, jnp.zeros((), jnp.float32)))
    np.testing.assert_allclose(total, 3 * divs[0], rtol=1e-5)


def test_laplacian_of_a_gaussian_log_density():
    """lap log N = -tr C^-1, everywhere, on a covariance that is not diagonal."""
    c = jnp.asarray([[2.0, 0.7, -0.3], [0.7, 1.0, 0.2], [-0.3, 0.2, 0.5]])
    precision = jnp.linalg.inv(c)

    def log_density(x):
        return -0.5 * x @ precision @ x - 0.5 * jnp.linalg.slogdet(2 * jnp.pi * c)[1]

    x = jnp.asarray([0.4, -2.0, 1.0])
    value, lap = divergence.laplacian(log_density, x)
    assert value == log_density(x)
    np.testing.assert_allclose(lap, -np.trace(precision), rtol=1e-13)


def test_laplacian_of_harmonic_and_quartic_functions():
    x = jnp.asarray([1.3, -0.4])
    for harmonic in (lambda x: jnp.exp(x[0]) * jnp.sin(x[1]), lambda x: x[0] ** 3 - 3 * x[0] * x[1] ** 2):
        assert abs(jax.jit(lambda x, u=harmonic: divergence.laplacian(u, x)[1])(x)) < 1e-13
    for d in (1, 4):  # lap |x|^4 = 4 (d + 2) |x|^2
        x = jax.random.normal(jax.random.key(d), (d,))
        value, lap = jax.jit(lambda x: divergence.laplacian(lambda x: jnp.sum(x**2) ** 2, x))(x)
        np.testing.assert_allclose([value, lap], [np.sum(x**2) ** 2, 4 * (d + 2) * np.sum(x**2)], rtol=1e-13)
    image = jax.random.normal(jax.random.key(9), (2, 3, 1), jnp.float32)
    value, lap = jax.jit(lambda x: divergence.laplacian(lambda x: jnp.sum(x**3), x))(image)
    assert value.dtype == lap.dtype == jnp.float32
    np.testing.assert_allclose(lap, 6 * np.sum(image), rtol=1e-5)


def test_laplacian_gradient():
    """grad lap |x|^4 = 8 (d + 2) x."""
    x = jnp.asarray([0.5, -1.0, 2.0])
    gradient = jax.jit(jax.grad(lambda x: divergence.laplacian(lambda x: jnp.sum(x**2) ** 2, x)[1]))(x)
    np.testing.assert_allclose(gradient, 40 * np.asarray(x), rtol=1e-13)


def everything(x):
    """A scalar of every kind of operation, entries of x mixed throughout: smooth at the points where it is tried."""
    a = jax.random.normal(jax.random.key(16), (6, 6))
    h = jax.nn.silu(a @ x) + jax.nn.softplus(x) * jnp.tanh(x @ a)
    h = h + jnp.exp(-jnp.abs(x)) * jnp.where(x > 0, x**3, jnp.sin(x)) + jax.checkpoint(jnp.cos)(h * x)
    pair = h.reshape(2, 3) @ (x / (1 + jnp.square(h))).reshape(3, 2)
    wound, _ = jax.lax.scan(lambda c, y: (jnp.sin(c) + c * y, None), h[0], x[::2])
    chosen = jax.lax.cond(x[1] > 5, lambda y: y[0], lambda y: y[0] * y[2], h)
    sorted_by, order = jnp.sort(h), jnp.argsort(h)
    gathered = jnp.concatenate([h, x])[jnp.array([3, 9, 1])]
    total = jnp.trace(pair) + wound + chosen + sorted_by @ jnp.arange(6.0) + x[order[0]] ** 2 + gathered @ gathered
    return total + jax.nn.logsumexp(h) + jnp.linalg.norm(x) * jnp.max(h) + jnp.prod(jnp.cumsum(h))


@pytest.mark.slow
def test_laplacian_of_every_kind_of_operation_and_its_gradient():
    x = jax.random.normal(jax.random.key(17), (3, 6))

    def dense(x):
        return jnp.trace(jax.hessian(everything)(x))

    @jax.jit
    @jax.vmap
    def both(x):
        def own(x):
            return divergence.laplacian(everything, x)[1]

        return (*divergence.laplacian(everything, x), jax.grad(own)(x)), (everything(x), dense(x), jax.grad(dense)(x))

    got, wanted = both(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, wanted)


def test_laplacian_in_blocks_of_a_network_with_its_gradient():
    """21 dimensions, in three blocks of seven, against the trace of the Hessian; constant and linear functions too."""
    matrices = jax.random.normal(jax.random.key(18), (2, 21, 21)) / 4
    x = jax.random.normal(jax.random.key(19), (21,))

    def u(x, matrices):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ matrices[0]) @ matrices[1]))

    def own(x, matrices):
        return divergence.laplacian(lambda x: u(x, matrices), x)[1]

    def dense(x, matrices):
        return jnp.trace(jax.hessian(u)(x, matrices))

    got, wanted = jax.jit(lambda *a: [jax.value_and_grad(f, (0, 1))(*a) for f in (own, dense)])(x, matrices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), got, wanted)
    for flat in (lambda x: jnp.asarray(3.0), lambda x: x[4] - x[2], lambda x: jnp.sum(jnp.sign(x))):
        value, lap = divergence.laplacian(flat, x)
        assert (value, lap) == (flat(x), 0)


def test_bad_arguments():
    x = jnp.zeros(3)
    for method in (divergence.exact, divergence.exact_in_chunks(2)):
        with pytest.raises(ValueError, match=r"f must keep the shape of x, got \(2,\) for x of shape \(3,\)"):
            method(lambda x: x[:2], x, None)
        with pytest.raises(TypeError, match=r"x must be an array of floats, got dtype int64: .*astype"):
            method(lambda x: x, jnp.zeros(3, int), None)
        with pytest.raises(TypeError, match=r"f returned dtype float32 for x of float64: .*astype"):
            method(lambda x: x.astype(jnp.float32), x, None)
    for method in (divergence.hutchinson, divergence.quadratic_forms):
        with pytest.raises(ValueError, match=r"probes is None.*probes\.rademacher\(key, x, num\)"):
            method(lambda x: x, x, None)
        with pytest.raises(ValueError, match=r"probes has shape \(3,\), but x of shape \(3,\) needs .*\(num, 3\)"):
            method(lambda x: x, x, jnp.zeros(3))
        with pytest.raises(ValueError, match=r"probes has shape \(2, 4\)"):
            method(lambda x: x, x, jnp.zeros((2, 4)))
        with pytest.raises(TypeError, match="probes has dtype float32 and x has float64"):
            method(lambda x: x, x, jnp.zeros((2, 3), jnp.float32))
    with pytest.raises(ValueError, match='mode must be "both", "reverse" or "forward", got \'backward\''):
        divergence.exact(lambda x: x, x, mode="backward")
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        divergence.exact_in_chunks(0)
    with pytest.raises(TypeError, match="size must be a Python int, known before tracing, got float"):
        divergence.exact_in_chunks(0.5)
    with pytest.raises(ValueError, match=r"u must return a scalar \[\], got shape \(3,\)"):
        divergence.laplacian(lambda x: x**2, x)
    with pytest.raises(TypeError, match="u returned dtype float32"):
        divergence.laplacian(lambda x: jnp.sum(x).astype(jnp.float32), x)
