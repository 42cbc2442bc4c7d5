"""Guards against compilers that compute wrong numbers or none, on CPU; pyproject.toml excludes jax 0.10.1 and 0.10.2.

With 0.10.2, ``jit(vmap(lambda r: sum((A @ r) ** 2)))`` with a 3 x 3 matrix gets thousands of rows wrong, silently.
Such patterns, compiled, are held against the same in NumPy's float64. With 0.10.1, on several cores, a compiled
likelihood of many points at once never returns, with no thread at work, nearly always within five calls.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

NUM = 40_000
RNG = np.random.default_rng(0)
A = RNG.normal(size=(3, 3))
ROWS = RNG.normal(size=(NUM, 3))

PATTERNS = {
    "squared norm": (lambda r, a: jnp.sum((a @ r) ** 2), lambda r: ((r @ A.T) ** 2).sum(1)),
    "quadratic form": (lambda r, a: r @ (a @ r), lambda r: np.einsum("ni,ij,nj->n", r, A, r)),
    "tanh layer": (lambda r, a: jnp.sum(jnp.tanh(a @ r)), lambda r: np.tanh(r @ A.T).sum(1)),
    "softmax of products": (
        lambda r, a: jax.nn.logsumexp(a @ r),
        lambda r: np.log(np.exp(r @ A.T).sum(1)),
    ),
    "gradient": (
        lambda r, a: jnp.sum(jax.grad(lambda x: jnp.sum((a @ x) ** 2))(r)),
        lambda r: (2 * (r @ A.T) @ A).sum(1),
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", PATTERNS)
def test_compiled_products_are_right_on_every_row(name, dtype):
    pattern, truth = PATTERNS[name]
    rows, matrix = jnp.asarray(ROWS, dtype), jnp.asarray(A, dtype)
    compiled = jax.jit(jax.vmap(pattern, (0, None)))(rows, matrix)
    tolerance = 2e-4 if dtype == jnp.float32 else 1e-11
    np.testing.assert_allclose(np.asarray(compiled), truth(ROWS), rtol=tolerance, atol=tolerance)


MANY_CALLS = """
import jax
jax.config.update("jax_enable_x64", True)
from dgm_jax import densities, flows, schedules
from targets import rotated_mixture

density, schedule = rotated_mixture(24), schedules.vp()
velocity, last = densities.velocity(density, schedule), densities.diffuse(density, schedule, 1.0)

@jax.jit
@jax.vmap
def likelihoods(x, key):
    options = {"t_data": 0.0, "t_base": 1.0, "log_base": lambda z: densities.log_prob(last, z)}
    return flows.likelihood(velocity, x, key=key, num_probes=8, **options)

x = densities.sample(jax.random.key(2), density, 400)
for n in range(25):
    jax.block_until_ready(likelihoods(x, jax.random.split(jax.random.key(n), 400)))
"""


@pytest.mark.slow
def test_a_likelihood_of_many_points_returns_each_time():
    """25 calls take some 15 seconds on two cores; as XLA compiles it for a user, without the flags of these tests."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", MANY_CALLS], env=environment, check=True, timeout=240)
