"""benchmarks/likelihood.py: its ways agree, and it leaves its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_benchmarks import load  # noqa: F401, the fixture


@pytest.mark.slow
def test_ways_estimate_the_same_likelihood(load, tmp_path):  # noqa: F811
    """Narrow fields, trained little: exact ways agree, and the error falls from 4 rows a node to 16 to all."""
    script = load("likelihood")
    small = {"widths": (16,), "num_steps": 300, "batch": 8, "draws": 4, "repeats": 1, "gradient": False}
    fields = ("flow-matching", "probability-flow")
    result = script.main(script.Config(out=str(tmp_path), fields=fields, ways=(3, 4, 6, 10, 12), **small))
    labels = [f"{kind}, h = 16" for kind in fields]
    assert list(result["rms"]) == labels
    for kind, by_rule in zip(labels, (0.1, 3.0), strict=True):  # 8 nodes are few for a path that is steep at the data
        rms = result["rms"][kind]
        assert rms["8 nodes, its own divergence"] < by_rule, kind
        assert rms["8 nodes, 4 rows each"] > rms["8 nodes, 16 rows each"] > rms["8 nodes, its own divergence"], kind
        assert rms["8 nodes, 4 rows each"] > rms["8 nodes, 16 rows each, adapted"], kind
        assert rms["likelihood, 16 rows a node, adapted"] < rms["8 nodes, 4 rows each"], kind
        assert result["covered"][kind]["likelihood, 16 rows a node, adapted"] > 0.8, kind
    assert len(json.loads((tmp_path / "likelihood.json").read_text())["rows"]) == 10
    assert (tmp_path / "likelihood.png").stat().st_size > 1000


def test_the_reference_is_the_likelihood_of_the_same_parameters(load):  # noqa: F811
    """Parameters of zeros but for the last bias, b: the field is b everywhere and log p(x) = log N(x + b; 0, I)."""
    script = load("likelihood")
    model = script.trained("flow-matching", 4, script.Config(num_steps=1), jnp.zeros((256, 64)))
    params = jax.tree.map(jnp.zeros_like, model.params)
    params["params"]["last"]["bias"] = jnp.full(64, 0.5)
    x = jnp.linspace(-1, 1, 64)[None]
    expected = -0.5 * np.sum((np.linspace(-1, 1, 64) + 0.5) ** 2) - 32 * np.log(2 * np.pi)
    np.testing.assert_allclose(script.reference(model._replace(params=params), x), [expected], rtol=1e-6)


@pytest.mark.parametrize("clocked", [False, True])
def test_the_basis_is_of_the_mean_symmetric_part(load, clocked):  # noqa: F811
    """Of t B x along any path, a multiple of that of B, whatever the clock: its eigenvectors, in columns."""
    script = load("likelihood")
    b = jax.random.normal(jax.random.key(0), (6, 6))
    times = {"t_data": 0.0, "t_base": 1.0} | ({"clock": lambda t: -jnp.log(t + 0.01)} if clocked else {})
    model = script.Model(None, lambda net: lambda t, x, b: t * (b @ x), b, times)
    basis = np.asarray(script.learnt_basis(model, jnp.ones((2, 6))))
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-5)
    turned = basis.T @ (b + b.T) @ basis
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-4)


def test_flow_matching_has_every_width_and_the_others_the_last(load, tmp_path, monkeypatch):  # noqa: F811
    """And the gradient is that of the first field with the last width; nothing is trained or measured here."""
    script = load("likelihood")
    seen = []
    model = script.Model(None, None, None, {})
    monkeypatch.setattr(script, "trained", lambda kind, width, config, data: seen.append((kind, width)) or model)
    monkeypatch.setattr(script, "learnt_basis", lambda model, x: jnp.eye(x.shape[1]))
    row = {"cost": 1.0, "rms": 1.0, "covered": None, "way": "8 nodes, exact"}
    monkeypatch.setattr(script, "measured", lambda config, label, model, x: [{"field": label, **row}])
    monkeypatch.setattr(script, "gradients", lambda config, model, x: seen.append(x.shape) or [])
    script.main(script.Config(out=str(tmp_path), data="digits28", widths=(3, 5)))
    assert seen == [("flow-matching", 3), ("flow-matching", 5), (64, 784), ("probability-flow", 5), ("ffjord", 5)]
    assert (tmp_path / "likelihood_digits28.json").exists()


@pytest.mark.slow
def test_maximum_likelihood_raises_the_likelihood(load):  # noqa: F811
    """Digits that are all zero: log N(0; 0, I) = -58.8 nats before, and more after a few steps."""
    script = load("likelihood")
    model = script.trained("ffjord", 4, script.Config(ffjord_steps=5), jnp.zeros((256, 64)))
    assert script.reference(model, jnp.zeros((1, 64)))[0] > -32 * np.log(2 * np.pi) + 1e-3
