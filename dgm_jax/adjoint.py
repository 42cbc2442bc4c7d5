"""Pontryagin's adjoint: the gradient of a loss of an ODE's solution, by one ODE solved backwards in time.

Let dx/dt = f(t, x, theta), x(t0) = x0, and L = loss(x(t1)) + integral from t0 to t1 of l(t, x(t), theta) dt. The
adjoint functions a_x(t) = dL/dx(t) and a_theta(t), the derivative by parameters that act from t on, obey

    da_x/dt     = -a_x^T df/dx     - dl/dx,          a_x(t1)     = dloss/dx(t1),
    da_theta/dt = -a_x^T df/dtheta - dl/dtheta,      a_theta(t1) = 0,

so that dL/dx0 = a_x(t0) and dL/dtheta = a_theta(t0). Where the loss is of several times t_k, a_x jumps by
dloss/dx(t_k) as it passes each. The products with the Jacobians are one ``jax.vjp``; x(t) is not stored but solved
backwards beside the adjoint, as one augmented ODE (x, a_x, a_theta), so that the memory does not grow with the number
of steps.

That last economy has a price. A field that contracts forwards expands backwards, and the x(t) that comes back may
not be the one that went: the more so, the stiffer the field. Every function here measures it, as the distance at which
the backward solve ends from the state that it should reach, and gives NaN instead of a gradient along a wrong path:
one beyond a ``drift_limit``.

    loss, by_x0, by_args = gradients(lambda x1: jnp.sum(x1**2), field, x0, args, t0=0.0, t1=1.0)

Diffrax's adjoints, passed to ``solvers.odeint``, are the peers: ``RecursiveCheckpointAdjoint`` differentiates the
solver itself and cannot drift.

Sources: Pontryagin et al. (1962), "The Mathematical Theory of Optimal Processes"; Chen et al. (2018), "Neural Ordinary
Differential Equations", section 2 and algorithm 1; Kidger (2021), "On Neural Differential Equations", section 5.1.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import _checks, solvers
from dgm_jax.types import Args, Array, ScalarField, VectorField

__all__ = [
    "BAD_TIMES",
    "DRIFTED",
    "Adjoint",
    "Path",
    "drift",
    "gradients",
    "objective",
    "path",
    "raise_if_failed",
    "solve",
]

DRIFTED = 5
"""Both solves reached their ends, but the backward one by another path: ``reconstruction_error`` is above the limit.
The other values of a status are those of ``solvers``, and ``BAD_TIMES``."""

BAD_TIMES = 6
"""A time of the loss, known only when run, is outside of the solve or out of order: there is no loss."""

Loss = Callable[[Any], Array]


class Adjoint(NamedTuple):
    """A loss, its gradients, and how the two solves went.

    Attributes:
        loss: the loss, with the integral of the running loss in it ``[]``; NaN where the forward solve failed, or
            where its times are ``BAD_TIMES``.
        x0: dL/dx0, like ``x0``; this and every other gradient is NaN where ``status`` is not ``solvers.OK``.
        args: dL/dargs, like ``args``. As from ``jax.grad(..., allow_int=True)``, the gradient of integers, booleans and
            keys has dtype ``float0``.
        t0: dL/dt0 ``[]``, the state x0 held and with it the times of the loss.
        t1: dL/dt1 ``[]``; where the loss is of several times, that of the running loss alone.
        reconstruction_error: how far the backward solve ends from the states that it should reach, in the worst of its
            pieces, relative to the larger state at the ends of that piece ``[]``; infinite where it did not get there.
        nfe_forward: evaluations of the field in the forward solve ``[]``, int32; -1 where the solver does not count.
        nfe_backward: the same of the backward solve, each with its vector-Jacobian product.
        status: ``solvers.OK``, ``BAD_TIMES``, the failure of the forward solve, or that of the backward one, also
            ``DRIFTED`` ``[]``.
        t: where the solve that failed stopped; t0 if none did ``[]``.
    """

    loss: Array
    x0: Any
    args: Any
    t0: Array
    t1: Array
    reconstruction_error: Array
    nfe_forward: Array
    nfe_backward: Array
    status: Array
    t: Array


class Path(NamedTuple):
    """The adjoint functions at given times.

    Attributes:
        ts: the times ``[num]``.
        x: x(t) as the backward solve has it, like ``x0`` with a leading axis ``[num, ...]``.
        a_x: a_x(t) = dL/dx(t), likewise.
        a_args: a_theta(t), like ``args`` with a leading axis: dL/dargs if args acted from t on alone. Leaves that are
            not floats have ``None``.
    """

    ts: Array
    x: Any
    a_x: Any
    a_args: Any


def gradients(
    loss: Loss | None,
    field: VectorField,
    x0: Any,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    ts: Array | None = None,
    running_loss: ScalarField | None = None,
    **options: Any,
) -> tuple[Array, Any, Any]:
    """A loss of an ODE's solution and its gradients, by Pontryagin's equations solved backwards.

    dL/dx0 = dloss/dx(t1) - integral from t1 to t0 of a_x^T df/dx dt;  dL/dargs = - integral of a_x^T df/dargs dt.

    All arguments are those of ``solve``, which tells more than the gradients.

    Returns:
        The loss ``[]``, dL/dx0 like ``x0``, dL/dargs like ``args``; NaN where a solve failed or drifted.

    Raises:
        As ``solve``.
    """
    found = solve(loss, field, x0, args, t0=t0, t1=t1, ts=ts, running_loss=running_loss, **options)
    return found.loss, found.x0, found.args


def solve(
    loss: Loss | None,
    field: VectorField,
    x0: Any,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    ts: Array | None = None,
    running_loss: ScalarField | None = None,
    rtol: float | Array = 1e-5,
    atol: float | Array = 1e-5,
    solver: Any = None,
    stepsize_controller: Any = None,
    dt0: float | Array | None = None,
    max_steps: int = 4096,
    drift_limit: float | Array | None = 0.1,
    throw: bool = True,
) -> Adjoint:
    """A loss, its gradients by x0, args, t0 and t1, and how the two solves went.

    The equations are those at the head of this module. With ``ts`` the backward solve is made of pieces between the
    times, compiled once, and each piece starts from the x(t_k) of the forward solve.

    The tolerances hold for x, for a_x and for each array of a_theta, by their root mean squares: many parameters do not
    drown the error of a small state. The adjoint equations are linear in a: without a running loss they are solved for
    a divided by the largest entry of dloss/dx, so that ``atol`` means the same whatever the units of the loss.

    A first derivative is what this gives: a derivative of its own would pass through both solves.

    Args:
        loss: of x(t1), ``x1 -> []``; or with ``ts`` of the states at them, ``xs [num, ...] -> []``; ``None`` where the
            running loss is all.
        field: f, ``(t [], x, args) -> dx/dt``, like ``x``.
        x0: the initial state: a pytree of float arrays, all of one dtype.
        args: a pytree of arrays and numbers; the gradients are by its floats. What the closures of field or losses hold
            has none.
        t0: the initial time.
        t1: the final time; ``t1 < t0`` runs backwards. With ``ts`` and no running loss nothing after the last of them
            counts, and nothing is solved there.
        ts: times of the loss, between t0 and t1 and strictly in that order ``[num]``. Where tracers hide that they are
            not, the status is ``BAD_TIMES``, and loss and gradients are NaN.
        running_loss: l, ``(t [], x, args) -> []``, whose integral from t0 to t1 is part of the loss.
        rtol: relative tolerance of both solves.
        atol: absolute tolerance of both solves.
        solver: of both, as in ``solvers.odeint``. An implicit one factors a matrix of the size of (x, a_x, a_theta).
        stepsize_controller: of both, as in ``solvers.odeint``, with the norm that it comes with.
        dt0: as in ``solvers.odeint``, for the solve forwards and each piece of that backwards.
        max_steps: the most steps of the solve forwards, and of each piece of that backwards.
        drift_limit: the largest ``reconstruction_error`` with which gradients are given; ``None`` for no limit.
        throw: raise when a solve fails or drifts, if that can be known now.

    Returns:
        An ``Adjoint``.

    Raises:
        solvers.SolveError: a solve failed or drifted, ``throw`` is set and the arguments are concrete.
        ValueError: times that are not in order, or outside [t0, t1]; a loss that is not a scalar; no loss at all; a
            field whose value does not match ``x0``.
        TypeError: a state that is not floats, a loss that is not a float, complex parameters.
    """
    x0, args, dtype = _arrays(x0, args)
    t0, t1, marks, in_order = _times(t0, t1, ts, dtype)
    if loss is None and running_loss is None:
        raise ValueError(_NO_LOSS)
    _check_scalar("running_loss", running_loss, t0, x0, args)
    last = t1 if marks is None or running_loss is not None else marks[-1]
    settings = {"rtol": rtol, "atol": atol, "solver": solver, "max_steps": max_steps}

    # forwards
    steps = {"stepsize_controller": stepsize_controller, "dt0": dt0, "ts": marks, "throw": throw}
    value = jnp.zeros((), dtype)
    if running_loss is None:
        forward = solvers.solve_ode(field, x0, args, t0=t0, t1=last, **steps, **settings)
        x1, xs = forward.x, forward.xs
    else:
        both = jax.tree_util.Partial(_with_running_loss, field, running_loss)
        steps |= {"stepsize_controller": _controller(stepsize_controller, rtol, atol, t0, last)}
        forward = solvers.solve_ode(both, (x0, value), args, t0=t0, t1=last, **steps, **settings)
        (x1, value), xs = forward.x, None if marks is None else forward.xs[0]
    of = x1 if marks is None else xs
    jumps = jax.tree.map(jnp.zeros_like, of)
    if loss is not None:
        _check_scalar("loss", loss, of)
        end_loss, jumps = jax.value_and_grad(loss)(of)
        value = end_loss + value.astype(end_loss.dtype)

    # backwards, from each mark to the one before it
    if marks is None:
        marks, xs, jumps = t1[None], _lead(x1), _lead(jumps)
    elif running_loss is not None:  # from the end to the last time of the loss there is no jump, but there is a way
        marks = jnp.append(marks, t1)
        xs = jax.tree.map(lambda saved, end: jnp.concatenate([saved, end[None]]), xs, x1)
        jumps = jax.tree.map(lambda jump: jnp.concatenate([jump, jnp.zeros_like(jump[:1])]), jumps)
    scale = _scale(jumps, dtype) if running_loss is None else jnp.ones((), dtype)
    jumps = jax.tree.map(lambda jump: jump / scale, jumps)
    lows = jnp.concatenate([t0[None], marks[:-1]])
    starts = jax.tree.map(lambda first, saved: jnp.concatenate([first[None], saved[:-1]]), x0, xs)
    augmented = jax.tree_util.Partial(_augmented, field, running_loss)
    adaptive = stepsize_controller is None and dt0 is None and len(marks) > 1

    def piece(state: Any, ends: Any) -> tuple[Any, None]:
        a_x, a_theta, step, error, nfe, status, stopped = state
        high, low, x_high, x_low, jump = ends
        length = jnp.abs(high - low)
        solution = solvers.solve_ode(
            augmented,
            (x_high, jax.tree.map(jnp.add, a_x, jump), a_theta),
            args,
            t0=high,
            t1=low,
            stepsize_controller=_controller(stepsize_controller, rtol, atol, high, low),
            dt0=jnp.minimum(step, length) if adaptive else dt0,  # as the piece before had its steps
            throw=False,
            **settings,
        )
        x, a_x, a_theta = solution.x
        taken = solution.num_steps.astype(dtype)
        step = jnp.where(taken > 1, length / jnp.maximum(taken - 1, 1), jnp.maximum(step, length))
        error = jnp.maximum(error, _distance(x, x_low, x_high))
        nfe = jnp.where((nfe < 0) | (solution.nfe < 0), -1, nfe + solution.nfe)
        stopped = jnp.where(status == solvers.OK, solution.t, stopped)
        status = jnp.where(status == solvers.OK, solution.status, status)
        return (a_x, a_theta, step, error, nfe, status, stopped), None

    zero = jnp.zeros((), dtype)
    state: Any = (
        jax.tree.map(jnp.zeros_like, x0),
        [jnp.zeros(leaf.shape, dtype) for leaf in _split(args)[0]],
        0.01 * jnp.abs(last - t0),
        zero,
        jnp.int32(0),
        jnp.int32(solvers.OK),
        t0,
    )
    pieces = (marks, lows, xs, starts, jumps)
    if len(marks) == 1:
        state, _ = piece(state, jax.tree.map(lambda leaf: leaf[0], pieces))
    else:
        state, _ = jax.lax.scan(piece, state, pieces, reverse=True)
    a_x, a_theta, _, error, nfe, status, stopped = state

    # by the times, and what came of it
    by_t0 = -scale * _hamiltonian(field, running_loss, t0, x0, args, a_x)
    end = jax.tree.map(lambda leaf: leaf[-1], jumps)
    if ts is not None and running_loss is None:
        by_t1 = zero
    else:
        by_t1 = scale * _hamiltonian(field, running_loss, last, x1, args, end)
    if drift_limit is not None:
        status = jnp.where((status == solvers.OK) & ~(error <= drift_limit), DRIFTED, status)
    stopped = jnp.where(forward.status == solvers.OK, stopped, forward.t)
    status = jnp.where(forward.status == solvers.OK, status, forward.status)
    status, stopped = jnp.where(in_order, status, BAD_TIMES), jnp.where(in_order, stopped, t0)

    def checked(gradient: Array) -> Array:
        return jnp.where(status == solvers.OK, gradient, jnp.nan)

    found = Adjoint(
        jnp.where((forward.status == solvers.OK) & in_order, value, jnp.nan),
        jax.tree.map(lambda leaf: checked(scale * leaf), a_x),
        _merge(args, [checked(scale * leaf) for leaf in a_theta]),
        checked(by_t0),
        checked(by_t1),
        jnp.where(jnp.isnan(error), jnp.inf, error),
        forward.nfe,
        nfe,
        status,
        stopped,
    )
    if throw:
        raise_if_failed(found)
    return found


def objective(
    loss: Loss | None,
    field: VectorField,
    x0: Any,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    ts: Array | None = None,
    running_loss: ScalarField | None = None,
    **options: Any,
) -> tuple[Array, Adjoint]:
    """A loss whose derivative under ``jax.grad`` is Pontryagin's, for training.

    Its reverse-mode derivatives by x0, args, t0 and t1 are those of ``solve``. Where no derivative is taken, the
    compiler leaves the backward solve out.

    Args:
        loss: as in ``solve``. It may hold data in its closure, but nothing that is being differentiated.
        field: as in ``solve``, with the same proviso.
        x0: as in ``solve``.
        args: as in ``solve``.
        t0: as in ``solve``.
        t1: as in ``solve``.
        ts: as in ``solve``.
        running_loss: as in ``solve``.
        **options: as in ``solve``.

    Returns:
        The loss ``[]``, and an ``Adjoint`` to report from, which has no derivative (``has_aux=True``).

    Raises:
        As ``solve``; and, where a derivative is taken,
        ValueError: a closure holds arrays that are being differentiated.
        TypeError: a second derivative.
    """
    x0, args, dtype = _arrays(x0, args)
    t0, t1 = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    theta, merged = _split(args)
    primals = (x0, theta, t0, t1)
    held_x0, held_theta, held_t0, held_t1 = jax.lax.stop_gradient(primals)
    held = merged(held_theta)
    found = solve(loss, field, held_x0, held, t0=held_t0, t1=held_t1, ts=ts, running_loss=running_loss, **options)
    by_theta = [leaf for leaf in jax.tree.leaves(found.args) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    value = _attached(primals, _without_derivative(found.loss), (found.x0, by_theta, found.t0, found.t1))
    return value, jax.lax.stop_gradient(found)


def path(
    loss: Loss | None,
    field: VectorField,
    x0: Any,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    ts: Array,
    running_loss: ScalarField | None = None,
    rtol: float | Array = 1e-5,
    atol: float | Array = 1e-5,
    solver: Any = None,
    max_steps: int = 4096,
    drift_limit: float | Array | None = 0.1,
    throw: bool = True,
) -> Path:
    """The adjoint functions a_x(t) = dL/dx(t) and a_theta(t) of a loss at t1, at times of one's choice.

    Args:
        loss: of x(t1), ``x1 -> []``; ``None`` where the running loss is all.
        field: as in ``solve``.
        x0: as in ``solve``.
        args: as in ``solve``.
        t0: the initial time.
        t1: the final time.
        ts: the times to look at, between t0 and t1 and strictly in that order ``[num]``. Where tracers hide that they
            are not, everything is NaN.
        running_loss: as in ``solve``.
        rtol: as in ``solve``.
        atol: as in ``solve``, for the adjoint in its own units.
        solver: as in ``solve``.
        max_steps: as in ``solve``.
        drift_limit: the largest distance of the backward solve's x(t0) from ``x0``, relative to the larger of ``x0``
            and x(t1), with which anything is given; ``None`` for no limit, and all times that it reached.
        throw: raise when a solve fails or drifts, if that can be known now.

    Returns:
        A ``Path``, whose arrays but ``ts`` are NaN where a solve failed or drifted. All a_theta are kept: num copies
        of the parameters.

    Raises:
        As ``solve``; and
        ValueError: no times.
    """
    if ts is None:
        raise ValueError("ts is None: pass the times to look at, for instance jnp.linspace(t0, t1, 11).")
    if loss is None and running_loss is None:
        raise ValueError(_NO_LOSS)
    x0, args, dtype = _arrays(x0, args)
    t0, t1, times, good = _times(t0, t1, ts, dtype)
    times = cast(Array, times)
    settings: dict[str, Any] = {"rtol": rtol, "atol": atol, "solver": solver, "max_steps": max_steps}
    x1 = solvers.odeint(field, x0, args, t0=t0, t1=t1, throw=throw, **settings)
    _check_scalar("loss", loss, x1)
    _check_scalar("running_loss", running_loss, t1, x1, args)
    a_x1 = jax.tree.map(jnp.zeros_like, x1) if loss is None else jax.grad(loss)(x1)
    start = (x1, a_x1, [jnp.zeros(leaf.shape, dtype) for leaf in _split(args)[0]])
    settings |= {"stepsize_controller": _controller(None, rtol, atol, t1, t0)}
    augmented = jax.tree_util.Partial(_augmented, field, running_loss)
    found = solvers.solve_ode(augmented, start, args, t0=t1, t1=t0, ts=times[::-1], throw=False, **settings)
    error, status = _distance(found.x[0], x0, x1), found.status
    if drift_limit is not None:
        status = jnp.where((status == solvers.OK) & ~(error <= drift_limit), DRIFTED, status)
        good = good & (status == solvers.OK)
    if throw and _checks.concrete((status, found.t, error)) and int(status) != solvers.OK:
        raise solvers.SolveError(_backward_failure(int(status), float(found.t), float(error)))
    x, a_x, a_theta = jax.tree.map(lambda leaf: jnp.where(good, leaf[::-1], jnp.nan), found.xs)
    return Path(jnp.asarray(ts, dtype), x, a_x, _merge(args, a_theta, empty=True))


def drift(
    field: VectorField,
    x0: Any,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    **options: Any,
) -> Array:
    """How far x(t0), solved back from x(t1), is from x0: whether a backward solve can be trusted on this field.

    |x_back(t0) - x0| / max(|x0|, |x(t1)|), Euclidean over the whole state. It is of the order of the tolerance where
    the field is tame, and grows as exp(rate |t1 - t0|) where the field contracts at that rate. It serves any continuous
    adjoint, Diffrax's ``BacksolveAdjoint`` too.

    Args:
        field: as in ``solve``.
        x0: as in ``solve``.
        args: as in ``solve``.
        t0: the initial time.
        t1: the final time.
        **options: those of ``solvers.odeint``, for both solves; ``throw`` concerns the forward one.

    Returns:
        The relative distance ``[]``; infinite where the backward solve does not reach t0, NaN where the forward one
        fails.

    Raises:
        solvers.SolveError: the forward solve failed, ``throw`` is set and the arguments are concrete.
        TypeError: where ``x0`` is not floats.
    """
    x0, args, dtype = _arrays(x0, args)
    x1 = solvers.odeint(field, x0, args, t0=t0, t1=t1, **options)
    back = solvers.solve_ode(field, x1, args, t0=t1, t1=t0, **(options | {"throw": False}))
    error = _distance(back.x, x0, x1)
    arrived = jnp.isfinite(error)
    return jnp.where(arrived, error, jnp.where(_finite(x1), jnp.inf, jnp.nan).astype(dtype))


def raise_if_failed(found: Adjoint) -> None:
    """Raise ``solvers.SolveError`` if a solve failed or drifted, on the host; do nothing inside a transformation.

    Args:
        found: of one call of ``solve``, or of a batch of them by ``vmap`` (every field with a leading axis).

    Raises:
        solvers.SolveError: naming the cause, the time and the batch index of the first failure.
    """
    if not _checks.concrete((found.loss, found.status, found.t, found.reconstruction_error)):
        return
    status = np.asarray(found.status)
    failed = np.argwhere(status != solvers.OK)
    if len(failed) == 0:
        return
    index = tuple(failed[0])
    where = f" of element {', '.join(map(str, index))}" if index else ""
    also = f" {len(failed)} of {status.size} elements failed." if index else ""
    error, stopped, code = float(found.reconstruction_error[index]), float(found.t[index]), int(status[index])
    if code == BAD_TIMES:
        raise solvers.SolveError(
            f"ts{where} holds a time outside of the solve from t0 to t1, or out of order: pass times between the two, "
            f"strictly in that order.{also}"
        )
    if not np.isfinite(np.asarray(found.loss)[index]):
        raise solvers.SolveError(
            f"The forward solve{where} stopped at t = {stopped:.6g}: {_WORDS[code]}, or the loss is not finite.{also}"
        )
    raise solvers.SolveError(_backward_failure(code, stopped, error, where) + also)


def _backward_failure(code: int, stopped: float, error: float, where: str = "") -> str:
    """Why there is no gradient, in words, with a remedy."""
    instead = (
        "differentiate the solver itself, solvers.odeint(..., adjoint=diffrax.RecursiveCheckpointAdjoint()), "
        "or tighten rtol and atol"
    )
    if code == DRIFTED:
        return (
            f"The backward solve{where} drifted: it ends at a relative distance of {error:.3g} from the states that it "
            f"should reach, so its gradients would be those of another path. The field contracts: {instead}, or pass a "
            "larger drift_limit."
        )
    failed = f"The backward solve{where} stopped at t = {stopped:.6g}: {_WORDS[code]}."
    if code == solvers.NONFINITE:
        return (
            f"{failed} The derivative of the loss or of the field is not finite there, or fixed steps are too large. "
            "Look for norms and square roots at 0, and keep their argument away from it by jnp.where."
        )
    return (
        f"{failed} A field that contracts forwards expands backwards, and one whose derivative is not finite cannot be "
        f"passed: {instead}."
    )


_NO_LOSS = "loss and running_loss are both None: pass at least one of them."

_WORDS = {
    solvers.NONFINITE: "its state is not finite",
    solvers.MAX_STEPS: "the step limit was reached",
    solvers.STEP_UNDERFLOW: "the step shrank to the spacing of floats",
    solvers.FAILED: "the solver gave up",
}


# ------------------------------------------------------------------------------------------------- the two fields


def _with_running_loss(field: VectorField, running_loss: ScalarField, t: Array, state: Any, args: Args) -> Any:
    """The field of (x, integral of the running loss)."""
    x, integral = state
    return field(t, x, args), running_loss(t, x, args).astype(integral.dtype)


def _augmented(field: VectorField, running_loss: ScalarField | None, t: Array, state: Any, args: Args) -> Any:
    """Pontryagin's equations: the field of (x, a_x, a_theta), one evaluation of f and a product with its Jacobians."""
    x, a_x, a_theta = state
    theta, merged = _split(args)

    def both(x: Any, theta: list[Array]) -> tuple[Any, Any]:
        value = field(t, x, merged(theta))
        return value, None if running_loss is None else running_loss(t, x, merged(theta))

    (dx, rate), product = jax.vjp(both, x, theta)
    da_x, da_theta = product((jax.tree.map(jnp.negative, a_x), None if rate is None else -jnp.ones_like(rate)))
    return dx, da_x, [new.astype(old.dtype) for new, old in zip(da_theta, a_theta, strict=True)]


def _hamiltonian(field: VectorField, running_loss: ScalarField | None, t: Array, x: Any, args: Args, a_x: Any) -> Array:
    """H = a_x^T f(t, x) + l(t, x) ``[]``: dL/dt1 at the end, -dL/dt0 at the beginning."""
    products = jax.tree.map(lambda a, f: jnp.sum(a * f), a_x, field(t, x, args))
    total = sum(jax.tree.leaves(products), start=jnp.zeros((), t.dtype))
    return total if running_loss is None else total + running_loss(t, x, args).astype(t.dtype)


# -------------------------------------------------------------------------------------- derivatives of ``objective``


@jax.custom_vjp
def _attached(primals: Any, value: Array, gradients: Any) -> Array:
    """``value``, with ``gradients`` as its derivative by ``primals``."""
    return value


def _attached_forward(primals: Any, value: Array, gradients: Any) -> tuple[Array, Any]:
    return value, (primals, value, gradients)


def _attached_backward(kept: Any, cotangent: Array) -> tuple[Any, Array, Any]:
    primals, value, gradients = kept
    gradients = _only_once(gradients, primals)
    by_primals = jax.tree.map(lambda g, p: (cotangent.astype(g.dtype) * g).astype(p.dtype), gradients, primals)
    return by_primals, jnp.zeros_like(value), jax.tree.map(jnp.zeros_like, gradients)


_attached.defvjp(_attached_forward, _attached_backward)


@jax.custom_jvp
def _only_once(gradients: Any, primals: Any) -> Any:
    """``gradients``, which must not be differentiated again: they would seem not to depend on ``primals``."""
    return gradients


@_only_once.defjvp
def _only_once_jvp(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "adjoint.objective has no second derivative: use solvers.odeint with adjoint=diffrax.DirectAdjoint()."
    )


@jax.custom_jvp
def _without_derivative(value: Array) -> Array:
    """``value``, which nothing that is being differentiated may have reached: ``args`` and ``x0`` are held fixed."""
    return value


def _without_derivative_jvp(primals: Any, tangents: Any) -> Any:
    if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
        raise ValueError(
            "field or loss holds arrays that are being differentiated in its closure, where the adjoint does not see "
            "them: pass them through args, or ts as constants."
        )
    return primals[0], tangents[0]


_without_derivative.defjvp(_without_derivative_jvp, symbolic_zeros=True)


# ----------------------------------------------------------------------------------------------------- arguments


def _arrays(x0: Any, args: Args) -> tuple[Any, Args, Any]:
    """State and arguments as arrays, and the dtype of the state; Python floats in args become arrays of that dtype."""
    x0 = jax.tree.map(lambda leaf: _checks.floating("x0", leaf), x0)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(x0)}
    if len(dtypes) != 1:
        names = ", ".join(sorted(map(str, dtypes))) or "no arrays"
        raise TypeError(f"x0 must be arrays of one float dtype, got {names}: cast them to one.")
    dtype = dtypes.pop()

    def one(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic):
            leaf = jnp.asarray(leaf)
        elif isinstance(leaf, float):
            leaf = jnp.asarray(leaf, dtype)
        if isinstance(leaf, complex) or (isinstance(leaf, jax.Array) and jnp.iscomplexobj(leaf)):
            raise TypeError(
                "args holds complex numbers, whose gradient is not defined here: pass real and imaginary part."
            )
        return leaf

    return x0, jax.tree.map(one, args), dtype


def _is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _split(args: Args) -> tuple[list[Array], Callable[[list[Array]], Args]]:
    """The float arrays of args, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(args)

    def merged(theta: list[Array]) -> Args:
        new = iter(theta)
        return jax.tree.unflatten(structure, [next(new) if _is_parameter(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if _is_parameter(leaf)], merged


def _merge(args: Args, gradients: list[Array], empty: bool = False) -> Any:
    """Gradients by the floats of args, in the structure of args; for others ``float0``, or ``None`` if ``empty``."""
    leaves, structure = jax.tree.flatten(args)
    new = iter(gradients)

    def one(leaf: Any) -> Any:
        if _is_parameter(leaf):
            return next(new).astype(leaf.dtype)
        return None if empty else np.zeros(np.shape(leaf), jax.dtypes.float0)

    return jax.tree.unflatten(structure, [one(leaf) for leaf in leaves])


def _times(
    t0: float | Array, t1: float | Array, ts: Any, dtype: Any
) -> tuple[Array, Array, Array | None, bool | Array]:
    """The times in the state's dtype, and whether those of ts are in order: if not, others that are stand for them."""
    start, end = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    for name, value in (("t0", start), ("t1", end)):
        if value.shape != ():
            raise ValueError(f"{name} must be one time of shape (), got shape {value.shape}: use jax.vmap over times.")
    if ts is None:
        return start, end, None, True
    marks = jnp.asarray(ts, dtype)
    if marks.ndim != 1 or marks.size == 0:
        raise ValueError(f"ts must be at least one time [num], got shape {marks.shape}: pass None for a loss of x(t1).")
    if _checks.concrete((start, end, marks)):
        times, low, high = np.asarray(marks), float(start), float(end)
        sign = -1.0 if high < low else 1.0
        outside = times[(sign * (times - low) < 0) | (sign * (times - high) > 0) | ~np.isfinite(times)]
        if outside.size:
            raise ValueError(
                f"ts holds {outside[0]:.6g}, which is outside of the solve from t0 = {low:.6g} to t1 = {high:.6g}: "
                "move t1, or leave that time out."
            )
        wrong = np.flatnonzero(sign * np.diff(times) <= 0)
        if wrong.size:
            k = int(wrong[0])
            order = "increase" if sign > 0 else "decrease, as time does from t0 to t1,"
            raise ValueError(
                f"ts must strictly {order} but ts[{k}] = {times[k]:.6g} and ts[{k + 1}] = {times[k + 1]:.6g}: "
                "sort the times, and weigh one that counts twice in the loss."
            )
        return start, end, marks, True
    direction = jnp.where(end < start, -1, 1).astype(dtype)
    within = (direction * (marks - start) >= 0) & (direction * (end - marks) >= 0)
    in_order = jnp.all(within) & jnp.all(direction * jnp.diff(marks) > 0)
    return start, end, jnp.where(in_order, marks, jnp.linspace(start, end, marks.size)), in_order


def _check_scalar(name: str, function: Any, *arguments: Any) -> None:
    """A loss must be one float: found out by tracing it, at no cost at run time."""
    if function is None:
        return
    value = jax.eval_shape(function, *arguments)
    if not hasattr(value, "shape") or value.shape != ():
        got = f"shape {value.shape}" if hasattr(value, "shape") else type(value).__name__
        raise ValueError(f"{name} must return a scalar [], got {got}: take a sum or a mean.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must return a float, got dtype {value.dtype}.")


def _controller(given: Any, rtol: float | Array, atol: float | Array, t0: Array, t1: Array) -> Any:
    """The solver's default controller, with a norm that keeps the parts of the state apart."""
    if given is not None:
        return given
    return solvers.adaptive_steps(rtol, atol, t0, t1, norm=_largest_part)


def _largest_part(state: Any) -> Array:
    """The largest root mean square of x, a_x and each array of a_theta, or of x and the running loss's integral."""
    parts = [state[0], state[1], *(state[2] if len(state) > 2 else [])]
    return jnp.max(jnp.stack([_root_mean_square(part) for part in parts if jax.tree.leaves(part)]))


def _root_mean_square(tree: Any) -> Array:
    leaves = jax.tree.leaves(tree)
    squares, number = sum(jnp.sum(leaf**2) for leaf in leaves), sum(leaf.size for leaf in leaves)
    return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares / number)))


def _scale(jumps: Any, dtype: Any) -> Array:
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(jumps)]))
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0).astype(dtype)


def _distance(x: Any, true: Any, other: Any) -> Array:
    """|x - true| / max(|true|, |other|) ``[]``, Euclidean over a pytree; NaN where x is not finite."""

    def norm(tree: Any) -> Array:
        return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))

    far = norm(jax.tree.map(jnp.subtract, x, true))
    size = jnp.maximum(norm(true), norm(other))
    return jnp.where(far == 0, far, far / jnp.where(size > 0, size, 1.0))


def _finite(tree: Any) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _lead(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)
