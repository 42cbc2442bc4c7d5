"""Random vectors e with E[e] = 0 and E[e e^T] = I: all that a stochastic trace needs, E[e^T A e] = tr A.

Write S = (A + A^T) / 2 and m for the number of entries of x. One probe estimates tr A with variance

    rademacher   2 (|S|_F^2 - sum_i S_ii^2)              exact for diagonal S; least among independent entries
    gaussian     2 |S|_F^2
    sphere       2 m / (m + 2) (|S|_F^2 - (tr S)^2 / m)  exact for S a multiple of the identity
    orthogonal   the sphere's for one probe; (m - num) / (m - 1) times 1 / num of it for num, zero at num = m
    hadamard     rademacher's for one probe; (P - num) / (P - 1) times 1 / num of it for num below m, P the least
                 power of two that is not below m; zero for every num from m on
    grouped      2 sum_g sum_(i != j in group g) S_ij^2  for one draw of all groups

``rotated`` turns any of them into another basis, where S may be nearer to diagonal. An example ``x`` is an array, or a
pytree of arrays of one dtype: m counts the entries of all leaves, and each leaf gets the leading axis.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax._checks import at_least, floating, group_labels, orthogonal_basis, positive_integer, typed_key
from dgm_jax.types import Array

__all__ = [
    "HadamardMatrix",
    "gaussian",
    "grouped",
    "hadamard",
    "hadamard_matrix",
    "hadamard_rows",
    "learn_groups",
    "orthogonal",
    "rademacher",
    "rotated",
    "sphere",
    "spread",
]


def rademacher(key: Array, x: Any, num: int = 1) -> Any:
    """Draw vectors of independent signs, +1 or -1 with probability 1/2 each.

    Args:
        key: a typed key.
        x: one example ``[*event]``, or a pytree; only shapes and dtype matter.
        num: how many vectors, at least 1.

    Returns:
        ``[num, *event]`` in the dtype of ``x``.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats of one dtype.
        ValueError: ``num`` less than 1, or ``x`` without entries.

    Source: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines", proposition 1.
    """
    key, num = _key_and_num(key, num)
    m, dtype, unravel = _example(x)
    return unravel(jax.random.rademacher(key, (num, m), dtype))


def gaussian(key: Array, x: Any, num: int = 1) -> Any:
    """Draw standard normal vectors, N(0, I).

    Args:
        key: a typed key.
        x: one example ``[*event]``, or a pytree; only shapes and dtype matter.
        num: how many vectors, at least 1.

    Returns:
        ``[num, *event]`` in the dtype of ``x``.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats of one dtype.
        ValueError: ``num`` less than 1, or ``x`` without entries.

    Source: Girard (1989), "A fast Monte-Carlo cross-validation procedure for large least squares
    problems with noisy data"; variance in Avron and Toledo (2011), "Randomized algorithms for
    estimating the trace of an implicit symmetric positive semi-definite matrix", lemma 5.
    """
    key, num = _key_and_num(key, num)
    m, dtype, unravel = _example(x)
    return unravel(jax.random.normal(key, (num, m), dtype))


def sphere(key: Array, x: Any, num: int = 1) -> Any:
    """Draw vectors uniform on the sphere of radius sqrt(m), m the size of ``x``: e = sqrt(m) z / |z|, z ~ N(0, I).

    Args:
        key: a typed key.
        x: one example ``[*event]``, or a pytree; only shapes and dtype matter.
        num: how many vectors, at least 1.

    Returns:
        ``[num, *event]`` in the dtype of ``x``, each of squared norm m.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats of one dtype.
        ValueError: ``num`` less than 1, or ``x`` without entries.

    Source: Muller (1959), "A note on a method for generating points uniformly on n-dimensional spheres".
    """
    key, num = _key_and_num(key, num)
    m, dtype, unravel = _example(x)
    if m == 1:  # the sphere of one dimension is two points, and z / |z| would be 0 / 0 at z = 0
        return unravel(jax.random.rademacher(key, (num, m), dtype))
    z = jax.random.normal(key, (num, m), dtype)
    return unravel(z * (math.sqrt(m) / jnp.linalg.norm(z, axis=1, keepdims=True)))


def orthogonal(key: Array, x: Any, num: int = 1) -> Any:
    """Draw rows of a random orthogonal matrix, times sqrt(m), m the size of ``x``.

    e_i . e_j = m if i = j, else 0. Each one alone is a draw of ``sphere``; together they do not
    repeat each other, and all m of them give the trace exactly: sum_i e_i e_i^T / m = I. The matrix is
    uniform (Haar): Q from the QR decomposition of a normal matrix, with the diagonal of R made positive.

    Args:
        key: a typed key.
        x: one example ``[*event]``, or a pytree; only shapes and dtype matter.
        num: how many vectors, from 1 to m. Time grows as m num^2.

    Returns:
        ``[num, *event]`` in the dtype of ``x``.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats of one dtype.
        ValueError: ``num`` less than 1 or more than m, or ``x`` without entries.

    Source: Mezzadri (2007), "How to generate random matrices from the classical compact groups", section 5.
    """
    key, num = _key_and_num(key, num)
    m, dtype, unravel = _example(x)
    if num > m:
        raise ValueError(
            f"num is {num}, but x {_shape(x)} has room for {m} orthogonal vectors: pass num={m}, "
            "which gives the exact trace, or draw from probes.sphere."
        )
    q, r = jnp.linalg.qr(jax.random.normal(key, (m, num), dtype))
    signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)
    return unravel(math.sqrt(m) * (q * signs[None, :]).T)


def hadamard(key: Array, x: Any, num: int = 1) -> Any:
    """Draw rows of a randomised Hadamard matrix: signs that together leave less noise, and none from m of them on.

    With P the least power of two that is not below m, H_ij = (-1)^(number of ones in the bits of i & j) has
    H^T H = P I. A vector is a row of H, cut to the m coordinates, times one random sign a coordinate; rows come in
    random order without replacement. Each one alone is a draw of ``rademacher``. Of ``num`` below m the mean has

        Var = 2 / num (|S|_F^2 - sum_i S_ii^2) (P - num) / (P - 1),

    and P of them give the trace exactly, sum_i e_i e_i^T = P I.

    From num = m on the trace is exact for every num, sum_i e_i e_i^T = num I. For multiples of P these are the rows of
    H, in the same order again after P of them. For num = m the unit vectors times sqrt(m), in random order and with
    random signs. For all others the rows of the Hartley matrix of order num, cut, in random order and with random
    signs: T_ij = cos(2 pi i j / num) + sin(2 pi i j / num) has T^T T = num I for any order. Its entries are no signs,
    and a row alone has identity covariance over its random place.

    ``trace.hutchinson(matvec, probes, population=P)`` gives the standard error below m; from m on population=num does,
    which is 0.

    Args:
        key: a typed key.
        x: one example ``[*event]``, or a pytree; only shapes and dtype matter.
        num: how many vectors, at least 1. More than m are of no use. Time grows as num m, with no P x P matrix.

    Returns:
        ``[num, *event]`` in the dtype of ``x``; below m and for multiples of P of entries +1 and -1.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats of one dtype.
        ValueError: ``num`` less than 1, or ``x`` without entries.

    Source: Sylvester (1867), "Thoughts on inverse orthogonal matrices, simultaneous sign successions, and tessellated
    pavements in two or more colours"; Fika and Koukouvinos (2017), "Stochastic estimates for the trace of functions
    of matrices via Hadamard matrices"; Bracewell (1983), "Discrete Hartley transform".
    """
    key, num = _key_and_num(key, num)
    m, dtype, unravel = _example(x)
    order = 1 << (m - 1).bit_length()
    if num < m or num % order == 0:
        return unravel(hadamard_rows(hadamard_matrix(key, m, dtype), jnp.arange(num)))
    key_signs, key_rows = jax.random.split(key)
    signs, rows = jax.random.rademacher(key_signs, (m,), dtype), jax.random.permutation(key_rows, num)
    if num == m:
        return unravel(math.sqrt(m) * jax.nn.one_hot(rows, m, dtype=dtype) * signs[None, :])
    places = rows.astype(jnp.uint32)[:, None] * jnp.arange(m, dtype=jnp.uint32)[None, :] % num
    table = np.arange(num) * (2 * np.pi / num)
    return unravel(jnp.asarray(np.cos(table) + np.sin(table), dtype)[places] * signs[None, :])


class HadamardMatrix(NamedTuple):
    """A randomised Hadamard matrix, kept as its signs and the order of its rows.

    Attributes:
        signs: of the coordinates ``[m]``.
        order: the numbers of its rows in a random order ``[P]``.
    """

    signs: Array
    order: Array


def hadamard_matrix(key: Array, m: int, dtype: Any = jnp.float32) -> HadamardMatrix:
    """Draw the matrix whose rows ``hadamard`` gives, without a row of it.

    Args:
        key: a typed key.
        m: coordinates.
        dtype: of the rows.

    Returns:
        A ``HadamardMatrix`` of order P, the least power of two that is not below m.

    Raises:
        TypeError: an old-style key.
        ValueError: ``m`` less than 1.
    """
    m = positive_integer("m", m)
    key_signs, key_rows = jax.random.split(typed_key(key))
    order = jax.random.permutation(key_rows, 1 << (m - 1).bit_length())
    return HadamardMatrix(jax.random.rademacher(key_signs, (m,), dtype), order)


def hadamard_rows(matrix: HadamardMatrix, indices: Array) -> Array:
    """The rows in those places of the random order, round and round ``[num, m]``; ``indices [num]`` may be traced."""
    rows = matrix.order[indices % len(matrix.order)].astype(jnp.uint32)
    ones = jax.lax.population_count(rows[:, None] & jnp.arange(len(matrix.signs), dtype=jnp.uint32)[None, :])
    return jnp.where(ones % 2 == 0, matrix.signs[None, :], -matrix.signs[None, :])


def spread(key: Array, x: Any, num_nodes: int, num: int) -> Any:
    """Draw probes for the nodes of a quadrature rule along a path, no Hadamard row used again before all were.

    Node q has the rows q num to q num + num - 1 of a Hadamard matrix, counted round and round (``hadamard_rows``).
    Where the Jacobian changes little along the path, the errors of the nodes cancel, while those of probes that are the
    same at all nodes add up.

    Args:
        key: a typed key.
        x: one example ``[*event]``, or a pytree; only shapes and dtype matter.
        num_nodes: how many nodes, at least 1.
        num: how many vectors each, at least 1.

    Returns:
        ``[num_nodes, num, *event]`` in the dtype of ``x``: for ``flows.log_prob`` with a rule.

    Raises:
        TypeError: an old-style key, or ``x`` not of floats of one dtype.
        ValueError: a number less than 1, or ``x`` without entries.
    """
    key, num = _key_and_num(key, num)
    num_nodes = positive_integer("num_nodes", num_nodes)
    m, dtype, unravel = _example(x)
    rows = unravel(hadamard_rows(hadamard_matrix(key, m, dtype), jnp.arange(num_nodes * num)))
    return jax.tree.map(lambda leaf: leaf.reshape(num_nodes, num, *leaf.shape[1:]), rows)


def grouped(key: Array, x: Any, groups: Any, num: int = 1) -> Any:
    """Draw random signs on one group of coordinates at a time, times sqrt(G), G the number of groups.

    In each draw, e_g is zero outside group g, so that 1/G sum_g e_g^T A e_g has no noise from couplings between
    groups:

        Var = 2 sum_g sum_(i != j in group g) S_ij^2   for one draw, of G vectors,

    and identity covariance on average over the groups: 1/G sum_g E[e_g e_g^T] = I. For ``trace.grouped``.

    Args:
        key: a typed key.
        x: one example ``[*event]``, or a pytree; only shapes and dtype matter.
        groups: the group of each coordinate, integers from 0 to G - 1, each used, of the shapes of ``x``; known before
            tracing. ``learn_groups`` finds some.
        num: how many draws, at least 1.

    Returns:
        ``[num, G, *event]`` in the dtype of ``x``.

    Raises:
        TypeError: an old-style key, ``x`` not of floats of one dtype, or ``groups`` not of integers or not known.
        ValueError: ``num`` less than 1, ``x`` without entries, or ``groups`` of other shapes or with a number missing.

    Source: Tang and Saad (2012), "A probing method for computing the diagonal of a matrix inverse", section 3.
    """
    key, num = _key_and_num(key, num)
    m, dtype, unravel = _example(x)
    labels = group_labels(groups, x)
    number = int(labels.max()) + 1
    member = labels[None, :] == np.arange(number)[:, None]
    signs = jax.random.rademacher(key, (num, 1, m), dtype)
    return unravel(signs * jnp.asarray(math.sqrt(number) * member, dtype)[None])


def learn_groups(symmetric: Any, num_groups: int) -> np.ndarray:
    """Assign coordinates to groups that hardly couple, from samples of the symmetric part of the map.

    Makes the expected variance of ``grouped`` small, with w_ij the mean of S_ij^2 over the samples:

        2 sum_g sum_(i != j in group g) w_ij.

    Greedy: coordinates in order of falling total coupling, each where it adds least, then up to 10 sweeps that move
    single coordinates while that helps. A local optimum, by numpy on the host, in time m^2.

    Args:
        symmetric: symmetric parts S = (A + A^T) / 2, ``[num_samples, m, m]`` or ``[m, m]``, for instance of Jacobians
            at some examples.
        num_groups: G, from 1 to m: the products that one draw costs.

    Returns:
        The group of each coordinate, integers ``[m]``, every number from 0 to G - 1 used.

    Raises:
        ValueError: ``symmetric`` not square, not symmetric or not finite, or ``num_groups`` out of its range.
    """
    samples = np.asarray(symmetric)
    if samples.ndim not in (2, 3) or samples.shape[-1] != samples.shape[-2] or samples.size == 0:
        raise ValueError(f"symmetric must be [num_samples, m, m] or [m, m], got shape {samples.shape}.")
    samples = samples.reshape(-1, *samples.shape[-2:]).astype(np.float64)
    m = samples.shape[-1]
    # not-greater rather than less-or-equal, so that NaN is refused
    if not np.max(np.abs(samples - samples.swapaxes(1, 2))) <= 1e-3 * np.max(np.abs(samples)):
        raise ValueError("symmetric must be symmetric and finite: pass (A + A.T) / 2 for each sample.")
    num_groups = positive_integer("num_groups", num_groups)
    if num_groups > m:
        raise ValueError(f"num_groups is {num_groups}, but there are {m} coordinates: pass at most {m}.")
    weights = np.mean(samples**2, axis=0)
    np.fill_diagonal(weights, 0)
    labels = np.full(m, -1)
    added = np.zeros((m, num_groups))  # added[i, g]: what coordinate i couples to group g
    for place, i in enumerate(np.argsort(-weights.sum(axis=1), kind="stable")):
        # empty groups first, so that all are used; only after them the order of the argmin can matter
        labels[i] = place if place < num_groups else np.argmin(added[i])
        added[:, labels[i]] += weights[:, i]
    sizes = np.bincount(labels, minlength=num_groups)
    for _ in range(10):
        moved = False
        for i in range(m):
            old, new = labels[i], np.argmin(added[i])
            if sizes[old] > 1 and added[i, new] < added[i, old] * (1 - 1e-9):
                labels[i], moved = new, True
                sizes[old] -= 1
                sizes[new] += 1
                added[:, old] -= weights[:, i]
                added[:, new] += weights[:, i]
        if not moved:
            break
    return labels


def rotated(probes: Any, basis: Array) -> Any:
    """Turn probes into another basis, e -> Q e, Q orthogonal: identity covariance stays.

    e^T A e becomes e^T (Q^T A Q) e, so Rademacher's variance is 2 (|S|_F^2 - sum_i (q_i^T S q_i)^2), q_i the columns:
    none where they are the eigenvectors of S. Wins where maps of one kind share them nearly. With the eigenvectors of
    the mean Jacobian at other digits, the relative error on Jacobians of a field trained on digits is 0.036 with 2
    Rademacher probes and 0.024 with 4, half of 0.063 and 0.047 without; of a flow trained by maximum likelihood 0.048
    and 0.033, without 0.16 and 0.11. Learnt ``grouped`` probes have 0.057 and 0.033, and 0.13 and 0.080; from 16 and 32
    products on, they have less (benchmarks/trace_estimators.py).

    Args:
        probes: ``[num, *event]``, or a pytree of such leaves.
        basis: Q ``[m, m]``, its columns the orthonormal basis vectors, in the dtype of ``probes``.

    Returns:
        As ``probes``. NaN where Q is not orthogonal and that could not be known in time to raise.

    Raises:
        TypeError: ``probes`` or ``basis`` not of floats, or of different dtypes.
        ValueError: ``probes`` without entries, or ``basis`` not ``[m, m]`` or not orthogonal.
    """
    leaves = [floating("probes", leaf) for leaf in jax.tree.leaves(probes)]
    if not leaves or any(leaf.ndim == 0 or leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
        raise ValueError(f"probes must be [num, *event], with one num for all leaves, got {_shape(probes)}.")
    num = leaves[0].shape[0]
    m, dtype, unravel = _example(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), probes))
    basis, right = orthogonal_basis(basis, m, dtype)
    flat = jnp.concatenate([leaf.reshape(num, math.prod(leaf.shape[1:])) for leaf in leaves], axis=1)
    turned = jnp.matmul(flat, basis.T, precision=jax.lax.Precision.HIGHEST)
    return unravel(jnp.where(right, turned, jnp.nan))


def _key_and_num(key: Array, num: int) -> tuple[Array, int]:
    return typed_key(key), at_least("num", num, 1)


def _example(x: Any) -> tuple[int, Any, Callable[[Array], Any]]:
    """The number of entries of one example, its dtype, and the way from ``[*leading, m]`` to such examples."""
    leaves, treedef = jax.tree.flatten(x)
    leaves = [leaf if isinstance(leaf, jax.ShapeDtypeStruct) else floating("x", leaf) for leaf in leaves]
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    if sum(sizes) == 0:
        raise ValueError(f"x has {_shape(x)} and so no entries: pass one example [*event].")
    dtypes = {leaf.dtype for leaf in leaves}
    if len(dtypes) > 1:
        raise TypeError(f"x has leaves of {', '.join(sorted(map(str, dtypes)))}: cast them to one dtype.")
    ends = np.cumsum(sizes)[:-1].tolist()

    def unravel(rows: Array) -> Any:
        parts = jnp.split(rows, ends, axis=-1)
        pairs = zip(parts, leaves, strict=True)
        return jax.tree.unflatten(treedef, [part.reshape(*rows.shape[:-1], *leaf.shape) for part, leaf in pairs])

    return sum(sizes), leaves[0].dtype, unravel


def _shape(x: Any) -> str:
    """How messages name the shapes of an example: of shape (3,), or of shapes (3,), (2, 2)."""
    shapes = [str(np.shape(leaf)) for leaf in jax.tree.leaves(x)]
    return f"of shape{'s' if len(shapes) != 1 else ''} {', '.join(shapes) or 'none'}"
