"""A layered model on meshes: sums and gradients of one device, what travels, what a device holds."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from memjax import adapters, codecs, optim, parallel, remat, weights
from memjax.core.bytes import compiled_bytes, nbytes
from memjax.weights import lift

LAYERS, WIDTH, WIDE, BATCH = 8, 64, 128, 8
ROLES = {"columns": "layers/up/kernel", "rows": "layers/down/kernel"}


def embed(params, batch):
    return params["embed"][batch["x"]]


def block(layer, x, batch, index):
    y = jnp.tanh(x * layer["norm"]) @ layer["up"]["kernel"]
    return x + jnp.tanh(y) @ layer["down"]["kernel"] / WIDE


def head(params, x, batch):
    return (batch["w"][:, None] * jnp.square(x @ params["head"])).sum(), batch["w"].sum()


PARTS = optim.LossParts(embed, block, head)


def reference(params, batch):
    x = embed(params, batch)
    for i in range(LAYERS):
        x = block(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), x, batch, i)
    return head(params, x, batch)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def job():
    """Frozen weights in int4, an adapter, its factors and a batch."""
    layers = {"norm": 1 + normal(0, LAYERS, WIDTH) / 9}
    layers |= {"up": {"kernel": normal(1, LAYERS, WIDTH, WIDE)}, "down": {"kernel": normal(2, LAYERS, WIDE, WIDTH)}}
    params = {"embed": normal(3, 16, WIDTH), "head": normal(4, WIDTH, 16), "layers": layers}
    frozen = weights.quantize(params, codecs.int4(group=16))
    adapter = adapters.lora(rank=4, alpha=4.0, targets="**/kernel")
    theta = jax.tree.map(lambda leaf: leaf + normal(5, *leaf.shape) / 9, adapter.init(jax.random.key(0), frozen))
    return frozen, adapter, theta, {"x": jnp.arange(BATCH) % 16, "w": jnp.linspace(0.5, 1, BATCH)}


def mean_of(sums, attach):
    def loss(theta, frozen, batch):
        total, count = sums(attach(frozen, theta), batch)
        return total / count

    return loss


def placed(job, mesh):
    frozen, adapter, theta, batch = job
    places = parallel.shardings((frozen, theta), mesh, attach=adapter.attach, **ROLES)
    frozen, theta = jax.device_put((frozen, theta), places)
    return (theta, frozen, jax.device_put(batch, parallel.batch_sharding(mesh))), places


def compiled_on(job, sizes, **options):
    mesh = parallel.make_mesh(sizes)
    arguments, places = placed(job, mesh)
    loss = mean_of(parallel.on_mesh(PARTS, mesh, **ROLES, **options), job[1].attach)
    return jax.jit(jax.value_and_grad(loss), out_shardings=(None, places[1])).lower(*arguments).compile(), arguments


@pytest.mark.parametrize("sizes", ["data=4", "fsdp=4", "data=2,fsdp=2,model=2"])
def test_sums_and_gradients_are_those_of_one_device(job, sizes):
    frozen, adapter, theta, batch = job
    expected = jax.jit(jax.value_and_grad(mean_of(lift(reference), adapter.attach)))(theta, frozen, batch)
    compiled, arguments = compiled_on(job, sizes)
    value, grads = compiled(*arguments)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for got, want, at in zip(*map(jax.tree.leaves, (grads, expected[1], arguments[0])), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))
        assert got.sharding.is_equivalent_to(at.sharding, got.ndim)


def collectives(compiled, name):
    """Returns the shapes of all results of a collective."""
    found = re.findall(rf" = (.*?) {name}(?:-start)?\(", compiled.as_text())
    return [tuple(map(int, dims.split(","))) for line in found for dims in re.findall(r"\[([\d,]+)\]", line)]


def test_of_split_weights_one_layer_at_a_time_is_gathered(job):
    compiled, _arguments = compiled_on(job, "fsdp=4")
    gathered = collectives(compiled, "all-gather")
    own = {leaf.shape[1:] for leaf in jax.tree.leaves([job[0]["layers"], job[2]])}
    around = {job[0]["embed"].shape, job[0]["head"].shape}
    assert set(gathered) <= own | around and (WIDTH // 2, WIDE) in gathered, "packed codes travel, of one layer"
    assert not any(shape[0] == LAYERS for shape in gathered if len(shape) > 2)
    # Gradients come back split: a quarter of each factor of a layer.
    factors = {(WIDTH // 4, 4), (1, WIDE), (WIDE // 4, 4), (1, WIDTH)}
    assert set(collectives(compiled, "reduce-scatter")) == factors
    assert not [shape for shape in collectives(compiled, "all-reduce") if len(shape) > 1]


def test_backward_gathers_again_instead_of_keeping(job):
    """Kept, the gathered layers would be as many bytes as all weights."""
    layers = nbytes(job[0]["layers"])
    split, whole = (compiled_bytes(compiled_on(job, sizes)[0]) for sizes in ("fsdp=4", "data=4"))
    assert split.argument < 0.35 * whole.argument
    assert split.temp < whole.temp + layers / 2
    assert split.total < 0.75 * whole.total


def test_a_policy_holds_where_layers_are_gathered(job):
    rows = 4096
    large = *job[:3], {"x": jnp.arange(rows) % 16, "w": jnp.ones(rows)}
    full = functools.partial(remat.checkpoint, params=(1,), prevent_cse=False)
    kept, again = (
        compiled_bytes(compiled_on(large, "fsdp=4", checkpoint=checkpoint)[0]).temp for checkpoint in (None, full)
    )
    inputs, inner = LAYERS * rows // 4 * WIDTH * 4, LAYERS * rows // 4 * WIDE * 4
    assert inputs < again < inputs + inner and kept > again + 0.9 * inner, (kept, again, inputs, inner)
    compiled, arguments = compiled_on(job, "fsdp=4", checkpoint=full)
    expected, _ = compiled_on(job, "fsdp=4")
    for got, want in zip(*map(jax.tree.leaves, (compiled(*arguments), expected(*arguments))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert set(collectives(compiled, "all-gather")) == set(collectives(expected, "all-gather"))


def test_rows_after_columns_are_summed_twice_a_layer(job):
    compiled, _ = compiled_on(job, "model=2")
    # Once in forward and once in backward of this block, and no other array of activations.
    assert collectives(compiled, "all-reduce").count((BATCH, WIDTH)) == 2
    assert not collectives(compiled, "all-gather")


def test_bytes_of_a_device(job):
    frozen, _adapter, theta, _ = job
    for sizes, parts in (("data=2", 1), ("fsdp=4", 4), ("fsdp=2,model=2", 4)):
        (theta_here, frozen_here, _), _ = placed(job, parallel.make_mesh(sizes))
        vectors = frozen["layers"]["norm"].nbytes
        around = frozen["embed"].nbytes + frozen["head"].nbytes
        expected = (
            vectors
            + (nbytes(frozen["layers"]) - vectors) / parts
            + around / (parts if sizes == "fsdp=4" else parts / 2 if parts > 1 else 1)
        )
        assert parallel.device_bytes(frozen_here) == pytest.approx(expected, rel=0.05)
        if "model" not in sizes:  # which keeps A of columns and B of rows whole
            assert parallel.device_bytes(theta_here) == nbytes(theta) / parts


def test_devices_drop_different_inputs(job):
    """The rows of a batch that are alike on two devices do not stay alike where inputs are dropped."""
    frozen, _, theta, _batch = job
    adapter = adapters.lora(rank=4, alpha=4.0, targets="**/kernel", dropout=0.5)
    mesh = parallel.make_mesh("data=2")
    same = {"x": jnp.zeros(2, jnp.int32), "w": jnp.asarray([1.0, -1.0])}
    sums = jax.jit(parallel.on_mesh(PARTS, mesh))
    assert abs(sums(adapter.attach(frozen, theta), same)[0]) < 1e-3
    assert abs(sums(adapter.attach(frozen, theta, jax.random.key(1)), same)[0]) > 1e-2


def test_what_cannot_be_split_is_named(job):
    frozen, _, _, batch = job
    mesh = parallel.make_mesh("data=4")
    with pytest.raises(ValueError, match="a batch of 6 is not divisible among 4 devices"):
        parallel.on_mesh(PARTS, mesh)(frozen, jax.tree.map(lambda leaf: leaf[:6], batch))
    mesh = parallel.make_mesh("model=8")
    with pytest.raises(ValueError, match=r"layers/down/kernel: sharding axis .* would cut a quantization group"):
        parallel.specs(
            weights.quantize({"layers": {"down": {"kernel": normal(0, 2, 64, 8)}}}, codecs.int4(group=16)),
            mesh,
            **ROLES,
        )
    dora = adapters.dora(rank=4, alpha=4.0, targets="**/kernel")
    snell = adapters.snell(rank=4, targets="**/kernel")
    for method, name in ((dora, "Rescaled"), (snell, "Kernelized")):
        attached = method.attach(*method.prepare(jax.random.key(0), frozen))
        with pytest.raises(ValueError, match=rf"kernel: the mesh axis model splits .*, not {name}"):
            parallel.specs(attached, parallel.make_mesh("model=2"), **ROLES)


def test_specs_of_views_and_arrays():
    mesh = parallel.make_mesh("fsdp=2,model=2")
    params = {
        "embed": jnp.zeros((6, 4)),
        "layers": {
            "up": {"kernel": jnp.zeros((3, 4, 8)), "bias": jnp.zeros((3, 8))},
            "down": {"kernel": jnp.zeros((3, 8, 5))},
        },
        "norm": jnp.zeros(4),
    }
    specs = parallel.specs(params, mesh, columns="layers/up/*", rows="layers/down/kernel")
    assert specs["embed"] == P("fsdp", None) and specs["norm"] == P()
    assert specs["layers"]["up"] == {"kernel": P(None, "fsdp", "model"), "bias": P(None, "model")}
    assert specs["layers"]["down"]["kernel"] == P(None, "model", None)  # 5 is odd
