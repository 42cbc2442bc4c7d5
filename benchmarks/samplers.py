"""Do the samplers of the course cost more than their network evaluations?

    python benchmarks/samplers.py

Target: the wall time of 64 samples of the size of the digits by ancestral sampling (DDPM), by annealed Langevin
dynamics (NCSN) and by ancestral sampling with either kind of guidance is at most 1.15 times the steps times what one
step must evaluate: one network, or with guidance two networks, or one and the gradient of a classifier. These are timed
batched and jitted, several in a row inside one compiled loop, so that no call from Python is counted, each at a time of
its own, so that what the network does with the time is; what is left is the sampler's own work, its random numbers
above all. About two minutes on two CPU cores.

Each sample has its own key and its own label, and ``jax.vmap`` makes the batch: the scan is one for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _timing import Ratio, bars, measure, ratio, show, write
from jax.flatten_util import ravel_pytree

from dgm_jax import ddpm, guidance, langevin, ncsn, networks, runs
from dgm_jax.types import Array, VectorField

TARGET = 1.15
CLASSES = 10


@dataclass(frozen=True)
class Config:
    """Which cases, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    networks: tuple[str, ...] = ("unet", "mlp")
    """Which of the two."""
    batch: int = 64
    """Samples."""
    unet_features: tuple[int, ...] = (32, 64)
    """Channels of the U-Net at its resolutions."""
    mlp_features: tuple[int, ...] = (512, 512, 512)
    """Widths of the MLP."""
    num_steps: int = 40
    """Steps of each sampler; annealed Langevin takes a quarter of them at each of four levels."""
    evaluations: int = 10
    """Evaluations in a row, for the time of one."""
    repeats: int = 15
    """Rounds."""


def with_random_weights(net: Any, key: Array, *inputs: Array) -> Any:
    """Parameters that are all random, also those that start at zero."""
    key_net, key_weights = jax.random.split(key)
    params, unflatten = ravel_pytree(net.init(key_net, *inputs))
    return unflatten(params + 0.03 * jax.random.normal(key_weights, params.shape))


def fields(config: Config, name: str) -> tuple[VectorField, VectorField, tuple[int, ...], Any]:
    """A noise model given a label, log p(y | x_t), the shape of an event, and the parameters of both."""
    t, y = jnp.zeros(()), jnp.int32(0)
    if name == "unet":
        net: Any = networks.UNet(features=config.unet_features, num_classes=CLASSES)
        shape: tuple[int, ...] = (8, 8, 1)
    elif name == "mlp":
        net = networks.MLP(config.mlp_features, jax.nn.silu, time_features=64, num_classes=CLASSES)
        shape = (64,)
    else:
        raise ValueError(f'networks holds {name!r}, which is neither "unet" nor "mlp".')
    judge = networks.MLP((128, 128), jax.nn.silu, time_features=64, out_features=CLASSES)
    params = with_random_weights(net, jax.random.key(0), t, jnp.zeros(shape), y)
    judge_params = with_random_weights(judge, jax.random.key(1), t, jnp.zeros(64))
    noise = networks.conditional(net)
    log_prob_y = guidance.log_prob_y(networks.vector_field(judge))

    def model(n: Array, x: Array, args: Any) -> Array:
        return noise(n.astype(x.dtype) / config.num_steps, x, (args[0][0], args[1]))

    def judged(n: Array, x: Array, args: Any) -> Array:
        return log_prob_y(n.astype(x.dtype) / config.num_steps, x.reshape(-1), (args[0][1], args[1]))

    return model, judged, shape, (params, judge_params)


def case(config: Config, name: str) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Functions to time, and the steps of each sampler."""
    model, judged, shape, params = fields(config, name)
    chain = ddpm.linear(config.num_steps)
    sigmas = ncsn.levels(10.0, 0.1, 4)
    each = config.num_steps // len(sigmas)

    def without_label(n: Array, x: Array, args: Any) -> Array:
        return model(n, x, (args[0], jnp.int32(CLASSES)))

    free = guidance.classifier_free(model, without_label, 2.0)
    guided = guidance.classifier_noise(without_label, judged, chain, 2.0)
    score = guidance.classifier_free(model, without_label, 1.0)  # the conditional model alone

    def ancestral(field: VectorField) -> Callable[..., Array]:
        return lambda key, x, args: ddpm.ancestral(key, field, chain, x, args)

    def annealed(key: Array, x: Array, args: Any) -> Array:
        return langevin.annealed(key, score, sigmas, x, args, step_size=1e-3, num_steps=each)

    ways = {
        "ancestral": (ancestral(model), model, config.num_steps, jnp.int32(1)),
        "annealed": (annealed, score, each * len(sigmas) + 1, jnp.asarray(0.5)),  # with the last denoising step
        "classifier-free": (ancestral(free), free, config.num_steps, jnp.int32(1)),
        "classifier": (ancestral(guided), guided, config.num_steps, jnp.int32(1)),
    }
    key_x, key_samples = jax.random.split(jax.random.key(2))
    x = jax.random.normal(key_x, (config.batch, *shape))
    keys, labels = jax.random.split(key_samples, config.batch), jnp.arange(config.batch) % CLASSES
    labels = labels.astype(jnp.int32)
    functions: dict[str, Callable[[], Any]] = {}
    for way, (sample, field, _, t) in ways.items():
        batched = jax.vmap(field, in_axes=(None, 0, (None, 0)))

        def several(t: Array, x: Array, params: Any, y: Array, batched: Callable[..., Array] = batched) -> Array:
            def one(i: Array, x: Array) -> Array:
                return x - 0.01 * batched(t * (1 + i).astype(t.dtype), x, (params, y))

            with jax.default_matmul_precision("highest"):
                return jax.lax.fori_loop(0, config.evaluations, one, x)

        sampler = jax.jit(jax.vmap(sample, in_axes=(0, 0, (None, 0))))
        functions[way] = partial(sampler, keys, x, (params, labels))
        functions[f"evaluation for {way}"] = partial(jax.jit(several), t, x, params, labels)
    return functions, {way: steps for way, (_, _, steps, _) in ways.items()}


def main(config: Config) -> dict[str, float]:
    """Time both networks and every sampler; print, write and draw; return the worst ratio."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name in config.networks:
        functions, steps = case(config, name)
        times = measure(functions, config.repeats)
        for way, count in steps.items():
            unit = times[f"evaluation for {way}"]
            label = f"{name}, {way}"
            ratios[label] = ratio(times[way], unit, count / config.evaluations)
            rows.append(
                {
                    "case": label,
                    "steps": count,
                    "one evaluation ms": 1e3 * unit.median / config.evaluations,
                    "sampling ms": 1e3 * times[way].median,
                    "ratio": ratios[label].value,
                    "quartiles": ratios[label][1:],
                }
            )
    show(
        f"Sampling {config.batch} digits: times what its steps evaluate (target: at most {TARGET})",
        ["case", "steps", "one evaluation ms", "sampling ms", "ratio", "quartiles"],
        [[*list(row.values())[:5], "{:.2f}-{:.2f}".format(*row["quartiles"])] for row in rows],
    )
    result = {"worst_ratio": max(one.value for one in ratios.values()), "target": TARGET}
    label = "sampling time / (steps x time of what one evaluates)"
    bars("samplers", config, ratios, dict.fromkeys(ratios, TARGET), label)
    write("samplers", config, rows, result)
    return result


if __name__ == "__main__":
    runs.cli(main, Config)
