"""Losses whose minimum is the score grad log p, each for one example: ``jax.vmap`` and a mean make a batch.

Explicit score matching needs the score to be known. Denoising score matching needs only samples: at
x_t = alpha x_0 + sigma eps the score of p(x_t | x_0) is -eps / sigma, and

    E |s(x_t) + eps / sigma|^2 = E |s(x_t) - grad log p_t(x_t)|^2 + a number that does not depend on s.
"""

from collections.abc import Callable

import jax.numpy as jnp

from dgm_jax import schedules
from dgm_jax._checks import floating, one_time
from dgm_jax.types import Args, Array, Schedule, VectorField

__all__ = ["denoising", "explicit"]


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
        The loss ``[]``. Its mean over x ~ p is half the Fisher divergence.

    Raises:
        TypeError: ``x`` not of floats, or a score of another dtype than ``x``.
        ValueError: ``t`` not a scalar, or a score of another shape than ``x``.

    Source: Hyvarinen (2005), "Estimation of non-normalized statistical models by score matching", equation 2.
    """
    x = floating("x", x)
    t = one_time(t, x.dtype)
    s, s_true = _evaluate("score", score, t, x, args), _evaluate("target", target, t, x, args)
    return 0.5 * jnp.sum((s - s_true) ** 2)


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
    x0, noise = floating("x0", x0), floating("noise", noise)
    t = one_time(t, x0.dtype)
    if noise.shape != x0.shape:
        raise ValueError(
            f"noise has shape {noise.shape} and x0 {x0.shape}: they must agree, "
            "as from jax.random.normal(key, x0.shape, x0.dtype)."
        )
    if noise.dtype != x0.dtype:
        raise TypeError(f"noise has dtype {noise.dtype} and x0 {x0.dtype}: draw it in x0.dtype.")
    alpha, variance = schedules.alpha(schedule, t), schedule.variance(t)
    sigma = jnp.sqrt(variance)
    x_t = alpha * x0 + sigma * noise
    s = _evaluate("score", score, t, x_t, args)
    factor = 1 / variance if weight is None else weight(t) / variance
    return 0.5 * factor * jnp.sum((sigma * s + noise) ** 2)


def _evaluate(name: str, field: VectorField, t: Array, x: Array, args: Args) -> Array:
    """field(t, x, args), held to the shape and dtype of x: a mean over a broadcast difference would look plausible."""
    value = field(t, x, args)
    if jnp.shape(value) != x.shape:
        raise ValueError(
            f"{name} returned shape {jnp.shape(value)} for x of shape {x.shape}: it must return "
            "the shape of one example, without a batch; use jax.vmap over the batch."
        )
    if value.dtype != x.dtype:
        raise TypeError(f"{name} returned dtype {value.dtype} for x of {x.dtype}: cast its parameters or its result.")
    return value
