import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import memjax as mj
from memjax.codecs import int8
from memjax.core.paths import leaf_paths
from memjax.models import load_peft, save_peft
from memjax.models.peft import vera_projections
from tests.adapters.peft_fixtures import FOLDER, adapted_logits, base, load, reference

NAMES = (
    "lora",
    "lora_patterns",
    "lora_some_layers",
    "lora_embedding",
    "rslora",
    "dora",
    "vera",
    "vera_key",
    "ia3",
)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_that_peft_wrote_give_its_logits(name):
    np.testing.assert_allclose(adapted_logits(*load(name)), reference(name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_back_the_same(name, tmp_path):
    adapter, frozen, theta = load(name)
    save_peft(tmp_path, base(), adapter, theta, frozen)
    again, other_frozen, other_theta = load_peft(tmp_path, base())
    assert again.method == adapter.method
    jax.tree.map(np.testing.assert_array_equal, other_theta, theta)
    if adapter.method == "vera":
        np.testing.assert_array_equal(again.shared.a, adapter.shared.a)
        np.testing.assert_array_equal(again.shared.b, adapter.shared.b)
    else:
        assert again == adapter
        jax.tree.map(np.testing.assert_array_equal, other_frozen, frozen)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]


def test_projections_drawn_from_the_key_of_vera():
    stored = load_file(FOLDER / "vera" / "adapter_model.safetensors")
    a, b = vera_projections(7, 6, 48, 48)
    np.testing.assert_allclose(a, stored["base_model.vera_A"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(b, stored["base_model.vera_B"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["pissa", "olora", "lora_fa"])
def test_methods_that_amount_to_lora_are_written_as_such(method, tmp_path):
    adapter = getattr(mj.adapters, method)(rank=2, alpha=3, targets="**/q_proj/kernel")
    frozen, theta = adapter.prepare(jax.random.key(0), base().params)
    theta = jax.tree.map(lambda x: x + 0.1, theta)
    save_peft(tmp_path, base(), adapter, theta, frozen)
    again, other, other_theta = load_peft(tmp_path, base())
    assert again.method == "lora"
    path = "layers/self_attn/q_proj/kernel"
    found, expected = (
        jax.jit(lambda frozen, theta, a=a: dict(leaf_paths(a.attach(frozen, theta)))[path].materialize())(f, t)
        for a, f, t in ((again, other, other_theta), (adapter, frozen, theta))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_method_without_a_counterpart_is_refused(tmp_path):
    adapter = mj.adapters.bias_only(targets=(), kernels="**/q_proj/kernel")
    with pytest.raises(ValueError, match="q_proj/kernel: bias_only makes it something else"):
        save_peft(tmp_path, base(), adapter, adapter.init(jax.random.key(0), base().params))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lora", "dora", "vera_key", "ia3"])
def test_layers_without_tensors_stay_as_they_are(name, tmp_path):
    shutil.copytree(FOLDER / name, tmp_path / "x")
    file = tmp_path / "x" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if ".layers.1." not in key}, file)
    adapter, frozen, theta = load_peft(tmp_path / "x", base())
    path = "layers/self_attn/v_proj/kernel"
    attached = jax.jit(lambda: dict(leaf_paths(adapter.attach(frozen, theta)))[path].materialize())()
    off = abs(attached - dict(leaf_paths(base().params))[path]).max((1, 2))
    assert off[1] < 1e-6 and off[0] > 0.01 and off[2] > 0.01


def test_settings_survive_where_the_layers_agree():
    adapter, _, theta = load("lora")
    assert (adapter.rank, adapter.alpha, adapter.scaling) == (4, 8, "alpha_over_r")
    assert theta["layers/self_attn/q_proj/kernel"]["a"].shape == (3, 32, 4)
    adapter, _, _ = load("rslora")
    assert adapter.scaling == "rslora" and adapter.alpha == 3


def test_padding_of_ranks_gets_no_gradient():
    adapter, frozen, theta = load("lora_patterns")
    path = "layers/self_attn/q_proj/kernel"  # ranks 4, 7, 4

    def total(factors):
        view = adapter.attach(frozen, {path: factors})["layers"]["self_attn"]["q_proj"]["kernel"]
        return jnp.sum(view.dot(jnp.ones((3, 2, 32))) ** 2)

    grads = jax.jit(jax.grad(total))(theta[path])
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
        (("lora_A", "hada_w1_a"), "hada_w1_a.*fits no weight"),
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


def test_vectors_of_wrong_sizes_or_kinds(tmp_path):
    for name, key, change, message in (
        ("dora", "layers.1.self_attn.v_proj.lora_magnitude_vector", lambda x: x[:-1], "lora_magnitude_vector of 16"),
        ("vera", "layers.2.mlp.up_proj.vera_lambda_d", lambda x: x[:-1], "vera_lambda_d of 6 numbers"),
        ("ia3", "layers.0.mlp.down_proj.ia3_l", lambda x: x.T[:32].copy(), r"expected ia3_l of shape \(1, 48\)"),
    ):
        shutil.copytree(FOLDER / name, tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        tensors, key = load_file(file), f"base_model.model.model.{key}"
        save_file(tensors | {key: change(tensors[key])}, file)
        with pytest.raises(ValueError, match=message):
            load_peft(tmp_path / name, base())


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
