"""Kolmogorov-Fokker-Planck: do an SDE, its probability flow and the equation on a grid move one and the same density?

    python experiments/fokker_planck.py

carries a mixture of Gaussians from data to noise four ways, in one dimension and in two: the equation of Kolmogorov,
Fokker and Planck solved on a grid, paths of the SDE, paths of the probability flow from the same start, and the closed
form p_t. It trains nothing. runs/fokker_planck/ gets paths.png, plane.png and an animation, paths.gif; metrics.json has
the distances of all four at several times.
Expected: grid within 0.0004 of the closed form in 1-D and 0.004 in 2-D (of the largest density), mass kept to 1e-14,
nothing negative; the histograms of 100,000 paths of each kind within 0.0063 (1-D) and 0.021 (2-D) of the closed form in
total variation, where chance alone gives 0.0051 and 0.020. 45 seconds on one CPU core.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import densities, fokker_planck, runs, schedules, sdes, solvers
from dgm_jax.types import Array

SCHEDULES = {
    "vp": schedules.vp,
    "sub_vp": schedules.sub_vp,
    "ve": lambda: schedules.ve(0.05, 5.0),
    "cosine": schedules.cosine,
    "linear": schedules.linear,
}


@dataclass(frozen=True)
class Config:
    """Which process, and how finely it is followed."""

    out: str = "runs/fokker_planck"
    """Folder of the run."""
    seed: int = 0
    """Of all random numbers."""
    schedule: Literal["vp", "sub_vp", "ve", "cosine", "linear"] = "vp"
    """Path from data to noise; ve with noise from 0.05 to 5."""
    t_end: float = 0.6
    """When to stop, below 1: at 1 itself cosine and linear have infinite rates."""
    cells_line: int = 400
    """Cells of the grid in one dimension."""
    cells_plane: int = 120
    """Cells on each axis of the grid in two dimensions."""
    num_paths: int = 100_000
    """Paths of the SDE, and as many of the probability flow, in each dimension."""
    num_steps: int = 600
    """Steps of Euler-Maruyama."""
    rtol: float = 1e-5
    """Tolerance of the grid solution and of the probability flow, in time."""
    num_bins: int = 40
    """Bins of a histogram on each axis; cells should be a multiple of it."""
    frames: int = 41
    """Frames of the animation."""
    shown: int = 20
    """Paths drawn."""


def make_density(dim: int) -> densities.Mixture:
    """Unequal, rotated components."""
    if dim == 1:
        means, variances = jnp.asarray([[-1.6], [0.2], [1.9]]), jnp.asarray([0.06, 0.15, 0.1])
        return densities.Mixture(jnp.asarray([0.5, 0.2, 0.3]), means, variances[:, None, None])
    angles = jnp.asarray([0.5, 1.9, -0.6])
    turns = jnp.stack([jnp.cos(angles), -jnp.sin(angles), jnp.sin(angles), jnp.cos(angles)], axis=1).reshape(3, 2, 2)
    spectrum = jnp.diag(jnp.asarray([0.5, 0.07]))
    covariances = jnp.einsum("kij,jl,kml->kim", turns, spectrum, turns)
    covariances = 0.5 * (covariances + jnp.swapaxes(covariances, 1, 2))
    return densities.Mixture(
        jnp.asarray([0.5, 0.3, 0.2]), jnp.asarray([[-1.2, -0.8], [1.3, 1.0], [1.2, -1.5]]), covariances
    )


class Process(NamedTuple):
    """One density on its way, in every form: on the grid at the times asked for, and as paths."""

    grid: fokker_planck.Grid
    times: np.ndarray  # [times]
    exact: np.ndarray  # [times, *num]
    found: fokker_planck.Evolution  # its ps at the times
    paths: dict[str, np.ndarray]  # sde and flow: [times, paths, d]
    seconds: dict[str, float]


def follow(config: Config, dim: int, times: np.ndarray) -> Process:
    """Solves for the density and the paths at the times, of which the first is 0."""
    schedule, density = SCHEDULES[config.schedule](), make_density(dim)
    sde, score = sdes.diffusion_process(schedule), densities.score(density, schedule)
    flow, log_p = sdes.probability_flow(sde, score), densities.log_density(density, schedule)
    last = densities.diffuse(density, schedule, jnp.asarray(config.t_end))
    reach = 2.0 + 4.5 * math.sqrt(float(jnp.max(jnp.diagonal(densities.covariance(last)))))
    num = config.cells_line if dim == 1 else config.cells_plane
    grid = fokker_planck.Grid((-reach,) * dim, (reach,) * dim, (num,) * dim)
    at = jnp.asarray(times)

    @jax.jit
    def on_grid(x: Array) -> Array:
        each = jax.vmap(lambda t, x: jnp.exp(log_p(t, x, None)), (None, 0))
        return jax.lax.map(lambda t: each(t, x.reshape(-1, dim)).reshape(x.shape[:-1]), at)

    @jax.jit
    def solve(p0: Array) -> fokker_planck.Evolution:
        options: dict[str, Any] = {"rtol": config.rtol, "atol": 1e-2 * config.rtol, "throw": False}
        return fokker_planck.evolve(sde, p0, grid, t0=times[0], t1=times[-1], ts=at, **options)

    # the steps of Euler-Maruyama are a whole number between any two times
    between = max(1, round(config.num_steps / (len(times) - 1)))

    @jax.jit
    def by_sde(key: Array, x: Array) -> Array:
        def leg(x: Array, row: tuple[Array, ...]) -> tuple[Array, Array]:
            key, start, end = row
            steps = partial(solvers.euler_maruyama, t0=start, t1=end, num_steps=between)
            x = jax.vmap(lambda key, x: steps(key, sde, x))(jax.random.split(key, len(x)), x)
            return x, x

        return jax.lax.scan(leg, x, (jax.random.split(key, len(times) - 1), at[:-1], at[1:]))[1]

    @jax.jit
    def by_flow(x: Array) -> Array:
        tolerance: dict[str, Any] = {"rtol": config.rtol, "atol": config.rtol, "throw": False}
        one = partial(solvers.solve_ode, flow, t0=times[0], t1=times[-1], ts=at[1:], **tolerance)
        return jnp.moveaxis(jax.lax.map(lambda x: one(x).xs, x, batch_size=1000), 0, 1)

    seconds: dict[str, float] = {}

    def clock(name: str, value: Any) -> Any:
        value = jax.block_until_ready(value)
        seconds[name] = time.perf_counter() - began - sum(seconds.values())
        runs.say(f"{dim}-D {name}: {seconds[name]:.1f} s")
        return value

    began = time.perf_counter()
    exact = clock("closed_form", on_grid(fokker_planck.cells(grid)))
    found = clock("grid", solve(exact[0]))
    fokker_planck.raise_if_too_coarse(found, grid)
    key_start, key_sde = jax.random.split(jax.random.key(config.seed + dim))
    start = densities.sample(key_start, density, config.num_paths)
    ends = {"sde": clock("sde", by_sde(key_sde, start)), "flow": clock("flow", by_flow(start))}
    paths = {name: np.concatenate([np.asarray(start)[None], np.asarray(x)]) for name, x in ends.items()}
    return Process(grid, times, np.asarray(exact), found, paths, seconds)


def binned(process: Process, p: np.ndarray, bins: int) -> np.ndarray:
    """The mass of a density in each bin: of cells, together."""
    p = np.asarray(p) * math.prod(fokker_planck.spacing(process.grid))
    for axis in range(p.ndim):
        p = np.add.reduceat(p, np.linspace(0, p.shape[axis], bins, endpoint=False).astype(int), axis=axis)
    return p


def counted(process: Process, x: np.ndarray, bins: int) -> np.ndarray:
    """The share of the points in each bin; those beyond the walls are in none."""
    edges = []
    for low, h, num in zip(process.grid.low, fokker_planck.spacing(process.grid), process.grid.num, strict=True):
        edges.append(low + h * np.append(np.linspace(0, num, bins, endpoint=False).astype(int), num))
    return np.histogramdd(x, edges)[0] / len(x)


def compare(process: Process, config: Config, shown: list[int]) -> dict[str, Any]:
    """Distances between the four at the times of those indices, with what chance alone would give."""
    name, rows = ("line", "plane")[len(process.grid.num) - 1], []
    for k in shown:
        exact, p = process.exact[k], np.asarray(process.found.ps[k])
        masses = {"exact": binned(process, exact, config.num_bins), "grid": binned(process, p, config.num_bins)}
        masses |= {name: counted(process, x[k], config.num_bins) for name, x in process.paths.items()}
        row = {
            "times": process.times[k],
            "grid_error": np.max(np.abs(p - exact)) / np.max(exact),  # of the largest density
            "mass_lost": abs(np.sum(p) / np.sum(process.exact[0]) - 1),
            "least_density": np.min(p),
        }
        for one, other in (("grid", "exact"), ("sde", "exact"), ("flow", "exact"), ("sde", "grid"), ("sde", "flow")):
            row[f"distance_{one}_{other}"] = 0.5 * np.sum(np.abs(masses[one] - masses[other]))  # total variation
        m, num = masses["exact"], config.num_paths
        row["distance_by_chance"] = 0.5 * np.sum(np.sqrt(2 * m * (1 - m) / (np.pi * num)))  # of num exact points
        for one in process.paths:  # Pearson's chi^2 over bins of 20 points or more, as a z-score
            kept = num * m >= 20
            chi2 = num * np.sum((masses[one][kept] - m[kept]) ** 2 / (m * (1 - m))[kept])
            row[f"chi2_z_{one}"] = (chi2 - kept.sum()) / math.sqrt(2 * kept.sum())
        rows.append(row)
    results: dict[str, Any] = {f"{name}_{key}": [float(f"{row[key]:.4g}") for row in rows] for key in rows[0]}
    return results | {
        f"{name}_wall_share": float(process.found.wall),
        f"{name}_spacings_a_width": float(jnp.min(process.found.width)),
        f"{name}_peclet": float(jnp.max(process.found.peclet)),
        f"{name}_steps_in_time": int(process.found.num_steps),
    }


BOTH = (
    ("sde", "SDE: dx = f dt + g dw", "#D55E00"),
    ("flow", "probability flow: dx/dt = f - ½ g² grad log p", "#0072B2"),
)
STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def new_figure(width: float, height: float) -> Any:
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def backdrop(axes: Any, process: Process, title: str) -> None:
    """p_t(x) from the grid, time to the right, on a scale that shows small densities too."""
    x = np.asarray(fokker_planck.cells(process.grid))[:, 0]
    p = np.asarray(process.found.ps).T
    axes.contourf(process.times, x, np.sqrt(p / p.max()), levels=np.linspace(0, 1, 9), cmap="Greys", vmax=1.6)
    axes.set(title=title, xlabel="t", xlim=(process.times[0], process.times[-1]), ylim=(-3.2, 3.2))


def marginal(axes: Any, process: Process, k: int, bins: int) -> None:
    """p_t four ways at one time."""
    h = fokker_planck.spacing(process.grid)[0]
    x = np.asarray(fokker_planck.cells(process.grid))[:, 0]
    edges = process.grid.low[0] + h * np.append(np.linspace(0, len(x), bins, endpoint=False).astype(int), len(x))
    for name, title, color in BOTH:
        shares = counted(process, process.paths[name][k], bins)
        axes.stairs(shares / np.diff(edges), edges, color=color, lw=1.2, label=f"{title.split(':')[0]}, histogram")
    axes.plot(x, process.exact[k], color="#444444", lw=2.5, alpha=0.35, label="closed form")
    axes.plot(x, process.found.ps[k], color="black", lw=1, ls="--", label="grid")
    axes.set(xlim=(-3.2, 3.2), yticks=[])


def draw_line(path: Path, process: Process, config: Config) -> None:
    """Paths of both over p_t, and four marginals."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(12, 4.6)
        grid = figure.add_gridspec(4, 3, width_ratios=(1, 1, 0.9))
        for column, (name, title, color) in enumerate(BOTH):
            axes = figure.add_subplot(grid[:, column])
            backdrop(axes, process, title)
            axes.plot(process.times, process.paths[name][:, : config.shown, 0], color=color, lw=0.8)
            axes.set_ylabel("x" if column == 0 else "")
        for row, k in enumerate(np.linspace(0, len(process.times) - 1, 4).round().astype(int)):
            axes = figure.add_subplot(grid[row, 2])
            marginal(axes, process, k, 2 * config.num_bins)
            axes.text(0.02, 0.8, f"t = {process.times[k]:.2f}", transform=axes.transAxes)
            if row == 0:
                axes.legend(fontsize=6.5, loc="upper right", borderpad=0)
            if row < 3:
                axes.set_xticklabels([])
        figure.savefig(path, dpi=100)


def animate(path: Path, process: Process, config: Config) -> None:
    """The same in motion: paths as they grow, and the density that both have."""
    import matplotlib
    from PIL import Image  # comes with Matplotlib

    frames = []
    with matplotlib.rc_context(STYLE):
        figure = new_figure(9, 3)
        figure.set_dpi(100)
        panels = figure.subplots(1, 3)
        drawn = []
        for axes, (name, title, color) in zip(panels, BOTH, strict=False):
            backdrop(axes, process, title.split(":")[0])
            line, dots = axes.plot([], [], color=color, lw=0.8)[0], axes.plot([], [], "o", color=color, ms=3)[0]
            drawn.append((name, line, dots))
        for k, t in enumerate(process.times):
            for name, line, dots in drawn:
                x = process.paths[name][: k + 1, : config.shown, 0]
                lifted = np.concatenate([x, np.full_like(x[:1], np.nan)])  # one line, with a gap after each path
                line.set_data(np.tile(np.append(process.times[: k + 1], np.nan), x.shape[1]), lifted.T.ravel())
                dots.set_data(np.full(x.shape[1], t), x[-1])
            panels[2].clear()
            marginal(panels[2], process, k, config.num_bins)
            panels[2].set(title=f"p_t at t = {t:.2f}", ylim=(0, 1.1 * process.exact.max()), xlabel="x")
            panels[2].legend(fontsize=7, loc="upper right")
            figure.canvas.draw()
            frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()))
    palette = frames[-1].quantize(64)  # one for all frames, so that only what moves is stored
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=[100] * len(rest) + [2000], loop=0, optimize=True)


def draw_plane(path: Path, process: Process, config: Config, shown: list[int]) -> None:
    """p_t in the plane: a row for each of the four, a column for each time."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(2.1 * len(shown), 8.8)
        figure.suptitle("p_t in the plane, four ways (colour: its square root)")
        panels = figure.subplots(4, len(shown), squeeze=False)
        (low, _), (high, _), bins = process.grid.low, process.grid.high, config.cells_plane // 2
        area = ((high - low) / bins) ** 2
        for column, k in enumerate(shown):
            counts = {name: counted(process, x[k], bins) / area for name, x in process.paths.items()}
            rows = {"closed form": process.exact[k], "grid": process.found.ps[k]}
            rows |= {"SDE, histogram": counts["sde"], "probability flow, histogram": counts["flow"]}
            for row, (name, p) in enumerate(rows.items()):
                axes = panels[row, column]
                top = np.sqrt(process.exact[k].max())
                image = np.sqrt(np.asarray(p)).T
                axes.imshow(image, origin="lower", extent=(low, high, low, high), vmin=0, vmax=top, cmap="viridis")
                axes.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), xticks=[], yticks=[])
                axes.set_title(f"t = {process.times[k]:.2f}" if row == 0 else "")
                axes.set_ylabel(name if column == 0 else "")
        figure.savefig(path, dpi=100)


def main(config: Config) -> dict[str, Any]:
    """Follows, compares and draws; returns what metrics.json holds."""
    if not 0 < config.t_end < 1:
        raise ValueError(f"t_end must be above 0 and below 1, got {config.t_end}.")
    for name, least in (("frames", 5), ("num_paths", 1), ("num_steps", 1), ("shown", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}.")
    fewest = min(config.cells_line, config.cells_plane)
    if not 2 <= config.num_bins <= fewest:
        raise ValueError(f"num_bins must be from 2 to the number of cells on an axis, {fewest}, got {config.num_bins}.")
    jax.config.update("jax_enable_x64", True)  # for mass is kept to rounding
    run, began, cpu = runs.open_run(config), time.perf_counter(), time.process_time()
    line = follow(config, 1, np.linspace(0.0, config.t_end, config.frames))
    # more of it happens early
    plane = follow(config, 2, config.t_end * np.linspace(0.0, 1.0, 5) ** 1.5)
    shown = np.linspace(0, config.frames - 1, 5).round().astype(int).tolist()
    results = compare(line, config, shown) | compare(plane, config, list(range(5)))
    draw_line(run.folder / "paths.png", line, config)
    draw_plane(run.folder / "plane.png", plane, config, list(range(5)))
    animate(run.folder / "paths.gif", line, config)
    for process, where in ((line, "line"), (plane, "plane")):
        results |= {f"{where}_seconds_{name}": value for name, value in process.seconds.items()}
    results |= {"seconds": time.perf_counter() - began, "seconds_of_processor": time.process_time() - cpu}
    return runs.write_metrics(run, results)


if __name__ == "__main__":
    runs.cli(main, Config)
