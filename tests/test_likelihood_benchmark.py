"""benchmarks/likelihood.py: its ways agree, and it leaves its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_benchmarks import load  # noqa: F401, the fixture


@pytest.mark.slow
def test_ways_estimate_the_same_likelihood(load, tmp_path):  # noqa: F811
    """A narrow field, trained little: exact ways agree, and the error falls from 4 rows a node to 16 to all."""
    script = load("likelihood")
    config = script.Config(
        out=str(tmp_path), width=16, num_steps=300, batch=8, draws=4, repeats=1, ways=(3, 4, 7, 8, 9), gradient=False
    )
    result = script.main(config)
    rms = result["rms"]
    assert rms["in the solve, its own divergence"] < 0.01
    assert rms["8 nodes, its own divergence"] < 0.1
    assert rms["8 nodes, 4 rows each"] > rms["8 nodes, 16 rows each"] > rms["8 nodes, its own divergence"]
    assert rms["likelihood, 16 rows a node"] < rms["8 nodes, 4 rows each"]
    assert len(json.loads((tmp_path / "likelihood.json").read_text())["rows"]) == 5
    assert (tmp_path / "likelihood.png").stat().st_size > 1000


def test_the_reference_is_the_likelihood_of_the_same_parameters(load):  # noqa: F811
    """Parameters of zeros but for the last bias, b: the field is b everywhere and log p(x) = log N(x + b; 0, I)."""
    script = load("likelihood")
    field, params = script.trained_field(script.Config(width=4, num_steps=1), jnp.zeros((256, 64)))
    params = jax.tree.map(jnp.zeros_like, params)
    params["params"]["last"]["bias"] = jnp.full(64, 0.5)
    x = jnp.linspace(-1, 1, 64)[None]
    expected = -0.5 * np.sum((np.linspace(-1, 1, 64) + 0.5) ** 2) - 32 * np.log(2 * np.pi)
    np.testing.assert_allclose(script.reference(field, params, x), [expected], rtol=1e-6)
