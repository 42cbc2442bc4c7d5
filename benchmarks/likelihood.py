"""What does a likelihood cost, and how wrong is it, with its divergences in the solve and at nodes?

    python benchmarks/likelihood.py
    python benchmarks/likelihood.py --data digits28 --fields flow-matching --widths 512 --num-steps 2000 --batch 16
    python benchmarks/likelihood.py --data mnist --data-dir FOLDER --fields flow-matching --widths 512 --batch 16

Three velocities on the 8 x 8 digits, or on larger images (the digits enlarged to 28 x 28; those of files), data at
t = 0 and N(0, I) at t = 1, each from a tanh MLP of two hidden layers: flow matching; the probability flow of a noise
prediction on the vp path, from t = 0.001 on, its nodes in log-SNR; an FFJORD, trained by maximum likelihood for a
little. Every way computes log p of the same test images, each with its own adaptive steps (Tsit5 at 1e-5, float32):

    in the solve      one fixed Gaussian probe; one fixed Rademacher probe, as FFJORD does; exactly
    at nodes          flows.log_prob with 8 Gauss-Legendre nodes, and 4 or 16 rows of a randomised Hadamard matrix at
                      each, no row used again before all were; exactly
    adapted           these rows in a basis: the eigenvectors of the mean symmetric part of the Jacobian along the paths
                      of training images. It helps where few of the rows are used; where all are, those of the nodes
                      already cancel what the mean makes
    its own           exactly, by the divergence that networks.MLP offers: in the solve, and at 8 nodes
    with error bars   flows.likelihood, with 16 rows a node and exactly, whose second, looser solve is in the price

Cost is time over that of solving for x(t) alone; error the root mean square over digits and draws, in nats, against
float64 at 1e-8. Then the gradient of the mean log p by the parameters: cost over the gradient without the integral,
and the relative error of a single draw. All takes eight minutes on two CPU cores, flow matching alone
(``--fields flow-matching``) five.

Targets, of flow matching at h = 512: 1.7 times and 1.5 nats with 4 rows, 3.4 times and 0.22 nats with 16, exactly 14
times and 0.01 nats, with the field's own divergence 2 times; two-sigma intervals cover 90 to 99 per cent; a gradient at
1.5 times with an error of 0.14.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _timing import measure, ratio, show, write

from dgm_jax import datasets, flows, networks, parameterizations, probes, quadrature, runs, schedules, solvers, training
from dgm_jax.types import Array, VectorField

NODES = quadrature.gauss_legendre(8)
SCHEDULE = schedules.vp()
Kind = Literal["flow-matching", "probability-flow", "ffjord"]


@dataclass(frozen=True)
class Config:
    """The field, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    data: Literal["digits", "digits28", "mnist", "fashion_mnist", "cifar10"] = "digits"
    """Which images. All but the digits, of 8 x 8 or enlarged to 28 x 28, are read from ``data_dir``."""
    data_dir: str | None = None
    """Folder with the standard files of the images."""
    fields: tuple[Kind, ...] = ("flow-matching", "probability-flow", "ffjord")
    """Which velocities."""
    widths: tuple[int, ...] = (64, 512)
    """Units of each of the two hidden layers: flow matching with each of these, the others with the last."""
    num_steps: int = 4000
    """Training steps by regression."""
    ffjord_steps: int = 300
    """Training steps by maximum likelihood, 64 digits each."""
    batch: int = 64
    """Images whose likelihood is computed."""
    learn: int = 32
    """Training images from which the basis of adapted probes is learnt."""
    ways: tuple[int, ...] = tuple(range(1, 15))
    """Which of the ways, by their numbers in the table."""
    gradient: bool = True
    """Measure the gradient too, of the first of the fields, with the last of the widths."""
    draws: int = 8
    """Draws of the probes, for the error."""
    repeats: int = 5
    """Rounds, for the time."""


class Model(NamedTuple):
    """A velocity that knows its divergence.

    Attributes:
        net: its network.
        velocity: network -> the velocity.
        params: of the network.
        times: where the data and the base are, and the clock of the nodes.
        basis: of adapted probes, ``[m, m]``.
    """

    net: networks.MLP
    velocity: Callable[[networks.MLP], VectorField]
    params: Any
    times: dict[str, Any]
    basis: Array | None = None

    def plain(self, t: Array, x: Array, params: Any) -> Array:
        """The velocity alone, which does not know its divergence."""
        return self.velocity(self.net)(t, x, params)


def log_prob_at_nodes(velocity: VectorField, x: Array, params: Any, **options: Any) -> Array:
    """log p(x) with the velocity's own divergence at the nodes, data at 0."""
    return flows.log_prob(velocity, x, params, t_data=0.0, t_base=1.0, rule=NODES, throw=False, **options)


def trained(kind: Kind, width: int, config: Config, data: Array) -> Model:
    """A velocity of that kind, trained on the rows of ``data``."""
    net = networks.MLP((width, width))
    times: dict[str, Any] = {"t_data": 0.0, "t_base": 1.0}
    velocity, start, num_steps, size = networks.vector_field, 0.0, config.num_steps, 256
    if kind == "probability-flow":
        start = 1e-3
        times = {"t_data": start, "t_base": 1.0, "clock": partial(schedules.log_snr, SCHEDULE)}

        def velocity(net: networks.MLP) -> VectorField:
            return parameterizations.convert(networks.vector_field(net), SCHEDULE, source="noise", target="velocity")

    elif kind == "ffjord":
        num_steps, size = config.ffjord_steps, 64
    field = networks.vector_field(net)
    params = net.init(jax.random.key(0), jnp.zeros(()), data[0])

    def loss(params: Any, key: Array, rows: Array) -> Array:
        if kind == "ffjord":  # in nats a dimension
            one = partial(log_prob_at_nodes, field, params=params, rtol=1e-3, atol=1e-3)
            return -jnp.mean(jax.vmap(one)(rows)) / rows.shape[1]
        key_t, key_z = jax.random.split(key)
        t = jax.random.uniform(key_t, rows.shape[:1], minval=start)
        z = jax.random.normal(key_z, rows.shape)
        if kind == "flow-matching":  # straight paths
            return jnp.mean(
                (jax.vmap(field, (0, 0, None))(t, (1 - t[:, None]) * rows + t[:, None] * z, params) - (z - rows)) ** 2
            )
        alpha, sigma = (jax.vmap(partial(f, SCHEDULE))(t)[:, None] for f in (schedules.alpha, schedules.sigma))
        return jnp.mean((jax.vmap(field, (0, 0, None))(t, alpha * rows + sigma * z, params) - z) ** 2)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, num_steps))

    @jax.jit
    def train(params: Any) -> tuple[Any, Array]:
        def step(carry: Any, n: Array) -> tuple[Any, Array]:
            params, state = carry
            key = jax.random.fold_in(jax.random.key(1), n)
            rows = data[training.batch_indices(jax.random.key(2), n, len(data), size)]
            value, gradient = jax.value_and_grad(loss)(params, key, rows)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))
        return params, losses

    params, losses = train(params)
    runs.say(f"{kind}, h = {width}: loss {float(losses[:100].mean()):.3f} -> {float(losses[-100:].mean()):.3f}")
    return Model(net, velocity, params, times)


def learnt_basis(model: Model, x: Array) -> Array:
    """Eigenvectors, in columns, of the mean symmetric part of the Jacobian along the paths of ``x`` ``[m, m]``."""
    t_data, t_base, clock = model.times["t_data"], model.times["t_base"], model.times.get("clock")
    grid = np.linspace(t_data, t_base, 4001)
    u = grid if clock is None else np.asarray(jax.vmap(clock)(jnp.asarray(grid)))
    ts = np.interp(np.linspace(0, 1, 16), (u - u[0]) / (u[-1] - u[0]), grid)
    times, weights = jnp.asarray(ts), jnp.asarray(np.gradient(ts))

    def mean(x: Array) -> Array:
        xs = solvers.solve_ode(model.plain, x, model.params, t0=t_data, t1=t_base, ts=times, throw=False).xs
        jacobians = jax.vmap(lambda t, y: jax.jacrev(lambda y: model.plain(t, y, model.params))(y))(times, xs)
        return jnp.tensordot(weights, jacobians, 1)

    jacobian = np.asarray(jax.jit(lambda x: jax.lax.map(mean, x))(x), np.float64).mean(0)
    return jnp.asarray(np.linalg.eigh(jacobian + jacobian.T)[1], x.dtype)


def ways(model: Model) -> dict[str, Callable[[Any, Array, Array], Any]]:
    """(params, key, x) -> log p(x), or a Likelihood."""
    field, plain = model.velocity(model.net), model.plain
    in_solve = {name: value for name, value in model.times.items() if name != "clock"}

    def log_prob(
        velocity: VectorField, draw: Callable[[Array, Array], Array] | None = None, at_nodes: bool = False
    ) -> Callable[[Any, Array, Array], Array]:
        def run(params: Any, key: Array, x: Array) -> Array:
            own = None if draw is None else draw(key, x)
            where = {"rule": NODES, **model.times} if at_nodes else in_solve
            return flows.log_prob(velocity, x, params, probes=own, throw=False, **where)

        return run

    def likelihood(
        velocity: VectorField, keyed: bool = False, basis: Array | None = None
    ) -> Callable[[Any, Array, Array], Any]:
        def run(params: Any, key: Array, x: Array) -> Any:
            own = {"key": key, "basis": basis} if keyed else {}
            return flows.likelihood(velocity, x, params, throw=False, **own, **model.times)

        return run

    def adapted(key: Array, x: Array, num: int) -> Array:
        return jax.vmap(probes.rotated, (0, None))(probes.spread(key, x, 8, num), model.basis)

    return {
        "in the solve, one Gaussian probe": log_prob(plain, probes.gaussian),
        "in the solve, one Rademacher probe": log_prob(plain, probes.rademacher),
        "8 nodes, 4 rows each": log_prob(plain, partial(probes.spread, num_nodes=8, num=4), at_nodes=True),
        "8 nodes, 16 rows each": log_prob(plain, partial(probes.spread, num_nodes=8, num=16), at_nodes=True),
        "8 nodes, 4 rows each, adapted": log_prob(plain, partial(adapted, num=4), at_nodes=True),
        "8 nodes, 16 rows each, adapted": log_prob(plain, partial(adapted, num=16), at_nodes=True),
        "in the solve, exact": log_prob(plain),
        "8 nodes, exact": log_prob(plain, at_nodes=True),
        "in the solve, its own divergence": log_prob(field),
        "8 nodes, its own divergence": log_prob(field, at_nodes=True),
        "likelihood, 16 rows a node": likelihood(plain, keyed=True),
        "likelihood, 16 rows a node, adapted": likelihood(plain, keyed=True, basis=model.basis),
        "likelihood, exact": likelihood(plain),
        "likelihood, its own divergence": likelihood(field),
    }


def drawn(name: str) -> bool:
    """Whether the way of that name draws probes."""
    return "row" in name or "probe" in name


def reference(model: Model, x: Array) -> np.ndarray:
    """log p in float64 at 1e-8, by the field's own divergence in the solve."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), model.params)
        own = model.velocity(model.net.clone(param_dtype=jnp.float64))
        where = {"t_data": model.times["t_data"], "t_base": model.times["t_base"], "rtol": 1e-8, "atol": 1e-8}
        solve = jax.jit(jax.vmap(partial(flows.log_prob, own, throw=False, **where), (0, None)))
        return np.asarray(solve(jnp.asarray(np.asarray(x), jnp.float64), wide))


def alone(model: Model, params: Any, x: Array) -> Array:
    """x(t) at the base, without log p."""
    times = {"t0": model.times["t_data"], "t1": model.times["t_base"]}
    return solvers.odeint(model.velocity(model.net), x, params, throw=False, **times)


def gradients(config: Config, model: Model, x: Array) -> list[dict[str, Any]]:
    """The gradient of the mean log p: relative error of one draw, and cost over the gradient of x(t) alone."""
    forms, params = ways(model), model.params

    def six(params: Any, key: Array, x: Array) -> Array:
        own = probes.spread(key, x, 8, 6)
        return flows.log_prob(model.plain, x, params, probes=own, rule=NODES, throw=False, **model.times)

    chosen = {
        "in the solve, one Rademacher probe": forms["in the solve, one Rademacher probe"],
        "8 nodes, 6 rows each": six,
        "8 nodes, its own divergence": forms["8 nodes, its own divergence"],
    }
    keys = jax.random.split(jax.random.key(4), (config.draws, len(x)))

    def end(params: Any, key: Array, x: Array) -> Array:
        return flows.standard_normal(alone(model, params, x))

    def of(one: Callable[[Any, Array, Array], Array]) -> Callable[..., Any]:
        return jax.jit(jax.grad(lambda params, keys: jnp.mean(jax.vmap(one, (None, 0, 0))(params, keys, x))))

    functions = {name: of(way) for name, way in chosen.items()} | {"alone": of(end)}
    times = measure({name: partial(f, params, keys[0]) for name, f in functions.items()}, config.repeats)
    truth = np.concatenate(
        [np.ravel(g) for g in jax.tree.leaves(of(forms["in the solve, its own divergence"])(params, keys[0]))]
    )
    rows = []
    for name in chosen:
        errors = []
        for draw in keys:
            found = np.concatenate([np.ravel(g) for g in jax.tree.leaves(functions[name](params, draw))])
            errors.append(np.linalg.norm(found - truth) / np.linalg.norm(truth))
        cost = ratio(times[name], times["alone"])
        rows.append({"way": name, "cost": cost.value, "quartiles": cost[1:], "relative error": float(np.mean(errors))})
    return rows


def measured(config: Config, label: str, model: Model, x: Array) -> list[dict[str, Any]]:
    """Rows of every way: cost, error, and what the interval says."""
    truth = reference(model, x)
    keys = jax.random.split(jax.random.key(3), (config.draws, len(x)))
    chosen = {name: way for number, (name, way) in enumerate(ways(model).items(), 1) if number in config.ways}
    compiled = {name: jax.jit(jax.vmap(way, (None, 0, 0))) for name, way in chosen.items()}
    base = jax.jit(jax.vmap(partial(alone, model), (None, 0)))
    functions = {name: partial(f, model.params, keys[0], x) for name, f in compiled.items()}
    times = measure(functions | {"alone": partial(base, model.params, x)}, config.repeats)
    rows = []
    for name, f in compiled.items():
        found = [f(model.params, draw, x) for draw in (keys if drawn(name) else keys[:1])]
        bars = [one for one in found if isinstance(one, flows.Likelihood)]
        values = np.stack([one.log_prob if bars else one for one in found])
        error = values - truth
        covered = np.mean([np.abs(one.log_prob - truth) <= 2 * one.error for one in bars]) if bars else None
        cost = ratio(times[name], times["alone"])
        rows.append(
            {
                "field": label,
                "way": name,
                "cost": cost.value,
                "quartiles": cost[1:],
                "rms": float(np.sqrt(np.mean(error**2))),
                "bias": float(error.mean()),
                "reported": float(np.sqrt(np.mean([np.square(one.error) for one in bars]))) if bars else None,
                "covered": None if covered is None else float(covered),
                "divergences": None if not bars else float(np.mean([one.num_divergences for one in bars])),
            }
        )
        runs.say(f"{label}, {name}: {cost.value:.2f} times, {rows[-1]['rms']:.2g} nats")
    show(
        f"{label}: log p of {len(x)} images of {config.data}, m = {x.shape[1]}; x(t) alone takes "
        f"{1e3 * times['alone'].median:.1f} ms",
        ("way", "cost", "rms error (nats)", "reported", "in two sigma", "divergences"),
        [
            [
                r["way"],
                r["cost"],
                r["rms"],
                *("-" if r[k] is None else r[k] for k in ("reported", "covered", "divergences")),
            ]
            for r in rows
        ],
    )
    return rows


def draw(name: str, config: Config, rows: list[dict[str, Any]]) -> Path:
    """Error against cost, both axes logarithmic, one panel a field."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"in": "#D55E00", "8": "#0072B2", "likelihood,": "#009E73"}
    kinds = list(dict.fromkeys(row["field"] for row in rows))
    size = (4.2 * len(kinds) + 2.6, 4.6)
    figure, axes = plt.subplots(1, len(kinds), figsize=size, layout="constrained", squeeze=False, sharey=True)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if tick <= 1.5 * max(row["cost"] for row in rows)]
    for panel, kind in zip(axes[0], kinds, strict=True):
        here = [row for row in rows if row["field"] == kind]
        for number, row in enumerate(here, 1):
            color = colors[row["way"].split()[0]]
            panel.loglog(row["cost"], row["rms"], "o", color=color)
            place = {"xytext": (5, 4 if number % 2 else -11), "textcoords": "offset points"}
            panel.annotate(str(number), (row["cost"], row["rms"]), color=color, **place)
        panel.set(xlabel="time over solving for x(t) alone", title=kind)
        panel.set_xticks(ticks, ticks)
        panel.minorticks_off()
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("error of log p, root mean square (nats)")
    text = "\n".join(f"{number}  {row['way']}" for number, row in enumerate(here, 1))
    axes[0, -1].text(1.04, 0.98, text, transform=axes[0, -1].transAxes, va="top", fontsize=9)
    path = Path(config.out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Images of 28 x 28, by linear interpolation."""
    shape = (len(pixels), 28, 28, *pixels.shape[3:])
    return np.asarray(jax.image.resize(jnp.asarray(pixels, jnp.float32), shape, "linear"))


def dequantized(pixels: np.ndarray, levels: int) -> Array:
    """Examples in rows, by uniform noise on [-1, 1]: one of ``levels`` bins for each value."""
    noise = np.random.default_rng(0).uniform(size=pixels.shape)
    return jnp.asarray((pixels + noise).reshape(len(pixels), -1) * (2 / levels) - 1, jnp.float32)


def main(config: Config) -> dict[str, Any]:
    """Train the fields, measure every way, print, write and draw; return costs, errors and coverages."""
    if config.data.startswith("digits") != (config.data_dir is None):
        raise ValueError(f"data_dir is {config.data_dir!r} with data {config.data!r}: only digits come without files.")
    images = datasets.digits() if config.data_dir is None else datasets.load_images(config.data, config.data_dir)
    pixels = [images.train, images.test[: config.batch]]
    if config.data == "digits28":
        pixels = [enlarged(one) for one in pixels]
    train, test = (dequantized(one, images.levels) for one in pixels)
    rows: list[dict[str, Any]] = []
    by_gradient: list[dict[str, Any]] = []
    widths = {kind: config.widths if kind == "flow-matching" else config.widths[-1:] for kind in config.fields}
    for kind, width in [(kind, width) for kind, several in widths.items() for width in several]:
        label = f"{kind}, h = {width}"
        model = trained(kind, width, config, train)
        model = model._replace(basis=learnt_basis(model, train[: config.learn]))
        rows += measured(config, label, model, test)
        if config.gradient and (kind, width) == (config.fields[0], config.widths[-1]):
            by_gradient = gradients(config, model, test)
            show(
                f"{label}: gradient of the mean log p by the parameters",
                ("way", "cost over the gradient of x(t) alone", "relative error of one draw"),
                [[row["way"], row["cost"], row["relative error"]] for row in by_gradient],
            )
    labels = list(dict.fromkeys(row["field"] for row in rows))
    result = {
        name: {label: {row["way"]: row[name] for row in rows if row["field"] == label} for label in labels}
        for name in ("cost", "rms", "covered")
    } | {"gradient": by_gradient}
    name = "likelihood" if config.data == "digits" else f"likelihood_{config.data}"
    write(name, config, rows, result)
    draw(name, config, rows)
    return result


if __name__ == "__main__":
    runs.cli(main, Config)
