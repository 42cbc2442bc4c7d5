"""Networks that are a vector field: one example in, one example out, time beside it.

A Flax module here is called as ``net(t [], x [*event]) -> [*event]``; its parameters are a pytree that
``net.init(key, t, x)`` makes and that travels in ``args``::

    net = MLP()
    params = jax.jit(net.init)(key, t, x)        # jit: a U-Net starts sooner
    field = vector_field(net)                    # field(t, x, params) = net.apply(params, t, x)

Any other library's module becomes a :data:`~dgm_jax.types.VectorField` in one line too: split it into its arrays,
which go into ``args``, and the rest, which stays in a closure::

    # Flax nnx
    graphdef, params = nnx.split(model)
    field = lambda t, x, params: nnx.merge(graphdef, params)(t, x)
    # Equinox
    params, static = eqx.partition(model, eqx.is_inexact_array)
    field = lambda t, x, params: eqx.combine(params, static)(t, x)

Parameters hidden in the closure instead work with some adjoints and raise with others (Diffrax's ``BacksolveAdjoint``).

The last layer starts at zero, so that an untrained network is the field 0: the identity as a flow, "no noise" as a
noise prediction.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgm_jax import _checks
from dgm_jax.types import Array, VectorField

__all__ = ["MLP", "UNet", "conditional", "sinusoidal_features", "vector_field"]


def vector_field(net: nn.Module, *, precision: str | None = None) -> VectorField:
    """A Flax linen module as a vector field, f(t, x, params) = net.apply(params, t, x).

    Args:
        net: any linen module called as ``net(t [], x [*event]) -> [*event]``.
        precision: of matrix products and convolutions, and of their derivatives, as in
            ``jax.default_matmul_precision``; ``None`` leaves the caller's setting. "highest" asks GPUs and TPUs for
            full float32: rounding to TF32 or bfloat16 makes an adaptive solver take many small steps.

    Returns:
        ``(t [], x [*event], params) -> [*event]``, params as ``net.init`` made them.
    """

    def field(t: Array, x: Array, args: Any) -> Array:
        with jax.default_matmul_precision(precision) if precision else nullcontext():
            return cast(Array, net.apply(args, t, x))

    return field


def conditional(net: nn.Module, *, precision: str | None = None) -> VectorField:
    """A Flax linen module that is shown a label as a vector field, f(t, x, (params, y)) = net.apply(params, t, x, y).

    Args:
        net: a linen module called as ``net(t [], x [*event], y []) -> [*event]``, an :class:`MLP` or :class:`UNet` with
            ``num_classes`` among them.
        precision: as in :func:`vector_field`.

    Returns:
        ``(t [], x [*event], (params, y)) -> [*event]``. A y of ``num_classes`` means that there is no label.
    """

    def field(t: Array, x: Array, args: Any) -> Array:
        params, y = args
        with jax.default_matmul_precision(precision) if precision else nullcontext():
            return cast(Array, net.apply(params, t, x, y))

    return field


def sinusoidal_features(t: Array, num: int, max_frequency: float = 100.0) -> Array:
    """Sines and cosines of time, with frequencies in geometric progression.

    (sin w_k t, cos w_k t), w_k = max_frequency^(k / (num/2 - 1)), k = 0 .. num/2 - 1.

    Args:
        t: time [], of order one.
        num: how many features; even.
        max_frequency: the largest w_k, in radians per unit of time. What a network can tell apart in time is of size
            1 / max_frequency, and so are the steps that an ODE solver must take.

    Returns:
        [num], in the dtype of ``t``.

    Raises:
        ValueError: ``num`` is odd or less than 2.

    Source: Vaswani et al. (2017), "Attention Is All You Need", section 3.5.
    """
    if num < 2 or num % 2:
        raise ValueError(f"num must be even and at least 2, got {num}: half are sines, half are cosines.")
    half = num // 2
    frequencies = jnp.asarray([max_frequency ** (k / max(half - 1, 1)) for k in range(half)], t.dtype)
    angles = t * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class MLP(nn.Module):
    """A fully connected network that sees the time in every layer.

    h_0 = x, h_l = act(W_l h_(l-1) + b_l + c_l(t)), and the last layer is without act. With ``time_features=0``,
    c_l(t) = t w_l: the same function as appending t to the input of each layer, at the price of one product, as
    continuous normalizing flows want it. With ``time_features=n``, c_l(t) is linear in an embedding of n sines and
    cosines, as score networks want it. To show the network another clock, say half the log signal-to-noise ratio,
    pass that as t: ``lambda t, x, params: net.apply(params, clock(t), x)``.

    Attributes:
        features: widths of the hidden layers.
        activation: act.
        time_features: 0 for t itself, or how many sines and cosines of it; even.
        max_frequency: of those, in radians per unit of time.
        residual: h_l = h_(l-1) + act(...) where the widths agree.
        num_classes: where not 0, the network is called as ``net(t, x, y)`` with a label y [], an integer in 0 ..
            num_classes - 1, or num_classes itself for "no label"; its embedding joins that of the time.
        out_features: width of the output; ``None`` for that of x.
        last_init: initializer of the last layer's matrix and time weights.
        param_dtype: of the parameters; x must have the same.

    Raises:
        TypeError: x is not of floats, or not of ``param_dtype``; y is missing, uncalled for or not an integer.
        ValueError: ``num_classes`` without ``time_features``; y is outside 0 .. num_classes (where it is a tracer, the
            result is NaN); x is not one example [d], or t not a scalar.

    Source: Grathwohl et al. (2019), "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative
    Models", whose layers see the time likewise.
    """

    features: Sequence[int] = (64, 64, 64)
    activation: Callable[[Array], Array] = jnp.tanh
    time_features: int = 0
    max_frequency: float = 100.0
    residual: bool = False
    num_classes: int = 0
    out_features: int | None = None
    last_init: Callable[..., Array] = nn.initializers.zeros
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: Array, x: Array, y: Array | None = None) -> Array:
        """The field at t [] and x [d], given the label y [] if there are classes: [d], or [out_features]."""
        t, x = _inputs(t, x, ("d",), self.param_dtype)
        if (self.num_classes or y is not None) and not self.time_features:
            raise ValueError("a label y needs time_features > 0, got 0: its embedding joins that of the time.")
        embedding = _embedding(self, t, y) if self.time_features else None

        def layer(h: Array, width: int, name: str, init: Callable[..., Array] | None = None) -> Array:
            new = nn.Dense(width, kernel_init=init or _LECUN, param_dtype=self.param_dtype, name=name)(h)
            if embedding is not None:
                time = nn.Dense(
                    width, use_bias=False, kernel_init=init or _LECUN, param_dtype=self.param_dtype, name=f"{name}_time"
                )
                return new + time(embedding)

            def time_row(key: Array) -> Array:  # of the matrix that would act on h with t appended
                if init is None:
                    return nn.initializers.normal((h.shape[0] + 1) ** -0.5)(key, (width,), self.param_dtype)
                return init(key, (h.shape[0] + 1, width), self.param_dtype)[-1]

            return new + t * self.param(f"{name}_time", time_row)

        h = x
        for index, width in enumerate(self.features):
            new = self.activation(layer(h, width, f"layer_{index}"))
            h = h + new if self.residual and h.shape == new.shape else new
        return layer(h, self.out_features or x.shape[0], "last", self.last_init)


class UNet(nn.Module):
    """A small U-Net for images: residual blocks at falling resolutions and back, with skip connections.

    Each residual block is x + conv(silu(scale(t) norm(conv(silu(norm(x)))) + shift(t))), norm by groups of channels
    over the whole image. Going down halves each side by a convolution of stride 2 (28, 14, 7, 4: rounded up); going
    up repeats each pixel 2 x 2 and cuts to the size of the skip, so that every size fits. Under ``jax.vmap`` each
    convolution becomes one convolution with the batch in front.

    On a CPU, jit one training step and not a ``lax.scan`` of many: XLA runs reverse-mode derivatives of convolutions
    5 to 100 times slower inside a loop (jax-ml/jax issue 12868). Values and forward-mode derivatives, which sampling
    and likelihoods take inside the solver's loop, keep their speed.

    Attributes:
        features: channels at each resolution, finest first; one resolution for each entry.
        blocks: residual blocks at each resolution, on the way down and on the way up.
        attention: self-attention over all pixels at the lowest resolution.
        groups: of channels, in the normalisations; where it does not divide the channels, the largest number that
            divides both.
        time_features: sines and cosines of the time; even.
        max_frequency: of those, in radians per unit of time.
        num_classes: where not 0, the network is called as ``net(t, x, y)`` with a label y [], an integer in 0 ..
            num_classes - 1, or num_classes itself for "no label"; its embedding joins that of the time.
        param_dtype: of the parameters; x must have the same.

    Raises:
        TypeError: x is not of floats, or not of ``param_dtype``; y is missing, uncalled for or not an integer.
        ValueError: y is outside 0 .. num_classes (where it is a tracer, the result is NaN); x is not one image
            [h, w, c], or t not a scalar.

    Source: Ho et al. (2020), "Denoising Diffusion Probabilistic Models", appendix B; Dhariwal & Nichol (2021),
    "Diffusion Models Beat GANs on Image Synthesis", section 3 (the time as scale and shift).
    """

    features: Sequence[int] = (32, 64)
    blocks: int = 1
    attention: bool = False
    groups: int = 8
    time_features: int = 64
    max_frequency: float = 100.0
    num_classes: int = 0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: Array, x: Array, y: Array | None = None) -> Array:
        """The field at t [] and x [h, w, c], given the label y [] if there are classes: [h, w, c]."""
        t, x = _inputs(t, x, ("h", "w", "c"), self.param_dtype)
        embedding = _embedding(self, t, y)
        conv = partial(nn.Conv, kernel_size=(3, 3), param_dtype=self.param_dtype)
        block = partial(_Block, groups=self.groups, param_dtype=self.param_dtype)

        h = conv(self.features[0])(x)
        skips = []
        for level, width in enumerate(self.features):
            if level:
                h = conv(width, strides=(2, 2))(h)
            for _ in range(self.blocks):
                h = block(width)(h, embedding)
            skips.append(h)
        h = block(self.features[-1])(h, embedding)
        if self.attention:
            h = _Attention(self.groups, self.param_dtype)(h)
        for level, (width, skip) in reversed(list(enumerate(zip(self.features, skips, strict=True)))):
            if level < len(skips) - 1:
                h = conv(width)(_upsample(h)[: skip.shape[0], : skip.shape[1]])
            h = jnp.concatenate([h, skip], axis=-1)
            for _ in range(self.blocks):
                h = block(width)(h, embedding)
        h = nn.silu(_GroupNorm(self.groups, self.param_dtype)(h))
        return conv(x.shape[-1], kernel_init=nn.initializers.zeros)(h)


_LECUN = nn.initializers.lecun_normal()


class _Block(nn.Module):
    """Two convolutions around which the input passes; the time scales and shifts between them."""

    features: int
    groups: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        norm = partial(_GroupNorm, self.groups, self.param_dtype)
        conv = partial(nn.Conv, self.features, (3, 3), param_dtype=self.param_dtype)
        h = conv()(nn.silu(norm()(x)))
        scale, shift = jnp.split(nn.Dense(2 * self.features, param_dtype=self.param_dtype)(embedding), 2)
        h = conv(kernel_init=nn.initializers.zeros)(nn.silu(norm()(h, 1 + scale, shift)))
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, param_dtype=self.param_dtype)(x)
        return x + h


class _Attention(nn.Module):
    """One head of self-attention over all pixels, added to its input."""

    groups: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        h = _GroupNorm(self.groups, self.param_dtype)(x).reshape(-1, channels)
        query, key, value = jnp.split(nn.Dense(3 * channels, param_dtype=self.param_dtype)(h), 3, axis=-1)
        weights = nn.softmax(query @ key.T * channels**-0.5)
        out = nn.Dense(channels, kernel_init=nn.initializers.zeros, param_dtype=self.param_dtype)(weights @ value)
        return x + out.reshape(x.shape)


class _GroupNorm(nn.Module):
    """Mean 0 and variance 1 over the image for each group of channels, then a scale and a shift of each channel."""

    groups: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, scale: Array | None = None, shift: Array | None = None) -> Array:
        channels = x.shape[-1]
        if scale is None or shift is None:
            scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
            shift = self.param("shift", nn.initializers.zeros, (channels,), self.param_dtype)
        groups = math.gcd(self.groups, channels)

        def over_group(per_pixel: Array) -> Array:  # first over pixels, then channels: twice as fast on a CPU
            return jnp.repeat(per_pixel.mean((0, 1)).reshape(groups, -1).mean(1), channels // groups)

        mean = over_group(x)
        gain = scale * jax.lax.rsqrt(over_group(jnp.square(x - mean[None, None])) + 1e-5)
        return x * gain[None, None] + (shift - mean * gain)[None, None]


def _upsample(x: Array) -> Array:
    """Each pixel of [h, w, c] repeated 2 x 2."""
    rows, columns, channels = x.shape
    x = jnp.broadcast_to(x[:, None, :, None], (rows, 2, columns, 2, channels))
    return x.reshape(2 * rows, 2 * columns, channels)


def _embedding(net: Any, t: Array, y: Array | None) -> Array:
    """Time and label as [time_features]: sines and cosines through one layer, a row of a table; in a ``__call__``."""
    features = sinusoidal_features(t, net.time_features, net.max_frequency)
    embedding = nn.Dense(net.time_features, param_dtype=net.param_dtype, name="time")(features)
    if (y is None) != (net.num_classes == 0):
        raise TypeError(
            "y is missing: the network has num_classes, call net(t, x, y), with y = num_classes for no label."
            if y is None
            else "y was given, but the network has no classes: build it with num_classes."
        )
    if y is not None:
        table = nn.Embed(net.num_classes + 1, net.time_features, param_dtype=net.param_dtype, name="label")
        embedding = embedding + table(_label(y, net.num_classes)).astype(embedding.dtype)
    return nn.silu(embedding)


def _label(y: Array, num_classes: int) -> Array:
    """``y``, if it is one label or the one that stands for none."""
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.integer) or y.ndim:
        raise TypeError(
            f"y must be one integer label [], got shape {y.shape} of {y.dtype}: for a batch use jax.vmap, "
            "with y inside args: in_axes=(None, 0, (None, 0))."
        )
    if _checks.concrete(y) and not 0 <= int(y) <= num_classes:
        raise ValueError(f"y must be in 0 .. {num_classes}, where {num_classes} means no label, got {int(y)}.")
    return jnp.where(y < 0, num_classes + 1, y)  # beyond the table, where the row is NaN: -1 would be its last row


def _inputs(t: Array, x: Array, axes: tuple[str, ...], param_dtype: Any) -> tuple[Array, Array]:
    """``t`` and ``x`` as arrays of one dtype, if they are one time and one example with these axes."""
    x = _checks.floating("x", x)
    wanted = ", ".join(axes)
    if x.ndim != len(axes):
        raise ValueError(
            f"x must be one example [{wanted}], got shape {x.shape}: for a batch use "
            "jax.vmap(field, in_axes=(None, 0, None)), or (0, 0, None) with one time for each example."
        )
    if x.dtype != jnp.dtype(param_dtype):
        raise TypeError(
            f"x has dtype {x.dtype} and the network param_dtype {jnp.dtype(param_dtype)}: "
            f"build the network with param_dtype=jnp.{x.dtype}, or convert x."
        )
    if jnp.ndim(t) != 0:
        raise ValueError(
            f"t must be one time [], got shape {jnp.shape(t)}: for one time for each example use "
            "jax.vmap(field, in_axes=(0, 0, None))."
        )
    return jnp.asarray(t).astype(x.dtype), x
