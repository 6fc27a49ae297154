"""LoRA against the dense W + s A B."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import subjaxprs

from memjax import adapters, codecs, weights
from memjax.core.paths import map_with_path
from memjax.core.views import is_view
from memjax.weights import lift
from tests.random_views import array, assert_close

CODEC = codecs.int4(group=8)


def params():
    return {
        "embed": {"embedding": array(0, 12, 16)},
        "layers": {"q_proj": {"kernel": array(1, 2, 16, 16) / 4}, "up_proj": {"kernel": array(2, 2, 16, 16) / 4}},
        "head": {"kernel": array(3, 16, 8)},
    }


def model(params, tokens):
    def layer(x, p):
        return x + jnp.tanh(x @ p["q_proj"]["kernel"]) @ p["up_proj"]["kernel"], None

    x, _ = lax.scan(layer, params["embed"]["embedding"][tokens], params["layers"])
    return x @ params["head"]["kernel"]


TOKENS = jnp.array([[1, 2, 11], [5, 5, 0]])
ALL = ["**/kernel", "**/embedding"]


def trained(adapter, frozen, seed=0):
    """Returns factors with no zeros in them, as after some training."""
    theta = adapter.init(jax.random.key(seed), frozen)
    leaves, tree = jax.tree.flatten(theta)
    return jax.tree.unflatten(tree, [0.1 * array(100 + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def naive(frozen, theta, scale):
    """Returns the dense tree W + s A B."""

    def add(path, w):
        if path not in theta:
            return w
        a, b = theta[path]["a"], theta[path]["b"]
        return w + scale * jnp.einsum("...ir,...ro->...io", a, b, precision="highest")

    return map_with_path(add, weights.materialize(frozen))


@pytest.mark.smoke
@pytest.mark.parametrize("packed", [False, True])
def test_a_fresh_adapter_changes_nothing(packed):
    frozen = weights.quantize(params(), CODEC) if packed else params()
    adapter = adapters.lora(rank=3, targets=ALL)
    theta = adapter.init(jax.random.key(0), frozen)
    np.testing.assert_array_equal(lift(model)(adapter.attach(frozen, theta), TOKENS), lift(model)(frozen, TOKENS))


@pytest.mark.smoke
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_equal_the_dense_sum(packed):
    frozen = weights.quantize(params(), CODEC) if packed else params()
    adapter = adapters.lora(rank=3, alpha=6, targets=ALL)
    theta = trained(adapter, frozen)

    def run(weights_of, theta):
        y, back = jax.vjp(lambda theta: lift(model)(weights_of(theta), TOKENS), theta)
        return y, back(jnp.cos(y))

    def both(theta, frozen):
        return (
            run(lambda theta: adapter.attach(frozen, theta), theta),
            run(lambda theta: naive(frozen, theta, 2.0), theta),
        )

    actual, expected = jax.jit(both)(theta, frozen)
    assert_close(actual, expected, 3e-6)
    assert jax.tree.structure(actual[1][0]) == jax.tree.structure(theta)  # no gradient leaf for the base


def test_in_float64_the_sum_is_exact_to_rounding():
    with jax.enable_x64(True):
        frozen = jax.tree.map(lambda w: w.astype(jnp.float64), params())
        adapter = adapters.lora(rank=3, alpha=6, targets=ALL, dtype=jnp.float64)
        theta = jax.tree.map(lambda x: x.astype(jnp.float64), trained(adapter, frozen))
        actual = jax.jit(lift(model))(adapter.attach(frozen, theta), TOKENS)
        assert actual.dtype == jnp.float64
        dense = naive(frozen, theta, 2.0)
        assert_close(actual, jax.jit(model)(dense, TOKENS), 1e-13)
        assert_close(adapter.merge(frozen, theta)[0], dense, 1e-14)


def test_full_rank_reproduces_any_delta():
    w, delta = array(0, 8, 6), array(1, 8, 6)
    adapter = adapters.lora(rank=6, targets="w")
    u, s, v = np.linalg.svd(np.asarray(delta, np.float64), full_matrices=False)
    theta = {"w": {"a": jnp.asarray(u * s, jnp.float32), "b": jnp.asarray(v, jnp.float32)}}
    assert_close(adapter.attach({"w": w}, theta)["w"].materialize(), w + delta, 3e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_merge(packed):
    frozen = weights.quantize(params(), CODEC) if packed else params()
    adapter = adapters.lora(rank=3, targets="**/*_proj/kernel")
    theta = trained(adapter, frozen)
    exact = naive(frozen, theta, 1.0)
    expected = lift(model)(adapter.attach(frozen, theta), TOKENS)

    dense, report = adapter.merge(frozen, theta, to="dense")
    assert set(report) == set(theta)
    assert all(error.max_abs == error.relative_frobenius == 0 for error in report.values())
    assert not is_view(dense["layers"]["q_proj"]["kernel"])
    assert is_view(dense["head"]["kernel"]) == packed  # leaves without factors are left alone
    assert_close(lift(model)(dense, TOKENS), expected, 5e-6)

    for to in ("same", codecs.int8(group=16)):
        merged, report = adapter.merge(frozen, theta, to=to)
        for path, error in report.items():
            kernel, wanted = (tree["layers"][path.split("/")[1]]["kernel"] for tree in (merged, exact))
            if to == "same" and not packed:
                assert_close(kernel, wanted)
                continue
            assert kernel.packed.codec == (CODEC if to == "same" else to)
            off = np.asarray(kernel.materialize()) - np.asarray(wanted)
            assert error.max_abs == pytest.approx(np.abs(off).max(), rel=1e-3)
            assert error.relative_frobenius == pytest.approx(np.linalg.norm(off) / np.linalg.norm(wanted), rel=1e-3)
            assert error.relative_frobenius > 1e-3


def test_merge_into_bfloat16_reports_the_rounding():
    frozen = {"kernel": array(0, 8, 8, dtype=jnp.bfloat16)}
    adapter = adapters.lora(rank=2)
    theta = trained(adapter, frozen)
    merged, report = adapter.merge(frozen, theta)
    exact = np.asarray(frozen["kernel"], np.float64) + np.asarray(theta["kernel"]["a"] @ theta["kernel"]["b"])
    assert merged["kernel"].dtype == jnp.bfloat16
    off = np.abs(np.asarray(merged["kernel"], np.float64) - exact)
    assert report["kernel"].max_abs == pytest.approx(off.max(), rel=1e-3)


def test_merge_refuses_what_is_not_finite_and_unknown_formats():
    adapter = adapters.lora(rank=2, targets="head/kernel")
    theta = trained(adapter, params())
    with pytest.raises(ValueError, match="to='same', to='dense' or a codec, got 'int4'"):
        adapter.merge(params(), theta, to="int4")
    theta["head/kernel"]["a"] = theta["head/kernel"]["a"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="head/kernel: the merged weight is not finite"):
        adapter.merge(params(), theta)


def test_merge_keeps_the_format_or_says_that_it_cannot():
    w = {"kernel": array(0, 2, 16, 8)}
    adapter = adapters.lora(rank=2)
    theta = trained(adapter, w)
    packed = weights.quantize(w, codecs.int6(group=8))
    integer = weights.integer_activations(packed, {"kernel": weights.ActivationQuant(6, 16)})
    for frozen in (integer, weights.bipolar(w, 3, 8, group=8)):
        merged, report = adapter.merge(frozen, theta)
        assert jax.tree.structure(merged) == jax.tree.structure(frozen)
        exact = naive(frozen, theta, 1.0)["kernel"]
        off = float(jnp.linalg.norm(merged["kernel"].materialize() - exact) / jnp.linalg.norm(exact))
        assert 0 < report["kernel"].relative_frobenius == pytest.approx(off, rel=1e-4) and off < 0.3
    sparse, factored = weights.sparsify(w, "2:4"), weights.factorize(w, 2)
    for frozen, name in ((sparse, "NMSparse"), (factored, "Factored")):
        with pytest.raises(ValueError, match=f"kernel: what an adapter makes of a {name} weight does not fit"):
            adapter.merge(frozen, theta)
        assert_close(adapter.merge(frozen, theta, to="dense")[0], naive(frozen, theta, 1.0))
        assert adapter.merge(frozen, theta, to=CODEC)[0]["kernel"].packed.codec == CODEC


def test_two_adapters_add_up():
    frozen = weights.quantize(params(), CODEC)
    first, second = adapters.lora(rank=2, targets="head/*"), adapters.lora(rank=3, alpha=6, targets="**/kernel")
    one, two = trained(first, frozen), trained(second, frozen, 1)
    attached = second.attach(first.attach(frozen, one), two)
    dense = naive(naive(frozen, one, 1.0), two, 2.0)
    assert_close(lift(model)(attached, TOKENS), model(dense, TOKENS), 5e-6)
    merged, _ = second.merge(first.attach(frozen, one), two)
    assert merged["head"]["kernel"].packed.codec == CODEC


# ---- settings -----------------------------------------------------------------------------------------------------


def test_rank_and_alpha_by_pattern_and_scaling():
    frozen = params()
    adapter = adapters.lora(
        rank={"**/q_proj/*": 2, "**": 4}, alpha={"layers/**": 8}, targets="**/{q,up}_proj/kernel", scaling="rslora"
    )
    theta = adapter.init(jax.random.key(0), frozen)
    shapes = {path: (f["a"].shape, f["b"].shape) for path, f in theta.items()}
    assert shapes == {
        "layers/q_proj/kernel": ((2, 16, 2), (2, 2, 16)),
        "layers/up_proj/kernel": ((2, 16, 4), (2, 4, 16)),
    }
    attached = adapter.attach(frozen, theta)["layers"]
    assert attached["q_proj"]["kernel"].deltas[0].scale == pytest.approx(8 / math.sqrt(2))
    assert attached["up_proj"]["kernel"].deltas[0].scale == pytest.approx(8 / math.sqrt(4))
    assert adapters.lora(rank=4, alpha=8).scale("w", 4) == 2
    assert adapters.lora(rank=4).scale("w", 4) == 1


def test_rslora_keeps_the_output_deviation_whatever_the_rank():
    def deviation(rank):
        adapter = adapters.lora(rank=rank, alpha=16, targets="w", scaling="rslora", init="gaussian")
        frozen = {"w": jnp.zeros((256, 256))}
        theta = {"w": {"a": array(0, 256, rank), "b": array(1, rank, 256)}}
        return float(jnp.std(adapter.attach(frozen, theta)["w"].materialize()))

    assert deviation(64) == pytest.approx(deviation(4), rel=0.1)


def test_initial_factors():
    frozen = {"w": jnp.zeros((3, 400, 50)), "embedding": jnp.zeros((60, 400))}
    key = jax.random.key(0)
    theta = adapters.lora(rank=16, targets=["w", "embedding"]).init(key, frozen)
    a = np.asarray(theta["w"]["a"])
    assert np.abs(a).max() <= 1 / 20 and a.std() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.03)
    assert not np.any(theta["w"]["b"]) and not np.any(theta["embedding"]["a"])
    assert np.std(theta["embedding"]["b"]) == pytest.approx(1, rel=0.05)
    assert not np.array_equal(a[0], a[1])
    gaussian = adapters.lora(rank=16, targets="w", init="gaussian").init(key, frozen)["w"]["a"]
    assert np.std(gaussian) == pytest.approx(1 / 16, rel=0.03)
    ones = adapters.lora(rank=2, targets="w", init=lambda key, shape, dtype: jnp.ones(shape, dtype), dtype=jnp.bfloat16)
    assert np.all(ones.init(key, frozen)["w"]["a"] == 1) and ones.init(key, frozen)["w"]["b"].dtype == jnp.bfloat16
    again = adapters.lora(rank=16, targets="w").init(key, {"w": frozen["w"], "other": jnp.zeros((4, 4))})
    np.testing.assert_array_equal(again["w"]["a"], a)  # other leaves do not matter


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 2.5}, "rank must be"),
        ({"rank": {"**": -1}}, "rank must be"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"init": "xavier"}, "init must be .* got 'xavier'"),
        ({"dtype": "int8"}, "dtype must be floating point, got int8"),
        ({"scaling": "r"}, "scaling must be .* got 'r'"),
    ],
)
def test_settings_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        adapters.lora(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"targets": "**/k_proj/kernel"}, "pattern .* matches no leaf"),
        ({"targets": "**/{q,k}_proj/kernel"}, r"pattern '\*\*/k_proj/kernel' matches no leaf"),
        ({"targets": "head/kernel", "rank": 9}, "head/kernel: rank 9 is larger than the matrix, which is 16 x 8"),
        ({"targets": "head/kernel", "rank": {"embed/*": 2}}, "head/kernel: no pattern of rank="),
        ({"targets": "head/kernel", "alpha": {"tail": 2}}, "pattern 'tail' matches no leaf"),
        ({"targets": "head/kernel", "axes": {"tail": (0, 1)}}, "pattern 'tail' matches no leaf"),
        ({"targets": "bias"}, "bias: expected a weight of two or more axes"),
    ],
)
def test_targets_that_do_not_fit_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        adapters.lora(**{"rank": 2, **settings}).init(jax.random.key(0), {**params(), "bias": jnp.zeros(3)})


def test_factors_that_do_not_fit_raise():
    adapter = adapters.lora(rank=2, targets="head/kernel")
    theta = adapter.init(jax.random.key(0), params())
    with pytest.raises(ValueError, match=r"factors for \['head/kernel'\], which are no leaves"):
        adapter.attach({"tail": params()["head"]}, theta)
    with pytest.raises(ValueError, match=r"head/kernel: expected factors of shapes \(8, 2\) and \(2, 8\)"):
        adapter.attach({"head": {"kernel": jnp.zeros((8, 8))}}, theta)


# ---- dropout ------------------------------------------------------------------------------------------------------


def delta_of(adapter, theta, key, x, frozen):
    views = adapter.attach(frozen, theta, key)
    return lift(lambda p, x: x @ p["w"])(views, x)


def test_dropout():
    adapter = adapters.lora(rank=4, targets="w", dropout=0.25)
    frozen = {"w": jnp.zeros((32, 4))}
    theta = {"w": {"a": jnp.eye(32, 4), "b": jnp.eye(4)}}  # the delta's output is the first four inputs
    x = jnp.ones((2000, 32))
    y = delta_of(adapter, theta, jax.random.key(0), x, frozen)
    np.testing.assert_array_equal(y, delta_of(adapter, theta, jax.random.key(0), x, frozen))
    assert np.any(y != delta_of(adapter, theta, jax.random.key(1), x, frozen))
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    assert float(y.mean()) == pytest.approx(1, abs=4 * math.sqrt(1 / 3 / y.size))
    np.testing.assert_array_equal(delta_of(adapter, theta, None, x, frozen), x[:, :4])
    no_dropout = adapters.lora(rank=4, targets="w")
    np.testing.assert_array_equal(delta_of(no_dropout, theta, jax.random.key(0), x, frozen), x[:, :4])


def test_layers_of_a_stack_drop_differently():
    adapter = adapters.lora(rank=4, targets="*", dropout=0.5)
    frozen = {"w": jnp.zeros((3, 8, 4)), "v": jnp.zeros((3, 8, 4))}
    theta = {path: {"a": jnp.tile(jnp.eye(8, 4), (3, 1, 1)), "b": jnp.tile(jnp.eye(4), (3, 1, 1))} for path in frozen}
    views = adapter.attach(frozen, theta, jax.random.key(0))
    x = jnp.ones((50, 8))

    def masks(p, x):
        return lax.scan(lambda c, p: (c, (x @ p["w"], x @ p["v"])), 0, p)[1]

    w, v = jax.jit(lift(masks))(views, x)
    layers = [*w, *v]
    assert not any(np.array_equal(layers[i], layers[j]) for i in range(6) for j in range(i))


# ---- embeddings and convolutions ----------------------------------------------------------------------------------


def test_a_convolution_target():
    frozen = {"conv": {"kernel": array(0, 3, 3, 4, 6)}}

    def convolve(p, x):
        kernel = p["conv"]["kernel"]
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = array(1, 2, 5, 5, 4)
    axes = weights.infer_axes(convolve, frozen, x)
    adapter = adapters.lora(rank=2, targets="conv/kernel", axes=axes)
    theta = trained(adapter, frozen)
    assert theta["conv/kernel"]["a"].shape == (3, 3, 4, 2)
    delta = jnp.einsum("hwir,ro->hwio", theta["conv/kernel"]["a"], theta["conv/kernel"]["b"])
    expected = convolve({"conv": {"kernel": frozen["conv"]["kernel"] + delta}}, x)
    assert_close(lift(convolve)(adapter.attach(frozen, theta), x), expected, 5e-6)
    merged, _ = adapter.merge(frozen, theta)
    assert_close(convolve(merged, x), expected, 5e-6)


# ---- files --------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    adapter = adapters.lora(
        rank={"**/q_proj/*": 2, "**": 4},
        alpha=8,
        targets=ALL,
        dropout=0.1,
        scaling="rslora",
        axes={"head/kernel": (0, 1)},
        dtype=jnp.bfloat16,
    )
    theta = adapter.init(jax.random.key(0), params())
    adapter.save(tmp_path / "a", theta)
    assert sorted(os.listdir(tmp_path / "a")) == ["adapter.json", "adapter.safetensors"]
    again, frozen, loaded = adapters.load(tmp_path / "a", params())
    assert not any(map(is_view, jax.tree.leaves(frozen, is_leaf=is_view)))
    assert jax.tree.structure(loaded) == jax.tree.structure(theta)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(theta)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    before, after = (a.attach(params(), theta, jax.random.key(1)) for a in (adapter, again))
    np.testing.assert_array_equal(lift(model)(before, TOKENS), lift(model)(after, TOKENS))
    again.save(tmp_path / "b", loaded)
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter.json is missing"):
        adapters.load(tmp_path, params())
    adapter = adapters.lora(rank=2, targets="head/kernel")
    theta = adapter.init(jax.random.key(0), params())
    adapter.save(tmp_path, theta)
    settings = json.loads((tmp_path / "adapter.json").read_text())

    def refused(changed, why=""):
        text = changed if isinstance(changed, str) else json.dumps(changed)
        (tmp_path / "adapter.json").write_text(text)
        with pytest.raises(ValueError, match=f"is not a readable adapter: .*{why}"):
            adapters.load(tmp_path, params())

    for changed in (
        "{",
        "[]",
        {},
        {**settings, "format": "memjax-adapter-9"},
        {**settings, "rank": "2"},
        {**settings, "surprise": 1},
        {**settings, "axes": {"a": 3}},
        {**settings, "axes": [1]},
        {**settings, "dtype": "float99"},
    ):
        refused(changed)
    refused({**settings, "method": "telepathy"}, "method 'telepathy' is none of bias_only, .*, vera")
    (tmp_path / "adapter.json").write_text(json.dumps(settings))
    whole = (tmp_path / "adapter.safetensors").read_bytes()
    (tmp_path / "adapter.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="is not a readable adapter"):
        adapters.load(tmp_path, params())
    adapter.save(tmp_path, {"head/kernel": {"a": theta["head/kernel"]["a"]}})
    with pytest.raises(ValueError, match=r"head/kernel: expected the factors a and b, found \['a'\]"):
        adapters.load(tmp_path, params())


def test_a_failed_save_keeps_the_previous_adapter(tmp_path, monkeypatch):
    adapter = adapters.lora(rank=2, targets="head/kernel")
    theta = adapter.init(jax.random.key(0), params())
    adapter.save(tmp_path, theta)

    def full(tensors, file, metadata):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space"):
        adapter.save(tmp_path, jax.tree.map(lambda x: x + 1, theta))
    np.testing.assert_array_equal(adapters.load(tmp_path, params())[2]["head/kernel"]["a"], theta["head/kernel"]["a"])


def test_no_array_of_tokens_is_scaled():
    frozen, x = {"kernel": array(0, 16, 24)}, array(1, 32, 16)
    adapter = adapters.lora(rank=2, alpha=6.0, targets="kernel")
    theta = adapter.init(jax.random.key(0), frozen)
    apply = lift(lambda params, x: x @ params["kernel"])

    def gradients(theta, x, dy):
        return jax.vjp(lambda theta, x: apply(adapter.attach(frozen, theta), x), theta, x)[1](dy)

    def products(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (eqn.outvars[0].aval.shape for _ in range(eqn.primitive.name == "mul"))
        for inner in subjaxprs(jaxpr):
            yield from products(inner)

    found = list(products(jax.make_jaxpr(gradients)(theta, x, array(2, 32, 24)).jaxpr))
    assert found and not [shape for shape in found if 32 in shape]
