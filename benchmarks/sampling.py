"""Does sampling by probability flow cost more than its network evaluations?

    python benchmarks/sampling.py

Target: the wall time of 64 samples of the size of the digits is at most 1.15 times the evaluations of the network
times the time of one, batched and jitted; one in a row of several inside one compiled loop, so that no call from
Python is counted. About two minutes on two CPU cores.

Two networks, the U-Net on images [8, 8, 1] and an MLP on their 64 pixels, as noise predictions on the vp path; the
probability flow is solved from noise to data. Two ways to have a batch. ``one solve`` puts it inside one adaptive
solve, whose steps all examples share: the cheaper way. ``vmap`` gives each example a solve with steps of its own, so
that no sample depends on its neighbours; the loop runs until the last one is done, and so its evaluations are the
largest number of any example. There the network sees one time for each example, and the evaluation it is measured by
does too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _timing import Ratio, bars, measure, ratio, show, write
from jax.flatten_util import ravel_pytree

from dgm_jax import networks, parameterizations, runs, schedules, solvers
from dgm_jax.types import Array, VectorField

TARGET = 1.15


@dataclass(frozen=True)
class Config:
    """Which cases, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    networks: tuple[str, ...] = ("unet", "mlp")
    """Which of the two."""
    batch: int = 64
    """Samples."""
    unet_features: tuple[int, ...] = (32, 64)
    """Channels of the U-Net at its resolutions."""
    mlp_features: tuple[int, ...] = (256, 256, 256)
    """Widths of the MLP."""
    tolerance: float = 1e-3
    """rtol and atol of the solve."""
    t_data: float = 1e-3
    """Where the solve ends: at 0 itself the velocity of a noise prediction is infinite."""
    evaluations: int = 10
    """Evaluations of the network in a row, for the time of one."""
    repeats: int = 15
    """Rounds."""


def make_network(config: Config, name: str, key: Array) -> tuple[VectorField, Any, Array]:
    """A noise prediction, parameters, and a batch of noise. All weights are random, also those that start at zero."""
    if name == "unet":
        net: Any = networks.UNet(features=config.unet_features, max_frequency=10.0)
        shape: tuple[int, ...] = (8, 8, 1)
    elif name == "mlp":
        net = networks.MLP(config.mlp_features, jax.nn.silu, time_features=64, max_frequency=10.0)
        shape = (64,)
    else:
        raise ValueError(f'networks holds {name!r}, which is neither "unet" nor "mlp".')
    key_net, key_weights, key_z = jax.random.split(key, 3)
    z = jax.random.normal(key_z, (config.batch, *shape))
    params, unflatten = ravel_pytree(net.init(key_net, jnp.zeros(()), z[0]))
    return networks.vector_field(net), unflatten(params + 0.03 * jax.random.normal(key_weights, params.shape)), z


def case(config: Config, name: str) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Functions to time, and the evaluations of each way to sample."""
    noise, params, z = make_network(config, name, jax.random.key(0))
    velocity = parameterizations.convert(noise, schedules.vp(), source="noise", target="velocity")
    batched = jax.vmap(velocity, in_axes=(None, 0, None))
    options: dict[str, Any] = {"t0": 1.0, "t1": config.t_data, "rtol": config.tolerance, "atol": config.tolerance}

    def solve(field: VectorField, z: Array, params: Any) -> tuple[Array, Array]:
        solution = solvers.solve_ode(field, z, params, **options)
        return solution.x, solution.nfe

    ways = {
        "one solve": jax.jit(lambda z, params: solve(batched, z, params)),
        "vmap": jax.jit(jax.vmap(lambda z, params: solve(velocity, z, params), in_axes=(0, None))),
    }

    def evaluate(network: VectorField, t: Array) -> Callable[[], Array]:
        def several(t: Array, z: Array, params: Any) -> Array:
            def one(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
                t, x = state
                return 0.99 * t, x - 0.01 * network(t, x, params)

            return jax.lax.fori_loop(0, config.evaluations, one, (t, z))[1]

        jitted = jax.jit(several)
        return partial(jitted, t, z, params)

    functions: dict[str, Callable[[], Any]] = {way: partial(f, z, params) for way, f in ways.items()}
    functions["evaluation for one solve"] = evaluate(jax.vmap(noise, in_axes=(None, 0, None)), jnp.asarray(0.5))
    times_each = jnp.linspace(0.1, 0.9, config.batch)
    functions["evaluation for vmap"] = evaluate(jax.vmap(noise, in_axes=(0, 0, None)), times_each)
    nfe = {}
    for way, function in functions.items():
        if way in ways:
            x, count = function()
            if not bool(jnp.all(jnp.isfinite(x))):
                raise ValueError(f"{way}: the solve of the {name} failed.")
            nfe[way] = int(jnp.max(count))
    return functions, nfe


def main(config: Config) -> dict[str, float]:
    """Time both networks and both ways; print, write and draw; return the worst ratio."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name in config.networks:
        functions, nfe = case(config, name)
        times = measure(functions, config.repeats)
        for way, count in nfe.items():
            unit = times[f"evaluation for {way}"]
            label = f"{name}, {way}"
            ratios[label] = ratio(times[way], unit, count / config.evaluations)
            rows.append(
                {
                    "case": label,
                    "evaluations": count,
                    "one evaluation ms": 1e3 * unit.median / config.evaluations,
                    "sampling ms": 1e3 * times[way].median,
                    "ratio": ratios[label].value,
                    "quartiles": ratios[label][1:],
                }
            )
    show(
        f"Sampling {config.batch} digits: times its network evaluations (target: at most {TARGET})",
        ["case", "evaluations", "one evaluation ms", "sampling ms", "ratio", "quartiles"],
        [[*list(row.values())[:5], "{:.2f}-{:.2f}".format(*row["quartiles"])] for row in rows],
    )
    result = {"worst_ratio": max(one.value for one in ratios.values()), "target": TARGET}
    bars("sampling", config, ratios, dict.fromkeys(ratios, TARGET), "sampling time / (evaluations x time of one)")
    write("sampling", config, rows, result)
    return result


if __name__ == "__main__":
    runs.cli(main, Config)
