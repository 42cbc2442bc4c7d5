"""Langevin dynamics: how wrong is it without Metropolis' correction, and what does a step size cost?

    python experiments/langevin.py

runs many chains in the plane, on a rotated Gaussian and on a rotated mixture of three, for eight step sizes, without
and with the correction, and compares their mean of |x - m|^2 with the exact one. It writes to runs/langevin/ bias.png
and metrics.json: the errors with their standard errors, the order in the step size, acceptance, effective sample size.
Expected: without the correction order 1.01 +- 0.08 on the mixture (the theory says 1) and the closed-form bias on the
Gaussian (largest of eight |z| 2.0); with it no error (largest of sixteen |z| 1.3). Half a minute on one CPU core.

    python experiments/langevin.py --draws folder

also samples posteriors of posteriordb and compares the means with its published draws. The folder holds
data/NAME.json.zip and draws/NAME-MODEL.json.zip as in that repository, for any of eight_schools (noncentered), kidiq
(kidscore_momiq), arK (arK) and kilpisjarvi_mod (kilpisjarvi). The chains never see the published draws: their scale
comes from pilot runs. Expected: largest |z| of 23 means 2.2, at least 43,000 effective draws each; half a minute more.
"""

import json
import math
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import densities, langevin, runs, schedules
from dgm_jax.types import Array

LIMIT = 64 * 2**20  # bytes of JSON that a file may unpack to
PILOTS = 8  # pilot runs of 1,000 steps
ENOUGH = 400  # effective draws without which a mean is not to be trusted


@dataclass(frozen=True)
class Config:
    """How many chains, how long, and which posteriors."""

    out: str = "runs/langevin"
    """Folder of the run."""
    seed: int = 0
    """Of all random numbers."""
    step_sizes: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
    """Steps eta to compare; below 1.2, where the unadjusted chain on the Gaussian diverges."""
    fit_up_to: float = 0.4
    """The order is fitted to the errors at steps up to this."""
    num_chains: int = 10000
    """Chains of each kind, started from exact draws."""
    num_steps: int = 1000
    """Steps of each chain, of which the first fifth is left out."""
    thin: int = 2
    """Every so manieth state is looked at; divides a fifth of the steps."""
    draws: str = ""
    """Folder with the data and draws of posteriordb; nothing of it is looked for if empty."""
    posterior_chains: int = 64
    """Chains on each posterior."""
    posterior_steps: int = 8000
    """Steps of each of them, after the pilot runs."""


# ------------------------------------------------------------------------------------------------ error and step size


def targets() -> dict[str, densities.Mixture]:
    """A Gaussian and a mixture of overlapping Gaussians, their axes turned by different angles."""

    def turned(angle: float, values: tuple[float, float]) -> np.ndarray:
        q = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return q @ np.diag(values) @ q.T

    covariances = np.stack([turned(a, v) for a, v in ((0.5, (0.3, 1.0)), (1.4, (0.4, 0.8)), (2.4, (0.3, 0.6)))])
    return {
        "gaussian": densities.gaussian(jnp.asarray([0.5, -1.0]), jnp.asarray(covariances[0], float)),
        "mixture": densities.Mixture(
            jnp.asarray([0.5, 0.3, 0.2]),
            jnp.asarray([[0.8, 0.3], [-0.9, 0.6], [-0.2, -1.1]]),
            jnp.asarray(covariances, float),
        ),
    }


def settled(density: densities.Mixture, eta: float) -> float:
    """E|x - m|^2 of the unadjusted chain on the Gaussian of the same covariance, in closed form."""
    precisions = 1 / np.linalg.eigvalsh(np.asarray(densities.covariance(density), np.float64))
    return float(np.sum(1 / (precisions * (1 - eta * precisions / 4))))


def measure(config: Config, key: Array) -> dict[str, Any]:
    """For each target and kind of chain, over the step sizes: the error of E|x - m|^2, acceptance, effective sample.

    Unadjusted chains on the mixture have companions on the Gaussian of the same mean and covariance that take the same
    draws: how much those are off their closed form corrects the estimate (a control variate, which halves its error).
    """
    held = schedules.vp()  # at t = 0 the density itself
    skip = config.num_steps // 5 // config.thin
    options = {"num_steps": config.num_steps, "thin": config.thin}

    def chains(density: densities.Mixture, adjusted: bool) -> Callable[[Array, Array], tuple[Array, ...]]:
        score, log_density = densities.score(density, held), densities.log_density(density, held)
        mean = densities.mean(density)
        companion = densities.score(densities.gaussian(mean, densities.covariance(density)), held)

        def one(key: Array, x: Array, eta: Array) -> tuple[Array, ...]:
            if adjusted:
                info = langevin.metropolis(key, log_density, x, step_size=eta, **options)[1]
                return info.states, info.states, info.acceptance
            states = langevin.unadjusted(key, score, x, step_size=eta, **options)[1]
            if len(density.weights) == 1:
                return states, states, jnp.ones(())
            return states, langevin.unadjusted(key, companion, x, step_size=eta, **options)[1], jnp.ones(())

        def all_of_them(key: Array, eta: Array) -> tuple[Array, ...]:
            key_start, key_chains = jax.random.split(key)
            x0 = densities.sample(key_start, density, config.num_chains)
            keys = jax.random.split(key_chains, config.num_chains)
            states, beside, acceptance = jax.vmap(one, (0, 0, None))(keys, x0, eta)
            squares = [
                jnp.mean(jnp.sum((x[:, skip:] - mean[None, None]) ** 2, axis=2), axis=1) for x in (states, beside)
            ]
            effective = jax.vmap(langevin.effective_sample_size)(states[:500, skip:])
            return *squares, jnp.mean(acceptance), jnp.min(jnp.mean(effective, axis=0))

        return jax.jit(all_of_them)

    results: dict[str, Any] = {"step_sizes": config.step_sizes}
    for i, (name, density) in enumerate(targets().items()):
        exact = float(jnp.trace(densities.covariance(density)))
        for adjusted in (False, True):
            run, rows = chains(density, adjusted), []
            for j, eta in enumerate(config.step_sizes):
                fold = jax.random.fold_in(jax.random.fold_in(key, i), 2 * j + adjusted)
                values = run(fold, jnp.asarray(eta))
                squares, beside, acceptance, effective = (np.asarray(a, np.float64) for a in values)
                if name == "mixture" and not adjusted:
                    slope = np.cov(squares, beside)[0, 1] / np.var(beside, ddof=1)
                    squares = squares - slope * (beside - settled(density, eta))
                error, stderr = squares.mean() - exact, squares.std(ddof=1) / math.sqrt(len(squares))
                per = 1000 * effective / (config.num_steps - skip * config.thin)
                rows.append({"error": error, "stderr": stderr, "acceptance": acceptance, "ess_per_1000": per})
            kind = "metropolis" if adjusted else "unadjusted"
            results[f"{name}_{kind}"] = {k: [float(row[k]) for row in rows] for k in rows[0]}
            shown = ", ".join(f"{row['error']:+.4f}" for row in rows)
            runs.say(f"{name}, {kind}: error of E|x - m|^2 {shown}")
        results[f"{name}_exact"] = exact
    theory = [settled(targets()["gaussian"], eta) - results["gaussian_exact"] for eta in config.step_sizes]
    return results | {"gaussian_theory": theory}


def fit_order(step_sizes: Any, errors: Any, stderrs: Any) -> tuple[float, float]:
    """The slope of log |error| against log eta as eta goes to 0, and its standard error.

    log |error| = a + order log eta + b eta, by weighted least squares: the term b eta is what the next order adds. On
    the Gaussian here steps up to 0.4, without noise, give 0.97: what the orders after that leave.
    """
    eta, error, stderr = (np.asarray(a, np.float64) for a in (step_sizes, errors, stderrs))
    weights = np.abs(error) / stderr  # 1 / the standard error of log |error|
    design = np.stack([np.ones_like(eta), np.log(eta), eta], axis=1) * weights[:, None]
    covariance = np.linalg.inv(design.T @ design)
    slope = covariance @ design.T @ (weights * np.log(np.abs(error)))
    return float(slope[1]), float(math.sqrt(covariance[1, 1]))


# --------------------------------------------------------------------------------------------------------- posteriors


class Posterior(NamedTuple):
    """A posterior in unconstrained coordinates u [dim], of order one near the start, which is 0."""

    log_density: Callable[[Array], Array]  # u -> [], up to a constant
    constrain: Callable[[Array], dict[str, Array]]  # u -> the model's own parameters, by their published names
    dim: int


def half_cauchy(x: Array, scale: float) -> Array:
    """log of 1 / (1 + (x / scale)^2)."""
    return -jnp.log1p((x / scale) ** 2)


def eight_schools(data: dict[str, Any]) -> Posterior:
    """z_j, mu, log tau; theta = mu + tau z, y_j ~ N(theta_j, sigma_j)."""
    y, sigma, num = jnp.asarray(data["y"], float), jnp.asarray(data["sigma"], float), len(data["y"])

    def parts(u: Array) -> tuple[Array, Array, Array]:
        return u[num], jnp.exp(u[num + 1]), u[num] + jnp.exp(u[num + 1]) * u[:num]

    def log_density(u: Array) -> Array:
        mu, tau, theta = parts(u)
        prior = -0.5 * jnp.sum(u[:num] ** 2) - 0.5 * (mu / 5) ** 2 + half_cauchy(tau, 5.0) + u[num + 1]
        return prior - 0.5 * jnp.sum(((y - theta) / sigma) ** 2)

    def constrain(u: Array) -> dict[str, Array]:
        mu, tau, theta = parts(u)
        return {**{f"theta[{j + 1}]": theta[j] for j in range(num)}, "mu": mu, "tau": tau}

    return Posterior(log_density, constrain, num + 2)


def regression(x: Any, y: Any, names: tuple[str, str], prior: Callable[[Array, Array, Array], Array]) -> Posterior:
    """y ~ N(a + b x, sigma). Coordinates: the line at the mean of x and its rise over a deviation of x, log sigma.

    These are a, b and log sigma by a linear map, in units of the deviation of y from its mean, with no correlation.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    middle, unit, height, spread = x.mean(), x.std(), y.mean(), y.std()
    xs, ys = jnp.asarray((x - middle) / unit, float), jnp.asarray((y - height) / spread, float)

    def natural(u: Array) -> tuple[Array, Array, Array]:
        slope = spread * u[1] / unit
        return height + spread * u[0] - slope * middle, slope, spread * jnp.exp(u[2])

    def log_density(u: Array) -> Array:
        squares = jnp.sum((ys - u[0] - u[1] * xs) ** 2)
        return prior(*natural(u)) + u[2] - len(x) * u[2] - 0.5 * squares * jnp.exp(-2 * u[2])

    return Posterior(log_density, lambda u: dict(zip((*names, "sigma"), natural(u), strict=True)), 3)


def kidscore_momiq(data: dict[str, Any]) -> Posterior:
    """Flat on both coefficients, half-Cauchy(2.5) on sigma."""
    names = ("beta[1]", "beta[2]")
    return regression(data["mom_iq"], data["kid_score"], names, lambda a, b, sigma: half_cauchy(sigma, 2.5))


def kilpisjarvi(data: dict[str, Any]) -> Posterior:
    """Normal priors on both coefficients, flat on sigma."""

    def prior(a: Array, b: Array, sigma: Array) -> Array:
        z = (a - data["pmualpha"]) / data["psalpha"], (b - data["pmubeta"]) / data["psbeta"]
        return -0.5 * (z[0] ** 2 + z[1] ** 2)

    return regression(data["x"], data["y"], ("alpha", "beta"), prior)


def autoregression(data: dict[str, Any]) -> Posterior:
    """alpha, beta_k, log sigma; y_t ~ N(alpha + sum_k beta_k y_(t-k), sigma)."""
    order, y = int(data["K"]), np.asarray(data["y"], np.float64)
    lags = jnp.asarray(np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], axis=1), float)
    now = jnp.asarray(y[order:], float)

    def log_density(u: Array) -> Array:
        sigma = jnp.exp(u[order + 1])
        prior = -0.5 * jnp.sum((u[: order + 1] / 10) ** 2) + half_cauchy(sigma, 2.5) + u[order + 1]
        residual = (now - u[0] - jnp.sum(lags * u[None, 1 : order + 1], axis=1)) / sigma
        return prior - len(y[order:]) * u[order + 1] - 0.5 * jnp.sum(residual**2)

    def constrain(u: Array) -> dict[str, Array]:
        betas = {f"beta[{k}]": u[k] for k in range(1, order + 1)}
        return {"alpha": u[0], **betas, "sigma": jnp.exp(u[order + 1])}

    return Posterior(log_density, constrain, order + 2)


MODELS: dict[str, tuple[str, Callable[[dict[str, Any]], Posterior]]] = {
    "eight_schools-eight_schools_noncentered": ("eight_schools", eight_schools),
    "kidiq-kidscore_momiq": ("kidiq", kidscore_momiq),
    "arK-arK": ("arK", autoregression),
    "kilpisjarvi_mod-kilpisjarvi": ("kilpisjarvi_mod", kilpisjarvi),
}


def read_json(path: Path) -> Any:
    """The one JSON file inside a zip."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: take it from posteriordb, or leave out the posterior's draws.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry for entry in archive.infolist() if entry.filename.endswith(".json")]
            raw = archive.open(names[0]).read(LIMIT + 1) if len(names) == 1 else b""
        value = json.loads(raw) if raw and len(raw) <= LIMIT else None
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a zip of JSON ({error}): copy it anew from posteriordb.") from error
    if value is None:
        raise ValueError(f"{path} must hold one JSON file of at most {LIMIT} bytes, got {len(names)} files in the zip.")
    return value


def read_draws(path: Path, names: list[str]) -> np.ndarray:
    """Published draws of the named parameters, [chains, num, parameters]."""
    chains = read_json(path)
    try:
        draws = np.stack([np.stack([np.asarray(chain[n], np.float64) for n in names], axis=1) for chain in chains])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold a list of chains, each with equally many numbers for {', '.join(names)}: {error!r}."
        ) from error
    if draws.ndim != 3 or draws.shape[1] < 4 or not np.all(np.isfinite(draws)):
        raise ValueError(f"{path} must hold at least 4 finite draws a chain, got the shape {draws.shape}.")
    return draws


def standardise(posterior: Posterior, key: Array, config: Config) -> tuple[np.ndarray, np.ndarray, float, Array]:
    """Mean, scale L and step size, such that z in u = mean + L z has about unit covariance; and states to start from.

    The first scale is the curvature at u = 0 (not at the mode: of a hierarchical model that lies in the neck of its
    funnel), each later one that of a pilot run; the step grows or shrinks towards an acceptance of 0.57. A chain that
    hardly moved starts again where another one is.
    """

    @jax.jit
    def pilot(key: Array, u: Array, mean: Array, scale: Array, eta: Array) -> tuple[Array, Array]:
        z = jax.vmap(lambda one: jnp.linalg.solve(scale, one - mean))(u)
        return sample(posterior, key, z, mean, scale, eta, 1000, 5)

    values, vectors = np.linalg.eigh(-np.asarray(jax.jit(jax.hessian(posterior.log_density))(jnp.zeros(posterior.dim))))
    mean, scale, eta = np.zeros(posterior.dim), vectors / np.sqrt(np.maximum(np.abs(values), 1.0)), 0.2
    starts = 0.1 * jax.random.normal(key, (config.posterior_chains, posterior.dim)) @ jnp.asarray(scale, float).T
    for n in range(PILOTS):
        settings = (jnp.asarray(a, float) for a in (mean, scale, eta))
        states, acceptance = pilot(jax.random.fold_in(key, n + 1), starts, *settings)
        lively = np.flatnonzero(np.asarray(acceptance) > 0.1)  # a chain far out, where steps are too large, stays there
        if len(lively):
            starts = states[np.resize(lively, len(states)), -1]
        if jnp.mean(acceptance) > 0.2:
            late = np.asarray(states[:, states.shape[1] // 2 :], np.float64).reshape(-1, posterior.dim)
            mean, scale = late.mean(0), np.linalg.cholesky(np.cov(late.T))
        eta *= math.exp(2 * (float(jnp.mean(acceptance)) - 0.57))
    return mean, scale, eta, starts


def sample(posterior: Posterior, key: Array, z: Array, mean: Any, scale: Any, eta: Any, num: int, thin: int) -> Any:
    """Metropolis-adjusted chains in z from the rows of z: their states u [chains, num / thin, dim], and acceptance."""
    mean, scale = jnp.asarray(mean, float), jnp.asarray(scale, float)

    def one(key: Array, z: Array) -> tuple[Array, Array]:
        log_density = lambda t, z, args: posterior.log_density(mean + scale @ z)  # noqa: E731
        info = langevin.metropolis(key, log_density, z, step_size=eta, num_steps=num, thin=thin)[1]
        return info.states @ scale.T + mean[None], info.acceptance

    return jax.vmap(one)(jax.random.split(key, len(z)), z)


def compare(name: str, config: Config, key: Array) -> dict[str, Any]:
    """One posterior: means by our chains and by the published draws, and z = difference / its standard error."""
    folder, (data_name, build) = Path(config.draws), MODELS[name]
    path = folder / "data" / f"{data_name}.json.zip"
    data = read_json(path)
    try:
        posterior = build(data)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} lacks what the model {name} needs: {error!r}.") from error
    names = list(jax.eval_shape(posterior.constrain, jnp.zeros(posterior.dim)))
    gold = read_draws(folder / "draws" / f"{name}.json.zip", names)

    key_pilot, key_run = jax.random.split(key)
    mean, scale, eta, starts = standardise(posterior, key_pilot, config)
    z = jnp.asarray(np.linalg.solve(scale, (np.asarray(starts, np.float64) - mean[None]).T).T, float)

    @jax.jit
    def chains(key: Array, z: Array) -> tuple[Array, Array]:
        states, acceptance = sample(posterior, key, z, mean, scale, eta, config.posterior_steps, 4)
        values = jax.vmap(jax.vmap(posterior.constrain))(states)
        return jnp.stack([values[n] for n in names], axis=-1), jnp.mean(acceptance)

    ours, acceptance = chains(key_run, z)
    found: dict[str, Any] = {}
    moments = []
    for draws in (np.asarray(ours, np.float64), gold):
        centre = draws.mean((0, 1))
        ess = np.asarray(langevin.effective_sample_size(jnp.asarray(draws - centre[None, None], float), chains=True))
        moments.append((centre, draws.std((0, 1)) / np.sqrt(ess), ess, draws.std((0, 1))))
    (a, a_err, a_ess, _), (b, b_err, b_ess, b_std) = moments
    for i, parameter in enumerate(names):
        found[parameter] = {
            "mean": a[i], "stderr": a_err[i], "ess": a_ess[i],
            "published": b[i], "published_stderr": b_err[i], "published_ess": b_ess[i], "published_std": b_std[i],
            "z": (a[i] - b[i]) / math.hypot(a_err[i], b_err[i]),
        }  # fmt: skip
    worst = max(abs(found[p]["z"]) for p in names)
    shown = f"acceptance {float(acceptance):.2f}, effective draws at least {a_ess.min():.0f}"
    runs.say(f"{name}: largest |z| {worst:.2f} of {len(names)}, {shown}")
    if a_ess.min() < ENOUGH:
        runs.say(f"{name}: fewer than {ENOUGH} effective draws: its z mean little; raise --posterior-steps.")
    evaluations = config.posterior_chains * config.posterior_steps
    summary = {
        "acceptance": float(acceptance),
        "step_size": eta,
        "max_abs_z": worst,
        "min_ess": a_ess.min(),
        "evaluations": evaluations,
    }
    return {**summary, "parameters": found}


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_errors(path: Path, found: dict[str, Any], order: tuple[float, float]) -> None:
    """Error against step size, and what a step size gives for its evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    eta = np.array(found["step_sizes"])
    left.loglog(eta, np.abs(found["gaussian_theory"]), "-", color="#888888", label="Gaussian: closed form")
    for name, color, label in (
        ("gaussian_unadjusted", "#888888", "Gaussian: unadjusted"),
        ("mixture_unadjusted", "#1f5fa8", f"mixture: unadjusted, order {order[0]:.2f} ± {order[1]:.2f}"),
        ("mixture_metropolis", "#c2571a", "mixture: Metropolis-adjusted"),
    ):
        rows = found[name]
        error, stderr = np.abs(rows["error"]), np.array(rows["stderr"])
        low = np.minimum(stderr, 0.9 * error)
        left.errorbar(eta, error, yerr=[low, stderr], fmt="o", ms=4, color=color, label=label, capsize=2)
    left.set(
        xlabel="step size", ylabel="|error of E|x - m|²|, with standard error", title="Bias of the unadjusted chain"
    )
    left.set(ylim=(5e-4, 10 * max(found["gaussian_theory"])))
    left.set_xticks(eta, [f"{one:g}" for one in eta])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8, loc="upper left")
    left.grid(color="#dddddd", lw=0.6)
    right.plot(
        eta, found["mixture_unadjusted"]["ess_per_1000"], "o--", ms=4, color="#1f5fa8", label="unadjusted (biased)"
    )
    right.plot(
        eta, found["mixture_metropolis"]["ess_per_1000"], "o-", ms=4, color="#c2571a", label="Metropolis-adjusted"
    )
    for x, y, a in zip(
        eta, found["mixture_metropolis"]["ess_per_1000"], found["mixture_metropolis"]["acceptance"], strict=True
    ):
        right.annotate(f"{a:.2f}", (x, y), textcoords="offset points", xytext=(0, -13), ha="center", fontsize=8)
    right.set(
        xlabel="step size",
        ylabel="effective draws per 1,000 evaluations",
        title="Mixture; below: acceptance",
        ylim=(0, None),
    )
    right.legend(frameon=False, fontsize=8)
    right.grid(color="#dddddd", lw=0.6)
    figure.savefig(path, dpi=130)


def draw_posteriors(path: Path, found: dict[str, Any]) -> None:
    """Every mean less the published one, in published standard deviations, with two standard errors."""
    from matplotlib.figure import Figure

    rows = [(f"{p}  ({name.split('-')[1]})", v) for name, one in found.items() for p, v in one["parameters"].items()]
    figure = Figure(figsize=(8, 0.9 + 0.23 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, (_, v) in enumerate(reversed(rows)):
        std = v["published_std"]
        error = 2 * math.hypot(v["stderr"], v["published_stderr"]) / std
        axes.errorbar((v["mean"] - v["published"]) / std, i, xerr=error, fmt="o", ms=3, color="#c2571a", capsize=2)
    axes.axvline(0, color="#888888", lw=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=8)
    axes.set(xlabel="mean less published mean, in standard deviations (bars: two standard errors)")
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    figure.savefig(path, dpi=130)


def main(config: Config) -> dict[str, Any]:
    """Measures, samples, compares, draws; returns what metrics.json holds."""
    if not all(0 < eta < 1.2 for eta in config.step_sizes):
        raise ValueError(f"step_sizes must lie in (0, 1.2), got {config.step_sizes}.")
    if len({eta for eta in config.step_sizes if eta <= config.fit_up_to}) < 4:
        raise ValueError(
            f"step_sizes must hold at least 4 different ones up to fit_up_to={config.fit_up_to}, to fit an order to, "
            f"got {config.step_sizes}."
        )
    if config.num_chains < 2 or config.num_steps % 5 or (config.num_steps // 5) % config.thin:
        raise ValueError(
            f"num_steps / 5 must be a multiple of thin, and num_chains at least 2, got num_steps={config.num_steps}, "
            f"thin={config.thin}, num_chains={config.num_chains}."
        )
    if config.posterior_chains < 2 or config.posterior_steps < 16 or config.posterior_steps % 4:
        raise ValueError(
            "posterior_chains must be at least 2 and posterior_steps a multiple of 4 from 16 on, got "
            f"{config.posterior_chains} and {config.posterior_steps}."
        )
    present = [n for n in MODELS if config.draws and (Path(config.draws) / "draws" / f"{n}.json.zip").is_file()]
    if config.draws and not present:
        wanted = ", ".join(f"{name}.json.zip" for name in MODELS)
        raise FileNotFoundError(f"draws: {Path(config.draws) / 'draws'} holds none of {wanted}: name another folder.")
    began, spent = time.perf_counter(), time.process_time()
    run = runs.open_run(config)
    key_errors, key_posteriors = jax.random.split(jax.random.key(config.seed))
    found = measure(config, key_errors)
    rows = found["mixture_unadjusted"]
    small = [i for i, eta in enumerate(config.step_sizes) if eta <= config.fit_up_to]
    order = fit_order(*([a[i] for i in small] for a in (config.step_sizes, rows["error"], rows["stderr"])))
    z = np.array([found[f"{n}_metropolis"]["error"] for n in targets()]) / [
        found[f"{n}_metropolis"]["stderr"] for n in targets()
    ]
    rows = found["gaussian_unadjusted"]
    z_theory = (np.array(rows["error"]) - found["gaussian_theory"]) / rows["stderr"]
    draw_errors(run.folder / "bias.png", found, order)
    posteriors = {name: compare(name, config, jax.random.fold_in(key_posteriors, i)) for i, name in enumerate(present)}
    if posteriors:
        draw_posteriors(run.folder / "posteriors.png", posteriors)
    results = {
        "order_unadjusted": order[0],
        "order_unadjusted_stderr": order[1],
        "max_abs_z_gaussian_against_closed_form": float(np.abs(z_theory).max()),
        "max_abs_z_metropolis_against_exact": float(np.abs(z).max()),
        **{f"{what}_{name}": one[what] for name, one in posteriors.items() for what in ("max_abs_z", "min_ess")},
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - spent,
    }
    runs.write_metrics(run, {**results, "errors": found, "posteriors": posteriors})
    return results


if __name__ == "__main__":
    runs.cli(main, Config)
