"""Continuous normalizing flows: densities by the continuity equation, and the error bars of likelihoods.

Along a path of dx/dt = v(t, x) the log-density changes by d log p_t(x(t))/dt = -div v(t, x(t)). With the base
distribution at ``t_base`` and the data at ``t_data``,

    log p(x) = log p_base(z) + integral from t_data to t_base of div v(t, x(t)) dt,   x(t_data) = x, z = x(t_base).

So one function serves a continuous normalizing flow (base at 0, data at 1) and the probability flow of a
diffusion (data at 0, base at 1).

Each function takes one example; ``jax.vmap`` gives a batch in which every example has its own steps, and its
own log-density whoever shares the batch. ``log_prob_batch`` puts the batch inside one solve instead: cheaper
to train with a continuous adjoint, but the shared steps make log p(x_i) depend on the rest of the batch by
about the tolerance. Report numbers from the per-example functions.

The integral of the divergence is part of the state that the solver's tolerance controls.

Sources: Chen et al. (2018), "Neural Ordinary Differential Equations", theorem 1; Grathwohl et al. (2019),
"FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models", equations 5 to 8; Song et al.
(2021), "Score-Based Generative Modeling through Stochastic Differential Equations", appendix D.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp

from dgm_jax import _checks, solvers
from dgm_jax import divergence as divergences
from dgm_jax.types import Args, Array, Divergence, VectorField

__all__ = [
    "Likelihood",
    "likelihood",
    "log_prob",
    "log_prob_batch",
    "sample",
    "sample_and_log_prob",
    "standard_normal",
]


class Likelihood(NamedTuple):
    """A log-density with its error bar.

    Attributes:
        log_prob: log p(x) in nats ``[]``; NaN where the solve failed.
        stderr: standard error of ``log_prob`` over the probes, in nats ``[]``; zero for the exact divergence.
        solver_error: what the solver's error may leave in ``log_prob``, in nats ``[]``: its change when the
            tolerances are ten times as large, and never less than the tolerance of one step.
        error: sqrt(stderr^2 + solver_error^2) ``[]``: one sigma of the reported interval.
        nfe: evaluations of the velocity, each with its divergence, in the reported solve ``[]``.
        status: of the solve, ``solvers.OK`` if it reached the end ``[]``.
    """

    log_prob: Array
    stderr: Array
    solver_error: Array
    error: Array
    nfe: Array
    status: Array


def standard_normal(z: Array) -> Array:
    """log N(z; 0, I) in nats ``[]``, for z ``[*event]``: the default base distribution."""
    return jnp.sum(jsp.stats.norm.logpdf(z))


def log_prob(
    velocity: VectorField,
    x: Array,
    args: Args = None,
    *,
    t_data: float | Array,
    t_base: float | Array,
    divergence: Divergence | None = None,
    probes: Array | None = None,
    log_base: Callable[[Array], Array] = standard_normal,
    **options: Any,
) -> Array:
    """log p(x) of one example by the continuity equation.

    log p(x) = log p_base(z) + integral from t_data to t_base of div v dt.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        x: one example ``[*event]``.
        args: arrays that ``velocity`` needs.
        t_data: the time at which x(t) is data.
        t_base: the time at which x(t) has the base distribution.
        divergence: how div v is computed; ``None`` is ``divergence.exact``, or ``divergence.hutchinson`` where
            probes are given.
        probes: random vectors for a stochastic divergence ``[num, *event]``, held fixed for the whole solve.
        log_base: log-density of the base distribution, ``z [*event] -> []``; N(0, I) by default.
        **options: those of ``solvers.odeint``: ``rtol``, ``atol``, ``solver``, ``stepsize_controller``, ``dt0``,
            ``adjoint``, ``max_steps``, ``throw``.

    Returns:
        log p(x) in nats ``[]``; NaN where the solve failed.

    Raises:
        ValueError: where ``t_data == t_base``, or shapes do not match.
        TypeError: where ``x`` is not floats.
        solvers.SolveError: where the solve fails and nothing is being transformed.
    """
    x = _checks.floating("x", x)
    _check_times(t_data, t_base)
    field, args = _with_divergence(velocity, divergence, probes, args)
    if probes is not None:
        _checks.probes_for(x, probes)
    start = (x, jnp.zeros((), x.dtype))
    z, integral = solvers.odeint(field, start, args, t0=t_data, t1=t_base, **options)
    return _base(log_base, z) + integral


def log_prob_batch(
    velocity: VectorField,
    x: Array,
    args: Args = None,
    *,
    t_data: float | Array,
    t_base: float | Array,
    divergence: Divergence | None = None,
    probes: Array | None = None,
    log_base: Callable[[Array], Array] = standard_normal,
    with_nfe: bool = False,
    **options: Any,
) -> Any:
    """log p(x_i) of a batch inside one solve, for training.

    The formula is that of ``log_prob``, the steps are shared. The error that the solver controls is averaged
    over the batch, so a number depends on its neighbours by about the tolerance.

    Args:
        velocity: v of one example, ``(t [], x [*event], args) -> [*event]``.
        x: a batch ``[batch, *event]``.
        args: arrays that ``velocity`` needs, shared by the batch.
        t_data: as in ``log_prob``.
        t_base: as in ``log_prob``.
        divergence: as in ``log_prob``.
        probes: random vectors of each example ``[batch, num, *event]``.
        log_base: as in ``log_prob``, for one example.
        with_nfe: return the number of evaluations too, to be watched over training.
        **options: as in ``log_prob``.

    Returns:
        log p(x_i) in nats ``[batch]``, or with ``with_nfe`` the pair of that and the evaluations of the solve ``[]``.

    Raises:
        As ``log_prob``.
    """
    x = _checks.floating("x", x)
    _check_times(t_data, t_base)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"x must be a batch [batch, *event] of at least one example, got shape {x.shape}.")
    field, args = _with_divergence(velocity, divergence, probes, args)
    if probes is not None:
        if probes.ndim != x.ndim + 1 or probes.shape[0] != x.shape[0]:
            raise ValueError(
                f"probes has shape {probes.shape}, but the batch x of shape {x.shape} needs one set for each example, "
                f"[{x.shape[0]}, num, *event]: draw them with jax.vmap over split keys."
            )
        _checks.probes_for(x[0], probes[0])

    def batched(t: Array, state: Any, args: Args) -> Any:
        args, probes = args
        return jax.vmap(lambda one, own: field(t, one, (args, own)), in_axes=(0, None if probes is None else 0))(
            state, probes
        )

    start = (x, jnp.zeros(x.shape[:1], x.dtype))
    solution = solvers.solve_ode(batched, start, args, t0=t_data, t1=t_base, **options)
    z, integral = solution.x
    value = jax.vmap(lambda one: _base(log_base, one))(z) + integral
    return (value, solution.nfe) if with_nfe else value


def sample(
    velocity: VectorField,
    z: Array,
    args: Args = None,
    *,
    t_data: float | Array,
    t_base: float | Array,
    **options: Any,
) -> Array:
    """The data point that the flow makes of one base point.

    x = z + integral from t_base to t_data of v(t, x(t)) dt.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        z: one draw from the base distribution ``[*event]``.
        args: arrays that ``velocity`` needs.
        t_data: as in ``log_prob``.
        t_base: as in ``log_prob``.
        **options: as in ``log_prob``.

    Returns:
        x ``[*event]``; NaN where the solve failed.

    Raises:
        As ``log_prob``.
    """
    z = _checks.floating("z", z)
    _check_times(t_data, t_base)
    return solvers.odeint(velocity, z, args, t0=t_base, t1=t_data, **options)


def sample_and_log_prob(
    velocity: VectorField,
    z: Array,
    args: Args = None,
    *,
    t_data: float | Array,
    t_base: float | Array,
    divergence: Divergence | None = None,
    probes: Array | None = None,
    log_base: Callable[[Array], Array] = standard_normal,
    **options: Any,
) -> tuple[Array, Array]:
    """The data point that the flow makes of one base point, and its log-density, in one solve.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        z: one draw from the base distribution ``[*event]``.
        args: arrays that ``velocity`` needs.
        t_data: as in ``log_prob``.
        t_base: as in ``log_prob``.
        divergence: as in ``log_prob``.
        probes: as in ``log_prob``.
        log_base: as in ``log_prob``.
        **options: as in ``log_prob``.

    Returns:
        x ``[*event]`` and log p(x) in nats ``[]``; both NaN where the solve failed.

    Raises:
        As ``log_prob``.
    """
    z = _checks.floating("z", z)
    _check_times(t_data, t_base)
    field, args = _with_divergence(velocity, divergence, probes, args)
    if probes is not None:
        _checks.probes_for(z, probes)
    start = (z, jnp.zeros((), z.dtype))
    x, integral = solvers.odeint(field, start, args, t0=t_base, t1=t_data, **options)
    return x, _base(log_base, z) - integral


def likelihood(
    velocity: VectorField,
    x: Array,
    args: Args = None,
    *,
    t_data: float | Array,
    t_base: float | Array,
    probes: Array | None = None,
    log_base: Callable[[Array], Array] = standard_normal,
    rtol: float | Array = 1e-5,
    atol: float | Array = 1e-5,
    stepsize_controller: Any = None,
    dt0: float | Array | None = None,
    throw: bool = True,
    **options: Any,
) -> Likelihood:
    """log p(x) of one example, with its error bar.

    Each probe e_k is carried through the solve by itself, as L_k = integral of e_k^T (dv/dx) e_k dt. The value
    is log p_base(z) + mean of L_k, its standard error that of the mean, sd(L_k) / sqrt(num). A second solve at
    ten times the tolerances, or twice the equal steps, shows what the solver's error is; since both solves may
    take the same steps, the tolerance of one step, atol + rtol |log p|, is its floor.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        x: one example ``[*event]``.
        args: arrays that ``velocity`` needs.
        t_data: as in ``log_prob``.
        t_base: as in ``log_prob``.
        probes: independent random vectors ``[num, *event]``, num at least 2; ``None`` for the exact divergence,
            whose cost grows with the dimension. With fewer than about 16 probes the standard error itself is
            uncertain: its distribution is Student's.
        log_base: as in ``log_prob``.
        rtol: relative tolerance of the reported solve.
        atol: absolute tolerance of the reported solve.
        stepsize_controller: as in ``solvers.odeint``: ``PIDController`` or ``ConstantStepSize``.
        dt0: as in ``solvers.odeint``.
        throw: raise when a solve fails, if that can be known now.
        **options: ``solver``, ``adjoint``, ``max_steps``, as in ``solvers.odeint``.

    Returns:
        A ``Likelihood``: value, standard error, solver error, their sum, evaluations, status.

    Raises:
        ValueError: for a single probe, which has no standard error; and as ``log_prob``.
        TypeError: where ``x`` is not floats.
        solvers.SolveError: where a solve fails and nothing is being transformed.
    """
    x = _checks.floating("x", x)
    _check_times(t_data, t_base)
    if probes is None:
        field, args = _with_divergence(velocity, None, None, args)
        start = (x, jnp.zeros((), x.dtype))
    else:
        _checks.probes_for(x, probes)
        num = probes.shape[0]
        if num < 2:
            raise ValueError(
                "probes holds a single probe, which has no standard error: pass num=2 or more, such as 16."
            )
        field, args = jax.tree_util.Partial(_with_quadratic_forms, velocity), (args, probes)
        start = (x, jnp.zeros((num,), x.dtype))

    def solve(**steps: Any) -> tuple[Array, Array, solvers.Solution]:
        solution = solvers.solve_ode(field, start, args, t0=t_data, t1=t_base, throw=throw, **steps, **options)
        z, integral = solution.x
        return _base(log_base, z) + jnp.mean(integral), integral, solution

    value, integral, solution = solve(rtol=rtol, atol=atol, stepsize_controller=stepsize_controller, dt0=dt0)
    looser = solvers.loosen(stepsize_controller, rtol, atol, dt0, 10.0)
    loose, _, _ = solve(**looser)
    floor = 0.1 * (looser["atol"] + looser["rtol"] * jnp.abs(value))
    solver_error = jnp.maximum(jnp.abs(value - loose), jnp.asarray(floor, x.dtype))
    if probes is None:
        stderr = jnp.zeros_like(value)
    else:
        stderr = jnp.std(integral, ddof=1) / jnp.sqrt(jnp.asarray(num, x.dtype))
    return Likelihood(value, stderr, solver_error, jnp.hypot(stderr, solver_error), solution.nfe, solution.status)


def _with_divergence(
    velocity: VectorField, divergence: Divergence | None, probes: Array | None, args: Args
) -> tuple[Callable, Args]:
    """The field of (x, integral of the divergence), and its arguments.

    A ``Partial`` of a module-level function, so that a second call with the same velocity compiles nothing.
    """
    if divergence is None:
        divergence = divergences.exact if probes is None else divergences.hutchinson
    return jax.tree_util.Partial(_augmented, velocity, divergence), (args, probes)


def _augmented(velocity: VectorField, divergence: Divergence, t: Array, state: Any, args: Args) -> Any:
    args, probes = args
    x, _ = state
    return divergence(lambda y: velocity(t, y, args), x, probes)


def _with_quadratic_forms(velocity: VectorField, t: Array, state: Any, args: Args) -> Any:
    args, probes = args
    x, _ = state
    return divergences.quadratic_forms(lambda y: velocity(t, y, args), x, probes)


def _base(log_base: Callable[[Array], Array], z: Array) -> Array:
    value = log_base(z)
    if jnp.shape(value) != ():
        raise ValueError(
            f"log_base must return a scalar for one example, got shape {jnp.shape(value)} for z of shape {z.shape}: "
            "if that is a batch, use jax.vmap or flows.log_prob_batch."
        )
    return value


def _check_times(t_data: float | Array, t_base: float | Array) -> None:
    if _checks.concrete((t_data, t_base)) and float(t_data) == float(t_base):
        raise ValueError(
            f"t_data and t_base are both {float(t_data)}: a flow needs two times, "
            "t_data=1, t_base=0 for a continuous normalizing flow or t_data=0, t_base=1 for a diffusion."
        )
