"""Score matching: four losses for one score, on the same data, network and budget. How close does each come?

    python experiments/score_matching.py

trains a network on points of a rotated mixture in the plane, whose score is known, by explicit (which needs that
score), implicit, sliced with and without variance reduction, and denoising score matching at a small and a large sigma.
It writes to runs/score_matching/ the Fisher divergence from the true score over training with its error, the time of a
step of each loss, the learned fields, and the numbers in metrics.json. A denoising loss learns the score of the data
with noise of size sigma: its divergence is measured from that score too, and the divergence between the two, the bias
that no training removes, is named beside it.

Expected divergences, with the error of the measurement (not of another seed), where that of the score 0 is 3.53:

    explicit   0.00048 +- 0.00004     sliced                      0.0092 +- 0.0002
    implicit   0.0086 +- 0.0002       without variance reduction  0.0134 +- 0.0002
    denoising, sigma 0.1   0.0502 +- 0.0007; the bias of sigma alone is 0.0137; 0.0295 from the noisy score
    denoising, sigma 0.3   0.491 +- 0.003; the bias of sigma alone is 0.486; 0.0046 from the noisy score

and a step of implicit (sliced) at 2.6 (1.8) times that of denoising, in 50 seconds of processor time, a minute or so.

--energy trains a scalar network, log p up to a constant, whose gradient is the score. A run that was stopped goes on
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

from dgm_jax import densities, networks, plots, probes, runs, schedules, score_matching, training
from dgm_jax.types import Array, ScalarField, VectorField

KERNEL = schedules.edm(1.0)  # alpha = 1 and sigma = t: the time of this script is the size of the noise
MEASURING = ("num_test", "num_rounds")  # may change when a run is resumed


@dataclass(frozen=True)
class Config:
    """What to train, for how long, and how much to measure."""

    out: str = "runs/score_matching"
    """Folder of the run, with a folder for each loss."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoints."""
    seed: int = 0
    """Of all random numbers."""
    energy: bool = False
    """Train a scalar network whose gradient is the score, instead of the score itself."""
    sigmas: tuple[float, ...] = (0.1, 0.3)
    """Noise of the denoising losses, in units of the data; one loss each."""
    features: tuple[int, ...] = (64, 64, 64)
    """Widths of the hidden layers."""
    probes: Literal["rademacher", "gaussian"] = "rademacher"
    """Random directions of the sliced losses, one for each point."""
    num_steps: int = 3000
    """Training steps of each loss."""
    batch_size: int = 256
    """Points in a step; the same for every loss, and new in every step."""
    learning_rate: float = 5e-3
    """Largest learning rate of Adam; it falls to 0 along a cosine."""
    ema_decay: float = 0.995
    """Of the average of the parameters over the steps, which is what is measured."""
    measure_every: int = 100
    """Steps between two measurements of the Fisher divergence."""
    num_valid: int = 4000
    """Points on which it is measured during training."""
    num_test: int = 50_000
    """New points on which it is measured in the end."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    num_rounds: int = 15
    """Rounds of 10 steps of each loss in turn, by which steps are timed."""


class Method(NamedTuple):
    """A loss, and the size of the noise at which it learns the score."""

    loss: Callable[[Any, Array, Array], Array]  # params, key, batch [batch_size, 2] -> []
    sigma: float


class State(NamedTuple):
    """The training state, and the last measurement of the Fisher divergence with its error."""

    train: training.TrainState
    fisher: Array
    fisher_stderr: Array


def target() -> densities.Mixture:
    """Three Gaussians of unequal weight in the plane, none of them along the axes."""

    def turned(degrees: float, long: float, short: float) -> list[list[float]]:
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turn = np.array([[c, -s], [s, c]])
        return (turn @ np.diag([long**2, short**2]) @ turn.T).tolist()

    covariances = [turned(30, 0.9, 0.35), turned(-50, 0.8, 0.4), turned(75, 0.6, 0.4)]
    means = [[-1.3, -0.8], [1.2, 0.6], [-0.6, 1.6]]
    return densities.Mixture(jnp.array([0.3, 0.5, 0.2]), jnp.array(means), jnp.array(covariances))


def make_methods(config: Config, score: VectorField, density: ScalarField | None, truth: VectorField) -> dict:
    """Every loss by name. A batch is a mean over its points; the model is shown the noise it is to learn, as its time.

    Args:
        config: of the run.
        score: the model.
        density: its log-density up to a constant, where it has one.
        truth: the score of the data and of the data with noise.
    """
    clean = jnp.zeros(())
    draw = {"rademacher": probes.rademacher, "gaussian": probes.gaussian}[config.probes]

    def explicit(params: Any, key: Array, x: Array) -> Array:
        return jnp.mean(jax.vmap(lambda x: score_matching.explicit(score, truth, clean, x, params))(x))

    def implicit(params: Any, key: Array, x: Array) -> Array:
        if density is not None:
            return jnp.mean(jax.vmap(lambda x: score_matching.implicit_log_density(density, clean, x, params))(x))
        return jnp.mean(jax.vmap(lambda x: score_matching.implicit(score, clean, x, params))(x))

    def sliced(reduce: bool) -> Callable[..., Array]:
        def loss(params: Any, key: Array, x: Array) -> Array:
            def one(x: Array, e: Array) -> Array:
                return score_matching.sliced(score, clean, x, e[None], params, variance_reduction=reduce)

            return jnp.mean(jax.vmap(one)(x, draw(key, x)[0]))

        return loss

    def denoising(sigma: float) -> Callable[..., Array]:
        def loss(params: Any, key: Array, x: Array) -> Array:
            t = jnp.asarray(sigma, x.dtype)
            one = lambda x, e: score_matching.denoising(score, KERNEL, t, x, e, params, weight=KERNEL.variance)  # noqa: E731
            return jnp.mean(jax.vmap(one)(x, jax.random.normal(key, x.shape)))

        return loss

    methods = {
        "explicit": Method(explicit, 0.0),
        "implicit": Method(implicit, 0.0),
        "sliced": Method(sliced(True), 0.0),
        "sliced_plain": Method(sliced(False), 0.0),
    }
    return methods | {f"denoising_{sigma:g}": Method(denoising(sigma), sigma) for sigma in config.sigmas}


def fisher(
    score: VectorField, truth: VectorField, params: Any, sigma: float | Array, noise: float | Array, x: Array
) -> tuple[Array, Array]:
    """The divergence of the model of that sigma from the score of data with that noise, on points x of such data."""
    model = lambda t, x, params: score(jnp.asarray(sigma, x.dtype), x, params)  # noqa: E731
    return score_matching.fisher_divergence(truth, model, jnp.asarray(noise, x.dtype), x, params)


def watched(step: Callable, measure: Callable[[Any], tuple[Array, Array]], config: Config) -> Callable:
    """The training step, with a look at the Fisher divergence every now and then; its batch is (n, points)."""

    def update(state: State, key: Array, batch: tuple[int, Array]) -> tuple[State, dict[str, Array]]:
        n, x = batch
        train, report = step(state.train, key, x)
        due = (n + 1) % config.measure_every == 0 or n + 1 == config.num_steps
        measured = measure(train.ema) if due else state[1:]
        return State(train, *measured), report | dict(zip(State._fields[1:], measured, strict=True))

    return update


def judge(
    methods: dict[str, Method],
    states: dict[str, State],
    score: VectorField,
    truth: VectorField,
    test: Array,
    eps: Array,
) -> dict[str, dict[str, float]]:
    """The divergence of every model from the score of the data; of denoising, from that of noisy data too, and the
    divergence between these two scores."""
    clean = jax.jit(lambda params, sigma: fisher(score, truth, params, sigma, 0.0, test))
    noisy = jax.jit(lambda params, sigma: fisher(score, truth, params, sigma, sigma, test + sigma * eps))
    bias = jax.jit(lambda sigma: fisher(truth, truth, None, sigma, 0.0, test))
    results = {}
    for name, method in methods.items():
        params, sigma = states[name].train.ema, jnp.asarray(method.sigma, test.dtype)
        found = {"fisher": clean(params, sigma)}
        if method.sigma:
            found |= {"fisher_from_noisy_score": noisy(params, sigma), "bias_of_sigma": bias(sigma)}
        results[name] = {}
        for key, (value, stderr) in found.items():
            results[name] |= {key: float(value), f"{key}_stderr": float(stderr)}
    return results


def clock(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a step: median and quartiles over rounds of 10 that take the losses in turn, so that a busy moment of
    the machine falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(10):
                last = step()
            jax.block_until_ready(last)
            seconds[name].append((time.perf_counter() - began) / 10)
    names = ("seconds_step_low", "seconds_step", "seconds_step_high")
    return {
        name: dict(zip(names, map(float, np.quantile(values, [0.25, 0.5, 0.75])), strict=True))
        for name, values in seconds.items()
    }


def draw_training(path: Path, results: dict[str, Any], histories: dict[str, Any], title: str) -> None:
    """Divergence over training, beside the time of a step."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = matplotlib.colormaps["tab10"].colors
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for y, (name, history) in enumerate(histories.items()):
        step, value, stderr = (np.asarray(history[key]) for key in ("step", "fisher", "fisher_stderr"))
        at = np.flatnonzero(np.diff(value, prepend=np.nan))[1:]  # a measurement stands until the next one
        left.plot(step[at], value[at], color=colors[y], label=name, linewidth=1.5)
        left.fill_between(step[at], *((value + sign * stderr)[at] for sign in (-2, 2)), color=colors[y], alpha=0.2)
        result = results[name]
        if "bias_of_sigma" in result:
            left.axhline(result["bias_of_sigma"], color=colors[y], linestyle=":", label=f"{name}: bias of sigma")
        low, middle, high = (1e3 * result[f"seconds_step{end}"] for end in ("_low", "", "_high"))
        right.barh(y, middle, color=colors[y])
        right.plot([low, high], [y, y], color="black", linewidth=1)
        right.text(max(middle, high), y, f" {middle:.2f}", va="center", fontsize=8)
    left.set(yscale="log", xlabel="training step", ylabel="Fisher divergence from the true score", title=title)
    left.grid(alpha=0.3)
    right.set_yticks(range(len(results)), list(results), fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.18)
    right.set(xlabel="milliseconds (black: quartiles)", title="time of a training step")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def draw_fields(path: Path, nodes: Array, log_p: Array, true: Array, fields: dict[str, Array]) -> None:
    """The true score and the learned ones as arrows, over the size of the error; contours of the true density."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-(len(fields) + 1) // 4)
    figure = Figure(figsize=(11, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 4, squeeze=False).ravel()
    nodes, log_p, true = np.asarray(nodes), np.asarray(log_p), np.asarray(true)
    side, few = nodes[-1, -1, 0], (slice(3, None, 6),) * 2
    for panel, (name, field) in zip(axes, {"true score": true, **fields}.items(), strict=False):
        error = np.linalg.norm(np.asarray(field) - true, axis=-1)
        shown = panel.imshow(error, origin="lower", extent=(-side, side) * 2, vmin=0, vmax=3, cmap="Reds")
        levels = log_p.max() - np.array([6.0, 4.0, 2.0, 0.7])
        panel.contour(*np.moveaxis(nodes, -1, 0), log_p, levels, colors="grey", linewidths=0.6)
        arrows = np.asarray(field)[few]
        arrows = arrows / np.maximum(1, np.linalg.norm(arrows, axis=-1, keepdims=True) / 4)  # drawn no longer than 4
        panel.quiver(*np.moveaxis(nodes[few], -1, 0), *np.moveaxis(arrows, -1, 0), angles="xy", scale=60, width=0.005)
        panel.set(title=name, xticks=[], yticks=[])
    for panel in axes[len(fields) + 1 :]:
        panel.set_visible(False)
    figure.colorbar(shown, ax=list(axes), label="size of the error", shrink=0.7, extend="max")
    figure.savefig(path, dpi=90)


def main(config: Config) -> dict[str, Any]:
    """Trains by every loss, measures, draws; returns what metrics.json holds."""
    for sigma in config.sigmas:
        if not 0 < sigma <= 1:
            raise ValueError(f"sigmas holds {sigma}, expected sizes of noise in (0, 1]: the data are of size one.")
    if min(config.measure_every, config.num_rounds) < 1 or min(config.num_valid, config.num_test) < 2:
        raise ValueError("measure_every and num_rounds must be at least 1, num_valid and num_test at least 2.")
    run = runs.open_run(config, may_differ=MEASURING)
    keys = jax.random.split(jax.random.key(config.seed), 6)
    key_net, key_train, key_data, key_valid, key_test, key_noise = keys
    mixture = target()
    truth, x = densities.score(mixture, KERNEL), jnp.zeros(2)
    net = networks.MLP(config.features, jax.nn.silu, out_features=1 if config.energy else None, param_dtype=x.dtype)
    params = net.init(key_net, jnp.zeros(()), x)
    density = (lambda t, x, params: net.apply(params, t, x)[0]) if config.energy else None
    score = networks.vector_field(net) if density is None else score_matching.score_of(density)
    methods = make_methods(config, score, density, truth)
    folders = {name: dataclasses.replace(config, out=f"{config.out}/{name}") for name in methods}
    inner = {name: runs.open_run(folder, may_differ=MEASURING) for name, folder in folders.items()}

    mesh, sample = training.mesh(), jax.jit(densities.sample, static_argnums=2)
    mine = training.local_rows(mesh, config.batch_size)

    def batch(n: int) -> tuple[int, Array]:
        points = sample(jax.random.fold_in(key_data, n), mixture, config.batch_size)
        return n, training.shard(mesh, np.asarray(points)[mine])

    valid, test = sample(key_valid, mixture, config.num_valid), sample(key_test, mixture, config.num_test)
    look = jax.jit(lambda sigma, params: fisher(score, truth, params, sigma, 0.0, valid))
    optimizer = training.adam(config.learning_rate, config.num_steps)
    options = {"num_steps": config.num_steps, "checkpoint_every": config.checkpoint_every}
    params, key_train = training.replicate(mesh, (params, key_train))
    start, (_, first) = training.replicate(mesh, training.init(params, optimizer)), batch(0)
    states, histories, steps, compiling = {}, {}, {}, {}
    for name, method in methods.items():
        began = time.perf_counter()
        step = jax.jit(training.step(method.loss, optimizer, ema_decay=config.ema_decay))
        step = step.lower(start, key_train, first).compile()
        compiling[name] = {"seconds_compile": time.perf_counter() - began}
        measure = partial(look, jnp.asarray(method.sigma, x.dtype))
        state, update = State(start, *measure(params)), watched(step, measure, config)
        trained = runs.train(update, state, batch, key_train, run=inner[name], label=name, **options)
        states[name], histories[name] = trained
        steps[name] = partial(step, states[name].train, key_train, first)
    runs.say("timing the steps, measuring and drawing")
    seconds = clock(steps, config.num_rounds)
    results = judge(methods, states, score, truth, test, jax.random.normal(key_noise, test.shape))
    for name, result in results.items():
        result["final_loss"] = float(np.mean(histories[name]["loss"][-100:]))
        result |= seconds[name] | compiling[name]
    zero = fisher(lambda t, x, args: jnp.zeros_like(x), truth, None, 0.0, 0.0, test)

    nodes = plots.grid_points(4.0, 64)
    on_grid = jax.jit(lambda f, t, args=None: jax.vmap(jax.vmap(lambda x: f(t, x, args)))(nodes), static_argnums=0)
    fields = {name: on_grid(score, float(method.sigma), states[name].train.ema) for name, method in methods.items()}
    log_p, true = on_grid(densities.log_density(mixture, KERNEL), 0.0), on_grid(truth, 0.0)
    draw_training(run.folder / "fisher.png", results, histories, "scalar network" if config.energy else "score network")
    draw_fields(run.folder / "fields.png", nodes, log_p, true, fields)
    flat = {f"{name}_{key}": value for name, result in results.items() for key, value in result.items()}
    return runs.write_metrics(run, {"zero_fisher": float(zero[0]), "zero_fisher_stderr": float(zero[1]), **flat})


if __name__ == "__main__":
    runs.cli(main, Config)
