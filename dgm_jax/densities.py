"""The oracles: Gaussian mixtures, for which every quantity of a diffusion model has a closed form.

Along a path x_t = alpha x_0 + sigma eps a mixture stays a mixture. With x_0 ~ sum_k w_k N(mu_k, C_k),

    x_t ~ sum_k w_k N(alpha mu_k, S_k),    S_k = alpha^2 C_k + sigma^2 I,

and given component k and x_t the pair (x_0, eps) is Gaussian, with means

    E[x_0] = mu_k + alpha C_k S_k^-1 r_k,    E[eps] = sigma S_k^-1 r_k,    r_k = x_t - alpha mu_k.

Score, denoiser, noise and velocity are averages of such means over the posterior of the component. Each comes as a
function ``(t, x, args)`` with the signature of a model, so that a sampler, a loss or a likelihood can be run
with no model error. They are finite on all of [0, 1] for every schedule.

``log_prob`` and ``diffuse`` go by Cholesky factors; the fields decompose C_k = Q_k diag(L_k) Q_k^T once, after
which an evaluation is a few products of a matrix and a vector. The two routes check each other.

Source: Bishop (2006), "Pattern Recognition and Machine Learning", section 2.3; Efron (2011), "Tweedie's Formula
and Selection Bias".
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import schedules
from dgm_jax._checks import concrete, floating, one_time, typed_key
from dgm_jax.types import Args, Array, ScalarField, Schedule, VectorField

__all__ = [
    "Mixture",
    "class_log_probs",
    "condition",
    "covariance",
    "denoiser",
    "diffuse",
    "entropy",
    "gaussian",
    "log_density",
    "log_prob",
    "log_prob_y",
    "mean",
    "noise",
    "sample",
    "sample_labelled",
    "score",
    "velocity",
]

_HIGHEST = jax.lax.Precision.HIGHEST


class Mixture(NamedTuple):
    """A mixture of k Gaussians in d dimensions, sum_k w_k N(mu_k, C_k).

    A bare record, so that it is a pytree of arrays; every function that takes one checks it.

    Attributes:
        weights: ``[k]``, at least 0, of sum 1. A component of weight 0 is absent.
        means: ``[k, d]``.
        covariances: ``[k, d, d]``, symmetric and positive definite.

    Source: Bishop (2006), equation 2.188.
    """

    weights: Array
    means: Array
    covariances: Array


class _Spectrum(NamedTuple):
    """A mixture with its covariances decomposed: C_k = vectors_k diag(values_k) vectors_k^T."""

    log_weights: Array  # [k]
    means: Array  # [k, d]
    values: Array  # [k, d]
    vectors: Array  # [k, d, d]


class _Components(NamedTuple):
    """What a field needs of every component at one (t, x)."""

    log_joint: Array  # [k], log w_k + log N(x; alpha mu_k, S_k)
    residual: Array  # [k, d], Q_k^T (x - alpha mu_k)
    values: Array  # [k, d], the eigenvalues of S_k


def _check(density: Mixture) -> Mixture:
    """``density`` as arrays of one float dtype, if its shapes fit and, where they are known, its values too."""
    weights = floating("density.weights", density.weights)
    means = floating("density.means", density.means)
    covariances = floating("density.covariances", density.covariances)
    if weights.ndim != 1 or weights.shape[0] == 0:
        raise ValueError(f"density.weights must have shape [k] with k at least 1, got shape {weights.shape}.")
    if means.ndim != 2 or means.shape[0] != weights.shape[0] or means.shape[1] == 0:
        raise ValueError(
            f"density.means must have shape [k, d] with k = {weights.shape[0]} as in density.weights, "
            f"got shape {means.shape}."
        )
    if covariances.shape != (*means.shape, means.shape[1]):
        raise ValueError(
            f"density.covariances must have shape {(*means.shape, means.shape[1])}, one full matrix for each row of "
            f"density.means, got shape {covariances.shape}."
        )
    if not weights.dtype == means.dtype == covariances.dtype:
        raise TypeError(
            f"density must be of one dtype, got weights {weights.dtype}, means {means.dtype}, covariances "
            f"{covariances.dtype}: cast it with jax.tree.map(lambda a: a.astype(dtype), density)."
        )
    checked = Mixture(weights, means, covariances)
    if concrete(checked):
        _check_values(*(np.asarray(leaf) for leaf in checked))
    return checked


def _check_values(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> None:
    eps = float(jnp.finfo(weights.dtype).eps)
    tolerance = min(math.sqrt(eps), 1e-5)
    w, mu, c = (leaf.astype(np.float64) for leaf in (weights, means, covariances))
    for name, leaf in (("weights", w), ("means", mu), ("covariances", c)):
        if not np.all(np.isfinite(leaf)):
            raise ValueError(f"density.{name} must be finite, got NaN or infinity in {leaf.tolist()}.")
    if np.any(w < 0.0):
        raise ValueError(f"density.weights must be at least 0, got {w.tolist()}.")
    if abs(w.sum() - 1.0) > tolerance:
        raise ValueError(
            f"density.weights must sum to one, got the sum {w.sum():.9g}: pass weights / weights.sum() if "
            "they are proportions."
        )
    for k, matrix in enumerate(c):
        if np.max(np.abs(matrix - matrix.T)) > tolerance * np.max(np.abs(matrix)):
            raise ValueError(
                f"density.covariances[{k}] must be symmetric, got {matrix.tolist()}: "
                "pass (covariance + covariance.T) / 2 if only rounding is to blame."
            )
        values = np.linalg.eigvalsh(matrix)
        if not values[0] > len(values) * eps * values[-1]:
            raise ValueError(
                f"density.covariances[{k}] must be positive definite, got eigenvalues from {values[0]:.6g} to "
                f"{values[-1]:.6g}: add a multiple of the identity."
            )


def _example(density: Mixture | _Spectrum, x: Array) -> Array:
    """``x``, if it is one example for ``density``: shape ``[d]`` and the same dtype."""
    x = floating("x", x)
    dim = density.means.shape[1]
    if x.shape != (dim,):
        advice = "it takes one example; use jax.vmap over a batch" if x.ndim > 1 else "it takes one example"
        raise ValueError(f"x must have shape ({dim},), got shape {x.shape}: {advice}.")
    if x.dtype != density.means.dtype:
        raise TypeError(
            f"x has dtype {x.dtype} and density {density.means.dtype}: cast one to the other, "
            "for instance jax.tree.map(lambda a: a.astype(x.dtype), density)."
        )
    return x


def _positive(name: str, num: SupportsIndex) -> int:
    if isinstance(num, bool) or not isinstance(num, int | np.integer) or num < 1:
        raise ValueError(f"{name} must be a positive integer, got {num!r}.")
    return int(num)


def _labels(density: Mixture, labels: Sequence[int] | Array) -> tuple[np.ndarray, int]:
    """``labels`` as known integers and the number of classes, if there is one for each component."""
    if not concrete(labels):
        raise TypeError("labels must be known when a function is traced: close over them instead of passing them in.")
    array = np.asarray(labels)
    num = density.weights.shape[0]
    if array.shape != (num,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"labels must be {num} integers, the class of each component, got shape {array.shape} of {array.dtype}."
        )
    num_classes = int(array.max()) + 1
    if set(array.tolist()) != set(range(num_classes)):
        raise ValueError(f"labels must use every class from 0 to the largest, got {array.tolist()}.")
    return array, num_classes


def gaussian(mean: Array, covariance: Array) -> Mixture:
    """One Gaussian, as a mixture of one component.

    N(mean, covariance)

    Args:
        mean: ``[d]``.
        covariance: ``[d, d]``, symmetric and positive definite.

    Returns:
        The mixture, ``k = 1``.

    Raises:
        TypeError: for arrays that are not floats of one dtype.
        ValueError: for shapes that do not fit, or a covariance that is not positive definite.

    Source: Bishop (2006), equation 2.43.
    """
    mean, covariance = floating("mean", mean), floating("covariance", covariance)
    if mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
        raise ValueError(
            f"mean must have shape [d] and covariance [d, d], got shapes {mean.shape} and {covariance.shape}."
        )
    return _check(Mixture(jnp.ones(1, mean.dtype), mean[None], covariance[None]))


def log_prob(density: Mixture, x: Array) -> Array:
    """The log-density of a point.

    log p(x) = log sum_k w_k N(x; mu_k, C_k)

    Args:
        density: the mixture.
        x: one point, ``[d]``.

    Returns:
        log p(x) in nats, ``[]``.

    Raises:
        TypeError: for an x that is not of the density's float dtype.
        ValueError: for an x that is not one example, or a density that is not one.

    Source: Bishop (2006), equations 2.43 and 2.188.
    """
    density = _check(density)
    x = _example(density, x)

    def component(mu: Array, c: Array) -> Array:
        root = jnp.linalg.cholesky(c)
        z = jax.scipy.linalg.solve_triangular(root, x - mu, lower=True)
        log_det = 2.0 * jnp.sum(jnp.log(jnp.diagonal(root)))
        return -0.5 * (jnp.sum(jnp.square(z)) + log_det + x.size * math.log(2.0 * math.pi))

    log_components = jax.vmap(component)(density.means, density.covariances)
    return jax.scipy.special.logsumexp(jnp.log(density.weights) + log_components)


def sample_labelled(key: Array, density: Mixture, num: int) -> tuple[Array, Array]:
    """Independent draws, each with the component that it came from.

    k ~ w,    x = mu_k + chol(C_k) eps

    Args:
        key: a typed key.
        density: the mixture.
        num: how many.

    Returns:
        ``(x [num, d], component [num])``, the component an integer below k.

    Raises:
        TypeError: for a key that is not typed.
        ValueError: for a ``num`` that is not a positive integer, or a density that is not one.

    Source: Bishop (2006), section 11.1.1.
    """
    key_component, key_noise = jax.random.split(typed_key(key))
    density = _check(density)
    num = _positive("num", num)
    component = jax.random.categorical(key_component, jnp.log(density.weights), shape=(num,))
    eps = jax.random.normal(key_noise, (num, density.means.shape[1]), density.means.dtype)
    roots = jnp.linalg.cholesky(density.covariances)
    x = density.means[component] + jnp.einsum("nij,nj->ni", roots[component], eps, precision=_HIGHEST)
    return x, component


def sample(key: Array, density: Mixture, num: int) -> Array:
    """Independent draws.

    x ~ sum_k w_k N(mu_k, C_k)

    Args:
        key: a typed key.
        density: the mixture.
        num: how many.

    Returns:
        x, ``[num, d]``.

    Raises:
        TypeError: for a key that is not typed.
        ValueError: for a ``num`` that is not a positive integer, or a density that is not one.

    Source: Bishop (2006), section 11.1.1.
    """
    return sample_labelled(key, density, num)[0]


def mean(density: Mixture) -> Array:
    """The mean.

    m = sum_k w_k mu_k

    Args:
        density: the mixture.

    Returns:
        m, ``[d]``.

    Raises:
        ValueError: for a density that is not one.

    Source: Bishop (2006), exercise 9.12.
    """
    density = _check(density)
    return jnp.einsum("k,ki->i", density.weights, density.means, precision=_HIGHEST)


def covariance(density: Mixture) -> Array:
    """The covariance.

    sum_k w_k (C_k + (mu_k - m)(mu_k - m)^T),    m the mean

    Args:
        density: the mixture.

    Returns:
        The matrix, ``[d, d]``.

    Raises:
        ValueError: for a density that is not one.

    Source: Bishop (2006), exercise 9.12.
    """
    density = _check(density)
    offset = density.means - mean(density)[None]
    within = jnp.einsum("k,kij->ij", density.weights, density.covariances, precision=_HIGHEST)
    return within + jnp.einsum("k,ki,kj->ij", density.weights, offset, offset, precision=_HIGHEST)


def diffuse(density: Mixture, schedule: Schedule, t: Array) -> Mixture:
    """The density of x_t.

    sum_k w_k N(alpha mu_k, alpha^2 C_k + sigma^2 I)

    Args:
        density: the density of x_0.
        schedule: the path.
        t: time in [0, 1], ``[]``.

    Returns:
        The mixture that x_t has, in the dtype of ``density``.

    Raises:
        ValueError: for a t that is not one time, or a density that is not one.

    Source: Song et al. (2021), equation 29, for Gaussian data.
    """
    density = _check(density)
    t = one_time(t, density.means.dtype)
    scale = schedules.alpha(schedule, t)
    eye = jnp.eye(density.means.shape[1], dtype=density.means.dtype)
    return Mixture(
        density.weights,
        scale * density.means,
        jnp.square(scale) * density.covariances + schedule.variance(t) * eye[None],
    )


def entropy(key: Array, density: Mixture, num: int) -> tuple[Array, Array]:
    """The differential entropy, by Monte Carlo over the exact log-density.

    H = -E[log p(x)]

    Args:
        key: a typed key.
        density: the mixture.
        num: how many draws, at least 2.

    Returns:
        ``(H [], standard error [])`` in nats.

    Raises:
        TypeError: for a key that is not typed.
        ValueError: for a ``num`` below 2, or a density that is not one.

    Source: Cover & Thomas (2006), "Elements of Information Theory", equation 8.1.
    """
    if _positive("num", num) < 2:
        raise ValueError(f"num must be at least 2, for a standard error, got {num}.")
    density = _check(density)
    values = -jax.vmap(lambda x: log_prob(density, x))(sample(key, density, num))
    return jnp.mean(values), jnp.std(values, ddof=1) / math.sqrt(num)


def condition(density: Mixture, labels: Sequence[int] | Array, y: int | Array) -> Mixture:
    """The density of the points of one class.

    p(x | y) = sum over k with labels_k = y of w_k N(mu_k, C_k) / sum over the same k of w_k

    Args:
        density: the mixture.
        labels: the class of each component, ``[k]`` integers that use every class from 0 on.
        y: the class.

    Returns:
        The mixture with the same components, those of other classes with weight 0.

    Raises:
        ValueError: for labels that do not fit, or a y that is no class of positive weight.

    Source: Bayes' rule.
    """
    density = _check(density)
    classes, num_classes = _labels(density, labels)
    weights = jnp.where(jnp.asarray(classes) == _class(y, num_classes), density.weights, 0.0)
    total = jnp.sum(weights)
    if concrete(total) and not total > 0.0:
        raise ValueError(f"y must be a class of positive weight, got y={y} of weight 0.")
    return density._replace(weights=weights / total)


def _class(y: int | Array, num_classes: int) -> int | Array:
    if not concrete(y):
        return y
    array = np.asarray(y)
    if array.shape != () or not np.issubdtype(array.dtype, np.integer) or not 0 <= array < num_classes:
        raise ValueError(f"y must be one integer class from 0 to {num_classes - 1}, got {y!r}.")
    return int(array)


def _spectrum(density: Mixture) -> _Spectrum:
    density = _check(density)
    dtype = density.means.dtype
    if concrete(density.covariances):  # outside any trace, so that no program carries the decomposition
        known = np.linalg.eigh(np.asarray(density.covariances, np.float64))
        values, vectors = jnp.asarray(known.eigenvalues, dtype), jnp.asarray(known.eigenvectors, dtype)
    else:
        values, vectors = jnp.linalg.eigh(density.covariances)
    return _Spectrum(jnp.log(density.weights), density.means, values, vectors)


def _components(spectrum: _Spectrum, scale: Array, variance: Array, x: Array) -> _Components:
    offset = x[None] - scale * spectrum.means
    residual = jnp.einsum("kij,ki->kj", spectrum.vectors, offset, precision=_HIGHEST)
    values = jnp.square(scale) * spectrum.values + variance
    log_normal = -0.5 * jnp.sum(jnp.square(residual) / values + jnp.log(2.0 * math.pi * values), axis=1)
    return _Components(spectrum.log_weights + log_normal, residual, values)


def _average(spectrum: _Spectrum, parts: _Components, shift: Array | None, gains: Array) -> Array:
    """sum_k p(k | x) (shift_k + Q_k diag(gains_k) Q_k^T (x - alpha mu_k)) -> [d]."""
    posterior = jax.nn.softmax(parts.log_joint)[:, None]
    result = jnp.einsum("kij,kj->i", spectrum.vectors, posterior * gains * parts.residual, precision=_HIGHEST)
    return result if shift is None else result + jnp.sum(posterior * shift, axis=0)


def log_density(density: Mixture, schedule: Schedule) -> ScalarField:
    """The log-density of x_t.

    log p_t(x) = log sum_k w_k N(x; alpha mu_k, S_k)

    Args:
        density: the density of x_0.
        schedule: the path.

    Returns:
        ``(t [], x [d], args) -> []`` in nats; args is not used.

    Raises:
        ValueError: for a density that is not one; when called, for an x that is not one example.
        TypeError: when called, for an x that is not of the density's float dtype.

    Source: Song et al. (2021), equation 29, for Gaussian data.
    """
    spectrum = _spectrum(density)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        x = _example(spectrum, x)
        t = one_time(t, x.dtype)
        parts = _components(spectrum, schedules.alpha(schedule, t), schedule.variance(t), x)
        return jax.scipy.special.logsumexp(parts.log_joint)

    return field


def score(density: Mixture, schedule: Schedule) -> VectorField:
    """The score of x_t.

    grad log p_t(x) = -sum_k p(k | x) S_k^-1 (x - alpha mu_k)

    Args:
        density: the density of x_0.
        schedule: the path.

    Returns:
        ``(t [], x [d], args) -> [d]``; args is not used.

    Raises:
        ValueError: for a density that is not one; when called, for an x that is not one example.
        TypeError: when called, for an x that is not of the density's float dtype.

    Source: Efron (2011), equation 1.4.
    """
    spectrum = _spectrum(density)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        x = _example(spectrum, x)
        t = one_time(t, x.dtype)
        parts = _components(spectrum, schedules.alpha(schedule, t), schedule.variance(t), x)
        return _average(spectrum, parts, None, -1.0 / parts.values)

    return field


def denoiser(density: Mixture, schedule: Schedule) -> VectorField:
    """The best guess of the data behind x_t.

    E[x_0 | x_t] = sum_k p(k | x_t) (mu_k + alpha C_k S_k^-1 (x_t - alpha mu_k))

    Args:
        density: the density of x_0.
        schedule: the path.

    Returns:
        ``(t [], x [d], args) -> [d]``: x itself at t = 0, the mean of the data where alpha is 0.

    Raises:
        ValueError: for a density that is not one; when called, for an x that is not one example.
        TypeError: when called, for an x that is not of the density's float dtype.

    Source: Bishop (2006), equation 2.116.
    """
    spectrum = _spectrum(density)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        x = _example(spectrum, x)
        t = one_time(t, x.dtype)
        scale = schedules.alpha(schedule, t)
        parts = _components(spectrum, scale, schedule.variance(t), x)
        return _average(spectrum, parts, spectrum.means, scale * spectrum.values / parts.values)

    return field


def noise(density: Mixture, schedule: Schedule) -> VectorField:
    """The best guess of the noise in x_t.

    E[eps | x_t] = sigma sum_k p(k | x_t) S_k^-1 (x_t - alpha mu_k)

    Args:
        density: the density of x_0.
        schedule: the path.

    Returns:
        ``(t [], x [d], args) -> [d]``: zero at t = 0, x itself where alpha is 0 and sigma 1.

    Raises:
        ValueError: for a density that is not one; when called, for an x that is not one example.
        TypeError: when called, for an x that is not of the density's float dtype.

    Source: Bishop (2006), equation 2.116.
    """
    spectrum = _spectrum(density)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        x = _example(spectrum, x)
        t = one_time(t, x.dtype)
        parts = _components(spectrum, schedules.alpha(schedule, t), schedule.variance(t), x)
        return _average(spectrum, parts, None, schedules.sigma(schedule, t) / parts.values)

    return field


def velocity(density: Mixture, schedule: Schedule) -> VectorField:
    """The velocity of the probability flow: the ODE dx/dt = v(t, x) carries p_0 along the p_t.

    E[alpha' x_0 + sigma' eps | x_t]
        = sum_k p(k | x_t) (alpha' mu_k + (alpha alpha' C_k + sigma sigma' I) S_k^-1 (x_t - alpha mu_k))

    Args:
        density: the density of x_0.
        schedule: the path.

    Returns:
        ``(t [], x [d], args) -> [d]``, finite on all of [0, 1], also where drift and diffusion are not.

    Raises:
        ValueError: for a density that is not one; when called, for an x that is not one example.
        TypeError: when called, for an x that is not of the density's float dtype.

    Source: Albergo et al. (2023), "Stochastic Interpolants", theorem 6; Song et al. (2021), equation 13.
    """
    spectrum = _spectrum(density)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        x = _example(spectrum, x)
        t = one_time(t, x.dtype)
        scale, scale_dot, variance, half_variance_dot = schedules.derivatives(schedule, t)
        parts = _components(spectrum, scale, variance, x)
        gains = (scale * scale_dot * spectrum.values + half_variance_dot) / parts.values
        return _average(spectrum, parts, scale_dot * spectrum.means, gains)

    return field


def class_log_probs(density: Mixture, schedule: Schedule, labels: Sequence[int] | Array) -> VectorField:
    """The log-probability of every class given x_t: the exact classifier for guidance.

    log p(y | x_t) = log sum over k with labels_k = y of p(k | x_t)

    Args:
        density: the density of x_0.
        schedule: the path.
        labels: the class of each component, ``[k]`` integers that use every class from 0 on.

    Returns:
        ``(t [], x [d], args) -> [num_classes]`` in nats; args is not used.

    Raises:
        ValueError: for labels that do not fit, or a density that is not one; when called, for an x that is not
            one example.
        TypeError: when called, for an x that is not of the density's float dtype.

    Source: Bayes' rule; Song et al. (2021), section 5.
    """
    spectrum = _spectrum(density)
    classes, num_classes = _labels(density, labels)
    member = np.arange(num_classes)[:, None] == classes[None]

    def field(t: Array, x: Array, args: Args = None) -> Array:
        x = _example(spectrum, x)
        t = one_time(t, x.dtype)
        parts = _components(spectrum, schedules.alpha(schedule, t), schedule.variance(t), x)
        joint = jnp.where(jnp.asarray(member), parts.log_joint[None], -jnp.inf)
        return jax.nn.log_softmax(jax.scipy.special.logsumexp(joint, axis=1))

    return field


def log_prob_y(density: Mixture, schedule: Schedule, labels: Sequence[int] | Array, y: int | Array) -> ScalarField:
    """The log-probability of one class given x_t.

    log p(y | x_t)

    Args:
        density: the density of x_0.
        schedule: the path.
        labels: the class of each component, ``[k]`` integers that use every class from 0 on.
        y: the class.

    Returns:
        ``(t [], x [d], args) -> []`` in nats. Its gradient in x is score of p_t(x | y) less score of p_t(x).

    Raises:
        ValueError: for labels that do not fit, a y that is no class, or a density that is not one; when called,
            for an x that is not one example.
        TypeError: when called, for an x that is not of the density's float dtype.

    Source: Bayes' rule; Dhariwal & Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis", section 4.
    """
    log_probs = class_log_probs(density, schedule, labels)
    index = _class(y, _labels(density, labels)[1])

    def field(t: Array, x: Array, args: Args = None) -> Array:
        return log_probs(t, x, args)[index]

    return field
