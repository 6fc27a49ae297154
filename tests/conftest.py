"""How every test runs, set before jax is imported: on eight simulated CPU devices, from code that compiles quickly.

Nearly all programs of the tests are small and run once, so compiling them without LLVM's optimizations, in one piece,
takes a third off the time of the tests. XLA's own passes, which decide what is fused and what memory a program takes,
run as ever.
"""

import os

flags = ["--xla_force_host_platform_device_count=8"]
if os.environ.get("JAX_PLATFORMS") == "cpu":
    flags += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


def pytest_collection_modifyitems(items):
    """Puts the notebooks first: a process that met them last would keep all others waiting."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_notebooks"))
