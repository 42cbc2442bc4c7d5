"""Gaussian paths from data to noise: x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, I).

A schedule is two functions of time, log alpha and sigma^2, with alpha(0) = 1 and sigma(0) = 0. All else
follows by differentiation: the path is the marginal of the linear SDE dx = f x dt + g dw with

    f = d log alpha / dt,        g^2 = d sigma^2 / dt - 2 f sigma^2,

and of the ODE whose velocity is E[alpha' x_0 + sigma' eps | x_t].

Source: Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations",
appendix B; Kingma et al. (2021), "Variational Diffusion Models", appendix; Karras et al. (2022),
"Elucidating the Design Space of Diffusion-Based Generative Models"; Lipman et al. (2023), "Flow
Matching for Generative Modeling".
"""

import math

import jax
import jax.numpy as jnp

from dgm_jax._checks import floating
from dgm_jax.types import Array, Schedule

__all__ = [
    "alpha",
    "cosine",
    "derivatives",
    "edm",
    "linear",
    "log_snr",
    "rates",
    "sigma",
    "sub_vp",
    "ve",
    "vp",
]


def _betas(beta_min: float, beta_max: float) -> tuple[float, float]:
    low, high = float(beta_min), float(beta_max)
    if not (math.isfinite(high) and 0.0 <= low <= high and high > 0.0):
        raise ValueError(
            f"beta_min and beta_max must be finite with 0 <= beta_min <= beta_max and beta_max > 0, "
            f"got beta_min={low} and beta_max={high}: the defaults are 0.1 and 20."
        )
    return low, high


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The variance-preserving path, alpha^2 + sigma^2 = 1.

    log alpha = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2,    sigma^2 = 1 - alpha^2,

    so that dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw with beta(t) = beta_min + t (beta_max - beta_min).

    Args:
        beta_min: beta(0), at least 0, per unit of time.
        beta_max: beta(1), at least ``beta_min``.

    Returns:
        The schedule. alpha(1) = 6.6e-3 at the defaults: the last density is near N(0, I), not equal to it.

    Raises:
        ValueError: for betas that are negative, not finite or in the wrong order.

    Source: Song et al. (2021), equations 11 and 33.
    """
    low, high = _betas(beta_min, beta_max)

    def log_alpha(t: Array) -> Array:
        return -(high - low) / 4.0 * jnp.square(t) - low / 2.0 * t

    return Schedule(log_alpha, lambda t: -jnp.expm1(2.0 * log_alpha(t)))


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The sub-VP path: the mean of ``vp`` with the square of its variance.

    log alpha as in ``vp``,    sigma^2 = (1 - alpha^2)^2,

    so that dx = -beta x / 2 dt + sqrt(beta (1 - exp(-2 int_0^t beta))) dw.

    Args:
        beta_min: beta(0), at least 0, per unit of time.
        beta_max: beta(1), at least ``beta_min``.

    Returns:
        The schedule. It is sigma, and not sigma^2, that equals 1 - alpha^2.

    Raises:
        ValueError: for betas that are negative, not finite or in the wrong order.

    Source: Song et al. (2021), equations 12 and 34.
    """
    low, high = _betas(beta_min, beta_max)
    log_alpha = vp(low, high).log_alpha
    return Schedule(log_alpha, lambda t: jnp.square(jnp.expm1(2.0 * log_alpha(t))))


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """The variance-exploding path, with a geometric rate of noise.

    alpha = 1,    sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^(2 t) - 1),

    so that dx = sigma_min (sigma_max / sigma_min)^t sqrt(2 log(sigma_max / sigma_min)) dw.

    This is the exact marginal of that SDE started from the data. Song's own code leaves out the
    "- sigma_min^2", as if the data had been blurred by sigma_min first.

    Args:
        sigma_min: scale of the first noise, positive, in the units of the data.
        sigma_max: scale of the last noise, more than ``sigma_min``.

    Returns:
        The schedule.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max < infinity.

    Source: Song et al. (2021), equations 9 and 30.
    """
    low, high = float(sigma_min), float(sigma_max)
    if not (math.isfinite(high) and 0.0 < low < high):
        raise ValueError(
            f"sigma_min and sigma_max must be finite with 0 < sigma_min < sigma_max, "
            f"got sigma_min={low} and sigma_max={high}: the defaults are 0.01 and 50."
        )
    growth = 2.0 * math.log(high / low)
    return Schedule(jnp.zeros_like, lambda t: low**2 * jnp.expm1(growth * t))


def cosine() -> Schedule:
    """The trigonometric variance-preserving path.

    alpha = cos(pi t / 2),    sigma = sin(pi t / 2).

    alpha(1) = 0 exactly: drift and diffusion are infinite there, see ``rates``, while the velocity is finite.

    Returns:
        The schedule.

    Source: Nichol & Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models", equation 17 with
    s = 0; Albergo & Vanden-Eijnden (2023), "Building Normalizing Flows with Stochastic Interpolants".
    """
    quarter = math.pi / 2.0
    # The sine of 1 - t rather than the cosine of t: exactly zero at t = 1, and accurate beside it.
    return Schedule(lambda t: jnp.log(jnp.sin(quarter * (1.0 - t))), lambda t: jnp.square(jnp.sin(quarter * t)))


def edm(sigma_max: float = 80.0) -> Schedule:
    """The path of EDM: the data plus noise whose scale grows in proportion to time.

    alpha = 1,    sigma = sigma_max t,    so that dx = sigma_max sqrt(2 t) dw.

    Args:
        sigma_max: scale of the last noise, positive, in the units of the data.

    Returns:
        The schedule. Its time is 1 / sigma_max of the paper's.

    Raises:
        ValueError: for a ``sigma_max`` that is not positive and finite.

    Source: Karras et al. (2022), table 1, column EDM.
    """
    scale = float(sigma_max)
    if not (math.isfinite(scale) and scale > 0.0):
        raise ValueError(f"sigma_max must be positive and finite, got {scale}: the default is 80.")
    return Schedule(jnp.zeros_like, lambda t: jnp.square(scale * t))


def linear() -> Schedule:
    """The straight line from data to noise: the conditional path of flow matching and rectified flow.

    alpha = 1 - t,    sigma = t,    velocity E[eps - x_0 | x_t].

    alpha(1) = 0 exactly: drift and diffusion are infinite there, see ``rates``, while the velocity is finite.

    Returns:
        The schedule. Papers on flow matching often run time the other way, with the data at 1.

    Source: Lipman et al. (2023), equation 20 with sigma_min = 0; Liu et al. (2023), "Flow Straight and Fast".
    """
    return Schedule(lambda t: jnp.log1p(-t), jnp.square)


def alpha(schedule: Schedule, t: Array) -> Array:
    """The scale of the data.

    alpha(t) = exp(log alpha(t))

    Differentiable on all of [0, 1]: where log alpha is minus infinity the value is 0 exactly, and the derivative
    is that of the neighbouring float.

    Args:
        schedule: the path.
        t: time in [0, 1], ``[]``. Like all functions here it works elementwise on an array of times too.

    Returns:
        alpha, ``[]``, in the dtype of t.

    Raises:
        TypeError: when t is not made of floats.

    Source: Kingma et al. (2021), equation 1.
    """
    t = floating("t", t)
    fixed = jax.lax.stop_gradient(t)
    gone = jnp.isneginf(schedule.log_alpha(fixed))
    step = jnp.where(gone, jnp.nextafter(fixed, jnp.zeros_like(fixed)) - fixed, jnp.zeros_like(fixed))
    value = jnp.exp(schedule.log_alpha(t + step))
    return value - jax.lax.stop_gradient(jnp.where(gone, value, jnp.zeros_like(value)))


def sigma(schedule: Schedule, t: Array) -> Array:
    """The scale of the noise.

    sigma(t) = sqrt(variance(t))

    Args:
        schedule: the path.
        t: time in [0, 1], ``[]``.

    Returns:
        sigma, ``[]``, in the dtype of t. Do not differentiate it at t = 0, where the derivative may be
        infinite: ``rates`` and ``derivatives`` differentiate sigma^2 instead.

    Raises:
        TypeError: when t is not made of floats.

    Source: Kingma et al. (2021), equation 1.
    """
    return jnp.sqrt(schedule.variance(floating("t", t)))


def log_snr(schedule: Schedule, t: Array) -> Array:
    """The logarithm of the signal-to-noise ratio.

    log SNR(t) = 2 log alpha(t) - log sigma^2(t)

    Args:
        schedule: the path.
        t: time in [0, 1], ``[]``.

    Returns:
        log SNR in nats, ``[]``: plus infinity at t = 0, minus infinity where alpha is 0.

    Raises:
        TypeError: when t is not made of floats.

    Source: Kingma et al. (2021), equation 2 (the ratio itself) and section 3.2.
    """
    t = floating("t", t)
    return 2.0 * schedule.log_alpha(t) - jnp.log(schedule.variance(t))


def rates(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    """The coefficients of the SDE dx = f(t) x dt + g(t) dw of which the path is the marginal.

    f = d log alpha / dt,    g^2 = d sigma^2 / dt - 2 f sigma^2

    Finite at t = 0 on every path. Where alpha reaches 0, at t = 1 of ``cosine`` and ``linear``, f is minus
    infinity and g^2 plus infinity: no linear SDE forgets the data in finite time with finite coefficients.
    Stop such an SDE at t = 1 - delta, or integrate the velocity, which is finite on all of [0, 1].

    Args:
        schedule: the path.
        t: time in [0, 1], ``[]``.

    Returns:
        ``(f [], g^2 [])``, per unit of time.

    Raises:
        TypeError: when t is not made of floats.

    Source: Kingma et al. (2021), appendix; Karras et al. (2022), appendix B.
    """
    t = floating("t", t)
    one = jnp.ones_like(t)
    _, drift = jax.jvp(schedule.log_alpha, (t,), (one,))
    variance, variance_dot = jax.jvp(schedule.variance, (t,), (one,))
    return drift, variance_dot - 2.0 * drift * variance


def derivatives(schedule: Schedule, t: Array) -> tuple[Array, Array, Array, Array]:
    """alpha and sigma^2 with their derivatives, finite on all of [0, 1].

    (alpha, d alpha / dt, sigma^2, 1/2 d sigma^2 / dt = sigma d sigma / dt)

    From these four every velocity is made without dividing by alpha or sigma. Where alpha is 0 its derivative is
    that of the neighbouring float (of -1 at t = 1 of ``linear``, of -pi / 2 at t = 1 of ``cosine``, to rounding).

    Args:
        schedule: the path.
        t: time in [0, 1], ``[]``.

    Returns:
        ``(alpha [], alpha_dot [], variance [], half_variance_dot [])``.

    Raises:
        TypeError: when t is not made of floats.

    Source: Albergo et al. (2023), "Stochastic Interpolants", section 2, for the velocity of a Gaussian path.
    """
    t = floating("t", t)
    (scale, variance), (scale_dot, variance_dot) = jax.jvp(
        lambda u: (alpha(schedule, u), schedule.variance(u)), (t,), (jnp.ones_like(t),)
    )
    return scale, scale_dot, variance, 0.5 * variance_dot
