"""Langevin dynamics: samples of a density from its score alone, or from its log-density known up to a constant.

The equation dx = 1/2 grad log p dt + dw leaves p as it is. Taken in steps of eta,

    x_(n+1) = x_n + eta/2 grad log p(x_n) + sqrt(eta) eps_n,

it leaves a density that differs from p by O(eta) (:func:`unadjusted`). Taking each step only as a proposal, by the rule
of Metropolis and Hastings, removes that error altogether (:func:`metropolis`). Neither finds the right proportions of
modes that lie far apart; following a ladder of noise from large to small does (:func:`annealed`, the sampler of NCSN).

One chain for one example and one key: ``jax.vmap`` makes many. Step n draws from ``fold_in(key, n)``.

Source: Roberts & Tweedie (1996), "Exponential Convergence of Langevin Distributions and Their Discrete
Approximations"; Song & Ermon (2019), "Generative Modeling by Estimating Gradients of the Data Distribution".
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import _blocks
from dgm_jax._checks import concrete, evaluate, floating, like, noise_levels, one_time, positive_integer, typed_key
from dgm_jax.types import Args, Array, ScalarField, VectorField

__all__ = ["Info", "annealed", "effective_sample_size", "metropolis", "unadjusted"]


class Info(NamedTuple):
    """How a Metropolis-adjusted chain went, beside its last state.

    Attributes:
        acceptance: the probability of acceptance, mean over the steps ``[]``. About 0.57 is the most efficient in many
            dimensions; below 0.2 take smaller steps, above 0.9 larger ones.
        nonfinite: how many proposals were rejected because the log-density or its gradient was NaN or infinite there
            ``[]``, int32. Outside the support of p that is as it should be.
        states: every thin-th state ``[num_steps / thin, *event]``; None without ``thin``.
    """

    acceptance: Array
    nonfinite: Array
    states: Array | None


def unadjusted(
    key: Array,
    score: VectorField,
    x0: Array,
    args: Args = None,
    *,
    step_size: float | Array,
    num_steps: int,
    thin: int | None = None,
    t: float | Array = 0.0,
) -> Any:
    """Follow the Langevin equation in steps of equal size, without correction.

    x_(n+1) = x_n + eta/2 s(x_n) + sqrt(eta) eps_n,    eps_n ~ N(0, I)

    The law that it settles at differs from p by O(eta): on a Gaussian its variance is 1 / (l (1 - eta l / 4)) where
    the precision is l, and from eta = 4 / l on it diverges. It is ``solvers.euler_maruyama`` of ``sdes.langevin``, with
    the same draws for the same key.

    Args:
        key: a typed key.
        score: grad log p, ``(t [], x [*event], args) -> [*event]``.
        x0: where to start ``[*event]``.
        args: passed to the score.
        step_size: eta, positive, in units of x squared: ``[]``, or ``[*event]`` for a step of its own in each
            coordinate. Brought to the dtype of x0.
        num_steps: the number of steps, which is also the number of evaluations of the score.
        thin: return every thin-th state too; it divides ``num_steps``.
        t: the time at which the score is held ``[]``.

    Returns:
        The last state ``[*event]``, or with ``thin`` the pair (last state, states ``[num_steps / thin, *event]``).

    Raises:
        ValueError: for a step size, number of steps or ``thin`` out of range, or a score of another shape than x.
        TypeError: for an old-style key, or a state or score that is not of floats of one dtype.

    Source: Roberts & Tweedie (1996), section 1.4.1 (with h = eta); Parisi (1981), "Correlation Functions and Computer
    Simulations".
    """
    key, x0 = typed_key(key), floating("x0", x0)
    eta, t = _step_size(step_size, x0), one_time(t, x0.dtype)
    _check_counts(num_steps, thin)
    jax.eval_shape(lambda x: evaluate("score", score, t, x, args), x0)

    def step(n: Array, x: Array, eps: Array) -> Array:
        return x + 0.5 * eta * score(t, x, args) + jnp.sqrt(eta) * eps

    x, states = _iterate_with_noise(key, step, x0, num_steps, thin)
    return x if thin is None else (x, states)


def metropolis(
    key: Array,
    log_density: ScalarField,
    x0: Array,
    args: Args = None,
    *,
    step_size: float | Array,
    num_steps: int,
    thin: int | None = None,
    t: float | Array = 0.0,
) -> tuple[Array, Info]:
    """Follow the Langevin equation with every step accepted or rejected, so that p is stationary exactly (MALA).

    y = x + eta/2 grad log p(x) + sqrt(eta) eps,    accepted with probability min(1, p(y) q(x | y) / (p(x) q(y | x))),

    q(y | x) = N(y; x + eta/2 grad log p(x), eta I); where it is rejected the chain stays at x. The ratio is taken in
    logarithms. Log-density and gradient come from one ``jax.value_and_grad`` a step, and those of x are carried along:
    num_steps + 1 evaluations in all. A proposal at which either is not finite is rejected, and counted.

    Args:
        key: a typed key.
        log_density: log p up to a constant, ``(t [], x [*event], args) -> []``, in nats.
        x0: where to start ``[*event]``; log p and its gradient must be finite there.
        args: passed to the log-density.
        step_size: eta, positive, in units of x squared: ``[]``, or ``[*event]`` for a step of its own in each
            coordinate (a diagonal preconditioner). Brought to the dtype of x0.
        num_steps: the number of steps.
        thin: return every thin-th state too, in :class:`Info`; it divides ``num_steps``.
        t: the time at which the log-density is held ``[]``.

    Returns:
        ``(x [*event], info)``. Where log p or its gradient is not finite at x0, or the step size not positive, and that
        could not be known in time to raise (under ``jit`` or ``vmap``), x and the states are NaN.

    Raises:
        ValueError: for a step size, number of steps or ``thin`` out of range, a log-density that is not a scalar, or
            one that is not finite at x0.
        TypeError: for an old-style key, or a state or log-density that is not of floats of one dtype.

    Source: Roberts & Tweedie (1996), section 1.4.2; Besag (1994), comments on "Representations of Knowledge in Complex
    Systems"; Roberts & Rosenthal (1998), "Optimal Scaling of Discrete Approximations to Langevin Diffusions" (0.574).
    """
    key, x0 = typed_key(key), floating("x0", x0)
    eta, t = _step_size(step_size, x0), one_time(t, x0.dtype)
    _check_counts(num_steps, thin)
    jax.eval_shape(lambda x: like("log_density", log_density(t, x, args), (), x.dtype), x0)
    value_and_grad = jax.value_and_grad(lambda x: log_density(t, x, args))

    def step(carry: _Carry, n: Array) -> tuple[_Carry, None]:
        x, log_p, gradient, accepted, nonfinite = carry
        key_noise, key_accept = jax.random.split(jax.random.fold_in(key, n))
        eps = jax.random.normal(key_noise, x.shape, x.dtype)
        y = x + 0.5 * eta * gradient + jnp.sqrt(eta) * eps
        log_p_y, gradient_y = value_and_grad(y)
        # The noise that would lead back from y to x: from it, rather than from y - x, nothing cancels for small eta.
        back = eps + 0.5 * jnp.sqrt(eta) * (gradient + gradient_y)
        log_ratio = log_p_y - log_p + 0.5 * jnp.sum(eps**2 - back**2)
        finite = _finite(log_p_y, gradient_y)
        probability = jnp.where(finite, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
        accept = jax.random.uniform(key_accept, (), x.dtype) < probability
        x, log_p, gradient = (
            jnp.where(accept, new, old) for new, old in ((y, x), (log_p_y, log_p), (gradient_y, gradient))
        )
        return _Carry(x, log_p, gradient, accepted + probability, nonfinite + (~finite).astype(jnp.int32)), None

    def several(carry: _Carry, numbers: Array) -> _Carry:
        return jax.lax.scan(step, carry, numbers)[0]

    with jax.default_matmul_precision("highest"):
        log_p, gradient = value_and_grad(x0)
    fine = _finite(log_p, gradient)
    if concrete(fine) and not fine:
        raise ValueError(
            f"x0 is where the log-density is {float(log_p):g} and its gradient "
            f"{'' if np.all(np.isfinite(gradient)) else 'not '}finite: start inside the support."
        )
    fine &= jnp.all(jnp.isfinite(eta))  # with no step to take, a chain that stays would look like one that moves
    start = _Carry(jnp.where(fine, x0, jnp.nan), log_p, gradient, jnp.zeros((), x0.dtype), jnp.zeros((), jnp.int32))
    last, states = _iterate(several, start, num_steps, thin, lambda carry: carry.x)
    return last.x, Info(last.accepted / num_steps, last.nonfinite, states)


def annealed(
    key: Array,
    score: VectorField,
    sigmas: Array,
    x0: Array,
    args: Args = None,
    *,
    step_size: float | Array,
    num_steps: int,
    denoise: bool = True,
    thin: int | None = None,
) -> Any:
    """Follow the Langevin equation of the data under ever less noise: the sampler of NCSN.

    At each of the levels sigma_1 > ... > sigma_L in turn num_steps steps

    x <- x + alpha_i/2 s(sigma_i, x) + sqrt(alpha_i) eps,    alpha_i = step_size sigma_i^2 / sigma_L^2,

    which keep the size of the score term relative to the noise the same at every level. In the end the noise of the
    last level is taken away, x + sigma_L^2 s(sigma_L, x), the mean of the data given x.

    Args:
        key: a typed key.
        score: grad log of the density of x = data + sigma eps, ``(sigma [], x [*event], args) -> [*event]``: its first
            argument is sigma itself. For an oracle of ``densities`` take the schedule ``edm(sigma_max)`` and the time
            sigma / sigma_max.
        sigmas: the levels, positive and falling ``[L]``. Brought to the dtype of x0. ``ncsn.levels`` makes them.
        x0: where to start ``[*event]``, usually sigma_1 N(0, I).
        args: passed to the score.
        step_size: of the last level, positive, less than 4 sigma_L^2, beyond which the steps diverge at levels wider
            than the data. Brought to the dtype of x0. ``ncsn.step_size`` chooses one.
        num_steps: the number of steps at each level.
        denoise: take the last step that removes the noise. One more evaluation.
        thin: return every thin-th state too; it divides L ``num_steps``. The denoised state is not among them.

    Returns:
        The last state ``[*event]``, or with ``thin`` the pair (last state, states ``[L num_steps / thin, *event]``).
        L num_steps evaluations of the score, and one for the denoising.

    Raises:
        ValueError: for levels that do not fall or are not positive, a step size, number of steps or ``thin`` out of
            range, or a score of another shape than x.
        TypeError: for an old-style key, or a state, levels or score that is not of floats of one dtype.

    Source: Song & Ermon (2019), algorithm 1; Song & Ermon (2020), "Improved Techniques for Training Score-Based
    Generative Models", algorithm 1 (whose step is half of ours), section 2 and Jolicoeur-Martineau et al. (2021),
    "Adversarial score matching and improved sampling for image generation", section 3.1 (the last step).
    """
    key, x0 = typed_key(key), floating("x0", x0)
    sigmas = noise_levels(sigmas, x0.dtype)
    eta = _step_size(step_size, x0, scalar=True)
    if concrete((eta, sigmas)) and not eta < 4 * sigmas[-1] ** 2:
        raise ValueError(
            f"step_size must be less than 4 sigma_L^2 = {float(4 * sigmas[-1] ** 2):g}, got {float(eta):g}: with a "
            "larger one the levels that are wider than the data diverge; ncsn.step_size(sigmas, num_steps) chooses one."
        )
    _check_counts(num_steps, None)
    total = sigmas.shape[0] * num_steps
    _check_counts(total, thin)
    jax.eval_shape(lambda x: evaluate("score", score, sigmas[0], x, args), x0)

    def step(n: Array, x: Array, eps: Array) -> Array:
        sigma = sigmas[n // num_steps]
        alpha = eta * jnp.square(sigma / sigmas[-1])
        return x + 0.5 * alpha * score(sigma, x, args) + jnp.sqrt(alpha) * eps

    x, states = _iterate_with_noise(key, step, x0, total, thin)
    if denoise:
        with jax.default_matmul_precision("highest"):
            x = x + jnp.square(sigmas[-1]) * score(sigmas[-1], x, args)
    return x if thin is None else (x, states)


def effective_sample_size(states: Array, *, chains: bool = False) -> Array:
    """How many independent draws would give the mean of each coordinate as precisely as the chain does.

    n / tau,    tau = 1 + 2 sum_(k >= 1) rho_k = -1 + 2 sum_(j >= 0) (rho_2j + rho_(2j+1)),

    the autocorrelations rho from one fast Fourier transform, the sum over pairs cut before the first that is not
    positive, with each pair at most as large as the one before: Geyer's initial monotone sequence. The Monte Carlo
    error of the mean is the standard deviation over the root of it. Several chains are taken together, a difference
    between their means counting as correlation.

    Args:
        states: successive states of a chain that has forgotten its start ``[num, *event]``, num at least 4, as in
            ``Info.states``.
        chains: states are ``[chains, num, *event]`` instead.

    Returns:
        ``[*event]``: more than num where successive states are anticorrelated, but at most num log10(num) (num counting
        those of all chains). NaN where the states do not move or are not finite.

    Raises:
        ValueError: for fewer than 4 states.
        TypeError: for states that are not floats.

    Source: Geyer (1992), "Practical Markov Chain Monte Carlo", section 3.3; Vehtari et al. (2021),
    "Rank-Normalization, Folding, and Localization: An Improved R-hat", section 3.2 (several chains).
    """
    states = floating("states", states)
    if states.ndim < (2 if chains else 1) or states.shape[chains] < 4:
        wanted = "[chains, num, *event]" if chains else "[num, *event]"
        raise ValueError(f"states must have shape {wanted} with num at least 4, got shape {states.shape}.")
    if not chains:
        states = states[None]
    m, n = states.shape[:2]
    means = jnp.mean(states, axis=1, keepdims=True)
    centred = states - means
    spectrum = jnp.fft.rfft(centred, 2 ** math.ceil(math.log2(2 * n)), axis=1)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    autocovariance = jnp.mean(jnp.fft.irfft(power, axis=1)[:, :n], axis=0) / (n - 1)  # [n, *event]
    within = autocovariance[0]
    total = within if m == 1 else within * ((n - 1) / n) + jnp.var(means[:, 0], axis=0, ddof=1)
    rho = 1.0 - (within[None] - autocovariance) / total[None]
    pairs = rho[0 : n - n % 2 : 2] + rho[1::2]

    def add(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        k, least, tau = carry  # least is 0 from the first pair on that is not positive
        least = jnp.minimum(least, jnp.maximum(pairs[k], 0.0))
        return k + 1, least, tau + 2.0 * least

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[0] < n // 2) & jnp.any(carry[1] > 0)

    first = (jnp.int32(0), jnp.full_like(within, jnp.inf), jnp.full_like(within, -1.0))
    tau = jax.lax.while_loop(unfinished, add, first)[2]
    moved = jnp.any(states != states[:, :1], axis=(0, 1)) & jnp.isfinite(total)
    return jnp.where(moved, m * n / jnp.maximum(tau, 1 / math.log10(m * n)), jnp.nan)


class _Carry(NamedTuple):
    """What a Metropolis-adjusted chain takes from step to step."""

    x: Array  # [*event]
    log_p: Array  # []
    gradient: Array  # [*event]
    accepted: Array  # [], sum of the probabilities
    nonfinite: Array  # [], int32


def _iterate(
    several: Callable[[Any, Array], Any], start: Any, num_steps: int, thin: int | None, state: Callable[[Any], Array]
) -> tuple[Any, Array | None]:
    """``several(carry, numbers of the steps to take)`` for all steps, and with ``thin`` every thin-th state."""

    def block(carry: Any, numbers: Array) -> tuple[Any, Array]:
        carry = several(carry, numbers)
        return carry, state(carry)

    numbers = jnp.arange(num_steps, dtype=jnp.int32)
    with jax.default_matmul_precision("highest"):
        if thin is None:
            return several(start, numbers), None
        return jax.lax.scan(block, start, numbers.reshape(-1, thin))


def _iterate_with_noise(
    key: Array, step: Callable[[Array, Array, Array], Array], x0: Array, num_steps: int, thin: int | None
) -> tuple[Array, Array | None]:
    """The same with x_(n+1) = step(n, x_n, eps_n)."""

    def one(x: Array, n: Array, eps: Array) -> tuple[Array, None]:
        return step(n, x, eps), None

    def several(x: Array, numbers: Array) -> Array:
        return _blocks.scan_with_noise(one, x, numbers, key=key, numbers=numbers, like=x)[0]

    return _iterate(several, x0, num_steps, thin, lambda x: x)


def _finite(log_p: Array, gradient: Array) -> Array:
    return jnp.isfinite(log_p) & jnp.all(jnp.isfinite(gradient))


def _step_size(step_size: float | Array, x: Array, *, scalar: bool = False) -> Array:
    """``step_size`` in the dtype of x, if it fits and is positive: NaN where that could not be known in time."""
    array = jnp.asarray(step_size)
    if array.shape != () and (scalar or array.shape != x.shape):
        wanted = "one number" if scalar else f"one number, or one for each coordinate of x, {x.shape}"
        raise ValueError(f"step_size must be {wanted}, got shape {array.shape}.")
    array = array.astype(x.dtype)
    if concrete(array) and not np.all((np.asarray(array) > 0) & np.isfinite(np.asarray(array))):
        raise ValueError(f"step_size must be positive and finite, got {step_size}.")
    return jnp.where((array > 0) & jnp.isfinite(array), array, jnp.nan)


def _check_counts(num_steps: int, thin: int | None) -> None:
    positive_integer("num_steps", num_steps)
    if thin is not None and num_steps % positive_integer("thin", thin):
        raise ValueError(
            f"thin must divide the number of steps, {num_steps}, got {thin}: with {num_steps // thin * thin or thin} "
            "steps it would."
        )
