"""The small random checkpoints that `make_checkpoints.py` made, with what transformers computes from them."""

import functools
import pathlib

from safetensors.numpy import load_file

from memjax import models

FOLDER = pathlib.Path(__file__).parent / "checkpoints"
ENCODERS = ("bert", "bert_masked_lm", "roberta")
DECODERS = tuple(sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir() and folder.name not in ENCODERS))


@functools.cache
def checkpoint(name: str) -> models.Model:
    """Returns the model, in float32."""
    return models.load(FOLDER / name, dtype="float32")


@functools.cache
def reference(name: str) -> dict:
    """Returns tokens, logits, hidden and greedy (decoders) or tokens, mask and hidden (encoders)."""
    values = load_file(FOLDER / name / "reference.safetensors")
    return {key: value.astype("int32") if value.dtype == "int64" else value for key, value in values.items()}
