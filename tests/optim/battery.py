"""The table of all optimizers that `test_contract` holds to the common contract: a new method is one row."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import memjax as mj
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
      variant: shares its code with a row above it, so that its longest tests are marked slow.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    formula: Callable[[Any], int]
    static: tuple[str, ...] = ()
    bits32: bool = True
    fsdp: bool = True
    variant: bool = False


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


def adam_bytes(elements):
    """Two float32 moments."""
    return 8 * elements


def frugal_columns(tree, density=0.25, axis=-2, group=1, shards=1):
    """Moments of the selected and the whole, a table of every matrix, the counters of leaves, whole and step."""
    split, rest = matrices(tree)
    total = adam_bytes(rest) + 4 + 4
    for _, batch, *size in split:
        groups = size[axis] // group
        kept = max(int(groups // shards * density), 1) * shards * group
        total += adam_bytes(batch * kept * size[-3 - axis]) + 4 * batch * groups + 4
    return total


def frugal_randk(tree, density=0.25):
    split, rest = matrices(tree)
    return adam_bytes(rest) + 8 + sum(8 * b * m * int(n * density) + 4 * b * (m + n) + 4 for _, b, m, n in split)


def frugal_blocks(tree):
    """Of 3 + 3 + 1 matrices of three sizes round(7 / 4) = 2 have moments, one of each stack."""
    split, rest = matrices(tree)
    stacks = [(b, m * n) for _, b, m, n in split if b > 1]
    return adam_bytes(rest) + 8 + sum(8 * size + 4 * count + 4 for count, size in stacks)


def blocks_bytes(tree, active):
    """Moments of the active of three layers and of all that is outside of the stack; three counters."""
    stack = sizes(tree["layers"])
    return adam_bytes(active * stack // 3 + sizes(tree) - stack) + 12


def frugal_svd(tree, density=0.25):
    """A basis of the shorter side and moments along the longer one."""
    split, rest = matrices(tree)
    total = adam_bytes(rest) + 8
    for _, batch, m, n in split:
        rank = round(min(m, n) * density)
        total += 4 * batch * rank * min(m, n) + adam_bytes(batch * rank * max(m, n)) + 4
    return total


def frugal(**settings):
    def make(learning_rate=1e-2, b1=0.9):
        return mj.optim.frugal(learning_rate, update_gap=GAP, b1=b1, **settings)

    return make


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
        variant=True,
    ),
    Row(
        "ldadam",
        lambda learning_rate=1e-2, rho=0.908: optim.ldadam(learning_rate, 4, rho=rho, method="subspace_iteration"),
        lambda p: optim.ldadam_state_bytes(p, 4),
        bits32=False,
    ),
    Row(
        "badam",
        lambda learning_rate=1e-2, b1=0.9: mj.optim.badam(learning_rate, GAP, always="**", b1=b1),
        lambda p: blocks_bytes(p, 1),
    ),
    Row(
        "lisa",
        lambda learning_rate=1e-2, b1=0.9: mj.optim.lisa(learning_rate, GAP, b1=b1, seed=1),
        lambda p: blocks_bytes(p, 2),
        variant=True,
    ),
    Row("frugal_columns", frugal(axis="input"), frugal_columns),
    Row(
        "frugal_outputs",
        frugal(axis="output", group=2, stagger=True),
        lambda p: frugal_columns(p, axis=-1, group=2),
        fsdp=False,
        variant=True,
    ),
    Row(
        "frugal_output_shards",
        frugal(axis="output", shards=8, group=1, density=0.5),
        lambda p: frugal_columns(p, 0.5, axis=-1, shards=8),
        fsdp=True,
    ),
    Row("frugal_blockwise", frugal(split="blockwise"), frugal_blocks),
    Row("frugal_randk", frugal(split="randk", on_switch="project"), frugal_randk, fsdp=False),
    Row("frugal_subspace_iteration", frugal(split="subspace_iteration"), frugal_svd, fsdp=False, variant=True),
    Row("frugal_random", frugal(split="random", on_switch="project"), frugal_svd, fsdp=False),
    Row("frugal_sign", frugal(density=0.0), lambda p: adam_bytes(matrices(p)[1]) + 8, variant=True),
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
        variant=True,
    ),
    Row(
        "lion8bit",
        lambda learning_rate=1e-2, b1=0.9: optim.lion8bit(learning_rate, b1, block=8, least=64),
        lambda p: 4 + sum(optim.moment_bytes(x.shape, optim.state_format(8, 8, 64)) for x in jax.tree.leaves(p)),
        fsdp=False,
        variant=True,
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
