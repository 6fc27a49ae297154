"""Hopper kernels that encode and decode an array of groups in one pass over memory.

Groups follow each other in memory and never share a byte, so an array is a row of units, which go round the threads.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu
from pallas_kernels.codec import reference, words
from pallas_kernels.codec.formats import Codes, Form

THREADS = 128


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      units: units that a thread reads before it handles the first.
    """

    units: int


def block_elements(form: Form, config: Config) -> int:
    """Returns how many elements a block handles, of which an array's size must be a multiple."""
    return THREADS * form.unit * config.units


def encode_block(form: Form, config: Config, dtype: str, stochastic: bool, thread: Any, x: Any, *rest: Any) -> None:
    """The program of a thread that encodes its part of a block."""
    *memrefs, block = rest
    seed = memrefs.pop(0) if stochastic else None
    where = words.place(thread, form, thread.index)
    source = thread.pointer(x, thread.mul(where.element, words.ITEMSIZE[dtype]))
    elements = THREADS * form.unit
    units = [words.read_unit(thread, form, dtype, source, i * elements) for i in range(config.units)]
    seed_words: Any = thread.read(thread.pointer(seed), 0, 2, once=False) if stochastic else None
    counter = thread.add(thread.mul(block, elements * config.units), where.element)
    targets = words.code_pointers(thread, where, memrefs)
    for i, unit in enumerate(units):
        noise = words.Noise(seed_words, thread.add(counter, i * elements)) if stochastic else None
        made, found = words.encode_unit(thread, form, dtype, unit, noise)
        words.write_codes(thread, form, where, targets, i * THREADS, made, found)


def decode_block(form: Form, config: Config, dtype: str, thread: Any, *memrefs: Any) -> None:
    """The program of a thread that decodes its part of a block."""
    *packed, out = memrefs
    where = words.place(thread, form, thread.index)
    sources = words.code_pointers(thread, where, packed)
    target = thread.pointer(out, thread.mul(where.element, words.ITEMSIZE[dtype]))
    read = [words.read_codes(thread, form, sources, i * THREADS) for i in range(config.units)]
    for i, (codes, found) in enumerate(read):
        spans = words.decode_unit(thread, form, codes, found)
        words.write_unit(thread, form, dtype, target, i * THREADS * form.unit, spans)


def encode(
    x: jax.Array,
    seed: jax.Array | None,
    *,
    form: Form,
    config: Config,
    interpret: bool = False,
) -> Codes:
    """Returns the codes of groups of consecutive elements, all of them ``[n]``.

    Args:
      x: bfloat16, float16 or float32 ``[n]``; n is a multiple of `block_elements`.
      seed: uint32 ``[2]`` for stochastic rounding, or None.
      form: the format.
      config: how to cut the work.
      interpret: run in the interpreter on a CPU.
    """
    count = block_elements(form, config)
    blocks = x.size // count
    sizes = [count * form.bits // 8, *([count // form.group] * (1 if form.symmetric else 2))]

    def body(x_ref: Any, *rest: Any) -> None:
        block = lax.axis_index("block")
        seeds, outs = (list(rest[:1]), rest[1:]) if seed is not None else ([], rest)
        tiles = [ref.at[block] for ref in outs]
        if interpret:
            words_read = tuple(seeds[0][...]) if seeds else None
            made = reference.encode(x_ref[block], words_read, form, block * count)
            for tile, part in zip(tiles, made):
                tile[...] = part
        else:
            program = functools.partial(encode_block, form, config, x.dtype.name, seed is not None)
            _mgpu.each_thread(program, [x_ref.at[block], *seeds, *tiles], [block])

    made = plgpu.kernel(
        body,
        out_type=tuple(
            jax.ShapeDtypeStruct((blocks, size), dtype)
            for size, dtype in zip(sizes, (jnp.uint8, jnp.uint16, jnp.uint16))
        ),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(x.reshape(blocks, count), *([] if seed is None else [seed]))
    return Codes(*(part.reshape(-1) for part in made))


def decode(made: Codes, *, form: Form, dtype: Any, config: Config, interpret: bool = False) -> jax.Array:
    """Returns the array ``[n]`` in ``dtype``; the other arguments are as `encode` takes and returns them."""
    count = block_elements(form, config)
    blocks = made.scale.size * form.group // count
    operands = [part.reshape(blocks, -1) for part in made if part is not None]
    name = jnp.dtype(dtype).name

    def body(*refs: Any) -> None:
        block = lax.axis_index("block")
        tiles = [ref.at[block] for ref in refs]
        if interpret:
            parts = [tile[...] for tile in tiles[:-1]]
            tiles[-1][...] = reference.decode(Codes(*parts), form, dtype)
        else:
            _mgpu.each_thread(functools.partial(decode_block, form, config, name), tiles)

    dense = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((blocks, count), dtype),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*operands)
    return dense.reshape(-1)
