"""Few-step samplers against closed form: their laws without Monte Carlo, their orders, their evaluations.

Where D is affine in x, as for Gaussian data, a sampler is an affine map of its start and its noises: the law of what it
returns follows from its matrix, exactly. ``law`` takes it from the public function, whose noises it supplies.
"""

import math
from functools import partial
from unittest import mock

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import SCHEDULES, rotated_mixture, rotation, switched

from dgm_jax import ddpm, densities, langevin, parameterizations, samplers, schedules, solvers

KEY = jax.random.key(7)
KINDS = ("score", "noise", "x0", "v", "velocity")
ORACLES = {
    "score": densities.score,
    "noise": densities.noise,
    "x0": densities.denoiser,
    "velocity": densities.velocity,
    "v": lambda density, s: parameterizations.convert(densities.denoiser(density, s), s, source="x0", target="v"),
}

# (key, model, schedule, x, times, args, prediction=...), all alike
DETERMINISTIC = {
    "ddim": lambda key, *a, **k: samplers.ddim(None, *a, **k),
    "heun": lambda key, *a, **k: samplers.heun(None, *a, **k),
    "dpm_solver_2s": lambda key, *a, **k: samplers.dpm_solver_2s(*a, **k),
    "dpm_solver_2m": lambda key, *a, **k: samplers.dpm_solver_2m(*a, **k),
    "adams_bashforth_2": lambda key, *a, **k: samplers.exponential_adams_bashforth(*a, order=2, **k),
    "adams_bashforth_3": lambda key, *a, **k: samplers.exponential_adams_bashforth(*a, **k),
}
STOCHASTIC = {
    "ddim, eta=0.6": partial(samplers.ddim, eta=0.6),
    "ddim, eta=1": partial(samplers.ddim, eta=1.0),
    "euler, churn": partial(samplers.euler, churn=8.0),
    "heun, churn": partial(samplers.heun, churn=8.0),
    "dpm_solver_2m_sde": samplers.dpm_solver_2m_sde,
}
CORRECTED = {"predictor_corrector": partial(samplers.predictor_corrector, snr=0.1)}
ORDERS = {
    "ddim": 1, "heun": 2, "dpm_solver_2s": 2, "dpm_solver_2m": 2, "adams_bashforth_2": 2, "adams_bashforth_3": 3,
    "ddim, eta=0.6": 1, "ddim, eta=1": 1, "euler, churn": 1, "heun, churn": 2, "dpm_solver_2m_sde": 2,
}  # fmt: skip
ALL = {**DETERMINISTIC, **STOCHASTIC, **CORRECTED}
TWO_STAGES = ("heun", "heun, churn", "dpm_solver_2s", "predictor_corrector")


def gaussian_data():
    """In the plane, turned away from the axes."""
    q = rotation(2, 5)
    return densities.gaussian(jnp.asarray([-0.6, 0.9]), jnp.asarray(q @ np.diag([0.2, 1.5]) @ q.T))


def with_noises(draw, x, noises):
    """``draw(KEY, x)``, where the noise of ``fold_in(key, n)`` is ``noises[n]``."""
    fold_in, normal = (lambda key, n: n), (lambda n, shape, dtype: noises[n])
    with mock.patch.object(jax.random, "fold_in", fold_in), mock.patch.object(jax.random, "normal", normal):
        return draw(KEY, x)


def law(draw, mean, covariance, num):
    """Mean and covariance of what an affine ``draw(key, x)`` returns for x of these; ``num`` is at least its noises.

    Its derivatives are differences between ends, all in one batch: the sampler is traced once and never transposed."""
    d = mean.size
    x = jnp.concatenate([mean[None], mean[None] + jnp.eye(d), jnp.broadcast_to(mean, (num * d, d))])
    noises = jnp.concatenate([jnp.zeros((1 + d, num, d)), jnp.eye(num * d).reshape(-1, num, d)])
    ends = jax.vmap(partial(with_noises, draw))(x, noises)
    first = ends[0]
    of_x, of_noise = jnp.split(ends[1:] - first[None], [d])
    return first, of_x.T @ covariance @ of_x + of_noise.T @ of_noise


def law_error(sampler, density, schedule, times, num):
    """Largest error of the mean and covariance at the last time, from the exact law at the first."""
    model = densities.denoiser(density, schedule)
    begin, end = (densities.diffuse(density, schedule, t) for t in (times[0], times[-1]))
    mean, covariance = law(
        lambda key, x: sampler(key, model, schedule, x, times, prediction="x0"),
        begin.means[0], begin.covariances[0], num,
    )  # fmt: skip
    return jnp.maximum(jnp.max(jnp.abs(mean - end.means[0])), jnp.max(jnp.abs(covariance - end.covariances[0])))


def fitted_order(nums, errors):
    return -np.polyfit(np.log(nums), np.log(np.asarray(errors)), 1)[0]


# ------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("name", ALL)
def test_data_in_one_point_is_sampled_exactly(name):
    """D is constant then, every rule for its integral is exact, and the law at t_end is N(alpha x0, sigma^2 I): in
    three uneven steps on every schedule, to 1e-10. One Langevin step after one other maps the right variance sigma^2 to
    ((1 - 2 r^2)^2 + 4 r^2) sigma^2. At t = 0 all of the law is x0."""
    x0 = jnp.asarray([0.7, -1.3])
    times = jnp.asarray([0.9, 0.01] if name in CORRECTED else [0.9, 0.5, 0.2, 0.01])
    model = lambda t, x, args: x0  # noqa: E731

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def ends(index, times):
        schedule = switched(index)
        variance = schedule.variance(times[0]) * jnp.eye(2)
        mean, covariance = law(
            lambda key, x: ALL[name](key, model, schedule, x, times, prediction="x0"),
            schedules.alpha(schedule, times[0]) * x0, variance, 8,
        )  # fmt: skip
        return mean, covariance, schedules.alpha(schedule, times[-1]) * x0, schedule.variance(times[-1]) * jnp.eye(2)

    mean, covariance, mean_exact, covariance_exact = ends(jnp.arange(6), times)
    factor = (1 - 2 * 0.1**2) ** 2 + 4 * 0.1**2 if name in CORRECTED else 1.0
    np.testing.assert_allclose(mean, mean_exact, atol=1e-10)
    np.testing.assert_allclose(covariance, factor * covariance_exact, rtol=1e-9, atol=1e-10)
    mean, covariance, _, _ = ends(jnp.arange(6), times.at[-1].set(0.0))
    np.testing.assert_allclose(mean, jnp.broadcast_to(x0, (6, 2)), atol=1e-12)
    np.testing.assert_allclose(covariance, np.zeros((6, 2, 2)), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_gaussian_data_is_sampled_right_on_every_schedule(name):
    """Mean and covariance of the data's law at t = 1e-3, from 0.999, in 200 steps of EDM's grid: within 0.15 for
    methods of first order, 0.015 for those of second; with correction within the bias of unadjusted Langevin too."""
    density = gaussian_data()
    times = jnp.stack([samplers.karras(s, 200, t_start=0.999, rho=20.0) for s in SCHEDULES.values()])

    @jax.jit
    @jax.vmap
    def errors(index, times):
        return law_error(ALL[name], density, switched(index), times, 401)

    bound = 0.15 if ORDERS.get(name, 1) == 1 else 0.015
    values = np.asarray(errors(jnp.arange(6), times))
    assert np.all(values < bound), dict(zip(SCHEDULES, values, strict=True))


CASES = {"vp": (0.5, 1e-2), "linear": (0.8, 2e-2)}
POINTS = np.random.default_rng(0).normal(size=(12, 2))


def uneven_times(num):
    """For each case steps of log(alpha / sigma) by turns long and half as long, as many in all as ``num``: on a smooth
    grid a wrong ratio of two steps would still be of second order."""
    picked = np.flatnonzero(np.arange(3 * num // 2 + 1) % 3 != 2)
    grids = [samplers.log_snr(SCHEDULES[c], 3 * num // 2, t_start=a, t_end=b) for c, (a, b) in CASES.items()]
    return jnp.stack([grid[picked] for grid in grids])


@pytest.fixture(scope="module")
def references():
    """(x [cases, 3, 2] at the first time, x at the last): one point in each mode, followed up the flow to 1e-12."""
    density, index = rotated_mixture(2), jnp.asarray([list(SCHEDULES).index(case) for case in CASES])

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, 0))
    def solve(index, t0, t1):
        ended = densities.diffuse(density, switched(index), t1)
        field = densities.velocity(density, switched(index))
        x1 = ended.means + jnp.linalg.cholesky(ended.covariances) @ jnp.asarray([0.6, -0.4])
        up = lambda x: solvers.odeint(  # noqa: E731
            field, x, t0=t1, t1=t0, rtol=1e-12, atol=1e-12, solver=diffrax.Dopri8(), throw=False
        )
        return jax.vmap(up)(x1), x1

    return solve(index, *(jnp.asarray([case[i] for case in CASES.values()]) for i in (0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_orders_of_the_flow(name, references):
    """|x - x_ref| with 64 and with 256 steps on rotated mixtures, on two schedules, in uneven steps, begun where D
    already changes, so that first steps count: orders within 0.15 of theory, error against evaluations."""
    density, index = rotated_mixture(2), [list(SCHEDULES).index(case) for case in CASES]
    x0, exact = references
    assert np.all(np.isfinite(x0))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, 0))
    def ends(index, x0, times):
        schedule = switched(index)
        model = densities.noise(density, schedule)
        return jax.vmap(lambda x: DETERMINISTIC[name](None, model, schedule, x, times))(x0)

    errors, nums = [], [64, 256]
    for num in nums:
        times = uneven_times(num)
        errors.append(jnp.sqrt(jnp.mean((ends(jnp.asarray(index), x0, times) - exact) ** 2, axis=(1, 2))))
    for case, values in zip(CASES, np.asarray(errors).T, strict=True):
        assert abs(fitted_order(nums, values) - ORDERS[name]) < 0.15, (case, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCHASTIC)
def test_weak_orders(name):
    """Errors of mean and covariance for rotated Gaussian data, exact: their order from 64 to 256 steps is within
    0.15 of theory, on two schedules. Churn of 8 over N steps is never cut at sqrt(2) - 1."""
    density, index = gaussian_data(), [list(SCHEDULES).index(case) for case in CASES]
    errors, nums = [], [64, 256]
    for num in nums:
        run = jax.jit(jax.vmap(lambda i, t, num=num: law_error(STOCHASTIC[name], density, switched(i), t, 2 * num + 1)))
        times = uneven_times(num)
        errors.append(run(jnp.asarray(index), times))
    for case, values in zip(CASES, np.asarray(errors).T, strict=True):
        assert abs(fitted_order(nums, values) - ORDERS[name]) < 0.15, (case, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_moments_of_a_rotated_mixture(name):
    """4,000 draws on vp and on linear, from the exact law at t = 0.999 down to 0: means, covariances and the weights
    of the modes, by the posterior of the components, within 4 standard errors. First-order methods take 250 steps and
    others 80, so that their bias is small beside that. False alarms: 8 entries, 2 schedules, 12 samplers, 1.2e-2 in
    all; the keys are fixed."""
    density, num = rotated_mixture(2), 4_000
    steps = 250 if ORDERS.get(name, 1) == 1 else 80

    @jax.jit
    def draw(index, keys, x, times):
        schedule = switched(index)
        model = densities.velocity(density, schedule)
        one = lambda key, x: ALL[name](key, model, schedule, x, times, prediction="velocity")  # noqa: E731
        x = jax.vmap(one)(keys, x)
        parts = jax.vmap(lambda x: component_log_probs(density, x) + jnp.log(density.weights))(x)
        centred = x - densities.mean(density)[None]
        products = jnp.stack([centred[:, 0] ** 2, centred[:, 0] * centred[:, 1], centred[:, 1] ** 2], 1)
        return jnp.concatenate([centred, products, jax.nn.softmax(parts)], axis=1)

    covariance = densities.covariance(density)[np.triu_indices(2)]
    exact = np.concatenate([np.zeros(2), covariance, density.weights])
    for case in CASES:
        schedule = SCHEDULES[case]
        begin = densities.diffuse(density, schedule, jnp.asarray(0.999))
        x = densities.sample(jax.random.key(3), begin, num)
        times = samplers.log_snr(schedule, steps, t_start=0.999, t_end=2e-3, denoise=True)
        values = np.asarray(
            draw(jnp.asarray(list(SCHEDULES).index(case)), jax.random.split(jax.random.key(4), num), x, times)
        )
        z = (values.mean(0) - exact) / (values.std(0) / math.sqrt(num))
        assert np.all(np.abs(z) < 4), (case, z)


def component_log_probs(density, x):
    """log N(x; mean_k, covariance_k) for each k."""
    return jax.vmap(lambda m, c: jax.scipy.stats.multivariate_normal.logpdf(x, m, c))(
        density.means, density.covariances
    )


# ----------------------------------------------------------------------------------------- one is another, exactly


def test_ddim_with_eta_1_is_ancestral_sampling():
    """Draw by draw for the same key, on the steps of an uneven chain, to 1e-10."""
    chain = ddpm.chain(np.random.default_rng(0).uniform(0.01, 0.6, 40))
    path = ddpm.as_schedule(chain)
    noise = densities.noise(rotated_mixture(2), path)
    x = jnp.asarray([0.4, -1.2])
    times = jnp.arange(40, -1, -1) / 40
    ours = jax.jit(lambda key: samplers.ddim(key, noise, path, x, times, eta=1.0))
    theirs = jax.jit(lambda key: ddpm.ancestral(key, ddpm.at_steps(noise, chain), chain, x))
    for seed in range(3):
        key = jax.random.key(seed)
        np.testing.assert_allclose(ours(key), theirs(key), rtol=1e-10, atol=1e-10)


def test_samplers_that_are_the_same_are_equal():
    density, schedule = rotated_mixture(2), schedules.vp()
    model, x = densities.noise(density, schedule), jnp.asarray([0.4, -1.2])
    times = samplers.karras(schedule, 9, denoise=True)

    @jax.jit
    def pairs(key, x):
        a = (model, schedule, x, times)
        return {
            "euler without churn is ddim": (samplers.euler(None, *a), samplers.ddim(None, *a)),
            "Adams-Bashforth of order 1 is ddim": (
                samplers.exponential_adams_bashforth(*a, order=1),
                samplers.ddim(None, *a),
            ),
            "without corrections ancestral": (
                samplers.predictor_corrector(key, *a, num_corrections=0),
                samplers.ddim(key, *a, eta=1.0),
            ),
            "eta may be traced": (samplers.ddim(key, *a, eta=jnp.zeros(())), samplers.ddim(None, *a)),
            "no churn in an empty range": (
                samplers.heun(key, *a, churn=5.0, churn_range=(1e6, 1e7)),
                samplers.heun(None, *a),
            ),
        }

    for name, (one, other) in pairs(KEY, x).items():
        np.testing.assert_allclose(one, other, rtol=1e-11, err_msg=name)


@pytest.mark.parametrize("name", ALL)
def test_known_and_traced_times_give_the_same(name):
    """On linear from t = 1, where alpha = 0, down to 0: both ends are of first order then, also where the times are
    tracers and it cannot be known; and the noises have the same numbers."""
    schedule, x, times = schedules.linear(), jnp.asarray([0.4, -1.2]), np.linspace(1.0, 0.0, 6)
    model = densities.velocity(rotated_mixture(2), schedule)
    draw = lambda key, times: ALL[name](key, model, schedule, x, times, prediction="velocity")  # noqa: E731
    traced, known = jax.jit(draw)(KEY, jnp.asarray(times)), jax.jit(lambda key: draw(key, times))(KEY)
    assert np.all(np.isfinite(known))
    np.testing.assert_allclose(traced, known, rtol=1e-11)


@pytest.mark.parametrize("name", ["dpm_solver_2s", "dpm_solver_2m_sde"])
def test_every_kind_of_prediction_gives_the_same(name):
    """On sub_vp from 0.99 down to 0, to 1e-9."""
    density, schedule, x = rotated_mixture(2), schedules.sub_vp(), jnp.asarray([0.4, -1.2])
    times = samplers.uniform(5, t_start=0.99)

    @jax.jit
    def draw(key):
        draw = lambda kind: ALL[name](key, ORACLES[kind](density, schedule), schedule, x, times, prediction=kind)  # noqa: E731
        return jnp.stack([draw(kind) for kind in KINDS])

    values = draw(KEY)
    np.testing.assert_allclose(values, jnp.broadcast_to(values[0], (5, 2)), rtol=1e-9)


def test_the_corrector_is_langevin_dynamics():
    """Many corrections settle at the law of ``langevin.unadjusted``: along an axis with variance V at t and
    sigma^2 / V = c, at V / (1 - snr^2 c), from whatever they began at."""
    density, schedule, t, snr = gaussian_data(), schedules.vp(), 0.15, 0.5
    model = densities.score(density, schedule)
    times = jnp.asarray([0.8, t])
    run = jax.jit(
        lambda: law(
            lambda key, x: samplers.predictor_corrector(
                key, model, schedule, x, times, prediction="score", snr=snr, num_corrections=200
            ),
            jnp.ones(2), jnp.eye(2), 201,
        )
    )  # fmt: skip
    mean, covariance = run()
    at_t = densities.diffuse(density, schedule, jnp.asarray(t))
    values, vectors = np.linalg.eigh(at_t.covariances[0])
    settled = values / (1 - snr**2 * schedule.variance(jnp.asarray(t)) / values)
    np.testing.assert_allclose(mean, at_t.means[0], atol=1e-8)
    np.testing.assert_allclose(covariance, vectors @ np.diag(settled) @ vectors.T, rtol=1e-8)

    eta = 4 * snr**2 * float(schedule.variance(jnp.asarray(t)))
    step = lambda key, x: langevin.unadjusted(key, model, x, step_size=eta, num_steps=1, t=t)  # noqa: E731
    for one, other in zip(law(step, mean, covariance, 1), (mean, covariance), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-8)


def test_churn_is_edms():
    """From sigma = 2 on edm with data at 0: gamma = min(churn / N, sqrt(2) - 1) inside the range, at most t = 1, and
    the noise is sqrt((1 + gamma)^2 - 1) sigma churn_noise, shrunk with all else by the step to sigma = 0.5."""
    schedule = schedules.edm(80.0)
    times = jnp.asarray([2.0, 0.5]) / 80.0

    @partial(jax.jit, static_argnums=(0, 4))
    def scales(sampler, times, churn, churn_noise, churn_range):
        options = {"prediction": "x0", "churn": churn, "churn_noise": churn_noise, "churn_range": churn_range}
        draw = lambda key, x: sampler(key, lambda t, x, args: 0.0 * x, schedule, x, times, **options)  # noqa: E731
        return jax.jacfwd(partial(with_noises, draw), (0, 1))(jnp.zeros(()), jnp.zeros(5))

    always = (0.0, math.inf)
    for sampler, evaluations in ((samplers.euler, 1), (samplers.heun, 2)):
        for churn, gamma in ((0.1, 0.1), (5.0, math.sqrt(2) - 1)):
            of_x, of_noise = scales(sampler, times, churn, 1.1, always)
            np.testing.assert_allclose(of_x, 0.25 / (1 + gamma), rtol=1e-10)
            expected = np.zeros(5)
            expected[evaluations] = 1.1 * math.sqrt((1 + gamma) ** 2 - 1) * 2 * 0.25 / (1 + gamma)
            np.testing.assert_allclose(of_noise, expected, rtol=1e-8)
        of_x, of_noise = scales(sampler, times, 5.0, 1.0, (2.1, 9.0))
        np.testing.assert_allclose(of_x, 0.25, rtol=1e-12)
        np.testing.assert_array_equal(of_noise, np.zeros(5))
        of_x, of_noise = scales(sampler, jnp.asarray([0.9, 0.5]), 5.0, 1.0, always)  # up to sigma = 80, no further
        np.testing.assert_allclose(of_x, 0.5, rtol=1e-10)
        np.testing.assert_allclose(of_noise[evaluations], 80 * math.sqrt(1 - 0.9**2) * 0.5, rtol=1e-8)


# --------------------------------------------------------------------------------------------- evaluations, traces

EVALUATIONS = {  # in 5 steps: to t_end > 0, to 0, from alpha = 0 to 0
    "ddim": (5, 5, 5), "ddim, eta=0.6": (5, 5, 5), "ddim, eta=1": (5, 5, 5), "euler, churn": (5, 5, 5),
    "heun": (10, 9, 8), "heun, churn": (10, 9, 8), "dpm_solver_2s": (10, 9, 8),
    "dpm_solver_2m": (5, 5, 5), "dpm_solver_2m_sde": (5, 5, 5),
    "adams_bashforth_2": (5, 5, 5), "adams_bashforth_3": (6, 6, 5), "predictor_corrector": (10, 9, 9),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_evaluations(name):
    """As many as the docstring says when they are run, none of them at t = 0, and one in the traced program."""
    seen, traces = [], []

    def model(t, x, args):
        traces.append(t)
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return 0.1 * x

    ends = [(1.0, 0.1, schedules.vp()), (1.0, 0.0, schedules.vp()), (1.0, 0.0, schedules.linear())]
    for (t_start, t_end, schedule), count in zip(ends, EVALUATIONS[name], strict=True):
        seen.clear(), traces.clear()
        times = samplers.uniform(5, t_start=t_start, t_end=t_end)
        draw = jax.jit(lambda key, s=schedule, t=times: ALL[name](key, model, s, jnp.ones(2), t, prediction="x0"))
        jax.block_until_ready(draw(KEY))
        jax.effects_barrier()
        assert len(seen) == count, (t_end, sorted(seen))
        assert min(seen) > 0
        assert len(traces) == 1


def test_other_times_do_not_compile_again_and_examples_do_not_mix():
    schedule = schedules.vp()
    noise = densities.noise(rotated_mixture(2), schedule)
    traces = []

    def model(t, x, args):
        traces.append(t)
        return noise(t, x, args)

    keys, x = jax.random.split(KEY, 3), jnp.asarray(POINTS[:3])
    for name in ("ddim, eta=1", "heun, churn"):
        draw = lambda k, x, t, name=name: ALL[name](k, model, schedule, x, t)  # noqa: E731
        batched = jax.jit(jax.vmap(draw, (0, 0, None)))
        traces.clear()
        values = [batched(keys, x, samplers.uniform(6, t_end=t_end)) for t_end in (0.0, 0.1)]
        assert len(traces) == 1
        assert np.all(np.isfinite(values))
        other = batched(keys.at[2].set(keys[0]), x.at[2].set(x[0]), samplers.uniform(6))
        np.testing.assert_allclose(other[:2], values[0][:2], rtol=1e-9)
        np.testing.assert_allclose(other[2], other[0], rtol=1e-9)
        assert np.min(np.abs(values[0][0] - values[0][1])) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_float32_keeps_its_digits_and_its_dtype(name):
    """300 small steps on vp, to 0: within 2e-3 of float64 with the same noise, and no float64 appears."""
    schedule = schedules.vp()
    density = gaussian_data()
    times = samplers.log_snr(schedule, 300, denoise=True)
    noises = np.random.default_rng(1).normal(size=(601, 2))

    def draw(dtype):
        model = densities.noise(jax.tree.map(lambda a: a.astype(dtype), density), schedule)
        sample = lambda key, x: ALL[name](key, model, schedule, x, times)  # noqa: E731
        return jax.jit(lambda x, z: with_noises(sample, x, z))(jnp.asarray([0.4, -1.2], dtype), noises.astype(dtype))

    single, double = draw(jnp.float32), draw(jnp.float64)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, atol=2e-3)


# ----------------------------------------------------------------------------------------------------------- times


def test_grids():
    """Equal steps of what each says, both ends as they were given."""
    vp, edm, linear = schedules.vp(), schedules.edm(80.0), schedules.linear()
    half = lambda s, t: jax.vmap(lambda t: 0.5 * schedules.log_snr(s, t))(t)  # noqa: E731
    np.testing.assert_allclose(samplers.uniform(4, t_start=0.9, t_end=0.1), [0.9, 0.7, 0.5, 0.3, 0.1], rtol=1e-14)
    np.testing.assert_allclose(samplers.quadratic(4), [1.0, 0.5625, 0.25, 0.0625, 0.0], rtol=1e-14)
    for schedule, t_start in ((vp, 1.0), (edm, 1.0), (linear, 0.999)):
        t = samplers.log_snr(schedule, 50, t_start=t_start)
        steps = np.diff(half(schedule, t))
        np.testing.assert_allclose(steps, np.full(50, steps.mean()), rtol=1e-9)
        t = samplers.karras(schedule, 50, t_start=t_start, rho=3.0, t_end=0.01)
        steps = np.diff(np.exp(-np.asarray(half(schedule, t)) / 3.0))
        np.testing.assert_allclose(steps, np.full(50, steps.mean()), rtol=1e-9)
        assert t[0] == t_start
        assert t[-1] == 0.01
    t = samplers.karras(edm, 18, t_end=0.002 / 80.0, denoise=True)  # the paper's
    assert t.shape == (19,)
    assert t[-1] == 0.0
    np.testing.assert_allclose(80.0 * t[:-1] ** 1.0, [
        (80.0 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7 for i in range(18)
    ], rtol=1e-9)  # fmt: skip
    inside = jax.jit(lambda: samplers.heun(None, lambda t, x, a: x, vp, jnp.ones(2), samplers.log_snr(vp, 3)))
    assert np.all(np.isfinite(inside()))  # times are known inside of jit as well
    for made in (samplers.karras(vp, 200, dtype=jnp.float32), samplers.quadratic(200, dtype=jnp.float32)):
        assert made.dtype == jnp.float32
        assert np.all(np.diff(made) < 0)


# ------------------------------------------------------------------------------------------------------- bad input


def test_prediction_errors_tell_the_kinds_apart():
    """Of an exact model the kind that it is has the least error, by half a unit of variance at least, over 200 draws;
    and that error is what D leaves, E|x_0 - D|^2 / d."""
    density, schedule, t = rotated_mixture(2), schedules.vp(), jnp.asarray(0.3)
    x0 = densities.sample(jax.random.key(1), density, 200)
    noise = jax.random.normal(jax.random.key(2), (200, 2))

    @jax.jit
    def errors(x0, noise):
        one = lambda kind: partial(samplers.prediction_errors, ORACLES[kind](density, schedule), schedule, t)  # noqa: E731
        table = {kind: jax.tree.map(jnp.mean, jax.vmap(one(kind))(x0, noise)) for kind in KINDS}
        x = schedules.alpha(schedule, t) * x0 + schedules.sigma(schedule, t) * noise
        left = x0 - jax.vmap(lambda x: densities.denoiser(density, schedule)(t, x, None))(x)
        return table, jnp.mean(left**2)

    table, left = errors(x0, noise)
    for kind, row in table.items():
        np.testing.assert_allclose(row.pop(kind), left, rtol=1e-9)
        assert min(row.values()) > left + 0.5, (kind, row)


def test_nan_stays_nan():
    schedule, x = schedules.vp(), jnp.ones(2)
    times = samplers.uniform(4)
    steady = lambda t, x, args: jnp.ones(2)  # noqa: E731, D that does not look at x
    broken = lambda t, x, args: jnp.where(jnp.abs(t - 0.75) < 1e-6, jnp.nan, 1.0) * jnp.ones(2)  # noqa: E731
    for name in ("ddim", "heun", "dpm_solver_2m", "adams_bashforth_3", "predictor_corrector"):
        draw = jax.jit(lambda m, x, t, name=name: ALL[name](KEY, m, schedule, x, t, prediction="x0"), static_argnums=0)
        assert np.all(np.isfinite(draw(steady, x, times)))
        assert np.all(np.isnan(draw(steady, x.at[:].set(jnp.nan), times)))
        assert np.all(np.isnan(draw(broken, x, times)))
        for wrong in (times[::-1], times.at[2].set(0.75), times - 0.1, times + 0.1, times.at[1].set(jnp.nan)):
            assert np.all(np.isnan(draw(steady, x, wrong)))  # traced: no error can be raised


def test_bad_arguments():
    vp, x, key = schedules.vp(), jnp.ones(2), jax.random.key(0)
    same = lambda t, x, args: x  # noqa: E731
    times = samplers.uniform(4)
    with pytest.raises(ValueError, match=r"times must fall, from noise to data, got 0.0 and then 0.25 at index 1"):
        samplers.ddim(None, same, vp, x, times[::-1])
    with pytest.raises(ValueError, match="times must fall"):
        samplers.heun(None, same, vp, x, np.array([1.0, 0.5, 0.5, 0.1]))
    with pytest.raises(ValueError, match="in float32"):
        samplers.heun(None, same, vp, x.astype(jnp.float32), np.array([1.0, 0.5, 0.5 - 1e-12]))
    with pytest.raises(ValueError, match="times must be finite, got nan"):
        samplers.dpm_solver_2m(same, vp, x, np.array([1.0, math.nan, 0.1]))
    with pytest.raises(ValueError, match=r"times must be in \[0, 1\], got 1.5 first"):
        samplers.dpm_solver_2s(same, vp, x, np.array([1.5, 0.5]))
    with pytest.raises(ValueError, match=r"times must have shape \[N \+ 1\] .* got shape \(1,\)"):
        samplers.euler(None, same, vp, x, np.array([1.0]))
    with pytest.raises(TypeError, match="times must be an array of floats"):
        samplers.ddim(None, same, vp, x, np.array([1, 0]))
    for few, draw in (
        (1, samplers.dpm_solver_2m),
        (1, partial(samplers.dpm_solver_2m_sde, key)),
        (2, samplers.exponential_adams_bashforth),
    ):
        with pytest.raises(ValueError, match=rf"at least {few + 1} steps for a method of this order, got {few}"):
            draw(same, vp, x, samplers.uniform(few))
    with pytest.raises(ValueError, match="order must be 1, 2 or 3, got 4"):
        samplers.exponential_adams_bashforth(same, vp, x, times, order=4)
    with pytest.raises(ValueError, match="prediction must be one of score, noise, x0, v, velocity, got 'eps'"):
        samplers.ddim(None, same, vp, x, times, prediction="eps")
    with pytest.raises(ValueError, match=r"prediction 'noise' says nothing of the data at .*where alpha is 0"):
        samplers.ddim(None, same, schedules.linear(), x, times)
    with pytest.raises(TypeError, match=r"key must be a typed key, got NoneType: .*jax\.random\.key"):
        samplers.ddim(None, same, vp, x, times, eta=0.5)
    with pytest.raises(TypeError, match="key must be a typed key"):
        samplers.heun(jax.random.PRNGKey(0), same, vp, x, times, churn=1.0)
    with pytest.raises(ValueError, match=r"jax\.vmap over the keys"):
        samplers.dpm_solver_2m_sde(jax.random.split(key), same, vp, x, times)
    with pytest.raises(ValueError, match="eta must be at least 0 and finite, got -1"):
        samplers.ddim(key, same, vp, x, times, eta=-1.0)
    assert np.all(np.isnan(samplers.ddim(key, same, vp, x, times, eta=1.5)))  # more noise than there is
    for option in ("churn", "churn_noise"):
        with pytest.raises(ValueError, match=f"{option} must be at least 0 and finite, got nan"):
            samplers.heun(key, same, vp, x, times, **{"churn": 1.0, option: math.nan})
    with pytest.raises(ValueError, match="churn_range must be"):
        samplers.euler(key, same, vp, x, times, churn=1.0, churn_range=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"snr must be in \(0, 1\), got 1.0"):
        samplers.predictor_corrector(key, same, vp, x, times, snr=1.0)
    with pytest.raises(ValueError, match="num_corrections must be at least 0, got -1"):
        samplers.predictor_corrector(key, same, vp, x, times, num_corrections=-1)
    with pytest.raises(ValueError, match=r"model returned shape \(\): .*the shape of one example, \(2,\)"):
        samplers.ddim(None, lambda t, x, args: x[0], vp, x, times)
    with pytest.raises(TypeError, match="model returned dtype float32 for x of float64"):
        samplers.ddim(None, lambda t, x, args: x.astype(jnp.float32), vp, x, times)
    with pytest.raises(TypeError, match="x must be an array of floats"):
        samplers.ddim(None, same, vp, jnp.ones(2, int), times)

    with pytest.raises(ValueError, match="num_steps must be a positive integer, got 0"):
        samplers.uniform(0)
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 2, got 1"):
        samplers.karras(vp, 1, denoise=True)
    for ends in ({"t_start": 0.0}, {"t_end": 1.0}, {"t_start": 1.1}, {"t_end": -0.1}, {"t_end": math.nan}):
        with pytest.raises(ValueError, match="0 <= t_end < t_start <= 1"):
            samplers.quadratic(4, **ends)
    with pytest.raises(ValueError, match=r"must be finite at both ends, got -inf at t_start=1.0.*t_start=0.999"):
        samplers.log_snr(schedules.linear(), 4)
    with pytest.raises(ValueError, match=r"must be finite at both ends.*denoise=True"):
        samplers.karras(vp, 4, t_end=0.0)
    with pytest.raises(ValueError, match=r"rho must be at least 1 and finite, got 0.5"):
        samplers.karras(vp, 4, rho=0.5)
    with pytest.raises(ValueError, match=r"must fall.*float32"):
        samplers.uniform(4, t_end=1.0 - 1e-9, dtype=jnp.float32)
    chain = ddpm.linear(10, 0.01, 0.2)
    with pytest.raises(TypeError, match="schedule holds tracers"):
        jax.jit(lambda chain: samplers.log_snr(ddpm.as_schedule(chain), 4))(chain)
    with pytest.raises(ValueError, match=r"noise has shape \(3,\) and x0 \(2,\)"):
        samplers.prediction_errors(same, vp, 0.5, x, jnp.ones(3))
    with pytest.raises(ValueError, match=r"t must lie between 0 and 1, .*got 0\.0"):
        samplers.prediction_errors(same, vp, 0.0, x, x)
