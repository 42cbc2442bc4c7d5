"""Bits per dimension of integers under a density of floats, with the dequantisation as an object of its own.

A density p of floats gives the integers k [*event] the probability of their bin B(k), a box of d sides of width w,

    P(k) = integral over B(k) of p(x) dx.

Any density q(x | k) on B(k) bounds it from below, by Jensen's inequality, and n draws do so more tightly:

    log P(k) >= E[log 1/n sum_i p(x_i) / q(x_i | k)],    x_1 .. x_n ~ q(x | k).

With n = 1 what is missing is KL(q(x | k) || p(x | x in B(k))), nothing where q is the posterior. With q uniform,
log q = -d log w, it is what nearly all papers report; with a q that is trained, beside p or for a p that is done, it is
variational dequantisation; either may be taken with more draws. A number of bits per dimension is a bound by one of
these, and bounds by different ones do not compare: so the report names its own.

Sources: Theis et al. (2016), "A note on the evaluation of generative models", section 3.1 (uniform); Ho et al. (2019),
"Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design", section 3.1;
Hoogeboom et al. (2020), "Learning Discrete Distributions by Dequantization" (many draws).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import discrete_flows, metrics
from dgm_jax._checks import at_least, concrete, floating, like, typed_key
from dgm_jax.types import Array

__all__ = ["BitsPerDim", "Dequantizer", "bits_per_dim", "bound", "coupling", "uniform", "variational"]


class Dequantizer(NamedTuple):
    """How integers are made into floats: a density q(x | k) on the bin of k, as pure functions.

    A hyper-parameter: keep it in a closure, not among the arguments of a jitted function. What is trained of it are the
    params.

    Attributes:
        name: what it is, for reports.
        bins: levels and range, from ``metrics.uniform_dequantization``.
        sample: ``(key, integers [*event], params) -> (x [*event], log q(x | integers) [])``, one draw of one example,
            differentiable by params.
    """

    name: str
    bins: metrics.Dequantization
    sample: Callable[[Array, Array, Any], tuple[Array, Array]]


class BitsPerDim(NamedTuple):
    """What integers cost in bits per dimension, at most, and by which dequantisation.

    Attributes:
        dequantization: the name of the dequantiser, with its bins and how many draws are in each bound.
        bits: the mean over examples and repeats ``[]``.
        stderr: its standard error over the examples ``[]``, draws included: how far another test set may lie.
        stderr_draws: its standard error over the draws for these examples alone ``[]``; ``None`` for one repeat.
    """

    dequantization: str
    bits: Array
    stderr: Array
    stderr_draws: Array | None


def uniform(bins: metrics.Dequantization, *, dtype: Any = float) -> Dequantizer:
    """Fill each bin evenly: log q(x | k) = -d log w. It has no params.

    Args:
        bins: levels and range, from ``metrics.uniform_dequantization``.
        dtype: of x; by default float32, or float64 under ``jax_enable_x64``.

    Returns:
        The dequantiser.

    Source: Theis et al. (2016), section 3.1.
    """

    def sample(key: Array, integers: Array, params: Any) -> tuple[Array, Array]:
        x = metrics.dequantize(key, integers, bins, dtype=dtype)
        return x, jnp.full((), -x.size * math.log(_width(bins)), x.dtype)

    return Dequantizer("uniform", bins, sample)


def variational(
    name: str, bins: metrics.Dequantization, place: Callable[[Array, Array, Any], tuple[Array, Array]]
) -> Dequantizer:
    """Fill each bin by any density of the place in it: x = low + w (k + u), log q(x | k) = log q(u | k) - d log w.

    Args:
        name: what it is, for reports.
        bins: levels and range, from ``metrics.uniform_dequantization``.
        place: ``(key, integers [*event], params) -> (u [*event] in [0, 1], log q(u | integers) [])``. To be trained, u
            is to be a differentiable function of params and of noise drawn from the key.

    Returns:
        The dequantiser. Its log q is NaN where u leaves [0, 1] or is NaN: x is then in another bin and the bound none.

    Raises:
        TypeError: when called, u or log q not of one dtype of floats.
        ValueError: when called, u not of the shape of the integers, or log q not a scalar.

    Source: Ho et al. (2019), section 3.1.
    """

    def sample(key: Array, integers: Array, params: Any) -> tuple[Array, Array]:
        u, log_q = place(key, integers, params)
        u = like("place", u, integers.shape, floating("the u of place", u).dtype)
        log_q = like("place", log_q, (), u.dtype)
        inside = jnp.all((u >= 0) & (u <= 1))
        x = bins.low + (bins.high - bins.low) * ((integers.astype(u.dtype) + u) / bins.levels)
        return x, jnp.where(inside, log_q - u.size * math.log(_width(bins)), jnp.nan)

    return Dequantizer(name, bins, sample)


def coupling(
    bins: metrics.Dequantization,
    masks: Sequence[Any],
    network: Callable[[Array, Array, Any], tuple[Array, Array]],
    *,
    dtype: Any = float,
) -> Dequantizer:
    """Fill each bin by a flow of coupling layers that are shown the integers.

    u = m + (1 - 2 m) sigmoid(a),    a = f_k(e),    e of independent logistic entries,

    f_k a ``discrete_flows.affine_coupling`` for each mask. Where the network says zero, u is uniform, as it is for a
    network whose last layer starts at zero: training begins at uniform dequantisation. (The paper has normal entries.)
    The margin m, a few rounding errors of x, keeps every x inside its own bin; a q that leaves out a part of the bin
    still gives a bound.

    Args:
        bins: levels and range, from ``metrics.uniform_dequantization``.
        masks: of each layer the entries that stay, booleans ``[*event]``; alternate them, so that all entries move.
        network: ``(a [*event] where the mask is True, else 0; y [*event]; its params) -> (s' [*event], t [*event])``,
            log-scale and shift as in ``affine_coupling``; y in (-1, 1) are the integers, as centres of their bins.
        dtype: of x, and of the params.

    Returns:
        The dequantiser, of the params of the layers in a sequence.

    Raises:
        TypeError: a dtype too coarse for the levels; as ``affine_coupling``.
        ValueError: no mask; as ``affine_coupling``.

    Source: Ho et al. (2019), section 3.1, with the layers of Dinh et al. (2017), "Density Estimation Using Real NVP".
    """
    dtype = jnp.zeros((), dtype).dtype
    reach = max(abs(bins.low), abs(bins.high), bins.high - bins.low) / (bins.high - bins.low)
    margin = 2 * bins.levels * reach * float(jnp.finfo(dtype).eps)
    if margin > 1 / 32:
        raise TypeError(f"dtype {dtype} cannot hold numbers inside {bins.levels} bins: pass dtype=jnp.float32.")
    if len(masks) == 0:
        raise ValueError("masks is empty: pass two or more, such as np.arange(d) % 2 == 0 and np.arange(d) % 2 == 1.")
    _flow(masks, network, jnp.zeros(np.shape(masks[0]), dtype))  # the masks are looked at here and now

    def place(key: Array, integers: Array, params: Any) -> tuple[Array, Array]:
        y = (2 * integers.astype(dtype) + 1) / bins.levels - 1
        e = jax.random.logistic(key, integers.shape, dtype)
        a, log_det = _flow(masks, network, y).forward(params, e)
        u = margin + (1 - 2 * margin) * jax.nn.sigmoid(a)
        return u, jnp.sum(_log_slope(e) - _log_slope(a)) - log_det - u.size * math.log1p(-2 * margin)

    return variational("coupling flow", bins, place)


def bound(
    key: Array,
    dequantizer: Dequantizer,
    log_prob: Callable[[Array], Array],
    integers: Array,
    params: Any = None,
    *,
    num_draws: int = 1,
) -> Array:
    """One draw of a lower bound on log P(k) of one example, differentiable by the params of p and q.

    log 1/n sum_i p(x_i) / q(x_i | k),    x_1 .. x_n ~ q(x | k).

    Its mean over keys is at most log P(k), and no smaller for more draws; the mean of its exponential is P(k).

    Args:
        key: a typed key.
        dequantizer: q, from ``uniform``, ``variational`` or ``coupling``.
        log_prob: log p of one example, ``x [*event] -> []``.
        integers: one example ``[*event]``, 0 .. levels - 1, of any integer dtype.
        params: those of q.
        num_draws: n.

    Returns:
        The bound in nats ``[]``. NaN where an integer is not among the levels and that was not known in time to raise.

    Raises:
        TypeError: an old-style key, ``integers`` not of integers, ``num_draws`` not an int.
        ValueError: an integer outside 0 .. levels - 1; ``log_prob`` does not return a scalar; ``num_draws`` below 1.

    Source: Hoogeboom et al. (2020); Burda et al. (2016), "Importance Weighted Autoencoders", theorem 1.
    """
    keys = jax.random.split(typed_key(key), at_least("num_draws", num_draws, 1))
    integers, levels = _integers(integers, dequantizer.bins), dequantizer.bins.levels

    def log_weight(key: Array) -> Array:
        x, log_q = dequantizer.sample(key, integers, params)
        return like("log_prob", log_prob(x), (), x.dtype) - log_q

    value = jax.nn.logsumexp(jax.vmap(log_weight)(keys)) - math.log(len(keys))
    return jnp.where(jnp.all((integers >= 0) & (integers < levels)), value, jnp.nan)


def bits_per_dim(
    key: Array,
    dequantizer: Dequantizer,
    log_prob: Callable[[Array], Array],
    integers: Array,
    params: Any = None,
    *,
    num_draws: int = 1,
    repeats: int = 1,
    batch_size: int = 256,
) -> BitsPerDim:
    """Bound the bits per dimension of a test set, under the dequantisation given and named in the report.

    -E[bound] / (d log 2) >= -mean of log2 P(k) / d.

    Args:
        key: a typed key.
        dequantizer: q, from ``uniform``, ``variational`` or ``coupling``.
        log_prob: log p of one example, ``x [*event] -> []``.
        integers: the examples ``[num, *event]``, 0 .. levels - 1, of any integer dtype; num at least 2.
        params: those of q.
        num_draws: of one bound.
        repeats: bounds for each example; from 2 on the error over draws is reported too.
        batch_size: examples in memory at a time.

    Returns:
        A ``BitsPerDim``.

    Raises:
        TypeError: as ``bound``.
        ValueError: as ``bound``; fewer than 2 examples; a bound is NaN or plus infinity.

    Source: Theis et al. (2016), section 3.1.
    """
    key, repeats = typed_key(key), at_least("repeats", repeats, 1)
    integers = _integers(integers, dequantizer.bins)
    if integers.ndim == 0 or integers.shape[0] < 2 or integers[0].size == 0:
        raise ValueError(f"integers must be [num, *event] with num at least 2, got shape {integers.shape}.")
    num, dims = integers.shape[0], integers[0].size

    keys = jax.random.split(key, (num, repeats))

    def one(index: Array) -> Array:
        return jax.vmap(lambda key: bound(key, dequantizer, log_prob, integers[index], params, num_draws=num_draws))(
            keys[index]
        )

    batches = -(-num // at_least("batch_size", batch_size, 1))
    indices = jnp.arange(batches * -(-num // batches)).reshape(batches, -1) % num  # of equal size, in one program
    values = jax.lax.map(jax.vmap(one), indices).reshape(-1, repeats)[:num]
    if concrete(values):
        bad = int(jnp.sum(jnp.isnan(values) | (values == jnp.inf)))
        if bad:
            raise ValueError(
                f"{bad} of {values.size} bounds are NaN or plus infinity: look at what log_prob and the dequantiser "
                "give there; leaving them out would bias the mean."
            )
    bits = -values / (dims * math.log(2.0))
    over_draws = None
    if repeats > 1:
        over_draws = jnp.sqrt(jnp.mean(jnp.var(bits, axis=1, ddof=1)) / (num * repeats))
    _, levels, low, high = dequantizer.bins
    draws = "1 draw" if num_draws == 1 else f"{num_draws} draws"
    return BitsPerDim(
        f"{dequantizer.name}, {levels} levels on [{low:g}, {high:g}], {draws}",
        jnp.mean(bits),
        jnp.std(jnp.mean(bits, axis=1), ddof=1) / math.sqrt(num),
        over_draws,
    )


def _width(bins: metrics.Dequantization) -> float:
    return (bins.high - bins.low) / bins.levels


def _log_slope(a: Array) -> Array:
    """log sigmoid'(a), the log-density of a logistic variable."""
    return -jax.nn.softplus(a) - jax.nn.softplus(-a)


def _flow(
    masks: Sequence[Any], network: Callable[[Array, Array, Any], tuple[Array, Array]], y: Array
) -> discrete_flows.Flow:
    """The coupling layers, shown y."""

    def shown(a: Array, params: Any) -> tuple[Array, Array]:
        return network(a, y, params)

    return discrete_flows.compose([discrete_flows.affine_coupling(mask, shown) for mask in masks])


def _integers(integers: Array, bins: metrics.Dequantization) -> Array:
    """``integers`` as int32, if they are integers and, where that is known, levels of these bins."""
    integers = jnp.asarray(integers)
    if not jnp.issubdtype(integers.dtype, jnp.integer):
        raise TypeError(
            f"integers must be of an integer dtype, got {integers.dtype}: pass the levels 0 .. {bins.levels - 1} "
            "themselves, not dequantised."
        )
    if concrete(integers) and integers.size:
        known = np.asarray(integers)  # under jit, jnp.min would give a tracer
        least, most = int(known.min()), int(known.max())
        if least < 0 or most >= bins.levels:
            raise ValueError(
                f"integers go from {least} to {most}, but {bins.levels} levels are 0 .. {bins.levels - 1}: "
                "pass the right levels to metrics.uniform_dequantization."
            )
    return integers.astype(jnp.int32)
