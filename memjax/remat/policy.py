"""`ResidualPolicy`: how each array that reverse mode keeps is stored."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any, Literal

from memjax.codecs import Codec, fp8, int2, int3, int4, int6, int8
from memjax.remat.residuals import Residual

Bits = Literal[2, 3, 4, 6, 8, "fp8", 32]
Choice = Bits | Codec | None

_INTEGER = {2: int2, 3: int3, 4: int4, 6: int6, 8: int8}
_LEAST_GROUP = 32


@dataclasses.dataclass(frozen=True)
class ResidualPolicy:
    """How `compress_residuals` stores what reverse mode keeps.

    Every array that is encoded has a 16-bit scale and offset for each group of consecutive elements of its last
    axis: ``bits / 8 + 4 / group`` bytes per element (``1 + 2 / group`` for "fp8"). Weights and what follows from
    weights alone are never encoded, masks take one bit per element, and integers, random keys, statistics and other
    small arrays are kept as they are.

    Attributes:
      bits: 8, 6, 4, 3, 2, "fp8", or 32 to keep arrays as they are, so that gradients are exact. The relative
        error of the gradients of one random transformer block is 0.008 at 8 bits, 0.13 at 4 and 0.7 at 2; with
        stochastic rounding 0.011, 0.19 and 1.05, which falls with the number of steps that are averaged.
      group: elements per scale; where it does not divide the last axis (of the local shard), its largest divisor
        from 32 on that fills whole bytes does; an array without one is kept as it is.
      rounding: "nearest" has the smaller error; "stochastic" makes the expectation of every stored element its
        own value (see ``seed`` of `compress_residuals`).
      inputs: arguments of the function, other than its params, that are encoded where reverse mode keeps them: argument
        numbers, or patterns of paths that start with the number, such as ``"0/hidden"`` or ``"**"``. Others are kept
        by reference, which is free where the caller holds them anyway, but under a scan over layers is a stack of
        the carry in full.
      input_bits: ``bits`` of these inputs.
      min_size: arrays of fewer elements are kept as they are.
      min_share: arrays of a smaller share of all that reverse mode keeps, in bytes, are kept as they are: these are
        row statistics such as the log-sum-exp of attention, in which errors are amplified.
      keep: patterns of names (`report` prints them) of arrays to keep as they are.
      per_leaf: ``bits`` or a codec for single arrays: a mapping from patterns of names, the first that matches counts,
        or a function of a `Residual`, with None for what the other fields say.
      offload: "pinned_host" moves what is stored, where at least ``min_size``, to host memory until backward.

    Raises:
      ValueError: an unknown value; 1 bit, at which gradients of anything but masks are noise.
    """

    bits: Bits = 4
    group: int = 128
    rounding: Literal["nearest", "stochastic"] = "nearest"
    inputs: Any = ()
    input_bits: Bits = 8
    min_size: int = 4096
    min_share: float = 1 / 256
    keep: Any = ()
    per_leaf: Any = None
    offload: Literal["pinned_host"] | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "keep"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, int | str) else tuple(value))
        if isinstance(self.per_leaf, Mapping):
            object.__setattr__(self, "per_leaf", tuple(self.per_leaf.items()))
        check_bits("bits", self.bits)
        check_bits("input_bits", self.input_bits)
        for pattern, choice in self.per_leaf if isinstance(self.per_leaf, tuple) else ():
            check_choice(f"per_leaf[{pattern!r}]", choice)
        if not isinstance(self.group, int) or self.group < _LEAST_GROUP or self.group % 8:
            raise ValueError(f"group must be a multiple of 8 from {_LEAST_GROUP} on, got {self.group!r}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {self.rounding!r}")
        if self.offload not in (None, "pinned_host"):
            raise ValueError(f"offload must be None or 'pinned_host', got {self.offload!r}")
        for pattern in self.inputs:
            if not isinstance(pattern, int | str):
                raise ValueError(f"inputs must be argument numbers and patterns of paths, got {pattern!r}")

    @property
    def packs(self) -> bool:
        """Whether any array may be stored as codes."""
        return self.bits != 32 or self.per_leaf is not None or bool(self.inputs and self.input_bits != 32)

    def codec(self, residual: Residual, total_bytes: int) -> Codec | None:
        """Returns the codec of an activation, or None to keep it as it is.

        Args:
          residual: the array.
          total_bytes: bytes of all that reverse mode keeps.
        """
        if any(fnmatch.fnmatchcase(residual.name, pattern) for pattern in self.keep):
            return None
        choice = self._choice(residual)
        if choice is None:
            if residual.size < self.min_size or residual.nbytes < self.min_share * total_bytes:
                return None
            choice = self.input_bits if residual.is_input else self.bits
        if isinstance(choice, Codec) or choice == 32:
            return choice if isinstance(choice, Codec) else None
        group = fitting_group(residual.local_size, self.group)
        if group is None:
            return None
        return fp8(group) if choice == "fp8" else _INTEGER[choice](group, symmetric=False)

    def _choice(self, residual: Residual) -> Choice:
        if isinstance(self.per_leaf, tuple):
            matches = (c for pattern, c in self.per_leaf if fnmatch.fnmatchcase(residual.name, pattern))
            return next(matches, None)
        choice = None if self.per_leaf is None else self.per_leaf(residual)
        check_choice(f"per_leaf({residual.name})", choice)
        return choice

    @property
    def _patterns(self) -> list[str]:
        return [*self.keep, *(p for p, _ in (self.per_leaf if isinstance(self.per_leaf, tuple) else ()))]

    @property
    def has_patterns(self) -> bool:
        """Whether names of arrays matter."""
        return bool(self._patterns)

    def check_names(self, names: list[str]) -> None:
        """Raises ValueError where a pattern of ``keep`` or ``per_leaf`` matches none of the names."""
        for pattern in self._patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"pattern {pattern!r} matches no residual; they are: {', '.join(names)}")


def check_bits(name: str, bits: Any) -> None:
    """Raises ValueError unless ``bits`` is one that `ResidualPolicy` takes."""
    if bits == 1:
        raise ValueError(f"{name}=1: a gradient from 1-bit activations is noise; masks take 1 bit by themselves")
    if isinstance(bits, bool) or bits not in (*_INTEGER, "fp8", 32):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, _INTEGER))}, 'fp8' or 32, got {bits!r}")


def check_choice(name: str, choice: Any) -> None:
    if choice is not None and not isinstance(choice, Codec):
        check_bits(name, choice)


def fitting_group(size: int, group: int) -> int | None:
    """Returns the largest group up to ``group`` that divides ``size`` and fills bytes, None if none has 32 elements."""
    fitting = (g for g in range(min(group, size), _LEAST_GROUP - 1, -1) if size % g == 0 and g % 8 == 0)
    return next(fitting, None)
