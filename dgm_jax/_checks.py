"""What every module asks of its arguments, asked at trace time and answered with a remedy."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax.types import Args, Array, VectorField

__all__ = [
    "agree",
    "at_least",
    "concrete",
    "evaluate",
    "floating",
    "group_labels",
    "like",
    "noise_levels",
    "one_time",
    "orthogonal_basis",
    "positive_integer",
    "probes_for",
    "typed_key",
]


def concrete(value: Any) -> bool:
    """Whether every leaf of ``value`` is known now, rather than a tracer inside a transformation."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def floating(name: str, value: Any) -> Array:
    """``value`` as an array of floats. Raises ``TypeError`` for integers, booleans and non-arrays."""
    try:
        array = jnp.asarray(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an array of floats, got {type(value).__name__}.") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be an array of floats, got dtype {array.dtype}: "
            f"convert it first, for instance {name}.astype(jnp.float32)."
        )
    return array


def like(name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """``value``, if it is an array of that shape and dtype: broadcast or cast, it would look plausible."""
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{name} returned a {type(value).__name__}, expected an array of shape {shape} and {dtype}.")
    if value.shape != shape:
        wanted = f"the shape of one example, {shape}" if shape else "one number, of shape ()"
        raise ValueError(
            f"{name} returned shape {value.shape}: it must return {wanted}, without a batch; use jax.vmap over a batch."
        )
    if value.dtype != dtype:
        raise TypeError(f"{name} returned dtype {value.dtype} for x of {dtype}: cast its parameters or its result.")
    return jnp.asarray(value)


def evaluate(name: str, field: VectorField, t: Array, x: Array, args: Args) -> Array:
    """field(t, x, args), held to the shape and dtype of x."""
    return like(name, field(t, x, args), x.shape, x.dtype)


def agree(name: str, x: Any, other_name: str, other: Any) -> tuple[Array, Array]:
    """Both as arrays of floats, if they agree in shape and dtype."""
    x, other = floating(name, x), floating(other_name, other)
    if other.shape != x.shape:
        raise ValueError(
            f"{other_name} has shape {other.shape} and {name} {x.shape}: they must agree, as noise does from "
            f"jax.random.normal(key, {name}.shape, {name}.dtype)."
        )
    if other.dtype != x.dtype:
        raise TypeError(f"{other_name} has dtype {other.dtype} and {name} {x.dtype}: one dtype for both.")
    return x, other


def at_least(name: str, value: Any, least: int) -> int:
    """``value``, if it is an integer of at least ``least``. Raises ``TypeError`` where it is none, or not known now."""
    try:
        value = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a Python int, known before tracing, got {type(value).__name__}.") from error
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return value


def positive_integer(name: str, value: Any, least: int = 1) -> int:
    """``value``, if it is an integer of at least ``least`` that is known now. Raises ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")
    return int(value)


def noise_levels(sigmas: Any, dtype: Any = None) -> Array:
    """``sigmas`` in ``dtype``, if they are levels of noise from large to small ``[L]``; ``ValueError`` otherwise.

    NaN where they are not and that could not be known in time to raise.
    """
    sigmas = floating("sigmas", sigmas)
    if sigmas.ndim != 1 or sigmas.shape[0] == 0:
        raise ValueError(f"sigmas must have shape [L] with L at least 1, got shape {sigmas.shape}.")
    if concrete(sigmas):
        values = np.asarray(sigmas)
        if not np.all((values > 0) & np.isfinite(values)):
            raise ValueError(f"sigmas must be positive and finite, got {values.tolist()}.")
        if not np.all(np.diff(values) < 0):
            raise ValueError(
                f"sigmas must fall from the largest to the smallest, got {values.tolist()}: "
                "ncsn.levels(sigma_max, sigma_min, num) makes such levels."
            )
    else:
        falling = jnp.all(jnp.diff(sigmas) < 0) & jnp.all((sigmas > 0) & jnp.isfinite(sigmas))
        sigmas = jnp.where(falling, sigmas, jnp.nan)
    return sigmas if dtype is None else sigmas.astype(dtype)


def one_time(t: Any, dtype: Any) -> Array:
    """``t`` in ``dtype``, if it is one time. Raises ``ValueError`` for an array of times."""
    t = jnp.asarray(t)
    if t.shape != ():
        raise ValueError(f"t must be one time of shape (), got shape {t.shape}: use jax.vmap over times.")
    return t.astype(dtype)


def typed_key(key: Any) -> Array:
    """``key``, if it is one typed key. Raises ``TypeError`` for old-style keys and ``ValueError`` for many."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        got = f"an array of {key.dtype}" if isinstance(key, jax.Array) else type(key).__name__
        raise TypeError(
            f"key must be a typed key, got {got}: make one with jax.random.key(seed), "
            "or turn an old-style key into one with jax.random.wrap_key_data(key)."
        )
    if key.shape != ():
        raise ValueError(
            f"key must be a single key, got an array of keys of shape {key.shape}: use jax.vmap over the keys."
        )
    return key


def probes_for(x: Array, probes: Array | None) -> Array:
    """``probes``, if they fit ``x``: shape ``[num, *x.shape]`` and the dtype of ``x``."""
    if probes is None:
        raise ValueError(
            "probes is None, but a stochastic divergence needs random vectors of shape "
            "[num, *event]: pass probes.rademacher(key, x, num), or use divergence.exact."
        )
    if probes.ndim != x.ndim + 1 or probes.shape[1:] != x.shape or probes.shape[0] == 0:
        raise ValueError(
            f"probes has shape {probes.shape}, but x of shape {x.shape} needs probes of shape "
            f"(num, {', '.join(map(str, x.shape))}): make them with probes.rademacher(key, x, num)."
        )
    if probes.dtype != x.dtype:
        raise TypeError(f"probes has dtype {probes.dtype} and x has {x.dtype}: draw the probes from x itself.")
    return probes


def group_labels(groups: Any, x: Any) -> np.ndarray:
    """The groups of all coordinates of an example in a row ``[m]``, on the host: each of 0 to G - 1 is used."""
    if not concrete(groups):
        raise TypeError("groups must be known before tracing: pass a numpy array from outside the transformation.")
    structure: Any = jax.tree.structure(groups)
    wanted: Any = jax.tree.structure(x)
    if structure != wanted:
        raise ValueError(f"groups must be of the structure of x, {wanted}, got {structure}.")
    rows = []
    for each, leaf in zip(jax.tree.leaves(groups), jax.tree.leaves(x), strict=True):
        labels = np.asarray(each)
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"groups must be integers, got dtype {labels.dtype}.")
        if labels.shape != np.shape(leaf):
            raise ValueError(f"groups has shape {labels.shape} and x {np.shape(leaf)}: one number for each coordinate.")
        rows.append(labels.reshape(-1))
    labels = np.concatenate(rows)
    used = np.unique(labels)
    if not np.array_equal(used, np.arange(len(used))):
        raise ValueError(
            f"groups must use every number from 0 to G - 1, got {used.tolist()}: "
            "pass for instance numpy.unique(groups, return_inverse=True)[1]."
        )
    return labels


def orthogonal_basis(basis: Any, m: int, dtype: Any) -> tuple[Array, Array]:
    """``basis`` ``[m, m]``, and whether it is orthogonal ``[]``: where that is known, one that is not is an error."""
    basis = floating("basis", basis)
    if basis.shape != (m, m):
        raise ValueError(f"basis has shape {basis.shape}, but probes of {m} entries need ({m}, {m}).")
    if basis.dtype != dtype:
        raise TypeError(f"basis has dtype {basis.dtype} and probes {dtype}: one dtype for both.")
    gram = jnp.matmul(basis.T, basis, precision=jax.lax.Precision.HIGHEST)
    error = jnp.max(jnp.abs(gram - jnp.eye(m, dtype=dtype)))
    right = error <= math.sqrt(float(jnp.finfo(dtype).eps))
    if concrete(right) and not right:
        raise ValueError(
            f"basis must be orthogonal, but its Gram matrix is off by {float(error):.3g}: "
            "pass for instance jnp.linalg.qr(matrix)[0]."
        )
    return basis, right
