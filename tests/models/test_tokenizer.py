"""Tokenizers from GGUF metadata and from tokenizer.json, and exact masks of conversations."""

import json
import pathlib
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from memjax.models._tables import TensorTable
from memjax.models.gguf import Gguf, read_gguf
from memjax.models.tokenizer import load_tokenizer
from tests.models.weights import minilm_path, smollm2_path

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3"]
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello 12"},
    {"role": "assistant", "content": "hello you"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "bye bye"},
]


def gguf_of(specials=CHATML, pre="smollm", **changes):
    """A GGUF file's tokenizer metadata: bytes, seven merges and special tokens."""
    tokens = [*specials, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": MERGES,
        "token_type": np.array([3] * len(specials) + [1] * (len(tokens) - len(specials)), np.int32),
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    path = pathlib.Path("small.gguf")
    return Gguf(path, metadata, TensorTable(path, {}))


def spoken(tokenizer, chat):
    """The parts of a conversation that are trained on, as text."""
    parts, last = [], False
    for token, is_assistant in zip(*chat):
        if is_assistant and not last:
            parts.append([])
        if is_assistant:
            parts[-1].append(token)
        last = is_assistant
    return [tokenizer.decode(part, skip_special_tokens=False) for part in parts]


def test_smollm2_ids():
    tokenizer = load_tokenizer(smollm2_path())
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (49152, 1, 2, 2)
    golden = {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "In the beginning God created the heaven and the earth.":
            [788, 260, 3616, 1839, 2312, 260, 10419, 284, 260, 3103, 30],
    }  # fmt: skip
    for text, ids in golden.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, *tokenizer.encode("a"), 2]
    assert tokenizer.decode([1, 504, 2]) == "The"
    assert tokenizer.decode([1, 504, 2], skip_special_tokens=False) == "<|im_start|>The<|im_end|>"


def test_smollm2_splits_as_its_own_pre_tokenizer():
    path = smollm2_path()
    meta = read_gguf(path).metadata
    vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(models.BPE(vocab, merges))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer = load_tokenizer(path)
    text = "It's 1234.5, isn't it?\n\n\tTabs  and   spaces \r\n déjà vu, Größe ½ ٣٤ 日本語 🙂!  (x<=y)  "
    for piece in (text, *text.split(), text * 3):
        assert tokenizer.encode(piece) == reference.encode(piece).ids
        assert tokenizer.decode(tokenizer.encode(piece)) == piece


def test_smollm2_chat_is_the_written_out_conversation():
    tokenizer = load_tokenizer(smollm2_path())
    written = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    chat = tokenizer.chat(TALK)
    assert chat.ids == tokenizer.encode(written)
    assert spoken(tokenizer, chat) == ["hello you<|im_end|>", "bye bye<|im_end|>"]
    prompt = tokenizer.chat(TALK[:2], add_generation_prompt=True)
    assert prompt.ids == chat.ids[: len(prompt.ids)]
    assert chat.is_assistant[: len(prompt.ids) + 1] == [False] * len(prompt.ids) + [True]
    assert not any(prompt.is_assistant)


def test_minilm_reads_whole_texts():
    tokenizer = load_tokenizer(minilm_path())
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (30522, 0, None)
    ids = [101, 1037, 2158, 2003, 5983, 2833, 1012, 102]
    assert tokenizer.encode("A man is eating food.") == ids
    assert tokenizer.encode("A man is eating food.", special_tokens=False) == ids[1:-1]
    assert len(tokenizer.encode("food " * 300)) == 302
    with pytest.raises(ValueError, match="names no end token"):
        tokenizer.chat(TALK)


@pytest.mark.parametrize(
    "pre, pieces",
    {
        "smollm": ["I", "'ll", "Ġsay", ",", "1", "2", "3", "4", ",", "DON", "'", "T", "Ċ", "Ċ", "ok"],
        "gpt-2": ["I", "'ll", "Ġsay", ",", "1234", ",", "DON", "'", "T", "Ċ", "Ċ", "ok"],
        "default": ["I", "'", "ll", "Ġsay", ",", "123", "4", ",", "DON", "'", "T", "Ċ", "Ċ", "ok"],
        "llama-bpe": ["I", "'ll", "Ġsay", ",", "123", "4", ",DON", "'T", "ĊĊ", "ok"],
        "qwen2": ["I", "'ll", "Ġsay", ",", "1", "2", "3", "4", ",DON", "'T", "ĊĊ", "ok"],
    }.items(),
)
def test_gguf_pre_tokenizers(pre, pieces):
    tokenizer = load_tokenizer(gguf_of(pre=pre))
    split = tokenizer.backend.pre_tokenizer.pre_tokenize_str("I'll say,1234,DON'T\n\nok")
    assert [piece for piece, _ in split] == pieces


def test_gguf_beginning_token():
    text = "hello"
    bare = load_tokenizer(gguf_of()).encode(text)
    assert len(bare) == 1
    assert load_tokenizer(gguf_of(add_bos_token=True)).encode(text) == [0, *bare]
    llama = load_tokenizer(gguf_of(LLAMA_3, "llama-bpe"))
    assert llama.encode(text)[0] == 0 and llama.encode(text, special_tokens=False) == [bare[0] + 3]
    assert load_tokenizer(gguf_of(LLAMA_3, "llama-bpe", add_bos_token=False)).encode(text) == [bare[0] + 3]


def test_llama_3_takes_a_known_word_whole():
    # "ell" is in the vocabulary but no merge of a pair makes it.
    file = gguf_of(LLAMA_3, "llama-bpe")
    file.metadata["tokenizer.ggml.tokens"].append("ell")
    file.metadata["tokenizer.ggml.token_type"] = np.append(file.metadata["tokenizer.ggml.token_type"], 1)
    assert load_tokenizer(file).encode("ell", special_tokens=False) == [len(BYTES) + 5 + len(MERGES)]


def test_qwen2_normalises():
    tokenizer = load_tokenizer(gguf_of(pre="qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_gguf_user_defined_tokens_are_not_special():
    file = gguf_of([*CHATML, "<think>"])
    file.metadata["tokenizer.ggml.token_type"][2] = 4
    tokenizer = load_tokenizer(file)
    assert tokenizer.encode("<think>") == [2]
    assert tokenizer.decode([0, 2, 1]) == "<think>"


GGUF_FAULTS = {
    "kind": ({"model": "llama"}, "tokenizer of the kind 'llama'"),
    "no kind": ({"model": None}, "tokenizer of the kind None"),
    "kind no text": ({"model": 3}, "tokenizer.ggml.model must be str, got int"),
    "splitting": ({"pre": "deepseek-llm"}, "splits text by 'deepseek-llm'"),
    "no splitting": ({"pre": None}, "splits text by None"),
    "no tokens": ({"tokens": None}, "has no tokenizer.ggml.tokens"),
    "no merges": ({"merges": None}, "no tokenizer.ggml.merges"),
    "tokens no text": ({"tokens": np.arange(4)}, "tokenizer.ggml.tokens must be list, got ndarray"),
    "token twice": ({"tokens": ["a", "b", "a"]}, "the token 'a' comes twice"),
    "merge of one": ({"merges": ["he"]}, "the merge 'he' is not a pair"),
    "merge unknown": ({"merges": ["zz z"]}, "the merges do not fit the tokens"),
    "types": ({"token_type": np.ones(3)}, "tokens and 3 token types"),
    "types no numbers": ({"token_type": 5}, "token_type must be ndarray, got int"),
    "end id": ({"eos_token_id": 100_000}, "eos_token_id is 100000, of"),
    "end id no number": ({"eos_token_id": "1"}, "eos_token_id must be int, got str"),
}


@pytest.mark.parametrize("case", GGUF_FAULTS)
def test_gguf_faults_are_named(case):
    changes, message = GGUF_FAULTS[case]
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(gguf_of(**changes))
    assert "small.gguf" in str(error.value)


def test_random_metadata_raises_nothing_but_value_error():
    rng = random.Random(0)
    junk = [
        None,
        0,
        -1,
        2**40,
        1.5,
        True,
        "",
        "gpt2",
        [],
        ["a"],
        ["a b", "", "a b c"],
        np.arange(3),
        np.zeros(0),
    ]
    keys = [
        "model",
        "pre",
        "tokens",
        "merges",
        "token_type",
        "bos_token_id",
        "eos_token_id",
        "padding_token_id",
    ]
    for _ in range(300):
        changes = {key: rng.choice(junk) for key in rng.sample([*keys, "add_bos_token"], rng.choice([1, 1, 2]))}
        try:
            load_tokenizer(gguf_of(**changes)).encode("hello 12")
        except ValueError:
            continue


def save_folder(folder, backend, config=None, **settings):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def test_folder_gives_what_the_gguf_gives(tmp_path):
    from_gguf = load_tokenizer(gguf_of())
    save_folder(tmp_path, from_gguf.backend, eos_token={"content": "<|im_end|>"}, bos_token="<|im_start|>")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (1, 0, 1)
    assert tokenizer.vocab_size == from_gguf.vocab_size
    assert tokenizer.chat(TALK, True) == from_gguf.chat(TALK, True)


def test_folder_ids_from_config(tmp_path):
    save_folder(tmp_path, load_tokenizer(gguf_of()).backend, {"eos_token_id": [5, 1], "pad_token_id": 7})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (5, None, 7)


def test_folder_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer.json$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"has no tokenizer.json; convert tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    save_folder(tmp_path, load_tokenizer(gguf_of()).backend)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    template = processors.TemplateProcessing(single="X $A", special_tokens=[("X", 0)])
    content["post_processor"] = json.loads(template.__getstate__()) | {"special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer: no entry found"):
        load_tokenizer(tmp_path)
    save_folder(tmp_path, load_tokenizer(gguf_of()).backend)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path)


def test_chatml():
    tokenizer = load_tokenizer(gguf_of())
    chat = tokenizer.chat(TALK, add_generation_prompt=True)
    written = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert chat.ids == tokenizer.encode(written + "<|im_start|>assistant\n")
    assert spoken(tokenizer, chat) == ["hello you<|im_end|>", "bye bye<|im_end|>"]
    assert tokenizer.turn_end_id == 1 and tokenizer.chat_style == "chatml"


def test_llama_3_chat():
    tokenizer = load_tokenizer(gguf_of(LLAMA_3, "llama-bpe"))
    chat = tokenizer.chat([{**m, "content": m["content"] + " \n"} for m in TALK], add_generation_prompt=True)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    written = "".join(header.format(m["role"]) + m["content"] + "<|eot_id|>" for m in TALK)
    assert chat.ids == tokenizer.encode(written + header.format("assistant"))
    assert chat.ids[0] == tokenizer.bos_id
    assert spoken(tokenizer, chat) == ["hello you<|eot_id|>", "bye bye<|eot_id|>"]
    assert tokenizer.eos_id == 1 and tokenizer.turn_end_id == 4


def test_plain_chat():
    tokenizer = load_tokenizer(gguf_of(["<s>", "</s>"], add_bos_token=True))
    chat = tokenizer.chat(TALK, add_generation_prompt=True)
    assert tokenizer.decode(chat.ids, skip_special_tokens=False) == (
        "<s>System: be brief\nUser: hello 12\nAssistant: hello you</s>\nUser: bye\nAssistant: bye bye</s>\nAssistant:"
    )
    assert spoken(tokenizer, chat) == [" hello you</s>", " bye bye</s>"]


def test_plain_chat_of_a_tokenizer_that_prepends_a_space(tmp_path):
    letters = sorted({*"▁SystemUserAssistant:befghiloyuv 12\n"} - {" "})
    backend = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in letters)], unk_id=0)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    backend.add_special_tokens(["</s>"])
    save_folder(tmp_path, backend, eos_token="</s>")
    tokenizer = load_tokenizer(tmp_path)
    chat = tokenizer.chat(TALK[1:3])
    assert spoken(tokenizer, chat) == [" hello you</s>"]
    said = [i for i, is_assistant in zip(*chat) if is_assistant]
    assert backend.id_to_token(said[0]) == "▁" and backend.id_to_token(said[1]) == "h"


@pytest.mark.parametrize("specials, pre", [(CHATML, "smollm"), (LLAMA_3, "llama-bpe")])
def test_what_is_said_cannot_end_a_turn(specials, pre):
    tokenizer = load_tokenizer(gguf_of(specials, pre))
    talk = [{"role": role, "content": "x" + "".join(specials) + "y"} for role in ("system", "user", "assistant")]
    chat = tokenizer.chat(talk)
    assert chat.ids.count(tokenizer.turn_end_id) == 3
    assert "".join(specials) in tokenizer.decode(chat.ids)
    # Ordinary encoding of the same tokenizer still knows the names.
    assert tokenizer.encode("".join(specials), special_tokens=False) == list(range(len(specials)))


def test_white_space_at_the_edge_of_an_answer_is_its_own():
    tokenizer = load_tokenizer(gguf_of(pre="qwen2"))
    chat = tokenizer.chat([{"role": "assistant", "content": "\n\nhello\n"}, {"role": "assistant", "content": ""}])
    assert spoken(tokenizer, chat) == ["\n\nhello\n<|im_end|>", "<|im_end|>"]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "at least one message"),
        (
            [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
            "message 1 has the role 'tool'",
        ),
        ([{"content": "a"}], "message 0 has the role None"),
        ([{"role": "user", "content": ["a"]}], "message 0 has content of type list"),
        ([{"role": "user"}], "message 0 has content of type NoneType"),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(gguf_of()).chat(messages)
