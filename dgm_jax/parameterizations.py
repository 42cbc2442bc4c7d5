"""What a network may predict, and how to get from each prediction to each other, exactly.

On a path x_t = alpha x_0 + sigma eps the five usual targets are averages over the data given x_t = x:

    noise       e = E[eps | x]
    x0          d = E[x_0 | x]
    score       s = grad log p_t(x) = -e / sigma
    v           E[alpha eps - sigma x_0 | x] = alpha e - sigma d
    velocity    u = E[alpha' x_0 + sigma' eps | x] = alpha' d + sigma' e

and x = alpha d + sigma e ties them together, so any one gives all. With h = sigma sigma' and
D = alpha h - alpha' sigma^2 = alpha g^2 / 2 each conversion is a x + b prediction; the table ``_TABLE`` writes
every pair (a, b) in the form that stays finite wherever the conversion itself is. Where a prediction says nothing
of the target (x0 at t = 0, the score or the noise where alpha = 0) the result is not finite, and should not be.

Source: Salimans & Ho (2022), "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D;
Albergo et al. (2023), "Stochastic Interpolants", section 2.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast, get_args

import jax.numpy as jnp

from dgm_jax import schedules
from dgm_jax._checks import floating, one_time
from dgm_jax.types import Args, Array, Schedule, StructuredField, VectorField

__all__ = ["Kind", "convert"]

Kind = Literal["score", "noise", "x0", "v", "velocity"]
"""What a field predicts."""


class _Path(NamedTuple):
    """The path at one time."""

    a: Array  # alpha
    a_dot: Array  # alpha'
    s: Array  # sigma
    s_dot: Array  # sigma'
    V: Array  # sigma^2
    h: Array  # sigma sigma'

    @property
    def D(self) -> Array:  # alpha g^2 / 2
        return self.a * self.h - self.a_dot * self.V

    @property
    def W(self) -> Array:  # D / sigma
        return self.a * self.s_dot - self.a_dot * self.s

    @property
    def n(self) -> Array:  # alpha^2 + sigma^2
        return jnp.square(self.a) + self.V


_TABLE: dict[tuple[str, str], Callable[[_Path, Array, Array], Array]] = {
    ("score", "noise"): lambda c, x, p: -c.s * p,
    ("score", "x0"): lambda c, x, p: (x + c.V * p) / c.a,
    ("score", "v"): lambda c, x, p: -(c.s / c.a) * (x + c.n * p),
    ("score", "velocity"): lambda c, x, p: (c.a_dot * x - c.D * p) / c.a,
    ("noise", "score"): lambda c, x, p: -p / c.s,
    ("noise", "x0"): lambda c, x, p: (x - c.s * p) / c.a,
    ("noise", "v"): lambda c, x, p: (c.n * p - c.s * x) / c.a,
    ("noise", "velocity"): lambda c, x, p: (c.a_dot * x + c.W * p) / c.a,
    ("x0", "score"): lambda c, x, p: -(x - c.a * p) / c.V,
    ("x0", "noise"): lambda c, x, p: (x - c.a * p) / c.s,
    ("x0", "v"): lambda c, x, p: (c.a * x - c.n * p) / c.s,
    ("x0", "velocity"): lambda c, x, p: c.a_dot * p + (c.h / c.V) * (x - c.a * p),
    ("v", "score"): lambda c, x, p: -(c.s * x + c.a * p) / (c.s * c.n),
    ("v", "noise"): lambda c, x, p: (c.s * x + c.a * p) / c.n,
    ("v", "x0"): lambda c, x, p: (c.a * x - c.s * p) / c.n,
    ("v", "velocity"): lambda c, x, p: ((c.a * c.a_dot + c.h) * x + c.W * p) / c.n,
    ("velocity", "score"): lambda c, x, p: -(c.a * p - c.a_dot * x) / c.D,
    ("velocity", "noise"): lambda c, x, p: (c.a * p - c.a_dot * x) / c.W,
    ("velocity", "x0"): lambda c, x, p: (c.h * x - c.V * p) / c.D,
    ("velocity", "v"): lambda c, x, p: (c.n * p - (c.a * c.a_dot + c.h) * x) / c.W,
}


def _path(schedule: Schedule, t: Array) -> tuple[_Path, _Path]:
    """The path at t, and the same as a limit.

    Where sigma grows in proportion to t (``sub_vp``, ``cosine``, ``edm``, ``linear``) sigma^2 and h vanish together at
    t = 0 and quotients such as h / sigma are 0 / 0. Their limits are taken at a time so small that the difference is
    below rounding, yet large enough that sigma^2 does not underflow.
    """
    at = _coefficients(schedule, t)
    small = float(jnp.finfo(t.dtype).tiny) ** 0.25
    both_vanish = (at.V == 0.0) & (at.h == 0.0)
    limit = _coefficients(schedule, jnp.where(both_vanish, jnp.full_like(t, small), t))
    return at._replace(s_dot=limit.s_dot), limit


def _coefficients(schedule: Schedule, t: Array) -> _Path:
    a, a_dot, variance, half_variance_dot = schedules.derivatives(schedule, t)
    s = jnp.sqrt(variance)
    return _Path(a, a_dot, s, half_variance_dot / s, variance, half_variance_dot)


def convert(field: VectorField, schedule: Schedule, *, source: Kind, target: Kind) -> VectorField:
    """A field that predicts ``target``, from one that predicts ``source``.

    With p the prediction of ``field`` at (t, x) the result is a x + b p, the exact (a, b) of the pair; see the
    head of this module for the five kinds. Its divergence is a d + b div p, in d dimensions: a field that knows its
    own divergence makes one that does.

    Finite wherever the conversion is: at t = 0, for instance, score to velocity on ``vp`` and noise to
    velocity on ``linear``; at t = 1 of ``linear``, x0 to velocity. Infinite or NaN where the prediction says nothing
    of the target: at t = 0 x0 to anything, noise or v to score, noise or v to velocity on ``vp`` and ``ve``, velocity
    to score on the other four; where alpha = 0 score or noise to anything but each other.

    Args:
        field: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        source: what ``field`` predicts: "score", "noise", "x0", "v" or "velocity".
        target: what the result is to predict.

    Returns:
        ``(t [], x [*event], args) -> [*event]``: ``field`` itself where source and target are the same, and a
        ``types.StructuredField`` where ``field`` is one.

    Raises:
        ValueError: for an unknown kind; when called, for a t that is not one time or a field whose value has
            another shape than x.
        TypeError: when called, for an x that is not made of floats.

    Source: Salimans & Ho (2022), appendix D, for noise, x0 and v; Song et al. (2021), equation 13, for the
    velocity from the score.
    """
    for name, kind in (("source", source), ("target", target)):
        if kind not in get_args(Kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(Kind))}, got {kind!r}.")
    if source == target:
        return field
    formula = _TABLE[source, target]
    takes_limit = (source, target) == ("velocity", "x0")

    def converted(t: Array, x: Array, args: Args = None) -> Array:
        x = floating("x", x)
        time = one_time(t, x.dtype)
        prediction = field(t, x, args)
        if prediction.shape != x.shape:
            raise ValueError(
                f"field must return the shape of x, {x.shape}, got {prediction.shape}: "
                "it takes one example; use jax.vmap over a batch."
            )
        return formula(path(time), x, prediction)

    def path(t: Array) -> _Path:
        at, limit = _path(schedule, t)
        return limit if takes_limit else at

    if not isinstance(field, StructuredField):
        return converted
    own, own_forms = field.with_divergence, field.with_forms

    def with_divergence(t: Array, x: Array, prepared: Any) -> tuple[Array, Array]:
        prediction, divergence = own(t, x, prepared)
        at = path(one_time(t, x.dtype))
        return formula(at, x, prediction), formula(at, jnp.asarray(x.size, x.dtype), divergence)

    def with_forms(t: Array, x: Array, prepared: Any, probes: Array) -> tuple[Array, Array]:
        prediction, forms = cast(Callable, own_forms)(t, x, prepared, probes)
        at = path(one_time(t, x.dtype))
        return formula(at, x, prediction), formula(at, jnp.asarray(x.size, x.dtype), forms)

    return StructuredField(
        converted, field.prepare, with_divergence, None if own_forms is None else with_forms, field.probe_space
    )
