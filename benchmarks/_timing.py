"""What the benchmarks share: the clock, the table, and the files that they leave behind."""

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


class Seconds(NamedTuple):
    """The run times of one function.

    Attributes:
        first: the first call, in seconds: tracing, compiling and one run.
        rounds: later ones, in seconds ``[repeats]``; entry i of one function was taken right beside entry i of every
            other.
    """

    first: float
    rounds: np.ndarray

    @property
    def median(self) -> float:
        """The median of the later calls, in seconds."""
        return float(np.median(self.rounds))


class Ratio(NamedTuple):
    """A ratio of two run times: of their medians, with the quartiles over the rounds."""

    value: float
    low: float
    high: float


def measure(
    functions: Mapping[str, Callable[[], Any]], repeats: int, before: Callable[[], Any] = lambda: None
) -> dict[str, Seconds]:
    """Time functions in turn, round after round, so that a busy moment of the machine falls on all of them.

    At its turn a function is called twice and the second call counts: as in a loop of its own, it finds the caches
    as it left them and not as another one did. The garbage collector waits.

    Args:
        functions: name -> function of nothing. What it returns is waited for.
        repeats: rounds after the first call of each.
        before: called before every call, outside of the clock.
    """

    def call(function: Callable[[], Any]) -> float:
        before()
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    def turn(function: Callable[[], Any]) -> float:
        call(function)
        return call(function)

    first = {name: call(function) for name, function in functions.items()}
    names = list(functions)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()
    try:
        for i in range(repeats):
            for name in names[i % len(names) :] + names[: i % len(names)]:  # each goes first in its turn
                rounds[name].append(turn(functions[name]))
            gc.collect()
    finally:
        if collects:
            gc.enable()
    return {name: Seconds(first[name], np.asarray(rounds[name])) for name in names}


def ratio(over: Seconds, under: Seconds, scale: float = 1.0) -> Ratio:
    """Median time of ``over`` divided by ``scale`` times that of ``under``."""
    each = over.rounds / (scale * under.rounds)
    return Ratio(over.median / (scale * under.median), *map(float, np.quantile(each, [0.25, 0.75])))


_shown: list[dict[str, Any]] = []  # the tables of the benchmark that is running, until ``write``


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, text to the left, numbers to the right, and keep it for ``write``."""
    text = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *text]) for i in range(len(header))]
    _shown.append({"title": title, "header": list(header), "rows": text})
    print(f"\n{title}\n")
    for line in [list(header), ["-" * width for width in widths], *text]:
        left = line[0].ljust(widths[0])
        print("  ".join([left, *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]))
    print()


def write(name: str, config: Any, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Path:
    """Write ``<config.out>/<name>.json``: configuration, machine, every row, the result, and the tables as printed.

    Of a path in the configuration only the last part is kept.
    """
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "config": {
            key: Path(value).name if isinstance(value, str) and "/" in value else value
            for key, value in asdict(config).items()
        },
        "machine": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "device": str(jax.devices()[0].device_kind),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "rows": list(rows),
        "result": dict(result),
        "tables": list(_shown),
    }
    _shown.clear()
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return path


def bars(name: str, config: Any, ratios: Mapping[str, Ratio], targets: Mapping[str, float], label: str) -> Path:
    """Draw ``<config.out>/<name>.png``: one bar a ratio with its quartiles, and a mark at each target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(ratios)
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.34 * len(names)), layout="constrained")
    for y, key in enumerate(names):
        value, low, high = ratios[key]
        axes.barh(y, value, color="tab:blue" if key in targets else "lightsteelblue")
        axes.plot([low, high], [y, y], color="black", linewidth=1)
        if key in targets:
            axes.plot([targets[key]] * 2, [y - 0.45, y + 0.45], color="tab:red", linewidth=2)
        axes.text(max(value, high), y, f" {value:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{label}; black: quartiles over the rounds, red: target")
    axes.margins(x=0.12)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
