"""What does a gradient through an ODE cost, and how exact is it, by each adjoint?

    python benchmarks/adjoints.py

The gradient of |x(t1)|^2 / 2 by x0 and by the 5,088 parameters of an MLP field on R^16, a batch of 64 states in one
solve, in float64, at tolerances from 1e-2 to 1e-10: its relative error against a gradient at 1e-13, the run time of
value and gradient, the evaluations of the field (counted as they happen, forwards and backwards), and XLA's temporary
memory, which does not depend on the tolerance but, for some, on the most steps allowed. Two to three minutes on two CPU
cores (135 s of CPU time). With --batch 1 the parameters outweigh the state, and carrying a_theta through every stage of
the solver makes the backward solves several times slower than backpropagation.

    pontryagin            dgm_jax.adjoint: (x, a_x, a_theta) solved backwards, the error norm watching each part
    backsolve             Diffrax's BacksolveAdjoint: the same equations, one norm over all parts
    recursive_checkpoint  Diffrax's default: backpropagation through the solver, which keeps few states and makes the
                          others anew
    direct                Diffrax's DirectAdjoint: backpropagation through a bounded loop
    reversible_heun, ...  Diffrax's ReversibleHeun, a reversible solver of order 2, under both kinds of adjoint

Diffrax 0.7.2 has the reversible solver but no adjoint that runs it backwards exactly (``ReversibleAdjoint``, its pull
request 727); where an installed Diffrax has one it is measured too. So reversible_heun_backsolve solves the adjoint
equations with it, and reversible_heun_checkpoint backpropagates through it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from _timing import measure, ratio, show, write
from jax.flatten_util import ravel_pytree

from dgm_jax import adjoint, networks, runs, solvers
from dgm_jax.types import Array, VectorField

WAYS: dict[str, tuple[Any, Any]] = {  # Diffrax's adjoint, and the solver
    "pontryagin": (None, None),
    "backsolve": (diffrax.BacksolveAdjoint, None),
    "recursive_checkpoint": (diffrax.RecursiveCheckpointAdjoint, None),
    "direct": (diffrax.DirectAdjoint, None),
    "reversible_heun_backsolve": (diffrax.BacksolveAdjoint, diffrax.ReversibleHeun),
    "reversible_heun_checkpoint": (diffrax.RecursiveCheckpointAdjoint, diffrax.ReversibleHeun),
}
if hasattr(diffrax, "ReversibleAdjoint"):
    WAYS["reversible_heun_reversible"] = (diffrax.ReversibleAdjoint, diffrax.ReversibleHeun)


@dataclass(frozen=True)
class Config:
    """Which ways, on what, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Which of them; pontryagin among them."""
    tolerances: tuple[float, ...] = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
    """rtol and atol."""
    heun_tolerance: float = 1e-6
    """The smallest one for the solver of order 2, which needs too many steps below."""
    batch: int = 64
    """States in one solve."""
    dim: int = 16
    """Of each."""
    features: tuple[int, ...] = (64, 48)
    """Hidden widths of the field."""
    t1: float = 3.0
    """The end of the solve, from 0."""
    max_steps: int = 4096
    """The most steps, of the runs that are timed."""
    memory_steps: tuple[int, ...] = (64,)
    """The most steps of other programs, whose memory alone is looked at."""
    repeats: int = 5
    """Rounds of the clock."""


def problem(config: Config) -> tuple[VectorField, Array, Any]:
    """The field of an MLP with random weights on a batch, initial states, and parameters."""
    net = networks.MLP(config.features, last_init=jax.nn.initializers.lecun_normal(), param_dtype=jnp.float64)
    key_net, key_x, key_b = jax.random.split(jax.random.key(0), 3)
    x0 = jax.random.normal(key_x, (config.batch, config.dim), jnp.float64)
    flat, unflatten = ravel_pytree(net.init(key_net, jnp.zeros((), jnp.float64), x0[0]))
    params = unflatten(flat + 0.1 * jax.random.normal(key_b, flat.shape, flat.dtype))
    return jax.vmap(networks.vector_field(net), (None, 0, None)), x0, params


def make(config: Config, way: str, field: VectorField, max_steps: int) -> Callable[..., Any]:
    """(x0, params, tolerance) -> (loss, (dL/dx0, dL/dparams)) by one of the ways."""
    peer, solver = WAYS[way]
    options: dict[str, Any] = {"t0": 0.0, "t1": config.t1, "throw": False, "max_steps": max_steps}

    def loss(x1: Array) -> Array:
        return 0.5 * jnp.sum(x1**2)

    def ours(x0: Array, params: Any, tolerance: Array) -> Any:
        options_now = {"rtol": tolerance, "atol": tolerance, "drift_limit": None, **options}
        value, by_x0, by_params = adjoint.gradients(loss, field, x0, params, **options_now)
        return value, (by_x0, by_params)

    def theirs(x0: Array, params: Any, tolerance: Array) -> Any:
        steps = {"rtol": tolerance, "atol": tolerance, "solver": solver and solver(), **options}
        return jax.value_and_grad(lambda x, p: loss(solvers.odeint(field, x, p, adjoint=peer(), **steps)), (0, 1))(
            x0, params
        )

    return ours if peer is None else theirs


def counted(field: VectorField) -> tuple[VectorField, list[int]]:
    """The same field, and a list of one number: how often it was evaluated on the device."""
    calls = [0]

    def add(t: Any) -> np.ndarray:
        calls[0] += 1
        return np.zeros((), np.float32)  # a callback's thread has JAX's default dtypes

    @jax.custom_jvp
    def tick(t: Array) -> Array:
        return jax.pure_callback(add, jax.ShapeDtypeStruct((), jnp.float32), t).astype(t.dtype)

    tick.defjvp(lambda primals, tangents: (tick(*primals), jnp.zeros_like(primals[0])))
    return lambda t, x, args: field(t, x, args) + tick(t), calls


def relative(gradient: Any, true: Any) -> float:
    """|gradient - true| / |true|, Euclidean over x0 and all parameters."""
    a, b = (ravel_pytree(tree)[0] for tree in (gradient, true))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def main(config: Config) -> dict[str, Any]:
    """Measure every way at every tolerance; print, write and draw; return ratios of times and the errors."""
    for way in config.ways:
        if way not in WAYS:
            raise ValueError(f"ways holds {way!r}, expected some of {', '.join(WAYS)}.")
    if "pontryagin" not in config.ways:
        raise ValueError(f"ways is {config.ways}: pontryagin, with which the others are compared, must be among them.")
    with jax.enable_x64(True):
        return _main(config)


def _main(config: Config) -> dict[str, Any]:
    field, x0, params = problem(config)
    exact = jax.jit(make(config, "recursive_checkpoint", field, 2**14))(x0, params, jnp.asarray(1e-13))[1]
    rows: list[dict[str, Any]] = []
    functions: dict[str, Callable[[], Any]] = {}
    memory: dict[str, dict[int, int]] = {}
    for way in config.ways:
        runs.say(f"{way}: compiling")
        heun = WAYS[way][1] is not None
        low = max(config.heun_tolerance, min(config.tolerances)) if heun else 0.0
        example = (x0, params, jnp.asarray(1e-6))
        gradient = jax.jit(make(config, way, field, config.max_steps)).lower(*example).compile()
        watched, calls = counted(field)
        counting = jax.jit(make(config, way, watched, config.max_steps))
        for tolerance in (one for one in config.tolerances if one >= low):
            found = gradient(x0, params, jnp.asarray(tolerance))[1]
            calls[0] = 0
            jax.block_until_ready(counting(x0, params, jnp.asarray(tolerance)))
            error = relative(found, exact)
            if not np.isfinite(error):
                raise ValueError(f"{way} fails at tolerance {tolerance:g}: raise --max-steps, or leave it out.")
            rows.append({"way": way, "tolerance": tolerance, "error": error, "evaluations": calls[0]})
            functions[f"{way} {tolerance:g}"] = partial(gradient, x0, params, jnp.asarray(tolerance))
        others = {
            steps: jax.jit(make(config, way, field, steps)).lower(*example).compile() for steps in config.memory_steps
        }
        memory[way] = {
            steps: int(compiled.memory_analysis().temp_size_in_bytes)
            for steps, compiled in sorted({**others, config.max_steps: gradient}.items())
        }

    runs.say("timing")
    times = measure(functions, config.repeats)
    result: dict[str, Any] = {
        "memory": {way: {str(n): size for n, size in sizes.items()} for way, sizes in memory.items()}
    }
    for row in rows:
        seconds = times[f"{row['way']} {row['tolerance']:g}"]
        against = ratio(seconds, times[f"pontryagin {row['tolerance']:g}"])
        row |= {"ms": 1e3 * seconds.median, "times pontryagin": against.value, "quartiles": against[1:]}
        result[f"time_{row['way']}_{row['tolerance']:g}"] = against.value
        result[f"error_{row['way']}_{row['tolerance']:g}"] = row["error"]
    header = ["way", "tolerance", "error", "evaluations", "ms", "times pontryagin", "quartiles"]
    table = [[*list(row.values())[:6], "{:.2f}-{:.2f}".format(*row["quartiles"])] for row in rows]
    show("Gradient of an MLP field", header, table)
    show(
        "XLA's temporary memory in kB, by the most steps allowed",
        ["way", *map(str, memory["pontryagin"])],
        [[way, *(f"{size / 1e3:.1f}" for size in sizes.values())] for way, sizes in memory.items()],
    )
    draw(config, rows, memory)
    write("adjoints", config, rows, result)
    return result


def draw(config: Config, rows: list[dict[str, Any]], memory: dict[str, dict[int, int]]) -> None:
    """``<config.out>/adjoints.png``: error, evaluations and time against each other, and memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    styles = dict(zip(WAYS, ("o-", "s-", "^-", "v--", "D:", "P:", "X:"), strict=False))
    colours = dict(zip(WAYS, ("#D55E00", "#0072B2", "#009E73", "#666666", "#CC79A7", "#E69F00", "black"), strict=False))
    for way in config.ways:
        mine = [row for row in rows if row["way"] == way]
        look: dict[str, Any] = {"color": colours[way], "label": way.replace("_", " "), "markersize": 5}
        tolerance, error, nfe, ms = ([row[key] for row in mine] for key in ("tolerance", "error", "evaluations", "ms"))
        panels[0, 0].loglog(tolerance, error, styles[way], **look)
        panels[0, 1].loglog(tolerance, nfe, styles[way], **look)
        panels[1, 0].loglog(error, ms, styles[way], **look)
        panels[1, 1].loglog(list(memory[way]), [size / 1e3 for size in memory[way].values()], styles[way], **look)
    panels[0, 0].set(xlabel="tolerance", ylabel="relative error of the gradient")
    panels[0, 1].set(xlabel="tolerance", ylabel="evaluations of the field")
    panels[1, 0].set(xlabel="relative error of the gradient", ylabel="run time (ms)")
    panels[1, 1].set(xlabel="most steps allowed", ylabel="temporary memory (kB)")
    for axes in panels.ravel():
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "adjoints.png", dpi=100)


if __name__ == "__main__":
    runs.cli(main, Config)
