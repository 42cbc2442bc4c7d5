"""Networks that know their divergence or Laplacian, against the dense Jacobian in float64."""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dgm_jax import flows, networks, structured
from dgm_jax.types import StructuredField

slow = pytest.mark.slow
F64 = {"param_dtype": jnp.float64}


def built(net, d, label=()):
    """The field, a time, three examples, and parameters that are all random: the last layers start at zero."""
    rng = np.random.default_rng(d)
    t, x = jnp.asarray(0.3), jnp.asarray(rng.normal(size=(3, d)))
    shapes = jax.eval_shape(net.init, jax.random.key(0), t, x[0], *label)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), shapes)
    return networks.vector_field(net), t, x, params


def dense(field, t, x, args):
    """Value, trace of the whole Jacobian, and its gradient in x and args."""

    def trace(x, args):
        return jnp.trace(jax.jacfwd(field, 1)(t, x, args))

    return field(t, x, args), trace(x, args), jax.grad(trace, (0, 1), allow_int=True)(x, args)


def own(field, t, x, args):
    """The same from what the field knows of itself."""

    def trace(x, args):
        return field.with_divergence(t, x, field.prepare(args))[1]

    value, div = field.with_divergence(t, x, field.prepare(args))
    return value, div, jax.grad(trace, (0, 1), allow_int=True)(x, args)


def agree(field, t, x, args):
    got, wanted = jax.jit(jax.vmap(lambda x: (own(field, t, x, args), dense(field, t, x, args))))(x)
    jax.tree.map(
        lambda a, b: a.dtype == jax.dtypes.float0 or np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        got,
        wanted,
    )


MLPS = {
    "no hidden layer": (networks.MLP(features=(), **F64), 3),
    "one": (networks.MLP(features=(5,), **F64), 4),
    "one, residual": (networks.MLP(features=(4,), residual=True, **F64), 4),
    "two": (networks.MLP(features=(5, 6), activation=nn.silu, **F64), 9),
    "two, first residual": (networks.MLP(features=(4, 5), residual=True, **F64), 4),
    "two, second residual": (networks.MLP(features=(5, 5), residual=True, time_features=4, **F64), 7),
    "two, both residual": (networks.MLP(features=(5, 5), residual=True, activation=nn.softplus, **F64), 5),
    "three, by rows of x": (networks.MLP(features=(9, 8, 7), **F64), 2),
    "three, by rows of the hidden space": (networks.MLP(features=(3, 4, 5), activation=nn.gelu, **F64), 11),
    "four, residual": (networks.MLP(features=(4, 4, 4, 6), residual=True, **F64), 9),
    "four, all residual": (networks.MLP(features=(4, 4, 4, 4), residual=True, **F64), 4),
    "three, wider than a block": (networks.MLP(features=(37, 5, 6), **F64), 61),
    "two, with as many outputs named": (networks.MLP(features=(5, 6), out_features=4, **F64), 4),
}


SPACES = {
    "no hidden layer": (3, 0),
    "two": (5, 5 * 6 / (9 * 5 + 5 * 6 + 6 * 9)),
    "three, by rows of x": (2, 2 * (9 * 8 + 8 * 7 + 7) / (2 * 9 + 9 * 8 + 8 * 7 + 7 * 2)),
    "three, by rows of the hidden space": (3, 3 * (4 * 5 + 5) / (3 * 4 + 4 * 5 + 5 * 3)),
    "four, all residual": (4, 4 * (4 * 4 + 4 * 4 + 4) / (5 * 4 * 4)),
    "three, wider than a block": (5, 37 * (5 * 6 + 6) / (37 * 5 + 5 * 6 + 6 * 37)),
}
"""Dimensions of a probe, and multiplications of the exact trace over those of one form, counted by hand."""


def signs(dim):
    """All sign vectors: their mean outer product is the identity, exactly."""
    return jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=dim)))


def test_every_mlp_knows_its_divergence():
    fields = {name: built(*MLPS[name]) for name in MLPS}

    @jax.jit
    def all_of_them(arguments):
        found = {}
        for name, (t, x, params) in arguments.items():
            field = fields[name][0]
            prepared = field.prepare(params)
            found[name] = (
                field.with_divergence(t, x[0], prepared),
                field.with_forms(t, x[0], prepared, signs(field.probe_space(prepared)[0])),
                field(t, x[0], params),
                jax.jacfwd(field, 1)(t, x[0], params),
            )
        return found

    found = all_of_them({name: rest for name, (_, *rest) in fields.items()})
    for name, (field, *_) in fields.items():
        assert isinstance(field, StructuredField), name
        (value, div), (value_too, forms), plain, jacobian = found[name]
        np.testing.assert_allclose(value, plain, rtol=1e-13, err_msg=name)
        np.testing.assert_array_equal(value_too, value, err_msg=name)
        np.testing.assert_allclose(div, np.trace(jacobian), atol=1e-12, err_msg=name)
        np.testing.assert_allclose(np.mean(forms), np.trace(jacobian), atol=1e-12, err_msg=name)
        assert np.std(forms) > 0.1, name  # they are estimates


@pytest.mark.parametrize("name", SPACES)
def test_the_worth_of_a_form_is_counted(name):
    net, d = MLPS[name]
    field, _, _, params = built(net, d)
    np.testing.assert_allclose(field.probe_space(field.prepare(params)), SPACES[name], rtol=1e-12)


@pytest.mark.parametrize(
    "name", ["two, second residual", *(pytest.param(n, marks=slow) for n in ("one", "three, wider than a block"))]
)
def test_the_gradient_of_the_divergence_of_an_mlp(name):
    agree(*built(*MLPS[name]))


@pytest.mark.parametrize(
    "name", ["four, residual", *(pytest.param(n, marks=slow) for n in ("three, by rows of x", "one, residual"))]
)
def test_the_gradient_of_forms_in_the_hidden_space(name):
    """Of their mean over all sign vectors, in x and the parameters: that of the trace of the dense Jacobian."""
    field, t, x, params = built(*MLPS[name])

    def mean(x, params):
        prepared = field.prepare(params)
        return jnp.mean(field.with_forms(t, x, prepared, signs(field.probe_space(prepared)[0]))[1])

    def trace(x, params):
        return jnp.trace(jax.jacfwd(field, 1)(t, x, params))

    got, wanted = jax.jit(lambda *at: (jax.grad(mean, (0, 1))(*at), jax.grad(trace, (0, 1))(*at)))(x[0], params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, wanted)


@pytest.mark.parametrize("rows", ["x", "hidden"])
def test_where_products_are_fewer_is_known_from_the_shapes(rows):
    """Three layers of 8 units: two dimensions by their own rows, 40 by those of the hidden space."""
    m = {"x": 2, "hidden": 40}[rows]
    keys = jax.random.split(jax.random.key(m), 4)
    kernels = [
        jax.random.normal(key, shape) for key, shape in zip(keys, itertools.pairwise((m, 8, 8, 8, m)), strict=True)
    ]
    tables = structured.chain_tables(kernels, (False,) * 3)
    assert jax.tree.map(jnp.shape, tables) == (None if rows == "x" else ((8, 8),))


@slow
def test_a_conditional_mlp_knows_its_divergence():
    net = networks.MLP(features=(6, 6), time_features=4, num_classes=3, **F64)
    _, t, x, params = built(net, 5, (jnp.int32(0),))
    field = networks.conditional(net)
    assert isinstance(field, StructuredField)
    args = params, jnp.int32(2)
    agree(field, t, x, args)
    prepared = field.prepare(args)
    forms = field.with_forms(t, x[0], prepared, signs(field.probe_space(prepared)[0]))[1]
    np.testing.assert_allclose(jnp.mean(forms), field.with_divergence(t, x[0], prepared)[1], atol=1e-12)


@pytest.mark.parametrize("d", [pytest.param(1, marks=slow), 5])
def test_a_hollow_network_knows_its_divergence_and_each_coordinate_hears_all_others(d):
    net = networks.HollowNet(features=(9, 7), channels=3, transformer=(6,), **F64)
    field, t, x, params = built(net, d)
    agree(field, t, x, params)
    heard = jax.jit(jax.jacfwd(lambda x: net.apply(params, t, x, method="conditioner")))(x[0])
    heard = np.abs(np.asarray(heard)).max(axis=1)
    assert np.all(np.diag(heard) == 0)
    assert np.all(heard[~np.eye(d, dtype=bool)] > 0)


def test_a_hollow_network_starts_at_zero():
    net = networks.HollowNet(features=(4,), **F64)
    t, x = jnp.asarray(0.3), jnp.arange(3.0)
    np.testing.assert_array_equal(net.apply(jax.jit(net.init)(jax.random.key(0), t, x), t, x), jnp.zeros(3))


OT_FLOWS = {
    "narrow": (9, 5, 2),
    "wide": (3, 6, 2),
    "deep": (7, 4, 4),
    "one layer": (6, 4, 1),
    "deep and wide": (2, 5, 3),
}


@pytest.mark.parametrize("name", [name if name == "narrow" else pytest.param(name, marks=slow) for name in OT_FLOWS])
def test_an_optimal_transport_flow_is_a_gradient_and_knows_its_divergence(name):
    d, width, layers = OT_FLOWS[name]
    net = networks.OTFlow(width=width, layers=layers, rank=4, **F64)
    field, t, x, params = built(net, d)
    agree(field, t, x, params)
    slope = jax.jit(jax.grad(lambda x: net.apply(params, t, x, method="potential")))(x[0])
    np.testing.assert_allclose(field(t, x[0], params), -slope, rtol=1e-12)


def test_the_potential_is_that_of_the_paper():
    """Two layers, by hand: w . (u + act(K_2 u + b_2)) + |A s|^2 / 2 + b . s + c."""
    net = networks.OTFlow(width=5, layers=2, rank=2, **F64)
    _, t, x, params = built(net, 3)
    p = jax.tree.map(np.asarray, params["params"])
    s = np.append(x[0], t)
    u = np.log(2 * np.cosh(s @ p["kernel_0"] + p["bias_0"]))
    u = u + np.log(2 * np.cosh(u @ p["kernel_1"] + p["bias_1"]))
    expected = p["w"] @ u + 0.5 * s @ p["A"].T @ p["A"] @ s + p["b"] @ s + p["c"]
    np.testing.assert_allclose(net.apply(params, t, x[0], method="potential"), expected, rtol=1e-14)


ENERGIES = {
    "one layer": (networks.MLP(features=(4,), out_features=1, **F64), 6),
    "narrow": (networks.MLP(features=(5, 6), activation=nn.silu, out_features=1, **F64), 9),
    "wide": (networks.MLP(features=(6, 6), residual=True, out_features=1, time_features=4, **F64), 3),
    "deep": (networks.MLP(features=(4, 4, 5, 5), residual=True, out_features=1, **F64), 7),
    "deep, all residual": (networks.MLP(features=(4, 4, 4), residual=True, out_features=1, **F64), 4),
    "wider than a block": (networks.MLP(features=(5, 40), out_features=1, **F64), 8),
}


@pytest.mark.parametrize("name", [name if name == "narrow" else pytest.param(name, marks=slow) for name in ENERGIES])
def test_an_energy_knows_its_laplacian(name):
    net, d = ENERGIES[name]
    _, t, x, params = built(net, d)
    u = networks.energy(net)

    def both(x):
        def dense(x, params):
            return jnp.trace(jax.hessian(u, 1)(t, x, params))

        def own(x, params):
            return u.with_laplacian(t, x, u.prepare(params))[1]

        got = *u.with_laplacian(t, x, u.prepare(params)), jax.grad(own, (0, 1))(x, params)
        return got, (u(t, x, params), dense(x, params), jax.grad(dense, (0, 1))(x, params))

    got, wanted = jax.jit(jax.vmap(both))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), got, wanted)


def test_what_cannot_know_its_divergence_is_a_plain_field():
    for net in (
        networks.UNet(),
        *(
            networks.MLP(activation=act)
            for act in (nn.softmax, nn.standardize, jnp.cumsum, lambda a: a[::-1], nn.PReLU())
        ),
    ):
        assert not isinstance(networks.vector_field(net), StructuredField)
    for act in (
        nn.relu,
        nn.silu,
        nn.gelu,
        nn.elu,
        nn.softplus,
        nn.sigmoid,
        jnp.sin,
        nn.hard_tanh,
        lambda a: a / (1 + a**2),
    ):
        assert isinstance(networks.vector_field(networks.MLP(activation=act)), StructuredField)


def test_it_is_called_and_transformed_as_any_field():
    net = networks.MLP(features=(4,), **F64)
    field, t, x, params = built(net, 3)
    wanted = jnp.stack([net.apply(params, t, one) for one in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(field, (None, 0, None)))(t, x, params), wanted, rtol=1e-14)
    assert jax.jit(field)(t, x[0], params).shape == (3,)
    traced = []

    @jax.jit
    def with_divergence(t, x, prepared):
        traced.append(1)
        return field.with_divergence(t, x, prepared)

    for time in (0.1, 0.2):
        with_divergence(jnp.asarray(time), x[0], field.prepare(params))
    assert len(traced) == 1


@slow
@pytest.mark.parametrize("name", ["mlp", "hollow", "ot"])
def test_a_flow_uses_what_the_field_knows_and_differentiates_it(name):
    """By the continuous adjoint, against the exact divergence of the plain field and its central difference."""
    net = {
        "mlp": networks.MLP(features=(5, 5), **F64),
        "hollow": networks.HollowNet(features=(5,), channels=2, transformer=(4,), **F64),
        "ot": networks.OTFlow(width=4, **F64),
    }[name]
    field, _, x, params = built(net, 3)
    options = {"t_data": 1.0, "t_base": 0.0, "rtol": 1e-9, "atol": 1e-9}
    adjoint = diffrax.BacksolveAdjoint()
    own = jax.jit(jax.value_and_grad(lambda p: flows.log_prob(field, x[0], p, adjoint=adjoint, **options)))
    plain = jax.jit(lambda p: flows.log_prob(field.field, x[0], p, **options))
    value, gradient = own(params)
    np.testing.assert_allclose(value, plain(params), atol=1e-7)
    direction = jax.tree.map(jnp.sin, params)
    ends = [plain(jax.tree.map(lambda a, b, s=s: a + s * b, params, direction)) for s in (1e-4, -1e-4)]
    along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / 2e-4, rtol=1e-5, atol=1e-6)


def test_precision_reaches_the_products_of_the_trace():
    net = networks.MLP(features=(4, 4, 4), **F64)
    _, t, x, params = built(net, 6)
    field = networks.vector_field(net, precision="highest")
    for trace in (field.with_divergence, lambda *at: field.with_forms(*at, jnp.ones((2, 4)))):
        text = str(jax.make_jaxpr(lambda p, trace=trace: trace(t, x[0], field.prepare(p)))(params))
        assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == text.count("dot_general[") > 4


def test_bad_input_is_named_with_its_remedy():
    with pytest.raises(ValueError, match=r"lead from a space back to itself.*\(3, 4\), \(5, 3\)"):
        structured.chain_tables([jnp.ones((3, 4)), jnp.ones((5, 3))], [False])
    with pytest.raises(ValueError, match=r"kernels must be matrices \[in, out\], got shapes \[\(3,\)\]"):
        structured.chain_tables([jnp.ones(3)], [])
    with pytest.raises(ValueError, match="one entry for each of the 1 hidden layers"):
        structured.chain_tables([jnp.ones((3, 4)), jnp.ones((4, 3))], [])
    with pytest.raises(ValueError, match="a residual layer must keep its width"):
        structured.chain_tables([jnp.ones((3, 4)), jnp.ones((4, 3))], [True])
    with pytest.raises(ValueError, match=r"probes must be \[num, 3\], as wide as the narrowest space.*\(2, 4\)"):
        structured.chain_forms(None, [jnp.ones((4, 3)), jnp.ones((3, 4))], [False], [jnp.ones(3)], jnp.ones((2, 4)))
    field, t, x, params = built(networks.MLP(features=(4,), out_features=2, **F64), 3)
    assert field(t, x[0], params).shape == (2,)
    with pytest.raises(ValueError, match=r"lead from a space back to itself.*\(3, 4\), \(4, 2\)"):
        field.prepare(params)
    with pytest.raises(TypeError, match=r"net must be a networks.MLP, got UNet.*divergence.laplacian"):
        networks.energy(networks.UNet())
    for net in (networks.MLP(), networks.MLP(out_features=1, activation=nn.softmax)):
        with pytest.raises(ValueError, match=r"out_features=1.*divergence.laplacian"):
            networks.energy(net)
