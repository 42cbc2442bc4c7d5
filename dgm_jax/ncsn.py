"""Noise conditional score networks: one score model for the data under many levels of noise.

With x = x_0 + sigma eps the score model s(sigma, x) learns grad log of the density of x at each of the levels
sigma_1 > ... > sigma_L. Samples come by ``langevin.annealed``: at the largest level the density has one broad hump
that a Langevin chain crosses freely, and each later level starts from the one before.

Every function takes sigma itself, not a time, as the model's first argument.

Source: Song & Ermon (2019), "Generative Modeling by Estimating Gradients of the Data Distribution"; Song & Ermon
(2020), "Improved Techniques for Training Score-Based Generative Models".
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from dgm_jax._checks import agree, concrete, evaluate, noise_levels, positive_integer
from dgm_jax.types import Args, Array, VectorField

__all__ = ["levels", "loss", "step_size"]


def levels(sigma_max: float, sigma_min: float, num: int, *, dtype: Any = float) -> Array:
    """Levels of noise in geometric progression, from large to small.

    sigma_l = sigma_max (sigma_min / sigma_max)^((l - 1) / (L - 1)),    l = 1 .. L

    Args:
        sigma_max: the largest, in units of x: about the largest distance between two examples, so that at this level
            the data look like one hump.
        sigma_min: the smallest, positive: what is small beside the details of the data.
        num: L, at least 2. Neighbouring levels should overlap: in d dimensions the radii of their noise do while
            sigma_l / sigma_(l+1) - 1 is below about 3 / sqrt(2 d).
        dtype: of the levels; JAX's default float if not given.

    Returns:
        The levels ``[num]``; the ends are exact.

    Raises:
        ValueError: unless sigma_max > sigma_min > 0, both finite, and num is an integer of at least 2; for levels that
            the dtype cannot tell apart.
        TypeError: for a dtype that is not of floats.

    Source: Song & Ermon (2019), section 4.1; Song & Ermon (2020), techniques 1 and 2.
    """
    if not (math.isfinite(sigma_max) and 0 < sigma_min < sigma_max):
        raise ValueError(
            f"levels need sigma_max > sigma_min > 0, both finite, got sigma_max={sigma_max} and sigma_min={sigma_min}: "
            "the noise falls from the first to the last."
        )
    dtype = jnp.zeros((), dtype).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be of floats, got {dtype}: pass jnp.float32, or leave it out.")
    exact = np.geomspace(float(sigma_max), float(sigma_min), positive_integer("num", num, 2))
    return noise_levels(jnp.asarray(exact, dtype))  # which in a short dtype may not fall, or not be finite


def loss(score: VectorField, sigmas: Array, level: int | Array, x0: Array, noise: Array, args: Args = None) -> Array:
    """Compute the weighted denoising loss of one example, one level and one draw of noise.

    sigma_l^2 / 2 |s(sigma_l, x) + eps / sigma_l|^2 = 1/2 |sigma_l s(sigma_l, x) + eps|^2,    x = x_0 + sigma_l eps

    The weight sigma_l^2 makes every level count alike, as s is of size 1 / sigma_l. The mean over examples, noise and
    levels drawn uniformly is the objective of Song & Ermon; the course's sum over the levels, which leaves out the
    factor 1/2, is 2 L times that, with the same minimum: the true score at every level.

    Args:
        score: the model s, ``(sigma [], x [*event], args) -> [*event]``.
        sigmas: the levels ``[L]``. Brought to the dtype of ``x0``.
        level: the index l from 0 to L - 1 ``[]``, an integer.
        x0: one example of the data ``[*event]``.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x0``.
        args: passed to the score: parameters, conditioning.

    Returns:
        The loss ``[]``; NaN for a level outside the ladder, or levels that do not fall, that could not be known in time
        to raise.

    Raises:
        ValueError: for levels that do not fall or are not positive, a level that is not one of them, or ``noise`` or
            the score of another shape than ``x0``.
        TypeError: for a level that is not an integer, ``x0``, ``noise`` or ``sigmas`` not of floats, or ``noise`` or
            the score of another dtype than ``x0``.

    Source: Song & Ermon (2019), equations 5 and 6.
    """
    x0, noise = agree("x0", x0, "noise", noise)
    sigmas = noise_levels(sigmas, x0.dtype)
    index = jnp.asarray(level)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"level must be an integer, got dtype {index.dtype}: it counts the levels from 0.")
    if index.shape != ():
        raise ValueError(f"level must be one index of shape (), got shape {index.shape}: use jax.vmap over levels.")
    num = sigmas.shape[0]
    if concrete(index) and not 0 <= int(index) < num:
        raise ValueError(f"level must be from 0 to {num - 1}, an index into the {num} levels, got {int(index)}.")
    sigma = jnp.where((index >= 0) & (index < num), sigmas[index], jnp.nan)
    s = evaluate("score", score, sigma, x0 + sigma * noise, args)
    return 0.5 * jnp.sum(jnp.square(sigma * s + noise))


def step_size(sigmas: Array, num_steps: int) -> float:
    """Choose the step of annealed Langevin dynamics so that each level ends with about its own variance.

    If the data are a point, a level that starts with the variance of the level before, gamma^2 sigma^2, ends with

    sigma^2 ((1 - r/2)^(2 T) (gamma^2 - v) + v),    v = 1 / (1 - r/4),    r = step_size / sigma_L^2,    T = num_steps;

    the answer is the step at which that is closest to sigma^2.

    Args:
        sigmas: the levels, positive and falling ``[L]``, L at least 2. Their largest ratio counts as gamma.
        num_steps: T, the steps at each level.

    Returns:
        ``step_size`` for ``langevin.annealed``: twice the paper's epsilon, whose step is x + epsilon s +
        sqrt(2 epsilon) z.

    Raises:
        ValueError: for levels that do not fall or are not positive, fewer than two, or no steps.
        TypeError: for levels that are not floats, or not known when a function is traced.

    Source: Song & Ermon (2020), proposition 3 and technique 4.
    """
    sigmas = noise_levels(sigmas)
    if not concrete(sigmas):
        raise TypeError("sigmas must be known when a function is traced: choose the step outside.")
    if sigmas.shape[0] < 2:
        raise ValueError("sigmas must hold at least 2 levels, got 1: any step below 4 sigma^2 will do.")
    num_steps = positive_integer("num_steps", num_steps)
    values = np.asarray(sigmas, np.float64)
    gamma = np.max(values[:-1] / values[1:])
    r = np.geomspace(1e-8, 2.0, 200_001)  # at r = 2 one step forgets the past
    v = 1 / (1 - r / 4)
    excess = (1 - r / 2) ** (2 * num_steps) * (gamma**2 - v) + v - 1  # never negative
    return float(r[np.argmin(excess)] * values[-1] ** 2)
