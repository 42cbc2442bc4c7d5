"""Flow matching: what does the coupling of data and noise change, and what does reflow?

    python experiments/flow_matching.py
    python experiments/flow_matching.py --data digits --out runs/flow_matching_digits

In the plane: from eight gaussians to two moons, with velocities learned from independent pairs, from the optimal ones
of each batch, and from the pairs that the flow of the former makes (reflow). How far is one step of Euler's method from
the data, in squared 2-Wasserstein distance; how straight are the paths; how far is the likelihood of moons from their
density, which is known? From noise to moons with a label each: what do optimal pairs do to a model that is shown the
label, and what do pairs within each class? Where does guidance lead, in closed form and as it was learned? And
stochastic interpolants: one network for the velocity and for the noise in between, sampled without noise and with it.
On digits (scikit-learn's, 8 x 8): one network for all classes, its label dropped now and then for guidance, by both
kinds of pairs; digits that show what was asked for, by scale and by number of steps, test bits per dimension with their
error, and reflow.

Expected, in the plane (distances of 2,000 even samples; two such sets of the data are 0.005 apart):

    pairs                         optimal            independent      reflow of independent
    one Euler step, W_2^2         0.050              4.3              0.14
    straightness                  0.008 +- 0.001     12.2 +- 0.2      0.094 +- 0.005
    normalised path energy       -0.002 +- 0.015     1.77 +- 0.03     0.177 +- 0.014
    evaluations of the flow       32                 116              67
    log p(x) above the model's    0.29 +- 0.03       0.72 +- 0.06     1.38 +- 0.10    nat, of 1,000 moons whose own NLL
                                                                                      is 2.06 +- 0.03; numerical error
                                                                                      0.004, 0.10 and 0.05
    three seeds of 2,000 steps:
    one Euler step, W_2^2         0.153 +- 0.004     2.58 +- 0.04
    straightness                  0.0248 +- 0.0003   9.40 +- 0.07

0.050 too for 10,000 independent samples of one step from optimal pairs. All that follows is of three seeds and 2,000
steps, a mean and its standard error over the seeds. With labels, W_2^2 between the samples of a moon and that moon is
3.9 +- 0.1 by optimal pairs, 0.033 +- 0.007 by optimal pairs within classes, 0.030 +- 0.005 by independent ones (0.017
+- 0.006 between two sets of the data). Guided, the share that is nearest to the moon asked for, and how far independent
pairs lead from where the exact velocity does, by the same steps from the same noise:

    gamma                         0                  1                   2                   4
    optimal pairs                 0.499 +- 0.005     0.723 +- 0.010      0.868 +- 0.020      0.948 +- 0.017
    within classes                0.502 +- 0.004     0.9974 +- 0.0006    0.9999 +- 0.0001    1
    independent                   0.499 +- 0.005     0.9983 +- 0.0003    1                   1
    closed form                   0.500 +- 0.004     1                   1                   1
    W_2^2 from the closed form    0.051 +- 0.005     0.012 +- 0.001      0.011 +- 0.002      0.06 +- 0.02

Guidance by more than 1 drives to the far ends of the moons, in closed form too. Interpolants: 0.083 +- 0.010 by the ODE
in 200 steps and 0.081 +- 0.011 by an adaptive one, 0.081 +- 0.006 and 0.097 +- 0.007 by SDEs with g^2 = gamma and
4 gamma: at 2,000 steps of training noise mends nothing. In all 690 seconds of processor time.

On digits, the share that an independent classifier takes for what was asked for, in 175 seconds of processor time:

    gamma                   0      1      2      4         Euler steps    1      2      4      16
    optimal                 0.12   0.58   0.93   1.00                     0.81   0.72   0.64   0.59
    within classes          0.11   0.93   1.00   1.00                     0.99   0.98   0.97   0.94
    reflow of the latter                                                  0.93   0.92   0.91   0.91

to +- 0.025 or less, and 2.89 +- 0.02 bits per dimension of the test set without and 2.73 +- 0.02 with its labels, by
pairs within classes. Few steps are right often and blurred: sliced Wasserstein distance 0.22 after one, 0.11 after 16;
after reflow 0.16 and 0.11.

Eight gaussians and moons are of the size that Tong et al. (2024) have: modes on a circle of radius 5, of variance 0.1
(their code has sqrt(0.1)); half circles of radius 3 about (-1, -1) and (2, 0.5), shifted by 0.6 u (1, 1), u uniform.
Training batches are even: as many points of each mode and of each moon, one in each share of the angles. A run that was
stopped goes on with --resume.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import (
    datasets,
    densities,
    flow_matching,
    flows,
    guidance,
    metrics,
    networks,
    plots,
    runs,
    solvers,
    training,
)
from dgm_jax.types import Array, StructuredField, VectorField

Name = Literal["moons", "checkerboard", "two_spirals", "pinwheel", "rings", "swiss_roll", "digits"]
Coupling = Literal["optimal", "independent", "sinkhorn", "conditional"]
CLASSES = 10
LABELLED: tuple[Coupling, ...] = ("optimal", "conditional", "independent")
MEASURING = (
    "num_samples",
    "num_compared",
    "gammas",
    "per_class",
    "sampler_steps",
    "bridge_noises",
    "bridge_evaluations",
    "rtol",
    "test_examples",
)


@dataclass(frozen=True)
class Config:
    """What to train, and how much to measure."""

    out: str = "runs/flow_matching"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoint."""
    seed: int = 0
    """Of all random numbers."""
    data: Name = "moons"
    """Points in the plane, or digits."""
    couplings: tuple[Coupling, ...] | None = None
    """Trained side by side, each its own network; the last is the one whose flow is then reflowed. By default optimal
    and independent in the plane, optimal and conditional on digits."""
    epsilon: float = 0.5
    """Price of entropy of the coupling sinkhorn, in squared units of the data."""
    features: tuple[int, ...] | None = None
    """Widths of the hidden layers: by default 128 three times in the plane, 256 three times for digits."""
    num_steps: int | None = None
    """Training steps: by default 20,000 in the plane, 4,000 for digits."""
    seeds: int = 3
    """In the plane: networks of each kind, each with its own start and batches, in the three parts that follow, whose
    results are means with standard errors over them; at least 2."""
    seed_steps: int = 2000
    """In the plane: training steps of more networks for the same pairs, one for each coupling and seed, from which come
    the errors over seeds; 0 for none."""
    label_steps: int = 2000
    """Of moons: training steps of the networks that are shown labels, three for each seed; 0 for none."""
    bridge_steps: int = 2000
    """In the plane: training steps of the stochastic interpolants, one for each seed; 0 for none."""
    bridge_scale: float = 1.0
    """Of the noise between source and data in an interpolant."""
    bridge_noises: tuple[float, ...] = (0.0, 1.0, 2.0)
    """Sizes c of the noise in the SDE that samples an interpolant, g^2 = c^2 gamma; 0 is the ODE."""
    bridge_evaluations: int = 200
    """Euler-Maruyama steps of that SDE."""
    reflow_steps: int = 3000
    """Training steps of the second network, which begins as a copy of the first; 0 for none."""
    reflow_pairs: int = 10000
    """Pairs that the first flow makes for it."""
    batch_size: int | None = None
    """Examples in a step, over all devices, and in a coupling: by default 256 in the plane, 128 for digits."""
    learning_rate: float | None = None
    """Largest learning rate of Adam, after a twentieth of the steps; it falls along a cosine. By default 0.002 in the
    plane, 0.001 for digits."""
    ema_decay: float = 0.999
    """Of the average of the parameters over the steps, which is what is used in the end."""
    seed_ema_decay: float = 0.995
    """The same, of the networks that there are one of for each seed: they have fewer steps to average over."""
    weight_decay: float = 0.35
    """Of AdamW, on digits: without it 1,500 digits are learned by heart."""
    drop_rate: float = 0.15
    """Share of the labels that are dropped in training, for guidance."""
    checkpoint_every: int = 2000
    """Steps between checkpoints."""
    num_samples: int = 10000
    """In the plane: samples of one Euler step, of the first coupling, whose distance from as many of the data is
    measured; 10,000 take 1 GB of memory, 0 for none."""
    num_compared: int = 2000
    """In the plane: samples in all other distances, even ones of moons, where noise matters less."""
    gammas: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """Guidance scales."""
    per_class: int = 40
    """Samples of each digit at each scale; the same noise at every scale."""
    sampler_steps: int = 50
    """Euler steps of guided sampling."""
    rtol: float = 1e-4
    """Tolerance, relative and absolute, of the flows."""
    test_examples: int | None = None
    """Test examples whose likelihood is measured: by default 1,000 in the plane, 297 for digits."""


def complete(config: Config) -> Config:
    """The configuration with its defaults for this data; what would fail only after the training is found before it."""
    digits = config.data == "digits"
    defaults = {
        "couplings": ("optimal", "conditional") if digits else ("optimal", "independent"),
        "features": (256, 256, 256) if digits else (128, 128, 128),
        "num_steps": 4000 if digits else 20_000,
        "batch_size": 128 if digits else 256,
        "learning_rate": 1e-3 if digits else 2e-3,
        "test_examples": 297 if digits else 1000,
    }
    config = replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})
    couplings = config.couplings
    if len(set(couplings)) < len(couplings):
        raise ValueError(f"couplings must differ, got {couplings}.")
    if not digits and "conditional" in couplings:
        raise ValueError("the coupling conditional is for data with labels: --data digits.")
    if min(config.num_compared, config.test_examples, config.per_class) < 2 or config.num_samples < 0:
        raise ValueError("num_compared, test_examples and per_class must be at least 2, num_samples at least 0.")
    if not config.gammas or not all(map(math.isfinite, config.gammas)):
        raise ValueError(f"gammas must be finite numbers, got {config.gammas}: for instance --gammas 0 1 2.")
    if not 0 <= config.drop_rate <= 1:
        raise ValueError(f"drop_rate must be in [0, 1], got {config.drop_rate}.")
    steps = config.reflow_steps, config.seed_steps, config.label_steps, config.bridge_steps
    if min(steps) < 0:
        raise ValueError(f"reflow_steps, seed_steps, label_steps and bridge_steps must be at least 0, got {steps}.")
    if config.reflow_pairs < config.batch_size:
        raise ValueError(
            f"reflow_pairs must be at least batch_size, got {config.reflow_pairs} and {config.batch_size}."
        )
    if config.seeds < 2:
        raise ValueError(f"seeds must be at least 2, for a standard error, got {config.seeds}.")
    if not 0 < config.bridge_scale < math.inf:
        raise ValueError(f"bridge_scale must be positive, got {config.bridge_scale}.")
    if not config.bridge_noises or not all(0 <= c < math.inf for c in config.bridge_noises):
        raise ValueError(f"bridge_noises must be finite and at least 0, got {config.bridge_noises}.")
    if config.batch_size % 8:
        raise ValueError(f"batch_size must be a multiple of 8, for batches that are even, got {config.batch_size}.")
    if not 0 < config.epsilon < math.inf:
        raise ValueError(f"epsilon must be positive, got {config.epsilon}.")
    return config


# --------------------------------------------------------------------------------------------------------- training

Batch = dict[str, tuple[Array, Array, Array]]  # of each network data [n, *event], source [n, *event], labels [n]


def times(key: Array, num: int) -> Array:
    """One in each of so many equal shares of [0, 1]."""
    return jnp.linspace(0.0, 1.0, num, endpoint=False) + jax.random.uniform(key, (num,)) / num


def make_loss(fields: dict[str, VectorField], drop_rate: float, num_classes: int) -> Callable[..., Any]:
    """Flow matching on straight paths per dimension, of all networks at once: they share no parameters."""

    def loss(params: Any, key: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
        key_time, key_drop = jax.random.split(key)

        def mean(name: str) -> Array:
            x0, x1, y = batch[name]
            t = times(key_time, len(y))
            shown = guidance.drop_labels(key_drop, y, drop_rate, num_classes)
            one = lambda t, x0, x1, y: flow_matching.loss(fields[name], t, x0, x1, (params[name], y))  # noqa: E731
            return jnp.mean(jax.vmap(one)(t, x0, x1, shown)) / x0[0].size

        losses = {name: mean(name) for name in fields}
        return sum(losses.values()), losses

    return loss


def make_bridge_loss(velocity: VectorField, denoiser: VectorField, path: flow_matching.Interpolant) -> Callable:
    """Velocity and denoiser of a stochastic interpolant per dimension, of all networks at once."""

    def loss(params: Any, key: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
        key_time, key_noise = jax.random.split(key)

        def mean(name: str) -> Array:
            x0, x1, y = batch[name]
            t = 1e-3 + (1 - 2e-3) * times(key_time, len(y))  # at both ends gamma has no derivative

            def one(*example: Array) -> Array:
                t, x0, x1, z, y = example
                both = (velocity, flow_matching.interpolant_loss), (denoiser, flow_matching.denoiser_loss)
                return sum(of(field, path, t, x0, x1, z, (params[name], y)) for field, of in both)

            return jnp.mean(jax.vmap(one)(t, x0, x1, jax.random.normal(key_noise, x0.shape), y)) / x0[0].size

        losses = {name: mean(name) for name in batch}
        return sum(losses.values()), losses

    return loss


def train(
    config: Config,
    run: runs.Run,
    loss: Callable[..., Any],
    params: Any,
    batch: Callable[[int], Batch],
    key: Array,
    *,
    num_steps: int,
    ema_decay: float,
    label: str,
) -> tuple[Any, dict[str, np.ndarray]]:
    """The averaged parameters, on the host, and the history; a part of the run other than the first has its folder."""
    part = run if label == "training" else run._replace(folder=run.folder / label)
    mesh = training.mesh()
    mine = training.local_rows(mesh, config.batch_size)
    decay = config.weight_decay if config.data == "digits" else 0.0
    optimizer = training.adam(
        config.learning_rate, num_steps, warmup=num_steps // 20, clip_norm=None, weight_decay=decay
    )
    update = jax.jit(training.step(loss, optimizer, ema_decay=ema_decay, has_aux=True), donate_argnums=0)
    state, key = training.replicate(mesh, (training.init(params, optimizer), key))

    def rows(n: int) -> Any:
        return training.shard(mesh, jax.tree.map(lambda leaf: np.asarray(leaf)[mine], batch(n)))

    options = {"num_steps": num_steps, "run": part, "checkpoint_every": config.checkpoint_every, "label": label}
    state, history = runs.train(update, state, rows, key, **options)
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state.ema), history


def couple(name: Coupling, config: Config) -> Callable[..., Array]:
    """(key, x0, x1, y) -> indices [n]."""
    if name == "conditional":
        return flow_matching.conditional
    plain = {
        "optimal": flow_matching.optimal,
        "independent": jax.jit(flow_matching.independent),
        "sinkhorn": jax.jit(partial(flow_matching.sinkhorn, epsilon=config.epsilon)),
    }[name]
    return lambda key, x0, x1, y: plain(key, x0, x1)


def reflow(
    config: Config,
    run: runs.Run,
    field: VectorField,
    params: Any,
    source: Callable[[Array, int], Array],
    key: Array,
    num_classes: int,
) -> Any:
    """A copy of the network trained on the pairs that its own flow makes."""
    key_source, key_label, key_rows, key_train = jax.random.split(key, 4)
    x1 = source(key_source, config.reflow_pairs)
    y = jax.random.randint(key_label, (len(x1),), 0, num_classes)
    runs.say(f"reflow: {len(x1)} pairs")
    tolerance = {"rtol": config.rtol, "atol": config.rtol, "throw": False}
    pair = over(lambda params, x1, y: flow_matching.reflow(field, x1, (params, y), **tolerance))
    pairs = *(np.asarray(x) for x in pair(params, x1, y)), np.asarray(y)
    order = jax.jit(training.batch_indices, static_argnums=(2, 3))

    def batch(n: int) -> Batch:
        rows = np.asarray(order(key_rows, n, len(x1), config.batch_size))
        return {"reflow": tuple(leaf[rows] for leaf in pairs)}

    loss = make_loss({"reflow": field}, config.drop_rate if num_classes > 1 else 0.0, num_classes)
    options = {"num_steps": config.reflow_steps, "ema_decay": config.ema_decay, "label": "reflow"}
    found, _ = train(config, run, loss, {"reflow": params}, batch, key_train, **options)
    return found["reflow"]


# -------------------------------------------------------------------------------------------------------- measuring


def over(one: Callable) -> Callable:
    """(params, rows) -> one(params, row) of each, 256 at a time."""
    return jax.jit(lambda params, *rows: jax.lax.map(lambda row: one(params, *row), rows, batch_size=256))


def euler(field: VectorField, num_steps: int) -> Callable[..., Array]:
    """(params, x1 [num, *event], y [num]) -> x0 by so many equal steps from t = 1 to 0."""

    def one(params: Any, x1: Array, y: Array) -> Array:
        def step(x: Array, n: Array) -> tuple[Array, None]:
            return x - field(1 - n / num_steps, x, (params, y)) / num_steps, None

        return jax.lax.scan(step, x1, jnp.arange(num_steps).astype(x1.dtype))[0]

    return over(one)


def flow(field: VectorField, config: Config) -> Callable[..., tuple[Array, Array]]:
    """(params, x1, y) -> x0 by the adaptive solver, and its evaluations."""

    def one(params: Any, x1: Array, y: Array) -> tuple[Array, Array]:
        solution = solvers.solve_ode(
            field, x1, (params, y), t0=1.0, t1=0.0, rtol=config.rtol, atol=config.rtol, throw=False
        )
        return solution.x, solution.nfe

    return over(one)


def likelihood(field: VectorField, config: Config, log_base: Callable[[Array], Array]) -> Callable[..., Any]:
    """(params, x0, y) -> flows.Likelihood, its divergences exact: the network knows its own. In the plane they cost
    little, and between clusters they have peaks that the solver sees and a quadrature does not: they are in the solve.
    """

    def one(params: Any, x0: Array, y: Array) -> flows.Likelihood:
        options = {"rtol": config.rtol, "atol": config.rtol, "throw": False, "in_solve": config.data != "digits"}
        return flows.likelihood(field, x0, (params, y), t_data=0.0, t_base=1.0, log_base=log_base, **options)

    return over(one)


def guided(field: VectorField, without: VectorField, num_steps: int) -> Callable[..., Array]:
    """((params, gamma), x1, y) -> x0 by classifier-free guidance of scale gamma."""

    def sample(both: Any, x1: Array, y: Array) -> Array:
        params, gamma = both
        return euler(guidance.classifier_free(field, without, gamma), num_steps)(params, x1, y)

    return jax.jit(sample)


def bridged(
    velocity: VectorField, denoiser: VectorField, interpolant: flow_matching.Interpolant, num_steps: int, path: bool
) -> Callable[..., Any]:
    """((params, c), keys, x1) -> x0 by the SDE with g^2 = c^2 gamma, or the whole path."""

    def one(both: Any, key: Array, x1: Array) -> Any:
        params, c = both
        sde = flow_matching.reverse_sde(velocity, denoiser, interpolant, lambda t: c * interpolant.variance(t) ** 0.25)
        args = params, jnp.int32(0)
        found = solvers.euler_maruyama(key, sde, x1, args, t0=1.0, t1=0.0, num_steps=num_steps, path=path)
        return found[1] if path else found

    return over(one)


def over_seeds(name: str, values: Any) -> dict[str, Any]:
    """The mean over the seeds, its standard error, and what it is the mean of."""
    values = np.asarray(values, np.float64)
    stderr = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    return {name: values.mean(axis=0).tolist(), f"{name}_stderr": stderr.tolist(), f"{name}_of_seeds": values.tolist()}


def measure_paths(field: VectorField, config: Config) -> Callable[..., Any]:
    """(params, x1, W_2^2) -> straightness and normalised path energy, each with its standard error."""
    tolerance = {"rtol": config.rtol, "atol": config.rtol, "throw": False}

    def both(params: Any, x1: Array, transport: Array) -> Any:
        args = params, jnp.int32(0)
        bend = flow_matching.straightness(field, x1, args, **tolerance)
        return bend, flow_matching.normalised_path_energy(field, x1, transport, args, **tolerance)

    return jax.jit(both)


# ------------------------------------------------------------------------------------------------------- the plane


def eight_gaussians() -> densities.Mixture:
    """On a circle of radius 5, each of variance 0.1."""
    angle = jnp.linspace(0.0, 2 * math.pi, 8, endpoint=False)
    means = 5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return densities.Mixture(jnp.full(8, 1 / 8), means, jnp.tile(0.1 * jnp.eye(2)[None], (8, 1, 1)))


def even_gaussians(key: Array, num: int) -> Array:
    """As many from each of the eight, ``[num, 2]``; num is a multiple of 8."""
    means = eight_gaussians().means[jnp.arange(num) % 8]
    return means + math.sqrt(0.1) * jax.random.normal(key, means.shape)


def moons(key: Array, num: int, *, even: bool = False) -> tuple[Array, Array]:
    """Points [num, 2], and which moon each belongs to [num]; even: as many from both, one in each share of the angles,
    in random order. A point has the same distribution either way."""
    key_y, key_angle, key_shift, key_order = jax.random.split(key, 4)
    n = jnp.arange(num, dtype=jnp.int32)
    y, angle = jax.random.bernoulli(key_y, 0.5, (num,)).astype(jnp.int32), jax.random.uniform(key_angle, (num,))
    if even:
        y, angle = n % 2, ((n // 2).astype(angle.dtype) + angle) / ((num + 1) // 2)
        order = jax.random.permutation(key_order, n)
        y, angle = y[order], angle[order]
    circle = jnp.stack([jnp.cos(math.pi * angle), jnp.sin(math.pi * angle)], axis=1)
    moon = jnp.where(y[:, None] == 0, circle, jnp.asarray([[1.0, 0.5]]) - circle)
    return 3 * (moon + 0.2 * jax.random.uniform(key_shift, (num, 1))) - 1, y


def normal(key: Array, num: int) -> Array:
    """Points [num, 2] from N(0, I)."""
    return jax.random.normal(key, (num, 2))


def unlabelled(field: StructuredField) -> StructuredField:
    """A field of (params, y) that does not look at y."""
    return StructuredField(
        lambda t, x, args: field(t, x, args[0]), lambda args: field.prepare(args[0]), field.with_divergence
    )


def moons_log_prob(x: Array) -> Array:
    """Log-density of the moons in nats, ``[2] -> []``, where two points of a moon may be shifted to one.

    p(x) = 1/2 sum of 1 / (1.8 pi |cos a + sin a|)    over the moons, shifts u and angles a that lead to x.
    """
    p = (x + 1) / 3
    total = jnp.zeros((), x.dtype)
    for w, sign in ((p, -1.0), (jnp.asarray([1.0, 0.5], x.dtype) - p, 1.0)):  # w + s (1, 1) is on the half circle
        square = jnp.sum(w) ** 2 - 2 * (jnp.sum(w**2) - 1)
        root = jnp.sqrt(jnp.maximum(square, 1e-12))  # |cos a + sin a|
        for s in ((root - jnp.sum(w)) / 2, (-root - jnp.sum(w)) / 2):
            u = sign * s / 0.2
            inside = (square > -1e-6) & (u > -1e-4) & (u < 1 + 1e-4) & (w[1] + s > -1e-4)  # by rounding
            total += jnp.where(inside, 0.5 / (1.8 * math.pi * root), 0.0)
    return jnp.log(total)


class Task(NamedTuple):
    """What goes where: samplers ``(key, num) -> [num, 2]``, for batches even ones, and the log-densities."""

    data: Callable[[Array, int], Array]
    source: Callable[[Array, int], Array]
    even_data: Callable[[Array, int], Array]
    even_source: Callable[[Array, int], Array]
    log_data: Callable[[Array], Array] | None
    log_source: Callable[[Array], Array]


def make_task(name: Name) -> Task:
    """From eight gaussians to moons, or from noise to other data."""
    if name == "moons":
        mixture = eight_gaussians()
        return Task(
            lambda key, num: moons(key, num)[0],
            lambda key, num: densities.sample(key, mixture, num),
            lambda key, num: moons(key, num, even=True)[0],
            even_gaussians,
            moons_log_prob,
            partial(densities.log_prob, mixture),
        )
    data = datasets.two_d(name)
    known = datasets.log_density(name) if name in ("checkerboard", "rings") else None
    return Task(data, normal, data, normal, known, flows.standard_normal)


def drawn(config: Config, task: Task, key: Array) -> Callable[[int], tuple[Array, Array, Array]]:
    """n -> a key, data and source for step n, not yet paired."""

    @jax.jit
    def draw(n: int) -> tuple[Array, Array, Array]:
        key_pair, key_data, key_source = jax.random.split(jax.random.fold_in(key, n), 3)
        return key_pair, task.even_data(key_data, config.batch_size), task.even_source(key_source, config.batch_size)

    return draw


def paired(config: Config, task: Task, key: Array) -> Callable[[int], Batch]:
    """n -> the batch of step n, paired by every coupling."""
    draw, couple_by = drawn(config, task, key), {name: couple(name, config) for name in config.couplings}
    y = np.zeros(config.batch_size, np.int32)

    def batch(n: int) -> Batch:
        key, x0, x1 = draw(n)
        return {name: (x0, np.asarray(x1)[by(key, x0, x1, y)], y) for name, by in couple_by.items()}

    return batch


def plane(config: Config, run: runs.Run, key: Array) -> dict[str, Any]:
    """Trains all networks in the plane, measures and draws."""
    key_net, key_batch, key_train, key_reflow, key_test, key_source, key_labels, key_seeds, key_bridge = (
        jax.random.split(key, 9)
    )
    task, couplings = make_task(config.data), config.couplings
    net = networks.MLP(config.features, jax.nn.silu, param_dtype=jnp.zeros(()).dtype)
    start = jax.jit(net.init)(key_net, jnp.zeros(()), jnp.zeros(2))
    field = unlabelled(networks.vector_field(net))
    names = list(couplings)
    params, history = train(
        config,
        run,
        make_loss(dict.fromkeys(names, field), 0.0, 1),
        dict.fromkeys(names, start),
        paired(config, task, key_batch),
        key_train,
        num_steps=config.num_steps,
        ema_decay=config.ema_decay,
        label="training",
    )
    plots.curve(run.folder / "loss.png", history, label="flow matching loss per dimension, all couplings")
    if config.reflow_steps:
        params["reflow"] = reflow(config, run, field, params[names[-1]], task.source, key_reflow, 1)
        names.append("reflow")
    labels = labelled(config, run, key_labels) if config.data == "moons" and config.label_steps else {}
    bridges = bridge(config, run, task, key_bridge) if config.bridge_steps else {}

    key_many, key_x, key_other = jax.random.split(key_test, 3)
    num = config.num_compared
    x0, x1 = task.even_data(key_x, num), task.even_source(key_source, num)  # even ones: less noise in the distances
    nothing = jnp.zeros(num, jnp.int32)
    between = flow_matching.squared_wasserstein(x0, x1)
    results: dict[str, Any] = {
        "w2_squared_of_transport": between,
        "w2_squared_floor": flow_matching.squared_wasserstein(x0, task.even_data(key_other, num)),
    }
    one_step, step, solve = {}, euler(field, 1), flow(field, config)
    along, density = measure_paths(field, config), likelihood(field, config, task.log_source)

    def paths(params: Any) -> tuple[dict[str, Any], Array]:
        """What a network does with the source, and what one step makes of it."""
        single, (solved, nfe) = step(params, x1, nothing), solve(params, x1, nothing)
        (bend, bend_stderr), (energy, energy_stderr) = along(params, x1, between)
        found = {
            "straightness": bend,
            "straightness_stderr": bend_stderr,
            "normalised_path_energy": energy,
            "normalised_path_energy_stderr": energy_stderr,
            "one_step_w2_squared": flow_matching.squared_wasserstein(single, x0),
            "flow_w2_squared": flow_matching.squared_wasserstein(solved, x0),
            "flow_evaluations": jnp.mean(nfe),
        }
        return found, single

    tested = task.data(key_other, config.test_examples)
    log_true = None if task.log_data is None else jax.vmap(task.log_data)(tested)
    if log_true is not None:
        results |= mean_and_error("true_nll_nats", -log_true)
    for name in names:
        runs.say(f"measuring {name}")
        found, one_step[name] = paths(params[name])
        results |= {f"{name}_{measure}": value for measure, value in found.items()}
        likely = density(params[name], tested, jnp.zeros(len(tested), jnp.int32))
        results |= mean_and_error(f"{name}_test_nll_nats", -likely.log_prob)
        results[f"{name}_test_nll_nats_numerical_error"] = jnp.mean(likely.error)
        if log_true is not None:
            results |= mean_and_error(f"{name}_kl_nats", log_true - likely.log_prob)
    best, many = couplings[0], config.num_samples
    if many:
        runs.say(f"one Euler step of {best}: the distance of {many} samples")
        single = step(params[best], task.source(key_many, many), jnp.zeros(many, jnp.int32))
        key = f"{best}_one_step_w2_squared_of_{many}_independent"
        results[key] = flow_matching.squared_wasserstein(single, task.data(jax.random.fold_in(key_many, 1), many))
    if config.seed_steps:
        results |= repeat(config, run, task, net, field, lambda params: paths(params)[0], key_seeds)
    draw_plane(config, run, field, params, names, x0, x1, one_step)
    return results | labels | bridges


def mean_and_error(name: str, values: Array) -> dict[str, Array]:
    """Of values of independent examples."""
    return {name: jnp.mean(values), f"{name}_stderr": jnp.std(values, ddof=1) / math.sqrt(len(values))}


def repeat(
    config: Config, run: runs.Run, task: Task, net: Any, field: VectorField, measure: Callable[[Any], dict], key: Array
) -> dict[str, Any]:
    """The same pairs with other seeds, for ``seed_steps`` each: means over the seeds, their own standard errors."""
    key_net, key_batch, key_train = jax.random.split(key, 3)
    seeds, couplings = range(config.seeds), config.couplings
    batches = [paired(config, task, jax.random.fold_in(key_batch, seed)) for seed in seeds]
    starts = [net.init(jax.random.fold_in(key_net, seed), jnp.zeros(()), jnp.zeros(2)) for seed in seeds]
    start = {f"{name}_{seed}": starts[seed] for seed in seeds for name in couplings}

    def batch(n: int) -> Batch:
        return {f"{name}_{seed}": one for seed in seeds for name, one in batches[seed](n).items()}

    loss = make_loss(dict.fromkeys(start, field), 0.0, 1)
    options = {"num_steps": config.seed_steps, "ema_decay": config.seed_ema_decay, "label": "seeds"}
    params, _ = train(config, run, loss, start, batch, key_train, **options)
    results: dict[str, Any] = {"seeds": config.seeds, "seed_steps": config.seed_steps}
    for name in couplings:
        runs.say(f"measuring {name} of {config.seeds} seeds")
        found = [measure(params[f"{name}_{seed}"]) for seed in seeds]
        for what in ("one_step_w2_squared", "flow_w2_squared", "straightness", "normalised_path_energy"):
            results |= over_seeds(f"seeds_{name}_{what}", [float(one[what]) for one in found])
    return results


def moons_by_rule(angles: int = 160, shifts: int = 8) -> tuple[Array, Array]:
    """Points that stand for all of both moons ``[num, 2]``, and which moon each is of ``[num]``: the middles of equal
    shares of angles and shifts."""
    a, u = (jnp.linspace(0.5 / n, 1 - 0.5 / n, n) for n in (angles, shifts))
    circle = jnp.stack([jnp.cos(math.pi * a), jnp.sin(math.pi * a)], axis=1)
    moon = jnp.stack([circle, jnp.asarray([[1.0, 0.5]]) - circle])
    points = 3 * (moon[:, :, None] + 0.2 * u[None, None, :, None]) - 1
    return points.reshape(-1, 2), jnp.repeat(jnp.arange(2, dtype=jnp.int32), angles * shifts)


def exact_velocity(points: Array, labels: Array) -> VectorField:
    """(x - E[x_0 | x_t = x, y]) / t, of independent pairs of these points and noise; y = 2 is no label."""

    def field(t: Array, x: Array, args: Any) -> Array:
        _, y = args
        squares = jnp.sum((x[None] - (1 - t) * points) ** 2, axis=1)
        logits = jnp.where((labels == y) | (y == 2), -squares / (2 * t**2), -jnp.inf)
        return (x - jax.nn.softmax(logits) @ points) / t

    return field


def labelled(config: Config, run: runs.Run, key: Array) -> dict[str, Any]:
    """From noise to moons, the label shown to networks that learn from optimal pairs of each batch, from pairs within
    classes and from independent ones. Samples of each moon from all of the noise, against that moon: mean over both of
    the squared distance. And guidance: the shares of the moon that was asked for, and how far the law of independent
    pairs is from the guided flow in closed form, by the same steps from the same noise."""
    key_net, key_batch, key_train, key_data, key_noise = jax.random.split(key, 5)
    num, seeds = config.num_compared, range(config.seeds)
    dtype = jnp.zeros(()).dtype
    net = networks.MLP(
        config.features, jax.nn.silu, time_features=16, max_frequency=10.0, num_classes=2, param_dtype=dtype
    )
    field = networks.conditional(net)
    zero = jnp.zeros(()), jnp.zeros(2), jnp.int32(0)
    starts = [net.init(jax.random.fold_in(key_net, seed), *zero) for seed in seeds]
    start = {f"{name}_{seed}": starts[seed] for seed in seeds for name in LABELLED}

    @jax.jit
    def draw(n: int, seed: int) -> Any:
        key_x, key_z, key_pair = jax.random.split(jax.random.fold_in(jax.random.fold_in(key_batch, seed), n), 3)
        return key_pair, *moons(key_x, config.batch_size, even=True), normal(key_z, config.batch_size)

    couple_by = {name: couple(name, config) for name in LABELLED}

    def batch(n: int) -> Batch:
        result = {}
        for seed in seeds:
            key, x0, y, z = draw(n, seed)
            for name, by in couple_by.items():
                result[f"{name}_{seed}"] = x0, np.asarray(z)[by(key, x0, z, y)], y
        return result

    loss = make_loss(dict.fromkeys(start, field), config.drop_rate, 2)
    options = {"num_steps": config.label_steps, "ema_decay": config.seed_ema_decay, "label": "labels"}
    params, _ = train(config, run, loss, start, batch, key_train, **options)

    def of_class(key: Array, y: int) -> Array:
        x, label = moons(key, 4 * num)
        return x[label == y][:num]

    solve, distance = flow(field, config), flow_matching.squared_wasserstein
    keys = [jax.random.split(jax.random.fold_in(key_data, seed)) for seed in seeds]
    truth, other = ([[of_class(pair[i], y) for y in (0, 1)] for pair in keys] for i in (0, 1))
    noise = [jax.random.normal(jax.random.fold_in(key_noise, seed), (2, num, 2)) for seed in seeds]  # of each moon
    asked = [jnp.full(num, y, jnp.int32) for y in (0, 1)]

    def apart(samples: list[list[Array]], true: list[list[Array]]) -> list[float]:
        """Of each seed the mean over both moons."""
        return [np.mean(list(map(distance, *two))) for two in zip(samples, true, strict=True)]

    results = over_seeds("labelled_floor_w2_squared", apart(truth, other))
    columns = {r"$p(x\,|\,y)$": truth[0]}
    for name in LABELLED:
        runs.say(f"measuring {name} pairs with labels")
        samples = [
            [solve(params[f"{name}_{seed}"], z, y)[0] for z, y in zip(noise[seed], asked, strict=True)]
            for seed in seeds
        ]
        results |= over_seeds(f"labelled_{name}_w2_squared", apart(samples, truth))
        columns["optimal pairs within classes" if name == "conditional" else f"{name} pairs"] = samples[0]
    draw_labels(run, columns)

    points, labels = moons_by_rule()
    exact = exact_velocity(points, labels)
    sample = guided(field, guidance.unconditional(field, 2), config.sampler_steps)
    known = guided(exact, guidance.unconditional(exact, 2), config.sampler_steps)

    @jax.jit
    def nearest(x: Array) -> Array:
        return jax.lax.map(lambda x: labels[jnp.argmin(jnp.sum((x[None] - points) ** 2, axis=1))], x, batch_size=256)

    def share(samples: list[Array]) -> float:
        return np.mean([np.mean(nearest(x) == y) for x, y in zip(samples, asked, strict=True)])

    gammas = [jnp.asarray(gamma) for gamma in config.gammas]

    def by_scale(draw: Callable[..., Array], params: Any, seed: int) -> list[list[Array]]:
        """Of each scale the samples of either moon."""
        return [[draw((params, gamma), z, y) for z, y in zip(noise[seed], asked, strict=True)] for gamma in gammas]

    runs.say(f"guidance by {len(gammas)} scales")
    found = {name: [by_scale(sample, params[f"{name}_{seed}"], seed) for seed in seeds] for name in LABELLED}
    found["exact"] = [by_scale(known, None, seed) for seed in seeds]
    for name, by_seed in found.items():
        results |= over_seeds(f"guided_{name}_share", [list(map(share, scales)) for scales in by_seed])
    far = [apart(*two) for two in zip(found["independent"], found["exact"], strict=True)]
    results |= over_seeds("guided_independent_w2_squared_from_exact", far)
    draw_guided(run, config, points, found["exact"][0], found["independent"][0])
    return results | {"gammas": config.gammas}


def bridge(config: Config, run: runs.Run, task: Task, key: Array) -> dict[str, Any]:
    """Stochastic interpolants: a velocity and a denoiser learned between independent pairs with noise in between, then
    sampled without noise and with it, by as many steps."""
    key_net, key_batch, key_train, key_test, key_noise = jax.random.split(key, 5)
    num, seeds = config.num_compared, range(config.seeds)
    net = networks.MLP(config.features, jax.nn.silu, out_features=4, param_dtype=jnp.zeros(()).dtype)
    velocity = lambda t, x, args: net.apply(args[0], t, x)[:2]  # noqa: E731
    denoiser = lambda t, x, args: net.apply(args[0], t, x)[2:]  # noqa: E731
    interpolant = flow_matching.linear(config.bridge_scale)
    draws = [drawn(config, task, jax.random.fold_in(key_batch, seed)) for seed in seeds]
    start = {
        f"bridge_{seed}": net.init(jax.random.fold_in(key_net, seed), jnp.zeros(()), jnp.zeros(2)) for seed in seeds
    }
    y = np.zeros(config.batch_size, np.int32)

    def batch(n: int) -> Batch:
        return {f"bridge_{seed}": (*draws[seed](n)[1:], y) for seed in seeds}

    loss = make_bridge_loss(velocity, denoiser, interpolant)
    options = {"num_steps": config.bridge_steps, "ema_decay": config.seed_ema_decay, "label": "bridge"}
    params, _ = train(config, run, loss, start, batch, key_train, **options)
    distance = flow_matching.squared_wasserstein
    solve = flow(velocity, config)
    walk = bridged(velocity, denoiser, interpolant, config.bridge_evaluations, path=False)
    floors, adaptive, by_noise = [], [], []
    for seed in seeds:
        runs.say(f"sampling the interpolant of seed {seed}")
        key_x, key_other, key_z = jax.random.split(jax.random.fold_in(key_test, seed), 3)
        x0, x1 = task.even_data(key_x, num), task.even_source(key_z, num)
        p, keys = params[f"bridge_{seed}"], jax.random.split(jax.random.fold_in(key_noise, seed), num)
        floors.append(float(distance(x0, task.even_data(key_other, num))))
        adaptive.append(float(distance(solve(p, x1, jnp.zeros(num, jnp.int32))[0], x0)))
        ends = [walk((p, jnp.asarray(c)), keys, x1) for c in config.bridge_noises]
        by_noise.append([float(distance(x, x0)) for x in ends])
    few = slice(min(100, num))
    walk = bridged(velocity, denoiser, interpolant, config.bridge_evaluations, path=True)
    draw_bridge(run, config, x0, ends, [walk((p, jnp.asarray(c)), keys[few], x1[few]) for c in config.bridge_noises])
    return {
        "bridge_noises": config.bridge_noises,
        **over_seeds("bridge_floor_w2_squared", floors),
        **over_seeds("bridge_ode_w2_squared", adaptive),
        **over_seeds("bridge_w2_squared_by_noise", by_noise),
    }


# ------------------------------------------------------------------------------------------------------ the digits


def make_digits(config: Config, std: float, key: Array) -> tuple[StructuredField, Any]:
    """The velocity of a Gaussian as wide as the data and what the network adds to it, and initial parameters.

    v(t, x) = (t - (1 - t) std^2) / n x + std / sqrt n F(t, x / sqrt n),    n = (1 - t)^2 std^2 + t^2:

    the inputs of F and, for Gaussian data, its targets have variance one at every t, as in Karras et al. (2022).
    """
    net = networks.MLP(
        config.features,
        jax.nn.silu,
        time_features=64,
        residual=True,
        num_classes=CLASSES,
        param_dtype=jnp.zeros(()).dtype,
    )
    network = networks.conditional(net)

    def scales(t: Array) -> tuple[Array, Array]:
        n = ((1 - t) * std) ** 2 + t**2
        return (t - (1 - t) * std**2) / n, jnp.sqrt(n)

    def field(t: Array, x: Array, args: Any) -> Array:
        slope, root = scales(t)
        return slope * x + std / root * network(t, x / root, args)

    def with_divergence(t: Array, x: Array, prepared: Any) -> tuple[Array, Array]:
        slope, root = scales(t)
        f, div = network.with_divergence(t, x / root, prepared)
        return slope * x + std / root * f, slope * x.size + std / root**2 * div

    params = jax.jit(net.init)(key, jnp.zeros(()), jnp.zeros(64), jnp.int32(0))
    return StructuredField(field, network.prepare, with_divergence), params


def digits(config: Config, run: runs.Run, key: Array) -> dict[str, Any]:
    """Trains on digits, measures and draws."""
    key_net, key_rows, key_batch, key_train, key_reflow, key_noise, key_test = jax.random.split(key, 7)
    images = datasets.digits()
    uniform = metrics.uniform_dequantization(images.levels, -1.0, 1.0)
    std = float(np.std(images.train * (2 / images.levels)))
    field, start = make_digits(config, std, key_net)
    couplings = config.couplings
    train_pixels, train_labels = images.train.reshape(len(images.train), -1), images.train_labels

    @jax.jit
    def drawn(n: int) -> Any:
        key_x, key_z, key_pair = jax.random.split(jax.random.fold_in(key_batch, n), 3)
        rows = training.batch_indices(key_rows, n, len(train_labels), config.batch_size)
        x0 = metrics.dequantize(key_x, jnp.asarray(train_pixels)[rows], uniform)
        return key_pair, x0, jnp.asarray(train_labels)[rows], jax.random.normal(key_z, x0.shape)

    couple_by = {name: couple(name, config) for name in couplings}

    def batch(n: int) -> Batch:
        key, x0, y, x1 = drawn(n)
        return {name: (x0, np.asarray(x1)[couple_by[name](key, x0, x1, y)], y) for name in couplings}

    loss = make_loss(dict.fromkeys(couplings, field), config.drop_rate, CLASSES)
    options = {"num_steps": config.num_steps, "ema_decay": config.ema_decay, "label": "training"}
    params, history = train(config, run, loss, dict.fromkeys(couplings, start), batch, key_train, **options)
    plots.curve(run.folder / "loss.png", history, label="flow matching loss per dimension, all couplings")
    if config.reflow_steps:
        source = lambda key, num: jax.random.normal(key, (num, 64))  # noqa: E731
        params["reflow"] = reflow(config, run, field, params[couplings[-1]], source, key_reflow, CLASSES)
    trained = time.perf_counter()

    test = metrics.dequantize(key_test, images.test.reshape(len(images.test), -1), uniform)[: config.test_examples]
    labels = jnp.asarray(images.test_labels[: len(test)])
    results: dict[str, Any] = {"gammas": config.gammas, "dequantization": uniform.name, "test_examples": len(test)}
    density = likelihood(field, config, flows.standard_normal)
    for name in couplings:
        runs.say(f"likelihood of {name}: {len(test)} test digits")
        for way, y in (("", jnp.full_like(labels, CLASSES)), ("_given_label", labels)):
            found = density(params[name], test, y)
            bits, stderr = metrics.bits_per_dim(found.log_prob, 64, uniform)
            results |= {
                f"{name}_test_bits_per_dim{way}": bits,
                f"{name}_test_bits_per_dim{way}_stderr": stderr,
                f"{name}_test_bits_per_dim{way}_numerical_error": jnp.mean(found.error) / (64 * math.log(2)),
                f"{name}_evaluations{way}": jnp.mean(found.nfe),
            }

    y = np.repeat(np.arange(CLASSES, dtype=np.int32), config.per_class)
    z = jax.random.normal(key_noise, (len(y), 64))
    without = guidance.unconditional(field, CLASSES)
    by_steps = [euler(field, k) for k in STEPS]

    sample = guided(field, without, config.sampler_steps)
    walls, shown = {}, lambda x: np.asarray(metrics.quantize(x, uniform))
    for name in couplings:
        runs.say(f"{name}: {len(y)} digits at each of {len(config.gammas)} scales")
        walls[name] = [shown(sample((params[name], jnp.asarray(g)), z, jnp.asarray(y))) for g in config.gammas]
    for name in params:
        walls[f"{name}_by_steps"] = [shown(few(params[name], z, jnp.asarray(y))) for few in by_steps]
    results |= {"steps": STEPS, **judge_digits(images, y, walls)}
    draw_digits(run, config, y, walls)
    return results | {"seconds_measuring": time.perf_counter() - trained}


STEPS = (1, 2, 4, 16)


def judge_digits(images: datasets.Images, y: np.ndarray, walls: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """How many a classifier that has seen no model takes for what was asked for, and distances from the test set."""
    from sklearn.svm import SVC

    flat = lambda x: x.reshape(len(x), -1).astype(float)  # noqa: E731
    judge = SVC(C=10.0, gamma=0.001).fit(flat(images.train), images.train_labels)
    results: dict[str, Any] = {"judge_test_accuracy": judge.score(flat(images.test), images.test_labels)}
    test = jnp.asarray(flat(images.test)) / 8
    for name, wall in walls.items():
        right = [judge.predict(x) == y for x in wall]
        results[f"{name}_accuracy"] = [float(r.mean()) for r in right]
        guesses = [(r.sum() + 1) / (len(r) + 2) for r in right]  # so that the error of all right is not zero
        results[f"{name}_accuracy_stderr"] = [math.sqrt(g * (1 - g) / len(y)) for g in guesses]
        apart = [metrics.sliced_wasserstein(jax.random.key(0), jnp.asarray(flat(x)) / 8, test) for x in wall]
        results[f"{name}_sliced_wasserstein"] = [float(value) for value, _ in apart]
        results[f"{name}_sliced_wasserstein_stderr"] = [float(stderr) for _, stderr in apart]
    return results


# -------------------------------------------------------------------------------------------------------- pictures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#666666")


def save(path: Any, size: tuple[float, float], rows: int, columns: int, draw: Callable[[np.ndarray], None]) -> None:
    """A figure of panels, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    draw(figure.subplots(rows, columns, squeeze=False).reshape(-1))
    if jax.process_index() == 0:
        figure.savefig(path)


def scatter(panel: Any, x: Any, colour: str, size: float = 2, **more: Any) -> None:
    """Points ``[num, 2]``."""
    panel.scatter(*np.asarray(x).T, s=size, color=colour, linewidths=0, **more)


def draw_plane(
    config: Config,
    run: runs.Run,
    field: VectorField,
    params: Any,
    names: list[str],
    x0: Array,
    x1: Array,
    one_step: dict[str, Array],
) -> None:
    """Paths of every flow above, and below what one Euler step makes of the source, on the data."""
    ts, num = jnp.linspace(1.0, 0.0, 41), min(400, len(x1))

    def path(params: Any, z: Array) -> Array:
        tolerance = {"rtol": config.rtol, "atol": config.rtol, "throw": False}
        return solvers.solve_ode(field, z, (params, jnp.int32(0)), t0=1.0, t1=0.0, ts=ts, **tolerance).xs

    along = jax.jit(jax.vmap(path, (None, 0)))

    def draw(panels: np.ndarray) -> None:
        from matplotlib.collections import LineCollection

        for i, name in enumerate(names):
            above, below = panels[i], panels[len(names) + i]
            paths = np.asarray(along(params[name], x1[:num]))
            above.add_collection(LineCollection(list(paths), colors=COLOURS[3], linewidths=0.4, alpha=0.5))
            scatter(above, paths[:, 0], COLOURS[1], 3, label="source")
            scatter(above, paths[:, -1], COLOURS[0], 3, label="end of the flow")
            scatter(below, x0[:4000], "#bbbbbb", label="data")
            scatter(below, one_step[name][:4000], COLOURS[0], label="one step")
            above.set_title(f"{name}{' of ' + names[-2] if name == 'reflow' else ' pairs'}")
        extent = 1.1 * float(max(jnp.abs(x0).max(), jnp.abs(x1).max()))
        for panel in panels:
            panel.set(xticks=(), yticks=(), xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
        for panel in (panels[0], panels[len(names)]):
            panel.legend(loc="lower left", frameon=False, fontsize=8, markerscale=3)

    save(run.folder / "paths.png", (3.2 * len(names), 6.6), 2, len(names), draw)


def draw_labels(run: runs.Run, columns: dict[str, list[Array]]) -> None:
    """Both moons in two colours, as they are and as they are sampled."""

    def draw(panels: np.ndarray) -> None:
        for panel, (title, groups) in zip(panels, columns.items(), strict=True):
            for x, colour in zip(groups, COLOURS, strict=False):
                scatter(panel, x, colour, alpha=0.6)
            panel.set(title=title, xticks=(), yticks=(), xlim=(-6, 7), ylim=(-5, 5), aspect="equal")

    save(run.folder / "labels.png", (3.2 * len(columns), 3.0), 1, len(columns), draw)


def draw_guided(
    run: runs.Run, config: Config, data: Array, exact: list[list[Array]], learned: list[list[Array]]
) -> None:
    """Scales from left to right: the exact guided flow above, the learned one below, on the data."""

    def draw(panels: np.ndarray) -> None:
        for panel, groups in zip(panels, (*exact, *learned), strict=True):
            scatter(panel, data, "#cccccc")
            for x, colour in zip(groups, COLOURS, strict=False):
                scatter(panel, x, colour, alpha=0.6)
            panel.set(xticks=(), yticks=(), xlim=(-6, 7), ylim=(-5, 5), aspect="equal")
        for panel, gamma in zip(panels, config.gammas, strict=False):
            panel.set_title(rf"$\gamma = {gamma:g}$")
        for panel, name in ((panels[0], "closed form"), (panels[len(exact)], "learned")):
            panel.set_ylabel(name)

    columns = len(config.gammas)
    save(run.folder / "guided.png", (3.0 * columns, 5.2), 2, columns, draw)


def draw_bridge(run: runs.Run, config: Config, x0: Array, ends: list[Array], paths: list[Array]) -> None:
    """Sizes of noise from left to right: paths of the interpolant above, where they end below, on the data."""
    num = len(ends)

    def draw(panels: np.ndarray) -> None:
        from matplotlib.collections import LineCollection

        for i, (c, end, lines) in enumerate(zip(config.bridge_noises, ends, map(np.asarray, paths), strict=True)):
            above, below = panels[i], panels[num + i]
            above.add_collection(LineCollection(list(lines), colors=COLOURS[3], linewidths=0.3, alpha=0.4))
            scatter(above, lines[:, 0], COLOURS[1], 3)
            scatter(above, lines[:, -1], COLOURS[0], 3)
            scatter(below, x0, "#bbbbbb")
            scatter(below, end, COLOURS[0])
            above.set_title("ODE" if c == 0 else f"SDE, $g^2 = {'' if c == 1 else f'{c**2:g}'}\\,\\gamma$")
        extent = 1.15 * float(max(np.abs(np.asarray(line)).max() for line in (x0, *paths)))
        for panel in panels:
            panel.set(xticks=(), yticks=(), xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")

    save(run.folder / "bridge.png", (3.2 * num, 6.6), 2, num, draw)


def draw_digits(
    run: runs.Run, config: Config, y: np.ndarray, walls: dict[str, list[np.ndarray]], each: int = 4
) -> None:
    """Rows are classes; blocks are scales above and numbers of steps below, each of the same few draws of noise."""

    def draw(panels: np.ndarray) -> None:
        for panel, (name, wall) in zip(panels, walls.items(), strict=False):
            by_steps = name.endswith("_by_steps")
            block = np.stack([np.concatenate([x[y == c][:each] for x in wall]) for c in range(CLASSES)])
            num = block.shape[1] // len(wall)
            block = np.pad(block.reshape(CLASSES, -1, 8, 8), ((0, 0), (0, 0), (0, 1), (0, 1)))
            block = block.reshape(CLASSES, len(wall), num, 9, 9).transpose(0, 3, 1, 2, 4)
            block = np.pad(block.reshape(CLASSES * 9, len(wall), -1), ((0, 0), (0, 0), (0, 4)), constant_values=16)
            panel.imshow(block.reshape(CLASSES * 9, -1)[:-1, :-4], cmap="gray", interpolation="nearest")
            centres = (np.arange(len(wall)) + 0.5) * (num * 9 + 4) - 2.5
            panel.set_xticks(centres, [str(k) for k in STEPS] if by_steps else [f"{g:g}" for g in config.gammas])
            panel.set_yticks(np.arange(CLASSES) * 9 + 3.5, map(str, range(CLASSES)))
            panel.tick_params(length=0)
            panel.set(xlabel="Euler steps" if by_steps else "guidance scale $\\gamma$")
            panel.set_title(name.removesuffix("_by_steps") + ("" if "reflow" in name else " pairs"))
            for spine in panel.spines.values():
                spine.set_visible(False)
        for panel in panels[len(walls) :]:
            panel.set_visible(False)

    columns = 2 if len(walls) > 3 else len(walls)
    rows = -(-len(walls) // columns)
    save(run.folder / "digits.png", (5.2 * columns, 3.4 * rows), rows, columns, draw)


def main(config: Config) -> dict[str, Any]:
    """Trains, measures, draws; returns what metrics.json holds."""
    began, used = time.perf_counter(), time.process_time()
    config = complete(config)
    run = runs.open_run(config, may_differ=MEASURING)
    part = digits if config.data == "digits" else plane
    found = part(config, run, jax.random.key(config.seed))
    results = {
        name: value if isinstance(value, str | int | list | tuple) else float(value) for name, value in found.items()
    }
    results |= {"seconds": time.perf_counter() - began, "seconds_of_processor": time.process_time() - used}
    return runs.write_metrics(run, results)


if __name__ == "__main__":
    runs.cli(main, Config)
