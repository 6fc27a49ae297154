import json

import numpy as np
import pytest

from memjax.recipes import data


class Characters:
    """A tokenizer of one token per character."""

    eos_id = 1

    def encode(self, text, special_tokens=True):
        return [ord(c) for c in ("^" if special_tokens else "") + text]

    def chat(self, messages):
        ids, trained = [], []
        for message in messages:
            said = message["role"] == "assistant"
            for text, mine in ((f"<{message['role']}>", False), (message["content"] + "|", said)):
                ids += self.encode(text, special_tokens=False)
                trained += [mine] * len(text)
        if not ids:
            raise ValueError("a chat needs at least one message")
        return ids, trained


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_text_windows_count_every_target_once():
    windows = data.text_windows(range(100, 111), 3)
    np.testing.assert_array_equal(windows.inputs, [[100, 101, 102], [103, 104, 105], [106, 107, 108]])
    np.testing.assert_array_equal(windows.targets, windows.inputs + 1)
    assert windows.weights.all() and windows.segment_ids is None
    assert len(data.text_windows(range(4), 3).inputs) == 1


def test_load_text_holds_out_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 10)
    train, test = data.load(path, Characters(), 4, held_out=0.2)
    assert train.inputs.size == 76 and test.inputs.size == 16
    assert bytes(test.inputs.ravel().tolist()).decode() == ("abcdefghij" * 2)[:16]


def test_prompt_completion_masks_are_exact(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cde"})
    (example,) = data.read_jsonl(path, Characters())
    assert example.tokens.tolist() == [*b"^abcde", 1]
    windows = data.pack([example], 7)
    assert windows.inputs[0].tolist() == [*b"^abcde", 0]
    assert windows.targets[0].tolist() == [*b"abcde", 1, 0]
    # Trained on: c (predicted from b), d, e and the end token.
    assert windows.weights[0].tolist() == [0, 0, 1, 1, 1, 1, 0]
    assert windows.segment_ids[0].tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_messages_train_on_what_the_assistant_says(tmp_path):
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "B"},
    ]
    (example,) = data.read_jsonl(write(tmp_path / "a.jsonl", {"messages": messages}), Characters())
    assert bytes(example.tokens.tolist()).decode() == "<user>q|<assistant>A|<user>r|<assistant>B|"
    assert bytes(example.tokens[example.trained].tolist()).decode() == "A|B|"


def test_packing_keeps_documents_whole_and_apart():
    examples = [data.Example(np.arange(n, dtype=np.int32) + 10 * n, np.ones(n, bool), n) for n in (4, 3, 5, 6)]
    windows = data.pack(examples, 5)
    np.testing.assert_array_equal(windows.segment_ids, [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(windows.inputs[0], [40, 41, 42, 30, 31])
    np.testing.assert_array_equal(windows.targets[0], [41, 42, 43, 31, 32])
    assert windows.weights.sum() == sum(len(e.tokens) - 1 for e in examples)


def test_too_long_documents():
    long = data.Example(np.arange(9, dtype=np.int32), np.array([0] * 3 + [1] * 6, bool), 17)
    short = data.Example(np.arange(3, dtype=np.int32), np.ones(3, bool), 18)
    with pytest.raises(ValueError, match="line 17 has 9 tokens"):
        data.pack([long, short], 5)
    cut = data.pack([long, short], 5, "cut")
    assert cut.inputs[0].tolist() == [0, 1, 2, 3, 4] and cut.weights[0].tolist() == [0, 0, 1, 1, 1]
    assert data.pack([long, short], 5, "drop").inputs.tolist() == [[0, 1, 0, 0, 0]]
    # Cut before its completion begins, a document leaves nothing to train on.
    with pytest.raises(ValueError, match="no completion is left"):
        data.pack([long], 2, "cut")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n ", "is empty"),
        ("a.csv", "a,b", "suffix '.csv'"),
        ("a.txt", "short", "longer than the training part"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{oops\n', "line 2: not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n', "line 1: expected the keys .* got 'prompt'"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object, got list"),
        ("a.jsonl", '{"prompt": 1, "completion": "b"}\n', "line 1: 'prompt' must be a string, got int"),
        ("a.jsonl", '{"messages": []}\n', "line 1: a chat needs at least one"),
        ("a.jsonl", '{"messages": [1]}\n', "line 1: 'messages' must be a list of objects"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: no completion"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n', "has 1 documents; at least 2"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / name, Characters(), 16)


def test_bad_arguments(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe" * 50)
    with pytest.raises(ValueError, match="no data file"):
        data.load(tmp_path / "none.txt", Characters(), 4)
    with pytest.raises(ValueError, match="not UTF-8"):
        data.load(tmp_path / "b.txt", Characters(), 4)
    with pytest.raises(ValueError, match="context is 8 tokens"):
        data.load(tmp_path / "a.txt", Characters(), 16, context=8)
    with pytest.raises(ValueError, match="held_out=1"):
        data.load(tmp_path / "a.txt", Characters(), 4, held_out=1)
    with pytest.raises(ValueError, match="batch=5 is out of range: the data has 3 windows"):
        data.Loader(data.text_windows(range(10), 3), 5)


def test_batches_are_a_function_of_the_step():
    windows = data.text_windows(range(71), 7)
    loader = data.Loader(windows, 3, seed=5)
    assert loader.batches_per_epoch == 3
    epochs = [np.concatenate([loader.batch_at(3 * e + i).inputs[:, 0] for i in range(3)]) for e in range(2)]
    for rows in epochs:
        assert len(set(rows.tolist())) == 9
    assert (epochs[0] != epochs[1]).any()
    again = data.Loader(windows, 3, seed=5)
    np.testing.assert_array_equal(again.batch_at(4).inputs, loader.batch_at(4).inputs)
    assert (data.Loader(windows, 3, seed=6).batch_at(4).inputs != loader.batch_at(4).inputs).any()


def test_packaged_corpus():
    path = data.find("kjv")
    assert path.read_text().startswith("In the beginning God created the heaven and the earth.\n")
    assert data.digest(path).startswith("d0bf5882") and path.stat().st_size < 1_000_000
