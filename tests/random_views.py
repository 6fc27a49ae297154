"""Weight views of random weights, for tests."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from memjax import codecs
from memjax.core.views import Axes, WeightView
from memjax.weights import Adapted, Dense, LowRank, PackedWeight

MATRIX = Axes()
KINDS = ("lora on dense", "packed", "lora on packed")


def array(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    """Returns standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def factors(seed: int, shape: tuple[int, ...], axes: Axes = MATRIX, rank: int = 3) -> dict[str, jax.Array]:
    """Returns random low-rank factors of a weight of ``shape``."""
    batch = shape[: len(shape) - axes.ndim]
    inputs, outputs = (tuple(shape[axis] for axis in group) for group in axes)
    return {"a": array(seed, *batch, *inputs, rank), "b": array(seed + 1, *batch, rank, *outputs)}


def builder(kind: str, w: jax.Array, axes: Axes = MATRIX, group: int = 4) -> Callable[..., WeightView]:
    """Returns the function of low-rank factors (which ``packed`` ignores) that makes a view of ``kind``."""
    packed = PackedWeight(codecs.int4(group=group).encode(w, axes.inputs), axes) if "packed" in kind else None
    base = Dense(w, axes) if packed is None else packed
    if kind == "packed":
        return lambda theta: base
    return lambda theta: Adapted(base, (LowRank(theta["a"], theta["b"], 0.5),))


def view(kind: str, w: jax.Array, axes: Axes = MATRIX, group: int = 4) -> WeightView:
    """Returns a view of ``kind`` made of the weight ``w`` and random factors."""
    return builder(kind, w, axes, group)(factors(1000, w.shape, axes))


def assert_close(actual, expected, tolerance: float = 2e-6) -> None:
    """Asserts that every leaf is as expected, relative to the leaf's largest element."""

    def check(actual, expected):
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        largest = np.max(np.abs(expected), initial=0.0)
        assert np.isfinite(largest)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest)

    jax.tree.map(check, actual, expected)


def moved(theta, size: float = 0.2):
    """Returns trained factors as after some training: with random numbers added to every leaf."""
    leaves, tree = jax.tree.flatten(theta)
    added = [np.random.default_rng(100 + i).standard_normal(leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(
        tree, [jnp.asarray(np.asarray(leaf) + size * more, leaf.dtype) for leaf, more in zip(leaves, added)]
    )


def kept_by_reverse_mode(fn: Callable[..., jax.Array], *trained) -> list[jax.ShapeDtypeStruct]:
    """Returns shape and dtype of everything that the gradient of ``fn`` keeps from the forward pass; runs nothing."""
    return jax.tree.leaves(jax.eval_shape(lambda *trained: jax.vjp(fn, *trained)[1], *trained))
