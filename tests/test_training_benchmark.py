"""benchmarks/ffjord_training.py: its ways have one objective, its units are right, and it leaves its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_benchmarks import load, record  # noqa: F401, the fixture

from dgm_jax import datasets, densities, metrics, networks


def test_digits_are_counted_in_bits_of_pixels(load):  # noqa: F811
    """N(0, I) of standardised rows is a product of normals of pixels."""
    script = load("ffjord_training")
    data = script.digits(script.Config(num_test=40))
    images = datasets.digits()
    pixels = images.train.reshape(1500, 64)
    mean, std = pixels.mean(0) + 0.5, np.sqrt(pixels.var(0) + 1 / 12)
    test = data.test * std + mean
    np.testing.assert_array_equal(np.floor(test), images.test[:40].reshape(40, 64))
    np.testing.assert_allclose(data.train * std + mean - 0.5, pixels, atol=1e-9)
    np.testing.assert_allclose(data.noise * std, 1)
    in_pixels = -0.5 * np.sum(((test - mean) / std) ** 2 + np.log(2 * np.pi * std**2), axis=1)
    expected = metrics.bits_per_dim(jnp.asarray(in_pixels), 64, metrics.uniform_dequantization(17, 0.0, 17.0))
    standard = -0.5 * np.sum(data.test**2 + np.log(2 * np.pi), axis=1)
    np.testing.assert_allclose(script.mean_and_stderr(script.nll(standard, data)), expected, rtol=1e-5)


def test_the_mixture_has_its_own_entropy(load):  # noqa: F811
    """The reference is the mean of -log p over 2,000 test rows: 5 standard errors from the entropy (6e-7), which is
    the mean over 200,000 others, in standardised units."""
    script = load("ffjord_training")
    data = script.table(script.Config(num_test=2000))
    with jax.enable_x64(True):
        mixture = script.known_mixture()
        raw = np.asarray(densities.sample(jax.random.key(0), mixture, 10_000))
        x = densities.sample(jax.random.key(1), mixture, 200_000)
        values = np.asarray(jax.jit(jax.vmap(lambda row: densities.log_prob(mixture, row)))(x))
    log_det = datasets.split_table(raw, valid=0.0, test=0.2).log_det
    stderr = values.std() / 2000**0.5
    assert abs(data.references["the mixture itself"] - (-values.mean() + log_det)) < 5 * stderr
    assert data.references["full Gaussian"] > data.references["the mixture itself"] + 0.5
    assert data.test.shape == (2000, 6)
    assert not data.noise.any()


def test_noise_is_as_wide_as_the_decimals(load, tmp_path):  # noqa: F811
    script = load("ffjord_training")
    rng = np.random.default_rng(0)
    raw = np.stack([rng.integers(0, 50, 400) / 10, rng.integers(0, 40, 400) / 200, rng.integers(0, 3, 400)], axis=1)
    path = tmp_path / "decimals.csv"
    np.savetxt(path, raw, delimiter=",", fmt="%.4f")
    config = script.Config(table=str(path), drop=(-1,), dequantize=True, num_test=1000)
    data = script.table(config)
    split = datasets.split_table(raw[:, :2], valid=0.0, test=0.2)
    np.testing.assert_allclose(data.noise * split.std, [0.1, 0.005], rtol=1e-6)
    moved = (data.test - split.test) / data.noise
    assert data.test.shape == (80, 2)
    assert -0.5 <= moved.min() < -0.45
    assert 0.45 < moved.max() <= 0.5
    plain = script.table(script.Config(table=str(path), drop=(-1,), num_test=1000))
    np.testing.assert_allclose(plain.test, split.test, atol=1e-12)
    expected = -script.gaussian(split.train, split.test).mean()
    assert plain.references == {"full Gaussian": pytest.approx(expected, rel=1e-12)}


def test_time_to_a_level(load):  # noqa: F811
    script = load("ffjord_training")
    seconds, values = [1.0, 10.0, 100.0], [4.0, 2.0, 1.0]
    assert script.time_to(3.0, seconds, values) == pytest.approx(10**0.5)
    assert script.time_to(2.0, seconds, values) == pytest.approx(10.0)
    assert script.time_to(4.5, seconds, values) == 1.0
    assert script.time_to(0.5, seconds, values) is None


@pytest.mark.slow
def test_all_ways_have_one_objective(load):  # noqa: F811
    """At one point of the parameters, over 300 draws: exact ways to 1e-3 nats, and ways with probes within 5 standard
    errors of the mean (6e-7 each), which are below 0.2 nats."""
    script = load("ffjord_training")
    net = networks.MLP((8, 8), last_init=jax.nn.initializers.normal(0.8))
    field = networks.vector_field(net)
    params = net.init(jax.random.key(0), jnp.zeros(()), jnp.zeros(6))
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (3, 1, 6)), (3, 100, 6)).reshape(300, 6)
    found = {}
    ways = script.ways(field, script.Config(rows=2), products=True)
    for name, way in ways.items():
        found[name] = np.asarray(jax.jit(script.log_prob(way, 1e-5))(params, jax.random.key(2), x)).reshape(3, 100)
    assert len(found) == 5
    truth = found["in the solve, exact by products"]
    assert np.ptp(truth) > 0.5
    for name, way in ways.items():
        if way.draw is None:
            np.testing.assert_allclose(found[name], truth, atol=1e-3, err_msg=name)
        else:
            error = (found[name] - truth).mean(axis=0)
            stderr = error.std(ddof=1) / 10
            assert 0 < stderr < 0.2
            assert abs(error.mean()) < 5 * stderr


@pytest.mark.slow
def test_every_way_learns_and_leaves_its_files(load, tmp_path):  # noqa: F811
    """Two seconds each on the mixture: the NLL falls far below that of N(0, I), and stays above the mixture's own, the
    least there is in the mean, but for 5 standard errors."""
    script = load("ffjord_training")
    config = script.Config(
        out=str(tmp_path), data=("table",), ways=(1, 4), seconds=2.0, moments=4, width=16, batch_size=64
    )
    result = script.main(config)
    first, other = record(tmp_path, "ffjord_training")["rows"]
    for row in (first, other):
        assert len(row["seconds"]) == len(row["nll"]) == 4
        assert row["seconds"] == sorted(row["seconds"])
        assert 2.0 <= row["seconds"][-1] < 4.0
        assert row["nll"][-1] < row["nll"][0] - 0.3
        assert row["nll"][-1] > row["references"]["the mixture itself"] - 5 * row["stderr"][-1]
        assert row["steps"] > 20
    assert first["time over the first's"] == 1.0
    assert first["below the first"] == [0.0, 0.0]
    assert other["below the first"][0] == pytest.approx(first["nll"][-1] - other["nll"][-1])
    assert other["divergences"] == 8 != first["divergences"] == first["evaluations"]
    assert len(result["nll"]) == 2
