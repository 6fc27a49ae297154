"""What may import what, as far as import-linter cannot say it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BLOCK_OPTIONAL_PACKAGES = """
import importlib.abc, sys
import jax, jaxlib, flax.linen, flax.nnx, optax, chex, einops, numpy

def top_level(name):
    return name.partition(".")[0]

needed = {top_level(name) for name in sys.modules} | set(sys.stdlib_module_names)
needed |= {"memjax", "pallas_kernels", "benchmarks"}

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if top_level(name) not in needed:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Block())
"""


def run_with_core_packages(code: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` where only jax, flax, optax, chex, einops and what these need can be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK_OPTIONAL_PACKAGES + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.smoke
def test_import_memjax_needs_only_the_core_packages():
    done = run_with_core_packages("import memjax, pallas_kernels")
    assert done.returncode == 0, done.stderr


def test_training_a_model_needs_only_the_core_packages():
    code = "from benchmarks import finetune; finetune.build(finetune.TINY, 'memjax', 'xla')"
    done = run_with_core_packages(code)
    assert done.returncode == 0, done.stderr


def test_the_block_blocks():
    done = run_with_core_packages("import safetensors")
    assert "No module named 'safetensors' (blocked)" in done.stderr


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources() -> list[Path]:
    return [path for package in ("memjax", "pallas_kernels") for path in sorted((ROOT / package).rglob("*.py"))]


def test_only_the_compat_module_imports_private_jax():
    private = {
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if any(name == "jax._src" or name.startswith("jax._src.") for name in imported_modules(path))
    }
    assert private <= {"memjax/core/jaxpr_compat.py"}


def test_imported_modules_sees_every_form(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("import jax._src.core\nfrom jax import _src\ndef f():\n    from jax._src import api\n")
    assert {"jax._src.core", "jax._src", "jax._src.api"} <= imported_modules(source)
