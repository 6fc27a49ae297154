import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax.codecs import int4, int8
from memjax.models import LlamaConfig, Model, RopeScaling, llama_config, load, random_params, save
from memjax.models.llama import config_from_hf, rope_frequencies
from memjax.models.save import to_hf
from memjax.weights import is_view
from tests.models.checkpoints import FOLDER, checkpoint


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir()))
def test_dense_models_read_back_the_same(name, tmp_path):
    model = checkpoint(name)
    save(tmp_path, model)
    again = load(tmp_path, dtype="float32")
    assert again.config == model.config
    equal(again.params, model.params)
    if model.tokenizer is not None:
        assert again.tokenizer.encode("to be!") == model.tokenizer.encode("to be!")
        assert again.tokenizer.eos_id == model.tokenizer.eos_id


def test_packed_models_read_back_the_same(tmp_path):
    model = checkpoint("llama_bytes")
    packed = mj.weights.quantize(model.params, int4(group=16), where="layers/**/kernel")
    axes = {"embed_tokens/embedding": ((-1,), (-2,))}
    packed = mj.weights.quantize(packed, int8(group=32), where="embed_tokens/embedding", axes=axes)
    save(tmp_path, dataclasses.replace(model, params=packed))
    again = load(tmp_path, dtype="float32")
    equal(again.params, packed)
    assert again.params["embed_tokens"]["embedding"].axes == packed["embed_tokens"]["embedding"].axes
    dense = load(tmp_path, dtype="float32", weights="dense").params
    equal(dense, jax.jit(mj.weights.materialize)(packed))
    narrow = load(tmp_path, dtype="bfloat16").params
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow, is_leaf=is_view)} == {jnp.dtype("bfloat16")}
    other = load(tmp_path, dtype="float32", weights=int8(group=8), targets="**/q_proj/kernel").params
    kept, packed_again = other["layers"]["mlp"]["up_proj"]["kernel"], other["layers"]["self_attn"]["q_proj"]["kernel"]
    equal(kept, packed["layers"]["mlp"]["up_proj"]["kernel"])
    assert packed_again.packed.codec == int8(group=8)
    wanted = dense["layers"]["self_attn"]["q_proj"]["kernel"]
    assert abs(packed_again.materialize() - wanted).max() < 0.02 * abs(wanted).max()


def test_named_configurations_have_a_hugging_face_form():
    for name in ("llama-3.2-1b", "llama-2-7b", "mistral-7b", "smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b"):
        settings = json.loads(json.dumps(to_hf(llama_config(name))))
        assert config_from_hf(settings) == llama_config(name)
    assert to_hf(llama_config("qwen3-0.6b"))["model_type"] == "qwen3"


def test_rotary_factors_become_the_scaling_they_come_from():
    config = llama_config("llama-3.1-8b")
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    factors = tuple(float(f) for f in plain / rope_frequencies(config))
    from_gguf = dataclasses.replace(config, rope_scaling=RopeScaling("factors", factors=factors))
    np.testing.assert_allclose(rope_frequencies(config_from_hf(to_hf(from_gguf))), rope_frequencies(config), rtol=1e-4)
    odd = dataclasses.replace(from_gguf, rope_scaling=RopeScaling("factors", factors=(1.0, *factors[:-1])))
    with pytest.raises(ValueError, match="cannot say the rotary factors"):
        to_hf(odd)


def test_what_cannot_be_saved(tmp_path):
    config = LlamaConfig(16, 8, 8, 1, 2, 2, 4, attention_bias=True, qk_norm=True)
    model = Model(config, random_params(config, jax.random.key(0)))
    with pytest.raises(ValueError, match="no Hugging Face configuration"):
        save(tmp_path / "a", model)
    assert not (tmp_path / "a").exists()
    model = checkpoint("llama_bytes")
    save(tmp_path / "b", model)
    packed = dataclasses.replace(
        model, params=mj.weights.quantize(model.params, int8(group=16), where="layers/**/kernel")
    )
    with pytest.raises(ValueError, match="holds other weights already"):
        save(tmp_path / "b", packed)
    adapter = mj.adapters.lora(rank=2, targets="layers/**/kernel")
    attached = adapter.attach(model.params, adapter.init(jax.random.key(0), model.params))
    with pytest.raises(TypeError, match="Adapted"):
        save(tmp_path / "c", dataclasses.replace(model, params=attached))


def test_saved_weights_that_do_not_fit_the_configuration(tmp_path):
    model = checkpoint("llama_bytes")
    packed = mj.weights.quantize(model.params, int8(group=16), where="layers/**/kernel")
    save(tmp_path, dataclasses.replace(model, params=packed))
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"vocab_size": 300}))
    with pytest.raises(ValueError, match=r"embed_tokens/embedding has the shape \(264, 32\).*needs \(300, 32\)"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"lm_head/kernel has the shape \(32, 264\).*needs None"):
        load(tmp_path)
