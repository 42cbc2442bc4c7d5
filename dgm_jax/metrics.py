"""How far samples are from samples, and how many bits a likelihood costs: each value with its standard error.

The distances compare x [n, d] with y [m, d]. ``energy_distance`` and ``mmd`` are unbiased, so zero in the
mean where the two distributions agree and negative about half of the time there; so is, but for terms of
order 1 / n^2, ``frechet_distance``, which knows means and covariances only. ``sliced_wasserstein`` is
a distance and so positive even there, by about 1 / sqrt(n). A standard error says how far off a distance
may be; near zero no distance is normally distributed, so ask ``permutation_test`` whether two sets of
samples come from one distribution. Memory grows as n + m, not as n m.

``coverage`` says what of the data is missing and which samples are none of it, ``two_sample`` what a classifier can
tell apart.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import probes
from dgm_jax._checks import concrete, floating, typed_key
from dgm_jax._samples import ROWS, checked, squared_distances, where_finite
from dgm_jax.types import Array

__all__ = [
    "Dequantization",
    "bits_per_dim",
    "dequantize",
    "energy_distance",
    "frechet_distance",
    "median_distance",
    "mmd",
    "permutation_test",
    "quantize",
    "sliced_wasserstein",
    "uniform_dequantization",
]

_HIGHEST = jax.lax.Precision.HIGHEST
_DIRECTIONS = 16  # directions of projection that are in memory at a time


class Dequantization(NamedTuple):
    """How integers 0 .. levels - 1 became floats: the range [low, high] cut into ``levels`` equal bins.

    A hyper-parameter: keep it in a closure, not among the arguments of a jitted function.

    Attributes:
        name: the kind of noise that fills a bin, for reports.
        levels: how many integers there are: 256 for 8-bit images.
        low: the float at the lower edge of bin 0.
        high: the float at the upper edge of the last bin.
    """

    name: str
    levels: int
    low: float
    high: float


def uniform_dequantization(levels: int, low: float = -1.0, high: float = 1.0) -> Dequantization:
    """Describe uniform dequantisation: x = low + (high - low) (k + u) / levels, u ~ U[0, 1).

    Args:
        levels: how many integers there are, at least 2: 256 for 8-bit images, 17 for scikit-learn's digits.
        low: the float at the lower edge of bin 0.
        high: the float at the upper edge of the last bin.

    Returns:
        The description, for ``dequantize``, ``quantize`` and ``bits_per_dim``.

    Raises:
        ValueError: fewer than 2 levels, or ``low`` not below ``high``.

    Source: Theis et al. (2016), "A note on the evaluation of generative models", section 3.1.
    """
    if int(levels) != levels or levels < 2:
        raise ValueError(f"levels must be an integer of at least 2, got {levels}: 256 for 8-bit images.")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low must be below high and both finite, got low={low} and high={high}.")
    return Dequantization("uniform", int(levels), float(low), float(high))


def dequantize(key: Array, integers: Array, dequantization: Dequantization, *, dtype: Any = float) -> Array:
    """Turn integers into floats, each drawn inside its own bin.

    Args:
        key: a typed key.
        integers: 0 .. levels - 1, any shape and any integer dtype.
        dequantization: from ``uniform_dequantization``.
        dtype: of the result; by default float32, or float64 under ``jax_enable_x64``.

    Returns:
        Floats of the same shape. ``quantize`` gives back the integers, every one, rounding notwithstanding.

    Raises:
        TypeError: an old-style key, ``integers`` not of integers, or a dtype too coarse for the levels.
        ValueError: an integer outside 0 .. levels - 1.

    Source: Theis et al. (2016), "A note on the evaluation of generative models", section 3.1.
    """
    key, integers, dtype = typed_key(key), jnp.asarray(integers), jnp.zeros((), dtype).dtype
    _name, levels, low, high = dequantization
    if not jnp.issubdtype(integers.dtype, jnp.integer):
        raise TypeError(
            f"integers must be of an integer dtype, got {integers.dtype}: pass the levels 0 .. {levels - 1} themselves."
        )
    if not jnp.issubdtype(dtype, jnp.floating) or levels * float(jnp.finfo(dtype).eps) > 1 / 64:
        raise TypeError(f"dtype {dtype} cannot hold numbers inside {levels} bins: pass dtype=jnp.float32.")
    if concrete(integers) and integers.size:
        known = np.asarray(integers)  # also inside jit, where jnp would trace
        least, most = int(known.min()), int(known.max())
        if least < 0 or most >= levels:
            raise ValueError(
                f"integers go from {least} to {most}, but {levels} levels are 0 .. {levels - 1}: "
                "pass the right levels to uniform_dequantization."
            )
    k = integers.astype(dtype)

    def place(u: Array) -> Array:
        return low + (high - low) * ((k + u) / levels)

    x = place(jax.random.uniform(key, integers.shape, dtype))
    # rounding carries about one draw in 100,000 over the edge of its bin: to the middle with it
    inside = quantize(x, dequantization) == integers.astype(jnp.int32)
    return jnp.where(inside, x, place(jnp.full_like(x, 0.5)))


def quantize(x: Array, dequantization: Dequantization) -> Array:
    """Find the bin of every float: floor(levels (x - low) / (high - low)), kept within 0 .. levels - 1.

    Args:
        x: floats of any shape: data, or samples of a model, which may lie outside [low, high].
        dequantization: from ``uniform_dequantization``.

    Returns:
        int32 of the same shape. NaN has no bin and gives -1.

    Raises:
        TypeError: ``x`` not of floats.
    """
    x = floating("x", x)
    _name, levels, low, high = dequantization
    scaled = jnp.floor((x - low) / (high - low) * levels)
    return jnp.where(jnp.isnan(x), -1, jnp.clip(scaled, 0, levels - 1)).astype(jnp.int32)


def bits_per_dim(log_prob: Array, num_dims: int, dequantization: Dequantization) -> tuple[Array, Array]:
    """Convert log-densities of dequantised data to bits per dimension.

    -(1/D) log2 p(x) - log2 w,    w = (high - low) / levels the width of a bin, D the number of dimensions.

    For uniform dequantisation its mean is an upper bound on what the discrete model
    P(k) = integral of p over the bin of k costs. State ``dequantization.name`` beside the number.

    Args:
        log_prob: log p(x) in nats ``[num]``, one for each dequantised test example.
        num_dims: D, the number of entries in one example.
        dequantization: the one that made x.

    Returns:
        The mean in bits per dimension ``[]`` and its standard error over the examples ``[]``.

    Raises:
        TypeError: ``log_prob`` not of floats.
        ValueError: ``log_prob`` not ``[num]`` with num at least 2, NaN or plus infinity in it, or ``num_dims`` below 1.

    Source: Theis et al. (2016), "A note on the evaluation of generative models", section 3.1.
    """
    log_prob = floating("log_prob", log_prob)
    if log_prob.ndim != 1 or log_prob.size < 2:
        raise ValueError(f"log_prob must be [num] with num at least 2, one per example, got shape {log_prob.shape}.")
    if num_dims < 1:
        raise ValueError(f"num_dims must be at least 1, got {num_dims}: the number of entries in one example.")
    if concrete(log_prob):
        bad = int(jnp.sum(jnp.isnan(log_prob) | (log_prob == jnp.inf)))
        if bad:
            raise ValueError(
                f"log_prob has {bad} of {log_prob.size} values NaN or plus infinity: look at why those solves failed; "
                "leaving them out would bias the mean."
            )
    width = (dequantization.high - dequantization.low) / dequantization.levels
    bits = -(log_prob / num_dims + math.log(width)) / math.log(2.0)
    return jnp.mean(bits), jnp.std(bits, ddof=1) / math.sqrt(bits.size)


def sliced_wasserstein(key: Array, x: Array, y: Array, *, num_projections: int = 256) -> tuple[Array, Array]:
    """Estimate the sliced 2-Wasserstein distance between two sets of samples.

    SW_2^2 = E_theta W_2^2(theta . x, theta . y), theta uniform on the unit sphere; in one dimension W_2 sorts.

    The empirical distance is a little too large: by O(1 / n) in SW_2^2, that is by O(1 / sqrt(n)) in SW_2
    where the two distributions agree.

    Args:
        key: a typed key, for the directions.
        x: samples ``[n, d]``.
        y: samples ``[m, d]``; m need not be n.
        num_projections: directions, at least 2.

    Returns:
        SW_2 ``[]`` in units of x, and its standard error ``[]`` over samples and directions, from the
        Kantorovich potentials by the delta method. It is asymptotically right where the distributions
        differ; where they agree it has the right order only.

    Raises:
        TypeError: an old-style key, or samples not of floats or of two dtypes.
        ValueError: samples not ``[n, d]`` with one d, fewer than 2, NaN or infinite; too few projections.

    Source: Bonneel et al. (2015), "Sliced and Radon Wasserstein barycenters of measures", section 3;
    del Barrio and Loubes (2019), "Central limit theorems for empirical transportation cost in general
    dimension", theorem 4.1.
    """
    key = typed_key(key)
    x, y = checked(least=2, reason="a standard error", x=x, y=y)
    if num_projections < 2:
        raise ValueError(f"num_projections must be at least 2, for a standard error, got {num_projections}.")
    n, m = x.shape[0], y.shape[0]
    i, j, mass = _coupling(n, m)
    w = jnp.asarray(mass, x.dtype)

    def project(direction: Array) -> tuple[Array, Array, Array]:
        a, b = (jnp.einsum("nd,d->n", z, direction, precision=_HIGHEST) for z in (x, y))
        order_a, order_b = jnp.argsort(a), jnp.argsort(b)
        a, b = a[order_a], b[order_b]
        cost = jnp.sum(w * (a[i] - b[j]) ** 2)
        to_b = jax.ops.segment_sum(n * w * b[j], i, n, indices_are_sorted=True)  # the mean of where a_i goes
        to_a = jax.ops.segment_sum(m * w * a[i], j, m, indices_are_sorted=True)
        phi = jnp.zeros_like(a).at[order_a].set(_potential(a, to_b))
        psi = jnp.zeros_like(b).at[order_b].set(_potential(b, to_a))
        return cost, phi, psi

    directions = probes.sphere(key, x[0], num_projections) / math.sqrt(x.shape[1])
    costs, phi, psi = jax.lax.map(project, directions, batch_size=min(_DIRECTIONS, num_projections))
    squared = jnp.mean(costs)
    variance = (
        jnp.var(jnp.mean(phi, axis=0), ddof=1) / n
        + jnp.var(jnp.mean(psi, axis=0), ddof=1) / m
        + jnp.var(costs, ddof=1) / num_projections
    )
    value = _sqrt(squared)
    return value, jnp.where(squared == 0, 0, jnp.sqrt(variance) / (2 * jnp.where(squared == 0, 1, value)))


def energy_distance(x: Array, y: Array) -> tuple[Array, Array]:
    """Estimate the squared energy distance between two sets of samples, without bias.

    2 E|X - Y| - E|X - X'| - E|Y - Y'|.

    Args:
        x: samples ``[n, d]``.
        y: samples ``[m, d]``; m need not be n.

    Returns:
        The estimate ``[]`` in units of x, negative by chance where the true value is near zero, and its
        standard error ``[]``, with the terms of second order that are all there is where the distributions
        agree; there it is on average a quarter too large.

    Raises:
        TypeError: samples not of floats or of two dtypes.
        ValueError: samples not ``[n, d]`` with one d, fewer than 4, NaN or infinite.

    Source: Szekely and Rizzo (2013), "Energy statistics: a class of statistics based on distances", equation 2.
    """
    x, y = checked(least=4, reason="a standard error", x=x, y=y)
    return _two_sample(lambda squared: -_sqrt(squared), x, y)


def mmd(x: Array, y: Array, bandwidth: float | Array) -> tuple[Array, Array]:
    """Estimate the squared maximum mean discrepancy between two sets of samples, without bias.

    E k(X, X') + E k(Y, Y') - 2 E k(X, Y),    k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)).

    Args:
        x: samples ``[n, d]``.
        y: samples ``[m, d]``; m need not be n.
        bandwidth: in units of x; ``median_distance(x, y)`` is a common choice.

    Returns:
        The estimate ``[]``, negative by chance where the true value is near zero, and its standard error
        ``[]``, with the terms of second order that are all there is where the distributions agree; there
        it is on average a quarter too large.

    Raises:
        TypeError: samples not of floats or of two dtypes.
        ValueError: samples not ``[n, d]`` with one d, fewer than 4, NaN or infinite; bandwidth not positive, for which
            under ``jit`` the result is NaN.

    Source: Gretton et al. (2012), "A kernel two-sample test", equation 3; the variance with its second-order terms
    as in Sutherland and Deka (2019), "Unbiased estimators for the variance of MMD estimators".
    """
    x, y = checked(least=4, reason="a standard error", x=x, y=y)
    if jnp.shape(bandwidth) != ():
        raise ValueError(f"bandwidth must be a scalar, got shape {jnp.shape(bandwidth)}.")
    if concrete(bandwidth) and not 0 < float(bandwidth) < math.inf:
        raise ValueError(f"bandwidth must be positive, got {float(bandwidth)}: try median_distance(x, y).")
    width = jnp.asarray(bandwidth, x.dtype)
    width = jnp.where(width > 0, width, jnp.nan)
    return _two_sample(lambda squared: jnp.exp(-squared / (2 * width**2)), x, y)


def median_distance(x: Array, y: Array) -> Array:
    """Find the median distance between two samples of the pooled set: a bandwidth for ``mmd``.

    med of |z_i - z_j| over the pairs i < j, z being x and y in one; of an even number of pairs the lower one.

    It counts in memory that grows as n + m and halves an interval of floats 31 times, which costs as much as 31
    distances. Derivatives do not go through it.

    Args:
        x: samples ``[n, d]``.
        y: samples ``[m, d]``; m need not be n.

    Returns:
        The distance ``[]`` in units of x, to seven digits; 0 where more than half of the pairs are of equals.

    Raises:
        TypeError: samples not of floats or of two dtypes.
        ValueError: samples not ``[n, d]`` with one d, fewer than 2, NaN or infinite.

    Source: Gretton et al. (2012), "A kernel two-sample test", section 8.
    """
    x, y = checked(least=2, reason="a median", x=x, y=y)
    z = jax.lax.stop_gradient(jnp.concatenate([x, y]))
    total = z.shape[0]
    scale = jnp.max(squared_distances(z[0], z))  # so that no square is lost in the range of float32
    unit = jnp.where(scale > 0, scale, 1)

    def count(threshold: Array) -> Array:
        """How many pairs i < j are no farther apart."""

        def row(point: Array, i: Array) -> Array:
            near = (squared_distances(point, z) / unit).astype(jnp.float32) <= threshold
            return jnp.sum(near & (jnp.arange(total) > i))  # none for the last, however often it comes

        rows = jax.lax.map(lambda i: jax.vmap(row)(z[i], i), _chunks(total))
        return jnp.sum(rows.astype(x.dtype))

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # floats of one sign are in the order of their bits
        middle = low + (high - low) // 2
        enough = 2 * count(jax.lax.bitcast_convert_type(middle, jnp.float32)) >= total * (total - 1) / 2
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    ends = jnp.int32(0), jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    found = jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, ends)[1], jnp.float32)
    return where_finite(_sqrt(found.astype(x.dtype) * scale), x, y)


def frechet_distance(x: Array, y: Array, *, unbiased: bool = True) -> tuple[Array, Array]:
    """Estimate the squared Frechet distance between the Gaussians of the same means and covariances.

    |mu - nu|^2 + tr C + tr D - 2 tr (C^(1/2) D C^(1/2))^(1/2):

    of features of images, by a classifier that the caller has, what is known as FID. With samples for mu, nu, C and D
    (those of n - 1 degrees of freedom) it is too large, by about (1/n + 1/m) (d + d (d + 1) / 4) where both are
    N(0, I): it says more about n than about the model until n is far beyond d^2. To second order the bias is

        1/n (tr C + 1/2 sum_ab s_a s_b / (s_a + s_b) Var(u_a u_b)),    and the same in 1/m,

    s_a the eigenvalues of (C^(1/2) D C^(1/2))^(1/2) and u whitened x in their basis, whatever the distribution of x.
    Subtracted, it leaves terms of order 1/n^2: where the two agree and n is thirty times d, about 5 per cent of it with
    normal features and 12 with exponential ones, less than a quarter of the standard error in four dimensions.

    The last trace is computed as the sum of the singular values of A^T B, C = A A^T and D = B B^T: no square root is
    taken of what rounding made of zero, and features that are constant or depend on each other do no harm. Its
    derivative is finite too, one of the subgradients where there is no derivative, as for x = y; that of the
    correction is left out.

    Args:
        x: features ``[n, d]``.
        y: features ``[m, d]``; m need not be n.
        unbiased: whether to subtract the bias; published FIDs do not, and are of one n, often 50,000.

    Returns:
        The estimate ``[]`` in squared units of x, negative by chance where the true value is near zero, and its
        standard error ``[]`` by the delta method. Where the two distributions agree it is on average the root of two
        too large; ask ``permutation_test`` there.

    Raises:
        TypeError: features not of floats or of two dtypes.
        ValueError: features not ``[n, d]`` with one d, not more of them than d + 1, NaN or infinite.

    Source: Dowson and Landau (1982), "The Frechet distance between multivariate normal distributions"; Heusel et al.
    (2017), "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", section 2. The bias:
    Chong and Forsyth (2020), "Effectively unbiased FID and Inception score and where to find them", who measure it by
    its 1/n; here it follows from the second derivative of the trace.
    """
    x, y = checked(least=3, reason="a covariance", x=x, y=y)
    dim = x.shape[1]
    for name, z in (("x", x), ("y", y)):
        if z.shape[0] < dim + 2:
            raise ValueError(
                f"{name} has {z.shape[0]} samples, but a covariance in {dim} dimensions needs at least {dim + 2}, and "
                f"for a small bias {10 * dim}."
            )
    x_mean, y_mean = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
    a, b = x - x_mean[None], y - y_mean[None]
    product = lambda *arrays: jnp.linalg.multi_dot(arrays, precision=_HIGHEST)  # noqa: E731
    # tr (C^(1/2) D C^(1/2))^(1/2) is the trace norm of a b^T, whose derivative needs its singular vectors only
    basis_a, basis_b = (jax.lax.stop_gradient(jnp.linalg.qr(z)[0]) for z in (a, b))
    root_a, root_b = product(basis_a.T, a), product(basis_b.T, b)
    normed = math.sqrt((len(x) - 1.0) * (len(y) - 1.0))
    inner = product(root_a, root_b.T) / normed  # [d, d]
    left, values, right = jax.lax.stop_gradient(jnp.linalg.svd(inner))
    overlap = jnp.sum(left * product(inner, right.T))
    shift = x_mean - y_mean
    spread = jnp.sum(a**2) / (len(x) - 1.0) + jnp.sum(b**2) / (len(y) - 1.0)
    value = jnp.sum(shift**2) + spread - 2 * overlap

    def correction(z: Array, towards: Array, shift: Array) -> tuple[Array, Array]:
        """The bias that samples z bring, and the variance."""
        z, towards, shift = jax.lax.stop_gradient((z, towards, shift))
        small = values <= dim * float(jnp.finfo(z.dtype).eps) * jnp.max(values)
        white = product(z, towards) * jnp.where(small, 0, 1 / jnp.where(small, 1, values))[None]
        num = float(z.shape[0])
        fourth = product((white**2).T, white**2) / num - jnp.diag((~small).astype(z.dtype))
        sums = values[:, None] + values[None]
        weights = values[:, None] * values[None] / jnp.where(sums > 0, sums, 1)
        bias = (jnp.sum(z**2) / (num - 1) + 0.5 * jnp.sum(weights * fourth)) / num
        influence = jnp.sum(z**2, axis=1) + 2 * product(z, shift) - product(white**2, values)
        return bias, jnp.var(influence, ddof=1) / num

    x_bias, x_variance = correction(a, product(root_b.T, right.T) / math.sqrt(len(y) - 1.0), shift)
    y_bias, y_variance = correction(b, product(root_a.T, left) / math.sqrt(len(x) - 1.0), -shift)
    return value - (x_bias + y_bias if unbiased else 0), jnp.sqrt(x_variance + y_variance)


def permutation_test(
    key: Array,
    distance: Callable[[Array, Array], tuple[Array, Array]],
    x: Array,
    y: Array,
    *,
    num_permutations: int = 199,
) -> Array:
    """Test whether two sets of samples come from one distribution, by dealing them out anew.

    p = (1 + #{b : D(x_b, y_b) >= D(x, y)}) / (1 + num_permutations).

    Where they do, P(p <= a) <= a for any distance and any number of samples. MMD with its p-value is::

        distance = partial(mmd, bandwidth=median_distance(x, y))
        value, stderr = distance(x, y)
        p_value = permutation_test(key, distance, x, y)

    whose bandwidth knows the samples, but not which of them are x: that leaves the level as it is.

    Args:
        key: a typed key, for the permutations.
        distance: ``(x, y) -> (value, stderr)``, such as ``energy_distance``; its stderr is not used. One
            that needs a key takes the same one every time: ``lambda x, y: sliced_wasserstein(key, x, y)``.
        x: samples ``[n, d]``, independent of each other.
        y: samples ``[m, d]``, independent of each other and of x.
        num_permutations: at least 19, for p-values down to 1 / (1 + num_permutations).

    Returns:
        The p-value ``[]``.

    Raises:
        TypeError: an old-style key, or samples not of floats or of two dtypes.
        ValueError: samples not ``[n, d]`` with one d, fewer than 2, NaN or infinite; too few permutations.

    Source: Gretton et al. (2012), "A kernel two-sample test", section 5; Phipson and Smyth (2010),
    "Permutation p-values should never be zero", equation 2.
    """
    key = typed_key(key)
    x, y = checked(least=2, reason="a standard error", x=x, y=y)
    if num_permutations < 19:
        raise ValueError(f"num_permutations must be at least 19, for p = 0.05, got {num_permutations}.")
    n, pooled = x.shape[0], jnp.concatenate([x, y])
    observed = distance(x, y)[0]
    # a permutation that only swaps equals within rounding is a tie, and a tie counts
    threshold = observed - 64 * float(jnp.finfo(x.dtype).eps) * jnp.abs(observed)

    def exceeds(one: Array) -> Array:
        z = jax.random.permutation(one, pooled)
        return distance(z[:n], z[n:])[0] >= threshold

    count = jnp.sum(jax.lax.map(exceeds, jax.random.split(key, num_permutations)).astype(x.dtype))
    p = (1 + count) / (1 + num_permutations)
    return jnp.where(jnp.isnan(observed), jnp.nan, p)


def _two_sample(kernel: Callable[[Array], Array], x: Array, y: Array) -> tuple[Array, Array]:
    """The unbiased estimate of E k(X, X') + E k(Y, Y') - 2 E k(X, Y), k of |x - y|^2, and its standard error.

    With g(z) = E k(z, X) - E k(z, Y), and k centred in both arguments below, the variance is

        4 Var g(X) / n + 4 Var g(Y) / m                                              (first order)
        + 2 E k_xx^2 / (n (n - 1)) + 2 E k_yy^2 / (m (m - 1)) + 4 E k_xy^2 / (n m)   (second order)

    The first order alone is zero where the distributions agree. The empirical variance of g is too large by
    noise in g: its contribution is the first order and twice the second.
    """
    z, num_x, total = jnp.concatenate([x, y]), x.shape[0], x.shape[0] + y.shape[0]
    # the estimate does not see a constant added to k, but rounding does
    shift = jnp.mean(kernel(squared_distances(x[0], y)))

    def row(point: Array, i: Array) -> tuple[Array, ...]:
        """Sums and sums of squares of k(z_i, .) over x and over y, without z_i itself."""
        k = jnp.where(jnp.arange(total) == i, 0, kernel(squared_distances(point, z)) - shift)
        return jnp.sum(k[:num_x]), jnp.sum(k[num_x:]), jnp.sum(k[:num_x] ** 2), jnp.sum(k[num_x:] ** 2)

    sums = jax.lax.map(lambda i: jax.vmap(row)(z[i], i), _chunks(total))
    to_x, to_y, to_x2, to_y2 = (part.reshape(-1)[:total] for part in sums)
    xx, xy, yx, yy = to_x[:num_x], to_y[:num_x], to_x[num_x:], to_y[num_x:]
    xx2, xy2, yy2 = to_x2[:num_x], to_y2[:num_x], to_y2[num_x:]

    n, m = float(num_x), float(total - num_x)  # floats: n^2 overflows int32
    value = jnp.sum(xx) / (n * (n - 1)) + jnp.sum(yy) / (m * (m - 1)) - 2 * jnp.sum(xy) / (n * m)

    cross = jnp.sum(xy2) - jnp.sum(xy**2) / m - jnp.sum(yx**2) / n + jnp.sum(xy) ** 2 / (n * m)
    second = (
        2 * _centred_square(xx, xx2) / (n * (n - 1))
        + 2 * _centred_square(yy, yy2) / (m * (m - 1))
        + 4 * cross / ((n - 1) * (m - 1)) / (n * m)
    )
    empirical = 4 * jnp.var(xx / (n - 1) - xy / m, ddof=1) / n + 4 * jnp.var(yy / (m - 1) - yx / n, ddof=1) / m
    variance = second + jnp.maximum(empirical - 2 * second, 0)
    return value, jnp.sqrt(jnp.maximum(variance, 0))


def _centred_square(sums: Array, squares: Array) -> Array:
    """E k^2 for k centred in both arguments, without bias, from a symmetric matrix with empty diagonal.

    Source: Szekely and Rizzo (2014), "Partial distance correlation with methods for dissimilarities", section 3.
    """
    n = float(sums.shape[0])
    total = jnp.sum(sums)
    rest = 2 * jnp.sum(sums**2) / (n - 2) - total**2 / ((n - 1) * (n - 2))
    return (jnp.sum(squares) - rest) / (n * (n - 3))


def _chunks(total: int) -> Array:
    """The numbers of the rows, a few at a time ``[chunks, size]``, the last one again where they are not even."""
    size = min(ROWS, total)
    return jnp.minimum(jnp.arange(-(-total // size) * size), total - 1).reshape(-1, size)


def _sqrt(squared: Array) -> Array:
    """A square root with derivative 0 at 0; NaN stays NaN."""
    zero = squared == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def _coupling(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The monotone coupling of n equal masses with m: which meets which, and the mass that they share."""
    edges = np.union1d(np.arange(n) * m, np.arange(m) * n)  # in units of 1 / (n m), exact
    mass = np.diff(edges, append=n * m) / (n * m)
    return edges // m, edges // n, mass


def _potential(a: Array, image: Array) -> Array:
    """The Kantorovich potential at sorted points: phi' = 2 (a - image), by trapezoids."""
    slope = a - image
    steps = (slope[1:] + slope[:-1]) * (a[1:] - a[:-1])
    return jnp.concatenate([jnp.zeros_like(a[:1]), jnp.cumsum(steps)])
