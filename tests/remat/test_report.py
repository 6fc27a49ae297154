"""The report adds up to what XLA allocates for every further layer."""

import jax
import jax.numpy as jnp
import pytest

from memjax import adapters, codecs, weights
from memjax.remat import ResidualPolicy, compress_residuals, report
from memjax.weights import lift
from tests.remat.blocks import HEADS, TOKENS, B, D, F, S, exact, plain, random_input, random_params, slope

DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def policy(bits, **changes):
    return ResidualPolicy(bits=bits, inputs=(1,), input_bits=bits, group=64, min_size=1024, **changes)


def bfloat16_weights(params, x):
    return plain(jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16)).astype(x.dtype)


CASES = {
    "plain": plain,
    "exact operations": exact,
    "exact operations, 8 bits": compress_residuals(exact, policy(8)),
    "exact operations, 4 bits": compress_residuals(exact, policy(4)),
    "exact operations, 2 bits": compress_residuals(exact, policy(2)),
    "plain, 4 bits": compress_residuals(plain, policy(4)),
    "checkpointed products, 8 bits": compress_residuals(jax.checkpoint(plain, policy=DOTS), policy(8)),
    "checkpoint of 8 bits": jax.checkpoint(compress_residuals(plain, policy(8))),
    "weights cast inside, 8 bits": compress_residuals(bfloat16_weights, policy(8)),
}
SAMPLE = (
    "exact operations",
    "exact operations, 4 bits",
    "checkpointed products, 8 bits",
    "weights cast inside, 8 bits",
)


@pytest.mark.parametrize("name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_the_sum_is_the_compiled_slope(name):
    block = CASES[name]
    total = report(block, random_params(), random_input()).nbytes
    assert slope(block) == pytest.approx(total, rel=0.02)


def test_bytes_follow_from_the_shapes():
    elements = 6 * D + 3 * F  # the outputs of two norms, q, k, v, attention; gate, up, and their product
    small = 4 * (2 + HEADS)  # two norms' rstd and the heads' log-sum-exp, float32
    groups = 2 * D // 64 + 4 * D // 32 + 3 * F // 64  # a head has 32 elements
    twice = D  # by itself, jax keeps the attention's output in the two layouts in which it is used
    assert report(exact, random_params(), random_input()).nbytes == TOKENS * (4 * (elements + twice) + small)
    for bits in (8, 4, 2):
        found = report(compress_residuals(exact, policy(bits)), random_params(), random_input())
        assert found.nbytes == TOKENS * (elements * bits // 8 + 4 * groups + small)


@pytest.mark.parametrize("base, side", [("packed", "outside"), pytest.param("dense", "inside", marks=pytest.mark.slow)])
def test_lifted_weights_are_not_kept_per_layer(base, side):
    def parts(depth):
        params = random_params(depth)
        if base == "packed":
            params = weights.quantize(params, codecs.int4(group=32), where="{q,k,v,o,gate,up,down}")
        return adapter.init(jax.random.key(0), params), params

    def run(theta, frozen, x):
        params = adapter.attach(frozen, theta)
        compressed = compress_residuals(lift(plain) if side == "inside" else plain, policy(8), prevent_cse=False)

        def scan(params, x):
            return jax.lax.scan(lambda x, layer: (compressed(layer, x), None), x, params)[0]

        return jnp.sum((scan if side == "inside" else lift(scan))(params, x) ** 2)

    adapter = adapters.lora(rank=2, alpha=4, targets="{q,k,v,o,gate,up,down}")
    temp = []
    for depth in (2, 4):
        compiled = jax.jit(jax.value_and_grad(run)).lower(*parts(depth), random_input()).compile()
        temp.append(compiled.memory_analysis().temp_size_in_bytes)
    theta, frozen = jax.tree.map(lambda leaf: leaf[0], parts(1))
    kept = report(
        lambda theta, x: lift(plain)(adapter.attach(frozen, theta), x), theta, random_input(), policy=policy(8)
    )
    assert (temp[1] - temp[0]) / 2 == pytest.approx(kept.nbytes, rel=0.02)


def test_rows_say_what_happens_and_where():
    def f(params, x):
        w = params["w"].T
        h = jax.nn.relu(jnp.sin(x @ w).reshape(4, 8, 32)).reshape(32, 32)
        return jnp.tanh(h @ w) * h

    x = jnp.ones((32, 32))
    found = report(f, {"w": x}, x, policy=ResidualPolicy(bits=4, group=32, min_size=0, min_share=0))
    by_name = {row.residual.name: row for row in found.rows}
    expected = {
        "1": ("input", 4096),
        "f/transpose": ("rebuilt", 0),
        "f/cos": ("4-bit", 640),
        "f/gt": ("1-bit", 128),
        "f/tanh": ("4-bit", 640),
    }
    assert {name: by_name[name][1:] for name in expected} == expected
    assert all("test_report.py:" in by_name[name].residual.origin for name in list(expected)[1:])
    text = str(found)
    assert all(row.residual.name in text and row.residual.origin in text for row in found.rows)
    assert text.splitlines()[-1].split() == ["total", f"{found.nbytes:,}"]
    starts = [line.index(row.action, 40) for line, row in zip(text.splitlines()[1:], found.rows)]
    assert len(set(starts)) == 1


def test_only_differentiated_arguments_count():
    params, x = random_params(), random_input()
    frozen = report(exact, params, x, wrt=(1,))
    trained = report(exact, params, x)
    assert 0 < frozen.nbytes < trained.nbytes
    assert trained.nbytes - frozen.nbytes == 4 * TOKENS * (D + F)  # inputs of o and down
    with pytest.raises(ValueError, match="wrt names argument 3"):
        report(exact, params, x, wrt=(3,))


def test_what_is_the_same_for_all_layers_counts_nothing():
    found = report(plain, random_params(), jax.ShapeDtypeStruct((B, S, D), jnp.float32))
    same = [row for row in found.rows if row.action == "invariant"]
    assert same and all(row.stored_bytes == 0 for row in same)
