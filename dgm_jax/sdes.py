"""Stochastic differential equations dx = f dt + g dw, and what is made from them by way of the score.

Data stands at t = 0 and noise at t = 1. Every diffusion here is a scalar or the diagonal of a diagonal matrix, and
does not depend on x.

Source: Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations";
Anderson (1982), "Reverse-Time Diffusion Equation Models".
"""

import math

import jax.numpy as jnp
import numpy as np

from dgm_jax import schedules
from dgm_jax._checks import concrete, floating, one_time
from dgm_jax.types import SDE, Args, Array, Schedule, VectorField

__all__ = ["diffusion_process", "langevin", "ornstein_uhlenbeck", "probability_flow", "reverse"]

_SQRT_2 = math.sqrt(2.0)


def _at(t: Array, x: Array) -> tuple[Array, Array]:
    """One time in the dtype of x, and x."""
    x = floating("x", x)
    return one_time(t, x.dtype), x


def _of_shape(name: str, value: Array, x: Array) -> Array:
    if value.shape != x.shape:
        raise ValueError(
            f"{name} must return the shape of x, {x.shape}, got {value.shape}: "
            "it takes one example; use jax.vmap over a batch."
        )
    return value


def _squared(diffusion: Array, x: Array) -> Array:
    if diffusion.shape not in ((), x.shape):
        raise ValueError(
            f"sde.diffusion must return a scalar or a diagonal of the shape of x, {x.shape}, got {diffusion.shape}: "
            "full matrices are not supported here."
        )
    return jnp.square(diffusion)


def diffusion_process(schedule: Schedule) -> SDE:
    """The linear SDE whose marginal, started from the data, is the path x_t = alpha x_0 + sigma eps.

    dx = (d log alpha / dt) x dt + g dw,    g^2 = d sigma^2 / dt - 2 (d log alpha / dt) sigma^2

    Drift and diffusion are infinite where alpha is 0, at t = 1 of ``cosine`` and ``linear``: solve over
    [0, 1 - delta], or use the velocity, which is finite there.

    Args:
        schedule: the path.

    Returns:
        The SDE, with a scalar diffusion.

    Raises:
        TypeError: when called, for an x that is not made of floats.
        ValueError: when called, for a t that is not one time.

    Source: Song et al. (2021), equations 5 and 29; Kingma et al. (2021), appendix.
    """

    def drift(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        return schedules.rates(schedule, t)[0] * x

    def diffusion(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        return jnp.sqrt(schedules.rates(schedule, t)[1])

    return SDE(drift, diffusion)


def ornstein_uhlenbeck(rate: float | Array = 1.0, mean: float | Array = 0.0, noise: float | Array = _SQRT_2) -> SDE:
    """Noise and a pull towards a mean.

    dx = rate (mean - x) dt + noise dw

    From x_0 the value at time t is Gaussian with mean + (x_0 - mean) exp(-rate t) and variance
    noise^2 (1 - exp(-2 rate t)) / (2 rate); at the defaults it settles at N(0, I).

    Args:
        rate: strength of the pull, positive, per unit of time: ``[]`` or ``[*event]``. Brought to the dtype of x.
        mean: where it pulls to, ``[]`` or ``[*event]``, in units of x. Brought to the dtype of x.
        noise: scale of the noise, at least 0, ``[]`` or ``[*event]``. Brought to the dtype of x.

    Returns:
        The SDE; its diffusion has the shape of ``noise``.

    Raises:
        ValueError: for a rate that is not positive or a noise below 0; when called, for parameters that fit neither a
            scalar nor x.
        TypeError: when called, for an x that is not made of floats.

    Source: Uhlenbeck & Ornstein (1930), "On the Theory of the Brownian Motion"; Gardiner (2004), "Handbook of
    Stochastic Methods", section 4.4.4.
    """
    if concrete(rate) and not np.all(np.asarray(rate) > 0):
        raise ValueError(f"rate must be positive, got {rate}: without a pull there is no mean to return to.")
    if concrete(noise) and not np.all(np.asarray(noise) >= 0):
        raise ValueError(f"noise must be at least 0, got {noise}: it is a scale, whose sign means nothing.")

    def fit(name: str, value: float | Array, x: Array) -> Array:
        array = jnp.asarray(value, x.dtype)
        if array.shape not in ((), x.shape):
            raise ValueError(f"{name} must be a scalar or have the shape of x, {x.shape}, got shape {array.shape}.")
        return array

    def drift(t: Array, x: Array, args: Args = None) -> Array:
        _, x = _at(t, x)
        return fit("rate", rate, x) * (fit("mean", mean, x) - x)

    def diffusion(t: Array, x: Array, args: Args = None) -> Array:
        _, x = _at(t, x)
        return fit("noise", noise, x)

    return SDE(drift, diffusion)


def reverse(sde: SDE, score: VectorField) -> SDE:
    """The same process seen backwards, to be solved from t = 1 to t = 0.

    dx = (f - g^2 grad log p_t(x)) dt + g dw,    dt < 0

    For a g that depends on x the drift would also lose div(g g^T); that term is not here, so g must not depend on x.

    Args:
        sde: the forward SDE, its diffusion a scalar or a diagonal that does not depend on x.
        score: grad log p_t(x), ``(t [], x [*event], args) -> [*event]``.

    Returns:
        The SDE. Both parts pass ``args`` on to ``sde`` and ``score``.

    Raises:
        ValueError: when called, for a t that is not one time, or a part whose value does not fit x.
        TypeError: when called, for an x that is not made of floats.

    Source: Anderson (1982), equation 5.4; Song et al. (2021), equation 6.
    """

    def drift(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        pull = _squared(sde.diffusion(t, x, args), x) * _of_shape("score", score(t, x, args), x)
        return _of_shape("sde.drift", sde.drift(t, x, args), x) - pull

    return SDE(drift, sde.diffusion)


def probability_flow(sde: SDE, score: VectorField) -> VectorField:
    """The velocity of the ODE whose solutions have the same density p_t as the SDE at every t.

    dx/dt = f - g^2 grad log p_t(x) / 2

    For a g that depends on x the velocity would also lose div(g g^T) / 2; that term is not here, so g must not
    depend on x. Where f and g are infinite (t = 1 of ``cosine`` and ``linear``) so is this, although the
    velocity itself has a limit: ``parameterizations.convert`` from x0 or v, or ``densities.velocity``, has it.

    Args:
        sde: the forward SDE, its diffusion a scalar or a diagonal that does not depend on x.
        score: grad log p_t(x), ``(t [], x [*event], args) -> [*event]``.

    Returns:
        ``(t [], x [*event], args) -> [*event]``; ``args`` goes on to ``sde`` and ``score``.

    Raises:
        ValueError: when called, for a t that is not one time, or a part whose value does not fit x.
        TypeError: when called, for an x that is not made of floats.

    Source: Song et al. (2021), equation 13 and appendix D.1.
    """

    def velocity(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        pull = _squared(sde.diffusion(t, x, args), x) * _of_shape("score", score(t, x, args), x)
        return _of_shape("sde.drift", sde.drift(t, x, args), x) - 0.5 * pull

    return velocity


def langevin(score: VectorField) -> SDE:
    """The Langevin equation, which leaves the density of the score unchanged.

    dx = 1/2 grad log p(x) dt + dw

    Args:
        score: grad log p(x), ``(t [], x [*event], args) -> [*event]``; with a score of p_t hold t fixed by wrapping it.

    Returns:
        The SDE, with the scalar diffusion 1. An Euler-Maruyama step of size eta is
        x + eta / 2 score + sqrt(eta) eps.

    Raises:
        ValueError: when called, for a t that is not one time, or a score whose value does not fit x.
        TypeError: when called, for an x that is not made of floats.

    Source: Roberts & Tweedie (1996), "Exponential Convergence of Langevin Distributions and Their Discrete
    Approximations", equation 1.
    """

    def drift(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        return 0.5 * _of_shape("score", score(t, x, args), x)

    def diffusion(t: Array, x: Array, args: Args = None) -> Array:
        _, x = _at(t, x)
        return jnp.ones((), x.dtype)

    return SDE(drift, diffusion)
