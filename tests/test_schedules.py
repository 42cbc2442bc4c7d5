"""Schedules against the coefficients that their papers print, and at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import SINGULAR
from scipy.integrate import solve_ivp
from targets import SCHEDULES as ALL

from dgm_jax import schedules

EVERY = pytest.mark.parametrize("name", ALL)


def beta(t):
    return 0.1 + t * 19.9


def beta_integral(t):
    return 0.1 * t + 19.9 * t**2 / 2


# (drift / x, diffusion^2) as the papers print them, in NumPy.
PUBLISHED = {
    "vp": lambda t: (-beta(t) / 2, beta(t)),
    "ve": lambda t: (0 * t, (0.01 * 5000**t * np.sqrt(2 * np.log(5000))) ** 2),
    "sub_vp": lambda t: (-beta(t) / 2, beta(t) * (1 - np.exp(-2 * beta_integral(t)))),
    "cosine": lambda t: (-np.pi / 2 * np.tan(np.pi * t / 2), np.pi * np.tan(np.pi * t / 2)),
    "edm": lambda t: (0 * t, 2 * 80**2 * t),
    "linear": lambda t: (-1 / (1 - t), 2 * t / (1 - t)),
}


@EVERY
def test_rates_are_the_published_drift_and_diffusion(name):
    ts = np.array([0.0, 1e-9, 1e-4, 0.1, 0.35, 0.5, 0.8, 0.99, 0.999])
    drift, diffusion2 = jax.vmap(lambda t: schedules.rates(ALL[name], t))(jnp.asarray(ts))
    expected_drift, expected_diffusion2 = PUBLISHED[name](ts)
    np.testing.assert_allclose(drift, expected_drift, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(diffusion2, expected_diffusion2, rtol=1e-7, atol=1e-15)


@EVERY
def test_alpha_and_variance_solve_the_moment_equations_of_the_published_sde(name):
    """m' = f m and V' = 2 f V + g^2 from (1, 0), with the coefficients of the papers."""
    end = 0.95 if name in SINGULAR else 1.0

    def moments(t, state):
        drift, diffusion2 = PUBLISHED[name](t)
        return [drift * state[0], 2 * drift * state[1] + diffusion2]

    ts = np.linspace(0.0, end, 5)
    solved = solve_ivp(moments, (0.0, end), [1.0, 0.0], t_eval=ts, method="DOP853", rtol=1e-12, atol=1e-14).y
    np.testing.assert_allclose(schedules.alpha(ALL[name], jnp.asarray(ts)), solved[0], rtol=1e-9)
    np.testing.assert_allclose(ALL[name].variance(jnp.asarray(ts)), solved[1], rtol=1e-8, atol=1e-12)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_starts_from_the_data_exactly(name, dtype):
    zero = jnp.zeros((), dtype)
    scale, scale_dot, variance, half_variance_dot = schedules.derivatives(ALL[name], zero)
    assert scale == 1.0
    assert variance == 0.0
    assert schedules.sigma(ALL[name], zero) == 0.0
    assert schedules.log_snr(ALL[name], zero) == jnp.inf
    drift, diffusion2 = schedules.rates(ALL[name], zero)
    expected_drift, expected_diffusion2 = PUBLISHED[name](np.zeros(()))
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-14
    np.testing.assert_allclose(drift, expected_drift, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(diffusion2, expected_diffusion2, rtol=tolerance, atol=tolerance)
    # d sigma^2 / dt = g^2 + 2 f sigma^2, and d alpha / dt = f alpha.
    np.testing.assert_allclose(half_variance_dot, expected_diffusion2 / 2, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(scale_dot, expected_drift, rtol=tolerance, atol=tolerance)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_every_value_keeps_the_dtype_of_t(name, dtype):
    t = jnp.asarray(0.3, dtype)
    s = ALL[name]
    values = (
        schedules.alpha(s, t),
        schedules.sigma(s, t),
        schedules.log_snr(s, t),
        *schedules.rates(s, t),
        *schedules.derivatives(s, t),
    )
    assert {value.dtype for value in values} == {jnp.dtype(dtype)}
    wide = jnp.asarray(t, jnp.float64)
    np.testing.assert_allclose(schedules.derivatives(s, t), schedules.derivatives(s, wide), rtol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("name", "expected"), [("linear", (0, -1, 1, 1)), ("cosine", (0, -np.pi / 2, 1, 0))])
def test_derivatives_where_alpha_vanishes(name, expected, dtype):
    one = jnp.ones((), dtype)
    got = schedules.derivatives(ALL[name], one)
    assert got[0] == 0.0  # exactly, not 6e-17
    tolerance = 3e-6 if dtype == jnp.float32 else 1e-14
    np.testing.assert_allclose(got, expected, atol=tolerance)
    np.testing.assert_allclose(jax.grad(lambda t: schedules.alpha(ALL[name], t))(one), expected[1], rtol=tolerance)
    assert schedules.log_snr(ALL[name], one) == -jnp.inf


@pytest.mark.parametrize("name", SINGULAR)
def test_rates_are_infinite_where_alpha_vanishes(name):
    drift, diffusion2 = schedules.rates(ALL[name], jnp.ones(()))
    assert drift == -jnp.inf
    assert diffusion2 == jnp.inf


@pytest.mark.parametrize("name", [name for name in ALL if name not in SINGULAR])
def test_rates_at_the_last_time(name):
    expected = PUBLISHED[name](np.ones(()))
    np.testing.assert_allclose(schedules.rates(ALL[name], jnp.ones(())), expected, rtol=1e-10, atol=1e-15)


@EVERY
def test_derivatives_against_central_differences(name):
    ts, step = jnp.asarray([0.05, 0.4, 0.7, 0.98]), 1e-5
    s = ALL[name]
    _, scale_dot, _, half_variance_dot = jax.vmap(lambda t: schedules.derivatives(s, t))(ts)
    by_differences = (schedules.alpha(s, ts + step) - schedules.alpha(s, ts - step)) / (2 * step)
    np.testing.assert_allclose(scale_dot, by_differences, rtol=1e-6, atol=1e-9)
    by_differences = (s.variance(ts + step) - s.variance(ts - step)) / (4 * step)
    np.testing.assert_allclose(half_variance_dot, by_differences, rtol=1e-6, atol=1e-9)


def test_log_snr_of_the_cosine_path_is_twice_the_log_of_a_cotangent():
    ts = np.array([1e-6, 0.2, 0.5, 0.9, 1 - 1e-6])
    got = schedules.log_snr(ALL["cosine"], jnp.asarray(ts))
    np.testing.assert_allclose(got, -2 * np.log(np.tan(np.pi * ts / 2)), rtol=1e-9, atol=1e-12)


@EVERY
def test_signal_to_noise_falls_all_the_way(name):
    log_snr = schedules.log_snr(ALL[name], jnp.linspace(0.0, 1.0, 101))
    assert jnp.all(log_snr[1:] < log_snr[:-1])


def test_paths_keep_what_their_names_promise():
    ts = jnp.linspace(0.0, 1.0, 21)
    for name in ("vp", "cosine"):
        total = schedules.alpha(ALL[name], ts) ** 2 + ALL[name].variance(ts)
        np.testing.assert_allclose(total, np.ones(21), rtol=1e-14)
    np.testing.assert_allclose(ALL["sub_vp"].variance(ts), ALL["vp"].variance(ts) ** 2, rtol=1e-14)
    np.testing.assert_allclose(schedules.alpha(ALL["linear"], ts) + schedules.sigma(ALL["linear"], ts), np.ones(21))
    # The VE marginal started from the data lacks sigma_min^2 of Song's code.
    np.testing.assert_allclose(ALL["ve"].variance(jnp.ones(())), 50**2 - 0.01**2, rtol=1e-14)
    np.testing.assert_allclose(schedules.sigma(schedules.edm(3.0), jnp.asarray(0.5)), 1.5, rtol=1e-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.vp(-0.1, 20.0), "beta_min and beta_max must be finite with 0 <= beta_min <= beta_max"),
        (lambda: schedules.vp(2.0, 1.0), "got beta_min=2.0 and beta_max=1.0"),
        (lambda: schedules.sub_vp(0.0, 0.0), "beta_max > 0"),
        (lambda: schedules.vp(0.1, float("nan")), "beta_max=nan"),
        (lambda: schedules.ve(0.0, 50.0), "0 < sigma_min < sigma_max, got sigma_min=0.0"),
        (lambda: schedules.ve(2.0, 1.0), "got sigma_min=2.0 and sigma_max=1.0"),
        (lambda: schedules.edm(-1.0), "sigma_max must be positive and finite, got -1.0"),
        (lambda: schedules.edm(float("inf")), "sigma_max must be positive and finite, got inf"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("function", [schedules.alpha, schedules.sigma, schedules.log_snr, schedules.rates])
def test_integer_time(function):
    with pytest.raises(TypeError, match="t must be an array of floats, got dtype int"):
        function(ALL["vp"], jnp.arange(3))
