"""A small model whose layers are a stack that a scan slices, for tests of single methods."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.core.paths import leaf_paths
from memjax.weights import Anchored, lift
from tests.random_views import array

X = array(0, 8, 16)
KEY = jax.random.key(0, impl="rbg")  # draws of many shapes compile faster than from the default generator


def params():
    return {
        "layers": {"up": {"kernel": array(1, 2, 16, 24) / 4}, "down": {"kernel": array(2, 2, 24, 16) / 5}},
        "head": {"kernel": array(3, 16, 16) / 4},
    }


def model(params, x):
    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"], None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["head"]["kernel"]


@jax.jit
def outputs(params):
    """Returns what the model makes of ``X``, its params dense or views."""
    return lift(model)(params, X)


def gradients(adapter, frozen, theta, key=None):
    """Returns the gradient of a loss by theta."""

    @jax.jit
    def run(theta, frozen):
        return jax.grad(lambda theta: jnp.sum(jnp.sin(lift(model)(adapter.attach(frozen, theta, key), X))))(theta)

    return run(theta, frozen)


def moved(theta, size=0.1):
    """Returns factors as after some training: random numbers added to those at the start."""
    leaves, tree = jax.tree.flatten(theta)
    added = (np.asarray(x) + size * np.asarray(array(100 + i, *x.shape)) for i, x in enumerate(leaves))
    return jax.tree.unflatten(tree, [jnp.asarray(new, x.dtype) for new, x in zip(added, leaves)])


def constants_of(frozen):
    return {path: leaf.constants for path, leaf in leaf_paths(frozen) if isinstance(leaf, Anchored)}
