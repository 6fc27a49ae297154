"""BERT and RoBERTa encoders as a Flax NNX model (Devlin et al. 2018; Liu et al. 2019): post-norm, exact GELU.

Layers are stacked along a leading axis and run by `jax.lax.scan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from memjax.models.layers import (
    Embedding,
    Implementation,
    Linear,
    Source,
    again_if_packed,
    attend,
    prefix_length,
    replace_prefix,
    require_sizes,
    scan_layers,
    stack_layers,
    with_prefix,
)
from memjax.ops import gelu, layer_norm
from memjax.remat import Policy

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT-family encoder.

    Attributes:
      max_positions: rows of the position table.
      first_position: row of the first token (0 for BERT, one past the padding id for RoBERTa).
      type_vocab_size: number of token types.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 512
    first_position: int = 0
    type_vocab_size: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        require_sizes(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "max_positions",
            "type_vocab_size",
        )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")


class LayerNorm(nnx.Module):
    """Centres and scales over the last axis, in float32."""

    def __init__(self, features: int, eps: float):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.bias = nnx.Param(jnp.zeros((features,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class Attention(nnx.Module):
    """Projections of multi-head attention over the whole sequence."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.q_proj = Linear(d, d, bias=True, rngs=rngs)
        self.k_proj = Linear(d, d, bias=True, rngs=rngs)
        self.v_proj = Linear(d, d, bias=True, rngs=rngs)
        self.o_proj = Linear(d, d, bias=True, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, mask: jax.Array | None, implementation: Implementation | None) -> jax.Array:
        q, k, v = (
            projection(x).reshape(*x.shape[:2], self.num_heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )

        def attended(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return self.o_proj(attend(q, k, v, mask=mask, implementation=implementation))

        return again_if_packed(attended)(checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v"))


class MLP(nnx.Module):
    """Two linear maps with the exact GELU between."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return again_if_packed(lambda up: self.down_proj(gelu(up)))(self.up_proj(x))


class Block(nnx.Module):
    """One post-norm transformer layer."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.self_attn = Attention(config, rngs=rngs)
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, rngs=rngs)
        self.output_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def __call__(self, x: jax.Array, mask: jax.Array | None, implementation: Implementation | None) -> jax.Array:
        x = self.attention_norm(checkpoint_name(x + self.self_attn(x, mask, implementation), "block_middle"))
        return self.output_norm(checkpoint_name(x + self.mlp(x), "block_middle"))


class Embeddings(nnx.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.word = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position = Embedding(config.max_positions, config.hidden_size, rngs=rngs)
        self.token_type = Embedding(config.type_vocab_size, config.hidden_size, rngs=rngs)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps)

    def __call__(self, tokens: jax.Array, positions: jax.Array, token_types: jax.Array) -> jax.Array:
        return self.norm(self.word(tokens) + self.token_type(token_types) + self.position(positions))


class Bert(nnx.Module):
    """A BERT-family encoder.

    Params: ``embeddings/{word,position,token_type}/embedding``, ``embeddings/norm/{scale,bias}``, ``layers/...`` with
    a leading layer axis: ``self_attn/{q,k,v,o}_proj``, ``attention_norm``, ``mlp/{up,down}_proj``, ``output_norm``.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = stack_layers(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.config = config

    def layer(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        attention: Implementation | None = None,
        prefix: jax.Array | None = None,
    ) -> Callable[[Block, jax.Array, Any], jax.Array]:
        """Returns ``layer(block, x, prefix of the layer) -> x``, one encoder step; arguments as in `__call__`."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [batch, sequence], got shape {tokens.shape}")
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"mask must have the shape of tokens {tokens.shape}, got {mask.shape}")
        length = prefix_length(prefix, self.config.num_layers, self.config.hidden_size)
        attended = None
        if mask is not None:
            attended = jnp.pad(mask != 0, ((0, 0), (length, 0)), constant_values=True)[:, None, None, :]
        return lambda block, x, own_prefix: block(replace_prefix(own_prefix, x), attended, attention)

    def layer_xs(self, prefix: jax.Array | None = None) -> Any:
        """Returns what else than params tells the layers apart: arrays ``[L, ...]`` for `scan_layers`."""
        return prefix if prefix is not None and prefix.ndim == 3 else None

    def embed(
        self, tokens: jax.Array, token_types: jax.Array | None = None, prefix: jax.Array | None = None
    ) -> jax.Array:
        """Returns what the first layer takes, ``[B, P + S, D]``."""
        if token_types is not None and token_types.shape != tokens.shape:
            raise ValueError(f"token_types must have the shape of tokens {tokens.shape}, got {token_types.shape}")
        room = self.config.max_positions - self.config.first_position
        if tokens.shape[1] > room:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the encoder's {room} positions")
        positions = self.config.first_position + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        return with_prefix(prefix, self.embeddings(tokens, positions, token_types))

    def finish(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the hidden states ``[B, S, D]`` of the tokens from what the last layer gave."""
        return x[:, x.shape[1] - tokens.shape[1] :]

    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        remat: Policy = "none",
        attention: Implementation | None = None,
        prefix: jax.Array | None = None,
    ) -> jax.Array:
        """Encodes sequences that start at position 0.

        Args:
          tokens: int32 ``[B, S]``.
          mask: ``[B, S]``, nonzero where there is a token and zero where there is padding (on the right).
          token_types: int32 ``[B, S]``; default 0.
          remat: see `memjax.models.layers.scan_layers`.
          attention: "xla", "cudnn", or None for the best that runs.
          prefix: ``[P, D]`` of a soft prompt, which stands before every embedded sequence and takes no positions of the
            table; ``[L, P, D]`` replaces it before each layer.

        Returns:
          ``[B, S, D]`` in the dtype of the embedding: the tokens only.

        Raises:
          ValueError: shapes that do not fit, or more tokens than the position table has rows.
        """
        layer = self.layer(tokens, mask, attention, prefix)
        x = self.embed(tokens, token_types, prefix)
        x = scan_layers(self.layers, layer, x, self.layer_xs(prefix), remat=remat)
        return self.finish(tokens, x)


def sentence_embedding(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns unit vectors: the mean of hidden states over non-padding positions, divided by its length.

    Args:
      hidden: ``[B, S, D]``.
      mask: ``[B, S]``, nonzero where there is a token; None: everywhere.

    Returns:
      float32 ``[B, D]``.
    """
    weight = jnp.ones(hidden.shape[:2]) if mask is None else (mask != 0).astype(jnp.float32)
    total = jnp.einsum("bsd,bs->bd", hidden.astype(jnp.float32), weight)
    mean = total / jnp.maximum(weight.sum(axis=1, keepdims=True), 1.0)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def config_from_hf(config: Mapping[str, Any]) -> BertConfig:
    """Returns the `BertConfig` of a Hugging Face ``config.json``.

    Raises:
      ValueError: unknown ``model_type``, a missing size, or a feature that this model lacks, by name.
    """
    family = config.get("model_type")
    if family not in MODEL_TYPES:
        raise ValueError(f"model_type {family!r} is not a supported encoder; supported: {', '.join(MODEL_TYPES)}")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if name not in config]
    if missing:
        raise ValueError(f"config.json of model_type {family!r} lacks {', '.join(missing)}")
    for name, supported in (
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("quantization_config", None),
    ):
        found = config.get(name)
        if found is not None and found != supported:
            raise ValueError(f"config.json has {name} = {found!r}, but only {supported!r} is supported")
    return BertConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        max_positions=config.get("max_position_embeddings", 512),
        first_position=0 if family == "bert" else config.get("pad_token_id", 1) + 1,
        type_vocab_size=config.get("type_vocab_size", 2),
        norm_eps=float(config.get("layer_norm_eps", 1e-12)),
    )


def config_to_hf(config: BertConfig) -> dict[str, Any]:
    """Returns a Hugging Face ``config.json`` of which `config_from_hf` makes ``config`` again."""
    family, architecture = ("roberta", "RobertaModel") if config.first_position else ("bert", "BertModel")
    return {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "gelu",
        "max_position_embeddings": config.max_positions,
        "pad_token_id": max(config.first_position - 1, 0),
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.norm_eps,
    }


_LAYER_MODULES = {
    "self_attn/q_proj": "attention.self.query",
    "self_attn/k_proj": "attention.self.key",
    "self_attn/v_proj": "attention.self.value",
    "self_attn/o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up_proj": "intermediate.dense",
    "mlp/down_proj": "output.dense",
    "output_norm": "output.LayerNorm",
}


def plain_name(name: str) -> str:
    """Returns a tensor name without its ``bert.`` or ``roberta.`` prefix and with today's names of norm weights."""
    name = name.removeprefix("bert.").removeprefix("roberta.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def hf_sources() -> dict[str, Source]:
    """Returns leaf path -> tensor of a Hugging Face checkpoint, as `plain_name` names it."""
    sources = {
        f"embeddings/{ours}/embedding": Source(f"embeddings.{theirs}_embeddings.weight")
        for ours, theirs in (("word", "word"), ("position", "position"), ("token_type", "token_type"))
    }
    sources["embeddings/norm/scale"] = Source("embeddings.LayerNorm.weight")
    sources["embeddings/norm/bias"] = Source("embeddings.LayerNorm.bias")
    for module, theirs in _LAYER_MODULES.items():
        norm = module.endswith("norm")
        leaf = "scale" if norm else "kernel"
        sources[f"layers/{module}/{leaf}"] = Source(f"encoder.layer.{{}}.{theirs}.weight", transpose=not norm)
        sources[f"layers/{module}/bias"] = Source(f"encoder.layer.{{}}.{theirs}.bias")
    return sources


HF_IGNORED = ("embeddings.position_ids", "pooler.*", "cls.*", "lm_head.*")
