"""Networks that are shown a label: each label has its row, "no label" one of its own, and nothing else has any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import networks

X = {"mlp": jnp.linspace(-1.0, 1.0, 3), "unet": jnp.linspace(-1.0, 1.0, 16).reshape(4, 4, 1)}


def make(name):
    """A network with weights that are all random: the last layer's too, which would start at zero."""
    if name == "mlp":
        net = networks.MLP((8, 8), time_features=4, num_classes=3, param_dtype=jnp.float64)
    else:
        net = networks.UNet((4,), groups=2, time_features=4, num_classes=3, param_dtype=jnp.float64)
    params = jax.jit(net.init)(jax.random.key(0), jnp.asarray(0.3), X[name], jnp.int32(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return net, jax.tree.unflatten(tree, drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", X)
def test_every_label_has_its_own_row_and_gradient(name):
    """Four labels, "no label" among them, four fields; the gradient of one touches its row of the table alone."""
    net, params = make(name)
    field = networks.conditional(net)
    t = jnp.asarray(0.3)
    labels = jnp.arange(4)
    values = jax.jit(jax.vmap(field, (None, None, (None, 0))))(t, X[name], (params, labels)).reshape(4, -1)
    distances = np.abs(np.asarray(values)[:, None] - np.asarray(values)[None]).max(-1)
    assert (distances[~np.eye(4, dtype=bool)] > 1e-3).all()
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(field(t, X[name], (p, jnp.int32(3))) ** 2)))(params)
    touched = jnp.any(gradient["params"]["label"]["embedding"] != 0, axis=1)
    np.testing.assert_array_equal(touched, [False, False, False, True])
    # A label that no class has is NaN in a compiled program, not a neighbour's.
    outside = jax.jit(lambda y: field(t, X[name], (params, y)))
    assert np.isnan(outside(jnp.int32(4))).all()
    assert np.isnan(outside(jnp.int32(-1))).all()


def test_wrong_labels_are_told():
    net, params = make("mlp")
    t, x = jnp.asarray(0.3), X["mlp"]
    with pytest.raises(ValueError, match=r"y must be in 0 \.\. 3, where 3 means no label, got 4"):
        net.apply(params, t, x, jnp.int32(4))
    with pytest.raises(TypeError, match="y is missing: the network has num_classes"):
        net.apply(params, t, x)
    with pytest.raises(TypeError, match=r"one integer label \[\], got shape \(2,\).*jax.vmap"):
        net.apply(params, t, x, jnp.zeros(2, jnp.int32))
    with pytest.raises(TypeError, match="of float64"):
        net.apply(params, t, x, jnp.asarray(1.0))
    with pytest.raises(TypeError, match="no classes: build it with num_classes"):
        networks.MLP((8,), time_features=4, param_dtype=jnp.float64).init(jax.random.key(0), t, x, jnp.int32(0))
    with pytest.raises(ValueError, match="needs time_features > 0"):
        networks.MLP((8,), num_classes=3, param_dtype=jnp.float64).init(jax.random.key(0), t, x, jnp.int32(0))
