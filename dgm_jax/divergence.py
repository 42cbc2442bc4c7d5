"""The divergence div f(x) = sum_i df_i/dx_i = tr J(x), J the Jacobian, always together with f(x).

Every function linearises f once, which gives f(x) and the map e -> J e, and applies that map to a batch
of vectors. With m entries in x and k probes:

    method            products J e      memory         error
    exact             m                 m activations  none
    exact_in_chunks   m                 size           none
    hutchinson        k                 k              standard deviation ~ 1 / sqrt(k)

All of them can be differentiated in reverse and run inside ``jax.lax.while_loop``.
"""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dgm_jax._checks import floating, probes_for
from dgm_jax.types import Array, Divergence

__all__ = ["exact", "exact_in_chunks", "hutchinson", "laplacian", "quadratic_forms"]


def exact(f: Callable[[Array], Array], x: Array, probes: Array | None = None) -> tuple[Array, Array]:
    """Compute f(x) and its divergence from all m columns of the Jacobian at once.

    div f(x) = sum_i e_i^T J e_i, e_i the unit vectors.

    From m of about 1,000 on the columns no longer fit a processor's cache, and ``exact_in_chunks`` is faster: 14 times
    at m = 4,096 for the field of benchmarks/determinant_and_trace.py.

    Args:
        f: ``[*event] -> [*event]``.
        x: one example ``[*event]``.
        probes: not used; there so that every divergence is called alike.

    Returns:
        f(x) ``[*event]`` and div f(x) ``[]``.

    Raises:
        TypeError: ``x`` not of floats, or f(x) of another dtype.
        ValueError: f(x) of another shape.
    """
    value, push = _linearize(f, x)
    return value, _trace(push, value)


def exact_in_chunks(size: int) -> Divergence:
    """Make an exact divergence that holds only ``size`` columns of the Jacobian at a time.

    The unit vectors come from their indices and one chunk follows another, in the derivative too, so
    memory grows with ``size`` and not with m.

    Args:
        size: columns in a chunk, at least 1; it need not divide m. Larger is faster while the columns fit the
            processor's cache.

    Returns:
        A divergence, called as ``exact`` is.

    Raises:
        TypeError: ``size`` not an int.
        ValueError: ``size`` less than 1.
    """
    try:
        size = operator.index(size)
    except TypeError as error:
        raise TypeError(f"size must be a Python int, known before tracing, got {type(size).__name__}.") from error
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")

    def divergence(f: Callable[[Array], Array], x: Array, probes: Array | None = None) -> tuple[Array, Array]:
        value, push = _linearize(f, x)
        indices = jnp.arange(value.size)

        def diagonal_entry(i: Array) -> Array:
            unit = (indices == i).astype(value.dtype).reshape(value.shape)
            return push(unit).reshape(-1)[i]

        # without checkpoint, the derivative would keep what every chunk computed
        entry = jax.checkpoint(diagonal_entry, prevent_cse=False)
        return value, jnp.sum(jax.lax.map(entry, indices, batch_size=min(size, value.size)))

    return divergence


def quadratic_forms(f: Callable[[Array], Array], x: Array, probes: Array | None) -> tuple[Array, Array]:
    """Compute f(x) and e^T J e for every probe e: unbiased estimates of the divergence, one a probe.

    Args:
        f: ``[*event] -> [*event]``.
        x: one example ``[*event]``.
        probes: ``[num, *event]`` with identity covariance, from ``dgm_jax.probes``.

    Returns:
        f(x) ``[*event]`` and the estimates ``[num]``. With independent probes, their standard deviation
        over sqrt(num) is the standard error of their mean.

    Raises:
        TypeError: ``x`` not of floats, or f(x) or ``probes`` of another dtype.
        ValueError: f(x) of another shape, ``probes`` None or of the wrong shape.

    Source: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines", section 2.
    """
    x = floating("x", x)
    probes = probes_for(x, probes)
    value, push = _linearize(f, x)
    return value, jnp.sum(probes * jax.vmap(push)(probes), axis=tuple(range(1, probes.ndim)))


def hutchinson(f: Callable[[Array], Array], x: Array, probes: Array | None) -> tuple[Array, Array]:
    """Compute f(x) and Hutchinson's unbiased estimate of its divergence.

    div f(x) ~ 1/num sum_k e_k^T J e_k.

    Args:
        f: ``[*event] -> [*event]``.
        x: one example ``[*event]``.
        probes: ``[num, *event]`` with identity covariance, from ``dgm_jax.probes``. Keep them fixed for
            a whole ODE solve, so that the field is one ODE.

    Returns:
        f(x) ``[*event]`` and the estimate ``[]``.

    Raises:
        TypeError: ``x`` not of floats, or f(x) or ``probes`` of another dtype.
        ValueError: f(x) of another shape, ``probes`` None or of the wrong shape.

    Source: Grathwohl et al. (2019), "FFJORD: Free-form continuous dynamics for scalable reversible
    generative models", section 3.1.
    """
    value, estimates = quadratic_forms(f, x, probes)
    return value, jnp.mean(estimates)


def laplacian(u: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Compute u(x) and its Laplacian, the divergence of its gradient.

    lap u(x) = sum_i d^2 u / dx_i^2.

    Args:
        u: ``[*event] -> []``.
        x: one example ``[*event]``.

    Returns:
        u(x) ``[]`` and lap u(x) ``[]``.

    Raises:
        TypeError: ``x`` not of floats, or u(x) of another dtype.
        ValueError: u(x) not a scalar.
    """
    x = floating("x", x)

    def scalar(y: Array) -> Array:
        value = u(y)
        if jnp.shape(value) != ():
            raise ValueError(
                f"u must return a scalar [], got shape {jnp.shape(value)} for x of shape {jnp.shape(y)}: "
                "sum what it returns, or use jax.vmap if x is a batch."
            )
        _same_dtype("u", value, y)
        return value

    def gradient(y: Array) -> tuple[Array, Array]:
        value, grad = jax.value_and_grad(scalar)(y)
        return grad, value

    grad, push, value = jax.linearize(gradient, x, has_aux=True)
    return value, _trace(push, grad)


def _linearize(f: Callable[[Array], Array], x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """f(x) and the map e -> J e."""
    x = floating("x", x)
    value, push = jax.linearize(f, x)
    if jnp.shape(value) != x.shape:
        raise ValueError(
            f"f must keep the shape of x, got {jnp.shape(value)} for x of shape {x.shape}: "
            "a divergence is of a map from a space to itself."
        )
    _same_dtype("f", value, x)
    return value, push


def _same_dtype(name: str, value: Array, x: Array) -> None:
    if value.dtype != x.dtype:
        raise TypeError(
            f"{name} returned dtype {value.dtype} for x of {x.dtype}: bring the two together, "
            f"for instance {name}(x).astype(x.dtype)."
        )


def _trace(push: Callable[[Array], Array], like: Array) -> Array:
    """The trace of a linear map of arrays of the shape of ``like``, by its whole matrix."""
    m = like.size
    basis = jnp.eye(m, dtype=like.dtype).reshape(m, *like.shape)
    return jnp.trace(jax.vmap(push)(basis).reshape(m, m))
