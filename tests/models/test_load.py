import dataclasses
import json
import shutil
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memjax import codecs, models
from memjax.core.paths import leaf_paths
from memjax.core.views import is_view, materialize
from memjax.models import llama
from memjax.models.layers import structure
from tests import bitsandbytes_reference
from tests.models.checkpoints import FOLDER, checkpoint, reference

CONFIG = models.LlamaConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_eps=1e-5,
    max_positions=64,
)


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint, to be damaged."""
    shutil.copytree(FOLDER / "llama3", tmp_path / "model")
    return tmp_path / "model"


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"lacks tensor 'model.layers.1.mlp.up_proj.weight' of shape \(48, 32\), which layers/mlp/up_proj/kernel",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            r"tensor 'model.norm.weight': expected shape \(32,\) for norm/scale, found \(31,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(32, np.int32)}),
            "tensor 'model.norm.weight': expected dtype float32, float16, bfloat16, found int32",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.ones((48, 32), np.float32)}),
            "1 tensors that the model does not know: model.layers.3.mlp.up_proj.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    _edit(folder, change)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_tensors_without_use_are_passed_over(folder):
    extra = {
        "lm_head.weight": np.ones((96, 32), np.float32),  # tied to the embedding
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    _edit(folder, lambda tensors: tensors.update(extra))
    model = models.load(folder, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, model.params, checkpoint("llama3").params)
    assert model.name == str(folder) and model.tokenizer is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(folder, dtype):
    dtype = jax.numpy.dtype(dtype)
    _edit(folder, lambda tensors: tensors.update({name: value.astype(dtype) for name, value in tensors.items()}))
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), checkpoint("llama3").params)
    jax.tree.map(np.testing.assert_array_equal, models.load(folder, dtype="float32").params, expected)


def test_bad_options_say_what_is_wrong(folder):
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'bfloat16', got 'int8'"):
        models.load(folder, dtype="int8")
    with pytest.raises(ValueError, match="weights must be 'keep', 'dense' or a codec, got 'packed'"):
        models.load(folder, weights="packed")
    with pytest.raises(ValueError, match=r"pattern '\*\*/w' matches no leaf"):
        models.load(folder, weights=codecs.int8(group=16), targets="**/w")
    with pytest.raises(
        ValueError, match=r"layers/mlp/down_proj/kernel \(tensor .*layers.0.*groups of 32 do not divide"
    ):
        models.load(folder, weights=codecs.int8(group=32))  # the inner width is 48
    _edit(folder, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].__setitem__((0, 0), np.nan))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight'.*NaN or infinity"):
        models.load(folder, weights=codecs.int8(group=16))
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match="model_type 'mamba'; supported: llama, mistral, qwen2, qwen3, bert"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        models.load(folder)


def test_a_codec_packs_each_layer_as_it_packs_the_stack():
    codec = codecs.int4(group=16)
    model = models.load(FOLDER / "qwen2", dtype="float32", weights=codec, targets="**/{q,up}_proj/kernel")
    dense = dict(leaf_paths(checkpoint("qwen2").params))
    for path, leaf in leaf_paths(model.params):
        assert is_view(leaf) == path.endswith(("q_proj/kernel", "up_proj/kernel"))
        if is_view(leaf):
            packed = codec.encode(dense[path], axes=(-2,))
            np.testing.assert_array_equal(leaf.packed.planes[0], packed.planes[0])
            np.testing.assert_array_equal(leaf.packed.scale, packed.scale)
            assert leaf.shape == dense[path].shape and leaf.dtype == dense[path].dtype


def test_loading_holds_the_result_and_one_leaf(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=4096, hidden_size=128, intermediate_size=512, num_layers=8)
    shapes = dict(leaf_paths(structure(models.Llama, config)[1]))
    tensors = {}
    for path, source in llama.hf_sources(config).items():
        for i in range(config.num_layers if "{}" in source.name else 1):
            shape = shapes[path].shape[1:] if "{}" in source.name else shapes[path].shape
            tensors[source.name.format(i)] = np.ones(shape[::-1] if source.transpose else shape, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    settings = dict(
        model_type="llama",
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    (tmp_path / "config.json").write_text(json.dumps(settings))
    del tensors
    tracemalloc.start()
    model = models.load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(model.params)]
    assert peak < sum(sizes) + 1.2 * max(sizes)


def _random_tensors(config, architecture):
    """Returns params and the tensors that a GGUF file of that architecture holds for them."""
    rng = np.random.default_rng(0)
    shapes = structure(models.Llama, config)[1]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    tensors = {}
    for path, leaf in leaf_paths(params):
        source = llama.gguf_sources(config, architecture)[path]
        for i, value in enumerate(leaf if "{}" in source.name else [leaf]):
            value = value.T if source.transpose else value
            if source.rotary_heads:  # halves (i, i + Dh/2) -> adjacent pairs (2i, 2i + 1)
                value = value.reshape(source.rotary_heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
            tensors[source.name.format(i)] = np.ascontiguousarray(value)
    return params, tensors


def _write_gguf(path, config, architecture, tensors, kinds=None, **metadata):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_context_length(config.max_positions)
    for key, value in metadata.items():
        writer.add_string(f"{architecture}.{key}", value)
    for name, value in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("llama", {}),
        ("llama", {"tie_embeddings": True, "attention_bias": True}),
        ("qwen2", {"attention_bias": True}),
        ("qwen3", {"qk_norm": True, "tie_embeddings": True}),
    ],
)
def test_gguf_files_give_the_params_they_were_made_from(tmp_path, architecture, change):
    config = dataclasses.replace(CONFIG, **change)
    params, tensors = _random_tensors(config, architecture)
    _write_gguf(tmp_path / "model.gguf", config, architecture, tensors)
    model = models.load(tmp_path / "model.gguf", dtype="float32")
    assert dataclasses.replace(model.config, rms_eps=1e-5) == config
    assert model.config.rms_eps == pytest.approx(1e-5)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


def test_rope_factors_of_a_gguf_file_are_llama_3_scaling(tmp_path):
    scaling = models.RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    _, tensors = _random_tensors(config, "llama")
    plain = llama.rope_frequencies(CONFIG)
    tensors["rope_freqs.weight"] = plain / llama.rope_frequencies(config)
    assert tensors["rope_freqs.weight"][-1] == 8 and tensors["rope_freqs.weight"][0] == 1
    _write_gguf(tmp_path / "model.gguf", config, "llama", tensors)
    loaded = models.load(tmp_path / "model.gguf").config
    np.testing.assert_allclose(llama.rope_frequencies(loaded), llama.rope_frequencies(config), rtol=1e-6)


def test_packed_gguf_tensors_stay_packed(tmp_path):
    _, tensors = _random_tensors(CONFIG, "llama")
    kind = gguf.GGMLQuantizationType
    kinds = {name: kind.Q4_0 for name, value in tensors.items() if value.ndim == 2}
    kinds |= {"token_embd.weight": kind.Q8_0, "output.weight": kind.Q8_0}
    kinds |= {name: kind.Q4_1 for name in kinds if "ffn_down" in name}
    kinds |= {name: kind.F16 for name in kinds if "attn_v" in name}
    kinds["blk.1.ffn_gate.weight"] = kind.Q8_0
    _write_gguf(tmp_path / "model.gguf", CONFIG, "llama", tensors, kinds)
    dense = models.load(tmp_path / "model.gguf", dtype="float32", weights="dense")
    with pytest.warns(UserWarning, match="layers/mlp/gate_proj/kernel mixes the formats Q4_0, Q8_0"):
        kept = models.load(tmp_path / "model.gguf", dtype="float32")
    views = {path: leaf.packed.codec for path, leaf in leaf_paths(kept.params) if is_view(leaf)}
    assert views == {
        "embed_tokens/embedding": codecs.q8_0(),
        "lm_head/kernel": codecs.q8_0(),
        "layers/mlp/down_proj/kernel": codecs.q4_1(),
        **{
            f"layers/{path}_proj/kernel": codecs.q4_0()
            for path in ("mlp/up", "self_attn/q", "self_attn/k", "self_attn/o")
        },
    }
    jax.tree.map(np.testing.assert_array_equal, materialize(kept.params), dense.params)
    with pytest.warns(UserWarning, match=r"model.gguf is packed in Q4_0; .*Q8_0 already"):
        encoded = models.load(tmp_path / "model.gguf", dtype="float32", weights=codecs.int8(group=16))
    formats = {path: leaf.packed.codec for path, leaf in leaf_paths(encoded.params) if is_view(leaf)}
    assert formats["embed_tokens/embedding"] == formats["lm_head/kernel"] == codecs.q8_0()
    assert formats["layers/mlp/up_proj/kernel"] == codecs.int8(group=16)
    with pytest.warns(UserWarning, match="mixes the formats"):
        half = models.load(tmp_path / "model.gguf")
    assert {leaf.dtype.name for _, leaf in leaf_paths(half.params)} == {"bfloat16"}


FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SETTINGS = dict(
    model_type="llama",
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)


@pytest.fixture
def four_bit(tmp_path):
    """Writes a model whose linear layers are in NF4, and returns a function that changes its tensors."""
    rng = np.random.default_rng(0)
    shapes = dict(leaf_paths(structure(models.Llama, CONFIG)[1]))
    tensors = {}
    for path, source in llama.hf_sources(CONFIG).items():
        for i in range(CONFIG.num_layers if "{}" in source.name else 1):
            shape = shapes[path].shape[1:] if "{}" in source.name else shapes[path].shape
            name = source.name.format(i)
            tensors[name] = rng.standard_normal(shape[::-1] if source.transpose else shape).astype(np.float32)
            if "_proj" in name and name != "model.layers.1.self_attn.v_proj.weight":
                nested = "o_proj" not in name
                tensors |= bitsandbytes_reference.checkpoint_tensors(name, tensors[name], nested)
    (tmp_path / "config.json").write_text(json.dumps({**SETTINGS, "quantization_config": FOUR_BIT}))

    def write(change=lambda tensors: tensors):
        save_file(change(dict(tensors)), tmp_path / "model.safetensors")
        return tmp_path, tensors

    return write


def test_weights_that_bitsandbytes_quantized_stay_packed(four_bit):
    folder, tensors = four_bit()
    with pytest.warns(UserWarning) as caught:
        kept = models.load(folder, dtype="float32")
    assert sorted(str(warning.message).split(" and is ")[0] for warning in caught) == [
        "layers/mlp/down_proj/kernel is stored as NF4 (nested scales of 64 across rows), whose blocks do not end with "
        "the rows,",
        "layers/self_attn/v_proj/kernel mixes the formats NF4 (nested scales of 64), float32 over its layers",
    ]
    dense = models.load(folder, dtype="float32", weights="dense")
    assert not any(is_view(leaf) for _, leaf in leaf_paths(dense.params))
    jax.tree.map(np.testing.assert_array_equal, materialize(kept.params), dense.params)
    views = {path.split("/")[-2]: leaf for path, leaf in leaf_paths(kept.params) if is_view(leaf)}
    assert {name: leaf.packed.codec.double for name, leaf in views.items()} == dict.fromkeys(
        ("q_proj", "k_proj", "gate_proj", "up_proj"), True
    ) | {"o_proj": False}
    name = "model.layers.1.mlp.up_proj.weight"
    up = jax.tree.map(lambda leaf: leaf[1], views["up_proj"].packed)
    parts = codecs.to_bitsandbytes(up.transpose((1, 0)))
    np.testing.assert_array_equal(parts.weight, tensors[name])
    np.testing.assert_array_equal(parts.absmax, tensors[f"{name}.absmax"])
    np.testing.assert_array_equal(parts.nested_absmax, tensors[f"{name}.nested_absmax"])
    half = models.load(folder, weights=codecs.int8(32))
    assert half.params["layers"]["mlp"]["down_proj"]["kernel"].packed.codec == codecs.int8(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k.replace("__nf4", "__fp4"): t[k] for k in t}, "in the 4-bit format 'fp4' of bitsandbytes"),
        (lambda t: {k: t[k] for k in t if not k.endswith(".absmax")}, r"its parts .* do not fit its settings"),
        (lambda t: {k: t[k] for k in t if not k.endswith("nested_absmax")}, "do not fit its settings"),
        (
            lambda t: {k: t[k][::-1].copy() if k.endswith(".quant_map") else t[k] for k in t},
            r"weight\.quant_map': expected the 16 values of NF4",
        ),
        (lambda t: {k: t[k][:-1] if "nf4" in k else t[k] for k in t}, "holds no JSON"),
        (lambda t: {k: t[k][:-1] if k.endswith("absmax") else t[k] for k in t}, r"proj\.weight': expected absmax of"),
    ],
)
@pytest.mark.filterwarnings("ignore:layers")
def test_damaged_nf4_tensors_are_named(four_bit, change, message):
    folder, _ = four_bit(change)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_other_quantized_folders_are_refused(four_bit):
    folder, _ = four_bit()
    (folder / "config.json").write_text(json.dumps({**SETTINGS, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"quantization_config = .*gptq"):
        models.load(folder)


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("gemma", {}, "GGUF architecture 'gemma' is not a supported decoder; supported: llama, qwen2, qwen3"),
        ("llama", {"rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn' is not supported"),
    ],
)
def test_unsupported_gguf_files_are_named(tmp_path, architecture, metadata, message):
    _, tensors = _random_tensors(CONFIG, "llama")
    _write_gguf(tmp_path / "model.gguf", CONFIG, architecture, tensors, **metadata)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path / "model.gguf")


def test_missing_gguf_keys_are_named():
    with pytest.raises(ValueError, match=r"GGUF metadata lacks qwen2\.attention\.head_count"):
        llama.config_from_gguf({"general.architecture": "qwen2"}, {})


def test_the_reference_files_are_small():
    assert all(sum(file.stat().st_size for file in folder.iterdir()) < 1e6 for folder in FOLDER.iterdir())
    assert reference("bert")["mask"].min() == 0


def test_a_folder_with_a_tokenizer():
    tokenizer = checkpoint("llama_bytes").tokenizer
    ids = tokenizer.encode("Grüße, world")
    assert len(ids) == len("Grüße, world".encode()) and max(ids) < 259 <= checkpoint("llama_bytes").config.vocab_size
    assert tokenizer.decode(ids) == "Grüße, world" and tokenizer.eos_id == 0 and tokenizer.chat_style == "chatml"
