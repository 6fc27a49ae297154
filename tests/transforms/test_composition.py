"""What is built alone works together: bases, adapters, optimizers, residuals, losses, masks and transformations.

A tiny Llama trains with one choice of each. Its gradients are compared with those of dense weights under plain JAX, and
the compiled step takes the bytes of the formulas. CI runs a covering array, in which every two choices meet; in `make
test-all` they meet under each of the transformations.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax import adapters, codecs, models, optim, weights
from memjax.attention import masks
from memjax.core.bytes import compiled_bytes, nbytes
from memjax.ops import linear_cross_entropy
from memjax.recipes.whole import TrainedWeights
from memjax.weights import Dense, PackedWeight, lift, materialize

DEVICES, BATCH, LENGTH = 8, 8, 16
CONFIG = models.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
TARGETS = "**/*_proj/kernel"
BASES = {"dense": None, "int8": codecs.int8(group=16), "nf4": codecs.nf4(block=16)}
ADAPTERS = {
    "lora": lambda: adapters.lora(rank=4, targets=TARGETS),
    "dora": lambda: adapters.dora(rank=4, targets=TARGETS),
    "vera": lambda: adapters.vera(rank=8, targets=TARGETS),
    "mos": lambda: adapters.mos(4, 2, 1, targets=TARGETS),
    "ia3": lambda: adapters.ia3(targets=TARGETS),
    "all weights": lambda: TrainedWeights(),
}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "frugal": lambda: optim.frugal(1e-3, density=0.25),
    "adamw8bit": lambda: optim.adamw8bit(1e-3),
    "mezo": None,
}
REMATS = {"none": 1e-4, "8bit": 0.06, "full-4bit": 0.7}  # policy -> relative error of the gradient by its codes
FACTORS = {
    "base": list(BASES),
    "adapter": list(ADAPTERS),
    "optimizer": list(OPTIMIZERS),
    "remat": list(REMATS),
    "loss": ["logits", "linear_cross_entropy"],
    "attention": ["causal", "window"],
    "transform": ["jit", "scan", "shard_map", "pmap"],
}


def possible(program):
    """All weights are trained dense, vectors have no subspace, and for MeZO nothing is kept."""
    return not (
        (program["adapter"] == "all weights" and program["base"] != "dense")
        or (program["adapter"] == "ia3" and program["optimizer"] == "frugal")
        or (program["optimizer"] == "mezo" and program["remat"] != "none")
    )


def product():
    programs = (dict(zip(FACTORS, choice)) for choice in itertools.product(*FACTORS.values()))
    return [program for program in programs if possible(program)]


def pairs(program):
    return set(itertools.combinations(program.items(), 2))


def covering(everything):
    """Returns few of the programs in which all pairs of choices occur that occur in them."""
    order = np.random.default_rng(8).permutation(len(everything))  # of some seeds, one that gives few
    contained = [pairs(program) for program in everything]
    missing, chosen = set().union(*contained), []
    while missing:
        best = max(order, key=lambda i: len(contained[i] & missing))
        chosen.append(everything[best])
        missing -= contained[best]
    return chosen


def name_of(program):
    return "-".join(program.values()).replace(" ", "_")


COVERING = covering(product())


def test_few_programs_cover_every_pair_of_choices():
    assert len(COVERING) <= 25
    assert set().union(*map(pairs, COVERING)) == set().union(*map(pairs, product()))


@functools.cache
def dense_params():
    return models.random_params(CONFIG, jax.random.key(0))


@functools.cache
def start(base, adapter):
    """Returns the adapter, the frozen tree, what is trained, moved off its start, and the frozen tree made dense."""
    params = dense_params()
    if BASES[base] is not None:
        params = weights.quantize(params, BASES[base], where=TARGETS)
    method = ADAPTERS[adapter]()
    frozen, theta = method.prepare(jax.random.key(1), params)
    if not isinstance(method, TrainedWeights):
        rng = np.random.default_rng(2)
        theta = jax.tree.map(lambda x: x + jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype), theta)

    def decoded(leaf):
        return Dense(materialize(leaf), leaf.axes) if isinstance(leaf, PackedWeight) else leaf

    plain = jax.tree.map(decoded, frozen, is_leaf=lambda x: isinstance(x, PackedWeight))
    return method, frozen, theta, plain


@functools.cache
def tokens():
    return jax.random.randint(jax.random.key(3), (BATCH, LENGTH + 1), 0, CONFIG.vocab_size)


def make_loss(method, remat, loss, attention):
    """Returns ``(theta, frozen, tokens) -> sum of losses``."""
    model = models.Model(CONFIG)
    mask = None if attention == "causal" else masks.window(5, 0) | masks.sink(2)

    def nll(params, tokens):
        hidden = model.hidden(params, tokens[:, :-1], remat=remat, attention=mask)
        head, axis = model.head(params)
        if loss == "logits":
            logits = hidden @ (head.T if axis else head)
            label = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
            return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - label)
        return linear_cross_entropy(hidden, head, tokens[:, 1:], w_axis=axis, reduction="sum", chunk=16)

    return lambda theta, frozen, tokens: lift(nll)(method.attach(frozen, theta), tokens)


@functools.cache
def dense_gradient(adapter, attention):
    return jax.jit(jax.value_and_grad(make_loss(ADAPTERS[adapter](), "none", "logits", attention)))


@functools.cache
def expected_gradient(base, adapter, attention):
    _, _, theta, plain = start(base, adapter)
    return dense_gradient(adapter, attention)(theta, plain, tokens())


def distributed(fn, transform):
    """Returns ``fn(theta, frozen, tokens)``, which gives sums over the batch, computed in one of four ways."""
    if transform == "jit":
        return jax.jit(fn)
    if transform == "scan":

        def add(total, part, theta, frozen):
            return jax.tree.map(jnp.add, total, fn(theta, frozen, part)), None

        @jax.jit
        def scanned(theta, frozen, tokens):
            parts = tokens.reshape(2, -1, *tokens.shape[1:])
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, theta, frozen, parts[0]))
            return lax.scan(functools.partial(add, theta=theta, frozen=frozen), zeros, parts)[0]

        return scanned

    def local(theta, frozen, tokens):
        return lax.psum(fn(theta, frozen, tokens), "data")

    if transform == "shard_map":
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False))
    mapped = jax.pmap(local, axis_name="data", in_axes=(None, None, 0), out_axes=None)
    return lambda theta, frozen, tokens: mapped(theta, frozen, tokens.reshape(DEVICES, -1, *tokens.shape[1:]))


def relative_error(found, expected):
    squares = [(jnp.sum((a - b) ** 2), jnp.sum(b**2)) for a, b in zip(*map(jax.tree.leaves, (found, expected)))]
    return float(jnp.sqrt(sum(d for d, _ in squares) / sum(n for _, n in squares)))


def check(base, adapter, optimizer, remat, loss, attention, transform):
    method, frozen, theta, _ = start(base, adapter)
    value = make_loss(method, remat, loss, attention)
    expected, slopes = expected_gradient(base, adapter, attention)
    if optimizer == "mezo":
        forward = distributed(value, transform)
        mezo = optim.mezo(lambda theta, tokens: forward(theta, frozen, tokens) / BATCH, 1e-4, eps=1e-2)
        _, state, metrics = jax.jit(mezo.step)(theta, mezo.init(theta), tokens())
        np.testing.assert_allclose(metrics.loss * BATCH, expected, rtol=1e-2)
        assert np.isfinite(metrics.slopes).all() and int(state.step) == 1
        np.testing.assert_allclose(forward(theta, frozen, tokens()), expected, rtol=1e-5)
        return
    gradient = distributed(jax.value_and_grad(value), transform)
    if transform in ("jit", "scan"):
        gradient = gradient.lower(theta, frozen, tokens()).compile()
    found, grads = gradient(theta, frozen, tokens())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    error = relative_error(grads, slopes)
    assert error < REMATS[remat]
    if transform == "jit":  # parts of the batch are too small to be worth codes
        assert remat == "none" or error > 1e-4

    tx = OPTIMIZERS[optimizer]()
    state = tx.init(theta)
    assert nbytes(state) == optim.init_bytes(tx, theta)

    def step(theta, state, frozen, grads):
        updates, state = tx.update(grads, state, theta)
        return optax.apply_updates(theta, updates), state

    new, new_state = jax.jit(step)(theta, state, frozen, grads)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert [leaf.shape for leaf in jax.tree.leaves(new_state)] == [leaf.shape for leaf in jax.tree.leaves(state)]
    if transform in ("jit", "scan"):
        compiled = compiled_bytes(gradient)
        assert compiled.argument == nbytes(theta) + nbytes(frozen) + nbytes(tokens())
        dense = math.prod((CONFIG.num_layers, CONFIG.hidden_size, 2 * CONFIG.intermediate_size)) * 4
        assert base == "dense" or compiled.output < nbytes(theta) + dense  # no gradient of a frozen weight


@pytest.mark.parametrize("program", COVERING, ids=name_of)
def test_choices_go_together(program):
    check(**program)


@pytest.mark.slow
@pytest.mark.parametrize("transform", FACTORS["transform"])
def test_every_pair_goes_together_under_every_transformation(transform):
    for program in covering([program for program in product() if program["transform"] == transform]):
        check(**program)
