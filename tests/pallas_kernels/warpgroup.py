"""Runs the program of a kernel's thread for 128 lanes at once, with numpy in the place of a GPU.

The words of `pallas_kernels._mgpu.Thread` become arrays of one uint32 per lane, and its PTX is interpreted, instruction
by instruction. Reading memory that was not given or not written, and code that is not understood, are errors.
"""

import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from pallas_kernels._mgpu import Thread

LANES = np.arange(128, dtype=np.uint32)
U32, I32, F32 = np.uint32, np.int32, np.float32


def _f(x):
    return np.ascontiguousarray(x, U32).view(F32)


def _u(x):
    return np.ascontiguousarray(x, F32).view(U32)


def _halves(dtype, x):
    return np.ascontiguousarray(x, U32).view(np.uint16).view(dtype).reshape(-1, 2)


def _prmt(a, b, selector):
    source = (np.asarray(b, np.uint64) << np.uint64(32)) | np.asarray(a, np.uint64)
    out = np.zeros(128, np.uint64)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(0xF)
        assert (nibble < 8).all()
        byte = (source >> (nibble.astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        out |= byte << np.uint64(8 * i)
    return out.astype(U32)


def _lop3(a, b, c, table):
    out = np.zeros(128, U32)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _narrow(dtype):
    def convert(high, low):
        with np.errstate(over="ignore"):
            parts = [_f(x).astype(dtype).view(np.uint16).astype(U32) for x in (high, low)]
        return parts[0] << U32(16) | parts[1]

    return convert


def _fixed(dtype):
    def convert(x):
        limits = np.iinfo(dtype)
        return np.clip(np.nan_to_num(np.ceil(_f(x).astype(np.float64))), limits.min, limits.max).astype(dtype).view(U32)

    return convert


def _packed(dtype, choose):
    return lambda a, b: choose(_halves(dtype, a), _halves(dtype, b)).view(np.uint16).reshape(-1).view(U32)


def _fma(a, b, c):
    return _u((_f(a).astype(np.longdouble) * _f(b) + _f(c)).astype(F32))


def _flag(x):
    return np.where(x, U32(0xFFFFFFFF), U32(0))


BF16, F16 = ml_dtypes.bfloat16, np.float16
INSTRUCTIONS = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.s32": lambda a, b: (a.view(I32) >> b.view(I32)).view(U32),
    "sub.u32": lambda a, b: a - b,
    "min.u32": np.minimum,
    "max.u32": np.maximum,
    "mul.lo.u32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(U32),
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "set.eq.u32.u32": lambda a, b: _flag(a == b),
    "set.lt.u32.u32": lambda a, b: _flag(a < b),
    "set.ge.u32.f32": lambda a, b: _flag(_f(a) >= _f(b)),
    "set.gt.u32.f32": lambda a, b: _flag(_f(a) > _f(b)),
    "add.f32": lambda a, b: _u(_f(a) + _f(b)),
    "sub.f32": lambda a, b: _u(_f(a) - _f(b)),
    "mul.f32": lambda a, b: _u(_f(a) * _f(b)),
    "fma.rn.f32": _fma,
    "min.f32": lambda a, b: _u(np.fmin(_f(a), _f(b))),
    "max.f32": lambda a, b: _u(np.fmax(_f(a), _f(b))),
    "min.NaN.f32": lambda a, b: _u(np.minimum(_f(a), _f(b))),
    "max.NaN.f32": lambda a, b: _u(np.maximum(_f(a), _f(b))),
    "min.NaN.bf16x2": _packed(BF16, np.minimum),
    "max.NaN.bf16x2": _packed(BF16, np.maximum),
    "min.NaN.f16x2": _packed(F16, np.minimum),
    "max.NaN.f16x2": _packed(F16, np.maximum),
    "rcp.rn.f32": lambda a: _u(F32(1) / _f(a)),
    "rcp.approx.f32": lambda a: _u(F32(1) / _f(a)),
    "sqrt.approx.f32": lambda a: _u(np.sqrt(_f(a))),
    "rsqrt.approx.f32": lambda a: _u(F32(1) / np.sqrt(_f(a))),
    "ex2.approx.f32": lambda a: _u(np.exp2(_f(a))),
    "cvt.rn.bf16x2.f32": _narrow(BF16),
    "cvt.rn.f16x2.f32": _narrow(F16),
    "cvt.rpi.s32.f32": _fixed(I32),
    "cvt.rpi.u32.f32": _fixed(U32),
}


class Warpgroup(Thread):
    """128 threads: words are uint32 ``[128]``, pointers uint64 ``[128]`` and memrefs numpy arrays."""

    def __init__(self):
        self.memory = {}
        integer = SimpleNamespace(get_signless=lambda width: {32: U32, 64: np.uint64}[width])
        arith = SimpleNamespace(
            addi=lambda a, b: a + b,
            muli=lambda a, b: a * b,
            xori=lambda a, b: a ^ b,
            andi=lambda a, b: a & b,
            shrui=lambda a, b: a >> b,
            remui=lambda a, b: a % b,
            extui=lambda dtype, a: a.astype(dtype),
        )
        llvm = SimpleNamespace(
            inline_asm=lambda kind, operands, code, constraints, **_: self.run(
                code, operands, 0 if kind is None else 1
            ),
            ptrtoint=lambda dtype, pointer: np.full(128, pointer >> (0 if dtype == np.uint64 else 24)).astype(dtype),
        )
        utils = SimpleNamespace(
            c=lambda value, dtype: np.full(128, value, dtype),
            thread_idx=lambda: LANES,
            memref_ptr=self._place,
            inline_ptx=self._inline,
            warpgroup_barrier=lambda: None,
        )
        self._bind(SimpleNamespace(IntegerType=integer), arith, llvm, utils)

    def _place(self, memref):
        """Returns the address of an array: its number, then 24 bits for a byte of shared memory, 40 in all."""
        assert memref.flags.c_contiguous
        for number, held in self.memory.items():
            if held is memref:
                return number << 40
        self.memory[len(self.memory) + 1] = memref
        return len(self.memory) << 40

    def _inline(self, code, *operands, result_types, **_):
        several = isinstance(result_types, list)
        found = self.run(code, operands, len(result_types) if several else 1)
        return [found] if several and len(result_types) == 1 else found

    def loop(self, count, step, carry):
        for i in range(int(count[0])):
            carry = step(self.const(i), carry)
        return carry

    def _bytes(self, address, space, size):
        """Returns where ``size`` bytes lie, as (array of bytes, indices [128, size])."""
        shift = 40 if space == "global" else 16
        numbers = np.unique(address >> address.dtype.type(shift))
        assert len(numbers) == 1
        memref = self.memory[int(numbers[0])].reshape(-1).view(np.uint8)
        start = (address & address.dtype.type((1 << shift) - 1)).astype(np.int64)
        assert (start % size == 0).all(), "unaligned"
        index = start[:, None] + np.arange(size)
        assert index.min() >= 0 and index.max() < memref.size, "out of bounds"
        return memref, index

    def run(self, code, operands, results):
        registers = {f"${i + results}": operand for i, operand in enumerate(operands)}

        def value(name):
            name = name.strip()
            if name.startswith("0f"):
                return np.full(128, int(name[2:], 16), U32)
            if name[0].isdigit():
                return np.full(128, int(name, 0), U32)
            return registers[name]

        for statement in code.strip().removeprefix("{").removesuffix("}").split(";"):
            statement = statement.strip()
            if not statement or statement.startswith(".reg"):
                continue
            chosen = np.ones(128, bool)
            if statement.startswith("@"):
                predicate, statement = statement[1:].split(None, 1)
                chosen = registers[predicate]
            name, rest = statement.split(None, 1)
            names = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
            if name.startswith(("ld.", "st.")):
                space, size = name.split(".")[1], int(name.rsplit(".b", 1)[1]) // 8
                place = next(part for part in names if part.startswith("["))[1:-1].split("+")
                (part,) = (part for part in names if not part.startswith("["))
                parts = [p.strip() for p in part.strip("{}").split(",")]
                address = registers[place[0].strip()]
                address = address + address.dtype.type(int(place[1]) if len(place) > 1 else 0)
                if not chosen.any():
                    registers |= {p: np.full(128, 0xDEAD, U32) for p in parts if name.startswith("ld.")}
                    continue
                address = np.where(chosen, address, address[chosen.argmax()])
                memory, index = self._bytes(address, space, size * len(parts))
                if name.startswith("ld."):
                    read = np.ascontiguousarray(memory[index]).view({2: np.uint16, 4: U32}[size])
                    read[~chosen] = 0xDEAD  # of no use
                    registers |= {p: read[:, i].astype(U32) for i, p in enumerate(parts)}
                else:
                    kind = {2: np.uint16, 4: U32}[size]
                    data = np.stack([value(p).astype(kind) for p in parts], 1).view(np.uint8)
                    memory[index[chosen]] = data[chosen]
            elif name.startswith("shfl.sync.bfly"):
                assert names[2:][1:] == ["0x1f", "0xffffffff"]
                registers[names[0]] = value(names[1])[LANES ^ U32(int(names[2]))]
            elif name.startswith("mov.b32") and names[0].startswith("{"):
                for i, part in enumerate(names[0].strip("{}").split(",")):
                    registers[part.strip()] = value(names[1]) >> U32(16 * i) & U32(0xFFFF)
            elif name == "cvt.f32.f16":
                registers[names[0]] = _u(value(names[1]).astype(np.uint16).view(F16).astype(F32))
            elif name in ("cvt.u32.u16", "cvt.u16.u32"):
                registers[names[0]] = value(names[1]) & U32(0xFFFF)
            elif name == "setp.ne.u32":
                registers[names[0]] = value(names[1]) != value(names[2])
            else:
                with np.errstate(all="ignore"):
                    registers[names[0]] = INSTRUCTIONS[name](*map(value, names[1:]))
        found = [registers[f"${i}"] for i in range(results)]
        return found if results > 1 else found[0] if found else None
