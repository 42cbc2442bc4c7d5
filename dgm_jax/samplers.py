"""Sampling in few steps: from noise to data along x_t = alpha x_0 + sigma eps, by a model of any of the five kinds.

Let lambda = log(alpha / sigma) be the clock and D(t, x) = E[x_0 | x_t = x] the prediction of the data. In a step from
time s down to t, of length h = lambda_t - lambda_s, the probability flow is linear but for D, as is the reverse SDE:

    x_t = (sigma_t / sigma_s) x_s + alpha_t int_0^h e^(u - h) D du,                                        the flow,
    x_t = (sigma_t / sigma_s) e^-h x_s + 2 alpha_t int_0^h e^(2 (u - h)) D du + sigma_t sqrt(1 - e^-2h) z,  the SDE,

z ~ N(0, I). What is linear is solved exactly; a sampler is a rule for the integral of D:

                                 evaluations in N steps    order    rule
    ddim, euler                  N                         1        D held where the step begins
    heun                         2 N                       2        trapezoidal rule for (y - D) / r, y = x / alpha
    dpm_solver_2s                2 N                       2        D held where lambda is half way
    dpm_solver_2m                N                         2        D by a line through the last two
    dpm_solver_2m_sde            N                         2 (law)  the same, in the SDE
    exponential_adams_bashforth  N, or N + 1 for order 3   1 to 3   D by a polynomial through the last ones
    predictor_corrector          N (1 + corrections)       -        ddim with eta = 1, then steps of Langevin dynamics

The order is that of the error at t_end > 0; with eta or churn it is the order of the law. All are one scan, in which
the model is evaluated once an iteration and the state put together from weights that are known before it begins.

``times`` [N + 1] fall from where x stands (t = 1, or just below) to ``t_end``; ``uniform``, ``quadratic``, ``log_snr``
and ``karras`` make them. A step along which h is infinite is of first order and takes one evaluation, whatever the
sampler. Such is a step down to t = 0 where sigma = 0: it ends at x = D, with no noise. Such is a step from t = 1 on
``cosine`` and ``linear``, where alpha = 0: there a model of x0, v or velocity can begin, one of noise or score says
nothing of the data. The model is never evaluated at t = 0.

One example and one key: ``jax.vmap`` makes many. Noise is drawn from ``fold_in(key, n)``, n counting down to 0 as in
``ddpm.ancestral``.

Source: Song, Meng & Ermon (2021), "Denoising Diffusion Implicit Models"; Karras et al. (2022), "Elucidating the Design
Space of Diffusion-Based Generative Models"; Lu et al. (2022), "DPM-Solver++: Fast Solver for Guided Sampling of
Diffusion Probabilistic Models"; Zhang & Chen (2023), "Fast Sampling of Diffusion Models with Exponential Integrator";
Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations".
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import _blocks, parameterizations, quadrature, schedules
from dgm_jax._checks import agree, at_least, concrete, evaluate, floating, one_time, positive_integer, typed_key
from dgm_jax.parameterizations import Kind
from dgm_jax.types import Args, Array, Schedule, VectorField

__all__ = [
    "ddim",
    "dpm_solver_2m",
    "dpm_solver_2m_sde",
    "dpm_solver_2s",
    "euler",
    "exponential_adams_bashforth",
    "heun",
    "karras",
    "log_snr",
    "prediction_errors",
    "predictor_corrector",
    "quadratic",
    "uniform",
]


# ---------------------------------------------------------------------------------------------------------- times


def uniform(num_steps: int, *, t_start: float = 1.0, t_end: float = 0.0, dtype: Any = None) -> Array:
    """Equal steps of time.

    t_i = t_start + (i / N) (t_end - t_start)

    Args:
        num_steps: N, at least 1.
        t_start: the first time, at most 1.
        t_end: the last time, at least 0.
        dtype: of the times; by default float32, or float64 under ``jax_enable_x64``.

    Returns:
        The times, falling ``[N + 1]``.

    Raises:
        ValueError: no steps, ends that are not 0 <= t_end < t_start <= 1, or steps too small for the dtype.

    Source: Song, Meng & Ermon (2021), appendix D.2, "linear".
    """
    u = _fractions(num_steps, t_start, t_end)
    return _made(t_start + u * (t_end - t_start), dtype)


def quadratic(num_steps: int, *, t_start: float = 1.0, t_end: float = 0.0, dtype: Any = None) -> Array:
    """Equal steps of the root of time: ever smaller ones towards the data.

    sqrt(t_i) = sqrt(t_start) + (i / N) (sqrt(t_end) - sqrt(t_start))

    Args:
        num_steps: N, at least 1.
        t_start: the first time, at most 1.
        t_end: the last time, at least 0.
        dtype: of the times; by default float32, or float64 under ``jax_enable_x64``.

    Returns:
        The times, falling ``[N + 1]``.

    Raises:
        ValueError: no steps, ends that are not 0 <= t_end < t_start <= 1, or steps too small for the dtype.

    Source: Song, Meng & Ermon (2021), appendix D.2, "quadratic".
    """
    u = _fractions(num_steps, t_start, t_end)
    return _made(np.square(math.sqrt(t_start) + u * (math.sqrt(t_end) - math.sqrt(t_start))), dtype)


def log_snr(
    schedule: Schedule,
    num_steps: int,
    *,
    t_start: float = 1.0,
    t_end: float = 1e-3,
    denoise: bool = False,
    dtype: Any = None,
) -> Array:
    """Equal steps of the logarithm of the signal-to-noise ratio: the grid of DPM-Solver.

    lambda(t_i) = lambda(t_start) + (i / N) (lambda(t_end) - lambda(t_start)),    lambda = log(alpha / sigma)

    Args:
        schedule: the path; lambda must be finite at both ends.
        num_steps: N, at least 1; with ``denoise`` at least 2.
        t_start: the first time, at most 1; below 1 on ``cosine`` and ``linear``.
        t_end: where the grid ends, above 0.
        denoise: let the last of the N steps go from t_end to 0.
        dtype: of the times; by default float32, or float64 under ``jax_enable_x64``.

    Returns:
        The times, falling ``[N + 1]``.

    Raises:
        ValueError: too few steps, ends that are not 0 <= t_end < t_start <= 1 or at which lambda is infinite, or steps
            too small for the dtype.
        TypeError: a schedule that holds tracers.

    Source: Lu et al. (2022), "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10
    Steps", section 3.4.
    """

    def place(first: float, last: float, u: np.ndarray) -> np.ndarray:
        return first + u * (last - first)

    return _placed(schedule, num_steps, t_start, t_end, denoise, dtype, place)


def karras(
    schedule: Schedule,
    num_steps: int,
    *,
    rho: float = 7.0,
    t_start: float = 1.0,
    t_end: float = 1e-3,
    denoise: bool = False,
    dtype: Any = None,
) -> Array:
    """Equal steps of a root of the noise-to-signal ratio: the grid of EDM.

    r(t_i)^(1/rho) = r(t_start)^(1/rho) + (i / N) (r(t_end)^(1/rho) - r(t_start)^(1/rho)),    r = sigma / alpha

    Args:
        schedule: the path; r must be positive and finite at both ends.
        num_steps: N, at least 1; with ``denoise`` at least 2.
        rho: at least 1, where the steps of r are equal; towards infinity the grid is ``log_snr``.
        t_start: the first time, at most 1; below 1 on ``cosine`` and ``linear``.
        t_end: where the grid ends, above 0.
        denoise: let the last of the N steps go from t_end to 0, as the paper does.
        dtype: of the times; by default float32, or float64 under ``jax_enable_x64``.

    Returns:
        The times, falling ``[N + 1]``.

    Raises:
        ValueError: too few steps, a rho below 1, ends that are not 0 <= t_end < t_start <= 1 or at which r is 0 or
            infinite, or steps too small for the dtype.
        TypeError: a schedule that holds tracers.

    Source: Karras et al. (2022), equation 5.
    """
    if not 1.0 <= rho < math.inf:
        raise ValueError(f"rho must be at least 1 and finite, got {rho}: the paper takes 7.")

    def place(first: float, last: float, u: np.ndarray) -> np.ndarray:
        large, small = math.exp(-first / rho), math.exp(-last / rho)
        return -rho * np.log(large + u * (small - large))

    return _placed(schedule, num_steps, t_start, t_end, denoise, dtype, place)


# ------------------------------------------------------------------------------------------------------- samplers


def ddim(
    key: Array | None,
    model: VectorField,
    schedule: Schedule,
    x: Array,
    times: Array,
    args: Args = None,
    *,
    prediction: Kind = "noise",
    eta: float | Array = 0.0,
) -> Array:
    """Denoising diffusion implicit models: from the flow, eta = 0, to ancestral sampling, eta = 1.

    x_t = alpha_t D + sqrt(sigma_t^2 - s^2) (x_s - alpha_s D) / sigma_s + s z,    s = eta sigma_t sqrt(1 - e^-2h)

    With eta = 1 a step draws from q(x_t | x_s, x_0 = D): on the steps of a chain that is ``ddpm.ancestral`` with the
    posterior variance, draw by draw for the same key. With eta = 0 it is the first-order exponential integrator of the
    flow. N evaluations in N steps; order 1, of the path for eta = 0 and of the law for any other.

    Args:
        key: a typed key; not used, and may be None, where eta is 0.
        model: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        x: where to begin, x at ``times[0]``, ``[*event]``.
        times: falling, in [0, 1] ``[N + 1]``. Brought to the dtype of x.
        args: passed to the model.
        prediction: what the model predicts: "score", "noise", "x0", "v" or "velocity". A model of one kind announced as
            another cannot be told apart from a right one here: ask ``prediction_errors``.
        eta: at least 0, ``[]``. Above 1 it is possible in steps with eta^2 (1 - e^-2h) <= 1; in others, NaN.

    Returns:
        x at ``times[-1]``, ``[*event]``. NaN where times that were not known when traced do not fall.

    Raises:
        ValueError: times that do not fall or are no times, an unknown prediction or one that cannot begin there, a
            negative eta, or a model whose value has another shape than x.
        TypeError: an old-style key or none where one is needed, an x not of floats, or a model of another dtype.

    Source: Song, Meng & Ermon (2021), equations 12 and 16, for any alpha and sigma.
    """
    x, denoiser, grid = _prepare(model, schedule, x, times, prediction)
    if concrete(eta) and not 0.0 <= float(eta) < math.inf:
        raise ValueError(f"eta must be at least 0 and finite, got {eta}: 0 is the flow, 1 ancestral sampling.")
    rows = _ancestral(grid, jnp.asarray(eta, x.dtype))
    if concrete(eta) and float(eta) == 0.0:
        rows = rows._replace(noise=None)
    return _run(key, denoiser, rows, x, args)


def euler(
    key: Array | None,
    model: VectorField,
    schedule: Schedule,
    x: Array,
    times: Array,
    args: Args = None,
    *,
    prediction: Kind = "noise",
    churn: float | Array = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float | Array = 1.0,
) -> Array:
    """Euler's method in r = sigma / alpha for y = x / alpha, with churn: EDM's sampler of first order.

    y_t = y + (r_t - r_s') (y - D) / r_s',    y = y_s + sqrt(r_s'^2 - r_s^2) churn_noise z,    r_s' = (1 + gamma) r_s,
    gamma = min(churn / N, sqrt(2) - 1) where r_s is in ``churn_range``, and 0 elsewhere.

    Without churn it is ``ddim`` with eta = 0. N evaluations in N steps; order 1, with churn of the law.

    Args:
        key: a typed key; not used, and may be None, where churn is 0.
        model: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        x: where to begin, x at ``times[0]``, ``[*event]``.
        times: falling, in [0, 1] ``[N + 1]``. Brought to the dtype of x.
        args: passed to the model.
        prediction: what the model predicts: see ``ddim``.
        churn: how much noise is added and taken away again, at least 0; the paper's S_churn.
        churn_range: (lowest, highest) r at which it is added; the paper's S_tmin and S_tmax. Noise is never raised
            above that of t = 1.
        churn_noise: factor of the noise added, the paper's S_noise: more than 1 makes up for a model that removes too
            much. At any other value than 1 the law is not that of the data, however small the steps.

    Returns:
        x at ``times[-1]``, ``[*event]``. NaN where times that were not known when traced do not fall.

    Raises:
        ValueError: times that do not fall or are no times, an unknown prediction or one that cannot begin there, a
            negative churn, an empty range, or a model whose value has another shape than x.
        TypeError: an old-style key or none where one is needed, an x not of floats, or a model of another dtype.

    Source: Karras et al. (2022), algorithm 2 without its correction, for any alpha and sigma.
    """
    x, denoiser, grid = _prepare(model, schedule, x, times, prediction)
    raised = _raise(schedule, grid, 1, churn, churn_range, churn_noise)
    first = _first_order(grid, raised)
    rows = _Rows(raised.t, raised.after * first.x, (raised.after * first.denoised[0],), noise=raised.noise_after)
    return _run(key, denoiser, rows, x, args, raised)


def heun(
    key: Array | None,
    model: VectorField,
    schedule: Schedule,
    x: Array,
    times: Array,
    args: Args = None,
    *,
    prediction: Kind = "noise",
    churn: float | Array = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float | Array = 1.0,
) -> Array:
    """Heun's method in r = sigma / alpha for y = x / alpha, with churn: EDM's sampler.

    y_t = y + (r_t - r_s') (d + d') / 2,    d = (y - D) / r_s',    d' = (y' - D') / r_t,    y' = y + (r_t - r_s') d,

    D' the prediction at (t, y'), y and r_s' as in ``euler``. In N steps 2 N evaluations, and one less for a step to
    sigma = 0 and one from alpha = 0, which are Euler's; where ``times`` or the schedule are tracers these are made all
    the same. Order 2, with churn of the law.

    Args:
        key: a typed key; not used, and may be None, where churn is 0.
        model: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        x: where to begin, x at ``times[0]``, ``[*event]``.
        times: falling, in [0, 1] ``[N + 1]``. Brought to the dtype of x.
        args: passed to the model.
        prediction: what the model predicts: see ``ddim``.
        churn: see ``euler``, as ``churn_range`` and ``churn_noise``.
        churn_range: (lowest, highest) r.
        churn_noise: factor of the noise added.

    Returns:
        x at ``times[-1]``, ``[*event]``. NaN where times that were not known when traced do not fall.

    Raises:
        ValueError: times that do not fall or are no times, an unknown prediction or one that cannot begin there, a
            negative churn, an empty range, or a model whose value has another shape than x.
        TypeError: an old-style key or none where one is needed, an x not of floats, or a model of another dtype.

    Source: Karras et al. (2022), algorithm 1 (without churn) and algorithm 2, for any alpha and sigma.
    """
    x, denoiser, grid = _prepare(model, schedule, x, times, prediction)
    raised = _raise(schedule, grid, 2, churn, churn_range, churn_noise)
    first = _first_order(grid, raised)
    whole, zero = jnp.isinf(raised.h), jnp.zeros_like(raised.h)
    scale = jnp.where(whole, raised.after, 1.0)
    second = 0.5 * grid.alpha[1:] * jnp.expm1(raised.h)  # of D'
    noise = raised.noise_after
    rows = _two_stages(
        _Rows(
            raised.t,
            scale * first.x,
            (scale * first.denoised[0], zero),
            zero,
            None if noise is None else jnp.where(whole, noise, 0.0),
        ),
        _Rows(
            grid.t[1:],
            zero,
            (raised.after * second, raised.after * (first.denoised[0] - second)),
            raised.after * first.x,
            noise,
        ),
        whole,
        grid.whole,
    )
    return _run(key, denoiser, rows, x, args, raised)


def dpm_solver_2s(
    model: VectorField,
    schedule: Schedule,
    x: Array,
    times: Array,
    args: Args = None,
    *,
    prediction: Kind = "noise",
) -> Array:
    """DPM-Solver++(2S): the exponential midpoint rule.

    x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) D',    D' = D(m, x_m),    lambda_m = (lambda_s + lambda_t) / 2,
    x_m = (sigma_m / sigma_s) x_s + alpha_m (1 - e^-h/2) D

    In N steps 2 N evaluations, and one less for a step to sigma = 0 and one from alpha = 0, which are of first order;
    where ``times`` or the schedule are tracers these are made all the same. Order 2.

    Args:
        model: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        x: where to begin, x at ``times[0]``, ``[*event]``.
        times: falling, in [0, 1] ``[N + 1]``. Brought to the dtype of x.
        args: passed to the model.
        prediction: what the model predicts: see ``ddim``.

    Returns:
        x at ``times[-1]``, ``[*event]``. NaN where times that were not known when traced do not fall.

    Raises:
        ValueError: times that do not fall or are no times, an unknown prediction or one that cannot begin there, or a
            model whose value has another shape than x.
        TypeError: an x not of floats, or a model of another dtype.

    Source: Lu et al. (2022), "DPM-Solver++", algorithm 1 with r = 1/2; Hochbruck & Ostermann (2010), "Exponential
    integrators", section 2.3.
    """
    x, denoiser, grid = _prepare(model, schedule, x, times, prediction)
    first, second = _midpoint(schedule, grid)
    return _run(None, denoiser, _two_stages(first, second, jnp.isinf(grid.h), grid.whole), x, args)


def dpm_solver_2m(
    model: VectorField,
    schedule: Schedule,
    x: Array,
    times: Array,
    args: Args = None,
    *,
    prediction: Kind = "noise",
) -> Array:
    """DPM-Solver++(2M): the multistep method of second order.

    x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) (D + (h / (2 h-)) (D - D-)),

    D- and h- the prediction and the length of the step before. The first step, and those along which h is infinite, are
    of first order. N evaluations in N steps; order 2.

    Args:
        model: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        x: where to begin, x at ``times[0]``, ``[*event]``.
        times: falling, in [0, 1], at least 2 steps ``[N + 1]``. Brought to the dtype of x.
        args: passed to the model.
        prediction: what the model predicts: see ``ddim``.

    Returns:
        x at ``times[-1]``, ``[*event]``. NaN where times that were not known when traced do not fall.

    Raises:
        ValueError: times that do not fall or are no times, fewer than 2 steps, an unknown prediction or one that
            cannot begin there, or a model whose value has another shape than x.
        TypeError: an x not of floats, or a model of another dtype.

    Source: Lu et al. (2022), "DPM-Solver++", algorithm 2.
    """
    x, denoiser, grid = _prepare(model, schedule, x, times, prediction, 2)
    first = _first_order(grid, grid)
    rows = first._replace(denoised=_along_the_line(grid.h, first.denoised[0]))
    return _run(None, denoiser, rows, x, args)


def dpm_solver_2m_sde(
    key: Array,
    model: VectorField,
    schedule: Schedule,
    x: Array,
    times: Array,
    args: Args = None,
    *,
    prediction: Kind = "noise",
) -> Array:
    """SDE-DPM-Solver++(2M): the multistep method of second order for the reverse SDE.

    x_t = (sigma_t / sigma_s) e^-h x_s + alpha_t (1 - e^-2h) (D + (h / (2 h-)) (D - D-)) + sigma_t sqrt(1 - e^-2h) z,

    D- and h- the prediction and the length of the step before. The first step, and those along which h is infinite, are
    those of ``ddim`` with eta = 1. N evaluations in N steps; the law has order 2 where D is linear in x, as it is for
    Gaussian data.

    Args:
        key: a typed key.
        model: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        x: where to begin, x at ``times[0]``, ``[*event]``.
        times: falling, in [0, 1], at least 2 steps ``[N + 1]``. Brought to the dtype of x.
        args: passed to the model.
        prediction: what the model predicts: see ``ddim``.

    Returns:
        x at ``times[-1]``, ``[*event]``. NaN where times that were not known when traced do not fall.

    Raises:
        ValueError: times that do not fall or are no times, fewer than 2 steps, an unknown prediction or one that
            cannot begin there, or a model whose value has another shape than x.
        TypeError: an old-style key, an x not of floats, or a model of another dtype.

    Source: Lu et al. (2022), "DPM-Solver++", SDE-DPM-Solver++(2M).
    """
    x, denoiser, grid = _prepare(model, schedule, x, times, prediction, 2)
    first = _ancestral(grid, jnp.ones((), x.dtype))
    rows = first._replace(denoised=_along_the_line(grid.h, first.denoised[0]))
    return _run(key, denoiser, rows, x, args)


def exponential_adams_bashforth(
    model: VectorField,
    schedule: Schedule,
    x: Array,
    times: Array,
    args: Args = None,
    *,
    prediction: Kind = "noise",
    order: int = 3,
) -> Array:
    """The exponential Adams-Bashforth method: D by the polynomial in lambda through its last values.

    x_t = (sigma_t / sigma_s) x_s + alpha_t sum_j D_j int_0^h e^(u - h) l_j(lambda_s + u) du,

    l_j the polynomial that is 1 at lambda_j and 0 at the others. Order 1 is ``ddim`` with eta = 0; order 2 differs from
    ``dpm_solver_2m`` in weights by O(h^2). A step may use no more predictions than there are: the first has one. That
    costs an order p up to 2 nothing, for one step's own error is of one order more; the first step of order 3 is taken
    by ``dpm_solver_2s``, whose second evaluation is the price: N evaluations in N steps for order 1 and 2, N + 1 for 3.
    Steps along which h is infinite are of first order.

    The paper's method interpolates the noise as a function of t; here it is the data as a function of lambda, as in
    ``dpm_solver_2m``.

    Args:
        model: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        x: where to begin, x at ``times[0]``, ``[*event]``.
        times: falling, in [0, 1], at least ``order`` steps ``[N + 1]``. Brought to the dtype of x.
        args: passed to the model.
        prediction: what the model predicts: see ``ddim``.
        order: 1, 2 or 3.

    Returns:
        x at ``times[-1]``, ``[*event]``. NaN where times that were not known when traced do not fall.

    Raises:
        ValueError: times that do not fall or are no times, fewer steps than the order, an order that is not 1, 2 or 3,
            an unknown prediction or one that cannot begin there, or a model whose value has another shape than x.
        TypeError: an x not of floats, or a model of another dtype.

    Source: Zhang & Chen (2023); Hochbruck & Ostermann (2010), "Exponential integrators", section 2.5.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}.")
    x, denoiser, grid = _prepare(model, schedule, x, times, prediction, order)
    first = _first_order(grid, grid)
    seen = grid.lam[:-1]
    if order < 3:
        rows = first._replace(denoised=_interpolated(seen, grid, first.denoised[0], order))
        return _run(None, denoiser, rows, x, args)
    begin, end = (
        jax.tree.map(lambda a: a[:1], row._replace(denoised=(row.denoised[0], *[jnp.zeros_like(row.t)] * 2)))
        for row in _midpoint(schedule, grid)
    )
    whole = jnp.isinf(grid.h[:1])
    start = _two_stages(begin, end, whole, None if grid.whole is None else grid.whole[:1])._replace(n=None)
    middle = jnp.where(whole, -jnp.inf, 0.5 * (grid.lam[:1] + grid.lam[1:2]))
    seen = jnp.concatenate([seen[:1], middle, seen[1:]])
    later = first._replace(denoised=_interpolated(seen, grid, first.denoised[0], order), before=jnp.zeros_like(grid.h))
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b[1:]]), start, later)
    return _run(None, denoiser, rows, x, args)


def predictor_corrector(
    key: Array,
    model: VectorField,
    schedule: Schedule,
    x: Array,
    times: Array,
    args: Args = None,
    *,
    prediction: Kind = "noise",
    snr: float | Array = 0.16,
    num_corrections: int = 1,
) -> Array:
    """Ancestral steps from time to time, each followed by Langevin steps at the time that it reached.

    x <- x + e grad log p_t(x) + sqrt(2 e) z = (1 - 2 snr^2) x + 2 snr^2 alpha D + 2 snr sigma z,    e = 2 snr^2 sigma^2

    The paper takes e = 2 (snr |z| / |score|)^2 with norms over the batch. For one example such a step would depend on
    where it starts and on its own noise, and leave another density than p_t; here |score| is sqrt(d) / sigma, its size
    where x is all noise, and |z| is sqrt(d). The steps are not adjusted: along an axis in which x_t has variance V, and
    sigma^2 / V = c <= 1, they settle at V / (1 - snr^2 c), see ``langevin.unadjusted`` with its eta = 2 e.

    N (1 + num_corrections) evaluations in N steps, without the corrections after a step to sigma = 0, where there is
    nothing to correct; where ``times`` or the schedule are tracers these are made all the same. As snr is fixed the law
    has no order in the length of the steps.

    Args:
        key: a typed key.
        model: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        x: where to begin, x at ``times[0]``, ``[*event]``.
        times: falling, in [0, 1] ``[N + 1]``. Brought to the dtype of x.
        args: passed to the model.
        prediction: what the model predicts: see ``ddim``.
        snr: what the Langevin step moves by its drift over what it moves by its noise, in (0, 1) ``[]``.
        num_corrections: Langevin steps after each ancestral step, at least 0.

    Returns:
        x at ``times[-1]``, ``[*event]``. NaN where times that were not known when traced do not fall.

    Raises:
        ValueError: times that do not fall or are no times, an unknown prediction or one that cannot begin there, an snr
            outside (0, 1), a negative number of corrections, or a model whose value has another shape than x.
        TypeError: an old-style key, a number of corrections that is not an int, an x not of floats, or a model of
            another dtype.

    Source: Song et al. (2021), section 4.2 and appendix G, algorithms 2 to 5.
    """
    corrections = at_least("num_corrections", num_corrections, 0)
    if concrete(snr) and not 0.0 < float(snr) < 1.0:
        raise ValueError(f"snr must be in (0, 1), got {snr}: from 1 on Langevin dynamics diverges; the paper has 0.16.")
    x, denoiser, grid = _prepare(model, schedule, x, times, prediction)
    snr = jnp.asarray(snr, x.dtype)
    clean = grid.sigma[1:] == 0.0
    share = jnp.where(clean, 0.0, 2.0 * jnp.square(snr))
    corrector = _Rows(
        jnp.where(clean, grid.t[:-1], grid.t[1:]),
        1.0 - share,
        (share * grid.alpha[1:],),
        noise=2.0 * snr * grid.sigma[1:],
    )
    stages = [_ancestral(grid, jnp.ones((), x.dtype)), *[corrector] * corrections]
    keep = np.ones((grid.h.shape[0], len(stages)), bool)
    if grid.clean:
        keep[-1, 1:] = False
    return _run(key, denoiser, _interleave(stages, keep), x, args)


def prediction_errors(
    model: VectorField, schedule: Schedule, t: float | Array, x0: Array, noise: Array, args: Args = None
) -> dict[Kind, Array]:
    """What kind of prediction a trained model makes: its error on an example of the data, read as each of the five.

    mean over entries of (D - x0)^2 at x_t = alpha x0 + sigma noise,    D what the prediction says of x0 under each kind

    Nothing predicts x0 better than E[x0 | x_t] on average, and so a model that is right under its own kind has its
    least mean error there. One evaluation an example; average over a few, at a t with both signal and noise.
    A wrong schedule, or a wrong scale of t, shows as well: then all errors are large.

    Args:
        model: ``(t [], x [*event], args) -> [*event]``.
        schedule: the path.
        t: time strictly between 0 and 1 ``[]``, say 0.5.
        x0: an example of the data ``[*event]``.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x0``.
        args: passed to the model.

    Returns:
        The error ``[]``, in units of the data squared, by kind.

    Raises:
        ValueError: shapes that differ, or a t that is not one time between 0 and 1.
        TypeError: arrays not of floats or of two dtypes.

    Source: Bishop (2006), "Pattern Recognition and Machine Learning", section 1.5.5: the mean is the best prediction.
    """
    x0, noise = agree("x0", x0, "noise", noise)
    if concrete(t) and np.ndim(t) == 0 and not 0.0 < float(t) < 1.0:
        raise ValueError(f"t must lie between 0 and 1, where x_t has both signal and noise, got {t}: try 0.5.")
    t = one_time(t, x0.dtype)
    x = schedules.alpha(schedule, t) * x0 + schedules.sigma(schedule, t) * noise
    with jax.default_matmul_precision("highest"):
        value = evaluate("model", model, t, x, args)

    def error(kind: Kind) -> Array:
        denoised = parameterizations.convert(lambda t, x, args: value, schedule, source=kind, target="x0")(t, x, args)
        return jnp.mean(jnp.square(denoised - x0))

    return {kind: error(kind) for kind in get_args(Kind)}


# -------------------------------------------------------------------------------------------------------- private

_NODES = quadrature.gauss_legendre(16)  # e^(h v) on [0, 1] to 1e-10 up to h = 25


class _Rows(NamedTuple):
    """For each of K evaluations: where it is made, and the weights that make the next state from what is known then.

    Attributes:
        t: time ``[K]``.
        x: weight of the state, at which the model is evaluated ``[K]``.
        denoised: weights of D there, and of the D of the evaluations before ``[K]`` each.
        before: weight of the state of the evaluation before ``[K]``, or None.
        noise: weight of the noise ``[K]``, or None.
        n: number of the noise, int32 ``[K]``; None where they count down to 0 without gaps.
    """

    t: Array
    x: Array
    denoised: tuple[Array, ...]
    before: Array | None = None
    noise: Array | None = None
    n: Array | None = None


class _Grid(NamedTuple):
    """The path at the times ``[N + 1]``, and the steps ``[N]``."""

    t: Array
    alpha: Array
    sigma: Array
    lam: Array  # log(alpha / sigma)
    h: Array  # how far lambda rises in each step
    whole: np.ndarray | None  # which steps have an infinite h, if that is known
    clean: bool  # whether sigma = 0 at the end is known


class _Raised(NamedTuple):
    """Where each step begins once churn has added its noise ``[N]``."""

    t: Array
    sigma: Array
    h: Array
    after: Array  # the factor of the state after each step, for the noise of the next
    noise_after: Array | None
    first: tuple[Array, Array]  # factor and noise before the first step, [] each
    n: int  # number of the noise before the first step


def _run(
    key: Array | None, denoiser: VectorField, rows: _Rows, x: Array, args: Args, raised: _Raised | None = None
) -> Array:
    """The scan: one evaluation an iteration."""
    typed = typed_key(key) if rows.noise is not None or key is not None else None
    if rows.n is None:
        rows = rows._replace(n=_down_to_0(rows.t.shape[0]))

    def step(carry: tuple[Array, Any, tuple[Array, ...]], row: _Rows, eps: Array | None = None) -> tuple[Any, None]:
        x, before, past = carry
        known = (denoiser(row.t, x, args), *past)
        new = row.x * x
        for weight, denoised in zip(row.denoised, known, strict=True):
            new = new + weight * denoised
        if row.before is not None:
            new = new + row.before * before
        if row.noise is not None and eps is not None:
            new = new + row.noise * eps
        return (new, None if row.before is None else x, known[:-1]), None

    if rows.noise is not None and raised is not None:
        first = jax.random.normal(jax.random.fold_in(cast(Array, typed), raised.n), x.shape, x.dtype)
        x = raised.first[0] * x + raised.first[1] * first
    start = (x, None if rows.before is None else x, (jnp.zeros_like(x),) * (len(rows.denoised) - 1))
    with jax.default_matmul_precision("highest"):
        if rows.noise is None:
            return jax.lax.scan(step, start, rows)[0][0]
        numbers = cast(Array, rows.n)
        return _blocks.scan_with_noise(step, start, rows, key=cast(Array, typed), numbers=numbers, like=x)[0][0]


def _prepare(
    model: VectorField, schedule: Schedule, x: Array, times: Any, prediction: Kind, least: int = 1
) -> tuple[Array, VectorField, _Grid]:
    """x, D by the model, and the path at ``times``: NaN where they do not fall and that could not be known in time."""
    if prediction not in get_args(Kind):
        raise ValueError(f"prediction must be one of {', '.join(get_args(Kind))}, got {prediction!r}.")
    x = floating("x", x)
    known = np.asarray(times).astype(x.dtype) if concrete(times) else None
    t = floating("times", times).astype(x.dtype)
    if t.ndim != 1 or t.shape[0] < 2:
        raise ValueError(f"times must have shape [N + 1] with N at least 1, got shape {t.shape}: see samplers.uniform.")
    if t.shape[0] <= least:
        raise ValueError(f"times must have at least {least} steps for a method of this order, got {t.shape[0] - 1}.")
    whole, clean = None, False
    if known is None:
        t = jnp.where(jnp.all(jnp.diff(t) < 0) & (t[0] <= 1) & (t[-1] >= 0), t, jnp.nan)
    else:
        _check_falling("times", known)
        with jax.ensure_compile_time_eval():
            ends = schedule.log_alpha(jnp.asarray(known[0])), schedule.variance(jnp.asarray(known[-1]))
        if concrete(ends):
            gone, clean = bool(np.isneginf(np.asarray(ends[0]))), bool(np.asarray(ends[1]) == 0)
            if gone and prediction in ("noise", "score"):
                raise ValueError(
                    f"prediction {prediction!r} says nothing of the data at times[0]={known[0]}, where alpha is 0: "
                    "begin below it, say at t_start=0.999."
                )
            whole = np.zeros(len(known) - 1, bool)
            whole[0] |= gone
            whole[-1] |= clean
    log_alpha, variance = _path(schedule, t)
    grid = _Grid(
        t,
        jnp.exp(log_alpha),
        jnp.sqrt(variance),
        log_alpha - 0.5 * jnp.log(variance),
        _rise(log_alpha[:-1], variance[:-1], log_alpha[1:], variance[1:]),
        whole,
        clean,
    )

    def checked(t: Array, x: Array, args: Args) -> Array:
        return evaluate("model", model, t, x, args)

    return x, parameterizations.convert(checked, schedule, source=prediction, target="x0"), grid


def _path(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    """log alpha and sigma^2, of which a schedule's own may be minus zero."""
    return jax.vmap(schedule.log_alpha)(t), jnp.abs(jax.vmap(schedule.variance)(t))


def _rise(log_alpha: Array, variance: Array, log_alpha_later: Array, variance_later: Array) -> Array:
    """How far lambda rises: from the ratio of the variances, as the difference of their logarithms has fewer digits."""
    return (log_alpha_later - log_alpha) + 0.5 * jnp.log(variance / variance_later)


def _first_order(grid: _Grid, start: _Grid | _Raised) -> _Rows:
    """D held where each step begins: the flow."""
    n = grid.h.shape[0]
    return _Rows(start.t[:n], grid.sigma[1:] / start.sigma[:n], (-grid.alpha[1:] * jnp.expm1(-start.h),))


def _ancestral(grid: _Grid, eta: Array) -> _Rows:
    """D held where each step begins, with noise of eta times the standard deviation of q(x_t | x_s, x_0)."""
    gained = -jnp.expm1(-2.0 * grid.h)
    kept = jnp.where(grid.sigma[1:] == 0.0, 0.0, 0.5 * jnp.log1p(-jnp.square(eta) * gained))  # log of what noise stays
    return _Rows(
        grid.t[:-1],
        grid.sigma[1:] / grid.sigma[:-1] * jnp.exp(kept),
        (-grid.alpha[1:] * jnp.expm1(kept - grid.h),),
        noise=eta * grid.sigma[1:] * jnp.sqrt(gained),
    )


def _along_the_line(h: Array, total: Array) -> tuple[Array, Array]:
    """Weights of the last two D from that of both: D + (h / (2 h-)) (D - D-)."""
    before = jnp.concatenate([jnp.full_like(h[:1], jnp.inf), h[:-1]])
    lean = jnp.where(jnp.isinf(h), 0.0, 0.5 * h / before)
    return total * (1.0 + lean), -total * lean


def _interpolated(seen: Array, grid: _Grid, total: Array, order: int) -> tuple[Array, ...]:
    """Weights of the last ``order`` D in each step, from that of all; ``seen`` is lambda at each evaluation.

    The integral over [0, h] of e^(u - h) l_j by quadrature, but for that of the last D, which is what remains. A node
    that is not there is at minus infinity: it has no weight, and leaves the others theirs.
    """
    num, h = grid.h.shape[0], jnp.where(jnp.isinf(grid.h), 1.0, grid.h)
    padded = jnp.concatenate([jnp.full((order - 1,), -jnp.inf, seen.dtype), seen])
    nodes = [padded[len(padded) - num - j : len(padded) - j] for j in range(order)]
    there = [jnp.isfinite(node) & jnp.isfinite(grid.h) & jnp.isfinite(nodes[0]) for node in nodes]
    v, mass = (jnp.asarray(a, h.dtype) for a in (_NODES.nodes, _NODES.weights))
    at = h[:, None] * v[None]  # less lambda at the beginning of the step
    decay = h[:, None] * mass[None] * jnp.exp(at - h[:, None])
    offsets = [jnp.where(ok, node - nodes[0], 0.0) for node, ok in zip(nodes, there, strict=True)]
    weights = []
    for j in range(1, order):
        basis = jnp.ones_like(at)
        for m in range(order):
            if m != j:
                gap = jnp.where(there[j] & there[m], offsets[j] - offsets[m], 1.0)
                factor = (at - offsets[m][:, None]) / gap[:, None]
                basis = basis * jnp.where(there[m][:, None], factor, 1.0)
        integral = grid.alpha[1:] * jnp.sum(decay * basis, axis=1)
        weights.append(jnp.where(there[j], integral, 0.0))
    return (total - sum(weights), *weights)


def _midpoint(schedule: Schedule, grid: _Grid) -> tuple[_Rows, _Rows]:
    """The two stages of the exponential midpoint rule; of a step along which h is infinite the first is all of it."""
    whole, zero = jnp.isinf(grid.h), jnp.zeros_like(grid.h)
    lam = jnp.where(whole, grid.lam[jnp.asarray(len(grid.h) // 2)], 0.5 * (grid.lam[:-1] + grid.lam[1:]))
    t = _time_of(schedule, lam)
    log_alpha, variance = _path(schedule, t)
    begun = jnp.log(grid.alpha[:-1]), jnp.square(grid.sigma[:-1])
    all_of_it = _first_order(grid, grid)
    half = -jnp.exp(log_alpha) * jnp.expm1(-_rise(*begun, log_alpha, variance))
    first = _Rows(
        grid.t[:-1],
        jnp.where(whole, all_of_it.x, jnp.sqrt(variance) / grid.sigma[:-1]),
        (jnp.where(whole, all_of_it.denoised[0], half),),
        zero,
    )
    return first, _Rows(t, zero, all_of_it.denoised, all_of_it.x)


def _two_stages(first: _Rows, second: _Rows, whole: Array, known: np.ndarray | None) -> _Rows:
    """Both stages of each step in turn, without the second one of ``whole`` steps.

    Where those are not known the second stage evaluates the model at a time that it knows already, and changes nothing.
    """
    idle = _Rows(
        first.t,
        jnp.ones_like(first.t),
        tuple(jnp.zeros_like(weight) for weight in first.denoised),
        jnp.zeros_like(first.t),
        None if first.noise is None else jnp.zeros_like(first.noise),
    )
    second = jax.tree.map(lambda a, b: jnp.where(whole, a, b), idle, second)
    keep = np.ones((len(first.t), 2), bool)
    if known is not None:
        keep[known, 1] = False
    return _interleave([first, second], keep)


def _interleave(stages: list[_Rows], keep: np.ndarray) -> _Rows:
    """The stages of each step in turn, those kept; ``keep`` is ``[N, stages]``."""
    chosen = np.flatnonzero(keep)
    rows = jax.tree.map(lambda *columns: jnp.stack(columns, axis=1).reshape(-1)[chosen], *stages)
    return rows._replace(n=_down_to_0(keep.size)[chosen])


def _down_to_0(num: int) -> Array:
    return jnp.arange(num - 1, -1, -1, dtype=jnp.int32)


def _raise(
    schedule: Schedule,
    grid: _Grid,
    stages: int,
    churn: float | Array,
    churn_range: tuple[float, float],
    churn_noise: float | Array,
) -> _Raised:
    """EDM's churn: where each step begins, and what noise leads there."""
    for name, value in (("churn", churn), ("churn_noise", churn_noise)):
        if concrete(value) and not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}.")
    low, high = churn_range
    if not 0.0 <= low <= high:
        raise ValueError(f"churn_range must be (low, high) with 0 <= low <= high, got {churn_range}.")
    n, dtype = grid.h.shape[0], grid.t.dtype
    if concrete(churn) and float(churn) == 0.0:
        one = jnp.ones((n,), dtype)
        return _Raised(grid.t[:-1], grid.sigma[:-1], grid.h, one, None, (one[0], jnp.zeros((), dtype)), 0)
    lam, t = grid.lam[:-1], grid.t[:-1]
    ratio = jnp.exp(-lam)
    gamma = jnp.minimum(jnp.asarray(churn, dtype) / n, math.sqrt(2.0) - 1.0)
    gamma = jnp.where((ratio >= low) & (ratio <= high) & jnp.isfinite(ratio), gamma, 0.0)
    raised = _time_of(schedule, lam - jnp.log1p(gamma))
    moved = (gamma > 0.0) & (raised > t)
    raised = jnp.where(moved, raised, t)
    (log_alpha, variance), (before, _) = _path(schedule, raised), _path(schedule, t)
    rise = jnp.where(moved, _rise(log_alpha, variance, before, jnp.square(grid.sigma[:-1])), 0.0)
    scale = jnp.where(moved, jnp.exp(jnp.where(moved, log_alpha - before, 0.0)), 1.0)
    noise = (
        jnp.asarray(churn_noise, dtype) * scale * grid.sigma[:-1] * jnp.sqrt(jnp.expm1(2.0 * jnp.maximum(rise, 0.0)))
    )
    last = _path(schedule, grid.t[1:])
    return _Raised(
        raised,
        jnp.sqrt(variance),
        _rise(log_alpha, variance, *last),
        jnp.append(scale[1:], jnp.ones((), dtype)),
        jnp.append(noise[1:], jnp.zeros((), dtype)),
        (scale[0], noise[0]),
        stages * n,
    )


def _time_of(schedule: Schedule, lam: Array) -> Array:
    """The times in [0, 1] at which log(alpha / sigma), which falls with t, is ``lam`` ``[N]``, by bisection."""

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        noisier = 0.5 * jax.vmap(lambda t: schedules.log_snr(schedule, t))(middle) < lam
        return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

    iterations = 2 * jnp.finfo(lam.dtype).nmant + 16  # small times have their digits too
    low, high = jax.lax.fori_loop(0, iterations, halve, (jnp.zeros_like(lam), jnp.ones_like(lam)))
    return 0.5 * (low + high)


def _fractions(num_steps: int, t_start: float, t_end: float) -> np.ndarray:
    """i / N, if both ends are times."""
    num = positive_integer("num_steps", num_steps)
    if not 0.0 <= t_end < t_start <= 1.0:
        raise ValueError(
            f"t_start and t_end must be times with 0 <= t_end < t_start <= 1, got t_start={t_start} and t_end={t_end}: "
            "noise is at 1 and data at 0."
        )
    return np.linspace(0.0, 1.0, num + 1)


def _placed(
    schedule: Schedule,
    num_steps: int,
    t_start: float,
    t_end: float,
    denoise: bool,
    dtype: Any,
    place: Callable[[float, float, np.ndarray], np.ndarray],
) -> Array:
    """Times whose lambda is ``place(first, last, i / N)``."""
    num = positive_integer("num_steps", num_steps, 2 if denoise else 1)
    u = _fractions(num - int(denoise), t_start, t_end)
    with jax.ensure_compile_time_eval():
        ends = jnp.asarray([t_start, t_end], float)
        lam = 0.5 * jax.vmap(lambda t: schedules.log_snr(schedule, t))(ends)
        if not concrete(lam):
            raise TypeError("schedule holds tracers: make the times outside of jit and pass them in.")
        first, last = (float(value) for value in lam)
        if not (math.isfinite(first) and math.isfinite(last)):
            raise ValueError(
                f"log(alpha / sigma) must be finite at both ends, got {first} at t_start={t_start} and {last} at "
                f"t_end={t_end}: begin below 1 where alpha(1) = 0, say at t_start=0.999; for a last step to 0 pass "
                "denoise=True."
            )
        inner = np.asarray(_time_of(schedule, jnp.asarray(place(first, last, u[1:-1]), ends.dtype)), np.float64)
    return _made(np.concatenate([[t_start], inner, [t_end], [0.0] * int(denoise)]), dtype)


def _made(times: np.ndarray, dtype: Any) -> Array:
    with jax.ensure_compile_time_eval():
        made = jnp.asarray(times, jnp.zeros((), float if dtype is None else dtype).dtype)
    _check_falling("the times made", np.asarray(made))
    return made


def _check_falling(name: str, times: np.ndarray) -> None:
    if not np.all(np.isfinite(times)):
        raise ValueError(f"{name} must be finite, got {float(times[~np.isfinite(times)][0])}.")
    if not (times[0] <= 1.0 and times[-1] >= 0.0):
        raise ValueError(f"{name} must be in [0, 1], got {float(times[0])} first and {float(times[-1])} last.")
    rising = np.flatnonzero(np.diff(times) >= 0.0)
    if rising.size:
        i = int(rising[0])
        raise ValueError(
            f"{name} must fall, from noise to data, got {float(times[i])} and then {float(times[i + 1])} at index "
            f"{i + 1}, in {times.dtype}: samplers.uniform and its siblings make such times."
        )
