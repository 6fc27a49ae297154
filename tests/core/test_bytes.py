"""Bytes of trees and of compiled programs."""

import types

import jax
import jax.numpy as jnp
import pytest

from memjax import codecs
from memjax.core.bytes import CompiledBytes, compiled_bytes, nbytes
from memjax.weights import quantize
from tests.random_views import array, view


def test_bytes_of_leaves_of_every_kind():
    tree = {
        "f32": jnp.zeros((3, 5)),
        "bf16": jax.ShapeDtypeStruct((7,), jnp.bfloat16),
        "bool": jnp.zeros(9, bool),
        "key": jax.random.split(jax.random.key(0), 4),
        "python": 3,
        "none": None,
    }
    assert nbytes(tree) == 60 + 14 + 9 + 32


def test_bytes_of_views_are_those_of_their_codes():
    packed = quantize({"kernel": array(0, 4, 64, 32)}, codecs.int4(group=16))
    assert nbytes(packed) == packed["kernel"].nbytes == 4 * (64 * 32 // 2 + 64 // 16 * 32 * 2)
    assert nbytes(jax.eval_shape(lambda: packed)) == nbytes(packed)
    adapted = view("lora on dense", array(0, 8, 4))
    assert nbytes(adapted) == 4 * (8 * 4 + 3 * 8 + 3 * 4)


def test_compiled_bytes_count_donated_memory_once():
    x = jnp.zeros((256, 256))

    def step(state, x):
        return state + x, x.sum()

    plain, donated = (compiled_bytes(jax.jit(step, donate_argnums=d).lower(x, x).compile()) for d in ((), (0,)))
    assert plain.argument == donated.argument == 2 * x.nbytes
    assert (plain.alias, donated.alias) == (0, x.nbytes)
    assert plain.total - donated.total == x.nbytes
    assert CompiledBytes(5, 4, 3, 2, 9).total == 10


def test_a_backend_without_memory_analysis_raises():
    with pytest.raises(ValueError, match="no memory analysis"):
        compiled_bytes(types.SimpleNamespace(memory_analysis=lambda: None))
