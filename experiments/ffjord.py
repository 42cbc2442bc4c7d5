"""FFJORD: how close does a continuous normalizing flow, trained by maximum likelihood, come to the best NLL there is?

    python experiments/ffjord.py

trains on eight gaussians, whose entropy is known, and writes to runs/ffjord/ what came of it: samples beside data, the
learned density beside the true one, the flow of a grid through time, the loss, the evaluations of each training solve,
and in metrics.json the test NLL in nats with its standard error, and its excess over the true NLL of the same points.
Expect an excess below 0.01 nat, after a minute or two on two CPU cores.

Other data: --data checkerboard (two_spirals, pinwheel, rings, moons, swiss_roll), or --data table.csv (or .npy), which
is split 80 : 10 : 10 into train, valid and test and standardised; its NLL is in nats per row in the units of the file,
beside that of a fitted Gaussian. A run that was stopped goes on with --resume.

The flow carries the base N(0, I) at t = 0 to the data at t = 1 along dx/dt = v(t, x), an MLP, so that
log p(x) = log N(z; 0, I) + integral from 1 to 0 of div v dt. Source: Grathwohl et al. (2019), equations 4 to 8.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import datasets, densities, flows, networks, plots, probes, runs, solvers, training
from dgm_jax.types import Array, VectorField

ADJOINTS: dict[str, Any] = {
    "recursive_checkpoint": diffrax.RecursiveCheckpointAdjoint,
    "backsolve": diffrax.BacksolveAdjoint,
    "direct": diffrax.DirectAdjoint,
}
ACTIVATIONS = {"tanh": jnp.tanh, "softplus": jax.nn.softplus, "silu": jax.nn.silu, "gelu": jax.nn.gelu}
KNOWN = ("eight_gaussians", "checkerboard", "rings")  # with a density in closed form


@dataclass(frozen=True)
class Config:
    """What to train on, what to train, and how much to measure."""

    out: str = "runs/ffjord"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoint."""
    seed: int = 0
    """Of every random number, and of the split of a table."""
    data: str = "eight_gaussians"
    """eight_gaussians, checkerboard, two_spirals, pinwheel, rings, moons, swiss_roll, or the path of a .npy or .csv
    table, one row an example."""
    drop: tuple[int | str, ...] = ()
    """Columns of the table to leave out, by index from 0 or by name: labels, or columns of few distinct values, whose
    density has no bound."""
    width: int = 64
    """Of the hidden layers of the velocity."""
    depth: int = 3
    """How many hidden layers."""
    activation: Literal["tanh", "softplus", "silu", "gelu"] = "tanh"
    """Of the hidden layers; smooth, for the solver's sake."""
    divergence: Literal["exact", "hutchinson"] = "exact"
    """Of the training loss. exact: as many products with the Jacobian as columns. hutchinson: as many as probes, but
    noisy; the better choice above a handful of columns. The test NLL is always exact."""
    num_probes: int = 1
    """Rademacher probes of hutchinson, for each example."""
    adjoint: Literal["recursive_checkpoint", "backsolve", "direct"] = "backsolve"
    """Gradients by backpropagation through the solver with few of its states kept, exact for what was computed; by the
    adjoint ODE solved backwards, in half the time and constant memory; or by backpropagation with a bounded loop.
    (Diffrax's other two, implicit and forward mode, give no gradient of a loss through time.)"""
    rtol: float = 1e-3
    """Relative tolerance of the training solve."""
    atol: float = 1e-3
    """Absolute tolerance of the training solve."""
    test_rtol: float = 1e-6
    """Relative tolerance of every solve after training, one for each example."""
    test_atol: float = 1e-6
    """Absolute tolerance of the same."""
    num_steps: int = 1500
    """Training steps."""
    batch_size: int = 256
    """Examples in a step, over all devices; of a table no more than its training rows."""
    learning_rate: float = 5e-3
    """The largest learning rate of Adam; it falls to 0 along a cosine."""
    ema_decay: float = 0.995
    """Of the average over the training steps whose parameters are used in the end; 0 for the last ones themselves."""
    valid_every: int = 100
    """Steps between validations on a table; the average with the lowest validation NLL is kept."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    num_test: int = 10_000
    """Test points of a 2-D density, and samples drawn."""
    grid: int = 128
    """Points along a side of the density map."""


class Data(NamedTuple):
    """Batches and the test set, standardised where they come from a table."""

    batch: Callable[[int], Array]  # n -> the batch of step n [batch_size, d], split over the devices
    test: Array  # [num, d]
    log_true: Callable[[Array], Array] | None = None  # log p of one point [2] in nats, where it is known
    table: datasets.Table | None = None


class State(NamedTuple):
    """The training state, and for a table the best average so far with its validation NLL."""

    train: training.TrainState
    best: Any = None
    valid_nll: Any = None


def load(config: Config, key: Array, mesh: Any) -> Data:
    """The data set, its batches split over the devices."""
    key_batch, key_test = jax.random.split(key)
    if config.data in datasets.TWO_D:
        sample = jax.jit(datasets.two_d(config.data), static_argnums=1)
        mine = training.local_rows(mesh, config.batch_size)

        def draw(n: int) -> Array:
            return training.shard(mesh, np.asarray(sample(jax.random.fold_in(key_batch, n), config.batch_size))[mine])

        log_true = datasets.log_density(config.data) if config.data in KNOWN else None
        return Data(draw, sample(key_test, config.num_test), log_true)

    if not config.data.endswith((".npy", ".csv")):
        names = ", ".join(datasets.TWO_D)
        raise ValueError(f"data is {config.data!r}, expected one of {names}, or the path of a .npy or .csv file.")
    table = datasets.split_table(datasets.load_table(config.data, drop=config.drop), config.seed)
    for column, values in enumerate(table.train.T):
        if (distinct := len(np.unique(values))) <= min(20, len(values) // 2):
            runs.say(f"column {column} of those used has {distinct} distinct values and so no density: --drop it.")
    if len(table.test) < 2 or len(table.train) <= table.train.shape[1]:
        raise ValueError(
            f"{config.data} has too few rows: {len(table.train)} to train on and {len(table.test)} to test."
        )
    if np.linalg.eigvalsh(np.atleast_2d(np.cov(table.train.T)))[0] < 1e-6:
        raise ValueError(
            f"{config.data} has columns that are linear in others, so no density: leave one out by --drop."
        )
    train, valid, test = (np.asarray(jnp.asarray(part, float)) for part in table[:3])  # in JAX's default float
    size = min(config.batch_size, len(train) // mesh.size * mesh.size)
    mine = training.local_rows(mesh, size)
    rows = jax.jit(lambda n: training.batch_indices(key_batch, n, len(train), size))

    def pick(n: int) -> Array:
        return training.shard(mesh, train[np.asarray(rows(n))[mine]])

    return Data(pick, jnp.asarray(test), table=table._replace(train=train, valid=valid, test=test))


def make_loss(velocity: VectorField, config: Config) -> Callable[..., Any]:
    """-mean log p(x) over a batch in one solve, and how often that solve evaluated the velocity."""
    options: dict[str, Any] = {"t_data": 1.0, "t_base": 0.0, "rtol": config.rtol, "atol": config.atol}

    def loss(params: Any, key: Array, x: Array) -> Any:
        e = None
        if config.divergence == "hutchinson":
            e = jnp.moveaxis(probes.rademacher(key, x, config.num_probes), 0, 1)  # [batch, num, d]
        adjoint = ADJOINTS[config.adjoint]()
        log_p, nfe = flows.log_prob_batch(velocity, x, params, probes=e, adjoint=adjoint, with_nfe=True, **options)
        return -jnp.mean(log_p), {"nfe": nfe}

    return loss


def each(one: Callable[[Any, Array], Any]) -> Callable[[Any, Array], Any]:
    """``one(params, x [d])`` for every row of x [num, d], each in a solve of its own; 500 at a time."""
    return lambda params, x: jax.lax.map(lambda row: one(params, row), x, batch_size=min(500, len(x)))


def make_update(velocity: VectorField, optimizer: Any, data: Data, config: Config) -> Callable[..., Any]:
    """A training step, and for a table every ``valid_every`` steps a look at the validation NLL."""
    step = training.step(make_loss(velocity, config), optimizer, ema_decay=config.ema_decay, has_aux=True)
    options: dict[str, Any] = {"t_data": 1.0, "t_base": 0.0, "rtol": config.rtol, "atol": config.atol, "throw": False}
    log_prob = each(lambda params, x: flows.log_prob(velocity, x, params, **options))
    valid = None if data.table is None else jnp.asarray(data.table.valid)

    def update(state: State, key: Array, batch: Array) -> tuple[State, dict[str, Array]]:
        train, report = step(state.train, key, batch)
        if valid is None:
            return State(train), report
        due = train.step % config.valid_every == 0
        unknown = jnp.full((), jnp.inf)
        nll = jax.lax.cond(due, lambda p: -jnp.mean(log_prob(p, valid)), lambda p: unknown, train.ema)
        better = nll < state.valid_nll
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), train.ema, state.best)
        valid_nll = jnp.where(better, nll, state.valid_nll)
        return State(train, best, valid_nll), report | {"valid_nll": valid_nll}

    return update


def mean_and_stderr(name: str, values: Any) -> dict[str, float]:
    """The mean of independent values, with its standard error; NaN, of a solve that failed, is an error."""
    x = np.asarray(values, np.float64)
    if not np.isfinite(x).all():
        raise FloatingPointError(f"{name}: {np.sum(~np.isfinite(x))} of {len(x)} solves failed: loosen --test-rtol.")
    return {name: float(x.mean()), f"{name}_stderr": float(x.std(ddof=1) / len(x) ** 0.5)}


def measure(
    key: Array, velocity: VectorField, params: Any, data: Data, config: Config, folder: Path
) -> dict[str, float]:
    """The test NLL in nats, beside the best there is or that of a Gaussian; and the pictures."""
    options: dict[str, Any] = {"rtol": config.test_rtol, "atol": config.test_atol, "throw": False}
    ends: dict[str, Any] = {"t_data": 1.0, "t_base": 0.0}
    times = jnp.linspace(0.0, 1.0, 6)
    log_prob = jax.jit(each(lambda params, x: flows.log_prob(velocity, x, params, **ends, **options)))
    sample = jax.jit(each(lambda params, z: flows.sample(velocity, z, params, **ends, **options)))
    path = jax.jit(each(lambda params, z: solvers.solve_ode(velocity, z, params, t0=0, t1=1, ts=times, **options).xs))

    log_p, d = log_prob(params, data.test), data.test.shape[1]
    shown: Any = data.test if data.table is None else data.table.train
    if data.table is not None:
        log_det, titles = data.table.log_det, ("data, standardised", "samples, standardised")
        gaussian = densities.gaussian(jnp.mean(shown, 0), jnp.atleast_2d(jnp.cov(shown.T, ddof=0)))
        log_q = jax.vmap(lambda x: densities.log_prob(gaussian, x))(data.test)
        results = mean_and_stderr("test_nll", -(log_p + log_det)) | mean_and_stderr("gaussian_nll", -(log_q + log_det))
        results |= mean_and_stderr("gain_over_gaussian", log_p - log_q)
    else:
        titles, results = ("data", "samples"), mean_and_stderr("test_nll", -log_p)
    if data.log_true is not None:
        log_q = jax.vmap(data.log_true)(data.test)
        results |= {"entropy": datasets.entropy(config.data)} | mean_and_stderr("true_nll", -log_q)
        results |= mean_and_stderr("excess_nll", log_q - log_p)

    z = jax.random.normal(key, (min(config.num_test, len(shown)), d))
    if d > 1:
        plots.samples(folder / "samples.png", shown[: len(z)], sample(params, z), titles=titles)
    if d == 2:
        extent = 1.15 * float(jnp.max(jnp.abs(data.test)))
        points = plots.grid_points(extent, config.grid)
        log_density = log_prob(params, points.reshape(-1, 2)).reshape(config.grid, config.grid)
        true = None if data.log_true is None else jax.vmap(jax.vmap(data.log_true))(points)
        plots.density(folder / "density.png", log_density, extent=extent, reference=true)
        lines = plots.grid_points(2.25, 169)
        frames = jnp.moveaxis(path(params, lines.reshape(-1, 2)), 0, 1).reshape(len(times), *lines.shape)
        plots.flow(folder / "flow.png", frames, times, every=7)
    return results


def main(config: Config) -> dict[str, float]:
    """Trains, measures and draws; returns what metrics.json holds."""
    measuring = ("num_test", "grid", "test_rtol", "test_atol")  # may change when a run is resumed
    run, clock = runs.open_run(config, may_differ=measuring), time.perf_counter()
    key_params, key_train, key_data, key_test = jax.random.split(jax.random.key(config.seed), 4)
    mesh = training.mesh()
    data = load(config, key_data, mesh)
    zeros = jnp.zeros(data.test.shape[1])

    net = networks.MLP((config.width,) * config.depth, ACTIVATIONS[config.activation], param_dtype=zeros.dtype)
    velocity = networks.vector_field(net)
    optimizer = training.adam(config.learning_rate, config.num_steps, warmup=min(50, config.num_steps - 1))
    state = State(training.init(net.init(key_params, jnp.zeros(()), zeros), optimizer))
    if data.table is not None:  # an untrained velocity is zero
        nll = -jnp.mean(jax.vmap(flows.standard_normal)(jnp.asarray(data.table.valid)))
        state = State(state.train, jax.tree.map(jnp.array, state.train.params), nll)
    state, key_train = training.replicate(mesh, (state, key_train))
    update = jax.jit(make_update(velocity, optimizer, data, config), donate_argnums=0)
    every: dict[str, Any] = {"num_steps": config.num_steps, "checkpoint_every": config.checkpoint_every}
    state, history = runs.train(update, state, data.batch, key_train, run=run, label="ffjord", **every)
    trained = time.perf_counter()

    params = jax.tree.map(np.asarray, state.train.ema if data.table is None else state.best)
    results = measure(key_test, velocity, params, data, config, run.folder)
    if data.table is not None:
        history["loss"] -= data.table.log_det
        results["valid_nll"] = float(state.valid_nll) - data.table.log_det
    best = (results["entropy"], "entropy of the data") if "entropy" in results else None
    plots.curve(run.folder / "loss.png", history, label="training NLL (nats)", reference=best)
    plots.curve(run.folder / "nfe.png", history, "nfe", label="evaluations in a training solve")
    results["training_nfe"] = float(np.mean(history["nfe"][-100:]))
    results |= {"seconds_training": trained - clock, "seconds": time.perf_counter() - clock}
    return runs.write_metrics(run, results)


if __name__ == "__main__":
    runs.cli(main, Config)
