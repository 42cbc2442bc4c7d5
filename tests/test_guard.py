"""Guards against a compiler that computes wrong numbers: jax 0.10.2 does on CPU, and pyproject.toml excludes it.

There, ``jit(vmap(lambda r: sum((A @ r) ** 2)))`` with a 3 x 3 matrix gets thousands of rows wrong, silently. These
patterns, compiled, are held against the same in NumPy's float64.
"""

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
