"""SDE basics: does Euler's scheme converge as fast as theory says, and do reverse SDE and probability flow share p_t?

    python experiments/sde_basics.py

writes to runs/sde_basics/ the numbers (metrics.json) and three pictures:

1. wiener.png: Wiener paths, and the three properties that define them, each as z-scores of what it predicts.
2. orders.png: strong error E|x_h - x| on the same Wiener paths, and weak error |E phi(x_h) - E phi(x)| for phi = x and
   x^2, against the step h, for two SDEs with a solution in closed form. The noise of geometric Brownian motion is
   multiplicative, that of Ornstein-Uhlenbeck additive.
3. marginals.png: one density p_t and four processes on it: forward SDE, reverse SDE and probability flow with the exact
   score, and Langevin's SDE, which leaves the density as it is.

Expected: strong order 0.507 +- 0.002 and 1.005 +- 0.002 (theory 1/2 and 1; the steps are not infinitely small), weak
orders within 0.005 of 1, no z-score beyond 3.2, Kolmogorov's distances to p_t no larger than chance makes them; 32
seconds of processor time.
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import densities, metrics, runs, schedules, sdes, solvers
from dgm_jax.types import SDE, Array, Schedule


@dataclass(frozen=True)
class Config:
    """How many paths and steps."""

    out: str = "runs/sde_basics"
    """Folder of the run."""
    seed: int = 0
    """Of all random numbers."""
    wiener_paths: int = 20_000
    """Wiener paths in the plane, on 64 steps over [0, 1]."""
    powers: tuple[int, ...] = (5, 6, 7, 8, 9, 10, 11)
    """The step sizes of the orders are 2^-power, rising powers."""
    replicates: int = 16
    """Independent fits of the strong order, whose spread is its error."""
    paths: int = 500
    """Paths in each of them."""
    marginal_paths: int = 5000
    """Paths of each process beside p_t."""
    sampler_steps: int = 1000
    """Steps of Euler-Maruyama over [0, 1], forwards and in reverse."""
    langevin_time: float = 30.0
    """How long Langevin's SDE runs, in steps of 0.01."""


# ------------------------------------------------------------------------------------------------- Wiener process


def wiener_process(key: Array, num_paths: int, num_steps: int) -> tuple[Array, Array]:
    """dw alone, as SDESolve draws it: times ``[num_steps + 1]`` and paths ``[num_paths, num_steps + 1, 2]``."""
    sde = SDE(lambda t, x, args: jnp.zeros_like(x), lambda t, x, args: jnp.ones((), x.dtype))

    def path(key: Array) -> tuple[Array, Array]:
        return solvers.euler_maruyama(key, sde, jnp.zeros(2), t0=0.0, t1=1.0, num_steps=num_steps, path=True)

    times, paths = jax.jit(jax.vmap(path))(jax.random.split(key, num_paths))
    return times[0], paths


def judge_wiener(times: Array, paths: Array) -> dict[str, Any]:
    """The three properties in z-scores, over eight increments and, for the variance t - s, over lags too.

    1. w(0) = 0, exactly.
    2. Increments over disjoint times, of both coordinates: their correlations are 0, with standard error 1 / sqrt(n).
    3. w(t) - w(s): mean 0; variance t - s (standard error sqrt(2 / n) of it); fourth moment 3 (t - s)^2
       (sqrt(96 / n)), as that of a Gaussian.
    """
    num, last = paths.shape[0], paths.shape[1] - 1
    bounds = np.arange(9) * last // 8
    t, w = np.asarray(times, np.float64), np.asarray(paths, np.float64)
    increments = np.diff(w[:, bounds], axis=1) / np.sqrt(np.diff(t[bounds]))[:, None]  # standard normal
    flat = increments.reshape(num, -1)
    upper = np.triu_indices(flat.shape[1], 1)
    lags = 2 ** np.arange(int(math.log2(last)) + 1)
    variances = np.stack([np.var(w[:, last] - w[:, last - lag], axis=0) for lag in lags])  # [lags, 2]
    z = {
        "mean": flat.mean(axis=0) * math.sqrt(num),
        "variance": ((flat**2).mean(axis=0) - 1) / math.sqrt(2 / num),
        "fourth_moment": ((flat**4).mean(axis=0) - 3) / math.sqrt(96 / num),
        "correlation": np.asarray(np.corrcoef(flat.T))[upper] * math.sqrt(num),
        "variance_over_lags": ((variances / (t[last] - t[last - lags])[:, None] - 1) / math.sqrt(2 / num)).ravel(),
    }
    return {
        "wiener_start": float(np.abs(w[:, 0]).max()),
        **{f"wiener_largest_z_{name}": float(np.abs(scores).max()) for name, scores in z.items()},
        "wiener_comparisons": sum(scores.size for scores in z.values()),
        "wiener_variance_per_time": variances.mean(axis=1) / (t[last] - t[last - lags]),
        "wiener_variance_lags": t[last] - t[last - lags],
    }


# --------------------------------------------------------------------------------------------- strong and weak order


def euler_step(sde: SDE, t: Array, x: Array, dt: Array, dw: Array) -> Array:
    """x(t + dt) = x(t) + f(t, x) dt + g(t, x) dw."""
    return x + sde.drift(t, x, None) * dt + sde.diffusion(t, x, None) * dw


def scheme(sde: SDE, x0: Array, increments: Array, *, t1: float = 1.0) -> Array:
    """Euler-Maruyama from t = 0 to t1 over given Wiener increments ``[num_steps, *event]``."""
    dt = jnp.asarray(t1 / increments.shape[0], x0.dtype)

    def step(carry: tuple[Array, Array], dw: Array) -> tuple[tuple[Array, Array], None]:
        n, x = carry
        return (n + 1, euler_step(sde, n.astype(x.dtype) * dt, x, dt, dw)), None

    return jax.lax.scan(step, (jnp.int32(0), x0), increments)[0][1]


def moments(sde: SDE, x0: Array, num_steps: int, *, t1: float = 1.0) -> tuple[Array, Array]:
    """Mean and variance of the scheme at t1, exactly, for coordinates that each go their own way.

    Where drift and diffusion are affine, a step is affine in x and in the noise, and its first two moments depend on
    no more than theirs: the mean over x = mean +- deviation and dw = +- sqrt(dt) is the expectation.
    """
    dt = jnp.asarray(t1 / num_steps, x0.dtype)
    signs = jnp.asarray([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], x0.dtype)

    def step(n: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        mean, variance = state
        t, deviation = n.astype(x0.dtype) * dt, jnp.sqrt(variance)
        ends = jax.vmap(
            lambda s: euler_step(sde, t, mean + s[0] * deviation, dt, s[1] * jnp.sqrt(dt) * jnp.ones_like(mean))
        )(signs)
        return ends.mean(0), ends.var(0)

    return jax.lax.fori_loop(0, num_steps, step, (x0, jnp.zeros_like(x0)))


class Problem(NamedTuple):
    """An SDE with a solution in closed form on the same Wiener path, over [0, 1]."""

    sde: SDE
    x0: Array
    solution: Callable[[Array, Array], Array]  # increments [n, d], independent normals [n, d] -> x(1) [d]
    moments: tuple[Array, Array]  # mean and variance of x(1) [d]
    mean_square: Callable[[int], Array]  # steps -> E|x_h(1) - x(1)|^2


def geometric_brownian_motion(rate: Array, noise: Array, x0: Array) -> Problem:
    """dx = rate x dt + noise x dw, so that x(1) = x_0 exp(rate - noise^2 / 2 + noise w(1))."""
    sde = SDE(lambda t, x, args: rate * x, lambda t, x, args: noise * x)
    mean = x0 * jnp.exp(rate)

    def mean_square(n: int) -> Array:  # E x_h^2 - 2 E x_h x + E x^2, where each is a product of n equal factors
        h = 1 / n
        euler = ((1 + rate * h) ** 2 + noise**2 * h) ** n
        both = (jnp.exp(rate * h) * (1 + rate * h + noise**2 * h)) ** n
        return jnp.sum(x0**2 * (euler - 2 * both + jnp.exp(2 * rate + noise**2)))

    return Problem(
        sde,
        x0,
        lambda dw, spare: x0 * jnp.exp(rate - noise**2 / 2 + noise * dw.sum(0)),
        (mean, mean**2 * jnp.expm1(noise**2)),
        mean_square,
    )


def ornstein_uhlenbeck(rate: Array, centre: Array, noise: Array, x0: Array) -> Problem:
    """dx = rate (centre - x) dt + noise dw.

    x(1) = centre + (x_0 - centre) exp(-rate) + noise int exp(-rate (1 - t)) dw(t). Over a step h the integral of
    exp(-rate (h - s)) dw(s) is Gaussian with variance (1 - exp(-2 rate h)) / (2 rate), and has covariance
    (1 - exp(-rate h)) / rate with the increment of w itself.
    """
    end = jnp.exp(-rate)

    def step(h: float) -> tuple[Array, Array]:
        return -jnp.expm1(-2 * rate * h) / (2 * rate), -jnp.expm1(-rate * h) / rate

    def solution(dw: Array, spare: Array) -> Array:
        n = dw.shape[0]
        variance, covariance = step(1 / n)
        later = jnp.arange(n - 1.0, -1.0, -1.0, dw.dtype) / n

        def one(dw: Array, spare: Array, variance: Array, covariance: Array, rate: Array) -> Array:
            integrals = covariance * n * dw + jnp.sqrt(variance - covariance**2 * n) * spare
            return jnp.sum(jnp.exp(-rate * later) * integrals)

        return (
            centre + (x0 - centre) * end + noise * jax.vmap(one, (1, 1, 0, 0, 0))(dw, spare, variance, covariance, rate)
        )

    def mean_square(n: int) -> Array:  # bias^2 + variance; the noise of a step decays by a factor in every later one
        variance, covariance = step(1 / n)
        euler, exact = 1 - rate / n, jnp.exp(-rate / n)
        left = [(1 - r**n) / (1 - r) for r in (euler**2, euler * exact, exact**2)]
        spread = left[0] / n - 2 * left[1] * covariance + left[2] * variance
        return jnp.sum(((x0 - centre) * (euler**n - end)) ** 2 + noise**2 * spread)

    exact_moments = centre + (x0 - centre) * end, noise**2 * step(1.0)[0]
    return Problem(sdes.ornstein_uhlenbeck(rate, centre, noise), x0, solution, exact_moments, mean_square)


def problems() -> dict[str, Problem]:
    """One of each kind, in two dimensions."""
    x0 = jnp.asarray([1.0, -0.7])
    return {
        "multiplicative": geometric_brownian_motion(jnp.asarray([-0.5, 0.3]), jnp.asarray([0.6, 0.4]), x0),
        "additive": ornstein_uhlenbeck(jnp.asarray([1.0, 2.0]), jnp.asarray([0.3, -1.0]), jnp.asarray([0.5, 1.0]), x0),
    }


def slope(steps: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Of log error against log step, by least squares: errors ``[..., num]``, steps ``[num]``."""
    x = np.log(steps) - np.log(steps).mean()
    return np.log(errors) @ x / (x @ x)


def paths_at_every_step(problem: Problem, key: Array, num: int, powers: tuple[int, ...]) -> tuple[Array, Array]:
    """x_h(1) for every step size ``[num, powers, d]`` and x(1) ``[num, d]``, all on the same Wiener paths."""
    finest = 2 ** powers[-1]

    def one(key: Array) -> tuple[Array, Array]:
        dw, spare = jax.random.normal(key, (2, finest, *problem.x0.shape), problem.x0.dtype)
        dw = dw / math.sqrt(finest)
        coarser = [dw.reshape(2**power, -1, *problem.x0.shape).sum(1) for power in powers]
        return jnp.stack([scheme(problem.sde, problem.x0, each) for each in coarser]), problem.solution(dw, spare)

    return jax.lax.map(one, jax.random.split(key, num), batch_size=min(num, 500))


def judge_orders(problem: Problem, key: Array, config: Config) -> dict[str, Any]:
    """Strong order by paths, weak order by the scheme's exact moments, and the paths against both closed forms."""
    h = 2.0 ** -np.asarray(config.powers, float)
    sample = jax.jit(lambda key: paths_at_every_step(problem, key, config.paths, config.powers))
    ends, exact = (np.stack(x) for x in zip(*map(sample, jax.random.split(key, config.replicates)), strict=True))
    squares = ((ends - exact[:, :, None]) ** 2).sum(-1)  # [replicates, paths, powers]
    strong = np.sqrt(squares).mean(1)
    slopes = slope(h, strong)

    def z(values: np.ndarray, expected: Any, axes: tuple[int, ...] = (0, 1)) -> np.ndarray:
        num = math.prod(values.shape[axis] for axis in axes)
        return (values.mean(axes) - np.asarray(expected)) / (values.std(axes) / math.sqrt(num))

    chain = [jax.jit(moments, static_argnums=(0, 2))(problem.sde, problem.x0, 2**power) for power in config.powers]
    first, second = (np.stack([m for m, _ in chain]), np.stack([m**2 + v for m, v in chain]))
    mean, variance = (np.asarray(value) for value in problem.moments)
    weak = {"mean": np.abs(first - mean).sum(1), "square": np.abs(second - mean**2 - variance).sum(1)}
    expected = np.asarray([problem.mean_square(2**power) for power in config.powers])
    return {
        "steps": h,
        "strong_error": strong.mean(0),
        "strong_error_stderr": strong.std(0, ddof=1) / math.sqrt(len(strong)),
        "strong_order": float(slopes.mean()),
        "strong_order_stderr": float(slopes.std(ddof=1) / math.sqrt(len(slopes))),
        "root_mean_square_error": np.sqrt(expected),
        "root_mean_square_order": float(slope(h, np.sqrt(expected))),
        "largest_z_mean_square": float(np.abs(z(squares, expected)).max()),
        **{f"weak_error_{name}": errors for name, errors in weak.items()},
        **{f"weak_order_{name}": float(slope(h, errors)) for name, errors in weak.items()},
        **{f"weak_order_{name}_of_the_finest": float(slope(h[-2:], errors[-2:])) for name, errors in weak.items()},
        "largest_z_moments_of_the_scheme": float(
            max(np.abs(z(ends**k, m)).max() for k, m in ((1, first), (2, second)))
        ),
        "largest_z_moments_of_the_solution": float(
            max(np.abs(z(exact, mean)).max(), np.abs(z(exact**2, mean**2 + variance)).max())
        ),
    }


# ------------------------------------------------------------------------------------------------- shared marginals

WEIGHTS, MEANS, VARIANCES = np.array([0.3, 0.7]), np.array([-1.3, 1.0]), np.array([0.09, 0.16])
"""The data: a mixture in one dimension, so that p_t can be drawn over (t, x)."""


def data_density() -> densities.Mixture:
    """The mixture as the library takes it."""
    return densities.Mixture(jnp.asarray(WEIGHTS), jnp.asarray(MEANS)[:, None], jnp.asarray(VARIANCES)[:, None, None])


def distribution(t: float, x: np.ndarray, schedule: Schedule) -> np.ndarray:
    """The distribution function of p_t at the points x."""
    alpha, variance = float(jnp.exp(schedule.log_alpha(jnp.asarray(t)))), float(schedule.variance(jnp.asarray(t)))
    means, widths = alpha * MEANS, np.sqrt(alpha**2 * VARIANCES + variance)
    normal = np.vectorize(math.erfc)(-(x[:, None] - means) / widths / math.sqrt(2)) / 2
    return normal @ WEIGHTS


def kolmogorov(values: np.ndarray) -> tuple[float, float]:
    """Distance of a sample's distribution function to its own, given as F(x_i), and the p-value of as much by chance.

    sup |F_n - F|, with the limiting law P(sqrt(n) D > a) = 2 sum (-1)^(k-1) exp(-2 k^2 a^2) at Stephens' (1970)
    correction of a for finite n.
    """
    values, n = np.sort(values), len(values)
    distance = float(max((np.arange(1, n + 1) / n - values).max(), (values - np.arange(n) / n).max()))
    a, k = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance, np.arange(1, 101)
    return distance, float(np.clip(2 * np.sum((-1.0) ** (k - 1) * np.exp(-2 * (k * a) ** 2)), 0, 1)) if a > 0.2 else 1.0


def simulate(config: Config, key: Array, schedule: Schedule) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name to times ``[101]`` and paths ``[num, 101]``. Langevin's SDE has a time of its own, and starts from p_0."""
    num = config.marginal_paths
    keys = iter(jax.random.split(key, 8))
    density = data_density()
    forward, score = sdes.diffusion_process(schedule), densities.score(density, schedule)
    still = sdes.langevin(lambda t, x, args: score(jnp.zeros_like(t), x, args))
    noise = densities.diffuse(density, schedule, jnp.ones(()))

    def walk(sde: SDE, start: densities.Mixture, t0: float, t1: float, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        def path(key: Array, x: Array) -> tuple[Array, Array]:
            times, xs = solvers.euler_maruyama(key, sde, x, t0=t0, t1=t1, num_steps=num_steps, path=True)
            return times[:: num_steps // 100], xs[:: num_steps // 100, 0]

        draws = jax.random.split(next(keys), num), densities.sample(next(keys), start, num)
        times, paths = jax.jit(jax.vmap(path))(*draws)
        return np.asarray(times[0]), np.asarray(paths)

    def flow(z: Array, times: Array) -> Array:
        field = sdes.probability_flow(forward, score)
        return solvers.solve_ode(field, z, t0=1.0, t1=0.0, ts=times, rtol=1e-6, atol=1e-6).xs[:, 0]

    times = jnp.linspace(1.0, 0.0, 101)
    paths = jax.jit(jax.vmap(flow, (0, None)))(densities.sample(next(keys), noise, num), times)
    return {
        "reverse_sde": walk(sdes.reverse(forward, score), noise, 1.0, 0.0, config.sampler_steps),
        "probability_flow": (np.asarray(times), np.asarray(paths)),
        "forward_sde": walk(forward, density, 0.0, 1.0, config.sampler_steps),
        "langevin": walk(still, density, 0.0, config.langevin_time, round(100 * config.langevin_time)),
    }


def judge_marginals(found: dict[str, tuple[np.ndarray, np.ndarray]], key: Array, schedule: Schedule) -> dict[str, Any]:
    """Kolmogorov's distance of every process to p_t at four times after its start, and its end beside fresh data."""
    results: dict[str, Any] = {}
    for name, (times, paths) in found.items():
        at = [25, 50, 75, 100]
        marginals = [0.0 if name == "langevin" else float(times[i]) for i in at]
        tests = [kolmogorov(distribution(t, paths[:, i], schedule)) for t, i in zip(marginals, at, strict=True)]
        results |= {f"{name}_times": times[at], f"{name}_distance": [d for d, _ in tests]}
        results[f"{name}_p_value"] = [p for _, p in tests]
    num = len(paths)
    data = densities.sample(key, data_density(), num)
    distance = jax.jit(metrics.energy_distance)
    for name in ("reverse_sde", "probability_flow"):
        end = found[name][1][:, -1]
        value, stderr = distance(jnp.asarray(end)[:, None], data)
        left = float(np.mean(end < -0.5))  # between the modes
        results |= {f"{name}_energy_distance": float(value), f"{name}_energy_distance_stderr": float(stderr)}
        results |= {f"{name}_left_mode": left, f"{name}_left_mode_stderr": math.sqrt(left * (1 - left) / num)}
    return results | {"left_mode": float(distribution(0.0, np.array([-0.5]), schedule)[0])}


# ------------------------------------------------------------------------------------------------- pictures

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, np.ndarray]:
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def draw_wiener(path: Any, times: np.ndarray, paths: np.ndarray, results: dict[str, Any]) -> None:
    """Paths within two standard deviations, and the variance of an increment against its length."""
    drawn, ((left, right),) = figure(1, 2, (9.0, 3.6))
    left.plot(times, paths[:40, :, 0].T, color=BLUE, alpha=0.4, linewidth=0.7)
    for sign in (-2, 2):
        left.plot(times, sign * np.sqrt(times), color=ORANGE, linestyle="--")
    left.set(title="Wiener paths, and two standard deviations", xlabel="t", ylabel="w(t)")
    lags, ratio = (np.asarray(results[f"wiener_variance_{name}"]) for name in ("lags", "per_time"))
    error = 2 * math.sqrt(1 / len(paths))  # two standard errors of a mean over two coordinates
    right.errorbar(lags, ratio, yerr=error, fmt="o", color=BLUE, capsize=3, label="measured, two standard errors")
    right.axhline(1.0, color=ORANGE, linestyle="--", label="theory")
    right.set(title="Variance of w(t) - w(s)", xlabel="t - s", ylabel="variance / (t - s)", xscale="log")
    right.legend(frameon=False)
    drawn.savefig(path, dpi=120)


def draw_orders(path: Any, results: dict[str, dict[str, Any]]) -> None:
    """Error against step with its fitted slope."""
    drawn, axes = figure(1, 2, (9.0, 4.0), sharey=True)
    for panel, (kind, found) in zip(axes[0], results.items(), strict=True):
        h = found["steps"]
        strong = f"strong: order {found['strong_order']:.3f} $\\pm$ {found['strong_order_stderr']:.3f}"
        panel.errorbar(h, found["strong_error"], 2 * found["strong_error_stderr"], fmt="o", color=BLUE, label=strong)
        panel.plot(h, found["root_mean_square_error"], color=BLUE, linewidth=0.8, label="root mean square, closed form")
        for name, colour, marker in (("mean", ORANGE, "s"), ("square", GREEN, "^")):
            label = f"weak, {'E x' if name == 'mean' else 'E x$^2$'}: order {found[f'weak_order_{name}']:.3f}"
            panel.plot(h, found[f"weak_error_{name}"], color=colour, marker=marker, linewidth=0.8, label=label)
        panel.set(title=f"{kind} noise", xlabel="step h", ylabel="error at t = 1", xscale="log", yscale="log")
        panel.set_xscale("log", base=2)
        panel.legend(frameon=False, fontsize=8)
        panel.grid(color="#dddddd")
    drawn.savefig(path, dpi=120)


def draw_marginals(path: Any, found: dict[str, tuple[np.ndarray, np.ndarray]], schedule: Schedule) -> None:
    """Paths over p_t, and where they end beside the density there."""
    x = np.linspace(-3.6, 3.6, 241)
    middle = (x[1:] + x[:-1]) / 2

    def density(t: float) -> np.ndarray:
        return np.diff(distribution(t, x, schedule)) / (x[1] - x[0])

    drawn, axes = figure(2, 4, (10.0, 6.0), sharey=True, width_ratios=(3, 1, 3, 1))
    for index, (name, (times, paths)) in enumerate(found.items()):
        panel, side = axes[index // 2, 2 * (index % 2) :][:2]
        still = name == "langevin"
        grid = np.stack([density(0.0 if still else float(t)) for t in times], 1)
        panel.pcolormesh(times, middle, grid, vmax=0.75, shading="nearest", cmap="Blues", rasterized=True)
        panel.plot(times, paths[:14].T, color=ORANGE, linewidth=0.8, alpha=0.9)
        panel.set(title=name.replace("_", " ").replace("sde", "SDE").replace("langevin", "Langevin SDE"))
        panel.set(xlabel="time", ylabel="x", xlim=(times[0], times[-1]), ylim=(x[0], x[-1]))  # runs to the right
        side.hist(paths[:, -1], x[::4], density=True, orientation="horizontal", color=ORANGE, alpha=0.5)
        side.plot(grid[:, -1], middle, color=BLUE)
        side.set(title=f"at t = {times[-1]:g}", xlabel="density", xticks=[])
    drawn.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------------- the whole


def check(config: Config) -> None:
    """Numbers that make no sense, before anything is computed."""
    powers = config.powers
    if len(powers) < 2 or any(b <= a for a, b in itertools.pairwise(powers)) or powers[0] < 1:
        raise ValueError(f"powers must be at least two rising positive integers, such as 4 5 6 7, got {powers}.")
    for name, least in (("wiener_paths", 100), ("replicates", 2), ("paths", 10), ("marginal_paths", 20)):
        if getattr(config, name) < least:
            raise ValueError(
                f"{name} must be at least {least} for errors to mean something, got {getattr(config, name)}."
            )
    if config.sampler_steps < 100 or config.sampler_steps % 100:
        raise ValueError(f"sampler_steps must be a multiple of 100, for 101 times to show, got {config.sampler_steps}.")
    if config.langevin_time < 1 or config.langevin_time % 1:
        raise ValueError(f"langevin_time must be a whole number, at least 1, got {config.langevin_time}.")


def main(config: Config) -> dict[str, Any]:
    """Simulates, fits, draws; returns the single numbers of metrics.json, which has the lists too."""
    check(config)
    run = runs.open_run(config)
    began = time.perf_counter()
    with jax.enable_x64(True):  # errors of 1e-4 are differences
        keys = jax.random.split(jax.random.key(config.seed), 4)
        runs.say("Wiener paths")
        times, paths = wiener_process(keys[0], config.wiener_paths, 64)
        results = judge_wiener(times, paths)
        draw_wiener(run.folder / "wiener.png", np.asarray(times), np.asarray(paths), results)
        runs.say("strong and weak order")
        orders = {kind: judge_orders(problem, keys[1], config) for kind, problem in problems().items()}
        draw_orders(run.folder / "orders.png", orders)
        runs.say("forward and reverse SDE, Langevin's SDE, probability flow")
        schedule = schedules.vp()
        found = simulate(config, keys[2], schedule)
        results |= judge_marginals(found, keys[3], schedule)
        draw_marginals(run.folder / "marginals.png", found, schedule)
    results |= {f"{kind}_{name}": value for kind, values in orders.items() for name, value in values.items()}
    results = runs.write_metrics(run, results | {"seconds": time.perf_counter() - began})
    return {name: value for name, value in results.items() if not isinstance(value, list)}


if __name__ == "__main__":
    runs.cli(main, Config)
