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
    small = {"width": 16, "num_steps": 300, "batch": 8, "draws": 4, "repeats": 1, "gradient": False}
    fields = ("flow-matching", "probability-flow")
    result = script.main(script.Config(out=str(tmp_path), fields=fields, ways=(3, 4, 8, 9), **small))
    assert set(result["rms"]) == set(fields)
    for kind, by_rule in zip(fields, (0.1, 3.0), strict=True):  # 8 nodes are few for a path that is steep at the data
        rms = result["rms"][kind]
        assert rms["8 nodes, its own divergence"] < by_rule, kind
        assert rms["8 nodes, 4 rows each"] > rms["8 nodes, 16 rows each"] > rms["8 nodes, its own divergence"], kind
        assert rms["likelihood, 16 rows a node"] < rms["8 nodes, 4 rows each"], kind
        assert result["covered"][kind]["likelihood, 16 rows a node"] > 0.8, kind
    assert len(json.loads((tmp_path / "likelihood.json").read_text())["rows"]) == 8
    assert (tmp_path / "likelihood.png").stat().st_size > 1000


def test_the_reference_is_the_likelihood_of_the_same_parameters(load):  # noqa: F811
    """Parameters of zeros but for the last bias, b: the field is b everywhere and log p(x) = log N(x + b; 0, I)."""
    script = load("likelihood")
    model = script.trained("flow-matching", script.Config(width=4, num_steps=1), jnp.zeros((256, 64)))
    params = jax.tree.map(jnp.zeros_like, model.params)
    params["params"]["last"]["bias"] = jnp.full(64, 0.5)
    x = jnp.linspace(-1, 1, 64)[None]
    expected = -0.5 * np.sum((np.linspace(-1, 1, 64) + 0.5) ** 2) - 32 * np.log(2 * np.pi)
    np.testing.assert_allclose(script.reference(model._replace(params=params), x), [expected], rtol=1e-6)


@pytest.mark.slow
def test_maximum_likelihood_raises_the_likelihood(load):  # noqa: F811
    """Digits that are all zero: log N(0; 0, I) = -58.8 nats before, and more after a few steps."""
    script = load("likelihood")
    model = script.trained("ffjord", script.Config(width=4, ffjord_steps=5), jnp.zeros((256, 64)))
    assert script.reference(model, jnp.zeros((1, 64)))[0] > -32 * np.log(2 * np.pi) + 1e-3
