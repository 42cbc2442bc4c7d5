"""experiments/trilemma.py: its measures against closed form, its table, what it does again and what not; all its rows.

Most of it runs on models that are no models, ``stand_in``: x = z. All real ones are trained once, for a moment each.
"""

import importlib
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import datasets

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
script = importlib.import_module("trilemma")
models = script.models
sys.path.pop(0)

TINY = script.Sizes(samples=1000, digits=600, held_out=8, compared=100, paths=4, projections=4)
CELL = re.compile(r"none|(<= )?-?\d+(\.\d+)?(e-\d+)? \+- \d+(\.\d+)?(e-\d+)?")


def stand_in(task, *, bound=False, beta=1.0):
    """x = z, whatever the beta: for data of variance 1 the density of N(0, I), no more."""
    from dgm_jax import flows

    return models.Model(
        init=lambda key: {"steps": jnp.zeros(())},
        step=lambda state, key, rate: ({"steps": state["steps"] + 1}, rate),
        chunk=5,
        params=lambda state: state,
        latent=task.dims,
        samplers={"": models.Sampler(models.fixed(3, lambda params, key, z: z), lambda params, z: z)},
        log_prob=lambda params, key, x: (flows.standard_normal(x), jnp.zeros(())),
        bound=bound,
        encode=lambda params, x: x,
    )


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(script, "QUICK", TINY)
    monkeypatch.setitem(script.SHOWN, "gaussians", 20)


@pytest.fixture
def stand_ins(monkeypatch, tiny):
    for name in models.BUILDERS:
        monkeypatch.setitem(models.BUILDERS, name, partial(stand_in, bound=name == "vae"))


# ---------------------------------------------------------------------------------------------------------- measures


def test_the_data_have_variance_one_and_the_right_unit():
    """Means of 20,000 at |z| < 4.5: a false alarm in 7e-6 for each of 6 numbers."""
    task = models.gaussians()
    x = task.test(jax.random.key(0), 20_000)
    squares = np.asarray(x) ** 2
    assert np.abs((squares.mean(0) - 1) / (squares.std(0) / math.sqrt(len(x)))).max() < 4.5
    value, stderr = task.nll(jax.jit(jax.vmap(task.best_nll))(x))
    assert abs(value - datasets.entropy("gaussian_grid")) < 4.5 * stderr
    np.testing.assert_allclose(np.asarray(task.original(x)) / np.asarray(x), math.sqrt(8.0025))


def test_the_digits_have_variance_one_and_the_right_unit():
    task, images = models.digits(), datasets.digits()
    x = np.asarray(task.batch(jax.random.key(0), 3000))
    assert abs(x.mean()) < 0.03
    assert abs(x.std() - 1) < 0.03  # rows drawn with replacement
    held_out = task.test(jax.random.key(1), 297)
    np.testing.assert_array_equal(task.original(held_out), images.test.reshape(297, 64))
    # a density that is even over all that 17 levels may be costs log2 17 bits
    edges = (np.asarray(held_out).min(), np.asarray(held_out).max())
    width = 17 / 16.9 * (edges[1] - edges[0])  # the extremes of 19,008 pixels nearly reach the ends of the range
    value, stderr = task.nll(jnp.full(10, -64 * math.log(width)))
    assert abs(value - math.log2(17)) < 0.02
    assert stderr < 1e-12


def test_round_trip_of_a_shift_and_of_a_scale():
    task = models.gaussians()
    shift = script.round_trip(task, lambda params, x: x + 0.3, None, jax.random.key(0), TINY)
    assert shift["value"] == pytest.approx(0.3)
    assert shift["stderr"] < 1e-12
    x = task.test(jax.random.key(0), TINY.held_out)
    half = script.round_trip(task, lambda params, x: x / 2, None, jax.random.key(0), TINY)
    assert half["value"] == pytest.approx(float(jnp.sqrt(jnp.mean(x**2))) / 2)
    assert script.round_trip(task, None, None, jax.random.key(0), TINY) is None


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (
            lambda keys, z: z,
            math.tan(math.pi / 2 / 49 / 2) ** 2,
        ),  # an arc: chords of length 2 sin h and bends 2 - 2 cos h
        (lambda keys, z: jnp.sign(z), 1.0),  # each jump: two bends, two moves
        (lambda keys, z: jnp.sin(1e7 * z), 3.0),  # 6 variances over 2
        (lambda keys, z: z + jax.vmap(jax.random.normal)(keys)[:, None], math.tan(math.pi / 2 / 49 / 2) ** 2),  # held
    ],
    ids=["arc", "jumps", "noise", "held noise"],
)
def test_roughness(draw, expected):
    found = script.roughness(lambda keys, z: (draw(keys, z), None), jax.random.key(0), 3, 60)
    assert found["value"] == pytest.approx(expected, abs=4.5 * found["stderr"] + 1e-12)
    assert found["stderr"] < 0.1 * expected


def test_interval_covers():
    """Means of three normal values: 95 per cent of 4,000 intervals cover, z-score 4.5; and the formula."""
    values = np.random.default_rng(0).normal(size=(4000, 3))
    hits = [
        abs((f := script.interval([{"value": v, "stderr": 0.0} for v in row]))["value"]) < f["half"] for row in values
    ]
    assert abs(np.mean(hits) - 0.95) < 4.5 * math.sqrt(0.95 * 0.05 / 4000)
    both = script.interval([{"value": v, "stderr": 0.1} for v in (1.0, 2.0, 3.0)])
    assert both["half"] == pytest.approx(math.hypot(4.302653 / math.sqrt(3), 0.196), rel=1e-6)
    assert script.interval([{"value": 2.0, "stderr": 0.1, "bound": True}])["half"] == pytest.approx(0.196)


def test_text_has_the_digits_that_its_interval_supports():
    one = lambda value, half, **more: script.text({"value": value, "half": half, **more})  # noqa: E731
    assert one(0.98765, 0.0123) == "0.988 +- 0.012"
    assert one(123.4, 5.6) == "123.4 +- 5.6"
    assert one(1234.0, 56.0) == "1234 +- 56"
    assert one(25.0, 0.0) == "25 +- 0"
    assert one(1.5, 0.25, bound=True) == "<= 1.50 +- 0.25"
    assert one(2.34e-7, 1.1e-8) == "2.3e-07 +- 1e-08"
    assert script.text(None) == "none"
    for found in (one(1e-9, 3e-9), one(-0.5, 0.0), one(2.0, 1e-12)):
        assert CELL.fullmatch(found), found


def test_the_clock_decides_the_steps_and_the_rate(monkeypatch):
    """A clock that moves a tenth of a second with every look: the rate rises, then falls along a cosine to zero."""
    now = iter(np.arange(0.0, 1000.0, 0.1))
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(now))
    seen = []

    def chunk(state, key, n, rate):
        seen.append((int(n), float(rate)))
        return state, jnp.zeros(())

    _, steps, elapsed = script.train(stand_in(models.gaussians()), chunk, jax.random.key(0), 10.0)
    assert elapsed == pytest.approx(10.0, abs=0.2)
    assert [n for n, _ in seen] == [5 * i for i in range(len(seen))]
    assert steps == 5 * len(seen) == 500
    rates = [rate for _, rate in seen]
    assert rates[0] == pytest.approx(0.02)
    assert rates[50] == pytest.approx(0.5, abs=0.02)
    assert rates[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)), abs=0.02)
    assert rates[-1] < 1e-3


def test_a_loss_that_is_not_finite_ends_the_run():
    chunk = lambda state, key, n, rate: (state, jnp.asarray(jnp.nan))  # noqa: E731
    with pytest.raises(FloatingPointError, match="the loss is nan after"):
        script.train(stand_in(models.gaussians()), chunk, jax.random.key(0), 0.01)
    with pytest.raises(FloatingPointError, match="a measurement is nan"):
        script.cell(math.nan, 0.0)


def test_training_moves_by_the_rate_that_it_is_given():
    """Adam's first step is the rate, whatever the gradient; at a rate of zero nothing moves."""
    task = models.gaussians()
    learn = models.regression(
        task, lambda key: jnp.zeros(3), lambda p, key, x: jnp.sum(p * jnp.arange(1.0, 4.0)), 0.1, 4
    )
    state = learn["init"](jax.random.key(0))
    for share in (1.0, 0.3, 0.0):
        moved, _ = jax.jit(learn["step"])(state, jax.random.key(1), jnp.asarray(share))
        np.testing.assert_allclose(moved.params, -0.1 * share * np.ones(3), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- whole runs


def run(folder, **options):
    return script.main(script.Config(out=str(folder), quick=True, **{"seconds": 0.01, "seeds": 2, **options}))


def files(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("rows/*/metrics.json")}


@pytest.mark.slow
def test_a_run_that_was_killed_does_again_the_row_that_it_was_in_alone(stand_ins, tmp_path, monkeypatch):
    options = {"rows": ("gan", "vae", "cnf"), "data": ("gaussians",)}
    told = ("quality", "modes", "reverse_kl", "sliced_wasserstein", "told_apart")
    monkeypatch.setitem(
        script.JUDGES, "gaussians", lambda sizes: lambda key, x: {name: script.cell(jnp.mean(x), 0.1) for name in told}
    )
    train, calls = script.train, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(script, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **options)
    before = files(tmp_path)
    assert set(before) == {"gaussians-gan-0", "gaussians-gan-1", "gaussians-vae-0"}
    assert not (tmp_path / "table.md").exists()

    with pytest.raises(FileExistsError, match="add --resume"):
        run(tmp_path, **options)
    with pytest.raises(ValueError, match="differs in seconds"):
        run(tmp_path, resume=True, **options, seconds=0.02)
    calls.clear()
    monkeypatch.setattr(script, "train", lambda *args: (calls.append(args), train(*args))[1])
    results = run(tmp_path, resume=True, **options)
    assert len(calls) == 6 - 3
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    calls.clear()
    assert run(tmp_path, resume=True, **options)["gaussians: VAE"] == results["gaussians: VAE"]  # to the last digit
    assert not calls
    more = run(tmp_path, resume=True, rows=("gan",), data=("gaussians",), seeds=3)
    assert len(calls) == 1
    assert set(more) == {"gaussians: the data themselves", "gaussians: GAN, R1", "seconds"}

    table = json.loads((tmp_path / "metrics.json").read_text())["table"]["gaussians"]["GAN, R1"]
    assert table["evaluations"]["value"] == 3
    assert len(table["nll"]["values"]) == 3
    assert table["round_trip"]["value"] == 0
    # N(0, I) against a grid of narrow modes: log 2 pi + 1 + 2 log sqrt 8.0025 of held out points of variance 1
    assert abs(table["nll"]["value"] - (math.log(2 * math.pi) + 1 + math.log(8.0025))) < 2 * table["nll"]["half"]


@pytest.mark.slow
def test_every_cell_of_the_table_has_an_interval_or_a_reason(stand_ins, tmp_path):
    run(tmp_path, rows=("vae", "diffusion"))
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line and "model" not in line]
    assert len(rows) == 2 * 3  # the data themselves and two models, twice
    for line in rows:
        title, *cells = [part.strip() for part in line.strip("|").split("|")]
        assert len(cells) in (len(script.COLUMNS["gaussians"]), len(script.COLUMNS["digits"])), title
        assert all(CELL.fullmatch(one) for one in cells), line
    assert sum("<= " in line for line in rows) == 2  # the bound
    for name in ("table.png", "samples.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(("data", "rows"), [("gaussians", script.ROWS), ("digits", ("gan", "vae", "realnvp"))])
def test_all_rows_are_trained_and_measured(tiny, tmp_path, data, rows):
    """Each for a moment: every cell is finite, an encoder and a likelihood are where they should be."""
    run(tmp_path, data=(data,), rows=rows, seeds=1)
    table = json.loads((tmp_path / "metrics.json").read_text())["table"][data]
    assert len(table) == 1 + len(rows) + ("diffusion" in rows)  # the data; diffusion is drawn from in two ways
    none = {title: {column for column, found in cells.items() if found is None} for title, cells in table.items()}
    adversarial = {"GAN, R1", "WGAN-GP", "denoising diffusion GAN"}
    for title in set(table) - {"the data themselves"}:
        without = {"nll", "round_trip"} if title in adversarial else {"round_trip"} if "ancestral" in title else set()
        assert none[title] == without, title
    assert {title for title, cells in table.items() if (cells["nll"] or {}).get("bound")} == {"VAE"}
    evaluations = {title: cells["evaluations"]["value"] for title, cells in table.items() if cells["evaluations"]}
    assert evaluations.get("denoising diffusion GAN", 4) == 4
    assert evaluations.get("diffusion, DPM-Solver++ 2M", models.STEPS) == models.STEPS
    assert table["RealNVP"]["round_trip"]["value"] < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.0}, "seconds must be positive and finite, got 0.0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"rows": ("gan", "glow")}, "rows must be some of gan, wgan_gp, vae"),
        ({"rows": ("gan", "gan")}, "each once"),
        ({"beta": 0.0}, "beta must be positive and finite, got 0.0"),
        ({"data": ()}, "data must be some of gaussians, digits"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
