"""What a careful user writes by hand: a Llama in plain JAX, all of it trained or LoRA on every linear layer.

Layers under `lax.scan` with `jax.checkpoint`, cuDNN attention, and a cross-entropy in chunks of tokens, so that the
logits of all tokens never exist, nor with full rematerialisation the activations of all layers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.harness import Workload, random_leaf
from benchmarks.shapes import Llama

Params = dict[str, Any]
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def init_params(config: Llama, key: jax.Array) -> Params:
    """Returns random bfloat16 weights, layers stacked on the first axis."""
    keys = iter(jax.random.split(key, 16))
    dtype = jnp.bfloat16
    tables = {"embed": random_leaf(next(keys), (config.vocab, config.d_model), dtype, 0.0, 0.02)}
    if not config.tied:
        tables["head"] = random_leaf(next(keys), (config.vocab, config.d_model), dtype, 0.0, 0.02)
    layers = {
        name: random_leaf(next(keys), (config.layers, *shape), dtype, 0.0, 0.02)
        for name, shape in config.matrices().items()
    }
    for name in ("norm1", "norm2"):
        layers[name] = random_leaf(next(keys), (config.layers, config.d_model), dtype, 1.0, 0.02)
    tables["norm"] = random_leaf(next(keys), (1, config.d_model), dtype, 1.0, 0.02)[0]
    return tables | {"layers": layers}


def init_lora(config: Llama, key: jax.Array, rank: int) -> Params:
    """Returns float32 factors: ``a`` [L, in, r] uniform as in Kaiming's rule, ``b`` [L, r, out] zero."""
    theta = {}
    for name, (n_in, n_out) in config.matrices().items():
        key, sub = jax.random.split(key)
        bound = math.sqrt(3 / n_in)
        a = jax.random.uniform(sub, (config.layers, n_in, rank), jnp.float32, -bound, bound)
        theta[name] = {"a": a, "b": jnp.zeros((config.layers, rank, n_out), jnp.float32)}
    return theta


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale


def rope(x: jax.Array, theta: float) -> jax.Array:
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)  # [S, hd/2]
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def hidden(
    config: Llama, params: Params, theta: Params, scale: float, tokens: jax.Array, attention: str, remat: str
) -> jax.Array:
    """Returns the last hidden states [B, S, D] of ``tokens`` [B, S]; without adapters ``theta`` is empty."""
    batch, length = tokens.shape

    def layer(x: jax.Array, weights: tuple[Params, Params]) -> tuple[jax.Array, None]:
        w, lora = weights

        def linear(x: jax.Array, name: str) -> jax.Array:
            if not lora:
                return x @ w[name]
            a, b = lora[name]["a"].astype(x.dtype), lora[name]["b"].astype(x.dtype)
            return x @ w[name] + (x @ a) @ b * jnp.asarray(scale, x.dtype)

        h = rms_norm(x, w["norm1"], config.eps)
        q = linear(h, "q").reshape(batch, length, config.heads, config.head_dim)
        k = linear(h, "k").reshape(batch, length, config.kv_heads, config.head_dim)
        v = linear(h, "v").reshape(batch, length, config.kv_heads, config.head_dim)
        q, k = rope(q, config.rope_theta), rope(k, config.rope_theta)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention)
        x = x + linear(mixed.reshape(batch, length, -1), "o")
        h = rms_norm(x, w["norm2"], config.eps)
        return x + linear(jax.nn.silu(linear(h, "gate")) * linear(h, "up"), "down"), None

    if remat != "none":  # a scan needs no barrier against common subexpressions
        layer = jax.checkpoint(layer, prevent_cse=False, policy=POLICIES[remat])
    x, _ = jax.lax.scan(layer, params["embed"][tokens], (params["layers"], theta))
    return rms_norm(x, params["norm"], config.eps)


def chunked_cross_entropy(x: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """Returns the mean cross-entropy; logits exist for ``chunk`` tokens at a time, forward and backward.

    Args:
      x: [T, D] hidden states.
      head: [V, D] output embedding.
      targets: [T] int32.
      chunk: number of tokens; divides T.
    """

    def one(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        h, t = part
        logits = (h @ head.T).astype(jnp.float32)
        chosen = jnp.sum(jnp.where(jnp.arange(head.shape[0]) == t[:, None], logits, 0), axis=-1)
        return total + jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen), None

    parts = x.reshape(-1, chunk, x.shape[-1]), targets.reshape(-1, chunk)
    one = jax.checkpoint(one, prevent_cse=False)
    total, _ = jax.lax.scan(one, jnp.zeros((), jnp.float32), parts)
    return total / targets.size


def build(
    config: Llama,
    *,
    rank: int | None,
    alpha: float,
    chunk: int,
    learning_rate: float,
    attention: str,
    remat: str = "full",
) -> Workload:
    """Returns the training step with AdamW.

    Args:
      config: sizes.
      rank, alpha: of the adapters; rank None trains all weights, which are bfloat16 as are the moments.
      chunk: tokens whose logits exist at a time.
      learning_rate: of AdamW.
      attention: ``implementation`` of `jax.nn.dot_product_attention`.
      remat: "none", or a key of `POLICIES`.
    """
    tx = optax.adamw(learning_rate)

    def init(key: jax.Array) -> tuple[Any, Params]:
        params = init_params(config, jax.random.fold_in(key, 0))
        if rank is None:
            return (params, tx.init(params)), {}
        theta = init_lora(config, jax.random.fold_in(key, 1), rank)
        return (theta, tx.init(theta)), params

    def loss_fn(theta: Params, params: Params, tokens: jax.Array) -> jax.Array:
        params, theta, scale = (theta, {}, 0.0) if rank is None else (params, theta, alpha / rank)
        x = hidden(config, params, theta, scale, tokens[:, :-1], attention, remat)
        head = params["embed"] if config.tied else params["head"]
        return chunked_cross_entropy(x.reshape(-1, config.d_model), head, tokens[:, 1:].reshape(-1), chunk)

    def step(state: Any, params: Params, tokens: jax.Array) -> tuple[Any, jax.Array]:
        theta, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(theta, params, tokens)
        updates, opt_state = tx.update(grads, opt_state, theta)
        return (optax.apply_updates(theta, updates), opt_state), loss

    return Workload(init, step)
