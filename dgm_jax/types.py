"""The vocabulary: what every other module takes and returns.

One calling convention, ``f(t, x, args)``, serves drifts, velocities, scores, noise predictions and
log-densities alike. ``t`` is a scalar array ``[]``, ``x`` is *one* example of any event shape
``[*event]`` (never a batch: ``jax.vmap`` at the edge), and ``args`` is any pytree of arrays, through
which parameters and probes reach a solver.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax

__all__ = ["SDE", "Args", "Array", "Chain", "Divergence", "ScalarField", "Schedule", "StructuredField", "VectorField"]

Array: TypeAlias = jax.Array
"""An array, or a tracer that stands for one."""

Args: TypeAlias = Any
"""Any pytree of arrays: parameters, conditioning, probes. ``None`` where a field needs nothing."""

VectorField: TypeAlias = Callable[[Array, Array, Args], Array]
"""``f(t [], x [*event], args) -> [*event]``: a drift, diffusion, velocity, score or noise prediction.

A diffusion may also return a scalar ``[]``: the same coefficient for every coordinate.
"""

ScalarField: TypeAlias = Callable[[Array, Array, Args], Array]
"""``u(t [], x [*event], args) -> []``: a log-density, an energy, a classifier's log p(y | x_t)."""

Divergence: TypeAlias = Callable[[Callable[[Array], Array], Array, Array | None], tuple[Array, Array]]
"""``(f, x [*event], probes [num, *event] | None) -> (f(x) [*event], div f(x) [])``."""


class SDE(NamedTuple):
    """A stochastic differential equation dx = f(x, t) dt + g(t) dw, w a Wiener process (Ito).

    Attributes:
        drift: f, ``(t [], x [*event], args) -> [*event]``.
        diffusion: g, ``(t [], x [*event], args) -> [] or [*event]``: a scalar, or the diagonal of
            a diagonal matrix. It multiplies dw; its square is the variance gained per unit of time.

    Source: Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential
    Equations", equation 5.
    """

    drift: VectorField
    diffusion: VectorField


class Schedule(NamedTuple):
    """A Gaussian path x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, I), data at t = 0, noise at t = 1.

    Two functions of time say everything; drift, diffusion and rates follow by differentiation.

    Attributes:
        log_alpha: log alpha(t), ``[] -> []``; minus infinity where the data is gone.
        variance: sigma(t)^2, ``[] -> []``. Not sigma: its derivative is infinite at t = 0 on the
            common paths, while that of sigma^2 is finite.
    """

    log_alpha: Callable[[Array], Array]
    variance: Callable[[Array], Array]


class Chain(NamedTuple):
    """A forward diffusion process in T steps, x_n = sqrt(1 - beta_n) x_(n-1) + sqrt(beta_n) eps, n = 0 .. T - 1.

    x_n is the data after n + 1 steps: x_(-1) is the data itself.

    Attributes:
        betas: the variance of the noise of each step, in (0, 1) ``[T]``.
        alpha_bars: the product of 1 - betas[k] over k = 0 .. n, ``[T]``: x_n = sqrt(alpha_bar_n) x_(-1) +
            sqrt(1 - alpha_bar_n) eps.

    Source: Ho et al. (2020), "Denoising Diffusion Probabilistic Models", equations 2 and 4.
    """

    betas: Array
    alpha_bars: Array


@dataclass(frozen=True)
class StructuredField:
    """A vector field that knows its own divergence exactly, more cheaply than by products with its Jacobian.

    It is called as any other field, ``field(t, x, args)``. The functions of ``flows`` use what else it holds wherever
    the caller names neither a divergence nor probes. No NamedTuple: JAX holds functions by weak references.

    Where the exact divergence is dear, a field may offer estimates of it too, from probes in a space of its own.

    Attributes:
        field: ``(t [], x [*event], args) -> [*event]``.
        prepare: ``args -> prepared``, any pytree of arrays: what does not change along a path, computed once a solve.
        with_divergence: ``(t [], x [*event], prepared) -> (field(t, x, args) [*event], its divergence [])``.
        with_forms: ``(t [], x [*event], prepared, probes [num, dim]) -> (field(t, x, args) [*event], forms [num])``,
            the forms being estimates of the divergence, one a probe, that are unbiased for probes of identity
            covariance; ``None`` for a field without them.
        probe_space: ``prepared -> (dim, worth)``, from shapes alone: the dimensions of a probe, and how many forms take
            as many multiplications as the exact divergence does; ``None`` likewise.
    """

    field: VectorField
    prepare: Callable[[Args], Any]
    with_divergence: Callable[[Array, Array, Any], tuple[Array, Array]]
    with_forms: Callable[[Array, Array, Any, Array], tuple[Array, Array]] | None = None
    probe_space: Callable[[Any], tuple[int, float]] | None = None

    def __call__(self, t: Array, x: Array, args: Args) -> Array:
        """field(t, x, args)."""
        return self.field(t, x, args)
