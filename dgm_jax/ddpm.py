"""Denoising diffusion in T steps: the chain, its bound, its losses, and ancestral sampling.

Forwards the data, here x_(-1), gets noisier by fixed Gaussian steps, n = 0 .. T - 1,

    q(x_n | x_(n-1)) = N(sqrt(1 - beta_n) x_(n-1), beta_n I),    q(x_n | data) = N(sqrt(abar_n) data, (1 - abar_n) I),

with abar_n the product of 1 - beta_k over k = 0 .. n. Backwards a model of the noise, eps(n, x_n, args), gives

    p(x_(n-1) | x_n) = N((x_n - beta_n / sqrt(1 - abar_n) eps) / sqrt(1 - beta_n), s_n^2 I),

with s_n^2 = beta_n, or the variance of q(x_(n-1) | x_n, data), or one that the model learns between the two. Every
step of both directions is Gaussian, so that the variational bound on log p is a sum of T + 1 closed forms.

``x0`` below is the data, and papers count steps from 1: their x_t is x_(t-1) here.

Source: Ho et al. (2020), "Denoising Diffusion Probabilistic Models"; Nichol & Dhariwal (2021), "Improved Denoising
Diffusion Probabilistic Models".
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import _blocks
from dgm_jax._checks import agree, concrete, floating, like, positive_integer, typed_key
from dgm_jax.types import Args, Array, Chain, Schedule, VectorField

__all__ = [
    "Bound",
    "Chain",
    "ancestral",
    "as_schedule",
    "at_steps",
    "bound",
    "bound_term",
    "chain",
    "cosine",
    "discretize",
    "hybrid_loss",
    "linear",
    "loss",
    "p_step",
    "posterior",
    "prior_term",
    "q_sample",
    "q_step",
    "score",
    "weights",
]

_Variance: TypeAlias = Literal["beta", "posterior", "learned"]
_Bins: TypeAlias = tuple[int, float, float]


# ------------------------------------------------------------------------------------------------------- chains


def chain(betas: Any, *, dtype: Any = None) -> Chain:
    """A chain from the variance of the noise of each step.

    abar_n = product over k = 0 .. n of 1 - beta_k, by way of sums of log1p(-beta) in float64.

    Args:
        betas: in (0, 1), ``[T]``, known when traced.
        dtype: of the chain; by default float32, or float64 under ``jax_enable_x64``. Every function here brings the
            chain to the dtype of x.

    Returns:
        The chain.

    Raises:
        ValueError: betas not ``[T]``, or one outside (0, 1).
        TypeError: betas that are tracers, or a dtype that is not of floats.

    Source: Ho et al. (2020), equation 4.
    """
    if not concrete(betas):
        raise TypeError("betas must be known when a function is traced: build the chain outside of jit and pass it in.")
    exact = np.asarray(betas, np.float64)
    dtype = jnp.zeros((), float if dtype is None else dtype).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be of floats, got {dtype}: pass jnp.float32, or leave it out.")
    if exact.ndim != 1 or exact.size == 0:
        raise ValueError(f"betas must have shape [T] with T at least 1, got shape {exact.shape}.")
    _in_unit_interval("betas", exact.astype(dtype))
    return Chain(jnp.asarray(exact, dtype), jnp.asarray(np.exp(np.cumsum(np.log1p(-exact))), dtype))


def linear(num_steps: int, beta_min: float = 1e-4, beta_max: float = 0.02, *, dtype: Any = None) -> Chain:
    """The chain whose betas grow linearly.

    beta_n = beta_min + (beta_max - beta_min) n / (T - 1).

    The defaults are for T = 1000. For another T scale both by 1000 / T: then abar_n approaches alpha(t)^2 of
    ``schedules.vp()`` at t = (n + 1) / T, to first order in 1 / T.

    Args:
        num_steps: T, at least 1.
        beta_min: the first beta, in (0, 1).
        beta_max: the last, in (0, 1).
        dtype: see ``chain``.

    Returns:
        The chain.

    Raises:
        ValueError: no steps, or betas outside (0, 1).

    Source: Ho et al. (2020), section 4.
    """
    _in_unit_interval("beta_min and beta_max", np.asarray([beta_min, beta_max]))
    return chain(np.linspace(beta_min, beta_max, positive_integer("num_steps", num_steps)), dtype=dtype)


def cosine(num_steps: int, offset: float = 0.008, *, beta_max: float = 0.999, dtype: Any = None) -> Chain:
    """The chain whose abar falls as a squared cosine.

    abar_n = f((n + 1) / T) / f(0),    f(t) = cos^2(pi / 2 (t + offset) / (1 + offset)),    beta_n at most beta_max.

    Args:
        num_steps: T, at least 1.
        offset: keeps the first betas from being too small, at least 0.
        beta_max: f(1) = 0 would need a last beta of one; it is cut to this.
        dtype: see ``chain``.

    Returns:
        The chain. Where a beta was cut, abar is the product of what was left of it.

    Raises:
        ValueError: no steps, a negative offset, or ``beta_max`` outside (0, 1).

    Source: Nichol & Dhariwal (2021), equation 17.
    """
    if not 0.0 <= offset < math.inf:
        raise ValueError(f"offset must be finite and at least 0, got {offset}: the paper has 0.008.")
    ends = np.linspace(0.0, 1.0, positive_integer("num_steps", num_steps) + 1)
    angles = 0.5 * math.pi * (1.0 - ends) / (1.0 + offset)  # of the sine that is f's cosine: accurate beside t = 1
    return _from_log_alpha_bars(2.0 * np.log(np.maximum(np.sin(angles), 1e-300)), beta_max, dtype)


def discretize(schedule: Schedule, num_steps: int, *, beta_max: float = 0.999, dtype: Any = None) -> Chain:
    """The chain that a variance-preserving path passes through at T equal steps of time.

    abar_n = alpha(t_n)^2,    t_n = (n + 1) / T,    beta_n = 1 - abar_n / abar_(n-1), at most beta_max.

    Args:
        schedule: the path, with alpha^2 + sigma^2 = 1, such as ``schedules.vp()``.
        num_steps: T, at least 1.
        beta_max: betas are cut to this, where alpha falls to zero.
        dtype: see ``chain``.

    Returns:
        The chain.

    Raises:
        ValueError: no steps, ``beta_max`` outside (0, 1), or a path that does not preserve variance.

    Source: Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations",
    appendix B.
    """
    with jax.ensure_compile_time_eval():
        ends = jnp.linspace(0.0, 1.0, positive_integer("num_steps", num_steps) + 1)
        log_alpha, variance = jax.vmap(lambda t: (schedule.log_alpha(t), schedule.variance(t)))(ends)
    sums = np.exp(2.0 * np.asarray(log_alpha, np.float64)) + np.asarray(variance, np.float64)
    if not np.allclose(sums, 1.0, rtol=0.0, atol=1e-5):
        raise ValueError(
            "schedule must preserve variance, alpha^2 + sigma^2 = 1, as schedules.vp() and schedules.cosine() do, but "
            f"the sum goes from {sums.min():.6g} to {sums.max():.6g}: a chain of betas has no other path."
        )
    return _from_log_alpha_bars(2.0 * np.asarray(log_alpha, np.float64), beta_max, dtype)


def _from_log_alpha_bars(values: np.ndarray, beta_max: float, dtype: Any) -> Chain:
    """From log abar at the T + 1 ends of the steps; minus infinity is allowed."""
    _in_unit_interval("beta_max", np.asarray([beta_max]))
    betas = -np.expm1(np.diff(np.maximum(values, -1e3)))
    return chain(np.minimum(betas, beta_max), dtype=dtype)


def as_schedule(chain: Chain) -> Schedule:
    """The path in continuous time that passes through a chain at t_n = (n + 1) / T.

    log alpha(t) is piecewise linear between 0 at t = 0 and log(abar_n) / 2 at t_n;    sigma^2 = 1 - alpha^2.

    With it everything that takes a schedule works for a chain: ``densities``, ``parameterizations``, ``sdes``.

    Args:
        chain: the chain.

    Returns:
        The schedule, in the dtype of the time it is given; g^2 of its SDE is -log(1 - beta_n) T alike within a step.

    Raises:
        ValueError, TypeError: for a chain that is not one.

    Source: Song et al. (2021), appendix B, read backwards.
    """
    chain = _check(chain)
    steps = chain.betas.shape[0]
    halves = 0.5 * jnp.cumsum(jnp.log1p(-chain.betas))
    values = jnp.concatenate([jnp.zeros_like(halves[:1]), halves])

    def log_alpha(t: Array) -> Array:
        ends = jnp.arange(steps + 1).astype(t.dtype) / steps
        return jnp.interp(t, ends, values.astype(t.dtype))

    return Schedule(log_alpha, lambda t: -jnp.expm1(2.0 * log_alpha(t)))


def at_steps(field: VectorField, chain: Chain) -> VectorField:
    """A field of continuous time as a model of the chain.

    (n, x, args) -> f((n + 1) / T, x, args).

    Args:
        field: ``(t [], x [*event], args)``, t in the dtype of x: a noise prediction, say ``densities.noise(density,
            as_schedule(chain))``.
        chain: gives T.

    Returns:
        The same by the number of the step n, an integer ``[]``. For an n out of the chain that could not be known in
        time to raise, the time is NaN.

    Raises:
        ValueError, TypeError: for a chain that is not one; when called, for a step that is not in it.

    Source: Song et al. (2021), appendix B.
    """
    chain = _check(chain)
    steps = chain.betas.shape[0]

    def model(n: Array, x: Array, args: Args = None) -> Any:
        x = floating("x", x)
        n = _step(chain, n)
        t = jnp.where((n >= 0) & (n < steps), (n.astype(x.dtype) + 1.0) / steps, jnp.nan)
        return field(t, x, args)

    return model


def score(noise_model: VectorField, chain: Chain) -> VectorField:
    """The score of x_n from a noise prediction.

    s(n, x, args) = -eps(n, x, args) / sqrt(1 - abar_n).

    Args:
        noise_model: ``(n [], x [*event], args) -> [*event]``.
        chain: the chain.

    Returns:
        The score ``(n [], x [*event], args) -> [*event]``.

    Raises:
        ValueError, TypeError: for a chain that is not one; when called, for a step that is not in it, or a noise of
            another shape or dtype than x.

    Source: Song et al. (2021), appendix G; Dhariwal & Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis",
    equation 11.
    """
    chain = _check(chain)

    def field(n: Array, x: Array, args: Args = None) -> Array:
        x = floating("x", x)
        n = _step(chain, n)
        return -_noise(noise_model, n, x, args) / jnp.sqrt(_row(chain, n, x.dtype).variance)

    return field


# ---------------------------------------------------------------------------------------------- forwards, and back


def q_step(chain: Chain, n: Array | int, x: Array, noise: Array) -> Array:
    """One step of the forward process.

    x_n = sqrt(1 - beta_n) x_(n-1) + sqrt(beta_n) eps.

    Args:
        chain: the chain.
        n: number of the step, 0 .. T - 1, ``[]``.
        x: x_(n-1) ``[*event]``.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x``.

    Returns:
        x_n ``[*event]``. N(0, I) stays N(0, I), and everything else tends to it.

    Raises:
        ValueError: a step out of the chain (where n is a tracer, the result is NaN), or shapes that differ.
        TypeError: arrays not of floats or of two dtypes; a step that is not an integer.

    Source: Ho et al. (2020), equation 2.
    """
    x, noise = agree("x", x, "noise", noise)
    row = _row(_check(chain), n, x.dtype)
    return jnp.sqrt(1.0 - row.beta) * x + jnp.sqrt(row.beta) * noise


def q_sample(chain: Chain, n: Array | int, x0: Array, noise: Array) -> Array:
    """The forward process from the data to step n at once.

    x_n = sqrt(abar_n) x0 + sqrt(1 - abar_n) eps.

    Args:
        chain: the chain.
        n: number of the step, 0 .. T - 1, ``[]``.
        x0: the data ``[*event]``.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x0``.

    Returns:
        x_n ``[*event]``, which has n + 1 steps of noise.

    Raises:
        ValueError: a step out of the chain (where n is a tracer, the result is NaN), or shapes that differ.
        TypeError: arrays not of floats or of two dtypes; a step that is not an integer.

    Source: Ho et al. (2020), equation 4.
    """
    x0, noise = agree("x0", x0, "noise", noise)
    row = _row(_check(chain), n, x0.dtype)
    return row.scale * x0 + jnp.sqrt(row.variance) * noise


def posterior(chain: Chain, n: Array | int, x_n: Array, x0: Array) -> tuple[Array, Array]:
    """The forward process between its ends: the law of x_(n-1) given x_n and the data.

    q(x_(n-1) | x_n, x0) = N(mean, variance I),    variance = beta_n (1 - abar_(n-1)) / (1 - abar_n),
    mean = (sqrt(abar_(n-1)) beta_n x0 + sqrt(1 - beta_n) (1 - abar_(n-1)) x_n) / (1 - abar_n).

    Args:
        chain: the chain.
        n: number of the step, 0 .. T - 1, ``[]``. At n = 0 there is nothing between: mean x0, variance 0.
        x_n: ``[*event]``.
        x0: the data ``[*event]``, in the dtype of ``x_n``.

    Returns:
        ``(mean [*event], variance [])``.

    Raises:
        ValueError: a step out of the chain (where n is a tracer, the result is NaN), or shapes that differ.
        TypeError: arrays not of floats or of two dtypes; a step that is not an integer.

    Source: Ho et al. (2020), equations 6 and 7.
    """
    x_n, x0 = agree("x_n", x_n, "x0", x0)
    row = _row(_check(chain), n, x_n.dtype)
    return row.mean_x0 * x0 + row.mean_xn * x_n, row.posterior


def p_step(
    noise_model: Callable[[Array, Array, Args], Any],
    chain: Chain,
    n: Array | int,
    x: Array,
    noise: Array,
    args: Args = None,
    *,
    variance: _Variance = "posterior",
    clip: tuple[float, float] | None = None,
) -> Array:
    """One step of the reverse process.

    x_(n-1) = (x_n - beta_n / sqrt(1 - abar_n) eps(n, x_n, args)) / sqrt(1 - beta_n) + s_n z,    s_0 = 0,

    which is x_n / sqrt(1 - beta_n) + beta_n / sqrt(1 - beta_n) score(x_n) + s_n z, as score = -eps / sqrt(1 - abar_n).

    Args:
        noise_model: eps, ``(n [], x [*event], args) -> [*event]``, or for learned variances the pair of that and v.
        chain: the chain.
        n: number of the step, 0 .. T - 1, ``[]``.
        x: x_n ``[*event]``.
        noise: z ~ N(0, I) ``[*event]``, in the dtype of ``x``.
        args: passed to the model.
        variance: s_n^2 is "beta", beta_n, right for data N(0, I); "posterior", that of ``posterior``, right for data
            in one point; or "learned", beta_n^v posterior_n^(1 - v), v ``[*event]`` from the model.
        clip: (low, high): the data that the noise implies is cut to this range first. For images, and a model that
            errs; it is not the formula above.

    Returns:
        x_(n-1) ``[*event]``.

    Raises:
        ValueError: a step out of the chain (where n is a tracer, the result is NaN), shapes that differ, an unknown
            variance, an empty range.
        TypeError: arrays not of floats or of two dtypes; a step that is not an integer; no pair for learned variances.

    Source: Ho et al. (2020), algorithm 2; Nichol & Dhariwal (2021), equation 15.
    """
    x, noise = agree("x", x, "noise", noise)
    chain = _check(chain)
    return _p_step(noise_model, _table(chain), _step(chain, n), x, noise, args, _known(variance), _range(clip))


def ancestral(
    key: Array,
    noise_model: Callable[[Array, Array, Args], Any],
    chain: Chain,
    x_T: Array,
    args: Args = None,
    *,
    variance: _Variance = "posterior",
    clip: tuple[float, float] | None = None,
    path: bool = False,
) -> Array:
    """Ancestral sampling: from noise to data by T steps back, as one scan.

    x_(n-1) = (x_n - beta_n / sqrt(1 - abar_n) eps(n, x_n, args)) / sqrt(1 - beta_n) + s_n z_n,    n = T - 1 .. 0,

    without noise in the last. Step n draws z_n from ``fold_in(key, n)``.

    Args:
        key: a typed key.
        noise_model: eps, ``(n [] int32, x [*event], args) -> [*event]``, or for learned variances the pair of that and
            v: see ``p_step``.
        chain: the chain.
        x_T: where to begin, x_(T-1) ~ N(0, I), ``[*event]``.
        args: passed to the model.
        variance: "beta", "posterior" or "learned": see ``p_step``.
        clip: (low, high) for the data that the noise implies: see ``p_step``.
        path: return every state.

    Returns:
        The sample ``[*event]``, or with ``path`` the states ``[T + 1, *event]``, ``x_T`` first, the sample last.

    Raises:
        ValueError: a chain that is not one, a noise of another shape than x, an unknown variance, an empty range.
        TypeError: an old-style key, a state not of floats, a noise of another dtype, no pair for learned variances.

    Source: Ho et al. (2020), algorithm 2.
    """
    key, x_T = typed_key(key), floating("x_T", x_T)
    table = _table(_check(chain))
    variance, clip = _known(variance), _range(clip)

    def step(x: Array, n: Array, z: Array) -> tuple[Array, Array | None]:
        x = _p_step(noise_model, table, n, x, z, args, variance, clip)
        return x, x if path else None

    steps = jnp.arange(table.beta.shape[0], dtype=jnp.int32)[::-1]
    with jax.default_matmul_precision("highest"):
        x, states = _blocks.scan_with_noise(step, x_T, steps, key=key, numbers=steps, like=x_T)
    return jnp.concatenate([x_T[None], states]) if states is not None else x


# -------------------------------------------------------------------------------------------------------- losses


def weights(
    chain: Chain, *, variance: Literal["beta", "posterior"] = "posterior", of: Literal["noise", "score"] = "noise"
) -> Array:
    """How much each step's squared error counts in the variational bound.

    L_n = beta_n^2 / (2 s_n^2 (1 - beta_n) (1 - abar_n)) |eps - eps(n, x_n)|^2 + a number without the model
        = beta_n^2 / (2 s_n^2 (1 - beta_n)) |score(n, x_n) - grad log q(x_n | x0)|^2 + the same number.

    Args:
        chain: the chain.
        variance: s_n^2, see ``p_step``. The posterior variance of step 0 is zero and is replaced by that of step 1
            here, as the papers do: it is the width of the decoder p(x0 | x_0).
        of: whose error is weighed, that of the noise or that of the score.

    Returns:
        The weights ``[T]``. In training they are often left out: all ones is the simple loss.

    Raises:
        ValueError: a chain that is not one, or an unknown variance or error.

    Source: Ho et al. (2020), equation 12; the score's as in Song et al. (2021), section 3.1, with its factor.
    """
    if _known(variance) == "learned":
        raise ValueError('variance must be "beta" or "posterior", got "learned", which has no weights: see bound_term.')
    if of not in ("noise", "score"):
        raise ValueError(f'of must be "noise" or "score", got {of!r}.')
    row = _table(_check(chain))
    inverse = jnp.exp(-_log_variance(row, jnp.asarray(_FIXED[variance], row.beta.dtype)))
    of_score = 0.5 * jnp.square(row.beta) * inverse / (1.0 - row.beta)
    return of_score / row.variance if of == "noise" else of_score


def loss(
    noise_model: VectorField,
    chain: Chain,
    n: Array | int,
    x0: Array,
    noise: Array,
    args: Args = None,
    *,
    weight: Array | None = None,
) -> Array:
    """The objective of one example, one step and one draw of noise.

    weight_n |eps - eps(n, x_n, args)|^2,    x_n = sqrt(abar_n) x0 + sqrt(1 - abar_n) eps.

    A sum over the entries of x, without a factor 1/2, which ``weights`` have in them.

    Args:
        noise_model: ``(n [] int32, x [*event], args) -> [*event]``.
        chain: the chain.
        n: number of the step, 0 .. T - 1, ``[]``; drawn uniformly in training.
        x0: one example of the data ``[*event]``.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x0``.
        args: passed to the model: parameters, conditioning.
        weight: ``[T]``; None for ones, the simple loss. With ``weights(chain)``, T times the mean over n is the
            variational bound but for what does not depend on the model.

    Returns:
        The loss ``[]``. Its minimum over all models is at E[eps | x_n], whatever the weights.

    Raises:
        ValueError: a step out of the chain (where n is a tracer, the result is NaN), or shapes that differ.
        TypeError: arrays not of floats or of two dtypes; a step that is not an integer.

    Source: Ho et al. (2020), equation 14; with ``weights``, equation 12.
    """
    x0, noise = agree("x0", x0, "noise", noise)
    chain = _check(chain)
    n = _step(chain, n)
    error = jnp.sum(jnp.square(noise - _noise(noise_model, n, q_sample(chain, n, x0, noise), args)))
    if weight is None:
        return error
    if jnp.shape(weight) != chain.betas.shape:
        raise ValueError(f"weight has shape {jnp.shape(weight)}, but a chain of {len(chain.betas)} steps needs [T].")
    return jnp.asarray(weight)[n].astype(x0.dtype) * error


def hybrid_loss(
    noise_model: Callable[[Array, Array, Args], tuple[Array, Array]],
    chain: Chain,
    n: Array | int,
    x0: Array,
    noise: Array,
    args: Args = None,
    *,
    bound_weight: float = 1e-3,
    bins: _Bins | None = None,
) -> Array:
    """The objective of a model that learns its variances.

    |eps - eps(n, x_n)|^2 + bound_weight T L_n(stop-gradient of eps(n, x_n), v(n, x_n)).

    The mean is learned by the simple loss, the variance alone by the bound.

    Args:
        noise_model: ``(n [] int32, x [*event], args) -> (eps [*event], v [*event])``.
        chain: the chain.
        n: number of the step, 0 .. T - 1, ``[]``; drawn uniformly in training, where the mean of T L_n is the bound.
        x0: one example of the data ``[*event]``.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x0``.
        args: passed to the model.
        bound_weight: the paper's lambda.
        bins: of the decoder, see ``bound_term``.

    Returns:
        The loss ``[]``.

    Raises:
        ValueError: a step out of the chain (where n is a tracer, the result is NaN), or shapes that differ.
        TypeError: arrays not of floats or of two dtypes; a step that is not an integer; no pair from the model.

    Source: Nichol & Dhariwal (2021), equation 16.
    """
    x0, noise = agree("x0", x0, "noise", noise)
    chain = _check(chain)
    n = _step(chain, n)
    predicted, v = _prediction(noise_model, n, q_sample(chain, n, x0, noise), args, "learned")
    fixed = jax.lax.stop_gradient(predicted)
    term = bound_term(lambda *_: (fixed, v), chain, n, x0, noise, variance="learned", bins=bins)
    return jnp.sum(jnp.square(noise - predicted)) + bound_weight * chain.betas.shape[0] * term


# --------------------------------------------------------------------------------------------------------- bound


class Bound(NamedTuple):
    """A lower bound on the log-probability of one example, estimated.

    Attributes:
        log_prob: the bound in nats ``[]``, minus the sum of the terms.
        stderr: its standard error over the draws of noise ``[]``; zero were all expectations exact.
        terms: in nats ``[T + 1]``: L_0 of the decoder, the divergences L_1 .. L_(T-1) of the steps, the prior's last.
        terms_stderr: the standard error of each ``[T + 1]``; that of the prior's is zero.
    """

    log_prob: Array
    stderr: Array
    terms: Array
    terms_stderr: Array


def bound_term(
    noise_model: Callable[[Array, Array, Args], Any],
    chain: Chain,
    n: Array | int,
    x0: Array,
    noise: Array,
    args: Args = None,
    *,
    variance: _Variance = "posterior",
    bins: _Bins | None = None,
) -> Array:
    """One step's term of the variational bound, at one draw of noise.

    L_n = KL(q(x_(n-1) | x_n, x0) || p(x_(n-1) | x_n)) for n > 0,    L_0 = -log p(x0 | x_0),

    p(x_(n-1) | x_n) = N(mean, s_n^2 I) as in ``p_step``; at n = 0 the decoder, for data with a density that Gaussian
    itself with s_0^2 as in ``weights``, for data with levels its mass in the bin of each entry:

        p(x0 | x_0) = product over entries of the integral of N(mean_i, s_0^2) over the bin of x0_i.

    The first and the last bin go on to minus and plus infinity, so that the masses of all levels sum to one.

    Args:
        noise_model: ``(n [] int32, x [*event], args) -> [*event]``, or for learned variances a pair: see ``p_step``.
        chain: the chain.
        n: number of the step, 0 .. T - 1, ``[]``.
        x0: one example of the data ``[*event]``; with ``bins``, the middles of bins.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x0``: makes x_n.
        args: passed to the model.
        variance: "beta", "posterior" or "learned": see ``p_step``.
        bins: ``(levels, low, high)`` for data with levels: [low, high] cut into that many equal bins. An x0 outside has
            no bin: L_0 is NaN.

    Returns:
        The term in nats ``[]``. Its mean over noise is a term of -log p(x0) <= L_prior + sum over n of L_n.

    Raises:
        ValueError: a step out of the chain (where n is a tracer, the result is NaN), shapes that differ, an unknown
            variance, bins that are none.
        TypeError: arrays not of floats or of two dtypes; a step that is not an integer; no pair for learned variances.

    Source: Ho et al. (2020), equations 5 and 13; Nichol & Dhariwal (2021), equations 4 to 6 and 15.
    """
    x0, noise = agree("x0", x0, "noise", noise)
    chain = _check(chain)
    return _bound_term(
        noise_model, _table(chain), _step(chain, n), x0, noise, args, _known(variance), _checked_bins(bins)
    )


def prior_term(chain: Chain, x0: Array) -> Array:
    """The last term of the variational bound, for which there is nothing to learn.

    KL(q(x_(T-1) | x0) || N(0, I)) = 1/2 sum over entries of abar (x0^2 - 1) - log(1 - abar),    abar = abar_(T-1).

    Args:
        chain: the chain.
        x0: one example of the data ``[*event]``.

    Returns:
        The term in nats ``[]``: what is left of the data in the last state.

    Raises:
        ValueError: a chain that is not one.
        TypeError: ``x0`` not of floats.

    Source: Ho et al. (2020), equation 5.
    """
    x0 = floating("x0", x0)
    kept = jnp.square(_row(_check(chain), len(chain.betas) - 1, x0.dtype).scale)
    return 0.5 * jnp.sum(kept * (jnp.square(x0) - 1.0) - jnp.log1p(-kept))


def bound(
    key: Array,
    noise_model: Callable[[Array, Array, Args], Any],
    chain: Chain,
    x0: Array,
    args: Args = None,
    *,
    variance: _Variance = "posterior",
    bins: _Bins | None = None,
    num_draws: int = 2,
) -> Bound:
    """The variational lower bound on the log-probability of one example, all T + 1 terms of it.

    log p(x0) >= -(E L_0 + sum over n = 1 .. T - 1 of E L_n + L_prior),    see ``bound_term`` and ``prior_term``.

    Every step is visited; the noise in it is drawn, independently for each, from ``fold_in(key, n)``. The estimate is
    unbiased: by chance it lies above the bound, and may above log p, within its error.

    Args:
        key: a typed key.
        noise_model: ``(n [] int32, x [*event], args) -> [*event]``, or for learned variances a pair: see ``p_step``.
        chain: the chain.
        x0: one example of the data ``[*event]``; with ``bins``, the middles of bins.
        args: passed to the model.
        variance: "beta", "posterior" or "learned": see ``p_step``.
        bins: ``(levels, low, high)`` for data with levels, and then log p is the log-probability of the levels; without
            them it is a log-density at x0.
        num_draws: of noise in each step, at least 2, for a standard error.

    Returns:
        The bound with its error and its terms. Bits per dimension of data with levels are -log_prob / (D log 2):
        ``metrics.bits_per_dim`` with bins of width one; of a density at dequantised data, with those of the data.

    Raises:
        ValueError: a chain that is not one, shapes that differ, an unknown variance, bins that are none, fewer than
            two draws.
        TypeError: an old-style key, ``x0`` not of floats, a noise of another dtype, no pair for learned variances.

    Source: Ho et al. (2020), equation 5; Nichol & Dhariwal (2021), section 2.2.
    """
    key, x0 = typed_key(key), floating("x0", x0)
    chain = _check(chain)
    table, variance, bins = _table(chain), _known(variance), _checked_bins(bins)
    if positive_integer("num_draws", num_draws) < 2:
        raise ValueError(f"num_draws must be at least 2, for a standard error, got {num_draws}.")

    def term(n: Array) -> tuple[Array, Array]:
        noise = jax.random.normal(jax.random.fold_in(key, n), (num_draws, *x0.shape), x0.dtype)
        each = jax.vmap(lambda e: _bound_term(noise_model, table, n, x0, e, args, variance, bins))(noise)
        return jnp.mean(each), jnp.std(each, ddof=1) / math.sqrt(num_draws)

    with jax.default_matmul_precision("highest"):
        terms, stderr = jax.lax.map(term, jnp.arange(len(chain.betas), dtype=jnp.int32))
    terms = jnp.append(terms, prior_term(chain, x0))
    return Bound(
        -jnp.sum(terms), jnp.sqrt(jnp.sum(jnp.square(stderr))), terms, jnp.append(stderr, jnp.zeros_like(stderr[0]))
    )


# ------------------------------------------------------------------------------------------------------- private

_FIXED = {"posterior": 0.0, "beta": 1.0}  # v of log s^2 = v log beta + (1 - v) log posterior


class _Table(NamedTuple):
    """All that the steps need, ``[T]`` each, or ``[]`` for one step."""

    beta: Array
    scale: Array  # sqrt(abar_n)
    variance: Array  # 1 - abar_n
    posterior: Array  # beta_n (1 - abar_(n-1)) / (1 - abar_n)
    gap: Array  # log(posterior / beta) <= 0, with the posterior of step 1 at step 0
    mean_x0: Array  # of the posterior mean
    mean_xn: Array


def _table(chain: Chain) -> _Table:
    """From betas alone: 1 - alpha_bars would lose half the digits in float32 where alpha_bars are near one."""
    beta = chain.betas
    log_kept = jnp.cumsum(jnp.log1p(-beta))
    before = jnp.concatenate([jnp.zeros_like(beta[:1]), log_kept[:-1]])
    variance, variance_before = -jnp.expm1(log_kept), -jnp.expm1(before)
    posterior = beta * variance_before / variance
    share = beta[1:] * jnp.exp(before[1:]) / variance[1:]  # 1 - the quotient: of the two take what keeps its digits
    gap = jnp.where(share < 0.5, jnp.log1p(-jnp.minimum(share, 0.5)), jnp.log(variance_before[1:] / variance[1:]))
    first = jnp.log(posterior[1:2] / beta[:1]) if beta.shape[0] > 1 else jnp.zeros_like(beta)
    return _Table(
        beta,
        jnp.exp(0.5 * log_kept),
        variance,
        posterior,
        jnp.concatenate([first, gap]),
        jnp.exp(0.5 * before) * beta / variance,
        jnp.sqrt(1.0 - beta) * variance_before / variance,
    )


def _at(table: _Table, n: Array, dtype: Any) -> _Table:
    """The row of step n; NaN out of the chain."""
    inside = (n >= 0) & (n < table.beta.shape[0])
    return _Table(*(jnp.where(inside, column[n], jnp.nan).astype(dtype) for column in table))


def _row(chain: Chain, n: Array | int, dtype: Any) -> _Table:
    return _at(_table(chain), _step(chain, n), dtype)


def _log_variance(row: _Table, v: Array) -> Array:
    """log s^2 = v log beta + (1 - v) log posterior."""
    return jnp.log(row.beta) + (1.0 - v) * row.gap


def _p_step(
    noise_model: Callable[[Array, Array, Args], Any],
    table: _Table,
    n: Array,
    x: Array,
    noise: Array,
    args: Args,
    variance: _Variance,
    clip: tuple[float, float] | None,
) -> Array:
    row = _at(table, n, x.dtype)
    predicted, v = _prediction(noise_model, n, x, args, variance)
    mean = _mean(row, x, predicted)
    if clip is not None:
        x0 = jnp.clip((x - jnp.sqrt(row.variance) * predicted) / row.scale, *clip)
        mean = row.mean_x0 * x0 + row.mean_xn * x
    return mean + jnp.where(n == 0, 0.0, jnp.exp(0.5 * _log_variance(row, v))) * noise


def _mean(row: _Table, x: Array, predicted: Array) -> Array:
    return (x - row.beta / jnp.sqrt(row.variance) * predicted) / jnp.sqrt(1.0 - row.beta)


def _bound_term(
    noise_model: Callable[[Array, Array, Args], Any],
    table: _Table,
    n: Array,
    x0: Array,
    noise: Array,
    args: Args,
    variance: _Variance,
    bins: _Bins | None,
) -> Array:
    row = _at(table, n, x0.dtype)
    x = row.scale * x0 + jnp.sqrt(row.variance) * noise
    predicted, v = _prediction(noise_model, n, x, args, variance)
    log_variance = _log_variance(row, v)
    between = row.beta / jnp.sqrt(row.variance * (1.0 - row.beta)) * (noise - predicted)  # of the two means
    squared = jnp.square(between) * jnp.exp(-log_variance)
    log_ratio = v * row.gap  # of the two variances; expm1(r) - r keeps its digits where they are close
    divergence = 0.5 * (squared + (jnp.expm1(log_ratio) - log_ratio))
    if bins is None:
        decoder = 0.5 * (squared + log_variance + math.log(2.0 * math.pi))
    else:
        width = (bins[2] - bins[1]) / bins[0]  # what is not looked at must not bring NaN into a gradient either
        mean = jnp.where(n == 0, _mean(row, x, predicted), x0)
        decoder = -_log_mass(x0, mean, jnp.where(n == 0, log_variance, 2.0 * math.log(width)), bins)
    return jnp.sum(jnp.where(n == 0, decoder, divergence))


def _log_mass(x0: Array, mean: Array, log_variance: Array, bins: _Bins) -> Array:
    """log of the integral of N(mean, s^2) over the bin of each entry; the outer bins are unbounded."""
    levels, low, high = bins
    width = (high - low) / levels
    k = jnp.clip(jnp.floor((x0 - low) / width), 0, levels - 1)
    precision = jnp.exp(-0.5 * log_variance)
    a, b = (low + k * width - mean) * precision, (low + (k + 1.0) * width - mean) * precision
    below, above = jax.scipy.special.log_ndtr(b), jax.scipy.special.log_ndtr(-a)
    near, far = jnp.where(a > 0.0, -b, a), jnp.where(a > 0.0, -a, b)  # the same mass on the left, where it has digits
    log_far = jax.scipy.special.log_ndtr(far)
    between = log_far + jnp.log(-jnp.expm1(jax.scipy.special.log_ndtr(near) - log_far))
    mass = jnp.where(k == 0, below, jnp.where(k == levels - 1, above, between))
    return jnp.where((x0 >= low) & (x0 <= high), mass, jnp.nan)


def _prediction(
    noise_model: Callable[[Array, Array, Args], Any], n: Array, x: Array, args: Args, variance: _Variance
) -> tuple[Array, Array]:
    """The noise ``[*event]`` and v, ``[]`` or ``[*event]``."""
    if variance != "learned":
        return _noise(noise_model, n, x, args), jnp.asarray(_FIXED[variance], x.dtype)
    value = noise_model(n, x, args)
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(
            f'noise_model must return a pair (noise, v) for variance="learned", got {type(value).__name__}: '
            'or pass variance="posterior".'
        )
    noise, v = value
    return like("noise_model's noise", noise, x.shape, x.dtype), like("noise_model's v", v, x.shape, x.dtype)


def _noise(noise_model: Callable[[Array, Array, Args], Any], n: Array, x: Array, args: Args) -> Array:
    value = noise_model(n, x, args)
    if isinstance(value, tuple):
        raise TypeError('noise_model returned a tuple, expected the noise alone: a pair goes with variance="learned".')
    return like("noise_model", value, x.shape, x.dtype)


def _check(chain: Chain) -> Chain:
    """``chain``, if its shapes fit and, where they are known, its values."""
    betas, alpha_bars = floating("chain.betas", chain.betas), floating("chain.alpha_bars", chain.alpha_bars)
    if betas.ndim != 1 or betas.shape[0] == 0 or alpha_bars.shape != betas.shape:
        raise ValueError(
            f"chain must have betas [T] and alpha_bars [T], got shapes {betas.shape} and {alpha_bars.shape}: make it "
            "with ddpm.linear, cosine or chain."
        )
    if alpha_bars.dtype != betas.dtype:
        raise TypeError(f"chain has betas of {betas.dtype} and alpha_bars of {alpha_bars.dtype}: one dtype for both.")
    if concrete((betas, alpha_bars)):
        known = np.asarray(betas, np.float64)
        _in_unit_interval("chain.betas", known)
        if not np.allclose(np.asarray(alpha_bars, np.float64), np.cumprod(1.0 - known), rtol=1e-2, atol=1e-5):
            raise ValueError("chain.alpha_bars is not the product of 1 - betas: make the chain with ddpm.chain(betas).")
    return Chain(betas, alpha_bars)


def _in_unit_interval(name: str, values: np.ndarray) -> None:
    wrong = np.flatnonzero(~((values > 0.0) & (values < 1.0)))
    if wrong.size:
        raise ValueError(
            f"{name} must be in (0, 1), got {float(values[wrong[0]])} at index {wrong[0]}: each is the share of noise "
            "that one step brings in."
        )


def _step(chain: Chain, n: Any) -> Array:
    """``n``, if it is the number of one step of the chain."""
    array = jnp.asarray(n)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"n must be an integer, the number of a step, got dtype {array.dtype}.")
    if array.shape != ():
        raise ValueError(f"n must be one step of shape (), got shape {array.shape}: use jax.vmap over steps.")
    steps = chain.betas.shape[0]
    if concrete(array) and not 0 <= int(array) < steps:
        raise ValueError(f"n must be in 0 .. {steps - 1}, a step of the chain, got {int(array)}.")
    return array.astype(jnp.int32)


def _known(variance: _Variance) -> _Variance:
    if variance not in ("beta", "posterior", "learned"):
        raise ValueError(f'variance must be "beta", "posterior" or "learned", got {variance!r}.')
    return variance


def _range(clip: tuple[float, float] | None) -> tuple[float, float] | None:
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip must be (low, high) with low < high, got {clip}.")
    return clip


def _checked_bins(bins: _Bins | None) -> _Bins | None:
    if bins is None:
        return None
    levels, low, high = bins
    if positive_integer("bins[0], the number of levels,", levels) < 2 or not -math.inf < low < high < math.inf:
        raise ValueError(f"bins must be (levels, low, high) with at least 2 levels and low < high, got {bins}.")
    return levels, float(low), float(high)
