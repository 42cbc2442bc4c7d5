"""DDPM: can digits of a class that was asked for, learned in three minutes of a CPU, be told from real ones?

    python experiments/ddpm.py

trains on 1,500 of scikit-learn's digits (8 x 8, 17 levels), draws 100 of each class by ancestral sampling and writes to
runs/ddpm/ what came of it: a row of samples for each class, a strip of denoising, the loss, and in metrics.json
  - how many samples an independent classifier, trained on real digits, takes for the class that was asked for;
  - how well classifiers, trained to, tell samples from as many real test digits: 50 per cent would be chance;
  - how near samples lie to training digits, beside how near test digits lie: whether they were learned by heart;
  - the variational bound on the test set in bits per dimension, of the 17 levels themselves by the discretised decoder.
Expected: 98.4 +- 0.4 per cent recognised, by a classifier right on 98.0 +- 0.8 per cent of real test digits; the best
of three two-sample classifiers right on 54 +- 2 per cent, and 53 +- 2 with real training digits in the place of
samples; samples 18.2 +- 0.1 away from the nearest training digit, test digits 16.7 +- 0.2; at most 2.21 +- 0.02 bits
per dimension; loss 0.053. 150 seconds of processor time.

Other data: mnist, fashion_mnist or cifar10 from files in --data-dir, for which --network unet and a GPU are right.
A run that was stopped goes on with --resume.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import datasets, ddpm, metrics, networks, plots, runs, training
from dgm_jax.types import Array, Chain, VectorField

MEASURING = ("samples_per_class", "test_examples", "num_draws", "variance")  # may change when a run is resumed


@dataclass(frozen=True)
class Config:
    """What to train on, what to train, and how much to measure."""

    out: str = "runs/ddpm"
    """Folder of the run."""
    resume: bool = False
    """Continue the run in that folder from its last good checkpoint."""
    seed: int = 0
    """Of all random numbers."""
    data: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    """Labelled images."""
    data_dir: str = "data"
    """Folder with the files of mnist, fashion_mnist or cifar10."""
    chain: Literal["linear", "cosine"] = "linear"
    """Betas: growing linearly to 20 / T, or from a squared cosine."""
    chain_steps: int = 500
    """T, the steps of the chain, and evaluations for a sample."""
    objective: Literal["simple", "bound"] = "simple"
    """Every step's squared error of the noise alike, or weighted as in the variational bound."""
    network: Literal["mlp", "unet"] = "mlp"
    """Residual MLP with logits for the levels of each pixel, best for digits; or U-Net, for larger images."""
    features: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of the MLP's hidden layers."""
    channels: tuple[int, ...] = (32, 64)
    """Channels of the U-Net at each resolution, finest first."""
    num_steps: int = 4000
    """Training steps."""
    batch_size: int = 128
    """Examples in a step, over all devices."""
    learning_rate: float = 1e-3
    """Largest learning rate of Adam, after a twentieth of the steps; it falls along a cosine."""
    weight_decay: float = 0.35
    """Of AdamW, against learning 1,500 digits by heart."""
    ema_decay: float = 0.999
    """Of the average of the parameters over the steps, which is what is used in the end."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    samples_per_class: int = 100
    """Samples of each class."""
    variance: Literal["beta", "posterior"] = "posterior"
    """Of the noise in a step back."""
    test_examples: int = 1000
    """Test examples whose bound is measured, or as many as there are: digits has 297."""
    num_draws: int = 2
    """Draws of noise for each of them in each step of the chain."""


def make_chain(config: Config) -> Chain:
    """T steps from data to noise; abar at the end hardly depends on T."""
    if config.chain == "cosine":
        return ddpm.cosine(config.chain_steps)
    if config.chain_steps <= 20:
        raise ValueError(f"--chain linear needs more than 20 --chain-steps, got {config.chain_steps}: try cosine.")
    return ddpm.linear(config.chain_steps, 0.1 / config.chain_steps, 20.0 / config.chain_steps)


def to_floats(integers: Any, levels: int) -> Array:
    """The middles of the bins into which the levels cut [-1, 1]."""
    return (2 * jnp.asarray(integers, jnp.zeros(()).dtype) + 1) / levels - 1


def make_model(config: Config, key: Array, chain: Chain, event: tuple[int, ...], levels: int, std: float) -> Any:
    """The noise model (n, x, (params, y)) and its initial parameters.

    The MLP F gives each pixel logits over its levels c_k, which it sees through Gaussian noise of known width:

        eps = (x - alpha x0) / sigma,    x0 = sum_k p_k c_k,    log p_k = F_k - (x - alpha c_k)^2 / (2 sigma^2) + const:

    exact for pixels that are independent, whose levels then fall into place at the end by themselves. The U-Net adds to
    what is right for Gaussian data of that std (Karras et al. (2022), equation 7):

        eps = sigma x / m - alpha std / sqrt(m) F,    m = alpha^2 std^2 + sigma^2.

    Both see x / sqrt(m), of variance one, and log(sigma / alpha) / 4 as the time.
    """
    t, x, y = jnp.zeros(()), jnp.zeros(event), jnp.zeros((), jnp.int32)
    unet = config.network == "unet"
    if not unet and levels > 32:
        raise ValueError(f"--network mlp gives each pixel a logit for each level, too many with {levels}: take unet.")
    options: dict[str, Any] = {"num_classes": 10, "param_dtype": x.dtype}
    if unet:
        net: Any = networks.UNet(config.channels, attention=True, **options)
    else:
        options |= {"time_features": 64, "residual": True, "out_features": x.size * levels}
        net = networks.MLP(config.features, jax.nn.silu, **options)
    field = networks.conditional(net)
    values = to_floats(np.arange(levels), levels)
    shape = event if unet else (x.size,)
    log_kept = jnp.cumsum(jnp.log1p(-chain.betas))  # log abar; 1 - abar of it keeps its digits where abar is near one

    def noise_model(n: Array, x: Array, args: Any) -> Array:
        alpha, sigma = jnp.exp(0.5 * log_kept[n]), jnp.sqrt(-jnp.expm1(log_kept[n]))
        m = (alpha * std) ** 2 + sigma**2
        f = field(jnp.log(sigma / alpha) / 4, (x / jnp.sqrt(m)).reshape(shape), args)
        if unet:
            return sigma / m * x - alpha * std / jnp.sqrt(m) * f
        logits = f.reshape(-1, levels) - ((x.reshape(-1, 1) - alpha * values[None]) / sigma) ** 2 / 2
        return (x - alpha * (jax.nn.softmax(logits) @ values).reshape(x.shape)) / sigma

    return noise_model, jax.jit(net.init)(key, t, x.reshape(shape), y)


def make_loss(noise_model: VectorField, chain: Chain, config: Config, levels: int) -> Callable[..., Array]:
    """Mean over the batch and the pixels, each example at a step of its own."""
    weight = None if config.objective == "simple" else ddpm.weights(chain)
    steps = len(chain.betas)

    def loss(params: Any, key: Array, batch: tuple[Array, Array]) -> Array:
        x0, labels = to_floats(batch[0], levels), batch[1]
        key_step, key_noise = jax.random.split(key)
        u = (jnp.arange(len(x0), dtype=x0.dtype) + jax.random.uniform(key_step, (len(x0),))) / len(x0)
        n = jnp.minimum((steps * u).astype(jnp.int32), steps - 1)  # one step in each share of the chain
        noise = jax.random.normal(key_noise, x0.shape)
        each = jax.vmap(lambda n, x, e, y: ddpm.loss(noise_model, chain, n, x, e, (params, y), weight=weight))
        return jnp.mean(each(n, x0, noise, labels)) / x0[0].size

    return loss


def share_of(hits: np.ndarray, name: str) -> dict[str, float]:
    """A proportion with its binomial standard error."""
    share = float(np.mean(hits))
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / len(hits))}


class Judged(NamedTuple):
    """Images on their levels, one row for each, and what they show."""

    x: np.ndarray
    y: np.ndarray


def judge(samples: Judged, train: Judged, test: Judged, seed: int) -> dict[str, float]:
    """Whether samples show what was asked for, can be told from test digits, and were learned by heart."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import pairwise_distances_argmin_min
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    classifier = SVC(C=10.0, gamma="scale").fit(train.x[:5000], train.y[:5000])
    results = share_of(classifier.predict(test.x) == test.y, "classifier_accuracy")
    results |= share_of(classifier.predict(samples.x) == samples.y, "recognised")

    # as many samples of each class as the test set has, so that classes give nothing away
    count = min(np.sum(samples.y == y) / max(np.sum(test.y == y), 1) for y in range(10))
    rows = {y: np.flatnonzero(test.y == y) for y in range(10)}
    rows = {y: where[: int(min(count, 1.0) * len(where))] for y, where in rows.items()}
    real = test.x[np.concatenate(list(rows.values()))]
    pools = {"": samples, "_of_train": train}  # and real training digits, for what chance looks like
    judges = {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)),
        "svm": SVC(C=10.0, gamma="scale"),
        "forest": RandomForestClassifier(200, random_state=seed),
    }
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    for suffix, pool in pools.items():
        other = np.concatenate([pool.x[np.flatnonzero(pool.y == y)[: len(rows[y])]] for y in range(10)])
        both, which = np.concatenate([real, other]), np.repeat([0, 1], len(real))
        told = {name: cross_val_predict(one, both, which, cv=folds) == which for name, one in judges.items()}
        for name, hits in told.items():
            results |= share_of(hits, f"two_sample_{name}{suffix}")
        results |= share_of(max(told.values(), key=np.mean), f"two_sample_accuracy{suffix}")
    results["two_sample_examples"] = 2 * len(real)

    nearest = {"samples": samples.x, "test": test.x}
    nearest = {name: pairwise_distances_argmin_min(x, train.x)[1] for name, x in nearest.items()}
    for name, values in nearest.items():
        results[f"nearest_train_{name}"] = values.mean()
        results[f"nearest_train_{name}_stderr"] = values.std(ddof=1) / math.sqrt(len(values))
    near = nearest["samples"] < np.quantile(nearest["test"], 0.05)
    return results | share_of(near, "nearer_than_95_percent_of_test")


def main(config: Config) -> dict[str, Any]:
    """Trains, samples, measures, draws; returns what metrics.json holds."""
    began = time.perf_counter(), time.process_time()
    for name, least in {"num_steps": 1, "samples_per_class": 1, "test_examples": 2, "num_draws": 2}.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}.")
    mesh = training.mesh()
    keys = jax.random.split(jax.random.key(config.seed), 6)
    key_data, key_net, key_train, key_start, key_sample, key_bound = keys
    chain = make_chain(config)
    images = datasets.digits() if config.data == "digits" else datasets.load_images(config.data, config.data_dir)
    run = runs.open_run(config, may_differ=MEASURING)
    event, levels = images.train.shape[1:], images.levels
    std = float(jnp.std(to_floats(images.train[:5000], levels)))
    noise_model, params = make_model(config, key_net, chain, event, levels, std)

    rows = jax.jit(training.batch_indices, static_argnums=(2, 3))
    mine = training.local_rows(mesh, config.batch_size)

    def batch(n: int) -> Any:
        which = np.asarray(rows(key_data, n, len(images.train), config.batch_size))[mine]
        return training.shard(mesh, (images.train[which], images.train_labels[which]))

    steps = config.num_steps
    optimizer = training.adam(config.learning_rate, steps, warmup=steps // 20, weight_decay=config.weight_decay)
    loss = make_loss(noise_model, chain, config, levels)
    update = jax.jit(training.step(loss, optimizer, ema_decay=config.ema_decay), donate_argnums=0)
    state, key = training.replicate(mesh, (training.init(params, optimizer), key_train))
    every = config.checkpoint_every
    state, history = runs.train(update, state, batch, key, num_steps=steps, run=run, checkpoint_every=every)
    params = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state.ema)
    times = {"training": time.perf_counter() - began[0]}

    def clock(name: str, value: Any) -> Any:
        value = jax.block_until_ready(value)
        times[name] = time.perf_counter() - began[0] - sum(times.values())
        runs.say(f"{name}: {times[name]:.1f} s")
        return value

    variance, clip = config.variance, (-1.0, 1.0) if config.network == "unet" else None  # levels are inside anyway

    def over(one: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(lambda params, *rows: jax.lax.map(lambda row: one(params, *row), rows, batch_size=250))

    def draw(params: Any, key: Array, z: Array, y: Array, path: bool = False) -> Array:
        return ddpm.ancestral(key, noise_model, chain, z, (params, y), variance=variance, clip=clip, path=path)

    def bound(params: Any, key: Array, x: Array, y: Array) -> ddpm.Bound:
        options: Any = {"variance": variance, "bins": (levels, -1.0, 1.0), "num_draws": config.num_draws}
        return ddpm.bound(key, noise_model, chain, x, (params, y), **options)

    labels = np.tile(np.arange(10, dtype=np.int32), config.samples_per_class)
    z = jax.random.normal(key_start, (len(labels), *event))
    runs.say(f"sampling {len(labels)} images in {config.chain_steps} steps")
    asked = jax.random.split(key_sample, len(labels)), z, jnp.asarray(labels)
    uniform = metrics.uniform_dequantization(levels, -1.0, 1.0)
    samples = np.asarray(metrics.quantize(clock("sampling", over(draw)(params, *asked)), uniform))

    test, test_labels = images.test[: config.test_examples], images.test_labels[: config.test_examples]
    runs.say(f"bounding log p of {len(test)} test images")
    shown = jax.random.split(key_bound, len(test)), to_floats(test, levels), jnp.asarray(test_labels)
    found = clock("bound", over(bound)(params, *shown))
    dims, nats = int(np.prod(event)), np.prod(event) * math.log(2)
    none = metrics.Dequantization("none: discretised Gaussian decoder", levels, 0.0, float(levels))  # bins of width 1
    bits, bits_stderr = metrics.bits_per_dim(found.log_prob, dims, none)

    flat = lambda x, y: Judged(np.asarray(x).reshape(len(x), -1).astype(float), np.asarray(y))  # noqa: E731
    train = flat(images.train, images.train_labels)
    results = judge(flat(samples, labels), train, flat(test, test_labels), config.seed)

    wall = samples.reshape(-1, 10, *event)[:16].swapaxes(0, 1)
    columns, wall = wall.shape[1], wall.reshape(-1, *event)
    title = "samples of each class that was asked for"
    plots.images(run.folder / "samples.png", wall, high=levels - 1, columns=columns, title=title)
    path = over(partial(draw, path=True))(params, *(part[:6] for part in asked))
    at = np.unique((config.chain_steps * (1 - np.linspace(1, 0, 11) ** 2)).round().astype(int))  # most happens late
    frames, when = np.asarray(path)[:, at], 1 - at / config.chain_steps
    plots.denoising(run.folder / "denoising.png", frames, when, low=-1.0, high=1.0, title="samples on their way")
    plots.curve(run.folder / "loss.png", history, label=f"{config.objective} loss per dimension")
    clock("judging_and_drawing", None)
    results = {
        "final_loss": float(np.mean(history["loss"][-100:])),
        **results,
        "test_bits_per_dim_at_most": float(bits),
        "test_bits_per_dim_at_most_stderr": float(bits_stderr),  # over the test set, that of the draws within
        "test_bits_per_dim_at_most_stderr_of_draws": float(jnp.linalg.norm(found.stderr)) / len(test) / nats,
        "bits_per_dim_of_decoder": float(jnp.mean(found.terms[:, 0])) / nats,
        "bits_per_dim_of_prior": float(jnp.mean(found.terms[:, -1])) / nats,
        "dequantization": none.name,
        "test_examples": len(test),
        "evaluations": config.chain_steps,
        **{f"seconds_{name}": seconds for name, seconds in times.items()},
        "seconds_of_processor": time.process_time() - began[1],
    }
    return runs.write_metrics(run, results)


if __name__ == "__main__":
    runs.cli(main, Config)
