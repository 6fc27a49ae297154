"""What reverse mode keeps of a block, to the byte."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import adapters
from memjax.models.bert import BertConfig
from memjax.models.bert import Block as BertBlock
from memjax.models.layers import join_heads
from memjax.models.llama import Block, LlamaConfig
from memjax.weights import lift
from tests.random_views import array

CONFIG = LlamaConfig(64, 32, 80, 2, num_heads=4, num_kv_heads=2, head_dim=8)
B, S = 2, 16
D, KV, F, HEADS = 32, 16, 80, 4


@jax.custom_vjp
def flash(q, k, v):
    """Stands for a flash attention kernel: keeps q, k, v, its output and the log-sum-exp."""
    return q + jnp.repeat(k * v, 2, axis=2)


def flash_forward(q, k, v):
    out = flash(q, k, v)
    return out, (q, k, v, out, out[..., 0].astype(jnp.float32))


def flash_backward(kept, d_out):
    q, k, v, out, lse = kept
    dq = d_out * (1 + 0 * (out + lse[..., None].astype(out.dtype)) * q)
    paired = d_out.reshape(*k.shape[:2], -1, 2, k.shape[-1]).sum(3)
    return dq, paired * v, paired * k


flash.defvjp(flash_forward, flash_backward)


@functools.cache
def block():
    """Returns a block's ``apply(params, x)`` and bfloat16 params."""
    graph, state = nnx.split(Block(CONFIG, rngs=nnx.Rngs(0)))
    angles = jnp.arange(S, dtype=jnp.float32)[None, :, None] * jnp.ones((1, 1, 4))
    attention = join_heads(flash, HEADS)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), state)
    return lambda params, x: nnx.merge(graph, params)(x, angles, attention), params


X = array(0, B, S, D, dtype=jnp.bfloat16)


def kept_per_token(fn, *args):
    """Returns the bytes of the distinct activations that reverse mode keeps, per token."""
    _, back = jax.vjp(fn, *args)
    given = {id(leaf) for leaf in jax.tree.leaves(args)}
    kept = {id(leaf): leaf for leaf in jax.tree.leaves(back) if leaf.shape[:2] == (B, S) and id(leaf) not in given}
    return sum(leaf.nbytes for leaf in kept.values()) / (B * S)


FUSED_OP_SET = 8 * D + 4 * KV + 4 * F + 4 * HEADS + 2 * 4
"""Two norms' outputs, q, k, v, the attention's output, gate and up in bfloat16; the log-sum-exp and two 1/rms."""


def test_a_trained_llama_block_keeps_the_formula():
    apply, params = block()
    assert kept_per_token(apply, params, X) == FUSED_OP_SET


def test_adapters_add_their_own_products_only():
    apply, params = block()
    adapter = adapters.lora(rank=2, alpha=4, targets="**/kernel")
    theta = adapter.init(jax.random.key(0), params)
    fn = lambda theta, x: lift(apply)(adapter.attach(params, theta), x)  # noqa: E731
    kept_outside = 6 * 2 * 2  # x @ A of q, k, v, o, gate and up; that of down is computed again
    assert kept_per_token(fn, theta, X) == FUSED_OP_SET + kept_outside


def test_a_frozen_block_keeps_what_its_nonlinear_parts_need():
    apply, params = block()
    assert kept_per_token(lambda x: apply(params, x), X) == FUSED_OP_SET


def test_a_scan_over_blocks_stacks_the_formula():
    apply, params = block()

    def temporaries(depth):
        stack = jax.tree.map(lambda w: jnp.stack([w] * depth), params)

        def loss(stack, x):
            return jnp.sum(jnp.sin(jax.lax.scan(lambda x, p: (apply(p, x), None), x, stack)[0].astype(jnp.float32)))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(stack, X).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    slope = (temporaries(12) - temporaries(6)) / 6 / (B * S)
    assert slope == pytest.approx(FUSED_OP_SET, rel=0.02)


def test_gradients_through_joined_heads():
    q, k, v = array(1, B, S, HEADS, 8), array(2, B, S, 2, 8), array(3, B, S, 2, 8)
    mask = array(4, B, S, HEADS, 1) > 0

    def masked(q, k, v, mask):
        return jnp.where(mask, flash(q, k, v), 0)

    plain = jax.vjp(lambda *qkv: masked(*qkv, mask).reshape(B, S, -1), q, k, v)
    joined = jax.vjp(lambda *qkv: join_heads(masked, HEADS)(*qkv, mask), q, k, v)
    np.testing.assert_array_equal(joined[0], plain[0])
    jax.tree.map(np.testing.assert_array_equal, joined[1](plain[0]), plain[1](plain[0]))


def test_a_bert_mlp_keeps_two_outputs_and_a_bit_an_element():
    config = BertConfig(64, D, F, 1, HEADS)
    graph, state = nnx.split(BertBlock(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), state)

    def half(params, x):
        block = nnx.merge(graph, params)
        return block.output_norm(x + block.mlp(x))

    spare_channels = 8 * 2
    assert kept_per_token(half, params, X) == 2 * F + F / 8 + 2 * D + 4 + spare_channels
