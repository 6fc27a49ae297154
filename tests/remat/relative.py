import jax
import jax.numpy as jnp


def norm(tree):
    return jnp.sqrt(sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(tree)))


def relative_error(got, expected):
    """The norm of the difference of two pytrees over that of the second."""
    difference = jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), got, expected)
    return float(norm(difference) / norm(expected))
