import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj

D, T, L = 32, 64, 3


def block(p, x, ids):
    h = jnp.tanh(x @ p["in"])
    return x + h * jnp.sin(h) @ p["out"] + p["table"][ids], ids + 1


def layers():
    keys = jax.random.split(jax.random.key(0), 3 * L)
    shapes = {"in": (D, D), "out": (D, D), "table": (5, D)}
    return [
        {name: jax.random.normal(keys[3 * i + j], s) / 6 for j, (name, s) in enumerate(shapes.items())}
        for i in range(L)
    ]


X, IDS = jax.random.normal(jax.random.key(1), (T, D)), jnp.arange(T) % 2


def loss(f):
    def value(layers, x):
        ids = IDS
        for p in layers:
            x, ids = f(p, x, ids)
        return jnp.sum(x * jnp.cos(x))

    return jax.value_and_grad(value, (0, 1))


def compiled(f):
    """The function with its forward and backward compiled layer by layer, nothing spilled."""
    return jax.jit(f)


def residual_bytes():
    """Of one layer, weights excepted: x, tanh, its slope and sin and cos are distinct arrays; found by tracing."""
    p = layers()[0]
    leaves = jax.tree.leaves(jax.eval_shape(lambda p, x: jax.vjp(lambda p, x: block(p, x, IDS)[0], p, x)[1], p, X))
    return sum(x.size * x.dtype.itemsize for x in leaves if x.shape == X.shape)


def test_gradients_are_bit_for_bit_those_of_the_compiled_layers(tmp_path):
    expected = loss(compiled(block))(layers(), X)
    with mj.remat.SpillStore(tmp_path) as store:
        got = loss(mj.remat.spill(block, store))(layers(), X)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert 0 < store.stats.read_bytes + store.stats.forwarded_bytes == L * residual_bytes()
        again = loss(mj.remat.spill(block, store))(layers(), X)  # the store serves any number of steps
        jax.tree.map(np.testing.assert_array_equal, again, expected)
    assert list(tmp_path.iterdir()) == []


def wait_for_writes(store):
    for entry in list(store._entries.values()):
        entry.write.result()


def test_bytes_on_disk_are_those_of_the_residuals_and_files_go_when_read(tmp_path):
    store = mj.remat.SpillStore(tmp_path)
    f = mj.remat.spill(block, store)
    pulls, x, ids = [], X, IDS
    for p in layers():
        (x, ids), pull = jax.vjp(lambda p, x, ids=ids: f(p, x, ids), p, x)
        pulls.append(pull)
    wait_for_writes(store)
    files = sorted(store.folder.iterdir())
    assert [file.stat().st_size for file in files] == [residual_bytes()] * L
    assert store.stats == mj.remat.SpillStats(written_bytes=L * residual_bytes())
    slope = jnp.cos(x)
    for pull in reversed(pulls):
        _, slope = pull((slope, np.zeros(T, jax.dtypes.float0)))
    assert store.stats.read_bytes == L * residual_bytes() and store.stats.forwarded_bytes == 0
    assert list(store.folder.iterdir()) == []
    with pytest.raises(KeyError):
        pulls[0]((slope, np.zeros(T, jax.dtypes.float0)))
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_casts_of_weights_are_not_written_and_a_policy_packs_the_rest(tmp_path):
    def cast(p, x):
        return jnp.sin(x.astype(jnp.bfloat16) @ p["in"].astype(jnp.bfloat16))

    policy = mj.remat.ResidualPolicy(8, 32, inputs="**", min_size=1)
    with mj.remat.SpillStore(tmp_path) as store:
        for given, expected in ((None, 2 * 2 * X.size), (policy, 2 * X.size * (1 + 4 / 32))):  # x and the cosine
            before = store.stats.written_bytes
            _, pull = jax.vjp(lambda *args, p=given: mj.remat.spill(cast, store, p, min_bytes=1)(*args), layers()[0], X)
            wait_for_writes(store)
            assert store.stats.written_bytes - before == expected
            pull(jnp.ones((T, D), jnp.bfloat16))


def test_what_is_wanted_before_it_is_written_is_forwarded(tmp_path, monkeypatch):
    go, started = threading.Event(), threading.Event()
    write = mj.remat.SpillStore._write

    def slow(self, entry):
        started.set()
        assert go.wait(10)
        write(self, entry)

    monkeypatch.setattr(mj.remat.SpillStore, "_write", slow)
    store = mj.remat.SpillStore(tmp_path, threads=1)
    arrays = [X, IDS, X.astype(jnp.bfloat16)]
    first, second = store.put(arrays), store.put(arrays)
    assert started.wait(10)
    for ticket in (second, first):  # one that waits to be written, one whose write is under way
        for got, x in zip(store.get(ticket), arrays):
            assert got is x
    go.set()
    store._pool.shutdown()
    size = sum(x.nbytes for x in arrays)
    assert store.stats == mj.remat.SpillStats(size, 0, 2 * size)  # the second was never written
    assert list(store.folder.iterdir()) == []


def test_reads_run_ahead_in_reverse_order(tmp_path):
    with mj.remat.SpillStore(tmp_path, read_ahead=1, threads=1, in_flight=8) as store:
        tickets = [store.put([X + i]) for i in range(4)]
        wait_for_writes(store)
        store.get(tickets[3])
        ahead = store._entries[tickets[2]].read
        assert ahead is not None and store._entries[tickets[1]].read is None
        np.testing.assert_array_equal(ahead.result()[0], X + 2)
        np.testing.assert_array_equal(store.get(tickets[2])[0], X + 2)


def test_a_write_that_fails_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    store = mj.remat.SpillStore(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    ticket = store.put([X])
    store._entries[ticket].write.exception()
    with pytest.raises(OSError, match="no space left"):
        store.get(ticket)
    assert list(store.folder.iterdir()) == []


def test_a_store_that_is_dropped_leaves_nothing(tmp_path):
    store = mj.remat.SpillStore(tmp_path)
    store.put([X])
    wait_for_writes(store)
    assert len(list(tmp_path.rglob("*.bin"))) == 1
    del store
    assert list(tmp_path.iterdir()) == []


def test_it_says_where_it_cannot_run(tmp_path):
    with mj.remat.SpillStore(tmp_path) as store:
        f = mj.remat.spill(block, store)
        with pytest.raises(TypeError, match="cannot be differentiated under jit, scan, vmap"):
            jax.jit(loss(f))(layers(), X)
        jax.jit(f)(layers()[0], X, IDS)  # without differentiation nothing is kept
    with pytest.raises(ValueError, match="threads=0"):
        mj.remat.SpillStore(tmp_path, threads=0)
    with pytest.raises(FileNotFoundError):
        mj.remat.SpillStore(tmp_path / "missing")


@pytest.mark.parametrize(
    "bandwidth,layers",
    [
        # Four layers of 1 s and 1 byte: bytes moved before layer j is needed are 2, 3, 4, 5 in 12, 10, 8, 6 s.
        (0.1, 0),
        (0.2, 1),
        (0.3, 2),
        (0.4, 2),
        (0.5, 3),
        (0.8, 3),
        (0.9, 4),
    ],
)
def test_the_rule_of_how_many_layers(bandwidth, layers):
    assert mj.remat.layers_to_offload(bandwidth, [1.0] * 4, [1.0] * 4) == layers


def test_the_rule_with_unequal_layers():
    # 2 s and 8 B, 1 s and 2 B, 3 s and 20 B: 16 B in 18 s, 8 + 4 B in 14 s, 10 + 40 B in 12 s.
    assert [mj.remat.layers_to_offload(b, [2, 1, 3], [8, 2, 20]) for b in (0.88, 0.9, 4.1, 4.2)] == [0, 2, 2, 3]
    assert mj.remat.layers_to_offload(1.0, [], []) == 0
    with pytest.raises(ValueError, match="a positive time and a size per layer"):
        mj.remat.layers_to_offload(1.0, [1.0], [])
