"""Losses whose minimum is the score grad log p, each for one example: ``jax.vmap`` and a mean make a batch.

    explicit    1/2 |s(x) - grad log p(x)|^2              needs the true score
    implicit    1/2 |s(x)|^2 + tr ds/dx                   needs samples alone; m products with the Jacobian
    sliced      1/2 |s(x)|^2 + e^T (ds/dx) e              ditto; one product for each random vector e
    denoising   1/2 |s(t, x_t) + eps / sigma|^2           ditto; no derivative of s, but the score is that of noisy data

In expectation over x ~ p they differ by numbers that do not depend on s: with the Fisher divergence
D = E[explicit],

    E[implicit] = E[sliced] = D - 1/2 E |grad log p(x)|^2,
    E[denoising] = D_t + 1/2 E |grad log p(x_t | x_0)|^2 - 1/2 E |grad log p_t(x_t)|^2,

where D_t is the divergence from the score of p_t, the density of x_t = alpha x_0 + sigma eps, and
grad log p(x_t | x_0) = -(x_t - alpha x_0) / sigma^2 = -eps / sigma. The first line is integration by parts, and holds
where p(x) s(x) vanishes at infinity.

A network that gives log p up to a constant, or an energy with its sign turned, has the score ``score_of(network)``,
with which every loss here works; its tr ds/dx is the Laplacian of the network.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dgm_jax import divergence as divergences
from dgm_jax import schedules
from dgm_jax._checks import agree, evaluate, floating, like, one_time
from dgm_jax.types import Args, Array, Divergence, ScalarField, Schedule, VectorField

__all__ = [
    "denoising",
    "explicit",
    "fisher_divergence",
    "implicit",
    "implicit_log_density",
    "score_of",
    "sliced",
]


def explicit(score: VectorField, target: VectorField, t: Array, x: Array, args: Args = None) -> Array:
    """Compute the explicit score matching loss at one point.

    1/2 |s(t, x) - s*(t, x)|^2.

    Args:
        score: the model s, ``(t [], x [*event], args) -> [*event]``.
        target: the true score s*, called alike, with the same ``args``.
        t: time ``[]``.
        x: one example ``[*event]``, from the true density.
        args: passed to both.

    Returns:
        The loss ``[]``. Its mean over x ~ p is the Fisher divergence.

    Raises:
        TypeError: ``x`` not of floats, or a score of another dtype than ``x``.
        ValueError: ``t`` not a scalar, or a score of another shape than ``x``.

    Source: Hyvarinen (2005), "Estimation of non-normalized statistical models by score matching", equation 2.
    """
    x = floating("x", x)
    t = one_time(t, x.dtype)
    s, s_true = evaluate("score", score, t, x, args), evaluate("target", target, t, x, args)
    return 0.5 * jnp.sum((s - s_true) ** 2)


def implicit(
    score: VectorField,
    t: Array,
    x: Array,
    args: Args = None,
    *,
    divergence: Divergence | None = None,
    probes: Array | None = None,
) -> Array:
    """Compute the implicit score matching loss at one point.

    1/2 |s(t, x)|^2 + tr ds/dx.

    Args:
        score: the model s, ``(t [], x [*event], args) -> [*event]``. It must be smooth: with kinks (ReLU) the
            gradient of this loss in the parameters misses what the kinks do as they move.
        t: time ``[]``.
        x: one example ``[*event]``, from the true density.
        args: passed to the score: parameters, conditioning.
        divergence: how tr ds/dx is computed; ``None`` is the score's own where it is a ``types.StructuredField``, else
            ``divergence.exact``, or ``divergence.hutchinson`` where ``probes`` are given.
        probes: random vectors for a stochastic divergence ``[num, *event]``.

    Returns:
        The loss ``[]``. Its mean over x ~ p is the Fisher divergence less 1/2 E |grad log p|^2: it may be negative,
        and has no lower bound on finitely many points.

    Raises:
        TypeError: ``x`` not of floats, or the score or ``probes`` of another dtype than ``x``.
        ValueError: ``t`` not a scalar, the score of another shape than ``x``, or ``probes`` that do not fit.

    Source: Hyvarinen (2005), "Estimation of non-normalized statistical models by score matching", theorem 1.
    """
    x = floating("x", x)
    t = one_time(t, x.dtype)
    s, trace = divergences.of_field(score, t, x, args, divergence=divergence, probes=probes, name="score")
    return 0.5 * jnp.sum(s**2) + trace


def sliced(
    score: VectorField,
    t: Array,
    x: Array,
    probes: Array,
    args: Args = None,
    *,
    variance_reduction: bool = True,
) -> Array:
    """Compute the sliced score matching loss at one point, a mean over random directions e.

    mean over e of e^T (ds/dx) e + 1/2 |s(t, x)|^2, or, without variance reduction, of e^T (ds/dx) e + 1/2 (e^T s)^2.

    Both are the implicit loss in expectation, E[e e^T] = I. With J = ds/dx and S = (J + J^T) / 2, one e makes either a
    quadratic form, of S or of A = S + s s^T / 2, plus what does not depend on e. Their variances at x are those of
    Hutchinson's estimator:

        gaussian     2 |S|_F^2            against  2 |A|_F^2
        rademacher   2 sum_(i!=j) S_ij^2  against  2 sum_(i!=j) A_ij^2

    So the name holds where |s|^2 counts for more than S: for Gaussian e where E[s^T S s + |s|^4 / 4] > 0. At the true
    score of N(0, I) in d dimensions that is d > 2; in one dimension it is the other way round.

    Args:
        score: the model s, ``(t [], x [*event], args) -> [*event]``, smooth.
        t: time ``[]``.
        x: one example ``[*event]``, from the true density.
        probes: the directions e ``[num, *event]`` with identity covariance, from ``dgm_jax.probes``.
        args: passed to the score: parameters, conditioning.
        variance_reduction: whether |s|^2 is taken as it is, or through e.

    Returns:
        The loss ``[]``. One linearisation of the score, and one product with its Jacobian for each probe.

    Raises:
        TypeError: ``x`` not of floats, or the score or ``probes`` of another dtype than ``x``.
        ValueError: ``t`` not a scalar, the score of another shape than ``x``, or ``probes`` that do not fit.

    Source: Song et al. (2019), "Sliced Score Matching: A Scalable Approach to Density and Score Estimation", section 3.
    """
    x = floating("x", x)
    t = one_time(t, x.dtype)
    s, forms = divergences.quadratic_forms(lambda y: evaluate("score", score, t, y, args), x, probes)
    if variance_reduction:
        return jnp.mean(forms) + 0.5 * jnp.sum(s**2)
    projections = jnp.sum(probes * s[None], axis=tuple(range(1, probes.ndim)))
    return jnp.mean(forms + 0.5 * projections**2)


def denoising(
    score: VectorField,
    schedule: Schedule,
    t: Array,
    x0: Array,
    noise: Array,
    args: Args = None,
    *,
    weight: Callable[[Array], Array] | None = None,
) -> Array:
    """Compute the denoising score matching loss of one example, one time and one draw of noise.

    weight(t) / 2 |s(t, x_t) + eps / sigma(t)|^2,    x_t = alpha(t) x_0 + sigma(t) eps.

    Args:
        score: the model s, ``(t [], x [*event], args) -> [*event]``.
        schedule: gives alpha and sigma.
        t: time ``[]`` with sigma(t) > 0. At sigma = 0 there is no noise to learn from, and the loss is not finite.
        x0: one example of the data ``[*event]``.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x0``.
        args: passed to the score: parameters, conditioning.
        weight: ``[] -> []``, 1 where None. Then the loss grows as 1 / sigma^2 for small t;
            ``weight=schedule.variance`` keeps it of order one, and is what a training run wants.
            The weight changes how much each time counts, not the minimum.

    Returns:
        The loss ``[]``.

    Raises:
        TypeError: ``x0`` or ``noise`` not of floats, or ``noise`` or the score of another dtype than ``x0``.
        ValueError: ``noise`` or the score of another shape than ``x0``, or ``t`` not a scalar.

    Source: Vincent (2011), "A connection between score matching and denoising autoencoders", equation 9;
    Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations", equation 7.
    """
    x0, noise = agree("x0", x0, "noise", noise)
    t = one_time(t, x0.dtype)
    alpha, variance = schedules.alpha(schedule, t), schedule.variance(t)
    sigma = jnp.sqrt(variance)
    x_t = alpha * x0 + sigma * noise
    s = evaluate("score", score, t, x_t, args)
    factor = 1 / variance if weight is None else weight(t) / variance
    return 0.5 * factor * jnp.sum((sigma * s + noise) ** 2)


def score_of(log_density: ScalarField) -> VectorField:
    """The score of a scalar model, its gradient: s(t, x) = grad_x log p(t, x).

    Its Jacobian is a Hessian, so that the products which ``sliced`` takes are Hessian-vector products.

    Args:
        log_density: log p up to a constant, ``(t [], x [*event], args) -> []``. Of an energy E, pass -E.

    Returns:
        ``(t [], x [*event], args) -> [*event]``. Of a ``divergence.Energy``, such as ``networks.energy`` makes, it is a
        ``types.StructuredField``, whose divergence is the Laplacian that the energy knows.

    Raises:
        ValueError: when called, a log-density that is not a scalar.
        TypeError: when called, ``x`` not of floats, or a log-density of another dtype than ``x``.

    Source: Hyvarinen (2005), "Estimation of non-normalized statistical models by score matching", section 2.
    """
    if isinstance(log_density, divergences.Energy):
        return divergences.gradient(log_density)
    scalar = _scalar(log_density)

    def score(t: Array, x: Array, args: Args = None) -> Array:
        return jax.grad(lambda y: scalar(t, y, args))(floating("x", x))

    return score


def implicit_log_density(log_density: ScalarField, t: Array, x: Array, args: Args = None) -> Array:
    """Compute the implicit score matching loss of a scalar model at one point.

    1/2 |grad log p(t, x)|^2 + lap log p(t, x),

    that is ``implicit`` of ``score_of(log_density)``: the trace of its Jacobian is the Laplacian, which a
    ``divergence.Energy`` knows.

    Args:
        log_density: log p up to a constant, ``(t [], x [*event], args) -> []``, smooth. Of an energy E, pass -E.
        t: time ``[]``.
        x: one example ``[*event]``, from the true density.
        args: passed to the log-density: parameters, conditioning.

    Returns:
        The loss ``[]``.

    Raises:
        TypeError: ``x`` not of floats, or a log-density of another dtype than ``x``.
        ValueError: ``t`` not a scalar, or a log-density that is not one.

    Source: Hyvarinen (2005), "Estimation of non-normalized statistical models by score matching", theorem 1.
    """
    # not divergence.laplacian, which gives no gradient beside it: taken apart they cost a fifth more
    return implicit(score_of(log_density), t, x, args)


def fisher_divergence(
    score_p: VectorField, score_q: VectorField, t: Array, samples: Array, args: Args = None
) -> tuple[Array, Array]:
    """Estimate the Fisher divergence of two densities from samples of the first.

    D = 1/2 E_p |s_p(t, x) - s_q(t, x)|^2.

    It is not symmetric in p and q. Where p has hardly any mass, the scores may differ by much at no cost.

    Args:
        score_p: the score of p, ``(t [], x [*event], args) -> [*event]``.
        score_q: the score of q, or a model of it, called alike with the same ``args``.
        t: time ``[]``.
        samples: independent draws from p ``[num, *event]``, num at least 2; all are evaluated at once.
        args: passed to both.

    Returns:
        The estimate ``[]`` and its standard error ``[]`` over the samples.

    Raises:
        TypeError: ``samples`` not of floats, or a score of another dtype.
        ValueError: fewer than 2 samples, ``t`` not a scalar, or a score of another shape than one sample.

    Source: Hyvarinen (2005), "Estimation of non-normalized statistical models by score matching", equation 2.
    """
    samples = floating("samples", samples)
    if samples.ndim == 0 or samples.shape[0] < 2:
        raise ValueError(
            f"samples has shape {samples.shape}, expected [num, *event] with num at least 2: one sample has no "
            "standard error. For the loss at one point, call explicit."
        )
    t = one_time(t, samples.dtype)

    def half_square(x: Array) -> Array:
        difference = evaluate("score_p", score_p, t, x, args) - evaluate("score_q", score_q, t, x, args)
        return 0.5 * jnp.sum(difference**2)

    each = jax.vmap(half_square)(samples)
    return jnp.mean(each), jnp.std(each, ddof=1) / len(each) ** 0.5


def _scalar(log_density: ScalarField) -> ScalarField:
    """log_density, held to a scalar of the dtype of x."""
    return lambda t, x, args: like("log_density", log_density(t, x, args), (), x.dtype)
