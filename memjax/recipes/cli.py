"""The `memjax` command."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from memjax.recipes.checkpoint import Checkpoints
from memjax.recipes.convert import MergedDtype, merge_model, quantize_model, worst
from memjax.recipes.finetuning import finetune, load_model
from memjax.recipes.formats import Format, Packing
from memjax.recipes.generation import generate_text
from memjax.recipes.report import leaf_table
from memjax.recipes.settings import Dtype, FinetuneSettings, concrete, read_toml, run_folder, with_defaults


@dataclasses.dataclass(frozen=True)
class Finetune(FinetuneSettings):
    """Train an adapter on frozen weights, or the weights; write losses, bytes, samples and what was trained."""

    config: str | None = None
    """TOML file with settings by these names; those of the command line go before."""

    def run(self, console: Console) -> None:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(FinetuneSettings)}
        finetune(FinetuneSettings(**fields), console)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Go on with a text."""

    model: str
    """smollm2, a .gguf file, a Hugging Face folder, a folder of `memjax quantize`, or a hub name."""
    prompt: str
    """Text to go on with."""
    adapter: str | None = None
    """Folder of a trained adapter: the `adapter` in the folder of a run, that folder, or one that peft wrote."""
    chat: bool = False
    """Give the prompt as a user's message in the model's chat format."""
    max_new_tokens: int = 100
    """Tokens to add at most."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_k: int | None = None
    """Draw among so many most probable tokens."""
    seed: int = 0
    """Of the draws."""
    attention: str | None = None
    """Which past tokens a token sees, such as window=1024,sinks=4, or all; as in the adapter's run if not given."""
    format: Format = "keep"
    """How the weights are held: as in the file, dense, or encoded."""
    group: int | None = None
    """Weights per scale of encoded weights (64; q4_0, q4_1 and q8_0 always have 32)."""
    dtype: Dtype = "auto"
    """Of dense weights and the computation; auto: bfloat16 on GPU, float32 on CPU."""

    def run(self, console: Console) -> None:
        model = load_model(self.model, self.format, self.group, self.dtype)
        text = generate_text(
            model,
            self.prompt,
            adapter=self.adapter,
            chat=self.chat,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            attention=self.attention,
        )
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Inspect:
    """List a model's leaves with their formats, shapes and bytes, as they are held in memory."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """smollm2, minilm, a .gguf file, a Hugging Face folder, a folder of `memjax quantize`, or a hub name."""
    format: Format = "keep"
    """How the weights are held: as in the file, dense, or encoded."""
    group: int | None = None
    """Weights per scale of encoded weights (64; q4_0, q4_1 and q8_0 always have 32)."""
    dtype: Dtype = "auto"
    """Of dense weights; auto: bfloat16 on GPU, float32 on CPU."""

    def run(self, console: Console) -> None:
        model = load_model(self.model, self.format, self.group, self.dtype)
        console.print(leaf_table(model.params, f"{self.model} ({model.kind})"))


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Write a model with its weights packed, as a folder that every command takes as a model."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """smollm2, minilm, a .gguf file, a Hugging Face folder, or a hub name."""
    format: Packing
    """How the weights are packed."""
    out: str
    """Folder to write; it must be new."""
    group: int | None = None
    """Weights per scale (64; q4_0, q4_1 and q8_0 always have 32)."""
    search: bool = False
    """Choose the scales of int formats for the least squared error; slower, and better below 4 bits."""
    where: tuple[str, ...] = ("**/*_proj/kernel",)
    """Patterns of the weights that are packed; others stay as they are."""
    dtype: Dtype = "auto"
    """Of weights that are dense; auto: bfloat16 on GPU, float32 on CPU."""

    def run(self, console: Console) -> None:
        report = quantize_model(
            self.model,
            self.out,
            format=self.format,
            group=self.group,
            search=self.search,
            where=list(self.where),
            dtype=concrete(self.dtype),
        )
        console.print(worst(report), markup=False, highlight=False, soft_wrap=True)
        console.print(f"wrote {self.out}", markup=False, highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merge an adapter into a model's weights and write the model, as a folder that transformers loads."""

    model: str
    """smollm2, a .gguf file, a Hugging Face folder, a folder of `memjax quantize`, or a hub name."""
    adapter: str
    """Folder of a trained adapter: the `adapter` in the folder of a run, that folder, or one that peft wrote."""
    out: str
    """Folder to write; it must be new."""
    format: Format = "dense"
    """dense: for transformers; others: for memjax, with weights as the model has them or the merged ones packed."""
    group: int | None = None
    """Weights per scale of packed weights (64; q4_0, q4_1 and q8_0 always have 32)."""
    dtype: MergedDtype = "bfloat16"
    """Of dense weights."""

    def run(self, console: Console) -> None:
        merged = merge_model(self.model, self.adapter, self.out, format=self.format, group=self.group, dtype=self.dtype)
        console.print(str(merged), markup=False, highlight=False, soft_wrap=True)
        console.print(f"wrote {self.out}", markup=False, highlight=False, soft_wrap=True)


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Returns the value that the arguments give an option, or None."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else next(iter(arguments[i + 1 :]), None)
    return None


def resumed_defaults(folder: str) -> dict[str, Any]:
    """Returns the settings of the run in a folder, so that they need not be typed again.

    Settings that are typed, or in a file, all the same are compared with the run's when it is resumed.

    Raises:
      ValueError: a folder without a checkpoint.
    """
    if not (Path(folder) / "checkpoints").is_dir():
        raise ValueError(f"cannot resume: {folder} holds no checkpoints")
    checkpoints = Checkpoints(folder)
    settings = with_defaults(checkpoints.settings())
    checkpoints.close()
    known = {field.name for field in dataclasses.fields(FinetuneSettings)} - {"resume", "out"}
    settings = {name: value for name, value in settings.items() if name in known}
    return settings | {"targets": tuple(settings["targets"])}


def how_to_go_on(command: Any, began: float) -> str:
    """Returns what to do about a command that was interrupted, and had begun at a time of `time.time`."""
    if not isinstance(command, Finetune):
        return "start it again"
    folder = run_folder(command)
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    if steps and (command.resume or (checkpoints.folder / str(steps[-1])).stat().st_mtime >= began):
        longer = "" if command.steps == checkpoints.settings()["steps"] else f" --steps {command.steps}"
        return f"go on after step {steps[-1]} with: memjax finetune --resume {shlex.quote(str(folder))}{longer}"
    return f"there is no checkpoint of it in {folder} yet; start the run again as it was started"


def _tell(what: str, style: str, message: object) -> None:
    """Prints one line to the standard error."""
    text = escape(str(message))
    Console(stderr=True, highlight=False).print(f"[{style}]{what}:[/]", text, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake of the user ends it with one line and the exit status 2.

    ``--debug`` anywhere shows the whole traceback instead.
    """
    command: Any = None
    began = time.time()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    console = Console()
    try:
        saved: dict[str, Any] = {}
        if arguments[:1] == ["finetune"]:
            if (file := value_of("--config", arguments)) is not None:
                saved = read_toml(file)
            if (folder := value_of("--resume", arguments) or saved.get("resume")) is not None:
                saved = resumed_defaults(folder) | saved
        default = Finetune(**({"model": tyro.MISSING} | saved))
        train = Annotated[Finetune, tyro.conf.subcommand("finetune", default=default)]
        command = tyro.cli(
            train | Generate | Inspect | Quantize | Merge,
            prog="memjax",
            description="Fine-tune, run and convert language models in little memory. --debug shows tracebacks.",
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _tell("warning", "bold yellow", message)
            command.run(console)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if debug:
            raise
        _tell("error", "bold red", error)
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        _tell("interrupted", "bold red", how_to_go_on(command, began))
        sys.stdout.flush()
        os._exit(130)  # threads that write checkpoints would abort a regular exit
