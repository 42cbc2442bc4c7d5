"""The experiment script ``experiments/ddpm.py``: its model against closed form, and the whole of it, tiny."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import ddpm

SCRIPT = Path(__file__).parents[1] / "experiments" / "ddpm.py"
spec = importlib.util.spec_from_file_location("ddpm_script", SCRIPT)
script = sys.modules["ddpm_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TINY = {
    "features": (16, 16),
    "channels": (4, 8),
    "chain_steps": 25,
    "num_steps": 4,
    "checkpoint_every": 2,
    "batch_size": 16,
    "samples_per_class": 3,
    "test_examples": 40,
}


def tiny(folder, **changes):
    return script.Config(out=str(folder / "run"), **{**TINY, **changes})


def mnist(folder):
    """MNIST's own file format, 40 images of noise in it."""
    rng = np.random.default_rng(0)
    images, labels = (rng.integers(0, 256, (40, 28, 28), np.uint8), np.arange(40, dtype=np.uint8) % 10)
    np.savez(folder / "mnist.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    return {"data": "mnist", "data_dir": str(folder)}


@pytest.mark.slow
def test_an_untrained_model_is_exact_for_pixels_of_any_level_alike():
    """eps = -sigma grad log p_n, p_n the product over pixels of a mixture of a Gaussian for each of 5 levels."""
    chain = ddpm.linear(100, 0.001, 0.2)
    config = script.Config(features=(8,))
    model, params = script.make_model(config, jax.random.key(0), chain, (2, 3, 1), 5, 0.7)
    x = 0.5 * jax.random.normal(jax.random.key(1), (2, 3, 1))
    levels = jnp.asarray([-0.8, -0.4, 0.0, 0.4, 0.8])

    @jax.jit
    def both(n, x):
        kept = chain.alpha_bars[n]

        def log_density(x):
            gap = x[..., None] - (jnp.sqrt(kept) * levels)[None, None, None]
            return jnp.sum(jax.nn.logsumexp(-(gap**2) / (2 * (1 - kept)), axis=-1))

        return model(n, x, (params, jnp.int32(3))), -jnp.sqrt(1 - kept) * jax.grad(log_density)(x)

    for n in (0, 20, 99):
        predicted, exact = both(jnp.int32(n), x)
        np.testing.assert_allclose(predicted, exact, rtol=1e-8, atol=1e-10)


def test_numbers_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--chain linear needs more than 20 --chain-steps, got 20"):
        script.main(tiny(tmp_path, chain_steps=20))
    with pytest.raises(ValueError, match="num_draws must be at least 2, got 1"):
        script.main(tiny(tmp_path, num_draws=1))
    with pytest.raises(ValueError, match="--network mlp gives each pixel a logit for each level, too many with 256"):
        script.main(tiny(tmp_path, **mnist(tmp_path)))
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        script.main(tiny(tmp_path, data="mnist", data_dir=str(tmp_path / "empty")))
    assert not list((tmp_path / "run").glob("metrics.json"))


@pytest.mark.slow
def test_what_judge_says_of_real_digits_and_of_noise():
    """Real training digits in the place of samples are recognised, not told apart from test digits, and learned by
    heart; noise is none of it. 5 standard errors: 60 + 60 images, one false alarm in 1.7 million.
    """
    images = script.datasets.digits()
    flat = lambda x, y: script.Judged(x.reshape(len(x), -1).astype(float), y)  # noqa: E731
    train, test = flat(images.train, images.train_labels), flat(images.test[:60], images.test_labels[:60])
    copies = script.judge(script.Judged(train.x[:300], train.y[:300]), train, test, 0)
    assert copies["classifier_accuracy"] > 0.9
    assert copies["recognised"] > 0.99
    assert copies["nearest_train_samples"] == 0
    assert copies["nearer_than_95_percent_of_test"] == 1
    for judge in ("logistic", "svm", "forest"):
        assert abs(copies[f"two_sample_{judge}"] - 0.5) < 5 * np.sqrt(0.25 / 120)
    noise = np.random.default_rng(0).integers(0, 17, (300, 64)).astype(float)
    found = script.judge(script.Judged(noise, train.y[:300]), train, test, 0)
    assert found["two_sample_accuracy"] > 0.95
    assert abs(found["recognised"] - 0.1) < 5 * np.sqrt(0.09 / 300)
    assert found["nearest_train_samples"] > 2 * found["nearest_train_test"]


@pytest.mark.slow
def test_the_whole_of_it_and_resuming(tmp_path):
    """Four steps, a checkpoint every two; the last one removed and the run resumed: the same numbers to the bit."""
    config = tiny(tmp_path)
    results = script.main(config)
    run = tmp_path / "run"
    assert json.loads((run / "metrics.json").read_text()) == results
    for picture in ("samples.png", "denoising.png", "loss.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG"), picture
    assert results["test_examples"] == 40
    assert results["two_sample_accuracy"] > 0.9  # four steps are not enough
    assert results["test_bits_per_dim_at_most"] > 2.4
    assert results["bits_per_dim_of_prior"] < 1e-3

    for newest in run.glob("checkpoints/00000004*"):
        shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    again = script.main(dataclasses.replace(config, resume=True))
    one, other = ({k: v for k, v in r.items() if not k.startswith("seconds")} for r in (results, again))
    assert one == other


@pytest.mark.slow
def test_images_from_a_folder_with_the_unet(tmp_path):
    """256 levels, the cosine chain, the objective weighted as in the bound. Uniform noise costs 8 bits."""
    changes = {"network": "unet", "chain": "cosine", "objective": "bound", "chain_steps": 5}
    results = script.main(
        tiny(tmp_path, **mnist(tmp_path), **changes, variance="beta", num_steps=2, samples_per_class=2)
    )
    assert results["test_bits_per_dim_at_most"] > 7.5


@pytest.mark.slow
def test_help_explains_every_option():
    helped = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name.replace('_', '-')}" in helped
