"""The experiment script ``experiments/diffusion_gan.py``: its pieces, and the whole of it, tiny."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import ddpm, runs, schedules, training

SCRIPT = Path(__file__).parents[1] / "experiments" / "diffusion_gan.py"
spec = importlib.util.spec_from_file_location("diffusion_gan_script", SCRIPT)
script = sys.modules["diffusion_gan_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TINY = {
    "latent": 3,
    "features": (16, 16),
    "waves": 2,
    "num_steps": 6,
    "checkpoint_every": 2,
    "batch_size": 16,
    "num_samples": 60,
}


def tiny(folder, **changes):
    return script.complete(script.Config(out=str(folder), **{**TINY, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_levels": ()}, r"noise_levels must be at least one, positive and rising, got \(\)"),
        ({"noise_levels": (0.5, 0.5)}, "positive and rising"),
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"gamma": -0.1}, r"gamma must be finite and at least 0, got -0\.1"),
        ({"waves": 3}, "waves must be even and at least 0, got 3"),
        ({"batch_size": 3}, "batch_size must be at least the number of noise_levels"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(out=str(tmp_path / "run"), **{**TINY, **changes}))
    assert not (tmp_path / "run").exists()


def test_batches_are_of_the_grid_and_differ():
    data = script.load(tiny("unused", batch_size=2000), jax.random.key(0), training.mesh())
    x, y = (np.asarray(data.batch(n)) for n in (0, 1))
    assert np.abs(x[:, None] - y[None]).sum(-1).min() > 0
    apart = x - 2 * np.round(x / 2)  # from the nearest mode; 4,000 numbers, z below 5: false alarm 6e-7
    assert abs(np.mean(apart**2) - 0.05**2) < 5 * 0.05**2 * np.sqrt(2 / apart.size)
    assert 4 < np.abs(x).max() < 4.5


def test_the_discriminator_learns_before_the_generator():
    """One step: of the two losses, the discriminator's is at the old parameters of both, the generator's sees the new
    discriminator; every row of the batch has its step of the chain, as many rows for each."""
    config = tiny("unused", batch_size=8, gamma=0.0, learning_rate=1e-2)
    chain = ddpm.discretize(schedules.vp(), 4)
    seen = []

    def generator(n, x, z, params):
        jax.debug.callback(lambda n: seen.append(int(n)), n)
        return params["g"] + 0 * x

    def discriminator(n, x, x_n, params):
        return jnp.sum(params["d"]) + 0 * jnp.sum(x)

    params = {"g": jnp.asarray([0.5, -0.5])}, {"d": jnp.asarray([0.4, 0.3])}
    nets = script.Networks(generator, discriminator, lambda key: params)
    state, update = script.make_step(config, nets, chain, jax.random.key(1))
    state, found = jax.jit(update)(state, jax.random.key(0), jnp.zeros((8, 2)))
    jax.effects_barrier()
    assert sorted(seen) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4  # two of each for either network
    logit = 0.7
    np.testing.assert_allclose(found["discriminator_loss"], np.logaddexp(0, -logit) + np.logaddexp(0, logit))
    after = float(jnp.sum(state[1].params["d"]))  # Adam's first step: the learning rate, downhill to 0
    np.testing.assert_allclose(after, 0.7 - 2 * 1e-2, rtol=1e-6)
    np.testing.assert_allclose(found["loss"], np.logaddexp(0, -after))
    assert bool(found["finite"])


@pytest.mark.slow
@pytest.mark.parametrize("data", ["gaussian_grid", "digits"])
def test_the_whole_of_it_and_again_from_a_checkpoint(tmp_path, data):
    """A run that lost its last checkpoints ends with the same numbers as one that was never stopped."""
    run = tmp_path / "run"
    results = script.main(tiny(run, data=data))
    assert json.loads((run / "metrics.json").read_text()) == results
    for picture in ("samples.png", "loss.png", "discriminator_loss.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG"), picture
    assert results["evaluations"] == (2 if data == "digits" else 4)
    if data == "digits":
        assert results["classifier_accuracy"] > 0.9
        assert results["sliced_wasserstein_train"] < results["sliced_wasserstein"]
    else:
        assert results["num_modes_real"] == 25
        assert abs(results["high_quality_real"] - 0.98889) < 5 * results["high_quality_real_stderr"]
        assert results["high_quality"] < 0.5  # after six steps
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"{step:08d}")
        (run / "checkpoints" / f"{step:08d}.sha256.json").unlink()
    again = script.main(tiny(run, data=data, resume=True))
    keep = lambda found: {k: v for k, v in found.items() if not k.startswith("seconds")}  # noqa: E731
    assert keep(again) == keep(results)


@pytest.mark.parametrize("skip", [False, True])
def test_networks_see_what_they_should(skip):
    """The generator's x0 changes with n, x_n and z; the logit with n, x_(n-1) and x_n; waves are inputs of both."""
    nets = script.make_networks((8,), (0.5, 2.0, 9.0), 2, latent=3, waves=4, std=1.5, skip=skip)
    n, x, y, z = jnp.asarray(1), jnp.asarray([0.3, -0.7]), jnp.asarray([1.1, 0.2]), jnp.asarray([0.5, -0.1, 0.9])
    made, logit = (jax.jit(one) for one in (nets.generator, nets.discriminator))
    of_g, of_d = nets.init(jax.random.key(0))
    x0 = made(n, x, z, of_g)
    assert x0.shape == (2,)
    assert logit(n, x, y, of_d).shape == ()
    for other in ((n + 1, x, z), (n, y, z), (n, x, -z)):
        assert np.abs(made(*other, of_g) - x0).max() > 1e-3
    for other in ((n + 1, x, y), (n, y, y), (n, x, x)):
        assert abs(logit(*other, of_d) - logit(n, x, y, of_d)) > 1e-3
    assert of_g["params"]["layer_0"]["kernel"].shape == (2 + 2 * 4 + 3, 8)
    assert of_d["params"]["layer_0"]["kernel"].shape == (2 + 2 * 4 + 2 + 2, 8)


def test_a_generator_that_has_not_learnt_gives_the_best_linear_guess():
    """With F = 0 it is E[x0 | x_n] for Gaussian data of that deviation: the regression of x0 on x_n, at every level.
    Without skip it is E[x0] = 0."""
    levels, std = (0.5, 2.0, 9.0), 1.5
    nets = script.make_networks((8,), levels, 2, latent=3, waves=0, std=std, skip=True)
    anew = script.make_networks((8,), levels, 2, latent=3, waves=0, std=std, skip=False)
    of_g = jax.tree.map(jnp.zeros_like, nets.init(jax.random.key(0))[0])
    chain, x = script.make_chain(levels), jnp.asarray([0.3, -0.7])
    for n, alpha_bar in enumerate(np.cumprod(1 - np.asarray(chain.betas))):
        assert abs(np.sqrt(1 / alpha_bar - 1) - levels[n]) < 1e-6 * levels[n]
        slope = np.sqrt(alpha_bar) * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)  # Cov(x0, x_n) / Var(x_n)
        np.testing.assert_allclose(nets.generator(jnp.asarray(n), x, jnp.ones(3), of_g), slope * x, rtol=1e-6)
        np.testing.assert_array_equal(anew.generator(jnp.asarray(n), x, jnp.ones(3), of_g), 0.0)


def test_every_option_has_its_help(capsys):
    with pytest.raises(SystemExit):
        runs.cli(script.main, script.Config, args=["--help"])
    shown = capsys.readouterr().out
    for name in ("data", "noise-levels", "latent", "features", "gamma", "ema-decay", "resume"):
        assert f"--{name}" in shown
