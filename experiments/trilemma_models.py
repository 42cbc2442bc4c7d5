"""The models of ``trilemma.py``: how each begins, learns, draws, encodes, and what it knows of log p.

All speak of examples x [d] in units in which the data have mean 0 and variance 1, and of a latent z ~ N(0, I). A model
is a ``Model``; ``BUILDERS`` has them by name, each a function of the ``Task`` that it is trained on. A builder takes a
loss of the library, plain networks of about the same size for all, a learning rate and a batch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusion_gan import leaky, make_chain, make_losses, make_networks

from dgm_jax import (
    adversarial,
    datasets,
    diffusion_gan,
    discrete_flows,
    flow_matching,
    flows,
    metrics,
    networks,
    parameterizations,
    samplers,
    schedules,
    score_matching,
    solvers,
    training,
    vae,
)
from dgm_jax.types import Array, StructuredField, VectorField


class Task(NamedTuple):
    """Data to learn, in units in which they have mean 0 and variance 1."""

    name: str
    dims: int
    features: tuple[int, ...]  # hidden layers of every network
    batch: Callable[[Array, int], Array]  # (key, num) -> training examples [num, dims]
    test: Callable[[Array, int], Array]  # (key, num) -> examples held out [num, dims]
    original: Callable[[Array], Array]  # [num, dims] -> the same in the units that the data came in
    nll: Callable[[Array], tuple[Array, Array]]  # log p [num] -> mean NLL and its standard error, in the task's unit
    best_nll: Callable[[Array], Array] | None  # log p of one example [dims], where the density of the data is known


class Sampler(NamedTuple):
    """One way to draw."""

    draw: Callable[[Any, Array, Array], tuple[Array, Array]]  # (params, key, z [latent]) -> x [d], evaluations []
    decode: Callable[[Any, Array], Array] | None  # (params, z) -> x [d], undoes encode as far as it can be undone


class Model(NamedTuple):
    """A kind of model, as functions of one example."""

    init: Callable[[Array], Any]  # key -> state
    step: Callable[[Any, Array, Array], tuple[Any, Array]]  # (state, key, rate in [0, 1]) -> state, loss []
    chunk: int  # steps between two looks at the clock
    params: Callable[[Any], Any]  # of the state, what is used in the end
    latent: int
    samplers: dict[str, Sampler]  # by the name that is added to the model's
    log_prob: Callable[[Any, Array, Array], tuple[Array, Array]] | None = None  # (params, key, x) -> value, error, nats
    bound: bool = False  # whether log_prob is but a bound
    encode: Callable[[Any, Array], Array] | None = None  # (params, x) -> z


# ------------------------------------------------------------------------------------------------------------ data


def gaussians() -> Task:
    """Twenty-five gaussians, of which there is no end of examples; NLL in nats in the units of the grid."""
    std = math.sqrt(8 + 0.05**2)

    def draw(key: Array, num: int) -> Array:
        return datasets.gaussian_grid(key, num) / std

    def nll(log_p: Array) -> tuple[Array, Array]:
        return 2 * math.log(std) - jnp.mean(log_p), jnp.std(log_p, ddof=1) / math.sqrt(len(log_p))

    def log_true(x: Array) -> Array:
        return datasets.log_density("gaussian_grid")(std * x) + 2 * math.log(std)

    return Task("gaussians", 2, (128, 128, 128), draw, draw, lambda x: std * x, nll, log_true)


def digits() -> Task:
    """The 8 x 8 digits, 1,500 to learn from and 297 held out, each pixel anywhere in its bin; NLL in bits per pixel."""
    images = datasets.digits()
    train, test = (part.reshape(len(part), -1) for part in (images.train, images.test))
    mean = (train.mean() + 0.5) / images.levels
    std = math.sqrt(train.var() + 1 / 12) / images.levels
    uniform = metrics.uniform_dequantization(images.levels, -mean / std, (1 - mean) / std)

    def batch(key: Array, num: int) -> Array:
        key_row, key_bin = jax.random.split(key)
        return metrics.dequantize(
            key_bin, jnp.asarray(train)[jax.random.randint(key_row, (num,), 0, len(train))], uniform
        )

    def held_out(key: Array, num: int) -> Array:
        return metrics.dequantize(key, jnp.asarray(test)[:num], uniform)

    def nll(log_p: Array) -> tuple[Array, Array]:
        return metrics.bits_per_dim(log_p, 64, uniform)

    def integers(x: Array) -> Array:
        return metrics.quantize(x, uniform).astype(x.dtype)

    return Task("digits", 64, (256, 256), batch, held_out, integers, nll, None)


TASKS: dict[str, Callable[[], Task]] = {"gaussians": gaussians, "digits": digits}


# -------------------------------------------------------------------------------------------------- parts of models


def dtype() -> Any:
    """JAX's default float."""
    return jnp.zeros(()).dtype


DECAY = 0.1  # of weights, times the rate, on digits: 1,500 examples are learnt by heart in the seconds that there are


def adam(rate: float, *, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0) -> Any:
    """Adam on clipped gradients, whose rate is part of its state, for ``at_rate`` to set."""

    def make(learning_rate: Any) -> Any:
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay)
        )

    return optax.inject_hyperparams(make)(learning_rate=rate)


def muon(rate: float) -> Any:
    """Muon (Jordan et al., 2024) on clipped gradients: the momentum of a kernel made orthogonal; NAdam for biases.
    Of kernels that are stacked, each is a matrix."""

    def matrices(params: Any) -> Any:
        def each(path: Any, weight: Array) -> Any:
            kernel = getattr(path[-1], "key", None) == "kernel"
            return optax.contrib.MuonDimensionNumbers((weight.ndim - 2,), (weight.ndim - 1,)) if kernel else None

        return jax.tree_util.tree_map_with_path(each, params)

    def make(learning_rate: Any) -> Any:
        orthogonal = optax.contrib.muon(learning_rate, adam_b2=0.99, muon_weight_dimension_numbers=matrices)
        return optax.chain(optax.clip_by_global_norm(1.0), orthogonal)

    return optax.inject_hyperparams(make)(learning_rate=rate)


def at_rate(state: training.TrainState, rate: Array) -> training.TrainState:
    """The state with that learning rate from now on."""
    found = state.opt_state.hyperparams["learning_rate"]
    return state._replace(opt_state=state.opt_state._replace(hyperparams={"learning_rate": rate.astype(found.dtype)}))


def regression(
    task: Task,
    init: Callable[[Array], Any],
    loss: Callable[[Any, Array, Array], Array],
    rate: float,
    batch_size: int,
    *,
    decay: float = 0.999,
    noise: float = 0.0,
    make_optimizer: Callable[..., Any] = adam,
    **options: Any,
) -> dict[str, Any]:
    """What a ``Model`` with one loss needs to learn: ``loss(params, key, x [num, d])``. ``noise`` is the standard
    deviation of what is added to x at the full rate; it falls to zero with the rate."""
    optimizer = make_optimizer(rate, **options)
    update = training.step(loss, optimizer, ema_decay=decay)

    def step(state: training.TrainState, key: Array, share: Array) -> tuple[training.TrainState, Array]:
        key_batch, key_noise, key_step = jax.random.split(key, 3)
        x = task.batch(key_batch, batch_size)
        if noise:
            x = x + noise * share * jax.random.normal(key_noise, x.shape)
        state, report = update(at_rate(state, rate * share), key_step, x)
        return state, report["loss"]

    return {"init": lambda key: training.init(init(key), optimizer), "step": step, "params": lambda state: state.ema}


def waves(x: Array, num: int = 6) -> Array:
    """x of the plane with sines and cosines of it, of ``num`` frequencies 1, 2, 4, ...; any other x as it is."""
    if x.shape != (2,):
        return x
    angles = jnp.concatenate([2.0**k * x for k in range(num)])
    return jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)])


def plain(
    features: tuple[int, ...], inputs: int, outputs: int, see: Callable[[Array], Array] = waves, **options: Any
) -> tuple[Callable, Callable]:
    """A network of what it sees of x, without a time, as (key -> params, (x [inputs], params) -> [outputs])."""
    net = networks.MLP(features, out_features=outputs, param_dtype=dtype(), **{"activation": jax.nn.silu} | options)
    never = jnp.zeros(())
    return lambda key: net.init(key, never, see(jnp.zeros(inputs))), lambda x, params: net.apply(params, never, see(x))


def preconditioned(
    features: tuple[int, ...], dims: int, coefficients: Callable[[Array], tuple[Array, Array, Array, Array]]
) -> tuple[Callable[[Array], Any], VectorField]:
    """A network as (key -> params, field): a(t) x + b(t) F(clock(t), waves(c(t) x)); without waves it is a
    ``StructuredField``, which knows its divergence."""
    net = networks.MLP(
        features, jax.nn.silu, time_features=16, max_frequency=20.0, out_features=dims, param_dtype=dtype()
    )
    start = partial(net.init, t=jnp.zeros(()), x=waves(jnp.zeros(dims)))

    def field(t: Array, x: Array, params: Any) -> Array:
        a, b, c, clock = coefficients(t)
        return a * x + b * net.apply(params, clock, waves(c * x))

    if dims == 2:
        return start, field
    network: Any = networks.vector_field(net)

    def with_divergence(t: Array, x: Array, prepared: Any) -> tuple[Array, Array]:
        a, b, c, clock = coefficients(t)
        value, divergence = network.with_divergence(clock, c * x, prepared)
        return a * x + b * value, a * x.size + b * c * divergence

    return start, StructuredField(field, network.prepare, with_divergence)


def shares(key: Array, num: int) -> Array:
    """Numbers in [0, 1], one in each of equal shares [num]."""
    return jnp.linspace(0.0, 1.0, num, endpoint=False) + jax.random.uniform(key, (num,)) / num


def fixed(num: int, draw: Callable[[Any, Array, Array], Array]) -> Callable[[Any, Array, Array], tuple[Array, Array]]:
    """``draw`` with the number of its evaluations beside it."""
    return lambda params, key, z: (draw(params, key, z), jnp.asarray(num))


# ------------------------------------------------------------------------------------------------------ adversarial

Loss = Callable[[Any, Array, Any, Array], Array]


def two_players(
    task: Task,
    starts: tuple[Callable[[Array], Any], Callable[[Array], Any]],
    losses: tuple[Loss, Loss],
    rate: float,
    batch_size: int,
    *,
    critic_steps: int = 1,
) -> dict[str, Any]:
    """What a ``Model`` of generator and discriminator needs to learn, each of whose losses, of generator and of
    discriminator, is ``loss(own params, key, the other's params, x [num, d])``."""
    optimizer = adam(rate, b1=0.5, b2=0.9)

    def update_of(loss: Loss, decay: float) -> Callable[..., Any]:
        return training.step(lambda own, key, batch: loss(own, key, *batch), optimizer, ema_decay=decay)

    update_g, update_d = update_of(losses[0], 0.999), update_of(losses[1], 0.0)

    def step(state: Any, key: Array, share: Array) -> tuple[Any, Array]:
        state_g, state_d = (at_rate(one, rate * share) for one in state)
        key_x, key_g, *keys = jax.random.split(key, critic_steps + 2)
        for one in keys:
            key_batch, key_d = jax.random.split(one)
            state_d, report = update_d(state_d, key_d, (state_g.params, task.batch(key_batch, batch_size)))
        state_g, _ = update_g(state_g, key_g, (state_d.params, task.batch(key_x, batch_size)))
        return (state_g, state_d), report["loss"]

    def init(key: Array) -> Any:
        both = zip(starts, jax.random.split(key), strict=True)
        return tuple(training.init(start(one), optimizer) for start, one in both)

    return {"init": init, "step": step, "params": lambda state: state[0].ema}


def adversaries(
    task: Task,
    loss_d: Callable[..., Array],
    loss_g: Callable[[Array], Array],
    rate: float,
    critic_steps: int,
    *,
    batch_size: int,
) -> Model:
    """A generator against a discriminator, by ``loss_d(D, params, key, x, y)`` and ``loss_g(D(y))`` of one example."""
    latent = 4 if task.dims == 2 else 32
    options: dict[str, Any] = {"last_init": jax.nn.initializers.lecun_normal(), "activation": leaky}
    start_g, generator = plain(task.features, latent, task.dims, **options)
    start_d, logits = plain(task.features, task.dims, 1, **options)

    def discriminator(x: Array, params: Any) -> Array:
        return logits(x, params)[0]

    def samples(params: Any, key: Array) -> Array:
        return jax.vmap(generator, (0, None))(jax.random.normal(key, (batch_size, latent)), params)

    def of_discriminator(params: Any, key: Array, params_g: Any, x: Array) -> Array:
        key_z, key_loss = jax.random.split(key)
        each = jax.vmap(partial(loss_d, discriminator, params))
        return jnp.mean(each(jax.random.split(key_loss, len(x)), x, samples(params_g, key_z)))

    def of_generator(params: Any, key: Array, params_d: Any, x: Array) -> Array:
        return jnp.mean(jax.vmap(lambda y: loss_g(discriminator(y, params_d)))(samples(params, key)))

    learn = two_players(
        task, (start_g, start_d), (of_generator, of_discriminator), rate, batch_size, critic_steps=critic_steps
    )
    draw = fixed(1, lambda params, key, z: generator(z, params))
    return Model(**learn, chunk=50, latent=latent, samplers={"": Sampler(draw, None)})


def gan(task: Task) -> Model:
    """Goodfellow et al. (2014), non-saturating, with the penalty of Mescheder et al. (2018) on the data."""
    gamma = 0.1

    def loss_d(discriminator: Callable, params: Any, key: Array, x: Array, y: Array) -> Array:
        loss = adversarial.discriminator_loss(discriminator(x, params), discriminator(y, params))
        return loss + gamma / 2 * adversarial.r1_penalty(discriminator, x, params)

    return adversaries(task, loss_d, adversarial.generator_loss, 1e-3, 1, batch_size=256 if task.dims == 2 else 128)


def wgan_gp(task: Task) -> Model:
    """Gulrajani et al. (2017): a Wasserstein critic, three steps of it to one of the generator."""

    weight = 0.1 if task.dims == 2 else 10.0  # the authors' own, in the plane and for pictures

    def loss_d(critic: Callable, params: Any, key: Array, x: Array, y: Array) -> Array:
        penalty = adversarial.gradient_penalty(critic, x, y, jax.random.uniform(key), params)
        return adversarial.critic_loss(critic(x, params), critic(y, params)) + weight * penalty

    return adversaries(task, loss_d, adversarial.critic_generator_loss, 1e-3, 3, batch_size=64)


def denoising_gan(task: Task) -> Model:
    """Xiao, Kreis and Vahdat (2022): large steps of denoising, each a conditional GAN, as in diffusion_gan.py. Four in
    the plane; for pictures two, which learn more in the time that there is."""
    plane = task.dims == 2
    levels: tuple[float, ...] = (0.08, 0.24, 0.7, 20.0) if plane else (2.7, 80.0)
    latent, waves, batch_size, gamma = (8, 10, 64, 0.01) if plane else (32, 0, 128, 0.1)
    chain, num = make_chain(levels), len(levels)
    nets = make_networks(task.features, levels, task.dims, latent=latent, waves=waves, std=1.0, skip=plane)
    starts = (lambda key: nets.init(key)[0]), (lambda key: nets.init(key)[1])
    learn = two_players(task, starts, make_losses(nets, chain, latent=latent, gamma=gamma), 1e-3, batch_size)

    def draw(params: Any, key: Array, z: Array) -> Array:
        return diffusion_gan.sample(key, nets.generator, chain, z, params, latent=latent)

    return Model(**learn, chunk=50, latent=task.dims, samplers={"": Sampler(fixed(num, draw), None)})


# -------------------------------------------------------------------------------------------------- latent variables


def gaussian_vae(task: Task, beta: float = 1.0) -> Model:
    """Kingma and Welling (2014), with a decoder that learns a variance for each entry of pixels.

    In the plane it learns one for all (Rybkin et al., 2021), which begins small: with a large one nothing is lost by an
    encoder that says nothing, and from there learning does not come back.
    """
    plane = task.dims == 2
    latent, draws = (4, 256) if plane else (16, 256)
    start_e, encode = plain(task.features, task.dims, 2 * latent)
    start_d, decode = plain(task.features, latent, task.dims if plane else 2 * task.dims)

    def encoder(x: Array, params: Any) -> tuple[Array, Array]:
        both = encode(x, params[0])
        return both[:latent], both[latent:]

    def decoder(z: Array, params: Any) -> tuple[Array, Array]:
        both = decode(z, params[1])
        if plane:
            return both, params[2]
        return both[: task.dims], -9 + jax.nn.softplus(both[task.dims :] + 9)  # no surer than a variance of e^-9

    def loss(params: Any, key: Array, x: Array) -> Array:
        noise = jax.random.normal(key, (len(x), latent))
        return -jnp.mean(jax.vmap(lambda x, e: vae.elbo(encoder, decoder, x, e, params, beta=beta).value)(x, noise))

    def log_prob(params: Any, key: Array, x: Array) -> tuple[Array, Array]:
        return vae.importance_weighted(encoder, decoder, x, jax.random.normal(key, (draws, latent)), params)

    def draw(params: Any, key: Array, z: Array) -> Array:
        return vae.sample(decoder, z, jax.random.normal(key, (task.dims,)), params)

    def start(key: Array) -> Any:
        key_e, key_d = jax.random.split(key)
        return start_e(key_e), start_d(key_d), jnp.asarray(-6.0 if plane else 0.0)

    return Model(
        **regression(task, start, loss, 2e-3, 512 if plane else 128, weight_decay=0.0 if plane else DECAY),
        chunk=50,
        latent=latent,
        samplers={"": Sampler(fixed(1, draw), lambda params, z: decoder(z, params)[0])},
        log_prob=log_prob,
        bound=True,
        encode=lambda params, x: encoder(x, params)[0],
    )


# ------------------------------------------------------------------------------------------------------------- flows


def realnvp(task: Task) -> Model:
    """Dinh et al. (2017): pairs of affine couplings. In the plane they learn from examples with noise, three times as
    wide as a mode at first and none in the end: without it training comes apart when modes grow narrow. For pixels
    there are two pairs of masks in turn, and weights decay by a share of 0.006 in each step, less as the rate falls:
    with a thirtieth of that 1,500 digits are learnt by heart."""
    df, d = discrete_flows, task.dims
    features, repeats = ((64, 64), 6) if d == 2 else ((128, 128), 2)
    start, network = plain(features, d, 2 * d, see=partial(waves, num=5))
    entry = np.arange(d)
    masks = [entry % 2 == 0] if d == 2 else [(entry // 8 + entry) % 2 == 0, entry % 8 < 4]
    masks = [mask for one in masks for mask in (one, ~one)]

    def halves(x: Array, params: Any) -> tuple[Array, Array]:
        both = network(x, params)
        return both[:d], both[d:]

    flow = df.repeat(df.compose([df.affine_coupling(mask, halves) for mask in masks]))

    def init(key: Array) -> Any:
        return [jax.vmap(start)(each) for each in jax.random.split(key, (len(masks), repeats))]

    def loss(params: Any, key: Array, x: Array) -> Array:
        return -jnp.mean(jax.vmap(partial(df.log_prob, flow, params))(x))

    def log_prob(params: Any, key: Array, x: Array) -> tuple[Array, Array]:
        return df.log_prob(flow, params, x), jnp.zeros(())

    if d == 2:
        learn = regression(task, init, loss, 1e-3, 64, noise=0.05, make_optimizer=muon)
    else:
        learn = regression(task, init, loss, 2e-3, 128, weight_decay=3.0)
    decode = partial(df.sample, flow)
    return Model(
        **learn,
        chunk=10,
        latent=d,
        samplers={"": Sampler(fixed(1, lambda params, key, z: decode(params, z)), decode)},
        log_prob=log_prob,
        encode=lambda params, x: flow.inverse(params, x)[0],
    )


def flow_by(
    velocity: VectorField, dims: int, *, t_data: float, t_base: float, tolerance: float, clock: Any = None
) -> dict[str, Any]:
    """What a ``Model`` whose flow is an ODE draws, encodes and knows by it."""

    def within(tolerance: float) -> dict[str, Any]:
        return {"rtol": tolerance, "atol": tolerance, "throw": False}

    def draw(params: Any, key: Array, z: Array) -> tuple[Array, Array]:
        solution = solvers.solve_ode(velocity, z, params, t0=t_base, t1=t_data, **within(tolerance))
        return solution.x, solution.nfe

    def log_prob(params: Any, key: Array, x: Array) -> tuple[Array, Array]:
        where: dict[str, Any] = {"t_data": t_data, "t_base": t_base, "clock": clock, "max_nodes": 65}
        found = flows.likelihood(velocity, x, params, **where, **within(1e-4))
        return found.log_prob, found.error

    def encode(params: Any, x: Array) -> Array:
        return solvers.odeint(velocity, x, params, t0=t_data, t1=t_base, **within(1e-5))

    sampler = Sampler(draw, lambda params, z: draw(params, None, z)[0])
    return {"latent": dims, "samplers": {"": sampler}, "log_prob": log_prob, "encode": encode}


def cnf(task: Task) -> Model:
    """Chen et al. (2018) and Grathwohl et al. (2019): an ODE trained by its exact likelihood, with tolerances that are
    small beside the width of a mode in the plane, 0.02."""
    plane = task.dims == 2
    tolerance = 1e-4 if plane else 1e-3
    net = networks.MLP((64, 64) if plane else (128, 128), jnp.tanh, out_features=task.dims, param_dtype=dtype())
    see = partial(waves, num=3)

    def of_waves(t: Array, x: Array, params: Any) -> Array:
        return net.apply(params, t, see(x))

    velocity = of_waves if plane else networks.vector_field(net)
    options: dict[str, Any] = {"t_data": 1.0, "t_base": 0.0, "rtol": tolerance, "atol": tolerance, "throw": False}

    def loss(params: Any, key: Array, x: Array) -> Array:
        return -jnp.mean(flows.log_prob_batch(velocity, x, params, adjoint=diffrax.BacksolveAdjoint(), **options))

    start = partial(net.init, t=jnp.zeros(()), x=see(jnp.zeros(task.dims)))
    return Model(
        **regression(task, start, loss, 1e-2 if plane else 2e-2, 64 if plane else 128, decay=0.99, make_optimizer=muon),
        chunk=2,
        **flow_by(velocity, task.dims, t_data=1.0, t_base=0.0, tolerance=1e-4 if plane else 3e-3),
    )


def flow_matched(task: Task) -> Model:
    """Lipman et al. (2023): an ODE trained by regression on straight paths from the data, t = 0, to noise, t = 1."""

    mean = -2.5 if task.dims == 2 else -0.5  # of log(t / (1 - t)) in training

    def clock(t: Array) -> Array:
        return jnp.log((t + 1e-3) / (1 - t + 1e-3))

    def coefficients(t: Array) -> tuple[Array, Array, Array, Array]:
        n = (1 - t) ** 2 + t**2
        return (2 * t - 1) / n, 1 / jnp.sqrt(n), 1 / jnp.sqrt(n), clock(t) / 4

    start, velocity = preconditioned(task.features, task.dims, coefficients)

    def loss(params: Any, key: Array, x: Array) -> Array:
        key_time, key_noise = jax.random.split(key)
        u = jax.scipy.special.ndtri(shares(key_time, len(x)))
        t = jax.nn.sigmoid(1.5 * u + mean)
        each = jax.vmap(lambda t, x0, x1: flow_matching.loss(velocity, t, x0, x1, params))
        return jnp.mean(each(t, x, jax.random.normal(key_noise, x.shape)))

    plane = task.dims == 2
    return Model(
        **regression(task, start, loss, 2e-3, 512 if plane else 128, weight_decay=0.0 if plane else DECAY),
        chunk=50,
        **flow_by(velocity, task.dims, t_data=0.0, t_base=1.0, tolerance=3e-3, clock=clock),
    )


# --------------------------------------------------------------------------------------------------------- diffusion

SCHEDULE = schedules.vp()


def time_of(log_noise: Array) -> Array:
    """The time at which log(sigma / alpha) has this value, from a table."""
    t = jnp.geomspace(1e-6, 1.0, 4096)
    return jnp.interp(log_noise, -0.5 * jax.vmap(partial(schedules.log_snr, SCHEDULE))(t), t)


def diffusion(task: Task) -> Model:
    """Song et al. (2021) on the variance-preserving path, weighted and scaled as in Karras et al. (2022)."""
    least = 0.003 if task.dims == 2 else 0.02  # sigma / alpha where sampling ends: a tenth of what the data resolve
    mean, width = (-2.5, 1.5) if task.dims == 2 else (-1.0, 1.4)  # of log(sigma / alpha) in training

    def coefficients(t: Array) -> tuple[Array, Array, Array, Array]:
        alpha, sigma = schedules.alpha(SCHEDULE, t), schedules.sigma(SCHEDULE, t)
        return -jnp.ones_like(t), alpha / sigma, jnp.ones_like(t), jnp.log(sigma / alpha) / 4

    start, score = preconditioned(task.features, task.dims, coefficients)

    def weight(t: Array) -> Array:
        return schedules.sigma(SCHEDULE, t) ** 2 / schedules.alpha(SCHEDULE, t) ** 2  # the loss of F alone

    ends = jnp.stack([jnp.log(jnp.asarray(least)), -0.5 * schedules.log_snr(SCHEDULE, jnp.ones(()))])

    def loss(params: Any, key: Array, x: Array) -> Array:
        key_time, key_noise = jax.random.split(key)
        low, high = jax.scipy.special.ndtr((ends - mean) / width)
        level = mean + width * jax.scipy.special.ndtri(low + (high - low) * shares(key_time, len(x)))
        each = jax.vmap(lambda t, x, e: score_matching.denoising(score, SCHEDULE, t, x, e, params, weight=weight))
        return jnp.mean(each(time_of(level), x, jax.random.normal(key_noise, x.shape)))

    t_start = float(time_of(jnp.log(jnp.asarray(least))))
    velocity = parameterizations.convert(score, SCHEDULE, source="score", target="velocity")
    clock = partial(schedules.log_snr, SCHEDULE)
    few = samplers.karras(SCHEDULE, STEPS, t_end=t_start, denoise=True, dtype=dtype())
    many = samplers.log_snr(SCHEDULE, ANCESTRAL_STEPS, t_end=t_start, denoise=True, dtype=dtype())

    def decode(params: Any, z: Array) -> Array:
        return samplers.dpm_solver_2m(score, SCHEDULE, z, few, params, prediction="score")

    def ancestral(params: Any, key: Array, z: Array) -> Array:
        return samplers.ddim(key, score, SCHEDULE, z, many, params, prediction="score", eta=1.0)

    by_flow = flow_by(velocity, task.dims, t_data=t_start, t_base=1.0, tolerance=3e-3, clock=clock)
    by_flow["samplers"] = {
        "DPM-Solver++ 2M": Sampler(fixed(STEPS, lambda params, key, z: decode(params, z)), decode),
        "ancestral": Sampler(fixed(ANCESTRAL_STEPS, ancestral), None),
    }
    plane = task.dims == 2
    learn = regression(task, start, loss, 2e-3, 512 if plane else 128, weight_decay=0.0 if plane else DECAY)
    return Model(**learn, chunk=50, **by_flow)


STEPS, ANCESTRAL_STEPS = 25, 100


BUILDERS: dict[str, Callable[..., Model]] = {
    "gan": gan,
    "wgan_gp": wgan_gp,
    "vae": gaussian_vae,
    "realnvp": realnvp,
    "cnf": cnf,
    "flow_matching": flow_matched,
    "diffusion": diffusion,
    "diffusion_gan": denoising_gan,
}
TITLES = {
    "data": "the data themselves",
    "gan": "GAN, R1",
    "wgan_gp": "WGAN-GP",
    "vae": "VAE",
    "realnvp": "RealNVP",
    "cnf": "CNF, likelihood",
    "flow_matching": "CNF, flow matching",
    "diffusion": "diffusion",
    "diffusion_gan": "denoising diffusion GAN",
}
