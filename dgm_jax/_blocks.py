"""Loops in blocks: sums over the vectors of a basis, and steps with noise. How many at a time is a matter of speed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dgm_jax.types import Array

__all__ = ["even", "most", "over_units", "scan_with_noise"]

_DRAWN = 2048
"""Random numbers drawn at a time for each example, at most, where a step needs fewer."""


def most(width: int) -> int:
    """How many vectors of ``width`` numbers go into a block: 4 to 16, and about 32,768 numbers in all.

    Together with a batch of some dozens of examples they then fit the cache of a processor. Beyond 16, nothing is
    gained.
    """
    return max(4, min(16, 32768 // max(width, 1)))


def even(num: int, most: int) -> int:
    """The size of blocks of at most ``most`` things, as few and as even as they can be, of ``num`` things."""
    return -(-num // -(-num // most)) if num else most


def over_units(term: Callable[[Array, Array], Any], like: Array, most: int) -> Any:
    """The sum of ``term(units [size, *event], indices [size])`` over the unit vectors, ``most`` at a time.

    They come from their indices: under ``jax.vmap`` over examples they have no batch axis, nor does what the first
    layer of a network makes of them. Those beyond the last, in the last block, are zero. The derivative keeps nothing
    of a block, and computes it again.

    Args:
        term: what to add up: any pytree of arrays.
        like: an array of the shape and dtype of a unit vector ``[*event]``.
        most: unit vectors in a block, at most.

    Returns:
        The sum, as ``term`` returns it.
    """
    m, size = like.size, even(like.size, most)

    def block(start: Array) -> Any:
        indices = start + jnp.arange(size)
        units = (jnp.arange(m)[None] == indices[:, None]).astype(like.dtype)
        return term(units.reshape(size, *like.shape), indices)

    first = jnp.zeros((), int)
    if m <= size:
        return block(first)
    again = jax.checkpoint(block, prevent_cse=False)

    def step(total: Any, start: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, again(start)), None

    zeros = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), jax.eval_shape(block, first))
    return jax.lax.scan(step, zeros, size * jnp.arange(-(-m // size)))[0]


def scan_with_noise(
    step: Callable[[Any, Any, Array], tuple[Any, Any]],
    start: Any,
    rows: Any,
    *,
    key: Array,
    numbers: Array,
    like: Array,
) -> tuple[Any, Any]:
    """``jax.lax.scan`` of ``step(carry, row, eps)``, eps ~ N(0, I) of step i from ``fold_in(key, numbers[i])``.

    The noise of several steps is drawn at once, of as many as divide their number and need some 2,000 random numbers.
    Beside a small network, draws step by step would take as long as half of it.

    Args:
        step: ``(carry, row, eps [*event]) -> (carry, output)``.
        start: the first carry.
        rows: what belongs to each step: any pytree with leaves ``[num, ...]``.
        key: a typed key.
        numbers: of the steps, of integers ``[num]``.
        like: an array of the shape and dtype of eps.

    Returns:
        The last carry, and the outputs ``[num, ...]``.
    """
    num = numbers.shape[0]
    most = max(1, min(num, _DRAWN // max(like.size, 1)))
    size = max(size for size in range(1, most + 1) if num % size == 0)

    def draw(n: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, n), like.shape, like.dtype)

    def block(carry: Any, several: tuple[Any, Array]) -> tuple[Any, Any]:
        rows, numbers = several
        return jax.lax.scan(lambda carry, row: step(carry, *row), carry, (rows, jax.vmap(draw)(numbers)))

    blocks = jax.tree.map(lambda leaf: leaf.reshape(num // size, size, *leaf.shape[1:]), (rows, numbers))
    last, outputs = jax.lax.scan(block, start, blocks)
    return last, jax.tree.map(lambda leaf: leaf.reshape(num, *leaf.shape[2:]), outputs)
