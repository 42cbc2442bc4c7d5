"""The experiment script ``experiments/ncsn.py``: its score without a network, and the whole of it, tiny."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import densities, ncsn

SCRIPT = Path(__file__).parents[1] / "experiments" / "ncsn.py"
spec = importlib.util.spec_from_file_location("ncsn_script", SCRIPT)
script = sys.modules["ncsn_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TINY = {
    "mixture_features": (16, 16),
    "mixture_num_steps": 8,
    "mixture_samples": 1000,
    "mixture_levels": 15,
    "mixture_steps_per_level": 30,
    "features": (16, 16),
    "num_steps": 4,
    "num_samples": 9,
    "num_levels": 5,
    "steps_per_level": 4,
    "batch_size": 16,
    "checkpoint_every": 2,
}


def tiny(folder, **changes):
    return script.Config(out=str(folder / "run"), **{**TINY, **changes})


@pytest.mark.slow
def test_without_a_network_the_score_is_that_of_a_gaussian_and_its_loss_known():
    """With F = 0 on x_0 ~ N(0, std^2): the loss a dimension is std^2 / (std^2 + sigma^2) / 2, the mean over the levels.

    4,000 x 16 terms with a relative variance of about 2 each: 4 standard errors are 2.3 per cent.
    """
    std, sigmas = 0.7, ncsn.levels(5.0, 0.1, 8)
    score = script.make_score(lambda t, x, params: jnp.zeros_like(x), std)
    np.testing.assert_allclose(score(jnp.asarray(2.0), jnp.ones(3), None), -1 / (0.49 + 4))
    loss = script.make_loss(score, sigmas, lambda key, x: x)
    x = std * jax.random.normal(jax.random.key(0), (4000, 16))
    found = jax.jit(loss)(None, jax.random.key(1), x)
    np.testing.assert_allclose(found, np.mean(0.5 * std**2 / (std**2 + np.asarray(sigmas) ** 2)), rtol=0.023)


def test_the_mixture_is_as_described():
    density = script.mixture()
    along = np.asarray(density.means) @ script.AXES
    np.testing.assert_allclose(along, [[-4, 0], [4, 0]], atol=1e-12)
    np.testing.assert_allclose(
        script.AXES.T @ np.asarray(density.covariances[1]) @ script.AXES, np.diag([0.25, 1.44]), atol=1e-12
    )
    np.testing.assert_allclose(densities.mean(density) @ script.AXES[:, 0], 0.6 * 4)


@pytest.mark.slow
def test_the_whole_of_it_and_a_resumed_run(tmp_path):
    """With the exact score, which needs no training, the shares come out: 0.2 by annealing, one half without it.

    Within 0.06 of 0.2, of which 0.01 to 0.02 is the bias of few steps and 0.013 a standard error; within 5 standard
    errors (0.08) of 0.498, which is in its law. Then the last checkpoint of the digits goes, and the resumed run has
    the same results.
    """
    results = script.main(tiny(tmp_path))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == results
    assert abs(results["share_annealed_exact"] - 0.2) < 0.06
    assert abs(results["share_plain_exact"] - 0.498) < 0.08
    np.testing.assert_allclose(results["share_plain_exact_stderr"], np.sqrt(0.25 / 1000), rtol=0.05)
    assert results["classifier_accuracy"] > 0.9
    assert results["sliced_wasserstein_train"] < results["sliced_wasserstein_samples"]
    for picture in ("mixture", "digits", "annealing", "loss_mixture", "loss_digits"):
        assert (tmp_path / "run" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(FileExistsError, match="--resume"):
        script.main(tiny(tmp_path))
    checkpoints = tmp_path / "run" / "digits" / "checkpoints"
    shutil.rmtree(checkpoints / "00000004")
    (checkpoints / "00000004.sha256.json").unlink()
    resumed = script.main(dataclasses.replace(tiny(tmp_path, data="digits"), resume=True))
    assert len(resumed) > 15
    assert {k: results[k] for k in resumed if "seconds" not in k} == {
        k: v for k, v in resumed.items() if "seconds" not in k
    }


def test_bad_configurations_are_named(tmp_path):
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        script.main(tiny(tmp_path, num_samples=1))
    with pytest.raises(ValueError, match=r"mixture_step must lie in \(0, 4\), .* got 4"):
        script.main(tiny(tmp_path, mixture_step=4.0))
    with pytest.raises(ValueError, match="levels need sigma_max > sigma_min > 0"):
        script.main(tiny(tmp_path, data="digits", sigmas=(0.1, 0.2)))
    assert not (tmp_path / "run").exists()
