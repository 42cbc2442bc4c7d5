"""All twenty conversions against the oracles, inside and at the ends, and back again."""

from itertools import permutations, product
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import SINGULAR, points, sweep
from targets import SCHEDULES
from targets import rotated_mixture as mixture

from dgm_jax import densities, networks, schedules
from dgm_jax.parameterizations import Kind, convert

KINDS = get_args(Kind)
PAIRS = tuple(permutations(KINDS, 2))
QUADRATIC = ("sub_vp", "cosine", "edm", "linear")  # sigma in proportion to t at the start


def oracles(density, schedule):
    """The five fields; v from its definition, alpha E[eps | x] - sigma E[x_0 | x]."""
    noise, denoiser = densities.noise(density, schedule), densities.denoiser(density, schedule)

    def v(t, x, args):
        return schedules.alpha(schedule, t) * noise(t, x, args) - schedules.sigma(schedule, t) * denoiser(t, x, args)

    return {
        "score": densities.score(density, schedule),
        "noise": noise,
        "x0": denoiser,
        "v": v,
        "velocity": densities.velocity(density, schedule),
    }


def every_conversion(density):
    def make(schedule):
        fields = oracles(density, schedule)

        def field(t, x, args):
            right = {kind: fields[kind](t, x, args) for kind in KINDS}
            converted = {
                (a, b): convert(lambda t, x, args: args, schedule, source=a, target=b)(t, x, right[a]) for a, b in PAIRS
            }
            return right, converted

        return field

    return make


def blind(name, end):
    """The pairs whose source says nothing of the target at this end, by hand."""
    if end == 1:  # where alpha = 0, score and noise are -x and x whatever the data
        lost = {(a, b) for a in ("score", "noise") for b in ("x0", "v", "velocity")}
        return lost if name in SINGULAR else set()
    lost = {("x0", kind) for kind in KINDS if kind != "x0"}  # x itself whatever the data
    lost |= {("noise", "score"), ("v", "score")}  # zero whatever the data
    if name in QUADRATIC:
        return lost | {("velocity", "score")}  # alpha' x whatever the data
    return lost | {("noise", "velocity"), ("v", "velocity")}


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.float64])
def test_every_conversion_against_the_oracles(dtype):
    """Right inside; at the ends right where the source determines the target, and where not, plainly not finite."""
    tolerance = 1e-3 if dtype == jnp.float32 else 1e-8
    ts = (0.0, 1.0, 0.3, 0.7) if dtype == jnp.float32 else (0.0, 1.0, 0.01, 0.3, 0.7, 0.99)
    xs = points(2, dtype=dtype)
    for name, (right, converted) in sweep(every_conversion(mixture(2, dtype)), ts, xs):
        for pair, got in converted.items():
            for value, expected, t in zip(got, right[pair[1]], ts, strict=True):
                about = f"{name} {pair} at t = {t}"
                assert value.dtype == dtype, about
                if t in (0.0, 1.0) and pair in blind(name, t):
                    assert not np.any(np.isfinite(value)), about
                else:
                    size = max(1.0, np.max(np.abs(expected)))
                    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * size, err_msg=about)


@pytest.mark.slow
def test_there_and_back_for_a_field_that_is_no_oracle():
    """Each pair of conversions is inverse to each other whatever the network says."""

    def network(t, x, args):
        return jnp.sin(jnp.flip(x) * 1.3 + t) + 0.1 * x

    def make(schedule):
        def field(t, x, args):
            there = {(a, b): convert(network, schedule, source=a, target=b) for a, b in PAIRS}
            back = [convert(there[a, b], schedule, source=b, target=a)(t, x, args) for a, b in PAIRS]
            return jnp.stack(back) - network(t, x, args)[None]

        return field

    for name, error in sweep(make, [0.2, 0.5, 0.8], points(3, 2)):
        np.testing.assert_allclose(error, np.zeros_like(error), atol=1e-9, err_msg=name)


def test_limits_at_the_start_hold_for_any_network():
    """At t = 0: noise to velocity is eps - x on linear and sigma_max eps on edm; velocity to noise is the inverse."""
    x, p, zero = jnp.asarray([0.3, -2.0]), jnp.asarray([5.0, 7.0]), jnp.zeros(())

    def at_zero(name, source, target):
        return jax.jit(convert(lambda t, x, args: p, SCHEDULES[name], source=source, target=target))(zero, x, None)

    np.testing.assert_allclose(at_zero("linear", "noise", "velocity"), p - x, rtol=1e-14)
    np.testing.assert_allclose(at_zero("linear", "velocity", "noise"), p + x, rtol=1e-14)
    np.testing.assert_allclose(at_zero("edm", "noise", "velocity"), 80 * p, rtol=1e-14)
    np.testing.assert_allclose(at_zero("edm", "velocity", "noise"), p / 80, rtol=1e-14)
    np.testing.assert_allclose(at_zero("cosine", "v", "velocity"), np.pi / 2 * p, rtol=1e-14)


def test_any_event_shape_and_arguments_pass_through():
    x = points(6)[0].reshape(1, 2, 3)

    def scaled(t, x, args):
        return args * x

    same = convert(scaled, SCHEDULES["vp"], source="v", target="v")
    assert same is scaled
    field = convert(scaled, SCHEDULES["vp"], source="noise", target="score")
    got = field(jnp.asarray(0.5), x, jnp.asarray(3.0))
    np.testing.assert_allclose(got, -3.0 * x / np.sqrt(-np.expm1(-2.5375)), rtol=1e-12)


def test_bad_input():
    vp = SCHEDULES["vp"]

    def identity(t, x, args):
        return x

    with pytest.raises(ValueError, match="source must be one of score, noise, x0, v, velocity, got 'eps'"):
        convert(identity, vp, source="eps", target="score")
    with pytest.raises(ValueError, match="target must be one of score, noise, x0, v, velocity, got 'flow'"):
        convert(identity, vp, source="score", target="flow")
    field = convert(identity, vp, source="noise", target="score")
    with pytest.raises(TypeError, match="x must be an array of floats, got dtype int64"):
        field(jnp.asarray(0.5), jnp.arange(2), None)
    with pytest.raises(ValueError, match=r"t must be one time of shape \(\), got shape \(2,\): use jax.vmap"):
        field(jnp.zeros(2), jnp.zeros(2), None)
    summed = convert(lambda t, x, args: jnp.sum(x), vp, source="noise", target="score")
    with pytest.raises(ValueError, match=r"field must return the shape of x, \(4, 2\), got \(\).*use jax.vmap over a"):
        summed(jnp.asarray(0.5), jnp.zeros((4, 2)), None)


def test_a_field_that_knows_its_divergence_makes_one_that_does():
    """Every third pair against the dense Jacobian; forms by every sign vector, whose mean is exact."""
    schedule, x, t = SCHEDULES["vp"], jnp.asarray([0.3, -1.2, 0.8]), jnp.asarray(0.4)
    net = networks.MLP((5, 6, 4), last_init=jax.nn.initializers.lecun_normal(), param_dtype=jnp.float64)
    params, field = net.init(jax.random.key(0), t, x), networks.vector_field(net)
    signs = jnp.asarray(list(product((-1.0, 1.0), repeat=field.probe_space(field.prepare(params))[0])))

    @jax.jit
    def every(params, x):
        found = {}
        for a, b in PAIRS[::3]:
            made = convert(field, schedule, source=a, target=b)
            prepared = made.prepare(params)
            value, forms = made.with_forms(t, x, prepared, signs)
            known = made(t, x, params), jnp.trace(jax.jacfwd(made, 1)(t, x, params))
            found[a, b] = known, made.with_divergence(t, x, prepared), (value, jnp.mean(forms))
        return found

    for pair, (known, *own) in every(params, x).items():
        for got in own:
            np.testing.assert_allclose(got[0], known[0], rtol=1e-12, err_msg=str(pair))
            np.testing.assert_allclose(got[1], known[1], rtol=1e-10, err_msg=str(pair))
    assert convert(field, schedule, source="noise", target="noise") is field
