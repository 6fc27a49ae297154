"""Tokenizers of checkpoints: from ``tokenizer.json`` or from the metadata of a GGUF file, and their chat
format.

Chat templates that checkpoints carry are programs (jinja) and are not run. The format follows from the
special tokens:

- ChatML, where the vocabulary has ``<|im_start|>`` and ``<|im_end|>``:
  ``<|im_start|>ROLE\\nTEXT<|im_end|>\\n`` a turn.
- Llama 3, where it has ``<|start_header_id|>``, ``<|end_header_id|>`` and ``<|eot_id|>``: the
  beginning-of-text token, then ``<|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>`` a turn, with
  white space around TEXT removed.
- otherwise plain: ``System: TEXT\\n``, ``User: TEXT\\n`` and ``Assistant: TEXT`` with the end token and a
  line break.

No system turn is invented where the messages have none.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from memjax.models.gguf import Gguf, read_gguf
from memjax.models.safetensors_reader import read_json

ROLES = ("system", "user", "assistant")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA_3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT_2,),
    "llama-bpe": (_LLAMA_3,),
    "qwen2": (_QWEN_2,),
    "smollm": (r"\p{N}", _GPT_2),
}
_CONTROL, _USER_DEFINED = 3, 4


class ChatTokens(NamedTuple):
    """A conversation as tokens.

    Attributes:
      ids: token ids.
      is_assistant: of each token, whether it is an assistant's text or the end token of an assistant's turn.
    """

    ids: list[int]
    is_assistant: list[bool]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with the ids that models and data need.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      vocab_size: number of ids, added tokens included; an embedding may have more rows.
      eos_id: id that ends a text, if the checkpoint names one.
      bos_id: id that begins a text, if the checkpoint names one.
      pad_id: id for padding; the end id where the checkpoint names none.
    """

    backend: Any
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Returns the ids of ``text``; the names of special tokens within it become those tokens.

        Args:
          text: any string.
          special_tokens: add what the checkpoint adds around a text: a beginning token, or ``[CLS]`` and
            ``[SEP]``.
        """
        return list(self.backend.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ``ids``."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    @property
    def chat_style(self) -> str:
        """``"chatml"``, ``"llama3"`` or ``"plain"``, by the special tokens of the vocabulary."""
        if self._has("<|im_start|>", "<|im_end|>"):
            return "chatml"
        if self._has("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
            return "llama3"
        return "plain"

    @property
    def turn_end_id(self) -> int | None:
        """Id that ends an assistant's turn in a chat; base models' end-of-text id often differs from it."""
        name = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "plain": None}[self.chat_style]
        return self.eos_id if name is None else self.backend.token_to_id(name)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> ChatTokens:
        """Returns a conversation as tokens, with the mask that training on completions needs.

        What a message says is only ever text: the names of special tokens within it do not become those
        tokens. An assistant's text is tokenised apart from its header, so training sees the ids that
        generation starts from.

        Args:
          messages: mappings with ``role`` (system, user or assistant) and ``content``.
          add_generation_prompt: end with the header of an assistant's turn, for the model to go on from.

        Returns:
          `ChatTokens`.

        Raises:
          ValueError: no messages, an unknown role, content that is not text, or a vocabulary without an end
            token.
        """
        if not messages:
            raise ValueError("a chat needs at least one message")
        for i, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise ValueError(f"message {i} has the role {role!r}; it must be one of {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise ValueError(f"message {i} has content of type {type(content).__name__}; it must be text")
        style, end = self.chat_style, self.turn_end_id
        if end is None:
            raise ValueError("the tokenizer names no end token, so a chat has no end of a turn")

        ids: list[int] = []
        mask: list[bool] = []

        def extend(new: list[int], is_assistant: bool = False) -> None:
            ids.extend(new)
            mask.extend([is_assistant] * len(new))

        if style != "chatml" and self.bos_id is not None and (style == "llama3" or self._adds_bos):
            extend([self.bos_id])
        turns = [(message["role"], message["content"]) for message in messages]
        if add_generation_prompt:
            turns.append(("assistant", None))
        for role, text in turns:
            before, header, after = self._frame(style, role)
            extend(before)
            if text is None:
                extend(self._text(header))
                break
            if style == "llama3":
                text = text.strip()
            if role == "assistant":
                extend(self._text(header))
                extend([*self._text(self._spaced(style, text)), end], is_assistant=True)
            else:
                extend(self._text(header + self._spaced(style, text, joined=True)))
                if style != "plain":
                    extend([end])
            extend(self._text(after))
        return ChatTokens(ids, mask)

    def _frame(self, style: str, role: str) -> tuple[list[int], str, str]:
        """Returns a turn's leading ids, its header as text, and the text after its end."""
        token = self.backend.token_to_id
        if style == "chatml":
            return [token("<|im_start|>")], role + "\n", "\n"
        if style == "llama3":
            start, stop = token("<|start_header_id|>"), token("<|end_header_id|>")
            return [start, *self._text(role), stop], "\n\n", ""
        return [], role.capitalize() + ":", "\n"

    def _spaced(self, style: str, text: str, joined: bool = False) -> str:
        """Returns ``text`` with the space that the plain style puts after its header.

        Tokenizers that put a space before every text get none when the text is tokenised alone.
        """
        return " " + text if style == "plain" and (joined or not self._adds_space) else text

    def _has(self, *names: str) -> bool:
        return all(self.backend.token_to_id(name) is not None for name in names)

    def _text(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids) if text else []

    @functools.cached_property
    def _plain(self) -> Any:
        """The same tokenizer, to which the names of special tokens are ordinary text."""
        import tokenizers

        plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _adds_bos(self) -> bool:
        return self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    @functools.cached_property
    def _adds_space(self) -> bool:
        return self.backend.encode("a", add_special_tokens=False).tokens[:1] in (["▁a"], ["▁"])


def load_tokenizer(source: str | pathlib.Path | Gguf) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    Args:
      source: a Hugging Face folder with ``tokenizer.json``, a ``.gguf`` file, or what `read_gguf` gave.

    Raises:
      ValueError: no tokenizer there, a kind that is not read, or a damaged one.
    """
    if isinstance(source, Gguf):
        return _from_gguf(source)
    path = pathlib.Path(source)
    if path.is_dir():
        return _from_folder(path)
    return _from_gguf(read_gguf(path))


def _from_folder(folder: pathlib.Path) -> Tokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.is_file():
        others = [
            name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()
        ]
        hint = (
            f"; convert {others[0]} (in transformers: save_pretrained of the fast tokenizer)"
            if others
            else ""
        )
        raise ValueError(f"{folder} has no tokenizer.json{hint}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    settings = [
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    ]

    def special(role: str) -> int | None:
        for table in settings:
            value = table.get(f"{role}_token")
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str) and backend.token_to_id(name) is not None:
                return int(backend.token_to_id(name))
        value = settings[-1].get(f"{role}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        return first if type(first) is int else None

    eos, pad = special("eos"), special("pad")
    size = backend.get_vocab_size(with_added_tokens=True)
    return Tokenizer(backend, size, eos, special("bos"), eos if pad is None else pad)


def _from_gguf(gguf: Gguf) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = gguf.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"{gguf.path}: tokenizer.ggml.{key} must be {kind.__name__}, got {type(value).__name__}"
            )
        return value

    model = get("model", str)
    if model != "gpt2":
        raise ValueError(
            f"{gguf.path} has a tokenizer of the kind {model!r}; of GGUF files 'gpt2' (byte-level BPE) is "
            "read: take the model's Hugging Face folder with tokenizer.json instead"
        )
    pre = get("pre", str)
    if pre not in SPLITS:
        raise ValueError(
            f"{gguf.path} splits text by {pre!r} (tokenizer.ggml.pre); read are "
            f"{', '.join(sorted(SPLITS))}: take the model's Hugging Face folder with tokenizer.json instead"
        )
    tokens, merges = get("tokens", list), get("merges", list)
    if not tokens or merges is None:
        raise ValueError(f"{gguf.path} has no tokenizer.ggml.tokens or no tokenizer.ggml.merges")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(f"{gguf.path}: the token {twice!r} comes twice in tokenizer.ggml.tokens")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs):
        if len(pair) != 2:
            raise ValueError(f"{gguf.path}: the merge {merge!r} is not a pair")
    types = gguf.metadata.get("tokenizer.ggml.token_type", ())
    if len(types) not in (0, len(tokens)):
        raise ValueError(f"{gguf.path} has {len(tokens)} tokens and {len(types)} token types")

    def special(key: str) -> int | None:
        value = get(f"{key}_token_id", int)
        if value is not None and not 0 <= value < len(tokens):
            raise ValueError(f"{gguf.path}: {key}_token_id is {value}, of {len(tokens)} tokens")
        return value

    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{gguf.path}: the merges do not fit the tokens: {error}") from error
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types) if kind == _CONTROL]
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in control])
    defined = [token for token, kind in zip(tokens, types) if kind == _USER_DEFINED]
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in defined])
    eos, bos, pad = special("eos"), special("bos"), special("padding")
    if get("add_bos_token", bool, pre == "llama-bpe") and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single="$bos $A", pair="$bos $A $B", special_tokens=[("$bos", bos)]
        )
    return Tokenizer(backend, len(tokens), eos, bos, eos if pad is None else pad)
