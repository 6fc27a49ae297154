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
    assert parse_attention(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no part ''; known are window=N, sinks=N, chunked=N"),
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


def test_the_command_trains_and_generates_with_a_window(tiny_model, text_file, jsonl_file, tmp_path, capsys):
    common = ["--model", str(tiny_model), "--adapter"]
    options = ["--steps", "8", "--rank", "4", "--lr", "0.03", "--eval-windows", "3", "--sample-tokens", "4"]
    for data, wide in ((text_file, "sinks=4"), (jsonl_file, "chunked=8")):
        out = tmp_path / data.stem
        extra = ["--data", str(data), "--seq", "48", "--attention", f"window=8,{wide}", "--out", str(out)]
        cli.main(["finetune", *common, "lora", *options, *extra])
        report = json.loads((out / "report.json").read_text())
        assert report["settings"]["attention"] == f"window=8,{wide}"
        assert report["held_out"]["after"]["nll"] < report["held_out"]["before"]["nll"] - 0.1
    capsys.readouterr()
    prompt = ["--prompt", "the cat sat on the mat and", "--max-new-tokens", "5"]
    texts = []
    for attention in ([], ["--attention", "window=1"]):
        cli.main(["generate", *common, str(tmp_path / "text"), *prompt, *attention])
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    with pytest.raises(SystemExit):
        cli.main(["finetune", *common, "lora", *options, *extra, "--attention", "window=x"])
    assert "window needs a number of at least 1, got 'x'" in capsys.readouterr().err
