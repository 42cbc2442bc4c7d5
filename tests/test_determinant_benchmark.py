"""benchmarks/determinant_and_trace.py: its arithmetic against closed form, and ``main`` on tiny sizes.

The script is about float32, the default, and so each test leaves the float64 of the others.
"""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script():
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield importlib.import_module("determinant_and_trace")
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def test_exponents_and_crossing_points(script):
    sizes = [4, 8, 16, 32]
    exponent, stderr = script.fit(sizes, [2.0 * m**1.7 for m in sizes])
    assert exponent == pytest.approx(1.7, abs=1e-12)
    assert stderr < 1e-12
    # residuals (1, -1, -1, 1) log 2, uncorrelated with log m = (2, 3, 4, 5) log 2: stderr = sqrt(4 / 2 / 5)
    exponent, stderr = script.fit(sizes, [m * f for m, f in zip(sizes, (2, 0.5, 0.5, 2), strict=True)])
    assert (exponent, stderr) == pytest.approx((1.0, (4 / 2 / 5) ** 0.5))
    # m^3 / 100 and m meet at 10
    assert script.crossing(sizes, [m**3 / 100 for m in sizes], sizes) == pytest.approx(10.0)
    assert script.crossing(sizes, [2 * m for m in sizes], sizes) == 4
    assert script.crossing(sizes, sizes, [2 * m for m in sizes]) is None


@pytest.mark.slow
def test_every_way_gives_the_number_of_the_dense_jacobian(script):
    """Against NumPy in float64; Hutchinson's with the probes that are the unit vectors, one after the other."""
    m, width = 5, 3
    field, params = script.make_field(jax.random.key(0), m, width)
    x = jax.random.normal(jax.random.key(1), (m,))
    a, wide, back = (np.asarray(leaf, float) for leaf in params)
    slope = np.diag(a / np.cosh(np.asarray(x, float)) ** 2)
    jacobian = slope + back @ np.diag(1 / np.cosh(wide @ np.asarray(x, float)) ** 2) @ wide
    basis = np.eye(m, dtype=np.float32)

    def found(name, params=params, probe=basis[:1]):
        return float(jax.jit(script.way(name, field))(params, x, probe)[1])

    assert found("determinant") == pytest.approx(np.linalg.slogdet(jacobian)[1], abs=1e-5)
    matrix = np.asarray(jacobian - np.diag(np.asarray(x, float)), np.float32)
    assert found("LU alone", matrix) == pytest.approx(np.linalg.slogdet(jacobian)[1], abs=1e-5)
    for name in ("dense trace", "trace"):
        assert found(name) == pytest.approx(np.trace(jacobian), abs=1e-5)
    assert sum(found("Hutchinson", probe=e[None]) for e in basis) == pytest.approx(np.trace(jacobian), abs=1e-5)


@pytest.mark.slow
def test_main(script, tmp_path, capsys):
    config = script.Config(out=str(tmp_path), sizes=(32, 64, 128), fit_from=32, width=2, target_seconds=2e-3, repeats=2)
    result = script.main(config)
    left = json.loads((tmp_path / "determinant_and_trace.json").read_text())
    assert (tmp_path / "determinant_and_trace.png").stat().st_size > 10_000
    assert len(left["rows"]) == 3 * len(script.WAYS)
    assert all(row["seconds"] > 0 for row in left["rows"])
    # what the compiler counts is no matter of luck: the claim
    operations, memory = result["exponents"]["operations"], result["exponents"]["bytes"]
    assert operations["dense trace"][0] == pytest.approx(2, abs=0.1)
    assert operations["Hutchinson"][0] == pytest.approx(1, abs=0.05)
    assert 2.5 < operations["determinant"][0] < operations["LU alone"][0] < 3
    assert memory["determinant"][0] == pytest.approx(2, abs=0.1)
    assert memory["Hutchinson"][0] < 1.5
    assert set(result["faster_from"]) >= {"trace than determinant", "Hutchinson than trace"}
    assert all(times > 0 for times in result["times_at_largest"].values())
    assert "Exponents over m >= 32" in capsys.readouterr().out


def test_bad_sizes(script):
    with pytest.raises(ValueError, match="sizes must increase"):
        script.main(script.Config(sizes=(8, 4)))
    with pytest.raises(ValueError, match="needs three"):
        script.main(script.Config(sizes=(4, 1024)))
