"""A run that was killed ends with the same bits; a damaged checkpoint is noticed; errors say what to do."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dgm_jax import runs, training

SCRIPT = '''"""Fits a line."""

import sys
import time
from dataclasses import dataclass
from functools import cache

import dgm_jax.runs as runs

if __name__ == "__main__":
    assert "matplotlib" not in sys.modules, "importing runs imports Matplotlib"

import jax
import jax.numpy as jnp

from dgm_jax import training


@dataclass(frozen=True)
class Config:
    out: str = "runs/line"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in that folder."""
    num_steps: int = 40
    """How long to train."""
    rate: float = 0.1
    """Learning rate of Adam."""
    pause: float = 0.0
    """Seconds to sleep before every step."""


def loss(params, key, batch):
    x, y = batch
    noise = 0.1 * jax.random.normal(key, y.shape)
    return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y - noise) ** 2)


@cache
def compiled(rate, num_steps):
    optimizer = training.adam(rate, num_steps)
    return optimizer, jax.jit(training.step(loss, optimizer), donate_argnums=0)


def main(config, hook=None):
    run = runs.open_run(config, may_differ=["pause"])
    optimizer, update = compiled(config.rate, config.num_steps)
    state = training.init({"w": jnp.full((3, 3), 0.1), "b": jnp.zeros((1, 3))}, optimizer)
    key = jax.random.key(0)
    if jax.process_count() > 1:
        state, key = training.replicate(training.mesh(), (state, key))

    def batch(n):
        time.sleep(config.pause)
        if hook is not None:
            hook(n)
        x = jax.random.normal(jax.random.fold_in(jax.random.key(7), n), (8, 3))
        if jax.process_count() > 1:
            mesh = training.mesh()
            x = training.shard(mesh, x[training.local_rows(mesh, 8)])
        return x, x[:, ::-1]

    state, history = runs.train(
        update, state, batch, key, num_steps=config.num_steps, run=run, checkpoint_every=5, log_every=7
    )
    main.ended = state, history
    return runs.write_metrics(run, {"loss": history["loss"][-1] if len(history["loss"]) else None})


if __name__ == "__main__":
    runs.cli(main, Config)
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "line.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("line", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["line"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["line"]


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """State and history of the run that nobody interrupts."""
    script.main(script.Config(out=str(tmp_path_factory.mktemp("whole"))))
    state, history = script.main.ended
    assert history["loss"][-1] < 0.5 * history["loss"][0]  # it learns, so equal bits mean something
    return jax.device_get(state), history


def assert_same_bits(one, two):
    chex.assert_trees_all_equal_dtypes(one, two)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


# --------------------------------------------------------------------------------------- interrupted and resumed


def environment(**more):
    path = os.pathsep.join([os.path.dirname(os.path.dirname(runs.__file__)), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": path, **more}


def test_killed_run_ends_with_the_same_bits(script, whole, tmp_path, capfd):
    """SIGKILL, which no handler sees, at some step after the tenth; then --resume."""
    out = tmp_path / "run"
    command = [sys.executable, script.__file__, "--out", str(out), "--pause", "0.05"]
    log = tmp_path / "stderr.txt"  # a file: a pipe that nobody reads is full sooner or later, and stops the program
    with log.open("w") as errors, subprocess.Popen(command, env=environment(), stderr=errors) as process:
        try:
            deadline = time.monotonic() + 120
            while not (out / "checkpoints" / "00000010.sha256.json").exists():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "metrics.json").exists()

    with pytest.raises(FileExistsError, match=r"holds checkpoints of a run, up to step \d+: add --resume"):
        script.main(script.Config(out=str(out)))
    script.main(script.Config(out=str(out), resume=True))
    assert "resumed" in capfd.readouterr().err
    assert_same_bits(script.main.ended, whole)
    assert json.loads((out / "metrics.json").read_text())["loss"] == whole[1]["loss"][-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_signals_save_and_say_how_to_go_on(script, whole, tmp_path, capfd, number, code):
    config = script.Config(out=str(tmp_path))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit if code else KeyboardInterrupt) as info:
        script.main(config, lambda n: os.kill(os.getpid(), number) if n == 12 else None)
    if code:
        assert info.value.code == code
    assert "stopped at step 13 of 40 and saved in" in (err := capfd.readouterr().err)
    assert "continue with --resume" in err
    assert signal.getsignal(number) is before
    script.main(dataclasses.replace(config, resume=True))
    assert "from its checkpoint of step 13" in capfd.readouterr().err
    assert_same_bits(script.main.ended, whole)
    # a finished run has nothing more to do, and gives the same again
    script.main(dataclasses.replace(config, resume=True))
    assert_same_bits(script.main.ended, whole)


def test_second_interrupt_stops_at_once(script, tmp_path):
    def twice(n):
        if n == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        script.main(script.Config(out=str(tmp_path)), twice)
    assert not (tmp_path / "checkpoints").exists()


def test_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(script, whole, tmp_path, capfd):
    config = script.Config(out=str(tmp_path), num_steps=40)
    with pytest.raises(SystemExit):
        script.main(config, lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 21 else None)
    state = next(iter(sorted((tmp_path / "checkpoints" / "00000022" / "state" / "d").iterdir())))
    flip(state)
    script.main(dataclasses.replace(config, resume=True))
    err = capfd.readouterr().err
    assert "checkpoint of step 22" in err
    assert "is damaged: state/d/" in err
    assert "Falling back" in err
    assert "from its checkpoint of step 20" in err
    assert_same_bits(script.main.ended, whole)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == [
        f"{n:08d}" for n in (30, 35, 40)
    ]


@pytest.mark.slow
def test_two_processes_resume(script, whole, tmp_path):
    """Two processes joined on loopback, stopped at step 20 and resumed: the same losses as one, process 0 writes."""

    def go(*options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, script.__file__, "--out", str(tmp_path / "run"), *options]
        shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
        logs = [tmp_path / f"stderr{i}.txt" for i in range(2)]  # files: each may have to wait for the other
        with contextlib.ExitStack() as stack:
            both = []
            for i, log in enumerate(logs):
                own = {
                    "env": environment(JAX_PROCESS_ID=str(i), **shared),
                    "stderr": stack.enter_context(log.open("w")),
                }
                both.append(stack.enter_context(subprocess.Popen(command, **own)))
                stack.callback(both[-1].kill)
            codes = [process.wait(timeout=240) for process in both]
        said = [log.read_text() for log in logs]
        assert codes == [0, 0], said
        return said

    go()
    run = runs.Run(tmp_path / "run", {}, 3)
    assert len(list(run.checkpoints.glob("*.sha256.json"))) == 3
    for path in [*run.checkpoints.glob("00000040*"), *run.checkpoints.glob("00000035.sha256.json")]:
        if path.is_file():
            path.unlink()
    ended = json.loads((run.folder / "metrics.json").read_text())["loss"]
    said = go("--resume")
    assert "from its checkpoint of step 30" in said[0]
    assert "resumed" not in said[1]
    assert json.loads((run.folder / "metrics.json").read_text())["loss"] == ended
    np.testing.assert_allclose(ended, whole[1]["loss"][-1], rtol=1e-12)
    with np.load(run.checkpoints / "00000040" / "history.npz") as history:
        np.testing.assert_allclose(history["loss"], whole[1]["loss"], rtol=1e-12)


# --------------------------------------------------------------------------------------------------- checkpoints


class State(NamedTuple):
    params: Any
    opt_state: Any
    step: Any


def a_state(scale=1.0):
    params = {
        "half": scale * jnp.asarray([1.0, -0.0, jnp.inf, 3e-41], jnp.bfloat16),
        "single": scale * jnp.asarray([[1.1, -0.0]], jnp.float32),
        "double": jnp.asarray(scale * 0.1),
        "whole": jnp.asarray([2**40 + 1, -1]),
        "bytes": jnp.asarray([0, 255], jnp.uint8),
        "flag": jnp.asarray(True),
        "nothing": jnp.zeros((0, 3), jnp.float32),
        "host": np.asarray([1.5], np.float32),
    }
    return State(params, optax.adam(0.1).init({"single": params["single"]}), jnp.asarray(7, jnp.int32))


@dataclass(frozen=True)
class Config:
    out: str
    resume: bool = False
    rate: float = 0.1
    widths: tuple[int, ...] = (64, 64)


HISTORY = {"step": np.arange(1, 4), "loss": np.asarray([0.1, np.float64(np.float32(0.2)), 1e-300])}


def test_everything_comes_back_exactly(tmp_path):
    run = runs.open_run(Config(str(tmp_path)))
    assert runs.restore(run, a_state()) is None
    runs.save(run, 3, a_state(), HISTORY)
    back = runs.restore(run, a_state(scale=0.0))
    assert back.step == 3
    assert_same_bits(back.state, a_state())
    assert jax.tree.structure(back.state) == jax.tree.structure(a_state())
    assert_same_bits(back.history, HISTORY)
    assert isinstance(back.state.params["host"], np.ndarray)
    mesh = training.mesh(jax.devices()[:1])
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = runs.restore(run, State(*jax.device_put(a_state()[:2], sharding), a_state().step)).state
    assert placed.params["single"].sharding == sharding
    assert not placed.step.committed


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path, capfd):
    run = runs.open_run(Config(str(tmp_path), resume=True))
    runs.save(run, 1, a_state(0.5), HISTORY)
    runs.save(run, 2, a_state(), HISTORY)
    folder, manifest = run.checkpoints / "00000002", run.checkpoints / "00000002.sha256.json"
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    assert len(files) > 5
    harms = {
        "flipped": (flip, "has changed since it was written"),
        "cut": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "were written"),
        "gone": (lambda p: p.unlink(), "is missing"),
    }
    tried = 0
    for path in [*files, manifest]:
        before = path.read_bytes()
        for name, (harm, message) in harms.items():
            if not before or (path == manifest and name != "cut"):
                continue
            harm(path)
            capfd.readouterr()
            back = runs.restore(run, a_state())
            if path == manifest:  # its last byte is a line end; without more, what it says is still whole
                manifest.write_bytes(before[: len(before) // 2])
                message = "cannot be read"
                back = runs.restore(run, a_state())
            assert back.step == 1, (path, name)
            assert_same_bits(back.state, a_state(0.5))
            assert message in capfd.readouterr().err
            path.write_bytes(before)
            tried += 1
    assert tried > 15
    assert runs.restore(run, a_state()).step == 2

    manifest.unlink()  # as a kill in the middle of the save leaves it
    assert runs.restore(run, a_state()).step == 1
    assert "was never finished" in capfd.readouterr().err
    flip(run.checkpoints / "00000001" / "history.npz")
    with pytest.raises(ValueError, match=r"no good checkpoint in .*step 1: history\.npz has changed.*--out"):
        runs.restore(run, a_state())
    (run.checkpoints / "00000001.sha256.json").unlink()
    assert runs.restore(run, a_state()) is None  # nothing was ever finished: begin


def test_only_the_last_checkpoints_stay_and_later_ones_go(tmp_path):
    run = runs.open_run(Config(str(tmp_path)), keep=2)
    state = {"x": jnp.zeros(2)}
    for step in (10, 20, 30, 40):
        runs.save(run, step, state, {})
    names = {p.name for p in run.checkpoints.iterdir()}
    assert names == {"00000030", "00000030.sha256.json", "00000040", "00000040.sha256.json"}
    flip(run.checkpoints / "00000040" / "about.json")
    assert runs.restore(run, state).step == 30
    runs.save(run, 35, state, {})
    names = {p.name for p in run.checkpoints.iterdir() if p.is_dir()}
    assert names == {"00000030", "00000035"}


def test_another_configuration_is_named(tmp_path):
    run = runs.open_run(Config(str(tmp_path)))
    runs.save(run, 1, a_state(), HISTORY)
    message = (
        r"differs in rate \(there 0\.1, here 0\.2\), widths \(there \[64, 64\], here \[64\]\): give the same options"
    )
    with pytest.raises(ValueError, match=message):
        runs.open_run(Config(str(tmp_path), resume=True, rate=0.2, widths=(64,)))
    other = runs.open_run(Config(str(tmp_path), resume=True, rate=0.2), may_differ=["rate"])
    with pytest.raises(ValueError, match=r"differs in rate \(there 0\.1, here 'absent'\)"):
        runs.restore(other, a_state())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read .*--out"):
        runs.open_run(Config(str(tmp_path), resume=True))


def test_another_state_is_named(tmp_path):
    run = runs.open_run(Config(str(tmp_path)))
    runs.save(run, 1, {"w": jnp.zeros((2, 3), jnp.float32)}, {})
    for like, message in [
        ({"w": jnp.zeros((2, 4), jnp.float32)}, r"state\['w'\] is float32\[2, 3\] there and float32\[2, 4\] here"),
        ({"w": jnp.zeros((2, 3))}, r"float32\[2, 3\] there and float64\[2, 3\] here"),
        ({"v": jnp.zeros(1)}, r"state\['w'\] is float32\[2, 3\] there and absent here; state\['v'\] is absent there"),
    ]:
        with pytest.raises(ValueError, match=message):
            runs.restore(run, like)
    with pytest.raises(TypeError, match=r"state\['key'\] is a random key: keep keys out of the state"):
        runs.save(run, 2, {"key": jax.random.key(0)}, {})
    with pytest.raises(TypeError, match=r"state\['n'\] is a int: a state holds arrays"):
        runs.save(run, 2, {"n": 3}, {})


def test_the_run_folder(tmp_path, capfd):
    config = Config(str(tmp_path / "a" / "b"), rate=1 / 3)
    run = runs.open_run(config)
    written = json.loads((run.folder / "config.json").read_text())
    assert written["config"] == {"out": config.out, "resume": False, "rate": 1 / 3, "widths": [64, 64]}
    assert written["environment"]["jax"] == jax.__version__
    runs.open_run(config)  # no checkpoint was lost by it
    runs.open_run(dataclasses.replace(config, out=str(tmp_path / "c"), resume=True))
    assert "nothing to resume in" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file, expected a folder"):
        runs.open_run(Config(str(tmp_path / "file")))
    with pytest.raises(TypeError, match="a dataclass with a field out"):
        runs.open_run({"out": "x"})
    with pytest.raises(ValueError, match="keep must be at least 1"):
        runs.open_run(config, keep=0)


# ------------------------------------------------------------------------------------------------------ training


def double(state, key, batch):
    state = state + 1
    loss = jnp.where(state == 10, jnp.nan, 1 / state)
    return state, {"loss": loss, "finite": jnp.isfinite(loss), "evaluations": 3 * state}


def test_train_records_every_step_and_compiles_once(tmp_path):
    update = jax.jit(chex.assert_max_traces(double, n=1))
    run = runs.open_run(Config(str(tmp_path)))
    options = {"run": run, "checkpoint_every": 2, "log_every": 3}
    runs.train(update, jnp.asarray(0.0), None, jax.random.key(0), num_steps=4, **options)
    state, history = runs.train(update, jnp.asarray(0.0), None, jax.random.key(0), num_steps=9, **options)
    assert state == 9
    np.testing.assert_array_equal(history["step"], np.arange(1, 10))
    np.testing.assert_array_equal(history["loss"], 1 / np.arange(1.0, 10))
    np.testing.assert_array_equal(history["evaluations"], 3 * np.arange(1.0, 10))
    assert set(history) == {"step", "loss", "evaluations"}
    with pytest.raises(ValueError, match="the checkpoint is of step 9, beyond num_steps=5"):
        runs.train(update, jnp.asarray(0.0), None, jax.random.key(0), num_steps=5, **options)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = runs.open_run(Config(str(tmp_path)))
    message = r"not finite at step 10 \(evaluations = 30, loss = nan\)\. The last checkpoint is of step 8.*Lower the"
    with pytest.raises(FloatingPointError, match=message):
        runs.train(double, jnp.asarray(0.0), None, jax.random.key(0), num_steps=20, run=run, checkpoint_every=4)
    assert runs.restore(run, jnp.asarray(0.0)).step == 8


def test_the_host_looks_at_the_device_once_in_log_every_steps(monkeypatch):
    looks = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: looks.append(len(tree)) or real(tree))
    step = lambda state, key, batch: (state + batch, {"loss": state})  # noqa: E731
    state, history = runs.train(step, np.float64(0), float, jax.random.key(0), num_steps=230, log_every=100)
    assert looks == [100, 100, 30]
    assert state == sum(range(230))
    assert len(history["loss"]) == 230


def test_train_refuses(tmp_path):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        runs.train(double, jnp.asarray(0.0), None, key, num_steps=0)
    vector = lambda state, key, batch: (state, {"loss": jnp.zeros(2)})  # noqa: E731
    with pytest.raises(ValueError, match=r"the metric 'loss' has shape \(2,\): give scalars"):
        runs.train(vector, jnp.asarray(0.0), None, key, num_steps=2)
    run = runs.open_run(Config(str(tmp_path)))
    with pytest.raises(TypeError, match="is a random key"):
        runs.train(double, {"key": key}, None, key, num_steps=2, run=run)
    runs.train(double, jnp.asarray(0.0), None, key, num_steps=2, run=run)
    other = lambda state, key, batch: (state, {"other": state})  # noqa: E731
    with pytest.raises(ValueError, match="the step reports other, step, but the history holds step, evaluations, loss"):
        runs.train(other, jnp.asarray(0.0), None, key, num_steps=4, run=run)


def test_progress_is_a_few_lines_without_a_terminal(capfd):
    runs.train(double, jnp.asarray(10.0), None, jax.random.key(0), num_steps=100, log_every=1, label="fitting")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("fitting 100/100  loss 0.0090909  ")
    assert "steps/s  0:00:00 left" in lines[-1]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    runs.train(double, jnp.asarray(10.0), None, jax.random.key(0), num_steps=100, log_every=10)
    err = capfd.readouterr().err
    assert "100/100" in err
    assert "loss 0.0090909" in err
    assert "left" in err


# -------------------------------------------------------------------------------------- command line and results


def test_help_explains_every_option(script, capsys):
    with pytest.raises(SystemExit) as info:
        runs.cli(script.main, script.Config, args=["--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    for text in ("Fits a line.", "--num-steps", "How long to train.", "Learning rate of Adam.", "--resume", "Continue"):
        assert text in out
    with pytest.raises(SystemExit) as info:
        runs.cli(script.main, script.Config, args=["--num-steps", "many"])
    assert info.value.code == 2


def test_cli_shows_results_and_errors(script, tmp_path, capfd, monkeypatch):
    results = runs.cli(lambda c: {"nll": 1.23456789, "steps": c.num_steps}, script.Config, args=["--num-steps", "3"])
    assert results["steps"] == 3
    assert "1.23457" in capfd.readouterr().out
    monkeypatch.delenv("DGM_JAX_TRACEBACK", raising=False)

    def refused(config):
        return runs.write_metrics(tmp_path, {"nll": float("nan")})

    with pytest.raises(SystemExit) as info:
        runs.cli(refused, script.Config, args=[])
    assert info.value.code == 1
    assert capfd.readouterr().err.startswith("error: metrics.nll is nan")
    monkeypatch.setenv("DGM_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nan"):
        runs.cli(refused, script.Config, args=[])
    monkeypatch.delenv("DGM_JAX_TRACEBACK")

    def said(config):
        raise ValueError("said by the script")

    with pytest.raises(SystemExit):
        runs.cli(said, script.Config, args=[])
    assert capfd.readouterr().err.startswith("error: said by the script")

    def bug(config):
        return {"sum": np.zeros(2) + np.zeros(3)}

    with pytest.raises(ValueError, match="broadcast"):
        runs.cli(bug, script.Config, args=[])

    def interrupted(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as info:
        runs.cli(interrupted, script.Config, args=[])
    assert info.value.code == 130


def test_metrics_are_exact_or_refused(tmp_path):
    metrics = {"nll": np.float64(0.1) + 0.2, "bits": jnp.asarray(2.5), "n": np.int64(3), "none": None}
    metrics["nested"] = {"list": [np.float32(0.1), (1, "x")], "array": np.arange(2.0)}
    written = runs.write_metrics(tmp_path / "new", metrics)
    read = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert read == written
    assert read["nll"] == 0.1 + 0.2
    assert read["nested"] == {"list": [float(np.float32(0.1)), [1, "x"]], "array": [0.0, 1.0]}
    for bad, name in [({"a": {"b": [1.0, np.nan]}}, r"metrics\.a\.b\[1\]"), ({"a": jnp.inf}, r"metrics\.a is inf")]:
        with pytest.raises(ValueError, match=name):
            runs.write_metrics(tmp_path, bad)
    with pytest.raises(TypeError, match=r"metrics\.f is a function: give numbers"):
        runs.write_metrics(tmp_path, {"f": flip})
    assert not (tmp_path / "metrics.json").exists()
