"""How do a dense determinant, an exact trace and Hutchinson's estimate of it grow with the number of dimensions m?

    python benchmarks/determinant_and_trace.py

The claim: a discrete flow without structure pays for log|det J| with O(m^3) operations, a continuous one for tr J with
O(m^2) exactly and O(m) by Hutchinson's estimate, where J is the Jacobian of a field that is itself O(m) to evaluate.
The field here is x -> a tanh(x) + A tanh(B x + c), [m] -> [width] -> [m] of a fixed width. Four ways, and one part of
the first:

    determinant    discrete_flows.dense_log_abs_det: m products with J, then its LU decomposition
    LU alone       the decomposition of a J that is at hand
    dense trace    the sum of the diagonal of jax.jacfwd: m products with J, all at once
    trace          divergence.exact: the same number of products, some at a time
    Hutchinson     divergence.hutchinson with one probe, which comes as an argument

For each m: operations and temporary memory as the compiler counts them, and the run time of one evaluation, one of
several in a row inside one compiled loop, so that no call from Python is counted; of the rounds the fastest, for other
programs can only slow it down. The compiler cannot look into LAPACK: 2/3 m^3 operations of the decomposition are added.
Of loops it counts one pass, so that ``trace`` has no count.

Result: exponents p of ~ m^p, fitted by least squares in logarithms over m >= 512 with their standard errors, and the m
from which one way is faster than another. Two minutes on one CPU core. For quiet numbers: taskset -c 0 python ...

Time does not follow operations alone. The m x m matrices of ``dense trace`` leave the caches between m = 512 and 4096,
where its time grows faster than m^2; in blocks it has m^2 in time, m in memory. And what costs m^2 or m is needed in
every evaluation of an ODE solve, the determinant once a layer: the last column says how many evaluations a layer is
worth.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _timing import measure, show, write

from dgm_jax import discrete_flows, divergence, probes, runs
from dgm_jax.types import Array

WAYS = ("determinant", "LU alone", "dense trace", "trace", "Hutchinson")
CLAIMED = {"determinant": 3, "LU alone": 3, "dense trace": 2, "trace": 2, "Hutchinson": 1}
PAIRS = (
    ("determinant", "trace"),
    ("LU alone", "trace"),
    ("determinant", "Hutchinson"),
    ("trace", "Hutchinson"),
    ("dense trace", "trace"),
)  # the slower one, for large m, first
COLORS = dict(zip(WAYS, ("#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73"), strict=True))


@dataclass(frozen=True)
class Config:
    """Which sizes, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    """m, increasing."""
    fit_from: int = 512
    """The smallest m that counts for the exponents; three sizes at least."""
    width: int = 8
    """Hidden units of the field."""
    target_seconds: float = 0.01
    """Evaluations in a row, until they take about this long."""
    repeats: int = 9
    """Rounds; of runs above half a second only two."""


def make_field(key: Array, m: int, width: int) -> tuple[Callable[[Any, Array], Array], Any]:
    """The field and its parameters: 2 width + 2 numbers for each dimension."""
    keys = jax.random.split(key, 3)
    a = 1 + 0.1 * jax.random.normal(keys[0], (m,))
    wide, back = (jax.random.normal(k, shape) / m**0.5 for k, shape in ((keys[1], (width, m)), (keys[2], (m, width))))

    def field(params: Any, x: Array) -> Array:
        a, wide, back = params
        return a * jnp.tanh(x) + back @ jnp.tanh(wide @ x)

    return field, (a, wide, back)


def way(name: str, field: Callable[[Any, Array], Array]) -> Callable[[Any, Array, Array], tuple[Array, Array]]:
    """(params, x, probe [1, m]) -> something of the size of x that depends on f(x), and the number sought."""

    def run(params: Any, x: Array, probe: Array) -> tuple[Array, Array]:
        f = partial(field, params)
        if name == "determinant":
            return discrete_flows.dense_log_abs_det(f, x)
        if name == "LU alone":
            return x, jnp.linalg.slogdet(params + jnp.diag(x)).logabsdet
        if name == "trace":
            return divergence.exact(f, x)
        if name == "dense trace":
            return f(x), jnp.trace(jax.jacfwd(f)(x))
        return divergence.hutchinson(f, x, probe)

    return run


class Case(NamedTuple):
    """One way at one m."""

    call: Callable[[int], Any]  # so many evaluations in a row
    operations: float | None
    bytes: int


def make_case(name: str, m: int, width: int) -> Case:
    """Compiles it, and asks the compiler for its counts."""
    key_field, key_x, key_probe, key_matrix = jax.random.split(jax.random.key(m), 4)
    field, params = make_field(key_field, m, width)
    if name == "LU alone":
        params = jax.random.normal(key_matrix, (m, m)) / m**0.5
    x = jax.random.normal(key_x, (m,))
    arguments = params, x, probes.rademacher(key_probe, x)
    one = way(name, field)

    def several(num: Array, params: Any, start: Array, probe: Array) -> tuple[Array, Array]:
        def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            x, total = state
            value, number = one(params, x, probe)
            return start + 0.1 * jnp.tanh(value), total + number

        return jax.lax.fori_loop(0, num, step, (start, jnp.zeros(())))

    compiled = jax.jit(one).lower(*arguments).compile()
    operations = None if name == "trace" else compiled.cost_analysis()["flops"]
    if operations is not None and name in ("determinant", "LU alone"):
        operations += 2 / 3 * m**3
    loop = jax.jit(several).lower(jnp.asarray(1), *arguments).compile()
    jax.block_until_ready(loop(jnp.asarray(1), *arguments))
    return Case(
        lambda num: loop(jnp.asarray(num), *arguments), operations, compiled.memory_analysis().temp_size_in_bytes
    )


def evaluations(case: Case, target: float) -> int:
    """How many of them take about ``target`` seconds: tried, with ever more of them, thrice each for busy moments."""

    def clock(num: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(case.call(num))
        return time.perf_counter() - start

    num = 1
    while True:
        took = clock(num)
        if took > target / 4:
            took = min(took, clock(num), clock(num)) if took < 1 else took
        if took > target / 4 or num >= 10**6:
            return max(1, min(10**6, round(num * target / took)))
        num *= 4


def fit(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The exponent p of values ~ sizes^p by least squares in logarithms, and its standard error."""
    x, y = np.log(sizes), np.log(values)
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))


def crossing(sizes: Sequence[int], slow: Sequence[float], fast: Sequence[float]) -> float | None:
    """The m above which ``fast`` stays below ``slow``, between two sizes in logarithms; None: it never does.

    Where it is so at every size, the smallest one.
    """
    gap = np.log(slow) - np.log(fast)
    above = np.flatnonzero(gap <= 0)
    if not len(above):
        return float(sizes[0])
    i = int(above[-1])
    if i + 1 == len(sizes):
        return None
    share = -gap[i] / (gap[i + 1] - gap[i])
    return float(sizes[i] * (sizes[i + 1] / sizes[i]) ** share)


def draw(config: Config, rows: list[dict[str, Any]], result: dict[str, Any]) -> Path:
    """Time, operations and memory against m, both axes logarithmic, with the exponents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    columns = {"seconds": "seconds for one evaluation", "operations": "operations", "bytes": "temporary memory (bytes)"}
    for panel, (column, label) in zip(axes, columns.items(), strict=True):
        for name in WAYS:
            shown = [(row["m"], row[column]) for row in rows if row["way"] == name and row[column]]
            exponent = result["exponents"][column].get(name)
            if not shown or exponent is None:
                continue
            text = f"{name}: {exponent[0]:.2f}" + (f" ± {exponent[1]:.2f}" if exponent[1] >= 0.005 else "")
            panel.loglog(*zip(*shown, strict=True), "o-", color=COLORS[name], markersize=4, linewidth=1.5, label=text)
        panel.set(xlabel="dimensions m", title=label)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.legend(title=f"exponent, m ≥ {config.fit_from}", frameon=False, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "determinant_and_trace.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main(config: Config) -> dict[str, Any]:
    """Time every way at every m; fit, print, write and draw; return exponents and crossing points."""
    sizes = list(config.sizes)
    if sizes != sorted(set(sizes)) or sizes[0] < 2:
        raise ValueError(f"sizes must increase, from 2 or more, got {config.sizes}.")
    large = [m for m in sizes if m >= config.fit_from]
    if len(large) < 3:
        raise ValueError(f"{len(large)} of the sizes are at least fit_from={config.fit_from}: an exponent needs three.")
    rows: list[dict[str, Any]] = []
    for m in sizes:
        cases = {name: make_case(name, m, config.width) for name in WAYS}
        nums = {name: evaluations(case, config.target_seconds) for name, case in cases.items()}
        functions = {name: partial(case.call, nums[name]) for name, case in cases.items()}
        start = time.perf_counter()
        jax.block_until_ready(functions["determinant"]())
        slow = time.perf_counter() - start > 0.5
        times = measure(functions, min(2, config.repeats) if slow else config.repeats)
        for name, case in cases.items():
            rounds = times[name].rounds / nums[name]
            rows.append(
                {
                    "way": name,
                    "m": m,
                    "seconds": float(rounds.min()),
                    "median": float(np.median(rounds)),
                    "operations": case.operations,
                    "bytes": case.bytes,
                    "in_a_row": nums[name],
                }
            )
        runs.say(f"m = {m}: " + ", ".join(f"{row['way']} {1e6 * row['seconds']:.4g} us" for row in rows[-len(WAYS) :]))

    def values(name: str, column: str, among: Sequence[int]) -> list[Any]:
        return [row[column] for row in rows if row["way"] == name and row["m"] in among]

    exponents: dict[str, Any] = {"seconds": {}, "operations": {}, "bytes": {}}
    for column, fits in exponents.items():
        for name in WAYS:
            found = values(name, column, large)
            if all(found):
                fits[name] = fit(large, found)
    faster_from, times_at_largest = {}, {}
    for slow_way, fast_way in PAIRS:
        pair = (values(slow_way, "seconds", sizes), values(fast_way, "seconds", sizes))
        faster_from[f"{fast_way} than {slow_way}"] = crossing(sizes, *pair)
        times_at_largest[f"{slow_way} over {fast_way}"] = pair[0][-1] / pair[1][-1]
    result = {"exponents": exponents, "faster_from": faster_from, "times_at_largest": times_at_largest}
    columns = ("m", *WAYS)
    show(
        "Microseconds for one evaluation",
        columns,
        [[str(m), *(1e6 * values(name, "seconds", [m])[0] for name in WAYS)] for m in sizes],
    )
    show(
        f"Exponents over m >= {config.fit_from}: claimed, of the time, of the operations, of the memory",
        ("way", "claimed", "time", "operations", "memory"),
        [
            [
                name,
                CLAIMED[name],
                *(
                    "-" if exponent is None else f"{exponent[0]:.2f} +- {exponent[1]:.2f}"
                    for exponent in (fits.get(name) for fits in exponents.values())
                ),
            ]
            for name in WAYS
        ],
    )
    show(
        f"Which is faster from which m on, and how many times at m = {sizes[-1]}",
        ("faster than", "from m", "times"),
        [
            [name, "never" if start is None else start, times]
            for (name, start), times in zip(faster_from.items(), times_at_largest.values(), strict=True)
        ],
    )
    write("determinant_and_trace", config, rows, result)
    draw(config, rows, result)
    return result


if __name__ == "__main__":
    runs.cli(main, Config)
