"""What the model families share: linear and embedding modules, attention dispatch, and the scan over layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from memjax import attention as sparse
from memjax.adapters import prepend
from memjax.core import packing
from memjax.remat import Policy, Remat, checkpoint, parse, tiled
from memjax.weights.adapted import fold_keys

Implementation = Literal["xla", "cudnn"]
Attention = Implementation | sparse.Mask | Callable[[jax.Array, jax.Array], sparse.Mask]
"""What computes attention, or which keys a query sees: a mask, or a policy ``(q, k) -> mask`` that finds it anew in
every layer."""

_INIT = nnx.initializers.normal(0.02)


class Stages(NamedTuple):
    """A model cut into pure functions, for loops over its blocks other than the model's own.

    ``hidden = finish(params, x)`` where x starts as ``embed(params)`` and goes through ``x = block(layer, x)`` for
    every slice ``layer`` of ``layers(params)``, as in `jax.lax.scan`.

    Attributes:
      embed: params -> ``x [B, P + S, D]``, with P prompt positions in front.
      layers: params -> pytree of arrays ``[L, ...]``: the blocks' params and what else tells them apart.
      block: (slice of ``layers``, x) -> x.
      finish: (params, x) -> last hidden states ``[B, S, D]`` of the tokens.
    """

    embed: Callable[[Any], jax.Array]
    layers: Callable[[Any], Any]
    block: Callable[[Any, jax.Array], jax.Array]
    finish: Callable[[Any, jax.Array], jax.Array]


class Source(NamedTuple):
    """Where a leaf of a model's params comes from in a checkpoint.

    Attributes:
      name: tensor name; ``{}`` stands for the layer number of a leaf that is stacked over layers.
      transpose: the file holds ``[out, in]`` and the leaf ``[in, out]``.
      rotary_heads: the file holds the output rows of that many heads with rotary pairs adjacent (0: it does not).
    """

    name: str
    transpose: bool = False
    rotary_heads: int = 0


def require_sizes(config: Any, *names: str) -> None:
    """Raises ValueError unless the named fields of ``config`` are positive integers."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


class Linear(nnx.Module):
    """``x @ kernel (+ bias)`` in the dtype of ``x``."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_INIT(rngs.params(), (inputs, outputs)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        y = y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y
        return checkpoint_name(y, "linear_out")


class Embedding(nnx.Module):
    """A table ``embedding`` of shape ``[count, features]``, looked up by integer arrays."""

    def __init__(self, count: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_INIT(rngs.params(), (count, features)))

    def __call__(self, indices: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], indices, axis=0, mode="clip")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    mask: jax.Array | None = None,
    window: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Softmax attention through `jax.nn.dot_product_attention`.

    Args:
      q: ``[B, S, H, Dh]``.
      k, v: ``[B, T, Hk, Dh]``; H is a multiple of Hk.
      causal: position i attends to positions up to i.
      mask: bool, broadcastable to ``[B, H, S, T]``; True takes part.
      window: with ``causal``, position i attends to the last ``window`` positions up to i only.
      implementation: None takes cuDNN on a GPU for 16-bit inputs (with a mask only for even S and T, as its backward
        pass needs) and XLA elsewhere.

    Returns:
      ``[B, S, H * Dh]`` in the dtype of ``q``.
    """
    if implementation is None:
        fast = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
        even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
        implementation = "cudnn" if fast and (mask is None or even) else "xla"
    elif implementation not in ("xla", "cudnn"):
        raise ValueError(f"attention must be 'xla', 'cudnn' or None, got {implementation!r}")
    if mask is not None and implementation == "cudnn":  # which takes a mask as a bias of every query
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation,
        )

    if implementation == "cudnn":
        out = join_heads(attention, q.shape[2])(q, k, v, mask)
    else:
        out = attention(q, k, v, mask).reshape(*q.shape[:2], -1)
    return checkpoint_name(out, "attn_out")


def attend_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    shown: sparse.Mask | sparse.BlockMask,
    implementation: Literal["xla"] | None = None,
) -> jax.Array:
    """Softmax attention through `memjax.attention.attend`, over the blocks that a mask leaves.

    Args:
      q: ``[B, S, H, Dh]``.
      k, v: ``[B, T, Hk, Dh]``.
      shown: a mask, or its lists such as `memjax.attention.block_lists` makes.
      implementation: None for the best that runs.

    Returns:
      ``[B, S, H * Dh]`` in the dtype of ``q``.
    """

    name = "mask" if isinstance(shown, sparse.Mask) else "block_mask"

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, shown: Any) -> jax.Array:
        return sparse.attend(q, k, v, implementation=implementation, **{name: shown})

    return checkpoint_name(join_heads(attention, q.shape[2])(q, k, v, shown), "attn_out")


def again_if_packed(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns ``fn``, which keeps nothing but its arguments where `memjax.remat` packs residuals.

    For attention this is a matter of accuracy: a kernel's backward pass recovers the weights of a row from q, k and the
    log-sum-exp; if these are decoded from codes, such weights do not sum to one, and the gradient is off by an
    exponential of the codes' error. Computed again from the decoded q and k they do.
    """
    return jax.checkpoint(fn, prevent_cse=False) if packing.value else fn


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Joined:
    """``[B, S, H * Dh]`` in place of ``[B, S, H, Dh]``."""

    array: jax.Array


def join_heads(attention: Callable[..., jax.Array], heads: int) -> Callable[..., jax.Array]:
    """Returns ``attention`` with its result as ``[B, S, H * Dh]``, which reverse mode then keeps once.

    A kernel keeps its result for its backward pass, the product that follows keeps the reshaped one, and a scan over
    layers stacks both. Here the kernel's backward pass is given the reshaped one.

    Args:
      attention: ``(q, k, v, ...) -> [B, S, H, Dh]``.
      heads: H.
    """

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, -1)

    def is_joined(x: Any) -> bool:
        return isinstance(x, _Joined)

    @jax.custom_vjp
    def joined(*args: Any) -> jax.Array:
        out = attention(*args)
        return out.reshape(*out.shape[:2], -1)

    def forward(*args: Any) -> tuple[jax.Array, Any]:
        out, back = jax.vjp(attention, *args)
        y = out.reshape(*out.shape[:2], -1)
        return y, jax.tree.map(lambda leaf: _Joined(y) if leaf is out else leaf, back)

    def backward(back: Any, dy: jax.Array) -> Any:
        back = jax.tree.map(lambda leaf: split(leaf.array) if is_joined(leaf) else leaf, back, is_leaf=is_joined)
        return back(split(dy))

    joined.defvjp(forward, backward)
    return joined


def in_chunks(f: Callable[[Any, jax.Array], jax.Array], modules: Any, x: jax.Array, chunk: int | None) -> jax.Array:
    """Returns ``f(modules, x)``, computed and differentiated for some tokens at a time.

    Args:
      f: treats tokens alike and apart; its result has the shape of ``x``.
      modules: pytree of NNX modules.
      x: ``[B, S, D]``.
      chunk: tokens at a time, whose words for dropout differ; None, or B * S and more: all at once.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"mlp_chunk={chunk} must be at least 1")
    tokens = x.shape[0] * x.shape[1]
    if chunk is None or chunk >= tokens:
        return f(modules, x)
    graphdef, state = nnx.split(modules)

    def run(state: Any, x: jax.Array, number: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda weight: fold_keys(weight, number[0]), state)
        return f(nnx.merge(graphdef, own), x)

    # Checkpointed as a whole too, so that `x` is kept as it came in, by the name it has, and not the parts cut from it.
    pieces = jax.checkpoint(tiled(run, 0, -(-tokens // chunk)), prevent_cse=False)
    return pieces(state, x.reshape(tokens, -1), jnp.arange(tokens, dtype=jnp.uint32)).reshape(x.shape)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> Any:
    """Returns one module whose params are those of ``num_layers`` modules, stacked along a leading axis."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make))(rngs)


def scan_layers(
    layers: nnx.Module, call: Callable[..., Any], carry: Any, xs: Any = None, *, remat: Policy = "none"
) -> Any:
    """Runs stacked layers one after another by `jax.lax.scan`.

    Args:
      layers: a module made by `stack_layers`.
      call: ``call(layer, carry, x) -> carry`` where x is the layer's slice of ``xs``.
      carry: what flows from layer to layer.
      xs: pytree of arrays ``[L, ...]``, or None.
      remat: what backward finds kept of a layer and what it computes again: a policy of `memjax.remat.checkpoint`, or
        a name that `memjax.remat.parse` knows, such as "none", "full" (keeps the carry), "linear" (and what linear
        layers give), "8bit" and "full-8bit". The carry is named "block_input", what linear layers give "linear_out",
        and what attention takes and gives "q", "k", "v" and "attn_out".

    Returns:
      The last carry.
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Any, layer: Any) -> tuple[Any, None]:
        state, x = layer
        return call(nnx.merge(graphdef, state), carry, x), None

    return jax.lax.scan(checkpointed(body, remat), carry, (state, xs))[0]


def checkpointed(body: Callable[..., Any], remat: Policy) -> Callable[..., Any]:
    """Returns the body of a scan, (carry, layer) -> (carry, y), with its remat policy; see `scan_layers`."""

    def named(carry: Any, layer: Any) -> Any:
        return body(jax.tree.map(lambda x: checkpoint_name(x, "block_input"), carry), layer)

    if parse(remat) == Remat():
        return body
    return checkpoint(named, remat, params=(1,), prevent_cse=False, seed=seed_of)


def seed_of(carry: Any, layer: Any) -> jax.Array:
    """Returns bits that differ between steps and layers, for stochastic rounding: of the first hidden state."""
    x = jax.tree.leaves(carry)[0]
    first = jax.lax.stop_gradient(x[(0,) * (x.ndim - 1)]).astype(jnp.float32)
    return jnp.sum(jax.lax.bitcast_convert_type(first, jnp.uint32), dtype=jnp.uint32)


def with_prefix(prefix: jax.Array | None, x: jax.Array) -> jax.Array:
    """Puts ``prefix [P, D]``, or the first of ``[L, P, D]``, before every sequence of ``x [B, S, D]``."""
    return x if prefix is None else prepend(prefix[0] if prefix.ndim == 3 else prefix, x)


def replace_prefix(prefix: jax.Array | None, x: jax.Array) -> jax.Array:
    """Returns ``x [B, P + S, D]`` with a layer's own ``prefix [P, D]`` in front, where it has one."""
    return x if prefix is None else prepend(prefix, x[:, prefix.shape[0] :])


def prefix_length(prefix: jax.Array | None, num_layers: int, features: int) -> int:
    """Returns the number of prompt positions.

    Raises:
      ValueError: a prefix that is neither ``[P, D]`` nor ``[L, P, D]``.
    """
    if prefix is None:
        return 0
    if prefix.ndim not in (2, 3) or prefix.shape[-1] != features or (prefix.ndim == 3 and len(prefix) != num_layers):
        raise ValueError(
            f"prefix must be [positions, {features}], or [{num_layers}, positions, {features}] for one per layer, got "
            f"shape {prefix.shape}"
        )
    return prefix.shape[-2]


@functools.lru_cache(maxsize=64)
def structure(module: Callable[..., nnx.Module], config: Any) -> tuple[Any, Any]:
    """Returns the graph definition of ``module(config, rngs=...)`` and its params as `jax.ShapeDtypeStruct`."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)
