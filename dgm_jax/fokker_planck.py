"""The equation of Kolmogorov, Fokker and Planck: how the density of an SDE moves.

For dx = f dt + g dw, g a scalar or a diagonal, the density p of x obeys

    dp/dt = -div(f p) + 1/2 sum_i d^2 (g_i^2 p) / dx_i^2,

which is -div(f p) + 1/2 g^2 lap p where g is the same everywhere. It is a continuity equation, dp/dt = -div(w p), for

    w = f - 1/2 g^2 grad log p - 1/2 (d g_i^2 / dx_i)_i,

the velocity of the probability flow. So everything here is made from w, its divergence and grad log p:

    d log p / dt = -div w - w . grad log p.

A *residual* is the left side less the right side: zero for the density that the SDE has, not zero for another. An SDE
that is solved towards smaller t, such as ``sdes.reverse``, obeys the same with the sign of g^2 turned:
``backward=True``.

On a grid the equation is a jump process between neighbouring cells (finite volumes, Scharfetter and Gummel's flux):
what leaves one cell enters the next, nothing passes the walls, and no entry of the rate matrix beside its diagonal is
negative. So mass is kept to rounding and no density becomes negative, whatever the spacing and the step.

Source: Risken (1989), "The Fokker-Planck Equation", sections 4.1 and 6.1; Song et al. (2021), "Score-Based Generative
Modeling through Stochastic Differential Equations", appendix D.1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import divergence as divergences
from dgm_jax import solvers
from dgm_jax._checks import concrete, floating, one_time
from dgm_jax.types import SDE, Args, Array, Divergence, ScalarField, StructuredField, VectorField

__all__ = [
    "Evolution",
    "Grid",
    "cells",
    "continuity_residual",
    "evolve",
    "generator",
    "mass",
    "raise_if_too_coarse",
    "residual",
    "rhs",
    "rhs_log",
    "score_residual",
    "spacing",
]


# ------------------------------------------------------------------------------------------------- at one point


def rhs_log(
    sde: SDE, log_density: ScalarField, *, backward: bool = False, divergence: Divergence | None = None
) -> ScalarField:
    """The rate of log p at a point, by the equation of Kolmogorov, Fokker and Planck.

    d log p / dt = -div f - f . s + 1/2 g^2 (lap log p + |s|^2),    s = grad log p

    That is how it reads for a g that is the same everywhere. A diagonal g, and a g that depends on x, are treated right
    as well: 1/2 sum_i d^2 (g_i^2 p) / dx_i^2 over p.

    Args:
        sde: drift f and diffusion g, a scalar or a diagonal.
        log_density: log p, ``(t [], x [*event], args) -> []``; a constant added to it changes nothing.
        backward: the SDE is solved towards smaller t.
        divergence: ``divergence.exact``, or ``divergence.exact_in_chunks(size)`` to bound the memory. ``None`` is exact
            too, and asks what knows its own: a drift that is a ``types.StructuredField`` and, where g is a scalar, a
            log-density that is a ``divergence.Energy``, or a score that is a ``StructuredField``.

    Returns:
        ``(t [], x [*event], args) -> []``, nats per unit of time. An evaluation costs two of grad log p, one of f, and
        m products with the derivatives of both for m entries in x; for a diagonal g that depends on x, m^2 with that
        of g. It can be differentiated in reverse. ``args`` goes on to ``sde`` and ``log_density``.

    Raises:
        ValueError: when called, for a t that is not one time, or a value that does not fit x.
        TypeError: when called, for an x that is not made of floats, or a value of another dtype.

    Source: Risken (1989), section 4.7; Lai et al. (2023), "FP-Diffusion: Improving Score-based Diffusion Models by
    Enforcing the Underlying Score Fokker-Planck Equation", section 3.
    """
    rate = _log_rate(sde, _gradient(log_density), backward, divergence)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        return rate(t, x, args)

    return field


def rhs(
    sde: SDE, log_density: ScalarField, *, backward: bool = False, divergence: Divergence | None = None
) -> ScalarField:
    """The right side of the equation of Kolmogorov, Fokker and Planck at a point: the rate of p.

    dp/dt = -div(f p) + 1/2 g^2 lap p = tr(-d(f p)/dx + 1/2 g^2 d^2 p/dx^2)

    As for all of this module g may be a diagonal, and may depend on x.

    Args:
        sde: drift f and diffusion g.
        log_density: log p, ``(t [], x [*event], args) -> []``.
        backward: the SDE is solved towards smaller t.
        divergence: as in ``rhs_log``.

    Returns:
        ``(t [], x [*event], args) -> []``, density per unit of time: p times ``rhs_log``, so that where p underflows
        it is 0.

    Raises:
        ValueError: when called, for a t that is not one time, or a value that does not fit x.
        TypeError: when called, for an x that is not made of floats, or a value of another dtype.

    Source: Risken (1989), section 4.7; Song et al. (2021), appendix D.1.
    """
    rate = rhs_log(sde, log_density, backward=backward, divergence=divergence)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        return jnp.exp(_scalar("log_density", log_density(t, x, args), x)) * rate(t, x, args)

    return field


def residual(
    sde: SDE, log_density: ScalarField, *, backward: bool = False, divergence: Divergence | None = None
) -> ScalarField:
    """How far a density is from the one that the SDE has: zero where it is right.

    d log p / dt - (-div f - f . s + 1/2 g^2 (lap log p + |s|^2)),    s = grad log p

    Args:
        sde: drift f and diffusion g.
        log_density: the model's log p, ``(t [], x [*event], args) -> []``. Its derivative in t is taken by one jvp: one
            that solves an ODE needs ``adjoint=diffrax.ForwardMode()``.
        backward: the SDE is solved towards smaller t.
        divergence: as in ``rhs_log``.

    Returns:
        ``(t [], x [*event], args) -> []``, nats per unit of time; times p it is the residual of the equation in p.
        Three evaluations of ``log_density`` or its gradient, one of f, m products with their derivatives.

    Raises:
        ValueError: when called, for a t that is not one time, or a value that does not fit x.
        TypeError: when called, for an x that is not made of floats, or a value of another dtype.

    Source: Lai et al. (2023), section 3.
    """
    rate = _log_rate(sde, _gradient(log_density), backward, divergence)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        return _in_time(log_density, t, x, args) - rate(t, x, args)

    return field


def score_residual(
    sde: SDE, score: VectorField, *, backward: bool = False, divergence: Divergence | None = None
) -> VectorField:
    """How far a score is from that of the SDE's density: the score Fokker-Planck equation.

    ds/dt - grad[1/2 g^2 (div s + |s|^2) - f . s - div f]

    Args:
        sde: drift f and diffusion g.
        score: the model's s, ``(t [], x [*event], args) -> [*event]``, the gradient of a density or not.
        backward: the SDE is solved towards smaller t.
        divergence: as in ``rhs_log``.

    Returns:
        ``(t [], x [*event], args) -> [*event]``, per unit of x and time. Its cost is a few times that of ``residual``:
        a gradient in reverse through one divergence.

    Raises:
        ValueError: when called, for a t that is not one time, or a value that does not fit x.
        TypeError: when called, for an x that is not made of floats, or a value of another dtype.

    Source: Lai et al. (2023), section 3, the score Fokker-Planck equation.
    """
    rate = _log_rate(sde, score, backward, divergence)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        _, in_time = jax.jvp(lambda u: _like("score", score(u, x, args), x), (t,), (jnp.ones_like(t),))
        return in_time - jax.grad(rate, argnums=1)(t, x, args)

    return field


def continuity_residual(
    velocity: VectorField, log_density: ScalarField, *, divergence: Divergence | None = None
) -> ScalarField:
    """How far a density is from the one that a velocity carries: the continuity equation.

    d log p / dt + div v + v . grad log p

    Along a path dx/dt = v of the flow it says d log p(x(t)) / dt = -div v.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        log_density: log p, ``(t [], x [*event], args) -> []``.
        divergence: of v; ``None`` is its own where it is a ``types.StructuredField``, else ``divergence.exact``.

    Returns:
        ``(t [], x [*event], args) -> []``, nats per unit of time.

    Raises:
        ValueError: when called, for a t that is not one time, or a value that does not fit x.
        TypeError: when called, for an x that is not made of floats, or a value of another dtype.

    Source: Chen et al. (2018), "Neural Ordinary Differential Equations", theorem 1.
    """
    score = _gradient(log_density)

    def checked(t: Array, x: Array, args: Args) -> Array:
        return _like("velocity", velocity(t, x, args), x)

    known = velocity if divergence is None and isinstance(velocity, StructuredField) else checked

    def field(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        v, div = divergences.of_field(known, t, x, args, divergence=divergence, name="velocity")
        return _in_time(log_density, t, x, args) + div + jnp.sum(v * score(t, x, args))

    return field


def _log_rate(sde: SDE, score: VectorField, backward: bool, divergence: Divergence | None) -> ScalarField:
    """-div w - w . s: the rate of log p where s is its gradient."""
    half = -0.5 if backward else 0.5

    def rate(t: Array, x: Array, args: Args) -> Array:
        f = s = None  # values of what knows its own divergence: by the product rule, they are held still in w
        known = jnp.zeros((), x.dtype)
        if divergence is None and isinstance(sde.drift, StructuredField):
            f, div_f = divergences.of_field(sde.drift, t, x, args, name="sde.drift")
            known = known + div_f
        if divergence is None and isinstance(score, StructuredField) and _squared(sde, t, x, args).shape == ():
            s, div_s = divergences.of_field(score, t, x, args, name="score")
            known = known - half * _squared(sde, t, x, args) * div_s

        def w(y: Array) -> Array:
            s_y = _like("score", score(t, y, args), y) if s is None else s
            squared, slope = _diffusion_squared(sde, t, y, args)
            f_y = _like("sde.drift", sde.drift(t, y, args), y) if f is None else f
            return f_y - half * (squared * s_y + slope)

        value, div = (divergence or divergences.exact)(w, x, None)
        return -(div + known) - jnp.sum(value * (score(t, x, args) if s is None else s))

    return rate


def _squared(sde: SDE, t: Array, x: Array, args: Args) -> Array:
    """g^2."""
    return jnp.square(_coefficient(sde.diffusion(t, x, args), x))


def _diffusion_squared(sde: SDE, t: Array, x: Array, args: Args) -> tuple[Array, Array]:
    """g^2, and d g_i^2 / dx_i for every i; XLA removes the second where g does not depend on x."""

    def squared(y: Array) -> Array:
        return _squared(sde, t, y, args)

    value = squared(x)
    if value.shape == ():
        return value, jax.grad(squared)(x)
    basis = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    columns = jax.vmap(jax.linearize(squared, x)[1])(basis)
    return value, jnp.diagonal(columns.reshape(x.size, x.size)).reshape(x.shape)


def _gradient(log_density: ScalarField) -> VectorField:
    """grad log p, of a log p that is held to be a scalar."""
    if isinstance(log_density, divergences.Energy):
        return divergences.gradient(log_density)

    def gradient(t: Array, x: Array, args: Args) -> Array:
        return jax.grad(lambda y: _scalar("log_density", log_density(t, y, args), y))(x)

    return gradient


def _in_time(log_density: ScalarField, t: Array, x: Array, args: Args) -> Array:
    return jax.jvp(lambda u: _scalar("log_density", log_density(u, x, args), x), (t,), (jnp.ones_like(t),))[1]


def _at(t: Array, x: Array) -> tuple[Array, Array]:
    """One time in the dtype of x, and x."""
    x = floating("x", x)
    return one_time(t, x.dtype), x


def _scalar(name: str, value: Array, x: Array) -> Array:
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must return a scalar [], got shape {jnp.shape(value)} for x of shape {x.shape}: "
            "it takes one example; use jax.vmap over a batch."
        )
    return _in_dtype(name, value, x)


def _like(name: str, value: Array, x: Array) -> Array:
    if jnp.shape(value) != x.shape:
        raise ValueError(
            f"{name} must return the shape of x, {x.shape}, got {jnp.shape(value)}: "
            "it takes one example; use jax.vmap over a batch."
        )
    return _in_dtype(name, value, x)


def _coefficient(value: Array, x: Array) -> Array:
    value = _in_dtype("sde.diffusion", value, x)
    if value.shape not in ((), x.shape):
        raise ValueError(
            f"sde.diffusion must return a scalar or a diagonal of the shape of x, {x.shape}, got {value.shape}: "
            "full matrices are not supported here."
        )
    return value


def _in_dtype(name: str, value: Any, x: Array) -> Array:
    """``value`` as an array in the dtype of x, which it must have already unless it is a number without a dtype."""
    if isinstance(value, int | float) or getattr(value, "weak_type", False):
        return jnp.asarray(value, x.dtype)
    value = jnp.asarray(value)
    if value.dtype != x.dtype:
        raise TypeError(f"{name} returned dtype {value.dtype} for x of {x.dtype}: cast its parameters or its result.")
    return value


# --------------------------------------------------------------------------------------------------- on a grid


class Grid(NamedTuple):
    """A box in R^d, cut into equal cells; made of Python numbers, so that it is known before tracing.

    Attributes:
        low: lower wall on each axis ``[d]``, in units of x.
        high: upper wall on each axis ``[d]``.
        num: cells on each axis ``[d]``, at least 3.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    num: tuple[int, ...]


class Evolution(NamedTuple):
    """A density that moved on a grid, and how that went.

    Attributes:
        p: the density at t1 ``[*num]``: the mean over each cell, NaN where the solve failed.
        status: of the solve, as in ``solvers.Solution`` ``[]``; ``solvers.FAILED`` for more jumps than ``max_jumps``.
        t: the time reached ``[]``.
        num_steps: steps in time ``[]``.
        wall: the largest share of the mass that lay in the outermost cells, at t0, ``ts`` and t1 ``[]``. Where that is
            not small the walls, which let nothing pass, stand in the way: widen the grid.
        width: width of the narrowest structure of p on each axis in spacings, at t0, ``ts`` and t1 ``[d]``: below 1 the
            grid is too coarse for the density. Of a Gaussian it is the standard deviation along that axis with the
            other coordinates held, 1 / sqrt(precision_ii).
        peclet: |drift| times spacing over 1/2 g^2, means over p at t0, ``ts`` and t1, on each axis ``[d]``: the cell
            Peclet number z. The grid spreads p by z/2 coth(z/2) times as much as the noise: 1.08 at 1, 1.31 at 2, z/2
            where z is large. Above 2 it is too coarse for the noise.
        ts: the times asked for ``[num_times]``, or ``None``.
        ps: the density at each of them ``[num_times, *num]``, or ``None``.
        rate: the largest rate at which probability leaves a cell, just after ``t`` ``[]``.
    """

    p: Array
    status: Array
    t: Array
    num_steps: Array
    wall: Array
    width: Array
    peclet: Array
    ts: Array | None = None
    ps: Array | None = None
    rate: Array | None = None


def spacing(grid: Grid) -> tuple[float, ...]:
    """The length of a cell on each axis.

    h_i = (high_i - low_i) / num_i

    Args:
        grid: the grid.

    Returns:
        ``[d]``, in units of x.

    Raises:
        ValueError: for walls that are not in order or numbers of cells below 3.
        TypeError: for a grid that is not made of Python numbers.
    """
    _check_grid(grid)
    return tuple((high - low) / num for low, high, num in zip(*grid, strict=True))


def cells(grid: Grid, *, dtype: Any = float) -> Array:
    """The centres of the cells.

    x_k = low + (k + 1/2) h

    Args:
        grid: the grid.
        dtype: of the centres.

    Returns:
        ``[*num, d]``: a density on the grid is ``jax.vmap`` of a function over each of its leading axes.

    Raises:
        ValueError: for walls that are not in order or numbers of cells below 3.
        TypeError: for a grid that is not made of Python numbers.
    """
    return _points(grid, None, dtype)


def mass(grid: Grid, p: Array) -> Array:
    """The integral of a density over the grid.

    sum_k p_k h_1 ... h_d

    Args:
        grid: the grid.
        p: a density on its cells ``[..., *num]``.

    Returns:
        ``[...]``: 1 for a density whose mass lies within the walls.

    Raises:
        ValueError: for a p that does not fit the grid.
    """
    _check_grid(grid)
    d = len(grid.num)
    if p.shape[-d:] != grid.num:
        raise ValueError(f"p has shape {p.shape}, but the grid has {grid.num} cells: its last axes must agree.")
    return jnp.sum(p, axis=tuple(range(-d, 0))) * math.prod(spacing(grid))


def generator(sde: SDE, grid: Grid) -> VectorField:
    """The equation of Kolmogorov, Fokker and Planck on a grid: the rate of p in every cell.

    dp_k/dt = sum_i (J_{k - 1/2, i} - J_{k + 1/2, i}) / h_i,
    J_{k + 1/2} = (D_k B(-f h / D_k) p_k - D_{k+1} B(f h / D_{k+1}) p_{k+1}) / h,

    with f at the face, D = g^2 / 2 at the centres and B(z) = z / (exp(z) - 1); J = 0 at the walls. It is the flux
    J = f p - d(D p)/dx to second order in h, upwind where the drift wins and central where the noise does. Where D is
    the same everywhere it is Scharfetter and Gummel's, which is exact if J and f do not change within a spacing, and
    leaves p_{k+1} / p_k = exp(f h / D) at rest to rounding.

    However fast D changes, what leaves a cell moves on average at a velocity between those of f at its two faces, and
    leaves at a rate of at most sum_i (g_i^2 / h_i^2 + (|f_{k - 1/2, i}| + |f_{k + 1/2, i}|) / h_i).

    Args:
        sde: drift f and diffusion g, a scalar or a diagonal, which may depend on x.
        grid: the grid.

    Returns:
        ``(t [], p [*num], args) -> dp/dt [*num]``, linear in p: the columns of its matrix sum to zero, and what is
        beside the diagonal is not negative.

    Raises:
        ValueError: for a grid that is none; when called, for values that do not fit.
        TypeError: when called, for a p that is not floats, or a drift or diffusion of another dtype.

    Source: Scharfetter & Gummel (1969), "Large-signal analysis of a silicon Read diode oscillator"; Chang & Cooper
    (1970), "A practical difference scheme for Fokker-Planck equations".
    """
    _check_grid(grid)

    def field(t: Array, p: Array, args: Args = None) -> Array:
        p = floating("p", p)
        if p.shape != grid.num:
            raise ValueError(f"p has shape {p.shape}, but the grid has {grid.num} cells.")
        total = jnp.zeros_like(p)
        for axis, (up, down) in enumerate(_jump_rates(sde, grid, one_time(t, p.dtype), p.dtype, args)):
            flow = up * _without_last(p, axis) - down * _without_first(p, axis)
            total = total - jnp.diff(_padded(flow, axis, 1, 1), axis=axis)
        return total

    return field


def evolve(
    sde: SDE,
    density: Array,
    grid: Grid,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    ts: Array | None = None,
    rtol: float | Array = 1e-5,
    atol: float | Array = 1e-7,
    solver: Any = None,
    stepsize_controller: Any = None,
    dt0: float | Array | None = None,
    adjoint: Any = None,
    max_steps: int = 4096,
    max_jumps: float | Array = 1e7,
    throw: bool = True,
) -> Evolution:
    """Solve the equation of Kolmogorov, Fokker and Planck on a grid, from p at t0 to p at t1.

    dp/dt = -div(f p) + 1/2 sum_i d^2 (g_i^2 p) / dx_i^2, with nothing passing the walls.

    Second order in the spacing (``generator``) and, by ``solvers.uniformization``, in time. Whatever the steps, mass is
    kept to rounding and p stays at least 0. The work is about twice the number of jumps between cells, the integral of
    g^2 sum_i 1 / h_i^2 over time, in products with a sparse matrix: a grid twice as fine costs four times as many.
    Inside a transformation nothing can be raised: pass ``throw=False``, and what comes out to ``raise_if_too_coarse``.

    Args:
        sde: drift and diffusion, a scalar or a diagonal; ``t1 < t0`` solves towards smaller t, as for
            ``sdes.reverse``.
        density: p at t0 on the cells ``[*num]``, such as its values at ``cells(grid)``.
        grid: the grid; d of 1 to 3 is what memory allows.
        args: arrays that drift and diffusion need.
        t0: the initial time.
        t1: the final time.
        ts: times from t0 to t1, in that order, at which to save ``[num_times]``; the solve stops at each.
        rtol: relative tolerance of a step in time.
        atol: absolute tolerance of a step, in units of the density that is uniform over the grid.
        solver: a Diffrax solver for ``generator``; ``None`` is ``solvers.uniformization``. Another one keeps mass to
            rounding or its linear solves' error, and p positive to its tolerance; it must be fit for stiff fields, such
            as ``diffrax.Kvaerno5()`` on up to some hundred cells.
        stepsize_controller: a Diffrax controller; ``None`` is an I-controller at ``rtol`` and ``atol``.
        dt0: size of the first step, positive; ``None`` is a tenth of the way to the next time asked for.
        adjoint: how gradients are taken; the default solver allows ``diffrax.ForwardMode()`` alone.
        max_steps: the most steps between two times asked for.
        max_jumps: the most jumps out of a cell from t0 to t1, were the rate always as large as it is at its largest.
            The default solver stops where there would be more, rather than take hours: a product for each of them.
        throw: raise when the solve fails or the grid is too coarse, if that can be known now.

    Returns:
        An ``Evolution``.

    Raises:
        ValueError: if the grid is too coarse, for the density or for the noise: the message says which spacing is
            needed; for a density that does not fit the grid, is negative, not finite or empty; for a time that is not
            finite, ts out of order, or a ``max_jumps`` that is not positive.
        solvers.SolveError: if the solve failed.
        TypeError: for a density that is not floats, or a drift or diffusion of another dtype.

    Source: Chang & Cooper (1970); Jensen (1953) for the solution in time.
    """
    _check_grid(grid)
    p0 = floating("density", density)
    t0, t1 = _end("t0", t0, p0.dtype), _end("t1", t1, p0.dtype)
    ends = _ends(t0, t1, ts)
    if concrete(max_jumps) and not float(max_jumps) > 0:
        raise ValueError(f"max_jumps must be positive, got {max_jumps}: the default is 1e7.")
    _check_density(grid, p0)
    if throw and concrete((p0, t0)):
        _raise_if_unresolved(grid, np.asarray(_widths(grid, p0)), t0)
    direction = _direction(t0, t1)
    # the jump process is run in elapsed time, so that it is one in both directions
    moving = SDE(
        lambda t, x, args: direction * _like("sde.drift", sde.drift(t0 + direction * t, x, args), x),
        lambda t, x, args: sde.diffusion(t0 + direction * t, x, args),
    )
    field = generator(moving, grid)
    # the magnitude at which jumps become too many
    limit = jnp.asarray(max_jumps, p0.dtype) / jnp.maximum(jnp.abs(t1 - t0), jnp.finfo(p0.dtype).tiny)

    def exit_rate(t: Array, args: Args) -> Array:
        rate = _exit_rate(moving, grid, t, p0.dtype, args)
        return jnp.where(rate > limit, jnp.inf, rate)  # which fails any step, at once

    given = solver is not None
    if solver is None:
        solver = solvers.uniformization(exit_rate)
    volume = math.prod(spacing(grid)) * math.prod(grid.num)

    def to_next(carry: tuple[Any, ...], times: tuple[Array, Array]) -> tuple[tuple[Any, ...], Array]:
        u, status, reached, last, num_steps = carry
        start, end = times
        found = solvers.solve_ode(
            field,
            u,
            args,
            t0=start,
            t1=end,
            rtol=rtol,
            atol=atol,
            solver=solver,
            stepsize_controller=stepsize_controller,
            dt0=jnp.maximum(0.1 * (end - start), jnp.finfo(p0.dtype).tiny) if dt0 is None else dt0,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )
        going = status == solvers.OK
        carry = (
            found.x,
            jnp.where(going, found.status, status),
            jnp.where(going, found.t, reached),
            jnp.where(going, found.last, last),
            num_steps + found.num_steps,
        )
        return carry, found.x

    elapsed = direction * (ends - t0)
    in_order = jnp.all(jnp.diff(elapsed, prepend=0) >= 0) & jnp.all(jnp.isfinite(elapsed))
    elapsed, u0 = jnp.where(in_order, elapsed, 0), jnp.where(in_order, p0 * volume, jnp.nan)
    start = (u0, jnp.int32(solvers.OK), jnp.zeros_like(t0), u0, jnp.int32(0))
    times = (jnp.concatenate([jnp.zeros_like(elapsed[:1]), elapsed[:-1]]), elapsed)
    (u, status, reached, last, num_steps), us = jax.lax.scan(to_next, start, times)
    rate = _exit_rate(moving, grid, reached + 1e-4 * (elapsed[-1] - reached), p0.dtype, args)
    if not given:
        status = jnp.where((status != solvers.OK) & (rate > limit), solvers.FAILED, status)

    states = jnp.concatenate([p0[None], us / volume])
    seen = jax.lax.map(lambda row: _look(sde, grid, row[0], row[1], args), (jnp.append(t0, ends), states))
    found = Evolution(
        u / volume,
        status,
        t0 + direction * reached,
        num_steps,
        jnp.max(seen["wall"]),
        jnp.min(seen["width"], axis=0),
        _ratio(jnp.sum(seen["drifted"], axis=0), jnp.sum(seen["spread"], axis=0)),
        None if ts is None else ends[:-1],
        None if ts is None else states[1:-1],
        rate,
    )
    if throw:
        _raise_if_too_many_jumps(found)
        solution = solvers.Solution(u, status, found.t, last, jnp.full_like(num_steps, -1), num_steps)
        solvers.raise_if_failed(solution, lambda t, p, args: field(jnp.abs(t - t0), p, args), args, t0=t0)
        raise_if_too_coarse(found, grid)
    return found


def raise_if_too_coarse(found: Evolution, grid: Grid) -> None:
    """Raise if the solve failed or the grid was too coarse, on the host; do nothing inside a transformation.

    Args:
        found: of one ``evolve``, such as one that was jitted, or of a batch of them by ``vmap``.
        grid: its grid.

    Raises:
        solvers.SolveError: for a ``status`` that is not ``solvers.OK``, naming cause and time.
        ValueError: for a ``width`` below 1 or a ``peclet`` above 2: the message says which spacing is needed.
    """
    if not concrete(found):
        return
    _raise_if_too_many_jumps(found)
    # of the state that it stopped at no more is known than whether it was finite
    last = jnp.where(jnp.asarray(found.status) == solvers.NONFINITE, jnp.nan, jnp.zeros_like(found.t))
    unknown = jnp.full_like(found.num_steps, -1)
    solvers.raise_if_failed(solvers.Solution(found.p, found.status, found.t, last, unknown, found.num_steps))
    width, peclet = (np.asarray(one).reshape(-1, len(grid.num)) for one in (found.width, found.peclet))
    _raise_if_unresolved(grid, np.min(width, axis=0), None)
    _raise_if_too_little_noise(grid, np.max(peclet, axis=0))


def _points(grid: Grid, face_axis: int | None, dtype: Any) -> Array:
    """Centres of the cells ``[*num, d]``, or of the inner faces across one axis, one fewer on it."""
    axes = []
    for axis, (low, h, num) in enumerate(zip(grid.low, spacing(grid), grid.num, strict=True)):
        places = np.arange(1, num) if axis == face_axis else np.arange(num) + 0.5
        axes.append(low + h * places)
    return jnp.asarray(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1), dtype)


def _drift_and_noise(sde: SDE, t: Array, points: Array, args: Args) -> tuple[Array, Array]:
    """f and D = g^2 / 2 ``[*num, d]`` at points."""

    def one(x: Array) -> Array:
        half = 0.5 * jnp.square(_coefficient(sde.diffusion(t, x, args), x))
        return jnp.concatenate([_like("sde.drift", sde.drift(t, x, args), x), jnp.broadcast_to(half, x.shape)])

    # hidden from XLA, which would spend minutes on evaluating a drift of constant points while it compiles
    points = jax.lax.optimization_barrier(points)
    both = jax.vmap(one)(points.reshape(-1, points.shape[-1])).reshape(*points.shape[:-1], -1)
    f, noise = jnp.split(both, 2, axis=-1)
    return f, noise


def _jump_rates(sde: SDE, grid: Grid, t: Array, dtype: Any, args: Args) -> list[tuple[Array, Array]]:
    """For each axis the rates of jumps at its inner faces: up, out of the cell below; down, out of the cell above."""
    _, at_cells = _drift_and_noise(sde, t, _points(grid, None, dtype), args)
    rates = []
    for axis, h in enumerate(spacing(grid)):
        f, _ = _drift_and_noise(sde, t, _points(grid, axis, dtype), args)
        # each jump has the noise of the cell that it leaves: a noise of the face would need a ratio, which has no bound
        v, noise = h * f[..., axis], at_cells[..., axis]
        up, down = _bernoulli(-v, _without_last(noise, axis)), _bernoulli(v, _without_first(noise, axis))
        rates.append((up / h**2, down / h**2))
    return rates


def _bernoulli(v: Array, noise: Array) -> Array:
    """D B(v / D) = v / (exp(v / D) - 1) for D >= 0: positive, D at v = 0, and max(-v, 0) in the limit of no noise."""
    far = jnp.abs(v) >= 40 * noise  # where exp(-40) counts for nothing
    z = jnp.where(far, 1, v / jnp.where(far, 1, noise))
    near = jnp.abs(z) < 1e-4
    exact = z / jnp.expm1(jnp.where(near, 1, z))
    return jnp.where(far, jnp.maximum(-v, 0), noise * jnp.where(near, 1 - z / 2 + z**2 / 12, exact))


def _exit_rate(sde: SDE, grid: Grid, t: Array, dtype: Any, args: Args) -> Array:
    """The largest rate at which probability leaves a cell."""
    total = jnp.zeros(grid.num, dtype)
    for axis, (up, down) in enumerate(_jump_rates(sde, grid, t, dtype, args)):
        total = total + _padded(up, axis, 0, 1) + _padded(down, axis, 1, 0)
    return jnp.max(total)


def _without_last(p: Array, axis: int) -> Array:
    return jax.lax.slice_in_dim(p, 0, p.shape[axis] - 1, axis=axis)


def _without_first(p: Array, axis: int) -> Array:
    return jax.lax.slice_in_dim(p, 1, p.shape[axis], axis=axis)


def _padded(p: Array, axis: int, before: int, after: int) -> Array:
    return jnp.pad(p, [(before, after) if i == axis else (0, 0) for i in range(p.ndim)])


# ------------------------------------------------------------------------------------- what the grid cannot hold


def _look(sde: SDE, grid: Grid, t: Array, p: Array, args: Args) -> dict[str, Array]:
    """Of one density on the grid: its share at the walls, its width, and what drift and noise do to it."""
    inner = jnp.sum(p[tuple(slice(1, -1) for _ in grid.num)])
    total = jnp.sum(p)
    f, noise = _drift_and_noise(sde, t, _points(grid, None, p.dtype), args)
    share = (p / total)[..., None]
    over = tuple(range(p.ndim))
    return {
        "wall": 1 - inner / total,
        "width": _widths(grid, p),
        "drifted": jnp.sum(jnp.abs(f) * share, over) * jnp.asarray(spacing(grid), p.dtype),
        "spread": jnp.sum(noise * share, over),
    }


def _widths(grid: Grid, p: Array) -> Array:
    """The width of p on each axis ``[d]`` in spacings: of a Gaussian, the standard deviation with the rest held.

    E|p''| / p along axis i is 4 phi(1) / width^2 for a Gaussian of width 1 / sqrt(precision_ii), phi the standard
    normal density: narrow parts of p count most.
    """
    bend = jnp.stack([jnp.sum(jnp.abs(jnp.diff(p, n=2, axis=axis))) for axis in range(p.ndim)]) / jnp.sum(p)
    return jnp.sqrt(_ratio(jnp.full_like(bend, 4 * math.exp(-0.5) / math.sqrt(2 * math.pi)), bend))


def _ratio(top: Array, bottom: Array) -> Array:
    """top / bottom, where 0 / 0 is 0."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), jnp.where(top > 0, jnp.inf, 0))


def _raise_if_too_many_jumps(found: Evolution) -> None:
    if not concrete(found) or found.rate is None:
        return
    failed = np.argwhere(np.asarray(found.status) == solvers.FAILED)
    if len(failed) > 0:
        one = jax.tree.map(lambda leaf: leaf[tuple(failed[0])], (found.t, found.num_steps, found.rate))
        where = f" of element {', '.join(map(str, failed[0]))}" if failed.size else ""
        raise solvers.SolveError(
            f"The solve{where} stopped at t = {float(one[0]):.6g} after {int(one[1])} steps: the solver gave up. "
            f"Probability leaves a cell at a rate of up to {float(one[2]):.3g} there, g^2 / h^2 and |f| / h added up "
            "over the axes, and the default solver makes no more than max_jumps jumps from t0 to t1. Look for a drift "
            "or a diffusion that is too large at a cell, use fewer cells, or raise max_jumps."
        )


def _raise_if_unresolved(grid: Grid, width: np.ndarray, t: Array | None) -> None:
    for axis, (h, cells_wide) in enumerate(zip(spacing(grid), width, strict=True)):
        if cells_wide < 1:
            when = "at t0, ts or t1" if t is None else f"at t0 = {float(t):.4g}"
            raise ValueError(
                f"the grid is too coarse for the density {when}: on axis {axis} it has structure about "
                f"{cells_wide * h:.3g} wide and a spacing of {h:.3g}. {_remedy(grid, axis, 0.5 * cells_wide * h)} A "
                "density that fits into one cell is narrower than can be told: start it later, or blur it."
            )


def _raise_if_too_little_noise(grid: Grid, peclet: np.ndarray) -> None:
    for axis, (h, number) in enumerate(zip(spacing(grid), peclet, strict=True)):
        if number > 2:
            remedy = _remedy(grid, axis, 2 * h / number) if np.isfinite(number) else "There is no noise on that axis."
            raise ValueError(
                f"the grid is too coarse for the noise: on axis {axis} the cell Peclet number |f| h / (g^2 / 2), in "
                f"the mean over p, is {number:.3g} at a spacing of h = {h:.3g}; above 2 the grid itself spreads p as "
                f"noise would. {remedy}"
            )


def _remedy(grid: Grid, axis: int, needed: float) -> str:
    num = math.ceil((grid.high[axis] - grid.low[axis]) / needed)
    return f"Use a spacing of at most {needed:.3g} there: {num} cells or more."


def _end(name: str, t: float | Array, dtype: Any) -> Array:
    """One time, finite as far as that can be known now."""
    t = jnp.asarray(t)
    if t.shape != ():
        raise ValueError(f"{name} must be one time of shape (), got shape {t.shape}: use jax.vmap over times.")
    if concrete(t) and not np.isfinite(t):
        raise ValueError(f"{name} must be finite, got {float(t)}.")
    return t.astype(dtype)


def _direction(t0: Array, t1: Array) -> Array:
    """-1 for a solve towards smaller t; no way at all counts as forwards."""
    return jnp.where(t1 < t0, -jnp.ones_like(t0), jnp.ones_like(t0))


def _ends(t0: Array, t1: Array, ts: Array | None) -> Array:
    """The times at which to stop, t1 the last."""
    if ts is None:
        return t1[None]
    ts = floating("ts", ts).astype(t0.dtype)
    if ts.ndim != 1:
        raise ValueError(f"ts must be a list of times [num_times], got shape {ts.shape}.")
    if concrete(ts) and not np.all(np.isfinite(ts)):
        raise ValueError(f"ts must be finite, got {np.asarray(ts)}.")
    ends = jnp.append(ts, t1)
    if concrete((ends, t0)):
        steps = np.diff(np.append(np.asarray(t0), np.asarray(ends))) * float(_direction(t0, t1))
        if not np.all(steps >= 0):
            raise ValueError(f"ts must go from t0 = {float(t0)} to t1 = {float(t1)} in order, got {np.asarray(ts)}.")
    return ends


def _check_grid(grid: Grid) -> None:
    low, high, num = grid
    if not all(isinstance(side, tuple) for side in grid):
        raise TypeError(
            "grid must be made of tuples of Python numbers, one for each axis, so that it is known before tracing: "
            f"for instance Grid((-4.0,), (4.0,), (200,)), got {grid}."
        )
    if not len(low) == len(high) == len(num) > 0:
        raise ValueError(f"grid has {len(low)} low, {len(high)} high and {len(num)} num: one of each for every axis.")
    for axis in range(len(num)):
        if not (math.isfinite(low[axis]) and math.isfinite(high[axis]) and low[axis] < high[axis]):
            raise ValueError(
                f"grid.low must be below grid.high, both finite, got {low[axis]} and {high[axis]} on axis {axis}."
            )
        if isinstance(num[axis], bool) or not isinstance(num[axis], int) or num[axis] < 3:
            raise ValueError(f"grid.num must be whole numbers of at least 3, got {num[axis]!r} on axis {axis}.")


def _check_density(grid: Grid, p: Array) -> None:
    if p.shape != grid.num:
        raise ValueError(
            f"density has shape {p.shape}, but the grid has {grid.num} cells: evaluate it at cells(grid), by jax.vmap "
            "over each axis."
        )
    if concrete(p):
        values = np.asarray(p)
        if not (np.all(np.isfinite(values)) and np.all(values >= 0) and np.sum(values) > 0):
            raise ValueError(
                "density must be finite, nowhere negative and not zero everywhere on the grid, got values from "
                f"{values.min():.3g} to {values.max():.3g}."
            )
