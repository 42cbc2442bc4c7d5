"""Normalizing flows in discrete steps: invertible maps with their log abs det, and the densities that follow.

A flow carries z, distributed as the base, to x = f(z), which is data. In each of its steps

    z_(k+1) = f_k(z_k),    log p(z_(k+1)) = log p(z_k) - log|det df_k/dz_k|,

so that log p(x) = log p_base(z) - log|det dx/dz| = log p_base(z) + log|det dz/dx|. Each direction returns the log abs
det of its own Jacobian. What that costs for m entries is what tells the flows apart:

    any map, by the dense determinant    O(m^3)    dense_log_abs_det
    dense_affine                         O(m^3)    an LU decomposition
    lu_affine, affine_coupling, planar   O(m)      by their structure

A continuous flow (``dgm_jax.flows``) needs a trace instead: O(m^2) exactly, O(m) by Hutchinson's estimate.

Source: Papamakarios et al. (2021), "Normalizing Flows for Probabilistic Modeling and Inference", sections 2.1 and 3.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np

from dgm_jax import _checks
from dgm_jax.types import Array

__all__ = [
    "Affine",
    "Flow",
    "LUAffine",
    "Planar",
    "affine_coupling",
    "compose",
    "dense_affine",
    "dense_log_abs_det",
    "init_dense_affine",
    "init_lu_affine",
    "init_planar",
    "invert",
    "log_prob",
    "lu_affine",
    "planar",
    "repeat",
    "sample",
    "sample_and_log_prob",
]


# ------------------------------------------------------------------------------------------------ flows in general


class Flow(NamedTuple):
    """An invertible map x = f(z), one example at a time.

    Attributes:
        forward: ``(params, z [*event]) -> (x [*event], log|det dx/dz| [])``, from the base to the data.
        inverse: ``(params, x [*event]) -> (z [*event], log|det dz/dx| [])``, back again; at the same point the two
            log abs dets are opposite.
    """

    forward: Callable[[Any, Array], tuple[Array, Array]]
    inverse: Callable[[Any, Array], tuple[Array, Array]]


def compose(flows: Sequence[Flow]) -> Flow:
    """One flow after another: x = f_K(... f_2(f_1(z))), and their log abs dets add up.

    Args:
        flows: f_1 .. f_K, the one next to the base first. The params of the whole are a sequence of theirs.

    Returns:
        The flow.

    Raises:
        ValueError: no flow at all; when called, params that are not one for each flow, or the NamedTuple of one flow.
    """
    flows = tuple(flows)
    if not flows:
        raise ValueError("flows is empty: compose needs at least one.")

    def run(maps: list[Any], x: Array) -> tuple[Array, Array]:
        x = _checks.floating("x", x)
        total = jnp.zeros((), x.dtype)
        for step, params in maps:
            x, log_det = step(params, x)
            total = total + log_det
        return x, total

    def paired(params: Any) -> list[tuple[Flow, Any]]:
        sequence = isinstance(params, list | tuple) and not hasattr(params, "_fields")
        if not sequence or len(params) != len(flows):
            got = f"{len(params)} of them" if sequence else f"a {type(params).__name__}"
            raise ValueError(f"params must be a sequence with the params of each of {len(flows)} flows, got {got}.")
        return list(zip(flows, params, strict=True))

    def forward(params: Any, z: Array) -> tuple[Array, Array]:
        return run([(flow.forward, each) for flow, each in paired(params)], z)

    def inverse(params: Any, x: Array) -> tuple[Array, Array]:
        return run([(flow.inverse, each) for flow, each in reversed(paired(params))], x)

    return Flow(forward, inverse)


def repeat(flow: Flow) -> Flow:
    """The same kind of flow K times, each with params of its own, in one ``lax.scan``: compiled once, whatever K.

    Args:
        flow: one of them. The params of the whole are its params with a leading axis ``[K, ...]``, the one next to the
            base first, as ``jax.vmap`` of an initialiser over K keys makes them.

    Returns:
        The flow.

    Raises:
        ValueError: when called, params without a leading axis of one length.
    """

    def run(step: Callable[[Any, Array], tuple[Array, Array]], params: Any, x: Array, back: bool) -> Any:
        x = _checks.floating("x", x)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
        if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(
                f"params must have a leading axis [K, ...] of one length, got arrays of shapes {shapes}: make them by "
                "jax.vmap of an initialiser over K keys, or stack those of K flows by "
                "jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)."
            )
        x, log_dets = jax.lax.scan(lambda x, each: step(each, x), x, params, reverse=back)
        return x, jnp.sum(log_dets)

    return Flow(
        lambda params, z: run(flow.forward, params, z, False), lambda params, x: run(flow.inverse, params, x, True)
    )


def invert(flow: Flow) -> Flow:
    """The flow of which forward is the other's inverse, with the same params.

    A flow trained by maximum likelihood is run from data to base in every step: let that be its cheap direction.
    """
    return Flow(flow.inverse, flow.forward)


def _standard_normal(z: Array) -> Array:
    return jnp.sum(jsp.stats.norm.logpdf(z))


def log_prob(flow: Flow, params: Any, x: Array, log_base: Callable[[Array], Array] = _standard_normal) -> Array:
    """Compute log p(x) of one example by the change of variables.

    log p(x) = log p_base(z) + log|det dz/dx|,    z = f^-1(x).

    Args:
        flow: from base to data.
        params: its parameters.
        x: one example ``[*event]``.
        log_base: log-density of the base, ``z [*event] -> []``; N(0, I) by default.

    Returns:
        log p(x) in nats ``[]``.

    Raises:
        ValueError: ``log_base`` does not return a scalar; and what the flow raises.
        TypeError: ``x`` not of floats, or not of the dtype of the params.

    Source: Rezende & Mohamed (2015), "Variational Inference with Normalizing Flows", equations 5 to 7.
    """
    z, log_det = flow.inverse(params, _checks.floating("x", x))
    return _base(log_base, z) + log_det


def sample(flow: Flow, params: Any, z: Array) -> Array:
    """x = f(z) ``[*event]``, a sample if z ``[*event]`` is one of the base."""
    return flow.forward(params, _checks.floating("z", z))[0]


def sample_and_log_prob(
    flow: Flow, params: Any, z: Array, log_base: Callable[[Array], Array] = _standard_normal
) -> tuple[Array, Array]:
    """Compute x = f(z) and log p(x), without an inverse.

    log p(x) = log p_base(z) - log|det dx/dz|.

    Args:
        flow: from base to data.
        params: its parameters.
        z: one example of the base ``[*event]``.
        log_base: log-density of the base, ``z [*event] -> []``; N(0, I) by default.

    Returns:
        x ``[*event]``, and log p(x) in nats ``[]``.

    Raises:
        ValueError: ``log_base`` does not return a scalar; and what the flow raises.
        TypeError: ``z`` not of floats, or not of the dtype of the params.

    Source: Rezende & Mohamed (2015), "Variational Inference with Normalizing Flows", equations 5 to 7.
    """
    z = _checks.floating("z", z)
    x, log_det = flow.forward(params, z)
    return x, _base(log_base, z) - log_det


def dense_log_abs_det(f: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Compute f(x) and log|det df/dx| of any map, from its whole Jacobian.

    m products with the Jacobian make it, O(m^2) numbers hold it, and its LU decomposition takes O(m^3) operations.

    Args:
        f: ``[*event] -> [*event]``.
        x: one example ``[*event]`` of m entries.

    Returns:
        f(x) ``[*event]``, and log|det df/dx| ``[]``; minus infinity where the Jacobian is singular.

    Raises:
        TypeError: ``x`` not of floats, or f(x) of another dtype.
        ValueError: f(x) of another shape.
    """
    x = _checks.floating("x", x)
    value, push = jax.linearize(f, x)
    _same("f(x)", value, x.shape, x)
    columns = jax.vmap(push)(jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape))
    return value, jnp.linalg.slogdet(columns.reshape(x.size, x.size)).logabsdet


# ---------------------------------------------------------------------------------------------------------- planar


class Planar(NamedTuple):
    """Parameters of :func:`planar`: u ``[d]``, w ``[d]`` and b ``[]``, of any values within the floats' range."""

    u: Array
    w: Array
    b: Array


def planar() -> Flow:
    """A planar flow: it stretches space along one direction, most at the hyperplane w.z + b = 0.

    x = z + v tanh(a),    a = w.z + b,    log|det dx/dz| = log(tanh(a)^2 + (1 + w.v) sech(a)^2),

    which is invertible if w.v > -1. To have that for any u, v is u with another component along w:

        v = u + (m(w.u) - w.u) w / |w|^2,    m(s) = -1 + log(1 + (e - 1) e^s).

    The paper has 1 for e - 1; with e - 1, u = 0 is the identity, and small w do no harm. The inverse follows from the
    root a of a + w.v tanh(a) = w.x + b, found to rounding by Newton steps from the side on which they cannot overshoot.
    Its derivatives, of any order, are those of the implicit function.

    In floats 1 + w.v, which is about 1.7 e^(w.u) for w.u far below 0, becomes 0 where w.u is below -708 (float64) or
    -87 (float32): there the log abs det can be minus infinity, and the inverse NaN.

    Returns:
        The flow, of params :class:`Planar` and examples ``[d]``. An evaluation is O(d), the inverse too.

    Raises:
        TypeError: when called, params of another dtype than the example.
        ValueError: when called, an example that is not ``[d]``, or params of other shapes.

    Source: Rezende & Mohamed (2015), "Variational Inference with Normalizing Flows", equations 10 to 12, appendix A.1.
    """

    def constrained(params: Planar, x: Array) -> tuple[Array, Array]:
        """v, and 1 + w.v > 0."""
        for name, value in params._asdict().items():
            _same(name, value, () if name == "b" else x.shape, x)
        s, square = jnp.sum(params.w * params.u), jnp.sum(params.w**2)
        # m(s) - s, from two forms without cancellation or overflow, each kept where it is good
        low, high = jnp.minimum(s, 0), jnp.maximum(s, 0)
        more = jnp.where(s > 0, jnp.log1p(jnp.expm1(-high) / math.e), jnp.log1p(jnp.expm1(low) * (1 - 1 / math.e)) - s)
        v = params.u + more * params.w / jnp.where(square > 0, square, jnp.ones_like(square))
        return v, jax.nn.softplus(s + math.log(math.e - 1))

    def forward(params: Planar, z: Array) -> tuple[Array, Array]:
        z = _vector("z", z)
        v, k = constrained(params, z)
        a = jnp.sum(params.w * z) + params.b
        return z + v * jnp.tanh(a), jnp.log(_slope(a, k))

    def inverse(params: Planar, x: Array) -> tuple[Array, Array]:
        x = _vector("x", x)
        v, k = constrained(params, x)
        a = _planar_root(k, jnp.sum(params.w * x) + params.b)
        return x - v * jnp.tanh(a), -jnp.log(_slope(a, k))

    return Flow(forward, inverse)


def init_planar(key: Array, x: Array) -> Planar:
    """Random parameters of a planar flow near the identity, for examples like x ``[d]``."""
    x = _vector("x", x)
    keys = jax.random.split(_checks.typed_key(key), 3)
    u, w = (jax.random.normal(one, x.shape, x.dtype) / math.sqrt(x.size) for one in keys[:2])
    return Planar(0.1 * u, w, jax.random.normal(keys[2], (), x.dtype))


def _slope(a: Array, k: Array) -> Array:
    """d/da (a + (k - 1) tanh a), as a sum of positive terms."""
    sech_squared = (
        4 * jax.nn.sigmoid(2 * a) * jax.nn.sigmoid(-2 * a)
    )  # neither cancels nor overflows, nor do derivatives
    return jnp.tanh(a) ** 2 + k * sech_squared


@jax.custom_jvp
def _planar_root(k: Array, r: Array) -> Array:
    """The a with a + (k - 1) tanh a = r, for k > 0.

    The left-hand side is odd and increases, so let r > 0. On a > 0 it is convex for k < 1, and Newton steps from above
    the root come down to it; concave for k > 1, and from below they rise to it.
    """
    sign, r = jnp.sign(r), jnp.abs(r)
    convex = k < 1
    start = jnp.where(convex, jnp.minimum(r / k, r + (1 - k)), jnp.maximum(r / k, r - (k - 1)))

    def newton(state: tuple[Array, Array]) -> tuple[Array, Array]:
        a, _ = state
        new = a - (a + (k - 1) * jnp.tanh(a) - r) / _slope(a, k)
        closer = jnp.where(convex, (new < a) & (new >= r), (new > a) & (new <= r))
        return jnp.where(closer, new, a), closer

    going = jnp.isfinite(start)
    return sign * jax.lax.while_loop(lambda state: state[1], newton, (start, going))[0]


@_planar_root.defjvp
def _planar_root_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """da = (dr - tanh(a) dk) / slope, with a the root itself, so that it can be differentiated again."""
    (k, r), (dk, dr) = primals, tangents
    a = _planar_root(k, r)
    return a, (dr - jnp.tanh(a) * dk) / _slope(a, k)


# -------------------------------------------------------------------------------------------------- affine coupling


def affine_coupling(
    mask: Any, network: Callable[[Array, Any], tuple[Array, Array]], *, max_log_scale: float = 2.0
) -> Flow:
    """A coupling layer (RealNVP): part of z stays and says how the rest is scaled and shifted.

    x = z where the mask is True,    x = z exp(s) + t elsewhere,    (s, t) = network(z where True, else 0; params),
    log|det dx/dz| = sum of s where the mask is False.

    What the network says of the scale goes through s = c tanh(s' / c), c = ``max_log_scale``: no layer stretches by
    more than exp(c), however far from the data. The inverse evaluates the network once, as forward does.

    Args:
        mask: booleans ``[*event]``, known before tracing, of both kinds. Alternate them from layer to layer.
        network: ``(z [*event], params) -> (s' [*event], t [*event])``; any function, it need not be invertible.
        max_log_scale: c, positive.

    Returns:
        The flow, of the params of the network and examples of the shape of the mask. Where s' or t is not finite the
        result is NaN.

    Raises:
        TypeError: ``mask`` not of booleans; when called, an example not of floats, a network that does not return a
            pair, or s' or t of another dtype.
        ValueError: a mask that is all True or all False; ``max_log_scale`` not positive and finite; when called, an
            example, s' or t not of the shape of the mask; s' or t not finite where they matter, unless a tracer.

    Source: Dinh et al. (2017), "Density Estimation Using Real NVP", equations 4 to 9.
    """
    if isinstance(mask, jax.core.Tracer):
        raise TypeError("mask must be known before tracing, got a tracer: make it outside, for instance with NumPy.")
    keep = np.asarray(mask)
    if keep.dtype != np.bool_:
        raise TypeError(f"mask must be of booleans, got dtype {keep.dtype}: for instance np.arange(d) % 2 == 0.")
    if keep.all() or not keep.any():
        what = "True, and nothing would be changed" if keep.all() else "False, and the network would see nothing"
        raise ValueError(f"mask of shape {keep.shape} is all {what}: give it both, for instance np.arange(d) % 2 == 0.")
    if not (math.isfinite(max_log_scale) and max_log_scale > 0):
        raise ValueError(f"max_log_scale must be positive and finite, got {max_log_scale}.")

    def scale_and_shift(params: Any, x: Array) -> tuple[Array, Array]:
        if x.shape != keep.shape:
            raise ValueError(
                f"the example has shape {x.shape} and the mask {keep.shape}: they must agree; use jax.vmap for a batch."
            )
        pair = network(jnp.where(keep, x, jnp.zeros_like(x)), params)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            got = f"{len(pair)} values" if isinstance(pair, list | tuple) else f"one {type(pair).__name__}"
            raise TypeError(
                f"network must return a pair, log-scale and shift, each of shape {x.shape}, got {got}: an array that "
                "holds both is to be split."
            )
        raw, shift = pair
        for name, value in (("the log-scale of the network", raw), ("the shift of the network", shift)):
            _same(name, value, x.shape, x)
            if _checks.concrete(value) and not np.isfinite(np.asarray(value))[~keep].all():
                raise ValueError(f"{name} is not finite, so that the coupling is singular: look at its params.")
        nothing, bad = jnp.zeros_like(x), ~(jnp.isfinite(raw) & jnp.isfinite(shift))
        s = max_log_scale * jnp.tanh(raw / max_log_scale)
        s = jnp.where(bad, jnp.full_like(x, jnp.nan), s)  # tanh has made an infinite log-scale a plausible one
        t = jnp.where(bad, jnp.full_like(x, jnp.nan), shift)
        return jnp.where(keep, nothing, s), jnp.where(keep, nothing, t)

    def forward(params: Any, z: Array) -> tuple[Array, Array]:
        z = _checks.floating("z", z)
        s, t = scale_and_shift(params, z)
        return z * jnp.exp(s) + t, jnp.sum(s)

    def inverse(params: Any, x: Array) -> tuple[Array, Array]:
        x = _checks.floating("x", x)
        s, t = scale_and_shift(params, x)
        return (x - t) * jnp.exp(-s), -jnp.sum(s)

    return Flow(forward, inverse)


# ---------------------------------------------------------------------------------------------------------- affine


class Affine(NamedTuple):
    """Parameters of :func:`dense_affine`: weight ``[d, d]``, invertible, and bias ``[d]``."""

    weight: Array
    bias: Array


def dense_affine() -> Flow:
    """An affine flow with any invertible matrix: x = W z + b, log|det dx/dz| = log|det W|.

    Both directions take an LU decomposition of W, O(d^3); under ``jax.vmap`` over examples it is made once.

    Returns:
        The flow, of params :class:`Affine` and examples ``[d]``. Where W is singular to rounding (a pivot of its LU
        decomposition below d times the rounding error of its column) the result is NaN.

    Raises:
        TypeError: when called, params of another dtype than the example.
        ValueError: when called, an example that is not ``[d]``, params of other shapes, or a singular W, unless a
            tracer.
    """

    def decomposed(params: Affine, x: Array) -> tuple[tuple[Array, Array], Array]:
        """The LU decomposition and log|det W|."""
        _same("weight", params.weight, (x.size, x.size), x)
        _same("bias", params.bias, x.shape, x)
        lu, pivots = jsp.linalg.lu_factor(params.weight)
        diagonal, column = jnp.abs(jnp.diagonal(lu)), jnp.max(jnp.abs(jnp.triu(lu)), axis=0)
        singular = jnp.any(diagonal <= x.size * float(jnp.finfo(x.dtype).eps) * column)
        if _checks.concrete(singular) and bool(singular):
            raise ValueError(
                f"weight of shape {params.weight.shape} is singular to rounding, so x = W z + b has no inverse: pass a "
                "matrix with independent columns, as init_dense_affine makes."
            )
        return (lu, pivots), jnp.where(singular, jnp.full((), jnp.nan, x.dtype), jnp.sum(jnp.log(diagonal)))

    def forward(params: Affine, z: Array) -> tuple[Array, Array]:
        z = _vector("z", z)
        _, log_det = decomposed(params, z)
        x = jnp.matmul(params.weight, z, precision=jax.lax.Precision.HIGHEST) + params.bias
        return _unless_nan(log_det, x), log_det

    def inverse(params: Affine, x: Array) -> tuple[Array, Array]:
        x = _vector("x", x)
        lu, log_det = decomposed(params, x)
        return _unless_nan(log_det, jsp.linalg.lu_solve(lu, x - params.bias)), -log_det

    return Flow(forward, inverse)


def init_dense_affine(key: Array, x: Array) -> Affine:
    """A random rotation and no bias, for examples like x ``[d]``."""
    x = _vector("x", x)
    return Affine(jax.random.orthogonal(_checks.typed_key(key), x.size, dtype=x.dtype), jnp.zeros_like(x))


class LUAffine(NamedTuple):
    """Parameters of :func:`lu_affine`, of any values.

    Attributes:
        lower: ``[d, d]``, of which the part below the diagonal counts.
        upper: ``[d, d]``, of which the part above the diagonal counts.
        log_diagonal: ``[d]``.
        bias: ``[d]``.
    """

    lower: Array
    upper: Array
    log_diagonal: Array
    bias: Array


def lu_affine() -> Flow:
    """An affine flow whose matrix comes as its LU decomposition, so that its determinant is at hand.

    x = L U z + b, L lower triangular with ones on the diagonal, U upper triangular with diagonal exp(l),
    log|det dx/dz| = sum of l.

    It has an inverse whatever the params are. The determinant is O(d), each direction O(d^2).

    Returns:
        The flow, of params :class:`LUAffine` and examples ``[d]``.

    Raises:
        TypeError: when called, params of another dtype than the example.
        ValueError: when called, an example that is not ``[d]``, or params of other shapes.

    Source: Kingma & Dhariwal (2018), "Glow: Generative Flow with Invertible 1x1 Convolutions", section 3.2, without the
    permutation.
    """

    def triangles(params: LUAffine, x: Array) -> tuple[Array, Array, Array]:
        for name, value in params._asdict().items():
            _same(name, value, (x.size, x.size) if name in ("lower", "upper") else x.shape, x)
        lower = jnp.tril(params.lower, -1) + jnp.eye(x.size, dtype=x.dtype)
        return lower, jnp.triu(params.upper, 1) + jnp.diag(jnp.exp(params.log_diagonal)), jnp.sum(params.log_diagonal)

    def forward(params: LUAffine, z: Array) -> tuple[Array, Array]:
        z = _vector("z", z)
        lower, upper, log_det = triangles(params, z)
        high = jax.lax.Precision.HIGHEST
        return jnp.matmul(lower, jnp.matmul(upper, z, precision=high), precision=high) + params.bias, log_det

    def inverse(params: LUAffine, x: Array) -> tuple[Array, Array]:
        x = _vector("x", x)
        lower, upper, log_det = triangles(params, x)
        y = jsp.linalg.solve_triangular(lower, x - params.bias, lower=True, unit_diagonal=True)
        return jsp.linalg.solve_triangular(upper, y), -log_det

    return Flow(forward, inverse)


def init_lu_affine(x: Array) -> LUAffine:
    """The identity, for examples like x ``[d]``."""
    x = _vector("x", x)
    square = jnp.zeros((x.size, x.size), x.dtype)
    return LUAffine(square, square, jnp.zeros_like(x), jnp.zeros_like(x))


# ----------------------------------------------------------------------------------------------------------- checks


def _vector(name: str, x: Array) -> Array:
    x = _checks.floating(name, x)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} must be one example [d], got shape {x.shape}: use jax.vmap over a batch.")
    return x


def _same(name: str, value: Any, shape: tuple[int, ...], x: Array) -> None:
    """Raises unless ``value`` has this shape, and the dtype of x."""
    if jnp.shape(value) != shape:
        raise ValueError(
            f"{name} has shape {jnp.shape(value)}, but an example of shape {x.shape} needs {shape}: no batch axis is "
            "allowed here; use jax.vmap."
        )
    dtype = _checks.floating(name, value).dtype
    if dtype != x.dtype:
        raise TypeError(f"{name} has dtype {dtype} and the example {x.dtype}: bring the two together by astype.")


def _unless_nan(log_det: Array, value: Array) -> Array:
    return jnp.where(jnp.isnan(log_det), jnp.full_like(value, jnp.nan), value)


def _base(log_base: Callable[[Array], Array], z: Array) -> Array:
    value = log_base(z)
    if jnp.shape(value) != ():
        raise ValueError(f"log_base must return one number [], got shape {jnp.shape(value)}: sum over the event.")
    return value
