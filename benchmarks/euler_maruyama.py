"""Does Euler-Maruyama through ``solvers.euler_maruyama`` cost more than a ``jax.lax.scan`` written by hand?

    python benchmarks/euler_maruyama.py

Target: at most 1.1 times, in every case. About four minutes on two CPU cores.

Two drifts, an Ornstein-Uhlenbeck one (nothing but the loop's own cost) and a small network; two ways to have a batch,
``vmap`` over keys (each path has its own) and the batch as one state of one path (one key); several sizes. The
scan by hand is what one would write for the same case: it splits its key at each step, and draws one step's noise at a
time, where ours draws that of several steps if it is little. ``solvers.sdeint``, Diffrax's Euler in the same steps,
stands beside for information.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _timing import Ratio, bars, measure, ratio, show, write

from dgm_jax import networks, runs, solvers
from dgm_jax.types import SDE, Array, VectorField

TARGET = 1.1


@dataclass(frozen=True)
class Config:
    """Which cases, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    sizes: tuple[tuple[int, int], ...] = ((2, 64), (2, 4096), (64, 64), (64, 1024))
    """Pairs of dimension and batch size."""
    num_steps: int = 200
    """Steps of a path."""
    width: int = 64
    """Of the two hidden layers of the network."""
    repeats: int = 21
    """Rounds."""
    sdeint: bool = True
    """Also time Diffrax's Euler."""


def pull(t: Array, x: Array, args: Any) -> Array:
    """The drift of an Ornstein-Uhlenbeck process, -x."""
    return -x


def by_hand(key: Array, drift: Callable, noise: float, x0: Array, args: Any, num_steps: int) -> Array:
    """Euler-Maruyama from 0 to 1 as one would write it for the case at hand."""
    dt = 1.0 / num_steps

    def step(carry: tuple[Array, Array], n: Array) -> tuple[tuple[Array, Array], None]:
        key, x = carry
        key, subkey = jax.random.split(key)
        eps = jax.random.normal(subkey, x.shape, x.dtype)
        x = x + drift(n.astype(x.dtype) * dt, x, args) * dt + noise * math.sqrt(dt) * eps
        return (key, x), None

    (_, x1), _ = jax.lax.scan(step, (key, x0), jnp.arange(num_steps))
    return x1


def case(config: Config, drift_name: str, form: str, dim: int, batch: int) -> dict[str, Callable[[], Array]]:
    """Name -> a function of nothing that draws the batch of paths."""
    noise = 0.7
    x0 = jnp.ones((batch, dim))
    params: Any = None
    drift: VectorField = pull
    if drift_name == "network":
        net = networks.MLP((config.width, config.width), last_init=jax.nn.initializers.normal(0.1))
        params = net.init(jax.random.key(0), jnp.zeros(()), x0[0])
        drift = networks.vector_field(net)

    over_batch = drift if form == "vmap" else jax.vmap(drift, in_axes=(None, 0, None))
    sde = SDE(over_batch, lambda t, x, args: jnp.asarray(noise, x.dtype))
    ends: dict[str, Any] = {"t0": 0.0, "t1": 1.0, "num_steps": config.num_steps}
    ways: dict[str, Callable[..., Array]] = {
        "by hand": lambda key, x, args: by_hand(key, over_batch, noise, x, args, config.num_steps),
        "euler_maruyama": lambda key, x, args: solvers.euler_maruyama(key, sde, x, args, **ends),
        "sdeint": lambda key, x, args: solvers.sdeint(key, sde, x, args, **ends),
    }
    if not config.sdeint:
        del ways["sdeint"]
    key = jax.random.key(1)
    if form == "vmap":
        key = jax.random.split(key, batch)
        ways = {name: jax.vmap(way, in_axes=(0, 0, None)) for name, way in ways.items()}
    jitted = {name: jax.jit(way) for name, way in ways.items()}
    return {name: partial(way, key, x0, params) for name, way in jitted.items()}


def main(config: Config) -> dict[str, float]:
    """Time every case; print, write and draw the ratios; return the worst one."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for drift in ("linear", "network"):
        for form in ("vmap", "one state"):
            for dim, batch in config.sizes:
                times = measure(case(config, drift, form, dim, batch), config.repeats)
                name = f"{drift}, {form}, d={dim}, batch={batch}"
                ratios[name] = ratio(times["euler_maruyama"], times["by hand"])
                row = {"case": name, "ratio": ratios[name].value, "quartiles": ratios[name][1:]}
                for way, seconds in times.items():
                    row[f"{way} ms"] = 1e3 * seconds.median
                    row[f"{way} first call s"] = seconds.first
                if "sdeint" in times:
                    row["sdeint ratio"] = ratio(times["sdeint"], times["by hand"]).value
                rows.append(row)
    show(
        f"Euler-Maruyama, {config.num_steps} steps: times the scan by hand (target: at most {TARGET})",
        ["case", "by hand ms", "ours ms", "ratio", "quartiles", "first call s", "sdeint ratio"],
        [
            [
                row["case"],
                row["by hand ms"],
                row["euler_maruyama ms"],
                row["ratio"],
                "{:.2f}-{:.2f}".format(*row["quartiles"]),
                row["euler_maruyama first call s"],
                row.get("sdeint ratio", "-"),
            ]
            for row in rows
        ],
    )
    worst = max(ratios.values(), key=lambda one: one.value).value
    result = {"worst_ratio": worst, "target": TARGET}
    bars("euler_maruyama", config, ratios, dict.fromkeys(ratios, TARGET), "run time / that of a scan by hand")
    write("euler_maruyama", config, rows, result)
    return result


if __name__ == "__main__":
    runs.cli(main, Config)
