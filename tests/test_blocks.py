"""Loops in blocks, against the same loop step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import _blocks


@pytest.mark.parametrize(("num", "size"), [(6, 1000), (7, 1000), (12, 3), (4, 5000), (1, 2)])
def test_each_step_has_the_noise_of_its_number(num, size):
    """All in one block, in several, and one by one: where the number of steps is prime, or the noise large."""
    x, key = jnp.linspace(-1.0, 1.0, size), jax.random.key(3)
    numbers = jnp.arange(num, dtype=jnp.int32)[::-1] + 4
    rows = {"keep": jnp.linspace(0.5, 0.9, num)}

    def step(x, row, eps):
        x = row["keep"] * x + eps
        return x, x

    @jax.jit
    def both(x):
        def run(x):
            return _blocks.scan_with_noise(step, x, rows, key=key, numbers=numbers, like=x)

        last, states = run(x)
        return last, states, jax.grad(lambda x: jnp.sum(run(x)[0]))(x)

    last, states, gradient = both(x)
    assert states.shape == (num, size)
    expected = np.asarray(x)
    for i in range(num):
        eps = jax.random.normal(jax.random.fold_in(key, int(numbers[i])), x.shape, x.dtype)
        expected = float(rows["keep"][i]) * expected + np.asarray(eps)
        np.testing.assert_allclose(states[i], expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(last, states[-1])
    np.testing.assert_allclose(gradient, np.full(size, np.prod(np.asarray(rows["keep"]))), rtol=1e-13)
