"""Can a classifier tell samples from data? Its accuracy on samples that it has not seen, with the p-value of chance.

The one distance between sets of samples that is in units that everybody knows: 1/2 is chance, 1 is a difference that
every sample shows. How small a difference is found depends on the classifier, so a low accuracy says less than a high
one; that it is no better than chance where there is none is certain for all.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dgm_jax._checks import at_least, typed_key
from dgm_jax._samples import checked, proportion, where_finite
from dgm_jax.types import Array

__all__ = ["ClassifierTest", "Fit", "classifier_test", "random_features"]

Fit: TypeAlias = Callable[[Array, Array, Array], Callable[[Array], Array]]

_HIGHEST = jax.lax.Precision.HIGHEST
_OCTAVES = 3.0  # of length scales, from the median distance down
_RIDGES = 9  # strengths of the penalty that are tried, from 1e-4 to 1


class ClassifierTest(NamedTuple):
    """What ``classifier_test`` finds.

    Attributes:
        accuracy: mean of the shares of x and of y that were told right, ``[]``, and its standard error ``[]``.
        p_value: the chance of as many right where the two distributions agree, ``[]``.
    """

    accuracy: tuple[Array, Array]
    p_value: Array


def random_features(key: Array, z: Array, labels: Array, *, num: int = 128) -> Callable[[Array], Array]:
    """Fit a classifier in closed form: ridge regression of the labels on random waves of many lengths.

    f(z) = a^T (phi(z) - mean of phi),    phi(z) = ((z - mean) / h, sqrt(2 / num) cos(w_j^T z + b_j)),
    w_j ~ N(0, 4^u_j / h^2 I),

    h the median distance, or the mean one where most examples are equal, u_j uniform from 0 to 3, so that both the
    whole and its details are seen; the penalty is the one, of nine, with the least squared error when each example is
    predicted from the others (in closed form, too).

    Args:
        key: a typed key.
        z: examples ``[n, d]``.
        labels: their classes, 0 or 1, ``[n]``.
        num: how many waves.

    Returns:
        ``[m, d] -> [m]``, positive where class 1 is likelier than it is among all.

    Raises:
        TypeError: an old-style key, or examples not of floats.
        ValueError: examples not ``[n, d]``, fewer than 2, NaN or infinite; labels not ``[n]``; num not positive.

    Source: Rahimi and Recht (2007), "Random features for large-scale kernel machines", algorithm 1; Golub et al.
    (1979), "Generalized cross-validation as a method for choosing a good ridge parameter", section 1.
    """
    key_scale, key_wave, key_phase, key_pairs = jax.random.split(typed_key(key), 4)
    (z,) = checked(least=2, reason="a classifier", z=z)
    num, (n, d) = at_least("num", num, 1), z.shape
    if jnp.shape(labels) != (n,):
        raise ValueError(f"labels has shape {jnp.shape(labels)}, but z has {n} examples: one label, 0 or 1, for each.")
    pairs = z - z[jax.random.permutation(key_pairs, n)]
    distances = jnp.sqrt(jnp.sum(pairs**2, axis=1))
    median, mean = jnp.median(distances), jnp.mean(distances)
    length = jnp.where(median > 0, median, jnp.where(mean > 0, mean, 1.0))
    center = jnp.mean(z, axis=0)
    scales = 2 ** jax.random.uniform(key_scale, (num, 1), z.dtype, 0.0, _OCTAVES)
    waves = scales * jax.random.normal(key_wave, (num, d), z.dtype)
    phases = jax.random.uniform(key_phase, (num,), z.dtype, 0.0, 2 * math.pi)

    def features(z: Array) -> Array:
        z = (z - center[None]) / length
        angles = jnp.matmul(z, waves.T, precision=_HIGHEST) + phases[None]
        return jnp.concatenate([z, math.sqrt(2 / num) * jnp.cos(angles)], axis=1)

    phi = features(z)
    phi_mean = jnp.mean(phi, axis=0)
    target = jnp.where(labels > 0, 1, -1).astype(z.dtype)
    phi, residual = phi - phi_mean[None], target - jnp.mean(target)
    # in the basis of the right singular vectors every penalty costs a division
    values, basis = jnp.linalg.eigh(jnp.matmul(phi.T, phi, precision=_HIGHEST))
    values = jnp.maximum(values, 0)
    turned = jnp.matmul(phi, basis, precision=_HIGHEST)
    against = jnp.matmul(turned.T, residual, precision=_HIGHEST)

    def left_out(ridge: Array) -> Array:
        leverage = jnp.matmul(turned**2, 1 / (values + ridge), precision=_HIGHEST) + 1 / n
        error = residual - jnp.matmul(turned, against / (values + ridge), precision=_HIGHEST)
        return jnp.mean((error / jnp.maximum(1 - leverage, jnp.finfo(z.dtype).eps)) ** 2)

    ridges = n * jnp.logspace(-4.0, 0.0, _RIDGES, dtype=z.dtype)
    ridge = ridges[jnp.argmin(jax.lax.map(left_out, ridges))]
    weights = jnp.matmul(basis, against / (values + ridge), precision=_HIGHEST)
    return lambda z: jnp.matmul(features(z) - phi_mean[None], weights, precision=_HIGHEST)


def classifier_test(
    key: Array, x: Array, y: Array, *, fit: Fit = random_features, train_share: float = 0.5
) -> ClassifierTest:
    """Test whether a classifier, trained to tell x from y, can do it with samples that it has not seen.

    accuracy = (share of x taken for x + share of y taken for y) / 2,

    1/2 without a difference, for any n and m. The p-value is that of a deal of the labels among the test samples: of
    those taken for y, as many or more are y with the probability of a hypergeometric, P(p <= a) <= a exactly, for any
    classifier (Fisher's exact test).

    Args:
        key: a typed key, for who trains and who tests, and for ``fit``.
        x: samples ``[n, d]``, independent of each other.
        y: samples ``[m, d]``, independent of each other and of x; m need not be n.
        fit: ``(key, z [num, d], labels [num]) -> predict``, labels 0 for x and 1 for y, in random order; and
            ``predict(z [num, d]) -> [num]`` positive for what it takes for y, for instance the difference of two
            logits. By default ``random_features``; a network trained inside is stronger on images.
        train_share: the share of the samples that trains.

    Returns:
        A ``ClassifierTest``. The standard error is that over test samples, for the classifier that came out; with half
        a right and half a wrong one added in each class it is never 0.

    Raises:
        TypeError: an old-style key, samples not of floats or of two dtypes.
        ValueError: samples not ``[n, d]`` with one d, fewer than 20, NaN or infinite; ``train_share`` not between 0 and
            1, or one that leaves fewer than 5 of them to train or to test; ``predict`` that does not return one number
            for each sample.

    Source: Lopez-Paz and Oquab (2017), "Revisiting classifier two-sample tests", section 3; the p-value is the exact
    one of their normal approximation.
    """
    key_x, key_y, key_order, key_fit = jax.random.split(typed_key(key), 4)
    x, y = checked(least=20, reason="a classifier with samples to test it", x=x, y=y)
    if not 0 < train_share < 1:
        raise ValueError(f"train_share must be between 0 and 1, got {train_share}: 0.5 is usual.")
    train = [int(len(z) * train_share) for z in (x, y)]
    if not all(5 <= num <= len(z) - 5 for num, z in zip(train, (x, y), strict=True)):
        raise ValueError(
            f"train_share is {train_share}, by which {train[0]} of {len(x)} and {train[1]} of {len(y)} samples train: "
            "at least 5 of each must train and 5 test."
        )
    deal = [z[jax.random.permutation(one, len(z))] for one, z in ((key_x, x), (key_y, y))]
    order = jax.random.permutation(key_order, sum(train))
    examples = jnp.concatenate([z[:num] for z, num in zip(deal, train, strict=True)])[order]
    predict = fit(key_fit, examples, (order >= train[0]).astype(int))
    tests = [z[num:] for z, num in zip(deal, train, strict=True)]
    scores = jnp.asarray(predict(jnp.concatenate(tests)))
    num_x, num_y = len(tests[0]), len(tests[1])
    if scores.shape != (num_x + num_y,):
        raise ValueError(
            f"predict, from fit, returned shape {scores.shape} for {num_x + num_y} samples: it must return one number "
            "for each, positive for what it takes for y."
        )
    taken = scores > 0
    right_x, right_y = (proportion(hits, x.dtype) for hits in (~taken[:num_x], taken[num_x:]))
    accuracy = (right_x[0] + right_y[0]) / 2
    stderr = jnp.sqrt(right_x[1] ** 2 + right_y[1] ** 2) / 2
    p_value = _hypergeometric_tail(jnp.sum(taken[num_x:]), jnp.sum(taken), num_y, num_x, x.dtype)
    bad = scores.astype(x.dtype)
    clean = lambda value: where_finite(value, x, y, jnp.where(jnp.isnan(bad), bad, 0))  # noqa: E731
    return ClassifierTest((clean(accuracy), clean(stderr)), clean(p_value))


def _hypergeometric_tail(hits: Array, taken: Array, good: int, bad: int, dtype: jnp.dtype) -> Array:
    """P(H >= hits) for H good ones among ``taken`` of good + bad, drawn without replacement.

    From the ratios P(j + 1) / P(j) = (good - j) (taken - j) / ((j + 1) (bad - taken + j + 1)), which unlike
    factorials keep their digits in float32.
    """
    j = jnp.arange(good + 1)
    possible = (j <= taken) & (taken - j <= bad)
    a, b, c, e = (part.astype(dtype) for part in (good - j, taken - j, j + 1, bad - taken + j + 1))
    inside = possible & jnp.roll(possible, -1) & (j < good)  # both j and j + 1
    ratio = jnp.where(inside, jnp.log(jnp.where(inside, a * b / (c * e), 1)), 0)
    log_p = jnp.where(possible, jnp.cumsum(ratio) - ratio, -jnp.inf)
    return jnp.minimum(jnp.sum(jnp.where(j >= hits, jax.nn.softmax(log_p), 0)), 1)
