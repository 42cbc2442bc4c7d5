"""Guidance: exact on labelled mixtures at gamma = 1, and not what one might think at gamma = 2."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import points, sweep
from targets import SCHEDULES, rotated_mixture, rotation

from dgm_jax import ddpm, densities, guidance, schedules, sdes, solvers
from dgm_jax.types import SDE, Chain, Schedule

LABELS = (0, 1, 0)  # classes of the three components
TIMES = np.array([0.0, 0.02, 0.3, 0.7, 1.0])


def exact(density, schedule, y):
    """score, conditional score, log p(y | x_t)."""
    one = densities.condition(density, LABELS, y)
    log_prob_y = densities.log_prob_y(density, schedule, LABELS, y)
    return densities.score(density, schedule), densities.score(one, schedule), log_prob_y


def test_gamma_0_and_1_are_exact_and_the_rest_is_linear():
    """Under six schedules, both ways: 1e-10 at gamma = 1, equality at 0, and the line through these at 3.5 and -2."""
    density = rotated_mixture(3)

    def make(schedule):
        score, conditional, log_prob_y = exact(density, schedule, 0)

        def fields(t, x, args):
            def both(gamma):
                by_classifier = guidance.classifier(score, log_prob_y, gamma)(t, x, args)
                return jnp.stack([by_classifier, guidance.classifier_free(conditional, score, gamma)(t, x, args)])

            truth = jnp.stack([score(t, x, args), conditional(t, x, args)])
            implied = guidance.implied_gradient(conditional, score)(t, x, args)
            traced = jax.vmap(both)(jnp.asarray([0.0, 1.0, 3.5]))
            known = jnp.stack([both(gamma) for gamma in (0.0, 1.0, 3.5, -2.0)])
            return truth, implied, jax.grad(lambda z: log_prob_y(t, z, args))(x), traced, known

        return fields

    names = []
    for name, (truth, implied, gradient, traced, known) in sweep(make, TIMES, points(3)):
        names.append(name)
        unconditional, conditional = truth[:, :, 0, None], truth[:, :, 1, None]
        assert np.abs(conditional - unconditional).max() > 0.5  # the class matters
        close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10, err_msg=name)
        close(implied, gradient)
        close(known[:, :, 1], np.broadcast_to(conditional, known[:, :, 1].shape))
        close(traced, known[:, :, :3])
        for values in (traced[:, :, 0], known[:, :, 0]):
            np.testing.assert_array_equal(values, np.broadcast_to(unconditional, values.shape))
        for index, gamma in ((2, 3.5), (3, -2.0)):
            line = known[:, :, 0] + gamma * (known[:, :, 1] - known[:, :, 0])
            close(known[:, :, index], line, rtol=1e-9, atol=1e-9)
    assert names == list(SCHEDULES)


BETAS = np.linspace(1e-3, 0.2, 40)
CHAIN = Chain(jnp.asarray(BETAS), jnp.asarray(np.cumprod(1 - BETAS)))


def exact_noise(density, chain, y):
    """noise, conditional noise and log p(y | x_n) along a chain."""
    steps = Schedule(  # the oracle's clock is the step
        lambda n: 0.5 * jnp.log(chain.alpha_bars[n.astype(jnp.int32)]),
        lambda n: 1 - chain.alpha_bars[n.astype(jnp.int32)],
    )

    def clocked(field):
        def on_steps(n, x, args):
            assert n.dtype == jnp.int32  # a chain's model is called with the step itself
            return field(n.astype(x.dtype), x, args)

        return on_steps

    fields = (
        densities.noise(density, steps),
        densities.noise(densities.condition(density, LABELS, y), steps),
        densities.log_prob_y(density, steps, LABELS, y),
    )
    return tuple(map(clocked, fields))


def test_noise_of_a_chain():
    """The noise predictions of a mixture along a chain: 1e-10 at gamma = 1, both ways, first and last step too."""
    noise, conditional, log_prob_y = exact_noise(rotated_mixture(3), CHAIN, 0)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    @partial(jax.vmap, in_axes=(None, 0))
    def values(n, x):
        by_classifier = [guidance.classifier_noise(noise, log_prob_y, CHAIN, gamma)(n, x) for gamma in (0.0, 1.0, 2.0)]
        free = [guidance.classifier_free(conditional, noise, gamma)(n, x) for gamma in (0.0, 1.0, 2.0)]
        within = [
            guidance.classifier_noise(noise, log_prob_y, CHAIN, 2.0, interval=(10, 20))(n, x),
            guidance.classifier_free(conditional, noise, 2.0, interval=(10, 20))(n, x),
        ]
        truth = jnp.stack([noise(n, x, None), conditional(n, x, None)])
        return truth, jnp.stack([jnp.stack(by_classifier), jnp.stack(free)]), jnp.stack(within)

    n = jnp.asarray([0, 9, 10, 20, 21, 39], jnp.int32)
    truth, found, within = (np.asarray(value) for value in values(n, points(3)))
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    for way in (0, 1):
        np.testing.assert_array_equal(found[:, :, way, 0], truth[:, :, 0])
        close(found[:, :, way, 1], truth[:, :, 1])
        close(found[:, :, way, 2], 2 * truth[:, :, 1] - truth[:, :, 0])
        acts = np.array([False, False, True, True, False, False])
        close(within[acts, :, way], found[acts, :, way, 2])
        close(within[~acts, :, way], truth[~acts, :, 1])
    assert np.abs(truth[:, :, 1] - truth[:, :, 0]).max() > 0.3

    field = guidance.classifier_noise(noise, log_prob_y, CHAIN, 2.0)
    assert np.all(np.isnan(jax.jit(jax.vmap(field, (0, None)))(jnp.asarray([-1, 40], jnp.int32), points(3)[0])))
    for bad in (-1, 40):
        with pytest.raises(ValueError, match=f"n must be a step of the chain, from 0 to 39, got {bad}"):
            field(bad, points(3)[0])
    with pytest.raises(TypeError, match="n must be an integer"):
        field(0.5, points(3)[0])
    with pytest.raises(ValueError, match=r"alpha_bars must have shape \[T\]"):
        guidance.classifier_noise(noise, log_prob_y, CHAIN._replace(alpha_bars=jnp.asarray(0.5)), 2.0)
    with pytest.raises(ValueError, match=r"betas must have the shape \[T\] of chain.alpha_bars, \(40,\), got .*\(3,\)"):
        guidance.classifier_noise(noise, log_prob_y, CHAIN._replace(betas=jnp.ones(3)), 2.0)


def test_a_step_out_of_the_chain_is_nan_at_any_scale_and_steps_of_few_bits_are_in_it():
    """Of 1,000 steps, at gamma 0, 1, and 0 in an interval: NaN where a traced n is none; a uint8 counts as itself."""
    chain = ddpm.linear(1000)
    model, log_p = (lambda n, x, args: x * n.astype(x.dtype)), (lambda n, x, args: -jnp.sum(x**2))
    fields = [guidance.classifier_noise(model, log_p, chain, gamma) for gamma in (0.0, 1.0)]
    fields.append(guidance.classifier_noise(model, log_p, chain, 0.0, interval=(0, 999)))
    values = jax.jit(jax.vmap(lambda n: jnp.stack([field(n, jnp.ones(2)) for field in fields])))
    assert np.isnan(values(jnp.asarray([-1, 1000]))).all()
    np.testing.assert_array_equal(values(jnp.asarray([3, 255], jnp.uint8)), values(jnp.asarray([3, 255])))
    assert np.isfinite(values(jnp.asarray([3, 255]))).all()


def test_the_first_steps_of_a_fine_chain_in_float32():
    """sqrt(1 - alpha_bar_n) of betas from 1e-5 on: relative error below 1e-6, where 1 less a float32 has 7e-4."""
    betas = np.linspace(1e-5, 1e-3, 20)
    chain = ddpm.chain(betas, dtype=jnp.float32)
    field = guidance.classifier_noise(lambda n, x, args: 0 * x, lambda n, x, args: jnp.sum(x), chain, 1.0)
    found = jax.jit(jax.vmap(lambda n: field(n, jnp.ones(1, jnp.float32))))(jnp.arange(20))
    assert found.dtype == jnp.float32
    exact = -np.sqrt(-np.expm1(np.cumsum(np.log1p(-betas))))
    np.testing.assert_allclose(np.asarray(found, np.float64)[:, 0], exact, rtol=1e-6)


@pytest.mark.slow
def test_ancestral_sampling_with_a_classifier_has_the_law_of_the_class():
    """Guided ancestral sampling in 1,000 steps at gamma = 1: nine moments of p(x | y), z-scores below 4.5.

    False alarm: 9 times 7e-6. 2,000 samples; the steps' own bias, of order 1 / 1,000, is below one standard error.
    The mean of the other class is more than 20 standard errors away.
    """
    density, chain = rotated_mixture(3), ddpm.linear(1000)
    noise, _, log_prob_y = exact_noise(density, chain, 1)
    guided = guidance.classifier_noise(noise, log_prob_y, chain, 1.0)
    num = 2000

    @jax.jit
    def draw():
        z = jax.random.normal(jax.random.key(5), (num, 3))
        keys = jax.random.split(jax.random.key(6), num)
        return jax.vmap(lambda key, z: ddpm.ancestral(key, guided, chain, z))(keys, z)

    x = np.asarray(draw())
    wanted, other = (densities.condition(density, LABELS, y) for y in (1, 0))
    mean, covariance = np.asarray(densities.mean(wanted)), np.asarray(densities.covariance(wanted))
    upper = np.triu_indices(3)
    values = np.concatenate([x, ((x - mean)[:, :, None] * (x - mean)[:, None])[:, *upper]], axis=1)
    error = values.std(0, ddof=1) / np.sqrt(num)
    z_scores = (values.mean(0) - np.concatenate([mean, covariance[upper]])) / error
    assert np.abs(z_scores).max() < 4.5, z_scores
    assert np.abs((np.asarray(densities.mean(other)) - mean) / error[:3]).max() > 20


def test_interval():
    """Within it, ends included, gamma counts; elsewhere it is 1. A gamma of 0 too, and one that is traced. Its ends
    may be one."""
    density, schedule = rotated_mixture(3), schedules.cosine()
    score, conditional, log_prob_y = exact(density, schedule, 1)
    x = points(3)[1]

    @jax.jit
    def values(ts, traced):
        def at(t):
            both = [
                (
                    guidance.classifier(score, log_prob_y, gamma, interval=(0.25, 0.5))(t, x),
                    guidance.classifier_free(conditional, score, gamma, interval=(0.25, 0.5))(t, x),
                )
                for gamma in (0.0, 1.0, 2.0, traced)
            ]
            return jnp.asarray(both), score(t, x), conditional(t, x)

        return jax.lax.map(at, ts)

    found, s, c = (np.asarray(value) for value in values(jnp.asarray([0.2, 0.25, 0.4, 0.5, 0.6]), -1.5))
    for index, gamma in enumerate((0.0, 1.0, 2.0, -1.5)):
        g = np.array([1, gamma, gamma, gamma, 1])[:, None]
        for way in (0, 1):
            np.testing.assert_allclose(found[:, index, way], (1 - g) * s + g * c, rtol=1e-10, atol=1e-10)

    one = guidance.classifier_noise(lambda n, x, args: x, lambda n, x, args: jnp.sum(x), CHAIN, 3.0, interval=(5, 5))
    pulls = (1 - np.asarray([one(n, jnp.ones(1))[0] for n in (4, 5, 6)])) / np.sqrt(1 - np.cumprod(1 - BETAS)[4:7])
    np.testing.assert_allclose(pulls, [1.0, 3.0, 1.0], rtol=1e-12)


@pytest.mark.slow
def test_only_what_is_needed_is_evaluated():
    """Evaluations are counted where they happen, in a batch of three solved in 20 steps."""
    counts = {"conditional": 0, "unconditional": 0}

    def counted(name, value):
        def note():
            counts[name] += 1

        def field(t, x, args):
            jax.debug.callback(note)
            return jnp.full_like(x, value)

        return field

    def solve(gamma, interval):
        field = guidance.classifier_free(
            counted("conditional", 1.0), counted("unconditional", 0.0), gamma, interval=interval
        )
        sde = SDE(field, lambda t, x, args: jnp.zeros((), x.dtype))
        batch = jax.vmap(lambda x: solvers.euler_maruyama(jax.random.key(0), sde, x, t0=1.0, t1=0.0, num_steps=20))
        counts.update(conditional=0, unconditional=0)
        x = jax.block_until_ready(jax.jit(batch)(jnp.zeros((3, 2))))
        jax.effects_barrier()
        return float(x[0, 0]), counts["conditional"], counts["unconditional"]

    # steps begin at t = 1, 0.95 .. 0.05: those from 0.6 down to 0.25 are 8
    assert solve(2.0, (0.24, 0.61)) == (pytest.approx(-(8 * 2 + 12) / 20), 20, 8)
    assert solve(0.0, (0.24, 0.61)) == (pytest.approx(-12 / 20), 12, 8)
    assert solve(1.0, (0.24, 0.61)) == (pytest.approx(-1.0), 20, 0)
    assert solve(1.0, None) == (pytest.approx(-1.0), 20, 0)
    assert solve(0.0, None) == (0.0, 0, 20)


def test_a_classifier_of_scale_zero_is_not_evaluated():
    def never(*_):
        raise AssertionError("evaluated")

    x = jnp.ones(2)
    score = lambda t, x, args: -x  # noqa: E731
    np.testing.assert_array_equal(guidance.classifier(score, never, 0.0)(0.5, x), -x)
    np.testing.assert_array_equal(guidance.classifier_noise(score, never, CHAIN, 0)(3, x), -x)
    np.testing.assert_array_equal(guidance.classifier_free(never, score, jnp.asarray(0.0))(0.5, x), -x)
    np.testing.assert_array_equal(guidance.classifier_free(score, never, 1)(0.5, x), -x)


# ------------------------------------------------------------------------ what is sampled at gamma other than 1


def measured(gamma, variance, schedule):
    """Guided score for x_0 ~ N(0, 1) and a measurement y = 0 of it that leaves this variance."""
    error = variance / (1 - variance)  # variance of the error of the measurement

    def log_prob_y(t, x, args):
        a2 = schedules.alpha(schedule, t) ** 2
        # x_0 given x_t is N(alpha x_t, sigma^2), since x_t ~ N(0, 1)
        return jnp.sum(jax.scipy.stats.norm.logpdf(0.0, jnp.sqrt(a2) * x, jnp.sqrt(1 - a2 + error)))

    return guidance.classifier(lambda t, x, args: -x, log_prob_y, gamma)


@pytest.mark.slow
def test_the_variance_that_the_probability_flow_samples():
    """One Gaussian: the flow is linear, and it multiplies variances by v^gamma, not 1 / (1 - gamma + gamma / v)."""
    v, schedule = 0.5, schedules.vp()

    @jax.jit
    @jax.vmap
    def stretch(gamma):
        velocity = sdes.probability_flow(sdes.diffusion_process(schedule), measured(gamma, v, schedule))
        return solvers.odeint(velocity, jnp.ones(1), t0=1.0, t1=0.0, rtol=1e-9, atol=1e-9)[0]

    gamma = np.array([0.5, 1.0, 2.0])
    found = np.asarray(stretch(jnp.asarray(gamma))) ** 2
    last = 1 - float(schedules.alpha(schedule, jnp.asarray(1.0))) ** 2 * (1 - v)  # variance left at t = 1
    np.testing.assert_allclose(found, (v / last) ** gamma, rtol=1e-6)
    gap = found - 1 / (1 - gamma + gamma / v)
    assert abs(gap[1]) < 1e-4 < 0.08 < abs(gap[2])  # at gamma = 2, 0.25 and 0.3333


def test_the_variance_that_the_reverse_sde_samples():
    """As above by the reverse SDE: (v - v^(2 gamma)) / ((1 - v) (2 gamma - 1)), 0.2917 for v = 1/2 and gamma = 2.

    The drift is linear in x, so its slopes tell the variance of every Euler-Maruyama step without a sample:
    V -> (1 + slope dt)^2 V + g^2 dt. The error falls as the step; Richardson's extrapolation of 2,000 and 4,000
    steps leaves about 1e-5.
    """
    v, gamma, schedule = 0.5, 2.0, schedules.vp()
    reverse = sdes.reverse(sdes.diffusion_process(schedule), measured(gamma, v, schedule))
    one = jnp.ones(1)

    def variance(num_steps):
        dt = 1.0 / num_steps

        def step(value, n):
            t = 1.0 - n * dt
            slope = reverse.drift(t, one, None)[0]
            return (1 - slope * dt) ** 2 * value + reverse.diffusion(t, one, None) ** 2 * dt, None

        return jax.lax.scan(step, jnp.ones(()), jnp.arange(num_steps, dtype=float))[0]

    coarse, fine = jax.jit(lambda: (variance(2000), variance(4000)))()
    truth = (v - v ** (2 * gamma)) / ((1 - v) * (2 * gamma - 1))
    np.testing.assert_allclose(2 * fine - coarse, truth, rtol=2e-4)  # alpha(1)^2 = 4.3e-5 of the data is still there


def plane():
    """A labelled mixture in the plane whose classes overlap: two modes of class 0, between them one of class 1."""
    turn = rotation(2, 5)
    means = np.array([[-1.6, 0.0], [0.3, 0.4], [1.8, -0.3]]) @ turn.T
    covariances = np.stack([turn @ np.diag(d) @ turn.T for d in ([0.5, 0.2], [0.25, 0.6], [0.3, 0.4])])
    return densities.Mixture(jnp.asarray([0.35, 0.4, 0.25]), jnp.asarray(means), jnp.asarray(covariances))


def moments(x):
    return jnp.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]], axis=1)


@jax.jit
def tilted_moments(gammas):
    """First and second moments of p(x) p(y = 0 | x)^gamma / Z, by the trapezoidal rule on a fine grid."""
    one = densities.condition(plane(), LABELS, 0)
    axis = jnp.linspace(-7.0, 7.0, 281)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    joint, given = jax.vmap(lambda x: (densities.log_prob(plane(), x), densities.log_prob(one, x)))(grid)
    log_class = given + jnp.log(0.6) - joint
    return jax.vmap(lambda gamma: jax.nn.softmax(joint + gamma * log_class) @ moments(grid))(gammas)


@pytest.mark.slow
def test_what_is_sampled_at_gamma_2_is_not_the_tilted_density():
    """5,000 samples by the exact scores, gamma 1 and 2, against p(x) p(y | x)^gamma by quadrature.

    By the probability flow and by the reverse SDE; z-scores of five moments, both in 400 steps of Euler-Maruyama. At
    gamma = 1 none is beyond 4.5 (false alarm: 10 times 7e-6); at gamma = 2 each has one beyond 10, which by chance, if
    the densities agreed, comes less than once in 10^22 times.
    """
    density, schedule = plane(), schedules.vp()
    score, conditional, _ = exact(density, schedule, 0)
    process = sdes.diffusion_process(schedule)
    num = 5000
    keys, z = jax.random.split(jax.random.key(2), num), jax.random.normal(jax.random.key(1), (num, 2))

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0))
    @partial(jax.vmap, in_axes=(0, None))
    def draw(gamma, noise):  # noise 1: the reverse SDE, noise 0: the probability flow
        field = guidance.classifier_free(conditional, score, gamma)
        reverse, flow = sdes.reverse(process, field), sdes.probability_flow(process, field)
        mixed = SDE(
            lambda t, x, args: noise * reverse.drift(t, x, args) + (1 - noise) * flow(t, x, args),
            lambda t, x, args: noise * reverse.diffusion(t, x, args),
        )
        one = partial(solvers.euler_maruyama, t0=1.0, t1=0.0, num_steps=400)
        x = jax.vmap(lambda key, z: one(key, mixed, z))(keys, z)
        values = moments(x)
        return jnp.mean(values, axis=0), jnp.std(values, axis=0, ddof=1) / np.sqrt(num)

    gammas = jnp.asarray([1.0, 2.0])
    mean, stderr = (np.asarray(value) for value in draw(gammas, jnp.asarray([0.0, 1.0])))
    z_scores = np.abs((mean - np.asarray(tilted_moments(gammas))) / stderr).max(axis=-1)
    assert np.all(z_scores[:, 0] < 4.5), z_scores
    assert np.all(z_scores[:, 1] > 10), z_scores


# --------------------------------------------------------------------------------------------- labels and losses


def toy_logits(t, x, params):
    return params @ x + t


def test_log_prob_y_of_logits():
    """Against probabilities known by hand: logits (log 1, log 2, log 5) are 1/8, 2/8, 5/8. Of 256 equal classes each
    has 1/256, by a label of 8 bits too."""
    params = jnp.log(jnp.asarray([[1.0, 0.0], [2.0, 0.0], [5.0, 0.0]]).at[:, 1].set(1.0))
    field = guidance.log_prob_y(toy_logits)
    x = jnp.asarray([1.0, 0.0])
    found = [field(0.3, x, (params, y)) for y in range(3)]
    np.testing.assert_allclose(np.exp(found), [1 / 8, 2 / 8, 5 / 8], rtol=1e-12)
    guided = guidance.classifier(lambda t, x, args: jnp.zeros_like(x), field, 2.0)(0.3, x, (params, 2))
    mean = np.array([1, 2, 5]) @ np.asarray(params) / 8  # gradient of log softmax: own row less the mean row
    np.testing.assert_allclose(guided, 2 * (np.asarray(params)[2] - mean), rtol=1e-12)
    many = jax.jit(lambda y: field(0.3, x, (jnp.zeros((256, 2)), y)))
    assert float(many(jnp.uint8(255))) == pytest.approx(-np.log(256), rel=1e-12)


def test_a_label_outside_the_classes_is_an_error_or_nan():
    """Not the last class, and no zero gradient, which would pass for an unconditional sample."""
    params, x = jnp.ones((3, 2)), jnp.ones(2)
    field = guidance.log_prob_y(toy_logits)
    guided = guidance.classifier(lambda t, x, args: -x, field, 2.0)
    values = jax.jit(jax.vmap(lambda y: (field(0.5, x, (params, y)), guided(0.5, x, (params, y)))))
    for found in values(jnp.asarray([-1, 3, 4])):
        assert np.all(np.isnan(found))
    loss = lambda p, y: guidance.cross_entropy(toy_logits, schedules.vp(), 0.5, x, x, y, p)  # noqa: E731
    for found in jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params, 3)):
        assert np.all(np.isnan(found))
    for y in (-1, 3):
        with pytest.raises(ValueError, match=f"from 0 to 2, got {y}"):
            field(0.5, x, (params, y))
        with pytest.raises(ValueError, match=f"from 0 to 2, got {y}"):
            loss(params, y)
    with pytest.raises(TypeError, match="one integer"):
        loss(params, 1.0)
    with pytest.raises(TypeError, match="one integer"):
        loss(params, jnp.asarray([0, 1]))
    with pytest.raises(ValueError, match=r"logits must have shape \[num_classes\]"):
        guidance.cross_entropy(lambda t, x, p: jnp.ones((2, 3)), schedules.vp(), 0.5, x, x, 0)


def test_cross_entropy_is_least_at_the_exact_classifier():
    """E over (x_0, y, eps) by samples: the exact log p(y | x_t) has gradient zero, within 4.5 standard errors.

    The model is the exact one with its logits scaled by a and shifted by b; d/da and d/db are means of 5,000 terms.
    """
    density, schedule, t = rotated_mixture(3), schedules.vp(), 0.25
    log_probs = densities.class_log_probs(density, schedule, LABELS)

    def logits(t, x, params):
        return params[0] * log_probs(t, x, None) + params[1] * jnp.asarray([1.0, 0.0])

    def loss(params, x0, noise, y):
        return guidance.cross_entropy(logits, schedule, t, x0, noise, y, params)

    @jax.jit
    def terms():
        x0, component = densities.sample_labelled(jax.random.key(1), density, 5_000)
        y, noise = jnp.asarray(LABELS)[component], jax.random.normal(jax.random.key(2), x0.shape)
        value, gradient = jax.vmap(jax.value_and_grad(loss), (None, 0, 0, 0))(jnp.asarray([1.0, 0.0]), x0, noise, y)
        alpha, sigma = schedules.alpha(schedule, jnp.asarray(t)), schedules.sigma(schedule, jnp.asarray(t))
        truth = jax.vmap(lambda x, y: -log_probs(t, x, None)[y])(alpha * x0 + sigma * noise, y)
        return value, truth, gradient

    value, truth, gradients = (np.asarray(part) for part in terms())
    np.testing.assert_allclose(value, truth, rtol=1e-10, atol=1e-14)
    z = gradients.mean(0) / (gradients.std(0, ddof=1) / np.sqrt(len(gradients)))
    assert np.abs(z).max() < 4.5  # false alarm: 1.4e-5
    assert np.all(gradients.std(0) > 0.1)


def test_unconditional_shows_no_label():
    field = lambda t, x, args: args[0] * x + args[1].astype(x.dtype)  # noqa: E731
    x = jnp.ones(2)
    np.testing.assert_array_equal(guidance.unconditional(field, 10)(0.5, x, (2.0, jnp.int32(3))), [12.0, 12.0])
    both = guidance.classifier_free(field, guidance.unconditional(field, 10), 3.0)
    over = jax.vmap(both, (None, 0, (None, 0)))(0.5, jnp.ones((2, 2)), (2.0, jnp.asarray([3, 4])))
    np.testing.assert_allclose(over, [[2 + 10 + 3 * (3 - 10)] * 2, [2 + 10 + 3 * (4 - 10)] * 2])


def test_drop_labels():
    """30,000 labels at rate 0.2: the share dropped, of all and of each class, is within 5 standard errors (false alarm
    of the eleven 6.3e-6)."""
    drop = jax.jit(guidance.drop_labels, static_argnums=3)
    key, labels = jax.random.key(3), np.tile(np.arange(10, dtype=np.int32), 3000)
    dropped = np.asarray(drop(key, labels, 0.2, 10))
    assert dropped.dtype == np.int32
    gone = dropped == 10
    np.testing.assert_array_equal(dropped[~gone], labels[~gone])
    shares = gone.reshape(3000, 10).mean(0)
    assert abs(shares.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 30_000)
    assert np.abs(shares - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / 3000)
    small = jnp.asarray([1, 2, 3], jnp.uint8)
    for rate, kept in ((0.0, [1, 2, 3]), (1.0, [10, 10, 10])):
        np.testing.assert_array_equal(guidance.drop_labels(key, small, rate, 10), kept)
    assert int(guidance.drop_labels(key, 3, 0.0, 10)) == 3
    for dtype, num in ((jnp.uint8, 256), (jnp.int8, 128), (jnp.int16, 100_000)):  # which the dtype does not hold
        few = jnp.asarray([0, 1, 127], dtype)
        for rate, kept in ((0.0, [0, 1, 127]), (1.0, [num] * 3)):
            found = guidance.drop_labels(key, few, rate, num)
            assert found.dtype == jnp.int32
            np.testing.assert_array_equal(found, kept)

    np.testing.assert_array_equal(drop(key, np.asarray([-1, 10, 11]), 0.5, 10), [-1, -1, -1])
    for rate in (1.5, -0.5, np.nan):
        np.testing.assert_array_equal(drop(key, np.asarray([1, 2, 3]), rate, 10), [-1, -1, -1])


def test_bad_input():
    x = jnp.ones(2)
    score = lambda t, x, args: -x  # noqa: E731
    log_p = lambda t, x, args: -jnp.sum(x**2)  # noqa: E731
    makers = {
        "classifier": partial(guidance.classifier, score, log_p),
        "classifier_free": partial(guidance.classifier_free, score, score),
        "classifier_noise": partial(guidance.classifier_noise, score, log_p, CHAIN),
    }
    for make in makers.values():
        for gamma in (jnp.nan, jnp.inf, -jnp.inf):
            with pytest.raises(ValueError, match="scale must be a finite number"):
                make(gamma)
        with pytest.raises(ValueError, match=r"scale must be one number gamma, got shape \(3,\).*vmap"):
            make(jnp.arange(3.0))
        for gamma in (None, "2", 1j, jnp.asarray(1j)):
            with pytest.raises(TypeError, match=r"scale must be a real number gamma, got .*: 0 is unconditional"):
                make(gamma)
        with pytest.raises(TypeError, match="scale must be a real number gamma"):
            jax.jit(lambda gamma, make=make: make(gamma)(3, x))(1j)
        for interval in ((0.6, 0.3), (0.0, jnp.inf), (jnp.nan, 1.0)):
            with pytest.raises(ValueError, match="low <= high"):
                make(2.0, interval=interval)
        for interval in ((0, 0.5, 1), 0.5, (), "0.5"):
            with pytest.raises(ValueError, match=r"interval must be two numbers \(low, high\), got .*None"):
                make(2.0, interval=interval)
        for interval in ((None, 0.5), ("0", "1"), (0.0, 1j)):
            with pytest.raises(TypeError, match=r"interval must be two real numbers \(low, high\)"):
                make(2.0, interval=interval)
        with pytest.raises(TypeError, match="interval must be known"):
            jax.jit(lambda low, make=make: make(2.0, interval=(low, 1.0))(3, x))(0.5)

    with pytest.raises(ValueError, match="score returned shape"):
        guidance.classifier(lambda t, x, args: x[:1], log_p, 2.0)(0.5, x)
    with pytest.raises(ValueError, match="unconditional returned shape"):
        guidance.classifier_free(score, lambda t, x, args: jnp.sum(x), 2.0)(0.5, x)
    with pytest.raises(TypeError, match="conditional returned dtype float32"):
        guidance.classifier_free(lambda t, x, args: x.astype(jnp.float32), score, 2.0)(0.5, x)
    with pytest.raises(ValueError, match=r"log_prob_y returned shape \(2,\)"):
        guidance.classifier(score, score, 2.0)(0.5, x)
    with pytest.raises(ValueError, match="t must be one time"):
        guidance.classifier_free(score, score, 2.0)(jnp.ones(2), x)
    with pytest.raises(TypeError, match="x must be an array of floats"):
        guidance.classifier(score, log_p, 2.0)(0.5, jnp.arange(2))
    for bad in (jnp.ones(2), jnp.ones(3, jnp.float32)):
        with pytest.raises((ValueError, TypeError), match="noise has"):
            guidance.cross_entropy(toy_logits, schedules.vp(), 0.5, jnp.ones(3), bad, 0)

    key, labels = jax.random.key(0), jnp.arange(4)
    for rate in (-0.1, 1.1, jnp.nan):
        with pytest.raises(ValueError, match=r"rate must be a probability, in \[0, 1\]"):
            guidance.drop_labels(key, labels, rate, 10)
    with pytest.raises(ValueError, match="one probability"):
        guidance.drop_labels(key, labels, jnp.zeros(4), 10)
    for bad in (jnp.asarray([1, 10]), jnp.asarray([-1, 2])):
        with pytest.raises(ValueError, match="labels must be from 0 to 9"):
            guidance.drop_labels(key, bad, 0.1, 10)
    with pytest.raises(TypeError, match="labels must be integers"):
        guidance.drop_labels(key, jnp.ones(3), 0.1, 10)
    with pytest.raises(TypeError, match="typed key"):
        guidance.drop_labels(jnp.zeros(2, jnp.uint32), labels, 0.1, 10)
    for bad in (0, 2.5, True):
        with pytest.raises(ValueError, match="num_classes must be a positive integer"):
            guidance.unconditional(score, bad)


def test_float32_stays():
    """Every field and loss in float32 with a float64 gamma: float32 out, and right to its precision."""
    density = rotated_mixture(3, jnp.float32)
    schedule = schedules.vp()
    score, conditional, log_prob_y = exact(density, schedule, 0)
    x, gamma = points(3, dtype=jnp.float32)[0], jnp.asarray(1.0, jnp.float64)
    chain = Chain(*(leaf.astype(jnp.float32) for leaf in CHAIN))

    @jax.jit
    def values(x, gamma):
        fields = [
            guidance.classifier(score, log_prob_y, gamma, interval=(0.1, 0.9)),
            guidance.classifier_free(conditional, score, gamma, interval=(0.1, 0.9)),
            conditional,
        ]
        noise = guidance.classifier_noise(score, log_prob_y, chain, gamma, interval=(3, 5))
        t = jnp.asarray(0.4, jnp.float32)
        loss = guidance.cross_entropy(lambda t, x, args: x, schedule, t, x, x, 1)
        return [field(t, x) for field in fields], noise(4, x), loss

    (by_classifier, free, truth), noise, loss = values(x, gamma)
    assert {value.dtype for value in (by_classifier, free, noise, loss)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(by_classifier, truth, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(free, truth, rtol=1e-6)
