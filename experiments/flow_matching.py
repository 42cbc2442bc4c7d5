"""Flow matching: what does the coupling of data and noise change, and what does reflow?

    python experiments/flow_matching.py
    python experiments/flow_matching.py --data digits --out runs/flow_matching_digits

In the plane: from eight gaussians to two moons, with velocities learned from independent pairs, from the optimal ones
of each batch, and from the pairs that the flow of the former makes (reflow). How far is one step of Euler's method from
the data, in squared 2-Wasserstein distance; how straight are the paths? And, from noise to moons with a label each:
what do optimal pairs do to a model that is shown the label, and what do pairs within each class?
On digits (scikit-learn's, 8 x 8): one network for all classes, its label dropped now and then for guidance, by both
kinds of pairs; digits that show what was asked for, by scale and by number of steps, test bits per dimension with their
error, and reflow.

Expected, in the plane (distances of 2,000 even samples; two such sets of the data are 0.005 apart):

    pairs                         optimal            independent      reflow of independent
    one Euler step, W_2^2         0.050              4.3              0.14
    straightness                  0.008 +- 0.001     12.2 +- 0.2      0.094 +- 0.005
    normalised path energy       -0.002 +- 0.015     1.77 +- 0.03     0.177 +- 0.014
    evaluations of the flow       32                 116              67

0.050 too for 10,000 independent samples of one step from optimal pairs. With labels, W_2^2 between the samples of a
moon and that moon: 2.69 by optimal pairs, 0.011 by optimal pairs within classes (0.013 between two sets of the data).
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
from typing import Any, Literal

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
MEASURING = ("num_samples", "num_compared", "gammas", "per_class", "sampler_steps", "rtol", "test_examples")


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
    label_steps: int = 4000
    """Of moons: training steps of the two networks that are shown labels; 0 for none."""
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
    weight_decay: float = 0.35
    """Of AdamW, on digits: without it 1,500 digits are learned by heart."""
    drop_rate: float = 0.15
    """Share of the labels that are dropped in training on digits."""
    checkpoint_every: int = 2000
    """Steps between checkpoints."""
    num_samples: int = 10000
    """In the plane: samples of one Euler step, of the first coupling, whose distance from as many of the data is
    measured; 10,000 take 1 GB of memory, 0 for none."""
    num_compared: int = 2000
    """In the plane: samples in all other distances, even ones of moons, where noise matters less."""
    gammas: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """Guidance scales, on digits."""
    per_class: int = 40
    """Samples of each digit at each scale; the same noise at every scale."""
    sampler_steps: int = 50
    """Euler steps of guided sampling."""
    rtol: float = 1e-4
    """Tolerance, relative and absolute, of the flows."""
    test_examples: int = 297
    """Test examples whose likelihood is measured."""


def complete(config: Config) -> Config:
    """The configuration with its defaults for this data; what would fail only after the training is found before it."""
    digits = config.data == "digits"
    defaults = {
        "couplings": ("optimal", "conditional") if digits else ("optimal", "independent"),
        "features": (256, 256, 256) if digits else (128, 128, 128),
        "num_steps": 4000 if digits else 20_000,
        "batch_size": 128 if digits else 256,
        "learning_rate": 1e-3 if digits else 2e-3,
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
    if min(config.reflow_steps, config.label_steps) < 0 or config.reflow_pairs < config.batch_size:
        raise ValueError(
            f"reflow_steps and label_steps must be at least 0, and reflow_pairs at least batch_size, got "
            f"{config.reflow_steps}, {config.label_steps} and {config.reflow_pairs}."
        )
    if config.batch_size % 8:
        raise ValueError(f"batch_size must be a multiple of 8, for batches that are even, got {config.batch_size}.")
    if not 0 < config.epsilon < math.inf:
        raise ValueError(f"epsilon must be positive, got {config.epsilon}.")
    return config


# --------------------------------------------------------------------------------------------------------- training

Batch = dict[str, tuple[Array, Array, Array]]  # of each network data [n, *event], source [n, *event], labels [n]


def make_loss(fields: dict[str, VectorField], drop_rate: float, num_classes: int) -> Callable[..., Any]:
    """Flow matching on straight paths per dimension, of all networks at once: they share no parameters."""

    def loss(params: Any, key: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
        key_time, key_drop = jax.random.split(key)

        def mean(name: str) -> Array:
            x0, x1, y = batch[name]
            shares = jnp.linspace(0.0, 1.0, len(y), endpoint=False)
            t = shares + jax.random.uniform(key_time, (len(y),)) / len(y)  # one in each share of [0, 1]
            shown = guidance.drop_labels(key_drop, y, drop_rate, num_classes)
            one = lambda t, x0, x1, y: flow_matching.loss(fields[name], t, x0, x1, (params[name], y))  # noqa: E731
            return jnp.mean(jax.vmap(one)(t, x0, x1, shown)) / x0[0].size

        losses = {name: mean(name) for name in fields}
        return sum(losses.values()), losses

    return loss


def train(
    config: Config,
    run: runs.Run,
    fields: dict[str, VectorField],
    params: Any,
    batch: Callable[[int], Batch],
    key: Array,
    *,
    num_steps: int,
    num_classes: int,
    label: str,
) -> tuple[Any, dict[str, np.ndarray]]:
    """The averaged parameters, on the host, and the history; a part of the run other than the first has its folder."""
    digits, part = config.data == "digits", run if label == "training" else run._replace(folder=run.folder / label)
    mesh = training.mesh()
    mine = training.local_rows(mesh, config.batch_size)
    loss = make_loss(fields, config.drop_rate if digits else 0.0, num_classes)
    decay = config.weight_decay if digits else 0.0
    optimizer = training.adam(
        config.learning_rate, num_steps, warmup=num_steps // 20, clip_norm=None, weight_decay=decay
    )
    update = jax.jit(training.step(loss, optimizer, ema_decay=config.ema_decay, has_aux=True), donate_argnums=0)
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

    options = {"num_steps": config.reflow_steps, "num_classes": num_classes, "label": "reflow"}
    found, _ = train(config, run, {"reflow": field}, {"reflow": params}, batch, key_train, **options)
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
    """(params, x0, y) -> flows.Likelihood, its divergences exact: the network knows its own."""

    def one(params: Any, x0: Array, y: Array) -> flows.Likelihood:
        tolerance = {"rtol": config.rtol, "atol": config.rtol, "throw": False}
        return flows.likelihood(field, x0, (params, y), t_data=0.0, t_base=1.0, log_base=log_base, **tolerance)

    return over(one)


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


def plane(config: Config, run: runs.Run, key: Array) -> dict[str, Any]:
    """Trains all networks in the plane, measures and draws."""
    key_net, key_batch, key_train, key_reflow, key_test, key_source, key_labels = jax.random.split(key, 7)
    mixture, couplings = eight_gaussians(), config.couplings
    if config.data == "moons":
        data, source = lambda key, num: moons(key, num)[0], lambda key, num: densities.sample(key, mixture, num)
        batches = lambda key, num: moons(key, num, even=True)[0], even_gaussians
        log_base = partial(densities.log_prob, mixture)
    else:
        data, source, log_base = datasets.two_d(config.data), normal, flows.standard_normal
        batches = data, source

    @jax.jit
    def draw(n: int) -> Any:
        keys = jax.random.split(jax.random.fold_in(key_batch, n), 3)
        return keys[0], *(one(key, config.batch_size) for one, key in zip(batches, keys[1:], strict=True))

    couple_by = {name: couple(name, config) for name in couplings}
    y = np.zeros(config.batch_size, np.int32)

    def batch(n: int) -> Batch:
        key, x0, x1 = draw(n)
        return {name: (x0, np.asarray(x1)[couple_by[name](key, x0, x1, y)], y) for name in couplings}

    net = networks.MLP(config.features, jax.nn.silu, param_dtype=jnp.zeros(()).dtype)
    start = jax.jit(net.init)(key_net, jnp.zeros(()), jnp.zeros(2))
    field = unlabelled(networks.vector_field(net))
    options = {"num_steps": config.num_steps, "num_classes": 1, "label": "training"}
    names = list(couplings)
    params, history = train(
        config, run, dict.fromkeys(names, field), dict.fromkeys(names, start), batch, key_train, **options
    )
    plots.curve(run.folder / "loss.png", history, label="flow matching loss per dimension, all couplings")
    if config.reflow_steps:
        params["reflow"] = reflow(config, run, field, params[names[-1]], source, key_reflow, 1)
        names.append("reflow")
    labels = labelled(config, run, key_labels) if config.data == "moons" and config.label_steps else {}
    trained = time.perf_counter()

    even_data, even_source = batches  # less noise in the distances
    key_many, key_x, key_other = jax.random.split(key_test, 3)
    x0, x1 = even_data(key_x, config.num_compared), even_source(key_source, config.num_compared)
    nothing = jnp.zeros(config.num_compared, jnp.int32)
    between = flow_matching.squared_wasserstein(x0, x1)
    results: dict[str, Any] = {
        "w2_squared_of_transport": between,
        "w2_squared_floor": flow_matching.squared_wasserstein(x0, even_data(key_other, config.num_compared)),
    }
    one_step, step, solve = {}, euler(field, 1), flow(field, config)
    along, density = measure_paths(field, config), likelihood(field, config, log_base)
    tested = data(key_other, config.test_examples)
    for name in names:
        runs.say(f"measuring {name}")
        p = params[name]
        one_step[name], (solved, nfe) = step(p, x1, nothing), solve(p, x1, nothing)
        found = density(p, tested, jnp.zeros(len(tested), jnp.int32))
        nll = -jnp.mean(found.log_prob), jnp.std(found.log_prob, ddof=1) / math.sqrt(len(found.log_prob))
        bend, energy = along(p, x1, between)
        for measure, (value, stderr) in (
            ("straightness", bend),
            ("normalised_path_energy", energy),
            ("test_nll_nats", nll),
        ):
            results |= {f"{name}_{measure}": value, f"{name}_{measure}_stderr": stderr}
        results |= {
            f"{name}_one_step_w2_squared": flow_matching.squared_wasserstein(one_step[name], x0),
            f"{name}_flow_w2_squared": flow_matching.squared_wasserstein(solved, x0),
            f"{name}_flow_evaluations": jnp.mean(nfe),
            f"{name}_test_nll_nats_numerical_error": jnp.mean(found.error),
        }
    best, num = couplings[0], config.num_samples
    if num:
        runs.say(f"one Euler step of {best}: the distance of {num} samples")
        many = step(params[best], source(key_many, num), jnp.zeros(num, jnp.int32))
        key = f"{best}_one_step_w2_squared_of_{num}_independent"
        results[key] = flow_matching.squared_wasserstein(many, data(jax.random.fold_in(key_many, 1), num))
    draw_plane(config, run, field, params, names, x0, x1, one_step)
    return results | labels | {"seconds_measuring": time.perf_counter() - trained}


def labelled(config: Config, run: runs.Run, key: Array) -> dict[str, Any]:
    """From noise to moons, the label shown to two networks, one on optimal pairs of each batch and one on pairs within
    classes. Samples of each moon from all of the noise, against that moon: mean over both of the squared distance."""
    key_net, key_batch, key_train, key_data, key_other, key_noise = jax.random.split(key, 6)
    num, names = config.num_compared, ("labelled_optimal", "labelled_conditional")
    dtype = jnp.zeros(()).dtype
    net = networks.MLP(
        config.features, jax.nn.silu, time_features=16, max_frequency=10.0, num_classes=2, param_dtype=dtype
    )
    start = jax.jit(net.init)(key_net, jnp.zeros(()), jnp.zeros(2), jnp.int32(0))
    field = networks.conditional(net)

    @jax.jit
    def drawn(n: int) -> Any:
        key_x, key_z = jax.random.split(jax.random.fold_in(key_batch, n))
        return *moons(key_x, config.batch_size, even=True), normal(key_z, config.batch_size)

    def batch(n: int) -> Batch:
        x0, y, z = drawn(n)
        pairs = flow_matching.optimal(key, x0, z), flow_matching.conditional(key, x0, z, y)
        return {name: (x0, np.asarray(z)[rows], y) for name, rows in zip(names, pairs, strict=True)}

    options = {"num_steps": config.label_steps, "num_classes": 2, "label": "labels"}
    both = dict.fromkeys(names, field), dict.fromkeys(names, start)
    params, _ = train(config, run, *both, batch, key_train, **options)
    solve = flow(field, config)

    def of_class(key: Array, y: int) -> Array:
        x, label = moons(key, 4 * num)
        return x[label == y][:num]

    truth = [of_class(key_data, y) for y in (0, 1)]
    floors = [flow_matching.squared_wasserstein(truth[y], of_class(key_other, y)) for y in (0, 1)]
    results: dict[str, Any] = {"labelled_floor_w2_squared": jnp.mean(jnp.stack(floors))}
    z, samples = normal(key_noise, num), {}
    for name in names:
        samples[name] = [solve(params[name], z, jnp.full(num, y, jnp.int32))[0] for y in (0, 1)]
        apart = [flow_matching.squared_wasserstein(x, true) for x, true in zip(samples[name], truth, strict=True)]
        results[f"{name}_w2_squared"] = jnp.mean(jnp.stack(apart))
    columns = {"$p(x\\,|\\,y)$": truth, "optimal pairs": samples["labelled_optimal"]}
    columns["optimal pairs within classes"] = samples["labelled_conditional"]

    def draw(panels: np.ndarray) -> None:
        for panel, (title, groups) in zip(panels, columns.items(), strict=True):
            for x, colour in zip(groups, COLOURS, strict=False):
                panel.scatter(*np.asarray(x).T, s=2, color=colour, linewidths=0, alpha=0.6)
            panel.set(title=title, xticks=(), yticks=(), xlim=(-6, 7), ylim=(-5, 5), aspect="equal")

    save(run.folder / "labels.png", (9.5, 3.0), 1, 3, draw)
    return results


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

    options = {"num_steps": config.num_steps, "num_classes": CLASSES, "label": "training"}
    params, history = train(
        config, run, dict.fromkeys(couplings, field), dict.fromkeys(couplings, start), batch, key_train, **options
    )
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

    @jax.jit
    def guided(params: Any, z: Array, y: Array, gamma: Array) -> Array:
        return euler(guidance.classifier_free(field, without, gamma), config.sampler_steps)(params, z, y)

    walls, shown = {}, lambda x: np.asarray(metrics.quantize(x, uniform))
    for name in couplings:
        runs.say(f"{name}: {len(y)} digits at each of {len(config.gammas)} scales")
        walls[name] = [shown(guided(params[name], z, jnp.asarray(y), jnp.asarray(g))) for g in config.gammas]
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

    def path(field: VectorField, params: Any, z: Array) -> Array:
        tolerance = {"rtol": config.rtol, "atol": config.rtol, "throw": False}
        return solvers.solve_ode(field, z, (params, jnp.int32(0)), t0=1.0, t1=0.0, ts=ts, **tolerance).xs

    def draw(panels: np.ndarray) -> None:
        from matplotlib.collections import LineCollection

        for i, name in enumerate(names):
            above, below = panels[i], panels[len(names) + i]
            paths = np.asarray(jax.jit(jax.vmap(partial(path, field), (None, 0)))(params[name], x1[:num]))
            above.add_collection(LineCollection(list(paths), colors=COLOURS[3], linewidths=0.4, alpha=0.5))
            above.scatter(*paths[:, 0].T, s=3, color=COLOURS[1], linewidths=0, label="source")
            above.scatter(*paths[:, -1].T, s=3, color=COLOURS[0], linewidths=0, label="end of the flow")
            below.scatter(*np.asarray(x0[:4000]).T, s=2, color="#bbbbbb", linewidths=0, label="data")
            below.scatter(*np.asarray(one_step[name][:4000]).T, s=2, color=COLOURS[0], linewidths=0, label="one step")
            above.set_title(f"{name}{' of ' + names[-2] if name == 'reflow' else ' pairs'}")
        extent = 1.1 * float(max(jnp.abs(x0).max(), jnp.abs(x1).max()))
        for panel in panels:
            panel.set(xticks=(), yticks=(), xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
        for panel in (panels[0], panels[len(names)]):
            panel.legend(loc="lower left", frameon=False, fontsize=8, markerscale=3)

    save(run.folder / "paths.png", (3.2 * len(names), 6.6), 2, len(names), draw)


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
