"""A model as data (sizes, params, tokenizer) with pure functions of its params."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.core.paths import leaf_paths, map_with_path
from memjax.core.views import is_view
from memjax.models import bert, llama
from memjax.models.bert import Bert, BertConfig
from memjax.models.layers import Attention, Stages, checkpointed, structure
from memjax.models.llama import Llama, LlamaConfig
from memjax.remat import Policy

Config = LlamaConfig | BertConfig


def module_of(config: Config) -> Callable[..., nnx.Module]:
    """Returns the NNX module class that ``config`` configures."""
    if isinstance(config, LlamaConfig):
        return Llama
    if isinstance(config, BertConfig):
        return Bert
    raise TypeError(f"config must be a LlamaConfig or a BertConfig, got {type(config).__name__}")


def abstract(config: Config, dtype: Any = jnp.float32) -> Any:
    """Returns the params tree of ``config`` with a `jax.ShapeDtypeStruct` of ``dtype`` for every leaf."""
    shapes = structure(module_of(config), config)[1]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)


def random_params(config: Config, key: jax.Array, dtype: Any = jnp.float32) -> Any:
    """Returns params as a new model has them: kernels and tables of deviation 0.02, scales 1, biases 0.

    Args:
      config: sizes.
      key: PRNG key.
      dtype: dtype of every leaf.
    """
    shapes = abstract(config, dtype)
    keys = iter(jax.random.split(key, len(jax.tree.leaves(shapes))))

    def make(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = next(keys)
        if path.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if path.endswith("bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return _normal(key, leaf.shape, leaf.dtype)

    return map_with_path(make, shapes)


@jax.jit(static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)


def bind(config: Config, params: Any) -> Any:
    """Returns the NNX module of ``config`` with ``params`` in place.

    Raises:
      TypeError: a leaf is a weight view.
      ValueError: a leaf is missing, unknown or of another shape than ``config`` says.
    """
    graphdef, shapes = structure(module_of(config), config)
    found = dict(leaf_paths(params))
    for path, leaf in leaf_paths(shapes):
        if path not in found:
            raise ValueError(f"params lack {path} of shape {leaf.shape}")
        given = found.pop(path)
        if is_view(given):
            raise TypeError(
                f"{path} is a weight view ({type(given).__name__}): call the function as memjax.lift(fn)(params, ...)"
            )
        if given.shape != leaf.shape:
            raise ValueError(f"params at {path}: expected shape {leaf.shape}, got {given.shape}")
    if found:
        raise ValueError(f"params have leaves that the model lacks: {', '.join(list(found)[:8])}")
    return nnx.merge(graphdef, params)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model and what it was loaded with; the functions are pure in ``params``, so `memjax.lift` applies to them.

    Attributes:
      config: `LlamaConfig` or `BertConfig`.
      params: nested dicts of arrays and weight views.
      tokenizer: the checkpoint's tokenizer, or None.
      name: what it was loaded from.
    """

    config: Config
    params: Any = None
    tokenizer: Any = None
    name: str = ""

    @property
    def kind(self) -> Literal["causal", "encoder"]:
        """ "causal" for a decoder, "encoder" for an encoder."""
        return "causal" if isinstance(self.config, LlamaConfig) else "encoder"

    def hidden(
        self,
        params: Any,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        prefix: jax.Array | None = None,
        remat: Policy = "none",
        attention: Attention | None = None,
        mlp_chunk: int | None = None,
    ) -> jax.Array:
        """Returns the last hidden states ``[B, S, D]``, in the dtype of the embedding.

        Args:
          params: params of dense arrays; views under `memjax.lift`.
          tokens: int32 ``[B, S]``.
          segment_ids, positions: int32 ``[B, S]``, decoders only; see `Llama`.
          mask, token_types: ``[B, S]``, encoders only; see `Bert`.
          prefix: a soft prompt ``[P, D]``, or ``[L, P, D]`` for one per layer, such as `memjax.adapters.Prompt` makes.
          remat: such as "none", "full", "dots" or "8bit"; see `memjax.models.layers.scan_layers`.
          attention: "xla", "cudnn", or None for the best that runs; decoders also take a mask of
            `memjax.attention.masks` or a function ``(q, k) -> mask``; see `Llama`.
          mlp_chunk: tokens for which an MLP exists at a time, decoders only; see `Llama`.
        """
        own = self._inputs(segment_ids, positions, mask, token_types, mlp_chunk)
        return bind(self.config, params)(tokens, **own, prefix=prefix, remat=remat, attention=attention)

    def hiddens(
        self, params: Any, tokens: jax.Array, *, remat: Policy = "none", **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the last hidden states ``[B, S, D]`` and what every block gave, ``[L, B, S, D]``.

        Args:
          params, tokens, remat: as in `hidden`.
          **options: the other options of `hidden`.
        """
        stages = self.stages(tokens, **options)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
            x = stages.block(layer, x)
            return x, x

        x, blocks = jax.lax.scan(checkpointed(body, remat), stages.embed(params), stages.layers(params))
        return stages.finish(params, x), blocks[:, :, blocks.shape[2] - tokens.shape[1] :]

    def stages(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        prefix: jax.Array | None = None,
        attention: Attention | None = None,
        mlp_chunk: int | None = None,
    ) -> Stages:
        """Cuts the model at its blocks: for a side network, a teacher beside its student, training block by block.

        Args:
          tokens and options: as in `hidden`.
        """
        own = self._inputs(segment_ids, positions, mask, token_types, mlp_chunk)
        types = {name: own.pop(name) for name in ("token_types",) if name in own}
        module: Any = nnx.merge(*structure(module_of(self.config), self.config))
        step = module.layer(tokens, **own, attention=attention, prefix=prefix)
        graphdef = structure(llama.Block if self.kind == "causal" else bert.Block, self.config)[0]
        return Stages(
            embed=lambda params: bind(self.config, params).embed(tokens, **types, prefix=prefix),
            layers=lambda params: (params["layers"], module.layer_xs(prefix)),
            block=lambda layer, x: step(nnx.merge(graphdef, layer[0]), x, layer[1]),
            finish=lambda params, x: bind(self.config, params).finish(tokens, x),
        )

    def _inputs(self, segment_ids: Any, positions: Any, mask: Any, token_types: Any, mlp_chunk: Any) -> dict[str, Any]:
        """Returns what else than tokens the model's kind takes."""
        if self.kind == "causal":
            if mask is not None or token_types is not None:
                raise ValueError("mask and token_types are for encoders; a decoder takes segment_ids")
            return {"segment_ids": segment_ids, "positions": positions, "mlp_chunk": mlp_chunk}
        if segment_ids is not None or positions is not None or mlp_chunk is not None:
            raise ValueError("segment_ids, positions and mlp_chunk are for decoders; an encoder takes mask")
        return {"mask": mask, "token_types": token_types}

    def logits(self, params: Any, tokens: jax.Array, **options: Any) -> jax.Array:
        """Returns a decoder's float32 logits ``[B, S, V]``; arguments as in `hidden`."""
        self._require_decoder("logits")
        return bind(self.config, params).logits(self.hidden(params, tokens, **options))

    def head(self, params: Any) -> tuple[jax.Array, int]:
        """Returns a decoder's output weight and its axis of size D.

        That is ``lm_head/kernel`` ``[D, V]`` and 0, or, where tied, ``embed_tokens/embedding`` ``[V, D]`` and 1.
        """
        self._require_decoder("an output head")
        return bind(self.config, params).head()

    def first_layers(self, count: int) -> Model:
        """Returns the model cut after its first ``count`` layers, which is cheap to run in tests."""
        if not 0 < count <= self.config.num_layers:
            raise ValueError(f"count must be 1 to {self.config.num_layers}, got {count}")
        sizes: dict[str, Any] = {"num_layers": count}
        if isinstance(self.config, LlamaConfig) and self.config.window_layers is not None:
            sizes["window_layers"] = self.config.window_layers[:count]
        layers = jax.tree.map(lambda leaf: leaf[:count], self.params["layers"])
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, **sizes), params={**self.params, "layers": layers}
        )

    def _require_decoder(self, what: str) -> None:
        if self.kind != "causal":
            raise ValueError(f"{self.name or 'the model'} is an encoder and has no {what.removeprefix('an ')}")
