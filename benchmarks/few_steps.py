"""How near to the data do the samplers of ``dgm_jax.samplers`` come with few evaluations, and do they cost more?

    python benchmarks/few_steps.py

Work against precision, with the exact prediction for a rotated mixture in the plane on the vp path, so that all error
is the sampler's: every sampler with 5 to 100 evaluations, all on ``quadratic`` times down to 0, beside an adaptive
Diffrax solve of the probability flow at several tolerances and Euler-Maruyama of the reverse SDE. Two errors: the
sliced Wasserstein distance of the samples to independent draws of the data, which even other draws of the data do not
bring to zero; and for deterministic samplers the distance to where the flow itself ends from the same start.

Targets: DPM-Solver++(2M) with 10 evaluations is at most 1.5 times as far from the data, in sliced Wasserstein distance,
as ancestral sampling with 1,000; and the wall time of 64 samples of the size of the digits is at most 1.15 times the
evaluations of the network times the time of one, for every sampler, timed as in ``samplers.py``.

The first is a mean over many sets of samples, with its standard error: the distance of one set of exact samples is
chance, and strays by a third of its mean. There the grid is ``quadratic`` down to t = 0.02, for every number of
evaluations, beside others with 10. A last step down to 0 is of first order, and ends nearer to the mean of the data
than the data are; at t = 0.02 of vp, where sigma = 0.08, what is left of the noise costs less. It does tell with 50
evaluations and more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _timing import Ratio, measure, ratio, show, write
from jax.flatten_util import ravel_pytree

from dgm_jax import ddpm, densities, metrics, networks, runs, samplers, schedules, sdes, solvers
from dgm_jax.types import Array, VectorField

TARGET_TIME = 1.15
TARGET_DISTANCE = 1.5
SCHEDULE = schedules.vp()
MULTISTEP = "DPM-Solver++(2M)"
COMPARED = 10  # the evaluations with a target
GRIDS: dict[str, Callable[[int], Array]] = {  # the first is the one with the target
    "quadratic to 0.02": partial(samplers.quadratic, t_end=0.02),
    "quadratic to 0": samplers.quadratic,
    "log-SNR to 0.02": partial(samplers.log_snr, SCHEDULE, t_end=0.02),
    "log-SNR to 0.05, then 0": partial(samplers.log_snr, SCHEDULE, t_end=0.05, denoise=True),
    "Karras to 0.02, then 0": partial(samplers.karras, SCHEDULE, t_end=0.02, denoise=True),
}


@dataclass(frozen=True)
class Config:
    """Which budgets, how many samples, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    ways: tuple[int, ...] = ()
    """Which samplers, by their number in the table, from 0; none for all."""
    evaluations: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Budgets of each sampler."""
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """rtol and atol of the adaptive solves."""
    ancestral_steps: int = 1000
    """Of the ancestral sampler to compare with."""
    sets: int = 32
    """Of samples, for that comparison."""
    directions: int = 16
    """Of the sliced Wasserstein distance in that comparison: sets differ by far more than directions."""
    num: int = 20_000
    """Samples in the plane."""
    truth: int = 60_000
    """Draws of the data to which they are compared."""
    projections: int = 64
    """Of the sliced Wasserstein distance."""
    t_end: float = 1e-3
    """Where Euler-Maruyama ends: at 0 itself its drift is stiffest."""
    networks: tuple[str, ...] = ("unet", "mlp")
    """Whose evaluations are timed; none for no timing."""
    batch: int = 64
    """Samples that are timed."""
    unet_features: tuple[int, ...] = (32, 64)
    """Channels of the U-Net at its resolutions."""
    mlp_features: tuple[int, ...] = (512, 512, 512)
    """Widths of the MLP."""
    timed_evaluations: int = 20
    """Evaluations of each sampler that is timed."""
    repeats: int = 25
    """Rounds."""


# name -> the sampler as (key, model, schedule, x, times), its steps for a budget of evaluations, whether it is random
Sampler = tuple[Callable[..., Array], Callable[[int], int], bool]


def _each(budget: int) -> int:
    return budget


def _pairs(budget: int) -> int:
    return (budget + 1) // 2  # the last step, to 0, takes one


SAMPLERS: dict[str, Sampler] = {
    "DDIM": (lambda key, *a: samplers.ddim(None, *a), _each, False),
    "Heun in sigma": (lambda key, *a: samplers.heun(None, *a), _pairs, False),
    "DPM-Solver++(2S)": (lambda key, *a: samplers.dpm_solver_2s(*a), _pairs, False),
    MULTISTEP: (lambda key, *a: samplers.dpm_solver_2m(*a), _each, False),
    "Adams-Bashforth 2": (lambda key, *a: samplers.exponential_adams_bashforth(*a, order=2), _each, False),
    "Adams-Bashforth 3": (lambda key, *a: samplers.exponential_adams_bashforth(*a), lambda b: b - 1, False),
    "DDIM, eta = 1": (partial(samplers.ddim, eta=1.0), _each, True),
    "Euler, churn 10": (partial(samplers.euler, churn=10.0), _each, True),
    "Heun, churn 10": (partial(samplers.heun, churn=10.0), _pairs, True),
    "SDE-DPM-Solver++(2M)": (samplers.dpm_solver_2m_sde, _each, True),
    "predictor-corrector": (partial(samplers.predictor_corrector, snr=0.16), _pairs, True),
}


def chosen(config: Config) -> dict[str, Sampler]:
    """The samplers of the configuration."""
    names = list(SAMPLERS)
    return {names[i]: SAMPLERS[names[i]] for i in config.ways or range(len(names))}


def evaluations(name: str, num_steps: int) -> int:
    """How many evaluations a sampler makes in so many steps, of which the last goes to 0."""
    steps = SAMPLERS[name][1]
    return 2 * num_steps - 1 if steps is _pairs else num_steps + (name == "Adams-Bashforth 3")


def mixture() -> densities.Mixture:
    """Three Gaussians in the plane, of unequal weight, each turned its own way."""
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in (0.4, 1.3, 2.2)]
    covariances = np.stack([q @ np.diag([0.05, 0.4]) @ q.T for q in turns])
    means = np.array([[-1.5, 0.6], [1.2, 1.3], [0.4, -1.6]])
    return densities.Mixture(*(jnp.asarray(a, float) for a in ([0.2, 0.3, 0.5], means, covariances)))


class Samples(NamedTuple):
    """One set: draws of the data, where samplers begin, a key for each, and one for the distance."""

    truth: Array
    again: Array
    start: Array
    keys: Array
    key: Array


def draws(config: Config, density: densities.Mixture, key: Array) -> Samples:
    """A set of samples to begin with and to compare with."""
    keys = jax.random.split(key, 5)
    return Samples(
        densities.sample(keys[0], density, config.truth),
        densities.sample(keys[1], density, config.num),
        densities.sample(keys[2], densities.diffuse(density, SCHEDULE, jnp.ones(())), config.num),
        jax.random.split(keys[3], config.num),
        keys[4],
    )


def against_ancestral(config: Config) -> list[dict[str, Any]]:
    """Mean distances over several sets: the data to itself, ancestral sampling, and the multistep sampler by budget and
    grid; each over that of ancestral sampling, with its standard error to first order."""
    density = mixture()
    model = densities.noise(density, SCHEDULE)
    chain = ddpm.discretize(SCHEDULE, config.ancestral_steps)
    steps = ddpm.at_steps(densities.noise(density, ddpm.as_schedule(chain)), chain)
    far = jax.jit(partial(metrics.sliced_wasserstein, num_projections=config.directions))
    ancestral = jax.jit(jax.vmap(lambda k, x: ddpm.ancestral(k, steps, chain, x)))
    multistep = jax.jit(jax.vmap(lambda x, t: samplers.dpm_solver_2m(model, SCHEDULE, x, t), (0, None)))
    default, *others = GRIDS
    cases = [(default, budget) for budget in sorted({*config.evaluations, COMPARED})]
    cases += [(grid, COMPARED) for grid in others]
    distances = []
    for key in jax.random.split(jax.random.key(1), config.sets):
        drawn = draws(config, density, key)
        ways = [drawn.again, ancestral(drawn.keys, drawn.start)]
        ways += [multistep(drawn.start, GRIDS[grid](budget)) for grid, budget in cases]
        distances.append([float(far(drawn.key, drawn.truth, x)[0]) for x in ways])
    table = np.asarray(distances)
    unit = float(table[:, 1].mean())
    names = [("the data", 0), ("ancestral", config.ancestral_steps), *cases]
    rows = []
    for (way, count), mine in zip(names, table.T, strict=True):
        distance = float(mine.mean())
        spread = float((mine - distance / unit * table[:, 1]).std(ddof=1))
        rows.append({"way": way, "evaluations": count, "distance": distance, "ratio": distance / unit})
        rows[-1]["stderr"] = spread / (unit * config.sets**0.5)
    return rows


def work_and_precision(config: Config) -> list[dict[str, Any]]:
    """Every sampler at every budget, on one set of samples."""
    density = mixture()
    model = densities.noise(density, SCHEDULE)
    velocity = densities.velocity(density, SCHEDULE)
    truth, _, start, each, key = draws(config, density, jax.random.key(0))
    far = partial(jax.jit(partial(metrics.sliced_wasserstein, num_projections=config.projections)), key, truth)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def flow(x: Array, tolerance: Array) -> tuple[Array, Array]:
        solution = solvers.solve_ode(velocity, x, t0=1.0, t1=0.0, rtol=tolerance, atol=tolerance, throw=False)
        return solution.x, solution.nfe

    exact, _ = flow(start, jnp.asarray(1e-6))
    rows: list[dict[str, Any]] = []

    def add(name: str, cost: float, x: Array, random: bool) -> None:
        distance, stderr = map(float, far(x))
        error = None if random else float(jnp.sqrt(jnp.mean(jnp.sum((x - exact) ** 2, axis=1))))
        rows.append({"sampler": name, "evaluations": cost, "distance": distance, "stderr": stderr, "error": error})

    for name, (sampler, steps, random) in chosen(config).items():
        for budget in config.evaluations:
            num_steps = steps(budget)
            times = samplers.quadratic(num_steps)
            draw = jax.jit(jax.vmap(lambda k, x, f=sampler, t=times: f(k, model, SCHEDULE, x, t)))
            add(name, evaluations(name, num_steps), draw(each, start), random)
    for tolerance in config.tolerances:
        x, nfe = flow(start, jnp.asarray(tolerance))
        add("Diffrax Tsit5, adaptive", float(jnp.mean(nfe.astype(float))), x, False)
    reverse = sdes.reverse(sdes.diffusion_process(SCHEDULE), densities.score(density, SCHEDULE))
    for num_steps in config.evaluations:
        draw = jax.jit(
            jax.vmap(
                lambda k, x, n=num_steps: solvers.euler_maruyama(k, reverse, x, t0=1.0, t1=config.t_end, num_steps=n)
            )
        )
        add("Euler-Maruyama", num_steps, draw(each, start), True)
    return rows


def make_network(config: Config, name: str) -> tuple[VectorField, Any, Array]:
    """A noise prediction, parameters and a batch of noise. All weights are random, also those that start at zero."""
    if name == "unet":
        net: Any = networks.UNet(features=config.unet_features, max_frequency=10.0)
        shape: tuple[int, ...] = (8, 8, 1)
    elif name == "mlp":
        net = networks.MLP(config.mlp_features, jax.nn.silu, time_features=64, max_frequency=10.0)
        shape = (64,)
    else:
        raise ValueError(f'networks holds {name!r}, which is neither "unet" nor "mlp".')
    key_net, key_weights, key_x = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key_x, (config.batch, *shape))
    params, unflatten = ravel_pytree(net.init(key_net, jnp.zeros(()), x[0]))
    return networks.vector_field(net), unflatten(params + 0.03 * jax.random.normal(key_weights, params.shape)), x


def timed(config: Config, name: str) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Functions to time, and the evaluations of each sampler."""
    model, params, x = make_network(config, name)
    keys = jax.random.split(jax.random.key(1), config.batch)
    batched = jax.vmap(model, in_axes=(None, 0, None))

    def several(t: Array, x: Array, params: Any) -> Array:
        def one(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            t, x = state
            return 0.99 * t, x - 0.01 * batched(t, x, params)

        with jax.default_matmul_precision("highest"):
            return jax.lax.fori_loop(0, config.timed_evaluations, one, (t, x))[1]

    functions: dict[str, Callable[[], Any]] = {"evaluations": partial(jax.jit(several), jnp.asarray(0.5), x, params)}
    counts = {}
    for way, (sampler, steps, _) in chosen(config).items():
        num_steps = steps(config.timed_evaluations)
        times = samplers.quadratic(num_steps)
        draw = jax.vmap(lambda k, x, p, f=sampler, t=times: f(k, model, SCHEDULE, x, t, p), (0, 0, None))
        functions[way] = partial(jax.jit(draw), keys, x, params)
        counts[way] = evaluations(way, num_steps)
    return functions, counts


def draw_plot(
    config: Config, rows: list[dict[str, Any]], known: dict[str, float], ratios: dict[str, dict[str, Ratio]]
) -> Path:
    """Both errors against evaluations, and the times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5.2), layout="constrained")
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    colors = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))
    for name in names:
        mine = [row for row in rows if row["sampler"] == name]
        beside = name not in SAMPLERS
        style = {"color": colors[name], "label": name, "marker": "s" if beside else "o", "markersize": 4}
        style["linestyle"] = "--" if mine[0]["error"] is None else "-"
        style |= {"linewidth": 2.5, "color": "black" if mine[0]["error"] is not None else "gray"} if beside else {}
        axes[0].plot([row["evaluations"] for row in mine], [row["distance"] for row in mine], **style)
        if mine[0]["error"] is not None:
            axes[1].plot([row["evaluations"] for row in mine], [row["error"] for row in mine], **style)
    many = f"mean of {config.sets} sets"
    label = f"ancestral, {config.ancestral_steps}, {many}"
    axes[0].axhline(known["ancestral"], color="tab:red", linewidth=1, label=label)
    axes[0].axhline(known["the data"], color="tab:red", linewidth=1, linestyle=":", label=f"data to data, {many}")
    axes[0].set_title("every sampler from one set of noise", fontsize=9)
    for axis, label in zip(
        axes, ("sliced Wasserstein distance to the data", "distance to the flow's end"), strict=False
    ):
        axis.set(xscale="log", yscale="log", xlabel="evaluations", ylabel=label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    width = 0.8 / max(len(ratios), 1)
    for i, (network, values) in enumerate(ratios.items()):
        for j, way in enumerate(values):
            value, low, high = values[way]
            axes[2].barh(j + i * width, value, width, color=f"C{i}", label=network if j == 0 else None)
            axes[2].plot([low, high], [j + i * width] * 2, color="black", linewidth=1)
        axes[2].set_yticks(range(len(values)), list(values), fontsize=8)
    if ratios:
        axes[2].axvline(TARGET_TIME, color="tab:red")
        axes[2].invert_yaxis()
        axes[2].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(ratios), frameon=False)
    axes[2].set_xlabel("time / (evaluations x time of one); red: target, black: quartiles")
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "few_steps.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(config: Config) -> dict[str, Any]:
    """Measure errors and times; print, write and draw; return the figures that have targets."""
    rows, compared = work_and_precision(config), against_ancestral(config)
    known = {row["way"]: row["distance"] for row in compared[:2]}
    show(
        f"{config.num} samples of a mixture in the plane",
        ["sampler", "evaluations", "sliced Wasserstein", "its error", "distance to the flow's end"],
        [[*list(row.values())[:4], "" if row["error"] is None else row["error"]] for row in rows],
    )
    show(
        f"{MULTISTEP} against {config.ancestral_steps} ancestral steps, means over {config.sets} sets (target: at most "
        f"{TARGET_DISTANCE} with {COMPARED})",
        ["grid", "evaluations", "sliced Wasserstein", "over ancestral", "its error"],
        [list(row.values()) for row in compared],
    )
    against = {str(row["evaluations"]): row["ratio"] for row in compared if row["way"] == next(iter(GRIDS))}
    ratios: dict[str, dict[str, Ratio]] = {}
    timings: list[dict[str, Any]] = []
    for network in config.networks:
        functions, counts = timed(config, network)
        times = measure(functions, config.repeats)
        unit = times["evaluations"]
        ratios[network] = {}
        for way, count in counts.items():
            ratios[network][way] = ratio(times[way], unit, count / config.timed_evaluations)
            timings.append(
                {
                    "case": f"{network}, {way}",
                    "evaluations": count,
                    "one evaluation ms": 1e3 * unit.median / config.timed_evaluations,
                    "sampling ms": 1e3 * times[way].median,
                    "ratio": ratios[network][way].value,
                    "quartiles": ratios[network][way][1:],
                }
            )
    if timings:
        show(
            f"Sampling {config.batch} digits: times its evaluations (target: at most {TARGET_TIME})",
            ["case", "evaluations", "one evaluation ms", "sampling ms", "ratio", "quartiles"],
            [[*list(row.values())[:5], "{:.2f}-{:.2f}".format(*row["quartiles"])] for row in timings],
        )
    result = {
        "against_ancestral": against,
        "other_grids": {row["way"]: row["ratio"] for row in compared if row["way"] in list(GRIDS)[1:]},
        "worst_ratio": max((row["ratio"] for row in timings), default=None),
        "target_distance": TARGET_DISTANCE,
        "target_time": TARGET_TIME,
    }
    draw_plot(config, rows, known, ratios)
    write("few_steps", config, [*rows, *compared, *timings], result)
    return result


if __name__ == "__main__":
    runs.cli(main, Config)
