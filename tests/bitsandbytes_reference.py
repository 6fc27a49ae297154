"""bitsandbytes' 4-bit quantization of one weight, written out in numpy."""

import json

import numpy as np

from memjax.codecs.nf4 import DYNAMIC_MAP, LEVELS


def midpoints(table):
    return (table[1:] + table[:-1]) / np.float32(2)


def quantize_blocks(flat, table, block):
    """Returns the code of each element and the largest size of each block; the last block may be short."""
    codes, largest = [], []
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        largest.append(np.abs(part).max())
        scaled = np.clip(part * (np.float32(1) / max(largest[-1], np.float32(1e-38))), -1, 1)
        codes.append(np.searchsorted(midpoints(table), scaled, side="left"))
    return np.concatenate(codes).astype(np.uint8), np.array(largest, np.float32)


def quantize(weight, nested=True, block=64):
    """Returns the arguments of `memjax.codecs.from_bitsandbytes` for float32 ``weight`` [out, in]."""
    codes, absmax = quantize_blocks(weight.reshape(-1), LEVELS, block)
    parts = {"weight": (codes[0::2] << 4 | codes[1::2])[:, None], "absmax": absmax, "shape": weight.shape}
    if nested:
        mean = np.float32(np.mean(absmax, dtype=np.float64))
        parts["absmax"], parts["nested_absmax"] = quantize_blocks(absmax - mean, DYNAMIC_MAP, 256)
        parts["nested_offset"] = float(mean)
    return parts


def dequantize(weight, absmax, shape, nested_absmax=None, nested_offset=None):
    if nested_absmax is not None:
        absmax = DYNAMIC_MAP[absmax] * nested_absmax.repeat(256)[: absmax.size] + np.float32(nested_offset)
    codes = np.stack([weight.reshape(-1) >> 4, weight.reshape(-1) & 15], axis=-1).reshape(-1)
    return (LEVELS[codes] * absmax.repeat(codes.size // absmax.size)).reshape(shape)


def checkpoint_tensors(name, weight, nested=True):
    """Returns the tensors under which transformers saves a quantized ``weight``."""
    parts = quantize(weight, nested)
    settings = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    tensors = {name: parts["weight"], f"{name}.absmax": parts["absmax"], f"{name}.quant_map": LEVELS}
    if nested:
        settings |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": parts["nested_offset"]}
        tensors |= {f"{name}.nested_absmax": parts["nested_absmax"], f"{name}.nested_quant_map": DYNAMIC_MAP}
    text = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    return {**tensors, f"{name}.quant_state.bitsandbytes__nf4": text}
