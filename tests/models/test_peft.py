import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import memjax as mj
from memjax.codecs import int8
from memjax.models import load_peft, save_peft
from tests.adapters.peft_fixtures import FOLDER, base, load, logits, reference

NAMES = ("lora", "lora_patterns", "lora_some_layers", "lora_embedding", "rslora")


@pytest.mark.parametrize("name", NAMES)
def test_adapters_that_peft_wrote_give_its_logits(name):
    adapter, frozen, theta = load(name)
    np.testing.assert_allclose(logits(base(), adapter.attach(frozen, theta)), reference(name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_back_the_same(name, tmp_path):
    adapter, frozen, theta = load(name)
    save_peft(tmp_path, base(), adapter, theta, frozen)
    again, other_frozen, other_theta = load_peft(tmp_path, base())
    np.testing.assert_array_equal(
        logits(base(), again.attach(other_frozen, other_theta)), logits(base(), adapter.attach(frozen, theta))
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]


def test_settings_survive_where_the_layers_agree():
    adapter, _, theta = load("lora")
    assert (adapter.rank, adapter.alpha, adapter.scaling) == (4, 8, "alpha_over_r")
    assert theta["layers/self_attn/q_proj/kernel"]["a"].shape == (3, 32, 4)
    adapter, _, _ = load("rslora")
    assert adapter.scaling == "rslora" and adapter.alpha == 3


def test_padding_of_ranks_gets_no_gradient():
    adapter, frozen, theta = load("lora_patterns")
    path = "layers/self_attn/q_proj/kernel"  # ranks 4, 7, 4

    def total(theta):
        return jnp.sum(mj.lift(base().logits)(adapter.attach(frozen, theta), np.arange(6)[None]) ** 2)

    grads = jax.grad(total)(theta)[path]
    assert theta[path]["a"].shape[-1] == 7
    for layer in (0, 2):
        assert not np.any(grads["a"][layer, :, 4:]) and not np.any(grads["b"][layer, 4:])
        assert np.all(np.any(grads["a"][layer, :, :4], axis=0))
    assert np.all(np.any(grads["a"][1], axis=0))


def test_short_names_name_no_other_modules(tmp_path):
    encoder = mj.models.load("tests/models/checkpoints/bert", dtype="float32")
    adapter = mj.adapters.lora(rank=2, targets=["layers/mlp/down_proj/kernel", "layers/self_attn/q_proj/kernel"])
    theta = jax.tree.map(lambda x: x + 0.1, adapter.init(jax.random.key(0), encoder.params))
    save_peft(tmp_path, encoder, adapter, theta)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["0.output.dense", "1.output.dense", "2.output.dense", "query"]
    assert settings["task_type"] == "FEATURE_EXTRACTION"
    _, _, again = load_peft(tmp_path, encoder)
    jax.tree.map(np.testing.assert_array_equal, again, theta)


def test_embedding_packed_along_its_features(tmp_path):
    axes = {"**/embedding": ((-1,), (-2,))}
    params = mj.weights.quantize(base().params, int8(group=32), where="embed_tokens/embedding", axes=axes)
    packed = mj.models.Model(base().config, params, None, "packed")
    adapter, frozen, theta = load_peft(FOLDER / "lora_embedding", packed)
    expected = mj.weights.materialize(load("lora_embedding")[0].attach(*load("lora_embedding")[1:]))
    found = mj.weights.materialize(adapter.attach(frozen, theta))
    off = found["embed_tokens"]["embedding"] - expected["embed_tokens"]["embedding"]
    assert abs(off).max() < 0.02
    save_peft(tmp_path, packed, adapter, theta)
    written, original = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, FOLDER / "lora_embedding")
    )
    jax.tree.map(np.testing.assert_array_equal, written, original)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "belong to a changed base model"),
    ],
)
def test_settings_that_are_not_read(change, message, tmp_path):
    shutil.copytree(FOLDER / "lora", tmp_path / "x")
    file = tmp_path / "x" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "x", base())


@pytest.mark.parametrize(
    "rename, message",
    [
        (("q_proj.lora_A", "w_proj.lora_A"), "w_proj.*fits no weight"),
        (("layers.0.self_attn.q_proj.lora_A", "layers.9.self_attn.q_proj.lora_A"), "layers.9.*fits no weight"),
        (("layers.0.self_attn.v_proj.lora_B", ""), "lacks the tensors"),
        (("q_proj.lora_A", "o_proj.lora_A"), "lacks the tensors"),
    ],
)
def test_tensors_that_do_not_fit(rename, message, tmp_path):
    shutil.copytree(FOLDER / "lora", tmp_path / "x")
    file = tmp_path / "x" / "adapter_model.safetensors"
    tensors = load_file(file)
    old, new = rename
    save_file({name.replace(old, new): t for name, t in tensors.items() if new or old not in name}, file)
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "x", base())


def test_wrong_shapes_and_missing_files(tmp_path):
    shutil.copytree(FOLDER / "lora", tmp_path / "x")
    file = tmp_path / "x" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name][:-1]}, file)
    with pytest.raises(ValueError, match=r"v_proj: expected tensors of shapes \(r, 32\) and \(16, r\)"):
        load_peft(tmp_path / "x", base())
    file.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        load_peft(tmp_path / "x", base())
