"""Text generation with a dense KV cache: one prefill, then one compiled loop that adds a token a turn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.attention import Mask, masks
from memjax.models.layers import Attention, prefix_length
from memjax.models.llama import LlamaConfig, make_cache
from memjax.models.model import Model, bind
from memjax.weights import lift


def generate(
    model: Model,
    params: Any,
    prompt_tokens: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
    eos: int | Sequence[int] | None = None,
    prefix: jax.Array | None = None,
    attention: Attention | None = None,
) -> jax.Array:
    """Continues prompts of equal length.

    Args:
      model: a decoder.
      params: its params; arrays or weight views.
      prompt_tokens: int32 ``[B, S]``.
      max_new_tokens: N, how many tokens to add.
      temperature: 0 takes the most probable token; otherwise tokens are drawn from softmax(logits / temperature).
      top_k: draw among the k most probable tokens only.
      key: PRNG key, needed when ``temperature`` is above 0.
      eos: token or tokens that end a sequence; the rest of its row is filled with the first of them. The loop stops
        when all sequences have ended.
      prefix: a soft prompt before the prompts; see `Model.hidden`.
      attention: as `Model.hidden` takes it. A mask without facts about tokens holds for prompts and new tokens; all
        else for prompts, and new tokens see all that is past.

    Returns:
      int32 ``[B, S + N]``, prompts included.

    Raises:
      ValueError: an encoder, an empty prompt, tokens outside the vocabulary, more positions than the model's context,
        or sampling options that do not fit together.
    """
    if model.kind != "causal":
        raise ValueError(f"{model.name or 'the model'} is an encoder and cannot generate")
    config = model.config
    prompt_tokens = jnp.asarray(prompt_tokens)
    if prompt_tokens.ndim != 2 or prompt_tokens.size == 0 or not jnp.issubdtype(prompt_tokens.dtype, jnp.integer):
        raise ValueError(
            f"prompt_tokens must be integers [batch, sequence] with at least one token, got shape "
            f"{prompt_tokens.shape} and dtype {prompt_tokens.dtype}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    positions = prefix_length(prefix, config.num_layers, config.hidden_size)
    total = positions + prompt_tokens.shape[1] + max_new_tokens
    if total > config.max_positions:
        raise ValueError(
            f"{positions + prompt_tokens.shape[1]} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {config.max_positions}"
        )
    low, high = int(prompt_tokens.min()), int(prompt_tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"prompt_tokens lie in {low}..{high}, outside the vocabulary 0..{config.vocab_size - 1}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError("temperature above 0 draws tokens at random and needs key=")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k must be 1 to {config.vocab_size}, got {top_k}")
    if isinstance(attention, Mask) and positions:
        attention |= masks.sink(positions)
    mask, other = (attention, None) if isinstance(attention, Mask) else (None, attention)
    ends = () if eos is None else (eos,) if isinstance(eos, int | np.integer) else tuple(eos)
    return _generate(
        params,
        prompt_tokens.astype(jnp.int32),
        jnp.float32(temperature),
        jax.random.key(0) if key is None else key,
        prefix,
        mask,
        config=config,
        count=max_new_tokens,
        sample=temperature > 0,
        top_k=top_k,
        eos=tuple(int(token) for token in ends),
        attention=other,
    )


@functools.partial(jax.jit, static_argnames=("config", "count", "sample", "top_k", "eos", "attention"))
def _generate(params: Any, *arrays: Any, **static: Any) -> jax.Array:
    return lift(functools.partial(_loop, **static))(params, *arrays)


def _loop(
    params: Any,
    prompt: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
    prefix: jax.Array | None,
    mask: Mask | None,
    *,
    config: LlamaConfig,
    count: int,
    sample: bool,
    top_k: int | None,
    eos: tuple[int, ...],
    attention: Any,
) -> jax.Array:
    module = bind(config, params)
    batch, length = prompt.shape
    size = prefix_length(prefix, config.num_layers, config.hidden_size) + length + count
    cache = make_cache(config, batch, size, params["embed_tokens"]["embedding"].dtype)

    def pick(hidden: jax.Array, step: jax.Array | int) -> jax.Array:
        logits = module.logits(hidden[:, -1])
        if not sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if top_k is not None:
            logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature).astype(jnp.int32)

    def ended(token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros(token.shape, bool)

    hidden, cache = module.extend(
        prompt, cache, first=True, prefix=prefix, attention=attention if mask is None else mask
    )
    token = pick(hidden, 0)
    tokens = jnp.full((batch, length + count), eos[0] if eos else 0, jnp.int32)
    tokens = jax.lax.dynamic_update_slice(tokens, prompt, (0, 0)).at[:, length].set(token)

    def running(state: Any) -> jax.Array:
        step, _, done, _, _ = state
        return (step < count) & ~jnp.all(done)

    def turn(state: Any) -> Any:
        step, token, done, tokens, cache = state
        hidden, cache = module.extend(token[:, None], cache, attention=mask)
        token = jnp.where(done, eos[0] if eos else 0, pick(hidden, step))
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, length + step))
        return step + 1, token, done | ended(token), tokens, cache

    state = (jnp.int32(1), token, ended(token), tokens, cache)
    return jax.lax.while_loop(running, turn, state)[3]
