"""The script experiments/score_matching.py: its measurements against closed form, the whole of it, its resuming."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import densities

SCRIPT = Path(__file__).parents[1] / "experiments" / "score_matching.py"
spec = importlib.util.spec_from_file_location("score_matching_script", SCRIPT)
script = sys.modules["score_matching_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TINY = {"features": (8,), "num_steps": 4, "batch_size": 16, "measure_every": 2, "checkpoint_every": 2,
        "num_valid": 50, "num_test": 50, "num_rounds": 1}  # fmt: skip


@pytest.mark.slow
def test_the_true_score_is_told_from_that_of_noisy_data():
    """The model that is the score of data with noise 0.3 in place of that with any: its divergence from the score of
    the noisy data is 0 and from that of the data the bias of sigma, by trapezoids on the plane within 4 standard
    errors (one false alarm in 16,000; the keys are fixed)."""
    mixture = script.target()
    truth, log_p = densities.score(mixture, script.KERNEL), densities.log_density(mixture, script.KERNEL)
    line = jnp.arange(-7.0, 7.0, 0.1)
    nodes = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)

    @jax.jit
    @jax.vmap
    def density_and_gap(x):
        return jnp.exp(log_p(0.0, x)), jnp.sum((truth(0.3, x) - truth(0.0, x)) ** 2)

    density, gap = map(np.asarray, density_and_gap(nodes))
    np.testing.assert_allclose(0.01 * density.sum(), 1, atol=1e-9)
    exact = 0.01 * 0.5 * density @ gap

    model = lambda t, x, params: params * truth(t, x)  # noqa: E731
    methods = {"denoising_0.3": script.Method(None, 0.3), "explicit": script.Method(None, 0.0)}
    params = script.State(script.training.TrainState(None, None, jnp.ones(()), None), None, None)
    test = densities.sample(jax.random.key(0), mixture, 20_000)
    eps = jax.random.normal(jax.random.key(1), test.shape)
    found = script.judge(methods, dict.fromkeys(methods, params), model, truth, test, eps)
    noisy = found["denoising_0.3"]
    assert noisy["fisher_from_noisy_score"] < 1e-25
    assert noisy["fisher"] == pytest.approx(noisy["bias_of_sigma"], rel=1e-10)
    assert abs(noisy["bias_of_sigma"] - exact) < 4 * noisy["bias_of_sigma_stderr"] < 0.1 * exact
    assert found["explicit"].keys() == {"fisher", "fisher_stderr"}
    assert all(0 <= value < 1e-25 for value in found["explicit"].values())  # squares of what rounding leaves


@pytest.mark.slow
@pytest.mark.parametrize("energy", [False, True])
def test_every_loss_has_its_minimum_at_the_true_score(energy):
    """The script's own batch losses of a times the true score: the expected gradient in a is (a - 1) E |s*|^2, with
    the weight sigma^2 and the score of noisy data for denoising; zero at a = 1, half of it at a = 1.5.

    Paired differences over 20 batches of 1,000 points, within 4.5 of their standard errors (t distribution of 19
    degrees of freedom: 2.5e-4), for five losses at two values: false alarms 2.5e-3; the key is fixed.
    """
    mixture = script.target()
    truth, log_p = densities.score(mixture, script.KERNEL), densities.log_density(mixture, script.KERNEL)
    density = (lambda t, x, a: a * log_p(t, x)) if energy else None
    score = script.score_matching.score_of(density) if energy else (lambda t, x, a: a * truth(t, x))
    methods = script.make_methods(script.Config(sigmas=(0.3,), probes="gaussian"), score, density, truth)

    @jax.jit
    @jax.vmap
    def gradients(key):
        key_data, key_loss = jax.random.split(key)
        x = densities.sample(key_data, mixture, 1000)
        size = lambda t, x: jnp.mean(jax.vmap(lambda x: jnp.sum(truth(t, x) ** 2))(x))  # noqa: E731
        clean, noisy = size(0.0, x), 0.09 * size(0.3, x + 0.3 * jax.random.normal(key_loss, x.shape))
        found = {}
        for name, (loss, sigma) in methods.items():
            both = jax.vmap(lambda a, loss=loss: jax.grad(loss)(a, key_loss, x))(jnp.asarray([1.0, 1.5]))
            found[name] = both - jnp.asarray([0.0, 0.5]) * (noisy if sigma else clean)
        return found, clean

    found, clean = gradients(jax.random.split(jax.random.key(5), 20))
    assert len(found) == 5
    assert np.mean(clean) > 1
    for name, gaps in found.items():
        gaps = np.asarray(gaps)
        assert np.all(np.abs(gaps.mean(axis=0)) < 4.5 * gaps.std(axis=0, ddof=1) / 20**0.5 + 1e-12), name
    assert np.abs(found["explicit"]).max() < 1e-12


@pytest.mark.slow
def test_tiny_run_writes_what_it_says(tmp_path):
    """A hundred steps of a scalar network: every loss has taken it away from the score 0."""
    changes = {"features": (32,), "batch_size": 128, "num_steps": 100, "num_test": 2000, "measure_every": 20}
    results = script.main(script.Config(out=str(tmp_path / "run"), energy=True, sigmas=(0.2,), **TINY | changes))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == results
    for picture in ("fisher.png", "fields.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
    for name in ("explicit", "implicit", "sliced", "sliced_plain"):
        assert results[f"{name}_fisher"] < 0.8 * results["zero_fisher"], name
        assert 0 < results[f"{name}_seconds_step"] < results[f"{name}_seconds_compile"]
    assert results["denoising_0.2_fisher_from_noisy_score"] < results["zero_fisher"]


@pytest.mark.slow
def test_a_run_that_lost_its_end_is_resumed_with_the_same_bits(tmp_path, monkeypatch):
    """The last checkpoint of one loss, and all of the next, are lost; the parameters and results come out the same."""
    ended, train = [], script.runs.train

    def recording(*args, **options):
        ended.append(train(*args, **options))
        return ended[-1]

    monkeypatch.setattr(script.runs, "train", recording)
    config = script.Config(out=str(tmp_path), **TINY, sigmas=(0.2,))
    whole = script.main(config)
    with pytest.raises(FileExistsError, match="add --resume to continue it"):
        script.main(config)
    shutil.rmtree(tmp_path / "implicit" / "checkpoints" / "00000004")
    (tmp_path / "implicit" / "checkpoints" / "00000004.sha256.json").unlink()
    shutil.rmtree(tmp_path / "sliced")
    (tmp_path / "metrics.json").unlink()
    again = script.main(dataclasses.replace(config, resume=True, num_rounds=2))
    chex.assert_trees_all_equal(ended[:5], ended[5:])
    without = lambda results: {k: v for k, v in results.items() if "seconds" not in k}  # noqa: E731
    assert without(whole) == without(again)


def test_bad_options_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"sigmas holds 0.0, expected sizes of noise in \(0, 1\]"):
        script.main(script.Config(out=str(tmp_path / "run"), sigmas=(0.1, 0.0)))
    with pytest.raises(ValueError, match="measure_every and num_rounds must be at least 1"):
        script.main(script.Config(out=str(tmp_path / "run"), measure_every=0))
    assert not (tmp_path / "run").exists()
