"""Encoding and decoding of groups as the program of one thread: what it holds are 32-bit words.

A thread's unit is 8 elements from each of the ``8 / bits`` parts of a group whose codes share bytes, so that it makes 8
whole bytes; neighbouring lanes hold the rest of the group. Only the least and the greatest element travel between
lanes. All that the functions here ask of ``thread`` is `pallas_kernels._mgpu.Thread`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pallas_kernels.codec.formats import SPAN, Form

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
_PACKED = {"bfloat16": "bf16x2", "float16": "f16x2"}
_ROUND = float(3 * 2**22)  # added to a small float32 number, leaves its nearest integer in the lowest bits
_SELECT, _SIGN = 0xCA, 0x80000000


class Place(NamedTuple):
    """Where a thread's unit lies among the units that follow each other in memory.

    Attributes:
      element: number of its first element, a word.
      unit: number of the unit, a word.
      group: number of its group, a word.
      leads: a word that is not zero in one lane of a group.
    """

    element: Any
    unit: Any
    group: Any
    leads: Any


def place(thread: Any, form: Form, index: Any) -> Place:
    """Returns the place of unit ``index``, a word; that of the lane's neighbour must be the next."""
    shift = form.lanes.bit_length() - 1
    group = thread.shift_right(index, shift) if shift else index
    within = thread.bits_and(index, form.lanes - 1)
    element = thread.add(thread.mul(group, form.group), thread.mul(within, SPAN))
    leads = thread.ptx("set.eq.u32.u32", within, 0)
    return Place(element, index, group, leads)


def read_unit(thread: Any, form: Form, dtype: str, pointer: Any, first: int, **how: Any) -> list[list[Any]]:
    """Returns the words of a unit's spans.

    Args:
      thread: the thread.
      form: the format.
      dtype: of the elements.
      pointer: address of the thread's first element.
      first: elements from there to the unit.
      how: see `pallas_kernels._mgpu.Thread.read`.
    """
    size = ITEMSIZE[dtype]
    spans = []
    for j in range(form.spans):
        start = (first + j * form.group // form.spans) * size
        spans.append([w for k in range(SPAN * size // 16) for w in thread.read(pointer, start + 16 * k, 4, **how)])
    return spans


def write_unit(thread: Any, form: Form, dtype: str, pointer: Any, first: int, spans: list[list[Any]]) -> None:
    """Writes a unit's spans of float32 words as ``dtype``; arguments as in `read_unit`."""
    size = ITEMSIZE[dtype]
    for j, span in enumerate(spans):
        start = (first + j * form.group // form.spans) * size
        words = pack_floats(thread, dtype, span)
        for k in range(0, len(words), 4):
            thread.write(pointer, start + 4 * k, words[k : k + 4])


def pack_floats(thread: Any, dtype: str, floats: list[Any]) -> list[Any]:
    """Returns float32 words as words of ``dtype``."""
    if dtype == "float32":
        return floats
    return [thread.ptx(f"cvt.rn.{_PACKED[dtype]}.f32", high, low) for low, high in zip(floats[::2], floats[1::2])]


def floats(thread: Any, dtype: str, words: list[Any]) -> list[Any]:
    """Returns the float32 words of words of ``dtype``."""
    if dtype == "float32":
        return words
    if dtype == "float16":
        return [thread.widen(word, half) for word in words for half in (0, 1)]
    return [
        part for word in words for part in (thread.ptx("shl.b32", word, 16), thread.ptx("and.b32", word, 0xFFFF0000))
    ]


def _tree(thread: Any, code: str, words: list[Any]) -> Any:
    while len(words) > 1:
        pairs = [thread.ptx(code, a, b) for a, b in zip(words[::2], words[1::2])]
        words = pairs + words[len(words) // 2 * 2 :]
    return words[0]


def _across(thread: Any, code: str, word: Any, lanes: int) -> Any:
    distance = 1
    while distance < lanes:
        word = thread.ptx(code, word, thread.shuffle(word, distance))
        distance *= 2
    return word


def sum_lanes(thread: Any, word: Any, lanes: int = 32) -> Any:
    """Returns the float32 sum over neighbouring lanes."""
    return _across(thread, "add.f32", word, lanes)


def extremes(thread: Any, form: Form, dtype: str, spans: list[list[Any]]) -> tuple[Any, Any]:
    """Returns the least and the greatest element of the unit's group, float32; NaN if there is one."""
    words = [word for span in spans for word in span]
    if dtype == "float32":
        return tuple(
            _across(thread, f"{kind}.NaN.f32", _tree(thread, f"{kind}.NaN.f32", words), form.lanes)
            for kind in ("min", "max")
        )
    least = f"min.NaN.{_PACKED[dtype]}"
    low, high = _tree(thread, least, words), _tree(thread, f"max.NaN.{_PACKED[dtype]}", words)
    negated = thread.ptx("xor.b32", high, 0x80008000)
    both = thread.ptx(least, thread.ptx("prmt.b32", low, negated, 0x5410), thread.ptx("prmt.b32", low, negated, 0x7632))
    low, negated = floats(thread, dtype, [_across(thread, least, both, form.lanes)])
    return low, thread.ptx("xor.b32", negated, _SIGN)


class Range(NamedTuple):
    """A group's scale and offset: float32 words, and bit patterns in the low halves of words."""

    scale: Any
    scale_bits: Any
    offset: Any
    offset_bits: Any


def _step(thread: Any, step: Any) -> tuple[Any, Any]:
    """Returns (float32, bits) of a step rounded up to bfloat16 where it is not exact; 1 where it is zero."""
    bits = thread.bits_and(thread.ptx("mul.f32", step, 1 - 2**-20), 0x7FFFFFFF)
    bits = thread.shift_right(thread.add(thread.ptx("min.u32", bits, 0x7FC00000), 0xFFFF), 16)
    return _or_one(thread, bits, bits)


def _or_one(thread: Any, bits: Any, size: Any) -> tuple[Any, Any]:
    zero = thread.ptx("set.eq.u32.u32", size, 0)
    bits = thread.ptx("lop3.b32", zero, 0x3F80, bits, _SELECT)
    return thread.ptx("shl.b32", bits, 16), bits


def find_range(thread: Any, form: Form, low: Any, high: Any, stochastic: bool) -> Range:
    """Returns the scale and offset of groups that reach from ``low`` to ``high``."""
    half = 2 ** (form.bits - 1)
    if not form.symmetric:
        carry = thread.ptx("and.b32", thread.ptx("shr.s32", low, 31), 0xFFFF)
        offset_bits = thread.shift_right(thread.add(low, carry), 16)
        offset = thread.ptx("shl.b32", offset_bits, 16)
        span = thread.ptx("sub.f32", high, offset)
        return Range(*_step(thread, thread.ptx("mul.f32", span, 1 / (2**form.bits - 1))), offset, offset_bits)
    below = thread.ptx("xor.b32", low, _SIGN)
    if stochastic:
        return Range(
            *_step(thread, thread.ptx("mul.f32", thread.ptx("max.NaN.f32", high, below), 1 / (half - 1))), None, None
        )
    mask = thread.ptx("set.gt.u32.f32", below, high)
    largest = thread.ptx("mul.f32", thread.ptx("lop3.b32", mask, low, high, _SELECT), -1 / half)
    bits = thread.ptx("cvt.rn.bf16x2.f32", 0.0, largest)
    return Range(*_or_one(thread, bits, thread.bits_and(bits, 0x7FFF)), None, None)


class Noise(NamedTuple):
    """Random bits of a unit.

    Attributes:
      words: the two words of the seed.
      counter: of the unit's first element, a multiple of 8.
    """

    words: tuple[Any, Any]
    counter: Any


def _random(thread: Any, words: tuple[Any, Any], counter: Any) -> list[Any]:
    """Returns 24 random bits for each element of a span, those of `pallas_kernels._bits.uniform`."""
    ptx = thread.ptx
    first = thread.xor(counter, words[0])
    first = thread.xor(first, thread.shift_right(first, 16))  # alike for 8 counters, up to their lowest 3 bits
    found = []
    for i in range(SPAN):
        x = ptx("mul.lo.u32", thread.xor(first, i) if i else first, 0x7FEB352D)
        x = ptx("mul.lo.u32", thread.xor(x, thread.shift_right(x, 15)), 0x846CA68B)
        x = thread.add(thread.xor(x, thread.shift_right(x, 16)), words[1])
        x = ptx("mul.lo.u32", thread.xor(x, thread.shift_right(x, 16)), 0x7FEB352D)
        x = ptx("mul.lo.u32", thread.xor(x, thread.shift_right(x, 15)), 0x846CA68B)
        found.append(thread.shift_right(thread.xor(x, thread.shift_right(x, 16)), 8))
    return found


def make_codes(thread: Any, form: Form, values: list[list[Any]], found: Range, noise: Noise | None) -> list[Any]:
    """Returns the two words of a unit's codes.

    Args:
      thread: the thread.
      form: the format.
      values: float32 words of the spans.
      found: scale and offset of the group.
      noise: random bits for stochastic rounding, or None.
    """
    ptx = thread.ptx
    half = 2 ** (form.bits - 1)
    least, most = (-half, half - 1) if form.symmetric else (0, 2**form.bits - 1)
    inverse = ptx("rcp.rn.f32", found.scale)
    shift = half if form.symmetric and form.bits < 8 else 0
    joined: list[Any] = []
    for j, span in enumerate(values):
        whole = []
        if noise is not None:
            start = thread.add(noise.counter, j * form.group // form.spans)
            random = _random(thread, noise.words, start)
        for i, value in enumerate(span):
            if found.offset is not None:
                value = ptx("sub.f32", value, found.offset)
            value = ptx("mul.f32", value, inverse)
            if form.symmetric or noise is not None:
                value = ptx("min.f32", value, float(most))
            if noise is None:
                if form.symmetric:
                    value = ptx("max.f32", value, float(least))
                whole.append(ptx("add.f32", value, _ROUND + shift))
            else:  # the fraction in 24 bits, rounded up; the random number below it carries over
                fixed = ptx("cvt.rpi.s32.f32" if form.symmetric else "cvt.rpi.u32.f32", ptx("mul.f32", value, 2.0**24))
                whole.append(ptx("sub.u32", thread.add(fixed, (shift << 24) + 0xFFFFFF), random[i]))
        pick = 0x0040 if noise is None else 0x0073
        words = []
        for k in (0, 4):
            pairs = [ptx("prmt.b32", whole[k + m], whole[k + m + 1], pick) for m in (0, 2)]
            words.append(ptx("prmt.b32", *pairs, 0x5410))
        if not joined:
            joined = words
        else:
            joined = [ptx("mad.lo.u32", word, 1 << (j * form.bits), low) for word, low in zip(words, joined)]
    return joined


def code_pointers(thread: Any, where: Place, memrefs: Sequence[Any]) -> list[Any]:
    """Returns the addresses of a unit's codes and of its group's scale and, of three ``memrefs``, offset."""
    sizes = [thread.mul(where.unit, 8), *[thread.mul(where.group, 2)] * (len(memrefs) - 1)]
    return [thread.pointer(ref, size) for ref, size in zip(memrefs, sizes)]


def write_codes(
    thread: Any, form: Form, where: Place, pointers: list[Any], units: int, codes: list[Any], found: Range
) -> None:
    """Writes a unit's codes, scale and offset.

    Args:
      thread: the thread.
      form: the format.
      where: the place of the unit at ``pointers``.
      pointers: of `code_pointers`.
      units: from there to the unit, a multiple of a group's lanes.
      codes: the two words.
      found: the range.
    """
    thread.write(pointers[0], units * 8, codes)
    for pointer, bits in zip(pointers[1:], (found.scale_bits, found.offset_bits)):
        thread.write_half(pointer, units // form.lanes * 2, bits, where.leads)


def read_codes(thread: Any, form: Form, pointers: list[Any], units: int) -> tuple[list[Any], Range]:
    """Reads the two words of a unit's codes and its group's range; arguments as in `write_codes`."""
    codes = thread.read(pointers[0], units * 8, 2)
    halves = [thread.read_half(pointer, units // form.lanes * 2) for pointer in pointers[1:]]
    values = [thread.ptx("shl.b32", half, 16) for half in halves]
    return codes, Range(values[0], None, values[1] if len(values) > 1 else None, None)


def decode_unit(thread: Any, form: Form, words: list[Any], found: Range) -> list[list[Any]]:
    """Returns the float32 words of the spans that the two words of a unit's codes stand for."""
    ptx = thread.ptx
    half = 2 ** (form.bits - 1) if form.symmetric else 0
    magic = thread.const(0x4B000000)  # with a byte below it, the float32 number 2**23 + byte
    spans = []
    for j in range(form.spans):
        span = []
        for word in words:
            if form.bits < 8:
                word = thread.shift_right(word, j * form.bits) if j else word
                word = ptx("and.b32", word, (2**form.bits - 1) * 0x01010101)
            elif form.symmetric:
                word = ptx("xor.b32", word, 0x80808080)
            for i in range(4):
                value = ptx("sub.f32", ptx("prmt.b32", word, magic, 0x7440 | i), float(2**23 + half))
                if found.offset is None:
                    span.append(ptx("mul.f32", value, found.scale))
                else:
                    span.append(ptx("fma.rn.f32", value, found.scale, found.offset))
        spans.append(span)
    return spans


def encode_unit(
    thread: Any, form: Form, dtype: str, spans: list[list[Any]], noise: Noise | None
) -> tuple[list[Any], Range]:
    """Returns the two words of codes of a unit whose elements are words of ``dtype``, and its group's range."""
    low, high = extremes(thread, form, dtype, spans)
    found = find_range(thread, form, low, high, noise is not None)
    values = [floats(thread, dtype, span) for span in spans]
    return make_codes(thread, form, values, found, noise), found
