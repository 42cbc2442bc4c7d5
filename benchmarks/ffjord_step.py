"""How much faster is a training step of FFJORD here than with PyTorch and torchdiffeq's adjoint?

    pip install "dgm-jax[bench]" --extra-index-url https://download.pytorch.org/whl/cpu
    python benchmarks/ffjord_step.py

Target: at least 6 times at batch 64 and 2.5 times at batch 512, on a CPU. About eight minutes on two cores.

A step is loss, gradient and Adam update: -mean log p of eight gaussians, an MLP of 3 x 64 tanh, one Rademacher probe,
both tolerances 1e-5, float32. Here Tsit5, there dopri5 in ``odeint_adjoint`` with its own defaults; same weights, same
batch, same probes. Loss and gradient are compared before anything is timed. Both sides are timed at the first weights
and after some training, when the solver takes more steps. PyTorch runs with every number of threads that is asked for
(less those that a trial shows to be three times slower), and its fastest one is what counts.

``backsolve`` is the one held against the target: the batch inside one solve and the adjoint equation solved backwards,
as torchdiffeq does it. The other ways to take the gradient stand beside.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _timing import Ratio, bars, measure, ratio, show, write

from dgm_jax import datasets, flows, networks, probes, runs
from dgm_jax.types import Array

TARGETS = {64: 6.0, 512: 2.5}
HEADLINE = "backsolve"


@dataclass(frozen=True)
class Config:
    """Which cases, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    batches: tuple[int, ...] = (64, 512)
    """Examples in a step."""
    ways: tuple[str, ...] = ("backsolve", "backsolve, default dt0", "checkpoint", "checkpoint, vmap")
    """Ways to take the gradient."""
    tolerance: float = 1e-5
    """rtol and atol, forwards and backwards."""
    dt0: float = 0.1
    """First step of a solve, of an interval of 1. (torchdiffeq chooses its own by two evaluations.)"""
    width: int = 64
    """Of the three hidden layers."""
    train_steps: int = 300
    """Steps of training before the second measurement."""
    repeats: int = 21
    """Rounds."""
    torch: bool = True
    """Also run PyTorch; without it there is no ratio."""
    torch_threads: tuple[int, ...] = (1, 2)
    """Numbers of threads to try."""


def make_steps(config: Config, net: Any, optimizer: Any) -> dict[str, Callable[..., Any]]:
    """Way -> jitted (params, opt_state, x [batch, 2], e [batch, 1, 2]) -> (params, opt_state, loss, gradient)."""
    velocity = networks.vector_field(net)
    common: dict[str, Any] = {
        "t_data": 1.0,
        "t_base": 0.0,
        "rtol": config.tolerance,
        "atol": config.tolerance,
        "throw": False,
    }
    dt0: dict[str, Any] = {"dt0": config.dt0}

    def in_one_solve(adjoint: Any, **options: Any) -> Callable[[Any, Array, Array], Array]:
        return lambda params, x, e: flows.log_prob_batch(
            velocity, x, params, probes=e, adjoint=adjoint, **common, **options
        )

    def one_solve_each(adjoint: Any, **options: Any) -> Callable[[Any, Array, Array], Array]:
        return lambda params, x, e: jax.vmap(
            lambda x, e: flows.log_prob(velocity, x, params, probes=e, adjoint=adjoint, **common, **options)
        )(x, e)

    checkpoint = diffrax.RecursiveCheckpointAdjoint()
    log_probs = {
        "backsolve": in_one_solve(diffrax.BacksolveAdjoint(), **dt0),
        "backsolve, default dt0": in_one_solve(diffrax.BacksolveAdjoint()),
        "checkpoint": in_one_solve(checkpoint, **dt0),
        "checkpoint, vmap": one_solve_each(checkpoint, **dt0),
    }

    def step(log_prob: Callable[..., Array], params: Any, opt_state: Any, x: Array, e: Array) -> Any:
        loss, gradient = jax.value_and_grad(lambda p: -jnp.mean(log_prob(p, x, e)))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, gradient

    return {way: jax.jit(jax.tree_util.Partial(step, log_probs[way])) for way in config.ways}


def to_list(params: Any) -> list[np.ndarray]:
    """The arrays of an MLP's parameters: for each layer its matrix [out, in], bias and time weights."""
    layers = params["params"]
    names = sorted(name for name in layers if name.startswith("layer_") and not name.endswith("_time"))
    arrays = []
    for name in [*names, "last"]:
        arrays += [np.asarray(layers[name]["kernel"]).T, layers[name]["bias"], layers[f"{name}_time"]]
    return [np.array(array) for array in arrays]


class Torch:
    """The same step in PyTorch."""

    def __init__(self, config: Config, params: Any, x: Array, e: Array) -> None:
        """A field and an optimizer with these weights, for one batch x and its probes e ``[batch, 2]``."""
        import torch
        import torchdiffeq

        class Field(torch.nn.Module):
            """(x, log p) -> (v, div v), the divergence by one product e^T (dv/dx), as FFJORD does it."""

            def __init__(self, arrays: Sequence[np.ndarray]) -> None:
                super().__init__()
                self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(a)) for a in arrays])
                self.e = torch.zeros(())
                self.nfe = 0

            def velocity(self, t: Any, x: Any) -> Any:
                w = self.weights
                for i in range(0, len(w), 3):
                    x = torch.nn.functional.linear(x, w[i], w[i + 1] + t * w[i + 2])
                    x = torch.tanh(x) if i + 3 < len(w) else x
                return x

            def forward(self, t: Any, state: Any) -> Any:
                self.nfe += 1
                with torch.enable_grad():
                    x = state[0].requires_grad_(True)
                    v = self.velocity(t, x)
                    (product,) = torch.autograd.grad(v, x, self.e, create_graph=True)
                    return v, (product * self.e).sum(1)

        self.torch, self.solve, self.tolerance = torch, torchdiffeq.odeint_adjoint, config.tolerance
        self.field = Field(to_list(params))
        self.optimizer = torch.optim.Adam(self.field.parameters(), lr=1e-3, fused=True)
        self.times = torch.tensor([1.0, 0.0])
        self.x, self.field.e = (torch.tensor(np.asarray(array)) for array in (x, e))

    def load(self, params: Any) -> None:
        """Take these weights."""
        with self.torch.no_grad():
            for weight, array in zip(self.field.weights, to_list(params), strict=True):
                weight.copy_(self.torch.tensor(array))

    def step(self, threads: int) -> float:
        """One training step; the loss."""
        self.torch.set_num_threads(threads)
        state = (self.x, self.torch.zeros(len(self.x)))
        z, integral = self.solve(
            self.field, state, self.times, rtol=self.tolerance, atol=self.tolerance, method="dopri5"
        )
        loss = -(-0.5 * (z[1] ** 2).sum(1) - np.log(2 * np.pi) + integral[1]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def gradient(self) -> list[np.ndarray]:
        """Of the last step, in the order of ``to_list``."""
        return [weight.grad.numpy() for weight in self.field.weights]


def relative(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """|ours - theirs| / |theirs| of two gradients."""
    flat = [np.concatenate([np.ravel(array) for array in arrays]) for arrays in (ours, theirs)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def check(functions: Mapping[str, Callable[[], Any]], peer: Torch) -> tuple[dict[str, float], int]:
    """How far our gradients are from PyTorch's, and its evaluations; ``ValueError`` for more than rounding."""
    their_loss = peer.step(1)
    nfe = peer.field.nfe
    apart = {}
    for way, function in functions.items():
        _, _, loss, gradient = function()
        apart[way] = relative(to_list(gradient), peer.gradient())
        if abs(float(loss) - their_loss) > 1e-3 * abs(their_loss) or apart[way] > 1e-3:
            raise ValueError(
                f"{way}: loss {float(loss)} against {their_loss}, gradients apart by {apart[way]:.1e}: "
                "the two sides do not compute the same thing."
            )
    return apart, nfe


def main(config: Config) -> dict[str, float]:
    """Compare, time, print, write and draw; return the speed-up at each batch size and set of weights."""
    if config.torch and not all(importlib.util.find_spec(name) for name in ("torch", "torchdiffeq")):
        raise ImportError('PyTorch or torchdiffeq is missing: pip install "dgm-jax[bench]", or pass --no-torch.')
    net = networks.MLP((config.width,) * 3, last_init=jax.nn.initializers.normal(config.width**-0.5))
    key = jax.random.key(0)
    first = net.init(key, jnp.zeros(()), jnp.zeros(2))
    optimizer = optax.adam(1e-3)
    draw = jax.jit(datasets.two_d("eight_gaussians"), static_argnums=1)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    targets: dict[str, float] = {}
    result: dict[str, float] = {}
    for batch in config.batches:
        steps = make_steps(config, net, optimizer)
        opt_state = optimizer.init(first)

        def data(n: int, batch: int = batch) -> tuple[Array, Array]:
            key_x, key_e = jax.random.split(jax.random.fold_in(key, n))
            x = draw(key_x, batch)
            return x, jnp.swapaxes(probes.rademacher(key_e, x, 1), 0, 1)

        compiling = measure({way: partial(step, first, opt_state, *data(0)) for way, step in steps.items()}, 0)
        trained = first
        for n in range(config.train_steps):
            trained, opt_state, *_ = next(iter(steps.values()))(trained, opt_state, *data(n))
        for weights, params in {"first weights": first, "trained": trained}.items():
            x, e = data(config.train_steps)
            functions: dict[str, Callable[[], Any]] = {
                way: partial(step, params, opt_state, x, e) for way, step in steps.items()
            }
            agreement: dict[str, float] = {}
            before: Callable[[], Any] = lambda: None  # noqa: E731
            if config.torch:
                peer = Torch(config, params, x, e[:, 0])
                agreement, nfe = check(functions, peer)
                before = partial(peer.load, params)
                theirs = {f"torch, {n} threads": partial(peer.step, n) for n in config.torch_threads}
                trial = {name: float(np.min(t.rounds)) for name, t in measure(theirs, 2, before).items()}
                for name, function in theirs.items():  # on a busy machine many threads take seconds
                    if trial[name] <= 3 * min(trial.values()):
                        functions[name] = function
            times = measure(functions, config.repeats, before)
            theirs_all = [seconds for name, seconds in times.items() if name.startswith("torch")]
            best = min(theirs_all, key=lambda seconds: seconds.median, default=None)
            for name, seconds in times.items():
                row: dict[str, Any] = {"batch": batch, "weights": weights, "way": name}
                row |= {"ms": 1e3 * seconds.median, "gradient off": agreement.get(name)}
                row["first call s"] = compiling[name].first if name in compiling else None
                if best is not None:
                    speed_up = ratio(best, seconds)
                    row |= {"speed-up": speed_up.value, "quartiles": speed_up[1:], "torch nfe": nfe}
                    if not name.startswith("torch"):
                        label = f"{name}, batch {batch}, {weights}"
                        ratios[label] = speed_up
                        if name == HEADLINE:
                            result[f"speed_up_{batch}_{weights.split()[0]}"] = speed_up.value
                            if batch in TARGETS:
                                targets[label] = TARGETS[batch]
                rows.append(row)
    show(
        "A training step of FFJORD: times faster than torchdiffeq's adjoint "
        f"(targets of {HEADLINE}: {', '.join(f'{value} at batch {batch}' for batch, value in TARGETS.items())})",
        ["way", "batch", "weights", "ms", "speed-up", "quartiles", "first call s", "gradient off", "torch nfe"],
        [
            [
                row["way"],
                row["batch"],
                row["weights"],
                row["ms"],
                row.get("speed-up", "-"),
                "{:.2f}-{:.2f}".format(*row["quartiles"]) if "quartiles" in row else "-",
                "-" if row["first call s"] is None else row["first call s"],
                "-" if row["gradient off"] is None else f"{row['gradient off']:.0e}",
                row.get("torch nfe", "-"),
            ]
            for row in rows
        ],
    )
    write("ffjord_step", config, rows, result)
    if ratios:
        bars("ffjord_step", config, ratios, targets, "times faster than torchdiffeq")
    return result


if __name__ == "__main__":
    runs.cli(main, Config)
