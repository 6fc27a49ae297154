"""Integers known to lie in a range, and truths known in part: a mask's rule on these classifies blocks."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np


def numpy_like(*values: Any) -> ModuleType:
    """Returns `jax.numpy` if one of the values is a jax array, else `numpy`."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _bounds(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Interval):
        return value.lo, value.hi
    if isinstance(value, bool | np.bool_) or not np.issubdtype(getattr(value, "dtype", type(value)), np.integer):
        raise TypeError(f"expected integers beside an interval, got {value!r}")
    return value, value


def _divisor(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"a mask may divide by positive constants alone, got {value!r}")
    return int(value)


@dataclasses.dataclass(frozen=True, eq=False)
class Interval:
    """Integers of which each lies in ``[lo, hi]``, bounds included; arithmetic gives bounds of the results.

    Attributes:
      lo, hi: integers, or integer arrays that broadcast.
    """

    lo: Any
    hi: Any

    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Any) -> Interval:
        lo, hi = _bounds(other)
        return Interval(self.lo + lo, self.hi + hi)

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __sub__(self, other: Any) -> Interval:
        lo, hi = _bounds(other)
        return Interval(self.lo - hi, self.hi - lo)

    def __rsub__(self, other: Any) -> Interval:
        return -self + other

    def __mul__(self, other: Any) -> Interval:
        ends = [a * b for a in (self.lo, self.hi) for b in _bounds(other)]
        xp = numpy_like(*ends)
        return Interval(
            xp.minimum(xp.minimum(ends[0], ends[1]), xp.minimum(ends[2], ends[3])),
            xp.maximum(xp.maximum(ends[0], ends[1]), xp.maximum(ends[2], ends[3])),
        )

    __radd__ = __add__
    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Interval:
        divisor = _divisor(other)
        return Interval(self.lo // divisor, self.hi // divisor)

    def __mod__(self, other: Any) -> Interval:
        divisor = _divisor(other)
        one = self.lo // divisor == self.hi // divisor
        xp = numpy_like(one)
        return Interval(xp.where(one, self.lo % divisor, 0), xp.where(one, self.hi % divisor, divisor - 1))

    def __abs__(self) -> Interval:
        xp = numpy_like(self.lo, self.hi)
        return Interval(xp.maximum(xp.maximum(self.lo, -self.hi), 0), xp.maximum(-self.lo, self.hi))

    def __le__(self, other: Any) -> Truth:
        lo, hi = _bounds(other)
        return Truth(self.hi <= lo, self.lo <= hi)

    def __lt__(self, other: Any) -> Truth:
        lo, hi = _bounds(other)
        return Truth(self.hi < lo, self.lo < hi)

    def __ge__(self, other: Any) -> Truth:
        lo, hi = _bounds(other)
        return Truth(self.lo >= hi, self.hi >= lo)

    def __gt__(self, other: Any) -> Truth:
        lo, hi = _bounds(other)
        return Truth(self.lo > hi, self.hi > lo)

    def __eq__(self, other: Any) -> Truth:  # type: ignore[override]
        lo, hi = _bounds(other)
        return Truth((self.lo == hi) & (self.hi == lo), (self.lo <= hi) & (lo <= self.hi))

    def __ne__(self, other: Any) -> Truth:  # type: ignore[override]
        return ~(self == other)

    def __bool__(self) -> NoReturn:
        raise TypeError("an interval is neither true nor false: compare it, and join comparisons by & | ~ ^")


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """What is known of a condition over a block.

    Attributes:
      sure: bool, or bool arrays: true of every element.
      maybe: bool, or bool arrays: not known to be false of every element. Holds where ``sure`` does.
    """

    sure: Any
    maybe: Any

    __array_ufunc__ = None

    def __and__(self, other: Any) -> Truth:
        other = as_truth(other)
        return Truth(self.sure & other.sure, self.maybe & other.maybe)

    def __or__(self, other: Any) -> Truth:
        other = as_truth(other)
        return Truth(self.sure | other.sure, self.maybe | other.maybe)

    def __xor__(self, other: Any) -> Truth:
        other = as_truth(other)
        return (self & ~other) | (~self & other)

    __rand__ = __and__
    __ror__ = __or__
    __rxor__ = __xor__

    def __invert__(self) -> Truth:
        xp = numpy_like(self.sure, self.maybe)
        return Truth(xp.logical_not(self.maybe), xp.logical_not(self.sure))

    def __bool__(self) -> NoReturn:
        raise TypeError("a condition over a block may be undecided: join conditions by & | ~ ^, not by and, or, not")


def as_truth(value: Any) -> Truth:
    """Returns a condition as what is known of it."""
    if isinstance(value, Truth):
        return value
    if not isinstance(value, bool) and getattr(value, "dtype", None) != np.bool_:
        raise TypeError(f"expected a condition, got {value!r}")
    return Truth(value, value)
