"""One battery for every schedule: a field at many times and points, in one compilation for all six."""

import jax
import jax.numpy as jnp
import numpy as np
from targets import SCHEDULES

from dgm_jax.types import Schedule

SINGULAR = ("cosine", "linear")  # where alpha(1) = 0


def points(dim, num=6, dtype=jnp.float64):
    """Fixed points about the mixture, ``[num, dim]``."""
    return jnp.asarray(np.random.default_rng(99).normal(size=(num, dim)) * 2.0, dtype)


def sweep(make, ts, xs, names=tuple(SCHEDULES)):
    """``make(schedule)``, a field, at every time and point: yields (name, values [times, points, ...]).

    The schedule is chosen by an index that is an argument of the compiled program, so that six schedules cost one
    compilation. ``ts`` is one array, or a function from the name to one.
    """
    options = list(SCHEDULES.values())

    @jax.jit
    def grid(index, ts, xs):
        chosen = Schedule(
            lambda t: jax.lax.switch(index, [s.log_alpha for s in options], t),
            lambda t: jax.lax.switch(index, [s.variance for s in options], t),
        )
        over_x = jax.vmap(make(chosen), (None, 0, None))
        return jax.vmap(lambda t: over_x(t, xs, None))(ts)

    for index, name in enumerate(SCHEDULES):
        if name in names:
            values = grid(index, jnp.asarray(ts(name) if callable(ts) else ts, xs.dtype), xs)
            yield name, jax.tree.map(np.asarray, values)
