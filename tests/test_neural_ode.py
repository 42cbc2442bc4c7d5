"""The experiment script ``experiments/neural_ode.py``: its gradient against closed form, and the whole of it, tiny."""

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

SCRIPT = Path(__file__).parents[1] / "experiments" / "neural_ode.py"
spec = importlib.util.spec_from_file_location("neural_ode", SCRIPT)
neural_ode = sys.modules["neural_ode"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(neural_ode)

TINY = {"num_trajectories": 4, "num_times": 3, "observed": 2, "width": 4, "num_steps": 4, "num_test": 3,
        "stiffness": (1.0, 8.0), "checkpoint_every": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def default_dtypes():
    """Scripts run in float32, and Optax's Adam mixes dtypes."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
def test_trajectories_are_observed_at_irregular_times_of_their_own():
    """The decay of the spiral is exact, |x(t)| = |x(0)| exp(-0.15 t), whatever its frequency; the noise is as asked."""
    config = neural_ode.Config(num_trajectories=200, noise=0.0, observed=5, num_times=8)
    data = neural_ode.observe(config, jax.random.key(0), neural_ode.spiral)
    radius = np.linalg.norm(data.xs, axis=-1)
    expected = np.exp(-0.15 * np.asarray(data.ts))[:, None] * np.linalg.norm(data.x0, axis=-1)
    np.testing.assert_allclose(radius, expected, rtol=1e-4)
    assert np.all(np.diff(data.ts) > 0)
    assert data.ts[0] > 0
    assert data.ts[-1] <= config.horizon
    assert np.all(np.sum(data.seen, 0) == 5)
    assert len(np.unique(np.asarray(data.seen).T, axis=0)) > 40  # of 56 ways to choose
    noisy = neural_ode.observe(dataclasses.replace(config, noise=0.3), jax.random.key(0), neural_ode.spiral)
    # 3,200 draws: the standard deviation within 4.5 sigma, false alarms 7e-6; the key is fixed
    assert abs(np.std(noisy.xs - data.xs) / 0.3 - 1) < 4.5 / np.sqrt(2 * 3200)


@pytest.mark.slow
def test_the_gradient_of_the_loss_is_that_of_the_closed_form():
    """dL/dfrequency and dL/dshear of a spiral, in closed form: its angle is the integral of (p + q |x|^2)."""
    key = jax.random.key(1)
    config = neural_ode.Config(num_trajectories=5, num_times=6, observed=3, tolerance=1e-6, noise=0.1)
    data = neural_ode.observe(config, key, neural_ode.spiral)

    def field(t, x, params):
        p, q = params
        return -0.15 * x + (p + q * jnp.sum(x**2)) * jnp.stack([-x[1], x[0]])

    def closed(params):
        p, q = params
        t, squared = data.ts[:, None], jnp.sum(data.x0**2, -1)[None]
        angle = p * t + q * squared * (1 - jnp.exp(-0.3 * t)) / 0.3
        first, second = data.x0[None, :, 0], data.x0[None, :, 1]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        turned = jnp.stack([cos * first - sin * second, sin * first + cos * second], -1)
        error = (jnp.exp(-0.15 * t)[..., None] * turned - data.xs) ** 2
        return jnp.sum(error * data.seen[..., None]) / (2 * jnp.sum(data.seen))

    params = (jnp.asarray(0.6), jnp.asarray(0.4))
    value, gradient = jax.value_and_grad(closed)(params)
    for name in ("pontryagin", "recursive_checkpoint"):
        loss = neural_ode.make_loss(field, dataclasses.replace(config, adjoint=name))
        (found, report), ours = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, key, data)
        assert float(found) == pytest.approx(float(value), rel=1e-3), name
        np.testing.assert_allclose(ours, gradient, rtol=2e-3, err_msg=name)
        assert report["nfe"] > 6


@pytest.mark.slow
def test_the_whole_script_and_its_resuming(tmp_path, capsys, monkeypatch):
    """The check fires on the stiff field and not on the tame one, where the gradient is right; a run that lost its last
    checkpoint ends with the same state, bit for bit."""
    config = neural_ode.Config(out=str(tmp_path / "run"), **TINY)
    ends = []
    train = neural_ode.runs.train

    def recording(*args, **options):
        ends.append(train(*args, **options))
        return ends[-1]

    monkeypatch.setattr(neural_ode.runs, "train", recording)
    results = neural_ode.main(config)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == results
    assert results["drift_stiff_fires"] == [False, True]
    assert results["drift_stiff"][0] < 1e-3
    assert results["gradient_error_stiff"][0] < 0.01
    assert results["gradient_error_stiff"][1] > 0.5
    printed = capsys.readouterr().err
    assert "mu = 1: " in printed
    assert printed.count("DRIFTS") == 1 + results["drift_learnt_fires"]
    # an MLP that was hardly trained errs by about the signal, and noise adds to it
    assert results["rmse_interpolation"] > 0.1
    assert results["rmse_interpolation_stderr"] < results["rmse_interpolation"]
    for name in ("trajectories", "drift", "loss", "nfe"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 5000

    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "00000004")
    (checkpoints / "00000004.sha256.json").unlink()
    monkeypatch.setattr(neural_ode, "measure", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))  # that will do
    with pytest.raises(KeyboardInterrupt):
        neural_ode.main(dataclasses.replace(config, resume=True))
    first, second = ends
    jax.tree.map(np.testing.assert_array_equal, second[0], first[0])
    assert second[1].keys() == first[1].keys()
    for name, values in first[1].items():
        np.testing.assert_array_equal(second[1][name], values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observed": 41}, "observed is 41: take 1 to num_times = 40"),
        ({"horizon": 0.0}, "horizon is 0.0"),
        ({"num_test": 1}, "num_test 1"),
        ({"stiffness": ()}, "at least one finite mu"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        neural_ode.main(neural_ode.Config(**change))
