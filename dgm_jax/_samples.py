"""What every comparison of sets of samples needs: their check, their distances a few rows at a time, a proportion."""

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax._checks import concrete, floating
from dgm_jax.types import Array

__all__ = ["ROWS", "checked", "proportion", "squared_distances", "where_finite"]

ROWS = 64  # rows of a distance matrix that are in memory at a time


def checked(*, least: int, reason: str, **samples: Array) -> tuple[Array, ...]:
    """The samples by their names, if they are finite floats ``[n, d]`` of one d and one dtype, at least ``least`` each.

    Args:
        least: how many are needed.
        reason: what needs them, for the message.
        **samples: the sets, by the names of the arguments that they came as.

    Returns:
        The sets as arrays, in order.

    Raises:
        TypeError: samples not of floats, or of two dtypes.
        ValueError: samples not ``[n, d]`` with one d, too few, NaN or infinite.
    """
    checked = {name: floating(name, z) for name, z in samples.items()}
    for name, z in checked.items():
        if z.ndim != 2:
            raise ValueError(
                f"{name} must be samples [n, d], got shape {z.shape}: flatten each, {name}.reshape(len({name}), -1)."
            )
        if z.shape[0] < least:
            raise ValueError(f"{name} has {z.shape[0]} samples, but {reason} needs at least {least}.")
        if concrete(z):
            bad = z.shape[0] - int(np.sum(np.all(np.isfinite(np.asarray(z)), axis=1)))
            if bad:
                raise ValueError(
                    f"{name} has NaN or infinity in {bad} of {z.shape[0]} samples: find out why; "
                    "leaving them out would hide a failure."
                )
    (first, x), *others = checked.items()
    if x.shape[1] == 0:
        raise ValueError(f"{first} has shape {x.shape}: d must be at least 1.")
    for name, y in others:
        if y.shape[1] != x.shape[1]:
            raise ValueError(f"{first} has shape {x.shape} and {name} {y.shape}: both must have the same d.")
        if y.dtype != x.dtype:
            raise TypeError(
                f"{first} has dtype {x.dtype} and {name} {y.dtype}: convert one, for instance {name}.astype(x.dtype)."
            )
    return tuple(checked.values())


def where_finite(value: Array, *samples: Array) -> Array:
    """``value``, or NaN where a sample is not finite: counts and comparisons would hide it."""
    finite = jnp.stack([jnp.all(jnp.isfinite(z)) for z in samples])
    return jnp.where(jnp.all(finite), value, jnp.nan)


def squared_distances(point: Array, points: Array) -> Array:
    """|point - points_j|^2 ``[m]``, one coordinate after another: no [m, d] copy, and no cancellation."""
    start = jnp.zeros(points.shape[0], points.dtype)
    add = lambda total, pair: (total + (pair[0] - pair[1]) ** 2, None)  # noqa: E731
    return jax.lax.scan(add, start, (point, points.T))[0]


def proportion(hits: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The share of ``hits [n]`` that is true, and its binomial standard error with half a hit and half a miss added.

    Without them the error would be zero where all hit, or none.

    Source: Brown, Cai and DasGupta (2001), "Interval estimation for a binomial proportion", section 3.1.2, for the
    half, from Jeffreys' prior.
    """
    num = float(hits.shape[0])
    count = jnp.sum(hits.astype(dtype))
    share = (count + 0.5) / (num + 1)
    return count / num, jnp.sqrt(share * (1 - share) / num)
