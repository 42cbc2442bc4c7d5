"""Sums over the vectors of a basis, a few at a time: how many is a matter of the processor's cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dgm_jax.types import Array

__all__ = ["even", "most", "over_units"]


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
