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

There are two ways to the integral. In the solve, it is part of the state and the divergence is taken at every
evaluation of v. At nodes, the solver finds x(t) alone, for the divergence is no part of the dynamics; x is saved at
the nodes of a quadrature rule, and the divergences there are taken all in one batch:

    integral of div v dt ~ sum_q w_q div v(t_q, x(t_q)).

The second takes as many divergences as there are nodes instead of as many as there are evaluations, and lets each
node have its own probes, whose errors then average out along the path instead of adding up. The first has its error
in the integral controlled by the solver, wherever along the path it arises: it is the better way where div v has
kinks or peaks that a quadrature rule finds late, and in few dimensions, where a divergence costs little.

Sources: Chen et al. (2018), "Neural Ordinary Differential Equations", theorem 1; Grathwohl et al. (2019),
"FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models", equations 5 to 8; Song et al.
(2021), "Score-Based Generative Modeling through Stochastic Differential Equations", appendix D.2.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np

from dgm_jax import _checks, quadrature, solvers
from dgm_jax import divergence as divergences
from dgm_jax.probes import HadamardMatrix, hadamard_matrix, hadamard_rows, rotated
from dgm_jax.quadrature import Quadrature
from dgm_jax.types import Args, Array, Divergence, StructuredField, VectorField

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
        stderr: standard error of ``log_prob`` over the probes, in nats ``[]``; zero for an exact divergence.
        solver_error: what the solver's error may leave in ``log_prob``, in nats ``[]``: its change when the
            tolerances are ten times as large, and never less than the tolerance of one step.
        error: the root of the sum of the squares of the three errors ``[]``: one sigma of the reported interval; NaN
            where log p is not finite.
        nfe: evaluations of the velocity in the reported solve ``[]``.
        status: of the solve, ``solvers.OK`` if it reached the end ``[]``.
        quadrature_error: what the quadrature may leave in ``log_prob``, in nats ``[]``: its change from the next
            coarser rule; zero where the divergence is in the solve.
        num_divergences: how many divergences are in ``log_prob``, at nodes or in the solve ``[]``.
    """

    log_prob: Array
    stderr: Array
    solver_error: Array
    error: Array
    nfe: Array
    status: Array
    quadrature_error: Array
    num_divergences: Array


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
    rule: Quadrature | None = None,
    clock: Callable[[Array], Array] | None = None,
    **options: Any,
) -> Array:
    """log p(x) of one example by the continuity equation.

    log p(x) = log p_base(z) + integral from t_data to t_base of div v dt.

    With a ``rule``, the divergences are taken at its nodes, out of the solve. A derivative then needs an adjoint that
    allows saved times: in reverse ``RecursiveCheckpointAdjoint``, which is the default, ``DirectAdjoint`` or
    ``BacksolveAdjoint``, forward ``DirectAdjoint`` or ``ForwardMode``.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        x: one example ``[*event]``.
        args: arrays that ``velocity`` needs.
        t_data: the time at which x(t) is data.
        t_base: the time at which x(t) has the base distribution.
        divergence: how div v is computed; ``None`` is ``divergence.hutchinson`` where probes are given, else the
            velocity's own where it is a ``StructuredField``, else ``divergence.exact``.
        probes: random vectors for a stochastic divergence ``[num, *event]``, held fixed for the whole solve; with a
            ``rule`` of n nodes also ``[n, num, *event]``, each node's own: ``probes.spread(key, x, n, num)``, and in a
            basis that suits the field, ``jax.vmap(probes.rotated, (0, None))(probes.spread(key, x, n, num), basis)``.
        log_base: log-density of the base distribution, ``z [*event] -> []``; N(0, I) by default.
        rule: where to take the divergences, from ``quadrature``, such as ``quadrature.gauss_legendre(8)``; ``None``
            takes them in the solve.
        clock: the variable in which the rule's nodes lie, ``t [] -> []``: monotone from t_data to t_base, both ends
            included finite and with a derivative that is neither zero nor infinite. For a diffusion whose divergence is
            steep near the data, its log signal-to-noise ratio. ``None`` is t. The solver's first step is a hundredth of
            the interval in this variable, unless ``dt0`` says otherwise.
        **options: those of ``solvers.odeint``: ``rtol``, ``atol``, ``solver``, ``stepsize_controller``, ``dt0``,
            ``adjoint``, ``max_steps``, ``throw``.

    Returns:
        log p(x) in nats ``[]``; NaN where the solve failed.

    Raises:
        ValueError: where ``t_data == t_base``, or shapes do not match.
        TypeError: where ``x`` is not floats, or an argument is none of these.
        solvers.SolveError: where the solve fails and nothing is being transformed.
    """
    _check_options("log_prob", options)
    x = _checks.floating("x", x)
    _check_times(t_data, t_base)
    if rule is not None:
        ts, weights, first = _nodes(rule, clock, t_data, t_base, x.dtype)
        own = _probes_at_nodes(x, probes, len(ts))
        controller = options.get("stepsize_controller")
        if options.get("dt0") is None and (controller is None or hasattr(controller, "rtol")):
            options["dt0"] = first
        solution = solvers.solve_ode(velocity, x, args, t0=t_data, t1=t_base, ts=ts, **options)
        divergence_at, args = _own_divergence(velocity, divergence, probes, args)
        with jax.default_matmul_precision("highest"):
            values = jax.vmap(lambda t, y, e: divergence_at(t, y, args, e)[1], (0, 0, None if own is None else 0))(
                ts, solution.xs, own
            )
        value = _base(log_base, solution.x) + jnp.sum(weights * values)
        return jnp.where(solution.status == solvers.OK, value, jnp.nan)
    if clock is not None:
        raise ValueError("clock was given without a rule, whose nodes it would place: pass rule too.")
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
    _check_options("log_prob_batch", options)
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
    _check_options("sample", options)
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
    _check_options("sample_and_log_prob", options)
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
    key: Array | None = None,
    num_probes: int | None = None,
    basis: Array | None = None,
    probes: Array | None = None,
    log_base: Callable[[Array], Array] = standard_normal,
    in_solve: bool = False,
    max_nodes: int | None = None,
    clock: Callable[[Array], Array] | None = None,
    rtol: float | Array = 1e-5,
    atol: float | Array = 1e-5,
    stepsize_controller: Any = None,
    dt0: float | Array | None = None,
    throw: bool = True,
    **options: Any,
) -> Likelihood:
    """log p(x) of one example, with its error bar.

    The solver finds x(t) alone, and the divergences are taken at the nodes of a Clenshaw-Curtis rule, 9 of them and
    then twice as many each time, until there is a node for every two steps of the solver and the rule agrees with the
    coarser one, to within the tolerance atol + rtol |log p| or as well as the noise of the probes lets one see; or
    until there are ``max_nodes``. Two rules that agree where the one before them was far off are not believed: that
    may be chance. A peak of the divergence that is narrower than the nodes' spacing, and that the solver's steps know
    nothing of, is missed, and the interval does not tell: ``in_solve`` is for such fields.

    The divergence is exact, unless probes are asked for in one of two ways. With a ``key``, node q has rows q k to
    q k + k - 1 of a randomised Hadamard matrix, k = ``num_probes``, counted round and round: no row is used again
    before all were, so that the errors of the nodes cancel. The standard error knows which rows nodes share. With a
    ``basis`` Q besides, the rows e become Q e: without error where the columns of Q are the eigenvectors of the
    symmetric part S of the Jacobian, and with a small one where they are learnt from the S of other examples::

        symmetric = (jacobians + jacobians.swapaxes(-1, -2)) / 2       # [num, m, m], at points of their paths
        basis = jnp.linalg.eigh(symmetric.mean(0))[1]

    With ``probes``, all nodes have the same, and each alone makes an estimate L_k of the integral; the standard error
    is sd(L_k) / sqrt(num). A fixed probe's errors add up along the path: at equal cost, a key is far better.

    A second solve at ten times the tolerances and thrice the first step, or twice the equal steps, shows what the
    solver's error is, in log p_base and in the divergences at the first 9 nodes; since both solves may take the same
    steps, the tolerance of one step is its floor. Between the ends of a step x(t) is interpolated, less well than at
    its ends: next to thin data the first steps must be small, as they are with a ``clock``.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        x: one example ``[*event]``.
        args: arrays that ``velocity`` needs.
        t_data: as in ``log_prob``.
        t_base: as in ``log_prob``.
        key: a typed key, for random probes where they pay: with 16 dimensions or fewer, and with no more dimensions
            than ``num_probes``, the divergence is taken exactly all the same. So it is where the velocity has its own,
            unless probes in a space of the velocity's take at most half the multiplications.
        num_probes: of each node with a ``key``: a power of two, at least 2; by default 16.
        basis: Q ``[m, m]``, orthogonal, for the probes that a ``key`` draws, its columns vectors of the m entries of x
            in a row; with it they are in the space of x, whatever the velocity has. The error bar is right for any Q
            that does not depend on the key. ``None`` is the identity.
        probes: independent random vectors ``[num, *event]``, num at least 2. With fewer than about 16 probes the
            standard error itself is uncertain: its distribution is Student's.
        log_base: as in ``log_prob``.
        in_solve: carry the divergences in the solve, as FFJORD does; with ``probes`` or exactly. Better where the
            quadrature finds no agreement, and the only way that can be differentiated in reverse: to train, use
            ``log_prob``, with a rule or without.
        max_nodes: the most nodes: 9, 17, 33, 65, 129, ...; by default 129. x(t) is saved at all of them: where the
            velocity costs little and is smooth, 17 or 33 take half the time.
        clock: as in ``log_prob``.
        rtol: relative tolerance of the reported solve.
        atol: absolute tolerance of the reported solve.
        stepsize_controller: as in ``solvers.odeint``: ``PIDController``, whose tolerances are then those of the solve
            and of the quadrature, or ``ConstantStepSize``, with which ``rtol`` and ``atol`` are the quadrature's.
        dt0: as in ``solvers.odeint``; at nodes the hundredth of the interval that is the default is one of ``clock``.
        throw: raise when a solve fails, if that can be known now.
        **options: ``solver``, ``adjoint``, ``max_steps``, as in ``solvers.odeint``.

    Returns:
        A ``Likelihood``: value, the three errors and their sum, evaluations, divergences, status.

    Raises:
        ValueError: for a single probe, which has no standard error; for a key and probes both; for a key, a clock or
            ``max_nodes`` with ``in_solve``; for ``num_probes`` or a basis without a key; for a basis that is not
            orthogonal, which makes the value NaN where it cannot be known now; for numbers of probes or nodes that
            cannot be; and as ``log_prob``.
        TypeError: where ``x`` is not floats, ``key`` not a typed key, or an argument none of these.
        solvers.SolveError: where a solve fails and nothing is being transformed.

    Source: ``quadrature.clenshaw_curtis`` for the rule; Cochran (1977), "Sampling Techniques", theorem 2.2, for the
    variance of a mean over draws without replacement.
    """
    _check_options("likelihood", options)
    x = _checks.floating("x", x)
    _check_times(t_data, t_base)
    if probes is not None:
        if key is not None:
            raise ValueError("key and probes were both given: pass one, for they are two ways to choose the probes.")
        _checks.probes_for(x, probes)
        if probes.shape[0] < 2:
            raise ValueError(
                "probes holds a single probe, which has no standard error: pass num=2 or more, such as 16."
            )
    if num_probes is not None and key is None:
        raise ValueError("num_probes is for probes drawn here: pass a key with it, such as key=jax.random.key(0).")
    if basis is not None and key is None:
        raise ValueError(
            "basis is for probes drawn here: pass a key with it, or turn your own, probes=probes.rotated(e, basis)."
        )
    rtol, atol = solvers.tolerances(stepsize_controller, rtol, atol)
    solve = _Solve(
        velocity,
        x,
        log_base,
        {"t0": t_data, "t1": t_base, "throw": throw, **options},
        {"rtol": rtol, "atol": atol, "stepsize_controller": stepsize_controller, "dt0": dt0},
        solvers.loosen(stepsize_controller, rtol, atol, dt0, 10.0),
    )
    if in_solve:
        if key is not None or clock is not None or max_nodes is not None:
            raise ValueError(
                "key, clock and max_nodes are for divergences at nodes, and in_solve=True has none: leave them out, "
                "and pass probes instead of a key."
            )
        return _likelihood_in_solve(solve, args, probes)
    if key is not None:
        _checks.typed_key(key)
    num = 16 if num_probes is None else _checks.positive_integer("num_probes", num_probes, 2)
    if num & (num - 1):
        raise ValueError(f"num_probes must be a power of two, at least 2, got {num_probes}.")
    max_nodes = 129 if max_nodes is None else max_nodes
    with jax.default_matmul_precision("highest"):
        directions = None if basis is None else _directions(basis, x)
        return _likelihood_at_nodes(solve, args, probes, key, num, directions, max_nodes, clock, t_data, t_base)


def _directions(basis: Array, x: Array) -> Array:
    """The columns of an orthogonal matrix as events ``[m, *event]``; NaN where it is none and that is not known now."""
    known = jax.ensure_compile_time_eval() if _checks.concrete(basis) else contextlib.nullcontext()
    with known:  # so that no program carries the product that checks it
        return rotated(jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape), basis)


_FEW_DIMENSIONS = 16  # in which an exact divergence costs no more than a good stochastic one


class _Solve(NamedTuple):
    """One example and its solver at two tolerances."""

    velocity: VectorField
    x: Array
    log_base: Callable[[Array], Array]
    options: dict[str, Any]
    tight: dict[str, Any]
    loose: dict[str, Any]

    def error(self, value: Array, change: Array) -> Array:
        """The solver's error from the change between the two, with the tolerance of one step as its floor."""
        floor = 0.1 * (self.loose["atol"] + (self.loose["rtol"] + 40 * jnp.finfo(value.dtype).eps) * jnp.abs(value))
        return jnp.maximum(jnp.abs(change), jnp.asarray(floor, value.dtype))

    def beginning_with(self, step: Array) -> "_Solve":
        """The same with a first step, where it was left to the solver."""
        if self.tight["dt0"] is not None:
            return self
        tight = {**self.tight, "dt0": step}
        return self._replace(tight=tight, loose=solvers.loosen(**tight, factor=10.0))

    def tolerance(self, value: Array) -> Array:
        """Of the quadrature."""
        tolerance = self.tight["atol"] + (self.tight["rtol"] + 4 * jnp.finfo(value.dtype).eps) * jnp.abs(value)
        return jnp.asarray(tolerance, value.dtype)


def _likelihood_in_solve(solve: _Solve, args: Args, probes: Array | None) -> Likelihood:
    """The divergence as a part of the state, each probe's estimate apart."""
    if probes is None:
        field, args = _with_divergence(solve.velocity, None, None, args)
        start = (solve.x, jnp.zeros((), solve.x.dtype))
    else:
        field, args = jax.tree_util.Partial(_with_quadratic_forms, solve.velocity), (args, probes)
        start = (solve.x, jnp.zeros(probes.shape[:1], solve.x.dtype))

    def at(tolerances: dict[str, Any]) -> tuple[Array, Array, solvers.Solution]:
        solution = solvers.solve_ode(field, start, args, **solve.options, **tolerances)
        z, integral = solution.x
        return _base(solve.log_base, z) + jnp.mean(integral), integral, solution

    value, integral, solution = at(solve.tight)
    loose, _, _ = at(solve.loose)
    solver_error = solve.error(value, value - loose)
    stderr = jnp.zeros_like(value) if probes is None else _stderr(integral)
    none = jnp.zeros_like(value)
    error = jnp.hypot(stderr, solver_error)
    return Likelihood(value, stderr, solver_error, error, solution.nfe, solution.status, none, solution.nfe)


def _likelihood_at_nodes(
    solve: _Solve,
    args: Args,
    probes: Array | None,
    key: Array | None,
    num_probes: int,
    directions: Array | None,
    max_nodes: int,
    clock: Callable[[Array], Array] | None,
    t_data: float | Array,
    t_base: float | Array,
) -> Likelihood:
    """The divergences at nested nodes along x(t)."""
    x = solve.x
    nested = _nested_rule(max_nodes)
    ts, rates, step = _nodes(Quadrature(nested.nodes, np.ones(max_nodes)), clock, t_data, t_base, x.dtype)
    solve = solve.beginning_with(step)
    solution = solvers.solve_ode(solve.velocity, x, args, ts=ts, **solve.options, **solve.tight)
    loose = solvers.solve_ode(solve.velocity, x, args, ts=ts[nested.order[:_FIRST]], **solve.options, **solve.loose)
    estimate, num, rows = _estimates(solve.velocity, x, args, probes, key, num_probes, directions)

    def estimates(first: Array | int, ts: Array, xs: Array, num: int) -> Array:
        """``[nodes, num]``: the nodes from ``first`` on, in the order of visits, the first ``num`` probes of each."""
        places = first + jnp.arange(len(ts), dtype=jnp.int32)
        return jax.vmap(lambda q, t, y: estimate(q, t, y, num))(places, ts, xs)

    ts, rates = ts[nested.order], rates[nested.order]

    def nodes_of(level: Any) -> Any:
        return 1 + (_CHUNK << level)

    places = nested.order / (max_nodes - 1)
    if rows is not None:
        lucks = jnp.asarray([rows.luck(places, nodes_of(level)) for level in range(len(nested.tables[0]))], x.dtype)
    xs = solution.xs[nested.order]
    rule, coarse, coarser = (jnp.asarray(table, x.dtype) * rates[None] for table in nested.tables)
    base = _base(solve.log_base, solution.x)

    def judged(level: Array, values: Array) -> tuple[Array, Array, Array, Array]:
        """Of the rule at one level the value, its standard error, the quadrature's, and whether these are the last."""
        means, nodes = jnp.mean(values, axis=1), len(values)
        fine, before, long_before = rule[level, :nodes], coarse[level, :nodes], coarser[level, :nodes]
        value = base + jnp.sum(fine * means)
        change = jnp.abs(jnp.sum((fine - before) * means))
        earlier = jnp.abs(jnp.sum((before - long_before) * means))
        if rows is None:
            stderr = jnp.zeros_like(value) if probes is None else _stderr(fine @ values)
            noise, seen = 0.1 * stderr, change
        else:  # each node's own probes: part of both changes is their noise

            def variance(weights: Array) -> Array:
                of_nodes = jnp.asarray(places[:nodes], values.dtype)
                return rows.variance(weights, values, of_nodes, lucks[level, :nodes, :nodes])

            stderr = jnp.sqrt(variance(fine))
            of_change = variance(fine - before)
            seen = jnp.sqrt(jnp.maximum(change**2 - of_change, 0.0))
            earlier = jnp.sqrt(jnp.maximum(earlier**2 - variance(before - long_before), 0.0))
            # four sigma: of 10,000 examples that need no more nodes, one takes them
            noise = 4 * jnp.sqrt(of_change)
        gain = jnp.where(earlier > seen, seen / jnp.where(earlier > 0, earlier, 1.0), 1.0)
        # the floor: two rules may agree by chance, but seldom where the two before them were far apart
        quadrature_error = jnp.maximum(seen * jnp.maximum(gain, 0.1), earlier / 1000)
        close = quadrature_error <= jnp.maximum(noise, solve.tolerance(value))
        close &= 2 * nodes_of(level) >= solution.num_steps
        last = (level == len(nested.tables[0]) - 1) | close | ~jnp.isfinite(value)
        return value, stderr, quadrature_error, last

    def refined(state: Any) -> Any:
        level, values, _ = state
        first = nodes_of(level)

        def chunk(index: Array, values: Array) -> Array:
            start = first + _CHUNK * index
            of_ts, of_xs = (jax.lax.dynamic_slice_in_dim(array, start, _CHUNK) for array in (ts, xs))
            return jax.lax.dynamic_update_slice_in_dim(values, estimates(start, of_ts, of_xs, num), start, 0)

        values = jax.lax.fori_loop(0, 1 << level, chunk, values)
        return level + 1, values, judged(level + 1, values)

    values = estimates(0, ts[:_FIRST], xs[:_FIRST], num)
    found = judged(jnp.int32(0), values)
    values = jnp.zeros((max_nodes, num), x.dtype).at[:_FIRST].set(values)
    first = jnp.int32(0), values, found
    level, values, found = jax.lax.while_loop(lambda state: ~state[2][-1], refined, first)
    value, stderr, quadrature_error, _ = found
    few = min(num, 4)  # probes are enough, for both have the same
    loosely = estimates(0, ts[:_FIRST], loose.xs, few)
    change = jnp.abs(jnp.sum(rule[0, :_FIRST] * jnp.mean(values[:_FIRST, :few] - loosely, axis=1)))
    # the two changes often have opposite signs, and may cancel by chance
    solver_error = solve.error(value, jnp.abs(base - _base(solve.log_base, loose.x)) + change)
    value = jnp.where(solution.status == solvers.OK, value, jnp.nan)
    solver_error = jnp.where(loose.status == solvers.OK, solver_error, jnp.nan)
    error = jnp.where(jnp.isfinite(value), jnp.sqrt(stderr**2 + solver_error**2 + quadrature_error**2), jnp.nan)
    return Likelihood(
        value, stderr, solver_error, error, solution.nfe, solution.status, quadrature_error, nodes_of(level)
    )


def _estimates(
    velocity: VectorField,
    x: Array,
    args: Args,
    probes: Array | None,
    key: Array | None,
    num_probes: int,
    directions: Array | None = None,
) -> tuple[Callable[[Array, Array, Array, int], Array], int, "_Hadamard | None"]:
    """What estimates the divergence at a node: (q, t, x, num) -> ``[num]`` by the first ``num`` probes of node q.

    And how many probes that has, one if it is exact, and the rows that they are where each node has its own.
    """

    def forms(t: Array, x: Array, probes: Array) -> Array:
        return divergences.quadratic_forms(lambda y: velocity(t, y, args), x, probes)[1]

    if probes is not None:
        return lambda q, t, x, few: forms(t, x, probes[:few]), len(probes), None
    divergence_at, prepared = _own_divergence(velocity, None, None, args)
    exact = lambda q, t, x, few: divergence_at(t, x, prepared, None)[1][None], 1, None
    if key is None:
        return exact
    if isinstance(velocity, StructuredField):
        if velocity.with_forms is None or velocity.probe_space is None:
            return exact
        own = velocity.with_forms
        dim, worth = velocity.probe_space(prepared)
        num = min(num_probes, 1 << (dim - 1).bit_length())
        if worth < 2 * num:
            return exact
        if directions is None:
            rows = _Hadamard.draw(key, jax.ShapeDtypeStruct((dim,), x.dtype), num)
            return lambda q, t, x, few: own(t, x, prepared, rows.at_node(q)[:few])[1], num, rows
    if x.size <= max(_FEW_DIMENSIONS, num_probes):
        return exact
    rows = _Hadamard.draw(key, x, num_probes, directions)
    return lambda q, t, x, few: forms(t, x, rows.at_node(q)[:few]), num_probes, rows


_FIRST, _CHUNK = 9, 8  # nodes of the first rule, and of one batch after it


class _Nested(NamedTuple):
    """Clenshaw-Curtis rules of 9, 17, 33, ... nodes, each level's new nodes after those of the last."""

    nodes: np.ndarray  # increasing [max_nodes]
    order: np.ndarray  # of the visits [max_nodes]
    tables: tuple[np.ndarray, np.ndarray, np.ndarray]  # weights of a level's rule, the last one's, that before [L, n]


def _nested_rule(max_nodes: int) -> _Nested:
    max_nodes = _checks.positive_integer("max_nodes", max_nodes, 9)
    levels = (max_nodes - 1).bit_length() - 4
    if max_nodes != 8 * 2**levels + 1 or levels < 0:
        raise ValueError(f"max_nodes must be 9, 17, 33, 65, 129, ..., got {max_nodes}.")
    weights: list[np.ndarray] = []
    order: list[int] = []
    for num in (3, 5, *(8 * 2**level + 1 for level in range(levels + 1))):
        stride = (max_nodes - 1) // (num - 1)
        one = np.zeros(max_nodes)
        one[::stride] = quadrature.clenshaw_curtis(num).weights
        weights.append(one)
        if num >= _FIRST:
            order += [i for i in range(0, max_nodes, stride) if i not in set(order)]
    table = np.stack(weights)[:, order]
    nodes = quadrature.clenshaw_curtis(max_nodes).nodes
    return _Nested(nodes, np.asarray(order), (table[2:], table[1:-1], table[:-2]))


class _Hadamard(NamedTuple):
    """Rows of a randomised Hadamard matrix, k of them for each node, round and round."""

    matrix: HadamardMatrix
    shape: tuple[int, ...]  # of an event
    num: int  # k, which divides P
    directions: Array | None  # of the coordinates of a row [m, *event]; those of an event where there are none

    @classmethod
    def draw(cls, key: Array, x: Any, num: int, directions: Array | None = None) -> "_Hadamard":
        """For examples like ``x``, ``num`` rows a node."""
        return cls(hadamard_matrix(key, x.size, x.dtype), x.shape, num, directions)

    def at_node(self, q: Array) -> Array:
        """The probes of the q-th node ``[k, *event]``."""
        rows = hadamard_rows(self.matrix, q * self.num + jnp.arange(self.num, dtype=q.dtype))
        return (
            rows.reshape(self.num, *self.shape) if self.directions is None else jnp.tensordot(rows, self.directions, 1)
        )

    def luck(self, places: np.ndarray, num: int) -> np.ndarray:
        """What finds the luck of rows in the logarithms of the nodes' variances, ``num`` of them visited ``[n, n]``.

        Some rows vary more than others do, at all nodes that have them. In log s_q^2 that adds to a smooth function of
        u_q a number of variance 2 / (k - 1) that is the same at all of these nodes; this is its best linear prediction.
        The smooth function is a Gaussian process of standard deviation 2, correlated over 0.4 of the path, with any
        mean. Zero where there are not two nodes for each row: there, luck looks like a change along the path.
        """
        num_groups = len(self.matrix.order) // self.num
        table = np.zeros((len(places), len(places)))
        if num_groups > 1 and num >= 2 * num_groups:
            groups, u = np.arange(num) % num_groups, places[:num]
            same = 2 / (self.num - 1) * (groups[:, None] == groups[None, :])
            smooth = 4 * np.exp(-((u[:, None] - u[None, :]) ** 2) / (2 * 0.4**2)) + 100 + 4e-4 * np.eye(num)
            table[:num, :num] = same @ np.linalg.inv(smooth + same)
        return table

    def variance(self, weights: Array, values: Array, places: Array, luck: Array) -> Array:
        """Of sum_q weights_q mean_i values_qi over the draw of the rows; nodes of weight zero were not visited.

        The forms of a row at nodes q and q' are taken to have covariance s_q s_q' rho(u_q - u_q') over all P rows. The
        rows of the nodes with one remainder modulo G = P / k are the same, and otherwise different ones, drawn without
        replacement, whose covariance is -1 / (P - 1) times as large. With a_q = weights_q s_q,

            Var = sum_qq' a_q a_q' rho(u_q - u_q') (G [q and q' share rows] - 1) / (P - 1):

        rows in equal use cancel. That they do so is seen only by s_q without the luck of the rows that node q has.
        rho(u) = (1 + kappa |u|) exp(-kappa |u|), and kappa is what makes 2 (1 - rho) the mean square of the differences
        of a row's forms at two nodes, each over s_q, at the typical distance of two nodes that share rows. Where no two
        do, rho(u) is taken as zero for u != 0, which gives an upper bound. u is in ``places``, from 0 to 1; ``luck`` is
        what ``luck`` made of them.

        Source: Robinson (1991), "That BLUP is a Good Thing: The Estimation of Random Effects", for the prediction of
        luck; Rasmussen & Williams (2006), "Gaussian Processes for Machine Learning", equation 4.17, for rho.
        """
        num_rows = len(self.matrix.order)
        num_groups = num_rows // self.num
        if num_groups == 1:  # all rows at every node: there each trace is exact
            return jnp.zeros((), values.dtype)
        tiny = jnp.finfo(values.dtype).tiny
        centred = values - jnp.mean(values, axis=1, keepdims=True)
        squares = jnp.sum(centred**2, axis=1) / (self.num - 1) * ((num_rows - 1) / num_rows)
        scale = jnp.sqrt(squares)
        fair = squares * jnp.exp(-luck @ jnp.log(jnp.maximum(squares, 1e-3 * jnp.max(squares) + tiny)))
        fair *= jnp.sum(weights**2 * squares) / jnp.maximum(jnp.sum(weights**2 * fair), tiny)
        a = weights * jnp.sqrt(fair)
        groups = np.arange(len(values)) % num_groups
        share = jnp.asarray(groups[:, None] == groups[None, :])
        again = jnp.where(share & ~jnp.eye(len(values), dtype=bool), jnp.abs(a[:, None] * a[None, :]), 0.0)
        total = jnp.sum(again)
        unit = centred / jnp.where(scale > 0, scale, 1.0)[:, None]
        squares_of_unit = jnp.sum(unit**2, axis=1)
        differences = squares_of_unit[:, None] + squares_of_unit[None, :] - 2 * unit @ unit.T
        distances = jnp.abs(places[:, None] - places[None, :])
        own = jnp.sum(again * differences) / jnp.maximum(total, tiny) / (2 * (self.num - 1))
        typical = (jnp.sum(again * jnp.sqrt(distances)) / jnp.maximum(total, tiny)) ** 2
        z = np.linspace(0.0, 6.6, 133)  # of which 1 - rho goes from 0 to 0.99
        table = (jnp.asarray(each, values.dtype) for each in (1 - (1 + z) * np.exp(-z), z))
        kappa = jnp.interp(own, *table) / jnp.maximum(typical, tiny)
        rho = jnp.where(
            total > 0, (1 + kappa * distances) * jnp.exp(-kappa * distances), jnp.eye(len(values), dtype=values.dtype)
        )
        signed = rho * (jnp.where(share, num_groups, 0.0) - 1) / (num_rows - 1)
        return jnp.maximum(a @ signed @ a, 0.0)


def _nodes(
    rule: Quadrature, clock: Callable[[Array], Array] | None, t_data: float | Array, t_base: float | Array, dtype: Any
) -> tuple[Array, Array, Array]:
    """The rule's nodes as times from t_data to t_base, its weights times dt/du there, and the solver's first step.

    That step is a hundredth of the interval as the clock has it. x(t) at a node within a step is interpolated, with an
    error that the solver does not look at: next to data at t = 0.001, a hundredth of [0, 1] steps over half the nodes.

    NaN for a bad clock.
    """
    if not isinstance(rule, Quadrature):
        raise TypeError(
            f"rule must be a quadrature.Quadrature, got {type(rule).__name__}: quadrature.gauss_legendre(8)."
        )
    u, weights = jnp.asarray(rule.nodes, dtype), jnp.asarray(rule.weights, dtype)
    start, end = _checks.one_time(t_data, dtype), _checks.one_time(t_base, dtype)
    if clock is None:
        ts = start * (1 - u) + end * u
        length = end - start
        return jnp.clip(ts, jnp.minimum(start, end), jnp.maximum(start, end)), weights * length, 0.01 * jnp.abs(length)
    first, last = _checks.like("clock", clock(start), (), dtype), _checks.like("clock", clock(end), (), dtype)
    if _checks.concrete((first, last)) and not (np.isfinite(first) and np.isfinite(last) and first != last):
        raise ValueError(
            f"clock must go from one finite value to another, got {float(first)} at t_data and {float(last)} at "
            "t_base: move t_data or t_base to where it is finite, or pass clock=None."
        )
    wanted = first + u * (last - first)

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        beyond = (jax.vmap(clock)(middle) - wanted) * jnp.sign(last - first) > 0
        return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high)

    def rate(ts: Array) -> Array:
        return jax.vmap(lambda t: jax.jvp(clock, (t,), (jnp.ones_like(t),))[1])(ts)

    bracket = jnp.broadcast_to(start, u.shape), jnp.broadcast_to(end, u.shape)
    low, high = jax.lax.fori_loop(0, jnp.finfo(dtype).nmant + 8, halve, jax.lax.stop_gradient(bracket))
    found = jnp.where(u == 0, start, jnp.where(u == 1, end, 0.5 * (low + high)))
    found = jax.lax.stop_gradient(found)
    # Newton's step, which is zero but for its derivative: the times move with the clock and with both ends
    ts = found - _only_derivative(jax.vmap(clock)(found) - wanted) / jax.lax.stop_gradient(rate(found))
    rates = (last - first) / rate(ts)
    sound = jnp.all(jnp.isfinite(rates) & (rates * (end - start) > 0))
    if _checks.concrete(sound) and not sound:
        raise ValueError(
            "clock must be monotone from t_data to t_base, with a derivative that is neither zero nor infinite, both "
            "ends included: move t_data or t_base, or pass clock=None."
        )
    first_step = 0.01 * jnp.abs((last - first) / rate(start[None])[0])
    return ts, jnp.where(sound, weights * rates, jnp.nan), jnp.where(sound, first_step, jnp.nan)


def _only_derivative(value: Array) -> Array:
    """Zero, with the derivative of ``value``."""
    return value - jax.lax.stop_gradient(value)


def _probes_at_nodes(x: Array, probes: Array | None, num_nodes: int) -> Array | None:
    """``[nodes, num, *event]``: each node's own probes, or all the same."""
    if probes is None:
        return None
    if probes.ndim == x.ndim + 2:
        if probes.shape[0] != num_nodes:
            raise ValueError(f"probes has shape {probes.shape}, but the rule has {num_nodes} nodes: one set for each.")
        _checks.probes_for(x, probes[0])
        return probes
    _checks.probes_for(x, probes)
    return jnp.broadcast_to(probes, (num_nodes, *probes.shape))


def _own_divergence(
    velocity: VectorField, divergence: Divergence | None, probes: Array | None, args: Args
) -> tuple[Callable[[Array, Array, Args, Array | None], tuple[Array, Array]], Args]:
    """(t, x, args, probes) -> v and div v by the divergence named, or else the best at hand; and those arguments."""
    if divergence is None and probes is None and isinstance(velocity, StructuredField):
        with jax.default_matmul_precision("highest"):
            return jax.tree_util.Partial(_structured, velocity), velocity.prepare(args)
    if divergence is None:
        divergence = divergences.exact if probes is None else divergences.hutchinson
    return jax.tree_util.Partial(_of_field, velocity, divergence), args


def _structured(
    velocity: StructuredField, t: Array, x: Array, prepared: Any, probes: Array | None
) -> tuple[Array, Array]:
    return velocity.with_divergence(t, x, prepared)


def _of_field(
    velocity: VectorField, divergence: Divergence, t: Array, x: Array, args: Args, probes: Array | None
) -> tuple[Array, Array]:
    return divergence(lambda y: velocity(t, y, args), x, probes)


def _with_divergence(
    velocity: VectorField, divergence: Divergence | None, probes: Array | None, args: Args
) -> tuple[Callable, Args]:
    """The field of (x, integral of the divergence), and its arguments.

    A ``Partial`` of a module-level function, so that a second call with the same velocity compiles nothing.
    """
    divergence_at, args = _own_divergence(velocity, divergence, probes, args)
    return jax.tree_util.Partial(_augmented, divergence_at), (args, probes)


def _augmented(divergence_at: Callable, t: Array, state: Any, args: Args) -> Any:
    args, probes = args
    x, _ = state
    return divergence_at(t, x, args, probes)


def _with_quadratic_forms(velocity: VectorField, t: Array, state: Any, args: Args) -> Any:
    args, probes = args
    x, _ = state
    return divergences.quadratic_forms(lambda y: velocity(t, y, args), x, probes)


def _stderr(estimates: Array) -> Array:
    """Of the mean of independent estimates ``[num]``."""
    return jnp.std(estimates, ddof=1) / jnp.sqrt(jnp.asarray(len(estimates), estimates.dtype))


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


_OPTIONS = ("rtol", "atol", "solver", "stepsize_controller", "dt0", "adjoint", "max_steps", "throw")
_REMEDIES = {
    "rule": "likelihood chooses its nodes itself, at most max_nodes; a rule of your own goes into "
    "flows.log_prob(rule=...), one example at a time",
    "clock": "it places the nodes of flows.likelihood, and of flows.log_prob with a rule",
    "divergence": "likelihood takes it exactly, or with key or probes by quadratic forms, whose error can be told; any "
    "other goes into flows.log_prob(divergence=...)",
    "key": "only likelihood draws probes itself; pass probes=probes.rademacher(key, x, num), or with a rule of n nodes "
    "probes=probes.spread(key, x, n, num)",
    "num_probes": "it goes with the key of flows.likelihood; as many as probes holds are used",
    "basis": "it goes with the key of flows.likelihood; turn the probes that you pass, probes.rotated(e, basis)",
    "ts": "states on the way are what solvers.solve_ode(ts=...) returns",
    "t0": "the times are t_data and t_base",
    "t1": "the times are t_data and t_base",
}


def _check_options(function: str, options: dict[str, Any]) -> None:
    """No argument may reach the solver that is none of its options: its message would name another function."""
    for name in options:
        if name not in _OPTIONS:
            remedy = _REMEDIES.get(name, f"what goes to the solver is {', '.join(_OPTIONS)}")
            raise TypeError(f"flows.{function} has no argument {name}: {remedy}.")
