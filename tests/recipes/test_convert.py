import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax.recipes import cli
from memjax.recipes.convert import load_adapter, merge_model, quantize_model, worst
from memjax.recipes.formats import CODECS, codec_of
from memjax.weights import PackedWeight
from tests.adapters.peft_fixtures import FOLDER, base, load, logits
from tests.models.checkpoints import FOLDER as CHECKPOINTS

SOURCE = str(CHECKPOINTS / "llama_bytes")


def test_quantized_folders_are_models(tmp_path, capsys):
    out = str(tmp_path / "q")
    cli.main(["quantize", SOURCE, "--format", "int8", "--group", "16", "--out", out])
    printed = capsys.readouterr().out
    assert "layers/mlp/down_proj/kernel" in printed and "rel. err" in printed and f"wrote {out}" in printed
    saved, direct = (
        mj.models.load(out, dtype="float32"),
        mj.weights.quantize(base().params, mj.codecs.int8(group=16), where="**/*_proj/kernel"),
    )
    jax.tree.map(np.testing.assert_array_equal, saved.params, direct)
    assert f"{mj.weights.nbytes(base().params):,} -> {mj.weights.nbytes(direct):,} bytes" in printed
    cli.main(["inspect", out])
    assert "int8, group 16" in capsys.readouterr().out


def test_the_report_is_that_of_whole_leaves(tmp_path):
    report = quantize_model(SOURCE, tmp_path / "q", format="int4", group=16, where="**/kernel", dtype="float32")
    direct = mj.weights.report(
        base().params, mj.weights.quantize(base().params, mj.codecs.int4(group=16), where="**/kernel")
    )
    assert [row.path for row in report.leaves] == [row.path for row in direct.leaves]
    for found, expected in zip(report.leaves, direct.leaves):
        assert found[:4] == expected[:4]
        np.testing.assert_allclose(found[4:], expected[4:], rtol=1e-5)
    assert report[1:] == direct[1:]
    assert worst(report, 3).endswith("and 5 more with smaller errors")


@pytest.mark.parametrize("format", sorted({*CODECS} - {"int8", "int4"}))
def test_every_format_is_packed_as_whole_leaves_are(format, tmp_path):
    where = "**/q_proj/kernel"
    group = None if format.startswith("q") else 16
    report = quantize_model(SOURCE, tmp_path / "q", format=format, group=group, where=where, dtype="float32")
    saved = mj.models.load(tmp_path / "q", dtype="float32").params
    direct = mj.weights.quantize(base().params, codec_of(format, group), where=where)
    jax.tree.map(np.testing.assert_array_equal, saved, direct)
    ((row,), expected) = report.leaves, mj.weights.report(base().params, direct).leaves[0]
    np.testing.assert_allclose(row[2:], expected[2:], rtol=1e-5)


def test_a_source_that_is_packed_already_is_said_to_be(tmp_path, capsys):
    first, second = str(tmp_path / "8"), str(tmp_path / "4")
    cli.main(["quantize", SOURCE, "--format", "int8", "--group", "16", "--out", first])
    assert "warning" not in capsys.readouterr().err
    cli.main(["quantize", first, "--format", "int4", "--group", "16", "--out", second])
    printed, warned = capsys.readouterr()
    assert (
        warned
        == f"warning: {first} is packed in int8, group 16 already: packing it again rounds its weights a second time\n"
    )
    dense, stored, now = (
        mj.weights.nbytes(p)
        for p in (base().params, *(mj.models.load(f, dtype="float32").params for f in (first, second)))
    )
    assert f"{dense:,} dense, {stored:,} as stored -> {now:,} bytes" in printed
    cli.main(["inspect", first, "--format", "int4", "--group", "16"])
    assert "is packed in int8, group 16 already" in capsys.readouterr().err


def test_search_lowers_the_error_and_is_for_integers(tmp_path):
    settings = {"format": "int2", "group": 16, "where": "**/q_proj/kernel", "dtype": "float32"}
    plain, searched = (
        quantize_model(SOURCE, tmp_path / str(search), search=search, **settings).leaves[0].relative_frobenius
        for search in (False, True)
    )
    assert searched < plain
    with pytest.raises(ValueError, match="search is for the int formats"):
        codec_of("nf4", 64, search=True)


def test_an_embedding_is_packed_along_its_features(tmp_path):
    quantize_model(SOURCE, tmp_path / "q", format="q8_0", where="embed_tokens/embedding", dtype="float32")
    leaf = mj.models.load(tmp_path / "q", dtype="float32").params["embed_tokens"]["embedding"]
    assert isinstance(leaf, PackedWeight) and leaf.packed.axes == (-1,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_folders_hold_the_merged_model(dtype, tmp_path, capsys):
    out = str(tmp_path / "m")
    adapter = str(FOLDER / "lora_patterns")
    cli.main(["merge", "--model", SOURCE, "--adapter", adapter, "--out", out, "--dtype", dtype])
    assert "lora merged into 7 weights" in capsys.readouterr().out
    merged = mj.models.load(out, dtype="float32").params
    method, frozen, theta = load("lora_patterns")
    if dtype == "float32":
        np.testing.assert_allclose(logits(base(), merged), logits(base(), method.attach(frozen, theta)), atol=1e-4)
    expected = jax.jit(mj.weights.materialize)(method.attach(frozen, theta))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y.astype(dtype).astype(jnp.float32), rtol=2**-7, atol=1e-6),
        merged,
        expected,
    )


def test_merging_into_packed_weights(tmp_path):
    quantize_model(SOURCE, tmp_path / "q", format="int8", group=16, dtype="float32")
    merge_model(str(tmp_path / "q"), FOLDER / "lora", tmp_path / "same", format="keep", dtype="float32")
    merge_model(str(tmp_path / "q"), FOLDER / "lora", tmp_path / "int4", format="int4", group=8, dtype="float32")
    same, other = (mj.models.load(tmp_path / name, dtype="float32").params["layers"] for name in ("same", "int4"))
    assert same["self_attn"]["q_proj"]["kernel"].packed.codec == mj.codecs.int8(group=16)
    assert other["self_attn"]["q_proj"]["kernel"].packed.codec == mj.codecs.int4(group=8)
    assert other["mlp"]["up_proj"]["kernel"].packed.codec == mj.codecs.int8(group=16)


def test_adapters_of_runs_of_memjax_and_of_peft(tmp_path):
    adapter = mj.adapters.lora(rank=2, targets="**/q_proj/kernel")
    theta = adapter.init(jax.random.key(0), base().params)
    adapter.save(tmp_path / "run" / "adapter", theta)
    for folder in (tmp_path / "run", tmp_path / "run" / "adapter"):
        found = load_adapter(base(), folder)
        assert found[0] == adapter
        jax.tree.map(np.testing.assert_array_equal, found[2], theta)
    assert load_adapter(base(), FOLDER / "lora")[0].rank == 4
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["quantize", SOURCE, "--format", "int4", "--group", "64"], "layers/mlp/down_proj/kernel: groups of 64"),
        (["quantize", SOURCE, "--format", "int4", "--where", "**/z/kernel"], "matches no leaf"),
        (["merge", "--model", SOURCE, "--adapter", SOURCE], "holds no adapter"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--out", str(tmp_path / "x")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_folder_is_not_written_over(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        cli.main(["quantize", SOURCE, "--format", "int8", "--out", str(tmp_path)])
    assert "exists already" in capsys.readouterr().err
