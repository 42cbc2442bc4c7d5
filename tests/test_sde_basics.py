"""The script experiments/sde_basics.py: its scheme is the library's, its closed forms right, its orders theory's."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.integrate import solve_ivp

from dgm_jax import schedules, solvers
from dgm_jax.types import SDE

SCRIPT = Path(__file__).parents[1] / "experiments" / "sde_basics.py"
spec = importlib.util.spec_from_file_location("sde_basics", SCRIPT)
script = sys.modules["sde_basics"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

POWERS = (5, 6, 7, 8)
KINDS = ("multiplicative", "additive")


@pytest.fixture(scope="module")
def orders():
    """Both problems, 8 fits to 250 paths."""
    config = script.Config(powers=POWERS, replicates=8, paths=250)
    return {kind: script.judge_orders(p, jax.random.key(1), config) for kind, p in script.problems().items()}


def test_wiener_paths_have_the_three_properties_that_define_them():
    """w(0) = 0 exactly; 182 z-scores of correlations of increments, their means, variances t - s, fourth moments.

    The key is fixed; all below 4.5 with a false-alarm rate of 1.2e-3. And the z-scores see it when the increments of a
    path are a tenth too large, or half of each is carried into the next.
    """
    times, paths = script.wiener_process(jax.random.key(0), 4000, 16)

    def largest(paths):
        found = script.judge_wiener(times, paths)
        assert found["wiener_start"] == 0
        return {k.removeprefix("wiener_largest_z_"): v for k, v in found.items() if k.startswith("wiener_largest_z_")}

    assert max(largest(paths).values()) < 4.5
    assert largest(1.1 * paths)["variance"] > 10
    carried = np.array(paths)
    carried[:, 1:] += 0.5 * np.asarray(paths)[:, :-1]
    assert largest(carried)["correlation"] > 6


def test_the_scheme_over_given_increments_is_the_library_s():
    """With the noise that ``solvers.euler_maruyama`` draws, step by step; drift and diffusion depend on t and x."""
    sde = SDE(lambda t, x, args: jnp.cos(3 * t) - x**3, lambda t, x, args: (1 + t) * jnp.sin(x))
    key, x0, n, t1 = jax.random.key(5), jnp.asarray([0.4, -1.2]), 12, 1.5
    noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(key, k), (2,)))(jnp.arange(n))
    found = script.scheme(sde, x0, noise * math.sqrt(t1 / n), t1=t1)
    expected = solvers.euler_maruyama(key, sde, x0, t0=0.0, t1=t1, num_steps=n)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_of_the_solutions(kind):
    """Mean and variance against the moment equations m' = E f, V' = 2 Cov(f, x) + E g^2, solved by SciPy; the path
    against the scheme in 2^14 steps, whose root mean square error is known: 40 paths, within a factor 1.5."""
    problem = script.problems()[kind]
    zero, nought = jnp.zeros(()), jnp.zeros(2)
    f, g = (np.asarray(part(zero, nought, None)) for part in problem.sde)
    f1, g1 = (np.asarray(part(zero, nought + 1, None)) - value for part, value in zip(problem.sde, (f, g), strict=True))

    def rates(_, state):
        m, v = state[:2], state[2:]
        return np.concatenate([f + f1 * m, 2 * f1 * v + (g + g1 * m) ** 2 + g1**2 * v])

    start = np.concatenate([problem.x0, np.zeros(2)])
    end = solve_ivp(rates, (0, 1), start, rtol=1e-11, atol=1e-13).y[:, -1]
    np.testing.assert_allclose(np.concatenate(problem.moments), end, rtol=1e-9)

    ends, exact = jax.jit(lambda key: script.paths_at_every_step(problem, key, 40, (14,)))(jax.random.key(2))
    error = math.sqrt(np.mean(np.sum((ends[:, 0] - exact) ** 2, 1)))
    assert 1 / 1.5 < error / math.sqrt(problem.mean_square(2**14)) < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_the_scheme_are_exact(kind):
    """(1 + rate h)^n x_0 is the mean of n steps of a linear drift; the second moment's factor is (1 + rate h)^2 plus
    h noise^2, or it gains that: here with the numbers of the problems."""
    problem, n = script.problems()[kind], 8
    mean, variance = script.moments(problem.sde, problem.x0, n)
    if kind == "multiplicative":
        rate, noise = np.array([-0.5, 0.3]), np.array([0.6, 0.4])
        expected = problem.x0 * (1 + rate / n) ** n
        square = problem.x0**2 * ((1 + rate / n) ** 2 + noise**2 / n) ** n
    else:
        rate, centre, noise = np.array([1.0, 2.0]), np.array([0.3, -1.0]), np.array([0.5, 1.0])
        expected = centre + (problem.x0 - centre) * (1 - rate / n) ** n
        square = expected**2 + noise**2 / n * sum((1 - rate / n) ** (2 * k) for k in range(n))
    np.testing.assert_allclose(mean, expected, rtol=1e-13)
    np.testing.assert_allclose(variance + mean**2, square, rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strong"), [("multiplicative", 0.5), ("additive", 1.0)])
def test_strong_and_weak_order_of_euler_maruyama(orders, kind, strong):
    """Slopes of log error against log step, 2^-5 to 2^-8.

    Strong: on paths, eight independent fits, within 4 standard errors of theory and 0.03 for steps that are not yet
    small (false-alarm rate 3e-3, seven degrees of freedom), and by the closed form of the root mean square within 0.02.
    Weak, without sampling: within 0.02.
    """
    found = orders[kind]
    assert found["strong_order_stderr"] < 0.02
    assert abs(found["strong_order"] - strong) < 4 * found["strong_order_stderr"] + 0.03
    assert abs(found["root_mean_square_order"] - strong) < 0.02
    for phi in ("mean", "square"):
        assert abs(found[f"weak_order_{phi}"] - 1) < 0.02
        assert abs(found[f"weak_order_{phi}_of_the_finest"] - 1) < 0.01
        assert found[f"weak_error_{phi}"][-1] > 1e-5  # a difference, not rounding


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_paths_agree_with_every_closed_form(orders, kind):
    """E|x_h - x|^2 for each of four steps, and both moments of scheme and solution: 2,000 paths, 22 z-scores below
    4.5. The squares are skewed (false-alarm rate about 1e-3); the key is fixed."""
    for name in ("mean_square", "moments_of_the_scheme", "moments_of_the_solution"):
        assert orders[kind][f"largest_z_{name}"] < 4.5, name


def test_kolmogorov_s_distance_against_scipy():
    rng = np.random.default_rng(0)
    for sample in (rng.uniform(size=300), rng.uniform(size=300) ** 1.15):
        expected = scipy.stats.kstest(sample, "uniform")
        distance, p = script.kolmogorov(sample)
        assert distance == pytest.approx(expected.statistic)
        assert p == pytest.approx(expected.pvalue, rel=0.05)


def test_distribution_function_of_p_t_against_samples_of_the_path():
    """x_t = alpha x_0 + sigma eps, 20,000 of them: p-values above 1e-4, false-alarm rate 3e-4."""
    schedule, rng, n = schedules.vp(), np.random.default_rng(1), 20_000
    which = rng.choice(2, size=n, p=script.WEIGHTS)
    x0 = script.MEANS[which] + np.sqrt(script.VARIANCES[which]) * rng.normal(size=n)
    for t in (0.0, 0.3, 0.8):
        alpha, sigma = (float(part(schedule, jnp.asarray(t))) for part in (schedules.alpha, schedules.sigma))
        x = alpha * x0 + sigma * rng.normal(size=n)
        assert script.kolmogorov(script.distribution(t, x, schedule))[1] > 1e-4


@pytest.mark.slow
def test_main_on_few_paths(tmp_path, capsys):
    """Every process has p_t as its density: 16 p-values, the four of one process on the same paths, above 2e-4 (false
    alarms 3e-3); share of the left mode and energy distance within 4.5 standard errors."""
    config = script.Config(
        out=str(tmp_path), wiener_paths=500, powers=(3, 4, 5), replicates=2, paths=50, marginal_paths=1000,
        sampler_steps=400, langevin_time=3.0,
    )  # fmt: skip
    shown = script.main(config)
    left = json.loads((tmp_path / "metrics.json").read_text())
    assert shown == {name: value for name, value in left.items() if not isinstance(value, list)}
    for name in ("reverse_sde", "probability_flow", "forward_sde", "langevin"):
        assert min(left[f"{name}_p_value"]) > 2e-4, name
    for name in ("reverse_sde", "probability_flow"):
        assert abs(left[f"{name}_left_mode"] - left["left_mode"]) < 4.5 * left[f"{name}_left_mode_stderr"]
        assert abs(left[f"{name}_energy_distance"]) < 4.5 * left[f"{name}_energy_distance_stderr"]
    for picture in ("wiener", "orders", "marginals"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 10_000
    assert "strong and weak order" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"powers": (5,)}, "at least two rising positive integers"),
        ({"powers": (5, 5, 6)}, "at least two rising positive integers"),
        ({"replicates": 1}, "replicates must be at least 2"),
        ({"sampler_steps": 250}, "sampler_steps must be a multiple of 100"),
        ({"langevin_time": 0.5}, "langevin_time must be a whole number"),
    ],
)
def test_bad_input(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
