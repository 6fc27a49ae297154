"""The Llama family as one Flax NNX model: Llama 2 and 3, Mistral, Qwen2, Qwen2.5, Qwen3 and SmolLM2.

Layers are stacked along a leading axis and run by `jax.lax.scan`. Sources: Touvron et al. 2023 (Llama 2), Dubey et al.
2024 (Llama 3, rope scaling), Jiang et al. 2023 (Mistral, sliding window), Yang et al. 2024 and 2025 (Qwen2.5, Qwen3).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from memjax.attention import Mask, block_lists, masks
from memjax.models.layers import (
    Attention as AttentionChoice,
)
from memjax.models.layers import (
    Embedding,
    Linear,
    Source,
    again_if_packed,
    attend,
    attend_blocks,
    in_chunks,
    prefix_length,
    replace_prefix,
    require_sizes,
    scan_layers,
    stack_layers,
    with_prefix,
)
from memjax.ops import rms_norm, rope, swiglu
from memjax.remat import Policy

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    Attributes:
      kind: "linear" divides every frequency by ``factor``; "llama3" divides long wavelengths only and blends between;
        "factors" divides each frequency by its own entry of ``factors`` (as GGUF files store it).
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and variants of a Llama-family model.

    Attributes:
      attention_bias: q, k and v projections have a bias.
      output_bias: the attention output projection has a bias.
      qk_norm: queries and keys are RMS-normalised per head before the rotation (Qwen3).
      sliding_window: number of positions (the current one included) that a windowed layer attends to; None: all.
      window_layers: per layer, whether the window applies to it; None: to every layer.
      max_positions: the context that the model was trained for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-6
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    max_positions: int = 4096

    def __post_init__(self) -> None:
        require_sizes(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even to rotate pairs, got {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ValueError(f"sliding_window must be positive, got {self.sliding_window}")
        if self.window_layers is not None and len(self.window_layers) != self.num_layers:
            raise ValueError(f"window_layers has {len(self.window_layers)} entries for num_layers = {self.num_layers}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind not in ("linear", "llama3", "factors"):
            raise ValueError(f"unknown rope scaling kind {scaling.kind!r}; known: linear, llama3, factors")
        if scaling is not None and scaling.kind == "factors" and len(scaling.factors) != self.head_dim // 2:
            raise ValueError(f"rope scaling has {len(scaling.factors)} factors for head_dim {self.head_dim}")


class Cache(NamedTuple):
    """Keys and values of the positions seen so far.

    Attributes:
      k, v: ``[L, B, T, Hk, Dh]``; positions from ``length`` on are unused.
      length: int32 scalar.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array


def make_cache(config: LlamaConfig, batch: int, size: int, dtype: Any) -> Cache:
    """Returns an empty `Cache` for ``batch`` sequences of up to ``size`` positions."""
    shape = (config.num_layers, batch, size, config.num_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Returns the angle per position of each rotated pair, ``[head_dim / 2]`` float32."""
    inverse = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        pass
    elif scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling.kind == "factors":
        inverse = inverse / np.asarray(scaling.factors)
    else:
        turns = scaling.original_max_positions * inverse / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        inverse = keep * inverse + (1 - keep) * inverse / scaling.factor
    return inverse.astype(np.float32)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Returns positions that restart at 0 wherever the segment changes; both int32 ``[B, S]``."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis, in float32."""

    def __init__(self, features: int, eps: float):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], eps=self.eps)


class Attention(nnx.Module):
    """Rotary grouped-query attention."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=config.attention_bias, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.attention_bias, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.attention_bias, rngs=rngs)
        self.o_proj = Linear(width, config.hidden_size, bias=config.output_bias, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_eps)
        self.config = config

    def project(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated q ``[B, S, H, Dh]``, rotated k and v ``[B, S, Hk, Dh]`` of ``x [B, S, D]``."""
        q, k, v = (
            projection(x).reshape(*x.shape[:2], -1, self.config.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, angles), rope(k, angles)
        return checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")


class MLP(nnx.Module):
    """SwiGLU feed-forward; where `down_proj` is trained, its input is computed again instead of kept."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, f, bias=bias, rngs=rngs)
        self.up_proj = Linear(d, f, bias=bias, rngs=rngs)
        self.down_proj = Linear(f, d, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return jax.checkpoint(lambda gate, up: self.down_proj(swiglu(gate, up)), prevent_cse=False)(gate, up)


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, attention: Any, mlp_chunk: int | None = None) -> jax.Array:
        """Returns ``[B, S, D]``.

        Args:
          x: ``[B, S, D]``.
          angles: ``[B or 1, S, Dh/2]``.
          attention: ``(q, k, v) -> [B, S, H * Dh]``.
          mlp_chunk: as `Llama` takes it.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        x = x + again_if_packed(lambda *qkv: self.self_attn.o_proj(attention(*qkv)))(q, k, v)
        x = checkpoint_name(x, "block_middle")
        parts = {"norm": self.post_attention_layernorm, "mlp": self.mlp}
        return in_chunks(lambda parts, x: x + parts["mlp"](parts["norm"](x)), parts, x, mlp_chunk)


def _parts(choice: AttentionChoice | None) -> tuple[Any, Mask | None, Any]:
    """Returns what computes attention, the mask and the policy: of the three, all but one are None."""
    if isinstance(choice, Mask):
        return None, choice, None
    if choice in ("xla", "cudnn", None):
        return choice, None, None
    if callable(choice):
        return None, None, choice
    raise ValueError(f"attention must be 'xla', 'cudnn', a mask, a function of (q, k) or None, got {choice!r}")


class Llama(nnx.Module):
    """A Llama-family decoder.

    Params: ``embed_tokens/embedding [V, D]``, ``layers/...`` with a leading layer axis (kernels ``[L, in, out]``),
    ``norm/scale [D]``, and ``lm_head/kernel [D, V]`` unless the embedding is tied to the output.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = stack_layers(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, rngs=rngs)
        self.config = config

    def _windows(self) -> tuple[int | None, ...]:
        """Returns the windows of layers; of two, the first is that of layers which ``window_layers`` names."""
        window, layers = self.config.sliding_window, self.config.window_layers
        if window is None or (layers is not None and not any(layers)):
            return (None,)
        return (window,) if layers is None or all(layers) else (window, None)

    def _windowed(self, layer_has_window: Any, attention: Any) -> Any:
        """Returns ``attention(q, k, v)`` from ``attention(q, k, v, window)`` for a layer."""
        one, *other = (lambda *qkv, window=window: attention(*qkv, window) for window in self._windows())
        return functools.partial(jax.lax.cond, layer_has_window, one, *other) if other else one

    def _attention(
        self,
        choice: AttentionChoice | None,
        batch: int,
        keys: int,
        *,
        segment_ids: jax.Array | None = None,
        prompt: int = 0,
        rows: jax.Array | None = None,
    ) -> Callable[..., jax.Array]:
        """Returns causal ``attention(q, k, v, window)``; lists of blocks are made here, once for all layers.

        Args:
          choice: as `__call__` takes it.
          batch: B.
          keys: T.
          segment_ids: int32 ``[B, T]``.
          prompt: P, positions in front that every position after them sees.
          rows: int32 ``[S]``, the positions of the queries; None where they are all, S = T.
        """
        implementation, mask, policy = _parts(choice)
        shared = [] if mask is None else [mask]
        if segment_ids is not None:
            shared.append(masks.segments(segment_ids))
        if not shared and policy is None:
            return lambda q, k, v, window: attend(q, k, v, causal=True, window=window, implementation=implementation)
        if implementation == "cudnn":
            raise ValueError("attention='cudnn' cannot tell segments apart; None and 'xla' can")
        shape = (batch, keys, self.config.num_heads, self.config.head_dim)

        def shown(window: int | None, *more: Mask) -> Mask:
            past = masks.causal() if window is None else masks.window(window - 1, 0)
            chosen = functools.reduce(operator.and_, [*shared, *more])
            return past & (chosen | masks.sink(prompt) if prompt else chosen)

        if policy is None:
            lists = {
                window: block_lists(shown(window), shape, keys, rows=rows, implementation=implementation)
                for window in self._windows()
            }
            return lambda q, k, v, window: attend_blocks(q, k, v, lists[window], implementation)

        def by_policy(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
            chosen = policy(jax.lax.stop_gradient(q), jax.lax.stop_gradient(k))
            return attend_blocks(q, k, v, shown(window, chosen))

        return by_policy

    def layer_xs(self, prefix: jax.Array | None = None) -> Any:
        """Returns what else than params tells the layers apart: arrays ``[L, ...]`` for `scan_layers`."""
        count = self.config.num_layers
        windows = self.config.window_layers or (True,) * count
        return jnp.arange(count), jnp.asarray(windows), prefix if prefix is not None and prefix.ndim == 3 else None

    def _angles(self, positions: jax.Array) -> jax.Array:
        return positions.astype(jnp.float32)[..., None] * rope_frequencies(self.config)

    def layer(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        attention: AttentionChoice | None = None,
        prefix: jax.Array | None = None,
        mlp_chunk: int | None = None,
    ) -> Callable[[Block, jax.Array, Any], jax.Array]:
        """Returns ``layer(block, x, extra) -> x``, one step of the decoder; arguments as in `__call__`."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [batch, sequence], got shape {tokens.shape}")
        for name, ids in (("segment_ids", segment_ids), ("positions", positions)):
            if ids is not None and ids.shape != tokens.shape:
                raise ValueError(f"{name} must have the shape of tokens {tokens.shape}, got {ids.shape}")
        length = prefix_length(prefix, self.config.num_layers, self.config.hidden_size)
        if segment_ids is not None:
            if length and self.config.sliding_window is not None:
                raise ValueError("a prefix before packed segments is not supported for a model with a sliding window")
            positions = segment_positions(segment_ids) if positions is None else positions
            segment_ids = jnp.pad(segment_ids, ((0, 0), (length, 0)), mode="edge") if length else segment_ids
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        if length:
            front = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (positions.shape[0], length))
            positions = jnp.concatenate([front, length + positions], axis=1)
        angles = self._angles(positions)

        batch, size = tokens.shape
        attention_of = self._attention(attention, batch, length + size, segment_ids=segment_ids, prompt=length)

        def layer(block: Block, x: jax.Array, extra: Any) -> jax.Array:
            _, has_window, own_prefix = extra
            return block(replace_prefix(own_prefix, x), angles, self._windowed(has_window, attention_of), mlp_chunk)

        return layer

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        remat: Policy = "none",
        attention: AttentionChoice | None = None,
        prefix: jax.Array | None = None,
        mlp_chunk: int | None = None,
    ) -> jax.Array:
        """Runs the decoder up to and including the final norm.

        Args:
          tokens: int32 ``[B, S]``.
          segment_ids: int32 ``[B, S]`` of packed documents; tokens attend within their own segment only.
          positions: int32 ``[B, S]``; default: from 0, restarting at each segment.
          remat: see `memjax.models.layers.scan_layers`.
          attention: "xla", "cudnn", or None for the best that runs; or a mask of `memjax.attention.masks`, of which
            only what is past, in the model's own window and in the token's segment is seen; or a policy
            ``(q [B, S, H, Dh], k [B, S, Hk, Dh]) -> mask``, which every layer asks anew. With a prefix, masks are of
            P + S positions.
          prefix: ``[P, D]`` of a soft prompt, which stands before every sequence and is seen by every segment of it:
            positions 0 to P - 1, those of the tokens moved on by P. ``[L, P, D]`` replaces it before each layer.
          mlp_chunk: tokens for which an MLP, with its norm and residual sum, exists at a time; None: all. Policies that
            keep every residual, such as "none" and "8bit", then keep its input only and compute it again; the others
            keep what they say, and their gradients cost what they cost.

        Returns:
          ``[B, S, D]`` in the dtype of the embedding: the tokens only.
        """
        layer = self.layer(tokens, segment_ids, positions, attention, prefix, mlp_chunk)
        x = scan_layers(self.layers, layer, self.embed(tokens, prefix), self.layer_xs(prefix), remat=remat)
        return self.finish(tokens, x)

    def embed(self, tokens: jax.Array, prefix: jax.Array | None = None) -> jax.Array:
        """Returns what the first layer takes, ``[B, P + S, D]``."""
        return with_prefix(prefix, self.embed_tokens(tokens))

    def finish(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the normalised hidden states ``[B, S, D]`` of the tokens from what the last layer gave."""
        return self.norm(x[:, x.shape[1] - tokens.shape[1] :])

    def extend(
        self,
        tokens: jax.Array,
        cache: Cache,
        *,
        first: bool = False,
        attention: AttentionChoice | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Runs the decoder on the next tokens of sequences whose past is in ``cache``.

        Args:
          tokens: int32 ``[B, S]``, which follow the cached positions.
          cache: the past; it must have room for S more positions.
          first: the cache is empty, so attention needs to look at the new tokens only.
          attention: as in `__call__`. A mask is of all T positions of the cache, but of the new tokens alone with
            ``first``: the same for one without facts about tokens. Others are for ``first``: later tokens attend to the
            whole cache by XLA.
          prefix: as in `__call__`, with ``first`` only; takes P positions of the cache.

        Returns:
          hidden states ``[B, S, D]`` and the cache with the new positions.
        """
        if prefix is not None and not first:
            raise ValueError("a prefix stands before the first tokens only: give it with first=True")
        count = prefix_length(prefix, self.config.num_layers, self.config.hidden_size) + tokens.shape[1]
        new = cache.length + jnp.arange(count, dtype=jnp.int32)
        angles = self._angles(new[None])
        batch, size = tokens.shape[0], cache.k.shape[2]
        slots = jnp.arange(size, dtype=jnp.int32)
        to_past = None
        if first:
            to_new = self._attention(attention, batch, count, prompt=count - tokens.shape[1])
        elif isinstance(attention, Mask):
            to_past = self._attention(attention, batch, size, rows=new)

        def layer(block: Block, carry: Any, extra: Any) -> Any:
            x, keys, values = carry
            index, has_window, own_prefix = extra

            def attend_past(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
                if first:
                    return to_new(q, k, v, window)
                if to_past is not None:
                    return to_past(q, keys[index], values[index], window)
                mask = slots <= new[:, None]
                if window is not None:
                    mask &= slots > new[:, None] - window
                return attend(q, keys[index], values[index], mask=mask[None, None], implementation="xla")

            def attention_and_write(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                nonlocal keys, values
                at = (index, 0, cache.length, 0, 0)
                keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), at)
                values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), at)
                return self._windowed(has_window, attend_past)(q, k, v)

            return block(replace_prefix(own_prefix, x), angles, attention_and_write), keys, values

        carry = (self.embed(tokens, prefix), cache.k, cache.v)
        x, keys, values = scan_layers(self.layers, layer, carry, self.layer_xs(prefix))
        return self.finish(tokens, x), Cache(keys, values, cache.length + count)

    def head(self) -> tuple[jax.Array, int]:
        """Returns the output weight and its axis of size D: `lm_head` ``[D, V]`` and 0, or the tied embedding and 1."""
        return (self.embed_tokens.embedding[...], 1) if self.config.tie_embeddings else (self.lm_head.kernel[...], 0)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits ``[..., V]`` of hidden states ``[..., D]``."""
        weight, axis = self.head()
        contraction = (((hidden.ndim - 1,), (axis,)), ((), ()))
        return jax.lax.dot_general(hidden, weight.astype(hidden.dtype), contraction, preferred_element_type=jnp.float32)


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise ValueError(f"rope scaling type {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    missing = [key for key in _ROPE_KEYS[kind] if key not in rope]
    if missing:
        raise ValueError(f"rope scaling of type {kind!r} lacks {', '.join(missing)}")
    values = [rope[key] for key in _ROPE_KEYS[kind]]
    return theta, None if kind == "default" else RopeScaling(kind, *values)


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
    """Returns the `LlamaConfig` of a Hugging Face ``config.json``.

    Raises:
      ValueError: unknown ``model_type``, a missing size, or a feature that this model lacks, by name.
    """
    family = config.get("model_type")
    if family not in MODEL_TYPES:
        raise ValueError(f"model_type {family!r} is not a supported decoder; supported: {', '.join(MODEL_TYPES)}")
    required = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    missing = [name for name in required if name not in config]
    if missing:
        raise ValueError(f"config.json of model_type {family!r} lacks {', '.join(missing)}")
    for name, supported in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0), ("quantization_config", None)):
        found = config.get(name)
        if found is not None and found != supported:
            raise ValueError(f"config.json has {name} = {found!r}, but only {supported!r} is supported")
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or (128 if family == "qwen3" else None)
    if head_dim is None:
        if config["hidden_size"] % heads:
            raise ValueError(f"hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}")
        head_dim = config["hidden_size"] // heads
    theta, scaling = _rope(config)
    window, window_layers = None, None
    if family == "mistral" or (family != "llama" and config.get("use_sliding_window")):
        window = config.get("sliding_window")
    if window is not None and family != "mistral":
        first = config.get("max_window_layers", 28)
        kinds = config.get("layer_types")
        window_layers = tuple(kinds[i] == "sliding_attention" if kinds else i >= first for i in range(layers))
    bias = bool(config.get("attention_bias", False))
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=family == "qwen2" or (bias and family != "mistral"),
        output_bias=bias and family in ("llama", "qwen3"),
        mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        sliding_window=window,
        window_layers=window_layers,
        max_positions=config.get("max_position_embeddings", 4096 * 32 if family == "mistral" else 2048),
    )


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Returns a Hugging Face ``config.json`` of which `config_from_hf` makes ``config`` again.

    Rotary factors of a GGUF file are written as the ``llama3`` scaling that they are computed from.

    Raises:
      ValueError: sizes that no supported ``model_type`` can say.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "factors":
        scaling = _llama3_scaling(config)
        config = dataclasses.replace(config, rope_scaling=scaling)
    rope = None
    if scaling is not None:
        values = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
        rope = {"rope_type": scaling.kind, **dict(zip(_ROPE_KEYS[scaling.kind], values))}
    windows = config.window_layers
    for family in MODEL_TYPES:
        settings: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[family]],
            "model_type": family,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "rope_theta": config.rope_theta,
            "rope_scaling": rope,
            "rms_norm_eps": config.rms_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": config.output_bias,
            "mlp_bias": config.mlp_bias,
            "max_position_embeddings": config.max_positions,
            "sliding_window": config.sliding_window,
        }
        if windows is not None:
            kinds = ["sliding_attention" if window else "full_attention" for window in windows]
            settings |= {"use_sliding_window": True, "layer_types": kinds}
        if config_from_hf(settings) == config:
            return settings
    raise ValueError(f"no Hugging Face configuration of the types {', '.join(MODEL_TYPES)} says what {config} does")


def _llama3_scaling(config: LlamaConfig) -> RopeScaling:
    """Returns the ``llama3`` scaling that gives the rotary factors of ``config``."""
    wanted = rope_frequencies(config)
    factor = max(config.rope_scaling.factors) if config.rope_scaling else 1.0
    scaling = dataclasses.replace(_LLAMA3, factor=factor)
    if np.allclose(rope_frequencies(dataclasses.replace(config, rope_scaling=scaling)), wanted, rtol=1e-4, atol=0):
        return scaling
    raise ValueError(f"Hugging Face configurations cannot say the rotary factors {config.rope_scaling}")


def _layer_leaves(config: LlamaConfig) -> list[str]:
    attention = [f"self_attn/{x}_proj/kernel" for x in "qkvo"]
    if config.attention_bias:
        attention += [f"self_attn/{x}_proj/bias" for x in "qkv"]
    if config.output_bias:
        attention.append("self_attn/o_proj/bias")
    if config.qk_norm:
        attention += ["self_attn/q_norm/scale", "self_attn/k_norm/scale"]
    mlp = [f"mlp/{x}_proj/kernel" for x in ("gate", "up", "down")]
    if config.mlp_bias:
        mlp += [f"mlp/{x}_proj/bias" for x in ("gate", "up", "down")]
    return [*attention, *mlp, "input_layernorm/scale", "post_attention_layernorm/scale"]


def hf_sources(config: LlamaConfig) -> dict[str, Source]:
    """Returns leaf path -> tensor of a Hugging Face checkpoint."""
    sources = {"embed_tokens/embedding": Source("model.embed_tokens.weight"), "norm/scale": Source("model.norm.weight")}
    for leaf in _layer_leaves(config):
        *module, kind = leaf.split("/")
        suffix = "bias" if kind == "bias" else "weight"
        sources[f"layers/{leaf}"] = Source(f"model.layers.{{}}.{'.'.join(module)}.{suffix}", kind == "kernel")
    if not config.tie_embeddings:
        sources["lm_head/kernel"] = Source("lm_head.weight", transpose=True)
    return sources


HF_IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
HF_IGNORED_WHEN_TIED = ("lm_head.weight",)


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn/q_proj": "attn_q",
    "self_attn/k_proj": "attn_k",
    "self_attn/v_proj": "attn_v",
    "self_attn/o_proj": "attn_output",
    "self_attn/q_norm": "attn_q_norm",
    "self_attn/k_norm": "attn_k_norm",
    "mlp/gate_proj": "ffn_gate",
    "mlp/up_proj": "ffn_up",
    "mlp/down_proj": "ffn_down",
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Sequence[float] | None = None,
) -> LlamaConfig:
    """Returns the `LlamaConfig` of a GGUF file; Mistral files call their architecture "llama".

    Args:
      metadata: the file's key-value pairs.
      shapes: shape of every tensor, ``[out, in]`` for matrices.
      rope_factors: values of the tensor ``rope_freqs.weight``, where the file has one.

    Raises:
      ValueError: unknown architecture, a missing key, or a feature that this model lacks, by name.
    """
    arch = metadata.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        supported = ", ".join(GGUF_ARCHITECTURES)
        raise ValueError(f"GGUF architecture {arch!r} is not a supported decoder; supported: {supported}")

    def need(key: str) -> Any:
        if f"{arch}.{key}" not in metadata:
            raise ValueError(f"GGUF metadata lacks {arch}.{key}")
        return metadata[f"{arch}.{key}"]

    def get(key: str, default: Any) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    if get("expert_count", 0):
        raise ValueError(f"{arch}.expert_count = {get('expert_count', 0)}: mixtures of experts are not supported")
    heads, hidden = int(need("attention.head_count")), int(need("embedding_length"))
    head_dim = int(get("attention.key_length", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(get(key, head_dim)) != head_dim:
            raise ValueError(f"{arch}.{key} = {get(key, head_dim)}, but only the head size {head_dim} is supported")
    kind, scaling = get("rope.scaling.type", "none"), None
    if kind == "linear":
        scaling = RopeScaling("linear", float(need("rope.scaling.factor")))
    elif kind != "none":
        raise ValueError(f"{arch}.rope.scaling.type = {kind!r} is not supported; supported: none, linear")
    if rope_factors is not None:
        if scaling is not None:
            raise ValueError("the GGUF file has both linear rope scaling and a tensor rope_freqs.weight")
        scaling = RopeScaling("factors", factors=tuple(float(factor) for factor in rope_factors))
    window = get("attention.sliding_window", None)
    return LlamaConfig(
        vocab_size=shapes["token_embd.weight"][0] if "token_embd.weight" in shapes else int(need("vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(need("feed_forward_length")),
        num_layers=int(need("block_count")),
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        rope_theta=float(get("rope.freq_base", 10000.0)),
        rope_scaling=scaling,
        rms_eps=float(need("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        qk_norm=arch == "qwen3",
        sliding_window=None if window is None else int(window),
        max_positions=int(need("context_length")),
    )


def gguf_sources(config: LlamaConfig, architecture: str) -> dict[str, Source]:
    """Returns leaf path -> tensor of a GGUF file.

    Files of architecture "llama" hold the rows of q and k with rotary pairs adjacent.
    """
    sources = {"embed_tokens/embedding": Source("token_embd.weight"), "norm/scale": Source("output_norm.weight")}
    for leaf in _layer_leaves(config):
        module, kind = leaf.rsplit("/", 1)
        heads = 0
        if architecture == "llama":
            heads = {"self_attn/q_proj": config.num_heads, "self_attn/k_proj": config.num_kv_heads}.get(module, 0)
        suffix = "bias" if kind == "bias" else "weight"
        sources[f"layers/{leaf}"] = Source(f"blk.{{}}.{_GGUF_NAMES[module]}.{suffix}", kind == "kernel", heads)
    if not config.tie_embeddings:
        sources["lm_head/kernel"] = Source("output.weight", transpose=True)
    return sources


GGUF_IGNORED = ("rope_freqs.weight", "blk.*.attn_rot_embd.weight")

_LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
_NAMED = {
    "llama-3.2-1b": LlamaConfig(
        128256,
        2048,
        8192,
        16,
        32,
        8,
        64,
        500000.0,
        dataclasses.replace(_LLAMA3, factor=32.0),
        1e-5,
        tie_embeddings=True,
        max_positions=131072,
    ),
    "llama-3.1-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 500000.0, _LLAMA3, 1e-5, max_positions=131072),
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, rms_eps=1e-5, max_positions=4096),
    "mistral-7b": LlamaConfig(
        32000, 4096, 14336, 32, 32, 8, 128, rms_eps=1e-5, sliding_window=4096, max_positions=32768
    ),
    "smollm2-135m": LlamaConfig(
        49152, 576, 1536, 30, 9, 3, 64, 100000.0, rms_eps=1e-5, tie_embeddings=True, max_positions=8192
    ),
    "qwen2.5-0.5b": LlamaConfig(
        151936, 896, 4864, 24, 14, 2, 64, 1000000.0, tie_embeddings=True, attention_bias=True, max_positions=32768
    ),
    "qwen3-0.6b": LlamaConfig(
        151936, 1024, 3072, 28, 16, 8, 128, 1000000.0, tie_embeddings=True, qk_norm=True, max_positions=40960
    ),
}


def llama_config(name: str) -> LlamaConfig:
    """Returns the sizes of a published model.

    Args:
      name: "llama-3.2-1b", "llama-3.1-8b", "llama-2-7b", "mistral-7b" (v0.1), "smollm2-135m", "qwen2.5-0.5b" or
        "qwen3-0.6b".
    """
    if name not in _NAMED:
        raise ValueError(f"no named configuration {name!r}; known: {', '.join(_NAMED)}")
    return _NAMED[name]
