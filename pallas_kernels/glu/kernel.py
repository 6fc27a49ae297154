"""Hopper kernels for SwiGLU: one pass over memory forward, with the codes of both inputs, and one backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu
from pallas_kernels.codec import words
from pallas_kernels.codec.formats import Codes, Form
from pallas_kernels.codec.kernel import THREADS, Config, block_elements
from pallas_kernels.glu import reference

DTYPE = "bfloat16"


def _sigmoid(thread: Any, x: Any) -> Any:
    power = thread.ptx("ex2.approx.f32", thread.ptx("mul.f32", x, -math.log2(math.e)))
    return thread.ptx("rcp.approx.f32", thread.ptx("add.f32", power, 1.0))


def forward_block(form: Form, config: Config, thread: Any, *memrefs: Any) -> None:
    """The program of a thread: its part of a block of the product and of both codes."""
    count = len(memrefs[3:]) // 2
    gate, up, out, *packed = memrefs
    where = words.place(thread, form, thread.index)
    sources = [thread.pointer(ref, thread.mul(where.element, 2)) for ref in (gate, up)]
    target = thread.pointer(out, thread.mul(where.element, 2))
    outs = [words.code_pointers(thread, where, packed[:count]), words.code_pointers(thread, where, packed[count:])]
    step = THREADS * form.unit
    read = [[words.read_unit(thread, form, DTYPE, p, i * step) for p in sources] for i in range(config.units)]
    for i, pair in enumerate(read):
        values = [[words.floats(thread, DTYPE, span) for span in spans] for spans in pair]
        product = []
        for a_span, b_span in zip(*values):
            gated = [thread.ptx("mul.f32", a, _sigmoid(thread, a)) for a in a_span]
            product.append([thread.ptx("mul.f32", a, b) for a, b in zip(gated, b_span)])
        words.write_unit(thread, form, DTYPE, target, i * step, product)
        for spans, pointers in zip(pair, outs):
            made, found = words.encode_unit(thread, form, DTYPE, spans, None)
            words.write_codes(thread, form, where, pointers, i * THREADS, made, found)


def of_codes_block(form: Form, config: Config, thread: Any, *memrefs: Any) -> None:
    """The program of a thread: its part of a block of the product of decoded inputs."""
    *packed, out = memrefs
    half = len(packed) // 2
    where = words.place(thread, form, thread.index)
    sources = [words.code_pointers(thread, where, packed[:half]), words.code_pointers(thread, where, packed[half:])]
    target = thread.pointer(out, thread.mul(where.element, 2))
    units = range(config.units)
    read = [[words.read_codes(thread, form, pointers, i * THREADS) for pointers in sources] for i in units]
    for i, codes in enumerate(read):
        gates, ups = (words.decode_unit(thread, form, *part) for part in codes)
        product = [
            [thread.ptx("mul.f32", thread.ptx("mul.f32", a, _sigmoid(thread, a)), b) for a, b in zip(*spans)]
            for spans in zip(gates, ups)
        ]
        words.write_unit(thread, form, DTYPE, target, i * THREADS * form.unit, product)


def backward_block(form: Form, config: Config, thread: Any, *memrefs: Any) -> None:
    """The program of a thread: its part of a block of both gradients."""
    count = len(memrefs[1:-2]) // 2
    slope, packed, outs = memrefs[0], memrefs[1:-2], memrefs[-2:]
    where = words.place(thread, form, thread.index)
    source = thread.pointer(slope, thread.mul(where.element, 2))
    sources = [words.code_pointers(thread, where, packed[:count]), words.code_pointers(thread, where, packed[count:])]
    targets = [thread.pointer(ref, thread.mul(where.element, 2)) for ref in outs]
    step = THREADS * form.unit
    read = [
        (
            words.read_unit(thread, form, DTYPE, source, i * step),
            [words.read_codes(thread, form, pointers, i * THREADS) for pointers in sources],
        )
        for i in range(config.units)
    ]
    ptx = thread.ptx
    for i, (spans, codes) in enumerate(read):
        gates, ups = (words.decode_unit(thread, form, *part) for part in codes)
        d_gate: list[list[Any]] = [[] for _ in spans]
        d_up: list[list[Any]] = [[] for _ in spans]
        for j, span in enumerate(spans):
            for a, b, d in zip(gates[j], ups[j], words.floats(thread, DTYPE, span)):
                sigmoid = _sigmoid(thread, a)
                gated = ptx("mul.f32", a, sigmoid)
                d_up[j].append(ptx("mul.f32", d, gated))
                # sigmoid * (1 + a * (1 - sigmoid)) = sigmoid + gated * (1 - sigmoid)
                rest = ptx("fma.rn.f32", gated, ptx("sub.f32", 1.0, sigmoid), sigmoid)
                d_gate[j].append(ptx("mul.f32", ptx("mul.f32", d, b), rest))
        for target, part in zip(targets, (d_gate, d_up)):
            words.write_unit(thread, form, DTYPE, target, i * step, part)


def _code_types(blocks: int, count: int, form: Form) -> list[jax.ShapeDtypeStruct]:
    groups = jax.ShapeDtypeStruct((blocks, count // form.group), jnp.uint16)
    codes = jax.ShapeDtypeStruct((blocks, count * form.bits // 8), jnp.uint8)
    return [codes, groups] if form.symmetric else [codes, groups, groups]


def _pair(parts: Any) -> tuple[Codes, Codes]:
    """Returns the codes of gate and up of the arrays of both."""
    half = len(parts) // 2
    return Codes(*parts[:half]), Codes(*parts[half:])


def _by_blocks(
    program: Callable[..., None], plain: Callable[..., Any], operands: Any, results: Any, interpret: bool
) -> list[jax.Array]:
    """Returns what is made block by block, ``[n]`` each.

    Args:
      program: of a thread, of the parts of operands and results.
      plain: the same by `jax.numpy`, of a block of every operand; for the interpreter.
      operands: ``[blocks, n]`` each.
      results: types of ``[blocks, n]`` each.
      interpret: run in the interpreter on a CPU.
    """

    def body(*refs: Any) -> None:
        tiles = [ref.at[lax.axis_index("block")] for ref in refs]
        if interpret:
            made = plain(*(tile[...] for tile in tiles[: len(operands)]))
            for tile, part in zip(tiles[len(operands) :], jax.tree.leaves(made)):
                tile[...] = part
        else:
            _mgpu.each_thread(program, tiles)

    made = plgpu.kernel(
        body,
        out_type=tuple(results),
        grid=(operands[0].shape[0],),
        grid_names=("block",),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*operands)
    return [part.reshape(-1) for part in made]


def forward(
    gate: jax.Array, up: jax.Array, *, form: Form, config: Config, interpret: bool = False
) -> tuple[jax.Array, Codes, Codes]:
    """Returns ``silu(gate) * up`` and the codes of both, all of them ``[n]``.

    Args:
      gate: bfloat16 ``[n]``, n a multiple of `pallas_kernels.codec.kernel.block_elements`.
      up: the same.
      form: the format.
      config: how to cut the work.
      interpret: run in the interpreter on a CPU.
    """
    count = block_elements(form, config)
    blocks = gate.size // count
    packed = _code_types(blocks, count, form)
    out, *parts = _by_blocks(
        functools.partial(forward_block, form, config),
        functools.partial(reference.forward, form=form),
        [gate.reshape(blocks, count), up.reshape(blocks, count)],
        [jax.ShapeDtypeStruct((blocks, count), gate.dtype), *packed, *packed],
        interpret,
    )
    return out, *_pair(parts)


def of_codes(gate: Codes, up: Codes, *, size: int, form: Form, config: Config, interpret: bool = False) -> jax.Array:
    """Returns the product of what codes stand for, bfloat16 ``[size]``; codes and the rest as in `forward`."""
    count = block_elements(form, config)
    blocks = size // count
    (out,) = _by_blocks(
        functools.partial(of_codes_block, form, config),
        lambda *parts: reference.of_codes(*_pair(parts), form, jnp.dtype(DTYPE)),
        [part.reshape(blocks, -1) for part in jax.tree.leaves((gate, up))],
        [jax.ShapeDtypeStruct((blocks, count), jnp.dtype(DTYPE))],
        interpret,
    )
    return out


def backward(
    dh: jax.Array, gate: Codes, up: Codes, *, form: Form, config: Config, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of gate and up, bfloat16 ``[n]``; the arguments are `forward`'s and what it returns."""
    count = block_elements(form, config)
    blocks = dh.size // count
    d_gate, d_up = _by_blocks(
        functools.partial(backward_block, form, config),
        lambda dh, *parts: reference.backward(dh, *_pair(parts), form),
        [part.reshape(blocks, -1) for part in (dh, *jax.tree.leaves((gate, up)))],
        [jax.ShapeDtypeStruct((blocks, count), dh.dtype)] * 2,
        interpret,
    )
    return d_gate, d_up
