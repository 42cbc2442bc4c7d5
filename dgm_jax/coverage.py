"""What of the data is missing among samples, and which samples are no data: each value with its standard error.

For any data, by balls about the samples that reach to their k-th nearest neighbour:

    precision   share of the fake samples in a ball about a real one      falls where samples are invented
    recall      share of the real samples in a ball about a fake one      falls where data are left out
    density     mean number of balls about real ones a fake is in, / k    falls where samples are invented
    coverage    share of the balls about real ones that have a fake       falls where data are left out

and for a Gaussian mixture that is known, as the data of a toy problem are, by its modes. Few of these values are 1 for
a perfect model: each docstring says what they are. Memory grows as n + m, not as n m.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgm_jax import densities
from dgm_jax._checks import at_least, typed_key
from dgm_jax._samples import ROWS, checked, proportion, squared_distances, where_finite
from dgm_jax.types import Array

__all__ = [
    "DensityCoverage",
    "ModeCoverage",
    "PrecisionRecall",
    "density_coverage",
    "mode_coverage",
    "precision_recall",
]

_PART = 16  # neighbours times this: the least size of a part, for it to be much like the whole


class PrecisionRecall(NamedTuple):
    """What ``precision_recall`` finds, each a value ``[]`` and its standard error ``[]``.

    Attributes:
        precision: share of the fake samples that are like real ones.
        recall: share of the real samples that are like fake ones.
    """

    precision: tuple[Array, Array]
    recall: tuple[Array, Array]


class DensityCoverage(NamedTuple):
    """What ``density_coverage`` finds, each a value ``[]`` and its standard error ``[]``.

    Attributes:
        density: how many balls about real samples a fake one is in, over k.
        coverage: share of the balls about real samples that have a fake one in them.
    """

    density: tuple[Array, Array]
    coverage: tuple[Array, Array]


class ModeCoverage(NamedTuple):
    """What ``mode_coverage`` finds, the first three a value ``[]`` and its standard error ``[]``.

    Attributes:
        num_modes: how many modes have samples of high quality.
        high_quality: share of the samples that are of high quality: near some mode.
        reverse_kl: KL(share of samples nearest to each mode || weights) in nats.
        counts: samples nearest to each mode, of any quality, ``[k]``; -1 for NaN.
    """

    num_modes: tuple[Array, Array]
    high_quality: tuple[Array, Array]
    reverse_kl: tuple[Array, Array]
    counts: Array


def precision_recall(key: Array, real: Array, fake: Array, *, k: int = 3) -> PrecisionRecall:
    """Estimate which share of the fake samples is like real ones, and which share of the real like fake ones.

    precision = 1/m #{j : |y_j - x_i| <= r_k(x_i) for some i},    recall the same with x and y exchanged,

    r_k(x_i) the distance from x_i to its k-th nearest neighbour among the other real samples.

    Where the two distributions agree, both are the chance that a point is among the k nearest of any other: 1 - 4^-k on
    a circle, and the less the more dimensions there are. A single outlier has a large ball, which takes in samples
    that are like nothing else: ``density_coverage`` is built to bear it.

    Args:
        key: a typed key, for the random parts of the samples from which the standard errors come.
        real: samples of the data ``[n, d]``.
        fake: samples of the model ``[m, d]``; m need not be n, but k nearest of few are farther than of many, so that
            values for different n or m do not compare.
        k: which neighbour.

    Returns:
        A ``PrecisionRecall``. The standard errors are over both sets, those that made the balls included (the binomial
        error, which takes the balls as given, is a third too small): from the variance between parts of the samples,
        as for a mean over parts. They are right to some 15 per cent, and 0 where all parts agree, such as at 1.

    Raises:
        TypeError: an old-style key, samples not of floats or of two dtypes.
        ValueError: samples not ``[n, d]`` with one d, fewer than 8 k, NaN or infinite; k not positive.

    Source: Kynkaanniemi et al. (2019), "Improved precision and recall metric for assessing generative models",
    equations 1 and 2; the standard errors: Politis and Romano (1994), "Large sample confidence regions based on
    subsamples under minimal assumptions".
    """

    def shares(real: Array, fake: Array) -> tuple[Array, Array]:
        precise, recalled = (_balls(x, y, k)[0] > 0 for x, y in ((real, fake), (fake, real)))
        return jnp.mean(precise.astype(real.dtype)), jnp.mean(recalled.astype(real.dtype))

    return PrecisionRecall(*_with_errors(key, shares, real, fake, k))


def density_coverage(key: Array, real: Array, fake: Array, *, k: int = 5) -> DensityCoverage:
    """Estimate how densely fake samples lie among real ones, and which share of the real ones they cover.

    density = 1/(k m) #{(i, j) : |y_j - x_i| <= r_k(x_i)},    coverage = 1/n #{i : |y_j - x_i| <= r_k(x_i) for some j},

    r_k(x_i) the distance from x_i to its k-th nearest neighbour among the other real samples.

    Where the two distributions agree, whatever they are, density has the mean 1 and coverage

        1 - (n - 1) ... (n - k) / ((n + m - 1) ... (n + m - k)),    1 - 2^-k for many of each.

    Density can be above 1: where fake samples crowd in the middle of the data.

    Args:
        key: a typed key, for the random parts of the samples from which the standard errors come.
        real: samples of the data ``[n, d]``.
        fake: samples of the model ``[m, d]``; m need not be n.
        k: which neighbour.

    Returns:
        A ``DensityCoverage``. The standard errors are over both sets, as those of ``precision_recall``.

    Raises:
        TypeError: an old-style key, samples not of floats or of two dtypes.
        ValueError: samples not ``[n, d]`` with one d, fewer than 8 k, NaN or infinite; k not positive.

    Source: Naeem et al. (2020), "Reliable fidelity and diversity metrics for generative models", section 3.
    """

    def shares(real: Array, fake: Array) -> tuple[Array, Array]:
        hits, covered = _balls(real, fake, k)
        return jnp.mean(hits.astype(real.dtype)) / k, jnp.mean(covered.astype(real.dtype))

    return DensityCoverage(*_with_errors(key, shares, real, fake, k))


def mode_coverage(samples: Array, density: densities.Mixture, *, radius: float = 3.0, least: int = 1) -> ModeCoverage:
    """Count the modes of a known mixture that samples have, how many are near a mode, and how unevenly they spread.

    With D_k(x)^2 = (x - mu_k)^T C_k^-1 (x - mu_k), a sample belongs to the mode of the least D, and is of high
    quality where that is at most ``radius``; with c_k samples in mode k and K modes that have any,

        reverse KL = sum_k c_k/n log(c_k / (n w_k)) - (K - 1) / (2 n):

    without its last term it would be too large by that, to order 1/n, and never zero.

    Of exact samples from modes far apart, n w_k q each of high quality are expected, q = chi2_d(radius^2) the
    distribution function of the chi-squared: 0.989 at 3 in two dimensions, but 0.47 in ten, where a larger radius is
    right. Modes that overlap take samples from one another, and the reverse KL of exact samples is then not zero.

    Args:
        samples: ``[n, d]``.
        density: the mixture ``[k]`` modes; one of weight 0 is no mode.
        radius: standard deviations.
        least: how many samples of high quality a mode needs to count.

    Returns:
        A ``ModeCoverage``. The standard errors: of ``high_quality`` binomial; of ``reverse_kl`` by the delta method
        with its second order, which is all there is where the weights are right; of ``num_modes``, over sets of n
        samples, by the jackknife, which is too large on average, the more the surer the modes are. It is 0 where no
        mode has just ``least`` samples, so a mode that n samples may miss by chance needs a look at that chance: that
        num_modes is below k by two errors happens to exact samples at most sum_k P(Binomial(n, w_k q) < least) of the
        time, 2 per cent for 25 equal modes with 7 samples of high quality expected in each.

    Raises:
        TypeError: samples not of floats, or not of the dtype of the density.
        ValueError: samples not ``[n, d]``, fewer than 2, NaN or infinite; a density that is not one, or of another d;
            radius or least not positive.

    Source: Srivastava et al. (2017), "VEEGAN: reducing mode collapse in GANs using implicit variational learning",
    section 4.1, for modes and quality; Lin et al. (2018), "PacGAN: the power of two samples in generative adversarial
    networks", section 4.1, for the reverse KL; Miller (1955), "Note on the bias of information estimates", for its
    bias; Heltshe and Forrester (1983), "Estimating species richness using the jackknife procedure", for the error of a
    count; Efron and Stein (1981), "The jackknife estimate of variance".
    """
    (x,) = checked(least=2, reason="a standard error", samples=samples)
    mean = densities.mean(density)  # which checks the density, too
    if x.shape[1:] != mean.shape:
        raise ValueError(f"samples has shape {x.shape}, but density is in {mean.shape[0]} dimensions: they must agree.")
    if x.dtype != mean.dtype:
        raise TypeError(
            f"samples has dtype {x.dtype} and density {mean.dtype}: cast one to the other, for instance "
            "jax.tree.map(lambda a: a.astype(samples.dtype), density)."
        )
    least = at_least("least", least, 1)
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive, got {radius}: 3 standard deviations are the custom.")
    weights, means, covariances = (jnp.asarray(leaf) for leaf in density)
    num, total = float(x.shape[0]), weights.shape[0]

    def squares(root: Array, mean: Array) -> Array:
        white = jax.scipy.linalg.solve_triangular(root, (x - mean[None]).T, lower=True)
        return jnp.sum(white**2, axis=0)

    far = jax.lax.map(lambda pair: squares(*pair), (jnp.linalg.cholesky(covariances), means))  # [k, n]
    far = jnp.where(weights[:, None] > 0, far, jnp.inf)
    nearest, good = jnp.argmin(far, axis=0), jnp.min(far, axis=0) <= radius**2
    counts = jnp.zeros(total, int).at[nearest].add(1)
    good_counts = jnp.zeros(total, int).at[nearest].add(good.astype(int))

    num_modes = jnp.sum(good_counts >= least).astype(x.dtype)
    lost = jnp.sum(good_counts == least).astype(x.dtype) * least  # samples without which there is a mode less
    modes_error = jnp.sqrt((num - 1) / num * lost * (1 - lost / num))

    share = counts.astype(x.dtype) / num
    log_ratio = jnp.where(counts > 0, jnp.log(jnp.where(counts > 0, share / jnp.where(weights > 0, weights, 1), 1)), 0)
    plug_in = jnp.sum(share * log_ratio)
    first = jnp.sum(share * (log_ratio - plug_in) ** 2) / num
    excess = (jnp.sum(counts > 0).astype(x.dtype) - 1) / (2 * num)
    second = excess / num
    # the first order is too large by noise in the shares: it contributes twice the second
    reverse_kl = plug_in - excess, jnp.sqrt(second + jnp.maximum(first - 2 * second, 0))

    clean = lambda pair: (where_finite(pair[0], x), where_finite(pair[1], x))  # noqa: E731
    return ModeCoverage(
        clean((num_modes, modes_error)),
        clean(proportion(good, x.dtype)),
        clean(reverse_kl),
        jnp.where(jnp.all(jnp.isfinite(x)), counts, -1),
    )


def _balls(real: Array, fake: Array, k: int) -> tuple[Array, Array]:
    """How many balls about real samples each fake one is in ``[m]``, and whether each has a fake one in it ``[n]``."""
    n = real.shape[0]
    size = min(ROWS, n)
    index = jnp.arange(-(-n // size) * size).reshape(-1, size)

    def row(i: Array) -> Array:
        point = real[jnp.minimum(i, n - 1)]
        others = jnp.where(jnp.arange(n) == i, jnp.inf, squared_distances(point, real))

        def farther(_: int, found: tuple[Array, Array]) -> tuple[Array, Array]:
            radius, count = found  # so many are no farther; a sort would take ten times as long
            following = jnp.min(jnp.where(others > radius, others, jnp.inf))
            radius = jnp.where(count < k, following, radius)
            return radius, jnp.sum(others <= radius)

        start = jnp.asarray(-1.0, real.dtype), jnp.asarray(0)
        return (squared_distances(point, fake) <= jax.lax.fori_loop(0, k, farther, start)[0]) & (i < n)

    def block(hits: Array, i: Array) -> tuple[Array, Array]:
        inside = jax.vmap(row)(i)
        return hits + jnp.sum(inside, axis=0), jnp.any(inside, axis=1)

    hits, covered = jax.lax.scan(block, jnp.zeros(fake.shape[0], int), index)
    return hits, covered.reshape(-1)[:n]


def _with_errors(
    key: Array, shares: Callable[[Array, Array], tuple[Array, Array]], real: Array, fake: Array, k: int
) -> list[tuple[Array, Array]]:
    """Both values with their standard errors from the variance between parts of the samples.

    P parts have each (n / P, m / P) of the samples, so that what is found in them is independent and has P times the
    variance of the whole, for n and m enter through their ratio alone, but near the edge of the data. Over many
    partitions it is averaged.
    """
    key, k = typed_key(key), at_least("k", k, 1)
    real, fake = checked(least=8 * k, reason=f"a standard error with k = {k}", real=real, fake=fake)
    num = real.shape[0], fake.shape[0]
    parts = max(2, min(8, min(num) // (_PART * k)))
    rounds = -(-32 // (parts - 1))

    def variances(key: Array) -> Array:
        keys = jax.random.split(key)
        dealt = [
            z[jax.random.permutation(one, n)[: n // parts * parts]].reshape(parts, n // parts, -1)
            for one, z, n in zip(keys, (real, fake), num, strict=True)
        ]
        return jnp.var(jnp.stack(jax.vmap(shares)(*dealt)), axis=1, ddof=1)

    errors = jnp.sqrt(jnp.mean(jax.lax.map(variances, jax.random.split(key, rounds)), axis=0) / parts)
    values = shares(real, fake)
    return [(where_finite(v, real, fake), where_finite(e, real, fake)) for v, e in zip(values, errors, strict=True)]
