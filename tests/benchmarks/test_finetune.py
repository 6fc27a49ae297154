"""Every stack of the suite runs, does the same work, and lowers for CUDA at the real shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from benchmarks import finetune
from benchmarks.baselines import plain_jax
from benchmarks.shapes import LLAMAS
from memjax import models
from memjax.ops import linear_cross_entropy

TINY = finetune.TINY
JAX_STACKS = ("plain_jax", "memjax", "memjax_int4", "memjax_nf4_int8")


MARKS = {"memjax": pytest.mark.smoke, "memjax_int4": pytest.mark.slow, "memjax_nf4_int8": pytest.mark.slow}


@pytest.mark.parametrize("stack", [pytest.param(stack, marks=MARKS.get(stack, ())) for stack in finetune.STACKS])
def test_case_runs_and_learns(stack, monkeypatch):
    if stack == "peft":
        for package in ("torch", "transformers", "peft"):
            pytest.importorskip(package)
    monkeypatch.setattr(finetune, "REPEATS", 3)
    row = finetune.run_case(f"{TINY.name}/{stack}")
    assert row["loss_last"] < row["loss_first"] < 1.1 * np.log(LLAMAS["tiny"].vocab)
    assert row["tokens_per_s"] == pytest.approx(TINY.batch * TINY.length / row["median_ms"] * 1e3)
    assert row["repeats"] == 3 and row["shape"] == TINY.name and row["stack"] == stack


def to_plain(params, theta):
    """Returns memjax's params and adapter in the baseline's layout."""
    layers = params["layers"]
    names = {name: f"self_attn/{name}_proj" for name in "qkvo"} | {n: f"mlp/{n}_proj" for n in ("gate", "up", "down")}
    plain_layers = {}
    for name, path in names.items():
        room, projection = path.split("/")
        plain_layers[name] = layers[room][projection]["kernel"]
    plain_layers["norm1"] = layers["input_layernorm"]["scale"]
    plain_layers["norm2"] = layers["post_attention_layernorm"]["scale"]
    plain = {"embed": params["embed_tokens"]["embedding"], "norm": params["norm"]["scale"], "layers": plain_layers}
    return plain | {"head": params["lm_head"]["kernel"].T}, {
        name: theta[f"layers/{path}/kernel"] for name, path in names.items()
    }


def test_memjax_and_the_baseline_compute_the_same_loss_and_gradients():
    config = LLAMAS["tiny"]
    model = models.Model(finetune.memjax_config(config))
    adapter = mj.adapters.lora(rank=4, alpha=8.0, targets="**/*_proj/kernel")
    params = models.random_params(model.config, jax.random.key(0), jnp.float32)
    theta = adapter.init(jax.random.key(1), params)
    noise = jax.random.split(jax.random.key(2), len(theta))
    theta = {path: ab | {"b": 0.1 * jax.random.normal(k, ab["b"].shape)} for k, (path, ab) in zip(noise, theta.items())}
    tokens = jax.random.randint(jax.random.key(3), (2, 17), 0, config.vocab)

    def ours(theta):
        def loss(params):
            x = model.hidden(params, tokens[:, :-1], remat="full", attention="xla")
            weight, axis = model.head(params)
            return linear_cross_entropy(x, weight, tokens[:, 1:], w_axis=axis, chunk=8)

        return mj.lift(loss)(adapter.attach(params, theta))

    def theirs(theta):
        plain, factors = to_plain(params, theta)
        x = plain_jax.hidden(config, plain, factors, 8.0 / 4, tokens[:, :-1], "xla", "full")
        return plain_jax.chunked_cross_entropy(x.reshape(-1, config.d_model), plain["head"], tokens[:, 1:].ravel(), 8)

    loss, grads = jax.jit(jax.value_and_grad(ours))(theta)
    expected, expected_grads = jax.jit(jax.value_and_grad(theirs))(theta)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max())),
        grads,
        expected_grads,
    )


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b"])
def test_sizes_are_those_of_the_published_models(name):
    published, ours = models.llama_config(name), finetune.memjax_config(LLAMAS[name])
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(published, field) == getattr(ours, field)
    for field in ("head_dim", "rope_theta", "rms_eps", "tie_embeddings"):
        assert getattr(published, field) == getattr(ours, field)


@pytest.fixture(params=[pytest.param("xla", marks=pytest.mark.slow), "cudnn"])
def attention(request, monkeypatch):
    """Attention implementations; without a GPU, cuDNN's own checks of shapes run but not those of its version."""
    if request.param == "cudnn" and jax.default_backend() != "gpu":
        module = "jax._src.cudnn.fused_attention_stablehlo"
        monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91000)
        monkeypatch.setattr(f"{module}.check_compute_capability", lambda *version: True)
        monkeypatch.setattr(f"{module}.is_cuda_compute_capability_equal", lambda *version: False)
    return request.param


@pytest.mark.parametrize("shape", finetune.SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("stack", JAX_STACKS)
def test_real_shapes_lower_for_cuda(shape, stack, attention):
    workload = finetune.build(shape, stack, attention)
    state, frozen = jax.eval_shape(workload.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((shape.batch, shape.length + 1), jnp.int32)
    lowered = jax.jit(workload.step, donate_argnums=0).trace(state, frozen, tokens).lower(lowering_platforms=("cuda",))
    assert ("__cudnn$fmha" in lowered.as_text()) == (attention == "cudnn")
    dense_gib = sum(leaf.size * 2 for leaf in jax.tree.leaves(jax.eval_shape(mj.core.materialize, frozen))) / 2**30
    packed_gib = mj.core.nbytes(frozen) / 2**30
    assert packed_gib < 0.6 * dense_gib if finetune.BASES.get(stack, (None,))[0] else packed_gib == dense_gib


def test_flops_per_token_of_the_8b_model():
    """Six operations per parameter outside the embedding, and the attention's."""
    flops = finetune.flops_per_token(finetune.SHAPES[1])
    assert flops == pytest.approx(6 * (8.03e9 - 128256 * 4096) + 9 * 2048 * 4096 * 32, rel=2e-3)
