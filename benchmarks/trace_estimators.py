"""How wrong is an estimate of a trace after so many products, and what does a divergence cost beside its field?

    pip install traceax matfree folx                                    # the peers; those that are missing are left out
    python benchmarks/trace_estimators.py
    python benchmarks/trace_estimators.py --parts errors --graph edges.txt      # and the triangles of a graph

Five parts, each of which ``--parts`` can name:

errors      Relative error, root mean square over draws (and examples: over the root mean square of their traces),
            against the number of products, in float64. Maps: five spectra in a random basis of 200 dimensions (flat,
            linear, i^-2, 0.7^i, a step); Jacobians dv/dx of tanh networks on the 8 x 8 digits, at random t: at the
            start and after flow matching ("trained") at x_t of test digits, and after maximum likelihood ("CNF") where
            the flow itself takes them; the cube of the adjacency matrix of a graph, whose trace is six times the number
            of triangles: an Apollonian network, of n nodes and 3 n - 8 triangles, and with ``--graph`` a file's.
            Some know a map near the one tested: the mean Jacobian at other digits; for a spectrum, the matrix with 5
            per cent of noise. Into its eigenvectors probes are turned ("rotated", of Rademacher and Hadamard probes),
            those of its largest eigenvalues are deflated, for a third of the products, and it is the control variate.
            Groups of coordinates are learnt from Jacobians at other digits, as many as there are products.
            Every draw of ``trace.choose`` has pilots of its own, max(8, products / 2) of them, at one example, which
            are not counted: its estimator serves for all the examples. It gets the groups and the basis of the
            Jacobians, and is compared with the best of all of ours there, and elsewhere of all that know no map near;
            half of the draws say which is the best, and the others how good. Beside it: how often a two-sigma interval
            holds the trace.
costs       Time over one evaluation of the field f, float32: a tanh network of two hidden layers of h units, v(t, x),
            m dimensions, a batch of B. One probe, 16 probes, the exact trace by products, and the one that a field of
            ``networks.vector_field`` offers, its tables being made once, before. Every way returns f(x) too, and every
            evaluation is one of several in a row inside one compiled loop, as in a solve, with nothing carried over.
            The examples of a batch have probes of their own; "shared" says that they all have the same, and "forward"
            that the products are J e, as a caller may choose. The exact trace beside those of whole Jacobians, by
            ``jax.jacfwd`` and by products e^T J of all unit vectors at once. Left out are exact traces of more than
            6e10 multiplications between the hidden layers, m B h^2, which take seconds each, and Jacobians of more than
            4e7 numbers, m^2 B. The figure is the median over the rounds of the ratio within a round.
networks    The same for other networks, each over its own f, at B = 64: three hidden layers of h units by 16 probes, by
            16 probes in the hidden space and exactly; ``networks.HollowNet`` and ``networks.OTFlow`` exactly.
gradients   value_and_grad by the parameters of mean(f^2 + div f), over that of mean(f^2) alone. The field's own
            divergence makes its tables anew.
laplacians  Of a scalar network u(t, x), over one evaluation of u.

Peers in the same run, on the same f, which they see through its products J e of ``jax.jvp``: traceax and matfree. For
the costs, both get the same probes as data as our functions do: traceax from a sampler that hands them out, matfree in
place of the key, which only its sampler reads. For the errors they draw their own, from the same keys, by which
matfree's draws are ours. Laplacians: folx.

All times are taken in three processes, one after the other, and the medians over them count.

Targets stand beside what was found in the last table, with what each process found. About half an hour on two CPU
cores that others use too; fewer of --widths, --sizes, --batches and --processes make it shorter.
"""

import functools
import importlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _timing import Ratio, Seconds, measure, show, write

from dgm_jax import datasets, divergence, flows, networks, probes, quadrature, runs, solvers, trace, training
from dgm_jax.types import Array, VectorField

PARTS = ("errors", "costs", "networks", "gradients", "laplacians")
PROBES = ("rademacher", "gaussian", "sphere", "orthogonal", "hadamard")
LEARNT = ("groups", "rotated", "rotated hadamard", "deflated", "control_variate")
"""Those that know other maps of the kind, or one near."""
GRADIENT_SIZE = 64  # m of the gradients
MOST_MULTIPLICATIONS, MOST_NUMBERS = 6e10, 4e7  # of an exact trace, of all the Jacobians of a batch
CHOICES = {"hutchinson": "hadamard", "grouped": "groups", "rotated": "rotated hadamard"}
"""What we call a choice, where that is another name."""
PEERS = {
    "traceax Hutchinson": "rademacher",
    "traceax Hutch++": "hutch_pp",
    "traceax XTrace": "xtrace",
    "traceax XNysTrace": "xnystrace",
    "matfree Hutchinson": "rademacher",
    "matfree XTrace": "xtrace",
}  # and which of ours they are to be compared with
ONE_BY_ONE = ("xtrace", "xnystrace", "traceax XNysTrace", "traceax XTrace", "matfree XTrace")
"""Draws of these follow each other: on a CPU, batches of independent decompositions, run at once, can stand still."""
COLORS = {
    "rademacher": "#0072B2", "gaussian": "#56B4E9", "sphere": "#999999", "orthogonal": "#8C6D31",
    "hadamard": "#CC79A7", "groups": "#000000", "rotated": "#666600", "rotated hadamard": "#A0A000",
    "deflated": "#8855BB", "control_variate": "#BB88EE", "hutch_pp": "#E69F00", "na_hutch_pp": "#F0E442",
    "xtrace": "#009E73", "xnystrace": "#D55E00", "choose": "#7F0000",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Which parts, which sizes, and how often."""

    out: str = "runs/benchmarks"
    """Folder of the results."""
    parts: tuple[str, ...] = PARTS
    """Which of errors, costs, networks, gradients and laplacians."""
    graph: str | None = None
    """A file with one edge a line, two node numbers first, below a line with the numbers of nodes and edges or none:
    its triangles are counted too."""
    generations: int = 6
    """Of the Apollonian network, whose triangles are counted: 367 nodes; 0 for none."""
    dimension: int = 200
    """Of the known spectra."""
    products: tuple[int, ...] = (6, 24, 96)
    """Numbers of products on the known spectra and the graph, multiples of 6 that the peers can use up."""
    field_products: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Numbers of products on the Jacobians, below their 64 dimensions; the Hutch++ of traceax uses multiples of 3."""
    draws: int = 384
    """Draws of the probes: on one known spectrum, and over all examples of a field."""
    graph_draws: int = 256
    """Draws of the probes on the graph."""
    pilots: int = 24
    """Draws of the pilots of ``trace.choose``."""
    examples: int = 64
    """Test digits whose Jacobians are looked at; eight times as many training digits teach the groups."""
    field_widths: tuple[int, ...] = (64, 512)
    """Units of each of the two hidden layers of the trained fields."""
    train_steps: int = 4000
    """Training steps of the narrowest field; the others get fewer, by their widths, but a quarter at least."""
    cnf_steps: int = 300
    """The same by maximum likelihood, 64 digits each."""
    widths: tuple[int, ...] = (64, 512)
    """h of the costs."""
    sizes: tuple[int, ...] = (2, 64, 784, 3072)
    """m of the costs."""
    batches: tuple[int, ...] = (1, 64, 512)
    """B of the costs."""
    other_batch: int = 64
    """B of the other networks, the gradients and the Laplacians."""
    other_sizes: tuple[int, ...] = (64, 784, 3072)
    """m of the other networks."""
    laplacian_sizes: tuple[int, ...] = (8, 64, 784)
    """m of the Laplacians, at the smallest h."""
    target_seconds: float = 0.003
    """Evaluations in a row, until they take about this long."""
    seconds: float = 1.0
    """What all rounds of one cell may take together, about; three rounds there are at least, but two of slow ones."""
    repeats: int = 25
    """Rounds, at most."""
    processes: int = 3
    """In which all times are taken anew, one after the other: from one to the next the same program can take half as
    long again."""


class Target(NamedTuple):
    """A number, and what it should be: at most ``high``, at least ``low``. ``place`` is where it was found."""

    name: str
    value: float
    low: float = -np.inf
    high: float = np.inf
    place: str = ""


def peers() -> dict[str, Any]:
    """The peers that are installed, by name; of the others it is said that they are missing."""
    found: dict[str, Any] = {}
    for name, module in {"traceax": "traceax", "matfree": "matfree.stochtrace", "folx": "folx"}.items():
        try:
            found[name] = importlib.import_module(module)
        except ImportError:
            runs.say(f"{name} is not installed and is left out: pip install {name}")
    return found


# ---------------------------------------------------------------------------------------------------------- errors


class Near(NamedTuple):
    """A known map near others.

    Attributes:
        matrix: ``[m, m]``.
        basis: eigenvectors of its symmetric part as columns, largest eigenvalues first ``[m, m]``.
    """

    matrix: Array
    basis: Array


class Map(NamedTuple):
    """Linear maps, alike but for their numbers.

    Attributes:
        name: what the tables call it.
        apply: (numbers of one map, e) -> A e; the same function for maps that can share what is compiled.
        data: the numbers of every map, one in front of the other, ``[examples, ...]``.
        m: entries of e.
        truth: the traces ``[examples]``.
        positive: whether they are symmetric and positive semidefinite.
        groups: number of groups -> the group of each coordinate; where they could be learnt.
        near: a map near them, where one is known.
        one_by_one: whether the draws follow each other, to save memory.
    """

    name: str
    apply: Callable[[Any, Array], Array]
    data: Any
    m: int
    truth: np.ndarray
    positive: bool = False
    groups: Mapping[int, np.ndarray] | None = None
    near: Near | None = None
    one_by_one: bool = False


def near(matrix: np.ndarray) -> Near:
    """The map and its eigenvectors."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return Near(jnp.asarray(matrix), jnp.asarray(vectors[:, np.argsort(-np.abs(values))]))


def product(a: Array, e: Array) -> Array:
    """A e of a matrix."""
    return a @ e


def spectra(m: int) -> list[Map]:
    """The families by which Hutch++ and XTrace were tried, each in one random basis."""
    i = np.arange(m)
    families = {
        "flat": 3 - 2 * i / (m - 1),
        "linear": 1 - i / m,
        "i^-2": (i + 1.0) ** -2,
        "0.7^i": 0.7**i,
        "step": np.where(i < m // 4, 1.0, 1e-3),
    }
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(m, m)))[0]
    noise = generator.normal(size=(m, m))
    noise = (noise + noise.T) / np.linalg.norm(noise + noise.T)
    maps = []
    for name, values in families.items():
        a = (basis * values) @ basis.T
        known = near(a + 0.05 * np.linalg.norm(values) * noise)
        data = jnp.asarray((a + a.T) / 2)[None]
        maps.append(Map(name, product, data, m, values.sum()[None], positive=True, near=known))
    return maps


def digits() -> tuple[Array, Array]:
    """Training and test digits, ``[num, 64]``, dequantised, between -1 and 1."""
    images, noise = datasets.digits(), np.random.default_rng(0)
    train, test = (
        jnp.asarray((pixels.reshape(len(pixels), -1) + noise.uniform(size=(len(pixels), 64))) / 8.5 - 1, jnp.float32)
        for pixels in (images.train, images.test)
    )
    return train, test


def make_field(width: int, m: int) -> tuple[VectorField, Any]:
    """A tanh network of two hidden layers, its last layer not zero, and its parameters."""
    net = networks.MLP((width, width), last_init=jax.nn.initializers.lecun_normal())
    return networks.vector_field(net), net.init(jax.random.key(0), jnp.zeros(()), jnp.zeros(m))


def path(key: Array, rows: Array) -> tuple[Array, Array, Array]:
    """t uniform, z normal, x_t = (1 - t) x + t z of every row: t, x_t and the velocity z - x."""
    key_t, key_z = jax.random.split(key)
    t, z = jax.random.uniform(key_t, rows.shape[:1]), jax.random.normal(key_z, rows.shape)
    return t, (1 - t[:, None]) * rows + t[:, None] * z, z - rows


def along(field: VectorField, params: Any, key: Array, rows: Array) -> tuple[Array, Array]:
    """t uniform, and where the flow has taken every row from time 0 to t."""
    t = jax.random.uniform(key, rows.shape[:1])
    return t, jax.vmap(lambda t, x: solvers.odeint(field, x, params, t0=0.0, t1=t, throw=False))(t, rows)


def train(field: VectorField, params: Any, data: Array, num_steps: int, *, likelihood: bool = False) -> Any:
    """Parameters after flow matching, E|v(t, x_t) - (z - x)|^2, or after maximum likelihood, data at 0, in nats a
    dimension."""
    rule, size = quadrature.gauss_legendre(8), 64 if likelihood else 256

    def log_prob(x: Array, params: Any) -> Array:
        return flows.log_prob(field, x, params, t_data=0.0, t_base=1.0, rule=rule, rtol=1e-3, atol=1e-3, throw=False)

    def loss(params: Any, key: Array, rows: Array) -> Array:
        if likelihood:
            return -jnp.mean(jax.vmap(log_prob, (0, None))(rows, params)) / rows.shape[1]
        t, x, velocity = path(key, rows)
        return jnp.mean((jax.vmap(field, (0, 0, None))(t, x, params) - velocity) ** 2)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, num_steps))

    @jax.jit
    def scan(params: Any) -> tuple[Any, Array]:
        def step(carry: Any, n: Array) -> tuple[Any, Array]:
            params, state = carry
            rows = data[training.batch_indices(jax.random.key(2), n, len(data), size)]
            value, gradient = jax.value_and_grad(loss)(params, jax.random.fold_in(jax.random.key(1), n), rows)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))
        return params, losses

    params, losses = scan(params)
    name, first, last = "likelihood" if likelihood else "flow matching", losses[:10].mean(), losses[-10:].mean()
    runs.say(f"{name}, {num_steps} steps: loss {float(first):.3f} -> {float(last):.3f}")
    return params


def fields(config: Config) -> list[Map]:
    """Jacobians of the networks, at the start and trained; in float64 from here on."""
    train_digits, test_digits = digits()
    maps = []
    for width in config.field_widths:
        share = max(1 / 4, min(config.field_widths) / width)
        field, start = make_field(width, 64)
        trained, cnf = (
            train(field, start, train_digits, max(int(share * steps), 1), likelihood=likelihood)
            for steps, likelihood in ((config.train_steps, False), (config.cnf_steps, True))
        )

        @partial(jax.jit, static_argnums=3)
        def jacobians(params: Any, key: Array, rows: Array, flows: bool, field: VectorField = field) -> Array:
            t, x = along(field, params, key, rows) if flows else path(key, rows)[:2]
            return jax.vmap(jax.jacfwd(field, 1), (0, 0, None))(t, x, params)

        for state, params in (("at the start", start), ("trained", trained), ("CNF", cnf)):
            tested, others = (
                np.asarray(jacobians(params, jax.random.key(seed), rows, state == "CNF"), np.float64)
                for seed, rows in ((5, test_digits[: config.examples]), (6, train_digits[: 8 * config.examples]))
            )
            symmetric = (others + others.swapaxes(1, 2)) / 2
            groups = {k: probes.learn_groups(symmetric, k) for k in config.field_products}
            with jax.enable_x64(True):
                data, known = jnp.asarray(tested), near(others.mean(0))
            truth = np.trace(tested, 0, 1, 2)
            maps.append(Map(f"digits h={width}, {state}", product, data, 64, truth, groups=groups, near=known))
    return maps


def apollonian(generations: int) -> np.ndarray:
    """Edges of an Apollonian network ``[edges, 2]``: those of a triangle; then in each generation a node inside every
    innermost triangle, joined to its corners. With n nodes it has 3 n - 8 triangles.

    Source: Andrade, Herrmann, Andrade and da Silva (2005), "Apollonian networks: simultaneously scale-free, small
    world, Euclidean, space filling, and with matching graphs".
    """
    edges, innermost, nodes = [(0, 1), (0, 2), (1, 2)], [(0, 1, 2)], 3
    for _ in range(generations):
        smaller = []
        for corners in innermost:
            edges += [(corner, nodes) for corner in corners]
            smaller += [(*side, nodes) for side in itertools.combinations(corners, 2)]
            nodes += 1
        innermost = smaller
    return np.asarray(edges)


def read_edges(file: str) -> np.ndarray:
    """The edges in a file ``[edges, 2]``, as two names each."""
    lines = [line.split()[:2] for line in Path(file).read_text().splitlines() if line.strip() and line[0] not in "#%"]
    named = {node for line in lines[1:] for node in line}
    if lines and lines[0][-1] == str(len(lines) - 1) and lines[0][0].isdigit() and int(lines[0][0]) >= len(named):
        lines = lines[1:]  # a head: numbers of nodes and edges
    if not lines:
        raise ValueError(f"graph {file} has no edges: one a line, two node numbers first.")
    return np.asarray(lines)


def graph_map(name: str, edges: np.ndarray) -> Map:
    """e -> A^3 e, A the adjacency matrix of the graph of those edges, without loops or directions."""
    nodes, ends = np.unique(edges.ravel(), return_inverse=True)
    pairs = np.sort(ends.reshape(-1, 2), axis=1)
    pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    near: list[set[int]] = [set() for _ in nodes]
    for i, j in pairs.tolist():
        near[i].add(j)
        near[j].add(i)
    closed = 2 * sum(len(near[i] & near[j]) for i, j in pairs.tolist())  # each triangle six times
    here, there = np.concatenate([pairs, pairs[:, ::-1]]).T

    def apply(edges: tuple[Array, Array], e: Array) -> Array:
        here, there = edges
        for _ in range(3):
            e = jax.ops.segment_sum(e[there], here, num_segments=len(nodes))
        return e

    data = (jnp.asarray(here)[None], jnp.asarray(there)[None])
    runs.say(f"{name}: {len(nodes)} nodes, {len(pairs)} edges, {closed // 6} triangles")
    return Map(f"{name}, A^3", apply, data, len(nodes), np.asarray([float(closed)]), one_by_one=True)


# (matvec, key, x, the map near or None) -> Estimate
Estimator = Callable[[Callable[[Array], Array], Array, Array, Any], trace.Estimate]


def hutch_pp_split(k: int) -> tuple[int, int]:
    """s and g of Hutch++: a third of the products for the sketch, a third for its products, the rest for the rest."""
    s = max(k // 3, 1)
    return s, k - 2 * s


def ours(name: str, k: int, m: int, each: Map | None = None) -> Estimator | None:
    """The estimator of that name with k products; ``None`` where it cannot use them."""
    order, r = 1 << (m - 1).bit_length(), max(k // 3, 1)
    if name in PROBES:
        population = {"orthogonal": m, "hadamard": order}.get(name)
        estimator = partial(trace.hutchinson, population=population)
        return lambda matvec, key, x, _: estimator(matvec, getattr(probes, name)(key, x, k))
    if name == "groups":
        if each is None or each.groups is None:
            return None
        groups = each.groups[k]
        return lambda matvec, key, x, _: trace.grouped(matvec, probes.grouped(key, x, groups))
    if k < 3 and name in ("hutch_pp", "na_hutch_pp"):
        return None
    s, g = hutch_pp_split(k)
    own: dict[str, Estimator] = {
        "rotated": lambda matvec, key, x, near: trace.hutchinson(
            matvec, probes.rotated(probes.rademacher(key, x, k), near.basis)
        ),
        "rotated hadamard": lambda matvec, key, x, near: trace.hutchinson(
            matvec, probes.rotated(probes.hadamard(key, x, k), near.basis), population=order
        ),
        "deflated": lambda matvec, key, x, near: trace.deflated(
            matvec, near.basis[:, :r].T, probes.rademacher(key, x, k - r)
        ),
        "control_variate": lambda matvec, key, x, near: trace.control_variate(
            matvec, lambda e: near.matrix @ e, jnp.trace(near.matrix), probes.rademacher(key, x, k)
        ),
        "hutch_pp": lambda matvec, key, x, _: trace.hutch_pp(matvec, probes.rademacher(key, x, s + g), sketch=s),
        "na_hutch_pp": lambda matvec, key, x, _: trace.na_hutch_pp(matvec, probes.rademacher(key, x, k)),
        "xtrace": lambda matvec, key, x, _: trace.xtrace(matvec, probes.sphere(key, x, k // 2), normalize=True),
        "xnystrace": lambda matvec, key, x, _: trace.xnystrace(matvec, probes.sphere(key, x, k), normalize=True),
    }
    return own[name]


def peer(name: str, k: int, m: int, found: Mapping[str, Any]) -> Callable[[Map], Estimator] | None:
    """A peer's estimator with k products, for matrices; ``None`` where it is missing."""
    package, method = name.split()
    if package not in found or k < 3:
        return None
    module, nothing = found[package], np.inf

    def by_traceax(matvec: Callable[[Array], Array], key: Array, x: Array, _: Any) -> trace.Estimate:
        import lineax

        tags = lineax.positive_semidefinite_tag if method == "XNysTrace" else ()
        operator = lineax.FunctionLinearOperator(matvec, jax.eval_shape(lambda: x), tags)
        signs, sphere = module.RademacherSampler(x.dtype), module.SphereSampler(x.dtype)
        estimator = {
            "Hutchinson": lambda: module.HutchinsonEstimator(signs),
            "Hutch++": lambda: module.HutchPlusPlusEstimator(signs),
            "XTrace": lambda: module.XTraceEstimator(sphere),
            "XNysTrace": lambda: module.XNysTraceEstimator(sphere),
        }[method]()
        value, more = estimator.estimate(key, operator, k)
        return trace.Estimate(value, more.get("std.err", jnp.asarray(nothing)))

    def by_matfree(matvec: Callable[[Array], Array], key: Array, x: Array, _: Any) -> trace.Estimate:
        if method == "Hutchinson":
            sampler = module.sampler_signs(x, num=k)
            estimate = module.estimator_monte_carlo_mean_and_sem(module.monte_carlo_trace(), sampler=sampler)
        else:
            sampler = module.sampler_sphere(x, num=k // 2)
            estimate = module.estimator_leave_one_out_mean_and_sem(module.leave_one_out_xtrace(), sampler=sampler)
        return trace.Estimate(*estimate(matvec, key))

    return by_traceax if package == "traceax" else by_matfree


@functools.cache
def drawn(apply: Callable[[Any, Array], Array], estimator: Estimator, m: int, one_by_one: bool) -> Callable[..., Any]:
    """(data of all maps, keys [examples, draws], the map near) -> draws of the estimator, compiled fast rather than
    well."""

    def of_one(data: Any, keys: Array, near: Any) -> trace.Estimate:
        def draw(key: Array) -> trace.Estimate:
            return estimator(partial(apply, data), key, jnp.zeros(m), near)

        return jax.lax.map(draw, keys) if one_by_one else jax.vmap(draw)(keys)

    def of_all(data: Any, keys: Array, near: Any) -> trace.Estimate:
        if one_by_one:
            return jax.lax.map(lambda both: of_one(*both, near), (data, keys))
        return jax.vmap(of_one, (0, 0, None))(data, keys, near)

    return jax.jit(of_all, compiler_options={"xla_backend_optimization_level": 1})


class Errors(NamedTuple):
    """What the draws of one estimator on one map gave.

    Attributes:
        squares: squared errors ``[examples, draws]``.
        covered: whether the two-sigma interval holds the trace ``[examples, draws]``; ``None`` where it has no end.
    """

    squares: np.ndarray
    covered: np.ndarray | None


def errors_of(name: str, estimator: Estimator, each: Map, draws: int) -> Errors:
    """Draws of the estimator of that name on every example of the map."""
    examples, one_by_one = len(each.truth), each.one_by_one or name in ONE_BY_ONE
    keys = jax.random.split(jax.random.key(7), (examples, max(draws // examples, 1)))
    value, stderr = map(np.asarray, drawn(each.apply, estimator, each.m, one_by_one)(each.data, keys, each.near))
    error = value - each.truth[:, None]
    # an error as small as rounding is covered, as is one of exactly nothing
    inside = np.abs(error) <= 2 * stderr + 1e-12 * np.abs(each.truth[:, None])
    return Errors(error**2, inside if np.all(np.isfinite(stderr)) else None)


def choices(config: Config, each: Map, k: int) -> list[trace.Choice]:
    """What ``trace.choose`` says for pilots drawn anew, at one example after the other."""
    chosen = []
    known = {} if each.groups is None or each.near is None else {"groups": each.groups[k], "basis": each.near.basis}
    for index in range(config.pilots):
        example = index % len(each.truth)
        matvec = partial(each.apply, jax.tree.map(lambda leaf, i=example: leaf[i], each.data))
        pilots = probes.rademacher(jax.random.fold_in(jax.random.key(8), index), jnp.zeros(each.m), max(8, k // 2))
        chosen.append(trace.choose(matvec, pilots, k, positive=each.positive, **known))
    return chosen


def errors(config: Config) -> tuple[list[dict[str, Any]], dict[str, Any], list[Target]]:
    """Rows of every estimator on every map; tables; the targets."""
    found = peers()
    found.pop("folx", None)
    jacobians = fields(config) if config.field_widths else []
    with jax.enable_x64(True):
        maps = spectra(config.dimension) + jacobians
        if config.generations:
            maps.append(graph_map("Apollonian network", apollonian(config.generations)))
        if config.graph is not None:
            maps.append(graph_map(Path(config.graph).stem, read_edges(config.graph)))
        shared = functools.cache(ours)  # one function for all maps, so that they share what is compiled
        shared_peer = functools.cache(lambda name, k, m: peer(name, k, m, found))
        chosen_estimators: dict[Any, Estimator] = {}
        rows, table = [], {}
        for each in maps:
            start, scale = time.perf_counter(), float(np.sqrt(np.mean(each.truth**2)))
            draws = config.graph_draws if each.one_by_one else config.draws
            left_out = {"choose"} | (set() if each.positive else {"xnystrace", "traceax XNysTrace"})
            left_out |= set(LEARNT[1:]) if each.near is None else set()
            left_out |= set(PEERS) if each.one_by_one else set()
            names = [name for name in (*COLORS, *PEERS) if name not in left_out]
            for k in config.field_products if each.groups is not None else config.products:
                if k >= each.m:
                    continue
                for name in names:
                    if name in PEERS:
                        estimator = shared_peer(name, k, each.m)
                    else:
                        estimator = ours(name, k, each.m, each) if name == "groups" else shared(name, k, each.m)
                    if estimator is not None:
                        table[each.name, name, k] = errors_of(name, estimator, each, draws)
                squares, picked = [], []
                for choice in choices(config, each, k):
                    name = CHOICES.get(choice.name, choice.name)
                    if name == "hutch_pp":  # its sketch may be of another size than ours here
                        name = f"hutch_pp {choice.num}"
                        if (each.name, name, k) not in table:
                            estimator = chosen_estimators.setdefault(
                                (k, choice.num),
                                lambda matvec, key, x, _, choice=choice: choice.estimator(
                                    matvec, getattr(probes, choice.draw)(key, x, choice.num)
                                ),
                            )
                            table[each.name, name, k] = errors_of(name, estimator, each, draws)
                    squares.append(table[each.name, name, k].squares)
                    picked.append(choice.name)
                table[each.name, "choose", k] = Errors(np.concatenate(squares), None)
                known = set(PEERS) | (set(LEARNT) if each.groups is None else set())
                # the best by half of the draws, so that luck does not make it one; both are compared by the other half
                halves = {
                    name: [np.mean(table[each.name, name, k].squares.ravel()[half::2]) for half in (0, 1)]
                    for name in names
                    if name not in known and (each.name, name, k) in table
                }
                best = min(halves.values())[1]
                chosen = np.mean([one.ravel()[1::2] for one in squares])
                rows.append(
                    {
                        "part": "errors", "map": each.name, "way": "choose", "products": k,
                        "error": float(np.sqrt(np.mean(squares))) / scale,
                        "covered": None,
                        "over best": float(np.sqrt((chosen + 1e-28 * scale**2) / (best + 1e-28 * scale**2))),
                        "chosen": {name: picked.count(name) for name in sorted(set(picked))},
                    }
                )  # fmt: skip
                for name in names:
                    if (each.name, name, k) in table:
                        one = table[each.name, name, k]
                        rows.append(
                            {
                                "part": "errors", "map": each.name, "way": name, "products": k,
                                "error": float(np.sqrt(np.mean(one.squares))) / scale,
                                "covered": None if one.covered is None else float(np.mean(one.covered)),
                            }
                        )  # fmt: skip
            runs.say(f"{each.name}: {time.perf_counter() - start:.0f} s")
    return rows, *report_errors(config, rows, table)


def report_errors(
    config: Config, rows: list[dict[str, Any]], table: Mapping[Any, Errors]
) -> tuple[dict[str, Any], list[Target]]:
    """Print the tables of the errors; the comparison with the peers and the coverage; the targets."""
    by = {(row["map"], row["way"], row["products"]): row for row in rows}
    maps = list(dict.fromkeys(row["map"] for row in rows))
    for name in maps:
        ks = sorted({k for each, _, k in by if each == name})
        ways = [way for way in (*COLORS, *PEERS) if (name, way, ks[-1]) in by]
        show(
            f"Relative error, root mean square, after so many products: {name}",
            ("estimator", *map(str, ks)),
            [[way, *(f"{by[name, way, k]['error']:.2g}" if (name, way, k) in by else "-" for k in ks)] for way in ways],
        )
    ks = sorted({k for _, _, k in by})
    show(
        "trace.choose: its error over that of the best of ours",
        ("map", *map(str, ks)),
        [
            [name, *(f"{by[name, 'choose', k]['over best']:.2f}" if (name, "choose", k) in by else "-" for k in ks)]
            for name in maps
        ],
    )
    compared, lines = {}, []
    for way, mine in PEERS.items():
        scores: list[tuple[float, str]] = []
        for (name, other, k), one in table.items():
            if other != way or by[name, way, k]["error"] < 1e-11:
                continue
            squares = (table[name, mine, k].squares, one.squares)
            means = [np.mean(each) for each in squares]
            spread = np.sqrt(sum(np.var(each) / each.size / mean**2 for each, mean in zip(squares, means, strict=True)))
            if not np.all(np.isfinite(means)):
                scores.append((-np.inf, f"{name}, {k}"))
            else:
                scores.append((float(np.log(means[0] / means[1]) / spread), f"{name}, {k}"))
        finite = [score for score in scores if np.isfinite(score[0])]
        if scores:
            worst, best = max(finite, default=(np.nan, "-")), min(finite, default=(np.nan, "-"))
            compared[way] = {"worst z": worst, "best z": best, "not finite": len(scores) - len(finite)}
            lines.append([way, mine, worst[0], worst[1], best[0], best[1], len(scores) - len(finite)])
    if lines:
        show(
            "Ours less theirs, log mean square error, in standard errors (where the error is above 1e-11)",
            ("peer", "ours", "highest", "where", "lowest", "where", "theirs not finite"),
            lines,
        )
    pooled: dict[str, dict[int, float]] = {}
    for way in (*COLORS, *PEERS):
        for k in ks:
            shares = [by[name, way, k]["covered"] for name in maps if (name, way, k) in by]
            shares = [share for share in shares if share is not None]
            if shares:
                pooled.setdefault(way, {})[k] = float(np.mean(shares))
    show(
        "Two-sigma intervals that hold the trace, mean over maps (-: no spread is known)",
        ("estimator", *map(str, ks)),
        [[way, *(f"{shares[k]:.3f}" if k in shares else "-" for k in ks)] for way, shares in pooled.items()],
    )
    targets = []
    field = f"digits h={64}, trained"
    for way, k, high in (
        ("groups", 4, 0.042),
        ("groups", 16, 0.014),
        ("rademacher", 4, 0.059),
        ("rademacher", 16, 0.03),
    ):
        if (field, way, k) in by:
            targets.append(Target(f"error of {way}, {k} products, {field}", by[field, way, k]["error"], high=high))
    for title, low, high in (("up to 60 products", 0, 60), ("beyond", 61, np.inf)):
        chosen = [row for row in rows if row["way"] == "choose" and low <= row["products"] <= high]
        if chosen:
            worst = max(chosen, key=lambda row: row["over best"])
            place = f"{worst['map']}, {worst['products']}"
            targets.append(Target(f"choose over the best, {title} ({place})", worst["over best"], high=1.3))
    for way, mine in (("traceax Hutch++", "hutch_pp"), ("traceax XTrace", "xtrace")):
        if way in compared:
            targets.append(Target(f"{mine} over {way}, standard errors", compared[way]["worst z"][0], high=3.0))
    for way in COLORS:
        many = {k: share for k, share in pooled.get(way, {}).items() if k >= 16}
        if many:
            targets += [
                Target(f"{way}: least two-sigma coverage, 16 products and more", min(many.values()), 0.9, 0.99),
                Target(f"{way}: most two-sigma coverage, 16 products and more", max(many.values()), 0.9, 0.99),
            ]
    return {
        "peers": compared,
        "coverage": {way: {str(k): v for k, v in s.items()} for way, s in pooled.items()},
    }, targets


# ----------------------------------------------------------------------------------------------------------- costs


One = Callable[[Any, Array, Any], tuple[Array, Array]]  # (numbers, x [B, m], probes) -> (f(x), divergences [B])


class Way(NamedTuple):
    """One way, compiled.

    Attributes:
        call: runs that many evaluations in a row.
        memory: temporary memory, in bytes.
        compile: seconds to trace and compile.
        arguments: what the one evaluation takes.
    """

    call: Callable[[int], Any]
    memory: int
    compile: float


def in_a_row(one: One, numbers: Any, x: Array, extra: Any) -> Way:
    """Compile a loop of evaluations, each at an x that depends on the one before, and nothing else carried over."""

    def several(num: Array, numbers: Any, start: Array, extra: Any) -> tuple[Array, Array]:
        def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            x, total = state
            # what depends on the numbers and probes alone would otherwise be computed once, before the loop
            now, x, own = jax.lax.optimization_barrier((numbers, x, extra))
            value, number = one(now, x, own)
            return start + 1e-3 * value.reshape(len(value), -1), total + number

        return jax.lax.fori_loop(0, num, step, (start, jnp.zeros(len(start), start.dtype)))

    begin = time.perf_counter()
    compiled = jax.jit(several).lower(jnp.asarray(1), numbers, x, extra).compile()
    took = time.perf_counter() - begin
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Way(lambda num: compiled(jnp.asarray(num), numbers, x, extra), memory, took)


def timed(config: Config, ways: Mapping[str, Way]) -> dict[str, Seconds]:
    """Seconds of one evaluation of each, in turn, as many rounds as the time allows."""

    def clock(way: Way, num: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(way.call(num))
        return time.perf_counter() - start

    nums, expected = {}, 0.0
    for name, way in ways.items():
        took = clock(way, 1)
        if took < config.target_seconds:
            took = min(clock(way, 4) for _ in range(2)) / 4
        nums[name] = max(1, min(10**5, round(config.target_seconds / took)))
        expected += 2 * took * nums[name]
    rounds = int(np.clip(config.seconds / expected, 3 if expected < 2 * config.seconds else 2, max(config.repeats, 2)))
    times = measure({name: partial(way.call, nums[name]) for name, way in ways.items()}, rounds)
    return {name: Seconds(ways[name].compile, each.rounds / nums[name]) for name, each in times.items()}


def over(one: Seconds, other: Seconds) -> Ratio:
    """The median over the rounds of the ratio within a round, with the quartiles."""
    return Ratio(*map(float, np.quantile(one.rounds / other.rounds, [0.5, 0.25, 0.75])))


def plain(field: VectorField) -> VectorField:
    """The same field as a function of which nothing more is known."""
    return lambda t, x, params: field(t, x, params)


def batched(one: Callable[[Callable[[Array], Array], Array, Array], tuple[Array, Array]], field: VectorField) -> One:
    """(f, x, probes) -> (f(x), divergence) as a way over a batch, at t = 1/2."""

    def run(params: Any, x: Array, e: Array) -> tuple[Array, Array]:
        return jax.vmap(lambda x, e: one(lambda x: field(jnp.asarray(0.5), x, params), x, e))(x, e)

    return run


def peer_hutchinson(module: Any, package: str, m: int, num: int) -> Callable[..., tuple[Array, Array]]:
    """(f, x, probes) -> (f(x), estimate) by a peer, on products J e."""
    if package == "traceax":
        import lineax

        class Given(module.AbstractSampler, strict=True):
            """The probes themselves, in place of the key."""

            dtype: Any = jnp.float32

            def __call__(self, key: Array, n: int, k: int) -> Array:
                return key.T

        estimator = module.HutchinsonEstimator(Given())

        def by_traceax(f: Callable[[Array], Array], x: Array, e: Array) -> tuple[Array, Array]:
            operator = lineax.FunctionLinearOperator(lambda v: jax.jvp(f, (x,), (v,))[1], jax.eval_shape(lambda: x))
            return f(x), estimator.estimate(e, operator, num)[0]

        return by_traceax

    estimate = module.estimator_monte_carlo(module.monte_carlo_trace(), sampler=lambda e: e)

    def by_matfree(f: Callable[[Array], Array], x: Array, e: Array) -> tuple[Array, Array]:
        return f(x), estimate(lambda v: jax.jvp(f, (x,), (v,))[1], e)

    return by_matfree


def by_jvp(f: Callable[[Array], Array], x: Array, e: Array) -> tuple[Array, Array]:
    """One probe by hand."""
    value, image = jax.jvp(f, (x,), (e[0],))
    return value, jnp.sum(e[0] * image)


def by_jacfwd(f: Callable[[Array], Array], x: Array, e: Array) -> tuple[Array, Array]:
    """The trace of the whole Jacobian."""
    return f(x), jnp.trace(jax.jacfwd(f)(x))


def by_vjp(f: Callable[[Array], Array], x: Array, e: Array) -> tuple[Array, Array]:
    """The trace of the products of all unit vectors."""
    value, pull = jax.vjp(f, x)
    return value, jnp.trace(jax.vmap(pull)(jnp.eye(x.size, dtype=x.dtype))[0])


def cost_ways(width: int, m: int, batch: int, found: Mapping[str, Any]) -> dict[str, tuple[One, Any, Array, Any]]:
    """name -> a function and its arguments; "f" is the field alone. All numbers "1" share their probe, and all "16"."""
    field, params = make_field(width, m)
    f = plain(field)
    x = jax.random.normal(jax.random.key(1), (batch, m))
    one = jax.vmap(lambda key: probes.rademacher(key, x[0], 1))(jax.random.split(jax.random.key(2), batch))
    many = jax.vmap(lambda key: probes.rademacher(key, x[0], 16))(jax.random.split(jax.random.key(3), batch))
    half, none = jnp.asarray(0.5), jnp.zeros((batch, 0))
    ways: dict[str, tuple[One, Any, Array, Any]] = {
        "f": (lambda params, x, _: (jax.vmap(f, (None, 0, None))(half, x, params), jnp.zeros(batch)), params, x, none),
        "1 probe": (batched(divergence.hutchinson, f), params, x, one),
        "1 probe, jax.jvp": (batched(by_jvp, f), params, x, one),
        "16 probes": (batched(divergence.hutchinson, f), params, x, many),
        "16 probes, forward": (batched(partial(divergence.hutchinson, mode="forward"), f), params, x, many),
    }
    alike = jax.vmap(lambda x, params, e: divergence.hutchinson(lambda x: f(half, x, params), x, e), (0, None, None))
    ways["16 probes, shared"] = (lambda params, x, e: alike(x, params, e), params, x, many[0])
    for package in ("traceax", "matfree"):
        if package in found:
            for name, e in (("1 probe", one), ("16 probes", many)):
                way = batched(peer_hutchinson(found[package], package, m, e.shape[1]), f)
                ways[f"{name}, {package}"] = (way, params, x, e)
    if m * batch * width**2 <= MOST_MULTIPLICATIONS:
        ways["exact"] = (batched(lambda f, x, _: divergence.exact(f, x), f), params, x, none)
    if m**2 * batch <= MOST_NUMBERS:
        ways["exact, jacfwd"] = (batched(by_jacfwd, f), params, x, none)
        ways["exact, vjp"] = (batched(by_vjp, f), params, x, none)

    def own(prepared: Any, x: Array, _: Array) -> tuple[Array, Array]:
        return jax.vmap(field.with_divergence, (None, 0, None))(half, x, prepared)

    ways["structured"] = (own, jax.jit(field.prepare)(params), x, none)
    return ways


def row_of(part: str, cell: str, way: str, times: Seconds, base: Seconds, way_of: Way, **where: Any) -> dict[str, Any]:
    """What is kept of a way in a cell: its time, what it costs over ``base``, its memory."""
    cost = over(times, base)
    return {
        "part": part, "cell": cell, "way": way, **where, "seconds": times.median, "rounds": len(times.rounds),
        "compile": times.first, "cost": cost.value, "quartiles": cost[1:], "bytes": way_of.memory,
    }  # fmt: skip


def costs(config: Config) -> list[dict[str, Any]]:
    """Rows of every way in every cell."""
    found = peers()
    found.pop("folx", None)
    rows: list[dict[str, Any]] = []
    for width, m, batch in itertools.product(config.widths, config.sizes, config.batches):
        ways = {name: in_a_row(*way) for name, way in cost_ways(width, m, batch, found).items()}
        slow = {name: way for name, way in ways.items() if name.startswith("16")}
        slowest = {name: way for name, way in ways.items() if name.startswith("exact")}
        times = timed(config, {name: way for name, way in ways.items() if name not in slow | slowest})
        many, exact = ({"f": ways["f"]} | each for each in (slow, slowest))  # each with a field of its own rounds
        many_times, exact_times = timed(config, many), timed(config, exact)
        cell = f"h {width}, m {m}, B {batch}"
        for name, way in ways.items():
            mine = many_times if name in slow else exact_times if name in slowest else times
            where = {"width": width, "m": m, "batch": batch}
            rows.append(row_of("costs", cell, name, mine[name], mine["f"], way, **where))
        last = {row["way"]: row["cost"] for row in rows[-len(ways) :]}
        runs.say(
            f"{cell}: f {1e6 * times['f'].median:.4g} us; "
            + ", ".join(f"{name} {cost:.2f}" for name, cost in last.items() if name != "f")
        )
    return rows


def show_costs(rows: Sequence[dict[str, Any]]) -> None:
    """Print the costs over f, and the memory."""
    names = ["f", *dict.fromkeys(row["way"] for row in rows if row["way"] != "f")]
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(f"{row['width']}, {row['m']}, {row['batch']}", {})[row["way"]] = row

    def show_each(title: str, of_f: Callable[[dict[str, Any]], Any], number: Callable[[dict[str, Any]], str]) -> None:
        lines = [
            [cell, of_f(ways["f"]), *(number(ways[name]) if name in ways else "-" for name in names[1:])]
            for cell, ways in cells.items()
        ]
        show(title, ("h, m, B", *names), lines)

    def megabytes(row: dict[str, Any]) -> str:
        return f"{row['bytes'] / 1e6:.2f}"

    show_each(
        "Time over one evaluation of f; f in microseconds",
        lambda row: 1e6 * row["seconds"],
        lambda row: f"{row['cost']:.2f}",
    )
    show_each("Temporary memory, MB", megabytes, megabytes)


def cost_targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What the costs of one process, or the medians of several, should be."""
    cells: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["width"], row["m"], row["batch"]), {})[row["way"]] = row

    def costs_of(*ways: str) -> dict[tuple[int, int, int], float]:
        """The least cost of these ways, in the cells that have one of them."""
        found = {key: [cell[way]["cost"] for way in ways if way in cell] for key, cell in cells.items()}
        return {key: min(values) for key, values in found.items() if values}

    def at(values: Mapping[tuple[int, int, int], float], name: str, **limits: float) -> list[Target]:
        """The largest; none where there is none."""
        if not values:
            return []
        place = max(values, key=values.__getitem__)
        return [Target(name, values[place], **limits, place="h {}, m {}, B {}".format(*place))]

    def quotient(
        over: Mapping[tuple[int, int, int], float], under: Mapping[tuple[int, int, int], float]
    ) -> dict[tuple[int, int, int], float]:
        return {key: over[key] / under[key] for key in over if key in under}

    one, others = costs_of("1 probe"), costs_of("1 probe, traceax", "1 probe, matfree")
    targets = at(one, "1 probe over f, worst", high=2.25)
    targets.append(Target("1 probe over f, median over the cells", float(np.median(list(one.values()))), high=1.85))
    targets += at(quotient(one, others), "1 probe over the faster of traceax and matfree, worst", high=1.05)
    if (512, 64, 64) in others:
        name = "traceax and matfree over 1 probe"
        targets += at({(512, 64, 64): others[512, 64, 64] / one[512, 64, 64]}, name, low=2.0)
    for way in ("16 probes", "16 probes, shared"):
        here = {key: cost for key, cost in costs_of(way).items() if (key[0], key[2]) == (64, 64)}
        targets += at(here, f"{way}, over f, worst", high=11.5)
    here = {key: cost for key, cost in costs_of("16 probes").items() if key == (64, 3072, 512)}
    targets += at(here, "16 probes over f", high=29.0)
    shares = quotient(costs_of("exact"), costs_of("exact, jacfwd", "exact, vjp"))
    for h, high in ((64, 0.35), (512, 0.65)):
        here = {key: share for key, share in shares.items() if key == (h, 784, 64)}
        targets += at(here, f"exact over the better of jacfwd and vjp, h {h}", high=high)
        if h == 64:
            targets += at({key: cells[key]["exact"]["bytes"] / 1e6 for key in here}, "exact, MB", high=30.0)
    for least, high in ((64, 1.45), (784, 1.15)):
        here = {key: cost for key, cost in costs_of("structured").items() if key[0] == 64 and key[1] >= least}
        targets += at(here, f"structured over f, h 64, m >= {least}, worst", high=high)
    return targets


# -------------------------------------------------------------------------------------------------- other networks


def network_ways(net: Any, m: int, batch: int) -> dict[str, tuple[One, Any, Array, Any]]:
    """name -> a function and its arguments, of a network that knows its divergence; "f" is the field alone."""
    field, half = networks.vector_field(net), jnp.asarray(0.5)
    params = jax.jit(net.init)(jax.random.key(0), half, jnp.zeros(m))
    prepared, f = jax.jit(field.prepare)(params), plain(field)
    x, none = jax.random.normal(jax.random.key(1), (batch, m)), jnp.zeros((batch, 0))

    def by_forms(prepared: Any, x: Array, e: Array) -> tuple[Array, Array]:
        value, forms = jax.vmap(field.with_forms, (None, 0, None, 0))(half, x, prepared, e)
        return value, jnp.mean(forms, axis=1)

    def own(prepared: Any, x: Array, _: Array) -> tuple[Array, Array]:
        return jax.vmap(field.with_divergence, (None, 0, None))(half, x, prepared)

    ways: dict[str, tuple[One, Any, Array, Any]] = {
        "f": (lambda params, x, _: (jax.vmap(f, (None, 0, None))(half, x, params), jnp.zeros(batch)), params, x, none)
    }
    if field.probe_space is not None:
        dim, _ = field.probe_space(prepared)
        plainly, hidden = (jax.random.rademacher(jax.random.key(3), (batch, 16, d), jnp.float32) for d in (m, dim))
        ways["16 probes"] = (batched(divergence.hutchinson, f), params, x, plainly)
        ways["16 probes, hidden"] = (by_forms, prepared, x, hidden)
    ways["structured"] = (own, prepared, x, none)
    return ways


def other_networks(config: Config) -> list[dict[str, Any]]:
    """The price of what other networks know of themselves. A hollow network is as wide as the narrowest of the others:
    its last matrix has 8 m columns."""
    init = jax.nn.initializers.lecun_normal()
    kinds: dict[str, Callable[[int], Any]] = {
        "three layers": lambda h: networks.MLP((h, h, h), last_init=init),
        "OT-Flow": lambda h: networks.OTFlow(width=h),
        "hollow": lambda h: networks.HollowNet((h, h), last_init=init),
    }
    rows: list[dict[str, Any]] = []
    for kind, h, m in itertools.product(kinds, config.widths, config.other_sizes):
        if kind != "hollow" or h == min(config.widths):
            ways = network_ways(kinds[kind](h), m, config.other_batch)
            cell = {f"{kind}, h {h}, m {m}": {name: in_a_row(*way) for name, way in ways.items()}}
            rows += over_first("networks", cell, config)
    return rows


def network_targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What probes in the hidden space should cost."""
    costs = {(row["cell"], row["way"]): row["cost"] for row in rows}
    cell, way = "three layers, h 64, m 3072", "16 probes, hidden"
    return [Target(f"{way}, over f", costs[cell, way], high=1.5, place=cell)] if (cell, way) in costs else []


# ------------------------------------------------------------------------------------------ gradients and Laplacians


def gradient_ways(config: Config, width: int, m: int) -> dict[str, Callable[[Any, Array, Array], Any]]:
    """name -> (params, x, probes [B, 16, m]) -> loss and gradient."""
    field, _ = make_field(width, m)
    f, half = plain(field), jnp.asarray(0.5)

    def graded(both: Callable[[Any, Array, Array], tuple[Array, Array]]) -> Callable[[Any, Array, Array], Any]:
        def loss(params: Any, x: Array, e: Array) -> Array:
            value, number = both(params, x, e)
            return jnp.mean(value**2) + jnp.mean(number)

        return jax.value_and_grad(loss)

    def own(params: Any, x: Array, _: Array) -> tuple[Array, Array]:
        return jax.vmap(field.with_divergence, (None, 0, None))(half, x, field.prepare(params))

    return {
        "f": graded(lambda params, x, _: (jax.vmap(f, (None, 0, None))(half, x, params), jnp.zeros(()))),
        "1 probe": graded(batched(lambda f, x, e: divergence.hutchinson(f, x, e[:1]), f)),
        "16 probes": graded(batched(divergence.hutchinson, f)),
        "exact": graded(batched(lambda f, x, _: divergence.exact(f, x), f)),
        "structured": graded(own),
    }


def direct(function: Callable[..., Any], *arguments: Any) -> Way:
    """Compile one evaluation; several in a row are as many calls."""
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    took = time.perf_counter() - begin

    def call(num: int) -> Any:
        for _ in range(num):
            result = compiled(*arguments)
        return result

    return Way(call, compiled.memory_analysis().temp_size_in_bytes, took)


def over_first(part: str, cells: Mapping[str, Mapping[str, Way]], config: Config) -> list[dict[str, Any]]:
    """Time every cell: costs over the first way of each."""
    rows: list[dict[str, Any]] = []
    for cell, ways in cells.items():
        times = timed(config, ways)
        base = times[next(iter(ways))]
        rows += [row_of(part, cell, name, times[name], base, way) for name, way in ways.items()]
    return rows


def show_cells(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Print costs and memory, a line for each way of each cell."""
    lines = [
        [f"{row['cell']}: {row['way']}", 1e6 * row["seconds"], f"{row['cost']:.2f}", f"{row['bytes'] / 1e6:.2f}"]
        for row in rows
    ]
    show(title, ("cell: way", "microseconds", "cost", "temporary MB"), lines)


def gradients(config: Config) -> list[dict[str, Any]]:
    """The price of the divergence in a gradient by the parameters, m = 64."""
    cells: dict[str, dict[str, Way]] = {}
    batch = config.other_batch
    x = jax.random.normal(jax.random.key(1), (batch, GRADIENT_SIZE))
    e = jax.vmap(lambda key: probes.rademacher(key, x[0], 16))(jax.random.split(jax.random.key(3), batch))
    for width in config.widths:
        params = make_field(width, GRADIENT_SIZE)[1]
        ways = gradient_ways(config, width, GRADIENT_SIZE)
        cells[f"h {width}"] = {name: direct(way, params, x, e) for name, way in ways.items()}
    return over_first("gradients", cells, config)


def laplacian_ways(config: Config, m: int, found: Mapping[str, Any]) -> dict[str, tuple[One, Any, Array, Any]]:
    """name -> a function and its arguments; "u" is the network alone."""
    width, batch = min(config.widths), config.other_batch
    net = networks.MLP((width, width), out_features=1, last_init=jax.nn.initializers.lecun_normal())
    energy = networks.energy(net)
    params = net.init(jax.random.key(0), jnp.zeros(()), jnp.zeros(m))
    half, none = jnp.asarray(0.5), jnp.zeros((batch, 0))
    x = jax.random.normal(jax.random.key(1), (batch, m))

    def each(one: Callable[[Callable[[Array], Array], Array], tuple[Array, Array]]) -> One:
        return lambda params, x, _: jax.vmap(lambda x: one(lambda x: energy.field(half, x, params), x))(x)

    def by_folx(u: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
        result = found["folx"].forward_laplacian(u)(x)
        return result.x, result.laplacian

    def by_divergence(u: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
        return u(x), divergence.exact(jax.grad(u), x)[1]

    def own(prepared: Any, x: Array, _: Array) -> tuple[Array, Array]:
        return jax.vmap(energy.with_laplacian, (None, 0, None))(half, x, prepared)

    ways: dict[str, tuple[One, Any, Array, Any]] = {
        "u": (each(lambda u, x: (u(x), jnp.zeros(()))), params, x, none),
        "laplacian": (each(divergence.laplacian), params, x, none),
        "exact of the gradient": (each(by_divergence), params, x, none),
        "structured": (own, jax.jit(energy.prepare)(params), x, none),
    }
    if "folx" in found:
        ways["folx"] = (each(by_folx), params, x, none)
    return ways


def laplacians(config: Config) -> list[dict[str, Any]]:
    """The price of a Laplacian."""
    found = peers()
    cells = {
        f"m {m}": {name: in_a_row(*way) for name, way in laplacian_ways(config, m, found).items()}
        for m in config.laplacian_sizes
    }
    return over_first("laplacians", cells, config)


def laplacian_targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What the Laplacians should cost."""
    costs = {(row["cell"], row["way"]): row["cost"] for row in rows}
    targets = [
        Target("laplacian over folx", costs[cell, "laplacian"] / costs[cell, "folx"], high=high, place=cell)
        for cell, high in (("m 8", 0.95), ("m 64", 0.85))
        if (cell, "folx") in costs
    ]
    if ("m 784", "structured") in costs:
        targets.append(Target("structured Laplacian over u", costs["m 784", "structured"], high=8.5, place="m 784"))
    return targets


# ------------------------------------------------------------------------------------------------------- processes


def take_times(config: Config) -> list[dict[str, Any]]:
    """The rows of all parts that are about time."""
    return [row for part, function in TIMED.items() if part in config.parts for row in function(config)]


def in_processes(config: Config) -> list[list[dict[str, Any]]]:
    """Those of each process, one after the other."""
    if config.processes == 1:
        return [take_times(config)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return list(pool.map(take_times, [config] * config.processes))


def median_rows(each: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over the processes; ``costs`` and ``quartiles`` have an entry for each."""
    return [
        same[0]
        | {name: float(np.median([row[name] for row in same])) for name in ("seconds", "compile", "cost")}
        | {"costs": [row["cost"] for row in same], "quartiles": [row["quartiles"] for row in same]}
        for same in zip(*each, strict=True)
    ]


def report_times(config: Config) -> tuple[list[dict[str, Any]], list[tuple[Target, list[float]]]]:
    """Take the times, print them; the rows, and every target with what each process found."""
    each = in_processes(config)
    rows = median_rows(each)
    batch = config.other_batch
    titles = {
        "networks": f"Other networks, time over one evaluation of each, B = {batch}",
        "gradients": f"value_and_grad of mean(f^2 + div f) over that of mean(f^2), m = {GRADIENT_SIZE}, B = {batch}",
        "laplacians": (
            f"Laplacian of a scalar network over one evaluation of it, h = {min(config.widths)}, B = {batch}"
        ),
    }

    def of(part: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if row["part"] == part]

    targets: list[tuple[Target, list[float]]] = []
    for part in TIMED:
        if part not in config.parts:
            continue
        if part == "costs":
            show_costs(of(part, rows))
        else:
            show_cells(of(part, rows), titles[part])
        if part in TARGETS:
            beside = [TARGETS[part](of(part, mine)) for mine in each]
            for i, target in enumerate(TARGETS[part](of(part, rows))):
                targets.append((target, [mine[i].value for mine in beside]))
    return rows, targets


TIMED = {"costs": costs, "networks": other_networks, "gradients": gradients, "laplacians": laplacians}
TARGETS = {"costs": cost_targets, "networks": network_targets, "laplacians": laplacian_targets}


# ----------------------------------------------------------------------------------------------------------- plots


def plotting() -> Any:
    """pyplot without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_errors(config: Config, rows: Sequence[dict[str, Any]]) -> Path:
    """Error against products, one panel a map, both axes logarithmic."""
    plt = plotting()
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator

    maps = list(dict.fromkeys(row["map"] for row in rows))
    columns = min(5, len(maps))
    lines = -(-len(maps) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.5 * columns + 1.5, 3.4 * lines + 0.6), layout="constrained", squeeze=False
    )
    handles: dict[str, Any] = {}
    for panel, name in zip(axes.flat, maps, strict=False):
        for way in (*COLORS, *PEERS):
            points = [(row["products"], row["error"]) for row in rows if (row["map"], row["way"]) == (name, way)]
            points = [(k, max(error, 1e-16)) for k, error in points if np.isfinite(error)]
            if not points:
                continue
            own = way in COLORS
            style = {
                "color": COLORS[PEERS.get(way, way)],
                "linewidth": (2.6 if way in ("choose", "groups") else 1.4) if own else 0,
                "linestyle": "--" if way == "choose" else "-",
                "marker": "." if own else {"traceax": "o", "matfree": "s"}[way.split()[0]],
                "markersize": 4 if own else 7,
                "fillstyle": "full" if own else "none",
                "zorder": 5 if way == "choose" else 3,
            }
            (handles[way],) = panel.loglog(*zip(*points, strict=True), **style)
        panel.set_title(name, fontsize=10)
        ticks = sorted({row["products"] for row in rows if row["map"] == name})
        panel.set_xticks(ticks, [str(k) for k in ticks])
        panel.xaxis.minorticks_off()
        low, high = panel.get_ylim()
        if high / low < 200:
            panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            panel.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
        panel.tick_params(axis="y", which="minor", labelsize=7)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[len(maps) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("relative error, rms")
    for panel in axes[-1]:
        panel.set_xlabel("products A e")
    ordered = [way for way in (*COLORS, *PEERS) if way in handles]
    figure.legend([handles[way] for way in ordered], ordered, loc="outside right center", frameon=False, fontsize=9)
    return save(config, figure, "trace_estimators_errors", plt)


LINES = {
    "1 probe": {"color": "#0072B2", "linewidth": 2.4, "marker": "o"},
    "1 probe, jax.jvp": {"color": "#999999", "linewidth": 1.2, "marker": "x"},
    "1 probe, traceax": {"color": "#E69F00", "linewidth": 1.2, "marker": "s"},
    "1 probe, matfree": {"color": "#CC79A7", "linewidth": 1.2, "marker": "^"},
    "16 probes": {"color": "#0072B2", "linewidth": 2.4, "marker": "o"},
    "16 probes, forward": {"color": "#D55E00", "linewidth": 1.6, "marker": "P"},
    "16 probes, shared": {"color": "#56B4E9", "linewidth": 1.6, "marker": "v"},
    "16 probes, traceax": {"color": "#E69F00", "linewidth": 1.2, "marker": "s"},
    "16 probes, matfree": {"color": "#CC79A7", "linewidth": 1.2, "marker": "^"},
    "structured": {"color": "#009E73", "linewidth": 2.4, "marker": "D"},
}


def draw_costs(config: Config, rows: Sequence[dict[str, Any]]) -> Path:
    """Above: cost over f against m, one panel a width and batch, one and 16 probes. Below: all other costs as bars."""
    plt = plotting()
    cells = list(dict.fromkeys((row["width"], row["batch"]) for row in rows if row["part"] == "costs"))
    bars = ("networks", "gradients", "laplacians")
    others = [row for row in rows if row["part"] in bars and row["way"] not in ("f", "u")] + [
        row
        for row in rows
        if row["part"] == "costs" and row["way"].startswith("exact") and row["batch"] == config.other_batch
    ]
    groups = {
        title: [row for row in others if row["part"] == part]
        for part, title in (
            ("costs", f"exact trace, B = {config.other_batch}, time over f"),
            ("networks", "other networks, time over f"),
            ("gradients", "gradient, over that without a divergence"),
            ("laplacians", "Laplacian, time over u"),
        )
    }
    groups = {title: found for title, found in groups.items() if found}
    tallest = max([len(found) for found in groups.values()], default=0)
    heights = ([5.6] if cells else []) + ([0.8 + 0.2 * tallest] if groups else [])
    figure = plt.figure(figsize=(15, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.04))
    if cells:
        axes = parts[0].subplots(2, len(cells), squeeze=False, sharey="row", sharex=True)
        handles: dict[str, Any] = {}
        for column, (width, batch) in enumerate(cells):
            for line, kind in enumerate(("1 probe", "16 probes")):
                panel = axes[line, column]
                for way, style in LINES.items():
                    shown = [
                        (row["m"], row["cost"])
                        for row in rows
                        if row["part"] == "costs" and (row["width"], row["batch"], row["way"]) == (width, batch, way)
                    ]
                    if shown and (way.startswith(kind) or (way == "structured" and line == 0)):
                        ours = {
                            "1 probe": "ours, 1 or 16 probes",
                            "16 probes, shared": "ours, 16 shared probes",
                            "16 probes, forward": "ours, 16 probes in forward mode",
                        }
                        label = ours.get(way, way.split(", ")[-1])
                        known = way in ours or not way.startswith("16")
                        (handles[label if known else "-"],) = panel.loglog(
                            *zip(*shown, strict=True), markersize=5, **style
                        )
                target = 2.25 if line == 0 else {(64, 64): 11.5}.get((width, batch))
                if target:
                    handles["target"] = panel.axhline(target, color="tab:red", linewidth=1.2, linestyle="--")
                if line == 1 and (width, batch) == (64, 512) and 3072 in config.sizes:
                    panel.plot([3072], [29], "_", color="tab:red", markersize=16, markeredgewidth=2)
                panel.set_xticks(config.sizes, [str(m) for m in config.sizes], fontsize=7)
                ticks = (1, 1.5, 2, 3, 5) if line == 0 else (2, 5, 10, 20, 50)
                panel.set_yticks(ticks, [str(tick) for tick in ticks])
                panel.minorticks_off()
                panel.grid(color="#dddddd", linewidth=0.6)
                panel.spines[["top", "right"]].set_visible(False)
                if line == 0:
                    panel.set_title(f"h = {width}, B = {batch}", fontsize=10)
                else:
                    panel.set_xlabel("dimensions m")
        for line, kind in enumerate(("one probe", "16 probes")):
            axes[line, 0].set_ylabel(f"{kind}: time over f")
        handles.pop("-", None)
        parts[0].legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)
    if groups:
        axes = parts[-1].subplots(1, len(groups), squeeze=False)[0]
        for panel, (title, found) in zip(axes, groups.items(), strict=True):
            for y, row in enumerate(found):
                name = row["way"]
                peer = name in ("folx", "exact, jacfwd", "exact, vjp")
                panel.barh(
                    y, row["cost"], color="#bbbbbb" if peer else "#009E73" if name == "structured" else "#0072B2"
                )
                panel.text(row["cost"], y, f" {row['cost']:.3g}", va="center", fontsize=7)
            labels = [f"{row['cell']}: {row['way']}" for row in found]
            panel.set_yticks(range(len(found)), labels, fontsize=7)
            panel.invert_yaxis()
            panel.set(xscale="log", xlabel=title)
            panel.xaxis.set_minor_formatter("")
            panel.margins(x=0.12)
            panel.spines[["top", "right"]].set_visible(False)
    return save(config, figure, "trace_estimators_costs", plt)


def save(config: Config, figure: Any, name: str, plt: Any) -> Path:
    """Write ``<config.out>/<name>.png``."""
    path = Path(config.out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main(config: Config) -> dict[str, Any]:
    """Run the parts, print, write and draw; return what has a target."""
    unknown = set(config.parts) - set(PARTS)
    if unknown or not config.parts:
        raise ValueError(f"parts must be some of {PARTS}, got {config.parts}.")
    if config.processes < 1:
        raise ValueError(f"processes must be at least 1, got {config.processes}.")
    # before the first decomposition: with more threads, small ones take up to 30 times as long on a busy machine
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    rows: list[dict[str, Any]] = []
    targets: list[tuple[Target, list[float]]] = []
    more: dict[str, Any] = {}
    if "errors" in config.parts:
        rows, more, found = errors(config)
        targets = [(target, []) for target in found]
    timed_rows: list[dict[str, Any]] = []
    if set(config.parts) & set(TIMED):
        timed_rows, found_times = report_times(config)
        rows, targets = rows + timed_rows, targets + found_times
    if targets:
        lines = []
        for target, each in targets:
            limits = ((">=", target.low), ("<=", target.high))
            limit = " ".join(f"{sign} {value:g}" for sign, value in limits if np.isfinite(value))
            met = "yes" if target.low <= target.value <= target.high else "NO"
            beside = ", ".join(f"{value:.3g}" for value in each)
            lines.append([target.name, target.place, target.value, limit, met, beside])
        show("Targets", ("what", "where", "found", "target", "met", "each process"), lines)
    result = {
        "targets": [
            each._asdict() | {"met": bool(each.low <= each.value <= each.high), "processes": values}
            for each, values in targets
        ]
    }
    graph = None if config.graph is None else Path(config.graph).name  # no path of this machine
    write("trace_estimators", replace(config, graph=graph), rows, result | more)
    if "errors" in config.parts:
        draw_errors(config, [row for row in rows if row["part"] == "errors"])
    if timed_rows:
        draw_costs(config, rows)
    return {f"{each.name} ({each.place})" if each.place else each.name: each.value for each, _ in targets}


if __name__ == "__main__":
    runs.cli(main, Config)
