"""MoS against factors concatenated shard by shard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import adapters
from memjax.adapters import AdapterBytes, mos
from memjax.core.bytes import nbytes
from memjax.core.paths import leaf_paths, map_with_path
from memjax.weights import Anchored, lift
from tests.adapters.small import KEY, X, constants_of, model, moved, outputs, params
from tests.random_views import array, assert_close

R, E, P, L = 6, 3, 1, 2


@functools.cache
def prepared():
    adapter = mos(R, E, P, L, alpha=12)
    return adapter, *adapter.prepare(KEY, params())


def explicit(frozen, theta):
    """Returns the factors of every layer, each vector concatenated from its shards."""
    factors = {}
    for path, indices in constants_of(frozen).items():
        pool, made = pool_of(theta, frozen, path), {}
        for name in "ab":
            shards, index = np.asarray(pool[name]), np.asarray(indices[f"{name}_index"])
            vectors = [np.concatenate([shards[i] for i in vector]) for vector in index.reshape(-1, L)]
            made[name] = np.reshape(vectors, (*index.shape[:-1], -1))
        factors[path] = {"a": jnp.swapaxes(made["a"], -1, -2), "b": jnp.asarray(made["b"])}
    return factors


def pool_of(theta, frozen, path):
    shape = dict(leaf_paths(frozen))[path].shape
    return theta[f"{shape[-2]}x{shape[-1]}"]


@pytest.mark.smoke
def test_factors_and_gradients_equal_explicit_concatenation():
    adapter, frozen, theta = prepared()
    views = dict(leaf_paths(adapter.attach(frozen, theta)))
    assert not any(np.any(view.deltas[0].b) for view in views.values())  # a fresh adapter changes nothing
    theta, lora = moved(theta), adapters.lora(R, alpha=12)
    expected = lora.attach(params(), explicit(frozen, theta))
    jax.tree.map(np.testing.assert_array_equal, adapter.attach(frozen, theta), expected)
    assert_close(adapter.merge(frozen, theta)[0], lora.merge(params(), explicit(frozen, theta))[0])

    def factors(theta):
        return {path: view.deltas[0] for path, view in leaf_paths(adapter.attach(frozen, theta))}

    by_layer = moved(jax.tree.map(jnp.zeros_like, factors(theta)), 1.0)
    (actual,) = jax.vjp(factors, theta)[1](by_layer)
    sums = jax.tree.map(lambda x: np.zeros(x.shape), theta)
    for path, indices in constants_of(frozen).items():
        for name, vectors in (("a", np.swapaxes(by_layer[path].a, -1, -2)), ("b", np.asarray(by_layer[path].b))):
            index = np.asarray(indices[f"{name}_index"])
            for i, shard in zip(index.reshape(-1), vectors.reshape(index.size, -1)):
                pool_of(sums, frozen, path)[name][i] += shard
    assert_close(actual, sums)


def test_scan_and_shard_map():
    """Data parallelism over 2 devices gives the gradient of one, and merged weights compute what attached ones do."""
    adapter, frozen, theta = prepared()
    theta = moved(theta)

    def loss(theta, x):
        return jnp.sum(jnp.sin(lift(model)(adapter.attach(frozen, theta), x)))

    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    value, grads = jax.jit(jax.value_and_grad(loss))(theta, X)
    assert_close(jax.jit(sharded)(theta, X), grads, 5e-6)
    assert_close(value, jnp.sum(jnp.sin(outputs(adapter.merge(frozen, theta)[0]))), 1e-5)


def test_bytes_equal_the_formula():
    adapter, frozen, theta = prepared()
    matrices = [(16, 24)] * 2 + [(24, 16)] * 2 + [(16, 16)]
    trained = E * sum(d_in + d_out for d_in, d_out in matrices)
    assert adapter.nbytes(params()) == AdapterBytes(4 * trained, 2 * R * L * len(matrices))
    assert (nbytes(theta), nbytes(frozen) - nbytes(params())) == adapter.nbytes(params())
    for equivalent, millions in ((2, 4.997), (8, 19.99), (64, 159.9)):  # the published budgets of LLaMA2-7B
        shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
        llama = {str(i): jax.ShapeDtypeStruct((32, *shape), jnp.float32) for i, shape in enumerate(shapes)}
        trained, indices = mos(64, equivalent, 1, 4, targets="*").nbytes(llama)
        assert trained / 4e6 == pytest.approx(millions, rel=1e-3)
        counts = {n: equivalent * 4 * 32 * n for n in (4, 2, 1)}  # shards in the pools of n matrices per layer
        assert indices == sum(32 * n * 2 * 64 * 4 * (1 if count <= 256 else 2) for n, count in counts.items())


def test_save_and_load(tmp_path):
    adapter, frozen, theta = prepared()
    adapter.save(tmp_path, theta, frozen)
    again, frozen_again, loaded = adapters.load(tmp_path, params())
    assert again == adapter
    jax.tree.map(np.testing.assert_array_equal, (frozen_again, loaded), (frozen, theta))


def with_indices(frozen, change):
    return map_with_path(lambda path, leaf: Anchored(leaf.base, change(path, leaf.constants), "mos"), frozen)


def test_whole_private_shards_in_order_are_lora():
    adapter = mos(3, 3, 0, 1)
    frozen, theta = adapter.prepare(KEY, params())
    theta = moved(theta)
    at = {}

    def in_order(path, constants):
        index = constants["a_index"]
        name = "x".join(map(str, dict(leaf_paths(params()))[path].shape[-2:]))
        start = at.get(name, 0)
        at[name] = start + index.size
        index = (start + jnp.arange(index.size)).reshape(index.shape)
        return {"a_index": index, "b_index": index}

    frozen = with_indices(frozen, in_order)
    lora = adapters.lora(3)
    factors = {}
    for path, w in leaf_paths(params()):
        pool = theta[f"{w.shape[-2]}x{w.shape[-1]}"]
        a, b = (pool[name].reshape(*w.shape[:-2], 3, -1) for name in "ab")
        factors[path] = {"a": jnp.swapaxes(a, -1, -2), "b": b}
    expected = lora.attach(params(), factors)
    jax.tree.map(np.testing.assert_array_equal, adapter.attach(frozen, theta), expected)


def usage(frozen, name):
    """Returns for each of the layers of shape 16 x 24 which shards of a pool it uses, how often."""
    index = np.asarray(constants_of(frozen)["w"][name])
    return [np.bincount(layer.reshape(-1), minlength=E * L * len(index)) for layer in index]


@pytest.mark.parametrize("sampling", ["balanced", "uniform"])
def test_subset_selection(sampling):
    layers = 5
    tree, (r, e, p, l) = {"w": jnp.zeros((layers, 16, 24))}, (8, E, P, L)
    frozen, _ = mos(r, e, p, l, sampling=sampling, targets="w").prepare(KEY, tree)
    public = (e - p) * l * layers
    for name in ("a_index", "b_index"):
        index = np.asarray(constants_of(frozen)["w"][name])
        assert index.dtype == np.uint8 and index.shape == (layers, r, l)
        assert all(len(set(vector)) == l for vector in index[:, : r - p].reshape(-1, l))  # without replacement
        counts = np.array(usage(frozen, name))
        assert np.all(counts[:, public:].sum(0) == 1)  # each private shard in one place
        assert np.all((counts[:, public:] > 0).sum(1) == p * l)
        total = counts[:, :public].sum(0)
        assert total.sum() == layers * (r - p) * l
        if sampling == "balanced":
            assert total.max() - total.min() <= 1
    a, b = (np.asarray(constants_of(frozen)["w"][name]) for name in ("a_index", "b_index"))
    assert not np.array_equal(a[:, : r - p], b[:, : r - p])  # pair dissociation


def test_private_shards_learn_from_one_layer_and_public_ones_move_those_that_use_them():
    layers, l = 4, 2
    tree = {"w": array(0, layers, 8, 8)}
    adapter = mos(6, E, P, l, targets="w")
    frozen, theta = adapter.prepare(KEY, tree)
    theta = moved(theta)
    public = (E - P) * l * layers

    @jax.jit
    def by_layer(theta):
        return jax.jacrev(lambda theta: jnp.sum(jnp.sin(adapter.attach(frozen, theta)["w"].materialize()), (1, 2)))(
            theta
        )

    for factor, name in (("a", "a_index"), ("b", "b_index")):
        moves = np.any(np.asarray(by_layer(theta)["8x8"][factor]), -1)  # [layers, n]
        assert np.all(moves[:, public:].sum(0) == 1)
        assert np.array_equal(moves, np.array(usage(frozen, name)) > 0)
        assert moves[:, :public].sum(0).max() > 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"shards": 1.5}, "shards must be"),
        ({"equivalent_rank": 20}, "expected private_rank <= equivalent_rank <= rank, got 1, 20, 16"),
        ({"private_rank": 4}, "private_rank 4 leaves no public shards for the other 12 ranks"),
        ({"sampling": "random"}, "sampling must be .* got 'random'"),
    ],
)
def test_settings_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        mos(**settings)


def test_what_does_not_fit_raises():
    with pytest.raises(ValueError, match="head/kernel: 16 inputs cannot be cut into 3 equal shards"):
        mos(4, 2, 1, 3).prepare(KEY, params())
    with pytest.raises(ValueError, match="head/kernel: rank 17 is larger"):
        mos(17, 2, 1, 2).prepare(KEY, params())
    adapter, frozen, theta = prepared()
    with pytest.raises(ValueError, match=r"no weight has indices: attach to the tree of"):
        adapter.attach(params(), theta)
    with pytest.raises(ValueError, match="layers/down/kernel: theta has no pools '24x16'"):
        adapter.attach(frozen, {name: pool for name, pool in theta.items() if name != "24x16"})
    short = {name: jax.tree.map(lambda x: x[:, 1:], pool) for name, pool in theta.items()}
    with pytest.raises(ValueError, match="head/kernel: the shards of pools '16x16' do not add up to 16x16"):
        adapter.attach(frozen, short)
