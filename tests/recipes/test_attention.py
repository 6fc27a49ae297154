"""Masks by name, and runs with them."""

import json

import numpy as np
import pytest

from memjax.attention import masks
from memjax.recipes import cli
from memjax.recipes.attention import parse_attention


def test_parts_are_shown_together():
    q, k = np.indices((20, 20))
    shown = parse_attention("window=5, sinks=2").table(20, 20)[0, 0]
    np.testing.assert_array_equal(shown & (k <= q), (k <= q) & ((q - k < 5) | (k < 2)))
    np.testing.assert_array_equal(parse_attention("chunked=8").table(20, 20), masks.chunked(8).table(20, 20))
    assert parse_attention(None) is parse_attention("all") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no part ''; known are window=N, sinks=N, chunked=N, all"),
        ("windows=3", "no part 'windows'"),
        ("window", "window needs a number of at least 1, got ''"),
        ("window=0", "window needs a number of at least 1, got '0'"),
        ("window=1,window=2", "has window twice"),
        ("sinks=4", "hides a token from itself; add window=N or chunked=N"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_attention(text)


def train(model, data, attention, out):
    """Returns the words of a run with ``attention`` that has learned."""
    options = "--adapter lora --steps 8 --rank 4 --lr 0.03 --seq 48 --eval-windows 3 --sample-tokens 4"
    words = ["finetune", "--model", str(model), "--data", str(data), *options.split(), "--attention", attention]
    cli.main([*words, "--out", str(out)])
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["attention"] == attention
    assert report["held_out"]["after"]["nll"] < report["held_out"]["before"]["nll"] - 0.1
    return words


def test_the_command_trains_and_generates_with_a_window(tiny_model, text_file, tmp_path, capsys):
    words = train(tiny_model, text_file, "window=8,sinks=4", tmp_path / "text")
    capsys.readouterr()
    generate = ["generate", "--model", str(tiny_model), "--adapter", str(tmp_path / "text")]
    texts = []
    for attention in ([], ["--attention", "window=8,sinks=4"], ["--attention", "window=1"]):
        cli.main([*generate, "--prompt", "the cat sat on the mat and", "--max-new-tokens", "5", *attention])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(SystemExit):
        cli.main([*words, "--attention", "window=x"])
    assert "window needs a number of at least 1, got 'x'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_trains_on_completions_in_chunks(tiny_model, jsonl_file, tmp_path):
    train(tiny_model, jsonl_file, "window=8,chunked=8", tmp_path / "sums")
