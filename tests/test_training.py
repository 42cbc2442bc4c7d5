"""The step, its average, the optimizer and the order of the data, against closed form."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dgm_jax import training

KEY = jax.random.key(0)


def quadratic(params, key, batch):
    """1/2 (w - b)^T A (w - b), A symmetric and not diagonal."""
    matrix = jnp.asarray([[2.0, 0.8], [0.8, 1.0]], params["w"].dtype)
    gap = params["w"] - batch
    return 0.5 * gap @ (matrix @ gap)


def run(update, state, num, batch=None):
    trail = []
    for _ in range(num):
        state, metrics = update(state, KEY, batch)
        trail.append(metrics)
    return state, trail


def test_the_optimizer_reaches_the_minimum_of_a_quadratic():
    for dtype, tolerance in ((jnp.float64, 1e-4), (jnp.float32, 1e-4)):
        params, goal = {"w": jnp.zeros(2, dtype)}, jnp.asarray([0.3, -0.7], dtype)
        optimizer = training.adam(0.05, 500, warmup=20)
        update = jax.jit(training.step(quadratic, optimizer, ema_decay=0.5))
        state, trail = run(update, training.init(params, optimizer), 500, goal)
        np.testing.assert_allclose(state.params["w"], goal, atol=tolerance)
        np.testing.assert_allclose(state.ema["w"], goal, atol=tolerance)
        assert state.params["w"].dtype == state.ema["w"].dtype == trail[0]["loss"].dtype == dtype
        assert trail[-1]["loss"] < 1e-7 < trail[0]["loss"]


def test_the_average_is_the_weighted_mean_of_the_parameters():
    # Gradient descent on a line moves w by -0.1 each step: w_k = 1 - k / 10. The weights are written out.
    optimizer, decay = optax.sgd(0.1), 0.8
    update = jax.jit(training.step(lambda params, key, batch: jnp.sum(params), optimizer, ema_decay=decay))
    state = training.init(jnp.ones(1), optimizer)
    for n in range(1, 8):
        state, _ = update(state, KEY, None)
        weights = np.array([decay ** (n - k) for k in range(1, n + 1)])
        means = np.average(1 - np.arange(1, n + 1) / 10, weights=weights)
        np.testing.assert_allclose(state.ema, [means], rtol=1e-13)
    assert int(state.step) == 7


def test_without_decay_the_average_is_the_parameters():
    optimizer = optax.sgd(0.1)
    update = jax.jit(training.step(quadratic, optimizer, ema_decay=0.0))
    state, _ = run(update, training.init({"w": jnp.zeros(2)}, optimizer), 3, jnp.ones(2))
    chex.assert_trees_all_close(state.ema, state.params, rtol=1e-15)


def test_the_average_is_right_after_many_steps_in_float32():
    # 1 - d^n by expm1: at d = 0.9999 the naive difference has lost four digits at n = 1.
    optimizer = optax.sgd(0.0)
    update = jax.jit(training.step(lambda params, key, batch: jnp.sum(params), optimizer, ema_decay=0.9999))
    state = training.init(jnp.full(1, 3.0, jnp.float32), optimizer)._replace(ema=jnp.zeros(1, jnp.float32))
    state, _ = update(state, KEY, None)
    np.testing.assert_allclose(state.ema, [3.0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "moved"), [(1.0, 0.1), (100.0, 0.5), (None, 0.5)])
def test_gradients_are_cut_to_the_norm(clip, moved):
    # Gradient (3, 4), length 5. What reaches Adam is its first moment over 1 - b1: length 5, or the clip.
    optimizer = training.adam(0.1, 10, clip_norm=clip)
    state = training.init(jnp.zeros(2), optimizer)
    update = training.step(lambda p, key, batch: jnp.dot(p, jnp.asarray([3.0, 4.0])), optimizer)
    after, metrics = update(state, KEY, None)
    (moments,) = [s for s in jax.tree.leaves(after.opt_state, is_leaf=is_adam) if is_adam(s)]
    np.testing.assert_allclose(jnp.linalg.norm(moments.mu), moved, rtol=1e-12)
    np.testing.assert_allclose(moments.mu[1] / moments.mu[0], 4 / 3, rtol=1e-12)
    np.testing.assert_allclose(metrics["grad_norm"], 5.0)


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (4, 0.25)])
def test_the_learning_rate_rises_and_falls(warmup, final):
    # Constant gradient 1: Adam's direction is 1 (up to eps), so that each move is the learning rate.
    optimizer = training.adam(0.1, 12, warmup=warmup, final=final, clip_norm=None)
    update = jax.jit(training.step(lambda params, key, batch: jnp.sum(params), optimizer))
    state = training.init(jnp.zeros(1), optimizer)
    moves = []
    for _ in range(15):
        before, (state, _) = state, update(state, KEY, None)
        moves.append(float(before.params[0] - state.params[0]))
    np.testing.assert_allclose(moves[:warmup], 0.1 * np.arange(1, warmup + 1) / (warmup + 1), rtol=1e-6)
    np.testing.assert_allclose(moves[warmup], 0.1, rtol=1e-6)
    half = warmup + (12 - warmup) // 2
    np.testing.assert_allclose(moves[half], 0.1 * (1 + final) / 2, rtol=1e-6)
    np.testing.assert_allclose(moves[12:], 0.1 * final, atol=1e-12, rtol=1e-6)


def test_weight_decay_shrinks_without_a_gradient():
    optimizer = training.adam(0.1, 100, weight_decay=0.5)
    update = training.step(lambda params, key, batch: 0.0 * jnp.sum(params), optimizer)
    state, _ = update(training.init(jnp.ones(2), optimizer), KEY, None)
    np.testing.assert_allclose(state.params, [0.95, 0.95], rtol=1e-12)


def test_a_step_that_is_not_finite_is_flagged_and_moves_nothing():
    optimizer = training.adam(0.05, 100)
    update = jax.jit(training.step(quadratic, optimizer, ema_decay=0.9))
    state, _ = run(update, training.init({"w": jnp.zeros(2)}, optimizer), 3, jnp.ones(2))
    for bad in (jnp.nan, jnp.inf):
        after, metrics = update(state, KEY, jnp.asarray([bad, 1.0]))
        assert not metrics["finite"]
        assert not jnp.isfinite(metrics["loss"])
        chex.assert_trees_all_equal((after.params, after.opt_state), (state.params, state.opt_state))
        assert jnp.all(jnp.isfinite(after.ema["w"]))
        assert int(after.step) == 4
    resumed, metrics = update(after, KEY, jnp.ones(2))
    assert metrics["finite"]
    assert jnp.all(resumed.params["w"] > state.params["w"])


def test_a_gradient_that_is_not_finite_is_flagged_where_the_loss_is_finite():
    optimizer = training.adam(0.05, 100)
    update = training.step(lambda params, key, batch: jnp.sum(jnp.sqrt(params)), optimizer)
    state, metrics = update(training.init(jnp.zeros(2), optimizer), KEY, None)
    assert jnp.isfinite(metrics["loss"])
    assert not metrics["finite"]
    np.testing.assert_array_equal(state.params, np.zeros(2))


def test_a_run_is_continued_by_its_state_alone():
    """The randomness of step n is that of fold_in(key, n): stopping after 3 of 6 steps changes no bit."""

    def loss(params, key, batch):
        return jnp.sum((params - jax.random.normal(key, params.shape)) ** 2)

    optimizer = training.adam(0.1, 6)
    update = jax.jit(training.step(loss, optimizer))
    whole, trail = run(update, training.init(jnp.zeros(3), optimizer), 6)
    half, _ = run(update, training.init(jnp.zeros(3), optimizer), 3)
    saved = jax.tree.map(np.asarray, half)
    rest, tail = run(update, jax.tree.map(jnp.asarray, saved), 3)
    chex.assert_trees_all_equal(rest, whole)
    chex.assert_trees_all_equal(tail, trail[3:])
    assert len({float(m["loss"]) for m in trail}) == 6


def test_the_step_compiles_once_over_a_run():
    chex.clear_trace_counter()
    optimizer = training.adam(0.1, 20, warmup=5)
    update = jax.jit(chex.assert_max_traces(training.step(quadratic, optimizer), n=1), donate_argnums=0)
    state, _ = run(update, training.init({"w": jnp.zeros(2)}, optimizer), 20, jnp.ones(2))
    assert int(state.step) == 20


def test_auxiliary_numbers_are_reported():
    optimizer = training.adam(0.1, 20)
    update = training.step(lambda p, k, b: (jnp.sum(p), {"nfe": jnp.asarray(7)}), optimizer, has_aux=True)
    _, metrics = update(training.init(jnp.zeros(2), optimizer), KEY, None)
    assert metrics["nfe"] == 7
    assert set(metrics) == {"loss", "grad_norm", "finite", "nfe"}


def test_an_epoch_visits_each_row_at_most_once_and_epochs_differ():
    rows = jax.jit(jax.vmap(lambda n: training.batch_indices(KEY, n, 23, 5)))(jnp.arange(200))
    epochs = np.asarray(rows).reshape(50, 20)
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert rows.min() == 0
    assert rows.max() == 22
    assert len({tuple(epoch) for epoch in epochs}) == 50
    # A row rests in an epoch with probability 3/23: over 50 epochs each is seen 43.5 times, standard deviation 2.4;
    # 4.5 of those for each of 23 rows, a false alarm in 6,000 draws of the key.
    counts = np.bincount(epochs.ravel(), minlength=23)
    assert np.all(np.abs(counts - 50 * 20 / 23) < 4.5 * math.sqrt(50 * (20 / 23) * (3 / 23)))


def test_batches_depend_on_step_and_key_alone():
    rows = training.batch_indices(KEY, 3, 10, 4)
    np.testing.assert_array_equal(rows, jax.jit(lambda n: training.batch_indices(KEY, n, 10, 4))(jnp.asarray(3)))
    assert not np.array_equal(rows, training.batch_indices(jax.random.key(1), 3, 10, 4))
    assert rows.dtype == jnp.int32


def test_sharding_gives_the_same_numbers_back():
    mesh = training.mesh()
    state = training.init({"w": jnp.arange(3.0)}, training.adam(0.1, 5))
    placed, key = training.replicate(mesh, (state, KEY))
    chex.assert_trees_all_equal(placed, state)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(KEY))
    batch = training.shard(mesh, {"x": np.arange(6.0).reshape(3, 2)})
    np.testing.assert_array_equal(batch["x"], np.arange(6.0).reshape(3, 2))
    assert batch["x"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 2)
    np.testing.assert_array_equal(training.local_rows(mesh, 3), np.arange(3))


def scalar(params, key, batch):
    return jnp.sum(params)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: training.adam(0.0, 10), ValueError, "learning_rate must be positive"),
        (lambda: training.adam(0.1, 10, warmup=10), ValueError, "warmup < num_steps"),
        (lambda: training.adam(0.1, 10, clip_norm=-1.0), ValueError, "clip_norm must be positive, or None"),
        (lambda: training.step(scalar, optax.sgd(1.0), ema_decay=1.0), ValueError, r"ema_decay must be in \[0, 1\)"),
        (lambda: training.init({"a": jnp.arange(3)}, optax.sgd(1.0)), TypeError, r"params\['a'\] must be.*floats"),
        (lambda: training.batch_indices(KEY, 0, 10, 11), ValueError, "batch_size=11 and num_data=10"),
        (lambda: training.batch_indices(jnp.zeros(2, jnp.uint32), 0, 10, 5), TypeError, "typed key"),
        (lambda: training.shard(training.mesh(), jnp.ones(())), ValueError, "leaf of shape"),
    ],
)
def test_bad_input_is_named_with_its_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_for_each_example_and_an_old_key_are_refused():
    optimizer = training.adam(0.1, 10)
    state = training.init(jnp.zeros(2), optimizer)
    with pytest.raises(ValueError, match=r"loss must return a scalar.*\(2,\).*mean over the batch"):
        training.step(lambda p, k, b: p, optimizer)(state, KEY, None)
    with pytest.raises(TypeError, match="typed key"):
        training.step(scalar, optimizer)(state, jnp.zeros(2, jnp.uint32), None)
