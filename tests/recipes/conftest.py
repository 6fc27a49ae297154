"""A tiny random Llama with a tokenizer of bytes, as a checkpoint folder."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from memjax.models import LlamaConfig, abstract

CONFIG = LlamaConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
    max_positions=64,
)


def write_checkpoint(folder):
    settings = {
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "tie_word_embeddings": True,
        "max_position_embeddings": CONFIG.max_positions,
        "rms_norm_eps": CONFIG.rms_eps,
        "eos_token": "<end>",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    tensors = {}
    params = abstract(CONFIG)

    def add(name, shape, transpose=False):
        values = np.ones(shape, np.float32) if "norm" in name else rng.normal(size=shape).astype(np.float32) * 0.3
        tensors[f"model.{name}.weight"] = np.ascontiguousarray(values.T if transpose else values)

    add("embed_tokens", params["embed_tokens"]["embedding"].shape)
    add("norm", params["norm"]["scale"].shape)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params["layers"])[0]:
        for i in range(CONFIG.num_layers):
            path = ".".join(key.key for key in keys[:-1])
            add(f"layers.{i}.{path}", leaf.shape[1:], transpose=True)
    save_file(tensors, folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<end>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of the checkpoint folder."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A text that can be learned."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and the dog ran to the man. " * 60)
    return path


@pytest.fixture(scope="session")
def jsonl_file(tmp_path_factory):
    """Sums as prompts and completions."""
    path = tmp_path_factory.mktemp("jsonl") / "sums.jsonl"
    records = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(20) for b in range(10)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
