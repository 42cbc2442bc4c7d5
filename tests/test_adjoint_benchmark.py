"""benchmarks/adjoints.py: every way is the same gradient, evaluations are counted as they happen, files are left.

The script runs in float64 of its own making, from JAX's default.
"""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script():
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield importlib.import_module("adjoints")
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def test_a_way_that_is_not_there(script, tmp_path):
    with pytest.raises(ValueError, match="'forward', expected some of pontryagin, backsolve"):
        script.main(script.Config(out=str(tmp_path), ways=("pontryagin", "forward")))
    with pytest.raises(ValueError, match="must be among them"):
        script.main(script.Config(out=str(tmp_path), ways=("direct",)))


@pytest.mark.slow
def test_every_way_is_the_same_gradient(script):
    """dx/dt = p x: L = |x0|^2 exp(2 p t1) / 2, dL/dx0 = x0 exp(2 p t1), dL/dp = t1 |x0|^2 exp(2 p t1)."""
    with jax.enable_x64(True):
        x0, p = jnp.array([0.5, -1.0]), jnp.asarray(-0.3)
        config = script.Config(t1=1.5)
        grown = np.exp(2 * -0.3 * 1.5)
        for way in ("pontryagin", *(name for name in script.WAYS if "heun" in name)):  # others: tests/test_adjoint.py
            gradient = jax.jit(script.make(config, way, lambda t, x, p: p * x, 512))
            value, (by_x0, by_p) = gradient(x0, p, jnp.asarray(1e-5))
            assert float(value) == pytest.approx(0.5 * 1.25 * grown, rel=1e-3), way
            np.testing.assert_allclose(by_x0, x0 * grown, rtol=1e-3, err_msg=way)
            assert float(by_p) == pytest.approx(1.5 * 1.25 * grown, rel=1e-3), way


@pytest.mark.slow
def test_main(script, tmp_path):
    """The error falls with the tolerance, and the evaluations counted are those of two solves by Tsit5."""
    config = script.Config(
        out=str(tmp_path), ways=("pontryagin",), tolerances=(1e-3, 1e-7), batch=3, dim=2, features=(4,), t1=1.0,
        max_steps=256, memory_steps=(), repeats=1,
    )  # fmt: skip
    result = script.main(config)
    left = json.loads((tmp_path / "adjoints.json").read_text())
    assert (tmp_path / "adjoints.png").stat().st_size > 5000
    rows = {(row["way"], row["tolerance"]): row for row in left["rows"]}
    assert len(rows) == 2
    for way in config.ways:
        assert rows[way, 1e-7]["error"] < 1e-5
        assert rows[way, 1e-7]["error"] < 0.1 * rows[way, 1e-3]["error"]
        assert rows[way, 1e-7]["evaluations"] > rows[way, 1e-3]["evaluations"]
        assert result["memory"][way]["256"] > 0
    assert result["time_pontryagin_1e-07"] == 1.0
    assert all(row["evaluations"] % 6 == 2 for row in rows.values())  # Tsit5: one at the start and six a step, twice
