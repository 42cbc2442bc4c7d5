"""The divergence div f(x) = sum_i df_i/dx_i = tr J(x), J the Jacobian, always together with f(x).

Every function evaluates f once, and then takes quadratic forms e^T J e from both ends. Where B is the part of f from
its last matrix product (or convolution) on, and A the part before it, J = B A, A e goes forward and B^T e in reverse:

    e^T J e = (B^T e) . (A e).

Unit vectors, and probes that the examples of a batch share, are the same for all examples, and so they pass the first
and the last product of f once for the whole batch: of the products of a network of two hidden layers only the one
between them is left for each example. With m entries in x and k probes:

    method            forms e^T J e     activations in memory, times f's  error
    exact             m                 up to 16                          none
    exact_in_chunks   m                 ``size``                          none
    hutchinson        k                 up to 8                           standard deviation ~ 1 / sqrt(k)

Up to m = 8 there is little to share, and products e^T J are taken; k probes of m or more then take the m products of
the whole Jacobian.

How many products are taken at once is a matter of the processor's cache, which should hold them, under
``jax.vmap`` those of the whole batch; the rest follow in a loop.

All of them can be differentiated in reverse and forward, and run inside ``jax.lax.while_loop``. In reverse, the loop
keeps nothing of its blocks and computes each again.

``mode="reverse"`` takes products e^T J. In the gradient of a divergence by many probes in few dimensions (m = 64) they
are faster by a fifth; at m = 784 they are not. Where f has no reverse mode, as with a ``jax.lax.while_loop`` in it,
``mode="forward"`` takes the products J e; for 16 probes of one example alone it is also the fastest on a CPU::

    forward = partial(divergence.exact, mode="forward")         # make it once: each new one compiles anew
    flows.log_prob(velocity, x, args, divergence=forward, ...)

Some fields know their own divergence, exactly and more cheaply, as many networks of ``networks.vector_field`` do:
``of_field`` asks them for it.

benchmarks/trace_estimators.py prints what the value and its gradient cost beside f.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp

from dgm_jax import _blocks
from dgm_jax._checks import at_least, evaluate, floating, like, probes_for
from dgm_jax.types import Args, Array, Divergence, ScalarField, StructuredField, VectorField

__all__ = [
    "Energy",
    "exact",
    "exact_in_chunks",
    "gradient",
    "hutchinson",
    "laplacian",
    "of_field",
    "quadratic_forms",
]


class Energy(NamedTuple):
    """A scalar field that knows its Laplacian, as a ``types.StructuredField`` knows its divergence.

    Attributes:
        field: ``(t [], x [*event], args) -> []``.
        prepare: ``args -> prepared``, any pytree of arrays: what does not depend on t and x.
        with_laplacian: ``(t [], x [*event], prepared) -> (field(t, x, args) [], its Laplacian over x [])``.
    """

    field: ScalarField
    prepare: Callable[[Args], Any]
    with_laplacian: Callable[[Array, Array, Any], tuple[Array, Array]]

    def __call__(self, t: Array, x: Array, args: Args) -> Array:
        """field(t, x, args)."""
        return self.field(t, x, args)


def exact(
    f: Callable[[Array], Array],
    x: Array,
    probes: Array | None = None,
    *,
    mode: Literal["both", "reverse", "forward"] = "both",
) -> tuple[Array, Array]:
    """Compute f(x) and its divergence from the diagonal of the Jacobian, all m entries of it.

    div f(x) = sum_i e_i^T J e_i, e_i the unit vectors.

    Up to m = 16 they are taken all at once, and beyond in blocks of 4 to 16, so that neither the memory of the value
    nor that of its derivative grows with m^2. ``exact_in_chunks`` sets the block by hand.

    Args:
        f: ``[*event] -> [*event]``.
        x: one example ``[*event]``.
        probes: not used; there so that every divergence is called alike.
        mode: "both" from both ends, which is "reverse" up to m = 8 and where f has no product of matrices, or a
            ``jax.custom_vjp`` somewhere; "reverse" for products e^T J; "forward" for J e: where f has no reverse mode.

    Returns:
        f(x) ``[*event]`` and div f(x) ``[]``.

    Raises:
        TypeError: ``x`` not of floats, or f(x) of another dtype.
        ValueError: f(x) of another shape, or an unknown ``mode``.
    """
    value, entry = _entries(f, x, mode)
    return value, _trace(entry, value, _blocks.most(x.size))


def exact_in_chunks(size: int, *, mode: Literal["both", "reverse", "forward"] = "both") -> Divergence:
    """Make an exact divergence that holds only ``size`` rows of the Jacobian at a time.

    The unit vectors come from their indices and one chunk follows another, in the derivative too, so
    memory grows with ``size`` and not with m.

    Args:
        size: rows in a chunk, at least 1; it need not divide m. Larger is faster while the rows fit the
            processor's cache.
        mode: as in ``exact``.

    Returns:
        A divergence, called as ``exact`` is.

    Raises:
        TypeError: ``size`` not an int.
        ValueError: ``size`` less than 1.
    """
    size = at_least("size", size, 1)

    def divergence(f: Callable[[Array], Array], x: Array, probes: Array | None = None) -> tuple[Array, Array]:
        value, entry = _entries(f, x, mode)
        return value, _trace(entry, value, size)

    return divergence


def quadratic_forms(
    f: Callable[[Array], Array],
    x: Array,
    probes: Array | None,
    *,
    mode: Literal["both", "reverse", "forward"] = "both",
) -> tuple[Array, Array]:
    """Compute f(x) and e^T J e for every probe e: unbiased estimates of the divergence, one a probe.

    Args:
        f: ``[*event] -> [*event]``.
        x: one example ``[*event]``.
        probes: ``[num, *event]`` with identity covariance, from ``dgm_jax.probes``.
        mode: as in ``exact``.

    Returns:
        f(x) ``[*event]`` and the estimates ``[num]``. With independent probes, their standard deviation
        over sqrt(num) is the standard error of their mean.

    Raises:
        TypeError: ``x`` not of floats, or f(x) or ``probes`` of another dtype.
        ValueError: f(x) of another shape, ``probes`` None or of the wrong shape, or an unknown ``mode``.

    Source: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines", section 2.
    """
    x = floating("x", x)
    probes = probes_for(x, probes)
    num = probes.shape[0]
    whole_jacobian = num > 1 and num >= x.size <= _FEW  # it takes fewer products
    ends = _both_ends(f, x) if mode == "both" else None
    if ends is not None:
        value, form = ends
    else:
        value, product = _products(f, x, "reverse" if mode == "both" else mode)

        def form(e: Array) -> Array:
            return jnp.sum(e * product(e))

    if num == 1:
        return value, form(probes[0])[None]
    if whole_jacobian:
        jacobian = jax.vmap(product)(jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape))
        rows = probes.reshape(num, x.size)
        # entry by entry: XLA takes the products of small matrices, one for each example, one after the other
        squares = rows[:, :, None] * rows[:, None, :]
        return value, jnp.sum(squares * jacobian.reshape(1, x.size, x.size), axis=(1, 2))
    size = _blocks.even(num, _PROBES)
    if size == num:
        return value, jax.vmap(form)(probes)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(start: Array) -> Array:  # cut out here: as an input of the loop, the probes would be copied
        return jax.vmap(form)(jax.lax.dynamic_slice_in_dim(probes, start, size))

    whole = num // size
    forms = jax.lax.map(block, size * jnp.arange(whole)).reshape(-1)
    if whole * size < num:
        forms = jnp.concatenate([forms, jax.vmap(form)(probes[whole * size :])])
    return value, forms


def hutchinson(
    f: Callable[[Array], Array],
    x: Array,
    probes: Array | None,
    *,
    mode: Literal["both", "reverse", "forward"] = "both",
) -> tuple[Array, Array]:
    """Compute f(x) and Hutchinson's unbiased estimate of its divergence.

    div f(x) ~ 1/num sum_k e_k^T J e_k.

    Args:
        f: ``[*event] -> [*event]``.
        x: one example ``[*event]``.
        probes: ``[num, *event]`` with identity covariance, from ``dgm_jax.probes``. Keep them fixed for
            a whole ODE solve, so that the field is one ODE.
        mode: as in ``exact``.

    Returns:
        f(x) ``[*event]`` and the estimate ``[]``.

    Raises:
        TypeError: ``x`` not of floats, or f(x) or ``probes`` of another dtype.
        ValueError: f(x) of another shape, ``probes`` None or of the wrong shape, or an unknown ``mode``.

    Source: Grathwohl et al. (2019), "FFJORD: Free-form continuous dynamics for scalable reversible
    generative models", section 3.1.
    """
    value, estimates = quadratic_forms(f, x, probes, mode=mode)
    return value, jnp.mean(estimates)


def of_field(
    field: VectorField,
    t: Array,
    x: Array,
    args: Args = None,
    *,
    divergence: Divergence | None = None,
    probes: Array | None = None,
    name: str = "field",
) -> tuple[Array, Array]:
    """Compute f(t, x, args) and its divergence over x: as the caller says, or else by the best way at hand.

    A ``types.StructuredField`` is asked for its own divergence, unless a divergence or probes are named.

    Args:
        field: f, ``(t [], x [*event], args) -> [*event]``.
        t: time ``[]``.
        x: one example ``[*event]``.
        args: passed to the field: parameters, conditioning.
        divergence: how it is computed; ``None`` is the field's own where it offers one, else ``exact``, or
            ``hutchinson`` where ``probes`` are given.
        probes: random vectors for a stochastic divergence ``[num, *event]``.
        name: what an error calls the field.

    Returns:
        f(t, x, args) ``[*event]`` and its divergence ``[]``.

    Raises:
        TypeError: the field or ``probes`` of another dtype than ``x``.
        ValueError: the field of another shape than ``x``, or ``probes`` that do not fit.
    """
    if divergence is None and probes is None and isinstance(field, StructuredField):
        value, own = field.with_divergence(t, x, field.prepare(args))
        return like(name, value, x.shape, x.dtype), own
    if divergence is None:
        divergence = exact if probes is None else hutchinson
    return divergence(lambda y: evaluate(name, field, t, y, args), x, probes)


def gradient(energy: Energy) -> StructuredField:
    """The gradient of a scalar field that knows its Laplacian: a vector field that knows its divergence.

    Args:
        energy: u, ``(t [], x [*event], args) -> []``, from ``networks.energy`` for instance.

    Returns:
        ``(t [], x [*event], args) -> [*event]``, grad u over x. Beside the Laplacian it costs one derivative of u.
    """

    def field(t: Array, x: Array, args: Args) -> Array:
        return jax.grad(energy.field, 1)(t, x, args)

    def with_divergence(t: Array, x: Array, prepared: Any) -> tuple[Array, Array]:
        return jax.grad(lambda y: energy.with_laplacian(t, y, prepared), has_aux=True)(x)

    return StructuredField(field, energy.prepare, with_divergence)


def laplacian(u: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Compute u(x) and its Laplacian, the divergence of its gradient, in forward mode alone.

    lap u(x) = sum_i d^2 u / dx_i^2.

    Each operation y = p(a) of u passes on its derivative along each of the unit vectors, and once for all of them the
    sum of their second derivatives,

        y_i = p'(a) a_i,    lap y = p'(a) lap a + sum_i p''(a)[a_i, a_i].

    So a matrix product costs one more for each direction, where the divergence of the gradient takes two. The
    directions go through u in blocks of up to 8, which leave the last sum behind at each operation.

    Args:
        u: ``[*event] -> []``. Where it has no forward mode, take ``exact(jax.grad(u), x)``; a dense network with fewer
            units than dimensions knows better, see ``networks.energy``.
        x: one example ``[*event]``.

    Returns:
        u(x) ``[]`` and lap u(x) ``[]``.

    Raises:
        TypeError: ``x`` not of floats, or u(x) of another dtype.
        ValueError: u(x) not a scalar.

    Source: Li et al. (2024), "A computational framework for neural network-based variational Monte Carlo with Forward
    Laplacian", equations 5 to 7.
    """
    x = floating("x", x)
    program, out = jax.make_jaxpr(u, return_shape=True)(x)
    if jnp.shape(out) != ():
        raise ValueError(
            f"u must return a scalar [], got shape {jnp.shape(out)} for x of shape {x.shape}: "
            "sum what it returns, or use jax.vmap if x is a batch."
        )
    _same_dtype("u", out, x)
    tape: list[_Step] = []
    (y,) = _record(tape, program.jaxpr, program.consts, [_Moving(x)])
    if not isinstance(y, _Moving):
        return y, jnp.zeros_like(y)

    def curvatures(units: Array, _: Array) -> list[Any]:
        along, found = {0: units}, []
        for step in tape:
            first, curvature = step.push([along[slot] for slot in step.inputs])
            along.update(zip(step.outputs, first, strict=True))
            found.append(curvature)
        return found

    laplacians: dict[int, Any] = {0: None}
    for step, curvature in zip(tape, _blocks.over_units(curvatures, x, _DIRECTIONS), strict=True):
        laplacians.update(
            zip(step.outputs, step.sum([laplacians[slot] for slot in step.inputs], curvature), strict=True)
        )
    lap = laplacians[y.slot]
    return y.value, jnp.zeros_like(y.value) if lap is None else lap


def _products(f: Callable[[Array], Array], x: Array, mode: str) -> tuple[Array, Callable[[Array], Array]]:
    """f(x) and the map e -> J^T e, or e -> J e in forward mode."""
    x = floating("x", x)
    if mode == "reverse":
        value, pull = jax.vjp(f, x)
    elif mode == "forward":
        value, push = jax.linearize(f, x)
    else:
        raise ValueError(f'mode must be "both", "reverse" or "forward", got {mode!r}.')
    _same_space(value, x)
    return value, push if mode == "forward" else lambda e: pull(e)[0]


def _same_space(value: Any, x: Array) -> None:
    if jnp.shape(value) != x.shape:
        raise ValueError(
            f"f must keep the shape of x, got {jnp.shape(value)} for x of shape {x.shape}: "
            "a divergence is of a map from a space to itself."
        )
    _same_dtype("f", value, x)


def _same_dtype(name: str, value: Array, x: Array) -> None:
    if value.dtype != x.dtype:
        raise TypeError(
            f"{name} returned dtype {value.dtype} for x of {x.dtype}: bring the two together, "
            f"for instance {name}(x).astype(x.dtype)."
        )


def _entries(f: Callable[[Array], Array], x: Array, mode: str) -> tuple[Array, Callable[[Array, Array], Array]]:
    """f(x), and the map from a unit vector and its index to its entry of the diagonal of J; 0 beyond the last."""
    if mode == "both":
        ends = _both_ends(f, floating("x", x))
        if ends is not None:
            value, form = ends
            return value, lambda unit, _: form(unit)
        mode = "reverse"
    value, product = _products(f, x, mode)
    return value, lambda unit, i: product(unit).reshape(-1).at[i].get(mode="fill", fill_value=0)


def _both_ends(f: Callable[[Array], Array], x: Array) -> tuple[Array, Callable[[Array], Array]] | None:
    """f(x) and the map e -> e^T J e = (B^T e) . (A e), J = B A, B being f from its last product on.

    ``None`` where f has no product, or somewhere a derivative in reverse alone, or x few entries.
    """
    if x.size <= _FEW:
        return None
    program, out = jax.make_jaxpr(f, return_shape=True)(x)
    _same_space(out, x)
    if _in_reverse_alone(program.jaxpr):
        return None
    tape: list[_Step] = []
    (y,) = _record(tape, program.jaxpr, program.consts, [_Moving(x)])
    cut = max((i for i, step in enumerate(tape) if step.kind == "product"), default=None)
    if cut is None or not isinstance(y, _Moving):
        return None
    made = {0}.union(*(step.outputs for step in tape[:cut]))
    live = sorted(made & {y.slot}.union(*(step.inputs for step in tape[cut:])))

    def run(steps: list[_Step], at: dict[int, Array]) -> dict[int, Array]:
        for step in steps:
            at.update(zip(step.outputs, step.operation(*(at[slot] for slot in step.inputs)), strict=True))
        return at

    def first(x: Array) -> list[Array]:
        at = run(tape[:cut], {0: x})
        return [at[slot] for slot in live]

    def last(middle: list[Array]) -> Array:
        return run(tape[cut:], dict(zip(live, middle, strict=True)))[y.slot]

    middle, push = jax.linearize(first, x)
    value, pull = jax.vjp(last, middle)

    def form(e: Array) -> Array:
        (back,) = pull(e)
        each = [jnp.sum(a * b).astype(x.dtype) for a, b in zip(push(e), back, strict=True)]
        return jnp.sum(jnp.stack(each))

    return value, form


def _in_reverse_alone(program: Any) -> bool:
    """Whether there is a ``jax.custom_vjp`` in a jaxpr, or in one that it holds."""
    for equation in program.eqns:
        inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(equation.params.values()))]
        if equation.primitive.name.startswith("custom_vjp") or any(
            _in_reverse_alone(each) for each in inner if hasattr(each, "eqns")
        ):
            return True
    return False


def _trace(entry: Callable[[Array, Array], Array], like: Array, most: int) -> Array:
    """The sum of what ``entry`` makes of every unit vector and its index, ``most`` of them at a time."""

    def diagonal(units: Array, indices: Array) -> Array:
        return jnp.sum(jax.vmap(entry)(units, indices))

    return _blocks.over_units(diagonal, like, most)


_FEW = 8
"""Dimensions up to which divergences are taken from one end. There the exact one costs about as much, and its gradient
less: at m = 8 and 64 units, on one core, 5.1 and 7.1 times that of the field for batches of 64 and 512, not 6.7 and
10."""

_PROBES = 8
"""Probes in a block, at most. With more, those of a batch of 512 leave the cache, and take twice as long; with fewer,
those of one example alone do."""

_DIRECTIONS = 8
"""Unit vectors in a block of ``laplacian``, at most."""

_LINEAR = {
    "add", "add_any", "sub", "neg", "reduce_sum", "cumsum", "broadcast_in_dim", "reshape", "transpose", "squeeze",
    "expand_dims", "slice", "concatenate", "pad", "rev", "copy", "copy_p", "convert_element_type",
}  # fmt: skip
"""Operations that are linear in all their arrays together."""

_PRODUCTS = {"dot_general", "conv_general_dilated"}
"""Operations that are linear in each array by itself, and where the time goes."""

_LINEAR_IN_FIRST = {"div", "gather", "dynamic_slice"}
"""Operations that are linear in their first array."""

_ENTRYWISE = {
    "asinh", "atan", "cos", "cosh", "erf", "erfc", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic",
    "rsqrt", "sin", "sinh", "sqrt", "square", "tan", "tanh",
}  # fmt: skip
"""Operations on each number of one array."""

_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr"}
"""Calls of a program that are as good as the program itself, and where they hold it."""


class _Moving(NamedTuple):
    """A value that depends on x, and the number by which the tape knows it."""

    value: Array
    slot: int = 0


class _Step(NamedTuple):
    """One operation between moving values.

    Attributes:
        operation: of the moving arrays alone, to a list of arrays.
        primals: those arrays.
        inputs: their slots.
        outputs: the slots of what it makes.
        kind: "product" with what does not move, "linear", "entrywise" or "".
    """

    operation: Callable[..., list[Array]]
    primals: tuple[Array, ...]
    inputs: list[int]
    outputs: list[int]
    kind: str

    def push(self, along: list[Array]) -> tuple[list[Array], Any]:
        """From a_i ``[directions, ...]`` of each input y_i of each output, and what ``sum`` needs of all directions."""

        def first(*at: Array, e: tuple[Array, ...]) -> list[Array]:
            return jax.jvp(self.operation, at, e)[1]

        def both(*e: Array) -> Any:
            if self.kind:
                return first(*self.primals, e=e), None
            return jax.jvp(partial(first, e=e), self.primals, e)

        firsts, seconds = jax.vmap(both)(*along)
        if self.kind == "entrywise":
            return firsts, jnp.sum(jnp.square(along[0]), axis=0)
        return firsts, None if self.kind else [jnp.sum(second, axis=0) for second in seconds]

    def sum(self, laplacians: list[Any], curvature: Any) -> list[Any]:
        """The Laplacian of each output from those of the inputs, with ``None`` for zero."""
        if self.kind == "entrywise":
            one = (jnp.ones_like(self.primals[0]),)
            second = jax.jvp(lambda a: jax.jvp(self.operation, (a,), one)[1], self.primals, one)[1]
            curvature = [second[0] * curvature]
        if all(each is None for each in laplacians):
            return [None] * len(self.outputs) if curvature is None else curvature
        before = (
            jnp.zeros_like(value) if each is None else each
            for value, each in zip(self.primals, laplacians, strict=True)
        )
        passed = jax.jvp(self.operation, self.primals, tuple(before))[1]
        return passed if curvature is None else [a + b for a, b in zip(passed, curvature, strict=True)]


def _record(tape: list[_Step], program: Any, consts: Any, inputs: list[Any]) -> list[Any]:
    """Evaluate a jaxpr, and write on the tape what it does to moving values."""
    known: dict[Any, Any] = {}
    known.update(zip(program.constvars, consts, strict=True))
    known.update(zip(program.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else known[atom]

    for equation in program.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = equation.params.get(_INLINED.get(equation.primitive.name, ""))
        if inner is None or not any(isinstance(operand, _Moving) for operand in operands):
            results = _record_one(tape, equation, operands)
        elif hasattr(inner, "consts"):
            results = _record(tape, inner.jaxpr, inner.consts, operands)
        else:
            results = _record(tape, inner, (), operands)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def _record_one(tape: list[_Step], equation: Any, operands: list[Any]) -> list[Any]:
    """The same for one operation."""
    places = [i for i, operand in enumerate(operands) if isinstance(operand, _Moving)]
    values = [operand.value if isinstance(operand, _Moving) else operand for operand in operands]

    def bind(values: list[Any]) -> list[Any]:
        params = equation.primitive.get_bind_params(equation.params)
        functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before jax 0.11
        out = equation.primitive.bind(*functions, *values, **params)
        return list(out) if equation.primitive.multiple_results else [out]

    results = bind(values)
    smooth = [i for i, out in enumerate(results) if jnp.issubdtype(out.dtype, jnp.floating)]
    if not places or not smooth:
        return results

    def operation(*moving: Array) -> list[Array]:
        given = list(values)
        for i, value in zip(places, moving, strict=True):
            given[i] = value
        out = bind(given)
        return [out[i] for i in smooth]

    name = equation.primitive.name
    linear = (
        name in _LINEAR
        or (name == "mul" and len(places) == 1)
        or (name in _LINEAR_IN_FIRST and places == [0])
        or (name == "select_n" and 0 not in places)
    )
    start = 1 + sum(len(step.outputs) for step in tape)
    slots = [start + k for k in range(len(smooth))]
    for i, slot in zip(smooth, slots, strict=True):
        results[i] = _Moving(results[i], slot)
    if name in _PRODUCTS and len(places) == 1:
        kind = "product"
    else:
        kind = "linear" if linear else "entrywise" if name in _ENTRYWISE else ""
    primals = tuple(operands[i].value for i in places)
    tape.append(_Step(operation, primals, [operands[i].slot for i in places], slots, kind))
    return results
