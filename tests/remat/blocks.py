"""A transformer block in plain operations, and in operations that keep only what backward cannot do without."""

import jax
import jax.numpy as jnp

from memjax.core import compiled_bytes

B, S, D, F, HEADS = 2, 32, 64, 128, 2
TOKENS = B * S


def random_params(depth=None, seed=0):
    shapes = {"norm1": (D,), "norm2": (D,), "q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D)}
    shapes |= {"gate": (D, F), "up": (D, F), "down": (F, D)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    params = {
        name: jax.random.normal(key, (depth or 1, *shape)) / shape[0] ** 0.5 + (len(shape) == 1)
        for key, (name, shape) in zip(keys, shapes.items())
    }
    return params if depth else jax.tree.map(lambda leaf: leaf[0], params)


def random_input(seed=1):
    return jax.random.normal(jax.random.key(seed), (B, S, D))


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def attend(q, k, v):
    scores = jnp.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1), v)


def swiglu(gate, up):
    return jax.nn.silu(gate) * up


def block_of(norm, attend, swiglu):
    def block(params, x):
        h = norm(x, params["norm1"])
        q, k, v = ((h @ params[name]).reshape(*x.shape[:2], HEADS, -1) for name in "qkv")
        x = x + attend(q, k, v).reshape(x.shape) @ params["o"]
        h = norm(x, params["norm2"])
        return x + swiglu(h @ params["gate"], h @ params["up"]) @ params["down"]

    return block


@jax.custom_vjp
def norm_from_output(x, scale):
    return norm(x, scale)


def _norm_forward(x, scale):
    rstd = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    y = x * rstd * scale
    return y, (y, rstd, scale)


def _norm_backward(kept, g):
    y, rstd, scale = kept
    unit, g_unit = y / scale, g * scale
    dx = rstd * (g_unit - unit * jnp.mean(unit * g_unit, axis=-1, keepdims=True))
    return dx, jnp.sum(g * unit, axis=range(g.ndim - 1))


norm_from_output.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def flash(q, k, v):
    """Keeps what a flash kernel keeps: inputs, output and the log-sum-exp."""
    return attend(q, k, v)


def _flash_forward(q, k, v):
    out, lse = attend(q, k, v), jnp.sum(q, axis=-1)
    return out, (q, k, v, out, lse)


def _flash_backward(kept, g):
    q, k, v, out, lse = kept
    zero = 0.0 * (jnp.sum(out) + jnp.sum(lse))
    return jax.tree.map(lambda x: x + zero, jax.vjp(attend, q, k, v)[1](g))


flash.defvjp(_flash_forward, _flash_backward)


@jax.custom_vjp
def swiglu_from_inputs(gate, up):
    return swiglu(gate, up)


swiglu_from_inputs.defvjp(lambda *x: (swiglu(*x), x), lambda kept, g: jax.vjp(swiglu, *kept)[1](g))

plain = block_of(norm, attend, swiglu)
exact = block_of(norm_from_output, flash, swiglu_from_inputs)


def slope(block, depths=(2, 4)):
    """Returns the compiled temporary bytes that each further layer of a scan of ``block`` takes in training."""

    def loss(params, x):
        return jnp.sum(jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params)[0] ** 2)

    temp = [
        compiled_bytes(jax.jit(jax.value_and_grad(loss)).lower(random_params(depth), random_input()).compile()).temp
        for depth in depths
    ]
    return (temp[1] - temp[0]) / (depths[1] - depths[0])
