"""The lines that the library is designed around run as they stand, on a Flax module and on a Llama."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memjax as mj
from memjax.core.bytes import nbytes
from memjax.models import LlamaConfig, Model, random_params

LINES = """
frozen  = mj.weights.quantize(params, mj.codecs.nf4(block=64, double=True), where="**/kernel")     # 4-bit base
adapter = mj.adapters.lora(rank=16, alpha=32, targets="**/{q,k,v,o,gate,up,down}_proj/kernel")
theta   = adapter.init(jax.random.key(0), frozen)              # the only trained pytree
apply   = mj.lift(model_apply)                                 # any pure function of (params, ...)
loss    = lambda theta, frozen, batch: xent(apply(adapter.attach(frozen, theta), batch.inputs), batch.targets)
tx      = optax.chain(optax.clip_by_global_norm(1.0), mj.optim.frugal(1e-3, density=0.25))
"""
MERGE = "merged, report = adapter.merge(frozen, theta)"
TOKENS, WIDTH, VOCABULARY = 8, 64, 64


class Batch(NamedTuple):
    inputs: jax.Array
    targets: jax.Array


class Block(nnx.Module):
    """A gated MLP over mixed tokens, with the names of a Llama's projections."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        for name, outputs in {"q": 64, "k": 64, "v": 64, "o": 64, "gate": 128, "up": 128}.items():
            setattr(self, f"{name}_proj", nnx.Linear(WIDTH, outputs, use_bias=False, rngs=rngs))
        self.down_proj = nnx.Linear(128, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        scores = jnp.einsum("bsd,btd->bst", self.q_proj(x), self.k_proj(x)) / 8
        x = x + self.o_proj(jax.nn.softmax(scores) @ self.v_proj(x))
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


def flax_module():
    graphdef, params = nnx.split(Block(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, tokens: nnx.merge(graphdef, params)(tokens)


def llama():
    config = LlamaConfig(VOCABULARY, WIDTH, 128, 2, 4, 2, 16, tie_embeddings=False)
    model = Model(config)
    return random_params(config, jax.random.key(1)), model.logits


@pytest.mark.smoke
@pytest.mark.parametrize("make", [flax_module, llama])
def test_the_lines_run(make):
    params, model_apply = make()

    def xent(logits, targets):
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    names = {"mj": mj, "jax": jax, "optax": optax, "params": params, "model_apply": model_apply, "xent": xent}
    exec(LINES, names)
    frozen, theta = names["frozen"], names["theta"]
    assert set(theta) == {path for path in map(str, theta) if "_proj/kernel" in path} and len(theta) == 7
    assert nbytes(frozen) < nbytes(params) / 2

    tokens = jax.random.randint(jax.random.key(2), (2, TOKENS + 1), 0, VOCABULARY)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    decoded = jax.jit(model_apply)(mj.weights.materialize(frozen), batch.inputs)
    np.testing.assert_allclose(names["loss"](theta, frozen, batch), xent(decoded, batch.targets), rtol=1e-5)

    step = jax.jit(jax.value_and_grad(names["loss"]))
    tx = names["tx"]
    update, state, losses = jax.jit(tx.update), tx.init(theta), []
    for _ in range(20):
        value, grads = step(theta, frozen, batch)
        updates, state = update(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.02

    names["theta"] = theta
    exec(MERGE, names)
    assert set(names["report"]) == set(theta)
    assert all(0 < error.relative_frobenius < 0.2 for error in names["report"].values())
    assert jax.tree.structure(names["merged"]) == jax.tree.structure(frozen)
    assert np.isfinite(jax.jit(mj.lift(model_apply))(names["merged"], batch.inputs)).all()
