"""NCSN: does annealing find the right proportions of modes that lie far apart, and does it draw digits?

    python experiments/ncsn.py

answers the first on a mixture in the plane, 0.2 and 0.8 of it in two long Gaussians eight apart, with its exact score
and with one learned by the NCSN objective, by plain and by annealed Langevin dynamics from the same noise and with as
many evaluations. The same module then learns 1,500 of scikit-learn's digits (8 x 8) and samples them. It writes to
runs/ncsn/ pictures of both and metrics.json: every share with its standard error, what a classifier takes the digits
for.
Expected: the smaller mode's share, truly 0.2, is 0.506 +- 0.008 by plain and 0.193 +- 0.006 by annealed Langevin with
the exact score, 0.475 +- 0.008 and 0.194 +- 0.006 with the learned one. Of the digits a classifier (95 per cent
accurate) is 90 per cent sure for a share of 0.73 +- 0.03, of real test digits for 0.82 +- 0.02. 130 seconds of
processor time.

--data mixture or --data digits does one of the two. A run that was stopped goes on with --resume.

The score is that of x = data + sigma eps; its network is the same for both, a residual MLP that sees log sigma.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import datasets, densities, langevin, metrics, ncsn, networks, plots, runs, schedules, training
from dgm_jax.types import Array, VectorField

# what may change on resuming
MEASURING = ("data", "num_samples", "steps_per_level", "mixture_samples", "mixture_steps_per_level", "mixture_step")

# the mixture: modes 2 HALF apart along (cos, sin)(ANGLE), WIDTHS along and across that, SHARE of it in one
SHARE, HALF, WIDTHS, ANGLE = 0.2, 4.0, (0.5, 1.2), 0.9
AXES = np.array([[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]])


@dataclass(frozen=True)
class Config:
    """What to train, how long, and how to sample."""

    out: str = "runs/ncsn"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoints."""
    seed: int = 0
    """Of all random numbers."""
    data: Literal["both", "mixture", "digits"] = "both"
    """What to do."""
    mixture_features: tuple[int, ...] = (128, 128, 128)
    """Widths of the MLP's hidden layers for the mixture."""
    mixture_num_steps: int = 4000
    """Training steps on the mixture."""
    mixture_sigmas: tuple[float, float] = (8.0, 0.3)
    """Largest and smallest level for the mixture."""
    mixture_levels: int = 20
    """Levels for the mixture."""
    mixture_steps_per_level: int = 100
    """Langevin steps at each of them; plain Langevin takes as many in all."""
    mixture_step: float = 0.25
    """Their size, at the last level, in units of its sigma^2; plain Langevin takes it too."""
    mixture_samples: int = 4000
    """Samples of each kind."""
    features: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of the MLP's hidden layers for the digits."""
    num_steps: int = 4500
    """Training steps on the digits."""
    sigmas: tuple[float, float] = (6.0, 0.05)
    """Largest and smallest level for the digits, whose pixels run from -1 to 1."""
    num_levels: int = 24
    """Levels for the digits."""
    steps_per_level: int = 40
    """Langevin steps at each of them, of the size that ncsn.step_size chooses."""
    num_samples: int = 256
    """Samples of digits."""
    batch_size: int = 128
    """Examples in a step, over all devices; the mixture takes four times as many."""
    learning_rate: float = 1e-3
    """Largest learning rate of Adam, after a twentieth of the steps; it falls along a cosine."""
    weight_decay: float = 0.35
    """Of AdamW, for the digits: without it they are learned by heart."""
    ema_decay: float = 0.999
    """Of the average of the parameters over the steps, which is what is used in the end."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""


def make_network(features: tuple[int, ...], key: Array, event: tuple[int, ...]) -> tuple[VectorField, Any]:
    """The network as a field on the event shape, and its initial parameters."""
    mlp = networks.MLP(features, jax.nn.silu, time_features=64, residual=True, param_dtype=jnp.zeros(()).dtype)
    flat = networks.vector_field(mlp)
    params = mlp.init(key, jnp.zeros(()), jnp.zeros(math.prod(event)))
    return lambda t, x, params: flat(t, x.reshape(-1), params).reshape(x.shape), params


def make_score(network: VectorField, std: float) -> VectorField:
    """The score of a Gaussian as wide as the data, and what the network adds to it.

    s(sigma, x) = -x / n + std / (sigma sqrt n) F(log(sigma / std) / 4, x / sqrt n),    n = std^2 + sigma^2: the inputs
    of F and its targets have variance one at every sigma. Source: Karras et al. (2022), equation 7.
    """

    def score(sigma: Array, x: Array, params: Any) -> Array:
        n = std**2 + sigma**2
        f = network(jnp.log(sigma / std) / 4, x / jnp.sqrt(n), params)
        return -x / n + std / (sigma * jnp.sqrt(n)) * f

    return score


def make_loss(score: VectorField, sigmas: Array, prepare: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    """The NCSN objective per dimension: every level alike, each example at one of them."""

    def loss(params: Any, key: Array, batch: Array) -> Array:
        key_data, key_level, key_first, key_noise = jax.random.split(key, 4)
        x0 = prepare(key_data, batch)
        first = jax.random.randint(key_first, (), 0, len(sigmas))  # as many of each as can be, one more of any
        level = jax.random.permutation(key_level, (first + jnp.arange(len(x0))) % len(sigmas))
        noise = jax.random.normal(key_noise, x0.shape)
        each = jax.vmap(lambda level, x, e: ncsn.loss(score, sigmas, level, x, e, params))
        return jnp.mean(each(level, x0, noise)) / x0[0].size

    return loss


def fit(
    config: Config,
    name: str,
    loss: Callable[..., Array],
    params: Any,
    batch: Callable[[int], Array],
    num: int,
    decay: float,
    key: Array,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Trains in the folder of that name within the run's: averaged parameters, and the history."""
    run = runs.open_run(dataclasses.replace(config, out=str(Path(config.out) / name)), may_differ=MEASURING)
    optimizer = training.adam(config.learning_rate, num, warmup=num // 20, weight_decay=decay)
    update = jax.jit(training.step(loss, optimizer, ema_decay=config.ema_decay), donate_argnums=0)
    state, key = training.replicate(training.mesh(), (training.init(params, optimizer), key))
    every = config.checkpoint_every
    state, history = runs.train(update, state, batch, key, num_steps=num, run=run, checkpoint_every=every, label=name)
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state.ema), history


def over_chains(one: Callable[..., Any], at_a_time: int) -> Callable[..., Any]:
    """``one(params, key, x)`` for every key and x, compiled, so many at a time."""
    return jax.jit(lambda params, *rows: jax.lax.map(lambda row: one(params, *row), rows, batch_size=at_a_time))


# -------------------------------------------------------------------------------------------------------- the mixture


def mixture() -> densities.Mixture:
    """0.2 N(-4 u, C) + 0.8 N(4 u, C), u along ``ANGLE``, C long across it."""
    covariance = AXES @ np.diag(np.square(WIDTHS)) @ AXES.T
    means = HALF * np.stack([-AXES[:, 0], AXES[:, 0]])
    return densities.Mixture(*(jnp.asarray(a, float) for a in ([SHARE, 1 - SHARE], means, [covariance, covariance])))


def study_mixture(config: Config, key: Array) -> dict[str, Any]:
    """Shares of the smaller mode by plain and annealed Langevin dynamics, with the exact score and a learned one."""
    key_net, key_train, key_batch, key_start, key_chain, key_data = jax.random.split(key, 6)
    density, sigmas = mixture(), ncsn.levels(*config.mixture_sigmas, config.mixture_levels)
    std = float(jnp.sqrt(jnp.trace(densities.covariance(density)) / 2))
    network, params = make_network(config.mixture_features, key_net, (2,))
    score = make_score(network, std)
    mesh, size = training.mesh(), 4 * config.batch_size
    mine = training.local_rows(mesh, size)
    points = jax.jit(lambda n: densities.sample(jax.random.fold_in(key_batch, n), density, size))

    def batch(n: int) -> Array:
        return training.shard(mesh, np.asarray(points(n))[mine])

    loss = make_loss(score, sigmas, lambda key, x: x)
    params, history = fit(config, "mixture", loss, params, batch, config.mixture_num_steps, 0.0, key_train)

    largest, total = config.mixture_sigmas[0], config.mixture_levels * config.mixture_steps_per_level
    field = densities.score(density, schedules.edm(largest))
    step_size = config.mixture_step * config.mixture_sigmas[1] ** 2
    x0 = largest * jax.random.normal(key_start, (config.mixture_samples, 2))
    keys = jax.random.split(key_chain, config.mixture_samples)
    samples = {}
    for kind, s in (("exact", lambda sigma, x, args: field(sigma / largest, x, args)), ("learned", score)):

        def annealed(params: Any, key: Array, x: Array, s: VectorField = s) -> Array:
            options = {"step_size": step_size, "num_steps": config.mixture_steps_per_level}
            return langevin.annealed(key, s, sigmas, x, params, **options)

        def plain(params: Any, key: Array, x: Array, s: VectorField = s) -> Array:
            return langevin.unadjusted(key, s, x, params, step_size=step_size, num_steps=total, t=sigmas[-1])

        runs.say(f"mixture: sampling with the {kind} score, {total} evaluations for each of {len(x0)} samples")
        samples[f"plain_{kind}"] = np.asarray(over_chains(plain, 1000)(params, keys, x0))
        samples[f"annealed_{kind}"] = np.asarray(over_chains(annealed, 1000)(params, keys, x0))
    results: dict[str, Any] = {"share_true": SHARE, "mixture_final_loss": float(np.mean(history["loss"][-200:]))}
    for name, x in samples.items():
        share = float(np.mean(x @ AXES[:, 0] < 0))
        results[f"share_{name}"] = share
        results[f"share_{name}_stderr"] = math.sqrt(max(share * (1 - share), 1 / len(x)) / len(x))
        runs.say(f"mixture, {name}: share {share:.3f} +- {results[f'share_{name}_stderr']:.3f}, truly {SHARE}")
    data = np.asarray(densities.sample(key_data, density, config.mixture_samples))
    draw_mixture(Path(config.out) / "mixture.png", {"data": data, **samples}, results)
    plots.curve(Path(config.out) / "loss_mixture.png", history, label="denoising loss per dimension")
    return results | {"mixture_evaluations": total, "mixture_step_size": step_size}


def draw_mixture(path: Path, samples: dict[str, np.ndarray], results: dict[str, Any]) -> None:
    """Points of the data and of each kind of chain, with the share of the smaller mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.4), layout="constrained")
    for panel, (name, x) in zip(figure.subplots(1, len(samples)), samples.items(), strict=True):
        left = x @ AXES[:, 0] < 0
        for part, color in ((x[left], "#c2571a"), (x[~left], "#1f5fa8")):
            panel.scatter(part[:, 0], part[:, 1], s=1.5, color=color, alpha=0.5, linewidths=0, rasterized=True)
        share = results.get(f"share_{name}", SHARE)
        error = f" ± {results[f'share_{name}_stderr']:.3f}" if name != "data" else ""
        title = "data" if name == "data" else name.replace("_", ", ") + " score"
        panel.set(xlim=(-7, 7), ylim=(-7, 7), aspect="equal", title=f"{title}\nsmaller mode: {share:.3f}{error}")
        panel.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


# --------------------------------------------------------------------------------------------------------- the digits


def study_digits(config: Config, key: Array) -> dict[str, Any]:
    """Digits by annealed Langevin dynamics, and what a classifier makes of them."""
    key_net, key_train, key_batch, key_start, key_chain, key_data = jax.random.split(key, 6)
    images, sigmas = datasets.digits(), ncsn.levels(*config.sigmas, config.num_levels)
    uniform = metrics.uniform_dequantization(images.levels, -1.0, 1.0)
    train = np.asarray(metrics.dequantize(key_data, images.train, uniform))
    network, params = make_network(config.features, key_net, train.shape[1:])
    score = make_score(network, float(np.std(train)))
    mesh = training.mesh()
    mine = training.local_rows(mesh, config.batch_size)
    rows = jax.jit(training.batch_indices, static_argnums=(2, 3))

    def batch(n: int) -> Array:
        return training.shard(mesh, images.train[rows(key_batch, n, len(images.train), config.batch_size)][mine])

    loss = make_loss(score, sigmas, lambda key, integers: metrics.dequantize(key, integers, uniform))
    params, history = fit(config, "digits", loss, params, batch, config.num_steps, config.weight_decay, key_train)

    step_size = ncsn.step_size(sigmas, config.steps_per_level)
    shown = config.num_levels * config.steps_per_level // 10

    def annealed(params: Any, key: Array, x: Array, thin: int | None = None) -> Any:
        options = {"step_size": step_size, "num_steps": config.steps_per_level, "thin": thin}
        return langevin.annealed(key, score, sigmas, x, params, **options)

    x0 = config.sigmas[0] * jax.random.normal(key_start, (config.num_samples, *train.shape[1:]))
    keys, began = jax.random.split(key_chain, config.num_samples), time.perf_counter()
    x = np.asarray(over_chains(annealed, 64)(params, keys, x0))
    seconds = time.perf_counter() - began
    runs.say(f"digits: {len(x)} samples in {seconds:.1f} s")

    from sklearn.linear_model import LogisticRegression

    flat = train.reshape(len(train), -1)
    classifier = LogisticRegression(max_iter=2000).fit(flat, images.train_labels)
    test = np.asarray(metrics.dequantize(jax.random.fold_in(key_data, 1), images.test, uniform))
    results: dict[str, Any] = {"digits_final_loss": float(np.mean(history["loss"][-100:])), "seconds_sampling": seconds}
    for name, picture in (("samples", x), ("test", test)):
        picture = picture.reshape(len(picture), -1)
        best = classifier.predict_proba(picture).max(axis=1)
        sure, root = float(np.mean(best > 0.9)), math.sqrt(len(picture))
        results |= {
            f"confidence_{name}": float(best.mean()),
            f"confidence_{name}_stderr": float(best.std(ddof=1) / root),
        }
        results |= {
            f"confident_share_{name}": sure,
            f"confident_share_{name}_stderr": math.sqrt(sure * (1 - sure)) / root,
        }
        results[f"nearest_train_{name}"] = float(
            np.mean([np.sqrt(((flat - one) ** 2).sum(1).min()) for one in picture])
        )
        counts = np.bincount(classifier.predict(picture), minlength=10)
        results[f"classes_{name}"] = (counts / len(picture)).round(4).tolist()
    key_distance = jax.random.fold_in(key_data, 2)
    for name, a in (("samples", x), ("train", train[: len(x)])):
        value, stderr = metrics.sliced_wasserstein(
            key_distance, jnp.asarray(a.reshape(len(a), -1)), jnp.asarray(test.reshape(len(test), -1))
        )
        results |= {f"sliced_wasserstein_{name}": float(value), f"sliced_wasserstein_{name}_stderr": float(stderr)}
    results["classifier_accuracy"] = float(classifier.score(test.reshape(len(test), -1), images.test_labels))

    out, side = Path(config.out), min(10, math.isqrt(len(x)), math.isqrt(len(test)))
    blocks = [np.asarray(metrics.quantize(jnp.asarray(a), uniform))[: side**2] for a in (x, test)]
    grids = [block.reshape(side, side, *block.shape[1:]) for block in blocks]
    top = images.levels - 1
    wall = np.concatenate([grids[0], np.full_like(grids[0][:, :1], top), grids[1]], axis=1)
    title = "annealed Langevin   |   real test images"
    plots.images(out / "digits.png", wall.reshape(-1, *wall.shape[2:]), high=top, columns=2 * side + 1, title=title)
    thin = math.gcd(shown, config.num_levels * config.steps_per_level)
    strip = jax.jit(jax.vmap(lambda key, x: annealed(params, key, x, thin)))
    last, states = strip(keys[:6], x0[:6])
    frames = np.concatenate(
        [
            np.asarray(x0[:6])[:, None],
            np.asarray(states)[:, :: max(1, states.shape[1] // 10)],
            np.asarray(last)[:, None],
        ],
        axis=1,
    )
    frames = frames / np.maximum(1.0, np.abs(frames).max(axis=(2, 3, 4), keepdims=True))
    plots.images(
        out / "annealing.png", frames.reshape(-1, *frames.shape[2:]), low=-1.0, high=1.0, columns=frames.shape[1]
    )
    plots.curve(out / "loss_digits.png", history, label="denoising loss per dimension")
    return results | {"evaluations": config.num_levels * config.steps_per_level + 1, "step_size": step_size}


def main(config: Config) -> dict[str, Any]:
    """Trains, samples, measures, draws; returns what metrics.json holds."""
    for name in ("mixture_num_steps", "num_steps", "mixture_samples", "num_samples", "steps_per_level"):
        if getattr(config, name) < 2:
            raise ValueError(f"{name} must be at least 2, got {getattr(config, name)}.")
    if not 0 < config.mixture_step < 4:
        raise ValueError(f"mixture_step must lie in (0, 4), beyond which Langevin diverges, got {config.mixture_step}.")
    began, spent = time.perf_counter(), time.process_time()
    key_mixture, key_digits = jax.random.split(jax.random.key(config.seed))
    results: dict[str, Any] = {}
    if config.data != "digits":
        results |= study_mixture(config, key_mixture)
    if config.data != "mixture":
        results |= study_digits(config, key_digits)
    results |= {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - spent}
    return runs.write_metrics(config.out, results)


if __name__ == "__main__":
    runs.cli(main, Config)
