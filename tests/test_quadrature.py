"""Quadrature rules against integrals that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import quadrature

RULES = {
    "gauss_legendre": (quadrature.gauss_legendre, lambda num: 2 * num - 1),
    "clenshaw_curtis": (quadrature.clenshaw_curtis, lambda num: num - 1),
}


@pytest.mark.parametrize("num", [3, 5, 9, 17])
@pytest.mark.parametrize("name", RULES)
def test_polynomials_up_to_the_degree_are_exact(name, num):
    make, degree = RULES[name]
    rule = make(num)
    assert rule.nodes.shape == rule.weights.shape == (num,)
    assert np.all(np.diff(rule.nodes) > 0)
    powers = np.arange(degree(num) + 1)
    found = rule.weights @ rule.nodes[:, None] ** powers
    np.testing.assert_allclose(found, 1 / (powers + 1), atol=2e-15)


@pytest.mark.parametrize("num", [5, 9, 33])
def test_the_coarser_rule_is_the_rule_of_every_other_node(num):
    rule, coarse = quadrature.clenshaw_curtis(num), quadrature.clenshaw_curtis((num + 1) // 2)
    np.testing.assert_allclose(rule.nodes[::2], coarse.nodes, atol=1e-16)
    np.testing.assert_allclose(rule.coarse[::2], coarse.weights, atol=1e-16)
    assert np.all(rule.coarse[1::2] == 0)


def test_clenshaw_curtis_converges_on_a_narrow_peak():
    """1 / (1 + 25 (2 u - 1)^2), Runge's function: its integral is atan(5) / 5."""
    errors = []
    for num in (9, 17, 33, 65):
        rule = quadrature.clenshaw_curtis(num)
        values = 1 / (1 + 25 * (2 * rule.nodes - 1) ** 2)
        errors.append(abs(rule.weights @ values - np.arctan(5) / 5))
        assert errors[-1] <= abs((rule.weights - rule.coarse) @ values)  # its own estimate bounds it
    assert errors[-1] < 1e-10


def test_stratified_nodes_are_unbiased_for_a_jump_and_their_variance_falls_as_the_cube():
    """False alarm: the mean over 20,000 draws beyond four standard errors, 6e-5; the variance within 5 per cent of
    f'^2 / (12 num^3), four standard errors and more."""
    draws = jax.vmap(lambda key: quadrature.stratified(key, 5, jnp.float64))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    assert jnp.all((draws.nodes >= jnp.arange(5)[None] / 5) & (draws.nodes < (jnp.arange(5)[None] + 1) / 5))
    jump = jnp.sum(jnp.where(draws.nodes > 0.33, draws.weights, 0.0), axis=1)
    assert abs(jump.mean() - 0.67) < 4 * jump.std() / 20_000**0.5
    slope = jnp.sum(draws.weights * 3.0 * draws.nodes, axis=1)
    np.testing.assert_allclose(slope.var(), 9 / (12 * 125), rtol=0.05)


@pytest.mark.parametrize(
    ("make", "num", "error", "message"),
    [
        (quadrature.gauss_legendre, 0, ValueError, "num must be at least 1, got 0"),
        (quadrature.gauss_legendre, 2.5, TypeError, "num must be a Python int"),
        (quadrature.clenshaw_curtis, 1, ValueError, "num must be at least 3, got 1"),
        (quadrature.clenshaw_curtis, 8, ValueError, "num must be odd, got 8: pass 9"),
        (lambda num: quadrature.stratified(jax.random.key(0), num), 0, ValueError, "num must be at least 1"),
        (lambda num: quadrature.stratified(jax.random.PRNGKey(0), num), 3, TypeError, "key must be a typed key"),
    ],
)
def test_bad_input(make, num, error, message):
    with pytest.raises(error, match=message):
        make(num)
