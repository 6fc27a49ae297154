"""What a fine-tuning run does: every choice by name, from the command line or a TOML file, and checked together."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax

from memjax import parallel, remat
from memjax.recipes.attention import parse_attention
from memjax.recipes.data import TooLong
from memjax.recipes.formats import ONLY_GROUP, Format, group_of
from memjax.recipes.methods import METHODS, AdapterName, complete
from memjax.recipes.optimizers import OPTIMIZERS, OptimizerName, every_weight
from memjax.recipes.train import Schedule

Dtype = Literal["auto", "float32", "bfloat16"]
# Settings that may change on resume: they say where things are and how often, and change no number.
FREE_SETTINGS = ("data", "out", "resume", "save_every", "keep", "eval_every", "prompt", "sample_tokens", "temperature")

_COUNTS = (
    *("rank", "batch", "seq", "accumulate", "steps", "update_gap", "chunk", "mlp_chunk"),
    *("eval_windows", "keep", "sample_tokens"),
)
# Settings, whether a value is in their range, which NaN never is, and the range in words.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_COUNTS, lambda value: value >= 1, "at least 1"),
    (("warmup", "eval_every", "save_every", "seed"), lambda value: value >= 0, "at least 0"),
    (("alpha", "lr", "clip"), lambda value: 0 < value < math.inf, "finite and above 0"),
    (("weight_decay", "temperature"), lambda value: 0 <= value < math.inf, "finite and at least 0"),
    (("dropout",), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (("density",), lambda value: 0 <= value <= 1, "between 0 and 1"),
    (("held_out",), lambda value: 0 < value < 1, "above 0 and below 1"),
)


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """What a fine-tuning run does.

    Attributes:
      model: smollm2, a .gguf file, a Hugging Face folder, a folder of `memjax quantize`, or a hub name.
      data: .txt, .jsonl (prompt and completion, or messages), or kjv (packaged).
      adapter: the method; none: the weights themselves are trained; with format dense also those packed in the file.
      rank: rank of the adapter; by default the method's (lora: 16), as for alpha, targets and lr.
      alpha: scale of the adapter times its rank (lora: twice the rank).
      targets: patterns of the weights that are adapted (lora: all linear layers), or trained (none: all weights).
      dropout: on the adapter's input.
      format: how the frozen weights are held: as in the file, dense, or the targets encoded (the rest as in the file).
      group: weights per scale of encoded weights (64; q4_0, q4_1 and q8_0 always have 32).
      dtype: of dense weights and the computation; auto: bfloat16 on GPU, float32 on CPU. Trained weights that are
        bfloat16 are rounded stochastically.
      batch: sequences per step.
      seq: tokens per sequence.
      accumulate: microbatches that the batch is divided into.
      steps: training steps.
      optimizer: badam and lisa train a few layers at a time; mezo does without a backward pass.
      density: part of a matrix that has moments (micro_adam: 0.01), or its rank over its smaller side (galore and its
        kin); 0.25 where none is given.
      update_gap: steps between changes of that part, or of the trained layers.
      fused: update every layer while its gradient exists, so that all gradients never do.
      lr: highest learning rate (lora with adamw: 2e-3).
      schedule: of the learning rate after the warm-up.
      warmup: steps of linear warm-up.
      weight_decay: decoupled weight decay.
      clip: largest global norm of the gradients; None does not clip. badam, lisa and mezo never do.
      mesh: devices that train together: data=2 splits the batch, fsdp=2 the batch and the weights, model=2 each layer's
        matrices; data=2,model=2 and the like do both. None: one device.
      remat: what is kept of each layer for the backward pass: none: all; full: its input; linear: and what linear
        layers give; dots: and matrix products; 8bit, 4bit, 2bit: all, packed; full-8bit, linear-8bit and the like:
        the same, packed; offload, offload-linear, offload-4bit: the same in host memory.
      attention: which past tokens a token sees, parts joined by commas: window=1024 (the last ones), sinks=4 (the first
        ones), chunked=2048 (those of its chunk); None: all. Documents are always kept apart.
      chunk: logits exist for so many tokens at a time.
      mlp_chunk: MLPs exist for so many tokens at a time; None: for all. With remat none, 8bit, 4bit, 2bit and
        offload-4bit their inputs alone are kept.
      held_out: fraction of the data, at its end, that is held out.
      eval_windows: sequences of held-out data that are evaluated.
      eval_every: also evaluate every so many steps; 0: only before and after.
      too_long: documents longer than seq: error, cut or drop.
      seed: of the order of the data, the adapter, dropout and the optimizer.
      save_every: steps between checkpoints; 0: only at the end.
      keep: checkpoints that are kept.
      resume: folder of a run to go on with; every setting is taken from the run, --model too. More steps lengthen
        it, if nothing in it follows from its length.
      out: folder for results; by default runs/MODEL-ADAPTER.
      prompt: start of the samples; by default the start of the held-out data.
      sample_tokens: tokens of each sample.
      temperature: of the samples; 0 takes the most probable token.
    """

    model: str
    data: str = "kjv"
    adapter: AdapterName = "lora"
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    format: Format = "keep"
    group: int | None = None
    dtype: Dtype = "auto"
    batch: int = 2
    seq: int = 128
    accumulate: int = 1
    steps: int = 50
    optimizer: OptimizerName = "adamw"
    density: float | None = None
    update_gap: int | None = None
    fused: bool = False
    lr: float | None = None
    schedule: Schedule = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    mesh: str | None = None
    remat: remat.Name = "full"
    attention: str | None = None
    chunk: int = 512
    mlp_chunk: int | None = None
    held_out: float = 0.1
    eval_windows: int = 32
    eval_every: int = 25
    too_long: TooLong = "error"
    seed: int = 0
    save_every: int = 25
    keep: int = 2
    resume: str | None = None
    out: str | None = None
    prompt: str | None = None
    sample_tokens: int = 40
    temperature: float = 0.7


def run_folder(settings: FinetuneSettings) -> Path:
    """Returns the folder for results."""
    return Path(settings.resume or settings.out or f"runs/{Path(settings.model).stem}-{settings.adapter}")


def bound_to_length(settings: FinetuneSettings) -> list[str]:
    """Returns the settings by which every step of a run depends on how many there are."""
    optimizer = OPTIMIZERS[settings.optimizer]
    bound = {
        "schedule": settings.schedule != "constant",
        "adapter": METHODS[settings.adapter].after is not None,
        "optimizer": settings.update_gap is None and "update_gap" in optimizer.settings,
    }
    return [f"{name}={getattr(settings, name)}" for name, follows in bound.items() if follows]


def checked(settings: FinetuneSettings) -> FinetuneSettings:
    """Returns the settings with the method's own where none are given.

    Raises:
      ValueError: numbers out of range, or choices that contradict each other; says which.
    """
    for names, within, expected in _RANGES:
        for name in names:
            value = getattr(settings, name)
            if value is not None and not within(value):
                raise ValueError(f"{name}={value} must be {expected}")
    if settings.resume and settings.out and Path(settings.out) != Path(settings.resume):
        raise ValueError(f"a run resumes in its own folder {settings.resume}; out={settings.out} cannot be given too")
    if run_folder(settings).is_file():
        name = "resume" if settings.resume else "out"
        raise ValueError(f"{name}={run_folder(settings)} is a file; give the name of a folder")
    if settings.warmup >= settings.steps:
        raise ValueError(f"warmup={settings.warmup} must be less than steps={settings.steps}")
    if settings.batch % settings.accumulate:
        raise ValueError(f"accumulate={settings.accumulate} does not divide batch={settings.batch}")
    group = group_of(settings.format, settings.group)
    remat.parse(settings.remat)
    parse_attention(settings.attention)
    if settings.optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {settings.optimizer!r}; known are {', '.join(OPTIMIZERS)}")
    optimizer = OPTIMIZERS[settings.optimizer]
    for name in ("density", "update_gap"):
        if getattr(settings, name) is not None and name not in optimizer.settings:
            raise ValueError(f"{settings.optimizer} has no {name}; leave {name}={getattr(settings, name)} out")
    if settings.density == 0 and not settings.optimizer.startswith("frugal"):
        raise ValueError(f"density={settings.density} must be above 0 with optimizer={settings.optimizer}")
    if every_weight(settings) and settings.format not in ("keep", "dense"):
        raise ValueError(
            f"adapter=none trains all weights, and packed ones cannot be; format={settings.format} packs them: choose "
            "format=dense, or an adapter"
        )
    layerwise = "fused" if settings.fused else settings.optimizer if optimizer.kind == "blocks" else None
    if layerwise and not every_weight(settings):
        raise ValueError(
            f"{layerwise} goes through the layers of a model whose weights are all trained, as with adapter=none; got "
            f"adapter={settings.adapter}, targets={settings.targets}"
        )
    if settings.fused and optimizer.kind != "gradients":
        raise ValueError(f"{settings.optimizer} has a step of its own; fused cannot be given too")
    if settings.accumulate > 1 and (layerwise or optimizer.kind != "gradients"):
        raise ValueError(
            f"{layerwise or settings.optimizer} keeps no sum of gradients; leave accumulate={settings.accumulate} out"
        )
    if settings.dropout and optimizer.kind == "passes":
        raise ValueError(
            f"{settings.optimizer} compares two passes, and dropout would differ; leave dropout={settings.dropout} out"
        )
    if settings.remat not in ("none", "full") and optimizer.kind == "passes":
        raise ValueError(f"{settings.optimizer} has no backward pass; leave remat={settings.remat} out")
    if settings.mesh is not None:
        if settings.fused or optimizer.kind != "gradients":
            what = "fused" if settings.fused else settings.optimizer
            raise ValueError(f"{what} runs on one device; leave mesh={settings.mesh} out")
        parts = parallel.batch_parts(parallel.make_mesh(settings.mesh))
        if settings.batch // settings.accumulate % parts:
            raise ValueError(
                f"mesh={settings.mesh} divides every microbatch among {parts} devices; batch={settings.batch} and "
                f"accumulate={settings.accumulate} make microbatches of {settings.batch // settings.accumulate}"
            )
    chosen = complete(
        settings.adapter, rank=settings.rank, alpha=settings.alpha, targets=settings.targets, lr=settings.lr
    )
    lr = chosen.lr * optimizer.rate if settings.lr is None else settings.lr
    return dataclasses.replace(settings, group=group, **chosen._replace(lr=lr)._asdict())


def read_toml(path: str | Path) -> dict[str, Any]:
    """Returns the settings in a TOML file, for `FinetuneSettings`.

    Raises:
      ValueError: no such file, no TOML, a name that is no setting, or a value of another type.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read settings from {path}: {reason}") from error
    known = {field.name for field in dataclasses.fields(FinetuneSettings)}
    if unknown := [name for name in found if name.replace("-", "_") not in known]:
        raise ValueError(f"{path}: no settings of a run: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    settings = {
        name.replace("-", "_"): tuple(value) if isinstance(value, list) else value for name, value in found.items()
    }
    hints = get_type_hints(FinetuneSettings)
    for name, value in settings.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{path}: {name}={value!r} must be {_named(hints[name])}")
    return settings


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value of a TOML file is one of the type of a setting."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _named(hint: Any) -> str:
    """Returns what a setting may be, in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is UnionType:
        return " or ".join(_named(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        return "a list of strings"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[hint]


def with_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns the recorded settings of a run with those that there were not yet when it began.

    Runs recorded a group also for formats without a choice of it.
    """
    fields = dataclasses.fields(FinetuneSettings)
    known = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING} | recorded
    return known | {"group": ONLY_GROUP.get(known["format"], known["group"])}


def concrete(dtype: Dtype) -> str:
    """Returns the dtype that "auto" stands for on this machine; others as they are."""
    if dtype == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dtype
