"""The table of all optimizers that `test_contract` holds to the common contract: a new method is one row."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from memjax import optim
from memjax.codecs import int4
from memjax.core import leaf_paths
from memjax.optim import label, matrix_shape, matrix_spec

GAP = 3
RANDOM = np.random.default_rng(0).standard_normal(4096)


class Row(NamedTuple):
    """One optimizer.

    Attributes:
      name: of the test.
      make: learning rate (and overrides by keyword) -> transformation; what switches does so every `GAP` steps.
      formula: params -> bytes of the state, an exact integer.
      static: arguments of ``make`` that `optax.inject_hyperparams` must leave alone.
      bits32: moments are kept in float32 whatever the parameters' dtype.
      fsdp: the update of sharded leaves needs no array of a whole leaf on one device.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    formula: Callable[[Any], int]
    static: tuple[str, ...] = ()
    bits32: bool = True
    fsdp: bool = True


def params(dtype=np.float32):
    """A stack of layers, a matrix of its own, a vector per layer, a vector and a scalar."""
    shapes = {
        "layers": {"q_proj": {"kernel": (3, 16, 24), "bias": (3, 24)}, "o_proj": {"kernel": (3, 24, 16)}},
        "embed_tokens": {"embedding": (16, 8)},
        "w": (32, 16),
        "norm": {"scale": (8,)},
        "temperature": (),
    }
    return jax.tree.map(
        lambda shape: np.asarray(RANDOM[: math.prod(shape)].reshape(shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def grads(step, dtype=np.float32):
    """Gradients of ``params`` that differ from step to step."""
    random = np.random.default_rng(step + 1)
    return jax.tree.map(lambda p: np.asarray(random.standard_normal(p.shape), dtype), params())


def sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def matrices(tree):
    """``(path, B, m, n)`` of the leaves that have a subspace, and the number of elements of all others."""
    labels = [name for _, name in leaf_paths(label(tree))]
    found, rest = [], 0
    for (path, leaf), name in zip(leaf_paths(tree), labels):
        if name == "subspace":
            found.append((path, *matrix_shape(leaf.shape, matrix_spec(leaf))))
        else:
            rest += leaf.size
    return found, rest


OPTIMIZERS = [
    Row(
        "adamw",
        lambda learning_rate=1e-2, b1=0.9: optax.adamw(learning_rate, b1),
        lambda p: 8 * sizes(p) + 4,
        bits32=False,
    ),
    Row(
        "galore",
        lambda learning_rate=1e-2, scale=0.25: optim.galore(learning_rate, 4, GAP, scale, method="subspace_iteration"),
        lambda p: optim.galore_state_bytes(p, 4),
        bits32=False,
    ),
    Row(
        "q_galore",
        lambda learning_rate=1e-2, scale=0.25: optim.q_galore(
            learning_rate, 4, GAP, scale, codec=int4(16, symmetric=False), method="subspace_iteration"
        ),
        lambda p: optim.q_galore_state_bytes(p, 4, codec=int4(16, symmetric=False)),
    ),
    Row(
        "fira",
        lambda learning_rate=1e-2, growth=1.01: optim.fira(
            learning_rate, 4, GAP, growth=growth, method="subspace_iteration"
        ),
        lambda p: optim.fira_state_bytes(p, 4),
        bits32=False,
    ),
    Row(
        "apollo",
        lambda learning_rate=1e-2, b1=0.9: optim.apollo(learning_rate, 0.25, GAP, b1=b1),
        lambda p: optim.apollo_state_bytes(p, 0.25),
    ),
    Row(
        "apollo_mini",
        lambda learning_rate=1e-2, scale=128.0: optim.apollo_mini(learning_rate, GAP, scale),
        lambda p: optim.apollo_state_bytes(p, 1),
    ),
    Row(
        "ldadam",
        lambda learning_rate=1e-2, rho=0.908: optim.ldadam(learning_rate, 4, rho=rho, method="subspace_iteration"),
        lambda p: optim.ldadam_state_bytes(p, 4),
        bits32=False,
    ),
    Row(
        "adam8bit",
        lambda learning_rate=1e-2, b1=0.9: optim.adamw8bit(learning_rate, b1, block=8, least=64),
        lambda p: 4 + 2 * sum(optim.moment_bytes(x.shape, optim.state_format(8, 8, 64)) for x in jax.tree.leaves(p)),
        fsdp=False,  # blocks of 8 do not fall on shards of 2 or 3 elements
    ),
    Row(
        "adam4bit",
        lambda learning_rate=1e-2, b1=0.9: optim.adam4bit(learning_rate, b1, block=8, least=64),
        lambda p: 4 + 2 * sum(optim.moment_bytes(x.shape, optim.state_format(4, 8, 64)) for x in jax.tree.leaves(p)),
        fsdp=False,
    ),
    Row(
        "lion8bit",
        lambda learning_rate=1e-2, b1=0.9: optim.lion8bit(learning_rate, b1, block=8, least=64),
        lambda p: 4 + sum(optim.moment_bytes(x.shape, optim.state_format(8, 8, 64)) for x in jax.tree.leaves(p)),
        fsdp=False,
    ),
    Row(
        "adam_mini",
        lambda learning_rate=1e-2, b1=0.9: optim.adam_mini(learning_rate, b1, default="neuron"),
        lambda p: optim.adam_mini_state_bytes(p),
    ),
    Row(
        "micro_adam",
        lambda learning_rate=1e-2, b1=0.9: optim.micro_adam(learning_rate, b1, density=0.1, group=32, least=64),
        lambda p: optim.micro_adam_state_bytes(p, 0.1, group=32, least=64),
        bits32=False,
        fsdp=False,  # the largest are chosen among a leaf in the order of memory
    ),
]
