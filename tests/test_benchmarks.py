"""The scripts in benchmarks/: they compare like with like, and every ``main`` runs and leaves its files.

They are about float32, the default, and about plain Optax, whose Adam mixes dtypes, and so each test leaves the float64
and the strict rules of the others.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load():
    """name -> the script as a module, under JAX's default dtypes."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def record(folder: Path, name: str) -> dict:
    """What a benchmark left behind."""
    assert (folder / f"{name}.png").stat().st_size > 1000
    return json.loads((folder / f"{name}.json").read_text())


def test_measure_takes_turns_and_a_ratio_is_of_medians(load):
    timing = load("_timing")
    order = []
    times = timing.measure(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, lambda: order.append("-")
    )
    assert "".join(order) == "-a-b" + "-a-a-b-b" + "-b-b-a-a" + "-a-a-b-b"
    assert times["a"].rounds.shape == (3,)
    over, under = (timing.Seconds(9.0, np.array(rounds)) for rounds in ([4.0, 6.0, 80.0], [1.0, 2.0, 10.0]))
    assert timing.ratio(over, under, scale=2.0) == pytest.approx((1.5, 1.75, 3.0))


def test_the_page_is_that_of_the_results_and_names_every_benchmark(load):
    script = load("page")
    assert (FOLDER / "README.md").read_text() == script.page(), "python benchmarks/page.py writes the page anew"
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"page", "_timing"}
    assert scripts == {one.name for one in script.SECTIONS}


def test_the_page_shows_tables_and_pictures(load, tmp_path):
    timing, script = load("_timing"), load("page")
    config = load("samplers").Config(out=str(tmp_path))
    timing.show("Wanted: times", ("case", "ratio"), [["a", 1.23456], ["b", "-"]])
    timing.show("Other", ("case", "ratio"), [["c", 3.0]])
    timing.write("samplers", config, [], {})
    (tmp_path / "samplers_more.png").write_bytes(b"")
    text = script.section(script.Section("samplers", "at most 2", ("Wanted",)), tmp_path)
    assert "| case | ratio |\n| --- | ---: |\n| a | 1.235 |\n| b | - |" in text
    assert "Other" not in text
    assert f"![samplers_more]({tmp_path.name}/samplers_more.png)" in text
    assert json.loads((tmp_path / "samplers.json").read_text())["config"]["out"] == tmp_path.name
    assert "No run of it" in script.section(script.Section("sampling", "at most 2"), tmp_path)


def test_the_page_sets_tables_side_by_side_and_leaves_lines_out(load):
    """Of three tables two have the same columns; each line keeps its numbers, and what is missing is a dash."""
    script = load("page")

    def table(title, header, *rows):
        return {"title": title, "header": header, "rows": [list(row) for row in rows]}

    tables = [
        table("Error: a", ["way", "1", "2"], ["x", "0.1", "0.2"], ["y", "0.3", "0.4"]),
        table("Error of it", ["way", "1", "2"], ["x", "7", "8"]),
        table("Error: b", ["way", "1", "2"], ["x", "0.5", "0.6"], ["z", "0.7", "0.8"]),
        table("Error: c", ["way", "4"], ["x", "0.9"]),
    ]
    first, other, last = script.side_by_side(tables, "Error")
    assert first["title"] == "Error (1 / 2)"
    assert first["header"] == ["way", "a", "b"]
    assert first["rows"] == [["x", "0.1 / 0.2", "0.5 / 0.6"], ["y", "0.3 / 0.4", "-"], ["z", "-", "0.7 / 0.8"]]
    assert other == tables[1]
    assert (last["header"], last["rows"]) == (["way", "c"], [["x", "0.9"]])
    memory = table("Memory, MB", ["m, B", "f"], ["2, 64", "1"], ["2, 512", "3"])
    short = script.shorten(memory, (("Memory", ", 64", "B = 64"),))
    assert short["rows"] == [["2, 64", "1"]]
    assert short["title"] == "Memory, MB (B = 64; the JSON has all)"
    assert script.shorten(memory, (("Time", ", 64", "B = 64"),)) == memory


def test_both_ways_to_step_are_the_same_process(load):
    """x_n of x' = -x with noise 0.7 in n = 10 steps from 1 has mean (1 - dt)^n and variance
    0.49 dt sum_k (1 - dt)^(2k); 8,192 entries, 4.5 sigma each: false alarms 3e-5 in all, keys fixed."""
    script = load("euler_maruyama")
    n, dt = 10, 0.1
    mean = (1 - dt) ** n
    variance = 0.49 * dt * sum((1 - dt) ** (2 * k) for k in range(n))
    config = script.Config(num_steps=n, sdeint=False)
    for draw in script.case(config, "linear", "one state", 2, 4096).values():
        x = np.asarray(draw(), float).ravel()
        assert abs(x.mean() - mean) < 4.5 * np.sqrt(variance / x.size)
        assert abs(x.var() - variance) < 4.5 * variance * np.sqrt(2 / x.size)


@pytest.mark.slow
def test_euler_maruyama(load, tmp_path, capsys):
    script = load("euler_maruyama")
    result = script.main(script.Config(out=str(tmp_path), sizes=((2, 4),), num_steps=5, width=4, repeats=2))
    left = record(tmp_path, "euler_maruyama")
    assert len(left["rows"]) == 4
    assert left["result"] == result
    assert result["worst_ratio"] == max(row["ratio"] for row in left["rows"]) > 0
    assert "linear, one state, d=2, batch=4" in capsys.readouterr().out


@pytest.mark.slow
def test_samplers(load, tmp_path):
    """Every sampler's last digits stay finite, and the row of each has its steps: the last denoising is one of them."""
    script = load("samplers")
    tiny = {"networks": ("mlp",), "mlp_features": (8,), "batch": 3, "num_steps": 8, "evaluations": 2, "repeats": 2}
    config = script.Config(out=str(tmp_path), **tiny)
    functions, steps = script.case(config, "mlp")
    assert steps == {"ancestral": 8, "annealed": 9, "classifier-free": 8, "classifier": 8}
    for draw in functions.values():
        assert draw().shape == (3, 64)
        assert jnp.all(jnp.isfinite(draw()))
    result = script.main(config)
    left = record(tmp_path, "samplers")
    assert [row["case"] for row in left["rows"]] == [f"mlp, {way}" for way in steps]
    assert result["worst_ratio"] == max(row["ratio"] for row in left["rows"]) > 0
    with pytest.raises(ValueError, match="networks holds 'cnn'"):
        script.case(config, "cnn")


@pytest.mark.slow
def test_sampling(load, tmp_path):
    script = load("sampling")
    config = script.Config(
        out=str(tmp_path), networks=("mlp",), batch=3, mlp_features=(8,), tolerance=1e-2, evaluations=2, repeats=2
    )
    result = script.main(config)
    rows = {row["case"]: row for row in record(tmp_path, "sampling")["rows"]}
    assert result["worst_ratio"] == max(row["ratio"] for row in rows.values()) > 0
    # Tsit5 takes six evaluations a step and one at the start
    assert all(row["evaluations"] > 6 and row["evaluations"] % 6 == 1 for row in rows.values())
    with pytest.raises(ValueError, match="neither"):
        script.main(script.Config(networks=("resnet",)))


@pytest.mark.slow
def test_sampling_images(load, tmp_path):
    script = load("sampling")
    config = script.Config(
        out=str(tmp_path), networks=("unet",), batch=2, unet_features=(8, 16), tolerance=1e-1, evaluations=2, repeats=1
    )
    assert script.main(config)["worst_ratio"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ffjord_step(load, tmp_path):
    """With PyTorch at hand, ``main`` itself compares loss and gradient of the two sides, and raises if they differ."""
    peers = all(importlib.util.find_spec(name) for name in ("torch", "torchdiffeq"))
    script = load("ffjord_step")
    config = script.Config(
        out=str(tmp_path), batches=(8,), ways=("backsolve",), width=8, train_steps=2, repeats=2, torch=peers,
        torch_threads=(1,),
    )  # fmt: skip
    result = script.main(config)
    rows = json.loads((tmp_path / "ffjord_step.json").read_text())["rows"]
    assert [row["weights"] for row in rows if row["way"] == "backsolve"] == ["first weights", "trained"]
    assert all(row["ms"] > 0 for row in rows)
    assert set(result) == ({"speed_up_8_first", "speed_up_8_trained"} if peers else set())


@pytest.mark.slow
def test_every_way_to_take_the_gradient_is_the_same_step(load):
    script = load("ffjord_step")
    config = script.Config(width=4)
    net = script.networks.MLP((4, 4, 4), last_init=jax.nn.initializers.normal(0.5))
    params = net.init(jax.random.key(0), jnp.zeros(()), jnp.zeros(2))
    x, e = jax.random.normal(jax.random.key(1), (3, 2)), jnp.ones((3, 1, 2))
    optimizer = script.optax.adam(1e-3)
    gradients = [
        np.concatenate([array.ravel() for array in script.to_list(step(params, optimizer.init(params), x, e)[3])])
        for step in script.make_steps(config, net, optimizer).values()
    ]
    assert np.linalg.norm(gradients[0]) > 0.1
    for other in gradients[1:]:
        np.testing.assert_allclose(other, gradients[0], atol=1e-3)
