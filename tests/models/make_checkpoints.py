"""Makes the small random checkpoints of ``tests/models/checkpoints`` with transformers.

Not run by the tests: it needs torch and transformers, which memjax does not. Each folder gets what ``save_pretrained``
writes, and ``reference.safetensors`` with token ids and what transformers computes from them in float32.

Run from the repository root: ``python tests/models/make_checkpoints.py``.
"""

import json
import pathlib
import shutil

import tokenizers
import torch
import transformers as hf
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).parent / "checkpoints"
SMALL = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip

DECODERS = {
    "llama2": (hf.LlamaConfig(**SMALL, num_key_value_heads=4), "1GB"),
    "llama3": (
        hf.LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3, tie_word_embeddings=True),
        "1GB",
    ),
    "llama_bytes": (  # comes with a tokenizer
        hf.LlamaConfig(**SMALL | dict(vocab_size=264, max_position_embeddings=512), num_key_value_heads=2),
        "1GB",
    ),
    "llama_linear_biases": (
        hf.LlamaConfig(
            **SMALL, num_key_value_heads=1, attention_bias=True, mlp_bias=True,
            rope_parameters=dict(rope_type="linear", rope_theta=5000.0, factor=4.0),
        ),
        "1GB",
    ),
    "mistral": (hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=7), "80KB"),
    "qwen2": (hf.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True), "1GB"),
    "qwen2_windows": (
        hf.Qwen2Config(
            **SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
        "1GB",
    ),
    "qwen3": (hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16), "80KB"),
    "qwen3_tied": (hf.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True), "1GB"),
}  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    """Gives norms and biases, which start at ones and zeros, random values too."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(0.3 * torch.randn_like(weight) + ("norm" in name.lower() and "bias" not in name))


def write_tokenizer(folder: pathlib.Path) -> None:
    """Writes a byte-level tokenizer of 259 tokens: an end token, two of chats, and one per byte."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = special + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[0]}) + "\n")


def write(folder: pathlib.Path, model: hf.PreTrainedModel, shard: str, reference: dict[str, torch.Tensor]) -> None:
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({name: value.contiguous() for name, value in reference.items()}, folder / "reference.safetensors")


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    for i, (name, (config, shard)) in enumerate(DECODERS.items()):
        torch.manual_seed(i)
        config._attn_implementation = "eager"
        model = hf.AutoModelForCausalLM.from_config(config).float().eval()
        randomize(model)
        tokens = torch.randint(0, config.vocab_size, (2, 24))
        with torch.no_grad():
            out = model(tokens, output_hidden_states=True, use_cache=False)
            greedy = tokens[:, :8]
            for _ in range(8):
                best = model(greedy, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                greedy = torch.cat([greedy, best], dim=1)
        reference = {"tokens": tokens, "logits": out.logits, "hidden": out.hidden_states[-1], "greedy": greedy}
        write(ROOT / name, model, shard, reference)
        if name == "llama_bytes":
            write_tokenizer(ROOT / name)

    for i, (name, model_class, config) in enumerate(
        [
            ("bert", hf.BertModel, hf.BertConfig(**SMALL)),
            ("bert_masked_lm", hf.BertForMaskedLM, hf.BertConfig(**SMALL)),
            ("roberta", hf.RobertaModel, hf.RobertaConfig(**SMALL, type_vocab_size=1)),
        ]
    ):
        torch.manual_seed(100 + i)
        config._attn_implementation = "eager"
        model = model_class(config).float().eval()
        randomize(model)
        tokens = torch.randint(5, config.vocab_size, (2, 20))
        mask = torch.ones_like(tokens)
        mask[1, 13:] = 0
        tokens[1, 13:] = config.pad_token_id
        encoder = model.bert if name == "bert_masked_lm" else model
        with torch.no_grad():
            hidden = encoder(tokens, attention_mask=mask).last_hidden_state
        write(ROOT / name, model, "1GB", {"tokens": tokens, "mask": mask, "hidden": hidden})

    for folder in sorted(ROOT.iterdir()):
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(folder.name, size, sorted(file.name for file in folder.iterdir()))
        assert size < 1_000_000
        assert json.loads((folder / "config.json").read_text())["model_type"]


if __name__ == "__main__":
    main()
