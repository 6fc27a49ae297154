"""Runs the cases of a suite, each in a fresh process, and records what they measured as JSON.

A fresh process per case, because a device's peak counter never goes down; the cases of a suite that measures losses
share a model and so a process. A case that fails or runs out of time is a row with its error, not a gap. Every run also
measures the card's own matmul and copy rate, so that a reader can tell a slow program from a slow card.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft", "liger-kernel", "bitsandbytes")
GIB = 2**30
COMPILING_THREADS = 8


class Timing(NamedTuple):
    """Times of repeated calls, in milliseconds."""

    median_ms: float
    min_ms: float
    max_ms: float
    repeats: int


def time_calls(call: Callable[[], Any], wait: Callable[[Any], Any], *, warmup: int, repeats: int) -> Timing:
    """Times ``call`` from its start until ``wait`` of its result returns, after ``warmup`` calls that are not timed."""
    times_ms = []
    for i in range(warmup + repeats):
        start = time.perf_counter()
        wait(call())
        if i >= warmup:
            times_ms.append(1e3 * (time.perf_counter() - start))
    return Timing(statistics.median(times_ms), min(times_ms), max(times_ms), repeats)


class Workload(NamedTuple):
    """A training step and what it starts from.

    Attributes:
      init: ``key -> (state, frozen)``; leaves are made one by one, so that no more than they is ever held.
      step: ``(state, frozen, tokens) -> (state, loss)``; the state is donated.
    """

    init: Callable[[Any], tuple[Any, Any]]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]


def random_leaf(key: Any, shape: tuple[int, ...], dtype: Any, mean: float, std: float, convert: Any = None) -> Any:
    """Returns a random array, made slice by slice along its first axis, so that its float32 form never exists whole.

    Args:
      key: random key.
      shape, dtype: of the result; a matrix is cut into up to 64 slices of rows (where they are converted, of
        multiples of 64 rows), a stack of matrices into its matrices.
      mean, std: of the normal distribution.
      convert: applied to every slice as it is made (to quantise it, say); gives a pytree of arrays of as many axes.
    """
    import jax
    import jax.numpy as jnp

    stacked = len(shape) > 2
    slices = shape[0] if stacked else math.gcd(shape[0] // 64 if convert else shape[0], 64)
    part = shape[1:] if stacked else (shape[0] // slices, *shape[1:])

    @jax.jit
    def make(key: Any) -> Any:
        def one(key: Any) -> Any:
            x = (mean + std * jax.random.normal(key, part, jnp.float32)).astype(dtype)
            return convert(x) if convert else x

        parts = jax.lax.map(one, jax.random.split(key, slices))
        return parts if stacked else jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), parts)

    return make(key)


def measure_training(
    workload: Workload, tokens: Any, *, seed: int, warmup: int, repeats: int
) -> dict[str, float | int | None]:
    """Compiles and runs a JAX training step on one batch and returns its speed, bytes and losses."""
    import jax

    def peak_gib() -> float | None:
        stats = jax.devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] / GIB if stats else None

    state, frozen = jax.block_until_ready(workload.init(jax.random.key(seed)))
    tokens = jax.device_put(tokens)
    row: dict[str, float | int | None] = {"peak_after_init_gib": peak_gib()}
    start = time.perf_counter()
    step = jax.jit(workload.step, donate_argnums=0).lower(state, frozen, tokens).compile()
    row["compile_s"] = time.perf_counter() - start
    row["peak_after_compile_gib"] = peak_gib()
    analysis = step.memory_analysis()
    bytes_ = {name: getattr(analysis, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    row |= {f"{name}_gib": count / GIB for name, count in bytes_.items()}
    row["host_temp_gib"] = analysis.host_temp_size_in_bytes / GIB
    row["compiled_gib"] = (bytes_["argument"] + bytes_["output"] + bytes_["temp"] - bytes_["alias"]) / GIB

    losses = []

    def call() -> Any:
        nonlocal state
        state, loss = step(state, frozen, tokens)
        losses.append(loss)
        return state, loss

    timing = time_calls(call, jax.block_until_ready, warmup=warmup, repeats=repeats)
    row |= timing._asdict()
    row["peak_gib"] = peak_gib()
    row["loss_first"], row["loss_last"] = float(losses[0]), float(losses[-1])
    return row


def ceilings(size: int, copy_mib: int) -> dict[str, float]:
    """Measures what the device can do at best: a bf16 matrix product and a copy.

    Args:
      size: the product is ``size**3``; random operands (products of zeros run faster).
      copy_mib: size of the copied array; bytes read and bytes written are both counted.
    """
    import jax
    import jax.numpy as jnp

    loops = 10
    a = (jax.random.normal(jax.random.key(0), (size, size)) / math.sqrt(size)).astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (copy_mib * 2**19,), jnp.bfloat16)
    products = jax.jit(lambda a, b: jax.lax.fori_loop(0, loops, lambda _, b: a @ b, b))
    copies = jax.jit(lambda x: jax.lax.fori_loop(0, loops, lambda _, x: -x, x))
    product = time_calls(lambda: products(a, a), jax.block_until_ready, warmup=2, repeats=7)
    copy = time_calls(lambda: copies(x), jax.block_until_ready, warmup=2, repeats=7)
    return {
        "matmul_size": size,
        "matmul_tflops": 2 * size**3 * loops / product.median_ms / 1e9,
        "copy_mib": copy_mib,
        "copy_tb_per_s": 2 * x.nbytes * loops / copy.median_ms / 1e9,
    }


def describe_device() -> dict[str, Any]:
    """Measures the ceilings and names the device, its driver and the packages that are installed."""
    import jax

    on_gpu = jax.default_backend() == "gpu"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind if on_gpu else f"CPU {platform.machine()}",
        "driver": _driver() if on_gpu else None,
        "preallocate": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true"),
        "python": platform.python_version(),
        "versions": versions,
        "ceilings": ceilings(8192, 1024) if on_gpu else ceilings(512, 64),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip() or None
    except OSError:
        return None


def last_exception(stderr: str) -> str:
    """Returns the last exception in a process's error output, without the traceback, or an empty string."""
    found = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*(?:\n(?!-----).*){0,3}", stderr, re.MULTILINE)
    return found[-1].strip()[:500] if found else ""


def run_process(arguments: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Runs ``python -m *arguments`` and returns the JSON object of its last line, or its error under ``error``.

    JAX allocates memory as it goes unless the environment says otherwise; a step that needs one block of half the
    card may then find none, where a pool made at the start (``XLA_PYTHON_CLIENT_PREALLOCATE=true``) has it.
    """
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONFAULTHANDLER": "1"} | os.environ
    command = [sys.executable, "-m", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"did not finish in {timeout_s:.0f} s"}
    if done.returncode < 0:
        calls = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', done.stderr)
        where = ", ".join(f"{name} in {Path(path).name}:{line}" for path, line, name in calls[:4])
        return {"error": f"killed by {signal.Signals(-done.returncode).name}" + (f" in {where}" if where else "")}
    if done.returncode:
        return {"error": last_exception(done.stderr) or f"exit status {done.returncode}"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"printed no JSON line but {done.stdout[-200:]!r}"}


def run_suite(
    suite: str,
    module: str,
    cases: Sequence[str],
    *,
    results: Path,
    timeout_s: float,
    limit_s: float,
    keep: bool,
) -> Path:
    """Runs cases one after another and writes ``<results>/<device>/<suite>.json`` after each.

    Args:
      suite: name of the file.
      module: ``python -m module --case NAME`` runs one case and prints one JSON line last.
      cases: names of the cases to run.
      results: folder of all results.
      timeout_s: time for one case.
      limit_s: no case is started later than this; those left are recorded as not run.
      keep: keep the rows of other cases that the file has; every row says which run it is of.

    Returns:
      The file's path.
    """
    start = time.monotonic()
    facts = run_process(["benchmarks.harness"], timeout_s)
    if "error" in facts:
        raise RuntimeError(f"could not measure the device: {facts['error']}")
    path, record = open_results(suite, cases, facts, results=results, keep=keep)
    for case in cases:
        spent = time.monotonic() - start
        if spent < limit_s:
            row = run_process([module, "--case", case], timeout_s)
        else:
            row = {"error": f"not run: the run's {limit_s:.0f} s were spent"}
        record(case, {"wall_s": time.monotonic() - start - spent} | row)
    return path


class Case(NamedTuple):
    """A case whose programs are compiled beside those of the others.

    Attributes:
      compile: gives what ``run`` takes; called in a thread.
      run: gives the row.
    """

    compile: Callable[[], Any]
    run: Callable[[Any], dict[str, Any]]


def run_here(
    suite: str, cases: Mapping[str, Case | Callable[[], dict[str, Any]]], *, results: Path, limit_s: float, keep: bool
) -> Path:
    """Runs cases in this process, where they share what is loaded and compiled; for suites that measure no peaks.

    Args:
      suite: name of the file, which is written after each case.
      cases: name -> function that runs the case and returns its row, or a `Case`, which are compiled side by side, the
        later ones while the first run; an exception in either is a row with its error.
      results, limit_s, keep: as for `run_suite`.

    Returns:
      The file's path.
    """
    start = time.monotonic()
    path, record = open_results(suite, list(cases), describe_device(), results=results, keep=keep)
    pool = ThreadPoolExecutor(min(COMPILING_THREADS, os.cpu_count() or 1))
    compiled = {name: pool.submit(case.compile) for name, case in cases.items() if isinstance(case, Case)}
    try:
        for name, case in cases.items():
            spent = time.monotonic() - start
            if spent < limit_s:
                try:
                    row = case.run(compiled[name].result()) if isinstance(case, Case) else case()
                except Exception as problem:
                    traceback.print_exc()
                    row = {"error": f"{type(problem).__name__}: {problem}"[:500]}
            else:
                row = {"error": f"not run: the run's {limit_s:.0f} s were spent"}
            record(name, {"wall_s": time.monotonic() - start - spent} | row)
    finally:  # an interrupted process would else compile the rest before it ends
        pool.shutdown(wait=False, cancel_futures=True)
    return path


def open_results(
    suite: str, cases: Sequence[str], facts: dict[str, Any], *, results: Path, keep: bool
) -> tuple[Path, Callable[[str, dict[str, Any]], None]]:
    """Starts a run of ``cases`` on the device of ``facts``.

    Returns:
      The path ``<results>/<device>/<suite>.json``, and ``record(case, row)``, which prints a row and rewrites the file.
    """
    run = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = results / slug / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if keep and path.exists() else {"runs": {}, "rows": []}
    rows = [row for row in old["rows"] if row["case"] not in cases]
    runs = {name: old["runs"][name] for name in old["runs"] if any(row["run"] == name for row in rows)} | {run: facts}

    def record(case: str, row: dict[str, Any]) -> None:
        rows.append({"case": case, "run": run} | row)
        path.write_text(json.dumps({"suite": suite, "runs": runs, "rows": rows}, indent=1) + "\n")
        print(case, row.get("error") or json.dumps(row), flush=True)

    return path, record


def main(
    suite: str, module: str, cases: Sequence[str], run_case: Callable[[str], dict[str, Any]], *, default: str
) -> None:
    """The command line of a suite: one case in this process, or many in a process each.

    Args:
      suite, module, cases: as for `run_suite`, with all cases that there are.
      run_case: runs a case and returns its row.
      default: pattern of the cases that run when none are named.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--case", choices=cases, metavar="NAME", help="run one case here and print its JSON line")
    parser.add_argument("--cases", nargs="+", default=[default], metavar="PATTERN", help="run the cases that match")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all results")
    parser.add_argument("--timeout-s", type=float, default=180, help="time for one case")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="start no case later than this")
    parser.add_argument("--keep", action="store_true", help="keep the recorded rows of cases that are not run now")
    options = parser.parse_args()
    chosen = [case for case in cases if any(fnmatch.fnmatch(case, pattern) for pattern in options.cases)]
    if not chosen:
        parser.error(f"no case matches {options.cases}; there are {', '.join(cases)}")
    if options.list:
        print("\n".join(chosen))
    elif options.case:
        print(json.dumps(run_case(options.case)))
    else:
        print(
            run_suite(
                suite,
                module,
                chosen,
                results=options.results,
                timeout_s=options.timeout_s,
                limit_s=options.limit_s,
                keep=options.keep,
            )
        )


if __name__ == "__main__":
    print(json.dumps(describe_device()))
