"""The integer codecs, bipolar integers and fp8: error bounds, limits, layouts, transforms and stochastic rounding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs
from memjax.codecs.packed import from_bits, to_bits

GRID = [
    pytest.param(make, symmetric, dtype, id=f"{make.__name__}-{'symmetric' if symmetric else 'affine'}-{dtype}")
    for make, symmetric, dtype in [
        *itertools.product((codecs.int8, codecs.int4), (True, False), ("bfloat16", "float16", "float32")),
        (codecs.int6, True, "bfloat16"),
        (codecs.int3, False, "bfloat16"),
        (codecs.int2, True, "bfloat16"),
        (codecs.int2, False, "bfloat16"),
    ]
]
FOUR = [param for param in GRID if param.values[0] in (codecs.int8, codecs.int4) and param.values[2] == "bfloat16"]
NF4, FP8, BIPOLAR = codecs.nf4(16), codecs.fp8(16), codecs.bipolar(3, 16)


def normal(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(scale)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def scales(packed):
    """Scale of every element, for groups along the last axis only."""
    scale = np.asarray(from_bits(jnp.asarray(packed.scale), packed.codec.scale_dtype))
    return np.repeat(scale, packed.shape[-1] // scale.shape[-1], axis=-1)


def dense_codes(packed):
    return np.asarray(codecs.unpack(packed.planes, packed.codec.bits, -1, packed.shape[-1] // packed.scale.shape[-1]))


@pytest.mark.parametrize("make, symmetric, dtype", GRID)
def test_error_is_at_most_half_a_step(make, symmetric, dtype):
    x = np.concatenate([normal(64, 256), normal(16, 256) + 40, normal(16, 256, scale=1e3), np.abs(normal(16, 256))])
    packed = make(32, symmetric, dtype).encode(x, axes=-1)
    difference = np.abs(np.asarray(packed.decode()) - x)
    step = np.abs(scales(packed))
    rounding = 1e-6 * np.abs(x)
    if symmetric:
        half = 2 ** (packed.codec.bits - 1)
        clipped = x / scales(packed) > half - 0.5
        assert (difference <= step * 1.501)[clipped].all()
        assert clipped.mean() < {2: 0.2, 3: 0.05}.get(packed.codec.bits, 0.02)
        difference = np.where(clipped, 0, difference)
    assert (difference <= step * 0.501 + rounding).all()
    assert (np.abs(difference) > step * 0.4).any()


@pytest.mark.parametrize("make, symmetric, dtype", GRID)
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
def test_encoding_the_decoded_gives_the_same_codes(make, symmetric, dtype, out):
    if out == "bfloat16" and (dtype != "bfloat16" or not symmetric):
        pytest.skip("bfloat16 does not hold the scale")
    if make is codecs.int8 and not symmetric and dtype == "bfloat16":
        pytest.skip("the rounding of the offset is not below half a step")
    packed = make(32, symmetric, dtype).encode(normal(32, 128), axes=-1).astype(out)
    decoded = packed.decode()
    assert decoded.dtype == jnp.dtype(out)
    again = packed.codec.encode(decoded, axes=-1)
    assert_same(packed.planes, again.planes)
    if symmetric or dtype != "float32":
        assert_same(packed, again)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_default_grid_has_the_least_error_on_gaussian_data(bits):
    x = normal(2048, 64)
    largest = np.abs(x).max(-1, keepdims=True)
    half = 2 ** (bits - 1)
    ours = getattr(codecs, f"int{bits}")(64, scale_dtype="float32").encode(x, axes=-1)
    squared = [np.mean((np.asarray(ours.decode()) - x) ** 2)]
    for step in (largest * 2 / (2**bits - 1), largest / (half - 1)):
        squared.append(np.mean((np.clip(np.rint(x / step), -half, half - 1) * step - x) ** 2))
    assert squared[0] < min(squared[1:])
    np.testing.assert_allclose(
        squared[0] / np.array(squared[1:]),
        {2: [0.60, 0.30], 3: [0.76, 0.58], 4: [0.85, 0.78], 6: [0.93, 0.945], 8: [0.95, 0.985]}[bits],
        atol=0.015,
    )


@pytest.mark.parametrize("make, symmetric, dtype", GRID)
def test_zeros_are_exact(make, symmetric, dtype):
    x = normal(4, 64)
    x[1], x[2, :32], x[3] = 0, 0, 1e-40
    packed = make(32, symmetric, dtype).encode(x, axes=-1)
    decoded = np.asarray(packed.decode())
    np.testing.assert_array_equal(decoded[1:], np.where(np.abs(x) < 1e-38, 0, decoded)[1:])
    assert (decoded[0] != 0).any()
    np.testing.assert_array_equal(scales(packed)[1], 1)


@pytest.mark.parametrize("make, symmetric, dtype", GRID)
def test_constant_groups(make, symmetric, dtype):
    value = np.float32([[3.3], [-0.017], [1.0], [-300.1]])
    packed = make(32, symmetric, dtype).encode(value.repeat(32, 1), axes=-1)
    relative = {"bfloat16": 2**-9, "float16": 2**-11, "float32": 2**-23}[dtype]
    relative *= 2 if symmetric else 0.1
    np.testing.assert_allclose(packed.decode(), value.repeat(32, 1), rtol=relative + 2e-7)


@pytest.mark.parametrize(
    "codec, axis",
    [*((codecs.nf4(8), axis) for axis in (-1, -2, -3)), (codecs.int3(16, False), -2), (BIPOLAR, -2), (FP8, -1)],
    ids=str,
)
def test_lookups_decode_what_they_read(codec, axis):
    packed = codec.encode(normal(3, 32, 6), axes=-2)
    indices = jnp.array([2, 0, 1, 2])
    expected = jnp.take(packed.decode(), indices, axis)
    np.testing.assert_array_equal(packed.take(indices, axis), expected)


@pytest.mark.parametrize(
    "codec", [codecs.fp8(16), codecs.fp8(16, "float16"), codecs.bipolar(1, 16), codecs.bipolar(7, 16)], ids=str
)
def test_fp8_and_bipolar_grids(codec):
    x = normal(64, 32)
    x[0], x[1, :16], x[2] = 0, 0, np.exp(normal(32, scale=8))
    packed = codec.encode(x, axes=-1)
    decoded, step = np.asarray(packed.decode()), scales(packed)
    if isinstance(codec, codecs.Fp8):
        grid = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
        bound = np.maximum(np.abs(x) / 16 + step * 2 * (np.abs(x) > step * 447), step * 2.0**-10)
    else:
        grid, bound = np.arange(-(2**codec.bits) + 1, 2**codec.bits, 2, dtype=np.float32), step * 1.005 * 2**codec.bits
        bound = np.minimum(bound, step + np.abs(x) * 2**-8)
    nearest = np.abs(x[..., None] - grid * step[..., None])
    np.testing.assert_allclose(np.abs(decoded - x), np.nanmin(nearest, axis=-1), rtol=1e-5, atol=1e-30)
    assert (np.abs(decoded - x) <= bound * 1.00001).all()
    assert (decoded[0] == 0).all() and (decoded[1, :16] == 0).all() and not np.signbit(decoded[0]).any()
    assert_same(packed, codec.encode(decoded, axes=-1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bipolar_words_are_sums_of_signed_bits(bits):
    codes = np.arange(2**bits, dtype=np.uint8)
    words = sum((2 * ((codes >> i) & 1).astype(int) - 1) * 2**i for i in range(bits))
    found = codecs.to_bipolar(codes, bits)
    np.testing.assert_array_equal(found, words)
    np.testing.assert_array_equal(codecs.from_bipolar(found, bits), codes)
    signed = codes.astype(int) - 2 ** (bits - 1)
    np.testing.assert_array_equal(found, 2 * signed + 1)
    x = words.repeat(8).astype(np.float32)
    np.testing.assert_array_equal(codecs.bipolar(bits, "channel").encode(x, -1).decode(), x)


def shrunk_ranges(x, bits, symmetric):
    """Every candidate of the search for each row of ``x``: (squared error, decoded values) of float32 scales."""
    half = 2 ** (bits - 1)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    center = 0 if symmetric else x.mean(-1, keepdims=True)
    for i in range(48):
        first, last = low + i / 64 * (center - low), high + i / 64 * (center - high)
        if symmetric:
            scale, offset, least, most = np.where(-low > high, first, last) / -half, 0, -half, half - 1
        else:
            scale, offset, least, most = (last - first) / (2**bits - 1), first, 0, 2**bits - 1
        decoded = np.clip(np.rint((x - offset) / scale), least, most) * scale + offset
        yield ((decoded - x) ** 2).sum(-1, keepdims=True), decoded


@pytest.mark.parametrize("make, symmetric", [(codecs.int2, True), (codecs.int3, False)])
def test_search_takes_the_range_of_least_squared_error(make, symmetric):
    x = normal(64, 64) + (0 if symmetric else 3)
    x[:8, 0] *= 20
    codec = make(64, symmetric, "float32", search=True)
    packed = codec.encode(x, axes=-1)
    errors, decoded = (np.array(part) for part in zip(*shrunk_ranges(x.astype(np.float64), codec.bits, symmetric)))
    best = np.take_along_axis(decoded, errors.argmin(0)[None], 0)[0]
    np.testing.assert_allclose(packed.decode(), best, rtol=2e-5, atol=2e-6)
    plain = make(64, symmetric, "float32").encode(x, axes=-1)
    assert codecs.error(x, packed).relative_frobenius < 0.97 * codecs.error(x, plain).relative_frobenius
    assert_same(packed.planes, codec.encode(packed.decode(), axes=-1).planes)
    with pytest.raises(ValueError, match="clips, so stochastic rounding would not be unbiased"):
        codec.encode(x, -1, key=0)


def test_search_finds_the_grid_of_weights_decoded_from_four_bits():
    grid = codecs.int4(32, symmetric=False, scale_dtype="float32").encode(normal(64, 64) + 3, axes=-1).decode()
    codec = codecs.int6(32, symmetric=False, scale_dtype="float32", search=True)
    np.testing.assert_allclose(codec.encode(grid, axes=-1).decode(), grid, atol=1e-5)


def test_search_keeps_one_candidate_at_a_time():
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    temp = [
        jax.jit(codecs.int2(64, search=search).encode).lower(x).compile().memory_analysis().temp_size_in_bytes
        for search in (False, True)
    ]
    assert temp[1] <= temp[0] + 1.1 * 1024 * 256 * 4  # a loop holds its own copy of what it reads


@pytest.mark.parametrize(
    "codec, bits",
    [
        (codecs.int8("channel"), 8.004),
        (codecs.int6(128), 6.125),
        (codecs.int4(32), 4.5),
        (codecs.int4(64), 4.25),
        (codecs.int4(128), 4.125),
        (codecs.int3(64), 3.25),
        (codecs.int2(64), 2.25),
        (codecs.fp8(), 8.004),
        (codecs.bipolar(2, 128), 2.125),
        (codecs.int4(256), 4.0625),
    ],
    ids=str,
)
def test_bits_per_weight_of_a_matrix(codec, bits):
    packed = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    assert packed.bits_per_element == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_one_and_of_everything(symmetric):
    x = normal(4, 6)
    one = codecs.int8(1, symmetric, "float32").encode(x, axes=-1)
    np.testing.assert_allclose(one.decode(), x, rtol=1e-6)
    channel = codecs.int8("channel", symmetric).encode(x, axes=-2)
    assert channel.scale.shape == (1, 6)
    assert_same(channel.planes, codecs.int8(4, symmetric).encode(x, axes=-2).planes)


def test_scale_is_rounded_before_codes_are_chosen():
    x = normal(64, 64)
    packed = codecs.int8(64).encode(x, axes=-1)
    expected = np.clip(np.rint(x / scales(packed)), -128, 127)
    np.testing.assert_array_equal(dense_codes(packed).view(np.int8), expected)
    exact = scales(codecs.int8(64, scale_dtype="float32").encode(x, axes=-1))
    assert (np.clip(np.rint(x / exact), -128, 127) != expected).any()


def test_float16_subnormal_scales():
    x = normal(8, 64, scale=1e-5)
    packed = codecs.int8(64, scale_dtype="float16").encode(x, axes=-1)
    bits = np.asarray(packed.scale)
    assert ((bits & 0x7C00) == 0).all() and ((bits & 0x03FF) != 0).any()
    step = bits.view(np.float16).astype(np.float32)
    expected = np.clip(np.rint(x / np.where(step == 0, 1, step)), -128, 127) * step
    np.testing.assert_array_equal(packed.decode(), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_rounding_of_scales(dtype, rounding):
    values = np.concatenate([normal(4096), normal(512, scale=1e-6), [0, 1, -1, 1 + 2**-9, -3e-8, 3e-8]]).astype(
        np.float32
    )
    rounded = np.asarray(jax.jit(lambda v: from_bits(to_bits(v, dtype, rounding), dtype))(values))
    nearest = np.asarray(values.astype(jnp.dtype(dtype))).astype(np.float32)
    half = values.astype(jnp.dtype(dtype))
    ends = [np.nextafter(half, np.asarray(end, half.dtype)).astype(np.float32) for end in (np.inf, -np.inf)]
    step = np.maximum(*(np.abs(end - nearest) for end in ends))
    if rounding == "nearest":
        np.testing.assert_array_equal(rounded, nearest)
    else:
        assert ((rounded >= values) if rounding == "up" else (rounded <= values)).all()
        assert (np.abs(rounded - values) <= step).all()
        np.testing.assert_array_equal(rounded[nearest == values], values[nearest == values])


@pytest.mark.parametrize(
    "axes, group, scale_shape",
    [
        ((-3, -2), 4, (4, 2, 6)),
        ((-3, -2), 8, (4, 1, 6)),
        ((-3, -2), 16, (2, 1, 6)),
        ((-3, -2), "channel", (1, 1, 6)),
        ((-2, -3), 4, (1, 8, 6)),
        ((-2, -3), 16, (1, 2, 6)),
    ],
)
def test_several_group_axes(axes, group, scale_shape):
    x = normal(4, 8, 6)
    packed = codecs.int4(group, symmetric=False).encode(x, axes=axes)
    assert packed.shape == x.shape and packed.scale.shape == scale_shape
    last = list(x.shape)
    last[axes[-1]] //= 2
    assert packed.planes[0].shape == tuple(last)
    size = 32 if group == "channel" else group
    flat = np.moveaxis(x, (3 + axes[0], 3 + axes[1]), (0, 1)).reshape(32, 6)
    expected = np.asarray(codecs.int4(size, symmetric=False).encode(flat, axes=-2).decode()).reshape(
        x.shape[axes[0]], -1, 6
    )
    np.testing.assert_array_equal(packed.decode(), np.moveaxis(expected, (0, 1), (3 + axes[0], 3 + axes[1])))


@pytest.mark.parametrize(
    "codec, key",
    [*itertools.product((codecs.int8(16, False), codecs.int4(16)), (None, 3)), (NF4, None)],
    ids=str,
)
def test_batch_axes(codec, key):
    x = normal(3, 32, 5)
    stacked = codec.encode(x, axes=-2)
    each = [codec.encode(layer, axes=-2) for layer in x]
    assert_same(stacked, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    assert_same(
        jax.vmap(lambda layer: codec.encode(layer, -2, key))(x),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *[codec.encode(layer, -2, key) for layer in x]),
    )
    np.testing.assert_array_equal(jax.vmap(lambda packed: packed.decode())(stacked), stacked.decode())
    sliced = jax.tree.map(lambda leaf: leaf[1], stacked)
    assert sliced.shape == (32, 5)
    np.testing.assert_array_equal(sliced.decode(), stacked.decode()[1])
    _, scanned = jax.lax.scan(lambda carry, packed: (carry, packed.decode()), 0, stacked)
    np.testing.assert_array_equal(scanned, stacked.decode())


@pytest.mark.parametrize(
    "codec, permutation",
    [
        *((codecs.int4(16), permutation) for permutation in itertools.permutations(range(3))),
        (NF4, (2, 0, 1)),
        (codecs.int6(16), (0, 2, 1)),
    ],
    ids=str,
)
def test_transpose(codec, permutation):
    packed = codec.encode(normal(3, 32, 6), axes=-2)
    moved = packed.transpose(permutation)
    np.testing.assert_array_equal(moved.decode(), np.transpose(packed.decode(), permutation))
    assert_same(moved.transpose(np.argsort(permutation)), packed)
    on_host = jax.tree.map(np.asarray, packed).transpose(permutation)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    np.testing.assert_array_equal(on_host.decode(), moved.decode())


@pytest.mark.parametrize("make, symmetric, dtype", GRID)
@pytest.mark.parametrize("group", [32, 64, "channel"])
def test_bits_per_element_is_exact(make, symmetric, dtype, group):
    packed = jax.eval_shape(make(group, symmetric, dtype).encode, normal(2, 128, 3))
    size = 128 if group == "channel" else group
    bits = {"bfloat16": 16, "float16": 16, "float32": 32}[dtype]
    assert packed.codec.bits_per_element(size) == packed.bits_per_element == packed.nbytes * 8 / packed.size
    assert packed.bits_per_element == packed.codec.bits + bits * (1 if symmetric else 2) / size
    assert all(leaf.ndim == 3 for leaf in jax.tree.leaves(packed))


def test_channel_bits_need_the_size():
    with pytest.raises(ValueError, match="needs the channel's size"):
        codecs.int4("channel").bits_per_element()


@pytest.mark.parametrize(
    "codec", [*(p.values[0](16, *p.values[1:]) for p in FOUR), codecs.int2(16, False, search=True), NF4], ids=str
)
def test_jit_gives_the_same_codes(codec):
    x = normal(32, 8, scale=3)
    assert_same(codec.encode(x), jax.jit(codec.encode)(x))
    packed = codec.encode(x)
    np.testing.assert_array_equal(packed.decode(), jax.jit(lambda p: p.decode())(packed))


@pytest.mark.parametrize(
    "codec",
    [*(p.values[0](32, *p.values[1:]) for p in FOUR), codecs.bipolar(3, 32), codecs.fp8(32)],
    ids=str,
)
def test_stochastic_rounding_is_unbiased(codec):
    draws = 512
    x = np.concatenate([normal(4, 32), np.abs(normal(2, 32)), normal(2, 32) + 3])
    keys = jax.random.split(jax.random.key(0), draws)
    decode = jax.jit(jax.vmap(lambda key: codec.encode(x, -1, key).decode()))
    samples = np.asarray(decode(keys), np.float64)
    step = np.abs(scales(codec.encode(x, -1, keys[0])))
    if isinstance(codec, codecs.Bipolar):
        step = 2 * step
    if isinstance(codec, codecs.Fp8):
        step = step * 2.0 ** (np.maximum(np.floor(np.log2(np.abs(x / step))), -6) - 3)
    assert (np.abs(samples - x) <= step * 1.0001).all()
    assert (samples.std(0) > 0).any()
    z = (samples.mean(0) - x) / (step * np.sqrt(0.25 / draws))
    assert np.abs(z).max() < 4.5
    assert abs(z.sum()) < 4 * np.sqrt(z.size)


def test_stochastic_rounding_depends_on_the_key_alone():
    codec, x = codecs.int4(32), normal(8, 64)
    a, b, c = (codec.encode(x, -1, jax.random.key(seed)) for seed in (1, 1, 2))
    assert_same(a, b)
    assert (np.asarray(a.planes[0]) != np.asarray(c.planes[0])).any()
    assert_same(a, jax.jit(lambda x, key: codec.encode(x, -1, key))(x, jax.random.key(1)))
    grid = np.asarray(
        codecs.int4(32, scale_dtype="float32")
        .encode(np.arange(-7, 8, dtype=np.float32)[:, None].repeat(32, 1), -1, 5)
        .decode()
    )
    np.testing.assert_allclose(grid, np.arange(-7, 8, dtype=np.float32)[:, None].repeat(32, 1), rtol=1e-6)


@pytest.mark.parametrize(
    "codec",
    [codecs.int4(16), codecs.int8(16, False), codecs.q4_1(), codecs.bipolar(5, 16), FP8, codecs.nf4(16, double=False)],
    ids=str,
)
def test_decode_is_elementwise(codec):
    packed = codec.encode(normal(2, 64, 4))
    inner = jax.make_jaxpr(lambda p: p.decode())(packed).jaxpr.eqns[0].params["jaxpr"]
    names = {equation.primitive.name for equation in inner.eqns}
    assert names <= {
        "add", "and", "bitcast_convert_type", "broadcast_in_dim", "convert_element_type", "iota", "mul",
        "ne", "or", "reshape", "select_n", "shift_left", "shift_right_logical", "sub",
    }  # fmt: skip


def test_decode_into_a_reduction_keeps_no_dense_copy():
    packed = codecs.int4(64).encode(normal(8, 1024, 64))
    step = lambda total, leaf: (total + jnp.sum(leaf.decode() ** 2), None)  # noqa: E731
    compiled = jax.jit(lambda p: jax.lax.scan(step, 0.0, p)[0]).lower(packed).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 64 * 2


def test_no_gradient_flows_through_codes():
    codec = codecs.int4(16)
    gradient = jax.grad(lambda x: jnp.sum(x * codec.encode(x, -1).decode()))(jnp.asarray(normal(4, 32)))
    np.testing.assert_array_equal(gradient, codec.encode(normal(4, 32), -1).decode())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_remembered(dtype):
    packed = codecs.int8(16).encode(jnp.asarray(normal(32, 4), dtype))
    assert packed.dtype == packed.decode().dtype == jnp.dtype(dtype)
    cast = packed.astype("float16")
    assert cast.decode().dtype == jnp.float16 and cast.decode("float32").dtype == jnp.float32
    assert_same(cast.planes, packed.planes)


def test_error_report():
    x = normal(64, 8)
    packed = codecs.int4(16).encode(x)
    report = codecs.error(x, packed)
    difference = np.asarray(packed.decode()) - x
    np.testing.assert_allclose(report.max_abs, np.abs(difference).max(), rtol=1e-6)
    np.testing.assert_allclose(report.relative_frobenius, np.linalg.norm(difference) / np.linalg.norm(x), rtol=1e-5)
    assert codecs.error(packed.decode(), packed) == (0, 0)
    zeros = np.zeros((16, 2), np.float32)
    assert codecs.error(zeros, codecs.int4(16).encode(zeros)) == (0, 0)
    with pytest.raises(ValueError, match=r"packed shape \(64, 8\), got \(8, 64\)"):
        codecs.error(x.T, packed)


def test_codecs_are_hashable_values():
    assert codecs.int4(64) == codecs.int4(64) != codecs.int4(32)
    assert len({codecs.int4(64), codecs.int4(64), codecs.q4_0(), codecs.q4_0()}) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", [codecs.int4(16), codecs.int8(16, False), codecs.q8_0(), NF4, FP8], ids=str)
def test_non_finite_input_raises(codec, bad):
    x = normal(64, 4)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="cannot encode NaN or infinity"):
        codec.encode(x)
    assert not np.isfinite(np.asarray(jax.jit(codec.encode)(x).decode())[:, 2]).all()


def test_bad_input():
    x = normal(48, 4)
    with pytest.raises(ValueError, match=r"groups of 32 do not divide the group axes -2 \(size 48\)"):
        codecs.int4(32).encode(x)
    with pytest.raises(ValueError, match="groups of 96 are larger than the group axes"):
        codecs.int4(96).encode(x)
    with pytest.raises(ValueError, match="groups of 24 do not divide"):
        codecs.int4(24).encode(normal(48, 16), axes=(-2, -1))
    with pytest.raises(ValueError, match=r"blocks of 3 elements .* cannot be packed at 4 bits"):
        codecs.int4(3).encode(x)
    with pytest.raises(ValueError, match="do not divide"):
        codecs.int4("channel").encode(np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="group axis -3 is out of range"):
        codecs.int4(16).encode(x, axes=-3)
    with pytest.raises(ValueError, match="distinct group axes"):
        codecs.int4(16).encode(x, axes=(0, -2))
    with pytest.raises(TypeError, match="got int32"):
        codecs.int4(16).encode(np.zeros((16, 2), np.int32))
    with pytest.raises(ValueError, match=r"largest finite size is 4\.585e"):
        codecs.int4(16, scale_dtype="float16").encode(x * 1e6)
    with pytest.raises(ValueError, match="expected a permutation of 2 axes"):
        codecs.int4(16).encode(x).transpose((0, 0))
    for group in (0, -4, 1.5, True, "row"):
        with pytest.raises(ValueError, match="group must be"):
            codecs.int4(group)
    with pytest.raises(ValueError, match="scale_dtype must be one of"):
        codecs.int8(16, scale_dtype="float64")


def test_repr_says_what_it_is_and_leaves_codes_out():
    text = repr(codecs.int4(group=64).encode(jnp.ones((64, 256)), -2))
    assert text.startswith("Packed(float32[64, 256] in 8,704 bytes, axes (-2,), Grouped(bits=4") and "array" not in text
