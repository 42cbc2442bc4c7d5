"""benchmarks/trace_estimators.py: its errors against closed form, its ways against each other, and ``main`` on tiny
sizes.

The script is about float32 but for its errors, and so each test leaves the float64 and the strict rules of the others.
"""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = {"products": (6,), "field_products": (4,), "draws": 64, "pilots": 2, "dimension": 12, "field_widths": ()}
TINY |= {"generations": 2, "cnf_steps": 3}
SMALL = {"widths": (8,), "sizes": (4,), "batches": (2,), "other_batch": 2, "other_sizes": (4,), "repeats": 1}
SMALL |= {"laplacian_sizes": (3, 16), "processes": 1}


@pytest.fixture
def script():
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield importlib.import_module("trace_estimators")
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def own_peers(script, monkeypatch):
    """Without any peer: those are in no extra that the tests ask for."""
    monkeypatch.setattr(script, "peers", dict)


def test_errors_have_the_variance_of_closed_form(script):
    """Rademacher's mean of 4: 2 / 4 (|S|_F^2 - sum_i S_ii^2). 4,000 draws; the mean square of nearly normal errors has
    a relative standard deviation of sqrt(2 / 4000) = 0.022, and 4.5 of them are allowed: a false alarm in 1e5, key
    fixed. Its two-sigma interval covers about as Student's t with 3 degrees of freedom does, 0.861."""
    with jax.enable_x64(True):
        each = script.spectra(12)[2]
        found = script.errors_of("rademacher", script.ours("rademacher", 4, 12), each, 4000)
    a = np.asarray(each.data[0])
    assert each.truth[0] == pytest.approx(np.trace(a))
    variance = 2 / 4 * (np.sum(a**2) - np.sum(np.diag(a) ** 2))
    assert found.squares.shape == (1, 4000)
    assert np.mean(found.squares) == pytest.approx(variance, rel=0.1)
    assert 0.75 < np.mean(found.covered) < 0.95


def test_graph_counts_triangles(script, tmp_path):
    """Two triangles that share an edge, a loop and an edge named twice, which are no more."""
    (tmp_path / "edges.txt").write_text("# a comment\n4 7\n7 8\n8 9 1.5\n9 7\n9 8\n8 10\n10 9\n7 7\n")
    with jax.enable_x64(True):
        each = script.graph_map("edges", script.read_edges(str(tmp_path / "edges.txt")))
        columns = jax.vmap(lambda e: each.apply(jax.tree.map(lambda leaf: leaf[0], each.data), e))(jnp.eye(each.m))
    assert each.m == 4
    assert each.truth[0] == 12 == np.trace(columns)
    (tmp_path / "first.txt").write_text("1 3\n1 2\n2 3\n3 4\n")  # its first edge looks like a head: 1 node, 3 edges
    assert script.graph_map("first", script.read_edges(str(tmp_path / "first.txt"))).truth[0] == 6
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no edges"):
        script.read_edges(str(tmp_path / "none.txt"))


def test_apollonian_network_has_its_numbers(script):
    """n = 3 + (3^g - 1) / 2 nodes, 3 n - 6 edges, 3 n - 8 triangles; one generation is the complete graph of four."""
    for generations, nodes in ((1, 4), (2, 7), (4, 43)):
        edges = script.apollonian(generations)
        each = script.graph_map("network", edges)
        a = np.zeros((nodes, nodes))
        a[edges[:, 0], edges[:, 1]] = 1
        assert (each.m, len(edges)) == (nodes, 3 * nodes - 6)
        assert each.truth[0] == 6 * (3 * nodes - 8) == np.trace(np.linalg.matrix_power(a + a.T, 3))


def test_those_that_know_a_map_near(script):
    """The variances of closed form, 8 products in 12 dimensions: of rotated probes that of the matrix in the basis, of
    the control variate that of the difference, deflated that of the rest. 4,000 draws: 4.5 standard errors, from the
    draws themselves, a false alarm in 1e5 each, key fixed."""
    with jax.enable_x64(True):
        each = script.spectra(12)[1]
        a, b, q = np.asarray(each.data[0]), np.asarray(each.near.matrix), np.asarray(each.near.basis)
        rest = np.eye(12) - q[:, :2] @ q[:, :2].T

        def noise(s, n):
            return 2 / n * (np.sum(s**2) - np.sum(np.diag(s) ** 2))

        for name, variance in (
            ("rotated", noise(q.T @ a @ q, 8)),
            ("rotated hadamard", noise(q.T @ a @ q, 8) * 8 / 15),
            ("control_variate", noise(a - b, 8)),
            ("deflated", noise(rest @ a @ rest, 6)),
        ):
            squares = script.errors_of(name, script.ours(name, 8, 12), each, 4000).squares
            assert abs(np.mean(squares) - variance) < 4.5 * np.std(squares) / np.sqrt(4000), name
            assert 4.5 * np.std(squares) / np.sqrt(4000) < 0.2 * variance


def test_cost_ways_give_the_same_numbers(script):
    """One probe: every way the same number, from the same probes. All exact ones: the trace of the Jacobian."""
    found = script.peers()
    ways = script.cost_ways(8, 5, 3, found)
    outcomes = {name: jax.jit(one)(*arguments) for name, (one, *arguments) in ways.items()}
    assert {"f", "1 probe", "1 probe, jax.jvp", "16 probes", "exact", "exact, vjp", "structured"} <= set(outcomes)
    assert all(f"1 probe, {name}" in outcomes for name in found if name != "folx")
    for name, (value, _) in outcomes.items():
        np.testing.assert_allclose(value, outcomes["f"][0], atol=1e-5, err_msg=name)
    for kind in ("1 probe", "16 probes", "exact"):
        for name, (_, number) in outcomes.items():
            if name.startswith(kind) and name.endswith("shared"):  # those of the first example
                np.testing.assert_allclose(number[0], outcomes[kind][1][0], atol=2e-5, err_msg=name)
            elif name.startswith(kind):
                np.testing.assert_allclose(number, outcomes[kind][1], atol=2e-5, err_msg=name)
    np.testing.assert_allclose(outcomes["structured"][1], outcomes["exact"][1], atol=1e-5)


def test_what_takes_too_long_is_left_out(script, monkeypatch):
    monkeypatch.setattr(script, "MOST_MULTIPLICATIONS", 3 * 5 * 8**2)
    monkeypatch.setattr(script, "MOST_NUMBERS", 3 * 5**2 - 1)
    assert {name for name in script.cost_ways(8, 5, 3, {}) if name.startswith("exact")} == {"exact"}
    assert not [name for name in script.cost_ways(9, 5, 3, {}) if name.startswith("exact")]


def test_ways_of_other_networks_give_the_trace_of_the_jacobian(script):
    """Over all sign vectors of a space of 4 dimensions the forms are exact, there being 16 of them."""
    nets = {
        "three": script.networks.MLP((4, 4, 4), last_init=jax.nn.initializers.normal(1.0)),
        "ot": script.networks.OTFlow(width=4),
        "hollow": script.networks.HollowNet((6,), last_init=jax.nn.initializers.normal(1.0)),
    }
    for kind, net in nets.items():
        ways = script.network_ways(net, 5, 3)
        assert list(ways) == ["f", *(["16 probes", "16 probes, hidden"] if kind == "three" else []), "structured"]
        (f, params, x, none), (own, prepared, *_) = ways["f"], ways["structured"]
        traces = jax.vmap(lambda x, n=net, p=params: jnp.trace(jax.jacfwd(lambda y: n.apply(p, 0.5, y))(x)))(x)
        value, number = jax.jit(own)(prepared, x, none)
        np.testing.assert_allclose(value, f(params, x, none)[0], atol=1e-5)
        np.testing.assert_allclose(number, traces, atol=1e-5)
        assert np.std(traces) > 1e-3
        if kind == "three":
            signs = 2.0 * (np.arange(16)[:, None] >> np.arange(4) & 1) - 1
            hidden, _, _, e = ways["16 probes, hidden"]
            assert e.shape == (3, 16, 4)
            number = jax.jit(hidden)(prepared, x, jnp.broadcast_to(jnp.asarray(signs, jnp.float32), (3, 16, 4)))[1]
            np.testing.assert_allclose(number, traces, atol=1e-5)


def test_gradient_and_laplacian_ways_give_the_same_numbers(script):
    config = script.Config(**SMALL)
    params = script.make_field(8, 4)[1]
    x, e = jax.random.normal(jax.random.key(0), (2, 4)), jnp.ones((2, 16, 4))
    ways = script.gradient_ways(config, 8, 4)
    (value, gradient), (other, own) = (jax.jit(ways[name])(params, x, e) for name in ("exact", "structured"))
    assert float(value) == pytest.approx(float(other), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, own)
    one, many = (jax.jit(ways[name])(params, x, e)[0] for name in ("1 probe", "16 probes"))
    assert float(one) == pytest.approx(float(many), abs=1e-5)  # the probes are all ones
    laplacians = {
        name: jax.jit(way)(*arguments)
        for name, (way, *arguments) in script.laplacian_ways(config, 3, script.peers()).items()
    }
    for name, (u, number) in laplacians.items():
        np.testing.assert_allclose(u, laplacians["u"][0], atol=1e-5, err_msg=name)
        if name != "u":
            np.testing.assert_allclose(number, laplacians["laplacian"][1], atol=2e-5, err_msg=name)


def test_a_loop_of_evaluations_depends_on_every_one(script):
    """x_(n+1) = x_0 + 0.001 f(x_n) with f(x) = 2 x, and the sum of x_n along the way."""
    way = script.in_a_row(lambda a, x, _: (a * x, jnp.sum(x, 1)), jnp.asarray(2.0), jnp.ones((1, 1)), jnp.zeros((1, 0)))
    x, total = way.call(3)
    steps = [1.0, 1.002, 1 + 0.002 * 1.002]
    assert float(total[0]) == pytest.approx(sum(steps))
    assert float(x[0, 0]) == pytest.approx(1 + 0.002 * steps[-1])
    times = script.timed(script.Config(target_seconds=1e-4, seconds=0.01, repeats=1), {"way": way})
    assert times["way"].median > 0


@pytest.mark.slow
def test_main_of_errors(script, tmp_path, capsys, monkeypatch):
    own_peers(script, monkeypatch)
    (tmp_path / "edges.txt").write_text("".join(f"{i} {j}\n" for i in range(8) for j in range(i)))
    config = script.Config(
        out=str(tmp_path), parts=("errors",), graph=str(tmp_path / "edges.txt"), graph_draws=4, **TINY
    )
    found = script.main(config)
    left = json.loads((tmp_path / "trace_estimators.json").read_text())
    assert (tmp_path / "trace_estimators_errors.png").stat().st_size > 10_000
    by = {(row["map"], row["way"]): row for row in left["rows"]}
    assert len(by) == len(left["rows"]) == 5 * 14 + 2 * 9  # no groups; on graphs no map near, and no xnystrace
    assert left["config"]["graph"] == "edges.txt"
    assert {"edges, A^3", "Apollonian network, A^3"} < {name for name, _ in by}
    assert all(np.isfinite(row["error"]) for row in left["rows"])
    # 0.7^i over 12: what a sketch leaves is little
    assert by["0.7^i", "xnystrace"]["error"] < by["0.7^i", "rademacher"]["error"]
    assert any(name.startswith("choose over the best") for name in found)
    assert "trace.choose: its error" in capsys.readouterr().out


@pytest.mark.slow
def test_errors_on_fields(script, monkeypatch):
    """Groups of other digits; hardly any training, but the trained network is another one."""
    config = script.Config(**(TINY | {"field_widths": (8,), "examples": 4}), train_steps=20)
    maps = script.fields(config)
    assert [each.name for each in maps] == [f"digits h=8, {state}" for state in ("at the start", "trained", "CNF")]
    for each in maps:
        assert each.data.shape == (4, 64, 64)
        assert each.data.dtype == np.float64
        np.testing.assert_allclose(each.truth, np.trace(np.asarray(each.data), 0, 1, 2))
        assert sorted(set(each.groups[4].tolist())) == [0, 1, 2, 3]
    assert not np.allclose(maps[0].data, maps[1].data)
    assert not np.allclose(maps[1].data, maps[2].data)
    with jax.enable_x64(True):
        grouped = script.errors_of("groups", script.ours("groups", 4, 64, maps[1]), maps[1], 64)
        plain = script.errors_of("rademacher", script.ours("rademacher", 4, 64), maps[1], 64)
        choice = script.choices(config, maps[1], 4)[0]
        turned = script.errors_of("rotated", script.ours("rotated", 4, 64), maps[1], 64)
    assert turned.squares.shape == (4, 16)
    assert choice.name in ("grouped", "rotated")  # it was told of both
    assert grouped.covered is None  # one draw of all groups
    assert plain.squares.shape == grouped.squares.shape == (4, 16)


@pytest.mark.slow
def test_main_of_costs(script, tmp_path, capsys, monkeypatch):
    own_peers(script, monkeypatch)
    parts = ("costs", "networks", "gradients", "laplacians")
    config = script.Config(out=str(tmp_path), parts=parts, target_seconds=1e-4, seconds=0.01, **SMALL)
    found = script.main(config)
    left = json.loads((tmp_path / "trace_estimators.json").read_text())
    assert (tmp_path / "trace_estimators_costs.png").stat().st_size > 10_000
    assert {row["part"] for row in left["rows"]} == set(parts)
    assert all(row["seconds"] > 0 and row["cost"] > 0 and row["bytes"] >= 0 for row in left["rows"])
    assert found["1 probe over f, median over the cells"] > 0
    assert [row["met"] for row in left["result"]["targets"]]
    out = capsys.readouterr().out
    assert "Time over one evaluation of f" in out
    assert "Laplacian of a scalar network" in out


def test_medians_over_processes(script):
    rows = [
        {"part": "costs", "cell": "h 64, m 64, B 64", "width": 64, "m": 64, "batch": 64, "way": way, "bytes": 8}
        | {"seconds": 1.0, "compile": 2.0, "rounds": 3, "cost": cost, "quartiles": (cost, cost)}
        for way, cost in (("f", 1.0), ("1 probe", 2.0), ("1 probe, traceax", 1.5))
    ]
    slow = [row | {"cost": 2 * row["cost"], "seconds": 5.0} for row in rows]
    merged = script.median_rows([rows, slow, rows])
    assert [row["cost"] for row in merged] == [1.0, 2.0, 1.5]
    assert merged[1]["costs"] == [2.0, 4.0, 2.0]
    assert merged[1]["seconds"] == 1.0
    targets = {target.name: target for target in script.cost_targets(slow)}
    assert targets["1 probe over f, worst"].value == 4.0
    assert targets["1 probe over f, worst"].place == "h 64, m 64, B 64"
    assert targets["1 probe over the faster of traceax and matfree, worst"].value == pytest.approx(4 / 3)


@pytest.mark.slow
def test_times_of_two_processes(script, tmp_path, capsys):
    """Both processes begin anew and are in the file; the target has what each of them found."""
    config = script.Config(out=str(tmp_path), parts=("laplacians",), target_seconds=1e-4, seconds=0.01)
    script.main(replace(config, **(SMALL | {"laplacian_sizes": (784,), "processes": 2})))
    left = json.loads((tmp_path / "trace_estimators.json").read_text())
    assert all(len(row["costs"]) == len(row["quartiles"]) == 2 for row in left["rows"])
    (target,) = [each for each in left["result"]["targets"] if each["place"] == "m 784"]
    assert len(target["processes"]) == 2
    assert target["value"] == pytest.approx(np.median(target["processes"]))
    assert len(set(target["processes"])) == 2
    with pytest.raises(ValueError, match="processes must be at least 1"):
        script.main(script.Config(processes=0))


def test_unknown_part(script):
    with pytest.raises(ValueError, match="parts must be some of"):
        script.main(script.Config(parts=("speed",)))
