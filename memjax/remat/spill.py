"""Activations on disk, written and read beside the computation.

Source: Wu et al., "SSDTrain: An Activation Offloading Framework to SSDs for Faster Large Language Model Training",
2024. Taken from it: asynchronous writes, forwarding of what is still in memory, reading ahead in the order of backward,
nothing written twice, params never written, and the rule for how many layers are worth it (`layers_to_offload`).

A compiled program has no way to the disk but a call back to Python, which it waits for; so the boundary is the layer:
each is compiled, and Python runs one after another.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.core.bytes import nbytes
from memjax.remat.compress import compress_residuals
from memjax.remat.policy import ResidualPolicy


class SpillStats(NamedTuple):
    """What a `SpillStore` has moved so far.

    Attributes:
      written_bytes: to disk.
      read_bytes: from disk.
      forwarded_bytes: handed back from memory because they were asked for before their write was done.
    """

    written_bytes: int = 0
    read_bytes: int = 0
    forwarded_bytes: int = 0


@dataclass
class _Entry:
    """Arrays that are in memory, on disk, or on the way from one to the other."""

    path: Path
    like: list[jax.ShapeDtypeStruct]  # with shardings
    arrays: list[jax.Array] | None
    write: Future[None] | None = None
    read: Future[list[jax.Array]] | None = None
    taken: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class SpillStore:
    """Lists of arrays on disk, each to be read back once.

    Files lie in a folder of their own, one per list, made whole or not at all; reading back deletes them, and
    closing the store (or leaving its ``with``, or the end of the process) deletes what is left.
    """

    def __init__(self, folder: str | Path, *, threads: int = 2, in_flight: int = 4, read_ahead: int = 2):
        """Opens an empty store.

        Args:
          folder: where its own folder is made; it must exist.
          threads: that write and read.
          in_flight: lists whose write is not done, and which so are still in memory; one more waits in `put`.
          read_ahead: lists that are read ahead of `get`, from the last put to the first.

        Raises:
          ValueError: a number below 1 (``read_ahead``: below 0).
          FileNotFoundError: there is no such folder.
        """
        if threads < 1 or in_flight < 1 or read_ahead < 0:
            raise ValueError(f"expected {threads=} and {in_flight=} of at least 1, and {read_ahead=} of at least 0")
        self.folder = Path(tempfile.mkdtemp(prefix="memjax-spill-", dir=folder))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="memjax-spill")
        self._entries: dict[int, _Entry] = {}
        self._tickets = itertools.count()
        self._in_flight, self._read_ahead = in_flight, read_ahead
        self._stats, self._lock = SpillStats(), threading.Lock()
        self._cleanup = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @property
    def stats(self) -> SpillStats:
        """Bytes moved so far."""
        return self._stats

    def put(self, arrays: Sequence[jax.Array]) -> int:
        """Starts to write arrays and returns at once; the store holds them until they are on disk.

        Args:
          arrays: of any shapes and dtypes, typed keys excepted.

        Returns:
          A ticket for `get`.
        """
        ticket = next(self._tickets)
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in arrays]
        entry = _Entry(self.folder / f"{ticket}.bin", like, list(arrays))
        pending = [e.write for e in self._entries.values() if e.write is not None and not e.write.done()]
        if len(pending) >= self._in_flight:
            pending[0].exception()
        entry.write = self._pool.submit(self._write, entry)
        self._entries[ticket] = entry
        return ticket

    def get(self, ticket: int) -> list[jax.Array]:
        """Returns the arrays of a ticket, bit by bit, and forgets them.

        Raises:
          KeyError: the ticket was used already, or the store is closed.
          OSError: they could not be written or read.
        """
        entry = self._entries.pop(ticket)
        with entry.lock:
            entry.taken, arrays = True, entry.arrays
        assert entry.write is not None
        if not entry.write.cancel() and entry.write.done():
            entry.write.result()  # raises what went wrong
        for other in itertools.islice(reversed(self._entries.values()), self._read_ahead):
            if other.read is None and other.arrays is None:
                other.read = self._pool.submit(self._read, other)
        if arrays is not None:
            self._count(forwarded_bytes=nbytes(arrays))
            return arrays
        return entry.read.result() if entry.read is not None else self._read(entry)

    def close(self) -> None:
        """Waits for what is under way and deletes every file."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._entries.clear()
        self._cleanup()

    def __enter__(self) -> SpillStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _write(self, entry: _Entry) -> None:
        arrays = entry.arrays or []
        unfinished = entry.path.with_suffix(".part")
        try:
            with open(unfinished, "wb") as file:
                for x in arrays:
                    file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8))  # waits until x is computed
            os.replace(unfinished, entry.path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._count(written_bytes=nbytes(entry.like))
        with entry.lock:
            entry.arrays = None
            if entry.taken:
                entry.path.unlink()

    def _read(self, entry: _Entry) -> list[jax.Array]:
        raw, arrays, start = np.fromfile(entry.path, np.uint8), [], 0
        for like in entry.like:
            end = start + nbytes(like)
            arrays.append(jax.device_put(raw[start:end].view(like.dtype).reshape(like.shape), like.sharding))
            start = end
        entry.path.unlink()
        self._count(read_bytes=start)
        return arrays

    def _count(self, **more: int) -> None:
        with self._lock:
            self._stats = self._stats._replace(**{name: getattr(self._stats, name) + n for name, n in more.items()})


def spill(
    f: Callable[..., Any],
    store: SpillStore,
    policy: ResidualPolicy | None = None,
    *,
    params: tuple[int, ...] = (0,),
    min_bytes: int = 4096,
) -> Callable[..., Any]:
    """Returns ``f`` such that what backward needs of it waits on disk.

    For a model run layer by layer outside jit, under `jax.grad` or `jax.vjp`: forward and backward of each layer are
    compiled, and Python hands their residuals to the store, which writes while the next layers run. What is read back
    is what was written, bit by bit. With a policy that is packed codes, an eighth of the bytes at 4 bits.

    It pays only where the disk keeps up with the computation: what `layers_to_offload` says. Eight MLP layers on two
    CPU cores, with 100 MB of residuals each, took 2.0 s a step with all kept in memory, 2.3 s with all computed again,
    2.3 s with spill, and 3.2 s where each write and read was waited for. Arrays on an accelerator go through host
    memory, and each layer costs a dispatch from Python; there the way that stays within one compiled program is
    `offload`.

    Args:
      f: a pure function of pytrees of arrays; `jax.jit` is applied to it.
      store: where residuals go; a ticket per call, so one store serves all layers.
      policy: how residuals are packed first; None keeps their bits.
      params: positions of the arguments that hold weights, which are kept by reference; they and what follows from them
        alone are never written.
      min_bytes: smaller residuals stay in memory.

    Returns:
      A function of the same positional arguments. Without differentiation it is ``f``, and may be traced.

    Raises:
      TypeError: (when differentiated) the arguments are traced: the function was called under jit, scan or vmap.
    """
    packed = compress_residuals(f, ResidualPolicy(bits=32) if policy is None else policy, params=params)
    programs: dict[Any, _Program] = {}

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return jax.jit(f)(*args)

    def forward(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise TypeError(
                "spill writes to disk between compiled layers, so it cannot be differentiated under jit, scan, vmap or "
                "a second grad; call it in a Python loop over layers, or use remat.offload inside a compiled program"
            )
        key = tree, tuple(jax.typeof(leaf) for leaf in leaves)
        if key not in programs:
            programs[key] = _Program(packed, params, min_bytes)
        program = programs[key]
        out, written, kept = program.forward(*args)
        return out, (np.int64(store.put(written)), kept, [args[i] for i in params], program)

    def backward(residuals: Any, slopes: Any) -> Any:
        ticket, kept, weights, program = residuals
        return program.pull(store.get(int(ticket)), kept, weights, slopes)

    run.defvjp(forward, backward)
    return functools.wraps(f)(run)


@jax.tree_util.register_static
class _Program:
    """Forward and backward of a function, compiled for arguments of one structure."""

    def __init__(self, f: Callable[..., Any], params: tuple[int, ...], min_bytes: int):
        self._f, self._params, self._min_bytes = f, params, min_bytes
        self.forward = jax.jit(self._forward)
        self._backward = jax.jit(self._pull)

    def _forward(self, *args: Any) -> tuple[Any, list[jax.Array], list[jax.Array]]:
        """Returns f's output, the residuals to be written, and those that stay."""
        out, vjp = jax.vjp(self._f, *args)
        residuals, self._vjp_tree = jax.tree.flatten(vjp)
        weights = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves([args[i] for i in self._params]))}
        places: dict[int, tuple[str, int]] = {}  # one per array, so none is written twice
        written: list[jax.Array] = []
        kept: list[jax.Array] = []
        for x in residuals:
            if id(x) in places:
                continue
            if id(x) in weights:
                places[id(x)] = "weights", weights[id(x)]
            elif nbytes(x) < self._min_bytes or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                places[id(x)] = "kept", len(kept)
                kept.append(x)
            else:
                places[id(x)] = "written", len(written)
                written.append(x)
        self._places = [places[id(x)] for x in residuals]
        self._args = jax.tree.map(jax.typeof, args)
        self._out = jax.tree.map(jax.typeof, out)
        return out, written, kept

    def pull(self, written: list[jax.Array], kept: list[jax.Array], weights: Any, slopes: Any) -> Any:
        """Returns the gradients of the arguments; None for those that are not floats."""
        floats = [slope for slope, x in zip(jax.tree.leaves(slopes), jax.tree.leaves(self._out)) if _is_float(x)]
        found = iter(self._backward(written, kept, weights, floats))
        return jax.tree.map(lambda x: next(found) if _is_float(x) else None, self._args)

    def _pull(
        self, written: list[jax.Array], kept: list[jax.Array], weights: Any, floats: list[jax.Array]
    ) -> list[jax.Array]:
        sources = {"written": written, "kept": kept, "weights": jax.tree.leaves(weights)}
        vjp = jax.tree.unflatten(self._vjp_tree, [sources[source][i] for source, i in self._places])
        rest = iter(floats)
        slopes = jax.tree.map(lambda x: next(rest) if _is_float(x) else np.zeros(x.shape, jax.dtypes.float0), self._out)
        gradients = zip(jax.tree.leaves(vjp(slopes)), jax.tree.leaves(self._args))
        return [gradient for gradient, x in gradients if _is_float(x)]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def layers_to_offload(bandwidth: float, times: Sequence[float], layer_bytes: Sequence[float]) -> int:
    """Returns how many of the first layers to offload so that a link of this bandwidth is hidden by computation.

    The first layers have the most time: their residuals are wanted back last. Before layer j is needed again, the
    link must write the layers before it and write and reload its own, within the forward pass and the part of the
    backward pass (at twice the time of forward) that runs until then. The first layer that does not fit, and all
    after it, are kept.

    Args:
      bandwidth: of the link, bytes per second.
      times: of each layer's forward pass, seconds.
      layer_bytes: of each layer's residuals as they are written.

    Raises:
      ValueError: lists of different lengths, or a bandwidth or time that is not positive.
    """
    if len(times) != len(layer_bytes) or bandwidth <= 0 or min(times, default=1) <= 0:
        raise ValueError(
            f"expected a positive bandwidth and a positive time and a size per layer, got {bandwidth=}, {times=}, "
            f"{layer_bytes=}"
        )
    total = sum(times)
    for j, own in enumerate(layer_bytes):
        if sum(layer_bytes[:j]) + 2 * own > bandwidth * (3 * total - 2 * sum(times[:j])):
            return j
    return len(times)
