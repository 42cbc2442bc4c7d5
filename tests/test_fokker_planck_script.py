"""The experiment script ``experiments/fokker_planck.py``: its pieces against what is known, and all of it, tiny."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from dgm_jax import densities, fokker_planck, solvers

SCRIPT = Path(__file__).parents[1] / "experiments" / "fokker_planck.py"
spec = importlib.util.spec_from_file_location("fokker_planck_script", SCRIPT)
script = sys.modules["fokker_planck_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TINY = {"cells_line": 120, "cells_plane": 60, "num_paths": 2000, "num_steps": 100, "num_bins": 20, "frames": 5}


def process(num, dim=2):
    """The mixture of the script on a grid, and 50,000 exact samples of it."""
    density, grid = script.make_density(dim), fokker_planck.Grid((-5.0,) * dim, (5.0,) * dim, (num,) * dim)
    x = fokker_planck.cells(grid)
    p = jax.vmap(lambda x: jnp.exp(densities.log_prob(density, x)))(x.reshape(-1, dim)).reshape(x.shape[:-1])
    points = np.asarray(densities.sample(jax.random.key(0), density, 50_000))
    return script.Process(grid, np.zeros(1), np.asarray(p)[None], None, {"sde": points[None]}, {})


@pytest.mark.slow
@pytest.mark.parametrize("bins", [20, 32])
def test_bins_of_cells_and_of_points_are_the_same(bins):
    """Masses from the density and shares of 50,000 of its samples, with bins that divide the cells and that do not.

    chi^2 below its quantile of 1 - 1e-4, which is the false-alarm rate.
    """
    one = process(80)
    m, share = script.binned(one, one.exact[0], bins), script.counted(one, one.paths["sde"][0], bins)
    assert m.shape == share.shape == (bins, bins)
    np.testing.assert_allclose([m.sum(), share.sum()], 1, atol=1e-3)
    kept = 50_000 * m >= 20
    assert kept.sum() > 50
    assert 50_000 * np.sum((share[kept] - m[kept]) ** 2 / m[kept]) < chi2.isf(1e-4, kept.sum())


@pytest.mark.slow
def test_four_ways_agree(tmp_path):
    """The whole of it, tiny. 2,000 paths: distances of histograms within twice what chance gives on average.

    Total variation in 20 bins or more varies by about a fifth of its mean: twice it is five deviations.
    """
    results = script.main(script.Config(out=str(tmp_path / "run"), **TINY))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == results
    for where in ("line", "plane"):
        assert max(results[f"{where}_mass_lost"]) < 1e-13
        assert min(results[f"{where}_least_density"]) >= 0
        assert max(results[f"{where}_grid_error"]) < 0.05
        assert max(results[f"{where}_distance_grid_exact"]) < 0.02
        assert results[f"{where}_wall_share"] < 1e-4
        for name in ("sde", "flow"):
            ratio = np.divide(results[f"{where}_distance_{name}_exact"], results[f"{where}_distance_by_chance"])
            assert np.max(ratio) < 2
    for picture in ("paths.png", "plane.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "paths.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.slow
def test_a_grid_solution_that_fails_ends_the_run():
    """A tolerance below rounding: no number is compared with NaN, the error has the time and the cause."""
    config = script.Config(**{**TINY, "rtol": 1e-30})
    with pytest.raises(solvers.SolveError, match=r"stopped at t = .* the step shrank"):
        script.follow(config, 1, np.linspace(0.0, 0.3, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t_end": 1.0}, "t_end must be above 0 and below 1, got 1.0"),
        ({"frames": 4}, "frames must be at least 5, got 4"),
        ({"num_bins": 200}, "num_bins must be from 2 to the number of cells on an axis, 60, got 200"),
        ({"num_paths": 0}, "num_paths must be at least 1, got 0"),
    ],
)
def test_bad_configuration(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(out=str(tmp_path), **{**TINY, **changes}))
