"""The generative learning trilemma, measured: quality, coverage, speed, likelihood and latent space of eight models.

    python experiments/trilemma.py

trains each model on the same data for the same seconds of wall-clock time, compilation apart, on 25 narrow gaussians
and on 8 x 8 digits, three times each, and writes to runs/trilemma/ the table of what came of it: table.md, table.png,
metrics.json, and samples.png. 24 minutes on two CPU cores; --quick is a look at it in five. What is
measured is what models of 5,000 to 330,000 parameters learn in 25 seconds, not what their kinds can do at their best.

The columns, and an interval of 95 per cent in every cell:

    evaluations      of a network for one sample; one pass through all layers of RealNVP counts as one
    ms, alone        to draw one sample by itself, in milliseconds
    ms, in 1000      to draw one of a thousand at a time
    quality          gaussians: share of samples within 3 standard deviations of a mode, 0.989 for the data themselves
                     digits: precision, and the Frechet distance of the features of a classifier trained here
    coverage         gaussians: modes found, of 25, and the reverse KL of their shares in nats
                     digits: recall, and the share of digits held out that have a sample near them (coverage)
    distance         gaussians: sliced Wasserstein; accuracy of a classifier that tells samples from data, 0.5 at best
    NLL              of examples held out: in nats, or in bits per dimension for digits; "<=" for a bound
    round trip       decode(encode(x)) - x, root mean square over examples held out and entries, data of variance 1
    roughness        sum |a_(i+1) - a_i|^2 / sum 2 (|a_(i+1)|^2 + |a_i|^2) of the steps a_i between what is decoded from
                     50 points of a quarter of a circle between two latents, other noise held, in the mean over
                     such paths: 0 where steps go on alike, 1/2 where the path jumps, 3/4 for noise; at most 1

A half-width is sqrt((t s / sqrt n)^2 + (1.96 e)^2): s the standard deviation over n seeds, t Student's quantile, e the
root mean square of the standard errors within the seeds, which the seeds may share, for the examples held out are the
same. With one seed there is e alone.

A run that was stopped goes on with --resume: of a model, a data set and a seed that are done nothing is done again.
More seeds, models or data sets may be asked for then.

Source: Xiao, Kreis & Vahdat (2022), "Tackling the generative learning trilemma with denoising diffusion GANs".
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import trilemma_models as models
from trilemma_models import Model, Task

from dgm_jax import coverage, datasets, metrics, runs, two_sample
from dgm_jax.types import Array

Row = Literal[
    "gan", "wgan_gp", "vae", "realnvp", "cnf", "flow_matching", "diffusion", "diffusion_gan"
]  # fmt: skip
ROWS: tuple[Row, ...] = tuple(models.BUILDERS)


@dataclass(frozen=True)
class Config:
    """What to train, for how long, and how often."""

    out: str = "runs/trilemma"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in that folder: what is done stays, also where more is asked for now."""
    quick: bool = False
    """A few minutes instead of half an hour: less training, two seeds, fewer examples to measure on."""
    seconds: float | None = None
    """Training time of each model on each data set for each seed, by the clock on the wall: by default 25, quick 3."""
    seeds: int | None = None
    """How often each is trained, on seeds 0, 1, ...: by default 3, quick 2."""
    data: tuple[Literal["gaussians", "digits"], ...] = ("gaussians", "digits")
    """Which data sets."""
    rows: tuple[Row, ...] = ROWS
    """Which models."""
    beta: float = 1.0
    """Weight of the divergence from the prior in what the VAE learns by (Higgins et al., 2017)."""


class Sizes(NamedTuple):
    """How much is measured."""

    samples: int  # of gaussians, a multiple of BATCH
    digits: int  # samples of digits, at most BATCH
    held_out: int  # examples whose likelihood is measured
    compared: int  # samples that a classifier is to tell from data
    paths: int  # between two latents
    projections: int  # of the sliced Wasserstein distance


BATCH = 1000
FULL = Sizes(10_000, 1000, 512, 4000, 200, 128)
QUICK = Sizes(10_000, 1000, 128, 2000, 100, 64)
POINTS = 50  # of a path

Cells = dict[str, dict[str, Any] | None]  # column -> value, stderr, and bound where it is one; None where there is none


def check(config: Config) -> tuple[float, int]:
    """Seconds and seeds; what would fail only later is found here."""
    seconds = (3.0 if config.quick else 25.0) if config.seconds is None else config.seconds
    seeds = (2 if config.quick else 3) if config.seeds is None else config.seeds
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive and finite, got {seconds}.")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}: 3 for intervals over them.")
    if not 0 < config.beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {config.beta}: 1 is the bound of log p.")
    for name, given, known in (("data", config.data, models.TASKS), ("rows", config.rows, models.BUILDERS)):
        unknown = [one for one in given if one not in known]
        if unknown or not given or len(set(given)) < len(given):
            raise ValueError(f"{name} must be some of {', '.join(known)}, each once, got {given}.")
    return seconds, seeds


# --------------------------------------------------------------------------------------------------------- training


def compiled(model: Model) -> Callable[[Any, Array, Array, Array], tuple[Any, Array]]:
    """(state, key, n, rate) -> state after ``model.chunk`` steps from step n on, mean loss; compiled here and now."""

    def run(state: Any, key: Array, n: Array, rate: Array) -> tuple[Any, Array]:
        def one(state: Any, i: Array) -> tuple[Any, Array]:
            return model.step(state, jax.random.fold_in(key, i), rate)

        state, losses = jax.lax.scan(one, state, n + jnp.arange(model.chunk, dtype=n.dtype))
        return state, jnp.mean(losses)

    key = jax.random.key(0)
    state = jax.eval_shape(model.init, key)
    return jax.jit(run, donate_argnums=0).lower(state, key, jnp.int32(0), jnp.zeros(())).compile()


def train(model: Model, chunk: Callable[..., Any], key: Array, seconds: float) -> tuple[Any, int, float]:
    """Parameters after that many seconds of training, the number of steps, and the seconds that it took in fact.

    The learning rate rises over the first fiftieth of the time and then falls to zero along a cosine of the clock.
    """
    key_init, key_train = jax.random.split(key)
    state = jax.block_until_ready(jax.jit(model.init)(key_init))
    steps, began, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < seconds:
        share = elapsed / seconds
        rate = min(1.0, 0.02 + 50 * share) * 0.5 * (1 + math.cos(math.pi * share))
        state, loss = jax.block_until_ready(chunk(state, key_train, jnp.int32(steps), jnp.asarray(rate)))
        steps += model.chunk
        elapsed = time.perf_counter() - began
    if not math.isfinite(loss):  # of a few bad steps on the way nothing is left: they move no parameters
        raise FloatingPointError(f"the loss is {loss} after {steps} steps.")
    return model.params(state), steps, elapsed


# -------------------------------------------------------------------------------------------------------- measuring


class Instruments(NamedTuple):
    """What is compiled once for a model and a data set."""

    alone: dict[str, Callable]  # (params, key, z [latent]) -> x [d], evaluations
    many: dict[str, Callable]  # (params, keys [BATCH], z [BATCH, latent]) -> x [BATCH, d], evaluations [BATCH]
    log_prob: Callable | None  # (params, keys, x) -> values, errors
    trips: dict[str, Callable]  # (params, x) -> decode(encode(x))


def instruments(model: Model) -> Instruments:
    """The functions of one example, and over many."""

    def over(one: Callable) -> Callable:
        return jax.jit(lambda params, *rows: jax.lax.map(lambda row: one(params, *row), rows, batch_size=BATCH // 4))

    encode = model.encode
    trips = {
        name: over(lambda params, x, decode=sampler.decode: decode(params, encode(params, x)))  # type: ignore[misc]
        for name, sampler in model.samplers.items()
        if encode and sampler.decode
    }
    return Instruments(
        {name: jax.jit(sampler.draw) for name, sampler in model.samplers.items()},
        {name: over(sampler.draw) for name, sampler in model.samplers.items()},
        over(model.log_prob) if model.log_prob else None,
        trips,
    )


def cell(value: Any, stderr: Any, **more: Any) -> dict[str, Any]:
    """A measurement; one that is not finite is an error."""
    value, stderr = float(value), float(stderr)
    if not (math.isfinite(value) and math.isfinite(stderr)):
        raise FloatingPointError(f"a measurement is {value} with a standard error of {stderr}.")
    return {"value": value, "stderr": stderr, **more}


def milliseconds(one: Callable[[], Any], num: int, each: int) -> dict[str, Any]:
    """The median of the time that ``one`` takes, in ms for each of ``each`` samples, with the error of a median."""
    jax.block_until_ready(one())
    times = []
    for _ in range(num):
        began = time.perf_counter()
        jax.block_until_ready(one())
        times.append(1000 * (time.perf_counter() - began) / each)
    spread = np.subtract(*np.quantile(times, (0.75, 0.25))) / 1.349  # the standard deviation, if it were normal
    return cell(np.median(times), 1.2533 * spread / math.sqrt(num))


def measure(task: Task, model: Model, tools: Instruments, params: Any, seed: int, sizes: Sizes, judge: Any) -> Any:
    """What one trained model is like: for each way to sample its cells and a few samples in the original units."""
    key_shared, *keys = jax.random.split(jax.random.key(1000 + seed), 5)
    shared: Cells = {"nll": None}
    if tools.log_prob:
        x = task.test(key_shared, sizes.held_out)
        log_p, errors = tools.log_prob(params, jax.random.split(keys[0], len(x)), x)
        value, stderr = task.nll(log_p)
        numerical = 0.0 if model.bound else float(value - task.nll(log_p + errors)[0])  # in the unit of the task
        shared["nll"] = cell(value, math.hypot(stderr, numerical), **{"bound": True} if model.bound else {})
    lines = {}
    for name in model.samplers:
        many, alone = tools.many[name], tools.alone[name]
        z = jax.random.normal(keys[1], (sizes.samples if task.dims == 2 else BATCH, model.latent))
        own = jax.random.split(keys[2], len(z))
        parts = [many(params, own[i : i + BATCH], z[i : i + BATCH]) for i in range(0, len(z), BATCH)]
        x, evaluations = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
        cells: Cells = {
            "evaluations": cell(evaluations.mean(), evaluations.std(ddof=1) / math.sqrt(len(evaluations))),
            "ms_alone": milliseconds(lambda: alone(params, own[0], z[0]), 20, 1),  # noqa: B023
            "ms_together": milliseconds(lambda: many(params, own[:BATCH], z[:BATCH]), 3, BATCH),  # noqa: B023
        }
        samples = task.original(jnp.asarray(x))
        cells |= judge(keys[3], samples)
        cells |= shared
        cells["round_trip"] = round_trip(task, tools.trips.get(name), params, key_shared, sizes)
        cells["roughness"] = roughness(partial(many, params), keys[3], model.latent, sizes.paths)
        lines[name] = {"cells": cells, "samples": np.asarray(samples[: SHOWN[task.name]]).round(3).tolist()}
    return lines


SHOWN = {"gaussians": 1500, "digits": 32}


def round_trip(task: Task, trip: Callable | None, params: Any, key: Array, sizes: Sizes) -> dict[str, Any] | None:
    """sqrt E (decode(encode(x)) - x)^2 over examples held out and entries, with its error by the delta method."""
    if trip is None:
        return None
    x = task.test(key, sizes.held_out)
    squares = np.asarray(jnp.mean((trip(params, x) - x) ** 2, axis=1), np.float64)
    root = math.sqrt(squares.mean())
    return cell(root, squares.std(ddof=1) / math.sqrt(len(squares)) / (2 * max(root, 1e-300)))


def roughness(draw: Callable, key: Array, latent: int, num: int) -> dict[str, Any]:
    """sum |a_(i+1) - a_i|^2 / sum 2 (|a_(i+1)|^2 + |a_i|^2), which is (1 - correlation of a step with the next) / 2, of
    the steps a_i along quarters of a circle, which keep z ~ N(0, I); mean over paths, 0 for one that does not move.

    Its error holds where no path happened to jump: as if one path more had jumped.
    """
    key_ends, key_noise = jax.random.split(key)
    ends = jax.random.normal(key_ends, (2, num, 1, latent))
    angle = jnp.linspace(0.0, math.pi / 2, POINTS)[None, :, None]
    z = (jnp.cos(angle) * ends[0] + jnp.sin(angle) * ends[1]).reshape(-1, latent)
    own = jnp.repeat(jax.random.split(key_noise, num), POINTS)  # other noise is held along a path
    short = -len(z) % BATCH
    z, own = jnp.concatenate([z, z[:short]]), jnp.concatenate([own, own[:short]])
    parts = [draw(own[i : i + BATCH], z[i : i + BATCH])[0] for i in range(0, len(z), BATCH)]
    x = np.concatenate(parts).astype(np.float64)[: num * POINTS].reshape(num, POINTS, -1)
    step = np.diff(x, axis=1)
    turn = ((step[:, 1:] - step[:, :-1]) ** 2).sum((1, 2))
    most = 2 * (step[:, 1:] ** 2 + step[:, :-1] ** 2).sum((1, 2))
    each = np.divide(turn, most, out=np.zeros(num), where=most > 0)
    return cell(each.mean(), math.hypot(each.std(ddof=1) / math.sqrt(num), 0.5 / num))


def judge_gaussians(sizes: Sizes) -> Callable[[Array, Array], Cells]:
    """(key, samples) -> what they are like, against a density that is known."""
    density = datasets.gaussian_grid_density()
    grid = jax.jit(datasets.gaussian_grid, static_argnums=1)
    modes = jax.jit(lambda x: coverage.mode_coverage(x, density)[:3])
    distance = jax.jit(partial(metrics.sliced_wasserstein, num_projections=sizes.projections))
    told = jax.jit(lambda key, x, y: two_sample.classifier_test(key, x, y).accuracy)

    def judge(key: Array, x: Array) -> Cells:
        key_data, key_told, key_distance = jax.random.split(key, 3)
        data = grid(key_data, len(x))
        found, num = modes(x), sizes.compared
        return {
            "quality": cell(*found[1]),
            "modes": cell(*found[0]),
            "reverse_kl": cell(*found[2]),
            "sliced_wasserstein": cell(*distance(key_distance, x, data)),
            "told_apart": cell(*told(key_told, x[:num], data[:num])),
        }

    return judge


def judge_digits(sizes: Sizes) -> Callable[[Array, Array], Cells]:
    """(key, samples) -> what they are like, by the 24 features of a classifier that has seen no model."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    images = datasets.digits()
    train, test = (part.reshape(len(part), -1) / 16 for part in (images.train, images.test))
    network = MLPClassifier((128, 24), activation="tanh", learning_rate_init=3e-3, max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(train, images.train_labels)
    layers = [
        (w.astype(models.dtype()), b.astype(models.dtype()))
        for w, b in zip(network.coefs_, network.intercepts_, strict=True)
    ]

    def features(x: Array) -> Array:
        for weights, bias in layers[:-1]:
            x = jnp.tanh(x @ weights + bias[None])
        return x

    real = features(jnp.asarray(test, models.dtype()))

    @jax.jit
    def shares(key: Array, x: Array) -> Any:
        fake = features(x / 16)
        return (
            metrics.frechet_distance(fake, real),
            coverage.precision_recall(key, real, fake[: len(real)]),
            coverage.density_coverage(key, real, fake[: len(real)]),
        )

    def judge(key: Array, x: Array) -> Cells:
        frechet, both, covered = shares(key, x[: sizes.digits])
        return {
            "frechet": cell(*frechet),
            "precision": cell(*both.precision),
            "recall": cell(*both.recall),
            "coverage": cell(*covered.coverage),
        }

    return judge


JUDGES: dict[str, Callable[[Sizes], Any]] = {"gaussians": judge_gaussians, "digits": judge_digits}


def measure_data(task: Task, sizes: Sizes, judge: Any, seeds: int) -> list[dict[str, Any]]:
    """What a perfect model would have: fresh gaussians, or the digits of the training set."""
    found = []
    for seed in range(seeds):
        key, key_judge, key_test = jax.random.split(jax.random.key(2000 + seed), 3)
        x = task.original(jax.jit(task.batch, static_argnums=1)(key, sizes.samples if task.dims == 2 else BATCH))
        cells: Cells = {"evaluations": None, "ms_alone": None, "ms_together": None, **judge(key_judge, x)}
        known = task.best_nll
        nll = None if known is None else task.nll(jax.jit(jax.vmap(known))(task.test(key_test, sizes.held_out)))
        cells |= {"nll": None if nll is None else cell(*nll), "round_trip": None, "roughness": None}
        found.append({"cells": cells, "samples": np.asarray(x[: SHOWN[task.name]]).round(3).tolist()})
    return found


# ------------------------------------------------------------------------------------------------------------ table

COLUMNS = {
    "gaussians": {
        "evaluations": "evaluations",
        "ms_alone": "ms, alone",
        "ms_together": "ms, in 1000",
        "quality": "within 3 sd",
        "modes": "modes of 25",
        "reverse_kl": "reverse KL, nats",
        "sliced_wasserstein": "sliced W",
        "told_apart": "told apart",
        "nll": "NLL, nats",
        "round_trip": "round trip",
        "roughness": "roughness",
    },
    "digits": {
        "evaluations": "evaluations",
        "ms_alone": "ms, alone",
        "ms_together": "ms, in 1000",
        "precision": "precision",
        "frechet": "Frechet",
        "recall": "recall",
        "coverage": "coverage",
        "nll": "bits / dim",
        "round_trip": "round trip",
        "roughness": "roughness",
    },
}
LOGARITHMIC = {"evaluations", "ms_alone", "ms_together", "reverse_kl", "sliced_wasserstein", "round_trip", "frechet"}


def interval(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds and half of a 95 per cent interval: see the head of this script."""
    from scipy.stats import t as student

    values, errors = (np.asarray([one[name] for one in cells], np.float64) for name in ("value", "stderr"))
    num = len(values)
    over = student.ppf(0.975, num - 1) * values.std(ddof=1) / math.sqrt(num) if num > 1 else 0.0
    half = math.hypot(over, 1.96 * math.sqrt(np.mean(errors**2)))
    bound = {"bound": True} if cells[0].get("bound") else {}
    return {"value": values.mean(), "half": half, "values": values, "stderrs": errors, **bound}


def text(found: dict[str, Any] | None) -> str:
    """A cell for people: as many digits as its interval supports."""
    if found is None:
        return "none"
    value, half, least = found["value"], found["half"], "<= " if found.get("bound") else ""
    if 0 < half < 5e-5 and abs(value) < 1e-2:
        return f"{least}{value:.1e} +- {half:.0e}"
    places = min(max(0, 1 - math.floor(math.log10(half))), 6) if half > 0 else 0 if value == round(value) else 3
    return f"{least}{value:.{places}f} +- {half:.{places}f}"


def write_table(path: Path, table: dict[str, dict[str, Cells]], about: dict[str, str]) -> None:
    """The table as Markdown, one for each data set."""
    parts = []
    for data, lines in table.items():
        columns = COLUMNS[data]
        parts += [f"### {data}", "", about[data], "", f"| model | {' | '.join(columns.values())} |"]
        parts.append(f"|{' --- |' * (len(columns) + 1)}")
        parts += [f"| {title} | {' | '.join(text(cells[c]) for c in columns)} |" for title, cells in lines.items()]
        parts.append("")
    path.write_text("\n".join(parts), encoding="utf-8")


BLUE, GREY = "#0072B2", "#666666"


def figure_of(rows: int, columns: int, size: tuple[float, float], ratios: list[int] | None = None) -> Any:
    """A figure without a display, and its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": ratios})


def draw_table(path: Path, table: dict[str, dict[str, Cells]]) -> None:
    """One row a model, one column a quantity, a point with its interval and its numbers in each cell."""
    widest = max(len(COLUMNS[data]) for data in table)
    ratios = [len(lines) for lines in table.values()]
    figure, axes = figure_of(len(table), widest, (1.75 * widest + 1.5, 0.5 * sum(ratios) + 1.2), ratios)
    for row, (data, lines) in zip(axes, table.items(), strict=True):
        for panel in row[len(COLUMNS[data]) :]:
            panel.set_visible(False)
        for panel, (column, title) in zip(row, COLUMNS[data].items(), strict=False):
            found = [cells[column] for cells in lines.values()]
            shown = [(i, one) for i, one in enumerate(found) if one is not None]
            logarithmic = column in LOGARITHMIC and shown and all(one["value"] > 0 for _, one in shown)
            for i, one in shown:
                low = max(one["value"] - one["half"], one["value"] / 30) if logarithmic else one["value"] - one["half"]
                colour = GREY if list(lines)[i] == models.TITLES["data"] else BLUE
                panel.plot([low, one["value"] + one["half"]], [i, i], color=colour, linewidth=2, solid_capstyle="butt")
                panel.plot(one["value"], i, "o", color=colour, markersize=4)
            for i, one in enumerate(found):
                panel.annotate(
                    text(one).replace("+-", "±").replace("<=", "≤"), (0.5, i - 0.16),
                    xycoords=("axes fraction", "data"), ha="center", va="bottom", fontsize=6.5,
                    color="#222222" if one else "#999999",
                )  # fmt: skip
            if logarithmic:
                panel.set_xscale("log")
            panel.set_ylim(len(lines) - 0.5, -0.7)
            panel.set_yticks(range(len(lines)), list(lines) if panel is row[0] else [])
            panel.tick_params(length=0, labelsize=7)
            panel.minorticks_off()
            panel.set_title(title, fontsize=9)
            panel.grid(axis="y", color="#eeeeee")
            panel.spines[["top", "right", "left"]].set_visible(False)
        row[0].set_ylabel(data, fontsize=11)
        row[0].tick_params(axis="y", labelsize=8)
    figure.savefig(path)


def draw_samples(path: Path, samples: dict[str, dict[str, Any]]) -> None:
    """A panel a line: points in the plane, or 32 digits."""
    columns = max(map(len, samples.values()))
    figure, axes = figure_of(len(samples), columns, (1.6 * columns, 1.95 * len(samples)))
    for row, (data, lines) in zip(axes, samples.items(), strict=True):
        for panel, (title, x) in zip(row, lines.items(), strict=False):
            x = np.asarray(x)
            panel.set_title(title.replace(", ", ",\n").replace("denoising ", "denoising\n"), fontsize=7)
            panel.set(xticks=(), yticks=())
            if data == "gaussians":
                panel.scatter(*x.T, s=0.6, color=BLUE, linewidths=0)
                panel.set(xlim=(-5.2, 5.2), ylim=(-5.2, 5.2), aspect="equal")
            else:
                tiles = np.pad(x[:30].reshape(6, 5, 8, 8), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=16)
                wall = tiles.transpose(0, 2, 1, 3).reshape(54, 45)[:-1, :-1]
                panel.imshow(wall, cmap="gray", vmin=0, vmax=16, interpolation="nearest")
        for panel in row[len(lines) :]:
            panel.set_visible(False)
    figure.savefig(path)


# ------------------------------------------------------------------------------------------------------------- main


def progress(total: int) -> Callable[[str], None]:
    """What to call as one more is done: it says so, and the time that is left by the mean so far."""
    began, done = time.perf_counter(), 0

    def tell(message: str) -> None:
        nonlocal done
        done += 1
        left = (time.perf_counter() - began) / done * (total - done)
        runs.say(f"[{done}/{total}] {message}; about {left / 60:.0f} min left")

    return tell


def one_row(
    task: Task,
    row: Row,
    model: Model,
    folders: dict[int, Path],
    seconds: float,
    sizes: Sizes,
    judge: Any,
    tell: Callable[[str], None],
) -> None:
    """Trains and measures a model on a data set for each of these seeds; each ends in a file of its own."""
    began = time.perf_counter()
    chunk, tools = compiled(model), instruments(model)
    compiling = time.perf_counter() - began
    for seed, folder in folders.items():
        key = jax.random.fold_in(jax.random.key(seed), ROWS.index(row))
        params, steps, elapsed = train(model, chunk, key, seconds)
        lines = measure(task, model, tools, params, seed, sizes, judge)
        about = {"steps": steps, "seconds_training": elapsed, "seconds_compiling": compiling}
        num = sum(leaf.size for leaf in jax.tree.leaves(params))
        runs.write_metrics(folder, {"lines": lines, **about, "parameters": num})
        tell(f"{task.name}, {models.TITLES[row]}, seed {seed}: {steps} steps in {elapsed:.1f} s")


def main(config: Config) -> dict[str, Any]:
    """Trains and measures what is not done yet, then writes the table; returns its cells as text."""
    seconds, seeds = check(config)
    rows_of = Path(config.out).expanduser() / "rows"
    if rows_of.exists() and not config.resume:
        raise FileExistsError(f"{rows_of} holds rows of a run: add --resume to continue it, or choose another --out.")
    run = runs.open_run(config, may_differ=("seeds", "data", "rows"))
    sizes, began = QUICK if config.quick else FULL, time.perf_counter()

    def folder(data: str, row: str, seed: int) -> Path:
        return run.folder / "rows" / f"{data}-{row}-{seed}"

    left = {
        (data, row): {s: f for s in range(seeds) if not ((f := folder(data, row, s)) / "metrics.json").is_file()}
        for data in config.data
        for row in config.rows
    }
    tell = progress(sum(map(len, left.values())))
    table: dict[str, dict[str, Cells]] = {}
    samples: dict[str, dict[str, Any]] = {}
    about, spent = {}, []
    for data in config.data:
        task, judge = models.TASKS[data](), JUDGES[data](sizes)
        found = {models.TITLES["data"]: measure_data(task, sizes, judge, seeds)}
        for row in config.rows:
            if left[data, row]:
                options = {"beta": config.beta} if row == "vae" else {}
                one_row(task, row, models.BUILDERS[row](task, **options), left[data, row], seconds, sizes, judge, tell)
            files = [folder(data, row, seed) / "metrics.json" for seed in range(seeds)]
            ends = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            spent += [one["seconds_training"] for one in ends]
            for name in ends[0]["lines"]:
                title = f"{models.TITLES[row]}{', ' if name else ''}{name}"
                found[title] = [one["lines"][name] for one in ends]
        table[data] = {title: summary(data, each) for title, each in found.items()}
        samples[data] = {title: each[0]["samples"] for title, each in found.items()}
        about[data] = (
            f"{seconds:g} seconds of training, {seeds} seed{'s' if seeds > 1 else ''}; intervals of 95 per cent."
        )
    write_table(run.folder / "table.md", table, about)
    draw_table(run.folder / "table.png", table)
    draw_samples(run.folder / "samples.png", samples)
    took = {"seconds": time.perf_counter() - began, "seconds_training": spent}
    runs.write_metrics(run, {"table": table, **took})
    return {
        f"{data}: {title}": "; ".join(f"{COLUMNS[data][c]} {text(cells[c])}" for c in COLUMNS[data])
        for data, lines in table.items()
        for title, cells in lines.items()
    } | {"seconds": took["seconds"]}


def summary(data: str, each: list[dict[str, Any]]) -> Cells:
    """The cells of a line over its seeds."""
    cells = {column: [one["cells"][column] for one in each] for column in COLUMNS[data]}
    return {column: None if values[0] is None else interval(values) for column, values in cells.items()}


if __name__ == "__main__":
    runs.cli(main, Config)
