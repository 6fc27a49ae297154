"""Attention of a sequence that is split over devices, against that of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from memjax import parallel
from memjax.attention import attend, masks

B, S, H, HK, D, N = 2, 128, 8, 4, 8, 4
SPLIT = P(None, "seq")
DOCUMENTS = jnp.asarray(np.repeat([[3, 1, 2], [7, 7, 9]], [40, 30, 58], axis=1), jnp.int32)


def mesh(n=N):
    return Mesh(np.asarray(jax.devices()[:n]), ("seq",), axis_types=(AxisType.Auto,))


def arrays(heads=(H, HK, HK), size=S):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, (B, size, h, D)) for key, h in zip(keys, (*heads, heads[0])))
    return (q, k, v), do


def sharded(n=N, documents=None, **options):
    """Returns ``(q, k, v) -> out``, whole arrays that are split in between."""

    def run(q, k, v):
        order, back = (
            parallel.balanced_order(q.shape[1], n) if options.get("balanced") else (np.arange(q.shape[1]),) * 2
        )
        parts = [q, k, v] if documents is None else [q, k, v, documents]

        def local(q, k, v, ids=None):
            return parallel.attend_sharded(q, k, v, axis="seq", segment_ids=ids, **options)

        out = jax.shard_map(local, mesh=mesh(n), in_specs=SPLIT, out_specs=SPLIT)(*(x[:, order] for x in parts))
        return out[:, back]

    return run


def value_and_gradients(fn, qkv, do):
    @jax.jit
    def both(qkv, do):
        out, back = jax.vjp(fn, *qkv)
        return out, *back(do)

    return both(qkv, do)


CAUSAL = masks.causal()
CASES = {
    "ring, causal": {"mask": CAUSAL},
    "ring, balanced, documents": {"mask": CAUSAL, "balanced": True, "documents": DOCUMENTS},
    "ring, window and sinks": {
        "mask": CAUSAL & (masks.window(20, 0) | masks.sink(3)),
        "softcap": 2.0,
        "blocks": (32, 16),
    },
    "ring, rows without keys": {"mask": masks.window(-5, 12), "scale": 0.5},
    "ring, blocks": {"mask": masks.blocks(np.random.default_rng(0).random((1, HK, 8, 8)) < 0.4, 16)},
    "heads, causal": {"mask": CAUSAL, "method": "heads"},
    "heads, balanced, documents": {"mask": CAUSAL, "method": "heads", "balanced": True, "documents": DOCUMENTS},
}


@pytest.mark.parametrize("name", CASES)
def test_many_devices_give_what_one_does(name):
    options = dict(CASES[name])
    qkv, do = arrays()
    found = value_and_gradients(sharded(**options), qkv, do)
    alone = {k: options[k] for k in ("mask", "softcap", "scale") if k in options}
    alone = functools.partial(attend, implementation="reference", segment_ids=options.get("documents"), **alone)
    for a, b in zip(found, value_and_gradients(alone, qkv, do)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_fewer_key_heads_than_devices():
    qkv, do = arrays((8, 2, 2))
    found = value_and_gradients(sharded(8, mask=CAUSAL, method="heads"), qkv, do)
    for a, b in zip(found, value_and_gradients(sharded(8, mask=CAUSAL, balanced=True), qkv, do)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_no_device_holds_all_keys():
    size, n = 2048, 8
    (q, k, v), do = arrays(size=size)

    def local(q, k, v, do):
        run = functools.partial(parallel.attend_sharded, axis="seq", mask=CAUSAL, blocks=(32, 32))
        return jax.vjp(run, q, k, v)[1](do)

    run = jax.jit(jax.shard_map(local, mesh=mesh(n), in_specs=SPLIT, out_specs=SPLIT))
    text = run.lower(q, k, v, do).compile().as_text()
    sizes = [np.prod(list(map(int, shape.split(",")))) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) == q.size // n < k.size  # nor all scores of two parts: S / n squared, for each head
    assert q.size // n < H * (size // n) ** 2


def test_balanced_order_shares_a_causal_mask():
    order, back = parallel.balanced_order(48, 4)
    np.testing.assert_array_equal(order[back], np.arange(48))
    assert order[:12].tolist() == [*range(6), *range(42, 48)]
    assert {int(part.sum() + part.size) for part in order.reshape(4, 12)} == {int(np.arange(1, 49).sum() / 4)}


def test_what_does_not_fit_is_refused():
    qkv, _ = arrays((6, 3, 3))
    with pytest.raises(ValueError, match="cannot split 6 and 3 heads over 4 devices; 'ring' can"):
        sharded(method="heads")(*qkv)
    with pytest.raises(ValueError, match="method must be 'ring' or 'heads', got 'tree'"):
        sharded(method="tree")(*qkv)
    with pytest.raises(ValueError, match="a multiple of 2 n = 8 tokens, got 12"):
        parallel.balanced_order(12, 4)
