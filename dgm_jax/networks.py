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
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dgm_jax import _checks, structured
from dgm_jax.divergence import Energy
from dgm_jax.types import Array, StructuredField, VectorField

__all__ = [
    "MLP",
    "Energy",
    "HollowNet",
    "OTFlow",
    "UNet",
    "conditional",
    "energy",
    "sinusoidal_features",
    "vector_field",
]


def vector_field(net: nn.Module, *, precision: str | None = None) -> VectorField:
    """A Flax linen module as a vector field, f(t, x, params) = net.apply(params, t, x).

    Args:
        net: any linen module called as ``net(t [], x [*event]) -> [*event]``.
        precision: of matrix products and convolutions, and of their derivatives, as in
            ``jax.default_matmul_precision``; ``None`` leaves the caller's setting. "highest" asks GPUs and TPUs for
            full float32: rounding to TF32 or bfloat16 makes an adaptive solver take many small steps.

    Returns:
        ``(t [], x [*event], params) -> [*event]``, params as ``net.init`` made them. Of an :class:`MLP` it is a
        ``types.StructuredField``, which knows its exact divergence for little more than its value whatever the
        dimension (see ``structured.chain_trace``), and so it is of a :class:`HollowNet` and of an :class:`OTFlow`. With
        three and more wide hidden layers the exact divergence of an MLP is dear; it offers estimates by probes in its
        narrowest space too (see ``structured.chain_forms``). An MLP whose ``out_features`` are not the dimension of x
        has no divergence: to ask for it is a ``ValueError``.
    """
    return _field(net, lambda args: (args,), precision)


def conditional(net: nn.Module, *, precision: str | None = None) -> VectorField:
    """A Flax linen module that is shown a label as a vector field, f(t, x, (params, y)) = net.apply(params, t, x, y).

    Args:
        net: a linen module called as ``net(t [], x [*event], y []) -> [*event]``, an :class:`MLP` or :class:`UNet` with
            ``num_classes`` among them.
        precision: as in :func:`vector_field`.

    Returns:
        ``(t [], x [*event], (params, y)) -> [*event]``. A y of ``num_classes`` means that there is no label. It is a
        ``types.StructuredField`` where that of :func:`vector_field` would be one.
    """
    return _field(net, lambda args: (args[0], args[1]), precision)


def energy(net: "MLP", *, precision: str | None = None) -> Energy:
    """A scalar :class:`MLP` as a scalar field, u(t, x, params) = net.apply(params, t, x)[0], that knows its Laplacian.

    Args:
        net: an MLP with ``out_features=1``, shown no label, with an activation that acts on each number by itself.
        precision: as in :func:`vector_field`.

    Returns:
        An :class:`Energy`: ``(t [], x [d], params) -> []``, with its Laplacian for the price of directions as many as
        the first layer has units, whatever d: see ``structured.chain_laplacian``.

    Raises:
        TypeError: the network is not an MLP.
        ValueError: it has more than one output, classes, or another kind of activation.
    """
    if not isinstance(net, MLP):
        raise TypeError(
            f"net must be a networks.MLP, got {type(net).__name__}: for any other scalar function of x use "
            "divergence.laplacian."
        )
    if net.out_features != 1 or net.num_classes or not net.features or not _entrywise(net.activation, net.param_dtype):
        raise ValueError(
            "net must have out_features=1, hidden layers, no classes, and an activation that acts on each number by "
            "itself, as tanh does: for any other scalar function of x use divergence.laplacian."
        )
    products = _precision(precision)

    def field(t: Array, x: Array, args: Any) -> Array:
        with products():
            return cast(Array, net.apply(args, t, x))[0]

    def prepare(args: Any) -> Any:
        with products():
            return args, structured.laplacian_tables(_kernels(net, args)[:-1])

    def with_laplacian(t: Array, x: Array, prepared: Any) -> tuple[Array, Array]:
        args, tables = prepared

        def bumped(bumps: list[Array]) -> tuple[Array, list[Array]]:  # to be differentiated by what each layer adds
            inputs = []

            def activation(a: Array) -> Array:
                inputs.append(a)
                return net.activation(a) + bumps[len(inputs) - 1]

            value = cast(Array, net.clone(activation=activation).apply(args, t, x))
            return value[0], inputs

        def derivatives(a: Array) -> tuple[Array, Array]:
            one = (jnp.ones_like(a),)
            return jax.jvp(lambda a: jax.jvp(net.activation, (a,), one)[1], (a,), one)

        with products():
            bumps = [jnp.zeros((width,), net.param_dtype) for width in net.features]
            (value, inputs), by_layer = jax.value_and_grad(bumped, has_aux=True)(bumps)
            slopes, curvatures = zip(*map(derivatives, inputs), strict=True)
            weights = [a * b for a, b in zip(by_layer, curvatures, strict=True)]
            *kernels, _ = _kernels(net, args)
            return value, structured.chain_laplacian(tables, kernels, _residual(net, kernels), slopes, weights)

    return Energy(field, prepare, with_laplacian)


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


class HollowNet(nn.Module):
    """A network whose divergence costs one product whatever the dimension, because each coordinate passes it apart.

    f_i(t, x) = tau(t, x_i, h_i), where h_i = h_i(t, x without x_i) is what the other coordinates say. So the Jacobian
    of h is hollow, and div f = sum_i dtau/dx_i with h held still. The conditioner h is a pair of dense networks with
    masked matrices: in the one h_i sees what comes before x_i, in the other what comes after it. The transformer tau is
    one dense network for all coordinates, which knows them apart by h. Time enters each layer as in :class:`MLP`.

    :func:`vector_field` makes a ``types.StructuredField`` of it.

    Attributes:
        features: widths of the hidden layers of the conditioner, in each direction. A unit sees the coordinates up to
            some one of them, in steps of d / width: with widths of at least d, h_i sees all others.
        channels: how many numbers h_i has from each direction.
        transformer: widths of the hidden layers of tau.
        activation: of all hidden layers.
        last_init: initializer of the last layer's matrix and time weights.
        param_dtype: of the parameters; x must have the same.

    Raises:
        TypeError: x is not of floats, or not of ``param_dtype``.
        ValueError: x is not one example [d], or t not a scalar.

    Source: Chen & Duvenaud (2019), "Neural Networks with Cheap Differential Operators", sections 2 and 3; Germain et
    al. (2015), "MADE: Masked Autoencoder for Distribution Estimation", section 4, for the masks.
    """

    features: Sequence[int] = (64, 64)
    channels: int = 8
    transformer: Sequence[int] = (32,)
    activation: Callable[[Array], Array] = nn.tanh
    last_init: Callable[..., Array] = nn.initializers.zeros
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Name the two parts."""
        own = {"activation": self.activation, "param_dtype": self.param_dtype}
        self.others = _Others(self.features, self.channels, **own)
        self.each = _Each(self.transformer, last_init=self.last_init, **own)

    def __call__(self, t: Array, x: Array) -> Array:
        """The field at t [] and x [d]: [d]."""
        return self.passed(t, x, self.conditioner(t, x))

    def conditioner(self, t: Array, x: Array) -> Array:
        """h, [d, 2 channels]."""
        t, x = _inputs(t, x, ("d",), self.param_dtype)
        return self.others(t, x)

    def passed(self, t: Array, x: Array, h: Array) -> Array:
        """tau(t, x_i, h_i) for all i, [d]."""
        t, x = _inputs(t, x, ("d",), self.param_dtype)
        return self.each(t, x, h)


class OTFlow(nn.Module):
    """The velocity v = -grad Phi of a potential whose second derivatives have a closed form.

    Phi(t, x) = w . u_n + |A s|^2 / 2 + b . s + c,    s = (x, t),
    u_1 = act(K_1 s + b_1),    u_l = u_(l-1) + act(K_l u_(l-1) + b_l) / (n - 1),    act(a) = log(exp(a) + exp(-a)).

    The derivative of act is tanh, and div v = -(lap w . u_n + the trace of A^T A over x), the Laplacian by
    ``structured.chain_laplacian``.

    The field of optimal transport is such a gradient, and is straight in time: few steps of a solver follow it.
    :func:`vector_field` makes a ``types.StructuredField`` of it. Unlike the other networks here it does not start as
    the field 0.

    Attributes:
        width: of the hidden layers.
        layers: n, their number.
        rank: of A, at most d + 1.
        param_dtype: of the parameters; x must have the same.

    Raises:
        TypeError: x is not of floats, or not of ``param_dtype``.
        ValueError: x is not one example [d], or t not a scalar.

    Source: Onken et al. (2021), "OT-Flow: Fast and Accurate Continuous Normalizing Flows via Optimal Transport",
    equations 10 to 16.
    """

    width: int = 64
    layers: int = 2
    rank: int = 10
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: Array, x: Array) -> Array:
        """The velocity at t [] and x [d]: [d]."""
        t, x = _inputs(t, x, ("d",), self.param_dtype)
        size, xavier, zeros = x.shape[0] + 1, nn.initializers.xavier_normal(), nn.initializers.zeros
        kernels = []
        for index in range(self.layers):
            shape = (self.width if index else size, self.width)
            kernels.append(
                (
                    self.param(f"kernel_{index}", _LECUN, shape, self.param_dtype),
                    self.param(f"bias_{index}", zeros, (self.width,), self.param_dtype),
                )
            )
        params = {
            "layers": kernels,
            "w": self.param("w", nn.initializers.ones, (self.width,), self.param_dtype),
            "A": self.param("A", xavier, (min(self.rank, size), size), self.param_dtype),
            "b": self.param("b", zeros, (size,), self.param_dtype),
            "c": self.param("c", zeros, (), self.param_dtype),
        }
        return -jax.grad(lambda x: _ot_potential(params, t, x)[0])(x)

    def potential(self, t: Array, x: Array) -> Array:
        """Phi at t [] and x [d]: [], as ``net.apply(params, t, x, method="potential")``."""
        t, x = _inputs(t, x, ("d",), self.param_dtype)
        return _ot_potential(_ot_params(self.variables["params"]), t, x)[0]


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


class _Timed(nn.Module):
    """h K + b + t w, with the entries of K that ``mask`` keeps."""

    features: int
    param_dtype: Any
    kernel_init: Callable[..., Array] = _LECUN

    @nn.compact
    def __call__(self, t: Array, h: Array, mask: np.ndarray | None = None) -> Array:
        shape = (h.shape[-1] + 1, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        matrix = kernel[:-1] if mask is None else kernel[:-1] * jnp.asarray(mask, self.param_dtype)
        row = bias + t * kernel[-1]
        return h @ matrix + jnp.broadcast_to(row, (*h.shape[:-1], self.features))


class _Others(nn.Module):
    """What the coordinates before and after each one say: [d] to [d, 2 channels]."""

    features: Sequence[int]
    channels: int
    activation: Callable[[Array], Array]
    param_dtype: Any

    @nn.compact
    def __call__(self, t: Array, x: Array) -> Array:
        d = x.shape[0]
        said = []
        for direction in ("before", "after"):
            h = x if direction == "before" else x[::-1]
            seen = np.arange(d)  # each unit sees the coordinates up to this one
            for index, width in enumerate(self.features):
                up_to = np.arange(width) * (d - 1) // width if d > 1 else np.full(width, -1)
                layer = _Timed(width, self.param_dtype, name=f"{direction}_{index}")
                h = self.activation(layer(t, h, seen[:, None] <= up_to[None]))
                seen = up_to
            up_to = np.repeat(np.arange(d), self.channels)
            layer = _Timed(d * self.channels, self.param_dtype, name=f"{direction}_last")
            h = layer(t, h, seen[:, None] < up_to[None]).reshape(d, self.channels)
            said.append(h if direction == "before" else h[::-1])
        return jnp.concatenate(said, axis=1)


class _Each(nn.Module):
    """One network for each coordinate and what the others say to it: [d], [d, c] to [d]."""

    features: Sequence[int]
    activation: Callable[[Array], Array]
    last_init: Callable[..., Array]
    param_dtype: Any

    @nn.compact
    def __call__(self, t: Array, x: Array, h: Array) -> Array:
        y = jnp.concatenate([x[:, None], h], axis=1)
        for index, width in enumerate(self.features):
            y = self.activation(_Timed(width, self.param_dtype, name=f"layer_{index}")(t, y))
        return _Timed(1, self.param_dtype, self.last_init, name="last")(t, y)[:, 0]


def _ot_params(leaves: Any) -> dict[str, Any]:
    """The parameters of an :class:`OTFlow` with its layers in a list."""
    num = sum(name.startswith("kernel_") for name in leaves)
    return {**leaves, "layers": [(leaves[f"kernel_{index}"], leaves[f"bias_{index}"]) for index in range(num)]}


def _ot_potential(
    params: dict[str, Any], t: Array, x: Array, bumps: Sequence[Array] | None = None
) -> tuple[Array, list[Array]]:
    """Phi(t, x) [], with ``bumps`` added to what the activations return, and the inputs of these."""
    s = jnp.append(x, t)
    u, inputs, eta = s, [], _ot_scale(params)
    for index, (kernel, bias) in enumerate(params["layers"]):
        a = u @ kernel + bias
        inputs.append(a)
        new = jnp.logaddexp(a, -a)
        if bumps is not None:
            new = new + bumps[index]
        u = u + eta * new if index else new
    quadratic = jnp.sum(jnp.square(params["A"] @ s)) / 2
    return params["w"] @ u + quadratic + params["b"] @ s + params["c"], inputs


def _ot_scale(params: dict[str, Any]) -> float:
    return 1 / max(len(params["layers"]) - 1, 1)


class _Own(NamedTuple):
    """How a module computes its own divergence.

    Attributes:
        prepare: ``params -> tables``.
        with_divergence: ``(tables, params, t, x, *label) -> (value, divergence)``.
        with_forms: ``(tables, params, t, x, *label, probes=probes) -> (value, forms)``, or ``None``.
        probe_space: ``(tables, params) -> (dim, worth)``, or ``None``.
    """

    prepare: Callable[[Any], Any]
    with_divergence: Callable[..., tuple[Array, Array]]
    with_forms: Callable[..., tuple[Array, Array]] | None = None
    probe_space: Callable[[Any, Any], tuple[int, float]] | None = None


def _field(net: nn.Module, split: Callable[[Any], tuple], precision: str | None) -> VectorField:
    """A module as a vector field; ``split`` makes (params, label or nothing) of args."""
    products = _precision(precision)

    def field(t: Array, x: Array, args: Any) -> Array:
        params, *label = split(args)
        with products():
            return cast(Array, net.apply(params, t, x, *label))

    if isinstance(net, MLP) and _entrywise(net.activation, net.param_dtype):
        own = _of_mlp(net)
    elif isinstance(net, HollowNet) and _entrywise(net.activation, net.param_dtype):
        own = _of_hollow_net(net)
    elif isinstance(net, OTFlow):
        own = _of_ot_flow(net)
    else:
        return field

    def prepare(args: Any) -> Any:
        with products():
            return args, own.prepare(split(args)[0])

    def with_divergence(t: Array, x: Array, prepared: Any) -> tuple[Array, Array]:
        args, tables = prepared
        params, *label = split(args)
        with products():
            return own.with_divergence(tables, params, t, x, *label)

    if own.with_forms is None or own.probe_space is None:
        return StructuredField(field, prepare, with_divergence)
    forms_of, space_of = own.with_forms, own.probe_space

    def with_forms(t: Array, x: Array, prepared: Any, probes: Array) -> tuple[Array, Array]:
        args, tables = prepared
        params, *label = split(args)
        with products():
            return forms_of(tables, params, t, x, *label, probes=probes)

    def probe_space(prepared: Any) -> tuple[int, float]:
        args, tables = prepared
        return space_of(tables, split(args)[0])

    return StructuredField(field, prepare, with_divergence, with_forms, probe_space)


def _of_mlp(net: MLP) -> _Own:
    def chain(params: Any) -> tuple[list[Array], list[bool]]:
        kernels = _kernels(net, params)
        return kernels, _residual(net, kernels[:-1])

    def with_slopes(params: Any, t: Array, x: Array, *label: Array) -> tuple[Array, list[Array]]:
        slopes: list[Array] = []

        def activation(a: Array) -> Array:
            h, slope = jax.jvp(net.activation, (a,), (jnp.ones_like(a),))
            slopes.append(slope)
            return h

        return cast(Array, net.clone(activation=activation).apply(params, t, x, *label)), slopes

    def with_divergence(tables: Any, params: Any, *point: Array) -> tuple[Array, Array]:
        value, slopes = with_slopes(params, *point)
        return value, structured.chain_trace(tables, *chain(params), slopes)

    def with_forms(tables: Any, params: Any, *point: Array, probes: Array) -> tuple[Array, Array]:
        value, slopes = with_slopes(params, *point)
        return value, structured.chain_forms(tables, *chain(params), slopes, probes)

    return _Own(
        lambda params: structured.chain_tables(*chain(params)),
        with_divergence,
        with_forms,
        lambda tables, params: structured.chain_space(tables, *chain(params)),
    )


def _of_hollow_net(net: HollowNet) -> _Own:
    def with_divergence(tables: Any, params: Any, t: Array, x: Array) -> tuple[Array, Array]:
        h = net.apply(params, t, x, method="conditioner")
        value, slopes = jax.jvp(lambda x: net.apply(params, t, x, h, method="passed"), (x,), (jnp.ones_like(x),))
        return value, jnp.sum(slopes)

    return _Own(lambda params: None, with_divergence)


def _of_ot_flow(net: OTFlow) -> _Own:
    def kernels_of(params: dict[str, Any]) -> list[Array]:
        first, *rest = (kernel for kernel, _ in params["layers"])
        return [first[:-1], *rest]

    def prepare(params: Any) -> Any:
        params = _ot_params(params["params"])
        return structured.laplacian_tables(kernels_of(params)), jnp.sum(jnp.square(params["A"][:, :-1]))

    def with_divergence(tables: Any, params: Any, t: Array, x: Array) -> tuple[Array, Array]:
        t, x = _inputs(t, x, ("d",), net.param_dtype)
        params, (tables, quadratic) = _ot_params(params["params"]), tables
        bumps = [jnp.zeros((net.width,), x.dtype) for _ in range(net.layers)]

        def potential(x: Array, bumps: list[Array]) -> tuple[Array, list[Array]]:
            return _ot_potential(params, t, x, bumps)

        (by_x, by_layer), inputs = jax.grad(potential, (0, 1), has_aux=True)(x, bumps)
        slopes = [jnp.tanh(a) for a in inputs]
        weights = [by * (1 - jnp.square(slope)) for by, slope in zip(by_layer, slopes, strict=True)]
        residual = [index > 0 for index in range(net.layers)]
        laplacian = structured.chain_laplacian(tables, kernels_of(params), residual, slopes, weights, _ot_scale(params))
        return -by_x, -(laplacian + quadratic)

    return _Own(prepare, with_divergence)


def _precision(precision: str | None) -> Callable[[], Any]:
    """What makes a context in which matrix products have this precision."""
    return lambda: jax.default_matmul_precision(precision) if precision else nullcontext()


def _kernels(net: MLP, params: Any) -> list[Array]:
    """The matrices of an MLP, the last among them."""
    names = [*(f"layer_{index}" for index in range(len(net.features))), "last"]
    return [params["params"][name]["kernel"] for name in names]


def _residual(net: MLP, kernels: Sequence[Array]) -> list[bool]:
    """Which of the hidden layers with these matrices are residual."""
    return [net.residual and kernel.shape[0] == kernel.shape[1] for kernel in kernels]


_ENTRYWISE = {
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan", "atan2", "atanh", "broadcast_in_dim", "cbrt", "ceil",
    "clamp", "closed_call", "convert_element_type", "copy", "cos", "cosh", "custom_jvp_call", "custom_vjp_call", "div",
    "eq", "erf", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "jit", "le", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pjit", "pow", "round", "rsqrt",
    "select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh",
}  # fmt: skip
"""Operations that act on each number by itself, and calls of programs made of such."""


def _entrywise(activation: Callable[..., Array], dtype: Any) -> bool:
    """Whether an activation certainly acts on each number by itself: of a vector, it does nothing else."""
    shape = (4,)

    def acts(program: Any) -> bool:
        program = getattr(program, "jaxpr", program)
        for equation in program.eqns:
            shapes = {jnp.shape(each.aval) for each in (*equation.invars, *equation.outvars)}
            if equation.primitive.name not in _ENTRYWISE or not shapes <= {(), shape}:
                return False
            inner = [value for value in equation.params.values() if hasattr(getattr(value, "jaxpr", value), "eqns")]
            if not all(map(acts, inner)):
                return False
        return True

    try:
        program, out = jax.make_jaxpr(activation, return_shape=True)(jax.ShapeDtypeStruct(shape, dtype))
    except Exception:  # a module, or a function of vectors of another size: whatever it is, it is not certain
        return False
    return jnp.shape(out) == shape and acts(program)


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
