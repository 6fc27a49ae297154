"""Hopper kernels that take a step of Adam in one pass over memory, in the place of what was there.

A thread handles 8 neighbouring elements at a time. With 8-bit moments a warp handles a block of 256: it decodes by
tables in shared memory, moves the parameters by float32 moments that are never in memory, finds the largest moments of
the block by shuffles, and encodes by the line of the segment in which a number lies.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu
from pallas_kernels.codec import words
from pallas_kernels.codec.formats import SPAN, Form
from pallas_kernels.optim import reference
from pallas_kernels.optim.formats import TINY, dynamic_levels, segments

THREADS, BLOCK = 128, 256
FORM = Form(8, BLOCK, True)
_SELECT, _SIGN, _ROUND = 0xCA, 0x80000000, float(3 * 2**22)
_OCTAVES, _LOWEST, _SEGMENTS = 32, 96, 9
_LINES = {True: 2 * BLOCK, False: 2 * BLOCK + 2 * _OCTAVES + 4 * _SEGMENTS}
"""Signed or not -> the first word of the octaves, which the segments follow."""
_WORDS = THREADS * 6


@functools.cache
def lookup_table() -> np.ndarray:
    """Returns what the kernel with 8-bit moments keeps in shared memory, uint32 ``[_WORDS]``.

    The levels of signed and of unsigned codes; then for each of them, for every power of two from ``2**-31`` to 1, the
    threshold within that octave and the bytes from the first segment to that below the threshold, and for every segment
    its slope, start, last code from zero, and nothing.
    """
    parts: list[Any] = [dynamic_levels(8, signed) for signed in (True, False)]
    for signed in (True, False):
        lines = segments(8, signed)
        exponents = np.floor(np.log2(lines.thresholds)).astype(int)
        assert len(set(exponents)) == len(exponents) and exponents.min() > -_OCTAVES + 1
        octaves = np.zeros((_OCTAVES, 2), np.float32)
        for i, exponent in enumerate(range(-_OCTAVES + 1, 1)):
            inside = lines.thresholds[exponents == exponent]
            octaves[i, 0] = inside[0] if inside.size else np.inf
            octaves[i, 1] = np.uint32(16 * (exponents < exponent).sum()).view(np.float32)
        parts += [octaves, np.stack([*lines[1:], np.zeros_like(lines.last)], 1)]
    flat = np.concatenate([np.asarray(part, np.float32).reshape(-1) for part in parts])
    return np.pad(flat, (0, _WORDS - flat.size)).view(np.uint32)


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      units: of 8 elements that a thread reads before it handles the first.
    """

    units: int


def block_elements(config: Config) -> int:
    """Returns how many elements a block handles."""
    return THREADS * SPAN * config.units


class _Adam:
    """A thread's scalars, and its arithmetic on words."""

    def __init__(self, thread: Any, scalars: Any, seed: Any) -> None:
        self.thread = thread
        at = thread.pointer(scalars)
        self.at = reference.Scalars(*[w for i in (0, 16, 32) for w in thread.read(at, i, 4, once=False)][:9])
        self.down, self.free = (thread.ptx("xor.b32", word, _SIGN) for word in (self.at.rate, self.at.free))
        self.seed = None if seed is None else thread.read(thread.pointer(seed), 0, 2, once=False)

    def moments(self, g: Any, m: Any, v: Any) -> tuple[Any, Any]:
        ptx, at = self.thread.ptx, self.at
        m = ptx("fma.rn.f32", at.rest1, g, ptx("mul.f32", at.b1, m))
        return m, ptx("fma.rn.f32", at.rest2, ptx("mul.f32", g, g), ptx("mul.f32", at.b2, v))

    def shrunk(self, p: Any) -> Any:
        return self.thread.ptx("mul.f32", p, self.at.shrink)

    def moved(self, p: Any, m: Any, v: Any) -> Any:
        """Returns the parameter, already shrunk, after the step."""
        ptx, at = self.thread.ptx, self.at
        under = ptx("add.f32", ptx("sqrt.approx.f32", ptx("mul.f32", v, at.root)), at.eps)
        return ptx("fma.rn.f32", ptx("mul.f32", m, ptx("rcp.approx.f32", under)), self.down, p)

    def freely_moved(self, p: Any, g: Any) -> Any:
        """Returns the parameter, already shrunk, after a step by the sign of its gradient; NaN for NaN."""
        ptx = self.thread.ptx
        size = ptx("min.NaN.f32", ptx("mul.f32", self.thread.bits_and(g, 0x7FFFFFFF), 2.0**126), 1.0)
        return ptx("fma.rn.f32", ptx("lop3.b32", self.thread.const(_SIGN), g, size, _SELECT), self.free, p)


def _write(
    thread: Any, seed: list[Any] | None, dtype: str, pointer: Any, first: int, values: list[Any], counter: Any
) -> None:
    """Writes 8 parameters ``first`` elements after ``pointer``; ``counter`` is the number of their first."""
    if seed is None or dtype != "bfloat16":
        words.write_unit(thread, FORM, dtype, pointer, first, [values])
        return
    out = []
    pair = thread.shift_right(counter, 1)
    for i in range(0, SPAN, 2):
        random = _hash(thread, thread.add(pair, i // 2), seed)
        halves = (thread.bits_and(random, 0xFFFF), thread.shift_right(random, 16))
        ups = []
        for value, half in zip(values[i : i + 2], halves):
            finite = thread.ptx("set.lt.u32.u32", thread.bits_and(value, 0x7FFFFFFF), 0x7F7F0000)
            ups.append(thread.add(value, thread.ptx("and.b32", half, finite)))
        out.append(thread.ptx("prmt.b32", *ups, 0x7632))
    thread.write(pointer, first * 2, out)


def _hash(thread: Any, counter: Any, seed: list[Any]) -> Any:
    """Returns `pallas_kernels._bits.hash_bits`."""
    x = thread.xor(counter, seed[0])
    for last in (False, True):
        x = thread.ptx("mul.lo.u32", thread.xor(x, thread.shift_right(x, 16)), 0x7FEB352D)
        x = thread.ptx("mul.lo.u32", thread.xor(x, thread.shift_right(x, 15)), 0x846CA68B)
        x = thread.xor(x, thread.shift_right(x, 16))
        if not last:
            x = thread.add(x, seed[1])
    return x


def _decode(thread: Any, table: Any, codes: list[Any], scale: Any, signed: bool) -> list[Any]:
    """Returns the 8 moments that two words of codes stand for."""
    found = []
    for word in codes:
        for i in range(4):
            shifted = thread.ptx("shl.b32", word, 2) if i == 0 else thread.shift_right(word, 8 * i - 2)
            at = thread.add(table, thread.bits_and(shifted, 0x3FC))
            (level,) = thread.look_up(at, 0 if signed else 4 * BLOCK)
            found.append(thread.ptx("mul.f32", level, scale))
    return found


def _encode(thread: Any, table: Any, values: list[Any], signed: bool) -> tuple[list[Any], Any]:
    """Returns the two words of codes of 8 moments, and the scale of their block."""
    ptx = thread.ptx
    sizes = [thread.bits_and(value, 0x7FFFFFFF) for value in values] if signed else values
    largest = functools.reduce(functools.partial(ptx, "max.NaN.f32"), sizes)
    for distance in (1, 2, 4, 8, 16):
        largest = ptx("max.NaN.f32", largest, thread.shuffle(largest, distance))
    scale = ptx("max.NaN.f32", largest, TINY)
    inverse = ptx("rcp.rn.f32", scale)
    first = 4 * _LINES[signed]
    whole = []
    for value, size in zip(values, sizes):
        size = ptx("min.f32", ptx("mul.f32", size, inverse), 1.0)
        octave = ptx("max.u32", thread.bits_and(thread.shift_right(size, 20), 0xFF8), 8 * _LOWEST)
        threshold, below = thread.look_up(thread.add(table, octave), first - 8 * _LOWEST, 2)
        above = ptx("and.b32", ptx("set.ge.u32.f32", size, threshold), 16)
        line = thread.add(table, below, above)
        slope, start, last, _ = thread.look_up(line, first + 8 * _OCTAVES, 4)
        count = ptx("min.f32", ptx("fma.rn.f32", size, slope, start), last)
        if signed:
            count = ptx("lop3.b32", thread.const(_SIGN), value, count, _SELECT)
            count = ptx("max.f32", count, -127.0)
        whole.append(ptx("add.f32", count, _ROUND + (127 if signed else 0)))
    codes = []
    for k in (0, 4):
        pairs = [ptx("prmt.b32", whole[k + i], whole[k + i + 1], 0x0040) for i in (0, 2)]
        codes.append(ptx("prmt.b32", *pairs, 0x5410))
    return codes, scale


def adam8bit_block(config: Config, dtypes: tuple[str, str], stochastic: bool, thread: Any, *operands: Any) -> None:
    """The program of a thread: its part of a block of elements; ``dtypes`` are of parameters and gradients."""
    *memrefs, shared, block = operands
    p, m_codes, m_scale, v_codes, v_scale, g, scalars, levels, *rest = memrefs
    adam = _Adam(thread, scalars, rest[0] if stochastic else None)
    source = thread.pointer(levels, thread.mul(thread.index, 4))
    for i in range(_WORDS // THREADS):
        (word,) = thread.read(source, 4 * THREADS * i, once=False)
        thread.write_shared(shared, thread.add(thread.mul(thread.index, 4), 4 * THREADS * i), word)
    warp = thread.shift_right(thread.index, 5)
    params, slopes = (
        thread.pointer(ref, thread.mul(thread.index, SPAN * words.ITEMSIZE[dtype]))
        for ref, dtype in zip((p, g), dtypes)
    )
    codes = [thread.pointer(ref, thread.mul(thread.index, SPAN)) for ref in (m_codes, v_codes)]
    scales = [thread.pointer(ref, thread.mul(warp, 4)) for ref in (m_scale, v_scale)]
    elements, blocks = THREADS * SPAN, THREADS * SPAN // BLOCK
    read = []
    for i in range(config.units):
        (slope,) = words.read_unit(thread, FORM, dtypes[1], slopes, i * elements)
        (dense,) = words.read_unit(thread, FORM, dtypes[0], params, i * elements, changes=True)
        held = [thread.read(pointer, i * elements, 2, changes=True) for pointer in codes]
        sizes = [thread.read(pointer, 4 * i * blocks, changes=True)[0] for pointer in scales]
        read.append((slope, dense, held, sizes))
    thread.barrier()
    table = thread.table(shared)
    leads = thread.ptx("set.eq.u32.u32", thread.lane, 0)
    counter = thread.add(thread.mul(block, elements * config.units), thread.mul(thread.index, SPAN))
    for i, (slope, dense, held, sizes) in enumerate(read):
        old = [_decode(thread, table, held[k], sizes[k], k == 0) for k in (0, 1)]
        gradients = words.floats(thread, dtypes[1], slope)
        new = [adam.moments(*parts) for parts in zip(gradients, *old)]
        values = [
            adam.moved(adam.shrunk(value), *moments)
            for value, moments in zip(words.floats(thread, dtypes[0], dense), new)
        ]
        _write(thread, adam.seed, dtypes[0], params, i * elements, values, thread.add(counter, i * elements))
        for k, moments in enumerate(zip(*new)):
            made, scale = _encode(thread, table, list(moments), k == 0)
            thread.write(codes[k], i * elements, made)
            thread.write(scales[k], 4 * i * blocks, [scale], leads)


def adam8bit_step(
    p: jax.Array,
    g: jax.Array,
    m_codes: jax.Array,
    m_scale: jax.Array,
    v_codes: jax.Array,
    v_scale: jax.Array,
    scalars: jax.Array,
    seed: jax.Array | None,
    *,
    config: Config,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns (p, m_codes, m_scale, v_codes, v_scale) in the memory of what was given.

    Args:
      p, g, m_codes, m_scale, v_codes, v_scale: as in `reference.adam8bit_step`, in blocks of 256; a multiple of
        `block_elements`.
      scalars: of `reference.adam_scalars`.
      seed: uint32 ``[2]``, or None to round to nearest.
      config: how to cut the work.
      interpret: run in the interpreter on a CPU.
    """
    count = block_elements(config)
    blocks = p.size // count
    states = [part.reshape(blocks, -1) for part in (p, m_codes, m_scale, v_codes, v_scale)]
    dtypes = (p.dtype.name, g.dtype.name)
    fixed = [scalars, jnp.asarray(lookup_table()), *([] if seed is None else [seed])]

    def body(*refs: Any) -> None:
        *ins, shared = refs
        held, (slope, *rest) = ins[:5], ins[5:]
        block = lax.axis_index("block")
        tiles = [ref.at[block] for ref in held]
        if interpret:
            p_tile, m_tile, m_scales, v_tile, v_scales = (tile[...] for tile in tiles)
            read = None if seed is None else tuple(rest[2][:2])
            levels = lax.bitcast_convert_type(rest[1][: 2 * BLOCK], jnp.float32)
            made = reference.adam8bit_step(
                p_tile,
                slope[block],
                m_tile,
                m_scales,
                v_tile,
                v_scales,
                rest[0][...],
                read,
                block * count,
                (levels[:BLOCK], levels[BLOCK:]),
            )
            for tile, part in zip(tiles, made):
                tile[...] = part
        else:
            program = functools.partial(adam8bit_block, config, dtypes, seed is not None)
            _mgpu.each_thread(program, [*tiles, slope.at[block], *rest, shared], [block])

    refs = [jax.new_ref(part) for part in states]
    plgpu.kernel(
        body,
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=(plgpu.SMEM((_WORDS,), jnp.uint32),),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*refs, g.reshape(blocks, count), *fixed)
    return tuple(jax.freeze(ref).reshape(-1) for ref in refs)


def frugal_adam_block(
    config: Config, dtypes: tuple[str, str], stochastic: bool, run: int, kept: int, thread: Any, *operands: Any
) -> None:
    """The program of a thread: its part of a block of elements.

    ``run`` elements share a place; the last words are the number of the block's first element in the whole leaf, the
    run in which it lies, and where in it.
    """
    *memrefs, number, first_run, within = operands
    p, mu, nu, g, place, scalars, *rest = memrefs
    adam = _Adam(thread, scalars, rest[0] if stochastic else None)
    ptx = thread.ptx
    params, slopes = (
        thread.pointer(ref, thread.mul(thread.index, SPAN * words.ITEMSIZE[dtype]))
        for ref, dtype in zip((p, g), dtypes)
    )
    elements = THREADS * SPAN
    spread = run < elements * config.units  # the threads of a block have elements of several runs
    read = []
    for i in range(config.units):
        inside = thread.add(thread.mul(thread.index, SPAN), i * elements)
        where = first_run
        if spread:
            where = thread.add(where, thread.shift_right(inside, run.bit_length() - 1))
            inside = thread.bits_and(inside, run - 1)
        else:
            inside = thread.add(inside, within)
        (held_at,) = thread.read(thread.pointer(place, thread.mul(where, 4)), 0, once=False)
        held = ptx("set.lt.u32.u32", held_at, kept)
        start = thread.add(ptx("mul.lo.u32", held_at, run), inside)
        moments = [thread.advance(thread.pointer(ref), start, 4) for ref in (mu, nu)]
        (slope,) = words.read_unit(thread, FORM, dtypes[1], slopes, i * elements)
        (dense,) = words.read_unit(thread, FORM, dtypes[0], params, i * elements, changes=True)
        old = [
            [w for at in (0, 16) for w in thread.read(pointer, at, 4, changes=True, where=held)] for pointer in moments
        ]
        read.append((slope, dense, held, moments, old))
    counter = thread.add(number, thread.mul(thread.index, SPAN))
    for i, (slope, dense, held, moments, old) in enumerate(read):
        values, new = [], []
        for g_word, p_word, m, v in zip(
            words.floats(thread, dtypes[1], slope), words.floats(thread, dtypes[0], dense), *old
        ):
            made = adam.moments(g_word, m, v)
            shrunk = adam.shrunk(p_word)
            moved, free = adam.moved(shrunk, *made), adam.freely_moved(shrunk, g_word)
            values.append(ptx("lop3.b32", held, moved, free, _SELECT))
            new.append(made)
        _write(thread, adam.seed, dtypes[0], params, i * elements, values, thread.add(counter, i * elements))
        for pointer, moment in zip(moments, zip(*new)):
            for at in (0, 4):
                thread.write(pointer, 4 * at, list(moment[at : at + 4]), held)


def frugal_adam_step(
    p: jax.Array,
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    place: jax.Array,
    scalars: jax.Array,
    seed: jax.Array | None,
    *,
    config: Config,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (p, mu, nu) in the memory of what was given.

    Args:
      p, g, mu, nu, place: as in `reference.frugal_adam_step`.
      scalars: of `reference.adam_scalars`.
      seed: uint32 ``[2]``, or None to round to nearest.
      config: how to cut the work: `block_elements` divide a run, or are whole runs and divide their row.
      interpret: run in the interpreter on a CPU, a row of runs at a time.
    """
    outer, runs, run = p.shape
    kept, count = mu.shape[1], block_elements(config)
    row = runs * run
    pieces = 1 if interpret else row // count
    dtypes = (p.dtype.name, g.dtype.name)
    states = [p.reshape(outer, pieces, -1), mu.reshape(outer, -1), nu.reshape(outer, -1)]
    fixed = [g.reshape(outer, pieces, -1), place, scalars, *([] if seed is None else [seed])]

    def body(*refs: Any) -> None:
        p_ref, mu_ref, nu_ref, g_ref, place_ref, scalars_ref, *seeds = refs
        i, piece = lax.axis_index("outer"), lax.axis_index("piece")
        number = i * row + piece * (row // pieces)
        tiles = [p_ref.at[i, piece], mu_ref.at[i], nu_ref.at[i]]
        if interpret:
            parts = [tile[...].reshape(1, -1, run) for tile in tiles]
            read = None if seed is None else tuple(seeds[0][:2])
            made = reference.frugal_adam_step(
                parts[0],
                g_ref[i, piece].reshape(1, -1, run),
                parts[1],
                parts[2],
                place_ref[i][None],
                scalars_ref[...],
                read,
                number,
            )
            for tile, part in zip(tiles, made):
                tile[...] = part.reshape(-1)
            return
        if run % count == 0:
            per_run = jnp.int32(run // count)
            first_run, within = lax.div(piece, per_run), lax.rem(piece, per_run) * count
        else:
            first_run, within = piece * (count // run), jnp.int32(0)
        program = functools.partial(frugal_adam_block, config, dtypes, seed is not None, run, kept)
        others = [g_ref.at[i, piece], place_ref.at[i], scalars_ref, *seeds]
        _mgpu.each_thread(program, [*tiles, *others], [number, first_run, within])

    refs = [jax.new_ref(part) for part in states]
    plgpu.kernel(
        body,
        grid=(outer, pieces),
        grid_names=("outer", "piece"),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*refs, *fixed)
    made = [jax.freeze(ref) for ref in refs]
    return made[0].reshape(p.shape), made[1].reshape(mu.shape), made[2].reshape(nu.shape)


def add_stochastic_block(config: Config, dtype: str, thread: Any, *operands: Any) -> None:
    """The program of a thread: its part of a block of bfloat16 parameters and of updates of ``dtype``."""
    p, u, seed, block = operands
    at = thread.mul(thread.index, SPAN)
    params = thread.pointer(p, thread.mul(at, 2))
    updates = thread.pointer(u, thread.mul(at, words.ITEMSIZE[dtype]))
    held = thread.read(thread.pointer(seed), 0, 2, once=False)
    elements = THREADS * SPAN
    read = [
        (
            words.read_unit(thread, FORM, "bfloat16", params, i * elements, changes=True)[0],
            words.read_unit(thread, FORM, dtype, updates, i * elements)[0],
        )
        for i in range(config.units)
    ]
    counter = thread.add(thread.mul(block, elements * config.units), at)
    for i, (dense, update) in enumerate(read):
        pairs = zip(words.floats(thread, "bfloat16", dense), words.floats(thread, dtype, update))
        values = [thread.ptx("add.f32", a, b) for a, b in pairs]
        _write(thread, held, "bfloat16", params, i * elements, values, thread.add(counter, i * elements))


def add_stochastic(
    p: jax.Array, u: jax.Array, seed: jax.Array, *, config: Config, interpret: bool = False
) -> jax.Array:
    """Returns bfloat16 ``p + u``, rounded stochastically, in the memory of ``p``.

    Args:
      p: bfloat16 ``[n]``; n is a multiple of `block_elements`.
      u: bfloat16 or float32 ``[n]``.
      seed: uint32 ``[2]``.
      config: how to cut the work.
      interpret: run in the interpreter on a CPU.
    """
    count = block_elements(config)
    blocks = p.size // count

    def body(p_ref: Any, u_ref: Any, seed_ref: Any) -> None:
        block = lax.axis_index("block")
        tile = p_ref.at[block]
        if interpret:
            total = tile[...].astype(jnp.float32) + u_ref[block].astype(jnp.float32)
            tile[...] = reference.round_stochastic(total, (seed_ref[0], seed_ref[1]), block * count)
        else:
            program = functools.partial(add_stochastic_block, config, u.dtype.name)
            _mgpu.each_thread(program, [tile, u_ref.at[block], seed_ref], [block])

    ref = jax.new_ref(p.reshape(blocks, count))
    plgpu.kernel(
        body,
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(ref, u.reshape(blocks, count), seed)
    return jax.freeze(ref).reshape(-1)
