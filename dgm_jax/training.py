"""Training: one pure step, an average of the parameters, data parallelism by sharding.

The state is a NamedTuple of arrays, the step a function ``(state, key, batch) -> (state, metrics)`` that the caller
jits. Nothing is remembered elsewhere: the randomness of step n comes from ``fold_in(key, n)``, and so does its batch
(:func:`batch_indices`), so that a run continues from ``state`` alone::

    optimizer = training.adam(1e-3, num_steps)
    state = training.init(params, optimizer)
    update = jax.jit(training.step(loss, optimizer), donate_argnums=0)      # loss(params, key, batch) -> []
    order = jax.jit(training.batch_indices, static_argnums=(2, 3))
    for n in range(int(state.step), num_steps):
        rows = order(data_key, n, len(data), batch_size)
        state, metrics = update(state, train_key, data[rows])
        if not metrics["finite"]: raise ...

On many devices, or many processes, the same step runs unchanged on sharded arrays; the loss is a mean over the whole
batch, and the compiler adds the communication::

    mesh = training.mesh()                                                  # every device of every process
    state, train_key = training.replicate(mesh, (state, train_key))
    mine = training.local_rows(mesh, batch_size)                            # this process's rows of the batch
    batch = training.shard(mesh, data[rows[mine]])
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgm_jax import _checks
from dgm_jax.types import Array

__all__ = ["TrainState", "adam", "batch_indices", "init", "local_rows", "mesh", "replicate", "shard", "step"]


class TrainState(NamedTuple):
    """All that a run needs to go on.

    Attributes:
        params: what the loss is differentiated by.
        opt_state: the optimizer's.
        ema: the exponential moving average of the parameters, ready for use (see :func:`step`).
        step: how many steps were taken [], int32.
    """

    params: Any
    opt_state: Any
    ema: Any
    step: Array


def init(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; its average is the parameters themselves.

    Args:
        params: pytree of arrays of floats.
        optimizer: from :func:`adam`, or any of Optax's.

    Returns:
        The state. ``ema`` is a copy, so that the state's buffers may be donated.

    Raises:
        TypeError: a leaf of ``params`` is not an array of floats.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _checks.floating(f"params{jax.tree_util.keystr(path)}", leaf)
    return TrainState(params, optimizer.init(params), jax.tree.map(jnp.array, params), jnp.zeros((), jnp.int32))


def adam(
    learning_rate: float,
    num_steps: int,
    *,
    warmup: int = 0,
    final: float = 0.0,
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam (AdamW with ``weight_decay``) on clipped gradients, with a warm-up and a cosine for its learning rate.

    Step n = 0, 1, ... has the rate learning_rate (n + 1) / (warmup + 1) while n < warmup, and from there falls to
    final learning_rate at n = num_steps along half a cosine.

    Args:
        learning_rate: the largest one.
        num_steps: of the whole run; from there on the rate stays.
        warmup: steps of linear growth.
        final: the last learning rate, as a fraction of the largest.
        clip_norm: gradients longer than this, in Euclidean norm over all parameters, are cut to it; ``None``: never.
        weight_decay: of AdamW; the update contains -rate weight_decay params.
        b1: decay of the mean of the gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of the latter.

    Returns:
        An Optax transformation; those of one's own fit :func:`step` as well.

    Raises:
        ValueError: a rate, norm or number of steps out of range.

    Source: Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization", algorithm 1; Loshchilov & Hutter (2019),
    "Decoupled Weight Decay Regularization"; Loshchilov & Hutter (2017), "SGDR", equation 5.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}.")
    if num_steps < 1 or not 0 <= warmup < num_steps:
        raise ValueError(f"need 0 <= warmup < num_steps, got warmup={warmup} and num_steps={num_steps}.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, or None for no clipping, got {clip_norm}.")
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps - warmup, final)
    if warmup:
        rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
        schedule = optax.join_schedules([rise, schedule], [warmup])
    parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    parts.append(optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay))
    return optax.chain(*parts)


def step(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.999,
    has_aux: bool = False,
) -> Callable[[TrainState, Array, Any], tuple[TrainState, dict[str, Array]]]:
    """One step of training, as a pure function to be jitted.

    params_n = params_(n-1) + optimizer(gradient of loss(params_(n-1), fold_in(key, n-1), batch)), and

        ema_n = sum_k d^(n-k) params_k / sum_k d^(n-k),   k = 1 .. n,   d = ema_decay:

    weights that sum to one from the first step on, so that the average never leans on the initial parameters and
    needs no correction when it is read.

    A loss or gradient that is NaN or infinite moves neither parameters nor optimizer: the step counts, and
    ``finite`` is False. The caller must look at it, and stop.

    Args:
        loss: ``(params, key, batch) -> []``, a mean over the batch. With ``has_aux``, ``-> ([], dict)``, the dict of
            numbers to report.
        optimizer: from :func:`adam`, or any of Optax's.
        ema_decay: d, in [0, 1); 0 for no average (ema = params).
        has_aux: whether the loss returns a dict beside its value.

    Returns:
        ``(state, key, batch) -> (state, metrics)``. The key is the same in every step. Metrics: ``loss`` [] and
        ``grad_norm`` [] (before clipping), both at the old parameters; ``finite`` [] bool; and those of the loss.

    Raises:
        ValueError: ``ema_decay`` out of range; in the step, a loss that is not a scalar.
        TypeError: in the step, an old-style key.

    Source: Polyak & Juditsky (1992), "Acceleration of Stochastic Approximation by Averaging"; the weights are those
    of Kingma & Ba (2015), section 3.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}: 0.999 averages over about 1000 steps.")
    log_decay = math.log(ema_decay) if ema_decay else -math.inf

    def scalar_loss(params: Any, key: Array, batch: Any) -> tuple[Array, dict[str, Array]]:
        value, aux = loss(params, key, batch) if has_aux else (loss(params, key, batch), {})
        if jnp.shape(value) != ():
            raise ValueError(
                f"loss must return a scalar [], got shape {jnp.shape(value)}: take the mean over the batch."
            )
        return value, aux

    def update(state: TrainState, key: Array, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(_checks.typed_key(key), state.step)
        (value, aux), gradient = jax.value_and_grad(scalar_loss, has_aux=True)(state.params, key, batch)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its int32 counters with floats
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        moved = (optax.apply_updates(state.params, changes), opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), moved, (state.params, state.opt_state)
        )
        number = state.step + 1

        def average(ema: Array, new: Array) -> Array:
            weight = -math.expm1(log_decay) / -jnp.expm1(log_decay * number.astype(ema.dtype))
            return ema + weight * (new - ema)

        ema = jax.tree.map(average, state.ema, params)
        metrics = {"loss": value, "grad_norm": norm, "finite": finite, **aux}
        return TrainState(params, opt_state, ema, number), metrics

    return update


def batch_indices(key: Array, step: Array | int, num_data: int, batch_size: int) -> Array:
    """Which rows of the data form the batch of a step; without replacement within an epoch.

    Epoch e is the steps e s .. (e + 1) s - 1, s = floor(num_data / batch_size); it visits the rows in the order of a
    random permutation drawn from fold_in(key, e). The num_data - s batch_size rows left over rest for one epoch.

    The answer depends on the arguments alone, neither on devices nor on processes. It costs one permutation of
    num_data numbers (60,000: some 10 ms on a CPU core); under jit both sizes are static.

    Args:
        key: of the data; the same in every step.
        step: n [], from 0.
        num_data: rows in the data.
        batch_size: rows in a batch.

    Returns:
        Row numbers [batch_size], int32.

    Raises:
        ValueError: ``batch_size`` is not in 1 .. ``num_data``.
        TypeError: an old-style key.
    """
    key = _checks.typed_key(key)
    if not 1 <= batch_size <= num_data:
        raise ValueError(
            f"batch_size must be between 1 and the number of rows, got batch_size={batch_size} "
            f"and num_data={num_data}: pass a smaller batch."
        )
    steps = num_data // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, step // steps), jnp.arange(num_data, dtype=jnp.int32))
    return jax.lax.dynamic_slice(order, ((step % steps) * batch_size,), (batch_size,))


def mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, "data", over the given devices or over all, those of other processes included."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """``tree`` with every leaf whole on every device. Processes must hold the same values.

    Args:
        mesh: from :func:`mesh`.
        tree: pytree of arrays, typed keys among them.

    Returns:
        The same pytree of global arrays.
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> Array:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), np.shape(leaf))

    return jax.tree.map(place, tree)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process must load; all of them where there is one process.

    Args:
        mesh: from :func:`mesh`.
        batch_size: of the whole batch, over all processes.

    Returns:
        Positions in the batch [batch_size / processes], growing.

    Raises:
        ValueError: the devices do not divide the batch.
    """
    if batch_size % mesh.size:
        raise ValueError(
            f"batch_size={batch_size} cannot be split evenly over {mesh.size} devices: take a multiple of {mesh.size}."
        )
    where = NamedSharding(mesh, PartitionSpec("data")).addressable_devices_indices_map((batch_size,))
    return np.sort(np.concatenate([np.arange(batch_size)[rows] for rows in where.values()]))


def shard(mesh: Mesh, batch: Any) -> Any:
    """A batch split by rows over the devices.

    Args:
        mesh: from :func:`mesh`.
        batch: pytree of arrays [rows, ...]: the rows of :func:`local_rows`, of this process alone.

    Returns:
        The same pytree of global arrays [batch_size, ...], rows over the axis "data".

    Raises:
        ValueError: this process's devices do not divide the rows.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    local = len(sharding.addressable_devices)

    def place(leaf: Any) -> Array:
        leaf = np.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] % local:
            raise ValueError(
                f"batch has a leaf of shape {leaf.shape}, whose rows cannot be split evenly over the {local} "
                f"devices of this process: pass [rows, ...] with a multiple of {local} rows."
            )
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(place, batch)
