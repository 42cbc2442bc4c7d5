"""What does a likelihood cost, and how wrong is it, with its divergences in the solve and at nodes?

    python benchmarks/likelihood.py

The field is a tanh MLP of two hidden layers, trained by flow matching on the 8 x 8 digits: data at t = 0, N(0, I) at
t = 1. Every way computes log p of the same test digits, each with its own adaptive steps (Tsit5 at 1e-5, float32):

    in the solve      one fixed Gaussian probe; one fixed Rademacher probe, as FFJORD does; exactly
    at nodes          flows.log_prob with 8 Gauss-Legendre nodes, and 4 or 16 rows of a randomised Hadamard matrix at
                      each, no row used again before all were; exactly
    its own           exactly, by the divergence that networks.MLP offers: in the solve, and at 8 nodes
    with error bars   flows.likelihood, with 16 rows a node and exactly, whose second, looser solve is in the price

Cost is time over that of solving for x(t) alone; error the root mean square over digits and draws, in nats, against
float64 at 1e-8. Then the gradient of the mean log p by the parameters: cost over the gradient without the integral,
and the relative error of a single draw. About three minutes on two CPU cores.

Targets, at h = 512: 1.7 times and 1.5 nats with 4 rows, 3.4 times and 0.22 nats with 16, exactly 14 times and 0.01
nats, with the field's own divergence 2 times; two-sigma intervals cover 90 to 99 per cent; a gradient at 1.5 times with
an error of 0.14.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _timing import measure, ratio, show, write

from dgm_jax import datasets, flows, networks, probes, quadrature, runs, solvers, training
from dgm_jax.types import Array, VectorField

TIMES = {"t_data": 0.0, "t_base": 1.0}
NODES = quadrature.gauss_legendre(8)


@dataclass(frozen=True)
class Config:
    """The field, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    width: int = 512
    """Units of each of the two hidden layers."""
    num_steps: int = 4000
    """Training steps of the field."""
    batch: int = 64
    """Digits whose likelihood is computed."""
    ways: tuple[int, ...] = tuple(range(1, 12))
    """Which of the ways, by their numbers in the table."""
    gradient: bool = True
    """Measure the gradient too."""
    draws: int = 8
    """Draws of the probes, for the error."""
    repeats: int = 5
    """Rounds, for the time."""


def trained_field(config: Config, data: Array) -> tuple[VectorField, Any]:
    """A velocity by flow matching on straight paths, E|v(t, (1 - t) x + t z) - (z - x)|^2, and its parameters."""
    net = networks.MLP((config.width, config.width))
    field = networks.vector_field(net)
    params = net.init(jax.random.key(0), jnp.zeros(()), data[0])

    def loss(params: Any, key: Array, rows: Array) -> Array:
        key_t, key_z = jax.random.split(key)
        t, z = jax.random.uniform(key_t, rows.shape[:1]), jax.random.normal(key_z, rows.shape)
        x = (1 - t[:, None]) * rows + t[:, None] * z
        return jnp.mean((jax.vmap(field, (0, 0, None))(t, x, params) - (z - rows)) ** 2)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, config.num_steps))

    @jax.jit
    def train(params: Any) -> tuple[Any, Array]:
        def step(carry: Any, n: Array) -> tuple[Any, Array]:
            params, state = carry
            key = jax.random.fold_in(jax.random.key(1), n)
            rows = data[training.batch_indices(jax.random.key(2), n, len(data), 256)]
            value, gradient = jax.value_and_grad(loss)(params, key, rows)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(config.num_steps))
        return params, losses

    params, losses = train(params)
    runs.say(f"flow matching loss {float(losses[:100].mean()):.3f} -> {float(losses[-100:].mean()):.3f}")
    return field, params


def ways(field: VectorField) -> dict[str, Callable[[Any, Array, Array], Any]]:
    """(params, key, x) -> log p(x), or a Likelihood."""

    def plain(t: Array, x: Array, params: Any) -> Array:
        return field(t, x, params)

    def log_prob(
        velocity: VectorField, draw: Callable[[Array, Array], Array] | None = None, at_nodes: bool = False
    ) -> Callable[[Any, Array, Array], Array]:
        def run(params: Any, key: Array, x: Array) -> Array:
            own = None if draw is None else draw(key, x)
            rule = NODES if at_nodes else None
            return flows.log_prob(velocity, x, params, probes=own, rule=rule, throw=False, **TIMES)

        return run

    def likelihood(velocity: VectorField, keyed: bool) -> Callable[[Any, Array, Array], Any]:
        def run(params: Any, key: Array, x: Array) -> Any:
            return flows.likelihood(velocity, x, params, key=key if keyed else None, throw=False, **TIMES)

        return run

    return {
        "in the solve, one Gaussian probe": log_prob(plain, probes.gaussian),
        "in the solve, one Rademacher probe": log_prob(plain, probes.rademacher),
        "8 nodes, 4 rows each": log_prob(plain, partial(probes.spread, num_nodes=8, num=4), at_nodes=True),
        "8 nodes, 16 rows each": log_prob(plain, partial(probes.spread, num_nodes=8, num=16), at_nodes=True),
        "in the solve, exact": log_prob(plain),
        "8 nodes, exact": log_prob(plain, at_nodes=True),
        "in the solve, its own divergence": log_prob(field),
        "8 nodes, its own divergence": log_prob(field, at_nodes=True),
        "likelihood, 16 rows a node": likelihood(plain, True),
        "likelihood, exact": likelihood(plain, False),
        "likelihood, its own divergence": likelihood(field, False),
    }


def reference(field: VectorField, params: Any, x: Array) -> np.ndarray:
    """log p in float64 at 1e-8, by the field's own divergence in the solve."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        net = networks.MLP((wide["params"]["layer_0"]["bias"].shape[0],) * 2, param_dtype=jnp.float64)
        own = networks.vector_field(net)
        solve = jax.jit(jax.vmap(lambda x: flows.log_prob(own, x, wide, rtol=1e-8, atol=1e-8, throw=False, **TIMES)))
        return np.asarray(solve(jnp.asarray(np.asarray(x), jnp.float64)))


def gradients(config: Config, field: VectorField, params: Any, x: Array) -> list[dict[str, Any]]:
    """The gradient of the mean log p: relative error of one draw, and cost over the gradient of x(t) alone."""
    forms = ways(field)

    def plain(t: Array, x: Array, params: Any) -> Array:
        return field(t, x, params)

    def six(params: Any, key: Array, x: Array) -> Array:
        own = probes.spread(key, x, 8, 6)
        return flows.log_prob(plain, x, params, probes=own, rule=NODES, throw=False, **TIMES)

    chosen = {
        "in the solve, one Rademacher probe": forms["in the solve, one Rademacher probe"],
        "8 nodes, 6 rows each": six,
        "8 nodes, its own divergence": forms["8 nodes, its own divergence"],
    }
    keys = jax.random.split(jax.random.key(4), (config.draws, len(x)))

    def alone(params: Any, key: Array, x: Array) -> Array:
        return flows.standard_normal(solvers.odeint(field, x, params, t0=0.0, t1=1.0, throw=False))

    def of(one: Callable[[Any, Array, Array], Array]) -> Callable[..., Any]:
        return jax.jit(jax.grad(lambda params, keys: jnp.mean(jax.vmap(one, (None, 0, 0))(params, keys, x))))

    functions = {name: of(way) for name, way in chosen.items()} | {"alone": of(alone)}
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


def draw(config: Config, rows: list[dict[str, Any]]) -> Path:
    """Error against cost, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"in": "#D55E00", "8": "#0072B2", "likelihood,": "#009E73"}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, row in enumerate(rows, 1):
        color = colors[row["way"].split()[0]]
        axes.loglog(row["cost"], row["rms"], "o", color=color)
        axes.annotate(str(number), (row["cost"], row["rms"]), xytext=(5, 4), textcoords="offset points", color=color)
    text = "\n".join(f"{number}  {row['way']}" for number, row in enumerate(rows, 1))
    axes.text(1.02, 0.98, text, transform=axes.transAxes, va="top", fontsize=9)
    axes.set(xlabel="time over solving for x(t) alone", ylabel="error of log p, root mean square (nats)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path(config.out) / "likelihood.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main(config: Config) -> dict[str, Any]:
    """Train the field, measure every way, print, write and draw; return costs, errors and coverages."""
    images = datasets.digits()
    train, test = (
        jnp.asarray(
            (pixels.reshape(len(pixels), -1) + np.random.default_rng(0).uniform(size=(len(pixels), 64))) / 8.5 - 1
        )
        for pixels in (images.train, images.test)
    )
    field, params = trained_field(config, train.astype(jnp.float32))
    x = test[: config.batch].astype(jnp.float32)
    truth = reference(field, params, x)
    keys = jax.random.split(jax.random.key(3), (config.draws, len(x)))
    chosen = {name: way for number, (name, way) in enumerate(ways(field).items(), 1) if number in config.ways}
    compiled = {name: jax.jit(jax.vmap(way, (None, 0, 0))) for name, way in chosen.items()}
    alone = jax.jit(jax.vmap(lambda x: solvers.odeint(field, x, params, t0=0.0, t1=1.0, throw=False)))
    functions = {name: partial(f, params, keys[0], x) for name, f in compiled.items()}
    times = measure(functions | {"alone": partial(alone, x)}, config.repeats)
    rows = []
    for name, f in compiled.items():
        found = [f(params, draw, x) for draw in keys]
        bars = [one for one in found if isinstance(one, flows.Likelihood)]
        values = np.stack([one.log_prob if bars else one for one in found])
        error = values - truth
        covered = np.mean([np.abs(one.log_prob - truth) <= 2 * one.error for one in bars]) if bars else None
        cost = ratio(times[name], times["alone"])
        rows.append(
            {
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
    show(
        f"log p of {len(x)} digits, h = {config.width}: x(t) alone takes {1e3 * times['alone'].median:.1f} ms",
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
    by_gradient = gradients(config, field, params, x) if config.gradient else []
    if by_gradient:
        show(
            "Gradient of the mean log p by the parameters",
            ("way", "cost over the gradient of x(t) alone", "relative error of one draw"),
            [[row["way"], row["cost"], row["relative error"]] for row in by_gradient],
        )
    result = {
        "cost": {row["way"]: row["cost"] for row in rows},
        "rms": {row["way"]: row["rms"] for row in rows},
        "covered": {row["way"]: row["covered"] for row in rows if row["covered"] is not None},
        "gradient": by_gradient,
    }
    write("likelihood", config, rows, result)
    draw(config, rows)
    return result


if __name__ == "__main__":
    runs.cli(main, Config)
