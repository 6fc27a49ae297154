import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import codecs, models
from memjax.core.paths import leaf_paths
from memjax.core.views import is_view, materialize
from memjax.models import llama
from memjax.models.layers import Linear, seed_of, stack_layers
from memjax.weights import lift
from tests.models.checkpoints import DECODERS, FOLDER, checkpoint, reference

TINY = models.LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)


@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_greedy_tokens_equal_transformers(name):
    model, expected = checkpoint(name), reference(name)
    logits = jax.jit(model.logits)(model.params, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    tokens = models.generate(model, model.params, expected["tokens"][:, :8], max_new_tokens=8)
    np.testing.assert_array_equal(tokens, expected["greedy"])


def test_fixtures_hold_every_family_and_variant():
    configs = [checkpoint(name).config for name in DECODERS]
    kinds = {config.rope_scaling and config.rope_scaling.kind for config in configs}
    assert kinds == {None, "linear", "llama3"}
    for field in ("tie_embeddings", "attention_bias", "output_bias", "mlp_bias", "qk_norm"):
        assert {getattr(config, field) for config in configs} == {False, True}, field
    assert {config.window_layers for config in configs} == {None, (False, True, True)}
    assert any(len(list((FOLDER / name).glob("model-*.safetensors"))) > 1 for name in DECODERS)


@pytest.mark.parametrize("name", ["llama3", "qwen2_windows"])
def test_packed_documents_equal_separate_ones(name):
    model, tokens = checkpoint(name), jnp.asarray(reference(name)["tokens"][:1])
    apply = jax.jit(model.logits)
    together = apply(model.params, tokens, segment_ids=jnp.repeat(jnp.asarray([[3, 1, 2]]), 8, axis=1))
    separate = apply(model.params, tokens.reshape(3, 8)).reshape(together.shape)
    np.testing.assert_allclose(together, separate, atol=1e-5)
    assert float(jnp.abs(together - reference(name)["logits"][:1])[:, 8:].max()) > 0.1


def test_positions_restart_at_each_segment():
    ids = jnp.asarray([[5, 5, 5, 2, 2, 7], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(llama.segment_positions(ids), [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


def test_only_distances_between_positions_matter():
    model, tokens = checkpoint("llama2"), reference("llama2")["tokens"]
    shifted = jnp.broadcast_to(jnp.arange(24) + 17, tokens.shape)
    np.testing.assert_allclose(
        model.logits(model.params, tokens, positions=shifted), reference("llama2")["logits"], atol=1e-4
    )
    stretched = model.logits(model.params, tokens, positions=2 * shifted)
    assert float(jnp.abs(stretched - reference("llama2")["logits"]).max()) > 0.1


def test_a_later_token_or_one_behind_the_window_changes_nothing():
    model, tokens = checkpoint("mistral"), reference("mistral")["tokens"][:1]
    apply = jax.jit(model.logits)
    before = apply(model.params, tokens)
    after = apply(model.params, jnp.asarray(tokens).at[0, 3].add(1))
    changed = np.abs(np.asarray(before - after)).max(-1)[0] > 1e-6
    reach = model.config.num_layers * (model.config.sliding_window - 1)
    assert not changed[:3].any() and changed[3:12].all()
    assert 3 + reach + 1 < changed.size and not changed[3 + reach + 1 :].any()


@pytest.mark.parametrize(("name", "modes"), [("llama2", ("none", "dots", "full")), ("qwen2_windows", ("none", "full"))])
def test_remat_keeps_gradients_and_less_memory(name, modes):
    model, tokens = checkpoint(name), jnp.asarray(reference(name)["tokens"])

    def loss(params, remat):
        logp = jax.nn.log_softmax(model.logits(params, tokens[:, :-1], remat=remat))
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()

    compiled = [jax.jit(jax.grad(loss), static_argnums=1).lower(model.params, remat).compile() for remat in modes]
    plain, *others = (gradient(model.params) for gradient in compiled)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, other)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain))
    temp = [gradient.memory_analysis().temp_size_in_bytes for gradient in compiled]
    assert temp == sorted(temp, reverse=True) and temp[-1] < 0.6 * temp[0], temp


def test_noise_of_stochastic_residuals_differs_between_layers_and_steps():
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 8), jnp.bfloat16)
    seeds = [int(seed_of((carry,), None)) for carry in x]
    assert len(set(seeds)) == 3 and int(jax.jit(seed_of)(x[0], None)) == seeds[0]


def test_compute_dtype_is_the_embeddings():
    model = models.load(FOLDER / "qwen3", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    tokens = reference("qwen3")["tokens"]
    assert model.hidden(model.params, tokens).dtype == jnp.bfloat16
    logits = model.logits(model.params, tokens)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - reference("qwen3")["logits"])
    assert error.mean() < 0.05


def test_head_is_what_logits_multiply_by():
    for name in ("llama2", "llama3"):
        model, tokens = checkpoint(name), reference(name)["tokens"]
        weight, axis = model.head(model.params)
        logits = np.tensordot(model.hidden(model.params, tokens), weight, axes=((2,), (axis,)))
        np.testing.assert_allclose(logits, reference(name)["logits"], atol=1e-4)


def test_packed_weights_under_lift_equal_their_dense_values(name="llama3"):
    model = models.load(FOLDER / name, dtype="float32", weights=codecs.int8(group=16))
    views = [path for path, leaf in leaf_paths(model.params) if is_view(leaf)]
    assert len(views) == 7 and all(path.endswith("_proj/kernel") for path in views)
    tokens = reference(name)["tokens"]
    apply = jax.jit(lift(model.logits))
    logits = apply(model.params, tokens)
    dense = jax.jit(model.logits)(materialize(model.params), tokens)
    np.testing.assert_allclose(logits, dense, atol=1e-5)
    assert 1e-4 < float(np.abs(logits - reference(name)["logits"]).mean()) < 0.1
    generated = models.generate(model, model.params, tokens[:, :8], max_new_tokens=16)
    best = apply(model.params, generated).argmax(-1)
    np.testing.assert_array_equal(generated[:, 8:], best[:, 7:-1])


def test_first_layers_cuts_the_stack():
    model, tokens = checkpoint("qwen2_windows"), reference("qwen2_windows")["tokens"]
    cut = model.first_layers(1)
    assert cut.config.num_layers == 1 and cut.config.window_layers == (False,)
    whole = dataclasses.replace(cut.config, num_layers=3, window_layers=(False,) * 3)
    layers = jax.tree.map(lambda leaf: leaf.at[1:].set(0), model.params["layers"])
    silent = {**model.params, "layers": layers}  # zero kernels add nothing to the residual stream
    np.testing.assert_allclose(cut.hidden(cut.params, tokens), models.Model(whole).hidden(silent, tokens), atol=1e-6)
    with pytest.raises(ValueError, match="1 to 3"):
        model.first_layers(4)


def test_nnx_module_abstract_and_random_params_agree():
    module = nnx.eval_shape(lambda: models.Llama(TINY, rngs=nnx.Rngs(0)))
    expected = {path: leaf.shape for path, leaf in leaf_paths(nnx.to_pure_dict(nnx.state(module)))}
    for params in (models.abstract(TINY), models.random_params(TINY, jax.random.key(0), jnp.bfloat16)):
        assert {path: leaf.shape for path, leaf in leaf_paths(params)} == expected
    assert params["norm"]["scale"].dtype == jnp.bfloat16 and float(params["norm"]["scale"].min()) == 1
    first, second = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert 0.01 < float(first.std()) < 0.03 and not np.array_equal(first, second)


def test_stacked_layers_start_different():
    stacked = stack_layers(lambda rngs: Linear(2, 3, rngs=rngs), 2, nnx.Rngs(0)).kernel[...]
    assert stacked.shape == (2, 2, 3) and not np.array_equal(stacked[0], stacked[1])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-2-7b", 6_738_415_616),
        ("mistral-7b", 7_241_732_096),
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_named_configurations_have_the_published_parameter_counts(name, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(models.abstract(models.llama_config(name)))) == count


def test_bad_calls_say_what_is_wrong():
    model, tokens = checkpoint("llama2"), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="no named configuration 'gpt-5'; known: llama-3"):
        models.llama_config("gpt-5")
    with pytest.raises(ValueError, match=r"tokens must be \[batch, sequence\], got shape \(4,\)"):
        model.hidden(model.params, tokens[0])
    with pytest.raises(ValueError, match=r"segment_ids must have the shape of tokens \(1, 4\), got \(1, 3\)"):
        model.hidden(model.params, tokens, segment_ids=jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="remat='all' is not one of none, full, dots"):
        model.hidden(model.params, tokens, remat="all")
    with pytest.raises(ValueError, match=r"attention must be 'xla', 'cudnn', a mask, .* or None, got 'flash'"):
        model.hidden(model.params, tokens, attention="flash")
    with pytest.raises(ValueError, match="mask and token_types are for encoders"):
        model.hidden(model.params, tokens, mask=tokens)
    lacking = {key: value for key, value in model.params.items() if key != "norm"}
    with pytest.raises(ValueError, match=r"params lack norm/scale of shape \(32,\)"):
        model.hidden(lacking, tokens)
    with pytest.raises(ValueError, match="leaves that the model lacks: extra"):
        model.hidden({**model.params, "extra": jnp.zeros(3)}, tokens)
    with pytest.raises(ValueError, match=r"params at norm/scale: expected shape \(32,\), got \(31,\)"):
        model.hidden({**model.params, "norm": {"scale": jnp.ones(31)}}, tokens)
    packed = models.load(FOLDER / "llama2", weights=codecs.int8(group=16))
    with pytest.raises(TypeError, match=r"kernel is a weight view \(PackedWeight\): call the function as memjax.lift"):
        packed.hidden(packed.params, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"sliding_window": 0}, "sliding_window must be positive"),
        ({"window_layers": (True,)}, "window_layers has 1 entries for num_layers = 2"),
        ({"rope_scaling": models.RopeScaling("factors", factors=(1.0,))}, "1 factors for head_dim 4"),
        ({"rope_scaling": models.RopeScaling("yarn")}, "unknown rope scaling kind 'yarn'"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


HF = dict(
    model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
)


def test_configurations_of_older_transformers():
    config = llama.config_from_hf(
        HF
        | dict(
            num_key_value_heads=2,
            rope_theta=500000.0,
            rms_norm_eps=1e-5,
            torch_dtype="bfloat16",
            rope_scaling=dict(
                rope_type="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        )
    )
    assert config.rope_theta == 500000.0 and config.head_dim == 4 and config.num_kv_heads == 2
    assert config.rope_scaling == models.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert llama.config_from_hf(HF | dict(rope_scaling={"type": "linear", "factor": 2.0})).rope_scaling.factor == 2
    assert llama.config_from_hf(HF).num_kv_heads == 4
    qwen = HF | dict(model_type="qwen2", sliding_window=32768, use_sliding_window=False)
    assert llama.config_from_hf(qwen).sliding_window is None and llama.config_from_hf(qwen).attention_bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not a supported decoder; supported: llama, mistral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope scaling type 'dynamic' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but only 'silu' is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, but only 1.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling of type 'linear' lacks factor"),
    ],
)
def test_unsupported_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        llama.config_from_hf(HF | change)


def test_missing_sizes_are_named():
    with pytest.raises(ValueError, match="lacks intermediate_size"):
        llama.config_from_hf({key: value for key, value in HF.items() if key != "intermediate_size"})
