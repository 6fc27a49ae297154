"""One file of weights: round trips, and files that are not what they claim."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from memjax import codecs, weights
from tests.random_views import array, view


def tree():
    dense = {
        "embed": {"embedding": array(0, 10, 16, dtype=jnp.bfloat16)},
        "layers": {"up": {"kernel": array(1, 3, 16, 8)}, "o": {"kernel": array(2, 3, 2, 4, 8, dtype=jnp.bfloat16)}},
        "head": {"kernel": array(3, 32, 8)},
        "count": jnp.arange(3),
    }
    packed = weights.quantize(dense, codecs.int8(group=8, symmetric=False), "layers/**", {"**/o/*": ((1, 2), 3)})
    return weights.quantize(packed, codecs.q4_1(), "head/*")


def stacks():
    """A stack of weights in each of the other formats."""
    others = {"shaped": codecs.Nf4(64, True, (1, 2)), "fp8": codecs.fp8(), "bipolar": codecs.bipolar(5, 16)}
    packed = weights.quantize({name: array(4, 2, 128, 6) for name in others}, others)
    return {**packed, **weights.quantize({"heads": array(5, 128, 2, 3)}, codecs.nf4(), "*", {"heads": (0, (1, 2))})}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_round_trip_of_every_format(tmp_path):
    path = tmp_path / "w.safetensors"
    params = {**tree(), **stacks()}
    weights.save(path, params)
    assert_same(weights.load(path), params)


@pytest.mark.parametrize(
    "extra, error, message",
    [
        ({"adapted": {"kernel": view("lora on dense", array(0, 8, 8))}}, TypeError, "adapted/kernel: .* got Adapted"),
        ({"number": 3}, TypeError, "number: .* got int"),
        ({"a#b": jnp.ones(2)}, ValueError, "a#b: "),
    ],
)
def test_what_cannot_be_saved_is_refused_and_the_previous_file_stays(tmp_path, extra, error, message):
    path = tmp_path / "w.safetensors"
    weights.save(path, tree())
    with pytest.raises(error, match=message):
        weights.save(path, {**tree(), **extra})
    assert_same(weights.load(path), tree())


def test_a_save_that_fails_while_writing_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    weights.save(path, tree())

    def full(tensors, file, metadata):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space"):
        weights.save(path, {"a": jnp.ones(3)})
    assert os.listdir(tmp_path) == [path.name]
    assert_same(weights.load(path), tree())


def rewritten(path, change_formats=None, change_tensors=None, **metadata):
    """Writes a saved tree to ``path`` with its metadata or tensors changed."""
    weights.save(path, {"kernel": weights.quantize({"kernel": array(0, 32, 8)}, codecs.int4(group=8))["kernel"]})
    with safe_open(path, framework="numpy") as file:
        recorded = file.metadata()
    tensors = load_file(path)
    formats = json.loads(recorded["packed"])
    formats = change_formats(formats) if change_formats else formats
    tensors = change_tensors(tensors) if change_tensors else tensors
    packed = formats if isinstance(formats, str) else json.dumps(formats)
    save_file(tensors, path, metadata={"packed": packed, "format": recorded["format"], **metadata})
    return path


def edit(**changes):
    return lambda formats: {"kernel": {**formats["kernel"], **changes}}


def settings(**changes):
    return lambda formats: edit(settings={**formats["kernel"]["settings"], **changes})(formats)


@pytest.mark.parametrize(
    "change",
    [
        edit(codec="nf5"),
        edit(codec=["grouped"]),
        edit(settings={"bits": 4}),
        edit(group_axes=[-1]),
        edit(group_axes=[7]),
        edit(inputs=[-1]),
        edit(outputs=None),
        edit(dtype="int8"),
        edit(dtype="float99"),
        settings(group=16),
        settings(group=0),
        settings(bits=8),
        settings(symmetric=False),
        settings(scale_dtype="float32"),
        lambda formats: {"kernel": 3},
        lambda formats: {},
        lambda formats: {"other": formats["kernel"]},
        lambda formats: [],
        lambda formats: "{",
    ],
)
def test_a_tampered_format_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match=r"w\.safetensors: "):
        weights.load(rewritten(tmp_path / "w.safetensors", change))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "kernel#plane0": t["kernel#plane0"][:-1]},
        lambda t: {**t, "kernel#scale": t["kernel#scale"].astype(np.float32)},
        lambda t: {**t, "kernel#offset": t["kernel#scale"]},
        lambda t: {"kernel#plane0": t["kernel#plane0"]},
        lambda t: {**t, "stray#plane0": np.ones(2)},
        lambda t: {**t, "kernel/inside": np.ones(2)},
        lambda t: {**t, "a": np.ones(2), "a/b": np.ones(2)},
        lambda t: {**t, "a/b": np.ones(2), "a": np.ones(2)},
    ],
)
def test_leaves_that_do_not_fit_the_format_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match=r"w\.safetensors: "):
        weights.load(rewritten(tmp_path / "w.safetensors", change_tensors=change))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "w#scale.absmax": t["w#scale.absmax"][:, :2]},
        lambda t: {name: t[name] for name in t if name != "w#scale.mean"},
        lambda t: {**t, "w#scale": t["w#scale.codes"]},
    ],
)
def test_nested_scales_that_do_not_fit_are_refused(tmp_path, change):
    path = tmp_path / "w.safetensors"
    weights.save(path, {"w": weights.quantize({"w": array(0, 2 * 64, 512)}, codecs.nf4(), "w")["w"]})
    with safe_open(path, framework="numpy") as file:
        recorded = file.metadata()
    save_file({name: np.ascontiguousarray(t) for name, t in change(load_file(path)).items()}, path, metadata=recorded)
    with pytest.raises(ValueError, match=r"w\.safetensors: w "):
        weights.load(path)


def test_files_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError):
        weights.load(path)
    for content in (b"", b"garbage", b"\xff" * 8, (2**60).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable file of weights"):
            weights.load(path)
    save_file({"a": np.ones(2)}, path)
    with pytest.raises(ValueError, match="expected format 'memjax-weights-1', found None"):
        weights.load(path)
    with pytest.raises(ValueError, match="found 'memjax-weights-9'"):
        weights.load(rewritten(path, format="memjax-weights-9"))
    weights.save(path, tree())
    whole = path.read_bytes()
    for length in (5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable file of weights"):
            weights.load(path)
