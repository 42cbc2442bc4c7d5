"""Flow matching: velocities learned by regression on paths between pairs (x_0, x_1), data at t = 0, source at t = 1.

A coupling draws pairs with the data as the first marginal and the source as the second; a path goes from one to the
other, and the velocity that carries the whole density p_t of x_t is the mean of what the pairs do:

    x_t = (1 - t) x_0 + t x_1,               v(t, x) = E[x_1 - x_0 | x_t = x]                  straight
    x_t = alpha x_0 + sigma eps,             v(t, x) = E[alpha' x_0 + sigma' eps | x_t = x]    Gaussian
    x_t = alpha x_0 + beta x_1 + gamma z,    b(t, x) = E[alpha' x_0 + beta' x_1 + gamma' z | x_t = x]    stochastic

dx/dt = v goes from p_0 to p_1 and back. The mean squared distance of a model from what one pair does is its distance
from v plus a number that does not depend on the model: the losses here need pairs alone, and have the gradient of the
regression on v itself. Each is for one example: ``jax.vmap`` and a mean make a batch.

Whatever the coupling, the marginals p_0 and p_1 are right as long as *its* marginals are. ``independent`` pairs cross,
and v bends; ``optimal`` ones of a batch hardly do. But optimal pairs of a batch, whose data carry classes, give every
class a source of its own, and a conditional model that is sampled from the whole source is then wrong;
``conditional`` pairs within classes, so that the source of every class stays what it is.

Source: Lipman et al. (2023), "Flow Matching for Generative Modeling"; Liu et al. (2023), "Flow Straight and Fast:
Learning to Generate and Transfer Data with Rectified Flow"; Albergo et al. (2023), "Stochastic Interpolants: A Unifying
Framework for Flows and Diffusions"; Tong et al. (2024), "Improving and Generalizing Flow-Based Generative Models with
Minibatch Optimal Transport". All of them but this module have the data at t = 1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import _checks, densities, quadrature, schedules, solvers
from dgm_jax._checks import agree, concrete, evaluate, floating, one_time, typed_key
from dgm_jax.types import SDE, Args, Array, ScalarField, Schedule, VectorField

__all__ = [
    "Interpolant",
    "Marginal",
    "conditional",
    "denoiser_loss",
    "forward_sde",
    "gaussian_loss",
    "independent",
    "interpolant_loss",
    "linear",
    "loss",
    "marginal",
    "normalised_path_energy",
    "optimal",
    "reflow",
    "reverse_sde",
    "score",
    "sinkhorn",
    "sinkhorn_plan",
    "squared_wasserstein",
    "straightness",
]


# ------------------------------------------------------------------------------------------------------- losses


def loss(velocity: VectorField, t: Array, x0: Array, x1: Array, args: Args = None) -> Array:
    """The loss of one pair and one time on straight paths.

    |v(t, x_t) - (x_1 - x_0)|^2,    x_t = (1 - t) x_0 + t x_1.

    Args:
        velocity: the model v, ``(t [], x [*event], args) -> [*event]``.
        t: time ``[]``, 0 at the data.
        x0: one example of the data ``[*event]``.
        x1: one of the source ``[*event]``, in the dtype of ``x0``: noise or any other, paired by any coupling.
        args: passed to the velocity: parameters, conditioning.

    Returns:
        The loss ``[]``. With noise for a source it is ``gaussian_loss`` on ``schedules.linear``.

    Raises:
        TypeError: ``x0`` or ``x1`` not of floats, or ``x1`` or the velocity of another dtype than ``x0``.
        ValueError: ``x1`` or the velocity of another shape than ``x0``, or ``t`` not a scalar.

    Source: Liu et al. (2023), equation 1; Tong et al. (2024), section 3, with sigma = 0.
    """
    x0, x1 = agree("x0", x0, "x1", x1)
    t = one_time(t, x0.dtype)
    v = evaluate("velocity", velocity, t, (1 - t) * x0 + t * x1, args)
    return jnp.sum((v - (x1 - x0)) ** 2)


def gaussian_loss(
    velocity: VectorField,
    schedule: Schedule,
    t: Array,
    x0: Array,
    noise: Array,
    args: Args = None,
    *,
    weight: Callable[[Array], Array] | None = None,
) -> Array:
    """The loss of one example, one time and one draw of noise on any Gaussian path.

    weight(t) |v(t, x_t) - (alpha' x_0 + sigma' eps)|^2,    x_t = alpha x_0 + sigma eps.

    sigma' grows as 1 / sqrt(t) towards t = 0 on ``schedules.vp`` and ``ve``: the loss is infinite at t = 0, and without
    a weight its mean over uniform times is too, although the best velocity is finite. ``weight=schedule.variance``
    bounds it for t > 0 (at 0 the product is NaN); so does a smallest time. On the other schedules sigma' is bounded.

    Args:
        velocity: the model v, ``(t [], x [*event], args) -> [*event]``.
        schedule: gives alpha and sigma.
        t: time ``[]``, 0 at the data.
        x0: one example of the data ``[*event]``.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x0``.
        args: passed to the velocity: parameters, conditioning.
        weight: ``[] -> []``, 1 where None. It changes how much each time counts, not the minimum.

    Returns:
        The loss ``[]``.

    Raises:
        TypeError: ``x0`` or ``noise`` not of floats, or ``noise`` or the velocity of another dtype than ``x0``.
        ValueError: ``noise`` or the velocity of another shape than ``x0``, or ``t`` not a scalar.

    Source: Lipman et al. (2023), equations 9 and 15.
    """
    x0, noise = agree("x0", x0, "noise", noise)
    t = one_time(t, x0.dtype)
    scale, scale_dot, variance, half_variance_dot = schedules.derivatives(schedule, t)
    # where sigma grows in proportion to t, sigma' at 0 is 0 / 0: its limit, at a time below rounding
    small = jnp.asarray(float(jnp.finfo(t.dtype).tiny) ** 0.25, t.dtype)
    near = jnp.where((variance == 0) & (half_variance_dot == 0), small, t)
    _, _, near_variance, near_half = schedules.derivatives(schedule, near)
    target = scale_dot * x0 + near_half / jnp.sqrt(near_variance) * noise
    v = evaluate("velocity", velocity, t, scale * x0 + jnp.sqrt(variance) * noise, args)
    value = jnp.sum((v - target) ** 2)
    return value if weight is None else weight(t) * value


# ------------------------------------------------------------------------------------ stochastic interpolants


class Interpolant(NamedTuple):
    """A path x_t = alpha x_0 + beta x_1 + gamma z, z ~ N(0, I), from data at t = 0 to the source at t = 1.

    Attributes:
        alpha: ``[] -> []``, from 1 to 0.
        beta: ``[] -> []``, from 0 to 1.
        variance: gamma^2, ``[] -> []``, 0 at both ends. Not gamma, whose derivative is infinite there.

    Source: Albergo et al. (2023), section 2.
    """

    alpha: Callable[[Array], Array]
    beta: Callable[[Array], Array]
    variance: Callable[[Array], Array]


def linear(scale: float = 0.0) -> Interpolant:
    """The straight line between two points, with a bridge of noise.

    alpha = 1 - t,    beta = t,    gamma = scale sqrt(2 t (1 - t)).

    Args:
        scale: of the noise, in units of x, at least 0; 0 is the straight line itself, and 1 / sqrt(2) the bridge of a
            Wiener process.

    Returns:
        The interpolant.

    Raises:
        ValueError: a scale that is negative or not finite.

    Source: Albergo et al. (2023), section 4, on spatially linear interpolants.
    """
    size = float(scale)
    if not 0 <= size < math.inf:
        raise ValueError(f"scale must be finite and at least 0, got {size}: 0 for no noise.")
    return Interpolant(lambda t: 1 - t, lambda t: t, lambda t: 2 * size**2 * t * (1 - t))


class _At(NamedTuple):
    """An interpolant at one time: gamma as (gamma^2, gamma gamma')."""

    alpha: Array
    alpha_dot: Array
    beta: Array
    beta_dot: Array
    variance: Array
    half_variance_dot: Array


def _at(interpolant: Interpolant, t: Array) -> _At:
    (alpha, alpha_dot), (beta, beta_dot), (variance, variance_dot) = (
        jax.jvp(f, (t,), (jnp.ones_like(t),)) for f in interpolant
    )
    return _At(alpha, alpha_dot, beta, beta_dot, variance, 0.5 * variance_dot)


def interpolant_loss(
    velocity: VectorField,
    interpolant: Interpolant,
    t: Array,
    x0: Array,
    x1: Array,
    noise: Array,
    args: Args = None,
) -> Array:
    """The loss of the velocity of a stochastic interpolant, for one pair, one time and one draw of noise.

    mean over both signs of |b(t, x_t) - I'|^2 -+ 2 gamma' z . b(t, x_t),
    x_t = I +- gamma z,    I = alpha x_0 + beta x_1.

    It is |b - (I' +- gamma' z)|^2 without gamma'^2 |z|^2, which does not depend on b and has no mean over times. What
    is left of gamma', infinite at both ends, multiplies a difference that vanishes with gamma: of one sign alone the
    variance would be infinite, of both it is finite.

    Args:
        velocity: the model b, ``(t [], x [*event], args) -> [*event]``. It is called twice.
        interpolant: the path.
        t: time ``[]``, in (0, 1): where gamma is 0 and gamma' infinite the loss is NaN.
        x0: one example of the data ``[*event]``.
        x1: one of the source ``[*event]``, paired by any coupling.
        noise: z ~ N(0, I) ``[*event]``.
        args: passed to the velocity.

    Returns:
        The loss ``[]``, which may be negative.

    Raises:
        TypeError: arrays not of floats of one dtype.
        ValueError: arrays or a velocity of another shape than ``x0``, or ``t`` not a scalar.

    Source: Albergo et al. (2023), sections 2 and 6, there for antithetic sampling, which the two signs are.
    """
    x0, x1 = agree("x0", x0, "x1", x1)
    x0, noise = agree("x0", x0, "noise", noise)
    t = one_time(t, x0.dtype)
    at = _at(interpolant, t)
    gamma = jnp.sqrt(at.variance)
    gamma_dot = jnp.where(at.half_variance_dot == 0, 0, at.half_variance_dot / gamma)
    middle, middle_dot = at.alpha * x0 + at.beta * x1, at.alpha_dot * x0 + at.beta_dot * x1
    plus, minus = (evaluate("velocity", velocity, t, middle + shift, args) for shift in (gamma * noise, -gamma * noise))
    squares = 0.5 * jnp.sum((plus - middle_dot) ** 2 + (minus - middle_dot) ** 2)
    return squares - gamma_dot * jnp.sum(noise * (plus - minus))


def denoiser_loss(
    denoiser: VectorField,
    interpolant: Interpolant,
    t: Array,
    x0: Array,
    x1: Array,
    noise: Array,
    args: Args = None,
) -> Array:
    """The loss of the denoiser of a stochastic interpolant, for one pair, one time and one draw of noise.

    |eta(t, x_t) - z|^2,    x_t = alpha x_0 + beta x_1 + gamma z.

    Args:
        denoiser: the model eta of E[z | x_t], ``(t [], x [*event], args) -> [*event]``.
        interpolant: the path.
        t: time ``[]``.
        x0: one example of the data ``[*event]``.
        x1: one of the source ``[*event]``, paired by any coupling.
        noise: z ~ N(0, I) ``[*event]``.
        args: passed to the denoiser.

    Returns:
        The loss ``[]``. Its minimum gives the score, -eta / gamma.

    Raises:
        TypeError: arrays not of floats of one dtype.
        ValueError: arrays or a denoiser of another shape than ``x0``, or ``t`` not a scalar.

    Source: Albergo et al. (2023), section 2.
    """
    x0, x1 = agree("x0", x0, "x1", x1)
    x0, noise = agree("x0", x0, "noise", noise)
    t = one_time(t, x0.dtype)
    at = _at(interpolant, t)
    x_t = at.alpha * x0 + at.beta * x1 + jnp.sqrt(at.variance) * noise
    return jnp.sum((evaluate("denoiser", denoiser, t, x_t, args) - noise) ** 2)


def score(denoiser: VectorField, interpolant: Interpolant) -> VectorField:
    """The score of a stochastic interpolant, from its denoiser.

    grad log p_t(x) = -E[z | x_t = x] / gamma(t)

    Args:
        denoiser: eta, ``(t [], x [*event], args) -> [*event]``.
        interpolant: the path.

    Returns:
        ``(t [], x [*event], args) -> [*event]``; not finite where gamma is 0, for there the noise says nothing.

    Raises:
        ValueError: when called, a t that is not one time, or a denoiser of another shape than x.
        TypeError: when called, an x that is not of floats, or a denoiser of another dtype.

    Source: Albergo et al. (2023), section 2.
    """

    def field(t: Array, x: Array, args: Args = None) -> Array:
        x = floating("x", x)
        t = one_time(t, x.dtype)
        return -evaluate("denoiser", denoiser, t, x, args) / jnp.sqrt(interpolant.variance(t))

    return field


def forward_sde(
    velocity: VectorField, denoiser: VectorField, interpolant: Interpolant, diffusion: Callable[[Array], Array]
) -> SDE:
    """An SDE from the data to the source, with the density of the interpolant at every time.

    dx = (b - g^2 eta / (2 gamma)) dt + g dw,    -eta / gamma the score.

    Args:
        velocity: b, ``(t [], x [*event], args) -> [*event]``.
        denoiser: eta = E[z | x_t], called alike with the same ``args``.
        interpolant: the path; only its gamma is used.
        diffusion: g, ``t [] -> []``, any function at all of time. Where gamma is 0, at both ends, g must be too, or
            the drift is not finite: the denoiser does not know the score there. Where both are, the drift is b. A g^2
            in proportion to gamma keeps the drift bounded.

    Returns:
        The SDE, to be solved from t = 0 to 1.

    Raises:
        ValueError: when called, a t that is not one time, or fields of another shape than x.
        TypeError: when called, an x that is not of floats, or fields of another dtype.

    Source: Albergo et al. (2023), section 2, with g^2 = 2 epsilon.
    """
    return _sde(velocity, denoiser, interpolant, diffusion, -0.5)


def reverse_sde(
    velocity: VectorField, denoiser: VectorField, interpolant: Interpolant, diffusion: Callable[[Array], Array]
) -> SDE:
    """An SDE from the source back to the data, with the density of the interpolant at every time.

    dx = (b + g^2 eta / (2 gamma)) dt + g dw,    time running from 1 to 0.

    Args:
        velocity: as in ``forward_sde``.
        denoiser: as in ``forward_sde``.
        interpolant: as in ``forward_sde``.
        diffusion: as in ``forward_sde``.

    Returns:
        The SDE, to be solved from t = 1 to 0: it samples.

    Raises:
        As ``forward_sde``.

    Source: Albergo et al. (2023), section 2, with g^2 = 2 epsilon.
    """
    return _sde(velocity, denoiser, interpolant, diffusion, 0.5)


def _sde(
    velocity: VectorField,
    denoiser: VectorField,
    interpolant: Interpolant,
    diffusion: Callable[[Array], Array],
    factor: float,
) -> SDE:
    def drift(t: Array, x: Array, args: Args = None) -> Array:
        x = floating("x", x)
        t = one_time(t, x.dtype)
        b, eta = evaluate("velocity", velocity, t, x, args), evaluate("denoiser", denoiser, t, x, args)
        g = jnp.asarray(diffusion(t), x.dtype)
        gain = jnp.square(g) / jnp.where(g == 0, 1, jnp.sqrt(interpolant.variance(t)))
        return b + factor * gain * eta

    def noise(t: Array, x: Array, args: Args = None) -> Array:
        x = floating("x", x)
        return jnp.asarray(diffusion(one_time(t, x.dtype)), x.dtype)

    return SDE(drift, noise)


class Marginal(NamedTuple):
    """What is known of x_t in closed form.

    Attributes:
        velocity: b, ``(t [], x [d], args) -> [d]``.
        denoiser: E[z | x_t], called alike.
        log_density: log p_t, ``(t [], x [d], args) -> []`` in nats.
    """

    velocity: VectorField
    denoiser: VectorField
    log_density: ScalarField


def marginal(data: densities.Mixture, source: densities.Mixture, interpolant: Interpolant) -> Marginal:
    """The oracle of an interpolant between two independent mixtures: velocity, denoiser and density of x_t.

    Of components i and j, x_t ~ N(alpha mu_i + beta nu_j, S_ij) with S_ij = alpha^2 C_i + beta^2 D_j + gamma^2 I, and

        b = sum_ij p(i, j | x) (alpha' mu_i + beta' nu_j + S_ij' S_ij^-1 r_ij / 2),
        E[z | x] = sum_ij p(i, j | x) gamma S_ij^-1 r_ij,    r_ij = x - alpha mu_i - beta nu_j.

    With a standard normal source and no bridge it is ``densities.velocity`` on ``schedules.linear``.

    Args:
        data: the density of x_0, in d dimensions.
        source: the density of x_1, in as many, and of the same dtype.
        interpolant: the path.

    Returns:
        The fields, finite on all of [0, 1]; their args are not used.

    Raises:
        ValueError: mixtures of different dimensions; when called, a density that is not one, or an x that does not fit.
        TypeError: mixtures of different dtypes; when called, an x of another dtype.

    Source: Albergo et al. (2023), appendix A, for Gaussian mixtures.
    """
    if data.means.shape[1:] != source.means.shape[1:]:
        raise ValueError(
            f"data and source must have one dimension d, got means of shapes {data.means.shape} and "
            f"{source.means.shape}."
        )
    if data.means.dtype != source.means.dtype:
        raise TypeError(f"data has dtype {data.means.dtype} and source {source.means.dtype}: cast one to the other.")
    k, m = len(data.weights), len(source.weights)
    weights = (data.weights[:, None] * source.weights[None]).reshape(-1)
    mu, c = (jnp.repeat(leaf, m, axis=0) for leaf in data[1:])
    nu, d = (jnp.tile(leaf, (k, *[1] * (leaf.ndim - 1))) for leaf in source[1:])
    eye = jnp.eye(mu.shape[1], dtype=mu.dtype)[None]

    def mixture(at: _At) -> densities.Mixture:
        means = at.alpha * mu + at.beta * nu
        return densities.Mixture(weights, means, at.alpha**2 * c + at.beta**2 * d + at.variance * eye)

    def log_density(t: Array, x: Array, args: Args = None) -> Array:
        x = floating("x", x)
        return densities.log_prob(mixture(_at(interpolant, one_time(t, x.dtype))), x)

    def solved(t: Array, x: Array) -> tuple[_At, Array, Array]:
        """The coefficients, p(i, j | x) and S_ij^-1 r_ij."""
        x = floating("x", x)
        at = _at(interpolant, one_time(t, x.dtype))
        parts = mixture(at)
        one = lambda mean, cov: densities.log_prob(densities.gaussian(mean, cov), x)  # noqa: E731
        posterior = jax.nn.softmax(jnp.log(weights) + jax.vmap(one)(parts.means, parts.covariances))
        return at, posterior, jnp.linalg.solve(parts.covariances, (x[None] - parts.means)[..., None])[..., 0]

    def velocity(t: Array, x: Array, args: Args = None) -> Array:
        at, posterior, r = solved(t, x)
        half_rates = at.alpha * at.alpha_dot * c + at.beta * at.beta_dot * d + at.half_variance_dot * eye
        each = at.alpha_dot * mu + at.beta_dot * nu + jnp.einsum("kij,kj->ki", half_rates, r)
        return jnp.einsum("k,ki->i", posterior, each)

    def denoiser(t: Array, x: Array, args: Args = None) -> Array:
        at, posterior, r = solved(t, x)
        return jnp.sqrt(at.variance) * jnp.einsum("k,ki->i", posterior, r)

    return Marginal(velocity, denoiser, log_density)


# ---------------------------------------------------------------------------------------------------- couplings


def independent(key: Array, x0: Array, x1: Array) -> Array:
    """The independent coupling: a random permutation of the source.

    Args:
        key: a typed key.
        x0: data ``[n, *event]``.
        x1: as many of the source ``[n, *event]``.

    Returns:
        Indices ``[n]``, int32: the pairs are ``(x0, x1[indices])``. So of every coupling here.

    Raises:
        TypeError: an old-style key, or arrays not of floats of one dtype.
        ValueError: batches of unequal shape or without rows, or NaN or infinity in them.

    Source: Tong et al. (2024), section 3.
    """
    x0, _ = _batches(x0, x1)
    return jax.random.permutation(typed_key(key), jnp.arange(len(x0), dtype=jnp.int32))


def optimal(key: Array, x0: Array, x1: Array) -> Array:
    """Minibatch optimal transport, exactly: the permutation pi with the least sum_i |x0_i - x1_pi(i)|^2.

    SciPy's assignment on the host, some n^3 operations at worst. Under ``jit`` it is a callback, for which a device
    waits; where the batch is made on the host, couple it there.

    For data with classes that a model is shown, see ``conditional``.

    Args:
        key: not used: couplings are called alike.
        x0: data ``[n, *event]``.
        x1: as many of the source ``[n, *event]``.

    Returns:
        Indices ``[n]``, int32, a permutation. Not differentiable: they are integers.

    Raises:
        TypeError: arrays not of floats of one dtype.
        ValueError: batches of unequal shape or without rows, or NaN or infinity in them; under ``jit`` the latter is
            an error of the running program.

    Source: Tong et al. (2024), section 3; Pooladian et al. (2023), "Multisample Flow Matching"; Crouse (2016), "On
    implementing 2D rectangular assignment algorithms", for SciPy's algorithm.
    """
    x0, x1 = _batches(x0, x1)
    return _on_host(lambda x, y: _assignment(_costs(x, y)), x0, x1)


def conditional(key: Array, x0: Array, x1: Array, conditions: Array, *, weight: float = math.inf) -> Array:
    """Minibatch optimal transport that leaves the source of every condition as it is.

    The permutation pi with the least sum_i |x0_i - x1_pi(i)|^2 + weight d(c_i, c_pi(i)): source point j is given the
    condition of data point j before the two are paired anew, so that it does not depend on where the point is. With an
    infinite weight pairs keep to equal conditions, and source and condition stay independent exactly. With a finite
    one, for conditions that hardly ever repeat, they nearly do.

    Args:
        key: not used: couplings are called alike.
        x0: data ``[n, *event]``.
        x1: as many of the source ``[n, *event]``, drawn independently of the conditions.
        conditions: c, of the data: integers or floats ``[n, ...]``. d is 0 or 1 for integers, equal or not, and the
            squared distance for floats.
        weight: in units of squared distance, at least 0; 0 is ``optimal``, which see for what that does.

    Returns:
        Indices ``[n]``, int32, a permutation.

    Raises:
        TypeError: arrays not of floats of one dtype.
        ValueError: batches of unequal shape or without rows, conditions of another length, a negative weight, or NaN
            or infinity in any; under ``jit`` the latter is an error of the running program.

    Source: Cheng & Schwing (2025), "The Curse of Conditions: Analyzing and Improving Optimal Transport for Conditional
    Flow-Based Generation".
    """
    x0, x1 = _batches(x0, x1)
    conditions = jnp.asarray(conditions)
    if conditions.ndim == 0 or len(conditions) != len(x0):
        raise ValueError(
            f"conditions has shape {conditions.shape}, but x0 and x1 have {len(x0)} rows: one condition for each."
        )
    if concrete(conditions):
        _finite("conditions", np.asarray(conditions))
    weight = float(weight)
    if not weight >= 0:
        raise ValueError(f"weight must be at least 0, got {weight}: math.inf keeps to equal conditions.")

    def host(x: np.ndarray, y: np.ndarray, c: np.ndarray) -> np.ndarray:
        _finite("conditions", c)
        flat = c.reshape(len(c), -1)
        if math.isinf(weight):
            result = np.arange(len(x), dtype=np.int32)
            _, block = np.unique(flat, axis=0, return_inverse=True)
            for one in range(block.max() + 1):
                rows = np.flatnonzero(block.reshape(-1) == one)
                result[rows] = rows[_assignment(_costs(x[rows], y[rows]))]
            return result
        if np.issubdtype(c.dtype, np.floating):
            apart = _costs(flat, flat)
        else:
            apart = (flat[:, None] != flat[None]).any(axis=-1).astype(float)
        return _assignment(_costs(x, y) + weight * apart)

    return _on_host(host, x0, x1, conditions)


def sinkhorn(
    key: Array, x0: Array, x1: Array, *, epsilon: float | Array, threshold: float = 1e-3, max_iterations: int = 2000
) -> Array:
    """Minibatch entropic optimal transport: a partner for each data point, drawn from its row of the plan.

    pi(i) ~ P_i. / sum_j P_ij,    P = ``sinkhorn_plan(x0, x1)``.

    Every data point is used once; a source point once on average, for the columns of P have equal sums. Between
    ``optimal``, as epsilon goes to 0, and independent draws.

    Args:
        key: a typed key.
        x0: data ``[n, *event]``.
        x1: as many of the source ``[n, *event]``.
        epsilon: as in ``sinkhorn_plan``.
        threshold: as in ``sinkhorn_plan``.
        max_iterations: as in ``sinkhorn_plan``.

    Returns:
        Indices ``[n]``, int32, in which one may come twice.

    Raises:
        As ``sinkhorn_plan``, and TypeError for an old-style key.

    Source: Tong et al. (2024), section 3; Pooladian et al. (2023), "Multisample Flow Matching".
    """
    plan = sinkhorn_plan(x0, x1, epsilon=epsilon, threshold=threshold, max_iterations=max_iterations)
    return jax.random.categorical(typed_key(key), jnp.log(plan), axis=1).astype(jnp.int32)


def sinkhorn_plan(
    x0: Array, x1: Array, *, epsilon: float | Array, threshold: float = 1e-3, max_iterations: int = 2000
) -> Array:
    """The plan of entropic optimal transport between two batches, by OTT-JAX.

    P = argmin of sum_ij P_ij (|x0_i - x1_j|^2 + epsilon log P_ij) among all with rows and columns of sum 1 / n.

    Args:
        x0: data ``[n, *event]``.
        x1: as many of the source ``[n, *event]``.
        epsilon: the price of entropy, positive, in units of squared distance.
        threshold: how far sum_ij |sum_i P_ij - 1 / n| may be from 0 in the end.
        max_iterations: of Sinkhorn's algorithm; the smaller epsilon, the more it needs.

    Returns:
        P ``[n, n]``.

    Raises:
        ImportError: without OTT-JAX, naming the extra that brings it.
        TypeError: arrays not of floats of one dtype.
        ValueError: batches of unequal shape or without rows, NaN or infinity in them, an epsilon that is not positive,
            or a plan that did not converge; under ``jit`` the latter is an error of the running program.

    Source: Cuturi (2013), "Sinkhorn Distances: Lightspeed Computation of Optimal Transport"; Cuturi et al. (2022),
    "Optimal Transport Tools (OTT): A JAX Toolbox for All Things Wasserstein".
    """
    x0, x1 = _batches(x0, x1)
    if jnp.shape(epsilon) != () or (concrete(epsilon) and not 0 < float(epsilon) < math.inf):
        raise ValueError(f"epsilon must be one positive number, got {epsilon}: a tenth of the mean cost is a start.")
    try:
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn as solver
    except ImportError as error:
        raise ImportError("sinkhorn needs OTT-JAX: pip install 'dgm-jax[ot]'; optimal needs SciPy alone.") from error
    x, y = (z.reshape(len(z), -1) for z in (x0, x1))
    cost = jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        problem = linear_problem.LinearProblem(
            geometry.Geometry(cost, epsilon=cast(Any, jnp.asarray(epsilon, x.dtype)))
        )
        found = solver.Sinkhorn(threshold=threshold, max_iterations=max_iterations)(problem)
        plan = found.matrix

    def host(converged: np.ndarray) -> np.ndarray:
        if not converged:
            raise ValueError(
                f"sinkhorn did not converge to threshold={threshold} in max_iterations={max_iterations}: raise "
                "epsilon or max_iterations, or look for NaN in the batches."
            )
        return np.zeros((), plan.dtype)

    good = jnp.asarray(found.converged) & jnp.all(jnp.isfinite(plan))
    return plan + _on_host(host, good, dtype=plan.dtype, shape=())


def squared_wasserstein(x: Array, y: Array) -> Array:
    """The squared 2-Wasserstein distance between two samples of equal size, exactly.

    W_2^2 = min over permutations pi of 1/n sum_i |x_i - y_pi(i)|^2.

    Of two samples of one distribution it is not zero, but of order log(n) / n in the plane and n^(-2/d) in d > 2
    dimensions: give that of two samples of the data beside it. 10,000 points take 0.8 GB of memory. Differentiable
    wherever the best permutation is unique.

    Args:
        x: samples ``[n, *event]``.
        y: samples ``[n, *event]``.

    Returns:
        W_2^2 ``[]`` in squared units of x.

    Raises:
        As ``optimal``.

    Source: Peyre & Cuturi (2019), "Computational Optimal Transport", section 2.
    """
    x, y = _batches(x, y, names=("x", "y"))
    rows = _on_host(lambda x, y: _assignment(_costs(x, y, names=("x", "y"))), x, y)
    return jnp.mean(jnp.sum((x - y[rows]).reshape(len(x), -1) ** 2, axis=1))


def _batches(x0: Any, x1: Any, names: tuple[str, str] = ("x0", "x1")) -> tuple[Array, Array]:
    """Both as batches of floats of one shape and dtype, and finite where that is known."""
    x0, x1 = floating(names[0], x0), floating(names[1], x1)
    if x0.shape != x1.shape or x0.ndim == 0 or x0.size == 0:
        raise ValueError(
            f"{names[0]} has shape {x0.shape} and {names[1]} {x1.shape}: both must be [n, *event] with one n of at "
            "least 1 and one event."
        )
    if x0.dtype != x1.dtype:
        raise TypeError(f"{names[0]} has dtype {x0.dtype} and {names[1]} {x1.dtype}: one dtype for both.")
    for name, x in zip(names, (x0, x1), strict=True):
        if concrete(x):
            _finite(name, np.asarray(x))
    return x0, x1


def _finite(name: str, x: np.ndarray) -> None:
    rows = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if rows.any():
        raise ValueError(
            f"{name} has NaN or infinity in {rows.sum()} of {len(x)} rows, the first {np.flatnonzero(rows)[0]}: find "
            "out why; leaving them out would hide a failure."
        )


def _costs(x: np.ndarray, y: np.ndarray, names: tuple[str, str] = ("x0", "x1")) -> np.ndarray:
    """Squared distances ``[n, n]`` in float64."""
    from scipy.spatial.distance import cdist

    x, y = (z.reshape(len(z), -1).astype(np.float64) for z in (x, y))
    _finite(names[0], x)
    _finite(names[1], y)
    return cdist(x, y, "sqeuclidean")


def _assignment(costs: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(costs)[1].astype(np.int32)


def _on_host(
    function: Callable[..., np.ndarray], *arrays: Array, dtype: Any = jnp.int32, shape: tuple[int, ...] | None = None
) -> Array:
    """function(arrays) on the host: at once where they are known, by a callback where they are traced."""
    shape = arrays[0].shape[:1] if shape is None else shape

    def host(*arrays: Any) -> np.ndarray:
        return np.asarray(function(*(np.asarray(array) for array in arrays)), dtype)

    if concrete(arrays):
        return jnp.asarray(host(*arrays))
    fixed = [jax.lax.stop_gradient(array) for array in arrays]
    return jax.pure_callback(host, jax.ShapeDtypeStruct(shape, dtype), *fixed, vmap_method="sequential")


# ------------------------------------------------------------------------------------------- paths of a velocity


def reflow(velocity: VectorField, x1: Array, args: Args = None, **options: Any) -> tuple[Array, Array]:
    """One pair of the coupling that a velocity makes, to train another on by ``loss``.

    x_0 = x_1 + integral from 1 to 0 of v(t, x(t)) dt,    x(1) = x_1.

    The pairs have the marginals of the flow. A velocity trained on them without error has straighter paths, and pairs
    that are no dearer, whatever the convex cost.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        x1: one draw from the source ``[*event]``.
        args: arrays that ``velocity`` needs.
        **options: those of ``solvers.odeint``.

    Returns:
        ``(x0, x1)``, both ``[*event]``; x0 is NaN where the solve failed.

    Raises:
        As ``solvers.odeint``.

    Source: Liu et al. (2023), sections 2 and 3.
    """
    return solvers.odeint(velocity, x1, args, t0=1.0, t1=0.0, **options), x1


def straightness(
    velocity: VectorField, x1: Array, args: Args = None, *, num_nodes: int = 16, **options: Any
) -> tuple[Array, Array]:
    """How far the paths of a velocity are from straight lines.

    S = E integral from 0 to 1 of |x(1) - x(0) - v(t, x(t))|^2 dt = E integral of |v|^2 dt - E |x(1) - x(0)|^2.

    0 where one step of Euler's method is exact.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        x1: independent draws from the source ``[num, *event]``, num at least 2.
        args: arrays that ``velocity`` needs.
        num_nodes: of the Gauss-Legendre rule for the integral.
        **options: those of ``solvers.odeint``.

    Returns:
        S ``[]`` in squared units of x, and its standard error ``[]`` over the draws; NaN where a solve failed.

    Raises:
        ValueError: fewer than 2 draws, NaN or infinity in them, a number of nodes that is not positive, or as
            ``solvers.odeint``.
        TypeError: ``x1`` not of floats.

    Source: Liu et al. (2023), section 2.
    """
    _, deviations = _along(velocity, x1, args, num_nodes, options)
    return _mean(deviations)


def normalised_path_energy(
    velocity: VectorField,
    x1: Array,
    squared_distance: float | Array,
    args: Args = None,
    *,
    num_nodes: int = 16,
    **options: Any,
) -> tuple[Array, Array]:
    """How much longer than need be the paths of a velocity are: their energy over that of optimal transport, less one.

    NPE = (E integral from 0 to 1 of |v(t, x(t))|^2 dt - W_2^2) / W_2^2

    0 for optimal transport and positive for anything else that has the same ends, curved or straight; where the model
    misses the data it may be negative.

    Args:
        velocity: v, ``(t [], x [*event], args) -> [*event]``.
        x1: independent draws from the source ``[num, *event]``, num at least 2.
        squared_distance: W_2^2 between data and source ``[]``, from ``squared_wasserstein`` or a closed form.
        args: arrays that ``velocity`` needs.
        num_nodes: of the Gauss-Legendre rule for the integral.
        **options: those of ``solvers.odeint``.

    Returns:
        NPE ``[]`` and its standard error ``[]`` over the draws, that of W_2^2 not included; NaN where a solve failed.

    Raises:
        ValueError: fewer than 2 draws, NaN or infinity in them, a number of nodes that is not positive, or as
            ``solvers.odeint``; a distance that is not positive, for which under ``jit`` the result is NaN.
        TypeError: ``x1`` not of floats.

    Source: Tong et al. (2024), section 5, where it has absolute bars.
    """
    if jnp.shape(squared_distance) != () or (concrete(squared_distance) and not 0 < float(squared_distance) < math.inf):
        raise ValueError(f"squared_distance must be one positive number, got {squared_distance}.")
    energies, _ = _along(velocity, x1, args, num_nodes, options)
    return _mean(energies / jnp.where(squared_distance > 0, squared_distance, jnp.nan) - 1)


def _along(
    velocity: VectorField, x1: Array, args: Args, num_nodes: int, options: dict[str, Any]
) -> tuple[Array, Array]:
    """Of each path the integrals of |v|^2 and of |x(1) - x(0) - v|^2, ``[num]`` both."""
    x1 = floating("x1", x1)
    if x1.ndim == 0 or len(x1) < 2:
        raise ValueError(f"x1 must be [num, *event] with num at least 2, for a standard error, got shape {x1.shape}.")
    if concrete(x1):
        _finite("x1", np.asarray(x1))
    rule = quadrature.gauss_legendre(_checks.positive_integer("num_nodes", num_nodes))
    ts = jnp.asarray(rule.nodes[::-1].copy(), x1.dtype)  # from 1 down to 0
    weights = jnp.asarray(rule.weights[::-1].copy(), x1.dtype)

    def one(z: Array) -> tuple[Array, Array]:
        solution = solvers.solve_ode(velocity, z, args, t0=1.0, t1=0.0, ts=ts, **options)
        v = jax.vmap(lambda t, x: velocity(t, x, args))(ts, solution.xs).reshape(len(ts), -1)
        apart = (z - solution.x).reshape(1, -1)
        values = weights @ jnp.sum(v**2, axis=1), weights @ jnp.sum((apart - v) ** 2, axis=1)
        return jax.tree.map(lambda value: jnp.where(solution.status == solvers.OK, value, jnp.nan), values)

    return jax.vmap(one)(x1)


def _mean(values: Array) -> tuple[Array, Array]:
    return jnp.mean(values), jnp.std(values, ddof=1) / math.sqrt(len(values))
