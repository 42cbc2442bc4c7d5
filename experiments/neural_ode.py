"""Neural ODE: how well does a field learnt by the adjoint from few noisy, irregular samples foretell what it never saw?

    python experiments/neural_ode.py

trains an MLP field on 64 spirals, each observed at 12 irregular times of its own on [0, 4] with noise of standard
deviation 0.1, and writes to runs/neural_ode/: predicted trajectories of new initial states in the zone of interpolation
and, as long again, of extrapolation; the loss; and in metrics.json the root mean square errors of both zones with
standard errors over 100 test trajectories, beside the noise. Expect 0.029 +- 0.003 and 0.031 +- 0.003 against the true
states, a third of the noise, after a minute or two on two CPU cores (57 s of CPU time).

The gradient is Pontryagin's (dgm_jax.adjoint), or one of Diffrax's with --adjoint. The backward solve does not store
x(t) but solves it back, and so may drift: the script measures how far it comes back from x0, on the learnt field
(0.025: fine) and on van der Pol's as its stiffness mu rises, beside the error of the gradient there, and says where it
is not to be trusted: from mu = 5 on, where the gradient is wrong by more than its own size. A run that was stopped goes
on with --resume.

Source: Chen et al. (2018), "Neural Ordinary Differential Equations", sections 2 and 5.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import adjoint, networks, plots, runs, solvers, training
from dgm_jax.types import Array, VectorField

PEERS: dict[str, Any] = {
    "backsolve": diffrax.BacksolveAdjoint,
    "recursive_checkpoint": diffrax.RecursiveCheckpointAdjoint,
    "direct": diffrax.DirectAdjoint,
}
STIFF_END = 1.0  # of the solve on van der Pol's field
MEASURING = ("num_test", "stiffness", "drift_limit")  # may change when a run is resumed


@dataclass(frozen=True)
class Config:
    """What to observe, how to learn, and how much to measure."""

    out: str = "runs/neural_ode"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoint."""
    seed: int = 0
    """Of every random number."""
    data: Literal["spiral", "pendulum"] = "spiral"
    """spiral: decaying, and the faster the larger. pendulum: damped, its angle and speed."""
    num_trajectories: int = 64
    """Of training, from initial states that are known."""
    num_times: int = 40
    """Irregular times at which some trajectory is observed."""
    observed: int = 12
    """At how many of those each one is, drawn at random for each."""
    horizon: float = 4.0
    """The end of the observations; the zone of extrapolation is as long again."""
    noise: float = 0.1
    """Standard deviation of the observations."""
    adjoint: Literal["pontryagin", "backsolve", "recursive_checkpoint", "direct"] = "pontryagin"
    """Gradients by dgm_jax.adjoint, or by one of Diffrax's."""
    tolerance: float = 1e-4
    """rtol and atol of the training solves; those of the tests are 1e-6."""
    width: int = 32
    """Of the two hidden layers of the field."""
    num_steps: int = 2000
    """Training steps, each on all trajectories in one solve."""
    learning_rate: float = 1e-2
    """The largest learning rate of Adam; it falls to 0 along a cosine."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    num_test: int = 100
    """Test trajectories, and as many noisy observations of each in each zone."""
    stiffness: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
    """The mu of van der Pol's oscillator on which drift is shown."""
    drift_limit: float = 0.1
    """The relative distance of the backward solve from x0 beyond which its gradient is not trusted."""


class Data(NamedTuple):
    """Trajectories of training, observed in part."""

    x0: Array  # [num, 2]
    ts: Array  # [times], increasing
    xs: Array  # [times, num, 2], with noise
    seen: Array  # [times, num], whether that one was observed then


def check(config: Config) -> None:
    """Refuses a configuration that makes no sense."""
    if not 1 <= config.observed <= config.num_times:
        raise ValueError(f"observed is {config.observed}: take 1 to num_times = {config.num_times}.")
    if not config.horizon > 0 or not config.noise >= 0 or not config.tolerance > 0:
        raise ValueError(
            f"horizon is {config.horizon}, noise {config.noise}, tolerance {config.tolerance}: take a horizon and a "
            "tolerance above 0, and a noise of 0 or more."
        )
    if config.num_trajectories < 1 or config.num_test < 2 or config.num_steps < 2:
        raise ValueError(
            f"num_trajectories is {config.num_trajectories}, num_test {config.num_test}, num_steps {config.num_steps}: "
            "take at least 1, 2 (for a standard error) and 2."
        )
    if not config.stiffness or not all(np.isfinite(mu) for mu in config.stiffness):
        raise ValueError(f"stiffness is {config.stiffness}: give at least one finite mu.")


def spiral(t: Array, x: Array, args: Any) -> Array:
    """x' = -0.15 x + (1 + |x|^2) / 2 (-x_1, x_0)."""
    return -0.15 * x + 0.5 * (1 + jnp.sum(x**2)) * jnp.stack([-x[1], x[0]])


def pendulum(t: Array, x: Array, args: Any) -> Array:
    """angle'' = -4 sin(angle) - 0.2 angle'."""
    return jnp.stack([x[1], -4 * jnp.sin(x[0]) - 0.2 * x[1]])


def van_der_pol(t: Array, x: Array, mu: Array) -> Array:
    """x_0'' = mu (1 - x_0^2) x_0' - x_0."""
    return jnp.stack([x[1], mu * (1 - x[0] ** 2) * x[1] - x[0]])


def initial_states(key: Array, num: int) -> Array:
    """Radii of 0.5 to 2, all directions ``[num, 2]``."""
    radius, angle = jax.random.uniform(key, (2, num))
    radius, angle = 0.5 + 1.5 * radius, 2 * jnp.pi * angle
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], 1)


@partial(jax.jit, static_argnums=0)
def trajectories(field: VectorField, params: Any, x0: Array, ts: Array) -> Array:
    """x(ts), each in a solve of its own ``[num, times, 2]``."""

    def one(x: Array) -> Array:
        return solvers.solve_ode(field, x, params, t0=0, t1=ts[-1], ts=ts, rtol=1e-6, atol=1e-6, throw=False).xs

    return jax.vmap(one)(x0)


def observe(config: Config, key: Array, truth: VectorField) -> Data:
    """The training set: irregular times, each trajectory seen at some of them."""
    key_x, key_t, key_seen, key_noise = jax.random.split(key, 4)
    x0 = initial_states(key_x, config.num_trajectories)
    ts = jnp.sort(jax.random.uniform(key_t, (config.num_times,), minval=0.01, maxval=1.0)) * config.horizon
    xs = jnp.moveaxis(trajectories(truth, None, x0, ts), 0, 1)
    order = jnp.argsort(jax.random.uniform(key_seen, (config.num_times, config.num_trajectories)), axis=0)
    noise = config.noise * jax.random.normal(key_noise, xs.shape)
    return Data(x0, ts, xs + noise, order < config.observed)


def make_loss(field: VectorField, config: Config) -> Callable[..., Any]:
    """Mean squared error an observed coordinate, of all trajectories in one solve, and how its backward solve went."""

    def batched(t: Array, x: Array, params: Any) -> Array:
        return jax.vmap(field, (None, 0, None))(t, x, params)

    def loss(params: Any, key: Array, data: Data) -> Any:
        def error(xs: Array) -> Array:
            return jnp.sum(jnp.where(data.seen[..., None], (xs - data.xs) ** 2, 0.0)) / (2 * jnp.sum(data.seen))

        solve: dict[str, Any] = {"t0": 0.0, "t1": config.horizon, "ts": data.ts}
        solve |= {"rtol": config.tolerance, "atol": config.tolerance, "throw": False}
        if config.adjoint == "pontryagin":
            value, found = adjoint.objective(error, batched, data.x0, params, drift_limit=config.drift_limit, **solve)
            return value, {"nfe": found.nfe_forward + found.nfe_backward, "drift": found.reconstruction_error}
        solution = solvers.solve_ode(batched, data.x0, params, adjoint=PEERS[config.adjoint](), max_steps=512, **solve)
        return error(solution.xs), {"nfe": solution.nfe}

    return loss


def mean_and_stderr(name: str, values: Array) -> dict[str, float]:
    """The mean over trajectories with its standard error."""
    x = np.asarray(values, np.float64)
    return {name: float(x.mean()), f"{name}_stderr": float(x.std(ddof=1) / len(x) ** 0.5)}


def measure(config: Config, key: Array, field: VectorField, params: Any, truth: VectorField) -> tuple[dict, dict]:
    """Errors of both zones on new initial states, against the true states and against noisy ones; and what to draw."""
    key_x, key_noise = jax.random.split(key)
    x0 = initial_states(key_x, config.num_test)
    ts = jnp.linspace(0.0, 2 * config.horizon, 2 * 100 + 1)[1:]
    true, learnt = trajectories(truth, None, x0, ts), trajectories(field, params, x0, ts)
    noisy = true + config.noise * jax.random.normal(key_noise, true.shape)
    results: dict[str, Any] = {"noise": config.noise}
    for zone, part in {"interpolation": slice(0, 100), "extrapolation": slice(100, 200)}.items():
        for name, target in {"rmse": true, "rmse_noisy": noisy}.items():
            errors = jnp.sqrt(jnp.mean((learnt - target)[:, part] ** 2, (1, 2)))
            results |= mean_and_stderr(f"{name}_{zone}", errors)
        results[f"signal_{zone}"] = float(jnp.sqrt(jnp.mean(true[:, part] ** 2)))
    return results, {"x0": x0, "ts": ts, "true": true, "learnt": learnt}


def check_drift(config: Config, field: VectorField, params: Any, x0: Array) -> tuple[dict, dict]:
    """How far backward solves drift: from the test states along the learnt field, and on van der Pol's.

    There also the error of dL/dmu, L = |x(1)|^2 / 2 from x(0) = (2, 0), against backpropagation through the solver.
    """
    options: dict[str, Any] = {"t0": 0.0, "rtol": config.tolerance, "atol": config.tolerance, "throw": False}
    learnt = jax.jit(jax.vmap(lambda x: adjoint.drift(field, x, params, t1=config.horizon, **options)))(x0)

    tight = options | {"rtol": 1e-6, "atol": 1e-6}

    def loss(x: Array) -> Array:
        return 0.5 * jnp.sum(x**2)

    def one(mu: Array) -> tuple[Array, Array, Array]:
        start = jnp.array([2.0, 0.0])
        ours = adjoint.solve(loss, van_der_pol, start, mu, t1=STIFF_END, drift_limit=None, **options)
        true = jax.grad(lambda mu: loss(solvers.odeint(van_der_pol, start, mu, t1=STIFF_END, **tight)))(mu)
        return ours.reconstruction_error, ours.args, true

    mus = jnp.asarray(config.stiffness)
    drifts, ours, true = jax.jit(lambda mus: jax.lax.map(one, mus))(mus)
    errors = jnp.abs(ours - true) / jnp.abs(true)
    fires = ~(drifts <= config.drift_limit)

    def numbers(values: Array) -> list[float | None]:  # None where a solve did not arrive
        return [float(v) if np.isfinite(v) else None for v in np.atleast_1d(values)]

    worst = jnp.max(learnt)
    results: dict[str, Any] = {"drift_learnt": numbers(worst)[0]}
    results["drift_learnt_fires"] = bool(not worst <= config.drift_limit)
    results |= {"stiffness": list(config.stiffness), "drift_stiff": numbers(drifts)}
    results |= {"gradient_error_stiff": numbers(errors), "drift_stiff_fires": np.asarray(fires).tolist()}
    return results, {"mu": mus, "drift": drifts, "error": errors}


def say_drift(config: Config, results: dict[str, Any]) -> None:
    """The check, in words."""
    limit = config.drift_limit

    def verdict(fires: bool) -> str:
        return "DRIFTS: do not trust this gradient" if fires else "fine"

    def told(drift: float | None) -> str:
        return "does not arrive" if drift is None else f"{drift:.2g}"

    runs.say(f"drift check: how far x(t0), solved back from x(t1), is from x0; the limit is {limit:g}")
    runs.say(f"  learnt field: {told(results['drift_learnt'])}  {verdict(results['drift_learnt_fires'])}")
    rows = zip(
        *(results[k] for k in ("stiffness", "drift_stiff", "gradient_error_stiff", "drift_stiff_fires")), strict=True
    )
    for mu, drift, error, fires in rows:
        wrong = "no gradient" if error is None else f"relative error of dL/dmu: {error:.2g}"
        runs.say(f"  van der Pol, mu = {mu:g}: {told(drift)} ({wrong})  {verdict(fires)}")


def draw(path: Path, config: Config, data: Data, shown: dict[str, Any], results: dict[str, Any]) -> None:
    """Three test trajectories through both zones, the largest, the middle and the smallest, and the phase plane."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    radius, end = np.linalg.norm(shown["x0"], axis=1), config.horizon
    picked = np.argsort(radius)[[-1, len(radius) // 2, 0]]
    ts = np.concatenate([[0.0], shown["ts"]])
    true, learnt = (np.concatenate([shown["x0"][:, None], shown[k]], 1) for k in ("true", "learnt"))
    blue, orange, green = "#0072B2", "#D55E00", "#009E73"
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, width_ratios=[1.5, 1])
    for row, n in enumerate(picked):
        axes = figure.add_subplot(grid[row, 0])
        axes.axvspan(0, end, color=blue, alpha=0.08, lw=0)
        axes.axvspan(end, 2 * end, color=orange, alpha=0.10, lw=0)
        for d, style in enumerate(("-", "--")):
            axes.plot(ts, true[n, :, d], style, color="0.6", lw=3, label=f"truth, $x_{d}$")
            axes.plot(ts, learnt[n, :, d], style, color="black", lw=1.2, label=f"learnt, $x_{d}$")
        axes.set(xlim=(0, 2 * end), title=f"from $|x(0)|$ = {radius[n]:.2f}, not trained on")
        axes.tick_params(labelbottom=row == 2)
        if row == 2:
            axes.set_xlabel("time; blue: interpolation, where training data are; orange: extrapolation")
    axes.legend(ncols=4, fontsize=8, loc="lower right")
    axes = figure.add_subplot(grid[:, 1])
    axes.plot(*np.asarray(data.xs)[np.asarray(data.seen)].T, ".", color=green, ms=3, alpha=0.5, label="observations")
    half = len(ts) // 2 + 1
    for n in picked:
        axes.plot(*true[n].T, color="0.6", lw=3, label="truth" if n == picked[0] else None)
        for part, colour, word in ((slice(0, half), blue, "inter"), (slice(half - 1, None), orange, "extra")):
            label = f"learnt, {word}polated" if n == picked[0] else None
            axes.plot(*learnt[n, part].T, color=colour, lw=1.2, label=label)
    axes.set(aspect="equal", xlabel="$x_0$", ylabel="$x_1$")
    axes.legend(fontsize=8, loc="upper left")
    errors = ", ".join(
        f"{zone} {results[f'rmse_{zone}']:.3f} $\\pm$ {results[f'rmse_{zone}_stderr']:.3f}"
        for zone in ("interpolation", "extrapolation")
    )
    figure.suptitle(
        f"error of {config.num_test} test trajectories: {errors}; noise of the observations {config.noise:g}"
    )
    figure.savefig(path, dpi=100)


def draw_drift(path: Path, config: Config, stiff: dict[str, Any], results: dict[str, Any]) -> None:
    """Drift and error of the gradient against stiffness, and the limit between."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(stiff["mu"], stiff["drift"], "o-", color="#0072B2", label="van der Pol: drift of the backward solve")
    axes.plot(stiff["mu"], stiff["error"], "s--", color="#D55E00", label=r"van der Pol: relative error of $dL/d\mu$")
    axes.axhline(config.drift_limit, color="black", lw=1, label="limit: above it no gradient is given")
    if results["drift_learnt"] is not None:
        axes.axhline(
            results["drift_learnt"], color="#009E73", ls=":", label="learnt field: worst drift of the test states"
        )
    axes.set(yscale="log", xlabel=r"stiffness $\mu$", ylabel="relative to $x_0$, to the gradient")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main(config: Config) -> dict[str, Any]:
    """Observes, trains, measures, checks for drift and draws; returns what metrics.json holds."""
    check(config)
    run, clock, cpu = runs.open_run(config, may_differ=MEASURING), time.perf_counter(), time.process_time()
    truth = {"spiral": spiral, "pendulum": pendulum}[config.data]
    key_data, key_net, key_train, key_test = jax.random.split(jax.random.key(config.seed), 4)
    data = observe(config, key_data, truth)

    net = networks.MLP((config.width,) * 2, last_init=jax.nn.initializers.lecun_normal())

    def field(t: Array, x: Array, params: Any) -> Array:
        return net.apply(params, jnp.zeros_like(t), x)  # autonomous: a time that was never seen means nothing new

    optimizer = training.adam(config.learning_rate, config.num_steps, warmup=min(20, config.num_steps - 1))
    state = training.init(net.init(key_net, jnp.zeros(()), data.x0[0]), optimizer)
    update = jax.jit(training.step(make_loss(field, config), optimizer, ema_decay=0.98, has_aux=True), donate_argnums=0)
    every: dict[str, Any] = {"num_steps": config.num_steps, "checkpoint_every": config.checkpoint_every}
    state, history = runs.train(update, state, lambda n: data, key_train, run=run, label="neural ODE", **every)
    trained = time.perf_counter()

    results, shown = measure(config, key_test, field, state.ema, truth)
    drifts, stiff = check_drift(config, field, state.ema, shown["x0"])
    results |= drifts | {"training_loss": float(np.mean(history["loss"][-50:]))}
    say_drift(config, results)
    if "drift" in history:
        results["drift_training"] = float(np.max(history["drift"]))
    draw(run.folder / "trajectories.png", config, data, shown, results)
    draw_drift(run.folder / "drift.png", config, stiff, results)
    plots.curve(run.folder / "loss.png", history, label="mean squared error", reference=(config.noise**2, "noise"))
    plots.curve(run.folder / "nfe.png", history, "nfe", label="evaluations in a training step")
    results |= {"seconds_training": trained - clock, "seconds": time.perf_counter() - clock}
    results["cpu_seconds"] = time.process_time() - cpu
    return runs.write_metrics(run, results)


if __name__ == "__main__":
    runs.cli(main, Config)
