"""Views under meshes: shard_map inside lift, sharding of leaves, groups that a shard would cut."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from memjax import codecs, weights
from memjax.weights import lift
from tests.random_views import KINDS, array, assert_close, builder, factors, view


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


LAYOUTS = {
    "columns": (P(None, "model"), P("data", None), P("data", "model"), lambda w, x: x @ w),
    "rows": (P("model", None), P("data", "model"), P("data", None), lambda w, x: lax.psum(x @ w, "model")),
    "rows of the transpose": (
        P("model", None),
        P("data", "model"),
        P("data", None),
        lambda w, x: lax.psum(lax.dot_general(x, w.T, (((1,), (1,)), ((), ()))), "model"),
    ),
    "replicated": (P(), P("data", None), P("data", None), lambda w, x: x @ w),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_inside(mesh, name, check_vma):
    kind = KINDS[2] if check_vma else KINDS[0]
    w_spec, x_spec, y_spec, body = LAYOUTS[name]
    w, x = array(0, 32, 16), array(1, 4, 32)
    build, theta = builder(kind, w), factors(5, w.shape)

    def program(w, x):
        return jax.shard_map(body, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=y_spec, check_vma=check_vma)(w, x)

    def run(fn, weight, theta, x):
        y, back = jax.vjp(lambda theta, x: fn(weight(build(theta)), x), theta, x)
        return y, back(jnp.cos(y))

    def both(theta, x):
        return run(lift(program), lambda v: v, theta, x), run(lambda w, x: x @ w, lambda v: v.materialize(), theta, x)

    assert_close(*jax.jit(both)(theta, x), 5e-6)


def test_shard_map_of_a_scanned_stack(mesh):
    w, x = array(0, 3, 32, 32) / 6, array(1, 4, 32)
    v = view("lora on packed", w)

    def body(w, x):
        return lax.scan(lambda c, w: (jnp.tanh(lax.all_gather(c @ w, "model", axis=1, tiled=True)), None), x, w)[0]

    def program(w, x):
        specs = (P(None, None, "model"), P("data", None))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("data", None), check_vma=False)(w, x)

    assert_close(jax.jit(lift(program))(v, x), jax.jit(program)(v.materialize(), x), 5e-6)


def test_shard_map_outside(mesh):
    w, x = array(0, 32, 16), array(1, 4, 32)
    v = view("lora on packed", w)
    specs = v.specs(("model", None))

    def body(v, x):
        return lax.psum(lift(lambda w, x: x @ w)(v, x), "model")

    y = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs, P("data", "model")), out_specs=P("data", None)))(v, x)
    assert_close(y, x @ v.materialize(), 5e-6)


def test_a_shard_that_would_cut_a_group_is_refused(mesh):
    v = view("packed", array(0, 32, 16), group=16)

    def program(w, x):
        body = lambda w, x: lax.psum(x @ w, "model")  # noqa: E731
        return jax.shard_map(body, mesh=mesh, in_specs=(P("model", None), P(None, "model")), out_specs=P())(w, x)

    with pytest.raises(ValueError, match=r"0: sharding axis 0 of packed/scale \[2, 16\].*into 4 parts would cut"):
        lift(program)(v, array(1, 4, 32))


def test_a_sharding_constraint_reaches_the_leaves(mesh):
    v = view("lora on packed", array(0, 32, 16))
    x = array(1, 4, 32)

    def program(w, x):
        return x @ lax.with_sharding_constraint(w.T, NamedSharding(mesh, P(None, "model"))).T

    assert_close(jax.jit(lift(program))(v, x), x @ v.materialize(), 5e-6)


def test_sharding_places_every_leaf(mesh):
    tree = {"up": {"kernel": view("lora on packed", array(0, 3, 32, 16)), "bias": array(1, 16)}}
    shardings = weights.sharding(tree, mesh, {"**/kernel": P(None, "model", "data"), "**/bias": P("data")})
    placed = jax.device_put(tree, shardings)
    kernel = placed["up"]["kernel"]
    delta = kernel.deltas[0]
    assert kernel.base.packed.planes[0].sharding.shard_shape((3, 16, 16)) == (3, 4, 8)
    assert delta.a.sharding.spec == P(None, "model", None) and delta.b.sharding.spec == P(None, None, "data")
    assert placed["up"]["bias"].sharding.spec == P("data")
    x = array(2, 4, 32)
    assert_close(lift(lambda w, x: x @ w[1])(kernel, x), x @ tree["up"]["kernel"].materialize()[1], 5e-6)


@pytest.mark.parametrize("spec, blocks", [(P(None, "model"), (1, 2)), (P("data", "model"), (1, 2)), (P(), (1, 8))])
def test_nested_scales_are_cut_with_the_weight_or_shared(mesh, spec, blocks):
    w = array(0, 128, 1024)  # 256 scales are 2 rows of 128 columns
    tree = {"kernel": weights.quantize({"w": w}, codecs.nf4(), "w")["w"]}
    assert tree["kernel"].packed.scale.absmax.shape == (1, 8)
    placed = jax.device_put(tree, weights.sharding(tree, mesh, {"kernel": spec}))["kernel"]
    assert placed.packed.scale.absmax.sharding.shard_shape((1, 8)) == blocks
    assert placed.packed.scale.mean.sharding.shard_shape((1, 1)) == (1, 1)
    rows, columns = (*spec, None, None)[:2]

    def body(v, x):
        y = lift(lambda w, x: x @ w)(v, x)
        return lax.psum(y, rows) if rows else y

    specs = tree["kernel"].specs((rows, columns))
    run = jax.shard_map(body, mesh=mesh, in_specs=(specs, P(None, rows)), out_specs=P(None, columns))
    x = array(1, 2, 128)
    assert_close(jax.jit(run)(placed, x), x @ tree["kernel"].materialize(), 5e-6)


def test_a_shard_may_not_cut_a_second_level_block(mesh):
    tree = {"kernel": weights.quantize({"w": array(0, 128, 256)}, codecs.nf4(), "w")["w"]}
    with pytest.raises(ValueError, match=r"kernel: sharding axis 1 of packed/scale/absmax \[1, 2\].*4 parts would cut"):
        weights.sharding(tree, mesh, {"kernel": P(None, "model")})
    with pytest.raises(ValueError, match=r"sharding axis 0 of packed/scale/codes \[2, 256\].*4 parts would cut"):
        weights.sharding(tree, mesh, {"kernel": P("model")})


def test_sharding_errors_name_the_leaf(mesh):
    tree = {"up": {"kernel": weights.quantize({"w": array(0, 32, 16)}, codecs.int4(group=16), "w")["w"]}}
    with pytest.raises(ValueError, match="matches no leaf"):
        weights.sharding(tree, mesh, {"**/bias": P()})
    with pytest.raises(ValueError, match=r"up/kernel: .*would cut a quantization group"):
        weights.sharding(tree, mesh, {"**/kernel": P("model")})
    with pytest.raises(ValueError, match=r"up/kernel: .*more entries than the weight's 2 axes"):
        weights.sharding(tree, mesh, {"**/kernel": P(None, None, "model")})
