"""Guidance: samples of a wanted class, from a classifier or from one network that knows the classes itself.

By Bayes' rule, at every time t,

    grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t),

and guidance gives the classifier a weight gamma, the scale:

    s_gamma = grad log p(x_t) + gamma grad log p(y | x_t)
            = (1 - gamma) grad log p(x_t) + gamma grad log p(x_t | y).

gamma = 0 is unconditional and gamma = 1 exact. Ho & Salimans (2022) write (1 + w) s(x, y) - w s(x): w = gamma - 1. The
w of Imagen (Saharia et al., 2022), the guidance scale of Stable Diffusion, and the gradient scale of Dhariwal & Nichol
(2021) over an unconditional model are gamma itself; over a model that is conditional already theirs is gamma - 1.

**What gamma > 1 does not do.** At each t, s_gamma is the score of p_t(x) p_t(y | x)^gamma, normalised, but those
densities do not follow each other by diffusion. So neither the reverse SDE nor the probability flow ends at
p(x) p(y | x)^gamma, nor do the two agree. In closed form, for x ~ N(0, 1) and a measurement y of it that leaves the
variance v, along any variance-preserving path down to no signal, what is sampled has the variance

    v^gamma                                             by the probability flow,
    (v - v^(2 gamma)) / ((1 - v) (2 gamma - 1))         by the reverse SDE,
    1 / (1 - gamma + gamma / v)                         had it been p(x) p(y | x)^gamma:

for v = 1/2 and gamma = 2 these are 0.25, 0.2917 and 0.3333. At gamma = 1 all three are v.

Source: Dhariwal & Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis"; Ho & Salimans (2022),
"Classifier-Free Diffusion Guidance"; Kynkaanniemi et al. (2024), "Applying Guidance in a Limited Interval Improves
Sample and Distribution Quality in Diffusion Models"; Bradley & Nakkiran (2024), "Classifier-Free Guidance is a
Predictor-Corrector", on what is not sampled.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import schedules
from dgm_jax._checks import agree, concrete, evaluate, floating, one_time, typed_key
from dgm_jax.types import Args, Array, Chain, ScalarField, Schedule, VectorField

__all__ = [
    "classifier",
    "classifier_free",
    "classifier_noise",
    "cross_entropy",
    "drop_labels",
    "implied_gradient",
    "log_prob_y",
    "unconditional",
]


def classifier(
    score: VectorField,
    log_prob_y: ScalarField,
    scale: float | Array,
    *,
    interval: tuple[float, float] | None = None,
) -> VectorField:
    """A score guided by a classifier of noisy data.

    s(t, x) + gamma grad_x log p(y | x_t = x)

    Args:
        score: grad log p_t(x), ``(t [], x [*event], args) -> [*event]``.
        log_prob_y: log p(y | x_t) of the wanted class, ``(t [], x [*event], args) -> []``, for instance this module's
            ``log_prob_y`` of a network. It gets the same ``args`` as the score.
        scale: gamma ``[]``; brought to the dtype of x. Where it is known to be 0, the classifier is not evaluated.
        interval: (low, high), the times in which gamma counts, both ends within; at all others gamma is 1.

    Returns:
        ``(t [], x [*event], args) -> [*event]``: a score for ``sdes.reverse`` and ``sdes.probability_flow``.

    Raises:
        ValueError: a gamma that is not one finite number, an interval out of order; when called, a t that is not one
            time, a score of another shape than x, a log-probability that is not one number.
        TypeError: a gamma that is not a real number, an interval that is not known, or not of numbers; when called,
            values that are not floats of the dtype of x.

    Source: Dhariwal & Nichol (2021), section 4 and algorithm 1.
    """
    gamma, interval = _scale(scale), _interval(interval)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        s = evaluate("score", score, t, x, args)

        def pull() -> Array:
            return _gradient(log_prob_y, t, x, args)

        return s + _weighted(gamma, interval, t, x, pull)

    return field


def classifier_free(
    conditional: VectorField,
    unconditional: VectorField,
    scale: float | Array,
    *,
    interval: tuple[float, float] | None = None,
) -> VectorField:
    """A conditional model pushed away from the unconditional one: no classifier needed.

    (1 - gamma) f(t, x) + gamma f(t, x, y)

    The same for scores, for noise predictions and for velocities, and for a chain, whose step is an integer t.

    Args:
        conditional: f(t, x, y), ``(t [], x [*event], args) -> [*event]``, the class within ``args``.
        unconditional: f(t, x), called alike with the same ``args``; of one network trained with dropped labels it is
            ``unconditional(conditional, num_classes)``.
        scale: gamma ``[]``; brought to the dtype of x. Where it is known to be 0 or 1 only one of the two is
            evaluated.
        interval: (low, high), the times (or steps) in which gamma counts, both ends within; at all others gamma is 1,
            and only ``conditional`` is evaluated, as long as t is not batched by ``jax.vmap``.

    Returns:
        ``(t [], x [*event], args) -> [*event]``.

    Raises:
        ValueError: a gamma that is not one finite number, an interval out of order; when called, a t that is not one
            time, or a field of another shape than x.
        TypeError: a gamma that is not a real number, an interval that is not known, or not of numbers; when called,
            values that are not floats of the dtype of x.

    Source: Ho & Salimans (2022), equation 6, with w = gamma - 1; Kynkaanniemi et al. (2024), section 3, the interval.
    """
    gamma, interval = _scale(scale), _interval(interval)

    def field(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)

        def with_label() -> Array:
            return evaluate("conditional", conditional, t, x, args)

        def without() -> Array:
            return evaluate("unconditional", unconditional, t, x, args)

        if _is(gamma, 1):
            return with_label()
        if _is(gamma, 0):
            return without() if interval is None else jax.lax.cond(_inside(interval, t), without, with_label)
        c = with_label()
        weight = jnp.asarray(gamma, x.dtype)

        def mixed() -> Array:
            return (1 - weight) * without() + weight * c

        return mixed() if interval is None else jax.lax.cond(_inside(interval, t), mixed, lambda: c)

    return field


def classifier_noise(
    noise_model: VectorField,
    log_prob_y: ScalarField,
    chain: Chain,
    scale: float | Array,
    *,
    interval: tuple[float, float] | None = None,
) -> VectorField:
    """A noise prediction guided by a classifier of noisy data, for a chain.

    eps(n, x) - gamma sqrt(1 - alpha_bar_n) grad_x log p(y | x_n = x)

    At gamma = 1 it is -sqrt(1 - alpha_bar_n) grad log p(x_n | y), the conditional noise prediction.

    Args:
        noise_model: eps, ``(n [], x [*event], args) -> [*event]``, n an integer from 0 to T - 1.
        log_prob_y: log p(y | x_n) of the wanted class, ``(n [], x [*event], args) -> []``.
        chain: betas and alpha_bars ``[T]``. Of the betas 1 - alpha_bar_n is made, for near 1 an alpha_bar in float32
            has lost its digits. It is brought to the dtype of x.
        scale: gamma ``[]``; brought to the dtype of x. Where it is known to be 0, the classifier is not evaluated.
        interval: (first, last), the steps in which gamma counts, both within; at all others gamma is 1.

    Returns:
        ``(n [], x [*event], args) -> [*event]``: a noise model for the chain. NaN for a traced n out of the chain.

    Raises:
        ValueError: a gamma that is not one finite number, an interval out of order, alpha_bars or betas that are not
            ``[T]``; when called, an n out of the chain, a value of another shape than x, a log-probability that is not
            one number.
        TypeError: a gamma that is not a real number, an interval that is not known, or not of numbers; when called, an
            n that is not an integer, values that are not floats of the dtype of x.

    Source: Dhariwal & Nichol (2021), section 4.2, equation 14 and algorithm 2.
    """
    gamma, interval = _scale(scale), _interval(interval)
    alpha_bars, betas = floating("chain.alpha_bars", chain.alpha_bars), floating("chain.betas", chain.betas)
    if alpha_bars.ndim != 1 or alpha_bars.size == 0:
        raise ValueError(f"chain.alpha_bars must have shape [T], one for each step, got shape {alpha_bars.shape}.")
    if betas.shape != alpha_bars.shape:
        raise ValueError(
            f"chain.betas must have the shape [T] of chain.alpha_bars, {alpha_bars.shape}, got shape {betas.shape}: "
            "ddpm.chain(betas) makes the two."
        )
    num = betas.shape[0]
    variances = -jnp.expm1(jnp.cumsum(jnp.log1p(-betas)))  # 1 - alpha_bars, to all digits

    def field(n: Array, x: Array, args: Args = None) -> Array:
        n, x = _at(n, x)
        if not jnp.issubdtype(n.dtype, jnp.integer):
            raise TypeError(f"n must be an integer, the step of the chain from 0 to {num - 1}, got dtype {n.dtype}.")
        if concrete(n) and not 0 <= int(n) < num:
            raise ValueError(f"n must be a step of the chain, from 0 to {num - 1}, got {int(n)}.")
        n = _wide(n)
        eps = evaluate("noise_model", noise_model, n, x, args)
        eps = jnp.where((n >= 0) & (n < num), eps, jnp.nan)

        def pull() -> Array:
            variance = variances[jnp.clip(n, 0, num - 1)]
            return -jnp.sqrt(variance).astype(x.dtype) * _gradient(log_prob_y, n, x, args)

        return eps + _weighted(gamma, interval, n, x, pull)

    return field


def implied_gradient(conditional: VectorField, unconditional: VectorField) -> VectorField:
    """The classifier that is hidden in two scores.

    grad log p(y | x_t) = grad log p(x_t | y) - grad log p(x_t)

    Of two learned scores it need not be the gradient of anything.

    Args:
        conditional: grad log p(x_t | y), ``(t [], x [*event], args) -> [*event]``.
        unconditional: grad log p(x_t), called alike with the same ``args``.

    Returns:
        ``(t [], x [*event], args) -> [*event]``.

    Raises:
        ValueError: when called, for a t that is not one time, or a score of another shape than x.
        TypeError: when called, for values that are not floats of the dtype of x.

    Source: Ho & Salimans (2022), section 3.2.
    """

    def field(t: Array, x: Array, args: Args = None) -> Array:
        t, x = _at(t, x)
        c = evaluate("conditional", conditional, t, x, args)
        return c - evaluate("unconditional", unconditional, t, x, args)

    return field


def unconditional(conditional: VectorField, num_classes: int) -> VectorField:
    """The unconditional half of a network that was trained with dropped labels.

    f(t, x) = f(t, x, y = no label)

    Args:
        conditional: ``(t [], x [*event], (params, y)) -> [*event]``, y an integer, num_classes for no label: for
            instance ``networks.conditional(net)``.
        num_classes: how many classes there are.

    Returns:
        ``(t [], x [*event], (params, y)) -> [*event]``, whatever y.

    Raises:
        ValueError: for a num_classes that is not a positive integer.

    Source: Ho & Salimans (2022), section 3.2 and algorithm 2.
    """
    num_classes = _num_classes(num_classes)

    def field(t: Array, x: Array, args: Args) -> Array:
        params, _ = args
        return conditional(t, x, (params, jnp.int32(num_classes)))

    return field


def drop_labels(key: Array, labels: Array, rate: float | Array, num_classes: int) -> Array:
    """Labels of which some are replaced by "no label", so that one network learns with and without.

    y with probability 1 - rate, num_classes with probability rate, each by itself

    Args:
        key: a typed key.
        labels: integers from 0 to num_classes - 1, of any shape, ``[]`` or a batch.
        rate: the probability to lose its label, in [0, 1]; 0.1 to 0.2 is usual.
        num_classes: how many classes there are; also the label that means none.

    Returns:
        int32 of the same shape. Where it is not known at trace time that an argument is bad, such labels become -1,
        which ``networks`` answers with NaN.

    Raises:
        TypeError: for an old-style key or labels that are not integers.
        ValueError: for labels outside the classes, a rate outside [0, 1], or a num_classes that is not a positive
            integer.

    Source: Ho & Salimans (2022), algorithm 1.
    """
    key, num_classes, labels = typed_key(key), _num_classes(num_classes), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers from 0 to {num_classes - 1}, got dtype {labels.dtype}.")
    if concrete(labels):
        known = np.asarray(labels)
        if known.size and not (known.min() >= 0 and known.max() < num_classes):
            raise ValueError(
                f"labels must be from 0 to {num_classes - 1}, got {known.min()} to {known.max()}: "
                f"{num_classes} itself is what a dropped label becomes."
            )
    if jnp.shape(rate) != ():
        raise ValueError(f"rate must be one probability, got shape {jnp.shape(rate)}.")
    if concrete(rate) and not 0 <= float(rate) <= 1:
        raise ValueError(f"rate must be a probability, in [0, 1], got {float(rate)}: 0.1 to 0.2 is usual.")
    rate = jnp.asarray(rate, float)
    labels = _wide(labels)
    good = (labels >= 0) & (labels < num_classes) & ((rate >= 0) & (rate <= 1))
    drop = jax.random.uniform(key, labels.shape, rate.dtype) < rate
    return jnp.where(good, jnp.where(drop, num_classes, labels.astype(jnp.int32)), -1)


def log_prob_y(logits: VectorField) -> ScalarField:
    """The log-probability that a classifier of noisy data gives to one class.

    log p(y | x_t) = log softmax(logits(t, x, params))_y

    Args:
        logits: ``(t [], x [*event], params) -> [num_classes]``, for instance ``networks.vector_field`` of a network
            with ``out_features=num_classes``.

    Returns:
        ``(t [], x [*event], (params, y)) -> []`` in nats. For a traced y that is no class the value is NaN, and so is
        its gradient.

    Raises:
        ValueError: when called, for a y that is no class, or logits that are not ``[num_classes]``.
        TypeError: when called, for a y that is not one integer.

    Source: Dhariwal & Nichol (2021), section 4.
    """

    def field(t: Array, x: Array, args: Args) -> Array:
        params, y = args
        return _log_softmax(logits(t, x, params), y)

    return field


def cross_entropy(
    logits: VectorField, schedule: Schedule, t: Array, x0: Array, noise: Array, label: int | Array, args: Args = None
) -> Array:
    """The loss of a classifier of noisy data, for one example, one time and one draw of noise.

    -log softmax(logits(t, x_t))_y,    x_t = alpha(t) x_0 + sigma(t) eps

    Its mean is least where the softmax is p(y | x_t): the classifier that guidance needs, at every t that is drawn.

    Args:
        logits: ``(t [], x [*event], args) -> [num_classes]``.
        schedule: gives alpha and sigma.
        t: time ``[]``.
        x0: one example of the data ``[*event]``.
        noise: eps ~ N(0, I) ``[*event]``, in the dtype of ``x0``.
        label: y, an integer ``[]`` from 0 to num_classes - 1.
        args: passed to the logits: parameters.

    Returns:
        The loss in nats ``[]``. NaN, with a NaN gradient, for a traced label that is no class.

    Raises:
        TypeError: ``x0`` or ``noise`` not of floats of one dtype, or a label that is not one integer.
        ValueError: ``noise`` of another shape than ``x0``, ``t`` not a scalar, a label that is no class, or logits that
            are not ``[num_classes]``.

    Source: Dhariwal & Nichol (2021), section 4: a classifier trained on noisy images.
    """
    x0, noise = agree("x0", x0, "noise", noise)
    t = one_time(t, x0.dtype)
    x_t = schedules.alpha(schedule, t) * x0 + schedules.sigma(schedule, t) * noise
    return -_log_softmax(logits(t, x_t, args), label)


def _scale(scale: Any) -> float | Array:
    """gamma as a finite float where it is known, as the tracer that it is elsewhere."""
    if scale is None or isinstance(scale, str | bytes) or jnp.iscomplexobj(scale):
        raise TypeError(f"scale must be a real number gamma, got {scale!r}: 0 is unconditional, 1 is Bayes' rule.")
    shape = jnp.shape(scale)
    if shape != ():
        raise ValueError(
            f"scale must be one number gamma, got shape {shape}: for a grid of scales use jax.vmap over a function "
            "that makes the field."
        )
    if not concrete(scale):
        return scale
    gamma = float(scale)
    if not math.isfinite(gamma):
        raise ValueError(f"scale must be a finite number gamma, got {gamma}: 0 is unconditional, 1 is Bayes' rule.")
    return gamma


def _interval(interval: Any) -> tuple[float, float] | None:
    """The two ends as floats, if they are in order; they may be one."""
    if interval is None:
        return None
    if not concrete(interval):
        raise TypeError("interval must be known when a function is traced: pass two floats, not tracers.")
    if np.shape(interval) != (2,):
        raise ValueError(f"interval must be two numbers (low, high), got {interval!r}: or None, for all times.")
    if any(end is None or isinstance(end, str | bytes) or jnp.iscomplexobj(end) for end in interval):
        raise TypeError(f"interval must be two real numbers (low, high), got {interval!r}.")
    low, high = (float(end) for end in interval)
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"interval must be (low, high) with low <= high and both finite, got ({low}, {high}).")
    return low, high


def _is(gamma: float | Array, value: int) -> bool:
    """Whether gamma is known to be this value."""
    return isinstance(gamma, float) and gamma == value


def _inside(interval: tuple[float, float], t: Array) -> Array:
    """Whether t, a time or a step, is in the interval."""
    low, high = interval
    t = t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(float)
    return (low <= t) & (t <= high)


def _wide(n: Array) -> Array:
    """Integers in a dtype that holds what they are compared with: 256 in 8 bits is 0."""
    return n.astype(jnp.int32) if jnp.iinfo(n.dtype).bits < 32 else n


def _weighted(gamma: float | Array, interval: tuple[float, float] | None, t: Array, x: Array, pull: Any) -> Array:
    """gamma pull() within the interval and pull() outside; no evaluation where that is known to be zero."""
    if _is(gamma, 0):
        nothing = jnp.zeros_like(x)
        return nothing if interval is None else jax.lax.cond(_inside(interval, t), lambda: nothing, pull)
    weight = jnp.asarray(gamma, x.dtype)
    if interval is not None:
        weight = jnp.where(_inside(interval, t), weight, 1)
    return weight * pull()


def _at(t: Array, x: Array) -> tuple[Array, Array]:
    """One time in the dtype of x, or one step as the integer that it is; and x."""
    x, t = floating("x", x), jnp.asarray(t)
    if jnp.issubdtype(t.dtype, jnp.integer):
        return one_time(t, t.dtype), x
    return one_time(t, x.dtype), x


def _gradient(log_prob_y: ScalarField, t: Array, x: Array, args: Args) -> Array:
    """grad_x log p(y | x_t)."""

    def one(z: Array) -> Array:
        value = log_prob_y(t, z, args)
        if jnp.shape(value) != ():
            raise ValueError(
                f"log_prob_y returned shape {jnp.shape(value)}: it must return one number, log p(y | x_t) of the "
                "wanted class; guidance.log_prob_y(logits) picks it by the label in args."
            )
        if value.dtype != z.dtype:
            raise TypeError(f"log_prob_y returned dtype {value.dtype} for x of {z.dtype}: cast its parameters.")
        return value

    return jax.grad(one)(x)


def _log_softmax(values: Array, y: int | Array) -> Array:
    """The entry y of log softmax; NaN with a NaN gradient where a traced y is no class."""
    y = jnp.asarray(y)
    if jnp.ndim(values) != 1 or values.shape[0] < 2:
        raise ValueError(
            f"logits must have shape [num_classes], at least two of them, got {jnp.shape(values)}: one example "
            "at a time."
        )
    num = values.shape[0]
    if not jnp.issubdtype(y.dtype, jnp.integer) or y.ndim:
        raise TypeError(
            f"the label y must be one integer from 0 to {num - 1}, got shape {y.shape} of {y.dtype}: for a batch use "
            "jax.vmap."
        )
    if concrete(y) and not 0 <= int(y) < num:
        raise ValueError(f"the label y must be from 0 to {num - 1}, got {int(y)}: a classifier has no null label.")
    y = _wide(y)
    factor = jnp.where((y >= 0) & (y < num), 1.0, jnp.nan).astype(values.dtype)
    return factor * jax.nn.log_softmax(values)[jnp.clip(y, 0, num - 1)]


def _num_classes(num_classes: int) -> int:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int | np.integer) or num_classes < 1:
        raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}.")
    return int(num_classes)
