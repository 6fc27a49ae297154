"""The safetensors reader against the safetensors library, and against damaged files."""

import json
import random

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from memjax.models.safetensors_reader import read_safetensors
from tests.models.weights import minilm_path


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    return {
        "w.f32": x,
        "w.f16": x.astype(np.float16),
        "w.bf16": x.astype(ml_dtypes.bfloat16),
        "ids": rng.integers(-9, 9, (2, 1, 4)),
        "flag": np.array([True, False, True]),
        "scalar": np.array(3.5, np.float64),
        "empty": np.zeros((0, 4), np.float32),
    }


def same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(got, want)


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_writes(tmp_path):
    want = arrays()
    safetensors.numpy.save_file(want, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        table = read_safetensors(path)
        assert set(table) == set(want)
        for name, array in want.items():
            assert table[name].shape == array.shape and table[name].nbytes == array.nbytes
            same(table[name].read(), array)


def test_tensors_that_lie_unaligned_are_read_aligned(tmp_path):
    header = {"a": entry("U8", (3,), (0, 3)), "b": entry("F32", (2,), (3, 11))}
    values = np.array([1.5, -2.25], np.float32)
    (tmp_path / "x.safetensors").write_bytes(file_of(header, bytes([7, 8, 9]) + values.tobytes()))
    got = read_safetensors(tmp_path / "x.safetensors")["b"].read()
    same(got, values)
    assert got.flags.aligned


def test_reads_shards(tmp_path):
    want = arrays()
    names = sorted(want)
    shards = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for shard, members in shards.items():
        safetensors.numpy.save_file({name: want[name] for name in members}, tmp_path / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    table = read_safetensors(tmp_path)
    for name in names:
        same(table[name].read(), want[name])

    index.write_text(json.dumps({"weight_map": {**weight_map, "lost.weight": "model-2.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-2.safetensors has no tensor 'lost.weight'"):
        read_safetensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {**weight_map, "far.weight": "../other.safetensors"}}))
    with pytest.raises(ValueError, match=r"places 'far.weight' in '../other.safetensors'"):
        read_safetensors(tmp_path)
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(ValueError, match="has no weight_map"):
        read_safetensors(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the shard .*model-2.safetensors is missing"):
        read_safetensors(tmp_path)


def test_missing_tensor_is_named_with_its_file(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "model.safetensors")
    table = read_safetensors(tmp_path)
    assert "v.f32" not in table and table.get("v.f32") is None
    with pytest.raises(ValueError, match=r"model.safetensors has no tensor 'v.f64' among its 7"):
        table["v.f64"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_pickles_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"{name}: pickled weights are refused.*can run any code"):
            read_safetensors(path)


def test_places_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        read_safetensors(tmp_path)
    with pytest.raises(ValueError, match="neither a safetensors file nor a folder"):
        read_safetensors(tmp_path / "nothing")


DEEP = b'{"a":' + b"[" * 200_000
BAD = {
    "empty file": (b"", "truncated or not a safetensors file"),
    "half a length": (b"\x08\x00", "truncated or not a safetensors file"),
    "header past the end": (file_of({}, length=1 << 62), "header has 4611686018427387904"),
    "not json": (file_of(b"{nope"), "is not valid JSON"),
    "not utf-8": (file_of(b'{"\xff": 1}'), "is not valid JSON"),
    "json nested without end": (file_of(DEEP), "is not valid JSON"),
    "not an object": (file_of([1]), "must hold a JSON object, got list"),
    "key twice": (file_of(b'{"a": 1, "a": 2}'), "the key 'a' comes twice"),
    "entry no object": (file_of({"a": 3}), "must have dtype, shape and data_offsets, got 3"),
    "entry without shape": (file_of({"a": {"dtype": "F32"}}), "must have dtype, shape and data_offsets"),
    "unknown dtype": (file_of({"a": entry("F8_E4M3", (8,))}, bytes(8)), "tensor 'a' .* dtype 'F8_E4M3'"),
    "dtype no string": (file_of({"a": entry([1])}, bytes(8)), r"dtype \[1\]"),
    "negative size": (file_of({"a": entry(shape=(-2,))}, bytes(8)), r"has the shape \[-2\]"),
    "fractional size": (file_of({"a": entry(shape=(2.0,))}, bytes(8)), r"has the shape \[2.0\]"),
    "too many axes": (file_of({"a": entry(shape=(1,) * 40 + (2,))}, bytes(8)), "has the shape"),
    "offsets past the end": (file_of({"a": entry(offsets=(0, 8))}, bytes(7)), "within the 7 bytes"),
    "offsets backwards": (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), r"data_offsets \[8, 0\]"),
    "offsets of three": (file_of({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "data_offsets"),
    "shape too large": (file_of({"a": entry(shape=(3,))}, bytes(8)), "so 12 bytes, .* hold 8"),
    "shape overflows": (file_of({"a": entry(shape=(2**62, 4))}, bytes(8)), r"hold 8"),
    "overlap": (
        file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "'b' of .* overlaps 'a'",
    ),
    "gap": (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "'b' of .* leaves a gap"),
    "more at the end": (file_of({"a": entry()}, bytes(9)), "1 bytes after its last tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(tmp_path, case):
    data, message = BAD[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_safetensors(tmp_path)
    assert "model.safetensors" in str(error.value)


def test_truncation_and_flipped_bytes_raise_nothing_but_value_error(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    file = tmp_path / "bad.safetensors"
    header_end = 8 + int.from_bytes(good[:8], "little")
    for size in [*range(0, header_end, 3), *range(header_end, len(good), 7)]:
        file.write_bytes(good[:size])
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            read_safetensors(file)
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(header_end)] = rng.randrange(256)
        file.write_bytes(data)
        try:
            for tensor in read_safetensors(file).values():
                tensor.read()
        except ValueError:
            refused += 1
    assert refused > 400


def test_minilm_is_read_as_the_library_reads_it():
    folder = minilm_path()
    table = read_safetensors(folder)
    want = safetensors.numpy.load_file(folder / "model.safetensors")
    assert len(table) == 104 and set(table) == set(want)
    for name in ("embeddings.position_ids", "encoder.layer.5.output.dense.weight", "pooler.dense.bias"):
        same(table[name].read(), want[name])
