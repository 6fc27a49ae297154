"""What most people run: transformers and peft with gradient checkpointing, and Liger's kernels when installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.harness import GIB, time_calls
from benchmarks.shapes import Llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(
    config: Llama,
    tokens: np.ndarray,
    *,
    rank: int,
    alpha: float,
    learning_rate: float,
    seed: int,
    warmup: int,
    repeats: int,
    nf4: bool = False,
) -> dict[str, Any]:
    """Trains LoRA on a random bfloat16 Llama and returns speed, bytes and losses.

    Args:
      config: sizes.
      tokens: int32 [B, S], one batch for all steps.
      rank, alpha: of the adapters.
      learning_rate: of AdamW.
      seed: of the random weights.
      warmup, repeats: steps that are not and that are timed.
      nf4: pack the linear layers by bitsandbytes, with double quantization.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    torch.manual_seed(seed)
    sizes = transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=tokens.shape[1],
        rms_norm_eps=config.eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
        use_cache=False,
    )
    with device:
        model = transformers.AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16, attn_implementation="sdpa")
    if nf4:
        _pack(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=1e-4, fused=on_gpu)
    batch = torch.as_tensor(tokens, dtype=torch.long, device=device)
    losses = []

    def step() -> None:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    def peak_gib() -> float | None:
        return torch.cuda.max_memory_allocated() / GIB if on_gpu else None

    row = {"liger": liger, "peak_after_init_gib": peak_gib()}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    wait = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    timing = time_calls(step, wait, warmup=warmup, repeats=repeats)
    return (
        row
        | timing._asdict()
        | {
            "peak_gib": peak_gib(),
            "loss_first": losses[0].item(),
            "loss_last": losses[-1].item(),
        }
    )


def _pack(model: Any) -> None:
    """Replaces the linear layers of the decoder, not the head, by those of bitsandbytes."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                settings = {"compress_statistics": True, "quant_type": "nf4"}
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, **settings
                )
                packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **settings)
                setattr(part, name, packed.to(linear.weight.device))
    model.is_loaded_in_4bit = True
    torch.cuda.empty_cache()
