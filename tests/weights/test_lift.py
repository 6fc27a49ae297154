"""`lift` through structure, control flow and custom derivatives; what it keeps, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from memjax.core import operation, register_rule
from memjax.weights import lift
from tests.random_views import KINDS, array, assert_close, builder, factors, view

W = array(0, 8, 8) / 3
STACK = array(1, 3, 8, 8) / 3
X = array(2, 2, 8)


def loop(body):
    """Returns a program that scans ``body`` over a stack of weights."""
    return lambda w, x: lax.scan(lambda c, w: (body(w, c), None), x, w)[0]


def layer(w, x):
    return jnp.tanh(x @ w)


def fori(w, x):
    return lax.fori_loop(0, 3, lambda i, c: layer(w[i], c), x)


def while_carrying_the_weight(w, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, layer(c[2], c[1]), c[2]), (0, x, w))[1]


def while_condition_reads_the_weight(w, x):
    return lax.while_loop(lambda c: jnp.sum((c[0] @ w) ** 2) > 1e-3, lambda c: (0.1 * layer(w, c[0]),), (x,))[0]


def scan_carrying_the_weight(w, x):
    return lax.scan(lambda c, _: ((layer(c[1], c[0]), c[1]), None), (x, w), length=3)[0][0]


def stacked_outputs(w, x):
    return lax.scan(lambda c, w: (layer(w, c), c @ w.T), x, w, reverse=True)[1]


def branches(w, x):
    return lax.cond(jnp.sum(x) > 0, lambda w, x: x @ w, lambda w, x: jnp.sin(x @ w.T), w, x)


def switch(w, x):
    return sum(lax.switch(i, [layer, lambda w, x: x, lambda w, x: x @ w.T], w, x) for i in (jnp.int32(0), jnp.int32(2)))


PROGRAMS = {
    "jit": (W, jax.jit(layer)),
    "reshape": (W, lambda w, x: x @ w.reshape(2, 4, 8).reshape(8, 8)),
    "slice of a stack": (STACK, lambda w, x: layer(w[1], layer(w[-1], x))),
    "slices of a stack": (STACK, lambda w, x: loop(layer)(w[1:], x)),
    "split of a stack": (STACK, lambda w, x: loop(layer)(jnp.split(w, [1])[1], x)),
    "unstack": (STACK, lambda w, x: functools.reduce(lambda x, w: layer(w, x), list(w), x)),
    "dynamic index": (STACK, lambda w, x: layer(lax.dynamic_index_in_dim(w, jnp.argmax(x[0]) % 3, keepdims=False), x)),
    "stack of one": (STACK[:1], lambda w, x: loop(layer)(w.reshape(1, 2, 4, 8).reshape(1, 8, 8), x)),
    "expand_dims": (W, lambda w, x: loop(layer)(w[None], x)),
    "scan over xs": (STACK, loop(layer)),
    "scan over xs, unrolled": (STACK, lambda w, x: lax.scan(lambda c, w: (layer(w, c), None), x, w, unroll=2)[0]),
    "scan with a const": (W, lambda w, x: lax.scan(lambda c, _: (layer(w, c), None), x, length=3)[0]),
    "scan with an invariant carry": (W, scan_carrying_the_weight),
    "scan with outputs": (STACK, stacked_outputs),
    "scan over the second axis of a stack": (
        array(3, 2, 3, 8, 8) / 3,
        lambda w, x: lax.scan(
            lambda c, w: (jnp.tanh(jnp.einsum("bd,ndf->nbf", c, w)).mean(0), None), x, w.swapaxes(0, 1)
        )[0],
    ),
    "nested scans": (array(3, 2, 3, 8, 8) / 3, loop(lambda w, x: loop(layer)(w, x))),
    "fori_loop": (STACK, fori),
    "checkpoint": (STACK, loop(jax.checkpoint(layer))),
    "checkpoint of the scan": (STACK, jax.checkpoint(loop(layer), policy=jax.checkpoint_policies.dots_saveable)),
    "checkpoint without barrier": (STACK, loop(jax.checkpoint(layer, prevent_cse=False))),
    "cond": (W, branches),
    "switch": (W, switch),
    "vmap over weights": (STACK, lambda w, x: jax.vmap(layer, in_axes=(0, None))(w, x)),
    "vmap over inputs": (W, lambda w, x: jax.vmap(layer, in_axes=(None, 0))(w, x)),
    "inner gradient": (W, lambda w, x: jax.grad(lambda x: jnp.sum(layer(w, x) ** 2))(x)),
    "inner gradient of a scan": (STACK, lambda w, x: jax.grad(lambda x: jnp.sum(loop(layer)(w, x) ** 2))(x)),
    "inner gradient of a checkpointed scan": (
        STACK,
        lambda w, x: jax.grad(lambda x: jnp.sum(jax.checkpoint(loop(jax.checkpoint(layer)))(w, x) ** 2))(x),
    ),
    "inner jvp": (W, lambda w, x: jax.jvp(lambda x: layer(w, x), (x,), (x,))[1]),
    "stop_gradient and a name": (W, lambda w, x: x @ lax.stop_gradient(w) + x @ checkpoint_name(w, "w")),
    "optimization barrier": (W, lambda w, x: x @ lax.optimization_barrier(w)),
    "custom derivative elsewhere": (W, lambda w, x: jax.nn.silu(jax.nn.relu(x) @ w)),
}
FORWARD_ONLY = {
    "while with an invariant carry": (W, while_carrying_the_weight),
    "while whose condition reads the weight": (W, while_condition_reads_the_weight),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_gradients_equal_the_dense_program(name):
    w, program = PROGRAMS[name]
    kind = KINDS[2] if len(name) % 2 else KINDS[0]
    build, theta = builder(kind, w), jax.tree.map(lambda x: x / 3, factors(5, w.shape))

    def run(fn, weight, theta, x):
        y, back = jax.vjp(lambda theta, x: fn(weight(build(theta)), x), theta, x)
        return y, back(jnp.cos(y))

    def both(theta, x):
        return run(lift(program), lambda v: v, theta, x), run(program, lambda v: v.materialize(), theta, x)

    actual, expected = jax.jit(both)(theta, X)
    assert_close(actual, expected, 5e-6)


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_values_equal_the_dense_program(name):
    w, program = FORWARD_ONLY[name]
    v = view("lora on packed", w)
    assert_close(lift(program)(v, X), program(v.materialize(), X), 5e-6)


def test_vmap_outside_batches_views_as_it_batches_arrays():
    build, theta = builder("lora on packed", STACK), factors(5, STACK.shape)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf / 4, leaf / 2]), theta)

    def run(program, theta, x):
        return jax.vmap(lambda theta: jax.grad(lambda x: jnp.sum(program(build(theta), x)))(x))(theta)

    actual = run(lift(loop(layer)), many, X)
    assert_close(actual, run(lambda v, x: loop(layer)(v.materialize(), x), many, X), 5e-6)


@pytest.mark.smoke
def test_python_arguments_stay_python():
    v = view("packed", W)

    def program(w, x, scale, flag, name=None):
        assert (flag, name) == (True, "a") and isinstance(scale, float)
        return x @ w if flag else x

    assert_close(lift(program)(v, X, 2.0, True, name="a"), X @ v.materialize())


def test_without_views_the_function_itself_runs():
    assert lift(lambda w, x: (w, x))(1, "a") == (1, "a")


# ---- what reverse mode keeps --------------------------------------------------------------------------------------


def residual_shapes(program, *args, argnums):
    """Returns (shape, dtype) of all that the backward pass of ``program`` keeps beyond its arguments."""

    def residuals(*args):
        fixed = list(args)

        def of(*some):
            for i, value in zip(argnums, some):
                fixed[i] = value
            return program(*fixed)

        return jax.tree.leaves(jax.vjp(of, *(args[i] for i in argnums))[1])

    return [(tuple(r.shape), r.dtype) for r in jax.eval_shape(residuals, *args)]


def half(w, x):
    return jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)


@pytest.mark.smoke
@pytest.mark.parametrize("body", [layer, half])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_of_a_weight_is_saved(kind, stacked, body):
    w, program = (array(0, 5, 8, 8), loop(body)) if stacked else (W, body)
    build, theta = builder(kind, w), factors(5, w.shape)
    found = residual_shapes(lambda theta, x: lift(program)(build(theta), x), theta, X, argnums=(0, 1))
    large = [
        (shape, dtype) for shape, dtype in found if np.prod(shape) >= w.size and jnp.issubdtype(dtype, jnp.inexact)
    ]
    own = [(w.shape, w.dtype)] if kind == "lora on dense" else []  # the base itself, by reference
    assert large == own * len(large) and len(large) <= 1
    if kind != "lora on dense":
        assert any(dtype == jnp.uint8 for _, dtype in found)


def test_the_residual_check_sees_what_the_dense_program_saves():
    found = residual_shapes(lambda w, x: loop(half)(w, x), STACK, X, argnums=(0, 1))
    assert (STACK.shape, jnp.bfloat16) in found


def test_a_checkpoint_keeps_its_policy():
    w = array(0, 3, 8, 16) / 3

    def body(w, x):
        return jnp.sum(jnp.sin(checkpoint_name(jnp.sin(x @ w), "kept")), -1, keepdims=True) * x

    policies = jax.checkpoint_policies
    for policy in (policies.nothing_saveable, policies.save_only_these_names("kept"), policies.everything_saveable):
        program = loop(jax.checkpoint(body, policy=policy))
        dense = residual_shapes(program, w, X, argnums=(1,))
        lifted = residual_shapes(lift(program), view("lora on dense", w), X, argnums=(1,))
        count = [sum(shape == (3, 2, 16) for shape, _ in found) for found in (dense, lifted)]
        if policy is policies.everything_saveable:
            assert count[0] >= count[1] >= 2
        else:
            assert count[0] == count[1] == (policy is not policies.nothing_saveable)


def test_an_inner_gradient_keeps_the_barrier_against_common_subexpressions():
    def program(w, x):
        return jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: layer(w, jnp.sin(x)))(x)))(x)

    text = jax.jit(lift(program)).lower(view("packed", W), X).as_text()
    assert (
        text.count("optimization_barrier") >= jax.jit(program).lower(W, X).as_text().count("optimization_barrier") > 0
    )


# ---- custom derivatives and operations ----------------------------------------------------------------------------


@jax.custom_vjp
def doubled(w, x):
    return x @ w


doubled.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, g: (res[1].T @ g, 2 * g @ res[0].T))


@jax.custom_jvp
def tripled(x):
    return x


tripled.defjvp(lambda primals, tangents: (primals[0], 3 * tangents[0]))


@jax.custom_vjp
def fourfold(x):
    return x


fourfold.defvjp(lambda x: (x, None), lambda _, g: (4 * g,))


def test_custom_derivatives_without_views_keep_their_rules():
    v = view("packed", W)
    grad = jax.grad(lambda x: jnp.sum(lift(lambda w, x: fourfold(tripled(x)) @ w)(v, x)))(X)
    assert_close(grad, 12 * jnp.ones_like(X) @ v.materialize().T)


def test_a_custom_vjp_that_takes_a_view_raises_or_keeps_its_rule_under_allow_dense():
    v = view("lora on packed", W)
    with pytest.raises(TypeError, match="custom derivative takes it; register a rule"):
        lift(doubled)(v, X)
    grad = jax.grad(lambda x: jnp.sum(lift(doubled, allow_dense=True)(v, x)))(X)
    assert_close(grad, 2 * jnp.ones_like(X) @ v.materialize().T, 5e-6)


@operation("test_head")
def head(w, x):
    return jnp.max(x @ (w * 1.0), -1)  # w * 1.0 has no rule: only the operation's own rule takes a view


def test_an_operation_uses_its_registered_rule():
    v = view("packed", W)
    with pytest.raises(TypeError, match="`mul`"):
        lift(head)(v, X)
    calls = []

    def rule(lift, w, x):
        calls.append(w.shape)
        return jnp.max(lift(lambda w, x: x @ w)(w, x), -1)

    register_rule("test_head", rule)
    program = loop(lambda w, x: x * head(w.T, x)[:, None])
    stack = view("lora on packed", STACK)
    assert_close(jax.jit(lift(program))(stack, X), program(stack.materialize(), X), 5e-6)
    assert calls and set(calls) == {(8, 8)}
    assert_close(lift(head)(W, X), head(W, X))
    with pytest.raises(ValueError, match="has a lift rule already"):
        register_rule("test_head", rule)


# ---- strictness ---------------------------------------------------------------------------------------------------

REFUSED = {
    "mul": lambda w, x: x @ (2 * w),
    "add": lambda w, x: x @ (w + 1),
    "concatenate": lambda w, x: x @ jnp.concatenate([w, w], 1),
    "reduce_sum": lambda w, x: x * jnp.sum(w),
    "dot_general": lambda w, x: w @ w,
    "slice": lambda w, x: x @ w[:, :4],
    "scan": lambda w, x: lax.scan(lambda c, _: (c.T, None), w, length=2)[0].sum() * x,
    "cond": lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda w: w, lambda w: w.T, w),
    "sort": lambda w, x: x @ jnp.sort(w),
    "broadcast_in_dim": lambda w, x: x @ jnp.broadcast_to(w, (2, 8, 8)),
    "reduce_precision": lambda w, x: x @ lax.reduce_precision(w, 5, 3),
}


@pytest.mark.smoke
@pytest.mark.parametrize("primitive", REFUSED)
def test_a_consumer_without_a_rule_raises_and_names_leaf_primitive_and_line(primitive):
    params = {"layers": {"up": {"kernel": view("lora on packed", W)}}}
    program = REFUSED[primitive]

    def apply(params, x):
        return program(params["layers"]["up"]["kernel"], x)

    line = program.__code__.co_firstlineno
    with pytest.raises(TypeError, match=rf"layers/up/kernel float32\[8, 8\].*`{primitive}` at .*test_lift.py:{line}"):
        lift(apply)(params, X)
    dense = {"layers": {"up": {"kernel": params["layers"]["up"]["kernel"].materialize()}}}
    assert_close(lift(apply, allow_dense=True)(params, X), apply(dense, X), 5e-6)


def test_a_returned_weight_raises_and_is_named():
    with pytest.raises(TypeError, match="a/kernel: the function returns this weight"):
        lift(lambda p: p["a"]["kernel"].T)({"a": {"kernel": view("packed", W)}})


def test_a_keyword_argument_is_named():
    with pytest.raises(TypeError, match="kernel float32"):
        lift(lambda x, kernel: x @ (kernel + 1))(X, kernel=view("packed", W))


# ---- trees of views -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_unflattening_never_validates(kind):
    v = view(kind, STACK)
    assert jax.tree.leaves(jax.tree.map(lambda _: None, v)) == []
    assert jax.tree.structure(jax.tree.map(lambda _: object(), v)) == jax.tree.structure(v)
    abstract = jax.eval_shape(lambda v: v, v)
    assert (abstract.shape, abstract.dtype, abstract.nbytes) == (v.shape, v.dtype, v.nbytes)
    one = jax.tree.map(lambda leaf: leaf[1], v)
    assert one.shape == (8, 8)
    assert_close(one.materialize(), v.materialize()[1])
    assert not hasattr(v, "__jax_array__")
    with pytest.raises((TypeError, ValueError)):
        jnp.sin(v)


def test_codes_stay_integers_under_generic_tree_code():
    v = view("packed", W)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(v)}
    assert kinds == {jnp.dtype("uint8"), jnp.dtype("uint16")}
    floats = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, v)
    np.testing.assert_array_equal(floats.materialize(), v.materialize())
    assert jax.tree.structure(v) == jax.tree.structure(floats)
