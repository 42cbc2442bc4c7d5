"""Guidance: what does the scale gamma buy, what does it cost, and what is it that gamma = 2 samples?

    python experiments/guidance.py

First in the plane, with the exact scores of a labelled mixture: samples at gamma = 2 against the density
p(x) p(y | x)^2 / Z that they are often said to have. They do not have it, and the script says by how much.
Then digits on demand (scikit-learn's, 8 x 8): one network trained with dropped labels, for classifier-free guidance,
and one classifier of noisy digits, for classifier guidance of the same network without its labels. Both draw 10 x gamma
grids from the same noise. A support vector machine that was trained on real digits, 98.3 per cent right on others, says
how many show what was asked for; the mean distance between digits of one class, relative to real ones, how much they
differ.

Expected: in the plane 0.111 +- 0.006 nats between what gamma = 2 samples and that density (at gamma = 1, 0.0001);
of digits

    gamma                       0      0.5    1      2      4      8
    classifier-free: right      0.09   0.65   0.985  1.00   1.00   1.00     +- 0.025 or less
                     differ     1.13   0.97   0.84   0.79   0.80   0.83     +- 0.013 or less
    classifier:      right      0.09   0.55   0.84   0.95   0.98   1.00
                     differ     1.13   1.00   0.92   0.89   0.86   0.84

(real digits of all classes would differ by 1.34), in 120 seconds of processor time, two to three minutes. A run that
was stopped goes on with --resume; so does a finished one, with other --gammas, --interval or --sampler.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import (
    datasets,
    densities,
    flows,
    guidance,
    metrics,
    networks,
    plots,
    runs,
    schedules,
    score_matching,
    sdes,
    solvers,
    training,
)
from dgm_jax.types import SDE, Array, VectorField

CLASSES = 10
MEASURING = ("gammas", "per_class", "sampler", "sampler_steps", "interval", "num_points")  # may differ on --resume
SCHEDULE = schedules.vp()


@dataclass(frozen=True)
class Config:
    """What to train, and how much to measure."""

    out: str = "runs/guidance"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoint."""
    seed: int = 0
    """Of all random numbers."""
    features: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of the score network's hidden layers."""
    classifier_features: tuple[int, ...] = (256, 256)
    """Widths of the classifier's."""
    drop_rate: float = 0.15
    """Share of the labels that are dropped in training."""
    num_steps: int = 4000
    """Training steps, of both networks at once."""
    batch_size: int = 128
    """Examples in a step, over all devices."""
    learning_rate: float = 1e-3
    """Largest learning rate of Adam, after a twentieth of the steps; it falls along a cosine."""
    weight_decay: float = 0.35
    """Of AdamW: without it 1,500 digits are learned by heart."""
    ema_decay: float = 0.999
    """Of the average of the parameters over the steps, which is what is used in the end."""
    noise_mean: float = -0.5
    """Training noise: log(sigma / (alpha std)) is normal, std that of the data; this is its mean."""
    noise_std: float = 1.2
    """Its standard deviation."""
    noise_start: float = 0.02
    """sigma / alpha where sampling ends: the noise that samples have."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    gammas: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Guidance scales."""
    per_class: int = 40
    """Samples of each digit at each scale, each way; the same noise at every scale."""
    sampler: Literal["sde", "flow"] = "sde"
    """Reverse SDE by Euler-Maruyama, or probability flow by Euler."""
    sampler_steps: int = 150
    """Steps of either, equal in time."""
    interval: tuple[float, float] | None = None
    """Times in which gamma counts, from 0 to 1, such as 0.1 0.5; elsewhere it is 1. By default it counts always."""
    num_points: int = 4000
    """Samples of the mixture in the plane."""


def check(config: Config) -> None:
    """What would fail only after the training is found before it."""
    if not config.gammas or not all(map(math.isfinite, config.gammas)):
        raise ValueError(f"gammas must be finite numbers, got {config.gammas}: for instance --gammas 0 1 2 4.")
    if config.interval is not None and not 0 <= config.interval[0] < config.interval[1] <= 1:
        raise ValueError(f"interval must be two growing times in [0, 1], got {config.interval}.")
    if config.per_class < 3 or config.num_points < 100:
        raise ValueError(
            f"per_class must be at least 3 and num_points 100, for standard errors, got {config.per_class} and "
            f"{config.num_points}."
        )
    if not 0 <= config.drop_rate <= 1:
        raise ValueError(f"drop_rate must be in [0, 1], got {config.drop_rate}.")
    if config.num_steps < 1 or config.sampler_steps < 1:
        raise ValueError(
            f"num_steps and sampler_steps must be at least 1, got {config.num_steps} and {config.sampler_steps}."
        )
    largest = math.exp(-0.5 * float(schedules.log_snr(SCHEDULE, jnp.ones(()))))
    if not 0 < config.noise_start < largest:
        raise ValueError(
            f"noise_start must be between 0 and {largest:.3g}, sigma / alpha where sampling begins, got "
            f"{config.noise_start}."
        )
    if not (math.isfinite(config.noise_mean) and 0 < config.noise_std < math.inf):
        raise ValueError(
            f"noise_mean must be finite and noise_std positive, got {config.noise_mean} and {config.noise_std}."
        )


# --------------------------------------------------------------------------------- the plane, with exact scores


LABELS = (0, 1, 0)
GAMMA = 2.0
EXTENT = 5.0  # half the side of the square in which p(x) p(y | x)^gamma is integrated


class Plane(NamedTuple):
    """A labelled mixture, class 0 of which is wanted: modes at both sides of one of class 1."""

    density: densities.Mixture
    wanted: densities.Mixture  # p(x | y = 0)
    log_joint: Callable[..., Array]  # gamma [], x [num, 2] -> log p(x) + gamma log p(y = 0 | x), [num]


def plane() -> Plane:
    """Three Gaussians, each turned its own way."""
    angles, spectra = (0.5, 1.4, 2.6), ((0.3, 0.05),) * 3
    turns = [np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in angles]
    covariances = [q @ np.diag(d) @ q.T for q, d in zip(turns, spectra, strict=True)]
    means = np.array([[-1.2, -0.8], [0.3, 0.3], [1.0, 0.8]])
    density = densities.Mixture(*(jnp.asarray(a, float) for a in ([0.3, 0.4, 0.3], means, np.stack(covariances))))
    log_p = partial(densities.log_density(density, SCHEDULE), jnp.zeros(()))
    log_class = partial(densities.log_prob_y(density, SCHEDULE, LABELS, 0), jnp.zeros(()))
    log_joint = jax.jit(jax.vmap(lambda gamma, x: log_p(x) + gamma * log_class(x), (None, 0)))
    return Plane(density, densities.condition(density, LABELS, 0), log_joint)


def tilted(mixture: Plane, gamma: float, num: int = 241) -> tuple[np.ndarray, float]:
    """log p(x) p(y | x)^gamma / Z on a square grid [num, num], and log Z by the trapezoidal rule."""
    joint = np.asarray(mixture.log_joint(gamma, plots.grid_points(EXTENT, num).reshape(-1, 2)), np.float64)
    log_z = math.log(np.exp(joint).sum() * (2 * EXTENT / (num - 1)) ** 2)
    return (joint - log_z).reshape(num, num), log_z


def tilted_samples(key: Array, mixture: Plane, gamma: float, num: int) -> Array:
    """Exact draws from p(x) p(y | x)^gamma / Z by rejection: of x ~ p each stays with probability p(y | x)^gamma."""
    key_x, key_u = jax.random.split(key)
    tries = math.ceil(1.2 * num / math.exp(tilted(mixture, max(gamma, GAMMA))[1])) + 200  # Z, the share that stays
    x = jax.jit(densities.sample, static_argnums=2)(key_x, mixture.density, tries)
    stays = jnp.log(jax.random.uniform(key_u, x.shape[:1])) < mixture.log_joint(gamma, x) - mixture.log_joint(0.0, x)
    return x[np.asarray(stays)][:num]


def make_guided(mixture: Plane) -> Callable[..., tuple[Array, Array, Array]]:
    """(keys [num], z [num, 2], gamma []) -> class 0 by the flow, its log-density, and by the reverse SDE."""
    velocities = [densities.velocity(density, SCHEDULE) for density in (mixture.wanted, mixture.density)]
    log_prob_y = densities.log_prob_y(mixture.density, SCHEDULE, LABELS, 0)
    score = densities.score(mixture.density, SCHEDULE)
    tolerance = {"rtol": 1e-4, "atol": 1e-4, "throw": False}

    def one(key: Array, z: Array, gamma: Array) -> tuple[Array, Array, Array]:
        velocity = guidance.classifier_free(*velocities, gamma)
        x, log_prob = flows.sample_and_log_prob(velocity, z, t_data=0.0, t_base=1.0, **tolerance)
        reverse = sdes.reverse(sdes.diffusion_process(SCHEDULE), guidance.classifier(score, log_prob_y, gamma))
        return x, log_prob, solvers.euler_maruyama(key, reverse, z, t0=1.0, t1=0.0, num_steps=500)

    return jax.jit(jax.vmap(one, (0, 0, None)))


def moments(x: np.ndarray) -> np.ndarray:
    """Both coordinates, their squares and their product, [num, 5]."""
    return np.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]], axis=1)


def judge_plane(config: Config, run: runs.Run, key: Array) -> dict[str, Any]:
    """Distances of what is sampled from p(x) p(y | x)^gamma, at gamma 1, where there is none, and 2; and a picture."""
    mixture, num = plane(), config.num_points
    guided, distance = make_guided(mixture), jax.jit(metrics.sliced_wasserstein)
    key_z, key_sde, key_truth, key_other, key_distance = jax.random.split(key, 5)
    z, keys = jax.random.normal(key_z, (num, 2)), jax.random.split(key_sde, num)
    results: dict[str, Any] = {}
    for gamma in (1.0, GAMMA):
        log_tilted, log_z = tilted(mixture, gamma)
        weights = np.exp(log_tilted).reshape(-1)
        exact = weights / weights.sum() @ moments(np.asarray(plots.grid_points(EXTENT, len(log_tilted))).reshape(-1, 2))
        truth, other = (tilted_samples(k, mixture, gamma, num) for k in (key_truth, key_other))
        flow, log_prob, sde = guided(keys, z, jnp.asarray(gamma))
        log_ratio = np.asarray(log_prob - mixture.log_joint(gamma, flow), np.float64) + log_z
        name = f"plane_gamma{gamma:g}"
        results |= {f"{name}_kl_flow_nats": log_ratio.mean()}
        results |= {f"{name}_kl_flow_nats_stderr": log_ratio.std(ddof=1) / math.sqrt(num)}
        for way, x in (("flow", flow), ("sde", sde), ("itself", other)):  # itself: exact samples beside exact samples
            value, stderr = distance(key_distance, x, truth)
            values = moments(np.asarray(x, np.float64))
            found = {
                "sliced_wasserstein": value,
                "sliced_wasserstein_stderr": stderr,
                "moment_differences": values.mean(0) - exact,
                "moment_differences_stderr": values.std(0, ddof=1) / math.sqrt(num),
            }
            results |= {f"{name}_{way}_{key}": value for key, value in found.items()}
    draw_plane(run, mixture, {"probability flow": flow, "reverse SDE": sde})

    def worst(gamma: float, way: str) -> float:
        found, stderr = (results[f"plane_gamma{gamma:g}_{way}_moment_differences{end}"] for end in ("", "_stderr"))
        return float(np.max(np.abs(found / stderr)))

    def kl(gamma: float) -> str:
        value, stderr = (float(results[f"plane_gamma{gamma:g}_kl_flow_nats{end}"]) for end in ("", "_stderr"))
        return f"{value:.4f} +- {stderr:.4f} nats"

    off = {way: (worst(GAMMA, way), worst(1.0, way)) for way in ("flow", "sde")}
    power = f"{GAMMA:g}"
    shown = results[f"plane_gamma{power}_kl_flow_nats"] > 5 * results[f"plane_gamma{power}_kl_flow_nats_stderr"]
    verdict = "does not sample" if shown else "with so few points cannot be told from"
    results["plane_statement"] = (
        f"gamma = {power} {verdict} p(x) p(y|x)^{power} / Z. KL from it: {kl(GAMMA)} by the probability flow; at "
        f"gamma = 1 {kl(1.0)}. Its moments are missed by up to {off['flow'][0]:.0f} standard errors, at gamma = 1 "
        f"{off['flow'][1]:.1f}; by the reverse SDE {off['sde'][0]:.0f} and {off['sde'][1]:.1f}."
    )
    runs.say(results["plane_statement"])
    return results


# ---------------------------------------------------------------------------------------------------- the digits


def time_of(log_noise: Array) -> Array:
    """The time at which log(sigma / alpha) has this value, from a table."""
    t = jnp.geomspace(1e-6, 1.0, 8192)
    return jnp.interp(log_noise, -0.5 * jax.vmap(partial(schedules.log_snr, SCHEDULE))(t), t)


def make_fields(config: Config, key: Array, std: float, dim: int) -> tuple[VectorField, VectorField, Any]:
    """The score, with args (params, y), the logits of the classifier, with args params, and the initial params.

    With n = alpha^2 std^2 + sigma^2 and c = log(sigma / alpha) / 4,

        s = -x / n + alpha std / (sigma sqrt n) F(c, x / sqrt n, y),    logits = alpha std / sqrt n G(c, x / sqrt n):

    for F see Karras et al. (2022), equation 7; G counts as much as there is signal, for noise alone has no class.
    """
    dtype = jnp.zeros(()).dtype
    mlp = partial(networks.MLP, activation=jax.nn.silu, time_features=64, residual=True, param_dtype=dtype)
    f, g = mlp(config.features, num_classes=CLASSES), mlp(config.classifier_features, out_features=CLASSES)
    t, x, (key_f, key_g) = jnp.zeros(()), jnp.zeros(dim), jax.random.split(key)
    params = {"score": jax.jit(f.init)(key_f, t, x, jnp.int32(0)), "classifier": jax.jit(g.init)(key_g, t, x)}
    network, classifier = networks.conditional(f), networks.vector_field(g)

    def inputs(t: Array) -> tuple[Array, Array, Array]:
        alpha, sigma = schedules.alpha(SCHEDULE, t), schedules.sigma(SCHEDULE, t)
        n = (alpha * std) ** 2 + sigma**2
        return jnp.log(sigma / alpha) / 4, n, alpha * std / jnp.sqrt(n)

    def score(t: Array, x: Array, args: Any) -> Array:
        (params, y), (clock, n, signal) = args, inputs(t)
        f = network(clock, x / jnp.sqrt(n), (params["score"], y))
        return -x / n + signal / schedules.sigma(SCHEDULE, t) * f

    def logits(t: Array, x: Array, params: Any) -> Array:
        clock, n, signal = inputs(t)
        return signal * classifier(clock, x / jnp.sqrt(n), params["classifier"])

    return score, logits, params


def make_loss(score: VectorField, logits: VectorField, std: float, config: Config) -> Callable[..., Any]:
    """Denoising score matching per dimension, some labels dropped, and cross-entropy: they share no parameters."""
    mean, width = config.noise_mean + math.log(std), config.noise_std
    ends = jnp.stack([jnp.log(config.noise_start), -0.5 * schedules.log_snr(SCHEDULE, jnp.ones(()))])
    low, high = jax.scipy.special.ndtr((ends - mean) / width)
    uniform = metrics.uniform_dequantization(17, -1.0, 1.0)

    def weight(t: Array) -> Array:
        return SCHEDULE.variance(t) * (1 + SCHEDULE.variance(t) / (schedules.alpha(SCHEDULE, t) * std) ** 2)

    def one(t: Array, x: Array, noise: Array, y: Array, shown: Array, params: Any) -> tuple[Array, Array]:
        denoising = score_matching.denoising(score, SCHEDULE, t, x, noise, (params, shown), weight=weight)
        return denoising / x.size, guidance.cross_entropy(logits, SCHEDULE, t, x, noise, y, params)

    def loss(params: Any, key: Array, batch: Any) -> tuple[Array, dict[str, Array]]:
        key_data, key_time, key_noise, key_drop = jax.random.split(key, 4)
        (integers, y), num = batch, len(batch[0])
        x = metrics.dequantize(key_data, integers, uniform)
        shown = guidance.drop_labels(key_drop, y, config.drop_rate, CLASSES)
        u = jnp.linspace(0.0, 1.0, num, endpoint=False) + jax.random.uniform(key_time) / num
        t = time_of(mean + width * jax.scipy.special.ndtri(low + (high - low) * u))
        noise = jax.random.normal(key_noise, x.shape)
        denoising, entropy = map(jnp.mean, jax.vmap(one, (0, 0, 0, 0, 0, None))(t, x, noise, y, shown, params))
        return denoising + entropy, {"denoising": denoising, "cross_entropy": entropy}

    return loss


def make_sampler(config: Config, score: VectorField, logits: VectorField, way: str) -> Callable[..., Array]:
    """(params, keys [num], z [num, d], y [num], gamma []) -> samples [num, d]: one compilation for all gamma."""
    end = time_of(jnp.log(config.noise_start))
    process = sdes.diffusion_process(SCHEDULE)
    without = guidance.unconditional(score, CLASSES)

    def one(params: Any, key: Array, z: Array, y: Array, gamma: Array) -> Array:
        if way == "classifier_free":
            field = guidance.classifier_free(score, without, gamma, interval=config.interval)
        else:
            field = guidance.classifier(without, guidance.log_prob_y(logits), gamma, interval=config.interval)
        sde = sdes.reverse(process, field)
        if config.sampler == "flow":
            sde = SDE(sdes.probability_flow(process, field), lambda t, x, args: jnp.zeros((), x.dtype))
        steps = config.sampler_steps
        return solvers.euler_maruyama(key, sde, z, (params, y), t0=1.0, t1=end, num_steps=steps)

    return jax.jit(jax.vmap(one, (None, 0, 0, 0, None)))


def diversity(groups: list[np.ndarray]) -> tuple[float, float]:
    """Mean distance between two images of one class, over the classes, and its error: a mean of U-statistics."""
    means, variances = [], []
    for x in groups:
        distances = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)).sum(1) / (len(x) - 1)  # from each to the others
        means.append(distances.mean())
        variances.append(4 * distances.var(ddof=1) / len(x))
    return float(np.mean(means)), math.sqrt(np.sum(variances)) / len(groups)


def judge_digits(images: datasets.Images, y: np.ndarray, samples: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy of a classifier that has seen no model, and diversity relative to real digits, for every scale."""
    from sklearn.svm import SVC

    def flat(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1).astype(float)

    judge = SVC(C=10.0, gamma=0.001).fit(flat(images.train), images.train_labels)
    hit = judge.predict(flat(images.test)) == images.test_labels
    everything = flat(np.concatenate([images.train, images.test]))
    labels = np.concatenate([images.train_labels, images.test_labels])
    real, real_stderr = diversity([everything[labels == c] for c in range(CLASSES)])
    results: dict[str, Any] = {
        "judge_test_accuracy": hit.mean(),
        "judge_test_accuracy_stderr": hit.std(ddof=1) / math.sqrt(len(hit)),
        "real_distance": real,
        "real_distance_stderr": real_stderr,
    }
    for way, grids in samples.items():  # [gammas, num, d]
        columns: dict[str, list[float]] = {
            "accuracy": [],
            "accuracy_stderr": [],
            "diversity": [],
            "diversity_stderr": [],
        }
        for x in grids:
            right = judge.predict(x) == y
            guess = (right.sum() + 1) / (len(right) + 2)  # so that the error of 400 out of 400 is not zero
            spread, stderr = diversity([x[y == c] for c in range(CLASSES)])
            columns["accuracy"].append(right.mean())
            columns["accuracy_stderr"].append(math.sqrt(guess * (1 - guess) / len(right)))
            columns["diversity"].append(spread / real)
            columns["diversity_stderr"].append(spread / real * math.hypot(stderr / spread, real_stderr / real))
        results |= {f"{way}_{name}": values for name, values in columns.items()}
    return results


# -------------------------------------------------------------------------------------------------------- pictures


def save(path: Any, size: tuple[float, float], rows: int, columns: int, draw: Callable[[np.ndarray], None]) -> None:
    """A figure of panels, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    draw(figure.subplots(rows, columns, squeeze=False).reshape(-1))
    if jax.process_index() == 0:
        figure.savefig(path)


def draw_plane(run: runs.Run, mixture: Plane, samples: dict[str, Array]) -> None:
    """p(x | y), the tilted density, and what is sampled under the contours of the latter; dashed, the other class."""
    extent = 2.6
    maps = {g: np.exp(tilted(mixture, g)[0]) for g in (1.0, GAMMA)}
    grid = plots.grid_points(EXTENT, len(maps[1.0]))
    everything, wanted = (np.exp(np.asarray(mixture.log_joint(g, grid.reshape(-1, 2)))) for g in (0.0, 1.0))
    other, power = (everything - wanted).reshape(maps[1.0].shape), f"{GAMMA:g}"

    def draw(panels: np.ndarray) -> None:
        titles = ("$p(x\\,|\\,y)$", f"$p(x)\\,p(y\\,|\\,x)^{power}\\,/\\,Z$")
        for panel, g, title in zip(panels, maps, titles, strict=False):
            panel.imshow(maps[g], origin="lower", extent=(-EXTENT, EXTENT) * 2, vmin=0, vmax=maps[GAMMA].max())
            panel.set_title(title)
        for panel, (name, x) in zip(panels[2:], samples.items(), strict=True):
            panel.hist2d(*np.asarray(x).T, bins=np.linspace(-extent, extent, 45), density=True, vmax=maps[GAMMA].max())
            panel.set_title(f"{name}, $\\gamma = {power}$")
        for panel in panels:
            line = np.linspace(-EXTENT, EXTENT, len(maps[GAMMA]))
            panel.contour(
                line, line, maps[GAMMA], levels=np.linspace(0.1, 0.9, 5) * maps[GAMMA].max(), colors="w", linewidths=0.7
            )
            panel.contour(line, line, other, levels=[0.1 * other.max()], colors="#D55E00", linestyles="dashed")
            panel.set(xticks=(), yticks=(), xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")

    save(run.folder / "plane.png", (11.5, 3.2), 1, 4, draw)


def draw_digits(run: runs.Run, config: Config, y: np.ndarray, samples: dict[str, np.ndarray], each: int = 4) -> None:
    """Rows are classes; blocks are scales, each of the same few draws of noise."""

    def draw(panels: np.ndarray) -> None:
        for panel, (way, grids) in zip(panels, samples.items(), strict=True):
            rows = [np.concatenate([x[y == c][:each] for x in grids]) for c in range(CLASSES)]
            block = np.stack(rows).reshape(CLASSES, -1, 8, 8)
            block = np.pad(block, ((0, 0), (0, 0), (0, 1), (0, 1)))
            block = block.reshape(CLASSES, len(grids), each, 9, 9).transpose(0, 3, 1, 2, 4)
            block = np.pad(block.reshape(CLASSES * 9, len(grids), -1), ((0, 0), (0, 0), (0, 4)), constant_values=16)
            panel.imshow(block.reshape(CLASSES * 9, -1)[:-1, :-4], cmap="gray", interpolation="nearest")
            centres = (np.arange(len(grids)) + 0.5) * (each * 9 + 4) - 2.5
            panel.set_xticks(centres, [f"{g:g}" for g in config.gammas])
            panel.set_yticks(np.arange(CLASSES) * 9 + 3.5, map(str, range(CLASSES)))
            panel.tick_params(length=0)
            panel.set(xlabel="guidance scale $\\gamma$", ylabel="asked for", title=f"{way.replace('_', '-')} guidance")
            for spine in panel.spines.values():
                spine.set_visible(False)

    save(run.folder / "digits.png", (8.0, 7.3), 2, 1, draw)


def draw_curves(run: runs.Run, config: Config, results: dict[str, Any], ways: tuple[str, ...]) -> None:
    """Accuracy and diversity against gamma."""

    def draw(panels: np.ndarray) -> None:
        place = np.arange(len(config.gammas))
        for panel, name in zip(panels, ("accuracy", "diversity"), strict=True):
            for way, mark, colour in zip(ways, "os", ("#0072B2", "#D55E00"), strict=True):
                values, errors = results[f"{way}_{name}"], results[f"{way}_{name}_stderr"]
                label = f"{way.replace('_', '-')} guidance"
                panel.errorbar(place, values, errors, marker=mark, color=colour, capsize=3, markersize=5, label=label)
            level = results["judge_test_accuracy"] if name == "accuracy" else 1.0
            panel.axhline(level, color="#666666", linestyle="--", linewidth=1, label="real digits")
            panel.set_xticks(place, [f"{g:g}" for g in config.gammas])
            panel.set_ylim(0, None)
            panel.set_xlabel("guidance scale $\\gamma$")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set(title="shows the digit asked for", ylabel="accuracy of an independent classifier")
        panels[1].set(title="how different samples of a class are", ylabel="mean distance / that of real digits")
        panels[0].legend(frameon=False, loc="lower right")

    save(run.folder / "tradeoff.png", (9.5, 3.6), 1, 2, draw)


def main(config: Config) -> dict[str, Any]:
    """Measures in the plane, trains, samples, measures, draws; returns what metrics.json holds."""
    began, used = time.perf_counter(), time.process_time()
    check(config)
    images = datasets.digits()
    run = runs.open_run(config, may_differ=MEASURING)
    key_plane, key_data, key_net, key_train, key_noise, key_sample = jax.random.split(jax.random.key(config.seed), 6)
    results = judge_plane(config, run, key_plane)

    uniform = metrics.uniform_dequantization(images.levels, -1.0, 1.0)
    std = float(np.std(images.train * (2 / images.levels)))
    score, logits, params = make_fields(config, key_net, std, images.train[0].size)
    mesh = training.mesh()
    mine = training.local_rows(mesh, config.batch_size)
    rows = jax.jit(training.batch_indices, static_argnums=(2, 3))

    def batch(n: int) -> Any:
        chosen = np.asarray(rows(key_data, n, len(images.train), config.batch_size))[mine]
        return training.shard(mesh, (images.train[chosen].reshape(len(chosen), -1), images.train_labels[chosen]))

    steps = config.num_steps
    optimizer = training.adam(config.learning_rate, steps, warmup=steps // 20, weight_decay=config.weight_decay)
    loss = make_loss(score, logits, std, config)
    update = training.step(loss, optimizer, ema_decay=config.ema_decay, has_aux=True)
    state, key = training.replicate(mesh, (training.init(params, optimizer), key_train))
    options = {"num_steps": steps, "run": run, "checkpoint_every": config.checkpoint_every}
    state, history = runs.train(jax.jit(update, donate_argnums=0), state, batch, key, **options)
    params = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state.ema)
    trained = time.perf_counter()

    y = np.repeat(np.arange(CLASSES, dtype=np.int32), config.per_class)
    z = jax.random.normal(key_noise, (len(y), images.train[0].size))
    keys = jax.random.split(key_sample, len(y))
    samples = {}
    for way in ("classifier_free", "classifier"):
        runs.say(f"{way.replace('_', '-')} guidance: {len(y)} samples at each of {len(config.gammas)} scales")
        draw = make_sampler(config, score, logits, way)
        found = [draw(params, keys, z, y, jnp.asarray(gamma, z.dtype)) for gamma in config.gammas]
        samples[way] = np.stack([np.asarray(metrics.quantize(x, uniform)) for x in found])
    results |= {
        "gammas": config.gammas,
        **judge_digits(images, y, samples),
        **{f"final_{name}": float(np.mean(history[name][-100:])) for name in ("denoising", "cross_entropy")},
        "seconds": time.perf_counter() - began,
        "seconds_sampling_and_judging": time.perf_counter() - trained,
        "seconds_of_processor": time.process_time() - used,
    }
    draw_digits(run, config, y, samples)
    draw_curves(run, config, results, tuple(samples))
    plots.curve(run.folder / "loss.png", history, "denoising", label="denoising loss per dimension")
    return runs.write_metrics(run, results)


if __name__ == "__main__":
    runs.cli(main, Config)
