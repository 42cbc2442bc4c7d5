"""The edge of a script: command line, run folder, checkpoints, the training loop with progress, results.

A script is a frozen dataclass, a ``main`` and one last line::

    @dataclass(frozen=True)
    class Config:
        out: str = "runs/demo"
        \"\"\"Folder of the run.\"\"\"
        resume: bool = False
        \"\"\"Continue the run in that folder from its last good checkpoint.\"\"\"
        num_steps: int = 1000
        \"\"\"Training steps.\"\"\"

    def main(config: Config) -> dict[str, float]:
        run = runs.open_run(config)                   # refuses a folder that holds another run's checkpoints
        ...
        update = jax.jit(training.step(loss, optimizer), donate_argnums=0)
        state, history = runs.train(update, state, batch, key, num_steps=config.num_steps, run=run)
        plots.curve(run.folder / "loss.png", history)
        return runs.write_metrics(run, {"loss": ...})

    if __name__ == "__main__":
        runs.cli(main, Config)

Of a training run step n everything follows from the state after step n - 1 and n: the step folds n into its key, the
batch is a function of n. So a checkpoint is the state and the history, and a run that was killed and resumed ends with
the same bits as one that never was.

A run folder holds ``config.json``, ``checkpoints/<step>/`` with ``checkpoints/<step>.sha256.json`` beside it, and what
the script writes: ``metrics.json``, pictures (:mod:`dgm_jax.plots`). On many hosts process 0 alone reads and writes it.
"""

import contextlib
import dataclasses
import hashlib
import json
import linecache
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from dgm_jax.types import Array

__all__ = [
    "Restored",
    "Run",
    "cli",
    "open_run",
    "restore",
    "save",
    "say",
    "train",
    "write_metrics",
]

_Config = TypeVar("_Config")
_FREE = ("out", "resume")  # fields that may differ between the two halves of a run


# ------------------------------------------------------------------------------------------------ command line


def say(message: str) -> None:
    """One line to the person at the terminal, on standard error, from process 0 alone."""
    if jax.process_index() == 0:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message)


def cli(
    main: Callable[[_Config], Mapping[str, Any]],
    config: type[_Config],
    *,
    description: str | None = None,
    args: Sequence[str] | None = None,
) -> Mapping[str, Any]:
    """Runs ``main`` on a configuration read from the command line, and shows the numbers that it returns.

    Every field is an option, with its docstring as help. Where the environment has ``JAX_COORDINATOR_ADDRESS`` (with
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, unless a cluster that JAX knows has them) the processes are joined
    first.

    Args:
        main: ``config -> dict`` of results.
        config: a frozen dataclass; the string below a field explains it.
        description: above the options in ``--help``; by default the docstring of the script.
        args: instead of the command line's.

    Returns:
        What ``main`` returned.

    Raises:
        SystemExit: 2 for options that cannot be read; 1 for a refused folder, bad data, a loss that is not finite: the
            message alone, or the whole traceback with ``DGM_JAX_TRACEBACK=1``; 130 and 143 for an interrupted run.
    """
    if description is None:
        description = sys.modules[config.__module__].__doc__
    options = tyro.cli(config, description=description, args=args)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(
            num_processes=None if count is None else int(count), process_id=None if index is None else int(index)
        )
    try:
        results = main(options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        if os.environ.get("DGM_JAX_TRACEBACK") or not _meant_for_user(error, main):
            raise
        say(f"error: {error}")
        raise SystemExit(1) from None
    if jax.process_index() == 0:
        table = Table("result", "value", title=None)
        for name, value in results.items():
            number = isinstance(value, float | np.floating | jax.Array) and np.ndim(value) == 0
            table.add_row(name, f"{float(value):.6g}" if number else str(value))
        Console(markup=False, highlight=False).print(table)
    return results


def _meant_for_user(error: BaseException, main: Callable[..., Any]) -> bool:
    """Whether it was raised on purpose: by a module that speaks to the person at the command line, or by a ``raise``
    in the script itself, not by something that the script called or computed."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    if Path(file) in [Path(__file__).with_name(f"{name}.py") for name in ("runs", "plots", "datasets", "training")]:
        return True
    script = getattr(getattr(main, "__code__", None), "co_filename", None)
    return file == script and linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise ")


# -------------------------------------------------------------------------------------------------- run folder


class Run(NamedTuple):
    """A run: where it lives and what it was asked to do.

    Attributes:
        folder: the run folder.
        config: the configuration as JSON, without the fields that may differ on resuming.
        keep: how many checkpoints stay.
    """

    folder: Path
    config: dict[str, Any]
    keep: int

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"


def open_run(config: Any, *, keep: int = 3, may_differ: Collection[str] = ()) -> Run:
    """The run folder ``config.out``, made if need be, with ``config.json`` in it.

    Args:
        config: a dataclass instance with a field ``out`` (a path) and, to allow continuing, ``resume`` (a bool).
        keep: how many checkpoints to keep, at least 1; with 2 or more a damaged one has another to fall back on.
        may_differ: fields, beside ``out`` and ``resume``, that may change when a run is resumed: those that change no
            number.

    Returns:
        The run.

    Raises:
        FileExistsError: the folder holds checkpoints and ``resume`` is not set; or it is a file.
        ValueError: ``resume`` is set and the run there has another configuration (the fields that differ are named).
        TypeError: ``config`` is not such a dataclass, or a value in it is no JSON.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type) or not hasattr(config, "out"):
        raise TypeError(f"config must be an instance of a dataclass with a field out, got {config!r}.")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}.")
    everything = _as_json(dataclasses.asdict(config), "config")
    free = {*_FREE, *may_differ}
    run = Run(Path(config.out).expanduser(), {k: v for k, v in everything.items() if k not in free}, keep)
    resume = bool(getattr(config, "resume", False))
    if jax.process_index() != 0:
        return run
    if run.folder.exists() and not run.folder.is_dir():
        raise FileExistsError(f"{run.folder} is a file, expected a folder for the run: choose another with --out.")
    steps = _steps(run)
    if steps and not resume:
        raise FileExistsError(
            f"{run.folder} holds checkpoints of a run, up to step {max(steps)}: add --resume to continue it, choose "
            "another folder with --out, or remove that one."
        )
    path = run.folder / "config.json"
    if resume and path.is_file():
        try:
            written = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): start a new run in another folder with --out."
            ) from error
        _same_config(run, {k: v for k, v in written.items() if k not in free}, str(path))
    elif resume:
        say(f"nothing to resume in {run.folder}: starting from the beginning.")
    devices = jax.devices()
    environment = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, {"config": everything, "environment": environment})
    return run


def _as_json(value: Any, where: str) -> Any:
    """``value`` as JSON, floats exactly; errors name the entry."""
    if isinstance(value, Mapping):
        return {str(k): _as_json(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _as_json(np.asarray(value).tolist(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{where} is {value}, which no result can be: find where it arises, or give None and say why in "
            "another entry."
        )
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}: give numbers, strings, None, or lists and dicts of them.")


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all, also when the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """What the system holds back of a file or folder goes to the disk."""
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _same_config(run: Run, other: dict[str, Any], where: str) -> None:
    """Raises ``ValueError`` where the two configurations differ, naming the fields."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, sub in value.items() for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()}

    ours, theirs = flat(run.config), flat(other)
    absent = "absent"
    differ = [
        f"{name} (there {theirs.get(name, absent)!r}, here {ours.get(name, absent)!r})"
        for name in sorted({*ours, *theirs})
        if ours.get(name, absent) != theirs.get(name, absent)
    ]
    if differ:
        raise ValueError(
            f"{where} belongs to another configuration, which differs in {', '.join(differ)}: give the same options to "
            "continue that run, or start a new one in another folder with --out."
        )


def write_metrics(run: Run | str | Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``metrics.json`` into the run folder, whole or not at all.

    Args:
        run: the run, or a folder.
        metrics: name to number, string or None, or nested lists and dicts of these. NumPy and JAX arrays are welcome.

    Returns:
        The metrics as written: plain Python values.

    Raises:
        ValueError: a NaN or infinity, named.
        TypeError: something that is no JSON, named.
    """
    plain = _as_json(metrics, "metrics")
    folder = run.folder if isinstance(run, Run) else Path(run)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "metrics.json", plain)
    return plain


# ------------------------------------------------------------------------------------------------- checkpoints


class Restored(NamedTuple):
    """A checkpoint, read back.

    Attributes:
        state: as it was saved, to the bit, placed on devices as the state it was restored like.
        step: how many steps had been taken.
        history: name to ``[step]`` float64 arrays.
    """

    state: Any
    step: int
    history: dict[str, np.ndarray]


def _checkpointer() -> ocp.Checkpointer:
    """Orbax, synchronous, in process 0 alone."""
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _spec(state: Any) -> list[list[Any]]:
    """Path, shape and dtype of every leaf, in order."""
    spec = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = f"state{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(
                f"{name} is a {type(leaf).__name__}: a state holds arrays alone, so wrap it in jnp.asarray."
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"{name} is a random key: keep keys out of the state. The key of step n is jax.random.fold_in(key, n)."
            )
        spec.append([name, list(leaf.shape), str(leaf.dtype)])
    return spec


def _on_host(name: str, leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    raise ValueError(f"{name} is split over processes: replicate the state (training.replicate) to save it.")


def _steps(run: Run) -> set[int]:
    """The steps with a checkpoint, good or not; unfinished ones not counted."""
    return {int(p.name.split(".")[0]) for p in run.checkpoints.glob("*.sha256.json") if p.name.split(".")[0].isdigit()}


def _paths(run: Run, step: int) -> tuple[Path, Path]:
    folder = run.checkpoints / f"{step:08d}"
    return folder, folder.with_name(f"{folder.name}.sha256.json")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(run: Run, step: int, state: Any, history: Mapping[str, np.ndarray]) -> None:
    """Writes a checkpoint: the state, the history, the configuration, and last, beside them, the SHA-256 of every file.

    A save that is cut short leaves no manifest and does not count. All but the last ``run.keep`` checkpoints are
    removed, and so are those of later steps: they were damaged, or the run would not be here.

    Args:
        run: from ``open_run``.
        step: how many steps were taken.
        state: pytree of arrays, replicated where there are many processes.
        history: name to array ``[num]``.

    Raises:
        TypeError: a leaf of the state is a random key, or no array.
    """
    spec = _spec(state)
    if jax.process_index() != 0:
        return
    leaves = {
        str(i): _on_host(name, leaf)
        for i, ((name, _, _), leaf) in enumerate(zip(spec, jax.tree.leaves(state), strict=True))
        if leaf.size  # Orbax writes no empty arrays; their shape says all
    }
    folder, manifest = _paths(run, step)
    manifest.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if leaves:
        with contextlib.closing(_checkpointer()) as orbax:
            orbax.save(folder.resolve() / "state", args=ocp.args.StandardSave(leaves))
    with (folder / "history.npz").open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: np.asarray(values) for name, values in history.items()})
    _write_json(folder / "about.json", {"step": step, "config": run.config, "leaves": spec, "jax": jax.__version__})
    files = {}
    for path in sorted(folder.rglob("*")):
        _sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    _sync(folder)
    _write_json(manifest, {"step": step, "files": files})

    keep = sorted(s for s in _steps(run) if s <= step)[-run.keep :]
    for path in run.checkpoints.iterdir():
        number = path.name.split(".")[0]
        if number.isdigit() and int(number) not in keep:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _damage(folder: Path, manifest: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is as it was written."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written"
            if _digest(path) != entry["sha256"]:
                return f"{name} has changed since it was written (its SHA-256 differs)"
        if "about.json" not in files or "history.npz" not in files:
            return f"{manifest.name} is incomplete"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest.name} cannot be read ({error})"
    return None


def restore(run: Run, like: Any) -> Restored | None:
    """The last good checkpoint of a run, every file checked against its SHA-256 first.

    A damaged one is passed over, aloud, for the one before.

    Args:
        run: from ``open_run``.
        like: a state of the same structure, shapes and dtypes; the restored one is placed on devices like it.

    Returns:
        The checkpoint, or None where the run has none.

    Raises:
        ValueError: all checkpoints are damaged; or the last good one belongs to another configuration or has another
            structure, shape or dtype, with what differs.
    """
    spec = _spec(like)
    many = jax.process_count() > 1
    found, step = False, 0
    values: list[np.ndarray] = []
    history: dict[str, np.ndarray] = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            checkpoint = _read_last_good(run, spec)
        except Exception as error:
            if not many:
                raise
            failure = error  # the other processes wait below: tell them first
        else:
            if checkpoint is not None:
                found = True
                values, step, history = checkpoint
    if many:
        status = multihost_utils.broadcast_one_to_all(np.asarray([found, failure is not None, step], np.int32))
        if failure is not None:
            raise failure
        if status[1]:
            raise ValueError("process 0 could not restore a checkpoint: its message says why.")
        found, step = bool(status[0]), int(status[2])
        if found:
            values = _broadcast(values, spec)
            history = _broadcast_history(history)
    if not found:
        return None
    leaves = [_place(value, leaf) for value, leaf in zip(values, jax.tree.leaves(like), strict=True)]
    return Restored(jax.tree.unflatten(jax.tree.structure(like), leaves), step, history)


def _read_last_good(run: Run, spec: list[list[Any]]) -> tuple[list[np.ndarray], int, dict[str, np.ndarray]] | None:
    damaged = []
    unfinished = {int(p.name) for p in run.checkpoints.glob("*") if p.is_dir() and p.name.isdigit()} - _steps(run)
    for step in sorted(_steps(run) | unfinished, reverse=True):
        folder, manifest = _paths(run, step)
        if step in unfinished:
            say(f"checkpoint of step {step} in {run.checkpoints} was never finished: passed over.")
            continue
        problem = _damage(folder, manifest)
        if problem is None:
            break
        say(f"checkpoint of step {step} in {run.checkpoints} is damaged: {problem}. Falling back on the one before.")
        damaged.append(f"step {step}: {problem}")
    else:
        if damaged:
            raise ValueError(
                f"no good checkpoint in {run.checkpoints} ({'; '.join(damaged)}): bring the files back from a copy, or "
                "start again in another folder with --out."
            )
        return None
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    _same_config(run, about["config"], str(folder))
    if about["leaves"] != spec:
        raise ValueError(f"{folder} holds another state than this run's: {_difference(about['leaves'], spec)}.")
    if about["jax"] != jax.__version__:
        say(f"{folder} was written by jax {about['jax']}, this is {jax.__version__}: equal to the bit only within one.")
    empty = {i: np.empty(shape, jnp.dtype(dtype)) for i, (_, shape, dtype) in enumerate(spec)}
    target = {str(i): value for i, value in empty.items() if value.size}
    read: dict[str, np.ndarray] = {}
    if target:
        with contextlib.closing(_checkpointer()) as orbax:
            read = orbax.restore(folder.resolve() / "state", args=ocp.args.StandardRestore(target))
    with (folder / "history.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
        history = {name: archive[name] for name in archive}
    return [np.asarray(read.get(str(i), value)) for i, value in empty.items()], step, history


def _difference(there: list[list[Any]], here: list[list[Any]]) -> str:
    """The first leaves in which two specifications differ, in words."""
    old, new = ({name: f"{dtype}{shape}" for name, shape, dtype in spec} for spec in (there, here))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    words = [f"{name} is {old.get(name, 'absent')} there and {new.get(name, 'absent')} here" for name in names]
    if not words:
        return "the same arrays in another order"
    return "; ".join(words[:3]) + (f"; and {len(words) - 3} more" if len(words) > 3 else "")


def _broadcast(values: list[np.ndarray], spec: list[list[Any]]) -> list[np.ndarray]:
    """Process 0's values on every process, as bytes: no dtype is converted on the way."""
    likes = [np.zeros(shape, jnp.dtype(dtype)) for _, shape, dtype in spec]
    flat = [np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in (values or likes)]
    together = multihost_utils.broadcast_one_to_all(np.concatenate([np.zeros(1, np.uint8), *flat]))[1:]
    cuts = np.cumsum([f.size for f in flat])[:-1]
    parts = np.split(np.asarray(together, np.uint8), cuts)
    return [part.copy().view(like.dtype).reshape(like.shape) for part, like in zip(parts, likes, strict=True)]


def _broadcast_history(history: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Process 0's history on every process: its names and lengths first, then the numbers."""
    about = json.dumps({name: len(values) for name, values in history.items()}).encode()
    size = multihost_utils.broadcast_one_to_all(np.asarray(len(about), np.int32))
    text = np.frombuffer(about, np.uint8) if jax.process_index() == 0 else np.zeros(int(size), np.uint8)
    lengths = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8).tobytes())
    spec = [[name, (length,), "float64"] for name, length in lengths.items()]
    return dict(zip(lengths, _broadcast([history[name] for name in lengths] if history else [], spec), strict=True))


def _place(value: np.ndarray, like: Any) -> Any:
    """``value`` where ``like`` is."""
    if not isinstance(like, jax.Array):
        return value
    if not like.is_fully_addressable:
        return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
    return jax.device_put(value, like.sharding) if like.committed else jnp.asarray(value)


# ---------------------------------------------------------------------------------------------------- training


def train(
    step: Callable[[Any, Array, Any], tuple[Any, Mapping[str, Array]]],
    state: Any,
    batch: Callable[[int], Any] | None,
    key: Array,
    *,
    num_steps: int,
    run: Run | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 50,
    label: str = "training",
) -> tuple[Any, dict[str, np.ndarray]]:
    """Takes training steps up to ``num_steps``, from the last good checkpoint of ``run`` where there is one.

    state_(n+1), metrics_n = step(state_n, key, batch(n)),  n = 0 .. num_steps - 1.

    The host waits for the device once in ``log_every`` steps, or once a second. An interrupt (Ctrl-C) or SIGTERM saves
    a checkpoint after the step under way and says how to continue; a second Ctrl-C stops at once. On many processes a
    signal has to reach all of them, and where it finds them at different steps the last regular checkpoint is what
    stays.

    Args:
        step: ``(state, key, batch) -> (state, metrics)``, jitted by the caller: ``training.step``, or any function
            whose state knows its own n and whose metrics are scalars.
        state: the initial state, a pytree of arrays.
        batch: ``n -> batch``, a function of n alone; None where the step needs none.
        key: handed to every step as it is.
        num_steps: at which step to end, counted from the very first.
        run: where to save; None for nowhere.
        checkpoint_every: steps between checkpoints; None for the last step alone.
        log_every: steps between two looks at the metrics.
        label: in front of the progress bar.

    Returns:
        The last state, and the history: ``step`` ``[num_steps]`` (1 after the first) and each metric in float64, the
        same whether or not the run was interrupted. On other processes than 0 it begins where they did.

    Raises:
        FloatingPointError: a metric is NaN or infinite (or the metric ``finite`` is False), with the step.
        SystemExit: 143, after SIGTERM.
        KeyboardInterrupt: after Ctrl-C.
        ValueError: see ``restore``; a metric that is no scalar; a number of steps out of range.
    """
    if num_steps < 1 or log_every < 1 or (checkpoint_every is not None and checkpoint_every < 1):
        raise ValueError(
            f"num_steps, log_every and checkpoint_every must be at least 1, got {num_steps}, {log_every} and "
            f"{checkpoint_every}."
        )
    # A weak type (jnp.full((3,), 0.1)) would not survive a checkpoint, and would compile the second step anew.
    state = jax.tree.map(
        lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf,
        state,
    )
    first, saved = 0, None
    history: dict[str, np.ndarray] = {}
    if run is not None:
        _spec(state)
        restored = restore(run, state)
        if restored is not None:
            state, first, history = restored
            saved = first
            say(f"resumed {run.folder} from its checkpoint of step {first}.")
            if first > num_steps:
                raise ValueError(f"the checkpoint is of step {first}, beyond num_steps={num_steps}.")
    columns: dict[str, list[Any]] = {name: [values] for name, values in history.items()}
    pending: list[Mapping[str, Array]] = []

    with _signals() as caught, _progress(label, num_steps, first) as show:
        looked, done = time.monotonic(), first
        for n in range(first, num_steps):
            state, metrics = step(state, key, None if batch is None else batch(n))
            pending.append(metrics)
            done = n + 1
            due = done == num_steps or (checkpoint_every is not None and done % checkpoint_every == 0)
            stop = bool(caught)
            if due or stop or len(pending) >= log_every or time.monotonic() - looked > 1:
                show(done, _look(pending, done, columns, run, saved))
                pending, looked = [], time.monotonic()
            if run is not None and (due or stop):
                save(run, done, state, {name: np.concatenate(values) for name, values in columns.items()})
                saved = done
            if stop:
                break
    if caught:
        if run is None:
            say(f"stopped at step {done} of {num_steps}; nothing was saved.")
        else:
            say(f"stopped at step {done} of {num_steps} and saved in {run.checkpoints}: continue with --resume.")
        if caught[0] == signal.SIGTERM:
            raise SystemExit(143)
        raise KeyboardInterrupt
    return state, {name: np.concatenate(values) for name, values in columns.items()}


def _look(
    pending: list[Mapping[str, Array]], done: int, columns: dict[str, list[Any]], run: Run | None, saved: int | None
) -> float | None:
    """Fetches the metrics of the last steps into the history, and checks them. Returns the last loss."""
    fetched = [dict(metrics) for metrics in jax.device_get(pending)]
    for number, metrics in enumerate(fetched, done - len(fetched) + 1):
        for name, value in metrics.items():
            if np.ndim(value) != 0:
                raise ValueError(f"the metric {name!r} has shape {np.shape(value)}: give scalars [] to record.")
        bad = [name for name, value in metrics.items() if not np.isfinite(np.float64(value))]
        if bad or not metrics.get("finite", True):
            shown = ", ".join(f"{name} = {float(value):.6g}" for name, value in metrics.items() if name != "finite")
            kept = f" The last checkpoint is of step {saved}, in {run.checkpoints}." if run and saved else ""
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {number} ({shown}).{kept} Lower the learning rate, "
                "clip the gradients, look for NaN in the data, or see where it arises with JAX_DEBUG_NANS=1."
            )
        metrics.pop("finite", None)
        metrics["step"] = number
    if columns and set(columns) != set(fetched[0]):
        raise ValueError(f"the step reports {', '.join(fetched[0])}, but the history holds {', '.join(columns)}.")
    for name in ("step", *(name for name in fetched[0] if name != "step")):
        dtype = np.int64 if name == "step" else np.float64
        columns.setdefault(name, []).append(np.asarray([metrics[name] for metrics in fetched], dtype))
    return float(fetched[-1]["loss"]) if "loss" in fetched[-1] else None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The list of the signals caught so far, to be looked at between steps."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python handles signals in the main thread alone
        return

    def note(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(label: str, total: int, first: int) -> Iterator[Callable[[int, float | None], None]]:
    """Shows loss, steps per second and time left: a bar on a terminal, a line for every tenth of the way elsewhere."""
    if jax.process_index() != 0:
        yield lambda done, loss: None
        return
    console = Console(stderr=True)
    # The first look closes the compilation; the rate is that of the last twenty looks after it.
    marks: deque[tuple[float, int]] = deque(maxlen=20)
    printed = [first]

    def words(done: int, loss: float | None) -> tuple[str, str, str]:
        marks.append((time.monotonic(), done))
        (t0, n0), (t1, n1) = marks[0], marks[-1]
        rate = (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0
        seconds = round((total - done) / rate) if rate else None
        left = "" if seconds is None else f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
        return "" if loss is None else f"loss {loss:.5g}", f"{rate:.3g} steps/s" if rate else "", left

    if not console.is_terminal:

        def line(done: int, loss: float | None) -> None:
            parts = words(done, loss)
            if done == total or done * 10 // total > printed[0] * 10 // total:
                say("  ".join([f"{label} {done}/{total}", *filter(None, parts)]))
                printed[0] = done

        yield line
        return
    fields = ("{task.fields[loss]}", "{task.fields[rate]}", "{task.fields[left]}")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        *map(TextColumn, fields),
        console=console,
    )
    with bar:
        task = bar.add_task(label, total=total, completed=first, loss="compiling", rate="", left="")

        def update(done: int, loss: float | None) -> None:
            shown, rate, left = words(done, loss)
            bar.update(task, completed=done, loss=shown, rate=rate, left=left)

        yield update
