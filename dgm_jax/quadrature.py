"""Quadrature rules for the integral of a function over [0, 1]: nodes, weights, and a coarser rule on the same nodes.

    integral of f(u) du over [0, 1] ~ sum_q weights_q f(nodes_q)

                       nodes                        exact for polynomials of degree
    gauss_legendre     zeros of Legendre's P_num    2 num - 1
    clenshaw_curtis    (1 - cos(pi q / N)) / 2      num, both ends and the next coarser rule's nodes among them
    stratified         one at random in each 1/num  0, but its mean over draws is the integral of any f

Where an integrand is known to be smooth, Gauss-Legendre needs about half the nodes of a Clenshaw-Curtis rule at very
high accuracy, and nearly as many at low accuracy; only the latter reports its own error.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax._checks import at_least, typed_key
from dgm_jax.types import Array

__all__ = ["Quadrature", "clenshaw_curtis", "gauss_legendre", "stratified"]


class Quadrature(NamedTuple):
    """A rule on [0, 1].

    Attributes:
        nodes: increasing, from 0 to 1 ``[num]``.
        weights: of the values there, which sum to 1 ``[num]``.
        coarse: weights of a coarser rule on the same nodes ``[num]``, zero where it has none: the difference of the
            two sums estimates the error of the coarser one. ``None`` where there is no such rule.
    """

    nodes: Any
    weights: Any
    coarse: Any = None


def gauss_legendre(num: int) -> Quadrature:
    """Make the rule of highest degree with ``num`` nodes; it has no error estimate.

    Args:
        num: how many nodes, at least 1.

    Returns:
        A ``Quadrature`` of float64 arrays of NumPy.

    Raises:
        TypeError: ``num`` not an int.
        ValueError: ``num`` less than 1.

    Source: Golub and Welsch (1969), "Calculation of Gauss quadrature rules".
    """
    nodes, weights = np.polynomial.legendre.leggauss(at_least("num", num, 1))
    return Quadrature((nodes + 1) / 2, weights / 2)


def clenshaw_curtis(num: int) -> Quadrature:
    """Make the rule that integrates the interpolating polynomial at the extrema of a Chebyshev polynomial.

    nodes_q = (1 - cos(pi q / N)) / 2,  N = num - 1,
    weights_q = c_q / (2 N) (1 - sum_(j=1)^(N/2) b_j / (4 j^2 - 1) cos(2 pi j q / N)),

    with c_q = 1 at both ends and 2 between, b_j = 1 for j = N/2 and 2 below. The coarser rule is the same one on every
    other node.

    Args:
        num: how many nodes: 3 or more, and odd; the coarser rule is there where (num - 1) / 2 is even: num = 5, 9, 13,
            17, ...

    Returns:
        A ``Quadrature`` of float64 arrays of NumPy.

    Raises:
        TypeError: ``num`` not an int.
        ValueError: ``num`` less than 3, or even.

    Source: Clenshaw and Curtis (1960), "A method for numerical integration on an automatic computer"; the closed form
    in Waldvogel (2006), "Fast construction of the Fejer and Clenshaw-Curtis quadrature rules".
    """
    num = at_least("num", num, 3)
    if num % 2 == 0:
        raise ValueError(f"num must be odd, got {num}: pass {num + 1}.")
    nodes, weights = _clenshaw_curtis(num)
    coarse = None
    if (num - 1) % 4 == 0:
        coarse = np.zeros(num)
        coarse[::2] = _clenshaw_curtis((num + 1) // 2)[1]
    return Quadrature(nodes, weights, coarse)


def stratified(key: Array, num: int, dtype: Any = jnp.float32) -> Quadrature:
    """Draw one uniform node in each of ``num`` equal parts of [0, 1]: unbiased for every integrable f.

    u_q = (q + U_q) / num,  U_q uniform on [0, 1). The variance falls as num^-3 for a smooth f, against num^-1 for
    nodes drawn without strata.

    Args:
        key: a typed key.
        num: how many nodes, at least 1.
        dtype: of the nodes.

    Returns:
        A ``Quadrature`` of JAX arrays, each weight 1 / num.

    Raises:
        TypeError: an old-style key, or ``num`` not an int.
        ValueError: ``num`` less than 1.

    Source: Owen (2013), "Monte Carlo theory, methods and examples", section 8.4.
    """
    num = at_least("num", num, 1)
    offsets = jax.random.uniform(typed_key(key), (num,), dtype)
    nodes = (jnp.arange(num, dtype=dtype) + offsets) / jnp.asarray(num, dtype)
    return Quadrature(nodes, jnp.full((num,), 1 / num, dtype))


def _clenshaw_curtis(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights, float64; ``num`` odd."""
    n = num - 1
    q, j = np.arange(num), np.arange(1, n // 2 + 1)
    b = np.where(j == n // 2, 1.0, 2.0)
    ends = np.where((q == 0) | (q == n), 1.0, 2.0)
    sums = np.cos(2 * np.pi * np.outer(q, j) / n) @ (b / (4.0 * j**2 - 1))
    return np.sin(0.5 * np.pi * q / n) ** 2, ends / (2 * n) * (1 - sums)
