"""Penalties that make the paths of a continuous normalizing flow easy to solve: fewer evaluations, the same density.

A density fixes where a flow must take its mass, not how: of the many velocities that reach it a solver follows those
with straight paths in few steps. Each penalty is integrated along the path, over time counted forwards:

    kinetic energy      integral of |v|^2 |dt|              Finlay et al., the cost of optimal transport
    Jacobian            integral of |dv/dx|_F^2 |dt|        Finlay et al., how fast neighbours part
    derivative of x     integral of |d^K x/dt^K|^2 |dt|     Kelly et al., what a solver of order K - 1 leaves out
    random end times    t_1 ~ U(t_1 - b, t_1 + b)           Ghosh et al., a model that has to be right over an interval

The first two ride along with the divergence: ``penalized`` is a divergence for the functions of ``flows``, which then
give the penalised log-likelihood in the one solve that they make::

    objective = flows.log_prob(v, x, params, t_data=1.0, t_base=0.0, probes=e,
                               divergence=regularizers.penalized(kinetic=0.01, jacobian=0.01, t_data=1.0, t_base=0.0))

Report log p itself without it. Any other cost of t and x is for ``path_integral``.

Sources: Finlay et al. (2020), "How to train your neural ODE: the world of Jacobian and kinetic regularization"; Kelly
et al. (2020), "Learning differential equations that are easy to solve"; Ghosh et al. (2020), "STEER: Simple temporal
regularization for neural ODEs".
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dgm_jax import solvers
from dgm_jax._checks import at_least, concrete, evaluate, floating, one_time, probes_for, typed_key
from dgm_jax.quadrature import Quadrature, gauss_legendre
from dgm_jax.types import Args, Array, Divergence, ScalarField, VectorField

__all__ = ["path_integral", "penalized", "random_end", "total_derivative"]


def penalized(
    *, kinetic: float | Array = 0.0, jacobian: float | Array = 0.0, t_data: float | Array, t_base: float | Array
) -> Divergence:
    """Make a divergence by which ``flows.log_prob`` gives log p(x) - penalties.

    log p(x) - integral of (kinetic |v|^2 + jacobian |dv/dx|_F^2) |dt| along the path of x.

    With probes e_k the divergence is Hutchinson's and |dv/dx|_F^2 ~ mean_k |e_k^T dv/dx|^2, unbiased too, from the
    same products; without, both are exact, from all rows of the Jacobian at once, which is for few dimensions.

    Args:
        kinetic: weight of the kinetic energy, not negative ``[]``.
        jacobian: weight of the squared Frobenius norm of the Jacobian, not negative ``[]``.
        t_data: that of the flow.
        t_base: that of the flow: which of the two is later gives dt its sign.

    Returns:
        A divergence ``(f, x, probes | None) -> (f(x), div f(x) - penalties)``. Make it once: each new one compiles
        anew.

    Raises:
        ValueError: a negative weight, or ``t_data == t_base``.

    Source: Finlay et al. (2020), equation 7, and section 3 for the estimate by the same products.
    """
    for name, weight in (("kinetic", kinetic), ("jacobian", jacobian)):
        if concrete(weight) and not float(weight) >= 0:
            raise ValueError(f"{name} must not be negative, got {float(weight)}: it is the weight of a penalty.")
    if concrete((t_data, t_base)) and float(t_data) == float(t_base):
        raise ValueError(f"t_data and t_base are both {float(t_data)}: a flow needs two times.")

    def divergence(f: Callable[[Array], Array], x: Array, probes: Array | None = None) -> tuple[Array, Array]:
        x = floating("x", x)
        exact = probes is None
        e = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape) if exact else probes_for(x, probes)
        value, pull = jax.vjp(f, x)
        rows = jax.vmap(lambda one: pull(one)[0])(e)
        total, squares = jnp.sum(e * rows), jnp.sum(jnp.square(rows))
        if not exact:
            total, squares = total / e.shape[0], squares / e.shape[0]
        sign = jnp.sign(one_time(t_base, x.dtype) - one_time(t_data, x.dtype))
        weights = [jnp.asarray(weight, x.dtype) for weight in (kinetic, jacobian)]
        return value, total - sign * (weights[0] * jnp.sum(jnp.square(value)) + weights[1] * squares)

    return divergence


def total_derivative(velocity: VectorField, order: int) -> VectorField:
    """The derivative d^K x/dt^K of a solution of dx/dt = v(t, x), as a field of t and x.

    d^1 = v,  d^(k+1) = partial_t d^k + (dd^k/dx) v: each one by forward mode along (1, v).

    For the penalty |d^K x/dt^K|^2, with K = 2 or 3 where a solver of order 5 is to take large steps. Written out, the
    cost doubles with K; under ``jax.jit`` the compiler makes what the products share once, and a dense network with
    two hidden layers of 32 takes 2.0, 3.2 and 4.5 times the operations of v for K = 2, 3 and 4. The recursion in
    Taylor series of the source, by ``jax.experimental.jet``, gives the same numbers for 4.0, 7.5 and 11.4 times, and
    does not know all operations.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        order: K, at least 1.

    Returns:
        The field ``(t [], x [*event], args) -> [*event]``.

    Raises:
        TypeError: ``order`` not an int.
        ValueError: ``order`` less than 1.

    Source: Kelly et al. (2020), section 3.
    """
    field = velocity
    for _ in range(at_least("order", order, 1) - 1):
        field = _along_the_path(field, velocity)
    return field


def path_integral(
    cost: ScalarField,
    velocity: VectorField,
    x: Array,
    args: Args = None,
    *,
    t0: float | Array,
    t1: float | Array,
    rule: Quadrature | None = None,
    **options: Any,
) -> Array:
    """The integral of a cost along the path that starts in x: int of c(t, x(t)) |dt| between t0 and t1.

    The path is solved alone and the cost taken at the nodes of the rule.

    Args:
        cost: c, ``(t [], x [*event], args) -> []``, such as ``lambda t, x, args: jnp.sum(d2(t, x, args) ** 2)``.
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        x: x(t0) ``[*event]``.
        args: arrays that ``cost`` and ``velocity`` need.
        t0: the time of x.
        t1: the time to go to.
        rule: where to take the cost; 8 Gauss-Legendre nodes by default.
        **options: those of ``solvers.odeint``.

    Returns:
        The integral ``[]``; NaN where the solve failed.

    Raises:
        TypeError: ``x`` not of floats.
        ValueError: a cost that is not a scalar.
        solvers.SolveError: where the solve fails and nothing is being transformed.
    """
    x = floating("x", x)
    rule = gauss_legendre(8) if rule is None else rule
    start, end = one_time(t0, x.dtype), one_time(t1, x.dtype)
    nodes, weights = jnp.asarray(rule.nodes, x.dtype), jnp.asarray(rule.weights, x.dtype)
    ts = start + nodes * (end - start)
    solution = solvers.solve_ode(velocity, x, args, t0=t0, t1=t1, ts=ts, **options)
    costs = jax.vmap(lambda t, y: cost(t, y, args))(ts, solution.xs)
    if costs.shape != weights.shape:
        raise ValueError(
            f"cost must return a scalar for one example, got shape {costs.shape[1:]}: sum what it returns."
        )
    value = jnp.abs(end - start) * jnp.sum(weights * costs)
    return jnp.where(solution.status == solvers.OK, value, jnp.nan)


def random_end(
    key: Array, t0: float | Array, t1: float | Array, width: float | Array, dtype: Any = jnp.float32
) -> Array:
    """Draw the end of a training solve near t1, t ~ U(t1 - width, t1 + width): its mean is t1.

    One draw serves a whole batch. Sample and report with t1 itself.

    Args:
        key: a typed key.
        t0: the other end of the solve.
        t1: the end that moves.
        width: b, at least 0 and less than |t1 - t0|, so that the solve keeps its direction.
        dtype: of the result.

    Returns:
        A time ``[]``.

    Raises:
        TypeError: an old-style key.
        ValueError: ``width`` negative, or not less than |t1 - t0|.

    Source: Ghosh et al. (2020), section 3.
    """
    key = typed_key(key)
    if concrete((t0, t1, width)) and not 0 <= float(width) < abs(float(t1) - float(t0)):
        raise ValueError(
            f"width must be at least 0 and less than |t1 - t0| = {abs(float(t1) - float(t0))}, got {float(width)}: "
            "a longer one would turn the solve round."
        )
    return jnp.asarray(t1, dtype) + jnp.asarray(width, dtype) * jax.random.uniform(key, (), dtype, -1, 1)


def _along_the_path(field: VectorField, velocity: VectorField) -> VectorField:
    """partial_t f + (df/dx) v."""

    def derivative(t: Array, x: Array, args: Args) -> Array:
        t, x = one_time(t, floating("x", x).dtype), floating("x", x)
        v = evaluate("velocity", velocity, t, x, args)
        return jax.jvp(lambda t, x: field(t, x, args), (t, x), (jnp.ones_like(t), v))[1]

    return derivative
