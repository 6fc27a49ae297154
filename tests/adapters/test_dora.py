"""DoRA's norms, its dropout, and that it makes nothing dense."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import adapters, codecs, weights
from memjax.weights import Rescaled, lift
from memjax.weights.adapted import drop
from tests.random_views import array, assert_close

ADAPTER = adapters.dora(rank=3, alpha=6, targets="**/kernel")


def moved(theta, size=0.2):
    leaves, tree = jax.tree.flatten(theta)
    return jax.tree.unflatten(tree, [leaf + size * array(50 + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def bases():
    stack = {"kernel": array(0, 2, 16, 8)}
    lora = adapters.lora(rank=2, targets="kernel")
    packed = weights.quantize(stack, codecs.int4(group=8))
    return {
        "dense": ({"kernel": array(0, 16, 8)}, None),
        "stack": (stack, None),
        "packed stack": (packed, None),
        "adapted": (lora.attach(packed, moved(lora.init(jax.random.key(0), packed))), None),
        "heads": ({"kernel": array(0, 4, 2, 6)}, {"kernel": ((0, 1), 2)}),
        "outputs first": ({"kernel": array(0, 2, 3, 8)}, {"kernel": (2, (1, 0))}),
    }


@pytest.mark.parametrize("name", bases())
def test_the_norms_are_those_of_the_dense_sum(name):
    params, axes = bases()[name]
    adapter = adapters.dora(rank=3, alpha=6, targets="kernel", axes=axes)
    frozen, theta = jax.jit(adapter.prepare)(jax.random.key(0), params)
    attach = jax.jit(adapter.attach)
    np.testing.assert_array_equal(attach(frozen, theta)["kernel"].column, np.ones(theta["kernel"]["m"].shape))
    theta = moved(theta, 1.0)
    view = attach(frozen, theta)["kernel"]
    assert isinstance(view, Rescaled)
    direction = np.asarray(view.base.materialize(), np.float64)
    norms = np.linalg.norm(direction.transpose([*range(view.batch_ndim), *_inputs_last(view)]), axis=-1)
    if name == "heads":
        norms = np.sqrt(np.sum(direction**2, axis=(0, 1)))
    m = np.asarray(theta["kernel"]["m"], np.float64)
    np.testing.assert_allclose(view.column, m / (norms.T if name == "outputs first" else norms), rtol=1e-5)


def _inputs_last(view):
    outputs = [a % view.ndim for a in range(-view.axes.ndim, 0) if a in view.axes.outputs]
    return [*outputs, *(a % view.ndim for a in view.axes.inputs)]


def test_only_directions_and_magnitudes_change():
    frozen, theta = ADAPTER.prepare(jax.random.key(0), {"kernel": array(0, 16, 8)})
    theta = moved(theta)
    merged, _ = ADAPTER.merge(frozen, theta)
    assert_close(jnp.linalg.norm(merged["kernel"], axis=0), theta["kernel"]["m"])


def test_a_column_of_zeros_stays_finite():
    params = {"kernel": array(0, 16, 8).at[:, 3].set(0)}
    frozen, theta = ADAPTER.prepare(jax.random.key(0), params)
    x = array(1, 4, 16)

    def loss(theta):
        return jnp.sum(lift(lambda p, x: x @ p["kernel"])(ADAPTER.attach(frozen, theta), x) ** 2)

    value, grads = jax.value_and_grad(loss)(theta)
    assert_close(value, jnp.sum((x @ params["kernel"]) ** 2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_dropout_reaches_all_that_the_adapter_adds():
    params = {"kernel": array(0, 2, 16, 8)}
    adapter = adapters.dora(rank=3, alpha=6, targets="kernel", dropout=0.5)
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    theta, x = moved(theta), array(1, 2, 5, 16)

    def apply(p, x):
        return jnp.einsum("lbi,lio->lbo", x, p["kernel"])

    key = jax.random.key(3)
    words = adapter.attach(frozen, theta, key)["kernel"].key
    dropped = drop(x, words, 0.5, 1)
    assert 0.3 < float(jnp.mean(dropped == 0)) < 0.7

    def expected(theta, x):
        f, w = theta["kernel"], params["kernel"]
        delta = 2 * jnp.einsum("lir,lro->lio", f["a"], f["b"])
        norms = jax.lax.stop_gradient(jnp.linalg.norm(w + delta, axis=1))
        turn = (f["m"] / norms)[:, None]
        dropped = drop(x, words, 0.5, 1)
        return (
            apply({"kernel": w}, x)
            + (turn - 1) * apply({"kernel": w}, dropped)
            + turn * apply({"kernel": delta}, dropped)
        )

    def run(fn):
        y, back = jax.vjp(fn, theta, x)
        return y, back(jnp.cos(y))

    assert_close(
        *jax.jit(lambda: (run(lambda t, x: lift(apply)(adapter.attach(frozen, t, key), x)), run(expected)))(), 1e-5
    )
    assert isinstance(adapter.attach(frozen, theta)["kernel"], Rescaled)


def test_a_step_on_a_packed_stack_holds_no_dense_stack():
    depth, d, f = 6, 64, 128
    params = {"layers": {"kernel": jnp.zeros((depth, d, f))}}
    frozen, theta = jax.eval_shape(
        lambda: ADAPTER.prepare(jax.random.key(0), weights.quantize(params, codecs.int4(group=32)))
    )

    def loss(theta, frozen, x):
        def layer(x, p):
            return jnp.tanh(x @ p["kernel"])[:, :d], None

        return jnp.sum(lift(lambda p, x: jax.lax.scan(layer, x, p["layers"])[0])(ADAPTER.attach(frozen, theta), x))

    compiled = jax.jit(jax.grad(loss)).lower(theta, frozen, jnp.zeros((8, d))).compile()
    found = {tuple(map(int, s.split(","))) for s in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())}
    assert (depth, f, 3) in found or (depth, 3, f) in found
    assert not [shape for shape in found if np.prod(shape) >= depth * d * f]


def test_magnitudes_are_kept_in_float32():
    params = {"kernel": array(0, 16, 8, dtype=jnp.bfloat16)}
    adapter = adapters.dora(rank=3, targets="kernel", dtype=jnp.bfloat16)
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    assert {name: leaf.dtype.name for name, leaf in theta["kernel"].items()} == {
        "a": "bfloat16",
        "b": "bfloat16",
        "m": "float32",
    }
    x = array(1, 4, 16, dtype=jnp.bfloat16)
    y = lift(lambda p, x: x @ p["kernel"])(adapter.attach(frozen, theta), x)
    np.testing.assert_array_equal(y, x @ params["kernel"])


def test_an_embedding_is_looked_up():
    params = {"embedding": array(0, 12, 8)}
    adapter = adapters.dora(rank=3, targets="embedding")
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    tokens = jnp.array([[1, 11], [0, 1]])

    @jax.jit
    def run(theta):
        view = adapter.attach(frozen, theta)
        return lift(lambda p, i: p["embedding"][i])(view, tokens), view["embedding"].materialize()[tokens]

    assert_close(*run(moved(theta)))
