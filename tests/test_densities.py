"""The oracles against identities that hold for any density, and against quadrature and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import SINGULAR, points, sweep
from scipy import stats
from targets import SCHEDULES as ALL
from targets import rotated_mixture as mixture

from dgm_jax import densities, schedules

DIMS = pytest.mark.parametrize("dim", [2, pytest.param(5, marks=pytest.mark.slow)])
LABELS = (0, 1, 0)
KEY = jax.random.key(20)


def cholesky_log_density(density, schedule):
    return lambda t, x, args: densities.log_prob(densities.diffuse(density, schedule, t), x)


def together(factories, density, schedule):
    """Several fields as one."""
    fields = [factory(density, schedule) for factory in factories]
    return lambda t, x, args: tuple(field(t, x, args) for field in fields)


def close(got, expected, name, tolerance, relative=0.0):
    np.testing.assert_allclose(got, expected, rtol=relative, atol=tolerance, err_msg=name)


# Densities as such


@DIMS
def test_log_prob_against_scipy(dim):
    density, xs = mixture(dim), points(dim)
    parts = [stats.multivariate_normal(m, c).pdf(np.asarray(xs)) for m, c in zip(*density[1:], strict=True)]
    expected = np.log(np.asarray(density.weights) @ np.stack(parts))
    got = jax.jit(jax.vmap(lambda x: densities.log_prob(density, x)))(xs)
    np.testing.assert_allclose(got, expected, rtol=1e-11)


def test_gaussian_is_a_mixture_of_one():
    c = np.array([[2.0, 0.7], [0.7, 0.5]])
    density = densities.gaussian(jnp.asarray([1.0, -2.0]), jnp.asarray(c))
    x = np.array([0.3, 0.4])
    expected = stats.multivariate_normal([1.0, -2.0], c).logpdf(x)
    np.testing.assert_allclose(jax.jit(densities.log_prob)(density, jnp.asarray(x)), expected, rtol=1e-13)
    np.testing.assert_allclose(densities.mean(density), [1.0, -2.0])
    np.testing.assert_allclose(densities.covariance(density), c)


def test_samples_have_the_moments_and_the_labels():
    """Every mean, covariance entry and component count within its 4.5-sigma interval.

    5 + 15 + 3 intervals, 6.8e-6 each: a false alarm in 6,400 keys; the key is fixed.
    """
    num, density = 40_000, mixture(5)
    x, component = jax.jit(densities.sample_labelled, static_argnums=2)(KEY, density, num)
    assert x.shape == (num, 5)
    w = np.asarray(density.weights)
    counts = np.bincount(np.asarray(component), minlength=3)
    assert np.all(np.abs(counts - num * w) < 4.5 * np.sqrt(num * w * (1 - w)))
    offset = np.asarray(x - densities.mean(density)[None])
    assert np.all(np.abs(offset.mean(0)) < 4.5 * offset.std(0) / np.sqrt(num))
    products = offset[:, :, None] * offset[:, None, :]
    error = products.mean(0) - np.asarray(densities.covariance(density))
    assert np.all(np.abs(error) < 4.5 * products.std(0) / np.sqrt(num))
    again = jax.jit(densities.sample, static_argnums=2)(KEY, density, num)
    np.testing.assert_array_equal(again, x)


@pytest.mark.slow
def test_samples_of_a_component_are_its_gaussian():
    """Whitened by SciPy's own factor, the squared radii are chi-square: Kolmogorov-Smirnov, 3 tests at p > 1e-5."""
    density = mixture(2)
    x, component = densities.sample_labelled(KEY, density, 6_000)
    for k in range(3):
        offset = np.asarray(x)[np.asarray(component) == k] - np.asarray(density.means[k])
        radii = np.einsum("ni,ij,nj->n", offset, np.linalg.inv(density.covariances[k]), offset)
        assert stats.kstest(radii, stats.chi2(2).cdf).pvalue > 1e-5


def test_entropy_of_a_gaussian():
    """Within 4.5 standard errors (false alarm 6.8e-6, key fixed) of log det(2 pi e C) / 2.

    log p of a Gaussian in d dimensions has the variance d / 2, which the standard error must show.
    """
    num, c = 20_000, np.array([[2.0, 0.7], [0.7, 0.5]])
    density = densities.gaussian(jnp.zeros(2), jnp.asarray(c))
    value, stderr = jax.jit(densities.entropy, static_argnums=2)(KEY, density, num)
    assert abs(value - 0.5 * np.linalg.slogdet(2 * np.pi * np.e * c)[1]) < 4.5 * stderr
    np.testing.assert_allclose(stderr, np.sqrt(2 / 2 / num), rtol=0.05)


# Fields along a path


@DIMS
def test_log_density_and_score_against_cholesky_and_autodiff(dim):
    density = mixture(dim)

    def both(schedule):
        by_cholesky = jax.value_and_grad(cholesky_log_density(density, schedule), argnums=1)
        by_spectrum = together((densities.log_density, densities.score), density, schedule)
        return lambda t, x, args: (by_spectrum(t, x, args), by_cholesky(t, x, args))

    for name, (got, expected) in sweep(both, [0.0, 1e-6, 0.1, 0.5, 0.9, 1.0], points(dim)):
        close(got[0], expected[0], name, 1e-10)
        close(got[1], expected[1], name, 1e-10)


@DIMS
def test_velocity_satisfies_the_continuity_equation(dim):
    """d log p / dt + div v + v . score = 0, every derivative by autodiff, log p by Cholesky."""
    density = mixture(dim)

    def residual(schedule):
        log_p, velocity = cholesky_log_density(density, schedule), densities.velocity(density, schedule)

        def field(t, x, args):
            rate = jax.jvp(lambda t: log_p(t, x, args), (t,), (jnp.ones_like(t),))[1]
            v, jacobian = velocity(t, x, args), jax.jacfwd(velocity, argnums=1)(t, x, args)
            return rate + jnp.trace(jacobian) + v @ jax.grad(log_p, argnums=1)(t, x, args), jnp.abs(rate)

        return field

    for name, (error, size) in sweep(residual, [0.01, 0.2, 0.5, 0.8, 0.97], points(dim)):
        assert np.max(np.abs(error) / (1 + size)) < 1e-8, name
        assert np.max(size) > 0.1, name


def test_velocity_is_drift_less_half_the_squared_diffusion_times_score():
    density = mixture(2)

    def both(schedule):
        velocity, score = densities.velocity(density, schedule), densities.score(density, schedule)

        def field(t, x, args):
            drift, diffusion2 = schedules.rates(schedule, t)
            return velocity(t, x, args), drift * x - 0.5 * diffusion2 * score(t, x, args)

        return field

    def ts(name):
        return [0.0, 0.01, 0.5, 0.99, 0.999 if name in SINGULAR else 1.0]

    for name, (got, expected) in sweep(both, ts, points(2)):
        close(got, expected, name, 1e-9, relative=1e-9)


def test_denoiser_and_noise_by_tweedie():
    """alpha E[x_0 | x] = x + sigma^2 score, E[eps | x] = -sigma score, the score by autodiff of the Cholesky route."""
    density = mixture(5)

    def errors(schedule):
        score = jax.grad(cholesky_log_density(density, schedule), argnums=1)
        fields = together((densities.denoiser, densities.noise), density, schedule)

        def field(t, x, args):
            guess, noise = fields(t, x, args)
            s, sigma = score(t, x, args), schedules.sigma(schedule, t)
            return schedules.alpha(schedule, t) * guess - x - sigma**2 * s, noise + sigma * s

        return field

    for name, (of_denoiser, of_noise) in sweep(errors, [0.0, 0.01, 0.3, 0.7, 1.0], points(5)):
        close(of_denoiser, 0.0, name, 1e-10)
        close(of_noise, 0.0, name, 1e-10)


def test_conditional_means_against_quadrature():
    """In one dimension, by integrating over x_0 the joint density of x_0 and x_t with SciPy's normal."""
    density = densities.Mixture(jnp.asarray([0.4, 0.6]), jnp.asarray([[-1.0], [1.5]]), jnp.asarray([[[0.3]], [[0.6]]]))
    x, ts, step = 0.7, (0.3, 0.8), 1e-5
    grid = np.linspace(-12.0, 12.0, 240_001)
    prior = 0.4 * stats.norm(-1.0, np.sqrt(0.3)).pdf(grid) + 0.6 * stats.norm(1.5, np.sqrt(0.6)).pdf(grid)
    factories = (densities.log_density, densities.denoiser, densities.noise, densities.velocity)

    def with_path(schedule):
        fields = together(factories, density, schedule)

        def path(t):
            return jnp.stack([schedules.alpha(schedule, t), schedules.sigma(schedule, t)])

        return lambda t, x, args: (fields(t, x, args), path(t), (path(t + step) - path(t - step)) / (2 * step))

    for name, (got, path, path_dot) in sweep(with_path, ts, jnp.asarray([[x]])):
        for i in range(len(ts)):
            (a, sigma), (a_dot, sigma_dot) = path[i, 0], path_dot[i, 0]
            joint = prior * stats.norm(a * grid, sigma).pdf(x)
            p = np.trapezoid(joint, grid)
            d = np.trapezoid(grid * joint, grid) / p
            e = np.trapezoid((x - a * grid) / sigma * joint, grid) / p
            expected = [np.log(p), d, e, a_dot * d + sigma_dot * e]
            close([g[i].item() for g in got], expected, name, 1e-8, relative=1e-6)


# Both ends


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_first_time(dtype):
    """Nothing is noise: E[x_0 | x] = x, E[eps | x] = 0, and the velocity is alpha' x - sigma sigma' score."""
    rates = {  # alpha'(0) and (sigma^2)'(0) / 2
        "vp": (-0.05, 0.05),
        "ve": (0.0, 0.01**2 * np.log(5000)),
        "sub_vp": (-0.05, 0.0),
        "cosine": (0.0, 0.0),
        "edm": (0.0, 0.0),
        "linear": (-1.0, 0.0),
    }
    density, xs = mixture(2, dtype), points(2, dtype=dtype)
    tolerance = 2e-5 if dtype == jnp.float32 else 1e-12
    score = np.asarray(jax.jit(jax.vmap(jax.grad(lambda x: densities.log_prob(density, x))))(xs))
    factories = (densities.denoiser, densities.noise, densities.velocity)
    for name, (guess, noise, velocity) in sweep(lambda s: together(factories, density, s), [0.0], xs):
        close(guess[0], xs, name, tolerance)
        np.testing.assert_array_equal(noise[0], np.zeros_like(xs), err_msg=name)
        alpha_dot, half_variance_dot = rates[name]
        close(velocity[0], alpha_dot * np.asarray(xs) - half_variance_dot * score, name, tolerance, relative=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_last_time_where_nothing_of_the_data_is_left(dtype):
    """x_1 is the noise, independent of x_0: E[x_0 | x] is the mean, the velocity alpha' mean + sigma' x."""
    density, xs = mixture(5, dtype), points(5, dtype=dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-12
    x, mean = np.asarray(xs), np.broadcast_to(densities.mean(density), xs.shape)
    factories = (densities.denoiser, densities.noise, densities.score, densities.velocity)
    for name, got in sweep(lambda s: together(factories, density, s), [1.0], xs, names=SINGULAR):
        velocity = {"linear": x - mean, "cosine": -np.pi / 2 * mean}[name]
        for value, expected in zip(got, (mean, x, -x, velocity), strict=True):
            close(value[0], expected, name, tolerance, relative=tolerance)


def test_velocity_is_continuous_into_both_ends():
    density = mixture(2)
    ts = [0.0, 1e-11, 1 - 1e-11, 1.0]
    for name, v in sweep(lambda schedule: densities.velocity(density, schedule), ts, points(2)):
        close(v[0], v[1], name, 1e-5, relative=1e-5)
        close(v[3], v[2], name, 1e-5, relative=1e-5)


def test_far_from_everything():
    """At a distance of 1e6 the fields are finite, and the score that of the Cholesky route."""
    density, xs = mixture(2), jnp.asarray([[1e6, -1e6], [0.0, 1e6]])
    factories = (
        densities.score,
        lambda density, schedule: jax.grad(cholesky_log_density(density, schedule), argnums=1),
        densities.log_density,
        densities.denoiser,
        densities.noise,
        densities.velocity,
    )
    for name, values in sweep(lambda schedule: together(factories, density, schedule), [0.0, 0.5, 1.0], xs):
        assert all(np.all(np.isfinite(value)) for value in values), name
        close(values[0], values[1], name, 1e-6, relative=1e-9)


# Classes


def test_class_probabilities_by_bayes():
    """p(y | x_t) = p(y) p(x_t | y) / p(x_t), the densities on the right by Cholesky, and so for the gradients."""
    density = mixture(5)
    prior = (0.7, 0.3)

    def both(schedule):
        class_log_probs = densities.class_log_probs(density, schedule, LABELS)
        log_prob_1 = densities.log_prob_y(density, schedule, LABELS, 1)
        conditional = [cholesky_log_density(densities.condition(density, LABELS, y), schedule) for y in (0, 1)]
        everything = cholesky_log_density(density, schedule)

        def field(t, x, args):
            log_p, slope = jax.value_and_grad(everything, argnums=1)(t, x, args)
            log_p_0 = conditional[0](t, x, args)
            log_p_1, slope_1 = jax.value_and_grad(conditional[1], argnums=1)(t, x, args)
            bayes = jnp.stack([jnp.log(prior[0]) + log_p_0 - log_p, jnp.log(prior[1]) + log_p_1 - log_p])
            value, gradient = jax.value_and_grad(log_prob_1, argnums=1)(t, x, args)
            return class_log_probs(t, x, args), bayes, value, gradient, slope_1 - slope

        return field

    for name, (got, bayes, value, gradient, slope) in sweep(both, [0.0, 0.1, 0.5, 1.0], points(5, 3)):
        close(got, bayes, name, 1e-10, relative=1e-10)
        close(np.exp(got).sum(-1), 1.0, name, 1e-13)
        close(value, got[..., 1], name, 1e-13)
        close(gradient, slope, name, 1e-10)


@pytest.mark.slow
def test_condition_keeps_the_components_of_the_class():
    conditioned = densities.condition(mixture(2), LABELS, 0)
    np.testing.assert_allclose(conditioned.weights, [2 / 7, 0.0, 5 / 7], rtol=1e-14)
    x, component = densities.sample_labelled(KEY, conditioned, 500)
    assert set(np.unique(component)) == {0, 2}
    traced = jax.jit(lambda y: densities.condition(mixture(2), LABELS, y).weights)(0)
    np.testing.assert_allclose(traced, conditioned.weights, rtol=1e-14)
    score = jax.jit(jax.vmap(jax.grad(lambda x: densities.log_prob(conditioned, x))))(x)
    assert np.all(np.isfinite(score))


# Dtypes and transformations


@pytest.mark.slow
def test_single_precision_stays_single_and_right():
    low, high = mixture(2, jnp.float32), mixture(2)
    xs, ts = points(2, dtype=jnp.float32), [0.0, 0.5, 1.0]
    factories = [
        densities.log_density,
        densities.score,
        densities.denoiser,
        densities.noise,
        densities.velocity,
        lambda density, schedule: densities.log_prob_y(density, schedule, LABELS, 1),
        cholesky_log_density,
    ]
    in_single = sweep(lambda schedule: together(factories, low, schedule), ts, xs)
    in_double = sweep(lambda schedule: together(factories, high, schedule), ts, xs.astype(jnp.float64))
    for (name, got), (_, expected) in zip(in_single, in_double, strict=True):
        for value, reference in zip(got, expected, strict=True):
            assert value.dtype == np.float32, name
            close(value, reference, name, 2e-4, relative=2e-4)


def test_single_precision_in_single_precision_out():
    low, x = mixture(2, jnp.float32), points(2, dtype=jnp.float32)[0]

    def everything():
        return (
            densities.velocity(low, ALL["vp"])(
                jnp.asarray(0.5, jnp.float64), x, None
            ),  # t is brought to the dtype of x
            *densities.diffuse(low, ALL["linear"], jnp.float32(0.5)),
            *densities.condition(low, LABELS, 0),
            *densities.gaussian(x, jnp.eye(2, dtype=jnp.float32)),
            densities.sample(KEY, low, 3),
            densities.mean(low),
            densities.covariance(low),
            *densities.entropy(KEY, low, 8),
        )

    assert {leaf.dtype for leaf in jax.eval_shape(everything)} == {jnp.dtype(jnp.float32)}


def test_a_density_may_be_an_argument_of_jit_and_of_grad():
    density, schedule, x, t = mixture(2), ALL["vp"], points(2)[0], jnp.asarray(0.3)
    direct = jax.jit(densities.velocity(density, schedule))(t, x, None)
    passed = jax.jit(lambda density: densities.velocity(density, schedule)(t, x, None))(density)
    np.testing.assert_allclose(passed, direct, rtol=1e-12)
    # d log p / d mean_k = p(k | x) C_k^-1 (x - mean_k)
    gradient = jax.jit(jax.grad(lambda means: densities.log_prob(density._replace(means=means), x)))(density.means)
    pdf = [stats.multivariate_normal(m, c).pdf(x) for m, c in zip(*density[1:], strict=True)]
    posterior = np.asarray(density.weights) * pdf
    posterior /= posterior.sum()
    pull = [np.linalg.solve(c, np.asarray(x - m)) for m, c in zip(*density[1:], strict=True)]
    np.testing.assert_allclose(gradient, posterior[:, None] * np.stack(pull), rtol=1e-10)


def test_nan_stays_nan():
    x = jnp.asarray([jnp.nan, 0.0])
    assert jnp.isnan(jax.jit(densities.log_prob)(mixture(2), x))
    assert np.all(np.isnan(jax.jit(densities.velocity(mixture(2), ALL["linear"]))(jnp.asarray(0.5), x, None)))


# Bad input


def changed(**leaves):
    return mixture(2)._replace(**{name: jnp.asarray(leaf) for name, leaf in leaves.items()})


EYES = np.tile(np.eye(2), (3, 1, 1))


@pytest.mark.parametrize(
    ("density", "error", "message"),
    [
        (
            changed(weights=[0.2, 0.2, 0.2]),
            ValueError,
            r"density.weights must sum to one, got the sum 0.6: pass weights /",
        ),
        (changed(weights=[-0.5, 1.0, 0.5]), ValueError, "density.weights must be at least 0, got"),
        (changed(weights=[0.2, 0.8]), ValueError, r"density.means must have shape \[k, d\] with k = 2"),
        (changed(weights=[[1.0]]), ValueError, r"density.weights must have shape \[k\].*got shape \(1, 1\)"),
        (changed(means=np.zeros((3, 4))), ValueError, r"density.covariances must have shape \(3, 4, 4\).*got shape"),
        (changed(means=np.full((3, 2), np.nan)), ValueError, "density.means must be finite, got NaN"),
        (changed(covariances=EYES + np.inf), ValueError, "density.covariances must be finite"),
        (
            changed(covariances=-EYES),
            ValueError,
            r"density.covariances\[0\] must be positive definite, got eigenvalues",
        ),
        (changed(covariances=np.ones((3, 2, 2))), ValueError, "must be positive definite.*add a multiple of the ident"),
        (changed(covariances=EYES + np.array([[0, 1], [0, 0]])), ValueError, r"covariances\[0\] must be symmetric"),
        (changed(means=np.zeros((3, 2), int)), TypeError, "density.means must be an array of floats, got dtype int64"),
        (changed(means=np.zeros((3, 2), np.float32)), TypeError, "density must be of one dtype, got weights float64"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda density: densities.log_prob(density, jnp.zeros(2)),
        lambda density: densities.velocity(density, ALL["vp"]),
        lambda density: densities.sample(KEY, density, 2),
        lambda density: densities.diffuse(density, ALL["vp"], jnp.asarray(0.5)),
    ],
)
def test_what_is_no_density(density, error, message, use):
    with pytest.raises(error, match=message):
        use(density)


FIELDS = [
    lambda x: densities.log_prob(mixture(2), x),
    *(
        lambda x, f=f: f(mixture(2), ALL["vp"])(jnp.asarray(0.5), x, None)
        for f in (
            densities.log_density,
            densities.score,
            densities.denoiser,
            densities.noise,
            densities.velocity,
            lambda density, schedule: densities.class_log_probs(density, schedule, LABELS),
            lambda density, schedule: densities.log_prob_y(density, schedule, LABELS, 0),
        )
    ),
]


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_no_example(field):
    with pytest.raises(ValueError, match=r"x must have shape \(2,\), got shape \(7, 2\).*use jax.vmap over a batch"):
        field(jnp.zeros((7, 2)))
    with pytest.raises(ValueError, match=r"x must have shape \(2,\), got shape \(3,\)"):
        field(jnp.zeros(3))
    with pytest.raises(TypeError, match=r"x must be an array of floats, got dtype int64: .* x.astype\(jnp.float32\)"):
        field(jnp.zeros(2, int))
    with pytest.raises(TypeError, match="x has dtype float32 and density float64: cast one to the other"):
        field(jnp.zeros(2, jnp.float32))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: densities.sample(jax.random.PRNGKey(0), mixture(2), 3),
            TypeError,
            "key must be a typed key.*key.seed",
        ),
        (lambda: densities.entropy(0, mixture(2), 3), TypeError, "key must be a typed key, got int"),
        (lambda: densities.sample(jax.random.split(KEY), mixture(2), 3), ValueError, "key must be a single key"),
        (lambda: densities.sample(KEY, mixture(2), 0), ValueError, "num must be a positive integer, got 0"),
        (lambda: densities.sample(KEY, mixture(2), 2.0), ValueError, "num must be a positive integer, got 2.0"),
        (lambda: densities.entropy(KEY, mixture(2), 1), ValueError, "num must be at least 2, for a standard error"),
        (
            lambda: densities.gaussian(jnp.zeros(2), jnp.eye(3)),
            ValueError,
            r"mean must have shape \[d\] and covariance \[d, d\], got shapes \(2,\) and \(3, 3\)",
        ),
        (lambda: densities.gaussian(jnp.zeros(2), -jnp.eye(2)), ValueError, "must be positive definite"),
        (
            lambda: densities.score(mixture(2), ALL["vp"])(jnp.zeros(4), jnp.zeros(2), None),
            ValueError,
            r"t must be one time of shape \(\), got shape \(4,\): use jax.vmap over times",
        ),
        (lambda: densities.condition(mixture(2), (0, 1), 0), ValueError, "labels must be 3 integers"),
        (lambda: densities.condition(mixture(2), (0.0, 1.0, 0.0), 0), ValueError, "labels must be 3 integers"),
        (lambda: densities.condition(mixture(2), (0, 2, 0), 0), ValueError, "labels must use every class from 0"),
        (
            lambda: densities.condition(mixture(2), LABELS, 2),
            ValueError,
            "y must be one integer class from 0 to 1, got 2",
        ),
        (
            lambda: densities.condition(changed(weights=[0.5, 0.0, 0.5]), LABELS, 1),
            ValueError,
            "y must be a class of positive weight, got y=1",
        ),
        (
            lambda: jax.jit(lambda labels: densities.condition(mixture(2), labels, 0))(jnp.zeros(3, int)),
            TypeError,
            "labels must be known when a function is traced",
        ),
        (lambda: densities.log_prob_y(mixture(2), ALL["vp"], LABELS, 5), ValueError, "y must be one integer class"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
