"""Discrete flows: how close do an affine flow, planar flows and RealNVP come to a density that is known?

    python experiments/discrete_flows.py

trains the three by maximum likelihood on eight gaussians, on the same batches, and writes to runs/discrete_flows/ what
came of it: densities and samples beside the truth, the training NLL, and in metrics.json for each flow the test NLL in
nats with its standard error, its excess over the true NLL of the same points, the mass of its density on a grid, and
the error of its inverse.
Expected: excess of 1.430 +- 0.007 nat (affine), 0.006 +- 0.001 (planar) and 0.066 +- 0.002 (RealNVP), 60 seconds of
processor time, about a minute.

An affine flow of N(0, I) is a Gaussian, and the best of those has the NLL 1/2 log det(2 pi e C), C the covariance of
the data. The planar steps run from data to base, where a few of them close the gaps between the modes; RealNVP, with
400 times their parameters, leaves bridges. Other data: --data checkerboard or rings. A run that was stopped goes on
with --resume.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import datasets, discrete_flows, networks, plots, runs, training
from dgm_jax.discrete_flows import Flow
from dgm_jax.types import Array

TITLES = {"dense_affine": "dense affine", "planar": "planar", "realnvp": "RealNVP"}
COLORS = {"dense_affine": "#666666", "planar": "#D55E00", "realnvp": "#0072B2"}


@dataclass(frozen=True)
class Config:
    """What to train on, what to train, and how much to measure."""

    out: str = "runs/discrete_flows"
    """Folder of the run, with a folder for each flow."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoints."""
    seed: int = 0
    """Of all random numbers."""
    data: Literal["eight_gaussians", "checkerboard", "rings"] = "eight_gaussians"
    """A density in the plane that has a closed form."""
    flows: tuple[str, ...] = ("dense_affine", "planar", "realnvp")
    """Which of the three."""
    blocks: int = 8
    """Of RealNVP: two couplings, one for each coordinate, and an affine map with L U for its matrix."""
    features: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of its networks."""
    planes: int = 32
    """Steps of the planar flow, before one affine map."""
    num_steps: int = 3000
    """Training steps of each."""
    batch_size: int = 512
    """Examples in a step, over all devices."""
    learning_rate: float = 3e-3
    """The largest of Adam; it falls to 0 along a cosine."""
    ema_decay: float = 0.99
    """Of the average of the parameters over the steps, which is what is used in the end."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    num_test: int = 20_000
    """Test points, and samples of each flow."""
    grid: int = 256
    """Points along a side of the density maps."""


def check(config: Config) -> None:
    """What would fail only after a training is found before it."""
    for name in config.flows:
        if name not in TITLES:
            raise ValueError(f"flows holds {name!r}, expected some of {', '.join(TITLES)}.")
    if not config.flows or len(set(config.flows)) < len(config.flows):
        raise ValueError(f"flows must name at least one flow, and each once, got {config.flows}.")
    if config.num_steps < 1 or config.blocks < 1 or config.planes < 1:
        raise ValueError(
            f"num_steps, blocks and planes must be at least 1, got {config.num_steps}, {config.blocks} and "
            f"{config.planes}."
        )
    if config.num_test < 3 or config.grid < 2:
        raise ValueError(
            f"num_test must be at least 3, for standard errors, and grid 2, got {config.num_test} and {config.grid}."
        )


class Model(NamedTuple):
    """A flow, and how its parameters begin."""

    flow: Flow
    init: Callable[[Array], Any]


def make_model(config: Config, name: str, x: Array) -> Model:
    """One of the three flows for examples like x [d]."""
    df = discrete_flows
    if name == "dense_affine":
        return Model(df.dense_affine(), partial(df.init_dense_affine, x=x))
    if (
        name == "planar"
    ):  # inverted: training runs from data to base, which is then its direction without a root to find
        flow = df.compose([df.repeat(df.invert(df.planar())), df.lu_affine()])
        start = jax.vmap(partial(df.init_planar, x=x))
        return Model(flow, lambda key: (start(jax.random.split(key, config.planes)), df.init_lu_affine(x)))
    net = networks.MLP(config.features, jax.nn.silu, out_features=2 * x.size, param_dtype=x.dtype)
    never = jnp.zeros((), x.dtype)  # the time, which a coupling has not

    def network(z: Array, params: Any) -> tuple[Array, Array]:
        both: Any = net.apply(params, never, z)
        return both[: z.size], both[z.size :]

    even = np.arange(x.size) % 2 == 0
    block = df.compose([df.affine_coupling(even, network), df.affine_coupling(~even, network), df.lu_affine()])

    def init(key: Array) -> Any:
        keys = jax.random.split(key, (2, config.blocks))
        first, second = (jax.vmap(lambda k: net.init(k, never, x))(each) for each in keys)
        affine = jax.tree.map(lambda leaf: jnp.tile(leaf, (config.blocks, *[1] * leaf.ndim)), df.init_lu_affine(x))
        return first, second, affine

    return Model(df.repeat(block), init)


def train(config: Config, model: Model, name: str, key: Array, batch: Callable[[int], Array], mesh: Any) -> Any:
    """Maximum likelihood, in a folder of its own: the averaged parameters, and the history."""
    run = runs.open_run(dataclasses.replace(config, out=str(Path(config.out) / name)), may_differ=("num_test", "grid"))

    log_true = jax.vmap(datasets.log_density(config.data))

    def loss(params: Any, key: Array, x: Array) -> tuple[Array, dict[str, Array]]:
        log_p = jax.vmap(partial(discrete_flows.log_prob, model.flow, params))(x)
        return -jnp.mean(log_p), {"excess": jnp.mean(log_true(x) - log_p)}

    steps, every = config.num_steps, config.checkpoint_every
    optimizer = training.adam(config.learning_rate, steps, warmup=min(100, steps - 1))
    update = jax.jit(training.step(loss, optimizer, ema_decay=config.ema_decay, has_aux=True), donate_argnums=0)
    state, key = training.replicate(mesh, (training.init(model.init(key), optimizer), key))
    state, history = runs.train(
        update, state, batch, key, num_steps=steps, run=run, checkpoint_every=every, label=TITLES[name]
    )
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state.ema), history


def mean_and_stderr(name: str, values: Any) -> dict[str, float]:
    """The mean of independent values, with its standard error."""
    x = np.asarray(values, np.float64)
    return {name: float(x.mean()), f"{name}_stderr": float(x.std(ddof=1) / len(x) ** 0.5)}


def draw(folder: Path, test: Array, samples: dict[str, Array], maps: dict[str, Array], extent: float) -> None:
    """Densities above, samples below; the truth on the left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(maps), figsize=(3.1 * len(maps), 6.3), layout="constrained", squeeze=False)
    top = float(np.quantile(maps["true"], 0.998))
    for column, (name, density) in enumerate(maps.items()):
        x = np.asarray(test if name == "true" else samples[name])[:5000]
        box = (-extent, extent)
        axes[0, column].imshow(density, origin="lower", extent=box * 2, vmin=0, vmax=top, cmap="viridis")
        axes[1, column].plot(*x.T, ".", markersize=1.5, alpha=0.5, color=COLORS.get(name, "#009E73"))
        axes[0, column].set_title("true density" if name == "true" else TITLES[name])
        axes[1, column].set(xlim=box, ylim=box, aspect="equal")
        for panel in axes[:, column]:
            panel.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel("samples")
    figure.savefig(folder / "density.png", dpi=90)
    plt.close(figure)


def draw_histories(folder: Path, histories: dict[str, Any]) -> None:
    """The excess of each training batch over the steps: a mean over a fiftieth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, history in histories.items():
        window = max(1, len(history["excess"]) // 50)
        mean = np.convolve(history["excess"], np.full(window, 1 / window), mode="valid")
        axes.plot(history["step"][window - 1 :], mean, color=COLORS[name], label=TITLES[name])
    axes.set(xlabel="training step", ylabel="NLL of a batch - its true NLL (nats)", yscale="log")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=130)
    plt.close(figure)


def main(config: Config) -> dict[str, Any]:
    """Trains, measures and draws; returns what metrics.json holds."""
    check(config)
    log_true = jax.vmap(datasets.log_density(config.data))
    run, mesh = runs.open_run(config, may_differ=("num_test", "grid")), training.mesh()
    key_batch, key_test, key_train, key_z = jax.random.split(jax.random.key(config.seed), 4)
    sample = jax.jit(datasets.two_d(config.data), static_argnums=1)
    mine = training.local_rows(mesh, config.batch_size)

    def batch(n: int) -> Array:
        return training.shard(mesh, np.asarray(sample(jax.random.fold_in(key_batch, n), config.batch_size))[mine])

    test = sample(key_test, config.num_test)
    true = log_true(test)
    results: dict[str, Any] = {"entropy": datasets.entropy(config.data)} | mean_and_stderr("true_nll", -true)
    covariance = np.cov(np.asarray(test, np.float64).T)
    results["best_gaussian_nll"] = float(0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance).logabsdet)
    extent = 1.2 * float(jnp.max(jnp.abs(test)))
    points = plots.grid_points(extent, config.grid)
    z = jax.random.normal(key_z, test.shape, test.dtype)
    maps: dict[str, Array] = {"true": jnp.exp(log_true(points.reshape(-1, 2)).reshape(config.grid, config.grid))}
    samples, histories = {}, {}
    for index, name in enumerate(config.flows):
        wall, processor = time.perf_counter(), time.process_time()
        model = make_model(config, name, test[0])
        params, histories[name] = train(config, model, name, jax.random.fold_in(key_train, index), batch, mesh)
        seconds = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
        log_prob = jax.jit(jax.vmap(partial(discrete_flows.log_prob, model.flow), (None, 0)))
        forward = jax.jit(jax.vmap(lambda params, z, flow=model.flow: flow.forward(params, z)[0], (None, 0)))
        inverse = jax.jit(jax.vmap(lambda params, x, flow=model.flow: flow.inverse(params, x)[0], (None, 0)))
        log_p = log_prob(params, test)
        samples[name] = forward(params, z)
        maps[name] = jnp.exp(log_prob(params, points.reshape(-1, 2)).reshape(config.grid, config.grid))
        area = (2 * extent / (config.grid - 1)) ** 2
        results |= mean_and_stderr(f"{name}_nll", -log_p) | mean_and_stderr(f"{name}_excess_nll", true - log_p)
        results |= {
            f"{name}_mass_on_grid": float(jnp.sum(maps[name])) * area,
            f"{name}_inverse_error": float(jnp.max(jnp.abs(inverse(params, samples[name]) - z))),
            f"{name}_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            **{f"{name}_{kind}": value for kind, value in seconds.items()},
        }
    draw(run.folder, test, samples, maps, extent)
    draw_histories(run.folder, histories)
    return runs.write_metrics(run, results)


if __name__ == "__main__":
    runs.cli(main, Config)
