"""`compress_residuals`: exact where it must be, small errors elsewhere, a test for each thing that breaks such code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from memjax import codecs
from memjax.remat import Residual, ResidualPolicy, compress_residuals, report
from tests.remat.blocks import exact, norm_from_output, plain, random_input, random_params, swiglu_from_inputs

ALL = functools.partial(ResidualPolicy, group=32, min_size=0, min_share=0)
X = jax.random.normal(jax.random.key(3), (8, 64))
W = {"w": jax.random.normal(jax.random.key(4), (64, 64)) / 8}


def gradients(f, *args, argnums=(0, 1)):
    def loss(*args):
        outputs = jax.tree.leaves(f(*args))
        return sum(jnp.sum(jnp.sin(y)) for y in outputs if jnp.issubdtype(y.dtype, jnp.inexact))

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=argnums))(*args)
    return float(value), grads


def relative_error(actual, expected):
    actual, expected = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (actual, expected))
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def assert_close(f, policy, *args, tolerance, argnums=(0, 1), **options):
    """Asserts values as of ``f`` and gradients near them, and returns the report."""
    value, grads = gradients(compress_residuals(f, policy, **options), *args, argnums=argnums)
    true_value, true_grads = gradients(f, *args, argnums=argnums)
    assert value == pytest.approx(true_value, rel=1e-6)
    assert relative_error(grads, true_grads) <= tolerance
    return report(compress_residuals(f, policy, **options), *args)


def actions(found):
    return [row.action for row in found.rows if row.action not in ("param", "input")]


# ---- exactness and error --------------------------------------------------------------------------------------------


def test_32_bits_give_the_gradients_of_the_function_to_the_bit():
    expected, actual = (
        gradients(f, random_params(), random_input())
        for f in (plain, compress_residuals(plain, ResidualPolicy(bits=32, min_size=0)))
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_masks_are_exact_at_any_bits():
    def f(params, x, key):
        h = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x * 2, 0.0)
        return jax.nn.relu(h) + jnp.sum(params["w"])

    found = assert_close(f, ALL(bits=2), W, X, jax.random.key(0), tolerance=0)
    assert sorted(set(actions(found))) == ["1-bit", "rebuilt"]
    assert found.nbytes == 2 * X.size // 8


def mlp(params, x):
    h = norm_from_output(x, params["norm1"])
    return x + swiglu_from_inputs(h @ params["gate"], h @ params["up"]) @ params["down"]


def test_error_falls_with_bits_and_stochastic_rounding_has_no_bias():
    params, x = random_params(), random_input()

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def grads(bits, rounding, seed):
        policy = ALL(bits=bits, group=64, rounding=rounding)
        f = mlp if bits == 32 else compress_residuals(mlp, policy, seed=lambda *_: seed)
        return jax.grad(lambda params: jnp.sum(f(params, x) ** 2))(params)

    true = grads(32, "nearest", 0)
    nearest = {bits: relative_error(grads(bits, "nearest", 0), true) for bits in (8, 4, 2)}
    assert nearest[8] < 0.01 < 0.05 < nearest[4] < 0.15 < 0.25 < nearest[2] < 0.8
    draws = [grads(4, "stochastic", i) for i in range(24)]
    one = relative_error(draws[0], true)
    mean = relative_error(jax.tree.map(lambda *x: sum(x) / len(x), *draws), true)
    assert nearest[4] < one < 2 * nearest[4]
    assert mean == pytest.approx(one / 24**0.5, rel=0.25)


@pytest.mark.slow
def test_error_of_a_block():
    """The relative error of all parameter gradients of a block of 256 x 1024, at 8, 4 and 2 bits."""
    shapes = {"norm1": (256,), "norm2": (256,), "q": (256, 256), "k": (256, 256), "v": (256, 256), "o": (256, 256)}
    shapes |= {"gate": (256, 1024), "up": (256, 1024), "down": (1024, 256)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes))))
    params = {n: jax.random.normal(keys[n], s) / s[0] ** 0.5 if len(s) > 1 else jnp.ones(s) for n, s in shapes.items()}
    x = jax.random.normal(jax.random.key(1), (2, 256, 256))
    true = jax.jit(jax.grad(lambda params: jnp.sum(exact(params, x) ** 2)))(params)
    for rounding, errors in (("nearest", (0.008, 0.13, 0.7)), ("stochastic", (0.011, 0.19, 1.05))):
        for bits, error in zip((8, 4, 2), errors):
            f = compress_residuals(exact, ResidualPolicy(bits=bits, rounding=rounding))
            grads = jax.jit(jax.grad(lambda params, f=f: jnp.sum(f(params, x) ** 2)))(params)
            assert relative_error(grads, true) == pytest.approx(error, rel=0.15)


def test_a_seed_function_tells_layers_apart():
    def f(x, i):
        return jnp.sin(x)

    policy = ALL(bits=2, rounding="stochastic", inputs=(0,), input_bits=2)
    f = compress_residuals(f, policy, params=(), seed=lambda x, i: i)
    stack = jnp.broadcast_to(X, (3, *X.shape))

    def run(stack):
        return jax.lax.scan(lambda total, x: (total + jnp.sum(f(*x)), None), 0.0, (stack, jnp.array([0, 1, 1])))[0]

    g = jax.jit(jax.grad(run))(stack)
    np.testing.assert_array_equal(g[1], g[2])
    assert jnp.mean(g[0] != g[1]) > 0.2


@pytest.mark.parametrize("checked", [True, False])
def test_shards_have_their_own_noise_where_jax_knows_what_varies(checked):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    f = compress_residuals(jnp.sin, ALL(bits=2, rounding="stochastic"), params=())
    f = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=checked)
    g = jax.jit(jax.grad(lambda x: jnp.sum(f(x))))(jnp.concatenate([X, X]))
    assert bool(jnp.mean(g[:8] != g[8:]) > 0.2) == checked
    assert relative_error(g, jnp.cos(jnp.concatenate([X, X]))) < 0.5


# ---- what must not be encoded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x @ w,
        lambda w, x: x @ w.T,
        lambda w, x: x @ w.reshape(32, 128).reshape(64, 64),
        lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(x.dtype),
        lambda w, x: x @ jax.lax.stop_gradient(w),
        lambda w, x: jax.jit(lambda w, x: x @ jax.jit(jnp.transpose)(w))(w, x),
        lambda w, x: x @ jax.nn.relu(w),
        lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ (w * w)))(w, x),
        lambda w, x: x @ jax.lax.scan(lambda c, row: (c, 2 * row), 0.0, w)[1],
        lambda w, x: jax.lax.scan(lambda x, _: (x @ jnp.sin(w), None), x, None, length=2)[0],
        lambda w, x: jax.lax.scan(lambda x, w: (x @ jnp.sin(w), None), x, jnp.stack([w, 2 * w]))[0],
        lambda w, x: x @ (w.reshape(64, 64) @ w),
    ],
)
def test_weights_and_what_follows_from_them_are_never_stored(use):
    def f(params, x):
        return jnp.tanh(use(params["w"], x))

    found = report(f, W, X, policy=ALL(bits=2))
    stored = [row.residual.shape for row in found.rows if row.stored_bytes]
    assert stored and all(X.size in (int(np.prod(s)), int(np.prod(s[1:]))) for s in stored)
    _, grads = gradients(compress_residuals(f, ALL(bits=8, inputs=(1,))), W, X)
    assert relative_error(grads, gradients(f, W, X)[1]) < 0.05


def test_a_weight_behind_a_condition_is_not_encoded():
    def by_data(params, x):
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: jnp.tanh(x @ params["w"]), lambda x: x * 2, x)

    def by_argument(params, x, flag):
        return jax.lax.cond(flag, lambda x: jnp.tanh(x @ params["w"]), lambda x: x * 2, x)

    for f, args, action in ((by_data, (W, X), "kept"), (by_argument, (W, X, True), "rebuilt")):
        args = (*args[:2], *map(jnp.asarray, args[2:]))
        found = assert_close(f, ALL(bits=8), *args, tolerance=0.02)
        assert [row.action for row in found.rows if row.residual.shape == (64, 64) and row.action != "param"] == [
            action
        ]


def test_constants_are_computed_again():
    def f(params, x):
        mask = jnp.tril(jnp.ones((8, 8), bool))
        return jnp.where(mask[:, :, None], x[:, None] * x[None], 0.0) * jnp.cos(jnp.arange(64.0))

    found = report(f, {}, X, policy=ALL(bits=4))
    assert set(actions(found)) == {"rebuilt", "shared"}
    assert found.nbytes == X.nbytes


def test_integers_pass_through():
    def f(params, x):
        values, indices = jax.lax.top_k(x @ params["w"], 32)
        return jnp.sort(x, axis=-1)[:, :32] * values, indices

    found = assert_close(f, ALL(bits=8), W, X, tolerance=0.02)
    assert all(row.action == "kept" for row in found.rows if jnp.issubdtype(row.residual.dtype, jnp.integer))


def test_small_and_narrow_arrays_are_kept():
    def f(params, x):
        points = jnp.sin(x[:, :3] @ params["w"][:3, :3])  # three to a row
        row = jnp.exp(jnp.sum(x, axis=-1, keepdims=True) / 64)
        return jnp.tanh(x * row) + jnp.sum(points * points)

    found = assert_close(f, ALL(bits=8, inputs=(1,)), W, X, tolerance=0.02)
    assert {row.action for row in found.rows if row.residual.shape[-1] < 32} <= {"kept", "rebuilt", "shared"}
    large = ResidualPolicy(bits=4, min_size=X.size + 1)
    assert "4-bit" not in actions(report(f, W, X, policy=large))
    statistics = report(lambda params, x: f(params, x), W, X, policy=ResidualPolicy(min_size=0, min_share=0.5))
    assert "4-bit" not in actions(statistics)


def test_layouts_and_casts_of_one_array_are_stored_once():
    def f(params, x):
        h = (x @ params["w"]).astype(jnp.bfloat16)
        wide = h.astype(jnp.float32)
        return jnp.sum(jnp.sin(wide) * jnp.tanh(h.reshape(2, 4, 64).transpose(1, 0, 2))[0, 0, 0] * (h.T @ h)[0, 0])

    found = report(f, W, X, policy=ALL(bits=32))
    products = [row for row in found.rows if row.action in ("kept", "shared") and row.residual.size == X.size]
    by_size = sorted(row.stored_bytes for row in products)
    assert "shared" in actions(found) and by_size[0] == 0
    _, grads = gradients(compress_residuals(f, ALL(bits=32)), W, X)
    jax.tree.map(np.testing.assert_array_equal, grads, gradients(f, W, X)[1])


def test_broadcasts_are_stored_before_they_grow():
    def f(params, x):
        return x * jnp.exp(jnp.sum(x @ params["w"], axis=-1, keepdims=True) / 64)

    found = assert_close(f, ALL(bits=8), W, X, tolerance=1e-6)
    assert found.nbytes == X.nbytes + 2 * 8 * 4 or found.nbytes == X.nbytes + 8 * 4


# ---- the policy -----------------------------------------------------------------------------------------------------


def test_inputs_are_encoded_where_named():
    def f(params, batch, scale):
        return batch["x"] @ params["w"] * scale

    args = W, {"x": X}, jnp.float32(2)

    def action(inputs):
        rows = report(f, *args, policy=ALL(bits=4, inputs=inputs)).rows
        return {row.residual.name: row.action for row in rows}["1/x"]

    assert action(()) == "input"
    assert action((1,)) == action("1/*") == action("**") == "8-bit"
    with pytest.raises(ValueError, match=r"inputs names '2/x', which matches no argument; they are: 0/w, 1/x, 2"):
        action(("2/x",))


def test_single_arrays_take_their_own_codec():
    def f(params, x):
        h = checkpoint_name(jnp.sin(x @ params["w"]), "hidden")
        return jnp.tanh(h * h)

    def action(**fields):
        return {r.residual.name: r.action for r in report(f, W, X, policy=ALL(**fields)).rows}

    assert action()["hidden"] == "4-bit"
    assert action(per_leaf={"hid*": 8})["hidden"] == "8-bit"
    assert action(per_leaf={"hidden": codecs.int2(group=8), "*": "fp8"})["hidden"] == "2-bit"
    assert action(per_leaf={"f/*": "fp8"})["f/tanh" if "f/tanh" in action() else "f/cos"] == "fp8"
    assert action(keep="hidden")["hidden"] == "kept"

    def choose(residual: Residual):
        return 3 if residual.name == "hidden" else None

    assert action(per_leaf=choose)["hidden"] == "3-bit"
    for fields in ({"keep": "hiden"}, {"per_leaf": {"hiden": 8}}):
        with pytest.raises(ValueError, match=r"'hiden' matches no residual; they are: .*hidden"):
            compress_residuals(f, ALL(**fields))(W, X)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 1}, "bits=1: a gradient from 1-bit activations is noise"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 6, 8, 'fp8' or 32, got 5"),
        ({"input_bits": 1}, "input_bits=1"),
        ({"per_leaf": {"h": 7}}, r"per_leaf\['h'\] must be one of"),
        ({"group": 20}, "group must be a multiple of 8 from 32 on, got 20"),
        ({"rounding": "up"}, "rounding must be 'nearest' or 'stochastic', got 'up'"),
        ({"offload": "disk"}, "offload must be None or 'pinned_host', got 'disk'"),
        ({"inputs": (1.5,)}, "inputs must be argument numbers and patterns of paths, got 1.5"),
    ],
)
def test_bad_policies_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ResidualPolicy(**fields)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="policy must be a ResidualPolicy, got int"):
        compress_residuals(plain, 4)
    with pytest.raises(ValueError, match="params names argument 2 of a call with 2 positional arguments"):
        compress_residuals(plain, ResidualPolicy(), params=2)(random_params(), random_input())
    assert hash(ResidualPolicy(per_leaf={"a": 8})) == hash(ResidualPolicy(per_leaf={"a": 8}))


@pytest.mark.parametrize("size, group", [(256, 128), (64, 64), (96, 96), (160, 80), (100, None), (24, None), (1, None)])
def test_groups_shrink_to_divide_the_last_axis(size, group):
    residual = Residual("x", (512, size), jnp.dtype("float32"), "", False, size)
    codec = ResidualPolicy().codec(residual, residual.nbytes)
    assert (codec and codec.group) == group


def test_nan_and_infinity_stay_visible_and_outliers_stay_in_their_group():
    def f(params, x):
        return x**3

    x = X.at[0, 0].set(jnp.nan).at[1, 0].set(1e4)
    f = compress_residuals(f, ALL(bits=4, inputs=(1,), input_bits=4))
    g = jax.jit(jax.grad(lambda x: jnp.sum(f(W, x))))(x)
    true = 3 * x**2
    assert jnp.isnan(g[0, :32]).all() and not jnp.isnan(g[0, 32:]).any()
    for rows in (slice(2, None), 1):
        assert relative_error(g[rows, 32:], true[rows, 32:]) < 0.2


@pytest.mark.parametrize("bits", [4, 32])
def test_offloaded_codes_come_back(bits):
    def f(params, x):
        return jnp.tanh(x @ params["w"])

    device, host = (
        compress_residuals(f, ALL(bits=bits, inputs=(1,), input_bits=bits, offload=offload))
        for offload in (None, "pinned_host")
    )
    jax.tree.map(np.testing.assert_array_equal, gradients(host, W, X), gradients(device, W, X))
    text = str(jax.make_jaxpr(jax.grad(lambda params, x: jnp.sum(host(params, x))))(W, X))
    assert text.count("Host") == text.count("Device") == (6 if bits == 4 else 2)  # codes, scales and offsets of two


# ---- composition ----------------------------------------------------------------------------------------------------


def test_captured_values_are_differentiated_and_not_encoded():
    def loss(f_of, params, x):
        y = jnp.tanh(x)
        return jnp.sum(f_of(lambda x: jnp.tanh(x @ params["w"].T) * jnp.cos(y))(x))

    def compress(f):
        return compress_residuals(f, ALL(bits=8), params=())

    expected = jax.jit(jax.grad(functools.partial(loss, lambda f: f), argnums=(0, 1)))(W, X)
    assert relative_error(jax.jit(jax.grad(functools.partial(loss, compress), argnums=(0, 1)))(W, X), expected) < 0.01
    assert relative_error(jax.grad(functools.partial(loss, compress), argnums=(0, 1))(W, X), expected) < 0.01


def test_frozen_arguments_keep_nothing_for_their_gradient():
    def temp(f, argnums):
        return jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(lambda x: f(*(x, args[1])), args[0])[1]))(W, X)

    def f(params, x):
        return x @ params["w"]

    _, only_x = jax.vjp(lambda x: compress_residuals(f, ALL(inputs=(1,)))(W, x), X)
    assert all(leaf.size != X.size for leaf in jax.tree.leaves(only_x))


def test_one_trace_serves_different_choices_of_what_is_differentiated():
    def f(params, x):
        return jnp.tanh(x @ params["w"])

    compressed = jax.checkpoint(jax.jit(compress_residuals(f, ALL(bits=8))))  # both keep the trace
    jax.eval_shape(lambda *args: jax.vjp(compressed, *args)[0], W, X)
    jax.eval_shape(lambda w, x: jax.vjp(lambda x: compressed(w, x), x)[0], W, X)
    for argnums in ((0, 1), (1,), (0,)):
        grads = gradients(compressed, W, X, argnums=argnums)[1]
        assert relative_error(grads, gradients(f, W, X, argnums=argnums)[1]) < 0.02


def test_pytrees_integers_and_python_values_reach_the_function_as_they_are():
    def f(params, x, nothing, count, *, mode, table):
        assert nothing is None and isinstance(count, int) and mode == "twice"
        y = jnp.tanh(x @ params["w"])
        return {"y": y * count, "where": (jnp.argmax(y, axis=-1), None), "picked": table["rows"][0] * y}

    table = {"rows": jnp.arange(3), "key": jax.random.key(0)}
    g = compress_residuals(f, ALL(bits=8))
    args, kwargs = (W, X, None, 2), {"mode": "twice", "table": table}
    expected, actual = f(*args, **kwargs), jax.jit(lambda w, x: g(w, x, *args[2:], **kwargs))(W, X)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected)
    loss = jax.grad(lambda g, table: jnp.sum(g(*args, mode="twice", table=table)["y"]), argnums=1, allow_int=True)
    zeros = loss(g, table)
    assert zeros["rows"].dtype == zeros["key"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_output_dtypes_are_those_of_the_function(dtype):
    def f(params, x):
        return x * np.float32(2) * jnp.exp(x), jnp.float32(3) * x

    x = X.astype(dtype)
    outputs, vjp = jax.vjp(compress_residuals(f, ALL(bits=8)), W, x)
    assert [y.dtype for y in outputs] == [y.dtype for y in f(W, x)]
    assert vjp(outputs)[1].dtype == dtype


def test_forward_mode_and_second_order_raise():
    def f(params, x):
        return jnp.tanh(jnp.tanh(x @ params["w"]) * x)

    compressed = compress_residuals(f, ALL())
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(compressed, (W, X), (W, X))

    def slope(f, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(f(W, x)))(x) ** 2)

    for second in (jax.grad, jax.jacfwd, lambda fn: jax.grad(jax.jit(fn)), lambda fn: jax.grad(jax.checkpoint(fn))):
        with pytest.raises(TypeError, match="second-order differentiation through compress_residuals"):
            second(functools.partial(slope, compressed))(X)
    uncoded = compress_residuals(f, ResidualPolicy(bits=32))
    actual, expected = (jax.jit(jax.grad(functools.partial(slope, f)))(X) for f in (uncoded, f))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_barrier_holds_outputs_and_codes_only():
    f = compress_residuals(exact, ALL(bits=4), prevent_cse=False)
    jaxpr = jax.make_jaxpr(lambda *args: jax.vjp(f, *args))(random_params(), random_input())

    def barriers(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "optimization_barrier" and len(eqn.invars) > 1:
                yield [v.aval for v in eqn.invars]
            for value in eqn.params.values():
                if hasattr(value, "eqns"):
                    yield from barriers(value)

    (held,) = barriers(jaxpr)
    assert [aval.shape for aval in held if aval.dtype == jnp.float32] == [random_input().shape]


def test_sharded_arrays_need_no_new_collectives():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    params = {"up": put(jnp.ones((64, 128)), None, "model"), "down": put(jnp.ones((128, 64)), "model")}

    def f(params, x):
        return x + jnp.tanh(x @ params["up"]) @ params["down"]

    def collectives(f):
        text = jax.jit(jax.grad(lambda p, x: jnp.sum(f(p, x) ** 2))).lower(params, put(X, "data")).compile().as_text()
        return {
            name: text.count(f" {name}(") for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
        }

    assert collectives(compress_residuals(f, ALL(bits=4, inputs=(1,)))) == collectives(f)


def test_explicit_shardings_bound_the_group():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 128)), P(None, "model"))
        found = report(lambda params, x: jnp.tanh(x) * 2, {}, x, policy=ResidualPolicy(min_size=0, min_share=0))
    assert found.nbytes == 8 * (128 // 2 + 128 // 64 * 4)
