"""The GGUF reader against the `gguf` package, and against damaged files."""

import random
import struct
import tracemalloc

import gguf as reference
import ml_dtypes
import numpy as np
import pytest

from memjax import codecs
from memjax.models.gguf import KINDS, TYPE_NAMES, read_gguf
from tests.models.weights import smollm2_path

NUMBER = {name: number for number, name in enumerate(TYPE_NAMES)}
U32, STRING, ARRAY, U64 = 4, 8, 9, 10


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def u32(key, value):
    return pair(key, U32, struct.pack("<I", value))


def array(kind, count, items=b""):
    return struct.pack("<IQ", kind, count) + items


def entry(name="a", sizes=(32, 2), kind="Q8_0", offset=0):
    number = kind if isinstance(kind, int) else NUMBER[kind]
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)


def file_of(keys=(), entries=(), data=b"", magic=b"GGUF", version=3, key_count=None, tensor_count=None, align=32):
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(entries) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head += b"".join(keys) + b"".join(entries)
    return head + bytes(-len(head) % align) + data


def blocks(kind, rows, columns, seed):
    """Random blocks whose 16-bit scales are ordinary numbers."""
    rng = np.random.default_rng(seed)
    shape = (rows, columns // KINDS[kind].elements)
    if KINDS[kind].block.names is None:
        return rng.standard_normal(shape).astype(KINDS[kind].block)
    out = rng.integers(0, 256, (*shape, KINDS[kind].block.itemsize), np.uint8).view(KINDS[kind].block)[..., 0]
    for name in {"d", "m", "dmin"} & set(KINDS[kind].block.names):
        out[name] = rng.standard_normal(shape)
    return out


def every_kind(tmp_path):
    """A file with a tensor of each kind, and metadata of each type, written by the gguf package."""
    path = tmp_path / "kinds.gguf"
    writer = reference.GGUFWriter(path, "llama")
    writer.add_uint32("n.u32", 7)
    writer.add_int8("n.i8", -3)
    writer.add_float32("x.f32", 0.5)
    writer.add_float64("x.f64", -0.25)
    writer.add_uint64("n.u64", 2**40)
    writer.add_bool("yes", True)
    writer.add_string("name", "größe")
    writer.add_array("words", ["a", "", "Ġb"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("bools", [True, False])
    raw = {}
    for i, kind in enumerate(KINDS):
        raw[kind] = np.ascontiguousarray(blocks(kind, 6, 512, i)).view(np.uint8).reshape(2, 3, -1)
        writer.add_tensor(f"t.{kind}", raw[kind], raw_dtype=reference.GGMLQuantizationType[kind])
    writer.add_tensor("norm", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, raw


def test_reads_what_the_gguf_package_writes(tmp_path):
    path, raw = every_kind(tmp_path)
    file = read_gguf(path)
    meta = file.metadata
    assert (meta["general.architecture"], meta["n.u32"], meta["n.i8"], meta["n.u64"]) == (
        "llama",
        7,
        -3,
        2**40,
    )
    assert (meta["x.f32"], meta["x.f64"], meta["yes"], meta["name"]) == (0.5, -0.25, True, "größe")
    assert meta["words"] == ["a", "", "Ġb"]
    assert meta["numbers"].tolist() == [1, 2, 3] and meta["bools"].tolist() == [True, False]
    for kind, data in raw.items():
        tensor = file.tensors[f"t.{kind}"]
        assert tensor.kind == kind and tensor.shape == (2, 3, 512) and tensor.nbytes == data.nbytes
        np.testing.assert_array_equal(tensor.raw(), data.reshape(6, -1))
    assert file.tensors["norm"].shape == (5,)
    np.testing.assert_array_equal(file.tensors["norm"].decode(), np.arange(5))
    with pytest.raises(ValueError, match=r"kinds.gguf has no tensor 'output.weight' among its 10"):
        file.tensors["output.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_exactly_as_the_gguf_package(tmp_path, kind):
    path, raw = every_kind(tmp_path)
    tensor = read_gguf(path).tensors[f"t.{kind}"]
    want = reference.dequantize(raw[kind], reference.GGMLQuantizationType[kind])
    got = tensor.decode()
    assert got.dtype == np.float32 and got.shape == (2, 3, 512)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(tensor.decode(ml_dtypes.bfloat16), want.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_raw_blocks_are_what_the_codecs_take(tmp_path, kind):
    path, _ = every_kind(tmp_path)
    tensor = read_gguf(path).tensors[f"t.{kind}"]
    packed = codecs.from_gguf(kind, tensor.raw(), (6, 512))
    np.testing.assert_allclose(packed.decode(np.float32), tensor.decode().reshape(6, 512), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(codecs.to_gguf(packed), tensor.raw())


def test_decodes_in_pieces(tmp_path, monkeypatch):
    path, _ = every_kind(tmp_path)
    tensor = read_gguf(path).tensors["t.Q4_K"]
    whole = tensor.decode()
    monkeypatch.setattr("memjax.models.gguf._ROWS_AT_ONCE_ELEMENTS", 4 * 512)
    np.testing.assert_array_equal(tensor.decode(), whole)


def test_every_type_of_the_gguf_package_has_our_name_and_size():
    for kind in reference.GGMLQuantizationType:
        assert TYPE_NAMES[kind.value] == kind.name
    for name, kind in KINDS.items():
        assert reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[name]] == (
            kind.elements,
            kind.block.itemsize,
        )


def test_version_2_and_another_alignment(tmp_path):
    data = bytes(range(68))
    file = tmp_path / "v2.gguf"
    file.write_bytes(file_of([u32("general.alignment", 64)], [entry()], data, version=2, align=64))
    tensor = read_gguf(file).tensors["a"]
    np.testing.assert_array_equal(tensor.raw().reshape(-1), np.frombuffer(data, np.uint8))


HUGE = 1 << 60
BAD = {
    "empty": (b"", "0 bytes, too few"),
    "magic": (file_of(magic=b"GGML"), "begins with b'GGML'"),
    "version 1": (file_of(version=1), "version 1; little-endian"),
    "big-endian": (file_of(version=3 << 24), "a big-endian file"),
    "more keys than bytes": (file_of(key_count=HUGE), "metadata of 1152921504606846976 keys"),
    "more tensors than bytes": (file_of(tensor_count=HUGE), "a table of 1152921504606846976 tensors"),
    "key past the end": (file_of([struct.pack("<Q", HUGE) + bytes(40)]), "metadata key 0 at byte .* needs"),
    "string past the end": (file_of([pair("k", STRING, struct.pack("<Q", HUGE))]), "metadata 'k' at byte"),
    "strings past the end": (
        file_of([pair("k", ARRAY, array(STRING, HUGE))]),
        "metadata 'k', 11529.* strings",
    ),
    "numbers past the end": (file_of([pair("k", ARRAY, array(U64, HUGE))]), "metadata 'k', 11529.* numbers"),
    "array of arrays": (file_of([pair("k", ARRAY, array(ARRAY, 1, array(ARRAY, 1)))]), "array of arrays"),
    "array of unknown": (file_of([pair("k", ARRAY, array(99, 1, bytes(8)))]), "unknown value type 99"),
    "unknown type": (file_of([pair("k", 13, bytes(8))]), "unknown value type 13"),
    "bool of two": (file_of([pair("k", 7, b"\x02")]), "bool with the byte 2"),
    "key not utf-8": (file_of([u32(b"\xff", 1)]), "metadata key 0 is not UTF-8"),
    "key twice": (file_of([u32("k", 1), u32("k", 2)]), "key 'k' comes twice"),
    "alignment zero": (file_of([u32("general.alignment", 0)]), "power of two, got 0"),
    "alignment odd": (file_of([u32("general.alignment", 24)]), "power of two, got 24"),
    "alignment text": (file_of([pair("general.alignment", STRING, text("32"))]), "power of two, got '32'"),
    "a part of several": (file_of([u32("split.count", 3)]), "one part of 3; merge them"),
    "tensor twice": (file_of([], [entry(), entry()], bytes(96)), "tensor 'a' comes twice"),
    "no axes": (file_of([], [entry(sizes=())], bytes(96)), "'a' has 0 axes"),
    "five axes": (file_of([], [entry(sizes=(32, 1, 1, 1, 1))], bytes(96)), "'a' has 5 axes"),
    "size zero": (file_of([], [entry(sizes=(32, 0))], bytes(96)), r"sizes \(32, 0\); they must be positive"),
    "size no multiple": (
        file_of([], [entry(sizes=(48, 2))], bytes(99)),
        "for Q8_0, the first a multiple of 32",
    ),
    "size overflows": (file_of([], [entry(sizes=(1 << 63, 1 << 63))], bytes(99)), "ends at byte 9038"),
    "refused type": (
        file_of([], [entry(sizes=(256,), kind="IQ2_XXS")], bytes(99)),
        "'a' has the type IQ2_XXS",
    ),
    "removed type": (file_of([], [entry(kind="Q4_2")], bytes(99)), "'a' has the type Q4_2"),
    "unknown tensor type": (file_of([], [entry(kind=777)], bytes(99)), "'a' has the type number 777"),
    "offset unaligned": (file_of([], [entry(offset=8)], bytes(99)), "offset 8, not a multiple of 32"),
    "offset past the end": (file_of([], [entry(offset=1 << 40)], bytes(99)), "ends at byte 1099511627"),
    "data cut": (file_of([], [entry()], bytes(67)), r"tensor 'a' \(Q8_0, \(2, 32\)\) ends at byte 164"),
    "overlap": (file_of([], [entry(), entry("b", offset=64)], bytes(140)), "'a' and 'b' overlap at byte"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named_without_allocating_by_it(tmp_path, case):
    data, message = BAD[case]
    file = tmp_path / "bad.gguf"
    file.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            read_gguf(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert "bad.gguf" in str(error.value)


def test_not_a_file(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_gguf(tmp_path)


def test_truncation_and_flipped_bytes_raise_nothing_but_value_error(tmp_path):
    path, _ = every_kind(tmp_path)
    good = path.read_bytes()
    table_end = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    file = tmp_path / "bad.gguf"
    last = max(tensor.offset + tensor.nbytes for tensor in read_gguf(path).tensors.values())
    for size in [*range(0, table_end, 2), *range(table_end, last, 997), last - 1]:
        file.write_bytes(good[:size])
        with pytest.raises(ValueError, match=r"bad\.gguf"):
            read_gguf(file)
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(table_end)] = rng.choice([0, 1, 8, 9, 127, 128, 255, rng.randrange(256)])
        file.write_bytes(data)
        try:
            for tensor in read_gguf(file).tensors.values():
                tensor.raw()
        except ValueError:
            refused += 1
    assert refused > 500


def test_smollm2_is_read_as_the_gguf_package_reads_it():
    file = read_gguf(smollm2_path())
    want = {tensor.name: tensor for tensor in reference.GGUFReader(smollm2_path()).tensors}
    assert set(file.tensors) == set(want) and len(want) == 272
    assert file.metadata["llama.block_count"] == 30 and file.metadata["llama.rope.freq_base"] == 100_000
    for name in (
        "blk.0.attn_q.weight",
        "blk.29.ffn_down.weight",
        "blk.7.attn_norm.weight",
        "output_norm.weight",
    ):
        got, other = file.tensors[name], want[name]
        assert got.shape == tuple(reversed(other.shape.tolist()))
        np.testing.assert_array_equal(got.decode(), reference.dequantize(other.data, other.tensor_type))
    embedding = file.tensors["token_embd.weight"]
    assert embedding.kind == "Q8_0" and embedding.shape == (49152, 576)
    rows = want["token_embd.weight"].data[:64]
    np.testing.assert_array_equal(embedding.raw()[:64], rows)
