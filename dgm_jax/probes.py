"""Random vectors e with E[e] = 0 and E[e e^T] = I: all that a stochastic trace needs, E[e^T A e] = tr A.

Write S = (A + A^T) / 2 and m for the number of entries of x. One probe estimates tr A with variance

    rademacher   2 (|S|_F^2 - sum_i S_ii^2)              exact for diagonal S; least among independent entries
    gaussian     2 |S|_F^2
    sphere       2 m / (m + 2) (|S|_F^2 - (tr S)^2 / m)  exact for S a multiple of the identity
    orthogonal   the sphere's for one probe; falls faster than 1 / num, to zero at num = m
"""

import math
import operator

import jax
import jax.numpy as jnp

from dgm_jax._checks import floating, typed_key
from dgm_jax.types import Array

__all__ = ["gaussian", "orthogonal", "rademacher", "sphere"]


def rademacher(key: Array, x: Array, num: int = 1) -> Array:
    """Draw vectors of independent signs, +1 or -1 with probability 1/2 each.

    Args:
        key: a typed key.
        x: one example ``[*event]``; only its shape and dtype matter.
        num: how many vectors, at least 1.

    Returns:
        ``[num, *event]`` in the dtype of ``x``.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats.
        ValueError: ``num`` less than 1.

    Source: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines", proposition 1.
    """
    key, x, num = _arguments(key, x, num)
    return jax.random.rademacher(key, (num, *x.shape), x.dtype)


def gaussian(key: Array, x: Array, num: int = 1) -> Array:
    """Draw standard normal vectors, N(0, I).

    Args:
        key: a typed key.
        x: one example ``[*event]``; only its shape and dtype matter.
        num: how many vectors, at least 1.

    Returns:
        ``[num, *event]`` in the dtype of ``x``.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats.
        ValueError: ``num`` less than 1.

    Source: Girard (1989), "A fast Monte-Carlo cross-validation procedure for large least squares
    problems with noisy data"; variance in Avron and Toledo (2011), "Randomized algorithms for
    estimating the trace of an implicit symmetric positive semi-definite matrix", lemma 5.
    """
    key, x, num = _arguments(key, x, num)
    return jax.random.normal(key, (num, *x.shape), x.dtype)


def sphere(key: Array, x: Array, num: int = 1) -> Array:
    """Draw vectors uniform on the sphere of radius sqrt(m), m the size of ``x``: e = sqrt(m) z / |z|, z ~ N(0, I).

    Args:
        key: a typed key.
        x: one example ``[*event]``; only its shape and dtype matter.
        num: how many vectors, at least 1.

    Returns:
        ``[num, *event]`` in the dtype of ``x``, each of squared norm m.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats.
        ValueError: ``num`` less than 1.

    Source: Muller (1959), "A note on a method for generating points uniformly on n-dimensional spheres".
    """
    key, x, num = _arguments(key, x, num)
    if x.size == 1:  # the sphere of one dimension is two points, and z / |z| would be 0 / 0 at z = 0
        return jax.random.rademacher(key, (num, *x.shape), x.dtype)
    z = jax.random.normal(key, (num, x.size), x.dtype)
    e = z * (math.sqrt(x.size) / jnp.linalg.norm(z, axis=1, keepdims=True))
    return e.reshape(num, *x.shape)


def orthogonal(key: Array, x: Array, num: int = 1) -> Array:
    """Draw rows of a random orthogonal matrix, times sqrt(m), m the size of ``x``.

    e_i . e_j = m if i = j, else 0. Each one alone is a draw of ``sphere``; together they do not
    repeat each other, and all m of them give the trace exactly: sum_i e_i e_i^T / m = I. The matrix is
    uniform (Haar): Q from the QR decomposition of a normal matrix, with the diagonal of R made positive.

    Args:
        key: a typed key.
        x: one example ``[*event]``; only its shape and dtype matter.
        num: how many vectors, from 1 to m. Time grows as m num^2.

    Returns:
        ``[num, *event]`` in the dtype of ``x``.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats.
        ValueError: ``num`` less than 1 or more than m.

    Source: Mezzadri (2007), "How to generate random matrices from the classical compact groups", section 5.
    """
    key, x, num = _arguments(key, x, num)
    if num > x.size:
        raise ValueError(
            f"num is {num}, but x of shape {x.shape} has room for {x.size} orthogonal vectors: pass num={x.size}, "
            "which gives the exact trace, or draw from probes.sphere."
        )
    q, r = jnp.linalg.qr(jax.random.normal(key, (x.size, num), x.dtype))
    signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(x.dtype)
    return (math.sqrt(x.size) * (q * signs[None, :]).T).reshape(num, *x.shape)


def _arguments(key: Array, x: Array, num: int) -> tuple[Array, Array, int]:
    key, x = typed_key(key), floating("x", x)
    if x.size == 0:
        raise ValueError(f"x has shape {x.shape} and so no entries: pass one example [*event].")
    try:
        num = operator.index(num)
    except TypeError as error:
        raise TypeError(f"num must be a Python int, known before tracing, got {type(num).__name__}.") from error
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}.")
    return key, x, num
