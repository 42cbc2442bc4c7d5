"""Denoising diffusion GAN: can a generator that jumps from noise to data in four steps reach every mode?

    python experiments/diffusion_gan.py

trains a generator and a discriminator on 25 narrow Gaussians on a grid, draws 10,000 samples in four evaluations each
and writes to runs/diffusion_gan/ what came of it: samples beside data, the losses, and in metrics.json
  - how many of the 25 modes have samples, and how many samples are within 3 standard deviations of a mode;
  - how evenly they are spread: the reverse KL of the shares of the modes;
  - the same of real data, for what perfect samples would have.
The noise levels of the four steps suit the data: the step next to them has to place a point within its mode, the second
to choose among four modes, and what the others leave is blurred. With those of the paper's path (--noise-levels 0.95
3.4 17 150) the same training gets fewer points into the modes.

Other data: --data digits, 8 x 8, in two evaluations: after 10,000 steps (three minutes) a classifier is sure of 73 per
cent of the samples, of real digits 84; with --noise-levels 2 4.5 11 60, in four, of 68. --noise-levels 60 is a GAN
without diffusion. A run that was stopped goes on with --resume.

Source: Xiao, Kreis & Vahdat (2022), "Tackling the generative learning trilemma with denoising diffusion GANs".
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import coverage, datasets, ddpm, diffusion_gan, metrics, networks, plots, runs, training
from dgm_jax.types import Array, Chain

FASTEST = 60.0  # of the waves, in radians per standard deviation of the data
MEASURING = ("num_samples",)  # may change when a run is resumed


@dataclass(frozen=True)
class Config:
    """What to train on, what to train, and how much to measure."""

    out: str = "runs/diffusion_gan"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoint."""
    seed: int = 0
    """Of all random numbers."""
    data: Literal["gaussian_grid", "digits"] = "gaussian_grid"
    """25 Gaussians of standard deviation 0.05 on a grid of spacing 2, or 8 x 8 digits."""
    noise_levels: tuple[float, ...] | None = None
    """sigma / alpha after each step of the chain, rising; as many as evaluations for a sample. By default 0.12, 0.5, 2
    and 60 in the plane, 2 and 60 for digits."""
    latent: int | None = None
    """Dimensions of z: by default 8 in the plane, 64 for digits."""
    features: tuple[int, ...] | None = None
    """Widths of the hidden layers of both networks: by default 128 three times in the plane, 256 for digits."""
    waves: int | None = None
    """Sines and cosines of each coordinate that both networks see beside it, an even number, by which they can tell
    narrow modes sooner: by default 10 in the plane, 0 for digits."""
    skip: bool | None = None
    """Whether the generator adds to what it is given; by default it does in the plane, not for digits."""
    num_steps: int | None = None
    """Training steps: by default 12,000 in the plane, 10,000 for digits."""
    batch_size: int | None = None
    """Examples in a step, over all devices: by default 256 in the plane, 128 for digits."""
    learning_rate: float = 1e-3
    """First learning rate of Adam, of both; it falls along a cosine."""
    gamma: float | None = None
    """Weight of the R1 penalty: by default 0.05 in the plane, 0.1 for digits."""
    ema_decay: float = 0.999
    """Of the average of the generator over the steps, which is what is used in the end."""
    checkpoint_every: int = 5000
    """Steps between checkpoints."""
    num_samples: int = 10_000
    """Samples that are measured."""


def complete(config: Config) -> Config:
    """The configuration with its defaults for this data; what would fail only after the training is found before it."""
    digits = config.data == "digits"
    defaults = {
        "noise_levels": (2.0, 60.0) if digits else (0.12, 0.5, 2.0, 60.0),
        "latent": 64 if digits else 8,
        "features": (256, 256, 256) if digits else (128, 128, 128),
        "waves": 0 if digits else 10,
        "skip": not digits,
        "num_steps": 10_000 if digits else 12_000,
        "batch_size": 128 if digits else 256,
        "gamma": 0.1 if digits else 0.05,
    }
    config = replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})
    levels = np.asarray([0.0, *config.noise_levels])
    if len(levels) < 2 or not (np.all(np.isfinite(levels)) and np.all(np.diff(levels) > 0)):
        raise ValueError(f"noise_levels must be at least one, positive and rising, got {config.noise_levels}.")
    for name, least in {"latent": 1, "num_steps": 1, "num_samples": 2}.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}.")
    if config.batch_size < len(config.noise_levels):
        raise ValueError(
            f"batch_size must be at least the number of noise_levels, for each step to be trained, got "
            f"{config.batch_size} and {len(config.noise_levels)}."
        )
    if config.waves < 0 or config.waves % 2:
        raise ValueError(f"waves must be even and at least 0, got {config.waves}.")
    if not 0 <= config.gamma < math.inf:
        raise ValueError(f"gamma must be finite and at least 0, got {config.gamma}.")
    return config


class Data(NamedTuple):
    """Training batches, and what to measure with."""

    batch: Callable[[int], Array]  # n -> the global batch of step n, split over the devices
    test: np.ndarray  # [num, dim]


def to_floats(images: np.ndarray) -> np.ndarray:
    """Rows of pixels, 0 .. 16 as -1 .. 1."""
    return (images.reshape(len(images), -1) / 8.0 - 1.0).astype(jnp.zeros(()).dtype)


def load(config: Config, key: Array, mesh: Any) -> Data:
    """Rows of numbers: points as they are, pixels in [-1, 1]."""
    mine = training.local_rows(mesh, config.batch_size)
    if config.data == "gaussian_grid":
        points = jax.jit(lambda n: datasets.gaussian_grid(jax.random.fold_in(key, n), config.batch_size))
        test = datasets.gaussian_grid(jax.random.fold_in(key, config.num_steps), 10_000)
        return Data(lambda n: training.shard(mesh, np.asarray(points(n))[mine]), np.asarray(test))
    images = datasets.digits()
    train, test = to_floats(images.train), to_floats(images.test)
    rows = jax.jit(lambda n: training.batch_indices(key, n, len(train), config.batch_size))
    return Data(lambda n: training.shard(mesh, train[np.asarray(rows(n))[mine]]), test)


class Networks(NamedTuple):
    """Both networks, and what makes their first parameters."""

    generator: diffusion_gan.Generator
    discriminator: diffusion_gan.Discriminator
    init: Callable[[Array], tuple[Any, Any]]  # key -> (generator's, discriminator's)


def make_chain(levels: tuple[float, ...]) -> Chain:
    """The chain after whose steps sigma / alpha has these values: abar = 1 / (1 + level^2)."""
    alpha_bars = 1 / (1 + np.square(levels))
    return ddpm.chain(1 - alpha_bars / np.concatenate([[1.0], alpha_bars[:-1]]))


def leaky(x: Array) -> Array:
    """The activation of both networks, as their authors have it."""
    return jax.nn.leaky_relu(x, 0.2)


def make_networks(
    features: tuple[int, ...], levels: tuple[float, ...], dim: int, *, latent: int, waves: int, std: float, skip: bool
) -> Networks:
    """Two MLPs that see n / T as the time.

    With s the noise level of a step, x = x_n / alpha_n the data plus noise of that size, d the data's deviation, the
    generator makes x0 from nothing, or with ``skip`` it is preconditioned as Karras et al. (2022) do, so that next to
    the data it adds little to what it is given:

        x0 = d F(x / sqrt(d^2 + s^2), waves of x, z),    or
        x0 = d^2 / (d^2 + s^2) x + s d / sqrt(d^2 + s^2) F(x / sqrt(d^2 + s^2), waves of x, z).

    The latter places points well; in many dimensions, F has much noise to take off again. The discriminator sees both
    states so scaled, waves of the former, and by how much they differ, in units of s, with ``skip`` of
    1 / sqrt(1 / s^2 + 1 / d^2).
    """

    dtype = jnp.zeros(()).dtype
    options: dict[str, Any] = {"time_features": 16, "max_frequency": 10.0, "param_dtype": dtype}
    options |= {"activation": leaky, "last_init": jax.nn.initializers.lecun_normal()}
    nets = [networks.MLP(features, out_features=out, **options) for out in (dim, 1)]
    fields = [networks.vector_field(net) for net in nets]
    noise = jnp.asarray(levels, dtype)
    before = jnp.concatenate([jnp.zeros(1, dtype), noise[:-1]])  # the levels of x_(n-1)

    def time_of(n: Array, x: Array) -> Array:
        return n.astype(x.dtype) / len(levels)

    def plain(x: Array, level: Array) -> Array:
        return x * jnp.sqrt(1 + level**2)  # x_n / alpha_n

    def seen(x: Array) -> Array:
        if not waves:
            return x[:0]
        return jax.vmap(lambda value: networks.sinusoidal_features(value / std, waves, FASTEST))(x).reshape(-1)

    def scaled(x: Array, level: Array) -> Array:
        return x / jnp.sqrt(std**2 + level**2)

    def generator(n: Array, x_n: Array, z: Array, params: Any) -> Array:
        s = noise[n]
        x = plain(x_n, s)
        value = fields[0](time_of(n, x), jnp.concatenate([scaled(x, s), seen(x), z]), params)
        if not skip:
            return std * value
        total = std**2 + s**2
        return std**2 / total * x + s * std / jnp.sqrt(total) * value

    def discriminator(n: Array, x_prev: Array, x_n: Array, params: Any) -> Array:
        s, r = noise[n], before[n]
        x, y = plain(x_prev, r), plain(x_n, s)
        apart = (x - y) * (jnp.sqrt(1 / s**2 + 1 / std**2) if skip else 1 / s)
        parts = scaled(x, r), seen(x), scaled(y, s), apart
        return fields[1](time_of(n, x), jnp.concatenate(parts), params)[0]

    def init(key: Array) -> tuple[Any, Any]:
        key_g, key_d = jax.random.split(key)
        never = jnp.zeros(())
        of_g = nets[0].init(key_g, never, jnp.zeros((1 + waves) * dim + latent))
        return of_g, nets[1].init(key_d, never, jnp.zeros((3 + waves) * dim))

    return Networks(generator, discriminator, init)


def make_losses(
    nets: Networks, chain: Chain, *, latent: int, gamma: float
) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """The generator's loss and the discriminator's, ``(own params, key, the other's params, x0 [num, d]) -> []``."""

    def mean(loss: Callable[..., Array], key: Array, x0: Array, args: Any, **options: Any) -> Array:
        def one(key: Array, n: Array, x0: Array) -> Array:
            return loss(key, nets.generator, nets.discriminator, chain, n, x0, args, latent=latent, **options)

        steps = jnp.arange(len(x0), dtype=jnp.int32) % len(chain.betas)  # rows are random: as many of each n
        return jnp.mean(jax.vmap(one)(jax.random.split(key, len(x0)), steps, x0))

    def of_generator(params: Any, key: Array, params_d: Any, x0: Array) -> Array:
        return mean(diffusion_gan.generator_loss, key, x0, (params, params_d))

    def of_discriminator(params: Any, key: Array, params_g: Any, x0: Array) -> Array:
        return mean(diffusion_gan.discriminator_loss, key, x0, (params_g, params), gamma=gamma)

    return of_generator, of_discriminator


def make_step(config: Config, nets: Networks, chain: Chain, key: Array) -> tuple[Any, Callable[..., Any]]:
    """The first state, (generator's, discriminator's), and a step that trains the discriminator, then the generator."""
    losses = make_losses(nets, chain, latent=config.latent, gamma=config.gamma)
    optimizer = training.adam(config.learning_rate, config.num_steps, clip_norm=None, b1=0.5, b2=0.9)
    update_g, update_d = (
        training.step(lambda own, key, batch, loss=loss: loss(own, key, *batch), optimizer, ema_decay=decay)
        for loss, decay in zip(losses, (config.ema_decay, 0.0), strict=True)
    )

    def update(state: Any, key: Array, x0: Array) -> Any:
        of_g, of_d = state
        key_g, key_d = jax.random.split(key)
        of_d, seen_d = update_d(of_d, key_d, (of_g.params, x0))
        of_g, seen_g = update_g(of_g, key_g, (of_d.params, x0))
        seen = {"loss": seen_g["loss"], "discriminator_loss": seen_d["loss"]}
        return (of_g, of_d), seen | {"finite": seen_g["finite"] & seen_d["finite"]}

    return tuple(training.init(params, optimizer) for params in jax.jit(nets.init)(key)), update


def sampler(config: Config, nets: Networks, chain: Chain, dim: int) -> Callable[[Any, Array], Array]:
    """(generator's parameters, keys) -> one sample for each."""

    def draw(params: Any, key: Array) -> Array:
        key_start, key_path = jax.random.split(key)
        x_T = jax.random.normal(key_start, (dim,))
        return diffusion_gan.sample(key_path, nets.generator, chain, x_T, params, latent=config.latent)

    return jax.jit(jax.vmap(draw, (None, 0)))


def judge_points(x: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Modes and quality of samples, and of as many real points beside them."""
    results: dict[str, float] = {}
    for name, points in (("", x), ("_real", test)):
        found = coverage.mode_coverage(jnp.asarray(points, x.dtype), datasets.gaussian_grid_density())
        for what in ("num_modes", "high_quality", "reverse_kl"):
            value, error = getattr(found, what)
            results |= {f"{what}{name}": float(value), f"{what}{name}_stderr": float(error)}
    return results


def judge_digits(x: np.ndarray, test: np.ndarray, key: Array) -> dict[str, float]:
    """What a classifier of real digits makes of samples: is it sure, and does it see every class; distances beside."""
    from sklearn.linear_model import LogisticRegression

    images = datasets.digits()
    train = to_floats(images.train)
    classifier = LogisticRegression(max_iter=2000).fit(train, images.train_labels)
    results = {"classifier_accuracy": float(classifier.score(test, images.test_labels))}
    for name, rows in (("", x), ("_real", test)):
        sure = classifier.predict_proba(rows)
        shares = np.bincount(sure.argmax(axis=1), minlength=10) / len(rows)
        nearest = [np.sqrt(np.square(train - row).sum(axis=1).min()) for row in rows[:1000]]
        results |= {
            f"confident_share{name}": float((sure.max(axis=1) > 0.9).mean()),
            f"rarest_class_share{name}": float(shares.min()),
            f"nearest_train{name}": float(np.mean(nearest)),
        }
    for name, rows in (("", x), ("_train", train)):
        value, error = metrics.sliced_wasserstein(key, jnp.asarray(rows), jnp.asarray(test))
        results |= {f"sliced_wasserstein{name}": float(value), f"sliced_wasserstein{name}_stderr": float(error)}
    return results


def main(config: Config) -> dict[str, Any]:
    """Trains, samples, measures, draws; returns what metrics.json holds."""
    began = time.perf_counter(), time.process_time()
    config = complete(config)
    mesh = training.mesh()
    key_data, key_net, key_train, key_sample, key_judge = jax.random.split(jax.random.key(config.seed), 5)
    data = load(config, key_data, mesh)
    run = runs.open_run(config, may_differ=MEASURING)
    dim = data.test.shape[1]
    levels = config.noise_levels
    chain, std = make_chain(levels), float(np.std(data.test))
    options: dict[str, Any] = {"latent": config.latent, "waves": config.waves, "std": std, "skip": config.skip}
    nets = make_networks(config.features, levels, dim, **options)
    state, update = make_step(config, nets, chain, key_net)
    state, key = training.replicate(mesh, (state, key_train))
    options = {"num_steps": config.num_steps, "run": run, "checkpoint_every": config.checkpoint_every}
    state, history = runs.train(jax.jit(update, donate_argnums=0), state, data.batch, key, **options)
    params = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state[0].ema)
    trained = time.perf_counter()

    draw, keys = sampler(config, nets, chain, dim), jax.random.split(key_sample, config.num_samples)
    jax.block_until_ready(draw(params, keys))  # compiled
    sampled = time.perf_counter()
    x = np.asarray(draw(params, keys))
    sampled = time.perf_counter() - sampled
    picture, title = run.folder / "samples.png", f"{len(levels)} steps of the generator"
    if config.data == "digits":
        results = judge_digits(x, data.test, key_judge)
        shown = np.clip(x[:100].reshape(-1, 8, 8, 1), -1, 1)
        plots.images(picture, shown, low=-1.0, high=1.0, columns=10, title=title)
    else:
        results = judge_points(x, data.test)
        plots.samples(picture, data.test, x, titles=("data", title))
    for name, label in (("loss", "loss of the generator"), ("discriminator_loss", "loss of the discriminator")):
        plots.curve(run.folder / f"{name}.png", history, name, label=label)
    results |= {
        "final_loss": float(np.mean(history["loss"][-100:])),
        "final_discriminator_loss": float(np.mean(history["discriminator_loss"][-100:])),
        "evaluations": len(levels),
        "num_samples": config.num_samples,
        "seconds_training": trained - began[0],
        "seconds_sampling": sampled,
        "seconds_of_processor": time.process_time() - began[1],
    }
    return runs.write_metrics(run, results)


if __name__ == "__main__":
    runs.cli(main, Config)
