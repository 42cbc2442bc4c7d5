"""Distributions with known answers, turned away from the axes: there, a Rademacher probe would be exact by luck."""

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import densities, schedules
from dgm_jax.types import Schedule

SCHEDULES = {
    "vp": schedules.vp(),
    "ve": schedules.ve(),
    "sub_vp": schedules.sub_vp(),
    "cosine": schedules.cosine(),
    "edm": schedules.edm(),
    "linear": schedules.linear(),
}


def rotation(dim, seed):
    """A rotation of R^dim, far from the identity."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    return q * np.sign(np.diag(r))


def rotated_mixture(dim, dtype=jnp.float64):
    """Three Gaussians of unequal weight, each with its own full covariance."""
    rng = np.random.default_rng(dim)
    spectrum = np.geomspace(0.15, 1.2, dim)
    turns = [rotation(dim, seed) for seed in (1, 2, 3)]
    return densities.Mixture(
        jnp.asarray([0.2, 0.3, 0.5], dtype),
        jnp.asarray(1.5 * rng.normal(size=(3, dim)), dtype),
        jnp.asarray(np.stack([q @ np.diag(spectrum) @ q.T for q in turns]), dtype),
    )


def switched(index):
    """The schedule of that index among ``SCHEDULES``, an argument of the compiled program: one compilation for all."""
    options = list(SCHEDULES.values())
    return Schedule(
        lambda t: jax.lax.switch(index, [schedule.log_alpha for schedule in options], t),
        lambda t: jax.lax.switch(index, [schedule.variance for schedule in options], t),
    )
