"""From a prompt to text, with or without a trained adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from memjax import models
from memjax.recipes.attention import parse_attention
from memjax.recipes.convert import load_adapter


def generate_text(
    model: models.Model,
    prompt: str,
    *,
    adapter: str | Path | None = None,
    chat: bool = False,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    attention: str | None = None,
) -> str:
    """Returns the text with which a model goes on.

    Args:
      model: a decoder with a tokenizer.
      prompt: text to go on with.
      adapter: folder of a trained adapter, of memjax or peft, or of the run that trained it.
      chat: give the prompt as a user's message in the model's chat format.
      max_new_tokens, temperature, top_k: see `memjax.models.generate`.
      seed: of the draws.
      attention: which past tokens a token sees, as `FinetuneSettings` says it; None: as in the run that trained the
        adapter, where ``adapter`` is its folder, else all.

    Raises:
      ValueError: an encoder, no tokenizer, an empty prompt, or an adapter of another model.
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, which text needs")
    params = model.params
    if adapter is not None:
        method, frozen, theta = load_adapter(model, adapter)
        params = method.attach(frozen, theta)
        attention = attention or _trained_attention(Path(adapter))
    if chat:
        ids = model.tokenizer.chat([{"role": "user", "content": prompt}], add_generation_prompt=True)[0]
    else:
        ids = model.tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt has no tokens")
    return continue_tokens(
        model,
        params,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        key=jax.random.key(seed),
        attention=parse_attention(attention),
    )


def _trained_attention(folder: Path) -> str | None:
    """Returns the attention of the run in a folder, None for a folder of no run."""
    report = folder / "report.json"
    return json.loads(report.read_text(encoding="utf-8"))["settings"].get("attention") if report.is_file() else None


def continue_tokens(model: models.Model, params: Any, prompt: list[int], count: int, **options: Any) -> str:
    """Returns, as text, up to ``count`` tokens after ``prompt``; ``params`` may hold views; options as
    `memjax.models.generate`."""
    ends = {model.tokenizer.eos_id, model.tokenizer.turn_end_id} - {None}
    tokens = models.generate(
        model, params, jnp.asarray([prompt], jnp.int32), max_new_tokens=count, eos=sorted(ends), **options
    )
    return model.tokenizer.decode(tokens[0, len(prompt) :].tolist())
