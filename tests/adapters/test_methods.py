"""What holds for every adapter: one row per method, one model, one reference.

A row says how the method is made, what it trains and keeps, and what dense tree it stands for. To add a method, add a
row to `METHODS`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax import adapters, codecs, weights
from memjax.core.bytes import nbytes
from memjax.core.paths import leaf_paths, map_with_path
from memjax.core.views import is_view
from memjax.weights import Anchored, lift, materialize
from tests.random_views import array, assert_close, kept_by_reverse_mode, moved

DEPTH, D, F, RANK, ROWS = 2, 8, 16, 2, 4
ALL = "**/kernel"
KERNELS = {"layers/k_proj/kernel": (DEPTH, D, F), "layers/down_proj/kernel": (DEPTH, F, D), "head/kernel": (1, D, D)}
"""Path -> (matrices, d_in, d_out)."""


def params(dtype=jnp.float32):
    """Returns a packed stack of layers, one kernel of which has a bias, and a dense head."""
    layers = {
        "k_proj": {"kernel": array(1, DEPTH, D, F, dtype=dtype) / 4, "bias": array(2, DEPTH, F, dtype=dtype)},
        "down_proj": {"kernel": array(3, DEPTH, F, D, dtype=dtype) / 4},
    }
    tree = {"layers": layers, "head": {"kernel": array(4, D, D, dtype=dtype) / 4}}
    return weights.quantize(tree, codecs.int4(group=4), where="layers/**/kernel")


BASE, INPUT = params(), array(9, ROWS, D)


def linear(p, x):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def layer(p, x):
    return x + jnp.tanh(linear(p["down_proj"], jnp.tanh(linear(p["k_proj"], x))))


def model(params, x):
    x = lax.scan(lambda x, p: (layer(p, x), None), x, params["layers"])[0]
    return linear(params["head"], x)


def by_hand(params, x):
    """Returns (the outputs of every layer for x, the output of the model), on dense params."""
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(DEPTH)]
    each = jnp.stack([layer(p, x) for p in layers])
    return each, linear(params["head"], functools.reduce(lambda x, p: layer(p, x), layers, x))


@functools.cache
def unadapted():
    """Returns the same for the params themselves, in float64."""
    return jax.jit(by_hand)(materialize(params(jnp.float64)), INPUT.astype(jnp.float64))


def through_transforms(params, x):
    """Returns the same from lifted parts: by vmap over the params, and by shard_map over scan of checkpoint."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def in_turn(layers, x):
        return lax.scan(lambda x, p: (jax.checkpoint(lift(layer))(p, x), None), x, layers)[0]

    each = jax.vmap(lift(layer), in_axes=(0, None))(params["layers"], x)
    sharded = jax.shard_map(in_turn, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(params["layers"], x)
    return each, lift(linear)(params["head"], sharded)


# ---- rows ---------------------------------------------------------------------------------------------------------


Matrix = Callable[[jax.Array, dict[str, jax.Array], dict[str, jax.Array]], jax.Array]


@dataclass(frozen=True)
class Method:
    """What is known of a method.

    Attributes:
      make: the factory, with settings.
      trained: numbers that are trained, given (path, matrices, d_in, d_out).
      kept: numbers that are kept as constants.
      weight: the dense weight that the method stands for, given (what prepare left of the weight, factors, constants),
        all with the batch axis in front if there is one.
      tree: in place of ``weight``, for methods that change more than kernels: (dense tree, theta) -> dense tree.
      starts_as_base: whether a fresh adapter changes nothing, also on a packed base.
      merges: whether the adapted weights have a dense form.
    """

    make: Callable[..., adapters.Adapter]
    trained: Callable[[str, int, int, int], int]
    kept: Callable[[str, int, int, int], int] = lambda path, n, d_in, d_out: 0
    weight: Matrix | None = None
    tree: Callable[[Any, Any], Any] | None = None
    starts_as_base: bool = True
    merges: bool = True


def low_rank(path, n, d_in, d_out):
    return n * RANK * (d_in + d_out)


def plus_product(w, f, c):
    return w + 2 * f["a"] @ f["b"]


def dora_weight(w, f, c):
    direction = plus_product(w, f, c)
    norm = lax.stop_gradient(jnp.linalg.norm(direction, axis=-2))
    return direction * (f["m"] / norm)[..., None, :]


SHARED = (array(70, F, 3), array(71, 3, F))


def vera_weight(shared, w, f, c):
    a, b = shared[0][: w.shape[-2]], shared[1][:, : w.shape[-1]]
    return w + (a * f["d"][..., None, :]) @ (b * f["b"][..., None, :])


def ia3_tree(tree, theta):
    tree = jax.tree.map(lambda x: x, tree)
    for path, factors in theta.items():
        place = functools.reduce(lambda t, name: t[name], path.split("/")[:-1], tree)
        if "row" in factors:
            place["kernel"] = place["kernel"] * factors["row"][..., :, None]
            continue
        place["kernel"] = place["kernel"] * factors["column"][..., None, :]
        if "bias" in place:
            place["bias"] = place["bias"] * factors["column"]
    return tree


def bias_tree(tree, theta):
    tree = jax.tree.map(lambda x: x, tree)
    for path, factors in theta.items():
        place = functools.reduce(lambda t, name: t[name], path.split("/")[:-1], tree)
        place["bias"] = place.get("bias", 0) + next(iter(factors.values()))
    return tree


def lamda_weight(w, f, c):
    return w + 2 * c["a"] @ (f["s"] @ f["b"] - c["start"])


def snell_weight(w, f, c):
    """Returns w plus the largest 30 % of the entries of D_0 - D_1, the distance matrices of both heads."""

    def distances(h):
        p, q = (f[name].reshape(-1, 2, *f[name].shape[-2:])[:, h] for name in "pq")
        return jnp.sqrt(jnp.sum((p[:, :, None, :] - q[:, None, :, :]) ** 2, -1))

    delta = distances(0) - distances(1)
    magnitude = lax.stop_gradient(jnp.abs(delta)).reshape(len(delta), -1)
    bar = jnp.sort(magnitude)[:, -math.ceil(0.3 * magnitude.shape[1]), None]
    return w + jnp.where(magnitude >= bar, delta.reshape(magnitude.shape), 0).reshape(w.shape)


LOW_RANK = {"rank": RANK, "alpha": 4, "targets": ALL}
METHODS = {
    "lora": Method(functools.partial(adapters.lora, **LOW_RANK), low_rank, weight=plus_product),
    "dora": Method(
        functools.partial(adapters.dora, **LOW_RANK),
        lambda path, n, d_in, d_out: n * (RANK * (d_in + d_out) + d_out),
        lambda path, n, d_in, d_out: n * d_out,
        weight=dora_weight,
    ),
    "pissa": Method(
        functools.partial(adapters.pissa, **LOW_RANK), low_rank, low_rank, weight=plus_product, starts_as_base=False
    ),
    "olora": Method(
        functools.partial(adapters.olora, **LOW_RANK), low_rank, low_rank, weight=plus_product, starts_as_base=False
    ),
    "vera": Method(
        functools.partial(adapters.vera, 3, targets=ALL, shared=SHARED),
        lambda path, n, d_in, d_out: n * (3 + d_out),
        weight=functools.partial(vera_weight, SHARED),
    ),
    "lora_fa": Method(
        functools.partial(adapters.lora_fa, **LOW_RANK),
        lambda path, n, d_in, d_out: n * RANK * d_out,
        lambda path, n, d_in, d_out: n * RANK * d_in,
        weight=lambda w, f, c: w + 2 * c["a"] @ f["b"],
    ),
    "lamda": Method(
        functools.partial(adapters.lamda, **LOW_RANK),
        lambda path, n, d_in, d_out: n * (RANK**2 + RANK * d_out),
        low_rank,
        weight=lamda_weight,
    ),
    "ce_ssl": Method(
        functools.partial(adapters.ce_ssl, **LOW_RANK, deactivation=0.25),
        low_rank,
        weight=lambda w, f, c: w + 0.75 * 2 * f["a"] @ f["b"],
    ),
    "snell": Method(
        functools.partial(adapters.snell, RANK, keep=0.3, scale=1.0, targets=ALL),
        low_rank,
        lambda path, n, d_in, d_out: n,
        weight=snell_weight,
        starts_as_base=False,
    ),
    "ia3": Method(
        functools.partial(adapters.ia3, targets="**/{k,down}_proj/kernel"),
        lambda path, n, d_in, d_out: {"k_proj": n * d_out, "down_proj": n * d_in}.get(path.split("/")[-2], 0),
        tree=ia3_tree,
    ),
    "bias_only": Method(
        functools.partial(adapters.bias_only, kernels=["**/down_proj/kernel", "head/kernel"]),
        lambda path, n, d_in, d_out: n * d_out,
        tree=bias_tree,
        merges=False,
    ),
}


def dense_tree(method, frozen, theta):
    """Returns the dense params that ``theta`` on ``frozen`` stands for, by the method's formula."""
    leaves = dict(leaf_paths(frozen))
    tree = map_with_path(lambda _, leaf: materialize(leaf.base if isinstance(leaf, Anchored) else leaf), frozen)
    if method.tree is not None:
        return method.tree(tree, theta)

    def change(path, w):
        if path not in theta:
            return w
        constants = leaves[path].constants if isinstance(leaves[path], Anchored) else {}
        return method.weight(w, theta[path], constants)

    return map_with_path(change, tree)


@functools.cache
def prepared(name):
    """Returns (adapter, frozen, factors as after some training)."""
    adapter = METHODS[name].make()
    frozen, theta = adapter.prepare(jax.random.key(0), BASE)
    return adapter, frozen, moved(theta)


each_method = pytest.mark.parametrize("name", METHODS)


# ---- laws ---------------------------------------------------------------------------------------------------------


@each_method
def test_values_and_gradients_are_those_of_the_dense_weight(name):
    """In float64, on packed and dense weights, through every transform; and a fresh adapter changes nothing."""
    method = METHODS[name]
    with jax.enable_x64(True):
        base, x = params(jnp.float64), INPUT.astype(jnp.float64)
        adapter = method.make(dtype=jnp.float64)
        frozen, theta = jax.jit(adapter.prepare)(jax.random.key(0), base)

        def run(fn, theta, x):
            y, back = jax.vjp(fn, theta, x)
            return y, back(jax.tree.map(jnp.cos, y))

        @jax.jit
        def both(theta):
            return (
                run(lambda theta, x: through_transforms(adapter.attach(frozen, theta), x), theta, x),
                run(lambda theta, x: by_hand(dense_tree(method, frozen, theta), x), theta, x),
            )

        actual, expected = both(moved(theta))
        assert_close(actual, expected, 1e-12)
        for leaf in jax.tree.leaves(actual):
            assert leaf.dtype == jnp.float64 and np.any(leaf)
        if method.starts_as_base:
            assert_close(both(theta)[0][0], unadapted(), 1e-14)


@each_method
def test_numbers_and_bytes_are_the_formula(name):
    method = METHODS[name]
    adapter, frozen, theta = prepared(name)
    trained = sum(method.trained(path, *sizes) for path, sizes in KERNELS.items())
    kept = sum(method.kept(path, *sizes) for path, sizes in KERNELS.items())
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == trained
    assert nbytes(frozen) - nbytes(BASE) == 4 * kept
    given = nbytes(SHARED) if name == "vera" else 0
    assert adapter.nbytes(BASE) == (4 * trained, 4 * kept + given)
    assert adapter.nbytes(jax.eval_shape(params)) == (4 * trained, 4 * kept + given)


@each_method
def test_reverse_mode_keeps_no_dense_weight(name):
    adapter, frozen, theta = prepared(name)

    def loss(theta):
        return jnp.sum(lift(model)(adapter.attach(frozen, theta), INPUT[:2]) ** 2)

    for leaf in kept_by_reverse_mode(loss, theta):
        assert leaf.size < D * F or leaf.dtype in (jnp.uint8, jnp.uint16), (leaf.dtype, leaf.shape)


@each_method
def test_merged_weights_are_the_dense_weights(name):
    method = METHODS[name]
    adapter, frozen, theta = prepared(name)
    if not method.merges:
        with pytest.raises(ValueError, match="have no bias leaf"):
            adapter.merge(frozen, theta)
        return
    merged, report = adapter.merge(frozen, theta, to="dense")
    adapted = {path for path in theta if path in KERNELS}
    assert set(report) == adapted and all(error.max_abs == 0 for error in report.values())
    assert_close(merged, jax.jit(functools.partial(dense_tree, method))(frozen, theta), 2e-6)
    same, report = adapter.merge(frozen, theta)
    for path, leaf in leaf_paths(same):
        assert is_view(leaf) == is_view(dict(leaf_paths(BASE))[path])
    assert all((error.relative_frobenius > 0) == path.startswith("layers") for path, error in report.items())


@each_method
def test_save_and_load(name, tmp_path):
    adapter, frozen, theta = prepared(name)
    adapter.save(tmp_path, theta, frozen)
    again, frozen_again, theta_again = adapters.load(tmp_path, BASE)
    assert type(again) is type(adapter) and again.settings() == adapter.settings()
    for before, after in zip(
        jax.tree.leaves((frozen, theta)), jax.tree.leaves((frozen_again, theta_again)), strict=True
    ):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    again.save(tmp_path / "b", theta_again, frozen_again)
    for file in tmp_path.glob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@each_method
def test_partition_specs_fit_the_leaves(name):
    adapter, frozen, theta = prepared(name)
    for tree in (frozen, jax.eval_shape(adapter.attach, frozen, theta, jax.random.key(1))):
        for path, view in leaf_paths(tree):
            if not is_view(view):
                continue
            axes = ("layer", "in", "out")[-view.ndim :]
            specs = view.specs(axes)
            assert jax.tree.structure(specs) == jax.tree.structure(view)
            for leaf, spec in zip(jax.tree.leaves(view), jax.tree.leaves(specs)):
                assert len(spec) <= leaf.ndim, (path, leaf.shape, spec)
                assert view.ndim == 2 or spec[0] == "layer"
                assert all(size == view.shape[-1] for size, entry in zip(leaf.shape, spec) if entry == "out")


@each_method
def test_factors_that_do_not_fit_raise(name):
    adapter, frozen, theta = prepared(name)
    path = next(path for path in theta if path in KERNELS)
    factor, value = next(iter(theta[path].items()))
    factor, value = next((name, value) for name, value in theta[path].items() if value.ndim)
    with pytest.raises(ValueError, match=rf"{path}: expected .*{factor}"):
        adapter.attach(frozen, {path: {"surprise": value}})
    with pytest.raises(ValueError, match=rf"{path}: expected .*\(1,"):
        adapter.attach(frozen, {path: theta[path] | {factor: value[:1]}})
    with pytest.raises(ValueError, match=r"factors for \['elsewhere'\], which are no leaves"):
        adapter.attach(frozen, {"elsewhere": theta[path]})
    if adapter.anchored:
        with pytest.raises(ValueError, match=rf"{path}: {adapter.method} keeps constants in the frozen tree"):
            adapter.attach(BASE, theta)
        with pytest.raises(ValueError, match=r"save\(folder, theta, frozen\)"):
            adapter.save("nowhere", theta)
