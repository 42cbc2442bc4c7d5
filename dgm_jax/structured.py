"""Traces and Laplacians of dense networks: in the hidden space, whatever the dimension of the example.

The derivative of a dense network of n hidden layers at one point, acting on rows from the right, is

    J = A_1 A_2 ... A_n K,    A_l = K_l D_l, or K_l D_l + I where the layer is residual,

with the matrices K_l of the layers, K of the last, and the slopes d_l of the activations on the diagonals D_l. The
matrices stay the same along a path, the slopes do not. So what matrices make of each other is computed once:
tr(A B) = tr(B A) brings K and K_1 together, and the m dimensions of the example are gone. The same holds for probes:
tr J is the trace of the map of any hidden space to itself that goes once round, A_2 ... A_n K A_1 for instance, and
e^T of that e, for a probe e in that space, has it as its mean.

The Laplacian of a scalar network is a trace too, of a Hessian W^T H W with the first layer's matrix W: that of H W W^T.

These are functions of arrays, for ``networks`` to build on and for networks of any other library.

Source: Golub & Van Loan (2013), "Matrix Computations", section 1.3 (the trace of a product is cyclic); Grathwohl et al.
(2019), "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models", section 3.1.1, for probes in
the narrowest hidden space of a network.
"""

import math
from collections.abc import Sequence
from typing import cast

import jax.numpy as jnp

from dgm_jax import _blocks
from dgm_jax.types import Array

__all__ = ["chain_forms", "chain_laplacian", "chain_space", "chain_tables", "chain_trace", "laplacian_tables"]


def chain_tables(kernels: Sequence[Array], residual: Sequence[bool]) -> tuple[Array, ...] | None:
    """What ``chain_trace`` needs of the matrices alone: to be computed once, before a solve.

    Args:
        kernels: K_1 ``[m, h_1]``, K_2 ``[h_1, h_2]``, ..., K ``[h_n, m]``.
        residual: of each hidden layer ``n``: whether its input is added to its output.

    Returns:
        Arrays, none larger than ``[h, h]``; ``None`` where the rows of the example are the shorter way.

    Raises:
        ValueError: the kernels are no chain from a space to itself, or ``residual`` has another length.
    """
    _check_chain(kernels, residual)
    first, last = kernels[0], kernels[-1]
    if len(residual) == 0:
        return (jnp.trace(last),)
    if len(residual) == 1:
        once = _diagonal(first, last)
        return (once, jnp.trace(last)) if residual[0] else (once,)
    if len(residual) > 2:
        by_hidden, by_example = _multiplications(kernels)
        return (last @ first,) if by_hidden <= by_example else None
    middle = kernels[1]
    tables = [middle * (last @ first).T]
    if residual[1]:
        tables.append(_diagonal(first, last))
    if residual[0]:
        tables.append(_diagonal(middle, last))
    if all(residual):
        tables.append(jnp.trace(last))
    return tuple(tables)


def chain_trace(
    tables: tuple[Array, ...] | None, kernels: Sequence[Array], residual: Sequence[bool], slopes: Sequence[Array]
) -> Array:
    """tr(A_1 A_2 ... A_n K), without a product of the size of the example.

    One hidden layer: d_1 . diag(K K_1). Two: d_1^T (K_2 * (K K_1)^T) d_2, with * entry by entry, and with residual
    layers the terms in which they are passed by. Three and more: the rows of D_1 A_2 ... A_n, in blocks, each with its
    column of K K_1; or those of A_1 ... A_n with the columns of K, where the example has so few dimensions that this
    takes fewer products.

    Args:
        tables: from ``chain_tables``.
        kernels: as there.
        residual: as there.
        slopes: d_l ``[h_l]``, the derivative of each hidden layer's activation at its input.

    Returns:
        The trace ``[]``.
    """
    if len(residual) < 3:
        return _of_few_layers(cast(tuple[Array, ...], tables), residual, slopes)
    if tables is not None:  # rows and columns of the first hidden space
        skipped = 1
        columns = tables[0] * slopes[0][None]
        if residual[0]:
            columns += kernels[-1]
    else:
        skipped = 0
        columns = kernels[-1]

    def diagonal(rows: Array, indices: Array) -> Array:
        for kernel, passes, slope in list(zip(kernels, residual, slopes, strict=False))[skipped:]:
            new = rows @ kernel * slope[None]
            rows = rows + new if passes else new
        return jnp.sum(rows * columns.T.at[indices].get(mode="fill", fill_value=0))

    return _blocks.over_units(diagonal, columns[0], _blocks.most(columns.shape[1]))


def chain_forms(
    tables: tuple[Array, ...] | None,
    kernels: Sequence[Array],
    residual: Sequence[bool],
    slopes: Sequence[Array],
    probes: Array,
) -> Array:
    """e^T M e for each probe e, M the map of the narrowest space to itself: tr M = tr(A_1 A_2 ... A_n K).

    The way round costs the same wherever it begins. It begins where the space is narrowest, for there so many probes
    leave least of the noise. With three and more layers it goes from the last hidden space to the first by K K_1 where
    ``chain_trace`` does, and never comes to the example; otherwise by K and K_1.

    Args:
        tables: from ``chain_tables``.
        kernels: as there.
        residual: as there.
        slopes: as in ``chain_trace``.
        probes: of identity covariance ``[num, dim]``, dim from ``chain_space``.

    Returns:
        One unbiased estimate of the trace for each probe ``[num]``.

    Raises:
        ValueError: ``probes`` of another shape.

    Source: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
    splines", section 2.
    """
    hops = _round(tables, kernels, residual)
    dim = hops[0][0].shape[0]
    if probes.ndim != 2 or probes.shape[1] != dim:
        raise ValueError(f"probes must be [num, {dim}], as wide as the narrowest space, got shape {probes.shape}.")
    rows = probes
    for kernel, layer, passes in hops:
        new = rows @ kernel
        if layer is not None:
            new = new * slopes[layer][None]
        rows = rows + new if passes else new
    return jnp.sum(rows * probes, axis=1)


def chain_space(
    tables: tuple[Array, ...] | None, kernels: Sequence[Array], residual: Sequence[bool]
) -> tuple[int, float]:
    """How wide a probe of ``chain_forms`` is, and how many of them cost as much as ``chain_trace``.

    Args:
        tables: from ``chain_tables``.
        kernels: as there.
        residual: as there.

    Returns:
        The dimensions of the narrowest space; the multiplications of the exact trace over those of one form.
    """
    hops = [kernel.shape for kernel, *_ in _round(tables, kernels, residual)]
    widths = [kernel.shape[1] for kernel in kernels[:-1]]
    exact = min(_multiplications(kernels)) if len(widths) > 2 else math.prod(widths) if widths else 0
    return hops[0][0], exact / sum(a * b for a, b in hops)


def laplacian_tables(kernels: Sequence[Array]) -> tuple[Array, ...] | None:
    """What ``chain_laplacian`` needs of the matrices alone: to be computed once.

    Args:
        kernels: K_1 ``[m, h_1]``, ..., K_n ``[h_(n-1), h_n]``, of the hidden layers.

    Returns:
        Arrays, none larger than ``[h, h]``; ``None`` where the example has no more dimensions than the first layer.
    """
    first = kernels[0]
    if first.shape[0] <= first.shape[1]:
        return None
    return (jnp.sum(jnp.square(first), axis=0), first.T @ first)


def chain_laplacian(
    tables: tuple[Array, ...] | None,
    kernels: Sequence[Array],
    residual: Sequence[bool],
    slopes: Sequence[Array],
    weights: Sequence[Array],
    scale: float = 1.0,
) -> Array:
    """The Laplacian of a scalar function of the last of n dense layers, linear or not by the way of its weights.

    a_l = h_(l-1) K_l + ..., h_l = act(a_l), or h_(l-1) + scale act(a_l) where the layer is residual, u = g . h_n:

        lap u = sum_l w_l . |da_l/dx|^2,    w_l = du/dh_l * act''(a_l), by scale where residual,

    the squares being summed over x, for each unit. They are the diagonals of K_l^T S K_l, S the Gram matrix of
    dh_(l-1)/dx, which begins with D_1 K_1^T K_1 D_1. Where the example has no more dimensions than the first layer has
    units, its directions are followed one by one instead.

    Args:
        tables: from ``laplacian_tables``.
        kernels: as there.
        residual: of each layer.
        slopes: act'(a_l) ``[h_l]``; that of the last layer is not used.
        weights: w_l ``[h_l]``.
        scale: of the new part of a residual layer.

    Returns:
        The Laplacian ``[]``.

    Source: Onken et al. (2021), "OT-Flow: Fast and Accurate Continuous Normalizing Flows via Optimal Transport",
    equations 14 to 16, with the Gram matrix of the first layer in place of its derivative by every direction.
    """
    layers = list(zip(kernels, residual, slopes, weights, strict=True))
    if tables is None:

        def along(units: Array, _: Array) -> Array:
            total, rows = jnp.zeros((), units.dtype), units
            for kernel, passes, slope, weight in layers:
                moved = rows @ kernel
                total += jnp.sum(jnp.sum(jnp.square(moved), axis=0) * weight)
                rows = rows + scale * moved * slope[None] if passes else moved * slope[None]
            return total

        m, width = kernels[0].shape
        return _blocks.over_units(along, jnp.zeros_like(kernels[0][:, 0]), min(8, _blocks.most(max(m, width))))

    norms, gram = tables
    total = weights[0] @ norms
    if len(layers) == 1:
        return total
    if len(layers) == 2:
        kernel, weight = kernels[1], weights[1]

        def columns(_: Array, indices: Array) -> Array:
            rows = kernel.T.at[indices].get(mode="fill", fill_value=0) * slopes[0][None]
            return jnp.sum((rows @ gram) * rows, axis=1) @ weight.at[indices].get(mode="fill", fill_value=0)

        return total + _blocks.over_units(columns, weight, _blocks.most(kernel.shape[0]))
    return total + _by_gram(slopes[0][:, None] * gram * slopes[0][None], layers[1:], scale)


def _of_few_layers(tables: tuple[Array, ...], residual: Sequence[bool], slopes: Sequence[Array]) -> Array:
    """The trace with no, one or two hidden layers."""
    first, *rest = tables
    if len(residual) == 0:
        return first
    if len(residual) == 1:
        return sum(rest, slopes[0] @ first)
    total = jnp.sum(slopes[0] @ first * slopes[1])
    for layer in (0, 1):
        if residual[1 - layer]:
            total += slopes[layer] @ rest.pop(0)
    return sum(rest, total)


def _by_gram(gram: Array, layers: Sequence[tuple[Array, bool, Array, Array]], scale: float) -> Array:
    """The terms of the Laplacian of some layers, from the Gram matrix of what enters them."""
    total = jnp.zeros((), gram.dtype)
    for index, (kernel, passes, slope, weight) in enumerate(layers):
        right = gram @ kernel
        total += jnp.sum(kernel * right, axis=0) @ weight
        if index < len(layers) - 1:
            both = slope[:, None] * (kernel.T @ right) * slope[None]
            if passes:
                cross = scale * right * slope[None]
                gram = gram + cross + cross.T + scale**2 * both
            else:
                gram = both
    return total


def _round(
    tables: tuple[Array, ...] | None, kernels: Sequence[Array], residual: Sequence[bool]
) -> list[tuple[Array, int | None, bool]]:
    """The ways from space to space, once round from the narrowest: matrix, whose slopes follow, and if it is residual.

    K K_1 passes the example by; where the first layer is residual it has as many units, and that would save nothing.
    """
    hops: list[tuple[Array, int | None, bool]]
    hops = [(kernel, layer, passes) for layer, (kernel, passes) in enumerate(zip(kernels, residual, strict=False))]
    if len(residual) > 2 and tables is not None and not residual[0]:
        hops = [*hops[1:], (tables[0], 0, False)]
    else:
        hops.append((kernels[-1], None, False))
    widths = [kernel.shape[0] for kernel, *_ in hops]
    first = widths.index(min(widths))
    return hops[first:] + hops[:first]


def _multiplications(kernels: Sequence[Array]) -> tuple[int, int]:
    """Of the trace by the rows of the first hidden space, and by those of the example: what units become is known."""
    m, width = kernels[0].shape
    products = [a * b for a, b in (kernel.shape for kernel in kernels[1:-1])]
    last = kernels[-1].shape[0]
    return width * (sum(products[1:]) + last), m * (sum(products) + last)


def _diagonal(first: Array, last: Array) -> Array:
    """The diagonal of last @ first, [h]."""
    return jnp.sum(first * last.T, axis=0)


def _check_chain(kernels: Sequence[Array], residual: Sequence[bool]) -> None:
    shapes = [jnp.shape(kernel) for kernel in kernels]
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"kernels must be matrices [in, out], got shapes {shapes}.")
    if any(a[1] != b[0] for a, b in zip(shapes, shapes[1:] + shapes[:1], strict=True)):
        raise ValueError(
            f"kernels must lead from a space back to itself, each beginning where the one before ends, got {shapes}."
        )
    if len(residual) != len(shapes) - 1:
        raise ValueError(f"residual must have one entry for each of the {len(shapes) - 1} hidden layers.")
    for passes, shape in zip(residual, shapes[:-1], strict=True):
        if passes and shape[0] != shape[1]:
            raise ValueError(f"a residual layer must keep its width, got a kernel of {shape}: pass False for it.")
