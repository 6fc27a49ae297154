"""What methods share that train a low-rank part of the weight itself and freeze the residual."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from memjax import codecs
from memjax.adapters.adapter import Adapter, Constants, Theta, path_seed
from memjax.adapters.lora import Lora, check_rank, lora
from memjax.adapters.matrices import matrix_of, per_matrix
from memjax.codecs import Codec
from memjax.core.paths import leaf_paths
from memjax.core.views import WeightView
from memjax.weights import Adapted, Anchored, Dense, LowRank, PackedWeight


@dataclass(frozen=True)
class Decomposed(Adapter):
    """W = R + s A B: A and B start as a decomposition of W gives them and are trained, R is frozen.

    Trains ``r (d_in + d_out)`` numbers per matrix, and keeps as many constants: the start, from which R is made again
    when the adapter is loaded, and which makes `as_lora` possible.
    """

    rank: int | Mapping[str, int]
    alpha: float | Mapping[str, float] | None
    targets: str | Sequence[str]
    dropout: float
    scaling: str
    axes: Mapping[str, Any]
    dtype: Any
    residual: str | Codec

    anchored = True

    @abc.abstractmethod
    def decompose(self, w: jax.Array, rank: int, scale: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the factors ``a [d_in, r]`` and ``b [r, d_out]`` that a matrix starts from.

        Args:
          w: ``[d_in, d_out]``, float32 or wider.
          rank, scale: r and s of this matrix.
          key: random key.
        """

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns the factors of the decomposition, twice: as what is trained and as what stays.

        Returns:
          Logical path -> ``{"a": [*batch, *inputs, r], "b": [*batch, r, *outputs]}``, and the same as ``a0``, ``b0``.

        Raises:
          ValueError: a pattern that matches nothing, a rank above the matrix's, a scale that is not positive.
        """
        theta: Theta = {}
        constants: Constants = {}
        plain = self._lora()
        for weight in plain.weights(params):
            path, rank = weight.path, plain._rank(weight.path)
            check_rank(path, rank, weight.d_in, weight.d_out)
            scale = plain.scale(path, rank)
            if scale <= 0:
                raise ValueError(f"{path}: expected a positive alpha, got a scale of {scale}")

            def factors(view: WeightView, key: jax.Array, rank: int = rank, scale: float = scale) -> Any:
                return self.decompose(matrix_of(view), rank, scale, key)

            keys = jax.random.split(jax.random.fold_in(key, path_seed(path)), weight.batch)
            a, b = per_matrix(factors, self._as_view(path, weight.leaf), keys)
            a = a.reshape(*weight.batch, *weight.inputs, rank).astype(self.dtype)
            b = b.reshape(*weight.batch, rank, *weight.outputs).astype(self.dtype)
            theta[path], constants[path] = {"a": a, "b": b}, {"a0": a, "b0": b}
        return theta, constants

    def rebase(self, path: str, base: WeightView, constants: dict[str, jax.Array]) -> WeightView:
        a, b = constants["a0"], constants["b0"]
        return _less(path, base, LowRank(a, b, self._lora().scale(path, a.shape[-1])), self.residual)

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        return self._lora().view(path, base, factors, {}, key)

    def settings(self) -> dict[str, Any]:
        residual = self.residual
        if isinstance(residual, Codec):
            fields = dataclasses.fields(residual)  # type: ignore[arg-type]
            found = {"codec": type(residual).__name__} | {f.name: getattr(residual, f.name) for f in fields}
            return super(Decomposed, replace(self, residual="same")).settings() | {"residual": found}
        return super().settings()

    def as_lora(self, frozen: Any, theta: Theta) -> tuple[Lora, Theta]:
        """Returns a LoRA of twice the rank that adds to the original weights what this adapter has learned.

        W - R = s A0 B0, so the change of W is s (A B - A0 B0). Exact on a dense base but for rounding; a packed base
        differs from R + s A0 B0 by the error of packing R.

        Args:
          frozen: the tree of `prepare`, which holds A0 and B0.
          theta: trained factors.

        Returns:
          (adapter, theta) to attach to the params that `prepare` was given.

        Raises:
          ValueError: a path of ``theta`` that was not prepared by this method.
        """
        anchors = {path: leaf for path, leaf in leaf_paths(frozen) if isinstance(leaf, Anchored)}
        both: Theta = {}
        ranks, alphas = {}, {}
        for path, factors in theta.items():
            if path not in anchors or anchors[path].method != self.method:
                raise ValueError(f"{path}: not prepared for {self.method}; give the tree that prepare returned")
            start, rank = anchors[path].constants, factors["a"].shape[-1]
            outputs = len(anchors[path].axes.outputs)
            both[path] = {
                "a": jnp.concatenate([factors["a"], start["a0"]], axis=-1),
                "b": jnp.concatenate([factors["b"], -start["b0"]], axis=-1 - outputs),
            }
            ranks[path], alphas[path] = 2 * rank, 2 * rank * self._lora().scale(path, rank)
        return lora(ranks, alphas, targets=list(theta), axes=self.axes, dtype=self.dtype), both

    def _lora(self) -> Lora:
        return lora(
            self.rank,
            self.alpha,
            targets=self.targets,
            dropout=self.dropout,
            scaling=self.scaling,
            axes=self.axes,
            dtype=self.dtype,
        )


def residual_format(residual: Any) -> str | Codec:
    """Returns the ``residual=`` argument of a factory as what `Decomposed` holds.

    Args:
      residual: ``"same"``, ``"dense"``, a codec, or what `Decomposed.settings` makes of a codec.

    Raises:
      ValueError: anything else.
    """
    if isinstance(residual, Codec) or residual in ("same", "dense"):
        return residual
    if not isinstance(residual, Mapping) or "codec" not in residual:
        raise ValueError(f"residual must be 'same', 'dense' or a codec, got {residual!r}")
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in residual.items()}
    return getattr(codecs, str(fields.pop("codec")))(**fields)


def _less(path: str, base: WeightView, part: LowRank, to: str | Codec) -> WeightView:
    """Returns ``base - part`` in the format ``to``, made one matrix of a stack at a time."""
    if isinstance(base, Adapted):
        return replace(base, base=_less(path, base.base, part, to))
    if not isinstance(base, Dense | PackedWeight):
        raise ValueError(f"{path}: expected a dense or packed weight to split, got {type(base).__name__}")

    def residual(view: Any, a: jax.Array, b: jax.Array) -> Any:
        wide = view.astype(jnp.promote_types(view.dtype, jnp.float32))
        rest = wide.materialize() - LowRank(a, b, part.scale).materialize(view.axes)
        if isinstance(to, Codec):
            return PackedWeight(to.encode(rest, view.axes.inputs).astype(view.dtype), view.axes)
        if to == "same" and isinstance(view, PackedWeight):
            packed = view.packed
            return replace(view, packed=packed.codec.encode(rest, packed.axes).astype(packed.dtype))
        return Dense(rest.astype(view.dtype), view.axes)

    return per_matrix(residual, base, part.a, part.b)
