"""Regularised flows: how many evaluations of the velocity does a penalty on the paths save, and what does it cost?

    python experiments/regularized_flows.py

trains a continuous normalizing flow on the 8 x 8 digits by maximum likelihood alone, and again with each penalty of
dgm_jax.regularizers, from the same parameters, on the same batches, for as many steps:

    plain             -log p(x)
    rnode_<weight>    + weight times the integrals of |v|^2 and |dv/dx|_F^2 along the path (Finlay et al., 2020)
    taynode_<weight>  + weight times the integral of |d^K x/dt^K|^2 along the path (Kelly et al., 2020)
    steer_<width>     -log p(x) with the data at a random time t_1 ~ U(1 - width, 1 + width) (Ghosh et al., 2020)

and measures each on the same test images: the NLL in nats an image and in bits per dimension, and the evaluations that
an adaptive solver makes for log p(x) and for a sample, all at the tolerance 1e-5, an image a solve. It writes to
runs/regularized_flows/ evaluations.png and metrics.json, with standard errors; those of what a penalty changes are
taken over differences from the plain flow, image by image. "chosen" is the rnode that saves most evaluations of log p
at an NLL at most 0.5 nat above the plain flow's.

The pixels k + u, u uniform on [0, 1) and drawn anew in each step, are standardised one by one; NLLs are of k + u. In
training, divergence and Frobenius norm are taken from the same products at the nodes of a quadrature rule. A run that
was stopped goes on with --resume, also with other weights.

Seen with these steps: plain 112.6 +- 0.8 nats (2.54 bits), 53.2 evaluations for log p(x) and 56.1 for a sample;
rnode_0.3 111.9 +- 0.6 nats, 33.6 and 31.3: 1.58 +- 0.01 times fewer for log p(x), at -0.7 +- 0.4 nat; rnode_0.1 1.39
times, at -5.2 +- 0.4 nat; taynode_0.01 1.26 times, at -1.9 +- 0.3 nat; steer_0.25 none, at +0.7 +- 0.4 nat. The shorter
the training, the less there is to save: after 2,000 steps of 32 images rnode_0.3 1.31 times, at +0.1 nat.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import datasets, flows, networks, probes, quadrature, regularizers, runs, solvers, training
from dgm_jax.types import Array, VectorField

COLORS = {"plain": "black", "rnode": "#0072B2", "taynode": "#D55E00", "steer": "#009E73"}
MEASURING = ("num_test", "test_tolerance", "allowed")  # may change when a run is resumed
WAYS = ("rnode", "taynode", "steer")  # so may these, which the folder of each training names


@dataclass(frozen=True)
class Config:
    """Which penalties, how to train, and how much to measure."""

    out: str = "runs/regularized_flows"
    """Folder of the run, with a folder for each training."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoints."""
    seed: int = 0
    """Of all random numbers."""
    rnode: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Weights of the kinetic energy and of the Jacobian's squared norm, a training each."""
    taynode: tuple[float, ...] = (0.01,)
    """Weights of the squared derivative, a training each."""
    order: int = 2
    """K of that derivative: 2 is the acceleration."""
    steer: tuple[float, ...] = (0.25,)
    """Half-widths of the interval of the random end time, below 1, a training each."""
    width: int = 128
    """Units of each of the two hidden layers of the velocity."""
    nodes: int = 8
    """Gauss-Legendre nodes of the integrals along a path, in training."""
    rows: int = 4
    """Hadamard rows at each node, in training."""
    tolerance: float = 1e-3
    """Relative and absolute, of the training solves."""
    num_steps: int = 7000
    """Training steps of each."""
    batch_size: int = 16
    """Images in a step, over all devices."""
    learning_rate: float = 5e-3
    """The largest of Adam; it falls to 0 along a cosine."""
    ema_decay: float = 0.99
    """Of the average of the parameters over the steps, which is what is measured."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    test_tolerance: float = 1e-5
    """Relative and absolute, of the solves after training."""
    num_test: int = 297
    """Test images, at most, and samples drawn."""
    allowed: float = 0.5
    """Nats by which the NLL of the chosen flow may exceed the plain one's."""


class Penalty(NamedTuple):
    """What a training adds to -log p: numbers that its steps are handed, so that they compile once."""

    rnode: float = 0.0
    taynode: float = 0.0
    steer: float = 0.0


class Data(NamedTuple):
    """Standardised pixels."""

    train: np.ndarray  # [num, 64], of k + 1/2
    test: np.ndarray  # [num, 64], of k + u
    std: np.ndarray  # of k + u in training [64]


def check(config: Config) -> None:
    """What would fail only after a training is found before it."""
    for name in WAYS:
        values = getattr(config, name)
        if not all(0 < value < (1 if name == "steer" else np.inf) for value in values) or len(set(values)) < len(
            values
        ):
            kind = "half-widths between 0 and 1" if name == "steer" else "positive weights"
            raise ValueError(f"{name} must hold {kind}, each once, got {values}: the plain flow is always trained.")
    if config.num_test < 3:
        raise ValueError(f"num_test must be at least 3, for standard errors, got {config.num_test}.")


def trainings(config: Config) -> dict[str, Penalty]:
    """Every training by its name, the plain one first."""
    named = {"plain": Penalty()}
    return named | {f"{way}_{value:g}": Penalty(**{way: value}) for way in WAYS for value in getattr(config, way)}


def load(config: Config) -> Data:
    """The digits, with one draw of u for the test images."""
    images = datasets.digits()
    train, test = (pixels.reshape(len(pixels), -1).astype(np.float64) for pixels in (images.train, images.test))
    mean, std = train.mean(0) + 0.5, np.sqrt(train.var(0) + 1 / 12)
    u = np.random.default_rng(config.seed).uniform(size=test.shape)
    return Data((train + 0.5 - mean) / std, ((test + u - mean) / std)[: config.num_test], std)


def make_loss(velocity: VectorField, config: Config, with_derivative: bool) -> Callable[..., Any]:
    """Mean over a batch of -log p(x) + penalties, as a function of (params, key, (x [batch, d], penalty))."""
    rule = quadrature.gauss_legendre(config.nodes)
    derivative = regularizers.total_derivative(velocity, config.order)
    options: dict[str, Any] = {"rtol": config.tolerance, "atol": config.tolerance, "throw": False, "rule": rule}

    def speed(t: Array, x: Array, params: Any) -> Array:
        return jnp.sum(jnp.square(derivative(t, x, params)))

    def loss(params: Any, key: Array, batch: tuple[Array, Penalty]) -> Array:
        x, penalty = batch
        key_end, key_probes = jax.random.split(key)
        end = regularizers.random_end(key_end, 0.0, 1.0, penalty.steer, x.dtype)
        divergence = regularizers.penalized(kinetic=penalty.rnode, jacobian=penalty.rnode, t_data=end, t_base=0.0)

        def one(key: Array, x: Array) -> Array:
            e = probes.spread(key, x, config.nodes, config.rows)
            value = -flows.log_prob(
                velocity, x, params, t_data=end, t_base=0.0, divergence=divergence, probes=e, **options
            )
            if with_derivative:
                value += penalty.taynode * regularizers.path_integral(
                    speed, velocity, x, params, t0=end, t1=0.0, **options
                )
            return value

        return jnp.mean(jax.vmap(one)(jax.random.split(key_probes, len(x)), x))

    return loss


def measure(velocity: VectorField, config: Config) -> Callable[[Any, Array, Array], tuple[Array, Array, Array]]:
    """(params, x [num, d], z [num, d]) -> log p(x) and its evaluations, and those of a sample from z, [num] each."""
    options: dict[str, Any] = {"rtol": config.test_tolerance, "atol": config.test_tolerance, "throw": False}

    def one(params: Any, x: Array, z: Array) -> tuple[Array, Array, Array]:
        log_p, nfe = flows.log_prob_batch(velocity, x[None], params, t_data=1.0, t_base=0.0, with_nfe=True, **options)
        return log_p[0], nfe, solvers.solve_ode(velocity, z, params, t0=0.0, t1=1.0, **options).nfe

    return lambda params, x, z: jax.vmap(one, (None, 0, 0))(params, x, z)


def mean_and_stderr(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean of independent values, with its standard error; one of a solve that failed is an error."""
    if not np.isfinite(values).all():
        raise FloatingPointError(f"{name}: {np.sum(~np.isfinite(values))} of {len(values)} solves failed.")
    return {name: float(values.mean()), f"{name}_stderr": float(values.std(ddof=1) / len(values) ** 0.5)}


def ratio_and_stderr(name: str, above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """The ratio of two means over the same images, with its standard error to first order."""
    ratio = above.mean() / below.mean()
    scale = below.mean() * len(below) ** 0.5
    return {name: float(ratio), f"{name}_stderr": float((above - ratio * below).std(ddof=1) / scale)}


def compare(nll: dict[str, np.ndarray], evaluations: dict[str, np.ndarray], allowed: float) -> dict[str, Any]:
    """Each flow beside the plain one, and the rnode that saves most evaluations at an NLL that is allowed, if any."""
    results: dict[str, Any] = {}
    for name in nll:
        results |= mean_and_stderr(f"{name}_excess_nll", nll[name] - nll["plain"])
        results |= ratio_and_stderr(f"{name}_saving", evaluations["plain"], evaluations[name])
    fit = [name for name in nll if name.startswith("rnode") and results[f"{name}_excess_nll"] <= allowed]
    results["chosen"] = max(fit, key=lambda name: results[f"{name}_saving"], default=None)
    for quantity in ("excess_nll", "saving") if fit else ():
        value, stderr = (results[f"{results['chosen']}_{quantity}{part}"] for part in ("", "_stderr"))
        results[f"chosen_{quantity}"] = value
        results[f"chosen_{quantity}_95"] = [value - 1.96 * stderr, value + 1.96 * stderr]
    return results


def draw(path: Path, names: list[str], results: dict[str, Any]) -> None:
    """NLL against evaluations: of log p on the left, of a sample on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, quantity, label in zip(
        panels, ("evaluations", "sampling_evaluations"), ("log p(x)", "a sample"), strict=True
    ):
        for way, color in COLORS.items():
            mine = [name for name in names if name.partition("_")[0] == way]
            if not mine:
                continue
            x, dx, y = ([results[f"{name}_{key}"] for name in mine] for key in (quantity, f"{quantity}_stderr", "nll"))
            dy = [results[f"{name}_excess_nll_stderr"] for name in mine]
            axes.errorbar(x, y, dy, dx, "o-", color=color, linewidth=1, markersize=5, capsize=3, label=way)
            for name, *at in zip(mine, x, y, strict=True):
                axes.annotate(name.partition("_")[2], at, xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.axhline(results["plain_nll"], color="#999999", linestyle=":", linewidth=1)
        axes.set(xlabel=f"evaluations of the velocity for {label}")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.margins(x=0.1)
    panels[0].set_ylabel("test NLL (nats an image)\nbars: standard error of the difference from plain")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(config: Config) -> dict[str, Any]:
    """Trains, measures and draws; returns what metrics.json holds."""
    check(config)
    run, mesh, data = runs.open_run(config, may_differ=(*MEASURING, *WAYS)), training.mesh(), load(config)
    key_params, key_data, key_noise, key_train, key_z = jax.random.split(jax.random.key(config.seed), 5)
    test = jnp.asarray(data.test, float)
    rows, noise = jnp.asarray(data.train, test.dtype), jnp.asarray(1 / data.std, test.dtype)
    z = jax.random.normal(key_z, test.shape, test.dtype)
    mine = training.local_rows(mesh, config.batch_size)

    @jax.jit
    def pick(n: Array) -> Array:
        u = jax.random.uniform(jax.random.fold_in(key_noise, n), (config.batch_size, len(noise)), test.dtype, -0.5, 0.5)
        return rows[training.batch_indices(key_data, n, len(rows), config.batch_size)] + u * noise[None]

    net = networks.MLP((config.width, config.width), param_dtype=test.dtype)
    velocity = networks.vector_field(net)
    optimizer = training.adam(config.learning_rate, config.num_steps, warmup=min(50, config.num_steps - 1))
    updates = {
        with_derivative: jax.jit(
            training.step(make_loss(velocity, config, with_derivative), optimizer, ema_decay=config.ema_decay),
            donate_argnums=0,
        )
        for with_derivative in (False, True)
    }
    measured = jax.jit(measure(velocity, config))
    log_det = float(np.log(data.std).sum())

    results: dict[str, Any] = {}
    nll, evaluations = {}, {}
    for name, penalty in trainings(config).items():
        start = time.perf_counter()
        own = runs.open_run(dataclasses.replace(config, out=str(run.folder / name)), may_differ=(*MEASURING, *WAYS))
        weights = training.replicate(mesh, jax.tree.map(lambda value: np.asarray(value, test.dtype), penalty))

        def batch(n: int, weights: Penalty = weights) -> tuple[Array, Penalty]:
            return training.shard(mesh, np.asarray(pick(n))[mine]), weights

        state = training.init(net.init(key_params, jnp.zeros((), test.dtype), test[0]), optimizer)
        state, key = training.replicate(mesh, (state, key_train))
        every: dict[str, Any] = {"num_steps": config.num_steps, "checkpoint_every": config.checkpoint_every}
        state, _ = runs.train(updates[penalty.taynode > 0], state, batch, key, run=own, label=name, **every)
        seconds = time.perf_counter() - start

        params = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state.ema)
        log_p, *counts = (np.asarray(values, np.float64) for values in measured(params, test, z))
        nll[name], evaluations[name] = log_det - log_p, counts[0]
        results |= mean_and_stderr(f"{name}_nll", nll[name])
        results[f"{name}_bits_per_dim"] = results[f"{name}_nll"] / (len(noise) * float(np.log(2.0)))
        results |= mean_and_stderr(f"{name}_evaluations", counts[0])
        results |= mean_and_stderr(f"{name}_sampling_evaluations", counts[1])
        results[f"{name}_seconds"] = seconds
        runs.say(f"{name}: NLL {results[f'{name}_nll']:.2f} nats, {results[f'{name}_evaluations']:.1f} evaluations")
    results |= compare(nll, evaluations, config.allowed)
    draw(run.folder / "evaluations.png", list(nll), results)
    return runs.write_metrics(run, results)


if __name__ == "__main__":
    runs.cli(main, Config)
