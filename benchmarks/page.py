"""Write benchmarks/README.md from the results in benchmarks/results.

    python benchmarks/likelihood.py --out benchmarks/results        # any of the benchmarks, and then
    python benchmarks/page.py

The page holds the tables that the benchmarks printed, the machine that they ran on, and their pictures.
"""

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Section(NamedTuple):
    """A benchmark on the page.

    Attributes:
        name: of its script.
        target: what it should reach, in words.
        tables: beginnings of the titles of the tables to show; all where there are none.
        side_by_side: what stands before the colon in the titles of tables that become columns of one.
        shortened: (beginning of a title, end of the first cells of the lines to show, what to say of them).
    """

    name: str
    target: str
    tables: tuple[str, ...] = ()
    side_by_side: str = ""
    shortened: tuple[tuple[str, str, str], ...] = ()


SECTIONS = (
    Section(
        "trace_estimators",
        "stands beside what was found, in the last table",
        (
            "Relative error",
            "trace.choose",
            "Two-sigma",
            "Time over one evaluation of f",
            "Temporary memory",
            "Other networks",
            "value_and_grad",
            "Laplacian",
            "Targets",
        ),
        side_by_side="Relative error, root mean square, after so many products",
        shortened=(("Temporary memory", ", 64", "B = 64"),),
    ),
    Section(
        "likelihood",
        "at h = 512: 1.7 times and 1.5 nats with 4 rows a node, 3.4 and 0.22 with 16, exactly 14 and 0.01, by the "
        "network's own divergence 2; a gradient with an error of 0.14 at 1.5 times",
    ),
    Section("ffjord_training", "none: which way is ahead is the result"),
    Section("ffjord_step", "at least 6 times at batch 64, 2.5 times at batch 512"),
    Section(
        "few_steps", "sampling at most 1.15 times its evaluations; DPM-Solver++ (2M) with 10 evaluations within 1.5"
    ),
    Section("samplers", "at most 1.15 times"),
    Section("sampling", "at most 1.15 times"),
    Section("euler_maruyama", "at most 1.1 times"),
    Section("adjoints", "none: a table"),
    Section("determinant_and_trace", "exponents 3, 2 and 1 in operations"),
)

HEAD = """# Benchmarks

*Written by `python benchmarks/page.py` from the JSON in `benchmarks/results`; edit that script, not this page.*

One script a question. The answer is a ratio, of run times taken in turn in one process, so that a busy moment of the
machine falls on both sides, with the quartiles over the rounds. Compiling is timed apart, as the
first call. Each prints its tables and writes `<out>/<name>.json` (configuration, machine, every row, every table) and
pictures beside it; `--out` names the folder, `runs/benchmarks` unless told, and `--help` lists the options.

    pip install "dgm-jax[bench]" --extra-index-url https://download.pytorch.org/whl/cpu

The extra holds the peers: traceax, matfree and folx for the trace estimators, which leave out those that are missing,
and PyTorch with torchdiffeq for `ffjord_step.py` (a CPU build will do; `--no-torch` times this library alone).

**What to trust.** The targets are for a CPU that nothing else is using. On a shared one the medians of runs below a
millisecond wander even so; watch the quartiles. PyTorch with as many threads as there are cores then suffers far more
than with one, which would flatter us: that is why several numbers of threads are tried, and the fastest counts. To take
the other programs out of the picture, bind the process to one core: `taskset -c 0 python benchmarks/...
--torch-threads 1`.

From one process to the next, the time of one and the same program can differ by half and more, which no number of
rounds evens out: `trace_estimators.py` takes its times in three processes, and the medians over them count. What
differs is how long XLA's threads wait for each other. The exact trace at h = 64, m = 2 and a batch of 64 is 15 times
the field there, or twice, as the same way by `jax.vjp` is two columns on; on one core both are 2.1: `taskset -c 0
python benchmarks/trace_estimators.py --parts costs --sizes 2`. The cells of two dimensions were taken by a second call,
after divergences of so few had gone back to one end.
"""


def question(name: str) -> str:
    """The first line of the docstring of a benchmark."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8")))
    return (text or "").splitlines()[0]


def markdown(table: dict) -> str:
    """A table as it was printed, in Markdown."""
    lines = [table["header"], ["---", *["---:"] * (len(table["header"]) - 1)], *table["rows"]]
    return f"**{table['title']}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def side_by_side(tables: Sequence[dict], name: str) -> list[dict]:
    """Tables "<name>: a", "<name>: b", ... that have the same columns as one with the columns a, b, ..., each cell with
    the numbers of a line; what others there are, as they are."""
    found: dict[Any, dict] = {}
    for table in tables:
        start, _, column = table["title"].partition(": ")
        if start != name:
            found[len(found)] = table
            continue
        label, *numbers = table["header"]
        title = f"{name} ({' / '.join(numbers)})"
        one = found.setdefault(tuple(numbers), {"title": title, "header": [label], "rows": []})
        lines = {line[0]: line for line in one["rows"]}
        for way, *values in table["rows"]:
            if way not in lines:
                lines[way] = [way, *["-"] * (len(one["header"]) - 1)]
                one["rows"].append(lines[way])
            lines[way].append(" / ".join(values))
        one["header"].append(column)
        for line in one["rows"]:
            line += ["-"] * (len(one["header"]) - len(line))
    return list(found.values())


def shorten(table: dict, shortened: Sequence[tuple[str, str, str]]) -> dict:
    """The lines to show of a table; the others are in the JSON."""
    for start, end, note in shortened:
        if table["title"].startswith(start):
            rows = [line for line in table["rows"] if line[0].endswith(end)]
            return table | {"title": f"{table['title']} ({note}; the JSON has all)", "rows": rows}
    return table


def section(one: Section, results: Path) -> str:
    """The question, the command, the target, and what was found where there is a result."""
    parts = [f"## `{one.name}.py`\n\n{question(one.name)}\n", f"    python benchmarks/{one.name}.py\n"]
    parts.append(f"Target: {one.target}.\n")
    paths = sorted(results.glob(f"{one.name}*.json"))
    if not paths:
        return "\n".join([*parts, "No run of it is published.\n"])
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        machine = record["machine"]
        parts.append(f"Run on: {machine['device']}, {machine['cores']} cores, jax {machine['jax']}.\n")
        for table in side_by_side(record["tables"], one.side_by_side):
            if not one.tables or table["title"].startswith(one.tables):
                parts.append(markdown(shorten(table, one.shortened)))
    parts += [f"![{each.stem}]({results.name}/{each.name})\n" for each in sorted(results.glob(f"{one.name}*.png"))]
    return "\n".join(parts)


def page(results: Path = HERE / "results") -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(one, results) for one in SECTIONS)])


if __name__ == "__main__":
    (HERE / "README.md").write_text(page(), encoding="utf-8")
