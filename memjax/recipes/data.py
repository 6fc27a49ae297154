"""Text and JSON lines to fixed windows of tokens, and batches that are a pure function of the step number."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

TooLong = Literal["error", "cut", "drop"]
PACKAGED = {"kjv": "kjv.txt"}


class Tokenizer(Protocol):
    """What the data code needs of a tokenizer; those of `memjax.models` have it."""

    eos_id: int | None

    def encode(self, text: str, special_tokens: bool = ...) -> list[int]: ...

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]: ...


class Windows(NamedTuple):
    """``N`` windows of ``S`` tokens; also a batch of them, when ``N`` is the batch size."""

    inputs: Any  # int32 [N, S]
    targets: Any  # int32 [N, S], the token after each input
    weights: Any  # float32 [N, S], 1 where the target is trained on, else 0
    segment_ids: Any = None  # int32 [N, S], 1, 2, ... per packed document and 0 for padding; None: one document


class Example(NamedTuple):
    """One document of a .jsonl file."""

    tokens: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n], the tokens of completions
    line: int  # line number in its file, from 1


def find(data: str | Path) -> Path:
    """Returns the path of a data file, or of the packaged corpus that ``data`` names (`PACKAGED`).

    Raises:
      ValueError: no such file, or a folder.
    """
    path = Path(data)
    if str(data) in PACKAGED and not path.exists():
        path = Path(str(importlib.resources.files("memjax.recipes") / "corpus" / PACKAGED[str(data)]))
    if not path.is_file():
        raise ValueError(f"no data file {str(data)!r} (packaged corpora: {', '.join(PACKAGED)})")
    return path


def digest(path: Path) -> str:
    """Returns the sha256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def split_text(text: str, held_out: float) -> tuple[str, str]:
    """Splits ``text`` into (train, held out): the last ``held_out`` of the characters are held out."""
    cut = round(len(text) * (1 - held_out))
    return text[:cut], text[cut:]


def text_windows(tokens: Sequence[int], seq: int, what: str = "the text") -> Windows:
    """Cuts one stream of tokens into contiguous windows; every token but the first is a target once.

    The last window is dropped when it is not full.

    Args:
      tokens: integers ``[T]``.
      seq: tokens per window, ``S``.
      what: what the tokens are, for the error.

    Returns:
      `Windows` with ``(T - 1) // S`` rows.

    Raises:
      ValueError: fewer than ``seq + 1`` tokens.
    """
    stream = np.asarray(tokens, np.int32)
    rows = (stream.size - 1) // seq
    if rows < 1:
        raise ValueError(f"seq={seq} is longer than {what}: it has {stream.size} tokens, {seq + 1} are needed")
    inputs = stream[: rows * seq].reshape(rows, seq)
    targets = stream[1 : rows * seq + 1].reshape(rows, seq)
    return Windows(inputs, targets, np.ones((rows, seq), np.float32))


def read_jsonl(path: Path, tokenizer: Tokenizer) -> list[Example]:
    """Reads and tokenizes a .jsonl file with ``prompt`` and ``completion``, or ``messages``, on every line.

    A prompt and its completion are tokenized apart, so the border between them is exact, and the tokenizer's
    end token, if any, ends the completion. Of messages, what the tokenizer's ``chat`` marks as the
    assistant's is trained on.

    Raises:
      ValueError: an empty file, a line that is not a JSON object, or keys that are missing or of the wrong
        type; the message gives the line number.
    """
    examples = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
        if "messages" in record:
            if not isinstance(record["messages"], list) or not all(
                isinstance(message, dict) for message in record["messages"]
            ):
                raise ValueError(f"{where}: 'messages' must be a list of objects")
            try:
                tokens, trained = tokenizer.chat(record["messages"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        elif {"prompt", "completion"} <= record.keys():
            for key in ("prompt", "completion"):
                if not isinstance(record[key], str):
                    raise ValueError(f"{where}: {key!r} must be a string, got {type(record[key]).__name__}")
            prompt = tokenizer.encode(record["prompt"])
            completion = tokenizer.encode(record["completion"], special_tokens=False)
            completion = completion + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
            tokens, trained = prompt + completion, [False] * len(prompt) + [True] * len(completion)
        else:
            keys = ", ".join(map(repr, record)) or "none"
            raise ValueError(f"{where}: expected the keys 'prompt' and 'completion', or 'messages'; got {keys}")
        # The first token has nothing before it that could predict it.
        if not any(trained[1:]):
            raise ValueError(f"{where}: no completion to train on")
        examples.append(Example(np.asarray(tokens, np.int32), np.asarray(trained, bool), number))
    return examples


def pack(examples: Iterable[Example], seq: int, too_long: TooLong = "error") -> Windows:
    """Packs documents, in order, into windows; a document is never divided and sees only itself.

    Args:
      examples: documents of ``n`` tokens; ``n - 1`` places are taken, because the last token is only a
        target.
      seq: tokens per window, ``S``.
      too_long: what to do with a document of more than ``seq + 1`` tokens: raise, keep its first ``seq + 1``
        tokens, or leave it out.

    Returns:
      `Windows` with segment ids; weights are 1 where the target is a token of a completion.

    Raises:
      ValueError: a document is too long (the message gives its line), or nothing is left to train on.
    """
    rows: list[list[Example]] = []
    room = 0
    for example in examples:
        if len(example.tokens) > seq + 1:
            if too_long == "error":
                raise ValueError(
                    f"line {example.line} has {len(example.tokens)} tokens, more than seq + 1 = {seq + 1}; "
                    "raise seq, shorten the line, or choose too_long='cut' or 'drop'"
                )
            if too_long == "drop":
                continue
            example = Example(example.tokens[: seq + 1], example.trained[: seq + 1], example.line)
        places = len(example.tokens) - 1
        if not rows or places > room:
            rows.append([])
            room = seq
        rows[-1].append(example)
        room -= places
    windows = Windows(
        np.zeros((len(rows), seq), np.int32),
        np.zeros((len(rows), seq), np.int32),
        np.zeros((len(rows), seq), np.float32),
        np.zeros((len(rows), seq), np.int32),
    )
    for i, row in enumerate(rows):
        start = 0
        for segment, (tokens, trained, _) in enumerate(row, 1):
            part = slice(start, start + len(tokens) - 1)
            windows.inputs[i, part] = tokens[:-1]
            windows.targets[i, part] = tokens[1:]
            windows.weights[i, part] = trained[1:]
            windows.segment_ids[i, part] = segment
            start = part.stop
    if not windows.weights.any():
        raise ValueError(f"no completion is left to train on in windows of {seq} tokens")
    # A window of cut documents may hold prompts only; a batch of those would have no loss.
    return Windows(*(field[windows.weights.any(axis=1)] for field in windows))


def load(
    data: str | Path,
    tokenizer: Tokenizer,
    seq: int,
    *,
    context: int | None = None,
    held_out: float = 0.1,
    too_long: TooLong = "error",
) -> tuple[Windows, Windows]:
    """Reads a .txt or .jsonl file, or a packaged corpus, into windows to train on and windows held out.

    Held out are the last ``held_out`` of the characters of a text, or of the documents of a .jsonl file. Text
    is cut into contiguous windows, documents are packed.

    Args:
      data: a file, or the name of a packaged corpus.
      tokenizer: see `Tokenizer`.
      seq: tokens per window, ``S``.
      context: the longest sequence that the model takes.
      held_out: fraction in (0, 1).
      too_long: see `pack`.

    Returns:
      (train, held out), both `Windows` of NumPy arrays.

    Raises:
      ValueError: a missing or empty file, an unknown suffix, a bad line, ``seq`` longer than the data or the
        context.
    """
    path = find(data)
    if seq < 1 or (context is not None and seq > context):
        raise ValueError(f"seq={seq} is out of range: the model's context is {context} tokens")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1")
    if path.suffix == ".jsonl":
        examples = read_jsonl(path, tokenizer)
        kept = min(int(len(examples) * (1 - held_out)), len(examples) - 1)
        if kept < 1:
            raise ValueError(f"{path} has {len(examples)} documents; at least 2 are needed to hold one out")
        return pack(examples[:kept], seq, too_long), pack(examples[kept:], seq, too_long)
    if path.suffix != ".txt":
        raise ValueError(f"{path} has the suffix {path.suffix!r}; .txt and .jsonl are known")
    train, test = split_text(_read(path), held_out)
    return (
        text_windows(tokenizer.encode(train, special_tokens=False), seq, f"the training part of {path}"),
        text_windows(tokenizer.encode(test, special_tokens=False), seq, f"the held-out part of {path}"),
    )


@functools.lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches in an order that the seed decides; where to resume is the step number and nothing else.

    Every epoch has its own permutation of the windows, of which the last ``N % batch`` are left out.
    """

    windows: Windows
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= len(self.windows.inputs):
            raise ValueError(f"batch={self.batch} is out of range: the data has {len(self.windows.inputs)} windows")

    @property
    def batches_per_epoch(self) -> int:
        return len(self.windows.inputs) // self.batch

    def batch_at(self, step: int) -> Windows:
        """Returns the `Windows` ``[batch, S]`` of a step, counted from 0."""
        epoch, i = divmod(step, self.batches_per_epoch)
        rows = _permutation(len(self.windows.inputs), self.seed, epoch)[i * self.batch : (i + 1) * self.batch]
        return take(self.windows, rows)


def take(windows: Windows, rows: Any) -> Windows:
    """Returns the given rows of ``windows``."""
    return Windows(*(None if field is None else field[rows] for field in windows))
