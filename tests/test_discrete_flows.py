"""One battery for every flow and composition; then what is particular to each."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import rotated_mixture

from dgm_jax import densities
from dgm_jax import discrete_flows as df

NUM = 6  # points and parameters in the battery


def network(z, params):
    """Two layers, by hand: log-scale and shift."""
    first, second = params
    both = second @ jnp.tanh(first @ z)
    return both[: z.size], both[z.size :]


def weights(rng, dim):
    return tuple(jnp.asarray(0.7 * rng.normal(size=shape)) for shape in ((8, dim), (2 * dim, 8)))


def planar_params(rng, dim):
    """Of which two of three would be no invertible map without the constraint."""
    w = rng.normal(size=dim)
    u = rng.normal(size=dim) + rng.choice([0.0, -3.0]) * w / (w @ w)
    return df.Planar(*map(jnp.asarray, (u, w, rng.normal())))


def affine_params(rng, dim):
    return df.Affine(jnp.asarray(np.eye(dim) + 0.5 * rng.normal(size=(dim, dim))), jnp.asarray(rng.normal(size=dim)))


def lu_params(rng, dim):
    square, row = (0.5 * rng.normal(size=shape) for shape in ((2, dim, dim), (2, dim)))
    return df.LUAffine(*map(jnp.asarray, (*square, *row)))


def case(name, dim):
    """The flow and a maker of its params."""
    even, odd = np.arange(dim) % 2 == 0, np.arange(dim) % 2 == 1
    couplings = df.affine_coupling(even, network), df.affine_coupling(odd, network, max_log_scale=1.0)

    def stack(make, rng, num):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[make(rng, dim) for _ in range(num)])

    return {
        "planar": (df.planar(), planar_params),
        "inverted planar": (df.invert(df.planar()), planar_params),
        "dense affine": (df.dense_affine(), affine_params),
        "LU affine": (df.lu_affine(), lu_params),
        "coupling": (couplings[0], weights),
        "RealNVP": (
            df.repeat(df.compose(couplings)),
            lambda rng, dim: tuple(stack(weights, rng, 2) for _ in couplings),
        ),
        "all": (
            df.compose([df.repeat(df.planar()), couplings[0], df.dense_affine(), df.invert(df.planar())]),
            lambda rng, dim: (
                stack(planar_params, rng, 2), weights(rng, dim), affine_params(rng, dim), planar_params(rng, dim)
            ),
        ),
    }[name]  # fmt: skip


SLOW = pytest.mark.slow
NAMES = ("planar", "inverted planar", "dense affine", "LU affine", "coupling", "RealNVP", "all")


def examples(name, dim):
    """The flow; ``NUM`` params and points of the base."""
    flow, make = case(name, dim)
    rng = np.random.default_rng(dim)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[make(rng, dim) for _ in range(NUM)])
    return flow, params, jnp.asarray(2 * rng.normal(size=(NUM, dim)))


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        pytest.param(name, dim, marks=[SLOW] if name == "RealNVP" or (name, dim) == ("all", 2) else [])
        for name, dim in itertools.product(NAMES, (2, 5))
    ],
)
def test_inverse_and_log_det(name, dim):
    """f^-1(f(z)) = z and f(f^-1(x)) = x to 1e-10; both log abs dets equal slogdet of the dense Jacobian, to 1e-10."""
    flow, params, z = examples(name, dim)

    def with_jacobian(one, jacobian):
        def value(params, x):
            y, log_det = one(params, x)
            return y, (y, log_det)

        return jax.jit(jax.vmap(jacobian(value, argnums=1, has_aux=True)))

    forward, inverse = with_jacobian(flow.forward, jax.jacfwd), with_jacobian(flow.inverse, jax.jacrev)
    jacobian, (x, log_det) = forward(params, z)
    jacobian_back, (back, log_det_back) = inverse(params, x)
    _, (y, _) = inverse(params, z)
    _, (there, _) = forward(params, y)
    assert np.abs(x - z).max(axis=1).min() > 1e-3
    np.testing.assert_allclose(back, z, atol=1e-10)
    np.testing.assert_allclose(there, z, atol=1e-10)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian).logabsdet, atol=1e-10)
    np.testing.assert_allclose(log_det_back, np.linalg.slogdet(jacobian_back).logabsdet, atol=1e-10)
    np.testing.assert_allclose(log_det, -log_det_back, atol=1e-10)
    assert np.abs(log_det).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_density_integrates_to_one_and_has_the_gradient_of_differences(name):
    """The trapezoidal rule over the box around the image of |z| <= 6, outside of which 2e-8 of the mass can be; and the
    gradient of log p by params and x, along a random direction of each, against central differences."""
    flow, params, _ = examples(name, 2)
    params = jax.tree.map(lambda leaf: leaf[0] / 2, params)
    log_p = jax.jit(jax.vmap(functools.partial(df.log_prob, flow), (None, 0)))

    angles = np.linspace(0, 2 * np.pi, 200)
    disc = np.concatenate([r * np.stack([np.cos(angles), np.sin(angles)], axis=1) for r in (2, 4, 6)])
    image = jax.vmap(functools.partial(df.sample, flow, params))(jnp.asarray(disc))
    sides = [
        np.linspace(low - 0.5, high + 0.5, 250) for low, high in zip(image.min(axis=0), image.max(axis=0), strict=True)
    ]
    grid = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
    mass = np.exp(log_p(params, jnp.asarray(grid))).sum() * math.prod(side[1] - side[0] for side in sides)
    assert abs(mass - 1) < 1e-6

    rng = np.random.default_rng(1)
    tangent = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    x, dx = np.array([0.3, -0.4]), np.array([0.6, 0.8])
    gradient = jax.jit(jax.grad(lambda params, x: df.log_prob(flow, params, x), argnums=(0, 1)))(params, jnp.asarray(x))
    slopes = [
        sum(np.sum(g * v) for g, v in zip(jax.tree.leaves(found), jax.tree.leaves(v), strict=True))
        for found, v in zip(gradient, (tangent, dx), strict=True)
    ]
    h = 1e-5
    grid[0], grid[1:3] = x, (x + h * dx, x - h * dx)
    up, down = (jax.tree.map(lambda p, v: p + step * v, params, tangent) for step in (h, -h))  # noqa: B023
    up, down = (log_p(params, jnp.asarray(grid))[0] for params in (up, down))
    moved = log_p(params, jnp.asarray(grid))[1:3]
    np.testing.assert_allclose(slopes, [(up - down) / (2 * h), (moved[0] - moved[1]) / (2 * h)], rtol=1e-6, atol=1e-8)
    assert min(map(abs, slopes)) > 1e-3


def test_affine_flows_are_gaussians():
    """x = W z + b has the density N(b, W W^T), W dense or L U: against the oracle's Cholesky, to 1e-12."""
    rng = np.random.default_rng(0)
    affine, lu, x = affine_params(rng, 4), lu_params(rng, 4), jnp.asarray(rng.normal(size=4))
    product = (np.tril(lu.lower, -1) + np.eye(4)) @ (np.triu(lu.upper, 1) + np.diag(np.exp(lu.log_diagonal)))
    for flow, params, weight in (
        (df.dense_affine(), affine, affine.weight),
        (df.lu_affine(), lu, jnp.asarray(product)),
    ):
        known = densities.gaussian(params.bias, weight @ weight.T)
        found = jax.jit(functools.partial(df.log_prob, flow))(params, x)
        assert float(found) == pytest.approx(float(jax.jit(densities.log_prob)(known, x)), abs=1e-12)


def test_a_mixture_through_an_affine_flow_is_a_mixture():
    """From another base: components N(W m + b, W C W^T). log p(x) = log p(z) - log|det dx/dz|, both ways round."""
    rng = np.random.default_rng(3)
    params, base, z = affine_params(rng, 3), rotated_mixture(3), jnp.asarray(rng.normal(size=3))
    w = params.weight
    known = base._replace(means=base.means @ w.T + params.bias[None], covariances=w @ base.covariances @ w.T)
    log_base = functools.partial(densities.log_prob, base)

    @jax.jit
    def look(params, z):
        x, log_p = df.sample_and_log_prob(df.dense_affine(), params, z, log_base)
        return x, log_p, df.log_prob(df.dense_affine(), params, x, log_base), densities.log_prob(known, x)

    x, *log_p, true = look(params, z)
    np.testing.assert_allclose(x, w @ z + params.bias, atol=1e-14)
    np.testing.assert_allclose(log_p, [true, true], atol=1e-12)


def test_density_of_planar_steps_is_the_derivative_of_their_distribution_function():
    """On the line, P(X <= x) = Phi(f^-1(x)) where f increases. Six steps at once, in nine points."""
    rng = np.random.default_rng(5)
    steps = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[planar_params(rng, 1) for _ in range(6)])
    flow = df.repeat(df.planar())
    x = jnp.linspace(-3.0, 3.0, 9)[:, None]

    @jax.jit
    @jax.vmap
    def look(x):
        cdf = jax.scipy.stats.norm.cdf(flow.inverse(steps, x)[0][0])
        return cdf, jnp.exp(df.log_prob(flow, steps, x))

    h = 1e-5
    (up, _), (down, _), (_, density) = (look(x + step) for step in (h, -h, 0.0))
    np.testing.assert_allclose(density, (up - down) / (2 * h), rtol=1e-6, atol=1e-9)


def test_planar_is_invertible_for_any_params():
    """The root of the inverse, to rounding, however steep or flat: slopes 1 + w.v from 1e-12 to 1e6.

    To three units of rounding in either type; and the slopes of log p are finite, far out too.
    """
    rng = np.random.default_rng(7)
    k, r = 10 ** rng.uniform(-12, 6, 4000), rng.normal(size=4000) * 10 ** rng.uniform(-8, 3, 4000)
    for dtype in (jnp.float64, jnp.float32):
        k_, r_ = jnp.asarray(k, dtype), jnp.asarray(r, dtype)
        a = np.asarray(jax.jit(jax.vmap(df._planar_root))(k_, r_), np.float64)
        k_, r_ = np.asarray(k_, np.float64), np.asarray(r_, np.float64)
        size = np.abs(a) + np.abs((k_ - 1) * np.tanh(a)) + np.abs(r_)
        assert (np.abs(a + (k_ - 1) * np.tanh(a) - r_) <= 3 * float(jnp.finfo(dtype).eps) * size).all()
    slope = jax.jit(jax.grad(functools.partial(df.log_prob, df.planar()), argnums=(0, 1)))
    for u, w, x in ((-40.0, 1.0, 0.1), (40.0, 1.0, 0.1), (0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (1e-3, 1e3, 1e3)):
        params = df.Planar(jnp.full(2, u), jnp.full(2, w), jnp.asarray(0.5))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(slope(params, jnp.full(2, x))))


def test_planar_is_the_identity_at_u_zero_and_a_translation_at_w_zero():
    z, b = jnp.asarray([0.3, -1.2, 2.0]), jnp.asarray(0.7)
    forward = jax.jit(df.planar().forward)
    x, log_det = forward(df.Planar(jnp.zeros(3), jnp.asarray([1.0, -2.0, 0.5]), b), z)
    np.testing.assert_allclose(x, z, atol=1e-15)
    assert abs(float(log_det)) < 1e-15
    u = jnp.asarray([0.5, 1.0, -4.0])
    x, log_det = forward(df.Planar(u, jnp.zeros(3), b), z)
    np.testing.assert_allclose(x, z + u * np.tanh(0.7), atol=1e-14)
    assert abs(float(log_det)) < 1e-15


def test_planar_inverse_has_the_right_second_derivatives():
    """By the implicit function, differentiated again: Hessian of log p against differences of its gradient."""
    rng = np.random.default_rng(2)
    params, x, v = planar_params(rng, 2), jnp.asarray(rng.normal(size=2)), jnp.asarray([0.6, 0.8])
    log_p = functools.partial(df.log_prob, df.planar(), params)
    gradient = jax.jit(jax.grad(log_p))
    difference = (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)) / 2e-5
    found = jax.jit(jax.hessian(log_p))(x) @ v
    np.testing.assert_allclose(found, difference, rtol=1e-6, atol=1e-8)
    assert np.abs(found).max() > 1e-2


def test_coupling_with_a_constant_network():
    """Of an event [2, 2]: what the mask keeps stays to the bit; no factor exceeds e^c, and a small log-scale is the
    network's."""
    mask = np.array([[True, False], [False, True]])
    z = jnp.asarray([[0.1, 2.0], [-3.0, 0.7]])
    flow = df.affine_coupling(mask, lambda z, params: params, max_log_scale=1.5)
    raw, shift = jnp.asarray([[9.0, 1e6], [1e-4, 9.0]]), jnp.full((2, 2), 0.25)
    x, log_det = flow.forward((raw, shift), z)
    np.testing.assert_array_equal(x[mask], z[mask])
    np.testing.assert_allclose(x[~mask], [2.0 * np.exp(1.5) + 0.25, -3.0 * (1 + 1e-4) + 0.25], rtol=1e-8)
    assert float(log_det) == pytest.approx(1.5001, abs=1e-8)


def test_the_network_of_a_coupling_sees_only_what_stays():
    seen = []

    def network(z, params):
        seen.append(z)
        return z, z

    df.affine_coupling(np.array([True, False]), network).inverse(None, jnp.asarray([2.0, 5.0]))
    np.testing.assert_array_equal(seen[0], [2.0, 0.0])


def test_repeat_is_the_composition_of_its_steps_and_invert_turns_it_round():
    rng = np.random.default_rng(4)
    steps = [planar_params(rng, 3) for _ in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    one, other = df.repeat(df.planar()), df.compose([df.planar()] * 4)
    z = jnp.asarray(rng.normal(size=3))
    turned = df.invert(one)
    ways = ((one.forward, other.forward, turned.inverse), (one.inverse, other.inverse, turned.forward))
    for ours, known, same in ways:
        found = jax.jit(ours)(stacked, z), jax.jit(same)(stacked, z)
        expected = jax.jit(known)(steps, z)
        for y, log_det in found:
            np.testing.assert_allclose(y, expected[0], atol=1e-13)
            np.testing.assert_allclose(log_det, expected[1], atol=1e-13)


def test_dense_log_abs_det_against_closed_form():
    """Spherical coordinates: r^2 sin(theta). A map of [2, 3]: a sum of logs. A singular one: minus infinity."""

    def cartesian(q):
        r, theta, phi = q
        return r * jnp.stack([jnp.sin(theta) * jnp.cos(phi), jnp.sin(theta) * jnp.sin(phi), jnp.cos(theta)])

    x, log_det = jax.jit(lambda q: df.dense_log_abs_det(cartesian, q))(jnp.asarray([1.7, 0.4, 2.0]))
    assert float(log_det) == pytest.approx(math.log(1.7**2 * math.sin(0.4)), abs=1e-13)
    assert float(jnp.linalg.norm(x)) == pytest.approx(1.7, abs=1e-13)
    y = jnp.asarray([[0.1, -0.2, 0.3], [1.0, 2.0, -0.5]])
    x, log_det = jax.jit(lambda y: df.dense_log_abs_det(lambda y: -jnp.sinh(y)[::-1], y))(y)
    assert x.shape == (2, 3)
    assert float(log_det) == pytest.approx(float(np.log(np.cosh(y)).sum()), abs=1e-13)
    assert float(df.dense_log_abs_det(lambda y: jnp.full_like(y, jnp.sum(y)), y)[1]) == -np.inf


@pytest.mark.slow
def test_initial_flows_are_invertible_and_near_the_identity():
    x, key = jnp.asarray([0.5, -1.0, 2.0]), jax.random.key(0)

    @jax.jit
    def through_planes(keys):
        return df.sample(df.repeat(df.planar()), jax.vmap(lambda key: df.init_planar(key, x))(keys), x)

    y = through_planes(jax.random.split(key, 5))
    assert 1e-3 < float(jnp.max(jnp.abs(y - x))) < 1
    np.testing.assert_array_equal(df.lu_affine().forward(df.init_lu_affine(x), x)[0], x)
    turned, log_det = df.dense_affine().forward(df.init_dense_affine(key, x), x)
    assert abs(float(log_det)) < 1e-14
    assert float(jnp.linalg.norm(turned)) == pytest.approx(float(jnp.linalg.norm(x)), abs=1e-14)


@pytest.mark.slow
def test_float32_stays_float32():
    """A composition of all kinds, against the same in float64: to 1e-4. No second compilation."""
    flow, params, z = examples("all", 5)
    traces = []

    def both(params, z):
        traces.append(z.dtype)
        x, log_det = flow.forward(params, z)
        return x, log_det, flow.inverse(params, x)[0], df.log_prob(flow, params, z)

    low, z32 = jax.tree.map(lambda leaf: leaf[0].astype(jnp.float32), (params, z))
    compiled = jax.jit(both)
    found = compiled(low, z32)
    assert {value.dtype for value in found} == {np.dtype("float32")}
    compiled(low, 2 * z32)
    assert len(traces) == 1
    for value, known in zip(found, compiled(jax.tree.map(lambda leaf: leaf[0], params), z[0]), strict=True):
        np.testing.assert_allclose(value, known, rtol=1e-4, atol=1e-4)


def test_singular_matrices_and_scales_are_errors_or_nan():
    x = jnp.asarray([1.0, 2.0, 3.0])
    weight = jnp.arange(1.0, 10.0).reshape(3, 3)  # of rank 2, but not to the bit
    for way in (df.dense_affine().forward, df.dense_affine().inverse):
        with pytest.raises(ValueError, match=r"weight .*singular.*independent columns"):
            way(df.Affine(weight, x), x)
        value, log_det = jax.jit(way)(df.Affine(weight, x), x)
        assert np.isnan(value).all()
        assert np.isnan(log_det)
    scaled = df.Affine(jnp.diag(jnp.asarray([1.0, 1e-20, 1e20])), x)  # badly scaled, and yet invertible
    assert float(df.dense_affine().forward(scaled, x)[1]) == pytest.approx(0, abs=1e-12)

    coupling = df.affine_coupling(np.array([True, False, True]), lambda z, params: params)
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        row = jnp.asarray([0.0, bad, 0.0])
        for params, match in (((row, x), "log-scale .*not finite"), ((x, row), "shift .*not finite")):
            with pytest.raises(ValueError, match=match):
                coupling.inverse(params, x)
            assert np.isnan(jax.jit(functools.partial(df.log_prob, coupling))(params, x))
    unused = jnp.asarray([jnp.inf, 0.0, jnp.nan])  # where the mask is True nothing is asked
    np.testing.assert_array_equal(coupling.forward((unused, unused), x)[0], x)


def test_bad_input():
    x, planes = jnp.ones(3), df.Planar(jnp.ones(3), jnp.ones(3), jnp.ones(()))

    def zeros(z, params):
        return jnp.zeros_like(z), jnp.zeros_like(z)

    for mask, match in ((np.ones(3, bool), "all True"), (np.zeros(3, bool), "all False")):
        with pytest.raises(ValueError, match=match):
            df.affine_coupling(mask, zeros)
    with pytest.raises(TypeError, match="mask must be of booleans"):
        df.affine_coupling(np.array([1.0, 0.0, 1.0]), zeros)
    with pytest.raises(TypeError, match="known before tracing"):
        jax.jit(lambda mask: df.affine_coupling(mask, zeros).forward(None, x))(np.array([True, False, True]))
    for scale in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="max_log_scale must be positive"):
            df.affine_coupling(np.array([True, False]), zeros, max_log_scale=scale)
    coupling = df.affine_coupling(np.array([True, False, True]), zeros)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and the mask \(3,\)"):
        coupling.forward(None, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="log-scale of the network has shape"):
        df.affine_coupling(np.array([True, False, True]), lambda z, p: (z[:2], z)).forward(None, x)
    with pytest.raises(TypeError, match="shift of the network has dtype float32"):
        df.affine_coupling(np.array([True, False, True]), lambda z, p: (z, z.astype(jnp.float32))).forward(None, x)
    for both in (lambda z, p: jnp.concatenate([z, z]), lambda z, p: (z, z, z), lambda z, p: jnp.stack([z, z])):
        with pytest.raises(TypeError, match=r"network must return a pair, log-scale and shift, each of shape \(3,\)"):
            df.affine_coupling(np.array([True, False, True]), both).inverse(None, x)

    with pytest.raises(ValueError, match=r"z must be one example \[d\]"):
        df.planar().forward(planes, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"u has shape \(3,\), but an example of shape \(2,\)"):
        df.planar().inverse(planes, jnp.ones(2))
    with pytest.raises(TypeError, match="u has dtype float64 and the example float32"):
        df.planar().forward(planes, x.astype(jnp.float32))
    with pytest.raises(TypeError, match="must be an array of floats"):
        df.log_prob(df.planar(), planes, jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"weight has shape \(3,\)"):
        df.dense_affine().forward(df.Affine(x, x), x)
    with pytest.raises(ValueError, match=r"log_diagonal has shape \(2,\)"):
        df.lu_affine().forward(df.init_lu_affine(x)._replace(log_diagonal=jnp.ones(2)), x)

    with pytest.raises(ValueError, match="at least one"):
        df.compose([])
    with pytest.raises(ValueError, match="each of 2 flows, got 1 of them"):
        df.compose([df.planar()] * 2).forward([planes], x)
    with pytest.raises(ValueError, match="each of 2 flows, got a dict"):
        df.compose([df.planar()] * 2).inverse({}, x)
    with pytest.raises(ValueError, match="each of 3 flows, got a Planar"):
        df.compose([df.planar()] * 3).forward(planes, x)
    longer = planes._replace(u=jnp.ones((2, 3)), w=jnp.ones((3, 3)), b=jnp.ones(2))
    for params in (planes, longer, None):
        with pytest.raises(ValueError, match=r"params must have a leading axis \[K, ...\] .* jax.vmap"):
            df.repeat(df.planar()).forward(params, x)
    with pytest.raises(ValueError, match=r"log_base must return one number"):
        df.log_prob(df.planar(), planes, x, lambda z: z)
    with pytest.raises(ValueError, match=r"f\(x\) has shape \(2,\)"):
        df.dense_log_abs_det(lambda x: x[:2], x)
    with pytest.raises(TypeError, match="typed key"):
        df.init_planar(jax.random.PRNGKey(0), x)
