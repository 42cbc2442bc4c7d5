"""Initial value problems: ODEs and SDEs by Diffrax, Euler-Maruyama as one scan.

An ODE solve has two faces. ``odeint`` returns x(t1). ``solve_ode`` returns a ``Solution``: x(t1), a status,
the time reached, saved states and the number of evaluations of the field. Neither ever hands back a
plausible number from a failed solve: where the status is not ``OK`` the value is NaN.

Outside of transformations a failure raises ``SolveError``, naming cause, time and batch index. Inside
``jit``, ``vmap`` or ``grad`` nothing can be raised: return the ``Solution`` and give it to
``raise_if_failed`` outside, or test for NaN.

What must be differentiated travels in ``args``, not in the closure of ``field``: a continuous adjoint sees
nothing else.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np

from dgm_jax import _blocks, _checks
from dgm_jax.types import SDE, Args, Array, VectorField

__all__ = [
    "FAILED",
    "MAX_STEPS",
    "NONFINITE",
    "OK",
    "STEP_UNDERFLOW",
    "Solution",
    "SolveError",
    "adaptive_steps",
    "euler_maruyama",
    "loosen",
    "odeint",
    "raise_if_failed",
    "sdeint",
    "solve_ode",
    "solve_sde",
    "tolerances",
    "uniformization",
]

OK = 0
"""The solve reached t1 and its state is finite."""
NONFINITE = 1
"""The initial state holds NaN or infinity, or the state became so under fixed steps."""
MAX_STEPS = 2
"""The step limit was reached before t1."""
STEP_UNDERFLOW = 3
"""The adaptive step shrank to the spacing of floats: the field is not finite there, or x(t) blows up."""
FAILED = 4
"""The solver itself gave up, for instance an implicit stage that did not converge."""


class SolveError(RuntimeError):
    """A solve that did not reach t1. The message names the cause, the time reached and the batch index."""


class Solution(NamedTuple):
    """A solve and how it went.

    Attributes:
        x: the state at t1, like ``x0``; NaN where ``status`` is not ``OK``.
        status: ``OK``, ``NONFINITE``, ``MAX_STEPS``, ``STEP_UNDERFLOW`` or ``FAILED`` ``[]``, int32.
        t: the time reached ``[]``: t1, or where the solve stopped; where ``ts`` were asked for, the last of them (or
            t0) before it stopped.
        last: the state at ``t``, like ``x0``. For diagnosis: unlike ``x`` it is not NaN after a failure.
        nfe: evaluations of the field ``[]``, int32; -1 for a solver whose count is not known, such as an
            implicit one. Under ``vmap`` every example has its own; what was paid is their maximum.
        num_steps: accepted and rejected steps ``[]``, int32.
        ts: the saved times ``[num]``, or ``None``.
        xs: the states at ``ts`` ``[num, ...]``, NaN where they were not reached, or ``None``.
    """

    x: Any
    status: Array
    t: Array
    last: Any
    nfe: Array
    num_steps: Array
    ts: Array | None = None
    xs: Any = None


def odeint(
    field: VectorField,
    x0: Any,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    rtol: float | Array = 1e-5,
    atol: float | Array = 1e-5,
    solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: float | Array | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    throw: bool = True,
) -> Any:
    """x(t1) of the initial value problem dx/dt = field(t, x, args), x(t0) = x0.

    x(t1) = x(t0) + integral from t0 to t1 of field(t, x(t), args) dt. All arguments are those of ``solve_ode``,
    which tells more than the value.

    Returns:
        x(t1), like ``x0``; NaN where the solve failed.

    Raises:
        SolveError: if the solve failed, ``throw`` is set and the arguments are concrete.
    """
    solution = solve_ode(
        field,
        x0,
        args,
        t0=t0,
        t1=t1,
        rtol=rtol,
        atol=atol,
        solver=solver,
        stepsize_controller=stepsize_controller,
        dt0=dt0,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=throw,
    )
    return solution.x


def solve_ode(
    field: VectorField,
    x0: Any,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    ts: Array | None = None,
    rtol: float | Array = 1e-5,
    atol: float | Array = 1e-5,
    solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: float | Array | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    throw: bool = True,
) -> Solution:
    """Solve dx/dt = field(t, x, args) from x(t0) = x0 to t1, forwards or backwards in time.

    Matrix products inside the solve are done in full float32: in the TF32 that GPUs default to, an adaptive
    solver spends its steps on rounding errors.

    Args:
        field: ``(t [], x, args) -> dx/dt``, like ``x``.
        x0: the initial state: a pytree of float arrays, all of one dtype.
        args: arrays that ``field`` needs: parameters, probes, conditioning. Gradients flow through them.
        t0: the initial time.
        t1: the final time; ``t1 < t0`` solves backwards.
        ts: times between t0 and t1, in that order, at which to save ``[num]``.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in units of x.
        solver: a Diffrax solver; ``None`` is ``Tsit5()``.
        stepsize_controller: a Diffrax controller; ``None`` is an I-controller at ``rtol`` and ``atol``, which
            gives up when the step falls to the spacing of floats. Another one ignores ``rtol`` and ``atol``.
        dt0: size of the first step, positive; ``None`` is a hundredth of the interval. With
            ``ConstantStepSize`` the size of every step.
        adjoint: how gradients are taken; ``None`` is ``RecursiveCheckpointAdjoint()``: backpropagation through
            the solver. ``BacksolveAdjoint()`` is the continuous adjoint; ``DirectAdjoint()`` also allows second
            derivatives, ``ForwardMode()`` allows jvp.
        max_steps: the most steps, accepted and rejected.
        throw: raise when the solve fails, if that can be known now.

    Returns:
        A ``Solution``.

    Raises:
        SolveError: if the solve failed, ``throw`` is set and the arguments are concrete.
        ValueError: for a step that is not positive, a time that is not finite, or a field whose value does not match
            ``x0``.
        TypeError: for a state that is not floats.

    Source: Chen et al. (2018), "Neural Ordinary Differential Equations", equation 3; Kidger (2021), "On Neural
    Differential Equations", chapter 5, on the adjoints.
    """
    x0, dtype = _state(x0)
    t0, t1 = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    if isinstance(adjoint, diffrax.ImplicitAdjoint):
        raise ValueError("adjoint is ImplicitAdjoint, which is for steady states: pass DirectAdjoint() instead.")
    _check_field(field, t0, x0, args)
    solution = _diffeqsolve(
        diffrax.ODETerm(cast(Any, field)),
        x0,
        args,
        t0=t0,
        t1=t1,
        ts=ts,
        solver=diffrax.Tsit5() if solver is None else solver,
        stepsize_controller=adaptive_steps(rtol, atol, t0, t1) if stepsize_controller is None else stepsize_controller,
        dt0=_first_step(dt0, t0, t1, stepsize_controller),
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=max_steps,
    )
    if throw:
        raise_if_failed(solution, field, args, t0=t0)
    return solution


def sdeint(
    key: Array,
    sde: SDE,
    x0: Array,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    num_steps: int = 1000,
    solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int | None = None,
    throw: bool = True,
) -> Array:
    """x(t1) of one path of dx = f dt + g dw from x(t0) = x0.

    All arguments are those of ``solve_sde``, which tells more than the value.

    Returns:
        x(t1) ``[*event]``; NaN where the solve failed.

    Raises:
        SolveError: if the solve failed, ``throw`` is set and the arguments are concrete.
    """
    solution = solve_sde(
        key,
        sde,
        x0,
        args,
        t0=t0,
        t1=t1,
        num_steps=num_steps,
        solver=solver,
        stepsize_controller=stepsize_controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=throw,
    )
    return solution.x


def solve_sde(
    key: Array,
    sde: SDE,
    x0: Array,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    ts: Array | None = None,
    num_steps: int = 1000,
    solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int | None = None,
    throw: bool = True,
) -> Solution:
    """Solve dx = f dt + g dw from x(t0) = x0 to t1 by Diffrax; ``t1 < t0`` runs backwards (reverse SDEs).

    With everything left alone this is Euler-Maruyama in ``num_steps`` equal steps on increments that are drawn
    once each: the cheapest way, whose path is not a function of the key alone but of the steps too. With a
    ``stepsize_controller`` or an ``adjoint`` the noise is a virtual Brownian tree: one fixed path for the key,
    whatever the steps, at many times the cost. For plain sampling ``euler_maruyama`` is the cheapest of all.

    Args:
        key: a typed key.
        sde: drift and diffusion; the diffusion is a scalar or a diagonal.
        x0: the initial state ``[*event]``.
        args: arrays that drift and diffusion need.
        t0: the initial time.
        t1: the final time.
        ts: times between t0 and t1, in that order, at which to save ``[num]``.
        num_steps: the number of equal steps, or with a controller the inverse of the first step, as a share of
            the interval. It also sets the resolution of the tree: a hundredth of a step.
        solver: a Diffrax SDE solver; ``None`` is ``Euler()``. The SDE is read in the sense that the solver
            converges to: Ito for ``Euler``; for Stratonovich solvers the two agree where g does not depend on x.
        stepsize_controller: a Diffrax controller, for solvers with an error estimate (``ShARK``, ``Heun``).
        adjoint: how gradients are taken; ``None`` is ``DirectAdjoint()``.
        max_steps: the most steps; ``None`` is ``num_steps`` for equal steps and 4096 with a controller.
        throw: raise when the solve fails, if that can be known now.

    Returns:
        A ``Solution``. Its ``nfe`` counts evaluations of the drift.

    Raises:
        SolveError: if the solve failed, ``throw`` is set and the arguments are concrete.
        ValueError: for a number of steps that is not positive, or shapes that do not match.
        TypeError: for an old-style key or a state that is not floats.

    Source: Kidger (2021), "On Neural Differential Equations", section 5.5 (the virtual Brownian tree).
    """
    key = _checks.typed_key(key)
    _check_num_steps(num_steps)
    x0 = _checks.floating("x0", x0)
    t0, t1 = jnp.asarray(t0, x0.dtype), jnp.asarray(t1, x0.dtype)
    _check_field(sde.drift, t0, x0, args)
    solver = diffrax.Euler() if solver is None else solver
    shape = jax.ShapeDtypeStruct(x0.shape, x0.dtype)
    # Diffrax is given elapsed time, for some of its SDE solvers (ShARK in 0.7.2) err when time runs backwards.
    direction = jnp.sign(t1 - t0)
    duration = jnp.abs(t1 - t0)
    step = duration / num_steps
    start = jnp.zeros_like(t0)
    levy_area = _levy_area(solver)
    if stepsize_controller is None and adjoint is None:
        noise: Any = diffrax.UnsafeBrownianPath(shape, key, levy_area)
    else:
        noise = diffrax.VirtualBrownianTree(start, duration, 0.01 * step, shape, key, levy_area)

    def drift(elapsed: Array, x: Array, args: Args) -> Array:
        return direction * sde.drift(t0 + direction * elapsed, x, args)

    def diffusion(elapsed: Array, x: Array, args: Args) -> lineax.AbstractLinearOperator:
        return lineax.DiagonalLinearOperator(_diagonal(sde.diffusion(t0 + direction * elapsed, x, args), x))

    default_max_steps = num_steps + 1 if stepsize_controller is None else 4096  # + 1: rounding may leave a sliver
    solution = _diffeqsolve(
        diffrax.MultiTerm(diffrax.ODETerm(cast(Any, drift)), diffrax.ControlTerm(cast(Any, diffusion), noise)),
        x0,
        args,
        t0=start,
        t1=duration,
        ts=None if ts is None else jnp.abs(jnp.asarray(ts, t0.dtype) - t0),
        solver=solver,
        stepsize_controller=diffrax.ConstantStepSize() if stepsize_controller is None else stepsize_controller,
        dt0=step,
        adjoint=diffrax.DirectAdjoint() if adjoint is None else adjoint,
        max_steps=default_max_steps if max_steps is None else max_steps,
    )
    solution = solution._replace(t=t0 + direction * solution.t, ts=ts)
    if throw:
        raise_if_failed(solution, sde.drift, args, t0=t0)
    return solution


def euler_maruyama(
    key: Array,
    sde: SDE,
    x0: Array,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    num_steps: int,
    path: bool = False,
) -> Any:
    """Euler's SDESolve: one path of dx = f dt + g dw in equal steps, as one scan.

    x(t + dt) = x(t) + f(t, x) dt + g(t, x) sqrt(|dt|) eps,   eps ~ N(0, I),   dt = (t1 - t0) / num_steps.

    Strong order 1/2 (1 where g does not depend on x), weak order 1. Ito. With ``t1 < t0`` time runs backwards,
    as for a reverse SDE. Step n draws from ``fold_in(key, n)``.

    Args:
        key: a typed key.
        sde: drift and diffusion; the diffusion is a scalar or a diagonal.
        x0: the initial state ``[*event]``.
        args: arrays that drift and diffusion need.
        t0: the initial time.
        t1: the final time.
        num_steps: the number of steps, which is also the number of evaluations of drift and of diffusion.
        path: return the whole path as well.

    Returns:
        x(t1) ``[*event]``, or with ``path`` the pair (times ``[num_steps + 1]``, states
        ``[num_steps + 1, *event]``), both ends included.

    Raises:
        ValueError: for a number of steps that is not positive, or shapes that do not match.
        TypeError: for an old-style key or a state that is not floats.

    Source: Maruyama (1955); Kloeden and Platen (1992), "Numerical Solution of Stochastic Differential
    Equations", section 10.2.
    """
    key = _checks.typed_key(key)
    _check_num_steps(num_steps)
    x0 = _checks.floating("x0", x0)
    t0, t1 = jnp.asarray(t0, x0.dtype), jnp.asarray(t1, x0.dtype)
    _check_field(sde.drift, t0, x0, args)
    dt = (t1 - t0) / num_steps
    root = jnp.sqrt(jnp.abs(dt))

    def step(x: Array, n: Array, eps: Array) -> tuple[Array, Array | None]:
        t = t0 + n.astype(x.dtype) * dt
        x = x + sde.drift(t, x, args) * dt + _diagonal(sde.diffusion(t, x, args), x) * (root * eps)
        return x, x if path else None

    numbers = jnp.arange(num_steps, dtype=jnp.int32)
    with jax.default_matmul_precision("highest"):
        x1, xs = _blocks.scan_with_noise(step, x0, numbers, key=key, numbers=numbers, like=x0)
    if path:
        times = t0 + jnp.arange(num_steps).astype(x0.dtype) * dt
        return jnp.append(times, t1), jnp.concatenate([x0[None], cast(Array, xs)])
    return x1


_MOST_JUMPS = 1e6  # in one step


class _Uniformization(diffrax.AbstractAdaptiveSolver):
    """The exponential of a jump process's generator, held at the middle of the step: see ``uniformization``."""

    rate: Callable[[Array, Args], Array]
    error_estimate: bool = True

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> int:
        """Two, in the length of the steps."""
        return 2

    def error_order(self, terms: Any) -> int:
        """Of the error of one step."""
        return 3

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Args) -> None:
        """There is no state."""
        return None

    def func(self, terms: Any, t0: Any, y0: Any, args: Args) -> Any:
        """The field itself."""
        return terms.vf(t0, y0, args)

    def step(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Args, solver_state: Any, made_jump: Any) -> Any:
        """The whole step, then its two halves: the halves are the value, the difference is its error."""
        success = diffrax.RESULTS.successful
        if not self.error_estimate:
            y1 = self._exponential(terms, t0, t1, y0, args)
            return y1, None, {"y0": y0, "y1": y1}, None, success

        def visit(y: Any, part: tuple[Array, Array, Array]) -> tuple[Any, Any]:
            afresh, start, end = part
            y = jax.tree.map(lambda first, now: jnp.where(afresh, first, now), y0, y)
            y = self._exponential(terms, start, end, y, args)
            return y, y

        middle = t0 + 0.5 * (t1 - t0)
        parts = (jnp.array([True, True, False]), jnp.stack([t0, t0, middle]), jnp.stack([t1, middle, t1]))
        y1, ys = jax.lax.scan(visit, y0, parts)
        error = jax.tree.map(lambda y: jnp.abs(y[2] - y[0]), ys)
        return y1, error, {"y0": y0, "y1": y1}, None, success

    def _exponential(self, terms: Any, t0: Any, t1: Any, y: Any, args: Args) -> Any:
        """exp((t1 - t0) A) y, as the mean of P^k y over a Poisson number k of jumps."""
        middle = t0 + 0.5 * (t1 - t0)
        _, push = jax.linearize(lambda y: terms.vf(middle, y, args), y)
        dtype = jax.tree.leaves(y)[0].dtype
        info = jnp.finfo(dtype)
        # a little above the bound, so that rounding leaves I + A / rate without a negative entry
        rate = jnp.maximum(self.rate(middle, args).astype(dtype) * (1 + 64 * info.eps), info.tiny**0.5)
        jumps = rate * terms.contr(t0, t1)
        most = 0.7 * -math.log(float(info.tiny))  # in one sum, whose first weight exp(-jumps) must be a number
        within = jumps <= _MOST_JUMPS
        parts = jnp.where(within, jnp.maximum(jnp.ceil(jumps / most), 1), 0)
        jumps = jumps / jnp.maximum(parts, 1)
        first = jnp.exp(-jumps)

        def more(state: tuple[Any, ...]) -> Array:
            k, weight, total, _, _ = state
            return (k < jumps) | (weight > total * (info.eps / 16))

        def jump(state: tuple[Any, ...]) -> tuple[Any, ...]:
            k, weight, total, power, mean = state
            k = k + 1
            weight = weight * jumps / k
            power = jax.tree.map(lambda v, change: v + change / rate, power, push(power))
            mean = jax.tree.map(lambda m, v: m + weight * v, mean, power)
            return k, weight, total + weight, power, mean

        def one_part(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            n, y = carry
            start = (jnp.zeros((), dtype), first, first, y, jax.tree.map(lambda v: first * v, y))
            _, _, total, _, mean = jax.lax.while_loop(more, jump, start)
            return n + 1, jax.tree.map(lambda m: m / total, mean)

        _, y = jax.lax.while_loop(lambda carry: carry[0] < parts, one_part, (jnp.zeros((), dtype), y))
        return jax.tree.map(lambda v: jnp.where(within, v, jnp.nan), y)


def uniformization(rate: Callable[[Array, Args], Array], *, error_estimate: bool = True) -> diffrax.AbstractSolver:
    """A solver of dp/dt = A(t) p for the probabilities p of a jump process: never negative, and no stiffness.

    p(t + dt) = exp(dt A) p(t) = sum_k exp(-q) q^k / k! P^k p(t),    P = I + A / rate,    q = rate dt,

    with A at the middle of the step. Where the entries of A beside the diagonal are not negative and its columns sum
    to zero, P is a matrix of probabilities and so is the sum, for every dt: no step is too long to be stable, nothing
    becomes negative, nothing is lost but by rounding. Order 2 in dt, and no error at all where A does not change.
    A step costs about q + 8 sqrt(q) products with A. One of q above a million is refused with NaN, whereupon adaptive
    steps take a shorter one: a rate without bound ends in a failed solve, not in one without end.

    Args:
        rate: a bound on the magnitude of A's diagonal, ``(t [], args) -> []``, per unit of time.
        error_estimate: make each step in two halves too, at twice the products, so that steps can be adaptive;
            without, pass ``stepsize_controller=diffrax.ConstantStepSize()``.

    Returns:
        A Diffrax solver for fields that are linear in the state, forwards in time. It can be differentiated in forward
        mode (``adjoint=diffrax.ForwardMode()``), not in reverse.

    Source: Jensen (1953), "Markoff chains as an aid in the study of Markoff processes"; Grassmann (1977), "Transient
    solutions in Markovian queueing systems".
    """
    return _Uniformization(rate, error_estimate)


def adaptive_steps(
    rtol: float | Array,
    atol: float | Array,
    t0: Array,
    t1: Array,
    *,
    norm: Callable[[Any], Array] | None = None,
) -> diffrax.AbstractStepSizeController:
    """The step control that an ODE solve has by default: an I-controller that stops where no step is left to take.

    A step is accepted where norm(error / (atol + rtol |x|)) <= 1. One that falls to the spacing of floats ends the
    solve, as ``STEP_UNDERFLOW``.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance.
        t0: the initial time, an array of floats ``[]``.
        t1: the final time, likewise.
        norm: of a pytree like the state, ``-> []``; ``None`` for the root mean square over all entries.

    Returns:
        A controller of Diffrax. Its tolerances are arrays, for floats would compile anew at each value.

    Raises:
        ValueError: for a tolerance that is not positive.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if _checks.concrete(value) and not float(value) > 0:
            raise ValueError(f"{name} must be positive, got {value}: for instance {name}=1e-5.")
    eps = 4 * float(jnp.finfo(t0.dtype).eps)
    return diffrax.PIDController(
        rtol=jnp.asarray(rtol, t0.dtype),
        atol=jnp.asarray(atol, t0.dtype),
        dtmin=eps * jnp.maximum(jnp.abs(t0), jnp.abs(t1)),
        force_dtmin=False,
        **cast(Any, {} if norm is None else {"norm": norm}),
    )


def tolerances(
    stepsize_controller: diffrax.AbstractStepSizeController | None, rtol: float | Array, atol: float | Array
) -> tuple[float | Array, float | Array]:
    """The tolerances ``(rtol, atol)`` in force: those of a ``PIDController``, else those given."""
    if isinstance(stepsize_controller, diffrax.PIDController):
        return cast(Any, stepsize_controller.rtol), cast(Any, stepsize_controller.atol)
    return rtol, atol


def loosen(
    stepsize_controller: diffrax.AbstractStepSizeController | None,
    rtol: float | Array,
    atol: float | Array,
    dt0: float | Array | None,
    factor: float,
) -> dict[str, Any]:
    """The step options of a solve whose error is several times as large: for error estimates.

    Tolerances are multiplied by ``factor``; equal steps are doubled. The first of adaptive steps, where it is given, is
    tripled: two solves that begin with the same step err alike between its ends.

    Returns:
        Keyword arguments ``stepsize_controller``, ``rtol``, ``atol`` and ``dt0`` of ``solve_ode``. The
        tolerances are those in force, and zero for equal steps.

    Raises:
        ValueError: for a controller that has neither tolerances nor equal steps.
    """
    if isinstance(stepsize_controller, diffrax.ConstantStepSize):
        if dt0 is None:
            raise ValueError("dt0 is None: ConstantStepSize needs the size of its steps.")
        return {"stepsize_controller": stepsize_controller, "rtol": 0.0, "atol": 0.0, "dt0": 2 * dt0}
    if isinstance(stepsize_controller, diffrax.PIDController):
        rtol, atol = tolerances(stepsize_controller, rtol, atol)
        stepsize_controller = dataclasses.replace(stepsize_controller, rtol=rtol * factor, atol=atol * factor)
    elif stepsize_controller is not None:
        raise ValueError(
            f"stepsize_controller is a {type(stepsize_controller).__name__}, whose error cannot be estimated by "
            "loosening it: pass a PIDController, ConstantStepSize, or None with rtol and atol."
        )
    dt0 = None if dt0 is None else 3 * dt0
    return {"stepsize_controller": stepsize_controller, "rtol": rtol * factor, "atol": atol * factor, "dt0": dt0}


def raise_if_failed(
    solution: Solution, field: VectorField | None = None, args: Args = None, *, t0: float | Array | None = None
) -> None:
    """Raise ``SolveError`` if a solve failed, on the host; do nothing inside a transformation.

    Args:
        solution: of one solve, or of a batch of them by ``vmap`` (every field with a leading axis).
        field: the field that was solved. With it the cause is told apart: a field that is not finite, a
            solution that blows up, a stiff field, a small budget.
        args: the arrays that ``field`` was solved with.
        t0: the initial time, which the diagnosis of stiffness needs.

    Raises:
        SolveError: naming cause, time and batch index of the first failure, and the number of failures.
    """
    if not _checks.concrete((solution.status, solution.t, solution.last, args, t0)):
        return
    status = np.asarray(solution.status)
    failed = np.argwhere(status != OK)
    if len(failed) == 0:
        return
    index = tuple(failed[0])
    one = jax.tree.map(lambda leaf: leaf[index], solution._replace(ts=None, xs=None))
    where = f" of element {', '.join(map(str, index))}" if index else ""
    also = f" {len(failed)} of {status.size} elements failed." if index else ""
    cause = _diagnose(one, field, args, t0)
    raise SolveError(
        f"The solve{where} stopped at t = {float(one.t):.6g} after {int(one.num_steps)} steps: {cause}{also}"
    )


def _diagnose(solution: Solution, field: VectorField | None, args: Args, t0: float | Array | None) -> str:
    """The cause of a failure, in words, with a remedy."""
    status, t, last = int(solution.status), solution.t, solution.last
    if status == NONFINITE and int(solution.num_steps) == 0:
        return "the initial state is not finite. Look for NaN or infinity in x0."
    if not _finite(last):
        return "the state is not finite. The field returned NaN or infinity, or the fixed step is too large."
    if field is not None:
        rate = field(t, last, args)
        ahead = t if t0 is None else t + 1e-4 * (t - jnp.asarray(t0, t.dtype))
        if not _finite((rate, field(ahead, last, args))):
            return "the field is not finite there. Evaluate field(t, x, args) around this time to find out why."
        size, speed = _norm(last), _norm(rate)
        elapsed = abs(float(t - t0)) if t0 is not None else 1.0
        if speed * elapsed > 1e4 * size or size > 1e6:
            return f"the solution blows up: |x| = {size:.3g} and |dx/dt| = {speed:.3g} there. Check the field's sign."
        stiffness = _spectral_radius(field, t, last, args) * elapsed / max(int(solution.num_steps), 1)
        if t0 is not None and stiffness > 1.0:
            return (
                f"the field is stiff there: its fastest rate times the mean step is {stiffness:.2g}, the limit of an "
                "explicit solver. Pass solver=diffrax.Kvaerno5(), or float64 arrays if x is float32."
            )
    if status == STEP_UNDERFLOW:
        return (
            "the step shrank to the spacing of floats. The field is not finite or not smooth there, the solution "
            "blows up, or float32 is too coarse for the tolerances: loosen them or pass float64 arrays."
        )
    if status == MAX_STEPS:
        return "the step limit was reached. Raise max_steps, or loosen rtol and atol; a stiff field needs Kvaerno5()."
    return "the solver gave up, for instance in an implicit stage. Try a smaller dt0 or another solver."


def _norm(tree: Any) -> float:
    return max([float(jnp.max(jnp.abs(leaf), initial=0.0)) for leaf in jax.tree.leaves(tree)], default=0.0)


def _spectral_radius(field: VectorField, t: Array, x: Any, args: Args, num_iterations: int = 20) -> float:
    """The size of the largest eigenvalue of df/dx, by power iteration."""
    v = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype), x)
    growth = 0.0
    for _ in range(num_iterations):
        size = _norm(v)
        if size == 0.0 or not np.isfinite(size):
            break
        v = jax.tree.map(lambda leaf, size=size: leaf / jnp.asarray(size, leaf.dtype), v)
        _, v = jax.jvp(lambda y: field(t, y, args), (x,), (v,))
        growth = _norm(v)
    return growth


def _diffeqsolve(
    terms: diffrax.AbstractTerm,
    x0: Any,
    args: Args,
    *,
    t0: Array,
    t1: Array,
    ts: Array | None,
    solver: diffrax.AbstractSolver,
    stepsize_controller: diffrax.AbstractStepSizeController,
    dt0: Array | None,
    adjoint: diffrax.AbstractAdjoint,
    max_steps: int,
) -> Solution:
    """Diffrax's solve, with its outcome turned into a ``Solution``."""
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}: the default for ODEs is 4096.")
    ts = None if ts is None else jnp.asarray(ts, t0.dtype)
    times = {"t0": t0, "t1": t1} if ts is None else {"t0": t0, "t1": t1, "ts": ts}
    for name, value in times.items():
        if _checks.concrete(value) and not np.all(np.isfinite(value)):
            raise ValueError(f"{name} must be finite, got {np.asarray(value).tolist()}.")
    sound = _finite((x0, times))
    marks = ts
    if not isinstance(stepsize_controller, diffrax.ConstantStepSize | diffrax.StepTo):
        # A state that starts as NaN would shrink its step to NaN, and under vmap cost the batch its step limit.
        t1 = jnp.where(sound, t1, t0)
        marks = None if ts is None else jnp.where(sound, ts, t0)
    if dt0 is not None and isinstance(stepsize_controller, diffrax.PIDController):
        stepsize_controller, dt0 = _From.of(stepsize_controller, jnp.abs(dt0)), None
    saveat = diffrax.SaveAt(t1=True) if marks is None else diffrax.SaveAt(ts=jnp.append(marks, t1))
    with _explained_differentiation(), jax.default_matmul_precision("highest"):
        solution = diffrax.diffeqsolve(
            terms,
            solver,
            t0,
            t1,
            dt0,
            x0,
            args,
            saveat=saveat,
            stepsize_controller=stepsize_controller,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )
    reached = jnp.isfinite(solution.ts)  # Diffrax marks what it did not reach by infinity
    t = jnp.max(jnp.where(reached, jnp.abs(solution.ts - t0), 0.0)) * jnp.sign(t1 - t0) + t0
    t = jnp.where(solution.result == diffrax.RESULTS.successful, t1, t)
    latest = jnp.maximum(jnp.sum(reached) - 1, 0)
    # a solve that stopped before the first of ts saved nothing
    last = jax.tree.map(lambda saved, start: jnp.where(jnp.any(reached), saved[latest], start), solution.ys, x0)
    status = _status(solution, sound, last)
    x = jax.tree.map(lambda saved: jnp.where(status == OK, saved[-1], jnp.nan), solution.ys)
    num_steps = jnp.asarray(solution.stats["num_steps"], jnp.int32)
    xs = None
    if ts is not None:
        kept = reached[:-1] & sound
        xs = jax.tree.map(
            lambda saved: jnp.where(jnp.reshape(kept, (-1,) + (1,) * (saved.ndim - 1)), saved[:-1], jnp.nan),
            solution.ys,
        )
    return Solution(x, status, t, last, _evaluations(solver, num_steps), num_steps, ts, xs)


def _status(solution: diffrax.Solution, sound: Array, last: Any) -> Array:
    """Diffrax's result and what it does not look at: whether what it began with, and what it came to, are finite."""
    results = diffrax.RESULTS
    status = jnp.full((), FAILED, jnp.int32)
    status = jnp.where(solution.result == results.dt_min_reached, STEP_UNDERFLOW, status)
    status = jnp.where(solution.result == results.max_steps_reached, MAX_STEPS, status)
    status = jnp.where(solution.result == results.successful, OK, status)
    return jnp.where(sound & _finite(last), status, NONFINITE)


class _From(diffrax.AbstractAdaptiveStepSizeController):
    """A controller that knows its first step.

    Diffrax compares the sign of a dt0 that it is given with the direction of time, by a call back to the host, and JAX
    keeps no program with such a call in its persistent compilation cache.
    """

    rtol: Any  # these three are the controller's, for an implicit solver that asks for them
    atol: Any
    norm: Any
    controller: Any
    first: Any

    @classmethod
    def of(cls, controller: Any, first: Any) -> "_From":
        """``controller``, beginning with a step of size ``first``."""
        return cls(controller.rtol, controller.atol, controller.norm, controller, first)

    def wrap(self, direction: Any) -> "_From":
        """The same for a time that always increases."""
        return _From.of(self.controller.wrap(direction), self.first)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, dt0: Any, args: Any, func: Any, error_order: Any) -> Any:
        """Begin with the step within."""
        return self.controller.init(terms, t0, t1, y0, self.first, args, func, error_order)

    def adapt_step_size(self, *args: Any, **options: Any) -> Any:
        """Accept a step or not, and choose the next."""
        return self.controller.adapt_step_size(*args, **options)


def _finite(tree: Any) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _evaluations(solver: diffrax.AbstractSolver, num_steps: Array) -> Array:
    """Evaluations of the field: those of a step times the steps, and the first where the last one is reused."""
    tableau = getattr(solver, "tableau", None)
    if isinstance(solver, diffrax.AbstractERK) and isinstance(tableau, diffrax.ButcherTableau):
        reused = int(tableau.fsal)
        return (tableau.num_stages - reused) * num_steps + reused
    if isinstance(solver, diffrax.Euler | diffrax.LeapfrogMidpoint):
        return num_steps
    if isinstance(solver, diffrax.ReversibleHeun):
        return num_steps + 1
    return jnp.full_like(num_steps, -1)


def _first_step(
    dt0: float | Array | None, t0: Array, t1: Array, stepsize_controller: diffrax.AbstractStepSizeController | None
) -> Array | None:
    """The first step with its sign; Diffrax's own choice, 0.01 whatever the interval, is not used."""
    if isinstance(stepsize_controller, diffrax.StepTo):
        return None
    if dt0 is None:
        if isinstance(stepsize_controller, diffrax.ConstantStepSize):
            raise ValueError("dt0 is None: ConstantStepSize needs the size of its steps, for instance dt0=0.01.")
        return 0.01 * (t1 - t0)
    if _checks.concrete(dt0) and not float(dt0) > 0:
        raise ValueError(f"dt0 must be positive, got {dt0}: it is the size of a step, whatever the direction of time.")
    return jnp.sign(t1 - t0) * jnp.asarray(dt0, t0.dtype)


def _check_num_steps(num_steps: int) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer):
        raise TypeError(f"num_steps must be a Python integer, got {type(num_steps).__name__}.")
    if num_steps <= 0:
        raise ValueError(f"num_steps must be positive, got {num_steps}; backwards in time is t1 < t0.")


def _state(x0: Any) -> tuple[Any, Any]:
    """``x0`` as arrays, and their one float dtype."""
    x0 = jax.tree.map(lambda leaf: _checks.floating("x0", leaf), x0)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(x0)}
    if len(dtypes) != 1:
        names = ", ".join(sorted(map(str, dtypes))) or "no arrays"
        raise TypeError(f"x0 must be arrays of one float dtype, got {names}: cast them to one.")
    return x0, dtypes.pop()


def _check_field(field: VectorField, t: Array, x: Any, args: Args) -> None:
    """The field's value must match the state: found out by tracing it, at no cost at run time."""
    value = jax.eval_shape(field, t, x, args)
    expected = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), x)
    got = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), value)
    if got != expected:
        raise ValueError(
            f"the field must return what it is given, {expected} (shape, dtype), got {got}: "
            "check its output, and that one example is passed and not a batch."
        )


def _diagonal(coefficient: Array, x: Array) -> Array:
    """A scalar or diagonal diffusion as an array like ``x``."""
    coefficient = jnp.asarray(coefficient, x.dtype)
    if coefficient.shape not in ((), x.shape):
        raise ValueError(
            f"diffusion must return a scalar or an array of shape {x.shape}, got shape {coefficient.shape}: "
            "a full matrix is not supported."
        )
    return jnp.broadcast_to(coefficient, x.shape)


def _levy_area(solver: diffrax.AbstractSolver) -> type:
    """The least that a solver asks of a Brownian path."""
    wanted = getattr(solver, "minimal_levy_area", diffrax.AbstractBrownianIncrement)
    if issubclass(wanted, diffrax.AbstractSpaceTimeTimeLevyArea):
        return diffrax.SpaceTimeTimeLevyArea
    if issubclass(wanted, diffrax.AbstractSpaceTimeLevyArea):
        return diffrax.SpaceTimeLevyArea
    return diffrax.BrownianIncrement


class _explained_differentiation:
    """Turns the errors of an adjoint that cannot do what is asked into ones that say which can."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        text = str(error)
        if isinstance(error, TypeError) and "jvp" in text and "custom_vjp" in text:
            raise TypeError(
                "adjoint does not allow forward-mode or second derivatives: pass adjoint=diffrax.DirectAdjoint(), "
                "or diffrax.ForwardMode() for forward mode alone."
            ) from error
        if "closed-over" in text or "closure" in text or isinstance(error, jax.errors.UnexpectedTracerError):
            raise ValueError(
                "field holds arrays that are being transformed in its closure, where this adjoint does not see them: "
                "pass parameters, probes and conditioning through args."
            ) from error
