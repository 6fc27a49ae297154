"""The adapters that `make_peft_fixtures.py` made, with the logits that peft computes."""

import functools
import pathlib

import jax
from safetensors.numpy import load_file

import memjax as mj
from tests.models.checkpoints import checkpoint

FOLDER = pathlib.Path(__file__).parent / "peft"


def base() -> mj.models.Model:
    """Returns the model that the adapters adapt, in float32."""
    return checkpoint("llama_bytes")


@functools.cache
def load(name: str):
    """Returns (adapter, frozen, theta)."""
    return mj.models.load_peft(FOLDER / name, base())


def tokens() -> jax.Array:
    return load_file(FOLDER / "tokens.safetensors")["tokens"]


def reference(name: str) -> jax.Array:
    """Returns the logits that peft computes for `tokens`."""
    return load_file(FOLDER / name / "reference.safetensors")["logits"]


@functools.cache
def _apply(model: mj.models.Model):
    return jax.jit(mj.lift(model.logits))


def logits(model: mj.models.Model, params) -> jax.Array:
    """Returns the logits of ``model`` with ``params`` for `tokens`."""
    return _apply(model)(params, tokens())


def adapted_logits(adapter, frozen, theta) -> jax.Array:
    """Returns the logits of the base with an adapter attached, for `tokens`."""
    run = jax.jit(lambda frozen, theta: mj.lift(base().logits)(adapter.attach(frozen, theta), tokens()))
    return run(frozen, theta)
